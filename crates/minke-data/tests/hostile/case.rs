//! One case: no panic, bounded memory, bounded time.

#![allow(dead_code, reason = "the test looks at less than the fuzzer")]

use std::time::{Duration, Instant};

use super::meter::peak_of;
use super::mutate::{Dice, mutate};
use super::targets::Target;

/// Cases of each format.
const CASES: u64 = 250;
/// A case that takes longer has found something.
const MAX_TIME: Duration = Duration::from_secs(20);

/// What a file did.
pub struct Outcome {
    /// Whether it was taken for a good file.
    pub taken: bool,
    /// What is wrong with how it was taken.
    pub fault: Option<String>,
    /// Bytes that it took at most.
    pub peak: usize,
    /// How long it took.
    pub time: Duration,
}

/// The file of a case.
pub fn file_of(target: &Target, seeds: &[Vec<u8>], seed: u64, case: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed, case);
    let from = &seeds[dice.below(seeds.len())];
    mutate(from, target.words, &mut dice)
}

/// What is wrong with how valid files, damaged ones and those that were found (a name, the format, the file) are taken.
pub fn faults(targets: &[Target], found: &[(&str, &str, &[u8])]) -> Vec<String> {
    let mut faults = Vec::new();
    for target in targets {
        let seeds = (target.seeds)();
        for (at, seed) in seeds.iter().enumerate() {
            let outcome = run(target, seed);
            if !outcome.taken && target.name != "template" || outcome.fault.is_some() {
                faults.push(format!(
                    "{}: seed {at}: taken {}, {:?}",
                    target.name, outcome.taken, outcome.fault
                ));
            }
        }
        let mut taken = 0;
        for number in 0..CASES {
            let file = file_of(target, &seeds, 1, number);
            let outcome = run(target, &file);
            taken += usize::from(outcome.taken);
            faults.extend(outcome.fault.map(|fault| format!("{}: case {number}: {fault}", target.name)));
        }
        // a fuzzer whose every file is refused at the door looks at nothing
        assert!(taken > 0 && taken < CASES as usize, "{}: {taken} of {CASES} taken", target.name);
    }
    for (name, target, file) in found {
        let target = targets.iter().find(|known| known.name == *target).expect("the target's name");
        faults.extend(run(target, file).fault.map(|fault| format!("{name}: {fault}")));
    }
    faults
}

/// Runs a file; one that takes long is run again, since a busy machine is slow by itself.
pub fn run(target: &Target, file: &[u8]) -> Outcome {
    let first = once(target, file);
    if first.time > MAX_TIME { once(target, file) } else { first }
}

fn once(target: &Target, file: &[u8]) -> Outcome {
    let begin = Instant::now();
    let work = || std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (target.run)(file)));
    let (done, peak) = peak_of(work);
    let time = begin.elapsed();
    let (fixed, each) = target.memory;
    let most = fixed + each * file.len();
    let fault = match &done {
        Err(_) => Some("it panics".to_owned()),
        Ok(_) if peak > most => Some(format!("it takes {peak} bytes, of {most} at most")),
        Ok(_) if time > MAX_TIME => Some(format!("it takes {time:?}, of {MAX_TIME:?} at most")),
        Ok(_) => None,
    };
    Outcome { taken: done.unwrap_or(false), fault, peak, time }
}
