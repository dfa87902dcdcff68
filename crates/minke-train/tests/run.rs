//! Whole runs on a small text, stopped, damaged and resumed in every way.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use minke_cpu::Cpu;
use minke_infer::load_model;
use minke_model::Purpose;
use minke_train::TrainError;
use minke_train::checkpoint::{Checkpoints, State};
use minke_train::events::Event;
use minke_train::metrics::{self, Line, Record, Step};
use minke_train::optim::Settings;
use minke_train::pretrain::{self, Options, Outcome};
use minke_train::recipe::Optim;
use minke_train::trainer::{Course, Trainer};

/// Steps of the recipe below.
const STEPS: u64 = 12;

struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let words = ["whale", "minke", "swims", "deep", "and", "the", "sea", "sings", "of", "krill"];
        for package in 0..12_u64 {
            let folder = root.path().join(format!("text/package{package}"));
            fs::create_dir_all(&folder).unwrap();
            let mut text = format!("# Package {package}\n");
            for i in 0..400_u64 {
                // most words follow from the one before, so that there is something to learn
                let noise = minke_num::rng::below(7, package, i, 4);
                text.push_str(words[((i * 3 + noise / 3) % 10) as usize]);
                text.push_str(if i % 9 == 8 { ".\n" } else { " " });
            }
            fs::write(folder.join("a.md"), text).unwrap();
        }
        let recipe = format!(
            "precision = \"bf16\"\n\
             [run]\nname = \"tiny\"\nseed = 5\n\
             [model]\ndepth = 2\nn_routed_experts = 4\nnum_experts_per_tok = 2\n\
             [data]\nvocab_size = 320\nvalidation_share = 0.2\n\
             [[data.sources]]\npath = \"text\"\n\
             [train]\nsequence_length = 32\nbatch_size = 2\naccumulation = 2\ntokens = {}\n\
             optimizer = \"muon\"\neval_every = 4\neval_tokens = 256\ncheckpoint_every = 4\nkeep = 2\n\
             [sample]\nprompts = [\"the whale\", \"# \"]\ntokens = 8\n",
            STEPS * 128
        );
        fs::write(root.path().join("tiny.toml"), recipe).unwrap();
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn options(&self, out: &str, threads: usize) -> Options {
        let out = Some(self.path("runs").join(out));
        Options { recipe: self.path("tiny.toml"), out, threads, ..Options::default() }
    }

    fn resume(&self, out: &str, threads: usize) -> Options {
        Options { resume: true, ..self.options(out, threads) }
    }

    /// A whole run, by which others are judged.
    fn reference(&self) -> Bits {
        let outcome = finish(&self.options("reference", 1));
        bits(&outcome)
    }
}

/// Runs to the end or to `stop_after`; returns warnings too.
fn run(options: &Options, stop_after: Option<u64>) -> Result<(Outcome, Vec<String>), TrainError> {
    let stop = AtomicBool::new(false);
    let mut warnings = Vec::new();
    let outcome = pretrain::run(options, &stop, &mut |event| match event {
        Event::Step { metrics, .. } if Some(metrics.step) == stop_after => {
            stop.store(true, Ordering::Relaxed);
        }
        Event::Warning { text } => warnings.push(text.to_owned()),
        _ => {}
    })?;
    Ok((outcome, warnings))
}

fn finish(options: &Options) -> Outcome {
    let (outcome, warnings) = run(options, None).unwrap();
    assert!(outcome.finished.is_some() && warnings.is_empty(), "{outcome:?} {warnings:?}");
    outcome
}

/// What must be the same in two runs that are one.
#[derive(PartialEq)]
struct Bits {
    model: Vec<u8>,
    state: Vec<u8>,
    losses: Vec<(u64, u64)>,
    evaluations: Vec<(u64, u64)>,
    samples: Vec<String>,
}

impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "losses {:?}, evaluations {:?}, samples {:?}", self.losses, self.evaluations, self.samples)
    }
}

