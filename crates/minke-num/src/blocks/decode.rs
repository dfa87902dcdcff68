//! From blocks to numbers.

use half::f16;

use super::bits::{unpack, unpack_eight, unpack_fifth, unpack_pairs, unpack_sixteen};
use super::{BlockFormat, IQ4_LEVELS};

/// The numbers of whole blocks along a row: `scale * code`, or `scale * code + minimum`, rounded to f32 after each
/// operation, as ggml's reference computes them (`dequantize_row_*`), to the bit.
///
/// Bytes from outside give some numbers whatever they are; scales that are not finite give numbers that are not.
///
/// # Panics
/// When `bytes` are not those of as many weights as `out` has.
pub fn decode(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), format.row_bytes(out.len()), "decode: {} weights of {format:?}", out.len());
    match format {
        BlockFormat::Q4_0 => each(bytes, out, |block: &[u8; 18], out: &mut [f32; 32]| {
            scaled(half(block, 0), &nibbles(&block[2..]), 8, out);
        }),
        BlockFormat::Q4_1 => each(bytes, out, |block: &[u8; 20], out: &mut [f32; 32]| {
            offset(half(block, 0), half(block, 2), &nibbles(&block[4..]), out);
        }),
        BlockFormat::Q5_0 => each(bytes, out, |block: &[u8; 22], out: &mut [f32; 32]| {
            let mut codes = nibbles(&block[6..]);
            unpack_fifth(part(block, 2), &mut codes);
            scaled(half(block, 0), &codes, 16, out);
        }),
        BlockFormat::Q5_1 => each(bytes, out, |block: &[u8; 24], out: &mut [f32; 32]| {
            let mut codes = nibbles(&block[8..]);
            unpack_fifth(part(block, 4), &mut codes);
            offset(half(block, 0), half(block, 2), &codes, out);
        }),
        BlockFormat::Q8_0 => each(bytes, out, |block: &[u8; 34], out: &mut [f32; 32]| {
            let scale = half(block, 0);
            for (x, code) in out.iter_mut().zip(&block[2..]) {
                *x = f32::from(code.cast_signed()) * scale;
            }
        }),
        BlockFormat::Q2K => each(bytes, out, q2_k),
        BlockFormat::Q3K => each(bytes, out, q3_k),
        BlockFormat::Q4K => each(bytes, out, |block: &[u8; 144], out: &mut [f32; 256]| {
            let mut codes = [0; 256];
            unpack(&block[16..], 4, 32, 0, &mut codes);
            of_pairs([half(block, 0), half(block, 2)], &part(block, 4), &codes, out);
        }),
        BlockFormat::Q5K => each(bytes, out, |block: &[u8; 176], out: &mut [f32; 256]| {
            let mut codes = [0; 256];
            unpack(&block[48..], 4, 32, 0, &mut codes);
            unpack(&block[16..48], 1, 32, 4, &mut codes);
            of_pairs([half(block, 0), half(block, 2)], &part(block, 4), &codes, out);
        }),
        BlockFormat::Q6K => each(bytes, out, q6_k),
        BlockFormat::Iq4Nl => each(bytes, out, |block: &[u8; 18], out: &mut [f32; 32]| {
            levels(half(block, 0), &nibbles(&block[2..]), out);
        }),
        BlockFormat::Iq4Xs => each(bytes, out, iq4_xs),
    }
}

fn each<const B: usize, const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn(&[u8; B], &mut [f32; N])) {
    let ((blocks, _), (outs, _)) = (bytes.as_chunks(), out.as_chunks_mut());
    blocks.iter().zip(outs).for_each(|(block, out)| f(block, out));
}

/// Bytes of a block, from `at` on.
#[inline]
fn part<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| block[at + i])
}

#[inline]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes(part(block, at)).to_f32()
}

#[inline]
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    let mut codes = [0; 32];
    unpack(bytes, 4, 16, 0, &mut codes);
    codes
}

#[inline]
fn scaled(scale: f32, codes: &[u8], zero: i8, out: &mut [f32]) {
    for (x, code) in out.iter_mut().zip(codes) {
        *x = scale * f32::from(code.cast_signed() - zero);
    }
}

#[inline]
fn offset(scale: f32, min: f32, codes: &[u8], out: &mut [f32]) {
    for (x, code) in out.iter_mut().zip(codes) {
        *x = scale * f32::from(*code) + min;
    }
}

#[inline]
fn levels(scale: f32, codes: &[u8], out: &mut [f32]) {
    for (x, code) in out.iter_mut().zip(codes) {
        *x = scale * f32::from(IQ4_LEVELS[usize::from(*code & 15)]);
    }
}

fn of_pairs([scale, min]: [f32; 2], packed: &[u8; 12], codes: &[u8; 256], out: &mut [f32; 256]) {
    let [scales, mins] = unpack_pairs(packed);
    for (j, (out, codes)) in out.chunks_exact_mut(32).zip(codes.chunks_exact(32)).enumerate() {
        offset(scale * f32::from(scales[j]), -(min * f32::from(mins[j])), codes, out);
    }
}

fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack(&block[16..80], 2, 32, 0, &mut codes);
    let (scale, min) = (half(block, 80), half(block, 82));
    for (j, (out, codes)) in out.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate() {
        offset(scale * f32::from(block[j] & 15), -(min * f32::from(block[j] >> 4)), codes, out);
    }
}

fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack(&block[32..96], 2, 32, 0, &mut codes);
    unpack(&block[..32], 1, 32, 2, &mut codes);
    let (scale, scales) = (half(block, 108), unpack_sixteen(&part(block, 96)));
    for (j, (out, codes)) in out.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate() {
        scaled(scale * f32::from(scales[j].cast_signed() - 32), codes, 4, out);
    }
}

fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack(&block[..128], 4, 64, 0, &mut codes);
    unpack(&block[128..192], 2, 32, 4, &mut codes);
    let scale = half(block, 208);
    for (j, (out, codes)) in out.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate() {
        scaled(scale * f32::from(block[192 + j].cast_signed()), codes, 32, out);
    }
}

fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let scale = half(block, 0);
    let scales = unpack_eight(part(block, 2), part(block, 4));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let codes = nibbles(&block[8 + 16 * j..][..16]);
        levels(scale * f32::from(scales[j].cast_signed() - 32), &codes, out);
    }
}
