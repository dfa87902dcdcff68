//! The loop that SFT, GRPO and distillation share: folder, model, steps, evaluations, samples, checkpoints.
//!
//! ```text
//! recipe -> run folder -> model and tokenizer -> [turn, evaluation, samples, checkpoint]* -> model/
//! ```
//!
//! What differs is a [`Stage`]. A turn of it is a function of the weights, the optimizer's state, the turn's number
//! and the stage's own [`Stage::state`], and a checkpoint holds all of these: a killed run goes on bit for bit. What
//! an unfinished turn did is dropped with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::template::ChatTemplate;
use minke_infer::machine::available_bytes;
use minke_infer::{EngineError, Loaded, load_model};
use minke_model::{Model, Precision, Purpose, spec};
use minke_train::checkpoint::{self, Checkpoints, State};
use minke_train::metrics::{self, MetricsWriter};
use minke_train::optim::Settings;
use minke_train::plan::{self, Batch, Caches, Shape};
use minke_train::pretrain::Options;
use minke_train::recipe::{Optim, RecipeError, Run, Section};
use minke_train::run_folder::{self, RunFolder};
use minke_train::trainer::{Course, Tally, Trainer};
use minke_train::{TrainError, resume};
use serde::Serialize;
use serde_json::Value;

use crate::error::{PostError, Result};
use crate::events::{Event, Started};
use crate::fingerprint;
use crate::metrics::{Record, Sample, Values};
use crate::report::{self, Heading};

/// When things happen; the same keys in the `[train]` of every stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rhythm {
    /// Steps between evaluations; 0 for none but the first and last.
    pub eval_every: u64,
    /// Steps between samples; 0 for none but the first and last.
    pub sample_every: u64,
    /// Steps between checkpoints; 0 for none but the last.
    pub checkpoint_every: u64,
    /// Checkpoints kept that are known to be good.
    pub keep: usize,
}

/// Most steps of a run.
pub(crate) const MOST_STEPS: u64 = 1 << 40;

impl Rhythm {
    /// Reads its keys, where `every` stands for those that are not given.
    ///
    /// # Errors
    /// Values out of bounds.
    pub(crate) fn read(s: &mut Section, every: u64) -> Result<Self, RecipeError> {
        Ok(Self {
            eval_every: s.integer("eval_every", 0, MOST_STEPS)?.unwrap_or(every),
            sample_every: s.integer("sample_every", 0, MOST_STEPS)?.unwrap_or(every),
            checkpoint_every: s.integer("checkpoint_every", 0, MOST_STEPS)?.unwrap_or(every),
            keep: s.integer("keep", 1, 1 << 16)?.unwrap_or(2) as usize,
        })
    }
}

/// What the loop needs to know of a stage's recipe.
#[derive(Debug, Clone)]
pub struct Setup {
    /// `sft`, `grpo`, `distill`.
    pub kind: &'static str,
    /// Name, seed and folder.
    pub run: Run,
    /// The model to start from.
    pub model: String,
    /// The recipe's key that says so; a model with fresh weights has none.
    pub begins_with: Option<&'static str>,
    /// What its products run in; what its tensors are stored in when not given.
    pub precision: Option<Precision>,
    /// A template instead of the model's own.
    pub template: Option<ChatTemplate>,
    /// How gradients become steps.
    pub optim: Optim,
    /// Turns of the whole run.
    pub steps: u64,
    /// When things happen.
    pub rhythm: Rhythm,
    /// The resolved recipe, stored with the run.
    pub recipe: String,
    /// What of it may differ when a run is resumed.
    pub free: resume::Free,
}

/// What a stage works with.
pub struct Workshop {
    /// The machine.
    pub cpu: Cpu,
    /// Model and optimizer.
    pub trainer: Trainer,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// How messages become tokens; a base model has none.
    pub template: Option<ChatTemplate>,
    /// The tokens that end an answer.
    pub stop_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The run's seed.
    pub seed: u64,
    /// The run's folder.
    pub folder: PathBuf,
}

impl Workshop {
    /// The model.
    pub fn model(&mut self) -> &mut Model {
        &mut self.trainer.model
    }
}

/// What differs between the kinds of training.
pub trait Stage {
    /// Updates of the optimizer in one turn.
    fn updates(&self) -> u64 {
        1
    }

    /// What goes through the model at once when it trains, at most; none where that is not known.
    fn batch(&self) -> Option<Batch> {
        None
    }

    /// The caches of answers that the model writes at once, beside what training takes.
    fn caches(&self, model: &Model) -> Caches {
        let _ = model;
        Caches::default()
    }

