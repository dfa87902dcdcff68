//! Products of FP8 operands: E4M3 codes, multiplied exactly, f32 sums that are scaled and promoted at the end of every
//! block of depth.
//!
//! `c[i][j] = sum over blocks B of sa[i][B] sb[B][j] (sum over p in B of a[i][p] b[p][j])`
//!
//! A block is at most 128 of depth, so the inner sum is short, and the outer one is plain f32: DeepSeek-V3 report,
//! section 3.3.2, "increasing accumulation precision", with the CPU's own f32 sums inside the block. The left operand has
//! a scale per row and block, the right one per column and block: for y = x Wᵀ and dx = dy W columns of a block of 128
//! share theirs, for dW both operands are tiles of 128 x 1.

use std::ops::Range;

use minke_num::bf16;

use super::engine::{AHEAD, Engine, Rows, Words, layout, pitch};
use super::nt::{To, store_halves};
use super::tile::PANEL;
use super::{Compute, Operand, RowTiles, check_offsets, over_outputs, over_panels, stacked};
use crate::cpu::{Cpu, SharedMut};
use crate::fp8::{BLOCK, Coding, Cuts, Fp8, Values, largest, pack_row, pack_strips, pack_turned, scale};
use crate::rows::{self, lanes, load_f32};
use crate::scratch::{self, AlignedBuf};
use crate::simd::{GRID_ROWS, Kernel, LANES, Level, Simd};
use crate::stored::chunk::LINE;
use crate::view::{View, ViewMut};

/// Codes of packed right operand that row tiles share before the next are taken.
pub(super) const CHUNK_CODES: usize = 256 * 1024;

/// Rows that share a panel which is made for them alone.
const MANY: usize = 256;

/// A weight in FP8, in the order in which the tile reads it: panels of 32 columns as in [`super::Packed`], each block of
/// depth from a whole block of the tile on, and the scales of its columns.
pub struct Packed8 {
    /// Words of the tile, or codes that are widened when they are used.
    buf: AlignedBuf,
    /// `[groups][blocks][columns padded to panels]`
    scales: AlignedBuf,
    level: Level,
    groups: usize,
    n: usize,
    depth: Cuts,
    words: usize,
    widened: bool,
}

/// A weight [groups, rows, cols] that is to be packed.
#[derive(Clone, Copy)]
pub struct Weight8<'a> {
    /// Its elements.
    pub w: &'a [f32],
    /// How they become codes.
    pub how: Fp8,
    /// Matrices.
    pub groups: usize,
    /// Rows of each, and the parts that are coded by themselves.
    pub rows: Cuts,
    /// Row length.
    pub cols: usize,
}

impl Weight8<'_> {
    fn check(&self) {
        let Self { w, groups, rows, cols, .. } = *self;
        assert_eq!(w.len(), groups * rows.len * cols, "pack8: {groups} groups of {} x {cols}", rows.len);
    }

    /// The scale of every block, `[groups][row blocks][column blocks]`.
    fn scales(&self, cpu: &Cpu, out: &mut [f32]) {
        let Self { w, how, groups, rows, cols } = *self;
        let (down, across) = (rows.blocks(), Cuts::whole(cols).blocks());
        if how.per_tensor {
            // of each matrix of its own
            for (group, out) in out.chunks_exact_mut((down * across).max(1)).enumerate() {
                let w = &w[group * rows.len * cols..][..rows.len * cols];
                out.fill(scale(largest(cpu, View::F32(w)), how.power_of_two));
            }
            return;
        }
        let out = SharedMut::new(out);
        cpu.run(groups * down, |i| {
            let block = rows.block(i % down);
            let start = (i / down * rows.len + block.start) * cols;
            // SAFETY: each task has its own row of blocks.
            let out = unsafe { out.slice(i * across, across) };
            let w = &w[start..start + block.len() * cols];
            cpu.level().dispatch(BlockScales { w, cols, power: how.power_of_two, out });
        });
    }

    /// Columns from `at` of row `row` of group `group`, on the grid of E4M3 as bf16; `by` is their block's scale.
    #[inline(always)]
    fn grid<S: Simd>(&self, s: S, group: usize, row: usize, at: usize, by: f32, out: &mut [bf16]) {
        let Self { w, rows, cols, .. } = *self;
        let len = out.len();
        let mut out = ViewMut::Bf16(out);
        let (row, by) = (&w[(group * rows.len + row) * cols + at..][..len], s.splat(by));
        lanes!(len, |i, n| {
            let v = s.div(load_f32(s, row, i, n), by);
            rows::store(s, s.round_e4m3(v), &mut out, i, n);
        });
    }
}

crate::rows::kernel! {
    BlockScales<'a>(s: S, w: &'a [f32], cols: usize, power: bool, out: &'a mut [f32]) {
        for (b, out) in out.iter_mut().enumerate() {
            let block = Cuts::whole(cols).block(b);
            let mut most = 0.0f32;
            for row in w.chunks_exact(cols) {
                let x = crate::fp8::amax(s, View::F32(row), block.start, block.len());
                most = if x > most || x.is_nan() { x } else { most };
            }
            *out = scale(most, power);
        }
    }
}

