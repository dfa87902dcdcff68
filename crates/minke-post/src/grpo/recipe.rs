//! The recipe of `minke grpo`.

use minke_gym::Suite;
use minke_model::Precision;
use minke_train::recipe::{self, Document, Optim, Optimizer, Run, Section};
use minke_train::resume::is_free_everywhere;
use serde::Serialize;

use super::objective::{Algorithm, Normalization, Objective, Ratio};
use super::reward::Reward;
use super::rollout::RolloutSettings;
use crate::error::{PostError, Result};
use crate::recipe::{FormName, model_path, precision, same_suite, suite_place, template, template_place};
use crate::session::{MOST_STEPS, Rhythm, Setup};

/// What becomes of a prompt that leaves no room for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LongPrompts {
    /// The run ends with an error.
    Refuse,
    /// The task is left out, and counted.
    Skip,
    /// The prompt's beginning is left out, and the task counted.
    Cut,
}

/// `[tasks]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tasks {
    /// What is trained on.
    pub suite: String,
    /// The share of prompts that goes to all kinds and levels alike; the rest goes where success is uncertain.
    pub floor: f64,
    /// How tasks are put; by the model's template if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub form: Option<FormName>,
    /// What becomes of prompts that are too long.
    pub long_prompts: LongPrompts,
    /// Held-out tasks of an evaluation; those of `suite` when not given.
    pub eval_suite: String,
    /// Of each kind and level.
    pub eval_per_level: usize,
    /// Spread of the choice in evaluations.
    pub eval_temperature: f64,
}

/// `[train]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Train {
    /// Rollouts, each with its updates.
    pub steps: u64,
    /// Parts that a rollout is cut into, with an update for each.
    pub minibatches: usize,
    /// How often a rollout is gone through.
    pub epochs: usize,
    /// Rows of one pass, at most, but for a single answer that is longer; bounds the memory of activations.
    pub rows_per_pass: usize,
    /// How gradients become steps.
    #[serde(flatten)]
    pub optim: Optim,
    /// When things happen.
    #[serde(flatten)]
    pub rhythm: Rhythm,
}

/// `[model]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelPart {
    /// Where to start from.
    pub path: String,
    /// A template by its name, file or folder instead of the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// What the policy shall stay near to; the model at its start when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

/// A recipe with everything said.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// What products run in; what the model's tensors are stored in when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<recipe::Precision>,
    /// Name, seed, folder.
    pub run: Run,
    /// The model.
    pub model: ModelPart,
    /// The tasks.
    pub tasks: Tasks,
    /// Sampling.
    pub rollout: RolloutSettings,
    /// What answers are worth.
    pub reward: Reward,
    /// What is trained for.
    pub objective: Objective,
    /// The loop.
    pub train: Train,
}

/// What reinforcement learning starts from: small steps of AdamW, at one rate.
pub(crate) const OPTIM: Optim = Optim {
    optimizer: Optimizer::AdamW,
    lr: 2e-4,
    muon_lr: 2e-3,
    weight_decay: 0.0,
    betas: [0.9, 0.99],
    warmup_share: 0.02,
    decay_share: 0.0,
    mtp_loss_weight: 0.1,
    bias_update_speed: 0.0,
    sequence_balance_alpha: 0.0,
    ..Optim::PRETRAIN
};

impl Recipe {
    /// Reads a parsed recipe.
    ///
    /// # Errors
    /// Unknown keys, wrong types and values out of bounds, each with its place.
    pub fn read(document: &Document) -> Result<Self> {
        document.is_for("grpo")?;
        let mut root = document.root();
        let mut run = root.section("run")?;
        let mut model = root.section("model")?;
        let mut tasks = root.section("tasks")?;
        let mut rollout = root.section("rollout")?;
        let mut reward = root.section("reward")?;
        let mut objective = root.section("objective")?;
        let mut train = root.section("train")?;
        let precision = precision(document, &mut root)?;
        root.finish()?;
        let run_part = recipe::run(&mut run, document)?;
        run.finish()?;
        let path = model_path(&mut model, "path")?;
        let model_part = ModelPart {
            path: path.ok_or_else(|| model.missing("path", "a model folder"))?,
            template: template_place(&mut model)?,
            reference: model_path(&mut model, "reference")?,
        };
        model.finish()?;
        let tasks_part = read_tasks(&mut tasks)?;
        tasks.finish()?;
        let resample = rollout.integer("resample", 0, 1 << 10)?.unwrap_or(1) as usize;
        let rollout_part = RolloutSettings { resample: Some(resample), ..read_rollout(&mut rollout, 2)? };
        rollout.finish()?;
        let number =
            |s: &mut Section, key, default| -> Result<f64> { Ok(s.not_negative(key)?.unwrap_or(default)) };
        let reward_part = Reward {
            right: number(&mut reward, "right", 1.0)?,
            format: number(&mut reward, "format", 0.1)?,
            overlong_buffer: reward.integer("overlong_buffer", 0, 1 << 24)?.unwrap_or(0) as usize,
            overlong: number(&mut reward, "overlong", 0.5)?,
        };
        reward.finish()?;
        let objective_part = read_objective(&mut objective)?;
        objective.finish()?;
        let train_part = Train {
            steps: train.integer("steps", 1, MOST_STEPS)?.unwrap_or(100),
            minibatches: train.integer("minibatches", 1, 1 << 16)?.unwrap_or(1) as usize,
            epochs: train.integer("epochs", 1, 1 << 16)?.unwrap_or(1) as usize,
            rows_per_pass: train.integer("rows_per_pass", 1, 1 << 24)?.unwrap_or(8192) as usize,
            optim: recipe::optim(&mut train, OPTIM)?,
            rhythm: Rhythm::read(&mut train, 20)?,
        };
        train.finish()?;
        if train_part.minibatches > rollout_part.prompts {
            return Err(PostError::unsuitable(
                "train.minibatches",
                format!("{} parts of {} prompts", train_part.minibatches, rollout_part.prompts),
            ));
        }
        let recipe = Self {
            precision,
            run: run_part,
            model: model_part,
            tasks: tasks_part,
            rollout: rollout_part,
            reward: reward_part,
            objective: objective_part,
            train: train_part,
        };
        recipe.suites()?;
        Ok(recipe)
    }

