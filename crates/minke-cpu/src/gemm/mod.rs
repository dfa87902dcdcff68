//! Matrix products: the three of a linear layer, grouped over experts.
//!
//! | product | call | depth |
//! |---|---|---|
//! | y = x Wᵀ | [`Packed::pack_nt`] once per step, [`matmul`] | inputs |
//! | dx = dy W | [`Packed::pack_nn`] once per step, [`matmul`] | outputs |
//! | dW = dyᵀ x | [`matmul_tn`] | tokens |
//!
//! A grouped product is many of them in one call: rows `offsets[g]..offsets[g + 1]` belong to group g, whose right
//! operand is the g-th. A linear layer is one group. Rows may be read through an index (the tokens of an expert), so
//! nothing is gathered first and nothing is padded.
//!
//! Numerics: [`Compute::F32`] multiplies in f32. [`Compute::Bf16`] rounds both operands to bf16 (nearest, ties to even)
//! and adds exact products in f32: sixteen pairs at a time where the machine has tile registers (AMX), pair by pair where
//! it has `vdpbf16ps`, one by one elsewhere. Every output element is one chain over ascending depth; see [`tile`].
//! [`matmul8`] and [`matmul8_tn`] multiply operands in FP8. [`matmul_heads`] is a grouped product whose groups are heads.

pub(crate) mod engine;
mod fp8;
mod heads;
mod nt;
mod pack;
mod product;
pub mod tile;
mod tn;
mod unpacked;

pub(crate) use fp8::{Matrix8, Right8, matmul8_stacked};
pub use fp8::{Packed8, Weight8, codes_on_the_way, matmul8, matmul8_tn};
pub use heads::{HeadColumns, matmul_heads};
pub(crate) use nt::matmul_stacked;
pub use nt::{matmul, matmul_columns};
pub use pack::Packed;
pub(crate) use product::of_words;
pub use product::{Product, Target};
pub use tn::matmul_tn;
pub(crate) use unpacked::{ByRow, PackColumns, matmul_unpacked};

use std::ops::Range;

use crate::cpu::Cpu;
use crate::simd::GRID_ROWS;
use crate::view::View;

/// What is multiplied: f32, or bf16 with f32 sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compute {
    /// f32 operands.
    F32,
    /// Operands rounded to bf16, f32 accumulation.
    Bf16,
}

/// A row-major matrix, optionally read through row indices.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// The elements.
    pub view: View<'a>,
    /// Row length.
    pub cols: usize,
    /// Row `i` of the operand is row `index[i]` of the view.
    pub index: Option<&'a [u32]>,
}

impl<'a> Operand<'a> {
    /// The matrix as it lies.
    pub fn new(view: View<'a>, cols: usize) -> Self {
        Self { view, cols, index: None }
    }

    /// The rows named by `index`.
    pub fn gathered(view: View<'a>, cols: usize, index: &'a [u32]) -> Self {
        Self { view, cols, index: Some(index) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        match self.index {
            Some(index) => index.len(),
            None => self.view.len().checked_div(self.cols).unwrap_or(0),
        }
    }
}

impl<'a> engine::Rows<'a> for Operand<'a> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn row(&self, i: usize) -> View<'a> {
        let r = self.index.map_or(i, |index| index[i] as usize);
        self.view.slice(r * self.cols, (r + 1) * self.cols)
    }

    #[inline(always)]
    fn ask(&self, i: usize, cols: std::ops::Range<usize>) {
        let r = match self.index {
            None => i,
            Some(index) => match index.get(i) {
                Some(&r) => r as usize,
                None => return,
            },
        };
        self.view.ask(r * self.cols + cols.start, cols.len());
    }

    #[inline(always)]
    fn in_order(&self) -> bool {
        self.index.is_none()
    }
}

/// Panics unless `offsets` rises from 0 to `rows`.
fn check_offsets(op: &str, offsets: &[u32], rows: usize) {
    let rises = offsets.windows(2).all(|w| w[0] <= w[1]);
    assert!(
        rises && offsets.first() == Some(&0) && offsets.last().map(|&x| x as usize) == Some(rows),
        "{op}: offsets {offsets:?} do not cover {rows} rows"
    );
}

/// Rows of a task of a product with packed columns, about: whole register tiles, whose left operand stays in the
/// second-level cache while panels pass.
const TASK_ROWS: usize = 112;

/// The rows of groups in tiles for tasks of a product with packed columns.
struct RowTiles<'a> {
    offsets: &'a [u32],
    rows: usize,
    count: usize,
}

impl<'a> RowTiles<'a> {
    /// In whole register tiles of `tile_rows`.
    fn new(offsets: &'a [u32], tile_rows: usize) -> Self {
        let rows = TASK_ROWS.next_multiple_of(tile_rows);
        let count = offsets.windows(2).map(|w| ((w[1] - w[0]) as usize).div_ceil(rows)).sum();
        Self { offsets, rows, count }
    }

