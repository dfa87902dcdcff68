//! `c = a b` with a packed right operand: y = x Wᵀ and dx = dy W.

use std::ops::Range;

use minke_num::bf16;

use super::engine::{AHEAD, Engine, Rows, Words, layout, pitch};
use super::tile::PANEL;
use super::{Compute, Operand, Packed, RowTiles, check_offsets, over_panels, stacked};
use crate::cpu::{Cpu, SharedMut};
use crate::rows::SharedView;
use crate::scratch;
use crate::simd::{GRID_ROWS, GRID_STEPS, Kernel, LANES, Simd};
use crate::view::{DType, ViewMut};

/// Words of packed right operand that row tiles share before the next are taken.
pub(super) const CHUNK_WORDS: usize = 128 * 1024;

/// Steps of the depth taken at a time, at most.
const DEPTH_BLOCK: usize = 512;

/// `c[i] (+)= a[i] b_g(i)` for every row: a [rows, k], b packed [groups, k, n], c [rows, n], f32 sums.
///
/// Rows `offsets[g]..offsets[g + 1]` use group g. With `accumulate` the sums start from what is in `c` (f32 only).
///
/// # Panics
/// When shapes do not fit, or on `accumulate` into bf16.
pub fn matmul(cpu: &Cpu, a: Operand<'_>, offsets: &[u32], b: &Packed, c: ViewMut<'_>, accumulate: bool) {
    check("matmul", cpu, a, offsets, b);
    assert_eq!(c.len(), a.rows() * b.n, "matmul: output of {} x {}", a.rows(), b.n);
    assert!(!accumulate || c.dtype() == DType::F32, "matmul: a bf16 output cannot accumulate");
    over_columns(cpu, a, offsets, b, 0..b.n, SharedView::new(c), accumulate);
}

#[track_caller]
pub(super) fn check(op: &str, cpu: &Cpu, a: Operand<'_>, offsets: &[u32], b: &Packed) {
    b.check(cpu);
    check_offsets(op, offsets, a.rows());
    assert_eq!(
        (a.cols, offsets.len()),
        (b.k, b.groups + 1),
        "{op}: depth and groups of left and right operand"
    );
}

/// `c = a b` for some columns of b, one group, which start with a panel: a [rows, k], c [rows, columns]. Bits are those of
/// [`matmul`].
///
/// # Panics
/// When shapes do not fit or the columns start within a panel.
pub fn matmul_columns(cpu: &Cpu, a: Operand<'_>, b: &Packed, columns: Range<usize>, c: &mut [f32]) {
    b.check(cpu);
    assert_eq!((a.cols, 1), (b.k, b.groups), "matmul_columns: depth and groups of left and right operand");
    assert!(
        columns.start.is_multiple_of(PANEL) && columns.end <= b.n,
        "matmul_columns: columns {columns:?} of {}",
        b.n
    );
    assert_eq!(c.len(), a.rows() * columns.len(), "matmul_columns: output of {} rows", a.rows());
    let rows = a.rows() as u32;
    over_columns(cpu, a, &[0, rows], b, columns, SharedView::F32(SharedMut::new(c)), false);
}

/// The product with `columns` of b; rows of the output are as long.
fn over_columns(
    cpu: &Cpu,
    a: Operand<'_>,
    offsets: &[u32],
    b: &Packed,
    columns: Range<usize>,
    out: SharedView,
    accumulate: bool,
) {
    let (_, tile_rows) = layout(cpu.level(), b.compute, b.k);
    let (tiles, chunk) = (RowTiles::new(offsets, tile_rows), CHUNK_WORDS / (b.steps * PANEL).max(1));
    let before = columns.start / PANEL;
    over_panels(cpu, &tiles, columns.len().div_ceil(PANEL), chunk, |group, rows, panels| {
        let panels = before + panels.start..before + panels.end;
        let to = To { out, row: rows.start, stride: columns.len(), column: 0 };
        let b = Right::of(b, group);
        let columns = columns.clone();
        cpu.level().dispatch_product(Task { a, b, rows, panels, columns, to, accumulate });
    });
}

