//! Tasks of a user: one JSON object a line.
//!
//! ```text
//! {"prompt": "1/2 + 1/4 = ?", "answer": "3/4"}
//! {"prompt": "How far?", "answer": "5 km", "verifier": {"name": "number", "units": ["km"], "tolerance": 0.1}, "level": 2}
//! {"prompt": "Sort a file.", "verifier": "program", "command": ["./check.sh", "{prompt}"], "timeout_s": 5}
//! ```
//!
//! `verifier` is a name, whose options then stand beside it, or an object with the name and its options. Without one,
//! numbers are compared as numbers and all else as texts. Other keys are the user's own, unless they look like an
//! option mistyped.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::suite::{Check, Task};
use crate::verifier::{self, Asked, OptionError, Verifier};
use crate::{Split, family, problem};

/// How much is read.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a line.
    pub line_bytes: usize,
    /// Malformed lines that are left out and told about; one more, and the file is refused.
    pub bad_lines: usize,
    /// Tasks of a file.
    pub tasks: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { line_bytes: 1 << 20, bad_lines: 10, tasks: 1_000_000 }
    }
}

/// A file of tasks, read.
#[derive(Debug, Clone, Default)]
pub struct TaskFile {
    /// The tasks of the well-formed lines.
    pub tasks: Vec<Task>,
    /// The others.
    pub bad: Vec<BadLine>,
}

/// A line that is no task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLine {
    /// Its number, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// Why a file of tasks cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TaskFileError {
    /// The system cannot open or read it.
    #[error("{}: cannot read it: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Too many lines are malformed.
    #[error("{}: {} malformed lines, more than the {limit} that are left out\n{}", path.display(), bad.len(), shown(bad))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: usize,
        /// The first lines that are.
        bad: Vec<BadLine>,
    },
    /// There is no task in it.
    #[error("{}: no tasks in it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// There are too many tasks in it.
    #[error("{}: more than {limit} tasks", path.display())]
    TooMany {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
}

fn shown(bad: &[BadLine]) -> String {
    let lines: Vec<String> = bad.iter().map(|one| format!("  line {}: {}", one.line, one.reason)).collect();
    lines.join("\n")
}

impl TaskFile {
    /// What a user should know: lines left out, and programs that will be run.
    pub fn notes(&self, path: &Path) -> Vec<String> {
        let mut notes: Vec<String> = self
            .bad
            .iter()
            .map(|bad| format!("{}: line {} is left out: {}", path.display(), bad.line, bad.reason))
            .collect();
        let mut programs: HashMap<&Path, usize> = HashMap::new();
        for program in self.tasks.iter().filter_map(Task::program) {
            *programs.entry(program).or_default() += 1;
        }
        let mut programs: Vec<_> = programs.into_iter().collect();
        programs.sort_unstable();
        notes.extend(programs.into_iter().map(|(program, count)| {
            format!(
                "{}: answers to {count} tasks are checked by running {}",
                path.display(),
                program.display()
            )
        }));
        notes
    }
}

/// Reads a file of tasks.
///
/// # Errors
/// It cannot be read, has too many malformed lines or tasks, or none.
pub fn read(path: &Path, limits: &Limits) -> Result<TaskFile, TaskFileError> {
    let io = |source| TaskFileError::Io { path: path.to_owned(), source };
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let name =
        path.file_stem().map_or_else(|| "tasks".to_owned(), |stem| stem.to_string_lossy().into_owned());
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut file = TaskFile::default();
    let mut ids = HashSet::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let most = limits.line_bytes as u64 + 1;
        if reader.by_ref().take(most).read_until(b'\n', &mut bytes).map_err(io)? == 0 {
            break;
        }
        let result = if bytes.len() > limits.line_bytes && bytes.last() != Some(&b'\n') {
            skip_line(&mut reader).map_err(io)?;
            Err(OptionError::new(format!("longer than {} bytes", limits.line_bytes)))
        } else {
            let text = bytes.strip_prefix(b"\xef\xbb\xbf").filter(|_| line == 1).unwrap_or(&bytes);
            if text.trim_ascii().is_empty() {
                continue;
            }
            task(text, &name, folder, line)
        };
        let result = result.and_then(|task| {
            if ids.insert(task.id.clone()) {
                Ok(task)
            } else {
                Err(OptionError::new(format!("`id`: {:?} is there already", task.id)))
            }
        });
        match result {
            Ok(_) if file.tasks.len() == limits.tasks => {
                return Err(TaskFileError::TooMany { path: path.to_owned(), limit: limits.tasks });
            }
            Ok(task) => file.tasks.push(task),
            Err(error) => file.bad.push(BadLine { line, reason: error.to_string() }),
        }
        if file.bad.len() > limits.bad_lines {
            let (path, limit) = (path.to_owned(), limits.bad_lines);
            return Err(TaskFileError::Malformed { path, limit, bad: file.bad });
        }
    }
    if file.tasks.is_empty() {
        let (path, limit, bad) = (path.to_owned(), 0, file.bad);
        return Err(if bad.is_empty() {
            TaskFileError::Empty { path }
        } else {
            TaskFileError::Malformed { path, limit, bad }
        });
    }
    Ok(file)
}

