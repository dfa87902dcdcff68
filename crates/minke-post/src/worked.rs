//! Worked problems as text to learn from: what small models are pretrained on, and what a cold start is made of.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;

use minke_gym::answer::Parts;
use minke_gym::{Care, Draw, Family, Split, Suite, problem, tasks};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{PostError, Result};

/// What begins the completion of a [`Format::Text`] without a thought, up to its answer.
pub(crate) const EMPTY_THOUGHT: &str = "T:\nA:";

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `{"prompt": "Q: ...\n", "completion": "T: ...\nA: ...\n"}`, for pretraining; the prompt is what an
    /// examination in the form [`crate::eval::Form::Worked`] gives, and only what follows it is learned.
    Text,
    /// `{"messages": [...]}` with the thought in `reasoning_content`, for SFT.
    Chat,
    /// `{"prompt", "answer", "level", "verifier"}`, for RL and evaluation.
    Task,
}

/// How often each degree of care comes up: weights, of which only the proportions count.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mix {
    /// Weight of [`Care::Full`].
    pub full: f64,
    /// Weight of [`Care::Brief`].
    pub brief: f64,
    /// Weight of [`Care::None`].
    pub none: f64,
}

impl Default for Mix {
    /// Nothing.
    fn default() -> Self {
        Self { full: 0.0, brief: 0.0, none: 0.0 }
    }
}

impl Mix {
    /// Only one degree of care.
    pub fn only(care: Care) -> Self {
        let weight = |other| f64::from(u8::from(care == other));
        Self { full: weight(Care::Full), brief: weight(Care::Brief), none: weight(Care::None) }
    }

    /// As much of each, but careful ones are rare: careful thinking is what RL is to find.
    pub fn mostly_careless() -> Self {
        Self { full: 0.1, brief: 0.45, none: 0.45 }
    }

    /// Reads `full`, `brief`, `none`, `mix`, or weights such as `full=1,none=3`.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "full" => return Ok(Self::only(Care::Full)),
            "brief" => return Ok(Self::only(Care::Brief)),
            "none" => return Ok(Self::only(Care::None)),
            "mix" => return Ok(Self::mostly_careless()),
            _ => {}
        }
        let fail =
            || format!("expected full, brief, none, mix, or weights such as full=1,none=3, got {text:?}");
        let mut mix = Self::default();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').ok_or_else(fail)?;
            let weight: f64 = weight.trim().parse().map_err(|_| fail())?;
            match name.trim() {
                "full" => mix.full = weight,
                "brief" => mix.brief = weight,
                "none" => mix.none = weight,
                _ => return Err(fail()),
            }
        }
        mix.check().map_err(|_| fail())?;
        Ok(mix)
    }

    /// Checks the weights.
    ///
    /// # Errors
    /// One is negative or no number, or all are 0.
    pub fn check(&self) -> Result<(), String> {
        let weights = [self.full, self.brief, self.none];
        if weights.iter().all(|w| (0.0..=1e9).contains(w)) && weights.iter().sum::<f64>() > 0.0 {
            Ok(())
        } else {
            Err("expected weights of 0 or more, not all 0".to_owned())
        }
    }

    fn draw(&self, draw: &mut Draw) -> Care {
        let all = self.full + self.brief + self.none;
        if draw.chance(self.full / all) {
            Care::Full
        } else if draw.chance(self.brief / (self.brief + self.none)) {
            Care::Brief
        } else {
            Care::None
        }
    }
}

/// Which problems, and how they are worked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Families and levels, of which all come up equally often; its files have no part in this.
    pub suite: Suite,
    /// How many problems.
    pub count: u64,
    /// With how much care.
    pub mix: Mix,
    /// From which half of all problems.
    pub split: Split,
    /// Names the random numbers.
    pub seed: u64,
    /// How lines are written.
    pub format: Format,
}

/// One worked problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Worked {
    /// Who made it.
    pub family: &'static str,
    /// Its level.
    pub level: u32,
    /// The question.
    pub prompt: String,
    /// What is thought; empty where nothing is.
    pub thought: String,
    /// What is answered.
    pub answer: String,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Written {
    /// Lines.
    pub lines: u64,
    /// Bytes.
    pub bytes: u64,
    /// Problems of families that have no thoughts to show: these have only the answer, whatever care was asked for.
    pub without_thought: u64,
}

