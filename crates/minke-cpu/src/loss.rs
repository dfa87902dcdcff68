//! Cross entropy and what else is asked of a row of logits.

use std::sync::atomic::{AtomicUsize, Ordering};

use minke_num::bf16;

use crate::cpu::SharedMut;
use crate::gemm::tile::MAX_ROWS;
use crate::gemm::{self, Operand, Packed};
use crate::rows::{self, SharedView, kernel, lanes, load_f32, load_f32_or, store, store_f32};
use crate::softmax::{exp_below, exp_sum, natural_log, row_max};
use crate::{Cpu, View, ViewMut, scratch};

/// The label of a row that does not count.
pub const IGNORED: u32 = u32::MAX;

#[track_caller]
fn check_labels(op: &str, logits: &[f32], w: usize, labels: &[u32], out: &[f32]) {
    rows::expect_len(op, "logits", logits.len(), labels.len() * w);
    rows::expect_len(op, "the output", out.len(), labels.len());
    if let Some(label) = labels.iter().find(|&&label| label != IGNORED && label as usize >= w) {
        panic!("{op}: label {label} in rows of {w}");
    }
}

kernel! {
    CrossEntropy<'a>(
        s: S, logits: &'a mut [f32], w: usize, labels: &'a [u32], scales: Scales<'a>, losses: &'a mut [f32],
        gradient: Option<ViewMut<'a>>,
    ) -> usize {
        let (mut gradient, mut hits) = (gradient, 0);
        for (row, ((x, &label), loss)) in logits.chunks_mut(w).zip(labels).zip(losses).enumerate() {
            if label == IGNORED {
                *loss = 0.0;
                match &mut gradient {
                    None => {}
                    Some(ViewMut::F32(out)) => out[row * w..(row + 1) * w].fill(0.0),
                    Some(ViewMut::Bf16(out)) => out[row * w..(row + 1) * w].fill(bf16::ZERO),
                }
                continue;
            }
            let max = row_max(s, x);
            let target = x[label as usize] - max;
            hits += usize::from(target == 0.0);
            let Some(out) = &mut gradient else {
                *loss = natural_log(exp_sum(s, x, max)) - target;
                continue;
            };
            // the exponentials stay in the row, so that the gradient is one multiplication more
            let (mut sum, max) = (s.zero(), s.splat(max));
            lanes!(w, |i, n| {
                let e = exp_below(s, load_f32_or(s, x, i, n, f32::NEG_INFINITY), max);
                sum = s.add(sum, e);
                store_f32(s, e, x, i, n);
            });
            let sum = s.sum(sum);
            *loss = natural_log(sum) - target;
            let scale = match scales {
                Scales::All(scale) => scale,
                Scales::Rows(scales) => scales[row],
            };
            let factor = s.splat(scale / sum);
            lanes!(w, |i, n| {
                store(s, s.mul(load_f32(s, x, i, n), factor), out, row * w + i, n);
            });
            let of_label = x[label as usize] * (scale / sum) - scale;
            match out {
                ViewMut::F32(out) => out[row * w + label as usize] = of_label,
                ViewMut::Bf16(out) => out[row * w + label as usize] = bf16::from_f32(of_label),
            }
        }
        hits
    }
}

/// What the gradient of each row's loss is multiplied by.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// The same for all.
    All(f32),
    /// One for each row.
    Rows(&'a [f32]),
}

impl Scales<'_> {
    /// Those of the rows `from..to`.
    fn part(&self, from: usize, to: usize) -> Scales<'_> {
        match self {
            Scales::All(scale) => Scales::All(*scale),
            Scales::Rows(scales) => Scales::Rows(&scales[from..to]),
        }
    }
}

/// `loss = ln(sum of e^x) - x[label]`, row by row, and its gradient `scale (softmax(x) - onehot(label))`. Returns in how
/// many rows no token was likelier than the label.
///
/// logits: [n, w] (spent where a gradient is asked for, else as they were), labels: [n] ([`IGNORED`]: loss and gradient
/// are 0), losses: [n] (not scaled), gradient: [n, w], rounded once to its dtype. Logits of any finite size are safe;
/// NaN or +inf among them gives NaN.
///
/// # Panics
/// When sizes do not fit or a label is beyond the row.
pub fn cross_entropy(
    cpu: &Cpu,
    logits: &mut [f32],
    w: usize,
    labels: &[u32],
    scales: Scales<'_>,
    losses: &mut [f32],
    gradient: Option<ViewMut<'_>>,
) -> usize {
    check_labels("cross_entropy", logits, w, labels, losses);
    if let Scales::Rows(scales) = scales {
        rows::expect_len("cross_entropy", "scales", scales.len(), labels.len());
    }
    if let Some(out) = &gradient {
        rows::expect_len("cross_entropy", "the gradient", out.len(), logits.len());
    }
    let gradient = gradient.map(SharedView::new);
    let (logits, losses) = (SharedMut::new(logits), SharedMut::new(losses));
    let hits = AtomicUsize::new(0);
    rows::over_tiles(cpu, labels.len(), w, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let (logits, losses) =
            unsafe { (logits.slice(from * w, (to - from) * w), losses.slice(from, to - from)) };
        // SAFETY: as above.
        let gradient = gradient.as_ref().map(|out| unsafe { out.slice(from * w, (to - from) * w) });
        let scales = scales.part(from, to);
        let of_tile =
            cpu.dispatch(CrossEntropy { logits, w, labels: &labels[from..to], scales, losses, gradient });
        hits.fetch_add(of_tile, Ordering::Relaxed);
    });
    hits.into_inner()
}

