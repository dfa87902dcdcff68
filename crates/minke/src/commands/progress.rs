//! How far something long is: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output;

/// Without a terminal one line is printed at this pace.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// See the module.
pub struct Bar {
    what: String,
    /// Nothing where lines are printed.
    drawn: Option<ProgressBar>,
    last_line: Instant,
}

impl Bar {
    /// A bar for `what`; `quiet` shows nothing.
    pub fn new(what: &str, quiet: bool) -> Self {
        let drawn = if quiet {
            Some(ProgressBar::hidden())
        } else if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg}")
                .expect("the template is fixed and valid");
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style);
            bar.set_prefix(what.to_owned());
            Some(bar)
        } else {
            None
        };
        Self { what: what.to_owned(), drawn, last_line: Instant::now() }
    }

    /// Shows how far it is; `figures` are made only when they are shown.
    pub fn set(&mut self, done: u64, total: u64, figures: impl FnOnce() -> String) {
        match &self.drawn {
            Some(bar) if bar.is_hidden() => {}
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(figures());
            }
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                output::note(format!("{}: {done}/{total} {}", self.what, figures()).trim_end());
            }
            None => {}
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.drawn {
            bar.finish_and_clear();
        }
    }
}
