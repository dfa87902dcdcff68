//! Answers on the disk, one a line, so that an evaluation that was interrupted goes on.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Answer, EvalSettings, Grade, Prompter};
use crate::error::{PostError, Result};

/// No line is longer, in bytes.
const MOST_LINE_BYTES: u64 = 64 << 20;

/// The first line: what the answers are of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    /// The format's version.
    minke_answers: u32,
    /// Names the weights.
    model: String,
    /// Names the form of prompts.
    form: String,
    /// What of the settings shows in an answer.
    settings: serde_json::Value,
}

impl Header {
    fn new(model: &str, prompter: &Prompter, settings: &EvalSettings) -> Self {
        let EvalSettings { temperature, top_p, max_tokens, seed, stop_ids, .. } = settings;
        Self {
            minke_answers: 1,
            model: model.to_owned(),
            form: prompter.name(),
            settings: serde_json::json!({
                "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed,
                "stop_ids": stop_ids,
            }),
        }
    }

    /// What differs, in words.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        match () {
            () if self.minke_answers != other.minke_answers => Some("another version of the format"),
            () if self.model != other.model => Some("another model"),
            () if self.form != other.form => Some("another form of prompts"),
            () if self.settings != other.settings => Some("other settings"),
            () => None,
        }
    }
}

/// A file of answers: read once, then appended to.
#[derive(Debug)]
pub struct AnswerLog {
    path: PathBuf,
    file: File,
    known: HashMap<(String, usize), Answer>,
}

impl AnswerLog {
    /// Begins a log, or with `resume` continues one; `model` names the weights ([`super::model_name`]).
    ///
    /// # Errors
    /// The file is there and `resume` is not given, it is no such log, or its answers are of another model, form or
    /// settings.
    pub fn open(
        path: &Path,
        model: &str,
        prompter: &Prompter,
        settings: &EvalSettings,
        resume: bool,
    ) -> Result<Self> {
        let header = Header::new(model, prompter, settings);
        let place = path.display().to_string();
        let begun = path.metadata().is_ok_and(|data| data.len() > 0);
        if begun && !resume {
            let reason = "it is there already; --resume continues it, or name another file";
            return Err(PostError::unsuitable(place, reason));
        }
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(path)
            .map_err(PostError::io("open", path))?;
        let mut known = HashMap::new();
        let whole = if begun { read(path, &mut file, &header, &mut known)? } else { 0 };
        // a line that was being written when the process ended; the append that follows begins where it began
        file.set_len(whole).map_err(PostError::io("truncate", path))?;
        let mut log = Self { path: path.to_owned(), file, known };
        if whole == 0 {
            log.line(&header)?;
        }
        Ok(log)
    }

    /// The answer to a task, if it is here; `prompt` names the tokens that it must have been given.
    pub(crate) fn get(&self, task: &str, sample: usize, prompt: &str) -> Option<&Answer> {
        let answer = self.known.get(&(task.to_owned(), sample))?;
        // a verifier may have been mended since
        (answer.prompt == prompt && !matches!(answer.grade, Grade::Error(_))).then_some(answer)
    }

    /// Answers that were in it when it was opened.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether it began empty.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    pub(crate) fn append(&mut self, answer: &Answer) -> Result<()> {
        self.line(answer)
    }

    /// Writes a line at once and as a whole.
    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(value).expect("names are strings and no map has other keys");
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(PostError::io("write", &self.path))
    }
}

/// Reads a log; gives the bytes of its whole lines.
fn read(
    path: &Path,
    file: &mut File,
    header: &Header,
    known: &mut HashMap<(String, usize), Answer>,
) -> Result<u64> {
    let place = |line: usize| format!("{}: line {line}", path.display());
    let mut reader = BufReader::new(file);
    let mut whole = 0;
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let count = reader
            .by_ref()
            .take(MOST_LINE_BYTES)
            .read_until(b'\n', &mut bytes)
            .map_err(PostError::io("read", path))?;
        if count == 0 || (bytes.last() != Some(&b'\n') && (count as u64) < MOST_LINE_BYTES) {
            break;
        }
        if bytes.last() != Some(&b'\n') {
            return Err(PostError::unsuitable(place(line), format!("longer than {MOST_LINE_BYTES} bytes")));
        }
        if line == 1 {
            let found: Header = serde_json::from_slice(&bytes)
                .map_err(|_| PostError::unsuitable(place(1), "not the beginning of a file of answers"))?;
            if let Some(difference) = header.difference(&found) {
                let reason = format!("its answers are of {difference}; name another file");
                return Err(PostError::unsuitable(path.display().to_string(), reason));
            }
        } else {
            let answer: Answer = serde_json::from_slice(&bytes)
                .map_err(|error| PostError::unsuitable(place(line), format!("no answer: {error}")))?;
            known.insert((answer.task.clone(), answer.sample), answer);
        }
        whole += count as u64;
    }
    Ok(whole)
}
