//! Numbers that every other crate agrees on.
//!
//! Training and inference are one engine only if the smallest things are one: how a float becomes a bf16, and
//! which random number belongs to which draw. Both live here, as pure functions without state.
//!
//! - [`bf16`]: the 16-bit format of weights and activations (round to nearest, ties to even).
//! - [`blocks`]: the block formats of GGUF.
//! - [`fp8`]: E4M3 and its block scales.
//! - [`rng`]: counter-based random numbers; a draw is a function of (seed, stream, counter) and of nothing else, so
//!   no batch order, thread count or resume can change it.
//! - [`tolerance`]: how two arrays are compared in tests, NaN and infinity first.

pub mod blocks;
pub mod fp8;
pub mod rng;
pub mod tolerance;

pub use half::{bf16, f16};
