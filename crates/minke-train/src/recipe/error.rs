//! What a recipe may say wrongly, shown where it stands.

use std::fmt;
use std::path::PathBuf;

use minke_model::config::ConfigError;

/// A place in a recipe or in a `--set` option, with the line that it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The recipe's name, or `--set`.
    pub name: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The whole line.
    pub text: String,
    /// How many characters are meant.
    pub width: usize,
}

impl Frame {
    /// The frame of bytes `span` of `text`.
    pub(super) fn new(name: &str, text: &str, span: std::ops::Range<usize>) -> Self {
        let start = floor_boundary(text, span.start);
        let end = floor_boundary(text, span.end.max(span.start));
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let meant = &text[start..end.clamp(start, line_end)];
        let line_text: String = text[line_start..line_end].trim_end_matches('\r').chars().take(200).collect();
        Self {
            name: name.to_owned(),
            line: text[..start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            text: line_text,
            width: meant.chars().count().clamp(1, 80),
        }
    }
}

fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

impl fmt::Display for Frame {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.line.to_string();
        let margin = " ".repeat(number.len());
        // tabs keep their place under the line
        let indent: String = self.text.chars().take(self.column - 1).map(blank).collect();
        let indent =
            format!("{indent}{}", " ".repeat((self.column - 1).saturating_sub(indent.chars().count())));
        writeln!(formatter, "\n{margin}--> {}:{}:{}", self.name, self.line, self.column)?;
        writeln!(formatter, "{margin} |")?;
        writeln!(formatter, "{number} | {}", self.text)?;
        write!(formatter, "{margin} | {indent}{}", "^".repeat(self.width))
    }
}

fn blank(character: char) -> char {
    if character == '\t' { '\t' } else { ' ' }
}

/// The line with the next step, when there is one.
fn help(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!("\n  = help: {hint}") }
}

fn framed(frame: Option<&Frame>) -> String {
    frame.map(Frame::to_string).unwrap_or_default()
}

/// Why a recipe cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read recipe {path}: {reason}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The recipe is another command's.
    #[error("{name} is a recipe for `minke {got}`: expected one for `minke {expected}`")]
    OtherCommand {
        /// The recipe's name.
        name: String,
        /// The command that reads it.
        expected: &'static str,
        /// The command that it is for.
        got: String,
    },
    /// The text is not TOML.
    #[error("recipe is not valid TOML: {message}{frame}")]
    Syntax {
        /// What the parser says.
        message: String,
        /// Where.
        frame: Box<Frame>,
    },
    /// A key that no section knows.
    #[error("unknown key `{key}` in {section}{frame}{hint}", hint = help(hint))]
    UnknownKey {
        /// The key.
        key: String,
        /// Its section.
        section: String,
        /// Where.
        frame: Box<Frame>,
        /// The nearest key, or the known ones.
        hint: String,
    },
    /// A key whose value has the wrong type or is out of bounds.
    #[error("`{key}`: expected {expected}, got {got}{frame}{hint}", frame = framed(frame.as_deref()), hint = help(hint))]
    Invalid {
        /// The dotted key.
        key: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        got: String,
        /// Where; absent when the value was derived.
        frame: Option<Box<Frame>>,
        /// The next step, or empty.
        hint: String,
    },
    /// A key that has no default is absent.
    #[error("`{key}` is missing from {name}: expected {expected}{hint}", hint = help(hint))]
    Missing {
        /// The dotted key.
        key: String,
        /// The recipe's name.
        name: String,
        /// What should stand there.
        expected: String,
        /// The next step, or empty.
        hint: String,
    },
    /// The model that the recipe describes is impossible.
    #[error("impossible model: {source}{frame}{hint}", frame = framed(frame.as_deref()), hint = help(hint))]
    Model {
        /// What is wrong with it.
        source: ConfigError,
        /// The key that says so, or the one that it was derived from.
        frame: Option<Box<Frame>>,
        /// How the value came about, when it was derived.
        hint: String,
    },
    /// A `--set` option that cannot be applied.
    #[error("--set {text}: {reason}")]
    Override {
        /// The option's text.
        text: String,
        /// Why not.
        reason: String,
    },
}
