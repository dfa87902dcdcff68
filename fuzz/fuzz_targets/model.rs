#![no_main]

mod entry;

libfuzzer_sys::fuzz_target!(init: entry::begin(), |file: &[u8]| entry::run("model", file));