impl Packed8 {
    /// An empty operand whose memory the first packing makes.
    pub fn empty() -> Self {
        let (buf, scales) = (AlignedBuf::default(), AlignedBuf::default());
        let depth = Cuts::whole(0);
        Self { buf, scales, level: Level::SCALAR, groups: 0, n: 0, depth, words: 0, widened: false }
    }

    /// Packs a weight, and codes it where it is not yet coded: for y = x Wᵀ, or (`transposed` false) for dx = dy W.
    /// `widened` keeps the words of the tile (two bytes per element where it multiplies pairs, else four) instead of codes,
    /// and saves the widening when it is used.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn pack(&mut self, cpu: &Cpu, weight: Weight8<'_>, transposed: bool, widened: bool) {
        weight.check();
        let Weight8 { groups, rows, cols, .. } = weight;
        let (n, depth) = if transposed { (rows.len, Cuts::whole(cols)) } else { (cols, rows) };
        let words = words(cpu.level(), depth);
        *self = Self {
            level: cpu.level(),
            groups,
            n,
            depth,
            words,
            widened,
            ..std::mem::replace(self, Self::empty())
        };
        let (down, across) = (rows.blocks(), Cuts::whole(cols).blocks());
        let mut blocks = scratch::take::<f32>(groups * down * across);
        weight.scales(cpu, &mut blocks);
        let (blocks, panels) = (&blocks[..], n.div_ceil(PANEL));
        let padded = panels * PANEL;
        // a scale per column: its block's
        let scales = self.scales.get::<f32>(groups * depth.blocks() * padded);
        for (i, scales) in scales.chunks_exact_mut(padded.max(1)).enumerate() {
            let (group, b) = (i / depth.blocks(), i % depth.blocks());
            let blocks = &blocks[group * down * across..][..down * across];
            for (j, scale) in scales.iter_mut().enumerate() {
                *scale = match j < n {
                    false => 1.0,
                    true if transposed => blocks[rows.of(j) * across + b],
                    true => blocks[b * across + j / BLOCK],
                };
            }
        }
        let bytes = self.panel_bytes();
        let out = SharedMut::new(self.buf.get::<u8>(groups * panels * bytes));
        cpu.run(groups * panels, |i| {
            // SAFETY: each task has its own panel.
            let out = unsafe { out.slice(i * bytes, bytes) };
            let (group, panel) = (i / panels, i % panels);
            let blocks = &blocks[group * down * across..][..down * across];
            let task = PackTask { weight, group, first: panel * PANEL, transposed, blocks, widened, out };
            cpu.level().dispatch_product(task);
        });
    }

    /// Bytes of a panel.
    fn panel_bytes(&self) -> usize {
        panel_bytes(self.level, self.words, self.widened)
    }

    fn panel(&self, group: usize, panel: usize) -> &[u8] {
        let (bytes, panels) = (self.panel_bytes(), self.n.div_ceil(PANEL));
        let all: &[u8] = self.buf.view(self.groups * panels * bytes);
        &all[(group * panels + panel) * bytes..][..bytes]
    }

    /// Scales of the columns of block `b`.
    fn scales(&self, group: usize, b: usize) -> &[f32] {
        let (padded, blocks) = (self.n.next_multiple_of(PANEL), self.depth.blocks());
        let all: &[f32] = self.scales.view(self.groups * blocks * padded);
        &all[(group * blocks + b) * padded..][..padded]
    }

    /// The numbers of a group of a weight that was packed for y = x Wᵀ, from its codes: `code * scale`, [rows, cols].
    ///
    /// # Panics
    /// When it was packed with `widened`.
    pub fn numbers(&self, group: usize) -> Vec<f32> {
        assert!(!self.widened, "numbers are made from codes, one byte each");
        let per_word = if self.level.has_bf16_dot() { 2 } else { 1 };
        let (n, k) = (self.n, self.depth.len);
        let mut out = vec![0.0; n * k];
        for (col, row) in out.chunks_exact_mut(k.max(1)).enumerate() {
            let panel = self.panel(group, col / PANEL);
            let mut at = 0;
            for b in 0..self.depth.blocks() {
                let (block, by) = (self.depth.block(b), self.scales(group, b)[col]);
                let words = &panel[at * PANEL * per_word..];
                at += layout(self.level, Compute::Bf16, block.len()).0;
                for (p, x) in row[block].iter_mut().enumerate() {
                    let word = p / per_word * PANEL + col % PANEL;
                    *x = minke_num::fp8::e4m3_to_f32(words[word * per_word + p % per_word]) * by;
                }
            }
        }
        out
    }

    /// Columns of a product with one of its groups.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// Depth of a product with it, and its blocks.
    pub fn depth(&self) -> Cuts {
        self.depth
    }

    /// Bytes that packing [groups, depth, n] takes on a level.
    pub fn bytes_of(level: Level, groups: usize, depth: Cuts, n: usize, widened: bool) -> usize {
        let panels = groups * n.div_ceil(PANEL);
        let of_panel = panel_bytes(level, words(level, depth), widened);
        panels * (of_panel + depth.blocks() * PANEL * size_of::<f32>())
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.buf.capacity_bytes() + self.scales.capacity_bytes()
    }
}

