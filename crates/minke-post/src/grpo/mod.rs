//! Reinforcement learning on outcomes: groups of answers, each worth what it is relative to its group.
//!
//! ```text
//! Curriculum::draw -> rollout::roll (the engine, on the training weights) -> Reward::grade -> Objective::advantages
//!     -> rollout::batch -> Model::policy_step(Objective::slopes) -> Trainer::update
//! ```
//!
//! Rollout and training are one engine on one set of weights, so at the first update of a rollout the trainer's
//! log-probabilities are the sampler's to the bit and every router chooses the same experts. The run measures both each
//! step (`kl_rollout`, `router_diff`) and shows them: zeros.

pub mod bench;
mod curriculum;
mod learn;
mod objective;
mod recipe;
mod reward;
mod rollout;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use minke_data::template::Thinking;
use minke_gym::{Part, Split, Task};
use minke_infer::load_model;
use minke_model::{CacheKind, Model, PAGE, Purpose};
use minke_train::plan::{Batch, Caches};
use minke_train::pretrain::Options;
use serde_json::{Value, json};

pub use curriculum::Curriculum;
pub(crate) use learn::{Beside, passes};
pub use learn::{Learned, Learner};
pub use objective::{Algorithm, Normalization, Objective, Ratio, Sampled, Terms, Totals};
pub use recipe::{LongPrompts, Recipe};
pub(crate) use recipe::{ModelPart, OPTIM, Tasks, Train, is_free, read_rollout, read_tasks};
pub use reward::{Grade, Reward};
pub use rollout::{Answer, Group, RolloutSettings, RolloutStats, batch, roll};

use crate::error::{PostError, Result};
use crate::eval::{EvalSettings, Prompter, evaluate};
use crate::events::Event;
use crate::fingerprint;
use crate::metrics::{Sample, Values};
use crate::recipe::{form, refuse_coupled};
use crate::session::{self, Outcome, Stage, Workshop};

/// Trains as a recipe says. `stop` ends the run after the step in work, with a checkpoint.
///
/// # Errors
/// Anything that [`PostError`] lists; what was on the disk before stays whole.
pub fn run(options: &Options, stop: &AtomicBool, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let recipe = Recipe::read(&options.document()?)?;
    let setup = recipe.setup()?;
    refuse_coupled("precision", setup.precision)?;
    let mut stage = Grpo::new(recipe)?;
    let base = session::open(&setup, options, on_event)?;
    let Recipe { model, objective, .. } = &stage.recipe;
    if objective.beta > 0.0 {
        let path = model.reference.as_ref().unwrap_or(&setup.model);
        let loaded = load_model(path, setup.precision, Purpose::Train)?;
        stage.reference = fingerprint::of_weights(&loaded.folder)?;
        let reference = loaded.model;
        let (own, other) = (base.loaded().model.config.vocab_size, reference.config.vocab_size);
        if own != other {
            return Err(PostError::unsuitable(
                "model.reference",
                format!("it has {other} tokens, the model {own}: they do not speak of the same ones"),
            ));
        }
        stage.learner.reference = Some(reference);
    }
    session::run(&setup, base, &mut stage, options.resume, stop, on_event)
}

/// What the rounds of a turn drew.
#[derive(Default)]
pub(crate) struct Drawn {
    /// What was answered.
    pub stats: RolloutStats,
    /// Prompts that were too long.
    pub long: usize,
    /// Tasks drawn.
    index: u64,
}

/// A model that learns from its own answers to tasks.
pub(crate) struct Grpo {
    pub recipe: Recipe,
    pub curriculum: Curriculum,
    /// What it is examined on.
    pub examined: Vec<Task>,
    learner: Learner,
    /// The fingerprints of files of tasks, and of what the policy shall stay near to.
    files: String,
    reference: String,
    /// Made when the tokenizer is at hand.
    prompter: Option<Prompter>,
}

impl Grpo {
    /// Takes the tasks.
    pub fn new(recipe: Recipe) -> Result<Self> {
        let [suite, eval_suite] = recipe.suites()?;
        let curriculum = Curriculum::new(&suite, recipe.tasks.floor, recipe.run.seed)?;
        let files = suite.parts().iter().filter_map(|part| match part {
            Part::Tasks(path) => Some(path.clone()),
            Part::Family { .. } | Part::Text(_) => None,
        });
        let files = fingerprint::of_files(&files.collect::<Vec<_>>())?;
        // the examination is the same at every step, and the same in every run of these settings
        let examined = eval_suite
            .tasks(Split::HeldOut, recipe.tasks.eval_per_level, 0)
            .map_err(|error| PostError::unsuitable("tasks.eval_suite", error.to_string()))?;
        let learner = Learner {
            objective: recipe.objective,
            temperature: recipe.rollout.temperature,
            longest: recipe.rollout.max_tokens,
            minibatches: recipe.train.minibatches,
            epochs: recipe.train.epochs,
            rows_per_pass: recipe.train.rows_per_pass,
            reference: None,
        };
        Ok(Self { recipe, curriculum, examined, learner, files, reference: String::new(), prompter: None })
    }

