//! `minke sft`, `grpo` and `distill`: the terminal's side of post-training.

use std::sync::atomic::AtomicBool;

use minke_post::events::{Event, Started};
use minke_post::grpo::bench::{self, Figures};
use minke_post::metrics::{Sample, Values};
use minke_post::session::Outcome;
use minke_train::pretrain::Options;
use serde::Serialize;

use super::progress::Bar;
use super::screen::Screen;
use super::threads;
use super::train::{duration, json_line, options};
use crate::cli::{BenchGrpo, Train};
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output::{self, count, percent};

/// A stage of post-training: what its command runs.
pub type Run = fn(&Options, &AtomicBool, &mut dyn FnMut(Event<'_>)) -> minke_post::Result<Outcome>;

/// Runs a stage as a command.
pub fn run(args: &Train, stage: Run) -> Result<(), Failure> {
    interrupt::install();
    let work = Work::begin();
    let mut watcher = Watcher::new(args.json);
    let outcome = stage(&options(args), &work.flag(), &mut |event| watcher.see(&event));
    watcher.end();
    let outcome = outcome?;
    if args.json {
        json_line(&End::of(&outcome))?;
    } else {
        output::text(&end_text(&outcome))?;
    }
    if outcome.model.is_some() { Ok(()) } else { Err(Failure::interrupted()) }
}

#[derive(Serialize)]
struct End<'a> {
    event: &'static str,
    folder: &'a std::path::Path,
    step: u64,
    steps: u64,
    checkpoint: Option<&'a std::path::Path>,
    model: Option<&'a std::path::Path>,
    evaluation: Option<&'a Values>,
}

impl<'a> End<'a> {
    fn of(outcome: &'a Outcome) -> Self {
        Self {
            event: if outcome.model.is_some() { "finished" } else { "stopped" },
            folder: &outcome.folder,
            step: outcome.step,
            steps: outcome.steps,
            checkpoint: outcome.checkpoint.as_deref(),
            model: outcome.model.as_deref(),
            evaluation: outcome.evaluation.as_ref(),
        }
    }
}

fn end_text(outcome: &Outcome) -> String {
    let Some(model) = &outcome.model else {
        let state = outcome.checkpoint.as_ref().map_or("nothing to keep yet".to_owned(), |path| {
            format!("checkpoint {}; --resume continues", path.display())
        });
        return format!("stopped after step {} of {}: {state}\n", outcome.step, outcome.steps);
    };
    let mut rows = vec![("model", model.display().to_string())];
    let report = outcome.folder.join("report.md");
    if report.is_file() {
        rows.push(("report", report.display().to_string()));
    }
    if let Some(evaluation) = &outcome.evaluation {
        rows.push(("held-out", figures(evaluation, &EXAMINED)));
    }
    rows.push(("next", format!("minke chat {}", outcome.folder.display())));
    output::table(&rows)
}

/// How a named value is shown.
enum As {
    Number(usize),
    Percent,
    /// Only where it is not zero.
    Unless0,
}

/// What a step's line shows of what it measured, in this order.
const SHOWN: [(&str, &str, As); 15] = [
    ("loss", "loss", As::Number(3)),
    ("reward", "reward", As::Number(3)),
    ("right", "right", As::Percent),
    ("thought", "thought", As::Number(1)),
    ("entropy", "entropy", As::Number(3)),
    ("signal", "signal", As::Percent),
    ("divergence", "divergence", As::Number(4)),
    ("kl_rollout", "KL(rollout||trainer)", As::Number(1)),
    ("router_diff", "routers that differ", As::Percent),
    ("max_violation", "busiest expert +", As::Percent),
    ("verifier_errors", "verifier errors", As::Unless0),
    ("long_prompts", "long prompts", As::Unless0),
    ("tok_s", "tokens/s", As::Number(0)),
    ("rollout_s", "rollout s", As::Number(2)),
    ("train_s", "training s", As::Number(2)),
];

/// What an evaluation's line shows.
const EXAMINED: [(&str, &str, As); 6] = [
    ("pass@1", "pass@1", As::Percent),
    ("thought", "thought", As::Number(1)),
    ("no_answer", "without answer", As::Percent),
    ("loss", "loss", As::Number(4)),
    ("divergence", "divergence", As::Number(4)),
    ("verifier_errors", "verifier errors", As::Unless0),
];

fn figures(values: &Values, shown: &[(&str, &str, As)]) -> String {
    let one = |(name, title, form): &(&str, &str, As)| {
        let value = values.get(name)?;
        Some(match form {
            As::Number(digits) => format!("{title} {value:.digits$}"),
            As::Percent => format!("{title} {}", percent(value)),
            As::Unless0 if value == 0.0 => return None,
            As::Unless0 => format!("{title} {value:.0}"),
        })
    };
    shown.iter().filter_map(one).collect::<Vec<_>>().join(", ")
}

/// Shows a stage: bars on a terminal, plain lines elsewhere, JSON when asked.
pub struct Watcher {
    json: bool,
    screen: Screen,
    /// What the last bar said of the step, kept while something else is shown in its place.
    message: String,
}

impl Watcher {
    pub fn new(json: bool) -> Self {
        Self { json, screen: Screen::new(), message: String::new() }
    }

    pub fn see(&mut self, event: &Event<'_>) {
        if self.json {
            // where no one reads any more the run itself still goes on; bars are for people
            if !matches!(event, Event::Progress { .. }) {
                let _ = json_line(event);
            }
            return;
        }
        match event {
            Event::Progress { what, done, total } => {
                self.screen.bar().set_message(format!("{what} {done}/{total}\n{}", self.message));
            }
            Event::Started(started) => self.started(started),
            Event::Step { metrics, steps, remaining_s } => self.step(metrics, *steps, *remaining_s),
            Event::Evaluation(values) => {
                self.line(&format!("step {}: held-out {}", values.step, figures(values, &EXAMINED)));
                let levels = by_level(values);
                if !levels.is_empty() {
                    self.line(&format!("  pass@1 by kind and level: {levels}"));
                }
            }
            Event::Sample(sample) => self.line(&shown(sample)),
            Event::Checkpoint { step, path } => {
                self.line(&format!("step {step}: checkpoint {}", path.display()));
            }
            Event::Warning { text } => self.line(&format!("warning: {text}")),
        }
    }

    fn started(&mut self, started: &Started) {
        self.end();
        self.line(&format!(
            "{} {}: {} parameters ({} active), {} steps; {} threads, {}; run in {}",
            started.kind,
            started.name,
            count(started.parameters as f64),
            count(started.active_parameters as f64),
            started.steps,
            started.threads,
            started.level,
            started.folder.display()
        ));
        self.line(&format!("all settings: {}", started.folder.join("recipe.toml").display()));
        for (name, value) in &started.facts {
            self.line(&format!("{name}: {value}"));
        }
        if started.step > 0 {
            self.line(&format!("continuing after step {}", started.step));
        }
        self.screen.draw(started.steps, "{wide_bar} {pos}/{len} {msg}");
        self.screen.bar().set_position(started.step);
    }

    fn step(&mut self, metrics: &Values, steps: u64, remaining_s: f64) {
        let figures = figures(metrics, &SHOWN);
        let left = duration(remaining_s);
        if self.screen.is_terminal() {
            self.screen.bar().set_position(metrics.step);
            self.message = figures;
            self.screen.bar().set_message(format!("{left} left\n{}", self.message));
        } else {
            let at = metrics.step;
            self.screen.line_when_due(at == steps, || format!("step {at}/{steps}: {figures}, {left} left"));
        }
    }

    fn line(&self, line: &str) {
        self.screen.line(line);
    }

    pub fn end(&mut self) {
        self.screen.end();
    }
}

/// `addition 95 80 40, chain 100 90`: percent right, level by level.
fn by_level(values: &Values) -> String {
    let mut kinds: Vec<(&str, Vec<(u32, f64)>)> = Vec::new();
    for (name, &value) in &values.values {
        let Some((kind, level)) = name.strip_prefix("pass@1/").and_then(|name| name.rsplit_once(':')) else {
            continue;
        };
        let Ok(level) = level.parse() else { continue };
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, levels)) => levels.push((level, value)),
            None => kinds.push((kind, vec![(level, value)])),
        }
    }
    let one = |(kind, mut levels): (&str, Vec<(u32, f64)>)| {
        levels.sort_by_key(|(level, _)| *level);
        let levels: Vec<String> = levels.iter().map(|(_, value)| format!("{:.0}", 100.0 * value)).collect();
        format!("{kind} {}", levels.join(" "))
    };
    kinds.into_iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A sample for a person: the question, what was thought, what was answered, what it was worth.
