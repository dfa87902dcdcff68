//! Weights of a GGUF file under their published names.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use minke_cpu::stored::{Form, Stored};
use minke_data::gguf::{GgufFile, GgufTensor, TensorType};
use minke_model::spec::{self, Role, TensorSpec};
use minke_model::{Config, DType, Made, WeightSource};
use minke_num::{bf16, blocks, f16};

use super::names::{self, Arch, Place};
use crate::load::mapped_bytes;

/// How rows of queries and keys lie, where a file has them in another order than a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As in the file, for a model whose rope rotates neighbours ([`minke_model::config::Rope::interleaved`]).
    File,
    /// As in a folder.
    Folder,
}

/// What a published tensor is made of.
#[derive(Debug, Clone)]
enum Origin {
    /// Some rows of a tensor, [rows, cols].
    Rows { tensor: String, first: usize, rows: usize },
    /// Keys [heads, c, p] and values [heads, v, c], to become [heads (p + v), c].
    KeyValue { keys: String, values: String },
}

#[derive(Debug, Clone)]
struct Found {
    origin: Origin,
    shape: Vec<usize>,
    /// Width of heads whose rows come in another order.
    permuted: Option<usize>,
    /// Whether one is to be taken off.
    offset: bool,
}

/// The tensors of a GGUF file as a model asks for them.
#[derive(Debug, Clone)]
pub struct GgufWeights {
    file: Arc<GgufFile>,
    found: HashMap<String, Found>,
    /// Tensors that are nobody's, by their own names.
    rest: Vec<String>,
}

impl GgufWeights {
    /// Looks for the tensors of `config`, which came from the same file.
    pub fn new(file: Arc<GgufFile>, config: &Config, arch: Arch, layout: Layout) -> Self {
        let mut found = HashMap::new();
        let mut used = BTreeSet::new();
        let aliases = spec::optional_aliases(config);
        let specs = spec::tensors(config);
        let copies = aliases.iter().filter_map(|alias| {
            let of = specs.iter().find(|spec| spec.name == alias.of)?;
            Some(TensorSpec { name: alias.name.clone(), ..of.clone() })
        });
        for spec in specs.iter().cloned().chain(copies) {
            let Some(place) = names::place(arch, &spec) else { continue };
            let Some((origin, shape)) = origin(&file, place) else { continue };
            match &origin {
                Origin::Rows { tensor, .. } => _ = used.insert(tensor.clone()),
                Origin::KeyValue { keys, values } => used.extend([keys.clone(), values.clone()]),
            }
            let heads = names::permuted_heads(arch, &spec, config).filter(|_| layout == Layout::Folder);
            let permuted = heads.and_then(|heads| {
                let width = shape.first()? / heads;
                (width > 0 && width.is_multiple_of(2) && width * heads == shape[0]).then_some(width)
            });
            let offset = arch.is_gemma() && spec.role == Role::Norm;
            found.insert(spec.name, Found { origin, shape, permuted, offset });
        }
        // what follows from the config
        used.insert("rope_freqs.weight".to_owned());
        let rest = file.names().filter(|name| !used.contains(*name)).map(str::to_owned).collect();
        Self { file, found, rest }
    }

    /// The file.
    pub fn file(&self) -> &Arc<GgufFile> {
        &self.file
    }

    /// What a tensor's elements are in the file.
    pub fn kind(&self, name: &str) -> Option<TensorType> {
        let tensor = match &self.found.get(name)?.origin {
            Origin::Rows { tensor, .. } => tensor,
            Origin::KeyValue { keys, .. } => keys,
        };
        Some(self.file.tensor(tensor)?.kind)
    }

    /// Bytes of a tensor in the file.
    pub fn bytes(&self, name: &str) -> Option<usize> {
        let whole = |name: &str| Some(self.file.tensor(name)?.bytes.len());
        match &self.found.get(name)?.origin {
            Origin::Rows { tensor, rows, .. } => {
                let tensor = self.file.tensor(tensor)?;
                Some(tensor.kind.row_bytes(*tensor.shape.last()?)? * rows)
            }
            Origin::KeyValue { keys, values } => Some(whole(keys)? + whole(values)?),
        }
    }

