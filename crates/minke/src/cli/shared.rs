//! Arguments of several commands.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// How many threads.
#[derive(Debug, Clone, Copy, Args)]
pub struct Threads {
    /// Threads that compute; all cores when not given
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// The type that products run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Word {
    // no doc comments: they would stretch the help of every command
    F32,
    Bf16,
    Fp8,
}

/// Which model, and how it computes.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A model folder, a run folder, a .gguf file, or OWNER/NAME in the local hub cache
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Compute in this type instead of the one that the weights are stored in: in f32 and bf16 weights in FP8 are expanded
    #[arg(long, value_enum)]
    pub precision: Option<Word>,
    #[command(flatten)]
    pub threads: Threads,
}

/// How tokens are chosen.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// Most tokens to write [default: 128; to the end of the answer with a chat template]
    #[arg(short = 'n', long = "tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub n: Option<u32>,
    /// Spread of the choice; 0 takes the likeliest token [default: what the model suggests, else 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Choose among the K likeliest tokens; 0 for all
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Choose among the likeliest tokens that reach this share together
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Choose among tokens with at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Choose among the most typical tokens that reach this share together
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub typical_p: Option<f32>,
    /// Divide the logits of tokens that came before, prompt included; 1 for none
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Take this off the logits of tokens that the answer has already
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Take this off the logits of the answer's tokens, as often as each came
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Names the random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// End where this text comes up; can be given several times
    #[arg(long, value_name = "STR")]
    pub stop: Vec<String>,
}

/// A recipe and changes to it.
#[derive(Debug, Clone, Args)]
pub struct RecipeArgs {
    /// A recipe file
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Change a value of the recipe, such as train.lr=0.001; can be given several times
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
}

/// What a cache keeps.
#[derive(Debug, Clone, Copy, Args)]
pub struct CacheArgs {
    /// What is kept of texts: latents if the model's attention has them, else keys and values (auto); keys and values as the
    /// model computes them (model) or in another type (int8 takes half of bf16); or latents, in 8 bits too
    #[arg(long, value_name = "HOW", value_enum, default_value_t = KeptAs::Auto)]
    pub cache: KeptAs,
}

/// In which form it keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KeptAs {
    Auto,
    Model,
    F32,
    Bf16,
    Int8,
    Latent,
    LatentInt8,
}

/// Where drafts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Drafts {
    // no doc comments: they would stretch the help of every command
    Auto,
    Off,
    Ngram,
    Mtp,
    Draft,
}

/// What is drafted ahead.
#[derive(Debug, Clone, Args)]
pub struct SpeculationArgs {
    /// Draft tokens ahead: from the text itself, the model's prediction modules, or a draft model; the text is the same
    #[arg(long, value_name = "HOW", value_enum, default_value = "auto")]
    pub speculate: Drafts,
    /// A smaller model with the same tokenizer that drafts
    #[arg(long, value_name = "MODEL")]
    pub draft_model: Option<String>,
}

/// Which half of all problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Half {
    Train,
    HeldOut,
}
