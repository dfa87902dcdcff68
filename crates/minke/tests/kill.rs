//! `kill -9` at many moments: the resumed run ends in the bits of the one that was left alone.

#![cfg(unix)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Steps of the recipe; a checkpoint after every second one.
const STEPS: u64 = 24;

fn recipe(root: &Path) {
    let words = ["sea", "whale", "deep", "minke", "krill", "song", "ice", "calf"];
    for package in 0..8_u64 {
        let folder = root.join(format!("text/package{package}"));
        fs::create_dir_all(&folder).unwrap();
        let word = |i: u64| words[((i * i + package * 3 + i / 7) % 8) as usize];
        let text: Vec<&str> = (0..500).map(word).collect();
        fs::write(folder.join("a.txt"), text.join(" ")).unwrap();
    }
    let text = format!(
        "[run]\nseed = 3\n[model]\ndepth = 2\nn_routed_experts = 4\nnum_experts_per_tok = 2\n\
         [data]\nvocab_size = 300\nvalidation_share = 0.2\n[[data.sources]]\npath = \"text\"\n\
         [train]\nsequence_length = 32\nbatch_size = 4\ntokens = {}\n\
         eval_every = 3\neval_tokens = 256\ncheckpoint_every = 2\nkeep = 2\n",
        STEPS * 128
    );
    fs::write(root.join("tiny.toml"), text).unwrap();
}

fn start(root: &Path, out: &str, resume: bool) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_minke"));
    command.arg("pretrain").arg(root.join("tiny.toml")).arg("--out").arg(root.join("runs").join(out));
    command.args(["--json", "--threads", if resume { "1" } else { "2" }]);
    if resume {
        command.arg("--resume");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap()
}

/// Lets the process write `checkpoints` of them and then some time pass, and kills it. True when it had ended.
fn kill_after(mut child: Child, checkpoints: usize, delay: Duration) -> bool {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut seen = 0;
    for line in lines {
        let event: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
        seen += usize::from(event["event"] == "checkpoint");
        if seen == checkpoints {
            std::thread::sleep(delay);
            // SIGKILL: nothing of the process runs any more
            child.kill().unwrap();
            break;
        }
    }
    child.wait().unwrap().success()
}

#[test]
fn a_run_killed_again_and_again_is_the_run_left_alone() {
    let root = tempfile::tempdir().unwrap();
    recipe(root.path());
    let status = start(root.path(), "whole", false).wait_with_output().unwrap().status;
    assert!(status.success(), "{status}");
    let mut kills = 0;
    // the delays step through a training step, an evaluation and the writing of a checkpoint
    while !kill_after(
        start(root.path(), "killed", kills > 0),
        1 + kills % 2,
        Duration::from_micros(1700 * kills as u64),
    ) {
        kills += 1;
        assert!(kills < 40, "no progress: each attempt reaches a checkpoint");
    }
    assert!(kills >= 4, "killed {kills} times only");
    let (whole, killed) = (root.path().join("runs/whole"), root.path().join("runs/killed"));
    for file in [
        "model/model.safetensors",
        &format!("checkpoints/step-{STEPS}/model.safetensors"),
        &format!("checkpoints/step-{STEPS}/training/state.safetensors"),
    ] {
        assert!(
            fs::read(whole.join(file)).unwrap() == fs::read(killed.join(file)).unwrap(),
            "{file} differs"
        );
    }
    // every step once, with the same loss
    let losses = |folder: &Path| -> Vec<(String, String)> {
        let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        records
            .filter(|r| r["kind"] == "step")
            .map(|r| (r["step"].to_string(), r["loss"].to_string()))
            .collect()
    };
    assert_eq!(losses(&killed), losses(&whole));
    assert_eq!(losses(&whole).len() as u64, STEPS);
    println!("killed {kills} times");
}
