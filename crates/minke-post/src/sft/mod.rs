//! Supervised fine-tuning: a model learns to answer as examples do.
//!
//! ```text
//! JSONL -> [`data`]: messages -> template -> tokens, and which the model is to write -> training | held out
//!       -> [`pack`]: samples of an epoch in a drawn order, several to a batch -> Trainer::step
//! ```
//!
//! Loss is on the assistant's tokens only. Samples that share a batch are segments of their own: attention does not
//! cross from one to another, positions begin at 0 in each, and no module predicts past an end, so a batch trains on
//! exactly what its samples would train on alone. Which samples a step has is a function of seed and step.

pub mod data;
pub mod pack;
pub mod recipe;

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use minke_data::template::{ChatTemplate, Message, Thinking};
use minke_gym::Task;
use minke_infer::{Engine, Request, Sampling};
use minke_model::{LossOptions, Model, StepStats, TrainBatch};
use minke_train::plan::Batch;
use minke_train::pretrain::Options;
use serde_json::{Value, json};

use crate::error::{PostError, Result};
use crate::eval::{self, EvalSettings, Prompter};
use crate::events::Event;
use crate::metrics::{Sample, Values};
use crate::session::{self, Base, Outcome, Setup, Stage, Workshop};
use data::{Counts, ReadSettings};
use pack::{Batches, StepBatches};
use recipe::Recipe;

/// Reads the recipe and trains to its end or until `stop`.
///
/// # Errors
/// Anything that [`PostError`] lists; what was on the disk before stays whole.
pub fn run(options: &Options, stop: &AtomicBool, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let recipe = Recipe::read(&options.document()?)?;
    let template = recipe.template()?;
    let mut setup = Setup {
        kind: "sft",
        run: recipe.run.clone(),
        model: recipe.model.path.clone(),
        begins_with: Some("model.path"),
        precision: recipe.precision(),
        template,
        optim: recipe.train.optim,
        steps: 0,
        rhythm: recipe.train.rhythm,
        recipe: recipe.to_toml(),
        free: recipe::is_free,
    };
    let examination = recipe.examination()?;
    let base = session::open(&setup, options, on_event)?;
    let mut stage = Sft::new(&recipe, examination, &mut setup, &base, on_event)?;
    session::run(&setup, base, &mut stage, options.resume, stop, on_event)
}

/// A model that learns from examples.
pub(crate) struct Sft<'a> {
    recipe: &'a Recipe,
    /// What each step learns from.
    pub batches: Batches,
    held_out: Vec<TrainBatch>,
    examination: Option<Vec<Task>>,
    counts: Counts,
    fingerprint: String,
}

