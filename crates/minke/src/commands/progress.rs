//! How far something long is: a bar on a terminal, a plain line now and then elsewhere.

use super::screen::Screen;

/// See the module.
pub struct Bar {
    what: String,
    /// Nothing where nothing is to be shown.
    screen: Option<Screen>,
}

impl Bar {
    /// A bar for `what`; `quiet` shows nothing.
    pub fn new(what: &str, quiet: bool) -> Self {
        let screen = (!quiet).then(|| {
            let mut screen = Screen::new();
            screen.draw(0, "{prefix} {wide_bar} {human_pos}/{human_len} {msg}");
            screen.bar().set_prefix(what.to_owned());
            screen.wait();
            screen
        });
        Self { what: what.to_owned(), screen }
    }

    /// Shows how far it is; `figures` are made only when they are shown.
    pub fn set(&mut self, done: u64, total: u64, figures: impl FnOnce() -> String) {
        let Some(screen) = &mut self.screen else { return };
        if screen.is_terminal() {
            screen.bar().set_length(total);
            screen.bar().set_position(done);
            screen.bar().set_message(figures());
        } else {
            let line = || format!("{}: {done}/{total} {}", self.what, figures()).trim_end().to_owned();
            screen.line_when_due(false, line);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(screen) = &mut self.screen {
            screen.end();
        }
    }
}
