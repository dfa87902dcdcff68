//! A pipeline: stages, each with a recipe of its own, from one file.
//!
//! ```text
//! [run] name, seed, out, publish
//! [[stage]] name = "base", kind = "pretrain", and all that `minke pretrain` reads
//! [[stage]] name = "rl", kind = "grpo", model.path = "stage:base", ...
//!
//! OUT/stages/rl.toml    the stage's complete recipe: `minke grpo OUT/stages/rl.toml` runs it alone
//! OUT/stages/rl.json    what it was made from, and what came of it
//! OUT/rl/               what the stage wrote
//! OUT/model/            the last model, so that OUT is a run folder to every other command
//! OUT/report.md         the stages together
//! ```
//!
//! Nothing here knows what a stage does: a [`Runner`] checks and runs it. A stage **is** its recipe and the stages that
//! it refers to with `stage:NAME` or `stage:NAME/FILE`; the hash of these decides whether what lies in its folder is
//! still it. Paths that begin with `./` or `../`, and the keys that a [`Kind`] names, are taken from the pipeline's
//! folder.

mod error;
mod marker;
mod pipeline;
mod report;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use error::{Failed, MakeError};
pub use marker::StageResult;
use marker::{Folder, Marker};
use minke_data::hf::write_folder_atomic;
use minke_train::pretrain;
pub use pipeline::{Pipeline, Stage};

/// A kind of stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// What recipes call it.
    pub name: &'static str,
    /// The command that runs such a recipe alone, if there is one.
    pub command: Option<&'static str>,
    /// The dotted key of the model that it asks or goes on from, if there is one.
    pub begins_with: Option<&'static str>,
    /// Whether its folder holds a `model/` when it is finished.
    pub makes_model: bool,
    /// Dotted keys of its recipe whose strings are paths; `*` stands for any place in an array.
    pub paths: &'static [&'static str],
    /// The same for strings that are a path only where there is something, such as a model that may be a hub id.
    pub models: &'static [&'static str],
}

/// Who runs stages.
pub trait Runner {
    /// What a stage fails with.
    type Error;

    /// The kinds that there are.
    fn kinds(&self) -> &[Kind];

    /// Reads a stage's recipe as far as that goes before its inputs are there.
    ///
    /// # Errors
    /// It is wrong.
    fn check(&mut self, stage: &Stage) -> Result<(), Self::Error>;

    /// Runs a stage; `None` when it was stopped and can be resumed.
    ///
    /// # Errors
    /// It fails.
    fn run(&mut self, kind: Kind, options: &pretrain::Options) -> Result<Option<StageResult>, Self::Error>;

    /// Hears how far the pipeline is.
    fn see(&mut self, event: &Event<'_>);
}

/// What the orchestrator tells.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// A stage begins or goes on.
    Stage {
        /// Its place, from 1.
        index: usize,
        /// How many there are.
        stages: usize,
        /// Its name.
        name: &'a str,
        /// Its kind.
        stage_kind: &'a str,
        /// Whether it was cut off before and goes on.
        resumed: bool,
    },
    /// A stage is finished already and stays as it is.
    Skipped {
        /// Its place, from 1.
        index: usize,
        /// How many there are.
        stages: usize,
        /// Its name.
        name: &'a str,
    },
    /// A stage is finished.
    Finished {
        /// Its name.
        name: &'a str,
        /// Seconds that it took.
        seconds: f64,
        /// What came of it.
        result: &'a StageResult,
    },
}

/// What to make.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The pipeline's file.
    pub recipe: PathBuf,
    /// `STAGE.KEY=V` or `run.KEY=V`, in order.
    pub overrides: Vec<String>,
    /// The pipeline's folder instead of the recipe's.
    pub out: Option<PathBuf>,
    /// Whether to keep what is finished and go on with what was cut off.
    pub resume: bool,
    /// Make this stage alone, again if it is there.
    pub only: Option<String>,
    /// Keep what comes before this stage, and make it and what follows again.
    pub from: Option<String>,
    /// Threads; 0 for as many as there are cores.
    pub threads: usize,
    /// Whether stages start even if they need more memory than there is.
    pub force: bool,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The pipeline's folder.
    pub folder: PathBuf,
    /// Stages that are finished, in order.
    pub finished: Vec<String>,
    /// The stage that was stopped, if one was.
    pub stopped: Option<String>,
    /// The published model, once the stage that makes it is finished.
    pub model: Option<PathBuf>,
    /// The report, once a stage is finished.
    pub report: Option<PathBuf>,
}

