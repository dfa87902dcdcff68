//! The one forward routine: rows of queries against blocks of keys, with a running maximum and sum.

use crate::cpu::{Cpu, SharedMut};
use crate::gemm::tile::{MAX_ROWS, PANEL, Tile};
use crate::scratch::with_scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::View;

use super::cache::KvCache;
use super::math::{exp2, log2, product};
use super::pack::{HeadRows, SharedRows, pack_columns, pack_panels, quad_len, widen};
use super::{AttentionShape, BLOCK};

/// Rows (positions times query heads of a group) of the largest task. Long sequences are cut so that few heads keep
/// all threads busy; each cut packs the keys before it again, so the pieces are large.
const TASK_ROWS: usize = 640;

/// Pieces are multiples of this: whole register tiles on every level.
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

/// How many tasks the rows of one sequence and key head make, and how many rows each has (the last: the rest).
fn pieces(rows: usize) -> (usize, usize) {
    let size = rows.div_ceil(rows.div_ceil(TASK_ROWS).max(1)).next_multiple_of(TASK_STEP);
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
    let most = (0..sequences).map(|i| pieces(sequence(i).len * group).0).max().unwrap_or(0);
    let per_piece = sequences * shape.kv_heads;
    cpu.run(per_piece * most, |task| {
        let piece = most - 1 - task / per_piece;
        let (i, kv_head) = (task % per_piece / shape.kv_heads, task % shape.kv_heads);
        let sequence = sequence(i);
        let rows = sequence.len * group;
        let (_, size) = pieces(rows);
        let first = piece * size;
        if first >= rows {
            return;
        }
        let count = size.min(rows - first);
        with_scratch(Parts::sizes(shape, count).iter().sum(), |scratch| {
            let parts = Parts::split(shape, count, scratch);
            cpu.dispatch(Task { shape, q, sequence, kv_head, first, count, out, lse, parts });
        });
    });
}

/// The working memory of a task.
struct Parts<'a> {
    /// Queries times scale, `[count][qk]`.
    q: &'a mut [f32],
    /// Unnormalised outputs, `[count][v padded to vectors]`.
    acc: &'a mut [f32],
    /// Sums of probabilities by lane.
    sums: &'a mut [f32],
    /// Running maxima.
    max: &'a mut [f32],
    /// Scores, then probabilities, of one tile.
    scores: &'a mut [f32],
    /// One block of keys and one of values.
    block: &'a mut [f32],
    /// Four rows being transposed.
    quad: &'a mut [f32],
}

impl<'a> Parts<'a> {
    /// Each a multiple of a vector, so that all start on a cache line.
    fn sizes(shape: &AttentionShape, count: usize) -> [usize; 7] {
        [
            count * shape.qk_dim,
            count * shape.v_dim.next_multiple_of(LANES),
            count * LANES,
            count,
            MAX_ROWS * BLOCK,
            BLOCK * (shape.qk_dim + shape.v_dim.next_multiple_of(PANEL)),
            quad_len(shape.qk_dim),
        ]
        .map(|x| x.next_multiple_of(LANES))
    }

    fn split(shape: &AttentionShape, count: usize, mut scratch: &'a mut [f32]) -> Self {
        let [q, acc, sums, max, scores, block, quad] = Self::sizes(shape, count).map(|len| {
            let (part, rest) = std::mem::take(&mut scratch).split_at_mut(len);
            scratch = rest;
            part
        });
        Self { q, acc, sums, max, scores, block, quad }
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
    out: &'a SharedRows,
    lse: Option<SharedMut<f32>>,
    parts: Parts<'a>,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let AttentionShape { qk_dim: qk, v_dim, scale, .. } = *self.shape;
        let (group, before) = (self.shape.group(), self.sequence.before);
        let (v_vecs, v_pad) = (v_dim.div_ceil(LANES), v_dim.next_multiple_of(LANES));
        self.start(s, (f64::from(scale) * std::f64::consts::LOG2_E) as f32);
        let last = before + (self.first + self.count - 1) / group;
        let tile_rows = MAX_ROWS / S::TILE_ROWS * S::TILE_ROWS;
        for block in 0..=last / BLOCK {
            let from = block * BLOCK;
            let (keys, values) = self.load_block(s, block, (last + 1 - from).min(BLOCK));
            let Parts { q, acc, sums, max, scores, .. } = &mut self.parts;
            // rows before this one see none of the block
            let mut row = (from.saturating_sub(before) * group).saturating_sub(self.first);
            while row < self.count {
                let rows = tile_rows.min(self.count - row);
                // keys of the block that the first and the last row of the tile see; at least one
                let sees = |r: usize| before + (self.first + row + r) / group + 1 - from;
                let (least, visible) = (sees(0), sees(rows - 1).min(BLOCK));
                let vecs = visible.div_ceil(LANES);
                let score = Tile {
                    depth: qk,
                    a: q[row * qk..(row + rows) * qk].as_ptr(),
                    a_row: qk,
                    a_step: 1,
                    b: keys,
                    c: scores.as_mut_ptr(),
                    c_row: BLOCK,
                    accumulate: false,
                };
                // SAFETY: `keys` points at two panels of `qk` rows; the scores have room for 14 rows of a block.
                unsafe { product(s, score, rows, vecs, qk * PANEL) };
                let state = State {
                    scores: &mut scores[..rows * BLOCK],
                    max: &mut max[row..row + rows],
                    sums: &mut sums[row * LANES..(row + rows) * LANES],
                    acc: &mut acc[row * v_pad..(row + rows) * v_pad],
                };
                if least >= BLOCK {
                    softmax::<S, false>(s, state, vecs, v_vecs, sees);
                } else {
                    softmax::<S, true>(s, state, vecs, v_vecs, sees);
                }
                let mix = Tile {
                    depth: visible,
                    a: scores.as_ptr(),
                    a_row: BLOCK,
                    a_step: 1,
                    b: values,
                    c: acc[row * v_pad..(row + rows) * v_pad].as_mut_ptr(),
                    c_row: v_pad,
                    accumulate: true,
                };
                // SAFETY: `values` points at panels of a block's rows; `acc` was sliced to these rows.
                unsafe { product(s, mix, rows, v_vecs, BLOCK * PANEL) };
                row += rows;
            }
        }
        self.finish(s);
    }
}

