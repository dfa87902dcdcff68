//! What a caller asks of a service, and what it hears.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::compiler::Form;
use crate::engine::{EngineError, Request, StopReason};
use crate::speculate::Speculated;
use crate::step::Token;
use crate::thinking::Thought;

use super::prefix::Place;

/// A request, and how urgent it is.
#[derive(Debug, Clone, Default)]
pub struct Order {
    /// What is to be continued.
    pub request: Request,
    /// Its constraint, where that was compiled before: see [`super::Handle::compile`].
    pub form: Option<Form>,
    /// Higher goes first, and takes the place of lower where there is too little.
    pub priority: i32,
    /// When the answer ends, finished or not.
    pub deadline: Option<Instant>,
}

/// What happens to a request, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It is in order, and waits for its turn.
    Accepted,
    /// A token of the answer. Text is held back while it may become a stop string.
    Token(Token),
    /// The answer is over; nothing comes after it.
    Done(Done),
    /// There is none; nothing comes after it.
    Failed(EngineError),
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// What was held back of the text.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Whether it was ever taken up: who waited to the deadline was not.
    pub begun: bool,
    /// What it took.
    pub usage: Usage,
    /// How long it took.
    pub times: Times,
    /// What was spent on thinking, where the request bounds it.
    pub thought: Option<Thought>,
    /// What came of drafts.
    pub speculated: Speculated,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Of these, those that were read before, for this request or another.
    pub cached: usize,
    /// Of the answer.
    pub completion: usize,
}

/// How long the parts of a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// Until it was first taken up.
    pub queued: Duration,
    /// From there to the first token.
    pub prefill: Duration,
    /// The rest.
    pub decode: Duration,
}

/// Takes events, on the thread of the service; a break cancels the request.
pub type Sink = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;

/// A place among those that wait, given back when it is dropped.
pub(super) struct Turn(Arc<AtomicUsize>);

impl Turn {
    /// A place, where fewer than `most` are taken.
    pub fn take(waiting: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let free = |taken: usize| (taken < most).then_some(taken + 1);
        waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, free).ok()?;
        Some(Self(waiting.clone()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a scheduler knows of a request beside its sequence.
pub(super) struct Job {
    pub priority: i32,
    /// Numbers jobs as they come.
    pub arrival: u64,
    pub deadline: Option<Instant>,
    pub sink: Sink,
    /// Set by whoever no longer wants it.
    pub cancelled: Arc<AtomicBool>,
    /// Held until it is first taken up.
    pub turn: Option<Turn>,
    pub submitted: Instant,
    pub begun: Option<Instant>,
    pub first_token: Option<Instant>,
    /// Tokens of the prompt that were not read for it.
    pub found: usize,
    /// Whether the last event was told.
    closed: bool,
    /// Full pages of the sequence, all in the tree of prefixes, and the place of the last one.
    pub pages: usize,
    pub place: Option<Place>,
}

impl Job {
    pub fn new(priority: i32, deadline: Option<Instant>, sink: Sink, cancelled: Arc<AtomicBool>) -> Self {
        Self {
            priority,
            arrival: 0,
            deadline,
            sink,
            cancelled,
            turn: None,
            submitted: Instant::now(),
            begun: None,
            first_token: None,
            found: 0,
            closed: false,
            pages: 0,
            place: None,
        }
    }

    /// Smaller goes first.
    pub fn rank(&self) -> (std::cmp::Reverse<i32>, u64) {
        (std::cmp::Reverse(self.priority), self.arrival)
    }

    /// Tells the caller, unless the last word was said; who does not listen cancels.
    pub fn tell(&mut self, event: Event) {
        if self.closed {
            return;
        }
        self.closed = matches!(event, Event::Done(_) | Event::Failed(_));
        if (self.sink)(event).is_break() {
            self.cancelled.store(true, Ordering::Release);
        }
    }

    /// Why it is over, whatever its sequence says.
    pub fn over(&self, now: Instant) -> Option<StopReason> {
        if self.cancelled.load(Ordering::Acquire) {
            return Some(StopReason::Cancelled);
        }
        self.deadline.is_some_and(|deadline| deadline <= now).then_some(StopReason::Deadline)
    }

    pub fn times(&self) -> Times {
        let now = Instant::now();
        let begun = self.begun.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        Times { queued: begun - self.submitted, prefill: first - begun, decode: now - first }
    }
}
