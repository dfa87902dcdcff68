//! An answer as it comes: what is thought, and what is said.

use std::fmt;

use minke_data::template::thinking::{CLOSE, OPEN};

/// A piece of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// The model begins to think.
    ThoughtBegins,
    /// What it thinks.
    Thought(&'a str),
    /// The thought is at its end.
    ThoughtEnds,
    /// What it says.
    Said(&'a str),
}

impl Piece<'_> {
    /// What is said; nothing of thoughts.
    pub fn said(&self) -> &str {
        match self {
            Self::Said(text) => text,
            Self::ThoughtBegins | Self::Thought(_) | Self::ThoughtEnds => "",
        }
    }
}

/// As the model wrote it, marks of thinking and all.
impl fmt::Display for Piece<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ThoughtBegins => OPEN,
            Self::ThoughtEnds => CLOSE,
            Self::Thought(text) | Self::Said(text) => text,
        })
    }
}

/// Tells the thought of an answer from what is said, wherever the pieces of its stream begin and end. A thought stands at
/// the beginning, between `<think>` and `</think>`; marks that come later are text.
#[derive(Debug, Clone)]
pub struct Splitter {
    state: State,
    /// Text that may be the beginning of a mark.
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space yet: it may be a thought that begins.
    Before,
    Thinking,
    Saying,
}

impl Splitter {
    /// A splitter of what follows a prompt, which may end within a thought: its mark is in the prompt then.
    pub fn new(is_thinking: bool) -> Self {
        let state = if is_thinking { State::Thinking } else { State::Before };
        Self { state, held: String::new() }
    }

    /// A splitter of a text that has no thought, such as one whose form a mark would belong to.
    pub fn without_thought() -> Self {
        Self { state: State::Saying, held: String::new() }
    }

    /// Whether what comes next is thought.
    pub fn is_thinking(&self) -> bool {
        self.state == State::Thinking
    }

    /// Takes a piece of the stream and hands on what is sure.
    pub fn push(&mut self, text: &str, on: &mut dyn FnMut(Piece<'_>)) {
        self.held.push_str(text);
        loop {
            match self.state {
                State::Before => {
                    let text = self.held.trim_start();
                    if let Some(rest) = text.strip_prefix(OPEN) {
                        self.held = rest.to_owned();
                        self.state = State::Thinking;
                        on(Piece::ThoughtBegins);
                    } else if OPEN.starts_with(text) {
                        return;
                    } else {
                        self.state = State::Saying;
                    }
                }
                State::Thinking => {
                    if let Some(at) = self.held.find(CLOSE) {
                        self.give(at, on);
                        self.held.drain(..CLOSE.len());
                        self.state = State::Saying;
                        on(Piece::ThoughtEnds);
                    } else {
                        // marks are ASCII, so any length is a border of characters
                        let keep = (1..CLOSE.len()).rev().find(|&n| self.held.ends_with(&CLOSE[..n]));
                        return self.give(self.held.len() - keep.unwrap_or(0), on);
                    }
                }
                State::Saying => return self.give(self.held.len(), on),
            }
        }
    }

    /// Ends the stream: what was held back is text after all.
    pub fn finish(&mut self, on: &mut dyn FnMut(Piece<'_>)) {
        self.give(self.held.len(), on);
    }

    /// Hands on so many bytes of what is held.
    fn give(&mut self, len: usize, on: &mut dyn FnMut(Piece<'_>)) {
        let rest = self.held.split_off(len);
        let text = std::mem::replace(&mut self.held, rest);
        if !text.is_empty() {
            on(if self.is_thinking() { Piece::Thought(&text) } else { Piece::Said(&text) });
        }
    }
}

/// The pieces of an answer put together.
#[derive(Debug, Default)]
pub struct Whole {
    thought: Option<String>,
    said: String,
}

impl Whole {
    /// Takes the next piece.
    pub fn take(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::ThoughtBegins => self.thought = Some(String::new()),
            Piece::Thought(text) => self.thought.get_or_insert_default().push_str(text),
            Piece::ThoughtEnds => {}
            Piece::Said(text) => self.said.push_str(text),
        }
    }

    /// The thought, if there was one, and what was said, without the line ends between them.
    pub fn parts(self) -> (Option<String>, String) {
        match self.thought {
            Some(thought) => {
                (Some(thought.trim_matches('\n').to_owned()), self.said.trim_start_matches('\n').to_owned())
            }
            None => (None, self.said),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(is_thinking: bool, pieces: &[&str]) -> (String, Option<String>, String) {
        let (mut splitter, mut whole) = (Splitter::new(is_thinking), Whole::default());
        let mut shown = String::new();
        let mut on = |piece: Piece<'_>| {
            shown.push_str(&piece.to_string());
            whole.take(piece);
        };
        if is_thinking {
            on(Piece::ThoughtBegins);
        }
        for piece in pieces {
            splitter.push(piece, &mut on);
        }
        splitter.finish(&mut on);
        let (thought, said) = whole.parts();
        (shown, thought, said)
    }

    #[test]
    fn pieces_do_not_matter() {
        let cases = [
            (false, "<think>\nw鯨\n\nso\n</think>\n\nyes\n", Some("w鯨\n\nso"), "yes\n"),
            (false, " \n<think></think>yes", Some(""), "yes"),
            (false, "\n yes <think>no</think>", None, "\n yes <think>no</think>"),
            (false, "<thin air", None, "<thin air"),
            (false, "\n <thin", None, "\n <thin"),
            (false, "<think>never ends\n</thi", Some("never ends\n</thi"), ""),
            (false, "", None, ""),
            (true, "\nwhy\n</think>\n\n\nyes", Some("why"), "yes"),
            (true, "why </think> <think>x</think>", Some("why "), " <think>x</think>"),
            (true, "</think>x", Some(""), "x"),
            (true, "", Some(""), ""),
        ];
        for (is_thinking, text, thought, said) in cases {
            let begun = if is_thinking { OPEN } else { "" };
            let shown =
                format!("{begun}{}", if thought.is_some() { text.trim_start_matches(" \n") } else { text });
            let expected = (shown, thought.map(str::to_owned), said.to_owned());
            assert_eq!(run(is_thinking, &[text]), expected, "{text:?}");
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            assert_eq!(run(is_thinking, &letters), expected, "{text:?} by letters");
            for at in (0..=text.len()).filter(|&at| text.is_char_boundary(at)) {
                assert_eq!(run(is_thinking, &[&text[..at], &text[at..]]), expected, "{text:?} cut at {at}");
            }
        }
    }
}
