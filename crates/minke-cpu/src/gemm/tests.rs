//! The three products against an f64 reference, on every level, and the bit contract.

use minke_num::tolerance::{Tolerance, assert_same_bits};
use minke_num::{bf16, rng};

use super::*;
use crate::cpu::Cpu;
use crate::simd::Level;
use crate::view::ViewMut;

fn normal(stream: u64, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    rng::fill_normal(5, stream, 1.0, &mut x);
    x
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

/// c [m, n] = a [m, k] b [k, n] by strides, in f64.
fn product_ref(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f64> {
    (0..m * n).map(|x| (0..k).map(|p| f64::from(a(x / n, p)) * f64::from(b(p, x % n))).sum()).collect()
}

const SIZES: [(usize, usize, usize); 15] = [
    (1, 1, 1),
    (1, 33, 17),
    (1, 300, 700),
    (2, 32, 64),
    (3, 5, 7),
    (13, 31, 15),
    (14, 32, 16),
    (15, 48, 33),
    (17, 80, 63),
    (65, 127, 129),
    (113, 16, 255),
    (0, 8, 8),
    (4, 40, 1),
    (129, 65, 300),
    (230, 270, 513),
];

#[test]
fn three_products_match_the_reference() {
    for level in Level::available() {
        let cpu = Cpu::with_level(level, 2);
        for compute in [Compute::F32, Compute::Bf16] {
            for (m, n, k) in SIZES {
                let cut = |x: Vec<f32>| if compute == Compute::Bf16 { rounded(&x) } else { x };
                // pair sums round differently; both are chains over the depth
                let bound = Tolerance::f32_sum(k, (k as f64).sqrt());
                let (x, w) = (normal(1, m * k), normal(2, n * k));
                let (xr, wr) = (cut(x.clone()), cut(w.clone()));
                let mut b = Packed::empty();
                b.pack_nt(&cpu, View::F32(&w), 1, n, k, compute);
                let mut y = vec![f32::NAN; m * n];
                matmul(&cpu, Operand::new(View::F32(&x), k), &[0, m as u32], &b, ViewMut::F32(&mut y), false);
                let e = product_ref(m, n, k, |i, p| xr[i * k + p], |p, j| wr[j * k + p]);
                bound.check(&format!("nt {m}x{n}x{k} {compute:?} {}", level.name()), &y, &e).unwrap();
                // the same weights across: dx [m, k] = dy [m, n] w [n, k]
                let dy = normal(3, m * n);
                let dyr = cut(dy.clone());
                b.pack_nn(&cpu, View::F32(&w), 1, n, k, compute);
                let mut dx = vec![f32::NAN; m * k];
                matmul(
                    &cpu,
                    Operand::new(View::F32(&dy), n),
                    &[0, m as u32],
                    &b,
                    ViewMut::F32(&mut dx),
                    false,
                );
                let e = product_ref(m, k, n, |i, p| dyr[i * n + p], |p, j| wr[p * k + j]);
                let across = Tolerance::f32_sum(n, (n as f64).sqrt());
                across.check(&format!("nn {m}x{n}x{k} {compute:?} {}", level.name()), &dx, &e).unwrap();
                // dw [n, k] += dyᵀ x, from what is there
                let start = normal(4, n * k);
                let mut dw = start.clone();
                let (a, b) = (Operand::new(View::F32(&dy), n), Operand::new(View::F32(&x), k));
                matmul_tn(&cpu, a, b, &[0, m as u32], compute, &mut dw, true);
                let mut e = product_ref(n, k, m, |i, p| dyr[p * n + i], |p, j| xr[p * k + j]);
                e.iter_mut().zip(&start).for_each(|(e, &s)| *e += f64::from(s));
                let down = Tolerance::f32_sum(m + 1, (m as f64).sqrt() + 1.0);
                down.check(&format!("tn {m}x{n}x{k} {compute:?} {}", level.name()), &dw, &e).unwrap();
            }
        }
    }
}

#[test]
fn a_row_alone_is_the_row_in_a_batch_at_any_thread_count() {
    let (m, n, k) = (131, 208, 97);
    let (x, w) = (normal(1, m * k), normal(2, n * k));
    for level in Level::available() {
        for compute in [Compute::F32, Compute::Bf16] {
            let one = Cpu::with_level(level, 1);
            let mut b = Packed::empty();
            b.pack_nt(&one, View::F32(&w), 1, n, k, compute);
            let mut whole = vec![0.0; m * n];
            matmul(&one, Operand::new(View::F32(&x), k), &[0, m as u32], &b, ViewMut::F32(&mut whole), false);
            for threads in [2, 3] {
                let cpu = Cpu::with_level(level, threads);
                let mut y = vec![0.0; m * n];
                matmul(&cpu, Operand::new(View::F32(&x), k), &[0, m as u32], &b, ViewMut::F32(&mut y), false);
                assert_same_bits("threads", &y, &whole);
                let mut dw = [vec![0.0; n * k], vec![0.0; n * k]];
                for (cpu, dw) in [&one, &cpu].into_iter().zip(&mut dw) {
                    let (a, b) = (Operand::new(View::F32(&whole), n), Operand::new(View::F32(&x), k));
                    matmul_tn(cpu, a, b, &[0, m as u32], compute, dw, false);
                }
                assert_same_bits("threads, tn", &dw[0], &dw[1]);
            }
            for (first, rows) in [(0, 1), (130, 1), (5, 2), (17, 40), (100, 31)] {
                let part = Operand::new(View::F32(&x[first * k..(first + rows) * k]), k);
                let mut y = vec![0.0; rows * n];
                matmul(&one, part, &[0, rows as u32], &b, ViewMut::F32(&mut y), false);
                assert_same_bits("rows", &y, &whole[first * n..(first + rows) * n]);
            }
        }
    }
}

/// Few rows may take two panels at once: whole ones, halves and parts, into either dtype, with sums that go on.
#[test]
fn few_rows_are_those_of_a_batch_at_any_width() {
    let (m, k) = (23, 1301);
    for level in Level::available() {
        for (compute, n) in [Compute::F32, Compute::Bf16]
            .into_iter()
            .flat_map(|compute| [16, 48, 63, 64, 79, 80, 208].map(|n| (compute, n)))
        {
            let (x, w, before) = (normal(1, m * k), normal(2, n * k), normal(3, m * n));
            let cpu = Cpu::with_level(level, 1);
            let mut b = Packed::empty();
            b.pack_nt(&cpu, View::F32(&w), 1, n, k, compute);
            let product = |rows: Range<usize>, accumulate: bool| {
                let (x, rows_n) = (&x[rows.start * k..rows.end * k], rows.start * n..rows.end * n);
                let (offsets, mut y) = ([0, rows.len() as u32], before[rows_n].to_vec());
                matmul(&cpu, Operand::new(View::F32(x), k), &offsets, &b, ViewMut::F32(&mut y), accumulate);
                let mut half = vec![bf16::ZERO; y.len()];
                matmul(&cpu, Operand::new(View::F32(x), k), &offsets, &b, ViewMut::Bf16(&mut half), false);
                (y, half.iter().map(|x| x.to_f32()).collect::<Vec<_>>())
            };
            for accumulate in [false, true] {
                let whole = product(0..m, accumulate);
                for rows in [0..1, 7..9, 11..14, 3..7, 22..23] {
                    let what = format!("{} {compute:?} {rows:?} x {n}", level.name());
                    let (y, half) = product(rows.clone(), accumulate);
                    assert_same_bits(&what, &y, &whole.0[rows.start * n..rows.end * n]);
                    assert_same_bits(&what, &half, &whole.1[rows.start * n..rows.end * n]);
                }
            }
        }
    }
}

#[test]
fn groups_and_gathers_equal_separate_products() {
    let (tokens, n, k) = (50, 144, 37);
    let offsets = [0u32, 20, 20, 21, 90];
    let (x, w) = (normal(1, tokens * k), normal(2, 4 * n * k));
    let index: Vec<u32> = (0..90).map(|i| rng::below(1, 1, i, tokens as u64) as u32).collect();
    for level in Level::available() {
        let cpu = Cpu::with_level(level, 2);
        for compute in [Compute::F32, Compute::Bf16] {
            let half: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut all = Packed::empty();
            all.pack_nt(&cpu, View::F32(&w), 4, n, k, compute);
            let mut y = vec![bf16::ZERO; 90 * n];
            let gathered = Operand::gathered(View::Bf16(&half), k, &index);
            matmul(&cpu, gathered, &offsets, &all, ViewMut::Bf16(&mut y), false);
            let mut dw = vec![f32::NAN; 4 * n * k];
            let dy = Operand::new(View::Bf16(&y), n);
            matmul_tn(&cpu, dy, gathered, &offsets, compute, &mut dw, false);
            for g in 0..4 {
                let rows = offsets[g] as usize..offsets[g + 1] as usize;
                let wide: Vec<f32> =
                    index[rows.clone()].iter().flat_map(|&t| rounded(&x[t as usize * k..][..k])).collect();
                let mut b = Packed::empty();
                b.pack_nt(&cpu, View::F32(&w[g * n * k..][..n * k]), 1, n, k, compute);
                let mut e = vec![0.0; rows.len() * n];
                let offsets = [0, rows.len() as u32];
                matmul(&cpu, Operand::new(View::F32(&wide), k), &offsets, &b, ViewMut::F32(&mut e), false);
                let got: Vec<f32> = y[rows.start * n..rows.end * n].iter().map(|y| y.to_f32()).collect();
                assert_same_bits("group", &got, &rounded(&e));
                let mut dw_g = vec![0.0; n * k];
                let (a, b) = (Operand::new(View::F32(&got), n), Operand::new(View::F32(&wide), k));
                matmul_tn(&cpu, a, b, &offsets, compute, &mut dw_g, false);
                assert_same_bits("group, tn", &dw[g * n * k..][..n * k], &dw_g);
            }
        }
    }
}

#[test]
fn f32_bits_are_the_same_on_every_level() {
    let (m, n, k) = (37, 50, 70);
    let (x, w) = (normal(1, m * k), normal(2, n * k));
    let mut results = Level::available().into_iter().map(|level| {
        let cpu = Cpu::with_level(level, 1);
        let mut b = Packed::empty();
        b.pack_nt(&cpu, View::F32(&w), 1, n, k, Compute::F32);
        let mut y = vec![0.0; m * n];
        matmul(&cpu, Operand::new(View::F32(&x), k), &[0, m as u32], &b, ViewMut::F32(&mut y), false);
        y
    });
    let scalar = results.next().unwrap();
    results.for_each(|y| assert_same_bits("level", &y, &scalar));
}
