//! Stored rows laid anew for machines that multiply sixteen of them at once: the same numbers, in as many bytes (Q4_K in 3 % more).
//!
//! A panel of blocks has sixteen rows. Of each block of the depth it has a vector of words, four elements of every row, then
//! the next four, so that a product needs nothing but to part a byte's two elements, and sums of sixteen rows lie side by
//! side. Blocks are in the order in which chains are walked ([`tile`](super::tile)), so every bit is that of the rows where
//! they lie. Rows in bf16 are laid as products of bf16 read them ([`crate::gemm::Packed`]), where pairs of it multiply in
//! vectors; tile registers read them where they lie.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use minke_num::blocks::BlockFormat;

use super::chunk::{self, BLOCKS, LINE, STORED_CHUNK, Unpack};
use super::inputs::{Inputs, Span, TileRows};
use super::product::array;
use super::tile::{self, SIDE};
use super::{Form, Stored};
use crate::gemm::tile::PANEL;
use crate::gemm::{Compute, Matrix8, PackColumns, Packed};
use crate::rows::{SharedView, store};
use crate::scratch::AlignedBuf;
use crate::simd::{Kernel, LANES, Level, Simd};

/// How elements lie in the words of a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Four bytes of four elements.
    Eight,
    /// Bytes whose low half is of one word, and whose high half is of the next.
    Four,
    /// As [`Width::Four`], and behind all of a block the higher bits of its elements, so many of each that words of a
    /// block share one.
    FourAndMore,
}

/// How the scales of a block of sixteen rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// Sixteen in f16.
    Half,
    /// Sixteen in f16, then sixteen minima.
    HalfAndMin,
    /// Sixteen whole numbers, then sixteen for minima; they are multiplied with two numbers in f16 for each stored block.
    SixBits,
    /// Sixteen signed whole numbers, multiplied with one number in f16 for each stored block.
    Signed,
}

/// A format that is laid in panels.
pub trait Panel: 'static {
    /// Words of a block: four elements of each row.
    const STEPS: usize;
    /// How they lie.
    const WIDTH: Width;
    /// How scales lie.
    const SCALES: Scales;
    /// What is subtracted of each element.
    const OFFSET: u8;
    /// Blocks that have a scale of their own of what is stored as one.
    const PER_STORED: usize;

    /// Bytes of the elements of a block.
    const CODES: usize = LANES
        * match Self::WIDTH {
            Width::Eight => 4 * Self::STEPS,
            Width::Four => 2 * Self::STEPS,
            Width::FourAndMore => 2 * Self::STEPS + 4,
        };
    /// Higher bits of an element.
    const MORE: usize = 8 / Self::STEPS;
    /// Bytes of the scales of a block.
    const SCALE_BYTES: usize = match Self::SCALES {
        Scales::Half | Scales::SixBits => 2 * LANES,
        Scales::HalfAndMin => 4 * LANES,
        Scales::Signed => LANES,
    };
    /// Whether blocks have a minimum.
    const MIN: bool = matches!(Self::SCALES, Scales::HalfAndMin | Scales::SixBits);
    /// Bytes of a block: scales, then elements.
    const BLOCK_BYTES: usize = Self::SCALE_BYTES + Self::CODES;
    /// Bytes of the numbers in f16 of a stored block.
    const FACTORS: usize = match Self::SCALES {
        Scales::Half | Scales::HalfAndMin => 0,
        Scales::SixBits => 4 * LANES,
        Scales::Signed => 2 * LANES,
    };
}

macro_rules! panel {
    ($name:ident, $steps:literal, $width:ident, $scales:ident) => {
        impl Panel for chunk::$name {
            const STEPS: usize = $steps;
            const WIDTH: Width = Width::$width;
            const SCALES: Scales = Scales::$scales;
            const OFFSET: u8 = <Self as Unpack>::OFFSET;
            const PER_STORED: usize = Self::STORED_LEN / Self::BLOCK;
        }
    };
}

