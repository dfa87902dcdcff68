//! Products of bytes in 256-bit registers: with `vpdpbusd` where the machine has it, else with pairs of products in 16 bits
//! (`vpmaddubsw`).
//!
//! Such a pair holds whole products of unsigned bytes below 64, twice over. Other bytes, whose offset is 128, are taken as
//! signed: their size times the other byte with their sign, which fits for once. Of panels ([`crate::stored::panels`]) as many
//! such pairs are added as fit: eight of bytes below 16, four below 32.

use std::arch::x86_64::*;

use super::LANES;
use super::avx2::V;
use crate::stored::panels::{Panel, PanelTile, Scales, Width};
use crate::stored::tile::{Ahead, BytesTile, CHAINS, SIDE, Tree};

/// Blocks that a chain skips.
const BLOCKS: usize = LANES;

/// Stored rows that are multiplied at a time, and the vectors that the other sixteen are.
const ROWS: usize = 4;
const HALVES: usize = 2;

/// Products of unsigned bytes with signed ones, those of four neighbours added.
#[inline(always)]
unsafe fn fours<const VNNI: bool>(q: __m256i, x: __m256i) -> __m256i {
    // SAFETY: by the caller's promise.
    unsafe {
        if VNNI {
            _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), q, x)
        } else {
            _mm256_madd_epi16(_mm256_maddubs_epi16(q, x), _mm256_set1_epi16(1))
        }
    }
}

/// Likewise of signed bytes with signed ones that are not -128.
#[inline(always)]
unsafe fn signed_fours(q: __m256i, x: __m256i) -> __m256i {
    // SAFETY: by the caller's promise.
    unsafe {
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }
}

/// See [`crate::simd::Simd::block_dots`].
///
/// # Safety
/// AVX2 must exist, and AVX-VNNI if `VNNI` says so.
#[inline(always)]
pub unsafe fn block_dots<const VNNI: bool>(q: [[__m256i; 2]; 8], x: &[i8], offset: u8, sums: V) -> V {
    assert!(x.len() == 256 || x.len() == 512);
    // SAFETY: in bounds by the assertion; the instructions exist by the caller's promise.
    unsafe {
        let signed = !VNNI && offset == 128;
        let at = x.as_ptr();
        let (low, high) = if x.len() == 512 {
            (eight_sums::<VNNI>(q, 0, at, signed), eight_sums::<VNNI>(q, 4, at, signed))
        } else {
            // a block is half a vector: those of the low halves are 0, 2, 4, 6, of the high ones 1, 3, 5, 7
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let (low, high) = (four_sums::<VNNI>(q, 0, at, signed), four_sums::<VNNI>(q, 2, at, signed));
            (_mm256_permutevar8x32_epi32(low, order), _mm256_permutevar8x32_epi32(high, order))
        };
        let (low, high) = (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high));
        if signed || offset == 0 {
            return V(low, high);
        }
        let offset = _mm256_set1_ps(-f32::from(offset));
        V(_mm256_fmadd_ps(offset, sums.0, low), _mm256_fmadd_ps(offset, sums.1, high))
    }
}

/// Sums of eight vectors each, which are halves of `q` from `first` on.
#[inline(always)]
unsafe fn eight_sums<const VNNI: bool>(
    q: [[__m256i; 2]; 8],
    first: usize,
    x: *const i8,
    signed: bool,
) -> __m256i {
    // SAFETY: by the caller's promise.
    unsafe {
        let low = four_sums::<VNNI>(q, first, x, signed);
        let high = four_sums::<VNNI>(q, first + 2, x, signed);
        _mm256_add_epi32(
            _mm256_permute2x128_si256::<0x20>(low, high),
            _mm256_permute2x128_si256::<0x31>(low, high),
        )
    }
}

