//! `report.md` with its plots: what a stage of post-training did, from its metrics alone.
//!
//! The metrics name their numbers ([`crate::metrics::Values`]); a plot stands in the report when the numbers that it is
//! made of are there. So one report serves every kind of stage, and one that is added later.

mod plots;
pub(crate) mod samples;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use minke_train::metrics::{self, MetricsError};
use minke_train::report::{cell, duration, grouped};
use minke_train::run_folder::replace;
pub(crate) use plots::level_lines;
pub use plots::{Plot, plots};

use crate::error::{PostError, Result};
use crate::metrics::{Record, Values};

/// What a report begins with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Heading {
    /// The run's name.
    pub name: String,
    /// What was done: `sft`, `grpo`, `distill`.
    pub kind: String,
    /// Rows of the table of results, before those from the metrics.
    pub facts: Vec<(String, String)>,
}

/// Reads the metrics of a run's folder and writes `report.md` and `plots/*.svg` into it; the path of the first.
///
/// Files are written beside their place and renamed, so an old report stays whole until the new one is.
///
/// # Errors
/// The metrics cannot be read, the folder cannot be written to, or a plot cannot be drawn.
pub fn write(folder: &Path, heading: &Heading) -> Result<PathBuf> {
    let records = read(&folder.join("metrics.jsonl"))?;
    let plots = plots(&records).map_err(|error| PostError::unsuitable("report", error.to_string()))?;
    write_plots(folder, &plots)?;
    let path = folder.join("report.md");
    replace(&path, markdown(heading, &records, &plots).as_bytes())?;
    Ok(path)
}

/// Writes plots into `plots/` of a folder.
pub(crate) fn write_plots(folder: &Path, plots: &[Plot]) -> Result<()> {
    let plot_folder = folder.join("plots");
    fs::create_dir_all(&plot_folder).map_err(PostError::io("create", &plot_folder))?;
    for plot in plots {
        replace(&plot_folder.join(&plot.file), plot.svg.as_bytes())?;
    }
    Ok(())
}

/// The records of a metrics file; a stage that was cut off before its first has none.
pub(crate) fn read(path: &Path) -> Result<Vec<Record>, MetricsError> {
    if path.exists() { metrics::read(path) } else { Ok(Vec::new()) }
}

/// The text, with links to `plots/FILE`.
pub fn markdown(heading: &Heading, records: &[Record], plots: &[Plot]) -> String {
    let mut text = format!("# {}\n\n", heading.name);
    // writing to a String cannot fail
    let _ = results(&mut text, heading, records);
    let _ = scores(&mut text, &evaluations(records));
    for plot in plots {
        let _ = write!(text, "![{}](plots/{})\n\n", plot.caption, plot.file);
    }
    let all: Vec<samples::Shown<'_>> = records
        .iter()
        .filter_map(|record| match record {
            Record::Sample(sample) => {
                Some(samples::Shown { when: format!("after {} steps", grouped(sample.step)), sample })
            }
            Record::Step(_) | Record::Evaluation(_) => None,
        })
        .collect();
    let _ = samples::write(&mut text, &all);
    text
}

fn steps(records: &[Record]) -> Vec<&Values> {
    records
        .iter()
        .filter_map(|record| match record {
            Record::Step(values) => Some(values),
            Record::Evaluation(_) | Record::Sample(_) => None,
        })
        .collect()
}

/// The evaluations, in order.
pub(crate) fn evaluations(records: &[Record]) -> Vec<&Values> {
    records
        .iter()
        .filter_map(|record| match record {
            Record::Evaluation(values) => Some(values),
            Record::Step(_) | Record::Sample(_) => None,
        })
        .collect()
}

