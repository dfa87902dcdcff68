//! A tile of a product of bytes: stored rows unpacked from blocks, by rows of the left operand coded in 8 bits.
//!
//! A sum is cut into sixteen chains: block b of the depth belongs to chain `b % 16`, and the chains are added as
//! [`Simd::sum`] adds its lanes. So a few rows, which have a chain in each lane, and a tile, which walks one chain after the
//! other, give the same bits. Sums within a block are whole numbers below 2^24: their order is free.

use std::mem::MaybeUninit;

use super::chunk::{self, BLOCKS, LINE, STORED_CHUNK, Unpack};
use crate::simd::{LANES, Simd};

/// Rows of either side of a tile.
pub const SIDE: usize = LANES;

/// The order in which chains are walked: after it, adding neighbours, then neighbours of these, adds as [`Simd::sum`].
pub const CHAINS: [usize; BLOCKS] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// Which block of the walk each of `blocks` blocks is: chain after chain. Those that fill the last sixteen are behind all.
pub(super) fn places(blocks: usize) -> Vec<u32> {
    let mut places = vec![blocks as u32; blocks.next_multiple_of(BLOCKS)];
    let walk = CHAINS.into_iter().flat_map(|chain| (chain..blocks).step_by(BLOCKS));
    walk.zip(0..).for_each(|(block, place)| places[block] = place);
    places
}

/// What a tile reads and writes; blocks are in the order in which they are walked.
#[derive(Clone, Copy)]
pub struct BytesTile {
    /// Sixteen stored rows, `[blocks][16][block]`.
    pub q: *const u8,
    /// A scale for each block of each, `[blocks][16]`.
    pub scale: *const f32,
    /// Likewise, or null.
    pub min: *const f32,
    /// What was added to their integers: zero where it was subtracted again.
    pub offset: u8,
    /// Whether they are signed ([`Simd::signed_bytes`]).
    pub signed: bool,
    /// Elements of a block, 16 or 32.
    pub block: usize,
    /// Blocks of the depth.
    pub blocks: usize,
    /// Codes of sixteen rows of the left operand, four of each at a time, `[blocks][block / 4][16][4]`.
    pub x: *const i8,
    /// A scale for each block of each, and the sum of its codes, `[blocks][16]`.
    pub x_scale: *const f32,
    pub x_sum: *const f32,
    /// How many of the sixteen rows are rows; what becomes of the others is nobody's business.
    pub rows: usize,
    /// `[16 stored rows][16]`
    pub out: *mut f32,
    /// What is unpacked after this tile, any address: where [`Simd::BYTES_TILE_ASKS`] is true, memory is asked for so many bytes
    /// of it on the way.
    pub next: *const u8,
    pub next_bytes: usize,
}

/// Unpacks sixteen stored rows from `first` on; those that are not there are zero. There is room for one block more than they
/// have. `asks` says that memory is asked for those that come next.
#[inline(always)]
pub(super) fn pack<S: Simd, F: Unpack>(
    s: S,
    rows: &[u8],
    row_bytes: usize,
    first: usize,
    asks: bool,
    places: &[u32],
    panel: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    let mut room = [0; STORED_CHUNK];
    let offset = s.bytes_of(F::OFFSET);
    let numbers = SIDE * (1 + places.iter().max().map_or(0, |&most| most as usize));
    assert!(panel.len() >= numbers * F::BLOCK && scale.len() >= numbers && (!F::MIN || min.len() >= numbers));
    for (c, places) in places.as_chunks::<BLOCKS>().0.iter().enumerate() {
        let (mut scales, mut mins) = ([s.zero(); SIDE], [s.zero(); SIDE]);
        // SAFETY (here and below): there is room for every place, by the assertion.
        let starts = places.map(|place| unsafe { panel.as_mut_ptr().add(place as usize * SIDE * F::BLOCK) });
        for j in 0..SIDE {
            let panel = |b: usize| unsafe { starts[b].add(j * F::BLOCK) };
            let start = (first + j) * row_bytes;
            if start >= rows.len() {
                (0..BLOCKS).for_each(|b| unsafe { panel(b).write_bytes(0, F::BLOCK) });
                continue;
            }
            // the same of a row that comes later: these steps are too long for the hardware's reading ahead
            if asks {
                let later = rows.as_ptr().wrapping_add(start + SIDE * row_bytes + c * F::BYTES);
                (0..F::BYTES).step_by(LINE).for_each(|at| s.prefetch(later.wrapping_add(at)));
            }
            let blocks = chunk::whole::<F>(&rows[start..start + row_bytes], c, &mut room);
            [scales[j], mins[j]] = F::scales(s, blocks);
            for i in 0..F::LEN / 64 {
                let mut q = F::vector(s, blocks, i);
                if S::signed_bytes(F::OFFSET) && F::OFFSET != 0 {
                    q = s.sub_bytes(q, offset);
                }
                if F::BLOCK == 32 {
                    s.store_half::<false>(q, unsafe { &mut *panel(2 * i).cast() });
                    s.store_half::<true>(q, unsafe { &mut *panel(2 * i + 1).cast() });
                } else {
                    let mut all = [0; 64];
                    s.store_bytes(q, &mut all);
                    for (b, block) in all.as_chunks::<16>().0.iter().enumerate() {
                        unsafe { *panel(4 * i + b).cast() = *block };
                    }
                }
            }
        }
        turn(s, scales, places, scale);
        if F::MIN {
            turn(s, mins, places, min);
        }
    }
}

