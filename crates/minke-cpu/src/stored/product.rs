//! y = x Wᵀ with W as it is stored in blocks.

use std::marker::PhantomData;
use std::ops::Range;

use minke_num::blocks::BlockFormat;

use super::chunk::{self, BLOCKS, Blocks, CHUNK, LINE, OfRows, STORED_CHUNK, Unpack};
use super::inputs::{Inputs, Span};
use super::panels::{Multiply, Panel, Panels, with_panel};
use super::tile::{self, BytesTile, SIDE};
use super::{Form, StoredWeight};
use crate::cpu::Cpu;
use crate::gemm::Operand;
use crate::rows::{SharedView, store};
use crate::scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::ViewMut;

/// The most rows of any level ([`Simd::FEW_ROWS`]) that each row of the weight is unpacked for by itself; for more, sixteen
/// are unpacked together and multiplied by tiles.
const FEW: usize = 12;

/// Stored rows that a few rows are multiplied with at a time.
const ROWS: usize = 4;

/// Panels that are unpacked together where there is one tile of rows and it does not ask for the next on its way.
const PANELS: usize = 8;

/// How far ahead of them memory is read, in bytes: the hardware's own reading ahead ends at each page.
const AHEAD: usize = 8192;

/// Bytes of the weight of a task, about: as stored, and unpacked for many rows, which all go through them.
const TASK_BYTES: usize = 256 * 1024;
const PANEL_BYTES: usize = 512 * 1024;

/// `with_format!(format, F => expression)`: the expression with the type that unpacks the format.
macro_rules! with_format {
    ($format:expr, $f:ident => $body:expr) => {
        with_format!(@ $format, $f => $body; Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2K Q3K Q4K Q5K Q6K Iq4Nl Iq4Xs)
    };
    (@ $format:expr, $f:ident => $body:expr; $($name:ident)*) => {
        match $format {
            $(BlockFormat::$name => {
                type $f = chunk::$name;
                $body
            })*
        }
    };
}

/// The products of a group, or of a part of it, that one call of a kernel makes.
struct Task<'a> {
    x: &'a Inputs,
    span: &'a Span,
    /// Stored rows, one after the other.
    bytes: &'a [u8],
    row_bytes: usize,
    cols: usize,
    out: &'a SharedView,
    /// Row length of the output, and where the first stored row's column is.
    n: usize,
    column: usize,
}

/// How a product's rows are coded for a stored matrix.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Coding {
    panels: bool,
    block: usize,
    offset: u8,
}

/// A stored matrix of a weight in blocks, as it lies while a product is made.
struct Part<'a> {
    format: BlockFormat,
    panels: Option<&'a Panels>,
    /// Which of a product's inputs it takes.
    inputs: usize,
}

