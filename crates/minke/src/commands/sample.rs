//! `minke sample`: the terminal's side of rejection sampling.

use std::sync::atomic::AtomicBool;

use minke_post::events::Event;
use minke_post::sample::{self, Outcome};
use minke_train::pretrain::Options;
use serde_json::json;

use super::post;
use super::progress::Bar;
use super::train::{json_line, options};
use crate::cli::Train;
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output;

/// Runs `minke sample`.
pub fn run(args: &Train) -> Result<(), Failure> {
    interrupt::install();
    let work = Work::begin();
    let outcome = shown(args.json, |on_event| sample::run(&options(args), &work.flag(), on_event))?;
    end(&outcome, args.json)?;
    if outcome.finished.is_some() { Ok(()) } else { Err(Failure::interrupted()) }
}

/// Runs something that tells how far it is rather than taking steps.
pub fn shown<T>(
    json: bool,
    run: impl FnOnce(&mut dyn FnMut(Event<'_>)) -> minke_post::Result<T>,
) -> minke_post::Result<T> {
    let mut watcher = post::Watcher::new(json);
    let mut bar: Option<(String, Bar)> = None;
    let result = run(&mut |event| match &event {
        Event::Progress { what, done, total } => {
            let is_new = bar.as_ref().is_none_or(|(name, _)| name != what);
            if is_new {
                // the old one first, or it would be drawn over the new one
                bar = None;
            }
            let (_, bar) = bar.get_or_insert_with(|| ((*what).to_owned(), Bar::new(what, json)));
            bar.set(*done, *total, String::new);
        }
        // it is told in answers, not in steps
        Event::Started(started) if !json => {
            for (name, value) in &started.facts {
                output::note(&format!("{name}: {value}"));
            }
            if started.step > 0 {
                output::note(&format!("continuing after {} of {} answers", started.step, started.steps));
            }
        }
        other => watcher.see(other),
    });
    watcher.end();
    result
}

fn end(outcome: &Outcome, json: bool) -> Result<(), Failure> {
    let Some(finished) = &outcome.finished else {
        let line = format!("stopped; --resume continues in {}\n", outcome.folder.display());
        return if json {
            json_line(&json!({ "event": "stopped", "folder": outcome.folder }))
        } else {
            output::text(&line)
        };
    };
    if json {
        return json_line(&json!({
            "event": "finished",
            "folder": outcome.folder,
            "answers": finished.answers,
            "report": finished.report,
            "counts": finished.counts,
        }));
    }
    let counts = finished.counts.facts();
    let mut rows: Vec<(&str, String)> =
        counts.iter().map(|(name, value)| (&name[..], value.clone())).collect();
    rows.push(("answers", finished.answers.display().to_string()));
    rows.push(("report", finished.report.display().to_string()));
    output::text(&output::table(&rows))
}

/// What `minke sample` runs, for pipelines.
pub fn stage(json: bool, options: &Options, stop: &AtomicBool) -> minke_post::Result<Outcome> {
    shown(json, |on_event| sample::run(options, stop, on_event))
}
