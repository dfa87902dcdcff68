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
//! [`matmul8`] and [`matmul8_tn`] multiply operands in FP8.

pub(crate) mod engine;
mod fp8;
mod nt;
mod pack;
pub mod tile;
mod tn;

pub use fp8::{Elements, Matrix8, Packed8, Weight8, matmul8, matmul8_tn};
pub use nt::matmul;
pub use pack::Packed;
pub use tn::matmul_tn;

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
}

/// Panics unless `offsets` rises from 0 to `rows`.
fn check_offsets(op: &str, offsets: &[u32], rows: usize) {
    let rises = offsets.windows(2).all(|w| w[0] <= w[1]);
    assert!(
        rises && offsets.first() == Some(&0) && offsets.last().map(|&x| x as usize) == Some(rows),
        "{op}: offsets {offsets:?} do not cover {rows} rows"
    );
}

#[cfg(test)]
mod tests;
