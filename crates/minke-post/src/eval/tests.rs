//! A small model with drawn weights sits exams.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::template::{ChatTemplate, Thinking};
use minke_data::tokenizer::TrainOptions;
use minke_gym::{Split, Suite, Task};
use minke_model::{CacheKind, Config, DType, KvFormat, Model, Precision};
use serde_json::Value;

use super::*;
use crate::metrics::Values;

fn model() -> (Model, Tokenizer) {
    let sample = vec!["the whale dives 0123456789 and sings +-*= mod start with then\n".repeat(20)];
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    let tokenizer = Tokenizer::train(&sample, &options).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../minke-model/tests/vectors/v3_plain/config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["initializer_range"] = 0.2.into();
    let config = Config::from_json(&value).unwrap();
    (Model::random(config, Precision::uniform(DType::F32), 3), tokenizer)
}

/// Tasks that any answer, none, or no one passes.
fn tasks(folder: &Path) -> Vec<Task> {
    let path = folder.join("mine.jsonl");
    let lines = [
        r#"{"prompt": "any", "verifier": "regex", "answer": "(?s).*", "level": 1}"#,
        r#"{"prompt": "vowel", "verifier": {"name": "regex", "pattern": "[aeiou]", "search": true}, "level": 1}"#,
        r#"{"prompt": "never", "answer": "no model says this", "level": 2}"#,
        r#"{"prompt": "broken", "answer": "x", "verifier": "program", "command": ["sh", "-c", "exit 3"], "level": 2}"#,
    ];
    fs::write(&path, lines.join("\n")).unwrap();
    let mut tasks = Suite::parse(path.to_str().unwrap()).unwrap().tasks(Split::HeldOut, 0, 0).unwrap();
    let long =
        Task { prompt: "whale ".repeat(500), id: "mine/long".to_owned(), level: 3, ..tasks[0].clone() };
    tasks.push(long);
    tasks
}

