//! Keys and values of one sequence in one layer, as the kernels read them.

use minke_num::bf16;

use crate::cpu::{Cpu, SharedMut};
use crate::gemm::engine::Engine;
use crate::gemm::tile::PANEL;
use crate::rows::over_blocks;
use crate::scratch::Block;
use crate::simd::{GRID_STEPS, Kernel, Simd};
use crate::view::{DType, View};

use super::{AttentionShape, BLOCK};

/// Words of a cache line.
const LINE: usize = 16;

/// Panels of a block's keys.
const KEY_PANELS: usize = BLOCK / PANEL;

/// The keys and values of one sequence in one layer.
///
/// Blocks of [`BLOCK`] positions, each with, per key head, the keys as columns of two panels `[2][qk][32]` and the
/// values as rows of panels `[ceil(v / 32)][64][32]`, as words of a product's right operand: f32, or pairs of bf16
/// along the depth (neighbours of a key; neighbouring positions of a value). In a bf16 cache values are rounded when
/// they are appended: to the same that a bf16 training step holds.
///
/// Tile registers read pairs in blocks of [`GRID_STEPS`], those of few rows in half blocks. So (on every level: a cache
/// does not know its machine) a key is whole half blocks, filled with zeros, and values up to the next block are zeros.
pub struct KvCache {
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    dtype: DType,
    len: usize,
    blocks: Vec<Block>,
}

