//! Keys and values of one sequence in one layer, as the kernels read them.

use std::sync::Arc;

use minke_num::bf16;

use crate::cpu::{Cpu, SharedMut};
use crate::gemm::engine::Engine;
use crate::gemm::tile::PANEL;
use crate::rows::over_blocks;
use crate::scratch::Block;
use crate::simd::{GRID_STEPS, Kernel, Simd};
use crate::view::{DType, View};

use super::{AttentionShape, BLOCK, codes};

/// Words of a cache line.
const LINE: usize = 16;

/// Panels of a block's keys.
const KEY_PANELS: usize = BLOCK / PANEL;

/// How a cache stores keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// 8-bit codes with a bf16 scale for each 32 elements of a position and head.
    Int8,
}

impl KvFormat {
    /// Whether f32 numbers that it holds are f32.
    pub(super) fn is_f32(self) -> bool {
        match self {
            KvFormat::F32 => true,
            KvFormat::Bf16 | KvFormat::Int8 => false,
        }
    }
}

impl From<DType> for KvFormat {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => KvFormat::F32,
            DType::Bf16 => KvFormat::Bf16,
        }
    }
}

/// The keys and values of one sequence in one layer.
///
/// Blocks of [`BLOCK`] positions, each with, per key head, the keys as columns of two panels `[2][qk][32]` and the
/// values as rows of panels `[ceil(v / 32)][64][32]`, as words of a product's right operand: f32, or pairs of bf16
/// along the depth (neighbours of a key; neighbouring positions of a value). In a bf16 cache values are rounded when
/// they are appended: to the same that a bf16 training step holds. In 8 bits (`codes.rs`) the panels hold codes and their
/// scales, from which a block is unpacked to such words when it is read.
///
/// Tile registers read pairs in blocks of [`GRID_STEPS`], those of few rows in half blocks. So (on every level: a cache
/// does not know its machine) a key is whole half blocks, filled with zeros, and values up to the next block are zeros.
///
/// A cache of latents ([`KvCache::of_latents`]) has no values: they are the first columns of its keys, and `latent.rs` turns
/// those of a block over when it is read.
///
/// Copies share their blocks; who writes into one that others hold too takes a copy of it first.
#[derive(Clone)]
pub struct KvCache {
    layout: Layout,
    len: usize,
    blocks: Vec<Arc<Block>>,
}

/// A full block of a cache, which other caches of the same shape and format may hold as well.
#[derive(Clone)]
pub struct KvPage(Arc<Block>);

impl KvPage {
    /// Whether somebody else holds it too.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// Where things are in a block.
#[derive(Clone, Copy)]
struct Layout {
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    format: KvFormat,
    /// Whether values are the first columns of their keys, and stored as such alone.
    latents: bool,
}

impl Layout {
    /// Width of a position's values as they are appended and stored.
    fn stored_v_dim(&self) -> usize {
        if self.latents { 0 } else { self.v_dim }
    }

    /// Words of one panel of keys.
    fn key_panel(&self) -> usize {
        match self.format {
            KvFormat::F32 => self.qk_dim * PANEL,
            KvFormat::Bf16 => self.qk_dim.div_ceil(2).next_multiple_of(GRID_STEPS / 2) * PANEL,
            KvFormat::Int8 => codes::key_panel(self.qk_dim),
        }
    }

    /// Words of one panel of values.
    fn value_panel(&self) -> usize {
        match self.format {
            KvFormat::F32 => BLOCK * PANEL,
            KvFormat::Bf16 => BLOCK / 2 * PANEL,
            KvFormat::Int8 => codes::VALUE_PANEL,
        }
    }

    /// Words of a panel of values in which the first `count` are, and the zeros behind them.
    fn value_words(&self, count: usize) -> usize {
        match self.format {
            KvFormat::F32 => count * PANEL,
            KvFormat::Bf16 => count.div_ceil(2).next_multiple_of(GRID_STEPS) * PANEL,
            KvFormat::Int8 => codes::VALUE_PANEL,
        }
    }

    /// Words of the keys of one head in one block.
    fn key_words(&self) -> usize {
        KEY_PANELS * self.key_panel()
    }

    /// Words of keys and values of one head in one block.
    fn head_words(&self) -> usize {
        self.key_words() + self.stored_v_dim().div_ceil(PANEL) * self.value_panel()
    }

    fn block_words(&self) -> usize {
        self.kv_heads * self.head_words()
    }

