//! What a policy asks of rows of logits: the distribution that was sampled from, a draw, its log-probability.
//!
//! Rollout and training go through the same three functions in the same order, so the log-probability of a token is
//! the same number to the bit in both: [`temper`], then [`draw`] or [`crate::loss::log_probs`].

use minke_num::bf16;

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, SharedView, kernel, lanes, load_f32, load_f32_or, store_f32};
use crate::softmax::{ExpSum, exp_below, row_max};
use crate::view::ViewMut;

/// The tokens that filters such as top-k and top-p left, row by row; an empty row kept all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Row r kept `ids[offsets[r]..offsets[r + 1]]`; one offset more than rows, or none where no row was filtered.
    pub offsets: Vec<u32>,
    /// Token ids.
    pub ids: Vec<u32>,
}

impl Kept {
    /// Adds a row.
    pub fn push(&mut self, ids: impl IntoIterator<Item = u32>) {
        if self.offsets.is_empty() {
            self.offsets.push(0);
        }
        self.ids.extend(ids);
        self.offsets.push(self.ids.len() as u32);
    }

    /// What row `r` kept; nothing where all was kept.
    pub fn row(&self, r: usize) -> &[u32] {
        match self.offsets.get(r..r + 2) {
            Some(&[from, to]) => &self.ids[from as usize..to as usize],
            _ => &[],
        }
    }

    /// The rows `from..to`.
    pub fn rows(&self, from: usize, to: usize) -> Kept {
        let mut part = Kept::default();
        if !self.offsets.is_empty() {
            (from..to).for_each(|r| part.push(self.row(r).iter().copied()));
        }
        part
    }
}

kernel! {
    Scale<'a>(s: S, x: &'a mut [f32], factor: f32) {
        let factor = s.splat(factor);
        lanes!(x.len(), |i, n| {
            store_f32(s, s.mul(load_f32(s, x, i, n), factor), x, i, n);
        });
    }
}

/// `x = x / temperature` in place, and minus infinity where a filter left nothing: logits [n, w] become those of the
/// distribution that is sampled.
///
/// # Panics
/// When the temperature is not above 0, sizes do not fit or a kept id is beyond the row.
pub fn temper(cpu: &Cpu, logits: &mut [f32], w: usize, temperature: f32, kept: &Kept) {
    assert!(temperature > 0.0, "temper: temperature {temperature}");
    let n = rows::count("temper", logits.len(), w);
    if temperature == 1.0 && kept.ids.is_empty() {
        return;
    }
    let factor = 1.0 / temperature;
    let logits = SharedMut::new(logits);
    rows::over_tiles(cpu, n, w, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let part = unsafe { logits.slice(from * w, (to - from) * w) };
        if temperature != 1.0 {
            cpu.dispatch(Scale { x: part, factor });
        }
        for (r, row) in (from..to).zip(part.chunks_exact_mut(w)) {
            let ids = kept.row(r);
            if !ids.is_empty() {
                let values: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
                row.fill(f32::NEG_INFINITY);
                ids.iter().zip(values).for_each(|(&id, x)| row[id as usize] = x);
            }
        }
    });
}

