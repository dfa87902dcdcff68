//! Root-mean-square normalisation.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, SharedView, kernel, lanes, load, load_f32, store, store_f32};
use crate::scratch::with_scratch;
use crate::simd::Simd;
use crate::view::{View, ViewMut};

/// Rows whose share of the weight's gradient is summed in one chain.
const BLOCK: usize = 64;

/// The gain of a norm: `w + offset`. Gemma's checkpoints hold what is to be added to one.
#[derive(Clone, Copy, Debug)]
pub struct Gain<'a> {
    /// As stored: [d].
    pub w: &'a [f32],
    /// Added to each.
    pub offset: f32,
}

impl<'a> From<&'a [f32]> for Gain<'a> {
    fn from(w: &'a [f32]) -> Self {
        Self { w, offset: 0.0 }
    }
}

impl Gain<'_> {
    fn len(self) -> usize {
        self.w.len()
    }

    #[inline(always)]
    fn load<S: Simd>(self, s: S, at: usize, n: usize) -> S::V {
        s.add(load_f32(s, self.w, at, n), s.splat(self.offset))
    }
}

/// `1 / sqrt(mean(x^2) + eps)`
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: View<'_>, d: usize, eps: f32) -> f32 {
    1.0 / (rows::dot(s, x, x, d) / d as f32 + eps).sqrt()
}

#[inline(always)]
fn scale_row<S: Simd>(s: S, x: View<'_>, w: Gain<'_>, rstd: f32, y: &mut ViewMut<'_>, at: usize) {
    let rstd = s.splat(rstd);
    lanes!(w.len(), |i, n| {
        store(s, s.mul(w.load(s, i, n), s.mul(load(s, x, i, n), rstd)), y, at + i, n);
    });
}

kernel! {
    Forward<'a>(s: S, x: View<'a>, w: Gain<'a>, eps: f32, y: ViewMut<'a>, rstd: &'a mut [f32]) {
        let (mut y, d) = (y, w.len());
        for (row, rstd) in rstd.iter_mut().enumerate() {
            let x = x.slice(row * d, (row + 1) * d);
            *rstd = inverse_rms(s, x, d, eps);
            scale_row(s, x, w, *rstd, &mut y, row * d);
        }
    }
}

/// `y = w (x rstd)`, w the gain, `rstd = 1 / sqrt(mean(x^2) + eps)`, row by row; rstd is kept for the backward pass.
///
/// x: [n, d], w: [d], y: [n, d], rstd: [n]; arithmetic in f32, y rounded once. Heads of a row are rows of their own.
///
/// # Panics
/// When sizes do not fit.
///
/// Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4.
pub fn rmsnorm(cpu: &Cpu, x: View<'_>, w: Gain<'_>, eps: f32, y: ViewMut<'_>, rstd: &mut [f32]) {
    let (n, d) = (rstd.len(), w.len());
    rows::expect_len("rmsnorm", "x", x.len(), n * d);
    rows::expect_len("rmsnorm", "y", y.len(), n * d);
    let (y, rstd) = (SharedView::new(y), SharedMut::new(rstd));
    rows::over_tiles(cpu, n, d, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let (y, rstd) = unsafe { (y.slice(from * d, (to - from) * d), rstd.slice(from, to - from)) };
        cpu.dispatch(Forward { x: x.slice(from * d, to * d), w, eps, y, rstd });
    });
}

kernel! {
    AddForward<'a>(
        s: S, x: &'a [f32], delta: View<'a>, w: Gain<'a>, eps: f32, sum: &'a mut [f32], y: ViewMut<'a>,
        rstd: &'a mut [f32],
    ) {
        let (mut y, d) = (y, w.len());
        for (row, rstd) in rstd.iter_mut().enumerate() {
            let at = row * d;
            lanes!(d, |i, n| {
                store_f32(s, s.add(load_f32(s, x, at + i, n), load(s, delta, at + i, n)), sum, at + i, n);
            });
            let sum = View::F32(&sum[at..at + d]);
            *rstd = inverse_rms(s, sum, d, eps);
            scale_row(s, sum, w, *rstd, &mut y, at);
        }
    }
}

