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
use minke_cpu::fp8::{Cuts, Fp8};
use minke_model::config::{AttentionKind, Config, FfnKind, MoeConfig};
use minke_model::{Precision, Recompute};
use minke_tensor::size_class;

use super::Kinds;

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
    /// themselves.
    Product {
        rows: usize,
        k: usize,
        parts: usize,
        n: usize,
        groups: usize,
        weights: Weights,
        x: DType,
        y: DType,
    },
    /// `dW = dyᵀ x`: dy [rows, m], x [rows, n], which waited as codes where it is `coded`.
    Gradient { rows: usize, m: usize, n: usize, groups: usize, weights: Weights, x: DType, coded: bool },
    /// Codes of rows, cut in so many parts; or, `back`, the numbers of codes.
    Coding { rows: usize, cols: usize, parts: usize, dtype: DType, how: Fp8, back: bool },
    /// Causal attention over whole sequences; backward where `back`.
    Attention { heads: usize, kv_heads: usize, qk: usize, v: usize, dtype: DType, back: bool },
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
    block: Rc<Block>,
    rows: usize,
    cols: usize,
    dtype: DType,
}

/// A tensor in FP8: a byte per element, and scales.
#[derive(Clone)]
struct Tensor8 {
    #[expect(dead_code, reason = "its end is what counts")]
    codes: Rc<Block>,
    #[expect(dead_code, reason = "its end is what counts")]
    scales: Tensor,
    rows: usize,
    cuts: Cuts,
}

/// What a product reads, and how it waits for the way back.
#[derive(Clone)]
enum Input {
    Plain(Tensor),
    Codes(Tensor8),
}

impl Input {
    fn rows(&self) -> usize {
        match self {
            Input::Plain(x) => x.rows,
            Input::Codes(x) => x.rows,
        }
    }

    fn cols(&self) -> usize {
        match self {
            Input::Plain(x) => x.cols,
            Input::Codes(x) => x.cuts.len,
        }
    }
}

/// Whose scales are powers of two whatever the weight says: activations that are coded twice.
#[derive(Clone, Copy, PartialEq)]
enum Scales {
    Usual,
    PowersOfTwo,
}

