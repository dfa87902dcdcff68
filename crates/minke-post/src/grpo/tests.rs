use std::fs;
use std::path::Path;

use minke_data::Tokenizer;
use minke_data::template::ChatTemplate;
use minke_data::tokenizer::TrainOptions;
use minke_model::{Config, Model, Precision};
use minke_train::checkpoint::save_model;
use minke_train::metrics::read;
use minke_train::recipe::Document;

use super::*;
use crate::metrics::Record;

/// A random model that can be asked, in a folder.
fn model(folder: &Path, dtype: minke_model::DType) {
    let sample =
        vec!["mod 10: start 3, then +4 *2 = ? Start with 5 and do -1 +2 modulo 10. 0123456789\n".repeat(9)];
    let tokenizer =
        Tokenizer::train(&sample, &TrainOptions { vocab_size: 290, ..TrainOptions::default() }).unwrap();
    let vectors = concat!(env!("CARGO_MANIFEST_DIR"), "/../minke-model/tests/vectors");
    let mut names: Vec<_> = fs::read_dir(vectors).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let with_modules = names.iter().find_map(|path| {
        let text = fs::read(path.join("config.json")).ok()?;
        let value: Value = serde_json::from_slice(&text).ok()?;
        (value["num_nextn_predict_layers"] == 1 && value["model_type"] == "deepseek_v3").then_some(value)
    });
    let mut value = with_modules.unwrap();
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["max_position_embeddings"] = 160.into();
    let model = Model::random(Config::from_json(&value).unwrap(), Precision::uniform(dtype), 5);
    save_model(folder, &model, &tokenizer, Some(&ChatTemplate::named("minke").unwrap())).unwrap();
}

fn recipe(folder: &Path, more: &str) -> Options {
    let path = folder.join("rl.toml");
    let text = format!(
        "[run]\nout = {:?}\nseed = 3\n[model]\npath = {:?}\n[tasks]\nsuite = \"chain:1-2\"\neval_per_level = 2\n\
         [rollout]\nprompts = 3\ngroup = 4\nmax_tokens = 80\nresample = 0\n{more}",
        folder.join("run"),
        folder.join("model"),
    );
    fs::write(&path, text).unwrap();
    Options { recipe: path, threads: 2, ..Options::default() }
}

fn go(options: &Options, stop_after: Option<u64>) -> (Outcome, Vec<Values>) {
    let stop = AtomicBool::new(false);
    let outcome = run(options, &stop, &mut |event| {
        if let Event::Step { metrics, .. } = event
            && Some(metrics.step) == stop_after
        {
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    })
    .unwrap();
    let records: Vec<Record> = read(&outcome.folder.join("metrics.jsonl")).unwrap();
    let steps = records.into_iter().filter_map(|record| match record {
        Record::Step(values) => Some(values),
        Record::Evaluation(_) | Record::Sample(_) => None,
    });
    (outcome, steps.collect())
}

/// Random answers differ in length and form, so the soft punishment of long ones gives groups something to learn from.
const SIGNAL: &str = "[reward]\nformat = 0.5\noverlong_buffer = 80\noverlong = 1.0\n";

#[test]
fn rollout_and_trainer_agree_to_the_bit_in_every_precision() {
    use minke_model::DType::{Bf16, F32};
    for (dtype, precision) in [(F32, "f32"), (Bf16, "bf16"), (Bf16, "fp8")] {
        for sampling in ["temperature = 0.9", "top_p = 0.9\ntop_k = 150\ntemperature = 1.3"] {
            let folder = tempfile::tempdir().unwrap();
            model(&folder.path().join("model"), dtype);
            // small passes, so that a rollout is trained in several of them
            let more = format!("{sampling}\n{SIGNAL}[train]\nsteps = 3\nlr = 0.01\nrows_per_pass = 300\n");
            let overrides = vec![format!("precision={precision}")];
            let (outcome, steps) = go(&Options { overrides, ..recipe(folder.path(), &more) }, None);
            assert_eq!((outcome.step, steps.len()), (3, 3));
            let mut compared = 0;
            for step in &steps {
                let Some(kl) = step.get("kl_rollout") else { continue };
                compared += 1;
                assert_eq!(
                    (kl, step.get("bits_differ"), step.get("router_diff")),
                    (0.0, Some(0.0), Some(0.0))
                );
                assert!(step.get("grad_norm").unwrap() > 0.0);
                assert!(step.get("mtp_loss").unwrap() > 0.0);
            }
            assert!(compared >= 2, "{steps:?}");
        }
    }
}

#[test]
fn later_updates_of_a_rollout_drift_and_weights_move() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("model"), minke_model::DType::F32);
    let more = format!(
        "{SIGNAL}[objective]\nalgorithm = \"dapo\"\nbeta = 0.05\n[train]\nsteps = 2\nlr = 0.02\nepochs = 3\nminibatches = 2\n"
    );
    let (outcome, steps) = go(&recipe(folder.path(), &more), None);
    assert!(steps.iter().all(|step| step.get("kl_rollout") == Some(0.0)), "the first update is on policy");
    assert!(steps.iter().any(|step| step.get("clipped").unwrap() > 0.0), "later ones are clipped: {steps:?}");
    assert!(steps.last().unwrap().get("kl_reference").unwrap() > 0.0);
    let weights = |path: &Path| fs::read(path.join("model.safetensors")).unwrap();
    assert_ne!(weights(&outcome.model.unwrap()), weights(&folder.path().join("model")));
}