panel!(Q4_0, 8, Four, Half);
panel!(Q4_1, 8, Four, HalfAndMin);
panel!(Q5_0, 8, FourAndMore, Half);
panel!(Q5_1, 8, FourAndMore, HalfAndMin);
panel!(Q8_0, 8, Eight, Half);
panel!(Q4K, 8, Four, SixBits);
panel!(Q5K, 8, FourAndMore, SixBits);
panel!(Q6K, 4, FourAndMore, Signed);

/// `with_panel!(format, F => expression)`: some, with the type of a format that is laid in panels.
macro_rules! with_panel {
    ($format:expr, $f:ident => $body:expr) => {
        with_panel!(@ $format, $f => $body; Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4K Q5K Q6K)
    };
    (@ $format:expr, $f:ident => $body:expr; $($name:ident)*) => {
        match $format {
            $(BlockFormat::$name => {
                type $f = chunk::$name;
                Some($body)
            })*
            _ => None,
        }
    };
}

/// A stored matrix in panels, once it has been laid so.
pub(super) type Laid = OnceLock<Panels>;

/// A matrix in panels: of each the numbers of stored blocks, then all blocks, each with its scales before its elements, or
/// words of bf16. One stream of memory is what hardware reads ahead of best.
pub(super) struct Panels {
    memory: Arc<AlignedBuf>,
    /// The first byte.
    at: usize,
    shape: Shape,
}

/// How many panels a matrix has, and of what.
#[derive(Clone, Copy)]
struct Shape {
    panels: usize,
    /// Bytes of a panel, whole lines.
    stride: usize,
    /// Blocks of the depth, if there are any.
    blocks: usize,
}

impl Shape {
    /// What a matrix is laid in on this machine, if products read that faster than its rows.
    fn of(stored: &Stored, level: Level) -> Option<Self> {
        if !stored.is_as_multiplied() {
            return None;
        }
        match stored.form {
            Form::Blocks(format) if has_panels(level) => with_panel!(format, F => Self::new::<F>(stored)),
            Form::Bf16 if level.has_bf16_dot() && !level.has_grid() => {
                let stride = Packed::bytes_of(level, Compute::Bf16, 1, stored.cols, PANEL);
                Some(Self { panels: stored.rows.div_ceil(PANEL), stride, blocks: 0 })
            }
            Form::E4m3 => {
                let stride = Matrix8::panel_bytes(level, stored.cols).next_multiple_of(LINE);
                Some(Self { panels: stored.rows.div_ceil(PANEL), stride, blocks: 0 })
            }
            Form::F32 | Form::F16 | Form::Bf16 | Form::Blocks(_) => None,
        }
    }

    #[inline(always)]
    fn new<F: Unpack + Panel>(stored: &Stored) -> Self {
        let blocks = stored.cols / F::BLOCK;
        let used = blocks * F::BLOCK_BYTES + blocks / F::PER_STORED * F::FACTORS;
        Self { panels: stored.rows.div_ceil(SIDE), stride: used.next_multiple_of(LINE), blocks }
    }

    fn bytes(self) -> usize {
        self.panels * self.stride
    }
}

impl Panels {
    /// All panels, one behind the other.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory.view::<u8>(self.at + self.shape.bytes())[self.at..]
    }

    /// The words of a matrix in bf16, as products read them.
    pub(super) fn words(&self) -> &[u32] {
        bytemuck::cast_slice(self.bytes())
    }
}

impl fmt::Debug for Panels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} panels", self.shape.panels)
    }
}

/// What a tile of a product with a panel reads and writes.
#[derive(Clone, Copy)]
pub struct PanelTile {
    /// The numbers of stored blocks, in the order of these.
    pub factors: *const u8,
    /// Blocks, each [`Panel::BLOCK_BYTES`] long, in the order in which they are walked.
    pub first: *const u8,
    /// What comes a while after this panel, any address: memory is asked for so many bytes of it on the way.
    pub next: *const u8,
    pub next_bytes: usize,
    /// Blocks of the depth.
    pub blocks: usize,
    /// The left operand.
    pub x: TileRows,
    /// `[M][16 stored rows]`
    pub out: *mut f32,
}

