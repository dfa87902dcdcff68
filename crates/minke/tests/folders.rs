//! Hostile and broken model folders: one message, exit code 2, and every file as it was.

#![expect(clippy::format_push_string, reason = "text for snapshots is short")]

mod common;

use std::fs;
use std::path::Path;

use common::{copy_of, good, refused, snapshot, text};
use minke_data::hf::{Dtype, TensorSpec, WeightFiles, write_safetensors};
use serde_json::Value;

type Tensor = (TensorSpec, Vec<u8>);

/// Rewrites the weights of a folder after a change.
fn change_tensors(folder: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
    let path = folder.join("model.safetensors");
    let weights = WeightFiles::open_file(&path).unwrap();
    let mut tensors: Vec<Tensor> = weights
        .names()
        .map(|name| {
            let view = weights.get(name).unwrap();
            let spec = TensorSpec { name: name.to_owned(), dtype: view.dtype, shape: view.shape.to_vec() };
            (spec, view.bytes.to_vec())
        })
        .collect();
    change(&mut tensors);
    let borrowed: Vec<(TensorSpec, &[u8])> =
        tensors.iter().map(|(spec, bytes)| (spec.clone(), bytes.as_slice())).collect();
    write_safetensors(&path, &borrowed).unwrap();
}

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
}

fn change_weights(folder: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
}

/// A file with this header and so many bytes of data.
fn with_header(folder: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn every_way_to_be_broken_is_one_clear_message() {
    type Break = Box<dyn Fn(&Path)>;
    let cases: Vec<(&str, Break)> = vec![
        (
            "a tensor is missing",
            Box::new(|f| change_tensors(f, |t| t.retain(|(s, _)| s.name != "model.norm.weight"))),
        ),
        (
            "a tensor has another shape",
            Box::new(|f| {
                change_tensors(f, |t| {
                    let (spec, _) = t.iter_mut().find(|(s, _)| s.name == "lm_head.weight").unwrap();
                    spec.shape.reverse();
                });
            }),
        ),
        (
            "a tensor too many",
            Box::new(|f| {
                change_tensors(f, |t| {
                    let spec =
                        TensorSpec { name: "model.layers.0.extra".into(), dtype: Dtype::F32, shape: vec![1] };
                    t.push((spec, vec![0; 4]));
                });
            }),
        ),
        (
            "a tensor of integers",
            Box::new(|f| {
                change_tensors(f, |t| {
                    let (spec, _) = t.iter_mut().find(|(s, _)| s.name == "model.norm.weight").unwrap();
                    spec.dtype = Dtype::I32;
                });
            }),
        ),
        (
            "the weights are cut short",
            Box::new(|f| change_weights(f, |bytes| bytes.truncate(bytes.len() - 100))),
        ),
        ("the header is cut short", Box::new(|f| change_weights(f, |bytes| bytes.truncate(50)))),
        ("the weights are empty", Box::new(|f| change_weights(f, Vec::clear))),
        (
            "a header longer than the file",
            Box::new(|f| change_weights(f, |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()))),
        ),
        ("a header that is no JSON", Box::new(|f| with_header(f, "not json", 0))),
        ("a header of brackets", Box::new(|f| with_header(f, &"[".repeat(100_000), 0))),
        (
            "a tensor beyond the file",
            Box::new(|f| with_header(f, r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, 8)),
        ),
        (
            "a shape whose product overflows",
            Box::new(|f| {
                let shape =
                    r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,16]}}"#;
                with_header(f, shape, 16);
            }),
        ),
        (
            "offsets that run backwards",
            Box::new(|f| with_header(f, r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#, 8)),
        ),
        (
            "the same tensor twice",
            Box::new(|f| {
                let twice = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
                with_header(f, twice, 8);
            }),
        ),
        ("no weights", Box::new(|f| fs::remove_file(f.join("model.safetensors")).unwrap())),
        ("no config", Box::new(|f| fs::remove_file(f.join("config.json")).unwrap())),
        (
            "a config of an unknown family",
            Box::new(|f| change_config(f, |c| c["model_type"] = "mamba".into())),
        ),
        (
            "a config that asks for the moon",
            Box::new(|f| change_config(f, |c| c["vocab_size"] = 16_000_000.into())),
        ),
        (
            "a config with an impossible shape",
            Box::new(|f| change_config(f, |c| c["num_experts_per_tok"] = 99.into())),
        ),
        ("a config of the wrong type", Box::new(|f| change_config(f, |c| c["hidden_size"] = "32".into()))),
        ("a config that is no JSON", Box::new(|f| fs::write(f.join("config.json"), "{").unwrap())),
        ("a tokenizer that is none", Box::new(|f| fs::write(f.join("tokenizer.json"), "{}").unwrap())),
    ];
    let mut report = String::new();
    for (what, damage) in cases {
        let folder = copy_of("v3_plain");
        damage(folder.path());
        let before = snapshot(folder.path());
        let error = refused(&["generate", text(folder.path()), "-p", "x"]);
        assert!(snapshot(folder.path()) == before, "{what}: files changed");
        report.push_str(&format!("# {what}\n{}\n", error.replace(text(folder.path()), "FOLDER")));
    }
    insta::assert_snapshot!(report);
}

#[test]
fn every_truncation_and_any_damaged_byte_of_a_header_does_no_harm() {
    let folder = copy_of("llama_mha_tied");
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for i in 0..40 {
        let mut bytes = whole.clone();
        if i % 2 == 0 {
            bytes.truncate(whole.len() * i / 40);
        } else {
            bytes[(header * i / 40).min(header - 1)] ^= 0x15;
        }
        fs::write(&path, &bytes).unwrap();
        let run = common::minke(&["inspect", text(folder.path()), "--json"]);
        assert!(matches!(run.code, 0 | 2), "{i}: {}", run.err);
        assert!(!run.err.contains("panicked"), "{i}: {}", run.err);
    }
}

#[test]
fn a_model_that_is_not_there_says_what_to_do() {
    let empty = tempfile::tempdir().unwrap();
    let file = empty.path().join("model.gguf");
    fs::write(&file, b"GGUF").unwrap();
    let mut report = String::new();
    for model in
        ["/nonexistent-minke/model", "someone/some-model", text(empty.path()), text(&file), "../..", ""]
    {
        let error = refused(&["inspect", model]);
        report.push_str(&format!("# {}\n{error}\n", model.replace(text(empty.path()), "FOLDER")));
    }
    insta::assert_snapshot!(report.replace(text(empty.path()), "FOLDER"));
}

#[test]
fn mtp_tensors_that_a_config_only_announces_are_a_note() {
    let folder = copy_of("v3_plain");
    change_config(folder.path(), |config| config["num_nextn_predict_layers"] = 1.into());
    let tokens = folder.path().join("tokens.json");
    fs::write(&tokens, r#"{"sequences": [[1, 2]]}"#).unwrap();
    let run = common::minke(&["score", text(folder.path()), "--tokens", text(&tokens)]);
    assert_eq!(run.code, 0, "{}", run.err);
    insta::assert_snapshot!(run.err, @"note: the config announces 1 MTP module but the folder has no tensors of it: loaded without");
    good(&["inspect", text(folder.path())]);
}
