//! One 512-bit register as sixteen lanes, and the bf16 products of machines that have them.

use std::arch::x86_64::*;

use minke_num::bf16;

use super::avx2::{V, max8, sum8};
use super::{Kernel, LANES, RECIPROCAL, Simd, amx, bytes256, vnni};
use crate::gemm::tile::{DotTile, PANEL, RowsTile, Tile};
use crate::stored::panels::{Panel, PanelTile};
use crate::stored::tile::BytesTile;

/// The witness, and the products that it answers for: made by [`run`], [`run_dot`] and [`run_grid`] alone.
#[derive(Clone, Copy)]
pub struct Avx512<const PRODUCTS: u8>(());

/// f32 products.
const PLAIN: u8 = 0;
/// Those, and products of bytes (`vpdpbusd`).
const VNNI: u8 = 1;
/// Those, and products of bf16 pairs (`vdpbf16ps`).
const DOT: u8 = 2;
/// Those, and tile registers (AMX).
const GRID: u8 = 3;

/// Runs a kernel with AVX-512.
///
/// # Safety
/// The machine must have `avx512f`, `avx512bw`, `avx512dq`, `avx512vl`, `fma` and, for panels, `f16c`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512::<PLAIN>(()))
}

/// Runs a kernel with AVX-512 and its products of bytes.
///
/// # Safety
/// As for [`run`], and the machine must have `avx512vnni`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub unsafe fn run_vnni<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512::<VNNI>(()))
}

/// Runs a kernel with AVX-512 and its bf16 dot product.
///
/// # Safety
/// As for [`run`], and the machine must have `avx512bf16` and `avx512vnni`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")]
pub unsafe fn run_dot<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512::<DOT>(()))
}

/// Runs a kernel with AVX-512, its bf16 dot product and tile registers.
///
/// # Safety
/// As for [`run_dot`], and [`amx::allowed`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")]
pub unsafe fn run_grid<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512::<GRID>(()))
}

/// Copies around the caches, in whole lines.
///
/// # Safety
/// The machine must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn put_away(from: &[u8], to: &mut [u8]) {
    const LINE: usize = 64;
    assert_eq!(from.len(), to.len(), "put_away: as much as there is room for");
    let start = to.as_ptr().align_offset(LINE).min(to.len());
    to[..start].copy_from_slice(&from[..start]);
    let (from, to) = (&from[start..], &mut to[start..]);
    let (whole, rest) = from.as_chunks::<LINE>();
    let (to_whole, to_rest) = to.as_chunks_mut::<LINE>();
    for (from, to) in whole.iter().zip(to_whole) {
        // SAFETY: both have a line, and the output begins on one.
        unsafe { _mm512_stream_si512(to.as_mut_ptr().cast(), _mm512_loadu_si512(from.as_ptr().cast())) };
    }
    to_rest.copy_from_slice(rest);
    // such stores are ordered with no others: what follows must not overtake them
    _mm_sfence();
}

/// The register tile of this level.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn product_tile(tile: Tile, rows: usize, vecs: usize) {
    // SAFETY: by the promise of the caller of `tile`.
    unsafe { crate::gemm::tile::body(Avx512::<PLAIN>(()), tile, rows, vecs) }
}

impl<const PRODUCTS: u8> Simd for Avx512<PRODUCTS> {
    type V = __m512;
    type B = __m512i;
    const TILE_ROWS: usize = 14;
    const TILE_VECS: usize = 2;
    const DOT: bool = PRODUCTS >= DOT;
    const GRID: bool = PRODUCTS >= GRID;

    #[inline(always)]
    unsafe fn tile(self, tile: Tile, rows: usize, vecs: usize) {
        // SAFETY: the witness says that the instructions exist; the rest is the caller's promise.
        unsafe { product_tile(tile, rows, vecs) }
    }

