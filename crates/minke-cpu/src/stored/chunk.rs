//! Sixteen blocks of a stored row, unpacked: small unsigned integers, and a scale and a minimum for each block.
//!
//! A weight of block b is `scale_b (q - OFFSET) + min_b`. Layouts are those of ggml (`ggml-common.h`), where the elements of
//! a byte are not always neighbours; unpacked they are in the order of the row.

use crate::simd::{LANES, Simd};

/// Blocks that are taken together, a lane each.
pub(super) const BLOCKS: usize = LANES;

/// Elements of the longest chunk.
pub(super) const CHUNK: usize = 32 * BLOCKS;

/// Bytes of the longest chunk as it is stored, and of what a read past its end may touch.
pub(super) const STORED_CHUNK: usize = 16 * 34;

/// Bytes by which memory is read ahead.
pub const LINE: usize = 64;

/// How rows of a format are unpacked.
pub(super) trait Unpack {
    /// Elements that share a scale, 16 or 32.
    const BLOCK: usize;
    /// What is subtracted of the unpacked integers.
    const OFFSET: u8;
    /// Whether blocks have a minimum.
    const MIN: bool;
    /// Elements of what is stored as one.
    const STORED_LEN: usize;
    /// Bytes of what is stored as one.
    const STORED_BYTES: usize;

    /// Elements of a chunk.
    const LEN: usize = BLOCKS * Self::BLOCK;
    /// Bytes of a chunk.
    const BYTES: usize = Self::LEN / Self::STORED_LEN * Self::STORED_BYTES;

    /// A scale and a minimum for each block of a whole chunk.
    fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2];
    /// Elements `64 i..64 (i + 1)` of a whole chunk.
    fn vector<S: Simd>(s: S, blocks: impl Blocks, i: usize) -> S::B;

    /// All vectors of a whole chunk; of a chunk of blocks of 16 there are four, and the others are zero.
    #[inline(always)]
    fn vectors<S: Simd>(s: S, blocks: impl Blocks) -> [S::B; 8] {
        let mut all = [s.bytes_of(0); 8];
        for (i, vector) in all.iter_mut().enumerate().take(Self::LEN / 64) {
            *vector = Self::vector(s, blocks, i);
        }
        all
    }
}

/// The stored blocks of a chunk.
pub(super) trait Blocks: Copy {
    /// Block `i`, which has `N` bytes.
    fn block<const N: usize>(&self, i: usize) -> &[u8; N];
}

/// Blocks that lie one after the other.
#[derive(Clone, Copy)]
pub(super) struct InRow<'a>(pub &'a [u8]);

impl Blocks for InRow<'_> {
    #[inline(always)]
    fn block<const N: usize>(&self, i: usize) -> &[u8; N] {
        array(self.0, i * N)
    }
}

/// `per` blocks of each of some rows.
#[derive(Clone, Copy)]
pub(super) struct OfRows<'a, const ROWS: usize> {
    pub rows: [&'a [u8]; ROWS],
    pub per: usize,
}

impl<const ROWS: usize> Blocks for OfRows<'_, ROWS> {
    #[inline(always)]
    fn block<const N: usize>(&self, i: usize) -> &[u8; N] {
        array(self.rows[i / self.per], i % self.per * N)
    }
}

/// Chunk `i` of a stored row as a whole one: behind a short row there are zeros, not the row that follows it, whose scales may
/// be no numbers.
#[inline(always)]
pub(super) fn whole<'a, F: Unpack>(row: &'a [u8], i: usize, room: &'a mut [u8; STORED_CHUNK]) -> InRow<'a> {
    let from = i * F::BYTES;
    if from + F::BYTES <= row.len() {
        return InRow(&row[from..from + F::BYTES]);
    }
    fill_up(&row[from..], room);
    InRow(&room[..F::BYTES])
}

/// The last bytes of a row, and zeros.
#[inline(never)]
fn fill_up(rest: &[u8], room: &mut [u8; STORED_CHUNK]) {
    room[..rest.len()].copy_from_slice(rest);
    room[rest.len()..].fill(0);
}

#[inline(always)]
fn array<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..at + N].try_into().expect("as many as asked for")
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*array(bytes, at))
}