impl<'a> Sft<'a> {
    /// Reads the examples for a model; says in `setup` how many steps there are and by which template.
    pub fn new(
        recipe: &'a Recipe,
        examination: Option<Vec<Task>>,
        setup: &mut Setup,
        base: &Base,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Self> {
        let loaded = base.loaded();
        let place = loaded.folder.display().to_string();
        let Some(tokenizer) = &loaded.tokenizer else {
            return Err(PostError::unsuitable(place, "the model has no tokenizer"));
        };
        let template = match &setup.template {
            Some(template) => template.clone(),
            None => loaded.template()?.ok_or_else(|| {
                let known = ChatTemplate::builtin_names().join(", ");
                PostError::unsuitable(
                    &place,
                    format!("the model has no chat template; set model.template to one of {known}"),
                )
            })?,
        };
        let missing = template.missing_tokens(tokenizer);
        if !missing.is_empty() {
            let text = format!(
                "the template {} writes {}, which the tokenizer has as text only",
                template.place(),
                missing.join(", ")
            );
            on_event(Event::Warning { text: &text });
        }
        let context = loaded.model.config.max_position_embeddings;
        if recipe.train.sequence_length > context {
            return Err(PostError::unsuitable(
                "train.sequence_length",
                format!(
                    "expected at most the model's context of {context}, got {}",
                    recipe.train.sequence_length
                ),
            ));
        }
        let settings = ReadSettings {
            tokenizer,
            template: &template,
            sequence_length: recipe.train.sequence_length,
            vocabulary: loaded.model.config.vocab_size,
            overlong: recipe.data.overlong,
            max_bad_lines: recipe.data.max_bad_lines,
            threads: base.cpu().threads(),
        };
        let paths = recipe.data.paths()?;
        let read = data::read(&paths, &settings, &mut |done, total| {
            on_event(Event::Progress { what: "reading", done, total });
        })?;
        for text in read.counts.warnings() {
            on_event(Event::Warning { text: &text });
        }
        let (counts, fingerprint) = (read.counts, read.fingerprint.clone());
        let (training, held_out) = read.split(recipe.data.validation_share)?;
        let mtp_depth = loaded.model.config.num_nextn_predict_layers;
        let train = &recipe.train;
        let capacity = train.sequence_length * train.batch_size;
        let mut batches = Batches::new(training, capacity, train.accumulation, mtp_depth, recipe.run.seed);
        setup.steps = match train.steps {
            Some(steps) => steps,
            None => batches.steps_of(train.epochs),
        };
        setup.template = Some(template);
        let held_out = pack::in_order(&held_out, capacity, mtp_depth);
        Ok(Self { recipe, batches, held_out, examination, counts, fingerprint })
    }

    /// One step whose passes `pass` makes; see [`minke_train::trainer::Trainer::step_by`].
    pub fn learn(shop: &mut Workshop, step: &StepBatches, pass: Pass<'_>) -> Result<Values> {
        let begin = Instant::now();
        let report = shop.trainer.step_by(&shop.cpu, &step.micro, pass)?;
        let tokens: usize = step.micro.iter().map(|batch| batch.tokens.len()).sum();
        let mut values = Values::default();
        values.put("loss", report.loss);
        if let Some(loss) = report.mtp_loss {
            values.put("mtp_loss", loss);
        }
        values.put("lr", report.rates.adamw);
        values.put("grad_norm", report.grad_norm);
        values.put_skipped(report.skipped.is_some().into());
        values.put("epoch", step.epoch);
        values.put("tokens", tokens as f64);
        values.put("tok_s", tokens as f64 / begin.elapsed().as_secs_f64().max(1e-9));
        values.put_balance(&report.counts);
        Ok(values)
    }
}

/// Forward and backward of a micro-batch, by its number.
pub(crate) type Pass<'a> = &'a mut dyn FnMut(&mut Model, usize, &LossOptions) -> StepStats;

impl Stage for Sft<'_> {
    fn batch(&self) -> Option<Batch> {
        let train = &self.recipe.train;
        Some(Batch::sequences(train.batch_size, train.sequence_length))
    }

    fn facts(&self) -> Vec<(String, String)> {
        let held_out: usize = self.held_out.iter().map(|batch| batch.segments.len()).sum();
        let mut facts = vec![
            ("samples".to_owned(), self.batches.len().to_string()),
            ("held out".to_owned(), held_out.to_string()),
            ("tokens learned from".to_owned(), self.counts.marked.to_string()),
            ("tokens in all".to_owned(), self.counts.tokens.to_string()),
        ];
        let more = [
            ("lines that cannot be used", self.counts.bad),
            ("samples too long, left out", self.counts.dropped),
            ("samples too long, cut", self.counts.cut),
            ("samples without a token to learn", self.counts.unmarked),
            ("turns that the template does not tell", self.counts.untold),
        ];
        facts.extend(
            more.iter()
                .filter(|(_, count)| *count > 0)
                .map(|(name, count)| ((*name).to_owned(), count.to_string())),
        );
        facts
    }

