//! `metrics.jsonl` of post-training: named values by step, and samples.

use std::collections::BTreeMap;

use minke_train::metrics::{Balance, Line};
use serde::{Deserialize, Serialize};

/// Named numbers after a step. Names are those of the field: `reward`, `pass@1`, `pass@1/FAMILY`,
/// `pass@1/FAMILY:LEVEL`, `thought` (tokens), `entropy`, `signal`, `kl_rollout`, `loss`, `lr`, `tok_s`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Values {
    /// Steps done.
    pub step: u64,
    /// Seconds of training so far, over all parts of a run.
    pub elapsed_s: f64,
    /// The numbers; those that are not finite are left out.
    pub values: BTreeMap<String, f64>,
}

impl Values {
    /// Adds a number, unless it is none.
    pub fn put(&mut self, name: impl Into<String>, value: f64) {
        if value.is_finite() {
            self.values.insert(name.into(), value);
        }
    }

    /// Adds how evenly experts were used, from the tokens that each got, `[layers][e]`; nothing where there are none.
    pub fn put_balance<'a>(&mut self, counts: impl IntoIterator<Item = &'a Vec<u64>>) {
        let counts: Vec<Vec<u64>> = counts.into_iter().cloned().collect();
        if !counts.is_empty() {
            let balance = Balance::from_counts(&counts);
            self.put("max_violation", balance.max_violation);
            self.put("dead_experts", balance.dead_experts as f64);
        }
    }

    /// Adds how many updates of a step changed nothing, where there are any.
    pub fn put_skipped(&mut self, updates: u64) {
        if updates > 0 {
            self.put("skipped", updates as f64);
        }
    }

    /// The number of a name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.get(name).copied()
    }
}

/// One answer, for people to read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Steps done.
    pub step: u64,
    /// What was asked.
    pub prompt: String,
    /// What the model wrote, its thought included.
    pub text: String,
    /// `right`, `wrong`, or what else was found.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub verdict: String,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A training step.
    Step(Values),
    /// An evaluation.
    Evaluation(Values),
    /// One answer.
    Sample(Sample),
}

impl Line for Record {
    fn step(&self) -> u64 {
        match self {
            Self::Step(values) | Self::Evaluation(values) => values.step,
            Self::Sample(sample) => sample.step,
        }
    }
}