/// Bytes of a panel whose columns have so many words.
fn panel_bytes(level: Level, words: usize, widened: bool) -> usize {
    let words = words * PANEL;
    if widened {
        words * 4
    } else if level.has_bf16_dot() {
        words * 2
    } else {
        words
    }
}

/// Words of a row or column of this depth, each block padded to whole blocks of the tile.
fn words(level: Level, depth: Cuts) -> usize {
    (0..depth.blocks()).map(|b| layout(level, Compute::Bf16, depth.block(b).len()).0).sum()
}

struct PackTask<'a> {
    weight: Weight8<'a>,
    group: usize,
    first: usize,
    transposed: bool,
    blocks: &'a [f32],
    widened: bool,
    out: &'a mut [u8],
}

impl Kernel for PackTask<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weight, group, first, transposed, blocks, widened, out } = self;
        let Weight8 { rows, cols, .. } = weight;
        let engine = Engine::new(s, Compute::Bf16);
        let across = Cuts::whole(cols).blocks();
        let (n, depth) = if transposed { (rows.len, Cuts::whole(cols)) } else { (cols, rows) };
        let width = PANEL.min(n - first);
        let mut grid = scratch::take::<bf16>(BLOCK * PANEL);
        let mut narrow = scratch::take::<u32>(if widened { 0 } else { engine.steps(BLOCK) * PANEL });
        let mut at = 0;
        for b in 0..depth.blocks() {
            let block = depth.block(b);
            let (len, steps) = (block.len(), engine.steps(block.len()));
            let bytes = PANEL * if widened { 4 } else { engine.codes_per_word() };
            let out = &mut out[at * bytes..(at + steps) * bytes];
            let (wide, codes): (&mut [u32], _) = if widened {
                (bytemuck::cast_slice_mut(out), None)
            } else {
                (&mut narrow[..steps * PANEL], Some(out))
            };
            // columns that a partial panel lacks, and steps behind the last, are zeros in both forms
            wide.fill(0);
            if transposed {
                for (j, grid) in grid[..width * len].chunks_exact_mut(len).enumerate() {
                    let by = blocks[rows.of(first + j) * across + b];
                    weight.grid(s, group, first + j, block.start, by, grid);
                }
                engine.pack_columns(&Operand::new(View::Bf16(&grid[..width * len]), len), 0..width, wide);
            } else {
                // a panel is within one block of columns
                let by = blocks[b * across + first / BLOCK];
                for (p, grid) in grid[..width * len].chunks_exact_mut(width).enumerate() {
                    weight.grid(s, group, block.start + p, first, by, grid);
                }
                let x = Operand::new(View::Bf16(&grid[..width * len]), width);
                engine.pack_strips(&x, 0..len, 0..width, PANEL, 0, wide);
            }
            if let Some(codes) = codes {
                engine.narrow(wide, codes);
            }
            at += steps;
        }
    }
}

/// Whether numbers as a left operand may be coded on their way into a product of `depth` by `columns`: panels of b are then
/// so few that rows are coded once or twice (where rows are few, by each task of a share of the panels, eight at most).
pub fn codes_on_the_way(depth: usize, columns: usize) -> bool {
    depth * columns <= 2 * CHUNK_CODES
}

/// `c[i] = a[i] b_g(i)` for every row: a [rows, k] in codes, or in numbers that are coded as `how` says on their way, b
/// [groups, k, n], c [rows, n], f32 sums rounded once.
///
/// Rows `offsets[g]..offsets[g + 1]` use group g.
///
/// # Panics
/// When shapes or blocks do not fit.
pub fn matmul8(cpu: &Cpu, a: Values<'_>, how: Fp8, offsets: &[u32], b: &Packed8, c: ViewMut<'_>) {
    check("matmul8", cpu, a, offsets, b);
    assert_eq!(c.len(), a.rows() * b.n, "matmul8: output of {} x {}", a.rows(), b.n);
    let (how, out) = (coding(cpu, a, how), rows::SharedView::new(c));
    let (_, tile_rows) = layout(cpu.level(), Compute::Bf16, b.depth.len);
    let chunk = CHUNK_CODES / (b.depth.len * PANEL).max(1);
    let tiles = RowTiles::new(offsets, tile_rows);
    over_panels(cpu, &tiles, b.n.div_ceil(PANEL), chunk, |group, rows, panels| {
        let (b, to) = (Right8::of(b, group), To { out, row: rows.start, stride: b.n, column: 0 });
        cpu.level().dispatch_product(Task { a, how, b, rows, panels, to });
    });
}

