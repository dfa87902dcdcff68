//! Products of bytes in NEON registers: with `sdot` where the machine has it, else as numbers of 16 bits that are widened
//! before they overflow.
//!
//! All bytes are taken as signed. Sixteen bits hold four products where the stored ones are below 64 (at most 4 · 63 · 127),
//! and two where they are any (at most 2 · 128 · 127).

use std::arch::aarch64::*;
use std::arch::asm;

use super::LANES;
use super::neon::{V, prefetch, widened};
use crate::stored::inputs::TileRows;
use crate::stored::panels::{Panel, PanelTile, Scales, Width};
use crate::stored::tile::{Ahead, BytesTile, CHAINS, SIDE, Tree};

/// 64 bytes.
pub type B = [uint8x16_t; 4];

/// Blocks that a chain skips.
const BLOCKS: usize = LANES;

/// Vectors that sixteen rows are.
const QUARTERS: usize = 4;

/// Words of a vector: rows of a tile whose products one vector of the left operand makes.
const WORDS: usize = 4;

/// Products of signed bytes, those of four neighbours added to a sum. (The compiler's own is not stable yet.)
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction exists and touches nothing but its operands.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Likewise of four bytes each with the same four of `b`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn sdot_word<const WORD: usize>(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.4b[{word}]",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            word = const WORD,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Products of eight signed bytes, the low ones, added to sums. (What the compiler knows of bytes, that they are small or the
/// same in both halves, makes it write its own as more instructions.)
#[inline(always)]
unsafe fn add_low(mut sums: int16x8_t, a: int8x16_t, b: int8x16_t) -> int16x8_t {
    // SAFETY: NEON exists by the caller's promise; nothing but the operands is touched.
    unsafe {
        asm!(
            "smlal {sums:v}.8h, {a:v}.8b, {b:v}.8b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Likewise of the high ones.
#[inline(always)]
unsafe fn add_high(mut sums: int16x8_t, a: int8x16_t, b: int8x16_t) -> int16x8_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "smlal2 {sums:v}.8h, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// See [`crate::simd::Simd::block_dots`].
///
/// # Safety
/// NEON must exist, and `sdot` if `SDOT` says so.
#[inline(always)]
pub unsafe fn block_dots<const SDOT: bool>(q: [B; 8], x: &[i8], offset: u8, sums: V) -> V {
    assert!(x.len() == 256 || x.len() == 512);
    // SAFETY: in bounds by the assertion; the instructions exist by the caller's promise.
    unsafe {
        let (vectors, wide) = (x.len() / 256, offset == 128);
        let (at, four) = (x.as_ptr(), 4 * vectors);
        // written out, so that bytes stay in registers
        let mut all = [
            four_blocks::<SDOT>(&q, at, 0, vectors, wide),
            four_blocks::<SDOT>(&q, at, four, vectors, wide),
            four_blocks::<SDOT>(&q, at, 2 * four, vectors, wide),
            four_blocks::<SDOT>(&q, at, 3 * four, vectors, wide),
        ];
        if !wide && offset != 0 {
            for (dots, sums) in all.iter_mut().zip(sums) {
                *dots = vfmaq_f32(*dots, vdupq_n_f32(-f32::from(offset)), sums);
            }
        }
        all
    }
}

/// Sums of four blocks of `count` vectors each, from vector `first` on.
#[inline(always)]
unsafe fn four_blocks<const SDOT: bool>(
    q: &[B; 8],
    x: *const i8,
    first: usize,
    count: usize,
    wide: bool,
) -> float32x4_t {
    // SAFETY: by the caller's promise.
    unsafe {
        let a = block::<SDOT>(q, x, first, count, wide);
        let b = block::<SDOT>(q, x, first + count, count, wide);
        let c = block::<SDOT>(q, x, first + 2 * count, count, wide);
        let d = block::<SDOT>(q, x, first + 3 * count, count, wide);
        vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)))
    }
}

/// Products of a block, which is `count` vectors from `first` on: the sum is that of four lanes. Bytes that are `wide` have 128
/// added.
#[inline(always)]
unsafe fn block<const SDOT: bool>(
    q: &[B; 8],
    x: *const i8,
    first: usize,
    count: usize,
    wide: bool,
) -> int32x4_t {
    // SAFETY: by the caller's promise.
    unsafe {
        let (mut sums, mut pairs) = (vdupq_n_s32(0), vdupq_n_s16(0));
        for i in first..first + count {
            let mut q = q[i / 4][i % 4];
            if wide {
                q = veorq_u8(q, vdupq_n_u8(128));
            }
            let (q, x) = (vreinterpretq_s8_u8(q), vld1q_s8(x.add(16 * i)));
            if SDOT {
                sums = sdot(sums, q, x);
                continue;
            }
            if wide && i > first {
                sums = vpadalq_s16(sums, pairs);
                pairs = vdupq_n_s16(0);
            }
            pairs = add_high(add_low(pairs, q, x), q, x);
        }
        if SDOT { sums } else { vpadalq_s16(sums, pairs) }
    }
}

/// A tile; see [`crate::stored::tile`].
///
/// # Safety
/// NEON must exist, and as for [`crate::simd::Simd::bytes_tile`].
#[target_feature(enable = "neon")]
pub unsafe fn tile(t: BytesTile) {
    // SAFETY: by the caller's promise.
    unsafe { if t.signed { run::<false, true, 2>(t) } else { run::<false, false, 2>(t) } }
}

/// A tile with `sdot`; all bytes that are not signed must be below 128.
///
/// # Safety
/// As for [`tile`], and `sdot` must exist.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn tile_sdot(t: BytesTile) {
    // SAFETY: by the caller's promise.
    unsafe { run::<true, true, 4>(t) }
}

