use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::template::ChatTemplate;
use minke_data::tokenizer::TrainOptions;
use minke_infer::read_config;
use minke_model::{Config, DType, Divergence, Precision, Teacher};
use minke_train::checkpoint::save_model;
use minke_train::metrics::read;
use minke_train::recipe::Document;
use serde_json::{Value, json};

use super::logits::Telling;
use super::*;
use crate::metrics::{Record, Values};
use crate::sft::data::Sample;
use crate::sft::pack::pack;

fn tokenizer(size: usize) -> Tokenizer {
    let text =
        vec!["mod 10: start 3, then +4 *2 = ? Start with 5 and do -1 +2 modulo 10. 0123456789\n".repeat(9)];
    Tokenizer::train(&text, &TrainOptions { vocab_size: size, ..TrainOptions::default() }).unwrap()
}

/// A random model that can be asked, in a folder.
fn model(folder: &Path, vectors: &str, dtype: DType, tokens: usize, seed: u64) {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../minke-model/tests/vectors");
    let mut value: Value =
        serde_json::from_slice(&fs::read(format!("{root}/{vectors}/config.json")).unwrap()).unwrap();
    let tokenizer = tokenizer(tokens);
    value["vocab_size"] = tokenizer.vocab_size().into();
    value["max_position_embeddings"] = 160.into();
    let model = Model::random(Config::from_json(&value).unwrap(), Precision::uniform(dtype), seed);
    save_model(folder, &model, &tokenizer, Some(&ChatTemplate::named("minke").unwrap())).unwrap();
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A teacher with experts and a module that predicts ahead, and lines to learn from.
    fn new(dtype: DType) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        model(&place.at("teacher"), "v3_mtp1", dtype, 290, 5);
        let line = |n: usize| {
            let (a, b) = (n % 10, n / 10);
            json!({ "prompt": format!("start {a}, then +{b} = ?"), "thought": format!("{a}+{b}"), "answer": (a + b).to_string() })
        };
        let lines: Vec<String> = (0..40).map(|n| line(n).to_string()).collect();
        fs::write(place.at("answers.jsonl"), lines.join("\n")).unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn options(&self, out: &str, student: &str, distill: &str, more: &str) -> Options {
        let path = self.at(&format!("{out}.toml"));
        let text = format!(
            "[run]\nseed = 3\nout = '{}'\n[teacher]\npath = 'teacher'\n{student}\n[distill]\n{distill}\n{more}",
            self.at(out).display()
        );
        fs::write(&path, text).unwrap();
        Options { recipe: path, threads: 2, ..Options::default() }
    }
}

const FRESH: &str = "[student.model]\nfamily = 'llama'\ndepth = 1\nhidden_size = 32\n";
const COPY: &str = "[student]\npath = 'teacher'\n";
const WRITTEN: &str = "[data]\nsources = [{ path = 'answers.jsonl' }]\nvalidation_share = 0.1\n\
    [train]\nsequence_length = 64\nbatch_size = 4\ncheckpoint_every = 2\n";
const TASKS: &str = "[tasks]\nsuite = 'chain:1-2'\neval_per_level = 2\n\
    [rollout]\nprompts = 2\ngroup = 2\nmax_tokens = 40\ntemperature = 0.9\n\
    [train]\nrows_per_pass = 150\ncheckpoint_every = 1\n";

struct Told {
    outcome: Outcome,
    steps: Vec<Values>,
    evaluations: Vec<Values>,
    facts: Vec<(String, String)>,
}

fn go(options: &Options, until: Option<u64>) -> Told {
    let stop = AtomicBool::new(false);
    let mut facts = Vec::new();
    let outcome = run(options, &stop, &mut |event| match event {
        Event::Step { metrics, .. } if Some(metrics.step) == until => stop.store(true, Ordering::Relaxed),
        Event::Started(started) => facts.clone_from(&started.facts),
        _ => {}
    })
    .unwrap();
    let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
    for record in read::<Record>(&outcome.folder.join("metrics.jsonl")).unwrap() {
        match record {
            Record::Step(values) => steps.push(values),
            Record::Evaluation(values) => evaluations.push(values),
            Record::Sample(_) => {}
        }
    }
    Told { outcome, steps, evaluations, facts }
}