/// Bytes of rows that are forgotten at once, as soon as they are laid.
const FORGOTTEN_BYTES: usize = 4 << 20;

/// How far ahead of a panel memory is read, in bytes: the hardware's own reading ahead ends at each page.
const AHEAD: usize = 8192;

/// Memory that is laid out at once, at least: some pages of the large kind.
const TOGETHER_BYTES: usize = 16 << 20;

/// Lays matrices in panels where products on this machine read them faster than rows, unless told to stop; then products read no
/// more of their rows, and their owners are told to forget them. Gives back those that stay as they are.
pub fn lay<'a>(all: &[&'a Stored], level: Level, stop: &AtomicBool) -> Vec<&'a Stored> {
    let of = |stored: &Stored| Shape::of(stored, level);
    let (wanted, mut others): (Vec<&'a Stored>, Vec<&'a Stored>) =
        all.iter().partition(|stored| of(stored).is_some());
    let mut left = wanted.into_iter().filter(|stored| stored.laid.get().is_none()).peekable();
    while left.peek().is_some() {
        let (mut these, mut bytes) = (Vec::new(), 0);
        while bytes < TOGETHER_BYTES
            && let Some(stored) = left.next()
        {
            these.push((stored, bytes));
            bytes += of(stored).map_or(0, Shape::bytes);
        }
        let (mut memory, mut laid) = (AlignedBuf::default(), Vec::new());
        let mut rest = memory.get::<u8>(bytes);
        for (stored, at) in &these {
            if stop.load(Ordering::Relaxed) {
                others.extend(these.iter().map(|(stored, _)| *stored).chain(left));
                return others;
            }
            let panels;
            (panels, rest) = rest.split_at_mut(of(stored).map_or(0, Shape::bytes));
            match stored.form {
                Form::Blocks(format) => {
                    with_panel!(format, F => level.dispatch(Lay::<F> { stored, panels, format: PhantomData }));
                }
                Form::E4m3 if !lay_codes(stored, level, panels) => {
                    others.push(stored);
                    continue;
                }
                Form::E4m3 => {}
                Form::F32 | Form::F16 | Form::Bf16 => pack(stored, level, bytemuck::cast_slice_mut(panels)),
            }
            stored.bytes.forget();
            laid.push((*stored, *at));
        }
        let memory = Arc::new(memory);
        for (stored, at) in laid {
            let shape = of(stored).expect("laid above");
            let _ = stored.laid.set(Panels { memory: memory.clone(), at, shape });
            // products have read rows of it until now
            stored.bytes.forget();
        }
    }
    others
}

/// Whether products of this level read panels.
fn has_panels(level: Level) -> bool {
    struct HasPanels;
    impl Kernel for HasPanels {
        type Out = bool;

        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> bool {
            S::PANELS
        }
    }
    level.dispatch_product(HasPanels)
}

/// Rows of bf16 to the words that products read.
fn pack(stored: &Stored, level: Level, panels: &mut [u32]) {
    let Stored { rows, cols, .. } = *stored;
    let each = panels.len() / rows.div_ceil(PANEL).max(1);
    let mut kept = 0;
    for (out, first) in panels.chunks_exact_mut(each.max(1)).zip((0..rows).step_by(PANEL)) {
        forget_before(stored, first, &mut kept);
        let span = first..rows.min(first + PANEL);
        level.dispatch_product(PackColumns {
            compute: Compute::Bf16,
            group: 0,
            span,
            k: cols,
            w: stored,
            out,
        });
    }
}

/// Codes to panels of them; whether all are numbers, for those that are not are seen in rows alone.
fn lay_codes(stored: &Stored, level: Level, panels: &mut [u8]) -> bool {
    let each = panels.len() / stored.rows.div_ceil(PANEL).max(1);
    let used = Matrix8::panel_bytes(level, stored.cols);
    let (mut kept, mut all) = (0, true);
    for (panel, out) in panels.chunks_exact_mut(each.max(1)).enumerate() {
        forget_before(stored, panel * PANEL, &mut kept);
        all &= stored.matrix8().lay(level, panel, &mut out[..used]);
    }
    all
}

