//! Gradients: one task per (sequence, key head), blocks of keys outside, tiles of query rows inside.

use crate::cpu::Cpu;
use crate::gemm::Compute;
use crate::gemm::engine::{Engine, Rows, Words};
use crate::gemm::tile::PANEL;
use crate::rows::load;
use crate::scratch::with_scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::{DType, View};

use super::forward::lanes;
use super::math::{exp2, product};
use super::pack::{HeadRows, SharedRows};
use super::{AttentionShape, BLOCK, Segment, compute};

/// Query rows of a tile: the depth of the products that make the gradients of keys and values; even, and a multiple of
/// the widest register tile.
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
    let Inputs { q, k, v, d_out, .. } = inputs;
    let compute = compute(cpu, [q, k, v, d_out].iter().all(|x| x.dtype() == DType::Bf16));
    cpu.run(segments.len() * shape.kv_heads, |task| {
        let (segment, kv_head) = (segments[task / shape.kv_heads], task % shape.kv_heads);
        if segment.len == 0 {
            return;
        }
        let rows = segment.len * shape.group();
        with_scratch(Parts::sizes(shape, rows).iter().sum(), |scratch| {
            let parts = Parts::split(shape, rows, scratch);
            let task = Task { shape, inputs, segment, kv_head, rows, compute, outputs, parts };
            cpu.level().dispatch_product(task);
        });
    });
}

/// Words of a task of `rows`.
pub fn scratch_words(shape: &AttentionShape, rows: usize) -> usize {
    Parts::sizes(shape, rows).iter().sum()
}

/// The working memory of a task. Rows are (position, query head of the group); what products read is words of the
/// task's engine: f32, or bf16 pairs.
struct Parts<'a> {
    /// Queries, `[rows][qk]`, and in panels, `[ceil(qk / 32)][rows][32]`.
    q: &'a mut [u32],
    q_panels: &'a mut [u32],
    /// Gradients of the outputs, `[rows][v]`, and in panels.
    d_out: &'a mut [u32],
    d_out_panels: &'a mut [u32],
    /// Logarithms (base 2) of the rows' sums, and `rowsum(d_out * out)`.
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    /// Gradients of the queries, `[rows][qk padded to vectors]`.
    d_q: &'a mut [f32],
    /// One block of keys as columns, of keys as rows, of values as columns.
    k_columns: &'a mut [u32],
    k_panels: &'a mut [u32],
    v_columns: &'a mut [u32],
    /// Gradients of the block's keys and values, padded to vectors.
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
    /// One tile's scores and gradients of probabilities, `[TILE][BLOCK]`.
    scores: &'a mut [f32],
    d_p: &'a mut [f32],
    /// Probabilities and gradients of scores with the depth along the rows, and the latter along the keys.
    p: &'a mut [u32],
    d_s: &'a mut [u32],
    d_s_along: &'a mut [u32],
}

impl<'a> Parts<'a> {
    /// For f32 words, the larger. Each a multiple of a vector, so that all start on a cache line.
    fn sizes(shape: &AttentionShape, rows: usize) -> [usize; 17] {
        let AttentionShape { qk_dim: qk, v_dim: v, .. } = *shape;
        let even = rows.next_multiple_of(2);
        [
            rows * qk,
            even * qk.next_multiple_of(PANEL),
            rows * v,
            even * v.next_multiple_of(PANEL),
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
            TILE * BLOCK,
            TILE * BLOCK,
            TILE * BLOCK,
        ]
        .map(|x| x.next_multiple_of(LANES))
    }

    fn split(shape: &AttentionShape, rows: usize, mut scratch: &'a mut [u32]) -> Self {
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
            scores,
            d_p,
            p,
            d_s,
            d_s_along,
        ] = parts;
        let [lse, delta, d_q, d_k, d_v, scores, d_p] =
            [lse, delta, d_q, d_k, d_v, scores, d_p].map(bytemuck::cast_slice_mut);
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
            scores,
            d_p,
            p,
            d_s,
            d_s_along,
        }
    }
}

