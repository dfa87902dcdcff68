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

mod curriculum;
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
use minke_gym::{Split, Task};
use minke_infer::load_model;
use minke_model::{LossOptions, Model};
use minke_train::metrics::Balance;
use minke_train::pretrain::Options;
use minke_train::trainer::{self, Load};
use serde_json::Value;

pub use curriculum::Curriculum;
pub use objective::{Algorithm, Normalization, Objective, Ratio, Sampled, Terms, Totals};
pub use recipe::{FormName, LongPrompts, Recipe};
pub(crate) use recipe::{model_path, precision, rhythm};
pub use reward::{Grade, Reward};
pub use rollout::{Answer, Group, RolloutSettings, RolloutStats, batch, roll};

use crate::error::{PostError, Result};
use crate::eval::{EvalSettings, Form, Prompter, evaluate};
use crate::events::Event;
use crate::metrics::{Sample, Values};
use crate::session::{self, Outcome, Stage, Workshop};

/// Trains as a recipe says. `stop` ends the run after the step in work, with a checkpoint.
///
/// # Errors
/// Anything that [`PostError`] lists; what was on the disk before stays whole.
pub fn run(options: &Options, stop: &AtomicBool, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let recipe = Recipe::load(&options.recipe, &options.overrides, options.out.as_deref())?;
    let [suite, eval_suite] = recipe.suites(options.recipe.parent())?;
    let setup = recipe.setup()?;
    let base = session::open(&setup, options, on_event)?;
    let reference = match (&recipe.model.reference, recipe.objective.beta > 0.0) {
        (_, false) => None,
        (Some(path), true) => Some(load_model(path, setup.precision)?.model),
        (None, true) => Some(load_model(&setup.model, setup.precision)?.model),
    };
    if let Some(reference) = &reference {
        let (own, other) = (base.loaded().model.config.vocab_size, reference.config.vocab_size);
        if own != other {
            return Err(PostError::unsuitable(
                "model.reference",
                format!("it has {other} tokens, the model {own}: they do not speak of the same ones"),
            ));
        }
    }
    let curriculum = Curriculum::new(&suite, recipe.tasks.floor, recipe.run.seed)
        .map_err(|error| PostError::unsuitable("tasks.suite", error.to_string()))?;
    // the examination is the same at every step, and the same in every run of these settings
    let examined = eval_suite
        .tasks(Split::HeldOut, recipe.tasks.eval_per_level, 0)
        .map_err(|error| PostError::unsuitable("tasks.eval_suite", error.to_string()))?;
    let mut stage = Grpo { recipe, curriculum, examined, reference, prompter: None, shown: None };
    session::run(&setup, base, &mut stage, options.resume, stop, on_event)
}

struct Grpo {
    recipe: Recipe,
    curriculum: Curriculum,
    examined: Vec<Task>,
    reference: Option<Model>,
    /// Made when the tokenizer is at hand.
    prompter: Option<Prompter>,
    /// An answer of the last rollout.
    shown: Option<Sample>,
}

/// An answer that is learned from.
struct Lesson<'a> {
    answer: &'a Answer,
    advantage: f64,
    reference: Option<Vec<f32>>,
}

/// What the updates of a rollout amounted to.
#[derive(Default)]
struct Learned {
    loss: f64,
    kl: f64,
    clipped: usize,
    tokens: usize,
    updates: usize,
    grad_norm: f64,
    lr: f64,
    /// Of the first update alone, where trainer and sampler have the same weights.
    drift: f64,
    drifted: usize,
    compared: usize,
    routes: usize,
    routes_differ: usize,
    mtp_loss: f64,
    mtp_tokens: usize,
    load: Vec<Load>,
}