/// Lets a stretch of the rows before `row` be forgotten, from byte `kept` on, so that a large matrix is never held twice.
fn forget_before(stored: &Stored, row: usize, kept: &mut usize) {
    let end = row * (stored.bytes.len() / stored.rows);
    if end - *kept >= FORGOTTEN_BYTES {
        stored.bytes.slice(*kept..end).forget();
        *kept = end;
    }
}

struct Lay<'a, F> {
    stored: &'a Stored,
    /// Zeros.
    panels: &'a mut [u8],
    format: PhantomData<F>,
}

impl<F: Unpack + Panel> Kernel for Lay<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Stored { rows, bytes, .. } = self.stored;
        let Shape { stride, blocks, .. } = Shape::new::<F>(self.stored);
        let row_bytes = bytes.len() / rows;
        let places = tile::places(blocks);
        let mut room = [0; STORED_CHUNK];
        let mut kept = 0;
        for (panel, first) in self.panels.chunks_exact_mut(stride).zip((0..*rows).step_by(SIDE)) {
            forget_before(self.stored, first, &mut kept);
            let (factors, all) = panel.split_at_mut(blocks / F::PER_STORED * F::FACTORS);
            for r in 0..SIDE.min(rows - first) {
                let row = &bytes[(first + r) * row_bytes..][..row_bytes];
                for (c, places) in places.as_chunks::<BLOCKS>().0.iter().enumerate() {
                    let chunk = chunk::whole::<F>(row, c, &mut room);
                    let mut q = [0; chunk::CHUNK];
                    for (i, out) in q.as_chunks_mut::<64>().0.iter_mut().enumerate().take(F::LEN / 64) {
                        s.store_bytes(F::vector(s, chunk, i), out);
                    }
                    let here = BLOCKS.min(blocks - c * BLOCKS);
                    for (q, &place) in q.chunks_exact(F::BLOCK).zip(places).take(here) {
                        put_codes::<F>(
                            q,
                            &mut all[place as usize * F::BLOCK_BYTES..][F::SCALE_BYTES..F::BLOCK_BYTES],
                            r,
                        );
                    }
                }
                for (i, stored) in row.chunks_exact(F::STORED_BYTES).enumerate() {
                    let places = &places[i * F::PER_STORED..][..F::PER_STORED];
                    put_scales::<F>(stored, places, all, &mut factors[i * F::FACTORS..], r);
                }
            }
        }
    }
}

/// Puts the elements of a block of row `r` where they go.
#[inline(always)]
fn put_codes<F: Panel>(q: &[u8], codes: &mut [u8], r: usize) {
    let words: [u32; 8] = std::array::from_fn(|step| {
        q.as_chunks::<4>().0.get(step).map_or(0, |word| u32::from_le_bytes(*word))
    });
    let mut put = |vector: usize, word: u32| {
        codes[4 * (LANES * vector + r)..][..4].copy_from_slice(&word.to_le_bytes());
    };
    if F::WIDTH == Width::Eight {
        (0..F::STEPS).for_each(|step| put(step, words[step]));
        return;
    }
    for pair in 0..F::STEPS / 2 {
        let [low, high] = [0, 1].map(|i| words[2 * pair + i] & 0x0f0f_0f0f);
        put(pair, low | high << 4);
    }
    if F::WIDTH == Width::FourAndMore {
        let mask = ((1 << F::MORE) - 1) * 0x0101_0101;
        let more = (0..F::STEPS).map(|step| (words[step] >> 4 & mask) << (F::MORE * step));
        put(F::STEPS / 2, more.fold(0, |all, bits| all | bits));
    }
}

