//! Which experts a token goes to, how much each counts, and the loss that keeps their load even.
//!
//! The choice is constant under differentiation; weights are not. DeepSeek-V2 (2024), section 2.2; DeepSeek-V3
//! (2024), section 2.1.2; the order of operations is that of transformers' models.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, kernel, lanes, load_f32, store_f32};
use crate::scratch::with_scratch;
use crate::simd::Simd;
use crate::softmax::softmax_row;
use crate::view::View;

/// Keeps a sum of scores that all underflowed from dividing by zero, as in transformers.
const TINY: f32 = 1e-20;

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// `1 / (1 + e^-x)`, each expert for itself (V3).
    Sigmoid,
    /// Softmax over all experts (V2).
    Softmax,
}

/// How experts are chosen by their scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The best of score + bias in the groups whose two best add up to most (V3).
    NoAuxTc,
    /// The best scores of all (V2-Lite).
    Greedy,
    /// The best scores in the groups whose best is best (V2).
    GroupLimitedGreedy,
}

/// The settings of a router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterConfig {
    /// e, routed experts.
    pub experts: usize,
    /// k, experts of a token.
    pub top_k: usize,
    /// g, groups of equal size that experts are divided into.
    pub groups: usize,
    /// Groups that a token may use.
    pub top_groups: usize,
    /// Scores from logits.
    pub scoring: Scoring,
    /// Experts from scores.
    pub choice: Choice,
    /// Whether a token's weights are divided by their sum.
    pub normalize: bool,
    /// What weights are multiplied by, after that.
    pub scale: f32,
}

impl RouterConfig {
    #[track_caller]
    fn check(&self, op: &str) {
        let Self { experts, top_k, groups, top_groups, .. } = *self;
        assert!(top_k > 0 && top_k <= experts, "{op}: {top_k} of {experts} experts");
        if self.choice != Choice::Greedy {
            assert!(groups > 0 && experts % groups == 0, "{op}: {experts} experts in {groups} groups");
            assert!(top_groups > 0 && top_groups <= groups, "{op}: {top_groups} of {groups} groups");
            let allowed = top_groups * (experts / groups);
            assert!(top_k <= allowed, "{op}: {top_k} experts from groups that hold {allowed}");
        }
    }
}

/// The indices of the largest values, the largest first, of equals the lower index; `kept` is as long as `best` and
/// holds their values afterwards. NaN counts as -inf.
fn largest(values: &[f32], best: &mut [u32], kept: &mut [f32]) {
    let k = best.len();
    let mut found = 0;
    for (i, &value) in values.iter().enumerate() {
        let value = if value.is_nan() { f32::NEG_INFINITY } else { value };
        if found == k && value <= kept[k - 1] {
            continue;
        }
        let mut at = found.min(k - 1);
        while at > 0 && value > kept[at - 1] {
            (kept[at], best[at]) = (kept[at - 1], best[at - 1]);
            at -= 1;
        }
        (kept[at], best[at]) = (value, i as u32);
        found = (found + 1).min(k);
    }
}

