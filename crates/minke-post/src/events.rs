//! What a stage tells while it goes on; whoever called decides what a person sees of it.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::metrics::{Sample, Values};

/// How a stage begins, or goes on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Started {
    /// What is done: `sft`, `grpo`, `distill`.
    pub kind: &'static str,
    /// The run's name.
    pub name: String,
    /// The run's folder.
    pub folder: PathBuf,
    /// Steps already done, when it is resumed.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Parameters, MTP modules included.
    pub parameters: u64,
    /// Parameters that one token uses.
    pub active_parameters: u64,
    /// Threads that compute.
    pub threads: usize,
    /// Instruction-set level.
    pub level: &'static str,
    /// What else a person wants to know, in words.
    pub facts: Vec<(String, String)>,
}

/// Something happened; serialised as one object with its kind in `event`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// Something long before or between steps.
    Progress {
        /// In one or two words.
        what: &'a str,
        /// Parts done.
        done: u64,
        /// Parts in all.
        total: u64,
    },
    /// The first step comes next.
    Started(&'a Started),
    /// A step was done.
    Step {
        /// Its metrics.
        metrics: &'a Values,
        /// Steps of the whole run.
        steps: u64,
        /// Seconds to the end at the present pace.
        remaining_s: f64,
    },
    /// The model was examined.
    Evaluation(&'a Values),
    /// One answer of the model.
    Sample(&'a Sample),
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