/// Scales in f16 of sixteen stored blocks, at `AT` of each.
#[inline(always)]
fn half_scales<S: Simd, const BYTES: usize, const AT: usize>(s: S, blocks: impl Blocks) -> S::V {
    // in numbers of eight bytes: a vector is slow to read where its elements were just stored one by one
    let mut words = [0; 4];
    for (i, word) in words.iter_mut().enumerate() {
        for j in 0..4 {
            let scale = u16::from_le_bytes(*array(blocks.block::<BYTES>(4 * i + j), AT));
            *word |= u64::from(scale) << (16 * j);
        }
    }
    s.load_f16(words)
}

/// The nibbles of two blocks with sixteen bytes each: of each the low ones, then the high ones.
#[inline(always)]
fn nibbles_of_two<S: Simd>(s: S, first: &[u8; 16], second: &[u8; 16]) -> S::B {
    let x = s.shift_quarters(s.load_quarters(first, second), [0, 4, 0, 4]);
    s.and_bytes(x, s.bytes_of(15))
}

macro_rules! simple_blocks {
    ($name:ident, $bytes:literal, offset $offset:literal, min $min:literal, |$s:ident, $first:ident, $second:ident| $body:block) => {
        pub(super) struct $name;

        impl Unpack for $name {
            const BLOCK: usize = 32;
            const OFFSET: u8 = $offset;
            const MIN: bool = $min;
            const STORED_LEN: usize = 32;
            const STORED_BYTES: usize = $bytes;

            #[inline(always)]
            fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2] {
                let min = if $min { half_scales::<S, $bytes, 2>(s, blocks) } else { s.zero() };
                [half_scales::<S, $bytes, 0>(s, blocks), min]
            }

            #[inline(always)]
            fn vector<S: Simd>($s: S, blocks: impl Blocks, i: usize) -> S::B {
                let ($first, $second) = (blocks.block::<$bytes>(2 * i), blocks.block::<$bytes>(2 * i + 1));
                $body
            }
        }
    };
}

simple_blocks!(Q4_0, 18, offset 8, min false, |s, a, b| { nibbles_of_two(s, array(a, 2), array(b, 2)) });
simple_blocks!(Q4_1, 20, offset 0, min true, |s, a, b| { nibbles_of_two(s, array(a, 4), array(b, 4)) });
simple_blocks!(Q5_0, 22, offset 16, min false, |s, a, b| {
    let fifth = u64::from(word(a, 2)) | u64::from(word(b, 2)) << 32;
    s.or_bytes(nibbles_of_two(s, array(a, 6), array(b, 6)), s.bytes_where(fifth, 16))
});
simple_blocks!(Q5_1, 24, offset 0, min true, |s, a, b| {
    let fifth = u64::from(word(a, 4)) | u64::from(word(b, 4)) << 32;
    s.or_bytes(nibbles_of_two(s, array(a, 8), array(b, 8)), s.bytes_where(fifth, 16))
});
simple_blocks!(Q8_0, 34, offset 128, min false, |s, a, b| {
    s.xor_bytes(s.load_halves(array(a, 2), array(b, 2)), s.bytes_of(0x80))
});
simple_blocks!(Iq4Nl, 18, offset 128, min false, |s, a, b| {
    s.lookup(&LEVELS, nibbles_of_two(s, array(a, 2), array(b, 2)))
});

/// The levels of IQ4 formats, with 128 added (ggml, `kvalues_iq4nl`).
const LEVELS: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// Bits of the same 32 bytes, as many as `mask` has: in the low half from `from[0]` on, in the high one from `from[1]` on, moved
/// to `to`.
#[inline(always)]
fn bits_twice<S: Simd>(s: S, x: &[u8; 32], from: [u32; 2], mask: u8, to: u32) -> S::B {
    let x = s.shift_quarters(s.load_halves(x, x), [from[0], from[0], from[1], from[1]]);
    let x = s.and_bytes(x, s.bytes_of(mask));
    if to == 0 { x } else { s.shift_left(x, to) }
}