fn results(text: &mut String, heading: &Heading, records: &[Record]) -> std::fmt::Result {
    let mut rows = vec![("stage".to_owned(), heading.kind.clone())];
    rows.extend(heading.facts.iter().cloned());
    let steps = steps(records);
    if let Some(last) = steps.last() {
        rows.push(("steps".to_owned(), grouped(last.step)));
        rows.push(("time".to_owned(), duration(last.elapsed_s)));
        let tail = &steps[steps.len() - steps.len().div_ceil(10)..];
        for (name, said) in [("reward", "reward"), ("loss", "loss"), ("entropy", "entropy (nats)")] {
            let values: Vec<f64> = tail.iter().filter_map(|step| step.get(name)).collect();
            if !values.is_empty() {
                let mean = values.iter().sum::<f64>() / values.len() as f64;
                rows.push((format!("{said}, mean of the last tenth"), format!("{mean:.4}")));
            }
        }
        for (name, said) in [
            ("kl_rollout", "KL(rollout‖trainer), largest of all steps"),
            ("bits_differ", "log-probabilities that differ in a bit, largest share"),
            ("router_diff", "routers that differ, largest share"),
        ] {
            let values = steps.iter().filter_map(|step| step.get(name)).map(f64::abs);
            if let Some(most) = values.reduce(f64::max) {
                rows.push((said.to_owned(), number(most)));
            }
        }
    }
    writeln!(text, "| result | |\n|---|---:|")?;
    for (name, value) in rows {
        writeln!(text, "| {} | {} |", cell(&name), cell(&value))?;
    }
    writeln!(text)
}

/// What the model could do at first and at last.
fn scores(text: &mut String, evaluations: &[&Values]) -> std::fmt::Result {
    let (Some(first), Some(last)) = (evaluations.first(), evaluations.last()) else { return Ok(()) };
    let columns = [
        (format!("after {} steps", grouped(first.step)), *first),
        (format!("after {} steps", grouped(last.step)), *last),
    ];
    let columns = if first.step == last.step { &columns[1..] } else { &columns[..] };
    if !table(columns).is_empty() {
        writeln!(text, "On held-out problems:\n\n{}", table(columns))?;
    }
    Ok(())
}

/// A table of evaluations side by side: overall, by family, by level, and what else was measured. Empty when none of
/// them has a number.
pub(crate) fn table(columns: &[(String, &Values)]) -> String {
    let mut rows: BTreeMap<(bool, &str, &str, u64), &str> = BTreeMap::new();
    for name in columns.iter().flat_map(|(_, values)| values.values.keys()) {
        rows.insert(place(name), name);
    }
    if rows.is_empty() {
        return String::new();
    }
    let mut text = String::from("| |");
    for (title, _) in columns {
        let _ = write!(text, " {} |", cell(title));
    }
    text.push_str("\n|---|");
    text.push_str(&"---:|".repeat(columns.len()));
    text.push('\n');
    for name in rows.values() {
        let _ = write!(text, "| {} |", cell(name));
        for (_, values) in columns {
            match values.get(name) {
                Some(value) if is_share(name) => {
                    let _ = write!(text, " {:.1} % |", 100.0 * value);
                }
                Some(value) => {
                    let _ = write!(text, " {} |", number(value));
                }
                None => text.push_str(" |"),
            }
        }
        text.push('\n');
    }
    text
}

/// Where a row stands: `pass@1`, its families each with its levels, then the other numbers in the same way.
fn place(name: &str) -> (bool, &str, &str, u64) {
    let (stem, part) = name.split_once('/').unwrap_or((name, ""));
    let (family, level) = part
        .rsplit_once(':')
        .and_then(|(family, level)| Some((family, level.parse::<u64>().ok()?.saturating_add(1))))
        .unwrap_or((part, 0));
    (stem != "pass@1", stem, family, level)
}

/// Whether a number of this name goes from 0 to 1.
pub(crate) fn is_share(name: &str) -> bool {
    let stem = name.split('/').next().unwrap_or_default();
    stem.starts_with("pass@") || stem.starts_with("majority@") || stem == "no_answer"
}

/// A number in at most six characters or so.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e5 => grouped(value.round() as u64),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.1e}"),
    }
}
