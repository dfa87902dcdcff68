//! What the targets have in common.
#![allow(dead_code, reason = "one target of several")]

#[path = "../../crates/minke-data/tests/hostile/targets.rs"]
mod files;
#[path = "../../crates/minke-infer/tests/hostile/targets.rs"]
mod models;

/// A panic that the entry functions catch, such as one of a library, is none; libFuzzer's own hook ends the process at any.
pub fn begin() {
    std::panic::set_hook(Box::new(|_| {}));
}

/// Takes a file in as a format.
pub fn run(name: &str, file: &[u8]) {
    let of_files = files::TARGETS.iter().find(|target| target.name == name).map(|target| target.run);
    let of_models = models::TARGETS.iter().find(|target| target.name == name).map(|target| target.run);
    of_files.or(of_models).expect("it is listed")(file);
}
