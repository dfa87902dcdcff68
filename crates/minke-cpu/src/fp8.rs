//! Activations in FP8: E4M3 codes and one scale per 128 neighbours of a row.
//!
//! DeepSeek-V3 report, section 3.3: tiles of 1 x 128 for activations, blocks of 128 x 128 for weights, scales found
//! online. On a CPU a code is widened to bf16, which is exact, and multiplied there: the arithmetic is that of FP8, what
//! is saved is memory and the bandwidth to it.

pub use minke_num::fp8::{BLOCK, scale};

mod pack;

use std::ops::Range;

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, kernel, lanes, load};
use crate::scratch;
use crate::simd::{LANES, Simd};
use crate::view::{View, ViewMut};

pub(crate) use pack::{Coding, pack_row, pack_strips, pack_turned};

/// How numbers become codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Fp8 {
    /// All scales are powers of two (UE8M0), and not only those of activations that are coded a second time.
    pub power_of_two: bool,
    /// One scale for a whole matrix instead of one per tile or block: what the fine grain is measured against. Its rows
    /// are not independent of each other.
    pub per_tensor: bool,
}

/// How a row or a depth is cut into blocks with a scale each: [`BLOCK`] at a time from the beginning of each part. Gate
/// and up projections, read as one matrix, are two parts: published models have a scale tensor for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cuts {
    /// The whole length.
    pub len: usize,
    /// Length of each part; divides the whole.
    pub part: usize,
}

impl Cuts {
    /// One part.
    pub fn whole(len: usize) -> Self {
        Self { len, part: len }
    }

    /// `parts` equal parts.
    pub fn parts(len: usize, parts: usize) -> Self {
        Self { len, part: len / parts.max(1) }
    }

    /// Number of blocks.
    #[inline(always)]
    pub fn blocks(self) -> usize {
        self.len.checked_div(self.part).unwrap_or(0) * self.part.div_ceil(BLOCK)
    }

    /// The elements of block `b`.
    #[inline(always)]
    pub fn block(self, b: usize) -> std::ops::Range<usize> {
        let of_part = self.part.div_ceil(BLOCK);
        let (part, b) = (b / of_part, b % of_part);
        let start = part * self.part;
        start + b * BLOCK..start + self.part.min((b + 1) * BLOCK)
    }

    /// The block of element `i`.
    #[inline(always)]
    pub fn of(self, i: usize) -> usize {
        i / self.part * self.part.div_ceil(BLOCK) + i % self.part / BLOCK
    }
}

/// Rows of E4M3 codes, each with one scale per block of columns; row `i` is row `index[i]` where there is an index.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    /// Codes `[rows, cols]`.
    pub codes: &'a [u8],
    /// Scales `[rows, blocks]`.
    pub scales: &'a [f32],
    /// Row length and its blocks.
    pub cuts: Cuts,
    /// The rows of the operand among those stored.
    pub index: Option<&'a [u32]>,
}

impl<'a> Codes<'a> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.index.map_or_else(|| self.codes.len().checked_div(self.cuts.len).unwrap_or(0), <[u32]>::len)
    }

    /// Codes and scales of row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> (&'a [u8], &'a [f32]) {
        let r = self.index.map_or(i, |index| index[i] as usize);
        let (cols, blocks) = (self.cuts.len, self.cuts.blocks());
        (&self.codes[r * cols..(r + 1) * cols], &self.scales[r * blocks..(r + 1) * blocks])
    }
}

impl<'a> Codes<'a> {
    /// Some of the rows, which have no index.
    ///
    /// # Panics
    /// When they have one, or are not there.
    pub fn part(&self, rows: Range<usize>) -> Self {
        assert!(self.index.is_none(), "a part of rows in their order");
        let (cols, blocks) = (self.cuts.len, self.cuts.blocks());
        let codes: &'a [u8] = &self.codes[rows.start * cols..rows.end * cols];
        Self { codes, scales: &self.scales[rows.start * blocks..rows.end * blocks], ..*self }
    }
}

/// Where codes of rows go, and how they are made; as [`Codes`].
pub struct CodesMut<'a> {
    /// Codes `[rows, cols]`.
    pub codes: &'a mut [u8],
    /// Scales `[rows, blocks]`.
    pub scales: &'a mut [f32],
    /// Row length and its blocks.
    pub cuts: Cuts,
    /// How numbers become codes.
    pub how: Fp8,
}

impl CodesMut<'_> {
    /// Shared among the tasks of a loop that ends before the borrow does.
    ///
    /// # Panics
    /// When one scale is to be found for all.
    pub(crate) fn shared(self) -> SharedCodes {
        let Self { codes, scales, cuts, how } = self;
        assert!(!how.per_tensor, "rows are coded apart from each other");
        SharedCodes { codes: SharedMut::new(codes), scales: SharedMut::new(scales), cuts, how }
    }
}