fn bits(outcome: &Outcome) -> Bits {
    let finished = outcome.finished.as_ref().unwrap();
    let checkpoint = outcome.checkpoint.as_ref().unwrap();
    let records = metrics::read(&outcome.folder.join("metrics.jsonl")).unwrap();
    let (mut losses, mut evaluations, mut samples) = (Vec::new(), Vec::new(), Vec::new());
    for record in &records {
        match record {
            Record::Step(step) => losses.push((step.step, step.loss.to_bits())),
            Record::Evaluation(at) => evaluations.push((at.step, at.bits_per_byte.to_bits())),
            Record::Sample(sample) => samples.push(sample.text.clone()),
        }
    }
    Bits {
        model: fs::read(finished.model.join("model.safetensors")).unwrap(),
        state: fs::read(checkpoint.join("training/state.safetensors")).unwrap(),
        losses,
        evaluations,
        samples,
    }
}

fn steps_of(folder: &Path) -> Vec<Step> {
    let records = metrics::read(&folder.join("metrics.jsonl")).unwrap();
    records
        .into_iter()
        .filter_map(|record| if let Record::Step(step) = record { Some(step) } else { None })
        .collect()
}

fn checkpoints(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("checkpoints")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_by_key(|name| (name.len(), name.clone()));
    names
}

/// Every file below a folder with its content, apart from the lock.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(content(&path));
        } else {
            all.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    all
}

fn copy(from: &Path, to: &Path) {
    for (path, bytes) in content(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, bytes).unwrap();
    }
}

