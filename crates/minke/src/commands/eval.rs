//! `minke eval`: how good a model is at tasks, and at foretelling texts.

use std::ops::ControlFlow;
use std::time::Instant;

use minke_cpu::Cpu;
use minke_data::template::Thinking;
use minke_gym::{Check, Split, Suite, Task};
use minke_infer::{Loaded, TEMPERATURE};
use minke_post::eval::{
    AnswerLog, Divergence, EvalReport, EvalSettings, Form, Progress, Prompter, TextReport, check_settings,
    divergence, evaluate_logged, model_name, perplexity,
};
use serde::Serialize;

use super::progress::Bar;
use super::{cache, open, rate, threads, tokenizer, value_name};
use crate::cli::{Eval, Half, KeptAs, ModelArgs, PER_LEVEL, TaskForm};
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output;

/// Tokens of an answer where the user says no number.
const TOKENS: u32 = 512;

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    suites: &'a [String],
    split: String,
    per_level: u32,
    threads: usize,
    tok_s: f64,
    tasks: Option<&'a EvalReport>,
    texts: &'a [TextReport],
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<Against<'a>>,
}

/// How far the model is from another.
#[derive(Serialize)]
struct Against<'a> {
    model: &'a str,
    texts: &'a [Divergence],
}

/// Runs the command.
pub fn run(args: &Eval) -> Result<(), Failure> {
    let (tasks, texts) = suites(args)?;
    if let Some(note) = idle(args, &tasks) {
        output::note(&format!("note: {note}"));
    }
    let cpu = Cpu::detect(threads(args.model.threads));
    let mut loaded = open(&args.model, &cpu)?;
    let tokenizer = tokenizer(&loaded)?;
    let mut reference = reference(args, &texts, &cpu)?;
    let prompter = prompter(args, &loaded)?;
    let settings = settings(args, &loaded, &prompter)?;
    let mut log = match &args.out {
        Some(path) if !tasks.is_empty() => {
            let log = AnswerLog::open(path, &model_name(&loaded.model), &prompter, &settings, args.resume)?;
            if !log.is_empty() {
                output::note(&format!("{} answers are there already", log.len()));
            }
            Some(log)
        }
        Some(_) => return Err(Failure::user("--out keeps answers to tasks, and there are only texts")),
        None if args.resume => return Err(Failure::user("--resume needs --out, the file to continue")),
        None => None,
    };
    interrupt::install();
    let work = Work::begin();
    let flow = || if work.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let start = Instant::now();
    let mut tokens = 0;
    let report = if tasks.is_empty() {
        None
    } else {
        let mut bar = Bar::new("answers", args.json);
        let report = evaluate_logged(
            &mut loaded.model,
            &cpu,
            &tokenizer,
            &prompter,
            &tasks,
            &settings,
            log.as_mut(),
            &mut |progress: Progress| {
                tokens = progress.tokens;
                bar.set(progress.done as u64, progress.total as u64, || {
                    let speed = rate(progress.tokens, start.elapsed().as_secs_f64());
                    format!("{} right, {speed:.0} tokens/s", progress.right)
                });
                flow()
            },
        )?;
        Some(report)
    };
    let tok_s = rate(tokens, start.elapsed().as_secs_f64());
    let mut read = Vec::new();
    let bos = loaded.bos();
    for path in &texts {
        let mut bar = Bar::new("tokens", args.json);
        let one = perplexity(&mut loaded.model, &cpu, &tokenizer, bos, path, &mut |done, total| {
            bar.set(done as u64, total as u64, String::new);
            flow()
        })?;
        read.extend(one);
    }
    let mut distances = Vec::new();
    let kind = cache(args.cache);
    if let Some(reference) = &mut reference {
        for path in &texts {
            let mut bar = Bar::new("tokens of both", args.json);
            let (one, other) = (&mut loaded.model, &mut reference.model);
            let found = divergence(one, other, kind, &cpu, &tokenizer, bos, path, &mut |done, total| {
                bar.set(done as u64, total as u64, String::new);
                flow()
            })?;
            distances.extend(found);
        }
    }
    if args.json {
        let against = args.against.as_deref().map(|model| Against { model, texts: &distances });
        output::json(&Report {
            model: &args.model.model,
            suites: &args.suites,
            split: value_name(&args.split),
            per_level: args.per_level,
            threads: cpu.threads(),
            tok_s,
            tasks: report.as_ref(),
            texts: &read,
            against,
        })?;
    } else {
        output::text(&shown(report.as_ref(), &read, &distances, args.cache))?;
    }
    if work.is_stopped() { Err(Failure::interrupted()) } else { Ok(()) }
}

/// The tasks and texts of all suites.
fn suites(args: &Eval) -> Result<(Vec<Task>, Vec<std::path::PathBuf>), Failure> {
    let (mut tasks, mut texts): (Vec<Task>, _) = (Vec::new(), Vec::new());
    for name in &args.suites {
        let suite = Suite::parse(name)?;
        let loaded = suite.load(args.split.split(), args.per_level as usize, args.seed)?;
        for note in &loaded.notes {
            output::note(&format!("note: {note}"));
        }
        // a family may be in several suites
        tasks.extend(
            loaded
                .tasks
                .into_iter()
                .filter(|new| tasks.iter().all(|task| task.id != new.id))
                .collect::<Vec<_>>(),
        );
        texts.extend(suite.texts().map(std::path::Path::to_owned));
    }
    Ok((tasks, texts))
}

