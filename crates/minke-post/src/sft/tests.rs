use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::tokenizer::TrainOptions;
use minke_model::{Config, DType, IGNORE, Model, Precision};
use minke_train::checkpoint;
use minke_train::metrics::Line;
use minke_train::recipe::Document;

use super::data::{Overlong, conversation, read};
use super::*;
use crate::metrics::Record;

fn tokenizer() -> Tokenizer {
    let sample = vec!["what is 1 + 2? 3 is what the sum is, and so on 0123456789\n".repeat(20)];
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    Tokenizer::train(&sample, &options).unwrap()
}

fn model(tokenizer: &Tokenizer, vectors: &str, precision: DType) -> Model {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../minke-model/tests/vectors/");
    let text = fs::read(format!("{root}{vectors}/config.json")).unwrap();
    let mut value: Value = serde_json::from_slice(&text).unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["max_position_embeddings"] = 256.into();
    Model::random(Config::from_json(&value).unwrap(), Precision::uniform(precision), 5)
}

fn settings<'a>(tokenizer: &'a Tokenizer, template: &'a ChatTemplate) -> ReadSettings<'a> {
    ReadSettings {
        tokenizer,
        template,
        sequence_length: 128,
        vocabulary: tokenizer.vocab_size(),
        overlong: Overlong::Refuse,
        max_bad_lines: 0,
        threads: 2,
    }
}

fn file(folder: &Path, name: &str, lines: &[String]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn sums(count: usize) -> Vec<String> {
    let line = |n: usize| {
        let (a, b) = (n % 10, n / 10 % 10);
        json!({ "prompt": format!("what is {a} + {b}?"), "thought": format!("{a} and {b}"), "answer": (a + b).to_string() })
            .to_string()
    };
    (0..count).map(line).collect()
}

#[test]
fn lines_become_conversations() {
    let said = |value: Value| {
        let messages = conversation(&value)?;
        let shown = messages.iter().map(|m| {
            let thought = m.reasoning_content.as_ref().map(|t| format!("({t})")).unwrap_or_default();
            format!("{}: {thought}{}", m.role.name(), m.content)
        });
        Ok::<_, String>(shown.collect::<Vec<_>>().join("; "))
    };
    let cases = [
        (json!({"prompt": "q", "completion": "a"}), "user: q; assistant: a"),
        (json!({"prompt": "q", "answer": "a", "thought": "t"}), "user: q; assistant: (t)a"),
        (
            json!({"prompt": "q", "answer": "a", "reasoning_content": "t", "thought": null}),
            "user: q; assistant: (t)a",
        ),
        (
            json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a", "reasoning_content": "t"}]}),
            "system: s; user: q; assistant: (t)a",
        ),
        (
            json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}),
            "user: q; assistant: a",
        ),
    ];
    for (value, expected) in cases {
        assert_eq!(said(value.clone()).unwrap(), expected, "{value}");
    }
    for (value, why) in [
        (json!(3), "expected an object"),
        (json!({"text": "x"}), "got the keys text"),
        (json!({"prompt": "q"}), "without `completion`"),
        (json!({"messages": "q"}), "not a list"),
        (json!({"messages": [{"content": "q"}]}), "no `messages[0].role`"),
        (json!({"messages": [{"role": "<|user|>", "content": "q"}]}), "expected system, user"),
        (json!({"messages": [{"role": "user", "content": 3}]}), "neither text nor a list"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "parts that are no text"),
        (json!({"messages": [{"role": "user", "content": "q"}]}), "nothing to learn"),
        (json!({"prompt": "q", "answer": "a", "thought": 7}), "`thought` is not a string"),
    ] {
        let error = said(value.clone()).unwrap_err();
        assert!(error.contains(why), "{value}: {error}");
    }
}

