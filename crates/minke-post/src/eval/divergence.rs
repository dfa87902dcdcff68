//! How far a model's predictions are from another's, on the same text: what a smaller form of a model has lost.

use std::ops::ControlFlow;
use std::path::Path;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_infer::EngineError;
use minke_model::{Cache, CacheKind, Model, Step, Want};
use serde::Serialize;

use super::perplexity::{Text, window};
use crate::error::{PostError, Result};

/// Logits of either model that exist at once.
const LOGITS_PER_CALL: usize = 1 << 22;
/// Rows of a call, at most.
const ROWS_PER_CALL: usize = 256;

/// The distance of a model's predictions from a reference's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// The file.
    pub path: String,
    /// Tokens foretold.
    pub tokens: usize,
    /// Tokens that the models saw at once.
    pub window: usize,
    /// `exp(mean negative log-probability)` under the model.
    pub perplexity: f64,
    /// The same under the reference.
    pub reference_perplexity: f64,
    /// Mean of `KL(reference || model)` over tokens, in nats.
    pub kl_mean: f64,
    /// The standard error of that mean, as if tokens were independent.
    pub kl_error: f64,
    /// Half of the tokens have less.
    pub kl_median: f64,
    /// Nine tenths have less.
    pub kl_90: f64,
    /// All but one in a hundred have less.
    pub kl_99: f64,
    /// The most.
    pub kl_max: f64,
    /// Share of tokens where both think the same token the likeliest.
    pub same_top: f64,
}

impl Divergence {
    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "{}: perplexity {:.4}, {:.4} of the reference ({:+.2}%); KL mean {:.5} ± {:.5}, median {:.5}, 90% {:.5}, \
             99% {:.5}, most {:.4} nats; the same likeliest token {:.2}%; {} tokens",
            self.path,
            self.perplexity,
            self.reference_perplexity,
            100.0 * (self.perplexity / self.reference_perplexity - 1.0),
            self.kl_mean,
            self.kl_error,
            self.kl_median,
            self.kl_90,
            self.kl_99,
            self.kl_max,
            100.0 * self.same_top,
            self.tokens
        )
    }
}

/// What two rows of logits say of one token.
#[derive(Clone, Copy, Default)]
struct Row {
    kl: f64,
    /// Negative log-probabilities of the token that came.
    nats: f64,
    reference_nats: f64,
    same_top: bool,
}

impl Row {
    /// `KL(p || q) = sum of p (log p - log q)` with p of the reference's logits `a` and q of the model's `b`.
    fn of(a: &[f32], b: &[f32], label: usize) -> Self {
        let top = |x: &[f32]| {
            x.iter()
                .enumerate()
                .fold((0, f32::NEG_INFINITY), |top, (i, &x)| if x > top.1 { (i, x) } else { top })
        };
        let ((at_a, most_a), (at_b, most_b)) = (top(a), top(b));
        let (mut sum_a, mut sum_b, mut between) = (0.0, 0.0, 0.0);
        for (&a, &b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a - most_a), f64::from(b - most_b));
            let p = a.exp();
            sum_a += p;
            sum_b += b.exp();
            // an impossible token adds nothing, whatever the model thinks of it
            between += if p > 0.0 { p * (a - b) } else { 0.0 };
        }
        let kl = between / sum_a - sum_a.ln() + sum_b.ln();
        Self {
            kl: kl.max(0.0),
            nats: sum_b.ln() - f64::from(b[label] - most_b),
            reference_nats: sum_a.ln() - f64::from(a[label] - most_a),
            same_top: at_a == at_b,
        }
    }
}

