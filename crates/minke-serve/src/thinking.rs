//! Thought and answer of a stream, as clients get them: line ends around the marks belong to neither.

use minke_infer::{Piece, Splitter};

/// Parts of a text that are sure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    /// Of the thought.
    pub reasoning: String,
    /// Of the answer.
    pub content: String,
}

/// The two parts of an answer, told apart as it comes.
#[derive(Debug, Clone)]
pub struct Thoughts {
    splitter: Splitter,
    ends: LineEnds,
}

/// Where line ends are left out.
#[derive(Debug, Clone)]
struct LineEnds {
    /// Until something else comes.
    fresh: bool,
    /// Line ends of a thought, which may be its last.
    held: String,
}

impl Thoughts {
    /// Those of what follows a prompt, which may end within a thought.
    pub fn new(is_thinking: bool) -> Self {
        let ends = LineEnds { fresh: is_thinking, held: String::new() };
        Self { splitter: Splitter::new(is_thinking), ends }
    }

    /// Those of an answer that has no thought, whatever marks it has.
    pub fn none() -> Self {
        let ends = LineEnds { fresh: false, held: String::new() };
        Self { splitter: Splitter::without_thought(), ends }
    }

    /// Whether what comes next is thought.
    pub fn is_thinking(&self) -> bool {
        self.splitter.is_thinking()
    }

    /// Takes a piece of text and gives what is sure.
    pub fn push(&mut self, piece: &str) -> Parts {
        let mut parts = Parts::default();
        self.splitter.push(piece, &mut |piece| self.ends.take(piece, &mut parts));
        parts
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> Parts {
        let mut parts = Parts::default();
        self.splitter.finish(&mut |piece| self.ends.take(piece, &mut parts));
        parts
    }
}

impl LineEnds {
    fn take(&mut self, piece: Piece<'_>, parts: &mut Parts) {
        match piece {
            Piece::ThoughtBegins => self.fresh = true,
            Piece::Thought(text) => {
                let text = self.begun(text);
                self.held.push_str(text);
                let rest = self.held.split_off(self.held.trim_end_matches('\n').len());
                parts.reasoning.push_str(&std::mem::replace(&mut self.held, rest));
            }
            Piece::ThoughtEnds => {
                self.fresh = true;
                self.held.clear();
            }
            Piece::Said(text) => parts.content.push_str(self.begun(text)),
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
        let mut splitter = Thoughts::new(is_thinking);
        let mut all = Parts::default();
        let mut add = |parts: Parts| {
            all.reasoning.push_str(&parts.reasoning);
            all.content.push_str(&parts.content);
        };
        for piece in pieces {
            add(splitter.push(piece));
        }
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
        let mut splitter = Thoughts::new(false);
        assert_eq!(splitter.push("<think>why "), Parts { reasoning: "why ".into(), content: String::new() });
        assert!(splitter.is_thinking());
        assert_eq!(splitter.push("</think>a"), Parts { reasoning: String::new(), content: "a".into() });
        assert!(!splitter.is_thinking());
        assert_eq!(splitter.push("<"), Parts { reasoning: String::new(), content: "<".into() });
    }
}
