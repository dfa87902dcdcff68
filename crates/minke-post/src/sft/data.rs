//! Examples: lines of JSON to tokens, and which of them are to be learned.
//!
//! A line holds `messages`, or `prompt` (text or messages) with `completion` or `answer` and perhaps a `thought` (or
//! `reasoning_content`). Lines that cannot be used are counted and named, and beyond a limit nothing is trained.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use minke_data::split::{KeyRange, Side, Split};
use minke_data::template::{ChatTemplate, Encoded, Message, RenderOptions, Role};
use minke_data::{Error, Tokenizer};
use serde::Serialize;
use serde_json::Value;

use crate::error::{PostError, Result};

/// A longer line is no example.
const MAX_LINE_BYTES: u64 = 16 << 20;
/// Lines, and bytes of them, that are encoded together.
const LINES_AT_ONCE: usize = 4096;
const BYTES_AT_ONCE: usize = 64 << 20;
/// Tokens are kept in memory, five bytes each.
const MAX_TOKENS: u64 = 1 << 30;
/// Bad lines that a message names.
const NAMED: usize = 5;

/// What becomes of samples that are longer than a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// The run refuses, naming the line.
    Refuse,
    /// They are left out, and counted.
    Drop,
    /// Their ends are cut off, and they are counted.
    Cut,
}

impl Overlong {
    /// Names that recipes use.
    pub const CHOICES: [(&'static str, Self); 3] =
        [("refuse", Self::Refuse), ("drop", Self::Drop), ("cut", Self::Cut)];
}

/// How examples are read.
#[derive(Debug, Clone, Copy)]
pub struct ReadSettings<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// How messages become tokens.
    pub template: &'a ChatTemplate,
    /// Most tokens of a sample.
    pub sequence_length: usize,
    /// Rows of the model's table; no id may lie outside.
    pub vocabulary: usize,
    /// What becomes of longer ones.
    pub overlong: Overlong,
    /// Lines that may be unusable.
    pub max_bad_lines: u64,
    /// Threads that encode; the result does not depend on it.
    pub threads: usize,
}

/// One example as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Whether a token is to be learned.
    pub mask: Vec<bool>,
}

/// What was found in the files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines that are not empty.
    pub lines: u64,
    /// Of these, unusable.
    pub bad: u64,
    /// Too long, left out.
    pub dropped: u64,
    /// Too long, cut.
    pub cut: u64,
    /// Without a token to learn, left out.
    pub unmarked: u64,
    /// Turns of the assistant that are not learned, since the template tells them otherwise than they were written.
    pub untold: u64,
    /// Tokens of all samples.
    pub tokens: u64,
    /// Tokens to learn.
    pub marked: u64,
}

impl Counts {
    /// Sentences about what was left out.
    pub fn warnings(&self) -> Vec<String> {
        let Self { lines, bad, dropped, cut, unmarked, untold, .. } = *self;
        let told = [
            (bad, format!("{bad} of {lines} lines cannot be used and are left out")),
            (
                dropped,
                format!(
                    "{dropped} of {lines} samples are longer than train.sequence_length and are left out"
                ),
            ),
            (cut, format!("{cut} of {lines} samples are longer than train.sequence_length and are cut")),
            (unmarked, format!("{unmarked} of {lines} samples hold no token to learn and are left out")),
            (
                untold,
                format!(
                    "{untold} earlier answers are told by the template otherwise than they were written and are not learned"
                ),
            ),
        ];
        told.into_iter().filter(|(count, _)| *count > 0).map(|(_, text)| text).collect()
    }
}

/// All examples.
#[derive(Debug, Clone, Default)]
pub struct Examples {
    /// Those that can be learned from, in the order of the files.
    pub samples: Vec<Sample>,
    /// What was found.
    pub counts: Counts,
    /// blake3 of tokens and masks.
    pub fingerprint: String,
}

/// Reads and encodes files; `progress` hears of bytes done and bytes in all.
///
/// # Errors
/// A file that cannot be read, too many unusable lines, a sample that is too long where that is refused, no sample at
/// all, or more than fit into memory.
pub fn read(
    paths: &[PathBuf],
    settings: &ReadSettings<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Examples> {
    let mut total = 0;
    for path in paths {
        total += std::fs::metadata(path).map_err(PostError::io("read", path))?.len();
    }
    let mut gathering =
        Gathering { settings, out: Examples::default(), bad: Vec::new(), hasher: blake3::Hasher::new() };
    let mut done = 0;
    for path in paths {
        let mut lines = Lines::open(path)?;
        loop {
            let chunk = lines.chunk()?;
            if chunk.is_empty() {
                break;
            }
            let encoded = encode_all(&chunk, settings);
            for (line, encoded) in chunk.iter().zip(encoded) {
                gathering.add(path, line.number, encoded)?;
            }
            done += chunk.iter().map(|line| line.bytes.len() as u64).sum::<u64>();
            progress(done.min(total), total);
        }
    }
    gathering.finish(paths)
}

impl Examples {
    /// Parts training from held-out samples, by the hash of what comes before the first token to learn: the same
    /// question is never on both sides.
    ///
    /// # Errors
    /// There are not two different questions to part.
    pub fn split(self, share: f64) -> Result<(Vec<Sample>, Vec<Sample>)> {
        let keys: Vec<u64> = self.samples.iter().map(question_key).collect();
        let mut range = KeyRange::default();
        if share > 0.0 {
            for &key in &keys {
                range.add(key);
            }
        }
        let split = Split::new(share, range)?;
        let mut keys = keys.into_iter();
        let (training, held_out) = self
            .samples
            .into_iter()
            .partition(|_| keys.next().is_none_or(|key| share == 0.0 || split.side(key) == Side::Training));
        Ok((training, held_out))
    }
}

fn question_key(sample: &Sample) -> u64 {
    let end = sample.mask.iter().position(|&learned| learned).unwrap_or(sample.ids.len());
    let mut hasher = blake3::Hasher::new();
    for id in &sample.ids[..end] {
        hasher.update(&id.to_le_bytes());
    }
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("32 bytes hold 8"))
}

