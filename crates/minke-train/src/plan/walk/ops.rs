//! The operations of `minke-tensor` without their arithmetic.

use std::rc::Rc;

use minke_cpu::DType;
use minke_cpu::attention::AttentionShape;
use minke_cpu::fp8::{Cuts, Fp8};
use minke_cpu::gemm;

use super::tape::{Input, Scales, Shared, Tensor, Tensor8, Var, Walk};
use super::{Weights, Work};

impl Walk {
    pub(super) fn embedding(&mut self) -> Var {
        let (d, dtype) = (self.model.config.hidden_size, self.model.embedding());
        let mut y = self.uninit(self.n, d, dtype);
        self.moves(&[&y, &y]);
        let scales = self.model.config.scales_embedding;
        y = if scales { self.scaled(&y) } else { self.converted(&y, DType::F32) };
        let y = self.var(y);
        let out = y.slot();
        self.record(move |cx| {
            let Some(mut d_y) = cx.take_grad(out) else { return };
            if scales {
                d_y = cx.scaled(&d_y);
            }
            cx.shared_grad_of(Shared::Embedding);
            cx.moves(&[&d_y, &d_y, &d_y]);
        });
        y
    }

    fn scaled(&mut self, x: &Tensor) -> Tensor {
        let y = self.uninit(x.rows, x.cols, DType::F32);
        self.moves(&[x, &y]);
        y
    }

    pub(super) fn converted(&mut self, x: &Tensor, dtype: DType) -> Tensor {
        if x.dtype == dtype {
            return x.clone();
        }
        let y = self.uninit(x.rows, x.cols, dtype);
        self.moves(&[x, &y]);
        y
    }

    pub(super) fn quantize(&mut self, x: &Tensor, parts: usize, how: Fp8) -> Tensor8 {
        let Tensor { rows, cols, dtype, .. } = *x;
        let made = self.made(rows, Cuts::parts(cols, parts));
        self.does(Work::Coding { rows, cols, parts, dtype, how, back: false });
        made
    }

    /// Codes and scales of rows.
    pub(super) fn made(&mut self, rows: usize, cuts: Cuts) -> Tensor8 {
        let (codes, scales) = (self.block(rows, cuts.len), self.uninit(rows, cuts.blocks(), DType::F32));
        Tensor8 { codes, scales, rows, cuts }
    }