/// Products of four vectors, neighbours added: in each half of the result a sum of each.
#[inline(always)]
unsafe fn four_sums<const VNNI: bool>(
    q: [[__m256i; 2]; 8],
    first: usize,
    x: *const i8,
    signed: bool,
) -> __m256i {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut dots = [_mm256_setzero_si256(); 4];
        for (i, dots) in dots.iter_mut().enumerate() {
            let x = _mm256_loadu_si256(x.add(64 * first + 32 * i).cast());
            let q = q[first + i / 2][i % 2];
            *dots = if signed {
                signed_fours(_mm256_xor_si256(q, _mm256_set1_epi8(-128)), x)
            } else {
                fours::<VNNI>(q, x)
            };
        }
        _mm256_hadd_epi32(_mm256_hadd_epi32(dots[0], dots[1]), _mm256_hadd_epi32(dots[2], dots[3]))
    }
}

/// A tile; see [`crate::stored::tile`].
///
/// # Safety
/// AVX2 must exist, and as for [`crate::simd::Simd::bytes_tile`].
#[target_feature(enable = "avx2,fma")]
pub unsafe fn tile(t: BytesTile) {
    // SAFETY: by the caller's promise.
    unsafe { if t.signed { run::<false, true>(t) } else { run::<false, false>(t) } }
}

/// A tile with `vpdpbusd`, of unsigned bytes.
///
/// # Safety
/// As for [`tile`], and AVX-VNNI must exist.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub unsafe fn tile_vnni(t: BytesTile) {
    // SAFETY: by the caller's promise.
    unsafe { run::<true, false>(t) }
}

#[inline(always)]
unsafe fn run<const VNNI: bool, const SIGNED: bool>(t: BytesTile) {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let zero = _mm256_setzero_ps();
        let mut tree = Tree::<[[__m256; HALVES]; SIDE]>::new();
        let mut at = 0;
        for chain in CHAINS {
            let mut sums = [[zero; HALVES]; SIDE];
            for _ in (chain..t.blocks).step_by(BLOCKS) {
                let (q, x) = (t.q.add(at * SIDE * t.block), t.x.add(at * SIDE * t.block));
                let halves = |p: *const f32| [0, 1].map(|half| _mm256_loadu_ps(p.add(at * SIDE + half * 8)));
                let (x_scale, x_sum) = (halves(t.x_scale), halves(t.x_sum));
                for (rows, sums) in sums.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
                    let q = std::array::from_fn(|r| q.add((rows * ROWS + r) * t.block));
                    let dots = dots::<VNNI, SIGNED>(q, x, t.block / 4);
                    for (r, (dots, sums)) in dots.into_iter().zip(sums).enumerate() {
                        let row = at * SIDE + rows * ROWS + r;
                        let scale = _mm256_set1_ps(*t.scale.add(row));
                        for half in 0..HALVES {
                            let mut dots = _mm256_cvtepi32_ps(dots[half]);
                            if !SIGNED && t.offset != 0 {
                                let offset = _mm256_set1_ps(-f32::from(t.offset));
                                dots = _mm256_fmadd_ps(offset, x_sum[half], dots);
                            }
                            let mut part = _mm256_mul_ps(dots, scale);
                            if !t.min.is_null() {
                                part = _mm256_fmadd_ps(_mm256_set1_ps(*t.min.add(row)), x_sum[half], part);
                            }
                            sums[half] = _mm256_fmadd_ps(part, x_scale[half], sums[half]);
                        }
                    }
                }
                at += 1;
            }
            tree.add(sums, |before, sums| {
                for (sum, before) in sums.as_flattened_mut().iter_mut().zip(before.as_flattened()) {
                    *sum = _mm256_add_ps(*before, *sum);
                }
            });
        }
        for (r, sums) in tree.whole().iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(t.out.add(r * SIDE + half * 8), *sum);
            }
        }
    }
}