/// `c[i] = a[i] W_g(i)ᵀ` like [`matmul8`], with matrices that are stacked in the rows of W_g: `part(group, i)` is the i-th,
/// which has `parts[i]` columns of the output. Those that are not laid (not all are `laid`) are read once for many rows.
///
/// # Panics
/// When shapes do not fit.
pub(crate) fn matmul8_stacked<'a>(
    cpu: &Cpu,
    a: Values<'_>,
    how: Fp8,
    offsets: &[u32],
    parts: &[usize],
    part: &(dyn Fn(usize, usize) -> Right8<'a> + Sync),
    laid: bool,
    c: ViewMut<'_>,
) {
    check_offsets("matmul8_stacked", offsets, a.rows());
    let (width, k) = (parts.iter().sum::<usize>(), a.cols());
    assert_eq!(c.len(), a.rows() * width, "matmul8_stacked: output of {} x {width}", a.rows());
    let (how, out) = (coding(cpu, a, how), rows::SharedView::new(c));
    let panels = parts.iter().map(|n| n.div_ceil(PANEL)).sum();
    let task = |group, rows: Range<usize>, panels| {
        for (i, panels, column) in stacked(parts, panels) {
            let (b, rows) = (part(group, i), rows.clone());
            assert_eq!((b.n, b.depth.len), (parts[i], k), "matmul8_stacked: part {i}");
            let to = To { out, row: rows.start, stride: width, column };
            cpu.level().dispatch_product(Task { a, how, b, rows, panels, to });
        }
    };
    let codes = (k * PANEL).max(1);
    if laid {
        let (_, tile_rows) = layout(cpu.level(), Compute::Bf16, k);
        return over_panels(cpu, &RowTiles::new(offsets, tile_rows), panels, CHUNK_CODES / codes, task);
    }
    let spans = RowTiles::new(offsets, MANY);
    let each = (CHUNK_CODES / codes).min(panels.div_ceil(4 * cpu.threads())).max(1);
    let cuts = panels.div_ceil(each);
    cpu.run(spans.count * cuts, |i| {
        let (group, rows) = spans.tile(i / cuts);
        let first = i % cuts * each;
        task(group, rows, first..panels.min(first + each));
    });
}

#[track_caller]
pub(super) fn check(op: &str, cpu: &Cpu, a: Values<'_>, offsets: &[u32], b: &Packed8) {
    assert_eq!(b.level, cpu.level(), "{op}: the right operand was packed for another level");
    check_offsets(op, offsets, a.rows());
    let cuts = if let Values::Codes(a) = a { a.cuts } else { b.depth };
    assert_eq!(
        (a.cols(), cuts, offsets.len()),
        (b.depth.len, b.depth, b.groups + 1),
        "{op}: depth and groups of left and right operand"
    );
}

/// How numbers of a left operand are coded.
pub(super) fn coding(cpu: &Cpu, a: Values<'_>, how: Fp8) -> Coding {
    let fixed = if how.per_tensor { scale(a.largest(cpu), how.power_of_two) } else { 0.0 };
    Coding { fixed, power: how.power_of_two }
}

/// The right operand of a task: panels of one matrix.
#[derive(Clone, Copy)]
pub(crate) struct Right8<'a> {
    /// Columns, and the depth of each.
    n: usize,
    depth: Cuts,
    /// Words of a column.
    words: usize,
    panels: Panels8<'a>,
}

/// Where panels are.
#[derive(Clone, Copy)]
enum Panels8<'a> {
    /// In a group of a packed weight.
    Packed(&'a Packed8, usize),
    /// In codes as [`Packed8`] has them.
    Laid(&'a [u8], Matrix8<'a>),
    /// Nowhere: they are made of rows on the way.
    Rows(Matrix8<'a>),
}

/// A matrix in E4M3 with a scale for each square of [`BLOCK`] by [`BLOCK`], as files have it; its rows are columns of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix8<'a> {
    /// Codes [rows, cols].
    pub codes: &'a [u8],
    /// Scales, `minke_num::fp8::scale_shape(rows, cols)` of them.
    pub scales: &'a [f32],
    pub rows: usize,
    pub cols: usize,
}

impl Matrix8<'_> {
    /// Bytes of a panel of it in codes.
    pub fn panel_bytes(level: Level, cols: usize) -> usize {
        panel_bytes(level, words(level, Cuts::whole(cols)), false)
    }

    /// Lays panel `panel` in codes. Whether all of them are numbers.
    pub fn lay(&self, level: Level, panel: usize, out: &mut [u8]) -> bool {
        level.dispatch_product(LayPanel { matrix: *self, panel, out })
    }

    /// The words of some blocks of a panel, and for each block which of its columns have a code that is no number.
    #[inline(always)]
    fn pack<S: Simd>(
        &self,
        engine: Engine<S>,
        panel: usize,
        blocks: Range<usize>,
        mut out: &mut [u32],
        no_numbers: &mut [u32],
    ) {
        let (s, first) = (engine.simd(), panel * PANEL);
        let width = PANEL.min(self.rows - first);
        for (b, no_numbers) in blocks.zip(no_numbers) {
            let block = Cuts::whole(self.cols).block(b);
            let steps = engine.steps(block.len());
            let (here, rest) = std::mem::take(&mut out).split_at_mut(steps * PANEL);
            out = rest;
            let (lines, _) = bytemuck::cast_slice_mut::<u32, f32>(here).as_chunks_mut::<PANEL>();
            let mut rows = [&self.codes[..0]; PANEL];
            *no_numbers = 0;
            for (j, row) in rows[..width].iter_mut().enumerate() {
                *row = &self.codes[(first + j) * self.cols..][block.clone()];
                *no_numbers |= u32::from(has_no_number(row)) << j;
                // those of the next panel
                let next = row.as_ptr().wrapping_add(PANEL * self.cols);
                (0..block.len()).step_by(LINE).for_each(|at| s.prefetch(next.wrapping_add(at)));
            }
            for (left, rows) in (0..PANEL).step_by(LANES).zip(rows.as_chunks::<LANES>().0) {
                let mut whole = [&[0; BLOCK]; LANES];
                let is_whole = whole
                    .iter_mut()
                    .zip(rows)
                    .all(|(whole, row)| (*row).try_into().map(|row| *whole = row).is_ok());
                for (step, lines) in (0..steps).step_by(LANES).zip(lines.chunks_mut(LANES)) {
                    let columns = if is_whole {
                        engine.whole_code_columns(&whole, step)
                    } else {
                        engine.code_columns(rows, step)
                    };
                    for (line, words) in lines.iter_mut().zip(columns) {
                        s.store(words, (&mut line[left..left + LANES]).try_into().expect("sixteen"));
                    }
                }
            }
        }
    }
}

