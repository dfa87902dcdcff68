//! The one forward routine: rows of queries against blocks of keys, with a running maximum and sum.

use crate::cpu::{Cpu, SharedMut};
use crate::gemm::Compute;
use crate::gemm::engine::{Engine, Rows, Words, layout};
use crate::gemm::tile::{MAX_ROWS, PANEL};
use crate::scratch::take;
use crate::simd::{GRID_ROWS, Kernel, LANES, Simd};
use crate::view::{DType, View};

use super::cache::KvCache;
use super::math::{exp2, log2};
use super::pack::{HeadRows, SharedRows};
use super::{AttentionShape, BLOCK, compute, heads_of_task, latent};

/// Rows (positions times query heads of a group) of the largest task. Long sequences are cut so that few heads keep
/// all threads busy; each cut packs the keys before it again, so the pieces are large.
const TASK_ROWS: usize = 640;

/// Rows of a sequence and key head up to which all its heads are one task.
const FEW_ROWS: usize = 16;

/// Positions of a sequence from which its heads are worth a task each, where there are fewer sequences than threads.
const FAR: usize = 512;

/// Rows that are worth a task of their own where threads would have none.
const LEAST_ROWS: usize = 8;

/// Pieces are multiples of this: whole tiles of vector registers on every level.
const TASK_STEP: usize = 84;

/// How far (in powers of 2) a row's maximum may grow before what was summed is scaled down. Scaling is rare with
/// this, and probabilities up to 2^8 lose nothing in f32.
const SLACK: f32 = 8.0;

/// Where keys and values come from.
#[derive(Clone, Copy)]
pub enum Keys<'a> {
    /// Token rows; position 0 is the sequence's first row.
    Rows { k: View<'a>, v: View<'a> },
    /// Packed blocks.
    Cache(&'a KvCache),
}

impl Keys<'_> {
    /// Whether products may take them as bf16.
    fn are_half(&self) -> bool {
        match self {
            Keys::Rows { k, v } => k.dtype() == DType::Bf16 && v.dtype() == DType::Bf16,
            Keys::Cache(cache) => !cache.format().is_f32(),
        }
    }
}

/// Rows of queries of one sequence.
#[derive(Clone, Copy)]
pub struct Sequence<'a> {
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Positions before the first.
    pub before: usize,
    pub keys: Keys<'a>,
}

/// How many tasks the rows of one sequence and key head make, and how many rows each has (the last: the rest), a
/// multiple of `step`; `shares` or more where there are rows enough.
fn pieces(rows: usize, step: usize, shares: usize) -> (usize, usize) {
    let shares = shares.min(rows / LEAST_ROWS).max(rows.div_ceil(TASK_ROWS)).max(1);
    let size = rows.div_ceil(shares);
    let size = size.next_multiple_of(if size < step { LEAST_ROWS } else { step });
    (rows.div_ceil(size.max(1)), size)
}

/// Runs every (piece, sequence, key head) as a task; late pieces, which see most keys, first.
pub fn run<'a>(
    cpu: &Cpu,
    shape: &AttentionShape,
    q: View,
    sequences: usize,
    sequence: impl Fn(usize) -> Sequence<'a> + Sync,
    out: &SharedRows,
    lse: Option<SharedMut<f32>>,
) {
    let group = shape.group();
    let halves = (0..sequences).all(|i| sequence(i).keys.are_half());
    let compute = compute(cpu, halves && q.dtype() == DType::Bf16);
    let (_, tile_rows) = layout(cpu.level(), compute, shape.qk_dim);
    let step = if tile_rows == GRID_ROWS { GRID_ROWS } else { TASK_STEP };
    // few rows (decoding): a task is all heads of a sequence, so that it knows what it will read next, unless a thread would
    // read much while others wait; with many sequences too, since heads lie side by side
    let few = (0..sequences).all(|i| sequence(i).len * group <= FEW_ROWS);
    let far = (0..sequences).any(|i| sequence(i).before >= FAR);
    let whole = few && (sequences >= cpu.threads() || !far);
    let heads = if whole { shape.kv_heads } else { heads_of_task(cpu, shape, sequences) };
    let per_piece = sequences * shape.kv_heads / heads;
    // query heads that share keys are shared out where a thread would read much for all of them
    let shares = if far { cpu.threads() / per_piece.max(1) } else { 1 };
    let most = (0..sequences).map(|i| pieces(sequence(i).len * group, step, shares).0).max().unwrap_or(0);
    cpu.run(per_piece * most, |task| {
        let piece = most - 1 - task / per_piece;
        let first_head = task % per_piece * heads;
        let sequence = sequence(first_head / shape.kv_heads);
        let rows = sequence.len * group;
        let (_, size) = pieces(rows, step, shares);
        let first = piece * size;
        if first >= rows {
            return;
        }
        let count = size.min(rows - first);
        let mut scratch = take(Parts::sizes(shape, count).iter().sum());
        for head in first_head..first_head + heads {
            let kv_head = head % shape.kv_heads;
            let parts = Parts::split(shape, count, &mut scratch);
            let task = Task { shape, q, sequence, kv_head, first, count, compute, out, lse, parts };
            cpu.level().dispatch_product(task);
        }
    });
}

