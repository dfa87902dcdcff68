//! Thinking, shown apart.

use crate::output;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[22m";

/// Makes a stream of text safe for a terminal and shows what stands between `<think>` and `</think>` dim; without a
/// terminal text goes through unchanged.
pub struct Painter {
    painted: bool,
    thinking: bool,
    /// Text that may be the beginning of a mark.
    held: String,
}

impl Painter {
    /// A painter for a terminal, or for a pipe.
    pub fn new(painted: bool) -> Self {
        Self { painted, thinking: false, held: String::new() }
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
            out.push_str(&output::printable(&self.held[..at]));
            out.push_str(if self.thinking { PLAIN } else { DIM });
            self.thinking = !self.thinking;
            self.held.drain(..at + mark.len());
        }
        let mark = if self.thinking { CLOSE } else { OPEN };
        // marks are ASCII, so any length is a border of characters
        let keep = (1..mark.len()).rev().find(|&n| self.held.ends_with(&mark[..n])).unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        out.push_str(&output::printable(&self.held));
        self.held = rest;
        out
    }

    /// What to print at the end.
    pub fn finish(&mut self) -> String {
        let mut out = output::printable(&std::mem::take(&mut self.held)).into_owned();
        if std::mem::take(&mut self.thinking) {
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
}
