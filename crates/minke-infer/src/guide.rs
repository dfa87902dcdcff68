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
    /// What never comes, ascending; and beside it the stop tokens, for as long as there are too few others.
    banned: Arc<[u32]>,
    banned_early: Arc<[u32]>,
    min_tokens: usize,
    tokens: usize,
    thinking: Option<Thinking>,
    grammar: Option<Grammar>,
    /// Whether the grammar waits for the end of a thought.
    waits: bool,
    /// Whether the answer may end here for the grammar's part, as it was last asked.
    may_end: bool,
    stop_ids: Vec<u32>,
    /// Why the grammar cannot be followed any more.
    failure: Option<ConstraintError>,
    tokenizer: Option<Tokenizer>,
}

/// Where a guide stood.
#[derive(Debug)]
pub(crate) struct Mark {
    tokens: usize,
    thinking: Option<Thinking>,
    grammar: usize,
    waits: bool,
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
        let ascending = |mut ids: Vec<u32>| -> Arc<[u32]> {
            ids.sort_unstable();
            ids.dedup();
            ids.into()
        };
        let (bans, bias): (Vec<_>, Vec<_>) =
            request.logit_bias.iter().copied().partition(|(_, bias)| *bias <= BAN);
        let bans: Vec<u32> = bans.into_iter().map(|(id, _)| id).collect();
        let early = bans.iter().chain(&request.stop_ids).copied().collect();
        let history = request.sampling.has_penalties().then(|| History::new(&request.prompt));
        let thinking = request
            .thinking
            .as_ref()
            .map(|budget| Thinking::new(budget, tokenizer, &request.prompt, grammar.is_some()))
            .transpose()?;
        let waits = grammar.is_some()
            && request.constrain_answer_only
            && thinking.as_ref().is_some_and(Thinking::is_open);
        Ok(Self {
            history,
            bias,
            banned: ascending(bans),
            banned_early: ascending(early),
            min_tokens: request.min_tokens,
            tokens: 0,
            thinking,
            grammar,
            waits,
            may_end: true,
            stop_ids: request.stop_ids.clone(),
            failure: None,
            tokenizer: tokenizer.cloned(),
        })
    }

    /// Whether asking what may come next is work.
    pub fn is_constrained(&self) -> bool {
        self.grammar.is_some()
    }

    /// What may come next.
    ///
    /// # Errors
    /// The grammar cannot be followed any more.
    pub fn allowed(&mut self) -> Result<Allowed, EngineError> {
        if let Some(id) = self.thinking.as_ref().and_then(Thinking::forced) {
            return Ok(Allowed::Only([id].into()));
        }
        let banned = if self.tokens < self.min_tokens { &self.banned_early } else { &self.banned };
        let Some(grammar) = self.grammar.as_mut().filter(|_| !self.waits) else {
            return Ok(if banned.is_empty() { Allowed::All } else { Allowed::Except(banned.clone()) });
        };
        if let Some(failure) = &self.failure {
            return Err(failure.clone().into());
        }
        let (mut ids, may_end) = grammar.allowed()?;
        self.may_end = may_end;
        // what ends an answer is not the grammar's to allow but here
        ids.retain(|id| !self.stop_ids.contains(id));
        if may_end {
            ids.extend(&self.stop_ids);
            ids.sort_unstable();
            ids.dedup();
        }
        ids.retain(|id| banned.binary_search(id).is_err());
        Ok(Allowed::Only(ids.into()))
    }

    /// Whether the answer is complete as far as its grammar goes: nothing may follow, or nothing but its end.
    pub fn is_complete(&self) -> bool {
        !self.waits && self.grammar.as_ref().is_some_and(Grammar::is_complete)
    }

    /// Whether the grammar lets the answer end where [`Guide::allowed`] was last asked.
    pub fn may_end(&self) -> bool {
        self.grammar.is_some() && !self.waits && self.may_end
    }

    /// Takes a token of the answer that does not end it.
    pub fn push(&mut self, id: u32) {
        self.tokens += 1;
        if let Some(history) = &mut self.history {
            history.push(id);
        }
        if let (Some(grammar), false) = (&mut self.grammar, self.waits) {
            self.failure = self.failure.take().or(grammar.push(id).err());
        }
        if let (Some(thinking), Some(tokenizer)) = (&mut self.thinking, &self.tokenizer) {
            thinking.push(id, tokenizer);
            self.waits &= thinking.is_open();
        }
    }

    /// Asks for the next token of a sequence of so many tokens.
    pub fn ask<'a>(&'a self, request: &'a Request, allowed: Allowed, position: usize) -> Ask<'a> {
        Ask {
            sampling: &request.sampling,
            bias: &self.bias,
            history: self.history.as_ref(),
            ahead: &[],
            allowed,
            sequence: request.sequence,
            position,
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
