//! Gradients: one task per (sequence, key head), blocks of keys outside, tiles of query rows inside.

use crate::cpu::Cpu;
use crate::gemm::Compute;
use crate::gemm::engine::{Engine, Rows, Words};
use crate::gemm::tile::PANEL;
use crate::rows::load;
use crate::scratch::with_scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::{DType, View};

use super::math::exp2;
use super::pack::{HeadRows, SharedRows};
use super::{AttentionShape, BLOCK, Segment, compute, heads_of_task};

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
    let heads = heads_of_task(cpu, shape, segments.len());
    cpu.run(segments.len() * shape.kv_heads / heads, |task| {
        let (segment, first) = (segments[task * heads / shape.kv_heads], task * heads % shape.kv_heads);
        if segment.len == 0 {
            return;
        }
        let rows = segment.len * shape.group();
        with_scratch(Parts::sizes(shape, rows).iter().sum(), |scratch| {
            for kv_head in first..first + heads {
                let parts = Parts::split(shape, rows, scratch);
                let task = Task { shape, inputs, segment, kv_head, rows, compute, outputs, parts };
                cpu.level().dispatch_product(task);
            }
        });
    });
}

/// Words of a task of `rows`.
pub fn scratch_words(shape: &AttentionShape, rows: usize) -> usize {
    Parts::sizes(shape, rows).iter().sum()
}

/// The working memory of a task. Rows are (position, query head of the group); a tile is [`PANEL`] of them. What products
/// read is words of the task's engine: f32, or bf16 pairs.
struct Parts<'a> {
    /// Queries as columns, a panel per tile, `[tiles][qk][32]`, and as rows, `[ceil(qk / 32)][rows][32]`.
    q_columns: &'a mut [u32],
    q_panels: &'a mut [u32],
    /// Gradients of the outputs likewise.
    d_out_columns: &'a mut [u32],
    d_out_panels: &'a mut [u32],
    /// Of every row: the logarithm (base 2) of its sum with its sign changed, `rowsum(d_out * out)`, and how many keys
    /// it sees; zeros up to a whole tile.
    minus_lse: &'a mut [f32],
    delta: &'a mut [f32],
    sees: &'a mut [f32],
    /// Gradients of the queries, turned: `[tiles][qk padded to vectors][32]`.
    d_q: &'a mut [f32],
    /// One block of keys as rows and turned, of values as rows.
    k_rows: &'a mut [u32],
    k_turned: &'a mut [u32],
    v_rows: &'a mut [u32],
    /// Gradients of the block's keys and values, padded to vectors.
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
    /// One tile's scores and gradients of probabilities, `[BLOCK][32]`.
    scores: &'a mut [f32],
    d_p: &'a mut [f32],
    /// Probabilities and gradients of scores with the depth along the rows, and the latter along the keys.
    p: &'a mut [u32],
    d_s: &'a mut [u32],
    d_s_across: &'a mut [u32],
}

impl<'a> Parts<'a> {
    /// For f32 words, the larger. Each a multiple of a vector, so that all start on a cache line.
    fn sizes(shape: &AttentionShape, rows: usize) -> [usize; 18] {
        let (qk, v) = (shape.qk_dim.next_multiple_of(LANES), shape.v_dim.next_multiple_of(LANES));
        let (whole, tiled) = (rows.next_multiple_of(LANES), rows.next_multiple_of(PANEL));
        [
            tiled * qk,
            whole * qk.next_multiple_of(PANEL),
            tiled * v,
            whole * v.next_multiple_of(PANEL),
            tiled,
            tiled,
            tiled,
            tiled * qk,
            BLOCK * qk,
            BLOCK * qk.next_multiple_of(PANEL),
            BLOCK * v,
            BLOCK * qk,
            BLOCK * v,
            BLOCK * PANEL,
            BLOCK * PANEL,
            BLOCK * PANEL,
            BLOCK * PANEL,
            BLOCK * PANEL,
        ]
    }

