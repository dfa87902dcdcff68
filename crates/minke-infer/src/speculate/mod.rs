//! Speculation: tokens that are taken to come next are read with the one that is known, and kept where they come.
//!
//! It loses nothing, to the bit. A token is drawn by (seed, sequence, position) from logits that do not depend on how a
//! sequence is cut into calls; so the call that reads drafted tokens gives at each of them the very row that a call of
//! its own would give, from which the very same token is drawn. A draft is kept as long as that is the drafted one.
//!
//! Drafts come from three places: what must come (the end of a thought, what a grammar forces); what came the last time
//! that the text went this way (`ngram.rs`); and a model that guesses: the prediction modules that the model was
//! trained with, one after the other, or a smaller model with the same tokenizer. A guess is drawn as the token itself
//! will be, with the same random number under the same filters, so that two that agree on probabilities agree on the
//! token.
//!
//! Papers: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; DeepSeek-V3 report,
//! section 5.4.3, for drafting with its module; Saxena 2023, "Prompt Lookup Decoding".

mod control;
mod draft;
mod ngram;
#[cfg(test)]
mod tests;

use minke_model::{DraftCache, Model};

use crate::sequence::Session;

use control::{Pace, Rate, Trust, length};
use ngram::Ngrams;

pub(crate) use control::Costs;
pub(crate) use draft::same_vocabulary;

/// Tokens that are drafted at once, at most.
pub(crate) const MOST: usize = 16;
/// Tokens that a model drafts at once, at most.
pub(crate) const MOST_BY_MODEL: usize = 8;
/// How likely all drafts so far must be to come, for another one where drafts were asked for, whether they pay or not.
const ASKED: f64 = 0.25;
/// States that wait for a module, at most: what lies further back is not read by it.
const WINDOW: usize = 128;

/// Where drafts of the next tokens come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Speculation {
    /// There are none.
    #[default]
    Off,
    /// From whatever pays, as measured for this request on this machine; from nowhere if nothing does.
    Auto,
    /// From what came before in the sequence itself.
    Ngram,
    /// From the model's prediction modules.
    Mtp,
    /// From a smaller model, [`crate::Engine::with_draft`].
    Draft,
}

/// What came of a request's drafts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Speculated {
    /// Tokens that were drafted and read.
    pub drafted: usize,
    /// Of these, those that came.
    pub accepted: usize,
    /// Calls of the model that gave the request a token, or several, or its end.
    pub calls: usize,
}

impl Speculated {
    /// Tokens that a call gave, on average; 1 without speculation.
    pub fn tokens_per_call(&self) -> f64 {
        if self.calls == 0 { 1.0 } else { (self.calls + self.accepted) as f64 / self.calls as f64 }
    }
}

/// Who drafted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A grammar or a budget, for which there is no other way on.
    Forced,
    /// The sequence itself.
    Text,
    /// Modules or a model.
    Model,
}

/// What a sequence drafts from.
pub(crate) struct Drafting {
    mode: Speculation,
    ngrams: Ngrams,
    /// By source.
    rates: [Rate; 3],
    /// Of drafts of modules or a model, by how likely they were taken to be.
    trust: Trust,
    /// Whether modules or a model may draft.
    by_models: bool,
    /// Whether the model was asked for its modules.
    begun: bool,
    /// What the text would have drafted first, had it been worth it.
    guess: Option<u32>,
    /// The model's, if they draft.
    pub modules: Vec<Module>,
    /// What the other model has read.
    pub other: Option<Session>,
    pub stats: Speculated,
}

/// What to draft, and who does it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Proposal {
    Nothing,
    /// These.
    Tokens(Source, Vec<u32>),
    /// What a model says, as long as that pays.
    Model(Chain),
}

/// Drafts of a model, one after the other, each as likely to come as all before it are right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Chain {
    /// So many at most.
    most: usize,
    /// So many at least, whether they pay or not.
    least: usize,
    /// So many so far.
    len: usize,
    /// The probability that all of them come.
    right: f64,
    /// How often a draft of this sequence is right.
    share: f64,
    /// With the drafts so far; none where costs are not known.
    pace: Option<Pace>,
    /// What counts instead of costs.
    floor: Option<f64>,
}

