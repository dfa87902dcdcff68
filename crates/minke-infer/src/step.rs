//! One call of the model: what goes in, drafts included, and what is made of the logits.

use std::time::Instant;

use minke_model::{Inferred, Step, Want};

use crate::choose::{Ask, Choice, Unchosen, choose, log_probs, top};
use crate::constrain::ConstraintError;
use crate::engine::{Engine, EngineError, StopReason};
use crate::guide::{Guide, Mark, Next};
use crate::sampling::Allowed;
use crate::sequence::{Sequence, take_prompts, trace_routes};
use crate::speculate::Source;

/// Calls of more rows say nothing about single tokens and drafts.
const MOST_MEASURED: usize = 128;

/// What a call of the model brought to a sequence.
pub(crate) struct Written {
    /// Its place.
    pub at: usize,
    /// A token of the answer, unless it ended without one, or none could be chosen.
    pub token: Result<Option<Token>, EngineError>,
}

/// A token that was chosen for a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability, before temperature and filters; none where the engine goes without.
    pub log_prob: Option<f32>,
    /// The likeliest tokens at its place and their log-probabilities, as many as
    /// [`crate::Request::top_log_probs`].
    pub top_log_probs: Vec<(u32, f32)>,
    /// The text that is sure now.
    pub text: String,
}

/// A sequence's part of a call.
pub(crate) struct Part {
    pub at: usize,
    /// Tokens that were read before.
    pub from: usize,
    /// Tokens of the sequence.
    pub take: usize,
    /// Whether they are its last.
    pub last: bool,
    /// Tokens that are taken to come behind them, and who says so.
    pub drafts: Vec<u32>,
    pub source: Source,
    /// What a model drafted, with how likely it took that to be: the drafts, and perhaps one more that was not worth a row.
    pub made: Vec<(u32, f32)>,
    /// What may come at each place: in front of each draft, and, once that is known, behind the last.
    pub next: Vec<Result<Next, EngineError>>,
    /// Where the guide stood before it looked ahead.
    pub mark: Option<Mark>,
}

impl Part {
    /// Follows a draft if it is of what may come `next`, and says whether the answer goes on behind it.
    pub fn follow(&mut self, sequence: &mut Sequence, next: Result<Next, EngineError>, id: u32) -> bool {
        let Ok(next) = next else { return false };
        if !next.allowed.has(id) || sequence.request.ends_with(id) {
            return false;
        }
        self.next.push(Ok(next));
        sequence.guide.follow(id);
        self.drafts.push(id);
        !sequence.guide.is_complete()
    }
}

