//! Verifiers of user tasks: given an answer, is it right?
//!
//! | name | right is |
//! |---|---|
//! | `exact` | the expected text, or one of several |
//! | `number` | a number equal to the expected one, within a tolerance if one is stated |
//! | `choice` | the letter or the text of the expected option |
//! | `regex` | what matches a pattern |
//! | `json` | JSON that fits a schema, equals the expected value, or both |
//! | `program` | what an external command ends with 0 for |
//! | `gym` | what a family of this crate says |
//!
//! All of it is read and checked before the first answer is: a pattern that does not compile, a schema that is none
//! and a program that is not there are errors of the task. What fails afterwards is [`Verdict::Error`], never a wrong
//! answer.

mod json;
mod number;
mod options;
mod program;
#[cfg(test)]
mod tests;
mod text;

use std::path::Path;

use serde_json::{Map, Value};

pub use options::OptionError;
use options::Options;
pub use program::Limits as ProgramLimits;

use crate::Verdict;

/// No answer is longer, in bytes: verifiers are linear in it, and this bounds them.
pub const MOST_ANSWER_BYTES: usize = 1 << 20;

/// The names, in the order of lists.
pub const NAMES: [&str; 7] = ["exact", "number", "choice", "regex", "json", "program", "gym"];

/// A verifier with its options and what it expects, ready to check.
#[derive(Debug)]
pub struct Verifier {
    kind: Kind,
    expected: Vec<String>,
}

#[derive(Debug)]
enum Kind {
    Exact(text::Exact),
    Number(number::Number),
    Choice(text::Choice),
    Regex(text::Pattern),
    Json(Box<json::Json>),
    Program(program::Program),
}

/// A verifier as a line of a file asks for it.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    /// Its name; where none is given, `number` for numbers and `exact` for all else.
    pub name: Option<&'a str>,
    /// Its options.
    pub options: Map<String, Value>,
    /// The answer of the line, if it has one.
    pub answer: Option<&'a Value>,
    /// Where programs and relative paths are looked for.
    pub folder: &'a Path,
}

/// The options that a verifier knows, or nothing for an unknown name.
pub(crate) fn option_names(verifier: &str) -> Option<&'static [&'static str]> {
    Some(match verifier {
        "exact" => &["ignore_case"],
        "number" => &["tolerance", "relative", "units"],
        "choice" => &["choices"],
        "regex" => &["pattern", "search", "ignore_case"],
        "json" => &["schema"],
        "program" => &["command", "timeout_s", "cpu_s", "memory_mib"],
        "gym" => &["family", "level", "split", "seed", "index"],
        _ => return None,
    })
}

impl Verifier {
    /// Reads and checks a verifier.
    pub(crate) fn read(asked: Asked<'_>) -> Result<Self, OptionError> {
        let expected = expected(asked.answer)?;
        let name = asked.name.unwrap_or_else(|| match expected.as_slice() {
            [first, ..] if number::value(first).is_some() => "number",
            _ => "exact",
        });
        let mut options = Options::new(name, asked.options)?;
        let kind = match name {
            "exact" => Kind::Exact(text::Exact::read(&mut options, &expected)?),
            "number" => Kind::Number(number::Number::read(&mut options, &expected)?),
            "choice" => Kind::Choice(text::Choice::read(&mut options, &expected)?),
            "regex" => Kind::Regex(text::Pattern::read(&mut options, &expected)?),
            "json" => Kind::Json(Box::new(json::Json::read(&mut options, asked.answer)?)),
            "program" => Kind::Program(program::Program::read(&mut options, asked.folder)?),
            other => return Err(OptionError::unknown("verifier", other, &NAMES)),
        };
        options.finish()?;
        Ok(Self { kind, expected })
    }

    /// Checks an answer (the text after the thinking) to a prompt.
    pub fn verify(&self, prompt: &str, answer: &str) -> Verdict {
        if answer.len() > MOST_ANSWER_BYTES {
            // nothing that is asked for is as long
            return Verdict::Wrong;
        }
        let answer = answer.trim();
        match &self.kind {
            Kind::Exact(exact) => Verdict::of(exact.fits(&self.expected, answer)),
            Kind::Number(number) => Verdict::of(number.fits(answer)),
            Kind::Choice(choice) => Verdict::of(choice.fits(answer)),
            Kind::Regex(pattern) => Verdict::of(pattern.fits(answer)),
            Kind::Json(json) => Verdict::of(json.fits(answer)),
            Kind::Program(program) => {
                program.run(prompt, self.expected.first().map_or("", String::as_str), answer)
            }
        }
    }

    /// One text for all ways to write an answer that count as the same answer.
    pub fn canonical(&self, answer: &str) -> String {
        let answer = answer.trim();
        match &self.kind {
            Kind::Exact(exact) => exact.canonical(answer),
            Kind::Number(number) => number.canonical(answer),
            Kind::Choice(choice) => choice.canonical(answer),
            Kind::Json(_) => json::canonical(answer),
            Kind::Regex(_) | Kind::Program(_) => answer.to_owned(),
        }
    }

    /// A right answer where one is known.
    pub fn reference(&self) -> Option<&str> {
        self.expected.first().map(String::as_str)
    }

    /// The program that runs for each answer; other verifiers have none.
    pub fn program(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Program(program) => Some(program.path()),
            _ => None,
        }
    }
}

/// The expected answers of a line: one, several, or none.
fn expected(answer: Option<&Value>) -> Result<Vec<String>, OptionError> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.trim().to_owned()),
        Value::Null => Err(OptionError::expected("answer", "text or a number", value)),
        other => Ok(other.to_string()),
    };
    match answer {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) if !list.is_empty() && list.iter().all(|one| !one.is_array()) => {
            list.iter().map(one).collect()
        }
        Some(value) => Ok(vec![one(value)?]),
    }
}
