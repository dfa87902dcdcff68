//! `minke pretrain` and `minke bench train`: the terminal's side of training.

use minke_train::bench::{self, Figures};
use minke_train::events::{Event, Started};
use minke_train::metrics::Step;
use minke_train::pretrain::{self, Outcome};
use serde::Serialize;

use super::progress::Bar;
use super::screen::Screen;
use super::threads;
use crate::cli::{BenchTrain, Train};
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output::{self, bytes, count, percent};

/// Runs `minke pretrain`.
pub fn pretrain(args: &Train) -> Result<(), Failure> {
    interrupt::install();
    let work = Work::begin();
    let mut watcher = Watcher::new(args.json);
    let outcome = pretrain::run(&options(args), &work.flag(), &mut |event| watcher.see(&event));
    watcher.end();
    let outcome = outcome?;
    if args.json {
        end_json(&outcome)?;
    } else {
        output::text(&end_text(&outcome))?;
    }
    if outcome.finished.is_some() { Ok(()) } else { Err(Failure::interrupted()) }
}

/// What every kind of training is told.
pub fn options(args: &Train) -> pretrain::Options {
    pretrain::Options {
        recipe: args.recipe.recipe.clone(),
        overrides: args.recipe.set.clone(),
        out: args.out.clone(),
        resume: args.resume,
        threads: threads(args.threads),
        force: args.force,
        cache: None,
    }
}

fn end_text(outcome: &Outcome) -> String {
    let Some(finished) = &outcome.finished else {
        let state = outcome.checkpoint.as_ref().map_or("nothing to keep yet".to_owned(), |path| {
            format!("checkpoint {}; --resume continues", path.display())
        });
        return format!("stopped after step {} of {}: {state}\n", outcome.step, outcome.steps);
    };
    let mut rows = vec![
        ("model", finished.model.display().to_string()),
        ("report", finished.report.display().to_string()),
    ];
    if let Some(bits) = finished.bits_per_byte {
        let beside =
            finished.zstd_bits_per_byte.map(|zstd| format!(" (zstd: {zstd:.3})")).unwrap_or_default();
        rows.push(("held-out text", format!("{bits:.3} bits per byte{beside}")));
    }
    rows.push(("next", format!("minke chat {}", outcome.folder.display())));
    output::table(&rows)
}

fn end_json(outcome: &Outcome) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct End<'a> {
        event: &'static str,
        folder: &'a std::path::Path,
        step: u64,
        steps: u64,
        checkpoint: Option<&'a std::path::Path>,
        model: Option<&'a std::path::Path>,
        report: Option<&'a std::path::Path>,
        bits_per_byte: Option<f64>,
        zstd_bits_per_byte: Option<f64>,
    }
    let finished = outcome.finished.as_ref();
    json_line(&End {
        event: if finished.is_some() { "finished" } else { "stopped" },
        folder: &outcome.folder,
        step: outcome.step,
        steps: outcome.steps,
        checkpoint: outcome.checkpoint.as_deref(),
        model: finished.map(|finished| finished.model.as_path()),
        report: finished.map(|finished| finished.report.as_path()),
        bits_per_byte: finished.and_then(|finished| finished.bits_per_byte),
        zstd_bits_per_byte: finished.and_then(|finished| finished.zstd_bits_per_byte),
    })
}

/// Prints an object on one line of standard output.
pub fn json_line(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|error| Failure::other(error.to_string()))?;
    output::text(&format!("{text}\n"))
}

/// Shows a run: a bar on a terminal, plain lines elsewhere, JSON when asked.
pub struct Watcher {
    json: bool,
    screen: Screen,
    /// The stage of the data that the bar stands for.
    stage: Option<&'static str>,
}

impl Watcher {
    pub fn new(json: bool) -> Self {
        Self { json, screen: Screen::new(), stage: None }
    }

    pub fn see(&mut self, event: &Event<'_>) {
        if self.json {
            // where no one reads any more the run itself still goes on
            let _ = json_line(event);
            return;
        }
        match event {
            Event::Data { stage, done_bytes, total_bytes } => self.data(stage, *done_bytes, *total_bytes),
            Event::DataReady { stats, reused, vocabulary } => {
                self.end();
                let from = if *reused { "prepared earlier" } else { "prepared now" };
                let mut line = format!(
                    "data: {} in {} documents, {from}; vocabulary of {vocabulary}",
                    bytes(stats.bytes as f64),
                    stats.documents
                );
                let left_out = [
                    (stats.duplicates, "duplicates"),
                    (stats.binary, "not text"),
                    (stats.skipped_large, "too large"),
                    (stats.empty, "empty"),
                    (stats.invalid_utf8, "with invalid UTF-8 replaced"),
                ];
                for (number, what) in left_out.into_iter().filter(|(number, _)| *number > 0) {
                    line.push_str(&format!(", {number} {what}"));
                }
                self.line(&line);
            }
            Event::Started(started) => self.started(started),
            Event::Step { metrics, steps, remaining_s } => self.step(metrics, *steps, *remaining_s),
            Event::Evaluation(evaluation) => self.line(&format!(
                "step {}: held-out text {:.3} bits per byte, loss {:.3}",
                evaluation.step, evaluation.bits_per_byte, evaluation.loss
            )),
            Event::Sample(sample) => {
                let text = format!("{}{}", sample.prompt, sample.text);
                self.line(&format!("step {} writes: {}", sample.step, output::printable(&text)));
            }
            Event::Checkpoint { step, path } => {
                self.line(&format!("step {step}: checkpoint {}", path.display()));
            }
            Event::Warning { text } => self.line(&format!("warning: {text}")),
        }
    }

