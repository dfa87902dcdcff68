//! A model that is asked tasks: what recipes say about it, and how it is opened.

use std::path::{Path, PathBuf};

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::template::{ChatTemplate, Thinking};
use minke_infer::load_model;
use minke_model::Model;
use minke_model::{Precision, Purpose};
use minke_train::recipe::{self, Document, RecipeError, Section, located};
use serde::Serialize;

use crate::error::{PostError, Result};
use crate::eval::{Form, Prompter};
use crate::grpo::{FormName, model_path, precision};

/// How its turn begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ThinkingName {
    /// As the template has it.
    Default,
    /// With an open thought.
    Open,
    /// With an empty thought.
    Empty,
}

/// Refuses a precision, named by its key, in which what is computed for a token depends on what else is in the call:
/// answers would depend on what is answered beside them, and no log-probability could be found again.
///
/// # Errors
/// It is FP8 with one scale per tensor.
pub(crate) fn refuse_coupled(key: &str, precision: Option<Precision>) -> Result<()> {
    if precision.is_some_and(|precision| precision.coded.couples_rows()) {
        let reason = "scaling = \"tensor\" gives all tokens of a call one scale, so that they depend on each other: \
                      expected \"block\" where answers are written or judged";
        return Err(PostError::unsuitable(key, reason));
    }
    Ok(())
}

/// `[model]`, `precision`, and the keys `form` and `thinking`.
#[derive(Debug, Clone, PartialEq)]
pub struct Asking {
    /// The model's folder, a run, or a hub id.
    pub model: String,
    /// A template by its name or file instead of the model's own.
    pub template: Option<String>,
    /// What products run in; what the tensors are stored in when not given.
    pub precision: Option<recipe::Precision>,
    /// How tasks are put; by the template where there is one when not given.
    pub form: Option<FormName>,
    /// How its turn begins.
    pub thinking: ThinkingName,
}

/// A model ready to be asked.
pub struct Asked {
    /// The weights in the engine.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its template, if there is one.
    pub template: Option<ChatTemplate>,
    /// The tokens that end an answer.
    pub stop_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Asking {
    /// Reads `[model]` and `precision` from the root, `form` and `thinking` from a section.
    ///
    /// # Errors
    /// Unknown keys and words, and no `model.path`.
    pub fn read(document: &Document, root: &mut Section, section: &mut Section) -> Result<Self> {
        let mut model = root.section("model")?;
        let Some(path) = model_path(&mut model, "path")? else {
            return Err(model.missing("path", "a model folder, a run, or a hub id").into());
        };
        let template = template_place(&mut model)?;
        model.finish()?;
        let precision = precision(document, root)?;
        let forms = [("chat", FormName::Chat), ("plain", FormName::Plain), ("worked", FormName::Worked)];
        let ways = [
            ("default", ThinkingName::Default),
            ("open", ThinkingName::Open),
            ("empty", ThinkingName::Empty),
        ];
        Ok(Self {
            model: path,
            template,
            precision,
            form: section.choice("form", &forms)?,
            thinking: section.choice("thinking", &ways)?.unwrap_or(ThinkingName::Default),
        })
    }

    /// Opens the model.
    ///
    /// # Errors
    /// It cannot be loaded, has no tokenizer, or the template cannot be used; a precision that couples answers.
    pub fn open(&self, cpu: &Cpu) -> Result<Asked> {
        let template = self.named_template()?;
        let precision = self.precision.map(Precision::from);
        refuse_coupled("precision", precision)?;
        let loaded = load_model(&self.model, precision, Purpose::Run(cpu))?;
        let template = match template {
            Some(template) => Some(template),
            None => loaded.template()?,
        };
        let (stop_ids, bos) = (loaded.stop_ids(), loaded.bos());
        let Some(tokenizer) = loaded.tokenizer else {
            let place = loaded.folder.display().to_string();
            return Err(PostError::unsuitable(place, "the model has no tokenizer"));
        };
        Ok(Asked { model: loaded.model, tokenizer, template, stop_ids, bos, notes: loaded.notes })
    }

    fn named_template(&self) -> Result<Option<ChatTemplate>> {
        let Some(name) = &self.template else { return Ok(None) };
        let path = PathBuf::from(name);
        if !ChatTemplate::builtin_names().contains(&&name[..]) && path.is_file() {
            let source = std::fs::read_to_string(&path).map_err(PostError::io("read", &path))?;
            return Ok(Some(ChatTemplate::new(name, &source)?));
        }
        // of an unknown name it says which there are
        Ok(Some(ChatTemplate::named(name)?))
    }

    /// How tasks are put to an opened model, beginning in this way.
    ///
    /// # Errors
    /// A chat is asked for, and there is no template.
    pub fn prompter(&self, asked: &Asked, thinking: ThinkingName) -> Result<Prompter> {
        let think = match thinking {
            ThinkingName::Default => Thinking::Default,
            ThinkingName::Open => Thinking::Open,
            ThinkingName::Empty => Thinking::Empty,
        };
        let form = match (self.form, asked.template.clone()) {
            (Some(FormName::Plain), _) | (None, None) => Form::Plain,
            (Some(FormName::Worked), _) => Form::Worked { think: thinking != ThinkingName::Empty },
            (Some(FormName::Chat) | None, Some(template)) => Form::Chat { template, thinking: think },
            (Some(FormName::Chat), None) => {
                let reason = "the model has no chat template; name one with model.template";
                return Err(PostError::unsuitable("form", reason));
            }
        };
        Prompter::new(form, asked.bos, &asked.tokenizer)
    }
}

/// `template`: the name of a built-in one, or a path.
pub(crate) fn template_place(s: &mut Section) -> Result<Option<String>, RecipeError> {
    Ok(s.text("template")?.map(|name| {
        if ChatTemplate::builtin_names().contains(&&name[..]) {
            name
        } else {
            located(name, s.folder("template"))
        }
    }))
}

/// The name of a suite, with those of its files located that are there.
pub(crate) fn suite_place(s: &mut Section, key: &'static str) -> Result<Option<String>, RecipeError> {
    let Some(suite) = s.text(key)? else { return Ok(None) };
    let there = |name: &str| {
        let there = located(name.trim().to_owned(), s.folder(key));
        Path::new(&there).is_file().then_some(there)
    };
    // a name may have commas in it
    Ok(Some(there(&suite).unwrap_or_else(|| {
        let parts = suite.split(',').map(|part| there(part).unwrap_or_else(|| part.trim().to_owned()));
        parts.collect::<Vec<_>>().join(",")
    })))
}

#[cfg(test)]
mod tests {
    use minke_model::{DType, Fp8};

    use super::*;

    #[test]
    fn answers_that_depend_on_each_other_are_refused() {
        let fp8 = |per_tensor| Some(Precision::fp8(Fp8 { per_tensor, power_of_two: false }));
        for fine in [None, Some(Precision::uniform(DType::Bf16)), fp8(false)] {
            refuse_coupled("precision", fine).unwrap();
        }
        let text = refuse_coupled("teacher.precision", fp8(true)).unwrap_err().to_string();
        assert!(text.contains("teacher.precision") && text.contains("\"block\""), "{text}");
    }
}
