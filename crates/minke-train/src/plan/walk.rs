//! A training pass without its arithmetic: which buffers it asks for, in which order, and what it would compute.
//!
//! The operations are those of `minke-tensor`, call by call and buffer by buffer, with the same scopes, so that what is
//! held at the end is what the pool of tensors holds, to the byte: a test compares the two. An operation that is changed
//! there is changed here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use minke_cpu::DType;
use minke_cpu::attention::AttentionShape;
use minke_model::config::{AttentionKind, Config, FfnKind, MoeConfig};
use minke_model::{Precision, Recompute};

/// Something that a pass computes, in which time is measured; equal work is counted, not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the letters of the kernels")]
pub enum Work {
    /// `y = x Wᵀ` or `dx = dy W`: x [rows, k], y [rows, n], rows shared out over groups.
    Product { rows: usize, k: usize, n: usize, groups: usize, weights: DType, x: DType, y: DType },
    /// `dW = dyᵀ x`: dy [rows, m], x [rows, n].
    Gradient { rows: usize, m: usize, n: usize, groups: usize, weights: DType, x: DType },
    /// Causal attention over whole sequences; backward where `back`.
    Attention { heads: usize, kv_heads: usize, qk: usize, v: usize, dtype: DType, back: bool },
    /// Logits and their gradients of a chunk of rows.
    Head { rows: usize, d: usize, vocabulary: usize, dtype: DType },
    /// A norm of rows, with an addition before it, or its way back.
    Norm { rows: usize, d: usize, x: DType, y: DType, back: bool },
    /// The gated product of a feed-forward block, or its way back.
    Swiglu { rows: usize, f: usize, dtype: DType, back: bool },
}

/// What a walk found.
#[derive(Debug, Default)]
pub struct Found {
    /// Bytes of all buffers of tensors, which are kept when they are given back.
    pub held_bytes: u64,
    /// Of these, the bytes that something was ever written to: a buffer may be a little larger than what is in it.
    pub tensor_bytes: u64,
    /// Of these, what is kept for the way back when it begins.
    pub kept_bytes: u64,
    /// What is computed, and how often.
    pub work: HashMap<Work, u64>,
    /// Bytes that everything else reads and writes: copies, rotations, routing, embeddings, sums.
    pub moved_bytes: u64,
}

/// Buffers by size class, as in the pool of tensors.
#[derive(Default)]
struct Pool {
    /// Free buffers, and of how many bytes of each something was ever written.
    free: HashMap<u64, Vec<u64>>,
    held: u64,
    /// Now in use.
    used: u64,
    touched: u64,
}

struct Block {
    class: u64,
    touched: u64,
    pool: Rc<RefCell<Pool>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut pool = self.pool.borrow_mut();
        pool.used -= self.class;
        pool.free.entry(self.class).or_default().push(self.touched);
    }
}

/// A tensor without elements.
#[derive(Clone)]
struct Tensor {
    /// Held for as long as the tensor is there.
    #[expect(dead_code, reason = "its end is what counts")]
    block: Rc<Block>,
    rows: usize,
    cols: usize,
    dtype: DType,
}

#[derive(Clone)]
struct Var {
    value: Tensor,
    id: usize,
}

#[derive(Clone, Copy)]
struct Slot {
    id: usize,
    cols: usize,
    dtype: DType,
}

impl Var {
    fn slot(&self) -> Slot {
        Slot { id: self.id, cols: self.value.cols, dtype: self.value.dtype }
    }
}

type Step = Box<dyn FnOnce(&mut Walk)>;

#[derive(Clone, Copy, PartialEq)]
enum Tracking {
    Tape,
    Checkpoint,
}

struct Walk {
    pool: Rc<RefCell<Pool>>,
    tracking: Tracking,
    tape: Vec<Step>,
    grads: Vec<Option<Tensor>>,
    model: Rc<Shapes>,
    n: usize,
    work: HashMap<Work, u64>,
    moved_bytes: u64,
}

/// What the operations ask of a model.
struct Shapes {
    config: Config,
    precision: Precision,
    balance: bool,
}