#[test]
fn a_run_learns_and_leaves_everything_that_it_promises() {
    let place = Place::new();
    let mut options = place.options("learns", 2);
    options.overrides = vec!["train.tokens=5120".to_owned()];
    let outcome = finish(&options);
    let steps = steps_of(&outcome.folder);
    assert_eq!((outcome.step, outcome.steps, steps.len()), (40, 40, 40));
    assert!(steps[39].loss < steps[0].loss - 1.0, "{} to {}", steps[0].loss, steps[39].loss);
    assert!((steps[0].loss - 320_f64.ln()).abs() < 0.5, "{}", steps[0].loss);
    assert!(
        steps.iter().all(|step| step.mtp_loss.is_some() && step.gemm_share.is_some_and(|share| share > 0.0))
    );
    // every layer with experts, the MTP module's too: each token once per chosen expert
    let balance = steps[0].balance.as_ref().unwrap();
    assert_eq!((balance.load.len(), balance.load[0].len()), (2, 4));
    assert!(balance.load.iter().all(|load| (load.iter().sum::<f32>() - 4.0).abs() < 1e-4));

    let finished = outcome.finished.unwrap();
    assert!(finished.bits_per_byte.unwrap() < 6.0 && finished.zstd_bits_per_byte.unwrap() > 0.0);
    let report = fs::read_to_string(&finished.report).unwrap();
    for part in ["bits per byte", "zstd at level 22", "plots/", "the whale", "share of that rate"] {
        assert!(report.contains(part), "{part} in {report}");
    }
    assert_eq!(checkpoints(&outcome.folder), ["step-36", "step-40"]);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(finished.model.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["model_type"], &config["dtype"]), (&"deepseek_v3".into(), &"bfloat16".into()));
    assert!(config["bos_token_id"].is_u64() && config["eos_token_id"].is_u64(), "{config}");
    // the run, its checkpoint and its model open as models, with the same bits as the trainer's own
    for name in [&outcome.folder, &finished.model, outcome.checkpoint.as_ref().unwrap()] {
        let loaded = load_model(name.to_str().unwrap(), None, Purpose::Train).unwrap();
        assert!(loaded.notes.is_empty() && loaded.tokenizer.is_some());
    }
    // nothing half-written is left behind
    let names = content(&outcome.folder);
    let names =
        names.keys().map(|path| path.strip_prefix(&outcome.folder).unwrap().to_string_lossy().into_owned());
    let left: Vec<String> = names.filter(|name| name.contains("tmp") || name.contains("old")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn stopped_killed_and_resumed_runs_end_in_the_same_bits() {
    let place = Place::new();
    let reference = place.reference();
    // other threads, stopped between checkpoints, twice
    let (stopped, _) = run(&place.options("stopped", 2), Some(5)).unwrap();
    assert_eq!((stopped.step, stopped.steps, stopped.finished), (5, STEPS, None));
    assert!(stopped.checkpoint.unwrap().ends_with("step-5"));
    let (again, _) = run(&place.resume("stopped", 3), Some(10)).unwrap();
    assert_eq!(again.step, 10);
    let resumed = finish(&place.resume("stopped", 1));
    // a stop in between adds no record
    assert_eq!(bits(&resumed), reference);
    // at the end there is nothing left to do, and doing it changes nothing
    assert_eq!(bits(&finish(&place.resume("stopped", 2))), reference);

    // killed at any moment: what is on the disk is a checkpoint and whatever came after it
    let whole = place.path("runs/reference");
    for (name, gone) in
        [("killed-late", vec!["model", "report.md"]), ("killed", vec!["model", "checkpoints/step-12"])]
    {
        let folder = place.path("runs").join(name);
        copy(&whole, &folder);
        for gone in gone {
            let gone = folder.join(gone);
            if gone.is_dir() { fs::remove_dir_all(gone).unwrap() } else { fs::remove_file(gone).unwrap() }
        }
        // a record that was cut off, and a checkpoint that was being built
        let metrics = folder.join("metrics.jsonl");
        let text = fs::read(&metrics).unwrap();
        fs::write(&metrics, &text[..text.len() - 7]).unwrap();
        fs::create_dir_all(folder.join("checkpoints/step-12.tmp-1/training")).unwrap();
        if name == "killed" {
            assert_eq!(bits(&finish(&place.resume(name, 2))), reference);
        } else {
            // the cut-off record was beyond nothing: the checkpoint holds all steps
            let resumed = bits(&finish(&place.resume(name, 2)));
            assert!(resumed.model == reference.model && resumed.losses == reference.losses);
        }
    }

    // killed before the first checkpoint
    let folder = place.path("runs/early");
    copy(&whole, &folder);
    fs::remove_dir_all(folder.join("checkpoints")).unwrap();
    let (outcome, warnings) = run(&place.resume("early", 2), None).unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("no checkpoint yet"), "{warnings:?}");
    assert_eq!(bits(&outcome), reference);
    // stopped before its first step it was never there
    let now = AtomicBool::new(true);
    let outcome = pretrain::run(&place.options("never", 2), &now, &mut |_| {}).unwrap();
    assert_eq!((outcome.step, outcome.checkpoint), (0, None));
    assert!(!place.path("runs/never").exists());
    // and before anything
    let (outcome, warnings) = run(&place.resume("nothing", 2), None).unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("no run in"), "{warnings:?}");
    assert_eq!(bits(&outcome), reference);
}

#[test]
fn whole_documents_of_prompts_and_completions_are_learned() {
    let place = Place::new();
    let lines = (0..600_u64).map(|i| {
        // the questions say nothing about each other, so only answers can be learned
        let word = |at| ["sea", "deep", "krill", "sings"][minke_num::rng::below(3, i, at, 4) as usize];
        let prompt = format!("{i}: {}\n", (0..6).map(word).collect::<Vec<_>>().join(" "));
        serde_json::json!({ "prompt": prompt, "completion": "it is a minke whale\n" }).to_string()
    });
    fs::write(place.path("text/pairs.jsonl"), lines.collect::<Vec<_>>().join("\n")).unwrap();
    let options = |out: &str, resume: bool| {
        let mut options = Options { resume, ..place.options(out, 2) };
        let sources = format!("data.sources=[{{ path = {:?} }}]", place.path("text/pairs.jsonl"));
        let overrides = ["data.packing=whole", "train.sequence_length=64", "train.tokens=7680"];
        options.overrides = [sources].into_iter().chain(overrides.map(str::to_owned)).collect();
        options
    };
    let mut empty = 0.0;
    let outcome = pretrain::run(&options("whole", false), &AtomicBool::new(false), &mut |event| {
        if let Event::Started(started) = event {
            empty = started.padding_share;
        }
    })
    .unwrap();
    assert!((0.001..0.4).contains(&empty), "{empty}");
    let steps = steps_of(&outcome.folder);
    // the constant answer is all that counts
    assert!(steps[29].loss < 0.5, "{} to {}", steps[0].loss, steps[29].loss);
    let finished = outcome.finished.as_ref().unwrap();
    assert!(finished.bits_per_byte.unwrap() < 0.5);
    assert_eq!(finished.zstd_bits_per_byte, None, "the same task cannot be given to it");

    let (stopped, _) = run(&options("stopped", false), Some(7)).unwrap();
    assert_eq!(stopped.step, 7);
    assert_eq!(bits(&finish(&options("stopped", true))), bits(&outcome));
    let mut other = options("stopped", true);
    other.overrides.push("data.packing=stream".to_owned());
    let error = run(&other, None).unwrap_err().to_string();
    assert!(error.contains("data.packing: was \"whole\", is \"stream\""), "{error}");
}