impl Scales {
    fn of(self, how: Fp8) -> Fp8 {
        Fp8 { power_of_two: how.power_of_two || self == Scales::PowersOfTwo, ..how }
    }
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
    /// The last activation that was coded: whoever reads the same one reads the same codes.
    coded: Option<(Tensor, Fp8, Tensor8)>,
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

/// Walks through one micro-batch of `n` rows: forward, backward.
pub fn walk(config: &Config, precision: Precision, recompute: Recompute, balance: bool, n: usize) -> Found {
    let any_fp8 = super::weights(config, precision).iter().any(|weight| weight.kind.fp8.is_some());
    let model = Rc::new(Shapes { config: config.clone(), precision, balance, any_fp8 });
    let mut cx = Walk {
        pool: Rc::default(),
        tracking: Tracking::Tape,
        tape: Vec::new(),
        grads: Vec::new(),
        coded: None,
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
    fn block(&mut self, rows: usize, row_bytes: usize) -> Rc<Block> {
        let bytes = (rows as u64).saturating_mul(row_bytes as u64).min(1 << 50);
        let class = size_class(bytes as usize) as u64;
        let mut pool = self.pool.borrow_mut();
        let found = pool.free.get_mut(&class).and_then(Vec::pop);
        pool.held += if found.is_none() { class } else { 0 };
        pool.used += class;
        let before = found.unwrap_or(0);
        let touched = before.max(bytes);
        pool.touched += touched - before;
        Rc::new(Block { class, touched, pool: self.pool.clone() })
    }

    fn uninit(&mut self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let block = self.block(rows, cols * dtype.size_bytes());
        Tensor { block, rows, cols, dtype }
    }

    fn recording(&self) -> bool {
        self.tracking == Tracking::Tape
    }

    fn var(&mut self, value: Tensor) -> Var {
        self.grads.push(None);
        Var { value, id: self.grads.len() - 1 }
    }

    fn record(&mut self, step: impl FnOnce(&mut Walk) + 'static) {
        if self.recording() {
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
        self.coded = None;
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

    fn quantize(&mut self, x: &Tensor, parts: usize, how: Fp8) -> Tensor8 {
        let Tensor { rows, cols, dtype, .. } = *x;
        let cuts = Cuts::parts(cols, parts);
        let (codes, scales) = (self.block(rows, cols), self.uninit(rows, cuts.blocks(), DType::F32));
        self.does(Work::Coding { rows, cols, parts, dtype, how, back: false });
        Tensor8 { codes, scales, rows, cuts }
    }

    /// `x` as products with these weights read it.
    fn input(&mut self, x: &Tensor, weights: Weights, scales: Scales) -> Input {
        let Some(how) = weights.fp8.map(|how| scales.of(how)) else { return Input::Plain(x.clone()) };
        if let Some((of, by, codes)) = &self.coded
            && Rc::ptr_eq(&of.block, &x.block)
            && *by == how
        {
            return Input::Codes(codes.clone());
        }
        let codes = self.quantize(x, 1, how);
        self.coded = Some((x.clone(), how, codes.clone()));
        Input::Codes(codes)
    }

    /// The numbers of an input, in `dtype` where they have to be made.
    fn numbers(&mut self, x: &Input, dtype: DType) -> Tensor {
        match x {
            Input::Plain(x) => x.clone(),
            Input::Codes(Tensor8 { rows, cuts, .. }) => {
                let out = self.uninit(*rows, cuts.len, dtype);
                let (rows, cols, parts) = (*rows, cuts.len, cuts.len.checked_div(cuts.part).unwrap_or(1));
                self.does(Work::Coding { rows, cols, parts, dtype, how: Fp8::default(), back: true });
                out
            }
        }
    }

    /// `y_i = x_i W_gᵀ`: `rows` of them over `groups`.
    fn grouped(
        &mut self,
        x: &Input,
        rows: usize,
        groups: usize,
        n: usize,
        weights: Weights,
        dtype: DType,
    ) -> Tensor {
        let y = self.uninit(rows, n, dtype);
        let (k, x) = (x.cols(), if let Input::Plain(x) = x { x.dtype } else { weights.dtype });
        self.does(Work::Product { rows, k, parts: 1, n, groups, weights, x, y: dtype });
        y
    }

    /// `y = x Wᵀ`
    fn matmul(&mut self, x: &Input, n: usize, weights: Weights, dtype: DType) -> Tensor {
        self.grouped(x, x.rows(), 1, n, weights, dtype)
    }

    /// `dx_i = dy_i W_g` of a weight with `cols` columns, whose rows are so many matrices.
    #[expect(clippy::too_many_arguments, reason = "the letters of the operation")]
    fn grouped_input_grad(
        &mut self,
        d_y: &Tensor,
        rows: usize,
        groups: usize,
        parts: usize,
        cols: usize,
        weights: Weights,
        dtype: DType,
    ) -> Tensor {
        let d_x = self.uninit(rows, cols, dtype);
        let (k, x) = (d_y.cols, if weights.fp8.is_some() { weights.dtype } else { d_y.dtype });
        // (whether scales are powers of two changes neither memory nor time)
        let _codes = weights.fp8.map(|how| self.quantize(d_y, parts, how));
        let parts = if weights.fp8.is_some() { parts } else { 1 };
        self.does(Work::Product { rows, k, parts, n: cols, groups, weights, x, y: dtype });
        d_x
    }

    /// `dx = dy W`
    fn input_grad(
        &mut self,
        d_y: &Tensor,
        parts: usize,
        cols: usize,
        weights: Weights,
        dtype: DType,
    ) -> Tensor {
        self.grouped_input_grad(d_y, d_y.rows, 1, parts, cols, weights, dtype)
    }

    /// `dW_g += dyᵀ x`
    fn weight_grad(&mut self, d_y: &Tensor, x: &Input, rows: usize, groups: usize, weights: Weights) {
        let (coded, x_dtype) = match x {
            Input::Plain(x) => (false, x.dtype),
            Input::Codes(_) => (true, weights.dtype),
        };
        let (m, n) = (d_y.cols, x.cols());
        self.does(Work::Gradient { rows, m, n, groups, weights, x: x_dtype, coded });
    }

    fn linear(&mut self, x: &Var, n: usize, weights: Weights, dtype: DType) -> Var {
        let input = self.input(&x.value, weights, Scales::Usual);
        self.linear_of(x, input.clone(), input, n, weights, dtype)
    }

    /// Of what another operation keeps for its own way back.
    fn linear_of_kept(&mut self, x: &Var, n: usize, weights: Weights, dtype: DType) -> Var {
        let input = self.input(&x.value, weights, Scales::PowersOfTwo);
        self.linear_of(x, input, Input::Plain(x.value.clone()), n, weights, dtype)
    }

    fn linear_of(
        &mut self,
        x: &Var,
        input: Input,
        kept: Input,
        n: usize,
        weights: Weights,
        dtype: DType,
    ) -> Var {
        let y = self.matmul(&input, n, weights, dtype);
        drop(input);
        let y = self.var(y);
        let (x, out) = (x.slot(), y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            cx.weight_grad(&d_y, &kept, d_y.rows, 1, weights);
            let d_x = cx.input_grad(&d_y, 1, x.cols, weights, x.dtype);
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

    /// The input of a norm as it waits.
    fn kept(&mut self, x: &Tensor) -> Tensor {
        if self.recording() && self.model.any_fp8 { self.converted(x, DType::Bf16) } else { x.clone() }
    }

    fn rmsnorm(&mut self, x: &Var, dtype: DType) -> Var {
        let (n, d) = (x.value.rows, x.value.cols);
        let y = self.uninit(n, d, dtype);
        let rstd = self.uninit(n, 1, DType::F32);
        let (value, of) = (self.kept(&x.value), x.value.dtype);
        let norm = |kept, back| Work::Norm { rows: n, d, x: of, kept, y: dtype, back };
        self.does(norm(of, false));
        let (y, back) = (self.var(y), norm(value.dtype, true));
        let (x, out) = (x.slot(), y.slot());
        self.record(move |cx| {
            let Some(_d_y) = cx.take_grad(out) else { return };
            let d_x = cx.uninit(n, d, x.dtype);
            cx.does(back);
            cx.add_grad(x, d_x);
            drop((value, rstd));
        });
        y
    }

    fn add_rmsnorm(&mut self, x: &Var, delta: &Var, dtype: DType) -> (Var, Var) {
        let (n, d) = (x.value.rows, x.value.cols);
        let (sum, y) = (self.uninit(n, d, DType::F32), self.uninit(n, d, dtype));
        let rstd = self.uninit(n, 1, DType::F32);
        let value = self.kept(&sum);
        let norm = |kept, back| Work::Norm { rows: n, d, x: DType::F32, kept, y: dtype, back };
        self.does(norm(DType::F32, false));
        self.moves(&[&delta.value]);
        let (sum, y, back) = (self.var(sum), self.var(y), norm(value.dtype, true));
        let (x, delta, s, out) = (x.slot(), delta.slot(), sum.slot(), y.slot());
        self.record(move |cx| {
            let d_sum = cx.take_grad(s);
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
            drop((d_sum, value, rstd));
        });
        (sum, y)
    }

    /// Attention proper: its result, and what its way back reads.
    fn attend(&mut self, q: Tensor, k: Tensor, v: Tensor) -> (Tensor, [Tensor; 5]) {
        let shape = self.model.config.attention_shape();
        let out = self.uninit(self.n, shape.heads * shape.v_dim, v.dtype);
        let lse = self.uninit(self.n, shape.heads, DType::F32);
        self.does(attention(&shape, q.dtype, false));
        (out.clone(), [q, k, v, out, lse])
    }

    fn attend_backward(&mut self, [q, k, v, ..]: &[Tensor; 5]) -> [Tensor; 3] {
        let shape = self.model.config.attention_shape();
        self.does(attention(&shape, q.dtype, true));
        [q, k, v].map(|x| self.uninit(x.rows, x.cols, x.dtype))
    }

    /// Keys and values of the normed latent.
    fn expand(&mut self, normed: &Input) -> [Tensor; 2] {
        let (shape, weights) = (self.model.config.attention_shape(), self.model.kinds().attention);
        let nope = shape.qk_dim - self.model.config.rotary_dim();
        let kv = self.matmul(normed, shape.heads * (nope + shape.v_dim), weights, weights.dtype);
        let (rows, act) = (kv.rows, weights.dtype);
        let k = self.uninit(rows, shape.heads * shape.qk_dim, act);
        let v = self.uninit(rows, shape.heads * shape.v_dim, act);
        self.moves(&[&kv, &k, &v]);
        [k, v]
    }

    fn mla(&mut self, q: &Var, kv_a: &Var, c: usize) -> Var {
        let (shape, n, weights) = (self.model.config.attention_shape(), self.n, self.model.kinds().attention);
        let (act, stride) = (q.value.dtype, kv_a.value.cols);
        let nope = shape.qk_dim - self.model.config.rotary_dim();
        let wide = shape.heads * (nope + shape.v_dim);
        let (latent, normed, rstd) =
            (self.uninit(n, c, act), self.uninit(n, c, act), self.uninit(n, 1, DType::F32));
        self.moves(&[&latent, &latent]);
        let norm = move |back| Work::Norm { rows: n, d: c, x: act, kept: act, y: act, back };
        self.does(norm(false));
        let input = self.input(&normed, weights, Scales::Usual);
        let [k, v] = self.expand(&input);
        let q_turned = self.uninit(n, q.value.cols, act);
        self.moves(&[&q.value, &q_turned]);
        let (out, mut attended) = self.attend(q_turned, k, v);
        let out = self.var(out);
        // in FP8 keys and values are made again, and the latent is cut out again of what it is a part of
        let source = (self.recording() && weights.fp8.is_some()).then(|| kv_a.value.clone());
        let mut kept_latent = None;
        if source.is_some() {
            let nothing = [(); 2].map(|()| self.uninit(0, 0, act));
            [attended[1], attended[2]] = nothing;
        } else {
            kept_latent = Some(latent.clone());
        }
        let (q, kv_a, result) = (q.slot(), kv_a.slot(), out.slot());
        self.record(move |cx| {
            let Some(_d_out) = cx.take_grad(result) else { return };
            if source.is_some() {
                [attended[1], attended[2]] = cx.expand(&input);
                let latent = cx.uninit(n, c, act);
                cx.moves(&[&latent, &latent]);
                kept_latent = Some(latent);
            }
            let [d_q, d_k, d_v] = cx.attend_backward(&attended);
            let d_kv_a = cx.uninit(n, stride, act);
            let d_kv = cx.uninit(n, wide, act);
            cx.moves(&[&d_q, &d_q, &d_k, &d_v, &d_kv]);
            cx.weight_grad(&d_kv, &input, n, 1, weights);
            let _d_normed = cx.input_grad(&d_kv, 1, c, weights, act);
            {
                let d_latent = cx.uninit(n, c, act);
                cx.does(norm(true));
                cx.moves(&[&d_latent, &d_latent]);
            }
            cx.add_grad(q, d_q);
            cx.add_grad(kv_a, d_kv_a);
            drop((source, kept_latent, rstd, attended));
        });
        drop((latent, normed));
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

    /// Gate and up values as they wait.
    fn kept_gate_up(&mut self, gu: Tensor, weights: Weights) -> Input {
        match weights.fp8 {
            Some(how) if self.recording() => Input::Codes(self.quantize(&gu, 2, Scales::PowersOfTwo.of(how))),
            _ => Input::Plain(gu),
        }
    }

    /// Returns (y [n, d], gate and up).
    fn ffn_forward(&mut self, x: &Input, d: usize, f: usize, weights: Weights) -> (Tensor, Input) {
        let act = weights.dtype;
        let gu = self.matmul(x, 2 * f, weights, act);
        let h = self.uninit(x.rows(), f, act);
        self.does(Work::Swiglu { rows: x.rows(), f, dtype: act, back: false });
        let gu = self.kept_gate_up(gu, weights);
        let input = self.input(&h, weights, Scales::Usual);
        let y = self.matmul(&input, d, weights, act);
        (y, gu)
    }

    fn ffn_backward(
        &mut self,
        x: &Input,
        gu: &Input,
        d_y: &Tensor,
        weights: Weights,
        dtype: DType,
    ) -> Tensor {
        let (n, f, act) = (x.rows(), gu.cols() / 2, weights.dtype);
        let _d_h = self.input_grad(d_y, 1, f, weights, act);
        let (h, d_gu) = {
            let _gu = self.numbers(gu, act);
            let parts = (self.uninit(n, f, act), self.uninit(n, 2 * f, act));
            self.does(Work::Swiglu { rows: n, f, dtype: act, back: true });
            parts
        };
        self.weight_grad(d_y, &Input::Plain(h.clone()), n, 1, weights);
        self.weight_grad(&d_gu, x, n, 1, weights);
        self.input_grad(&d_gu, 2, x.cols(), weights, dtype)
    }

    fn dense(&mut self, x: &Var, f: usize) -> Var {
        let weights = self.model.kinds().linear;
        let input = self.input(&x.value, weights, Scales::Usual);
        let (y, gu) = self.ffn_forward(&input, x.value.cols, f, weights);
        let y = self.var(y);
        let (x, out) = (x.slot(), y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            let d_x = cx.ffn_backward(&input, &gu, &d_y, weights, x.dtype);
            cx.add_grad(x, d_x);
        });
        y
    }

    fn moe(&mut self, x: &Var, moe: &MoeConfig) -> Var {
        let (n, d, e, k) = (self.n, x.value.cols, moe.n_routed_experts, moe.num_experts_per_tok);
        let (f, expert, linear) =
            (moe.moe_intermediate_size, self.model.kinds().expert, self.model.kinds().linear);
        let (act, router) = (expert.dtype, self.model.kinds().router);
        let slots = n * k;
        let scores = {
            let logits = self.matmul(&Input::Plain(x.value.clone()), e, router, DType::F32);
            let scores = self.uninit(n, e, DType::F32);
            self.moves(&[&logits, &logits, &scores]);
            scores
        };
        let shared_f = f * moe.n_shared_experts;
        let input = self.input(&x.value, expert, Scales::PowersOfTwo);
        let shared_input = (shared_f > 0).then(|| self.input(&x.value, linear, Scales::PowersOfTwo));
        let (gu, y_slots) = {
            let gu = self.grouped(&input, slots, e, 2 * f, expert, act);
            let h = self.uninit(slots, f, act);
            self.does(Work::Swiglu { rows: slots, f, dtype: act, back: false });
            let gu = self.kept_gate_up(gu, expert);
            let of_down = self.input(&h, expert, Scales::Usual);
            let y = self.grouped(&of_down, slots, e, d, expert, act);
            (gu, y)
        };
        let shared = shared_input.as_ref().map(|input| self.ffn_forward(input, d, shared_f, linear));
        let y = self.uninit(n, d, act);
        self.moves(&[&y_slots, &y, &y]);
        drop(y_slots);
        let y = self.var(y);
        let shared_gu = shared.map(|(_, gu)| gu);
        let (x, out) = (x.slot(), y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            let d_shared = shared_input
                .as_ref()
                .zip(shared_gu.as_ref())
                .map(|(input, gu)| cx.ffn_backward(input, gu, &d_y, linear, x.dtype));
            let d_h = cx.grouped_input_grad(&d_y, slots, e, 1, f, expert, act);
            let _d_weights = cx.uninit(n, k, DType::F32);
            let (h, d_gu) = {
                let _by_slot = cx.uninit(slots, 1, DType::F32);
                let _d_by_slot = cx.uninit(slots, 1, DType::F32);
                let _gu = cx.numbers(&gu, act);
                let parts = (cx.uninit(slots, f, act), cx.uninit(slots, 2 * f, act));
                cx.does(Work::Swiglu { rows: slots, f, dtype: act, back: true });
                parts
            };
            drop(d_h);
            cx.weight_grad(&d_y, &Input::Plain(h.clone()), slots, e, expert);
            cx.weight_grad(&d_gu, &input, slots, e, expert);
            let d_x_slots = cx.grouped_input_grad(&d_gu, slots, e, 2, d, expert, act);
            let d_router = {
                let d_logits = cx.uninit(n, e, DType::F32);
                let _d_scores = cx.model.balance.then(|| cx.uninit(n, e, DType::F32));
                cx.moves(&[&d_logits, &d_logits, &scores]);
                let numbers = cx.numbers(&input, x.dtype);
                cx.weight_grad(&d_logits, &Input::Plain(numbers.clone()), n, 1, router);
                cx.input_grad(&d_logits, 1, d, router, DType::F32)
            };
            let d_x = cx.uninit(n, d, x.dtype);
            let sum = cx.uninit(n, d, DType::F32);
            if let Some(d_shared) = &d_shared {
                cx.moves(&[&d_router, d_shared, &sum]);
            }
            cx.moves(&[&d_x_slots, &sum, &d_x]);
            drop((sum, d_x_slots, d_gu, h));
            cx.add_grad(x, d_x);
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
        let (model, weights) = (self.model.clone(), self.model.kinds().attention);
        let act = weights.dtype;
        let (config, shape) = (&model.config, model.config.attention_shape());
        let attended = match config.attention {
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
                self.mla(&q, &kv_a, kv_lora_rank)
            }
            AttentionKind::Gqa { .. } => {
                let [q, k, v] = [shape.heads, shape.kv_heads, shape.kv_heads]
                    .map(|heads| self.linear(y, heads * shape.qk_dim, weights, act));
                self.gqa(&q, &k, &v)
            }
        };
        self.linear_of_kept(&attended, config.hidden_size, weights, act)
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
        let (n, d, weights) = (self.n, x.value.cols, self.model.kinds().head);
        let dtype = weights.dtype;
        let vocabulary = self.model.config.vocab_size;
        let d_x = self.uninit(n, d, x.value.dtype);
        let chunk = minke_tensor::ops::head_chunk_rows(vocabulary);
        for start in (0..n).step_by(chunk) {
            let rows = chunk.min(n - start);
            let d_logits = self.uninit(rows, vocabulary, dtype);
            self.does(Work::Head { rows, d, vocabulary, dtype });
            self.weight_grad(&d_logits, &Input::Plain(x.value.clone()), rows, 1, weights);
            let (k, x, y) = (vocabulary, d_logits.dtype, x.value.dtype);
            self.does(Work::Product { rows, k, parts: 1, n: d, groups: 1, weights, x, y });
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

fn attention(shape: &AttentionShape, dtype: DType, back: bool) -> Work {
    let AttentionShape { heads, kv_heads, qk_dim: qk, v_dim: v, .. } = *shape;
    Work::Attention { heads, kv_heads, qk, v, dtype, back }
}