/// Sets the values of groups that are not among the best to -inf.
fn limit_groups(cfg: &RouterConfig, values: &mut [f32], work: &mut [f32], best: &mut [u32]) {
    let size = cfg.experts / cfg.groups;
    let (scores, kept) = work.split_at_mut(cfg.groups);
    for (score, group) in scores.iter_mut().zip(values.chunks(size)) {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &x in group {
            if x > first {
                (first, second) = (x, first);
            } else if x > second {
                second = x;
            }
        }
        *score = if cfg.choice == Choice::NoAuxTc && size > 1 { first + second } else { first };
    }
    largest(scores, best, &mut kept[..best.len()]);
    for (i, group) in values.chunks_mut(size).enumerate() {
        if !best.contains(&(i as u32)) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

kernel! {
    Score<'a>(s: S, logits: &'a [f32], cfg: &'a RouterConfig, out: &'a mut [f32]) {
        for (x, out) in logits.chunks(cfg.experts).zip(out.chunks_mut(cfg.experts)) {
            match cfg.scoring {
                Scoring::Sigmoid => lanes!(cfg.experts, |i, n| {
                    store_f32(s, s.sigmoid(load_f32(s, x, i, n)), out, i, n);
                }),
                Scoring::Softmax => softmax_row(s, x, out),
            }
        }
    }
}

/// One token: `values` (scores, to be changed) to experts in ascending order and their weights.
fn choose(
    cfg: &RouterConfig,
    bias: &[f32],
    scores: &[f32],
    values: &mut [f32],
    work: &mut [f32],
    groups: &mut [u32],
    experts: &mut [u32],
    weights: &mut [f32],
) {
    values.copy_from_slice(scores);
    match cfg.choice {
        Choice::NoAuxTc => {
            values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            if cfg.top_groups < cfg.groups {
                limit_groups(cfg, values, work, groups);
            }
        }
        Choice::GroupLimitedGreedy => {
            if cfg.top_groups < cfg.groups {
                limit_groups(cfg, values, work, groups);
            }
        }
        Choice::Greedy => {}
    }
    largest(values, experts, weights);
    experts.sort_unstable();
    weights.iter_mut().zip(&*experts).for_each(|(weight, &expert)| *weight = scores[expert as usize]);
    let factor = if cfg.normalize { weights.iter().sum::<f32>() + TINY } else { 1.0 };
    for weight in weights {
        *weight = *weight / factor * cfg.scale;
    }
}

/// Scores, experts and weights of every token.
///
/// `scores = sigmoid(logits)` or softmax; experts are the `top_k` largest scores (plus bias, for
/// [`Choice::NoAuxTc`], which weights do not see) within the best groups; `weights = scale scores[experts]`, divided
/// by their sum + 1e-20 first when they are normalised.
///
/// logits, scores: [n, e], bias: [e] or empty for none, experts, weights: [n, k] in ascending order of experts. Of
/// equal scores the lower index wins. A group's score is the sum of its two best (`NoAuxTc`) or its best.
///
/// # Panics
/// When sizes or settings do not fit, or a bias is given to a choice that has none.
///
/// DeepSeek-V3 (2024), eq. 12-16.
pub fn route(
    cpu: &Cpu,
    logits: &[f32],
    bias: &[f32],
    cfg: &RouterConfig,
    scores: &mut [f32],
    experts: &mut [u32],
    weights: &mut [f32],
) {
    cfg.check("route");
    let (e, k) = (cfg.experts, cfg.top_k);
    let n = rows::count("route", logits.len(), e);
    assert!(bias.is_empty() || cfg.choice == Choice::NoAuxTc, "route: {:?} has no bias", cfg.choice);
    rows::expect_len("route", "bias", bias.len(), if bias.is_empty() { 0 } else { e });
    rows::expect_len("route", "scores", scores.len(), n * e);
    rows::expect_len("route", "experts", experts.len(), n * k);
    rows::expect_len("route", "weights", weights.len(), n * k);
    let (scores, experts, weights) =
        (SharedMut::new(scores), SharedMut::new(experts), SharedMut::new(weights));
    rows::over_tiles(cpu, n, 4 * e, |from, to| {
        let count = to - from;
        // SAFETY: tasks own disjoint rows.
        let (scores, experts, weights) = unsafe {
            (
                scores.slice(from * e, count * e),
                experts.slice(from * k, count * k),
                weights.slice(from * k, count * k),
            )
        };
        cpu.dispatch(Score { logits: &logits[from * e..to * e], cfg, out: scores });
        with_scratch(e + 2 * cfg.groups, |work: &mut [f32]| {
            with_scratch(cfg.top_groups, |groups: &mut [u32]| {
                let (values, work) = work.split_at_mut(e);
                let chosen = experts.chunks_mut(k).zip(weights.chunks_mut(k));
                for (scores, (experts, weights)) in scores.chunks(e).zip(chosen) {
                    choose(cfg, bias, scores, values, work, groups, experts, weights);
                }
            });
        });
    });
}

/// `d_logits` of one token from `d_scores`, which it replaces.
#[inline(always)]
fn scores_backward<S: Simd>(s: S, scoring: Scoring, scores: &[f32], d: &mut [f32]) {
    match scoring {
        Scoring::Sigmoid => lanes!(scores.len(), |i, n| {
            let x = load_f32(s, scores, i, n);
            let slope = s.mul(x, s.sub(s.splat(1.0), x));
            store_f32(s, s.mul(load_f32(s, d, i, n), slope), d, i, n);
        }),
        Scoring::Softmax => {
            let mean = s.splat(rows::dot(s, View::F32(scores), View::F32(d), scores.len()));
            lanes!(scores.len(), |i, n| {
                let centred = s.sub(load_f32(s, d, i, n), mean);
                store_f32(s, s.mul(load_f32(s, scores, i, n), centred), d, i, n);
            });
        }
    }
}

kernel! {
    RouteBackward<'a>(
        s: S, cfg: &'a RouterConfig, scores: &'a [f32], experts: &'a [u32], d_weights: &'a [f32],
        extra: Option<&'a [f32]>, d_logits: &'a mut [f32],
    ) {
        let (e, k) = (cfg.experts, cfg.top_k);
        for (row, d) in d_logits.chunks_mut(e).enumerate() {
            match extra {
                Some(extra) => d.copy_from_slice(&extra[row * e..(row + 1) * e]),
                None => d.fill(0.0),
            }
            let scores = &scores[row * e..(row + 1) * e];
            let chosen = experts[row * k..(row + 1) * k].iter().zip(&d_weights[row * k..(row + 1) * k]);
            let (mut factor, mut mean) = (cfg.scale, 0.0);
            if cfg.normalize {
                let (mut sum, mut dot) = (0.0, 0.0);
                for (&expert, &d_weight) in chosen.clone() {
                    let score = scores[expert as usize];
                    sum += score;
                    dot += d_weight * score;
                }
                sum += TINY;
                factor /= sum;
                mean = dot / sum;
            }
            for (&expert, &d_weight) in chosen {
                d[expert as usize] += factor * (d_weight - mean);
            }
            scores_backward(s, cfg.scoring, scores, d);
        }
    }
}

