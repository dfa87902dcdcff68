//! Generation and scoring: what goes into a call of the model, and what is made of the logits.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use minke_cpu::policy::{self, Kept};
use minke_cpu::{Cpu, loss};
use minke_data::Tokenizer;
use minke_model::{Cache, CacheKind, Model, Step, Want};
use minke_num::rng;

use crate::sampling::{self, Sampler, Sampling, SettingError};
use crate::sequence::{Sequence, Session, share_prompts, take_prompts, trace_routes};

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
    /// More tokens than there is memory for.
    #[error("{got} tokens do not fit into the memory for caches, which holds {limit}")]
    Memory {
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
    /// Latents are what latent attention keeps.
    #[error("a cache of latents needs a model with latent attention, and this one has none")]
    NoLatent,
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
    /// There was no more time for it.
    Deadline,
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
            Self::Deadline => "deadline",
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
    cache: CacheKind,
}

impl<'a> Engine<'a> {
    /// An engine over a model; without a tokenizer answers are ids only.
    pub fn new(model: &'a mut Model, cpu: &'a Cpu, tokenizer: Option<&'a Tokenizer>) -> Self {
        let context = model.config.max_position_embeddings;
        let (sampler, timing) = (Sampler::default(), Timing::default());
        Self {
            model,
            cpu,
            tokenizer,
            context,
            sampler,
            timing,
            traced: false,
            log_probs: true,
            cache: CacheKind::Model,
        }
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

    /// Keeps something else of a sequence than the model's own keys and values.
    ///
    /// # Errors
    /// Latents of a model that has none.
    pub fn with_cache(self, cache: CacheKind) -> Result<Self, EngineError> {
        Session::of_kind(self.model, cache).ok_or(EngineError::NoLatent)?;
        Ok(Self { cache, ..self })
    }

    /// Takes no more tokens into one sequence than this, if the model takes more.
    #[must_use]
    pub fn with_context(self, most: usize) -> Self {
        Self { context: self.context.min(most), ..self }
    }

    /// A sequence of nothing, of the kind that this engine keeps.
    pub fn empty_session(&self) -> Session {
        Session::of_kind(self.model, self.cache).expect("the kind was checked")
    }

    /// The tokenizer, if there is one.
    pub(crate) fn tokenizer(&self) -> Option<&'a Tokenizer> {
        self.tokenizer
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
        let mut sessions: Vec<Session> = requests.iter().map(|_| self.empty_session()).collect();
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
        let start = |(request, session): (&Request, &mut Session)| {
            let session = std::mem::replace(session, self.empty_session());
            Sequence::new(request.clone(), session, self.tokenizer)
        };
        let mut sequences: Vec<Sequence> = requests.iter().zip(&mut *sessions).map(start).collect();
        share_prompts(&mut sequences);
        self.timing = Timing::default();
        let outcome = self.run_out(&mut sequences, on_delta);
        let mut generations = Vec::with_capacity(sequences.len());
        for (request, (sequence, kept)) in sequences.into_iter().zip(sessions).enumerate() {
            let (generation, session, text) = sequence.finish();
            *kept = session;
            if outcome.is_ok() && !text.is_empty() {
                // the answer is over: there is nothing left to break off
                let _ = on_delta(Delta { request, text: &text, tokens: generation.tokens.len() });
            }
            generations.push(generation);
        }
        outcome.map(|()| generations)
    }