/// `c[i] = a[i] W_g(i)ᵀ` like [`matmul`], with packed words of matrices that are stacked in the rows of W_g: `part(group, i)`
/// has those of the i-th, which has `parts[i]` columns of the output.
///
/// # Panics
/// When shapes do not fit.
pub(crate) fn matmul_stacked<'a>(
    cpu: &Cpu,
    a: Operand<'_>,
    offsets: &[u32],
    compute: Compute,
    parts: &[usize],
    part: &(dyn Fn(usize, usize) -> &'a [u32] + Sync),
    c: ViewMut<'_>,
) {
    check_offsets("matmul_stacked", offsets, a.rows());
    let width: usize = parts.iter().sum();
    assert_eq!(c.len(), a.rows() * width, "matmul_stacked: output of {} x {width}", a.rows());
    let (k, out) = (a.cols, SharedView::new(c));
    let (steps, tile_rows) = layout(cpu.level(), compute, k);
    let (tiles, chunk) = (RowTiles::new(offsets, tile_rows), CHUNK_WORDS / (steps * PANEL).max(1));
    let panels = parts.iter().map(|n| n.div_ceil(PANEL)).sum();
    over_panels(cpu, &tiles, panels, chunk, |group, rows, panels| {
        for (i, panels, column) in stacked(parts, panels) {
            let b = Right { compute, k, steps, words: part(group, i), from: 0 };
            let to = To { out, row: rows.start, stride: width, column };
            let (rows, columns) = (rows.clone(), 0..parts[i]);
            cpu.level().dispatch_product(Task { a, b, rows, panels, columns, to, accumulate: false });
        }
    });
}

/// Packed panels of one group.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub compute: Compute,
    pub k: usize,
    pub steps: usize,
    /// The panels from `from` on.
    pub words: &'a [u32],
    pub from: usize,
}

impl<'a> Right<'a> {
    pub(super) fn of(b: &'a Packed, group: usize) -> Self {
        Self { compute: b.compute, k: b.k, steps: b.steps, words: b.panels(group), from: 0 }
    }

    #[inline(always)]
    fn panel(&self, panel: usize) -> &'a [u32] {
        let words = self.steps * PANEL;
        &self.words[(panel - self.from) * words..][..words]
    }
}

/// Rows times panels.
pub(super) struct Task<'a> {
    pub a: Operand<'a>,
    pub b: Right<'a>,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
    /// Those of the right operand that the output has.
    pub columns: Range<usize>,
    pub to: To,
    pub accumulate: bool,
}

/// Where sums go.
#[derive(Clone, Copy)]
pub(crate) struct To {
    pub out: SharedView,
    /// Row that the task's first becomes, and the row length of the output.
    pub row: usize,
    pub stride: usize,
    /// Column that the first of the task's columns becomes.
    pub column: isize,
}

impl Kernel for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let engine = Engine::new(s, self.b.compute);
        let (n, rows) = (self.columns.len(), self.rows.len());
        // the depth in even blocks: a panel's block stays in the first-level cache. Sums go on where they stopped.
        let blocks = self.b.steps.div_ceil(DEPTH_BLOCK).max(1);
        let block = self.b.steps.div_ceil(blocks).next_multiple_of(GRID_STEPS);
        let in_place = engine.in_place(&self.a, self.rows.clone());
        if let (1, Some((a, a_row))) = (blocks, in_place) {
            return self.tiles(s, engine, a, a_row, 0, self.b.steps, self.to, self.accumulate);
        }
        let columns = self.panels.start * PANEL - self.columns.start
            ..n.min(self.panels.end * PANEL - self.columns.start);
        let block = block.min(self.b.steps);
        let pitch = pitch(block);
        let mut packed = scratch::take::<u32>(if in_place.is_none() { rows * pitch } else { 0 });
        // sums of several blocks need f32 to stop in
        let halfway = match self.to.out {
            SharedView::Bf16(_) if blocks > 1 => rows * columns.len(),
            SharedView::Bf16(_) | SharedView::F32(_) => 0,
        };
        let mut sums = scratch::take::<f32>(halfway);
        for b in 0..blocks {
            let (from, to) = (b * block, self.b.steps.min((b + 1) * block));
            let (a, a_row) = match in_place {
                // SAFETY: the depth of a row in place is at least `from` steps.
                Some((a, a_row)) => (unsafe { a.add(from) }, a_row),
                None => {
                    let depth = engine.depth(from)..engine.depth(to).min(self.b.k);
                    for (i, out) in packed.chunks_exact_mut(pitch).enumerate() {
                        engine.ask(&self.a, self.rows.start + i + AHEAD, depth.clone());
                        let row = self.a.row(self.rows.start + i).slice(depth.start, depth.end);
                        engine.pack_row(row, &mut out[..to - from]);
                    }
                    (packed.as_ptr(), pitch)
                }
            };
            let go_on = self.accumulate || b > 0;
            let to_sums = match halfway {
                0 => self.to,
                _ => To {
                    out: SharedView::F32(SharedMut::new(&mut sums)),
                    row: 0,
                    stride: columns.len(),
                    column: -(columns.start as isize),
                },
            };
            self.tiles(s, engine, a, a_row, from, to, to_sums, go_on);
        }
        if let (SharedView::Bf16(out), 1..) = (self.to.out, halfway) {
            for (r, sums) in sums.chunks_exact(columns.len()).enumerate() {
                let at = self.to.at(r, columns.start);
                // SAFETY: these rows and columns are this task's.
                let out = unsafe { out.slice(at, columns.len()) };
                store_halves(s, sums, out);
            }
        }
    }
}

