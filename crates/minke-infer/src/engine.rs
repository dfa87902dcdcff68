//! Generation and scoring: what goes into a call of the model, and what is made of the logits.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use minke_cpu::{Cpu, loss};
use minke_data::Tokenizer;
use minke_model::{Cache, CacheKind, Model, Step, Want};

use crate::compiler::{Compiler, Form};
use crate::constrain::{Constraint, ConstraintError};
use crate::guide::{self, Guide};
use crate::sampling::{Sampler, Sampling, SettingError};
use crate::sequence::{Sequence, Session, share_prompts};
use crate::speculate::{self, Costs, Speculated, Speculation};
use crate::step::Written;
use crate::thinking::{ThinkingBudget, Thought};

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
    /// Drafts are ids, and would mean something else.
    #[error("the draft model's vocabulary is not the model's: {reason}")]
    DraftVocabulary {
        /// The first difference.
        reason: String,
    },
    /// There is nothing to draft with.
    #[error("speculation with {what}: {hint}")]
    CannotDraft {
        /// What was asked for.
        what: &'static str,
        /// What it lacks.
        hint: &'static str,
    },
    /// A constraint that cannot be kept.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// Thoughts are found by their markers, which are text.
    #[error("a thinking budget needs a tokenizer, and the model folder has none")]
    ThinkingNeedsTokenizer,
    /// A marker that cannot be looked for or written.
    #[error(
        "thinking budget: expected a marker of 1 to 4096 bytes that the tokenizer can write, got `{marker}`"
    )]
    ThinkingMarker {
        /// It, or its beginning.
        marker: String,
    },
    /// A trainer could not say again how such a token was chosen.
    #[error(
        "logit bias and penalties are not traced: a trainer would see another distribution than was drawn from"
    )]
    TracedPenalties,
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
    /// Tokens that end the answer and are not part of it: the model's own ends. A constraint does not allow them but where
    /// the answer is complete, whatever their text.
    pub stop_ids: Vec<u32>,
    /// Others that do. A constraint allows them wherever it allows their text.
    pub more_stop_ids: Vec<u32>,
    /// Tokens before which no stop token comes and no stop string is looked for.
    pub min_tokens: usize,
    /// What is added to the logits of some ids, from -100, which forbids them, to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// How many of the likeliest tokens' log-probabilities come with each token.
    pub top_log_probs: usize,
    /// How long it may think.
    pub thinking: Option<ThinkingBudget>,
    /// What the answer must look like.
    pub constraint: Option<Constraint>,
    /// Whether a thought that [`Request::thinking`] follows is free, be it begun by the prompt or by the first token of
    /// the answer ([`crate::form_waits`]): the constraint then begins behind it.
    pub constrain_answer_only: bool,
    /// What is drafted ahead; nothing of the answer depends on it, only its speed.
    pub speculation: Speculation,
}

impl Request {
    /// Whether a token ends the answer.
    pub(crate) fn ends_with(&self, id: u32) -> bool {
        self.stop_ids.contains(&id) || self.more_stop_ids.contains(&id)
    }

