//! Tasks, and suites of them by name.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::tasks::{self, TaskFileError};
use crate::verifier::Verifier;
use crate::{Family, Problem, Split, families, family, number, problem};

/// A question whose answer can be checked.
#[derive(Debug, Clone)]
pub struct Task {
    /// Where it comes from: the family, or the name of the file without its ending.
    pub name: String,
    /// Its difficulty, from 1.
    pub level: u32,
    /// Names it in reports and logs: unique in a suite, and the same each time.
    pub id: String,
    /// What is asked.
    pub prompt: String,
    /// How an answer is checked.
    pub check: Check,
}

/// How an answer is checked.
#[derive(Clone)]
pub enum Check {
    /// By the family that made the problem.
    Family {
        /// The family.
        family: &'static dyn Family,
        /// The problem.
        key: String,
    },
    /// As a line of a file says.
    Verifier(Arc<Verifier>),
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Family { family, key } => write!(f, "{} {key:?}", family.name()),
            Self::Verifier(verifier) => verifier.fmt(f),
        }
    }
}

/// What a verifier says of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is right.
    Right,
    /// It is not.
    Wrong,
    /// The verifier could not say: it failed, hung or crashed, for this reason.
    Error(String),
}

impl Verdict {
    /// Right or wrong.
    pub fn of(right: bool) -> Self {
        if right { Self::Right } else { Self::Wrong }
    }
}

impl Task {
    /// A problem as a task.
    pub fn of(problem: Problem) -> Self {
        let Problem { family, level, key, prompt } = problem;
        let id = format!("{}/{level}/{}", family.name(), &blake3::hash(key.as_bytes()).to_hex()[..12]);
        Self { name: family.name().to_owned(), level, id, prompt, check: Check::Family { family, key } }
    }

    /// Checks an answer: the text after the thinking, as [`crate::answer::split`] gives it.
    pub fn verify(&self, answer: &str) -> Verdict {
        match &self.check {
            Check::Verifier(verifier) => verifier.verify(&self.prompt, answer),
            Check::Family { family, key } => {
                // a fault of a verifier is no fault of the model, and must not end a run of hours
                match catch_unwind(AssertUnwindSafe(|| family.verify(key, answer.trim()))) {
                    Ok(right) => Verdict::of(right),
                    Err(_) => Verdict::Error(format!("the verifier of {} panicked", family.name())),
                }
            }
        }
    }

    /// One text for all ways to write an answer that are the same answer: what majorities are counted by.
    pub fn canonical(&self, answer: &str) -> String {
        match &self.check {
            Check::Verifier(verifier) => verifier.canonical(answer),
            Check::Family { .. } => {
                let words = || answer.split_whitespace().collect::<Vec<_>>().join(" ");
                number::parse(answer).map_or_else(words, |number| number.to_string())
            }
        }
    }

    /// A right answer, where one is known.
    pub fn reference(&self) -> Option<String> {
        match &self.check {
            Check::Family { family, key } => Some(family.answer(key)),
            Check::Verifier(verifier) => verifier.reference().map(str::to_owned),
        }
    }

    /// The external program that checks it, if one does.
    pub fn program(&self) -> Option<&Path> {
        match &self.check {
            Check::Family { .. } => None,
            Check::Verifier(verifier) => verifier.program(),
        }
    }
}

/// The families of `core`, the main suite of small reasoning models: short questions, answers that take many small
/// steps of which none is hard.
pub const CORE: [&str; 3] = ["addition", "chain", "count"];
/// The levels of `core`.
pub const CORE_LEVELS: RangeInclusive<u32> = 1..=4;

/// A part of a suite.
#[derive(Clone)]
pub enum Part {
    /// Some levels of a family.
    Family {
        /// The family.
        family: &'static dyn Family,
        /// Its levels.
        levels: RangeInclusive<u32>,
    },
    /// A file of tasks, one JSON object a line.
    Tasks(PathBuf),
    /// A text, for its perplexity.
    Text(PathBuf),
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Family { family, levels } => {
                write!(f, "{}:{}-{}", family.name(), levels.start(), levels.end())
            }
            Self::Tasks(path) | Self::Text(path) => path.fmt(f),
        }
    }
}

/// Tasks by name: families with levels, files of tasks, texts.
#[derive(Debug, Clone)]
pub struct Suite {
    parts: Vec<Part>,
}

/// Why there is no such suite.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// Nothing has this name.
    #[error(
        "no suite or family is called {name:?}, and no file\n  = help: there are gym, core, {families}, and files (.jsonl for tasks)"
    )]
    Unknown {
        /// The name.
        name: String,
        /// The families.
        families: String,
    },
    /// The levels are no numbers, or the family does not have them.
    #[error("{name}: expected levels such as 2 or 1-{most}, got {got:?}")]
    Levels {
        /// The family or suite.
        name: String,
        /// Its hardest level.
        most: u32,
        /// What stands there.
        got: String,
    },
    /// The suite is empty.
    #[error("a suite is empty\n  = help: name one, such as core, addition:1-3, or a file")]
    Empty,
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] TaskFileError),
}