    fn rows(&self, tensor: &str, first: usize, rows: usize) -> Result<(GgufTensor<'_>, &[u8]), String> {
        let tensor = self.file.tensor(tensor).ok_or("no such tensor")?;
        let cols = tensor.shape.last().copied().unwrap_or(1);
        let row = tensor.kind.row_bytes(cols).ok_or("rows that blocks do not fill")?;
        let bytes = tensor.bytes.get(first * row..(first + rows) * row).ok_or("fewer rows than expected")?;
        Ok((tensor, bytes))
    }
}

/// Keys and values of all heads, as a folder has them.
fn key_value(file: &GgufFile, keys: &str, values: &str, out: &mut [f32]) -> Result<(), String> {
    let read = |name: &str| -> Result<(Vec<usize>, Vec<f32>), String> {
        let tensor = file.tensor(name).ok_or("no such tensor")?;
        let mut numbers = vec![0.0; tensor.shape.iter().product()];
        decode(tensor.kind, tensor.bytes, &mut numbers);
        Ok((tensor.shape.to_vec(), numbers))
    };
    let ((k_shape, k), (v_shape, v)) = (read(keys)?, read(values)?);
    let (c, p) = (k_shape[1], k_shape[2]);
    let (key, value) = (p * c, v_shape[1] * c);
    for ((out, k), v) in out.chunks_exact_mut(key + value).zip(k.chunks_exact(key)).zip(v.chunks_exact(value))
    {
        for (at, x) in out[..key].iter_mut().enumerate() {
            *x = k[at % c * p + at / c];
        }
        out[key..].copy_from_slice(v);
    }
    Ok(())
}

/// What a place holds in a file, if it does: the tensors and the published shape.
fn origin(file: &GgufFile, place: Place) -> Option<(Origin, Vec<usize>)> {
    let whole = |tensor: String| {
        let shape = file.tensor(&tensor)?.shape.to_vec();
        let rows = if shape.len() < 2 { 1 } else { shape[..shape.len() - 1].iter().product() };
        Some((Origin::Rows { tensor, first: 0, rows }, shape))
    };
    match place {
        Place::Whole(tensor) => whole(tensor),
        Place::Expert { stack, expert, fused } => {
            let (stack, half) = match file.tensor(&stack) {
                Some(_) => (stack, None),
                None => fused.map(|(stack, second)| (stack, Some(second)))?,
            };
            let [experts, of_expert, cols] = axes(file, &stack)?;
            let (skip, rows) = match half {
                None => (0, of_expert),
                Some(second) => (if second { of_expert / 2 } else { 0 }, of_expert / 2),
            };
            let first = expert * of_expert + skip;
            (expert < experts).then(|| (Origin::Rows { tensor: stack, first, rows }, vec![rows, cols]))
        }
        Place::KeyValue { whole: one, keys, values } => {
            if file.tensor(&one).is_some() {
                return whole(one);
            }
            let ([k_heads, c, p], [heads, v, width]) = (axes(file, &keys)?, axes(file, &values)?);
            let fits = k_heads == heads && c == width;
            fits.then(|| (Origin::KeyValue { keys, values }, vec![heads * (p + v), c]))
        }
    }
}

/// The axes of a tensor that has three.
fn axes(file: &GgufFile, tensor: &str) -> Option<[usize; 3]> {
    file.tensor(tensor)?.shape.try_into().ok()
}

/// Numbers from their stored form.
///
/// # Panics
/// When there are not as many bytes as numbers ask for.
pub(super) fn decode(kind: TensorType, bytes: &[u8], out: &mut [f32]) {
    let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match kind {
        TensorType::F32 => {
            for (x, four) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *x = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
            }
        }
        TensorType::F16 => {
            out.iter_mut().zip(pairs()).for_each(|(x, pair)| *x = f16::from_le_bytes(pair).to_f32());
        }
        TensorType::Bf16 => {
            out.iter_mut().zip(pairs()).for_each(|(x, pair)| *x = bf16::from_le_bytes(pair).to_f32());
        }
        TensorType::Blocks(format) => blocks::decode(format, bytes, out),
    }
}