    /// Whether a bias does anything but forbid.
    fn has_bias(&self) -> bool {
        self.logit_bias.iter().any(|(_, bias)| *bias > guide::BAN)
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The model chose this token of [`Request::stop_ids`] or [`Request::more_stop_ids`].
    Token(u32),
    /// This string of [`Request::stop`] was complete.
    String(String),
    /// [`Request::max_tokens`] were added.
    MaxTokens,
    /// The model's context is full.
    Context,
    /// [`Request::constraint`] is met, and it lets nothing follow.
    Complete,
    /// Of what the request lets come next nothing has a chance.
    DeadEnd,
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
            Self::Complete => "complete",
            Self::DeadEnd => "dead_end",
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
    /// The likeliest tokens at each token's place and their log-probabilities, as many as [`Request::top_log_probs`].
    pub top_log_probs: Vec<Vec<(u32, f32)>>,
    /// Their text up to the stop string; empty without a tokenizer.
    pub text: String,
    /// What was spent on thinking, where [`Request::thinking`] bounds it.
    pub thought: Option<Thought>,
    /// Whether the tokens are all that [`Request::constraint`] asks for, where there is one.
    pub has_form: Option<bool>,
    /// What came of drafts.
    pub speculated: Speculated,
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

/// Whether there is what drafts shall come from: prediction modules of the model, or another model.
///
/// # Errors
/// There is not.
pub fn can_draft(model: &Model, has_draft_model: bool, speculation: Speculation) -> Result<(), EngineError> {
    let (what, hint) = match speculation {
        Speculation::Mtp if model.config.num_nextn_predict_layers == 0 => {
            ("mtp", "the model has no prediction module; ngram and draft need none")
        }
        Speculation::Draft if !has_draft_model => ("draft", "no draft model was given"),
        _ => return Ok(()),
    };
    Err(EngineError::CannotDraft { what, hint })
}

/// Whether tokens of one mean the same to the other.
pub(crate) fn check_vocabularies(
    ours: Option<&Tokenizer>,
    theirs: Option<&Tokenizer>,
) -> Result<(), EngineError> {
    let same = match (ours, theirs) {
        (Some(ours), Some(theirs)) => speculate::same_vocabulary(ours, theirs),
        (None, None) => Ok(()),
        _ => Err("only one of the two has a tokenizer".to_owned()),
    };
    same.map_err(|reason| EngineError::DraftVocabulary { reason })
}

/// Runs a model: borrows it, so the weights may be a trainer's.
pub struct Engine<'a> {
    pub(crate) model: &'a mut Model,
    pub(crate) cpu: &'a Cpu,
    tokenizer: Option<&'a Tokenizer>,
    pub(crate) context: usize,
    pub(crate) sampler: Sampler,
    /// A smaller model that drafts.
    pub(crate) other: Option<&'a mut Model>,
    pub(crate) costs: Costs,
    compiler: Compiler,
    timing: Timing,
    pub(crate) traced: bool,
    pub(crate) log_probs: bool,
    cache: CacheKind,
}

impl<'a> Engine<'a> {
    /// An engine over a model; without a tokenizer answers are ids only.
    pub fn new(model: &'a mut Model, cpu: &'a Cpu, tokenizer: Option<&'a Tokenizer>) -> Self {
        let context = model.config.max_position_embeddings;
        let (sampler, timing) = (Sampler::default(), Timing::default());
        let compiler = Compiler::new(tokenizer, model.config.vocab_size);
        Self {
            model,
            cpu,
            tokenizer,
            context,
            sampler,
            other: None,
            costs: Costs::default(),
            compiler,
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

    /// Lets a smaller model draft for requests whose [`Request::speculation`] says so; `tokenizer` is its own.
    ///
    /// # Errors
    /// Its vocabulary is another.
    pub fn with_draft(
        self,
        model: &'a mut Model,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self, EngineError> {
        check_vocabularies(self.tokenizer, tokenizer)?;
        Ok(Self { other: Some(model), ..self })
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
        let mut guides = Vec::with_capacity(requests.len());
        for request in requests {
            guides.push(self.guide(request)?);
        }
        self.run(requests, guides, sessions, on_delta)
    }

    fn run(
        &mut self,
        requests: &[Request],
        guides: Vec<Guide>,
        sessions: &mut [Session],
        on_delta: &mut dyn FnMut(Delta<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, EngineError> {
        let start = |((request, guide), session): ((&Request, Guide), &mut Session)| {
            let session = std::mem::replace(session, self.empty_session());
            Sequence::new(request.clone(), guide, session, self.tokenizer)
        };
        let mut sequences: Vec<Sequence> =
            requests.iter().zip(guides).zip(&mut *sessions).map(start).collect();
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
                let text = token.as_ref().map_err(Clone::clone)?.as_ref().map_or("", |token| &token.text);
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

    /// [`Engine::guide_with`] the request's constraint, which is compiled first.
    ///
    /// # Errors
    /// What of it cannot be served.
    fn guide(&self, request: &Request) -> Result<Guide, EngineError> {
        let form = request.constraint.as_ref().map(|constraint| self.compiler.compile(constraint));
        self.guide_with(request, form.transpose()?)
    }

    /// Checks a request, and readies what follows its tokens; `form` is its constraint.
    ///
    /// # Errors
    /// What of it cannot be served.
    pub(crate) fn guide_with(&self, request: &Request, form: Option<Form>) -> Result<Guide, EngineError> {
        self.check(request)?;
        Guide::new(request, form.map(|form| form.0), self.tokenizer, self.model.config.vocab_size)
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        if self.traced && (request.sampling.has_penalties() || request.has_bias()) {
            return Err(EngineError::TracedPenalties);
        }
        can_draft(self.model, self.other.is_some(), request.speculation)?;
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