/// A tile, `ROWS` stored rows at a time. Bytes that are not `WIDE` are below 64.
#[inline(always)]
unsafe fn run<const SDOT: bool, const WIDE: bool, const ROWS: usize>(t: BytesTile) {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let zero = vdupq_n_f32(0.0);
        let mut tree = Tree::<[[float32x4_t; QUARTERS]; SIDE]>::new();
        let mut at = 0;
        for chain in CHAINS {
            let mut sums = [[zero; QUARTERS]; SIDE];
            for _ in (chain..t.blocks).step_by(BLOCKS) {
                let (q, x) = (t.q.add(at * SIDE * t.block), t.x.add(at * SIDE * t.block));
                let (x_scale, x_sum) = (numbers(t.x_scale.add(at * SIDE)), numbers(t.x_sum.add(at * SIDE)));
                for (rows, sums) in sums.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
                    let q = q.add(rows * ROWS * t.block);
                    let dots = if SDOT {
                        dots_sdot::<ROWS>(q, x, t.block)
                    } else {
                        dots::<WIDE, ROWS>(q, x, t.block)
                    };
                    for (r, (dots, sums)) in dots.iter().zip(sums).enumerate() {
                        let row = at * SIDE + rows * ROWS + r;
                        let scale = *t.scale.add(row);
                        for (i, sum) in sums.iter_mut().enumerate() {
                            let mut dots = vcvtq_f32_s32(dots[i]);
                            if t.offset != 0 {
                                dots = vfmaq_n_f32(dots, x_sum[i], -f32::from(t.offset));
                            }
                            let mut part = vmulq_n_f32(dots, scale);
                            if !t.min.is_null() {
                                part = vfmaq_n_f32(part, x_sum[i], *t.min.add(row));
                            }
                            *sum = vfmaq_f32(*sum, part, x_scale[i]);
                        }
                    }
                }
                at += 1;
            }
            tree.add(sums, |before, sums| {
                for (sum, before) in sums.as_flattened_mut().iter_mut().zip(before.as_flattened()) {
                    *sum = vaddq_f32(*before, *sum);
                }
            });
        }
        for (r, sums) in tree.whole().iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                vst1q_f32(t.out.add(r * SIDE + 4 * i), *sum);
            }
        }
    }
}

/// Sixteen numbers.
#[inline(always)]
unsafe fn numbers(p: *const f32) -> V {
    // SAFETY: by the caller's promise.
    unsafe { [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))] }
}

/// Sums within a block of a few stored rows with sixteen others.
#[inline(always)]
unsafe fn dots_sdot<const ROWS: usize>(
    q: *const u8,
    x: *const i8,
    block: usize,
) -> [[int32x4_t; QUARTERS]; ROWS] {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let mut dots = [[vdupq_n_s32(0); QUARTERS]; ROWS];
        for from in (0..block).step_by(16) {
            let mut rows = [vdupq_n_s8(0); ROWS];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = vld1q_s8(q.add(r * block + from).cast());
            }
            macro_rules! word {
                ($word:literal) => {
                    for i in 0..QUARTERS {
                        let x = vld1q_s8(x.add((from + 4 * $word) * SIDE + 16 * i));
                        for (row, dots) in rows.iter().zip(&mut dots) {
                            dots[i] = sdot_word::<$word>(dots[i], x, *row);
                        }
                    }
                };
            }
            word!(0);
            word!(1);
            word!(2);
            word!(3);
        }
        dots
    }
}

