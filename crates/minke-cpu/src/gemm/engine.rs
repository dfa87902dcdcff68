//! How operands lie in memory for the register tile: as f32, or as pairs of bf16.
//!
//! Both are 32-bit words, so that buffers and drivers are the same for both. f32 words serve f32 products on every
//! level, and bf16 products where no bf16 instruction exists: operands are rounded to bf16 while they are packed, and
//! products of two bf16 are exact in f32. Pairs serve bf16 products on levels that have the instruction.

use std::ops::Range;

use minke_num::bf16;

use super::tile::{self, DotTile, PANEL, Tile};
use super::{Compute, Operand};
use crate::fp8::{BLOCK, load_codes};
use crate::simd::{GRID_ROWS, GRID_STEPS, LANES, Level, Simd};
use crate::view::View;

/// The rows of a matrix, wherever they lie.
pub(crate) trait Rows<'a> {
    /// Row length.
    fn cols(&self) -> usize;
    /// Row `i`, `cols` elements.
    fn row(&self, i: usize) -> View<'a>;
    /// Asks for columns of row `i`, if there is one: it will be read soon.
    fn ask(&self, _i: usize, _cols: Range<usize>) {}
    /// Whether the next row lies behind each.
    fn in_order(&self) -> bool {
        false
    }
}

/// Words after which lines fall into the same set of the first-level cache.
const SET_PERIOD: usize = 1024;

/// Rows so far apart that a tile may read side by side: a set has eight places or a few more, and a panel passes too.
const MEETING: usize = 4;

/// Words from one row of `steps` words to the next, where a tile reads many side by side: an odd number of lines, so that they
/// do not meet in one set of the cache.
#[inline(always)]
pub(super) fn pitch(steps: usize) -> usize {
    (steps.div_ceil(LANES) | 1) * LANES
}

/// Rows that are on their way while one is packed: what is taken of each may be short, and the next is far off.
pub(super) const AHEAD: usize = 8;

/// A packing and the tile that reads it.
#[derive(Clone, Copy)]
pub(crate) struct Engine<S: Simd> {
    s: S,
    /// Whether f32 inputs are rounded to bf16 first.
    round: bool,
    /// Whether words are bf16 pairs.
    pairs: bool,
    /// Whether the tile is that of the tile registers: its rows lie along the depth, in whole blocks of pairs.
    grid: bool,
}

/// Words that hold a depth of `k` in a matrix product, and rows of its register tile.
pub(crate) fn layout(level: Level, compute: Compute, k: usize) -> (usize, usize) {
    if compute == Compute::F32 || !level.has_bf16_dot() {
        (k, tile::MAX_ROWS)
    } else if level.has_grid() {
        (k.div_ceil(2).next_multiple_of(GRID_STEPS), GRID_ROWS)
    } else {
        (k.div_ceil(2), tile::MAX_ROWS)
    }
}

/// What a tile reads and writes, in words; see [`Tile`].
#[derive(Clone, Copy)]
pub(crate) struct Words {
    pub steps: usize,
    pub a: *const u32,
    pub a_row: usize,
    pub a_step: usize,
    pub b: *const u32,
    pub c: *mut f32,
    pub c_row: usize,
    pub accumulate: bool,
    /// Where not null (pairs only): sums are rounded and go here instead; see [`DotTile`].
    pub half: *mut bf16,
    pub half_row: usize,
}

impl Words {
    /// Nowhere: for what a caller does not name.
    pub const NOWHERE: Self = Self {
        steps: 0,
        a: std::ptr::null(),
        a_row: 0,
        a_step: 0,
        b: std::ptr::null(),
        c: std::ptr::null_mut(),
        c_row: 0,
        accumulate: false,
        half: std::ptr::null_mut(),
        half_row: 0,
    };
}

impl<S: Simd> Engine<S> {
    /// Pairs where the level multiplies them, in tile registers where it has some; words lie as [`layout`] says.
    #[inline(always)]
    pub fn new(s: S, compute: Compute) -> Self {
        let half = compute == Compute::Bf16;
        Self { s, round: half, pairs: half && S::DOT, grid: half && S::GRID }
    }

