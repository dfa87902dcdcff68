//! `report.md` of a pipeline: its stages, what they made of the model, and where their own reports are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use minke_train::report::draw::{Axes, Bounds, Line, MAX_LINES, line_plot};
use minke_train::report::{cell, duration, grouped};

use super::MakeError;
use super::marker::{Folder, StageResult, replace};
use super::pipeline::Pipeline;
use crate::metrics::{Record, Values};
use crate::report::samples::{self, Shown};
use crate::report::{self, Plot, level_lines};

/// Plots of a stage that stand in the pipeline's report as well, the most telling first.
const SHOWN: [&str; 3] = ["reward.svg", "pass.svg", "loss.svg"];

/// A finished stage.
struct Done<'a> {
    name: &'a str,
    kind: &'a str,
    seconds: f64,
    result: StageResult,
    /// Of kinds whose metrics are those of post-training.
    records: Vec<Record>,
}

/// Writes the report of what is finished so far.
pub(super) fn write(pipeline: &Pipeline, folder: &Folder) -> Result<PathBuf, MakeError> {
    let mut done = Vec::new();
    for stage in &pipeline.stages {
        let Some(marker) = folder.marker(&stage.name)? else { continue };
        let Some(result) = marker.result else { continue };
        // metrics of another form are for the stage's own report
        let records = report::read(&folder.stage(&stage.name).join("metrics.jsonl")).unwrap_or_default();
        let (name, kind) = (&stage.name[..], stage.kind.name);
        done.push(Done { name, kind, seconds: marker.seconds, result, records });
    }
    let plots = plots(pipeline, &done).map_err(|error| MakeError::Plot(error.to_string()))?;
    report::write_plots(folder.path(), &plots).map_err(|error| MakeError::Plot(error.to_string()))?;
    let path = folder.path().join("report.md");
    replace(&path, markdown(pipeline, folder, &done, &plots).as_bytes())?;
    Ok(path)
}

