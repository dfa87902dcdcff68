//! `minke quantize`: a model with weights of a few bits.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use minke_cpu::Cpu;
use minke_data::gguf::TensorType;
use minke_infer::quantize::{ExpertRows, Importance, LayerRows, Mix, Quantizer, Share};
use minke_infer::{ModelFiles, load_model};
use minke_model::Purpose;
use minke_train::export::{may_write_file, write_file};
use serde::Serialize;

use super::progress::Bar;
use super::{export, read_file, threads, tokenizer};
use crate::cli::{Export, ExportDtype, ExportTo, Quantize, QuantizeTo};
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output::{self, bytes, count};

/// No text is larger.
const MOST_TEXT_BYTES: u64 = 256 << 20;
/// A text of fewer tokens says little.
const FEW_TOKENS: usize = 4096;
/// Rare experts that are named.
const MOST_NAMED: usize = 5;

#[derive(Serialize)]
struct Report<'a> {
    model: &'a Path,
    out: &'a Path,
    to: &'static str,
    tensors: usize,
    bytes: u64,
    weights: u64,
    bits_per_weight: f64,
    formats: Vec<Format>,
    largest_error: Option<LargestError<'a>>,
    importance: Option<Read<'a>>,
    threads: usize,
    seconds: f64,
}

#[derive(Serialize)]
struct Format {
    name: &'static str,
    tensors: usize,
    weights: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct LargestError<'a> {
    tensor: &'a str,
    /// Norm of the difference over the norm of the weight.
    relative: f64,
}

/// What the model read for `--imatrix`.
#[derive(Serialize)]
struct Read<'a> {
    text: &'a Path,
    tokens: usize,
    /// Matrices in blocks whose columns have an importance.
    weighted: usize,
    /// Tokens that came to each expert.
    layers: Vec<Layer<'a>>,
    /// Experts that so few came to that their layer stands for them.
    rare: Vec<Rare>,
}

#[derive(Serialize)]
struct Layer<'a> {
    layer: usize,
    expert_tokens: &'a [u64],
}

#[derive(Serialize)]
struct Rare {
    layer: usize,
    expert: usize,
    tokens: u64,
}

/// Runs the command.
pub fn run(args: &Quantize) -> Result<(), Failure> {
    let Some(mix) = mix(args.to) else { return fp8(args) };
    let began = Instant::now();
    let files = ModelFiles::find(&args.model)?;
    // before a text is read
    may_write_file(&args.out, &files.path, args.force)?;
    if files.config.quantization.is_some() || files.gguf().is_some() {
        output::note("note: what the model has lost where it is in few bits already stays lost");
    }
    let cpu = Cpu::detect(threads(args.threads));
    let importance = match &args.imatrix {
        Some(text) => Some(importance(args, text, &cpu)?),
        None => None,
    };
    let mut quantizer = Quantizer::new(&cpu, mix, &files.config, importance.as_ref());
    let mut more = Vec::new();
    if let (Some(text), Some(importance)) = (&args.imatrix, &importance) {
        let name = text.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        more.push(("quantize.imatrix.dataset".to_owned(), name.into()));
        let entries = u32::try_from(importance.len()).unwrap_or(u32::MAX);
        more.push(("quantize.imatrix.entries_count".to_owned(), entries.into()));
    }
    let mut on_progress = export::on_progress(args.json);
    let done = write_file(&files, &args.out, args.force, &more, &mut quantizer, &mut on_progress)?;
    drop(on_progress);
    for note in done.notes.iter().chain(&instead(&quantizer)) {
        output::note(&format!("note: {note}"));
    }
    let report = Report {
        model: &done.source,
        out: &args.out,
        to: mix.name(),
        tensors: done.tensors,
        bytes: done.bytes,
        weights: quantizer.shares.values().map(|share| share.elements).sum(),
        bits_per_weight: quantizer.bits_per_weight(),
        formats: formats(&quantizer),
        largest_error: quantizer
            .largest_error
            .as_ref()
            .map(|(tensor, relative)| LargestError { tensor, relative: *relative }),
        importance: args
            .imatrix
            .as_deref()
            .zip(importance.as_ref())
            .map(|(text, importance)| read(text, importance, quantizer.weighted)),
        threads: cpu.threads(),
        seconds: began.elapsed().as_secs_f64(),
    };
    if let Some(read) = &report.importance {
        warn(read);
    }
    if args.json { output::json(&report) } else { output::text(&text(&report)) }
}

/// The mix of a format; none for FP8, which is a folder.
fn mix(to: QuantizeTo) -> Option<Mix> {
    match to {
        QuantizeTo::Q8_0 => Some(Mix::Q8_0),
        QuantizeTo::Q6K => Some(Mix::Q6K),
        QuantizeTo::Q5KM => Some(Mix::Q5KM),
        QuantizeTo::Q4KM => Some(Mix::Q4KM),
        QuantizeTo::Q4_0 => Some(Mix::Q4_0),
        QuantizeTo::Fp8 => None,
    }
}

/// What `minke export --to hf --dtype fp8` does.
fn fp8(args: &Quantize) -> Result<(), Failure> {
    if args.imatrix.is_some() {
        return Err(Failure::user(
            "--imatrix has no effect on FP8: a square's scale follows from its largest weight",
        )
        .hint("leave it out, or choose one of the Q formats"));
    }
    if args.threads.threads.is_some() {
        output::note("note: --threads has no effect on FP8, which one thread writes");
    }
    export::run(&Export {
        model: args.model.clone(),
        to: ExportTo::Hf,
        dtype: ExportDtype::Fp8,
        scale_fmt: None,
        out: args.out.clone(),
        force: args.force,
        json: args.json,
    })
}