/// Sums within a block of four stored rows with sixteen others.
#[inline(always)]
unsafe fn dots<const VNNI: bool, const SIGNED: bool>(
    q: [*const u8; ROWS],
    x: *const i8,
    words: usize,
) -> [[__m256i; HALVES]; ROWS] {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let mut dots = [[_mm256_setzero_si256(); HALVES]; ROWS];
        let word = |q: *const u8, w: usize| _mm256_set1_epi32(q.add(4 * w).cast::<i32>().read_unaligned());
        let load = |w: usize| [0, 1].map(|half| _mm256_loadu_si256(x.add(w * 4 * SIDE + half * 32).cast()));
        // two words at a time: the pairs of both, of bytes below 64, are one number of 16 bits
        for w in (0..words).step_by(2) {
            let (first, second) = (load(w), load(w + 1));
            for (q, dots) in q.iter().zip(&mut dots) {
                let (a, b) = (word(*q, w), word(*q, w + 1));
                for (half, dots) in dots.iter_mut().enumerate() {
                    let (x, y) = (first[half], second[half]);
                    *dots = if VNNI {
                        _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(*dots, a, x), b, y)
                    } else if SIGNED {
                        let both = _mm256_add_epi32(signed_fours(a, x), signed_fours(b, y));
                        _mm256_add_epi32(*dots, both)
                    } else {
                        let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, y));
                        _mm256_add_epi32(*dots, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                    };
                }
            }
        }
        dots
    }
}

/// A tile of `M` rows with a panel; see [`crate::stored::panels`].
///
/// # Safety
/// AVX2, FMA and F16C must exist, and as for [`crate::simd::Simd::panel_tile`].
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn panel_tile<F: Panel, const M: usize>(t: PanelTile) {
    // SAFETY: by the caller's promise.
    unsafe { panel::<F, M, false>(t) }
}

/// The same with `vpdpbusd`.
///
/// # Safety
/// As for [`panel_tile`], and AVX-VNNI must exist.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub unsafe fn panel_tile_vnni<F: Panel, const M: usize>(t: PanelTile) {
    // SAFETY: by the caller's promise.
    unsafe { panel::<F, M, true>(t) }
}

#[inline(always)]
unsafe fn panel<F: Panel, const M: usize, const VNNI: bool>(t: PanelTile) {
    let signed = !VNNI && F::OFFSET == 128;
    let mut tree = Tree::<[[__m256; HALVES]; M]>::new();
    // SAFETY (all): by the caller's promise.
    unsafe {
        let (mut scales, mut x) = (t.first, t.x);
        let mut ahead = Ahead::new(t.next, t.next_bytes, t.blocks);
        for chain in CHAINS {
            let mut sums = [[_mm256_setzero_ps(); HALVES]; M];
            for block in (chain..t.blocks).step_by(BLOCKS) {
                ahead.block(|at| _mm_prefetch::<_MM_HINT_T1>(at.cast()));
                let codes = scales.add(F::SCALE_BYTES);
                let factors = t.factors.add(block / F::PER_STORED * F::FACTORS);
                for half in 0..HALVES {
                    let q = half_words::<F>(codes.add(32 * half), signed);
                    let [scale, min] = half_scales::<F>(scales, factors, half);
                    for (j, sums) in sums.iter_mut().enumerate() {
                        let mut dots = half_dots::<F, VNNI>(&q, x.codes.add(4 * j), 4 * M, signed);
                        if F::OFFSET != 0 && !signed {
                            dots = _mm256_add_epi32(dots, _mm256_set1_epi32(*x.owed.add(j)));
                        }
                        let mut part = _mm256_mul_ps(_mm256_cvtepi32_ps(dots), scale);
                        if F::MIN {
                            part = _mm256_fmadd_ps(min, _mm256_set1_ps(*x.sums.add(j)), part);
                        }
                        sums[half] = _mm256_fmadd_ps(part, _mm256_set1_ps(*x.scales.add(j)), sums[half]);
                    }
                }
                (scales, x) = (scales.add(F::BLOCK_BYTES), x.after(4 * F::STEPS * M, M));
            }
            tree.add(sums, |before, sums| {
                for (sum, before) in sums.as_flattened_mut().iter_mut().zip(before.as_flattened()) {
                    *sum = _mm256_add_ps(*before, *sum);
                }
            });
        }
        for (j, sums) in tree.whole().iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(t.out.add(j * LANES + half * 8), *sum);
            }
        }
    }
}

