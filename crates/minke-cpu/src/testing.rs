//! What the tests of the row kernels share.

use minke_num::tolerance::assert_same_bits;
use minke_num::{bf16, rng};

use crate::{Cpu, Level, View};

/// Widths around the sizes of vectors and tiles.
pub const AWKWARD: [usize; 12] = [1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 129, 255];

/// Normal draws, of standard deviation 1.
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    rng::fill_normal(seed, 0, 1.0, &mut x);
    x
}

/// Rounded to bf16.
pub fn halve(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// Widened from bf16.
pub fn widen(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// In f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// A view of either dtype in f64.
pub fn wide_view(x: View<'_>) -> Vec<f64> {
    match x {
        View::F32(x) => wide(x),
        View::Bf16(x) => wide(&widen(x)),
    }
}

/// Runs `f` on every level with 1, 2 and 3 threads, asserts the same bits everywhere, and returns them.
pub fn everywhere(what: &str, f: impl Fn(&Cpu) -> Vec<f32>) -> Vec<f32> {
    let expected = f(&Cpu::with_level(Level::SCALAR, 1));
    for level in Level::available() {
        for threads in 1..=3 {
            let got = f(&Cpu::with_level(level, threads));
            assert_same_bits(&format!("{what} on {} with {threads} threads", level.name()), &got, &expected);
        }
    }
    expected
}

/// Asserts that `gradient` is that of `f` at `x`, by central differences in f64.
pub fn assert_gradient(what: &str, f: impl Fn(&[f64]) -> f64, x: &[f64], gradient: &[f64]) {
    assert_eq!(x.len(), gradient.len());
    let mut at = x.to_vec();
    for i in 0..x.len() {
        let step = 1e-5 * x[i].abs().max(1.0);
        at[i] = x[i] + step;
        let above = f(&at);
        at[i] = x[i] - step;
        let below = f(&at);
        at[i] = x[i];
        let difference = (above - below) / (2.0 * step);
        let bound = 1e-6 + 1e-6 * difference.abs();
        assert!(
            (difference - gradient[i]).abs() < bound,
            "{what}[{i}]: formula {}, differences {difference}",
            gradient[i]
        );
    }
}

/// `sum of a[i] b[i]`
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
