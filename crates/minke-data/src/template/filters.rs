//! Filters, tests and functions as Jinja for Python has them, where the engine has none or others.

use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::filters::striptags;
use minijinja_contrib::globals;

use super::python;
use super::{bounds, clock, json};

fn fail(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

/// Adds all of them.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_function("raise_exception", |why: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, why))
    });
    environment.add_function("strftime_now", clock::strftime_now);
    environment.add_function("cycler", |items: Rest<Value>| {
        bounds::charge(items.len() * bounds::VALUE_BYTES)?;
        globals::cycler(items.0)
    });
    environment.add_function("joiner", globals::joiner);
    environment.add_function("dict", dict);
    environment.add_function("namespace", |defaults: Option<Value>| {
        bounds::charge(defaults.as_ref().and_then(Value::len).unwrap_or(0) * PAIR_BYTES)?;
        minijinja::functions::namespace(defaults)
    });
    // the engine's own, of any size: no template of Jinja knows the first, or expects Rust's text of a value
    environment.remove_global("debug");
    environment.remove_filter("pprint");
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("string", |value: Value| python::text(&value));
    environment.add_filter("join", join);
    environment.add_filter("replace", python::replace);
    environment.add_filter("format", python::percent);
    environment.add_filter("split", split);
    environment.add_filter("lines", lines);
    environment.add_filter("list", list);
    environment.add_filter("batch", batch);
    environment.add_filter("slice", slice);
    environment.add_filter("indent", indent);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("sum", sum);
    environment.add_filter("center", center);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("striptags", striptags);
    environment.add_filter("truncate", truncate);
    environment.add_filter("round", round);
    environment.add_filter("wordcount", |text: &str| {
        text.split(|c: char| !is_word(c)).filter(|w| !w.is_empty()).count()
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    // a bool of Python is a number
    environment
        .add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// A pair of a mapping, roughly.
const PAIR_BYTES: usize = 96;

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// `dict(mapping or pairs, key=value...)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn dict(value: Option<Value>, update: Kwargs) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    if let Some(value) = value.filter(|value| !value.is_undefined()) {
        let is_map = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            pairs.push(if is_map {
                (item.clone(), value.get_item(&item)?)
            } else {
                (item.get_item_by_index(0)?, item.get_item_by_index(1)?)
            });
        }
    }
    bounds::charge(pairs.len() * PAIR_BYTES)?;
    for key in update.args() {
        pairs.push((Value::from(key), update.peek(key)?));
    }
    update.assert_all_used().ok();
    Ok(pairs.into_iter().collect())
}

/// `join(d, attribute)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn join(value: Value, by: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let by = match by.or(kwargs.get("d")?) {
        Some(by) => python::text(&by)?,
        None => String::new(),
    };
    let attribute: Option<Value> = kwargs.get("attribute")?;
    let mut out = String::new();
    if value.is_undefined() {
        return Ok(Value::from(out));
    }
    for (at, item) in value.try_iter()?.enumerate() {
        let item = match &attribute {
            Some(key) => item.get_item(key)?,
            None => item,
        };
        let before = out.len();
        if at > 0 {
            out.push_str(&by);
        }
        out.push_str(&python::text(&item)?);
        bounds::charge(out.len() - before)?;
    }
    Ok(Value::from(out))
}

/// `split(by=None, most=-1)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn split(value: Value, by: Option<Arc<str>>, most: Option<i64>) -> Result<Value, Error> {
    bounds::charge(value.as_str().map_or(0, str::len).saturating_mul(bounds::VALUE_BYTES))?;
    minijinja::filters::split(&value, by, most)
}

#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn lines(value: Value) -> Result<Value, Error> {
    bounds::charge(value.as_str().map_or(0, str::len).saturating_mul(bounds::VALUE_BYTES))?;
    minijinja::filters::lines(&value)
}

/// A text gives its characters.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn list(value: Value) -> Result<Value, Error> {
    if value.is_undefined() {
        return Ok(Value::from(Vec::<Value>::new()));
    }
    Ok(Value::from_object(bounds::items(&value)?))
}

/// `batch(linecount, fill_with=None)`: lists of so many items.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn batch(value: Value, count: usize, fill: Option<Value>) -> Result<Value, Error> {
    let items = bounds::items(&value)?;
    let mut lines: Vec<Vec<Value>> = items.chunks(count.max(1)).map(<[Value]>::to_vec).collect();
    if let (Some(fill), Some(last)) = (fill.filter(|fill| !fill.is_none()), lines.last_mut()) {
        bounds::charge((count - last.len()).saturating_mul(24))?;
        last.resize(count, fill);
    }
    Ok(lines.into_iter().map(Value::from_object).collect())
}

/// `slice(slices, fill_with=None)`: so many lists of the items.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn slice(value: Value, count: usize, fill: Option<Value>) -> Result<Value, Error> {
    let items = bounds::items(&value)?;
    if count == 0 {
        return Err(fail("slice: expected at least one list"));
    }
    bounds::charge(count.saturating_mul(100))?;
    let (each, rest) = (items.len() / count, items.len() % count);
    let fill = fill.filter(|fill| !fill.is_none());
    let mut from = 0;
    let part = |at: usize| {
        let to = from + each + usize::from(at < rest);
        let mut part = items[from..to].to_vec();
        from = to;
        if at >= rest {
            part.extend(fill.clone());
        }
        Value::from_object(part)
    };
    Ok((0..count).map(part).collect())
}

