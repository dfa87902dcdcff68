//! How operands lie in memory for the register tile: as f32, or as pairs of bf16.
//!
//! Both are 32-bit words, so that buffers and drivers are the same for both. f32 words serve f32 products on every
//! level, and bf16 products where no bf16 instruction exists: operands are rounded to bf16 while they are packed, and
//! products of two bf16 are exact in f32. Pairs serve bf16 products on levels that have the instruction.

use minke_num::bf16;

use super::tile::{self, DotTile, PANEL, Tile};
use super::{Compute, Operand};
use crate::simd::{LANES, Simd};
use crate::view::View;

/// A packing and the tile that reads it.
#[derive(Clone, Copy)]
pub(super) struct Engine<S: Simd> {
    s: S,
    /// Whether f32 inputs are rounded to bf16 first.
    round: bool,
    /// Whether words are bf16 pairs.
    pairs: bool,
}

/// What a tile reads and writes, in words; see [`Tile`].
#[derive(Clone, Copy)]
pub(super) struct Words {
    pub steps: usize,
    pub a: *const u32,
    pub a_row: usize,
    pub a_step: usize,
    pub b: *const u32,
    pub c: *mut f32,
    pub c_row: usize,
    pub accumulate: bool,
}

impl<S: Simd> Engine<S> {
    #[inline(always)]
    pub fn new(s: S, compute: Compute) -> Self {
        let half = compute == Compute::Bf16;
        Self { s, round: half, pairs: half && S::DOT }
    }

    /// Words that hold a depth of `k`.
    #[inline(always)]
    pub fn steps(self, k: usize) -> usize {
        if self.pairs { k.div_ceil(2) } else { k }
    }

    /// The depth at which step `step` begins.
    #[inline(always)]
    pub fn depth(self, step: usize) -> usize {
        if self.pairs { 2 * step } else { step }
    }

    /// The row tile's left operand where it lies, if it needs no packing.
    #[inline(always)]
    pub fn in_place(self, a: &Operand<'_>, row: usize) -> Option<(*const u32, usize)> {
        if a.index.is_some() {
            return None;
        }
        match a.view {
            View::F32(x) if !self.round => Some((x[row * a.cols..].as_ptr().cast(), a.cols)),
            View::Bf16(x) if self.pairs && a.cols.is_multiple_of(2) => {
                Some((x[row * a.cols..].as_ptr().cast(), a.cols / 2))
            }
            _ => None,
        }
    }

    /// Packs one row (contiguous along the depth) into `out` of [`Engine::steps`] words.
    #[inline(always)]
    pub fn pack_row(self, row: View<'_>, out: &mut [u32]) {
        if self.pairs {
            for (p, word) in out.iter_mut().enumerate() {
                let high = if 2 * p + 1 < row.len() { half_at(row, 2 * p + 1) } else { 0 };
                *word = u32::from(half_at(row, 2 * p)) | u32::from(high) << 16;
            }
        } else {
            let out: &mut [f32] = bytemuck::cast_slice_mut(out);
            let (whole, rest) = out[..row.len()].as_chunks_mut::<LANES>();
            let done = whole.len() * LANES;
            for (i, out) in whole.iter_mut().enumerate() {
                // SAFETY: the row is as long as the output.
                self.s.store(unsafe { self.load_full(row, i * LANES) }, out);
            }
            if !rest.is_empty() {
                let x = self.load(row, done, rest.len());
                self.s.store_part(x, rest);
            }
        }
    }

    /// Packs columns `cols` of rows `rows` of `x` (the depth runs along its rows) into strips of `pitch` columns: strip
    /// i starts at word `i * stride` and holds `pitch` words per step (the last strip as many as it has columns, or
    /// zeros up to a whole [`PANEL`]). Strips narrower than a panel are sixteen words longer than their steps: whole
    /// vectors are stored, the excess over what the next step will overwrite.
    #[inline(always)]
    pub fn pack_strips(
        self,
        x: &Operand<'_>,
        rows: std::ops::Range<usize>,
        cols: std::ops::Range<usize>,
        pitch: usize,
        stride: usize,
        out: &mut [u32],
    ) {
        let width = cols.len();
        if self.pairs {
            for (p, r) in rows.clone().step_by(2).enumerate() {
                let low = x.row(r);
                let high = (r + 1 < rows.end).then(|| x.row(r + 1));
                for (strip, j) in (0..width).step_by(pitch).enumerate() {
                    let real = pitch.min(width - j);
                    let words = if pitch == PANEL { PANEL } else { real };
                    let step = &mut out[strip * stride + p * words..][..words];
                    for (i, word) in step.iter_mut().enumerate() {
                        *word = if i < real {
                            let high = high.map_or(0, |h| half_at(h, cols.start + j + i));
                            u32::from(half_at(low, cols.start + j + i)) | u32::from(high) << 16
                        } else {
                            0
                        };
                    }
                }
            }
            return;
        }
        let strips = width.div_ceil(pitch);
        // a step of a whole panel is whole vectors; nothing is stored behind it
        let longest = if pitch == PANEL { rows.len() * PANEL } else { rows.len() * pitch.min(width) + LANES };
        assert!(
            strips == 0 || (strips - 1) * stride + longest <= out.len(),
            "pack_strips: room for {strips} strips"
        );
        let out = out.as_mut_ptr().cast::<f32>();
        for (p, r) in rows.enumerate() {
            let row = x.row(r).slice(cols.start, x.cols);
            // strips of whole vectors first, without a question per vector
            let whole = if pitch == PANEL {
                width / PANEL
            } else {
                (width / pitch).min(row.len().saturating_sub(LANES - pitch) / pitch)
            };
            // SAFETY: step p of every strip, and sixteen words more where strips are narrow, are in bounds by the
            // assertion above; whole strips are loaded from columns that the row has.
            unsafe {
                match row {
                    View::F32(x) => {
                        for strip in 0..whole {
                            let (from, to) =
                                (x.as_ptr().add(strip * pitch), out.add(strip * stride + p * pitch));
                            for i in (0..pitch).step_by(LANES) {
                                let v = self.s.load(&*from.add(i).cast());
                                let v = if self.round { self.s.round_bf16(v) } else { v };
                                self.s.store(v, &mut *to.add(i).cast());
                            }
                        }
                    }
                    View::Bf16(x) => {
                        for strip in 0..whole {
                            let (from, to) =
                                (x.as_ptr().add(strip * pitch), out.add(strip * stride + p * pitch));
                            for i in (0..pitch).step_by(LANES) {
                                self.s.store(self.s.load_bf16(&*from.add(i).cast()), &mut *to.add(i).cast());
                            }
                        }
                    }
                }
                for strip in whole..strips {
                    let j = strip * pitch;
                    let real = pitch.min(width - j);
                    let words = if pitch == PANEL { PANEL } else { real };
                    let to = out.add(strip * stride + p * words);
                    for i in (0..words).step_by(LANES) {
                        let n = LANES.min(real.saturating_sub(i));
                        let v = if n == 0 { self.s.zero() } else { self.load(row, j + i, n) };
                        self.s.store(v, &mut *to.add(i).cast());
                    }
                }
            }
        }
    }