/// Does something to a checkpoint's folder.
type Harm = fn(&Path);

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_taken() {
    let place = Place::new();
    let reference = place.reference();
    let whole = place.path("runs/reference");
    let harms: [(&str, Harm); 5] = [
        ("truncated or has a tail", |folder| {
            let path = folder.join("training/state.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("was damaged or changed", |folder| {
            let path = folder.join("model.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("training/state.json", |folder| fs::remove_file(folder.join("training/state.json")).unwrap()),
        ("manifest.json", |folder| fs::write(folder.join("training/manifest.json"), "{").unwrap()),
        ("is no file of a checkpoint", |folder| {
            let path = folder.join("training/manifest.json");
            let text =
                fs::read_to_string(&path).unwrap().replace("\"tokenizer.json\"", "\"../../recipe.toml\"");
            fs::write(path, text).unwrap();
        }),
    ];
    for (number, (message, harm)) in harms.iter().enumerate() {
        let name = format!("harmed-{number}");
        let folder = place.path("runs").join(&name);
        copy(&whole, &folder);
        let newest = folder.join("checkpoints/step-12");
        harm(&newest);
        let (outcome, warnings) = run(&place.resume(&name, 2), None).unwrap();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains(message) && warnings[0].contains("step-12"), "{warnings:?}");
        assert_eq!(bits(&outcome), reference);
    }
    // none is whole: nothing is touched
    let folder = place.path("runs/lost");
    copy(&whole, &folder);
    for name in checkpoints(&folder) {
        harms[0].1(&folder.join("checkpoints").join(name));
    }
    let before = content(&folder);
    let error = run(&place.resume("lost", 2), None).unwrap_err();
    assert!(matches!(error, TrainError::NoWholeCheckpoint { .. }) && error.is_user_error());
    let error = error.to_string();
    assert!(error.contains("step-8") && error.contains("step-12") && error.contains("--out"), "{error}");
    let mut after = content(&folder);
    after.retain(|path, _| !path.ends_with(".lock"));
    let mut before = before;
    before.retain(|path, _| !path.ends_with(".lock"));
    assert!(after == before, "a failed resumption changed files");
}

#[test]
fn a_run_is_not_written_over_nor_resumed_as_another() {
    let place = Place::new();
    let reference = place.reference();
    let folder = place.path("runs/reference");
    let before = content(&folder);
    let error = run(&place.options("reference", 1), None).unwrap_err();
    assert!(matches!(error, TrainError::Occupied { .. }) && error.is_user_error(), "{error}");

    // nor is what is no run taken for one
    let own = place.path("own/model/thesis.txt");
    fs::create_dir_all(own.parent().unwrap()).unwrap();
    fs::write(&own, "years").unwrap();
    let mut foreign = place.resume("own", 1);
    foreign.out = Some(place.path("own"));
    let error = run(&foreign, None).unwrap_err().to_string();
    assert!(error.contains("holds no such run") && fs::read_to_string(&own).unwrap() == "years", "{error}");
    assert!(!place.path("own/recipe.toml").exists());

    let mut changed = place.resume("reference", 1);
    changed.overrides = vec!["train.lr=0.1".to_owned(), "model.n_routed_experts=8".to_owned()];
    let error = run(&changed, None).unwrap_err().to_string();
    for part in ["train.lr: was ", "is 0.1", "model.n_routed_experts: was 4, is 8"] {
        assert!(error.contains(part), "{error}");
    }
    // the sources changed, the run's own data is still there: it goes on with that
    fs::write(place.path("text/package0/b.md"), "a new file").unwrap();
    assert_eq!(bits(&finish(&place.resume("reference", 1))), reference);
    // and without it the run is another
    fs::remove_dir_all(place.path("runs/.data")).unwrap();
    let error = run(&place.resume("reference", 1), None).unwrap_err().to_string();
    assert!(error.contains("data: was ") && error.contains("changed since"), "{error}");
    assert!(error.contains(&format!("cannot resume {}:", folder.display())), "{error}");
    let after = content(&folder);
    let same = |name: &str| before[&folder.join(name)] == after[&folder.join(name)];
    assert!(same("recipe.toml") && same("checkpoints/step-12/training/state.safetensors"));

    let mut random = place.options("random", 1);
    let bench = "[model]\nvocab_size = 300\n[data]\nrandom = true\n";
    random.recipe = place.path("bench.toml");
    fs::write(&random.recipe, bench).unwrap();
    let error = run(&random, None).unwrap_err().to_string();
    assert!(error.contains("data.random") && error.contains("bench train"), "{error}");
}

#[test]
fn what_cannot_be_written_loses_nothing() {
    let place = Place::new();
    let reference = place.reference();
    // a checkpoint that fails in the middle of a run, as on a full disk
    let blocked = place.path("runs/blocked/checkpoints").join(format!("step-8.tmp-{}", std::process::id()));
    let stop = AtomicBool::new(false);
    let error = pretrain::run(&place.options("blocked", 2), &stop, &mut |event| {
        if matches!(event, Event::Checkpoint { step: 4, .. }) {
            fs::write(&blocked, "in the way").unwrap();
        }
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("step-8"), "{error}");
    assert_eq!(checkpoints(&place.path("runs/blocked"))[0], "step-4");
    fs::remove_file(&blocked).unwrap();
    assert_eq!(bits(&finish(&place.resume("blocked", 2))), reference);

    // a place that nothing can be written to, said before any work
    let mut nowhere = place.options("x", 1);
    nowhere.out = Some(place.path("tiny.toml").join("run"));
    let mut events = 0;
    let error = pretrain::run(&nowhere, &stop, &mut |_| events += 1).unwrap_err().to_string();
    assert!(error.contains("tiny.toml/run") && events == 0, "{error}");

    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let locked = place.path("locked");
        fs::create_dir(&locked).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
        if fs::write(locked.join("probe"), "").is_ok() {
            println!("skipped: this user may write to read-only folders");
        } else {
            nowhere.out = Some(locked.join("run"));
            let error = pretrain::run(&nowhere, &stop, &mut |_| events += 1).unwrap_err();
            assert!(error.is_user_error() && error.to_string().contains("locked/run"), "{error}");
        }
    }
}

/// Options with rates by which the first update throws all weights out.
fn thrown(place: &Place, out: &str, lr: &str, more: &[&str]) -> Options {
    let mut options = place.options(out, 2);
    options.overrides = vec![format!("train.lr={lr}"), format!("train.muon_lr={lr}")];
    options.overrides.extend(["train.checkpoint_every=1", "train.eval_every=0"].map(str::to_owned));
    options.overrides.extend(more.iter().map(|&text| text.to_owned()));
    options
}

#[test]
fn a_run_that_diverges_says_so_and_keeps_no_weights_of_it() {
    let place = Place::new();
    // so far out that a step gives no numbers, and the weights are some
    let error = run(&thrown(&place, "skips", "1e13", &["train.skip_limit=2"]), None).unwrap_err();
    let TrainError::Diverged { step: 4, in_a_row: 3, .. } = &error else { panic!("{error}") };
    let message = error.to_string();
    for part in ["is not finite, 3 times", "no checkpoint that is known to be good", "train.lr"] {
        assert!(message.contains(part), "{message}");
    }
    // what went before is on the disk, whole, and nothing of the steps that were skipped
    let folder = place.path("runs/skips");
    assert_eq!(checkpoints(&folder), ["step-1"]);
    let records: Vec<Record> = metrics::read(&folder.join("metrics.jsonl")).unwrap();
    let skipped = records.iter().filter(|record| matches!(record, Record::Step(step) if step.skipped));
    assert_eq!(skipped.map(Line::step).collect::<Vec<_>>(), [2, 3]);

    // stopped while steps are skipped, or at the end: nothing is saved either
    let endless = ["train.skip_limit=1000", "train.keep=1"];
    let error = run(&thrown(&place, "stopped", "1e13", &endless), Some(5)).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 5, in_a_row: 4, .. }), "{error}");
    assert_eq!(checkpoints(&place.path("runs/stopped")), ["step-1"]);
    for (out, more) in [("ended", &["train.tokens=512"][..]), ("unseen", &["data.validation_share=0"])] {
        let error = run(&thrown(&place, out, "1e13", &[&endless[..], more].concat()), None).unwrap_err();
        assert!(matches!(error, TrainError::Diverged { .. }), "{error}");
        assert!(!place.path("runs").join(out).join("model").exists());
    }
    // weights that are no good are not even saved once
    let error = run(&thrown(&place, "thrown", "1e30", &[]), None).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 1, in_a_row: 0, .. }), "{error}");
    assert!(error.to_string().contains("the norm of the weights is not finite; there is no"), "{error}");
    assert!(checkpoints(&place.path("runs/thrown")).is_empty());
}

