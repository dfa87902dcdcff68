//! The fuzzer: damages valid files of a format and takes them in, for as long as is asked.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::case;
use super::targets::Target;

/// Fuzzes those of the targets that the arguments ask for.
pub fn main(targets: &[Target]) -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
    let number = |name: &str, usual: u64| value(name).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (seconds, seed) = (number("--seconds", 10), number("--seed", 7));
    let named = args.first().filter(|name| !name.starts_with('-'));
    let chosen: Vec<&Target> = targets.iter().filter(|t| named.is_none_or(|name| name == t.name)).collect();
    if chosen.is_empty() {
        let known: Vec<&str> = targets.iter().map(|target| target.name).collect();
        eprintln!("expected one of {}", known.join(", "));
        return ExitCode::from(2);
    }
    //    std::panic::set_hook(Box::new(|_| {}));
    let mut faults = 0;
    for target in chosen {
        if let Some(path) = value("--file") {
            let file = std::fs::read(path).expect("the file can be read");
            let outcome = case::run(target, &file);
            println!(
                "{}: taken {}, {} bytes, {:?}, {:?}",
                target.name, outcome.taken, outcome.peak, outcome.time, outcome.fault
            );
            faults += u32::from(outcome.fault.is_some());
            continue;
        }
        let seeds = (target.seeds)();
        if let Some(folder) = value("--corpus") {
            write_corpus(Path::new(folder), target, &seeds).expect("the folder can be written");
            continue;
        }
        let (begin, mut number, mut taken) = (Instant::now(), 0, 0_u64);
        let (mut peak, mut slowest) = (0, Duration::ZERO);
        while begin.elapsed() < Duration::from_secs(seconds) {
            let file = case::file_of(target, &seeds, seed, number);
            // what crashes leaves its file behind
            let path = std::env::temp_dir().join(format!("fuzz-{}-{seed}-{number}", target.name));
            std::fs::write(&path, &file).expect("the folder for temporary files can be written");
            let outcome = case::run(target, &file);
            taken += u64::from(outcome.taken);
            (peak, slowest) = (peak.max(outcome.peak), slowest.max(outcome.time));
            if let Some(fault) = outcome.fault {
                faults += 1;
                println!("{}: {fault}: {}", target.name, path.display());
            } else {
                let _ = std::fs::remove_file(&path);
            }
            number += 1;
        }
        println!(
            "{}: {number} files, {taken} taken, at most {peak} bytes and {slowest:?}, {:.0} a second",
            target.name,
            number as f64 / begin.elapsed().as_secs_f64()
        );
    }
    if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Valid files, and words with every byte written as `\xNN`, which libFuzzer reads.
fn write_corpus(folder: &Path, target: &Target, seeds: &[Vec<u8>]) -> std::io::Result<()> {
    let files = folder.join(target.name);
    std::fs::create_dir_all(&files)?;
    for (i, seed) in seeds.iter().enumerate() {
        std::fs::write(files.join(format!("valid-{i}")), seed)?;
    }
    let line = |word: &&str| {
        let escaped: Vec<String> = word.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
        format!("\"{}\"\n", escaped.concat())
    };
    let lines: Vec<String> = target.words.iter().map(line).collect();
    std::fs::write(folder.join(format!("{}.dict", target.name)), lines.concat())
}
