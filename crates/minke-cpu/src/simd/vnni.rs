//! Products of bytes on AVX-512: four of them to a lane in one instruction (`vpdpbusd`).

use std::arch::x86_64::*;

use super::LANES;
use crate::stored::panels::{Panel, PanelTile, Scales, Width};
use crate::stored::tile::{Ahead, BytesTile, CHAINS, SIDE, Tree};

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
                let part = t.next_bytes / (SIDE / TOGETHER);
                let mut ahead = Ahead::new(t.next.wrapping_add(first * t.next_bytes / SIDE), part, t.blocks);
                for chain in CHAINS {
                    let mut sums = [$zero(); TOGETHER];
                    for _ in (chain..t.blocks).step_by(BLOCKS) {
                        let (block_sum, block_scale) = ($load(x_sum), $load(x_scale));
                        let mut dots = [$whole($mul(offset, block_sum)); TOGETHER];
                        ahead.block(|at| _mm_prefetch::<_MM_HINT_T1>(at.cast()));
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

/// Rows from which on a panel asks for memory. With fewer, blocks of what comes next are in work before this one is done, and the
/// hardware reads ahead of them; lines that are asked for would take the places of those that it reads.
const ASKING: usize = 4;

/// A tile of `M` rows with a panel; see [`crate::stored::panels`].
///
/// # Safety
/// AVX-512 with VNNI must exist, and as for [`crate::simd::Simd::panel_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub unsafe fn panel_tile<F: Panel, const M: usize>(t: PanelTile) {
    let mut tree = Tree::<[__m512; M]>::new();
    // SAFETY (all): by the caller's promise.
    unsafe {
        let (mut scales, mut x) = (t.first, t.x);
        let mut ahead = Ahead::new(t.next, t.next_bytes, t.blocks);
        for chain in CHAINS {
            let mut sums = [_mm512_setzero_ps(); M];
            for block in (chain..t.blocks).step_by(BLOCKS) {
                if M >= ASKING {
                    ahead.block(|at| _mm_prefetch::<_MM_HINT_T1>(at.cast()));
                }
                let codes = scales.add(F::SCALE_BYTES);
                let mut dots = [_mm512_setzero_si512(); M];
                if F::OFFSET != 0 {
                    for (j, dots) in dots.iter_mut().enumerate() {
                        *dots = _mm512_set1_epi32(*x.owed.add(j));
                    }
                }
                macro_rules! steps {
                    ($($step:literal)*) => {
                        $(if $step < F::STEPS {
                            let q = words::<F, $step>(codes);
                            for (j, dots) in dots.iter_mut().enumerate() {
                                let x = x.codes.add(4 * ($step * M + j)).cast::<i32>().read_unaligned();
                                *dots = _mm512_dpbusd_epi32(*dots, q, _mm512_set1_epi32(x));
                            }
                        })*
                    };
                }
                steps!(0 1 2 3 4 5 6 7);
                let [scale, min] =
                    panel_scales::<F>(scales, t.factors.add(block / F::PER_STORED * F::FACTORS));
                for (j, (sum, dots)) in sums.iter_mut().zip(dots).enumerate() {
                    let mut part = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale);
                    if F::MIN {
                        part = _mm512_fmadd_ps(min, _mm512_set1_ps(*x.sums.add(j)), part);
                    }
                    *sum = _mm512_fmadd_ps(part, _mm512_set1_ps(*x.scales.add(j)), *sum);
                }
                (scales, x) = (scales.add(F::BLOCK_BYTES), x.after(4 * F::STEPS * M, M));
            }
            tree.add(sums, |before, sums| {
                for (sum, before) in sums.iter_mut().zip(before) {
                    *sum = _mm512_add_ps(*before, *sum);
                }
            });
        }
        for (j, sum) in tree.whole().iter().enumerate() {
            _mm512_storeu_ps(t.out.add(j * LANES), *sum);
        }
    }
}

/// Four elements of each of sixteen rows: word `STEP` of a block.
///
/// # Safety
/// AVX-512 must exist, the block's elements be readable.
#[inline(always)]
unsafe fn words<F: Panel, const STEP: usize>(codes: *const u8) -> __m512i {
    // SAFETY: by the caller's promise.
    unsafe {
        let vector = |i: usize| _mm512_loadu_si512(codes.add(64 * i).cast());
        if matches!(F::WIDTH, Width::Eight) {
            return vector(STEP);
        }
        let (pair, low) = (vector(STEP / 2), _mm512_set1_epi8(0x0f));
        let mut words =
            _mm512_and_si512(if STEP.is_multiple_of(2) { pair } else { _mm512_srli_epi16::<4>(pair) }, low);
        if matches!(F::WIDTH, Width::FourAndMore) {
            let (more, from) = (vector(F::STEPS / 2), F::MORE * STEP);
            let more = match from {
                0..4 => _mm512_sll_epi16(more, _mm_cvtsi32_si128(4 - from as i32)),
                4 => more,
                _ => _mm512_srl_epi16(more, _mm_cvtsi32_si128(from as i32 - 4)),
            };
            let mask = _mm512_set1_epi8((((1 << F::MORE) - 1) << 4) as i8);
            words = _mm512_or_si512(words, _mm512_and_si512(more, mask));
        }
        words
    }
}

/// A scale and a minimum of a block for each of sixteen rows.
///
/// # Safety
/// AVX-512 must exist, the block's scales and the numbers of what is stored as one be readable.
#[inline(always)]
unsafe fn panel_scales<F: Panel>(scales: *const u8, factors: *const u8) -> [__m512; 2] {
    // SAFETY: by the caller's promise.
    unsafe {
        let halves = |at: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
        let bytes = |at: *const u8| _mm_loadu_si128(at.cast());
        let zero = _mm512_setzero_ps();
        match F::SCALES {
            Scales::Half => [halves(scales), zero],
            Scales::HalfAndMin => [halves(scales), halves(scales.add(2 * LANES))],
            Scales::SixBits => {
                let number = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(scales.add(at))));
                let min = _mm512_mul_ps(halves(factors.add(2 * LANES)), number(LANES));
                [_mm512_mul_ps(halves(factors), number(0)), _mm512_sub_ps(_mm512_set1_ps(-0.0), min)]
            }
            Scales::Signed => {
                let number = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(scales)));
                [_mm512_mul_ps(halves(factors), number), zero]
            }
        }
    }
}
