//! Ctrl-C: stops what is being done, and the program only where nothing is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Once};

static BUSY: AtomicBool = AtomicBool::new(false);
/// Whether no Ctrl-C ends the program while it works.
static STAYS: AtomicBool = AtomicBool::new(false);
static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static HANDLED: Once = Once::new();

/// Handles Ctrl-C from now on. The first one during a [`Work`] asks it to stop; any other ends the program, unless the work
/// [stays](Work::begin_and_stay).
pub fn install() {
    let handler = || {
        if pressed() {
            std::process::exit(130);
        }
    };
    HANDLED.call_once(|| {
        if let Err(error) = ctrlc::set_handler(handler) {
            tracing::warn!("Ctrl-C will end the program at once: {error}");
        }
    });
}

/// What Ctrl-C does: work is asked to stop. Whether the program ends.
fn pressed() -> bool {
    let was_asked = STOP.swap(true, Ordering::SeqCst);
    !BUSY.load(Ordering::SeqCst) || was_asked && !STAYS.load(Ordering::SeqCst)
}

/// Work that stops when asked, as long as it is held.
pub struct Work(());

impl Work {
    /// Begins work, not yet asked to stop.
    pub fn begin() -> Self {
        STOP.store(false, Ordering::SeqCst);
        BUSY.store(true, Ordering::SeqCst);
        Self(())
    }

    /// Begins work that no Ctrl-C ends with the program, however often it is pressed.
    pub fn begin_and_stay() -> Self {
        let work = Self::begin();
        STAYS.store(true, Ordering::SeqCst);
        work
    }

    /// Goes on with other work, not yet asked to stop.
    #[expect(clippy::unused_self, reason = "only work can go on")]
    pub fn renew(&self) {
        STOP.store(false, Ordering::SeqCst);
    }

    /// Whether it was asked to stop.
    #[expect(clippy::unused_self, reason = "only work can be asked")]
    pub fn is_stopped(&self) -> bool {
        STOP.load(Ordering::SeqCst)
    }

    /// The flag itself, for loops elsewhere.
    #[expect(clippy::unused_self, reason = "only work can be asked")]
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&STOP)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        STAYS.store(false, Ordering::SeqCst);
        BUSY.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_press_ends_the_program_unless_the_work_stays() {
        assert!(pressed());
        let work = Work::begin();
        assert!(!work.is_stopped());
        assert_eq!([pressed(), pressed()], [false, true]);
        assert!(work.is_stopped());
        drop(work);
        let work = Work::begin_and_stay();
        assert_eq!([pressed(), pressed(), pressed()], [false; 3]);
        assert!(work.is_stopped());
        work.renew();
        assert!(!work.is_stopped());
        drop(work);
        assert!(pressed());
    }
}
