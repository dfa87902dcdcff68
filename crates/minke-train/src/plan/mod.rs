//! What a recipe will need before anything runs: memory by formula, time from short measurements of this machine.
//!
//! Memory is weights, their packed copies, gradients, the optimizer's state, tensors as [`walk`] finds them, working
//! memory of the threads, and the process itself. Time is the same walk's list of work, each piece measured once at its
//! own shape, times how often it comes.

mod time;
mod walk;

use minke_cpu::attention;
use minke_cpu::fp8::{Cuts, Fp8};
use minke_cpu::gemm::{Compute, Packed, Packed8};
use minke_cpu::{Cpu, DType, Level};
use minke_data::Corpus;
use minke_model::config::{AttentionKind, Config, FfnKind};
use minke_model::spec;
use minke_model::{Precision, Recompute};
use serde::Serialize;

pub use time::Time;
pub use walk::{Found, Weights, Work, walk};

use crate::error::{Result, TrainError};
use crate::optim;
use crate::recipe::{Data, Optim, Optimizer, Resolved};

/// The program, its libraries, the stacks of its threads, and what the allocator holds back.
const PROCESS_BYTES: u64 = 24 << 20;
/// Bytes of a tokenizer for each of its tokens, in both directions and as the model's file.
const TOKENIZER_BYTES_PER_TOKEN: u64 = 500;
/// What preparing text, mapping it, and compressing what is held out leave behind: of any, for each byte, and at most.
const LEAST_DATA_BYTES: u64 = 8 << 20;
const DATA_BYTES_PER_BYTE: u64 = 2;
const MOST_DATA_BYTES: u64 = 64 << 20;
/// Elements of a weight above which its packed copies are shared while training, as the store of weights has it.
const SHARED_ELEMENTS: usize = 1 << 20;
/// Working memory of a thread for the operands of products.
const PRODUCT_BYTES: usize = 3 << 18;

/// Rows that go through the model at once, and what in a recipe says how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Rows, at most.
    pub rows: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// The recipe's key.
    pub key: &'static str,
    /// Rows that one more of the key's value adds.
    pub unit: usize,
    /// The recipe's key for the length of a sequence.
    pub length_key: &'static str,
}

impl Batch {
    /// `batch_size` sequences of one length.
    pub fn sequences(batch_size: usize, sequence_length: usize) -> Self {
        let rows = batch_size * sequence_length;
        let (key, length_key) = ("train.batch_size", "train.sequence_length");
        Self { rows, sequence_length, key, unit: sequence_length, length_key }
    }
}

/// Caches of the answers that a model writes at once to learn from, of which `rollout.concurrency` says how many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caches {
    /// Answers.
    pub answers: usize,
    /// Bytes of the cache of each.
    pub answer_bytes: u64,
}

impl Caches {
    fn bytes(self) -> u64 {
        self.answer_bytes.saturating_mul(self.answers as u64)
    }
}

/// What is trained, and how much of it goes through the model at once.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The model.
    pub config: Config,
    /// Types of products.
    pub precision: Precision,
    /// How gradients become steps.
    pub optim: Optim,
    /// What goes through the model at once.
    pub batch: Batch,
    /// What it writes at once; nothing where texts are given.
    pub caches: Caches,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Bytes of text that are prepared first; 0 for none.
    pub text_bytes: u64,
    /// Steps of the run.
    pub steps: u64,
}

impl From<&Resolved> for Shape {
    fn from(recipe: &Resolved) -> Self {
        let train = &recipe.train;
        Self {
            config: recipe.config.clone(),
            precision: recipe.precision.into(),
            optim: train.optim,
            batch: Batch::sequences(train.batch_size, train.sequence_length),
            caches: Caches::default(),
            accumulation: train.accumulation,
            text_bytes: text_bytes(&recipe.data),
            steps: recipe.steps(),
        }
    }
}

/// Bytes of the text that a recipe prepares; the most where its sources cannot be listed.
fn text_bytes(data: &Data) -> u64 {
    if data.random { 0 } else { Corpus::open(&data.specs()).map_or(u64::MAX, |corpus| corpus.total_bytes()) }
}

fn data_bytes(text: u64) -> u64 {
    let of_text = text.saturating_mul(DATA_BYTES_PER_BYTE).saturating_add(LEAST_DATA_BYTES);
    if text == 0 { 0 } else { of_text.min(MOST_DATA_BYTES) }
}

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The weights in f32.
    pub weights_bytes: u64,
    /// The weights as products read them.
    pub packed_bytes: u64,
    /// What their gradients add: most of them lie where values were, unless micro-batches add to them.
    pub gradients_bytes: u64,
    /// Moments and momentum, and what Muon works in.
    pub optimizer_bytes: u64,
    /// Values that are kept for the way back.
    pub activations_bytes: u64,
    /// Tensors of the operation in work, gradients of values and of logits.
    pub passing_bytes: u64,
    /// Working memory of the threads.
    pub threads_bytes: u64,
    /// The program, the tokenizer, and batches.
    pub process_bytes: u64,
    /// Preparing text, and what is held of it.
    pub data_bytes: u64,
    /// Caches of the answers that are written at once.
    #[serde(skip_serializing_if = "is_none")]
    pub caches_bytes: u64,
    /// All of it: the most that the process will hold.
    pub peak_bytes: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_none(bytes: &u64) -> bool {
    *bytes == 0
}