/// As [`super::matmul_stored`], for weights in blocks; shapes are checked there.
pub(super) fn matmul(cpu: &Cpu, a: Operand<'_>, offsets: &[u32], w: &StoredWeight, c: ViewMut<'_>) {
    let few = cpu.level().dispatch_product(FewRows);
    // of rows where they lie, and of panels
    let spans = [Span::all(offsets, few), Span::of_panels(offsets)];
    let mut inputs: Vec<(Coding, Inputs)> = Vec::new();
    let parts = w.parts().iter().map(|part| {
        let Form::Blocks(format) = part.form else { unreachable!("a weight in blocks") };
        let panels = part.laid.get();
        let offset = panels.and_then(|_| with_panel!(format, F => <F as Panel>::OFFSET)).unwrap_or(0);
        let coding = Coding { panels: panels.is_some(), block: block_of(format), offset };
        let inputs = inputs.iter().position(|(made, _)| *made == coding).unwrap_or_else(|| {
            let spans = &spans[usize::from(coding.panels)];
            inputs.push((coding, Inputs::new(cpu, a, spans, coding.block, coding.offset)));
            inputs.len() - 1
        });
        Part { format, panels, inputs }
    });
    let parts: Vec<Part> = parts.collect();
    let out = SharedView::new(c);
    // tasks are parts of stored matrices, so that each reads one piece of memory
    let mut tasks: Vec<(usize, &Span, Range<usize>)> = Vec::new();
    for group in (0..w.groups()).filter(|&group| offsets[group] < offsets[group + 1]) {
        for (p, part) in w.group(group).iter().enumerate() {
            let stored = group * w.parts_per_group() + p;
            let span = &spans[usize::from(parts[stored].panels.is_some())][group];
            let row_bytes = part.bytes.len() / part.rows.max(1);
            let most = if span.few() { TASK_BYTES / row_bytes.max(1) } else { PANEL_BYTES / w.cols.max(1) };
            // enough tasks for all threads, where a matrix is small
            let each = most.min(part.rows.div_ceil(4 * cpu.threads())).max(1).next_multiple_of(SIDE);
            for first in (0..part.rows).step_by(each) {
                tasks.push((stored, span, first..part.rows.min(first + each)));
            }
        }
    }
    cpu.run(tasks.len(), |i| {
        let (stored, span, columns) = tasks[i].clone();
        let part = &w.parts()[stored];
        let Part { format, panels, inputs: own } = parts[stored];
        let row_bytes = part.bytes.len() / part.rows;
        let before: usize = w.parts()[stored / w.parts_per_group() * w.parts_per_group()..stored]
            .iter()
            .map(|part| part.rows)
            .sum();
        let (_, x) = &inputs[own];
        if let Some(panels) = panels {
            let (n, column, out) = (w.rows, before + columns.start, &out);
            with_panel!(format, F => {
                let format = PhantomData::<F>;
                cpu.level().dispatch_product(Multiply { panels, columns, x, span, out, n, column, format });
            });
            return;
        }
        let task = Task {
            x,
            span,
            bytes: &part.bytes[columns.start * row_bytes..columns.end * row_bytes],
            row_bytes,
            cols: w.cols,
            out: &out,
            n: w.rows,
            column: before + columns.start,
        };
        with_format!(format, F => cpu.level().dispatch_product(Run::<F> { task, format: PhantomData }));
    });
}

/// Elements that share a scale in a format.
fn block_of(format: BlockFormat) -> usize {
    match format {
        BlockFormat::Q4_0
        | BlockFormat::Q4_1
        | BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q8_0
        | BlockFormat::Q4K
        | BlockFormat::Q5K
        | BlockFormat::Iq4Nl
        | BlockFormat::Iq4Xs => 32,
        BlockFormat::Q2K | BlockFormat::Q3K | BlockFormat::Q6K => 16,
    }
}

struct Run<'a, F> {
    task: Task<'a>,
    format: PhantomData<F>,
}

impl<F: Unpack> Kernel for Run<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.task.span {
            Span { tall: SIDE, .. } => many::<S, F>(s, &self.task),
            span if span.rows.len() == 1 => few::<S, F, 1>(s, &self.task),
            _ => few::<S, F, FEW>(s, &self.task),
        }
    }
}

