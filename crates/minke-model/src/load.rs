//! Weights from outside, checked against the table of tensors before a number is read.

use std::collections::{HashMap, HashSet};

use minke_cpu::fp8::Fp8;
use minke_cpu::gemm::Compute;
use minke_cpu::stored::{Form, Stored};
use minke_cpu::{Cpu, DType};
use minke_num::fp8::BLOCK;
use minke_tensor::Made;

use crate::config::Config;
use crate::forward::Model;
use crate::params::{Coded, Keep, Precision};
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
    /// Whether a tensor is stored in FP8.
    fn is_coded(&self, name: &str) -> bool {
        let _ = name;
        false
    }
    /// A matrix as it lies in a file, to be run from there, without a copy.
    fn stored(&self, name: &str) -> Option<Stored> {
        let _ = name;
        None
    }
    /// A matrix that is put together of what lies in a file, for products that read a copy: made when they first want it.
    fn made(&self, name: &str) -> Option<Made> {
        let _ = name;
        None
    }
    /// The tensor will not be read again: memory that holds it can go.
    fn done(&self, name: &str) {
        let _ = name;
    }
}

/// What a model is loaded for.
#[derive(Clone, Copy)]
pub enum Purpose<'a> {
    /// To be trained: an f32 master of every weight.
    Train,
    /// To be run, on this machine only: from where weights are stored, where their products can; of others whose products are
    /// in FP8 there are codes and scales and nothing else.
    Run(&'a Cpu),
}

/// Which weights of a model that runs stay where they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmoved {
    /// Those that are stored as what products multiply.
    AsStored,
    /// Others too, converted at every product, which is slow: for a model that memory does not hold.
    Converted,
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

/// A model whose tensors were found and checked, and of which nothing was read yet.
pub struct Loading {
    config: Config,
    specs: Vec<TensorSpec>,
    precision: Precision,
    keep: Keep,
    notes: Vec<String>,
}

impl Loading {
    /// Decides what becomes of every tensor; arguments and errors are those of [`Model::load`]. `unmoved` matters for a model
    /// that runs.
    ///
    /// # Errors
    /// As [`check`].
    pub fn new(
        config: Config,
        precision: Option<Precision>,
        source: &dyn WeightSource,
        purpose: Purpose<'_>,
        unmoved: Unmoved,
    ) -> Result<Self, LoadError> {
        let Checked { mut config, specs, notes } = check(config, source)?;
        let to_run = matches!(purpose, Purpose::Run(_));
        let mut keep = Keep::default();
        let as_stored = precision.is_none();
        let mut precision = precision.unwrap_or_else(|| {
            let stored = stored_precision(&config, &specs, source, to_run);
            let plain = specs.iter().filter(|s| !source.is_coded(&s.name));
            keep.plain = plain.map(|s| s.name.clone()).collect();
            stored
        });
        // (one scale for a whole matrix is a matter of training)
        keep.only_codes = to_run && precision.coded.any() && !precision.coded.couples_rows();
        if keep.only_codes && specs.iter().any(|s| source.is_coded(&s.name)) {
            precision.coded.how = stored_how(&config);
        }
        if to_run {
            keep.stored = {
                let products = Products { precision: &precision, plain: &keep.plain, as_stored, unmoved };
                stored_tensors(&config, &specs, source, products)
            };
            let made = |spec: &TensorSpec| Some((spec.name.clone(), source.made(&spec.name)?));
            keep.made = specs
                .iter()
                .filter(|spec| precision.coded.of(spec.role).is_none())
                .filter_map(made)
                .collect();
        }
        // whatever they were read from, they are numbers or codes now
        config.quantization = None;
        Ok(Self { config, specs, precision, keep, notes })
    }

    /// Memory for the weights of a model that runs and does not run them from where they are stored, which can be no less:
    /// numbers, what products read of them, and codes. About: what one product reads together is one or the other.
    pub fn held_bytes(&self) -> u64 {
        let held = self.specs.iter().filter(|spec| !self.keep.stored.contains_key(&spec.name));
        let coded = |spec: &TensorSpec| {
            let has_codes = self.keep.only_codes && self.precision.coded.of(spec.role).is_some();
            has_codes && !self.keep.plain.contains(&spec.name)
        };
        let bytes = |spec: &TensorSpec| match self.keep.made.get(&spec.name) {
            Some(_) => (spec.numel() * self.precision.of(spec.role, false).size_bytes()) as u64,
            None => running_bytes(&self.config, &self.precision, spec, coded(spec)),
        };
        held.map(bytes).sum()
    }

