//! RMSNorm, alone and with the residual addition before it.

use minke_cpu::DType;
use minke_cpu::norm::{self as kernel, Gain};

use crate::context::{Context, Var};
use crate::store::{Store, WeightId};
use crate::tensor::Tensor;

/// The weights of a norm.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// What the gain is made of [d].
    pub w: WeightId,
    /// Added to it: 0, or 1 where weights are stored as distances from one.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

impl Norm {
    fn gain(self, store: &Store) -> Gain<'_> {
        Gain { w: store.slice(self.w), offset: self.offset }
    }
}

/// The input of a norm as it is kept: rounded to bf16 where linear layers are in FP8, whose activations it would outweigh.
fn kept(cx: &Context<'_>, x: &Tensor) -> Tensor {
    if cx.recording() && cx.store.any_fp8() { x.converted(cx.cpu, DType::Bf16) } else { x.clone() }
}

/// `y = (w + offset) * x / sqrt(mean(x²) + eps)` per row: x [n, d], y [n, d] in `dtype`. Where w is shorter than a row, the
/// row is that many heads [n, h d], and each is normed by itself.
///
/// # Panics
/// When rows are no whole number of heads.
///
/// Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
pub fn rmsnorm(cx: &mut Context<'_>, x: &Var, norm: Norm, dtype: DType) -> Var {
    let (y, rstd) = cx.timed("norm", |cx| {
        let (n, width, gain) = (x.value.rows(), x.value.cols(), norm.gain(cx.store));
        assert!(width.is_multiple_of(gain.w.len()), "rmsnorm: rows of {width} in heads of {}", gain.w.len());
        let mut y = Tensor::uninit(n, width, dtype);
        let mut rstd = Tensor::uninit(n, width / gain.w.len(), DType::F32);
        kernel::rmsnorm(cx.cpu, x.value.view(), gain, norm.eps, y.view_mut(), rstd.f32_mut());
        (y, rstd)
    });
    let y = cx.var(y);
    let (value, x, out) = (kept(cx, &x.value), x.slot(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        let d_x = cx.timed("norm backward", |cx| {
            let mut d_x = Tensor::uninit(value.rows(), value.cols(), x.dtype);
            let (w, d_w) = cx.store.with_grad(norm.w);
            let gain = Gain { w, offset: norm.offset };
            let (value, rstd, d_y, d_x_out) = (value.view(), rstd.f32(), d_y.view(), d_x.view_mut());
            kernel::rmsnorm_backward(cx.cpu, value, gain, rstd, d_y, None, d_x_out, d_w);
            d_x
        });
        cx.add_grad(x, d_x);
    });
    y
}

/// `sum = x + delta`, `y = rmsnorm(sum)`: the residual stream x [n, d] in f32, a block's output delta [n, d].
/// Returns (sum, y).
pub fn add_rmsnorm(cx: &mut Context<'_>, x: &Var, delta: &Var, norm: Norm, dtype: DType) -> (Var, Var) {
    let (sum, y, rstd) = cx.timed("norm", |cx| {
        let (n, d) = (x.value.rows(), x.value.cols());
        let (mut sum, mut y) = (Tensor::uninit(n, d, DType::F32), Tensor::uninit(n, d, dtype));
        let mut rstd = Tensor::uninit(n, 1, DType::F32);
        let (gain, delta) = (norm.gain(cx.store), delta.value.view());
        let (sum_out, y_out) = (sum.f32_mut(), y.view_mut());
        kernel::add_rmsnorm(cx.cpu, x.value.f32(), delta, gain, norm.eps, sum_out, y_out, rstd.f32_mut());
        (sum, y, rstd)
    });
    let (sum, y) = (cx.var(sum), cx.var(y));
    let value = cx.timed("norm", |cx| kept(cx, &sum.value));
    let (x, delta, s, out) = (x.slot(), delta.slot(), sum.slot(), y.slot());
    cx.record(move |cx| {
        let d_sum = cx.take_grad(s);
        let d = match cx.take_grad(out) {
            Some(d_y) => cx.timed("norm backward", |cx| {
                let mut d = Tensor::uninit(value.rows(), value.cols(), DType::F32);
                let (w, d_w) = cx.store.with_grad(norm.w);
                let gain = Gain { w, offset: norm.offset };
                let (x, d_sum) = (value.view(), d_sum.as_ref().map(Tensor::f32));
                kernel::rmsnorm_backward(cx.cpu, x, gain, rstd.f32(), d_y.view(), d_sum, d.view_mut(), d_w);
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
