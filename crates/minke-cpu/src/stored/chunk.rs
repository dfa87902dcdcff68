//! Sixteen blocks of a stored row, unpacked: small unsigned integers, and a scale and a minimum for each block.
//!
//! A weight of block b is `scale_b (q - OFFSET) + min_b`. Layouts are those of ggml (`ggml-common.h`), where the elements of
//! a byte are not always neighbours; unpacked they are in the order of the row.

use crate::simd::{LANES, Simd};

/// Blocks that are taken together, a lane each.
pub(super) const BLOCKS: usize = LANES;

/// Elements of the longest chunk.
pub(super) const CHUNK: usize = 32 * BLOCKS;

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

    /// Unpacks up to a chunk: `bytes` are whole stored blocks. Blocks that are not there keep what was there.
    fn unpack<S: Simd>(s: S, bytes: &[u8], out: &mut Chunk);
}

/// Blocks, unpacked.
#[repr(C, align(64))]
pub(super) struct Chunk {
    /// The integers, block after block.
    pub q: [u8; CHUNK],
    /// A scale for each block.
    pub scale: [f32; BLOCKS],
    /// What is added to each element of a block.
    pub min: [f32; BLOCKS],
}

impl Chunk {
    /// All zero.
    pub const ZERO: Self = Self { q: [0; CHUNK], scale: [0.0; BLOCKS], min: [0.0; BLOCKS] };
}

/// The f16 of two bytes, exactly; infinity and NaN too.
#[inline(always)]
pub(super) fn half(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes));
    // the exponent moved to its place, its bias mended by a product, which is exact for subnormals as well
    let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let whole = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(size.to_bits() | whole | (bits & 0x8000) << 16)
}

#[inline(always)]
fn array<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..at + N].try_into().expect("as many as asked for")
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*array(bytes, at))
}

/// Eight bytes each with the same bits.
const fn all(byte: u8) -> u64 {
    0x0101_0101_0101_0101 * byte as u64
}

/// Bytes `at..at + 8 N`, eight to a number: what is done to each byte is done to eight of them.
#[inline(always)]
fn eights<const N: usize>(bytes: &[u8], at: usize) -> [u64; N] {
    let (whole, _) = bytes[at..at + 8 * N].as_chunks::<8>();
    std::array::from_fn(|i| u64::from_le_bytes(whole[i]))
}

/// Writes them at `at`.
#[inline(always)]
fn put<const N: usize>(x: [u64; N], q: &mut [u8; CHUNK], at: usize) {
    let (whole, _) = q[at..at + 8 * N].as_chunks_mut::<8>();
    for (out, x) in whole.iter_mut().zip(x) {
        *out = x.to_le_bytes();
    }
}

/// The low nibbles of bytes.
#[inline(always)]
fn low<const N: usize>(x: [u64; N]) -> [u64; N] {
    x.map(|x| x & all(15))
}

/// The high ones.
#[inline(always)]
fn high<const N: usize>(x: [u64; N]) -> [u64; N] {
    x.map(|x| x >> 4 & all(15))
}

/// Bits `from..` of each byte, as many as `mask` has, moved to `to..`.
#[inline(always)]
fn bits<const N: usize>(x: [u64; N], from: usize, mask: u8, to: usize) -> [u64; N] {
    x.map(|x| (x >> from & all(mask)) << to)
}

#[inline(always)]
fn join<const N: usize>(a: [u64; N], b: [u64; N]) -> [u64; N] {
    std::array::from_fn(|i| a[i] | b[i])
}

/// Scales in f16 at the beginning of each stored block.
#[inline(always)]
fn half_scales<S: Simd, const BYTES: usize, const AT: usize>(s: S, bytes: &[u8], out: &mut [f32; BLOCKS]) {
    let mut halves = [0u16; BLOCKS];
    for (half, block) in halves.iter_mut().zip(bytes.chunks_exact(BYTES)) {
        *half = u16::from_le_bytes(*array(block, AT));
    }
    s.store(s.load_f16(&halves), out);
}

/// The 32 bits of a number as bytes of 16 or 0.
#[inline(always)]
fn sixteens(bits: u32) -> [u64; 4] {
    bits.to_le_bytes().map(|bits| {
        // bit i in byte i, whatever stands there made 1, then 16
        let spread = all(1) * u64::from(bits) & 0x8040_2010_0804_0201;
        (spread + all(0x7f)) >> 3 & all(16)
    })
}