/// Which arguments do nothing: those of answers where there are only texts, those of the gym's problems where there is
/// none of them.
fn idle(args: &Eval, tasks: &[Task]) -> Option<String> {
    let of_answers = [
        ("--samples", args.samples != 1),
        ("--k", !args.k.is_empty()),
        ("--temperature", args.temperature.is_some()),
        ("--tokens", args.n.is_some()),
        ("--seed", args.seed != 0),
        ("--no-think", args.no_think),
        ("--form", args.form.is_some()),
    ];
    let of_gym = [("--per-level", args.per_level != PER_LEVEL), ("--split", args.split != Half::HeldOut)];
    let of_answers = of_answers.iter().filter(|_| tasks.is_empty());
    let has_gym = tasks.iter().any(|task| matches!(task.check, Check::Family { .. }));
    let all = of_answers.chain(of_gym.iter().filter(|_| !has_gym));
    let names: Vec<&str> = all.filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    let what = if tasks.is_empty() { "there are only texts" } else { "there are no problems of the gym" };
    (!names.is_empty()).then(|| format!("no effect of {}: {what}", names.join(", ")))
}

fn prompter(args: &Eval, loaded: &Loaded) -> Result<Prompter, Failure> {
    let tokenizer = loaded.tokenizer.as_ref().expect("looked for by the caller");
    let template = loaded.template()?;
    let thinking = if args.no_think { Thinking::Empty } else { Thinking::Default };
    let form = match (args.form, template) {
        (Some(TaskForm::Chat), None) => {
            return Err(Failure::user(format!("{} has no chat template", loaded.folder.display()))
                .hint("--form plain asks base models"));
        }
        (Some(TaskForm::Chat) | None, Some(template)) => Form::Chat { template, thinking },
        (Some(TaskForm::Worked), _) => Form::Worked { think: !args.no_think },
        (Some(TaskForm::Plain) | None, _) if args.no_think => {
            return Err(Failure::user("--no-think has no effect on plain prompts")
                .hint("it is for models with a chat template, and for --form worked"));
        }
        (Some(TaskForm::Plain) | None, _) => Form::Plain,
    };
    Ok(Prompter::new(form, loaded.bos(), tokenizer)?)
}

fn settings(args: &Eval, loaded: &Loaded, prompter: &Prompter) -> Result<EvalSettings, Failure> {
    let samples = args.samples as usize;
    // several samples at temperature 0 would all be the same
    let usual = if samples == 1 { 0.0 } else { loaded.generation.temperature.unwrap_or(TEMPERATURE) };
    let mut k: Vec<usize> = args.k.iter().map(|k| *k as usize).collect();
    if k.is_empty() {
        k.extend([1, samples]);
    }
    k.sort_unstable();
    k.dedup();
    let template = match prompter.form() {
        Form::Chat { template, .. } => Some(template),
        _ => None,
    };
    let settings = EvalSettings {
        samples,
        temperature: args.temperature.unwrap_or(usual),
        max_tokens: args.n.unwrap_or(TOKENS) as usize,
        seed: args.seed,
        k,
        stop_ids: loaded.stop_ids_with(template),
        ..EvalSettings::default()
    };
    check_settings(&settings)?;
    if samples > 1 && settings.temperature == 0.0 {
        output::note("note: at temperature 0 all samples of a task are the same");
    }
    Ok(settings)
}

/// The model to compare with.
fn reference(args: &Eval, texts: &[std::path::PathBuf], cpu: &Cpu) -> Result<Option<Loaded>, Failure> {
    let Some(model) = &args.against else { return Ok(None) };
    if texts.is_empty() {
        return Err(Failure::user("--against compares models on texts, and there are only tasks")
            .hint("name a text file beside the suites"));
    }
    let args = ModelArgs { model: model.clone(), ..args.model.clone() };
    open(&args, cpu).map(Some)
}

fn shown(
    report: Option<&EvalReport>,
    texts: &[TextReport],
    distances: &[Divergence],
    cache: KeptAs,
) -> String {
    let mut text = report.map(EvalReport::table).unwrap_or_default();
    for one in texts {
        text.push_str(&format!(
            "{}: {:.3} bits per byte, perplexity {:.2} per token, {} tokens in windows of {}\n",
            one.path, one.bits_per_byte, one.perplexity, one.tokens, one.window
        ));
    }
    // what stands above is the model's own, without a cache
    let with = match cache {
        KeptAs::Model => String::new(),
        other => format!("with --cache {}, ", value_name(&other)),
    };
    for one in distances {
        text.push_str(&format!("{with}{}\n", one.line()));
    }
    text
}

impl Half {
    /// As the gym has it.
    pub fn split(self) -> Split {
        match self {
            Self::Train => Split::Train,
            Self::HeldOut => Split::HeldOut,
        }
    }
}
