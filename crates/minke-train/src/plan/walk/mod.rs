//! A training pass without its arithmetic: which buffers it asks for, in which order, and what it would compute.
//!
//! The operations are those of `minke-tensor`, call by call and buffer by buffer, with the same scopes, so that buffers
//! get the same places and what is held at the end is what tensors hold, to the byte: a test compares the two. An operation that is changed
//! there is changed here.

use std::collections::HashMap;
use std::rc::Rc;

use minke_cpu::DType;
use minke_cpu::fp8::Fp8;
use minke_model::config::{AttentionKind, Config, FfnKind, ProjectionBias};
use minke_model::spec::{self, Role};
use minke_model::{Precision, Recompute};

mod ffn;
mod ops;
mod tape;

use super::Kinds;
use tape::{Input, Shared, Tracking, Var, Walk, WeightGrads};

/// How products read a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Weights {
    /// What they compute in; of activations where they are in FP8.
    pub dtype: DType,
    /// How operands are coded, if they are in FP8.
    pub fp8: Option<Fp8>,
}

/// Something that a pass computes, in which time is measured; equal work is counted, not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the letters of the kernels")]
pub enum Work {
    /// `y = x Wᵀ` or `dx = dy W`: x [rows, k], y [rows, n], rows shared out over groups; k in parts that are coded by
    /// themselves, on their way where x is `passing`.
    Product {
        rows: usize,
        k: usize,
        parts: usize,
        n: usize,
        groups: usize,
        weights: Weights,
        x: DType,
        passing: bool,
        y: DType,
    },
    /// `dW = dyᵀ x`: dy [rows, m], x [rows, n], which waited as codes where it is `coded`.
    Gradient { rows: usize, m: usize, n: usize, groups: usize, weights: Weights, x: DType, coded: bool },
    /// Codes of rows, cut in so many parts; or, `back`, the numbers of codes.
    Coding { rows: usize, cols: usize, parts: usize, dtype: DType, how: Fp8, back: bool },
    /// Causal attention over whole sequences, through a window where there is one; backward where `back`.
    Attention {
        heads: usize,
        kv_heads: usize,
        qk: usize,
        v: usize,
        window: Option<usize>,
        dtype: DType,
        back: bool,
    },
    /// Logits and their gradients of a chunk of rows.
    Head { rows: usize, d: usize, vocabulary: usize, dtype: DType },
    /// A norm of rows, with an addition before it; or its way back, which reads x as it was kept.
    Norm { rows: usize, d: usize, x: DType, kept: DType, y: DType, back: bool },
    /// The gated product of a feed-forward block, or its way back.
    Swiglu { rows: usize, f: usize, dtype: DType, back: bool },
}

/// What a walk found.
#[derive(Debug, Default)]
pub struct Found {
    /// Bytes that tensors hold, gradients of weights among them.
    pub tensor_bytes: u64,
    /// The same if weights had no gradients.
    pub values_bytes: u64,
    /// Of these, what is kept for the way back when it begins.
    pub kept_bytes: u64,
    /// What is computed, and how often.
    pub work: HashMap<Work, u64>,
    /// Bytes that everything else reads and writes: copies, rotations, routing, embeddings, sums.
    pub moved_bytes: u64,
}

/// What the operations ask of a model.
struct Shapes {
    config: Config,
    precision: Precision,
    balance: bool,
    /// Whether norms keep what they read in bf16.
    any_fp8: bool,
}

impl Shapes {
    fn kinds(&self) -> Kinds {
        self.precision.into()
    }

    fn embedding(&self) -> DType {
        if self.config.tie_word_embeddings { self.precision.head } else { DType::F32 }
    }
}

