#![no_main]
#![allow(dead_code, reason = "one target of several")]

#[path = "../../crates/minke-data/tests/hostile/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    let target = targets::TARGETS.iter().find(|target| target.name == "gguf").expect("it is listed");
    (target.run)(file);
});
