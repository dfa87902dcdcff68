//! The feed-forward operations of `minke-tensor` without their arithmetic.

use minke_cpu::DType;
use minke_cpu::fp8::{Cuts, Fp8};
use minke_model::config::MoeConfig;

use super::tape::{Input, Scales, Tensor, Var, Walk};
use super::{Weights, Work};

impl Walk {
    /// What the gate lets through of values that wait as they are.
    pub(super) fn gated_unit(&mut self, gu: &Var) -> Var {
        let Tensor { rows, cols, dtype, .. } = gu.value;
        let h = self.uninit(rows, cols / 2, dtype);
        let work = move |back| Work::Swiglu { rows, f: cols / 2, dtype, back };
        self.does(work(false));
        let h = self.var(h);
        let (value, gu, out) = (gu.value.clone(), gu.slot(), h.slot());
        self.record(move |cx| {
            let Some(_d_h) = cx.take_grad(out) else { return };
            let d_gu = cx.uninit(rows, cols, dtype);
            cx.does(work(true));
            cx.add_grad(gu, d_gu);
            drop(value);
        });
        h
    }

    /// Returns (y [n, d], gate and up).
    pub(super) fn ffn_forward(&mut self, x: &Input, d: usize, f: usize, weights: Weights) -> (Tensor, Input) {
        let (h, gu) = self.gated(x, x.rows(), 1, f, weights);
        let input = self.input_once(&h, d, weights, Scales::Usual);
        drop(h);
        let y = self.matmul(&input, d, weights, weights.dtype);
        (y, gu)
    }

    /// Returns (what the gate lets through [rows, f], gate and up).
    fn gated(
        &mut self,
        x: &Input,
        rows: usize,
        groups: usize,
        f: usize,
        weights: Weights,
    ) -> (Tensor, Input) {
        let act = weights.dtype;
        let h = self.uninit(rows, f, act);
        let work = Work::Swiglu { rows, f, dtype: act, back: false };
        let kept = weights.fp8.filter(|_| self.recording()).map(|how| Scales::PowersOfTwo.of(how));
        if kept.is_some_and(|how| how.per_tensor) {
            let gu = self.grouped(x, rows, groups, 2 * f, weights, act);
            self.does(work);
            return (h, Input::Codes(self.quantize(&gu, 2, kept.expect("some"))));
        }
        let gu = match kept {
            Some(how) => {
                let made = self.made(rows, Cuts::parts(2 * f, 2));
                self.does(Work::Coding { rows, cols: 2 * f, parts: 2, dtype: act, how, back: false });
                Input::Codes(made)
            }
            None => Input::Plain(self.uninit(if self.recording() { rows } else { 0 }, 2 * f, act)),
        };
        self.product(x, rows, groups, 2 * f, weights, act);
        self.does(work);
        (h, gu)
    }

    /// Returns (h [rows, f], d of gate and up).
    fn gated_backward(
        &mut self,
        d_y: &Tensor,
        rows: usize,
        groups: usize,
        gu: &Input,
        weights: Weights,
    ) -> (Tensor, Tensor) {
        let (f, act) = (gu.cols() / 2, weights.dtype);
        let parts = (self.uninit(rows, f, act), self.uninit(rows, 2 * f, act));
        self.input_product(d_y, rows, groups, 1, f, weights, act);
        if weights.fp8.is_some() {
            let how = Fp8::default();
            self.does(Work::Coding { rows, cols: 2 * f, parts: 2, dtype: act, how, back: true });
        }
        self.does(Work::Swiglu { rows, f, dtype: act, back: true });
        parts
    }

    pub(super) fn ffn_backward(
        &mut self,
        x: &Input,
        gu: &Input,
        d_y: &Tensor,
        weights: Weights,
        dtype: DType,
    ) -> Tensor {
        let n = x.rows();
        let (h, d_gu) = self.gated_backward(d_y, n, 1, gu, weights);
        self.weight_grad(d_y, &Input::Plain(h), n, 1, weights);
        self.weight_grad(&d_gu, x, n, 1, weights);
        self.input_grad(&d_gu, 2, x.cols(), weights, dtype)
    }

    pub(super) fn dense(&mut self, x: &Var, f: usize) -> Var {
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

    pub(super) fn moe(&mut self, x: &Var, moe: &MoeConfig) -> Var {
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
            let (h, gu) = self.gated(&input, slots, e, f, expert);
            let of_down = self.input_once(&h, d, expert, Scales::Usual);
            drop(h);
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
                .zip(shared_gu)
                .map(|(input, gu)| cx.ffn_backward(input, &gu, &d_y, linear, x.dtype));
            let _d_weights = cx.uninit(n, k, DType::F32);
            let (h, d_gu) = {
                let _by_slot = cx.uninit(slots, 1, DType::F32);
                let _d_by_slot = cx.uninit(slots, 1, DType::F32);
                cx.gated_backward(&d_y, slots, e, &gu, expert)
            };
            drop(gu);
            cx.weight_grad(&d_y, &Input::Plain(h), slots, e, expert);
            cx.weight_grad(&d_gu, &input, slots, e, expert);
            let d_x_slots = cx.grouped_input_grad(&d_gu, slots, e, 2, d, expert, act);
            drop(d_gu);
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
            drop((sum, d_x_slots));
            cx.add_grad(x, d_x);
        });
        y
    }
}
