//! Groups of answers, sampled by the engine that trains, and graded.

use std::ops::ControlFlow;
use std::time::Instant;

use minke_gym::{Task, Verdict};
use minke_infer::{Engine, Generation, Request, Sampling, StopReason};
use minke_model::{IGNORE, MtpTargets, PolicyBatch, Segment, TrainBatch};
use serde::Serialize;

use super::reward::{Grade, Reward};
use crate::error::Result;
use crate::eval::Prompter;
use crate::metrics::Values;
use crate::session::Workshop;

/// How answers are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RolloutSettings {
    /// Prompts of a step.
    pub prompts: usize,
    /// Answers to each.
    pub group: usize,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Spread of the choice.
    pub temperature: f32,
    /// Choose among the likeliest tokens that reach this share together; 1 for all.
    pub top_p: f32,
    /// Choose among the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Answers that are written at once, at most.
    pub concurrency: usize,
    /// More rounds of prompts in a step while groups without signal leave it short; none where signal is not asked
    /// for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resample: Option<usize>,
}

/// An answer, graded.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The tokens that it was given.
    pub prompt: Vec<u32>,
    /// How it was sampled, and what.
    pub generation: Generation,
    /// What it is worth.
    pub grade: Grade,
}

impl Answer {
    /// Tokens that were sampled.
    pub fn len(&self) -> usize {
        self.generation.trace.tokens.len()
    }

    /// Whether nothing was sampled.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of the thought: those before the one that closes it, all where none does.
    pub fn thought(&self, close: Option<u32>) -> usize {
        let tokens = &self.generation.trace.tokens;
        tokens.iter().position(|&id| Some(id) == close).unwrap_or(tokens.len())
    }

    /// Whether the model ended it by itself.
    pub fn ended(&self) -> bool {
        matches!(self.generation.stop, StopReason::Token(_) | StopReason::String(_))
    }
}

/// The answers to one task.
#[derive(Debug, Clone)]
pub struct Group {
    /// Where the task comes from in the curriculum.
    pub cell: usize,
    /// The task.
    pub task: Task,
    /// Its answers.
    pub answers: Vec<Answer>,
}

impl Group {
    /// Answers whose verifier gave a verdict.
    pub fn judged(&self) -> impl Iterator<Item = &Answer> {
        self.answers.iter().filter(|answer| answer.grade.reward.is_some())
    }

    /// The share of right answers among those that were judged; none when none was.
    pub fn share(&self) -> Option<f64> {
        let (all, right) = self.judged().fold((0, 0), |(n, r), a| (n + 1, r + usize::from(a.grade.right)));
        (all > 0).then(|| f64::from(right as u32) / f64::from(all))
    }

    /// Whether some answers are worth more than others.
    pub fn has_signal(&self) -> bool {
        let mut rewards = self.judged().filter_map(|answer| answer.grade.reward);
        let first = rewards.next();
        rewards.any(|reward| Some(reward) != first)
    }
}

/// Samples and grades groups for tasks; `first` numbers their sequences, whose draws are named by it.
///
/// # Errors
/// A prompt that cannot be encoded, or weights that give no numbers.
pub fn roll(
    shop: &mut Workshop,
    prompter: &Prompter,
    settings: &RolloutSettings,
    reward: &Reward,
    tasks: Vec<(usize, Task, Vec<u32>)>,
    first: u64,
) -> Result<Vec<Group>> {
    let stop = prompter.stop();
    let request = |index: usize| Request {
        prompt: tasks[index / settings.group].2.clone(),
        max_tokens: settings.max_tokens,
        sampling: Sampling {
            temperature: settings.temperature,
            top_k: settings.top_k,
            top_p: settings.top_p,
            seed: shop.seed,
            ..Sampling::default()
        },
        sequence: first + index as u64,
        stop: stop.clone(),
        stop_ids: shop.stop_ids.clone(),
        ..Request::default()
    };
    let (answers, wave) = (tasks.len() * settings.group, settings.concurrency.max(1));
    let mut generations: Vec<Generation> = Vec::new();
    for from in (0..answers).step_by(wave) {
        let requests: Vec<Request> = (from..answers.min(from + wave)).map(request).collect();
        let engine = Engine::new(&mut shop.trainer.model, &shop.cpu, Some(&shop.tokenizer));
        let mut engine = engine.traced().without_log_probs();
        generations.extend(engine.generate(&requests, &mut |_| ControlFlow::Continue(()))?);
    }
    let mut generations = generations.into_iter();
    let groups = tasks.into_iter().map(|(cell, task, prompt)| {
        let answers = generations.by_ref().take(settings.group).map(|generation| {
            let tokens = generation.trace.tokens.len();
            let ended = matches!(generation.stop, StopReason::Token(_) | StopReason::String(_));
            let grade = reward.grade(&task, &generation.text, prompter, ended, tokens, settings.max_tokens);
            Answer { prompt: prompt.clone(), generation, grade }
        });
        Group { cell, answers: answers.collect(), task }
    });
    Ok(groups.collect())
}

