//! Answers that are JSON.

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use super::options::{OptionError, Options};

/// See the module.
#[derive(Debug)]
pub struct Json {
    schema: Option<Validator>,
    expected: Option<Value>,
}

impl Json {
    pub fn read(options: &mut Options, answer: Option<&Value>) -> Result<Self, OptionError> {
        let schema = match options.take("schema") {
            None => None,
            Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                refuse_references(&schema)?;
                refuse_loops(&schema)?;
                // the linear engine: a pattern of the schema must not take for ever on a hostile answer. Nothing is
                // fetched: a reference to elsewhere is an error
                let built =
                    jsonschema::options().with_pattern_options(PatternOptions::regex()).build(&schema);
                Some(built.map_err(|error| OptionError::new(format!("`schema`: {error}")))?)
            }
            Some(other) => return Err(OptionError::expected("schema", "a JSON schema", &other)),
        };
        let expected = match answer {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(parse(text).ok_or_else(|| {
                OptionError::new("`answer`: expected JSON for the verifier `json`".to_owned())
            })?),
            Some(value) => Some(value.clone()),
        };
        if schema.is_none() && expected.is_none() {
            return Err(OptionError::new("`json` needs a `schema`, an `answer`, or both"));
        }
        Ok(Self { schema, expected })
    }

    pub fn fits(&self, answer: &str) -> bool {
        let Some(value) = parse(answer) else { return false };
        self.schema.as_ref().is_none_or(|schema| schema.is_valid(&value))
            && self.expected.as_ref().is_none_or(|expected| equal(expected, &value))
    }
}

/// Reads JSON, also when a model put it into a fenced block.
fn parse(text: &str) -> Option<Value> {
    let text = text.trim();
    let inner = text.strip_prefix("```").and_then(|text| text.strip_suffix("```")).map(|text| {
        let text = text.trim_start();
        text.strip_prefix("json").unwrap_or(text)
    });
    serde_json::from_str(inner.unwrap_or(text)).ok()
}

/// Equality of JSON values: the order of keys and the way to write a number do not count.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            a == b || (a.is_f64() || b.is_f64()) && a.as_f64() == b.as_f64()
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| equal(a, b)))
        }
        _ => a == b,
    }
}

/// One text for equal values.
pub fn canonical(text: &str) -> String {
    fn sort(value: Value) -> Value {
        match value {
            Value::Array(list) => list.into_iter().map(sort).collect(),
            Value::Object(map) => {
                let mut pairs: Vec<(String, Value)> =
                    map.into_iter().map(|(key, one)| (key, sort(one))).collect();
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
                Value::Object(pairs.into_iter().collect())
            }
            other => other,
        }
    }
    parse(text).map_or_else(|| text.to_owned(), |value| sort(value).to_string())
}

/// Calls `visit` for a value and all within it.
fn every<'s>(schema: &'s Value, visit: &mut dyn FnMut(&'s Value)) {
    visit(schema);
    match schema {
        Value::Object(map) => map.values().for_each(|one| every(one, visit)),
        Value::Array(list) => list.iter().for_each(|one| every(one, visit)),
        _ => {}
    }
}

/// Refuses references other than plain pointers from the root: whether the others come to an end cannot be seen.
fn refuse_references(schema: &Value) -> Result<(), OptionError> {
    let mut refused = None;
    every(schema, &mut |place| {
        let Value::Object(map) = place else { return };
        for (key, value) in map {
            let Value::String(text) = value else { continue };
            let good = match key.as_str() {
                "$ref" => (text == "#" || text.starts_with("#/")) && !text.contains('%'),
                "$dynamicRef" | "$recursiveRef" => false,
                // a base of its own changes what `#` means
                "$id" => std::ptr::eq(place, schema),
                _ => true,
            };
            if !good {
                refused =
                    Some(format!("`schema`: {key} {text:?}: expected references such as #/$defs/name only"));
            }
        }
    });
    refused.map_or(Ok(()), |text| Err(OptionError::new(text)))
}

/// Refuses references that come back to themselves without going down into the answer: checking them would not end.
fn refuse_loops(schema: &Value) -> Result<(), OptionError> {
    /// References that apply to the very value that `schema` applies to.
    fn same_level<'s>(schema: &'s Value, found: &mut Vec<&'s str>) {
        let Value::Object(map) = schema else { return };
        for (key, value) in map {
            match (key.as_str(), value) {
                ("$ref", Value::String(target)) => found.push(target),
                ("allOf" | "anyOf" | "oneOf", Value::Array(list)) => {
                    for one in list {
                        same_level(one, found);
                    }
                }
                ("not" | "if" | "then" | "else", one) => same_level(one, found),
                ("dependentSchemas", Value::Object(map)) => {
                    for one in map.values() {
                        same_level(one, found);
                    }
                }
                _ => {}
            }
        }
    }
    let mut loops = false;
    let mut places = Vec::new();
    every(schema, &mut |place| places.push(place));
    for place in places {
        let mut waiting = Vec::new();
        same_level(place, &mut waiting);
        let mut seen = Vec::new();
        while let Some(target) = waiting.pop() {
            let Some(at) = target.strip_prefix('#').and_then(|pointer| schema.pointer(pointer)) else {
                continue;
            };
            loops |= std::ptr::eq(at, place);
            if !seen.contains(&target) {
                seen.push(target);
                same_level(at, &mut waiting);
            }
        }
    }
    if loops { Err(OptionError::new("`schema`: a reference leads back to itself")) } else { Ok(()) }
}
