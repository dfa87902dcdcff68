//! Weights from outside, checked against the table of tensors before a number is read.

use std::collections::HashSet;

use minke_cpu::DType;

use crate::config::Config;
use crate::forward::Model;
use crate::params::{Coded, Precision};
use crate::spec::{self, Role, TensorSpec};

/// Where weights come from; a folder of safetensors files is one.
pub trait WeightSource {
    /// All tensors that there are.
    fn names(&self) -> Vec<String>;
    /// The shape of a tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// What it is stored in; formats other than bf16 count as f32.
    fn dtype(&self, name: &str) -> Option<DType>;
    /// Reads all elements, widened to f32.
    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String>;
}

/// Why weights do not make a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Tensors that the config promises are not there.
    #[error("{count} missing {}, the first: `{first}`", if *.count == 1 { "tensor" } else { "tensors" })]
    Missing {
        /// The first by the table's order.
        first: String,
        /// How many.
        count: usize,
    },
    /// Tensors that the config does not know.
    #[error(
        "{count} {} that the config does not know, the first: `{first}`",
        if *.count == 1 { "tensor" } else { "tensors" }
    )]
    Extra {
        /// The first by name.
        first: String,
        /// How many.
        count: usize,
    },
    /// A tensor has another shape than the config says.
    #[error("tensor `{name}`: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// By the config.
        expected: Vec<usize>,
        /// As stored.
        got: Vec<usize>,
    },
    /// A tensor could not be read.
    #[error("tensor `{name}`: {why}")]
    Read {
        /// The tensor.
        name: String,
        /// What the source said.
        why: String,
    },
}

impl Model {
    /// Builds the model of `config` with weights from `source`; products compute in `precision`, or else in what each
    /// role's tensors are stored in. Also returns notes that a user should see.
    ///
    /// # Errors
    /// As [`check`], and what the source reports.
    pub fn load(
        config: Config,
        precision: Option<Precision>,
        source: &dyn WeightSource,
    ) -> Result<(Self, Vec<String>), LoadError> {
        let Checked { mut config, specs, notes } = check(config, source)?;
        let precision = precision.unwrap_or_else(|| stored_precision(&config, &specs, source));
        // whatever they were read from, they are numbers now
        config.quantization = None;
        let mut model = Self::zero(config, precision);
        for entry in model.params.entries.clone() {
            let out = &mut model.params.data[entry.range];
            source.read_into(&entry.name, out).map_err(|why| LoadError::Read { name: entry.name, why })?;
        }
        Ok((model, notes))
    }
}

/// What a source holds, when it holds what a config asks for.
#[derive(Debug, Clone)]
pub struct Checked {
    /// The config, without MTP modules that it only announced.
    pub config: Config,
    /// The tensors, all of which are there in these shapes.
    pub specs: Vec<TensorSpec>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// Checks that `source` holds the tensors that `config` asks for and no others.
///
/// # Errors
/// Missing or unknown tensors and wrong shapes. MTP modules that the config announces but whose tensors are all
/// absent are left out, with a note.
pub fn check(mut config: Config, source: &dyn WeightSource) -> Result<Checked, LoadError> {
    let mut notes = Vec::new();
    let names: HashSet<String> = source.names().into_iter().collect();
    let modules = config.num_nextn_predict_layers;
    let specs = spec::tensors(&config);
    let aliases = spec::optional_aliases(&config);
    if modules > 0 && !specs.iter().any(|s| s.mtp.is_some() && names.contains(&s.name)) {
        config.num_nextn_predict_layers = 0;
        notes.push(format!(
            "the config announces {modules} MTP {} but the folder has no tensors of {}: loaded without",
            if modules == 1 { "module" } else { "modules" },
            if modules == 1 { "it" } else { "them" },
        ));
    }
    let specs: Vec<TensorSpec> =
        if modules == config.num_nextn_predict_layers { specs } else { spec::tensors(&config) };
    let mut missing = specs.iter().filter(|s| !names.contains(&s.name));
    if let Some(first) = missing.next() {
        return Err(LoadError::Missing { first: first.name.clone(), count: 1 + missing.count() });
    }
    let known: HashSet<&str> =
        specs.iter().map(|s| s.name.as_str()).chain(aliases.iter().map(|a| a.name.as_str())).collect();
    let mut extra: Vec<&String> =
        names.iter().filter(|name| !known.contains(name.as_str()) && !is_derived(name, &config)).collect();
    extra.sort();
    if let Some(first) = extra.first() {
        return Err(LoadError::Extra { first: (*first).clone(), count: extra.len() });
    }
    for spec in &specs {
        let got = source.shape(&spec.name).unwrap_or_default();
        if got != spec.shape {
            return Err(LoadError::Shape { name: spec.name.clone(), expected: spec.shape.clone(), got });
        }
    }
    Ok(Checked { config, specs, notes })
}

/// Tensors that some folders carry although they follow from others: rotary frequencies, and the head of a tied model.
fn is_derived(name: &str, config: &Config) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || config.tie_word_embeddings && name == "lm_head.weight"
}

/// bf16 for a role whose tensors are all stored in bf16, f32 for the others.
fn stored_precision(config: &Config, specs: &[TensorSpec], source: &dyn WeightSource) -> Precision {
    let of = |wanted: &dyn Fn(Role) -> bool| {
        let mut tensors = specs.iter().filter(|s| wanted(s.role)).peekable();
        let some = tensors.peek().is_some();
        if some && tensors.all(|s| source.dtype(&s.name) == Some(DType::Bf16)) {
            DType::Bf16
        } else {
            DType::F32
        }
    };
    let tied = config.tie_word_embeddings;
    Precision {
        linear: of(&|r| matches!(r, Role::FfnLinear | Role::MtpProjection)),
        expert: of(&|r| matches!(r, Role::ExpertLinear { .. })),
        attention: of(&|r| r == Role::AttentionLinear),
        head: of(&|r| r == if tied { Role::Embedding } else { Role::Head }),
        router: of(&|r| r == Role::Router),
        coded: Coded::default(),
    }
}
