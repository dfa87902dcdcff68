//! Codes and products against f64, on every level, and the bit contract.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use minke_num::fp8::Quantized;
use minke_num::tolerance::{Tolerance, assert_same_bits};
use minke_num::{bf16, rng};

use super::*;
use crate::gemm::{Operand, Packed8, Weight8, matmul8, matmul8_tn};
use crate::simd::Level;
use crate::stored::{Bytes, Stored, StoredWeight, lay, matmul8_stored};

/// Normal numbers whose size differs from column to column and from row to row.
fn uneven(stream: u64, rows: usize, cols: usize) -> Vec<f32> {
    let mut x = vec![0.0; rows * cols];
    rng::fill_normal(5, stream, 1.0, &mut x);
    for (i, x) in x.iter_mut().enumerate() {
        *x *= 2f32.powi(((i / cols * 7 + i % cols / 3) % 11) as i32 - 5);
    }
    x
}

/// What blocks of `rows` x `cols` numbers become: codes times scales.
fn grid(x: &[f32], cols: usize, block_of: impl Fn(usize, usize) -> usize, power: bool) -> Vec<f32> {
    let mut amax = std::collections::HashMap::<usize, f32>::new();
    for (i, x) in x.iter().enumerate() {
        let most = amax.entry(block_of(i / cols, i % cols)).or_default();
        *most = most.max(x.abs());
    }
    let of = |(i, x): (usize, &f32)| {
        let by = scale(amax[&block_of(i / cols, i % cols)], power);
        // activations are multiplied by the reciprocal
        minke_num::fp8::e4m3_to_f32(minke_num::fp8::e4m3_from_f32(x * (1.0 / by))) * by
    };
    x.iter().enumerate().map(of).collect()
}

#[test]
fn rows_are_coded_by_blocks() {
    for level in Level::available() {
        let cpu = Cpu::with_level(level, 2);
        for (n, cuts) in
            [(3, Cuts::whole(300)), (40, Cuts::whole(128)), (5, Cuts::parts(192, 2)), (2, Cuts::whole(7))]
        {
            for power_of_two in [false, true] {
                let x = uneven(1, n, cuts.len);
                let mut codes = vec![0; x.len()];
                let mut scales = vec![0.0; n * cuts.blocks()];
                let how = Fp8 { power_of_two, per_tensor: false };
                quantize(&cpu, View::F32(&x), cuts, how, &mut codes, &mut scales);
                let mut back = vec![0.0; x.len()];
                let coded = Codes { codes: &codes, scales: &scales, cuts, index: None };
                dequantize(&cpu, coded, ViewMut::F32(&mut back));
                let expected = grid(&x, cuts.len, |r, c| r * cuts.blocks() + cuts.of(c), power_of_two);
                assert_eq!(back, expected, "{level:?} {cuts:?}");
                let how = Fp8 { power_of_two, per_tensor: true };
                quantize(&cpu, View::F32(&x), cuts, how, &mut codes, &mut scales);
                assert!(
                    scales
                        .iter()
                        .all(|s| *s == scale(x.iter().fold(0.0, |m, x| x.abs().max(m)), power_of_two))
                );
            }
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 256];
            x[130] = bad;
            let (mut codes, mut scales) = (vec![0; 256], vec![0.0; 2]);
            quantize(&cpu, View::F32(&x), Cuts::whole(256), Fp8::default(), &mut codes, &mut scales);
            assert!(scales[0].is_finite() && !scales[1].is_finite(), "{level:?} {scales:?}");
        }
    }
}

const SIZES: [(usize, usize, usize, usize); 7] = [
    (1, 1, 1, 1),
    (3, 33, 17, 1),
    (33, 65, 300, 1),
    (130, 40, 128, 1),
    (31, 270, 513, 1),
    (70, 192, 96, 2),
    (9, 320, 140, 2),
];

struct Case {
    m: usize,
    rows: Cuts,
    k: usize,
    x: Vec<f32>,
    dy: Vec<f32>,
    w: Vec<f32>,
}

impl Case {
    fn new((m, n, k, parts): (usize, usize, usize, usize)) -> Self {
        let rows = Cuts::parts(n, parts);
        Self { m, rows, k, x: uneven(1, m, k), dy: uneven(2, m, n), w: uneven(3, n, k) }
    }