/// Goes to the beginning of the next line without keeping this one.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        let (used, end) = match buffer.iter().position(|&b| b == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        reader.consume(used);
        if end {
            return Ok(());
        }
    }
}

/// Reads one line.
fn task(bytes: &[u8], file: &str, folder: &Path, line: usize) -> Result<Task, OptionError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| OptionError::new(format!("not UTF-8 at byte {}", error.valid_up_to())))?;
    let value: Value =
        serde_json::from_str(text).map_err(|error| OptionError::new(format!("no JSON: {error}")))?;
    let Value::Object(mut map) = value else {
        return Err(OptionError::expected("line", "a JSON object", &value));
    };
    let mut text = |name: &str| match map.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(OptionError::expected(name, "text", &other)),
    };
    let prompt = text("prompt")?.ok_or_else(|| OptionError::new("`prompt` is missing"))?;
    if prompt.trim().is_empty() {
        return Err(OptionError::new("`prompt` is empty"));
    }
    let id = text("id")?.unwrap_or_else(|| format!("{line}"));
    let level = match map.remove("level") {
        None | Some(Value::Null) => 1,
        Some(value) => value
            .as_u64()
            .and_then(|level| u32::try_from(level).ok())
            .ok_or_else(|| OptionError::expected("level", "a whole number", &value))?,
    };
    let answer = map.remove("answer");
    let (verifier, options) = match map.remove("verifier") {
        None | Some(Value::Null) => (None, Map::new()),
        Some(Value::String(name)) => {
            let options = beside(&name, &mut map)?;
            (Some(name), options)
        }
        Some(Value::Object(mut options)) => match options.remove("name") {
            Some(Value::String(name)) => (Some(name), options),
            _ => return Err(OptionError::new("`verifier`: expected its `name` in the object")),
        },
        Some(other) => return Err(OptionError::expected("verifier", "a name or an object", &other)),
    };
    let check = if verifier.as_deref() == Some("gym") {
        gym(options, &prompt)?
    } else {
        let asked = Asked { name: verifier.as_deref(), options, answer: answer.as_ref(), folder };
        Check::Verifier(Arc::new(Verifier::read(asked)?))
    };
    Ok(Task { name: file.to_owned(), level, id: format!("{file}/{id}"), prompt, check })
}

/// The options of a verifier among the keys of its line.
fn beside(verifier: &str, map: &mut Map<String, Value>) -> Result<Map<String, Value>, OptionError> {
    let Some(names) = verifier::option_names(verifier) else {
        return Err(OptionError::unknown("verifier", verifier, &verifier::NAMES));
    };
    let options = names.iter().filter_map(|name| Some(((*name).to_owned(), map.remove(*name)?))).collect();
    for key in map.keys() {
        if let Some(name) = names.iter().find(|name| distance(key, name) <= 2) {
            return Err(OptionError::new(format!("unknown option `{key}` of `{verifier}`; is it `{name}`?")));
        }
    }
    Ok(options)
}

/// Edits that make one short name of another (Levenshtein); long ones are far from all.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 32 {
        return a.len();
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let cost = (corner + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = row[j + 1];
            row[j + 1] = cost;
        }
    }
    row[b.len()]
}

