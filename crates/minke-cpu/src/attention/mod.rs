//! Causal attention on flattened tokens, forward and backward, without the t x t matrix.
//!
//! `out_i = sum over j <= i of softmax_j(scale * q_i . k_j) v_j` inside each sequence, for each query head; where there is a
//! window w only over `j > i - w`, and where there is a soft cap c of `c tanh(scale * q_i . k_j / c)`. Query head `i` reads key and value head `i / (heads / kv_heads)`. Letters: n flattened tokens, h query heads, kv key heads,
//! qk and v the widths of a head.
//!
//! # One row, one order
//!
//! Training, prefill in any chunking and single-token decode run the same inner routine ([`forward`]'s kernel) and
//! give the same bits for the same row:
//!
//! - keys are walked in blocks of [`BLOCK`] from position 0 of the sequence;
//! - a score is one chain over the width of the head; a row's maximum, and the lane in which a probability is summed,
//!   depend on key positions alone; `p` times V adds keys in ascending order;
//! - the rows of a register tile are pairs (position, query head of the group) and never meet each other.
//!
//! Keys that a row must not see have score minus infinity and probability exactly zero. Tiles stop at the last key
//! that any of their rows sees; what lies beyond (stale cache memory, padding) is not read into any sum, and is zero
//! where whole blocks of depth are read.
//!
//! With a window a row walks the blocks that its window touches and no others, whatever rows are beside it: a tile is cut
//! where rows begin to see nothing of a block, so no row's sums pass over a block that is nothing to it.
//!
//! Scores are scaled by `scale * log2(e)`, so that they are in units of log 2 and `e^x` is [`exp2`](math::exp2).
//!
//! What products read is words of [`Engine`](crate::gemm::engine::Engine), as in a matrix product: f32, or pairs of
//! bf16 where inputs are bf16 and the machine multiplies pairs. A pair of keys is two neighbouring positions, so an odd
//! last one stands beside a probability of zero. Tile registers take sixteen pairs at once, in an order of their own:
//! blocks of depth begin at position 0 and at the head's first column, and are filled with zeros.
//!
//! Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023), algorithms 1 and 2.

mod backward;
mod cache;
mod codes;
mod forward;
mod latent;
mod math;
mod pack;

/// Heads of keys that a task takes one after the other: heads of a sequence lie side by side and share lines of the cache, so
/// all of them where there are sequences enough for every thread.
fn heads_of_task(cpu: &Cpu, shape: &AttentionShape, sequences: usize) -> usize {
    if sequences >= 4 * cpu.threads() { shape.kv_heads } else { 1 }
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::{Cpu, SharedMut};
use crate::gemm::Compute;
use crate::view::{View, ViewMut};

use forward::{Keys, Sequence};
use pack::SharedRows;

pub use cache::{KvCache, KvFormat, KvPage, append_all};

/// Keys of a block: the unit in which every row walks its keys.
pub const BLOCK: usize = 64;

/// One sequence: rows of the flattened tokens, the first of which is position 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
}

/// Heads and their widths.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a query and of a key.
    pub qk_dim: usize,
    /// Width of a value.
    pub v_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Keys that a row sees, itself and those right before it; all before it where absent.
    pub window: Option<usize>,
    /// The scaled scores x become `cap tanh(x / cap)`.
    pub softcap: Option<f32>,
}

/// Rows of queries of one sequence whose keys and values are in a cache.
#[derive(Clone, Copy)]
pub struct CachedSegment<'a> {
    /// First row of the flattened queries.
    pub start: usize,
    /// Number of rows: the last `len` positions of the cache.
    pub len: usize,
    /// Keys and values of the sequence, those of these rows already appended.
    pub cache: &'a KvCache,
}

impl AttentionShape {
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first key that the row at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The first position whose row sees no key before `key`.
    fn blind_to(&self, key: usize) -> usize {
        self.window.map_or(usize::MAX, |window| key.saturating_add(window) - 1)
    }

