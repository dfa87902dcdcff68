//! `c = a b` with a packed right operand: y = x Wᵀ and dx = dy W.

use super::engine::{Engine, Words};
use super::tile::{MAX_ROWS, PANEL};
use super::{Operand, Packed, check_offsets};
use crate::cpu::{Cpu, SharedMut};
use crate::scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::ViewMut;

/// Rows of a task: eight register tiles; their left operand stays in the second-level cache while panels pass.
const ROW_TILE: usize = 8 * MAX_ROWS;

/// `c[i] (+)= a[i] b_g(i)` for every row: a [rows, k], b packed [groups, k, n], c [rows, n], f32 sums.
///
/// Rows `offsets[g]..offsets[g + 1]` use group g. With `accumulate` the sums start from what is in `c` (f32 only).
///
/// # Panics
/// When shapes do not fit, or on `accumulate` into bf16.
pub fn matmul(cpu: &Cpu, a: Operand<'_>, offsets: &[u32], b: &Packed, c: ViewMut<'_>, accumulate: bool) {
    b.check(cpu);
    check_offsets("matmul", offsets, a.rows());
    assert_eq!(
        (a.cols, offsets.len()),
        (b.k, b.groups + 1),
        "matmul: depth and groups of left and right operand"
    );
    assert_eq!(c.len(), a.rows() * b.n, "matmul: output of {} x {}", a.rows(), b.n);
    let out = match c {
        ViewMut::F32(c) => Out::F32(SharedMut::new(c)),
        ViewMut::Bf16(c) => {
            assert!(!accumulate, "matmul: a bf16 output cannot accumulate");
            Out::Bf16(SharedMut::new(c))
        }
    };
    let panels = b.n.div_ceil(PANEL);
    let tiles: usize = offsets.windows(2).map(|w| ((w[1] - w[0]) as usize).div_ceil(ROW_TILE)).sum();
    // few rows: cut the panels too, so that every thread has work; which cut it is changes no bit
    let chunk = if tiles >= 8 { panels } else { panels.div_ceil(8).max(4) };
    let chunks = panels.div_ceil(chunk.max(1));
    cpu.run(tiles * chunks, |task| {
        let (mut tile, part) = (task / chunks, task % chunks);
        for g in 0..b.groups {
            let (start, end) = (offsets[g] as usize, offsets[g + 1] as usize);
            let here = (end - start).div_ceil(ROW_TILE);
            if tile < here {
                let first = start + tile * ROW_TILE;
                let rows = ROW_TILE.min(end - first);
                let panels = part * chunk..panels.min((part + 1) * chunk);
                let task = Task { a, b, group: g, first, rows, panels, out, accumulate };
                return cpu.level().dispatch_product(task);
            }
            tile -= here;
        }
    });
}

#[derive(Clone, Copy)]
enum Out {
    F32(SharedMut<f32>),
    Bf16(SharedMut<minke_num::bf16>),
}

struct Task<'a> {
    a: Operand<'a>,
    b: &'a Packed,
    group: usize,
    first: usize,
    rows: usize,
    panels: std::ops::Range<usize>,
    out: Out,
    accumulate: bool,
}

impl Kernel for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let engine = Engine::new(s, self.b.compute);
        if let Some((a, stride)) = engine.in_place(&self.a, self.first) {
            self.tiles(s, engine, a, stride);
            return;
        }
        let steps = self.b.steps;
        let mut packed = scratch::take::<u32>(self.rows * steps);
        if steps > 0 {
            for (i, out) in packed.chunks_exact_mut(steps).enumerate() {
                engine.pack_row(self.a.row(self.first + i), out);
            }
        }
        self.tiles(s, engine, packed.as_ptr(), steps);
    }
}

impl Task<'_> {
    #[inline(always)]
    fn tiles<S: Simd>(&self, s: S, engine: Engine<S>, a: *const u32, a_row: usize) {
        let n = self.b.n;
        let mut edge = [0.0f32; MAX_ROWS * PANEL];
        for panel in self.panels.clone() {
            let b = self.b.panel(self.group, panel).as_ptr();
            let col = panel * PANEL;
            let width = PANEL.min(n - col);
            let vecs = width.div_ceil(LANES);
            let direct = width == PANEL || width == LANES && !engine.writes_whole_panels();
            for i in (0..self.rows).step_by(MAX_ROWS) {
                let rows = MAX_ROWS.min(self.rows - i);
                let row = self.first + i;
                // SAFETY: rows i.. of the left operand exist; the tile writes either rows of `edge`, or rows of `out`
                // that belong to this task alone (its row range and its panels), in bounds for `width` columns.
                unsafe {
                    let a = a.add(i * a_row);
                    let words = |c, c_row, accumulate| Words {
                        steps: self.b.steps,
                        a,
                        a_row,
                        a_step: 1,
                        b,
                        c,
                        c_row,
                        accumulate,
                    };
                    match self.out {
                        Out::F32(out) if direct => {
                            let c = out.start().add(row * n + col);
                            engine.tile(words(c, n, self.accumulate), rows, vecs);
                        }
                        Out::F32(out) => {
                            for r in 0..if self.accumulate { rows } else { 0 } {
                                edge[r * PANEL..][..width]
                                    .copy_from_slice(out.slice((row + r) * n + col, width));
                            }
                            engine.tile(words(edge.as_mut_ptr(), PANEL, self.accumulate), rows, vecs);
                            for r in 0..rows {
                                out.slice((row + r) * n + col, width)
                                    .copy_from_slice(&edge[r * PANEL..][..width]);
                            }
                        }
                        Out::Bf16(out) => {
                            engine.tile(words(edge.as_mut_ptr(), PANEL, false), rows, vecs);
                            for r in 0..rows {
                                let out = out.slice((row + r) * n + col, width);
                                let from = &edge[r * PANEL..][..PANEL];
                                for (v, out) in out.chunks_mut(LANES).enumerate() {
                                    let x =
                                        s.load(from[v * LANES..][..LANES].try_into().expect("sixteen lanes"));
                                    match out.try_into() {
                                        Ok(out) => s.store_bf16(x, out),
                                        Err(_) => {
                                            let mut full = [minke_num::bf16::ZERO; LANES];
                                            s.store_bf16(x, &mut full);
                                            out.copy_from_slice(&full[..out.len()]);
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
