use std::fs;

use minke_data::Tokenizer;
use minke_data::template::ChatTemplate;
use minke_data::tokenizer::TrainOptions;
use minke_gym::Task;
use minke_model::{Config, DType, Model, Precision};
use minke_train::checkpoint;
use serde_json::Value;

use super::*;
use crate::eval::{Answer, Grade};

fn answer(task: &str, sample: usize, text: &str, tokens: usize, grade: Grade) -> Answer {
    Answer {
        task: task.to_owned(),
        sample,
        prompt: String::new(),
        text: text.to_owned(),
        tokens,
        thought_tokens: 0,
        stop: "stop_token".to_owned(),
        answer: Some(text.to_owned()),
        grade,
    }
}

fn two_tasks() -> Vec<Task> {
    let suite = Suite::parse("chain:1").unwrap();
    suite.tasks(Split::Train, 2, 1).unwrap()
}

fn lesson(answer: &Answer) -> Option<Lesson> {
    Lesson::of(&minke_gym::answer::split(&answer.text, true), &answer.text, true)
}

#[test]
fn right_answers_are_chosen_once_each() {
    let tasks = two_tasks();
    let (a, b) = (&tasks[0].id, &tasks[1].id);
    let answers = [
        // in any order
        answer(b, 0, "4</think>9", 2, Grade::Wrong),
        answer(a, 3, "1+1</think>2", 3, Grade::Right),
        answer(a, 0, "1+1 is 2</think> 2 ", 6, Grade::Right),
        answer(a, 1, "</think>2", 2, Grade::NoAnswer),
        answer(a, 2, "1+1</think> 2", 3, Grade::Right),
        answer(b, 1, "x", 2, Grade::Error("hung".into())),
        answer(b, 2, "", 0, Grade::TooLong),
    ];
    let go = |which, per_task| choose(&tasks, &answers, Keep { which, per_task }, lesson);
    let thoughts = |which, per_task| -> Vec<String> {
        go(which, per_task).0.into_iter().map(|(_, lesson)| lesson.thought.unwrap()).collect()
    };
    assert_eq!(thoughts(Which::Shortest, 1), ["1+1"]);
    assert_eq!(thoughts(Which::First, 1), ["1+1 is 2"]);
    assert_eq!(thoughts(Which::All, 9), ["1+1 is 2", "1+1"]);
    let (lessons, counts) = go(Which::All, 9);
    let expected = Counts {
        tasks: 2,
        samples: 7,
        right: 3,
        no_answer: 1,
        too_long: 1,
        verifier_errors: 1,
        solved: 1,
        malformed: 0,
        duplicates: 1,
        kept: 2,
    };
    assert_eq!(counts, expected);
    assert_eq!((lessons[0].0, &lessons[0].1.prompt), (0, &tasks[0].prompt));
    let line: Value = serde_json::from_str(&lessons[1].1.line()).unwrap();
    let assistant = &line["messages"][1];
    assert_eq!(line["messages"][0]["content"], tasks[0].prompt);
    assert_eq!((&assistant["reasoning_content"], &assistant["content"]), (&"1+1".into(), &"2".into()));
    let rows = counts.facts();
    assert!(rows.contains(&("tasks solved".into(), "1 (50.0 %)".into())), "{rows:?}");
}

#[test]
fn a_chat_keeps_what_is_said_and_other_forms_the_answer() {
    let text = "1+1</think>So it is \\boxed{2}.";
    let parts = minke_gym::answer::split(text, true);
    assert_eq!(Lesson::of(&parts, text, true).unwrap().content, "So it is \\boxed{2}.");
    assert_eq!(Lesson::of(&parts, text, false).unwrap().content, "2");
    let parts = minke_gym::answer::split("1+1", true);
    assert_eq!(Lesson::of(&parts, "1+1", true), None);
    // without a thought there is none to learn
    let parts = minke_gym::answer::split("2", false);
    assert!(!Lesson::of(&parts, "2", true).unwrap().line().contains("reasoning_content"));
}

