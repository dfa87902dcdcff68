//! What an evaluation found.

use std::collections::BTreeMap;
use std::fmt::Write;

use minke_gym::Task;
use serde::{Serialize, Serializer};

use super::statistics::{interval, majority_at_k, pass_at_k};
use super::{Answer, EvalSettings, Grade, Prompter};
use crate::metrics::Values;

/// A rate and its 95 % interval; see [`super::interval`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// The rate; no number (null in JSON) where nothing was graded.
    #[serde(serialize_with = "finite")]
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// pass@k and majority@k.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AtK {
    /// k.
    pub k: usize,
    /// The chance that one of k answers is right.
    #[serde(serialize_with = "finite")]
    pub pass: f64,
    /// The chance that the most frequent of k answers is right.
    #[serde(serialize_with = "finite")]
    pub majority: f64,
}

/// Some tasks together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Where the tasks come from; `all` for all of them.
    pub name: String,
    /// Their level, where it is one.
    pub level: Option<u32>,
    /// How many.
    pub tasks: usize,
    /// Answers to them.
    pub answers: usize,
    /// The mean over tasks of the share of answers that are right.
    pub pass_1: Rate,
    /// For each k.
    pub at_k: Vec<AtK>,
    /// Tokens of thought in an answer, on average.
    #[serde(serialize_with = "finite")]
    pub thought_tokens: f64,
    /// Tokens of an answer with its thought, on average.
    #[serde(serialize_with = "finite")]
    pub tokens: f64,
    /// Share of samples without an answer.
    #[serde(serialize_with = "finite")]
    pub no_answer: f64,
    /// Samples that the verifier failed on; they are in no rate.
    pub verifier_errors: usize,
    /// Samples whose prompt did not fit into the context.
    pub too_long: usize,
}

/// What an evaluation found.
#[derive(Debug, Clone, Serialize)]
pub struct EvalReport {
    /// How it was asked.
    pub settings: EvalSettings,
    /// In which form.
    pub form: String,
    /// Whether all answers are in it.
    pub complete: bool,
    /// All tasks.
    pub overall: Row,
    /// By family or file.
    pub by_name: Vec<Row>,
    /// By family or file and level.
    pub by_level: Vec<Row>,
    /// Reasons of verifiers that failed, and how often; the most frequent ten.
    pub verifier_errors: Vec<(String, usize)>,
    /// All answers, task by task.
    #[serde(skip)]
    pub answers: Vec<Answer>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn finite<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if x.is_finite() { serializer.serialize_f64(*x) } else { serializer.serialize_none() }
}

impl EvalReport {
    /// Counts answers, given task by task.
    pub(crate) fn of(
        settings: &EvalSettings,
        prompter: &Prompter,
        complete: bool,
        by_task: Vec<(&Task, Vec<Answer>)>,
    ) -> Self {
        let mut names: Vec<&str> = Vec::new();
        for (task, _) in &by_task {
            if !names.contains(&task.name.as_str()) {
                names.push(&task.name);
            }
        }
        let row = |name: Option<&str>, level: Option<u32>| {
            let some: Vec<&(&Task, Vec<Answer>)> = by_task
                .iter()
                .filter(|(task, _)| name.is_none_or(|name| task.name == name))
                .filter(|(task, _)| level.is_none_or(|level| task.level == level))
                .collect();
            Row::of(name.unwrap_or("all"), level, &settings.k, &some)
        };
        let levels = |name: &str| {
            let mut levels: Vec<u32> =
                by_task.iter().filter(|(task, _)| task.name == name).map(|(task, _)| task.level).collect();
            levels.sort_unstable();
            levels.dedup();
            levels
        };
        let by_level = names
            .iter()
            .flat_map(|name| levels(name).into_iter().map(|level| row(Some(name), Some(level))))
            .collect();
        let overall = row(None, None);
        let by_name = names.iter().map(|name| row(Some(name), None)).collect();
        let mut errors: BTreeMap<&str, usize> = BTreeMap::new();
        for answer in by_task.iter().flat_map(|(_, answers)| answers) {
            if let Grade::Error(reason) = &answer.grade {
                *errors.entry(reason).or_default() += 1;
            }
        }
        let mut verifier_errors: Vec<(String, usize)> =
            errors.into_iter().map(|(reason, count)| (reason.to_owned(), count)).collect();
        verifier_errors.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        verifier_errors.truncate(10);
        Self {
            settings: settings.clone(),
            form: prompter.name(),
            complete,
            overall,
            by_name,
            by_level,
            verifier_errors,
            answers: by_task.into_iter().flat_map(|(_, answers)| answers).collect(),
        }
    }

    /// pass@1 over all tasks.
    pub fn pass_1(&self) -> f64 {
        self.overall.pass_1.value
    }

    /// Puts the rates into metrics: `pass@1`, `pass@1/NAME`, `pass@1/NAME:LEVEL`, `thought`, `no_answer` and
    /// `verifier_errors`.
    pub fn put_into(&self, values: &mut Values) {
        values.put("pass@1", self.overall.pass_1.value);
        for at in self.overall.at_k.iter().filter(|at| at.k > 1) {
            values.put(format!("pass@{}", at.k), at.pass);
            values.put(format!("majority@{}", at.k), at.majority);
        }
        for row in self.by_name.iter().chain(&self.by_level) {
            let level = row.level.map(|level| format!(":{level}")).unwrap_or_default();
            values.put(format!("pass@1/{}{level}", row.name), row.pass_1.value);
            values.put(format!("thought/{}{level}", row.name), row.thought_tokens);
        }
        values.put("thought", self.overall.thought_tokens);
        values.put("no_answer", self.overall.no_answer);
        if self.overall.verifier_errors > 0 {
            values.put("verifier_errors", self.overall.verifier_errors as f64);
        }
    }