    fn weight(&self, how: Fp8) -> Weight8<'_> {
        Weight8 { w: &self.w, how, groups: 1, rows: self.rows, cols: self.k }
    }
}

fn coded(cpu: &Cpu, x: &[f32], cuts: Cuts, how: Fp8) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; x.len()];
    let mut scales = vec![0.0; x.len() / cuts.len * cuts.blocks()];
    quantize(cpu, View::F32(x), cuts, how, &mut codes, &mut scales);
    (codes, scales)
}

fn sums(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> (Vec<f64>, f64) {
    let (a, b) = (&a, &b);
    let of = |i: usize| (0..k).map(move |p| f64::from(a(i / n, p)) * f64::from(b(p, i % n)));
    let size = (0..m * n).map(|i| of(i).map(f64::abs).sum::<f64>()).fold(0.0, f64::max);
    ((0..m * n).map(|i| of(i).sum()).collect(), size)
}

#[test]
fn three_products_match_f64_on_the_grid() {
    for level in Level::available() {
        let cpu = Cpu::with_level(level, 2);
        for (size, power_of_two) in SIZES.into_iter().flat_map(|s| [(s, false), (s, true)]) {
            let case = Case::new(size);
            let Case { m, rows, k, x, dy, w } = &case;
            let (m, k, n) = (*m, *k, rows.len);
            let how = Fp8 { power_of_two, per_tensor: false };
            let check = |what: &str, got: &[f32], (expected, size): (Vec<f64>, f64)| {
                // sums of up to k terms whose sizes add up to `size`
                let bound = Tolerance { absolute: size * 2e-6, relative: 0.0 };
                bound.check(&format!("{what} {level:?} {size:?} {m} {n} {k}"), got, &expected).unwrap();
            };
            // weights are divided by their scale
            let wq = {
                let across = k.div_ceil(BLOCK);
                let block = |r: usize, c: usize| rows.of(r) * across + c / BLOCK;
                let mut amax = vec![0.0f32; rows.blocks() * across];
                for (i, w) in w.iter().enumerate() {
                    let b = block(i / k, i % k);
                    amax[b] = amax[b].max(w.abs());
                }
                let of = |(i, w): (usize, &f32)| {
                    let by = scale(amax[block(i / k, i % k)], power_of_two);
                    minke_num::fp8::e4m3_to_f32(minke_num::fp8::e4m3_from_f32(w / by)) * by
                };
                w.iter().enumerate().map(of).collect::<Vec<f32>>()
            };
            let whole = Cuts::whole(k);
            let xq = grid(x, k, |r, c| r * whole.blocks() + whole.of(c), power_of_two);
            let dyq = grid(dy, n, |r, c| r * rows.blocks() + rows.of(c), power_of_two);
            for widened in [false, true] {
                let mut packed = Packed8::empty();
                packed.pack(&cpu, case.weight(how), true, widened);
                let (codes, scales) = coded(&cpu, x, whole, how);
                let a = Codes { codes: &codes, scales: &scales, cuts: whole, index: None };
                let mut y = vec![0.5; m * n];
                matmul8(&cpu, Values::Codes(a), how, &[0, m as u32], &packed, ViewMut::F32(&mut y));
                check("y", &y, sums(m, n, k, |i, p| xq[i * k + p], |p, j| wq[j * k + p]));
                // bf16 output: the same, rounded
                let mut half = vec![bf16::ZERO; m * n];
                matmul8(&cpu, Values::Codes(a), how, &[0, m as u32], &packed, ViewMut::Bf16(&mut half));
                assert!(half.iter().zip(&y).all(|(h, y)| h.to_bits() == bf16::from_f32(*y).to_bits()));
                packed.pack(&cpu, case.weight(how), false, widened);
                let (codes, scales) = coded(&cpu, dy, *rows, how);
                let a = Codes { codes: &codes, scales: &scales, cuts: *rows, index: None };
                let mut dx = vec![0.5; m * k];
                matmul8(&cpu, Values::Codes(a), how, &[0, m as u32], &packed, ViewMut::F32(&mut dx));
                check("dx", &dx, sums(m, k, n, |i, p| dyq[i * n + p], |p, j| wq[p * k + j]));
            }
            // dW from numbers, and from codes of x
            let columns = |x: &[f32], cols: usize| grid(x, cols, |r, c| r / BLOCK * cols + c, power_of_two);
            let (dy_turned, x_turned) = (columns(dy, n), columns(x, k));
            let (codes, scales) = coded(&cpu, x, whole, how);
            let recoded = columns(&grid(x, k, |r, c| r * whole.blocks() + whole.of(c), power_of_two), k);
            let operands = [
                (Values::Plain(Operand::new(View::F32(x), k)), x_turned),
                (Values::Codes(Codes { codes: &codes, scales: &scales, cuts: whole, index: None }), recoded),
            ];
            for (b, bq) in operands {
                let mut dw = vec![0.5; n * k];
                let a = Operand::new(View::F32(dy), n);
                matmul8_tn(&cpu, a, b, &[0, m as u32], how, [power_of_two; 2], &mut dw, false);
                let (once, size) = sums(n, k, m, |i, p| dy_turned[p * n + i], |p, j| bq[p * k + j]);
                let twice = once.iter().map(|x| 2.0 * x).collect();
                check("dW", &dw, (once, size));
                matmul8_tn(&cpu, a, b, &[0, m as u32], how, [power_of_two; 2], &mut dw, true);
                check("twice dW", &dw, (twice, 2.0 * size));
            }
        }
    }
}

#[test]
fn groups_index_threads_and_rows_change_no_bit() {
    for level in Level::available() {
        let (groups, rows, k, stored) = (3, Cuts::parts(160, 2), 200, 50);
        let (w, x) = (uneven(3, groups * rows.len, k), uneven(1, stored, k));
        let index: Vec<u32> = (0..83).map(|i| i * 7 % stored as u32).collect();
        let offsets = [0, 37, 37, 83];
        let how = Fp8::default();
        let whole = Cuts::whole(k);
        let run = |threads: usize, widened: bool| {
            let cpu = Cpu::with_level(level, threads);
            let mut packed = Packed8::empty();
            packed.pack(&cpu, Weight8 { w: &w, how, groups, rows, cols: k }, true, widened);
            let (codes, scales) = coded(&cpu, &x, whole, how);
            let a = Codes { codes: &codes, scales: &scales, cuts: whole, index: Some(&index) };
            let mut y = vec![0.0; index.len() * rows.len];
            matmul8(&cpu, Values::Codes(a), how, &offsets, &packed, ViewMut::F32(&mut y));
            // each row alone
            for (i, &r) in index.iter().enumerate() {
                let group = offsets.windows(2).position(|o| (o[0]..o[1]).contains(&(i as u32))).unwrap();
                let one: Vec<u32> = (0..=groups).map(|g| u32::from(g > group)).collect();
                let mut alone = vec![0.0; rows.len];
                let a = Codes { index: Some(std::slice::from_ref(&r)), ..a };
                matmul8(&cpu, Values::Codes(a), how, &one, &packed, ViewMut::F32(&mut alone));
                assert_same_bits(&format!("row {i} {level:?}"), &alone, &y[i * rows.len..][..rows.len]);
            }
            let dy = uneven(4, index.len(), 96);
            let mut dw = vec![0.0; groups * 96 * k];
            let a = Operand::new(View::F32(&dy), 96);
            matmul8_tn(
                &cpu,
                a,
                Values::Codes(a_of(&codes, &scales, whole, &index)),
                &offsets,
                how,
                [false, true],
                &mut dw,
                false,
            );
            assert!(dw[96 * k..2 * 96 * k].iter().all(|x| *x == 0.0), "the gradient of a group without rows");
            (y, dw)
        };
        let first = run(1, true);
        for (threads, widened) in [(1, false), (2, true), (3, false)] {
            let other = run(threads, widened);
            assert_same_bits("y", &other.0, &first.0);
            assert_same_bits("dW", &other.1, &first.1);
        }
    }
}

fn a_of<'a>(codes: &'a [u8], scales: &'a [f32], cuts: Cuts, index: &'a [u32]) -> Codes<'a> {
    Codes { codes, scales, cuts, index: Some(index) }
}

