//! Products with stored blocks against plain arithmetic, and their bits against each other.

use super::chunk::{self, BLOCKS, Chunk, Unpack};
use super::*;
use crate::simd::{Kernel, Level, Simd};
use crate::view::View;
use minke_num::rng;

/// Random stored rows: any bits, but scales in f16 that are small numbers.
fn random_rows(format: BlockFormat, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let row_bytes = format.row_bytes(cols).unwrap();
    let count = rows * row_bytes;
    let mut bytes: Vec<u8> = (0..count.div_ceil(16) as u64)
        .flat_map(|i| rng::philox(seed, 7, i))
        .flat_map(u32::to_le_bytes)
        .take(count)
        .collect();
    let halves: &[usize] = match format {
        BlockFormat::Q4_0
        | BlockFormat::Q5_0
        | BlockFormat::Q8_0
        | BlockFormat::Iq4Nl
        | BlockFormat::Iq4Xs => &[0],
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
        BlockFormat::Q2K => &[80, 82],
        BlockFormat::Q3K => &[108],
        BlockFormat::Q6K => &[208],
    };
    for (i, block) in bytes.chunks_mut(format.block_bytes()).enumerate() {
        for (j, &at) in halves.iter().enumerate() {
            let x = 0.001 + 0.01 * rng::uniform_f64(seed, 8, (2 * i + j) as u64) as f32;
            block[at..at + 2].copy_from_slice(&minke_num::f16::from_f32(x).to_le_bytes());
        }
    }
    bytes
}

fn stored(format: BlockFormat, rows: usize, cols: usize, seed: u64) -> Stored {
    let bytes = random_rows(format, rows, cols, seed);
    let len = bytes.len();
    Stored::new(Form::Blocks(format), rows, cols, Bytes::new(Arc::new(bytes), 0..len))
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut x = vec![0.0; len];
    rng::fill_normal(seed, 3, 1.0, &mut x);
    x
}

/// The numbers of a stored row.
fn numbers(format: BlockFormat, row: &[u8]) -> Vec<f32> {
    struct Numbers<'a, F>(&'a [u8], F);
    impl<F: Unpack> Kernel for Numbers<'_, F> {
        type Out = Vec<f32>;
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let mut out = Vec::new();
            let mut chunk = Chunk::ZERO;
            for bytes in self.0.chunks(BLOCKS * F::BLOCK / F::STORED_LEN * F::STORED_BYTES) {
                F::unpack(s, bytes, &mut chunk);
                let len = bytes.len() / F::STORED_BYTES * F::STORED_LEN;
                out.extend((0..len).map(|i| {
                    let b = i / F::BLOCK;
                    chunk.scale[b] * (f32::from(chunk.q[i]) - f32::from(F::OFFSET)) + chunk.min[b]
                }));
            }
            out
        }
    }
    macro_rules! of {
        ($($name:ident $chunk:ident),*) => {
            match format { $(BlockFormat::$name => Level::SCALAR.dispatch(Numbers(row, chunk::$chunk)),)* }
        };
    }
    of!(Q4_0 Q4_0, Q4_1 Q4_1, Q5_0 Q5_0, Q5_1 Q5_1, Q8_0 Q8_0, Q2K Q2K, Q3K Q3K, Q4K Q4K, Q5K Q5K, Q6K Q6K,
        Iq4Nl Iq4Nl, Iq4Xs Iq4Xs)
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
            let rows: Vec<Vec<f32>> =
                part.bytes.chunks(part.bytes.len() / n).map(|row| numbers(format, row)).collect();
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
        for blocks in [1, 5, 16, 33] {
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
                    for rows in [1, 2, 5, 7, 17, m] {
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