impl Engine<'_> {
    /// One call of the model, which reads the next `takes[i]` tokens of sequence `i` and what is drafted behind them, and
    /// a token or several for each sequence that was read to its end, in order.
    ///
    /// The only way from requests to the model: what is generated for a list and what a service generates for many
    /// callers differ in what they put into a call.
    pub(crate) fn step(&mut self, sequences: &mut [Sequence], takes: &[usize]) -> Vec<Written> {
        let mut parts = self.parts(sequences, takes);
        let begin = Instant::now();
        let Inferred { logits, routes, states } = self.call(sequences, &mut parts);
        if self.traced {
            let read: Vec<(usize, usize)> = parts.iter().map(|part| (part.at, part.take)).collect();
            trace_routes(sequences, &read, &routes);
        }
        // a row for each place that asks for a token
        let rows_of = |part: &Part| if part.last { part.drafts.len() + 1 } else { 0 };
        let mut wanted: Vec<usize> =
            parts.iter().flat_map(|part| std::iter::repeat_n(part.at, rows_of(part))).collect();
        let w = self.model.config.vocab_size;
        let logits = logits.f32();
        let shared = take_prompts(sequences, &mut wanted, logits, w);
        let logits = shared.as_deref().unwrap_or(logits);
        let mut outcomes = self.chosen(sequences, &parts, &wanted, logits);
        let rows: usize = parts.iter().map(|part| part.take + part.drafts.len()).sum();
        if rows <= MOST_MEASURED && parts.iter().all(|part| part.take == 1) {
            self.costs.learn(rows, begin.elapsed());
        }
        let mut written = Vec::with_capacity(wanted.len());
        let mut row = 0;
        while let Some(&at) = wanted.get(row) {
            // the rows of a sequence come one after the other; behind one that is not as drafted they mean nothing
            let rows = wanted[row..].iter().take_while(|other| **other == at).count();
            let part = parts.iter().find(|part| part.at == at && part.last);
            let drafts = part.map_or(&[][..], |part| &part.drafts);
            let sequence = &mut sequences[at];
            let from = sequence.all.len();
            let mut accepted = 0;
            for place in 0..rows {
                let of_row = row + place;
                let (outcome, log_prob) = &mut outcomes[of_row];
                let outcome = std::mem::replace(outcome, Ok(Outcome::Nothing { complete: false }));
                let logits = &logits[of_row * w..(of_row + 1) * w];
                let token = outcome.map(|outcome| self.take(sequence, outcome, *log_prob, logits));
                let id = token.as_ref().ok().and_then(Option::as_ref).map(|token| token.id);
                written.push(Written { at, token });
                if id.is_none() || sequence.stop.is_some() || id != drafts.get(place).copied() {
                    break;
                }
                accepted += 1;
            }
            let (source, made) = part.map_or((Source::Text, &[][..]), |part| (part.source, &part.made));
            sequence.drafting.learn(source, drafts, made, &sequence.all[from..]);
            sequence.session.truncate(sequence.session.len() - (drafts.len() - accepted));
            row += rows;
        }
        hand_states(sequences, &parts, &states, self.model.config.hidden_size);
        written
    }

    /// Takes what was chosen from a row of logits into its sequence; the token that ends an answer is no part of it.
    fn take(
        &self,
        sequence: &mut Sequence,
        outcome: Outcome,
        log_prob: Option<f32>,
        row: &[f32],
    ) -> Option<Token> {
        let choice = match outcome {
            Outcome::Token(choice) => choice,
            Outcome::Nothing { complete } => {
                sequence.stop = Some(if complete { StopReason::Complete } else { StopReason::DeadEnd });
                return None;
            }
        };
        if self.traced {
            sequence.trace.tokens.push(choice.id);
            sequence.trace.log_probs.push(choice.log_prob);
            sequence.trace.kept.push(choice.kept);
        }
        let text = sequence.take(choice.id, log_prob, self.context);
        if matches!(sequence.stop, Some(StopReason::Token(_))) {
            return None;
        }
        let n = sequence.request.top_log_probs;
        let top_log_probs = if n > 0 { top(self.cpu, row, n) } else { Vec::new() };
        if n > 0 {
            sequence.top_log_probs.push(top_log_probs.clone());
        }
        Some(Token { id: choice.id, log_prob, top_log_probs, text })
    }

    /// What each sequence has in the next call.
    pub(crate) fn parts(&mut self, sequences: &mut [Sequence], takes: &[usize]) -> Vec<Part> {
        let part = |(at, (sequence, &take)): (usize, (&Sequence, &usize))| Part {
            at,
            from: sequence.session.len(),
            take,
            last: take == sequence.unread(),
            drafts: Vec::new(),
            source: Source::Text,
            made: Vec::new(),
            next: Vec::new(),
            mark: None,
        };
        let all = sequences.iter().zip(takes).enumerate().filter(|(_, (_, take))| **take > 0);
        let mut parts: Vec<Part> = all.map(part).collect();
        if !self.traced {
            self.speculate(sequences, &mut parts);
        }
        parts
    }

    /// The call, and beside it what may come behind the last rows.
    fn call(&mut self, sequences: &mut [Sequence], parts: &mut [Part]) -> Inferred {
        let fed: Vec<Vec<u32>> = parts
            .iter()
            .map(|part| {
                let sequence = &mut sequences[part.at];
                let from = sequence.session.tokens.len();
                let tokens = [&sequence.all[from..from + part.take], &part.drafts].concat();
                sequence.session.tokens.extend_from_slice(&tokens);
                tokens
            })
            .collect();
        let mut steps = Vec::with_capacity(parts.len());
        // parts are in the order of sequences
        let mut mine = parts.iter_mut().zip(&fed).peekable();
        let mut guides: Vec<(&mut Guide, &mut Part)> = Vec::new();
        let mut states = false;
        for (at, sequence) in sequences.iter_mut().enumerate() {
            let Some((part, tokens)) = mine.next_if(|(part, _)| part.at == at) else { continue };
            let want = match (part.last, part.drafts.len()) {
                (false, _) => Want::None,
                (true, 0) => Want::Last,
                (true, _) => Want::All,
            };
            states |= !sequence.drafting.modules.is_empty();
            steps.push(Step { tokens, cache: &mut sequence.session.cache, want });
            if part.last {
                guides.push((&mut sequence.guide, part));
            }
        }
        let follow = |guides: Vec<(&mut Guide, &mut Part)>| {
            for (guide, part) in guides {
                part.next.push(guide.next());
                if let Some(mark) = part.mark.take() {
                    guide.rewind(mark);
                }
            }
        };
        let (work, others): (Vec<_>, Vec<_>) =
            guides.into_iter().partition(|(guide, _)| guide.is_constrained());
        follow(others);
        let (model, cpu) = (&mut *self.model, self.cpu);
        if work.is_empty() {
            return model.infer_whole(cpu, &mut steps, states);
        }
        std::thread::scope(|scope| {
            // masks take time that the model's call takes anyway; who gets none is told so in `chosen`
            let beside = std::thread::Builder::new().spawn_scoped(scope, move || follow(work));
            let inferred = model.infer_whole(cpu, &mut steps, states);
            if let Ok(beside) = beside {
                let _ = beside.join();
            }
            inferred
        })
    }

    /// What comes at each of the wanted rows, and with which log-probability.
    fn chosen(
        &mut self,
        sequences: &mut [Sequence],
        parts: &[Part],
        wanted: &[usize],
        logits: &[f32],
    ) -> Vec<(Result<Outcome, EngineError>, Option<f32>)> {
        let w = self.model.config.vocab_size;
        let mut places: Vec<(Result<Next, EngineError>, &[u32])> = Vec::with_capacity(wanted.len());
        for (row, &at) in wanted.iter().enumerate() {
            let place = wanted[..row].iter().rev().take_while(|other| **other == at).count();
            places.push(match parts.iter().find(|part| part.at == at && part.last) {
                Some(part) => {
                    let next = part.next.get(place).cloned();
                    (next.unwrap_or_else(|| Err(ConstraintError::NoThread.into())), &part.drafts[..place])
                }
                // had another read its prompt
                None => (sequences[at].guide.next(), &[]),
            });
        }
        let asks: Vec<Ask<'_>> = wanted
            .iter()
            .zip(&places)
            .map(|(&at, (next, ahead))| {
                let allowed = next.as_ref().map_or(Allowed::All, |next| next.allowed.clone());
                sequences[at].ask(allowed, ahead)
            })
            .collect();
        let choices = choose(self.cpu, &self.sampler, &asks, logits, w);
        let told = self.log_probs.then(|| log_probs(self.cpu, logits, w, &choices));
        let positions: Vec<usize> = asks.iter().map(|ask| ask.position).collect();
        let rows = choices.into_iter().zip(places).zip(positions).enumerate();
        let outcome = |(row, ((choice, (next, _)), position))| {
            let next: Result<Next, EngineError> = next;
            let outcome = next.and_then(|next| match choice {
                Ok(choice) => Ok(Outcome::Token(choice)),
                Err(Unchosen::Nothing) => Ok(Outcome::Nothing { complete: next.may_end }),
                Err(Unchosen::NotANumber) => Err(EngineError::NotANumber { position }),
            });
            (outcome, told.as_ref().map(|told: &Vec<f32>| told[row]))
        };
        rows.map(outcome).collect()
    }
}

/// What a row of logits came to.
enum Outcome {
    Token(Choice),
    /// Nothing may come, be it that the answer is complete.
    Nothing {
        complete: bool,
    },
}

/// Hands the final states of rows that stay to the first modules, which draft from them; `states` are of all rows of a
/// call.
fn hand_states(sequences: &mut [Sequence], parts: &[Part], states: &[f32], d: usize) {
    let mut rest = states;
    for part in parts.iter().filter(|_| !states.is_empty()) {
        let rows = part.take + part.drafts.len();
        let (own, others) = rest.split_at(rows * d);
        rest = others;
        let sequence = &mut sequences[part.at];
        let read = sequence.session.len();
        if let Some(module) = sequence.drafting.modules.first_mut() {
            // where the call began; drafts that did not come are out of the session again
            let from = part.from;
            module.take(from, &own[..(read - from) * d], d);
        }
    }
}
