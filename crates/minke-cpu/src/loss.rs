//! Cross entropy and what else is asked of a row of logits.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use minke_num::bf16;

use crate::cpu::SharedMut;
use crate::gemm::{self, Operand, Packed};
use crate::pointwise::softcap_here;
use crate::rows::{self, SharedView, kernel, lanes, load_f32_or, store};
use crate::simd::{GRID_ROWS, Level, Simd};
use crate::softmax::{ExpSum, PART, exp_below, natural_log, row_max};
use crate::{Cpu, View, ViewMut, scratch};

/// The label of a row that does not count.
pub const IGNORED: u32 = u32::MAX;

#[track_caller]
fn check_labels(op: &str, logits: &[f32], w: usize, labels: &[u32], out: &[f32]) {
    rows::expect_len(op, "logits", logits.len(), labels.len() * w);
    rows::expect_len(op, "the output", out.len(), labels.len());
    check_range(op, labels, w);
}

#[track_caller]
fn check_range(op: &str, labels: &[u32], w: usize) {
    if let Some(label) = labels.iter().find(|&&label| label != IGNORED && label as usize >= w) {
        panic!("{op}: label {label} in rows of {w}");
    }
}

/// What is known of a row's logits once all have passed.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
struct Seen {
    all: ExpSum,
    /// The label's logit.
    of_label: f32,
}

/// Some columns of rows of logits, `stride` apart.
#[derive(Clone, Copy)]
struct Part<'a> {
    logits: &'a [f32],
    stride: usize,
    first: usize,
    len: usize,
    /// The soft cap that they went through.
    cap: Option<f32>,
}

impl Part<'_> {
    /// The slope of the soft cap where a logit came out of it.
    #[inline(always)]
    fn slope<S: Simd>(&self, s: S, x: S::V) -> S::V {
        match self.cap {
            None => s.splat(1.0),
            Some(cap) => {
                let t = s.mul(x, s.splat(1.0 / cap));
                s.fma(s.sub(s.zero(), t), t, s.splat(1.0))
            }
        }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[f32] {
        &self.logits[row * self.stride..][..self.len]
    }

    /// Where a label's logit is, if it is here.
    #[inline(always)]
    fn place(&self, label: u32) -> Option<usize> {
        (label as usize).checked_sub(self.first).filter(|&i| i < self.len)
    }
}

kernel! {
    Sums<'a>(s: S, part: Part<'a>, labels: &'a [u32], seen: &'a mut [Seen]) {
        for (row, (&label, seen)) in labels.iter().zip(seen).enumerate().filter(|(_, of)| *of.0 != IGNORED) {
            let x = part.row(row);
            seen.all = seen.all.with(s, x);
            if let Some(at) = part.place(label) {
                seen.of_label = x[at];
            }
        }
    }
}

kernel! {
    Slopes<'a>(
        s: S, part: Part<'a>, w: usize, labels: &'a [u32], scales: Scales<'a>, seen: &'a [Seen],
        gradient: ViewMut<'a>,
    ) {
        let mut gradient = gradient;
        for (row, (&label, seen)) in labels.iter().zip(seen).enumerate() {
            let (x, to) = (part.row(row), row * w + part.first);
            if label == IGNORED {
                match &mut gradient {
                    ViewMut::F32(out) => out[to..to + part.len].fill(0.0),
                    ViewMut::Bf16(out) => out[to..to + part.len].fill(bf16::ZERO),
                }
                continue;
            }
            let scale = match scales {
                Scales::All(scale) => scale,
                Scales::Rows(scales) => scales[row],
            };
            let (max, factor) = (s.splat(seen.all.max), s.splat(scale / seen.all.sum));
            lanes!(part.len, |i, n| {
                let x = load_f32_or(s, x, i, n, f32::NEG_INFINITY);
                let slope = s.mul(exp_below(s, x, max), factor);
                let slope = if part.cap.is_some() { s.mul(slope, part.slope(s, x)) } else { slope };
                store(s, slope, &mut gradient, to + i, n);
            });
            if let Some(at) = part.place(label) {
                let e = s.max_lane(exp_below(s, s.splat(x[at]), max));
                let of_label = e * (scale / seen.all.sum) - scale;
                let of_label = of_label * s.max_lane(part.slope(s, s.splat(x[at])));
                match &mut gradient {
                    ViewMut::F32(out) => out[to + at] = of_label,
                    ViewMut::Bf16(out) => out[to + at] = bf16::from_f32(of_label),
                }
            }
        }
    }
}