    /// What a person wants to know before the first step.
    fn facts(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Takes turn number `turn`, from 0; the metrics that it names.
    fn turn(&mut self, shop: &mut Workshop, turn: u64, on_event: &mut dyn FnMut(Event<'_>))
    -> Result<Values>;

    /// Examines the model after `step` turns.
    fn evaluate(
        &mut self,
        shop: &mut Workshop,
        step: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Values>>;

    /// Lets the model answer something.
    fn samples(&mut self, shop: &mut Workshop, step: u64) -> Result<Vec<Sample>>;

    /// What must be found again to go on from here, beside weights and optimizer.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Takes back what [`Stage::state`] gave.
    ///
    /// # Errors
    /// It is not what this stage gives.
    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let _ = state;
        Ok(())
    }
}

/// How a stage ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The run's folder.
    pub folder: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// The last checkpoint, if there is one.
    pub checkpoint: Option<PathBuf>,
    /// The model's folder, when the run reached its end.
    pub model: Option<PathBuf>,
    /// The last evaluation.
    pub evaluation: Option<Values>,
}

/// The model that a stage starts from.
pub struct Base {
    folder: RunFolder,
    loaded: Loaded,
    cpu: Cpu,
    force: bool,
}

/// Takes the run's folder and loads the model; what costs minutes comes after what is likely to be wrong.
///
/// # Errors
/// The folder is taken or holds something else; the model cannot be loaded.
pub fn open(setup: &Setup, options: &Options, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Base> {
    let base = fresh(setup, options, || Ok(load_model(&setup.model, setup.precision, Purpose::Train)?))?;
    for note in &base.loaded.notes {
        on_event(Event::Warning { text: note });
    }
    Ok(base)
}

/// Takes the run's folder for a model that `make` gives, such as one with fresh weights, which must be the same ones
/// whenever the run is resumed.
///
/// # Errors
/// The folder is taken or holds something else; what `make` says.
pub fn fresh(setup: &Setup, options: &Options, make: impl FnOnce() -> Result<Loaded>) -> Result<Base> {
    let folder = RunFolder::take(Path::new(&setup.run.out), options.resume)?;
    Ok(Base { folder, loaded: make()?, cpu: Cpu::detect(options.threads), force: options.force })
}

impl Base {
    /// The model, tokenizer and what else was loaded.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// The machine.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Runs a stage to its end, or until `stop` after the turn in work.
///
/// # Errors
/// Anything that [`PostError`] lists; what was on the disk before stays whole.
pub fn run(
    setup: &Setup,
    base: Base,
    stage: &mut dyn Stage,
    resume: bool,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome> {
    let Base { folder, loaded, cpu, force } = base;
    let before = if resume { find(setup, &folder, on_event)? } else { None };
    let template = match &setup.template {
        Some(template) => Some(template.clone()),
        None => loaded.template()?,
    };
    let (stop_ids, bos) = (loaded.stop_ids_with(template.as_ref()), loaded.bos());
    let Some(tokenizer) = loaded.tokenizer else {
        return Err(PostError::unsuitable(loaded.folder.display().to_string(), "the model has no tokenizer"));
    };
    let base = fingerprint::of_base(&loaded.model, &tokenizer, template.as_ref());
    // (older programs did not say)
    if let Some(checkpoint) = &before
        && !["", &base].contains(&&checkpoint.state.data[..])
    {
        let differences = "  the model: its config, types, tokenizer or template".to_owned();
        return Err(TrainError::Changed { path: folder.path().to_owned(), differences }.into());
    }
    let counts = spec::parameters(&loaded.model.config);
    if let Some(batch) = stage.batch().filter(|_| !force) {
        let shape = Shape {
            config: loaded.model.config.clone(),
            precision: loaded.model.precision,
            optim: setup.optim,
            batch,
            caches: stage.caches(&loaded.model),
            // more than one pass may add to a gradient
            accumulation: 2,
            text_bytes: 0,
            steps: setup.steps,
        };
        // the weights are there already
        let there = 4 * (counts.total + counts.mtp);
        let available = available_bytes().map(|bytes| bytes + there);
        if let Some(text) = plan::check(&shape, &cpu, available)? {
            on_event(Event::Warning { text });
        }
    }
    let course = Course::new(&setup.optim, setup.steps * stage.updates());
    let trainer = Trainer::new(loaded.model, &Settings::from(&setup.optim), course);
    let folder_path = folder.path().to_owned();
    let seed = setup.run.seed;
    let mut shop = Workshop { cpu, trainer, tokenizer, template, stop_ids, bos, seed, folder: folder_path };
    let mut first = 0;
    if let Some(checkpoint) = &before {
        checkpoint.restore(&mut shop.trainer)?;
        first = checkpoint.state.step;
        stage.restore(&checkpoint.state.more).map_err(|reason| {
            PostError::unsuitable(checkpoint.path.display().to_string(), format!("its state: {reason}"))
        })?;
    }
    run_folder::replace(&folder.recipe(), setup.recipe.as_bytes())?;
    let mut warn = |text: &str| on_event(Event::Warning { text });
    let metrics = match &before {
        Some(_) => MetricsWriter::resume(&folder.metrics(), first, &mut warn)?,
        // what was shown before the first step is shown again
        None => MetricsWriter::restart(&folder.metrics(), &mut warn)?,
    };
    on_event(Event::Started(&Started {
        kind: setup.kind,
        name: setup.run.name.clone(),
        folder: folder.path().to_owned(),
        step: first,
        steps: setup.steps,
        parameters: counts.total + counts.mtp,
        active_parameters: counts.active,
        threads: shop.cpu.threads(),
        level: shop.cpu.level().name(),
        facts: stage.facts(),
    }));
    let mut session = Session {
        before_s: before.as_ref().map_or(0.0, |checkpoint| checkpoint.state.elapsed_s),
        checkpoints: Checkpoints::new(folder.checkpoints(), setup.rhythm.keep, before.as_ref())?,
        start: Instant::now(),
        turn: first,
        evaluation: None,
        setup,
        folder,
        metrics,
        base,
        shop,
        stage,
        on_event,
    };
    session.go(first, stop).map_err(|error| session.explain(error))
}

fn find(
    setup: &Setup,
    folder: &RunFolder,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Option<checkpoint::Checkpoint>> {
    let path = folder.recipe();
    let stored = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("there is no run in {} yet: starting it", folder.path().display());
            on_event(Event::Warning { text: &text });
            return Ok(None);
        }
        Err(error) => return Err(TrainError::io("read", &path)(error).into()),
    };
    resume::check(folder.path(), &stored, &setup.recipe, setup.free)?;
    let newest = checkpoint::newest(&folder.checkpoints(), &mut |text| on_event(Event::Warning { text }))?;
    if newest.is_none() {
        on_event(Event::Warning { text: "the run has no checkpoint yet: starting from its first step" });
    }
    Ok(newest)
}

struct Session<'a> {
    setup: &'a Setup,
    folder: RunFolder,
    metrics: MetricsWriter<Record>,
    /// The fingerprint of the model that it started from.
    base: String,
    shop: Workshop,
    stage: &'a mut dyn Stage,
    on_event: &'a mut dyn FnMut(Event<'_>),
    /// Seconds of earlier parts of the run.
    before_s: f64,
    start: Instant,
    checkpoints: Checkpoints,
    /// The turn in work or done last, from 1.
    turn: u64,
    evaluation: Option<Values>,
}

impl Session<'_> {
    fn go(&mut self, first: u64, stop: &AtomicBool) -> Result<Outcome> {
        let steps = self.setup.steps;
        let Rhythm { eval_every, sample_every, checkpoint_every, .. } = self.setup.rhythm;
        let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every) || step == steps;
        if first == 0 {
            // where it starts from, so that a curve has its beginning
            self.evaluate(0)?;
            self.sample(0)?;
        }
        let mut step = first;
        let mut saved_at = self.checkpoints.newest.is_some().then_some(first);
        while step < steps && !stop.load(Ordering::Relaxed) {
            let updates = self.turn(step, first)?;
            step += 1;
            if updates.taken > 0 {
                self.checkpoints.settle()?;
            }
            if due(step, eval_every) {
                self.evaluate(step)?;
            }
            if due(step, sample_every) {
                self.sample(step)?;
            }
            // an update that was skipped may be the work of weights that are no good any more
            let in_doubt = updates.skipped > 0 && self.shop.trainer.skipped_in_a_row() > 0;
            if due(step, checkpoint_every) && !in_doubt {
                self.save(step)?;
                saved_at = Some(step);
            }
        }
        if step > 0 && saved_at != Some(step) {
            self.judge(step)?;
            self.save(step)?;
        }
        if step == 0 {
            self.folder.clear()?;
        }
        let finished = step == steps;
        if finished {
            let template = self.shop.template.as_ref();
            checkpoint::save_model(
                &self.folder.model(),
                &self.shop.trainer.model,
                &self.shop.tokenizer,
                template,
            )?;
            self.checkpoints.settle()?;
            let Setup { kind, run, .. } = self.setup;
            let heading =
                Heading { name: run.name.clone(), kind: (*kind).to_owned(), facts: self.stage.facts() };
            report::write(self.folder.path(), &heading)?;
        }
        Ok(Outcome {
            folder: self.folder.path().to_owned(),
            step,
            steps,
            checkpoint: self.checkpoints.newest.clone(),
            model: finished.then(|| self.folder.model()),
            evaluation: match self.evaluation.take() {
                // resumed after its last turn
                None if finished => self.last_evaluation()?,
                own => own,
            },
        })
    }