/// Every stored row with a few rows, `M` of them or, where that is [`FEW`], up to it: blocks of a chunk in lanes, chunk after
/// chunk. Where rows end with a half or a quarter of a chunk, the ends of two or four are taken as one.
#[inline(always)]
fn few<S: Simd, F: Unpack, const M: usize>(s: S, task: &Task<'_>) {
    let m = if M == FEW { task.span.rows.len() } else { M };
    let x: [_; M] = std::array::from_fn(|j| task.x.from(task.span.first + j.min(m - 1)));
    let blocks = task.cols / F::BLOCK;
    let (whole, end) = (blocks / BLOCKS, blocks % BLOCKS);
    let together = match end {
        4 if F::STORED_LEN == F::BLOCK => 4,
        8 => 2,
        _ => 1,
    };
    let ends = (together > 1).then(|| x.map(|x| End::new::<F>(x, whole, BLOCKS / together)));
    let mut room = [0; STORED_CHUNK];
    task.bytes.iter().take(AHEAD).step_by(LINE).for_each(|at| s.prefetch(at));
    let all = task.bytes.len() / task.row_bytes;
    for first in (0..all).step_by(ROWS) {
        let width = ROWS.min(all - first);
        let together = if width == ROWS { together } else { 1 };
        let mut sums = [[s.zero(); ROWS]; M];
        for r in 0..width {
            let start = (first + r) * task.row_bytes;
            let row = &task.bytes[start..start + task.row_bytes];
            let ahead = task.bytes.as_ptr().wrapping_add(start + AHEAD);
            // of this row alone: one of them stays in a register
            let mut own = [s.zero(); M];
            for c in 0..whole + usize::from(end > 0 && together == 1) {
                (0..F::BYTES).step_by(LINE).for_each(|at| s.prefetch(ahead.wrapping_add(c * F::BYTES + at)));
                let product = Product::new::<F>(s, chunk::whole::<F>(row, c, &mut room));
                for (own, &(codes, scales, block_sums)) in own[..m].iter_mut().zip(&x) {
                    let part = product.with::<F>(s, &codes[c * F::LEN..][..F::LEN], array(block_sums, c));
                    *own = s.fma(part, s.load(array(scales, c)), *own);
                }
            }
            for (sums, own) in sums[..m].iter_mut().zip(own) {
                sums[r] = own;
            }
            if together > 1 {
                (whole * F::BYTES..task.row_bytes)
                    .step_by(LINE)
                    .for_each(|at| s.prefetch(ahead.wrapping_add(at)));
            }
        }
        let row_ends: [_; ROWS] = std::array::from_fn(|r| {
            if r < width { &task.bytes[(first + r) * task.row_bytes + whole * F::BYTES..] } else { &[] }
        });
        match (together, &ends) {
            (4, Some(ends)) => add_ends::<S, F, M, 4>(s, row_ends, &ends[..m], &mut sums),
            (2, Some(ends)) => add_ends::<S, F, M, 2>(s, row_ends, &ends[..m], &mut sums),
            _ => {}
        }
        for (j, sums) in sums[..m].iter().enumerate() {
            let at = (task.span.rows.start + j) * task.n + task.column + first;
            let sums = s.sums(*sums);
            // SAFETY: rows and columns of this task alone.
            match unsafe { task.out.slice(at, width) } {
                ViewMut::F32(out) => out.copy_from_slice(&sums[..width]),
                ViewMut::Bf16(out) => {
                    for (out, &sum) in out.iter_mut().zip(&sums) {
                        *out = minke_num::bf16::from_f32(sum);
                    }
                }
            }
        }
    }
}

/// Adds the products of the ends of rows, `TOGETHER` to a chunk.
#[inline(always)]
fn add_ends<S: Simd, F: Unpack, const M: usize, const TOGETHER: usize>(
    s: S,
    rows: [&[u8]; ROWS],
    ends: &[End],
    sums: &mut [[S::V; ROWS]; M],
) {
    for (g, rows) in rows.as_chunks::<TOGETHER>().0.iter().enumerate() {
        let product = Product::new::<F>(s, OfRows { rows: *rows, per: F::LEN / F::STORED_LEN / TOGETHER });
        for (sums, end) in sums.iter_mut().zip(ends) {
            let part = product.with::<F>(s, &end.codes[..F::LEN], &end.sums);
            for (r, sum) in sums[g * TOGETHER..][..TOGETHER].iter_mut().enumerate() {
                *sum = s.fma(s.portion::<TOGETHER>(part, r), s.load(&end.scales), *sum);
            }
        }
    }
}

/// The end of a row of inputs, as often as it fits into a chunk.
struct End {
    codes: [i8; CHUNK],
    sums: [f32; LANES],
    /// Once, and zero behind it.
    scales: [f32; LANES],
}

impl End {
    /// The `blocks` blocks behind `whole` chunks.
    #[inline(always)]
    fn new<F: Unpack>((codes, scales, sums): (&[i8], &[f32], &[f32]), whole: usize, blocks: usize) -> Self {
        let mut end = Self { codes: [0; CHUNK], sums: [0.0; LANES], scales: [0.0; LANES] };
        for copy in end.codes[..F::LEN].chunks_exact_mut(blocks * F::BLOCK) {
            copy.copy_from_slice(&codes[whole * F::LEN..][..blocks * F::BLOCK]);
        }
        for copy in end.sums.chunks_exact_mut(blocks) {
            copy.copy_from_slice(&sums[whole * BLOCKS..][..blocks]);
        }
        end.scales.copy_from_slice(array(scales, whole));
        end
    }
}

/// A chunk of a stored row, or of the ends of some.
struct Product<S: Simd> {
    q: [S::B; 8],
    scale: S::V,
    min: S::V,
}

impl<S: Simd> Product<S> {
    #[inline(always)]
    fn new<F: Unpack>(s: S, blocks: impl Blocks) -> Self {
        let [scale, min] = F::scales(s, blocks);
        Self { q: F::vectors(s, blocks), scale, min }
    }

