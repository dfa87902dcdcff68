//! `minke eval` and `minke gym` as a person runs them.

mod common;

use std::fs;
use std::path::Path;

use common::{good, minke, refused, talking, text};
use serde_json::Value;

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_model_is_asked_and_counted() {
    let folder = talking();
    let model = text(folder.path());
    let tasks = folder.path().join("mine.jsonl");
    let lines_of_tasks = [
        r#"{"prompt": "say anything", "answer": "(?s).*", "verifier": "regex"}"#,
        r#"{"prompt": "say it", "answer": "what no model says", "level": 2}"#,
        "not a task",
        r#"{"prompt": "break", "answer": "x", "verifier": "program", "command": ["sh", "-c", "exit 3"]}"#,
    ];
    fs::write(&tasks, lines_of_tasks.join("\n")).unwrap();
    let notes = folder.path().join("notes.txt");
    fs::write(&notes, "the whale dives and the whale sings\n").unwrap();
    let (tasks, notes) = (text(&tasks), text(&notes));
    let run = minke(&[
        "eval",
        model,
        tasks,
        "chain:1-2",
        notes,
        "--samples",
        "3",
        "--per-level",
        "4",
        "-n",
        "8",
        "--json",
    ]);
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.err.contains("line 3 is left out: no JSON"), "{}", run.err);
    assert!(run.err.contains("answers to 1 tasks are checked by running"), "{}", run.err);
    let report: Value = serde_json::from_str(&run.out).unwrap();
    let all = &report["tasks"]["overall"];
    assert_eq!((all["tasks"].as_u64(), all["answers"].as_u64()), (Some(11), Some(33)));
    assert_eq!(report["tasks"]["complete"], true);
    assert_eq!(report["tasks"]["settings"]["k"], serde_json::json!([1, 3]));
    let rows = report["tasks"]["by_level"].as_array().unwrap();
    let names: Vec<String> = rows.iter().map(|row| format!("{} {}", row["name"], row["level"])).collect();
    assert_eq!(names, ["\"mine\" 1", "\"mine\" 2", "\"chain\" 1", "\"chain\" 2"]);
    let failed = all["verifier_errors"].as_u64().unwrap();
    let (low, high) = (all["pass_1"]["low"].as_f64().unwrap(), all["pass_1"]["high"].as_f64().unwrap());
    assert!(failed <= 3 && low < high, "{all}");
    let bits = report["texts"][0]["bits_per_byte"].as_f64().unwrap();
    assert!(bits > 1.0 && bits < 20.0, "{bits}");
    // people get a table
    let table = good(&["eval", model, tasks, notes, "-n", "8"]);
    assert!(table.contains("pass@1") && table.contains("bits per byte"), "{table}");
}

#[test]
fn answers_are_kept_and_not_asked_twice() {
    let folder = talking();
    let model = text(folder.path());
    let out = folder.path().join("answers.jsonl");
    let run = |extra: &[&str]| {
        minke(
            &[
                &["eval", model, "chain:1", "-n", "6", "--per-level", "5", "--out", text(&out), "--json"],
                extra,
            ]
            .concat(),
        )
    };
    let whole = run(&["--samples", "2"]);
    assert_eq!(whole.code, 0, "{}", whole.err);
    let answers = lines(&out);
    assert_eq!(answers.len(), 11);
    assert_eq!(run(&["--samples", "2"]).code, 2);
    let kept = fs::read(&out).unwrap();
    fs::write(&out, &kept[..kept.len() * 2 / 3]).unwrap();
    let again = run(&["--samples", "2", "--resume"]);
    assert!(again.err.contains("answers are there already"), "{}", again.err);
    assert_eq!(fs::read(&out).unwrap(), kept);
    let report = |run: &common::Run| -> Value {
        serde_json::from_str::<Value>(&run.out).unwrap()["tasks"]["overall"].clone()
    };
    assert_eq!(report(&again), report(&whole));
    let other = run(&["--samples", "2", "--resume", "--temperature", "0.5"]);
    assert!(other.code == 2 && other.err.contains("its answers are of other settings"), "{}", other.err);
}

#[test]
fn what_cannot_be_evaluated_is_said() {
    let folder = talking();
    let model = text(folder.path());
    let bad = folder.path().join("bad.jsonl");
    let missing = r#"{"prompt": "a", "answer": "b", "verifier": "program", "command": "./no-such-verifier"}"#;
    fs::write(&bad, missing).unwrap();
    let bad = text(&bad);
    for (args, expected) in [
        (&["eval", model, "chains"][..], "no suite or family is called \"chains\""),
        (&["eval", model, "chain:99"], "chain: expected levels such as 2 or 1-8"),
        (&["eval", model, "nothing/here.jsonl"], "cannot read it"),
        (&["eval", model, bad], "\"./no-such-verifier\" is not there"),
        (&["eval", model, "chain:1", "--k", "4"], "k: expected 1 to 1, the number of samples, got 4"),
        (&["eval", model, "chain:1", "--no-think"], "--no-think has no effect on plain prompts"),
        (&["eval", model, "chain:1", "--form", "chat"], "has no chat template"),
        (&["eval", model, "chain:1", "--resume"], "--resume needs --out"),
        (&["eval", model, "chain:1", "--temperature", "-1"], "temperature: expected a number from 0 to 100"),
        (&["gym", "show", "chain:0"], "expected levels"),
        (&["gym", "show", "chain", "--care", "much"], "--care: expected full, brief, none, mix"),
        (&["gym", "write", "a.txt", "--count", "1", "--out", "x"], "there are no families in it"),
        (&["gym", "write", "chain", "--count", "0", "--out", "x"], "expected a number such as 500 or 100k"),
    ] {
        let said = refused(args);
        assert!(said.contains(expected), "{args:?}: {said}");
    }
}