#[test]
fn bad_lines_are_named_and_counted_and_refused_beyond_a_limit() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, template) = (tokenizer(), ChatTemplate::named("minke").unwrap());
    let mut lines = sums(6);
    lines.insert(1, "{\"prompt\": ".to_owned());
    lines.insert(3, String::new());
    lines.insert(5, "[]".to_owned());
    let paths = [file(folder.path(), "a.jsonl", &lines)];
    let settings = settings(&tokenizer, &template);
    let error = read(&paths, &settings, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("a.jsonl, line 2: not JSON") && error.contains("max_bad_lines is 0"), "{error}");
    let one = ReadSettings { max_bad_lines: 1, ..settings };
    let error = read(&paths, &one, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("line 6: expected an object"), "{error}");
    let two = ReadSettings { max_bad_lines: 2, ..settings };
    let mut heard = (0, 0);
    let examples = read(&paths, &two, &mut |done, total| heard = (done, total)).unwrap();
    assert_eq!((examples.samples.len(), examples.counts.bad, examples.counts.lines), (6, 2, 8));
    assert!(heard.0 > 0 && heard.0 <= heard.1);
    assert!(examples.counts.warnings()[0].contains("2 of 8 lines"));
    // any number of threads reads the same
    let alone = read(&paths, &ReadSettings { threads: 1, ..two }, &mut |_, _| {}).unwrap();
    assert_eq!((&alone.samples, &alone.fingerprint), (&examples.samples, &examples.fingerprint));
    assert!(read(&[folder.path().join("none.jsonl")], &settings, &mut |_, _| {}).is_err());
    let empty = [file(folder.path(), "b.jsonl", &[])];
    assert!(read(&empty, &settings, &mut |_, _| {}).unwrap_err().to_string().contains("no examples"));
}

#[test]
fn long_samples_are_refused_dropped_or_cut() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, template) = (tokenizer(), ChatTemplate::named("minke").unwrap());
    let mut lines = sums(2);
    lines.push(json!({"prompt": "q", "completion": "z".repeat(500)}).to_string());
    lines.push(json!({"prompt": "z".repeat(500), "completion": "a"}).to_string());
    let paths = [file(folder.path(), "a.jsonl", &lines)];
    let settings = settings(&tokenizer, &template);
    let error = read(&paths, &settings, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("line 3") && error.contains("data.overlong"), "{error}");
    let dropping = ReadSettings { overlong: Overlong::Drop, ..settings };
    let read_with = |settings| read(&paths, &settings, &mut |_, _| {}).unwrap();
    let examples = read_with(dropping);
    assert_eq!((examples.samples.len(), examples.counts.dropped), (2, 2));
    let examples = read_with(ReadSettings { overlong: Overlong::Cut, ..settings });
    // of the last one the whole answer was cut off
    let Counts { cut, unmarked, dropped, .. } = examples.counts;
    assert_eq!((examples.samples.len(), cut, unmarked, dropped), (3, 2, 1, 0));
    assert_eq!(examples.samples[2].ids.len(), 128);
    assert!(examples.samples[2].mask.iter().skip(100).all(|&learned| learned));
}

#[test]
fn the_same_question_is_on_one_side() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, template) = (tokenizer(), ChatTemplate::named("minke").unwrap());
    let mut lines = sums(60);
    lines.extend(sums(60));
    let paths = [file(folder.path(), "a.jsonl", &lines)];
    let examples = read(&paths, &settings(&tokenizer, &template), &mut |_, _| {}).unwrap();
    let (all, none) = examples.clone().split(0.0).unwrap();
    assert_eq!((all.len(), none.len()), (120, 0));
    let (training, held_out) = examples.split(0.3).unwrap();
    assert_eq!(training.len() + held_out.len(), 120);
    assert!((10..70).contains(&held_out.len()) && held_out.len() % 2 == 0, "{}", held_out.len());
    assert!(held_out.iter().all(|sample| !training.contains(sample)));
}

fn sample(ids: &[u32], learned_from: usize) -> data::Sample {
    data::Sample { ids: ids.to_vec(), mask: (0..ids.len()).map(|at| at >= learned_from).collect() }
}

