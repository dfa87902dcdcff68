//! Products of bytes on AVX-512: four of them to a lane in one instruction (`vpdpbusd`).

use std::arch::x86_64::*;

use super::LANES;
use crate::stored::tile::{BytesTile, CHAINS, COLUMNS};

/// Rows of the largest tile.
pub const ROWS: usize = 6;

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

/// A tile of up to [`ROWS`] rows; see [`crate::stored::tile`].
///
/// # Safety
/// AVX-512 with VNNI must exist, and as for [`crate::simd::Simd::bytes_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub unsafe fn tile(t: BytesTile, rows: usize) {
    macro_rules! of_rows {
        ($($n:literal)*) => {
            match (rows, t.block, t.min.is_null()) {
                // SAFETY: by the caller's promise.
                $(($n, 32, true) => unsafe { run::<$n, 8, false>(t) },
                ($n, 32, false) => unsafe { run::<$n, 8, true>(t) },
                ($n, _, true) => unsafe { run::<$n, 4, false>(t) },
                ($n, _, false) => unsafe { run::<$n, 4, true>(t) },)*
                _ => unreachable!("a tile of bytes has 1 to {ROWS} rows"),
            }
        };
    }
    of_rows!(1 2 3 4 5 6);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn run<const M: usize, const STEPS: usize, const MIN: bool>(t: BytesTile) {
    const VECS: usize = COLUMNS / LANES;
    let zero = _mm512_setzero_ps();
    let mut levels = [[[zero; VECS]; M]; 5];
    let (mut q, mut scale, mut min) = (t.q, t.scale, t.min);
    let (mut x, mut x_scale, mut x_sum) = (t.x, t.x_scale, t.x_sum);
    // scales from one half of the columns to the other
    let half = t.blocks * LANES;
    // SAFETY (all): by the caller's promise.
    unsafe {
        for (count, chain) in CHAINS.into_iter().enumerate() {
            let mut sums = [[zero; VECS]; M];
            for _ in (chain..t.blocks).step_by(BLOCKS) {
                let mut dots = [[_mm512_setzero_si512(); VECS]; M];
                if t.offset != 0 {
                    for (m, dots) in dots.iter_mut().enumerate() {
                        let start = -(f32::from(t.offset) * *x_sum.add(m));
                        *dots = [_mm512_set1_epi32(start as i32); VECS];
                    }
                }
                for step in 0..STEPS {
                    let q = [0, 1]
                        .map(|v| _mm512_loadu_si512(q.add(v * half * 4 * STEPS + step * LANES * 4).cast()));
                    for (m, dots) in dots.iter_mut().enumerate() {
                        let x = x.add((m * STEPS + step) * 4).cast::<i32>().read_unaligned();
                        let x = _mm512_set1_epi32(x);
                        for (dots, q) in dots.iter_mut().zip(q) {
                            *dots = _mm512_dpbusd_epi32(*dots, q, x);
                        }
                    }
                }
                for v in 0..VECS {
                    let scale = _mm512_loadu_ps(scale.add(v * half));
                    for m in 0..M {
                        let mut part = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[m][v]), scale);
                        if MIN {
                            let min = _mm512_loadu_ps(min.add(v * half));
                            part = _mm512_fmadd_ps(min, _mm512_set1_ps(*x_sum.add(m)), part);
                        }
                        sums[m][v] = _mm512_fmadd_ps(part, _mm512_set1_ps(*x_scale.add(m)), sums[m][v]);
                    }
                }
                q = q.add(4 * STEPS * LANES);
                scale = scale.add(LANES);
                (x, x_scale, x_sum) = (x.add(ROWS * 4 * STEPS), x_scale.add(ROWS), x_sum.add(ROWS));
                if MIN {
                    min = min.add(LANES);
                }
            }
            let mut level = 0;
            while count >> level & 1 == 1 {
                for (sums, before) in sums.iter_mut().zip(&levels[level]) {
                    for (sum, before) in sums.iter_mut().zip(before) {
                        *sum = _mm512_add_ps(*before, *sum);
                    }
                }
                level += 1;
            }
            levels[level] = sums;
        }
        for (m, sums) in levels[4].iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(t.out.add(m * COLUMNS + v * LANES), *sum);
            }
        }
    }
}