fn shown(sample: &Sample) -> String {
    let verdict = if sample.verdict.is_empty() { String::new() } else { format!("  [{}]", sample.verdict) };
    let text = output::printable(sample.text.trim()).replace('\n', "\n      ");
    format!("step {} | {}\n      {text}{verdict}", sample.step, output::printable(&sample.prompt))
}

/// Runs `minke bench grpo`.
pub fn bench(args: &BenchGrpo) -> Result<(), Failure> {
    let options = bench::Options {
        recipe: args.recipe.recipe.clone(),
        overrides: args.recipe.set.clone(),
        prompts: args.prompts as usize,
        group: args.group as usize,
        prompt_tokens: args.prompt_tokens as usize,
        new_tokens: args.new_tokens as usize,
        steps: args.steps as usize,
        threads: threads(args.threads),
    };
    let mut bar = Bar::new("steps", args.json);
    let figures = bench::run(&options, &mut |done, steps| bar.set(done, steps, String::new))?;
    drop(bar);
    if args.json { output::json(&figures) } else { output::text(&bench_text(args, &figures)) }
}

fn bench_text(args: &BenchGrpo, figures: &Figures) -> String {
    let size = format!(
        "{} prompts x {} answers, {} + {} tokens",
        args.prompts, args.group, args.prompt_tokens, args.new_tokens
    );
    let exact = match figures.bits_differ {
        0 => "every log-probability is the sampler's, to the bit".to_owned(),
        n => format!("{n} log-probabilities differ"),
    };
    let mut text = output::table(&[
        ("machine", format!("{} threads, {}", figures.threads, figures.level)),
        ("step", format!("{:.3} s, median of {}: {size}", figures.step_s, figures.steps)),
        ("rollout", format!("{:.3} s, {:.0} tokens/s", figures.rollout_s, figures.rollout_tok_s)),
        ("training", format!("{:.3} s, {:.0} tokens/s", figures.train_s, figures.train_tok_s)),
        ("trainer", exact),
        ("peak memory", figures.peak_rss_bytes.map_or("unknown".to_owned(), |n| output::bytes(n as f64))),
    ]);
    for (part, profile) in [("rollout", &figures.rollout_profile), ("training", &figures.train_profile)] {
        text.push_str(&format!("\n{:35} ms\n", format!("where {part} goes")));
        for (name, ms) in profile {
            text.push_str(&format!("  {name:30} {ms:8.2}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_was_measured() {
        let mut values = Values::default();
        for (name, value) in [("reward", 0.5), ("right", 0.25), ("kl_rollout", 0.0), ("verifier_errors", 0.0)]
        {
            values.put(name, value);
        }
        insta::assert_snapshot!(figures(&values, &SHOWN), @"reward 0.500, right 25.0 %, KL(rollout||trainer) 0.0");
        values.put("verifier_errors", 2.0);
        for (name, value) in [("sort:2", 0.5), ("sort:10", 0.25), ("chain:1", 1.0), ("sort", 0.4)] {
            values.put(format!("pass@1/{name}"), value);
        }
        assert_eq!(by_level(&values), "chain 100, sort 50 25");
        assert!(figures(&values, &SHOWN).ends_with("verifier errors 2"));
    }
}