    /// Packs `rows` rows of `w` (each contiguous along the depth) as the columns of one panel.
    #[inline(always)]
    pub fn pack_transposed(self, w: View<'_>, k: usize, first: usize, rows: usize, out: &mut [u32]) {
        if self.pairs {
            for p in 0..self.steps(k) {
                out[p * PANEL + rows..(p + 1) * PANEL].fill(0);
            }
            for c in 0..rows {
                let row = w.slice((first + c) * k, (first + c + 1) * k);
                for p in 0..k.div_ceil(2) {
                    let high = if 2 * p + 1 < k { half_at(row, 2 * p + 1) } else { 0 };
                    out[p * PANEL + c] = u32::from(half_at(row, 2 * p)) | u32::from(high) << 16;
                }
            }
            return;
        }
        let out: &mut [f32] = bytemuck::cast_slice_mut(out);
        for left in (0..PANEL).step_by(LANES) {
            for p in (0..k).step_by(LANES) {
                let depth = LANES.min(k - p);
                let mut block = [self.s.zero(); LANES];
                for (c, v) in block.iter_mut().enumerate().take(rows.saturating_sub(left)) {
                    let row = (first + left + c) * k;
                    *v = self.load(w.slice(row, row + k), p, depth);
                }
                let turned = self.s.transpose(block);
                for (i, v) in turned.into_iter().enumerate().take(depth) {
                    let to = &mut out[(p + i) * PANEL + left..][..LANES];
                    self.s.store(v, to.try_into().expect("sixteen"));
                }
            }
        }
    }

    /// The tile; see [`tile::run`]. With pairs, `c` is 32 columns wide whatever `vecs` says.
    ///
    /// # Safety
    /// As for [`tile::run`].
    #[inline(always)]
    pub unsafe fn tile(self, w: Words, rows: usize, vecs: usize) {
        let Words { steps, a, a_row, a_step, b, c, c_row, accumulate } = w;
        // SAFETY: by the caller's promise.
        unsafe {
            if self.pairs {
                let t = DotTile { pairs: steps, a, a_row, a_step, b, c, c_row, accumulate };
                self.s.dot_tile(t, rows);
            } else {
                let t = Tile { depth: steps, a: a.cast(), a_row, a_step, b: b.cast(), c, c_row, accumulate };
                tile::run(self.s, t, rows, vecs);
            }
        }
    }

    /// Whether the tile writes all 32 columns even when half are asked for.
    #[inline(always)]
    pub fn writes_whole_panels(self) -> bool {
        self.pairs
    }

    /// Sixteen values of a row from column `i`, rounded if the engine rounds.
    ///
    /// # Safety
    /// The row must have them.
    #[inline(always)]
    unsafe fn load_full(self, row: View<'_>, i: usize) -> S::V {
        let s = self.s;
        // SAFETY: by the caller's promise.
        unsafe {
            match row {
                View::F32(x) => {
                    let v = s.load(&*x.as_ptr().add(i).cast());
                    if self.round { s.round_bf16(v) } else { v }
                }
                View::Bf16(x) => s.load_bf16(&*x.as_ptr().add(i).cast()),
            }
        }
    }

    /// `n` values of a row from column `i`, rounded if the engine rounds; missing lanes are zero.
    #[inline(always)]
    fn load(self, row: View<'_>, i: usize, n: usize) -> S::V {
        let s = self.s;
        match row {
            View::F32(x) => {
                let v = match x[i..i + n].try_into() {
                    Ok(full) => s.load(full),
                    Err(_) => s.load_part(&x[i..i + n], 0.0),
                };
                if self.round { s.round_bf16(v) } else { v }
            }
            View::Bf16(x) => match x[i..i + n].try_into() {
                Ok(full) => s.load_bf16(full),
                Err(_) => {
                    let mut full = [bf16::ZERO; LANES];
                    full[..n].copy_from_slice(&x[i..i + n]);
                    s.load_bf16(&full)
                }
            },
        }
    }
}

/// The bits of element `i` as bf16.
#[inline(always)]
fn half_at(row: View<'_>, i: usize) -> u16 {
    match row {
        View::F32(x) => bf16::from_f32(x[i]).to_bits(),
        View::Bf16(x) => x[i].to_bits(),
    }
}
