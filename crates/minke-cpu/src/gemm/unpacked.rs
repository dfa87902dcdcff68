//! `c = a Wᵀ` with a weight that is kept as it is: for models that only run.

use std::ops::Range;

use minke_num::bf16;

use super::engine::{Engine, Rows, layout};
use super::nt::{Right, Task};
use super::tile::{PANEL, RowsTile};
use super::{Compute, Operand, check_offsets};
use crate::cpu::Cpu;
use crate::rows::SharedView;
use crate::scratch::{self, Scratch};
use crate::simd::{GRID_ROWS, GRID_STEPS, Kernel, LANES, Simd};
use crate::view::{View, ViewMut};

/// Rows of a task that packs its own columns: they are packed once for all of these.
const MANY: usize = 448;

/// Rows that are not worth packing for, where tile registers can read the weight where it lies.
const FEW: usize = GRID_ROWS;

/// The words of packed columns of a task.
const TASK_WORDS: usize = 64 * 1024;

/// A weight [groups, n, k] that is read row by row.
pub(crate) trait ByRow: Sync {
    /// Row `i` of a group as numbers, made in the room given (k) if it does not lie in memory as such.
    fn row<'r>(&'r self, group: usize, i: usize, room: &'r mut [f32]) -> View<'r>;

    /// Rows of a group from `i` on, one or more, if they lie in memory as bf16, each behind the other.
    fn lying(&self, group: usize, i: usize) -> Option<&[bf16]>;
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
    let few = Few::of(cpu, a, compute, spans.iter().map(|(_, rows)| rows));
    let parts = panels.div_ceil(each);
    let out = SharedView::new(c);
    cpu.run(spans.len() * parts, |i| {
        let (group, rows) = spans[i / parts].clone();
        let from = i % parts * each;
        let panels = from..panels.min(from + each);
        let span = panels.start * PANEL..n.min(panels.end * PANEL);
        if let Some(x) = few.as_ref().and_then(|few| few.rows(&rows)) {
            let rows = rows.clone();
            if cpu.level().dispatch_product(AsItLies { x, rows, n, k: a.cols, group, span, w, out }) {
                return;
            }
        }
        let mut packed = scratch::take::<u32>(panels.len() * words);
        for (panel, out) in panels.clone().zip(packed.chunks_exact_mut(words.max(1))) {
            let span = panel * PANEL..n.min((panel + 1) * PANEL);
            cpu.level().dispatch_product(PackColumns { compute, group, span, k: a.cols, w, out });
        }
        let b = Right { compute, k: a.cols, steps, words: &packed, from };
        let (first, columns) = (rows.start, 0..n);
        let task = Task { a, b, first, rows: rows.len(), panels, columns, out, to: first, accumulate: false };
        cpu.level().dispatch_product(task);
    });
}

/// Spans of a few rows as the right operand of [`AsItLies`]: pair `p` of row `i` of a span at `p * rows + i`, one span behind
/// another.
struct Few {
    words: Scratch<u32>,
    pairs: usize,
}

impl Few {
    /// Where the level has tile registers, and rows fill their blocks.
    fn of<'s>(
        cpu: &Cpu,
        a: Operand<'_>,
        compute: Compute,
        spans: impl Iterator<Item = &'s Range<usize>> + Clone,
    ) -> Option<Self> {
        let whole = a.cols > 0 && a.cols.is_multiple_of(2 * GRID_STEPS);
        let few = spans.filter(|rows| rows.len() <= FEW);
        if !(cpu.level().has_grid() && compute == Compute::Bf16 && whole && few.clone().next().is_some()) {
            return None;
        }
        let pairs = a.cols / 2;
        let mut words = scratch::take::<u32>(a.rows() * pairs);
        for rows in few {
            let out = &mut words[rows.start * pairs..rows.end * pairs];
            cpu.level().dispatch_product(PackFew { a, first: rows.start, out });
        }
        Some(Self { words, pairs })
    }

    /// A span, if it is of few rows.
    fn rows(&self, rows: &Range<usize>) -> Option<&[u32]> {
        (rows.len() <= FEW).then(|| &self.words[rows.start * self.pairs..rows.end * self.pairs])
    }
}

/// Rows of a from `first` on, as [`Few`] keeps them.
struct PackFew<'a> {
    a: Operand<'a>,
    first: usize,
    out: &'a mut [u32],
}

impl Kernel for PackFew<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (engine, pairs) = (Engine::new(s, Compute::Bf16), self.a.cols / 2);
        let count = self.out.len() / pairs;
        let mut room = scratch::take::<u32>(pairs);
        for i in 0..count {
            engine.pack_row(self.a.row(self.first + i), &mut room);
            for (word, out) in room.iter().zip(self.out.iter_mut().skip(i).step_by(count)) {
                *out = *word;
            }
        }
    }
}

/// A few rows times rows `span` of a weight that lies in memory as bf16. It is read once, in its order. Returns whether it
/// does lie there.
struct AsItLies<'a> {
    x: &'a [u32],
    rows: Range<usize>,
    n: usize,
    k: usize,
    group: usize,
    span: Range<usize>,
    w: &'a dyn ByRow,
    out: SharedView,
}

impl Kernel for AsItLies<'_> {
    type Out = bool;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let columns = self.rows.len();
        let mut sums = [0.0f32; LANES * FEW];
        let mut j = self.span.start;
        while j < self.span.end {
            let Some(weight) = self.w.lying(self.group, j) else { return false };
            let count = LANES.min(self.span.end - j).min(weight.len() / self.k);
            let tile = RowsTile {
                pairs: self.k / 2,
                w: weight.as_ptr().cast(),
                rows: count,
                x: self.x.as_ptr(),
                columns,
                c: sums.as_mut_ptr(),
                next: weight[count * self.k..].as_ptr().cast(),
            };
            // SAFETY: the level has tile registers; `count` rows of the weight, all of x and the sums are there.
            unsafe { s.grid_rows(tile) };
            for (i, row) in self.rows.clone().enumerate() {
                let (at, sums) = (row * self.n + j, sums[i..count * columns].iter().step_by(columns));
                // SAFETY: these rows and columns are this task's.
                match unsafe { self.out.slice(at, count) } {
                    ViewMut::F32(out) => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum),
                    ViewMut::Bf16(out) => {
                        out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = bf16::from_f32(sum));
                    }
                }
            }
            j += count;
        }
        true
    }
}

/// One panel, from rows of the weight.
struct PackColumns<'a> {
    compute: Compute,
    group: usize,
    span: Range<usize>,
    k: usize,
    w: &'a dyn ByRow,
    out: &'a mut [u32],
}

/// Rows of a weight, wherever they are.
struct WeightRows<'a> {
    rows: &'a [View<'a>],
    k: usize,
}

impl<'a> Rows<'a> for WeightRows<'a> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.k
    }

    #[inline(always)]
    fn row(&self, i: usize) -> View<'a> {
        self.rows[i]
    }
}

impl Kernel for PackColumns<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut room = scratch::take::<f32>(PANEL * self.k);
        let mut rows = [View::F32(&[]); PANEL];
        let count = self.span.len();
        let all = rows.iter_mut().zip(room.chunks_exact_mut(self.k.max(1)));
        for ((row, room), i) in all.zip(self.span) {
            *row = self.w.row(self.group, i, room);
        }
        let rows = WeightRows { rows: &rows[..count], k: self.k };
        Engine::new(s, self.compute).pack_columns(&rows, 0..count, self.out);
    }
}