/// Gradient of the weights of [`route`] (and of `d_scores_extra`, what else reaches the scores) for the logits.
///
/// scores, `d_scores_extra`, `d_logits`: [n, e], experts, `d_weights`: [n, k].
///
/// # Panics
/// When sizes or settings do not fit.
pub fn route_backward(
    cpu: &Cpu,
    cfg: &RouterConfig,
    scores: &[f32],
    experts: &[u32],
    d_weights: &[f32],
    d_scores_extra: Option<&[f32]>,
    d_logits: &mut [f32],
) {
    const OP: &str = "route_backward";
    cfg.check(OP);
    let (e, k) = (cfg.experts, cfg.top_k);
    let n = rows::count(OP, scores.len(), e);
    rows::expect_len(OP, "experts", experts.len(), n * k);
    rows::expect_len(OP, "d_weights", d_weights.len(), n * k);
    rows::expect_len(OP, "d_scores_extra", d_scores_extra.map_or(n * e, <[f32]>::len), n * e);
    rows::expect_len(OP, "d_logits", d_logits.len(), n * e);
    let d_logits = SharedMut::new(d_logits);
    rows::over_tiles(cpu, n, 4 * e, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let d_logits = unsafe { d_logits.slice(from * e, (to - from) * e) };
        cpu.dispatch(RouteBackward {
            cfg,
            scores: &scores[from * e..to * e],
            experts: &experts[from * k..to * k],
            d_weights: &d_weights[from * k..to * k],
            extra: d_scores_extra.map(|extra| &extra[from * e..to * e]),
            d_logits,
        });
    });
}

