//! The coarse operations: each with its forward and its backward pass, side by side.
//!
//! A forward function takes the context, values and weights, and gives values; with a tape it records a closure that
//! holds what its backward pass needs and nothing more. Gradients of weights are added into the store.

mod attention;
mod embedding;
mod ffn;
mod linear;
mod loss;
mod moe;
mod norm;
mod policy;
#[cfg(test)]
mod tests;

pub use attention::{AttentionWeights, Keys, MlaWeights, Rotary, gqa_attention, mla_absorbed, mla_attention};
pub use embedding::embedding;
pub use ffn::{gated_unit, swiglu_ffn};
pub use linear::{Linear, concat, linear, linear_of_kept};
pub use loss::{
    HeadLoss, HeadWeights, gradient_rows as head_chunk_rows, head_logits, head_loss, head_losses,
};
pub use moe::{MoeWeights, Routed, moe_ffn};
pub use norm::{Norm, add_rmsnorm, rmsnorm};
pub use policy::{PolicyRows, Slope, head_distill, head_likeliest, head_policy};
