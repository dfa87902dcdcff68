//! Thought and answer, told apart in a stream of text.

use minke_data::template::thinking::{CLOSE, OPEN};

/// Parts of a text that are sure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    /// Of the thought.
    pub reasoning: String,
    /// Of the answer.
    pub content: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space yet: it may be a thought that begins.
    Before,
    Thinking,
    Answering,
}

/// Splits a text into what stands between `<think>` and `</think>` at its beginning, and the rest; line ends around
/// the marks belong to neither.
#[derive(Debug, Clone)]
pub struct Splitter {
    state: State,
    /// Whether line ends are left out until something comes.
    fresh: bool,
    held: String,
}

impl Splitter {
    /// A splitter of what follows a prompt, which may end within a thought.
    pub fn new(is_thinking: bool) -> Self {
        let state = if is_thinking { State::Thinking } else { State::Before };
        Self { state, fresh: is_thinking, held: String::new() }
    }

    /// Whether what comes next is thought.
    pub fn is_thinking(&self) -> bool {
        self.state == State::Thinking
    }

    /// Takes a piece of text and gives what is sure.
    pub fn push(&mut self, piece: &str) -> Parts {
        self.held.push_str(piece);
        let mut parts = Parts::default();
        loop {
            match self.state {
                State::Before => {
                    let text = self.held.trim_start();
                    if let Some(rest) = text.strip_prefix(OPEN) {
                        self.held = rest.to_owned();
                        (self.state, self.fresh) = (State::Thinking, true);
                    } else if OPEN.starts_with(text) {
                        return parts;
                    } else {
                        self.state = State::Answering;
                    }
                }
                State::Thinking => {
                    if let Some(at) = self.held.find(CLOSE) {
                        let rest = self.held.split_off(at + CLOSE.len());
                        let thought = std::mem::replace(&mut self.held, rest);
                        let thought = thought[..at].trim_end_matches('\n');
                        parts.reasoning.push_str(self.begun(thought));
                        (self.state, self.fresh) = (State::Answering, true);
                    } else {
                        // marks are ASCII, so any length is a border of characters
                        let keep = (1..CLOSE.len()).rev().find(|&n| self.held.ends_with(&CLOSE[..n]));
                        let sure = &self.held[..self.held.len() - keep.unwrap_or(0)];
                        let sure = sure.trim_end_matches('\n').len();
                        let rest = self.held.split_off(sure);
                        let thought = std::mem::replace(&mut self.held, rest);
                        parts.reasoning.push_str(self.begun(&thought));
                        return parts;
                    }
                }
                State::Answering => {
                    let answer = std::mem::take(&mut self.held);
                    parts.content.push_str(self.begun(&answer));
                    return parts;
                }
            }
        }
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> Parts {
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::Thinking => {
                Parts { reasoning: self.begun(rest.trim_end_matches('\n')).to_owned(), ..Parts::default() }
            }
            State::Before | State::Answering => {
                Parts { content: self.begun(&rest).to_owned(), ..Parts::default() }
            }
        }
    }

    fn begun<'t>(&mut self, text: &'t str) -> &'t str {
        let text = if self.fresh { text.trim_start_matches('\n') } else { text };
        self.fresh &= text.is_empty();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(is_thinking: bool, pieces: &[&str]) -> (String, String) {
        let mut splitter = Splitter::new(is_thinking);
        let mut all = Parts::default();
        let mut add = |parts: Parts| {
            all.reasoning.push_str(&parts.reasoning);
            all.content.push_str(&parts.content);
        };
        pieces.iter().for_each(|piece| add(splitter.push(piece)));
        add(splitter.finish());
        (all.reasoning, all.content)
    }

    #[test]
    fn pieces_do_not_matter() {
        let cases = [
            (false, "<think>\nwhy\n\nso\n</think>\n\nyes\n", "why\n\nso", "yes\n"),
            (false, " \n<think></think>yes", "", "yes"),
            (false, "\n yes <think>no</think>", "", "\n yes <think>no</think>"),
            (false, "<thin air", "", "<thin air"),
            (false, "<think>never ends\n</thi", "never ends\n</thi", ""),
            (false, "", "", ""),
            (true, "\nwhy\n</think>\n\n\nyes", "why", "yes"),
            (true, "why </think> <think>x</think>", "why ", " <think>x</think>"),
            (true, "a\n</thinking>\nb\n", "a\n</thinking>\nb", ""),
        ];
        for (is_thinking, text, reasoning, content) in cases {
            let expected = (reasoning.to_owned(), content.to_owned());
            assert_eq!(run(is_thinking, &[text]), expected, "{text:?}");
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            assert_eq!(run(is_thinking, &letters), expected, "{text:?} by letters");
            for at in 0..=text.len() {
                assert_eq!(run(is_thinking, &[&text[..at], &text[at..]]), expected, "{text:?} cut at {at}");
            }
        }
    }

    #[test]
    fn what_is_sure_is_not_held_back() {
        let mut splitter = Splitter::new(false);
        assert_eq!(splitter.push("<think>why "), Parts { reasoning: "why ".into(), content: String::new() });
        assert!(splitter.is_thinking());
        assert_eq!(splitter.push("</think>a"), Parts { reasoning: String::new(), content: "a".into() });
        assert!(!splitter.is_thinking());
        assert_eq!(splitter.push("<"), Parts { reasoning: String::new(), content: "<".into() });
    }
}