impl Grpo {
    fn prompter(&mut self, shop: &Workshop) -> Result<Prompter> {
        if let Some(prompter) = &self.prompter {
            return Ok(prompter.clone());
        }
        let form = match (self.recipe.tasks.form, &shop.template) {
            (None | Some(FormName::Chat), Some(template)) => {
                Form::Chat { template: template.clone(), thinking: Thinking::Default }
            }
            (Some(FormName::Chat), None) => {
                let reason = "the model has no chat template; give model.template, or another form";
                return Err(PostError::unsuitable("tasks.form", reason));
            }
            (Some(FormName::Worked), _) => Form::Worked { think: true },
            (None | Some(FormName::Plain), _) => Form::Plain,
        };
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
        let prompter = self.prompter(shop)?;
        let close = shop.tokenizer.id_of(minke_gym::answer::END_THINK);
        let wanted = self.recipe.rollout.prompts;
        let (mut kept, mut stats, mut long) = (Vec::new(), RolloutStats::default(), 0);
        let mut index = 0;
        for _ in 0..=self.recipe.resample {
            let since = Instant::now();
            let mut tasks = Vec::new();
            let missing = wanted - kept.len();
            let before = index;
            // a file whose prompts are all too long must not be searched for ever
            while tasks.len() < missing && index - before < 64 * missing as u64 {
                let (cell, task) = self.curriculum.draw(turn, index);
                index += 1;
                let (prompt, too_long) = self.prompt(shop, &prompter, &task)?;
                long += usize::from(too_long);
                tasks.extend(prompt.map(|prompt| (cell, task, prompt)));
            }
            if tasks.is_empty() {
                let reason = "no task of it leaves room for an answer";
                return Err(PostError::unsuitable("tasks.suite", reason));
            }
            let (settings, reward) = (self.recipe.rollout, self.recipe.reward);
            // no two sequences of a run have one name
            let first = turn << 32 | stats.answers as u64;
            let groups = roll(shop, &prompter, &settings, &reward, tasks, first)?;
            for group in &groups {
                if let Some(share) = group.share() {
                    self.curriculum.note(group.cell, share);
                }
            }
            stats.add(&groups, close, since);
            on_event(Event::Progress { what: "rollout", done: kept.len() as u64, total: wanted as u64 });
            if let Some(group) = groups.first() {
                self.shown = group.answers.first().map(|answer| sample(group, answer));
            }
            kept.extend(groups.into_iter().filter(Group::has_signal));
            if kept.len() >= wanted {
                break;
            }
        }
        Ok((kept, stats, long))
    }

    /// The updates of a rollout.
    fn learn(&mut self, shop: &mut Workshop, groups: &[Group]) -> Result<Learned> {
        let mut learned = Learned::default();
        if groups.is_empty() {
            return Ok(learned);
        }
        let (minibatches, epochs) = (self.recipe.train.minibatches, self.recipe.train.epochs);
        let size = groups.len().div_ceil(minibatches);
        let mut parts = Vec::new();
        for part in groups.chunks(size) {
            parts.push(self.lessons(shop, part));
        }
        for epoch in 0..epochs {
            for (index, lessons) in parts.iter().enumerate() {
                let first = epoch == 0 && index == 0;
                self.update(shop, lessons, first, &mut learned)?;
            }
        }
        Ok(learned)
    }

