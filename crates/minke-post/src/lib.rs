//! From a base model to one that thinks: SFT, reinforcement learning, distillation, evaluation.

pub mod asking;
pub mod distill;
pub mod error;
pub mod eval;
pub mod events;
mod fingerprint;
pub mod grpo;
pub mod make;
pub mod metrics;
pub mod recipe;
pub mod report;
pub mod sample;
pub mod session;
pub mod sft;
pub mod stages;
pub mod worked;

pub use error::{PostError, Result};