/// Walks through a step of `micro` micro-batches of `n` rows each: forward, backward. Work is that of one of them.
pub fn walk(
    config: &Config,
    precision: Precision,
    recompute: Recompute,
    balance: bool,
    n: usize,
    micro: usize,
) -> Found {
    let any_fp8 = super::weights(config, precision).iter().any(|weight| weight.kind.fp8.is_some());
    let model = Rc::new(Shapes { config: config.clone(), precision, balance, any_fp8 });
    let pass = |wanted| {
        let tied = config.tie_word_embeddings;
        let mut cx = Walk {
            pool: Rc::default(),
            weight_grads: WeightGrads { wanted, first: true, tied, ..WeightGrads::default() },
            tracking: Tracking::Tape,
            tape: Vec::new(),
            grads: Vec::new(),
            coded: None,
            model: model.clone(),
            n,
            work: HashMap::new(),
            moved_bytes: 0,
        };
        let kept_bytes = cx.train_step(recompute);
        (kept_bytes, cx)
    };
    let (kept_bytes, alone) = pass(false);
    let (_, mut cx) = pass(true);
    if micro > 1 {
        // values of the second lie beside gradients; later ones are as the second
        (cx.weight_grads.first, cx.grads) = (false, Vec::new());
        cx.train_step(recompute);
    }
    let held = |cx: &Walk| cx.pool.borrow().held_bytes() as u64;
    Found {
        tensor_bytes: held(&cx),
        values_bytes: held(&alone),
        kept_bytes,
        work: alone.work.clone(),
        moved_bytes: alone.moved_bytes,
    }
}

/// The residual stream and a block's output that is not yet added to it.
type State = (Var, Option<Var>);

impl Walk {
    fn normed(&mut self, (x, delta): State, dtype: DType) -> (Var, Var) {
        match delta {
            None => {
                let y = self.rmsnorm(&x, dtype);
                (x, y)
            }
            Some(delta) => self.add_rmsnorm(&x, &delta, dtype),
        }
    }

    fn attention(&mut self, y: &Var, layer: usize) -> Var {
        let (model, weights) = (self.model.clone(), self.model.kinds().attention);
        let act = weights.dtype;
        let (config, shape) = (&model.config, self.shape(layer));
        let (attended, biased) = match config.attention {
            AttentionKind::Mla { q_lora_rank, kv_lora_rank, qk_rope_head_dim, .. } => {
                let queries = shape.heads * shape.qk_dim;
                let kv_a = self.linear(y, kv_lora_rank + qk_rope_head_dim, weights, act);
                let q = match q_lora_rank {
                    None => self.linear(y, queries, weights, act),
                    Some(rank) => {
                        let low = self.linear(y, rank, weights, act);
                        let low = self.rmsnorm(&low, act);
                        self.linear(&low, queries, weights, act)
                    }
                };
                (self.mla(&q, &kv_a, kv_lora_rank), false)
            }
            AttentionKind::Gqa { bias, qk_norm, .. } => {
                let [mut q, mut k, v] = [shape.heads, shape.kv_heads, shape.kv_heads].map(|heads| {
                    let n = heads * shape.qk_dim;
                    if bias == ProjectionBias::None {
                        self.linear(y, n, weights, act)
                    } else {
                        self.linear_biased(y, n, weights, act)
                    }
                });
                if qk_norm {
                    q = self.rmsnorm_of_heads(&q, shape.heads, act);
                    k = self.rmsnorm_of_heads(&k, shape.kv_heads, act);
                }
                (self.gqa(&q, &k, &v, &shape), bias == ProjectionBias::All)
            }
        };
        self.linear_of_kept(&attended, config.hidden_size, weights, act, biased)
    }

    fn layer_once(&mut self, layer: usize, state: State) -> [Var; 2] {
        let model = self.model.clone();
        let (x, y) = self.normed(state, model.precision.attention);
        let mut attended = self.attention(&y, layer);
        if model.config.post_norms {
            attended = self.rmsnorm(&attended, model.precision.attention);
        }
        let kind = model.config.ffn(layer);
        let act = match kind {
            FfnKind::Dense { .. } => model.precision.linear,
            FfnKind::Moe(_) => model.precision.expert,
        };
        let (x, y) = self.add_rmsnorm(&x, &attended, act);
        let mut out = match &kind {
            FfnKind::Dense { intermediate_size } if model.config.mlp_bias => {
                let (weights, f) = (model.kinds().linear, *intermediate_size);
                let gu = self.linear_biased_parts(&y, 2 * f, 2, weights, act);
                let h = self.gated_unit(&gu);
                self.linear_biased(&h, model.config.hidden_size, weights, act)
            }
            FfnKind::Dense { intermediate_size } => self.dense(&y, *intermediate_size),
            FfnKind::Moe(moe) => self.moe(&y, moe),
        };
        if model.config.post_norms {
            out = self.rmsnorm(&out, act);
        }
        [x, out]
    }