/// The tasks of a suite, and what the user should know about them.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// The tasks.
    pub tasks: Vec<Task>,
    /// Lines that were left out, programs that will be run.
    pub notes: Vec<String>,
}

impl Suite {
    /// Reads `gym` (all families), `core`, `addition`, `addition:2`, `addition:1-3`, a path, or several with commas;
    /// a path that ends in `.jsonl` has tasks, any other a text.
    ///
    /// # Errors
    /// A name that is nothing, or levels that a family does not have.
    pub fn parse(text: &str) -> Result<Self, SuiteError> {
        let whole = PathBuf::from(text.trim());
        let mut parts = Vec::new();
        if !text.trim().is_empty() && whole.is_file() {
            // a name with commas in it
            parts.push(file(whole));
        } else {
            for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
                part(name, &mut parts)?;
            }
        }
        if parts.is_empty() { Err(SuiteError::Empty) } else { Ok(Self { parts }) }
    }

    /// All parts, in the order of their names.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The families and their levels.
    pub fn families(&self) -> impl Iterator<Item = (&'static dyn Family, RangeInclusive<u32>)> {
        self.parts.iter().filter_map(|part| match part {
            Part::Family { family, levels } => Some((*family, levels.clone())),
            _ => None,
        })
    }

    /// The texts, whose perplexity is asked for.
    pub fn texts(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().filter_map(|part| match part {
            Part::Text(path) => Some(path.as_path()),
            _ => None,
        })
    }

    /// The tasks: of each family and level `per_level` different problems (fewer where there are no more) that are a
    /// function of split, seed and level, and all tasks of the files, which know no split.
    ///
    /// # Errors
    /// A file that cannot be read, or has too many malformed lines.
    pub fn load(&self, split: Split, per_level: usize, seed: u64) -> Result<Loaded, SuiteError> {
        let mut loaded = Loaded::default();
        let mut ids = HashSet::new();
        for part in &self.parts {
            match part {
                Part::Family { family, levels } => {
                    for level in levels.clone() {
                        let tasks = different(*family, level, split, per_level, seed);
                        loaded.tasks.extend(tasks.into_iter().filter(|task| ids.insert(task.id.clone())));
                    }
                }
                Part::Tasks(path) => {
                    let file = tasks::read(path, &tasks::Limits::default())?;
                    loaded.notes.extend(file.notes(path));
                    // a file may be named twice
                    loaded.tasks.extend(file.tasks.into_iter().filter(|task| ids.insert(task.id.clone())));
                }
                Part::Text(_) => {}
            }
        }
        Ok(loaded)
    }

    /// The tasks of [`Suite::load`], where every line of every file must be well-formed.
    ///
    /// # Errors
    /// As [`Suite::load`], and any malformed line.
    pub fn tasks(&self, split: Split, per_level: usize, seed: u64) -> Result<Vec<Task>, SuiteError> {
        for part in &self.parts {
            if let Part::Tasks(path) = part {
                tasks::read(path, &tasks::Limits { bad_lines: 0, ..tasks::Limits::default() })?;
            }
        }
        Ok(self.load(split, per_level, seed)?.tasks)
    }
}

/// Different problems of a level, as many as asked for or as can be found.
fn different(family: &'static dyn Family, level: u32, split: Split, count: usize, seed: u64) -> Vec<Task> {
    let mut tasks = Vec::new();
    let mut keys = HashSet::new();
    // easy levels have few problems, and these come again and again
    let most_draws = count.saturating_mul(20).saturating_add(100);
    for index in 0..most_draws as u64 {
        if tasks.len() >= count {
            break;
        }
        let problem = problem(family, level, split, seed, index);
        if keys.insert(problem.key.clone()) {
            tasks.push(Task::of(problem));
        }
    }
    tasks
}