struct Line {
    number: u64,
    bytes: Vec<u8>,
    too_long: bool,
}

struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: u64,
}

impl Lines {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(PostError::io("open", path))?;
        Ok(Self { path: path.to_owned(), reader: BufReader::with_capacity(1 << 18, file), number: 0 })
    }

    /// The next lines that are not empty; none at the end.
    fn chunk(&mut self) -> Result<Vec<Line>> {
        let io = || PostError::io("read", &self.path);
        let (mut lines, mut held) = (Vec::new(), 0);
        while lines.len() < LINES_AT_ONCE && held < BYTES_AT_ONCE {
            let mut bytes = Vec::new();
            self.reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes).map_err(io())?;
            if bytes.is_empty() {
                break;
            }
            self.number += 1;
            let too_long = bytes.len() as u64 == MAX_LINE_BYTES && bytes.last() != Some(&b'\n');
            if too_long {
                self.reader.skip_until(b'\n').map_err(io())?;
                bytes.clear();
            } else if bytes.trim_ascii().is_empty() {
                continue;
            }
            held += bytes.len();
            lines.push(Line { number: self.number, bytes, too_long });
        }
        Ok(lines)
    }
}

type Outcome = std::result::Result<Encoded, String>;

/// Encodes lines on several threads, in order.
fn encode_all(lines: &[Line], settings: &ReadSettings<'_>) -> Vec<Outcome> {
    let each = lines.len().div_ceil(settings.threads.max(1)).max(16);
    let work = |part: &[Line]| part.iter().map(|line| encode(line, settings)).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        let workers: Vec<_> = lines.chunks(each).map(|part| scope.spawn(move || work(part))).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("encoding does not panic")).collect()
    })
}

fn encode(line: &Line, settings: &ReadSettings<'_>) -> Outcome {
    if line.too_long {
        return Err(format!("longer than {MAX_LINE_BYTES} bytes"));
    }
    let text = std::str::from_utf8(&line.bytes)
        .map_err(|error| format!("not UTF-8 at byte {}", error.valid_up_to()))?;
    let value: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let messages = conversation(&value)?;
    let encoded = settings
        .template
        .encode(settings.tokenizer, &messages, RenderOptions::default())
        .map_err(|error: Error| error.to_string())?;
    match encoded.ids.iter().find(|&&id| id as usize >= settings.vocabulary) {
        Some(id) => Err(format!("token {id} is outside the model's vocabulary of {}", settings.vocabulary)),
        None => Ok(encoded),
    }
}

/// The messages of a line.
///
/// # Errors
/// What is missing or of the wrong type.
pub fn conversation(value: &Value) -> std::result::Result<Vec<Message>, String> {
    let Value::Object(record) = value else { return Err("expected an object".to_owned()) };
    let given = |key: &str| record.get(key).filter(|value| !value.is_null());
    let messages = if let Some(value) = given("messages") {
        messages("messages", value)?
    } else if let Some(prompt) = given("prompt") {
        let mut all = match prompt {
            Value::String(text) => vec![Message::user(text)],
            list => messages("prompt", list)?,
        };
        let Some((key, answer)) =
            ["completion", "answer"].into_iter().find_map(|key| Some((key, given(key)?)))
        else {
            return Err("`prompt` without `completion` or `answer`".to_owned());
        };
        let thought = ["thought", "reasoning_content"].into_iter().find_map(|key| Some((key, given(key)?)));
        let thought = thought
            .map(|(key, value)| value.as_str().ok_or_else(|| format!("`{key}` is not a string")))
            .transpose()?;
        match answer {
            Value::String(text) => all.push(Message::assistant(thought, text.as_str())),
            _ if thought.is_some() => {
                return Err(format!("a thought stands beside `{key}`, which is not a string"));
            }
            list => all.extend(messages(key, list)?),
        }
        all
    } else {
        let keys: Vec<&str> = record.keys().map(String::as_str).take(8).collect();
        let keys =
            if keys.is_empty() { "(none)".to_owned() } else { keys.join(", ").escape_debug().to_string() };
        return Err(format!(
            "expected `messages`, or `prompt` with `completion` or `answer`, got the keys {keys}"
        ));
    };
    if !messages.iter().any(|message| message.role == Role::Assistant) {
        return Err("no message of the assistant, so there is nothing to learn".to_owned());
    }
    Ok(messages)
}