/// Whether a code is none of a number: all bits of its magnitude are set.
#[inline(always)]
fn has_no_number(codes: &[u8]) -> bool {
    let carried = |codes: u64| (codes & 0x7f7f_7f7f_7f7f_7f7f) + 0x0101_0101_0101_0101;
    let any = |codes: &[u8]| {
        let (eights, rest) = codes.as_chunks::<8>();
        let any = eights.iter().fold(0, |any, eight| any | carried(u64::from_le_bytes(*eight)));
        rest.iter().fold(any, |any, &code| any | carried(u64::from(code)))
    };
    // (of a whole block in vectors)
    let any = match <&[u8; BLOCK]>::try_from(codes) {
        Ok(block) => any(block),
        Err(_) => any(codes),
    };
    any & 0x8080_8080_8080_8080 != 0
}

struct LayPanel<'a> {
    matrix: Matrix8<'a>,
    panel: usize,
    out: &'a mut [u8],
}

impl Kernel for LayPanel<'_> {
    type Out = bool;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let engine = Engine::new(s, Compute::Bf16);
        let mut words = scratch::take::<u32>(engine.steps(BLOCK) * PANEL);
        let (depth, mut out, mut all) = (Cuts::whole(self.matrix.cols), self.out, true);
        for b in 0..depth.blocks() {
            let len = engine.steps(depth.block(b).len()) * PANEL;
            let mut no_numbers = [0];
            self.matrix.pack(engine, self.panel, b..b + 1, &mut words[..len], &mut no_numbers);
            all &= no_numbers == [0];
            let (codes, rest) = out.split_at_mut(len * engine.codes_per_word());
            engine.narrow(&words[..len], codes);
            out = rest;
        }
        all
    }
}

impl<'a> Right8<'a> {
    pub(super) fn of(b: &'a Packed8, group: usize) -> Self {
        Self { n: b.n, depth: b.depth, words: b.words, panels: Panels8::Packed(b, group) }
    }

    /// A matrix as it lies in a file, or in panels that [`Matrix8::lay`] made of it.
    pub fn of_matrix(level: Level, matrix: Matrix8<'a>, laid: Option<&'a [u8]>) -> Self {
        let depth = Cuts::whole(matrix.cols);
        let panels = laid.map_or(Panels8::Rows(matrix), |laid| Panels8::Laid(laid, matrix));
        Self { n: matrix.rows, depth, words: words(level, depth), panels }
    }

    /// The words of a panel, where it has them.
    #[inline(always)]
    fn widened(&self, panel: usize) -> Option<&'a [u32]> {
        match self.panels {
            Panels8::Packed(b, group) if b.widened => Some(bytemuck::cast_slice(b.panel(group, panel))),
            Panels8::Packed(..) | Panels8::Laid(..) | Panels8::Rows(_) => None,
        }
    }

    /// Makes the words of some blocks of a panel, from word `at` of each column on.
    #[inline(always)]
    fn widen<S: Simd>(
        &self,
        engine: Engine<S>,
        panel: usize,
        blocks: Range<usize>,
        at: usize,
        out: &mut [u32],
        no_numbers: &mut [u32],
    ) {
        let codes = match self.panels {
            Panels8::Packed(b, group) => b.panel(group, panel),
            Panels8::Laid(laid, _) => {
                let bytes = self.words * PANEL * engine.codes_per_word();
                &laid[panel * bytes.next_multiple_of(LINE)..][..bytes]
            }
            Panels8::Rows(matrix) => {
                let no_numbers = &mut no_numbers[blocks.clone()];
                return matrix.pack(engine, panel, blocks, out, no_numbers);
            }
        };
        let per_word = engine.codes_per_word();
        engine.widen(&codes[at * PANEL * per_word..][..out.len() * per_word], out);
    }

    /// The scales of the columns of a panel in block `b`; not numbers where a code in it is none.
    #[inline(always)]
    fn scales<'r>(&self, panel: usize, b: usize, no_numbers: &[u32], room: &'r mut [f32; PANEL]) -> &'r [f32]
    where
        'a: 'r,
    {
        let (matrix, no_numbers) = match self.panels {
            Panels8::Packed(packed, group) => return &packed.scales(group, b)[panel * PANEL..][..PANEL],
            Panels8::Laid(_, matrix) => (matrix, 0),
            Panels8::Rows(matrix) => (matrix, no_numbers[b]),
        };
        // a panel is within one row of blocks
        room.fill(matrix.scales[panel * PANEL / BLOCK * self.depth.blocks() + b]);
        if no_numbers != 0 {
            for (_, scale) in room.iter_mut().enumerate().filter(|(j, _)| no_numbers >> j & 1 == 1) {
                *scale = f32::NAN;
            }
        }
        room
    }
}

