//! Jinja as transformers sets it up, with bounds.

use std::io::{self, Write};

use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde::Serialize;

use super::{bounds, filters, python};
use crate::error::guard;

/// Steps of one rendering; a long conversation takes some hundreds a message.
const FUEL: u64 = 4_000_000;
/// Templates call macros within macros a few levels deep.
const MAX_DEPTH: usize = 100;
/// More text than any context holds.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// What is freed and compared level by level, and the parser's own depth.
const STACK_BYTES: usize = 16 << 20;
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
    // a template knows no others, nor itself: including it many times would be another loop
    environment.set_path_join_callback(|_, _| "".into());
    filters::add(&mut environment);
    bounds::add(&mut environment);
    for (name, source) in sources {
        // line ends are told as Jinja tells them
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let bounded = bounds::rewritten(&source);
        // what is no template for us is refused by the engine, in better words
        let template = bounded.clone().unwrap_or(source);
        guard(|| environment.add_template_owned(*name, template))
            .and_then(|done| done.map_err(|e| shown(&e)))?;
        if bounded.is_none() {
            return Err("a tag does not end".to_owned());
        }
    }
    Ok(environment)
}

/// Runs a template; an error is text.
pub(super) fn render(
    environment: &Environment<'static>,
    name: &str,
    variables: &impl Serialize,
    given_bytes: usize,
) -> Result<String, String> {
    let variables = Value::from_serialize(variables);
    let run = move || {
        bounds::begin(given_bytes);
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
