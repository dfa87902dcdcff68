//! Keys and values in 8 bits: codes, and a bf16 scale for each 32 of them, as in ggml's Q8_0.
//!
//! A number is `code * scale`, exactly an f32. A panel of keys is codes `[qk][32]` and scales `[ceil(qk / 32)][32]`, one
//! column per position; a panel of values is codes `[64][32]` and scales `[64]`, one line per position. Both are
//! unpacked by whole lines, into what a cache without codes would hold, so products are the same.
//!
//! Elements are coded when they are appended: `scale = max |x| / 127`, `code = round(x / scale)`. Among 32 elements of
//! which one is no number none is.

use minke_num::bf16;

use crate::gemm::engine::Engine;
use crate::gemm::tile::PANEL;
use crate::simd::{LANES, Simd, WHOLE};
use crate::view::View;

use super::BLOCK;

/// Elements of a position that share a scale: those that a panel of values has of it.
const SHARED: usize = PANEL;

/// Codes of one depth for all positions of a panel of keys, or of one position in a panel of values.
type Line = [i8; PANEL];

/// Words of one panel of keys.
pub fn key_panel(qk_dim: usize) -> usize {
    (qk_dim * size_of::<Line>() + qk_dim.div_ceil(SHARED) * PANEL * size_of::<bf16>()) / size_of::<u32>()
}

/// Words of one panel of values.
pub const VALUE_PANEL: usize = BLOCK * (size_of::<Line>() + size_of::<bf16>()) / size_of::<u32>();

/// Where the code of position `i` is in a panel of values, and where its scale, in words.
pub fn value_words(i: usize) -> [usize; 2] {
    let word = size_of::<u32>();
    [i * size_of::<Line>() / word, (BLOCK * size_of::<Line>() + i * size_of::<bf16>()) / word]
}

/// Lines of codes, and the scales behind them.
fn split(panel: &[u32], lines: usize) -> (&[Line], &[bf16]) {
    let (codes, scales) = panel.split_at(lines * size_of::<Line>() / size_of::<u32>());
    (bytemuck::cast_slice::<u32, i8>(codes).as_chunks().0, bytemuck::cast_slice(scales))
}

fn split_mut(panel: &mut [u32], lines: usize) -> (&mut [Line], &mut [bf16]) {
    let (codes, scales) = panel.split_at_mut(lines * size_of::<Line>() / size_of::<u32>());
    (bytemuck::cast_slice_mut::<u32, i8>(codes).as_chunks_mut().0, bytemuck::cast_slice_mut(scales))
}

/// Codes of elements that share a scale, and the scale; zeros behind the last of fewer.
fn encode(x: View) -> (Line, bf16) {
    let mut all = [0.0; SHARED];
    match x {
        View::F32(x) => all[..x.len()].copy_from_slice(x),
        View::Bf16(x) => all.iter_mut().zip(x).for_each(|(all, x)| *all = x.to_f32()),
    }
    // as bits, infinity is more than any number, and NaN more than infinity
    let most = f32::from_bits(all.iter().fold(0, |most, x| (x.to_bits() & 0x7fff_ffff).max(most)));
    let (scale, inverse) = match bf16::from_f32(most / 127.0) {
        _ if !most.is_finite() => (bf16::from_f32(f32::NAN), 0.0),
        scale if scale.to_f32() < f32::MIN_POSITIVE => (bf16::ZERO, 0.0),
        scale => (scale, 1.0 / scale.to_f32()),
    };
    // the scale may have been rounded down: up to 127.25; the last bits of such a sum are the whole number
    (all.map(|x| (x * inverse + WHOLE).to_bits() as i8), scale)
}

/// Writes position `i` of a head.
pub fn put(keys: &mut [u32], values: &mut [u32], i: usize, k: View, v: View) {
    let groups = |len: usize| (0..len).step_by(SHARED).map(move |at| (at, len.min(at + SHARED)));
    let (panel, column) = (key_panel(k.len()), i % PANEL);
    let (lines, scales) = split_mut(&mut keys[i / PANEL * panel..][..panel], k.len());
    for ((from, to), scales) in groups(k.len()).zip(scales.as_chunks_mut::<PANEL>().0) {
        let (codes, scale) = encode(k.slice(from, to));
        scales[column] = scale;
        lines[from..to].iter_mut().zip(codes).for_each(|(line, code)| line[column] = code);
    }
    for ((from, to), panel) in groups(v.len()).zip(values.chunks_exact_mut(VALUE_PANEL)) {
        let (lines, scales) = split_mut(panel, BLOCK);
        (lines[i], scales[i]) = encode(v.slice(from, to));
    }
}