impl To {
    /// The element that row `row` of a task has in its column `column`.
    #[inline(always)]
    pub(super) fn at(self, row: usize, column: usize) -> usize {
        ((self.row + row) * self.stride + column).wrapping_add_signed(self.column)
    }
}

/// Rounds a row to bf16.
#[inline(always)]
pub(super) fn store_halves<S: Simd>(s: S, from: &[f32], out: &mut [bf16]) {
    let (whole, rest) = from.as_chunks::<LANES>();
    let (out_whole, out_rest) = out.as_chunks_mut::<LANES>();
    for (x, out) in whole.iter().zip(out_whole) {
        s.store_bf16(s.load(x), out);
    }
    if !rest.is_empty() {
        let mut full = [bf16::ZERO; LANES];
        s.store_bf16(s.load_part(rest, 0.0), &mut full);
        out_rest.copy_from_slice(&full[..rest.len()]);
    }
}

impl Task<'_> {
    /// The task's rows times its panels over steps `from..to`; `a` points to step `from` of its first row.
    #[inline(always)]
    fn tiles<S: Simd>(
        &self,
        s: S,
        engine: Engine<S>,
        a: *const u32,
        a_row: usize,
        from: usize,
        to: usize,
        target: To,
        accumulate: bool,
    ) {
        let n = self.columns.len();
        let tile_rows = engine.tile_rows();
        let mut edge = [0.0f32; GRID_ROWS * PANEL];
        let row_tiles = self.rows.len().div_ceil(tile_rows);
        // tile registers write faster than memory answers: there tiles follow each other along rows of the output, so that
        // it sees what comes next; elsewhere a panel stays in the first-level cache
        let along = engine.rows_along();
        let takes_two = engine.takes_two(self.rows.len());
        let mut t = 0;
        while t < row_tiles * self.panels.len() {
            let (panel, tile) = if along {
                (self.panels.start + t % self.panels.len(), t / self.panels.len())
            } else {
                (self.panels.start + t / row_tiles, t % row_tiles)
            };
            let b = self.b.panel(panel)[from * PANEL..].as_ptr();
            let col = panel * PANEL - self.columns.start;
            let width = PANEL.min(n - col);
            let vecs = width.div_ceil(LANES);
            let direct = width == PANEL || width == LANES;
            let i = tile * tile_rows;
            let rows = tile_rows.min(self.rows.len() - i);
            // both panels straight into the output
            let beside = (n - col - width).min(PANEL);
            let two = takes_two && panel + 1 < self.panels.end && (beside == PANEL || beside == LANES);
            t += 1 + usize::from(two);
            // SAFETY: rows i.. of the left operand exist; the tile writes either rows of `edge`, or rows of the
            // output that belong to this task alone (its rows and its panels), in bounds for `width` columns.
            unsafe {
                let a = a.add(i * a_row);
                let steps = to - from;
                let words = |c, c_row, accumulate| Words {
                    steps,
                    a,
                    a_row,
                    a_step: 1,
                    b,
                    c,
                    c_row,
                    accumulate,
                    ..Words::NOWHERE
                };
                let at = |r: usize| target.at(i + r, col);
                if two {
                    let next = self.b.panel(panel + 1)[from * PANEL..].as_ptr();
                    let nowhere = words(std::ptr::null_mut(), 0, false);
                    let words = match target.out {
                        SharedView::F32(c) => words(c.start().add(at(0)), target.stride, accumulate),
                        SharedView::Bf16(c) => {
                            Words { half: c.start().add(at(0)), half_row: target.stride, ..nowhere }
                        }
                    };
                    engine.tile_of_two(words, next, rows, vecs + beside / LANES);
                    continue;
                }
                let c = match target.out {
                    SharedView::F32(c) => c,
                    SharedView::Bf16(c) if engine.pairs() && direct => {
                        let half = c.start().add(at(0));
                        let words = words(std::ptr::null_mut(), 0, false);
                        engine.tile(Words { half, half_row: target.stride, ..words }, rows, vecs);
                        continue;
                    }
                    SharedView::Bf16(c) => {
                        engine.tile(words(edge.as_mut_ptr(), PANEL, false), rows, vecs);
                        for r in 0..rows {
                            let out = c.slice(at(r), width);
                            store_halves(s, &edge[r * PANEL..][..width], out);
                        }
                        continue;
                    }
                };
                if direct {
                    engine.tile(words(c.start().add(at(0)), target.stride, accumulate), rows, vecs);
                    continue;
                }
                for r in 0..if accumulate { rows } else { 0 } {
                    edge[r * PANEL..][..width].copy_from_slice(c.slice(at(r), width));
                }
                engine.tile(words(edge.as_mut_ptr(), PANEL, accumulate), rows, vecs);
                for r in 0..rows {
                    c.slice(at(r), width).copy_from_slice(&edge[r * PANEL..][..width]);
                }
            }
        }
    }
}