/// Sums within a block of eight stored rows with one other, whose words are `stride` bytes apart.
#[inline(always)]
unsafe fn half_dots<F: Panel, const VNNI: bool>(
    q: &[__m256i; 8],
    x: *const i8,
    stride: usize,
    signed: bool,
) -> __m256i {
    // words whose pairs of products, added, are one number of 16 bits
    let fit = match F::WIDTH {
        Width::Four => 8,
        Width::FourAndMore => 8 >> F::MORE,
        Width::Eight => 1,
    };
    // SAFETY (all): by the caller's promise.
    unsafe {
        let word = |step: usize| _mm256_set1_epi32(x.add(step * stride).cast::<i32>().read_unaligned());
        let mut dots = _mm256_setzero_si256();
        if VNNI {
            for (step, q) in q.iter().enumerate().take(F::STEPS) {
                dots = _mm256_dpbusd_avx_epi32(dots, *q, word(step));
            }
            return dots;
        }
        for first in (0..F::STEPS).step_by(fit) {
            let pairs = |step: usize| {
                let (q, x) = (q[step], word(step));
                if signed {
                    _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q))
                } else {
                    _mm256_maddubs_epi16(q, x)
                }
            };
            let mut sum = pairs(first);
            for step in first + 1..F::STEPS.min(first + fit) {
                sum = _mm256_add_epi16(sum, pairs(step));
            }
            dots = _mm256_add_epi32(dots, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
        dots
    }
}

/// The words of a block of eight rows: four elements of each, then the next four; zero behind those that the format has.
#[inline(always)]
unsafe fn half_words<F: Panel>(codes: *const u8, signed: bool) -> [__m256i; 8] {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let mut words = [_mm256_setzero_si256(); 8];
        macro_rules! steps {
            ($($step:literal)*) => {
                $(if $step < F::STEPS {
                    words[$step] = half_word::<F, $step>(codes, signed);
                })*
            };
        }
        steps!(0 1 2 3 4 5 6 7);
        words
    }
}

/// Four elements of each of eight rows: word `STEP` of a block.
#[inline(always)]
unsafe fn half_word<F: Panel, const STEP: usize>(codes: *const u8, signed: bool) -> __m256i {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let vector = |i: usize| _mm256_loadu_si256(codes.add(64 * i).cast());
        if matches!(F::WIDTH, Width::Eight) {
            let q = vector(STEP);
            return if signed { _mm256_xor_si256(q, _mm256_set1_epi8(-128)) } else { q };
        }
        let (pair, low) = (vector(STEP / 2), _mm256_set1_epi8(0x0f));
        let mut words =
            _mm256_and_si256(if STEP.is_multiple_of(2) { pair } else { _mm256_srli_epi16::<4>(pair) }, low);
        if matches!(F::WIDTH, Width::FourAndMore) {
            let (more, from) = (vector(F::STEPS / 2), F::MORE * STEP);
            let more = match from {
                0..4 => _mm256_sll_epi16(more, _mm_cvtsi32_si128(4 - from as i32)),
                4 => more,
                _ => _mm256_srl_epi16(more, _mm_cvtsi32_si128(from as i32 - 4)),
            };
            let mask = _mm256_set1_epi8((((1 << F::MORE) - 1) << 4) as i8);
            words = _mm256_or_si256(words, _mm256_and_si256(more, mask));
        }
        words
    }
}

/// A scale and a minimum of a block for each of eight rows.
#[inline(always)]
unsafe fn half_scales<F: Panel>(scales: *const u8, factors: *const u8, half: usize) -> [__m256; 2] {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let halves = |at: *const u8, i: usize| {
            _mm256_cvtph_ps(_mm_loadu_si128(at.add(2 * (LANES * i + 8 * half)).cast()))
        };
        let bytes = |i: usize| _mm_loadl_epi64(scales.add(LANES * i + 8 * half).cast());
        let zero = _mm256_setzero_ps();
        match F::SCALES {
            Scales::Half => [halves(scales, 0), zero],
            Scales::HalfAndMin => [halves(scales, 0), halves(scales, 1)],
            Scales::SixBits => {
                let number = |i: usize| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(i)));
                let min = _mm256_mul_ps(halves(factors, 1), number(1));
                [_mm256_mul_ps(halves(factors, 0), number(0)), _mm256_sub_ps(_mm256_set1_ps(-0.0), min)]
            }
            Scales::Signed => {
                let number = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(0)));
                [_mm256_mul_ps(halves(factors, 0), number), zero]
            }
        }
    }
}
