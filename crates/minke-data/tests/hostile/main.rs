//! Files from outside are hostile: valid ones are damaged in many ways, and whatever comes of it is an error in bounded
//! time and memory, never a panic. `cargo run --release --example fuzz -p minke-data -- TARGET --seconds N` looks for
//! longer; what it finds is kept in `found.rs`.

mod case;
mod found;
mod meter;
mod mutate;
mod targets;

use targets::TARGETS;

#[global_allocator]
static METER: meter::Meter = meter::Meter;

// one test, so that no other takes memory meanwhile
#[test]
fn damaged_files_are_errors() {
    std::panic::set_hook(Box::new(|_| {}));
    let faults = case::faults(&TARGETS, found::FOUND);
    let _ = std::panic::take_hook();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