    /// Rows of the largest tile.
    #[inline(always)]
    pub fn tile_rows(self) -> usize {
        if self.grid { GRID_ROWS } else { tile::MAX_ROWS }
    }

    /// Whether the left operand's rows must lie along the depth.
    #[inline(always)]
    pub fn rows_along(self) -> bool {
        self.grid
    }

    /// The witness of its instructions.
    #[inline(always)]
    pub fn simd(self) -> S {
        self.s
    }

    /// Stores values along the depth as words.
    #[inline(always)]
    pub fn store_along<const VECS: usize>(self, x: [S::V; VECS], out: &mut [u32]) {
        let (out, _) = bytemuck::cast_slice_mut::<u32, f32>(out).as_chunks_mut::<LANES>();
        if self.pairs {
            for (i, out) in out.iter_mut().enumerate().take(VECS / 2) {
                self.s.store(self.s.pairs_along(x[2 * i], x[2 * i + 1]), out);
            }
        } else {
            for (x, out) in x.into_iter().zip(out) {
                self.s.store(x, out);
            }
        }
    }

    /// Words that hold a depth of `k`.
    #[inline(always)]
    pub fn steps(self, k: usize) -> usize {
        if self.grid {
            k.div_ceil(2).next_multiple_of(GRID_STEPS)
        } else if self.pairs {
            k.div_ceil(2)
        } else {
            k
        }
    }

    /// Words that hold a depth of `k` for up to [`LANES`] rows: as [`Engine::steps`], or half a block of pairs fewer, for
    /// the same bits.
    #[inline(always)]
    pub fn steps_of_few(self, k: usize) -> usize {
        if self.grid { k.div_ceil(2).next_multiple_of(GRID_STEPS / 2) } else { self.steps(k) }
    }

    /// The depth at which step `step` begins.
    #[inline(always)]
    pub fn depth(self, step: usize) -> usize {
        if self.pairs { 2 * step } else { step }
    }