    fn split(shape: &AttentionShape, rows: usize, mut scratch: &'a mut [u32]) -> Self {
        let parts = Self::sizes(shape, rows).map(|len| {
            let (part, rest) = std::mem::take(&mut scratch).split_at_mut(len);
            scratch = rest;
            part
        });
        let [
            q_columns,
            q_panels,
            d_out_columns,
            d_out_panels,
            minus_lse,
            delta,
            sees,
            d_q,
            k_rows,
            k_turned,
            v_rows,
            d_k,
            d_v,
            scores,
            d_p,
            p,
            d_s,
            d_s_across,
        ] = parts;
        let [minus_lse, delta, sees, d_q, d_k, d_v, scores, d_p] =
            [minus_lse, delta, sees, d_q, d_k, d_v, scores, d_p].map(bytemuck::cast_slice_mut);
        Self {
            q_columns,
            q_panels,
            d_out_columns,
            d_out_panels,
            minus_lse,
            delta,
            sees,
            d_q,
            k_rows,
            k_turned,
            v_rows,
            d_k,
            d_v,
            scores,
            d_p,
            p,
            d_s,
            d_s_across,
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
        self.finish(s);
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
        let group = self.shape.group();
        let parts = &mut self.parts;
        for r in 0..self.rows {
            let (x, y) = (out.row(r), d_out.row(r));
            let mut sum = s.zero();
            for i in (0..v).step_by(LANES) {
                let n = LANES.min(v - i);
                sum = s.fma(load(s, x, i, n), load(s, y, i, n), sum);
            }
            parts.delta[r] = s.sum(sum);
            parts.minus_lse[r] = -self.inputs.lse[out.at(r) / v] * std::f32::consts::LOG2_E;
            // exact: a sequence is shorter than 2^24
            parts.sees[r] = (r / group + 1) as f32;
        }
        for x in [&mut parts.delta, &mut parts.minus_lse, &mut parts.sees] {
            x[self.rows..].fill(0.0);
        }
        let tiles = (0..self.rows).step_by(PANEL);
        let columns = parts.q_columns.chunks_exact_mut(q_steps * PANEL);
        for (row, out) in tiles.clone().zip(columns) {
            engine.pack_columns(&q, row..self.rows.min(row + PANEL), out);
        }
        let columns = parts.d_out_columns.chunks_exact_mut(v_steps * PANEL);
        for (row, out) in tiles.zip(columns) {
            engine.pack_columns(&d_out, row..self.rows.min(row + PANEL), out);
        }
        let panel = engine.steps(self.rows) * PANEL;
        engine.pack_strips(&q, 0..self.rows, 0..qk, PANEL, panel, parts.q_panels);
        engine.pack_strips(&d_out, 0..self.rows, 0..v, PANEL, panel, parts.d_out_panels);
    }

    /// All that one block of keys takes part in.
    #[inline(always)]
    fn block<S: Simd>(&mut self, engine: Engine<S>, block: usize) {
        let s = engine.simd();
        let AttentionShape { qk_dim: qk, v_dim: v, scale, window, .. } = *self.shape;
        let (factor, to_cap) = self.shape.factors();
        let (qk_pad, v_pad) = (qk.next_multiple_of(LANES), v.next_multiple_of(LANES));
        let (qk_vecs, v_vecs) = (qk.div_ceil(LANES), v.div_ceil(LANES));
        let (qk_steps, v_steps) = (engine.steps(qk), engine.steps(v));
        let (block_steps, tile_steps) = (engine.steps(BLOCK), engine.steps(PANEL));
        let from = block * BLOCK;
        let count = (self.segment.len - from).min(BLOCK);
        let keys = self.key_rows(self.inputs.k, qk);
        let values = self.key_rows(self.inputs.v, v);
        let (shape, group, last_row) = (self.shape, self.shape.group(), self.rows);
        // rows from this one on see nothing of the block: their windows begin behind it
        let end_row = shape.blind_to(from + BLOCK).saturating_mul(group).min(last_row);
        let rows_panel = engine.steps(last_row) * PANEL;
        let parts = &mut self.parts;
        for i in 0..count {
            engine.pack_row(keys.row(from + i), &mut parts.k_rows[i * qk_steps..][..qk_steps]);
            engine.pack_row(values.row(from + i), &mut parts.v_rows[i * v_steps..][..v_steps]);
        }
        // keys with the depth along a row, or columns of a panel next to each other: what the tile reads
        let (turned, turned_row, turned_step) = if engine.rows_along() {
            engine.pack_turned(&keys, from..from + count, 0..qk, block_steps, parts.k_turned);
            (block_steps * PANEL, block_steps, 1)
        } else {
            let panel = block_steps * PANEL;
            engine.pack_strips(&keys, from..from + count, 0..qk, PANEL, panel, parts.k_turned);
            (panel, 1, PANEL)
        };
        parts.d_k.fill(0.0);
        parts.d_v.fill(0.0);
        // a multiple of the tile: `from` is
        for row in (from * group..end_row).step_by(PANEL) {
            let (tile, rows) = (row / PANEL, PANEL.min(last_row - row));
            let row_vecs = rows.div_ceil(LANES);
            // keys of the block that the first and the last row of the tile see; pairs of them are computed, and whole
            // halves of a grid tile, so that its registers keep their configuration
            let sees = |r: usize| (row + r) / group + 1 - from;
            let (least, visible) = (sees(0), sees(rows - 1).min(BLOCK));
            let computed = visible.next_multiple_of(if engine.rows_along() { LANES } else { 2 });
            let scores = |a: &[u32], steps: usize, b: &[u32], c: &mut [f32]| Words {
                steps,
                a: a[..BLOCK * steps].as_ptr(),
                a_row: steps,
                a_step: 1,
                b: b[tile * steps * PANEL..(tile + 1) * steps * PANEL].as_ptr(),
                c: c[..BLOCK * PANEL].as_mut_ptr(),
                c_row: PANEL,
                ..Words::NOWHERE
            };
            let s_tile = scores(parts.k_rows, qk_steps, parts.q_columns, parts.scores);
            let d_p_tile = scores(parts.v_rows, v_steps, parts.d_out_columns, parts.d_p);
            // SAFETY: a block of rows and a panel are as deep as each other; the tiles have room for a block of rows.
            unsafe {
                engine.tile(s_tile, computed, row_vecs);
                engine.tile(d_p_tile, computed, row_vecs);
            }
            let score_tile = ScoreTile {
                scores: &parts.scores[..computed * PANEL],
                d_p: &parts.d_p[..computed * PANEL],
                p: parts.p,
                d_s: parts.d_s,
                d_s_across: parts.d_s_across,
                minus_lse: &parts.minus_lse[row..row + PANEL],
                delta: &parts.delta[row..row + PANEL],
                sees: &parts.sees[row..row + PANEL],
                first: from,
                // exact: no sequence is as long as 2^24
                window: window.map_or(0.0, |window| window.min(1 << 24) as f32),
            };
            let windowed = shape.first_key((row + rows - 1) / group) > from;
            if to_cap.is_some() {
                if windowed {
                    score_gradients::<S, true, true, true>(engine, score_tile, factor, to_cap);
                } else {
                    score_gradients::<S, true, false, true>(engine, score_tile, factor, to_cap);
                }
            } else if windowed {
                score_gradients::<S, true, true, false>(engine, score_tile, factor, to_cap);
            } else if least >= BLOCK && rows == PANEL {
                score_gradients::<S, false, false, false>(engine, score_tile, factor, to_cap);
            } else {
                score_gradients::<S, true, false, false>(engine, score_tile, factor, to_cap);
            }
            // keys by width: the tile's rows are the depth
            let key_gradient = |a: &[u32], b: &[u32], c: &mut [f32], width: usize| Words {
                steps: engine.steps(rows),
                a: a[..BLOCK * tile_steps].as_ptr(),
                a_row: tile_steps,
                a_step: 1,
                b: b[engine.steps(row) * PANEL..].as_ptr(),
                c: c[..BLOCK * width].as_mut_ptr(),
                c_row: width,
                accumulate: true,
                ..Words::NOWHERE
            };
            let d_v_tile = key_gradient(parts.p, parts.d_out_panels, parts.d_v, v_pad);
            let d_k_tile = key_gradient(parts.d_s, parts.q_panels, parts.d_k, qk_pad);
            // SAFETY: panels of the rows are `last_row` deep and begin here at `row`; the gradients have a block of rows.
            unsafe {
                engine.product(d_v_tile, computed, v_vecs, rows_panel);
                engine.product(d_k_tile, computed, qk_vecs, rows_panel);
            }
            // width by rows: the block's keys are the depth. All rows of a tile see some of its first block, or nothing
            // of it exactly.
            let first_block = shape.first_key(row / group) / BLOCK;
            let steps = engine.steps(visible);
            let across = if engine.pairs() {
                parts.d_s_across[computed / 2 * PANEL..steps.max(computed / 2) * PANEL].fill(0);
                parts.d_s_across.as_ptr()
            } else {
                parts.d_s.as_ptr()
            };
            let d_q = &mut parts.d_q[tile * qk_pad * PANEL..(tile + 1) * qk_pad * PANEL];
            for (d_q, k) in d_q.chunks_mut(PANEL * PANEL).zip(parts.k_turned.chunks(turned)) {
                let d_q_tile = Words {
                    steps,
                    a: k.as_ptr(),
                    a_row: turned_row,
                    a_step: turned_step,
                    b: across,
                    c: d_q.as_mut_ptr(),
                    c_row: PANEL,
                    accumulate: block > first_block,
                    ..Words::NOWHERE
                };
                // SAFETY: a strip of turned keys has as many columns as there are rows of gradients here, rounded up to
                // whole vectors; both operands have the visible keys, and zeros or numbers up to `steps`.
                unsafe { engine.tile(d_q_tile, d_q.len() / PANEL, row_vecs) };
            }
        }
        for i in 0..count {
            // SAFETY: this task alone owns these rows of its key head.
            unsafe {
                self.outputs[1].write(s, keys.at(from + i), qk, &parts.d_k[i * qk_pad..][..qk_pad], scale);
                self.outputs[2].write(s, values.at(from + i), v, &parts.d_v[i * v_pad..][..v_pad], 1.0);
            }
        }
    }

    /// Turns the gradients of the queries back and writes them.
    #[inline(always)]
    fn finish<S: Simd>(self, s: S) {
        let AttentionShape { qk_dim: qk, scale, .. } = *self.shape;
        let (qk_pad, rows) = (qk.next_multiple_of(LANES), self.query_rows(self.inputs.q, qk));
        let Parts { d_q, d_k: turned, .. } = self.parts;
        for (tile, d_q) in d_q.chunks_exact(qk_pad * PANEL).enumerate() {
            let (lines, _) = d_q.as_chunks::<PANEL>();
            for (half, first) in (tile * PANEL..self.rows.min((tile + 1) * PANEL)).step_by(LANES).enumerate()
            {
                for (v, lines) in lines.chunks_exact(LANES).enumerate() {
                    let mut block = [s.zero(); LANES];
                    for (x, line) in block.iter_mut().zip(lines) {
                        *x = s.load(&line.as_chunks::<LANES>().0[half]);
                    }
                    for (r, x) in s.transpose(block).into_iter().enumerate() {
                        s.store(x, &mut turned[r * qk_pad..].as_chunks_mut::<LANES>().0[v]);
                    }
                }
                for r in 0..LANES.min(self.rows - first) {
                    let row = &turned[r * qk_pad..][..qk_pad];
                    // SAFETY: this task alone owns these rows of its query heads.
                    unsafe { self.outputs[0].write(s, rows.at(first + r), qk, row, scale) };
                }
            }
        }
    }
}

/// Vectors that hold one value per row of a tile.
const VECS: usize = PANEL / LANES;

/// The scores of one tile and what becomes of them, key by key, [`PANEL`] rows each.
struct ScoreTile<'a> {
    scores: &'a [f32],
    d_p: &'a [f32],
    p: &'a mut [u32],
    d_s: &'a mut [u32],
    d_s_across: &'a mut [u32],
    minus_lse: &'a [f32],
    delta: &'a [f32],
    sees: &'a [f32],
    /// The first key.
    first: usize,
    /// Keys that a row sees at most, where the tile is windowed.
    window: f32,
}

