//! The recipe of `minke sft`.

use std::path::PathBuf;

use minke_data::template::ChatTemplate;
use minke_gym::{Split, Suite, Task};
use minke_model::Precision;
use minke_train::recipe::{self, Document, Optim, Optimizer, RecipeError, Run, Section, optim, run};
use minke_train::resume::is_free_everywhere;
use minke_train::schedule::Decay;
use serde::Serialize;

use super::data::Overlong;
use crate::error::{PostError, Result};
use crate::recipe::{model_path, precision, suite_place, template, template_place};
use crate::session::{MOST_STEPS, Rhythm};

/// Fine-tuning: small steps, no weight decay, a linear end.
pub(crate) const OPTIM: Optim = Optim {
    optimizer: Optimizer::AdamW,
    lr: 1e-4,
    muon_lr: 2e-3,
    weight_decay: 0.0,
    warmup_share: 0.05,
    decay_share: 0.5,
    decay: Decay::Linear,
    final_lr_share: 0.1,
    ..Optim::PRETRAIN
};

/// `[model]`: what to start from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelGiven {
    /// A model folder, a run folder, or a name of the hub's cache.
    pub path: String,
    /// A chat template by its name, file or folder; the model's own when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

/// One entry of `data.sources`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Source {
    /// A JSONL file; a relative path is taken from the recipe's folder.
    pub path: String,
}

/// `[data]`: the examples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Data {
    /// Share of samples that are held out.
    pub validation_share: f64,
    /// Lines that may be unusable before the run refuses.
    pub max_bad_lines: u64,
    /// What becomes of samples that are longer than a sequence.
    pub overlong: Overlong,
    /// The files.
    pub sources: Vec<Source>,
}

impl Data {
    /// The files' places.
    ///
    /// # Errors
    /// A variable in a path that is not set.
    pub fn paths(&self) -> Result<Vec<PathBuf>> {
        let expand = |source: &Source| {
            minke_data::expand_path(&source.path)
                .map_err(|reason| PostError::unsuitable("data.sources", reason))
        };
        self.sources.iter().map(expand).collect()
    }
}

/// `[train]`: the loop.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Train {
    /// Most tokens of a sample.
    pub sequence_length: usize,
    /// A micro-batch holds as many tokens as this many full sequences.
    pub batch_size: usize,
    /// Micro-batches of one step.
    pub accumulation: usize,
    /// How often every sample is learned from, where no `steps` are given.
    pub epochs: u64,
    /// Steps of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// How gradients become steps.
    #[serde(flatten)]
    pub optim: Optim,
    /// Most held-out tokens of one evaluation.
    pub eval_tokens: u64,
    /// When things happen.
    #[serde(flatten)]
    pub rhythm: Rhythm,
}

/// `[eval]`: tasks that the model is examined with, if there are any.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Examination {
    /// Which tasks.
    pub suite: String,
    /// Tasks of each family and level.
    pub per_level: usize,
    /// Answers to each.
    pub samples: usize,
    /// Spread of the choice; 0 takes the likeliest token.
    pub temperature: f64,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Names the tasks and the random numbers.
    pub seed: u64,
}

/// `[sample]`: what the model is asked from time to time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Asking {
    /// The questions.
    pub prompts: Vec<String>,
    /// Most tokens of an answer.
    pub tokens: usize,
    /// Spread of the choice.
    pub temperature: f64,
}

/// A recipe with everything said.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// What products run in; what the model's tensors are stored in when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<recipe::Precision>,
    /// Name, seed and folder.
    pub run: Run,
    /// What to start from.
    pub model: ModelGiven,
    /// The examples.
    pub data: Data,
    /// The loop.
    pub train: Train,
    /// The examination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<Examination>,
    /// The questions.
    pub sample: Asking,
}

/// Keys that change no weight; what the model is and which samples there are is judged by their fingerprints.
pub fn is_free(key: &str, _: &str, _: &str) -> bool {
    const FREE: [&str; 6] =
        ["eval", "sample", "train.eval_tokens", "data.max_bad_lines", "model.path", "model.template"];
    is_free_everywhere(key)
        || ["sample.", "eval.", "data.sources"].iter().any(|section| key.starts_with(section))
        || FREE.contains(&key)
}

impl Recipe {
    /// Reads a document.
    ///
    /// # Errors
    /// Unknown keys, wrong types and values out of bounds, each with its place.
    pub fn read(document: &Document) -> Result<Self> {
        document.is_for("sft")?;
        let mut root = document.root();
        let (mut run_section, model_section) = (root.section("run")?, root.section("model")?);
        let (data_section, train_section) = (root.section("data")?, root.section("train")?);
        let (eval_section, sample_section) = (root.section("eval")?, root.section("sample")?);
        let precision = precision(document, &mut root)?;
        // an unknown section first: what stands in it explains other errors
        root.finish()?;
        let run = run(&mut run_section, document)?;
        run_section.finish()?;
        let given_eval = document.given().contains("eval");
        Ok(Self {
            precision,
            run,
            model: model(model_section)?,
            data: data(data_section)?,
            train: train(train_section, OPTIM)?,
            eval: if given_eval { Some(examination(eval_section)?) } else { None },
            sample: asking(sample_section)?,
        })
    }