impl KvCache {
    /// An empty cache for the key heads of `shape`.
    pub fn new(shape: &AttentionShape, dtype: DType) -> Self {
        let AttentionShape { kv_heads, qk_dim, v_dim, .. } = *shape;
        Self { kv_heads, qk_dim, v_dim, dtype, len: 0, blocks: Vec::new() }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The storage format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|block| size_of_val(&**block)).sum()
    }

    /// Memory that one block of [`BLOCK`] positions takes.
    pub fn block_bytes(shape: &AttentionShape, dtype: DType) -> usize {
        Self::new(shape, dtype).block_words() * size_of::<u32>()
    }

    /// Words that hold a depth of `k`.
    fn steps(&self, k: usize) -> usize {
        match self.dtype {
            DType::F32 => k,
            DType::Bf16 => k.div_ceil(2).next_multiple_of(GRID_STEPS / 2),
        }
    }

    /// Steps of values that hold something, or the zeros behind it, when there are `count` in a block.
    fn value_steps(&self, count: usize) -> usize {
        match self.dtype {
            DType::F32 => count,
            DType::Bf16 => count.div_ceil(2).next_multiple_of(GRID_STEPS),
        }
    }

    /// The step at which depth `i` is.
    fn step(&self, i: usize) -> usize {
        match self.dtype {
            DType::F32 => i,
            DType::Bf16 => i / 2,
        }
    }

    /// Words of one panel of keys.
    pub(super) fn key_panel(&self) -> usize {
        self.steps(self.qk_dim) * PANEL
    }

    /// Words of the keys of one head in one block.
    fn key_words(&self) -> usize {
        KEY_PANELS * self.key_panel()
    }

    /// Words of keys and values of one head in one block.
    fn head_words(&self) -> usize {
        self.key_words() + self.v_dim.div_ceil(PANEL) * self.steps(BLOCK) * PANEL
    }

    fn block_words(&self) -> usize {
        self.kv_heads * self.head_words()
    }

    pub(super) fn check(&self, what: &str, shape: &AttentionShape) {
        let (got, expected) =
            ((self.kv_heads, self.qk_dim, self.v_dim), (shape.kv_heads, shape.qk_dim, shape.v_dim));
        assert!(got == expected, "{what}: cache of (kv heads, qk, v) {got:?}, expected {expected:?}");
    }

    /// Keys and values of one head in one block.
    pub(super) fn head(&self, block: usize, kv_head: usize) -> HeadBlock<'_> {
        let words = &self.blocks[block][kv_head * self.head_words()..];
        let (keys, values) = words[..self.head_words()].split_at(self.key_words());
        HeadBlock { dtype: self.dtype, keys, values }
    }

    /// Asks for what is read after this head's part of a block: its next block, or the first of the next head.
    #[inline(always)]
    pub(super) fn prefetch_after<S: Simd>(&self, s: S, block: usize, kv_head: usize) {
        let (block, kv_head) =
            if (block + 1) * BLOCK < self.len { (block + 1, kv_head) } else { (0, kv_head + 1) };
        if kv_head == self.kv_heads {
            return;
        }
        let count = BLOCK.min(self.len - block * BLOCK);
        let HeadBlock { keys, values, .. } = self.head(block, kv_head);
        let keys = &keys[..count.div_ceil(PANEL) * self.key_panel()];
        keys.iter().step_by(LINE).for_each(|at| s.prefetch(at));
        for panel in values.chunks(self.steps(BLOCK) * PANEL) {
            panel[..self.steps(count) * PANEL].iter().step_by(LINE).for_each(|at| s.prefetch(at));
        }
    }

    /// Appends positions: `k` `[m, kv * qk]` and `v` `[m, kv * v]`, of either dtype.
    ///
    /// # Panics
    /// When the lengths contradict the shape or each other.
    pub fn append(&mut self, k: View, v: View) {
        let (k_width, v_width) = (self.kv_heads * self.qk_dim, self.kv_heads * self.v_dim);
        let rows = k.len() / k_width;
        assert!(
            k.len() == rows * k_width && v.len() == rows * v_width,
            "cache append: {} elements of keys in rows of {k_width}, {} of values in rows of {v_width}",
            k.len(),
            v.len()
        );
        for row in 0..rows {
            let (block, i) = (self.len / BLOCK, self.len % BLOCK);
            if block == self.blocks.len() {
                self.blocks.push(Block::new(self.block_words()));
            }
            if i.is_multiple_of(2 * GRID_STEPS) {
                self.clear(block, i);
            }
            for head in 0..self.kv_heads {
                let (k_at, v_at) = (row * k_width + head * self.qk_dim, row * v_width + head * self.v_dim);
                let (k, v) = (k.slice(k_at, k_at + self.qk_dim), v.slice(v_at, v_at + self.v_dim));
                self.put(block, i, head, k, v);
            }
            self.len += 1;
        }
    }

    /// Zeros for tile registers, before the first of the positions from `i` on that they read at once: what its keys
    /// have more than their width, and its values.
    fn clear(&mut self, block: usize, i: usize) {
        if self.dtype == DType::F32 {
            return;
        }
        let (head_words, key_words, key_panel) = (self.head_words(), self.key_words(), self.key_panel());
        let (real, value_panel) = (self.qk_dim.div_ceil(2) * PANEL, self.steps(BLOCK) * PANEL);
        for head in self.blocks[block].chunks_mut(head_words) {
            let (keys, values) = head.split_at_mut(key_words);
            keys[i / PANEL * key_panel..][real..key_panel].fill(0);
            for panel in values.chunks_mut(value_panel) {
                panel[i / 2 * PANEL..][..GRID_STEPS * PANEL].fill(0);
            }
        }
    }

    /// Writes position `i` of a block.
    fn put(&mut self, block: usize, i: usize, head: usize, k: View, v: View) {
        let head_words = self.head_words();
        let (key_words, key_panel) = (self.key_words(), self.key_panel());
        let (value_steps, step) = (self.steps(BLOCK), self.step(i));
        let words = &mut self.blocks[block][head * head_words..][..head_words];
        let (keys, values) = words.split_at_mut(key_words);
        let column = keys[i / PANEL * key_panel + i % PANEL..].iter_mut().step_by(PANEL);
        match (self.dtype, k) {
            (DType::F32, View::F32(k)) => column.zip(k).for_each(|(w, k)| *w = k.to_bits()),
            (DType::F32, View::Bf16(k)) => column.zip(k).for_each(|(w, k)| *w = k.to_f32().to_bits()),
            (DType::Bf16, View::F32(k)) => {
                let pair = |k: &[f32]| {
                    pair(bf16::from_f32(k[0]), k.get(1).map_or(bf16::ZERO, |&k| bf16::from_f32(k)))
                };
                column.zip(k.chunks(2)).for_each(|(w, k)| *w = pair(k));
            }
            (DType::Bf16, View::Bf16(k)) => {
                let pair = |k: &[bf16]| pair(k[0], k.get(1).copied().unwrap_or_default());
                column.zip(k.chunks(2)).for_each(|(w, k)| *w = pair(k));
            }
        }
        for panel in 0..v.len().div_ceil(PANEL) {
            let v = v.slice(panel * PANEL, v.len().min((panel + 1) * PANEL));
            let line = values[(panel * value_steps + step) * PANEL..].iter_mut();
            match (self.dtype, v) {
                (DType::F32, View::F32(v)) => line.zip(v).for_each(|(w, v)| *w = v.to_bits()),
                (DType::F32, View::Bf16(v)) => line.zip(v).for_each(|(w, v)| *w = v.to_f32().to_bits()),
                (DType::Bf16, View::F32(v)) => {
                    line.zip(v).for_each(|(w, &v)| *w = joined(*w, i, bf16::from_f32(v)));
                }
                (DType::Bf16, View::Bf16(v)) => line.zip(v).for_each(|(w, &v)| *w = joined(*w, i, v)),
            }
        }
    }

    /// Forgets all positions from `len` on, as when speculated tokens are rejected; gives back the memory of blocks
    /// that become empty.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "cache truncate: {len} positions of {}", self.len);
        self.len = len;
        self.blocks.truncate(len.div_ceil(BLOCK));
        let i = len % BLOCK;
        if self.dtype == DType::Bf16 && !i.is_multiple_of(2 * GRID_STEPS) {
            // values behind the last one are multiplied with a probability of zero: they must be numbers
            let (head_words, key_words) = (self.head_words(), self.key_words());
            let (from, to, steps) = (i.div_ceil(2) * PANEL, self.value_steps(i) * PANEL, self.steps(BLOCK));
            for head in self.blocks[len / BLOCK].chunks_mut(head_words) {
                for panel in head[key_words..].chunks_mut(steps * PANEL) {
                    if i % 2 == 1 {
                        panel[i / 2 * PANEL..][..PANEL].iter_mut().for_each(|w| *w &= 0xffff);
                    }
                    panel[from..to].fill(0);
                }
            }
        }
    }
}

