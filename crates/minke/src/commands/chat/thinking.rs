//! Thinking, shown apart.

use crate::output;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[22m";

/// Makes a stream of text safe for a terminal and shows what stands between `<think>` and `</think>` dim; without a
/// terminal text goes through unchanged.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact about the text so far")]
pub struct Painter {
    painted: bool,
    thinking: bool,
    /// Whether an answer stands on lines of its own behind its thought.
    apart: bool,
    /// Whether anything was thought.
    thought: bool,
    /// Whether line ends are left out until something comes, since they were written already.
    at_line: bool,
    /// Text that may be the beginning of a mark.
    held: String,
}

impl Painter {
    /// A painter for a terminal, or for a pipe.
    pub fn new(painted: bool) -> Self {
        Self { painted, thinking: false, apart: false, thought: false, at_line: false, held: String::new() }
    }

    /// A painter of a chat's answers, which sets them apart from their thoughts.
    pub fn answering(painted: bool) -> Self {
        Self { apart: true, ..Self::new(painted) }
    }

    /// Begins within a thought; what to print first.
    pub fn open(&mut self) -> &'static str {
        self.thinking = true;
        if self.painted { DIM } else { OPEN }
    }

    /// What to print for the next piece of text.
    pub fn paint(&mut self, piece: &str) -> String {
        if !self.painted {
            return piece.to_owned();
        }
        self.held.push_str(piece);
        let mut out = String::new();
        loop {
            let mark = if self.thinking { CLOSE } else { OPEN };
            let Some(at) = self.held.find(mark) else { break };
            let before = self.held[..at].to_owned();
            self.show(&before, &mut out);
            out.push_str(if self.thinking { PLAIN } else { DIM });
            if self.thinking && self.apart {
                out.push_str(if self.thought { "\n\n" } else { "" });
                self.at_line = true;
            }
            self.thinking = !self.thinking;
            self.held.drain(..at + mark.len());
        }
        let mark = if self.thinking { CLOSE } else { OPEN };
        // marks are ASCII, so any length is a border of characters
        let keep = (1..mark.len()).rev().find(|&n| self.held.ends_with(&mark[..n])).unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        let sure = std::mem::replace(&mut self.held, rest);
        self.show(&sure, &mut out);
        out
    }

    fn show(&mut self, text: &str, out: &mut String) {
        let text = if self.at_line { text.trim_start_matches('\n') } else { text };
        self.at_line &= text.is_empty();
        self.thought |= self.thinking && !text.trim().is_empty();
        out.push_str(&output::printable(text));
    }

    /// What to print at the end.
    pub fn finish(&mut self) -> String {
        let mut out = output::printable(&std::mem::take(&mut self.held)).into_owned();
        if std::mem::take(&mut self.thinking) && self.painted {
            out.push_str(PLAIN);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(painted: bool, pieces: &[&str]) -> String {
        let mut painter = Painter::new(painted);
        let mut out: String = pieces.iter().map(|piece| painter.paint(piece)).collect();
        out.push_str(&painter.finish());
        out
    }

    #[test]
    fn marks_may_lie_across_pieces() {
        let whole = "a<think>b\u{1b}</think>c<think>d";
        let expected = "a\u{1b}[2mb\u{fffd}\u{1b}[22mc\u{1b}[2md\u{1b}[22m";
        assert_eq!(run(true, &[whole]), expected);
        let letters: Vec<String> = whole.chars().map(String::from).collect();
        assert_eq!(run(true, &letters.iter().map(String::as_str).collect::<Vec<_>>()), expected);
        assert_eq!(run(true, &["x <th", "ree"]), "x <three");
        assert_eq!(run(false, &[whole]), whole);
    }

    #[test]
    fn an_answer_stands_apart_from_its_thought() {
        let run = |painted: bool, pieces: &[&str]| {
            let mut painter = Painter::answering(painted);
            let mut out = painter.open().to_owned();
            out.extend(pieces.iter().map(|piece| painter.paint(piece)));
            out + &painter.finish()
        };
        assert_eq!(run(true, &["why", "</thi", "nk>", "\n", "\nso"]), "\u{1b}[2mwhy\u{1b}[22m\n\nso");
        assert_eq!(run(true, &["\n</think>\n\nso"]), "\u{1b}[2m\n\u{1b}[22mso");
        assert_eq!(run(false, &["why</think>so"]), "<think>why</think>so");
        assert_eq!(run(false, &["wh"]), "<think>wh");
        assert_eq!(run(true, &["wh"]), "\u{1b}[2mwh\u{1b}[22m");
    }
}