    fn turn(&mut self, shop: &mut Workshop, turn: u64, _: &mut dyn FnMut(Event<'_>)) -> Result<Values> {
        let step = self.batches.step(turn);
        let cpu = shop.cpu.clone();
        Self::learn(shop, &step, &mut |model, at, options| model.train_step(&cpu, &step.micro[at], options))
    }

    fn evaluate(
        &mut self,
        shop: &mut Workshop,
        _: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Values>> {
        let mut values = Values::default();
        if let Some(loss) = held_out_loss(shop, &self.held_out, self.recipe.train.eval_tokens) {
            if !loss.is_finite() {
                return Err(shop.trainer.diverged("held-out loss").into());
            }
            values.put("loss", loss);
        }
        if let (Some(tasks), Some(eval)) = (&self.examination, &self.recipe.eval) {
            let prompter =
                Prompter::of(shop.template.as_ref(), Thinking::Default, shop.bos, &shop.tokenizer)?;
            let settings = EvalSettings {
                samples: eval.samples,
                temperature: eval.temperature as f32,
                max_tokens: eval.max_tokens,
                seed: eval.seed,
                stop_ids: shop.stop_ids.clone(),
                ..EvalSettings::default()
            };
            let report = eval::evaluate(
                &mut shop.trainer.model,
                &shop.cpu,
                &shop.tokenizer,
                &prompter,
                tasks,
                &settings,
                &mut |progress| {
                    let (done, total) = (progress.done as u64, progress.total as u64);
                    on_event(Event::Progress { what: "examining", done, total });
                    ControlFlow::Continue(())
                },
            )?;
            report.put_into(&mut values);
        }
        Ok((!values.values.is_empty()).then_some(values))
    }

    fn samples(&mut self, shop: &mut Workshop, _: u64) -> Result<Vec<Sample>> {
        let sample = &self.recipe.sample;
        let Some(template) = shop.template.clone().filter(|_| !sample.prompts.is_empty()) else {
            return Ok(Vec::new());
        };
        let stop_ids = shop.stop_ids.clone();
        let context = shop.trainer.model.config.max_position_embeddings;
        let mut requests = Vec::new();
        let mut opened = Vec::new();
        for (sequence, prompt) in sample.prompts.iter().enumerate() {
            let turns = [Message::user(prompt)];
            let ids = template.encode_prompt(&shop.tokenizer, &turns, Thinking::Default)?;
            if ids.len() >= context {
                return Err(PostError::unsuitable(
                    "sample.prompts",
                    "a prompt does not fit into the model's context",
                ));
            }
            let tail = shop.tokenizer.decode(&ids[ids.len().saturating_sub(16)..], false);
            opened.push(tail.trim_end().ends_with("<think>"));
            let temperature = sample.temperature as f32;
            requests.push(Request {
                prompt: ids,
                max_tokens: sample.tokens,
                sampling: Sampling { temperature, seed: shop.seed, ..Sampling::default() },
                sequence: sequence as u64,
                stop_ids: stop_ids.clone(),
                ..Request::default()
            });
        }
        let answers = Engine::new(&mut shop.trainer.model, &shop.cpu, Some(&shop.tokenizer))
            .without_log_probs()
            .generate(&requests, &mut |_| ControlFlow::Continue(()))?;
        let text = |open: bool, text: &str| if open { format!("<think>{text}") } else { text.to_owned() };
        let sample = |((prompt, answer), open): ((&String, &minke_infer::Generation), bool)| Sample {
            prompt: prompt.clone(),
            text: text(open, &answer.text),
            ..Sample::default()
        };
        Ok(self.recipe.sample.prompts.iter().zip(&answers).zip(opened).map(sample).collect())
    }

    fn state(&self) -> Value {
        json!({ "data": self.fingerprint })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        if state["data"] == json!(self.fingerprint) {
            return Ok(());
        }
        Err("it learned from other samples than these; start a new run with --out".to_owned())
    }
}

/// Mean loss of the held-out samples' marked tokens, nats; of the first batches that hold `most` tokens.
fn held_out_loss(shop: &mut Workshop, batches: &[TrainBatch], most: u64) -> Option<f64> {
    let (mut sum, mut labels, mut seen) = (0.0, 0_usize, 0_u64);
    for batch in batches {
        if seen >= most {
            break;
        }
        let losses = shop.trainer.model.evaluate(&shop.cpu, batch);
        sum += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        labels += batch.labels.iter().filter(|&&label| label != minke_model::IGNORE).count();
        seen += batch.tokens.len() as u64;
    }
    (labels > 0).then(|| sum / labels as f64)
}

#[cfg(test)]
mod tests;