/// `Q: prompt` and what ends it.
pub(crate) fn question(prompt: &str) -> String {
    format!("Q: {prompt}\n")
}

impl Worked {
    /// As text: `Q: prompt`, `T: thought` and `A: answer`, each from the beginning of a line.
    pub fn text(&self) -> String {
        question(&self.prompt) + &self.completion()
    }

    /// The text behind the question.
    pub fn completion(&self) -> String {
        let space = if self.thought.is_empty() { "" } else { " " };
        format!("T:{space}{}\nA: {}\n", self.thought, self.answer)
    }
}

/// Takes text of the form of [`Worked::text`] apart, from after the question on.
pub(crate) fn split(text: &str) -> Parts<'_> {
    let thought_and_rest = text.trim_start().strip_prefix("T:");
    let body = thought_and_rest.unwrap_or(text.trim_start());
    let begin = if body.starts_with("A:") { Some(0) } else { body.find("\nA:").map(|at| at + 1) };
    let thought = &body[..begin.unwrap_or(body.len())];
    let answer = begin.and_then(|at| body[at + 2..].lines().next()).map(str::trim).filter(|a| !a.is_empty());
    Parts { thought: thought_and_rest.map(|_| thought.trim()), answer }
}

/// The cells of a suite: every family at every level.
fn cells(suite: &Suite) -> Vec<(&'static dyn Family, u32)> {
    suite.families().flat_map(|(family, levels)| levels.map(move |level| (family, level))).collect()
}