impl Shapes {
    fn embedding(&self) -> DType {
        if self.config.tie_word_embeddings { self.precision.head } else { DType::F32 }
    }

    fn attention(&self) -> AttentionShape {
        let config = &self.config;
        let heads = config.num_attention_heads;
        AttentionShape {
            heads,
            kv_heads: match config.attention {
                AttentionKind::Mla { .. } => heads,
                AttentionKind::Gqa { num_key_value_heads, .. } => num_key_value_heads,
            },
            qk_dim: config.qk_head_dim(),
            v_dim: config.v_head_dim(),
            scale: 1.0,
        }
    }
}

/// Walks through one micro-batch of `n` rows: forward, backward.
pub fn walk(config: &Config, precision: Precision, recompute: Recompute, balance: bool, n: usize) -> Found {
    let model = Rc::new(Shapes { config: config.clone(), precision, balance });
    let mut cx = Walk {
        pool: Rc::default(),
        tracking: Tracking::Tape,
        tape: Vec::new(),
        grads: Vec::new(),
        model,
        n,
        work: HashMap::new(),
        moved_bytes: 0,
    };
    let kept_bytes = cx.train_step(recompute);
    let pool = cx.pool.borrow();
    Found {
        held_bytes: pool.held,
        tensor_bytes: pool.touched,
        kept_bytes,
        work: cx.work.clone(),
        moved_bytes: cx.moved_bytes,
    }
}

/// The residual stream and a block's output that is not yet added to it.
type State = (Var, Option<Var>);

impl Walk {
    fn uninit(&mut self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let bytes = (rows as u64).saturating_mul((cols * dtype.size_bytes()) as u64).min(1 << 50);
        let step = (bytes.max(64).next_power_of_two() / 16).max(64);
        let class = bytes.max(64).next_multiple_of(step);
        let mut pool = self.pool.borrow_mut();
        let found = pool.free.get_mut(&class).and_then(Vec::pop);
        pool.held += if found.is_none() { class } else { 0 };
        pool.used += class;
        let before = found.unwrap_or(0);
        let touched = before.max(bytes);
        pool.touched += touched - before;
        let block = Rc::new(Block { class, touched, pool: self.pool.clone() });
        Tensor { block, rows, cols, dtype }
    }

    fn var(&mut self, value: Tensor) -> Var {
        self.grads.push(None);
        Var { value, id: self.grads.len() - 1 }
    }

    fn record(&mut self, step: impl FnOnce(&mut Walk) + 'static) {
        if self.tracking == Tracking::Tape {
            self.tape.push(Box::new(step));
        }
    }

    fn take_grad(&mut self, of: Slot) -> Option<Tensor> {
        self.grads[of.id].take()
    }

    fn add_grad(&mut self, of: Slot, grad: Tensor) {
        self.grads[of.id] = Some(match self.grads[of.id].take() {
            None => grad,
            Some(before) => {
                let sum = self.uninit(grad.rows, grad.cols, before.dtype);
                self.moves(&[&before, &grad, &sum]);
                sum
            }
        });
    }

    fn unwind(&mut self) {
        for step in std::mem::take(&mut self.tape).into_iter().rev() {
            step(self);
        }
    }

    fn does(&mut self, work: Work) {
        *self.work.entry(work).or_default() += 1;
    }

    /// A pass over memory that reads or writes these.
    fn moves(&mut self, tensors: &[&Tensor]) {
        self.moved_bytes +=
            tensors.iter().map(|t| (t.rows * t.cols * t.dtype.size_bytes()) as u64).sum::<u64>();
    }

