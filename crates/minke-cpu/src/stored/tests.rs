//! Products with stored blocks against plain arithmetic, and their bits against each other.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use super::*;
use crate::gemm::Packed;
use crate::simd::Level;
use minke_num::fp8::Quantized;
use minke_num::rng;

/// Where a block has its numbers in f16.
fn halves(format: BlockFormat) -> &'static [usize] {
    match format {
        BlockFormat::Q4_0
        | BlockFormat::Q5_0
        | BlockFormat::Q8_0
        | BlockFormat::Iq4Nl
        | BlockFormat::Iq4Xs => &[0],
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
        BlockFormat::Q2K => &[80, 82],
        BlockFormat::Q3K => &[108],
        BlockFormat::Q6K => &[208],
    }
}

/// Random stored rows: any bits, or those of one byte, but scales in f16 that are small numbers.
fn random_rows(format: BlockFormat, rows: usize, cols: usize, seed: u64, byte: Option<u8>) -> Vec<u8> {
    let row_bytes = format.row_bytes(cols).unwrap();
    let count = rows * row_bytes;
    let mut bytes: Vec<u8> = (0..count.div_ceil(16) as u64)
        .flat_map(|i| rng::philox(seed, 7, i))
        .flat_map(u32::to_le_bytes)
        .take(count)
        .collect();
    if let Some(byte) = byte {
        bytes.fill(byte);
    }
    let halves = halves(format);
    for (i, block) in bytes.chunks_mut(format.block_bytes()).enumerate() {
        for (j, &at) in halves.iter().enumerate() {
            let x = 0.001 + 0.01 * rng::uniform_f64(seed, 8, (2 * i + j) as u64) as f32;
            block[at..at + 2].copy_from_slice(&minke_num::f16::from_f32(x).to_le_bytes());
        }
    }
    bytes
}

fn stored(format: BlockFormat, rows: usize, cols: usize, seed: u64) -> Stored {
    stored_of(format, rows, cols, seed, None)
}

fn stored_of(format: BlockFormat, rows: usize, cols: usize, seed: u64, byte: Option<u8>) -> Stored {
    let bytes = random_rows(format, rows, cols, seed, byte);
    let len = bytes.len();
    Stored::new(Form::Blocks(format), rows, cols, Bytes::new(Arc::new(bytes), 0..len))
}

/// The same matrices, none of them laid in panels.
fn copied(w: &StoredWeight) -> StoredWeight {
    let parts = w.parts().iter().map(|part| Stored::new(part.form, part.rows, part.cols, part.bytes.clone()));
    StoredWeight::new(w.groups(), parts.collect())
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut x = vec![0.0; len];
    rng::fill_normal(seed, 3, 1.0, &mut x);
    x
}

fn product(cpu: &Cpu, x: &[f32], index: Option<&[u32]>, offsets: &[u32], w: &StoredWeight) -> Vec<f32> {
    let rows = index.map_or(x.len() / w.cols, <[u32]>::len);
    let mut y = vec![f32::NAN; rows * w.rows];
    let a = Operand { view: View::F32(x), cols: w.cols, index };
    matmul_stored(cpu, a, offsets, w, ViewMut::F32(&mut y));
    y
}

#[test]
fn products_are_those_of_the_numbers() {
    for format in BlockFormat::ALL {
        let (n, m) = (37, 3);
        for cols in [format.block_len(), 3 * format.block_len(), 18 * format.block_len()] {
            let part = stored(format, n, cols, 1);
            let mut rows = vec![vec![0.0; cols]; n];
            rows.iter_mut().enumerate().for_each(|(i, row)| part.numbers_into(i, row));
            let x = random(m * cols, 2);
            let w = StoredWeight::new(1, vec![part]);
            let y = product(&Cpu::with_level(Level::SCALAR, 1), &x, None, &[0, m as u32], &w);
            for i in 0..m {
                for (j, row) in rows.iter().enumerate() {
                    let x = &x[i * cols..][..cols];
                    let exact: f64 = x.iter().zip(row).map(|(x, w)| f64::from(x * w)).sum();
                    // coding of x: half a step of each 32's largest over 127, as if all errors went one way at random
                    let size: f64 = row.iter().map(|w| f64::from(w * w)).sum::<f64>().sqrt();
                    let error = (f64::from(y[i * n + j]) - exact).abs();
                    assert!(error <= 0.06 * size, "{format:?} {cols}: {i} {j}: {} {exact}", y[i * n + j]);
                }
            }
        }
    }
}

