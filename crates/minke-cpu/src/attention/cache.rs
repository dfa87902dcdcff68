//! Keys and values of one sequence in one layer, as the kernels read them.

use minke_num::bf16;

use crate::gemm::tile::PANEL;
use crate::scratch::AlignedBuf;
use crate::view::{DType, View};

use super::{AttentionShape, BLOCK};

/// The keys and values of one sequence in one layer.
///
/// Blocks of [`BLOCK`] positions, each with, per key head, the keys as columns of two panels `[2][qk][32]` and the
/// values as rows of panels `[ceil(v / 32)][64][32]`. In a bf16 cache values are rounded when they are appended: to
/// the same that a bf16 training step holds.
#[derive(Clone)]
pub struct KvCache {
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    dtype: DType,
    len: usize,
    blocks: Vec<AlignedBuf>,
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
        self.blocks.iter().map(AlignedBuf::capacity_bytes).sum()
    }

    /// Memory that one block of [`BLOCK`] positions takes.
    pub fn block_bytes(shape: &AttentionShape, dtype: DType) -> usize {
        (Self::new(shape, dtype).block_len() * dtype.size_bytes()).next_multiple_of(64)
    }

    /// Elements of the keys of one head in one block.
    pub(super) fn keys_len(&self) -> usize {
        BLOCK * self.qk_dim
    }

    /// Elements of keys and values of one head in one block.
    fn head_len(&self) -> usize {
        self.keys_len() + BLOCK * self.v_dim.next_multiple_of(PANEL)
    }

    fn block_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }

    pub(super) fn check(&self, what: &str, shape: &AttentionShape) {
        let (got, expected) =
            ((self.kv_heads, self.qk_dim, self.v_dim), (shape.kv_heads, shape.qk_dim, shape.v_dim));
        assert!(got == expected, "{what}: cache of (kv heads, qk, v) {got:?}, expected {expected:?}");
    }

    /// Keys and values of one head in one block, back to back.
    pub(super) fn block(&self, block: usize, kv_head: usize) -> View<'_> {
        let (start, end) = (kv_head * self.head_len(), (kv_head + 1) * self.head_len());
        match self.dtype {
            DType::F32 => View::F32(&self.blocks[block].view(self.block_len())[start..end]),
            DType::Bf16 => View::Bf16(&self.blocks[block].view(self.block_len())[start..end]),
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
            let (k, v) =
                (k.slice(row * k_width, (row + 1) * k_width), v.slice(row * v_width, (row + 1) * v_width));
            self.push(k, v);
        }
    }

    fn push(&mut self, k: View, v: View) {
        let (block, i) = (self.len / BLOCK, self.len % BLOCK);
        if block == self.blocks.len() {
            self.blocks.push(AlignedBuf::default());
        }
        let layout = Layout {
            heads: self.kv_heads,
            qk: self.qk_dim,
            v: self.v_dim,
            head_len: self.head_len(),
            keys_len: self.keys_len(),
        };
        let len = self.block_len();
        let buf = &mut self.blocks[block];
        let widened = bf16::to_f32;
        match (self.dtype, k, v) {
            (DType::F32, View::F32(k), View::F32(v)) => layout.put(buf.get(len), i, k, v, |x| x, |x| x),
            (DType::F32, View::F32(k), View::Bf16(v)) => layout.put(buf.get(len), i, k, v, |x| x, widened),
            (DType::F32, View::Bf16(k), View::F32(v)) => layout.put(buf.get(len), i, k, v, widened, |x| x),
            (DType::F32, View::Bf16(k), View::Bf16(v)) => layout.put(buf.get(len), i, k, v, widened, widened),
            (DType::Bf16, View::F32(k), View::F32(v)) => {
                layout.put(buf.get(len), i, k, v, bf16::from_f32, bf16::from_f32);
            }
            (DType::Bf16, View::F32(k), View::Bf16(v)) => {
                layout.put(buf.get(len), i, k, v, bf16::from_f32, |x| x);
            }
            (DType::Bf16, View::Bf16(k), View::F32(v)) => {
                layout.put(buf.get(len), i, k, v, |x| x, bf16::from_f32);
            }
            (DType::Bf16, View::Bf16(k), View::Bf16(v)) => layout.put(buf.get(len), i, k, v, |x| x, |x| x),
        }
        self.len += 1;
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
    }
}

/// Where a position goes in a block.
struct Layout {
    heads: usize,
    qk: usize,
    v: usize,
    head_len: usize,
    keys_len: usize,
}

impl Layout {
    /// Writes position `i` of a block.
    fn put<T, K: Copy, V: Copy>(
        &self,
        block: &mut [T],
        i: usize,
        k: &[K],
        v: &[V],
        key: impl Fn(K) -> T,
        value: impl Fn(V) -> T,
    ) {
        for head in 0..self.heads {
            let (keys, values) = block[head * self.head_len..][..self.head_len].split_at_mut(self.keys_len);
            let column = &mut keys[i / PANEL * self.qk * PANEL + i % PANEL..];
            for (x, &k) in column.iter_mut().step_by(PANEL).zip(&k[head * self.qk..][..self.qk]) {
                *x = key(k);
            }
            for (panel, v) in v[head * self.v..][..self.v].chunks(PANEL).enumerate() {
                let line = &mut values[(panel * BLOCK + i) * PANEL..];
                for (x, &v) in line.iter_mut().zip(v) {
                    *x = value(v);
                }
            }
        }
    }
}