#[test]
fn an_update_does_not_depend_on_how_answers_are_cut_into_waves_and_passes() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("model"), minke_model::DType::F32);
    let norm = |rows: usize, wave: usize| {
        let _ = fs::remove_dir_all(folder.path().join("run"));
        // even experts above all
        let more = format!(
            "{SIGNAL}[train]\nsteps = 1\nlr = 0.001\nsequence_balance_alpha = 50\nrows_per_pass = {rows}\n"
        );
        let overrides = vec![format!("rollout.concurrency={wave}")];
        let (_, steps) = go(&Options { overrides, ..recipe(folder.path(), &more) }, None);
        steps[0].get("grad_norm").unwrap()
    };
    let whole = norm(8192, 256);
    for wave in [1, 5] {
        assert_eq!(norm(8192, wave).to_bits(), whole.to_bits(), "{wave} answers at once");
    }
    for rows in [1, 200] {
        let cut = norm(rows, 256);
        assert!((cut / whole - 1.0).abs() < 1e-4, "{rows} rows a pass: {cut}, in one pass {whole}");
    }
}

#[test]
fn a_run_that_was_stopped_goes_on_bit_for_bit() {
    let weights =
        |outcome: &Outcome| fs::read(outcome.model.as_ref().unwrap().join("model.safetensors")).unwrap();
    let more = format!("{SIGNAL}[train]\nsteps = 4\nlr = 0.01\ncheckpoint_every = 1\n");
    let whole = tempfile::tempdir().unwrap();
    model(&whole.path().join("model"), minke_model::DType::Bf16);
    let (uninterrupted, steps) = go(&recipe(whole.path(), &more), None);
    let cut = tempfile::tempdir().unwrap();
    model(&cut.path().join("model"), minke_model::DType::Bf16);
    let options = recipe(cut.path(), &more);
    let (stopped, _) = go(&options, Some(2));
    assert_eq!((stopped.step, &stopped.model), (2, &None));
    // another number of threads, too
    let (resumed, again) = go(&Options { resume: true, threads: 1, ..options }, None);
    assert_eq!(weights(&resumed), weights(&uninterrupted));
    let told = |steps: &[Values]| -> Vec<_> {
        let stable = |name: &str| !name.ends_with("_s");
        let of = |step: &Values| {
            let mut values = step.values.clone();
            values.retain(|name, _| stable(name));
            values
        };
        steps.iter().map(of).collect()
    };
    assert_eq!(told(&again), told(&steps));
}

