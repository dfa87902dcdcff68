//! Fields of a JSON object, taken one by one with their types and bounds.

use serde_json::{Map, Value};

use super::super::{ConfigError, MAX_SIZE};

/// An object whose fields are taken one by one; what is never asked for is left over.
pub(super) struct Fields<'a> {
    pub(super) object: &'a Map<String, Value>,
    prefix: &'static str,
    pub(super) taken: Vec<&'static str>,
}

pub(super) fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A value for a message: short ones whole, long ones by type.
pub(super) fn show(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= 40 { text } else { json_type(value).to_owned() }
}

#[expect(clippy::needless_pass_by_value, reason = "callers hand over numbers and fresh strings")]
pub(super) fn invalid(field: &str, expected: impl Into<String>, got: impl ToString) -> ConfigError {
    ConfigError::Invalid { field: field.to_owned(), expected: expected.into(), got: got.to_string() }
}

pub(super) fn unsupported(field: &str, got: impl Into<String>, hint: impl Into<String>) -> ConfigError {
    ConfigError::Unsupported { field: field.to_owned(), got: got.into(), hint: hint.into() }
}

impl<'a> Fields<'a> {
    pub(super) fn new(object: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Self { object, prefix, taken: Vec::new() }
    }

    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// The value, with null as absent.
    pub(super) fn take(&mut self, field: &'static str) -> Option<&'a Value> {
        self.taken.push(field);
        self.object.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn missing(&self, field: &str, expected: &str) -> ConfigError {
        ConfigError::Missing { field: self.name(field), expected: expected.to_owned() }
    }

    pub(super) fn integer(
        &mut self,
        field: &'static str,
        low: usize,
        high: usize,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let found = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match found.filter(|number| (low..=high).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(&self.name(field), format!("an integer from {low} to {high}"), show(value))),
        }
    }

    /// A required positive size.
    pub(super) fn size(&mut self, field: &'static str) -> Result<usize, ConfigError> {
        self.size_to(field, MAX_SIZE)
    }

    pub(super) fn size_to(&mut self, field: &'static str, high: usize) -> Result<usize, ConfigError> {
        self.integer(field, 1, high)?
            .ok_or_else(|| self.missing(field, &format!("an integer from 1 to {high}")))
    }

    pub(super) fn flag(&mut self, field: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.take(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(invalid(&self.name(field), "true or false", show(value))),
        }
    }

    pub(super) fn text(&mut self, field: &'static str) -> Result<Option<&'a str>, ConfigError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(invalid(&self.name(field), "a string", show(value))),
        }
    }

    /// A finite number for which `ok` holds.
    pub(super) fn number(
        &mut self,
        field: &'static str,
        expected: &str,
        ok: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite() && ok(*number)) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(&self.name(field), expected, show(value))),
        }
    }

    pub(super) fn positive(&mut self, field: &'static str) -> Result<Option<f64>, ConfigError> {
        self.number(field, "a positive number", |number| number > 0.0)
    }

    pub(super) fn token(&mut self, field: &'static str) -> Result<Option<u32>, ConfigError> {
        Ok(self.integer(field, 0, MAX_SIZE)?.map(|id| id as u32))
    }

    pub(super) fn tokens(&mut self, field: &'static str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().filter(|id| *id <= MAX_SIZE as u64).map(|id| id as u32);
        let Some(value) = self.take(field) else { return Ok(Vec::new()) };
        let ids = match value {
            Value::Array(ids) if ids.len() <= 64 => ids.iter().map(id).collect(),
            Value::Number(_) => id(value).map(|id| vec![id]),
            _ => None,
        };
        ids.ok_or_else(|| invalid(&self.name(field), "a token id or a list of at most 64", show(value)))
    }
}
