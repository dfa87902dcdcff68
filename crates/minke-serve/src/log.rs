//! What is told of requests that are over.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode, Uri};

/// Gets each request that is over.
pub type Log = Arc<dyn Fn(&Finished) + Send + Sync>;

/// The status of a request whose client went away before its end; proxies write it so.
const GONE: u16 = 499;

/// A request that is over.
#[derive(Debug, Clone)]
pub struct Finished {
    /// How it was asked.
    pub method: String,
    /// The path, or its beginning.
    pub path: String,
    /// The status; 499 where the client went away.
    pub status: u16,
    /// What was answered, where tokens were asked for.
    pub answered: Option<Answered>,
    /// From its head to the end of its response.
    pub time: Duration,
}

/// Tokens of a request, all its answers together.
#[derive(Debug, Clone, Copy)]
pub struct Answered {
    /// Of the prompt.
    pub prompt: usize,
    /// Of these, read before.
    pub cached: usize,
    /// Written.
    pub written: usize,
    /// Time of writing.
    pub decode: Duration,
    /// Why the first answer ended, as the client is told.
    pub reason: &'static str,
}

/// A request's line in the log; it is told when nobody holds it any more.
#[derive(Clone)]
pub struct Line(Arc<Inner>);

struct Inner {
    log: Log,
    begin: Instant,
    finished: Mutex<Finished>,
}

impl Line {
    /// A request that begins.
    pub fn new(log: &Log, method: &Method, uri: &Uri) -> Self {
        let finished = Finished {
            method: method.to_string(),
            path: uri.path().chars().take(200).collect(),
            status: GONE,
            answered: None,
            time: Duration::ZERO,
        };
        Self(Arc::new(Inner { log: log.clone(), begin: Instant::now(), finished: Mutex::new(finished) }))
    }

    /// How it was answered.
    pub fn status(&self, status: StatusCode) {
        self.change(|finished| finished.status = status.as_u16());
    }

    /// The client does not want the rest.
    pub fn gone(&self) {
        self.change(|finished| finished.status = GONE);
    }

    /// What was answered.
    pub fn answered(&self, answered: Option<Answered>) {
        self.change(|finished| finished.answered = answered);
    }

    fn change(&self, by: impl FnOnce(&mut Finished)) {
        by(&mut self.0.finished.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let finished = self.finished.get_mut().unwrap_or_else(PoisonError::into_inner);
        finished.time = self.begin.elapsed();
        (self.log)(finished);
    }
}