/// The working memory of a task. What products read is words of the task's engine: f32, or bf16 pairs.
struct Parts<'a> {
    /// Queries, `[count][qk]`.
    q: &'a mut [u32],
    /// Unnormalised outputs, `[count][v padded to vectors]`.
    acc: &'a mut [f32],
    /// Sums of probabilities by lane.
    sums: &'a mut [f32],
    /// Running maxima.
    max: &'a mut [f32],
    /// Scores of one tile, `[GRID_ROWS][BLOCK]`.
    scores: &'a mut [f32],
    /// Their probabilities.
    p: &'a mut [u32],
    /// One block of keys and one of values.
    block: &'a mut [u32],
}

impl<'a> Parts<'a> {
    /// For f32 words, the larger. Each a multiple of a vector, so that all start on a cache line.
    fn sizes(shape: &AttentionShape, count: usize) -> [usize; 7] {
        // a last tile may be computed to whole half registers, wherever it begins
        let rows = (if count > LANES { count + LANES } else { count }).next_multiple_of(LANES);
        let qk = shape.qk_dim.next_multiple_of(LANES);
        [
            rows * qk,
            rows * shape.v_dim.next_multiple_of(LANES),
            rows * LANES,
            rows,
            GRID_ROWS * BLOCK,
            GRID_ROWS * BLOCK,
            BLOCK * (qk + shape.v_dim.next_multiple_of(PANEL)),
        ]
        .map(|x| x.next_multiple_of(LANES))
    }

    fn split(shape: &AttentionShape, count: usize, mut scratch: &'a mut [u32]) -> Self {
        let [q, acc, sums, max, scores, p, block] = Self::sizes(shape, count).map(|len| {
            let (part, rest) = std::mem::take(&mut scratch).split_at_mut(len);
            scratch = rest;
            part
        });
        let [acc, sums, max, scores] = [acc, sums, max, scores].map(bytemuck::cast_slice_mut);
        Self { q, acc, sums, max, scores, p, block }
    }
}

