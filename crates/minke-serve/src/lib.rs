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
//! Whatever comes from outside is bounded: connections, bodies, answers, stop strings, those that wait, and time. A field that
//! nobody knows, or that asks for what there is not, is an error rather than an answer to another question.
//!
//! What is deliberately not here: arguments and printing (the command's), accounts and TLS (a proxy's), files.

mod answer;
mod app;
mod error;
mod log;
mod request;
mod routes;
mod slow;
mod thinking;

use std::io;
use std::net;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use minke_data::ChatTemplate;
use minke_infer::Handle;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use slow::Bounded;

pub use app::{Limits, Options, Served};
pub use error::ApiError;
pub use log::{Answered, Finished, Log};
pub use thinking::{Parts, Thoughts};

/// How often a server looks whether it shall stop.
const STOP_EVERY: Duration = Duration::from_millis(50);

/// Threads that turn texts into tokens, and constraints into grammars.
const READERS: usize = 4;
/// Of these, those that may be at constraints: who sends one that takes seconds holds up others of its kind only.
const COMPILERS: usize = 2;

/// Why a server ends by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The system gives it no threads, or does not let it wait for connections.
    #[error("the server cannot run: {0}")]
    System(#[from] io::Error),
    /// The model's thread is gone.
    #[error("the thread of the model has ended, and nothing can be answered any more")]
    Model,
}

/// Serves whoever connects until `stop` is set; answers that are being written get some time to end.
///
/// # Errors
/// The system does not let it, or the service has ended.
pub fn serve(
    listener: net::TcpListener,
    handle: Handle,
    served: Served,
    options: Options,
    stop: &Arc<AtomicBool>,
) -> Result<(), ServeError> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(READERS).build()?;
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let limits = options.limits;
    let closing = served.template.as_ref().map(ChatTemplate::closing).unwrap_or_default();
    let bodies = Semaphore::new(limits.bodies);
    let compilers = Arc::new(Semaphore::new(COMPILERS));
    let is_local = listener.local_addr()?.ip().is_loopback();
    listener.set_nonblocking(true)?;
    let service = handle.clone();
    let app = Arc::new(app::App { served, handle, options, closing, bodies, compilers, started, is_local });
    let outcome = runtime.block_on(async {
        let listener = TcpListener::from_std(listener)?;
        let open = GracefulShutdown::new();
        let outcome = tokio::select! {
            () = accept(listener, app, &open) => Ok(()),
            outcome = stopped(stop, &service) => outcome,
        };
        // answers that are being written get some time
        let _ = tokio::time::timeout(limits.grace, open.shutdown()).await;
        outcome
    });
    // what still runs on it is cut off
    runtime.shutdown_background();
    outcome
}

/// Takes connections, as many at once as there may be, and lets each ask one thing after the other.
async fn accept(listener: TcpListener, app: Arc<app::App>, open: &GracefulShutdown) {
    let room = Arc::new(Semaphore::new(app.options.limits.connections));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(app.options.limits.head_time);
    let stall_time = app.options.limits.stall_time;
    let router = routes::router(app);
    loop {
        let place = room.clone().acquire_owned().await.expect("nobody closes it");
        let Ok((stream, _)) = listener.accept().await else {
            // whoever went away at once is no matter; where files are lacking, some are given back
            tokio::time::sleep(STOP_EVERY).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        let stream = TokioIo::new(Bounded::new(stream, stall_time));
        let connection = open.watch(http.serve_connection(stream, service));
        tokio::spawn(async move {
            // who breaks a connection is not told
            let _ = connection.await;
            drop(place);
        });
    }
}

/// Waits until the server is to stop, or has nothing to serve with.
async fn stopped(stop: &AtomicBool, service: &Handle) -> Result<(), ServeError> {
    while !stop.load(Ordering::Acquire) {
        if !service.is_alive() {
            return Err(ServeError::Model);
        }
        tokio::time::sleep(STOP_EVERY).await;
    }
    Ok(())
}