    /// What products of queries and keys are multiplied by before they are powers of two: the scale in units of log 2, or
    /// the cap in these units, where `scale / cap` and the hyperbolic tangent come before.
    fn factors(&self) -> (f32, Option<f32>) {
        let in_log2 = |x: f32| (f64::from(x) * std::f64::consts::LOG2_E) as f32;
        match self.softcap {
            None => (in_log2(self.scale), None),
            Some(cap) => (in_log2(cap), Some((f64::from(self.scale) / f64::from(cap)) as f32)),
        }
    }

    /// Checks the shape and gives the number of tokens of `q`.
    fn tokens(&self, what: &str, q: View) -> usize {
        let Self { heads, kv_heads, qk_dim, v_dim, window, softcap, .. } = *self;
        assert!(
            heads > 0 && kv_heads > 0 && qk_dim > 0 && v_dim > 0 && heads % kv_heads == 0,
            "{what}: impossible shape {self:?}"
        );
        assert!(
            window != Some(0) && softcap.is_none_or(|cap| cap > 0.0),
            "{what}: impossible shape {self:?}"
        );
        let tokens = q.len() / (heads * qk_dim);
        check_len(what, "q", q.len(), tokens, heads * qk_dim);
        tokens
    }
}

/// Products of bf16 pairs where all that is multiplied is bf16 and the machine has them: probabilities (and in the
/// backward pass the scores' gradients) are then rounded to bf16 too. f32 everywhere else.
fn compute(cpu: &Cpu, halves: bool) -> Compute {
    if halves && cpu.level().has_bf16_dot() { Compute::Bf16 } else { Compute::F32 }
}

fn check_len(what: &str, name: &str, len: usize, tokens: usize, width: usize) {
    assert!(len == tokens * width, "{what}: {name} has {len} elements, expected {tokens} tokens of {width}");
}

/// Tasks write the rows of their own sequence without locks, so sequences must not overlap.
fn check_order(what: &str, tokens: usize, spans: impl Iterator<Item = (usize, usize)>) {
    let mut free = 0;
    for (start, len) in spans {
        assert!(
            start >= free && start <= tokens && len <= tokens - start,
            "{what}: segment {start}+{len} overlaps one before it or leaves the {tokens} tokens"
        );
        free = start + len;
    }
}

/// Causal attention over whole sequences.
///
/// `q` `[n, h * qk]`, `k` `[n, kv * qk]`, `v` `[n, kv * v]`, `out` `[n, h * v]`; f32 or bf16 each, f32 arithmetic, one
/// rounding of the output. `lse` `[n, h]` receives the natural logarithm of each row's sum of exponentials, for
/// [`backward`]. Rows of no segment are left as they are. NaN and infinity in a sequence stay in it.
///
/// # Panics
/// When lengths contradict the shape, or segments are not ascending and disjoint.
pub fn forward(
    cpu: &Cpu,
    shape: &AttentionShape,
    q: View,
    k: View,
    v: View,
    segments: &[Segment],
    out: ViewMut,
    lse: &mut [f32],
) {
    let what = "attention forward";
    let tokens = shape.tokens(what, q);
    check_len(what, "k", k.len(), tokens, shape.kv_heads * shape.qk_dim);
    check_len(what, "v", v.len(), tokens, shape.kv_heads * shape.v_dim);
    check_len(what, "out", out.len(), tokens, shape.heads * shape.v_dim);
    check_len(what, "lse", lse.len(), tokens, shape.heads);
    check_order(what, tokens, segments.iter().map(|x| (x.start, x.len)));
    let sequence = |i: usize| {
        let Segment { start, len } = segments[i];
        Sequence { start, len, before: 0, keys: Keys::Rows { k, v } }
    };
    forward::run(cpu, shape, q, segments.len(), sequence, &SharedRows::new(out), Some(SharedMut::new(lse)));
}