    fn layer(&mut self, layer: usize, recompute: Recompute, (x, delta): State) -> State {
        let [x, out] = match recompute {
            Recompute::None => self.layer_once(layer, (x, delta)),
            Recompute::Layer => {
                self.tracking = Tracking::Checkpoint;
                let outputs = self.layer_once(layer, (x.clone(), delta.clone()));
                self.tracking = Tracking::Tape;
                let slots = outputs.each_ref().map(Var::slot);
                self.record(move |cx| {
                    let grads = slots.map(|slot| cx.take_grad(slot));
                    let outer = (x.slot(), delta.as_ref().map(Var::slot));
                    let (x, delta) = (cx.var(x.value), delta.map(|delta| cx.var(delta.value)));
                    let inner = (x.slot(), delta.as_ref().map(Var::slot));
                    let outputs = cx.layer_once(layer, (x, delta)).map(|output| output.slot());
                    for (output, grad) in outputs.into_iter().zip(grads) {
                        if let Some(grad) = grad {
                            cx.add_grad(output, grad);
                        }
                    }
                    cx.unwind();
                    if let Some(grad) = cx.take_grad(inner.0) {
                        cx.add_grad(outer.0, grad);
                    }
                    if let (Some(inner), Some(outer)) = (inner.1, outer.1)
                        && let Some(grad) = cx.take_grad(inner)
                    {
                        cx.add_grad(outer, grad);
                    }
                });
                outputs
            }
        };
        (x, Some(out))
    }

    fn head_loss(&mut self, x: &Var) {
        let (n, d, weights) = (self.n, x.value.cols, self.model.kinds().head);
        let dtype = weights.dtype;
        let vocabulary = self.model.config.vocab_size;
        let d_x = self.uninit(n, d, x.value.dtype);
        let chunk = minke_tensor::ops::head_chunk_rows(vocabulary);
        for start in (0..n).step_by(chunk) {
            let rows = chunk.min(n - start);
            let d_logits = self.uninit(rows, vocabulary, dtype);
            self.does(Work::Head { rows, d, vocabulary, dtype });
            self.shared_grad_of(Shared::Head);
            self.weight_product(&d_logits, &Input::Plain(x.value.clone()), rows, 1, weights);
            let (k, x, y) = (vocabulary, d_logits.dtype, x.value.dtype);
            let passing = false;
            self.does(Work::Product { rows, k, parts: 1, n: d, groups: 1, weights, x, passing, y });
        }
        self.add_grad(x.slot(), d_x);
    }

    fn train_step(&mut self, recompute: Recompute) -> u64 {
        let model = self.model.clone();
        let (config, head) = (&model.config, model.precision.head);
        let mut state = (self.embedding(), None);
        for layer in 0..config.num_hidden_layers {
            state = self.layer(layer, recompute, state);
        }
        let h = self.normed(state, head).1;
        self.head_loss(&h);
        let mut state = h;
        for module in 0..config.num_nextn_predict_layers {
            state = self.module(config.num_hidden_layers + module, recompute, &state);
            self.head_loss(&state);
        }
        let kept = self.pool.borrow().used_bytes() - self.weight_grads.bytes();
        self.unwind();
        drop(state);
        self.settle_grads();
        kept as u64
    }

    /// The zeros of gradients that no operation wrote: of biases that routers have.
    fn settle_grads(&mut self) {
        let model = self.model.clone();
        for tensor in spec::tensors(&model.config).iter().filter(|tensor| tensor.role == Role::RouterBias) {
            self.weight_grad_of(tensor.numel());
        }
    }

    fn module(&mut self, layer: usize, recompute: Recompute, h: &Var) -> Var {
        let (d, weights) = (self.model.config.hidden_size, self.model.kinds().linear);
        let act = weights.dtype;
        let embedded = self.embedding();
        let h = h.clone();
        let embedded = self.rmsnorm(&embedded, act);
        let state = self.rmsnorm(&h, act);
        let joined = self.concat(&embedded, &state);
        let x = self.linear(&joined, d, weights, DType::F32);
        let out = self.layer(layer, recompute, (x, None));
        let head = self.model.precision.head;
        self.normed(out, head).1
    }
}