/// Puts the scales of the blocks of what is stored as one, of row `r`, where they go.
#[inline(always)]
fn put_scales<F: Panel>(stored: &[u8], places: &[u32], all: &mut [u8], factors: &mut [u8], r: usize) {
    let mut factor = |i: usize, at: usize| {
        factors[2 * (LANES * i + r)..][..2].copy_from_slice(&stored[at..at + 2]);
    };
    let at = |place: u32| place as usize * F::BLOCK_BYTES;
    match F::SCALES {
        Scales::Half | Scales::HalfAndMin => {
            for i in 0..F::SCALE_BYTES / (2 * LANES) {
                let at = at(places[0]) + 2 * (LANES * i + r);
                all[at..at + 2].copy_from_slice(&stored[2 * i..2 * i + 2]);
            }
        }
        Scales::SixBits => {
            let [numbers, mins] =
                chunk::six_bits(stored[4..16].try_into().expect("twelve")).map(u64::to_le_bytes);
            for ((&place, number), min) in places.iter().zip(numbers).zip(mins) {
                (all[at(place) + r], all[at(place) + LANES + r]) = (number, min);
            }
            factor(0, 0);
            factor(1, 2);
        }
        Scales::Signed => {
            for (&place, number) in places.iter().zip(&stored[192..]) {
                all[at(place) + r] = *number;
            }
            factor(0, 208);
        }
    }
}

/// The product of rows with rows `columns` of a matrix in panels.
pub(super) struct Multiply<'a, F> {
    pub panels: &'a Panels,
    pub columns: Range<usize>,
    pub x: &'a Inputs,
    pub span: &'a Span,
    pub out: &'a SharedView,
    /// Row length of the output, and where the column of the first row is.
    pub n: usize,
    pub column: usize,
    pub format: PhantomData<F>,
}

impl<F: Panel> Kernel for Multiply<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.span.tall {
            1 => self.tiles::<S, 1>(s),
            2 => self.tiles::<S, 2>(s),
            4 => self.tiles::<S, 4>(s),
            8 => self.tiles::<S, 8>(s),
            12 => self.tiles::<S, 12>(s),
            tall => unreachable!("{tall} rows of a tile"),
        }
    }
}

impl<F: Panel> Multiply<'_, F> {
    #[inline(always)]
    fn tiles<S: Simd, const M: usize>(self, s: S) {
        let Panels { memory, at, shape } = self.panels;
        let Shape { stride, blocks, .. } = shape;
        let all = &memory.view::<u8>(at + shape.bytes())[*at..];
        let mut sums = [[0.0f32; LANES]; M];
        let ahead = all[self.columns.start / SIDE * stride..].iter().take(AHEAD);
        ahead.step_by(LINE).for_each(|at| s.prefetch(at));
        let rows = self.span.rows.len();
        for first in (0..rows).step_by(M) {
            let x = self.x.tile(self.span.first + first);
            for start in self.columns.clone().step_by(SIDE) {
                let panel = &all[start / SIDE * stride..][..*stride];
                let (factors, all) = panel.split_at(blocks / F::PER_STORED * F::FACTORS);
                let t = PanelTile {
                    factors: factors.as_ptr(),
                    first: all.as_ptr(),
                    next: panel.as_ptr().wrapping_add(AHEAD),
                    next_bytes: *stride,
                    blocks: *blocks,
                    x,
                    out: sums.as_mut_ptr().cast(),
                };
                // SAFETY: a panel and a tile of rows have `blocks` blocks, `sums` room for a tile.
                unsafe { s.panel_tile::<F, M>(t) };
                let column = self.column + start - self.columns.start;
                let here = SIDE.min(self.columns.end - start);
                for (r, sums) in sums.iter().enumerate().take(rows - first) {
                    let at = (self.span.rows.start + first + r) * self.n + column;
                    // SAFETY: rows and columns of this task alone.
                    let mut out = unsafe { self.out.slice(at, here) };
                    store(s, s.load(array(sums, 0)), &mut out, 0, here);
                }
            }
        }
    }
}

pub(super) use with_panel;