/// A problem of this crate by its number: the key itself is never taken from a file.
fn gym(mut options: Map<String, Value>, prompt: &str) -> Result<Check, OptionError> {
    let mut take =
        |name: &str| options.remove(name).ok_or_else(|| OptionError::new(format!("`gym` needs `{name}`")));
    let number = |name: &str, value: &Value| {
        value.as_u64().ok_or_else(|| OptionError::expected(name, "a whole number", value))
    };
    let name = take("family")?;
    let found = name.as_str().and_then(family);
    let names: Vec<&str> = crate::families().iter().map(|family| family.name()).collect();
    let family = found.ok_or_else(|| OptionError::unknown("family", &name.to_string(), &names))?;
    let level = number("level", &take("level")?)?;
    let level =
        u32::try_from(level).ok().filter(|level| (1..=family.levels()).contains(level)).ok_or_else(|| {
            OptionError::new(format!(
                "`level`: expected 1 to {} for {}, got {level}",
                family.levels(),
                family.name()
            ))
        })?;
    let split = match take("split")?.as_str() {
        Some("train") => Split::Train,
        Some("held-out") => Split::HeldOut,
        _ => return Err(OptionError::new("`split`: expected train or held-out")),
    };
    let (seed, index) = (number("seed", &take("seed")?)?, number("index", &take("index")?)?);
    let problem = problem(family, level, split, seed, index);
    if problem.prompt != prompt {
        return Err(OptionError::new(format!(
            "`prompt`: not that of this problem of {}; the line was changed, or made by another version",
            family.name()
        )));
    }
    if let Some(name) = options.keys().next() {
        let known = verifier::option_names("gym").expect("it is one of the names");
        return Err(OptionError::unknown("option of `gym`", name, known));
    }
    Ok(Check::Family { family, key: problem.key })
}