/// What is to be done with a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// Nothing: it is finished, or not asked for.
    Keep,
    /// Make it, from nothing.
    Fresh,
    /// Go on with it.
    Resume,
}

/// Makes a pipeline, or what is left of it.
///
/// # Errors
/// The recipe or the folder cannot be used, a finished stage is not what is given now, or a stage fails. What was
/// finished stays.
pub fn run<R: Runner>(options: &Options, runner: &mut R) -> Result<Outcome, Failed<R::Error>> {
    let pipeline = Pipeline::load(options, runner.kinds())?;
    let part = ["--only", "--from"].into_iter().zip([&options.only, &options.from]);
    for (option, name) in part.filter_map(|(option, name)| Some((option, name.as_ref()?))) {
        if pipeline.stage(name).is_none() {
            return Err(MakeError::NoStage { option, name: name.clone(), stages: listed(&pipeline) }.into());
        }
    }
    let again = options.resume || options.only.is_some() || options.from.is_some();
    let folder = Folder::take(&pipeline.out, again)?;
    let plans = plan(&pipeline, &folder, options)?;
    let made = || pipeline.stages.iter().zip(&plans).filter(|(_, plan)| **plan != Plan::Keep);
    // everything that can be found wrong is found before hours are spent on what comes before it
    for (stage, _) in made() {
        runner.check(stage).map_err(|error| Failed::Stage { name: stage.name.clone(), error })?;
    }
    for (stage, _) in made() {
        folder.write_recipe(&pipeline, stage)?;
    }
    if options.from.is_some() {
        for (stage, _) in pipeline.stages.iter().zip(&plans).filter(|(_, plan)| **plan == Plan::Fresh) {
            folder.forget(&stage.name)?;
        }
    }
    let mut stopped = None;
    let stages = pipeline.stages.len();
    for (index, (stage, plan)) in pipeline.stages.iter().zip(plans).enumerate() {
        let (name, index) = (&stage.name[..], index + 1);
        let resumed = match plan {
            Plan::Keep => {
                if options.only.is_none() {
                    runner.see(&Event::Skipped { index, stages, name });
                }
                continue;
            }
            Plan::Fresh => false,
            Plan::Resume => true,
        };
        runner.see(&Event::Stage { index, stages, name, stage_kind: stage.kind.name, resumed });
        let marker = make(&folder, stage, resumed, options, runner)?;
        let Some(result) = &marker.result else {
            stopped = Some(stage.name.clone());
            break;
        };
        runner.see(&Event::Finished { name, seconds: marker.seconds, result });
        report::write(&pipeline, &folder)?;
    }
    finish(&pipeline, &folder, stopped).map_err(Failed::Make)
}

/// What to do with each stage.
fn plan(pipeline: &Pipeline, folder: &Folder, options: &Options) -> Result<Vec<Plan>, MakeError> {
    let position = |name: &Option<String>| {
        name.as_ref().and_then(|name| pipeline.stages.iter().position(|stage| stage.name == *name))
    };
    let (only, from) = (position(&options.only), position(&options.from));
    let mut plans = Vec::with_capacity(pipeline.stages.len());
    // identities as they would be if all was made from what is given now
    let mut identities: BTreeMap<&str, String> = BTreeMap::new();
    for (index, stage) in pipeline.stages.iter().enumerate() {
        let inputs = stage.inputs.iter().map(|name| (name.clone(), identities[&name[..]].clone())).collect();
        let now = Marker::now(stage, inputs)?;
        identities.insert(&stage.name, now.identity.clone());
        // what failed before it wrote anything binds no one
        let made = folder.marker(&stage.name)?;
        let made = made.filter(|made| made.result.is_some() || folder.has_begun(&stage.name));
        let is_again = (only == Some(index) && !options.resume) || from.is_some_and(|from| index >= from);
        if is_again {
            plans.push(Plan::Fresh);
            continue;
        }
        let differences = made.as_ref().map_or(Vec::new(), |made| made.differences(&now, &stage.name));
        // a stage that is neither made nor used now may be anything
        let matters = match only {
            None => true,
            Some(only) => only == index || pipeline.stages[only].inputs.contains(&stage.name),
        };
        if matters && !differences.is_empty() {
            return Err(MakeError::Changed {
                stage: stage.name.clone(),
                path: folder.path().to_owned(),
                differences: differences.join("\n"),
            });
        }
        let is_finished = made.is_some_and(|made| made.result.is_some());
        let wanted = match (only, from) {
            (Some(only), _) => index == only,
            // what comes before --from is what the later stages use
            (None, Some(_)) => false,
            (None, None) => true,
        };
        let is_kept = is_finished || !wanted;
        plans.push(match is_kept {
            true => Plan::Keep,
            false if folder.has_begun(&stage.name) => Plan::Resume,
            false => Plan::Fresh,
        });
    }
    for (index, stage) in pipeline.stages.iter().enumerate().filter(|(index, _)| plans[*index] != Plan::Keep)
    {
        for needs in &stage.inputs {
            let earlier = pipeline.stages[..index].iter().position(|stage| stage.name == *needs);
            let will_be = earlier.is_some_and(|earlier| plans[earlier] != Plan::Keep);
            let is = folder.marker(needs)?.is_some_and(|marker| marker.result.is_some());
            if !will_be && !is {
                return Err(MakeError::Unfinished {
                    stage: stage.name.clone(),
                    needs: needs.clone(),
                    path: folder.path().to_owned(),
                });
            }
        }
    }
    Ok(plans)
}

