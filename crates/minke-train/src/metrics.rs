//! `metrics.jsonl`: one JSON object per line, only ever appended to.
//!
//! Each record goes out as one write, so a killed process leaves at most one torn line, the last, which
//! reading skips. A resumed run first drops what lies beyond its checkpoint, by writing the rest to a
//! temporary file and renaming that, so that the file has each step once.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

/// No record is longer; a longer line is not ours.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// How evenly the routed experts were used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    /// Largest load over the mean load, minus one, over all layers.
    pub max_violation: f64,
    /// Experts that got no token, over all layers.
    pub dead_experts: usize,
    /// Load of each expert as a multiple of its layer's mean, by layer with experts, `[layers][e]`.
    pub load: Vec<Vec<f32>>,
}

impl Balance {
    /// Sums up token counts per expert, `[layers][e]`; layers without a token count as even.
    pub fn from_counts(counts: &[Vec<u64>]) -> Self {
        let mut balance =
            Self { max_violation: 0.0, dead_experts: 0, load: Vec::with_capacity(counts.len()) };
        for layer in counts {
            let total: u64 = layer.iter().sum();
            if total == 0 {
                balance.load.push(vec![1.0; layer.len()]);
                continue;
            }
            let mean = total as f64 / layer.len() as f64;
            let most = layer.iter().max().map_or(0.0, |most| *most as f64);
            balance.max_violation = balance.max_violation.max(most / mean - 1.0);
            balance.dead_experts += layer.iter().filter(|count| **count == 0).count();
            balance.load.push(layer.iter().map(|count| (*count as f64 / mean) as f32).collect());
        }
        balance
    }
}

/// JSON has no infinities and writes null for them; a run that diverged must still be readable.
fn null_as_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// One training step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Cross entropy of the next token, nats per token.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// Cross entropy of the MTP modules, averaged, before its weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtp_loss: Option<f64>,
    /// Sequence-wise balance loss, after its weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_loss: Option<f64>,
    /// Learning rate of `AdamW` at this step.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    #[serde(deserialize_with = "null_as_nan")]
    pub grad_norm: f64,
    /// Whether the step changed nothing, because its loss or gradient is not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Tokens per second of this step.
    pub tok_s: f64,
    /// Share of the machine's matrix-product peak that the step's FLOPs reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gemm_share: Option<f64>,
    /// Seconds of training so far, over all its parts when it was resumed.
    pub elapsed_s: f64,
    /// Use of the experts, when there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<Balance>,
}

/// One evaluation on held-out text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Cross entropy, nats per token.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// Bits per byte of text.
    #[serde(deserialize_with = "null_as_nan")]
    pub bits_per_byte: f64,
}

/// One text written during training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleText {
    /// Steps done.
    pub step: u64,
    /// What was given.
    pub prompt: String,
    /// What the model wrote.
    pub text: String,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// One training step.
    Step(Step),
    /// One evaluation.
    Evaluation(Evaluation),
    /// One text.
    Sample(SampleText),
}

/// What a line of a metrics file must be.
pub trait Line: Serialize + DeserializeOwned {
    /// Steps done when it was written.
    fn step(&self) -> u64;
}

impl Line for Record {
    fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Evaluation(evaluation) => evaluation.step,
            Self::Sample(sample) => sample.step,
        }
    }
}

/// Why metrics cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The system refuses.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A line that is complete is not a record.
    #[error("{path}:{line}: not a metrics record: {reason}", path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Why not.
        reason: String,
    },
}

fn io_error<'p>(action: &'static str, path: &'p Path) -> impl FnOnce(io::Error) -> MetricsError + 'p {
    move |source| MetricsError::Io { action, path: path.to_owned(), source }
}

/// Appends records to a `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter<R = Record> {
    file: File,
    path: PathBuf,
    records: PhantomData<fn(R)>,
}

impl<R: Line> MetricsWriter<R> {
    /// Starts a new file.
    ///
    /// # Errors
    /// When it exists already, or cannot be created.
    pub fn create(path: &Path) -> Result<Self, MetricsError> {
        let file = OpenOptions::new().append(true).create_new(true).open(path);
        Ok(Self {
            file: file.map_err(io_error("create", path))?,
            path: path.to_owned(),
            records: PhantomData,
        })
    }

    /// Continues a file from a checkpoint after `step` steps: later records and a torn last line are dropped.
    /// A file that is not there is started. Of one that holds lines that are no records, the others are continued; a copy
    /// of the whole is set aside, and `warn` hears of it.
    ///
    /// # Errors
    /// When it cannot be read or written; it is then unchanged.
    pub fn resume(path: &Path, step: u64, warn: &mut dyn FnMut(&str)) -> Result<Self, MetricsError> {
        Self::keep(path, |record| record.step() <= step, warn)
    }

