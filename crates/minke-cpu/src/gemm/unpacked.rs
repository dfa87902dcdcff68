//! `c = a Wᵀ` with a weight that is kept as it is: for models that only run.

use std::ops::Range;

use minke_num::bf16;

use super::engine::{Engine, Rows, layout, whole_rows};
use super::nt::{Right, Task, To};
use super::tile::{PANEL, RowsTile};
use super::{Compute, Operand, check_offsets};
use crate::cpu::{Cpu, SharedMut};
use crate::rows::SharedView;
use crate::scratch::{self, Scratch};
use crate::simd::{GRID_ROWS, GRID_STEPS, Kernel, LANES, Simd};
use crate::view::{View, ViewMut};

/// Rows of a task that packs its own columns: they are packed once for all of these.
const MANY: usize = 512;

/// Rows that are not worth packing a weight for.
const FEW: usize = 8;

/// The same where tile registers can read the weight as it lies; at 96 both are as fast.
const FEW_IN_GRID: usize = 2 * GRID_ROWS;

/// Bytes that memory is asked for at once.
const LINE: usize = 64;

/// The words of packed columns of a task.
const TASK_WORDS: usize = 64 * 1024;

/// A weight [groups, n, k] that is read row by row.
pub(crate) trait ByRow: Sync {
    /// Row `i` of a group as numbers, made in the room given (k) if it does not lie in memory as such.
    fn row<'r>(&'r self, group: usize, i: usize, room: &'r mut [f32]) -> View<'r>;

    /// Rows of a group from `i` on, one or more, as they lie in memory, each behind the other; and bytes of a row.
    fn lying(&self, group: usize, i: usize) -> (&[u8], usize);

    /// Whether these bytes are what is multiplied.
    fn lies_as_multiplied(&self) -> bool;
}

/// `c[i] = a[i] W_g(i)ᵀ` like [`matmul`](super::matmul), with rows of W packed on the way, or read where they lie: for a weight
/// of which there is no packed copy. Bits are those of [`matmul`](super::matmul) on the same numbers.
///
/// # Panics
/// When shapes do not fit.
pub(crate) fn matmul_unpacked(
    cpu: &Cpu,
    a: Operand<'_>,
    offsets: &[u32],
    n: usize,
    compute: Compute,
    w: &dyn ByRow,
    c: ViewMut<'_>,
) {
    check_offsets("matmul_unpacked", offsets, a.rows());
    assert_eq!(c.len(), a.rows() * n, "matmul_unpacked: output of {} x {n}", a.rows());
    let (steps, _) = layout(cpu.level(), compute, a.cols);
    let (panels, words) = (n.div_ceil(PANEL), steps * PANEL);
    let each = (TASK_WORDS / words.max(1)).min(panels.div_ceil(4 * cpu.threads())).max(1);
    let mut spans = Vec::new();
    for (group, span) in offsets.windows(2).enumerate() {
        for first in (span[0] as usize..span[1] as usize).step_by(MANY) {
            spans.push((group, first..(first + MANY).min(span[1] as usize)));
        }
    }
    let lies = w.lies_as_multiplied();
    let few = Few::of(cpu, a, compute, lies, spans.iter().map(|(_, rows)| rows));
    let parts = panels.div_ceil(each);
    let out = SharedView::new(c);
    cpu.run(spans.len() * parts, |i| {
        let (group, rows) = spans[i / parts].clone();
        let from = i % parts * each;
        let panels = from..panels.min(from + each);
        let span = panels.start * PANEL..n.min(panels.end * PANEL);
        if let Some(x) = few.rows(&rows) {
            let (rows, grid) = (rows.clone(), few.grid);
            let task = FewTask { x, grid, rows, n, k: a.cols, compute, group, span, w, out };
            if cpu.level().dispatch_product(task) {
                return;
            }
        }
        let mut packed = scratch::take::<u32>(panels.len() * words);
        for (panel, out) in panels.clone().zip(packed.chunks_exact_mut(words.max(1))) {
            let span = panel * PANEL..n.min((panel + 1) * PANEL);
            cpu.level().dispatch_product(PackColumns { compute, group, span, k: a.cols, w, out });
        }
        let b = Right { compute, k: a.cols, steps, words: &packed, from };
        let to = To { out, row: rows.start, stride: n, column: 0 };
        cpu.level().dispatch_product(Task { a, b, rows, panels, columns: 0..n, to, accumulate: false });
    });
}

/// Spans of rows that need no packed weight, in words.
struct Few {
    /// One span behind another: its rows as the tile's, or, for tile registers, [`GRID_ROWS`] rows behind another, word `p` of
    /// row `i` of them at `p * rows + i`.
    words: Scratch<u32>,
    steps: usize,
    /// Rows of a span, at most.
    most: usize,
    /// For tile registers.
    grid: bool,
}

