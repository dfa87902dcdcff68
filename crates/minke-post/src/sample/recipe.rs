//! What `sample` reads.
//!
//! ```toml
//! [run] name, seed, out
//! [model] path, template
//! [tasks] suite, per_level
//! [sample] samples, temperature, top_p, max_tokens, concurrency, form, thinking
//! [keep] which, per_task
//! ```

use minke_train::recipe::{self, Document, Run};
use minke_train::resume::is_free_everywhere;
use serde::Serialize;
use toml::Table;

use crate::asking::Asking;
use crate::error::Result;
use crate::recipe::{same_suite, suite_place};

/// Which right answers of a task are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// The shortest ones.
    Shortest,
    /// The first ones.
    First,
    /// All of them.
    All,
}

/// `[keep]`: which answers become lessons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Keep {
    /// In which order they are taken.
    pub which: Which,
    /// At most how many of a task.
    pub per_task: usize,
}

/// `[tasks]`: what is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tasks {
    /// Families, levels and files of tasks.
    pub suite: String,
    /// Tasks of each family and level.
    pub per_level: usize,
}

/// `[sample]`: how it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sampling {
    /// Answers to each task.
    pub samples: usize,
    /// Spread of the choice of tokens.
    pub temperature: f64,
    /// Share of probability that tokens are chosen from.
    pub top_p: f64,
    /// Most tokens of an answer, its thought included.
    pub max_tokens: usize,
    /// Answers that are written at once, at most.
    pub concurrency: usize,
}

/// A recipe of rejection sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Name, seed and folder.
    pub run: Run,
    /// The teacher.
    pub asking: Asking,
    /// What is asked.
    pub tasks: Tasks,
    /// How it is answered.
    pub sampling: Sampling,
    /// Which answers become lessons.
    pub keep: Keep,
}

impl Recipe {
    /// Reads a parsed recipe.
    ///
    /// # Errors
    /// Unknown keys, wrong types and values out of bounds, each with its place.
    pub fn read(document: &Document) -> Result<Self> {
        document.is_for("sample")?;
        let mut root = document.root();
        let mut run = root.section("run")?;
        let mut tasks = root.section("tasks")?;
        let mut sample = root.section("sample")?;
        let mut keep = root.section("keep")?;
        let asking = Asking::read(document, &mut root, &mut sample)?;
        root.finish()?;
        let run_part = recipe::run(&mut run, document)?;
        run.finish()?;
        let Some(suite) = suite_place(&mut tasks, "suite")? else {
            let expected = "what is asked, such as \"core\" or \"addition:1-3,my.jsonl\"";
            return Err(tasks.missing("suite", expected).into());
        };
        let per_level = tasks.integer("per_level", 1, 1 << 20)?.unwrap_or(100) as usize;
        tasks.finish()?;
        let sampling = Sampling {
            samples: sample.integer("samples", 1, 1 << 12)?.unwrap_or(4) as usize,
            temperature: sample.temperature("temperature")?.unwrap_or(1.0),
            top_p: sample.top_p()?.unwrap_or(1.0),
            max_tokens: sample.integer("max_tokens", 1, 1 << 24)?.unwrap_or(512) as usize,
            concurrency: sample.integer("concurrency", 1, 1 << 16)?.unwrap_or(128) as usize,
        };
        sample.finish()?;
        let ways = [("shortest", Which::Shortest), ("first", Which::First), ("all", Which::All)];
        let which = keep.choice("which", &ways)?.unwrap_or(Which::Shortest);
        let most = if which == Which::All { sampling.samples } else { 1 };
        let per_task = keep.integer("per_task", 1, 1 << 12)?.map_or(most, |number| number as usize);
        keep.finish()?;
        let tasks = Tasks { suite, per_level };
        Ok(Self { run: run_part, asking, tasks, sampling, keep: Keep { which, per_task } })
    }

    /// The recipe with everything said, as TOML.
    pub fn to_toml(&self) -> String {
        fn table(value: impl Serialize) -> Table {
            Table::try_from(value).expect("plain data is a table")
        }
        let mut whole = Table::new();
        let Asking { model, template, precision, form, thinking } = &self.asking;
        let mut model_part = Table::new();
        model_part.insert("path".to_owned(), model.clone().into());
        if let Some(template) = template {
            model_part.insert("template".to_owned(), template.clone().into());
        }
        if let Some(precision) = precision {
            whole.insert("precision".to_owned(), table(precision).into());
        }
        let mut sample = table(self.sampling);
        if let Some(form) = form {
            sample.insert("form".to_owned(), toml::Value::try_from(form).expect("a word"));
        }
        sample.insert("thinking".to_owned(), toml::Value::try_from(thinking).expect("a word"));
        for (name, part) in [
            ("run", table(&self.run)),
            ("model", model_part),
            ("tasks", table(&self.tasks)),
            ("sample", sample),
            ("keep", table(self.keep)),
        ] {
            whole.insert(name.to_owned(), part.into());
        }
        whole.to_string()
    }

    /// Keys that may differ when a run is resumed: they change no answer. Whose answers they are, and to which prompts,
    /// is judged by their fingerprints.
    pub fn is_free(key: &str, was: &str, is: &str) -> bool {
        is_free_everywhere(key)
            || key.starts_with("keep.")
            || matches!(key, "model.path" | "model.template" | "sample.concurrency")
            || key == "tasks.suite" && same_suite(was, is)
    }
}
