//! An examination: `report.md`, `eval.json`, the answers, and one evaluation in `metrics.jsonl`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use minke_cpu::Cpu;
use minke_gym::{Split, Suite, Task};
use minke_train::pretrain::Options;
use minke_train::recipe::{self, Document, Run};
use minke_train::run_folder::{RunFolder, replace};

use super::split;
use crate::asking::{Asked, Asking, ThinkingName};
use crate::error::{PostError, Result};
use crate::eval::{AnswerLog, EvalReport, EvalSettings, Prompter, evaluate_logged, model_name};
use crate::events::Event;
use crate::metrics::{Record, Values};
use crate::recipe::suite_place;

/// The answers, by which the folder of an examination is known.
const ANSWERS: &str = "answers.jsonl";

/// A recipe of an examination.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Name, seed and folder.
    pub run: Run,
    /// The model.
    pub asking: Asking,
    /// What is asked.
    pub suite: String,
    /// Tasks of each family and level.
    pub per_level: usize,
    /// From which half of all problems.
    pub split: Split,
    /// How it is asked; the tokens that end an answer are the model's.
    pub settings: EvalSettings,
    /// Whether it is asked once more with an empty thought.
    pub without_thinking: bool,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was found.
    pub report: EvalReport,
    /// The same with an empty thought.
    pub without_thinking: Option<EvalReport>,
    /// Both as numbers: those without thinking as `pass@1-without-thinking`.
    pub values: Values,
    /// The text.
    pub path: PathBuf,
}

impl Recipe {
    /// Reads a parsed recipe.
    ///
    /// # Errors
    /// Unknown keys, wrong types and values out of bounds, each with its place.
    pub fn read(document: &Document) -> Result<Self> {
        let mut root = document.root();
        let mut run = root.section("run")?;
        let mut eval = root.section("eval")?;
        let asking = Asking::read(document, &mut root, &mut eval)?;
        root.finish()?;
        let run_part = recipe::run(&mut run, document)?;
        run.finish()?;
        let Some(suite) = suite_place(&mut eval, "suite")? else {
            return Err(eval.missing("suite", "what is asked, such as \"core\" or \"my.jsonl\"").into());
        };
        Suite::parse(&suite).map_err(|error| PostError::unsuitable("eval.suite", error.to_string()))?;
        let samples = eval.integer("samples", 1, 1 << 12)?.unwrap_or(1) as usize;
        let temperature = eval.temperature("temperature")?;
        let top_p = eval.top_p()?;
        let settings = EvalSettings {
            samples,
            // several likeliest answers are one
            temperature: temperature.unwrap_or(if samples > 1 { 1.0 } else { 0.0 }) as f32,
            top_p: top_p.unwrap_or(1.0) as f32,
            max_tokens: eval.integer("max_tokens", 1, 1 << 24)?.unwrap_or(512) as usize,
            seed: run_part.seed,
            k: if samples > 1 { vec![1, samples] } else { vec![1] },
            concurrency: eval.integer("concurrency", 1, 1 << 16)?.unwrap_or(128) as usize,
            stop_ids: Vec::new(),
        };
        let recipe = Self {
            run: run_part,
            asking,
            suite,
            per_level: eval.integer("per_level", 1, 1 << 20)?.unwrap_or(25) as usize,
            split: split(&mut eval, Split::HeldOut)?,
            settings,
            without_thinking: eval.flag("without_thinking")?.unwrap_or(false),
        };
        eval.finish()?;
        Ok(recipe)
    }
}

