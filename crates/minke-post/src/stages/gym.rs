//! Worked problems as files.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use minke_gym::{Split, Suite};
use minke_train::pretrain::Options;
use minke_train::recipe::{self, Document, Run};

use super::split;
use crate::error::{PostError, Result};
use crate::events::Event;
use crate::worked::{self, Format, Mix, Settings, Written};

/// A recipe of files of problems.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Name, seed and folder.
    pub run: Run,
    /// The files by name.
    pub files: Vec<(String, Settings)>,
}

/// What was written: the files by path, or `None` when it was stopped.
pub type Outcome = Option<Vec<(PathBuf, Written)>>;

impl Recipe {
    /// Reads a parsed recipe.
    ///
    /// # Errors
    /// Unknown keys, wrong types and values out of bounds, each with its place.
    pub fn read(document: &Document) -> Result<Self> {
        let mut root = document.root();
        let mut section = root.section("run")?;
        let run = recipe::run(&mut section, document)?;
        section.finish()?;
        let files = root.sections("file")?;
        root.finish()?;
        let mut read: Vec<(String, Settings)> = Vec::new();
        for mut file in files {
            let name = file.text("name")?.unwrap_or_else(|| "worked.jsonl".to_owned());
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if name.starts_with('.') || !name.chars().all(plain) || name.len() > 128 {
                return Err(file.conflict("name", &format!("{name:?}"), "the plain name of a file").into());
            }
            if read.iter().any(|(other, _)| *other == name) {
                return Err(file.conflict("name", &format!("{name:?}"), "another name for each file").into());
            }
            let Some(text) = file.text("suite")? else {
                return Err(file.missing("suite", "families and levels, such as \"core:1-3\"").into());
            };
            let suite = Suite::parse(&text)
                .map_err(|error| PostError::unsuitable(format!("{name}: suite"), error.to_string()))?;
            if suite.families().next().is_none() {
                let reason = "there are no families in it, and only these can be worked";
                return Err(PostError::unsuitable(format!("{name}: suite"), reason));
            }
            let Some(count) = file.integer("count", 1, 1_000_000_000)? else {
                return Err(file.missing("count", "the number of lines").into());
            };
            let care = file.text("care")?.unwrap_or_else(|| "full".to_owned());
            let mix =
                Mix::parse(&care).map_err(|reason| PostError::unsuitable(format!("{name}: care"), reason))?;
            let formats = [("text", Format::Text), ("chat", Format::Chat), ("task", Format::Task)];
            let settings = Settings {
                suite,
                count,
                mix,
                split: split(&mut file, Split::Train)?,
                seed: file.integer("seed", 0, i64::MAX as u64)?.unwrap_or(run.seed),
                format: file.choice("format", &formats)?.unwrap_or(Format::Text),
            };
            file.finish()?;
            read.push((name, settings));
        }
        if read.is_empty() {
            return Err(PostError::unsuitable("file", "there is no [[file]] to write"));
        }
        Ok(Self { run, files: read })
    }
}

/// Writes the files. Each is there only when it is whole, and the same recipe writes the same, so there is nothing to
/// resume.
///
/// # Errors
/// The recipe is wrong, or a file cannot be written.
pub fn run(options: &Options, stop: &AtomicBool, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let recipe = Recipe::read(&options.document()?)?;
    let mut files = Vec::new();
    for (name, settings) in &recipe.files {
        let path = Path::new(&recipe.run.out).join(name);
        let written = worked::write(settings, &path, &mut |done, total| {
            on_event(Event::Progress { what: name, done, total });
            if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let Some(written) = written else { return Ok(None) };
        files.push((path, written));
    }
    Ok(Some(files))
}
