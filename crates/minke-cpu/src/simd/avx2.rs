//! Two 256-bit registers as sixteen lanes.

use std::arch::x86_64::*;

use minke_num::bf16;

use crate::gemm::tile::Tile;

use super::{Kernel, LANES, RECIPROCAL, Simd};

/// The witness: made by [`run`] alone.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// Runs a kernel with AVX2, FMA and F16C-free code.
///
/// # Safety
/// The machine must have `avx2` and `fma`.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx2(()))
}

#[derive(Clone, Copy)]
pub struct V(__m256, __m256);

/// Rounds eight floats to bf16 in the low halves of eight words (nearest, ties to even; NaN made quiet).
#[inline(always)]
unsafe fn to_bf16_words(x: __m256) -> __m256i {
    // SAFETY: the witness of the caller says that AVX2 exists.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
    }
}

macro_rules! per_half {
    ($f:ident, $($x:expr),+) => {
        // SAFETY: the witness says that AVX2 and FMA exist.
        unsafe { V($f($($x.0),+), $f($($x.1),+)) }
    };
}

/// The register tile of this level.
#[target_feature(enable = "avx2,fma")]
unsafe fn product_tile(tile: Tile, rows: usize, vecs: usize) {
    // SAFETY: by the promise of the caller of `tile`.
    unsafe { crate::gemm::tile::body(Avx2(()), tile, rows, vecs) }
}

impl Simd for Avx2 {
    type V = V;
    type B = [u64; 8];
    const TILE_ROWS: usize = 6;
    const TILE_VECS: usize = 1;

    #[inline(always)]
    unsafe fn tile(self, tile: Tile, rows: usize, vecs: usize) {
        // SAFETY: the witness says that the instructions exist; the rest is the caller's promise.
        unsafe { product_tile(tile, rows, vecs) }
    }

    #[inline(always)]
    fn prefetch<T>(self, at: *const T) {
        // SAFETY: a hint reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: the witness says that AVX2 exists.
        unsafe { V(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        // SAFETY: sixteen floats are readable.
        unsafe { V(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn store(self, x: V, out: &mut [f32; LANES]) {
        // SAFETY: sixteen floats are writable.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x.1);
        }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> V {
        // SAFETY: sixteen bytes are readable.
        unsafe {
            let half = |p: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
            V(half(x.as_ptr()), half(x.as_ptr().add(8)))
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> V {
        // SAFETY: thirty-two bytes are readable.
        unsafe {
            let half = |p: *const bf16| {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            };
            V(half(x.as_ptr()), half(x.as_ptr().add(8)))
        }
    }
    #[inline(always)]
    fn store_bf16(self, x: V, out: &mut [bf16; LANES]) {
        // SAFETY: thirty-two bytes are writable.
        unsafe {
            let packed = _mm256_packus_epi32(to_bf16_words(x.0), to_bf16_words(x.1));
            let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), ordered);
        }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        per_half!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        per_half!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        per_half!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        per_half!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        per_half!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        per_half!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        per_half!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        per_half!(_mm256_sqrt_ps, a)
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        // SAFETY: the witness says that AVX2 exists.
        unsafe { V(_mm256_round_ps::<0x08>(a.0), _mm256_round_ps::<0x08>(a.1)) }
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        // SAFETY: the witness says that AVX2 exists.
        unsafe {
            V(
                _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
                _mm256_blendv_ps(y.1, x.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
            )
        }
    }
    #[inline(always)]
    fn times_power(self, p: V, t: V) -> V {
        // SAFETY: the witness says that AVX2 exists.
        unsafe {
            let half = |p, t| {
                let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power))
            };
            V(half(p.0, t.0), half(p.1, t.1))
        }
    }
    #[inline(always)]
    fn reciprocal_guess(self, x: V) -> V {
        // SAFETY: the witness says that AVX2 exists.
        unsafe {
            let all = _mm256_set1_epi32(RECIPROCAL as i32);
            let half = |x| _mm256_castsi256_ps(_mm256_sub_epi32(all, _mm256_castps_si256(x)));
            V(half(x.0), half(x.1))
        }
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        // SAFETY: the witness says that AVX2 exists.
        unsafe { sum8(_mm256_add_ps(a.0, a.1)) }
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        // SAFETY: the witness says that AVX2 exists.
        unsafe { max8(_mm256_max_ps(a.0, a.1)) }
    }

    plain_bytes!();
}

/// Adds lanes i + (i+4), then + 2, then + 1.
///
/// # Safety
/// AVX must exist.
#[inline(always)]
pub unsafe fn sum8(x: __m256) -> f32 {
    // SAFETY: by the caller's promise.
    unsafe {
        let quad = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}

/// The largest of eight lanes.
///
/// # Safety
/// AVX must exist.
#[inline(always)]
pub unsafe fn max8(x: __m256) -> f32 {
    // SAFETY: by the caller's promise.
    unsafe {
        let quad = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let pair = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
        _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}
