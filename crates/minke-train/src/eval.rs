//! Held-out text in bits per byte, and text that the model writes.

use std::ops::ControlFlow;

use minke_cpu::Cpu;
use minke_data::{Evaluation, Tokenizer};
use minke_infer::{Engine, Request, Sampling};
use minke_model::Model;

use crate::error::Result;
use crate::{batch, recipe};

/// How well held-out text is predicted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    /// Sum of cross entropies, nats.
    pub loss_sum: f64,
    /// Labelled tokens.
    pub tokens: u64,
    /// Bytes of text that they stand for.
    pub bytes: u64,
}

impl Score {
    /// Mean cross entropy, nats per token.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.tokens.max(1) as f64
    }

    /// `loss_sum / (ln 2 bytes)`: what an arithmetic coder with this model would write for a byte of text. Unlike
    /// the loss per token it does not depend on the vocabulary.
    pub fn bits_per_byte(&self) -> f64 {
        self.loss_sum / std::f64::consts::LN_2 / self.bytes.max(1) as f64
    }
}

/// Scores `tokens` of the first `of` tokens of held-out text, in whole batches and at least one, spread evenly: texts of one
/// kind stand together, so the first would not stand for all.
///
/// # Errors
/// A shard that cannot be read.
pub fn score(
    model: &mut Model,
    cpu: &Cpu,
    evaluation: &Evaluation,
    tokens_per_batch: u64,
    tokens: u64,
    of: u64,
) -> Result<Score> {
    let batches = |tokens: u64| tokens.div_ceil(tokens_per_batch.max(1)).clamp(1, evaluation.batches());
    let (all, count) = (batches(of), batches(tokens.min(of)));
    let mut score = Score::default();
    for index in spread(count, all) {
        let rows = evaluation.batch(index)?;
        let losses = model.evaluate(cpu, &batch::from_rows(&rows));
        score.loss_sum += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        score.tokens += rows.label_count(0) as u64;
        score.bytes += rows.text_bytes;
    }
    Ok(score)
}

/// `count` of `all` numbers, evenly.
fn spread(count: u64, all: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |i| i * all / count)
}

/// Continues each prompt by up to `tokens` tokens, until an end of document or the longest sequence of the model.
///
/// The engine is the one that serves models; it borrows the weights as they are. Draws are keyed by the seed, the
/// prompt's number and the position, so the texts are a function of the weights and of these.
///
/// # Errors
/// A prompt that the tokenizer refuses, or that is too long.
pub fn samples(
    model: &mut Model,
    cpu: &Cpu,
    tokenizer: &Tokenizer,
    sample: &recipe::Sample,
    seed: u64,
) -> Result<Vec<String>> {
    let mut requests = Vec::with_capacity(sample.prompts.len());
    for (sequence, prompt) in sample.prompts.iter().enumerate() {
        let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
        ids.extend(tokenizer.encode(prompt)?);
        requests.push(Request {
            prompt: ids,
            max_tokens: sample.tokens,
            sampling: Sampling { temperature: sample.temperature as f32, seed, ..Sampling::default() },
            sequence: sequence as u64,
            stop_ids: tokenizer.eos().into_iter().collect(),
            ..Request::default()
        });
    }
    let mut engine = Engine::new(model, cpu, Some(tokenizer)).without_log_probs();
    let answers = engine.generate(&requests, &mut |_| ControlFlow::Continue(()))?;
    Ok(answers.into_iter().map(|answer| answer.text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_spread_over_all() {
        assert_eq!(spread(3, 10).collect::<Vec<_>>(), [0, 3, 6]);
        assert_eq!(spread(1, 10).collect::<Vec<_>>(), [0]);
        assert_eq!(spread(10, 10).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn bits_per_byte_is_per_byte() {
        let score = Score { loss_sum: 8.0 * std::f64::consts::LN_2, tokens: 2, bytes: 4 };
        assert_eq!(score.bits_per_byte(), 2.0);
        assert!((score.loss() - 4.0 * std::f64::consts::LN_2).abs() < 1e-12);
    }
}
