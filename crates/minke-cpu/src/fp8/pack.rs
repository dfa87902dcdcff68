//! Numbers that are coded on their way into the words of a product: on the grid of E4M3, in the layouts of
//! [`Engine`], with the scales beside them. Their codes are nowhere.

use std::ops::Range;

use minke_num::fp8::{E4M3_MAX, SMALLEST_SCALE, next_power_of_two};

use super::{BLOCK, Codes, Cuts, VECTORS, Values, block_scale, load_codes};
use crate::gemm::Operand;
use crate::gemm::engine::{Engine, Rows};
use crate::gemm::tile::PANEL;
use crate::rows::{lanes, load};
use crate::scratch;
use crate::simd::{LANES, Simd};
use crate::view::View;

/// How scales are found.
#[derive(Clone, Copy)]
pub(crate) struct Coding {
    /// The scale of all, or 0: each block has its own.
    pub fixed: f32,
    /// Whether they are powers of two.
    pub power: bool,
}

/// One row of the left operand, a scale for each block of `cuts`: words as [`Engine::pack_row`] has them, block after block,
/// each of whole steps.
#[inline(always)]
pub(crate) fn pack_row<S: Simd>(
    engine: Engine<S>,
    row: View<'_>,
    cuts: Cuts,
    how: Coding,
    mut words: &mut [u32],
    scales: &mut [f32],
) {
    let s = engine.simd();
    for (b, scale) in scales.iter_mut().enumerate() {
        let block = cuts.block(b);
        let (out, rest) = std::mem::take(&mut words).split_at_mut(engine.steps(block.len()));
        words = rest;
        let mut x = [s.zero(); VECTORS];
        if let (View::Bf16(row), BLOCK) = (row, block.len()) {
            let (row, _) = row[block.clone()].as_chunks::<LANES>();
            for (x, row) in x.iter_mut().zip(row) {
                *x = s.load_bf16(row);
            }
        } else {
            lanes!(block.len(), |i, n| {
                x[i / LANES] = load(s, row, block.start + i, n);
            });
        }
        *scale = block_scale(s, &x, how.fixed, how.power);
        let inverse = s.splat(1.0 / *scale);
        for x in &mut x {
            *x = s.round_e4m3(s.mul(*x, inverse));
        }
        // by whole vectors: a copy of a few words would be a call
        for (i, out) in bytemuck::cast_slice_mut::<u32, f32>(out).chunks_mut(LANES).enumerate() {
            let words = if engine.pairs() { s.pairs_along(x[2 * i], x[2 * i + 1]) } else { x[i] };
            match out.try_into() {
                Ok(out) => s.store(words, out),
                Err(_) => s.store_part(words, out),
            }
        }
    }
}

/// Columns `cols` of rows `rows` of `x`, one scale per column ([`BLOCK`] rows at most: tiles of 128 x 1), in strips as
/// [`Engine::pack_strips`] has them.
#[inline(always)]
pub(crate) fn pack_strips<S: Simd>(
    engine: Engine<S>,
    x: &Values<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    how: Coding,
    pitch: usize,
    stride: usize,
    out: &mut [u32],
    scales: &mut [f32],
) {
    match x {
        Values::Plain(x) => strips(engine, x, rows, cols, how, pitch, stride, out, scales),
        Values::Codes(x) => strips(engine, x, rows, cols, how, pitch, stride, out, scales),
    }
}

#[inline(always)]
fn strips<S: Simd>(
    engine: Engine<S>,
    x: &impl Lines,
    rows: Range<usize>,
    cols: Range<usize>,
    how: Coding,
    pitch: usize,
    stride: usize,
    out: &mut [u32],
    scales: &mut [f32],
) {
    let s = engine.simd();
    let mut values = scratch::take::<f32>(BLOCK * PANEL);
    let (values, _) = values.as_chunks_mut::<PANEL>();
    let step_rows = if engine.pairs() { 2 } else { 1 };
    for (strip, from) in (0..cols.len()).step_by(pitch).enumerate() {
        let n = pitch.min(cols.len() - from);
        let scales = &mut scales[from..from + n];
        let inverse = columns(engine, x, rows.clone(), cols.start + from, how, values, scales);
        let pitch = if pitch == PANEL { PANEL } else { n };
        let out = &mut bytemuck::cast_slice_mut::<u32, f32>(out)[strip * stride..];
        let values = &values[..rows.len()];
        for (p, rows) in values.chunks(step_rows).enumerate() {
            for v in 0..pitch.div_ceil(LANES) {
                let by = if v == 0 { inverse[0] } else { inverse[1] };
                let low = coded(s, &rows[0], v, by);
                let words = match rows {
                    [_, next] => s.pairs_across_exact(low, coded(s, next, v, by)),
                    _ if engine.pairs() => s.pairs_across_exact(low, s.zero()),
                    _ => low,
                };
                let at = p * pitch + v * LANES;
                s.store(words, (&mut out[at..at + LANES]).try_into().expect("sixteen"));
            }
        }
        let real = rows.len().div_ceil(step_rows);
        if pitch == PANEL {
            out[real * PANEL..engine.steps(rows.len()) * PANEL].fill(0.0);
        }
    }
}

