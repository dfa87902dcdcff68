//! Running the real binary on real folders.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
