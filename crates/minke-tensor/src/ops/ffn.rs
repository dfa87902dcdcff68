//! The dense feed-forward block.

use minke_cpu::{DType, swiglu as kernel};

use super::linear;
use crate::context::{Context, Var};
use crate::store::WeightId;
use crate::tensor::Tensor;

/// `y = (silu(x Gᵀ) * (x Uᵀ)) Dᵀ`: x [n, d], gate and up stacked [2f, d], down [d, f], y [n, d] in `dtype`.
///
/// Keeps the gate and up values for the backward pass and recomputes their product.
/// Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
pub fn swiglu_ffn(cx: &mut Context<'_>, x: &Var, gate_up: WeightId, down: WeightId, dtype: DType) -> Var {
    let (y, gu) = forward(cx, &x.value, gate_up, down, dtype);
    let y = cx.var(y);
    let (x, out) = (x.clone(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        let d_x = backward(cx, &x.value, &gu, &d_y, gate_up, down);
        cx.add_grad(&x, d_x);
    });
    y
}

/// Returns (y, gate and up values [n, 2f]).
pub(super) fn forward(
    cx: &mut Context<'_>,
    x: &Tensor,
    gate_up: WeightId,
    down: WeightId,
    dtype: DType,
) -> (Tensor, Tensor) {
    let act = cx.store.dtype(down);
    let gu = cx.timed("ffn linear", |cx| linear::forward(cx, x, gate_up, act));
    let h = cx.timed("swiglu", |cx| {
        let mut h = Tensor::uninit(x.rows(), cx.store.cols(down), act);
        kernel::swiglu(cx.cpu, gu.view(), h.cols(), h.view_mut());
        h
    });
    let y = cx.timed("ffn linear", |cx| linear::forward(cx, &h, down, dtype));
    (y, gu)
}

/// Adds the weights' gradients and returns dx in x's dtype.
pub(super) fn backward(
    cx: &mut Context<'_>,
    x: &Tensor,
    gu: &Tensor,
    d_y: &Tensor,
    gate_up: WeightId,
    down: WeightId,
) -> Tensor {
    let (n, f, act) = (x.rows(), cx.store.cols(down), gu.dtype());
    let d_h = cx.timed("ffn linear dx", |cx| linear::input_grad(cx, d_y, down, act));
    let (h, d_gu) = cx.timed("swiglu backward", |cx| {
        let (mut h, mut d_gu) = (Tensor::uninit(n, f, act), Tensor::uninit(n, 2 * f, act));
        let (h_out, d_gu_out) = (Some(h.view_mut()), d_gu.view_mut());
        kernel::swiglu_backward(cx.cpu, gu.view(), f, d_h.view(), None, None, h_out, d_gu_out);
        (h, d_gu)
    });
    cx.timed("ffn linear dW", |cx| {
        linear::weight_grad(cx, d_y, &h, down);
        linear::weight_grad(cx, &d_gu, x, gate_up);
    });
    cx.timed("ffn linear dx", |cx| linear::input_grad(cx, &d_gu, gate_up, x.dtype()))
}
