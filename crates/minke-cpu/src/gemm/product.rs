//! A product of either kind, by itself or with something that is made of its rows at once, while they are in the cache of the
//! thread that made them.

use std::ops::Range;

use super::engine::layout;
use super::tile::PANEL;
use super::{Compute, Operand, Packed, Packed8, RowTiles, chunks, fp8, nt, over_panels};
use crate::cpu::Cpu;
use crate::fp8::{Fp8, Values};
use crate::rows::SharedView;
use crate::scratch;
use crate::view::{DType, View, ViewMut};

/// Where such rows go.
pub enum Target<'a> {
    /// To a matrix.
    Kept(ViewMut<'a>),
    /// Nowhere: they exist for that moment.
    Passing(DType),
}

/// What is multiplied: rows of a left operand by the packed matrices of groups.
#[derive(Clone, Copy)]
pub enum Product<'a> {
    /// As [`super::matmul`] does.
    Numbers {
        /// Left operand.
        a: Operand<'a>,
        /// Right operand.
        b: &'a Packed,
    },
    /// As [`super::matmul8`] does.
    Codes {
        /// Left operand.
        a: Values<'a>,
        /// How it is coded, if it is not yet.
        how: Fp8,
        /// Right operand.
        b: &'a Packed8,
    },
}

impl Product<'_> {
    /// Rows of the result.
    pub fn rows(&self) -> usize {
        match self {
            Product::Numbers { a, .. } => a.rows(),
            Product::Codes { a, .. } => a.rows(),
        }
    }

    /// Row length of the result.
    pub fn columns(&self) -> usize {
        match self {
            Product::Numbers { b, .. } => b.columns(),
            Product::Codes { b, .. } => b.columns(),
        }
    }

    /// The product, rounded once.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn matmul(self, cpu: &Cpu, offsets: &[u32], c: ViewMut<'_>) {
        match self {
            Product::Numbers { a, b } => nt::matmul(cpu, a, offsets, b, c, false),
            Product::Codes { a, how, b } => fp8::matmul8(cpu, a, how, offsets, b, c),
        }
    }

    /// The product, and `then(rows, what they are)` for some rows after the other, on any thread, while they are in its
    /// cache. All rows are handed over once; their bits are those of the product by itself.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn then(
        self,
        cpu: &Cpu,
        offsets: &[u32],
        c: Target<'_>,
        then: &(dyn Fn(Range<usize>, View<'_>) + Sync),
    ) {
        let what = "a product with what follows";
        let chunk = match self {
            Product::Numbers { a, b } => {
                nt::check(what, cpu, a, offsets, b);
                nt::CHUNK_WORDS / (b.steps * PANEL).max(1)
            }
            Product::Codes { a, b, .. } => {
                fp8::check(what, cpu, a, offsets, b);
                fp8::CHUNK_CODES / (b.depth().len * PANEL).max(1)
            }
        };
        let coding = match self {
            Product::Numbers { .. } => None,
            Product::Codes { a, how, .. } => Some(fp8::coding(cpu, a, how)),
        };
        let (n, rows) = (self.columns(), self.rows());
        let task = |group, rows: Range<usize>, panels: Range<usize>, out: SharedView, to: usize| match self {
            Product::Numbers { a, b } => {
                let b = nt::Right::of(b, group);
                let to = nt::To { out, row: to, stride: n, column: 0 };
                let task = nt::Task { a, b, rows, panels, columns: 0..n, to, accumulate: false };
                cpu.level().dispatch_product(task);
            }
            Product::Codes { a, b, .. } => {
                let (b, how) = (fp8::Right8::of(b, group), coding.expect("of codes"));
                let to = nt::To { out, row: to, stride: n, column: 0 };
                cpu.level().dispatch_product(fp8::Task { a, how, b, rows, panels, to });
            }
        };
        let (kept, dtype) = match c {
            Target::Kept(c) => {
                assert_eq!(c.len(), rows * n, "{what}: output of {rows} x {n}");
                let dtype = c.dtype();
                (Some(SharedView::new(c)), dtype)
            }
            Target::Passing(dtype) => (None, dtype),
        };
        let compute = if let Product::Numbers { b, .. } = self { b.compute } else { Compute::Bf16 };
        let (_, tile_rows) = layout(cpu.level(), compute, 1);
        let (tiles, panels) = (RowTiles::new(offsets, tile_rows), n.div_ceil(PANEL));
        let words = |rows: usize| (rows * n * dtype.size_bytes()).div_ceil(size_of::<u32>());
        // what is kept is read again on the way back at the earliest: where it can go past the cache, it does so after `then`
        // has seen the rows there
        let direct = kept.is_some() && !cpu.level().has_grid();
        if tiles.count < 2 * cpu.threads() {
            // too few to go around: threads share the panels of all rows, and then whatever `then` does
            let mut passing = scratch::take::<u32>(if kept.is_some() { 0 } else { words(rows) });
            let out = kept.unwrap_or_else(|| of_words(&mut passing, dtype));
            over_panels(cpu, &tiles, panels, chunk, |group, rows, panels| {
                let to = rows.start;
                task(group, rows, panels, out, to);
            });
            // SAFETY: all tasks have ended.
            return then(0..rows, unsafe { out.slice(0, rows * n) }.as_view());
        }
        cpu.run(tiles.count, |i| {
            let (group, rows) = tiles.tile(i);
            let mut passing = scratch::take::<u32>(if direct { 0 } else { words(rows.len()) });
            let (out, to) = match kept {
                Some(kept) if direct => (kept, rows.start),
                _ => (of_words(&mut passing, dtype), 0),
            };
            for panels in chunks(panels, chunk) {
                task(group, rows.clone(), panels, out, to);
            }
            // SAFETY: the rows are complete, and this task's.
            let these = unsafe { out.slice(to * n, rows.len() * n) };
            then(rows.clone(), these.as_view());
            if let (Some(kept), false) = (kept, direct) {
                // SAFETY: rows of this task alone.
                let kept = unsafe { kept.slice(rows.start * n, rows.len() * n) };
                match (these.as_view(), kept) {
                    (View::F32(from), ViewMut::F32(to)) => put_away(cpu, from, to),
                    (View::Bf16(from), ViewMut::Bf16(to)) => put_away(cpu, from, to),
                    (View::F32(_) | View::Bf16(_), _) => unreachable!("rows of one dtype"),
                }
            }
        });
    }
}

/// Copies rows to where they stay; see [`Level::put_away`](crate::Level::put_away).
fn put_away<T: bytemuck::Pod>(cpu: &Cpu, from: &[T], to: &mut [T]) {
    cpu.level().put_away(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
}

/// Working memory of one task, as its output.
pub(crate) fn of_words(words: &mut [u32], dtype: DType) -> SharedView {
    SharedView::new(match dtype {
        DType::F32 => ViewMut::F32(bytemuck::cast_slice_mut(words)),
        DType::Bf16 => ViewMut::Bf16(bytemuck::cast_slice_mut(words)),
    })
}
