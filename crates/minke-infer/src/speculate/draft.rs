//! Drafting for the sequences of a call: who drafts for each, and the drafts of models, for all of them together.

use std::time::Instant;

use minke_data::Tokenizer;
use minke_model::{CacheKind, DraftCache, DraftStep, Model, PAGE, Step, Want};

use super::{Chain, MOST, Module, Proposal, Source};
use crate::choose::{Ask, choose, log_probs};
use crate::engine::Engine;
use crate::sampling::Allowed;
use crate::sequence::{Sequence, Session};
use crate::step::Part;

/// Tokens that the other model reads in a call of the engine before it drafts: answers do not wait for long prompts.
const TOKENS_PER_CALL: usize = 512;

/// Where the next drafts of a sequence come from while a model makes them.
struct Guess {
    /// Which part of the call.
    part: usize,
    chain: Chain,
    /// States that a module made for the next one with drafts, or, the last one, for its own next row.
    states: Vec<f32>,
}

impl Engine<'_> {
    /// The most tokens that may be drafted behind the next `take` of a sequence.
    pub(crate) fn most_drafts(&self, sequence: &Sequence, take: usize) -> usize {
        let answering = take == 1 && sequence.unread() == 1 && sequence.tokens() > 0;
        if self.traced || !answering || !sequence.drafting.is_on() {
            return 0;
        }
        // a call gives one token more than there are drafts
        let room = self.context.saturating_sub(sequence.all.len() + 1);
        let asked = sequence.request.max_tokens.saturating_sub(sequence.tokens() + 1);
        MOST.min(room).min(asked)
    }

    /// The most memory that drafting by models takes for a sequence that has got `more` tokens, beside its own cache.
    pub(crate) fn draft_bytes(&self, sequence: &Sequence, more: usize) -> usize {
        let modules = DraftCache::page_bytes(self.model);
        let other = self.other.as_ref();
        let other =
            other.map(|other| CacheKind::Model.page_bytes(&other.config, &other.precision).unwrap_or(0));
        (sequence.all.len() + more + MOST).div_ceil(PAGE) * sequence.drafting.page_bytes(modules, other)
    }

    /// Drafts for every sequence that is being answered, where it pays.
    pub(crate) fn speculate(&mut self, sequences: &mut [Sequence], parts: &mut [Part]) {
        let tokens = parts.iter().filter(|part| part.last).count();
        let has_other = self.other.is_some();
        let (mut by_modules, mut by_other) = (Vec::new(), Vec::new());
        for (index, part) in parts.iter_mut().enumerate() {
            let sequence = &mut sequences[part.at];
            if sequence.drafting.is_on() {
                sequence.drafting.begin(self.model);
            }
            let most = self.most_drafts(sequence, part.take);
            if most == 0 {
                continue;
            }
            let forced = sequence.guide.forced_ahead();
            let drafting = &mut sequence.drafting;
            match drafting.propose(&sequence.all, &forced, most, tokens, &self.costs, has_other) {
                Proposal::Nothing => {}
                Proposal::Tokens(source, ids) => {
                    part.source = source;
                    part.mark = Some(sequence.guide.mark());
                    for id in ids {
                        let next = sequence.guide.next();
                        if !part.follow(sequence, next, id) {
                            break;
                        }
                    }
                }
                Proposal::Model(chain) => {
                    let to = if drafting.by_other(has_other) { &mut by_other } else { &mut by_modules };
                    part.source = Source::Model;
                    part.mark = Some(sequence.guide.mark());
                    to.push(Guess { part: index, chain, states: Vec::new() });
                }
            }
        }
        if !by_modules.is_empty() {
            self.draft_by_modules(sequences, parts, by_modules);
        }
        if !by_other.is_empty() {
            self.draft_by_other(sequences, parts, by_other);
        }
    }

    /// The model's prediction modules read what they have not seen, each with a token more drafted than the one before,
    /// and the last goes on from its own states.
    fn draft_by_modules(&mut self, sequences: &mut [Sequence], parts: &mut [Part], mut guesses: Vec<Guess>) {
        let (begin, d) = (Instant::now(), self.model.config.hidden_size);
        let last = self.model.config.num_nextn_predict_layers - 1;
        let mut drafted = 0;
        for round in 0.. {
            let k = round.min(last);
            // rows of each, and where their tokens begin
            let mut rows: Vec<(Vec<f32>, Vec<u32>, usize)> = Vec::with_capacity(guesses.len());
            for guess in &mut guesses {
                let part = &parts[guess.part];
                let Sequence { drafting, all, .. } = &mut sequences[part.at];
                // behind the first module, the last state is read with a draft, and again with the token that comes
                let mut states = if round == k { drafting.modules[k].give(k.min(1)) } else { Vec::new() };
                states.append(&mut guess.states);
                let position = all.len() + part.drafts.len() - states.len() / d;
                let tokens = all.iter().chain(&part.drafts).skip(position).copied().collect();
                rows.push((states, tokens, position));
            }
            let mut steps = Vec::with_capacity(guesses.len());
            let mut mine = guesses.iter().zip(&rows).peekable();
            // guesses are in the order of sequences
            for (at, sequence) in sequences.iter_mut().enumerate() {
                if let Some((_, (states, tokens, position))) =
                    mine.next_if(|(guess, _)| parts[guess.part].at == at)
                {
                    let cache = &mut sequence.drafting.modules[k].cache;
                    steps.push(DraftStep { states, tokens, position: *position, cache });
                }
            }
            let made = self.model.draft(self.cpu, k, &mut steps);
            let mut rest = &made.states[..];
            for (guess, (_, tokens, position)) in guesses.iter_mut().zip(&rows) {
                let (states, others) = rest.split_at(tokens.len() * d);
                rest = others;
                let modules = &mut sequences[parts[guess.part].at].drafting.modules;
                // so many tokens of this round are drafts
                let of_drafts = k.min(tokens.len());
                if round == k {
                    modules[k].sure = modules[k].cache.len() - of_drafts;
                }
                if let Some(next) = modules.get_mut(k + 1) {
                    let (sure, guessed) = states.split_at(states.len() - of_drafts * d);
                    next.take(position - (k + 1), sure, d);
                    guess.states = guessed.to_vec();
                } else {
                    guess.states = states[states.len() - d..].to_vec();
                }
            }
            drafted += guesses.len();
            let w = self.model.config.vocab_size;
            self.draw_drafts(sequences, parts, &mut guesses, made.logits.f32(), w);
            if guesses.is_empty() {
                break;
            }
        }
        // what they read of drafts is not what they will read
        sequences.iter_mut().flat_map(|one| &mut one.drafting.modules).for_each(Module::forget_drafts);
        self.costs.learn_draft(drafted, begin.elapsed());
    }

    /// The other model reads what it has not seen of each sequence, and then its own drafts.
    fn draft_by_other(&mut self, sequences: &mut [Sequence], parts: &mut [Part], mut guesses: Vec<Guess>) {
        let Some(other) = self.other.take() else { return };
        let w = other.config.vocab_size;
        let limit = other.config.max_position_embeddings;
        guesses.retain(|guess| {
            let sequence = &mut sequences[parts[guess.part].at];
            let fits = sequence.all.len() + guess.chain.most() < limit
                && sequence.all.iter().all(|&id| (id as usize) < w);
            if fits {
                let session = sequence.drafting.other.get_or_insert_with(|| Session::new(other));
                session.reuse(&sequence.all);
            }
            fits
        });
        let (mut begin, mut drafted) = (None, 0);
        while !guesses.is_empty() {
            let logits = self.read_by_other(other, sequences, parts, &mut guesses);
            match begin {
                // what was read of a prompt says nothing about drafting
                None => begin = Some(Instant::now()),
                Some(_) => drafted += guesses.len(),
            }
            self.draw_drafts(sequences, parts, &mut guesses, &logits, w);
        }
        if let Some(begin) = begin.filter(|_| drafted > 0) {
            self.costs.learn_draft(drafted, begin.elapsed());
        }
        self.other = Some(other);
    }

    /// Lets the other model read on, as much as a call holds, and gives the logits behind the last draft of each guess.
    /// Those that it has not read to their ends, as behind a long prompt, are dropped: nobody waits for them, and the next
    /// call of the engine goes on.
    fn read_by_other(
        &self,
        other: &mut Model,
        sequences: &mut [Sequence],
        parts: &[Part],
        guesses: &mut Vec<Guess>,
    ) -> Vec<f32> {
        let mut room = TOKENS_PER_CALL;
        let mut unread: Vec<(usize, Vec<u32>, Want)> = Vec::with_capacity(guesses.len());
        guesses.retain(|guess| {
            let part = &parts[guess.part];
            let sequence = &mut sequences[part.at];
            let session = sequence.drafting.other.as_mut().expect("was made before");
            let whole = [&sequence.all[..], &part.drafts].concat();
            let left = whole.len() - session.tokens.len();
            let take = left.min(room);
            room -= take;
            if take > 0 {
                let tokens = whole[session.tokens.len()..][..take].to_vec();
                session.tokens.extend_from_slice(&tokens);
                unread.push((part.at, tokens, if take == left { Want::Last } else { Want::None }));
            }
            take == left
        });
        let mut steps = Vec::with_capacity(unread.len());
        let mut unread = unread.iter().peekable();
        // guesses are in the order of sequences
        for (at, sequence) in sequences.iter_mut().enumerate() {
            if let Some((_, tokens, want)) = unread.next_if(|(next, ..)| *next == at) {
                let session = sequence.drafting.other.as_mut().expect("was made before");
                steps.push(Step { tokens, cache: &mut session.cache, want: *want });
            }
        }
        other.infer(self.cpu, &mut steps)
    }

    /// Draws a draft for each guess from its row of logits, as the token itself will be drawn; those whose draft may not
    /// come or is not worth its row, and those that have enough, are done.
    fn draw_drafts(
        &mut self,
        sequences: &mut [Sequence],
        parts: &mut [Part],
        guesses: &mut Vec<Guess>,
        logits: &[f32],
        w: usize,
    ) {
        let next: Vec<_> = guesses.iter().map(|guess| sequences[parts[guess.part].at].guide.next()).collect();
        let asks: Vec<Ask<'_>> = guesses
            .iter()
            .zip(&next)
            .map(|(guess, next)| {
                let part = &parts[guess.part];
                let allowed = next.as_ref().map_or(Allowed::All, |next| next.allowed.clone());
                sequences[part.at].ask(allowed, &part.drafts)
            })
            .collect();
        let choices = choose(self.cpu, &self.sampler, &asks, logits, w);
        let log_probs = log_probs(self.cpu, logits, w, &choices);
        let rows = self.model.config.vocab_size;
        let mut drawn = choices.into_iter().zip(log_probs).zip(next);
        guesses.retain_mut(|guess| {
            let part = &mut parts[guess.part];
            let Some(((Ok(choice), log_prob), next)) = drawn.next() else { return false };
            let sequence = &mut sequences[part.at];
            let sure = log_prob.exp();
            part.made.push((choice.id, sure));
            (choice.id as usize) < rows
                && guess.chain.takes(sequence.drafting.trust(sure))
                && part.follow(sequence, next, choice.id)
                && guess.chain.goes_on()
        });
    }
}

/// Whether ids mean the same in both.
///
/// # Errors
/// The first difference.
pub(crate) fn same_vocabulary(ours: &Tokenizer, theirs: &Tokenizer) -> Result<(), String> {
    if ours.vocab_size() != theirs.vocab_size() {
        return Err(format!("expected {} tokens, got {}", ours.vocab_size(), theirs.vocab_size()));
    }
    for id in 0..ours.vocab_size() as u32 {
        let [a, b] = [ours, theirs].map(|tokenizer| tokenizer.token_of(id).unwrap_or_default());
        if a != b {
            return Err(format!("token {id}: expected `{a}`, got `{b}`"));
        }
    }
    Ok(())
}