    fn prompter(&mut self, shop: &Workshop) -> Result<Prompter> {
        if let Some(prompter) = &self.prompter {
            return Ok(prompter.clone());
        }
        let name = self.recipe.tasks.form;
        let form = form("tasks.form", name, shop.template.as_ref(), Thinking::Default)?;
        let prompter = Prompter::new(form, shop.bos, &shop.tokenizer)?;
        self.prompter = Some(prompter.clone());
        Ok(prompter)
    }

    /// Tokens of the prompt, if it leaves room for an answer; none when the task is left out.
    fn prompt(&self, shop: &Workshop, prompter: &Prompter, task: &Task) -> Result<(Option<Vec<u32>>, bool)> {
        let mut ids = prompter.prompt(&shop.tokenizer, task)?;
        let context = shop.trainer.model.config.max_position_embeddings;
        let room = context.saturating_sub(self.recipe.rollout.max_tokens.min(context / 2));
        if ids.len() <= room {
            return Ok((Some(ids), false));
        }
        match self.recipe.tasks.long_prompts {
            LongPrompts::Refuse => Err(PostError::unsuitable(
                format!("task {}", task.id),
                format!(
                    "its prompt has {} tokens, and {room} leave room for an answer in the context of {context}; \
                     tasks.long_prompts can be \"skip\" or \"cut\"",
                    ids.len()
                ),
            )),
            LongPrompts::Skip => Ok((None, true)),
            LongPrompts::Cut => {
                ids.drain(..ids.len() - room);
                Ok((Some(ids), true))
            }
        }
    }

    /// Samples until enough groups have something to learn from, or the rounds are over.
    fn rollout(
        &mut self,
        shop: &mut Workshop,
        turn: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(Vec<Group>, RolloutStats, usize)> {
        let wanted = self.recipe.rollout.prompts;
        let (mut kept, mut drawn) = (Vec::new(), Drawn::default());
        for _ in 0..=self.recipe.rollout.resample.unwrap_or(0) {
            let groups = self.round(shop, turn, wanted - kept.len(), &mut drawn)?;
            on_event(Event::Progress { what: "rollout", done: kept.len() as u64, total: wanted as u64 });
            kept.extend(groups.into_iter().filter(Group::has_signal));
            if kept.len() >= wanted {
                break;
            }
        }
        Ok((kept, drawn.stats, drawn.long))
    }

    /// Draws `wanted` tasks, lets the model answer them, and tells the curriculum what came of it.
    pub fn round(
        &mut self,
        shop: &mut Workshop,
        turn: u64,
        wanted: usize,
        drawn: &mut Drawn,
    ) -> Result<Vec<Group>> {
        let prompter = self.prompter(shop)?;
        let close = shop.tokenizer.id_of(minke_gym::answer::END_THINK);
        let since = Instant::now();
        let mut tasks = Vec::new();
        let before = drawn.index;
        // a file whose prompts are all too long must not be searched for ever
        while tasks.len() < wanted && drawn.index - before < 64 * wanted as u64 {
            let (cell, task) = self.curriculum.draw(turn, drawn.index);
            drawn.index += 1;
            let (prompt, too_long) = self.prompt(shop, &prompter, &task)?;
            drawn.long += usize::from(too_long);
            tasks.extend(prompt.map(|prompt| (cell, task, prompt)));
        }
        if tasks.is_empty() {
            let reason = "no task of it leaves room for an answer";
            return Err(PostError::unsuitable("tasks.suite", reason));
        }
        let (settings, reward) = (self.recipe.rollout, self.recipe.reward);
        // no two sequences of a run have one name
        let first = turn << 32 | drawn.stats.answers as u64;
        let groups = roll(shop, &prompter, &settings, &reward, tasks, first)?;
        for group in &groups {
            if let Some(share) = group.share() {
                self.curriculum.note(group.cell, share);
            }
        }
        drawn.stats.add(&groups, close, since);
        Ok(groups)
    }
}

fn sample(group: &Group, answer: &Answer) -> Sample {
    let verdict = match &answer.grade.verdict {
        minke_gym::Verdict::Right => "right".to_owned(),
        minke_gym::Verdict::Wrong => "wrong".to_owned(),
        minke_gym::Verdict::Error(reason) => format!("verifier error: {reason}"),
    };
    Sample { step: 0, prompt: group.task.prompt.clone(), text: answer.generation.text.clone(), verdict }
}

/// Tokens of a prompt, about: for the plan alone.
const PROMPT_TOKENS: usize = 128;

impl Stage for Grpo {
    fn batch(&self) -> Option<Batch> {
        let RolloutSettings { prompts, group, max_tokens, .. } = self.recipe.rollout;
        let sequence_length = max_tokens + PROMPT_TOKENS;
        let rows = self.recipe.train.rows_per_pass.min(prompts * group * sequence_length);
        let (key, length_key) = ("train.rows_per_pass", "rollout.max_tokens");
        Some(Batch { rows, sequence_length, key, unit: 1, length_key })
    }