/// `sum = x + delta`, `y = rmsnorm(sum)`: the residual stream and the next layer's input in one pass.
///
/// x, delta, sum, y: [n, d], w: [d], rstd: [n]; the same bits as the addition followed by [`rmsnorm`].
///
/// # Panics
/// When sizes do not fit.
pub fn add_rmsnorm(
    cpu: &Cpu,
    x: &[f32],
    delta: View<'_>,
    w: Gain<'_>,
    eps: f32,
    sum: &mut [f32],
    y: ViewMut<'_>,
    rstd: &mut [f32],
) {
    let (n, d) = (rstd.len(), w.len());
    for (what, len) in [("x", x.len()), ("delta", delta.len()), ("sum", sum.len()), ("y", y.len())] {
        rows::expect_len("add_rmsnorm", what, len, n * d);
    }
    let (y, rstd, sum) = (SharedView::new(y), SharedMut::new(rstd), SharedMut::new(sum));
    rows::over_tiles(cpu, n, d, |from, to| {
        let (at, len) = (from * d, (to - from) * d);
        // SAFETY: tasks own disjoint rows.
        let (y, rstd, sum) = unsafe { (y.slice(at, len), rstd.slice(from, to - from), sum.slice(at, len)) };
        cpu.dispatch(AddForward {
            x: &x[at..at + len],
            delta: delta.slice(at, at + len),
            w,
            eps,
            sum,
            y,
            rstd,
        });
    });
}

kernel! {
    Backward<'a>(
        s: S, x: View<'a>, w: Gain<'a>, rstd: &'a [f32], d_y: View<'a>, d_sum: Option<&'a [f32]>, d_x: ViewMut<'a>,
        d_w: &'a mut [f32],
    ) {
        let (mut d_x, d) = (d_x, w.len());
        d_w.fill(0.0);
        for (row, &rstd) in rstd.iter().enumerate() {
            let at = row * d;
            let mut acc = s.zero();
            lanes!(d, |i, n| {
                let g = s.mul(load(s, d_y, at + i, n), w.load(s, i, n));
                acc = s.fma(g, load(s, x, at + i, n), acc);
            });
            let slope = s.splat(-(s.sum(acc) * rstd * rstd / d as f32));
            let rstd = s.splat(rstd);
            lanes!(d, |i, n| {
                let (x, d_y) = (load(s, x, at + i, n), load(s, d_y, at + i, n));
                let g = s.mul(d_y, w.load(s, i, n));
                let mut d_row = s.mul(rstd, s.fma(slope, x, g));
                if let Some(d_sum) = d_sum {
                    d_row = s.add(d_row, load_f32(s, d_sum, at + i, n));
                }
                store(s, d_row, &mut d_x, at + i, n);
                let share = s.fma(d_y, s.mul(x, rstd), load_f32(s, d_w, i, n));
                store_f32(s, share, d_w, i, n);
            });
        }
    }
}

kernel! {
    /// `acc += the rows of parts`, ascending.
    AddRows<'a>(s: S, parts: &'a [f32], from: usize, acc: &'a mut [f32], width: usize) {
        let rows = parts.len() / width;
        lanes!(acc.len(), |i, n| {
            let mut total = load_f32(s, acc, i, n);
            for row in 0..rows {
                total = s.add(total, load_f32(s, parts, row * width + from + i, n));
            }
            store_f32(s, total, acc, i, n);
        });
    }
}

/// Gradient of [`rmsnorm`]: `d_x = rstd (g - x rstd^2 mean(g x)) + d_sum` with `g = w d_y`;
/// `d_w += sum over rows of d_y (x rstd)`.
///
/// x, `d_y`, `d_x`, `d_sum`: [n, d], w, `d_w`: [d], rstd: [n]. `d_sum` is the gradient that reaches x past the norm.
/// `d_w` is summed in blocks of 64 rows, then over blocks, ascending.
///
/// # Panics
/// When sizes do not fit.
pub fn rmsnorm_backward(
    cpu: &Cpu,
    x: View<'_>,
    w: Gain<'_>,
    rstd: &[f32],
    d_y: View<'_>,
    d_sum: Option<&[f32]>,
    d_x: ViewMut<'_>,
    d_w: &mut [f32],
) {
    let (n, d) = (rstd.len(), w.len());
    let d_sum_len = d_sum.map_or(n * d, <[f32]>::len);
    for (what, len) in [("x", x.len()), ("d_y", d_y.len()), ("d_x", d_x.len()), ("d_sum", d_sum_len)] {
        rows::expect_len("rmsnorm_backward", what, len, n * d);
    }
    rows::expect_len("rmsnorm_backward", "d_w", d_w.len(), d);
    if n * d == 0 {
        return;
    }
    with_scratch(n.div_ceil(BLOCK) * d, |parts: &mut [f32]| {
        let (shared_dx, shared_parts) = (SharedView::new(d_x), SharedMut::new(parts));
        rows::over_blocks(cpu, n, BLOCK, |from, to| {
            let (at, end) = (from * d, to * d);
            // SAFETY: tasks own disjoint rows, and one row of `parts` each.
            let (d_x, d_w) =
                unsafe { (shared_dx.slice(at, end - at), shared_parts.slice(from / BLOCK * d, d)) };
            cpu.dispatch(Backward {
                x: x.slice(at, end),
                w,
                rstd: &rstd[from..to],
                d_y: d_y.slice(at, end),
                d_sum: d_sum.map(|d_sum| &d_sum[at..end]),
                d_x,
                d_w,
            });
        });
        let (parts, shared) = (&*parts, SharedMut::new(d_w));
        rows::over_blocks(cpu, d, 256, |from, to| {
            // SAFETY: tasks own disjoint columns.
            let acc = unsafe { shared.slice(from, to - from) };
            cpu.dispatch(AddRows { parts, from, acc, width: d });
        });
    });
}