    /// Zeros for tile registers, before the first of the positions from `i` on that they read at once: what its keys
    /// have more than their width, and its values.
    fn clear(&self, block: &mut [u32], i: usize) {
        if self.format != KvFormat::Bf16 {
            return;
        }
        let (key_panel, real) = (self.key_panel(), self.qk_dim.div_ceil(2) * PANEL);
        for head in block.chunks_mut(self.head_words()) {
            let (keys, values) = head.split_at_mut(self.key_words());
            keys[i / PANEL * key_panel..][real..key_panel].fill(0);
            for panel in values.chunks_mut(self.value_panel()) {
                panel[i / 2 * PANEL..][..GRID_STEPS * PANEL].fill(0);
            }
        }
    }

    /// Makes values from position `i` on zeros that tile registers read together with those before: they are multiplied
    /// with a probability of zero, so they must be numbers.
    fn cut(&self, block: &mut [u32], i: usize) {
        let (from, to) = (i.div_ceil(2) * PANEL, self.value_words(i));
        for head in block.chunks_mut(self.head_words()) {
            for panel in head[self.key_words()..].chunks_mut(self.value_panel()) {
                if i % 2 == 1 {
                    panel[i / 2 * PANEL..][..PANEL].iter_mut().for_each(|w| *w &= 0xffff);
                }
                panel[from..to].fill(0);
            }
        }
    }

    /// A block with the first `count` positions of another; what else lies in it is not copied.
    fn copy(&self, from: &[u32], count: usize) -> Block {
        let key_words = count.div_ceil(PANEL) * self.key_panel();
        let value_words = self.value_words(count);
        let mut to = Block::new(self.block_words());
        for (from, to) in from.chunks(self.head_words()).zip(to.chunks_mut(self.head_words())) {
            to[..key_words].copy_from_slice(&from[..key_words]);
            let (from, to) = (&from[self.key_words()..], &mut to[self.key_words()..]);
            for (from, to) in from.chunks(self.value_panel()).zip(to.chunks_mut(self.value_panel())) {
                to[..value_words].copy_from_slice(&from[..value_words]);
            }
        }
        to
    }

    /// Writes position `i` of a head.
    fn put(&self, words: &mut [u32], i: usize, k: View, v: View) {
        let (keys, values) = words.split_at_mut(self.key_words());
        match self.format {
            KvFormat::F32 => self.put_f32(keys, values, i, k, v),
            KvFormat::Bf16 => self.put_pairs(keys, values, i, k, v),
            KvFormat::Int8 => codes::put(keys, values, i, k, v),
        }
    }

    fn put_f32(&self, keys: &mut [u32], values: &mut [u32], i: usize, k: View, v: View) {
        let column = keys[i / PANEL * self.key_panel() + i % PANEL..].iter_mut().step_by(PANEL);
        match k {
            View::F32(k) => column.zip(k).for_each(|(w, k)| *w = k.to_bits()),
            View::Bf16(k) => column.zip(k).for_each(|(w, k)| *w = k.to_f32().to_bits()),
        }
        for panel in 0..v.len().div_ceil(PANEL) {
            let line = values[panel * self.value_panel() + i * PANEL..].iter_mut();
            match v.slice(panel * PANEL, v.len().min((panel + 1) * PANEL)) {
                View::F32(v) => line.zip(v).for_each(|(w, v)| *w = v.to_bits()),
                View::Bf16(v) => line.zip(v).for_each(|(w, v)| *w = v.to_f32().to_bits()),
            }
        }
    }

    fn put_pairs(&self, keys: &mut [u32], values: &mut [u32], i: usize, k: View, v: View) {
        let column = keys[i / PANEL * self.key_panel() + i % PANEL..].iter_mut().step_by(PANEL);
        match k {
            View::F32(k) => {
                let pair = |k: &[f32]| {
                    pair(bf16::from_f32(k[0]), k.get(1).map_or(bf16::ZERO, |&k| bf16::from_f32(k)))
                };
                column.zip(k.chunks(2)).for_each(|(w, k)| *w = pair(k));
            }
            View::Bf16(k) => {
                let pair = |k: &[bf16]| pair(k[0], k.get(1).copied().unwrap_or_default());
                column.zip(k.chunks(2)).for_each(|(w, k)| *w = pair(k));
            }
        }
        for panel in 0..v.len().div_ceil(PANEL) {
            let line = values[panel * self.value_panel() + i / 2 * PANEL..].iter_mut();
            match v.slice(panel * PANEL, v.len().min((panel + 1) * PANEL)) {
                View::F32(v) => line.zip(v).for_each(|(w, &v)| *w = joined(*w, i, bf16::from_f32(v))),
                View::Bf16(v) => line.zip(v).for_each(|(w, &v)| *w = joined(*w, i, v)),
            }
        }
    }
}

impl KvCache {
    /// An empty cache for the key heads of `shape`.
    pub fn new(shape: &AttentionShape, format: impl Into<KvFormat>) -> Self {
        Self::with_values(shape, format.into(), false)
    }