impl Few {
    fn of<'s>(
        cpu: &Cpu,
        a: Operand<'_>,
        compute: Compute,
        lies: bool,
        spans: impl Iterator<Item = &'s Range<usize>>,
    ) -> Self {
        let grid = cpu.level().has_grid() && compute == Compute::Bf16;
        // rows must lie there as bf16 and fill the blocks of tile registers
        let most = match grid {
            true if lies && a.cols.is_multiple_of(2 * GRID_STEPS) => FEW_IN_GRID,
            true => 0,
            false => FEW,
        };
        let (steps, _) = layout(cpu.level(), compute, a.cols);
        let few = spans.filter(|rows| rows.len() <= most);
        let lots: Vec<Range<usize>> = few
            .flat_map(|rows| {
                let end = rows.end;
                rows.clone().step_by(GRID_ROWS).map(move |first| first..end.min(first + GRID_ROWS))
            })
            .collect();
        let mut words = scratch::take::<u32>(if lots.is_empty() { 0 } else { a.rows() * steps });
        let all = SharedMut::new(&mut words);
        cpu.run(lots.len(), |i| {
            let rows = lots[i].clone();
            // SAFETY: lots do not overlap.
            let out = unsafe { all.slice(rows.start * steps, rows.len() * steps) };
            cpu.level().dispatch_product(PackFew { a, compute, first: rows.start, grid, out });
        });
        Self { words, steps, most, grid }
    }

    /// A span, if it needs none.
    fn rows(&self, rows: &Range<usize>) -> Option<&[u32]> {
        (rows.len() <= self.most).then(|| &self.words[rows.start * self.steps..rows.end * self.steps])
    }
}

/// Up to [`GRID_ROWS`] rows of a from `first` on, as [`Few`] keeps them.
struct PackFew<'a> {
    a: Operand<'a>,
    compute: Compute,
    first: usize,
    grid: bool,
    out: &'a mut [u32],
}

impl Kernel for PackFew<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let engine = Engine::new(s, self.compute);
        let steps = engine.steps(self.a.cols).max(1);
        if !self.grid {
            for (i, out) in self.out.chunks_exact_mut(steps).enumerate() {
                engine.pack_row(self.a.row(self.first + i), out);
            }
            return;
        }
        let count = self.out.len() / steps;
        let mut room = scratch::take::<u32>(steps);
        for i in 0..count {
            engine.pack_row(self.a.row(self.first + i), &mut room);
            for (word, out) in room.iter().zip(self.out.iter_mut().skip(i).step_by(count)) {
                *out = *word;
            }
        }
    }
}

/// Rows times rows `span` of a weight, which is read once and in its order.
struct FewTask<'a> {
    x: &'a [u32],
    grid: bool,
    rows: Range<usize>,
    n: usize,
    k: usize,
    compute: Compute,
    group: usize,
    span: Range<usize>,
    w: &'a dyn ByRow,
    out: SharedView,
}

impl Kernel for FewTask<'_> {
    /// Whether it is done: tile registers read numbers as they lie there, at no odd address.
    type Out = bool;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        match self.rows.len() {
            _ if self.grid => return self.in_grid(s),
            1 => self.turned::<S, 1>(s),
            2 => self.turned::<S, 2>(s),
            3..=4 => self.turned::<S, 4>(s),
            5..=FEW => self.turned::<S, FEW>(s),
            many => unreachable!("{many} rows are not few"),
        }
        true
    }
}