/// Stores numbers of sixteen blocks of each row at the places of the blocks.
#[inline(always)]
fn turn<S: Simd>(s: S, rows: [S::V; SIDE], places: &[u32; BLOCKS], out: &mut [f32]) {
    for (&place, row) in places.iter().zip(s.transpose(rows)) {
        s.store(row, (&mut out[place as usize * SIDE..][..SIDE]).try_into().expect("sixteen"));
    }
}

/// The tile in plain vectors.
///
/// # Safety
/// All that the tile addresses must be readable, `out` writable.
#[inline(always)]
pub unsafe fn body<S: Simd>(s: S, t: BytesTile) {
    // SAFETY (all): by the caller's promise.
    unsafe {
        let vector = |p: *const f32, at: usize| s.load(&*p.add(at * LANES).cast());
        for r in 0..SIDE {
            let mut tree = Tree::new();
            let mut at = 0;
            for chain in CHAINS {
                let mut sum = s.zero();
                for _ in (chain..t.blocks).step_by(BLOCKS) {
                    let row = at * SIDE + r;
                    let q = t.q.add(row * t.block);
                    let x = t.x.add(at * SIDE * t.block);
                    let mut dots = [0i32; LANES];
                    for step in 0..t.block / 4 {
                        let q: [i32; 4] = std::array::from_fn(|i| {
                            let q = *q.add(4 * step + i);
                            if t.signed { i32::from(q.cast_signed()) } else { i32::from(q) }
                        });
                        let x = x.add(step * LANES * 4);
                        for (j, dot) in dots.iter_mut().enumerate() {
                            for (i, q) in q.iter().enumerate() {
                                *dot += q * i32::from(*x.add(4 * j + i));
                            }
                        }
                    }
                    let sums = vector(t.x_sum, at);
                    let mut dots = s.load(&dots.map(|x| x as f32));
                    if t.offset != 0 {
                        dots = s.fma(s.splat(-f32::from(t.offset)), sums, dots);
                    }
                    let mut part = s.mul(dots, s.splat(*t.scale.add(row)));
                    if !t.min.is_null() {
                        part = s.fma(s.splat(*t.min.add(row)), sums, part);
                    }
                    sum = s.fma(part, vector(t.x_scale, at), sum);
                    at += 1;
                }
                tree.add(sum, |before, sum| *sum = s.add(*before, *sum));
            }
            s.store(*tree.whole(), &mut *t.out.add(r * SIDE).cast());
        }
    }
}

/// Memory that is asked for on the way through a tile, some lines with each block.
pub struct Ahead {
    next: *const u8,
    share: usize,
    due: usize,
}

impl Ahead {
    /// So many bytes from `next` on, any address, on the way through so many blocks.
    #[inline(always)]
    pub fn new(next: *const u8, bytes: usize, blocks: usize) -> Self {
        Self { next, share: bytes.div_ceil(blocks.max(1)), due: 0 }
    }

    /// Another block: its share of lines is asked for by `prefetch`.
    #[inline(always)]
    pub fn block(&mut self, prefetch: impl Fn(*const u8)) {
        self.due += self.share;
        while self.due >= LINE {
            prefetch(self.next);
            (self.next, self.due) = (self.next.wrapping_add(LINE), self.due - LINE);
        }
    }
}

/// Sums of chains, which come in the order of [`CHAINS`], added two by two.
pub struct Tree<T> {
    /// Level l has the sum of 2^l chains where bit l of `count` is set.
    levels: [MaybeUninit<T>; 5],
    count: usize,
}

impl<T: Copy> Tree<T> {
    /// Of no chains yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self { levels: [const { MaybeUninit::uninit() }; 5], count: 0 }
    }

    /// Takes those of another chain; `join(before, sums)` adds to sums what came before them.
    #[inline(always)]
    pub fn add(&mut self, mut sums: T, join: impl Fn(&T, &mut T)) {
        let mut level = 0;
        while self.count >> level & 1 == 1 {
            // SAFETY: the bit says that it was written.
            join(unsafe { self.levels[level].assume_init_ref() }, &mut sums);
            level += 1;
        }
        self.levels[level].write(sums);
        self.count += 1;
    }

    /// The sums of all sixteen chains.
    #[inline(always)]
    pub fn whole(&self) -> &T {
        assert_eq!(self.count, CHAINS.len(), "a sum of all chains");
        // SAFETY: the last chain wrote it.
        unsafe { self.levels[4].assume_init_ref() }
    }
}