    /// Memory of the weights that run from where they are stored.
    pub fn mapped_bytes(&self) -> u64 {
        self.keep.stored.values().map(|stored| stored.bytes.len() as u64).sum()
    }

    /// Reads the tensors.
    ///
    /// # Errors
    /// What the source reports.
    pub fn load(
        self,
        source: &dyn WeightSource,
        purpose: Purpose<'_>,
    ) -> Result<(Model, Vec<String>), LoadError> {
        let mut model = Model::zero(self.config, self.precision, self.keep);
        if let Purpose::Run(cpu) = purpose {
            model.load_codes(cpu, source)?;
        }
        let in_codes: HashSet<usize> =
            model.params.coded.iter().flat_map(|(_, entries)| entries.iter().copied()).collect();
        for (i, entry) in model.params.entries.clone().into_iter().enumerate() {
            if !in_codes.contains(&i) && !model.params.stored.contains_key(&i) {
                let out = &mut model.params.data[entry.range];
                source.read_into(&entry.name, out).map_err(failed(&entry.name))?;
                source.done(&entry.name);
            }
        }
        Ok((model, self.notes))
    }
}

/// Bytes that a tensor takes in memory in a model that runs: its numbers in f32 and what products read, or, if there are
/// only codes of it (`coded`), these and their scales.
pub fn running_bytes(config: &Config, precision: &Precision, tensor: &TensorSpec, coded: bool) -> u64 {
    let tied = config.tie_word_embeddings;
    let n = tensor.numel() as u64;
    let packed = match tensor.role {
        Role::Norm | Role::Bias | Role::RouterBias => 0,
        Role::Embedding if !tied => 0,
        Role::AttentionLinear
        | Role::FfnLinear
        | Role::ExpertLinear { .. }
        | Role::MtpProjection
        | Role::Router
        | Role::Head
        | Role::Embedding => precision.of(tensor.role, tied).size_bytes() as u64,
    };
    match tensor.shape[..] {
        // a scale per output and 128 inputs, where products read them
        [rows, cols] if coded => n + 4 * (rows * cols.div_ceil(BLOCK)) as u64,
        _ => n * (4 + packed),
    }
}

impl Model {
    /// Builds the model of `config` with weights from `source`; products compute in `precision`, or else in what each
    /// role's tensors are stored in, where FP8 counts as f32 unless the model is loaded to run. Weights in FP8 decide on
    /// the kind of scales of a model that runs in FP8. Also returns notes that a user should see.
    ///
    /// What can run from where it is stored does: matrices in blocks or FP8, and those of a dtype that their products have.
    ///
    /// A tensor is read at a time, and where numbers become codes a weight (the experts of a layer are one).
    ///
    /// # Errors
    /// As [`check`], and what the source reports.
    pub fn load(
        config: Config,
        precision: Option<Precision>,
        source: &dyn WeightSource,
        purpose: Purpose<'_>,
    ) -> Result<(Self, Vec<String>), LoadError> {
        Loading::new(config, precision, source, purpose, Unmoved::AsStored)?.load(source, purpose)
    }

    /// Fills the weights of which there are only codes.
    fn load_codes(&mut self, cpu: &Cpu, source: &dyn WeightSource) -> Result<(), LoadError> {
        for (id, entries) in self.params.coded.clone() {
            let entries = entries.iter().map(|&i| &self.params.entries[i]);
            let tensors: Vec<(String, usize)> =
                entries.map(|entry| (entry.name.clone(), entry.shape.iter().product())).collect();
            let mut w = vec![0.0; tensors.iter().map(|(_, size)| size).sum()];
            let mut rest = &mut w[..];
            for (name, size) in &tensors {
                let (out, behind) = rest.split_at_mut(*size);
                source.read_into(name, out).map_err(failed(name))?;
                rest = behind;
            }
            self.params.set_codes(cpu, id, &w, self.precision.coded.how);
            for (name, _) in &tensors {
                source.done(name);
            }
        }
        Ok(())
    }
}

fn failed(name: &str) -> impl FnOnce(String) -> LoadError {
    let name = name.to_owned();
    move |why| LoadError::Read { name, why }
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

/// Elements up to which the numbers of a model are packed when it is loaded: no wait, and products are faster.
const PACKED_ELEMENTS: usize = 32 << 20;

/// What products are to be in, and from where.
#[derive(Clone, Copy)]
struct Products<'a> {
    precision: &'a Precision,
    /// Tensors that are not in FP8 although those of their role are.
    plain: &'a HashSet<String>,
    /// Whether they may be in what tensors are stored in.
    as_stored: bool,
    unmoved: Unmoved,
}

