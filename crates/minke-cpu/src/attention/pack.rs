//! Rows of heads in token rows, read and written.

use minke_num::bf16;

use crate::cpu::SharedMut;
use crate::gemm::engine::Rows;
use crate::simd::{LANES, Simd};
use crate::view::{View, ViewMut};

/// The rows (token, head of one group) of a flattened tensor, tokens ascending, heads ascending within a token.
#[derive(Clone, Copy)]
pub struct HeadRows<'a> {
    /// The tensor, `[n, heads * dim]`.
    pub x: View<'a>,
    /// Token of row 0.
    pub token: usize,
    /// Heads of the tensor.
    pub heads: usize,
    /// First head of the group.
    pub head: usize,
    /// Heads of the group.
    pub group: usize,
    /// Width of a head.
    pub dim: usize,
}

impl HeadRows<'_> {
    /// Where row `r` starts in the tensor.
    #[inline(always)]
    pub fn at(&self, r: usize) -> usize {
        ((self.token + r / self.group) * self.heads + self.head + r % self.group) * self.dim
    }
}

impl<'a> Rows<'a> for HeadRows<'a> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn row(&self, r: usize) -> View<'a> {
        // rows of one head are short pieces far apart, which the hardware's own prefetching does not follow
        self.x.ask(self.at(r + AHEAD), self.dim);
        let at = self.at(r);
        self.x.slice(at, at + self.dim)
    }
}

/// Rows that are on their way while one is read.
const AHEAD: usize = 8;

/// An output that the tasks of one loop share; each writes its own rows.
pub enum SharedRows {
    /// f32 elements.
    F32(SharedMut<f32>),
    /// bf16 elements, rounded when written.
    Bf16(SharedMut<bf16>),
}

impl SharedRows {
    /// Shares `x` among the tasks of a loop that ends before the borrow does.
    pub fn new(x: ViewMut) -> Self {
        match x {
            ViewMut::F32(x) => Self::F32(SharedMut::new(x)),
            ViewMut::Bf16(x) => Self::Bf16(SharedMut::new(x)),
        }
    }

    /// Writes `factor * x[..len]` to `at..at + len`, with zeros made positive: the sign of a zero is the one thing in
    /// which a sum may differ with how much padding it ran over.
    ///
    /// # Safety
    /// As [`SharedMut::slice`]; `x` must be padded to whole vectors.
    #[inline(always)]
    pub unsafe fn write<S: Simd>(&self, s: S, at: usize, len: usize, x: &[f32], factor: f32) {
        let by = s.splat(factor);
        let (x, _) = x.as_chunks::<LANES>();
        match self {
            Self::F32(out) => {
                // SAFETY: by the caller's promise.
                let out = unsafe { out.slice(at, len) };
                for (y, x) in out.chunks_mut(LANES).zip(x) {
                    s.store_part(s.fma(s.load(x), by, s.zero()), y);
                }
            }
            Self::Bf16(out) => {
                // SAFETY: by the caller's promise.
                let out = unsafe { out.slice(at, len) };
                for (y, x) in out.chunks_mut(LANES).zip(x) {
                    let value = s.fma(s.load(x), by, s.zero());
                    if let Some(y) = y.first_chunk_mut() {
                        s.store_bf16(value, y);
                    } else {
                        let mut half = [bf16::ZERO; LANES];
                        s.store_bf16(value, &mut half);
                        y.copy_from_slice(&half[..y.len()]);
                    }
                }
            }
        }
    }
}
