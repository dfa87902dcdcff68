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
    let stop = Arc::clone(&STOP);
    let handler = move || {
        let was_asked = stop.swap(true, Ordering::SeqCst);
        if !BUSY.load(Ordering::SeqCst) || was_asked && !STAYS.load(Ordering::SeqCst) {
            std::process::exit(130);
        }
    };
    HANDLED.call_once(|| {
        if let Err(error) = ctrlc::set_handler(handler) {
            tracing::warn!("Ctrl-C will end the program at once: {error}");
        }
    });
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
