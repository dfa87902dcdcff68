//! Rejection sampling: a teacher answers tasks, and the right answers become lessons.
//!
//! ```text
//! tasks of the training split -> the teacher, several answers each -> verifier -> choice -> answers.jsonl
//! ```
//!
//! Every answer goes to `samples.jsonl` as it comes, so that a stage that was cut off goes on where it was; what is
//! chosen is a function of these. The lessons are chats with the thought in `reasoning_content`: what `sft` learns from.

mod choice;
mod recipe;
#[cfg(test)]
pub(crate) mod tests;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

pub use choice::{Counts, Lesson, choose};
use minke_cpu::Cpu;
use minke_gym::{Split, Suite};
use minke_train::pretrain::Options;
use minke_train::run_folder::{RunFolder, replace};
use minke_train::{TrainError, resume};
pub use recipe::{Keep, Recipe, Sampling, Tasks, Which};

use crate::error::{PostError, Result};
use crate::eval::{AnswerLog, EvalReport, EvalSettings, Form, evaluate_logged, model_name};
use crate::events::{Event, Started};

/// The file of lessons in the run's folder.
pub const ANSWERS: &str = "answers.jsonl";
/// The file of all answers in the run's folder.
const SAMPLES: &str = "samples.jsonl";

/// How it ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The run's folder.
    pub folder: PathBuf,
    /// What came of it; `None` when it was stopped.
    pub finished: Option<Finished>,
}

/// What a finished run left.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// The lessons, in chat format.
    pub answers: PathBuf,
    /// The report.
    pub report: PathBuf,
    /// How many of what.
    pub counts: Counts,
}

/// Samples answers and keeps right ones. `stop` ends it after the answers in work; `--resume` then goes on.
///
/// # Errors
/// Anything that [`PostError`] lists; what was on the disk before stays whole.
pub fn run(options: &Options, stop: &AtomicBool, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let recipe = Recipe::read(&options.document()?)?;
    let unsuitable = |error: minke_gym::SuiteError| PostError::unsuitable("tasks.suite", error.to_string());
    let suite = Suite::parse(&recipe.tasks.suite).map_err(unsuitable)?;
    let folder = RunFolder::take(Path::new(&recipe.run.out), options.resume)?;
    let loaded = suite.load(Split::Train, recipe.tasks.per_level, recipe.run.seed).map_err(unsuitable)?;
    if loaded.tasks.is_empty() {
        return Err(PostError::unsuitable("tasks.suite", "there is no task in it"));
    }
    let cpu = Cpu::detect(options.threads);
    let mut teacher = recipe.asking.open(&cpu)?;
    for note in loaded.notes.iter().chain(&teacher.notes) {
        on_event(Event::Warning { text: note });
    }
    let prompter = recipe.asking.prompter(&teacher, recipe.asking.thinking)?;
    let Sampling { samples, temperature, top_p, max_tokens, concurrency } = recipe.sampling;
    let settings = EvalSettings {
        samples,
        temperature: temperature as f32,
        top_p: top_p as f32,
        max_tokens,
        seed: recipe.run.seed,
        k: if samples > 1 { vec![1, samples] } else { vec![1] },
        concurrency,
        stop_ids: teacher.stop_ids.clone(),
    };
    keep_recipe(&folder, &recipe, options.resume)?;
    let log_path = folder.path().join(SAMPLES);
    let mut log =
        AnswerLog::open(&log_path, &model_name(&teacher.model), &prompter, &settings, options.resume)?;
    let counts = minke_model::spec::parameters(&teacher.model.config);
    on_event(Event::Started(&Started {
        kind: "sample",
        name: recipe.run.name.clone(),
        folder: folder.path().to_owned(),
        step: log.len() as u64,
        steps: (loaded.tasks.len() * samples) as u64,
        parameters: counts.total + counts.mtp,
        active_parameters: counts.active,
        threads: cpu.threads(),
        level: cpu.level().name(),
        facts: vec![
            ("tasks".to_owned(), format!("{} of {}", loaded.tasks.len(), recipe.tasks.suite)),
            ("prompts".to_owned(), prompter.name()),
        ],
    }));
    let mut last = None;
    let report = evaluate_logged(
        &mut teacher.model,
        &cpu,
        &teacher.tokenizer,
        &prompter,
        &loaded.tasks,
        &settings,
        Some(&mut log),
        &mut |progress| {
            if last != Some(progress.done) {
                last = Some(progress.done);
                let (done, total) = (progress.done as u64, progress.total as u64);
                on_event(Event::Progress { what: "answers", done, total });
            }
            if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    )?;
    if !report.complete {
        return Ok(Outcome { folder: folder.path().to_owned(), finished: None });
    }
    let thinks = matches!(prompter.form(), Form::Chat { .. });
    let (lessons, counts) = choose(&loaded.tasks, &report.answers, recipe.keep, |answer| {
        Lesson::of(&prompter.split(&answer.text), &answer.text, thinks)
    });
    if counts.kept == 0 {
        on_event(Event::Warning { text: "no answer is right, so there is nothing to learn from" });
    }
    let finished = store(folder.path(), &recipe, &lessons, counts, &report)?;
    Ok(Outcome { folder: folder.path().to_owned(), finished: Some(finished) })
}

/// Stores the recipe with a new run, and compares it with that of a resumed one.
fn keep_recipe(folder: &RunFolder, recipe: &Recipe, is_resumed: bool) -> Result<()> {
    let path = folder.recipe();
    let text = recipe.to_toml();
    if is_resumed && path.exists() {
        let stored = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        resume::check(folder.path(), &stored, &text, Recipe::is_free)?;
    }
    Ok(replace(&path, text.as_bytes())?)
}

/// Writes lessons, counts and report.
fn store(
    folder: &Path,
    recipe: &Recipe,
    lessons: &[(usize, Lesson)],
    counts: Counts,
    report: &EvalReport,
) -> Result<Finished> {
    let lines: String = lessons.iter().map(|(_, lesson)| lesson.line() + "\n").collect();
    let answers = folder.join(ANSWERS);
    replace(&answers, lines.as_bytes())?;
    let json = serde_json::to_string_pretty(&counts).expect("plain data serialises") + "\n";
    replace(&folder.join("counts.json"), json.as_bytes())?;
    let rows: Vec<String> =
        counts.facts().iter().map(|(name, value)| format!("| {name} | {value} |")).collect();
    let rows = rows.join("\n");
    let text = format!(
        "# {}\n\n| result | |\n|---|---:|\n{rows}\n\nThe teacher on these tasks:\n\n```text\n{}```\n",
        recipe.run.name,
        report.table()
    );
    let path = folder.join("report.md");
    replace(&path, text.as_bytes())?;
    Ok(Finished { answers, report: path, counts })
}
