//! The tensors of a model as a file has them, each read from its source when it is written.

use minke_data::gguf::{MAX_NAME_BYTES, TensorType};
use minke_model::spec::{self, Role, TensorSpec};
use minke_model::{Config, WeightSource};

use super::config::Llama3;
use super::metadata::{NoPlace, no_place};
use super::names::{self, Arch, Place};

/// What happens to the numbers of a published tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Change {
    None,
    /// Rows of heads of this width go where pairs that are rotated together are neighbours.
    Permute(usize),
    /// Gemma's gains are written whole.
    PlusOne,
    /// The keys [p, c] of each head of `kv_b_proj`, turned over, [c, p].
    Keys(Split),
    /// Its values [v, c].
    Values(Split),
}

/// The parts of `kv_b_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Split {
    keys: usize,
    values: usize,
    latent: usize,
}

/// A tensor of a file, made of one published tensor or of one for each expert.
#[derive(Debug, Clone)]
pub struct OutTensor {
    /// Its name.
    pub name: String,
    /// Its axes, outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// The layer that it belongs to, MTP modules counted on behind the trunk.
    pub layer: Option<usize>,
    parts: Vec<TensorSpec>,
    change: Change,
    /// Numbers that follow from the config.
    constant: Option<Vec<f32>>,
}

impl OutTensor {
    fn new(name: String, spec: &TensorSpec, change: Change) -> Self {
        let (shape, role, layer) = (spec.shape.clone(), spec.role, spec.layer);
        Self { name, shape, role, layer, parts: vec![spec.clone()], change, constant: None }
    }

    /// Pieces that are read one after the other: experts, or one.
    pub fn pieces(&self) -> usize {
        self.parts.len().max(1)
    }

    /// The published name of a piece; none for what follows from the config.
    pub fn published(&self, piece: usize) -> Option<&str> {
        self.parts.get(piece).map(|spec| spec.name.as_str())
    }

    /// Whether it is keys of latent attention, whose rows queries read.
    pub fn is_turned_keys(&self) -> bool {
        matches!(self.change, Change::Keys(_))
    }

    /// Whether every reader wants it in f32, whatever the others are: vectors, and routers.
    pub fn is_small(&self) -> bool {
        self.shape.len() < 2 || matches!(self.role, Role::Norm | Role::Router | Role::RouterBias)
    }

    /// What it is stored in where weights are stored in `wanted`: f32 if it is small, f16 where blocks do not fill its rows.
    pub fn stored_in(&self, wanted: TensorType) -> TensorType {
        let cols = self.shape.last().copied().unwrap_or(1);
        match wanted {
            _ if self.is_small() => TensorType::F32,
            TensorType::Blocks(_) if wanted.row_bytes(cols).is_none() => TensorType::F16,
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 | TensorType::Blocks(_) => wanted,
        }
    }

    /// The numbers of a piece, row-major, as the file has them.
    ///
    /// # Errors
    /// What the source says.
    pub fn read(&self, source: &dyn WeightSource, piece: usize) -> Result<Vec<f32>, String> {
        if let Some(constant) = &self.constant {
            return Ok(constant.clone());
        }
        let spec = self.parts.get(piece).ok_or("no such piece")?;
        let mut numbers = vec![0.0; spec.numel()];
        source.read_into(&spec.name, &mut numbers)?;
        Ok(match &self.change {
            Change::None => numbers,
            Change::PlusOne => {
                for gain in &mut numbers {
                    *gain += 1.0;
                }
                numbers
            }
            Change::Permute(head_dim) => {
                let cols = numbers.len() / spec.shape[0];
                let row = |row: usize| {
                    let from = names::row_in_folder(row, *head_dim) * cols;
                    &numbers[from..from + cols]
                };
                (0..spec.shape[0]).flat_map(row).copied().collect()
            }
            Change::Keys(split) => {
                let Split { keys, values, latent } = *split;
                let head = |head: &[f32]| -> Vec<f32> {
                    (0..latent * keys).map(|at| head[at % keys * latent + at / keys]).collect()
                };
                numbers.chunks_exact((keys + values) * latent).flat_map(head).collect()
            }
            Change::Values(split) => {
                let Split { keys, values, latent } = *split;
                let heads = numbers.chunks_exact((keys + values) * latent);
                heads.flat_map(|head| &head[keys * latent..]).copied().collect()
            }
        })
    }
}

/// The tensors of the file of a model, in their order.
///
/// # Errors
/// A tensor that GGUF has no name for.
pub fn gguf_tensors(config: &Config) -> Result<Vec<OutTensor>, NoPlace> {
    let family = config.family.model_type();
    let arch = Arch::of(config).ok_or_else(|| no_place("model_type", family, "another family"))?;
    let mut out: Vec<OutTensor> = Vec::new();
    if let Some(divisors) = rope_divisors(config) {
        out.push(OutTensor {
            name: "rope_freqs.weight".to_owned(),
            shape: vec![divisors.len()],
            role: Role::Norm,
            layer: None,
            parts: Vec::new(),
            change: Change::None,
            constant: Some(divisors),
        });
    }
    // experts come one after the other, each with its gate, up and down: their stacks are the last three
    for spec in spec::tensors(config) {
        let place = names::place(arch, &spec);
        match place
            .ok_or_else(|| no_place("model_type", family, format!("no name for tensor `{}`", spec.name)))?
        {
            Place::Whole(name) => {
                let change = match names::permuted_heads(arch, &spec, config) {
                    Some(heads) => Change::Permute(spec.shape[0] / heads),
                    None if arch.is_gemma() && spec.role == Role::Norm => Change::PlusOne,
                    None => Change::None,
                };
                out.push(OutTensor::new(name, &spec, change));
            }
            Place::Expert { stack, .. } => {
                match out.iter_mut().rev().take(3).find(|tensor| tensor.name == stack) {
                    Some(tensor) => {
                        tensor.parts.push(spec);
                        tensor.shape[0] += 1;
                    }
                    None => {
                        let mut tensor = OutTensor::new(stack, &spec, Change::None);
                        tensor.shape.insert(0, 1);
                        out.push(tensor);
                    }
                }
            }
            Place::KeyValue { keys, values, .. } => {
                let heads = config.num_attention_heads;
                let v = config.v_head_dim();
                let split = Split { keys: spec.shape[0] / heads - v, values: v, latent: spec.shape[1] };
                let mut k = OutTensor::new(keys, &spec, Change::Keys(split));
                k.shape = vec![heads, split.latent, split.keys];
                let mut values = OutTensor::new(values, &spec, Change::Values(split));
                values.shape = vec![heads, v, split.latent];
                out.extend([k, values]);
            }
        }
    }
    if let Some(long) = out.iter().find(|tensor| tensor.name.len() > MAX_NAME_BYTES) {
        return Err(no_place(
            "num_hidden_layers",
            config.num_hidden_layers,
            format!("the name `{}` is too long", long.name),
        ));
    }
    Ok(out)
}

/// Llama 3's divisors of frequencies, if the rope is scaled so.
fn rope_divisors(config: &Config) -> Option<Vec<f32>> {
    let json = config.to_json();
    let rope = &json["rope_parameters"];
    if rope["rope_type"] != "llama3" {
        return None;
    }
    let number = |field: &str| rope[field].as_f64();
    let settings = Llama3 {
        factor: number("factor")?,
        low: number("low_freq_factor")?,
        high: number("high_freq_factor")?,
        original: number("original_max_position_embeddings")?,
    };
    Some(settings.divisors(number("rope_theta")?, config.rotary_dim()))
}