fn messages(key: &str, value: &Value) -> std::result::Result<Vec<Message>, String> {
    let Value::Array(list) = value else { return Err(format!("`{key}` is not a list of messages")) };
    let text = |value: &Value, what: &str| match value {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| part.get("text").and_then(Value::as_str))
            .collect::<Option<String>>()
            .ok_or_else(|| format!("`{what}` holds parts that are no text")),
        _ => Err(format!("`{what}` is neither text nor a list of parts")),
    };
    let message = |(at, message): (usize, &Value)| {
        let place = |what: &str| format!("{key}[{at}].{what}");
        let role =
            message.get("role").and_then(Value::as_str).ok_or_else(|| format!("no `{}`", place("role")))?;
        let role = Role::of(role).ok_or_else(|| {
            let role: String = role.chars().take(40).collect();
            format!("`{}`: expected system, user, assistant or tool, got {role:?}", place("role"))
        })?;
        let content = message.get("content").ok_or_else(|| format!("no `{}`", place("content")))?;
        let thought = match message.get("reasoning_content") {
            None | Some(Value::Null) => None,
            Some(value) => Some(text(value, &place("reasoning_content"))?),
        };
        let content = text(content, &place("content"))?;
        Ok(Message { reasoning_content: thought, ..Message::new(role, content) })
    };
    list.iter().enumerate().map(message).collect()
}

struct Gathering<'a> {
    settings: &'a ReadSettings<'a>,
    out: Examples,
    bad: Vec<String>,
    hasher: blake3::Hasher,
}

impl Gathering<'_> {
    fn add(&mut self, path: &Path, number: u64, encoded: Outcome) -> Result<()> {
        let counts = &mut self.out.counts;
        counts.lines += 1;
        let Encoded { mut ids, mut mask, untold } = match encoded {
            Ok(encoded) => encoded,
            Err(reason) => {
                counts.bad += 1;
                if self.bad.len() < NAMED {
                    self.bad.push(format!("  {}, line {number}: {reason}", path.display()));
                }
                return if counts.bad > self.settings.max_bad_lines { Err(self.refusal()) } else { Ok(()) };
            }
        };
        let most = self.settings.sequence_length;
        if ids.len() > most {
            match self.settings.overlong {
                Overlong::Refuse => {
                    let reason = format!(
                        "the sample has {} tokens, and train.sequence_length is {most}; raise it, or set data.overlong to \"drop\" or \"cut\"",
                        ids.len()
                    );
                    return Err(PostError::unsuitable(format!("{}, line {number}", path.display()), reason));
                }
                Overlong::Drop => {
                    counts.dropped += 1;
                    return Ok(());
                }
                Overlong::Cut => {
                    counts.cut += 1;
                    ids.truncate(most);
                    mask.truncate(most);
                }
            }
        }
        counts.untold += untold as u64;
        // the first token is given to every text, so it cannot be learned
        let marked = mask.iter().skip(1).filter(|&&learned| learned).count();
        if marked == 0 {
            counts.unmarked += 1;
            return Ok(());
        }
        counts.tokens += ids.len() as u64;
        counts.marked += marked as u64;
        if counts.tokens > MAX_TOKENS {
            let reason = format!("more than {MAX_TOKENS} tokens, which are kept in memory; split the files");
            return Err(PostError::unsuitable("data.sources", reason));
        }
        self.hasher.update(&(ids.len() as u64).to_le_bytes());
        for (id, learned) in ids.iter().zip(&mask) {
            self.hasher.update(&id.to_le_bytes());
            self.hasher.update(&[u8::from(*learned)]);
        }
        self.out.samples.push(Sample { ids, mask });
        Ok(())
    }

    fn refusal(&self) -> PostError {
        let Counts { bad, lines, .. } = self.out.counts;
        let more = if bad as usize > self.bad.len() { "\n  ..." } else { "" };
        PostError::unsuitable(
            "data.sources",
            format!(
                "{bad} of the first {lines} lines cannot be used, and data.max_bad_lines is {}:\n{}{more}",
                self.settings.max_bad_lines,
                self.bad.join("\n")
            ),
        )
    }

    fn finish(mut self, paths: &[PathBuf]) -> Result<Examples> {
        if self.out.samples.is_empty() {
            let names: Vec<String> =
                paths.iter().take(NAMED).map(|path| path.display().to_string()).collect();
            let warnings = self.out.counts.warnings().join("; ");
            let reason = if warnings.is_empty() {
                "no examples".to_owned()
            } else {
                format!("no examples: {warnings}")
            };
            return Err(PostError::unsuitable(names.join(", "), reason));
        }
        self.out.fingerprint = self.hasher.finalize().to_hex().to_string();
        Ok(self.out)
    }
}
