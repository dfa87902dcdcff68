//! Options of a verifier: read by name, unknown ones refused.

use serde_json::{Map, Value};

use super::option_names;

/// What is wrong with a task or its verifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OptionError(String);

impl OptionError {
    /// In words.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// A value of another kind than expected.
    pub(crate) fn expected(name: &str, expected: &str, got: &Value) -> Self {
        let got: String = got.to_string().chars().take(60).collect();
        Self(format!("`{name}`: expected {expected}, got {got}"))
    }

    /// A name that does not exist, with those that do.
    pub(crate) fn unknown(kind: &str, name: &str, names: &[&str]) -> Self {
        let name: String = name.chars().take(60).collect();
        Self(format!("unknown {kind} `{name}`; there are {}", names.join(", ")))
    }
}

/// The options of one verifier, taken one by one.
pub(crate) struct Options {
    verifier: String,
    left: Map<String, Value>,
}

impl Options {
    pub fn new(verifier: &str, options: Map<String, Value>) -> Result<Self, OptionError> {
        if option_names(verifier).is_none() {
            return Err(OptionError::unknown("verifier", verifier, &super::NAMES));
        }
        Ok(Self { verifier: verifier.to_owned(), left: options })
    }

    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.left.remove(name).filter(|value| !value.is_null())
    }

    pub fn flag(&mut self, name: &str) -> Result<bool, OptionError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(OptionError::expected(name, "true or false", &other)),
        }
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>, OptionError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(OptionError::expected(name, "text", &other)),
        }
    }

    pub fn texts(&mut self, name: &str) -> Result<Option<Vec<String>>, OptionError> {
        let fail = |got: &Value| OptionError::expected(name, "a list of texts", got);
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => list
                .iter()
                .map(|one| one.as_str().map(str::to_owned).ok_or_else(|| fail(one)))
                .collect::<Result<_, _>>()
                .map(Some),
            Some(other) => Err(fail(&other)),
        }
    }

    pub fn number(&mut self, name: &str, least: f64, most: f64) -> Result<Option<f64>, OptionError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|x| (least..=most).contains(x)) {
            Some(x) => Ok(Some(x)),
            None => Err(OptionError::expected(name, &format!("a number from {least} to {most}"), &value)),
        }
    }

    /// Refuses what nobody took.
    pub fn finish(self) -> Result<(), OptionError> {
        let Some(name) = self.left.keys().next() else { return Ok(()) };
        let known = option_names(&self.verifier).expect("checked in `new`");
        Err(OptionError::unknown(&format!("option of `{}`", self.verifier), name, known))
    }
}
