//! What a request lets come next, followed token by token beside its sequence.

use std::sync::Arc;

use minke_data::Tokenizer;

use crate::choose::Ask;
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
    tokenizer: Option<Tokenizer>,
}

impl Guide {
    /// The guide of a request that has its prompt only.
    ///
    /// # Errors
    /// A setting that is out of its bounds, or cannot be kept without a tokenizer.
    pub fn new(
        request: &Request,
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
            .map(|budget| Thinking::new(budget, tokenizer, &request.prompt, false))
            .transpose()?;
        Ok(Self {
            history,
            bias,
            banned: ascending(bans),
            banned_early: ascending(early),
            min_tokens: request.min_tokens,
            tokens: 0,
            thinking,
            tokenizer: tokenizer.cloned(),
        })
    }

    /// What may come next.
    pub fn allowed(&mut self) -> Allowed {
        if let Some(id) = self.thinking.as_ref().and_then(Thinking::forced) {
            return Allowed::Only([id].into());
        }
        let banned = if self.tokens < self.min_tokens { &self.banned_early } else { &self.banned };
        if banned.is_empty() { Allowed::All } else { Allowed::Except(banned.clone()) }
    }

    /// Takes a token of the answer.
    pub fn push(&mut self, id: u32) {
        self.tokens += 1;
        if let Some(history) = &mut self.history {
            history.push(id);
        }
        if let (Some(thinking), Some(tokenizer)) = (&mut self.thinking, &self.tokenizer) {
            thinking.push(id, tokenizer);
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