/// Rows times panels.
pub(crate) struct Task<'a> {
    pub a: Values<'a>,
    pub how: Coding,
    pub b: Right8<'a>,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
    pub to: To,
}

impl Kernel for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { a, how, b, rows, panels, to } = self;
        let engine = Engine::new(s, Compute::Bf16);
        let (first, rows) = (rows.start, rows.len());
        let (depth, blocks) = (b.depth, b.depth.blocks());
        let a_row = pitch(b.words);
        let mut a_words = scratch::take::<u32>(rows * a_row);
        let mut a_scales = scratch::take::<f32>(rows * blocks);
        let a_rows = a_words.chunks_exact_mut(a_row).zip(a_scales.chunks_exact_mut(blocks.max(1)));
        for (i, (words, scales)) in a_rows.enumerate() {
            match a {
                Values::Plain(a) => {
                    engine.ask(&a, first + i + AHEAD, 0..depth.len);
                    pack_row(engine, a.row(first + i), depth, how, words, scales);
                }
                Values::Codes(a) => {
                    let (codes, from) = a.row(first + i);
                    // (one by one: they are few, and a copy would be a call)
                    for (to, from) in scales.iter_mut().zip(from) {
                        *to = *from;
                    }
                    let mut at = 0;
                    for block in 0..blocks {
                        let block = depth.block(block);
                        let steps = engine.steps(block.len());
                        engine.widen_row(&codes[block], &mut words[at..at + steps]);
                        at += steps;
                    }
                }
            }
        }
        let tile_rows = engine.tile_rows();
        // codes that one tile reads are widened a block at a time, which stays in the first cache
        let by_block = rows <= tile_rows;
        let mut wide = scratch::take::<u32>(match b.panels {
            Panels8::Packed(Packed8 { widened: true, .. }, _) => 0,
            _ if by_block => engine.steps(BLOCK) * PANEL,
            _ => b.words * PANEL,
        });
        let mut no_numbers = scratch::take::<u32>(blocks);
        // one tile: the sums of a block, and those of all blocks so far
        let mut block_sums = scratch::take::<f32>(GRID_ROWS * PANEL);
        let mut sums = scratch::take::<f32>(GRID_ROWS * PANEL);
        for panel in panels {
            let widened = b.widened(panel);
            if widened.is_none() && !by_block {
                b.widen(engine, panel, 0..blocks, 0, &mut wide, &mut no_numbers);
            }
            let (col, width) = (panel * PANEL, PANEL.min(b.n - panel * PANEL));
            let vecs = width.div_ceil(LANES);
            for i in (0..rows).step_by(tile_rows) {
                let height = tile_rows.min(rows - i);
                let from = |r: usize| to.at(i + r, col);
                let mut at = 0;
                for block in 0..blocks {
                    let steps = engine.steps(depth.block(block).len());
                    let here = at * PANEL..(at + steps) * PANEL;
                    let b_words = match widened {
                        Some(words) => &words[here],
                        None if by_block => {
                            let out = &mut wide[..steps * PANEL];
                            b.widen(engine, panel, block..block + 1, at, out, &mut no_numbers);
                            &*out
                        }
                        None => &wide[here],
                    };
                    let words = Words {
                        steps,
                        a: a_words[i * a_row + at..].as_ptr(),
                        a_row,
                        a_step: 1,
                        b: b_words.as_ptr(),
                        c: block_sums.as_mut_ptr(),
                        c_row: PANEL,
                        ..Words::NOWHERE
                    };
                    // SAFETY: both operands hold `steps` steps from these places, the tile fits its buffer.
                    unsafe { engine.tile(words, height, vecs) };
                    let mut room = [0.0; PANEL];
                    let by_column = b.scales(panel, block, &no_numbers, &mut room);
                    let mut promotion = Promotion {
                        block: &block_sums,
                        by_row: &a_scales[i * blocks + block..],
                        row_step: blocks,
                        by_column,
                        before: (block > 0).then_some((sums.as_ptr(), PANEL)),
                        to: sums.as_mut_ptr(),
                        to_row: PANEL,
                        half: std::ptr::null_mut(),
                        half_row: to.stride,
                    };
                    // the last block of whole columns: to the output at once
                    if block + 1 == blocks && width == PANEL {
                        match to.out {
                            rows::SharedView::F32(c) => {
                                (promotion.to, promotion.to_row) =
                                    (c.start().wrapping_add(from(0)), to.stride);
                            }
                            rows::SharedView::Bf16(c) => promotion.half = c.start().wrapping_add(from(0)),
                        }
                    }
                    // SAFETY: the sums are a whole tile, rows and columns of the output this task's.
                    unsafe { promotion.run(engine, height) };
                    at += steps;
                }
                for r in 0..if width == PANEL { 0 } else { height } {
                    // SAFETY: rows and columns of this task.
                    match unsafe { to.out.slice(from(r), width) } {
                        ViewMut::F32(c) => c.copy_from_slice(&sums[r * PANEL..][..width]),
                        ViewMut::Bf16(c) => store_halves(s, &sums[r * PANEL..][..width], c),
                    }
                }
            }
        }
    }
}

