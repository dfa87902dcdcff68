//! Linear layers.
//!
//! Where a weight's products are in FP8 ([`Store::fp8`](crate::store::Store::fp8)), an input is coded once, in tiles of
//! 1 x 128, and its codes are what is kept for the backward pass; gradients of outputs are coded in tiles of 1 x 128 for dx,
//! and both operands of dW in tiles of 128 x 1. DeepSeek-V3 report, section 3.3.

use minke_cpu::fp8::{Fp8, Values};
use minke_cpu::gemm::{self, Operand, Product};
use minke_cpu::{DType, copy, pointwise, reduce, stored};

use crate::context::{Context, Var};
use crate::store::{PackedWeight, WeightId, compute};
use crate::tensor::{Tensor, Tensor8};

/// What a linear layer reads, as it is kept for the backward pass.
#[derive(Clone)]
pub(super) enum Input {
    Plain(Tensor),
    Codes(Tensor8),
    /// Numbers that the product codes on their way: nothing of them is kept, or they themselves.
    Passing(Tensor, Fp8),
}

/// What an input's scales are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// As the weight says.
    Usual,
    /// Powers of two: activations that are coded a second time lose nothing by the first.
    PowersOfTwo,
}

impl Scales {
    /// With what else the weight says.
    pub fn of(self, how: Fp8) -> Fp8 {
        Fp8 { power_of_two: how.power_of_two || self == Scales::PowersOfTwo, ..how }
    }
}

impl Input {
    /// `x` in the form that products with `w` read.
    pub fn of(cx: &mut Context<'_>, x: &Tensor, w: WeightId, scales: Scales) -> Self {
        match cx.store.fp8(w) {
            None => Input::Plain(x.clone()),
            Some(how) => Input::Codes(cx.coded(x, scales.of(how))),
        }
    }

    /// [`Input::of`] what is read once: coded within the product, where that does it once or twice.
    pub fn once(cx: &mut Context<'_>, x: &Tensor, w: WeightId, scales: Scales) -> Self {
        match cx.store.fp8(w).map(|how| scales.of(how)) {
            Some(how) if gemm::codes_on_the_way(x.cols(), cx.store.rows(w)) => Input::Passing(x.clone(), how),
            _ => Self::of(cx, x, w, scales),
        }
    }

    /// The gradient of what a product with `w` made, of which dx reads so many rows: coded within that product, unless a row is
    /// read by several experts or more than twice.
    pub fn gradient(cx: &Context<'_>, d_y: &Tensor, rows: usize, w: WeightId, scales: Scales) -> Self {
        match cx.store.fp8(w).map(|how| scales.of(how)) {
            None => Input::Plain(d_y.clone()),
            Some(how) if rows == d_y.rows() && gemm::codes_on_the_way(d_y.cols(), cx.store.cols(w)) => {
                Input::Passing(d_y.clone(), how)
            }
            Some(how) => Input::Codes(Tensor8::quantize(cx.cpu, d_y, cx.store.row_cuts(w), how)),
        }
    }

