//! From numbers to blocks.

use half::f16;

use super::bits::{pack, pack_eight, pack_fifth, pack_pairs, pack_sixteen};
use super::search::{Iq4, Levels, Points, Whole, clamp, steps};
use super::super_blocks::{Pairs, Singles};
use super::{BlockFormat, IQ4_LEVELS};

/// Numbers beyond are taken for this one: the largest that a block can hold is below, and squares stay finite.
const LARGEST: f32 = 1e9;
/// The largest finite f16.
const LARGEST_SCALE: f32 = 65504.0;

/// Why numbers are not encoded.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// A number is NaN or infinite.
    #[error("column {column}: expected a finite number, got {got}")]
    NotFinite {
        /// Where.
        column: usize,
        /// What was found.
        got: f32,
    },
    /// An importance is negative, NaN or infinite.
    #[error("column {column}: expected an importance that is finite and not negative, got {got}")]
    Importance {
        /// Where.
        column: usize,
        /// What was found.
        got: f32,
    },
}

/// Encodes a row, or any number of whole blocks of it, with scales of least error `sum of w (x - decoded)^2`.
///
/// With an importance of each column (the mean square of a linear layer's inputs) w is that importance, which makes it the
/// expected square of the error of the layer's output, as far as inputs are uncorrelated. Without, an error weighs more
/// where numbers are large. A block whose importance is all zero is encoded as if there were none. Numbers too large for
/// a format are encoded as its largest.
///
/// Inlined, so that it is compiled for the instructions of its caller; no bit depends on them.
///
/// # Errors
/// A number is not finite, or an importance is negative or not finite; `out` is then undefined.
///
/// # Panics
/// When `importance` or `out` are not as long as `x` asks for.
#[inline(always)]
pub fn encode(
    format: BlockFormat,
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), EncodeError> {
    assert_eq!(Some(out.len()), format.row_bytes(x.len()), "encode: {} weights as {format:?}", x.len());
    assert!(importance.is_none_or(|w| w.len() == x.len()), "encode: an importance of each column");
    if let Some(column) = x.iter().position(|x| !x.is_finite()) {
        return Err(EncodeError::NotFinite { column, got: x[column] });
    }
    let wrong = |w: &f32| !w.is_finite() || *w < 0.0;
    if let Some((w, column)) = importance.and_then(|w| Some((w, w.iter().position(wrong)?))) {
        return Err(EncodeError::Importance { column, got: w[column] });
    }
    match format {
        BlockFormat::Q4_0 => each(x, importance, out, q4_0),
        BlockFormat::Q5_0 => each(x, importance, out, q5_0),
        BlockFormat::Q8_0 => each(x, importance, out, q8_0),
        BlockFormat::Q4_1 => each(x, importance, out, q4_1),
        BlockFormat::Q5_1 => each(x, importance, out, q5_1),
        BlockFormat::Q2K => each(x, importance, out, q2_k),
        BlockFormat::Q4K => each(x, importance, out, q4_k),
        BlockFormat::Q5K => each(x, importance, out, q5_k),
        BlockFormat::Q3K => each(x, importance, out, q3_k),
        BlockFormat::Q6K => each(x, importance, out, q6_k),
        BlockFormat::Iq4Nl => each(x, importance, out, iq4_nl),
        BlockFormat::Iq4Xs => each(x, importance, out, iq4_xs),
    }
    Ok(())
}

#[inline(always)]
fn q4_0(p: Points<'_, 32>, block: &mut [u8; 18]) {
    let spans = steps(-9.5, 0.25, 9).chain(steps(6.75, 0.25, 8));
    let (scale, codes) = scaled(p, Whole { low: -8.0, high: 7.0 }, spans);
    put(block, 0, scale);
    pack(&codes.map(|code| (code + 8.0) as u8), 4, 16, 0, &mut block[2..]);
}

#[inline(always)]
fn q5_0(p: Points<'_, 32>, block: &mut [u8; 22]) {
    let spans = steps(-17.5, 0.25, 9).chain(steps(14.5, 0.25, 8));
    let (scale, codes) = scaled(p, Whole { low: -16.0, high: 15.0 }, spans);
    put(block, 0, scale);
    let codes = codes.map(|code| (code + 16.0) as u8);
    block[2..6].copy_from_slice(&pack_fifth(&codes));
    pack(&codes, 4, 16, 0, &mut block[6..]);
}

