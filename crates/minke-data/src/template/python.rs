//! What Jinja's templates have from Python: how values are written, and methods of text.

use std::borrow::Cow;
use std::fmt::Write;

use minijinja::value::{Rest, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State, Value};

use super::bounds;

/// Deeper values are refused: they are nobody's, and writing them takes stack.
pub(super) const MAX_DEPTH: usize = 200;
/// More text than any context holds.
pub(super) const MAX_TEXT_BYTES: usize = 64 << 20;

fn fail(why: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

/// `repr(x)` of a float: the shortest digits that give it back, with an exponent where it is below -4 or above 15.
pub(super) fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let short = format!("{x:e}");
    let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `str(value)`.
///
/// # Errors
/// It is too long or too deep.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        ValueKind::Undefined => {}
        _ => repr(value, 0, &mut out)?,
    }
    bounds::charge(out.len())?;
    Ok(out)
}

/// `repr(value)`.
fn repr(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > MAX_DEPTH || out.len() > MAX_TEXT_BYTES {
        return Err(fail("a value is too large to be written"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if value.is_integer() => {
            // text cannot fail to grow
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => out.push_str(&float(f64::try_from(value.clone()).unwrap_or(f64::NAN))),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (at, item) in value.try_iter()?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                repr(&item, depth + 1, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                repr(&key, depth + 1, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        // functions, loops and the like: nothing that a prompt is made of
        ValueKind::Bytes | ValueKind::Plain | ValueKind::Invalid => out.push_str(&value.to_string()),
        _ => return Err(fail("a value of an unknown kind cannot be written")),
    }
    Ok(())
}

fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for letter in text.chars() {
        let code = letter as u32;
        // text cannot fail to grow
        let _ = match letter {
            '\\' => out.write_str("\\\\"),
            '\n' => out.write_str("\\n"),
            '\r' => out.write_str("\\r"),
            '\t' => out.write_str("\\t"),
            _ if letter == mark => write!(out, "\\{letter}"),
            _ if is_printable(letter) => out.write_char(letter),
            _ if code < 0x100 => write!(out, "\\x{code:02x}"),
            _ if code < 0x1_0000 => write!(out, "\\u{code:04x}"),
            _ => write!(out, "\\U{code:08x}"),
        };
    }
    out.push(mark);
}

/// Near what `str.isprintable` says: no control, format, private or separating characters but the space.
fn is_printable(letter: char) -> bool {
    let hidden = letter.is_control()
        || letter.is_whitespace() && letter != ' '
        || matches!(letter, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..='\u{10ffff}');
    !hidden
}

/// What `{{ value }}` writes.
pub(super) fn format(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let text = match value.as_str() {
        Some(text) => Cow::Borrowed(text),
        None => Cow::Owned(text(value)?),
    };
    bounds::charge_text(&text)?;
    let done = out.write_str(&text);
    done.map_err(|_| Error::from(ErrorKind::WriteFailure))
}

/// Methods of Python's text, dictionaries and lists.
pub(super) fn method(
    state: &State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    for text in std::iter::once(value).chain(args).filter_map(Value::as_str) {
        bounds::charge_text(text)?;
    }
    let result = called(state, value, name, args)?;
    bounds::charge_result(&result)?;
    Ok(result)
}

fn called(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(text, name, args)
    {
        return result;
    }
    if value.kind() == ValueKind::Seq && name == "index" {
        let (item,): (&Value,) = from_args(args)?;
        let at = value.try_iter()?.position(|other| other == *item);
        return at.map(Value::from).ok_or_else(|| fail("the value is not in the list"));
    }
    if value.kind() == ValueKind::Map && name == "copy" && args.is_empty() {
        return Ok(value.clone());
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// What the engine's own compatibility layer lacks or does otherwise.
fn text_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match name {
        // with a place to look from
        "startswith" | "endswith" if args.len() == 2 => starts_from(text, name, args),
        "replace" => replaced(text, args),
        "join" => from_args(args).and_then(|(items,): (&Value,)| joined(items, text)),
        // of nothing there is one more than letters
        "count" => one(args).map(|x| text.matches(x).count().into()),
        // each letter of the text is held against each that is taken away
        "strip" | "lstrip" | "rstrip" if !args.is_empty() => {
            let letters = args[0].as_str().map_or(0, str::len);
            match bounds::charge(text.len().saturating_mul(letters)) {
                Ok(()) => return None,
                Err(error) => Err(error),
            }
        }
        "format" => match formats(text, args) {
            Ok(()) => return None,
            Err(error) => Err(error),
        },
        "removeprefix" => one(args).map(|x| text.strip_prefix(x).unwrap_or(text).into()),
        "removesuffix" => one(args).map(|x| text.strip_suffix(x).unwrap_or(text).into()),
        "partition" => one(args).map(|x| three(text, text.split_once(x), x, false)),
        "rpartition" => one(args).map(|x| three(text, text.rsplit_once(x), x, true)),
        "rsplit" => rsplit(text, args),
        "index" => one(args).and_then(|x| {
            let at = text.find(x).ok_or_else(|| fail("substring not found"))?;
            Ok(text[..at].chars().count().into())
        }),
        "swapcase" => Ok(text
            .chars()
            .flat_map(|c| -> Vec<char> {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            })
            .collect::<String>()
            .into()),
        "casefold" => Ok(text.to_lowercase().into()),
        "zfill" => padded(text, args, |fill, _| {
            let sign = text.len() - text.trim_start_matches(['+', '-']).len();
            let (sign, digits) = text.split_at(sign.min(1));
            format!("{sign}{}{digits}", "0".repeat(fill))
        }),
        "ljust" => padded(text, args, |fill, with| format!("{text}{}", with.repeat(fill))),
        "rjust" => padded(text, args, |fill, with| format!("{}{text}", with.repeat(fill))),
        "center" => padded(text, args, |fill, with| {
            let width = text.chars().count() + fill;
            let left = fill / 2 + (fill & width & 1);
            format!("{}{text}{}", with.repeat(left), with.repeat(fill - left))
        }),
        "istitle" => Ok(is_title(text).into()),
        "isdecimal" => Ok((!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())).into()),
        _ => return None,
    })
}

/// `by.join(items)`.
fn joined(items: &Value, by: &str) -> Result<Value, Error> {
    let mut out = String::new();
    for (at, item) in items.try_iter()?.enumerate() {
        let before = out.len();
        if at > 0 {
            out.push_str(by);
        }
        out.push_str(&text(&item)?);
        bounds::charge(out.len() - before)?;
    }
    Ok(out.into())
}

fn one(args: &[Value]) -> Result<&str, Error> {
    let (text,): (&str,) = from_args(args)?;
    Ok(text)
}

/// `text.replace(old, new, count=-1)`.
fn replaced(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (old, new, most): (&str, &str, Option<i64>) = from_args(args)?;
    let most = most.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let times = text.matches(old).count().min(most);
    bounds::charge(text.len().saturating_add(times.saturating_mul(new.len())))?;
    Ok(if most == usize::MAX { text.replace(old, new) } else { text.replacen(old, new, most) }.into())
}

/// The filter `replace(old, new, count=None)`.
pub(super) fn replace(text: &Value, old: &Value, new: &Value, most: Option<i64>) -> Result<Value, Error> {
    let [text, old, new] = [text, old, new].map(self::text);
    replaced(&text?, &[old?.into(), new?.into(), most.map_or_else(|| Value::from(-1), Value::from)])
}

/// Whether formatting by a text of `{}` or `%` stays within bounds: no width of more than four digits, and no more text
/// than all arguments at all places.
fn formats(text: &str, args: &[Value]) -> Result<(), Error> {
    let wide = text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4);
    if wide || text.len() > 1 << 16 {
        return Err(fail("a text is formatted too wide"));
    }
    let places = text.matches(['{', '%']).count() + 1;
    let mut bytes = 10_000;
    for arg in args {
        bytes += self::text(arg).map_or(0, |text| text.len());
    }
    bounds::charge(places.saturating_mul(bytes))
}

/// The filter `format`, which writes by `%`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
pub(super) fn percent(text: &str, args: Rest<Value>) -> Result<String, Error> {
    formats(text, &args)?;
    minijinja::format_filter(minijinja::FormatStyle::Printf, text, &args)
}

fn starts_from(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, from): (&str, usize) = from_args(args)?;
    let rest = text.char_indices().nth(from).map_or("", |(at, _)| &text[at..]);
    Ok(if name == "startswith" { rest.starts_with(what) } else { rest.ends_with(what) }.into())
}

fn three(text: &str, found: Option<(&str, &str)>, by: &str, from_right: bool) -> Value {
    let parts = match found {
        Some((before, after)) => [before, by, after],
        None if from_right => ["", "", text],
        None => [text, "", ""],
    };
    parts.into_iter().collect()
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (by, most): (Option<&str>, Option<i64>) = from_args(args)?;
    let most = most.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
    let mut parts: Vec<&str> = match by {
        Some("") => return Err(fail("rsplit: empty separator")),
        Some(by) => text.rsplitn(most, by).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() && parts.len() + 1 < most {
                let at = rest.rfind(char::is_whitespace);
                let begin = at.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
                parts.push(&rest[begin..]);
                rest = rest[..begin].trim_end();
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts.into_iter().collect())
}

fn padded(text: &str, args: &[Value], pad: impl Fn(usize, &str) -> String) -> Result<Value, Error> {
    let (width, with): (usize, Option<&str>) = from_args(args)?;
    if width > MAX_TEXT_BYTES / 4 {
        return Err(fail("a text is padded too far"));
    }
    let with = with.unwrap_or(" ");
    if with.chars().count() != 1 {
        return Err(fail("the fill character must be exactly one character long"));
    }
    let fill = width.saturating_sub(text.chars().count());
    bounds::charge(fill.saturating_mul(with.len()))?;
    Ok(if fill == 0 { text.into() } else { pad(fill, with).into() })
}

fn is_title(text: &str) -> bool {
    let (mut after_letter, mut any) = (false, false);
    for letter in text.chars() {
        if letter.is_uppercase() && after_letter || letter.is_lowercase() && !after_letter {
            return false;
        }
        after_letter = letter.is_alphabetic();
        any |= after_letter;
    }
    any
}