/// Worked problem number `number`; whether its family showed the care that was drawn.
fn worked(settings: &Settings, cells: &[(&'static dyn Family, u32)], number: u64) -> (Worked, bool) {
    let (family, level) = cells[(number % cells.len() as u64) as usize];
    let one = problem(family, level, settings.split, settings.seed, number / cells.len() as u64);
    // a stream beside that of the problems
    let mut draw = Draw::new(settings.seed ^ 0x005e_ed0f_ca4e, number);
    let care = settings.mix.draw(&mut draw);
    let work = family.work(&one.key, care, &mut draw);
    let shown = care == Care::None || work.is_some();
    let (thought, answer) = match work {
        Some(work) => (work.thought, work.answer),
        None => (String::new(), family.answer(&one.key)),
    };
    (Worked { family: family.name(), level, prompt: one.prompt, thought, answer }, shown)
}

/// The worked problems of `settings`, in order: each is a function of the settings and its number.
///
/// # Errors
/// A suite without families, or weights that are none.
pub fn problems(settings: &Settings) -> Result<impl Iterator<Item = Worked>> {
    let cells = checked(settings)?;
    Ok((0..settings.count).map(move |number| worked(settings, &cells, number).0))
}

fn checked(settings: &Settings) -> Result<Vec<(&'static dyn Family, u32)>> {
    settings.mix.check().map_err(|reason| PostError::unsuitable("care", reason))?;
    let cells = cells(&settings.suite);
    if cells.is_empty() {
        return Err(PostError::unsuitable(
            "suite",
            "there are no families in it, and only these can be worked",
        ));
    }
    Ok(cells)
}

/// One line of a file, without what ends it.
fn line(settings: &Settings, cells: &[(&'static dyn Family, u32)], number: u64) -> (String, bool) {
    if settings.format == Format::Task {
        let (family, level) = cells[(number % cells.len() as u64) as usize];
        let index = number / cells.len() as u64;
        let value = tasks::line_of(family.name(), level, settings.split, settings.seed, index);
        return (value.expect("a suite has families and levels that exist").to_string(), true);
    }
    let (one, shown) = worked(settings, cells, number);
    let value = match settings.format {
        Format::Text => json!({ "prompt": question(&one.prompt), "completion": one.completion() }),
        Format::Chat | Format::Task => json!({ "messages": [
            { "role": "user", "content": one.prompt },
            { "role": "assistant", "reasoning_content": one.thought, "content": one.answer },
        ]}),
    };
    (value.to_string(), shown)
}

/// Writes worked problems, or tasks, one a line; the file is there only when it is whole. `on_progress` gets lines
/// done and all lines, and may end it: then there is no file.
///
/// # Errors
/// A suite without families, weights that are none, or a file that cannot be written.
pub fn write(
    settings: &Settings,
    path: &Path,
    on_progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Option<Written>> {
    let cells = checked(settings)?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(PostError::io("create", folder))?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let mut out = BufWriter::new(File::create(&part).map_err(PostError::io("create", &part))?);
    let mut written = Written::default();
    for number in 0..settings.count {
        if number % 1024 == 0 && on_progress(number, settings.count).is_break() {
            drop(out);
            // nothing is lost with it
            let _ = fs::remove_file(&part);
            return Ok(None);
        }
        let (mut text, shown) = line(settings, &cells, number);
        text.push('\n');
        out.write_all(text.as_bytes()).map_err(PostError::io("write", &part))?;
        written.lines += 1;
        written.bytes += text.len() as u64;
        written.without_thought += u64::from(!shown);
    }
    let file = out.into_inner().map_err(|error| PostError::io("write", &part)(error.into_error()))?;
    file.sync_all().map_err(PostError::io("write", &part))?;
    fs::rename(&part, path).map_err(PostError::io("write", path))?;
    let _ = on_progress(settings.count, settings.count);
    Ok(Some(written))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(suite: &str, care: &str, format: Format) -> Settings {
        Settings {
            suite: Suite::parse(suite).unwrap(),
            count: 60,
            mix: Mix::parse(care).unwrap(),
            split: Split::Train,
            seed: 3,
            format,
        }
    }

    fn lines(settings: &Settings) -> Vec<serde_json::Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/out.jsonl");
        let written = write(settings, &path, &mut |_, _| ControlFlow::Continue(())).unwrap().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!((written.lines, written.bytes), (settings.count, text.len() as u64));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn text_can_be_taken_apart_again() {
        for care in ["full", "brief", "none"] {
            let settings = settings("chain:1-3", care, Format::Text);
            for (one, line) in problems(&settings).unwrap().zip(lines(&settings)) {
                assert_eq!(line["prompt"], question(&one.prompt));
                let rest = line["completion"].as_str().unwrap();
                assert_eq!(question(&one.prompt) + rest, one.text());
                assert_eq!(split(rest), Parts { thought: Some(&one.thought), answer: Some(&one.answer) });
                assert_eq!(one.thought.is_empty(), care == "none", "{one:?}");
                assert_eq!(rest.starts_with(EMPTY_THOUGHT), care == "none");
            }
        }
        assert_eq!(split(" T: 1\n2"), Parts { thought: Some("1\n2"), answer: None });
        assert_eq!(split("A: 2\nQ: x"), Parts { thought: None, answer: Some("2") });
        assert_eq!(split("T:\nA:\n"), Parts { thought: Some(""), answer: None });
    }

    #[test]
    fn a_mix_is_one() {
        let one = settings("chain:1-4", "full=1,brief=1,none=2", Format::Chat);
        let all: Vec<Worked> = problems(&Settings { count: 400, ..one.clone() }).unwrap().collect();
        let empty = all.iter().filter(|one| one.thought.is_empty()).count();
        assert!((150..250).contains(&empty), "{empty}");
        assert_eq!(all[..60], problems(&one).unwrap().collect::<Vec<_>>(), "the count does not show");
        let message = &lines(&one)[0]["messages"][1];
        assert_eq!(message["reasoning_content"], all[0].thought);
        assert_eq!(message["content"], all[0].answer);
        for wrong in ["", "all", "full=x", "full=-1", "full=0", "full=inf", "half=1", "full=nan"] {
            assert!(Mix::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn tasks_read_back_and_can_be_answered() {
        let settings = settings("chain:1-3", "none", Format::Task);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks.jsonl");
        write(&settings, &path, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let suite = Suite::parse(path.to_str().unwrap()).unwrap();
        let tasks = suite.tasks(Split::Train, 0, 0).unwrap();
        assert_eq!(tasks.len(), 60);
        for (task, one) in tasks.iter().zip(problems(&settings).unwrap()) {
            assert_eq!(task.prompt, one.prompt);
            assert_eq!(task.verify(&one.answer), minke_gym::Verdict::Right);
        }
    }

    #[test]
    fn what_is_stopped_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let stopped =
            write(&settings("chain", "full", Format::Text), &path, &mut |_, _| ControlFlow::Break(()));
        assert_eq!(stopped.unwrap(), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let text =
            Settings { suite: Suite::parse("a.txt").unwrap(), ..settings("chain", "full", Format::Text) };
        assert!(problems(&text).is_err());
    }
}
