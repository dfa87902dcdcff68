//! An answer on the screen: thoughts dim, and apart from what is said.

use minke_infer::Piece;

use crate::output;

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[22m";

/// Makes the pieces of an answer safe for a terminal and shows thoughts dim; without a terminal text goes through as the
/// model wrote it.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact about the text so far")]
pub struct Painter {
    painted: bool,
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
        Self { painted, apart, thinking: false, thought: false, at_line: false }
    }

    /// What to print for a piece.
    pub fn paint(&mut self, piece: Piece<'_>) -> String {
        if !self.painted {
            return piece.to_string();
        }
        match piece {
            Piece::ThoughtBegins => {
                (self.thinking, self.thought, self.at_line) = (true, false, self.apart);
                DIM.to_owned()
            }
            Piece::ThoughtEnds => {
                (self.thinking, self.at_line) = (false, self.apart);
                format!("{PLAIN}{}", if self.apart && self.thought { "\n\n" } else { "" })
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
        if self.thinking && self.painted { PLAIN } else { "" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(painted: bool, apart: bool, pieces: &[Piece<'_>]) -> String {
        let mut painter = Painter::new(painted, apart);
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
        let empty = [ThoughtBegins, Thought("\n\n"), ThoughtEnds, Said("\n\nso")];
        assert_eq!(run(true, true, &empty), "\u{1b}[2m\u{1b}[22mso");
        // a thought that does not end leaves no dim terminal, and text that a base model goes on with stays as it is
        assert_eq!(run(true, true, &[ThoughtBegins, Thought("wh")]), "\u{1b}[2mwh\u{1b}[22m");
        let text = [Said("a"), ThoughtBegins, Thought("\nb"), ThoughtEnds, Said("\nc")];
        assert_eq!(run(true, false, &text), "a\u{1b}[2m\nb\u{1b}[22m\nc");
    }
}