/// `to[i][j] = before[i][j] + block[i][j] (by_row[i] by_column[j])`: two vectors of each of some rows.
struct Promotion<'a> {
    /// Sums of a block, [`PANEL`] in a row.
    block: &'a [f32],
    /// Scales of rows, `row_step` apart.
    by_row: &'a [f32],
    row_step: usize,
    by_column: &'a [f32],
    /// What is added to, and the distance of its rows.
    before: Option<(*const f32, usize)>,
    to: *mut f32,
    to_row: usize,
    /// Where not null: sums are rounded and go here instead.
    half: *mut bf16,
    half_row: usize,
}

impl Promotion<'_> {
    /// # Safety
    /// `height` rows of `before` must be readable, and those of `to` or `half` the caller's to write.
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, engine: Engine<S>, height: usize) {
        assert!(
            self.block.len() >= height * PANEL
                && self.by_column.len() >= PANEL
                && self.by_row.len() > (height - 1) * self.row_step,
            "promotion: a whole tile"
        );
        // SAFETY: by the caller's promise.
        unsafe {
            match (self.before, self.half.is_null()) {
                (None, true) => self.rows::<S, false, false>(engine, height),
                (None, false) => self.rows::<S, false, true>(engine, height),
                (Some(_), true) => self.rows::<S, true, false>(engine, height),
                (Some(_), false) => self.rows::<S, true, true>(engine, height),
            }
        }
    }

    /// # Safety
    /// As for [`Promotion::run`], whose assertion holds.
    #[inline(always)]
    unsafe fn rows<S: Simd, const GO_ON: bool, const HALF: bool>(&self, engine: Engine<S>, height: usize) {
        let s = engine.simd();
        let (left, right) =
            (load_f32(s, self.by_column, 0, LANES), load_f32(s, self.by_column, LANES, LANES));
        let (before, before_row) = self.before.unwrap_or((std::ptr::null(), 0));
        let load = |at: *const f32| -> S::V {
            // SAFETY: by the caller's promise.
            s.load(unsafe { &*at.cast() })
        };
        for r in 0..height {
            // SAFETY: by the caller's promise, and the assertion in `run`.
            unsafe {
                let by = s.splat(*self.by_row.get_unchecked(r * self.row_step));
                let block = self.block.as_ptr().add(r * PANEL);
                let (mut from_left, mut from_right) = (s.zero(), s.zero());
                if GO_ON {
                    let before = before.add(r * before_row);
                    (from_left, from_right) = (load(before), load(before.add(LANES)));
                }
                let left = s.fma(load(block), s.mul(by, left), from_left);
                let right = s.fma(load(block.add(LANES)), s.mul(by, right), from_right);
                if !HALF {
                    let to = self.to.add(r * self.to_row);
                    s.store(left, &mut *to.cast());
                    s.store(right, &mut *to.add(LANES).cast());
                } else if engine.pairs() {
                    s.store(s.pairs_along(left, right), &mut *self.half.add(r * self.half_row).cast());
                } else {
                    let half = self.half.add(r * self.half_row);
                    s.store_bf16(left, &mut *half.cast());
                    s.store_bf16(right, &mut *half.add(LANES).cast());
                }
            }
        }
    }
}

/// `c_g (+)= a_gᵀ b_g`: a [rows, m], b [rows, n], c [groups, m, n]; the depth is the rows of each group, in blocks of 128
/// from its first, in which every column of a and of b has a scale of its own. `power` says of each whether these are
/// powers of two.
///
/// # Panics
/// When shapes do not fit.
pub fn matmul8_tn(
    cpu: &Cpu,
    a: Operand<'_>,
    b: Values<'_>,
    offsets: &[u32],
    how: Fp8,
    power: [bool; 2],
    c: &mut [f32],
    accumulate: bool,
) {
    let (m, n, groups) = (a.cols, b.cols(), offsets.len().saturating_sub(1));
    assert_eq!(a.rows(), b.rows(), "matmul8_tn: rows of left and right operand");
    check_offsets("matmul8_tn", offsets, a.rows());
    assert_eq!(c.len(), groups * m * n, "matmul8_tn: output of {groups} x {m} x {n}");
    if let Values::Codes(b) = b {
        assert!(
            b.cuts.part.is_multiple_of(LANES) || b.cuts.part == b.cuts.len,
            "matmul8_tn: parts of {:?}",
            b.cuts
        );
    }
    let fixed = if how.per_tensor {
        [largest(cpu, a.view), b.largest(cpu)].map(|x| scale(x, how.power_of_two))
    } else {
        [0.0; 2]
    };
    let how = [0, 1].map(|i| Coding { fixed: fixed[i], power: power[i] });
    let out = SharedMut::new(c);
    over_outputs(cpu, groups, Compute::Bf16, [m, n], |g, rows, cols| {
        let (a, depth) = (Values::Plain(a), offsets[g] as usize..offsets[g + 1] as usize);
        let task = TaskTn { a, b, depth, rows, cols, how, out, base: g * m * n, accumulate };
        cpu.level().dispatch_product(task);
    });
}

