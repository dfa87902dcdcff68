//! Generation and scoring: what goes into a call of the model, and what is made of the logits.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use minke_cpu::policy::{self, Kept};
use minke_cpu::{Cpu, loss};
use minke_data::{StreamDecoder, Tokenizer};
use minke_model::{Cache, Model, Step, Want};
use minke_num::rng;

use crate::sampling::{self, Sampler, Sampling, SettingError};
use crate::stop::StopMatcher;

/// Tokens of one call of the model, over all sequences; bounds the memory of activations.
const TOKENS_PER_CALL: usize = 512;
/// Logits of one call while scoring, in elements (64 MiB).
const LOGITS_PER_CALL: usize = 1 << 24;

/// Why a request cannot be served.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// There is nothing to continue.
    #[error("the prompt is empty, and the model has no token that begins a text")]
    EmptyPrompt,
    /// An id that the model has no row for.
    #[error("token {index}: id {id} is outside the vocabulary of {vocabulary} tokens")]
    Token {
        /// Its place in the prompt or sequence, from 0.
        index: usize,
        /// The id.
        id: u32,
        /// Rows of the model's table.
        vocabulary: usize,
    },
    /// More tokens than positions.
    #[error("{got} tokens do not fit into the model's context of {limit}")]
    Context {
        /// Tokens given.
        got: usize,
        /// Tokens that fit.
        limit: usize,
    },
    /// A sampling setting is out of its bounds.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// Stop strings are text, and there is no tokenizer to make text.
    #[error("stop strings need a tokenizer, and the model folder has none")]
    StopNeedsTokenizer,
    /// The logits hold no number: the weights are broken.
    #[error("no logit after {position} tokens is a number; the weights are damaged or training diverged")]
    NotANumber {
        /// Tokens before.
        position: usize,
    },
}

/// One text to continue.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// What is continued, at least one token.
    pub prompt: Vec<u32>,
    /// The most tokens to add.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Names the draws of this sequence, beside the seed and the position.
    pub sequence: u64,
    /// Strings that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer and are not part of it.
    pub stop_ids: Vec<u32>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The model chose this token of [`Request::stop_ids`].
    Token(u32),
    /// This string of [`Request::stop`] was complete.
    String(String),
    /// [`Request::max_tokens`] were added.
    MaxTokens,
    /// The model's context is full.
    Context,
    /// The caller said so.
    Cancelled,
}

impl StopReason {
    /// One word, as machine-readable output has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Token(_) => "stop_token",
            Self::String(_) => "stop_string",
            Self::MaxTokens => "max_tokens",
            Self::Context => "context",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How long the parts of a call took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// Until every prompt was read, the first tokens included.
    pub prefill: Duration,
    /// The rest.
    pub decode: Duration,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The tokens added, without the one that stopped it; those of a stop string are in it.
    pub tokens: Vec<u32>,
    /// Natural logarithm of each token's probability, before temperature and filters; empty where the engine goes
    /// [`Engine::without_log_probs`].
    pub log_probs: Vec<f32>,
    /// Their text up to the stop string; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Tokens of the prompt that were in the cache already.
    pub reused: usize,
    /// What learning from it needs; empty unless the engine is [`Engine::traced`].
    pub trace: Trace,
}

/// How a sequence was sampled, for a trainer that shall see the same.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    /// Every token that was chosen, the one that stopped it included.
    pub tokens: Vec<u32>,
    /// Natural logarithm of each one's probability in the distribution that it was drawn from, temperature and filters
    /// applied; 0 for the likeliest token at temperature 0.
    pub log_probs: Vec<f32>,
    /// What filters left of the vocabulary, token by token; empty where they left all.
    pub kept: Vec<Vec<u32>>,
    /// The experts of every row that was read, `[rows * k]` by layer with experts; the last token chosen is never read.
    pub routes: Vec<Vec<u32>>,
}

/// A piece of an answer, given to the caller as soon as it is sure.
#[derive(Debug, Clone, Copy)]
pub struct Delta<'a> {
    /// Which request, by its place in the call.
    pub request: usize,
    /// Complete characters; empty when the token only began one, or text is held back for a stop string.
    pub text: &'a str,
    /// Tokens of the answer so far.
    pub tokens: usize,
}

/// A sequence that can be continued: its tokens and what attention keeps of them.
#[derive(Clone)]
pub struct Session {
    cache: Cache,
    tokens: Vec<u32>,
}

