//! What is served, and how a body becomes orders to the service.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use minke_data::{ChatTemplate, RenderOptions, Thinking, Tokenizer};
use minke_infer::{
    Constraint, Event, Form, Handle, Order, Request, Sampling, Speculation, ThinkingBudget, Ticket,
    begins_thought, form_waits, without_thought,
};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::time::timeout_at;

use crate::answer::{Choice, Frame, Kind};
use crate::error::ApiError;
use crate::log::Log;
use crate::request::{Asked, Body, Endpoint, Prompt};
use crate::thinking::Thoughts;

/// A model as clients see it.
pub struct Served {
    /// Its name.
    pub name: String,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// How it is told conversations; a base model has none.
    pub template: Option<ChatTemplate>,
    /// Tokens that end an answer.
    pub stop_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// How tokens are chosen where a request does not say it.
    pub defaults: Sampling,
    /// What is drafted ahead.
    pub speculation: Speculation,
}

/// What a server puts up with.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a body.
    pub body_bytes: usize,
    /// Until all of a body is there, and before that until there is a place for it.
    pub body_time: Duration,
    /// Bodies that are held at once, from their first bytes until they are tokens; others wait to be read.
    pub bodies: usize,
    /// Without a byte that a client sends of a body, or takes of an answer.
    pub stall_time: Duration,
    /// Until the next head of a request is there, on each connection.
    pub head_time: Duration,
    /// Connections that are open at once; others wait to be taken.
    pub connections: usize,
    /// From request to the end of its answer.
    pub time: Duration,
    /// What answers get to end, once the server is told to stop.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            body_time: Duration::from_mins(1),
            bodies: 64,
            stall_time: Duration::from_secs(15),
            head_time: Duration::from_secs(10),
            // half of the files that a process may have open, as most systems have it
            connections: 512,
            time: Duration::from_mins(10),
            grace: Duration::from_secs(20),
        }
    }
}

/// How a server treats whoever asks.
#[derive(Clone)]
pub struct Options {
    /// What it puts up with.
    pub limits: Limits,
    /// Origins whose pages may ask from a browser, such as `http://localhost:3000`.
    pub origins: Vec<String>,
    /// Gets each request that is over.
    pub log: Log,
}

impl Default for Options {
    fn default() -> Self {
        Self { limits: Limits::default(), origins: Vec::new(), log: Arc::new(|_| {}) }
    }
}

/// What handlers share.
pub struct App {
    pub served: Served,
    pub handle: Handle,
    pub options: Options,
    /// What the template has between a thought and its answer.
    pub closing: String,
    /// Room for bodies.
    pub bodies: Semaphore,
    /// Room for constraints that are being compiled.
    pub compilers: Arc<Semaphore>,
    pub started: u64,
    /// Whether only this machine reaches it.
    pub is_local: bool,
}

/// A request that was taken: its answers, and their events.
pub struct Underway {
    pub frame: Frame,
    pub choices: Vec<Choice>,
    pub stream: bool,
    pub include_usage: bool,
    events: UnboundedReceiver<(usize, Event)>,
    early: VecDeque<(usize, Event)>,
    /// Dropping them cancels.
    _tickets: Vec<Ticket>,
}

/// A prompt as tokens.
pub struct Encoded {
    tokens: Vec<u32>,
    is_thinking: bool,
    /// Whether the template knows thoughts, so that an answer may begin with one.
    knows_thoughts: bool,
    /// Tokens that the answer may not have.
    forbidden: Vec<(u32, f32)>,
}

impl Encoded {
    /// A text that is gone on with.
    fn text(tokens: Vec<u32>) -> Self {
        Self { tokens, is_thinking: false, knows_thoughts: false, forbidden: Vec::new() }
    }
}

impl App {
    /// Reads a body, and makes tokens of its prompts.
    ///
    /// # Errors
    /// What of the request cannot be served, and a server that is stopping.
    pub async fn read(
        self: &Arc<Self>,
        endpoint: Endpoint,
        bytes: Vec<u8>,
    ) -> Result<(Asked, Vec<Encoded>), ApiError> {
        let app = self.clone();
        // a long text takes its time, which connections shall not wait for
        let prepare = move || {
            let body = Body::read(&bytes)?;
            app.check_model(body.model.as_deref())?;
            let mut asked = body.asked(endpoint, app.served.defaults, random())?;
            let vocabulary = app.served.tokenizer.vocab_size();
            if let Some(id) = asked.request.more_stop_ids.iter().find(|id| **id as usize >= vocabulary) {
                let reason = format!("id {id} is outside the vocabulary of {vocabulary} tokens");
                return Err(ApiError::field("stop_token_ids", reason));
            }
            let prompts = std::mem::take(&mut asked.prompts);
            let encoded = prompts.iter().map(|prompt| app.encode(prompt)).collect::<Result<Vec<_>, _>>()?;
            Ok::<_, ApiError>((asked, encoded))
        };
        tokio::task::spawn_blocking(prepare).await.map_err(|_| ApiError::Stopped)?
    }

