//! Values that are the first columns of their keys, as in latent attention: a cache holds them once, as columns of keys,
//! and a block is turned over when it is read.
//!
//! Tasks have many rows for a block (all query heads share the key head), so that this is little beside their products.

use minke_num::bf16;

use crate::gemm::engine::Engine;
use crate::gemm::tile::PANEL;
use crate::simd::{LANES, Simd};

use super::BLOCK;

/// The first `v_dim` columns of a block's first `count` keys as values, in panels as the engine packs them: zeros where tile
/// registers read more than there is. `keys` are words of the engine, in panels of `key_panel` words.
#[inline(always)]
pub fn values<S: Simd>(
    engine: Engine<S>,
    keys: &[u32],
    key_panel: usize,
    count: usize,
    v_dim: usize,
    values: &mut [u32],
) {
    let s = engine.simd();
    // lines of sixteen words of keys in a panel of values
    let lines = if engine.pairs() { PANEL / 2 } else { PANEL };
    let panels = values.chunks_exact_mut(engine.steps(BLOCK) * PANEL).take(v_dim.div_ceil(PANEL));
    for (p, out) in panels.enumerate() {
        for first in (0..count).step_by(LANES) {
            let keys = &keys[first / PANEL * key_panel..][..key_panel];
            let keys = keys.as_chunks::<PANEL>().0;
            let column = first % PANEL;
            for half in 0..lines / LANES {
                let from = p * lines + half * LANES;
                let mut block = [s.zero(); LANES];
                for (words, line) in block.iter_mut().zip(keys.get(from..).unwrap_or_default()) {
                    *words = s.load(bytemuck::cast_ref(
                        line[column..].first_chunk::<LANES>().expect("half a line"),
                    ));
                }
                let mut rows = [[0.0f32; LANES]; LANES];
                for (words, row) in s.transpose(block).into_iter().zip(&mut rows) {
                    s.store(words, row);
                }
                if !engine.pairs() {
                    let out = out[first * PANEL..].chunks_exact_mut(PANEL);
                    for (row, out) in rows.iter().zip(out) {
                        out[half * LANES..][..LANES].copy_from_slice(bytemuck::cast_slice(row));
                    }
                    continue;
                }
                rows[LANES.min(count - first)..].fill([0.0; LANES]);
                let out: &mut [f32] = bytemuck::cast_slice_mut(&mut out[first / 2 * PANEL..]);
                for (pair, out) in
                    rows.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0)
                {
                    let [low, high]: [&[bf16; 2 * LANES]; 2] =
                        [bytemuck::cast_ref(&pair[0]), bytemuck::cast_ref(&pair[1])];
                    let [left, right] = s.pairs_across_panel(low, high);
                    s.store(left, &mut out[0]);
                    s.store(right, &mut out[1]);
                }
            }
        }
        if engine.pairs() {
            let done = count.next_multiple_of(LANES) / 2;
            let end = engine.steps(count).max(done);
            out[done * PANEL..end * PANEL].fill(0);
        }
    }
}
