//! A model where it lies: a folder or a GGUF file, which say the same in their own words.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use minke_cpu::stored::Stored;
use minke_data::gguf::{self, GgufFile, is_gguf};
use minke_data::hf::resolve_model;
use minke_data::{ChatTemplate, Tokenizer};
use minke_model::config::Config;
use minke_model::{DType, Made, WeightSource};

use crate::gguf::{Arch, GgufWeights, Layout, config_json};
use crate::load::{GenerationDefaults, LoadModelError, WeightFolder, generation_defaults, read_config};

/// A model that was found, and what it says of itself; its weights are looked at when they are asked for.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// The folder or the file.
    pub path: PathBuf,
    /// What the model is.
    pub config: Config,
    form: Form,
}

#[derive(Debug, Clone)]
enum Form {
    Folder,
    Gguf { file: Arc<GgufFile>, arch: Arch },
}

impl ModelFiles {
    /// Finds the model that an argument means: a folder, a run, a `.gguf` file, or a hub id in the local cache.
    ///
    /// # Errors
    /// As [`resolve_model`] and [`ModelFiles::open`].
    pub fn find(argument: &str) -> Result<Self, LoadModelError> {
        Self::open(&resolve_model(argument)?)
    }

    /// Opens a folder with a `config.json`, or a `.gguf` file.
    ///
    /// # Errors
    /// Its config, or the file that holds it, is missing or broken.
    pub fn open(path: &Path) -> Result<Self, LoadModelError> {
        if !is_gguf_file(path) {
            return Ok(Self { path: path.to_owned(), config: read_config(path)?, form: Form::Folder });
        }
        let file = Arc::new(GgufFile::open(path)?);
        let (json, arch) = config_json(&file)?;
        let config = Config::from_json(&json)
            .map_err(|source| LoadModelError::Config { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), config, form: Form::Gguf { file, arch } })
    }

    /// The file, if it is one.
    pub fn gguf(&self) -> Option<&Arc<GgufFile>> {
        match &self.form {
            Form::Folder => None,
            Form::Gguf { file, .. } => Some(file),
        }
    }

    /// The tokenizer, if there is one.
    ///
    /// # Errors
    /// There is one, and it is broken or of a kind that is not known.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, LoadModelError> {
        match &self.form {
            Form::Folder => {
                let file = self.path.join("tokenizer.json");
                Ok(if file.is_file() { Some(Tokenizer::load(&file)?) } else { None })
            }
            Form::Gguf { file, .. } => Ok(Tokenizer::from_gguf(file)?),
        }
    }

    /// What lies there instead of a tokenizer that is read, and what to do.
    pub(crate) fn unread_tokenizer(&self) -> Option<&'static str> {
        match &self.form {
            Form::Folder => unread_tokenizer(&self.path),
            Form::Gguf { .. } => None,
        }
    }

    /// The chat template, if there is one; a base model has none.
    ///
    /// # Errors
    /// There is one, and it is broken.
    pub fn template(&self) -> Result<Option<ChatTemplate>, LoadModelError> {
        match &self.form {
            Form::Folder => Ok(ChatTemplate::load(&self.path)?),
            Form::Gguf { file, .. } => Ok(gguf::tokenizer::template(file)?),
        }
    }

    /// What is suggested for generation.
    ///
    /// # Errors
    /// A suggestion of another type than it should have.
    pub fn generation(&self) -> Result<GenerationDefaults, LoadModelError> {
        match &self.form {
            Form::Folder => generation_defaults(&self.path),
            Form::Gguf { file, .. } => Ok(suggested(file)?),
        }
    }

    /// The weights as a folder has them.
    ///
    /// # Errors
    /// As [`WeightFolder::open`].
    pub fn weights(&self) -> Result<Weights, LoadModelError> {
        self.laid_out(&self.config, Layout::Folder)
    }

    /// The config and the weights of a model that only runs: in the order of the file's rows, so that nothing is copied.
    ///
    /// # Errors
    /// As [`WeightFolder::open`].
    pub fn to_run(&self) -> Result<(Config, Weights), LoadModelError> {
        let mut config = self.config.clone();
        if matches!(self.form, Form::Gguf { arch, .. } if arch.permutes()) {
            config.rope.interleaved = true;
        }
        let weights = self.laid_out(&config, Layout::File)?;
        Ok((config, weights))
    }

    fn laid_out(&self, config: &Config, layout: Layout) -> Result<Weights, LoadModelError> {
        Ok(match &self.form {
            Form::Folder => Weights::Folder(WeightFolder::open(&self.path, config)?),
            Form::Gguf { file, arch } => Weights::Gguf(GgufWeights::new(file.clone(), config, *arch, layout)),
        })
    }
}

