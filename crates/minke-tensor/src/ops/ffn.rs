//! The dense feed-forward block.

use minke_cpu::{DType, swiglu as kernel};

use super::linear::{self, Input, Scales};
use crate::context::{Context, Var};
use crate::store::WeightId;
use crate::tensor::{Tensor, Tensor8};

/// `y = (silu(x Gᵀ) * (x Uᵀ)) Dᵀ`: x [n, d], gate and up stacked [2f, d], down [d, f], y [n, d] in `dtype`.
///
/// Keeps the gate and up values for the backward pass, in FP8 where the products are, and recomputes what is made of them.
/// Shazeer, "GLU Variants Improve Transformer" (2020), equation 6; DeepSeek-V3 report, section 3.3.3.
pub fn swiglu_ffn(cx: &mut Context<'_>, x: &Var, gate_up: WeightId, down: WeightId, dtype: DType) -> Var {
    let input = cx.timed("ffn linear", |cx| Input::of(cx, &x.value, gate_up, Scales::Usual));
    let (y, gu) = forward(cx, &input, gate_up, down, dtype);
    let y = cx.var(y);
    let (x, out) = (x.slot(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        let d_x = backward(cx, &input, &gu, &d_y, gate_up, down, x.dtype);
        cx.add_grad(x, d_x);
    });
    y
}

/// Gate and up values as they are kept.
pub(super) fn kept(cx: &mut Context<'_>, gu: Tensor, gate_up: WeightId) -> Input {
    match cx.store.fp8(gate_up) {
        Some(how) if cx.recording() => {
            let how = minke_cpu::fp8::Fp8 { power_of_two: true, ..how };
            Input::Codes(Tensor8::quantize(cx.cpu, &gu, cx.store.row_cuts(gate_up), how))
        }
        _ => Input::Plain(gu),
    }
}

/// Returns (y, gate and up values [n, 2f]).
pub(super) fn forward(
    cx: &mut Context<'_>,
    x: &Input,
    gate_up: WeightId,
    down: WeightId,
    dtype: DType,
) -> (Tensor, Input) {
    let act = cx.store.dtype(down);
    let gu = cx.timed("ffn linear", |cx| linear::forward(cx, x, gate_up, act));
    let (h, gu) = cx.timed("swiglu", |cx| {
        let mut h = Tensor::uninit(x.rows(), cx.store.cols(down), act);
        kernel::swiglu(cx.cpu, gu.view(), h.cols(), h.view_mut());
        (h, kept(cx, gu, gate_up))
    });
    let y = cx.timed("ffn linear", |cx| {
        let h = Input::of(cx, &h, down, Scales::Usual);
        linear::forward(cx, &h, down, dtype)
    });
    (y, gu)
}

/// Adds the weights' gradients and returns dx in `dtype`.
pub(super) fn backward(
    cx: &mut Context<'_>,
    x: &Input,
    gu: &Input,
    d_y: &Tensor,
    gate_up: WeightId,
    down: WeightId,
    dtype: DType,
) -> Tensor {
    let (n, f, act) = (x.rows(), cx.store.cols(down), cx.store.dtype(down));
    let d_h = cx.timed("ffn linear dx", |cx| linear::input_grad(cx, d_y, down, act));
    let (h, d_gu) = cx.timed("swiglu backward", |cx| {
        let gu = gu.numbers(cx, act);
        let (mut h, mut d_gu) = (Tensor::uninit(n, f, act), Tensor::uninit(n, 2 * f, act));
        let (h_out, d_gu_out) = (Some(h.view_mut()), d_gu.view_mut());
        kernel::swiglu_backward(cx.cpu, gu.view(), f, d_h.view(), None, None, h_out, d_gu_out);
        (Input::Plain(h), d_gu)
    });
    cx.timed("ffn linear dW", |cx| {
        linear::weight_grad(cx, d_y, &h, down);
        linear::weight_grad(cx, &d_gu, x, gate_up);
    });
    cx.timed("ffn linear dx", |cx| linear::input_grad(cx, &d_gu, gate_up, dtype))
}
