//! Stages of pipelines that are commands with arguments elsewhere: worked problems, and an examination.
//!
//! ```toml
//! # kind = "worked": what `minke gym write` writes
//! [[file]] name, suite, count, care, format, split, seed
//!
//! # kind = "eval": what `minke eval` asks
//! [model] path, template
//! [eval] suite, per_level, samples, temperature, top_p, max_tokens, concurrency, form,
//!        thinking, split, without_thinking
//! ```

pub mod exam;
pub mod gym;
#[cfg(test)]
mod tests;

use minke_gym::Split;
use minke_train::recipe::{RecipeError, Section};

/// `split`, the half of all problems.
fn split(section: &mut Section, default: Split) -> Result<Split, RecipeError> {
    let ways = [("train", Split::Train), ("held_out", Split::HeldOut)];
    Ok(section.choice("split", &ways)?.unwrap_or(default))
}