impl Session {
    /// An empty sequence of this model.
    pub fn new(model: &Model) -> Self {
        Self { cache: Cache::new(model), tokens: Vec::new() }
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Bytes of the cache.
    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Keeps of the cache what `prompt` begins with, but not all of it: the last token must be read for its logits.
    fn reuse(&mut self, prompt: &[u32]) -> usize {
        let common = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let common = common.min(prompt.len().saturating_sub(1));
        self.cache.truncate(common);
        self.tokens.truncate(common);
        common
    }
}

/// A sequence while it is being generated.
struct Running<'r> {
    request: &'r Request,
    session: &'r mut Session,
    /// Prompt and answer.
    all: Vec<u32>,
    decoder: Option<StreamDecoder>,
    matcher: StopMatcher,
    log_probs: Vec<f32>,
    text: String,
    reused: usize,
    stop: Option<StopReason>,
    trace: Trace,
    /// The earlier one with the same prompt, which reads it for both.
    reader: Option<usize>,
}

/// Runs a model: borrows it, so the weights may be a trainer's.
pub struct Engine<'a> {
    model: &'a mut Model,
    cpu: &'a Cpu,
    tokenizer: Option<&'a Tokenizer>,
    context: usize,
    sampler: Sampler,
    timing: Timing,
    traced: bool,
    log_probs: bool,
}

impl<'a> Engine<'a> {
    /// An engine over a model; without a tokenizer answers are ids only.
    pub fn new(model: &'a mut Model, cpu: &'a Cpu, tokenizer: Option<&'a Tokenizer>) -> Self {
        let context = model.config.max_position_embeddings;
        let (sampler, timing) = (Sampler::default(), Timing::default());
        Self { model, cpu, tokenizer, context, sampler, timing, traced: false, log_probs: true }
    }

    /// Makes every answer carry its [`Trace`].
    #[must_use]
    pub fn traced(self) -> Self {
        Self { traced: true, ..self }
    }

    /// Leaves [`Generation::log_probs`] out, which may cost a pass over the vocabulary for each token.
    #[must_use]
    pub fn without_log_probs(self) -> Self {
        Self { log_probs: false, ..self }
    }

    /// Tokens that fit into one sequence, prompt and answer together.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The model that it runs.
    pub fn model(&self) -> &Model {
        self.model
    }

