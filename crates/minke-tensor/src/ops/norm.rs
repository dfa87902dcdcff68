//! RMSNorm, alone and with the residual addition before it.

use minke_cpu::{DType, norm as kernel};

use crate::context::{Context, Var};
use crate::store::WeightId;
use crate::tensor::Tensor;

/// `y = w * x / sqrt(mean(x²) + eps)` per row: x [n, d], y [n, d] in `dtype`.
///
/// Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
pub fn rmsnorm(cx: &mut Context<'_>, x: &Var, w: WeightId, eps: f32, dtype: DType) -> Var {
    let (y, rstd) = cx.timed("norm", |cx| {
        let mut y = Tensor::uninit(x.value.rows(), x.value.cols(), dtype);
        let mut rstd = Tensor::uninit(x.value.rows(), 1, DType::F32);
        kernel::rmsnorm(cx.cpu, x.value.view(), cx.store.slice(w), eps, y.view_mut(), rstd.f32_mut());
        (y, rstd)
    });
    let y = cx.var(y);
    let (x, out) = (x.clone(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        let d_x = cx.timed("norm backward", |cx| {
            let mut d_x = Tensor::uninit(x.value.rows(), x.value.cols(), x.value.dtype());
            let (weight, d_w) = cx.store.with_grad(w);
            let d_y = d_y.view();
            kernel::rmsnorm_backward(
                cx.cpu,
                x.value.view(),
                weight,
                rstd.f32(),
                d_y,
                None,
                d_x.view_mut(),
                d_w,
            );
            d_x
        });
        cx.add_grad(&x, d_x);
    });
    y
}

/// `sum = x + delta`, `y = rmsnorm(sum)`: the residual stream x [n, d] in f32, a block's output delta [n, d].
/// Returns (sum, y).
pub fn add_rmsnorm(
    cx: &mut Context<'_>,
    x: &Var,
    delta: &Var,
    w: WeightId,
    eps: f32,
    dtype: DType,
) -> (Var, Var) {
    let (sum, y, rstd) = cx.timed("norm", |cx| {
        let (n, d) = (x.value.rows(), x.value.cols());
        let (mut sum, mut y) = (Tensor::uninit(n, d, DType::F32), Tensor::uninit(n, d, dtype));
        let mut rstd = Tensor::uninit(n, 1, DType::F32);
        let (weight, delta) = (cx.store.slice(w), delta.value.view());
        let (sum_out, y_out) = (sum.f32_mut(), y.view_mut());
        kernel::add_rmsnorm(cx.cpu, x.value.f32(), delta, weight, eps, sum_out, y_out, rstd.f32_mut());
        (sum, y, rstd)
    });
    let (sum, y) = (cx.var(sum), cx.var(y));
    let (x, delta, s, out) = (x.slot(), delta.slot(), sum.clone(), y.slot());
    cx.record(move |cx| {
        let d_sum = cx.take_grad(&s);
        let d = match cx.take_grad(out) {
            Some(d_y) => cx.timed("norm backward", |cx| {
                let mut d = Tensor::uninit(s.value.rows(), s.value.cols(), DType::F32);
                let (weight, d_w) = cx.store.with_grad(w);
                let (x, d_sum) = (s.value.view(), d_sum.as_ref().map(Tensor::f32));
                kernel::rmsnorm_backward(cx.cpu, x, weight, rstd.f32(), d_y.view(), d_sum, d.view_mut(), d_w);
                d
            }),
            None => match d_sum {
                Some(d) => d,
                None => return,
            },
        };
        // one tensor is the gradient of both terms
        let d_delta = d.converted(cx.cpu, delta.dtype);
        cx.add_grad(delta, d_delta);
        cx.add_grad(x, d);
    });
    (sum, y)
}
