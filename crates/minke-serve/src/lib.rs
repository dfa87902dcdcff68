//! A model over HTTP, in the form that clients of OpenAI's API speak.
//!
//! ```text
//! bytes -> Body -> Asked -> tokens -> Order -> Service (a thread of its own, minke_infer)
//!                                                 |
//! JSON, whole or as a stream of events <- Choice <- Event
//! ```
//!
//! `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/health`. One thread runs all connections; the model
//! is on another and mixes whatever is asked. A client that goes away cancels what it asked: what it would have read is
//! dropped, and the ticket of its request with it.
//!
//! Whatever comes from outside is bounded: bodies, answers, stop strings, those that wait, and time. A field that
//! nobody knows, or that asks for what there is not, is an error rather than an answer to another question.
//!
//! What is deliberately not here: arguments and printing (the command's), accounts and TLS (a proxy's), files.

mod answer;
mod app;
mod error;
mod log;
mod request;
mod routes;
mod thinking;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minke_infer::Handle;
use tokio::net::TcpListener;

pub use app::{Limits, Options, Served};
pub use error::ApiError;
pub use log::{Answered, Finished, Log};
pub use thinking::{Parts, Thoughts};

/// How often a server looks whether it shall stop.
const STOP_EVERY: Duration = Duration::from_millis(50);

/// Threads that turn texts into tokens.
const READERS: usize = 4;

/// Serves on an address until `stop` is set; `on_ready` gets the address, whose port is one that is free where 0 was
/// asked for. Answers that are being written get some time to end.
///
/// # Errors
/// The address cannot be listened on.
pub fn serve(
    addr: SocketAddr,
    handle: Handle,
    served: Served,
    options: Options,
    stop: &Arc<AtomicBool>,
    on_ready: impl FnOnce(SocketAddr),
) -> io::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(READERS).build()?;
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let limits = options.limits;
    let bodies = tokio::sync::Semaphore::new(limits.bodies);
    let app = Arc::new(app::App { served, handle, options, bodies, started });
    let outcome = runtime.block_on(async {
        let listener = TcpListener::bind(addr).await?;
        on_ready(listener.local_addr()?);
        let server = axum::serve(listener, routes::router(app)).with_graceful_shutdown(stopped(stop.clone()));
        let out_of_patience = async {
            stopped(stop.clone()).await;
            tokio::time::sleep(limits.grace).await;
        };
        tokio::select! {
            outcome = server => outcome,
            () = out_of_patience => Ok(()),
        }
    });
    // what still runs on it is cut off
    runtime.shutdown_background();
    outcome
}

async fn stopped(stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Acquire) {
        tokio::time::sleep(STOP_EVERY).await;
    }
}