#[test]
fn every_level_every_batch_and_any_threads_give_the_same_bits() {
    for format in BlockFormat::ALL {
        let (n, m) = (71, 23);
        for blocks in [1, 4, 5, 8, 16, 20, 33] {
            let cols = blocks * format.block_len();
            let w = StoredWeight::new(1, vec![stored(format, n, cols, 3), stored(format, 9, cols, 4)]);
            let mut x = random(m * cols, 5);
            x[cols..cols + 32].fill(0.0);
            x[2 * cols] = 1e30;
            let n = w.rows;
            let expected = product(&Cpu::with_level(Level::SCALAR, 1), &x, None, &[0, m as u32], &w);
            for level in Level::available() {
                for threads in [1, 3] {
                    let cpu = Cpu::with_level(level, threads);
                    for rows in [1, 2, 5, 8, 10, 17, m] {
                        let y = product(&cpu, &x[..rows * cols], None, &[0, rows as u32], &w);
                        assert!(
                            y.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{format:?} {cols} {} {threads} threads, {rows} rows",
                            level.name()
                        );
                        assert_eq!(y.len(), rows * n);
                    }
                }
            }
        }
    }
}

/// A scale that is no number spoils the row that it is of, and no other one, in any batch.
#[test]
fn rows_do_not_meet() {
    let (n, bad, m) = (21, 6, 17);
    for format in BlockFormat::ALL {
        for blocks in [1, 3, 7, 8, 28] {
            let cols = blocks * format.block_len();
            let mut bytes = random_rows(format, n, cols, 3, None);
            let stored = |bytes: &[u8]| {
                let bytes = Bytes::new(Arc::new(bytes.to_vec()), 0..bytes.len());
                StoredWeight::new(1, vec![Stored::new(Form::Blocks(format), n, cols, bytes)])
            };
            let whole = stored(&bytes);
            let at = bad * format.row_bytes(cols).unwrap() + halves(format)[0];
            bytes[at..at + 2].copy_from_slice(&minke_num::f16::from_f32(f32::INFINITY).to_le_bytes());
            let spoilt = stored(&bytes);
            let x = random(m * cols, 5);
            for level in Level::available() {
                let cpu = Cpu::with_level(level, 1);
                for rows in [1, 4, m] {
                    let of = |w| product(&cpu, &x[..rows * cols], None, &[0, rows as u32], w);
                    for (i, (a, b)) in of(&whole).into_iter().zip(of(&spoilt)).enumerate() {
                        let is_same = a.to_bits() == b.to_bits();
                        assert!(
                            is_same || i % n == bad,
                            "{format:?} {cols} {} {rows} rows: {i}",
                            level.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn panels_give_the_bits_of_rows() {
    for format in BlockFormat::ALL {
        for blocks in [1, 3, 5, 8, 20, 33] {
            let (cols, x_rows) = (blocks * format.block_len(), 25);
            let parts: Vec<Stored> =
                (0..4).map(|i| stored(format, [37, 16][i % 2], cols, i as u64)).collect();
            let w = StoredWeight::new(2, parts);
            let mut x = random(x_rows * cols, 5);
            (x[cols + 1], x[2 * cols]) = (f32::NAN, 1e30);
            x[3 * cols..4 * cols].fill(0.0);
            let scalar = Cpu::with_level(Level::SCALAR, 1);
            for level in Level::available() {
                // laid for this level alone
                let laid = copied(&w);
                // the last stays where it is: a product takes each as it lies
                let all: Vec<&Stored> = laid.parts()[..3].iter().collect();
                let stopped = AtomicBool::new(true);
                assert_eq!(lay(&all, level, &stopped).len(), 3, "stopped before it began");
                let others = lay(&all, level, &AtomicBool::new(false)).len();
                let has_panels = !["scalar", "neon", "amx-bf16"].contains(&level.name());
                let in_rows = [BlockFormat::Q2K, BlockFormat::Q3K, BlockFormat::Iq4Nl, BlockFormat::Iq4Xs]
                    .contains(&format);
                assert_eq!(others == 0, has_panels && !in_rows, "{format:?} on {}", level.name());
                for threads in [1, 3] {
                    let cpu = Cpu::with_level(level, threads);
                    for (first, rows) in [(1, 1), (0, 2), (2, 5), (3, 8), (0, 9), (4, 13), (8, 25)] {
                        let offsets = [0, first, rows as u32];
                        let x = &x[..rows * cols];
                        let expected = product(&scalar, x, None, &offsets, &w);
                        let y = product(&cpu, x, None, &offsets, &laid);
                        let same = y.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{format:?} {cols} {} {threads} threads, {rows} rows", level.name());
                    }
                }
            }
        }
    }
}

#[test]
fn bf16_in_panels_gives_the_bits_of_rows() {
    for cols in [2, 31, 64, 170, 1030] {
        let part = |rows: usize, seed| {
            let numbers = random(rows * cols, seed);
            let bytes: Vec<u8> = numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
            let len = bytes.len();
            Stored::new(Form::Bf16, rows, cols, Bytes::new(Arc::new(bytes), 0..len))
        };
        // stacked two by two; neither fills its panels
        let w = StoredWeight::new(2, (0..4).map(|i| part([37, 80][i % 2], i as u64)).collect());
        let x = random(130 * cols, 5);
        for level in Level::available() {
            let laid = copied(&w);
            let others = lay(&laid.parts().iter().collect::<Vec<_>>(), level, &AtomicBool::new(false)).len();
            assert_eq!(others == 0, level.name() == "avx512-bf16", "{}", level.name());
            for threads in [1, 3] {
                let cpu = Cpu::with_level(level, threads);
                for (first, rows) in [(0, 1), (1, 1), (1, 2), (2, 5), (3, 8), (9, 20), (16, 130)] {
                    let (x, offsets) = (&x[..rows * cols], [0, first, rows as u32]);
                    let expected = product(&cpu, x, None, &offsets, &w);
                    let y = product(&cpu, x, None, &offsets, &laid);
                    let same = y.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{cols} {} {threads} threads, {rows} rows", level.name());
                    let mut halves = vec![bf16::ZERO; y.len()];
                    let a = Operand::new(View::F32(x), cols);
                    matmul_stored(&cpu, a, &offsets, &laid, ViewMut::Bf16(&mut halves));
                    let same = halves.iter().zip(&expected).all(|(a, b)| *a == bf16::from_f32(*b));
                    assert!(same, "{cols} {} {threads} threads, {rows} rows, into bf16", level.name());
                }
            }
        }
    }
}

#[test]
fn sums_of_the_largest_numbers_do_not_overflow() {
    for format in BlockFormat::ALL {
        for byte in [0x00, 0x7f, 0x80, 0xff] {
            let (n, m, cols) = (18, 17, 3 * format.block_len());
            let w = StoredWeight::new(1, vec![stored_of(format, n, cols, 3, Some(byte))]);
            let mut x = vec![1.0; m * cols];
            x[cols..2 * cols].fill(-1.0);
            let expected = product(&Cpu::with_level(Level::SCALAR, 1), &x, None, &[0, m as u32], &w);
            for level in Level::available() {
                let laid = copied(&w);
                lay(&laid.parts().iter().collect::<Vec<_>>(), level, &AtomicBool::new(false));
                for (w, lie) in [(&w, "where they lie"), (&laid, "laid")] {
                    for rows in [1, 2, m] {
                        let cpu = Cpu::with_level(level, 1);
                        let y = product(&cpu, &x[..rows * cols], None, &[0, rows as u32], w);
                        assert!(
                            y.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{format:?} of {byte:#x} on {}, {rows} rows, {lie}",
                            level.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn groups_and_indices_are_products_of_their_own() {
    let (format, cols, n) = (BlockFormat::Q4K, 512, 40);
    let parts: Vec<Stored> = (0..6).map(|i| stored(format, n, cols, 10 + i)).collect();
    let w = StoredWeight::new(3, parts.clone());
    let x = random(9 * cols, 5);
    let index = [3, 1, 1, 8, 0, 2, 4, 5, 6, 7, 3];
    for level in Level::available() {
        let cpu = Cpu::with_level(level, 2);
        let y = product(&cpu, &x, Some(&index), &[0, 1, 1, 11], &w);
        for (i, &row) in index.iter().enumerate() {
            let group = if i == 0 { 0 } else { 2 };
            let alone = StoredWeight::new(1, parts[2 * group..2 * group + 2].to_vec());
            let expected = product(&cpu, &x[row as usize * cols..][..cols], None, &[0, 1], &alone);
            assert_eq!(y[i * 2 * n..][..2 * n], expected, "row {i} on {}", level.name());
        }
    }
}

#[test]
fn numbers_that_are_none_stay_in_their_row() {
    let (cols, n) = (96, 5);
    let w = StoredWeight::new(1, vec![stored(BlockFormat::Q8_0, n, cols, 1)]);
    let mut x = random(8 * cols, 2);
    let expected = product(&Cpu::with_level(Level::SCALAR, 1), &x, None, &[0, 8], &w);
    (x[cols + 40], x[3 * cols]) = (f32::NAN, f32::INFINITY);
    for level in Level::available() {
        let y = product(&Cpu::with_level(level, 1), &x, None, &[0, 8], &w);
        for i in 0..8 {
            let (y, expected) = (&y[i * n..][..n], &expected[i * n..][..n]);
            assert!(if i == 1 || i == 3 { y.iter().all(|y| y.is_nan()) } else { y == expected });
        }
    }
}

#[test]
fn numbers_multiply_as_packed_ones() {
    let (n, forms) = (70, [Form::F32, Form::F16, Form::Bf16, Form::E4m3, Form::Blocks(BlockFormat::Q4K)]);
    let forms = forms.into_iter().flat_map(|form| [(form, Compute::F32), (form, Compute::Bf16)]);
    for (form, compute) in forms {
        let k = if matches!(form, Form::Blocks(_)) { 256 } else { 45 };
        let (w, x) = (random(2 * n * k, 1), random(9 * k, 2));
        let coded = [0, 1].map(|i| Quantized::quantize(&w[i * n * k..][..n * k], n, k, false));
        let mut bytes: Vec<u8> = match form {
            Form::F32 => w.iter().flat_map(|w| w.to_le_bytes()).collect(),
            Form::F16 => w.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes()).collect(),
            Form::Bf16 => w.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect(),
            Form::E4m3 => coded.iter().flat_map(|coded| coded.codes.clone()).collect(),
            Form::Blocks(format) => random_rows(format, 2 * n, k, 1, None),
        };
        // at any alignment
        bytes.insert(0, 0);
        let len = bytes.len() - 1;
        let all = Bytes::new(Arc::new(bytes), 1..1 + len);
        let part = |i: usize| {
            let bytes = all.slice(i * len / 2..(i + 1) * len / 2);
            match form {
                Form::E4m3 => Stored::coded(n, k, bytes, coded[i].scales.clone().into()),
                Form::F32 | Form::F16 | Form::Bf16 | Form::Blocks(_) => Stored::new(form, n, k, bytes),
            }
        };
        let parts: Vec<Stored> = (0..2).map(|i| part(i).as_numbers(compute)).collect();
        let stored = StoredWeight::new(2, parts);
        let mut numbers = vec![0.0; 2 * n * k];
        for (i, row) in numbers.chunks_mut(k).enumerate() {
            stored.numbers_into(i / n, i % n, row);
        }
        for level in Level::available() {
            let cpu = Cpu::with_level(level, 2);
            let mut packed = Packed::empty();
            packed.pack_nt(&cpu, View::F32(&numbers), 2, n, k, compute);
            let mut expected = vec![0.0; 9 * n];
            let a = Operand::new(View::F32(&x), k);
            gemm::matmul(&cpu, a, &[0, 2, 9], &packed, ViewMut::F32(&mut expected), false);
            assert_eq!(
                product(&cpu, &x, None, &[0, 2, 9], &stored),
                expected,
                "{form:?} as {compute:?} on {}",
                level.name()
            );
        }
    }
}

/// Rows in f32 and as bf16 in any number, of a weight of two matrices and two groups: the bits of the packed one.
#[test]
fn bf16_where_it_lies_multiplies_as_packed() {
    let ([upper, lower], k) = ([70, 9], 96);
    let n = upper + lower;
    let halves: Vec<bf16> = random(2 * n * k, 1).iter().map(|&w| bf16::from_f32(w)).collect();
    let all =
        Bytes::new(Arc::new(halves.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>()), 0..4 * n * k);
    let parts = [(0, upper), (upper, lower), (n, upper), (n + upper, lower)];
    let parts = parts.map(|(first, rows)| {
        Stored::new(Form::Bf16, rows, k, all.slice(2 * first * k..2 * (first + rows) * k))
    });
    let w = StoredWeight::new(2, parts.to_vec());
    for level in Level::available() {
        let cpu = Cpu::with_level(level, 2);
        let mut packed = Packed::empty();
        packed.pack_nt(&cpu, View::Bf16(&halves), 2, n, k, Compute::Bf16);
        for rows in [1, 2, 5, 16, 17, 31, 32, 33, 64, 90, 97, 470] {
            let x = random(rows * k, 2);
            let x_halves: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            for first in [0, 1, rows as u32] {
                for x in [View::F32(&x), View::Bf16(&x_halves)] {
                    let (a, offsets) = (Operand::new(x, k), [0, first, rows as u32]);
                    let (mut y, mut expected) = (vec![0.0; rows * n], vec![0.0; rows * n]);
                    gemm::matmul(&cpu, a, &offsets, &packed, ViewMut::F32(&mut expected), false);
                    matmul_stored(&cpu, a, &offsets, &w, ViewMut::F32(&mut y));
                    assert!(y == expected, "{rows} rows, the first {first}, on {}", level.name());
                    let mut y = vec![bf16::ZERO; rows * n];
                    matmul_stored(&cpu, a, &offsets, &w, ViewMut::Bf16(&mut y));
                    let rounded = expected.iter().map(|&y| bf16::from_f32(y));
                    assert!(y.iter().copied().eq(rounded), "{rows} rows to bf16 on {}", level.name());
                }
            }
        }
    }
}

#[test]
fn owners_forget_what_is_laid() {
    static FORGOTTEN: Mutex<Vec<Range<usize>>> = Mutex::new(Vec::new());
    struct Forgetful(Vec<u8>);
    impl AsRef<[u8]> for Forgetful {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Owner for Forgetful {
        fn forget(&self, range: Range<usize>) {
            FORGOTTEN.lock().unwrap().push(range);
        }
    }
    let (rows, cols) = (9000, 1024);
    let bytes = random_rows(BlockFormat::Q8_0, rows, cols, 1, None);
    let len = bytes.len();
    let bytes = Bytes::new(Arc::new(Forgetful(bytes)), 0..len);
    let stored = Stored::new(Form::Blocks(BlockFormat::Q8_0), rows, cols, bytes);
    if lay(&[&stored], Level::detect(), &AtomicBool::new(false)).is_empty() {
        let forgotten = FORGOTTEN.lock().unwrap();
        assert!(forgotten.len() > 2 && forgotten[0].end < len / 2, "on the way: {forgotten:?}");
        assert!(forgotten.windows(2).all(|pair| pair[0].end >= pair[1].start));
        assert_eq!(forgotten.last().map(|range| range.end), Some(len));
    } else {
        assert!(FORGOTTEN.lock().unwrap().is_empty());
    }
}

#[test]
fn owners_bring_near_what_is_theirs() {
    static ASKED: Mutex<Vec<Vec<Range<usize>>>> = Mutex::new(Vec::new());
    struct Near(Vec<u8>);
    impl AsRef<[u8]> for Near {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Owner for Near {
        fn bring_near(&self, ranges: &[Range<usize>], _: &AtomicBool) {
            ASKED.lock().unwrap().push(ranges.to_vec());
        }
    }
    let of = |len: usize| Arc::new(Near(vec![0u8; len]));
    let (first, second) = (of(3000), of(50));
    let whole = Bytes::new(first.clone(), 100..1100);
    let all = [
        whole.slice(10..30),
        Bytes::new(second, 3..5),
        Bytes::new(Arc::new(vec![0; 7]), 0..7),
        Bytes::new(first, 1107..2999),
    ];
    bring_near(&all, &AtomicBool::new(true));
    assert_eq!(ASKED.lock().unwrap().len(), 0, "stopped before it began");
    bring_near(&all, &AtomicBool::new(false));
    let mut asked = std::mem::take(&mut *ASKED.lock().unwrap());
    asked.sort_by_key(Vec::len);
    assert_eq!(asked[0].first(), Some(&(3..5)));
    assert_eq!((asked.len(), &asked[1][..]), (2, &[110..130, 1107..2999][..]));
}