/// `indent(width=4, first=False, blank=False)`; the width may be a text.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn indent(
    text: &str,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let width = width.or(kwargs.get("width")?).unwrap_or_else(|| Value::from(4));
    let first = first.or(kwargs.get("first")?).unwrap_or(false);
    let blank = blank.or(kwargs.get("blank")?).unwrap_or(false);
    let before = match width.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(width.as_usize().filter(|n| *n <= 1024).ok_or_else(|| fail("indent: no width"))?),
    };
    let lines = text.lines().count();
    bounds::charge(lines.saturating_mul(before.len()).saturating_add(text.len()))?;
    let mut out = String::with_capacity(text.len() + lines * before.len());
    for (at, line) in text.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
        }
        if if at == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&before);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `int(default=0, base=10)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn int(value: Value, default: Option<Value>, base: Option<u32>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default.or(kwargs.get("default")?).unwrap_or_else(|| Value::from(0));
    let base = base.or(kwargs.get("base")?).filter(|base| (2..=36).contains(base)).unwrap_or(10);
    let Some(text) = value.as_str() else {
        if value.is_integer() {
            return Ok(value);
        }
        let number = match value.kind() {
            ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
            _ => f64::try_from(value).ok(),
        };
        return Ok(number
            .filter(|x| x.is_finite() && x.abs() < 9e18)
            .map_or(default, |x| Value::from(x as i64)));
    };
    let digits = text.trim().replace('_', "");
    let digits = match base {
        16 => digits.strip_prefix("0x").unwrap_or(&digits),
        8 => digits.strip_prefix("0o").unwrap_or(&digits),
        2 => digits.strip_prefix("0b").unwrap_or(&digits),
        _ => &digits,
    };
    let whole = i64::from_str_radix(digits, base).ok();
    // text of a float is cut off
    let whole = whole.or_else(|| digits.parse::<f64>().ok().filter(|x| x.abs() < 9e18).map(|x| x as i64));
    Ok(whole.map_or(default, Value::from))
}

/// `float(default=0.0)`.
fn float(value: Value, default: Option<f64>) -> f64 {
    let number = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value).ok(),
    };
    number.or(default).unwrap_or(0.0)
}

/// `round(precision=0, method='common')`; halves go to the even neighbour, as Python rounds.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn round(value: Value, precision: Option<usize>, method: Option<&str>, kwargs: Kwargs) -> Result<f64, Error> {
    let precision = precision.or(kwargs.get("precision")?).unwrap_or(0).min(30);
    let method = method.or(kwargs.get("method")?).unwrap_or("common");
    let x = f64::try_from(value)?;
    let scale = 10_f64.powi(precision as i32);
    Ok(match method {
        "ceil" => (x * scale).ceil() / scale,
        "floor" => (x * scale).floor() / scale,
        // printing rounds the exact value that way
        _ => format!("{x:.precision$}").parse().unwrap_or(x),
    })
}

/// `truncate(length=255, killwords=False, end='...', leeway=5)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn truncate(
    text: &str,
    length: Option<usize>,
    kill: Option<bool>,
    end: Option<&str>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let length = length.or(kwargs.get("length")?).unwrap_or(255);
    let kill = kill.or(kwargs.get("killwords")?).unwrap_or(false);
    let end = end.or(kwargs.get("end")?).unwrap_or("...");
    let leeway = kwargs.get::<Option<usize>>("leeway")?.unwrap_or(5);
    let end_length = end.chars().count();
    if length < end_length {
        return Err(fail("truncate: the length is shorter than the end"));
    }
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let kept: String = text.chars().take(length - end_length).collect();
    let kept = if kill { &kept } else { kept.rsplit_once(' ').map_or(&kept[..], |(before, _)| before) };
    Ok(format!("{kept}{end}"))
}

/// `sum(attribute=None, start=0)`, of numbers and of lists.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn sum(value: Value, attribute: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let attribute = attribute.or(kwargs.get("attribute")?).filter(|key| !key.is_none());
    let start = kwargs.get::<Option<Value>>("start")?.unwrap_or_else(|| Value::from(0));
    let items = value.try_iter()?.map(|item| match &attribute {
        Some(key) => item.get_item(key),
        None => Ok(item),
    });
    if start.kind() == ValueKind::Seq {
        let mut all: Vec<Value> = start.try_iter()?.collect();
        for item in items {
            all.extend(bounds::items(&item?)?);
        }
        return Ok(Value::from_object(all));
    }
    let (mut whole, mut fraction, mut is_whole) = (0_i64, 0.0, true);
    for item in std::iter::once(Ok(start)).chain(items) {
        let item = item?;
        if item.is_integer() {
            let more = i64::try_from(item.clone()).ok().and_then(|n| whole.checked_add(n));
            whole = more.ok_or_else(|| fail("sum: too large"))?;
        } else {
            is_whole = false;
            fraction += f64::try_from(item)?;
        }
    }
    Ok(if is_whole { whole.into() } else { (whole as f64 + fraction).into() })
}

fn center(state: &State<'_, '_>, text: &Value, width: Option<Value>) -> Result<Value, Error> {
    python::method(state, text, "center", &[width.unwrap_or_else(|| Value::from(80))])
}

/// As markupsafe writes it.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn escape(value: Value) -> Result<String, Error> {
    let text = python::text(&value)?;
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(letter),
        }
    }
    bounds::charge(out.len())?;
    Ok(out)
}
