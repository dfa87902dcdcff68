//! Gradients: one task per (sequence, key head), blocks of keys outside, tiles of query rows inside.

use crate::cpu::Cpu;
use crate::gemm::tile::{PANEL, Tile};
use crate::scratch::with_scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::View;

use super::forward::lanes;
use super::math::{exp2, product};
use super::pack::{HeadRows, SharedRows, pack_columns, pack_panels, quad_len};
use super::{AttentionShape, BLOCK, Segment};

/// Query rows of a tile: the depth of the products that make the gradients of keys and values, and a multiple of the
/// widest register tile.
const TILE: usize = 28;

/// What the gradients are made from.
pub struct Inputs<'a> {
    pub q: View<'a>,
    pub k: View<'a>,
    pub v: View<'a>,
    pub out: View<'a>,
    pub lse: &'a [f32],
    pub d_out: View<'a>,
}

/// Runs every (sequence, key head) as a task; `outputs` are the gradients of q, k and v.
pub fn run(
    cpu: &Cpu,
    shape: &AttentionShape,
    inputs: &Inputs,
    segments: &[Segment],
    outputs: &[SharedRows; 3],
) {
    cpu.run(segments.len() * shape.kv_heads, |task| {
        let (segment, kv_head) = (segments[task / shape.kv_heads], task % shape.kv_heads);
        if segment.len == 0 {
            return;
        }
        let rows = segment.len * shape.group();
        with_scratch(Parts::sizes(shape, rows).iter().sum(), |scratch| {
            let parts = Parts::split(shape, rows, scratch);
            cpu.dispatch(Task { shape, inputs, segment, kv_head, rows, outputs, parts });
        });
    });
}

/// The working memory of a task. Rows are (position, query head of the group).
struct Parts<'a> {
    /// Queries times scale and log2(e), `[rows][qk]`.
    q: &'a mut [f32],
    /// Queries in panels, `[ceil(qk / 32)][rows][32]`.
    q_panels: &'a mut [f32],
    /// Gradients of the outputs, `[rows][v]`, and in panels.
    d_out: &'a mut [f32],
    d_out_panels: &'a mut [f32],
    /// Logarithms (base 2) of the rows' sums, and `rowsum(d_out * out)`.
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    /// Gradients of the queries, `[rows][qk padded to vectors]`.
    d_q: &'a mut [f32],
    /// One block of keys as columns, of keys as rows, of values as columns.
    k_columns: &'a mut [f32],
    k_panels: &'a mut [f32],
    v_columns: &'a mut [f32],
    /// Gradients of the block's keys and values, padded to vectors.
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
    /// Scores, then probabilities, of one tile; and their gradients.
    p: &'a mut [f32],
    d_s: &'a mut [f32],
    /// Four rows being transposed.
    quad: &'a mut [f32],
}

impl<'a> Parts<'a> {
    fn sizes(shape: &AttentionShape, rows: usize) -> [usize; 15] {
        let AttentionShape { qk_dim: qk, v_dim: v, .. } = *shape;
        [
            rows * qk,
            rows * qk.next_multiple_of(PANEL),
            rows * v,
            rows * v.next_multiple_of(PANEL),
            rows,
            rows,
            rows * qk.next_multiple_of(LANES),
            BLOCK * qk,
            BLOCK * qk.next_multiple_of(PANEL),
            BLOCK * v,
            BLOCK * qk.next_multiple_of(LANES),
            BLOCK * v.next_multiple_of(LANES),
            TILE * BLOCK,
            TILE * BLOCK,
            quad_len(qk.max(v)),
        ]
        .map(|x| x.next_multiple_of(LANES))
    }

    fn split(shape: &AttentionShape, rows: usize, mut scratch: &'a mut [f32]) -> Self {
        let parts = Self::sizes(shape, rows).map(|len| {
            let (part, rest) = std::mem::take(&mut scratch).split_at_mut(len);
            scratch = rest;
            part
        });
        let [
            q,
            q_panels,
            d_out,
            d_out_panels,
            lse,
            delta,
            d_q,
            k_columns,
            k_panels,
            v_columns,
            d_k,
            d_v,
            p,
            d_s,
            quad,
        ] = parts;
        Self {
            q,
            q_panels,
            d_out,
            d_out_panels,
            lse,
            delta,
            d_q,
            k_columns,
            k_panels,
            v_columns,
            d_k,
            d_v,
            p,
            d_s,
            quad,
        }
    }
}

