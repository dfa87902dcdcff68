//! Ctrl-C: stops what is being done, and the program only where nothing is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Once};

static BUSY: AtomicBool = AtomicBool::new(false);
static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static HANDLED: Once = Once::new();

/// Handles Ctrl-C from now on. The first one during a [`Work`] asks it to stop; any other ends the program.
pub fn install() {
    let stop = Arc::clone(&STOP);
    let handler = move || {
        if !BUSY.load(Ordering::SeqCst) || stop.swap(true, Ordering::SeqCst) {
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
        BUSY.store(false, Ordering::SeqCst);
    }
}
