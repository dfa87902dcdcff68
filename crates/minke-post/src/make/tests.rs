use std::cell::RefCell;

use minke_train::run_folder;

use super::*;
use crate::metrics::{Record, Sample, Values};

const KINDS: [Kind; 2] = [
    Kind {
        name: "gym",
        command: None,
        begins_with: None,
        makes_model: false,
        paths: &["words"],
        models: &[],
    },
    Kind {
        name: "train",
        command: Some("train"),
        begins_with: Some("model.path"),
        makes_model: true,
        paths: &["data.sources.*.path"],
        models: &["model.path", "teacher"],
    },
];

/// What the fake stages do, by their recipes.
#[derive(Default)]
struct Fake {
    /// Stages that ran, and whether they were resumed.
    ran: Vec<String>,
    /// A stage that is stopped halfway.
    stops: Option<String>,
    /// A stage that fails.
    fails: Option<String>,
    /// Whether stages are told to start whatever memory there is.
    forces: bool,
    checked: Vec<String>,
    seen: RefCell<Vec<String>>,
}

fn recipe_of(path: &Path) -> toml::Table {
    toml::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

impl Runner for Fake {
    type Error = String;

    fn kinds(&self) -> &[Kind] {
        &KINDS
    }

    fn check(&mut self, stage: &Stage) -> Result<(), String> {
        self.checked.push(stage.name.clone());
        let wrong = stage.given.root().flag("wrong").map_err(|error| error.to_string())?;
        wrong.map_or(Ok(()), |_| Err("`wrong` is wrong".to_owned()))
    }

    fn run(&mut self, kind: Kind, options: &pretrain::Options) -> Result<Option<StageResult>, String> {
        let table = recipe_of(&options.recipe);
        let out = PathBuf::from(table["run"]["out"].as_str().unwrap());
        let stage = out.file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(out.file_name(), options.out.as_ref().unwrap().file_name());
        assert_eq!(options.force, self.forces);
        self.ran.push(format!("{stage}{}", if options.resume { "+" } else { "" }));
        if self.fails.as_ref() == Some(&stage) {
            // as a stage does that took its folder and could not go on
            fs::create_dir_all(out.join("checkpoints")).unwrap();
            return Err("out of luck".to_owned());
        }
        fs::create_dir_all(out.join("model")).unwrap();
        if self.stops.as_ref() == Some(&stage) {
            fs::write(out.join("half"), "done").unwrap();
            return Ok(None);
        }
        // what is made is a function of the recipe, so that "made again" can be seen
        let made = format!("{stage} {}", table.get("steps").map_or(String::new(), ToString::to_string));
        if kind.makes_model {
            fs::write(out.join("model/config.json"), made).unwrap();
        } else {
            fs::write(out.join("train.jsonl"), made).unwrap();
        }
        let mut scores = Values::default();
        scores.put("pass@1", 0.25 * self.ran.len() as f64);
        scores.put("pass@1/chain:2", 0.5);
        let record =
            Record::Sample(Sample { step: 7, prompt: "2+2?".into(), text: stage, verdict: "right".into() });
        let evaluation = Record::Evaluation(Values { step: 7, elapsed_s: 0.0, ..scores.clone() });
        let lines = [record, evaluation].map(|record| serde_json::to_string(&record).unwrap() + "\n");
        run_folder::replace(&out.join("metrics.jsonl"), lines.concat().as_bytes()).unwrap();
        Ok(Some(StageResult { facts: vec![("steps".into(), "7".into())], scores: Some(scores) }))
    }

    fn see(&mut self, event: &Event<'_>) {
        let line = match event {
            Event::Stage { index, stages, name, resumed, .. } => format!("{index}/{stages} {name} {resumed}"),
            Event::Skipped { name, .. } => format!("skip {name}"),
            Event::Finished { name, .. } => format!("done {name}"),
        };
        self.seen.borrow_mut().push(line);
    }
}

struct Bench(tempfile::TempDir);

const RECIPE: &str = r#"
[run]
name = "tiny"
seed = 5

[[stage]]
name = "worked"
kind = "gym"
words = "words.txt"
families = ["chain", "./mine.jsonl"]

[[stage]]
name = "base"
kind = "train"
steps = 10
[[stage.data.sources]]
path = "stage:worked/train.jsonl"
[[stage.data.sources]]
path = "texts"

[[stage]]
name = "rl"
kind = "train"
steps = 20
teacher = "owner/name"
[stage.run]
seed = 9
[stage.model]
path = "stage:base"
"#;

impl Bench {
    fn new(recipe: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tiny.toml"), recipe).unwrap();
        Self(folder)
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("out")
    }

    fn options(&self) -> Options {
        Options { recipe: self.0.path().join("tiny.toml"), out: Some(self.out()), ..Options::default() }
    }
}

fn refused(options: &Options, fake: &mut Fake) -> String {
    match run(options, fake) {
        Err(Failed::Make(error)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn stages_are_complete_recipes_and_the_last_model_is_the_pipelines() {
    let bench = Bench::new(RECIPE);
    let mut fake = Fake::default();
    let outcome = run(&bench.options(), &mut fake).unwrap();
    assert_eq!(fake.checked, ["worked", "base", "rl"]);
    assert_eq!(fake.ran, ["worked", "base", "rl"]);
    assert_eq!((outcome.finished.len(), outcome.stopped), (3, None));
    let out = fs::canonicalize(bench.out()).unwrap();
    let of = |stage: &str| recipe_of(&out.join(format!("stages/{stage}.toml")));
    let (worked, base, rl) = (of("worked"), of("base"), of("rl"));
    let text = |value: &toml::Value| value.as_str().unwrap().to_owned();
    let within = |path: &str| bench.0.path().join(path).display().to_string();
    assert_eq!(text(&worked["words"]), within("words.txt"));
    assert_eq!(text(&worked["families"][0]), "chain");
    assert!(
        text(&worked["families"][1]).ends_with("mine.jsonl")
            && !text(&worked["families"][1]).starts_with('.')
    );
    assert_eq!(
        text(&base["data"]["sources"][0]["path"]),
        out.join("worked/train.jsonl").display().to_string()
    );
    assert_eq!(text(&base["data"]["sources"][1]["path"]), within("texts"));
    assert_eq!(text(&rl["model"]["path"]), out.join("base").display().to_string());
    // nothing of that name is there, so it is a hub id
    assert_eq!(text(&rl["teacher"]), "owner/name");
    assert_eq!(base["run"]["seed"].as_integer(), Some(5));
    assert_eq!(rl["run"]["seed"].as_integer(), Some(9));
    assert_eq!(text(&rl["run"]["name"]), "tiny-rl");
    assert_eq!(text(&rl["run"]["out"]), out.join("rl").display().to_string());
    assert!(!rl.contains_key("name") && !rl.contains_key("kind"));
    assert_eq!(fs::read_to_string(out.join("model/config.json")).unwrap(), "rl 20");
    let report = fs::read_to_string(outcome.report.unwrap()).unwrap();
    for part in [
        "| rl | train | steps: 7 |",
        "| pass@1 | 25.0 % | 50.0 % | 75.0 % |",
        "after base",
        "plots/pass.svg",
        "In `worked`, after 7 steps (right)",
    ] {
        assert!(report.contains(part), "{part}:\n{report}");
    }
    assert!(out.join("plots/pass.svg").is_file());
    // the same again is refused, and changes nothing
    assert!(refused(&bench.options(), &mut fake).contains("--resume"));
    assert_eq!(fake.ran.len(), 3);
}

#[test]
fn what_is_no_pipeline_is_left_alone() {
    let bench = Bench::new(RECIPE);
    let options = Options { resume: true, ..bench.options() };
    // as a run of one stage leaves it, or anybody
    fs::create_dir_all(bench.out().join("model")).unwrap();
    fs::write(bench.out().join("model/thesis.txt"), "years").unwrap();
    fs::write(bench.out().join("recipe.toml"), "").unwrap();
    let mut fake = Fake::default();
    let again = [options.clone(), Options { from: Some("base".to_owned()), ..bench.options() }];
    for options in [bench.options()].iter().chain(&again) {
        let text = refused(options, &mut fake);
        assert!(text.contains("holds no pipeline") && !text.contains("--resume"), "{text}");
    }
    assert_eq!(fs::read_to_string(bench.out().join("model/thesis.txt")).unwrap(), "years");
    assert!(!bench.out().join("stages").exists() && fake.ran.is_empty());
    fs::remove_dir_all(bench.out()).unwrap();
    // an empty folder is nobody's
    fs::create_dir(bench.out()).unwrap();
    assert_eq!(run(&options, &mut fake).unwrap().finished.len(), 3);
    let text = refused(&bench.options(), &mut fake);
    assert!(text.contains("--resume") && text.contains("--from"), "{text}");
}

#[test]
fn what_options_say_starts_where_the_user_is() {
    let bench = Bench::new(RECIPE);
    let set = [
        "worked.words=words.txt",
        "base.data.sources.1.path=more",
        "rl.teacher=src",
        "rl.model.path=stage:base",
    ];
    let overrides = set.map(str::to_owned).to_vec();
    run(&Options { overrides, ..bench.options() }, &mut Fake::default()).unwrap();
    let of = |stage: &str| recipe_of(&bench.out().join(format!("stages/{stage}.toml")));
    let here = |path: &str| std::path::absolute(path).unwrap().display().to_string();
    assert_eq!(of("worked")["words"].as_str(), Some(&here("words.txt")[..]));
    assert_eq!(of("base")["data"]["sources"][1]["path"].as_str(), Some(&here("more")[..]));
    assert_eq!(of("rl")["teacher"].as_str(), Some(&here("src")[..]));
    assert!(of("rl")["model"]["path"].as_str().unwrap().ends_with("out/base"));
}

#[test]
fn a_student_has_a_line_of_its_own() {
    let student = "[[stage]]\nname = \"student\"\nkind = \"train\"\n";
    for (publish, expected) in [("rl", true), ("student", false)] {
        let recipe = RECIPE.replace("seed = 5", &format!("seed = 5\npublish = \"{publish}\""));
        let bench = Bench::new(&(recipe + student));
        run(&bench.options(), &mut Fake::default()).unwrap();
        let plot = fs::read_to_string(bench.out().join("plots/pass.svg")).unwrap();
        let has = |name: &str| plot.lines().any(|line| line.trim() == name);
        // the stage `rl` goes on from `base`, so that both are one line
        assert!((has("student"), has("rl")) == (expected, !expected), "{publish}: {plot}");
    }
}

#[test]
fn what_is_finished_is_kept_and_what_was_cut_off_goes_on() {
    let bench = Bench::new(RECIPE);
    let mut fake = Fake { stops: Some("base".into()), ..Fake::default() };
    let outcome = run(&bench.options(), &mut fake).unwrap();
    assert_eq!((outcome.stopped.as_deref(), outcome.model), (Some("base"), None));
    assert_eq!(outcome.finished, ["worked"]);
    let resume = Options { resume: true, ..bench.options() };
    let mut fake = Fake::default();
    let outcome = run(&resume, &mut fake).unwrap();
    assert_eq!(fake.ran, ["base+", "rl"]);
    assert!(bench.out().join("base/half").is_file(), "a resumed stage keeps its folder");
    assert_eq!(*fake.seen.borrow(), ["skip worked", "2/3 base true", "done base", "3/3 rl false", "done rl"]);
    assert!(outcome.model.is_some());
    // a third time there is nothing to do
    let mut fake = Fake::default();
    run(&resume, &mut fake).unwrap();
    assert!(fake.ran.is_empty());
}

#[test]
fn a_changed_stage_is_refused_until_it_is_made_again() {
    let bench = Bench::new(RECIPE);
    run(&bench.options(), &mut Fake::default()).unwrap();
    let changed = Options { resume: true, overrides: vec!["base.steps=11".into()], ..bench.options() };
    let error = refused(&changed, &mut Fake::default());
    for part in ["stage `base`", "base.steps: was 10, is 11", "--from base"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(fs::read_to_string(bench.out().join("base/model/config.json")).unwrap(), "base 10");
    fs::write(bench.out().join("rl/left-over"), "of the old run").unwrap();
    let from = Options { resume: false, from: Some("base".into()), force: true, ..changed.clone() };
    let mut fake = Fake { forces: true, ..Fake::default() };
    run(&from, &mut fake).unwrap();
    assert_eq!(fake.ran, ["base", "rl"]);
    assert_eq!(fs::read_to_string(bench.out().join("base/model/config.json")).unwrap(), "base 11");
    assert!(!bench.out().join("rl/left-over").exists());
    // the change is what it was made with now
    run(&changed, &mut Fake::default()).unwrap();
    // the stage alone, and what follows is not made from it any more
    let only =
        Options { only: Some("base".into()), overrides: vec!["base.steps=12".into()], ..bench.options() };
    let mut fake = Fake::default();
    run(&only, &mut fake).unwrap();
    assert_eq!(fake.ran, ["base"]);
    let error = refused(&Options { resume: true, only: None, ..only }, &mut Fake::default());
    assert!(
        error.contains("stage `rl`") && error.contains("its input `base`") && error.contains("--from rl"),
        "{error}"
    );
}

#[test]
fn a_stage_that_failed_at_once_may_be_mended() {
    let bench = Bench::new(RECIPE);
    let mut fake = Fake { fails: Some("base".into()), ..Fake::default() };
    match run(&bench.options(), &mut fake) {
        Err(Failed::Stage { name, error }) => assert_eq!((&name[..], &error[..]), ("base", "out of luck")),
        other => panic!("{other:?}"),
    }
    let mended = Options { resume: true, overrides: vec!["base.steps=11".into()], ..bench.options() };
    let mut fake = Fake::default();
    run(&mended, &mut fake).unwrap();
    assert_eq!(fake.ran, ["base", "rl"]);
}

#[test]
fn a_wrong_stage_is_found_before_anything_runs() {
    let bench = Bench::new(RECIPE);
    let mut fake = Fake::default();
    let wrong = Options { overrides: vec!["rl.wrong=true".into()], ..bench.options() };
    match run(&wrong, &mut fake) {
        Err(Failed::Stage { name, error }) => {
            assert_eq!((&name[..], &error[..]), ("rl", "`wrong` is wrong"));
        }
        other => panic!("{other:?}"),
    }
    assert!(fake.ran.is_empty() && !bench.out().exists());
    // what was found wrong is not in the way
    run(&bench.options(), &mut fake).unwrap();
    assert_eq!(fake.ran.len(), 3);
}

#[test]
fn what_a_stage_needs_must_be_there() {
    let bench = Bench::new(RECIPE);
    let only = Options { only: Some("rl".into()), ..bench.options() };
    let error = refused(&only, &mut Fake::default());
    assert!(error.contains("stage `rl` needs stage `base`"), "{error}");
    let from = Options { only: None, from: Some("nothing".into()), ..only };
    let error = refused(&from, &mut Fake::default());
    assert!(error.contains("--from nothing") && error.contains("worked, base, rl"), "{error}");
    // a file that the earlier stage does not write is said with those that it does
    let bench = Bench::new(&RECIPE.replace("worked/train.jsonl", "worked/tarin.jsonl"));
    let error = refused(&bench.options(), &mut Fake::default());
    assert!(
        error.contains("stage:worked/tarin.jsonl")
            && error.contains("there is metrics.jsonl, model, train.jsonl"),
        "{error}"
    );
}

#[test]
fn a_pipeline_may_come_after_another() {
    let first = Bench::new(RECIPE);
    run(&first.options(), &mut Fake::default()).unwrap();
    let out = first.out().display().to_string();
    let more = "[[stage]]\nname = \"dapo\"\nkind = \"train\"\n[stage.model]\npath = \"stage:base\"\n";
    let second = Bench::new(&format!("[run]\nafter = {out:?}\n{more}"));
    run(&second.options(), &mut Fake::default()).unwrap();
    let written = recipe_of(&second.out().join("stages/dapo.toml"));
    assert_eq!(written["model"]["path"].as_str(), first.out().join("base").to_str());
    // what the other pipeline has not made is said before anything runs
    let third = Bench::new(&format!("[run]\nafter = {out:?}\n{}", more.replace("stage:base", "stage:bass")));
    let error = refused(&third.options(), &mut Fake::default());
    assert!(error.contains("this is the first, or one in") && error.contains("be made before"), "{error}");
}

#[test]
fn recipes_that_are_wrong_say_where() {
    let message = |recipe: &str, overrides: &[&str]| {
        let bench = Bench::new(recipe);
        let overrides = overrides.iter().map(|text| (*text).to_owned()).collect();
        let options = Options { overrides, ..bench.options() };
        let error = refused(&options, &mut Fake::default());
        assert!(!bench.out().exists(), "{error}");
        error
    };
    let stage = |rest: &str| format!("[[stage]]\nname = \"a\"\nkind = \"train\"\n{rest}");
    for (recipe, expected) in [
        (String::new(), "at least one [[stage]]"),
        ("[[stage]]\nkind = \"train\"\n".into(), "`stage.0.name` is missing"),
        ("[[stage]]\nname = \"a\"\n".into(), "one of gym, train"),
        ("[[stage]]\nname = \"a\"\nkind = \"trian\"\n".into(), "\"gym\" or \"train\""),
        (stage("").replace("\"a\"", "\"../a\""), "a name of lower-case letters"),
        (stage("").replace("\"a\"", "\"model\""), "another name"),
        (stage("") + &stage(""), "no other stage has"),
        (stage("[stage.model]\npath = \"stage:b\"\n"), "stage:NAME of an earlier stage (this is the first)"),
        (stage("[stage.model]\npath = \"stage:a\"\n"), "stage:NAME of an earlier stage"),
        (stage("") + &stage("x = [\"stage:a/../../b\"]\n").replace("\"a\"", "\"b\""), "a file inside"),
        (stage("[stage.run]\nout = \"x\"\n"), "the pipeline decides it"),
        (stage("run = 3\n"), "a table [stage.run]"),
        (stage("when = 2020-01-01\n"), "no date"),
        ("[run]\nnam = \"x\"\n".to_owned() + &stage(""), "did you mean `name`?"),
        ("[run]\npublish = \"b\"\n".to_owned() + &stage(""), "a stage that makes a model: a"),
        ("[[stage]\n".into(), "recipe is not valid TOML"),
    ] {
        let error = message(&recipe, &[]);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let error = message(RECIPE, &["lr.steps=3"]);
    assert!(error.contains("the stages are worked, base, rl"), "{error}");
    let error = message(RECIPE, &["base=3"]);
    assert!(error.contains("STAGE.KEY=VALUE"), "{error}");
}

#[test]
fn a_damaged_marker_is_named() {
    let bench = Bench::new(RECIPE);
    run(&bench.options(), &mut Fake::default()).unwrap();
    let path = bench.out().join("stages/base.json");
    fs::write(&path, "{").unwrap();
    let resume = Options { resume: true, ..bench.options() };
    let error = refused(&resume, &mut Fake::default());
    assert!(error.contains("base.json is damaged") && error.contains("delete it"), "{error}");
    // without it the stage is gone on with, since its folder is there
    fs::remove_file(&path).unwrap();
    let mut fake = Fake::default();
    run(&resume, &mut fake).unwrap();
    assert_eq!(fake.ran, ["base+"]);
}