    /// Hands in the answers that were asked for when it was `submitted`; returns once all are accepted.
    ///
    /// # Errors
    /// What of the request cannot be served, and a server that is busy or stopping.
    pub async fn begin(
        &self,
        endpoint: Endpoint,
        (asked, prompts): (Asked, Vec<Encoded>),
        submitted: Instant,
    ) -> Result<Underway, ApiError> {
        let (answers, most) = (asked.n * prompts.len(), self.handle.max_waiting());
        if answers > most {
            let reason =
                format!("expected at most {most} answers in all, as many as may wait here, got {answers}");
            return Err(ApiError::field("n", reason));
        }
        let room = |prompt: &Encoded| self.room(endpoint, &prompt.tokens, asked.max_tokens);
        let rooms = prompts.iter().map(room).collect::<Result<Vec<_>, _>>()?;
        let deadline = submitted + self.options.limits.time;
        let form = match &asked.request.constraint {
            Some(constraint) => {
                let compiled = timeout_at(deadline.into(), self.compile(constraint.clone())).await;
                Some(compiled.map_err(|_| ApiError::Late)??)
            }
            None => None,
        };
        let (sender, events) = mpsc::unbounded_channel();
        let (mut choices, mut tickets) = (Vec::new(), Vec::new());
        for (Encoded { tokens, is_thinking, knows_thoughts, forbidden }, max_tokens) in
            prompts.into_iter().zip(rooms)
        {
            // in a text there are no thoughts
            let form_waits = asked.request.constraint.as_ref().map(|form| {
                endpoint == Endpoint::Chat
                    && form_waits(&self.served.tokenizer, &tokens, form, knows_thoughts)
            });
            for answer in 0..asked.n {
                let index = choices.len();
                let thoughts = (endpoint == Endpoint::Chat).then(|| match form_waits {
                    Some(false) => Thoughts::none(),
                    _ => Thoughts::new(is_thinking),
                });
                let tokenizer = self.served.tokenizer.clone();
                let kind =
                    Kind { counts_prompt: answer == 0, log_probs: asked.log_probs, streams: asked.stream };
                choices.push(Choice::new(index, kind, tokenizer, thoughts));
                // where a thought is followed, what has a form begins behind it
                let thinking = asked.request.thinking.clone();
                let thinking =
                    thinking.or_else(|| (form_waits == Some(true)).then(|| ThinkingBudget::new(max_tokens)));
                let request = Request {
                    thinking: thinking.map(|budget| budget.closed_by(&self.closing)),
                    constrain_answer_only: form_waits == Some(true),
                    speculation: self.served.speculation,
                    prompt: tokens.clone(),
                    max_tokens,
                    sequence: answer as u64,
                    stop_ids: self.served.stop_ids.clone(),
                    logit_bias: [&asked.request.logit_bias[..], &forbidden].concat(),
                    ..asked.request.clone()
                };
                let (form, deadline) = (form.clone(), Some(deadline));
                let order = Order { request, form, priority: asked.priority, deadline };
                let sender = sender.clone();
                let sink = move |event| match sender.send((index, event)) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                };
                tickets.push(self.handle.submit(order, Box::new(sink))?);
            }
        }
        let Asked { stream, include_usage, .. } = asked;
        let frame = Frame::new(endpoint, &self.served.name, random());
        let early = VecDeque::new();
        let mut underway =
            Underway { frame, choices, stream, include_usage, events, early, _tickets: tickets };
        underway.accepted().await?;
        Ok(underway)
    }

    /// Compiles a constraint, beside the model and beside the connections, once for all answers of a request.
    async fn compile(&self, constraint: Constraint) -> Result<Form, ApiError> {
        let place = self.compilers.clone().acquire_owned().await.expect("nobody closes it");
        let handle = self.handle.clone();
        let compile = move || {
            // held to the end, also where nobody waits for it any more
            let _place = place;
            handle.compile(&constraint)
        };
        let compiled = tokio::task::spawn_blocking(compile).await.map_err(|_| ApiError::Stopped)?;
        compiled.map_err(|error| ApiError::Engine(error.into()))
    }

    /// Whether the model of this name is served; no name means whichever is.
    pub fn check_model(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(name) if name != self.served.name => {
                let got = name.chars().take(200).collect();
                Err(ApiError::Model { got, served: self.served.name.clone() })
            }
            _ => Ok(()),
        }
    }

    fn encode(&self, prompt: &Prompt) -> Result<Encoded, ApiError> {
        let tokenizer = &self.served.tokenizer;
        let fail = |field: &str, error: minke_data::Error| ApiError::field(field, error.to_string());
        match prompt {
            Prompt::Chat { messages, tools, thinking, variables } => {
                let template = self.served.template.as_ref().ok_or_else(|| {
                    ApiError::field(
                        "messages",
                        "this model has no chat template, so it knows no conversations; use /v1/completions",
                    )
                })?;
                if !tools.is_empty() && !template.source().contains("tools") {
                    return Err(ApiError::field("tools", "the chat template of this model knows no tools"));
                }
                // who knows no thoughts begins none, and closes none
                let thinking = if template.knows_marks() { *thinking } else { Thinking::Default };
                let options =
                    RenderOptions { tools, variables: Some(variables), ..RenderOptions::prompt(thinking) };
                let tokens = template
                    .encode_prompt_with(tokenizer, messages, options)
                    .map_err(|error| fail("messages", error))?;
                let is_thinking = begins_thought(tokenizer, &tokens);
                let forbidden = without_thought(tokenizer, &tokens);
                Ok(Encoded { tokens, is_thinking, knows_thoughts: template.knows_marks(), forbidden })
            }
            Prompt::Text(text) => {
                let mut tokens: Vec<u32> = self.served.bos.into_iter().collect();
                tokens.extend(tokenizer.encode(text).map_err(|error| fail("prompt", error))?);
                Ok(Encoded::text(tokens))
            }
            Prompt::Tokens(tokens) => Ok(Encoded::text(tokens.clone())),
        }
    }

    /// The most tokens of an answer: those asked for, which must fit, or all that do.
    fn room(&self, endpoint: Endpoint, prompt: &[u32], asked: Option<usize>) -> Result<usize, ApiError> {
        let (limit, prompt) = (self.handle.context(), prompt.len());
        let answer = asked.unwrap_or_else(|| limit.saturating_sub(prompt).max(1));
        let got = prompt.saturating_add(answer);
        if got > limit {
            let model = self.handle.model_context();
            return Err(ApiError::Context { endpoint, got, limit, model, prompt, answer });
        }
        Ok(answer)
    }
}

