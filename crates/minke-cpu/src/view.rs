//! Matrices as kernels see them: a slice of f32 or bf16 and a row length.

use minke_num::bf16;

/// The storage format of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of an f32, rounded to nearest even.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }
}

/// A borrowed slice of either dtype.
#[derive(Clone, Copy)]
pub enum View<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
}

/// A mutably borrowed slice of either dtype.
pub enum ViewMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// bf16 elements.
    Bf16(&'a mut [bf16]),
}

impl<'a> View<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            View::F32(x) => x.len(),
            View::Bf16(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The storage format.
    pub fn dtype(&self) -> DType {
        match self {
            View::F32(_) => DType::F32,
            View::Bf16(_) => DType::Bf16,
        }
    }

    /// Asks the memory for `len` elements from `at`, which need not exist: they will be read soon.
    #[inline(always)]
    pub fn ask(&self, at: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let (start, size) = match self {
                View::F32(x) => (x.as_ptr().wrapping_add(at).cast::<i8>(), 4),
                View::Bf16(x) => (x.as_ptr().wrapping_add(at).cast::<i8>(), 2),
            };
            for byte in (0..len * size).step_by(64) {
                // SAFETY: part of the baseline, and a hint: it faults on no address
                unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(byte)) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (at, len);
    }

    /// All elements, widened to f32.
    pub fn to_vec(&self) -> Vec<f32> {
        match self {
            View::F32(x) => x.to_vec(),
            View::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The part `start..end`.
    pub fn slice(&self, start: usize, end: usize) -> View<'a> {
        match self {
            View::F32(x) => View::F32(&x[start..end]),
            View::Bf16(x) => View::Bf16(&x[start..end]),
        }
    }
}

impl ViewMut<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_view().len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The storage format.
    pub fn dtype(&self) -> DType {
        self.as_view().dtype()
    }

    /// The same slice, read-only.
    pub fn as_view(&self) -> View<'_> {
        match self {
            ViewMut::F32(x) => View::F32(x),
            ViewMut::Bf16(x) => View::Bf16(x),
        }
    }

    /// The first `at` elements, and the rest.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            ViewMut::F32(x) => {
                let (first, rest) = x.split_at_mut(at);
                (ViewMut::F32(first), ViewMut::F32(rest))
            }
            ViewMut::Bf16(x) => {
                let (first, rest) = x.split_at_mut(at);
                (ViewMut::Bf16(first), ViewMut::Bf16(rest))
            }
        }
    }

    /// The elements of `range`.
    pub fn part(self, range: std::ops::Range<usize>) -> Self {
        self.split_at(range.end).0.split_at(range.start).1
    }

    /// The same slice, borrowed again.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        match self {
            ViewMut::F32(x) => ViewMut::F32(x),
            ViewMut::Bf16(x) => ViewMut::Bf16(x),
        }
    }
}