fn refusal(options: &Options) -> String {
    let error = run(options, &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert!(error.is_user_error(), "{error}");
    error.to_string()
}

fn weights(told: &Told) -> Vec<u8> {
    fs::read(told.outcome.model.as_ref().unwrap().join("model.safetensors")).unwrap()
}

fn all(told: &Told, name: &str) -> Vec<f64> {
    told.steps.iter().map(|step| step.get(name).unwrap_or_else(|| panic!("{name}: {step:?}"))).collect()
}

#[test]
fn a_fresh_student_learns_the_answers_and_takes_over_what_the_teacher_reads_with() {
    let place = Place::new(DType::Bf16);
    let more = format!("{WRITTEN}epochs = 8\nlr = 0.01\neval_every = 1000\n");
    let told = go(&place.options("student", FRESH, "mode = 'sequences'", &more), None);
    let losses = all(&told, "loss");
    assert!(losses.last().unwrap() < &(losses[0] * 0.7), "{losses:?}");
    let model = told.outcome.model.unwrap();
    let (config, teacher) = (read_config(&model).unwrap(), read_config(&place.at("teacher")).unwrap());
    assert_eq!((config.num_hidden_layers, config.hidden_size), (1, 32));
    assert_eq!((config.vocab_size, config.max_position_embeddings), (teacher.vocab_size, 160));
    let bytes = |folder: &Path, name: &str| fs::read(folder.join(name)).unwrap();
    for name in ["tokenizer.json", "chat_template.jinja"] {
        assert_eq!(bytes(&model, name), bytes(&place.at("teacher"), name), "{name}");
    }
}

#[test]
fn a_fresh_student_learns_what_the_teacher_takes_to_be_likely() {
    let place = Place::new(DType::F32);
    for (out, way) in [("forward", "forward"), ("reverse", "reverse")] {
        let distill = format!("mode = 'logits'\ntop_k = 300\ndivergence = '{way}'\ntemperature = 1.5");
        let more = format!("{WRITTEN}steps = 60\nlr = 0.02\n");
        let told = go(&place.options(out, FRESH, &distill, &more), None);
        let values = all(&told, "divergence");
        assert!(values[0] > 0.0 && values.last().unwrap() < &(values[0] * 0.7), "{way}: {values:?}");
        assert!(told.steps.iter().all(|step| step.get("loss").is_none()));
        assert!(told.evaluations.iter().all(|values| values.get("loss").unwrap() > 0.0));
    }
}

#[test]
fn a_copy_of_the_teacher_has_nothing_to_learn() {
    let place = Place::new(DType::Bf16);
    // what pulls beside the teacher is left out
    let quiet = "mtp_loss_weight = 0\nbias_update_speed = 0\nsequence_balance_alpha = 0\nsteps = 1\n";
    let more = format!("{WRITTEN}{quiet}");
    for way in ["forward", "reverse"] {
        let distill = format!("mode = 'logits'\ntop_k = 8\ndivergence = '{way}'\ntemperature = 0.7");
        let told = go(&place.options(way, COPY, &distill, &more), None);
        let (divergence, norm) = (all(&told, "divergence")[0], all(&told, "grad_norm")[0]);
        assert!(divergence.abs() < 1e-5 && norm < 1e-4, "{way}: {divergence} {norm}");
    }
    let told = go(&place.options("own", COPY, "mode = 'on_policy'", &format!("{TASKS}{quiet}")), None);
    // one engine: teacher and student say the same number
    assert_eq!((all(&told, "divergence"), all(&told, "grad_norm")), (vec![0.0], vec![0.0]));
    assert_eq!((all(&told, "kl_rollout"), all(&told, "bits_differ")), (vec![0.0], vec![0.0]));
}

#[test]
fn a_student_that_is_judged_comes_nearer_to_its_teacher() {
    let place = Place::new(DType::F32);
    // random models all say the same of everything; one that learned something does not
    let more = format!("{WRITTEN}epochs = 8\nlr = 0.01\n");
    go(&place.options("taught", COPY, "mode = 'sequences'", &more), None);
    let more = format!("{TASKS}steps = 40\nlr = 0.01\neval_every = 20\n");
    let mut options = place.options("judged", COPY, "mode = 'on_policy'", &more);
    options.overrides.push(format!("teacher.path={}", place.at("taught").display()));
    let told = go(&options, None);
    let values = all(&told, "divergence");
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&values[..3]) > 0.0 && mean(&values[30..]) < mean(&values[..3]) * 0.7, "{values:?}");
    // sampled and trained by one engine, whatever the teacher
    assert!(all(&told, "bits_differ").iter().all(|&share| share == 0.0));
    // modules that predict ahead learn beside it
    let mtp = all(&told, "mtp_loss");
    assert!(mtp.last().unwrap() < &mtp[0], "{mtp:?}");
    assert!(told.evaluations.iter().all(|values| values.get("pass@1").is_some()));
}