fn settings() -> EvalSettings {
    EvalSettings {
        samples: 4,
        temperature: 1.0,
        max_tokens: 12,
        seed: 5,
        k: vec![1, 2, 4],
        concurrency: 3,
        ..EvalSettings::default()
    }
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.split(|b| *b == b'\n').count() - 1
}

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn answers_are_counted_by_task_and_level() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, tokenizer) = model();
    let prompter = Prompter::new(Form::Plain, None, &tokenizer).unwrap();
    let tasks = tasks(folder.path());
    let cpu = Cpu::detect(2);
    let mut last = Progress::default();
    let report = evaluate(&mut model, &cpu, &tokenizer, &prompter, &tasks, &settings(), &mut |progress| {
        assert!(progress.done >= last.done && progress.tokens >= last.tokens);
        last = progress;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(report.complete);
    assert_eq!((last.done, last.total), (20, 20));
    let all = &report.overall;
    assert_eq!((all.tasks, all.answers, all.verifier_errors, all.too_long), (5, 20, 4, 4));
    let [any, vowel, never, broken, long] = [0, 1, 2, 3, 4].map(|at| &report.answers[at * 4..at * 4 + 4]);
    let right = |answers: &[Answer]| answers.iter().filter(|answer| answer.grade == Grade::Right).count();
    assert!(any.iter().all(|answer| matches!(answer.grade, Grade::Right | Grade::NoAnswer)));
    assert_eq!((right(never), right(broken), right(long)), (0, 0, 0));
    assert!(long.iter().all(|answer| answer.grade == Grade::TooLong && answer.tokens == 0));
    // the broken verifier's task is in no rate
    let expected = (right(any) + right(vowel)) as f64 / 4.0 / 4.0;
    assert!((report.pass_1() - expected).abs() < 1e-12, "{} and {expected}", report.pass_1());
    assert!(all.pass_1.low < expected && expected < all.pass_1.high);
    assert_eq!(report.by_level.iter().map(|row| row.level.unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(report.by_level[1].pass_1.value, 0.0);
    assert_eq!(report.by_level[0].at_k[0].pass, report.by_level[0].pass_1.value);
    assert_eq!(report.verifier_errors.iter().map(|(_, count)| count).sum::<usize>(), 4);
    let table = report.table();
    assert!(table.contains("verifier error, 4 times: ") && table.contains("do not fit"), "{table}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["overall"]["tasks"], 5);
    let mut values = Values::default();
    report.put_into(&mut values);
    assert_eq!(values.get("pass@1"), Some(report.pass_1()));
    assert_eq!(values.get("pass@1/mine:2"), Some(0.0));
}

#[test]
fn an_answer_depends_on_nothing_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, tokenizer) = model();
    let prompter = Prompter::new(Form::Plain, None, &tokenizer).unwrap();
    let tasks = tasks(folder.path());
    let mut run = |threads, some: &[Task], settings: &EvalSettings| {
        let cpu = Cpu::detect(threads);
        evaluate(&mut model, &cpu, &tokenizer, &prompter, some, settings, &mut go).unwrap().answers
    };
    let whole = run(1, &tasks, &settings());
    let alone = run(2, &tasks[1..2], &EvalSettings { concurrency: 100, ..settings() });
    assert_eq!(whole[4..8], alone);
    let more = run(2, &tasks[1..2], &EvalSettings { samples: 6, ..settings() });
    assert_eq!(more[..4], alone);
    assert!(alone.iter().any(|answer| answer.text != alone[0].text), "samples differ");
}

#[test]
fn an_interrupted_evaluation_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, tokenizer) = model();
    let prompter = Prompter::new(Form::Plain, None, &tokenizer).unwrap();
    // a failed verifier is asked again, so it has no part here
    let tasks: Vec<Task> = tasks(folder.path()).into_iter().take(3).collect();
    let cpu = Cpu::detect(1);
    let name = model_name(&model);
    let path = folder.path().join("answers.jsonl");
    let open = |path: &PathBuf, settings: &EvalSettings, resume| {
        AnswerLog::open(path, &name, &prompter, settings, resume)
    };
    let mut run = |path: &PathBuf, resume, stop_at: usize| {
        let mut log = open(path, &settings(), resume)?;
        let mut at_first = None;
        let report = evaluate_logged(
            &mut model,
            &cpu,
            &tokenizer,
            &prompter,
            &tasks,
            &settings(),
            Some(&mut log),
            &mut |progress| {
                at_first.get_or_insert(progress.done);
                if progress.done >= stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )?;
        Ok::<_, PostError>((report, at_first.unwrap()))
    };
    let (whole, _) = run(&path, false, usize::MAX).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(newlines(&bytes), 13);
    // stopped by the caller
    let part = folder.path().join("part.jsonl");
    let (stopped, _) = run(&part, false, 5).unwrap();
    assert!(!stopped.complete && stopped.overall.answers >= 5 && stopped.overall.answers < 12);
    assert!(stopped.table().contains("stopped before the end"));
    let (resumed, first) = run(&part, true, usize::MAX).unwrap();
    assert_eq!((&resumed.answers, first), (&whole.answers, stopped.overall.answers));
    assert_eq!(fs::read(&part).unwrap(), bytes);
    // killed at any byte
    for cut in (0..bytes.len()).step_by(bytes.len() / 23) {
        fs::write(&part, &bytes[..cut]).unwrap();
        let (resumed, first) = run(&part, true, usize::MAX).unwrap();
        assert_eq!(resumed.answers, whole.answers, "cut at {cut}");
        let lines = newlines(&bytes[..cut]);
        assert_eq!(first, lines.saturating_sub(1), "cut at {cut}");
        assert_eq!(fs::read(&part).unwrap(), bytes, "cut at {cut}");
    }
    let refused = |settings: &EvalSettings, resume| open(&path, settings, resume).unwrap_err().to_string();
    assert!(refused(&settings(), false).contains("--resume continues it"));
    assert!(refused(&EvalSettings { seed: 6, ..settings() }, true).contains("of other settings"));
    let error = AnswerLog::open(&path, "another", &prompter, &settings(), true).unwrap_err().to_string();
    assert!(error.contains("of another model"), "{error}");
    // more samples may be asked for
    assert_eq!(open(&path, &EvalSettings { samples: 8, ..settings() }, true).unwrap().len(), 12);
    fs::write(&part, "{\"x\": 1}\n").unwrap();
    assert!(open(&part, &settings(), true).unwrap_err().to_string().contains("line 1: not the beginning"));
    let mut damaged = String::from_utf8(bytes).unwrap();
    damaged.insert_str(damaged.find('\n').unwrap() + 1, "nonsense\n");
    fs::write(&part, damaged).unwrap();
    assert!(open(&part, &settings(), true).unwrap_err().to_string().contains("line 2: no answer"));
}

#[test]
fn thoughts_are_told_from_answers() {
    let (_, tokenizer) = model();
    let template = ChatTemplate::named("minke").unwrap();
    let split = |thinking, text: &'static str| {
        let prompter = Prompter::of(Some(&template), thinking, tokenizer.bos(), &tokenizer).unwrap();
        let parts = prompter.split(text);
        (parts.thought, parts.answer)
    };
    assert_eq!(split(Thinking::Default, "a</think>b"), (Some("a"), Some("b")));
    assert_eq!(split(Thinking::Default, "a"), (Some("a"), None));
    assert_eq!(split(Thinking::Empty, "b"), (None, Some("b")));
    let worked = |think| Prompter::new(Form::Worked { think }, None, &tokenizer).unwrap();
    let parts = worked(true);
    assert_eq!(parts.split("T: a\nA: b\nQ: c").answer, Some("b"));
    assert_eq!(worked(false).split(" b").answer, Some("b"));
    // and both are put as the training text has them
    let task = Suite::parse("chain:1").unwrap().tasks(Split::Train, 1, 1).unwrap().remove(0);
    let text = |prompter: &Prompter| tokenizer.decode(&prompter.prompt(&tokenizer, &task).unwrap(), false);
    assert_eq!(text(&worked(true)), format!("Q: {}\n", task.prompt));
    assert_eq!(text(&worked(false)), format!("Q: {}\nT:\nA:", task.prompt));
    // token for token: a training text encodes its prompt and its completion apart
    let settings = crate::worked::Settings {
        suite: Suite::parse("core:1-2").unwrap(),
        count: 60,
        mix: crate::worked::Mix::only(minke_gym::Care::None),
        split: Split::Train,
        seed: 1,
        format: crate::worked::Format::Text,
    };
    for one in crate::worked::problems(&settings).unwrap() {
        let encode = |text: &str| tokenizer.encode(text).unwrap();
        let prompt = encode(&crate::worked::question(&one.prompt));
        let whole = [prompt.clone(), encode(&one.completion())].concat();
        let task = Task { prompt: one.prompt, ..task.clone() };
        assert_eq!(worked(true).prompt(&tokenizer, &task).unwrap(), prompt);
        assert!(whole.starts_with(&worked(false).prompt(&tokenizer, &task).unwrap()));
    }
    let names: Vec<String> = [worked(true), worked(false)].iter().map(Prompter::name).collect();
    assert_ne!(names[0], names[1]);
}