#[test]
fn a_batch_asks_for_what_is_to_be_learned_and_never_past_an_end() {
    let batch = pack::pack(&[sample(&[1, 2, 3, 4], 2), sample(&[5, 6, 7], 1)], 2);
    let segments: Vec<_> = batch.segments.iter().map(|s| (s.start, s.len)).collect();
    assert_eq!(segments, [(0, 3), (3, 2)]);
    assert_eq!(batch.tokens, [1, 2, 3, 5, 6]);
    assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
    assert_eq!(batch.labels, [IGNORE, 3, 4, 6, 7]);
    assert_eq!(batch.mtp[0].tokens, [2, 3, 4, 6, 7]);
    assert_eq!(batch.mtp[0].labels, [3, 4, IGNORE, 7, IGNORE]);
    assert_eq!(batch.mtp[1].tokens, [3, 4, 0, 7, 0]);
    assert_eq!(batch.mtp[1].labels, [4, IGNORE, IGNORE, IGNORE, IGNORE]);
}

#[test]
fn packed_losses_are_those_of_samples_alone_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, template) = (tokenizer(), ChatTemplate::named("minke").unwrap());
    let mut lines = sums(7);
    lines.push(json!({"prompt": "and so on", "completion": "0123456789".repeat(4)}).to_string());
    let paths = [file(folder.path(), "a.jsonl", &lines)];
    let samples = read(&paths, &settings(&tokenizer, &template), &mut |_, _| {}).unwrap().samples;
    let cpu = Cpu::detect(2);
    for precision in [DType::F32, DType::Bf16] {
        for vectors in ["v3_mtp1", "llama_gqa"] {
            let mut model = model(&tokenizer, vectors, precision);
            let mtp = model.config.num_nextn_predict_layers;
            let packed = model.evaluate(&cpu, &pack::pack(&samples, mtp));
            let alone: Vec<f32> =
                samples.iter().flat_map(|sample| model.evaluate(&cpu, &pack::pack([sample], mtp))).collect();
            let bits = |losses: &[f32]| losses.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&packed), bits(&alone), "{vectors} {precision:?}");
            let learned: usize = samples.iter().map(|s| s.mask.iter().skip(1).filter(|m| **m).count()).sum();
            assert_eq!(packed.iter().filter(|&&loss| loss != 0.0).count(), learned);
        }
    }
}

#[test]
fn steps_are_a_function_of_seed_and_number() {
    let samples: Vec<data::Sample> = (0..23).map(|n| sample(&vec![n; 3 + (n as usize * 7) % 9], 1)).collect();
    let mut batches = Batches::new(samples.clone(), 20, 2, 0, 7);
    let steps = batches.steps_of(3);
    let tokens = |batches: &mut Batches, step| {
        let step = batches.step(step);
        step.micro.into_iter().map(|batch| batch.tokens).collect::<Vec<_>>()
    };
    let all: Vec<_> = (0..steps).map(|step| tokens(&mut batches, step)).collect();
    // whatever was asked before
    let mut other = Batches::new(samples.clone(), 20, 2, 0, 7);
    for step in [steps - 1, 0, steps / 2, 1] {
        assert_eq!(tokens(&mut other, step), all[step as usize]);
    }
    assert_ne!(tokens(&mut Batches::new(samples.clone(), 20, 2, 0, 8), 0), all[0]);
    let mut counts = vec![0; 23];
    for micro in all.iter().flatten() {
        assert!(micro.len() <= 20 && !micro.is_empty());
        for &token in micro {
            counts[token as usize] += 1;
        }
    }
    let expected: Vec<usize> = samples.iter().map(|s| 3 * (s.ids.len() - 1)).collect();
    assert_eq!(counts, expected);
    let begins = [0, batches.steps_of(1), batches.steps_of(2)];
    assert_ne!(all[begins[0] as usize], all[begins[1] as usize]);
    assert_eq!(batches.step(begins[1] - 1).epoch, 1.0);
    assert!(batches.step(begins[1]).epoch > 1.0);
}