/// A weight of a product: [groups, rows, cols], `parts` matrices in the rows of a group.
struct Weight {
    groups: usize,
    rows: usize,
    cols: usize,
    parts: usize,
    kind: Weights,
}

/// How products read the weights of each kind of layer.
#[derive(Clone, Copy)]
struct Kinds {
    attention: Weights,
    linear: Weights,
    expert: Weights,
    router: Weights,
    head: Weights,
}

impl From<Precision> for Kinds {
    fn from(precision: Precision) -> Self {
        let Precision { linear, expert, attention, head, router, coded } = precision;
        let of = |dtype, fp8: bool| Weights { dtype, fp8: fp8.then_some(coded.how) };
        Self {
            attention: of(attention, coded.attention),
            linear: of(linear, coded.linear),
            expert: of(expert, coded.expert),
            router: of(router, false),
            head: of(head, false),
        }
    }
}

/// The weights that products read, as the model lays them out.
fn weights(config: &Config, precision: Precision) -> Vec<Weight> {
    let (d, heads) = (config.hidden_size, config.num_attention_heads);
    let Kinds { attention, linear, expert, router, head } = Kinds::from(precision);
    let mut all = Vec::new();
    let mut stacked = |groups, rows, cols, parts, kind| all.push(Weight { groups, rows, cols, parts, kind });
    stacked(1, config.vocab_size, d, 1, head);
    for layer in 0..config.num_hidden_layers + config.num_nextn_predict_layers {
        let mut add = |rows, cols, kind| stacked(1, rows, cols, 1, kind);
        if layer >= config.num_hidden_layers {
            add(d, 2 * d, linear);
        }
        let queries = heads * config.qk_head_dim();
        match config.attention {
            AttentionKind::Mla {
                q_lora_rank,
                kv_lora_rank: c,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
            } => {
                match q_lora_rank {
                    None => add(queries, d, attention),
                    Some(rank) => {
                        add(rank, d, attention);
                        add(queries, rank, attention);
                    }
                }
                add(c + qk_rope_head_dim, d, attention);
                add(heads * (qk_nope_head_dim + v_head_dim), c, attention);
            }
            AttentionKind::Gqa { num_key_value_heads, head_dim, .. } => {
                add(queries, d, attention);
                add(num_key_value_heads * head_dim, d, attention);
                add(num_key_value_heads * head_dim, d, attention);
            }
        }
        add(d, heads * config.v_head_dim(), attention);
        let mut block = |groups, f, kind| {
            stacked(groups, 2 * f, d, 2, kind);
            stacked(groups, d, f, 1, kind);
        };
        match config.ffn(layer) {
            FfnKind::Dense { intermediate_size } => block(1, intermediate_size, linear),
            FfnKind::Moe(moe) => {
                block(moe.n_routed_experts, moe.moe_intermediate_size, expert);
                if moe.n_shared_experts > 0 {
                    block(1, moe.n_shared_experts * moe.moe_intermediate_size, linear);
                }
                stacked(1, moe.n_routed_experts, d, 1, router);
            }
        }
    }
    all
}

fn compute(dtype: DType) -> Compute {
    match dtype {
        DType::F32 => Compute::F32,
        DType::Bf16 => Compute::Bf16,
    }
}

/// Bytes of the packed copies: each small weight its own two, all large ones the largest one's of each form.
fn packed_bytes(weights: &[Weight], level: Level) -> u64 {
    let (mut own, mut shared) = (0, [[0; 2]; 2]);
    for &Weight { groups, rows, cols, parts, kind } in weights {
        let both = if kind.fp8.is_some() {
            let of = |depth, n| Packed8::bytes_of(level, groups, depth, n, true) as u64;
            [of(Cuts::whole(cols), rows), of(Cuts::parts(rows, parts), cols)]
        } else {
            let of = |k, n| Packed::bytes_of(level, compute(kind.dtype), groups, k, n) as u64;
            [of(cols, rows), of(rows, cols)]
        };
        if groups * rows * cols > SHARED_ELEMENTS {
            for (most, bytes) in shared[usize::from(kind.fp8.is_some())].iter_mut().zip(both) {
                *most = bytes.max(*most);
            }
        } else {
            own += both[0] + both[1];
        }
    }
    own + shared.iter().flatten().sum::<u64>()
}

