//! Softmax over rows.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, kernel, lanes, load_f32, load_f32_or, store_f32};
use crate::simd::Simd;

/// The largest element, NaN aside; -inf for none.
#[inline(always)]
pub(crate) fn row_max<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut max = s.splat(f32::NEG_INFINITY);
    lanes!(x.len(), |i, n| {
        max = s.max(load_f32_or(s, x, i, n, f32::NEG_INFINITY), max);
    });
    s.max_lane(max)
}

/// `e^(x - max)`; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp_below<S: Simd>(s: S, x: S::V, max: S::V) -> S::V {
    s.exp(s.sub(x, max))
}

/// `sum of e^(x - max)` in one chain of lanes.
#[inline(always)]
fn exp_sum<S: Simd>(s: S, x: &[f32], max: f32) -> f32 {
    let (mut sum, max) = (s.zero(), s.splat(max));
    lanes!(x.len(), |i, n| {
        sum = s.add(sum, exp_below(s, load_f32_or(s, x, i, n, f32::NEG_INFINITY), max));
    });
    s.sum(sum)
}

/// Elements of a row that [`ExpSum`] takes at a time.
pub(crate) const PART: usize = 512;

/// `sum of e^(x - max)` over a row that comes in parts, with the largest element so far: what was summed is scaled where a
/// part has a larger one (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). All that is known of
/// a row's logits is computed from this sum, whether the row exists as a whole or not, so that all agree to the bit.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
pub(crate) struct ExpSum {
    pub max: f32,
    pub sum: f32,
}

impl ExpSum {
    /// Of nothing.
    pub const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Of a whole row.
    #[inline(always)]
    pub fn of<S: Simd>(s: S, row: &[f32]) -> Self {
        let mut all = Self::EMPTY;
        for part in row.chunks(PART) {
            all = all.with(s, part);
        }
        all
    }

    /// With the row's next [`PART`] elements (at its end: those that are left).
    #[inline(always)]
    pub fn with<S: Simd>(self, s: S, part: &[f32]) -> Self {
        let max = row_max(s, part).max(self.max);
        // where all are -inf, each of them is as far below 0 as below anything; NaN still shows
        let top = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let before = if self.max < max {
            self.sum * s.max_lane(exp_below(s, s.splat(self.max), s.splat(top)))
        } else {
            self.sum
        };
        Self { max, sum: before + exp_sum(s, part, top) }
    }

    /// `ln of the sum of e^x`, less the largest.
    #[inline(always)]
    pub fn log(self) -> f32 {
        natural_log(self.sum)
    }
}

/// One row of softmax.
#[inline(always)]
pub(crate) fn softmax_row<S: Simd>(s: S, x: &[f32], out: &mut [f32]) {
    let max = row_max(s, x);
    let (mut sum, max) = (s.zero(), s.splat(max));
    lanes!(x.len(), |i, n| {
        let e = exp_below(s, load_f32_or(s, x, i, n, f32::NEG_INFINITY), max);
        sum = s.add(sum, e);
        store_f32(s, e, out, i, n);
    });
    let sum = s.splat(s.sum(sum));
    lanes!(x.len(), |i, n| {
        store_f32(s, s.div(load_f32(s, out, i, n), sum), out, i, n);
    });
}

kernel! {
    Softmax<'a>(s: S, x: &'a [f32], width: usize, out: &'a mut [f32], log: bool) {
        for (x, out) in x.chunks(width).zip(out.chunks_mut(width)) {
            if log {
                let all = ExpSum::of(s, x);
                let (max, log_sum) = (s.splat(all.max), s.splat(all.log()));
                lanes!(width, |i, n| {
                    store_f32(s, s.sub(s.sub(load_f32(s, x, i, n), max), log_sum), out, i, n);
                });
            } else {
                softmax_row(s, x, out);
            }
        }
    }
}

/// `ln x`, rounded from f64: the same on every libm that is right to an ulp of f64.
#[inline(always)]
pub(crate) fn natural_log(x: f32) -> f32 {
    f64::from(x).ln() as f32
}

fn run(cpu: &Cpu, op: &str, x: &[f32], width: usize, out: &mut [f32], log: bool) {
    let n = rows::count(op, x.len(), width);
    rows::expect_len(op, "out", out.len(), x.len());
    let shared = SharedMut::new(out);
    rows::over_tiles(cpu, n, width, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { shared.slice(from * width, (to - from) * width) };
        cpu.dispatch(Softmax { x: &x[from * width..to * width], width, out, log });
    });
}

/// `out = e^(x - max) / sum of e^(x - max)`, row by row; x, out: [n, width].
///
/// # Panics
/// When sizes do not fit.
pub fn softmax(cpu: &Cpu, x: &[f32], width: usize, out: &mut [f32]) {
    run(cpu, "softmax", x, width, out, false);
}

/// `out = (x - max) - ln(sum of e^(x - max))`, row by row; x, out: [n, width].
///
/// # Panics
/// When sizes do not fit.
pub fn log_softmax(cpu: &Cpu, x: &[f32], width: usize, out: &mut [f32]) {
    run(cpu, "log_softmax", x, width, out, true);
}

#[cfg(test)]
mod tests {
    use minke_num::tolerance::Tolerance;

    use super::*;
    use crate::testing::{AWKWARD, everywhere, normal, wide};

    #[test]
    fn matches_f64() {
        for width in AWKWARD {
            for scale in [1.0, 30.0, 1e38] {
                let x: Vec<f32> = normal(1, 5 * width).iter().map(|x| x.clamp(-3.0, 3.0) * scale).collect();
                let run = |log: bool| {
                    everywhere("softmax", |cpu| {
                        let mut out = vec![0.0; x.len()];
                        if log {
                            log_softmax(cpu, &x, width, &mut out);
                        } else {
                            softmax(cpu, &x, width, &mut out);
                        }
                        out
                    })
                };
                let (mut p, mut log_p) = (Vec::new(), Vec::new());
                for row in wide(&x).chunks(width) {
                    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
                    p.extend(row.iter().map(|x| (x - max).exp() / sum));
                    log_p.extend(row.iter().map(|x| x - max - sum.ln()));
                }
                Tolerance::new(1e-7, 5e-6).check("softmax", &run(false), &p).unwrap();
                if scale < 1e38 {
                    Tolerance::new(1e-6, 1e-6).check("log_softmax", &run(true), &log_p).unwrap();
                }
            }
        }
    }

    #[test]
    fn masked_elements_are_zero_and_nan_is_seen() {
        let cpu = Cpu::detect(1);
        let mut out = [9.0; 3];
        softmax(&cpu, &[0.0, f32::NEG_INFINITY, 0.0], 3, &mut out);
        assert_eq!(out, [0.5, 0.0, 0.5]);
        softmax(&cpu, &[0.0, f32::NAN, 0.0], 3, &mut out);
        assert!(out.iter().all(|x| x.is_nan()));
        softmax(&cpu, &[], 3, &mut []);
    }
}
