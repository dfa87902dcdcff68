//! Pipelines from the command line: from nothing to a model that was taught, cut off and continued.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{good, minke, text};
use serde_json::Value;

const RECIPE: &str = r#"
[run]
name = "small"
seed = 3

[[stage]]
name = "worked"
kind = "worked"
[[stage.file]]
name = "text.jsonl"
suite = "chain:1-2"
count = 800
care = "mix"
[[stage.file]]
name = "cold.jsonl"
suite = "chain:1-2"
count = 60
care = "full=1,none=1"
format = "chat"

[[stage]]
name = "base"
kind = "pretrain"
[stage.model]
depth = 2
n_routed_experts = 4
num_experts_per_tok = 2
max_position_embeddings = 256
[stage.data]
vocab_size = 320
validation_share = 0.1
[[stage.data.sources]]
path = "stage:worked/text.jsonl"
[stage.train]
sequence_length = 64
batch_size = 4
tokens = 4096
eval_tokens = 512

[[stage]]
name = "cold"
kind = "sft"
[stage.model]
path = "stage:base"
template = "minke"
[[stage.data.sources]]
path = "stage:worked/cold.jsonl"
[stage.train]
sequence_length = 192
batch_size = 2
steps = 3
lr = 1e-4

[[stage]]
name = "rl"
kind = "grpo"
[stage.model]
path = "stage:cold"
[stage.tasks]
suite = "chain:1-2"
eval_per_level = 3
[stage.rollout]
prompts = 4
group = 4
max_tokens = 24
[stage.train]
steps = 60
eval_every = 20
checkpoint_every = 5

[[stage]]
name = "lessons"
kind = "sample"
[stage.model]
path = "stage:rl"
[stage.tasks]
suite = "chain:1"
per_level = 4
[stage.sample]
samples = 2
max_tokens = 16

[[stage]]
name = "student"
kind = "distill"
teacher.path = "stage:rl"
[stage.student.model]
family = "llama"
depth = 1
[stage.distill]
mode = "logits"
cache = "said"
[[stage.data.sources]]
path = "stage:worked/cold.jsonl"
[stage.train]
sequence_length = 192
batch_size = 2
steps = 3

[[stage]]
name = "exam"
kind = "eval"
[stage.model]
path = "stage:rl"
[stage.eval]
suite = "chain:1-2"
per_level = 3
max_tokens = 16
"#;

/// A folder with the recipe, and where its runs go.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("small.toml"), RECIPE).unwrap();
        Self(folder)
    }

    fn recipe(&self) -> PathBuf {
        self.0.path().join("small.toml")
    }

    fn out(&self, name: &str) -> PathBuf {
        self.0.path().join("runs").join(name)
    }
}

fn weights(run: &Path) -> Vec<u8> {
    fs::read(run.join("model/model.safetensors")).unwrap()
}

#[test]
fn a_pipeline_ends_in_a_model_that_the_other_commands_use() {
    let bench = Bench::new();
    let (recipe, out) = (bench.recipe(), bench.out("a"));
    let short = "rl.train.steps=2";
    let run = minke(&["make", text(&recipe), "--out", text(&out), "--set", short]);
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.out.contains("worked, base, cold, rl, lessons, student, exam"), "{}", run.out);
    assert!(run.out.contains("minke chat "), "{}", run.out);
    for expected in ["== stage 4 of 7: rl (grpo)", "== exam took "] {
        assert!(run.err.contains(expected), "{expected}: {}", run.err);
    }
    assert!(weights(&out) == weights(&out.join("student")), "the published model is the last one");
    for file in ["report.md", "plots/pass.svg", "rl/report.md", "cold/report.md", "lessons/answers.jsonl"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    let chat = common::minke_with(&["chat", text(&out), "-n", "3"], "1+1=?\n");
    assert_eq!(chat.code, 0, "{}", chat.err);
    // a stage alone, from the recipe that was written for it
    let stage = out.join("stages/cold.toml");
    good(&["sft", text(&stage), "--out", text(&bench.out("alone"))]);
    assert!(weights(&bench.out("alone")) == weights(&out.join("cold")));
    assert_eq!(
        fs::read_dir(bench.0.path().join("said")).unwrap().count(),
        1,
        "a cache lies beside the recipe"
    );
    let stage = out.join("stages/student.toml");
    good(&["distill", text(&stage), "--out", text(&bench.out("student"))]);
    assert!(weights(&bench.out("student")) == weights(&out.join("student")));
    // nothing is left to do, and nothing is done
    let args = ["make", text(&recipe), "--out", text(&out), "--set", short, "--resume", "--json"];
    let lines = good(&args);
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.iter().filter(|event| event["make"]["event"] == "skipped").count(), 7, "{lines}");
    assert_eq!(events.last().unwrap()["event"], "made");
    // another recipe is another model
    let run = minke(&["make", text(&recipe), "--out", text(&out), "--resume"]);
    assert_eq!(run.code, 2);
    assert!(
        run.err.contains("rl.train.steps: was 2, is 60") && run.err.contains("hint: --from rl"),
        "{}",
        run.err
    );
}