struct Task<'a> {
    shape: &'a AttentionShape,
    q: View<'a>,
    sequence: Sequence<'a>,
    kv_head: usize,
    /// First row (position times group plus head of the group) of the sequence, and how many.
    first: usize,
    count: usize,
    compute: Compute,
    out: &'a SharedRows,
    lse: Option<SharedMut<f32>>,
    parts: Parts<'a>,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let engine = Engine::new(s, self.compute);
        let AttentionShape { qk_dim: qk, v_dim, .. } = *self.shape;
        let (factor, to_cap) = self.shape.factors();
        let (shape, group, before) = (self.shape, self.shape.group(), self.sequence.before);
        let (v_vecs, v_pad) = (v_dim.div_ceil(LANES), v_dim.next_multiple_of(LANES));
        let few = self.count <= LANES;
        let (q_steps, p_steps) = (depth(engine, few, qk), engine.steps(BLOCK));
        self.start(engine);
        let last = before + (self.first + self.count - 1) / group;
        let grid = engine.rows_along();
        let tile_rows = if grid { GRID_ROWS } else { MAX_ROWS / S::TILE_ROWS * S::TILE_ROWS };
        // tile registers keep their configuration: what is computed for rows that are not there is not looked at
        let whole = if grid && !few { LANES } else { 1 };
        let first_block = shape.first_key(before + self.first / group) / BLOCK;
        for block in first_block..=last / BLOCK {
            let from = block * BLOCK;
            let (keys, key_panel, values) =
                self.load_block(engine, block, (last + 1 - from).min(BLOCK), first_block);
            let Parts { q, acc, sums, max, scores, p, .. } = &mut self.parts;
            // rows before this one see none of the block
            let mut row = (from.saturating_sub(before) * group).saturating_sub(self.first);
            // and rows from this one on, whose windows begin behind it
            let end = shape.blind_to(from + BLOCK).saturating_sub(before).saturating_mul(group);
            let end = end.saturating_sub(self.first).min(self.count);
            while row < end {
                let rows = tile_rows.min(end - row);
                let run = rows.next_multiple_of(whole);
                // keys of the block that the first and the last row of the tile see; at least one
                let sees = |r: usize| before + (self.first + row + r) / group + 1 - from;
                let (least, visible) = (sees(0), sees(rows - 1).min(BLOCK));
                // and those before the window of a row
                let misses =
                    |r: usize| shape.first_key(before + (self.first + row + r) / group).saturating_sub(from);
                let vecs = visible.div_ceil(LANES);
                let score = Words {
                    steps: q_steps,
                    a: q[row * q_steps..(row + run) * q_steps].as_ptr(),
                    a_row: q_steps,
                    a_step: 1,
                    b: keys,
                    c: scores.as_mut_ptr(),
                    c_row: BLOCK,
                    ..Words::NOWHERE
                };
                // SAFETY: `keys` points at two panels of `qk` rows; the scores have room for a tile's rows of a block.
                unsafe { engine.product(score, run, vecs, key_panel) };
                let state = State {
                    scores: &mut scores[..rows * BLOCK],
                    p: &mut p[..rows * p_steps],
                    max: &mut max[row..row + rows],
                    sums: &mut sums[row * LANES..(row + rows) * LANES],
                    acc: &mut acc[row * v_pad..(row + rows) * v_pad],
                };
                if let Some(to_cap) = to_cap {
                    cap(engine.simd(), state.scores, to_cap, vecs);
                }
                if misses(rows - 1) > 0 {
                    softmax::<S, true, true>(engine, state, factor, vecs, v_vecs, sees, misses);
                } else if least >= BLOCK {
                    softmax::<S, false, false>(engine, state, factor, vecs, v_vecs, sees, misses);
                } else {
                    softmax::<S, true, false>(engine, state, factor, vecs, v_vecs, sees, misses);
                }
                let mix = Words {
                    steps: depth(engine, few, visible),
                    a: p.as_ptr(),
                    a_row: p_steps,
                    a_step: 1,
                    b: values,
                    c: acc[row * v_pad..(row + run) * v_pad].as_mut_ptr(),
                    c_row: v_pad,
                    accumulate: true,
                    ..Words::NOWHERE
                };
                // SAFETY: `values` points at panels of a block's rows; `acc` was sliced to these rows.
                unsafe { engine.product(mix, run, v_vecs, p_steps * PANEL) };
                // rows that begin behind this block, and were computed because registers are whole, begin with nothing
                if run > rows && end < self.count {
                    acc[(row + rows) * v_pad..(row + run).min(self.count) * v_pad].fill(0.0);
                }
                row += rows;
            }
        }
        self.finish(s);
    }
}