    /// Asks for columns of row `i`. Not with tile registers where rows are in order: those come by themselves, and what is
    /// asked for stands in the way of what is read.
    #[inline(always)]
    pub fn ask<'a>(self, x: &impl Rows<'a>, i: usize, cols: Range<usize>) {
        if !(self.grid && x.in_order()) {
            x.ask(i, cols);
        }
    }

    /// Rows of the left operand of row tiles where they lie, and words from one to the next, if they need no packing.
    #[inline(always)]
    pub fn in_place(self, a: &Operand<'_>, rows: Range<usize>) -> Option<(*const u32, usize)> {
        if a.index.is_some() {
            return None;
        }
        let (first, pitch) = match a.view {
            View::F32(x) if !self.round => (x[rows.start * a.cols..].as_ptr().cast(), a.cols),
            // whole blocks where the tile reads whole blocks
            View::Bf16(x)
                if self.pairs && a.cols.is_multiple_of(if self.grid { 2 * GRID_STEPS } else { 2 }) =>
            {
                (x[rows.start * a.cols..].as_ptr().cast(), a.cols / 2)
            }
            _ => return None,
        };
        (rows.len() <= MEETING || !pitch.is_multiple_of(SET_PERIOD)).then_some((first, pitch))
    }

    /// Packs one row (contiguous along the depth) into `out` of [`Engine::steps`] words.
    #[inline(always)]
    pub fn pack_row(self, row: View<'_>, out: &mut [u32]) {
        if self.pairs {
            self.pack_pairs(row, bytemuck::cast_slice_mut(out));
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
    pub fn pack_strips<'a>(
        self,
        x: &impl Rows<'a>,
        rows: Range<usize>,
        cols: Range<usize>,
        pitch: usize,
        stride: usize,
        out: &mut [u32],
    ) {
        let width = cols.len();
        let strips = width.div_ceil(pitch);
        let steps = self.steps(rows.len());
        // a step of a whole panel is whole vectors; nothing is stored behind it
        let longest = if pitch == PANEL { steps * PANEL } else { steps * pitch.min(width) + LANES };
        assert!(
            strips == 0 || (strips - 1) * stride + longest <= out.len(),
            "pack_strips: room for {strips} strips"
        );
        let out = out.as_mut_ptr().cast::<f32>();
        // strips of whole vectors first, without a question per vector
        let whole = if pitch == PANEL {
            width / PANEL
        } else {
            (width / pitch).min((x.cols() - cols.start).saturating_sub(LANES - pitch) / pitch)
        };
        if self.pairs {
            for (p, r) in rows.clone().step_by(2).enumerate() {
                self.ask(x, r + AHEAD, cols.clone());
                self.ask(x, r + AHEAD + 1, cols.clone());
                let low = x.row(r).slice(cols.start, x.cols());
                // an odd last row is paired with itself, and zeroed below
                let paired = r + 1 < rows.end;
                let high = if paired { x.row(r + 1).slice(cols.start, x.cols()) } else { low };
                // SAFETY: as below.
                unsafe {
                    match (low, high) {
                        (View::Bf16(low), View::Bf16(high)) if paired => {
                            for strip in 0..whole {
                                let from = strip * pitch;
                                let to = out.add(strip * stride + p * pitch);
                                let (low, high) = (low.as_ptr().add(from), high.as_ptr().add(from));
                                if pitch == PANEL {
                                    let [left, right] =
                                        self.s.pairs_across_panel(&*low.cast(), &*high.cast());
                                    self.s.store(left, &mut *to.cast());
                                    self.s.store(right, &mut *to.add(LANES).cast());
                                    continue;
                                }
                                for i in (0..pitch).step_by(LANES) {
                                    let words =
                                        self.s.pairs_across_bf16(&*low.add(i).cast(), &*high.add(i).cast());
                                    self.s.store(words, &mut *to.add(i).cast());
                                }
                            }
                        }
                        _ => {
                            for strip in 0..whole {
                                let from = strip * pitch;
                                let to = out.add(strip * stride + p * pitch);
                                for i in (0..pitch).step_by(LANES) {
                                    let high =
                                        if paired { self.load_full(high, from + i) } else { self.s.zero() };
                                    let words = self.s.pairs_across(self.load_full(low, from + i), high);
                                    self.s.store(words, &mut *to.add(i).cast());
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
                            let (mut a, mut b) = (self.s.zero(), self.s.zero());
                            if n > 0 {
                                a = self.load(low, j + i, n);
                            }
                            if n > 0 && paired {
                                b = self.load(high, j + i, n);
                            }
                            self.s.store(self.s.pairs_across(a, b), &mut *to.add(i).cast());
                        }
                    }
                }
            }
            // what a whole block has more
            let real = rows.len().div_ceil(2);
            for strip in 0..if self.grid { strips } else { 0 } {
                for at in (real * pitch..steps * pitch).step_by(LANES) {
                    // SAFETY: within the strip, in bounds by the assertion above; in tile registers strips are panels.
                    unsafe { self.s.store(self.s.zero(), &mut *out.add(strip * stride + at).cast()) };
                }
            }
            return;
        }
        for (p, r) in rows.enumerate() {
            self.ask(x, r + AHEAD, cols.clone());
            let row = x.row(r).slice(cols.start, x.cols());
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

    /// Packs columns `cols` of rows `rows` of `x` (the depth runs along its rows) as rows of bf16 pairs along the depth:
    /// column `i` at word `i * stride`, [`Engine::steps`] words. Whole groups of sixteen columns are stored; those that
    /// are not there hold zeros. Pairs only.
    #[inline(always)]
    pub fn pack_turned<'a>(
        self,
        x: &impl Rows<'a>,
        rows: Range<usize>,
        cols: Range<usize>,
        stride: usize,
        out: &mut [u32],
    ) {
        let (s, steps) = (self.s, self.steps(rows.len()));
        let columns = cols.len().next_multiple_of(LANES);
        assert!(steps <= stride && columns * stride <= out.len(), "pack_turned: room for {columns} columns");
        let out = out.as_mut_ptr().cast::<f32>();
        for step in (0..steps).step_by(LANES) {
            let first = rows.start + 2 * step;
            for r in (first..first + 2 * LANES).take_while(|&r| r < rows.end) {
                self.ask(x, r + 2 * LANES, cols.clone());
            }
            let whole = if S::GRID { whole_rows(x, first..rows.end) } else { None };
            for j in (0..columns).step_by(LANES) {
                let n = LANES.min(cols.len() - j);
                let from = cols.start + j;
                if let (Some(rows), LANES) = (&whole, n) {
                    for half in [0, LANES / 2] {
                        // SAFETY: all rows have sixteen columns from here; columns of the output are in bounds by the
                        // assertion above.
                        unsafe {
                            let turned = s.turned_bf16(rows, from + half);
                            for (i, words) in turned.into_iter().enumerate() {
                                s.store(words, &mut *out.add((j + half + i) * stride + step).cast());
                            }
                        }
                    }
                    continue;
                }
                let mut block = [s.zero(); LANES];
                for (p, words) in block.iter_mut().enumerate() {
                    let r = first + 2 * p;
                    if r + 1 < rows.end && n == LANES {
                        let (low, high) = (x.row(r), x.row(r + 1));
                        // SAFETY: both rows have sixteen columns from here.
                        unsafe {
                            *words = match (low, high) {
                                (View::Bf16(low), View::Bf16(high)) => s.pairs_across_bf16(
                                    &*low.as_ptr().add(from).cast(),
                                    &*high.as_ptr().add(from).cast(),
                                ),
                                _ => s.pairs_across(self.load_full(low, from), self.load_full(high, from)),
                            };
                        }
                    } else if r < rows.end {
                        let low = self.load(x.row(r), from, n);
                        let high = if r + 1 < rows.end { self.load(x.row(r + 1), from, n) } else { s.zero() };
                        *words = s.pairs_across(low, high);
                    }
                }
                for (i, words) in s.transpose(block).into_iter().enumerate() {
                    // SAFETY: column j + i and its words are in bounds by the assertion above.
                    unsafe { s.store(words, &mut *out.add((j + i) * stride + step).cast()) };
                }
            }
        }
    }

    /// Packs rows `rows` of `x` (the depth runs along each) as the columns of one panel; missing columns are zeros up to
    /// a whole vector.
    #[inline(always)]
    pub fn pack_columns<'a>(self, x: &impl Rows<'a>, rows: Range<usize>, out: &mut [u32]) {
        let (s, steps) = (self.s, self.steps(x.cols()));
        let (lines, _) =
            bytemuck::cast_slice_mut::<u32, f32>(&mut out[..steps * PANEL]).as_chunks_mut::<PANEL>();
        for (left, first) in (0..PANEL).step_by(LANES).zip(rows.clone().step_by(LANES)) {
            for (p, lines) in (0..steps).step_by(LANES).zip(lines.chunks_mut(LANES)) {
                let turned = self.columns(x, first..rows.end.min(first + LANES), p);
                for (line, words) in lines.iter_mut().zip(turned) {
                    s.store(words, (&mut line[left..left + LANES]).try_into().expect("sixteen"));
                }
            }
        }
    }

    /// Up to sixteen rows of `x` as columns: the words of sixteen steps from `step` on, zeros for what is missing.
    #[inline(always)]
    pub fn columns<'a>(self, x: &impl Rows<'a>, rows: Range<usize>, step: usize) -> [S::V; LANES] {
        let depth = self.depth(step)..x.cols().min(self.depth(step + LANES));
        let mut block = [self.s.zero(); LANES];
        for (words, i) in block.iter_mut().zip(rows) {
            let row = x.row(i).slice(depth.start, depth.end);
            *words = if self.pairs { self.load_pairs(row) } else { self.load(row, 0, row.len()) };
        }
        self.s.transpose(block)
    }

    /// [`Engine::columns`] of up to sixteen rows of E4M3 codes.
    #[inline(always)]
    pub fn code_columns(self, rows: &[&[u8]], step: usize) -> [S::V; LANES] {
        let mut block = [self.s.zero(); LANES];
        for (words, row) in block.iter_mut().zip(rows) {
            let codes = &row[self.depth(step).min(row.len())..self.depth(step + LANES).min(row.len())];
            *words = if !self.pairs {
                load_codes(self.s, codes, 0, codes.len())
            } else if let Ok(full) = codes.try_into() {
                self.s.pairs_along_e4m3(full)
            } else {
                let mut full = [0; 2 * LANES];
                full[..codes.len()].copy_from_slice(codes);
                self.s.pairs_along_e4m3(&full)
            };
        }
        self.s.transpose(block)
    }

    /// [`Engine::code_columns`] of sixteen rows of a whole block.
    #[inline(always)]
    pub fn whole_code_columns(self, rows: &[&[u8; BLOCK]; LANES], step: usize) -> [S::V; LANES] {
        let mut block = [self.s.zero(); LANES];
        for (words, row) in block.iter_mut().zip(rows) {
            *words = if self.pairs {
                self.s.pairs_along_e4m3(&row.as_chunks::<{ 2 * LANES }>().0[step / LANES])
            } else {
                self.s.load_e4m3(&row.as_chunks::<LANES>().0[step / LANES])
            };
        }
        self.s.transpose(block)
    }

    /// [`Engine::columns`] of sixteen bf16 rows that have all these steps.
    ///
    /// # Safety
    /// They must have them.
    #[inline(always)]
    pub unsafe fn whole_columns(self, rows: &[*const bf16; LANES], step: usize) -> [S::V; LANES] {
        let mut block = [self.s.zero(); LANES];
        for (words, row) in block.iter_mut().zip(rows) {
            // SAFETY: by the caller's promise.
            *words = unsafe {
                let row = row.add(self.depth(step));
                if self.pairs {
                    self.s.pairs_along_bf16(&*row.cast())
                } else {
                    self.s.load_bf16(&*row.cast())
                }
            };
        }
        self.s.transpose(block)
    }

    /// Adds the products of words of sixteen columns with a row's word, in the tile's order. Not those of tile registers.
    #[inline(always)]
    pub fn add_step(self, sums: S::V, columns: S::V, word: u32) -> S::V {
        let word = self.s.splat(f32::from_bits(word));
        if self.pairs { self.s.add_pairs(sums, word, columns) } else { self.s.fma(word, columns, sums) }
    }

    /// `rows` (any number) by `vecs` vectors (16 columns each; 1 or 2) of a product; see [`tile::run`].
    ///
    /// # Safety
    /// As for [`tile::run`].
    #[inline(always)]
    pub unsafe fn tile(self, w: Words, rows: usize, vecs: usize) {
        let Words { steps, a, a_row, a_step, b, c, c_row, accumulate, half, half_row } = w;
        // SAFETY: by the caller's promise.
        unsafe {
            if self.pairs {
                let most = self.tile_rows();
                for done in (0..rows).step_by(most) {
                    let t = DotTile {
                        pairs: steps,
                        a: a.add(done * a_row),
                        a_row,
                        a_step,
                        b,
                        c: c.wrapping_add(done * c_row),
                        c_row,
                        accumulate,
                        half: half.wrapping_add(done * half_row),
                        half_row,
                    };
                    let rows = most.min(rows - done);
                    if self.grid {
                        self.s.grid_tile(t, rows, vecs);
                    } else {
                        self.s.dot_tile(t, rows, vecs);
                    }
                }
            } else {
                let t = Tile { depth: steps, a: a.cast(), a_row, a_step, b: b.cast(), c, c_row, accumulate };
                tile::run(self.s, t, rows, vecs);
            }
        }
    }

    /// Whether tiles of so few rows take two panels at once, into either dtype; [`Engine::tile_of_two`].
    #[inline(always)]
    pub fn takes_two(self, rows: usize) -> bool {
        self.pairs && rows <= S::DOT_OF_TWO
    }

    /// As [`Engine::tile`], of few rows over the panel of the words and one at `next`: 3 or 4 vectors.
    ///
    /// # Safety
    /// As for [`Engine::tile`], where [`Engine::takes_two`] is true, or up to [`LANES`] rows in tile registers with sums in f32.
    #[inline(always)]
    pub unsafe fn tile_of_two(self, w: Words, next: *const u32, rows: usize, vecs: usize) {
        let Words { steps, a, a_row, a_step, b, c, c_row, accumulate, half, half_row } = w;
        let t = DotTile { pairs: steps, a, a_row, a_step, b, c, c_row, accumulate, half, half_row };
        // SAFETY: by the caller's promise.
        unsafe {
            if self.grid {
                self.s.grid_tile_of_two(t, next, rows, vecs);
            } else {
                self.s.dot_tile_of_two(t, next, rows, vecs);
            }
        }
    }

    /// `rows` by `vecs` vectors (16 columns each; any number) of a product with f32 sums; panel `i` of the right operand is
    /// at `w.b + i * panel`.
    ///
    /// # Safety
    /// As for [`tile::run`].
    #[inline(always)]
    pub unsafe fn product(self, w: Words, rows: usize, vecs: usize, panel: usize) {
        const WIDTH: usize = PANEL / LANES;
        // tiles of few rows wait for each other: two panels side by side wait half as often
        let two = self.grid && rows <= LANES || self.takes_two(rows);
        let mut done = 0;
        while done < vecs {
            // SAFETY: by the caller's promise; each call covers other columns.
            unsafe {
                let (b, c) = (w.b.add(done / WIDTH * panel), w.c.add(done * LANES));
                if two && vecs - done > WIDTH {
                    let next = b.add(panel);
                    self.tile_of_two(Words { b, c, ..w }, next, rows, (vecs - done).min(2 * WIDTH));
                    done += 2 * WIDTH;
                } else {
                    self.tile(Words { b, c, ..w }, rows, (vecs - done).min(WIDTH));
                    done += WIDTH;
                }
            }
        }
    }

    /// Whether words are bf16 pairs: the tile can then round its sums to bf16 itself.
    #[inline(always)]
    pub fn pairs(self) -> bool {
        self.pairs
    }

    /// Packs values along the depth as pairs; a last one alone is paired with zero.
    #[inline(always)]
    fn pack_pairs(self, row: View<'_>, out: &mut [f32]) {
        if let View::Bf16(x) = row {
            let (from, to) = (bytemuck::cast_slice::<bf16, u8>(x), bytemuck::cast_slice_mut::<f32, u8>(out));
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(0);
            return;
        }
        for (i, out) in (0..row.len()).step_by(2 * LANES).zip(out.chunks_mut(LANES)) {
            let words = self.load_pairs(row.slice(i, row.len().min(i + 2 * LANES)));
            self.s.store_part(words, out);
        }
    }

    /// Up to 32 values along the depth as sixteen pairs; missing ones are zero.
    #[inline(always)]
    fn load_pairs(self, row: View<'_>) -> S::V {
        let s = self.s;
        match row {
            View::F32(x) => {
                let (first, second) = x.split_at(x.len().min(LANES));
                s.pairs_along(s.load_part(first, 0.0), s.load_part(second, 0.0))
            }
            View::Bf16(x) => {
                if let Some(x) = x.first_chunk() {
                    return s.pairs_along_bf16(x);
                }
                let mut words = [0.0f32; LANES];
                let from = bytemuck::cast_slice::<bf16, u8>(x);
                bytemuck::cast_slice_mut::<f32, u8>(&mut words)[..from.len()].copy_from_slice(from);
                s.load(&words)
            }
        }
    }

    /// E4M3 codes that a word holds.
    #[inline(always)]
    pub fn codes_per_word(self) -> usize {
        if self.pairs { 2 } else { 1 }
    }

    /// Widens codes along the depth to `out` of [`Engine::steps`] words.
    #[inline(always)]
    pub fn widen_row(self, codes: &[u8], out: &mut [u32]) {
        let used = codes.len().div_ceil(self.codes_per_word());
        let whole = codes.len() / (self.codes_per_word() * LANES) * LANES;
        self.widen(&codes[..whole * self.codes_per_word()], &mut out[..whole]);
        if used > whole {
            let rest = &codes[whole * self.codes_per_word()..];
            let (mut full, mut words) = ([0; 2 * LANES], [0; LANES]);
            full[..rest.len()].copy_from_slice(rest);
            self.widen(&full[..LANES * self.codes_per_word()], &mut words);
            out[whole..used].copy_from_slice(&words[..used - whole]);
        }
        out[used..].fill(0);
    }

    /// Widens codes to words in their order; whole vectors.
    #[inline(always)]
    pub fn widen(self, codes: &[u8], out: &mut [u32]) {
        let (out, _) = bytemuck::cast_slice_mut::<u32, f32>(out).as_chunks_mut::<LANES>();
        if self.pairs {
            let (codes, _) = codes.as_chunks::<{ 2 * LANES }>();
            for (codes, out) in codes.iter().zip(out) {
                self.s.store(self.s.pairs_along_e4m3(codes), out);
            }
        } else {
            let (codes, _) = codes.as_chunks::<LANES>();
            for (codes, out) in codes.iter().zip(out) {
                self.s.store(self.s.load_e4m3(codes), out);
            }
        }
    }

    /// The other way, for words that hold values of E4M3; whole vectors.
    #[inline(always)]
    pub fn narrow(self, words: &[u32], out: &mut [u8]) {
        let (out, _) = out.as_chunks_mut::<LANES>();
        if self.pairs {
            let (values, _) = bytemuck::cast_slice::<u32, bf16>(words).as_chunks::<LANES>();
            for (values, codes) in values.iter().zip(out) {
                self.s.store_e4m3(self.s.load_bf16(values), codes);
            }
        } else {
            let (values, _) = bytemuck::cast_slice::<u32, f32>(words).as_chunks::<LANES>();
            for (values, codes) in values.iter().zip(out) {
                self.s.store_e4m3(self.s.load(values), codes);
            }
        }
    }

    /// Whether f32 words hold rounded values; pairs are rounded when they are made.
    #[inline(always)]
    fn rounds_words(self) -> bool {
        self.round && !self.pairs
    }

    /// Sixteen values of a row from column `i`, rounded if words are.
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
                    if self.rounds_words() { s.round_bf16(v) } else { v }
                }
                View::Bf16(x) => s.load_bf16(&*x.as_ptr().add(i).cast()),
            }
        }
    }

    /// `n` values of a row from column `i`, rounded if words are; missing lanes are zero.
    #[inline(always)]
    fn load(self, row: View<'_>, i: usize, n: usize) -> S::V {
        let s = self.s;
        match row {
            View::F32(x) => {
                let v = match x[i..i + n].try_into() {
                    Ok(full) => s.load(full),
                    Err(_) => s.load_part(&x[i..i + n], 0.0),
                };
                if self.rounds_words() { s.round_bf16(v) } else { v }
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

/// The first `N` of `rows`, if there are as many and they are bf16.
#[inline(always)]
pub(super) fn whole_rows<'a, const N: usize>(
    x: &impl Rows<'a>,
    rows: Range<usize>,
) -> Option<[*const bf16; N]> {
    let mut all = [std::ptr::null(); N];
    if rows.len() < all.len() {
        return None;
    }
    for (r, row) in rows.zip(&mut all) {
        let View::Bf16(x) = x.row(r) else { return None };
        *row = x.as_ptr();
    }
    Some(all)
}