    /// Begins a file anew for a run that left no checkpoint: whatever records it holds are dropped.
    ///
    /// # Errors
    /// As [`MetricsWriter::resume`].
    pub fn restart(path: &Path, warn: &mut dyn FnMut(&str)) -> Result<Self, MetricsError> {
        Self::keep(path, |_| false, warn)
    }

    fn keep(
        path: &Path,
        stays: impl Fn(&R) -> bool,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Self, MetricsError> {
        if !path.try_exists().map_err(io_error("look at", path))? {
            return Self::create(path);
        }
        let temporary = path.with_extension("jsonl.tmp");
        let mut kept = BufWriter::new(File::create(&temporary).map_err(io_error("create", &temporary))?);
        let mut damaged: Option<(MetricsError, usize)> = None;
        for_each_line(path, |line, record: Result<R, MetricsError>| match record {
            Ok(record) if stays(&record) => kept
                .write_all(line)
                .and_then(|()| kept.write_all(b"\n"))
                .map_err(io_error("write", &temporary)),
            Ok(_) => Ok(()),
            Err(why) => {
                damaged.get_or_insert((why, 0)).1 += 1;
                Ok(())
            }
        })?;
        if let Some((why, lines)) = damaged {
            let aside = path.with_extension("jsonl.damaged");
            fs::copy(path, &aside).map_err(io_error("write", &aside))?;
            let lines = if lines == 1 { "this line".to_owned() } else { format!("{lines} such lines") };
            warn(&format!(
                "{why}; without {lines} it goes on, and the whole as it was is {}",
                aside.display()
            ));
        }
        let kept = kept.into_inner().map_err(|error| io_error("write", &temporary)(error.into_error()))?;
        kept.sync_all().map_err(io_error("sync", &temporary))?;
        fs::rename(&temporary, path).map_err(io_error("replace", path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(io_error("open", path))?;
        Ok(Self { file, path: path.to_owned(), records: PhantomData })
    }

    /// Appends one record, as one write.
    ///
    /// # Errors
    /// When the system refuses, such as on a full disk.
    pub fn append(&mut self, record: &R) -> Result<(), MetricsError> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| io_error("write", &self.path)(io::Error::other(error)))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(io_error("write", &self.path))
    }
}

/// Reads all records; a torn last line is left out.
///
/// # Errors
/// When the file cannot be read, or a complete line is no record.
pub fn read<R: Line>(path: &Path) -> Result<Vec<R>, MetricsError> {
    let mut records = Vec::new();
    for_each_line(path, |_, record| {
        records.push(record?);
        Ok(())
    })?;
    Ok(records)
}

/// Gives each complete line, without its end, and its record, or why it is none.
fn for_each_line<R: Line>(
    path: &Path,
    mut give: impl FnMut(&[u8], Result<R, MetricsError>) -> Result<(), MetricsError>,
) -> Result<(), MetricsError> {
    let mut reader = BufReader::new(File::open(path).map_err(io_error("open", path))?);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let corrupt = |reason: String| MetricsError::Corrupt { path: path.to_owned(), line: number, reason };
        let mut limited = io::Read::take(&mut reader, MAX_LINE_BYTES);
        let length = limited.read_until(b'\n', &mut line).map_err(io_error("read", path))?;
        let Some(complete) = line.strip_suffix(b"\n") else {
            if length as u64 == MAX_LINE_BYTES {
                give(&line, Err(corrupt(format!("longer than {MAX_LINE_BYTES} bytes"))))?;
                reader.skip_until(b'\n').map_err(io_error("read", path))?;
                continue;
            }
            // the end, or a line that a kill cut off
            return Ok(());
        };
        give(complete, serde_json::from_slice(complete).map_err(|error| corrupt(error.to_string())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Record {
        Record::Step(Step {
            step,
            tokens: step * 4096,
            loss: 9.0 / step as f64,
            mtp_loss: Some(0.1),
            balance_loss: None,
            lr: 1e-3,
            grad_norm: 0.7,
            skipped: false,
            tok_s: 1234.5,
            gemm_share: Some(0.4),
            elapsed_s: 3.25,
            balance: Some(Balance::from_counts(&[vec![4, 0, 2, 2], vec![2, 2, 2, 2]])),
        })
    }

    fn evaluation(step: u64) -> Record {
        Record::Evaluation(Evaluation { step, tokens: step * 4096, loss: 2.0, bits_per_byte: 1.1 })
    }

    fn folder_with(records: &[Record]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        for record in records {
            writer.append(record).unwrap();
        }
        (folder, path)
    }

    #[test]
    fn what_is_written_is_read() {
        let sample = Record::Sample(SampleText { step: 2, prompt: "a\nb".into(), text: "\u{0}é".into() });
        let records = [step(1), evaluation(1), step(2), sample];
        let (_folder, path) = folder_with(&records);
        assert_eq!(read::<Record>(&path).unwrap(), records);
        let text = fs::read_to_string(&path).unwrap();
        insta::assert_snapshot!(text.lines().nth(1).unwrap(), @r#"{"kind":"evaluation","step":1,"tokens":4096,"loss":2.0,"bits_per_byte":1.1}"#);
        assert!(MetricsWriter::<Record>::create(&path).is_err());
    }

    #[test]
    fn resuming_at_any_step_and_byte_gives_the_uninterrupted_file() {
        let all = [step(1), evaluation(1), step(2), step(3), evaluation(3), step(4)];
        let (_folder, path) = folder_with(&all);
        let whole = fs::read(&path).unwrap();
        let line_of =
            |n: usize| whole.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(n).unwrap().0 + 1;
        for checkpoint in [0_u64, 1, 3, 9] {
            let durable = all.iter().filter(|record| record.step() <= checkpoint).count();
            // killed anywhere after the checkpoint's own lines
            let first = if durable == 0 { 0 } else { line_of(durable - 1) };
            for cut in (first..=whole.len()).step_by(37).chain([whole.len()]) {
                fs::write(&path, &whole[..cut]).unwrap();
                let mut writer =
                    MetricsWriter::resume(&path, checkpoint, &mut |text| panic!("{text}")).unwrap();
                for record in &all[durable..] {
                    writer.append(record).unwrap();
                }
                assert_eq!(fs::read(&path).unwrap(), whole, "checkpoint {checkpoint}, cut {cut}");
            }
        }
    }

    #[test]
    fn restarting_keeps_nothing_and_sets_aside_what_is_not_ours() {
        let (_folder, path) = folder_with(&[evaluation(0), step(1)]);
        MetricsWriter::restart(&path, &mut |text| panic!("{text}")).unwrap().append(&evaluation(0)).unwrap();
        assert_eq!(read::<Record>(&path).unwrap(), [evaluation(0)]);
        fs::write(&path, "somebody's\n").unwrap();
        let mut warned = 0;
        MetricsWriter::<Record>::restart(&path, &mut |_| warned += 1).unwrap();
        assert_eq!((warned, read::<Record>(&path).unwrap()), (1, vec![]));
        assert_eq!(fs::read(path.with_extension("jsonl.damaged")).unwrap(), b"somebody's\n");
    }

    #[test]
    fn a_run_that_diverged_is_readable() {
        let mut diverged = step(1);
        if let Record::Step(step) = &mut diverged {
            (step.loss, step.grad_norm) = (f64::NAN, f64::INFINITY);
        }
        let (_folder, path) = folder_with(&[diverged]);
        let Record::Step(step) = &read::<Record>(&path).unwrap()[0] else { panic!("a step") };
        assert!(step.loss.is_nan() && step.grad_norm.is_nan());
    }

    #[test]
    fn what_stands_around_damaged_lines_is_continued_and_the_whole_set_aside() {
        let (_folder, path) = folder_with(&[step(1), step(2), step(3), step(4)]);
        let long = "x".repeat(2 * MAX_LINE_BYTES as usize) + "\n";
        let mut damaged = fs::read_to_string(&path).unwrap().replace("\"step\":2", "\"stop\":2");
        damaged.insert_str(damaged.find("{\"kind\":\"step\",\"step\":3").unwrap(), &long);
        fs::write(&path, &damaged).unwrap();
        assert!(read::<Record>(&path).is_err());
        let mut warnings = Vec::new();
        let mut writer = MetricsWriter::resume(&path, 3, &mut |text| warnings.push(text.to_owned())).unwrap();
        writer.append(&step(5)).unwrap();
        let [warning] = &warnings[..] else { panic!("{warnings:?}") };
        for part in [
            "metrics.jsonl:2: not a metrics record: missing field `step`",
            "without 2 such lines",
            "metrics.jsonl.damaged",
        ] {
            assert!(warning.contains(part), "{warning}");
        }
        assert_eq!(read::<Record>(&path).unwrap(), [step(1), step(3), step(5)]);
        assert_eq!(fs::read_to_string(path.with_extension("jsonl.damaged")).unwrap(), damaged);
    }

    #[test]
    fn balance_sums_up_the_counts() {
        let balance = Balance::from_counts(&[vec![4, 0, 2, 2], vec![0, 0], vec![1, 1]]);
        assert_eq!((balance.max_violation, balance.dead_experts), (1.0, 1));
        assert_eq!(balance.load, [vec![2.0, 0.0, 1.0, 1.0], vec![1.0, 1.0], vec![1.0, 1.0]]);
    }
}