#[test]
fn a_run_that_goes_on_does_so_from_what_it_began_with() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("model");
    model(&base, minke_model::DType::F32);
    let task = |answer: u32| {
        let line = format!("{{\"prompt\": \"1+1\", \"answer\": \"{answer}\"}}\n");
        fs::write(folder.path().join("tasks.jsonl"), line).unwrap();
    };
    task(2);
    let more = format!("{SIGNAL}[objective]\nbeta = 0.1\n[train]\nsteps = 3\ncheckpoint_every = 1\n");
    let suite = format!("tasks.suite={:?}", folder.path().join("tasks.jsonl"));
    let overrides = vec![suite, "tasks.eval_suite=chain:1".to_owned()];
    let options = Options { overrides, ..recipe(folder.path(), &more) };
    let (stopped, _) = go(&options, Some(1));
    assert_eq!(stopped.step, 1);
    let options = Options { resume: true, ..options };
    let refusal = || {
        let error = run(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err();
        assert!(error.is_user_error(), "{error}");
        error.to_string()
    };
    task(3);
    assert!(refusal().contains("other tasks"), "{}", refusal());
    task(2);
    // other weights are another reference, another context another model
    let file = base.join("model.safetensors");
    let weights = fs::read(&file).unwrap();
    let mut others = weights.clone();
    *others.last_mut().unwrap() ^= 1;
    fs::write(&file, others).unwrap();
    assert!(refusal().contains("another reference"), "{}", refusal());
    fs::write(&file, weights).unwrap();
    let file = base.join("config.json");
    let config = fs::read_to_string(&file).unwrap();
    fs::write(&file, config.replace("160", "170")).unwrap();
    assert!(refusal().contains("the model: its config"), "{}", refusal());
    fs::write(&file, config).unwrap();
    // where they lie does not matter
    let there = folder.path().join("there");
    fs::create_dir(&there).unwrap();
    for name in ["model", "tasks.jsonl"] {
        fs::rename(folder.path().join(name), there.join(name)).unwrap();
    }
    let mut moved = options.clone();
    for (key, name) in [("model.path", "model"), ("tasks.suite", "tasks.jsonl")] {
        moved.overrides.push(format!("{key}={:?}", there.join(name)));
    }
    let (resumed, _) = go(&moved, None);
    assert_eq!(resumed.step, 3);
}

#[test]
fn a_state_may_be_the_curriculum_alone() {
    let folder = tempfile::tempdir().unwrap();
    let options = recipe(folder.path(), "");
    let grpo = || Grpo::new(Recipe::read(&options.document().unwrap()).unwrap()).unwrap();
    let mut learned = grpo();
    learned.curriculum.note(1, 1.0);
    for state in [learned.state(), learned.curriculum.state()] {
        let mut again = grpo();
        again.restore(&state).unwrap();
        assert_eq!(again.state(), learned.state());
    }
    assert!(grpo().restore(&json!([1])).unwrap_err().contains("kinds of tasks"));
}

#[test]
fn rates_follow_the_turns_also_where_updates_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("model"), minke_model::DType::F32);
    // worth less only where an answer is as long as can be, which some pairs are both
    let more = "[reward]\noverlong_buffer = 1\noverlong = 1.0\n\
                [train]\nsteps = 12\nlr = 1e-4\nwarmup_share = 0\ndecay_share = 1\ndecay = \"linear\"\n";
    let overrides = ["rollout.prompts=1", "rollout.group=2"].map(str::to_owned).to_vec();
    let (_, steps) = go(&Options { overrides, ..recipe(folder.path(), more) }, None);
    let mut taken = 0;
    for step in &steps {
        let Some(lr) = step.get("lr") else { continue };
        let expected = 1e-4 * (13 - step.step) as f64 / 12.0;
        assert!((lr / expected - 1.0).abs() < 1e-9, "step {}: {lr} for {expected}", step.step);
        taken += 1;
    }
    assert!((1..12).contains(&taken), "{taken} of 12 updates");
    // the last of them stands behind one that was left out
    let last = steps.iter().rposition(|step| step.get("lr").is_some()).unwrap();
    assert!(steps[..last].iter().any(|step| step.get("lr").is_none()), "{steps:?}");
}

#[test]
fn skips_are_told_of_the_turn_that_they_are_in() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("model"), minke_model::DType::F32);
    // gradients that are not finite, of weights that are, and turns without an update between them
    let more = "[reward]\noverlong_buffer = 1\noverlong = 1.0\n\
                [train]\nsteps = 12\nmtp_loss_weight = 3e38\nskip_limit = 100\neval_every = 0\n";
    let overrides = ["rollout.prompts=1", "rollout.group=2"].map(str::to_owned).to_vec();
    let options = Options { overrides, ..recipe(folder.path(), more) };
    let (mut skipped, mut warned) = (Vec::new(), Vec::new());
    let outcome = run(&options, &AtomicBool::new(false), &mut |event| match event {
        Event::Step { metrics, .. } if metrics.get("skipped").is_some() => skipped.push(metrics.step),
        Event::Warning { text } => warned.push(text.to_owned()),
        _ => {}
    });
    assert!((1..12).contains(&skipped.len()), "{skipped:?}");
    let told: Vec<String> = skipped.iter().map(|step| format!("step {step}: ")).collect();
    assert!(
        warned.len() == told.len() && warned.iter().zip(&told).all(|(a, b)| a.starts_with(b)),
        "{warned:?}"
    );
    // the weights are those that it began with, and none are better
    let weights = |path: &Path| fs::read(path.join("model.safetensors")).unwrap();
    assert_eq!(weights(&outcome.unwrap().model.unwrap()), weights(&folder.path().join("model")));
    // what ends a run is counted in turns, too
    fs::remove_dir_all(folder.path().join("run")).unwrap();
    let more = format!("{SIGNAL}[train]\nsteps = 4\nepochs = 2\nskip_limit = 2\nmtp_loss_weight = 3e38\n");
    let error = run(&recipe(folder.path(), &more), &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    let PostError::Train(minke_train::TrainError::Diverged { step: 2, in_a_row: 3, from, .. }) = error else {
        panic!("{error}")
    };
    assert_eq!(from, Some("model.path"));
}