fn form(kind: TensorType) -> Form {
    match kind {
        TensorType::F32 => Form::F32,
        TensorType::F16 => Form::F16,
        TensorType::Bf16 => Form::Bf16,
        TensorType::Blocks(format) => Form::Blocks(format),
    }
}

impl WeightSource for GgufWeights {
    fn names(&self) -> Vec<String> {
        self.found.keys().chain(&self.rest).cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.found.get(name).map(|found| found.shape.clone())
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        let split = matches!(self.found.get(name)?.origin, Origin::KeyValue { .. });
        Some(match self.kind(name)? {
            TensorType::Bf16 => DType::Bf16,
            // keys that are turned over cannot run as they are stored; beside others that do they are no reason for f32
            TensorType::Blocks(_) if split => DType::Bf16,
            TensorType::F32 | TensorType::F16 | TensorType::Blocks(_) => DType::F32,
        })
    }

    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String> {
        let Some(found) = self.found.get(name) else { return Err("no such tensor".to_owned()) };
        let elements: usize = found.shape.iter().product();
        if elements != out.len() {
            return Err(format!("expected {} elements, got {elements}", out.len()));
        }
        match &found.origin {
            Origin::KeyValue { keys, values } => key_value(&self.file, keys, values, out)?,
            Origin::Rows { tensor, first, rows } => {
                let (tensor, bytes) = self.rows(tensor, *first, *rows)?;
                match found.permuted {
                    None => decode(tensor.kind, bytes, out),
                    Some(head_dim) => {
                        let (cols, row) = (out.len() / found.shape[0], bytes.len() / found.shape[0]);
                        for (at, bytes) in bytes.chunks_exact(row).enumerate() {
                            let to = names::row_in_folder(at, head_dim);
                            decode(tensor.kind, bytes, &mut out[to * cols..(to + 1) * cols]);
                        }
                    }
                }
            }
        }
        if found.offset {
            for gain in out.iter_mut() {
                *gain -= 1.0;
            }
        }
        Ok(())
    }

    fn stored(&self, name: &str) -> Option<Stored> {
        let found = self.found.get(name)?;
        let Origin::Rows { tensor, first, .. } = &found.origin else { return None };
        let [rows, cols] = found.shape[..] else { return None };
        if found.permuted.is_some() || found.offset {
            return None;
        }
        let kind = self.file.tensor(tensor)?.kind;
        let row = kind.row_bytes(cols)?;
        let (owner, range) = self.file.shared(tensor)?;
        let start = range.start + first * row;
        Some(Stored::new(form(kind), rows, cols, mapped_bytes(owner, start..start + rows * row)))
    }

    fn made(&self, name: &str) -> Option<Made> {
        let Origin::KeyValue { keys, values } = self.found.get(name)?.origin.clone() else { return None };
        let file = self.file.clone();
        Some(Arc::new(move |out| {
            key_value(&file, &keys, &values, out).expect("both are there, with axes that fit");
            for tensor in [&keys, &values] {
                file.forget(tensor, 0..usize::MAX >> 1);
            }
        }))
    }

    fn done(&self, name: &str) {
        let Some(found) = self.found.get(name) else { return };
        match &found.origin {
            Origin::Rows { tensor, first, rows } => {
                let row = self.file.tensor(tensor).and_then(|t| t.kind.row_bytes(*t.shape.last()?));
                let row = row.unwrap_or(0);
                self.file.forget(tensor, first * row..(first + rows) * row);
            }
            Origin::KeyValue { keys, values } => {
                for tensor in [keys, values] {
                    self.file.forget(tensor, 0..usize::MAX >> 1);
                }
            }
        }
    }
}
