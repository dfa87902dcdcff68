//! Training from the command line: a run, its model in the other commands, and what is refused.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{good, minke, refused, snapshot, text};
use serde_json::Value;

/// A folder with a text, a recipe that learns from it, and where its run goes.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(tokens: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let texts = folder.path().join("texts");
        fs::create_dir(&texts).unwrap();
        for i in 0..40 {
            let line = format!("the {i} whales dive and the {i} whales sing of {}\n", i * 7919 % 1000);
            fs::write(texts.join(format!("{i}.txt")), line.repeat(20)).unwrap();
        }
        let recipe = format!(
            "[run]\nname = \"tiny\"\nseed = 3\n\
             [model]\ndepth = 2\nn_routed_experts = 4\nnum_experts_per_tok = 2\n\
             [data]\nvocab_size = 320\nvalidation_share = 0.2\n\
             [[data.sources]]\npath = \"texts\"\n\
             [train]\nsequence_length = 32\nbatch_size = 4\ntokens = {tokens}\n\
             eval_every = 5\neval_tokens = 512\ncheckpoint_every = 5\n\
             [sample]\nprompts = [\"the \"]\ntokens = 8\n"
        );
        fs::write(folder.path().join("tiny.toml"), recipe).unwrap();
        Self { folder }
    }

    fn recipe(&self) -> PathBuf {
        self.folder.path().join("tiny.toml")
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join("runs").join(name)
    }
}

fn weights(run: &Path) -> Vec<u8> {
    fs::read(run.join("model/model.safetensors")).unwrap()
}

#[test]
fn a_run_makes_a_model_that_the_other_commands_use() {
    let bench = Bench::new(1280);
    let (recipe, out) = (bench.recipe(), bench.out("a"));
    let run = minke(&["pretrain", text(&recipe), "--out", text(&out)]);
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.out.contains("bits per byte") && run.out.contains("minke chat "), "{}", run.out);
    for expected in ["step 10/10: loss ", "held-out text", "step 10: checkpoint", "a/recipe.toml", " GFLOP/s"]
    {
        assert!(run.err.contains(expected), "{expected}: {}", run.err);
    }
    let shown = good(&["inspect", text(&out)]);
    assert!(shown.contains("deepseek_v3"), "{shown}");
    let args = ["generate", text(&out), "-p", "the", "-n", "5", "--json"];
    let generated: Value = serde_json::from_str(&good(&args)).unwrap();
    assert!(generated["prompt_tokens"].as_u64().unwrap() >= 2);
    let chat = common::minke_with(&["chat", text(&out), "-n", "5"], "the\n");
    assert_eq!(chat.code, 0, "{}", chat.err);

    // a second run is not written over the first
    let before = snapshot(&out);
    let error = refused_late(&["pretrain", text(&recipe), "--out", text(&out)]);
    assert!(error.contains("is not empty") && error.contains("hint: "), "{error}");
    assert!(snapshot(&out) == before);

    // as JSON every line is an object; another number of threads gives the same weights
    let again = bench.out("b");
    let lines = good(&["pretrain", text(&recipe), "--out", text(&again), "--json", "--threads", "1"]);
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps = events.iter().filter(|event| event["event"] == "step").count();
    assert_eq!((steps, &events.last().unwrap()["event"]), (10, &Value::from("finished")));
    assert!(weights(&out) == weights(&again), "threads changed the weights");
}

/// As `refused`, for commands that may have said something before.
fn refused_late(args: &[&str]) -> String {
    let run = minke(args);
    assert_eq!(run.code, 2, "{args:?}: {}{}", run.out, run.err);
    assert!(run.err.contains("error: ") && !run.err.contains("panicked"), "{}", run.err);
    run.err
}

#[cfg(unix)]
#[test]
fn a_run_that_ctrl_c_stopped_goes_on_to_the_same_weights() {
    let bench = Bench::new(128 * 40);
    let recipe = bench.recipe();
    let (whole, out) = (bench.out("whole"), bench.out("cut"));
    good(&["pretrain", text(&recipe), "--out", text(&whole)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_minke"))
        .args(["pretrain", text(&recipe), "--out", text(&out)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while !out.join("checkpoints/step-10").exists() {
        assert!(begin.elapsed() < Duration::from_mins(2), "no checkpoint came");
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be stopped");
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    good(&["pretrain", text(&recipe), "--out", text(&out), "--resume"]);
    assert!(weights(&out) == weights(&whole), "the weights differ");
}

#[test]
fn recipes_that_cannot_be_are_refused() {
    let bench = Bench::new(1280);
    let recipe = bench.recipe();
    let out = bench.out("never");
    for (set, expected) in [
        ("train.lerning_rate=1", "unknown key `lerning_rate`"),
        ("model.num_experts_per_tok=9", "num_experts_per_tok"),
        ("train.tokens=\"many\"", "train.tokens"),
        ("model.num_attention_heads=0", "num_attention_heads"),
        ("data.sources=[]", "sources"),
    ] {
        let error = refused(&["pretrain", text(&recipe), "--out", text(&out), "--set", set]);
        assert!(error.contains(expected), "{set}: {error}");
        assert!(!out.exists(), "{set}: a run was begun");
    }
    fs::remove_dir_all(bench.folder.path().join("texts")).unwrap();
    let error = refused_late(&["pretrain", text(&recipe), "--out", text(&out)]);
    assert!(error.contains("data source") && error.contains("it does not exist"), "{error}");
    assert!(!out.exists(), "something is left");
}

#[test]
fn bench_train_has_its_figures() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/bench-a.toml");
    let small = [
        "--set",
        "train.batch_size=1",
        "--set",
        "train.sequence_length=32",
        "--steps",
        "1",
        "--threads",
        "1",
    ];
    let args = [&["bench", "train", recipe, "--json"], &small[..]].concat();
    let report: Value = serde_json::from_str(&good(&args)).unwrap();
    for key in
        ["tok_s", "step_ms", "peak_rss_bytes", "flops_per_token", "gflops", "gemm_peak_gflops", "threads"]
    {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
}