/// Likewise without `sdot`: as many words at a time as 16 bits hold products of one element of each.
#[inline(always)]
unsafe fn dots<const WIDE: bool, const ROWS: usize>(
    q: *const u8,
    x: *const i8,
    block: usize,
) -> [[int32x4_t; QUARTERS]; ROWS] {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let words = if WIDE { 2 } else { 4 };
        // a row of the left operand is two lanes
        let mut halves = [[[vdupq_n_s32(0); 2]; QUARTERS]; ROWS];
        for from in (0..block).step_by(4 * words) {
            let mut rows = [[vdupq_n_s8(0); 4]; ROWS];
            for (r, row) in rows.iter_mut().enumerate() {
                for (w, word) in row.iter_mut().enumerate().take(words) {
                    let four = q.add(r * block + from + 4 * w).cast::<i32>().read_unaligned();
                    *word = vreinterpretq_s8_s32(vdupq_n_s32(four));
                }
            }
            for i in 0..QUARTERS {
                let mut pairs = [[vdupq_n_s16(0); 2]; ROWS];
                for w in 0..words {
                    let x = vld1q_s8(x.add((from + 4 * w) * SIDE + 16 * i));
                    for (row, pairs) in rows.iter().zip(&mut pairs) {
                        pairs[0] = add_low(pairs[0], x, row[w]);
                        pairs[1] = add_high(pairs[1], x, row[w]);
                    }
                }
                for (halves, pairs) in halves.iter_mut().zip(&pairs) {
                    halves[i][0] = vpadalq_s16(halves[i][0], pairs[0]);
                    halves[i][1] = vpadalq_s16(halves[i][1], pairs[1]);
                }
            }
        }
        let mut dots = [[vdupq_n_s32(0); QUARTERS]; ROWS];
        for (dots, halves) in dots.iter_mut().zip(&halves) {
            for (dots, halves) in dots.iter_mut().zip(halves) {
                *dots = vpaddq_s32(halves[0], halves[1]);
            }
        }
        dots
    }
}

/// A tile of `M` rows with a panel, by `sdot`; see [`crate::stored::panels`].
///
/// # Safety
/// NEON and `sdot` must exist, and as for [`crate::simd::Simd::panel_tile`].
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn panel_tile<F: Panel, const M: usize>(t: PanelTile) {
    let mut tree = Tree::<[[float32x4_t; QUARTERS]; M]>::new();
    // SAFETY (all): by the caller's promise.
    unsafe {
        let (mut scales, mut x) = (t.first, t.x);
        let mut ahead = Ahead::new(t.next, t.next_bytes, t.blocks);
        for chain in CHAINS {
            let mut sums = [[vdupq_n_f32(0.0); QUARTERS]; M];
            for block in (chain..t.blocks).step_by(BLOCKS) {
                ahead.block(prefetch);
                let codes = scales.add(F::SCALE_BYTES);
                let factors = t.factors.add(block / F::PER_STORED * F::FACTORS);
                let scales_of_block = panel_scales::<F>(scales, factors);
                for (part, sums) in sums.chunks_mut(WORDS).enumerate() {
                    let j = part * WORDS;
                    let x = x.after(4 * j, j);
                    match M {
                        1 => add_block::<F, M, 1>(codes, scales_of_block, x, sums),
                        2 => add_block::<F, M, 2>(codes, scales_of_block, x, sums),
                        _ => add_block::<F, M, WORDS>(codes, scales_of_block, x, sums),
                    }
                }
                (scales, x) = (scales.add(F::BLOCK_BYTES), x.after(4 * F::STEPS * M, M));
            }
            tree.add(sums, |before, sums| {
                for (sum, before) in sums.as_flattened_mut().iter_mut().zip(before.as_flattened()) {
                    *sum = vaddq_f32(*before, *sum);
                }
            });
        }
        for (j, sums) in tree.whole().iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                vst1q_f32(t.out.add(j * LANES + 4 * i), *sum);
            }
        }
    }
}

