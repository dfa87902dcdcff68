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

    /// Encodes rows of `cols`. Importances of several rows are each of as many rows of numbers.
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
        let alike = importance.map_or(rows, |columns| rows * cols / columns.len());
        let mut stored = vec![0; rows * row];
        let tasks: Vec<_> = numbers
            .chunks(at_once * cols)
            .zip(stored.chunks_mut(at_once * row))
            .map(|(x, out)| Mutex::new((x, out, Ok([0.0; 2]))))
            .collect();
        self.cpu.run(tasks.len(), |number| {
            let mut task = tasks[number].lock().expect("no task fails");
            let (x, out, done) = &mut *task;
            let first = number * at_once;
            *done = self.cpu.dispatch(EncodeRows { format, x, cols, importance, alike, first, out, row });
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
    /// Rows that share an importance.
    alike: usize,
    /// The first row, of all.
    first: usize,
    out: &'a mut [u8],
    row: usize,
}

impl Kernel for EncodeRows<'_> {
    type Out = Result<[f64; 2], (usize, EncodeError)>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Out {
        let Self { format, x, cols, importance, alike, first, out, row } = self;
        let mut y = vec![0.0; cols];
        let mut squares = [0.0; 2];
        for (at, (x, out)) in x.chunks_exact(cols).zip(out.chunks_exact_mut(row)).enumerate() {
            let importance = importance.map(|columns| &columns[(first + at) / alike * cols..][..cols]);
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
                let importance = self.importance.zip(published).and_then(|(importance, name)| {
                    let (columns, matrices) = if tensor.is_turned_keys() {
                        (importance.of_keys(name)?, tensor.shape[0])
                    } else {
                        (importance.of_tensor(name)?, 1)
                    };
                    (columns.len() == matrices * cols).then_some(columns)
                });
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
    use std::ops::ControlFlow;

    use minke_cpu::Level;
    use minke_model::{DType, Model, Precision};
    use minke_num::rng;

    use crate::gguf::gguf_tensors;
    use crate::gguf::tests::random_source;

    #[test]
    fn blocks_are_the_same_on_every_level() {
        let cols = 512;
        let mut x = vec![0.0; 3 * cols];
        rng::fill_normal(1, 2, 0.02, &mut x);
        let importance: Vec<f32> = (0..2 * cols).map(|i| rng::uniform_f64(3, 4, i as u64) as f32).collect();
        for format in BlockFormat::ALL {
            for importance in [None, Some(&importance[..cols]), Some(&importance[..])] {
                let alike = importance.map_or(4, |columns| 4 * cols / columns.len());
                let row = format.row_bytes(cols).expect("whole blocks");
                let encoded = |level| {
                    let mut out = vec![0; 3 * row];
                    let rows =
                        EncodeRows { format, x: &x, cols, importance, alike, first: 1, out: &mut out, row };
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

    /// Keys that are turned over are weighed by what queries were seen to be, each head by its own.
    #[test]
    fn keys_that_are_turned_over_err_less_where_queries_are_large() {
        let (heads, nope, latent) = (3, 64, 24);
        let json = serde_json::json!({
            "model_type": "deepseek_v3", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads,
            "qk_nope_head_dim": nope, "qk_rope_head_dim": 8, "v_head_dim": 32, "kv_lora_rank": latent,
            "q_lora_rank": null, "first_k_dense_replace": 2, "max_position_embeddings": 64,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": true,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        });
        let config = Config::from_json(&json).unwrap();
        let cpu = Cpu::detect(2);
        let mut model = Model::random(config.clone(), Precision::uniform(DType::F32), 3);
        // queries of one head are larger than those of the next, and so are some of its columns
        let query = model.params.find("model.layers.1.self_attn.q_proj.weight").unwrap();
        let range = model.params.entries[query].range.clone();
        for (row, weights) in model.params.data[range].chunks_mut(config.hidden_size).enumerate() {
            let scale = 1.0 + ((row * 7) % 13) as f32;
            for w in weights {
                *w *= scale;
            }
        }
        model.params.changed();
        let tokens: Vec<u32> = (0..200).map(|i| i * i % 96).collect();
        let mut on_progress = |_, _| ControlFlow::Continue(());
        let importance =
            Importance::measure(&mut model, &cpu, None, &tokens, &mut on_progress).unwrap().unwrap();
        let keys = importance.of_keys("model.layers.1.self_attn.kv_b_proj.weight").unwrap();
        assert_eq!(keys.len(), heads * nope);
        let tensor = gguf_tensors(&config).unwrap();
        let tensor = tensor.iter().find(|tensor| tensor.name == "blk.1.attn_k_b.weight").unwrap();
        assert_eq!(tensor.shape, [heads, latent, nope]);
        let numbers = tensor.read(&random_source(&config, 5), 0).unwrap();
        let error = |importance: Option<&Importance>| {
            let mut quantizer = Quantizer::new(&cpu, Mix::Q4_0, &config, importance);
            let stored = quantizer.store(tensor, 0, &numbers).unwrap();
            assert_eq!(quantizer.weighted, usize::from(importance.is_some()));
            let mut decoded = vec![0.0; numbers.len()];
            decode(BlockFormat::Q4_0, &stored, &mut decoded);
            let of_head = |(head, (x, y)): (usize, (&[f32], &[f32]))| -> f64 {
                let weights = keys[head * nope..][..nope].iter().cycle();
                x.iter().zip(y).zip(weights).map(|((x, y), w)| f64::from(w * (x - y) * (x - y))).sum()
            };
            let of_heads = |x: &[f32]| x.len() / heads;
            numbers
                .chunks(of_heads(&numbers))
                .zip(decoded.chunks(of_heads(&decoded)))
                .enumerate()
                .map(of_head)
                .collect::<Vec<f64>>()
        };
        let (plain, weighed) = (error(None), error(Some(&importance)));
        for (head, (plain, weighed)) in plain.iter().zip(&weighed).enumerate() {
            assert!(*weighed < 0.9 * plain, "head {head}: {weighed}, without importance {plain}");
        }
    }
}