    /// How long the parts of the last call of [`Engine::generate`] or [`Engine::generate_in`] took.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Continues every request, all of them together; `on_delta` gets text as it comes and may end all answers.
    ///
    /// The result of a request does not depend on the others.
    ///
    /// # Errors
    /// A request that cannot be served; none is started then.
    pub fn generate(
        &mut self,
        requests: &[Request],
        on_delta: &mut dyn FnMut(Delta<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, EngineError> {
        let mut sessions: Vec<Session> = requests.iter().map(|_| Session::new(self.model)).collect();
        self.generate_in(&mut sessions, requests, on_delta)
    }

    /// Continues requests in sessions that are kept: what a prompt shares with its session is not read again.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    ///
    /// # Panics
    /// When there are not as many sessions as requests.
    pub fn generate_in(
        &mut self,
        sessions: &mut [Session],
        requests: &[Request],
        on_delta: &mut dyn FnMut(Delta<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, EngineError> {
        assert_eq!(sessions.len(), requests.len(), "generate_in: one session per request");
        for request in requests {
            self.check(request)?;
        }
        self.run(requests, sessions, on_delta)
    }

    fn run(
        &mut self,
        requests: &[Request],
        sessions: &mut [Session],
        on_delta: &mut dyn FnMut(Delta<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, EngineError> {
        let mut running: Vec<Running<'_>> = requests
            .iter()
            .zip(sessions)
            .map(|(request, session)| Running {
                reused: session.reuse(&request.prompt),
                request,
                session,
                all: request.prompt.clone(),
                decoder: self.tokenizer.map(|tokenizer| tokenizer.stream_decoder(true)),
                matcher: StopMatcher::new(request.stop.iter().cloned()),
                log_probs: Vec::new(),
                text: String::new(),
                stop: (request.max_tokens == 0).then_some(StopReason::MaxTokens),
                trace: Trace::default(),
                reader: None,
            })
            .collect();
        share_prompts(&mut running);
        self.timing = Timing::default();
        let begin = Instant::now();
        while running.iter().any(|sequence| sequence.stop.is_none()) {
            // prompts are being read as long as one has its first token to come
            let reading = running.iter().any(|s| s.stop.is_none() && s.all.len() == s.request.prompt.len());
            let ended = self.call(&mut running, on_delta)?;
            if reading {
                self.timing.prefill = begin.elapsed();
            }
            if ended.is_break() {
                for sequence in &mut running {
                    sequence.stop.get_or_insert(StopReason::Cancelled);
                }
            }
        }
        self.timing.decode = begin.elapsed().saturating_sub(self.timing.prefill);
        Ok(running.into_iter().enumerate().map(|(at, sequence)| sequence.finish(at, on_delta)).collect())
    }

    /// One call of the model for all that is ready, and a token for each sequence that was read to its end.
    fn call(
        &mut self,
        running: &mut [Running<'_>],
        on_delta: &mut dyn FnMut(Delta<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, EngineError> {
        let mut room = TOKENS_PER_CALL;
        let mut steps = Vec::with_capacity(running.len());
        let mut wanted = Vec::with_capacity(running.len());
        let mut read = Vec::with_capacity(running.len());
        for (at, sequence) in running.iter_mut().enumerate() {
            let fed = sequence.session.tokens.len();
            let take = (sequence.all.len() - fed).min(room);
            if sequence.stop.is_some() || sequence.reader.is_some() || take == 0 {
                continue;
            }
            room -= take;
            let tokens = &sequence.all[fed..fed + take];
            sequence.session.tokens.extend_from_slice(tokens);
            read.push((at, take));
            let last = fed + take == sequence.all.len();
            if last {
                wanted.push(at);
            }
            let want = if last { Want::Last } else { Want::None };
            steps.push(Step { tokens, cache: &mut sequence.session.cache, want });
        }
        let (logits, routes) = self.model.infer_traced(self.cpu, &mut steps);
        let logits = logits.f32();
        drop(steps);
        if self.traced {
            trace_routes(running, &read, &routes);
        }
        let shared = take_prompts(running, &mut wanted, logits, self.model.config.vocab_size);
        let logits = shared.as_deref().unwrap_or(logits);
        let (w, context) = (self.model.config.vocab_size, self.context);
        let choices = self.choose(running, &wanted, logits)?;
        let log_probs = self.log_probs.then(|| log_probs(self.cpu, logits, w, &choices));
        let mut flow = ControlFlow::Continue(());
        for (row, (&at, choice)) in wanted.iter().zip(choices).enumerate() {
            let sequence = &mut running[at];
            let id = choice.id;
            if self.traced {
                sequence.trace.tokens.push(id);
                sequence.trace.log_probs.push(choice.log_prob);
                sequence.trace.kept.push(choice.kept);
            }
            let text = sequence.take(id, log_probs.as_ref().map(|all| all[row]), context);
            let tokens = sequence.tokens();
            if on_delta(Delta { request: at, text: &text, tokens }).is_break() {
                flow = ControlFlow::Break(());
            }
        }
        if wanted.is_empty() && on_delta(Delta { request: 0, text: "", tokens: 0 }).is_break() {
            // a long prompt can be given up too
            flow = ControlFlow::Break(());
        }
        Ok(flow)
    }

    /// A token for each wanted sequence, of whose logits there is a row each.
    ///
    /// Rows of one temperature are tempered and drawn from together, by the functions that training uses.
    fn choose(
        &mut self,
        running: &[Running<'_>],
        wanted: &[usize],
        logits: &[f32],
    ) -> Result<Vec<Choice>, EngineError> {
        let w = self.model.config.vocab_size;
        let mut choices: Vec<Choice> = wanted.iter().map(|_| Choice::default()).collect();
        let request = |row: usize| running[wanted[row]].request;
        let row_of = |row: usize| &logits[row * w..(row + 1) * w];
        let likeliest = |row: usize| {
            let position = running[wanted[row]].all.len();
            sampling::argmax(row_of(row)).map(|best| best.0).ok_or(EngineError::NotANumber { position })
        };
        let mut temperatures: Vec<f32> =
            (0..wanted.len()).map(|row| request(row).sampling.temperature).collect();
        temperatures.sort_by(f32::total_cmp);
        temperatures.dedup();
        for temperature in temperatures {
            let rows: Vec<usize> =
                (0..wanted.len()).filter(|&row| request(row).sampling.temperature == temperature).collect();
            if temperature == 0.0 {
                for &row in &rows {
                    choices[row].id = likeliest(row)?;
                }
                continue;
            }
            let mut kept = Kept::default();
            for &row in &rows {
                kept.push(self.sampler.kept(&request(row).sampling, row_of(row)));
            }
            let uniform = |&row: &usize| {
                let Request { sampling, sequence, .. } = request(row);
                rng::uniform_f64(sampling.seed, *sequence, running[wanted[row]].all.len() as u64)
            };
            let uniforms: Vec<f64> = rows.iter().map(uniform).collect();
            let tempered: Vec<f32>;
            let as_they_are = rows.len() == wanted.len() && temperature == 1.0 && kept.ids.is_empty();
            let from = if as_they_are {
                logits
            } else {
                let mut copy: Vec<f32> = rows.iter().flat_map(|&row| row_of(row)).copied().collect();
                policy::temper(self.cpu, &mut copy, w, temperature, &kept);
                tempered = copy;
                &tempered
            };
            let (mut ids, mut log_probs) = (vec![0; rows.len()], vec![0.0; rows.len()]);
            policy::draw(self.cpu, from, w, &uniforms, &mut ids, &mut log_probs);
            for (i, &row) in rows.iter().enumerate() {
                // an infinite logit leaves nothing to draw, and no number at all is an error
                let id = if ids[i] == u32::MAX { likeliest(row)? } else { ids[i] };
                let kept = kept.row(i).to_vec();
                let plain = temperature == 1.0 && kept.is_empty() && id == ids[i];
                choices[row] = Choice { id, log_prob: log_probs[i], plain, kept };
            }
        }
        Ok(choices)
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        request.sampling.validate()?;
        if request.prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        self.check_tokens(&request.prompt)?;
        if !request.stop.is_empty() && self.tokenizer.is_none() {
            return Err(EngineError::StopNeedsTokenizer);
        }
        // a full context has no room for an answer
        if request.prompt.len() >= self.context && request.max_tokens > 0 {
            return Err(EngineError::Context { got: request.prompt.len() + 1, limit: self.context });
        }
        Ok(())
    }

    /// Checks ids and length of a sequence.
    ///
    /// # Errors
    /// An id outside the vocabulary, or more tokens than the context holds.
    pub fn check_tokens(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let vocabulary = self.model.config.vocab_size;
        if let Some((index, &id)) = tokens.iter().enumerate().find(|(_, id)| **id as usize >= vocabulary) {
            return Err(EngineError::Token { index, id, vocabulary });
        }
        if tokens.len() > self.context {
            return Err(EngineError::Context { got: tokens.len(), limit: self.context });
        }
        Ok(())
    }

    /// The natural logarithm of the probability of each token given those before it: one fewer than there are tokens.
    /// `on_logits` gets rows of logits in order, `[some tokens, w]` at a time.
    ///
    /// # Errors
    /// An id outside the vocabulary, or more tokens than the context holds.
    pub fn score(
        &mut self,
        tokens: &[u32],
        on_logits: &mut dyn FnMut(&[f32]),
    ) -> Result<Vec<f32>, EngineError> {
        self.check_tokens(tokens)?;
        let w = self.model.config.vocab_size;
        let chunk = (LOGITS_PER_CALL / w).clamp(1, TOKENS_PER_CALL);
        let mut cache = Cache::new(self.model);
        let mut log_probs = vec![0.0; tokens.len().saturating_sub(1)];
        for from in (0..tokens.len()).step_by(chunk) {
            let to = (from + chunk).min(tokens.len());
            let mut steps = [Step { tokens: &tokens[from..to], cache: &mut cache, want: Want::All }];
            let logits = self.model.infer(self.cpu, &mut steps);
            let labels = &tokens[from + 1..(to + 1).min(tokens.len())];
            let rows = &logits[..labels.len() * w];
            loss::log_probs(self.cpu, rows, w, labels, &mut log_probs[from..from + labels.len()]);
            on_logits(&logits);
        }
        Ok(log_probs)
    }
}

/// A token that was chosen.
#[derive(Default)]
struct Choice {
    id: u32,
    /// Of the distribution that it was drawn from; 0 where there was no draw.
    log_prob: f32,
    /// Whether that is the model's own distribution.
    plain: bool,
    /// What filters left; nothing where all was left.
    kept: Vec<u32>,
}

/// The log-probability of each choice before temperature and filters. Where there were none the draw has said it, to
/// the bit, and its row is not gone through again.
fn log_probs(cpu: &Cpu, logits: &[f32], w: usize, choices: &[Choice]) -> Vec<f32> {
    let labels: Vec<u32> =
        choices.iter().map(|choice| if choice.plain { loss::IGNORED } else { choice.id }).collect();
    let mut log_probs = vec![0.0; choices.len()];
    loss::log_probs(cpu, logits, w, &labels, &mut log_probs);
    for (log_prob, choice) in log_probs.iter_mut().zip(choices).filter(|(_, choice)| choice.plain) {
        *log_prob = choice.log_prob;
    }
    log_probs
}

/// Lets the first of all that begin with nothing but the same prompt read it.
fn share_prompts(running: &mut [Running<'_>]) {
    let mut readers: HashMap<&[u32], usize> = HashMap::new();
    for (at, sequence) in running.iter_mut().enumerate() {
        if sequence.stop.is_none() && sequence.session.is_empty() {
            match readers.entry(&sequence.request.prompt) {
                Entry::Occupied(reader) => sequence.reader = Some(*reader.get()),
                Entry::Vacant(free) => {
                    free.insert(at);
                }
            }
        }
    }
}

/// Hands prompts that have just been read to their end to all that wait for them, who are then wanted as well: gives the
/// rows of logits of all that are, if there are more of them now.
fn take_prompts(
    running: &mut [Running<'_>],
    wanted: &mut Vec<usize>,
    logits: &[f32],
    w: usize,
) -> Option<Vec<f32>> {
    let row_of = |reader: usize| wanted.iter().position(|&at| at == reader);
    let mut rows: Vec<(usize, usize)> = wanted.iter().copied().zip(0..).collect();
    for at in 0..running.len() {
        if let Some((reader, row)) = running[at].reader.and_then(|reader| Some((reader, row_of(reader)?))) {
            let (session, routes) = (running[reader].session.clone(), running[reader].trace.routes.clone());
            let sequence = &mut running[at];
            (*sequence.session, sequence.trace.routes, sequence.reader) = (session, routes, None);
            rows.push((at, row));
        }
    }
    if rows.len() == wanted.len() {
        return None;
    }
    rows.sort_unstable();
    *wanted = rows.iter().map(|&(at, _)| at).collect();
    Some(rows.iter().flat_map(|&(_, row)| &logits[row * w..(row + 1) * w]).copied().collect())
}

/// Notes for each sequence to which experts its rows were sent.
fn trace_routes(running: &mut [Running<'_>], read: &[(usize, usize)], routes: &[Arc<[u32]>]) {
    let rows: usize = read.iter().map(|(_, n)| n).sum();
    for (index, layer) in routes.iter().enumerate() {
        let k = layer.len() / rows.max(1);
        let mut rest = &layer[..];
        for &(at, n) in read {
            let trace = &mut running[at].trace;
            trace.routes.resize(routes.len(), Vec::new());
            let (own, others) = rest.split_at(n * k);
            trace.routes[index].extend_from_slice(own);
            rest = others;
        }
    }
}

impl Running<'_> {
    /// Tokens of the answer.
    fn tokens(&self) -> usize {
        self.all.len() - self.request.prompt.len()
    }

    /// Takes a token into the answer and gives the text that is sure now.
    fn take(&mut self, id: u32, log_prob: Option<f32>, context: usize) -> String {
        if self.request.stop_ids.contains(&id) {
            self.stop = Some(StopReason::Token(id));
            return String::new();
        }
        self.all.push(id);
        self.log_probs.extend(log_prob);
        let piece = self.decoder.as_mut().map(|decoder| decoder.step(id)).unwrap_or_default();
        let (text, found) = self.matcher.push(&piece);
        self.text.push_str(&text);
        self.stop = if let Some(stop) = found {
            // what follows in the same token is not part of the answer
            self.decoder = None;
            Some(StopReason::String(stop))
        } else if self.tokens() >= self.request.max_tokens {
            Some(StopReason::MaxTokens)
        } else if self.all.len() >= context {
            Some(StopReason::Context)
        } else {
            None
        };
        text
    }

    /// Gives out what was held back: half a character, or the beginning of a stop string.
    fn finish(mut self, at: usize, on_delta: &mut dyn FnMut(Delta<'_>) -> ControlFlow<()>) -> Generation {
        let mut stop = self.stop.take().unwrap_or(StopReason::Cancelled);
        if let Some(decoder) = self.decoder.take() {
            let (mut rest, found) = self.matcher.push(&decoder.finish());
            match found {
                Some(string) => stop = StopReason::String(string),
                None => rest.push_str(&self.matcher.finish()),
            }
            if !rest.is_empty() {
                // the answer is over: there is nothing left to break off
                let _ = on_delta(Delta { request: at, text: &rest, tokens: self.tokens() });
            }
            self.text.push_str(&rest);
        }
        Generation {
            tokens: self.all.split_off(self.request.prompt.len()),
            log_probs: self.log_probs,
            text: self.text,
            stop,
            reused: self.reused,
            trace: self.trace,
        }
    }
}
