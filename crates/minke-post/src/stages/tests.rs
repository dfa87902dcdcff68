use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use minke_train::pretrain::Options;

use super::{exam, gym};
use crate::events::Event;
use crate::sample::tests::bench;

fn options(folder: &std::path::Path, recipe: &str) -> Options {
    fs::write(folder.join("stage.toml"), recipe).unwrap();
    Options {
        recipe: folder.join("stage.toml"),
        out: Some(folder.join("out")),
        threads: 1,
        ..Options::default()
    }
}

#[test]
fn worked_problems_are_written_as_files() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = "[run]\nseed = 2\n[[file]]\nname = \"a.jsonl\"\nsuite = \"chain:1-2\"\ncount = 50\ncare = \"mix\"\n\
                  [[file]]\nsuite = \"chain\"\ncount = 7\nformat = \"chat\"\n";
    let options = options(folder.path(), recipe);
    let written = gym::run(&options, &AtomicBool::new(false), &mut |_| {}).unwrap().unwrap();
    let lines = |at: usize| fs::read_to_string(&written[at].0).unwrap().lines().count() as u64;
    assert_eq!((written[0].1.lines, written[1].1.lines), (lines(0), lines(1)));
    assert_eq!((lines(0), lines(1)), (50, 7));
    assert!(written[1].0.ends_with("out/worked.jsonl"));
    let stopped = gym::run(&options, &AtomicBool::new(true), &mut |_| {}).unwrap();
    assert_eq!(stopped, None);
    for (change, expected) in [
        ("count = 50", "`file.0.count` is missing"),
        ("suite = \"chain:1-2\"", "`file.0.suite` is missing"),
        ("chain:1-2", "no suite or family"),
        ("a.jsonl", "the plain name of a file"),
        ("\"mix\"", "expected full, brief"),
    ] {
        let to = match change {
            "chain:1-2" => "chian",
            "a.jsonl" => "../a",
            "\"mix\"" => "\"much\"",
            _ => "",
        };
        fs::write(&options.recipe, recipe.replacen(change, to, 1)).unwrap();
        let error = gym::run(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(expected), "{change}: {error}");
    }
}

#[test]
fn an_examination_goes_on_and_says_what_it_found() {
    let (folder, _) = bench();
    let recipe = "[model]\npath = \"teacher\"\n[eval]\nsuite = \"mine.jsonl\"\nsamples = 2\nmax_tokens = 8\n\
                  concurrency = 4\nwithout_thinking = true\nthinking = \"open\"\n";
    let options = options(folder.path(), recipe);
    let stop = AtomicBool::new(false);
    let cut = exam::run(&options, &stop, &mut |event| {
        if matches!(event, Event::Progress { done, .. } if done >= 4) {
            stop.store(true, Ordering::Relaxed);
        }
    });
    assert!(cut.unwrap().is_none());
    let options = Options { resume: true, ..options };
    let mut first = None;
    let outcome = exam::run(&options, &AtomicBool::new(false), &mut |event| {
        if let Event::Progress { done, .. } = event {
            first.get_or_insert(done);
        }
    });
    let outcome = outcome.unwrap().unwrap();
    assert!(first.unwrap() >= 4);
    let second = outcome.without_thinking.unwrap();
    assert_eq!((outcome.report.overall.answers, second.overall.answers), (20, 20));
    assert_eq!(outcome.values.get("pass@1-without-thinking"), Some(second.pass_1()));
    let text = fs::read_to_string(&outcome.path).unwrap();
    assert!(text.contains("With an empty thought"), "{text}");
    let records = crate::report::read(&folder.path().join("out/metrics.jsonl")).unwrap();
    assert_eq!(crate::report::evaluations(&records)[0].get("pass@1"), Some(outcome.report.pass_1()));
}