#[test]
fn skips_that_are_borne_cost_no_run() {
    let place = Place::new();
    // gradients that are not finite, of weights that are
    let skips = |out: &str, more: &[&str]| {
        let mut options = place.options(out, 2);
        options.overrides =
            ["train.mtp_loss_weight=3e38", "train.skip_limit=100"].map(str::to_owned).to_vec();
        options.overrides.extend(more.iter().map(|&text| text.to_owned()));
        options
    };
    let (stopped, warnings) = run(&skips("skips", &[]), Some(5)).unwrap();
    assert!(stopped.checkpoint.unwrap().ends_with("step-5"));
    assert!(warnings[4].contains("step 5: a loss or a gradient is not finite"), "{warnings:?}");
    let (outcome, _) = run(&Options { resume: true, ..skips("skips", &[]) }, None).unwrap();
    assert!(outcome.finished.unwrap().model.is_dir() && outcome.checkpoint.unwrap().ends_with("step-12"));
    assert!(steps_of(&outcome.folder).iter().all(|step| step.skipped));
    // where no other text says that the weights are good, they are not kept
    let error = run(&skips("unseen", &["data.validation_share=0"]), Some(3)).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 3, what: "gradient", .. }), "{error}");
}

#[test]
fn older_checkpoints_go_once_a_step_after_the_newest_was_taken() {
    let place = Place::new();
    let model = finish(&place.options("model", 2)).finished.unwrap().model;
    let loaded = load_model(model.to_str().unwrap(), None, Purpose::Train).unwrap();
    let (cpu, tokenizer) = (Cpu::detect(2), loaded.tokenizer.unwrap());
    let mut trainer =
        Trainer::new(loaded.model, &Settings::from(&Optim::PRETRAIN), Course::new(&Optim::PRETRAIN, 9));
    let folder = place.path("runs/kept");
    fs::create_dir_all(folder.join("checkpoints")).unwrap();
    let names = || checkpoints(&folder);
    let mut kept = Checkpoints::new(folder.join("checkpoints"), 1, None).unwrap();
    let save = |kept: &mut Checkpoints, trainer: &Trainer, step: u64| -> Result<(), TrainError> {
        let state = State::new(step, 0, 0.0, 0, String::new());
        kept.save(&cpu, trainer, &tokenizer, None, &state).map(|_| ())
    };
    let told = |kept: &Checkpoints| kept.explain(trainer.diverged("loss")).to_string();
    save(&mut kept, &trainer, 1).unwrap();
    assert!(told(&kept).contains("there is no checkpoint that is known to be good"));
    kept.settle().unwrap();
    save(&mut kept, &trainer, 2).unwrap();
    assert_eq!(names(), ["step-1", "step-2"]);
    assert!(told(&kept).contains("checkpoints/step-1\n"), "{}", told(&kept));
    // a run that goes on from the newest knows as much
    let newest = minke_train::checkpoint::newest(&folder.join("checkpoints"), &mut |_| {}).unwrap();
    let mut kept = Checkpoints::new(folder.join("checkpoints"), 1, newest.as_ref()).unwrap();
    assert!(told(&kept).contains("checkpoints/step-1\n"), "{}", told(&kept));
    kept.settle().unwrap();
    assert_eq!(names(), ["step-2"]);
    assert!(told(&kept).contains("checkpoints/step-2\n"), "{}", told(&kept));
    // what could not be read again is not written
    let mut long = State::new(3, 0, 0.0, 0, String::new());
    long.more = serde_json::json!(vec![u64::MAX; 50_000]);
    let error = kept.save(&cpu, &trainer, &tokenizer, None, &long).unwrap_err().to_string();
    assert!(error.contains("state.json") && error.contains("would be read again"), "{error}");
    assert_eq!(names(), ["step-2"]);
    trainer.model.params.data[0] = f32::NAN;
    assert!(matches!(save(&mut kept, &trainer, 3), Err(TrainError::Diverged { .. })));
    assert_eq!(names(), ["step-2"]);
}