impl Task<'_> {
    /// Packs the queries and empties the running state.
    #[inline(always)]
    fn start<S: Simd>(&mut self, engine: Engine<S>) {
        let rows = self.head_rows(self.q, self.shape.qk_dim);
        let steps = depth(engine, self.count <= LANES, rows.dim);
        for (r, out) in self.parts.q.chunks_exact_mut(steps).take(self.count).enumerate() {
            engine.pack_row(rows.row(self.first + r), out);
        }
        self.parts.acc[..self.count * self.shape.v_dim.next_multiple_of(LANES)].fill(0.0);
        self.parts.sums[..self.count * LANES].fill(0.0);
        self.parts.max[..self.count].fill(f32::NEG_INFINITY);
    }

    /// The rows of this task's query heads in a tensor of queries or outputs.
    #[inline(always)]
    fn head_rows<'b>(&self, x: View<'b>, dim: usize) -> HeadRows<'b> {
        let group = self.shape.group();
        HeadRows {
            x,
            token: self.sequence.start,
            heads: self.shape.heads,
            head: self.kv_head * group,
            group,
            dim,
        }
    }

    /// Keys, the distance of their panels, and values of a block's first `count` positions, packed; `first_block` is the
    /// first that is read of a head.
    #[inline(always)]
    fn load_block<S: Simd>(
        &mut self,
        engine: Engine<S>,
        block: usize,
        count: usize,
        first_block: usize,
    ) -> (*const u32, usize, *const u32) {
        let AttentionShape { kv_heads, qk_dim, v_dim, .. } = *self.shape;
        let steps = depth(engine, self.count <= LANES, qk_dim);
        let (panel, values_panel) = (engine.steps(qk_dim) * PANEL, engine.steps(BLOCK) * PANEL);
        let (keys, values) = self.parts.block.split_at_mut(2 * panel);
        match self.sequence.keys {
            Keys::Rows { k, v } => {
                let rows = |x, dim| HeadRows {
                    x,
                    token: self.sequence.start,
                    heads: kv_heads,
                    head: self.kv_head,
                    group: 1,
                    dim,
                };
                let from = block * BLOCK;
                let (k, v) = (rows(k, qk_dim), rows(v, v_dim));
                for (first, out) in (0..count).step_by(PANEL).zip(keys.chunks_exact_mut(panel)) {
                    engine.pack_columns(&k, from + first..from + count.min(first + PANEL), out);
                }
                engine.pack_strips(&v, from..from + count, 0..v_dim, PANEL, values_panel, values);
            }
            Keys::Cache(cache) => {
                let (head, stored) = (cache.head(block, self.kv_head), cache.key_panel());
                cache.prefetch_after(engine.simd(), block, self.kv_head, first_block);
                let (read, panel, held) = match head.words(engine) {
                    Some((words, held)) if steps * PANEL <= stored => (words, stored, Some(held)),
                    // half a block that the tile of many rows does not take
                    Some((words, held)) => {
                        for (from, to) in words.chunks(stored).zip(keys.chunks_mut(panel)) {
                            to[..stored].copy_from_slice(from);
                            to[stored..].fill(0);
                        }
                        (&*keys, panel, Some(held))
                    }
                    None => {
                        head.unpack(engine, qk_dim, count, keys, values);
                        (&*keys, panel, None)
                    }
                };
                let held = match held {
                    _ if cache.is_of_latents() => {
                        latent::values(engine, read, panel, count, v_dim, values);
                        values.as_ptr()
                    }
                    Some(held) => held.as_ptr(),
                    None => values.as_ptr(),
                };
                return (read.as_ptr(), panel, held);
            }
        }
        (keys.as_ptr(), panel, values.as_ptr())
    }

    /// Divides by the sums and writes outputs and logarithms.
    #[inline(always)]
    fn finish<S: Simd>(self, s: S) {
        let v_dim = self.shape.v_dim;
        let v_pad = v_dim.next_multiple_of(LANES);
        let rows = self.head_rows(self.q, v_dim);
        let (sums, _) = self.parts.sums.as_chunks::<LANES>();
        for (r, acc) in self.parts.acc.chunks_exact(v_pad).take(self.count).enumerate() {
            let sum = s.sum(s.load(&sums[r]));
            let at = rows.at(self.first + r);
            // SAFETY: this task alone owns these rows of its query heads.
            unsafe { self.out.write(s, at, v_dim, acc, 1.0 / sum) };
            if let Some(lse) = &self.lse {
                let value = (self.parts.max[r] + log2(sum)) * std::f32::consts::LN_2;
                // SAFETY: as above.
                unsafe { lse.slice(at / v_dim, 1)[0] = value };
            }
        }
    }
}

/// Words that hold a depth of `k` in the products of a task, whose rows may be few.
#[inline(always)]
fn depth<S: Simd>(engine: Engine<S>, few: bool, k: usize) -> usize {
    if few { engine.steps_of_few(k) } else { engine.steps(k) }
}

/// What belongs to the rows of one tile.
struct State<'a> {
    scores: &'a mut [f32],
    p: &'a mut [u32],
    max: &'a mut [f32],
    sums: &'a mut [f32],
    acc: &'a mut [f32],
}

