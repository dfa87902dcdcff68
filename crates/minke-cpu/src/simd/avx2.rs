//! Two 256-bit registers as sixteen lanes.

use std::arch::x86_64::*;

use minke_num::bf16;

use crate::gemm::tile::Tile;

use super::{Kernel, LANES, RECIPROCAL, Simd, bytes256};
use crate::stored::panels::{Panel, PanelTile};
use crate::stored::tile::BytesTile;

/// The witness, and whether it answers for products of bytes (`vpdpbusd`): made by [`run`] and [`run_vnni`] alone.
#[derive(Clone, Copy)]
pub struct Avx2<const VNNI: bool>(());

/// Runs a kernel with AVX2 and FMA.
///
/// # Safety
/// The machine must have `avx2`, `fma` and, for panels, `f16c`.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx2::<false>(()))
}

/// Runs a kernel with AVX2 and its products of bytes.
///
/// # Safety
/// As for [`run`], and the machine must have `avxvnni`.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub unsafe fn run_vnni<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx2::<true>(()))
}

#[derive(Clone, Copy)]
pub struct V(pub __m256, pub __m256);

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

/// Eight rows of eight turned over.
#[inline(always)]
unsafe fn transpose8(rows: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the witness of the caller says that AVX2 exists.
    unsafe {
        // pairs of rows, then fours, within each half of the registers (loops: closures may be compiled without the instructions)
        let mut pairs = rows;
        for i in (0..8).step_by(2) {
            pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        let mut fours = pairs;
        for i in (0..8).step_by(4) {
            for half in 0..2 {
                let (a, b) = (_mm256_castps_pd(pairs[i + half]), _mm256_castps_pd(pairs[i + half + 2]));
                fours[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                fours[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            }
        }
        let mut out = fours;
        for r in 0..4 {
            out[r] = _mm256_permute2f128_ps::<0x20>(fours[r], fours[4 + r]);
            out[4 + r] = _mm256_permute2f128_ps::<0x31>(fours[r], fours[4 + r]);
        }
        out
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
    unsafe { crate::gemm::tile::body(Avx2::<false>(()), tile, rows, vecs) }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type V = V;
    type B = [__m256i; 2];
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
    fn transpose(self, rows: [V; LANES]) -> [V; LANES] {
        let mut out = rows;
        for half in 0..2 {
            // columns 8 half to 8 half + 7 of the upper and of the lower rows
            let (mut upper, mut lower) = ([rows[0].0; 8], [rows[0].0; 8]);
            for i in 0..8 {
                (upper[i], lower[i]) =
                    if half == 0 { (rows[i].0, rows[8 + i].0) } else { (rows[i].1, rows[8 + i].1) };
            }
            // SAFETY: the witness says that AVX2 exists.
            let (upper, lower) = unsafe { (transpose8(upper), transpose8(lower)) };
            for j in 0..8 {
                out[8 * half + j] = V(upper[j], lower[j]);
            }
        }
        out
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

    #[inline(always)]
    fn bytes_of(self, x: u8) -> [__m256i; 2] {
        // SAFETY (here and below): the witness says that AVX2 exists; references are readable or writable.
        unsafe { [_mm256_set1_epi8(x.cast_signed()); 2] }
    }
    #[inline(always)]
    fn load_halves(self, low: &[u8; 32], high: &[u8; 32]) -> [__m256i; 2] {
        unsafe { [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())] }
    }
    #[inline(always)]
    fn load_quarters(self, low: &[u8; 16], high: &[u8; 16]) -> [__m256i; 2] {
        unsafe { [twice(low), twice(high)] }
    }
    #[inline(always)]
    fn store_bytes(self, x: [__m256i; 2], out: &mut [u8; 64]) {
        let (low, high) = out.split_at_mut(32);
        self.store_half::<false>(x, low.try_into().expect("a half"));
        self.store_half::<true>(x, high.try_into().expect("a half"));
    }
    #[inline(always)]
    fn store_half<const HIGH: bool>(self, x: [__m256i; 2], out: &mut [u8; 32]) {
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), x[usize::from(HIGH)]) }
    }
    #[inline(always)]
    fn sub_bytes(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [_mm256_sub_epi8(a[0], b[0]), _mm256_sub_epi8(a[1], b[1])] }
    }
    #[inline(always)]
    fn and_bytes(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn or_bytes(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn xor_bytes(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn shift_quarters(self, x: [__m256i; 2], by: [u32; 4]) -> [__m256i; 2] {
        unsafe {
            let [a, b, c, d] = by.map(i64::from);
            [
                _mm256_srlv_epi64(x[0], _mm256_setr_epi64x(a, a, b, b)),
                _mm256_srlv_epi64(x[1], _mm256_setr_epi64x(c, c, d, d)),
            ]
        }
    }
    #[inline(always)]
    fn shift_left(self, x: [__m256i; 2], by: u32) -> [__m256i; 2] {
        unsafe {
            let by = _mm256_set1_epi64x(i64::from(by));
            [_mm256_sllv_epi64(x[0], by), _mm256_sllv_epi64(x[1], by)]
        }
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> [__m256i; 2] {
        unsafe {
            // byte i sees the eight bits among which its own is
            let order =
                _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let own = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
            let (low, high) = (_mm256_set1_epi32(bits as i32), _mm256_set1_epi32((bits >> 32) as i32));
            let (low, high) = (_mm256_shuffle_epi8(low, order), _mm256_shuffle_epi8(high, order));
            let low = _mm256_cmpeq_epi8(_mm256_and_si256(low, own), own);
            let high = _mm256_cmpeq_epi8(_mm256_and_si256(high, own), own);
            let x = _mm256_set1_epi8(x.cast_signed());
            [_mm256_and_si256(low, x), _mm256_and_si256(high, x)]
        }
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], x: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let table = twice(table);
            [_mm256_shuffle_epi8(table, x[0]), _mm256_shuffle_epi8(table, x[1])]
        }
    }

    #[inline(always)]
    fn load_u8(self, x: [u64; 2]) -> V {
        unsafe {
            let half = |x: u64| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x.cast_signed())));
            V(half(x[0]), half(x[1]))
        }
    }
    #[inline(always)]
    fn halves(self, low: f32, high: f32) -> V {
        unsafe { V(_mm256_set1_ps(low), _mm256_set1_ps(high)) }
    }
    #[inline(always)]
    fn store_i8(self, x: V, out: &mut [i8; LANES]) -> i32 {
        unsafe {
            let (low, high) = (_mm256_cvtps_epi32(x.0), _mm256_cvtps_epi32(x.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
            let sums = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
            let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
            let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b01_00_11_10>(sums));
            _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32::<0b10_11_00_01>(sums)))
        }
    }

    #[inline(always)]
    fn store_e4m3(self, x: V, out: &mut [u8; LANES]) {
        unsafe {
            let (low, high) = (e4m3_code(x.0), e4m3_code(x.1));
            let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            let (low, high) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_packus_epi16(low, high));
        }
    }
    #[inline(always)]
    fn load_e4m3(self, codes: &[u8; LANES]) -> V {
        // SAFETY: sixteen bytes are readable.
        unsafe { V(e4m3_values(codes.as_ptr()), e4m3_values(codes.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn round_e4m3(self, x: V) -> V {
        unsafe {
            let places = (_mm256_castsi256_ps(e4m3_places(x.0).0), _mm256_castsi256_ps(e4m3_places(x.1).0));
            // a zero loses its sign, which no sum sees
            V(
                _mm256_sub_ps(_mm256_add_ps(x.0, places.0), places.0),
                _mm256_sub_ps(_mm256_add_ps(x.1, places.1), places.1),
            )
        }
    }
    #[inline(always)]
    fn max_size(self, most: V, x: V) -> V {
        unsafe {
            let size = _mm256_set1_epi32(0x7fff_ffff);
            let (low, high) = (_mm256_castps_si256(x.0), _mm256_castps_si256(x.1));
            V(
                _mm256_castsi256_ps(_mm256_max_epu32(
                    _mm256_castps_si256(most.0),
                    _mm256_and_si256(low, size),
                )),
                _mm256_castsi256_ps(_mm256_max_epu32(
                    _mm256_castps_si256(most.1),
                    _mm256_and_si256(high, size),
                )),
            )
        }
    }
    #[inline(always)]
    fn max_size_lane(self, most: V) -> f32 {
        unsafe {
            let all = _mm256_max_epu32(_mm256_castps_si256(most.0), _mm256_castps_si256(most.1));
            let all = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
            let all = _mm_max_epu32(all, _mm_shuffle_epi32::<0b01_00_11_10>(all));
            let all = _mm_max_epu32(all, _mm_shuffle_epi32::<0b10_11_00_01>(all));
            f32::from_bits(_mm_cvtsi128_si32(all).cast_unsigned())
        }
    }

    const FEW_ROWS: usize = 7;

    #[inline(always)]
    fn signed_bytes(offset: u8) -> bool {
        !VNNI && offset == 128
    }
    #[inline(always)]
    fn block_dots(self, q: [[__m256i; 2]; 8], x: &[i8], offset: u8, sums: V) -> V {
        // SAFETY: the witness says that the instructions exist.
        unsafe { bytes256::block_dots::<VNNI>(q, x, offset, sums) }
    }
    #[inline(always)]
    unsafe fn bytes_tile(self, tile: BytesTile) {
        // SAFETY: by the caller's promise; the witness says that the instructions exist.
        unsafe { if VNNI { bytes256::tile_vnni(tile) } else { bytes256::tile(tile) } }
    }

    const PANELS: bool = true;

    #[inline(always)]
    unsafe fn panel_tile<F: Panel, const M: usize>(self, tile: PanelTile) {
        // SAFETY: as above.
        unsafe {
            if VNNI {
                bytes256::panel_tile_vnni::<F, M>(tile);
            } else {
                bytes256::panel_tile::<F, M>(tile);
            }
        }
    }
}

/// The number whose last place is that of E4M3 at the size of each lane, 1.5 times the power of two that is 2^20 of x's or
/// of 2^-6: added and taken away again, it rounds. Beside it, how far x's exponent is above that of 2^-6.
#[inline(always)]
unsafe fn e4m3_places(x: __m256) -> (__m256i, __m256i) {
    // SAFETY: the witness of the caller says that AVX2 exists.
    unsafe {
        let exponent = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7f80_0000));
        // exponents fill the upper half of a word with seven bits of its own
        let exponent = _mm256_subs_epu16(exponent, _mm256_set1_epi32(121 << 23));
        (_mm256_add_epi32(exponent, _mm256_set1_epi32((121 + 20) << 23 | 1 << 22)), exponent)
    }
}

/// The values of eight codes.
#[inline(always)]
unsafe fn e4m3_values(codes: *const u8) -> __m256 {
    // SAFETY: by the caller's promise that eight bytes are readable; its witness says that AVX2 exists.
    unsafe {
        let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.cast()));
        let size = _mm256_slli_epi32::<20>(_mm256_and_si256(codes, _mm256_set1_epi32(0x7f)));
        let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)));
        // mends the bias, and makes subnormals normal
        let by = _mm256_set1_ps(f32::from_bits(0x7b80_0000));
        _mm256_or_ps(_mm256_mul_ps(_mm256_castsi256_ps(size), by), _mm256_castsi256_ps(sign))
    }
}

/// Codes of eight values of magnitude up to 448.
#[inline(always)]
unsafe fn e4m3_code(x: __m256) -> __m256i {
    // SAFETY: the witness of the caller says that AVX2 exists.
    unsafe {
        let (places, exponent) = e4m3_places(x);
        // places are counted from the middle of the magic number, and those of an exponent go on where its codes begin
        let rounded = _mm256_castps_si256(_mm256_add_ps(x, _mm256_castsi256_ps(places)));
        let size = _mm256_abs_epi32(_mm256_sub_epi32(rounded, places));
        let size = _mm256_add_epi32(size, _mm256_srli_epi32::<20>(exponent));
        let sign = _mm256_srli_epi32::<24>(_mm256_castps_si256(x));
        let code = _mm256_or_si256(size, _mm256_and_si256(sign, _mm256_set1_epi32(0x80)));
        // what is not finite has some code
        _mm256_and_si256(code, _mm256_set1_epi32(0xff))
    }
}

/// Sixteen bytes in both halves.
#[inline(always)]
unsafe fn twice(x: &[u8; 16]) -> __m256i {
    // SAFETY: by the caller's promise that AVX2 exists.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(x.as_ptr().cast())) }
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