kernel! {
    Draw<'a>(s: S, logits: &'a [f32], w: usize, uniforms: &'a [f64], ids: &'a mut [u32], log_probs: &'a mut [f32]) {
        for (((x, &u), id), log_prob) in logits.chunks(w).zip(uniforms).zip(ids).zip(log_probs) {
            let all = ExpSum::of(s, x);
            let (highest, sum, max) = (all.max, all.sum, s.splat(all.max));
            if !(sum >= 1.0 && sum.is_finite()) {
                *id = u32::MAX;
                *log_prob = f32::NAN;
                continue;
            }
            let target = u * f64::from(sum);
            let (mut below, mut chosen, mut last) = (0.0_f64, usize::MAX, 0);
            lanes!(w, |i, n| {
                if chosen == usize::MAX {
                    let e = exp_below(s, load_f32_or(s, x, i, n, f32::NEG_INFINITY), max);
                    let mut part = [0.0; crate::simd::LANES];
                    s.store(e, &mut part);
                    // sixteen at a time, and one by one only where the target lies
                    let block = part[..n].iter().map(|&e| f64::from(e)).sum::<f64>();
                    if below + block > target {
                        let mut at = below;
                        for (lane, &e) in part[..n].iter().enumerate() {
                            at += f64::from(e);
                            if e > 0.0 {
                                last = i + lane;
                                if at > target && chosen == usize::MAX {
                                    chosen = i + lane;
                                }
                            }
                        }
                    } else if block > 0.0 {
                        last = i + (0..n).rev().find(|&lane| part[lane] > 0.0).unwrap_or(0);
                    }
                    below += block;
                }
            });
            // rounding may leave the target at the very end
            debug_assert!(chosen < w || below <= target, "draw: {below} of {target}");
            let chosen = if chosen == usize::MAX { last } else { chosen };
            *id = chosen as u32;
            *log_prob = (x[chosen] - highest) - all.log();
        }
    }
}

/// Draws a token for each row of tempered logits and gives its log-probability, which is that of
/// [`crate::loss::log_probs`] to the bit.
///
/// The token is the first whose cumulative share of `softmax(x)`, summed in f64 in the order of ids, exceeds the row's
/// uniform number in [0, 1). logits: [n, w], uniforms, ids, log_probs: [n]. A row without a finite logit, or with NaN
/// or +inf, gives the id `u32::MAX` and NaN.
///
/// # Panics
/// When sizes do not fit.
pub fn draw(cpu: &Cpu, logits: &[f32], w: usize, uniforms: &[f64], ids: &mut [u32], log_probs: &mut [f32]) {
    let n = uniforms.len();
    rows::expect_len("draw", "logits", logits.len(), n * w);
    rows::expect_len("draw", "ids", ids.len(), n);
    rows::expect_len("draw", "log_probs", log_probs.len(), n);
    let (ids, log_probs) = (SharedMut::new(ids), SharedMut::new(log_probs));
    rows::over_tiles(cpu, n, w, |from, to| {
        let len = to - from;
        // SAFETY: tasks own disjoint rows.
        let (ids, log_probs) = unsafe { (ids.slice(from, len), log_probs.slice(from, len)) };
        let logits = &logits[from * w..to * w];
        cpu.dispatch(Draw { logits, w, uniforms: &uniforms[from..to], ids, log_probs });
    });
}

/// The k likeliest tokens of each row of tempered logits, the likeliest first and ties by id, with their
/// log-probabilities; logits: [n, w], of which k are taken, at most w.
///
/// # Panics
/// When sizes do not fit.
pub fn likeliest(cpu: &Cpu, logits: &[f32], w: usize, k: usize) -> Teacher {
    let n = rows::count("likeliest", logits.len(), w);
    let k = k.min(w);
    let mut teacher = Teacher { k, ids: vec![0; n * k], log_probs: vec![0.0; n * k] };
    let (ids, log_probs) = (SharedMut::new(&mut teacher.ids), SharedMut::new(&mut teacher.log_probs));
    rows::over_tiles(cpu, n, w, |from, to| {
        let len = (to - from) * k;
        // SAFETY: tasks own disjoint rows.
        let (ids, log_probs) = unsafe { (ids.slice(from * k, len), log_probs.slice(from * k, len)) };
        let mut order: Vec<u32> = Vec::with_capacity(w);
        let rows = logits[from * w..to * w].chunks_exact(w);
        for (row, (ids, log_probs)) in rows.zip(ids.chunks_exact_mut(k).zip(log_probs.chunks_exact_mut(k))) {
            order.clear();
            order.extend(0..w as u32);
            let likelier = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            if k < w {
                order.select_nth_unstable_by(k, likelier);
            }
            order[..k].sort_unstable_by(likelier);
            ids.copy_from_slice(&order[..k]);
            let log_sum = cpu.dispatch(LogSum { x: row });
            for (out, &id) in log_probs.iter_mut().zip(&*ids) {
                *out = row[id as usize] - log_sum;
            }
        }
    });
    teacher
}

