//! Left operands of products with blocks: rows as integers of 8 bits, a scale for every 32.

use std::ops::Range;

use super::chunk::BLOCKS;
use super::tile;
use crate::cpu::{Cpu, SharedMut};
use crate::gemm::Operand;
use crate::rows::{kernel, load};
use crate::scratch::{self, Scratch};
use crate::simd::LANES;
use crate::view::View;

/// Elements that share a scale.
const SHARE: usize = 32;

/// Rows of the same weight, coded: `x = scale q`, q from -127 to 127, `scale = max |x| / 127` of 32 elements.
///
/// Scales and sums are kept per block of the right operand, 16 or 32 elements, and rows are filled with zeros to whole chunks.
/// Few rows lie one after the other. Of many, [`tile::SIDE`] lie together, as a tile walks through them: block after block in
/// the order of [`tile::places`], each with four elements of every row, the next four of every row and so on. For panels they
/// always lie so, fewer together.
pub(super) struct Inputs {
    /// Elements of a block.
    block: usize,
    /// Elements of a row, filled up.
    stride: usize,
    codes: Scratch<i8>,
    /// Scales, and the sums of the blocks' codes.
    scales: Scratch<f32>,
    sums: Scratch<f32>,
    /// Minus these sums, times the offset: what products with panels begin with where one is subtracted.
    owed: Scratch<i32>,
}

/// M rows of the left operand, as a tile walks through them: codes, four of each row at a time, `[blocks][block / 4][M][4]`; of
/// each block of each row a scale, the sum of its codes, and minus that sum times the format's offset, `[blocks][M]`.
#[derive(Clone, Copy)]
pub struct TileRows {
    pub codes: *const i8,
    pub scales: *const f32,
    pub sums: *const f32,
    pub owed: *const i32,
}

impl TileRows {
    /// What begins so many bytes of codes, and so many numbers, later.
    #[inline(always)]
    pub fn after(self, codes: usize, numbers: usize) -> Self {
        Self {
            codes: self.codes.wrapping_add(codes),
            scales: self.scales.wrapping_add(numbers),
            sums: self.sums.wrapping_add(numbers),
            owed: self.owed.wrapping_add(numbers),
        }
    }
}

/// The rows of one group: where they come from, and where they lie.
pub(super) struct Span {
    /// Rows of the operand.
    pub rows: Range<usize>,
    /// Rows that lie together.
    pub tall: usize,
    /// Whether they lie as a tile walks through them.
    walk: bool,
    /// The first of the rows as coded.
    pub first: usize,
}

impl Span {
    /// Spans for groups of rows, of which up to `few` lie one after the other, and more in tiles.
    pub fn all(offsets: &[u32], few: usize) -> Vec<Self> {
        Self::each(offsets, |rows| if rows <= few { (1, false) } else { (tile::SIDE, true) })
    }

    /// Spans for groups of rows that are multiplied with panels.
    pub fn of_panels(offsets: &[u32]) -> Vec<Self> {
        // as few as leave few of a tile without a row
        let tall = |rows| match rows {
            ..=1 => 1,
            2 => 2,
            3..=4 => 4,
            9..=12 => 12,
            _ => 8,
        };
        Self::each(offsets, |rows| (tall(rows), true))
    }

    /// Whether so few that each part of a weight is read once.
    pub fn few(&self) -> bool {
        !self.walk || self.tall < tile::SIDE && self.rows.len() <= self.tall
    }

    fn each(offsets: &[u32], lie: impl Fn(usize) -> (usize, bool)) -> Vec<Self> {
        let mut first = 0;
        let span = |ends: &[u32]| {
            let rows = ends[0] as usize..ends[1] as usize;
            let (tall, walk) = lie(rows.len());
            let span = Self { rows, tall, walk, first };
            first += span.rows.len().next_multiple_of(tall);
            span
        };
        offsets.windows(2).map(span).collect()
    }
}