/// Sixteen bytes: low nibbles, then high ones.
#[inline(always)]
fn halves_of_sixteen(bytes: &[u8], at: usize) -> [u64; 4] {
    let x = eights::<2>(bytes, at);
    let ([a, b], [c, d]) = (low(x), high(x));
    [a, b, c, d]
}

macro_rules! simple_blocks {
    ($name:ident, $bytes:literal, offset $offset:literal, min $min:literal, |$block:ident, $q:ident, $at:ident| $body:block) => {
        pub(super) struct $name;

        impl Unpack for $name {
            const BLOCK: usize = 32;
            const OFFSET: u8 = $offset;
            const MIN: bool = $min;
            const STORED_LEN: usize = 32;
            const STORED_BYTES: usize = $bytes;

            #[inline(always)]
            fn unpack<S: Simd>(s: S, bytes: &[u8], out: &mut Chunk) {
                half_scales::<S, $bytes, 0>(s, bytes, &mut out.scale);
                if $min {
                    half_scales::<S, $bytes, 2>(s, bytes, &mut out.min);
                }
                let $q = &mut out.q;
                for (i, block) in bytes.chunks_exact($bytes).enumerate() {
                    let $block: &[u8; $bytes] = array(block, 0);
                    let $at = 32 * i;
                    $body
                }
            }
        }
    };
}

simple_blocks!(Q4_0, 18, offset 8, min false, |block, q, at| {
    put(halves_of_sixteen(block, 2), q, at);
});
simple_blocks!(Q4_1, 20, offset 0, min true, |block, q, at| {
    put(halves_of_sixteen(block, 4), q, at);
});
simple_blocks!(Q5_0, 22, offset 16, min false, |block, q, at| {
    put(join(halves_of_sixteen(block, 6), sixteens(word(block, 2))), q, at);
});
simple_blocks!(Q5_1, 24, offset 0, min true, |block, q, at| {
    put(join(halves_of_sixteen(block, 8), sixteens(word(block, 4))), q, at);
});
simple_blocks!(Q8_0, 34, offset 128, min false, |block, q, at| {
    put(eights::<4>(block, 2).map(|x| x ^ all(0x80)), q, at);
});
simple_blocks!(Iq4Nl, 18, offset 128, min false, |block, q, at| {
    levels(array(block, 2), q, at);
});

/// Sixteen bytes of two levels each.
#[inline(always)]
fn levels(from: &[u8; 16], q: &mut [u8; CHUNK], at: usize) {
    let (low, high) = q[at..at + 32].split_at_mut(16);
    for ((low, high), x) in low.iter_mut().zip(high).zip(from) {
        (*low, *high) = (LEVELS[usize::from(x & 15)], LEVELS[usize::from(x >> 4)]);
    }
}

/// The levels of IQ4 formats, with 128 added (ggml, `kvalues_iq4nl`).
const LEVELS: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// Eight scales and eight minima of 6 bits, in twelve bytes (ggml, `get_scale_min_k4`): two numbers of eight bytes.
#[inline(always)]
fn six_bits(bytes: &[u8; 12]) -> [[u8; 8]; 2] {
    let [a, b, c] = [word(bytes, 0), word(bytes, 4), word(bytes, 8)];
    let (low, two) = (0x3f3f_3f3f, 0x0303_0303);
    let join = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let scales = join(a & low, c & 0x0f0f_0f0f | (a >> 6 & two) << 4);
    let mins = join(b & low, c >> 4 & 0x0f0f_0f0f | (b >> 6 & two) << 4);
    [scales, mins]
}

/// `scale[i] = d sc[i]`, `min[i] = -(dmin m[i])` of eight blocks.
#[inline(always)]
fn scales_of_eight(block: &[u8], at: usize, out: &mut Chunk) {
    let (d, d_min) = (half(*array(block, 0)), half(*array(block, 2)));
    let [scales, mins] = six_bits(array(block, 4));
    for i in 0..8 {
        out.scale[at + i] = d * f32::from(scales[i]);
        out.min[at + i] = -(d_min * f32::from(mins[i]));
    }
}

pub(super) struct Q4K;