    #[inline(always)]
    unsafe fn dot_tile(self, tile: DotTile, rows: usize, vecs: usize) {
        macro_rules! of_rows {
            ($vecs:literal: $($n:literal)*) => {
                match rows {
                    // SAFETY: the witness says that the instruction exists; the rest is the caller's promise.
                    $($n => unsafe { dot_rows::<$n, $vecs>(tile, tile.b) },)*
                    _ => unreachable!("a tile has 1 to 14 rows"),
                }
            };
        }
        if vecs == 2 {
            of_rows!(2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        } else {
            of_rows!(1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        }
    }

    const DOT_OF_TWO: usize = if PRODUCTS == DOT { 3 } else { 0 };

    #[inline(always)]
    unsafe fn dot_tile_of_two(self, tile: DotTile, next: *const u32, rows: usize, vecs: usize) {
        // SAFETY: as for `dot_tile`.
        unsafe {
            match (rows, vecs) {
                (1, 3) => dot_rows::<1, 3>(tile, next),
                (1, 4) => dot_rows::<1, 4>(tile, next),
                (2, 3) => dot_rows::<2, 3>(tile, next),
                (2, 4) => dot_rows::<2, 4>(tile, next),
                (3, 3) => dot_rows::<3, 3>(tile, next),
                (3, 4) => dot_rows::<3, 4>(tile, next),
                _ => unreachable!("1 to 3 rows of 3 or 4 vectors"),
            }
        }
    }

    #[inline(always)]
    fn add_pairs(self, sums: __m512, a: __m512, b: __m512) -> __m512 {
        if PRODUCTS < DOT {
            unreachable!("a bf16 dot product on a level without one");
        }
        // SAFETY: the witness says that the instruction exists.
        unsafe { _mm512_dpbf16_ps(sums, as_bf16(_mm512_castps_si512(a)), as_bf16(_mm512_castps_si512(b))) }
    }

    #[inline(always)]
    unsafe fn grid_tile(self, tile: DotTile, rows: usize, vecs: usize) {
        // SAFETY: the witness says that the instructions exist and are allowed; the rest is the caller's promise.
        unsafe { amx::tile(tile, rows, vecs) }
    }

    #[inline(always)]
    unsafe fn grid_tile_of_two(self, tile: DotTile, next: *const u32, rows: usize, vecs: usize) {
        // SAFETY: as above.
        unsafe { amx::tile_of_two(tile, next, rows, vecs) }
    }

    #[inline(always)]
    unsafe fn grid_rows(self, tile: RowsTile) {
        // SAFETY: as above.
        unsafe { amx::rows_tile(tile) }
    }

    #[inline(always)]
    fn pairs_along(self, first: __m512, second: __m512) -> __m512 {
        if PRODUCTS < DOT {
            unreachable!("bf16 pairs on a level without their product");
        }
        // SAFETY (here and below): the witness says that the instruction exists.
        unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first)) }
    }
    #[inline(always)]
    fn pairs_along_bf16(self, x: &[bf16; 2 * LANES]) -> __m512 {
        unsafe { _mm512_loadu_ps(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn pairs_across(self, low: __m512, high: __m512) -> __m512 {
        if PRODUCTS < DOT {
            unreachable!("bf16 pairs on a level without their product");
        }
        unsafe {
            // low in the lower half, high in the upper one, then each beside the other
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            let order = _mm512_loadu_si512(ACROSS.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
        }
    }
    #[inline(always)]
    fn pairs_across_bf16(self, low: &[bf16; LANES], high: &[bf16; LANES]) -> __m512 {
        unsafe {
            interleaved(_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast()))
        }
    }
    #[inline(always)]
    fn pairs_across_panel(self, low: &[bf16; 2 * LANES], high: &[bf16; 2 * LANES]) -> [__m512; 2] {
        unsafe {
            // words are interleaved within quarters: first to each quarter what belongs there
            let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
            let low = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(low.as_ptr().cast()));
            let high = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(high.as_ptr().cast()));
            [
                _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high)),
                _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn turned_bf16(self, rows: &[*const bf16; 2 * LANES], at: usize) -> [__m512; 8] {
        // SAFETY: by the caller's promise; the witness says that the instructions exist.
        unsafe {
            // quarter q of `pairs[h][j]` is pair 4 q + j of columns 4 h to 4 h + 3
            let mut pairs = [[_mm512_setzero_si512(); 4]; 2];
            for j in 0..4 {
                macro_rules! quarters {
                    ($row:expr) => {{
                        let x = _mm512_castsi128_si512(_mm_loadu_si128(rows[2 * j + $row].add(at).cast()));
                        let x = _mm512_inserti32x4::<1>(
                            x,
                            _mm_loadu_si128(rows[2 * (4 + j) + $row].add(at).cast()),
                        );
                        let x = _mm512_inserti32x4::<2>(
                            x,
                            _mm_loadu_si128(rows[2 * (8 + j) + $row].add(at).cast()),
                        );
                        _mm512_inserti32x4::<3>(x, _mm_loadu_si128(rows[2 * (12 + j) + $row].add(at).cast()))
                    }};
                }
                let (low, high) = (quarters!(0), quarters!(1));
                pairs[0][j] = _mm512_unpacklo_epi16(low, high);
                pairs[1][j] = _mm512_unpackhi_epi16(low, high);
            }
            let mut turned = [_mm512_setzero_ps(); 8];
            for (half, [a, b, c, d]) in pairs.into_iter().enumerate() {
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                turned[4 * half] = _mm512_castsi512_ps(_mm512_unpacklo_epi64(ab, cd));
                turned[4 * half + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi64(ab, cd));
                let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                turned[4 * half + 2] = _mm512_castsi512_ps(_mm512_unpacklo_epi64(ab, cd));
                turned[4 * half + 3] = _mm512_castsi512_ps(_mm512_unpackhi_epi64(ab, cd));
            }
            turned
        }
    }
    #[inline(always)]
    fn block_dots(self, q: [__m512i; 8], x: &[i8], offset: u8, sums: __m512) -> __m512 {
        // SAFETY: the witness says that the instructions exist.
        unsafe {
            if PRODUCTS >= VNNI {
                let dots = vnni::block_dots(q, x);
                let offset = -f32::from(offset);
                return if offset == 0.0 {
                    dots
                } else {
                    _mm512_fmadd_ps(_mm512_set1_ps(offset), sums, dots)
                };
            }
            let mut halves = [[_mm256_setzero_si256(); 2]; 8];
            for (x, halves) in q.iter().zip(&mut halves) {
                *halves = [_mm512_castsi512_si256(*x), _mm512_extracti64x4_epi64::<1>(*x)];
            }
            let sums = V(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
            let V(low, high) = bytes256::block_dots::<false>(halves, x, offset, sums);
            _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
        }
    }
    #[inline(always)]
    fn bytes_of(self, x: u8) -> __m512i {
        // SAFETY (here and below): the witness says that AVX-512 exists; references are readable or writable.
        unsafe { _mm512_set1_epi8(x.cast_signed()) }
    }
    #[inline(always)]
    fn load_halves(self, low: &[u8; 32], high: &[u8; 32]) -> __m512i {
        unsafe {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(low.as_ptr().cast()));
            _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(high.as_ptr().cast()))
        }
    }
    #[inline(always)]
    fn load_quarters(self, low: &[u8; 16], high: &[u8; 16]) -> __m512i {
        unsafe {
            let low = _mm512_broadcast_i32x4(_mm_loadu_si128(low.as_ptr().cast()));
            _mm512_mask_broadcast_i32x4(low, 0xff00, _mm_loadu_si128(high.as_ptr().cast()))
        }
    }
    #[inline(always)]
    fn store_bytes(self, x: __m512i, out: &mut [u8; 64]) {
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), x) }
    }
    #[inline(always)]
    fn store_half<const HIGH: bool>(self, x: __m512i, out: &mut [u8; 32]) {
        unsafe {
            let half = if HIGH { _mm512_extracti64x4_epi64::<1>(x) } else { _mm512_castsi512_si256(x) };
            _mm256_storeu_si256(out.as_mut_ptr().cast(), half);
        }
    }
    #[inline(always)]
    fn sub_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_sub_epi8(a, b) }
    }
    #[inline(always)]
    fn and_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn or_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn xor_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    fn shift_quarters(self, x: __m512i, by: [u32; 4]) -> __m512i {
        unsafe {
            let [a, b, c, d] = by.map(i64::from);
            _mm512_srlv_epi64(x, _mm512_setr_epi64(a, a, b, b, c, c, d, d))
        }
    }
    #[inline(always)]
    fn shift_left(self, x: __m512i, by: u32) -> __m512i {
        unsafe { _mm512_sllv_epi64(x, _mm512_set1_epi64(i64::from(by))) }
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> __m512i {
        unsafe { _mm512_maskz_set1_epi8(bits, x.cast_signed()) }
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], x: __m512i) -> __m512i {
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), x) }
    }
    #[inline(always)]
    fn load_u8(self, x: [u64; 2]) -> __m512 {
        unsafe {
            let bytes = _mm_set_epi64x(x[1].cast_signed(), x[0].cast_signed());
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        }
    }
    #[inline(always)]
    fn halves(self, low: f32, high: f32) -> __m512 {
        unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(low), 0xff00, _mm512_set1_ps(high)) }
    }

    const FEW_ROWS: usize = match PRODUCTS {
        PLAIN => 12,
        VNNI | DOT => 7,
        _ => 8,
    };

    #[inline(always)]
    fn signed_bytes(offset: u8) -> bool {
        match PRODUCTS {
            PLAIN => offset == 128,
            VNNI | DOT => false,
            _ => true,
        }
    }

    const BYTES_TILE_ASKS: bool = matches!(PRODUCTS, VNNI | DOT);

    #[inline(always)]
    unsafe fn bytes_tile(self, tile: BytesTile) {
        // SAFETY: by the caller's promise; the witness says that the instructions exist.
        unsafe {
            match PRODUCTS {
                PLAIN => bytes256::tile(tile),
                VNNI | DOT => vnni::tile(tile),
                _ => amx::bytes_tile(tile),
            }
        }
    }

    const PANELS: bool = matches!(PRODUCTS, PLAIN | VNNI | DOT);

    #[inline(always)]
    unsafe fn panel_tile<F: Panel, const M: usize>(self, tile: PanelTile) {
        // SAFETY: by the caller's promise; the witness says that the instructions exist.
        unsafe {
            match PRODUCTS {
                PLAIN => bytes256::panel_tile::<F, M>(tile),
                _ => vnni::panel_tile::<F, M>(tile),
            }
        }
    }

    #[inline(always)]
    fn store_i8(self, x: __m512, out: &mut [i8; LANES]) -> i32 {
        unsafe {
            let whole = _mm512_cvtps_epi32(x);
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(whole));
            _mm512_reduce_add_epi32(whole)
        }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn splat_f16(self, x: [u8; 2]) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(x))) }
    }
    #[inline(always)]
    fn halves_f16(self, low: [u8; 2], high: [u8; 2]) -> __m512 {
        unsafe {
            let [low, high] = [low, high].map(|x| _mm_set1_epi16(i16::from_le_bytes(x)));
            _mm512_cvtph_ps(_mm256_set_m128i(high, low))
        }
    }
    #[inline(always)]
    fn load_f16(self, x: [u64; 4]) -> __m512 {
        unsafe {
            let [a, b, c, d] = x.map(u64::cast_signed);
            _mm512_cvtph_ps(_mm256_setr_epi64x(a, b, c, d))
        }
    }

    #[inline(always)]
    fn store_e4m3(self, x: __m512, out: &mut [u8; LANES]) {
        unsafe {
            let (places, exponent) = e4m3_places(x);
            // places are counted from the middle of the magic number, and those of an exponent go on where its codes begin
            let rounded = _mm512_castps_si512(_mm512_add_ps(x, _mm512_castsi512_ps(places)));
            let size = _mm512_abs_epi32(_mm512_sub_epi32(rounded, places));
            let size = _mm512_add_epi32(size, _mm512_srli_epi32::<20>(exponent));
            let sign = _mm512_srli_epi32::<24>(_mm512_castps_si512(x));
            // size | sign & 0x80
            let code = _mm512_ternarylogic_epi32::<0xf8>(size, sign, _mm512_set1_epi32(0x80));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(code));
        }
    }
    #[inline(always)]
    fn load_e4m3(self, codes: &[u8; LANES]) -> __m512 {
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let size = _mm512_slli_epi32::<20>(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)));
            let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)));
            let size = _mm512_mul_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(f32::from_bits(0x7b80_0000)));
            _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(size), sign))
        }
    }
    #[inline(always)]
    fn load_e4m3_panel(self, codes: &[u8; 2 * LANES]) -> [__m512; 2] {
        unsafe {
            let halves = e4m3_halves(codes);
            let low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
            let high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(halves));
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(low)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)),
            ]
        }
    }
    #[inline(always)]
    fn round_e4m3(self, x: __m512) -> __m512 {
        unsafe {
            // a zero loses its sign, which no sum sees
            let places = _mm512_castsi512_ps(e4m3_places(x).0);
            _mm512_sub_ps(_mm512_add_ps(x, places), places)
        }
    }
    #[inline(always)]
    fn pairs_across_exact(self, low: __m512, high: __m512) -> __m512 {
        unsafe {
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low));
            _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(high)))
        }
    }
    #[inline(always)]
    fn pairs_along_e4m3(self, codes: &[u8; 2 * LANES]) -> __m512 {
        unsafe { _mm512_castsi512_ps(e4m3_halves(codes)) }
    }
    #[inline(always)]
    fn max_size(self, most: __m512, x: __m512) -> __m512 {
        unsafe {
            let size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff));
            _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(most), size))
        }
    }
    #[inline(always)]
    fn max_size_lane(self, most: __m512) -> f32 {
        unsafe { f32::from_bits(_mm512_reduce_max_epu32(_mm512_castps_si512(most))) }
    }
    #[inline(always)]
    fn prefetch<T>(self, at: *const T) {
        // SAFETY: a hint reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
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
    fn load_part_bf16(self, x: &[bf16]) -> __m512 {
        assert!(x.len() <= LANES);
        let mask = ((1u32 << x.len()) - 1) as __mmask16;
        unsafe {
            let half = _mm256_maskz_loadu_epi16(mask, x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    fn store_part_bf16(self, x: __m512, out: &mut [bf16]) {
        assert!(out.len() <= LANES);
        let mask = ((1u32 << out.len()) - 1) as __mmask16;
        unsafe {
            let half = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded_bits(x)));
            _mm256_mask_storeu_epi16(out.as_mut_ptr().cast(), mask, half);
        }
    }
    #[inline(always)]
    fn transpose(self, rows: [__m512; LANES]) -> [__m512; LANES] {
        unsafe {
            // pairs of rows, then pairs of pairs, within each quarter of the registers: after that, quarter q of
            // `fours[4 b + r]` is rows 4 b to 4 b + 3 of column 4 q + r (loops, not closures: see `scratch`)
            let mut pairs = rows;
            for i in (0..LANES).step_by(2) {
                pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
                pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
            }
            let mut fours = pairs;
            for i in (0..LANES).step_by(4) {
                for half in 0..2 {
                    let a = _mm512_castps_pd(pairs[i + half]);
                    let b = _mm512_castps_pd(pairs[i + half + 2]);
                    fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            // quarters 0 and 2, then 1 and 3, of two registers
            macro_rules! even {
                ($a:expr, $b:expr) => {
                    _mm512_shuffle_f32x4::<0b10_00_10_00>($a, $b)
                };
            }
            macro_rules! odd {
                ($a:expr, $b:expr) => {
                    _mm512_shuffle_f32x4::<0b11_01_11_01>($a, $b)
                };
            }
            let mut out = fours;
            for r in 0..4 {
                let (low, high) = (even!(fours[r], fours[4 + r]), even!(fours[8 + r], fours[12 + r]));
                (out[r], out[8 + r]) = (even!(low, high), odd!(low, high));
                let (low, high) = (odd!(fours[r], fours[4 + r]), odd!(fours[8 + r], fours[12 + r]));
                (out[4 + r], out[12 + r]) = (even!(low, high), odd!(low, high));
            }
            out
        }
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
    fn times_power(self, p: __m512, t: __m512) -> __m512 {
        unsafe {
            let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power))
        }
    }
    #[inline(always)]
    fn reciprocal_guess(self, x: __m512) -> __m512 {
        unsafe {
            let all = _mm512_set1_epi32(RECIPROCAL as i32);
            _mm512_castsi512_ps(_mm512_sub_epi32(all, _mm512_castps_si512(x)))
        }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe { sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))) }
    }
    #[inline(always)]
    fn sums(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe {
            // lanes i and i + 8 of two vectors, then i and i + 4 of four, a quarter each
            let eights = |a, b| {
                let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
            };
            let (ab, cd) = (eights(a, b), eights(c, d));
            let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
            let x = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
            let x = _mm512_add_ps(x, _mm512_permute_ps::<0b01_00_11_10>(x));
            let x = _mm512_add_ps(x, _mm512_movehdup_ps(x));
            let firsts = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, x));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), firsts);
            sums
        }
    }
    #[inline(always)]
    fn portion<const OF: usize>(self, x: __m512, i: usize) -> __m512 {
        unsafe {
            match (OF, i) {
                (2, 0) => _mm512_zextps256_ps512(_mm512_castps512_ps256(x)),
                (2, 1) => _mm512_zextps256_ps512(_mm512_extractf32x8_ps::<1>(x)),
                (4, 0) => _mm512_zextps128_ps512(_mm512_castps512_ps128(x)),
                (4, 1) => _mm512_zextps128_ps512(_mm512_extractf32x4_ps::<1>(x)),
                (4, 2) => _mm512_zextps128_ps512(_mm512_extractf32x4_ps::<2>(x)),
                (4, 3) => _mm512_zextps128_ps512(_mm512_extractf32x4_ps::<3>(x)),
                _ => unreachable!("a half or a quarter"),
            }
        }
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

/// The number whose last place is that of E4M3 at the size of each lane, 1.5 times the power of two that is 2^20 of x's or
/// of 2^-6: added and taken away again, it rounds. Beside it, how far x's exponent is above that of 2^-6.
#[inline(always)]
unsafe fn e4m3_places(x: __m512) -> (__m512i, __m512i) {
    // SAFETY: the witness of the caller says that AVX-512 exists.
    unsafe {
        let exponent = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f80_0000));
        // exponents fill the upper half of a word with seven bits of its own
        let exponent = _mm512_subs_epu16(exponent, _mm512_set1_epi32(121 << 23));
        (_mm512_add_epi32(exponent, _mm512_set1_epi32((121 + 20) << 23 | 1 << 22)), exponent)
    }
}

