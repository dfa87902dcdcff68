//! How an assistant answers.

use minke_data::Thinking;

use crate::{GenerationDefaults, Sampling, Speculation};

/// Temperature where neither the caller nor the model says one.
pub const TEMPERATURE: f32 = 0.8;

/// How answers are made. [`Settings::default`] is plain sampling; [`Settings::suggested`] what a model's folder
/// suggests.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Settings {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of an answer; without, it ends where the model ends it or the context is full.
    pub max_tokens: Option<usize>,
    /// Whether the model thinks before it answers.
    pub thinking: Thinking,
    /// Most tokens of its thought, which is closed for it then.
    pub thinking_budget: Option<usize>,
    /// Texts that end an answer and are not part of it.
    pub stop: Vec<String>,
    /// Where drafts of the next tokens come from; no answer depends on it, only its speed.
    pub speculation: Speculation,
}

impl Settings {
    /// What `generation_config.json` says, and a temperature of [`TEMPERATURE`] where it says none; drafts where they
    /// pay.
    pub fn suggested(by: &GenerationDefaults) -> Self {
        let plain = Sampling::default();
        let sampling = Sampling {
            temperature: by.temperature.unwrap_or(TEMPERATURE),
            top_k: by.top_k.unwrap_or(plain.top_k),
            top_p: by.top_p.unwrap_or(plain.top_p),
            min_p: by.min_p.unwrap_or(plain.min_p),
            typical_p: by.typical_p.unwrap_or(plain.typical_p),
            repetition_penalty: by.repetition_penalty.unwrap_or(plain.repetition_penalty),
            ..plain
        };
        Self { sampling, speculation: Speculation::Auto, ..Self::default() }
    }
}