    /// The group and the rows of the `tile`-th.
    fn tile(&self, mut tile: usize) -> (usize, Range<usize>) {
        for (group, w) in self.offsets.windows(2).enumerate() {
            let (start, end) = (w[0] as usize, w[1] as usize);
            let here = (end - start).div_ceil(self.rows);
            if tile < here {
                let first = start + tile * self.rows;
                return (group, first..end.min(first + self.rows));
            }
            tile -= here;
        }
        unreachable!("a tile of {}", self.count)
    }
}

/// Shares out `c = a b` over rows of groups and panels of b: `task(group, rows, panels)`. About `chunk` panels stay in
/// the second-level cache while row tiles pass; few rows: fewer panels, so that every thread has work. How it is cut
/// changes no bit.
fn over_panels(
    cpu: &Cpu,
    tiles: &RowTiles<'_>,
    panels: usize,
    chunk: usize,
    task: impl Fn(usize, Range<usize>, Range<usize>) + Sync,
) {
    let cached = chunk.max(4);
    let chunk =
        if tiles.count >= 8 { cached.min(panels) } else { cached.min(panels.div_ceil(8).max(4)) }.max(1);
    let (chunks, threads) = (panels.div_ceil(chunk), cpu.threads());
    cpu.run(tiles.count * chunks, |mut i| {
        // a thread's part of the loop ([`crate::pool`]) is a part of the rows, to all chunks of panels
        let mut thread = 0;
        let rows = loop {
            let rows = thread * tiles.count / threads..(thread + 1) * tiles.count / threads;
            if i < rows.len() * chunks {
                break rows;
            }
            i -= rows.len() * chunks;
            thread += 1;
        };
        let (part, (group, rows)) = (i / rows.len(), tiles.tile(rows.start + i % rows.len()));
        task(group, rows, part * chunk..panels.min((part + 1) * chunk));
    });
}

/// Which of the matrices of `parts` columns that lie one behind the other have some of `panels`: each of them, these of its own
/// panels, and the column of the output that its first becomes.
fn stacked(parts: &[usize], panels: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>, isize)> {
    let (mut before, mut column) = (0, 0);
    let place = move |(i, &n): (usize, &usize)| {
        let here = n.div_ceil(tile::PANEL);
        let these = panels.start.clamp(before, before + here) - before
            ..panels.end.clamp(before, before + here) - before;
        let at = column;
        (before, column) = (before + here, column + n as isize);
        (!these.is_empty()).then_some((i, these, at))
    };
    parts.iter().enumerate().filter_map(place)
}

/// `0..panels` in pieces of about `chunk`.
fn chunks(panels: usize, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    let chunk = chunk.max(4);
    (0..panels).step_by(chunk).map(move |first| first..panels.min(first + chunk))
}

/// Words and panels of the largest output tile of a task of a product over rows. It stays in the second-level cache while
/// the depth passes; the wider, the longer are the pieces of rows that are read from far away.
const OUTPUT_WORDS: usize = 56 * 1024;
const OUTPUT_PANELS: usize = 8;
/// The same with tile registers, to whose speed reading is slow, on machines that have 2 MiB of such a cache.
const GRID_OUTPUT_WORDS: usize = 256 * 1024;
const GRID_OUTPUT_PANELS: usize = 16;
/// Tasks that such a product is cut into, or a multiple of it, where there are few.
const TASKS: usize = 2;

/// Shares out `c_g = a_gᵀ b_g`, c [groups, m, n], over groups and tiles of the output: `task(group, rows, columns)`. Cut
/// along the rows of the output: packing the right operand again for each cut is cheap, it is copied in whole vectors.
fn over_outputs(
    cpu: &Cpu,
    groups: usize,
    compute: Compute,
    [m, n]: [usize; 2],
    task: impl Fn(usize, Range<usize>, Range<usize>) + Sync,
) {
    let (_, height) = engine::layout(cpu.level(), compute, 1);
    let (unit, words, panels) = if height == GRID_ROWS {
        (GRID_ROWS / 2, GRID_OUTPUT_WORDS, GRID_OUTPUT_PANELS)
    } else {
        (height, OUTPUT_WORDS, OUTPUT_PANELS)
    };
    let (m_units, n_panels) = (m.div_ceil(unit), n.div_ceil(tile::PANEL));
    let n_cuts = n_panels.div_ceil(panels).max(1);
    let most = (words / (n_panels.div_ceil(n_cuts) * tile::PANEL).max(1) / unit).max(1);
    let mut m_cuts = m_units.div_ceil(most).max(1);
    if groups * n_cuts * m_cuts < 4 * TASKS && !(groups * n_cuts).is_multiple_of(TASKS) {
        m_cuts = m_cuts.next_multiple_of(TASKS).min(m_units.div_ceil(2).max(1));
    }
    cpu.run(groups * m_cuts * n_cuts, |i| {
        let (group, cut) = (i / (m_cuts * n_cuts), i % (m_cuts * n_cuts));
        let (mi, ni) = (cut / n_cuts, cut % n_cuts);
        let rows = mi * m_units / m_cuts * unit..((mi + 1) * m_units / m_cuts * unit).min(m);
        let columns =
            ni * n_panels / n_cuts * tile::PANEL..((ni + 1) * n_panels / n_cuts * tile::PANEL).min(n);
        task(group, rows, columns);
    });
}

#[cfg(test)]
mod tests;