#[test]
fn without_thinking_no_answer_has_a_thought() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, tokenizer) = model();
    let template = ChatTemplate::named("minke").unwrap();
    let tasks = &tasks(folder.path())[..3];
    let settings = EvalSettings { samples: 8, max_tokens: 100, k: vec![1], ..settings() };
    let mut marks = |thinking, name: &str| {
        let prompter = Prompter::of(Some(&template), thinking, tokenizer.bos(), &tokenizer).unwrap();
        let path = folder.path().join(name);
        let mut log = AnswerLog::open(&path, "whale", &prompter, &settings, false).unwrap();
        let (cpu, mut on) = (Cpu::detect(1), |_: Progress| ControlFlow::Continue(()));
        evaluate_logged(&mut model, &cpu, &tokenizer, &prompter, tasks, &settings, Some(&mut log), &mut on)
            .unwrap();
        fs::read_to_string(path).unwrap().matches("think>").count()
    };
    assert_eq!(marks(Thinking::Empty, "empty"), 0);
    // this model writes marks wherever it may
    assert!(marks(Thinking::Open, "open") > 0);
}

#[test]
fn a_text_in_windows_is_foretold_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    let (mut model, tokenizer) = model();
    let cpu = Cpu::detect(1);
    let mut run = |text: &str, bos| {
        fs::write(&path, text).unwrap();
        perplexity(&mut model, &cpu, &tokenizer, bos, &path, &mut |_, _| ControlFlow::Continue(()))
    };
    // within one window it is the score itself
    let text = "the whale dives and sings";
    let short = run(text, tokenizer.bos()).unwrap().unwrap();
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    ids.extend(tokenizer.encode(text).unwrap());
    assert_eq!((short.bytes, short.tokens), (text.len(), ids.len() - 1));
    // random weights know nothing: about as many nats a token as there are tokens to choose from
    let per_token = short.nats / short.tokens as f64;
    assert!((4.0..9.0).contains(&per_token), "{per_token}");
    assert!((short.perplexity - per_token.exp()).abs() < 1e-6);
    let expected = short.nats / std::f64::consts::LN_2 / text.len() as f64;
    assert!((short.bits_per_byte - expected).abs() < 1e-9);
    // several windows: every token once
    let long = run(&"the whale dives and sings 01 ".repeat(200), tokenizer.bos()).unwrap().unwrap();
    assert!(long.tokens > 2 * long.window, "{} tokens, windows of {}", long.tokens, long.window);
    assert_eq!(long.bytes, 200 * 29);
    // without a beginning the first token does not count, nor its bytes
    let open = run(text, None).unwrap().unwrap();
    assert!(open.tokens == short.tokens - 1 && open.bytes < short.bytes);
    assert!(run("", None).unwrap_err().to_string().contains("no text"));
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("b");
    fs::write(&binary, b"a\xff").unwrap();
    let (mut model, tokenizer) = self::model();
    let error =
        perplexity(&mut model, &cpu, &tokenizer, None, &binary, &mut |_, _| ControlFlow::Continue(()));
    assert!(error.unwrap_err().to_string().contains("not UTF-8 at byte 1"));
    let mut score = Engine::new(&mut model, &cpu, None);
    let sum: f64 = score.score(&ids, &mut |_| {}).unwrap().iter().map(|&x| f64::from(x)).sum();
    assert!((sum + short.nats).abs() < 1e-6, "{sum} and {}", short.nats);
}