/// [`CodesMut`] that tasks share: each writes its own rows.
pub(crate) struct SharedCodes {
    codes: SharedMut<u8>,
    scales: SharedMut<f32>,
    cuts: Cuts,
    how: Fp8,
}

impl SharedCodes {
    /// [`quantize`] of x, which become these rows.
    ///
    /// # Safety
    /// As for [`SharedMut::slice`].
    pub(crate) unsafe fn quantize(&self, cpu: &Cpu, x: View<'_>, rows: Range<usize>) {
        let (cols, blocks) = (self.cuts.len, self.cuts.blocks());
        // SAFETY: by the caller's promise.
        let (codes, scales) = unsafe {
            (
                self.codes.slice(rows.start * cols, rows.len() * cols),
                self.scales.slice(rows.start * blocks, rows.len() * blocks),
            )
        };
        quantize(cpu, x, self.cuts, self.how, codes, scales);
    }
}

/// Sixteen codes from `at`; missing ones are zero.
#[inline(always)]
pub(crate) fn load_codes<S: Simd>(s: S, codes: &[u8], at: usize, n: usize) -> S::V {
    match codes[at..at + n].try_into() {
        Ok(full) => s.load_e4m3(full),
        Err(_) => {
            let mut full = [0; LANES];
            full[..n].copy_from_slice(&codes[at..at + n]);
            s.load_e4m3(&full)
        }
    }
}

/// The largest magnitude of `len` elements from `at`; NaN or infinity where one is not finite.
#[inline(always)]
pub(crate) fn amax<S: Simd>(s: S, x: View<'_>, at: usize, len: usize) -> f32 {
    let mut most = s.zero();
    lanes!(len, |i, n| {
        most = s.max_size(most, load(s, x, at + i, n));
    });
    s.max_size_lane(most)
}

kernel! {
    Largest<'a>(s: S, x: View<'a>) -> f32 {
        amax(s, x, 0, x.len())
    }
}

/// The largest magnitude of all elements; not finite where one of them is not.
pub fn largest(cpu: &Cpu, x: View<'_>) -> f32 {
    let blocks = x.len().div_ceil(rows::FLAT_TILE);
    let mut of_blocks = scratch::take::<f32>(blocks);
    let out = SharedMut::new(&mut of_blocks[..blocks]);
    rows::over_blocks(cpu, x.len(), rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint blocks.
        unsafe { out.slice(from / rows::FLAT_TILE, 1)[0] = cpu.dispatch(Largest { x: x.slice(from, to) }) };
    });
    of_blocks[..blocks].iter().fold(0.0, |most, &x| if x > most || x.is_nan() { x } else { most })
}

kernel! {
    Quantize<'a>(s: S, x: View<'a>, cuts: Cuts, fixed: f32, power: bool, codes: &'a mut [u8], scales: &'a mut [f32]) {
        let blocks = cuts.blocks();
        let rows = codes.len().checked_div(cuts.len).unwrap_or(0);
        for r in 0..rows {
            for b in 0..blocks {
                let block = cuts.block(b);
                let (from, len) = (r * cuts.len + block.start, block.len());
                let codes = &mut codes[from..from + len];
                scales[r * blocks + b] = match (x, <&mut [u8; BLOCK]>::try_from(&mut *codes)) {
                    (View::F32(x), Ok(codes)) => {
                        let (x, _) = x[from..from + BLOCK].as_chunks::<LANES>();
                        let mut v = [s.zero(); VECTORS];
                        for (v, x) in v.iter_mut().zip(x) {
                            *v = s.load(x);
                        }
                        code_block(s, v, fixed, power, codes)
                    }
                    (View::Bf16(x), Ok(codes)) => {
                        let (x, _) = x[from..from + BLOCK].as_chunks::<LANES>();
                        let mut v = [s.zero(); VECTORS];
                        for (v, x) in v.iter_mut().zip(x) {
                            *v = s.load_bf16(x);
                        }
                        code_block(s, v, fixed, power, codes)
                    }
                    (x, Err(_)) => {
                        let by = if fixed == 0.0 { scale(amax(s, x, from, len), power) } else { fixed };
                        let inverse = s.splat(1.0 / by);
                        lanes!(len, |i, n| {
                            let v = s.mul(load(s, x, from + i, n), inverse);
                            if let Ok(full) = <&mut [u8; LANES]>::try_from(&mut codes[i..i + n]) {
                                s.store_e4m3(v, full);
                            } else {
                                let mut full = [0; LANES];
                                s.store_e4m3(v, &mut full);
                                codes[i..i + n].copy_from_slice(&full[..n]);
                            }
                        });
                        by
                    }
                };
            }
        }
    }
}

/// Vectors of a whole block.
const VECTORS: usize = BLOCK / LANES;

