//! GGUF files of models are hostile: damaged ones are errors in bounded time and memory, or models that run.
//! `cargo run --release --example fuzz_model -p minke-infer -- --seconds N` looks for longer; what it finds is kept in
//! `found.rs`.

#[path = "../../../minke-data/tests/hostile/case.rs"]
mod case;
mod found;
#[path = "../../../minke-data/tests/hostile/meter.rs"]
mod meter;
#[path = "../../../minke-data/tests/hostile/mutate.rs"]
mod mutate;
mod targets;

#[global_allocator]
static METER: meter::Meter = meter::Meter;

// one test, so that no other takes memory meanwhile
#[test]
fn damaged_models_are_errors() {
    std::panic::set_hook(Box::new(|_| {}));
    let faults = case::faults(&targets::TARGETS, &found::all());
    let _ = std::panic::take_hook();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
