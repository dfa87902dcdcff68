//! Jinja as transformers sets it up, with bounds.

use std::io::{self, Write};

use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

use super::{Message, Names, RenderOptions, Thinking};
use crate::error::guard;

/// Steps of one rendering; a long conversation takes some hundreds a message.
const FUEL: u64 = 20_000_000;
/// Templates call macros within macros a few levels deep.
const MAX_DEPTH: usize = 100;
/// More text than any context holds.
const MAX_OUTPUT_BYTES: usize = 256 << 20;
/// 26 July 2024, the day that Llama's templates fall back to.
const NOW_S: u64 = 1_721_952_000;
/// The one template of an environment.
const NAME: &str = "chat";

/// Compiles a template; an error is text.
pub(super) fn compile(source: &str) -> Result<Environment<'static>, String> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_DEPTH);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    // `.strip()`, `.split()`, `.items()` and the like, which Jinja has from Python
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |why: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, why))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    let source = without_generation_marks(source);
    guard(|| environment.add_template_owned(NAME, source)).and_then(|done| done.map_err(|e| shown(&e)))?;
    Ok(environment)
}

#[derive(Serialize)]
struct Variables<'a> {
    messages: &'a [Message],
    add_generation_prompt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    enable_thinking: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<bool>,
    #[serde(flatten)]
    names: &'a Names,
}

/// Runs a template; an error is text.
pub(super) fn render(
    environment: &Environment<'static>,
    names: &Names,
    messages: &[Message],
    options: RenderOptions,
) -> Result<String, String> {
    // the names that published templates use for this
    let thinks = match options.thinking {
        Thinking::Default => None,
        Thinking::Open => Some(true),
        Thinking::Empty => Some(false),
    };
    let variables = Variables {
        messages,
        add_generation_prompt: options.add_generation_prompt,
        enable_thinking: thinks,
        thinking: thinks,
        names,
    };
    let mut out = Bounded(Vec::new());
    let run = || {
        let template = environment.get_template(NAME)?;
        template.render_captured_to(variables, &mut out).map(|_| ())
    };
    guard(run)?.map_err(|error| shown(&error))?;
    String::from_utf8(out.0).map_err(|_| "it writes no UTF-8".to_owned())
}

/// What went wrong, and where.
fn shown(error: &Error) -> String {
    let why = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let why: String = why.chars().take(300).collect();
    match (error.kind(), error.line()) {
        (ErrorKind::OutOfFuel, _) => format!("it does not end within {FUEL} steps"),
        (_, Some(line)) => format!("line {line}: {}", why.escape_debug()),
        (_, None) => why.escape_debug().to_string(),
    }
}

struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other(format!("it writes more than {MAX_OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Some templates mark what the model wrote by a tag that only transformers knows; here that is found otherwise.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        let Some(end) = tag.find("%}").map(|end| end + 2) else { break };
        let inside = tag[2..end - 2].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(before);
        match inside {
            "generation" => out.push_str(&tag[..end].replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag[..end].replacen("endgeneration", "endif", 1)),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: other separators and escapes than the engine's own.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn to_json(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    struct Python;
    impl Formatter for Python {
        fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
            if first { Ok(()) } else { writer.write_all(b", ") }
        }
        fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
            if first { Ok(()) } else { writer.write_all(b", ") }
        }
        fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
            CompactFormatter.begin_object_value(writer)?;
            writer.write_all(b" ")
        }
    }
    let indent = kwargs.get::<Option<usize>>("indent")?.map(|n| " ".repeat(n.min(16)));
    let mut out = Vec::new();
    let done = match &indent {
        Some(indent) => {
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Python)),
    };
    done.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    Ok(Value::from(String::from_utf8(out).expect("JSON is UTF-8")))
}

/// A day by the codes that templates use, and always the same: what a model is trained on and asked must not depend
/// on the clock.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
fn strftime_now(format: String) -> Result<String, Error> {
    strftime(&format, NOW_S).map_err(|why| Error::new(ErrorKind::InvalidOperation, why))
}

pub(super) fn strftime(format: &str, now_s: u64) -> Result<String, String> {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, second) = (now_s / 86_400, now_s % 86_400);
    let (year, month, day) = civil(days);
    let (weekday, month_name) = (DAYS[(days % 7) as usize], MONTHS[month as usize - 1]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let code = letters.next();
        let (code, bare) = if code == Some('-') { (letters.next(), true) } else { (code, false) };
        let two = |number: u64| if bare { number.to_string() } else { format!("{number:02}") };
        out.push_str(&match code {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('H') => two(second / 3600),
            Some('M') => two(second / 60 % 60),
            Some('S') => two(second % 60),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('%') => "%".to_owned(),
            other => return Err(format!("strftime_now knows no code {other:?}")),
        });
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1 January 1970, in years of 400 that begin in March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}
