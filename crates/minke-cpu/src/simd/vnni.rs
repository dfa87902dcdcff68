//! Products of bytes on AVX-512: four of them to a lane in one instruction (`vpdpbusd`).

use std::arch::x86_64::*;

use super::LANES;
use crate::stored::chunk::LINE;
use crate::stored::tile::{BytesTile, CHAINS, SIDE, Tree};

/// Blocks that a chain skips.
const BLOCKS: usize = LANES;

/// Adds neighbours within quarters: word j of a quarter of the result is the sum of that quarter of the j-th vector.
///
/// # Safety
/// AVX-512 must exist.
#[inline(always)]
unsafe fn quarter_sums(v: [__m512i; 4]) -> __m512i {
    // SAFETY: by the caller's promise.
    unsafe {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// Sums within sixteen blocks of 16 or 32 elements.
///
/// # Safety
/// AVX-512 with VNNI must exist.
#[inline(always)]
pub unsafe fn block_dots(q: [__m512i; 8], x: &[i8]) -> __m512 {
    assert!(x.len() == 256 || x.len() == 512);
    // SAFETY: in bounds by the assertion; the instructions exist by the caller's promise.
    unsafe {
        let dots = |i: usize| {
            let x = _mm512_loadu_si512(x.as_ptr().add(64 * i).cast());
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), q[i], x)
        };
        let first = quarter_sums([dots(0), dots(1), dots(2), dots(3)]);
        let sums = if x.len() == 256 {
            // quarter q, word j: block 4 j + q
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_permutexvar_epi32(order, first)
        } else {
            let second = quarter_sums([dots(4), dots(5), dots(6), dots(7)]);
            // a block is two quarters
            let sums = _mm512_add_epi32(
                _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second),
            );
            let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
            _mm512_permutexvar_epi32(order, sums)
        };
        _mm512_cvtepi32_ps(sums)
    }
}

/// Stored rows of a tile that are multiplied together: their sums, and the dots of a block, stay in registers.
const TOGETHER: usize = SIDE / 2;

/// A tile; see [`crate::stored::tile`].
///
/// # Safety
/// AVX-512 with VNNI must exist, and as for [`crate::simd::Simd::bytes_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub unsafe fn tile(t: BytesTile) {
    // SAFETY: by the caller's promise.
    unsafe {
        for first in (0..SIDE).step_by(TOGETHER) {
            match (t.rows <= SIDE / 2, t.block, t.min.is_null()) {
                (false, 32, true) => of_sixteen::<8, false>(t, first),
                (false, 32, false) => of_sixteen::<8, true>(t, first),
                (false, _, true) => of_sixteen::<4, false>(t, first),
                (false, _, false) => of_sixteen::<4, true>(t, first),
                (true, 32, true) => of_eight::<8, false>(t, first),
                (true, 32, false) => of_eight::<8, true>(t, first),
                (true, _, true) => of_eight::<4, false>(t, first),
                (true, _, false) => of_eight::<4, true>(t, first),
            }
        }
    }
}

/// Stored rows of a tile from `first` on, by rows of a vector's width.
macro_rules! tile_rows {
    (
        $name:ident, $vector:ty, $zero:ident, $splat:ident, $splat_word:ident, $load:ident, $load_words:ident, $mul:ident, $fma:ident,
        $add:ident, $dot:ident, $whole:ident, $float:ident, $store:ident
    ) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
        unsafe fn $name<const STEPS: usize, const MIN: bool>(t: BytesTile, first: usize) {
            // a loop that is unrolled loads all that it multiplies at once, for which there are too few registers
            let steps = std::hint::black_box(STEPS);
            let mut tree = Tree::<[$vector; TOGETHER]>::new();
            let offset = $splat(-f32::from(t.offset));
            // SAFETY (all): by the caller's promise.
            unsafe {
                let (mut q, mut scale) = (t.q.add(4 * STEPS * first), t.scale.add(first));
                let mut min = t.min.wrapping_add(first);
                let (mut x, mut x_scale, mut x_sum) = (t.x, t.x_scale, t.x_sum);
                // a part of what comes next, as many bytes of it with each block
                let mut next = t.next.wrapping_add(first * t.next_bytes / SIDE);
                let (share, mut due) = ((t.next_bytes / (SIDE / TOGETHER)).div_ceil(t.blocks.max(1)), 0);
                for chain in CHAINS {
                    let mut sums = [$zero(); TOGETHER];
                    for _ in (chain..t.blocks).step_by(BLOCKS) {
                        let (block_sum, block_scale) = ($load(x_sum), $load(x_scale));
                        let mut dots = [$whole($mul(offset, block_sum)); TOGETHER];
                        due += share;
                        while due >= LINE {
                            _mm_prefetch::<_MM_HINT_T1>(next.cast());
                            (next, due) = (next.wrapping_add(LINE), due - LINE);
                        }
                        for step in 0..steps {
                            let words = $load_words(x.add(step * 4 * SIDE).cast());
                            for (r, dots) in dots.iter_mut().enumerate() {
                                let q = q.add(4 * (r * STEPS + step));
                                *dots = $dot(*dots, $splat_word(q.cast::<i32>().read_unaligned()), words);
                            }
                        }
                        for (r, (sum, dots)) in sums.iter_mut().zip(dots).enumerate() {
                            let mut part = $mul($float(dots), $splat(*scale.add(r)));
                            if MIN {
                                part = $fma($splat(*min.add(r)), block_sum, part);
                            }
                            *sum = $fma(part, block_scale, *sum);
                        }
                        (q, scale, min) = (q.add(4 * STEPS * SIDE), scale.add(SIDE), min.wrapping_add(SIDE));
                        (x, x_scale, x_sum) = (x.add(4 * STEPS * SIDE), x_scale.add(SIDE), x_sum.add(SIDE));
                    }
                    tree.add(sums, |before, sums| {
                        for (sum, before) in sums.iter_mut().zip(before) {
                            *sum = $add(*before, *sum);
                        }
                    });
                }
                for (r, sum) in tree.whole().iter().enumerate() {
                    $store(t.out.add((first + r) * SIDE), *sum);
                }
            }
        }
    };
}

tile_rows!(
    of_sixteen,
    __m512,
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_set1_epi32,
    _mm512_loadu_ps,
    _mm512_loadu_si512,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps,
    _mm512_dpbusd_epi32,
    _mm512_cvtps_epi32,
    _mm512_cvtepi32_ps,
    _mm512_storeu_ps
);
tile_rows!(
    of_eight,
    __m256,
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_set1_epi32,
    _mm256_loadu_ps,
    _mm256_loadu_si256,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps,
    _mm256_dpbusd_epi32,
    _mm256_cvtps_epi32,
    _mm256_cvtepi32_ps,
    _mm256_storeu_ps
);
