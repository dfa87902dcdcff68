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

#[inline(always)]
fn places<const N: usize>(out: &mut [u8; CHUNK], at: usize) -> &mut [u8; N] {
    (&mut out[at..at + N]).try_into().expect("as many as asked for")
}

/// Low nibbles to `low`, high ones to `high`.
#[inline(always)]
fn nibbles<const N: usize>(bytes: &[u8; N], q: &mut [u8; CHUNK], low: usize, high: usize) {
    let out = places::<N>(q, low);
    for i in 0..N {
        out[i] = bytes[i] & 15;
    }
    let out = places::<N>(q, high);
    for i in 0..N {
        out[i] = bytes[i] >> 4;
    }
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

/// Bits `at..at + 32` of a number as bytes of `1 << to` or 0.
#[inline(always)]
fn spread(bits: u32, to: u32) -> [u8; 32] {
    let bytes = bits.to_le_bytes();
    let mut out = [0; 32];
    for (i, out) in out.iter_mut().enumerate() {
        *out = (bytes[i / 8] >> (i % 8) & 1) << to;
    }
    out
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
    nibbles::<16>(array(block, 2), q, at, at + 16);
});
simple_blocks!(Q4_1, 20, offset 0, min true, |block, q, at| {
    nibbles::<16>(array(block, 4), q, at, at + 16);
});
simple_blocks!(Q5_0, 22, offset 16, min false, |block, q, at| {
    nibbles::<16>(array(block, 6), q, at, at + 16);
    let high = spread(word(block, 2), 4);
    places::<32>(q, at).iter_mut().zip(high).for_each(|(q, high)| *q |= high);
});
simple_blocks!(Q5_1, 24, offset 0, min true, |block, q, at| {
    nibbles::<16>(array(block, 8), q, at, at + 16);
    let high = spread(word(block, 4), 4);
    places::<32>(q, at).iter_mut().zip(high).for_each(|(q, high)| *q |= high);
});
simple_blocks!(Q8_0, 34, offset 128, min false, |block, q, at| {
    let (from, out) = (array::<32>(block, 2), places::<32>(q, at));
    for i in 0..32 {
        out[i] = from[i] ^ 0x80;
    }
});
simple_blocks!(Iq4Nl, 18, offset 128, min false, |block, q, at| {
    let from = array::<16>(block, 2);
    let out = places::<32>(q, at);
    for i in 0..16 {
        out[i] = LEVELS[usize::from(from[i] & 15)];
        out[i + 16] = LEVELS[usize::from(from[i] >> 4)];
    }
});

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
                let at = 256 * i + 64 * group;
                nibbles::<32>(array(block, 16 + 32 * group), &mut out.q, at, at + 32);
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
            let high: &[u8; 32] = array(block, 16);
            for group in 0..4 {
                let (from, at) = (array::<32>(block, 48 + 32 * group), 256 * i + 64 * group);
                let low = places::<32>(&mut out.q, at);
                for l in 0..32 {
                    low[l] = from[l] & 15 | (high[l] >> (2 * group) & 1) << 4;
                }
                let top = places::<32>(&mut out.q, at + 32);
                for l in 0..32 {
                    top[l] = from[l] >> 4 | (high[l] >> (2 * group + 1) & 1) << 4;
                }
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
            let (a, b): (&[u8; 32], &[u8; 32]) = (array(block, 64 * part), array(block, 64 * part + 32));
            let high: &[u8; 32] = array(block, 128 + 32 * part);
            let to = places::<32>(&mut out.q, 128 * part);
            for l in 0..32 {
                to[l] = a[l] & 15 | (high[l] & 3) << 4;
            }
            let to = places::<32>(&mut out.q, 128 * part + 32);
            for l in 0..32 {
                to[l] = b[l] & 15 | (high[l] >> 2 & 3) << 4;
            }
            let to = places::<32>(&mut out.q, 128 * part + 64);
            for l in 0..32 {
                to[l] = a[l] >> 4 | (high[l] >> 4 & 3) << 4;
            }
            let to = places::<32>(&mut out.q, 128 * part + 96);
            for l in 0..32 {
                to[l] = b[l] >> 4 | (high[l] >> 6) << 4;
            }
        }
    }
}

/// Two bits of each of 32 bytes, four times over: elements `128 part + 32 j` on have the bits `2 j` on.
#[inline(always)]
fn two_bits(from: &[u8; 32], q: &mut [u8; CHUNK], part: usize) {
    for j in 0..4 {
        let to = places::<32>(q, 128 * part + 32 * j);
        for l in 0..32 {
            to[l] = from[l] >> (2 * j) & 3;
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
            two_bits(array(block, 16 + 32 * part), &mut out.q, part);
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
        let mask: &[u8; 32] = array(block, 0);
        for part in 0..2 {
            two_bits(array(block, 32 + 32 * part), &mut out.q, part);
            for j in 0..4 {
                let to = places::<32>(&mut out.q, 128 * part + 32 * j);
                for l in 0..32 {
                    to[l] |= (mask[l] >> (4 * part + j) & 1) << 2;
                }
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
                let from = array::<16>(block, 8 + 16 * j);
                let to = places::<32>(&mut out.q, 256 * i + 32 * j);
                for l in 0..16 {
                    to[l] = LEVELS[usize::from(from[l] & 15)];
                    to[l + 16] = LEVELS[usize::from(from[l] >> 4)];
                }
            }
        }
    }
}