    /// Weights that a skipped update left are as good as an evaluation says.
    fn judge(&mut self, step: u64) -> Result<()> {
        let is_judged = self.evaluation.as_ref().is_some_and(|values| values.step == step);
        if self.shop.trainer.skipped_in_a_row() > 0
            && !is_judged
            && self.stage.evaluate(&mut self.shop, step, self.on_event)?.is_none()
        {
            return Err(self.shop.trainer.ran_away().into());
        }
        Ok(())
    }

    /// The last evaluation that earlier parts of the run wrote down.
    fn last_evaluation(&self) -> Result<Option<Values>> {
        let records = metrics::read::<Record>(&self.folder.metrics())?;
        Ok(records.into_iter().rev().find_map(|record| match record {
            Record::Evaluation(values) => Some(values),
            Record::Step(_) | Record::Sample(_) => None,
        }))
    }

    /// Says of numbers that ran away, wherever they were found, what is left on the disk.
    fn explain(&self, error: PostError) -> PostError {
        let trainer = &self.shop.trainer;
        let error = match error {
            PostError::Engine(EngineError::NotANumber { .. }) if trainer.steps_done() > 0 => {
                trainer.diverged("likeliest logit")
            }
            PostError::Train(error) => error,
            other => return other,
        };
        let mut error = self.checkpoints.explain(error);
        if let TrainError::Diverged { step, from, .. } = &mut error {
            // updates are the trainer's to count, turns are what a person sees
            *step = self.turn;
            *from = self.setup.begins_with;
        }
        error.into()
    }