/// Compares two models of one vocabulary on a text, in the windows of [`perplexity`](super::perplexity()), both at once, so that only
/// the logits of a few rows exist at any time. The model reads them through a cache of the kind given, the reference
/// through its own.
///
/// `on_progress` gets tokens done and all tokens, and may end it: then there is no report.
///
/// # Errors
/// The vocabularies differ, the cache is of latents that the model does not have, or the file cannot be read, is no UTF-8, too large, or has nothing to foretell.
pub fn divergence(
    model: &mut Model,
    reference: &mut Model,
    kind: CacheKind,
    cpu: &Cpu,
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    path: &Path,
    on_progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Divergence>> {
    let w = model.config.vocab_size;
    if reference.config.vocab_size != w {
        let reason = format!(
            "the models have vocabularies of {w} and {} tokens; only models of one vocabulary can be compared",
            reference.config.vocab_size
        );
        return Err(PostError::unsuitable(path.display().to_string(), reason));
    }
    let tokens = Text::read(tokenizer, bos, path)?.tokens;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= w) {
        let reason = format!("the tokenizer makes token {id} of it, and the models have {w}");
        return Err(PostError::unsuitable(path.display().to_string(), reason));
    }
    let window = window(model.config.max_position_embeddings.min(reference.config.max_position_embeddings));
    let chunk = (LOGITS_PER_CALL / w).clamp(1, ROWS_PER_CALL);
    let mut rows = Vec::with_capacity(tokens.len() - 1);
    let mut start = 0;
    while rows.len() < tokens.len() - 1 {
        let end = (start + window).min(tokens.len());
        let Some(own) = Cache::of_kind(model, kind) else { return Err(EngineError::NoLatent.into()) };
        let mut caches = [own, Cache::new(reference)];
        for from in (start..end - 1).step_by(chunk) {
            if on_progress(rows.len(), tokens.len() - 1).is_break() {
                return Ok(None);
            }
            let to = (from + chunk).min(end - 1);
            // the last row foretells tokens[to]
            let want = if to > rows.len() { Want::All } else { Want::None };
            let [of_model, of_reference] = &mut caches;
            let logits = |model: &mut Model, cache| {
                model.infer(cpu, &mut [Step { tokens: &tokens[from..to], cache, want }])
            };
            let (b, a) = (logits(model, of_model), logits(reference, of_reference));
            if want == Want::None {
                continue;
            }
            // those before were foretold from more of the text
            let skip = rows.len() - from.min(rows.len());
            let mut new = vec![Row::default(); to - from - skip];
            let parts: Vec<_> = new.iter_mut().enumerate().map(std::sync::Mutex::new).collect();
            cpu.run(parts.len(), |i| {
                let mut part = parts[i].lock().expect("no task fails");
                let (at, label) = ((skip + i) * w, tokens[from + skip + i + 1] as usize);
                *part.1 = Row::of(&a[at..at + w], &b[at..at + w], label);
            });
            drop(parts);
            rows.append(&mut new);
        }
        start += (window / 2).max(1);
    }
    let _ = on_progress(rows.len(), rows.len());
    Ok(Some(summary(path, window, &rows)))
}

fn summary(path: &Path, window: usize, rows: &[Row]) -> Divergence {
    let n = rows.len() as f64;
    let mean = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>() / n;
    let kl_mean = mean(|row| row.kl);
    let spread = rows.iter().map(|row| (row.kl - kl_mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let mut sorted: Vec<f64> = rows.iter().map(|row| row.kl).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| sorted[((n * share) as usize).min(sorted.len() - 1)];
    Divergence {
        path: path.display().to_string(),
        tokens: rows.len(),
        window,
        perplexity: mean(|row| row.nats).exp(),
        reference_perplexity: mean(|row| row.reference_nats).exp(),
        kl_mean,
        kl_error: (spread / n).sqrt(),
        kl_median: at(0.5),
        kl_90: at(0.9),
        kl_99: at(0.99),
        kl_max: at(1.0),
        same_top: mean(|row| if row.same_top { 1.0 } else { 0.0 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition, over probabilities.
    #[test]
    fn rows_are_what_they_are_called() {
        let (a, b) = ([0.5f32, -1.0, 3.0, 2.0], [1.0f32, 0.25, 2.5, 2.75]);
        let probabilities = |x: [f32; 4]| {
            let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
            x.map(|x| f64::from(x).exp() / sum)
        };
        let (p, q) = (probabilities(a), probabilities(b));
        let kl: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        let row = Row::of(&a, &b, 1);
        assert!((row.kl - kl).abs() < 1e-12, "{} and {kl}", row.kl);
        assert!((row.nats + q[1].ln()).abs() < 1e-12 && (row.reference_nats + p[1].ln()).abs() < 1e-12);
        assert!(!row.same_top);
        let same = Row::of(&a, &a, 0);
        assert!(same.same_top && same.kl == 0.0);
        // what is impossible adds nothing
        let impossible = Row::of(&[0.0, f32::NEG_INFINITY], &[0.0, 0.0], 0);
        assert!((impossible.kl - 2f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn quantiles() {
        let rows: Vec<Row> =
            (0..100).map(|i| Row { kl: f64::from(i), same_top: i < 25, ..Row::default() }).collect();
        let summary = summary(Path::new("x"), 8, &rows);
        assert_eq!(
            (summary.kl_median, summary.kl_90, summary.kl_99, summary.kl_max),
            (50.0, 90.0, 99.0, 99.0)
        );
        assert_eq!((summary.kl_mean, summary.same_top, summary.perplexity), (49.5, 0.25, 1.0));
        assert!((summary.kl_error - 2.901).abs() < 1e-3);
    }
}