/// Bytes of logits that a task of [`head`] holds: they stay in the second-level cache.
const HEAD_BYTES: usize = 1 << 20;

/// [`cross_entropy`] of logits `x Wᵀ`, which exist for a few rows at a time.
///
/// x: [n, d], W packed [w, d], labels and losses: [n]; the gradient of the logits, if one is wanted: [n, w].
///
/// # Panics
/// As [`cross_entropy`] and [`gemm::matmul`].
pub fn head(
    cpu: &Cpu,
    x: View<'_>,
    packed: &Packed,
    labels: &[u32],
    scales: Scales<'_>,
    losses: &mut [f32],
    gradient: Option<ViewMut<'_>>,
) -> usize {
    let (n, d, w) = (labels.len(), packed.depth(), packed.columns());
    rows::expect_len("head", "x", x.len(), n * d);
    rows::expect_len("head", "losses", losses.len(), n);
    let gradient = gradient.map(SharedView::new);
    let (losses, hits) = (SharedMut::new(losses), AtomicUsize::new(0));
    let block = (HEAD_BYTES / (size_of::<f32>() * w.max(1)) / MAX_ROWS).clamp(1, 8) * MAX_ROWS;
    rows::over_blocks(cpu, n, block, |from, to| {
        let count = to - from;
        // SAFETY: tasks own disjoint rows.
        let losses = unsafe { losses.slice(from, count) };
        // SAFETY: as above.
        let gradient = gradient.as_ref().map(|out| unsafe { out.slice(from * w, count * w) });
        let mut logits = scratch::take::<f32>(count * w);
        let rows = Operand::new(x.slice(from * d, to * d), d);
        gemm::matmul(cpu, rows, &[0, count as u32], packed, ViewMut::F32(&mut logits), false);
        let of_block =
            cross_entropy(cpu, &mut logits, w, &labels[from..to], scales.part(from, to), losses, gradient);
        hits.fetch_add(of_block, Ordering::Relaxed);
    });
    hits.into_inner()
}

kernel! {
    LogProbs<'a>(s: S, logits: &'a [f32], w: usize, labels: &'a [u32], out: &'a mut [f32]) {
        for ((x, &label), out) in logits.chunks(w).zip(labels).zip(out) {
            *out = if label == IGNORED {
                0.0
            } else {
                let max = row_max(s, x);
                (x[label as usize] - max) - natural_log(exp_sum(s, x, max))
            };
        }
    }
}

/// `out = x[label] - ln(sum of e^x)`, row by row: minus the loss of [`cross_entropy`], to the bit.
///
/// logits: [n, w], labels: [n] ([`IGNORED`] gives 0), out: [n].
///
/// # Panics
/// When sizes do not fit or a label is beyond the row.
pub fn log_probs(cpu: &Cpu, logits: &[f32], w: usize, labels: &[u32], out: &mut [f32]) {
    check_labels("log_probs", logits, w, labels, out);
    let out = SharedMut::new(out);
    rows::over_tiles(cpu, labels.len(), w, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { out.slice(from, to - from) };
        cpu.dispatch(LogProbs { logits: &logits[from * w..to * w], w, labels: &labels[from..to], out });
    });
}

kernel! {
    Entropy<'a>(s: S, logits: &'a [f32], w: usize, out: &'a mut [f32]) {
        for (x, out) in logits.chunks(w).zip(out) {
            let max = s.splat(row_max(s, x));
            let (mut sum, mut dot) = (s.zero(), s.zero());
            lanes!(w, |i, n| {
                let x = load_f32_or(s, x, i, n, f32::NEG_INFINITY);
                let e = exp_below(s, x, max);
                // where e is 0 the exponent may be -inf, and 0 times that is not the 0 it stands for
                dot = s.fma(e, s.max(s.sub(x, max), s.splat(-88.0)), dot);
                sum = s.add(sum, e);
            });
            let sum = s.sum(sum);
            *out = natural_log(sum) - s.sum(dot) / sum;
        }
    }
}

