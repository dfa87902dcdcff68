//! A model on a thread of its own.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_model::{Model, PAGE};

use crate::compiler::{Compiler, Form};
use crate::constrain::{Constraint, ConstraintError, STACK_BYTES};
use crate::engine::{Engine, EngineError, Request, check_vocabularies};

use super::job::{Event, Job, Order, Sink, Turn};
use super::{Scheduler, ServiceOptions, Stats};

/// The fewest pages that caches may have: one to read from, one to write to.
const FEWEST_PAGES: usize = 2;

/// Requests that are taken in between two calls of the model.
const COMMANDS_PER_CALL: usize = 256;

/// Why a service does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The engine cannot be what the options say.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Not even a short sequence would fit.
    #[error("{got} bytes of memory for caches are too few: {pages} pages of {tokens} tokens take {needed}")]
    Memory {
        /// Bytes given.
        got: usize,
        /// Pages that there must be.
        pages: usize,
        /// Tokens of a page.
        tokens: usize,
        /// Bytes that they take.
        needed: usize,
    },
    /// The system gives no thread.
    #[error("the thread of the service cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many wait as may.
    #[error("{0} requests are waiting, and no more may")]
    Full(usize),
    /// The service is over.
    #[error("the service has stopped")]
    Stopped,
}

enum Command {
    Submit(Box<(Request, Option<Form>, Job)>),
    Stop,
}

/// A model that serves requests until this is dropped: then what runs is cancelled.
pub struct Service {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Starts the thread that owns the model; without a tokenizer answers are ids only. A smaller model may draft, which comes
    /// with its own.
    ///
    /// # Errors
    /// The options ask for what the model or the system does not have, or the draft model's vocabulary is another.
    pub fn start(
        mut model: Model,
        cpu: Cpu,
        tokenizer: Option<Tokenizer>,
        mut draft: Option<(Model, Option<Tokenizer>)>,
        options: ServiceOptions,
    ) -> Result<Self, ServiceError> {
        if let Some((_, theirs)) = &draft {
            check_vocabularies(tokenizer.as_ref(), theirs.as_ref())?;
        }
        let page =
            options.cache.page_bytes(&model.config, &model.precision).ok_or(EngineError::NoLatent)?.max(1);
        let most_pages = options.cache_bytes / page;
        if most_pages < FEWEST_PAGES {
            let (got, needed) = (options.cache_bytes, FEWEST_PAGES * page);
            return Err(ServiceError::Memory { got, pages: FEWEST_PAGES, tokens: PAGE, needed });
        }
        let (commands, inbox) = mpsc::channel();
        let stats = Arc::new(Mutex::new(Stats { most_pages, ..Stats::default() }));
        let handle = Handle {
            commands,
            waiting: Arc::default(),
            max_waiting: options.max_waiting,
            context: model.config.max_position_embeddings.min(most_pages.saturating_mul(PAGE)),
            model_context: model.config.max_position_embeddings,
            stats: stats.clone(),
            alive: Arc::new(AtomicBool::new(true)),
            compiler: Arc::new(Compiler::new(tokenizer.as_ref(), model.config.vocab_size)),
        };
        let alive = Alive(handle.alive.clone());
        let thread = std::thread::Builder::new().name("minke-service".to_owned()).stack_size(STACK_BYTES);
        let thread = thread.spawn(move || {
            let _alive = alive;
            let engine = Engine::new(&mut model, &cpu, tokenizer.as_ref());
            let mut engine = engine.with_cache(options.cache).expect("its pages were counted");
            if let Some((model, tokenizer)) = &mut draft {
                engine =
                    engine.with_draft(model, tokenizer.as_ref()).expect("the vocabularies were compared");
            }
            serve(Scheduler::new(engine, options, most_pages), &inbox, &stats);
        })?;
        Ok(Self { handle, thread: Some(thread) })
    }

