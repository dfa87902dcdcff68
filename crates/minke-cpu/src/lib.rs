//! CPU kernels on slices and sizes.
//!
//! Everything here knows numbers and memory only: no tensors, no model. Each kernel is written once over the
//! [`simd::Simd`] vector of sixteen lanes and compiled for every instruction set; the level is chosen when the
//! program starts ([`Cpu::detect`]), never when it is built.
//!
//! # The bit contract
//!
//! For one level and one dtype, an output element depends on its inputs and on the depth of its sum, and on nothing
//! else: not on how many other rows are in the call, how work is blocked, or how many threads run. Three rules give
//! that: sums over depth run in ascending order in one chain of fused multiply-adds; reductions over a row use one
//! order per length; work is split along rows and columns only.

pub mod adamw;
pub mod arena;
pub mod attention;
pub mod copy;
pub mod cpu;
pub mod embedding;
pub mod fp8;
pub mod gemm;
pub mod loss;
pub mod moe;
pub mod norm;
pub mod pointwise;
pub mod policy;
pub mod pool;
pub mod reduce;
pub mod rope;
pub mod routing;
pub mod rows;
pub mod scratch;
pub mod simd;
pub mod softmax;
pub mod stored;
pub mod swiglu;
pub mod view;

#[cfg(test)]
mod testing;

pub use cpu::Cpu;
pub use simd::Level;
pub use view::{DType, View, ViewMut};