/// Eight scales and eight minima of 6 bits, in twelve bytes (ggml, `get_scale_min_k4`): two numbers of eight bytes.
#[inline(always)]
pub(super) fn six_bits(bytes: &[u8; 12]) -> [u64; 2] {
    // four of either, with two bits each of the others, of which the last word has the rest
    let (first, rest) = (u64::from_le_bytes(*array(bytes, 0)), u64::from(word(bytes, 8)));
    let low = first & 0x3f3f_3f3f_3f3f_3f3f;
    let rest = rest & 0x0f0f_0f0f | (rest & 0xf0f0_f0f0) << 28;
    let high = rest | first >> 2 & 0x3030_3030_3030_3030;
    let half = 0xffff_ffff;
    [low & half | high << 32, low >> 32 | high & !half]
}

/// `scale[i] = d sc[i]`, `min[i] = -(dmin m[i])` of two stored blocks.
#[inline(always)]
fn scales_of_two<S: Simd, const BYTES: usize>(s: S, blocks: impl Blocks) -> [S::V; 2] {
    let (a, b) = (blocks.block::<BYTES>(0), blocks.block::<BYTES>(1));
    let halves = |at: usize| s.halves_f16(*array(a, at), *array(b, at));
    let ([sc_a, m_a], [sc_b, m_b]) = (six_bits(array(a, 4)), six_bits(array(b, 4)));
    let scale = s.mul(halves(0), s.load_u8([sc_a, sc_b]));
    let min = s.sub(s.splat(-0.0), s.mul(halves(2), s.load_u8([m_a, m_b])));
    [scale, min]
}

pub(crate) struct Q4K;

impl Unpack for Q4K {
    const BLOCK: usize = 32;
    const OFFSET: u8 = 0;
    const MIN: bool = true;
    const STORED_LEN: usize = 256;
    const STORED_BYTES: usize = 144;

    #[inline(always)]
    fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2] {
        scales_of_two::<S, 144>(s, blocks)
    }

    #[inline(always)]
    fn vector<S: Simd>(s: S, blocks: impl Blocks, i: usize) -> S::B {
        bits_twice(s, array(blocks.block::<144>(i / 4), 16 + i % 4 * 32), [0, 4], 15, 0)
    }
}

pub(super) struct Q5K;

impl Unpack for Q5K {
    const BLOCK: usize = 32;
    const OFFSET: u8 = 0;
    const MIN: bool = true;
    const STORED_LEN: usize = 256;
    const STORED_BYTES: usize = 176;

    #[inline(always)]
    fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2] {
        scales_of_two::<S, 176>(s, blocks)
    }

    #[inline(always)]
    fn vector<S: Simd>(s: S, blocks: impl Blocks, i: usize) -> S::B {
        let (block, group) = (blocks.block::<176>(i / 4), i % 4);
        let low = bits_twice(s, array(block, 48 + group * 32), [0, 4], 15, 0);
        let first = 2 * group as u32;
        s.or_bytes(low, bits_twice(s, array(block, 16), [first, first + 1], 1, 4))
    }
}

pub(super) struct Q6K;

impl Unpack for Q6K {
    const BLOCK: usize = 16;
    const OFFSET: u8 = 32;
    const MIN: bool = false;
    const STORED_LEN: usize = 256;
    const STORED_BYTES: usize = 210;

    #[inline(always)]
    fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2] {
        let bytes = blocks.block::<210>(0);
        let scales: &[u8; 16] = array(bytes, 192);
        // signed: 128 added, and subtracted again
        let (low, high) = scales.split_at(8);
        let biased = [low, high].map(|x| u64::from_le_bytes(*array(x, 0)) ^ 0x8080_8080_8080_8080);
        let scales = s.sub(s.load_u8(biased), s.splat(128.0));
        [s.mul(s.splat_f16(*array(bytes, 208)), scales), s.zero()]
    }

    #[inline(always)]
    fn vector<S: Simd>(s: S, blocks: impl Blocks, i: usize) -> S::B {
        let bytes = blocks.block::<210>(0);
        let (part, high) = (i / 2, i % 2);
        let x = s.load_halves(array(bytes, 64 * part), array(bytes, 64 * part + 32));
        let x = if high == 1 { s.shift_quarters(x, [4; 4]) } else { x };
        let first = 4 * high as u32;
        let top = bits_twice(s, array(bytes, 128 + 32 * part), [first, first + 2], 3, 4);
        s.or_bytes(s.and_bytes(x, s.bytes_of(15)), top)
    }
}