/// Where they lie, laid in panels, and packed from the numbers: the same bits.
#[test]
fn codes_multiply_as_they_are_stored() {
    for level in Level::available() {
        for (groups, n, parts, k) in [(1, 64, 1, 128), (2, 130, 2, 200), (3, 33, 1, 7), (1, 300, 1, 1030)] {
            let (rows, how) = (Cuts::parts(parts * n, parts), Fp8::default());
            let numbers = uneven(5, groups * rows.len, k);
            let part = |numbers: &[f32]| {
                let Quantized { codes, scales, .. } = Quantized::quantize(numbers, n, k, false);
                let len = codes.len();
                Stored::coded(n, k, Bytes::new(Arc::new(codes), 0..len), scales.into())
            };
            let [of_file, laid] =
                [(); 2].map(|()| StoredWeight::new(groups, numbers.chunks(n * k).map(part).collect()));
            let others = lay(&laid.parts().iter().collect::<Vec<_>>(), level, &AtomicBool::new(false));
            assert!(others.is_empty());
            for threads in [1, 3] {
                let cpu = Cpu::with_level(level, threads);
                let mut packed = Packed8::empty();
                packed.pack(&cpu, Weight8 { w: &numbers, how, groups, rows, cols: k }, true, false);
                for group in 0..groups {
                    let mut row = vec![0.0; k];
                    for (i, expected) in packed.numbers(group).chunks(k).enumerate() {
                        of_file.numbers_into(group, i, &mut row);
                        // (a zero has lost its sign where it was packed)
                        assert_eq!(row, expected, "row {i}");
                    }
                }
                for m in [1, 2, 9, 300] {
                    let x = uneven(7, m, k);
                    let first = [0, 1, m as u32];
                    let offsets: Vec<u32> = match groups {
                        1 => vec![0, m as u32],
                        2 => first.to_vec(),
                        _ => vec![0, 1, 1, m as u32],
                    };
                    let (codes, scales) = coded(&cpu, &x, Cuts::whole(k), how);
                    let a = Codes { codes: &codes, scales: &scales, cuts: Cuts::whole(k), index: None };
                    let plain = Values::Plain(Operand::new(View::F32(&x), k));
                    let mut expected = vec![0.5; m * rows.len];
                    matmul8(&cpu, Values::Codes(a), how, &offsets, &packed, ViewMut::F32(&mut expected));
                    let halves: Vec<bf16> = expected.iter().map(|&y| bf16::from_f32(y)).collect();
                    for (w, lie) in [(&of_file, "where they lie"), (&laid, "laid")] {
                        for a in [Values::Codes(a), plain] {
                            let mut y = vec![0.5; expected.len()];
                            matmul8_stored(&cpu, a, how, &offsets, w, ViewMut::F32(&mut y));
                            let what = format!("{} {groups} x {n} x {k}, {m} rows, {lie}", level.name());
                            assert_same_bits(&what, &y, &expected);
                            let mut y = vec![bf16::ZERO; expected.len()];
                            matmul8_stored(&cpu, a, how, &offsets, w, ViewMut::Bf16(&mut y));
                            assert!(y == halves, "{what}, into bf16");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn codes_that_are_no_numbers_stay_in_their_row() {
    let (n, k) = (70, 200);
    let Quantized { mut codes, scales, .. } = Quantized::quantize(&uneven(1, n, k), n, k, false);
    let (spoilt, len) = ([3, 40, 69], codes.len());
    codes[3 * k] = 0x7f;
    codes[40 * k + 199] = 0xff;
    codes[69 * k + 130] = 0x7f;
    let w = Stored::coded(n, k, Bytes::new(Arc::new(codes), 0..len), scales.into());
    let w = StoredWeight::new(1, vec![w]);
    for level in Level::available() {
        let laid = lay(&[&w.parts()[0]], level, &AtomicBool::new(false));
        assert_eq!(laid.len(), 1, "such a matrix is not laid");
        let cpu = Cpu::with_level(level, 2);
        for m in [1, 20, 300] {
            let (x, mut y) = (vec![0.0; m * k], vec![0.5; m * n]);
            let x = Values::Plain(Operand::new(View::F32(&x), k));
            matmul8_stored(&cpu, x, Fp8::default(), &[0, m as u32], &w, ViewMut::F32(&mut y));
            for (at, y) in y.iter().enumerate() {
                assert_eq!(y.is_nan(), spoilt.contains(&(at % n)), "{} {m} rows, {at}", level.name());
            }
        }
    }
}