/// Elements that `AdamW` trains, those that Muon does, and the matrices of the latter by shape.
fn trained(config: &Config, optimizer: Optimizer) -> (u64, u64, Vec<(usize, usize)>) {
    let (mut adamw, mut muon, mut matrices) = (0, 0, Vec::new());
    for tensor in spec::tensors(config) {
        match optim::rule_of(tensor.role, optimizer) {
            optim::Rule::AdamW => adamw += tensor.numel() as u64,
            optim::Rule::Muon => {
                muon += tensor.numel() as u64;
                matrices.push((tensor.shape[0], tensor.shape[1]));
            }
            optim::Rule::None => {}
        }
    }
    (adamw, muon, matrices)
}

impl Shape {
    fn recompute(&self) -> Recompute {
        self.optim.recompute.into()
    }

    fn moments(&self) -> DType {
        self.optim.moments.dtype(self.precision, self.optim.betas)
    }

    fn found(&self) -> Found {
        let balance = self.optim.sequence_balance_alpha > 0.0;
        let Self { config, precision, batch, accumulation, .. } = self;
        walk(config, *precision, self.recompute(), balance, batch.rows, *accumulation)
    }

    /// Bytes that training on `threads` threads of this level takes at its peak.
    pub fn memory(&self, level: Level, threads: usize) -> Memory {
        self.memory_of(&self.found(), level, threads)
    }

    fn memory_of(&self, found: &Found, level: Level, threads: usize) -> Memory {
        let config = &self.config;
        let counts = spec::parameters(config);
        let parameters = counts.total + counts.mtp;
        let (adamw, muon, matrices) = trained(config, self.optim.optimizer);
        let moments = 2 * self.moments().size_bytes() as u64;
        // x, its transpose or Gram matrix, the polynomial, a packed operand
        let workspace = matrices.iter().map(|&(m, n)| 4 * (3 * m * n + m.min(n).pow(2))).max().unwrap_or(0);
        let of_attention = attention::scratch_bytes(&config.attention_shape(), self.batch.sequence_length);
        let thread = minke_cpu::loss::head_bytes(level, config.vocab_size).max(of_attention) + PRODUCT_BYTES;
        let batch = self.batch.rows * self.accumulation * (12 + 8 * config.num_nextn_predict_layers);
        let tokenizer = config.vocab_size as u64 * TOKENIZER_BYTES_PER_TOKEN;
        let mut memory = Memory {
            weights_bytes: 4 * parameters,
            packed_bytes: packed_bytes(&weights(config, self.precision), level),
            gradients_bytes: found.tensor_bytes.saturating_sub(found.values_bytes),
            optimizer_bytes: moments * adamw + 4 * muon + (workspace * threads) as u64,
            activations_bytes: found.kept_bytes.min(found.values_bytes),
            passing_bytes: found.values_bytes.saturating_sub(found.kept_bytes),
            threads_bytes: (thread * threads) as u64,
            process_bytes: PROCESS_BYTES + tokenizer + batch as u64,
            data_bytes: data_bytes(self.text_bytes),
            caches_bytes: self.caches.bytes(),
            peak_bytes: 0,
        };
        let Memory { weights_bytes, packed_bytes, gradients_bytes, optimizer_bytes, .. } = memory;
        let Memory { activations_bytes, passing_bytes, threads_bytes, process_bytes, .. } = memory;
        let Memory { data_bytes, caches_bytes, .. } = memory;
        memory.peak_bytes = [
            weights_bytes,
            packed_bytes,
            gradients_bytes,
            optimizer_bytes,
            activations_bytes,
            passing_bytes,
            threads_bytes,
            process_bytes,
            data_bytes,
            caches_bytes,
        ]
        .iter()
        .fold(0, |sum, &bytes| u64::saturating_add(sum, bytes));
        memory
    }

    /// What a step and the run will take on this machine; measures for some seconds.
    pub fn time(&self, cpu: &Cpu) -> Time {
        time::predict(self, &self.found(), cpu)
    }

    /// Whether it fits into `available_bytes`, and if not, what would.
    pub fn fit(&self, level: Level, threads: usize, available_bytes: Option<u64>) -> Fit {
        let needed_bytes = self.memory(level, threads).peak_bytes;
        let Some(available_bytes) = available_bytes else { return Fit::Unknown };
        if needed_bytes <= available_bytes {
            return Fit::Fits;
        }
        Fit::TooLarge(TooLarge {
            needed_bytes,
            available_bytes,
            ways: self.ways(level, threads, available_bytes),
            length_key: self.batch.length_key,
        })
    }