/// The matrices that run from where they are stored.
fn stored_tensors(
    config: &Config,
    specs: &[TensorSpec],
    source: &dyn WeightSource,
    products: Products<'_>,
) -> HashMap<String, Stored> {
    let Products { precision, plain, as_stored, unmoved } = products;
    let tied = config.tie_word_embeddings;
    let takes_part = |role: Role| match role {
        Role::Embedding
        | Role::Head
        | Role::AttentionLinear
        | Role::FfnLinear
        | Role::ExpertLinear { .. }
        | Role::MtpProjection => true,
        Role::Norm | Role::Bias | Role::Router | Role::RouterBias => false,
    };
    let numbers = |s: &&TensorSpec| !source.is_coded(&s.name) && !in_blocks(source, &s.name);
    let packed = specs.iter().filter(numbers).map(TensorSpec::numel).sum::<usize>() <= PACKED_ELEMENTS;
    let of = |spec: &TensorSpec| {
        let stored = source.stored(&spec.name)?;
        let dtype = precision.of(spec.role, tied);
        let in_fp8 = precision.coded.of(spec.role).is_some() && !plain.contains(&spec.name);
        let fits = match stored.form {
            Form::E4m3 => in_fp8 && !precision.coded.couples_rows(),
            Form::Blocks(_) => as_stored && !in_fp8,
            // (an embedding that is not the head has no product)
            Form::Bf16 => !in_fp8 && (dtype == DType::Bf16 || spec.role == Role::Embedding && !tied),
            Form::F32 | Form::F16 => !in_fp8 && dtype == DType::F32,
        };
        if !fits {
            let compute = match dtype {
                DType::F32 => Compute::F32,
                DType::Bf16 => Compute::Bf16,
            };
            return (unmoved == Unmoved::Converted && !in_fp8).then(|| stored.as_numbers(compute));
        }
        let waits = matches!(stored.form, Form::E4m3 | Form::Blocks(_)) || !packed;
        waits.then_some(stored)
    };
    let candidates = specs.iter().filter(|spec| takes_part(spec.role));
    candidates.filter_map(|spec| Some((spec.name.clone(), of(spec)?))).collect()
}

/// Whether a tensor is stored in blocks.
fn in_blocks(source: &dyn WeightSource, name: &str) -> bool {
    !source.is_coded(name) && source.stored(name).is_some_and(|stored| matches!(stored.form, Form::Blocks(_)))
}

/// How a folder in FP8 has its scales.
fn stored_how(config: &Config) -> Fp8 {
    Fp8 { power_of_two: config.quantization.is_some_and(|q| q.power_of_two), per_tensor: false }
}

/// bf16 for a role whose tensors are all stored in bf16, f32 for the others; FP8 with activations in bf16 for a role with
/// tensors in FP8, if these are to `run`. Tensors in blocks count as bf16 then.
fn stored_precision(
    config: &Config,
    specs: &[TensorSpec],
    source: &dyn WeightSource,
    run: bool,
) -> Precision {
    let coded = |s: &TensorSpec| run && s.role.takes_fp8() && source.is_coded(&s.name);
    let of = |wanted: &dyn Fn(Role) -> bool| {
        let mut tensors = specs.iter().filter(|s| wanted(s.role)).peekable();
        let some = tensors.peek().is_some();
        let half = |s: &TensorSpec| {
            coded(s) || source.dtype(&s.name) == Some(DType::Bf16) || run && in_blocks(source, &s.name)
        };
        if some && tensors.all(half) { DType::Bf16 } else { DType::F32 }
    };
    let any = |wanted: &dyn Fn(Role) -> bool| specs.iter().any(|s| wanted(s.role) && coded(s));
    let linear = |r| matches!(r, Role::FfnLinear | Role::MtpProjection);
    let expert = |r| matches!(r, Role::ExpertLinear { .. });
    let attention = |r| r == Role::AttentionLinear;
    let tied = config.tie_word_embeddings;
    Precision {
        linear: of(&linear),
        expert: of(&expert),
        attention: of(&attention),
        head: of(&|r| r == if tied { Role::Embedding } else { Role::Head }),
        router: of(&|r| r == Role::Router),
        coded: Coded {
            linear: any(&linear),
            expert: any(&expert),
            attention: any(&attention),
            how: stored_how(config),
        },
    }
}