/// Adds the products of a block with `ROWS` of a tile's `M` rows, the first of which is that of `x`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn add_block<F: Panel, const M: usize, const ROWS: usize>(
    codes: *const u8,
    [scale, min]: [V; 2],
    x: TileRows,
    sums: &mut [[float32x4_t; QUARTERS]],
) {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let mut dots = [[vdupq_n_s32(0); QUARTERS]; ROWS];
        // bytes of any size are taken as signed, and have nothing added to them
        if F::OFFSET != 0 && F::OFFSET != 128 {
            for (j, dots) in dots.iter_mut().enumerate() {
                *dots = [vdupq_n_s32(*x.owed.add(j)); QUARTERS];
            }
        }
        macro_rules! steps {
            ($($step:literal)*) => {
                $(if $step < F::STEPS {
                    let q = panel_word::<F, $step>(codes);
                    let x = x.codes.add(4 * $step * M);
                    if ROWS == WORDS {
                        // four rows are one vector; `% ROWS` is for the compiler, which reads this with fewer rows too
                        let x = vld1q_s8(x);
                        for i in 0..QUARTERS {
                            dots[0][i] = sdot_word::<0>(dots[0][i], q[i], x);
                            dots[1 % ROWS][i] = sdot_word::<1>(dots[1 % ROWS][i], q[i], x);
                            dots[2 % ROWS][i] = sdot_word::<2>(dots[2 % ROWS][i], q[i], x);
                            dots[3 % ROWS][i] = sdot_word::<3>(dots[3 % ROWS][i], q[i], x);
                        }
                    } else {
                        for (j, dots) in dots.iter_mut().enumerate() {
                            let x = vdupq_n_s32(x.add(4 * j).cast::<i32>().read_unaligned());
                            for (dots, q) in dots.iter_mut().zip(q) {
                                *dots = sdot(*dots, q, vreinterpretq_s8_s32(x));
                            }
                        }
                    }
                })*
            };
        }
        steps!(0 1 2 3 4 5 6 7);
        for (j, (sums, dots)) in sums.iter_mut().zip(dots).enumerate() {
            for (i, (sum, dots)) in sums.iter_mut().zip(dots).enumerate() {
                let mut part = vmulq_f32(vcvtq_f32_s32(dots), scale[i]);
                if F::MIN {
                    part = vfmaq_n_f32(part, min[i], *x.sums.add(j));
                }
                *sum = vfmaq_n_f32(*sum, part, *x.scales.add(j));
            }
        }
    }
}

/// Four elements of each of sixteen rows: word `STEP` of a block.
#[inline(always)]
unsafe fn panel_word<F: Panel, const STEP: usize>(codes: *const u8) -> [int8x16_t; QUARTERS] {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let mut words = [vdupq_n_s8(0); QUARTERS];
        for (i, words) in words.iter_mut().enumerate() {
            let vector = |v: usize| vld1q_u8(codes.add(64 * v + 16 * i));
            let mut q;
            if matches!(F::WIDTH, Width::Eight) {
                q = veorq_u8(vector(STEP), vdupq_n_u8(128));
            } else {
                let pair = vector(STEP / 2);
                q = if STEP.is_multiple_of(2) {
                    vandq_u8(pair, vdupq_n_u8(0x0f))
                } else {
                    vshrq_n_u8::<4>(pair)
                };
                if matches!(F::WIDTH, Width::FourAndMore) {
                    let by = vdupq_n_s8(4 - (F::MORE * STEP) as i8);
                    let more = vshlq_u8(vector(F::STEPS / 2), by);
                    q = vorrq_u8(q, vandq_u8(more, vdupq_n_u8(((1 << F::MORE) - 1) << 4)));
                }
            }
            *words = vreinterpretq_s8_u8(q);
        }
        words
    }
}

/// A scale and a minimum of a block for each of sixteen rows.
#[inline(always)]
unsafe fn panel_scales<F: Panel>(scales: *const u8, factors: *const u8) -> [V; 2] {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let zero = vdupq_n_f32(0.0);
        let mut out = [[zero; QUARTERS]; 2];
        let [scale, min] = &mut out;
        for i in 0..QUARTERS {
            let halves = |at: *const u8, n: usize| {
                widened(vreinterpret_u16_u8(vld1_u8(at.add(2 * (LANES * n + 4 * i)))))
            };
            let word = |n: usize| scales.add(LANES * n + 4 * i).cast::<u32>().read_unaligned();
            match F::SCALES {
                Scales::Half => scale[i] = halves(scales, 0),
                Scales::HalfAndMin => (scale[i], min[i]) = (halves(scales, 0), halves(scales, 1)),
                Scales::SixBits => {
                    let number = |n: usize| {
                        let bytes = vmovl_u8(vcreate_u8(u64::from(word(n))));
                        vcvtq_f32_u32(vmovl_u16(vget_low_u16(bytes)))
                    };
                    scale[i] = vmulq_f32(halves(factors, 0), number(0));
                    min[i] = vsubq_f32(vdupq_n_f32(-0.0), vmulq_f32(halves(factors, 1), number(1)));
                }
                Scales::Signed => {
                    let bytes = vmovl_s8(vcreate_s8(u64::from(word(0))));
                    let number = vcvtq_f32_s32(vmovl_s16(vget_low_s16(bytes)));
                    scale[i] = vmulq_f32(halves(factors, 0), number);
                }
            }
        }
        out
    }
}