kernel! {
    /// One sequence: the sum over tokens of `f . s / sum(s)`; the gradient of `factor` times that.
    Balance<'a>(
        s: S, scores: &'a [f32], share: &'a [f32], factor: f32, d_scores: Option<&'a mut [f32]>,
    ) -> f64 {
        let (mut d_scores, e) = (d_scores, share.len());
        let mut total = 0.0;
        for (row, scores) in scores.chunks(e).enumerate() {
            let mut sum = s.zero();
            lanes!(e, |i, n| {
                sum = s.add(sum, load_f32(s, scores, i, n));
            });
            let sum = s.sum(sum) + TINY;
            let mean = rows::dot(s, View::F32(scores), View::F32(share), e) / sum;
            total += f64::from(mean);
            if let Some(d_scores) = &mut d_scores {
                let (factor, mean) = (s.splat(factor / sum), s.splat(mean));
                lanes!(e, |i, n| {
                    let d = s.mul(factor, s.sub(load_f32(s, share, i, n), mean));
                    store_f32(s, d, d_scores, row * e + i, n);
                });
            }
        }
        total
    }
}

/// The complementary sequence-wise balance loss `alpha sum over i of f_i P_i`, averaged over sequences that have
/// tokens, and its gradient for the scores.
///
/// Over the T tokens of a sequence: `f_i = e / (k T) (tokens that chose i)`, which has no gradient;
/// `P_i = 1 / T sum of s_i / sum_j s_j`. scores, `d_scores`: [n, e] (written, not added to), experts: [n, k];
/// sequence i is tokens `offsets[i]..offsets[i + 1]`, the offsets starting at 0 and ending at n. Tokens in f32,
/// their sum in f64, ascending.
///
/// # Panics
/// When sizes or settings do not fit, or an expert is beyond e.
///
/// DeepSeek-V3 (2024), eq. 17-20.
pub fn sequence_balance_loss(
    cpu: &Cpu,
    scores: &[f32],
    experts: &[u32],
    offsets: &[u32],
    cfg: &RouterConfig,
    alpha: f32,
    d_scores: Option<&mut [f32]>,
) -> f32 {
    const OP: &str = "sequence_balance_loss";
    cfg.check(OP);
    let (e, k) = (cfg.experts, cfg.top_k);
    let n = rows::count(OP, scores.len(), e);
    rows::expect_len(OP, "experts", experts.len(), n * k);
    rows::expect_len(OP, "d_scores", d_scores.as_ref().map_or(n * e, |d| d.len()), n * e);
    let spans = offsets.first() == Some(&0) && offsets.last() == Some(&(n as u32)) && offsets.is_sorted();
    assert!(spans, "{OP}: {} offsets do not divide {n} tokens", offsets.len());
    let sequences = offsets.len() - 1;
    let filled = offsets.windows(2).filter(|span| span[0] < span[1]).count();
    let d_scores = d_scores.map(SharedMut::new);
    with_scratch(sequences, |losses: &mut [f64]| {
        let shared = SharedMut::new(losses);
        cpu.run(sequences, |i| {
            let (from, to) = (offsets[i] as usize, offsets[i + 1] as usize);
            let tokens = (to - from) as f32;
            // SAFETY: tasks own disjoint sequences.
            let (loss, d_scores) = unsafe {
                (shared.slice(i, 1), d_scores.as_ref().map(|d| d.slice(from * e, (to - from) * e)))
            };
            loss[0] = 0.0;
            if from == to {
                return;
            }
            with_scratch(e, |share: &mut [f32]| {
                share.fill(0.0);
                for &expert in &experts[from * k..to * k] {
                    share[expert as usize] += 1.0;
                }
                for f in share.iter_mut() {
                    *f *= e as f32 / (k as f32 * tokens);
                }
                let factor = alpha / (filled as f32 * tokens);
                let scores = &scores[from * e..to * e];
                loss[0] = cpu.dispatch(Balance { scores, share, factor, d_scores }) / f64::from(tokens);
            });
        });
        (f64::from(alpha) * losses.iter().sum::<f64>() / filled.max(1) as f64) as f32
    })
}

#[cfg(test)]
mod tests;