    fn caches(&self, model: &Model) -> Caches {
        let RolloutSettings { prompts, group, max_tokens, concurrency, .. } = self.recipe.rollout;
        let answers = (prompts * group).min(concurrency.max(1));
        let pages = (max_tokens + PROMPT_TOKENS).div_ceil(PAGE);
        let page = CacheKind::Model.page_bytes(&model.config, &model.precision).unwrap_or(0);
        Caches { answers, answer_bytes: (pages as u64).saturating_mul(page as u64) }
    }

    fn updates(&self) -> u64 {
        (self.recipe.train.minibatches * self.recipe.train.epochs) as u64
    }

    fn facts(&self) -> Vec<(String, String)> {
        let RolloutSettings { prompts, group, max_tokens, .. } = self.recipe.rollout;
        let kinds = self.curriculum.cells();
        vec![
            (
                "objective".to_owned(),
                format!("{}, {prompts} prompts x {group} answers", self.recipe.objective.name()),
            ),
            ("answers".to_owned(), format!("at most {max_tokens} tokens")),
            ("tasks".to_owned(), format!("{} ({kinds} kinds and levels)", self.recipe.tasks.suite)),
            ("examined on".to_owned(), format!("{} held-out tasks", self.examined.len())),
        ]
    }

    fn turn(
        &mut self,
        shop: &mut Workshop,
        turn: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Values> {
        let start = Instant::now();
        let (groups, rollout, long) = self.rollout(shop, turn, on_event)?;
        let training = Instant::now();
        let taught: Vec<Vec<&Answer>> = groups.iter().map(|group| group.judged().collect()).collect();
        let learned = self.learner.learn(&shop.cpu, &mut shop.trainer, &taught)?;
        let (train_s, all_s) = (training.elapsed().as_secs_f64(), start.elapsed().as_secs_f64());
        let mut values = Values::default();
        rollout.put_into(&mut values);
        values.put("long_prompts", long as f64);
        values.put("signal", rollout.with_signal as f64 / rollout.groups as f64);
        values.put("all_right", rollout.all_right as f64 / rollout.groups as f64);
        values.put("all_wrong", rollout.all_wrong as f64 / rollout.groups as f64);
        values.put("train_s", train_s);
        values.put("tok_s", rollout.tokens as f64 / all_s);
        learned.put_into(&mut values);
        self.curriculum.put_into(&mut values);
        Ok(values)
    }

    fn evaluate(
        &mut self,
        shop: &mut Workshop,
        _step: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Values>> {
        let prompter = self.prompter(shop)?;
        let settings = EvalSettings {
            temperature: self.recipe.tasks.eval_temperature as f32,
            max_tokens: self.recipe.rollout.max_tokens,
            stop_ids: shop.stop_ids.clone(),
            concurrency: self.recipe.rollout.concurrency,
            ..EvalSettings::default()
        };
        let report = evaluate(
            &mut shop.trainer.model,
            &shop.cpu,
            &shop.tokenizer,
            &prompter,
            &self.examined,
            &settings,
            &mut |progress| {
                on_event(Event::Progress {
                    what: "evaluation",
                    done: progress.done as u64,
                    total: progress.total as u64,
                });
                ControlFlow::Continue(())
            },
        )?;
        let mut values = Values::default();
        report.put_into(&mut values);
        Ok(Some(values))
    }

    fn samples(&mut self, shop: &mut Workshop, _step: u64) -> Result<Vec<Sample>> {
        let prompter = self.prompter(shop)?;
        // one task of each kind: the same ones each time, so that they can be compared
        let mut tasks: Vec<(usize, Task, Vec<u32>)> = Vec::new();
        for task in self.examined.iter().rev() {
            if tasks.iter().all(|(_, known, _)| known.name != task.name)
                && tasks.len() < 4
                && let (Some(prompt), _) = self.prompt(shop, &prompter, task)?
            {
                tasks.push((0, task.clone(), prompt));
            }
        }
        let settings = RolloutSettings { group: 1, ..self.recipe.rollout };
        let groups = roll(shop, &prompter, &settings, &self.recipe.reward, tasks, u64::MAX >> 1)?;
        Ok(groups
            .iter()
            .filter_map(|group| group.answers.first().map(|answer| sample(group, answer)))
            .collect())
    }

    fn state(&self) -> Value {
        json!({ "success": self.curriculum.state(), "files": self.files, "reference": self.reference })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        // (older programs kept the curriculum alone)
        if state.is_array() {
            return self.curriculum.restore(state);
        }
        for (key, now, what) in
            [("files", &self.files, "other tasks"), ("reference", &self.reference, "another reference")]
        {
            if state[key] != json!(now) {
                return Err(format!("it learned with {what}; start a new run with --out"));
            }
        }
        self.curriculum.restore(&state["success"])
    }
}
