//! One 512-bit register as sixteen lanes, and the bf16 dot product of machines that have it.

use std::arch::x86_64::*;

use minke_num::bf16;

use super::avx2::{max8, sum8};
use super::{Kernel, LANES, Simd};

/// The witness: made by [`run`] alone.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Runs a kernel with AVX-512.
///
/// # Safety
/// The machine must have `avx512f`, `avx512bw`, `avx512dq`, `avx512vl` and `fma`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512(()))
}

impl Simd for Avx512 {
    type V = __m512;
    const TILE_ROWS: usize = 14;
    const TILE_VECS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY (here and below): the witness says that AVX-512 exists; references are readable or writable.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m512, out: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> __m512 {
        assert!(x.len() <= LANES);
        let mask = ((1u32 << x.len()) - 1) as __mmask16;
        // masked-out lanes are not read
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, x.as_ptr()) }
    }
    #[inline(always)]
    fn store_part(self, x: __m512, out: &mut [f32]) {
        assert!(out.len() <= LANES);
        let mask = ((1u32 << out.len()) - 1) as __mmask16;
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, x) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> __m512 {
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }
    #[inline(always)]
    fn store_bf16(self, x: __m512, out: &mut [bf16; LANES]) {
        unsafe {
            let words = _mm512_srli_epi32::<16>(rounded_bits(x));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(words));
        }
    }
    #[inline(always)]
    fn round_bf16(self, x: __m512) -> __m512 {
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(x), upper))
        }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<0x08>(a) }
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    fn exp2_whole(self, n: __m512) -> __m512 {
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe { sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))) }
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        unsafe { max8(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))) }
    }
}

/// The bits of `x` rounded to bf16 in the upper half of each word; the lower half is garbage.
#[inline(always)]
unsafe fn rounded_bits(x: __m512) -> __m512i {
    // SAFETY: the witness of the caller says that AVX-512 exists.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

/// One tile of a bf16 product: `c[i][j] = sum over pairs p of a[i][p] . b[p][j]`, `ROWS` rows by 32 columns, by
/// `vdpbf16ps` (products of pairs added into an f32 accumulator, pairs in ascending order).
///
/// `a` holds rows of bf16 pairs: pair `p` of row `i` at `a + i * a_row + p * a_pair`; `b` is a packed panel of 32
/// pairs per step; `c` has rows of 32 floats, which are the starting values.
///
/// # Safety
/// The machine must have `avx512bf16`; all addressed memory must be readable, `c` writable.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn dot_tile<const ROWS: usize>(
    pairs: usize,
    a: *const u32,
    a_row: usize,
    a_pair: usize,
    b: *const u32,
    c: *mut f32,
    c_row: usize,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
        for (i, row) in acc.iter_mut().enumerate() {
            for (v, x) in row.iter_mut().enumerate() {
                *x = _mm512_loadu_ps(c.add(i * c_row + v * 16));
            }
        }
        for p in 0..pairs {
            let b = [0, 16].map(|o| as_bf16(_mm512_loadu_si512(b.add(p * 32 + o).cast())));
            for (i, row) in acc.iter_mut().enumerate() {
                let pair = as_bf16(_mm512_set1_epi32(a.add(i * a_row + p * a_pair).read_unaligned() as i32));
                row[0] = _mm512_dpbf16_ps(row[0], pair, b[0]);
                row[1] = _mm512_dpbf16_ps(row[1], pair, b[1]);
            }
        }
        for (i, row) in acc.iter().enumerate() {
            for (v, &x) in row.iter().enumerate() {
                _mm512_storeu_ps(c.add(i * c_row + v * 16), x);
            }
        }
    }
}

#[inline(always)]
unsafe fn as_bf16(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute(x) }
}