kernel! {
    Gradients<'a>(
        s: S, logits: &'a [f32], w: usize, labels: &'a [u32], log_probs: &'a [f32], scales: &'a [f32],
        out: ViewMut<'a>,
    ) {
        let mut out = out;
        for (row, (((x, &label), log_prob), scale)) in
            logits.chunks(w).zip(labels).zip(log_probs).zip(scales).enumerate()
        {
            let (log_sum, factor) = (s.splat(x[label as usize] - log_prob), s.splat(-scale));
            lanes!(w, |i, n| {
                let p = exp_below(s, load_f32_or(s, x, i, n, f32::NEG_INFINITY), log_sum);
                rows::store(s, s.mul(p, factor), &mut out, row * w + i, n);
            });
            let of_label = scale * (1.0 - log_prob.exp());
            match &mut out {
                ViewMut::F32(out) => out[row * w + label as usize] = of_label,
                ViewMut::Bf16(out) => out[row * w + label as usize] = bf16::from_f32(of_label),
            }
        }
    }
}

/// The gradient of `sum of scale_i log p_i` for the logits: `scale (onehot(label) - softmax(x))`, row by row, in one pass
/// over them, since the log-probability knows the sum that softmax divides by.
///
/// logits, out: [n, w], out rounded once; labels, log_probs (of these logits), scales: [n].
///
/// # Panics
/// When sizes do not fit or a label is beyond the row.
pub fn log_prob_gradients(
    cpu: &Cpu,
    logits: &[f32],
    w: usize,
    labels: &[u32],
    log_probs: &[f32],
    scales: &[f32],
    out: ViewMut<'_>,
) {
    let what = "log_prob_gradients";
    for (name, len) in [("log_probs", log_probs.len()), ("scales", scales.len())] {
        rows::expect_len(what, name, len, labels.len());
    }
    rows::expect_len(what, "logits", logits.len(), labels.len() * w);
    rows::expect_len(what, "the gradient", out.len(), logits.len());
    assert!(labels.iter().all(|&label| (label as usize) < w), "{what}: a label beyond rows of {w}");
    let out = SharedView::new(out);
    rows::over_tiles(cpu, labels.len(), w, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { out.slice(from * w, (to - from) * w) };
        let (labels, log_probs, scales) = (&labels[from..to], &log_probs[from..to], &scales[from..to]);
        cpu.dispatch(Gradients { logits: &logits[from * w..to * w], w, labels, log_probs, scales, out });
    });
}

kernel! {
    LogSum<'a>(s: S, x: &'a [f32]) -> f32 {
        let all = ExpSum::of(s, x);
        all.max + all.log()
    }
}

/// Which way a student is drawn to its teacher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Divergence {
    /// `KL(teacher || student)`: the student covers all that the teacher may say.
    Forward,
    /// `KL(student || teacher)`: the student keeps to what the teacher is likely to say.
    Reverse,
}

/// The likeliest tokens of a teacher at some rows, `k` each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Teacher {
    /// Tokens of each row.
    pub k: usize,
    /// Ids [n, k].
    pub ids: Vec<u32>,
    /// Their log-probabilities [n, k], at the temperature of distillation; all others together have what is left.
    pub log_probs: Vec<f32>,
}

/// The smallest share that the tail is taken to have: both logarithms of it stay finite.
const SMALLEST_TAIL: f64 = 1e-6;

