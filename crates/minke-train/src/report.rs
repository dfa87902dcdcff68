//! `report.md` with its plots: what a run reached, beside what compressors reach on the same text.

pub mod draw;
mod plots;

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

pub use plots::{Plot, plots};

use crate::metrics::{Record, SampleText};

/// What another program reaches on the same held-out text.
#[derive(Debug, Clone, PartialEq)]
pub struct Yardstick {
    /// Its name and settings, such as `xz -9`.
    pub name: String,
    /// Bits per byte.
    pub bits_per_byte: f64,
}

/// Everything that a report is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Name of the run.
    pub name: String,
    /// Parameters, MTP modules included.
    pub parameters: u64,
    /// Parameters that one token uses.
    pub active_parameters: u64,
    /// Bytes of held-out text that the bits per byte are about.
    pub held_out_bytes: u64,
    /// Compressors on the same text.
    pub yardsticks: Vec<Yardstick>,
    /// Further rows of the table of results.
    pub facts: Vec<(String, String)>,
    /// The run's metrics, samples included.
    pub records: Vec<Record>,
    /// The run that its held-out losses are put beside.
    pub baseline: Option<Baseline>,
}

/// Another run of the same steps, such as one in another precision.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    /// Its folder.
    pub name: String,
    /// Its metrics.
    pub records: Vec<Record>,
}