    /// The product of its rows, through an index if there is one, with a weight that is no stored one.
    pub fn product<'a>(&'a self, index: Option<&'a [u32]>, w: PackedWeight<'a>) -> Product<'a> {
        match (self, w) {
            (Input::Plain(_), PackedWeight::Plain(b)) => {
                Product::Numbers { a: Operand { index, ..self.plain() }, b }
            }
            (Input::Passing(..) | Input::Codes(_), PackedWeight::Eight(b)) => {
                let (a, how) = self.values(index);
                Product::Codes { a, how, b }
            }
            (_, PackedWeight::Stored(_)) => {
                unreachable!("a weight that only runs is read forward, by itself")
            }
            (Input::Plain(_), PackedWeight::Eight(_))
            | (Input::Codes(_) | Input::Passing(..), PackedWeight::Plain(_)) => {
                unreachable!("an input has the form of its weight")
            }
        }
    }

    /// What products in FP8 read of it.
    fn values<'a>(&'a self, index: Option<&'a [u32]>) -> (Values<'a>, Fp8) {
        match self {
            Input::Plain(_) => unreachable!("an input has the form of its weight"),
            Input::Passing(_, how) => (Values::Plain(Operand { index, ..self.plain() }), *how),
            Input::Codes(x) => (Values::Codes(x.codes(index)), Fp8::default()),
        }
    }

    /// The numbers of what is no codes.
    fn plain(&self) -> Operand<'_> {
        match self {
            Input::Plain(x) | Input::Passing(x, _) => Operand::new(x.view(), x.cols()),
            Input::Codes(_) => unreachable!("an input has the form of its weight"),
        }
    }

    pub fn rows(&self) -> usize {
        match self {
            Input::Plain(x) | Input::Passing(x, _) => x.rows(),
            Input::Codes(x) => x.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Input::Plain(x) | Input::Passing(x, _) => x.cols(),
            Input::Codes(x) => x.cuts().len,
        }
    }

    /// The numbers, in `dtype` where they have to be made.
    pub fn numbers(&self, cx: &Context<'_>, dtype: DType) -> Tensor {
        match self {
            Input::Plain(x) | Input::Passing(x, _) => x.clone(),
            Input::Codes(x) => x.numbers(cx.cpu, dtype),
        }
    }
}

/// The weights of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// [out, in].
    pub w: WeightId,
    /// Added to each row [out].
    pub bias: Option<WeightId>,
}

impl From<WeightId> for Linear {
    fn from(w: WeightId) -> Self {
        Self { w, bias: None }
    }
}

/// `y = x Wᵀ + b`: x [n, in], W [out, in], y [n, out] in `dtype`; the bias is added to the product's f32 sums.
pub fn linear(cx: &mut Context<'_>, x: &Var, layer: impl Into<Linear>, dtype: DType) -> Var {
    recorded(cx, x, layer.into(), dtype, false)
}

/// [`linear`] of what another operation keeps for its own backward pass, so that codes beside it would save nothing: the
/// output of attention. Its scales are powers of two.
pub fn linear_of_kept(cx: &mut Context<'_>, x: &Var, layer: impl Into<Linear>, dtype: DType) -> Var {
    recorded(cx, x, layer.into(), dtype, true)
}

fn recorded(cx: &mut Context<'_>, x: &Var, Linear { w, bias }: Linear, dtype: DType, kept: bool) -> Var {
    let (y, input) = cx.timed("linear", |cx| {
        let input = if kept {
            Input::once(cx, &x.value, w, Scales::PowersOfTwo)
        } else {
            Input::of(cx, &x.value, w, Scales::Usual)
        };
        let y = match bias {
            None => forward(cx, &input, w, dtype),
            Some(bias) => {
                let product = forward(cx, &input, w, DType::F32);
                let mut y = Tensor::uninit(product.rows(), product.cols(), dtype);
                pointwise::add_bias(cx.cpu, product.view(), cx.store.slice(bias), y.view_mut());
                y
            }
        };
        (y, if kept { Input::Plain(x.value.clone()) } else { input })
    });
    let y = cx.var(y);
    let (x, out) = (x.slot(), y.slot());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        cx.timed("linear dW", |cx| {
            weight_grad(cx, &d_y, &input, w);
            if let Some(bias) = bias {
                reduce::column_sums(cx.cpu, d_y.view(), d_y.cols(), cx.store.with_grad(bias).1);
            }
        });
        let d_x = cx.timed("linear dx", |cx| input_grad(cx, &d_y, w, x.dtype));
        cx.add_grad(x, d_x);
    });
    y
}

/// `y = x Wᵀ` without the tape.
pub(super) fn forward(cx: &mut Context<'_>, x: &Input, w: WeightId, dtype: DType) -> Tensor {
    grouped(cx, x, None, &[0, x.rows() as u32], w, dtype)
}

