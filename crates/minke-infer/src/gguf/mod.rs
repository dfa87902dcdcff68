//! Models in GGUF files: what their keys and tensors mean in the terms of a model folder, and the other way.
//!
//! A file says the same as a folder in other words. [`config_json`] makes a `config.json` of its keys and [`metadata`] keys
//! of a config; [`names`] is the one table of tensors; [`GgufWeights`] gives a file's tensors under their published names,
//! [`gguf_tensors`] a model's tensors under those of GGUF, and [`write_gguf`] writes a file of them.
//!
//! Where the two differ in more than words:
//!
//! | in GGUF | in a folder |
//! |---|---|
//! | architecture `llama`: rows of queries and keys so that pairs that are rotated together are neighbours | halves of a head |
//! | all experts of a layer in one tensor | a tensor each |
//! | `attn_k_b` (each head turned over) and `attn_v_b` | `kv_b_proj`, keys and values of a head in turn |
//! | Gemma's gains of norms | their distances from one |
//! | `rope_freqs.weight`, divisors of frequencies | `rope_scaling` of type llama3 |
//! | `yarn_log_multiplier` = 0.1 `mscale_all_dim` | `mscale`, `mscale_all_dim` |
//!
//! The rules are those of llama.cpp: `src/models/*.cpp` reads, `conversion/*.py` writes.

mod config;
mod export;
mod metadata;
mod names;
mod source;
#[cfg(test)]
pub(crate) mod tests;
mod write;

pub use config::config_json;
pub use export::{OutTensor, gguf_tensors};
pub use metadata::{NoPlace, metadata};
pub use names::Arch;
pub use source::{GgufWeights, Layout};
pub use write::{Step, Storage, ToWrite, WriteError, Written, elements, write_gguf};