#[test]
fn arguments_without_effect_are_said() {
    let folder = talking();
    let (model, notes) = (text(folder.path()), folder.path().join("notes.txt"));
    fs::write(&notes, "the whale dives\n").unwrap();
    let mine = folder.path().join("mine.jsonl");
    fs::write(&mine, "{\"prompt\": \"any\", \"answer\": \"b\"}\n").unwrap();
    let args = ["--samples", "4", "--temperature", "2", "--form", "worked", "--split", "train", "-n", "5"];
    let said = |suite: &str, args: &[&str]| {
        let run = minke(&[&["eval", model, suite], args].concat());
        assert_eq!(run.code, 0, "{}", run.err);
        run.err
    };
    let expected =
        "note: no effect of --samples, --temperature, --tokens, --form, --split: there are only texts\n";
    assert_eq!(said(text(&notes), &args), expected);
    assert_eq!(said(text(&notes), &[]), "");
    let of_gym = ["--per-level", "3", "--split", "train", "-n", "5"];
    let expected = "note: no effect of --per-level, --split: there are no problems of the gym\n";
    assert_eq!(said(text(&mine), &of_gym), expected);
    assert_eq!(said("chain:1", &of_gym), "");
}

#[test]
fn problems_are_listed_shown_and_written() {
    let list = good(&["gym", "list"]);
    assert!(list.contains("chain ") && list.contains("core is addition, chain, count"), "{list}");
    let shown = good(&["gym", "show", "chain:1-2", "--count", "2", "--care", "brief"]);
    assert_eq!(shown.matches("\nQ: ").count(), 4, "{shown}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/lines.jsonl");
    let write = |extra: &[&str]| {
        let args = [&["gym", "write", "chain:1-3", "--out", text(&path)], extra].concat();
        assert!(good(&args).contains(" lines, "));
        lines(&path)
    };
    let texts = write(&["--count", "2k", "--care", "mix"]);
    assert_eq!(texts.len(), 2000);
    let empty =
        texts.iter().filter(|line| line["completion"].as_str().unwrap().starts_with("T:\nA: ")).count();
    assert!((700..1100).contains(&empty), "{empty}");
    let again = refused(&["gym", "write", "chain", "--count", "5", "--out", text(&path)]);
    assert!(again.contains("is there") && again.contains("--force"), "{again}");
    assert_eq!(lines(&path).len(), 2000);
    let chats = write(&["--count", "30", "--format", "chat", "--force"]);
    assert_eq!(chats[0]["messages"][1]["role"], "assistant");
    assert!(!chats[0]["messages"][1]["reasoning_content"].as_str().unwrap().is_empty());
    let tasks = write(&["--count", "30", "--format", "task", "--split", "held-out", "--force"]);
    assert_eq!(tasks[0]["verifier"]["name"], "gym");
    let again = good(&[
        "gym",
        "write",
        "chain:1",
        "--out",
        text(&path),
        "--count",
        "30",
        "--format",
        "task",
        "--force",
        "--json",
    ]);
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(
        (&again["lines"], again["bytes"].as_u64()),
        (&30.into(), Some(fs::metadata(&path).unwrap().len()))
    );
    // and what was written can be asked
    let model = talking();
    let report = good(&["eval", text(model.path()), text(&path), "-n", "2", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&report).unwrap()["tasks"]["overall"]["tasks"], 30);
}

#[test]
fn a_model_against_another() {
    let (folder, other) = (talking(), talking());
    let notes = folder.path().join("notes.txt");
    fs::write(&notes, "the whale dives and the whale sings\n").unwrap();
    let (model, notes) = (text(folder.path()), text(&notes));
    let run = minke(&["eval", model, notes, "--against", text(other.path()), "--json"]);
    assert_eq!(run.code, 0, "{}", run.err);
    let report: Value = serde_json::from_str(&run.out).unwrap();
    let distance = &report["against"]["texts"][0];
    assert_eq!((distance["kl_mean"].as_f64(), distance["same_top"].as_f64()), (Some(0.0), Some(1.0)));
    assert_eq!(distance["tokens"], report["texts"][0]["tokens"]);
    let line = good(&["eval", model, notes, "--against", model]);
    assert!(line.contains("KL mean 0.00000") && line.contains("the same likeliest token 100.00%"), "{line}");
    let line = good(&["eval", model, notes, "--against", model, "--cache", "int8"]);
    assert!(line.contains(&format!("\nwith --cache int8, {notes}: perplexity")), "{line}");
    let report: Value = serde_json::from_str(&good(&["eval", model, notes, "--json"])).unwrap();
    assert!(report.get("against").is_none());
    let message = refused(&["eval", model, "chain:1", "--against", model]);
    assert!(message.contains("and there are only tasks"), "{message}");
}
