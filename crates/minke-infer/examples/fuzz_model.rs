//! Damages GGUF files of whole models and takes them in, up to a few tokens, for as long as is asked.
//!
//! ```text
//! cargo run --release --example fuzz_model -p minke-infer -- [model] [--seconds N] [--seed S] [--file FILE] [--corpus FOLDER]
//! ```
//!
//! As `cargo run --release --example fuzz -p minke-data`, which has the other formats.

use std::process::ExitCode;

#[path = "../../minke-data/tests/hostile/case.rs"]
mod case;
#[path = "../../minke-data/tests/hostile/fuzz.rs"]
mod fuzz;
#[path = "../../minke-data/tests/hostile/meter.rs"]
mod meter;
#[path = "../../minke-data/tests/hostile/mutate.rs"]
mod mutate;
#[path = "../tests/hostile/targets.rs"]
mod targets;

#[global_allocator]
static METER: meter::Meter = meter::Meter;

fn main() -> ExitCode {
    fuzz::main(&targets::TARGETS)
}