#[test]
fn judging_does_not_depend_on_how_answers_are_cut_into_passes() {
    let place = Place::new(DType::F32);
    let norm = |rows: usize| {
        let more = format!("{TASKS}steps = 1\nsequence_balance_alpha = 50\n");
        let mut options = place.options(&format!("rows{rows}"), COPY, "mode = 'on_policy'", &more);
        options.overrides.push(format!("train.rows_per_pass={rows}"));
        all(&go(&options, None), "grad_norm")[0]
    };
    let whole = norm(8192);
    for rows in [1, 110] {
        let cut = norm(rows);
        assert!((cut / whole - 1.0).abs() < 1e-4, "{rows} rows a pass: {cut}, in one pass {whole}");
    }
}

#[test]
fn runs_go_on_bit_for_bit_in_every_mode() {
    let place = Place::new(DType::Bf16);
    let modes = [
        ("mode = 'sequences'", format!("{WRITTEN}steps = 4\n")),
        ("mode = 'logits'\ncache = 'cache'", format!("{WRITTEN}steps = 4\n")),
        ("mode = 'on_policy'", format!("{TASKS}steps = 4\n")),
    ];
    for (at, (distill, more)) in modes.iter().enumerate() {
        let whole = go(&place.options(&format!("whole{at}"), FRESH, distill, more), None);
        let options = place.options(&format!("cut{at}"), FRESH, distill, more);
        let stopped = go(&options, Some(3));
        assert_eq!((stopped.outcome.step, &stopped.outcome.model), (3, &None));
        // another number of threads, too
        let resumed = go(&Options { resume: true, threads: 1, ..options }, None);
        assert!(weights(&resumed) == weights(&whole), "{distill}: a resumed run ends in other weights");
    }
    // the teacher is another one now
    model(&place.at("teacher"), "v3_mtp1", DType::Bf16, 290, 6);
    for (at, (distill, more)) in modes.iter().enumerate().skip(1) {
        let options = place.options(&format!("cut{at}"), FRESH, distill, more);
        let error = refusal(&Options { resume: true, ..options });
        assert!(error.contains("another teacher"), "{error}");
    }
}

#[test]
fn a_cache_says_what_the_teacher_says_to_the_bit() {
    for dtype in [DType::F32, DType::Bf16] {
        let place = Place::new(dtype);
        let more = format!("{WRITTEN}steps = 12\n");
        let logits = "mode = 'logits'\ntop_k = 7\ntemperature = 1.3";
        let online = go(&place.options("online", FRESH, logits, &more), None);
        let cached = format!("{logits}\ncache = 'cache'");
        let built = go(&place.options("built", FRESH, &cached, &more), None);
        let source = |told: &Told| told.facts[0].1.clone();
        assert!(
            source(&online).ends_with("asked at each step") && source(&built).ends_with("from the cache")
        );
        assert!(weights(&online) == weights(&built), "{dtype:?}");
        assert_eq!(all(&online, "divergence"), all(&built, "divergence"));

        let entry = fs::read_dir(place.at("cache")).unwrap().next().unwrap().unwrap().path();
        let written = fs::metadata(&entry).unwrap().modified().unwrap();
        let found = go(&place.options("found", FRESH, &cached, &more), None);
        assert!(weights(&online) == weights(&found));
        assert_eq!(fs::metadata(&entry).unwrap().modified().unwrap(), written, "it was written again");

        // one that is asked otherwise is another entry
        go(&place.options("other", FRESH, &cached.replace("1.3", "1.4"), &more), None);
        assert_eq!(fs::read_dir(place.at("cache")).unwrap().count(), 2);
        let mut bytes = fs::read(&entry).unwrap();
        bytes[200] ^= 1;
        fs::write(&entry, &bytes).unwrap();
        let error = refusal(&place.options("damaged", FRESH, &cached, &more));
        assert!(error.contains("changed after it was written"), "{error}");
        fs::write(&entry, &bytes[..300]).unwrap();
        let error = refusal(&place.options("short", FRESH, &cached, &more));
        assert!(error.contains("got 300"), "{error}");
    }
}

