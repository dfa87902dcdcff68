//! Jinja as transformers sets it up, with bounds.

use std::io::{self, Write};

use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde::Serialize;

use super::{filters, python};
use crate::error::guard;

/// Steps of one rendering; a long conversation takes some hundreds a message.
const FUEL: u64 = 4_000_000;
/// Templates call macros within macros a few levels deep.
const MAX_DEPTH: usize = 100;
/// More text than any context holds.
const MAX_OUTPUT_BYTES: usize = 256 << 20;
/// What is freed and compared level by level may have as many levels as there are steps; only address space is taken.
const STACK_BYTES: usize = 1 << 30;
/// The template of an environment, and the one for conversations with tools where a model has two.
pub(super) const CHAT: &str = "chat";
pub(super) const TOOL_USE: &str = "tool_use";

/// Compiles templates by name; an error is text.
pub(super) fn compile(sources: &[(&'static str, &str)]) -> Result<Environment<'static>, String> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_DEPTH);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(python::format);
    // `.strip()`, `.split()`, `.items()` and the like, which Jinja has from Python
    environment.set_unknown_method_callback(python::method);
    filters::add(&mut environment);
    for (name, source) in sources {
        // line ends are told as Jinja tells them
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let source = without_generation_marks(&source);
        guard(|| environment.add_template_owned(*name, source))
            .and_then(|done| done.map_err(|e| shown(&e)))?;
    }
    Ok(environment)
}

/// Runs a template; an error is text.
pub(super) fn render(
    environment: &Environment<'static>,
    name: &str,
    variables: &impl Serialize,
) -> Result<String, String> {
    let variables = Value::from_serialize(variables);
    let run = move || {
        let mut out = Bounded(Vec::new());
        let run = || {
            let template = environment.get_template(name)?;
            template.render_captured_to(variables, &mut out).map(|_| ())
        };
        guard(run)?.map_err(|error| shown(&error))?;
        String::from_utf8(out.0).map_err(|_| "it writes no UTF-8".to_owned())
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
        let thread = thread.map_err(|error| format!("no thread to run it: {error}"))?;
        thread.join().unwrap_or_else(|_| Err("it failed while it ended".to_owned()))
    })
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