impl Inputs {
    /// Codes rows, whose length is a multiple of 32, for blocks of 16 or 32; `offset` is what panels subtract of the other side.
    pub fn new(cpu: &Cpu, x: Operand<'_>, spans: &[Span], block: usize, offset: u8) -> Self {
        let cols = x.cols;
        let stride = cols.next_multiple_of(BLOCKS * block);
        let blocks = stride / block;
        let rows = spans.last().map_or(0, |span| span.first + span.rows.len().next_multiple_of(span.tall));
        let mut codes = scratch::take::<i8>(rows * stride);
        let mut scales = scratch::take::<f32>(rows * blocks);
        let mut sums = scratch::take::<f32>(rows * blocks);
        let mut owed = scratch::take::<i32>(rows * blocks);
        let shared = (
            SharedMut::new(&mut codes),
            SharedMut::new(&mut scales),
            SharedMut::new(&mut sums),
            SharedMut::new(&mut owed),
        );
        let places = tile::places(cols / block);
        let mut lots: Vec<(&Span, usize)> = Vec::new();
        for span in spans {
            lots.extend((0..span.rows.len()).step_by(span.tall).map(|at| (span, at)));
        }
        cpu.run(lots.len(), |lot| {
            let (span, at) = lots[lot];
            let first = span.first + at;
            // SAFETY (all): each lot is a task of its own.
            let codes = unsafe { shared.0.slice(first * stride, span.tall * stride) };
            let scales = unsafe { shared.1.slice(first * blocks, span.tall * blocks) };
            let sums = unsafe { shared.2.slice(first * blocks, span.tall * blocks) };
            let owed = unsafe { shared.3.slice(first * blocks, span.tall * blocks) };
            if span.tall > 1 {
                scales.fill(0.0);
                sums.fill(0.0);
            }
            let rows = span.rows.start + at..span.rows.end.min(span.rows.start + at + span.tall);
            let places = if span.walk { &places[..] } else { &[] };
            for (r, row) in rows.enumerate() {
                let from = x.index.map_or(row, |index| index[row] as usize);
                let x = x.view.slice(from * cols, (from + 1) * cols);
                let room = Room { places, tall: span.tall, r, block, offset, codes, scales, sums, owed };
                cpu.dispatch(Code { x, cols, room });
            }
        });
        Self { block, stride, codes, scales, sums, owed }
    }

    /// What [`Inputs::from`] has, as tiles of panels read it.
    #[inline(always)]
    pub fn tile(&self, first: usize) -> TileRows {
        let ((codes, scales, sums), blocks) = (self.from(first), self.stride / self.block);
        TileRows {
            codes: codes.as_ptr(),
            scales: scales.as_ptr(),
            sums: sums.as_ptr(),
            owed: self.owed[first * blocks..].as_ptr(),
        }
    }

    /// Codes, scales and sums from a coded row on: of itself, or of its tile.
    #[inline(always)]
    pub fn from(&self, first: usize) -> (&[i8], &[f32], &[f32]) {
        let blocks = self.stride / self.block;
        (&self.codes[first * self.stride..], &self.scales[first * blocks..], &self.sums[first * blocks..])
    }
}

/// Where row `r` goes, of a tile or alone.
struct Room<'a> {
    /// Which block of the walk each is; nothing where the row lies alone.
    places: &'a [u32],
    tall: usize,
    r: usize,
    block: usize,
    offset: u8,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    owed: &'a mut [i32],
}

impl Room<'_> {
    /// Puts block `b` where it goes.
    #[inline(always)]
    fn put(&mut self, b: usize, codes: &[i8], scale: f32, sum: i32) {
        let at = if let Some(&place) = self.places.get(b) {
            let words = &mut self.codes[place as usize * self.block * self.tall..];
            for (word, out) in codes.as_chunks::<4>().0.iter().zip(words.chunks_exact_mut(4 * self.tall)) {
                out[4 * self.r..][..4].copy_from_slice(word);
            }
            place as usize * self.tall + self.r
        } else {
            self.codes[b * self.block..][..self.block].copy_from_slice(codes);
            b
        };
        (self.scales[at], self.sums[at]) = (scale, sum as f32);
        self.owed[at] = -sum * i32::from(self.offset);
    }
}

kernel! {
    /// One row; numbers that are none, or infinite, make the scale of their 32 elements NaN.
    Code<'a>(s: S, x: View<'a>, cols: usize, room: Room<'a>) {
        let per_share = SHARE / room.block;
        let mut room = room;
        for i in 0..cols / SHARE {
            let (low, high) = (load(s, x, SHARE * i, LANES), load(s, x, SHARE * i + LANES, LANES));
            let max = s.max_size_lane(s.max_size(s.max_size(s.zero(), low), high));
            // what no sum would see, or has no sum
            let none = max < 1e-30 || !max.is_finite();
            let factor = s.splat(if none { 0.0 } else { 127.0 / max });
            let scale = if !max.is_finite() { f32::NAN } else if none { 0.0 } else { max / 127.0 };
            let mut codes = [0; SHARE];
            let mut sums = [0; 2];
            if !none {
                let (first, second) = codes.split_at_mut(LANES);
                sums = [
                    s.store_i8(s.mul(low, factor), first.try_into().expect("sixteen")),
                    s.store_i8(s.mul(high, factor), second.try_into().expect("sixteen")),
                ];
            }
            for (part, codes) in codes.chunks_exact(room.block).enumerate() {
                let sum = if per_share == 2 { sums[part] } else { sums[0] + sums[1] };
                room.put(i * per_share + part, codes, scale, sum);
            }
        }
        if room.places.is_empty() {
            let blocks = cols / room.block;
            room.codes[cols..].fill(0);
            room.scales[blocks..].fill(0.0);
            room.sums[blocks..].fill(0.0);
        }
    }
}