fn part(name: &str, parts: &mut Vec<Part>) -> Result<(), SuiteError> {
    let (head, levels) = match name.split_once(':') {
        Some((head, levels)) => (head, Some(levels)),
        None => (name, None),
    };
    let named: Option<Vec<(&'static dyn Family, RangeInclusive<u32>)>> = match head {
        "gym" => Some(families().iter().map(|family| (*family, 1..=family.levels())).collect()),
        "core" => CORE.iter().map(|name| Some((family(name)?, CORE_LEVELS))).collect(),
        other => family(other).map(|family| vec![(family, 1..=family.levels())]),
    };
    let Some(named) = named else {
        let path = PathBuf::from(name);
        let looks_like_a_path = name.contains(['/', '.']);
        if path.is_file() || looks_like_a_path {
            parts.push(file(path));
            return Ok(());
        }
        let families: Vec<&str> = families().iter().map(|family| family.name()).collect();
        return Err(SuiteError::Unknown { name: name.to_owned(), families: families.join(", ") });
    };
    let most = named.iter().map(|(family, _)| family.levels()).max().unwrap_or(1);
    let asked = match levels {
        None => None,
        Some(got) => {
            let fail = || SuiteError::Levels { name: head.to_owned(), most, got: got.to_owned() };
            let (low, high) = got.split_once('-').unwrap_or((got, got));
            let (low, high) = (low.parse().map_err(|_| fail())?, high.parse().map_err(|_| fail())?);
            if !(1..=most).contains(&low) || !(low..=most).contains(&high) {
                return Err(fail());
            }
            Some((low, high))
        }
    };
    for (family, levels) in named {
        let levels = match asked {
            None => levels,
            Some((low, high)) => low..=high.min(family.levels()),
        };
        if !levels.is_empty() {
            parts.push(Part::Family { family, levels });
        }
    }
    Ok(())
}

fn file(path: PathBuf) -> Part {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl")) {
        Part::Tasks(path)
    } else {
        Part::Text(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Vec<String> {
        Suite::parse(text).unwrap().parts().iter().map(|part| format!("{part:?}")).collect()
    }

    #[test]
    fn suites_are_named() {
        assert_eq!(parts("chain:2-3, sort:1"), ["chain:2-3", "sort:1-1"]);
        assert_eq!(parts("chain"), ["chain:1-8"]);
        assert_eq!(parts("gym").len(), families().len());
        assert!(matches!(Suite::parse("a/b.jsonl").unwrap().parts(), [Part::Tasks(_)]));
        assert!(matches!(Suite::parse("notes.md").unwrap().parts(), [Part::Text(_)]));
        let refused = |text| Suite::parse(text).unwrap_err().to_string();
        assert!(refused("chains").contains("there are gym, core, chain"), "{}", refused("chains"));
        for levels in ["chain:", "chain:0", "chain:9", "chain:3-2", "chain:a", "chain:1-99", "chain:-1"] {
            assert!(refused(levels).starts_with("chain: expected levels such as 2 or 1-8"), "{levels}");
        }
        assert!(refused(" , ").starts_with("a suite is empty"));
    }

    #[test]
    fn core_has_four_levels_of_each_of_its_families() {
        let said = parts("core");
        assert_eq!(said, CORE.map(|name| format!("{name}:1-4")));
        assert_eq!(parts("core:5"), CORE.map(|name| format!("{name}:5-5")));
    }

    #[test]
    fn tasks_repeat_differ_and_split() {
        let suite = Suite::parse("chain:1-3,chain:3").unwrap();
        let ids = |split, seed| -> Vec<String> {
            suite.tasks(split, 20, seed).unwrap().into_iter().map(|task| task.id).collect()
        };
        let held_out = ids(Split::HeldOut, 1);
        assert_eq!(held_out.len(), 60);
        assert_eq!(held_out.iter().collect::<HashSet<_>>().len(), 60);
        assert_eq!(held_out, ids(Split::HeldOut, 1));
        assert_ne!(held_out, ids(Split::HeldOut, 2));
        assert!(ids(Split::Train, 1).iter().all(|id| !held_out.contains(id)));
    }

    #[test]
    fn a_task_checks_answers_and_names_equal_ones_alike() {
        let task = Suite::parse("chain:1").unwrap().tasks(Split::Train, 1, 1).unwrap().remove(0);
        let right = task.reference().unwrap();
        assert_eq!(task.verify(&format!(" {right}.0 ")), Verdict::Right);
        assert_eq!(task.verify("no idea"), Verdict::Wrong);
        assert_eq!(task.canonical(&format!("{right}.0")), task.canonical(&right));
        assert_eq!(task.canonical("a  b\n"), "a b");
    }

    #[test]
    fn a_verifier_that_panics_is_an_error() {
        struct Broken;
        impl Family for Broken {
            fn name(&self) -> &'static str {
                "broken"
            }
            fn about(&self) -> &'static str {
                "panics"
            }
            fn key(&self, _: u32, _: &mut crate::Draw) -> String {
                "k".to_owned()
            }
            fn prompt(&self, _: &str, _: &mut crate::Draw) -> String {
                "p".to_owned()
            }
            fn answer(&self, _: &str) -> String {
                "a".to_owned()
            }
            fn verify(&self, _: &str, answer: &str) -> bool {
                assert_ne!(answer, "boom", "on purpose");
                true
            }
        }
        let task = Task::of(Problem { family: &Broken, level: 1, key: "k".into(), prompt: "p".into() });
        assert_eq!(task.verify("a"), Verdict::Right);
        assert_eq!(task.verify("boom"), Verdict::Error("the verifier of broken panicked".to_owned()));
    }
}