    /// Its product with codes, for each block: `scale (q . x) + min sum(x)`.
    #[inline(always)]
    fn with<F: Unpack>(&self, s: S, codes: &[i8], sums: &[f32; LANES]) -> S::V {
        let sums = s.load(sums);
        let part = s.mul(s.block_dots(self.q, codes, F::OFFSET, sums), self.scale);
        if F::MIN { s.fma(self.min, sums, part) } else { part }
    }
}

/// The `i`-th sixteen.
#[inline(always)]
pub(super) fn array(x: &[f32], i: usize) -> &[f32; LANES] {
    x[i * LANES..][..LANES].try_into().expect("sixteen")
}

/// Sixteen stored rows at a time unpacked as a panel, and tiles of rows that go through all of a few panels.
#[inline(always)]
fn many<S: Simd, F: Unpack>(s: S, task: &Task<'_>) {
    let places = tile::places(task.cols / F::BLOCK);
    let blocks = task.cols / F::BLOCK;
    // of a panel: a block more, see `pack`
    let (codes, numbers) = (SIDE * (task.cols + F::BLOCK), SIDE * (blocks + 1));
    let signed = S::signed_bytes(F::OFFSET);
    let columns = task.bytes.len() / task.row_bytes;
    // one tile of rows has nothing to read a panel again for; a few panels in turn are faster all the same where products
    // are made in tile registers. Where tiles take longer than memory does, it answers in the meantime
    let all = columns.div_ceil(SIDE);
    let one = task.span.rows.len() <= SIDE;
    let tile_asks = one && S::BYTES_TILE_ASKS;
    let together = if tile_asks {
        1
    } else if one {
        all.min(PANELS)
    } else {
        all
    };
    let mut q = scratch::take::<u8>(together * codes);
    let mut scale = scratch::take::<f32>(together * numbers);
    let mut min = scratch::take::<f32>(if F::MIN { scale.len() } else { 0 });
    let mut sums = [0.0f32; SIDE * SIDE];
    for from in (0..columns).step_by(together * SIDE) {
        let panels = together.min((columns - from).div_ceil(SIDE));
        for (p, q) in q.chunks_exact_mut(codes).enumerate().take(panels) {
            let part = p * numbers..(p + 1) * numbers;
            let min = if F::MIN { &mut min[part.clone()] } else { &mut [] };
            tile::pack::<S, F>(
                s,
                task.bytes,
                task.row_bytes,
                from + p * SIDE,
                !tile_asks,
                &places,
                q,
                &mut scale[part],
                min,
            );
        }
        for first in (0..task.span.rows.len()).step_by(SIDE) {
            let rows = (task.span.rows.len() - first).min(SIDE);
            let (x, x_scale, x_sum) = task.x.from(task.span.first + first);
            for p in 0..panels {
                let t = BytesTile {
                    q: q[p * codes..].as_ptr(),
                    scale: scale[p * numbers..].as_ptr(),
                    min: if F::MIN { min[p * numbers..].as_ptr() } else { std::ptr::null() },
                    offset: if signed { 0 } else { F::OFFSET },
                    signed,
                    block: F::BLOCK,
                    blocks,
                    x: x.as_ptr(),
                    x_scale: x_scale.as_ptr(),
                    x_sum: x_sum.as_ptr(),
                    rows,
                    out: sums.as_mut_ptr(),
                    next: task.bytes.as_ptr().wrapping_add((from + SIDE) * task.row_bytes),
                    next_bytes: if tile_asks { SIDE * task.row_bytes } else { 0 },
                };
                // SAFETY: panel, rows and their scales have `blocks` blocks, `sums` room for a tile.
                unsafe { s.bytes_tile(t) };
                let column = from + p * SIDE;
                let here = SIDE.min(columns - column);
                let turned = s.transpose(std::array::from_fn(|r| s.load(array(&sums, r))));
                for (r, sums) in turned.into_iter().enumerate().take(rows) {
                    let at = (task.span.rows.start + first + r) * task.n + task.column + column;
                    // SAFETY: rows and columns of this task alone.
                    let mut out = unsafe { task.out.slice(at, here) };
                    store(s, sums, &mut out, 0, here);
                }
            }
        }
    }
}

/// [`Simd::FEW_ROWS`]
struct FewRows;

impl Kernel for FewRows {
    type Out = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::FEW_ROWS
    }
}