/// Lets the model read the text.
fn importance(args: &Quantize, text: &Path, cpu: &Cpu) -> Result<Importance, Failure> {
    let read = read_file(text, MOST_TEXT_BYTES)?;
    let about = |reason: String| Failure::user(format!("{}: {reason}", text.display()));
    let read = String::from_utf8(read)
        .map_err(|error| about(format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to())))?;
    let mut loaded = load_model(&args.model, None, Purpose::Run(cpu))?;
    let tokenizer = tokenizer(&loaded).map_err(|failure| failure.hint("leave --imatrix out"))?;
    let tokens = tokenizer.encode(&read)?;
    let bos = loaded.bos();
    interrupt::install();
    let work = Work::begin();
    let mut bar = Bar::new("tokens read", args.json);
    let found = Importance::measure(&mut loaded.model, cpu, bos, &tokens, &mut |done, all| {
        bar.set(done as u64, all as u64, String::new);
        if work.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    drop(bar);
    found.map_err(|error| about(error.to_string()))?.ok_or_else(Failure::interrupted)
}

/// What is said of matrices that are in other blocks than was asked for.
fn instead(quantizer: &Quantizer<'_>) -> Option<String> {
    let counts: Vec<String> = quantizer
        .instead
        .iter()
        .map(|((meant, kind), count)| format!("{count} in {kind} instead of {meant}"))
        .collect();
    let all: usize = quantizer.instead.values().sum();
    (all > 0).then(|| {
        format!("rows of {all} matrices do not fill the blocks meant for them: {}", counts.join(", "))
    })
}

fn formats(quantizer: &Quantizer<'_>) -> Vec<Format> {
    let format = |(kind, share): (&TensorType, &Share)| Format {
        name: kind.name(),
        tensors: share.tensors,
        weights: share.elements,
        bytes: share.bytes,
    };
    let mut formats: Vec<Format> = quantizer.shares.iter().map(format).collect();
    formats.sort_by_key(|format| std::cmp::Reverse(format.bytes));
    formats
}

fn read<'a>(text: &'a Path, importance: &'a Importance, weighted: usize) -> Read<'a> {
    let layer = |layer: &'a LayerRows| Layer { layer: layer.layer, expert_tokens: &layer.rows };
    let rare = |rare: ExpertRows| Rare { layer: rare.layer, expert: rare.expert, tokens: rare.rows };
    Read {
        text,
        tokens: importance.tokens,
        weighted,
        layers: importance.layers.iter().map(layer).collect(),
        rare: importance.rare_experts().map(rare).collect(),
    }
}

/// What a user should know of a text that says too little.
fn warn(read: &Read<'_>) {
    if read.tokens < FEW_TOKENS {
        output::note(&format!(
            "warning: {} has {} tokens, which say little of what matters; some hundred thousand are usual",
            read.text.display(),
            read.tokens
        ));
    }
    if read.rare.is_empty() {
        return;
    }
    let experts: usize = read.layers.iter().map(|layer| layer.expert_tokens.len()).sum();
    let named: Vec<String> = read
        .rare
        .iter()
        .take(MOST_NAMED)
        .map(|rare| format!("layer {} expert {} ({} tokens)", rare.layer, rare.expert, rare.tokens))
        .collect();
    let rest = if read.rare.len() > named.len() { ", ..." } else { "" };
    output::note(&format!(
        "warning: {} of {experts} experts saw too few tokens, and are weighed as their layer's others: {}{rest}; a longer \
         or more varied text reaches more",
        read.rare.len(),
        named.join(", ")
    ));
}

fn text(report: &Report<'_>) -> String {
    let formats =
        |format: &Format| format!("{} {} ({})", format.tensors, format.name, bytes(format.bytes as f64));
    let formats: Vec<String> = report.formats.iter().map(formats).collect();
    let mut rows = vec![
        ("model", report.model.display().to_string()),
        ("written", format!("{} ({})", report.out.display(), report.to)),
        ("weights", format!("{}, {:.2} bits each", count(report.weights as f64), report.bits_per_weight)),
        ("tensors", format!("{}, {}: {}", report.tensors, bytes(report.bytes as f64), formats.join(", "))),
    ];
    if let Some(LargestError { tensor, relative }) = &report.largest_error {
        rows.push(("largest error", format!("{} of {tensor}", output::percent(*relative))));
    }
    let Some(read) = &report.importance else { return output::table(&rows) };
    rows.push((
        "importance",
        format!("{} tokens of {}, {} matrices weighed", read.tokens, read.text.display(), read.weighted),
    ));
    let mut text = output::table(&rows);
    if !read.layers.is_empty() {
        text.push_str("\nlayer   tokens of an expert: fewest   median     most\n");
        for layer in &read.layers {
            let mut tokens = layer.expert_tokens.to_vec();
            tokens.sort_unstable();
            let [fewest, median, most] =
                [0, tokens.len() / 2, tokens.len().saturating_sub(1)].map(|at| tokens[at]);
            text.push_str(&format!("{:5} {fewest:28} {median:8} {most:8}\n", layer.layer));
        }
    }
    text
}
