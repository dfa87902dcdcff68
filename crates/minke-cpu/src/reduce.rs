//! Sums over whole arrays: one order per length.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, kernel, lanes, load, load_f32, store_f32};
use crate::scratch::with_scratch;
use crate::view::View;

/// Elements whose squares are summed in f32 before f64 takes over.
const BLOCK: usize = 4096;
/// Columns per task of [`column_sums`].
const COLUMNS: usize = 64;
/// Rows that are summed in one chain before their sum joins the total: shorter chains, smaller rounding errors.
const CHAIN: usize = 64;

kernel! {
    BlockSquares<'a>(s: S, x: &'a [f32]) -> f32 {
        rows::dot(s, View::F32(x), View::F32(x), x.len())
    }
}

/// `sum of x[i]^2` over the parts of x as one array: blocks of 4096 in f32, their sums in f64, in ascending order.
pub fn sum_squares(cpu: &Cpu, x: &[&[f32]]) -> f64 {
    let ends: Vec<usize> = x
        .iter()
        .scan(0, |end, part| {
            *end += part.len();
            Some(*end)
        })
        .collect();
    let blocks = ends.last().map_or(0, |len| len.div_ceil(BLOCK));
    with_scratch(blocks, |sums: &mut [f64]| {
        let shared = SharedMut::new(sums);
        rows::over_blocks(cpu, blocks, 4, |from, to| {
            // SAFETY: tasks own disjoint ranges of blocks.
            let sums = unsafe { shared.slice(from, to - from) };
            for (sum, block) in sums.iter_mut().zip(from..) {
                *sum = f64::from(block_squares(cpu, x, &ends, block * BLOCK));
            }
        });
        sums.iter().sum()
    })
}

/// Of the block that begins with element `start` of all parts.
fn block_squares(cpu: &Cpu, x: &[&[f32]], ends: &[usize], start: usize) -> f32 {
    let mut part = ends.partition_point(|&end| end <= start);
    let within = start + x[part].len() - ends[part];
    if let Some(x) = x[part].get(within..within + BLOCK) {
        return cpu.dispatch(BlockSquares { x });
    }
    // the end of one part and the beginnings of others
    with_scratch(BLOCK, |block: &mut [f32]| {
        let (mut len, mut within) = (0, within);
        while part < x.len() && len < BLOCK {
            let next = &x[part][within..];
            let next = &next[..next.len().min(BLOCK - len)];
            block[len..len + next.len()].copy_from_slice(next);
            (len, part, within) = (len + next.len(), part + 1, 0);
        }
        cpu.dispatch(BlockSquares { x: &block[..len] })
    })
}

kernel! {
    /// Adds columns `from..from + acc.len()` of all rows to `acc`.
    SumColumns<'a>(s: S, x: View<'a>, width: usize, from: usize, acc: &'a mut [f32]) {
        let rows = x.len().checked_div(width).unwrap_or(0);
        lanes!(acc.len(), |i, n| {
            let mut total = load_f32(s, acc, i, n);
            let mut row = 0;
            while row < rows {
                let mut chain = s.zero();
                let end = (row + CHAIN).min(rows);
                while row < end {
                    chain = s.add(chain, load(s, x, row * width + from + i, n));
                    row += 1;
                }
                total = s.add(total, chain);
            }
            store_f32(s, total, acc, i, n);
        });
    }
}

/// `acc[j] += sum over rows of x[i, j]`, x: [n, width], acc: [width]; f32, in chains of 64 rows, ascending.
///
/// # Panics
/// When `acc` is not one row of x.
pub fn column_sums(cpu: &Cpu, x: View<'_>, width: usize, acc: &mut [f32]) {
    rows::count("column_sums", x.len(), width);
    rows::expect_len("column_sums", "acc", acc.len(), width);
    let shared = SharedMut::new(acc);
    rows::over_blocks(cpu, width, COLUMNS, |from, to| {
        // SAFETY: tasks own disjoint ranges of columns.
        let acc = unsafe { shared.slice(from, to - from) };
        cpu.dispatch(SumColumns { x, width, from, acc });
    });
}

#[cfg(test)]
mod tests {
    use minke_num::tolerance::Tolerance;

    use super::*;
    use crate::testing::{everywhere, halve, normal, wide, wide_view};

    #[test]
    fn squares_match_f64() {
        for len in [0, 1, 17, 33, 4095, 4096, 4097, 100_003] {
            let x = normal(1, len);
            let expected: f64 = wide(&x).iter().map(|x| x * x).sum();
            let got = everywhere("sum_squares", |cpu| {
                let sum = sum_squares(cpu, &[&x]).to_bits();
                // both halves of the f64, so that all its bits are compared
                vec![f32::from_bits((sum >> 32) as u32), f32::from_bits(sum as u32)]
            });
            assert_eq!(got.len(), 2);
            let got = sum_squares(&Cpu::detect(2), &[&x]);
            assert!((got - expected).abs() <= 2e-6 * expected, "{len}: {got} for {expected}");
            for cuts in [vec![len / 3, 0, len / 2], vec![1; 40], vec![BLOCK; 5], vec![BLOCK - 1, 2]] {
                let (mut parts, mut rest) = (Vec::new(), &x[..]);
                for cut in cuts {
                    let (part, behind) = rest.split_at(cut.min(rest.len()));
                    parts.push(part);
                    rest = behind;
                }
                parts.push(rest);
                assert_eq!(sum_squares(&Cpu::detect(2), &parts).to_bits(), got.to_bits(), "{len} in parts");
            }
        }
    }

    #[test]
    fn columns_match_f64_and_accumulate() {
        for (rows, width) in [(0, 5), (1, 1), (3, 17), (64, 64), (65, 33), (200, 129)] {
            let x = normal(2, rows * width);
            let half = halve(&x);
            for view in [View::F32(&x), View::Bf16(&half)] {
                let got = everywhere("column_sums", |cpu| {
                    let mut acc = vec![1.0; width];
                    column_sums(cpu, view, width, &mut acc);
                    acc
                });
                let x = wide_view(view);
                let expected: Vec<f64> =
                    (0..width).map(|j| 1.0 + (0..rows).map(|i| x[i * width + j]).sum::<f64>()).collect();
                Tolerance::f32_sum(rows, 2.0).check("column_sums", &got, &expected).unwrap();
            }
        }
    }
}
