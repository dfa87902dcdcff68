//! What the row kernels share: sixteen lanes from and to rows of either dtype, the loop over a row, tiles of rows.
//!
//! Loops over lanes are macros and `#[inline(always)]` functions rather than closures: a closure is a function of its
//! own, and one that the compiler does not inline loses the level's instructions.

use minke_num::bf16;

use crate::cpu::{Cpu, SharedMut};
use crate::simd::{LANES, Simd};
use crate::view::{View, ViewMut};

/// `lanes!(len, |i, n| body)`: the body for every sixteen elements from `i` (then `n` is the constant sixteen), and
/// once more for the `n` that are left.
macro_rules! lanes {
    ($len:expr, |$i:ident, $n:ident| $body:block) => {{
        let len: usize = $len;
        let mut at = 0;
        while at + $crate::simd::LANES <= len {
            let ($i, $n) = (at, $crate::simd::LANES);
            $body
            at += $crate::simd::LANES;
        }
        if at < len {
            let ($i, $n) = (at, len - at);
            $body
        }
    }};
}

/// `Name<'a>(s: S, field: Type, ...) -> Out { body }`: a [`crate::simd::Kernel`] whose fields are the arguments.
macro_rules! kernel {
    ($(#[$meta:meta])* $name:ident<$a:lifetime>($s:ident: $simd:ident, $($field:ident: $ty:ty),+ $(,)?)
        $body:block) => {
        $crate::rows::kernel! { $(#[$meta])* $name<$a>($s: $simd, $($field: $ty),+) -> () $body }
    };
    ($(#[$meta:meta])* $name:ident<$a:lifetime>($s:ident: $simd:ident, $($field:ident: $ty:ty),+ $(,)?)
        -> $out:ty $body:block) => {
        $(#[$meta])*
        struct $name<$a> { $($field: $ty),+ }

        impl<$a> $crate::simd::Kernel for $name<$a> {
            type Out = $out;

            #[inline(always)]
            fn run<$simd: $crate::simd::Simd>(self, $s: $simd) -> $out {
                let Self { $($field),+ } = self;
                $body
            }
        }
    };
}

pub(crate) use {kernel, lanes};

/// Elements per task of kernels that see one flat array.
pub const FLAT_TILE: usize = 16 * 1024;

/// Elements `at..at + n` of an f32 slice, `n` at most sixteen; missing lanes are `fill`.
#[inline(always)]
pub fn load_f32_or<S: Simd>(s: S, x: &[f32], at: usize, n: usize, fill: f32) -> S::V {
    match <&[f32; LANES]>::try_from(&x[at..at + n]) {
        Ok(full) => s.load(full),
        Err(_) => s.load_part(&x[at..at + n], fill),
    }
}

/// Elements `at..at + n` of an f32 slice; missing lanes are zero.
#[inline(always)]
pub fn load_f32<S: Simd>(s: S, x: &[f32], at: usize, n: usize) -> S::V {
    load_f32_or(s, x, at, n, 0.0)
}

/// Stores the first `n` lanes at `at`.
#[inline(always)]
pub fn store_f32<S: Simd>(s: S, v: S::V, out: &mut [f32], at: usize, n: usize) {
    let out = &mut out[at..at + n];
    match <&mut [f32; LANES]>::try_from(&mut *out) {
        Ok(full) => s.store(v, full),
        Err(_) => s.store_part(v, out),
    }
}

/// Elements `at..at + n` of a slice of either dtype, widened; missing lanes are zero.
#[inline(always)]
pub fn load<S: Simd>(s: S, x: View<'_>, at: usize, n: usize) -> S::V {
    match x {
        View::F32(x) => load_f32(s, x, at, n),
        View::Bf16(x) => {
            if let Ok(full) = <&[bf16; LANES]>::try_from(&x[at..at + n]) {
                return s.load_bf16(full);
            }
            s.load_part_bf16(&x[at..at + n])
        }
    }
}

/// Stores the first `n` lanes at `at`, rounded once to the dtype of `out`.
#[inline(always)]
pub fn store<S: Simd>(s: S, v: S::V, out: &mut ViewMut<'_>, at: usize, n: usize) {
    match out {
        ViewMut::F32(out) => store_f32(s, v, out, at, n),
        ViewMut::Bf16(out) => {
            let out = &mut out[at..at + n];
            if let Ok(full) = <&mut [bf16; LANES]>::try_from(&mut *out) {
                s.store_bf16(v, full);
            } else {
                s.store_part_bf16(v, out);
            }
        }
    }
}

/// Copies `len` elements from `x[from..]` to `out[to..]`; bits stay as they are where the dtypes agree.
#[inline(always)]
pub fn copy<S: Simd>(s: S, x: View<'_>, from: usize, out: &mut ViewMut<'_>, to: usize, len: usize) {
    match (x, &mut *out) {
        (View::F32(x), ViewMut::F32(out)) => out[to..to + len].copy_from_slice(&x[from..from + len]),
        (View::Bf16(x), ViewMut::Bf16(out)) => out[to..to + len].copy_from_slice(&x[from..from + len]),
        (View::F32(_), ViewMut::Bf16(_)) | (View::Bf16(_), ViewMut::F32(_)) => {
            lanes!(len, |i, n| {
                store(s, load(s, x, from + i, n), out, to + i, n);
            });
        }
    }
}

/// `sum of a[i] b[i]`: two chains of lanes, one over the even and one over the odd groups of sixteen.
#[inline(always)]
pub fn dot<S: Simd>(s: S, a: View<'_>, b: View<'_>, len: usize) -> f32 {
    let (mut even, mut odd) = (s.zero(), s.zero());
    let mut i = 0;
    while i + 2 * LANES <= len {
        even = s.fma(load(s, a, i, LANES), load(s, b, i, LANES), even);
        odd = s.fma(load(s, a, i + LANES, LANES), load(s, b, i + LANES, LANES), odd);
        i += 2 * LANES;
    }
    while i < len {
        let n = (len - i).min(LANES);
        even = s.fma(load(s, a, i, n), load(s, b, i, n), even);
        i += n;
    }
    s.sum(s.add(even, odd))
}

/// A mutable slice of either dtype that tasks of one parallel loop share: each writes its own part.
#[derive(Clone, Copy)]
pub enum SharedView {
    /// f32 elements.
    F32(SharedMut<f32>),
    /// bf16 elements.
    Bf16(SharedMut<bf16>),
}

impl SharedView {
    /// Shares `x` among the tasks of a loop that ends before the borrow does.
    pub fn new(x: ViewMut<'_>) -> Self {
        match x {
            ViewMut::F32(x) => SharedView::F32(SharedMut::new(x)),
            ViewMut::Bf16(x) => SharedView::Bf16(SharedMut::new(x)),
        }
    }

    /// The part `start..start + len`.
    ///
    /// # Safety
    /// As for [`SharedMut::slice`]: no two tasks that run at once may ask for overlapping parts.
    #[inline]
    pub unsafe fn slice(&self, start: usize, len: usize) -> ViewMut<'_> {
        // SAFETY: by the caller's promise.
        unsafe {
            match self {
                SharedView::F32(x) => ViewMut::F32(x.slice(start, len)),
                SharedView::Bf16(x) => ViewMut::Bf16(x.slice(start, len)),
            }
        }
    }
}

/// The number of rows of `width` elements in `len`.
///
/// # Panics
/// When the rows do not come out even.
#[track_caller]
pub fn count(op: &str, len: usize, width: usize) -> usize {
    if width == 0 {
        assert_eq!(len, 0, "{op}: {len} elements in rows of none");
        return 0;
    }
    assert_eq!(len % width, 0, "{op}: {len} elements are no whole number of rows of {width}");
    len / width
}

/// Panics unless `what` of `op` has the expected number of elements.
#[track_caller]
pub fn expect_len(op: &str, what: &str, got: usize, expected: usize) {
    assert_eq!(got, expected, "{op}: {what} has {got} elements, expected {expected}");
}

/// Calls `task(from, to)` for tiles of rows, in parallel; the tile depends on the width alone.
pub fn over_tiles(cpu: &Cpu, rows: usize, width: usize, task: impl Fn(usize, usize) + Sync) {
    over_blocks(cpu, rows, (8192 / width.max(1)).clamp(1, 64), task);
}

/// Calls `task(from, to)` for blocks of `block` of `len` things, in parallel.
pub fn over_blocks(cpu: &Cpu, len: usize, block: usize, task: impl Fn(usize, usize) + Sync) {
    cpu.run(len.div_ceil(block), |i| task(i * block, ((i + 1) * block).min(len)));
}
