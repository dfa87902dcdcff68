//! Arguments of commands that run a model.

use std::path::PathBuf;

use clap::Args;

use super::shared::{CacheArgs, Drafts, ModelArgs, SamplingArgs, SpeculationArgs, Threads, Word};

/// `minke chat`.
#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    pub model: ModelArgs,
    /// An instruction that holds for the whole conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Whether it thinks before it answers: on, off, auto, or at most N tokens [default: auto, as its template has it]
    #[arg(long, value_name = "HOW")]
    pub think: Option<String>,
    /// Go on with the conversation of a file that /save wrote
    #[arg(long, value_name = "FILE")]
    pub load: Option<PathBuf>,
    /// Show speed and how full the context is after each answer
    #[arg(long)]
    pub verbose: bool,
    /// Neither read nor write what was typed in earlier runs
    #[arg(long)]
    pub no_history: bool,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `minke serve`.
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where to listen; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub addr: String,
    /// The model's name for clients [default: the last part of MODEL]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Let web pages of this origin ask, such as http://localhost:3000, and others by its host's name; can be given several times
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    pub allow_origin: Vec<String>,
    /// Answers that are written at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub parallel: u32,
    /// Requests that may wait for their turn
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub queue: u32,
    /// Memory of all caches of keys and values
    #[arg(long, value_name = "GIB", default_value_t = 2.0)]
    pub cache_gib: f64,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Seconds from a request to the end of its answer
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub timeout: u64,
}

/// What a request says about its tokens, beside how they are chosen.
#[derive(Debug, Clone, Args)]
pub struct SteeringArgs {
    /// Write at least so many tokens before one may end the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_tokens: u32,
    /// Add X to the logit of a token id; -100 forbids it; can be given several times
    #[arg(long, value_name = "ID=X", value_parser = bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// End where this token id comes up; can be given several times
    #[arg(long, value_name = "ID")]
    pub stop_id: Vec<u32>,
    /// With --json, tell the N likeliest tokens at each place
    #[arg(long, value_name = "N", default_value_t = 0, requires = "json")]
    pub top_logprobs: u32,
    /// Close a thought that has come to N tokens, and let the model go on with its answer
    #[arg(long, value_name = "N")]
    pub think_budget: Option<u32>,
    /// Write JSON that satisfies the schema in this file
    #[arg(long, value_name = "FILE", group = "form")]
    pub json_schema: Option<PathBuf>,
    /// Write text that matches this regular expression as a whole
    #[arg(long, value_name = "REGEX", group = "form", allow_hyphen_values = true)]
    pub regex: Option<String>,
    /// Write text of the grammar in this file, in Lark's syntax
    #[arg(long, value_name = "FILE", group = "form")]
    pub grammar: Option<PathBuf>,
}

/// A scheme and a host, as browsers send them.
fn origin(text: &str) -> Result<String, String> {
    let host = text.split_once("://").map(|(_, host)| host);
    match host.filter(|host| !host.is_empty() && !host.contains(['/', '*', ' '])) {
        Some(_) => Ok(text.to_owned()),
        None => {
            Err("expected a scheme and a host, and its port if it has one: http://localhost:3000".to_owned())
        }
    }
}

/// `ID=X`.
fn bias(text: &str) -> Result<(u32, f32), String> {
    let pair = text.split_once('=').and_then(|(id, x)| Some((id.parse().ok()?, x.parse().ok()?)));
    pair.ok_or_else(|| "expected a token id, =, and a number, such as 42=-100".to_owned())
}

/// `minke generate`.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to continue; - reads it from standard input
    #[arg(short = 'p', long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: String,
    /// Ask the text as a question, by the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Continue the text as it is, which is also done without this, with a note where the model has a chat template
    #[arg(long, conflicts_with_all = ["chat", "system", "think"])]
    pub raw: bool,
    /// An instruction before the question; asks by the chat template
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Whether it thinks before it answers: on, off, auto, or at most N tokens; asks by the chat template
    #[arg(long, value_name = "HOW")]
    pub think: Option<String>,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub steering: SteeringArgs,
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `minke score`.
#[derive(Debug, Args)]
pub struct Score {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A JSON file with token ids: {"sequences": [[1, 2, 3], [4, 5]]}
    #[arg(long, value_name = "FILE.json")]
    pub tokens: PathBuf,
    /// Write f32 tensors logits.0, logits.1, ... of shape [tokens, vocabulary]
    #[arg(long, value_name = "OUT.safetensors")]
    pub logits: Option<PathBuf>,
    /// Print one JSON object, with the log-probability of each token
    #[arg(long)]
    pub json: bool,
}

/// `minke bench infer`.
#[derive(Debug, Args)]
pub struct BenchInfer {
    /// A model folder, a run folder, a .gguf file, OWNER/NAME in the local hub cache, or a pretrain recipe
    #[arg(value_name = "MODEL|RECIPE")]
    pub model: String,
    /// Tokens of each prompt [default: 512, or what fits]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub prefill: Option<u32>,
    /// Tokens of each answer [default: 64, or what fits]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub decode: Option<u32>,
    /// Sequences at once
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch: u32,
    /// Draft tokens ahead, as minke generate does; random weights and prompts draft badly
    #[arg(long, value_name = "HOW", value_enum, default_value = "off")]
    pub speculate: Drafts,
    /// A smaller model with the same tokenizer that drafts, with --speculate draft or auto
    #[arg(long, value_name = "MODEL")]
    pub draft_model: Option<String>,
    /// Read this text instead of random tokens
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Measurements, of which the median counts
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Compute in this type instead of the one that the weights are stored in: in f32 and bf16 weights in FP8 are expanded
    #[arg(long, value_enum)]
    pub precision: Option<Word>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}