/// The chat template of a model at a path.
pub(crate) fn template(path: &Path) -> Result<Option<ChatTemplate>, LoadModelError> {
    Ok(if is_gguf_file(path) {
        gguf::tokenizer::template(&GgufFile::open(path)?)?
    } else {
        ChatTemplate::load(path)?
    })
}

fn is_gguf_file(path: &Path) -> bool {
    is_gguf(path) && !path.is_dir()
}

/// Sampling as a file suggests it (`general.sampling.*`).
fn suggested(file: &GgufFile) -> minke_data::Result<GenerationDefaults> {
    let number = |name: &str, most: f64| -> minke_data::Result<Option<f64>> {
        let key = format!("general.sampling.{name}");
        match file.float(&key)? {
            Some(x) if !(0.0..=most).contains(&x) => {
                Err(file.wrong(format!("key `{key}`"), format!("a number from 0 to {most}"), x.to_string()))
            }
            found => Ok(found),
        }
    };
    Ok(GenerationDefaults {
        temperature: number("temp", 100.0)?.map(|x| x as f32),
        top_k: number("top_k", 16_777_216.0)?.map(|x| x as usize),
        top_p: number("top_p", 1.0)?.filter(|x| *x > 0.0).map(|x| x as f32),
        min_p: number("min_p", 1.0)?.map(|x| x as f32),
        typical_p: None,
        repetition_penalty: number("penalty_repeat", 100.0)?.filter(|x| *x > 0.0).map(|x| x as f32),
        eos: Vec::new(),
    })
}

/// The weights of a folder or of a file.
#[derive(Debug)]
pub enum Weights {
    /// Of a folder.
    Folder(WeightFolder),
    /// Of a file.
    Gguf(GgufWeights),
}

impl Weights {
    /// The folder's, if it is one.
    pub fn folder(&self) -> Option<&WeightFolder> {
        match self {
            Self::Folder(weights) => Some(weights),
            Self::Gguf(_) => None,
        }
    }

    /// The file's, if it is one.
    pub fn gguf(&self) -> Option<&GgufWeights> {
        match self {
            Self::Folder(_) => None,
            Self::Gguf(weights) => Some(weights),
        }
    }

    fn source(&self) -> &dyn WeightSource {
        match self {
            Self::Folder(weights) => weights,
            Self::Gguf(weights) => weights,
        }
    }
}

/// Of a folder without `tokenizer.json`, what lies there instead and what to do.
pub(crate) fn unread_tokenizer(folder: &Path) -> Option<&'static str> {
    let other = [
        (
            "tiktoken.model",
            "tiktoken.model lies there, which is not read; a GGUF file of the model has its tokenizer in a form that is",
        ),
        (
            "tokenizer.model",
            "tokenizer.model lies there, which is not read; transformers writes it as tokenizer.json \
             (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))",
        ),
    ];
    let lies = |name: &str| folder.join(name).is_file();
    let found = other.into_iter().find(|(name, _)| lies(name)).filter(|_| !lies("tokenizer.json"));
    found.map(|(_, what)| what)
}

impl WeightSource for Weights {
    fn names(&self) -> Vec<String> {
        self.source().names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source().shape(name)
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        self.source().dtype(name)
    }

    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String> {
        self.source().read_into(name, out)
    }

    fn is_coded(&self, name: &str) -> bool {
        self.source().is_coded(name)
    }

    fn stored(&self, name: &str) -> Option<Stored> {
        self.source().stored(name)
    }

    fn made(&self, name: &str) -> Option<Made> {
        self.source().made(name)
    }

    fn done(&self, name: &str) {
        self.source().done(name);
    }
}