struct Task<'a> {
    shape: &'a AttentionShape,
    inputs: &'a Inputs<'a>,
    segment: Segment,
    kv_head: usize,
    rows: usize,
    compute: Compute,
    outputs: &'a [SharedRows; 3],
    parts: Parts<'a>,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let engine = Engine::new(s, self.compute);
        self.start(engine);
        for block in 0..self.segment.len.div_ceil(BLOCK) {
            self.block(engine, block);
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
    fn start<S: Simd>(&mut self, engine: Engine<S>) {
        let s = engine.simd();
        let AttentionShape { qk_dim: qk, v_dim: v, .. } = *self.shape;
        let q = self.query_rows(self.inputs.q, qk);
        let out = self.query_rows(self.inputs.out, v);
        let d_out = self.query_rows(self.inputs.d_out, v);
        let (q_steps, v_steps) = (engine.steps(qk), engine.steps(v));
        let parts = &mut self.parts;
        for r in 0..self.rows {
            engine.pack_row(q.row(r), &mut parts.q[r * q_steps..][..q_steps]);
            engine.pack_row(d_out.row(r), &mut parts.d_out[r * v_steps..][..v_steps]);
            let (x, y) = (out.row(r), d_out.row(r));
            let mut sum = s.zero();
            for i in (0..v).step_by(LANES) {
                let n = LANES.min(v - i);
                sum = s.fma(load(s, x, i, n), load(s, y, i, n), sum);
            }
            parts.delta[r] = s.sum(sum);
            parts.lse[r] = self.inputs.lse[out.at(r) / v] * std::f32::consts::LOG2_E;
        }
        let panel = engine.steps(self.rows) * PANEL;
        engine.pack_strips(&q, 0..self.rows, 0..qk, PANEL, panel, parts.q_panels);
        engine.pack_strips(&d_out, 0..self.rows, 0..v, PANEL, panel, parts.d_out_panels);
        parts.d_q.fill(0.0);
    }

    /// All that one block of keys takes part in.
    #[inline(always)]
    fn block<S: Simd>(&mut self, engine: Engine<S>, block: usize) {
        let s = engine.simd();
        let AttentionShape { qk_dim: qk, v_dim: v, scale, .. } = *self.shape;
        let factor = (f64::from(scale) * std::f64::consts::LOG2_E) as f32;
        let (qk_pad, v_pad) = (qk.next_multiple_of(LANES), v.next_multiple_of(LANES));
        let (qk_vecs, v_vecs) = (qk.div_ceil(LANES), v.div_ceil(LANES));
        let (qk_steps, v_steps, block_steps) = (engine.steps(qk), engine.steps(v), engine.steps(BLOCK));
        let from = block * BLOCK;
        let count = (self.segment.len - from).min(BLOCK);
        let keys = self.key_rows(self.inputs.k, qk);
        let values = self.key_rows(self.inputs.v, v);
        let (group, last_row) = (self.shape.group(), self.rows);
        let rows_panel = engine.steps(last_row) * PANEL;
        let parts = &mut self.parts;
        for (first, (k, v)) in (0..count).step_by(PANEL).zip(
            parts.k_columns.chunks_mut(qk_steps * PANEL).zip(parts.v_columns.chunks_mut(v_steps * PANEL)),
        ) {
            let positions = from + first..from + count.min(first + PANEL);
            engine.pack_columns(&keys, positions.clone(), k);
            engine.pack_columns(&values, positions, v);
        }
        engine.pack_strips(&keys, from..from + count, 0..qk, PANEL, block_steps * PANEL, parts.k_panels);
        parts.d_k.fill(0.0);
        parts.d_v.fill(0.0);
        let mut row = from * group;
        while row < last_row {
            let rows = TILE.min(last_row - row);
            // keys of the block that the first and the last row of the tile see
            let sees = |r: usize| (row + r) / group + 1 - from;
            let (least, visible) = (sees(0), sees(rows - 1).min(BLOCK));
            let vecs = visible.div_ceil(LANES);
            let scores = |a: &[u32], steps: usize, b: &[u32], c: &mut [f32]| Words {
                steps,
                a: a[row * steps..(row + rows) * steps].as_ptr(),
                a_row: steps,
                a_step: 1,
                b: b[..BLOCK * steps].as_ptr(),
                c: c[..TILE * BLOCK].as_mut_ptr(),
                c_row: BLOCK,
                ..Words::NOWHERE
            };
            let s_tile = scores(parts.q, qk_steps, parts.k_columns, parts.scores);
            let d_p_tile = scores(parts.d_out, v_steps, parts.v_columns, parts.d_p);
            // SAFETY: the columns are two panels as deep as the rows are wide; the tiles have room for `TILE` rows.
            unsafe {
                product(engine, s_tile, rows, vecs, qk_steps * PANEL);
                product(engine, d_p_tile, rows, vecs, v_steps * PANEL);
            }
            let tile = ScoreTile {
                scores: &parts.scores[..rows * BLOCK],
                d_p: &parts.d_p[..rows * BLOCK],
                p: parts.p,
                d_s: parts.d_s,
                d_s_along: parts.d_s_along,
                lse: &parts.lse[row..row + rows],
                delta: &parts.delta[row..row + rows],
            };
            if least >= BLOCK {
                score_gradients::<S, false>(engine, tile, factor, sees);
            } else {
                score_gradients::<S, true>(engine, tile, factor, sees);
            }
            // keys by width: the tile's rows are the depth
            let key_gradient = |a: &[u32], b: &[u32], c: &mut [f32], width: usize| Words {
                steps: engine.steps(rows),
                a: a.as_ptr(),
                a_row: 1,
                a_step: BLOCK,
                b: b[engine.steps(row) * PANEL..].as_ptr(),
                c: c[..BLOCK * width].as_mut_ptr(),
                c_row: width,
                accumulate: true,
                ..Words::NOWHERE
            };
            let d_v_tile = key_gradient(parts.p, parts.d_out_panels, parts.d_v, v_pad);
            let d_k_tile = key_gradient(parts.d_s, parts.q_panels, parts.d_k, qk_pad);
            let d_q_tile = Words {
                steps: engine.steps(visible),
                a: if engine.pairs() { parts.d_s_along.as_ptr() } else { parts.d_s.as_ptr() },
                a_row: block_steps,
                a_step: 1,
                b: parts.k_panels.as_ptr(),
                c: parts.d_q[row * qk_pad..(row + rows) * qk_pad].as_mut_ptr(),
                c_row: qk_pad,
                accumulate: true,
                ..Words::NOWHERE
            };
            // SAFETY: panels of the rows are `last_row` deep and begin here at `row`; `d_k` and `d_v` have a block of
            // rows, of which `visible` are touched; `d_q` was sliced to these rows; `k_panels` are a block deep.
            unsafe {
                product(engine, d_v_tile, visible, v_vecs, rows_panel);
                product(engine, d_k_tile, visible, qk_vecs, rows_panel);
                product(engine, d_q_tile, rows, qk_vecs, block_steps * PANEL);
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

/// The scores of one tile and what becomes of them.
struct ScoreTile<'a> {
    scores: &'a [f32],
    d_p: &'a [f32],
    p: &'a mut [u32],
    d_s: &'a mut [u32],
    d_s_along: &'a mut [u32],
    lse: &'a [f32],
    delta: &'a [f32],
}

/// `p = 2^(factor * scores - lse)`, `d_s = p * (d_p - delta)`; keys that a row does not see give exact zeros.
///
/// As f32 words, both are `[rows][BLOCK]`. As pairs, words join two rows; `d_s` is also written with words that join two
/// keys, which is what the gradient of the queries runs along.
#[inline(always)]
fn score_gradients<S: Simd, const MASKED: bool>(
    engine: Engine<S>,
    tile: ScoreTile,
    factor: f32,
    sees: impl Fn(usize) -> usize,
) {
    const VECS: usize = BLOCK / LANES;
    let ScoreTile { scores, d_p, p, d_s, d_s_along, lse, delta } = tile;
    let s = engine.simd();
    let (lanes, factor) = (lanes(s), s.splat(factor));
    // an infinite `lse` of hostile input must not leave the range of `exp2`
    let most = s.splat(127.0);
    let rows = lse.len();
    let (scores, _) = scores.as_chunks::<BLOCK>();
    let (d_p, _) = d_p.as_chunks::<BLOCK>();
    let (p, _) = bytemuck::cast_slice_mut::<u32, f32>(p).as_chunks_mut::<BLOCK>();
    let (d_s, _) = bytemuck::cast_slice_mut::<u32, f32>(d_s).as_chunks_mut::<BLOCK>();
    let along = d_s_along.chunks_exact_mut(BLOCK / 2);
    // the row above, which waits for its partner
    let (mut p_above, mut d_s_above) = ([s.zero(); VECS], [s.zero(); VECS]);
    for (r, (((scores, d_p), (&lse, &delta)), along)) in
        scores.iter().zip(d_p).zip(lse.iter().zip(delta)).zip(along).enumerate()
    {
        let (scores, _) = scores.as_chunks::<LANES>();
        let (d_p, _) = d_p.as_chunks::<LANES>();
        let limit = s.splat(if MASKED { sees(r).min(BLOCK) as f32 } else { 0.0 });
        let (lse, delta) = (s.splat(lse), s.splat(delta));
        let (mut weight, mut change) = ([s.zero(); VECS], [s.zero(); VECS]);
        for v in 0..VECS {
            let score = s.sub(s.mul(s.load(&scores[v]), factor), lse);
            weight[v] = exp2(s, s.min(most, score));
            change[v] = s.mul(weight[v], s.sub(s.load(&d_p[v]), delta));
            if MASKED {
                weight[v] = s.select_lt(lanes[v], limit, weight[v], s.zero());
                change[v] = s.select_lt(lanes[v], limit, change[v], s.zero());
            }
        }
        if !engine.pairs() {
            store(s, weight, &mut p[r]);
            store(s, change, &mut d_s[r]);
            continue;
        }
        engine.store_along(change, along);
        if r % 2 == 1 {
            store_pairs(s, p_above, weight, &mut p[r / 2]);
            store_pairs(s, d_s_above, change, &mut d_s[r / 2]);
        }
        (p_above, d_s_above) = (weight, change);
    }
    if engine.pairs() && rows % 2 == 1 {
        store_pairs(s, p_above, [s.zero(); VECS], &mut p[rows / 2]);
        store_pairs(s, d_s_above, [s.zero(); VECS], &mut d_s[rows / 2]);
    }
}

#[inline(always)]
fn store<S: Simd, const VECS: usize>(s: S, x: [S::V; VECS], out: &mut [f32; BLOCK]) {
    for (x, out) in x.into_iter().zip(out.as_chunks_mut::<LANES>().0) {
        s.store(x, out);
    }
}

#[inline(always)]
fn store_pairs<S: Simd, const VECS: usize>(
    s: S,
    low: [S::V; VECS],
    high: [S::V; VECS],
    out: &mut [f32; BLOCK],
) {
    for ((low, high), out) in low.into_iter().zip(high).zip(out.as_chunks_mut::<LANES>().0) {
        s.store(s.pairs_across(low, high), out);
    }
}