/// 32 codes as bf16: exponent and fraction moved to their place and the bias mended; subnormals from a table.
#[inline(always)]
unsafe fn e4m3_halves(codes: &[u8; 2 * LANES]) -> __m512i {
    #[rustfmt::skip]
    const SUBNORMAL: [u16; 32] = {
        // 0 to 7 times 2^-9
        let first = [0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60];
        let mut all = [0; 32];
        let mut i = 0;
        while i < 32 { all[i] = first[i % 8]; i += 1; }
        all
    };
    // SAFETY: the witness of the caller says that AVX-512 exists.
    unsafe {
        let codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.as_ptr().cast()));
        let size = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
        let sign = _mm512_slli_epi16::<8>(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)));
        let normal = _mm512_add_epi16(_mm512_slli_epi16::<4>(size), _mm512_set1_epi16(120 << 7));
        let small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
        let table = _mm512_loadu_si512(SUBNORMAL.as_ptr().cast());
        _mm512_or_si512(_mm512_mask_permutexvar_epi16(normal, small, size, table), sign)
    }
}

/// Words i and i + 16 of a vector's 32 beside each other.
const ACROSS: [u16; 2 * LANES] = {
    let mut order = [0; 2 * LANES];
    let mut i = 0;
    while i < LANES {
        (order[2 * i], order[2 * i + 1]) = (i as u16, (i + LANES) as u16);
        i += 1;
    }
    order
};

