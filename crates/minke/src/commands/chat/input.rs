//! Where turns come from: a terminal with line editing and history, or a pipe.
//!
//! A turn is a line. A backslash at its end goes on with the next one, `"""` begins and ends several, and in a terminal
//! Alt-Enter begins a new one.

use std::io::{BufRead, IsTerminal, Read};
use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Cmd, Config, Context, Editor, EventHandler, Helper, KeyCode, KeyEvent, Modifiers};

use super::commands;
use crate::failure::Failure;
use crate::output;

/// A longer line from a pipe counts as several, and a longer turn is refused.
const MAX_TURN_BYTES: u64 = 16 << 20;
/// Turns that are remembered from run to run.
const MAX_HISTORY: usize = 1000;
/// A longer turn is not remembered: the file stays small.
const MAX_REMEMBERED_BYTES: usize = 16 << 10;
const PROMPT: &str = "> ";
const QUOTES: &str = "\"\"\"";

/// What was typed.
pub enum Typed {
    /// A turn or a command.
    Turn(String),
    /// Ctrl-C at the prompt.
    Nothing,
    /// Ctrl-D, or the end of the pipe.
    End,
}

/// See the module.
pub enum Input {
    /// A person's.
    Terminal(Box<Terminal>),
    /// A program's.
    Pipe(std::io::StdinLock<'static>),
}

/// A line editor and where its history is kept.
pub struct Terminal {
    editor: Editor<Lines, DefaultHistory>,
    history: Option<PathBuf>,
}

impl Input {
    /// A terminal where both ends are one; it remembers what was typed from run to run if told so.
    pub fn open(remembers: bool) -> Result<Self, Failure> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(Self::Pipe(stdin.lock()));
        }
        Ok(Self::Terminal(Box::new(Terminal::open(remembers)?)))
    }

    /// Whether a person looks at a terminal.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next turn.
    pub fn read(&mut self) -> Result<Typed, Failure> {
        match self {
            Self::Terminal(terminal) => terminal.read(),
            Self::Pipe(stdin) => {
                let mut turn = String::new();
                loop {
                    let Some(line) = line(stdin)? else {
                        // what a pipe leaves open is a turn all the same
                        return Ok(if turn.is_empty() { Typed::End } else { Typed::Turn(joined(&turn)) });
                    };
                    if !turn.is_empty() {
                        turn.push('\n');
                    }
                    turn.push_str(&line);
                    if turn.len() as u64 > MAX_TURN_BYTES {
                        let most = output::bytes(MAX_TURN_BYTES as f64);
                        return Err(Failure::user(format!("a turn has more than {most}")));
                    }
                    if !is_open(&turn) {
                        return Ok(Typed::Turn(joined(&turn)));
                    }
                }
            }
        }
    }
}

fn line(stdin: &mut impl BufRead) -> Result<Option<String>, Failure> {
    let mut bytes = Vec::new();
    let count = stdin
        .take(MAX_TURN_BYTES)
        .read_until(b'\n', &mut bytes)
        .map_err(|error| Failure::other(format!("cannot read standard input: {error}")))?;
    if count == 0 {
        return Ok(None);
    }
    let line = String::from_utf8_lossy(&bytes);
    Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned()))
}

impl Terminal {
    fn open(remembers: bool) -> Result<Self, Failure> {
        let fail = |error: ReadlineError| Failure::other(format!("the terminal: {error}"));
        let config = Config::builder()
            .max_history_size(MAX_HISTORY)
            .map_err(fail)?
            .history_ignore_dups(true)
            .map_err(fail)?
            .auto_add_history(false)
            .build();
        let mut editor = Editor::with_config(config).map_err(fail)?;
        editor.set_helper(Some(Lines));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), EventHandler::from(Cmd::Newline));
        let history = minke_data::expand_path("${XDG_DATA_HOME:-~/.local/share}/minke/chat_history");
        let history = history.ok().filter(|_| remembers);
        if let Some(path) = &history
            && path.is_file()
            && let Err(error) = editor.load_history(path)
        {
            output::note(&format!("note: {} cannot be read, history is empty: {error}", path.display()));
        }
        Ok(Self { editor, history })
    }

    fn read(&mut self) -> Result<Typed, Failure> {
        match self.editor.readline(PROMPT) {
            Ok(line) => {
                self.remember(&line);
                Ok(Typed::Turn(joined(&line)))
            }
            Err(ReadlineError::Interrupted) => Ok(Typed::Nothing),
            Err(ReadlineError::Eof) => Ok(Typed::End),
            Err(error) => Err(Failure::other(format!("cannot read from the terminal: {error}"))),
        }
    }

    /// Adds a turn to the history, in memory and in the file; what cannot be remembered is no failure.
    fn remember(&mut self, line: &str) {
        if line.trim().is_empty() || line.len() > MAX_REMEMBERED_BYTES {
            return;
        }
        let added = self.editor.add_history_entry(line).unwrap_or(false);
        let Some(path) = self.history.as_deref().filter(|_| added) else { return };
        if let Some(folder) = path.parent() {
            let _ = std::fs::create_dir_all(folder);
        }
        // appended, so that two chats at once keep both their turns; the library keeps the file to its owner
        let _ = self.editor.append_history(path);
    }
}

/// Whether a turn goes on with the next line.
fn is_open(turn: &str) -> bool {
    if turn.matches(QUOTES).count() % 2 == 1 {
        return true;
    }
    let slashes = turn.len() - turn.trim_end_matches('\\').len();
    slashes % 2 == 1
}

/// A turn without the marks that joined its lines.
fn joined(turn: &str) -> String {
    let trimmed = turn.trim();
    let inside = trimmed.strip_prefix(QUOTES).and_then(|rest| rest.strip_suffix(QUOTES));
    if let Some(inside) = inside {
        let inside = inside.strip_prefix('\n').unwrap_or(inside);
        return inside.strip_suffix('\n').unwrap_or(inside).to_owned();
    }
    let whole = turn.replace("\\\n", "\n");
    match whole.strip_suffix('\\') {
        // the input ended before the line that this one goes on in
        Some(cut) if is_open(turn) => cut.to_owned(),
        _ => whole,
    }
}

/// Tells the editor which lines go on, and completes commands.
struct Lines;

impl Validator for Lines {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if is_open(context.input()) {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Completer for Lines {
    type Candidate = String;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok((0, commands::completions(&line[..at])))
    }
}

impl Hinter for Lines {
    type Hint = String;
}

impl Highlighter for Lines {}

impl Helper for Lines {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_on_and_are_joined() {
        let cases = [
            ("plain", false, "plain"),
            ("a\\", true, "a"),
            ("a\\\nb", false, "a\nb"),
            ("a\\\\", false, "a\\\\"),
            ("\"\"\"", true, "\"\"\""),
            ("\"\"\"a\nb", true, "\"\"\"a\nb"),
            ("\"\"\"\na\n\nb\n\"\"\"", false, "a\n\nb"),
            ("\"\"\"one\"\"\"", false, "one"),
            ("say \"\"\"x\"\"\" y", false, "say \"\"\"x\"\"\" y"),
            ("鯨\\\n🐋", false, "鯨\n🐋"),
            ("", false, ""),
        ];
        for (turn, open, whole) in cases {
            assert_eq!(is_open(turn), open, "{turn:?}");
            assert_eq!(joined(turn), whole, "{turn:?}");
        }
    }
}
