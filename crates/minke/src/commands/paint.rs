//! An answer on the screen: thoughts dim, and apart from what is said.

use minke_data::template::thinking::{CLOSE, OPEN};
use minke_infer::Piece;

use crate::output;

/// Begin and end a thought: dim text, or the model's marks where a terminal shows no styles.
const DIM: [&str; 2] = ["\x1b[2m", "\x1b[22m"];
const MARKS: [&str; 2] = [OPEN, CLOSE];

/// Makes the pieces of an answer safe for a terminal and shows thoughts dim; without a terminal text goes through as the
/// model wrote it.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact about the text so far")]
pub struct Painter {
    painted: bool,
    around: [&'static str; 2],
    /// Whether what is said stands on lines of its own behind the thought.
    apart: bool,
    /// Whether a thought is being shown.
    thinking: bool,
    /// Whether anything was thought.
    thought: bool,
    /// Whether line ends are left out until something comes, since they were written already.
    at_line: bool,
}

impl Painter {
    /// A painter for a terminal, or for a pipe; answers of a chat stand apart from their thoughts.
    pub fn new(painted: bool, apart: bool) -> Self {
        let around = if output::is_styled() { DIM } else { MARKS };
        Self { painted, around, apart, thinking: false, thought: false, at_line: false }
    }

    /// What to print for a piece.
    pub fn paint(&mut self, piece: Piece<'_>) -> String {
        if !self.painted {
            return piece.to_string();
        }
        match piece {
            Piece::ThoughtBegins => {
                (self.thinking, self.thought, self.at_line) = (true, false, self.apart);
                self.around[0].to_owned()
            }
            Piece::ThoughtEnds => {
                (self.thinking, self.at_line) = (false, self.apart);
                format!("{}{}", self.around[1], if self.apart && self.thought { "\n\n" } else { "" })
            }
            Piece::Thought(text) => {
                self.thought |= !text.trim().is_empty();
                self.show(text)
            }
            Piece::Said(text) => self.show(text),
        }
    }

    fn show(&mut self, text: &str) -> String {
        let text = if self.at_line { text.trim_start_matches('\n') } else { text };
        self.at_line &= text.is_empty();
        output::printable(text).into_owned()
    }

    /// What to print at the end.
    pub fn finish(&mut self) -> &'static str {
        if self.thinking && self.painted && self.around == DIM { DIM[1] } else { "" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(painted: bool, apart: bool, pieces: &[Piece<'_>]) -> String {
        run_around(DIM, painted, apart, pieces)
    }

    fn run_around(around: [&'static str; 2], painted: bool, apart: bool, pieces: &[Piece<'_>]) -> String {
        let mut painter = Painter { around, ..Painter::new(painted, apart) };
        let mut out: String = pieces.iter().map(|piece| painter.paint(*piece)).collect();
        out.push_str(painter.finish());
        out
    }

    #[test]
    fn thoughts_are_dim_and_apart() {
        use Piece::{Said, Thought, ThoughtBegins, ThoughtEnds};
        let whole = [ThoughtBegins, Thought("\nwhy\u{1b}"), ThoughtEnds, Said("\n"), Said("\nso")];
        assert_eq!(run(true, true, &whole), "\u{1b}[2mwhy\u{fffd}\u{1b}[22m\n\nso");
        assert_eq!(run(false, true, &whole), "<think>\nwhy\u{1b}</think>\n\nso");
        // without styles the marks tell them apart
        assert_eq!(run_around(MARKS, true, true, &whole), "<think>why\u{fffd}</think>\n\nso");
        assert_eq!(run_around(MARKS, true, true, &whole[..2]), "<think>why\u{fffd}");
        let empty = [ThoughtBegins, Thought("\n\n"), ThoughtEnds, Said("\n\nso")];
        assert_eq!(run(true, true, &empty), "\u{1b}[2m\u{1b}[22mso");
        // a thought that does not end leaves no dim terminal, and text that a base model goes on with stays as it is
        assert_eq!(run(true, true, &[ThoughtBegins, Thought("wh")]), "\u{1b}[2mwh\u{1b}[22m");
        let text = [Said("a"), ThoughtBegins, Thought("\nb"), ThoughtEnds, Said("\nc")];
        assert_eq!(run(true, false, &text), "a\u{1b}[2m\nb\u{1b}[22m\nc");
    }
}