    /// An empty cache whose values are the first columns of its keys, which it holds once: latents, of one key head.
    ///
    /// # Panics
    /// When keys are narrower than values.
    pub fn of_latents(shape: &AttentionShape, format: impl Into<KvFormat>) -> Self {
        let AttentionShape { qk_dim, v_dim, .. } = *shape;
        assert!(v_dim <= qk_dim, "cache of latents: values of {v_dim} columns in keys of {qk_dim}");
        Self::with_values(shape, format.into(), true)
    }

    fn with_values(shape: &AttentionShape, format: KvFormat, latents: bool) -> Self {
        let AttentionShape { kv_heads, qk_dim, v_dim, .. } = *shape;
        let layout = Layout { kv_heads, qk_dim, v_dim, format, latents };
        Self { layout, len: 0, blocks: Vec::new() }
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
    pub fn format(&self) -> KvFormat {
        self.layout.format
    }

    /// Memory held, blocks that are shared included.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|block| size_of_val(&***block)).sum()
    }

    /// Memory that one block of [`BLOCK`] positions takes.
    pub fn block_bytes(shape: &AttentionShape, format: impl Into<KvFormat>) -> usize {
        Self::new(shape, format).bytes_per_block()
    }

    /// Memory that one block of [`BLOCK`] positions of this cache takes.
    pub fn bytes_per_block(&self) -> usize {
        self.layout.block_words() * size_of::<u32>()
    }

    /// Whether values are the first columns of the keys.
    pub(super) fn is_of_latents(&self) -> bool {
        self.layout.latents
    }

    /// Words of one panel of keys.
    pub(super) fn key_panel(&self) -> usize {
        self.layout.key_panel()
    }

    pub(super) fn check(&self, what: &str, shape: &AttentionShape) {
        let layout = self.layout;
        let (got, expected) =
            ((layout.kv_heads, layout.qk_dim, layout.v_dim), (shape.kv_heads, shape.qk_dim, shape.v_dim));
        assert!(got == expected, "{what}: cache of (kv heads, qk, v) {got:?}, expected {expected:?}");
    }

    /// Keys and values of one head in one block.
    pub(super) fn head(&self, block: usize, kv_head: usize) -> HeadBlock<'_> {
        let layout = self.layout;
        let words = &self.blocks[block][kv_head * layout.head_words()..];
        let (keys, values) = words[..layout.head_words()].split_at(layout.key_words());
        HeadBlock { format: layout.format, keys, values }
    }

    /// Asks for what is read after this head's part of a block: its next block, or block `first` of the next head.
    #[inline(always)]
    pub(super) fn prefetch_after<S: Simd>(&self, s: S, block: usize, kv_head: usize, first: usize) {
        let (block, kv_head) =
            if (block + 1) * BLOCK < self.len { (block + 1, kv_head) } else { (first, kv_head + 1) };
        if kv_head == self.layout.kv_heads {
            return;
        }
        let count = BLOCK.min(self.len - block * BLOCK);
        let HeadBlock { keys, values, .. } = self.head(block, kv_head);
        let keys = &keys[..count.div_ceil(PANEL) * self.key_panel()];
        keys.iter().step_by(LINE).for_each(|at| s.prefetch(at));
        for panel in values.chunks(self.layout.value_panel()) {
            panel[..self.layout.value_words(count)].iter().step_by(LINE).for_each(|at| s.prefetch(at));
        }
    }

    /// Appends positions: `k` `[m, kv * qk]` and `v` `[m, kv * v]`, of either dtype; for a cache of latents `v` is empty.
    ///
    /// # Panics
    /// When the lengths contradict the shape or each other.
    pub fn append(&mut self, k: View, v: View) {
        let layout = self.layout;
        let (Layout { kv_heads, qk_dim, .. }, v_dim) = (layout, layout.stored_v_dim());
        let (k_width, v_width) = (kv_heads * qk_dim, kv_heads * v_dim);
        let rows = k.len() / k_width;
        assert!(
            k.len() == rows * k_width && v.len() == rows * v_width,
            "cache append: {} elements of keys in rows of {k_width}, {} of values in rows of {v_width}",
            k.len(),
            v.len()
        );
        let mut row = 0;
        while row < rows {
            let i = self.len % BLOCK;
            let count = (BLOCK - i).min(rows - row);
            let words = self.last_block();
            for (i, row) in (i..).zip(row..row + count) {
                if i.is_multiple_of(2 * GRID_STEPS) {
                    layout.clear(words, i);
                }
                for (head, words) in words.chunks_mut(layout.head_words()).enumerate() {
                    let (k_at, v_at) = (row * k_width + head * qk_dim, row * v_width + head * v_dim);
                    let (k, v) = (k.slice(k_at, k_at + qk_dim), v.slice(v_at, v_at + v_dim));
                    layout.put(words, i, k, v);
                }
            }
            self.len += count;
            row += count;
        }
    }

