//! From token rows of either dtype to what the register tile reads, and back.

use minke_num::bf16;

use crate::cpu::SharedMut;
use crate::gemm::tile::PANEL;
use crate::simd::{LANES, Simd};
use crate::view::{View, ViewMut};

use super::BLOCK;

/// Rows transposed at a time: what a four-wide shuffle can do.
const QUAD: usize = 4;

/// Elements of working memory that [`pack_columns`] needs for rows of `dim`.
pub const fn quad_len(dim: usize) -> usize {
    QUAD * dim
}

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

    /// Row `r` times `factor`, widened.
    #[inline(always)]
    pub fn read<S: Simd>(&self, s: S, r: usize, factor: f32, out: &mut [f32]) {
        prefetch(self.x, self.at(r + AHEAD), self.dim);
        widen(s, self.x, self.at(r), factor, &mut out[..self.dim]);
    }
}

/// Rows that are on their way while one is read.
const AHEAD: usize = 8;

/// Asks for `x[at..at + len]`, which need not exist. The rows of one head are short pieces far apart, which the
/// hardware's own prefetching does not follow.
#[inline(always)]
fn prefetch(x: View, at: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let (start, size) = match x {
            View::F32(x) => (x.as_ptr().wrapping_add(at).cast::<i8>(), 4),
            View::Bf16(x) => (x.as_ptr().wrapping_add(at).cast::<i8>(), 2),
        };
        for byte in (0..len * size).step_by(64) {
            // SAFETY: part of the baseline, and a hint: it faults on no address
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(byte)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, at, len);
}

/// `out = factor * x[at..at + out.len()]`
#[inline(always)]
pub fn widen<S: Simd>(s: S, x: View, at: usize, factor: f32, out: &mut [f32]) {
    let by = s.splat(factor);
    let (whole, rest) = out.as_chunks_mut::<LANES>();
    match x {
        View::F32(x) => {
            let (x, tail) = x[at..at + whole.len() * LANES + rest.len()].as_chunks::<LANES>();
            for (y, x) in whole.iter_mut().zip(x) {
                s.store(s.mul(s.load(x), by), y);
            }
            for (y, x) in rest.iter_mut().zip(tail) {
                *y = x * factor;
            }
        }
        View::Bf16(x) => {
            let (x, tail) = x[at..at + whole.len() * LANES + rest.len()].as_chunks::<LANES>();
            for (y, x) in whole.iter_mut().zip(x) {
                s.store(s.mul(s.load_bf16(x), by), y);
            }
            for (y, x) in rest.iter_mut().zip(tail) {
                *y = x.to_f32() * factor;
            }
        }
    }
}

/// Four rows of four as columns.
#[inline(always)]
fn transposed(a: &[f32; QUAD], b: &[f32; QUAD], c: &[f32; QUAD], d: &[f32; QUAD]) -> [[f32; QUAD]; QUAD] {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_TRANSPOSE4_PS, _mm_loadu_ps, _mm_storeu_ps};
        let mut columns = [[0.0; QUAD]; QUAD];
        // SAFETY: SSE is part of the baseline; all rows are four floats
        unsafe {
            let [mut w, mut x, mut y, mut z] = [
                _mm_loadu_ps(a.as_ptr()),
                _mm_loadu_ps(b.as_ptr()),
                _mm_loadu_ps(c.as_ptr()),
                _mm_loadu_ps(d.as_ptr()),
            ];
            _MM_TRANSPOSE4_PS(&mut w, &mut x, &mut y, &mut z);
            for (column, v) in columns.iter_mut().zip([w, x, y, z]) {
                _mm_storeu_ps(column.as_mut_ptr(), v);
            }
        }
        columns
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let mut columns = [[0.0; QUAD]; QUAD];
        for (i, column) in columns.iter_mut().enumerate() {
            *column = [a[i], b[i], c[i], d[i]];
        }
        columns
    }
}

/// `count` rows from `first` as the columns of two panels `[2][dim][PANEL]`; the vector in which the last column lies
/// is filled up with zeros.
#[inline(always)]
pub fn pack_columns<S: Simd>(
    s: S,
    rows: &HeadRows,
    first: usize,
    count: usize,
    quad: &mut [f32],
    out: &mut [f32],
) {
    debug_assert!(count <= BLOCK);
    let dim = rows.dim;
    for j in (0..count.next_multiple_of(LANES)).step_by(QUAD) {
        for i in 0..QUAD {
            let row = &mut quad[i * dim..][..dim];
            if j + i < count {
                rows.read(s, first + j + i, 1.0, row);
            } else {
                row.fill(0.0);
            }
        }
        let panel = &mut out[j / PANEL * dim * PANEL..][..dim * PANEL];
        let (r0, rest) = quad.split_at(dim);
        let (r1, rest) = rest.split_at(dim);
        let (r2, rest) = rest.split_at(dim);
        let r3 = &rest[..dim];
        let column = j % PANEL;
        let (panel, _) = panel.as_chunks_mut::<PANEL>();
        // four by four, so that shuffles of registers do it
        let (f0, t0) = r0.as_chunks::<QUAD>();
        let (f1, t1) = r1.as_chunks::<QUAD>();
        let (f2, t2) = r2.as_chunks::<QUAD>();
        let (f3, t3) = r3.as_chunks::<QUAD>();
        let (whole, tail) = panel.as_chunks_mut::<QUAD>();
        for ((((line, a), b), c), d) in whole.iter_mut().zip(f0).zip(f1).zip(f2).zip(f3) {
            for (line, quad) in line.iter_mut().zip(transposed(a, b, c, d)) {
                line[column..column + QUAD].copy_from_slice(&quad);
            }
        }
        for (i, line) in tail.iter_mut().enumerate() {
            line[column..column + QUAD].copy_from_slice(&[t0[i], t1[i], t2[i], t3[i]]);
        }
    }
}

/// `count` rows from `first` as the rows of panels of columns, `panel` elements apart; missing columns are zeros.
#[inline(always)]
pub fn pack_panels<S: Simd>(
    s: S,
    rows: &HeadRows,
    first: usize,
    count: usize,
    panel: usize,
    out: &mut [f32],
) {
    let dim = rows.dim;
    for (c, column) in (0..dim).step_by(PANEL).enumerate() {
        let width = (dim - column).min(PANEL);
        let (lines, _) = out[c * panel..][..count * PANEL].as_chunks_mut::<PANEL>();
        for (i, line) in lines.iter_mut().enumerate() {
            prefetch(rows.x, rows.at(first + i + AHEAD) + column, width);
            let at = rows.at(first + i) + column;
            widen(s, rows.x, at, 1.0, &mut line[..width]);
            line[width..].fill(0.0);
        }
    }
}

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