/// `D(P, Q)` between a teacher's P and a student's `Q = softmax(x)`, row by row, and `scale` times its gradient with
/// respect to x in place of the logits.
///
/// Both are taken over k + 1 outcomes, the teacher's k likeliest tokens and all others as one, which bounds the
/// divergence of the whole from below and is exact when k is the vocabulary. With `g_b = dD/dQ_b` of outcome b,
/// `dD/dx_j = q_j (g_b(j) - sum_b Q_b g_b)`; forward `g_b = -P_b / Q_b`, reverse `g_b = ln(Q_b / P_b) + 1`.
///
/// logits: [n, w], tempered; scales: [n] (0 leaves a row out); out: [n], in nats.
///
/// Paper: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Gu et al. 2024, "MiniLLM", for the
/// reverse direction.
///
/// # Panics
/// When sizes do not fit or an id is beyond the row.
pub fn distill(
    cpu: &Cpu,
    logits: &mut [f32],
    w: usize,
    teacher: &Teacher,
    divergence: Divergence,
    scales: &[f32],
    out: &mut [f32],
) {
    let n = scales.len();
    let k = teacher.k;
    rows::expect_len("distill", "logits", logits.len(), n * w);
    rows::expect_len("distill", "ids", teacher.ids.len(), n * k);
    rows::expect_len("distill", "log_probs", teacher.log_probs.len(), n * k);
    rows::expect_len("distill", "out", out.len(), n);
    let (logits, out) = (SharedMut::new(logits), SharedMut::new(out));
    rows::over_tiles(cpu, n, w, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let (logits, out) = unsafe { (logits.slice(from * w, (to - from) * w), out.slice(from, to - from)) };
        for (r, (row, out)) in (from..to).zip(logits.chunks_exact_mut(w).zip(out)) {
            if scales[r] == 0.0 {
                row.fill(0.0);
                *out = 0.0;
                continue;
            }
            let sum = cpu.dispatch(Exponentials { x: row });
            let of = r * k..(r + 1) * k;
            let (value, factors, tail) =
                outcomes(row, f64::from(sum), &teacher.ids[of.clone()], &teacher.log_probs[of], divergence);
            *out = value as f32;
            let share = f64::from(scales[r]) / f64::from(sum);
            let kept: Vec<f32> = teacher.ids[r * k..(r + 1) * k]
                .iter()
                .zip(&factors)
                .map(|(&id, g)| (f64::from(row[id as usize]) * g * share) as f32)
                .collect();
            cpu.dispatch(Scale { x: row, factor: (tail * share) as f32 });
            for (&id, d) in teacher.ids[r * k..(r + 1) * k].iter().zip(kept) {
                row[id as usize] = d;
            }
        }
    });
}

kernel! {
    Exponentials<'a>(s: S, x: &'a mut [f32]) -> f32 {
        let (mut sum, max) = (s.zero(), s.splat(row_max(s, x)));
        lanes!(x.len(), |i, n| {
            let e = exp_below(s, load_f32_or(s, x, i, n, f32::NEG_INFINITY), max);
            sum = s.add(sum, e);
            store_f32(s, e, x, i, n);
        });
        s.sum(sum)
    }
}

/// The divergence, and `g_b - sum_b Q_b g_b` of each of the teacher's tokens and of the tail.
fn outcomes(
    e: &[f32],
    sum: f64,
    ids: &[u32],
    log_probs: &[f32],
    divergence: Divergence,
) -> (f64, Vec<f64>, f64) {
    let q: Vec<f64> = ids.iter().map(|&id| (f64::from(e[id as usize]) / sum).max(1e-300)).collect();
    let p: Vec<f64> = log_probs.iter().map(|&l| f64::from(l).exp()).collect();
    let whole = ids.len() >= e.len();
    let tail = |of: &[f64]| if whole { 0.0 } else { (1.0 - of.iter().sum::<f64>()).max(SMALLEST_TAIL) };
    let (p_tail, q_tail) = (tail(&p), tail(&q));
    let all = q.iter().zip(&p).chain((!whole).then_some((&q_tail, &p_tail)));
    let (mut value, mut mean) = (0.0, 0.0);
    let slope = |q: f64, p: f64| match divergence {
        Divergence::Forward => -p / q,
        Divergence::Reverse => (q / p.max(1e-300)).ln() + 1.0,
    };
    for (&q, &p) in all {
        value += match divergence {
            Divergence::Forward if p == 0.0 => 0.0,
            Divergence::Forward => p * (p / q).ln(),
            Divergence::Reverse => q * (q / p.max(1e-300)).ln(),
        };
        mean += q * slope(q, p);
    }
    let factors = q.iter().zip(&p).map(|(&q, &p)| slope(q, p) - mean).collect();
    (value, factors, if whole { 0.0 } else { slope(q_tail, p_tail) - mean })
}

