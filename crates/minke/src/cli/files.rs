//! Arguments of commands that read and write model files.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::shared::Threads;

/// `minke inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// A model folder, a run folder, a .gguf file, OWNER/NAME in the local hub cache, or a pretrain recipe
    #[arg(value_name = "MODEL|RECIPE")]
    pub what: String,
    /// Change a value of the recipe; can be given several times
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
    /// Print the recipe with everything that follows from it, as a recipe, and nothing else
    #[arg(long, conflicts_with = "json")]
    pub resolved: bool,
    /// Length of the sequences that memory and arithmetic are stated for [default: the recipe's, or the model's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_073_741_824))]
    pub context: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// For which programs a folder is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportTo {
    Hf,
    Gguf,
}

/// What exported weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportDtype {
    Fp8,
    Bf16,
    F32,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

/// What scales of FP8 may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScaleFormat {
    F32,
    Ue8m0,
}

/// `minke export`.
#[derive(Debug, Args)]
pub struct Export {
    /// A model folder, a run folder, a .gguf file, or OWNER/NAME in the local hub cache
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// The form: hf is a Hugging Face folder, gguf one file with weights and tokenizer
    #[arg(long, value_enum)]
    pub to: ExportTo,
    /// What the weights are stored in; fp8 is for hf, f16 and q8_0 are for gguf
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: ExportDtype,
    /// Scales of fp8: any f32, or powers of two as in DeepSeek-V3.1 [default: the model's own, else f32]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub scale_fmt: Option<ScaleFormat>,
    /// The new folder, or the new file, whose name ends in .gguf
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Replace a model that is there
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What weights become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeTo {
    #[value(name = "Q8_0")]
    Q8_0,
    #[value(name = "Q6_K")]
    Q6K,
    #[value(name = "Q5_K_M")]
    Q5KM,
    #[value(name = "Q4_K_M")]
    Q4KM,
    #[value(name = "Q4_0")]
    Q4_0,
    #[value(name = "FP8")]
    Fp8,
}

/// `minke quantize`.
#[derive(Debug, Args)]
pub struct Quantize {
    /// A model folder, a run folder, a .gguf file, or OWNER/NAME in the local hub cache
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// What the weights become
    #[arg(long, value_enum, value_name = "FORMAT", ignore_case = true)]
    pub to: QuantizeTo,
    /// The new file, whose name ends in .gguf; for FP8 the new folder
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// A text that says which errors matter: columns that read much weigh more
    #[arg(long, value_name = "TEXT-FILE")]
    pub imatrix: Option<PathBuf>,
    /// Replace a model that is there
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}