    /// `x` as products with these weights read it.
    pub(super) fn input(&mut self, x: &Tensor, weights: Weights, scales: Scales) -> Input {
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

    /// `x` as a product with `n` columns reads it that may code it on its way.
    pub(super) fn input_once(&mut self, x: &Tensor, n: usize, weights: Weights, scales: Scales) -> Input {
        if gemm::codes_on_the_way(x.cols, n) {
            return Input::Plain(x.clone());
        }
        self.input(x, weights, scales)
    }

    /// The numbers of an input, in `dtype` where they have to be made.
    pub(super) fn numbers(&mut self, x: &Input, dtype: DType) -> Tensor {
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
    pub(super) fn grouped(
        &mut self,
        x: &Input,
        rows: usize,
        groups: usize,
        n: usize,
        weights: Weights,
        dtype: DType,
    ) -> Tensor {
        let y = self.uninit(rows, n, dtype);
        self.product(x, rows, groups, n, weights, dtype);
        y
    }

    /// The arithmetic of it.
    pub(super) fn product(
        &mut self,
        x: &Input,
        rows: usize,
        groups: usize,
        n: usize,
        weights: Weights,
        dtype: DType,
    ) {
        let (k, passing) = (x.cols(), weights.fp8.is_some() && matches!(x, Input::Plain(_)));
        let x = if let Input::Plain(x) = x { x.dtype } else { weights.dtype };
        self.does(Work::Product { rows, k, parts: 1, n, groups, weights, x, passing, y: dtype });
    }

    /// `y = x Wᵀ`
    pub(super) fn matmul(&mut self, x: &Input, n: usize, weights: Weights, dtype: DType) -> Tensor {
        self.grouped(x, x.rows(), 1, n, weights, dtype)
    }

    /// `dx_i = dy_i W_g` of a weight with `cols` columns, whose rows are so many matrices.
    #[expect(clippy::too_many_arguments, reason = "the letters of the operation")]
    pub(super) fn grouped_input_grad(
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
        self.input_product(d_y, rows, groups, parts, cols, weights, dtype);
        d_x
    }

    /// The arithmetic of it.
    #[expect(clippy::too_many_arguments, reason = "the letters of the operation")]
    pub(super) fn input_product(
        &mut self,
        d_y: &Tensor,
        rows: usize,
        groups: usize,
        parts: usize,
        cols: usize,
        weights: Weights,
        dtype: DType,
    ) {
        let (k, x) = (d_y.cols, if weights.fp8.is_some() { weights.dtype } else { d_y.dtype });
        // (whether scales are powers of two changes neither memory nor time)
        let passing = d_y.rows == rows && gemm::codes_on_the_way(k, cols);
        let _codes = weights.fp8.filter(|_| !passing).map(|how| self.quantize(d_y, parts, how));
        let (parts, passing) = if weights.fp8.is_some() { (parts, passing) } else { (1, false) };
        self.does(Work::Product { rows, k, parts, n: cols, groups, weights, x, passing, y: dtype });
    }

    /// `dx = dy W`
    pub(super) fn input_grad(
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
    pub(super) fn weight_grad(
        &mut self,
        d_y: &Tensor,
        x: &Input,
        rows: usize,
        groups: usize,
        weights: Weights,
    ) {
        self.weight_grad_of(groups * d_y.cols * x.cols());
        self.weight_product(d_y, x, rows, groups, weights);
    }

    /// The arithmetic of it.
    pub(super) fn weight_product(
        &mut self,
        d_y: &Tensor,
        x: &Input,
        rows: usize,
        groups: usize,
        weights: Weights,
    ) {
        let (coded, x_dtype) = match x {
            Input::Plain(x) => (false, x.dtype),
            Input::Codes(_) => (true, weights.dtype),
        };
        let (m, n) = (d_y.cols, x.cols());
        self.does(Work::Gradient { rows, m, n, groups, weights, x: x_dtype, coded });
    }

    pub(super) fn linear(&mut self, x: &Var, n: usize, weights: Weights, dtype: DType) -> Var {
        let input = self.input(&x.value, weights, Scales::Usual);
        self.linear_of(x, input.clone(), input, n, 1, weights, dtype, false)
    }

    pub(super) fn linear_biased(&mut self, x: &Var, n: usize, weights: Weights, dtype: DType) -> Var {
        self.linear_biased_parts(x, n, 1, weights, dtype)
    }

    /// Of a weight whose rows are so many matrices.
    pub(super) fn linear_biased_parts(
        &mut self,
        x: &Var,
        n: usize,
        parts: usize,
        weights: Weights,
        dtype: DType,
    ) -> Var {
        let input = self.input(&x.value, weights, Scales::Usual);
        self.linear_of(x, input.clone(), input, n, parts, weights, dtype, true)
    }

    /// Of what another operation keeps for its own way back.
    pub(super) fn linear_of_kept(
        &mut self,
        x: &Var,
        n: usize,
        weights: Weights,
        dtype: DType,
        biased: bool,
    ) -> Var {
        let input = self.input_once(&x.value, n, weights, Scales::PowersOfTwo);
        self.linear_of(x, input, Input::Plain(x.value.clone()), n, 1, weights, dtype, biased)
    }

    #[expect(clippy::too_many_arguments, reason = "what the operation is told")]
    fn linear_of(
        &mut self,
        x: &Var,
        input: Input,
        kept: Input,
        n: usize,
        parts: usize,
        weights: Weights,
        dtype: DType,
        biased: bool,
    ) -> Var {
        let y = if biased {
            let product = self.matmul(&input, n, weights, DType::F32);
            let y = self.uninit(product.rows, n, dtype);
            self.moves(&[&product, &y]);
            y
        } else {
            self.matmul(&input, n, weights, dtype)
        };
        drop(input);
        let y = self.var(y);
        let (x, out) = (x.slot(), y.slot());
        self.record(move |cx| {
            let Some(d_y) = cx.take_grad(out) else { return };
            cx.weight_grad(&d_y, &kept, d_y.rows, 1, weights);
            if biased {
                cx.weight_grad_of(d_y.cols);
                cx.moves(&[&d_y]);
            }
            let d_x = cx.input_grad(&d_y, parts, x.cols, weights, x.dtype);
            cx.add_grad(x, d_x);
        });
        y
    }

    pub(super) fn concat(&mut self, a: &Var, b: &Var) -> Var {
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
    pub(super) fn kept(&mut self, x: &Tensor) -> Tensor {
        if self.recording() && self.model.any_fp8 { self.converted(x, DType::Bf16) } else { x.clone() }
    }

    pub(super) fn rmsnorm(&mut self, x: &Var, dtype: DType) -> Var {
        self.rmsnorm_of_heads(x, 1, dtype)
    }

    /// Of each of so many heads in a row.
    pub(super) fn rmsnorm_of_heads(&mut self, x: &Var, heads: usize, dtype: DType) -> Var {
        let (n, d) = (x.value.rows, x.value.cols);
        let y = self.uninit(n, d, dtype);
        let rstd = self.uninit(n, heads, DType::F32);
        let (value, of) = (self.kept(&x.value), x.value.dtype);
        let norm = |kept, back| Work::Norm { rows: n * heads, d: d / heads, x: of, kept, y: dtype, back };
        self.does(norm(of, false));
        let (y, back) = (self.var(y), norm(value.dtype, true));
        let (x, out) = (x.slot(), y.slot());
        self.record(move |cx| {
            let Some(_d_y) = cx.take_grad(out) else { return };
            let d_x = cx.uninit(n, d, x.dtype);
            cx.weight_grad_of(d / heads);
            cx.does(back);
            cx.add_grad(x, d_x);
            drop((value, rstd));
        });
        y
    }

    pub(super) fn add_rmsnorm(&mut self, x: &Var, delta: &Var, dtype: DType) -> (Var, Var) {
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
                    let of = cx.uninit(n, d, DType::F32);
                    cx.weight_grad_of(d);
                    cx.does(back);
                    of
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

    /// Heads, widths and window of a layer.
    pub(super) fn shape(&self, layer: usize) -> AttentionShape {
        let config = &self.model.config;
        AttentionShape { window: config.window(layer), ..config.attention_shape() }
    }

    /// Attention proper: its result, and what its way back reads.
    pub(super) fn attend(
        &mut self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shape: &AttentionShape,
    ) -> (Tensor, [Tensor; 5]) {
        let out = self.uninit(self.n, shape.heads * shape.v_dim, v.dtype);
        let lse = self.uninit(self.n, shape.heads, DType::F32);
        self.does(attention(shape, q.dtype, false));
        (out.clone(), [q, k, v, out, lse])
    }

    pub(super) fn attend_backward(
        &mut self,
        [q, k, v, ..]: &[Tensor; 5],
        shape: &AttentionShape,
    ) -> [Tensor; 3] {
        self.does(attention(shape, q.dtype, true));
        [q, k, v].map(|x| self.uninit(x.rows, x.cols, x.dtype))
    }

    /// Keys and values of the normed latent.
    pub(super) fn expand(&mut self, normed: &Input) -> [Tensor; 2] {
        let (shape, weights) = (self.model.config.attention_shape(), self.model.kinds().attention);
        let nope = shape.qk_dim - self.model.config.rotary_dim();
        let kv = self.matmul(normed, shape.heads * (nope + shape.v_dim), weights, weights.dtype);
        let (rows, act) = (kv.rows, weights.dtype);
        let k = self.uninit(rows, shape.heads * shape.qk_dim, act);
        let v = self.uninit(rows, shape.heads * shape.v_dim, act);
        self.moves(&[&kv, &k, &v]);
        [k, v]
    }

    pub(super) fn mla(&mut self, q: &Var, kv_a: &Var, c: usize) -> Var {
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
        let (out, mut attended) = self.attend(q_turned, k, v, &shape);
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
            let [d_q, d_k, d_v] = cx.attend_backward(&attended, &shape);
            let d_kv_a = cx.uninit(n, stride, act);
            let d_kv = cx.uninit(n, wide, act);
            cx.moves(&[&d_q, &d_q, &d_k, &d_v, &d_kv]);
            cx.weight_grad(&d_kv, &input, n, 1, weights);
            let _d_normed = cx.input_grad(&d_kv, 1, c, weights, act);
            {
                let d_latent = cx.uninit(n, c, act);
                cx.weight_grad_of(c);
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

    pub(super) fn gqa(&mut self, q: &Var, k: &Var, v: &Var, shape: &AttentionShape) -> Var {
        let [q_turned, k_turned] = [q, k].map(|x| {
            let turned = self.uninit(x.value.rows, x.value.cols, x.value.dtype);
            self.moves(&[&x.value, &turned]);
            turned
        });
        let shape = *shape;
        let (out, attended) = self.attend(q_turned, k_turned, v.value.clone(), &shape);
        let out = self.var(out);
        let (slots, result) = ([q.slot(), k.slot(), v.slot()], out.slot());
        self.record(move |cx| {
            let Some(_d_out) = cx.take_grad(result) else { return };
            let grads = cx.attend_backward(&attended, &shape);
            cx.moves(&[&grads[0], &grads[0], &grads[1], &grads[1]]);
            for (slot, grad) in slots.into_iter().zip(grads) {
                cx.add_grad(slot, grad);
            }
        });
        out
    }
}

fn attention(shape: &AttentionShape, dtype: DType, back: bool) -> Work {
    let AttentionShape { heads, kv_heads, qk_dim: qk, v_dim: v, window, .. } = *shape;
    Work::Attention { heads, kv_heads, qk, v, window, dtype, back }
}