    /// A way to it for any thread.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // it may be gone already
        let _ = self.handle.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes what comes, between two calls of the model.
fn serve(mut scheduler: Scheduler<'_>, inbox: &Receiver<Command>, stats: &Mutex<Stats>) {
    let mut busy = false;
    loop {
        let first = if busy { None } else { Some(inbox.recv().unwrap_or(Command::Stop)) };
        // who only ever hands in what is refused stops nobody
        for command in first.into_iter().chain(inbox.try_iter().take(COMMANDS_PER_CALL)) {
            match command {
                Command::Submit(submitted) => {
                    let (request, form, job) = *submitted;
                    scheduler.submit(request, form, job);
                }
                Command::Stop => return scheduler.stop(),
            }
        }
        busy = scheduler.step();
        *stats.lock().unwrap_or_else(PoisonError::into_inner) = scheduler.stats;
    }
}

/// A way to a service, for any thread.
#[derive(Clone)]
pub struct Handle {
    commands: Sender<Command>,
    waiting: Arc<AtomicUsize>,
    max_waiting: usize,
    context: usize,
    model_context: usize,
    stats: Arc<Mutex<Stats>>,
    alive: Arc<AtomicBool>,
    compiler: Arc<Compiler>,
}

/// Tells when the thread ends, however it does.
struct Alive(Arc<AtomicBool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Handle {
    /// Compiles a constraint, on the thread of the caller, for it may take seconds. The first also readies the vocabulary.
    ///
    /// # Errors
    /// It cannot be kept.
    pub fn compile(&self, constraint: &Constraint) -> Result<Form, ConstraintError> {
        self.compiler.compile(constraint)
    }

    /// Hands a request in; `sink` hears what becomes of it, on the thread of the service. A constraint is compiled here,
    /// unless the order brings it so; if it is wrong, `sink` hears that here. Dropping the ticket cancels.
    ///
    /// # Errors
    /// Too many wait, or the service is over.
    pub fn submit(&self, order: Order, sink: Sink) -> Result<Ticket, SubmitError> {
        let turn = Turn::take(&self.waiting, self.max_waiting).ok_or(SubmitError::Full(self.max_waiting))?;
        let cancelled = Arc::new(AtomicBool::new(false));
        let mut job = Job::new(order.priority, order.deadline, sink, cancelled.clone());
        job.turn = Some(turn);
        let constraint = order.request.constraint.as_ref().filter(|_| order.form.is_none());
        let form = match constraint.map(|constraint| self.compile(constraint)).transpose() {
            Ok(form) => order.form.or(form),
            Err(error) => {
                job.tell(Event::Failed(error.into()));
                return Ok(Ticket(cancelled));
            }
        };
        let command = Command::Submit(Box::new((order.request, form, job)));
        self.commands.send(command).map_err(|_| SubmitError::Stopped)?;
        Ok(Ticket(cancelled))
    }

    /// Hands a request in and gives its events to whoever reads them. Dropping the stream cancels.
    ///
    /// # Errors
    /// As [`Handle::submit`].
    pub fn stream(&self, order: Order) -> Result<Stream, SubmitError> {
        let (sender, events) = mpsc::channel();
        let sink = move |event| match sender.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        Ok(Stream { _ticket: self.submit(order, Box::new(sink))?, events })
    }

    /// Tokens that fit into one sequence, prompt and answer together: what the model takes, or what memory holds.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Tokens that the model takes into one sequence, whether memory holds them or not.
    pub fn model_context(&self) -> usize {
        self.model_context
    }

    /// Requests that may wait at once.
    pub fn max_waiting(&self) -> usize {
        self.max_waiting
    }

    /// Whether there is a service that takes requests.
    pub fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// What it was doing after the last call of the model.
    pub fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is being served: dropping it cancels.
#[derive(Debug)]
pub struct Ticket(Arc<AtomicBool>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The events of a request, the last of which is [`Event::Done`] or [`Event::Failed`]; there is none if the service
/// was stopped before.
#[derive(Debug)]
pub struct Stream {
    _ticket: Ticket,
    events: Receiver<Event>,
}

impl Iterator for Stream {
    type Item = Event;

    /// The next event, once it is there.
    fn next(&mut self) -> Option<Event> {
        self.events.recv().ok()
    }
}