struct TaskTn<'a> {
    a: Values<'a>,
    b: Values<'a>,
    depth: Range<usize>,
    rows: Range<usize>,
    cols: Range<usize>,
    how: [Coding; 2],
    out: SharedMut<f32>,
    base: usize,
    accumulate: bool,
}

impl Kernel for TaskTn<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { a, b, depth, rows, cols, how, out, base, accumulate } = self;
        let engine = Engine::new(s, Compute::Bf16);
        let (n, height) = (b.cols(), engine.tile_rows());
        let steps = engine.steps(BLOCK.min(depth.len()));
        let (m_width, n_width) = (rows.len(), cols.len().next_multiple_of(PANEL));
        if depth.is_empty() {
            for r in rows.clone().take_while(|_| !accumulate) {
                // SAFETY: rows and columns of this task.
                unsafe { out.slice(base + r * n + cols.start, cols.len()).fill(0.0) };
            }
            return;
        }
        let a_stride = steps * height + LANES * if engine.rows_along() { height } else { 1 };
        let b_stride = steps * PANEL + LANES;
        let mut a_words = scratch::take::<u32>(m_width.div_ceil(height) * a_stride);
        let mut b_words = scratch::take::<u32>(cols.len().div_ceil(PANEL) * b_stride);
        let mut a_scales = scratch::take::<f32>(m_width);
        let mut b_scales = scratch::take::<f32>(n_width);
        b_scales.fill(1.0);
        let mut block_sums = scratch::take::<f32>(GRID_ROWS * PANEL);
        let mut edge = scratch::take::<f32>(GRID_ROWS * PANEL);
        for start in depth.clone().step_by(BLOCK) {
            let block = start..depth.end.min(start + BLOCK);
            let steps = engine.steps(block.len());
            let go_on = accumulate || start > depth.start;
            let a_scales = &mut a_scales[..m_width];
            if engine.rows_along() {
                let stride = a_stride / height;
                pack_turned(engine, &a, block.clone(), rows.clone(), how[0], stride, &mut a_words, a_scales);
            } else {
                let (pitch, stride, to) = (height, a_stride, &mut a_words[..]);
                pack_strips(engine, &a, block.clone(), rows.clone(), how[0], pitch, stride, to, a_scales);
            }
            let (stride, to) = (b_stride, &mut b_words[..]);
            pack_strips(engine, &b, block, cols.clone(), how[1], PANEL, stride, to, &mut b_scales);
            for j in (0..cols.len()).step_by(PANEL) {
                let width = PANEL.min(cols.len() - j);
                for i in (0..m_width).step_by(height) {
                    let tall = height.min(m_width - i);
                    let (a_row, a_step) =
                        if engine.rows_along() { (a_stride / height, 1) } else { (1, tall) };
                    let words = Words {
                        steps,
                        a: a_words[i / height * a_stride..].as_ptr(),
                        a_row,
                        a_step,
                        b: b_words[j / PANEL * b_stride..].as_ptr(),
                        c: block_sums.as_mut_ptr(),
                        c_row: PANEL,
                        ..Words::NOWHERE
                    };
                    // SAFETY: both operands hold `steps` steps from these places, the tile fits its buffer.
                    unsafe { engine.tile(words, tall, width.div_ceil(LANES)) };
                    let first = base + (rows.start + i) * n + cols.start + j;
                    let mut promotion = Promotion {
                        block: &block_sums,
                        by_row: &a_scales[i..],
                        row_step: 1,
                        by_column: &b_scales[j..j + PANEL],
                        before: None,
                        to: out.start().wrapping_add(first),
                        to_row: n,
                        half: std::ptr::null_mut(),
                        half_row: 0,
                    };
                    if width < PANEL {
                        for r in 0..tall {
                            // SAFETY: rows and columns of this task alone, as wide as the columns are.
                            let c = unsafe { out.slice(first + r * n, width) };
                            edge[r * PANEL..][..width].copy_from_slice(c);
                        }
                        (promotion.to, promotion.to_row) = (edge.as_mut_ptr(), PANEL);
                    }
                    promotion.before = go_on.then_some((promotion.to.cast_const(), promotion.to_row));
                    // SAFETY: the edge is a whole tile; rows and columns of this task alone, in bounds for a whole panel.
                    unsafe { promotion.run(engine, tall) };
                    for r in 0..if width < PANEL { tall } else { 0 } {
                        // SAFETY: as above.
                        let c = unsafe { out.slice(first + r * n, width) };
                        c.copy_from_slice(&edge[r * PANEL..][..width]);
                    }
                }
            }
        }
    }
}
