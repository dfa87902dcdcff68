//! Left operands of products with blocks: rows as integers of 8 bits, a scale for every 32.

use super::chunk::BLOCKS;
use crate::cpu::{Cpu, SharedMut};
use crate::gemm::Operand;
use crate::rows::{kernel, load, over_tiles};
use crate::scratch::{self, Scratch};
use crate::simd::LANES;
use crate::view::View;

/// Elements that share a scale.
const SHARE: usize = 32;

/// Rows, coded: `x = scale q`, q from -127 to 127, `scale = max |x| / 127` of 32 elements.
///
/// Scales and sums are kept per block of the right operand, 16 or 32 elements, and rows are filled with zeros to whole chunks.
pub(super) struct Inputs {
    /// Elements of a block.
    pub block: usize,
    /// Elements of a row, filled up.
    pub stride: usize,
    codes: Scratch<i8>,
    /// Scales [rows, blocks], and the sums of the blocks' codes.
    scales: Scratch<f32>,
    sums: Scratch<f32>,
}

impl Inputs {
    /// Codes rows, whose length is a multiple of 32, for blocks of 16 or 32.
    pub fn new(cpu: &Cpu, x: Operand<'_>, block: usize) -> Self {
        let (rows, cols) = (x.rows(), x.cols);
        let stride = cols.next_multiple_of(BLOCKS * block);
        let blocks = stride / block;
        let mut codes = scratch::take::<i8>(rows * stride);
        let mut scales = scratch::take::<f32>(rows * blocks);
        let mut sums = scratch::take::<f32>(rows * blocks);
        let shared = (SharedMut::new(&mut codes), SharedMut::new(&mut scales), SharedMut::new(&mut sums));
        over_tiles(cpu, rows, cols, |from, to| {
            for row in from..to {
                // SAFETY (all): each row belongs to one task.
                let codes = unsafe { shared.0.slice(row * stride, stride) };
                let scales = unsafe { shared.1.slice(row * blocks, blocks) };
                let sums = unsafe { shared.2.slice(row * blocks, blocks) };
                let from = x.index.map_or(row, |index| index[row] as usize);
                let x = x.view.slice(from * cols, (from + 1) * cols);
                cpu.dispatch(Code { x, cols, block, codes, scales, sums });
            }
        });
        Self { block, stride, codes, scales, sums }
    }

    /// Blocks of a row, filled up.
    pub fn blocks(&self) -> usize {
        self.stride / self.block
    }

    /// Codes, scales and sums of a row.
    #[inline(always)]
    pub fn row(&self, i: usize) -> (&[i8], &[f32], &[f32]) {
        let blocks = self.blocks();
        (
            &self.codes[i * self.stride..][..self.stride],
            &self.scales[i * blocks..][..blocks],
            &self.sums[i * blocks..][..blocks],
        )
    }
}

kernel! {
    /// One row; numbers that are none, or infinite, make the scale of their 32 elements NaN.
    Code<'a>(
        s: S,
        x: View<'a>,
        cols: usize,
        block: usize,
        codes: &'a mut [i8],
        scales: &'a mut [f32],
        sums: &'a mut [f32],
    ) {
        let per_share = SHARE / block;
        for i in 0..cols / SHARE {
            let (low, high) = (load(s, x, SHARE * i, LANES), load(s, x, SHARE * i + LANES, LANES));
            let max = s.max_size_lane(s.max_size(s.max_size(s.zero(), low), high));
            let out: &mut [i8; SHARE] = (&mut codes[SHARE * i..][..SHARE]).try_into().expect("32");
            let at = i * per_share;
            if max < 1e-30 || !max.is_finite() {
                // nothing that a sum would see, or nothing that has a sum
                out.fill(0);
                scales[at..at + per_share].fill(if max.is_finite() { 0.0 } else { f32::NAN });
                sums[at..at + per_share].fill(0.0);
                continue;
            }
            let factor = s.splat(127.0 / max);
            let (first, second) = out.split_at_mut(LANES);
            let sum = s.store_i8(s.mul(low, factor), first.try_into().expect("sixteen"));
            let sum_high = s.store_i8(s.mul(high, factor), second.try_into().expect("sixteen"));
            scales[at..at + per_share].fill(max / 127.0);
            if per_share == 2 {
                (sums[at], sums[at + 1]) = (sum as f32, sum_high as f32);
            } else {
                sums[at] = (sum + sum_high) as f32;
            }
        }
        let blocks = cols / block;
        codes[cols..].fill(0);
        scales[blocks..].fill(0.0);
        sums[blocks..].fill(0.0);
    }
}
