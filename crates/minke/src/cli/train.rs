//! Arguments of commands that train.

use std::path::PathBuf;

use clap::Args;

use super::shared::{RecipeArgs, Threads};

/// `minke pretrain`, and the stages that come after it.
#[derive(Debug, Args)]
pub struct Train {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The run's folder, instead of the recipe's run.out
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue a run from its last checkpoint
    #[arg(long)]
    pub resume: bool,
    /// Start even if it needs more memory than there is
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object per event
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke make`.
#[derive(Debug, Args)]
pub struct Make {
    /// A recipe of stages
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Change a value of a stage, such as rl.train.steps=50, or of the whole, such as run.seed=1; can be given
    /// several times
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
    /// The folder, instead of the recipe's run.out
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Keep what is finished and go on with what was cut off
    #[arg(long, conflicts_with = "from")]
    pub resume: bool,
    /// Make this stage alone, again if it is there
    #[arg(long, value_name = "STAGE", conflicts_with = "from")]
    pub only: Option<String>,
    /// Make this stage and what follows again
    #[arg(long, value_name = "STAGE")]
    pub from: Option<String>,
    /// Start stages even if they need more memory than there is
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object per event
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke bench train`.
#[derive(Debug, Args)]
pub struct BenchTrain {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Steps to measure, after warming up
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub steps: u32,
    /// Start even if it needs more memory than there is
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}

/// `minke bench grpo`.
#[derive(Debug, Args)]
pub struct BenchGrpo {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Prompts of a step
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prompts: u32,
    /// Answers to each prompt
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub group: u32,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub new_tokens: u32,
    /// Steps to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub steps: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub threads: Threads,
}
