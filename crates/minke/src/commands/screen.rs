//! Standard error during a run: lines, and a bar below them on a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Without a terminal something that goes on is told about at this pace.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// See the module.
pub struct Screen {
    bar: ProgressBar,
    terminal: bool,
    last_line: Option<Instant>,
}

impl Screen {
    /// Nothing drawn yet.
    pub fn new() -> Self {
        Self { bar: ProgressBar::hidden(), terminal: std::io::stderr().is_terminal(), last_line: None }
    }

    /// Whether a person looks at a terminal.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Draws a bar in place of the last, where there is a terminal. The template is indicatif's.
    pub fn draw(&mut self, length: u64, template: &str) {
        self.end();
        if self.terminal {
            let style = ProgressStyle::with_template(template).expect("the templates are fixed and valid");
            let target = ProgressDrawTarget::stderr();
            self.bar = ProgressBar::with_draw_target(Some(length), target).with_style(style);
        }
    }

    /// The bar; hidden where none is drawn.
    pub fn bar(&self) -> &ProgressBar {
        &self.bar
    }

    /// Prints a line, above the bar where there is one.
    pub fn line(&self, line: &str) {
        self.bar.suspend(|| {
            // where standard error is closed there is no one to tell
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        });
    }

    /// Prints a line of something that goes on, unless the last is a moment old; `last` is printed always.
    pub fn line_when_due(&mut self, last: bool, line: impl FnOnce() -> String) {
        if last || self.last_line.is_none_or(|since| since.elapsed() >= LINE_EVERY) {
            self.last_line = Some(Instant::now());
            self.line(&line());
        }
    }

    /// Puts the first line off: what is done in a moment needs none.
    pub fn wait(&mut self) {
        self.last_line = Some(Instant::now());
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }
}