fn recipe(folder: &Path, more: &str) -> PathBuf {
    let path = folder.join("tune.toml");
    let text = format!(
        "[run]\nseed = 3\nout = '{0}/run'\n[model]\npath = 'base'\ntemplate = 'minke'\n\
         [data]\nsources = [{{ path = 'a.jsonl' }}]\nvalidation_share = 0.1\n\
         [train]\nsequence_length = 64\nbatch_size = 4\nepochs = 6\nlr = 0.01\neval_every = 4\ncheckpoint_every = 3\n{more}",
        folder.display()
    );
    fs::write(&path, text).unwrap();
    path
}

fn options(recipe: PathBuf, out: Option<PathBuf>, resume: bool) -> Options {
    Options { recipe, overrides: Vec::new(), out, resume, threads: 2, force: false, cache: None }
}

#[test]
fn a_run_learns_and_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let tokenizer = tokenizer();
    let base = model(&tokenizer, "v3_mtp1", DType::F32);
    checkpoint::save_model(&path.join("base"), &base, &tokenizer, None).unwrap();
    file(path, "a.jsonl", &sums(60));
    let recipe = recipe(
        path,
        "[sample]\nprompts = ['what is 1 + 2?']\ntokens = 8\n[eval]\nsuite = 'addition:1'\nper_level = 2\nmax_tokens = 8\n",
    );
    let run_to = |out: &str, resume: bool, until: u64| {
        let stop = AtomicBool::new(false);
        let (mut losses, mut samples) = (Vec::new(), Vec::new());
        let outcome =
            run(&options(recipe.clone(), Some(path.join(out)), resume), &stop, &mut |event| match event {
                Event::Step { metrics, .. } => {
                    assert!(metrics.get("max_violation").is_some() && metrics.get("dead_experts").is_some());
                    stop.store(metrics.step == until, std::sync::atomic::Ordering::Relaxed);
                }
                Event::Evaluation(values) => {
                    assert!(values.get("pass@1").is_some());
                    losses.push(values.get("loss").unwrap());
                }
                Event::Sample(sample) => samples.push(sample.text.clone()),
                _ => {}
            });
        (outcome.unwrap(), losses, samples)
    };
    let (whole, losses, samples) = run_to("whole", false, 0);
    assert!(losses.last().unwrap() < &(losses[0] * 0.8), "{losses:?}");
    assert!(samples.len() == 2 && samples[0].starts_with("<think>"), "{samples:?}");
    let model = whole.model.unwrap();
    assert_eq!(
        ChatTemplate::load(&model).unwrap().unwrap().source(),
        ChatTemplate::named("minke").unwrap().source()
    );
    assert!(whole.folder.join("report.md").is_file());
    // a run that was over knows what came of it
    let (again, ..) = run_to("whole", true, 0);
    let score = |values: &Option<Values>| values.as_ref().and_then(|values| values.get("pass@1"));
    assert!(score(&again.evaluation).is_some() && score(&again.evaluation) == score(&whole.evaluation));

    // stopped before its first step it was never there
    let never = options(recipe.clone(), Some(path.join("never")), false);
    let stopped = run(&never, &AtomicBool::new(true), &mut |_| {}).unwrap();
    assert!(stopped.step == 0 && !path.join("never").exists());
    let (part, ..) = run_to("parts", false, 5);
    assert!(part.step == 5 && part.model.is_none());
    // wherever the model lies by then
    fs::rename(path.join("base"), path.join("moved")).unwrap();
    let text = fs::read_to_string(&recipe).unwrap();
    fs::write(&recipe, text.replace("path = 'base'", "path = 'moved'")).unwrap();
    let (rest, ..) = run_to("parts", true, 0);
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&rest.model.unwrap()) == weights(&model), "a resumed run ends in other weights");

    // other samples cannot go on from these weights
    file(path, "a.jsonl", &sums(59));
    let error = run(&options(recipe, Some(path.join("parts")), true), &AtomicBool::new(false), &mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(error.contains("other samples"), "{error}");
}