#[test]
fn a_model_is_no_distance_from_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    fs::write(&path, "the whale dives and sings 01 ".repeat(60)).unwrap();
    let ((mut model, tokenizer), (mut same, _)) = (model(), model());
    let cpu = Cpu::detect(2);
    let bos = tokenizer.bos();
    let mut through = |other: &mut Model, kind| {
        let mut last = (0, 0);
        let found = divergence(&mut model, other, kind, &cpu, &tokenizer, bos, &path, &mut |done, all| {
            assert!(done >= last.0 && done <= all);
            last = (done, all);
            ControlFlow::Continue(())
        });
        found.map(|found| found.unwrap())
    };
    let close = through(&mut same, CacheKind::Expanded(KvFormat::Int8)).unwrap();
    assert!(close.kl_mean > 0.0 && close.kl_mean < 1e-3, "{}", close.line());
    let mut against = |other: &mut Model| through(other, CacheKind::Model);
    let nothing = against(&mut same).unwrap();
    assert_eq!((nothing.kl_mean, nothing.kl_max, nothing.same_top), (0.0, 0.0, 1.0));
    assert!(nothing.tokens > 2 * nothing.window);
    let mut other = Model::random(same.config.clone(), same.precision, 99);
    let far = against(&mut other).unwrap();
    assert!(
        far.kl_mean > 0.0 && far.kl_median <= far.kl_90 && far.kl_90 <= far.kl_99 && far.kl_99 <= far.kl_max
    );
    assert!(far.same_top < 0.9 && far.kl_error > 0.0, "{}", far.line());
    assert_eq!(far.perplexity, nothing.perplexity);
    // windows and tokens are those of the perplexity of each
    for (model, expected) in [(&mut same, far.perplexity), (&mut other, far.reference_perplexity)] {
        let one = perplexity(model, &cpu, &tokenizer, bos, &path, &mut |_, _| ControlFlow::Continue(()))
            .unwrap()
            .unwrap();
        assert_eq!((one.tokens, one.window), (far.tokens, far.window));
        assert!((one.perplexity / expected - 1.0).abs() < 1e-5, "{} and {expected}", one.perplexity);
    }
    let config = Config { vocab_size: same.config.vocab_size + 1, ..same.config.clone() };
    let error = against(&mut Model::random(config, same.precision, 1)).unwrap_err();
    assert!(error.to_string().contains("only models of one vocabulary can be compared"), "{error}");
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    assert!(check_settings(&settings()).is_ok());
    for wrong in [
        EvalSettings { samples: 0, ..settings() },
        EvalSettings { max_tokens: 0, ..settings() },
        EvalSettings { k: vec![5], ..settings() },
        EvalSettings { k: vec![0], ..settings() },
    ] {
        assert!(check_settings(&wrong).is_err());
    }
}
