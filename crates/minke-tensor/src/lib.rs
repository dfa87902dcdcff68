//! Tensors, coarse operations with forward and backward, and the tape.
//!
//! The tape records calls of about a dozen coarse operations (linear, norm with residual, attention, mixture of
//! experts, loss...), not a tensor algebra: each operation does its own backward pass by hand over the kernels of
//! `minke-cpu`. Without a tape the same functions are inference, which is how training and generation come to be one
//! engine.
//!
//! - [`Tensor`]: a row-major matrix in f32 or bf16 whose memory is recycled when it is dropped.
//! - [`Store`]: all weights in one flat buffer, their gradients, and the packed copies that products read.
//! - [`Context`]: the machine, the store, the tape and the timers of one pass; operations take it first.
//! - [`ops`]: the operations.

mod context;
mod grads;
mod inputs;
pub mod ops;
mod store;
mod tensor;

pub use context::{Context, Slot, Timers, Var};
pub use grads::Grads;
pub use inputs::InputSums;
pub use store::{Made, Stack, Store, WeightId};
pub use tensor::{Memory, Tensor, Tensor8};