fn markdown(pipeline: &Pipeline, folder: &Folder, done: &[Done<'_>], plots: &[Plot]) -> String {
    let mut text = format!("# {}\n\n", pipeline.name);
    // writing to a String cannot fail
    let _ = stages(&mut text, pipeline, folder, done);
    let columns: Vec<(String, &Values)> = done
        .iter()
        .filter_map(|stage| {
            let is_change = pipeline.stage(stage.name).is_some_and(|stage| stage.kind.makes_model);
            let title = if is_change { format!("after {}", stage.name) } else { stage.name.to_owned() };
            Some((title, stage.result.scores.as_ref()?))
        })
        .collect();
    let table = report::table(&columns);
    if !table.is_empty() {
        let _ = write!(text, "## What it can do\n\nOn held-out problems:\n\n{table}\n");
    }
    for plot in plots {
        let _ = write!(text, "![{}](plots/{})\n\n", plot.caption, plot.file);
    }
    let shown: Vec<Shown<'_>> = done
        .iter()
        .flat_map(|stage| stage.records.iter().map(move |record| (stage, record)))
        .filter_map(|(stage, record)| match record {
            Record::Sample(sample) => {
                let when = format!("In `{}`, after {} steps", stage.name, grouped(sample.step));
                Some(Shown { when, sample })
            }
            Record::Step(_) | Record::Evaluation(_) => None,
        })
        .collect();
    let _ = samples::write(&mut text, &shown);
    for stage in done {
        let at = folder.stage(stage.name).join("plots");
        let there: Vec<&str> = SHOWN.into_iter().filter(|file| at.join(file).is_file()).collect();
        if !there.is_empty() {
            let _ = write!(text, "## Stage {}\n\n", stage.name);
            for file in there {
                let _ = write!(
                    text,
                    "![{} of {}]({}/plots/{file})\n\n",
                    file.trim_end_matches(".svg"),
                    stage.name,
                    stage.name
                );
            }
        }
    }
    text
}

fn stages(text: &mut String, pipeline: &Pipeline, folder: &Folder, done: &[Done<'_>]) -> std::fmt::Result {
    writeln!(text, "| stage | kind | what it did | time |\n|---|---|---|---:|")?;
    for stage in &pipeline.stages {
        let Some(done) = done.iter().find(|done| done.name == stage.name) else {
            writeln!(text, "| {} | {} | not finished | |", stage.name, stage.kind.name)?;
            continue;
        };
        let name = if folder.stage(done.name).join("report.md").is_file() {
            format!("[{0}]({0}/report.md)", done.name)
        } else {
            done.name.to_owned()
        };
        let facts: Vec<String> = done
            .result
            .facts
            .iter()
            .map(|(name, value)| format!("{}: {}", cell(name), cell(value)))
            .collect();
        let time = duration(done.seconds);
        writeln!(text, "| {name} | {} | {} | {time} |", done.kind, facts.join("; "))?;
    }
    let total: f64 = done.iter().map(|done| done.seconds).sum();
    writeln!(text, "| all | | | {} |\n", duration(total))?;
    if let Some(stage) = pipeline.published()
        && done.iter().any(|done| done.name == stage.name)
    {
        writeln!(text, "`model/` is the model of stage `{}`.\n", stage.name)?;
    }
    Ok(())
}

/// The whole way in one picture: evaluations of all stages by the minutes that the pipeline had worked; of models that
/// began otherwise than the pipeline's, such as students, a line of their own.
fn plots(pipeline: &Pipeline, done: &[Done<'_>]) -> Result<Vec<Plot>, minke_train::report::draw::DrawError> {
    let origin = |stage| &pipeline.origin(stage).name[..];
    let main = pipeline.published().map(origin);
    let mut before = 0.0;
    // by origin, and called by the last of its models
    let mut others: BTreeMap<&str, (&str, Vec<Values>)> = BTreeMap::new();
    let mut evaluations = Vec::new();
    for stage in done {
        let own = report::evaluations(&stage.records);
        let place = match pipeline.stage(stage.name) {
            Some(of) if !own.is_empty() && Some(origin(of)) != main => {
                let (name, place) = others.entry(origin(of)).or_default();
                *name = of.begins_with().filter(|_| !of.kind.makes_model).unwrap_or(stage.name);
                place
            }
            _ => &mut evaluations,
        };
        place.extend(own.into_iter().map(|values| Values {
            elapsed_s: before + values.elapsed_s.min(stage.seconds),
            ..values.clone()
        }));
        before += stage.seconds;
    }
    let minutes = |values: &Values| values.elapsed_s / 60.0;
    let line = |name: &str, evaluations: &[Values], value: &str| {
        let points = evaluations.iter().filter_map(|values| Some((minutes(values), values.get(value)?)));
        Line::new(name.to_owned(), points.collect::<Vec<_>>())
    };
    let with = |mut lines: Vec<Line>, value: &str| {
        lines.truncate(MAX_LINES.saturating_sub(others.len()).max(1));
        lines.extend(others.values().map(|(name, own)| line(name, own, value)));
        lines
    };
    let levels = level_lines(&evaluations.iter().collect::<Vec<_>>(), "pass@1", minutes);
    let candidates = [
        (
            "pass.svg",
            "pass@1 on held-out problems over all stages",
            "right answers",
            Bounds::Share,
            with(levels, "pass@1"),
        ),
        (
            "thought.svg",
            "Length of thought over all stages",
            "tokens",
            Bounds::Zero,
            with(vec![line("thought", &evaluations, "thought")], "thought"),
        ),
    ];
    let mut plots = Vec::new();
    for (file, caption, y, bounds, lines) in candidates {
        if lines.iter().any(|line| !line.points.is_empty()) {
            let axes = Axes { title: caption, x: "minutes of work", y, bounds };
            plots.push(Plot {
                file: file.to_owned(),
                caption: caption.to_owned(),
                svg: line_plot(&axes, &lines)?,
            });
        }
    }
    Ok(plots)
}