    fn elapsed_s(&self) -> f64 {
        self.before_s + self.start.elapsed().as_secs_f64()
    }

    /// Takes a turn; what became of its updates.
    fn turn(&mut self, step: u64, first: u64) -> Result<Tally> {
        self.turn = step + 1;
        let before = self.shop.trainer.tally();
        self.shop.trainer.seek(step * self.stage.updates());
        let mut values = self.stage.turn(&mut self.shop, step, self.on_event)?;
        (values.step, values.elapsed_s) = (step + 1, self.elapsed_s());
        let pace = self.start.elapsed().as_secs_f64() / (step + 1 - first) as f64;
        let remaining_s = pace * (self.setup.steps - step - 1) as f64;
        (self.on_event)(Event::Step { metrics: &values, steps: self.setup.steps, remaining_s });
        let updates = self.shop.trainer.tally().since(before);
        if let Some(text) = self.shop.trainer.skip_warning(step + 1, updates) {
            (self.on_event)(Event::Warning { text: &text });
        }
        self.metrics.append(&Record::Step(values))?;
        Ok(updates)
    }

    fn evaluate(&mut self, step: u64) -> Result<()> {
        let Some(mut values) = self.stage.evaluate(&mut self.shop, step, self.on_event)? else {
            return Ok(());
        };
        (values.step, values.elapsed_s) = (step, self.elapsed_s());
        (self.on_event)(Event::Evaluation(&values));
        self.metrics.append(&Record::Evaluation(values.clone()))?;
        self.evaluation = Some(values);
        Ok(())
    }

    fn sample(&mut self, step: u64) -> Result<()> {
        for mut sample in self.stage.samples(&mut self.shop, step)? {
            sample.step = step;
            (self.on_event)(Event::Sample(&sample));
            self.metrics.append(&Record::Sample(sample))?;
        }
        Ok(())
    }

    fn save(&mut self, step: u64) -> Result<()> {
        let mut state = State::new(step, 0, self.elapsed_s(), self.shop.seed, self.base.clone());
        state.updates = Some(self.shop.trainer.steps_done());
        state.more = self.stage.state();
        let Workshop { cpu, trainer, tokenizer, template, .. } = &self.shop;
        let path = self.checkpoints.save(cpu, trainer, tokenizer, template.as_ref(), &state)?;
        (self.on_event)(Event::Checkpoint { step, path });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use minke_train::resume::is_free_everywhere;

    use super::*;

    #[test]
    fn when_things_happen_may_change_in_any_run_that_is_resumed() {
        let rhythm = Rhythm { eval_every: 1, sample_every: 2, checkpoint_every: 3, keep: 4 };
        let keys: Vec<String> = toml::Table::try_from(rhythm).unwrap().keys().cloned().collect();
        assert_eq!(keys.len(), 4);
        for key in keys {
            assert!(is_free_everywhere(&format!("train.{key}")), "{key}");
        }
        assert!(!is_free_everywhere("train.steps") && !is_free_everywhere("run.seed"));
    }
}