    fn embedding(&mut self) -> Var {
        let (d, dtype) = (self.model.config.hidden_size, self.model.embedding());
        let mut y = self.uninit(self.n, d, dtype);
        self.moves(&[&y, &y]);
        y = self.converted(&y, DType::F32);
        let y = self.var(y);
        let out = y.slot();
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            cx.moves(&[&d_y, &d_y, &d_y]);
        });
        y
    }

    fn converted(&mut self, x: &Tensor, dtype: DType) -> Tensor {
        if x.dtype == dtype {
            return x.clone();
        }
        let y = self.uninit(x.rows, x.cols, dtype);
        self.moves(&[x, &y]);
        y
    }

    fn product(&mut self, x: &Tensor, groups: usize, n: usize, weights: DType, y: &Tensor) {
        self.does(Work::Product { rows: y.rows, k: x.cols, n, groups, weights, x: x.dtype, y: y.dtype });
    }

    fn gradient(&mut self, d_y: &Tensor, x: &Tensor, rows: usize, groups: usize, weights: DType) {
        self.does(Work::Gradient { rows, m: d_y.cols, n: x.cols, groups, weights, x: x.dtype });
    }

    /// `y = x Wᵀ` or `dx = dy W`
    fn matmul(&mut self, x: &Tensor, n: usize, weights: DType, dtype: DType) -> Tensor {
        let y = self.uninit(x.rows, n, dtype);
        self.product(x, 1, n, weights, &y);
        y
    }

    fn linear(&mut self, x: &Var, n: usize, weights: DType, dtype: DType) -> Var {
        let y = self.matmul(&x.value, n, weights, dtype);
        let kept = kept(&x.value, weights);
        let y = self.var(y);
        let (x, out) = (x.slot(), y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            cx.gradient(&d_y, &kept, d_y.rows, 1, weights);
            let d_x = cx.matmul(&d_y, x.cols, weights, x.dtype);
            cx.add_grad(x, d_x);
        });
        y
    }

    fn concat(&mut self, a: &Var, b: &Var) -> Var {
        let y = self.uninit(a.value.rows, a.value.cols + b.value.cols, a.value.dtype);
        self.moves(&[&y, &y]);
        let y = self.var(y);
        let (parts, out) = ([a.slot(), b.slot()], y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            for part in parts {
                let d = cx.uninit(d_y.rows, part.cols, part.dtype);
                cx.moves(&[&d, &d]);
                cx.add_grad(part, d);
            }
        });
        y
    }

    fn rmsnorm(&mut self, x: &Var, dtype: DType) -> Var {
        let (n, d) = (x.value.rows, x.value.cols);
        let y = self.uninit(n, d, dtype);
        let rstd = self.uninit(n, 1, DType::F32);
        let norm = |back| Work::Norm { rows: n, d, x: x.value.dtype, y: dtype, back };
        self.does(norm(false));
        let (y, back) = (self.var(y), norm(true));
        let (x, out) = (x.clone(), y.slot());
        self.record(move |cx| {
            let Some(_d_y) = cx.take_grad(out) else { return };
            let d_x = cx.uninit(n, d, x.value.dtype);
            cx.does(back);
            cx.add_grad(x.slot(), d_x);
            drop(rstd);
        });
        y
    }

    fn add_rmsnorm(&mut self, x: &Var, delta: &Var, dtype: DType) -> (Var, Var) {
        let (n, d) = (x.value.rows, x.value.cols);
        let (sum, y) = (self.uninit(n, d, DType::F32), self.uninit(n, d, dtype));
        let rstd = self.uninit(n, 1, DType::F32);
        let norm = |back| Work::Norm { rows: n, d, x: DType::F32, y: dtype, back };
        self.does(norm(false));
        self.moves(&[&delta.value]);
        let (sum, y, back) = (self.var(sum), self.var(y), norm(true));
        let (x, delta, s, out) = (x.slot(), delta.slot(), sum.clone(), y.slot());
        self.record(move |cx| {
            let d_sum = cx.take_grad(s.slot());
            let d = match cx.take_grad(out) {
                Some(_d_y) => {
                    let d = cx.uninit(n, d, DType::F32);
                    cx.does(back);
                    d
                }
                None => match d_sum.clone() {
                    Some(d) => d,
                    None => return,
                },
            };
            let d_delta = cx.converted(&d, delta.dtype);
            cx.add_grad(delta, d_delta);
            cx.add_grad(x, d);
            drop((d_sum, rstd));
        });
        (sum, y)
    }

    /// Attention proper: its result, and what its way back reads.
    fn attend(&mut self, q: Tensor, k: Tensor, v: Tensor) -> (Tensor, [Tensor; 5]) {
        let shape = self.model.attention();
        let out = self.uninit(self.n, shape.heads * shape.v_dim, v.dtype);
        let lse = self.uninit(self.n, shape.heads, DType::F32);
        self.does(attention(&shape, q.dtype, false));
        (out.clone(), [q, k, v, out, lse])
    }

    fn attend_backward(&mut self, [q, k, v, ..]: &[Tensor; 5]) -> [Tensor; 3] {
        let shape = self.model.attention();
        self.does(attention(&shape, q.dtype, true));
        [q, k, v].map(|x| self.uninit(x.rows, x.cols, x.dtype))
    }

    fn mla(&mut self, q: &Var, kv_a: &Var, c: usize) -> Var {
        let (shape, n) = (self.model.attention(), self.n);
        let (act, stride) = (q.value.dtype, kv_a.value.cols);
        let nope = shape.qk_dim - self.model.config.rotary_dim();
        let wide = shape.heads * (nope + shape.v_dim);
        let (latent, normed, rstd) =
            (self.uninit(n, c, act), self.uninit(n, c, act), self.uninit(n, 1, DType::F32));
        self.moves(&[&latent, &latent]);
        self.does(Work::Norm { rows: n, d: c, x: act, y: act, back: false });
        let kv = self.matmul(&normed, wide, act, act);
        let q_turned = self.uninit(n, q.value.cols, act);
        let k = self.uninit(n, shape.heads * shape.qk_dim, act);
        let v = self.uninit(n, shape.heads * shape.v_dim, act);
        self.moves(&[&q.value, &q_turned, &kv, &k, &v]);
        drop(kv);
        let (out, attended) = self.attend(q_turned, k, v);
        let out = self.var(out);
        let (q, kv_a, result) = (q.slot(), kv_a.slot(), out.slot());
        self.record(move |cx| {
            let Some(_d_out) = cx.take_grad(result) else { return };
            let [d_q, d_k, d_v] = cx.attend_backward(&attended);
            let d_kv_a = cx.uninit(n, stride, act);
            let d_kv = cx.uninit(n, wide, act);
            cx.moves(&[&d_q, &d_q, &d_k, &d_v, &d_kv]);
            cx.gradient(&d_kv, &normed, n, 1, act);
            let _d_normed = cx.matmul(&d_kv, c, act, act);
            {
                let d_latent = cx.uninit(n, c, act);
                cx.does(Work::Norm { rows: n, d: c, x: act, y: act, back: true });
                cx.moves(&[&d_latent, &d_latent]);
            }
            cx.add_grad(q, d_q);
            cx.add_grad(kv_a, d_kv_a);
            drop((latent, rstd, attended));
        });
        out
    }

    fn gqa(&mut self, q: &Var, k: &Var, v: &Var) -> Var {
        let [q_turned, k_turned] = [q, k].map(|x| {
            let turned = self.uninit(x.value.rows, x.value.cols, x.value.dtype);
            self.moves(&[&x.value, &turned]);
            turned
        });
        let (out, attended) = self.attend(q_turned, k_turned, v.value.clone());
        let out = self.var(out);
        let (slots, result) = ([q.slot(), k.slot(), v.slot()], out.slot());
        self.record(move |cx| {
            let Some(_d_out) = cx.take_grad(result) else { return };
            let grads = cx.attend_backward(&attended);
            cx.moves(&[&grads[0], &grads[0], &grads[1], &grads[1]]);
            for (slot, grad) in slots.into_iter().zip(grads) {
                cx.add_grad(slot, grad);
            }
        });
        out
    }

    /// Returns (y, gate and up).
    fn ffn_forward(&mut self, x: &Tensor, f: usize, weights: DType, dtype: DType) -> (Tensor, Tensor) {
        let gu = self.matmul(x, 2 * f, weights, weights);
        let h = self.uninit(x.rows, f, weights);
        self.does(Work::Swiglu { rows: x.rows, f, dtype: weights, back: false });
        let y = self.matmul(&h, x.cols, weights, dtype);
        (y, gu)
    }

    fn ffn_backward(&mut self, x: &Tensor, gu: &Tensor, d_y: &Tensor, weights: DType) -> Tensor {
        let (n, f) = (x.rows, gu.cols / 2);
        let _d_h = self.matmul(d_y, f, weights, gu.dtype);
        let (h, d_gu) = (self.uninit(n, f, gu.dtype), self.uninit(n, 2 * f, gu.dtype));
        self.does(Work::Swiglu { rows: n, f, dtype: gu.dtype, back: true });
        self.gradient(d_y, &h, n, 1, weights);
        self.gradient(&d_gu, x, n, 1, weights);
        self.matmul(&d_gu, x.cols, weights, x.dtype)
    }

    fn dense(&mut self, x: &Var, f: usize) -> Var {
        let weights = self.model.precision.linear;
        let (y, gu) = self.ffn_forward(&x.value, f, weights, weights);
        let y = self.var(y);
        let (x, out) = (x.clone(), y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            let d_x = cx.ffn_backward(&x.value, &gu, &d_y, weights);
            cx.add_grad(x.slot(), d_x);
        });
        y
    }

    fn moe(&mut self, x: &Var, moe: &MoeConfig) -> Var {
        let (n, d, e, k) = (self.n, x.value.cols, moe.n_routed_experts, moe.num_experts_per_tok);
        let (f, act) = (moe.moe_intermediate_size, self.model.precision.expert);
        let (linear, router) = (self.model.precision.linear, self.model.precision.router);
        let slots = n * k;
        let scores = {
            let logits = self.matmul(&x.value, e, router, DType::F32);
            let scores = self.uninit(n, e, DType::F32);
            self.moves(&[&logits, &logits, &scores]);
            scores
        };
        let (gu, y_slots) = {
            let gu = self.uninit(slots, 2 * f, act);
            self.product(&x.value, e, 2 * f, act, &gu);
            let h = self.uninit(slots, f, act);
            self.does(Work::Swiglu { rows: slots, f, dtype: act, back: false });
            let y = self.uninit(slots, d, act);
            self.product(&h, e, d, act, &y);
            (gu, y)
        };
        let shared = (moe.n_shared_experts > 0)
            .then(|| self.ffn_forward(&x.value, f * moe.n_shared_experts, linear, act));
        let y = self.uninit(n, d, act);
        self.moves(&[&y_slots, &y, &y]);
        drop(y_slots);
        let y = self.var(y);
        let shared_gu = shared.map(|(_, gu)| gu);
        let (x, out) = (x.clone(), y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            let d_shared = shared_gu.as_ref().map(|gu| cx.ffn_backward(&x.value, gu, &d_y, linear));
            let d_h = cx.uninit(slots, f, act);
            cx.product(&d_y, e, f, act, &d_h);
            let _d_weights = cx.uninit(n, k, DType::F32);
            let (h, d_gu) = {
                let _by_slot = cx.uninit(slots, 1, DType::F32);
                let _d_by_slot = cx.uninit(slots, 1, DType::F32);
                let parts = (cx.uninit(slots, f, act), cx.uninit(slots, 2 * f, act));
                cx.does(Work::Swiglu { rows: slots, f, dtype: act, back: true });
                parts
            };
            drop(d_h);
            cx.gradient(&d_y, &h, slots, e, act);
            cx.gradient(&d_gu, &x.value, slots, e, act);
            let d_x_slots = cx.uninit(slots, d, act);
            cx.product(&d_gu, e, d, act, &d_x_slots);
            let d_router = {
                let d_logits = cx.uninit(n, e, DType::F32);
                let _d_scores = cx.model.balance.then(|| cx.uninit(n, e, DType::F32));
                cx.moves(&[&d_logits, &d_logits, &scores]);
                cx.gradient(&d_logits, &x.value, n, 1, router);
                cx.matmul(&d_logits, d, router, DType::F32)
            };
            let d_x = cx.uninit(n, d, x.value.dtype);
            let sum = cx.uninit(n, d, DType::F32);
            if let Some(d_shared) = &d_shared {
                cx.moves(&[&d_router, d_shared, &sum]);
            }
            cx.moves(&[&d_x_slots, &sum, &d_x]);
            drop((sum, d_x_slots, d_gu, h));
            cx.add_grad(x.slot(), d_x);
            drop(gu);
        });
        y
    }

    fn normed(&mut self, (x, delta): State, dtype: DType) -> (Var, Var) {
        match delta {
            None => {
                let y = self.rmsnorm(&x, dtype);
                (x, y)
            }
            Some(delta) => self.add_rmsnorm(&x, &delta, dtype),
        }
    }

    fn attention(&mut self, y: &Var) -> Var {
        let (model, act) = (self.model.clone(), self.model.precision.attention);
        let (config, shape) = (&model.config, model.attention());
        let attended = match config.attention {
            AttentionKind::Mla { q_lora_rank, kv_lora_rank, qk_rope_head_dim, .. } => {
                let queries = shape.heads * shape.qk_dim;
                let q = match q_lora_rank {
                    None => self.linear(y, queries, act, act),
                    Some(rank) => {
                        let low = self.linear(y, rank, act, act);
                        let low = self.rmsnorm(&low, act);
                        self.linear(&low, queries, act, act)
                    }
                };
                let kv_a = self.linear(y, kv_lora_rank + qk_rope_head_dim, act, act);
                self.mla(&q, &kv_a, kv_lora_rank)
            }
            AttentionKind::Gqa { .. } => {
                let [q, k, v] = [shape.heads, shape.kv_heads, shape.kv_heads]
                    .map(|heads| self.linear(y, heads * shape.qk_dim, act, act));
                self.gqa(&q, &k, &v)
            }
        };
        self.linear(&attended, config.hidden_size, act, act)
    }

    fn layer_once(&mut self, layer: usize, state: State) -> [Var; 2] {
        let model = self.model.clone();
        let (x, y) = self.normed(state, model.precision.attention);
        let attended = self.attention(&y);
        let kind = model.config.ffn(layer);
        let act = match kind {
            FfnKind::Dense { .. } => model.precision.linear,
            FfnKind::Moe(_) => model.precision.expert,
        };
        let (x, y) = self.add_rmsnorm(&x, &attended, act);
        let out = match &kind {
            FfnKind::Dense { intermediate_size } => self.dense(&y, *intermediate_size),
            FfnKind::Moe(moe) => self.moe(&y, moe),
        };
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
        let (n, d, dtype) = (self.n, x.value.cols, self.model.precision.head);
        let vocabulary = self.model.config.vocab_size;
        let d_x = self.uninit(n, d, x.value.dtype);
        let chunk = minke_tensor::ops::head_chunk_rows(vocabulary);
        for start in (0..n).step_by(chunk) {
            let rows = chunk.min(n - start);
            let d_logits = self.uninit(rows, vocabulary, dtype);
            self.does(Work::Head { rows, d, vocabulary, dtype });
            self.gradient(&d_logits, &x.value, rows, 1, dtype);
            let (k, x, y) = (vocabulary, d_logits.dtype, x.value.dtype);
            self.does(Work::Product { rows, k, n: d, groups: 1, weights: dtype, x, y });
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
        let kept = self.pool.borrow().used;
        self.unwind();
        drop(state);
        kept
    }

    fn module(&mut self, layer: usize, recompute: Recompute, h: &Var) -> Var {
        let (d, act) = (self.model.config.hidden_size, self.model.precision.linear);
        let embedded = self.embedding();
        let h = h.clone();
        let embedded = self.rmsnorm(&embedded, act);
        let state = self.rmsnorm(&h, act);
        let joined = self.concat(&embedded, &state);
        let x = self.linear(&joined, d, act, DType::F32);
        let out = self.layer(layer, recompute, (x, None));
        let head = self.model.precision.head;
        self.normed(out, head).1
    }
}

/// The form in which a product's left operand waits for the way back: as it came. A narrower one, such as a byte with
/// scales, would be a tensor of its own, made here.
fn kept(x: &Tensor, weights: DType) -> Tensor {
    match weights {
        DType::F32 | DType::Bf16 => x.clone(),
    }
}

fn attention(shape: &AttentionShape, dtype: DType, back: bool) -> Work {
    let AttentionShape { heads, kv_heads, qk_dim: qk, v_dim: v, .. } = *shape;
    Work::Attention { heads, kv_heads, qk, v, dtype, back }
}