/// Words of `low[i]` and `high[i]`.
#[inline(always)]
unsafe fn interleaved(low: __m256i, high: __m256i) -> __m512 {
    // SAFETY: the witness of the caller says that AVX-512 exists.
    unsafe {
        let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
        _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(low), high))
    }
}

/// Vectors of a row of a panel.
const PANEL_VECS: usize = PANEL / LANES;

/// The tile's rows are a constant, so that its sums stay in registers. Vectors behind the second are of the panel at `next`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dot_rows<const ROWS: usize, const VECS: usize>(t: DotTile, next: *const u32) {
    // SAFETY: by the promise of the caller of `dot_tile`.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); VECS]; ROWS];
        if t.accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                for (v, x) in row.iter_mut().enumerate() {
                    *x = _mm512_loadu_ps(t.c.add(i * t.c_row + v * LANES));
                }
            }
        }
        // a copy of the loop for packed columns, whose rows are next to each other: addresses become constants
        if t.a_row == 1 {
            for p in 0..t.pairs {
                dot_step(&mut acc, t.a.add(p * t.a_step), 1, [t.b, next].map(|b| b.wrapping_add(p * PANEL)));
            }
        } else {
            for p in 0..t.pairs {
                dot_step(
                    &mut acc,
                    t.a.add(p * t.a_step),
                    t.a_row,
                    [t.b, next].map(|b| b.wrapping_add(p * PANEL)),
                );
            }
        }
        for (i, row) in acc.iter().enumerate() {
            if t.half.is_null() {
                for (v, &x) in row.iter().enumerate() {
                    _mm512_storeu_ps(t.c.add(i * t.c_row + v * LANES), x);
                }
            } else {
                let out = t.half.add(i * t.half_row);
                for v in (0..VECS).step_by(2) {
                    let out = out.add(v * LANES);
                    if v + 1 < VECS {
                        let both = _mm512_cvtne2ps_pbh(row[v + 1], row[v]);
                        _mm512_storeu_si512(out.cast(), std::mem::transmute::<__m512bh, __m512i>(both));
                    } else {
                        let one = _mm512_cvtneps_pbh(row[v]);
                        _mm256_storeu_si256(out.cast(), std::mem::transmute::<__m256bh, __m256i>(one));
                    }
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn dot_step<const ROWS: usize, const VECS: usize>(
    acc: &mut [[__m512; VECS]; ROWS],
    a: *const u32,
    a_row: usize,
    b: [*const u32; 2],
) {
    // SAFETY: by the promise of the caller of `dot_tile`.
    unsafe {
        let mut right = [_mm512_setzero_si512(); VECS];
        for (v, right) in right.iter_mut().enumerate() {
            *right = _mm512_loadu_si512(b[v / PANEL_VECS].add(v % PANEL_VECS * LANES).cast());
        }
        for (i, row) in acc.iter_mut().enumerate() {
            let pair = as_bf16(_mm512_set1_epi32(a.add(i * a_row).read_unaligned() as i32));
            for (sum, &right) in row.iter_mut().zip(&right) {
                *sum = _mm512_dpbf16_ps(*sum, pair, as_bf16(right));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn as_bf16(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute(x) }
}