    /// Changes that make it smaller, each with what it then needs.
    fn ways(&self, level: Level, threads: usize, available_bytes: u64) -> Vec<Way> {
        let mut ways = Vec::new();
        let mut smallest = self.clone();
        let mut offer = |key: &'static str, value: String, shape: &Shape| {
            let needed_bytes = shape.memory(level, threads).peak_bytes;
            ways.push(Way { key, value, needed_bytes, fits: needed_bytes <= available_bytes });
            needed_bytes <= available_bytes
        };
        if self.recompute() == Recompute::None {
            smallest.optim.recompute = crate::recipe::Recompute::Layer;
            offer("train.recompute", "\"layer\"".to_owned(), &smallest);
        }
        let half = |precision: &Precision| precision.linear == DType::Bf16 && precision.expert == DType::Bf16;
        if !half(&self.precision) {
            let shape = Self { precision: Precision::uniform(DType::Bf16), ..self.clone() };
            smallest.precision = shape.precision;
            offer("precision", "\"bf16\"".to_owned(), &shape);
        } else if !self.precision.coded.any() {
            let shape = Self { precision: Precision::fp8(Fp8::default()), ..self.clone() };
            smallest.precision = shape.precision;
            offer("precision", "\"fp8\"".to_owned(), &shape);
        }
        if self.optim.optimizer == Optimizer::AdamW {
            let mut shape = self.clone();
            shape.optim.optimizer = Optimizer::Muon;
            offer("train.optimizer", "\"muon\"".to_owned(), &shape);
        }
        // half of a size, and half of that, until it fits or is the least
        let mut halve = |key, size: usize, least: usize, with: &dyn Fn(usize) -> Self| {
            let mut size = size / 2;
            while size >= least {
                let shape = with(size);
                if shape.memory(level, threads).peak_bytes <= available_bytes || size / 2 < least {
                    offer(key, size.to_string(), &shape);
                    break;
                }
                size /= 2;
            }
        };
        let Batch { rows, sequence_length, key, unit, .. } = self.batch;
        let least = sequence_length.div_ceil(unit.max(1)).max(1);
        let batch = |size: usize| Batch { rows: size * unit, ..self.batch };
        halve(key, rows / unit.max(1), least, &|size| Self { batch: batch(size), ..self.clone() });
        let caches = |answers: usize| Caches { answers, ..self.caches };
        halve("rollout.concurrency", self.caches.answers, 1, &|size| Self {
            caches: caches(size),
            ..self.clone()
        });
        (smallest.batch, smallest.caches) = (batch(least), caches(self.caches.answers.min(1)));
        let is_smaller = rows > smallest.batch.rows || self.caches != smallest.caches;
        if is_smaller && !ways.iter().any(|way| way.fits) {
            let needed_bytes = smallest.memory(level, threads).peak_bytes;
            let fits = needed_bytes <= available_bytes;
            ways.push(Way { key: "all of these", value: String::new(), needed_bytes, fits });
        }
        ways
    }
}

/// A change to a recipe, and what it then needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// The key.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// The peak with it.
    pub needed_bytes: u64,
    /// Whether that fits.
    pub fits: bool,
}

/// Whether a recipe fits into a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// It does.
    Fits,
    /// The system does not tell how much memory there is.
    Unknown,
    /// It does not.
    TooLarge(TooLarge),
}

/// Why a recipe does not fit, and what would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLarge {
    /// Its peak.
    pub needed_bytes: u64,
    /// What is there.
    pub available_bytes: u64,
    /// What could be changed.
    pub ways: Vec<Way>,
    /// The recipe's key for the length of a sequence.
    pub length_key: &'static str,
}

/// Refuses what does not fit into `available_bytes`; what a person is warned of where that is not known.
///
/// # Errors
/// [`TrainError::TooLarge`].
pub fn check(shape: &Shape, cpu: &Cpu, available_bytes: Option<u64>) -> Result<Option<&'static str>> {
    match shape.fit(cpu.level(), cpu.threads(), available_bytes) {
        Fit::Fits => Ok(None),
        Fit::Unknown => Ok(Some("the system does not tell how much memory there is: it may not be enough")),
        Fit::TooLarge(why) => Err(TrainError::TooLarge(why)),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
}

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { needed_bytes, available_bytes, ways, length_key } = self;
        write!(
            f,
            "training needs about {} of memory, and {} are available",
            gib(*needed_bytes),
            gib(*available_bytes)
        )?;
        for Way { key, value, needed_bytes, fits } in ways {
            let set = if value.is_empty() { (*key).to_owned() } else { format!("{key} = {value}") };
            let verdict = if *fits { "fits" } else { "still too much" };
            write!(f, "\n  with {set}: {} ({verdict})", gib(*needed_bytes))?;
        }
        let help = if ways.iter().any(|way| way.fits) {
            format!("change one of these, or {length_key}, or the model's size")
        } else {
            format!("make {length_key} or the model smaller (model.depth, hidden_size, experts)")
        };
        write!(f, "\n  = help: {help}")
    }
}