    /// What is trained on and what is examined.
    pub fn suites(&self) -> Result<[Suite; 2]> {
        let parse = |key: &str, text: &str| {
            Suite::parse(text).map_err(|error| PostError::unsuitable(key, error.to_string()))
        };
        Ok([parse("tasks.suite", &self.tasks.suite)?, parse("tasks.eval_suite", &self.tasks.eval_suite)?])
    }

    /// What the loop needs to know.
    ///
    /// # Errors
    /// An unknown template.
    pub fn setup(&self) -> Result<Setup> {
        let template = template("model.template", self.model.template.as_deref())?;
        Ok(Setup {
            kind: "grpo",
            run: self.run.clone(),
            model: self.model.path.clone(),
            begins_with: Some("model.path"),
            precision: self.precision.map(Precision::from),
            template,
            optim: self.train.optim,
            steps: self.train.steps,
            rhythm: self.train.rhythm,
            recipe: toml::to_string(self).expect("a recipe is plain data"),
            free: is_free,
        })
    }
}

/// Keys that change no weight; what models and files of tasks are is judged by their fingerprints.
pub(crate) fn is_free(key: &str, was: &str, is: &str) -> bool {
    const FREE: [&str; 5] =
        ["model.path", "model.template", "model.reference", "train.rows_per_pass", "rollout.concurrency"];
    is_free_everywhere(key)
        || key.starts_with("tasks.eval_")
        || FREE.contains(&key)
        || key == "tasks.suite" && same_suite(was, is)
}

pub(crate) fn read_tasks(s: &mut Section) -> Result<Tasks> {
    let long = [("refuse", LongPrompts::Refuse), ("skip", LongPrompts::Skip), ("cut", LongPrompts::Cut)];
    let suite = suite_place(s, "suite")?
        .ok_or_else(|| s.missing("suite", "tasks, such as \"core:1-3\" or a .jsonl file"))?;
    Ok(Tasks {
        floor: s.share("floor")?.unwrap_or(0.3),
        form: s.choice("form", &FormName::CHOICES)?,
        long_prompts: s.choice("long_prompts", &long)?.unwrap_or(LongPrompts::Refuse),
        eval_suite: suite_place(s, "eval_suite")?.unwrap_or_else(|| suite.clone()),
        eval_per_level: s.integer("eval_per_level", 1, 1 << 24)?.unwrap_or(20) as usize,
        eval_temperature: s.temperature("eval_temperature")?.unwrap_or(1.0),
        suite,
    })
}

/// `[rollout]`, with at least `least` answers to a prompt.
pub(crate) fn read_rollout(s: &mut Section, least: u64) -> Result<RolloutSettings> {
    Ok(RolloutSettings {
        prompts: s.integer("prompts", 1, 1 << 16)?.unwrap_or(16) as usize,
        group: s.integer("group", least, 1 << 12)?.unwrap_or(8) as usize,
        max_tokens: s.integer("max_tokens", 1, 1 << 24)?.unwrap_or(256) as usize,
        temperature: s.positive_temperature("temperature")?.unwrap_or(1.0) as f32,
        top_p: s.top_p()?.unwrap_or(1.0) as f32,
        top_k: s.integer("top_k", 0, 1 << 24)?.unwrap_or(0) as usize,
        concurrency: s.integer("concurrency", 1, 1 << 16)?.unwrap_or(256) as usize,
        resample: None,
    })
}

fn read_objective(s: &mut Section) -> Result<Objective> {
    let algorithm = s.choice("algorithm", &Algorithm::CHOICES)?.unwrap_or(Algorithm::Grpo);
    let named = Objective::from(algorithm);
    Ok(Objective {
        algorithm,
        ratio: s.choice("ratio", &Ratio::CHOICES)?.unwrap_or(named.ratio),
        normalization: s.choice("normalization", &Normalization::CHOICES)?.unwrap_or(named.normalization),
        standardize: s.flag("standardize")?.unwrap_or(named.standardize),
        clip_low: s.share("clip_low")?.unwrap_or(named.clip_low),
        clip_high: s.not_negative("clip_high")?.unwrap_or(named.clip_high),
        beta: s.not_negative("beta")?.unwrap_or(named.beta),
    })
}
