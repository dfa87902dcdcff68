//! A tile of a product of bytes: rows coded in 8 bits by columns unpacked from blocks.
//!
//! A sum is cut into sixteen chains: block b of the depth belongs to chain `b % 16`, and the chains are added as
//! [`Simd::sum`] adds its lanes. So a few rows, which have a chain in each lane, and a tile, which walks one chain after the
//! other, give the same bits. Sums within a block are whole numbers below 2^24: their order is free.

use super::chunk::{self, BLOCKS, CHUNK, Chunk, LINE, STORED_CHUNK, Unpack};
use crate::simd::{LANES, Simd};

/// Most columns of a panel ([`Simd::BYTES_COLUMNS`]), and most rows of a tile ([`Simd::BYTES_ROWS`]).
pub const COLUMNS: usize = 32;
pub const ROWS: usize = 16;

/// The order in which chains are walked: after it, adding neighbours, then neighbours of these, adds as [`Simd::sum`].
pub const CHAINS: [usize; BLOCKS] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// Which block of the walk each of `blocks` blocks is: chain after chain.
pub(super) fn places(blocks: usize) -> Vec<u32> {
    let mut places = vec![0; blocks];
    let walk = CHAINS.into_iter().flat_map(|chain| (chain..blocks).step_by(BLOCKS));
    walk.zip(0..).for_each(|(block, place)| places[block] = place);
    places
}

/// What a tile reads and writes; blocks are in the order in which they are walked.
#[derive(Clone, Copy)]
pub struct BytesTile {
    /// The panel: for each 16 of the columns the blocks, each `[block / 4][16][4]`.
    pub q: *const u8,
    /// A scale for each block and column, `[columns / 16][blocks][16]`.
    pub scale: *const f32,
    /// Likewise, or null.
    pub min: *const f32,
    /// What was added to the integers of the panel; zero where they are signed ([`Simd::SIGNED_BYTES`]).
    pub offset: u8,
    /// Elements of a block, 16 or 32.
    pub block: usize,
    /// Blocks of the depth.
    pub blocks: usize,
    /// Codes of the rows, `[blocks][BYTES_ROWS][block]`; those of rows that are not there may be anything.
    pub x: *const i8,
    /// A scale for each block of the rows, and the sum of its codes, `[blocks][BYTES_ROWS]`.
    pub x_scale: *const f32,
    pub x_sum: *const f32,
    /// `[rows][BYTES_COLUMNS]`
    pub out: *mut f32,
}

/// Unpacks the stored rows from `first` on, one for each column of a panel; columns that are not there are zero.
#[inline(always)]
pub(super) fn pack<S: Simd, F: Unpack>(
    s: S,
    rows: &[u8],
    row_bytes: usize,
    first: usize,
    places: &[u32],
    panel: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    let mut room = [0; STORED_CHUNK];
    let blocks = places.len();
    let mut chunks = [const { Chunk::ZERO }; LANES];
    for c in 0..blocks.div_ceil(BLOCKS) {
        let here = BLOCKS.min(blocks - c * BLOCKS);
        for half in 0..S::BYTES_COLUMNS / LANES {
            for (j, chunk) in chunks.iter_mut().enumerate() {
                let start = (first + half * LANES + j) * row_bytes;
                if start >= rows.len() {
                    *chunk = Chunk::ZERO;
                    continue;
                }
                // the same of a row that comes later: these steps are too long for the hardware's reading ahead
                let later = rows.get(start + LANES * row_bytes + c * F::BYTES..).unwrap_or_default();
                later.iter().take(F::BYTES).step_by(LINE).for_each(|at| s.prefetch(at));
                chunk.fill::<S, F>(s, chunk::whole::<F>(rows, start, c, &mut room));
                if S::SIGNED_BYTES && F::OFFSET != 0 {
                    chunk.q[..F::LEN].iter_mut().for_each(|q| *q = q.wrapping_sub(F::OFFSET));
                }
            }
            let place = |b: usize| half * blocks + places[c * BLOCKS + b] as usize;
            let turned = |of: fn(&Chunk) -> &[f32; BLOCKS], out: &mut [f32]| {
                let mut rows = [s.zero(); LANES];
                for (row, chunk) in rows.iter_mut().zip(&chunks) {
                    *row = s.load(of(chunk));
                }
                for (b, row) in s.transpose(rows).into_iter().enumerate().take(here) {
                    s.store(row, (&mut out[place(b) * LANES..][..LANES]).try_into().expect("sixteen"));
                }
            };
            turned(|chunk| &chunk.scale, scale);
            if F::MIN {
                turned(|chunk| &chunk.min, min);
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
                    let at = (place(b) * F::BLOCK / 4 + step) * LANES;
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
        for half in 0..S::BYTES_COLUMNS / LANES {
            for r in 0..rows {
                let mut tree = Tree::new(s);
                let mut at = 0;
                for chain in CHAINS {
                    let mut sum = s.zero();
                    for _ in (chain..t.blocks).step_by(BLOCKS) {
                        let q = t.q.add((half * t.blocks + at) * t.block * LANES);
                        let row = at * S::BYTES_ROWS + r;
                        let x = t.x.add(row * t.block);
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
                        let sum_x = *t.x_sum.add(row);
                        let mut dots = s.load(&dots.map(|x| x as f32));
                        if !S::SIGNED_BYTES && t.offset != 0 {
                            dots = s.fma(s.splat(-f32::from(t.offset)), s.splat(sum_x), dots);
                        }
                        let vector = |p: *const f32| s.load(&*p.add((half * t.blocks + at) * LANES).cast());
                        let mut part = s.mul(dots, vector(t.scale));
                        if !t.min.is_null() {
                            part = s.fma(vector(t.min), s.splat(sum_x), part);
                        }
                        sum = s.fma(part, s.splat(*t.x_scale.add(row)), sum);
                        at += 1;
                    }
                    tree.add(s, sum);
                }
                s.store(tree.levels[4], &mut *t.out.add(r * S::BYTES_COLUMNS + half * LANES).cast());
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