/// `y_i = x_index(i) W_gᵀ`, rows `offsets[g]..offsets[g + 1]` with group g of the weight.
pub(super) fn grouped(
    cx: &mut Context<'_>,
    x: &Input,
    index: Option<&[u32]>,
    offsets: &[u32],
    w: WeightId,
    dtype: DType,
) -> Tensor {
    note(cx, x, index, offsets, w);
    let rows = index.map_or(x.rows(), <[u32]>::len);
    let mut y = Tensor::uninit(rows, cx.store.rows(w), dtype);
    let w = cx.store.forward(cx.cpu, w);
    match (w, x) {
        (PackedWeight::Stored(w), Input::Plain(x)) => {
            let x = Operand { view: x.view(), cols: x.cols(), index };
            stored::matmul_stored(cx.cpu, x, offsets, w, y.view_mut());
        }
        (PackedWeight::Stored(w), Input::Passing(..) | Input::Codes(_)) => {
            let (x, how) = x.values(index);
            stored::matmul8_stored(cx.cpu, x, how, offsets, w, y.view_mut());
        }
        _ => x.product(index, w).matmul(cx.cpu, offsets, y.view_mut()),
    }
    y
}

/// Tells the store what a product forward reads, if it wants to know.
pub(super) fn note(cx: &mut Context<'_>, x: &Input, index: Option<&[u32]>, offsets: &[u32], w: WeightId) {
    if cx.store.noted_inputs().is_some() {
        let (numbers, cols) = (x.numbers(cx, DType::F32).converted(cx.cpu, DType::F32), x.cols());
        let inputs = cx.store.noted_inputs().expect("it does");
        inputs.add(w, numbers.f32(), cols, index, offsets);
    }
}

/// `dx = dy W`
pub(super) fn input_grad(cx: &mut Context<'_>, d_y: &Tensor, w: WeightId, dtype: DType) -> Tensor {
    grouped_input_grad(cx, d_y, None, &[0, d_y.rows() as u32], w, dtype, Scales::Usual)
}

/// `dx_i = dy_index(i) W_g`
pub(super) fn grouped_input_grad(
    cx: &mut Context<'_>,
    d_y: &Tensor,
    index: Option<&[u32]>,
    offsets: &[u32],
    w: WeightId,
    dtype: DType,
    scales: Scales,
) -> Tensor {
    let rows = index.map_or(d_y.rows(), <[u32]>::len);
    let mut d_x = Tensor::uninit(rows, cx.store.cols(w), dtype);
    let d_y = Input::gradient(cx, d_y, rows, w, scales);
    d_y.product(index, cx.store.backward(cx.cpu, w)).matmul(cx.cpu, offsets, d_x.view_mut());
    d_x
}

/// `dW += dyᵀ x`
pub(super) fn weight_grad(cx: &mut Context<'_>, d_y: &Tensor, x: &Input, w: WeightId) {
    grouped_weight_grad(cx, d_y, None, x, None, &[0, d_y.rows() as u32], w);
}

/// `dW_g += dyᵀ x` over the rows of group g, each operand through its index.
pub(super) fn grouped_weight_grad(
    cx: &mut Context<'_>,
    d_y: &Tensor,
    d_y_index: Option<&[u32]>,
    x: &Input,
    x_index: Option<&[u32]>,
    offsets: &[u32],
    w: WeightId,
) {
    let (compute, how) = (compute(cx.store.dtype(w)), cx.store.fp8(w));
    let d_y = Operand { view: d_y.view(), cols: d_y.cols(), index: d_y_index };
    let (d_w, add) = cx.store.grad_sum(w);
    match (how, x) {
        (Some(how), x) => {
            let (x, coded) = match x {
                Input::Plain(_) | Input::Passing(..) => {
                    (Values::Plain(Operand { index: x_index, ..x.plain() }), false)
                }
                Input::Codes(x) => (Values::Codes(x.codes(x_index)), true),
            };
            let power = [how.power_of_two, how.power_of_two || coded];
            gemm::matmul8_tn(cx.cpu, d_y, x, offsets, how, power, d_w, add);
        }
        (None, x) => {
            let x = Operand { index: x_index, ..x.plain() };
            gemm::matmul_tn(cx.cpu, d_y, x, offsets, compute, d_w, add);
        }
    }
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
