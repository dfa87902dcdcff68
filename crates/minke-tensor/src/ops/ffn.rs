//! The dense feed-forward block.

use minke_cpu::DType;
use minke_cpu::fp8::CodesMut;
use minke_cpu::gemm::Target;
use minke_cpu::swiglu::{self as kernel, Gate, GateUp, Kept};

use super::linear::{self, Input, Scales};
use crate::context::{Context, Var};
use crate::store::WeightId;
use crate::tensor::{Tensor, Tensor8};

/// `y = (act(x Gᵀ) * (x Uᵀ)) Dᵀ`, act the gate's activation: x [n, d], gate and up stacked [2f, d], down [d, f], y [n, d] in `dtype`.
///
/// Keeps the gate and up values for the backward pass, in FP8 where the products are, and recomputes what is made of them.
/// Shazeer, "GLU Variants Improve Transformer" (2020), equations 5 and 6; DeepSeek-V3 report, section 3.3.3.
pub fn swiglu_ffn(
    cx: &mut Context<'_>,
    x: &Var,
    gate: Gate,
    gate_up: WeightId,
    down: WeightId,
    dtype: DType,
) -> Var {
    let input = cx.timed("ffn linear", |cx| Input::of(cx, &x.value, gate_up, Scales::Usual));
    let (y, gu) = forward(cx, &input, gate, gate_up, down, dtype);
    let y = cx.var(y);
    let (x, out) = (x.slot(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        let d_x = backward(cx, &input, &gu, &d_y, gate, gate_up, down, x.dtype);
        cx.add_grad(x, d_x);
    });
    y
}

/// `h = act(gate) up` of values gu [n, 2f], a row's gate columns before its up columns, that were made by another
/// operation: a block whose projections have biases. h [n, f] in the dtype of gu.
pub fn gated_unit(cx: &mut Context<'_>, gu: &Var, gate: Gate) -> Var {
    let (n, f, dtype) = (gu.value.rows(), gu.value.cols() / 2, gu.value.dtype());
    let h = cx.timed("ffn gate and up", |cx| {
        let mut h = Tensor::uninit(n, f, dtype);
        kernel::swiglu(cx.cpu, gate, gu.value.view(), f, h.view_mut());
        h
    });
    let h = cx.var(h);
    let (value, gu, out) = (gu.value.clone(), gu.slot(), h.slot());
    cx.record(move |cx| {
        let Some(d_h) = cx.take_grad(out) else { return };
        let mut d_gu = Tensor::uninit(n, 2 * f, dtype);
        cx.timed("ffn gate and up backward", |cx| {
            let (gu, d_h) = (value.view(), d_h.view());
            kernel::swiglu_backward(cx.cpu, gate, gu, f, d_h, None, None, None, d_gu.view_mut());
        });
        cx.add_grad(gu, d_gu);
    });
    h
}

/// Returns (y, gate and up values [n, 2f]).
pub(super) fn forward(
    cx: &mut Context<'_>,
    x: &Input,
    gate: Gate,
    gate_up: WeightId,
    down: WeightId,
    dtype: DType,
) -> (Tensor, Input) {
    let offsets = [0, x.rows() as u32];
    let (h, gu) = cx.timed("ffn gate and up", |cx| gated(cx, x, None, &offsets, gate, gate_up));
    let y = cx.timed("ffn linear", |cx| {
        let input = Input::once(cx, &h, down, Scales::Usual);
        drop(h);
        linear::forward(cx, &input, down, dtype)
    });
    (y, gu)
}