/// The keys and values of the first `count` positions as words of an engine, in panels of [`Engine::steps`] as it packs
/// them: zeros where tile registers read more than there is.
#[inline(always)]
pub fn unpack<S: Simd>(
    engine: Engine<S>,
    qk_dim: usize,
    count: usize,
    from: (&[u32], &[u32]),
    keys: &mut [u32],
    values: &mut [u32],
) {
    let s = engine.simd();
    let panels = from.0.chunks_exact(key_panel(qk_dim)).take(count.div_ceil(PANEL));
    for (from, to) in panels.zip(keys.chunks_exact_mut(engine.steps(qk_dim) * PANEL)) {
        let (codes, scales) = split(from, qk_dim);
        let mut out = lines(to);
        for (codes, scales) in codes.chunks(SHARED).zip(scales.as_chunks::<LANES>().0.as_chunks::<2>().0) {
            let scale = [s.load_bf16(&scales[0]), s.load_bf16(&scales[1])];
            if engine.pairs() {
                let (pairs, odd) = codes.as_chunks::<2>();
                let (to, rest) = out.split_at_mut(codes.len().div_ceil(2));
                for (pair, to) in pairs.iter().zip(&mut *to) {
                    join(s, pair, [scale, scale], to);
                }
                if let ([last], Some(to)) = (odd, to.last_mut()) {
                    join(s, &[*last, [0; PANEL]], [scale, [s.zero(); 2]], to);
                }
                out = rest;
            } else {
                let (to, rest) = out.split_at_mut(codes.len());
                for (codes, to) in codes.iter().zip(to) {
                    widen(s, codes, scale, to);
                }
                out = rest;
            }
        }
        out.as_flattened_mut().fill(0.0);
    }
    let steps = engine.steps(count);
    for (from, to) in
        from.1.chunks_exact(VALUE_PANEL).zip(values.chunks_exact_mut(engine.steps(BLOCK) * PANEL))
    {
        let (codes, scales) = split(from, BLOCK);
        let out = &mut lines(to)[..steps];
        if engine.pairs() {
            let (used, rest) = out.split_at_mut(count.div_ceil(2));
            let pairs = codes.as_chunks::<2>().0.iter().zip(scales.as_chunks::<2>().0);
            for (i, ((pair, scales), to)) in pairs.zip(used).enumerate() {
                // the partner of an odd last position is not there yet
                let high = if 2 * i + 1 < count { scales[1] } else { bf16::ZERO };
                let scale = [[s.splat(scales[0].to_f32()); 2], [s.splat(high.to_f32()); 2]];
                join(s, pair, scale, to);
            }
            rest.as_flattened_mut().fill(0.0);
        } else {
            for ((codes, scale), to) in codes.iter().zip(scales).zip(out) {
                widen(s, codes, [s.splat(scale.to_f32()); 2], to);
            }
        }
    }
}

/// The lines of a panel of words.
#[inline(always)]
fn lines(panel: &mut [u32]) -> &mut [[f32; PANEL]] {
    bytemuck::cast_slice_mut::<u32, f32>(panel).as_chunks_mut().0
}

/// A line of codes, scaled.
#[inline(always)]
fn scaled<S: Simd>(s: S, codes: &Line, scale: [S::V; 2]) -> [S::V; 2] {
    let (codes, _) = codes.as_chunks::<LANES>();
    [s.mul(s.load_i8(&codes[0]), scale[0]), s.mul(s.load_i8(&codes[1]), scale[1])]
}

#[inline(always)]
fn widen<S: Simd>(s: S, codes: &Line, scale: [S::V; 2], to: &mut [f32; PANEL]) {
    let x = scaled(s, codes, scale);
    let (to, _) = to.as_chunks_mut::<LANES>();
    s.store(x[0], &mut to[0]);
    s.store(x[1], &mut to[1]);
}

/// Two lines as a line of pairs, rounded to bf16.
#[inline(always)]
fn join<S: Simd>(s: S, codes: &[Line; 2], scale: [[S::V; 2]; 2], to: &mut [f32; PANEL]) {
    let (low, high) = (scaled(s, &codes[0], scale[0]), scaled(s, &codes[1], scale[1]));
    let (to, _) = to.as_chunks_mut::<LANES>();
    s.store(s.pairs_across(low[0], high[0]), &mut to[0]);
    s.store(s.pairs_across(low[1], high[1]), &mut to[1]);
}