    fn data(&mut self, stage: &'static str, done_bytes: u64, total_bytes: u64) {
        if self.stage != Some(stage) {
            self.stage = Some(stage);
            let what = match stage {
                "scan" => "reading sources",
                "train_tokenizer" => "training the tokenizer",
                _ => "tokenising",
            };
            self.screen.draw(total_bytes, "{msg:24} {wide_bar} {bytes}/{total_bytes}");
            self.screen.bar().set_message(what);
            if !self.screen.is_terminal() {
                self.line(&format!("{what}: up to {}", bytes(total_bytes as f64)));
            }
        }
        self.screen.bar().set_length(total_bytes);
        self.screen.bar().set_position(done_bytes);
    }

    fn started(&mut self, started: &Started) {
        self.end();
        self.line(&format!(
            "{}: {} parameters ({} active), {} steps of {} tokens, {} to learn from, {} held out",
            started.name,
            count(started.parameters as f64),
            count(started.active_parameters as f64),
            started.steps,
            started.tokens_per_step,
            count(started.train_tokens as f64),
            count(started.held_out_tokens as f64),
        ));
        if started.padding_share > 0.0 {
            let share = percent(started.padding_share);
            self.line(&format!("whole documents leave {share} of the positions empty"));
        }
        self.line(&format!(
            "machine: {} threads, {}, matrix products at {:.0} GFLOP/s; run in {}",
            started.threads,
            started.level,
            started.gemm_peak_gflops,
            started.folder.display()
        ));
        self.line(&format!("all settings: {}", started.folder.join("recipe.toml").display()));
        if started.step > 0 {
            self.line(&format!("continuing after step {}", started.step));
        }
        self.screen.draw(started.steps, "{wide_bar} {pos}/{len} {msg}");
        self.screen.bar().set_position(started.step);
    }

    fn step(&mut self, metrics: &Step, steps: u64, remaining_s: f64) {
        let share =
            metrics.gemm_share.map(|share| format!(", {} of peak", percent(share))).unwrap_or_default();
        let figures = format!(
            "loss {:.3}, {:.0} tokens/s{share}, {} left",
            metrics.loss,
            metrics.tok_s,
            duration(remaining_s)
        );
        if self.screen.is_terminal() {
            self.screen.bar().set_position(metrics.step);
            self.screen.bar().set_message(figures);
        } else {
            let at = metrics.step;
            self.screen.line_when_due(at == steps, || format!("step {at}/{steps}: {figures}"));
        }
    }

    fn line(&self, line: &str) {
        self.screen.line(line);
    }

    pub fn end(&mut self) {
        self.screen.end();
    }
}

/// Seconds as a person says them.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "?".to_owned();
    }
    let seconds = seconds.max(0.0).round() as u64;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds} s"),
        (0, _) => format!("{minutes} min {:02} s", seconds % 60),
        _ => format!("{hours} h {minutes:02} min"),
    }
}

/// Runs `minke bench train`.
pub fn bench(args: &BenchTrain) -> Result<(), Failure> {
    let options = bench::Options {
        recipe: args.recipe.recipe.clone(),
        overrides: args.recipe.set.clone(),
        steps: args.steps as usize,
        threads: threads(args.threads),
        force: args.force,
    };
    let mut bar = Bar::new("steps", args.json);
    let figures = bench::run(&options, &mut |done, steps| bar.set(done, steps, String::new))?;
    drop(bar);
    if args.json { output::json(&figures) } else { output::text(&bench_text(&figures)) }
}

fn bench_text(figures: &Figures) -> String {
    let step = format!(
        "{:.1} ms (best {:.1}, first {:.1}), {} tokens, median of {}",
        figures.step_ms, figures.best_step_ms, figures.first_step_ms, figures.tokens_per_step, figures.steps
    );
    let rate = format!(
        "{:.1} GFLOP/s, {} of the machine's {:.0} ({})",
        figures.gflops,
        percent(figures.gemm_share),
        figures.gemm_peak_gflops,
        figures.precision
    );
    let size =
        format!("{} ({} active)", count(figures.parameters as f64), count(figures.active_parameters as f64));
    let mut text = output::table(&[
        ("machine", format!("{} threads, {}", figures.threads, figures.level)),
        ("parameters", size),
        ("step", step),
        ("speed", format!("{:.0} tokens/s with {}", figures.tok_s, figures.optimizer)),
        ("arithmetic", rate),
        ("FLOPs per token", count(figures.flops_per_token as f64)),
        ("peak memory", figures.peak_rss_bytes.map_or("unknown".to_owned(), |n| bytes(n as f64))),
        ("loss", format!("{:.4}", figures.loss)),
    ]);
    text.push_str("\nwhere a step goes                      ms    share   calls\n");
    for part in &figures.profile {
        text.push_str(&format!(
            "  {:30} {:8.2} {:>8} {:7.0}\n",
            part.operation,
            part.ms,
            percent(part.share),
            part.calls
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let said: Vec<String> = [0.4, 59.0, 61.0, 3599.6, 7325.0, f64::NAN].map(duration).into();
        assert_eq!(said, ["0 s", "59 s", "1 min 01 s", "1 h 00 min", "2 h 02 min", "?"]);
    }
}
