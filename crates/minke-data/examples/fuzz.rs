//! Damages valid files of a format and takes them in, for as long as is asked.
//!
//! ```text
//! cargo run --release --example fuzz -p minke-data -- [safetensors|gguf|tokenizer|template|transcript] [--seconds N]
//!     [--seed S] [--file FILE] [--corpus FOLDER]
//! ```
//!
//! A file that makes a panic, takes too much memory or too long is written to `fuzz-TARGET-SEED-CASE` in the folder for
//! temporary files; `--file` runs one. `--corpus` damages nothing: it writes the valid files, and a dictionary
//! of the formats' words, for a fuzzer with coverage (`fuzz/run`).

use std::process::ExitCode;

#[path = "../tests/hostile/case.rs"]
mod case;
#[path = "../tests/hostile/fuzz.rs"]
mod fuzz;
#[path = "../tests/hostile/meter.rs"]
mod meter;
#[path = "../tests/hostile/mutate.rs"]
mod mutate;
#[path = "../tests/hostile/targets.rs"]
mod targets;

#[global_allocator]
static METER: meter::Meter = meter::Meter;

fn main() -> ExitCode {
    fuzz::main(&targets::TARGETS)
}