struct Task<'a> {
    shape: &'a AttentionShape,
    inputs: &'a Inputs<'a>,
    segment: Segment,
    kv_head: usize,
    rows: usize,
    outputs: &'a [SharedRows; 3],
    parts: Parts<'a>,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.start(s);
        for block in 0..self.segment.len.div_ceil(BLOCK) {
            self.block(s, block);
        }
        let AttentionShape { qk_dim: qk, scale, .. } = *self.shape;
        let rows = self.query_rows(self.inputs.q, qk);
        let d_q = self.parts.d_q.chunks_exact(qk.next_multiple_of(LANES));
        for (r, row) in d_q.take(self.rows).enumerate() {
            // SAFETY: this task alone owns these rows of its query heads.
            unsafe { self.outputs[0].write(s, rows.at(r), qk, row, scale) };
        }
    }
}

impl Task<'_> {
    /// The rows of this task's query heads in a tensor of queries or outputs.
    #[inline(always)]
    fn query_rows<'b>(&self, x: View<'b>, dim: usize) -> HeadRows<'b> {
        let group = self.shape.group();
        HeadRows {
            x,
            token: self.segment.start,
            heads: self.shape.heads,
            head: self.kv_head * group,
            group,
            dim,
        }
    }

    /// The rows of this task's key head in a tensor of keys or values.
    #[inline(always)]
    fn key_rows<'b>(&self, x: View<'b>, dim: usize) -> HeadRows<'b> {
        let heads = self.shape.kv_heads;
        HeadRows { x, token: self.segment.start, heads, head: self.kv_head, group: 1, dim }
    }

    /// Packs what belongs to the query rows.
    #[inline(always)]
    fn start<S: Simd>(&mut self, s: S) {
        let AttentionShape { qk_dim: qk, v_dim: v, scale, .. } = *self.shape;
        let factor = (f64::from(scale) * std::f64::consts::LOG2_E) as f32;
        let q = self.query_rows(self.inputs.q, qk);
        let out = self.query_rows(self.inputs.out, v);
        let d_out = self.query_rows(self.inputs.d_out, v);
        let parts = &mut self.parts;
        for r in 0..self.rows {
            q.read(s, r, factor, &mut parts.q[r * qk..]);
            let d_row = &mut parts.d_out[r * v..][..v];
            d_out.read(s, r, 1.0, d_row);
            let row = &mut parts.quad[..v];
            out.read(s, r, 1.0, row);
            let mut sum = s.zero();
            for (x, y) in row.chunks(LANES).zip(d_row.chunks(LANES)) {
                sum = s.fma(s.load_part(x, 0.0), s.load_part(y, 0.0), sum);
            }
            parts.delta[r] = s.sum(sum);
            parts.lse[r] = self.inputs.lse[out.at(r) / v] * std::f32::consts::LOG2_E;
        }
        pack_panels(s, &q, 0, self.rows, self.rows * PANEL, parts.q_panels);
        pack_panels(s, &d_out, 0, self.rows, self.rows * PANEL, parts.d_out_panels);
        parts.d_q.fill(0.0);
    }

    /// All that one block of keys takes part in.
    #[inline(always)]
    fn block<S: Simd>(&mut self, s: S, block: usize) {
        let AttentionShape { qk_dim: qk, v_dim: v, scale, .. } = *self.shape;
        let (qk_pad, v_pad) = (qk.next_multiple_of(LANES), v.next_multiple_of(LANES));
        let (qk_vecs, v_vecs) = (qk.div_ceil(LANES), v.div_ceil(LANES));
        let from = block * BLOCK;
        let count = (self.segment.len - from).min(BLOCK);
        let keys = self.key_rows(self.inputs.k, qk);
        let values = self.key_rows(self.inputs.v, v);
        let (group, last_row) = (self.shape.group(), self.rows);
        let parts = &mut self.parts;
        pack_columns(s, &keys, from, count, parts.quad, parts.k_columns);
        pack_columns(s, &values, from, count, parts.quad, parts.v_columns);
        pack_panels(s, &keys, from, count, BLOCK * PANEL, parts.k_panels);
        parts.d_k.fill(0.0);
        parts.d_v.fill(0.0);
        let mut row = from * group;
        while row < last_row {
            let rows = TILE.min(last_row - row);
            // keys of the block that the first and the last row of the tile see
            let sees = |r: usize| (row + r) / group + 1 - from;
            let (least, visible) = (sees(0), sees(rows - 1).min(BLOCK));
            let vecs = visible.div_ceil(LANES);
            let scores = |a: &[f32], depth: usize, b: &[f32], c: &mut [f32]| Tile {
                depth,
                a: a[row * depth..(row + rows) * depth].as_ptr(),
                a_row: depth,
                a_step: 1,
                b: b[..BLOCK * depth].as_ptr(),
                c: c[..TILE * BLOCK].as_mut_ptr(),
                c_row: BLOCK,
                accumulate: false,
            };
            let s_tile = scores(parts.q, qk, parts.k_columns, parts.p);
            let d_p_tile = scores(parts.d_out, v, parts.v_columns, parts.d_s);
            // SAFETY: the columns are two panels as deep as the rows are wide; `p` and `d_s` have room for the tile.
            unsafe {
                product(s, s_tile, rows, vecs, qk * PANEL);
                product(s, d_p_tile, rows, vecs, v * PANEL);
            }
            let (lse, delta) = (&parts.lse[row..row + rows], &parts.delta[row..row + rows]);
            if least >= BLOCK {
                score_gradients::<S, false>(s, parts.p, parts.d_s, lse, delta, vecs, sees);
            } else {
                score_gradients::<S, true>(s, parts.p, parts.d_s, lse, delta, vecs, sees);
            }
            // keys by width: the tile's rows are the depth
            let key_gradient = |a: &[f32], b: &[f32], c: &mut [f32], width: usize| Tile {
                depth: rows,
                a: a.as_ptr(),
                a_row: 1,
                a_step: BLOCK,
                b: b[row * PANEL..].as_ptr(),
                c: c[..BLOCK * width].as_mut_ptr(),
                c_row: width,
                accumulate: true,
            };
            let d_v_tile = key_gradient(parts.p, parts.d_out_panels, parts.d_v, v_pad);
            let d_k_tile = key_gradient(parts.d_s, parts.q_panels, parts.d_k, qk_pad);
            let d_q_tile = Tile {
                depth: visible,
                a: parts.d_s.as_ptr(),
                a_row: BLOCK,
                a_step: 1,
                b: parts.k_panels.as_ptr(),
                c: parts.d_q[row * qk_pad..(row + rows) * qk_pad].as_mut_ptr(),
                c_row: qk_pad,
                accumulate: true,
            };
            // SAFETY: panels of the rows are `last_row` deep and begin here at `row`; `d_k` and `d_v` have a block of
            // rows, of which `visible` are touched; `d_q` was sliced to these rows; `k_panels` are a block deep.
            unsafe {
                product(s, d_v_tile, visible, v_vecs, last_row * PANEL);
                product(s, d_k_tile, visible, qk_vecs, last_row * PANEL);
                product(s, d_q_tile, rows, qk_vecs, BLOCK * PANEL);
            }
            row += rows;
        }
        for i in 0..count {
            // SAFETY: this task alone owns these rows of its key head.
            unsafe {
                self.outputs[1].write(s, keys.at(from + i), qk, &parts.d_k[i * qk_pad..][..qk_pad], scale);
                self.outputs[2].write(s, values.at(from + i), v, &parts.d_v[i * v_pad..][..v_pad], 1.0);
            }
        }
    }
}