    /// The block that the next position lies in, for writing: a new one, or one that nobody else holds.
    fn last_block(&mut self) -> &mut [u32] {
        let (block, i) = (self.len / BLOCK, self.len % BLOCK);
        if block == self.blocks.len() {
            self.blocks.push(Arc::new(Block::new(self.layout.block_words())));
        }
        let last = &mut self.blocks[block];
        if Arc::get_mut(last).is_none() {
            *last = Arc::new(self.layout.copy(last, i));
        }
        Arc::get_mut(last).expect("nobody else holds a block that was just copied")
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
        if self.layout.format == KvFormat::Bf16 && !i.is_multiple_of(2 * GRID_STEPS) {
            let layout = self.layout;
            layout.cut(self.last_block(), i);
        }
    }

    /// Block `index` of those that are full.
    pub fn page(&self, index: usize) -> Option<KvPage> {
        ((index + 1) * BLOCK <= self.len).then(|| KvPage(self.blocks[index].clone()))
    }

    /// Appends a full block of another cache.
    ///
    /// # Panics
    /// When the last block is not full, or the page is of another size.
    pub fn push_page(&mut self, page: &KvPage) {
        assert!(self.len.is_multiple_of(BLOCK), "cache page: {} positions are not whole pages", self.len);
        let (got, expected) = (page.0.len(), self.layout.block_words());
        assert!(got == expected, "cache page: {got} words, expected {expected}");
        self.blocks.push(page.0.clone());
        self.len += BLOCK;
    }

    /// Holds another's block instead of its own of the same positions and contents, which frees that one.
    ///
    /// # Panics
    /// When block `index` is not full, or the page is of another size.
    pub fn replace_page(&mut self, index: usize, page: &KvPage) {
        assert!((index + 1) * BLOCK <= self.len, "cache page {index} of {} positions", self.len);
        let (got, expected) = (page.0.len(), self.layout.block_words());
        assert!(got == expected, "cache page: {got} words, expected {expected}");
        self.blocks[index] = page.0.clone();
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
            let Layout { kv_heads, qk_dim, .. } = cache.layout;
            let (k_width, v_width) = (kv_heads * qk_dim, kv_heads * cache.layout.stored_v_dim());
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
        let layout = cache.layout;
        // words between those of a position's key, and where its values are
        let (pitch, [value, scale]) = match layout.format {
            KvFormat::F32 => (PANEL, [i * PANEL, i * PANEL + LINE]),
            KvFormat::Bf16 => (PANEL, [i / 2 * PANEL, i / 2 * PANEL + LINE]),
            KvFormat::Int8 => (LINE, codes::value_words(i)),
        };
        for head in 0..layout.kv_heads {
            let HeadBlock { keys, values, .. } = cache.head(block, head);
            let keys = &keys[i / PANEL * cache.key_panel()..][..cache.key_panel()];
            keys[i % pitch..].iter().step_by(pitch).for_each(|at| s.prefetch(at));
            for panel in values.chunks(layout.value_panel()) {
                s.prefetch(&raw const panel[value]);
                s.prefetch(&raw const panel[scale]);
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
    format: KvFormat,
    keys: &'a [u32],
    values: &'a [u32],
}

impl<'a> HeadBlock<'a> {
    /// Keys and values, where they are words of this engine.
    #[inline(always)]
    pub fn words<S: Simd>(&self, engine: Engine<S>) -> Option<(&'a [u32], &'a [u32])> {
        let are_words = match self.format {
            KvFormat::F32 => !engine.pairs(),
            KvFormat::Bf16 => engine.pairs(),
            KvFormat::Int8 => false,
        };
        are_words.then_some((self.keys, self.values))
    }

    /// What is not words of this engine as such, in panels as it packs them: pairs of bf16, or codes, of which it reads the
    /// first `count` positions.
    #[inline(always)]
    pub fn unpack<S: Simd>(
        &self,
        engine: Engine<S>,
        qk_dim: usize,
        count: usize,
        keys: &mut [u32],
        values: &mut [u32],
    ) {
        if self.format == KvFormat::Int8 {
            codes::unpack(engine, qk_dim, count, (self.keys, self.values), keys, values);
            return;
        }
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