/// Scores to `tanh(to_cap * score)`, `vecs` vectors of each row.
#[inline(always)]
fn cap<S: Simd>(s: S, scores: &mut [f32], to_cap: f32, vecs: usize) {
    let to_cap = s.splat(to_cap);
    for row in scores.as_chunks_mut::<BLOCK>().0 {
        for x in row.as_chunks_mut::<LANES>().0.iter_mut().take(vecs) {
            s.store(s.tanh(s.mul(s.load(x), to_cap)), x);
        }
    }
}

/// Scores times `factor` to probabilities relative to the running maximum, `vecs` vectors of each row, of which row `r`
/// sees the first `sees(r)` keys without the first `misses(r)`.
#[inline(always)]
fn softmax<S: Simd, const MASKED: bool, const WINDOWED: bool>(
    engine: Engine<S>,
    state: State,
    factor: f32,
    vecs: usize,
    v_vecs: usize,
    sees: impl Fn(usize) -> usize,
    misses: impl Fn(usize) -> usize,
) {
    const VECS: usize = BLOCK / LANES;
    let s = engine.simd();
    let (lanes, factor) = (lanes(s), s.splat(factor));
    let (scores, _) = state.scores.as_chunks_mut::<BLOCK>();
    let (sums, _) = state.sums.as_chunks_mut::<LANES>();
    let (acc, _) = state.acc.as_chunks_mut::<LANES>();
    let p_rows = state.p.chunks_exact_mut(engine.steps(BLOCK));
    for (r, (((row, p), sum), max)) in scores.iter_mut().zip(p_rows).zip(sums).zip(state.max).enumerate() {
        let (row, _) = row.as_chunks_mut::<LANES>();
        let limit = s.splat(if MASKED { sees(r).min(BLOCK) as f32 } else { 0.0 });
        let begin = s.splat(if WINDOWED { misses(r) as f32 } else { 0.0 });
        let hidden = s.splat(f32::NEG_INFINITY);
        let mut x = [hidden; VECS];
        for v in 0..VECS {
            if !MASKED {
                x[v] = s.mul(s.load(&row[v]), factor);
            } else if v < vecs {
                x[v] = s.select_lt(lanes[v], limit, s.mul(s.load(&row[v]), factor), hidden);
                if WINDOWED {
                    x[v] = s.select_lt(lanes[v], begin, hidden, x[v]);
                }
            }
        }
        // the accumulator second: a NaN is passed over here and comes out in the sum
        let top = s.max(s.max(x[3], s.max(x[1], hidden)), s.max(x[2], s.max(x[0], hidden)));
        let top = s.max_lane(top);
        if top > *max + SLACK {
            let mut shrink = [0.0; LANES];
            s.store(exp2(s, s.splat(*max - top)), &mut shrink);
            let shrink = s.load(&shrink);
            *max = top;
            s.store(s.mul(s.load(sum), shrink), sum);
            for x in &mut acc[r * v_vecs..(r + 1) * v_vecs] {
                s.store(s.mul(s.load(x), shrink), x);
            }
        }
        let reference = s.splat(*max);
        for v in 0..VECS {
            if !MASKED {
                x[v] = exp2(s, s.sub(x[v], reference));
            } else if v < vecs {
                x[v] = s.select_lt(lanes[v], limit, exp2(s, s.sub(x[v], reference)), s.zero());
                if WINDOWED {
                    x[v] = s.select_lt(lanes[v], begin, s.zero(), x[v]);
                }
            } else {
                x[v] = s.zero();
            }
        }
        engine.store_along(x, p);
        let block = s.add(s.add(x[0], x[1]), s.add(x[2], x[3]));
        s.store(s.add(s.load(sum), block), sum);
    }
}

/// The number of each key of a block.
#[inline(always)]
fn lanes<S: Simd>(s: S) -> [S::V; BLOCK / LANES] {
    const NUMBERS: [[f32; LANES]; BLOCK / LANES] = {
        let mut numbers = [[0.0; LANES]; BLOCK / LANES];
        let mut i = 0;
        while i < BLOCK {
            numbers[i / LANES][i % LANES] = i as f32;
            i += 1;
        }
        numbers
    };
    [s.load(&NUMBERS[0]), s.load(&NUMBERS[1]), s.load(&NUMBERS[2]), s.load(&NUMBERS[3])]
}