impl Chain {
    /// Whether a draft that is right so often, if those before it are, is to be read; it counts from then on.
    pub fn takes(&mut self, share: f64) -> bool {
        let right = self.right * share;
        let made = self.pace.map(Pace::made);
        let is_worth = match self.floor {
            Some(floor) => right > floor,
            None => made.is_some_and(|pace| pace.is_worth_reading(right)),
        };
        if self.len >= self.least && !is_worth {
            return false;
        }
        (self.len, self.right, self.pace) = (self.len + 1, right, made.map(|pace| pace.read(right)));
        true
    }

    /// How many it may be.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Whether another is to be made.
    pub fn goes_on(&self) -> bool {
        let next = self.right * self.share;
        let is_worth = match self.floor {
            Some(floor) => next > floor,
            None => self.pace.is_some_and(|pace| pace.is_worth_making(next)),
        };
        self.len < self.most && (self.len < self.least || is_worth)
    }
}

impl Drafting {
    /// For a request that has its prompt only.
    pub fn new(mode: Speculation) -> Self {
        Self {
            mode,
            ngrams: Ngrams::default(),
            rates: [Rate::new(0.9), Rate::new(0.5), Rate::new(0.6)],
            trust: Trust::default(),
            by_models: matches!(mode, Speculation::Auto | Speculation::Mtp | Speculation::Draft),
            begun: false,
            guess: None,
            modules: Vec::new(),
            other: None,
            stats: Speculated::default(),
        }
    }

    /// Finds out what a model has to draft with.
    pub fn begin(&mut self, model: &Model) {
        if !std::mem::replace(&mut self.begun, true) && self.by_models && self.mode != Speculation::Draft {
            self.modules = DraftCache::of_modules(model).into_iter().map(Module::new).collect();
        }
    }

    /// Lets go of what models have read of the sequence.
    pub fn let_go(&mut self) {
        (self.modules, self.other, self.begun) = (Vec::new(), None, false);
    }

    /// Lets go of it for good: models draft no more.
    pub fn forgo_models(&mut self) {
        self.let_go();
        self.by_models = false;
    }

    /// What it takes for each page of a sequence, of what the caches of modules and another model's do.
    pub fn page_bytes(&self, modules: usize, other: Option<usize>) -> usize {
        match (self.by_models, self.mode) {
            (false, _) => 0,
            (true, Speculation::Mtp) => modules,
            (true, _) => other.unwrap_or(modules),
        }
    }

    /// Whether it drafts at all.
    pub fn is_on(&self) -> bool {
        self.mode != Speculation::Off
    }

    fn rate(&mut self, source: Source) -> &mut Rate {
        match source {
            Source::Forced => &mut self.rates[0],
            Source::Text => &mut self.rates[1],
            Source::Model => &mut self.rates[2],
        }
    }

    /// What to draft behind `all`: at most `most` tokens, in a call that gives `tokens` without drafts. `forced` are those
    /// that must come; `has_other` says whether there is another model.
    pub fn propose(
        &mut self,
        all: &[u32],
        forced: &[u32],
        most: usize,
        tokens: usize,
        costs: &Costs,
        has_other: bool,
    ) -> Proposal {
        self.guess = None;
        if most == 0 || !self.is_on() {
            return Proposal::Nothing;
        }
        let (mode, pace) = (self.mode, costs.pace(tokens));
        // what was asked for is done, whether it pays or not
        let floor = (mode != Speculation::Auto).then_some(ASKED);
        let least = usize::from(floor.is_some());
        let length = |share: f64, by_model, most| match (floor, pace) {
            (Some(floor), _) => ((1..=most).take_while(|&k| share.powi(k as i32) > floor).count(), None),
            (None, None) => (0, None),
            (None, Some(pace)) => {
                let (k, with) = length(share, pace, by_model, most);
                (k, Some(with.rate()))
            }
        };
        if !forced.is_empty() {
            let share = self.rate(Source::Forced).share();
            return match length(share, false, most.min(forced.len())).0 {
                0 => Proposal::Nothing,
                k => Proposal::Tokens(Source::Forced, forced[..k].to_vec()),
            };
        }
        let mut best = (None, Proposal::Nothing);
        if matches!(mode, Speculation::Auto | Speculation::Ngram) {
            self.ngrams.read(all);
            let found = self.ngrams.propose(all, most.min(MOST)).to_vec();
            if let Some(&first) = found.first() {
                self.guess = Some(first);
                let (k, rate) = length(self.rate(Source::Text).share(), false, found.len());
                let k = k.max(least);
                if k > 0 {
                    best = (rate, Proposal::Tokens(Source::Text, found[..k].to_vec()));
                }
            }
        }
        let has_module = self.modules.first().is_some_and(Module::is_ready);
        let can = match mode {
            _ if !self.by_models => false,
            Speculation::Auto => has_other || has_module,
            Speculation::Mtp => has_module,
            Speculation::Draft => has_other,
            Speculation::Off | Speculation::Ngram => false,
        };
        if can {
            let (most, share) = (most.min(MOST_BY_MODEL), self.rate(Source::Model).share());
            let (k, rate) = length(share, true, most);
            if k.max(least) > 0 && (rate > best.0 || best.1 == Proposal::Nothing) {
                best = (rate, Proposal::Model(Chain { most, least, len: 0, right: 1.0, share, pace, floor }));
            } else {
                self.rate(Source::Model).forget();
            }
        }
        best.1
    }