#[cfg(test)]
mod tests {
    use minke_num::tolerance::Tolerance;

    use super::*;
    use crate::loss;
    use crate::testing::{AWKWARD, assert_gradient, everywhere, normal, wide};

    #[test]
    fn gradients_of_log_probabilities_are_those_of_cross_entropy() {
        for w in AWKWARD.into_iter().chain([1300]) {
            let n = 7;
            let x: Vec<f32> = normal(1, n * w).iter().map(|x| 3.0 * x).collect();
            let labels: Vec<u32> = (0..n).map(|r| (r * 5 % w) as u32).collect();
            let scales = normal(2, n);
            let minus: Vec<f32> = scales.iter().map(|s| -s).collect();
            let mut expected = vec![0.0; n * w];
            let cpu = Cpu::detect(1);
            let to = Some(ViewMut::F32(&mut expected));
            let by = loss::Scales::Rows(&minus);
            loss::cross_entropy(&cpu, &x, w, &labels, by, &mut vec![0.0; n], to);
            let got = everywhere("log_prob_gradients", |cpu| {
                let (mut log_probs, mut out) = (vec![0.0; n], vec![0.0; n * w]);
                loss::log_probs(cpu, &x, w, &labels, &mut log_probs);
                log_prob_gradients(cpu, &x, w, &labels, &log_probs, &scales, ViewMut::F32(&mut out));
                out
            });
            Tolerance::new(2e-6, 2e-6).check_f32("gradient", &got, &expected).unwrap();
        }
    }

    #[test]
    fn a_draw_follows_the_shares_and_its_log_probability_is_the_losses() {
        for w in AWKWARD.into_iter().chain([1300]) {
            if w == 0 {
                continue;
            }
            let n = 9;
            let x: Vec<f32> = normal(1, n * w).iter().map(|x| 3.0 * x).collect();
            let uniforms: Vec<f64> = (0..n).map(|i| i as f64 / n as f64).collect();
            let mut kept = Kept::default();
            for r in 0..n {
                kept.push(if r % 2 == 0 { vec![] } else { vec![(w / 2) as u32, (w - 1) as u32] });
            }
            let got = everywhere("draw", |cpu| {
                let mut x = x.clone();
                temper(cpu, &mut x, w, 0.7, &kept);
                let (mut ids, mut log_probs, mut again) = (vec![0; n], vec![0.0; n], vec![0.0; n]);
                draw(cpu, &x, w, &uniforms, &mut ids, &mut log_probs);
                loss::log_probs(cpu, &x, w, &ids, &mut again);
                assert_eq!(log_probs, again);
                for (r, &id) in ids.iter().enumerate() {
                    let row = wide(&x[r * w..(r + 1) * w]);
                    let sum: f64 = row.iter().map(|x| x.exp()).sum();
                    let below: f64 = row[..id as usize].iter().map(|x| x.exp()).sum::<f64>() / sum;
                    let share = row[id as usize].exp() / sum;
                    assert!(
                        below <= uniforms[r] + 1e-5 && uniforms[r] <= below + share + 1e-5,
                        "{w} row {r}"
                    );
                    assert!(kept.row(r).is_empty() || kept.row(r).contains(&id), "{w} row {r}: {id}");
                }
                [log_probs, ids.iter().map(|&id| id as f32).collect()].concat()
            });
            assert_eq!(got.len(), 2 * n);
        }
        let cpu = Cpu::detect(1);
        let (mut ids, mut log_probs) = ([0], [0.0]);
        draw(&cpu, &[f32::NAN, 1.0], 2, &[0.5], &mut ids, &mut log_probs);
        assert!(ids[0] == u32::MAX && log_probs[0].is_nan() || ids[0] == 1);
        draw(&cpu, &[f32::NEG_INFINITY; 2], 2, &[0.5], &mut ids, &mut log_probs);
        assert_eq!(ids[0], u32::MAX);
    }