#[test]
fn a_folder_names_the_token_that_ends_a_turn() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let base = model(&tokenizer, "v3_mtp1", DType::F32);
    let ends = |out: &str, template: Option<&ChatTemplate>| {
        checkpoint::save_model(&folder.path().join(out), &base, &tokenizer, template).unwrap();
        minke_infer::load_model(
            &folder.path().join(out).display().to_string(),
            None,
            minke_model::Purpose::Train,
        )
        .unwrap()
        .stop_ids()
    };
    let text = ends("text", None);
    assert_eq!(ends("minke", Some(&ChatTemplate::named("minke").unwrap())), text);
    let own =
        "{% for message in messages %}{{ '<|assistant|>' + message.content + '<|system|>' }}{% endfor %}";
    let own = ends("own", Some(&ChatTemplate::new("own", own).unwrap()));
    assert!(
        own.contains(&tokenizer.id_of("<|system|>").unwrap()) && text.iter().all(|id| own.contains(id)),
        "{own:?}"
    );
}

#[test]
fn a_run_that_was_killed_before_its_first_checkpoint_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let tokenizer = tokenizer();
    let base = model(&tokenizer, "v3_mtp1", DType::F32);
    checkpoint::save_model(&path.join("base"), &base, &tokenizer, None).unwrap();
    file(path, "a.jsonl", &sums(20));
    let recipe = recipe(path, "[sample]\nprompts = ['what is 1 + 2?']\ntokens = 4\n");
    let told = |resume: bool| {
        let stop = AtomicBool::new(false);
        run(&options(recipe.clone(), None, resume), &stop, &mut |event| {
            if let Event::Step { metrics, .. } = event
                && metrics.step == 2
            {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        })
        .unwrap();
        let records: Vec<Record> = minke_train::metrics::read(&path.join("run/metrics.jsonl")).unwrap();
        records.iter().map(|record| (std::mem::discriminant(record), record.step())).collect::<Vec<_>>()
    };
    let first = told(false);
    assert_eq!(first.iter().map(|(_, step)| *step).collect::<Vec<_>>(), [0, 0, 1, 2]);
    // as if it had been killed: what a step 0 showed is there, and no checkpoint
    fs::remove_dir_all(path.join("run/checkpoints")).unwrap();
    assert_eq!(told(true), first, "each record once");
}

#[test]
fn recipes_say_all_and_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = recipe(folder.path(), "[eval]\nsuite = 'core'\n");
    let read = |path: &Path, set: &[&str]| {
        let overrides: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        Recipe::read(&Document::load(path, &overrides).unwrap())
    };
    let first = read(&path, &["precision=f32"]).unwrap();
    assert_eq!(
        first.data.sources[0].path,
        std::path::absolute(folder.path().join("a.jsonl")).unwrap().display().to_string()
    );
    let written = folder.path().join("tune-resolved.toml");
    fs::write(&written, first.to_toml()).unwrap();
    let again = read(&written, &[]).unwrap();
    assert_eq!(Recipe { run: first.run.clone(), ..again }, first);
    for (set, why) in [
        ("train.sequence_lenght=3", "did you mean `sequence_length`?"),
        ("train.steps=3", "train.epochs"),
        ("data.overlong=shorten", "\"refuse\", \"drop\" or \"cut\""),
        ("data.validation_share=0.9", "0 to 0.5"),
        ("precision=f16", "\"f32\", \"bf16\" or \"fp8\""),
        ("eval.suites=core", "suite"),
        ("evals.suite=core", "evals"),
    ] {
        let error = read(&path, &[set]).unwrap_err().to_string();
        assert!(error.contains(why), "{set}: {error}");
    }
    let wrong = read(&path, &["model.template=chatlm"]).unwrap().template().unwrap_err().to_string();
    assert!(wrong.contains("chatml") && wrong.contains("chatlm"), "{wrong}");
    let is_free = |key| recipe::is_free(key, "1", "2");
    assert!(is_free("train.keep") && is_free("data.sources") && is_free("model.path"));
    assert!(!is_free("train.lr") && !is_free("precision"));
}
