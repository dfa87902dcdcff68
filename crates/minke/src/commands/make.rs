//! `minke make`: the terminal's side of pipelines, and the kinds of stages that there are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minke_post::make::{self, Event, Failed, Kind, Options, Outcome, Runner, Stage, StageResult};
use minke_post::metrics::Values;
use minke_post::{distill, grpo, sft, stages};
use minke_train::pretrain;
use minke_train::recipe::Recipe;
use serde_json::json;

use super::train::{duration, json_line};
use super::{post, sample, threads, train};
use crate::cli::Make;
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output::{self, percent};

/// The kinds of stages.
const KINDS: [Kind; 7] = [
    Kind { name: "worked", command: None, begins_with: None, makes_model: false, paths: &[], models: &[] },
    Kind {
        name: "pretrain",
        command: Some("pretrain"),
        begins_with: None,
        makes_model: true,
        paths: &["data.sources.*.path", "data.tokenizer", "run.baseline"],
        models: &[],
    },
    Kind {
        name: "sft",
        command: Some("sft"),
        begins_with: Some("model.path"),
        makes_model: true,
        paths: &["data.sources.*.path"],
        models: &["model.path", "model.template", "eval.suite"],
    },
    Kind {
        name: "grpo",
        command: Some("grpo"),
        begins_with: Some("model.path"),
        makes_model: true,
        paths: &[],
        models: &["model.path", "model.template", "model.reference", "tasks.suite", "tasks.eval_suite"],
    },
    Kind {
        name: "sample",
        command: Some("sample"),
        begins_with: Some("model.path"),
        makes_model: false,
        paths: &[],
        models: &["model.path", "model.template", "tasks.suite"],
    },
    Kind {
        name: "distill",
        command: Some("distill"),
        begins_with: Some("student.path"),
        makes_model: true,
        paths: &["data.sources.*.path", "distill.cache"],
        models: &[
            "teacher.path",
            "student.path",
            "student.template",
            "eval.suite",
            "tasks.suite",
            "tasks.eval_suite",
        ],
    },
    Kind {
        name: "eval",
        command: None,
        begins_with: Some("model.path"),
        makes_model: false,
        paths: &[],
        models: &["model.path", "model.template", "eval.suite"],
    },
];

/// Runs `minke make`.
pub fn run(args: &Make) -> Result<(), Failure> {
    interrupt::install();
    let work = Work::begin();
    let options = Options {
        recipe: args.recipe.clone(),
        overrides: args.set.clone(),
        out: args.out.clone(),
        resume: args.resume,
        only: args.only.clone(),
        from: args.from.clone(),
        threads: threads(args.threads),
        force: args.force,
    };
    let mut stages = Stages { json: args.json, stop: work.flag() };
    let outcome = make::run(&options, &mut stages).map_err(|failed| match failed {
        Failed::Make(error) => error.into(),
        Failed::Stage { name, error } => error.context(&format!("stage {name}")),
    })?;
    end(&outcome, args.json)?;
    if outcome.stopped.is_none() { Ok(()) } else { Err(Failure::interrupted()) }
}

fn end(outcome: &Outcome, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(&json!({
            "event": if outcome.stopped.is_none() { "made" } else { "stopped" },
            "folder": outcome.folder,
            "stages": outcome.finished,
            "stopped": outcome.stopped,
            "model": outcome.model,
            "report": outcome.report,
        }));
    }
    let folder = outcome.folder.display();
    if let Some(stage) = &outcome.stopped {
        return output::text(&format!("stopped in stage {stage} of {folder}; --resume continues\n"));
    }
    let mut rows = vec![("stages", outcome.finished.join(", "))];
    if let Some(report) = &outcome.report {
        rows.push(("report", report.display().to_string()));
    }
    if let Some(model) = &outcome.model {
        rows.push(("model", model.display().to_string()));
        rows.push(("next", format!("minke chat {folder}")));
    }
    output::text(&output::table(&rows))
}

/// Runs stages as their commands do.
struct Stages {
    json: bool,
    stop: Arc<AtomicBool>,
}

impl Runner for Stages {
    type Error = Failure;

    fn kinds(&self) -> &[Kind] {
        &KINDS
    }

    fn check(&mut self, stage: &Stage) -> Result<(), Failure> {
        let recipe = &stage.given;
        match stage.kind.name {
            "worked" => drop(stages::gym::Recipe::read(recipe)?),
            "pretrain" => drop(Recipe::read(recipe)?),
            "sft" => drop(sft::recipe::Recipe::read(recipe)?),
            "grpo" => drop(grpo::Recipe::read(recipe)?),
            "sample" => drop(minke_post::sample::Recipe::read(recipe)?),
            "distill" => drop(distill::Recipe::read(recipe)?),
            "eval" => drop(stages::exam::Recipe::read(recipe)?),
            other => unreachable!("{other} is not among the kinds"),
        }
        Ok(())
    }