#[test]
fn a_cache_that_was_cut_off_goes_on_after_its_last_sample() {
    let place = Place::new(DType::F32);
    let known = Known::look("teacher.path", &place.at("teacher").display().to_string()).unwrap();
    let telling = Telling {
        k: 3,
        vocabulary: known.config.vocab_size,
        temperature: 1.0,
        divergence: Divergence::Forward,
        precision: None,
    };
    let samples: Vec<Sample> = (2..9)
        .map(|n| Sample {
            ids: (0..n).map(|i| 40 + i).collect(),
            mask: (0..n).map(|i| i > 1 || n < 4).collect(),
        })
        .collect();
    let cpu = Cpu::detect(2);
    let folder = place.at("cache").display().to_string();
    let build = |stop: bool| -> Result<Built> {
        let entry = cache::Entry::new(&folder, "teacher", &telling, &samples)?;
        entry.open_or_build(&cpu, &AtomicBool::new(stop), &mut |_| {}, &mut |on_event| {
            known.load(None, &cpu, on_event)
        })
    };
    assert!(matches!(build(true).unwrap(), Built::Stopped));
    let part = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let whole = |built: Built| match built {
        Built::Whole(mut cache) => cache.tell(&[5, 0, 3]).unwrap(),
        Built::Stopped => panic!("nobody stopped it"),
    };
    let first: Teacher = whole(build(false).unwrap());
    let entry = part.with_extension("teacher");
    let bytes = fs::read(&entry).unwrap();
    assert!(!part.exists());
    // as if the machine had gone down in the middle of a row
    fs::write(&part, &bytes[..bytes.len() - 70]).unwrap();
    fs::remove_file(&entry).unwrap();
    assert_eq!(whole(build(false).unwrap()), first);
    assert_eq!(fs::read(&entry).unwrap(), bytes);
    let picked = [5, 0, 3].map(|at: usize| &samples[at]);
    let asked = telling.ask(&cpu, &mut known.load(None, &cpu, &mut |_| {}).unwrap(), &pack(picked, 0));
    assert_eq!(asked, first);
    // two runs do not write one entry
    fs::rename(&entry, &part).unwrap();
    let held = fs::File::open(&part).unwrap();
    held.lock().unwrap();
    assert!(build(false).err().unwrap().to_string().contains("another run"));
}

#[test]
fn teachers_that_cannot_teach_are_refused() {
    let place = Place::new(DType::F32);
    model(&place.at("stranger"), "llama_gqa", DType::F32, 280, 1);
    let stranger = "[student]\npath = 'stranger'\n";
    for (distill, more) in [("mode = 'sequences'", WRITTEN), ("mode = 'on_policy'", TASKS)] {
        let error = refusal(&place.options("strange", stranger, distill, more));
        assert!(error.contains("290 tokens") && error.contains("280 tokens"), "{error}");
        assert!(error.starts_with("student.path: the teacher's tokenizer"), "{error}");
    }
    let error =
        refusal(&place.options("large", &format!("{FRESH}vocab_size = 512"), "mode = 'sequences'", WRITTEN));
    assert!(error.contains("290 rows") && error.contains("512"), "{error}");
    let error = refusal(&place.options(
        "long",
        &format!("{FRESH}max_position_embeddings = 512"),
        "mode = 'on_policy'",
        TASKS,
    ));
    assert!(error.contains("at most 160 tokens") && error.contains("512"), "{error}");

    let known = Known::look("teacher.path", &place.at("teacher").display().to_string()).unwrap();
    let counts = minke_model::spec::parameters(&known.config);
    let parameters = counts.total + counts.mtp;
    assert_eq!(known.bytes_to_run(None).unwrap(), parameters * 8);
    assert_eq!(known.bytes_to_run(Some(Precision::uniform(DType::Bf16))).unwrap(), parameters * 6);
    let gib = 1 << 30;
    assert!(teacher::fits([2 * gib, gib], Some(3 * gib)).is_ok());
    assert!(teacher::fits([u64::MAX, 1], None).is_ok());
    let error = teacher::fits([u64::MAX / 2, u64::MAX], Some(3 * gib)).unwrap_err().to_string();
    assert!(error.contains("3.0 GiB of memory are left"), "{error}");
    let error = teacher::fits([2 * gib, gib + 1], Some(3 * gib)).unwrap_err().to_string();
    assert!(error.contains("takes 2.0 GiB"), "{error}");
}