/// `out = -sum of p ln p`, `p = softmax(x)`, row by row, in nats; logits: [n, w], out: [n].
///
/// # Panics
/// When sizes do not fit.
pub fn entropy(cpu: &Cpu, logits: &[f32], w: usize, out: &mut [f32]) {
    rows::expect_len("entropy", "logits", logits.len(), out.len() * w);
    let (n, out) = (out.len(), SharedMut::new(out));
    rows::over_tiles(cpu, n, w, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { out.slice(from, to - from) };
        cpu.dispatch(Entropy { logits: &logits[from * w..to * w], w, out });
    });
}

kernel! {
    Argmax<'a>(s: S, x: &'a [f32]) -> usize {
        let max = row_max(s, x);
        x.iter().position(|&x| x == max).unwrap_or(0)
    }
}

/// The index of the largest element, the first of equals; NaN never wins (0 if there is nothing else).
///
/// # Panics
/// When the row is empty.
pub fn argmax(cpu: &Cpu, row: &[f32]) -> usize {
    assert!(!row.is_empty(), "argmax: of an empty row");
    cpu.dispatch(Argmax { x: row })
}

#[cfg(test)]
mod tests {
    use minke_num::tolerance::{Tolerance, assert_same_bits};

    use super::*;
    use crate::testing::{AWKWARD, assert_gradient, everywhere, halve, normal, wide, widen};

    fn log_sum(x: &[f64]) -> f64 {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
    }

    fn gradient_ref(x: &[f64], label: usize, scale: f64) -> Vec<f64> {
        let all = log_sum(x);
        x.iter()
            .enumerate()
            .map(|(i, x)| scale * ((x - all).exp() - f64::from(u8::from(i == label))))
            .collect()
    }

    #[test]
    fn formula_matches_differences() {
        let x = wide(&normal(1, 9));
        assert_gradient("d_logits", |x| 0.3 * (log_sum(x) - x[4]), &x, &gradient_ref(&x, 4, 0.3));
    }

    #[test]
    fn loss_and_gradient_match_f64() {
        for w in AWKWARD.into_iter().chain([5000]) {
            let n = 7;
            let labels: Vec<u32> =
                (0..n).map(|i| if i == 3 { IGNORED } else { (i * 31 % w) as u32 }).collect();
            for size in [1.0, 50.0] {
                let x: Vec<f32> = normal(1, n * w).iter().map(|x| x * size).collect();
                let got = everywhere("cross_entropy", |cpu| {
                    let (mut d, mut losses, mut again, mut log_p) =
                        (vec![9.0; n * w], vec![9.0; n], vec![9.0; n], vec![9.0; n]);
                    let run = |scales: Scales<'_>, losses: &mut [f32], to: Option<ViewMut<'_>>| {
                        cross_entropy(cpu, &mut x.clone(), w, &labels, scales, losses, to)
                    };
                    run(Scales::All(0.25), &mut losses, Some(ViewMut::F32(&mut d)));
                    let mut by_row = vec![9.0; n * w];
                    run(Scales::Rows(&[0.25; 7]), &mut losses, Some(ViewMut::F32(&mut by_row)));
                    assert_same_bits("gradient scaled by row", &by_row, &d);
                    let mut half = vec![bf16::ONE; n * w];
                    run(Scales::All(0.25), &mut losses, Some(ViewMut::Bf16(&mut half)));
                    assert_same_bits("rounded gradient", &widen(&half), &widen(&halve(&d)));
                    let mut kept = x.clone();
                    let scales = Scales::All(0.25);
                    let hits = cross_entropy(cpu, &mut kept, w, &labels, scales, &mut again, None);
                    let likeliest = |(x, &label): (&[f32], &u32)| {
                        label != IGNORED && x.iter().all(|&other| other <= x[label as usize])
                    };
                    assert_eq!(hits, x.chunks(w).zip(&labels).filter(|&row| likeliest(row)).count());
                    assert_same_bits("logits without gradient", &kept, &x);
                    assert_same_bits("loss without gradient", &again, &losses);
                    log_probs(cpu, &x, w, &labels, &mut log_p);
                    assert!(log_p.iter().zip(&losses).all(|(a, b)| *a == -*b));
                    [losses, d].concat()
                });
                let (mut losses, mut d) = (Vec::new(), Vec::new());
                for (x, &label) in wide(&x).chunks(w).zip(&labels) {
                    if label == IGNORED {
                        losses.push(0.0);
                        d.extend(vec![0.0; w]);
                    } else {
                        losses.push(log_sum(x) - x[label as usize]);
                        d.extend(gradient_ref(x, label as usize, 0.25));
                    }
                }
                Tolerance::new(2e-6, 1e-6).check("loss", &got[..n], &losses).unwrap();
                Tolerance::new(5e-8, 5e-6).check("d_logits", &got[n..], &d).unwrap();
            }
        }
    }

