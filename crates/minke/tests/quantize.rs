//! `minke quantize` as a person runs it.

mod common;

use std::fs;
use std::path::Path;

use common::{good, minke, refused, snapshot, talking, text};
use minke_data::gguf::{GgufFile, TensorType};
use minke_num::blocks::BlockFormat;
use serde_json::Value;

fn quantize(model: &Path, to: &str, out: &Path, more: &[&str]) -> Value {
    let args = [&["quantize", text(model), "--to", to, "--out", text(out), "--json"], more].concat();
    serde_json::from_str(&good(&args)).unwrap()
}

/// The text that models are measured on.
fn notes(folder: &Path) -> String {
    let notes = folder.join("notes.txt");
    fs::write(&notes, "the whale dives and the whale sings and the whale sleeps\n".repeat(8)).unwrap();
    text(&notes).to_owned()
}

/// Every mix is written, runs, and is the nearer to the model the more bits it has.
#[test]
fn fewer_bits_are_farther_away() {
    let folder = talking();
    let notes = notes(folder.path());
    let mut before = (f64::INFINITY, 0.0);
    for to in ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"] {
        let out = folder.path().join(format!("{to}.gguf"));
        let report = quantize(folder.path(), &to.to_lowercase(), &out, &[]);
        assert_eq!(report["to"], to);
        let formats = report["formats"].as_array().unwrap();
        let sum = |key: &str| formats.iter().map(|format| format[key].as_u64().unwrap()).sum::<u64>();
        assert_eq!(
            (sum("bytes"), sum("weights")),
            (report["bytes"].as_u64().unwrap(), report["weights"].as_u64().unwrap())
        );
        assert_eq!(sum("tensors"), report["tensors"].as_u64().unwrap());
        let bits = report["bits_per_weight"].as_f64().unwrap();
        let found = good(&["eval", text(&out), &notes, "--against", text(folder.path()), "--json"]);
        let found: Value = serde_json::from_str(&found).unwrap();
        let kl = found["against"]["texts"][0]["kl_mean"].as_f64().unwrap();
        assert!(bits <= before.0 && kl > 0.0, "{to}: {bits} bits, KL {kl}");
        assert!(kl >= 0.5 * before.1, "{to}: KL {kl}, with more bits {}", before.1);
        if to == "Q8_0" {
            assert!(kl < 1e-3, "{kl}");
        }
        before = (bits, kl);
    }
    assert!(before.1 > 1e-4, "{}", before.1);
}