    fn run(&mut self, kind: Kind, options: &pretrain::Options) -> Result<Option<StageResult>, Failure> {
        if self.stop.load(Ordering::SeqCst) {
            return Ok(None);
        }
        match kind.name {
            "worked" => self.worked(options),
            "pretrain" => self.pretrain(options),
            "sft" => self.post(options, sft::run),
            "grpo" => self.post(options, grpo::run),
            "sample" => self.sample(options),
            "distill" => self.post(options, distill::run),
            "eval" => self.eval(options),
            other => unreachable!("{other} is not among the kinds"),
        }
    }

    fn see(&mut self, event: &Event<'_>) {
        if self.json {
            // where no one reads any more the run itself still goes on
            let _ = json_line(&json!({ "event": "make", "make": event }));
            return;
        }
        output::note(&match event {
            Event::Stage { index, stages, name, stage_kind, resumed } => {
                let how = if *resumed { ", continued" } else { "" };
                format!("\n== stage {index} of {stages}: {name} ({stage_kind}{how})")
            }
            Event::Skipped { index, stages, name } => {
                format!("== stage {index} of {stages}: {name} is finished")
            }
            Event::Finished { name, seconds, result } => {
                let facts = result.facts.iter().map(|(name, value)| format!("{name} {value}"));
                let scores = result.scores.as_ref().and_then(|values| values.get("pass@1"));
                let all: Vec<String> =
                    facts.chain(scores.map(|share| format!("pass@1 {}", percent(share)))).collect();
                format!("== {name} took {}: {}", duration(*seconds), all.join(", "))
            }
        });
    }
}

impl Stages {
    fn worked(&self, options: &pretrain::Options) -> Result<Option<StageResult>, Failure> {
        let files = sample::shown(self.json, |on_event| stages::gym::run(options, &self.stop, on_event))?;
        Ok(files.map(|files| {
            let fact = |(path, written): (std::path::PathBuf, minke_post::worked::Written)| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                (name, format!("{} lines", written.lines))
            };
            StageResult { facts: files.into_iter().map(fact).collect(), scores: None }
        }))
    }

    fn pretrain(&self, options: &pretrain::Options) -> Result<Option<StageResult>, Failure> {
        let mut watcher = train::Watcher::new(self.json);
        let outcome = pretrain::run(options, &self.stop, &mut |event| watcher.see(&event));
        watcher.end();
        let outcome = outcome?;
        Ok(outcome.finished.map(|finished| {
            let mut facts = vec![("steps".to_owned(), outcome.step.to_string())];
            if let Some(bits) = finished.bits_per_byte {
                facts.push(("bits per byte".to_owned(), format!("{bits:.3}")));
            }
            StageResult { facts, scores: None }
        }))
    }

    fn post(&self, options: &pretrain::Options, run: post::Run) -> Result<Option<StageResult>, Failure> {
        let mut watcher = post::Watcher::new(self.json);
        let outcome = run(options, &self.stop, &mut |event| watcher.see(&event));
        watcher.end();
        let outcome = outcome?;
        Ok(outcome.model.is_some().then(|| StageResult {
            facts: vec![("steps".to_owned(), outcome.step.to_string())],
            scores: outcome.evaluation.as_ref().and_then(scores),
        }))
    }

    fn sample(&self, options: &pretrain::Options) -> Result<Option<StageResult>, Failure> {
        let outcome = sample::stage(self.json, options, &self.stop)?;
        Ok(outcome.finished.map(|finished| StageResult { facts: finished.counts.facts(), scores: None }))
    }

    fn eval(&self, options: &pretrain::Options) -> Result<Option<StageResult>, Failure> {
        let outcome = sample::shown(self.json, |on_event| stages::exam::run(options, &self.stop, on_event))?;
        let Some(outcome) = outcome else { return Ok(None) };
        if !self.json {
            output::note(&outcome.report.table());
        }
        let all = &outcome.report.overall;
        Ok(Some(StageResult {
            facts: vec![("tasks".to_owned(), all.tasks.to_string())],
            scores: scores(&outcome.values),
        }))
    }
}

/// Of an evaluation what all stages can be compared by; `None` where tasks were not among it.
fn scores(values: &Values) -> Option<Values> {
    let kept =
        |name: &str| ["pass@", "majority@", "thought", "no_answer"].iter().any(|stem| name.starts_with(stem));
    let numbers: BTreeMap<String, f64> = values
        .values
        .iter()
        .filter(|(name, _)| kept(name))
        .map(|(name, value)| (name.clone(), *value))
        .collect();
    (!numbers.is_empty()).then(|| Values { values: numbers, ..values.clone() })
}