    fn run_out(
        &mut self,
        sequences: &mut [Sequence],
        on_delta: &mut dyn FnMut(Delta<'_>) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let begin = Instant::now();
        while sequences.iter().any(|sequence| sequence.stop.is_none()) {
            // prompts are being read as long as one has its first token to come
            let reading = sequences.iter().any(|s| s.stop.is_none() && s.tokens() == 0);
            let takes = in_order(sequences);
            let written = self.step(sequences, &takes);
            let mut ended = false;
            for Written { at, token } in &written {
                let Token { text, .. } = token.as_ref().map_err(Clone::clone)?;
                let tokens = sequences[*at].tokens();
                ended |= on_delta(Delta { request: *at, text, tokens }).is_break();
            }
            if written.is_empty() {
                // a long prompt can be given up too
                ended = on_delta(Delta { request: 0, text: "", tokens: 0 }).is_break();
            }
            if reading {
                self.timing.prefill = begin.elapsed();
            }
            if ended {
                for sequence in &mut *sequences {
                    sequence.stop.get_or_insert(StopReason::Cancelled);
                }
            }
        }
        self.timing.decode = begin.elapsed().saturating_sub(self.timing.prefill);
        Ok(())
    }

    /// One call of the model, which reads the next `takes[i]` tokens of sequence `i`, and a token for each sequence that
    /// was read to its end.
    ///
    /// The only way from requests to the model: what is generated for a list and what a service generates for many
    /// callers differ in what they put into a call.
    pub(crate) fn step(&mut self, sequences: &mut [Sequence], takes: &[usize]) -> Vec<Written> {
        let mut steps = Vec::with_capacity(sequences.len());
        let mut wanted = Vec::with_capacity(sequences.len());
        let mut read = Vec::with_capacity(sequences.len());
        for (at, (sequence, &take)) in sequences.iter_mut().zip(takes).enumerate() {
            if take == 0 {
                continue;
            }
            let fed = sequence.session.tokens.len();
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
            trace_routes(sequences, &read, &routes);
        }
        let shared = take_prompts(sequences, &mut wanted, logits, self.model.config.vocab_size);
        let logits = shared.as_deref().unwrap_or(logits);
        let (w, context) = (self.model.config.vocab_size, self.context);
        let choices = self.choose(sequences, &wanted, logits);
        let log_probs = self.log_probs.then(|| log_probs(self.cpu, logits, w, &choices));
        let rows = wanted.into_iter().zip(choices).enumerate();
        let written = rows.map(|(row, (at, choice))| {
            let token = choice.map(|choice| {
                let sequence = &mut sequences[at];
                let (id, log_prob) = (choice.id, log_probs.as_ref().map(|all| all[row]));
                if self.traced {
                    sequence.trace.tokens.push(id);
                    sequence.trace.log_probs.push(choice.log_prob);
                    sequence.trace.kept.push(choice.kept);
                }
                Token { id, log_prob, text: sequence.take(id, log_prob, context) }
            });
            Written { at, token }
        });
        written.collect()
    }

    /// A token for each wanted sequence, of whose logits there is a row each; a row that gives none spoils no other.
    ///
    /// Rows of one temperature are tempered and drawn from together, by the functions that training uses.
    fn choose(
        &mut self,
        running: &[Sequence],
        wanted: &[usize],
        logits: &[f32],
    ) -> Vec<Result<Choice, EngineError>> {
        let w = self.model.config.vocab_size;
        let mut choices: Vec<Result<Choice, EngineError>> =
            wanted.iter().map(|_| Ok(Choice::default())).collect();
        let request = |row: usize| &running[wanted[row]].request;
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
                    choices[row] = likeliest(row).map(|id| Choice { id, ..Choice::default() });
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
                let id = if ids[i] == u32::MAX { likeliest(row) } else { Ok(ids[i]) };
                choices[row] = id.map(|id| {
                    let kept = kept.row(i).to_vec();
                    let plain = temperature == 1.0 && kept.is_empty() && id == ids[i];
                    Choice { id, log_prob: log_probs[i], plain, kept }
                });
            }
        }
        choices
    }

    /// Checks a request before it is started.
    pub(crate) fn check(&self, request: &Request) -> Result<(), EngineError> {
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
            return Err(self.too_long(request.prompt.len() + 1));
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
            return Err(self.too_long(tokens.len()));
        }
        Ok(())
    }

    fn too_long(&self, got: usize) -> EngineError {
        let limit = self.context;
        if limit < self.model.config.max_position_embeddings {
            EngineError::Memory { got, limit }
        } else {
            EngineError::Context { got, limit }
        }
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

/// What a call of the model brought to a sequence.
pub(crate) struct Written {
    /// Its place.
    pub at: usize,
    /// A token, unless none could be chosen.
    pub token: Result<Token, EngineError>,
}

/// A token that was chosen for a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability, before temperature and filters; none where the engine goes without.
    pub log_prob: Option<f32>,
    /// The text that is sure now.
    pub text: String,
}

/// What goes into the next call when all are served alike: as much of each as there is room for.
fn in_order(sequences: &[Sequence]) -> Vec<usize> {
    let mut room = TOKENS_PER_CALL;
    let take = |sequence: &Sequence| {
        if sequence.stop.is_some() || sequence.reader.is_some() {
            return 0;
        }
        let take = sequence.unread().min(room);
        room -= take;
        take
    };
    sequences.iter().map(take).collect()
}

/// The log-probability of each choice before temperature and filters. Where there were none the draw has said it, to
/// the bit, and its row is not gone through again.
fn log_probs(cpu: &Cpu, logits: &[f32], w: usize, choices: &[Result<Choice, EngineError>]) -> Vec<f32> {
    let drawn = |choice: &Result<Choice, EngineError>| match choice {
        Ok(choice) => choice.plain.then_some(choice.log_prob),
        Err(_) => Some(f32::NAN),
    };
    let label = |choice: &Result<Choice, EngineError>| match choice {
        Ok(choice) if !choice.plain => choice.id,
        Ok(_) | Err(_) => loss::IGNORED,
    };
    let labels: Vec<u32> = choices.iter().map(label).collect();
    let mut log_probs = vec![0.0; choices.len()];
    loss::log_probs(cpu, logits, w, &labels, &mut log_probs);
    for (log_prob, choice) in log_probs.iter_mut().zip(choices) {
        *log_prob = drawn(choice).unwrap_or(*log_prob);
    }
    log_probs
}
