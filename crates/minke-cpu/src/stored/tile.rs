//! A tile of a product of bytes: rows coded in 8 bits by columns unpacked from blocks.
//!
//! A sum is cut into sixteen chains: block b of the depth belongs to chain `b % 16`, and the chains are added as
//! [`Simd::sum`] adds its lanes. So a few rows, which have a chain in each lane, and a tile, which walks one chain after the
//! other, give the same bits. Sums within a block are whole numbers below 2^24: their order is free.

use super::chunk::{self, BLOCKS, CHUNK, Chunk, STORED_CHUNK, Unpack};
use crate::simd::{LANES, Simd};

/// Columns of a panel.
pub const COLUMNS: usize = 32;

/// Rows of the largest tile.
pub const ROWS: usize = 16;

/// The order in which chains are walked: after it, adding neighbours, then neighbours of these, adds as [`Simd::sum`].
pub const CHAINS: [usize; BLOCKS] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// What a tile reads and writes.
#[derive(Clone, Copy)]
pub struct BytesTile {
    /// The panel: for each half of the columns the blocks in the order in which they are walked, each `[block / 4][16][4]`.
    pub q: *const u8,
    /// A scale for each block and column, `[half][block][16]`, blocks in the same order.
    pub scale: *const f32,
    /// Likewise, or null.
    pub min: *const f32,
    /// What was added to the integers of the panel; zero where they are signed ([`Simd::SIGNED_BYTES`]).
    pub offset: u8,
    /// Elements of a block, 16 or 32.
    pub block: usize,
    /// Blocks of the depth.
    pub blocks: usize,
    /// Codes of the rows, in the order of the depth, and the distance of rows.
    pub x: *const i8,
    pub x_row: usize,
    /// A scale for each block of the rows, the sum of its codes, and the distance of rows in both.
    pub x_scale: *const f32,
    pub x_sum: *const f32,
    pub x_blocks: usize,
    /// `[rows][32]`
    pub out: *mut f32,
}

/// Unpacks the stored rows that begin at `start(0..32)` of `rows` as a panel; columns that are not there are zero.
#[inline(always)]
pub(super) fn pack<S: Simd, F: Unpack>(
    s: S,
    rows: &[u8],
    start: impl Fn(usize) -> Option<usize>,
    blocks: usize,
    panel: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    let mut room = [0; STORED_CHUNK];
    // place of block `b` in the order of the walk
    let mut place = [0; BLOCKS];
    let mut before = 0;
    for chain in CHAINS {
        place[chain] = before;
        before += (blocks + BLOCKS - 1 - chain) / BLOCKS;
    }
    let mut chunks = [const { Chunk::ZERO }; LANES];
    for c in 0..blocks.div_ceil(BLOCKS) {
        let here = BLOCKS.min(blocks - c * BLOCKS);
        for half in 0..COLUMNS / LANES {
            for (j, chunk) in chunks.iter_mut().enumerate() {
                match start(half * LANES + j) {
                    Some(start) => chunk.fill::<S, F>(s, chunk::whole::<F>(rows, start, c, &mut room)),
                    None => *chunk = Chunk::ZERO,
                }
                if S::SIGNED_BYTES && F::OFFSET != 0 {
                    chunk.q[..F::LEN].iter_mut().for_each(|q| *q = q.wrapping_sub(F::OFFSET));
                }
            }
            for (b, place) in place.iter().enumerate().take(here) {
                let to = place + c;
                for (j, chunk) in chunks.iter().enumerate() {
                    scale[(half * blocks + to) * LANES + j] = chunk.scale[b];
                    if F::MIN {
                        min[(half * blocks + to) * LANES + j] = chunk.min[b];
                    }
                }
            }
            // sixteen words of each column, turned over
            for w in 0..BLOCKS * F::BLOCK / (4 * LANES) {
                let mut words = [s.zero(); LANES];
                for (word, chunk) in words.iter_mut().zip(&chunks) {
                    *word = s.load(words_of(&chunk.q, w));
                }
                let turned = s.transpose(words);
                for (k, turned) in turned.iter().enumerate() {
                    let b = (w * LANES + k) * 4 / F::BLOCK;
                    if b >= here {
                        break;
                    }
                    let step = (w * LANES + k) % (F::BLOCK / 4);
                    let at = ((half * blocks + place[b] + c) * F::BLOCK / 4 + step) * LANES;
                    let out: &mut [f32] = bytemuck::cast_slice_mut(&mut panel[4 * at..4 * (at + LANES)]);
                    s.store(*turned, out.try_into().expect("sixteen"));
                }
            }
        }
    }
}