    /// The judged answers of groups, with their advantages.
    fn lessons<'g>(&mut self, shop: &Workshop, groups: &'g [Group]) -> Vec<Lesson<'g>> {
        let mut lessons = Vec::new();
        for group in groups {
            let judged: Vec<&Answer> = group.judged().filter(|answer| !answer.is_empty()).collect();
            let rewards: Vec<f64> = judged.iter().filter_map(|answer| answer.grade.reward).collect();
            let advantages = self.recipe.objective.advantages(&rewards);
            lessons.extend(judged.into_iter().zip(advantages).map(|(answer, advantage)| Lesson {
                answer,
                advantage,
                reference: None,
            }));
        }
        if let Some(reference) = &mut self.reference {
            let rows_per_pass = self.recipe.train.rows_per_pass;
            for pass in passes(&lessons, rows_per_pass) {
                let answers: Vec<&Answer> =
                    lessons[pass.clone()].iter().map(|lesson| lesson.answer).collect();
                let log_probs =
                    reference.log_probs(&shop.cpu, &batch(&answers, self.recipe.rollout.temperature, 0));
                let mut rest = &log_probs[..];
                for lesson in &mut lessons[pass] {
                    let (own, others) = rest.split_at(lesson.answer.len());
                    lesson.reference = Some(own.to_vec());
                    rest = others;
                }
            }
        }
        lessons
    }

    fn update(
        &self,
        shop: &mut Workshop,
        lessons: &[Lesson<'_>],
        first: bool,
        learned: &mut Learned,
    ) -> Result<()> {
        let objective = self.recipe.objective;
        let totals = Totals {
            answers: lessons.len(),
            tokens: lessons.iter().map(|lesson| lesson.answer.len()).sum(),
            longest: self.recipe.rollout.max_tokens,
        };
        // what has no slope is not worth a pass
        let taught: Vec<&Lesson<'_>> =
            lessons.iter().filter(|lesson| lesson.advantage != 0.0 || objective.beta > 0.0).collect();
        if taught.is_empty() {
            return Ok(());
        }
        let modules = shop.trainer.model.config.num_nextn_predict_layers;
        let weight = shop.trainer.course().mtp_loss_weight;
        let modules = if weight > 0.0 { modules } else { 0 };
        let balance_alpha = shop.trainer.course().balance_alpha;
        let tokens: usize = taught.iter().map(|lesson| lesson.answer.len()).sum();
        let options = LossOptions {
            loss_scale: 0.0,
            mtp_scale: vec![(weight / (modules.max(1) * tokens) as f64) as f32; modules],
            balance_alpha: balance_alpha as f32,
        };
        let (mut loss, mut load) = (0.0, Vec::new());
        for pass in passes(&taught, self.recipe.train.rows_per_pass) {
            let part = &taught[pass];
            let answers: Vec<&Answer> = part.iter().map(|lesson| lesson.answer).collect();
            let batch = batch(&answers, self.recipe.rollout.temperature, modules);
            let mut terms = Terms::default();
            let stats =
                shop.trainer.model.policy_step(&shop.cpu, &batch, &options, &mut |s, log_probs, out| {
                    let lesson = &part[s];
                    let sampled = Sampled {
                        advantage: lesson.advantage,
                        log_probs: &lesson.answer.generation.trace.log_probs,
                        reference: lesson.reference.as_deref(),
                    };
                    let of = objective.slopes(totals, &sampled, log_probs, out);
                    terms.loss += of.loss;
                    terms.kl += of.kl;
                    terms.clipped += of.clipped;
                    terms.drift += of.drift;
                });
            loss += terms.loss;
            learned.kl += terms.kl;
            learned.clipped += terms.clipped;
            learned.tokens += stats.log_probs.len();
            learned.mtp_loss += stats.stats.mtp_loss_sum.iter().sum::<f64>();
            learned.mtp_tokens += stats.stats.mtp_tokens.iter().sum::<usize>();
            trainer::add_load(&mut load, &stats.stats.expert_load);
            if first {
                learned.compare(&answers, &stats.log_probs, &stats.stats.routes, terms.drift);
            }
        }
        let update = shop.trainer.update(&shop.cpu, loss, &load)?;
        learned.loss += loss;
        learned.updates += 1;
        learned.grad_norm += update.grad_norm;
        learned.lr = update.rates.adamw;
        learned.load = load;
        Ok(())
    }
}

impl Learned {
    /// Trainer against sampler, at the same weights.
    fn compare(
        &mut self,
        answers: &[&Answer],
        log_probs: &[f32],
        routes: &[std::sync::Arc<[u32]>],
        drift: f64,
    ) {
        let sampled = answers.iter().flat_map(|answer| &answer.generation.trace.log_probs);
        self.compared += log_probs.len();
        self.drift += drift;
        self.drifted += sampled.zip(log_probs).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let rows: usize = answers.iter().map(|answer| answer.prompt.len() + answer.len() - 1).sum();
        for (layer, trained) in routes.iter().enumerate() {
            let k = trained.len() / rows.max(1);
            let mut rest = &trained[..];
            for answer in answers {
                let sampled = &answer.generation.trace.routes[layer];
                let (own, others) = rest.split_at(sampled.len().min(rest.len()));
                self.routes += own.len() / k.max(1);
                self.routes_differ +=
                    own.chunks(k.max(1)).zip(sampled.chunks(k.max(1))).filter(|(a, b)| a != b).count();
                rest = others;
            }
        }
    }
}

/// Cuts answers into passes of at most `rows`, at least one answer each.
fn passes<'l, L: std::borrow::Borrow<Lesson<'l>>>(lessons: &[L], rows: usize) -> Vec<std::ops::Range<usize>> {
    let mut passes = Vec::new();
    let (mut start, mut held) = (0, 0);
    for (at, lesson) in lessons.iter().enumerate() {
        let answer = lesson.borrow().answer;
        let own = answer.prompt.len() + answer.len();
        if at > start && held + own > rows {
            passes.push(start..at);
            (start, held) = (at, 0);
        }
        held += own;
    }
    if start < lessons.len() {
        passes.push(start..lessons.len());
    }
    passes
}

