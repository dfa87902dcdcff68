//! Running the real binary on real folders.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use minke_data::Tokenizer;
use minke_data::hf::{Dtype, TensorSpec, write_safetensors};
use minke_data::tokenizer::TrainOptions;
use minke_model::{Config, DType, Model, Precision};
use serde_json::Value;

/// What a run of the program left.
pub struct Run {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Runs `minke` with nothing on standard input.
pub fn minke(args: &[&str]) -> Run {
    minke_with(args, "")
}

/// Runs `minke` with a text on standard input.
pub fn minke_with(args: &[&str], input: &str) -> Run {
    let mut child = Command::new(env!("CARGO_BIN_EXE_minke"))
        .args(args)
        .env("COLUMNS", "100")
        .env_remove("MINKE_LOG")
        .env("HF_HOME", "/nonexistent-minke-hub")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // a program that ends early does not read all of it
    let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs `minke` and expects success.
pub fn good(args: &[&str]) -> String {
    let run = minke(args);
    assert_eq!(run.code, 0, "{args:?}: {}{}", run.out, run.err);
    run.out
}

/// Runs `minke` and expects one message and exit code 2.
pub fn refused(args: &[&str]) -> String {
    let run = minke(args);
    assert_eq!(run.code, 2, "{args:?}: {}{}", run.out, run.err);
    assert_eq!(run.out, "", "{args:?}");
    assert!(run.err.starts_with("error: "), "{args:?}: {}", run.err);
    assert_eq!(
        run.err.lines().filter(|line| line.starts_with("error: ")).count(),
        1,
        "{args:?}: {}",
        run.err
    );
    assert!(!run.err.contains("panicked"), "{args:?}: {}", run.err);
    run.err
}

/// A folder of parity vectors.
pub fn vectors(name: &str) -> PathBuf {
    vectors_root().join(name)
}

/// The folder of all parity vectors.
pub fn vectors_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors").canonicalize().unwrap()
}

/// A copy of a folder's config and weights that may be damaged.
pub fn copy_of(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(vectors(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// All files below a folder with their bytes.
pub fn snapshot(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with drawn weights and a trained tokenizer.
pub fn talking() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let sample = vec!["the whale dives and the whale sings\n".repeat(20)];
    let tokenizer =
        Tokenizer::train(&sample, &TrainOptions { vocab_size: 300, ..TrainOptions::default() }).unwrap();
    tokenizer.save(folder.path()).unwrap();
    let mut value: Value =
        serde_json::from_slice(&fs::read(vectors("v3_plain").join("config.json")).unwrap()).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["initializer_range"] = 0.2.into();
    fs::write(folder.path().join("config.json"), value.to_string()).unwrap();
    let config = Config::from_json(&value).unwrap();
    let model = Model::random(config, Precision::uniform(DType::F32), 3);
    let tensors: Vec<(TensorSpec, Vec<u8>)> = model
        .params
        .entries
        .iter()
        .map(|entry| {
            let spec = TensorSpec { name: entry.name.clone(), dtype: Dtype::F32, shape: entry.shape.clone() };
            (spec, model.params.data[entry.range.clone()].iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let borrowed: Vec<(TensorSpec, &[u8])> =
        tensors.iter().map(|(spec, bytes)| (spec.clone(), bytes.as_slice())).collect();
    write_safetensors(folder.path().join("model.safetensors"), &borrowed).unwrap();
    folder
}