/// [`pack_strips`], but as [`Engine::pack_turned`] lays words out.
#[inline(always)]
pub(crate) fn pack_turned<S: Simd>(
    engine: Engine<S>,
    x: &Values<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    how: Coding,
    stride: usize,
    out: &mut [u32],
    scales: &mut [f32],
) {
    match x {
        Values::Plain(x) => turned(engine, x, rows, cols, how, stride, out, scales),
        Values::Codes(x) => turned(engine, x, rows, cols, how, stride, out, scales),
    }
}

#[inline(always)]
fn turned<S: Simd>(
    engine: Engine<S>,
    x: &impl Lines,
    rows: Range<usize>,
    cols: Range<usize>,
    how: Coding,
    stride: usize,
    out: &mut [u32],
    scales: &mut [f32],
) {
    let s = engine.simd();
    let steps = engine.steps(rows.len());
    let columns_out = cols.len().next_multiple_of(LANES);
    assert!(
        steps <= stride && columns_out * stride <= out.len(),
        "pack_turned: room for {columns_out} columns"
    );
    let out = out.as_mut_ptr().cast::<f32>();
    let mut values = scratch::take::<f32>(BLOCK * PANEL);
    let (values, _) = values.as_chunks_mut::<PANEL>();
    for from in (0..cols.len()).step_by(PANEL) {
        let n = PANEL.min(cols.len() - from);
        let inverse =
            columns(engine, x, rows.clone(), cols.start + from, how, values, &mut scales[from..from + n]);
        values[rows.len()..(2 * steps).min(BLOCK)].as_flattened_mut().fill(0.0);
        for v in 0..n.div_ceil(LANES) {
            let by = if v == 0 { inverse[0] } else { inverse[1] };
            for step in (0..steps).step_by(LANES) {
                let (pairs, _) = values[2 * step..2 * (step + LANES)].as_chunks::<2>();
                let mut block = [s.zero(); LANES];
                for (words, [low, high]) in block.iter_mut().zip(pairs) {
                    *words = s.pairs_across_exact(coded(s, low, v, by), coded(s, high, v, by));
                }
                for (i, words) in s.transpose(block).into_iter().enumerate() {
                    let column = from + v * LANES + i;
                    // SAFETY: whole groups of sixteen columns and their steps are in bounds by the assertion above.
                    unsafe { s.store(words, &mut *out.add(column * stride + step).cast()) };
                }
            }
        }
    }
}

/// Sixteen values on the grid.
#[inline(always)]
fn coded<S: Simd>(s: S, values: &[f32; PANEL], v: usize, inverse: S::V) -> S::V {
    let (values, _) = values.as_chunks::<LANES>();
    s.round_e4m3(s.mul(s.load(&values[v]), inverse))
}

