//! `c = aᵀ b` over rows: dW = dyᵀ x, the depth is the tokens.

use super::engine::{Engine, Words};
use super::tile::PANEL;
use super::{Compute, Operand, check_offsets, over_outputs};
use crate::cpu::{Cpu, SharedMut};
use crate::scratch;
use crate::simd::{GRID_ROWS, Kernel, LANES, Simd};

/// Depth packed at a time: a panel of it stays in the first-level cache.
const DEPTH_BLOCK: usize = 256;

/// `c_g (+)= a_gᵀ b_g`: a [rows, m], b [rows, n], c [groups, m, n], f32 sums over the rows of each group in ascending
/// order. With `accumulate` the sums start from what is in `c`.
///
/// # Panics
/// When shapes do not fit.
pub fn matmul_tn(
    cpu: &Cpu,
    a: Operand<'_>,
    b: Operand<'_>,
    offsets: &[u32],
    compute: Compute,
    c: &mut [f32],
    accumulate: bool,
) {
    let (m, n, groups) = (a.cols, b.cols, offsets.len().saturating_sub(1));
    assert_eq!(a.rows(), b.rows(), "matmul_tn: rows of left and right operand");
    check_offsets("matmul_tn", offsets, a.rows());
    assert_eq!(c.len(), groups * m * n, "matmul_tn: output of {groups} x {m} x {n}");
    let out = SharedMut::new(c);
    over_outputs(cpu, groups, compute, [m, n], |g, rows, cols| {
        let depth = offsets[g] as usize..offsets[g + 1] as usize;
        let task = Task { a, b, depth, rows, cols, compute, out, base: g * m * n, accumulate };
        cpu.level().dispatch_product(task);
    });
}

struct Task<'a> {
    a: Operand<'a>,
    b: Operand<'a>,
    depth: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    compute: Compute,
    out: SharedMut<f32>,
    base: usize,
    accumulate: bool,
}

impl Kernel for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Task { a, b, depth, rows, cols, compute, out, base, accumulate } = self;
        let engine = Engine::new(s, compute);
        let n = b.cols;
        let steps = engine.steps(DEPTH_BLOCK.min(depth.len()));
        let mut edge = [0.0f32; GRID_ROWS * PANEL];
        let tile_rows = engine.tile_rows();
        // strips of both operands, with room for the whole vectors that packing stores
        // (rows along the depth: an odd number of cache lines apart, so that they do not meet in one set)
        let (a_stride, b_stride) = (
            steps * tile_rows + LANES * if engine.rows_along() { tile_rows } else { 1 },
            steps * PANEL + LANES,
        );
        let (a_words, b_words) =
            (rows.len().div_ceil(tile_rows) * a_stride, cols.len().div_ceil(PANEL) * b_stride);
        let (mut a_buf, mut b_buf) = (scratch::take::<u32>(a_words), scratch::take::<u32>(b_words));
        let (a_packed, b_packed) = (&mut a_buf[..], &mut b_buf[..]);
        let mut at = depth.start;
        // an empty depth still writes: its sums are what they start from
        while at < depth.end || at == depth.start {
            let block = at..depth.end.min(at + DEPTH_BLOCK);
            let steps = engine.steps(block.len());
            let go_on = accumulate || at > depth.start;
            if engine.rows_along() {
                engine.pack_turned(&a, block.clone(), rows.clone(), a_stride / tile_rows, a_packed);
            } else {
                engine.pack_strips(&a, block.clone(), rows.clone(), tile_rows, a_stride, a_packed);
            }
            engine.pack_strips(&b, block.clone(), cols.clone(), PANEL, b_stride, b_packed);
            for i in (0..rows.len()).step_by(tile_rows) {
                for j in (0..cols.len()).step_by(PANEL) {
                    let width = PANEL.min(cols.len() - j);
                    let vecs = width.div_ceil(LANES);
                    let direct = width == PANEL || width == LANES;
                    let height = tile_rows.min(rows.len() - i);
                    let (a_row, a_step) =
                        if engine.rows_along() { (a_stride / tile_rows, 1) } else { (1, height) };
                    let first = base + (rows.start + i) * n + cols.start + j;
                    // SAFETY: both operands hold `steps` steps from these places; the output rows and columns
                    // belong to this task alone and are in bounds for `width` columns.
                    unsafe {
                        let words = |c, c_row| Words {
                            steps,
                            a: a_packed.as_ptr().add(i / tile_rows * a_stride),
                            a_row,
                            a_step,
                            b: b_packed.as_ptr().add(j / PANEL * b_stride),
                            c,
                            c_row,
                            accumulate: go_on,
                            ..Words::NOWHERE
                        };
                        if direct {
                            engine.tile(words(out.start().add(first), n), height, vecs);
                        } else {
                            for r in 0..if go_on { height } else { 0 } {
                                edge[r * PANEL..][..width].copy_from_slice(out.slice(first + r * n, width));
                            }
                            engine.tile(words(edge.as_mut_ptr(), PANEL), height, vecs);
                            for r in 0..height {
                                out.slice(first + r * n, width).copy_from_slice(&edge[r * PANEL..][..width]);
                            }
                        }
                    }
                }
            }
            if block.is_empty() {
                break;
            }
            at = block.end;
        }
    }
}