#[test]
fn threads_and_precision_each_keep_their_bits() {
    let place = Place::new();
    for precision in ["f32", "bf16"] {
        let runs: Vec<Bits> = (1..=3)
            .map(|threads| {
                let mut options = place.options(&format!("{precision}-{threads}"), threads);
                options.overrides = vec![format!("precision={precision}"), "train.tokens=640".to_owned()];
                bits(&finish(&options))
            })
            .collect();
        assert_eq!(runs[0], runs[1]);
        assert_eq!(runs[0], runs[2]);
    }
}

#[test]
fn the_benchmark_measures_a_step() {
    let place = Place::new();
    let recipe = place.path("bench.toml");
    let text = "precision = \"bf16\"\n[model]\ndepth = 2\nvocab_size = 512\nnum_nextn_predict_layers = 0\n\
                [data]\nrandom = true\n[train]\nsequence_length = 64\nbatch_size = 2\noptimizer = \"adamw\"\n";
    fs::write(&recipe, text).unwrap();
    let options =
        minke_train::bench::Options { recipe, overrides: Vec::new(), steps: 3, threads: 2, force: false };
    let mut heard = Vec::new();
    let figures = minke_train::bench::run(&options, &mut |done, all| heard.push((done, all))).unwrap();
    assert_eq!(heard[0].0 + heard.len() as u64, heard[0].1, "a word before each step");
    assert_eq!((figures.threads, figures.steps, figures.tokens_per_step), (2, 3, 128));
    let implied = figures.tok_s * figures.step_ms / 1e3;
    assert!((implied - 128.0).abs() < 1e-6, "{implied}");
    assert!((figures.loss - 512_f64.ln()).abs() < 0.5, "{}", figures.loss);
    assert!(figures.gflops > 0.0 && figures.gemm_share < 1.0, "{figures:?}");
    assert!(figures.profile.iter().any(|part| part.operation == "optimizer"));
    let covered: f64 = figures.profile.iter().map(|part| part.share).sum();
    assert!((0.5..1.01).contains(&covered), "{covered}");
    let json = serde_json::to_value(&figures).unwrap();
    for key in
        ["tok_s", "step_ms", "peak_rss_bytes", "flops_per_token", "gflops", "gemm_peak_gflops", "threads"]
    {
        assert!(!json[key].is_null(), "{key}");
    }
}
