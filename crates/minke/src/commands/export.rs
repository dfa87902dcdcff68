//! `minke export`: a model as a folder for other programs.

use std::path::Path;
use std::time::Instant;

use minke_train::export::{Exported, Format, Options, export};
use serde::Serialize;

use super::progress::Bar;
use crate::cli::{Export, ExportDtype, ExportTo, ScaleFormat};
use crate::failure::Failure;
use crate::output::{self, bytes};

#[derive(Serialize)]
struct LargestError<'a> {
    tensor: &'a str,
    /// Norm of the difference over the norm of the weight.
    relative: f64,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a Path,
    out: &'a Path,
    to: &'static str,
    dtype: &'static str,
    scale_fmt: Option<&'static str>,
    tensors: usize,
    quantized: usize,
    kept: usize,
    bytes: u64,
    largest_error: Option<LargestError<'a>>,
    seconds: f64,
}

/// Runs the command.
pub fn run(args: &Export) -> Result<(), Failure> {
    if args.to == ExportTo::Gguf {
        return Err(
            Failure::user("GGUF files are not written yet").hint("--to hf writes a Hugging Face folder")
        );
    }
    if args.scale_fmt.is_some() && args.dtype != ExportDtype::Fp8 {
        return Err(Failure::user("--scale-fmt is about the scales of FP8, and this export has none")
            .hint("leave it out, or add --dtype fp8"));
    }
    let power_of_two = args.scale_fmt.map(|format| format == ScaleFormat::Ue8m0);
    let (format, dtype) = match args.dtype {
        ExportDtype::Fp8 => (Format::Fp8 { power_of_two }, "fp8"),
        ExportDtype::Bf16 => (Format::Bf16, "bf16"),
        ExportDtype::F32 => (Format::F32, "f32"),
    };
    let began = Instant::now();
    let options = Options { out: args.out.clone(), format, force: args.force };
    let mut bar = Bar::new("weights", args.json);
    let done = export(&args.model, &options, &mut |progress| {
        bar.set(progress.done as u64, progress.total as u64, || bytes(progress.bytes as f64));
    })?;
    drop(bar);
    for note in &done.notes {
        output::note(&format!("note: {note}"));
    }
    let scale_fmt = done.quantization.map(|q| if q.power_of_two { "ue8m0" } else { "f32" });
    if args.json {
        let largest_error = done.largest_error.as_ref();
        return output::json(&Report {
            model: &done.source,
            out: &args.out,
            to: "hf",
            dtype,
            scale_fmt,
            tensors: done.tensors,
            quantized: done.quantized,
            kept: done.kept,
            bytes: done.bytes,
            largest_error: largest_error
                .map(|(tensor, relative)| LargestError { tensor, relative: *relative }),
            seconds: began.elapsed().as_secs_f64(),
        });
    }
    output::text(&text(args, &done, dtype, scale_fmt))
}

fn text(args: &Export, done: &Exported, dtype: &str, scale_fmt: Option<&str>) -> String {
    let mut rows = vec![
        ("model", done.source.display().to_string()),
        ("written", format!("{} ({dtype})", args.out.display())),
        ("tensors", format!("{}, {}", done.tensors, bytes(done.bytes as f64))),
    ];
    if let Some(scale_fmt) = scale_fmt {
        let kept =
            if done.kept > 0 { format!(", {} of them as they were", done.kept) } else { String::new() };
        rows.push(("in FP8", format!("{} weights, scales in {scale_fmt}{kept}", done.quantized)));
    }
    if let Some((tensor, error)) = &done.largest_error {
        rows.push(("largest error", format!("{} of {tensor}", output::percent(*error))));
    }
    output::table(&rows)
}