impl Task<'_> {
    /// Packs the queries and empties the running state.
    #[inline(always)]
    fn start<S: Simd>(&mut self, s: S, factor: f32) {
        let rows = self.head_rows(self.q, self.shape.qk_dim);
        for (r, out) in self.parts.q.chunks_exact_mut(rows.dim).take(self.count).enumerate() {
            rows.read(s, self.first + r, factor, out);
        }
        self.parts.acc.fill(0.0);
        self.parts.sums.fill(0.0);
        self.parts.max.fill(f32::NEG_INFINITY);
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

    /// Keys and values of a block's first `count` positions, packed.
    #[inline(always)]
    fn load_block<S: Simd>(&mut self, s: S, block: usize, count: usize) -> (*const f32, *const f32) {
        let AttentionShape { kv_heads, qk_dim, v_dim, .. } = *self.shape;
        let Parts { block: space, quad, .. } = &mut self.parts;
        let keys_len = BLOCK * qk_dim;
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
                let (keys, values) = space.split_at_mut(keys_len);
                pack_columns(s, &rows(k, qk_dim), block * BLOCK, count, quad, keys);
                pack_panels(s, &rows(v, v_dim), block * BLOCK, count, BLOCK * PANEL, values);
            }
            Keys::Cache(cache) => match cache.block(block, self.kv_head) {
                View::F32(x) => {
                    let (keys, values) = x.split_at(keys_len);
                    return (keys.as_ptr(), values.as_ptr());
                }
                x @ View::Bf16(_) => {
                    let (keys, values) = space.split_at_mut(keys_len);
                    let panels = count.div_ceil(PANEL) * PANEL * qk_dim;
                    widen(s, x, 0, 1.0, &mut keys[..panels]);
                    for panel in 0..v_dim.div_ceil(PANEL) {
                        let at = panel * BLOCK * PANEL;
                        widen(s, x, keys_len + at, 1.0, &mut values[at..at + count * PANEL]);
                    }
                }
            },
        }
        let (keys, values) = space.split_at(keys_len);
        (keys.as_ptr(), values.as_ptr())
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

/// What belongs to the rows of one tile.
struct State<'a> {
    scores: &'a mut [f32],
    max: &'a mut [f32],
    sums: &'a mut [f32],
    acc: &'a mut [f32],
}

/// Scores to probabilities relative to the running maximum, `vecs` vectors of each row, of which row `r` sees the
/// first `sees(r)` keys.
#[inline(always)]
fn softmax<S: Simd, const MASKED: bool>(
    s: S,
    state: State,
    vecs: usize,
    v_vecs: usize,
    sees: impl Fn(usize) -> usize,
) {
    const VECS: usize = BLOCK / LANES;
    let lanes = lanes(s);
    let (scores, _) = state.scores.as_chunks_mut::<BLOCK>();
    let (sums, _) = state.sums.as_chunks_mut::<LANES>();
    let (acc, _) = state.acc.as_chunks_mut::<LANES>();
    for (r, ((row, sum), max)) in scores.iter_mut().zip(sums).zip(state.max).enumerate() {
        let (row, _) = row.as_chunks_mut::<LANES>();
        let limit = s.splat(if MASKED { sees(r).min(BLOCK) as f32 } else { 0.0 });
        let hidden = s.splat(f32::NEG_INFINITY);
        let mut x = [hidden; VECS];
        for v in 0..VECS {
            if !MASKED {
                x[v] = s.load(&row[v]);
            } else if v < vecs {
                x[v] = s.select_lt(lanes[v], limit, s.load(&row[v]), hidden);
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
                s.store(x[v], &mut row[v]);
            } else if v < vecs {
                x[v] = s.select_lt(lanes[v], limit, exp2(s, s.sub(x[v], reference)), s.zero());
                s.store(x[v], &mut row[v]);
            } else {
                x[v] = s.zero();
            }
        }
        let block = s.add(s.add(x[0], x[1]), s.add(x[2], x[3]));
        s.store(s.add(s.load(sum), block), sum);
    }
}

/// The number of each key of a block.
#[inline(always)]
pub fn lanes<S: Simd>(s: S) -> [S::V; BLOCK / LANES] {
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