    /// Whether the other model drafts rather than the modules.
    pub fn by_other(&self, has_other: bool) -> bool {
        has_other && self.mode != Speculation::Mtp
    }

    /// How often a model's draft that it takes to be so likely is right.
    pub fn trust(&mut self, sure: f32) -> f64 {
        self.trust.rate(sure).share()
    }

    /// A call gave `tokens`, behind drafts of a source; `made` are those that a model made, with how likely it took them
    /// to be, of which the last may not have been worth reading.
    pub fn learn(&mut self, source: Source, drafts: &[u32], made: &[(u32, f32)], tokens: &[u32]) {
        self.stats.calls += 1;
        self.stats.drafted += drafts.len();
        self.stats.accepted += drafts.iter().zip(tokens).filter(|(draft, token)| draft == token).count();
        for ((draft, sure), token) in made.iter().zip(tokens) {
            self.rate(Source::Model).learn(draft == token);
            self.trust.rate(*sure).learn(draft == token);
        }
        if source != Source::Model {
            drafts.iter().zip(tokens).for_each(|(draft, token)| self.rate(source).learn(draft == token));
        }
        if source == Source::Text && !drafts.is_empty() {
            return;
        }
        if let (Some(guess), Some(&first)) = (self.guess.take(), tokens.first()) {
            self.rate(Source::Text).learn(guess == first);
        }
    }
}

/// A sequence in one of the model's prediction modules.
pub(crate) struct Module {
    pub cache: DraftCache,
    /// Rows of the cache that are not made of drafts.
    sure: usize,
    /// States that the module has not read, and the position of the first.
    states: Vec<f32>,
    from: usize,
    rows: usize,
}

impl Module {
    fn new(cache: DraftCache) -> Self {
        Self { cache, sure: 0, states: Vec::new(), from: 0, rows: 0 }
    }

    /// Whether there is a state to draft from.
    fn is_ready(&self) -> bool {
        self.rows > 0
    }

    /// Takes states of positions from `position` on, `[rows, d]`.
    pub fn take(&mut self, position: usize, states: &[f32], d: usize) {
        let known = self.from + self.rows;
        let skip = known.saturating_sub(position).min(states.len() / d);
        let (position, states) = (position + skip, &states[skip * d..]);
        if position != known {
            // what lies between was read for somebody else: a gap is a worse guess and nothing else
            (self.states, self.from, self.rows) = (Vec::new(), position, 0);
        }
        self.states.extend_from_slice(states);
        self.rows += states.len() / d;
        let over = self.rows.saturating_sub(WINDOW);
        self.states.drain(..over * d);
        (self.from, self.rows) = (self.from + over, self.rows - over);
    }

    /// The states that the module is to read. They count as read, but for the last `again` of them, which it reads with
    /// drafts and, once more, with the tokens that come.
    fn give(&mut self, again: usize) -> Vec<f32> {
        if self.rows == 0 {
            return Vec::new();
        }
        let d = self.states.len() / self.rows;
        let read = self.rows.saturating_sub(again);
        let kept = self.states[read * d..].to_vec();
        (self.from, self.rows) = (self.from + read, self.rows - read);
        std::mem::replace(&mut self.states, kept)
    }

    /// Forgets rows that were made of drafts.
    fn forget_drafts(&mut self) {
        if self.cache.len() > self.sure {
            self.cache.truncate(self.sure);
        }
    }
}