/// Runs one stage and stores how it went.
fn make<R: Runner>(
    folder: &Folder,
    stage: &Stage,
    resumed: bool,
    options: &Options,
    runner: &mut R,
) -> Result<Marker, Failed<R::Error>> {
    for reference in stage.references() {
        is_there(folder, stage, &reference)?;
    }
    let mut inputs = BTreeMap::new();
    for name in &stage.inputs {
        let identity = folder.marker(name)?.map(|marker| marker.identity).unwrap_or_default();
        inputs.insert(name.clone(), identity);
    }
    let mut marker = Marker::now(stage, inputs)?;
    if resumed {
        marker.seconds = folder.marker(&stage.name)?.map_or(0.0, |before| before.seconds);
    } else {
        folder.forget(&stage.name)?;
    }
    folder.mark(&stage.name, &marker)?;
    let start = Instant::now();
    let ran = runner.run(
        stage.kind,
        &pretrain::Options {
            recipe: folder.recipe(&stage.name),
            overrides: Vec::new(),
            out: Some(folder.stage(&stage.name)),
            resume: resumed,
            threads: options.threads,
            force: options.force,
            cache: None,
        },
    );
    marker.seconds += start.elapsed().as_secs_f64();
    match ran {
        Ok(result) => marker.result = result,
        Err(error) => {
            folder.mark(&stage.name, &marker)?;
            return Err(Failed::Stage { name: stage.name.clone(), error });
        }
    }
    folder.mark(&stage.name, &marker)?;
    Ok(marker)
}

/// Whether what a reference means was written; the stage before said that it is finished.
fn is_there(folder: &Folder, stage: &Stage, reference: &str) -> Result<(), MakeError> {
    let Some(path) = pipeline::referred(reference, folder.path()) else { return Ok(()) };
    if path.exists() {
        return Ok(());
    }
    let beside = path.parent().and_then(|parent| fs::read_dir(parent).ok());
    let mut names: Vec<String> = beside
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names.truncate(12);
    let found = if names.is_empty() { String::new() } else { format!("; there is {}", names.join(", ")) };
    Err(MakeError::NoFile { stage: stage.name.clone(), reference: reference.to_owned(), path, found })
}

/// Publishes the model if its stage is finished, and writes the report.
fn finish(pipeline: &Pipeline, folder: &Folder, stopped: Option<String>) -> Result<Outcome, MakeError> {
    let mut finished = Vec::new();
    for stage in &pipeline.stages {
        if folder.marker(&stage.name)?.is_some_and(|marker| marker.result.is_some()) {
            finished.push(stage.name.clone());
        }
    }
    let report = if finished.is_empty() { None } else { Some(report::write(pipeline, folder)?) };
    let mut model = None;
    if let Some(stage) = pipeline.published()
        && finished.contains(&stage.name)
    {
        let source = folder.stage(&stage.name).join("model");
        let target = folder.path().join("model");
        write_folder_atomic(&target, |building| copy_files(&source, building))?;
        model = Some(target);
    }
    Ok(Outcome { folder: folder.path().to_owned(), finished, stopped, model, report })
}

/// Copies the plain files of a folder.
fn copy_files(from: &Path, to: &Path) -> minke_data::Result<()> {
    for entry in fs::read_dir(from).map_err(minke_data::Error::io("read", from))? {
        let entry = entry.map_err(minke_data::Error::io("read", from))?;
        if entry.path().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))
                .map_err(minke_data::Error::io("copy", entry.path()))?;
        }
    }
    Ok(())
}

fn listed(pipeline: &Pipeline) -> String {
    pipeline.stages.iter().map(|stage| &stage.name[..]).collect::<Vec<_>>().join(", ")
}