impl Underway {
    /// Waits until each answer is accepted.
    async fn accepted(&mut self) -> Result<(), ApiError> {
        let mut left = self.choices.len();
        while left > 0 {
            match self.events.recv().await.ok_or(ApiError::Stopped)? {
                (_, Event::Accepted) => left -= 1,
                (_, Event::Failed(error)) => return Err(ApiError::Engine(error)),
                // another may be on its way already
                other => self.early.push_back(other),
            }
        }
        Ok(())
    }

    /// The next event, as a poll; none when the service is gone.
    pub fn poll(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<(usize, Event)>> {
        match self.early.pop_front() {
            Some(event) => std::task::Poll::Ready(Some(event)),
            None => self.events.poll_recv(cx),
        }
    }

    /// What the next event makes of its answer: a chunk, if it makes one.
    ///
    /// # Errors
    /// The answer fails, the service is gone, or there is none: of the form that was asked for, or in time.
    pub fn take(&mut self, next: Option<(usize, Event)>) -> Result<Option<serde_json::Value>, ApiError> {
        let (index, event) = next.ok_or(ApiError::Stopped)?;
        let chunk = self.choices[index].take(event)?;
        if self.choices.iter().all(Choice::is_dead_end) {
            return Err(ApiError::DeadEnd);
        }
        if self.choices.iter().all(Choice::is_unbegun) {
            return Err(ApiError::Late);
        }
        Ok(chunk)
    }

    /// All answers, whole.
    ///
    /// # Errors
    /// As [`Underway::take`].
    pub async fn whole(&mut self) -> Result<serde_json::Value, ApiError> {
        while !self.choices.iter().all(Choice::is_done) {
            let next = std::future::poll_fn(|cx| self.poll(cx)).await;
            self.take(next)?;
        }
        Ok(self.frame.whole(&self.choices))
    }
}

/// A number that nobody guesses: the standard library draws its keys from the system.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