/// What a file says of itself, and which tensors are in what.
#[test]
fn a_file_says_what_it_is() {
    let folder = talking();
    let out = folder.path().join("small.gguf");
    let notes = notes(folder.path());
    let report = quantize(folder.path(), "Q4_K_M", &out, &["--imatrix", &notes]);
    let file = GgufFile::open(&out).unwrap();
    assert_eq!(file.uint("general.file_type").unwrap(), Some(15));
    assert_eq!(file.uint("general.quantization_version").unwrap(), Some(2));
    assert_eq!(file.text("quantize.imatrix.dataset").unwrap().as_deref(), Some("notes.txt"));
    for name in file.names() {
        let tensor = file.tensor(name).unwrap();
        let small = tensor.shape.len() < 2 || name.contains("ffn_gate_inp");
        assert_eq!(tensor.kind == TensorType::F32, small, "{name}: {}", tensor.kind);
        let cols = tensor.shape.last().unwrap();
        if !small && cols.is_multiple_of(32) {
            let TensorType::Blocks(format) = tensor.kind else { panic!("{name}: {}", tensor.kind) };
            assert!(
                matches!(format, BlockFormat::Q5_0 | BlockFormat::Q8_0 | BlockFormat::Q4K | BlockFormat::Q6K),
                "{name}"
            );
        }
    }
    let read = &report["importance"];
    assert!(read["tokens"].as_u64().unwrap() > 50 && read["weighted"].as_u64().unwrap() > 5, "{read}");
    // rows that no super-block fills are in smaller blocks, which is said
    let args = ["quantize", text(folder.path()), "--to", "Q4_K_M", "--force", "--out", text(&out)];
    let said = minke(&args);
    assert_eq!(said.code, 0, "{}", said.err);
    let expected = "do not fill the blocks meant for them: ";
    assert!(said.err.contains(expected) && said.err.contains("instead of Q4_K"), "{}", said.err);
    // few tokens came to any expert
    let experts: usize = read["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["expert_tokens"].as_array().unwrap().len())
        .sum();
    assert!(experts > 0 && read["rare"].as_array().unwrap().len() <= experts);
}

/// An importance changes what is written, and neither threads nor a second time do.
#[test]
fn the_same_bytes_at_any_number_of_threads() {
    let folder = talking();
    let notes = notes(folder.path());
    let run = |name: &str, more: &[&str]| {
        let out = folder.path().join("out.gguf");
        let said = minke(
            &[&["quantize", text(folder.path()), "--to", "Q4_0", "--force", "--out", text(&out)], more]
                .concat(),
        );
        assert_eq!(said.code, 0, "{name}: {}", said.err);
        (fs::read(&out).unwrap(), said)
    };
    let (plain, _) = run("plain", &["--threads", "1"]);
    assert!(run("again", &["--threads", "3"]).0 == plain);
    let (weighted, said) = run("weighted", &["--threads", "1", "--imatrix", &notes]);
    assert!(run("weighted again", &["--threads", "2", "--imatrix", &notes]).0 == weighted);
    assert!(weighted != plain);
    for part in ["bits each", "Q4_0 (", "importance", "tokens of an expert: fewest"] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
    assert!(said.err.contains("tokens, which say little of what matters"), "{}", said.err);
}

/// A file in blocks can be made smaller again, and FP8 is a folder.
#[test]
fn from_a_file_and_to_a_folder() {
    let folder = talking();
    let (large, small) = (folder.path().join("large.gguf"), folder.path().join("small.gguf"));
    quantize(folder.path(), "Q8_0", &large, &[]);
    let said = minke(&["quantize", text(&large), "--to", "Q4_0", "--out", text(&small)]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.err.contains("stays lost"), "{}", said.err);
    assert!(fs::metadata(&small).unwrap().len() < fs::metadata(&large).unwrap().len());
    let fp8 = folder.path().join("fp8");
    let report = quantize(folder.path(), "FP8", &fp8, &[]);
    assert_eq!((report["to"].as_str(), report["dtype"].as_str()), (Some("hf"), Some("fp8")));
    assert!(fp8.join("model.safetensors").is_file());
    let args =
        ["quantize", text(folder.path()), "--to", "FP8", "--out", text(&fp8), "--force", "--threads", "1"];
    let said = minke(&args);
    assert!(said.code == 0 && said.err.contains("note: --threads has no effect on FP8"), "{}", said.err);
}

#[test]
fn what_is_refused_leaves_everything_as_it_was() {
    let folder = talking();
    let there = folder.path().join("there.gguf");
    fs::write(&there, "mine").unwrap();
    let binary = folder.path().join("binary");
    fs::write(&binary, b"a\xff").unwrap();
    let empty = folder.path().join("empty");
    fs::write(&empty, "").unwrap();
    let before = snapshot(folder.path());
    let (model, new) = (text(folder.path()), folder.path().join("new.gguf"));
    let (there, new, binary, empty) = (text(&there), text(&new), text(&binary), text(&empty));
    for (args, expected) in [
        (&["--to", "Q8_0", "--out", there][..], "is there"),
        (&["--to", "Q8_0", "--out", "new.bin"], "does not end in .gguf"),
        (&["--to", "Q8_0", "--out", new, "--imatrix", binary], "not UTF-8 at byte 1"),
        (&["--to", "Q8_0", "--out", new, "--imatrix", empty], "expected a text of at least 2 tokens, got 0"),
        (&["--to", "FP8", "--out", new, "--imatrix", binary], "--imatrix has no effect on FP8"),
        (&["--to", "Q4_K", "--out", new], "invalid value 'Q4_K'"),
    ] {
        let said = refused(&[&["quantize", model], args].concat());
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    assert_eq!(snapshot(folder.path()), before);
}
