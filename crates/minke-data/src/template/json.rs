//! JSON as Python writes it.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::python::{MAX_DEPTH, MAX_TEXT_BYTES, float};

/// How `json.dumps` is asked to write.
struct Style {
    ascii: bool,
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: [String; 2],
    sorted: bool,
}

/// The filter `tojson` as transformers sets it up: `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
pub(super) fn tojson(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let fail = |why: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {why}"));
    let indent = match kwargs.get::<Option<Value>>("indent")?.filter(|value| !value.is_none()) {
        Some(value) => Some(match value.as_str() {
            Some(text) if text.len() <= 64 => text.to_owned(),
            Some(_) => return Err(fail("`indent` is too long")),
            None => {
                " ".repeat(value.as_usize().filter(|n| *n <= 64).ok_or_else(|| fail("`indent` is no width"))?)
            }
        }),
        None => None,
    };
    let separators = match kwargs.get::<Option<Value>>("separators")?.filter(|value| !value.is_none()) {
        Some(pair) => {
            let parts: Vec<String> =
                pair.try_iter()?.take(3).map(|part| part.as_str().unwrap_or_default().to_owned()).collect();
            <[String; 2]>::try_from(parts).map_err(|_| fail("`separators` are no two texts"))?
        }
        None => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
    };
    let style = Style {
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        separators,
    };
    let mut out = String::new();
    style.write(&value, 0, &mut out).map_err(|why| fail(&why))?;
    super::bounds::charge(out.len())?;
    Ok(Value::from(out))
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(super) fn python(value: &serde_json::Value) -> String {
    let style =
        Style { ascii: false, indent: None, separators: [", ", ": "].map(str::to_owned), sorted: false };
    let mut out = String::new();
    // what came from JSON is neither too deep nor too long for it, and holds nothing that JSON has not
    let _ = style.write(&Value::from_serialize(value), 0, &mut out);
    out
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err("nested too deeply".to_owned());
        }
        if out.len() > MAX_TEXT_BYTES {
            return Err(format!("more than {MAX_TEXT_BYTES} bytes"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => {
                // text cannot fail to grow
                let _ = write!(out, "{value}");
            }
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.quote(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq => {
                let items = value.try_iter().map_err(|error| error.to_string())?;
                self.list(['[', ']'], items, depth, out, |item, out| self.write(&item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter().map_err(|error| error.to_string())?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.list(['{', '}'], keys.into_iter(), depth, out, |key, out| {
                    match key.kind() {
                        ValueKind::String => self.quote(key.as_str().unwrap_or_default(), out),
                        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                            out.push('"');
                            self.write(&key, depth + 1, out)?;
                            out.push('"');
                        }
                        kind => return Err(format!("a key is {kind}")),
                    }
                    out.push_str(&self.separators[1]);
                    self.write(&value.get_item(&key).unwrap_or_default(), depth + 1, out)
                })?;
            }
            kind => return Err(format!("{kind} cannot be written as JSON")),
        }
        Ok(())
    }

    fn list(
        &self,
        [open, close]: [char; 2],
        items: impl Iterator<Item = Value>,
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(Value, &mut String) -> Result<(), String>,
    ) -> Result<(), String> {
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        let mut is_empty = true;
        for item in items {
            if !is_empty {
                out.push_str(&self.separators[0]);
            }
            is_empty = false;
            line(depth + 1, out);
            write(item, out)?;
        }
        if !is_empty {
            line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn quote(&self, text: &str, out: &mut String) {
        out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                _ if letter < ' ' || self.ascii && letter > '~' => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ => out.push(letter),
            }
        }
        out.push('"');
    }
}

fn number(value: &Value) -> String {
    let x = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    match (x.is_nan(), x.is_infinite()) {
        (true, _) => "NaN".to_owned(),
        (_, true) => if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        _ => float(x),
    }
}
