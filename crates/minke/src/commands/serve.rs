//! `minke serve`: a model over HTTP.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use minke_cpu::Cpu;
use minke_infer::{Service, ServiceOptions, Settings, can_draft};
use minke_serve::{Finished, Limits, Options, ServeError, Served, serve};

use super::{draft_model, open, rate, speculation, threads, tokenizer};
use crate::cli::Serve;
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output;

/// Runs the command.
pub fn run(args: &Serve) -> Result<(), Failure> {
    let options = options(args)?;
    // a model is not loaded in vain
    let listener = listen(address(&args.addr)?)?;
    let addr = listener.local_addr().map_err(|error| Failure::other(error.to_string()))?;
    let cpu = Cpu::detect(threads(args.model.threads));
    let mut loaded = open(&args.model, &cpu)?;
    let tokenizer = tokenizer(&loaded)?;
    let template = loaded.template()?;
    if template.is_none() {
        output::note("note: the model has no chat template: only /v1/completions can be asked");
    }
    let served = Served {
        name: args.name.clone().unwrap_or_else(|| name(&args.model.model)),
        tokenizer: tokenizer.clone(),
        stop_ids: loaded.stop_ids_with(template.as_ref()),
        template,
        bos: loaded.bos(),
        defaults: Settings::suggested(&loaded.generation).sampling,
        speculation: speculation(args.speculation.speculate),
    };
    let draft = draft_model(&args.speculation, &args.model, &cpu)?;
    can_draft(&loaded.model, draft.is_some(), served.speculation)
        .map_err(|error| Failure::user(error.to_string()))?;
    if let Some(note) = loaded.leave_room(options.cache_bytes as u64) {
        output::note(&format!("warning: {note}; --cache-gib gives them less"));
    }
    // who serves will read them often
    loaded.model.copy_mapped_weights_now(&cpu);
    let service = Service::start(
        loaded.model,
        cpu,
        Some(tokenizer),
        draft.map(|draft| (draft.model, draft.tokenizer)),
        options,
    )
    .map_err(|error| Failure::user(error.to_string()))?;
    let handle = service.handle();
    if handle.context() < handle.model_context() {
        output::note(&format!(
            "note: {} GiB of cache hold {} tokens, fewer than the model's context of {}; --cache-gib gives more",
            args.cache_gib,
            handle.context(),
            handle.model_context()
        ));
    }
    if !addr.ip().is_loopback() {
        output::note(&format!(
            "warning: {addr} can be reached from other machines, and there is no password; 127.0.0.1 cannot"
        ));
    }
    interrupt::install();
    let work = Work::begin();
    let treats = Options {
        limits: Limits { time: Duration::from_secs(args.timeout), ..Limits::default() },
        origins: args.allow_origin.clone(),
        log: Arc::new(|finished| output::note(&line(finished))),
    };
    output::note(&format!("Serving {} on http://{addr}/v1. Ctrl-C stops.", served.name));
    serve(listener, handle, served, treats, &work.flag()).map_err(|error| {
        let failure = Failure::other(error.to_string());
        match error {
            ServeError::Model => failure.hint("start the server again"),
            ServeError::System(_) => failure,
        }
    })
}

fn listen(addr: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(addr).map_err(|error| {
        Failure::user(format!("cannot listen on {addr}: {error}"))
            .hint("--addr takes another address, such as 127.0.0.1:0, whose port is one that is free")
    })
}

/// A request that is over, on a line.
fn line(finished: &Finished) -> String {
    let Finished { method, path, status, answered, time } = finished;
    let head = format!("{method} {} {status} in {:.2} s", output::printable(path), time.as_secs_f64());
    let Some(answered) = answered else { return head };
    format!(
        "{head}: {} tokens read, {} of them from the cache, {} written at {:.1}/s, {}",
        answered.prompt,
        answered.cached,
        answered.written,
        rate(answered.written.saturating_sub(1), answered.decode.as_secs_f64()),
        answered.reason
    )
}

fn options(args: &Serve) -> Result<ServiceOptions, Failure> {
    const GIB: f64 = (1u64 << 30) as f64;
    if !(0.0..=1e6).contains(&args.cache_gib) {
        return Err(Failure::user(format!("--cache-gib: expected 0 to 1000000, got {}", args.cache_gib)));
    }
    let max_running = args.parallel as usize;
    let plain = ServiceOptions::default();
    Ok(ServiceOptions {
        max_running,
        max_waiting: args.queue as usize,
        // who is answered takes a token of each call, and there shall be room for prompts beside
        tokens_per_call: plain.tokens_per_call.max(2 * max_running),
        cache_bytes: (args.cache_gib * GIB) as usize,
        cache: super::cache(args.cache.cache),
        ..plain
    })
}

/// The first address of a host and port.
fn address(text: &str) -> Result<SocketAddr, Failure> {
    let port = if text.parse::<u16>().is_ok() { text } else { "8080" };
    let fail = |reason: String| {
        Failure::user(format!("--addr {}: {reason}", text.escape_debug()))
            .hint(format!("expected HOST:PORT, such as 127.0.0.1:{port}"))
    };
    let mut found = text.to_socket_addrs().map_err(|error| fail(error.to_string()))?;
    found.next().ok_or_else(|| fail("no such host".to_owned()))
}

/// What clients call a model: a hub id as it is, a folder by its last part.
fn name(argument: &str) -> String {
    let path = Path::new(argument);
    let last = path.file_name().map(|last| last.to_string_lossy().into_owned());
    last.filter(|_| path.exists()).unwrap_or_else(|| argument.to_owned())
}
