//! What a request lets come next, followed token by token beside its sequence.

use std::sync::Arc;

use minke_data::Tokenizer;

use crate::choose::Ask;
use crate::constrain::{ConstraintError, Grammar};
use crate::engine::{EngineError, Request};
use crate::penalties::History;
use crate::sampling::{Allowed, SettingError};
use crate::thinking::{Thinking, Thought};

/// A bias that forbids a token.
pub(crate) const BAN: f32 = -100.0;
/// The most tokens whose log-probabilities are given at each place.
const MAX_TOP_LOG_PROBS: usize = 128;

/// A request's say in its tokens, beside the model's.
#[derive(Debug)]
pub(crate) struct Guide {
    /// Where penalties are on.
    history: Option<History>,
    /// What is added to logits, without what forbids.
    bias: Vec<(u32, f32)>,
    /// What never comes, and what does not behind a thought that was ended for the model.
    banned: Banned,
    banned_unthinking: Banned,
    min_tokens: usize,
    tokens: usize,
    thinking: Option<Thinking>,
    grammar: Option<Grammar>,
    /// Whether the grammar waits for the end of a thought.
    waits: bool,
    /// Begins a thought if it is the first token, for which the grammar then waits.
    opening: Option<u32>,
    stop_ids: Vec<u32>,
    more_stop_ids: Vec<u32>,
    /// Why the grammar cannot be followed any more.
    failure: Option<ConstraintError>,
    tokenizer: Option<Tokenizer>,
}

/// Tokens that do not come, ascending; with them the model's own ends, for as long as a form waits; and with those the
/// other stop tokens, for as long as there are too few tokens.
#[derive(Debug, Clone)]
struct Banned {
    always: Arc<[u32]>,
    waiting: Arc<[u32]>,
    early: Arc<[u32]>,
}

impl Banned {
    fn new(request: &Request, marks: &[u32]) -> Self {
        let bans = request.logit_bias.iter().filter(|(_, bias)| *bias <= BAN).map(|(id, _)| *id);
        let always: Vec<u32> = bans.chain(marks.iter().copied()).collect();
        let waiting = [&always[..], &request.stop_ids].concat();
        let early = [&waiting[..], &request.more_stop_ids].concat();
        let ascending = |mut ids: Vec<u32>| -> Arc<[u32]> {
            ids.sort_unstable();
            ids.dedup();
            ids.into()
        };
        Self { always: ascending(always), waiting: ascending(waiting), early: ascending(early) }
    }
}

/// Where a guide stood.
#[derive(Debug)]
pub(crate) struct Mark {
    tokens: usize,
    thinking: Option<Thinking>,
    grammar: usize,
    waits: bool,
    failed: bool,
}

/// What may come next.
#[derive(Debug, Clone)]
pub(crate) struct Next {
    pub allowed: Allowed,
    /// Whether a grammar would let the answer end here.
    pub may_end: bool,
}

impl Guide {
    /// The guide of a request that has its prompt only; `grammar` is its constraint, compiled.
    ///
    /// # Errors
    /// A setting that is out of its bounds, or cannot be kept without a tokenizer.
    pub fn new(
        request: &Request,
        grammar: Option<Grammar>,
        tokenizer: Option<&Tokenizer>,
        vocabulary: usize,
    ) -> Result<Self, EngineError> {
        check(request, vocabulary)?;
        let bias = request.logit_bias.iter().copied().filter(|(_, bias)| *bias > BAN).collect();
        let history = request.sampling.has_penalties().then(|| History::new(&request.prompt));
        let thinking = request
            .thinking
            .as_ref()
            .map(|budget| Thinking::new(budget, tokenizer, &request.prompt, grammar.is_some()))
            .transpose()?;
        let free = thinking.as_ref().filter(|_| grammar.is_some() && request.constrain_answer_only);
        let waits = free.is_some_and(Thinking::is_open);
        let has_mark = match (&request.constraint, &request.thinking) {
            (Some(constraint), Some(budget)) => constraint.names(budget.open.trim()),
            _ => false,
        };
        let opening = free.filter(|_| !has_mark).and_then(Thinking::opening);
        Ok(Self {
            history,
            bias,
            banned: Banned::new(request, &[]),
            banned_unthinking: Banned::new(request, thinking.as_ref().map_or(&[], Thinking::marks)),
            min_tokens: request.min_tokens,
            tokens: 0,
            thinking,
            grammar,
            waits,
            opening,
            stop_ids: request.stop_ids.clone(),
            more_stop_ids: request.more_stop_ids.clone(),
            failure: None,
            tokenizer: tokenizer.cloned(),
        })
    }

    /// Whether asking what may come next is work.
    pub fn is_constrained(&self) -> bool {
        self.grammar.is_some()
    }

    /// Whether the answer follows a grammar by now: marks of a thought are then text as any other.
    fn has_form(&self) -> bool {
        self.grammar.is_some() && !self.waits
    }