#[cfg(test)]
mod tests {
    use minke_num::bf16;
    use minke_num::tolerance::{Tolerance, assert_same_bits};

    use super::*;
    use crate::testing::{AWKWARD, assert_gradient, dot, everywhere, halve, normal, wide, wide_view, widen};

    const EPS: f32 = 1e-6;

    fn norm_ref(x: &[f64], w: &[f64]) -> Vec<f64> {
        let rows = x.chunks(w.len()).flat_map(|x| {
            let rstd = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(EPS)).sqrt();
            x.iter().zip(w).map(move |(x, w)| w * (x * rstd)).collect::<Vec<_>>()
        });
        rows.collect()
    }

    /// Gradients for x and w, by the textbook formula over normalised values.
    fn backward_ref(x: &[f64], w: &[f64], d_y: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let d = w.len();
        let (mut d_x, mut d_w) = (Vec::new(), vec![0.0; d]);
        for (x, d_y) in x.chunks(d).zip(d_y.chunks(d)) {
            let rstd = 1.0 / (dot(x, x) / d as f64 + f64::from(EPS)).sqrt();
            let unit: Vec<f64> = x.iter().map(|x| x * rstd).collect();
            let g: Vec<f64> = d_y.iter().zip(w).map(|(d_y, w)| d_y * w).collect();
            let mean = dot(&g, &unit) / d as f64;
            d_x.extend(g.iter().zip(&unit).map(|(g, unit)| rstd * (g - unit * mean)));
            d_w.iter_mut().zip(d_y.iter().zip(&unit)).for_each(|(d_w, (d_y, unit))| *d_w += d_y * unit);
        }
        (d_x, d_w)
    }

    #[test]
    fn forward_matches_f64() {
        for d in AWKWARD {
            for n in [1, 2, 70] {
                let (x, w) = (normal(1, n * d), normal(2, d));
                let half = halve(&x);
                for view in [View::F32(&x), View::Bf16(&half)] {
                    let got = everywhere("rmsnorm", |cpu| {
                        let (mut y, mut rstd) = (vec![0.0; n * d], vec![0.0; n]);
                        rmsnorm(cpu, view, w[..].into(), EPS, ViewMut::F32(&mut y), &mut rstd);
                        y
                    });
                    let expected = norm_ref(&wide_view(view), &wide(&w));
                    Tolerance::new(1e-6, 2e-6).check("rmsnorm", &got, &expected).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_row_alone_is_the_row_among_others_and_bf16_rounds_once() {
        let (n, d) = (133, 33);
        let (x, w) = (normal(1, n * d), normal(2, d));
        let cpu = Cpu::detect(2);
        let (mut y, mut half, mut rstd) = (vec![0.0; n * d], vec![bf16::ZERO; n * d], vec![0.0; n]);
        rmsnorm(&cpu, View::F32(&x), w[..].into(), EPS, ViewMut::F32(&mut y), &mut rstd);
        rmsnorm(&cpu, View::F32(&x), w[..].into(), EPS, ViewMut::Bf16(&mut half), &mut rstd);
        assert_same_bits("bf16", &widen(&half), &widen(&halve(&y)));
        for row in 0..n {
            let part = row * d..(row + 1) * d;
            let (mut alone, mut rstd) = (vec![0.0; d], [0.0]);
            rmsnorm(
                &cpu,
                View::F32(&x[part.clone()]),
                w[..].into(),
                EPS,
                ViewMut::F32(&mut alone),
                &mut rstd,
            );
            assert_same_bits("alone", &alone, &y[part]);
        }
    }

    #[test]
    fn addition_is_the_addition_before() {
        for d in AWKWARD {
            let n = 67;
            let (x, delta, w) = (normal(1, n * d), normal(3, n * d), normal(2, d));
            let half = halve(&delta);
            let got = everywhere("add_rmsnorm", |cpu| {
                let (mut sum, mut y, mut rstd) = (vec![0.0; n * d], vec![0.0; n * d], vec![0.0; n]);
                add_rmsnorm(
                    cpu,
                    &x,
                    View::Bf16(&half),
                    w[..].into(),
                    EPS,
                    &mut sum,
                    ViewMut::F32(&mut y),
                    &mut rstd,
                );
                [sum, y, rstd].concat()
            });
            let sum: Vec<f32> = x.iter().zip(widen(&half)).map(|(x, delta)| x + delta).collect();
            let (mut y, mut rstd) = (vec![0.0; n * d], vec![0.0; n]);
            rmsnorm(&Cpu::detect(1), View::F32(&sum), w[..].into(), EPS, ViewMut::F32(&mut y), &mut rstd);
            assert_same_bits("add_rmsnorm", &got, &[sum, y, rstd].concat());
        }
    }

    #[test]
    fn formula_matches_differences() {
        let (n, d) = (3, 7);
        let (x, w, d_y) = (wide(&normal(1, n * d)), wide(&normal(2, d)), wide(&normal(3, n * d)));
        let (d_x, d_w) = backward_ref(&x, &w, &d_y);
        assert_gradient("d_x", |x| dot(&norm_ref(x, &w), &d_y), &x, &d_x);
        assert_gradient("d_w", |w| dot(&norm_ref(&x, w), &d_y), &w, &d_w);
    }

    #[test]
    fn backward_matches_f64() {
        for d in AWKWARD {
            for n in [1, 64, 130] {
                let (x, w, d_y, d_sum) = (normal(1, n * d), normal(2, d), normal(3, n * d), normal(4, n * d));
                let (x_half, dy_half) = (halve(&x), halve(&d_y));
                for (x, d_y) in
                    [(View::F32(&x), View::F32(&d_y)), (View::Bf16(&x_half), View::Bf16(&dy_half))]
                {
                    let got = everywhere("rmsnorm_backward", |cpu| {
                        let (mut y, mut rstd) = (vec![0.0; n * d], vec![0.0; n]);
                        rmsnorm(cpu, x, w[..].into(), EPS, ViewMut::F32(&mut y), &mut rstd);
                        let (mut d_x, mut d_w) = (vec![0.0; n * d], vec![0.5; d]);
                        let out = ViewMut::F32(&mut d_x);
                        rmsnorm_backward(cpu, x, w[..].into(), &rstd, d_y, Some(&d_sum), out, &mut d_w);
                        [d_x, d_w].concat()
                    });
                    let (mut d_x, d_w) = backward_ref(&wide_view(x), &wide(&w), &wide_view(d_y));
                    d_x.iter_mut().zip(&d_sum).for_each(|(d_x, d_sum)| *d_x += f64::from(*d_sum));
                    d_x.extend(d_w.iter().map(|d_w| d_w + 0.5));
                    // one-wide rows: x rstd is +-1 and the gradient is what is left of g - g
                    Tolerance::new(2e-5, 1e-5).check("rmsnorm_backward", &got, &d_x).unwrap();
                }
            }
        }
    }

    #[test]
    fn an_offset_is_added_to_the_gain() {
        let (n, d) = (9, 33);
        let (x, w, d_y) = (normal(1, n * d), normal(2, d), normal(3, n * d));
        let whole: Vec<f32> = w.iter().map(|w| 1.0 + w).collect();
        let run = |w: Gain<'_>| {
            let (mut y, mut rstd) = (vec![0.0; n * d], vec![0.0; n]);
            let cpu = Cpu::detect(1);
            rmsnorm(&cpu, View::F32(&x), w, EPS, ViewMut::F32(&mut y), &mut rstd);
            let (mut d_x, mut d_w) = (vec![0.0; n * d], vec![0.0; d]);
            let out = ViewMut::F32(&mut d_x);
            rmsnorm_backward(&cpu, View::F32(&x), w, &rstd, View::F32(&d_y), None, out, &mut d_w);
            [y, d_x, d_w].concat()
        };
        assert_same_bits("1 + w", &run(Gain { w: &w, offset: 1.0 }), &run(whole[..].into()));
    }
}
