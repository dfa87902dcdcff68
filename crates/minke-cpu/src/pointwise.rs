//! What is done to elements one by one: biases of rows, and the soft cap of logits.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, SharedView, kernel, lanes, load, load_f32, store, store_f32};
use crate::view::{View, ViewMut};

kernel! {
    AddBias<'a>(s: S, x: View<'a>, b: &'a [f32], y: ViewMut<'a>) {
        let (mut y, d) = (y, b.len());
        for row in 0..x.len() / d {
            lanes!(d, |i, n| {
                store(s, s.add(load(s, x, row * d + i, n), load_f32(s, b, i, n)), &mut y, row * d + i, n);
            });
        }
    }
}

/// `y = x + b`, row by row: x and y [n, d], b [d]; added in f32, rounded once to the dtype of y.
///
/// The gradient of b is the sum of columns ([`crate::reduce::column_sums`]).
///
/// # Panics
/// When sizes do not fit.
pub fn add_bias(cpu: &Cpu, x: View<'_>, b: &[f32], y: ViewMut<'_>) {
    let d = b.len();
    let n = rows::count("add_bias", x.len(), d);
    rows::expect_len("add_bias", "y", y.len(), x.len());
    let y = SharedView::new(y);
    rows::over_tiles(cpu, n, d, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let y = unsafe { y.slice(from * d, (to - from) * d) };
        cpu.dispatch(AddBias { x: x.slice(from * d, to * d), b, y });
    });
}

kernel! {
    SoftCap<'a>(s: S, x: &'a mut [f32], cap: f32) {
        let (by, cap) = (s.splat(1.0 / cap), s.splat(cap));
        lanes!(x.len(), |i, n| {
            store_f32(s, s.mul(s.tanh(s.mul(load_f32(s, x, i, n), by)), cap), x, i, n);
        });
    }
}

/// `x = cap tanh(x / cap)`, in place.
pub fn softcap(cpu: &Cpu, x: &mut [f32], cap: f32) {
    let (len, x) = (x.len(), SharedMut::new(x));
    rows::over_blocks(cpu, len, rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint ranges.
        softcap_here(cpu, unsafe { x.slice(from, to - from) }, cap);
    });
}

/// [`softcap`] within a task.
pub(crate) fn softcap_here(cpu: &Cpu, x: &mut [f32], cap: f32) {
    cpu.dispatch(SoftCap { x, cap });
}

kernel! {
    SoftCapBackward<'a>(s: S, y: &'a [f32], cap: f32, d: ViewMut<'a>) {
        let (mut d, by, one) = (d, s.splat(1.0 / cap), s.splat(1.0));
        lanes!(y.len(), |i, n| {
            let t = s.mul(load_f32(s, y, i, n), by);
            let slope = s.fma(s.sub(s.zero(), t), t, one);
            store(s, s.mul(load(s, d.as_view(), i, n), slope), &mut d, i, n);
        });
    }
}

/// Gradient of [`softcap`]: `d = d (1 - (y / cap)^2)`, in place, from its result y.
///
/// # Panics
/// When lengths differ.
pub fn softcap_backward(cpu: &Cpu, y: &[f32], cap: f32, d: ViewMut<'_>) {
    rows::expect_len("softcap_backward", "d", d.len(), y.len());
    let d = SharedView::new(d);
    rows::over_blocks(cpu, y.len(), rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint ranges.
        cpu.dispatch(SoftCapBackward { y: &y[from..to], cap, d: unsafe { d.slice(from, to - from) } });
    });
}

#[cfg(test)]
mod tests {
    use minke_num::bf16;
    use minke_num::tolerance::{Tolerance, assert_same_bits};

    use super::*;
    use crate::testing::{AWKWARD, assert_gradient, everywhere, halve, normal, wide, wide_view, widen};

    #[test]
    fn biases_are_added_to_each_row() {
        for d in AWKWARD {
            for n in [0, 1, 70] {
                let (x, b) = (normal(1, n * d), normal(2, d));
                let half = halve(&x);
                for view in [View::F32(&x), View::Bf16(&half)] {
                    let got = everywhere("add_bias", |cpu| {
                        let mut y = vec![0.0; n * d];
                        add_bias(cpu, view, &b, ViewMut::F32(&mut y));
                        let mut rounded = vec![bf16::ZERO; n * d];
                        add_bias(cpu, view, &b, ViewMut::Bf16(&mut rounded));
                        assert_same_bits("bf16", &widen(&rounded), &widen(&halve(&y)));
                        y
                    });
                    let expected: Vec<f64> = wide_view(view)
                        .chunks(d)
                        .flat_map(|x| x.iter().zip(&b).map(|(x, &b)| x + f64::from(b)))
                        .collect();
                    Tolerance::new(1e-7, 1e-7).check("add_bias", &got, &expected).unwrap();
                }
            }
        }
    }

    #[test]
    fn caps_and_their_gradient_match_f64() {
        for len in AWKWARD.into_iter().chain([40_000]) {
            let (mut x, d) = (normal(1, len), normal(2, len));
            x.iter_mut().for_each(|x| *x *= 20.0);
            x[0] = 1e30;
            let got = everywhere("softcap", |cpu| {
                let (mut y, mut d) = (x.clone(), d.clone());
                softcap(cpu, &mut y, 30.0);
                softcap_backward(cpu, &y, 30.0, ViewMut::F32(&mut d));
                [y, d].concat()
            });
            let (x, d) = (wide(&x), wide(&d));
            let tanh = |x: &f64| (x / 30.0).tanh();
            let y = x.iter().map(|x| 30.0 * tanh(x));
            let back = x.iter().zip(&d).map(|(x, d)| d * (1.0 - tanh(x).powi(2)));
            let expected: Vec<f64> = y.chain(back).collect();
            Tolerance::new(2e-5, 2e-6).check("softcap", &got, &expected).unwrap();
        }
        let x = [0.3, -4.0, 11.0];
        let cap = |x: &[f64]| x.iter().map(|x| 3.0 * (x / 3.0).tanh()).sum();
        assert_gradient("softcap", cap, &x, &x.map(|x| 1.0 - (x / 3.0_f64).tanh().powi(2)));
    }
}