/// A folder with a teacher of drawn weights, tasks that any answer passes, and a recipe.
pub(crate) fn bench() -> (tempfile::TempDir, Options) {
    let folder = tempfile::tempdir().unwrap();
    let sample = vec!["the whale dives 0123456789 and sings +-*= mod start with then\n".repeat(20)];
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    let tokenizer = Tokenizer::train(&sample, &options).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../minke-model/tests/vectors/v3_plain/config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["initializer_range"] = 0.2.into();
    let model = Model::random(Config::from_json(&value).unwrap(), Precision::uniform(DType::F32), 3);
    let template = ChatTemplate::named("minke").unwrap();
    checkpoint::save_model(&folder.path().join("teacher"), &model, &tokenizer, Some(&template)).unwrap();
    let lines: Vec<String> = (0..10)
        .map(|i| format!("{{\"prompt\": \"say {i}\", \"verifier\": \"regex\", \"answer\": \"(?s).*\"}}"))
        .collect();
    fs::write(folder.path().join("mine.jsonl"), lines.join("\n")).unwrap();
    let recipe = "[run]\nseed = 4\n[model]\npath = \"teacher\"\n[tasks]\nsuite = \"mine.jsonl\"\n\
                  [sample]\nsamples = 3\nmax_tokens = 10\nthinking = \"empty\"\nconcurrency = 4\n\
                  [keep]\nwhich = \"all\"\n";
    fs::write(folder.path().join("sample.toml"), recipe).unwrap();
    let options = Options {
        recipe: folder.path().join("sample.toml"),
        out: Some(folder.path().join("whole")),
        threads: 1,
        ..Options::default()
    };
    (folder, options)
}

#[test]
fn a_stage_that_was_cut_off_ends_with_the_same_lessons() {
    let (folder, options) = bench();
    let never = AtomicBool::new(false);
    let whole = run(&options, &never, &mut |_| {}).unwrap().finished.unwrap();
    assert_eq!((whole.counts.tasks, whole.counts.samples), (10, 30));
    assert!(whole.counts.right > 0 && whole.counts.kept > 0, "{:?}", whole.counts);
    let lessons = fs::read_to_string(&whole.answers).unwrap();
    assert_eq!(lessons.lines().count(), whole.counts.kept);
    assert!(fs::read_to_string(&whole.report).unwrap().contains("| samples | 30 |"));

    let cut = Options { out: Some(folder.path().join("cut")), ..options.clone() };
    let stop = AtomicBool::new(false);
    let outcome = run(&cut, &stop, &mut |event| {
        if matches!(event, Event::Progress { done, .. } if done >= 8) {
            stop.store(true, Ordering::Relaxed);
        }
    });
    assert_eq!(outcome.unwrap().finished, None);
    assert!(!folder.path().join("cut").join(ANSWERS).exists());
    // without --resume nothing is written over, and another seed would be another run
    assert!(run(&cut, &never, &mut |_| {}).unwrap_err().to_string().contains("--resume"));
    let resumed = Options { resume: true, ..cut };
    let other = Options { overrides: vec!["run.seed=5".into()], ..resumed.clone() };
    let error = run(&other, &never, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("run.seed: was 4, is 5"), "{error}");
    // wherever the model lies by then
    let model = folder.path().join("moved");
    fs::rename(folder.path().join("teacher"), &model).unwrap();
    let resumed = Options { overrides: vec![format!("model.path={model:?}")], ..resumed };
    let mut first = None;
    let finished = run(&resumed, &never, &mut |event| {
        if let Event::Progress { done, .. } = event {
            first.get_or_insert(done);
        }
    });
    assert!(first.unwrap() >= 8, "{first:?}");
    let finished = finished.unwrap().finished.unwrap();
    assert_eq!(finished.counts, whole.counts);
    assert_eq!(fs::read_to_string(&finished.answers).unwrap(), lessons);
    // the choice may be another one without asking again
    let fewer = [&resumed.overrides[..], &["keep.which=shortest".into()]].concat();
    let fewer = Options { overrides: fewer, ..resumed };
    let counts = run(&fewer, &never, &mut |_| {}).unwrap().finished.unwrap().counts;
    assert_eq!((counts.samples, counts.kept), (30, counts.solved));
}

#[test]
fn recipes_that_are_wrong_say_where() {
    let (_folder, options) = bench();
    let message = |overrides: &[&str]| {
        let overrides = overrides.iter().map(|text| (*text).to_owned()).collect();
        run(&Options { overrides, ..options.clone() }, &AtomicBool::new(false), &mut |_| {})
            .unwrap_err()
            .to_string()
    };
    for (overrides, expected) in [
        (["sample.sampels=3"], "did you mean `samples`?"),
        (["keep.which=best"], "\"shortest\", \"first\" or \"all\""),
        (["tasks.suite=chians"], "no suite or family is called"),
        (["model.path=nowhere/at/all"], "nowhere"),
        (["sample.top_p=0"], "a number above 0"),
    ] {
        let error = message(&overrides);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_thought_that_was_closed_twice_is_no_lesson() {
    let of = |text: &str| Lesson::of(&minke_gym::answer::split(text, true), text, true);
    assert_eq!(of("1+1</think>2").unwrap().thought.as_deref(), Some("1+1"));
    for text in ["1+1</think>2</think>2", "<think>1</think>2</think>2", "1</think>2 <think>"] {
        assert_eq!(of(text), None, "{text}");
    }
}