/// `h = act(x Gᵀ) * (x Uᵀ)` of the rows between `offsets`, through `index`; returns (h, gate and up values as they are kept:
/// of no rows without a tape).
pub(super) fn gated(
    cx: &mut Context<'_>,
    x: &Input,
    index: Option<&[u32]>,
    offsets: &[u32],
    gate: Gate,
    gate_up: WeightId,
) -> (Tensor, Input) {
    let (n, f, act) =
        (index.map_or(x.rows(), <[u32]>::len), cx.store.rows(gate_up) / 2, cx.store.dtype(gate_up));
    let kept = cx.store.fp8(gate_up).filter(|_| cx.recording()).map(|how| Scales::PowersOfTwo.of(how));
    let mut h = Tensor::uninit(n, f, act);
    // what all rows share is found before, or the weight reads rows in its own way: one after the other
    if cx.store.stored(gate_up).is_some() || kept.is_some_and(|how| how.per_tensor) {
        let gu = linear::grouped(cx, x, index, offsets, gate_up, act);
        kernel::swiglu(cx.cpu, gate, gu.view(), f, h.view_mut());
        let gu = match kept {
            Some(how) => Input::Codes(Tensor8::quantize(cx.cpu, &gu, cx.store.row_cuts(gate_up), how)),
            None => Input::Plain(gu),
        };
        return (h, gu);
    }
    linear::note(cx, x, index, offsets, gate_up);
    let (keeps, cuts) = (cx.recording(), cx.store.row_cuts(gate_up));
    let (cpu, product) = (cx.cpu, x.product(index, cx.store.forward(cx.cpu, gate_up)));
    let gu = match kept {
        Some(how) => {
            let make = |to: CodesMut<'_>| {
                kernel::swiglu_of_product(cpu, product, offsets, gate, Kept::Codes(act, to), h.view_mut());
            };
            Input::Codes(Tensor8::made(n, cuts, how, make).0)
        }
        None => {
            let mut gu = Tensor::uninit(if keeps { n } else { 0 }, 2 * f, act);
            let target = if keeps { Target::Kept(gu.view_mut()) } else { Target::Passing(act) };
            kernel::swiglu_of_product(cpu, product, offsets, gate, Kept::Numbers(target), h.view_mut());
            Input::Plain(gu)
        }
    };
    (h, gu)
}

/// The way back through [`gated`] and what its result goes into: rows of `d_y` through `index`. Returns (h, d of gate and up)
/// for the gradients of both weights; with rows' weights ([`kernel::swiglu_backward`]) h is scaled by them.
pub(super) fn gated_backward(
    cx: &mut Context<'_>,
    d_y: &Tensor,
    index: Option<&[u32]>,
    offsets: &[u32],
    gu: &Input,
    gate: Gate,
    down: WeightId,
    by_row: Option<(&[f32], &mut [f32])>,
) -> (Tensor, Tensor) {
    let (f, act) = (cx.store.cols(down), cx.store.dtype(down));
    let n = index.map_or(d_y.rows(), <[u32]>::len);
    let (row_scale, d_row_scale) = by_row.unzip();
    let (mut h, mut d_gu) = (Tensor::uninit(n, f, act), Tensor::uninit(n, 2 * f, act));
    let (h_out, d_gu_out) = (h.view_mut(), d_gu.view_mut());
    let scales = if row_scale.is_some() { Scales::PowersOfTwo } else { Scales::Usual };
    let d_y = Input::gradient(cx, d_y, n, down, scales);
    let product = d_y.product(index, cx.store.backward(cx.cpu, down));
    let gu = match gu {
        Input::Plain(gu) | Input::Passing(gu, _) => GateUp::Numbers(gu.view()),
        Input::Codes(gu) => GateUp::Codes(gu.codes(None)),
    };
    kernel::swiglu_backward_of_product(
        cx.cpu,
        product,
        offsets,
        gate,
        gu,
        row_scale,
        d_row_scale,
        h_out,
        d_gu_out,
    );
    (h, d_gu)
}

/// Adds the weights' gradients and returns dx in `dtype`.
pub(super) fn backward(
    cx: &mut Context<'_>,
    x: &Input,
    gu: &Input,
    d_y: &Tensor,
    gate: Gate,
    gate_up: WeightId,
    down: WeightId,
    dtype: DType,
) -> Tensor {
    let offsets = [0, x.rows() as u32];
    let (h, d_gu) = cx.timed("ffn gate and up backward", |cx| {
        gated_backward(cx, d_y, None, &offsets, gu, gate, down, None)
    });
    cx.timed("ffn linear dW", |cx| {
        linear::weight_grad(cx, d_y, &Input::Plain(h), down);
        linear::weight_grad(cx, &d_gu, x, gate_up);
    });
    cx.timed("ffn linear dx", |cx| linear::input_grad(cx, &d_gu, gate_up, dtype))
}
