//! What a run tells while it goes on; whoever called decides what a person sees of it.

use std::path::{Path, PathBuf};

use minke_data::{Progress, Stage};
use serde::Serialize;

use crate::metrics::{Evaluation, SampleText, Step};

/// How a run begins, or goes on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Started {
    /// The run's name.
    pub name: String,
    /// The run's folder.
    pub folder: PathBuf,
    /// Steps already done, when it is resumed.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Tokens of one step.
    pub tokens_per_step: u64,
    /// Parameters, MTP modules included.
    pub parameters: u64,
    /// Parameters that one token uses.
    pub active_parameters: u64,
    /// Tokens to learn from.
    pub train_tokens: u64,
    /// Tokens held out.
    pub held_out_tokens: u64,
    /// Share of the positions of a step that stay empty, since whole documents do not fill every window.
    pub padding_share: f64,
    /// Threads that compute.
    pub threads: usize,
    /// Instruction-set level.
    pub level: &'static str,
    /// Rate of a large matrix product here, in the type of the linear layers, GFLOP/s.
    pub gemm_peak_gflops: f64,
    /// Useful floating-point operations of one token, forward and backward.
    pub flops_per_token: u64,
}

/// Something happened; serialised as one object with its kind in `event`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// The text is read, the vocabulary trained, the shards written.
    Data {
        /// `scan`, `train_tokenizer` or `tokenize`.
        stage: &'static str,
        /// Bytes done in this stage.
        done_bytes: u64,
        /// Bytes of this stage, an upper bound.
        total_bytes: u64,
    },
    /// The text is ready.
    DataReady {
        /// What was read and left out.
        stats: minke_data::CorpusStats,
        /// Whether an earlier run had prepared it.
        reused: bool,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// The first step comes next.
    Started(&'a Started),
    /// A step was done.
    Step {
        /// Its metrics.
        metrics: &'a Step,
        /// Steps of the whole run.
        steps: u64,
        /// Seconds to the end at the present pace.
        remaining_s: f64,
    },
    /// Held-out text was scored.
    Evaluation(&'a Evaluation),
    /// Text was written.
    Sample(&'a SampleText),
    /// A checkpoint is on the disk.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// Its folder.
        path: &'a Path,
    },
    /// Something a person should know that does not end the run.
    Warning {
        /// One sentence.
        text: &'a str,
    },
}

impl From<Progress> for Event<'_> {
    fn from(progress: Progress) -> Self {
        let Progress { stage, done_bytes, total_bytes } = progress;
        let stage = match stage {
            Stage::Scan => "scan",
            Stage::TrainTokenizer => "train_tokenizer",
            Stage::Tokenize => "tokenize",
        };
        Self::Data { stage, done_bytes, total_bytes }
    }
}