#[test]
fn a_teacher_that_no_memory_holds_is_refused_before_it_is_loaded() {
    let place = Place::new(DType::F32);
    let config = fs::read(place.at("teacher/config.json")).unwrap();
    let mut value: Value = serde_json::from_slice(&config).unwrap();
    value["num_hidden_layers"] = 500.into();
    value["hidden_size"] = 16384.into();
    value["moe_intermediate_size"] = 65536.into();
    // there are no weights at all: nobody may look for them
    fs::create_dir(place.at("giant")).unwrap();
    fs::write(place.at("giant/config.json"), value.to_string()).unwrap();
    fs::copy(place.at("teacher/tokenizer.json"), place.at("giant/tokenizer.json")).unwrap();
    let logits = "mode = 'logits'\n[teacher.precision]\nhead = 'bf16'";
    for (distill, more) in
        [("mode = 'on_policy'\n[teacher.precision]\nhead = 'bf16'", TASKS), (logits, WRITTEN)]
    {
        let mut options = place.options("hopeless", FRESH, distill, more);
        options.overrides.push(format!("teacher.path={}", place.at("giant").display()));
        let error = refusal(&options);
        assert!(
            error.starts_with("teacher.path: the teacher takes") && error.contains("are left"),
            "{error}"
        );
        assert!(!place.at("hopeless").exists(), "nothing was begun");
    }
}

#[test]
fn modules_that_predict_ahead_learn_beside_the_teacher_s_word() {
    let place = Place::new(DType::F32);
    let more = format!("{WRITTEN}steps = 20\nlr = 0.01\n");
    for (out, distill) in [("likely", "mode = 'logits'"), ("written", "mode = 'sequences'")] {
        let losses = all(&go(&place.options(out, COPY, distill, &more), None), "mtp_loss");
        assert!(losses.last().unwrap() < &(losses[0] * 0.9), "{out}: {losses:?}");
    }
}

#[test]
fn recipes_say_all_and_what_is_wrong() {
    let place = Place::new(DType::F32);
    let load = |options: &Options| Recipe::read(&options.document()?);
    let teacher = Known::look("teacher.path", &place.at("teacher").display().to_string()).unwrap();
    for (out, student, distill, more) in [
        ("a", FRESH, "mode = 'logits'\ncache = 'cache'", format!("{WRITTEN}[eval]\nsuite = 'chain:1'\n")),
        ("b", COPY, "mode = 'sequences'", WRITTEN.to_owned()),
        ("c", "[student.model]\nq_lora_rank = 0\nrope_theta = 5e3\n", "mode = 'on_policy'", TASKS.to_owned()),
    ] {
        let options =
            place.options(out, student, distill, &format!("{more}\n[teacher.precision]\nhead = 'f32'"));
        let mut recipe = load(&options).unwrap();
        recipe.look(&teacher).unwrap();
        let text = recipe.setup().unwrap().recipe;
        let written = place.at("written.toml");
        fs::write(&written, &text).unwrap();
        let mut again = Recipe::read(&Document::load(&written, &[]).unwrap()).unwrap();
        again.look(&teacher).unwrap();
        assert_eq!(again.setup().unwrap().recipe, text);
    }
    for (student, distill, more, why) in [
        (FRESH, "", WRITTEN, "\"on_policy\""),
        (FRESH, "mode = 'dreams'", WRITTEN, "\"sequences\", \"logits\" or \"on_policy\""),
        (FRESH, "mode = 'sequences'\ntop_k = 3", WRITTEN, "only distill.mode = \"logits\""),
        (FRESH, "mode = 'logits'", TASKS, "tasks"),
        (FRESH, "mode = 'on_policy'", WRITTEN, "data"),
        (FRESH, "mode = 'logits'\ntemperature = 0", WRITTEN, "above 0"),
        (FRESH, "mode = 'logits'\ntemperature = 1e-300", WRITTEN, "in 32 bits, where it is 0"),
        (
            "[student]\npath = 'x'\n[student.model]\ndepth = 1",
            "mode = 'sequences'",
            WRITTEN,
            "[student.model] makes a fresh one",
        ),
        ("", "mode = 'sequences'", WRITTEN, "a model to start from"),
        ("[student.model]\ndepht = 1", "mode = 'sequences'", WRITTEN, "did you mean `depth`?"),
    ] {
        let error = load(&place.options("wrong", student, distill, more)).unwrap_err().to_string();
        assert!(error.contains(why), "{distill}: {error}");
    }
    let mut odd = load(&place.options(
        "odd",
        &format!("{FRESH}num_attention_heads = 0"),
        "mode = 'sequences'",
        WRITTEN,
    ))
    .unwrap();
    let error = odd.look(&teacher).unwrap_err().to_string();
    assert!(error.contains("num_attention_heads = 0") && error.contains("odd.toml"), "{error}");
}
