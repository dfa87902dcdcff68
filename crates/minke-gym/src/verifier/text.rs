//! Answers that are texts: `exact`, `choice`, `regex`.

use regex::{Regex, RegexBuilder};
use serde_json::Value;

use super::options::{OptionError, Options};

/// No pattern is longer, in bytes.
const MOST_PATTERN_BYTES: usize = 4096;
/// No compiled pattern takes more memory.
const MOST_COMPILED_BYTES: usize = 1 << 20;

/// The expected text, character by character.
#[derive(Debug)]
pub struct Exact {
    ignore_case: bool,
}

impl Exact {
    pub fn read(options: &mut Options, expected: &[String]) -> Result<Self, OptionError> {
        if expected.is_empty() {
            return Err(OptionError::new("`exact` needs an `answer`"));
        }
        Ok(Self { ignore_case: options.flag("ignore_case")? })
    }

    pub fn canonical(&self, answer: &str) -> String {
        if self.ignore_case { answer.to_lowercase() } else { answer.to_owned() }
    }

    pub fn fits(&self, expected: &[String], answer: &str) -> bool {
        let answer = self.canonical(answer);
        expected.iter().any(|one| self.canonical(one) == answer)
    }
}

/// One of several options, by letter or by text.
#[derive(Debug)]
pub struct Choice {
    /// Letter (upper case) and text (as compared); no texts where only letters are known.
    choices: Vec<(String, Option<String>)>,
    right: usize,
}

impl Choice {
    pub fn read(options: &mut Options, expected: &[String]) -> Result<Self, OptionError> {
        let [expected] = expected else {
            return Err(OptionError::new("`choice` needs one `answer`: a letter or the text of an option"));
        };
        let wrong = |got: &Value| {
            OptionError::expected("choices", "a list of 2 to 26 texts, or texts by letter", got)
        };
        let text = |value: &Value| value.as_str().map(plain).filter(|text| !text.is_empty());
        let letter = |at: usize| char::from(b'A' + at as u8).to_string();
        let choices: Vec<(String, Option<String>)> = match options.take("choices") {
            None => (0..26).map(|at| (letter(at), None)).collect(),
            Some(value) => {
                let read: Option<Vec<_>> = match &value {
                    Value::Array(list) if (2..=26).contains(&list.len()) => {
                        let one = |(at, value)| Some((letter(at), Some(text(value)?)));
                        list.iter().enumerate().map(one).collect()
                    }
                    Value::Object(map) if (2..=26).contains(&map.len()) => {
                        let one = |(letter, value): (&String, &Value)| {
                            let good = letter.len() == 1 && letter.as_bytes()[0].is_ascii_alphabetic();
                            good.then_some((letter.to_uppercase(), Some(text(value)?)))
                        };
                        map.iter().map(one).collect()
                    }
                    _ => None,
                };
                read.ok_or_else(|| wrong(&value))?
            }
        };
        for (at, one) in choices.iter().enumerate() {
            let twice = |other: &(String, Option<String>)| {
                other.0 == one.0 || (other.1.is_some() && other.1 == one.1)
            };
            if choices[..at].iter().any(twice) {
                return Err(OptionError::new(format!("`choices`: option {} is there twice", one.0)));
            }
        }
        let mut choice = Self { choices, right: 0 };
        choice.right = choice.chosen(expected).ok_or_else(|| {
            OptionError::new(format!("`answer`: {expected:?} is neither a letter nor the text of an option"))
        })?;
        Ok(choice)
    }

    /// Which option an answer means; nothing when it means none, or it cannot be said which.
    fn chosen(&self, answer: &str) -> Option<usize> {
        let answer = plain(answer);
        let answer = ["option ", "choice ", "选项"]
            .into_iter()
            .find_map(|lead| answer.strip_prefix(lead))
            .map_or(answer.as_str(), str::trim);
        let by_letter = |text: &str| {
            let text = text.trim().trim_start_matches(['(', '[']).trim_end_matches([')', ']', '.', ':']);
            self.choices.iter().position(|(letter, _)| letter.eq_ignore_ascii_case(text))
        };
        let by_text = |text: &str| self.choices.iter().position(|(_, own)| own.as_deref() == Some(text));
        if let Some(at) = by_letter(answer).or_else(|| by_text(answer)) {
            return Some(at);
        }
        // `B. London`, `(b) London`: letter and text must agree
        let end = answer.find([')', ']', '.', ':'])?;
        let (head, tail) = answer.split_at(end + 1);
        let at = by_letter(head)?;
        // where the texts stand in the prompt only, the letter must do
        let agrees = self.choices[at].1.as_deref().is_none_or(|own| own == tail.trim());
        agrees.then_some(at)
    }

    pub fn fits(&self, answer: &str) -> bool {
        self.chosen(answer) == Some(self.right)
    }

    pub fn canonical(&self, answer: &str) -> String {
        self.chosen(answer).map_or_else(|| answer.to_owned(), |at| self.choices[at].0.clone())
    }
}

/// As texts of options are compared: lower case, one blank between words, no emphasis, no full stop at the end.
fn plain(text: &str) -> String {
    let text = text.trim().trim_matches(['*', '`', '"']).trim_end_matches(['.', '。']);
    text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A pattern that the whole answer matches, or a part of it.
#[derive(Debug)]
pub struct Pattern(Regex);

impl Pattern {
    pub fn read(options: &mut Options, expected: &[String]) -> Result<Self, OptionError> {
        let pattern = match (options.text("pattern")?, expected) {
            (Some(pattern), _) => pattern,
            (None, [pattern]) => pattern.clone(),
            _ => return Err(OptionError::new("`regex` needs a `pattern`, or one in `answer`")),
        };
        if pattern.len() > MOST_PATTERN_BYTES {
            let got = pattern.len();
            return Err(OptionError::new(format!(
                "`pattern`: expected at most {MOST_PATTERN_BYTES} bytes, got {got}"
            )));
        }
        let whole = if options.flag("search")? { pattern.clone() } else { format!("^(?:{pattern})$") };
        let build = |pattern: &str, ignore_case| {
            RegexBuilder::new(pattern)
                .case_insensitive(ignore_case)
                .size_limit(MOST_COMPILED_BYTES)
                .dfa_size_limit(MOST_COMPILED_BYTES)
                .build()
        };
        let ignore_case = options.flag("ignore_case")?;
        // alone as well: `a)|(b` must not become something by being wrapped
        build(&pattern, ignore_case)
            .and_then(|_| build(&whole, ignore_case))
            .map(Self)
            .map_err(|error| OptionError::new(format!("`pattern`: {error}")))
    }

    pub fn fits(&self, answer: &str) -> bool {
        self.0.is_match(answer)
    }
}