    #[test]
    fn the_likeliest_come_first() {
        for w in AWKWARD.into_iter().chain([1300]) {
            let x: Vec<f32> = normal(1, 3 * w).iter().map(|x| (4.0 * x).round()).collect();
            for k in [1, 4, w] {
                everywhere("likeliest", |cpu| {
                    let top = likeliest(cpu, &x, w, k);
                    let mut all = [0.0; 3];
                    for (r, row) in x.chunks(w).enumerate() {
                        let mut order: Vec<u32> = (0..w as u32).collect();
                        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
                        assert_eq!(top.ids[r * top.k..(r + 1) * top.k], order[..top.k]);
                        let labels = [top.ids[r * top.k]];
                        loss::log_probs(cpu, row, w, &labels, &mut all[r..=r]);
                        assert!((all[r] - top.log_probs[r * top.k]).abs() < 1e-5);
                    }
                    top.log_probs
                });
            }
        }
    }

    fn divergence_ref(x: &[f64], ids: &[usize], p: &[f64], which: Divergence) -> f64 {
        let sum: f64 = x.iter().map(|x| x.exp()).sum();
        let mut q: Vec<f64> = ids.iter().map(|&id| x[id].exp() / sum).collect();
        let mut p = p.to_vec();
        if ids.len() < x.len() {
            q.push(1.0 - q.iter().sum::<f64>());
            p.push(1.0 - p.iter().sum::<f64>());
        }
        let kl = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * (a / b).ln()).sum::<f64>();
        match which {
            Divergence::Forward => kl(&p, &q),
            Divergence::Reverse => kl(&q, &p),
        }
    }

    #[test]
    fn distillation_matches_f64_and_differences() {
        for which in [Divergence::Forward, Divergence::Reverse] {
            for (w, k) in [(9, 3), (40, 40), (33, 1), (17, 16)] {
                let x: Vec<f32> = normal(1, w);
                let t = wide(&normal(2, w));
                let sum: f64 = t.iter().map(|t| t.exp()).sum();
                let ids: Vec<usize> = (0..k).map(|i| i * 7 % w).collect();
                if ids.iter().collect::<std::collections::BTreeSet<_>>().len() < k {
                    continue;
                }
                let p: Vec<f64> = ids.iter().map(|&id| t[id].exp() / sum).collect();
                let teacher = Teacher {
                    k,
                    ids: ids.iter().map(|&id| id as u32).collect(),
                    log_probs: p.iter().map(|p| p.ln() as f32).collect(),
                };
                let got = everywhere("distill", |cpu| {
                    let (mut d, mut out) = (x.clone(), vec![0.0]);
                    distill(cpu, &mut d, w, &teacher, which, &[0.5], &mut out);
                    [out, d].concat()
                });
                let x = wide(&x);
                let value = divergence_ref(&x, &ids, &p, which);
                Tolerance::new(2e-6, 2e-5).check("divergence", &got[..1], &[value]).unwrap();
                let d = wide(&got[1..]);
                assert_gradient("d_logits", |x| 0.5 * divergence_ref(x, &ids, &p, which), &x, &d);
            }
        }
    }
}