#[test]
fn a_run_that_diverges_says_so_and_what_is_left() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("model"), minke_model::DType::F32);
    let more = format!("{SIGNAL}[train]\nsteps = 5\nlr = 1e13\ncheckpoint_every = 1\neval_every = 0\n");
    let options = recipe(folder.path(), &more);
    // resumed, it ends in the same way
    for resume in [false, true] {
        let options = Options { resume, ..options.clone() };
        let error = run(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err();
        let text = error.to_string();
        let diverged = matches!(error, PostError::Train(minke_train::TrainError::Diverged { .. }));
        assert!(diverged && text.contains("no checkpoint that is known to be good"), "{text}");
    }
    assert!(!folder.path().join("run/model").exists());
}

#[test]
fn a_resolved_recipe_reads_as_itself() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = |path: &Path| {
        let document = Document::load(path, &[]).unwrap();
        Recipe::read(&document).unwrap().setup().unwrap().recipe
    };
    let first = resolved(&recipe(folder.path(), "[objective]\nalgorithm = \"dapo\"\n").recipe);
    let written = folder.path().join("written.toml");
    fs::write(&written, &first).unwrap();
    assert_eq!(resolved(&written), first);
}

#[test]
fn recipes_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("model"), minke_model::DType::F32);
    let error = |more: &str| {
        let stop = AtomicBool::new(false);
        run(&recipe(folder.path(), more), &stop, &mut |_| {}).unwrap_err().to_string()
    };
    for (more, parts) in [
        ("[objective]\nalgorithm = \"ppo\"\n", &["\"grpo\"", "\"cispo\"", "ppo"][..]),
        ("[objective]\nclip_hihg = 0.2\n", &["did you mean `clip_high`?"]),
        ("[train]\nminibatches = 4\n", &["train.minibatches", "4 parts of 3 prompts"]),
        ("temperature = 0\n", &["temperature", "above 0"]),
        ("temperature = 1e-60\n", &["temperature", "above 0", "in 32 bits, where it is 0"]),
        ("temperature = 101\n", &["temperature", "up to 100"]),
        ("[tasks.x]\n", &["tasks"]),
    ] {
        let text = error(more);
        assert!(parts.iter().all(|part| text.contains(part)), "{more}: {text}");
    }
    let path = folder.path().join("rl.toml");
    let text = fs::read_to_string(recipe(folder.path(), "").recipe).unwrap();
    fs::write(&path, text.replace("chain:1-2", "chian")).unwrap();
    let options = Options { recipe: path, ..Options::default() };
    let text = run(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(text.contains("chian") && text.contains("chain,"), "{text}");
}

#[test]
fn long_prompts_are_refused_skipped_or_cut_as_said() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("model"), minke_model::DType::F32);
    let tasks = folder.path().join("tasks.jsonl");
    let long = "one two three ".repeat(60);
    fs::write(
        &tasks,
        format!("{{\"prompt\": {long:?}, \"answer\": \"1\"}}\n{{\"prompt\": \"1+1\", \"answer\": \"2\"}}\n"),
    )
    .unwrap();
    let with = |long_prompts: &str| {
        let options = recipe(folder.path(), &format!("{SIGNAL}[train]\nsteps = 1\n"));
        let text = fs::read_to_string(&options.recipe).unwrap();
        let said = format!(
            "suite = {tasks:?}\nfloor = 1\nlong_prompts = \"{long_prompts}\"\neval_suite = \"chain:1\""
        );
        fs::write(&options.recipe, text.replace("suite = \"chain:1-2\"", &said)).unwrap();
        let _ = fs::remove_dir_all(folder.path().join("run"));
        options
    };
    let error = run(&with("refuse"), &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("leave room for an answer") && error.contains("skip"), "{error}");
    for way in ["skip", "cut"] {
        let (_, steps) = go(&with(way), None);
        assert!(steps[0].get("long_prompts").unwrap() > 0.0, "{way}");
        assert_eq!(steps[0].get("groups"), Some(3.0));
    }
}