/// Sixteen words of four bytes each, which vectors move as they are.
#[inline(always)]
fn words_of(q: &[u8; CHUNK], w: usize) -> &[f32; LANES] {
    let all: &[f32] = bytemuck::cast_slice(q);
    all[w * LANES..][..LANES].try_into().expect("sixteen")
}

/// The tile in plain vectors.
///
/// # Safety
/// All that the tile addresses must be readable, `out` writable.
#[inline(always)]
pub unsafe fn body<S: Simd>(s: S, t: BytesTile, rows: usize) {
    // SAFETY (all): by the caller's promise.
    unsafe {
        for half in 0..COLUMNS / LANES {
            for r in 0..rows {
                let mut tree = Tree::new(s);
                let mut at = 0;
                for chain in CHAINS {
                    let mut sum = s.zero();
                    for b in (chain..t.blocks).step_by(BLOCKS) {
                        let q = t.q.add((half * t.blocks + at) * t.block * LANES);
                        let x = t.x.add(r * t.x_row + b * t.block);
                        let mut dots = [0i32; LANES];
                        for step in 0..t.block / 4 {
                            let x: [i32; 4] = std::array::from_fn(|i| i32::from(*x.add(4 * step + i)));
                            let q = q.add(step * LANES * 4);
                            for (j, dot) in dots.iter_mut().enumerate() {
                                for (i, x) in x.iter().enumerate() {
                                    let q = *q.add(4 * j + i);
                                    let q = if S::SIGNED_BYTES {
                                        i32::from(q.cast_signed())
                                    } else {
                                        i32::from(q)
                                    };
                                    *dot += q * x;
                                }
                            }
                        }
                        let sum_x = *t.x_sum.add(r * t.x_blocks + b);
                        let mut dots = s.load(&dots.map(|x| x as f32));
                        if !S::SIGNED_BYTES && t.offset != 0 {
                            dots = s.fma(s.splat(-f32::from(t.offset)), s.splat(sum_x), dots);
                        }
                        let vector = |p: *const f32| s.load(&*p.add((half * t.blocks + at) * LANES).cast());
                        let mut part = s.mul(dots, vector(t.scale));
                        if !t.min.is_null() {
                            part = s.fma(vector(t.min), s.splat(sum_x), part);
                        }
                        sum = s.fma(part, s.splat(*t.x_scale.add(r * t.x_blocks + b)), sum);
                        at += 1;
                    }
                    tree.add(s, sum);
                }
                s.store(tree.levels[4], &mut *t.out.add(r * COLUMNS + half * LANES).cast());
            }
        }
    }
}

/// Sums of chains, added two by two.
struct Tree<V> {
    levels: [V; 5],
    count: usize,
}

impl<V: Copy> Tree<V> {
    #[inline(always)]
    fn new<S: Simd<V = V>>(s: S) -> Self {
        Self { levels: [s.zero(); 5], count: 0 }
    }

    #[inline(always)]
    fn add<S: Simd<V = V>>(&mut self, s: S, mut sum: V) {
        let mut level = 0;
        while self.count >> level & 1 == 1 {
            sum = s.add(self.levels[level], sum);
            level += 1;
        }
        self.levels[level] = sum;
        self.count += 1;
    }
}