/// `p = 2^(scores - lse)`, `d_s = p * (d_p - delta)`, in place; keys that a row does not see give exact zeros.
#[inline(always)]
fn score_gradients<S: Simd, const MASKED: bool>(
    s: S,
    p: &mut [f32],
    d_s: &mut [f32],
    lse: &[f32],
    delta: &[f32],
    vecs: usize,
    sees: impl Fn(usize) -> usize,
) {
    let lanes = lanes(s);
    // an infinite `lse` of hostile input must not leave the range of `exp2`
    let most = s.splat(127.0);
    let (p, _) = p.as_chunks_mut::<BLOCK>();
    let (d_s, _) = d_s.as_chunks_mut::<BLOCK>();
    for (r, (((p, d_s), &lse), &delta)) in p.iter_mut().zip(d_s).zip(lse).zip(delta).enumerate() {
        let (p, _) = p.as_chunks_mut::<LANES>();
        let (d_s, _) = d_s.as_chunks_mut::<LANES>();
        let limit = s.splat(if MASKED { sees(r).min(BLOCK) as f32 } else { 0.0 });
        let (lse, delta) = (s.splat(lse), s.splat(delta));
        for v in 0..BLOCK / LANES {
            if MASKED && v >= vecs {
                break;
            }
            let mut weight = exp2(s, s.min(most, s.sub(s.load(&p[v]), lse)));
            let mut change = s.mul(weight, s.sub(s.load(&d_s[v]), delta));
            if MASKED {
                weight = s.select_lt(lanes[v], limit, weight, s.zero());
                change = s.select_lt(lanes[v], limit, change, s.zero());
            }
            s.store(weight, &mut p[v]);
            s.store(change, &mut d_s[v]);
        }
    }
}