    /// What may come next.
    ///
    /// # Errors
    /// The grammar cannot be followed any more.
    pub fn next(&mut self) -> Result<Next, EngineError> {
        let thinking = self.thinking.as_ref().filter(|_| !self.has_form());
        if let Some(id) = thinking.and_then(Thinking::forced) {
            return Ok(Next { allowed: Allowed::Only([id].into()), may_end: false });
        }
        let unthinking = thinking.is_some_and(Thinking::forbids_marks);
        let banned = if unthinking { &self.banned_unthinking } else { &self.banned };
        let banned = if self.tokens < self.min_tokens {
            &banned.early
        } else if self.waits {
            // an answer that ends within its thought has no form
            &banned.waiting
        } else {
            &banned.always
        };
        let Some(grammar) = self.grammar.as_mut().filter(|_| !self.waits) else {
            let allowed = if banned.is_empty() { Allowed::All } else { Allowed::Except(banned.clone()) };
            return Ok(Next { allowed, may_end: false });
        };
        if let Some(failure) = &self.failure {
            return Err(failure.clone().into());
        }
        let (mut ids, may_end) = grammar.allowed()?;
        // what ends an answer is not the grammar's to allow but here
        ids.retain(|id| !self.stop_ids.contains(id));
        if may_end {
            ids.extend(self.stop_ids.iter().chain(&self.more_stop_ids));
        }
        if self.tokens == 0 && !ids.is_empty() {
            ids.extend(self.opening);
        }
        ids.sort_unstable();
        ids.dedup();
        ids.retain(|id| banned.binary_search(id).is_err());
        Ok(Next { allowed: Allowed::Only(ids.into()), may_end })
    }

    /// Whether the answer is complete as far as its grammar goes: nothing may follow, or nothing but its end.
    pub fn is_complete(&self) -> bool {
        !self.waits && self.grammar.as_ref().is_some_and(Grammar::is_complete)
    }

    /// Whether the answer may end here as far as its grammar goes, where there is one.
    pub fn may_end(&mut self) -> Option<bool> {
        self.grammar.as_mut().map(|grammar| !self.waits && grammar.may_end())
    }

    /// Takes a token of the answer that does not end it.
    pub fn push(&mut self, id: u32) {
        if let Some(history) = &mut self.history {
            history.push(id);
        }
        self.follow(id);
    }

    /// Follows a token that comes or, before [`Guide::rewind`], is only taken to come: penalties hear of the latter by
    /// [`Ask::ahead`].
    pub fn follow(&mut self, id: u32) {
        self.waits |= self.tokens == 0 && self.opening == Some(id);
        self.tokens += 1;
        if let (Some(grammar), false) = (&mut self.grammar, self.waits) {
            self.failure = self.failure.take().or(grammar.push(id).err());
        } else if let (Some(thinking), Some(tokenizer)) = (&mut self.thinking, &self.tokenizer) {
            thinking.push(id, tokenizer);
            self.waits &= thinking.is_open();
        }
    }

    /// Where it stands.
    pub fn mark(&self) -> Mark {
        Mark {
            tokens: self.tokens,
            thinking: self.thinking.clone(),
            grammar: self.grammar.as_ref().map_or(0, Grammar::len),
            waits: self.waits,
            failed: self.failure.is_some(),
        }
    }

    /// Goes back to where it stood before tokens that were only taken to come.
    pub fn rewind(&mut self, mark: Mark) {
        if !mark.failed {
            self.failure = None;
        }
        if let Some(grammar) = &mut self.grammar {
            self.failure = self.failure.take().or(grammar.truncate(mark.grammar).err());
        }
        (self.tokens, self.thinking, self.waits) = (mark.tokens, mark.thinking, mark.waits);
    }

    /// Tokens that must come next, as far as that is known without the model.
    pub fn forced_ahead(&mut self) -> Vec<u32> {
        match (&self.thinking, &mut self.grammar) {
            (_, Some(grammar)) if !self.waits => {
                if self.failure.is_none() {
                    grammar.forced_ahead()
                } else {
                    Vec::new()
                }
            }
            (Some(thinking), _) => thinking.forced_ahead().to_vec(),
            _ => Vec::new(),
        }
    }

    /// Asks for the token behind `ahead` of a sequence that has `tokens` before that.
    pub fn ask<'a>(
        &'a self,
        request: &'a Request,
        allowed: Allowed,
        tokens: usize,
        ahead: &'a [u32],
    ) -> Ask<'a> {
        Ask {
            sampling: &request.sampling,
            bias: &self.bias,
            history: self.history.as_ref(),
            ahead,
            allowed,
            sequence: request.sequence,
            position: tokens + ahead.len(),
        }
    }

    /// What was spent on thinking, where there is a budget.
    pub fn thought(&self) -> Option<Thought> {
        self.thinking.as_ref().map(Thinking::thought)
    }
}

/// Checks the bounds of what a request says about its tokens.
fn check(request: &Request, vocabulary: usize) -> Result<(), SettingError> {
    let fail = |name, expected, got: String| Err(SettingError { name, expected, got });
    request.sampling.validate()?;
    for &(id, bias) in &request.logit_bias {
        if id as usize >= vocabulary {
            return fail("logit bias", "ids of the model's vocabulary", format!("id {id} of {vocabulary}"));
        }
        if !(-100.0..=100.0).contains(&bias) {
            return fail(
                "logit bias",
                "a number from -100, which forbids, to 100",
                format!("{bias} for id {id}"),
            );
        }
    }
    if request.min_tokens > request.max_tokens {
        let got = format!("{} of at most {}", request.min_tokens, request.max_tokens);
        return fail("min tokens", "no more than the most tokens", got);
    }
    if request.top_log_probs > MAX_TOP_LOG_PROBS {
        return fail("top log-probabilities", "at most 128", request.top_log_probs.to_string());
    }
    Ok(())
}