    /// A table for people: all tasks, then by name, then by level.
    pub fn table(&self) -> String {
        let percent = |x: f64| if x.is_finite() { format!("{:.1} %", x * 100.0) } else { "-".to_owned() };
        let number = |x: f64| if x.is_finite() { format!("{x:.0}") } else { "-".to_owned() };
        let ks: Vec<usize> = self.settings.k.iter().copied().filter(|k| *k > 1).collect();
        let mut head = ["", "level", "tasks", "pass@1", "95 %"].map(str::to_owned).to_vec();
        for k in &ks {
            head.extend([format!("pass@{k}"), format!("majority@{k}")]);
        }
        head.extend(["thought", "tokens", "no answer"].map(str::to_owned));
        // a column of zeros would break the lines of a terminal
        let errors = self.overall.verifier_errors > 0;
        head.extend(errors.then(|| "errors".to_owned()));
        let mut rows = vec![head];
        let by_level = self.by_level.len() > self.by_name.len();
        let levels = self.by_level.iter().filter(|_| by_level);
        let by_name = self.by_name.iter().filter(|_| self.by_name.len() > 1);
        // a run that was stopped has asked no tasks of some
        let asked = by_name.chain(levels).filter(|row| row.answers > 0);
        for row in std::iter::once(&self.overall).chain(asked) {
            let rate = row.pass_1;
            let mut cells = vec![
                row.name.clone(),
                row.level.map_or_else(String::new, |level| level.to_string()),
                row.tasks.to_string(),
                percent(rate.value),
                format!("{:.1}-{:.1}", rate.low * 100.0, rate.high * 100.0),
            ];
            for k in &ks {
                let at = row.at_k.iter().find(|at| at.k == *k);
                cells.push(percent(at.map_or(f64::NAN, |at| at.pass)));
                cells.push(percent(at.map_or(f64::NAN, |at| at.majority)));
            }
            cells.extend([number(row.thought_tokens), number(row.tokens), percent(row.no_answer)]);
            cells.extend(errors.then(|| row.verifier_errors.to_string()));
            rows.push(cells);
        }
        let mut text = aligned(&rows);
        if self.overall.too_long > 0 {
            let _ = writeln!(
                text,
                "{} answers count as wrong since their prompts do not fit into the context",
                self.overall.too_long
            );
        }
        for (reason, count) in &self.verifier_errors {
            let _ = writeln!(text, "verifier error, {count} times: {reason}");
        }
        if !self.complete {
            text.push_str("stopped before the end: this is what there is so far\n");
        }
        text
    }
}

/// Columns of one width: the first to the left, the others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = format!("{:1$}", row[0], widths[0]);
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            let _ = write!(line, "  {cell:>width$}");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

impl Row {
    fn of(name: &str, level: Option<u32>, ks: &[usize], some: &[&(&Task, Vec<Answer>)]) -> Self {
        let graded = |answers: &[Answer]| -> (usize, usize) {
            let judged = answers.iter().filter(|answer| !matches!(answer.grade, Grade::Error(_)));
            let right = answers.iter().filter(|answer| answer.grade == Grade::Right);
            (judged.count(), right.count())
        };
        let counts: Vec<(usize, usize)> =
            some.iter().map(|(_, answers)| graded(answers)).filter(|(judged, _)| *judged > 0).collect();
        let rates: Vec<f64> = counts.iter().map(|(judged, right)| *right as f64 / *judged as f64).collect();
        let (value, low, high) = interval(&rates, counts.iter().map(|(judged, _)| judged).sum());
        let at_k = ks
            .iter()
            .map(|&k| {
                let pass =
                    counts.iter().filter(|(judged, _)| *judged >= k).map(|(n, c)| pass_at_k(*n, *c, k));
                let majority =
                    some.iter().filter_map(|(task, answers)| majority_at_k(&votes(task, answers), k));
                AtK { k, pass: mean(pass), majority: mean(majority) }
            })
            .collect();
        let all = || some.iter().flat_map(|(_, answers)| answers);
        let asked = || all().filter(|answer| answer.grade != Grade::TooLong);
        let none = |answer: &Answer| matches!(answer.grade, Grade::NoAnswer | Grade::TooLong);
        Self {
            name: name.to_owned(),
            level,
            tasks: some.len(),
            answers: all().count(),
            pass_1: Rate { value, low, high },
            at_k,
            thought_tokens: mean(asked().map(|answer| answer.thought_tokens as f64)),
            tokens: mean(asked().map(|answer| answer.tokens as f64)),
            no_answer: mean(all().map(|answer| f64::from(u8::from(none(answer))))),
            verifier_errors: all().filter(|answer| matches!(answer.grade, Grade::Error(_))).count(),
            too_long: all().filter(|answer| answer.grade == Grade::TooLong).count(),
        }
    }
}

/// What each sample votes for. Equal answers are one, unless one of two ways to write them is right and the other not.
fn votes(task: &Task, answers: &[Answer]) -> Vec<Option<(String, bool)>> {
    answers
        .iter()
        .filter(|answer| !matches!(answer.grade, Grade::Error(_)))
        .map(|answer| {
            let text = answer.answer.as_deref()?;
            Some((task.canonical(text), answer.grade == Grade::Right))
        })
        .collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    if count > 0.0 { sum / count } else { f64::NAN }
}