/// `p = 2^(factor * scores - lse)`, `d_s = p * (d_p - delta)`; keys that a row does not see give exact zeros. Capped scores
/// are `t = tanh(to_cap * scores)` first, and `d_s` is multiplied by `1 - t^2`.
///
/// As f32 words, both are `[keys][32]`. As pairs, words join two rows; `d_s` is also written with words that join two
/// keys, which is what the gradient of the queries runs along.
#[inline(always)]
fn score_gradients<S: Simd, const MASKED: bool, const WINDOWED: bool, const CAPPED: bool>(
    engine: Engine<S>,
    tile: ScoreTile,
    factor: f32,
    to_cap: Option<f32>,
) {
    let ScoreTile { scores, d_p, p, d_s, d_s_across, minus_lse, delta, sees, first, window } = tile;
    let s = engine.simd();
    let (factor, to_cap, window, one) =
        (s.splat(factor), s.splat(to_cap.unwrap_or(0.0)), s.splat(window), s.splat(1.0));
    // an infinite `lse` of hostile input must not leave the range of `exp2`
    let most = s.splat(127.0);
    let steps = engine.steps(PANEL);
    let (minus_lse, delta, sees) = (vectors(s, minus_lse), vectors(s, delta), vectors(s, sees));
    let (scores, _) = scores.as_chunks::<{ 2 * PANEL }>();
    let (d_p, _) = d_p.as_chunks::<{ 2 * PANEL }>();
    let (p, d_s) = (p.chunks_exact_mut(2 * steps), d_s.chunks_exact_mut(2 * steps));
    let (across, _) = bytemuck::cast_slice_mut::<u32, f32>(d_s_across).as_chunks_mut::<PANEL>();
    // two keys at a time
    for (pair, ((((scores, d_p), p), d_s), across)) in
        scores.iter().zip(d_p).zip(p).zip(d_s).zip(across).enumerate()
    {
        let (scores, _) = scores.as_chunks::<LANES>();
        let (d_p, _) = d_p.as_chunks::<LANES>();
        let mut changes = [[s.zero(); VECS]; 2];
        for (i, change) in changes.iter_mut().enumerate() {
            let key = s.splat((first + 2 * pair + i) as f32);
            let mut weight = [s.zero(); VECS];
            for v in 0..VECS {
                let mut score = s.load(&scores[i * VECS + v]);
                if CAPPED {
                    score = s.tanh(s.mul(score, to_cap));
                }
                weight[v] = exp2(s, s.min(most, s.fma(score, factor, minus_lse[v])));
                change[v] = s.mul(weight[v], s.sub(s.load(&d_p[i * VECS + v]), delta[v]));
                if CAPPED {
                    change[v] = s.mul(change[v], s.fma(s.sub(s.zero(), score), score, one));
                }
                if WINDOWED {
                    let begin = s.sub(sees[v], window);
                    weight[v] = s.select_lt(key, begin, s.zero(), weight[v]);
                    change[v] = s.select_lt(key, begin, s.zero(), change[v]);
                }
                if MASKED {
                    weight[v] = s.select_lt(key, sees[v], weight[v], s.zero());
                    change[v] = s.select_lt(key, sees[v], change[v], s.zero());
                }
            }
            engine.store_along(weight, &mut p[i * steps..(i + 1) * steps]);
            engine.store_along(*change, &mut d_s[i * steps..(i + 1) * steps]);
        }
        if engine.pairs() {
            let (across, _) = across.as_chunks_mut::<LANES>();
            for v in 0..VECS {
                s.store(s.pairs_across(changes[0][v], changes[1][v]), &mut across[v]);
            }
        }
    }
}

/// One value per row of a tile.
#[inline(always)]
fn vectors<S: Simd>(s: S, x: &[f32]) -> [S::V; VECS] {
    let mut vectors = [s.zero(); VECS];
    for (x, v) in x.as_chunks::<LANES>().0.iter().zip(&mut vectors) {
        *v = s.load(x);
    }
    vectors
}
