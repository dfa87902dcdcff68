//! A file of a model: its keys, its tokenizer, its tensors one after the other.

use std::ops::ControlFlow;
use std::path::Path;

use minke_data::gguf::tokenizer::{self, Endings};
use minke_data::gguf::{GgufWriter, TensorPlan, TensorType, Value};
use minke_data::{ChatTemplate, Tokenizer};
use minke_model::{Config, WeightSource};
use minke_num::blocks::{self, BlockFormat};
use minke_num::{bf16, f16};

use super::export::{OutTensor, gguf_tensors};
use super::metadata::{Metadata, NoPlace, metadata};
use crate::load::{GenerationDefaults, end_ids};

/// Why a file is not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// I/O, or a tokenizer that GGUF has no words for.
    #[error(transparent)]
    Data(#[from] minke_data::Error),
    /// A config that GGUF has no words for.
    #[error(transparent)]
    NoPlace(#[from] NoPlace),
    /// A tensor cannot be read or stored.
    #[error("tensor `{tensor}`: {why}")]
    Tensor {
        /// Its published name.
        tensor: String,
        /// What is wrong.
        why: String,
    },
    /// The caller said so.
    #[error("stopped before the end")]
    Stopped,
}

impl WriteError {
    /// True when the user can mend it by giving another model or path.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Data(error) => error.is_user_error(),
            Self::NoPlace(_) | Self::Tensor { .. } | Self::Stopped => true,
        }
    }
}

/// A model that is to be written.
#[derive(Clone, Copy)]
pub struct ToWrite<'a> {
    /// What it is, in a folder's terms.
    pub config: &'a Config,
    /// Its weights, laid out as in a folder.
    pub source: &'a dyn WeightSource,
    /// Its tokenizer; a file without one is of little use.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Its chat template.
    pub template: Option<&'a ChatTemplate>,
    /// What is suggested for generation (`general.sampling.*`).
    pub generation: &'a GenerationDefaults,
    /// What it is called (`general.name`).
    pub name: Option<&'a str>,
    /// Other keys, such as `general.quantization_version`.
    pub more: &'a [(String, Value<'static>)],
}

/// How far writing is.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Weights written.
    pub done: u64,
    /// Of so many.
    pub total: u64,
    /// Bytes written.
    pub bytes: u64,
}

/// The figures of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// The number that says what most tensors of a file are (`general.file_type`).
fn file_type(kind: TensorType) -> u32 {
    match kind {
        TensorType::F32 => 0,
        TensorType::F16 => 1,
        TensorType::Bf16 => 32,
        TensorType::Blocks(format) => match format {
            BlockFormat::Q4_0 => 2,
            BlockFormat::Q4_1 => 3,
            BlockFormat::Q8_0 => 7,
            BlockFormat::Q5_0 => 8,
            BlockFormat::Q5_1 => 9,
            BlockFormat::Q2K => 10,
            BlockFormat::Q3K => 12,
            BlockFormat::Q4K => 15,
            BlockFormat::Q5K => 17,
            BlockFormat::Q6K => 18,
            BlockFormat::Iq4Nl => 25,
            BlockFormat::Iq4Xs => 30,
        },
    }
}

/// What each tensor of a file is stored in, and how.
pub trait Storage {
    /// `general.file_type`.
    fn file_type(&self) -> u32;
    /// What a tensor is stored in.
    fn kind(&self, tensor: &OutTensor) -> TensorType;
    /// The elements of a piece, stored so.
    ///
    /// # Errors
    /// Numbers that have no place in it.
    fn store(&mut self, tensor: &OutTensor, piece: usize, numbers: &[f32]) -> Result<Vec<u8>, String>;
}

/// All in one kind; vectors and routers are f32, as readers want them.
impl Storage for TensorType {
    fn file_type(&self) -> u32 {
        file_type(*self)
    }

    fn kind(&self, tensor: &OutTensor) -> TensorType {
        tensor.stored_in(*self)
    }

    fn store(&mut self, tensor: &OutTensor, _piece: usize, numbers: &[f32]) -> Result<Vec<u8>, String> {
        elements(self.kind(tensor), numbers, tensor.shape.last().copied().unwrap_or(1))
    }
}

