//! Arguments of commands about tasks.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::shared::{Half, KeptAs, ModelArgs};

/// In which form tasks are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TaskForm {
    Chat,
    Plain,
    Worked,
}

/// How lines of problems are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LineFormat {
    Text,
    Chat,
    Task,
}

/// A count of lines, which may end in k or M.
fn lines(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1000),
        None => text.strip_suffix('M').map_or((text, 1), |digits| (digits, 1_000_000)),
    };
    let count = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    count
        .filter(|n| (1..=1_000_000_000).contains(n))
        .ok_or_else(|| "expected a number such as 500 or 100k".to_owned())
}

/// Problems of each family and level that `minke eval` asks where the user says no number.
pub const PER_LEVEL: u32 = 25;

/// `minke eval`.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    pub model: ModelArgs,
    /// What is asked; several are counted together and apart
    #[arg(value_name = "SUITE", required = true)]
    pub suites: Vec<String>,
    /// Answers to each task
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub samples: u32,
    /// Problems of each family and level
    #[arg(long, value_name = "N", default_value_t = PER_LEVEL, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub per_level: u32,
    /// The k of pass@k and majority@k, such as 1,4,8 [default: 1 and the number of samples]
    #[arg(long, value_name = "K", value_delimiter = ',')]
    pub k: Vec<u32>,
    /// Spread of the choice; 0 takes the likeliest token [default: 0 for one sample, else what the model
    /// suggests, else 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Most tokens of an answer, its thought included [default: 512]
    #[arg(short = 'n', long = "tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub n: Option<u32>,
    /// Names the problems and the random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Begin answers with an empty thought
    #[arg(long)]
    pub no_think: bool,
    /// How tasks are put: by the chat template, as plain lines, or as worked problems are written
    /// [default: chat, or plain for a model without a template]
    #[arg(long, value_enum)]
    pub form: Option<TaskForm>,
    /// Which half of the gym's problems
    #[arg(long, value_enum, default_value = "held-out")]
    pub split: Half,
    /// Keep the answers in this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Continue the file of --out: only what is not in it is asked
    #[arg(long)]
    pub resume: bool,
    /// Measure also, on the texts, how far the model is from this one: KL divergence and the same likeliest token
    #[arg(long, value_name = "MODEL")]
    pub against: Option<String>,
    /// How the model, and not the one of --against, keeps keys and values when they are compared
    #[arg(long, value_name = "HOW", value_enum, default_value_t = KeptAs::Model, requires = "against")]
    pub cache: KeptAs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `minke gym list`.
#[derive(Debug, Args)]
pub struct GymList {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `minke gym show`.
#[derive(Debug, Args)]
pub struct GymShow {
    /// Families and levels, such as core or chain:2,sort:1-4
    #[arg(value_name = "SUITE")]
    pub suite: String,
    /// Problems of each family and level
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Steps that thoughts take: full, brief, none, mix, or weights such as full=1,none=3
    #[arg(long, value_name = "CARE", default_value = "full")]
    pub care: String,
    /// Names the problems
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Which half of all problems
    #[arg(long, value_enum, default_value = "train")]
    pub split: Half,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `minke gym write`.
#[derive(Debug, Args)]
pub struct GymWrite {
    /// Families and levels, such as core or chain:2,sort:1-4
    #[arg(value_name = "SUITE")]
    pub suite: String,
    /// Lines, such as 500 or 100k; all families and levels come up equally often
    #[arg(long, value_name = "N", value_parser = lines)]
    pub count: u64,
    /// Steps that thoughts take: full, brief, none, mix, or weights such as full=1,none=3
    #[arg(long, value_name = "CARE", default_value = "full")]
    pub care: String,
    /// Prompts and completions to pretrain on, chats for SFT, or tasks to ask
    #[arg(long, value_enum, default_value = "text")]
    pub format: LineFormat,
    /// Names the problems
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Which half of all problems
    #[arg(long, value_enum, default_value = "train")]
    pub split: Half,
    /// The file
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