/// A problem of a family as a line of a task file, which reads back as the same task.
pub fn line_of(family: &str, level: u32, split: Split, seed: u64, index: u64) -> Option<Value> {
    let found = crate::family(family).filter(|family| (1..=family.levels()).contains(&level))?;
    let problem = problem(found, level, split, seed, index);
    let split = match split {
        Split::Train => "train",
        Split::HeldOut => "held-out",
    };
    Some(serde_json::json!({
        "id": format!("{family}-{level}-{seed}-{index}"),
        "prompt": problem.prompt,
        "answer": found.answer(&problem.key),
        "level": level,
        "verifier": {
            "name": "gym", "family": family, "level": level, "split": split, "seed": seed, "index": index,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Verdict;

    fn file(text: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.jsonl");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn lines_are_tasks() {
        let (_folder, path) = file(concat!(
            "\u{feff}{\"prompt\": \"1/2 + 1/4?\", \"answer\": \"3/4\", \"source\": \"mine\"}\n\n",
            "{\"prompt\": \"how far?\", \"answer\": 5, \"level\": 3, \"id\": \"far\", ",
            "\"verifier\": \"number\", \"tolerance\": 0.5}\n",
            "{\"prompt\": \"capital?\", \"answer\": \"Paris\", ",
            "\"verifier\": {\"name\": \"exact\", \"ignore_case\": true}}\n",
            "{\"prompt\": \"capital?\", \"answer\": [\"Rome\", \"Roma\"]}",
        ));
        let read = read(&path, &Limits::default()).unwrap();
        assert_eq!(read.bad, []);
        let said: Vec<(&str, u32, &str)> =
            read.tasks.iter().map(|task| (task.name.as_str(), task.level, task.id.as_str())).collect();
        assert_eq!(
            said,
            [("mine", 1, "mine/1"), ("mine", 3, "mine/far"), ("mine", 1, "mine/4"), ("mine", 1, "mine/5")]
        );
        for (task, right, wrong) in
            [(0, "0.75", "0.7"), (1, "5.5", "5.51"), (2, "paris", "Pari"), (3, "Roma", "roma")]
        {
            assert_eq!(read.tasks[task].verify(right), Verdict::Right, "{right}");
            assert_eq!(read.tasks[task].verify(wrong), Verdict::Wrong, "{wrong}");
        }
        assert!(read.notes(&path).is_empty());
    }

    #[test]
    fn malformed_lines_are_told_by_number_until_there_are_too_many() {
        let good = "{\"prompt\": \"a\", \"answer\": \"b\", \"id\": \"x\"}\n";
        let bad = [
            "{\"prompt\": \"a\"",
            "[1]",
            "{\"answer\": \"b\"}",
            "{\"prompt\": 5, \"answer\": \"b\"}",
            "{\"prompt\": \" \", \"answer\": \"b\"}",
            "{\"prompt\": \"a\"}",
            "{\"prompt\": \"a\", \"answer\": \"b\", \"level\": -1}",
            "{\"prompt\": \"a\", \"answer\": \"b\", \"verifier\": \"exakt\"}",
            "{\"prompt\": \"a\", \"answer\": \"1\", \"verifier\": \"number\", \"tolerence\": 1}",
            "{\"prompt\": \"a\", \"answer\": \"1\", \"verifier\": {\"name\": \"number\", \"x\": 1}}",
            "{\"prompt\": \"a\", \"answer\": \"x\", \"verifier\": \"number\"}",
            "{\"prompt\": \"a\", \"answer\": \"b\", \"id\": \"x\"}",
        ];
        let (_folder, path) = file(format!("{good}{}\n", bad.join("\n")));
        let told = read(&path, &Limits { bad_lines: 12, ..Limits::default() }).unwrap();
        assert_eq!(told.tasks.len(), 1);
        assert_eq!(told.bad.iter().map(|bad| bad.line).collect::<Vec<_>>(), (2..=13).collect::<Vec<_>>());
        let expected = [
            "no JSON: EOF",
            "`line`: expected a JSON object, got [1]",
            "`prompt` is missing",
            "`prompt`: expected text, got 5",
            "`prompt` is empty",
            "`exact` needs an `answer`",
            "`level`: expected a whole number, got -1",
            "unknown verifier `exakt`; there are exact, number, choice, regex, json, program, gym",
            "unknown option `tolerence` of `number`; is it `tolerance`?",
            "unknown option of `number` `x`; there are tolerance, relative, units",
            "`answer`: expected a number, got \"x\"",
            "`id`: \"mine/x\" is there already",
        ];
        for (bad, expected) in told.bad.iter().zip(expected) {
            assert!(bad.reason.starts_with(expected), "{bad:?}: {expected}");
        }
        assert_eq!(told.notes(&path).len(), 12);
        let refused = read(&path, &Limits { bad_lines: 2, ..Limits::default() }).unwrap_err().to_string();
        assert!(refused.contains("3 malformed lines") && refused.contains("\n  line 4: "), "{refused}");
    }

    #[test]
    fn lines_and_files_have_bounds() {
        let long = format!("{{\"prompt\": \"{}\", \"answer\": \"b\"}}\n", "a".repeat(100_000));
        let good = "{\"prompt\": \"a\", \"answer\": \"b\"}\n";
        let limits = Limits { line_bytes: 1000, bad_lines: 3, tasks: 2 };
        let (_folder, path) = file(format!("{long}{good}{long}{good}"));
        let told = read(&path, &limits).unwrap();
        assert_eq!(told.tasks.len(), 2);
        assert_eq!(told.bad.iter().map(|bad| bad.line).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(told.bad[0].reason, "longer than 1000 bytes");
        let (_folder, path) = file(good.repeat(3));
        assert!(matches!(read(&path, &limits), Err(TaskFileError::TooMany { limit: 2, .. })));
        let (_folder, path) = file("\n\n");
        assert!(matches!(read(&path, &limits), Err(TaskFileError::Empty { .. })));
        let (_folder, path) = file(b"\xff\n{\"prompt\": \"a\", \"answer\": \"b\"}");
        assert_eq!(read(&path, &limits).unwrap().bad[0].reason, "not UTF-8 at byte 0");
        let (_folder, path) = file(format!("{}\n{good}", "[".repeat(900)));
        assert!(read(&path, &limits).unwrap().bad[0].reason.starts_with("no JSON: recursion limit"));
        assert!(matches!(read(Path::new("/nonexistent/x.jsonl"), &limits), Err(TaskFileError::Io { .. })));
    }

    #[test]
    fn problems_of_the_gym_read_back_as_themselves() {
        let lines: String = (0..5)
            .map(|index| line_of("chain", 2, Split::HeldOut, 7, index).unwrap().to_string() + "\n")
            .collect();
        let (_folder, path) = file(&lines);
        let tasks = read(&path, &Limits::default()).unwrap().tasks;
        assert_eq!(tasks.len(), 5);
        for task in &tasks {
            assert_eq!(task.verify(&task.reference().unwrap()), Verdict::Right);
        }
        assert!(
            line_of("chain", 99, Split::Train, 0, 0).is_none()
                && line_of("?", 1, Split::Train, 0, 0).is_none()
        );
        let changed = [
            lines.replace("\"index\":", "\"index\":1"),
            lines.replace("\"chain\"", "\"chains\""),
            lines.replace("\"level\":2,\"split\"", "\"level\":0,\"split\""),
            lines.replace("held-out", "test"),
            lines.replace("\"seed\":7", "\"seed\":7,\"key\":\"x\""),
        ];
        for changed in changed {
            assert_ne!(changed, lines);
            let (_folder, path) = file(changed);
            assert!(matches!(read(&path, &Limits::default()), Err(TaskFileError::Malformed { .. })));
        }
    }
}
