//! `minke export`: a model as a folder or a file for other programs.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use minke_data::gguf::TensorType;
use minke_num::blocks::BlockFormat;
use minke_train::export::{Exported, Format, GgufOptions, Options, Progress, export, export_gguf};
use serde::Serialize;

use super::progress::Bar;
use crate::cli::{Export, ExportDtype, ExportTo, ScaleFormat};
use crate::failure::Failure;
use crate::interrupt::{self, Work};
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
    if args.scale_fmt.is_some() && args.dtype != ExportDtype::Fp8 {
        return Err(Failure::user("--scale-fmt is about the scales of FP8, and this export has none")
            .hint("leave it out, or add --dtype fp8"));
    }
    let began = Instant::now();
    let mut on_progress = on_progress(args.json);
    let (done, dtype) = match args.to {
        ExportTo::Hf => {
            let (format, dtype) = format(args)?;
            let options = Options { out: args.out.clone(), format, force: args.force };
            (export(&args.model, &options, &mut on_progress)?, dtype)
        }
        ExportTo::Gguf => {
            let (kind, dtype) = kind(args)?;
            let options = GgufOptions { out: args.out.clone(), kind, force: args.force };
            (export_gguf(&args.model, &options, &mut on_progress)?, dtype)
        }
    };
    drop(on_progress);
    for note in &done.notes {
        output::note(&format!("note: {note}"));
    }
    let scale_fmt = done.quantization.map(|q| if q.power_of_two { "ue8m0" } else { "f32" });
    if args.json {
        let largest_error = done.largest_error.as_ref();
        return output::json(&Report {
            model: &done.source,
            out: &args.out,
            to: match args.to {
                ExportTo::Hf => "hf",
                ExportTo::Gguf => "gguf",
            },
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

/// Shows how far writing is, and ends it at Ctrl-C.
pub fn on_progress(quiet: bool) -> impl FnMut(Progress) -> ControlFlow<()> {
    interrupt::install();
    let (work, mut bar) = (Work::begin(), Bar::new("weights", quiet));
    move |progress| {
        bar.set(progress.done, progress.total, || bytes(progress.bytes as f64));
        if work.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// What a folder's weights are stored in, and its name.
fn format(args: &Export) -> Result<(Format, &'static str), Failure> {
    let power_of_two = args.scale_fmt.map(|format| format == ScaleFormat::Ue8m0);
    match args.dtype {
        ExportDtype::Fp8 => Ok((Format::Fp8 { power_of_two }, "fp8")),
        ExportDtype::Bf16 => Ok((Format::Bf16, "bf16")),
        ExportDtype::F32 => Ok((Format::F32, "f32")),
        ExportDtype::F16 | ExportDtype::Q8_0 => {
            Err(Failure::user("--dtype f16 and q8_0 are for GGUF files")
                .hint("--to hf takes fp8, bf16 or f32"))
        }
    }
}

/// What a file's matrices are stored in, and its name.
fn kind(args: &Export) -> Result<(TensorType, &'static str), Failure> {
    match args.dtype {
        ExportDtype::Bf16 => Ok((TensorType::Bf16, "bf16")),
        ExportDtype::F32 => Ok((TensorType::F32, "f32")),
        ExportDtype::F16 => Ok((TensorType::F16, "f16")),
        ExportDtype::Q8_0 => Ok((TensorType::Blocks(BlockFormat::Q8_0), "q8_0")),
        ExportDtype::Fp8 => {
            Err(Failure::user("GGUF has no fp8").hint("--to gguf takes f32, bf16, f16 or q8_0"))
        }
    }
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