fn sample(group: &Group, answer: &Answer) -> Sample {
    let verdict = match &answer.grade.verdict {
        minke_gym::Verdict::Right => "right".to_owned(),
        minke_gym::Verdict::Wrong => "wrong".to_owned(),
        minke_gym::Verdict::Error(reason) => format!("verifier error: {reason}"),
    };
    Sample { step: 0, prompt: group.task.prompt.clone(), text: answer.generation.text.clone(), verdict }
}

impl Stage for Grpo {
    fn updates(&self) -> u64 {
        (self.recipe.train.minibatches * self.recipe.train.epochs) as u64
    }

    fn facts(&self) -> Vec<(String, String)> {
        let RolloutSettings { prompts, group, max_tokens, .. } = self.recipe.rollout;
        let kinds = self.curriculum.success().count();
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
        let learned = self.learn(shop, &groups)?;
        let (train_s, all_s) = (training.elapsed().as_secs_f64(), start.elapsed().as_secs_f64());
        let mut values = Values::default();
        let answers = rollout.answers as f64;
        let share = |n: usize| n as f64 / answers;
        values.put("reward", rollout.reward / answers);
        values.put("right", share(rollout.right));
        values.put("formed", share(rollout.formed));
        values.put("unanswered", share(rollout.unanswered));
        values.put("cut", share(rollout.cut));
        values.put("verifier_errors", rollout.verifier_errors as f64);
        values.put("long_prompts", long as f64);
        values.put("tokens", share(rollout.tokens));
        values.put("thought", share(rollout.thought));
        values.put("entropy", rollout.surprise / rollout.tokens as f64);
        values.put("groups", rollout.groups as f64);
        values.put("signal", rollout.with_signal as f64 / rollout.groups as f64);
        values.put("all_right", rollout.all_right as f64 / rollout.groups as f64);
        values.put("all_wrong", rollout.all_wrong as f64 / rollout.groups as f64);
        values.put("rollout_tok_s", rollout.tokens as f64 / rollout.seconds);
        values.put("rollout_s", rollout.seconds);
        values.put("train_s", train_s);
        values.put("tok_s", rollout.tokens as f64 / all_s);
        if learned.updates > 0 {
            values.put("loss", learned.loss / learned.updates as f64);
            values.put("grad_norm", learned.grad_norm / learned.updates as f64);
            values.put("lr", learned.lr);
            values.put("clipped", learned.clipped as f64 / learned.tokens as f64);
            // both are 0 to the bit: one engine
            values.put("kl_rollout", learned.drift / learned.compared as f64);
            values.put("bits_differ", learned.drifted as f64 / learned.compared as f64);
            values.put("router_diff", learned.routes_differ as f64 / learned.routes as f64);
            if self.reference.is_some() {
                values.put("kl_reference", learned.kl / learned.tokens as f64);
            }
            if learned.mtp_tokens > 0 {
                values.put("mtp_loss", learned.mtp_loss / learned.mtp_tokens as f64);
            }
            let counts: Vec<Vec<u64>> = learned.load.into_iter().map(|(_, counts)| counts).collect();
            if !counts.is_empty() {
                let balance = Balance::from_counts(&counts);
                values.put("max_violation", balance.max_violation);
                values.put("dead_experts", balance.dead_experts as f64);
            }
        }
        for (name, level, success) in self.curriculum.success() {
            values.put(format!("success/{name}:{level}"), success);
        }
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
            if tasks.iter().all(|(_, known, _)| known.name != task.name) && tasks.len() < 4 {
                if let (Some(prompt), _) = self.prompt(shop, &prompter, task)? {
                    tasks.push((0, task.clone(), prompt));
                }
            }
        }
        let settings = RolloutSettings { group: 1, ..self.recipe.rollout };
        let groups = roll(shop, &prompter, &settings, &self.recipe.reward, tasks, u64::MAX >> 1)?;
        Ok(groups
            .iter()
            .flat_map(|group| group.answers.first().map(|answer| sample(group, answer)))
            .collect())
    }

    fn state(&self) -> Value {
        self.curriculum.state()
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        self.curriculum.restore(state)
    }
}
