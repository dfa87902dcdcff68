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

/// Cases of each format.
const CASES: u64 = 250;

// one test, so that no other takes memory meanwhile
#[test]
fn damaged_files_are_errors() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut faults = Vec::new();
    for target in &TARGETS {
        let seeds = (target.seeds)();
        for (at, seed) in seeds.iter().enumerate() {
            let outcome = case::run(target, seed);
            if !outcome.taken && target.name != "template" || outcome.fault.is_some() {
                faults.push(format!(
                    "{}: seed {at}: taken {}, {:?}",
                    target.name, outcome.taken, outcome.fault
                ));
            }
        }
        let mut taken = 0;
        for number in 0..CASES {
            let file = case::file_of(target, &seeds, 1, number);
            let outcome = case::run(target, &file);
            taken += usize::from(outcome.taken);
            faults.extend(outcome.fault.map(|fault| format!("{}: case {number}: {fault}", target.name)));
        }
        // a fuzzer whose every file is refused at the door looks at nothing
        assert!(taken > 0 && taken < CASES as usize, "{}: {taken} of {CASES} taken", target.name);
    }
    for (name, target, file) in found::FOUND {
        let target = TARGETS.iter().find(|known| known.name == *target).expect("the target's name");
        faults.extend(case::run(target, file).fault.map(|fault| format!("{name}: {fault}")));
    }
    let _ = std::panic::take_hook();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
