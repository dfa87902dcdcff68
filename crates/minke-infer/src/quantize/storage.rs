//! A model's tensors in the formats of a mix, encoded on all threads, and what that lost.

use std::collections::BTreeMap;
use std::sync::Mutex;

use minke_cpu::Cpu;
use minke_cpu::simd::{Kernel, Simd};
use minke_data::gguf::TensorType;
use minke_model::Config;
use minke_model::config::FfnKind;
use minke_num::blocks::{BlockFormat, EncodeError, decode, encode};

use super::importance::Importance;
use super::mix::{Facts, Mix};
use crate::gguf::{OutTensor, Storage, elements};

/// Numbers that are encoded as one task.
const TASK: usize = 1 << 15;

/// Tensors of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// How many.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Stores tensors as a [`Mix`] says, and counts.
pub struct Quantizer<'a> {
    cpu: &'a Cpu,
    mix: Mix,
    facts: Facts,
    importance: Option<&'a Importance>,
    /// By kind.
    pub shares: BTreeMap<TensorType, Share>,
    /// The matrix that changed most, and by how much: `|w - w'| / |w|`, norms over the whole of it.
    pub largest_error: Option<(String, f64)>,
    /// Matrices in blocks whose columns have an importance.
    pub weighted: usize,
    /// How many matrices are in another kind than the mix means, because their rows do not fill its blocks: by what was
    /// meant and what it is.
    pub instead: BTreeMap<(TensorType, TensorType), usize>,
    /// Squares of what was lost, and of what there was, of the tensor that is being written.
    squares: [f64; 2],
}

impl<'a> Quantizer<'a> {
    /// For a model of this config.
    pub fn new(cpu: &'a Cpu, mix: Mix, config: &Config, importance: Option<&'a Importance>) -> Self {
        let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
        let experts = |layer| match config.ffn(layer) {
            FfnKind::Moe(moe) => moe.n_routed_experts,
            FfnKind::Dense { .. } => 0,
        };
        let facts = Facts {
            layers,
            experts: (0..layers).map(experts).max().unwrap_or(0),
            heads_per_key: config.num_attention_heads / config.attention_shape().kv_heads.max(1),
            tied: config.tie_word_embeddings,
            importance: importance.is_some(),
            plain: if config.dtype.as_deref() == Some("bfloat16") {
                TensorType::Bf16
            } else {
                TensorType::F16
            },
        };
        Self {
            cpu,
            mix,
            facts,
            importance,
            shares: BTreeMap::new(),
            largest_error: None,
            weighted: 0,
            instead: BTreeMap::new(),
            squares: [0.0; 2],
        }
    }

    /// Bits per element of all that was stored.
    pub fn bits_per_weight(&self) -> f64 {
        let (elements, bytes) =
            self.shares.values().fold((0, 0), |sum, share| (sum.0 + share.elements, sum.1 + share.bytes));
        8.0 * bytes as f64 / (elements as f64).max(1.0)
    }

    /// Encodes rows of `cols`.
    fn encode(
        &mut self,
        format: BlockFormat,
        numbers: &[f32],
        cols: usize,
        importance: Option<&[f32]>,
    ) -> Result<Vec<u8>, String> {
        let row = format.row_bytes(cols).ok_or("rows that blocks do not fill")?;
        let rows = numbers.len() / cols;
        let at_once = (TASK / cols).clamp(1, rows.max(1));
        let mut stored = vec![0; rows * row];
        let tasks: Vec<_> = numbers
            .chunks(at_once * cols)
            .zip(stored.chunks_mut(at_once * row))
            .map(|(x, out)| Mutex::new((x, out, Ok([0.0; 2]))))
            .collect();
        self.cpu.run(tasks.len(), |task| {
            let mut task = tasks[task].lock().expect("no task fails");
            let (x, out, done) = &mut *task;
            *done = self.cpu.dispatch(EncodeRows { format, x, cols, importance, out, row });
        });
        for (number, task) in tasks.into_iter().enumerate() {
            let (_, _, done) = task.into_inner().expect("no task fails");
            let squares = done.map_err(|(row, error)| format!("row {}, {error}", number * at_once + row))?;
            // in the order of rows, so that no number of threads shows
            self.squares[0] += squares[0];
            self.squares[1] += squares[1];
        }
        Ok(stored)
    }
}