/// Writes a file whose tensors are stored as `storage` says.
///
/// Memory is that of the largest published tensor in f32; `on_step` may end it.
///
/// # Errors
/// A model or tokenizer that GGUF has no words for, numbers that a kind cannot store, I/O, or `on_step` ended it; what was
/// there is then as it was.
pub fn write_gguf(
    path: &Path,
    model: &ToWrite<'_>,
    storage: &mut dyn Storage,
    on_step: &mut dyn FnMut(Step) -> ControlFlow<()>,
) -> Result<Written, WriteError> {
    let (mut keys, notes) = keys(model, storage.file_type())?;
    let tensors = gguf_tensors(model.config)?;
    let plan = |tensor: &OutTensor| TensorPlan {
        name: tensor.name.clone(),
        kind: storage.kind(tensor),
        shape: tensor.shape.clone(),
    };
    let plans: Vec<TensorPlan> = tensors.iter().map(plan).collect();
    if plans.iter().any(|plan| matches!(plan.kind, TensorType::Blocks(_))) {
        keys.push(("general.quantization_version".to_owned(), 2u32.into()));
    }
    keys.extend_from_slice(model.more);
    let mut writer = GgufWriter::create(path, &keys, plans)?;
    let total = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum();
    let (mut done, mut bytes) = (0, 0);
    for tensor in &tensors {
        for piece in 0..tensor.pieces() {
            if on_step(Step { done, total, bytes }).is_break() {
                return Err(WriteError::Stopped);
            }
            let name = tensor.published(piece).unwrap_or(&tensor.name);
            let fail = |why: String| WriteError::Tensor { tensor: name.to_owned(), why };
            let numbers = tensor.read(model.source, piece).map_err(fail)?;
            let stored = storage.store(tensor, piece, &numbers).map_err(fail)?;
            writer.part(&stored)?;
            (done, bytes) = (done + numbers.len() as u64, bytes + stored.len() as u64);
            model.source.done(name);
        }
    }
    if on_step(Step { done, total, bytes }).is_break() {
        return Err(WriteError::Stopped);
    }
    writer.finish()?;
    Ok(Written { tensors: tensors.len(), bytes, notes })
}

/// All keys of a file, and what a user should know.
fn keys(model: &ToWrite<'_>, file_type: u32) -> Result<(Metadata, Vec<String>), WriteError> {
    let config = model.config;
    let (mut keys, mut notes) = metadata(config)?;
    if let Some(name) = model.name {
        keys.push(("general.name".to_owned(), name.into()));
    }
    keys.push(("general.file_type".to_owned(), file_type.into()));
    let GenerationDefaults { temperature, top_k, top_p, min_p, typical_p, repetition_penalty, eos: _ } =
        model.generation;
    if let Some(typical_p) = typical_p {
        notes.push(format!("GGUF has no key for the suggested `typical_p` of {typical_p}: it is left out"));
    }
    let top_k = top_k.and_then(|k| i32::try_from(k).ok());
    let suggestions: [(&str, Option<Value<'static>>); 5] = [
        ("temp", temperature.map(Into::into)),
        ("top_k", top_k.map(Into::into)),
        ("top_p", top_p.map(Into::into)),
        ("min_p", min_p.map(Into::into)),
        ("penalty_repeat", repetition_penalty.map(Into::into)),
    ];
    for (name, suggestion) in suggestions {
        keys.extend(suggestion.map(|suggestion| (format!("general.sampling.{name}"), suggestion)));
    }
    let Some(tokenizer) = model.tokenizer else {
        notes.push("the model has no tokenizer: other programs cannot read text with the file".to_owned());
        keys.push(("tokenizer.ggml.model".to_owned(), "none".into()));
        return Ok((keys, notes));
    };
    let endings = Endings {
        rows: config.vocab_size,
        ends: end_ids(config, model.generation, Some(tokenizer), model.template),
        pad: config.pad_token_id,
    };
    let (more, told) = tokenizer::metadata(tokenizer, model.template, &endings)?;
    keys.extend(more);
    notes.extend(told);
    Ok((keys, notes))
}

/// Numbers as a file stores them, rows of `cols`.
///
/// # Errors
/// Blocks have no place for NaN or infinity.
pub fn elements(kind: TensorType, numbers: &[f32], cols: usize) -> Result<Vec<u8>, String> {
    Ok(match kind {
        TensorType::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        TensorType::F16 => {
            if let Some(large) = numbers.iter().find(|x| x.is_finite() && f16::from_f32(**x).is_infinite()) {
                return Err(format!("expected numbers that f16 has, up to 65504, got {large}"));
            }
            numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
        }
        TensorType::Bf16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        TensorType::Blocks(format) => {
            let row = format.row_bytes(cols).ok_or("rows that blocks do not fill")?;
            let mut stored = vec![0; numbers.len() / cols * row];
            for (x, out) in numbers.chunks_exact(cols).zip(stored.chunks_exact_mut(row)) {
                blocks::encode(format, x, None, out).map_err(|error| error.to_string())?;
            }
            stored
        }
    })
}