pub(super) struct Q2K;

impl Unpack for Q2K {
    const BLOCK: usize = 16;
    const OFFSET: u8 = 0;
    const MIN: bool = true;
    const STORED_LEN: usize = 256;
    const STORED_BYTES: usize = 84;

    #[inline(always)]
    fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2] {
        let bytes = blocks.block::<84>(0);
        let (d, d_min) = (s.splat_f16(*array(bytes, 80)), s.splat_f16(*array(bytes, 82)));
        let both = [0, 8].map(|at| u64::from_le_bytes(*array(bytes, at)));
        let scales = s.load_u8(both.map(|x| x & 0x0f0f_0f0f_0f0f_0f0f));
        let mins = s.load_u8(both.map(|x| x >> 4 & 0x0f0f_0f0f_0f0f_0f0f));
        [s.mul(d, scales), s.sub(s.splat(-0.0), s.mul(d_min, mins))]
    }

    #[inline(always)]
    fn vector<S: Simd>(s: S, blocks: impl Blocks, i: usize) -> S::B {
        let bytes = blocks.block::<84>(0);
        let first = 4 * (i % 2) as u32;
        bits_twice(s, array(bytes, 16 + 32 * (i / 2)), [first, first + 2], 3, 0)
    }
}

pub(super) struct Q3K;

impl Unpack for Q3K {
    const BLOCK: usize = 16;
    const OFFSET: u8 = 4;
    const MIN: bool = false;
    const STORED_LEN: usize = 256;
    const STORED_BYTES: usize = 110;

    #[inline(always)]
    fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2] {
        let bytes = blocks.block::<110>(0);
        // four bits in the first eight bytes, two in the last four
        let (x, top) = (u64::from_le_bytes(*array(bytes, 96)), word(bytes, 104));
        let four = 0x0f0f_0f0f_0f0f_0f0f;
        let two = |at: u32| u64::from(top >> at & 0x0303_0303) << 4;
        let low = x & four | two(0) | two(2) << 32;
        let high = x >> 4 & four | two(4) | two(6) << 32;
        let scales = s.sub(s.load_u8([low, high]), s.splat(32.0));
        [s.mul(s.splat_f16(*array(bytes, 108)), scales), s.zero()]
    }

    #[inline(always)]
    fn vector<S: Simd>(s: S, blocks: impl Blocks, i: usize) -> S::B {
        let bytes = blocks.block::<110>(0);
        let first = 4 * (i % 2) as u32;
        let low = bits_twice(s, array(bytes, 32 + 32 * (i / 2)), [first, first + 2], 3, 0);
        let bit = 2 * i as u32;
        s.or_bytes(low, bits_twice(s, array(bytes, 0), [bit, bit + 1], 1, 2))
    }
}

pub(super) struct Iq4Xs;

impl Unpack for Iq4Xs {
    const BLOCK: usize = 32;
    const OFFSET: u8 = 128;
    const MIN: bool = false;
    const STORED_LEN: usize = 256;
    const STORED_BYTES: usize = 136;

    #[inline(always)]
    fn scales<S: Simd>(s: S, blocks: impl Blocks) -> [S::V; 2] {
        let mut scales = [0u64; 2];
        for (i, scales) in scales.iter_mut().enumerate() {
            let block = blocks.block::<136>(i);
            let high = u16::from_le_bytes(*array(block, 2));
            *scales = u64::from_le_bytes(std::array::from_fn(|j| {
                let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
                low | ((high >> (2 * j)) as u8 & 3) << 4
            }));
        }
        let d = s.halves_f16(*array(blocks.block::<136>(0), 0), *array(blocks.block::<136>(1), 0));
        [s.mul(d, s.sub(s.load_u8(scales), s.splat(32.0))), s.zero()]
    }

    #[inline(always)]
    fn vector<S: Simd>(s: S, blocks: impl Blocks, i: usize) -> S::B {
        let (block, at) = (blocks.block::<136>(i / 4), 8 + i % 4 * 32);
        s.lookup(&LEVELS, nibbles_of_two(s, array(block, at), array(block, at + 16)))
    }
}