/// Causal attention of new rows over cached keys and values: prefill chunks, single tokens, or both in one batch.
///
/// `q` `[n, h * qk]`, `out` `[n, h * v]`; f32 or bf16 each. Every row has the bits that [`forward`] over the whole
/// sequence gives it when that reads keys and values of the cache's dtype. What a cache holds in 8 bits is read as the bf16
/// numbers, or the f32 ones, that are nearest to what its codes stand for.
///
/// # Panics
/// When lengths contradict the shape, a cache has another shape or fewer positions than its rows, or segments are
/// not ascending and disjoint.
pub fn forward_cached(cpu: &Cpu, shape: &AttentionShape, q: View, segments: &[CachedSegment], out: ViewMut) {
    let what = "cached attention";
    let tokens = shape.tokens(what, q);
    check_len(what, "out", out.len(), tokens, shape.heads * shape.v_dim);
    check_order(what, tokens, segments.iter().map(|x| (x.start, x.len)));
    for x in segments {
        x.cache.check(what, shape);
        assert!(x.len <= x.cache.len(), "{what}: {} rows, {} positions in the cache", x.len, x.cache.len());
    }
    let sequence = |i: usize| {
        let CachedSegment { start, len, cache } = segments[i];
        Sequence { start, len, before: cache.len() - len, keys: Keys::Cache(cache) }
    };
    forward::run(cpu, shape, q, segments.len(), sequence, &SharedRows::new(out), None);
}

/// Bytes of working memory of a thread in [`backward`] over sequences of `len`, which is more than [`forward`] takes.
pub fn scratch_bytes(shape: &AttentionShape, len: usize) -> usize {
    size_of::<u32>() * backward::scratch_words(shape, len * shape.group())
}

/// Gradients of [`forward`].
///
/// With `P = softmax(scale * Q K^T)`, `delta = rowsum(d_out * out)` and `dS = P * (d_out V^T - delta)`:
/// `d_v = P^T d_out`, `d_q = scale * dS K`, `d_k = scale * dS^T Q`, where behind a soft cap dS is also multiplied by the
/// cap's slope `1 - tanh^2`; P is computed again, tile by tile, from `lse`.
/// Shapes and dtypes as in [`forward`], each `d_x` shaped as `x`; the gradients of a key head are summed over its
/// query heads. Sums run over ascending positions in f32 and are rounded once. Rows of no segment are left as they
/// are.
///
/// # Panics
/// When lengths contradict the shape, or segments are not ascending and disjoint.
pub fn backward(
    cpu: &Cpu,
    shape: &AttentionShape,
    q: View,
    k: View,
    v: View,
    out: View,
    lse: &[f32],
    d_out: View,
    segments: &[Segment],
    d_q: ViewMut,
    d_k: ViewMut,
    d_v: ViewMut,
) {
    let what = "attention backward";
    let tokens = shape.tokens(what, q);
    let (heads, kv_heads) = (shape.heads, shape.kv_heads);
    let lens = [
        ("k", k.len(), kv_heads * shape.qk_dim),
        ("v", v.len(), kv_heads * shape.v_dim),
        ("out", out.len(), heads * shape.v_dim),
        ("lse", lse.len(), heads),
        ("d_out", d_out.len(), heads * shape.v_dim),
        ("d_q", d_q.len(), heads * shape.qk_dim),
        ("d_k", d_k.len(), kv_heads * shape.qk_dim),
        ("d_v", d_v.len(), kv_heads * shape.v_dim),
    ];
    for (name, len, width) in lens {
        check_len(what, name, len, tokens, width);
    }
    check_order(what, tokens, segments.iter().map(|x| (x.start, x.len)));
    let inputs = backward::Inputs { q, k, v, out, lse, d_out };
    let outputs = [SharedRows::new(d_q), SharedRows::new(d_k), SharedRows::new(d_v)];
    backward::run(cpu, shape, &inputs, segments, &outputs);
}
