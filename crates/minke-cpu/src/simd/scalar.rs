//! Sixteen lanes as an array: the level that every machine has, and the twin that the others are tested against.

use minke_num::bf16;

use crate::gemm::tile::Tile;

use super::{LANES, RECIPROCAL, Simd};

#[derive(Clone, Copy)]
pub struct Scalar;

type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// The register tile of this level.
#[inline(never)]
unsafe fn product_tile(tile: Tile, rows: usize, vecs: usize) {
    // SAFETY: by the promise of the caller of `tile`.
    unsafe { crate::gemm::tile::body(Scalar, tile, rows, vecs) }
}

impl Simd for Scalar {
    type V = V;
    type B = [u64; 8];
    const TILE_ROWS: usize = 4;
    const TILE_VECS: usize = 1;

    #[inline(always)]
    unsafe fn tile(self, tile: Tile, rows: usize, vecs: usize) {
        // SAFETY: the witness says that the instructions exist; the rest is the caller's promise.
        unsafe { product_tile(tile, rows, vecs) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        *x
    }
    #[inline(always)]
    fn store(self, x: V, out: &mut [f32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> V {
        x.map(bf16::to_f32)
    }
    #[inline(always)]
    fn store_bf16(self, x: V, out: &mut [bf16; LANES]) {
        *out = x.map(bf16::from_f32);
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        map2(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        map2(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn times_power(self, p: V, t: V) -> V {
        std::array::from_fn(|i| f32::from_bits(p[i].to_bits().wrapping_add(t[i].to_bits() << 23)))
    }
    #[inline(always)]
    fn reciprocal_guess(self, x: V) -> V {
        x.map(|x| f32::from_bits(RECIPROCAL.wrapping_sub(x.to_bits())))
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        let b: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let c: [f32; 4] = std::array::from_fn(|i| b[i] + b[i + 4]);
        (c[0] + c[2]) + (c[1] + c[3])
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }

    plain_bytes!();
}