/// Up to 32 columns from `at`, as many as there are `scales`: their numbers in `values`, their scales, and the inverse of
/// these.
#[inline(always)]
fn columns<S: Simd>(
    engine: Engine<S>,
    x: &impl Lines,
    rows: Range<usize>,
    at: usize,
    how: Coding,
    values: &mut [[f32; PANEL]],
    scales: &mut [f32],
) -> [S::V; 2] {
    let (s, n) = (engine.simd(), scales.len());
    // two variables, not an array: those stay in registers
    let (mut most, mut most_right) = (s.zero(), s.zero());
    for (r, values) in rows.zip(values) {
        x.ask(engine, r, at);
        let [left, right] = if n == PANEL {
            x.load_panel(s, r, at)
        } else if n > LANES {
            [x.load(s, r, at, LANES), x.load(s, r, at + LANES, n - LANES)]
        } else {
            [x.load(s, r, at, n), s.zero()]
        };
        let (values, _) = values.as_chunks_mut::<LANES>();
        s.store(left, &mut values[0]);
        s.store(right, &mut values[1]);
        (most, most_right) = (s.max_size(most, left), s.max_size(most_right, right));
    }
    let (mut left, mut right) = (s.splat(how.fixed), s.splat(how.fixed));
    if how.fixed == 0.0 {
        (left, right) = (scales_of(s, most, how.power), scales_of(s, most_right, how.power));
    }
    let mut all = [[0.0; LANES]; 2];
    s.store(left, &mut all[0]);
    s.store(right, &mut all[1]);
    scales.copy_from_slice(&all.as_flattened()[..n]);
    [s.div(s.splat(1.0), left), s.div(s.splat(1.0), right)]
}

/// [`super::scale`] of every lane.
#[inline(always)]
fn scales_of<S: Simd>(s: S, most: S::V, power: bool) -> S::V {
    // what is not a number comes second, and stays
    let by = s.max(s.splat(SMALLEST_SCALE), s.div(most, s.splat(E4M3_MAX)));
    let by = s.select_lt(most, s.splat(f32::from_bits(1)), s.splat(1.0), by);
    if !power {
        return by;
    }
    let mut all = [0.0; LANES];
    s.store(by, &mut all);
    for by in &mut all {
        *by = next_power_of_two(*by);
    }
    s.load(&all)
}

/// Elements of a matrix, sixteen at a time.
trait Lines {
    /// `n` elements of row `r` from column `at`; missing lanes are zero.
    fn load<S: Simd>(&self, s: S, r: usize, at: usize, n: usize) -> S::V;
    /// Thirty-two of them, from a multiple of 32.
    fn load_panel<S: Simd>(&self, s: S, r: usize, at: usize) -> [S::V; 2];
    /// Asks for those of a row that comes after row `r`.
    fn ask<S: Simd>(&self, engine: Engine<S>, r: usize, at: usize);
}

/// Rows that are on their way while one is read.
const AHEAD: usize = 16;

impl Lines for Operand<'_> {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, r: usize, at: usize, n: usize) -> S::V {
        load(s, self.row(r), at, n)
    }

    #[inline(always)]
    fn load_panel<S: Simd>(&self, s: S, r: usize, at: usize) -> [S::V; 2] {
        match self.row(r) {
            View::F32(x) => {
                let (x, _) = x[at..at + PANEL].as_chunks::<LANES>();
                [s.load(&x[0]), s.load(&x[1])]
            }
            View::Bf16(x) => {
                let (x, _) = x[at..at + PANEL].as_chunks::<LANES>();
                [s.load_bf16(&x[0]), s.load_bf16(&x[1])]
            }
        }
    }

    #[inline(always)]
    fn ask<S: Simd>(&self, engine: Engine<S>, r: usize, at: usize) {
        engine.ask(self, r + AHEAD, at..at + PANEL);
    }
}

impl Lines for Codes<'_> {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, r: usize, at: usize, n: usize) -> S::V {
        let (codes, scales) = self.row(r);
        // sixteen columns from a multiple of sixteen are of one block
        debug_assert_eq!(self.cuts.of(at), self.cuts.of(at + n - 1), "sixteen columns of one block");
        s.mul(load_codes(s, codes, at, n), s.splat(scales[self.cuts.of(at)]))
    }

    #[inline(always)]
    fn load_panel<S: Simd>(&self, s: S, r: usize, at: usize) -> [S::V; 2] {
        let (codes, scales) = self.row(r);
        let [first, second] = s.load_e4m3_panel(codes[at..at + PANEL].try_into().expect("thirty-two"));
        let (by, next) = (scales[self.cuts.of(at)], scales[self.cuts.of(at + LANES)]);
        [s.mul(first, s.splat(by)), s.mul(second, s.splat(next))]
    }

    #[inline(always)]
    fn ask<S: Simd>(&self, engine: Engine<S>, r: usize, at: usize) {
        if let Some(&r) = self.index.and_then(|index| index.get(r + AHEAD)) {
            engine.simd().prefetch(self.codes.as_ptr().wrapping_add(r as usize * self.cuts.len + at));
        }
    }
}
