//! A model that is asked tasks: what recipes say about it, and how it is opened.

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_data::template::{ChatTemplate, Thinking};
use minke_infer::load_model;
use minke_model::Model;
use minke_model::{Precision, Purpose};
use minke_train::recipe::{self, Document, Section};
use serde::Serialize;

use crate::error::{PostError, Result};
use crate::eval::Prompter;
use crate::recipe::{FormName, form, model_path, precision, refuse_coupled, template, template_place};

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

impl From<ThinkingName> for Thinking {
    fn from(name: ThinkingName) -> Self {
        match name {
            ThinkingName::Default => Self::Default,
            ThinkingName::Open => Self::Open,
            ThinkingName::Empty => Self::Empty,
        }
    }
}

/// `[model]`, `precision`, and the keys `form` and `thinking`.
#[derive(Debug, Clone, PartialEq)]
pub struct Asking {
    /// The model's folder, a run, or a hub id.
    pub model: String,
    /// A template by its name, file or folder instead of the model's own.
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
        let ways = [
            ("default", ThinkingName::Default),
            ("open", ThinkingName::Open),
            ("empty", ThinkingName::Empty),
        ];
        Ok(Self {
            model: path,
            template,
            precision,
            form: section.choice("form", &FormName::CHOICES)?,
            thinking: section.choice("thinking", &ways)?.unwrap_or(ThinkingName::Default),
        })
    }

    /// The template that the recipe names.
    ///
    /// # Errors
    /// There is none of that name, or it is broken.
    pub fn template(&self) -> Result<Option<ChatTemplate>> {
        template("model.template", self.template.as_deref())
    }

    /// Opens the model.
    ///
    /// # Errors
    /// It cannot be loaded, has no tokenizer, or the template cannot be used; a precision that couples answers.
    pub fn open(&self, cpu: &Cpu) -> Result<Asked> {
        let template = self.template()?;
        let precision = self.precision.map(Precision::from);
        refuse_coupled("precision", precision)?;
        let loaded = load_model(&self.model, precision, Purpose::Run(cpu))?;
        let template = match template {
            Some(template) => Some(template),
            None => loaded.template()?,
        };
        let (stop_ids, bos) = (loaded.stop_ids_with(template.as_ref()), loaded.bos());
        let Some(tokenizer) = loaded.tokenizer else {
            let place = loaded.folder.display().to_string();
            return Err(PostError::unsuitable(place, "the model has no tokenizer"));
        };
        Ok(Asked { model: loaded.model, tokenizer, template, stop_ids, bos, notes: loaded.notes })
    }

    /// How tasks are put to an opened model, beginning in this way.
    ///
    /// # Errors
    /// A chat is asked for, and there is no template.
    pub fn prompter(&self, asked: &Asked, thinking: ThinkingName) -> Result<Prompter> {
        let form = form("form", self.form, asked.template.as_ref(), thinking.into())?;
        Prompter::new(form, asked.bos, &asked.tokenizer)
    }
}