/// Why a report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The system refuses.
    #[error("cannot write {path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A plot cannot be drawn.
    #[error("cannot draw a plot: {0}")]
    Plot(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Report {
    /// Writes `report.md` and `plots/*.svg` into a folder, and returns the path of the first.
    ///
    /// Files are written beside their place and renamed, so an old report stays whole until the new one is.
    ///
    /// # Errors
    /// When the folder cannot be written to, or a plot cannot be drawn.
    pub fn write(&self, folder: &Path) -> Result<PathBuf, ReportError> {
        let plots = plots(&self.records).map_err(ReportError::Plot)?;
        let plot_folder = folder.join("plots");
        fs::create_dir_all(&plot_folder)
            .map_err(|source| ReportError::Io { path: plot_folder.clone(), source })?;
        for plot in &plots {
            replace(&plot_folder.join(plot.file), plot.svg.as_bytes())?;
        }
        let path = folder.join("report.md");
        replace(&path, self.markdown(&plots).as_bytes())?;
        Ok(path)
    }

    /// The text, with links to `plots/FILE`.
    pub fn markdown(&self, plots: &[Plot]) -> String {
        let mut text = format!("# {}\n\n", self.name);
        // writing to a String cannot fail
        let _ = self.results(&mut text);
        let _ = self.comparison(&mut text);
        let _ = self.gaps(&mut text);
        for plot in plots {
            let _ = write!(text, "![{}](plots/{})\n\n", plot.caption, plot.file);
        }
        let _ = self.samples(&mut text);
        text
    }

    fn results(&self, text: &mut String) -> std::fmt::Result {
        let last_step = self.records.iter().rev().find_map(|record| match record {
            Record::Step(step) => Some(step),
            Record::Evaluation(_) | Record::Sample(_) => None,
        });
        let mut rows = vec![
            ("parameters".to_owned(), grouped(self.parameters)),
            ("active per token".to_owned(), grouped(self.active_parameters)),
        ];
        if let Some(step) = last_step {
            rows.push(("steps".to_owned(), grouped(step.step)));
            rows.push(("tokens".to_owned(), grouped(step.tokens)));
            rows.push(("time".to_owned(), duration(step.elapsed_s)));
            if step.elapsed_s > 0.0 {
                let rate = step.tokens as f64 / step.elapsed_s;
                rows.push(("tokens per second".to_owned(), grouped(rate.round() as u64)));
            }
            rows.push(("training loss at the end".to_owned(), format!("{:.4} nats per token", step.loss)));
        }
        let skipped =
            self.records.iter().filter(|record| matches!(record, Record::Step(step) if step.skipped)).count();
        if skipped > 0 {
            rows.push(("steps skipped for what was not finite".to_owned(), grouped(skipped as u64)));
        }
        if let Some((loss, _)) = self.last_evaluation() {
            rows.push(("held-out loss".to_owned(), format!("{loss:.4} nats per token")));
        }
        rows.extend(self.facts.iter().cloned());
        writeln!(text, "| result | |\n|---|---:|")?;
        for (name, value) in rows {
            writeln!(text, "| {} | {} |", cell(&name), cell(&value))?;
        }
        writeln!(text)
    }

    fn last_evaluation(&self) -> Option<(f64, f64)> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Evaluation(evaluation) => Some((evaluation.loss, evaluation.bits_per_byte)),
            Record::Step(_) | Record::Sample(_) => None,
        })
    }

    fn comparison(&self, text: &mut String) -> std::fmt::Result {
        let Some((_, model)) = self.last_evaluation() else { return Ok(()) };
        writeln!(text, "On {} bytes of held-out text:\n", grouped(self.held_out_bytes))?;
        writeln!(text, "| | bits per byte | this model needs |\n|---|---:|---:|")?;
        writeln!(text, "| this model | {model:.3} | |")?;
        for yardstick in &self.yardsticks {
            let share = 100.0 * model / yardstick.bits_per_byte;
            let bits = yardstick.bits_per_byte;
            writeln!(text, "| {} | {bits:.3} | {share:.0} % of it |", cell(&yardstick.name))?;
        }
        writeln!(text)
    }

    /// Held-out loss beside the baseline's, at every evaluation that both have.
    fn gaps(&self, text: &mut String) -> std::fmt::Result {
        let Some(Baseline { name, records }) = &self.baseline else { return Ok(()) };
        let losses = |records: &[Record]| -> std::collections::BTreeMap<u64, f64> {
            let of = |record: &Record| match record {
                Record::Evaluation(evaluation) => Some((evaluation.step, evaluation.loss)),
                Record::Step(_) | Record::Sample(_) => None,
            };
            records.iter().filter_map(of).collect()
        };
        let (own, other) = (losses(&self.records), losses(records));
        let name = cell(name);
        writeln!(text, "Held-out loss beside that of `{name}`:\n")?;
        writeln!(text, "| step | this run | `{name}` | gap |\n|---:|---:|---:|---:|")?;
        for (step, loss) in own {
            if let Some(other) = other.get(&step) {
                let gap = 100.0 * (loss - other) / other;
                writeln!(text, "| {} | {loss:.4} | {other:.4} | {gap:+.2} % |", grouped(step))?;
            }
        }
        writeln!(text)
    }

    fn samples(&self, text: &mut String) -> std::fmt::Result {
        let samples: Vec<&SampleText> = self
            .records
            .iter()
            .filter_map(|record| match record {
                Record::Sample(sample) => Some(sample),
                Record::Step(_) | Record::Evaluation(_) => None,
            })
            .collect();
        let Some(last) = samples.iter().map(|sample| sample.step).max() else { return Ok(()) };
        writeln!(text, "## What it writes after {} steps\n", grouped(last))?;
        for sample in samples.iter().filter(|sample| sample.step == last) {
            let whole = format!("{}{}", sample.prompt, sample.text);
            let fence = "`".repeat(longest_run(&whole, '`').max(2) + 1);
            writeln!(
                text,
                "After the prompt {:?}:\n\n{fence}text\n{}\n{fence}\n",
                sample.prompt,
                whole.trim_end()
            )?;
        }
        Ok(())
    }
}

/// Writes a file whole or not at all.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    let temporary = path.with_extension("tmp");
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| ReportError::Io { path: path.to_owned(), source })
}

/// `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 h 2 min`, `2 min 3 s`, `3.4 s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Text that stays within its cell of a table.
pub fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// The longest run of a character: a fence of code must be longer.
pub fn longest_run(text: &str, wanted: char) -> usize {
    let mut longest = 0;
    let mut run = 0;
    for character in text.chars() {
        run = if character == wanted { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

#[cfg(test)]
mod tests;