/// Answers as rows for training: every token that was read, the next one as its label where it was sampled.
///
/// With `modules` MTP modules, module k predicts the sampled token k + 1 places ahead.
pub fn batch(answers: &[&Answer], temperature: f32, modules: usize) -> PolicyBatch {
    let mut batch = PolicyBatch { temperature, ..PolicyBatch::default() };
    let rows = &mut batch.rows;
    rows.mtp = vec![MtpTargets::default(); modules];
    for answer in answers {
        let sampled = &answer.generation.trace.tokens;
        let prompt = answer.prompt.len();
        let all: Vec<u32> = answer.prompt.iter().chain(sampled).copied().collect();
        push(rows, &all, |at| at >= prompt);
        for kept in &answer.generation.trace.kept {
            batch.kept.push(kept.iter().copied());
        }
    }
    if batch.kept.ids.is_empty() {
        batch.kept.offsets.clear();
    }
    batch
}

/// Adds a sequence: all tokens but the last are rows; a token is a label where `counts` says so of its place.
fn push(rows: &mut TrainBatch, tokens: &[u32], counts: impl Fn(usize) -> bool) {
    let len = tokens.len().saturating_sub(1);
    rows.segments.push(Segment { start: rows.tokens.len(), len });
    rows.tokens.extend(&tokens[..len]);
    rows.positions.extend(0..len as u32);
    let label = |at: usize| if at < tokens.len() && counts(at) { tokens[at] } else { IGNORE };
    rows.labels.extend((0..len).map(|row| label(row + 1)));
    for (k, targets) in rows.mtp.iter_mut().enumerate() {
        targets.tokens.extend((0..len).map(|row| tokens.get(row + k + 1).copied().unwrap_or_default()));
        targets.labels.extend((0..len).map(|row| label(row + k + 2)));
    }
}

/// What a rollout amounted to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RolloutStats {
    /// Groups sampled, those without signal included.
    pub groups: usize,
    /// Groups in which some answers were worth more than others.
    pub with_signal: usize,
    /// Groups that were all right.
    pub all_right: usize,
    /// Groups that were all wrong.
    pub all_wrong: usize,
    /// Answers.
    pub answers: usize,
    /// Right ones.
    pub right: usize,
    /// Well-formed ones.
    pub formed: usize,
    /// Without an answer.
    pub unanswered: usize,
    /// Cut off at the longest length.
    pub cut: usize,
    /// Whose verifier could not say.
    pub verifier_errors: usize,
    /// Sum of rewards of those that were judged.
    pub reward: f64,
    /// Tokens sampled.
    pub tokens: usize,
    /// Tokens of thoughts.
    pub thought: usize,
    /// Minus the sum of their log-probabilities.
    pub surprise: f64,
    /// Seconds of sampling and grading.
    pub seconds: f64,
}

impl RolloutStats {
    /// Adds groups.
    pub fn add(&mut self, groups: &[Group], close: Option<u32>, since: Instant) {
        for group in groups {
            self.groups += 1;
            self.with_signal += usize::from(group.has_signal());
            self.all_right += usize::from(group.share() == Some(1.0));
            self.all_wrong += usize::from(group.share() == Some(0.0));
            for answer in &group.answers {
                self.answers += 1;
                self.right += usize::from(answer.grade.right);
                self.formed += usize::from(answer.grade.formed);
                self.unanswered += usize::from(!answer.grade.answered);
                self.cut += usize::from(!answer.ended());
                self.verifier_errors += usize::from(matches!(answer.grade.verdict, Verdict::Error(_)));
                self.reward += answer.grade.reward.unwrap_or(0.0);
                self.tokens += answer.len();
                self.thought += answer.thought(close);
                let log_probs = &answer.generation.trace.log_probs;
                self.surprise -= log_probs.iter().map(|&l| f64::from(l)).sum::<f64>();
            }
        }
        self.seconds += since.elapsed().as_secs_f64();
    }

    /// Adds what answers were like to named numbers; `reward` and `right` are of those that were judged.
    pub fn put_into(&self, values: &mut Values) {
        // where no verifier could say anything there is no number, which is not 0
        let judged = (self.answers - self.verifier_errors) as f64;
        let share = |n: usize| n as f64 / self.answers as f64;
        values.put("reward", self.reward / judged);
        values.put("right", self.right as f64 / judged);
        values.put("formed", share(self.formed));
        values.put("unanswered", share(self.unanswered));
        values.put("cut", share(self.cut));
        values.put("verifier_errors", self.verifier_errors as f64);
        values.put("tokens", share(self.tokens));
        values.put("thought", share(self.thought));
        values.put("entropy", self.surprise / self.tokens as f64);
        values.put("groups", self.groups as f64);
        values.put("rollout_tok_s", self.tokens as f64 / self.seconds);
        values.put("rollout_s", self.seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_verifier_could_judge_counts_neither_as_right_nor_as_wrong() {
        let stats = RolloutStats {
            answers: 8,
            right: 1,
            formed: 4,
            verifier_errors: 6,
            reward: 1.2,
            ..RolloutStats::default()
        };
        let mut values = Values::default();
        stats.put_into(&mut values);
        assert_eq!((values.get("right"), values.get("reward")), (Some(0.5), Some(0.6)));
        // what needs no verifier is of all answers
        assert_eq!((values.get("formed"), values.get("verifier_errors")), (Some(0.5), Some(6.0)));

        let mut none = Values::default();
        RolloutStats { answers: 6, verifier_errors: 6, ..RolloutStats::default() }.put_into(&mut none);
        assert_eq!((none.get("right"), none.get("reward"), none.get("formed")), (None, None, Some(0.0)));
    }
}