/// Encodes some rows; gives the squares of what was lost and of what there was, or the row that cannot be.
struct EncodeRows<'a> {
    format: BlockFormat,
    x: &'a [f32],
    cols: usize,
    importance: Option<&'a [f32]>,
    out: &'a mut [u8],
    row: usize,
}

impl Kernel for EncodeRows<'_> {
    type Out = Result<[f64; 2], (usize, EncodeError)>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Out {
        let Self { format, x, cols, importance, out, row } = self;
        let mut y = vec![0.0; cols];
        let mut squares = [0.0; 2];
        for (at, (x, out)) in x.chunks_exact(cols).zip(out.chunks_exact_mut(row)).enumerate() {
            encode(format, x, importance, out).map_err(|error| (at, error))?;
            decode(format, out, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let (x, y) = (f64::from(*x), f64::from(*y));
                squares[0] += (x - y) * (x - y);
                squares[1] += x * x;
            }
        }
        Ok(squares)
    }
}

impl Storage for Quantizer<'_> {
    fn file_type(&self) -> u32 {
        self.mix.file_type()
    }

    fn kind(&self, tensor: &OutTensor) -> TensorType {
        if tensor.is_small() {
            return TensorType::F32;
        }
        self.mix.form(&tensor.name, &tensor.shape, &self.facts)
    }

    fn store(&mut self, tensor: &OutTensor, piece: usize, numbers: &[f32]) -> Result<Vec<u8>, String> {
        let kind = self.kind(tensor);
        let cols = tensor.shape.last().copied().unwrap_or(1);
        let stored = match kind {
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 => elements(kind, numbers, cols)?,
            TensorType::Blocks(format) => {
                let published = tensor.published(piece);
                // (keys of latent attention are turned over: what their columns read is not what was measured)
                let importance = published
                    .and_then(|name| self.importance?.of_tensor(name))
                    .filter(|columns| columns.len() == cols && !tensor.name.ends_with("attn_k_b.weight"));
                if piece == 0 {
                    self.squares = [0.0; 2];
                    self.weighted += usize::from(importance.is_some());
                }
                self.encode(format, numbers, cols, importance)?
            }
        };
        let meant = self.mix.meant(&tensor.name, &tensor.shape, &self.facts).filter(|_| !tensor.is_small());
        if let Some(meant) = meant.map(TensorType::Blocks).filter(|meant| piece == 0 && *meant != kind) {
            *self.instead.entry((meant, kind)).or_default() += 1;
        }
        let share = self.shares.entry(kind).or_default();
        share.tensors += usize::from(piece == 0);
        share.elements += numbers.len() as u64;
        share.bytes += stored.len() as u64;
        if matches!(kind, TensorType::Blocks(_)) && piece + 1 == tensor.pieces() {
            let [lost, all] = self.squares;
            let error = if all > 0.0 { (lost / all).sqrt() } else { 0.0 };
            if self.largest_error.as_ref().is_none_or(|(_, largest)| error > *largest) {
                self.largest_error = Some((tensor.name.clone(), error));
            }
        }
        Ok(stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minke_cpu::Level;
    use minke_num::rng;

    #[test]
    fn blocks_are_the_same_on_every_level() {
        let cols = 512;
        let mut x = vec![0.0; 3 * cols];
        rng::fill_normal(1, 2, 0.02, &mut x);
        let importance: Vec<f32> = (0..cols).map(|i| rng::uniform_f64(3, 4, i as u64) as f32).collect();
        for format in BlockFormat::ALL {
            for importance in [None, Some(&importance[..])] {
                let row = format.row_bytes(cols).expect("whole blocks");
                let encoded = |level| {
                    let mut out = vec![0; 3 * row];
                    let rows = EncodeRows { format, x: &x, cols, importance, out: &mut out, row };
                    let squares = Cpu::with_level(level, 1).dispatch(rows).expect("finite numbers");
                    (out, squares)
                };
                let expected = encoded(Level::SCALAR);
                for level in Level::available() {
                    assert_eq!(encoded(level), expected, "{format:?} {}", level.name());
                }
            }
        }
    }
}