#[inline(always)]
fn q8_0(p: Points<'_, 32>, block: &mut [u8; 34]) {
    let spans = steps(-128.5, 0.25, 7).chain(steps(126.0, 0.25, 7));
    let (scale, codes) = scaled(p, Whole { low: -128.0, high: 127.0 }, spans);
    put(block, 0, scale);
    for (byte, code) in block[2..].iter_mut().zip(codes) {
        *byte = (code as i8).cast_unsigned();
    }
}

#[inline(always)]
fn q4_1(p: Points<'_, 32>, block: &mut [u8; 20]) {
    let (line, codes) = offset(p, 15.0, steps(14.0, 0.25, 11));
    put(block, 0, line[0]);
    put(block, 2, line[1]);
    pack(&codes, 4, 16, 0, &mut block[4..]);
}

#[inline(always)]
fn q5_1(p: Points<'_, 32>, block: &mut [u8; 24]) {
    let (line, codes) = offset(p, 31.0, steps(29.75, 0.25, 12));
    put(block, 0, line[0]);
    put(block, 2, line[1]);
    block[4..8].copy_from_slice(&pack_fifth(&codes));
    pack(&codes, 4, 16, 0, &mut block[8..]);
}

#[inline(always)]
fn q2_k(p: Points<'_, 256>, block: &mut [u8; 84]) {
    let Pairs { scale, min, scales, mins, codes } = Pairs::<16, 16>::find(p, 3.0, 15.0);
    for j in 0..16 {
        block[j] = scales[j] | mins[j] << 4;
    }
    pack(&codes, 2, 32, 0, &mut block[16..80]);
    put(block, 80, scale);
    put(block, 82, min);
}

#[inline(always)]
fn q4_k(p: Points<'_, 256>, block: &mut [u8; 144]) {
    let found = Pairs::<32, 8>::find(p, 15.0, 63.0);
    put(block, 0, found.scale);
    put(block, 2, found.min);
    block[4..16].copy_from_slice(&pack_pairs(&[found.scales, found.mins]));
    pack(&found.codes, 4, 32, 0, &mut block[16..]);
}

#[inline(always)]
fn q5_k(p: Points<'_, 256>, block: &mut [u8; 176]) {
    let found = Pairs::<32, 8>::find(p, 31.0, 63.0);
    put(block, 0, found.scale);
    put(block, 2, found.min);
    block[4..16].copy_from_slice(&pack_pairs(&[found.scales, found.mins]));
    pack(&found.codes, 1, 32, 4, &mut block[16..48]);
    pack(&found.codes, 4, 32, 0, &mut block[48..]);
}

#[inline(always)]
fn q3_k(p: Points<'_, 256>, block: &mut [u8; 110]) {
    let spans = steps(-5.0, 0.25, 8).chain(steps(2.5, 0.25, 7));
    let found = Singles::<16, 16>::find(p, Whole { low: -4.0, high: 3.0 }, &spans, 32);
    let codes = found.levels.map(|level| (level + 4.0) as u8);
    pack(&codes, 1, 32, 2, &mut block[..32]);
    pack(&codes, 2, 32, 0, &mut block[32..96]);
    let scales = found.scales.map(|scale| (scale + 32) as u8);
    block[96..108].copy_from_slice(&pack_sixteen(&scales));
    put(block, 108, found.scale);
}

#[inline(always)]
fn q6_k(p: Points<'_, 256>, block: &mut [u8; 210]) {
    let spans = steps(-33.0, 0.25, 8).chain(steps(30.0, 0.25, 7));
    let found = Singles::<16, 16>::find(p, Whole { low: -32.0, high: 31.0 }, &spans, 128);
    let codes = found.levels.map(|level| (level + 32.0) as u8);
    pack(&codes, 4, 64, 0, &mut block[..128]);
    pack(&codes, 2, 32, 4, &mut block[128..192]);
    for (byte, scale) in block[192..208].iter_mut().zip(found.scales) {
        *byte = (scale as i8).cast_unsigned();
    }
    put(block, 208, found.scale);
}