    /// The template that the recipe names.
    ///
    /// # Errors
    /// There is none of that name, or it is broken.
    pub fn template(&self) -> Result<Option<ChatTemplate>> {
        template("model.template", self.model.template.as_deref())
    }

    /// The tasks that the model is examined with.
    ///
    /// # Errors
    /// There are none such.
    pub fn examination(&self) -> Result<Option<Vec<Task>>> {
        let Some(eval) = &self.eval else { return Ok(None) };
        let tasks = Suite::parse(&eval.suite)
            .and_then(|suite| suite.tasks(Split::HeldOut, eval.per_level, eval.seed))
            .map_err(|error| PostError::unsuitable("eval.suite", error.to_string()))?;
        Ok(Some(tasks))
    }

    /// The precision that the recipe names.
    pub fn precision(&self) -> Option<Precision> {
        self.precision.map(Precision::from)
    }

    /// The whole recipe as TOML; reading it gives the same.
    ///
    /// # Panics
    /// Never: these types have TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("numbers, texts and tables are TOML")
    }
}

fn model(mut s: Section) -> Result<ModelGiven, RecipeError> {
    let path = model_path(&mut s, "path")?;
    let path = path.ok_or_else(|| s.missing("path", "a model or run folder"))?;
    let given = ModelGiven { path, template: template_place(&mut s)? };
    s.finish()?;
    Ok(given)
}

pub(crate) fn data(mut s: Section) -> Result<Data, RecipeError> {
    let mut sources = Vec::new();
    for mut source in s.sections("sources")? {
        let path = source.path("path")?.ok_or_else(|| source.missing("path", "a JSONL file"))?;
        source.finish()?;
        sources.push(Source { path });
    }
    if sources.is_empty() {
        return Err(s.missing("sources", "at least one source, such as [{ path = \"examples.jsonl\" }]"));
    }
    let data = Data {
        sources,
        validation_share: s
            .float("validation_share", "a number from 0 to 0.5", |share| (0.0..=0.5).contains(&share))?
            .unwrap_or(0.02),
        max_bad_lines: s.integer("max_bad_lines", 0, 1 << 40)?.unwrap_or(0),
        overlong: s.choice("overlong", &Overlong::CHOICES)?.unwrap_or(Overlong::Refuse),
    };
    s.finish()?;
    Ok(data)
}

pub(crate) fn train(mut s: Section, defaults: Optim) -> Result<Train> {
    let epochs = s.integer("epochs", 1, 1 << 20)?;
    let steps = s.integer("steps", 1, MOST_STEPS)?;
    if let (Some(epochs), Some(_)) = (epochs, steps) {
        return Err(s.conflict("epochs", &epochs.to_string(), "no value, since train.steps is given").into());
    }
    let train = Train {
        sequence_length: s.integer("sequence_length", 2, 1 << 20)?.unwrap_or(256) as usize,
        batch_size: s.integer("batch_size", 1, 1 << 16)?.unwrap_or(16) as usize,
        accumulation: s.integer("accumulation", 1, 1 << 16)?.unwrap_or(1) as usize,
        epochs: epochs.unwrap_or(1),
        steps,
        optim: optim(&mut s, defaults)?,
        eval_tokens: s.integer("eval_tokens", 1, 1 << 40)?.unwrap_or(65_536),
        rhythm: Rhythm::read(&mut s, 50)?,
    };
    if train.sequence_length * train.batch_size > 1 << 28 {
        let got = format!("{} tokens", train.sequence_length * train.batch_size);
        return Err(s.conflict("batch_size", &got, "at most 2^28 tokens a micro-batch").into());
    }
    s.finish()?;
    Ok(train)
}

pub(crate) fn examination(mut s: Section) -> Result<Examination, RecipeError> {
    let examination = Examination {
        suite: suite_place(&mut s, "suite")?
            .ok_or_else(|| s.missing("suite", "tasks, such as \"core\" or \"addition:1-3\""))?,
        per_level: s.integer("per_level", 1, 1 << 20)?.unwrap_or(10) as usize,
        samples: s.integer("samples", 1, 1 << 12)?.unwrap_or(1) as usize,
        temperature: s.temperature("temperature")?.unwrap_or(0.0),
        max_tokens: s.integer("max_tokens", 1, 1 << 20)?.unwrap_or(256) as usize,
        seed: s.integer("seed", 0, i64::MAX as u64)?.unwrap_or(0),
    };
    s.finish()?;
    Ok(examination)
}

pub(crate) fn asking(mut s: Section) -> Result<Asking, RecipeError> {
    let asking = Asking {
        prompts: s.texts("prompts")?.unwrap_or_default(),
        tokens: s.integer("tokens", 1, 1 << 16)?.unwrap_or(128) as usize,
        temperature: s.temperature("temperature")?.unwrap_or(0.0),
    };
    s.finish()?;
    Ok(asking)
}