impl Unpack for Q4K {
    const BLOCK: usize = 32;
    const OFFSET: u8 = 0;
    const MIN: bool = true;
    const STORED_LEN: usize = 256;
    const STORED_BYTES: usize = 144;

    #[inline(always)]
    fn unpack<S: Simd>(_s: S, bytes: &[u8], out: &mut Chunk) {
        for (i, block) in bytes.chunks_exact(144).enumerate() {
            scales_of_eight(block, 8 * i, out);
            for group in 0..4 {
                let (x, at) = (eights::<4>(block, 16 + 32 * group), 256 * i + 64 * group);
                put(low(x), &mut out.q, at);
                put(high(x), &mut out.q, at + 32);
            }
        }
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
    fn unpack<S: Simd>(_s: S, bytes: &[u8], out: &mut Chunk) {
        for (i, block) in bytes.chunks_exact(176).enumerate() {
            scales_of_eight(block, 8 * i, out);
            let fifth = eights::<4>(block, 16);
            for group in 0..4 {
                let (x, at) = (eights::<4>(block, 48 + 32 * group), 256 * i + 64 * group);
                put(join(low(x), bits(fifth, 2 * group, 1, 4)), &mut out.q, at);
                put(join(high(x), bits(fifth, 2 * group + 1, 1, 4)), &mut out.q, at + 32);
            }
        }
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
    fn unpack<S: Simd>(_s: S, bytes: &[u8], out: &mut Chunk) {
        let block: &[u8; 210] = array(bytes, 0);
        let d = half(*array(block, 208));
        let scales: &[u8; 16] = array(block, 192);
        for i in 0..16 {
            out.scale[i] = d * f32::from(scales[i].cast_signed());
        }
        for part in 0..2 {
            let (a, b) = (eights::<4>(block, 64 * part), eights::<4>(block, 64 * part + 32));
            let (top, at) = (eights::<4>(block, 128 + 32 * part), 128 * part);
            put(join(low(a), bits(top, 0, 3, 4)), &mut out.q, at);
            put(join(low(b), bits(top, 2, 3, 4)), &mut out.q, at + 32);
            put(join(high(a), bits(top, 4, 3, 4)), &mut out.q, at + 64);
            put(join(high(b), bits(top, 6, 3, 4)), &mut out.q, at + 96);
        }
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
    fn unpack<S: Simd>(_s: S, bytes: &[u8], out: &mut Chunk) {
        let block: &[u8; 84] = array(bytes, 0);
        let (d, d_min) = (half(*array(block, 80)), half(*array(block, 82)));
        for i in 0..16 {
            out.scale[i] = d * f32::from(block[i] & 15);
            out.min[i] = -(d_min * f32::from(block[i] >> 4));
        }
        for part in 0..2 {
            let x = eights::<4>(block, 16 + 32 * part);
            for j in 0..4 {
                put(bits(x, 2 * j, 3, 0), &mut out.q, 128 * part + 32 * j);
            }
        }
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
    fn unpack<S: Simd>(_s: S, bytes: &[u8], out: &mut Chunk) {
        let block: &[u8; 110] = array(bytes, 0);
        let d = half(*array(block, 108));
        let packed: &[u8; 12] = array(block, 96);
        for i in 0..16 {
            // four bits in the first eight bytes, two in the last four
            let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
            let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
            out.scale[i] = d * (f32::from(low | high << 4) - 32.0);
        }
        let third = eights::<4>(block, 0);
        for part in 0..2 {
            let x = eights::<4>(block, 32 + 32 * part);
            for j in 0..4 {
                let x = join(bits(x, 2 * j, 3, 0), bits(third, 4 * part + j, 1, 2));
                put(x, &mut out.q, 128 * part + 32 * j);
            }
        }
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
    fn unpack<S: Simd>(_s: S, bytes: &[u8], out: &mut Chunk) {
        for (i, block) in bytes.chunks_exact(136).enumerate() {
            let d = half(*array(block, 0));
            let high = u16::from_le_bytes(*array(block, 2));
            for j in 0..8 {
                let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
                let scale = low | ((high >> (2 * j)) as u8 & 3) << 4;
                out.scale[8 * i + j] = d * (f32::from(scale) - 32.0);
                levels(array(block, 8 + 16 * j), &mut out.q, 256 * i + 32 * j);
            }
        }
    }
}