/// Codes a whole block that is in registers; returns its scale.
#[inline(always)]
fn code_block<S: Simd>(s: S, x: [S::V; VECTORS], fixed: f32, power: bool, codes: &mut [u8; BLOCK]) -> f32 {
    let by = block_scale(s, &x, fixed, power);
    let inverse = s.splat(1.0 / by);
    let (codes, _) = codes.as_chunks_mut::<LANES>();
    for (&v, codes) in x.iter().zip(codes) {
        s.store_e4m3(s.mul(v, inverse), codes);
    }
    by
}

/// The scale of a block that is in registers: `fixed`, or where that is 0 its own.
#[inline(always)]
fn block_scale<S: Simd>(s: S, x: &[S::V], fixed: f32, power: bool) -> f32 {
    if fixed != 0.0 {
        return fixed;
    }
    let mut most = s.zero();
    for &v in x {
        most = s.max_size(most, v);
    }
    scale(s.max_size_lane(most), power)
}

/// Rows per task.
const ROWS: usize = 32;

/// Codes of every row of x [n, cols], with one scale per block of columns: `code = E4M3(x / scale)`.
///
/// `scales` [n, blocks]. With [`Fp8::per_tensor`] all scales are one.
///
/// # Panics
/// When lengths contradict each other.
pub fn quantize(cpu: &Cpu, x: View<'_>, cuts: Cuts, how: Fp8, codes: &mut [u8], scales: &mut [f32]) {
    let (cols, blocks) = (cuts.len, cuts.blocks());
    let n = rows::count("fp8::quantize", x.len(), cols);
    rows::expect_len("fp8::quantize", "codes", codes.len(), n * cols);
    rows::expect_len("fp8::quantize", "scales", scales.len(), n * blocks);
    let fixed = if how.per_tensor { scale(largest(cpu, x), how.power_of_two) } else { 0.0 };
    let (codes, scales) = (SharedMut::new(codes), SharedMut::new(scales));
    rows::over_blocks(cpu, n, ROWS, |from, to| {
        let x = x.slice(from * cols, to * cols);
        // SAFETY: tasks own disjoint rows.
        let (codes, scales) =
            unsafe { (codes.slice(from * cols, x.len()), scales.slice(from * blocks, (to - from) * blocks)) };
        cpu.dispatch(Quantize { x, cuts, fixed, power: how.power_of_two, codes, scales });
    });
}

kernel! {
    Dequantize<'a>(s: S, x: Codes<'a>, from: usize, out: ViewMut<'a>) {
        let mut out = out;
        let cols = x.cuts.len;
        for r in 0..out.len().checked_div(cols).unwrap_or(0) {
            let (codes, scales) = x.row(from + r);
            for (b, &by) in scales.iter().enumerate() {
                let (block, by) = (x.cuts.block(b), s.splat(by));
                let start = block.start;
                lanes!(block.len(), |i, n| {
                    let v = s.mul(load_codes(s, codes, start + i, n), by);
                    rows::store(s, v, &mut out, r * cols + start + i, n);
                });
            }
        }
    }
}

/// The numbers that codes stand for, `code * scale`, rounded to the dtype of `out` [n, cols].
///
/// # Panics
/// When lengths contradict each other.
pub fn dequantize(cpu: &Cpu, x: Codes<'_>, out: ViewMut<'_>) {
    rows::expect_len("fp8::dequantize", "out", out.len(), x.rows() * x.cuts.len);
    let out = rows::SharedView::new(out);
    rows::over_blocks(cpu, x.rows(), ROWS, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { out.slice(from * x.cuts.len, (to - from) * x.cuts.len) };
        cpu.dispatch(Dequantize { x, from, out });
    });
}

/// An operand of a product: numbers that are coded on their way into it, or codes along its rows.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    /// f32 or bf16.
    Plain(crate::gemm::Operand<'a>),
    /// Codes; widened, scaled and coded again where a product codes along columns.
    Codes(Codes<'a>),
}

impl Values<'_> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Values::Plain(x) => x.rows(),
            Values::Codes(x) => x.rows(),
        }
    }

    /// Row length.
    pub fn cols(&self) -> usize {
        match self {
            Values::Plain(x) => x.cols,
            Values::Codes(x) => x.cuts.len,
        }
    }

    /// The largest magnitude.
    pub(crate) fn largest(&self, cpu: &Cpu) -> f32 {
        match self {
            Values::Plain(x) => largest(cpu, x.view),
            // codes reach 448 in every block; where scales are one, that is the largest
            Values::Codes(x) => {
                x.scales.iter().fold(0.0, |m: f32, &x| if x > m || x.is_nan() { x } else { m })
                    * minke_num::fp8::E4M3_MAX
            }
        }
    }
}

#[cfg(test)]
mod tests;