#[cfg(unix)]
#[test]
fn a_pipeline_that_ctrl_c_stopped_goes_on_to_the_same_weights() {
    let bench = Bench::new();
    let recipe = bench.recipe();
    let (whole, out) = (bench.out("whole"), bench.out("cut"));
    good(&["make", text(&recipe), "--out", text(&whole)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_minke"))
        .args(["make", text(&recipe), "--out", text(&out)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while !out.join("rl/checkpoints/step-5").exists() {
        assert!(begin.elapsed() < Duration::from_mins(2), "no checkpoint came");
        assert!(child.try_wait().unwrap().is_none(), "the pipeline ended before it could be stopped");
        std::thread::sleep(Duration::from_millis(2));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!out.join("rl/model").exists(), "it was stopped too late to show anything");
    let run = minke(&["make", text(&recipe), "--out", text(&out), "--resume"]);
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.err.contains("rl (grpo, continued)") && run.err.contains("base is finished"), "{}", run.err);
    assert!(weights(&out) == weights(&whole), "the weights differ");
    assert_eq!(
        fs::read(out.join("lessons/samples.jsonl")).unwrap(),
        fs::read(whole.join("lessons/samples.jsonl")).unwrap()
    );
}

#[test]
fn pipelines_that_cannot_be_made_say_why() {
    let bench = Bench::new();
    let (recipe, out) = (bench.recipe(), bench.out("a"));
    let refused = |args: &[&str]| {
        let all: Vec<&str> =
            ["make", text(&recipe), "--out", text(&out)].iter().chain(args).copied().collect();
        let run = minke(&all);
        assert_eq!(run.code, 2, "{}{}", run.out, run.err);
        assert!(!run.err.contains("panicked"), "{}", run.err);
        run.err
    };
    for (args, expected) in [
        (&["--set", "rl.train.stepz=3"][..], "stage rl: unknown key `stepz` in [train]"),
        (&["--set", "rl.objective.algorithm=ppo"], "\"grpo\""),
        (&["--set", "exam.eval.suite=chian"], "no suite or family is called \"chian\""),
        (&["--set", "cold.train.lr=-3"], "1 | cold.train.lr=-3\n  |               ^^"),
        (&["--set", "cold.train.lr.x=3"], "--set cold.train.lr.x=3: `cold.train.lr` is a single value"),
        (&["--set", "lr.train.steps=3"], "the stages are worked, base, cold, rl, lessons, student, exam"),
        (&["--set", "cold.model.path=stage:rl"], "stage:NAME of an earlier stage (worked, base)"),
        (&["--only", "exam"], "needs stage `rl`"),
        (&["--from", "nothing"], "there is no such stage"),
        (&["--resume", "--from", "rl"], "cannot be used with"),
    ] {
        let error = refused(args);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // a mistake is shown where it was made
    fs::write(&recipe, RECIPE.replace("eval_per_level = 3", "eval_per_level = 0")).unwrap();
    let error = refused(&[]);
    let line = RECIPE.lines().position(|line| line.starts_with("eval_per_level")).unwrap() + 1;
    assert!(error.contains("stage rl: `tasks.eval_per_level`"), "{error}");
    assert!(error.contains(&format!("{}:{line}:", text(&recipe))), "{error}");
    assert!(!out.exists(), "something is left");
    // what is beside the pipeline's recipe is not sought beside the stage's
    let baseline = "[stage.run]\nbaseline = \"before\"\n[stage.model]\ndepth = 2";
    fs::write(&recipe, RECIPE.replace("[stage.model]\ndepth = 2", baseline)).unwrap();
    let run = minke(&["make", text(&recipe), "--out", text(&out)]);
    let place = bench.0.path().join("before/metrics.jsonl");
    assert!(run.code != 0 && run.err.contains(text(&place)), "{}", run.err);
}