#[inline(always)]
fn iq4_nl(p: Points<'_, 32>, block: &mut [u8; 18]) {
    let (scale, levels) = scaled(p, Iq4, iq4_spans());
    put(block, 0, scale);
    pack(&levels.map(iq4_code), 4, 16, 0, &mut block[2..]);
}

#[inline(always)]
fn iq4_xs(p: Points<'_, 256>, block: &mut [u8; 136]) {
    let found = Singles::<32, 8>::find(p, Iq4, &iq4_spans(), 32);
    put(block, 0, found.scale);
    let (high, low) = pack_eight(found.scales.map(|scale| (scale + 32) as u8));
    block[2..4].copy_from_slice(&high);
    block[4..8].copy_from_slice(&low);
    pack(&found.levels.map(iq4_code), 4, 16, 0, &mut block[8..]);
}

#[inline(always)]
fn iq4_spans() -> impl Iterator<Item = f32> + Clone {
    steps(-144.0, 4.0, 9).chain(steps(97.0, 4.0, 9))
}

#[inline(always)]
fn iq4_code(level: f32) -> u8 {
    IQ4_LEVELS.iter().filter(|other| f32::from(**other) < level).count() as u8
}

/// Encodes block by block.
#[inline(always)]
fn each<const B: usize, const N: usize>(
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    encode: impl Fn(Points<'_, N>, &mut [u8; B]),
) {
    let ((xs, _), (blocks, _)) = (x.as_chunks::<N>(), out.as_chunks_mut::<B>());
    for (i, (x, block)) in xs.iter().zip(blocks).enumerate() {
        block.fill(0);
        let x = x.map(|x| clamp(x, -LARGEST, LARGEST));
        let importance = importance.and_then(|w| w[i * N..].first_chunk());
        encode(Points { x: &x, w: &weights(&x, importance) }, block);
    }
}

/// What an error of each number weighs; at most 1.
#[inline(always)]
fn weights<const N: usize>(x: &[f32; N], importance: Option<&[f32; N]>) -> [f32; N] {
    let largest = |w: &[f32; N]| w.iter().fold(0.0f32, |most, &w| if w > most { w } else { most });
    if let Some(w) = importance {
        let most = largest(w);
        if most > 0.0 {
            return w.map(|w| w / most);
        }
    }
    let mean = (x.iter().map(|x| x * x).sum::<f32>() / N as f32).sqrt();
    let w = x.map(|x| mean + x.abs());
    let most = largest(&w);
    if most > 0.0 { w.map(|w| w / most) } else { [1.0; N] }
}

/// A scale and the levels under it.
#[inline(always)]
fn scaled<const N: usize>(
    p: Points<'_, N>,
    levels: impl Levels,
    spans: impl Iterator<Item = f32>,
) -> (f16, [f32; N]) {
    let scale = scale(p.scale(levels, spans));
    let inverse = inverse(scale.to_f32());
    (scale, p.x.map(|x| levels.nearest(x * inverse)))
}

/// A scale and a minimum, and the codes under them.
#[inline(always)]
fn offset<const N: usize>(
    p: Points<'_, N>,
    high: f32,
    spans: impl Iterator<Item = f32> + Clone,
) -> ([f16; 2], [u8; N]) {
    let line = p.line(high, f32::INFINITY, spans);
    let line = [scale(line.0), scale(line.1)];
    let (inverse, min) = (inverse(line[0].to_f32()), line[1].to_f32());
    let codes = Whole { low: 0.0, high };
    (line, p.x.map(|x| codes.nearest((x - min) * inverse) as u8))
}

/// The nearest scale that blocks can hold.
#[inline(always)]
pub(super) fn scale(x: f32) -> f16 {
    f16::from_f32(clamp(x, -LARGEST_SCALE, LARGEST_SCALE))
}

/// The reciprocal, or 0 where there is none.
#[inline(always)]
pub(super) fn inverse(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}

#[inline(always)]
fn put(block: &mut [u8], at: usize, scale: f16) {
    block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
}