/// Examines a model; `None` when it was stopped, and `--resume` goes on with the answers that are there.
///
/// # Errors
/// Anything that [`PostError`] lists.
pub fn run(
    options: &Options,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Option<Outcome>> {
    let recipe = Recipe::read(&options.document()?)?;
    let unsuitable = |error: minke_gym::SuiteError| PostError::unsuitable("eval.suite", error.to_string());
    let suite = Suite::parse(&recipe.suite).map_err(unsuitable)?;
    let folder = RunFolder::take_with(Path::new(&recipe.run.out), options.resume, ANSWERS)?;
    let loaded = suite.load(recipe.split, recipe.per_level, recipe.run.seed).map_err(unsuitable)?;
    if loaded.tasks.is_empty() {
        return Err(PostError::unsuitable("eval.suite", "there is no task in it"));
    }
    let cpu = Cpu::detect(options.threads);
    let mut asked = recipe.asking.open(&cpu)?;
    for note in loaded.notes.iter().chain(&asked.notes) {
        on_event(Event::Warning { text: note });
    }
    let settings = EvalSettings { stop_ids: asked.stop_ids.clone(), ..recipe.settings.clone() };
    let prompter = recipe.asking.prompter(&asked, recipe.asking.thinking)?;
    let mut exam = Exam { cpu, tasks: &loaded.tasks, settings: &settings, stop };
    let log = folder.path().join(ANSWERS);
    let report = exam.sit(&mut asked, &prompter, &log, options.resume, "answers", on_event)?;
    if !report.complete {
        return Ok(None);
    }
    let mut without_thinking = None;
    if recipe.without_thinking {
        let prompter = recipe.asking.prompter(&asked, ThinkingName::Empty)?;
        let log = folder.path().join("answers-without-thinking.jsonl");
        let second =
            exam.sit(&mut asked, &prompter, &log, options.resume, "answers without thinking", on_event)?;
        if !second.complete {
            return Ok(None);
        }
        without_thinking = Some(second);
    }
    let mut values = Values::default();
    report.put_into(&mut values);
    if let Some(second) = &without_thinking {
        values.put("pass@1-without-thinking", second.pass_1());
    }
    let path = store(folder.path(), &recipe, &report, without_thinking.as_ref(), &values)?;
    Ok(Some(Outcome { report, without_thinking, values, path }))
}

struct Exam<'a> {
    cpu: Cpu,
    tasks: &'a [Task],
    settings: &'a EvalSettings,
    stop: &'a AtomicBool,
}

impl Exam<'_> {
    fn sit(
        &mut self,
        asked: &mut Asked,
        prompter: &Prompter,
        log: &Path,
        resume: bool,
        what: &str,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<EvalReport> {
        let mut log = AnswerLog::open(log, &model_name(&asked.model), prompter, self.settings, resume)?;
        let mut last = None;
        evaluate_logged(
            &mut asked.model,
            &self.cpu,
            &asked.tokenizer,
            prompter,
            self.tasks,
            self.settings,
            Some(&mut log),
            &mut |progress| {
                if last != Some(progress.done) {
                    last = Some(progress.done);
                    let (done, total) = (progress.done as u64, progress.total as u64);
                    on_event(Event::Progress { what, done, total });
                }
                if self.stop.load(Ordering::Relaxed) {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        )
    }
}

fn store(
    folder: &Path,
    recipe: &Recipe,
    report: &EvalReport,
    without_thinking: Option<&EvalReport>,
    values: &Values,
) -> Result<PathBuf> {
    let json = serde_json::json!({ "report": report, "without_thinking": without_thinking });
    let json = serde_json::to_string_pretty(&json).expect("plain data serialises") + "\n";
    replace(&folder.join("eval.json"), json.as_bytes())?;
    let record = Record::Evaluation(values.clone());
    let line = serde_json::to_string(&record).expect("plain data serialises") + "\n";
    replace(&folder.join("metrics.jsonl"), line.as_bytes())?;
    let mut text =
        format!("# {}\n\n`{}`:\n\n```text\n{}```\n", recipe.run.name, recipe.suite, report.table());
    if let Some(second) = without_thinking {
        text.push_str("\nWith an empty thought:\n\n```text\n");
        text.push_str(&second.table());
        text.push_str("```\n");
    }
    let path = folder.join("report.md");
    replace(&path, text.as_bytes())?;
    Ok(path)
}