impl FewTask<'_> {
    #[inline(always)]
    fn in_grid<S: Simd>(&self, s: S) -> bool {
        let pairs = self.k / 2;
        let mut sums = [0.0f32; LANES * GRID_ROWS];
        let mut j = self.span.start;
        while j < self.span.end {
            let (bytes, _) = self.w.lying(self.group, j);
            let Ok(weight) = bytemuck::try_cast_slice::<u8, bf16>(bytes) else { return false };
            let count = LANES.min(self.span.end - j).min(weight.len() / self.k);
            let mut next = weight[count * self.k..].as_ptr().cast();
            for (lot, x) in self.x.chunks(GRID_ROWS * pairs).enumerate() {
                let columns = x.len() / pairs;
                let tile = RowsTile {
                    pairs,
                    w: weight.as_ptr().cast(),
                    rows: count,
                    x: x.as_ptr(),
                    columns,
                    c: sums.as_mut_ptr(),
                    next,
                };
                // SAFETY: the level has tile registers; `count` rows of the weight, all of x and the sums are there.
                unsafe { s.grid_rows(tile) };
                // what comes next is on its way
                next = std::ptr::null();
                for i in 0..columns {
                    let at = (self.rows.start + lot * GRID_ROWS + i) * self.n + j;
                    let sums = sums[i..count * columns].iter().step_by(columns);
                    // SAFETY: these rows and columns are this task's.
                    match unsafe { self.out.slice(at, count) } {
                        ViewMut::F32(out) => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum),
                        ViewMut::Bf16(out) => {
                            out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = bf16::from_f32(sum));
                        }
                    }
                }
            }
            j += count;
        }
        true
    }

    /// Sixteen rows of the weight at a time, turned over in registers; sums of `M` rows, of which as many count as there are.
    #[inline(always)]
    fn turned<S: Simd, const M: usize>(&self, s: S) {
        let engine = Engine::new(s, self.compute);
        let (steps, m) = (engine.steps(self.k), self.rows.len());
        let mut room = scratch::take::<f32>(LANES * self.k);
        for first in self.span.clone().step_by(LANES) {
            let columns = first..self.span.end.min(first + LANES);
            let rows = WeightRows::<LANES>::new(self.w, self.group, columns.clone(), &mut room);
            let (bytes, row_bytes) = self.w.lying(self.group, columns.end - 1);
            // an odd depth's last step is no whole one
            let whole = whole_rows::<LANES>(&rows, 0..columns.len()).filter(|_| self.k.is_multiple_of(2));
            // as many bytes as are read, spread over the steps
            let next = bytes[row_bytes..].as_ptr();
            let share =
                (columns.len() * row_bytes).div_ceil(steps.div_ceil(LANES).max(1)).next_multiple_of(LINE);
            let mut sums = [s.zero(); M];
            for step in (0..steps).step_by(LANES) {
                for at in (0..share).step_by(LINE) {
                    s.prefetch(next.wrapping_add(step / LANES * share + at));
                }
                let most = steps - step;
                if let (Some(rows), LANES..) = (whole, most) {
                    // SAFETY: rows have as many whole steps.
                    let words = unsafe { engine.whole_columns(&rows, step) };
                    let mut x: [&[u32; LANES]; M] = [&[0; LANES]; M];
                    for (j, x) in x.iter_mut().enumerate() {
                        *x = self.x[j.min(m - 1) * steps + step..].first_chunk().expect("sixteen");
                    }
                    for (i, words) in words.into_iter().enumerate() {
                        for (sums, x) in sums.iter_mut().zip(x) {
                            *sums = engine.add_step(*sums, words, x[i]);
                        }
                    }
                    continue;
                }
                let words = engine.columns(&rows, 0..columns.len(), step);
                for (i, words) in words.into_iter().enumerate().take(most) {
                    for (j, sums) in sums.iter_mut().enumerate() {
                        *sums = engine.add_step(*sums, words, self.x[j.min(m - 1) * steps + step + i]);
                    }
                }
            }
            for (sums, row) in sums.into_iter().zip(self.rows.clone()) {
                // SAFETY: these rows and columns are this task's.
                match unsafe { self.out.slice(row * self.n + first, columns.len()) } {
                    ViewMut::F32(out) => s.store_part(sums, out),
                    ViewMut::Bf16(out) => s.store_part_bf16(sums, out),
                }
            }
        }
    }
}

/// One panel, from rows of the weight.
pub(crate) struct PackColumns<'a> {
    pub compute: Compute,
    pub group: usize,
    /// Up to [`PANEL`] of its rows.
    pub span: Range<usize>,
    pub k: usize,
    pub w: &'a dyn ByRow,
    pub out: &'a mut [u32],
}

impl Kernel for PackColumns<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut room = scratch::take::<f32>(PANEL * self.k);
        let count = self.span.len();
        let rows = WeightRows::<PANEL>::new(self.w, self.group, self.span, &mut room);
        Engine::new(s, self.compute).pack_columns(&rows, 0..count, self.out);
    }
}

/// Rows of a weight, wherever they are.
struct WeightRows<'a, const MOST: usize> {
    rows: [View<'a>; MOST],
    k: usize,
}

impl<'a, const MOST: usize> WeightRows<'a, MOST> {
    /// Those of `span`, up to `MOST`; numbers that are made go to `room`.
    #[inline(always)]
    fn new(w: &'a dyn ByRow, group: usize, span: Range<usize>, room: &'a mut [f32]) -> Self {
        let k = room.len() / MOST;
        let mut rows = [View::F32(&[]); MOST];
        for ((row, room), i) in rows.iter_mut().zip(room.chunks_exact_mut(k.max(1))).zip(span) {
            *row = w.row(group, i, room);
        }
        Self { rows, k }
    }
}

impl<'a, const MOST: usize> Rows<'a> for WeightRows<'a, MOST> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.k
    }

    #[inline(always)]
    fn row(&self, i: usize) -> View<'a> {
        self.rows[i]
    }
}