impl Clone for KvCache {
    /// The positions held; what else lies in the blocks is not copied.
    fn clone(&self) -> Self {
        let copy = |(i, from): (usize, &Block)| {
            let count = BLOCK.min(self.len - i * BLOCK);
            let key_words = count.div_ceil(PANEL) * self.key_panel();
            let (panel, value_words) = (self.steps(BLOCK) * PANEL, self.value_steps(count) * PANEL);
            let mut to = Block::new(self.block_words());
            for (from, to) in from.chunks(self.head_words()).zip(to.chunks_mut(self.head_words())) {
                to[..key_words].copy_from_slice(&from[..key_words]);
                let (from, to) = (&from[self.key_words()..], &mut to[self.key_words()..]);
                for (from, to) in from.chunks(panel).zip(to.chunks_mut(panel)) {
                    to[..value_words].copy_from_slice(&from[..value_words]);
                }
            }
            to
        };
        Self { blocks: self.blocks.iter().enumerate().map(copy).collect(), ..*self }
    }
}

/// Appends rows `start..start + len` of `k` and `v` to each (start, len, cache), caches on all threads.
///
/// # Panics
/// As [`KvCache::append`].
pub fn append_all(cpu: &Cpu, caches: &mut [(usize, usize, &mut KvCache)], k: View, v: View) {
    let (count, shared) = (caches.len(), SharedMut::new(caches));
    over_blocks(cpu, count, CACHES_PER_TASK, |first, end| {
        // SAFETY: each task has its own caches.
        let caches = unsafe { shared.slice(first, end - first) };
        for i in 0..caches.len() {
            if let Some((_, _, next)) = caches.get(i + 1) {
                cpu.dispatch(Ahead(next));
            }
            let (start, len, cache) = &mut caches[i];
            let (k_width, v_width) = (cache.kv_heads * cache.qk_dim, cache.kv_heads * cache.v_dim);
            let (from, to) = (*start, *start + *len);
            cache.append(k.slice(from * k_width, to * k_width), v.slice(from * v_width, to * v_width));
        }
    });
}

/// Caches that one task appends to: enough that it knows what comes next.
const CACHES_PER_TASK: usize = 8;

/// Asks for the lines that the next position of a cache is written to.
struct Ahead<'a>(&'a KvCache);

impl Kernel for Ahead<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cache = self.0;
        let (block, i) = (cache.len / BLOCK, cache.len % BLOCK);
        if block == cache.blocks.len() {
            return;
        }
        let step = cache.step(i);
        for head in 0..cache.kv_heads {
            let HeadBlock { keys, values, .. } = cache.head(block, head);
            let column = &keys[i / PANEL * cache.key_panel() + i % PANEL..];
            let lines = cache.step(cache.qk_dim - 1) + 1;
            column.iter().step_by(PANEL).take(lines).for_each(|at| s.prefetch(at));
            for panel in values.chunks(cache.steps(BLOCK) * PANEL) {
                panel[step * PANEL..][..PANEL].iter().step_by(LINE).for_each(|at| s.prefetch(at));
            }
        }
    }
}

fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

/// The pair of positions of which `value` is number `i`; a first one stands beside zero.
fn joined(word: u32, i: usize, value: bf16) -> u32 {
    if i.is_multiple_of(2) {
        pair(value, bf16::ZERO)
    } else {
        word & 0xffff | u32::from(value.to_bits()) << 16
    }
}

/// Keys and values of one head in one block.
pub(super) struct HeadBlock<'a> {
    dtype: DType,
    keys: &'a [u32],
    values: &'a [u32],
}

impl<'a> HeadBlock<'a> {
    /// Keys and values, where they are words of this engine.
    #[inline(always)]
    pub fn words<S: Simd>(&self, engine: Engine<S>) -> Option<(&'a [u32], &'a [u32])> {
        ((self.dtype == DType::Bf16) == engine.pairs()).then_some((self.keys, self.values))
    }

    /// Pairs of bf16 as the f32 words of `keys` and `values`.
    #[inline(always)]
    pub fn widen(&self, qk_dim: usize, keys: &mut [u32], values: &mut [u32]) {
        // a panel may have steps beyond the width
        let panel = self.keys.len() / KEY_PANELS;
        for (from, to) in self.keys.chunks(panel).zip(keys.chunks_mut(qk_dim * PANEL)) {
            widen(from, to);
        }
        widen(self.values, values);
    }
}

/// Every line of pairs as two lines.
#[inline(always)]
fn widen(from: &[u32], to: &mut [u32]) {
    for (from, to) in from.as_chunks::<PANEL>().0.iter().zip(to.chunks_mut(2 * PANEL)) {
        let (low, high) = to.split_at_mut(PANEL);
        for (w, low) in from.iter().zip(low) {
            *low = w << 16;
        }
        for (w, high) in from.iter().zip(high) {
            *high = w & 0xffff_0000;
        }
    }
}
