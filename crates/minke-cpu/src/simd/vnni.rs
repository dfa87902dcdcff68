//! Products of bytes on AVX-512: four of them to a lane in one instruction (`vpdpbusd`).

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::LANES;
use crate::stored::tile::{BytesTile, CHAINS, SIDE};

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

/// A tile; see [`crate::stored::tile`].
///
/// # Safety
/// AVX-512 with VNNI must exist, and as for [`crate::simd::Simd::bytes_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub unsafe fn tile(t: BytesTile) {
    // SAFETY: by the caller's promise.
    unsafe {
        match (t.block, t.min.is_null()) {
            (32, true) => run::<8, false>(t),
            (32, false) => run::<8, true>(t),
            (_, true) => run::<4, false>(t),
            (_, false) => run::<4, true>(t),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn run<const STEPS: usize, const MIN: bool>(t: BytesTile) {
    let zero = _mm512_setzero_ps();
    let mut levels = [const { MaybeUninit::<[__m512; SIDE]>::uninit() }; 5];
    let (mut q, mut scale, mut min) = (t.q, t.scale, t.min);
    let (mut x, mut x_scale, mut x_sum) = (t.x, t.x_scale, t.x_sum);
    // SAFETY (all): by the caller's promise.
    unsafe {
        for (count, chain) in CHAINS.into_iter().enumerate() {
            let mut sums = [zero; SIDE];
            for _ in (chain..t.blocks).step_by(BLOCKS) {
                let words: [_; STEPS] =
                    std::array::from_fn(|step| _mm512_loadu_si512(x.add(step * 4 * LANES).cast()));
                let (block_sum, block_scale) = (_mm512_loadu_ps(x_sum), _mm512_loadu_ps(x_scale));
                let offset = _mm512_mul_ps(_mm512_set1_ps(-f32::from(t.offset)), block_sum);
                let start = _mm512_cvtps_epi32(offset);
                // a few stored rows at a time, since each step of a dot waits for the one before it; written out, so that
                // sums stay in registers
                macro_rules! of_rows {
                    ($([$($r:literal)*])*) => {$({
                        let mut dots = [$($r),*].map(|_| start);
                        for (step, &words) in words.iter().enumerate() {
                            for (dots, r) in dots.iter_mut().zip([$($r),*]) {
                                let q = q.add(4 * (r * STEPS + step));
                                let q = _mm512_set1_epi32(q.cast::<i32>().read_unaligned());
                                *dots = _mm512_dpbusd_epi32(*dots, q, words);
                            }
                        }
                        for (dots, r) in dots.into_iter().zip([$($r),*]) {
                            let scale = _mm512_set1_ps(*scale.add(r));
                            let mut part = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale);
                            if MIN {
                                part = _mm512_fmadd_ps(_mm512_set1_ps(*min.add(r)), block_sum, part);
                            }
                            sums[r] = _mm512_fmadd_ps(part, block_scale, sums[r]);
                        }
                    })*};
                }
                of_rows!([0 1 2 3] [4 5 6 7] [8 9 10 11] [12 13 14 15]);
                (q, scale, min) = (q.add(4 * STEPS * SIDE), scale.add(SIDE), min.wrapping_add(SIDE));
                (x, x_scale, x_sum) = (x.add(4 * STEPS * SIDE), x_scale.add(SIDE), x_sum.add(SIDE));
            }
            let mut level = 0;
            while count >> level & 1 == 1 {
                for (sum, before) in sums.iter_mut().zip(levels[level].assume_init_ref()) {
                    *sum = _mm512_add_ps(*before, *sum);
                }
                level += 1;
            }
            levels[level].write(sums);
        }
        for (r, sum) in levels[4].assume_init_ref().iter().enumerate() {
            _mm512_storeu_ps(t.out.add(r * SIDE), *sum);
        }
    }
}