/// Is shown a part.
type Look<'a> = dyn FnMut(Part<'_>) + 'a;

/// Cross entropy of rows whose logits come in parts of [`PART`] columns: `part(columns, again, look)` shows `look` the part.
/// All parts are asked for once, and where a gradient is wanted once again, last to first.
fn over_parts(
    cpu: &Cpu,
    w: usize,
    labels: &[u32],
    scales: Scales<'_>,
    losses: &mut [f32],
    gradient: Option<ViewMut<'_>>,
    part: &mut dyn FnMut(Range<usize>, bool, &mut Look<'_>),
) -> usize {
    let columns = |i: usize| i * PART..w.min((i + 1) * PART);
    let mut seen = scratch::take::<Seen>(labels.len());
    seen.fill(Seen { all: ExpSum::EMPTY, of_label: f32::NEG_INFINITY });
    for i in 0..w.div_ceil(PART) {
        part(columns(i), false, &mut |part| cpu.dispatch(Sums { part, labels, seen: &mut seen }));
    }
    let mut hits = 0;
    for ((loss, &label), seen) in losses.iter_mut().zip(labels).zip(&*seen) {
        let target = seen.of_label - seen.all.max;
        let counts = label != IGNORED;
        hits += usize::from(counts && target == 0.0);
        *loss = if counts { seen.all.log() - target } else { 0.0 };
    }
    if let Some(mut gradient) = gradient {
        for i in (0..w.div_ceil(PART)).rev() {
            part(columns(i), true, &mut |part| {
                let gradient = gradient.reborrow();
                cpu.dispatch(Slopes { part, w, labels, scales, seen: &seen, gradient });
            });
        }
    }
    hits
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
/// logits: [n, w], labels: [n] ([`IGNORED`]: loss and gradient are 0), losses: [n] (not scaled), gradient: [n, w], rounded
/// once to its dtype. Logits of any finite size are safe; NaN or +inf among them gives NaN.
///
/// # Panics
/// When sizes do not fit or a label is beyond the row.
pub fn cross_entropy(
    cpu: &Cpu,
    logits: &[f32],
    w: usize,
    labels: &[u32],
    scales: Scales<'_>,
    losses: &mut [f32],
    gradient: Option<ViewMut<'_>>,
) -> usize {
    check_labels("cross_entropy", logits, w, labels, losses);
    let block = (8192 / w.max(1)).clamp(1, 64);
    let blocks = Blocks { rows: block, room: 0 };
    over_rows(
        cpu,
        "cross_entropy",
        blocks,
        w,
        labels,
        scales,
        losses,
        gradient,
        |rows, columns, _, _, look| {
            let logits = &logits[rows.start * w + columns.start..rows.end * w];
            look(Part { logits, stride: w, first: columns.start, len: columns.len(), cap: None });
        },
    )
}

/// Rows of a task of [`head`], at most: their logits of one part stay in the second-level cache, and all of W passes
/// through it for them.
const HEAD_ROWS: usize = 256;

/// Rows whose logits are kept, at least: for fewer W passes too often.
const KEPT_ROWS: usize = 64;

/// Bytes of logits that a task of [`head`] keeps, at most.
const KEPT_BYTES: usize = 8 << 20;

/// Bytes of working memory that a task of [`head`] takes where a gradient is wanted, at most.
pub fn head_bytes(level: Level, w: usize) -> usize {
    size_of::<f32>() * kept_rows(level, w).map_or(HEAD_ROWS * PART, |rows| rows * w)
}

/// Rows of a task of [`head`] that keeps their logits, at most, if that pays.
fn kept_rows(level: Level, w: usize) -> Option<usize> {
    let rows = KEPT_BYTES / (size_of::<f32>() * w.max(1)) / GRID_ROWS * GRID_ROWS;
    (rows >= KEPT_ROWS && !level.has_grid()).then_some(rows.min(HEAD_ROWS))
}

/// [`cross_entropy`] of logits `x Wᵀ`, which exist for a few rows at a time. Where a gradient is wanted they are kept
/// meanwhile, if the vocabulary is small enough; else, and in tile registers, which take less time than memory does, they
/// exist for a few columns at a time and are computed twice.
///
/// x: [n, d], W packed [w, d], labels and losses: [n]; the gradient of the logits, if one is wanted: [n, w]. With a soft
/// cap the logits are `cap tanh(x Wᵀ / cap)`, and the gradient is that of `x Wᵀ`.
///
/// # Panics
/// As [`cross_entropy`] and [`gemm::matmul`].
pub fn head(
    cpu: &Cpu,
    x: View<'_>,
    packed: &Packed,
    softcap: Option<f32>,
    labels: &[u32],
    scales: Scales<'_>,
    losses: &mut [f32],
    gradient: Option<ViewMut<'_>>,
) -> usize {
    let (n, d, w) = (labels.len(), packed.depth(), packed.columns());
    rows::expect_len("head", "x", x.len(), n * d);
    rows::expect_len("head", "losses", losses.len(), n);
    check_range("head", labels, w);
    let kept = gradient.as_ref().and_then(|_| kept_rows(cpu.level(), w));
    let (keeps, most) = (kept.is_some(), kept.unwrap_or(HEAD_ROWS));
    let rows = n.div_ceil(2 * cpu.threads()).next_multiple_of(GRID_ROWS).clamp(GRID_ROWS, most);
    let blocks = Blocks { rows, room: if keeps { w } else { PART.min(w) } };
    over_rows(cpu, "head", blocks, w, labels, scales, losses, gradient, |rows, columns, again, room, look| {
        let (first, len) = (columns.start, columns.len());
        let logits = &mut room[if keeps { first * rows.len() } else { 0 }..][..rows.len() * len];
        if !(keeps && again) {
            let x = Operand::new(x.slice(rows.start * d, rows.end * d), d);
            gemm::matmul_columns(cpu, x, packed, columns, logits);
            if let Some(cap) = softcap {
                softcap_here(cpu, logits, cap);
            }
        }
        look(Part { logits, stride: len, first, len, cap: softcap });
    })
}

/// How rows are cut into tasks.
#[derive(Clone, Copy)]
struct Blocks {
    /// Rows of a task.
    rows: usize,
    /// Numbers that it has room for, for each of them.
    room: usize,
}

/// [`over_parts`] over blocks of rows: `part(rows, columns, again, room, look)`.
fn over_rows(
    cpu: &Cpu,
    op: &str,
    blocks: Blocks,
    w: usize,
    labels: &[u32],
    scales: Scales<'_>,
    losses: &mut [f32],
    gradient: Option<ViewMut<'_>>,
    part: impl Fn(Range<usize>, Range<usize>, bool, &mut [f32], &mut Look<'_>) + Sync,
) -> usize {
    if let Scales::Rows(scales) = scales {
        rows::expect_len(op, "scales", scales.len(), labels.len());
    }
    if let Some(out) = &gradient {
        rows::expect_len(op, "the gradient", out.len(), labels.len() * w);
    }
    let gradient = gradient.map(SharedView::new);
    let (losses, hits) = (SharedMut::new(losses), AtomicUsize::new(0));
    rows::over_blocks(cpu, labels.len(), blocks.rows, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let losses = unsafe { losses.slice(from, to - from) };
        // SAFETY: as above.
        let gradient = gradient.as_ref().map(|out| unsafe { out.slice(from * w, (to - from) * w) });
        let (labels, scales) = (&labels[from..to], scales.part(from, to));
        let mut room = scratch::take::<f32>((to - from) * blocks.room);
        let of_block = over_parts(cpu, w, labels, scales, losses, gradient, &mut |columns, again, look| {
            part(from..to, columns, again, &mut room, look);
        });
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
                let all = ExpSum::of(s, x);
                (x[label as usize] - all.max) - all.log()
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
                        cross_entropy(cpu, &x, w, &labels, scales, losses, to)
                    };
                    run(Scales::All(0.25), &mut losses, Some(ViewMut::F32(&mut d)));
                    let mut by_row = vec![9.0; n * w];
                    run(Scales::Rows(&[0.25; 7]), &mut losses, Some(ViewMut::F32(&mut by_row)));
                    assert_same_bits("gradient scaled by row", &by_row, &d);
                    let mut half = vec![bf16::ONE; n * w];
                    run(Scales::All(0.25), &mut losses, Some(ViewMut::Bf16(&mut half)));
                    assert_same_bits("rounded gradient", &widen(&half), &widen(&halve(&d)));
                    let scales = Scales::All(0.25);
                    let hits = cross_entropy(cpu, &x, w, &labels, scales, &mut again, None);
                    let likeliest = |(x, &label): (&[f32], &u32)| {
                        label != IGNORED && x.iter().all(|&other| other <= x[label as usize])
                    };
                    assert_eq!(hits, x.chunks(w).zip(&labels).filter(|&row| likeliest(row)).count());
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
        // rows whose logits are kept, and such that have too many
        head_is(131, 37, 1070);
        head_is(40, 3, KEPT_BYTES / (4 * KEPT_ROWS) + 31);
    }

    fn head_is(n: usize, d: usize, w: usize) {
        let (x, weight) = (normal(1, n * d), normal(2, w * d));
        let labels: Vec<u32> = (0..n).map(|i| if i % 9 == 4 { IGNORED } else { (i % w) as u32 }).collect();
        for level in crate::Level::available() {
            for (compute, cap) in [
                (gemm::Compute::F32, None),
                (gemm::Compute::Bf16, None),
                (gemm::Compute::F32, Some(5.0)),
                (gemm::Compute::Bf16, Some(30.0)),
            ] {
                let mut results = Vec::new();
                for threads in [1, 3] {
                    let cpu = Cpu::with_level(level, threads);
                    let mut packed = Packed::empty();
                    packed.pack_nt(&cpu, View::F32(&weight), 1, w, d, compute);
                    let mut logits = vec![0.0; n * w];
                    let rows = Operand::new(View::F32(&x), d);
                    gemm::matmul(&cpu, rows, &[0, n as u32], &packed, ViewMut::F32(&mut logits), false);
                    if let Some(cap) = cap {
                        crate::pointwise::softcap(&cpu, &mut logits, cap);
                    }
                    let (mut losses, mut grad) =
                        ([vec![0.0; n], vec![0.0; n]], [vec![1.0; n * w], vec![2.0; n * w]]);
                    let [one, two] = &mut losses;
                    let [d_one, d_two] = &mut grad;
                    let scales = Scales::All(0.5);
                    let to = Some(ViewMut::F32(d_one));
                    let hits = cross_entropy(&cpu, &logits, w, &labels, scales, one, to);
                    if let Some(cap) = cap {
                        crate::pointwise::softcap_backward(&cpu, &logits, cap, ViewMut::F32(d_one));
                    }
                    let to = Some(ViewMut::F32(d_two));
                    assert_eq!(head(&cpu, View::F32(&x), &packed, cap, &labels, scales, two, to), hits);
                    assert_same_bits("losses", one, two);
                    assert_same_bits("gradient", d_one, d_two);
                    assert_eq!(head(&cpu, View::F32(&x), &packed, cap, &labels, scales, one, None), hits);
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
        let mut run = |x: &[f32; 3]| {
            let mut d = [9.0; 3];
            let to = Some(ViewMut::F32(&mut d));
            cross_entropy(&cpu, x, 3, &[0], Scales::All(1.0), &mut losses, to);
            (losses[0], d)
        };
        assert_eq!(run(&[3e38, -3e38, 0.0]), (0.0, [0.0, 0.0, 0.0]));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(run(&[0.0, bad, 1.0]).0.is_nan());
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