    #[test]
    fn the_head_is_a_product_and_cross_entropy() {
        let (n, d, w) = (131, 37, 70);
        let (x, weight) = (normal(1, n * d), normal(2, w * d));
        let labels: Vec<u32> = (0..n).map(|i| if i % 9 == 4 { IGNORED } else { (i % w) as u32 }).collect();
        for level in crate::Level::available() {
            for compute in [gemm::Compute::F32, gemm::Compute::Bf16] {
                let mut results = Vec::new();
                for threads in [1, 3] {
                    let cpu = Cpu::with_level(level, threads);
                    let mut packed = Packed::empty();
                    packed.pack_nt(&cpu, View::F32(&weight), 1, w, d, compute);
                    let mut logits = vec![0.0; n * w];
                    let rows = Operand::new(View::F32(&x), d);
                    gemm::matmul(&cpu, rows, &[0, n as u32], &packed, ViewMut::F32(&mut logits), false);
                    let (mut losses, mut grad) =
                        ([vec![0.0; n], vec![0.0; n]], [vec![1.0; n * w], vec![2.0; n * w]]);
                    let [one, two] = &mut losses;
                    let [d_one, d_two] = &mut grad;
                    let scales = Scales::All(0.5);
                    let to = Some(ViewMut::F32(d_one));
                    let hits = cross_entropy(&cpu, &mut logits, w, &labels, scales, one, to);
                    let to = Some(ViewMut::F32(d_two));
                    assert_eq!(head(&cpu, View::F32(&x), &packed, &labels, scales, two, to), hits);
                    assert_same_bits("losses", one, two);
                    assert_same_bits("gradient", d_one, d_two);
                    assert_eq!(head(&cpu, View::F32(&x), &packed, &labels, scales, one, None), hits);
                    assert_same_bits("losses alone", one, two);
                    results.push(losses.concat());
                }
                assert_same_bits("threads", &results[0], &results[1]);
            }
        }
    }

    #[test]
    fn huge_logits_are_safe_and_bad_ones_are_seen() {
        let cpu = Cpu::detect(1);
        let mut losses = [0.0];
        let mut run = |x: &mut [f32; 3]| {
            let mut d = [9.0; 3];
            let to = Some(ViewMut::F32(&mut d));
            cross_entropy(&cpu, x, 3, &[0], Scales::All(1.0), &mut losses, to);
            (losses[0], d)
        };
        assert_eq!(run(&mut [3e38, -3e38, 0.0]), (0.0, [0.0, 0.0, 0.0]));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(run(&mut [0.0, bad, 1.0]).0.is_nan());
        }
    }

    #[test]
    fn entropy_matches_f64() {
        for w in AWKWARD {
            let mut x: Vec<f32> = normal(1, 6 * w).iter().map(|x| 5.0 * x).collect();
            if w > 2 {
                x[1] = f32::NEG_INFINITY;
            }
            let got = everywhere("entropy", |cpu| {
                let mut out = vec![0.0; 6];
                entropy(cpu, &x, w, &mut out);
                out
            });
            let per_row = |x: &[f64]| -> f64 {
                let all = log_sum(x);
                x.iter().filter(|x| x.is_finite()).map(|x| (x - all).exp() * (all - x)).sum()
            };
            let expected: Vec<f64> = wide(&x).chunks(w).map(per_row).collect();
            Tolerance::new(3e-6, 3e-6).check("entropy", &got, &expected).unwrap();
        }
    }

    #[test]
    fn argmax_takes_the_first() {
        for level in crate::Level::available() {
            let cpu = Cpu::with_level(level, 1);
            for w in AWKWARD {
                for at in [0, w / 2, w - 1] {
                    let mut x = vec![-1.0; w];
                    x[at] = 2.0;
                    x[w - 1] = 2.0;
                    x[0] = if at == 0 { 2.0 } else { f32::NAN };
                    let expected = x.iter().position(|&x| x == 2.0).unwrap();
                    assert_eq!(argmax(&cpu, &x), expected, "{} {w} {at}", level.name());
                }
            }
            assert_eq!(argmax(&cpu, &[f32::NAN; 3]), 0);
        }
    }
}
