//! Linear layers.

use minke_cpu::gemm::{self, Operand};
use minke_cpu::{DType, copy};

use crate::context::{Context, Var};
use crate::store::{WeightId, compute};
use crate::tensor::Tensor;

/// `y = x Wᵀ`: x [n, in], W [out, in], y [n, out] in `dtype`.
pub fn linear(cx: &mut Context<'_>, x: &Var, w: WeightId, dtype: DType) -> Var {
    let y = cx.timed("linear", |cx| forward(cx, &x.value, w, dtype));
    let y = cx.var(y);
    let (x, out) = (x.clone(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        cx.timed("linear dW", |cx| weight_grad(cx, &d_y, &x.value, w));
        let d_x = cx.timed("linear dx", |cx| input_grad(cx, &d_y, w, x.value.dtype()));
        cx.add_grad(&x, d_x);
    });
    y
}

/// `y = x Wᵀ` without the tape.
pub(super) fn forward(cx: &mut Context<'_>, x: &Tensor, w: WeightId, dtype: DType) -> Tensor {
    let mut y = Tensor::uninit(x.rows(), cx.store.rows(w), dtype);
    let offsets = [0, x.rows() as u32];
    let packed = cx.store.forward(cx.cpu, w);
    gemm::matmul(cx.cpu, Operand::new(x.view(), x.cols()), &offsets, packed, y.view_mut(), false);
    y
}

/// `dx = dy W`
pub(super) fn input_grad(cx: &mut Context<'_>, d_y: &Tensor, w: WeightId, dtype: DType) -> Tensor {
    let mut d_x = Tensor::uninit(d_y.rows(), cx.store.cols(w), dtype);
    let offsets = [0, d_y.rows() as u32];
    let packed = cx.store.backward(cx.cpu, w);
    gemm::matmul(cx.cpu, Operand::new(d_y.view(), d_y.cols()), &offsets, packed, d_x.view_mut(), false);
    d_x
}

/// `dW += dyᵀ x`
pub(super) fn weight_grad(cx: &mut Context<'_>, d_y: &Tensor, x: &Tensor, w: WeightId) {
    let offsets = [0, x.rows() as u32];
    let compute = compute(cx.store.dtype(w));
    let (d_y, x) = (Operand::new(d_y.view(), d_y.cols()), Operand::new(x.view(), x.cols()));
    let (d_w, add) = cx.store.grad_sum(w);
    gemm::matmul_tn(cx.cpu, d_y, x, &offsets, compute, d_w, add);
}

/// `y = [a ; b]` along columns: a [n, da], b [n, db] of one dtype.
pub fn concat(cx: &mut Context<'_>, a: &Var, b: &Var) -> Var {
    let (n, da, db) = (a.value.rows(), a.value.cols(), b.value.cols());
    let mut y = Tensor::uninit(n, da + db, a.value.dtype());
    copy::concat_columns(cx.cpu, a.value.view(), da, b.value.view(), db, y.view_mut());
    let y = cx.var(y);
    let (a, b, out) = (a.slot(), b.slot(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        for (part, start) in [(a, 0), (b, da)] {
            let mut d = Tensor::uninit(n, part.cols, part.dtype);
            copy::take_columns(cx.cpu, d_y.view(), da + db, start, part.cols, d.view_mut());
            cx.add_grad(part, d);
        }
    });
    y
}
