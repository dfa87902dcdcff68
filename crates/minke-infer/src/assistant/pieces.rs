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

/// Tells thoughts from what is said in a stream of text, wherever the pieces of the stream begin and end.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    is_thinking: bool,
    /// Whether a thought was begun.
    thinks: bool,
    /// Text that may be the beginning of a mark.
    held: String,
    thought: String,
    said: String,
}

impl Splitter {
    /// An answer that begins within a thought has its mark in the prompt.
    pub fn new(is_thinking: bool) -> Self {
        Self { is_thinking, thinks: is_thinking, ..Self::default() }
    }

    /// Takes a piece of the stream and hands on what is sure.
    pub fn push(&mut self, text: &str, on: &mut dyn FnMut(Piece<'_>)) {
        self.held.push_str(text);
        loop {
            let mark = if self.is_thinking { CLOSE } else { OPEN };
            let Some(at) = self.held.find(mark) else { break };
            let rest = self.held.split_off(at + mark.len());
            self.held.truncate(at);
            let before = std::mem::replace(&mut self.held, rest);
            self.give(&before, on);
            on(if self.is_thinking { Piece::ThoughtEnds } else { Piece::ThoughtBegins });
            self.is_thinking = !self.is_thinking;
            self.thinks = true;
        }
        let mark = if self.is_thinking { CLOSE } else { OPEN };
        // marks are ASCII, so any length is a border of characters
        let keep = (1..mark.len()).rev().find(|&n| self.held.ends_with(&mark[..n])).unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        let sure = std::mem::replace(&mut self.held, rest);
        self.give(&sure, on);
    }

    /// Ends the stream: what was held back is text after all. Gives the thought, if there was one, and what was said,
    /// without the line ends between them.
    pub fn finish(mut self, on: &mut dyn FnMut(Piece<'_>)) -> (Option<String>, String) {
        let rest = std::mem::take(&mut self.held);
        self.give(&rest, on);
        if !self.thinks {
            return (None, self.said);
        }
        (Some(self.thought.trim_matches('\n').to_owned()), self.said.trim_start_matches('\n').to_owned())
    }

    fn give(&mut self, text: &str, on: &mut dyn FnMut(Piece<'_>)) {
        if text.is_empty() {
            return;
        }
        if self.is_thinking {
            self.thought.push_str(text);
            on(Piece::Thought(text));
        } else {
            self.said.push_str(text);
            on(Piece::Said(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(is_thinking: bool, pieces: &[&str]) -> (String, Option<String>, String) {
        let mut splitter = Splitter::new(is_thinking);
        let mut shown = String::new();
        let mut on = |piece: Piece<'_>| shown.push_str(&piece.to_string());
        for piece in pieces {
            splitter.push(piece, &mut on);
        }
        let (thought, said) = splitter.finish(&mut on);
        (shown, thought, said)
    }

    #[test]
    fn marks_may_lie_across_pieces() {
        let whole = "a<think>b鯨</think>\n\nc <th</think>";
        let expected = (whole.to_owned(), Some("b鯨".to_owned()), "a\n\nc <th</think>".to_owned());
        assert_eq!(run(false, &[whole]), expected);
        let letters: Vec<String> = whole.chars().map(String::from).collect();
        assert_eq!(run(false, &letters.iter().map(String::as_str).collect::<Vec<_>>()), expected);
    }

    #[test]
    fn an_answer_may_begin_within_its_thought_and_end_there() {
        let of = |is_thinking, pieces: &[&str]| {
            let (_, thought, said) = run(is_thinking, pieces);
            (thought, said)
        };
        assert_eq!(of(true, &["\nwhy\n", "</thi", "nk>\n\nso"]), (Some("why".into()), "so".into()));
        assert_eq!(of(true, &["cut off"]), (Some("cut off".into()), String::new()));
        assert_eq!(of(true, &["</think>x"]), (Some(String::new()), "x".into()));
        assert_eq!(of(false, &["\n x <thin"]), (None, "\n x <thin".into()));
    }
}
