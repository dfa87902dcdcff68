//! The gated linear unit of feed-forward layers: `h = act(gate) up`, where the activation is [`Gate`].

use std::ops::Range;

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::fp8::{self, Codes, CodesMut};
use crate::gemm::{self, Product, Target};
use crate::rows::{self, SharedView, kernel, lanes, load, store};
use crate::scratch;
use crate::simd::Simd;
use crate::view::{DType, View, ViewMut};

/// The activation of the gate, in both forms `x sigmoid(u(x))`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `x sigmoid(x)`.
    #[default]
    Silu,
    /// GELU by the hyperbolic tangent: `x (1 + tanh(u / 2)) / 2 = x sigmoid(u)`, `u = sqrt(8 / pi) (x + 0.044715 x^3)`.
    GeluTanh,
}

/// `sqrt(8 / pi)`
const GELU: f32 = 1.595_769_2;
const CUBIC: f32 = 0.044_715;

impl Gate {
    /// `sigmoid(u)`.
    #[inline(always)]
    fn open<S: Simd>(self, s: S, x: S::V) -> S::V {
        match self {
            Gate::Silu => s.sigmoid(x),
            Gate::GeluTanh => {
                let square = s.mul(x, x);
                let factor = s.fma(square, s.splat(GELU * CUBIC), s.splat(GELU));
                s.sigmoid(s.mul(x, factor))
            }
        }
    }

    /// `sigmoid(u) x u'(x)`, of the activation y = x sigmoid(u): its slope is `sigmoid + (1 - sigmoid) sigmoid x u'`.
    #[inline(always)]
    fn stretch<S: Simd>(self, s: S, x: S::V, y: S::V) -> S::V {
        match self {
            Gate::Silu => y,
            Gate::GeluTanh => {
                let square = s.mul(x, x);
                s.mul(y, s.fma(square, s.splat(3.0 * GELU * CUBIC), s.splat(GELU)))
            }
        }
    }
}

kernel! {
    Forward<'a>(s: S, gate_by: Gate, gu: View<'a>, f: usize, h: ViewMut<'a>) {
        let mut h = h;
        for row in 0..gu.len() / (2 * f) {
            lanes!(f, |i, n| {
                if i % 32 == 0 {
                    gu.ask((row + 1) * 2 * f + i, 32);
                    gu.ask((row + 1) * 2 * f + f + i, 32);
                    h.as_view().ask((row + 1) * f + i, 32);
                }
                let gate = load(s, gu, row * 2 * f + i, n);
                let up = load(s, gu, row * 2 * f + f + i, n);
                store(s, s.mul(s.mul(gate, gate_by.open(s, gate)), up), &mut h, row * f + i, n);
            });
        }
    }
}

/// `h = act(gate) up`, `silu(x) = x / (1 + e^-x)`.
///
/// gu: [n, 2f], a row's gate columns before its up columns; h: [n, f]; arithmetic in f32, h rounded once.
///
/// # Panics
/// When sizes do not fit.
///
/// Shazeer, "GLU Variants Improve Transformer" (2020), eq. 5 and 6.
pub fn swiglu(cpu: &Cpu, gate: Gate, gu: View<'_>, f: usize, h: ViewMut<'_>) {
    let n = rows::count("swiglu", gu.len(), 2 * f);
    rows::expect_len("swiglu", "h", h.len(), n * f);
    let h = SharedView::new(h);
    rows::over_tiles(cpu, n, 2 * f, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let h = unsafe { h.slice(from * f, (to - from) * f) };
        cpu.dispatch(Forward { gate_by: gate, gu: gu.slice(from * 2 * f, to * 2 * f), f, h });
    });
}

kernel! {
    Backward<'a>(
        s: S, gate_by: Gate, gu: View<'a>, f: usize, d_h: View<'a>, row_scale: Option<&'a [f32]>,
        d_row_scale: Option<&'a mut [f32]>, h_scaled: Option<ViewMut<'a>>, d_gu: ViewMut<'a>,
    ) {
        let (mut d_row_scale, mut h_scaled, mut d_gu) = (d_row_scale, h_scaled, d_gu);
        let one = s.splat(1.0);
        for row in 0..gu.len() / (2 * f) {
            let w = s.splat(row_scale.map_or(1.0, |scale| scale[row]));
            let at = row * 2 * f;
            let mut dot = s.zero();
            lanes!(f, |i, n| {
                if i % 32 == 0 {
                    gu.ask(at + 2 * f + i, 32);
                    gu.ask(at + 3 * f + i, 32);
                    d_h.ask((row + 1) * f + i, 32);
                    d_gu.as_view().ask(at + 2 * f + i, 32);
                    d_gu.as_view().ask(at + 3 * f + i, 32);
                    if let Some(h) = &h_scaled {
                        h.as_view().ask((row + 1) * f + i, 32);
                    }
                }
                let (gate, up) = (load(s, gu, at + i, n), load(s, gu, at + f + i, n));
                let sigmoid = gate_by.open(s, gate);
                let act = s.mul(gate, sigmoid);
                let h = s.mul(act, up);
                let d_h = load(s, d_h, row * f + i, n);
                dot = s.fma(h, d_h, dot);
                if let Some(h_scaled) = &mut h_scaled {
                    store(s, s.mul(w, h), h_scaled, row * f + i, n);
                }
                let d_h = s.mul(w, d_h);
                let slope = s.fma(gate_by.stretch(s, gate, act), s.sub(one, sigmoid), sigmoid);
                store(s, s.mul(s.mul(d_h, up), slope), &mut d_gu, at + i, n);
                store(s, s.mul(d_h, act), &mut d_gu, at + f + i, n);
            });
            if let Some(d_row_scale) = &mut d_row_scale {
                d_row_scale[row] = s.sum(dot);
            }
        }
    }
}

/// Gradient of [`swiglu`], of rows that a routing weight w multiplies afterwards: with `d = w d_h`,
/// `d_gate = d up (sigmoid + silu (1 - sigmoid))` (for [`Gate::Silu`]), `d_up = d act`.
///
/// gu, `d_gu`: [n, 2f], `d_h`: [n, f] (the gradient of w h). `row_scale` holds w: [n], absent for 1. On request also
/// `d_row_scale = h . d_h`: [n], the gradient of w, and `h_scaled = w h`: [n, f], recomputed for the weight gradient of
/// the projection that follows.
///
/// # Panics
/// When sizes do not fit.
pub fn swiglu_backward(
    cpu: &Cpu,
    gate: Gate,
    gu: View<'_>,
    f: usize,
    d_h: View<'_>,
    row_scale: Option<&[f32]>,
    d_row_scale: Option<&mut [f32]>,
    h_scaled: Option<ViewMut<'_>>,
    d_gu: ViewMut<'_>,
) {
    const OP: &str = "swiglu_backward";
    let n = rows::count(OP, gu.len(), 2 * f);
    rows::expect_len(OP, "d_h", d_h.len(), n * f);
    rows::expect_len(OP, "d_gu", d_gu.len(), 2 * n * f);
    if f > 0 {
        rows::expect_len(OP, "row_scale", row_scale.map_or(n, <[f32]>::len), n);
        rows::expect_len(OP, "d_row_scale", d_row_scale.as_ref().map_or(n, |d| d.len()), n);
    }
    rows::expect_len(OP, "h_scaled", h_scaled.as_ref().map_or(n * f, ViewMut::len), n * f);
    let d_gu = SharedView::new(d_gu);
    let h_scaled = h_scaled.map(SharedView::new);
    let d_row_scale = d_row_scale.map(SharedMut::new);
    rows::over_tiles(cpu, n, 2 * f, |from, to| {
        let count = to - from;
        // SAFETY: tasks own disjoint rows.
        let (d_gu, h_scaled, d_row_scale) = unsafe {
            (
                d_gu.slice(from * 2 * f, count * 2 * f),
                h_scaled.as_ref().map(|h| h.slice(from * f, count * f)),
                d_row_scale.as_ref().map(|d| d.slice(from, count)),
            )
        };
        let row_scale = row_scale.map(|scale| &scale[from..to]);
        let (gu, d_h) = (gu.slice(from * 2 * f, to * 2 * f), d_h.slice(from * f, to * f));
        cpu.dispatch(Backward { gate_by: gate, gu, f, d_h, row_scale, d_row_scale, h_scaled, d_gu });
    });
}

/// Gate and up values [n, 2f] on their way to the backward pass.
pub enum Kept<'a> {
    /// As they are, or nowhere.
    Numbers(Target<'a>),
    /// As codes, made of numbers of this dtype.
    Codes(DType, CodesMut<'a>),
}

/// Gate and up values [n, 2f] as they were kept.
#[derive(Clone, Copy)]
pub enum GateUp<'a> {
    /// As they are.
    Numbers(View<'a>),
    /// As codes.
    Codes(Codes<'a>),
}

/// `gu = x Wᵀ` and [`swiglu`] of it, some rows after the other: what is read again is still in the cache.
///
/// Product [n, 2f] of x and gate and up of the groups that rows between `offsets` belong to, gu: [n, 2f], h: [n, f]; bits as
/// of one after the other.
///
/// # Panics
/// When shapes do not fit.
pub fn swiglu_of_product(
    cpu: &Cpu,
    product: Product<'_>,
    offsets: &[u32],
    gate: Gate,
    gu: Kept<'_>,
    h: ViewMut<'_>,
) {
    let (n, f) = (product.rows(), product.columns() / 2);
    rows::expect_len("swiglu_of_product", "h", h.len(), n * f);
    let h = SharedView::new(h);
    // SAFETY (below): rows are handed over once.
    let h = |rows: &Range<usize>| unsafe { h.slice(rows.start * f, rows.len() * f) };
    match gu {
        Kept::Numbers(gu) => product.then(cpu, offsets, gu, &|rows, gu| swiglu(cpu, gate, gu, f, h(&rows))),
        Kept::Codes(dtype, gu) => {
            let gu = gu.shared();
            product.then(cpu, offsets, Target::Passing(dtype), &|rows, x| {
                swiglu(cpu, gate, x, f, h(&rows));
                // SAFETY: rows are handed over once.
                unsafe { gu.quantize(cpu, x, rows) };
            });
        }
    }
}

/// `d_h = d_y D` and [`swiglu_backward`] with it, some rows after the other: `d_h` exists for that moment, in the dtype of
/// `d_gu`, and so do numbers of gate and up values that were kept as codes.
///
/// Product [n, f] of `d_y` and down of the groups that rows between `offsets` belong to; the rest as for
/// [`swiglu_backward`].
///
/// # Panics
/// When shapes do not fit.
pub fn swiglu_backward_of_product(
    cpu: &Cpu,
    product: Product<'_>,
    offsets: &[u32],
    gate: Gate,
    gu: GateUp<'_>,
    row_scale: Option<&[f32]>,
    d_row_scale: Option<&mut [f32]>,
    h_scaled: ViewMut<'_>,
    d_gu: ViewMut<'_>,
) {
    const OP: &str = "swiglu_backward_of_product";
    let (n, f, dtype) = (product.rows(), product.columns(), d_gu.dtype());
    let gu_len = match gu {
        GateUp::Numbers(gu) => gu.len(),
        GateUp::Codes(gu) => gu.codes.len(),
    };
    rows::expect_len(OP, "gu", gu_len, 2 * n * f);
    rows::expect_len(OP, "d_gu", d_gu.len(), 2 * n * f);
    rows::expect_len(OP, "h_scaled", h_scaled.len(), n * f);
    rows::expect_len(OP, "row_scale", row_scale.map_or(n, <[f32]>::len), n);
    rows::expect_len(OP, "d_row_scale", d_row_scale.as_ref().map_or(n, |d| d.len()), n);
    let (d_gu, h_scaled) = (SharedView::new(d_gu), SharedView::new(h_scaled));
    let d_row_scale = d_row_scale.map(SharedMut::new);
    product.then(cpu, offsets, Target::Passing(dtype), &|rows, d_h| {
        let (start, count) = (rows.start, rows.len());
        // SAFETY: rows are handed over once.
        let (d_gu, h_scaled, d_row_scale) = unsafe {
            (
                d_gu.slice(start * 2 * f, count * 2 * f),
                h_scaled.slice(start * f, count * f),
                d_row_scale.as_ref().map(|d| d.slice(start, count)),
            )
        };
        let row_scale = row_scale.map(|scale| &scale[rows.clone()]);
        let back = |gu: View<'_>| {
            swiglu_backward(cpu, gate, gu, f, d_h, row_scale, d_row_scale, Some(h_scaled), d_gu);
        };
        match gu {
            GateUp::Numbers(gu) => back(gu.slice(rows.start * 2 * f, rows.end * 2 * f)),
            GateUp::Codes(gu) => {
                let mut words = scratch::take::<u32>((count * 2 * f * dtype.size_bytes()).div_ceil(4));
                let numbers = gemm::of_words(&mut words, dtype);
                // SAFETY: the memory of this task.
                let mut numbers = unsafe { numbers.slice(0, count * 2 * f) };
                fp8::dequantize(cpu, gu.part(rows), numbers.reborrow());
                back(numbers.as_view());
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use minke_num::bf16;
    use minke_num::tolerance::{Tolerance, assert_same_bits};

    use super::*;
    use crate::testing::{AWKWARD, assert_gradient, dot, everywhere, halve, normal, wide, wide_view, widen};

    const GATES: [Gate; 2] = [Gate::Silu, Gate::GeluTanh];

    /// The activation and its slope, as their papers write them.
    fn act(gate: Gate, x: f64) -> (f64, f64) {
        match gate {
            Gate::Silu => {
                let sigmoid = 1.0 / (1.0 + (-x).exp());
                (x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid))
            }
            Gate::GeluTanh => {
                let factor = (2.0 / std::f64::consts::PI).sqrt();
                let t = (factor * (x + 0.044715 * x.powi(3))).tanh();
                let inner = factor * (1.0 + 3.0 * 0.044715 * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
            }
        }
    }

    fn swiglu_ref(gate: Gate, gu: &[f64], f: usize) -> Vec<f64> {
        gu.chunks(2 * f).flat_map(|row| (0..f).map(|i| act(gate, row[i]).0 * row[f + i])).collect()
    }

    fn backward_ref(gate: Gate, gu: &[f64], f: usize, d_h: &[f64]) -> Vec<f64> {
        let mut d_gu = Vec::new();
        for (row, d_h) in gu.chunks(2 * f).zip(d_h.chunks(f)) {
            d_gu.extend((0..f).map(|i| d_h[i] * row[f + i] * act(gate, row[i]).1));
            d_gu.extend((0..f).map(|i| d_h[i] * act(gate, row[i]).0));
        }
        d_gu
    }

    #[test]
    fn forward_matches_f64() {
        for (f, gate) in AWKWARD.into_iter().flat_map(|f| GATES.map(|gate| (f, gate))) {
            for n in [1, 3, 70] {
                let mut gu = normal(1, n * 2 * f);
                gu[0] = 100.0;
                gu[f / 2] = -100.0;
                let half = halve(&gu);
                for view in [View::F32(&gu), View::Bf16(&half)] {
                    let got = everywhere("swiglu", |cpu| {
                        let mut h = vec![0.0; n * f];
                        swiglu(cpu, gate, view, f, ViewMut::F32(&mut h));
                        let mut rounded = vec![bf16::ZERO; n * f];
                        swiglu(cpu, gate, view, f, ViewMut::Bf16(&mut rounded));
                        assert_same_bits("bf16", &widen(&rounded), &widen(&halve(&h)));
                        h
                    });
                    Tolerance::new(1e-7, 2e-6)
                        .check("swiglu", &got, &swiglu_ref(gate, &wide_view(view), f))
                        .unwrap();
                }
            }
        }
    }

    #[test]
    fn formula_matches_differences() {
        let (n, f) = (2, 5);
        let (gu, d_h) = (wide(&normal(1, n * 2 * f)), wide(&normal(2, n * f)));
        for gate in GATES {
            let d_gu = backward_ref(gate, &gu, f, &d_h);
            assert_gradient("d_gu", |gu| dot(&swiglu_ref(gate, gu, f), &d_h), &gu, &d_gu);
        }
    }

    #[test]
    fn backward_matches_f64() {
        for (f, gate) in AWKWARD.into_iter().flat_map(|f| GATES.map(|gate| (f, gate))) {
            for n in [1, 3, 70] {
                let (gu, d_h, w) = (normal(1, n * 2 * f), normal(2, n * f), normal(3, n));
                let (gu_half, dh_half) = (halve(&gu), halve(&d_h));
                for (gu, d_h) in
                    [(View::F32(&gu), View::F32(&d_h)), (View::Bf16(&gu_half), View::Bf16(&dh_half))]
                {
                    let got = everywhere("swiglu_backward", |cpu| {
                        let (mut d_w, mut h, mut d_gu) =
                            (vec![0.0; n], vec![0.0; n * f], vec![0.0; n * 2 * f]);
                        let (h_out, out) = (ViewMut::F32(&mut h), ViewMut::F32(&mut d_gu));
                        swiglu_backward(cpu, gate, gu, f, d_h, Some(&w), Some(&mut d_w), Some(h_out), out);
                        [d_w, h, d_gu].concat()
                    });
                    let (gu, d_h, w) = (wide_view(gu), wide_view(d_h), wide(&w));
                    let h = swiglu_ref(gate, &gu, f);
                    let per_row = |x: &[f64]| -> Vec<f64> {
                        x.chunks(f).zip(&w).flat_map(|(x, w)| x.iter().map(move |x| w * x)).collect()
                    };
                    let mut expected: Vec<f64> =
                        h.chunks(f).zip(d_h.chunks(f)).map(|(a, b)| dot(a, b)).collect();
                    expected.extend(per_row(&h));
                    expected.extend(backward_ref(gate, &gu, f, &per_row(&d_h)));
                    Tolerance::new(5e-6, 3e-6).check("swiglu_backward", &got, &expected).unwrap();

                    let cpu = Cpu::detect(1);
                    let (mut plain, mut ones) = (vec![0.0; n * 2 * f], vec![0.0; n * 2 * f]);
                    let (gu, d_h) = (narrow(&gu), narrow(&d_h));
                    let (gu, d_h) = (View::F32(&gu), View::F32(&d_h));
                    swiglu_backward(&cpu, gate, gu, f, d_h, None, None, None, ViewMut::F32(&mut plain));
                    let out = ViewMut::F32(&mut ones);
                    swiglu_backward(&cpu, gate, gu, f, d_h, Some(&vec![1.0; n]), None, None, out);
                    assert_same_bits("a scale of one", &ones, &plain);
                }
            }
        }
    }

    #[test]
    fn fused_with_products_bits_stay() {
        use crate::gemm::{Compute, Operand, Packed};
        let (d, f, groups) = (37, 40, 3);
        let gate = Gate::GeluTanh;
        let (gate_up, down) = (normal(2, groups * 2 * f * d), normal(3, groups * d * f));
        for offsets in [[0, 1, 1, 5], [0, 700, 1000, 1000]] {
            let n = offsets[groups] as usize;
            let (x, d_y, by_row) = (halve(&normal(1, n * d)), halve(&normal(4, n * d)), normal(5, n));
            let index: Vec<u32> = (0..n as u32).rev().collect();
            for (level, compute) in crate::Level::available()
                .into_iter()
                .flat_map(|level| [(level, Compute::F32), (level, Compute::Bf16)])
            {
                for cpu in [1, 3].map(|threads| Cpu::with_level(level, threads)) {
                    let (mut up, mut back) = (Packed::empty(), Packed::empty());
                    up.pack_nt(&cpu, View::F32(&gate_up), groups, 2 * f, d, compute);
                    back.pack_nn(&cpu, View::F32(&down), groups, d, f, compute);
                    let x = Operand::gathered(View::Bf16(&x), d, &index);
                    let d_y = Operand::gathered(View::Bf16(&d_y), d, &index);
                    let zeros = |width: usize| vec![bf16::ZERO; n * width];

                    let (mut gu, mut h) = (zeros(2 * f), zeros(f));
                    gemm::matmul(&cpu, x, &offsets, &up, ViewMut::Bf16(&mut gu), false);
                    swiglu(&cpu, gate, View::Bf16(&gu), f, ViewMut::Bf16(&mut h));
                    let (mut kept, mut fused) = (zeros(2 * f), zeros(f));
                    let product = Product::Numbers { a: x, b: &up };
                    let target = Kept::Numbers(Target::Kept(ViewMut::Bf16(&mut kept)));
                    swiglu_of_product(&cpu, product, &offsets, gate, target, ViewMut::Bf16(&mut fused));
                    assert_same_bits("gate and up", &widen(&kept), &widen(&gu));
                    assert_same_bits("h", &widen(&fused), &widen(&h));
                    fused.fill(bf16::ONE);
                    let target = Kept::Numbers(Target::Passing(DType::Bf16));
                    swiglu_of_product(&cpu, product, &offsets, gate, target, ViewMut::Bf16(&mut fused));
                    assert_same_bits("h of passing rows", &widen(&fused), &widen(&h));

                    let mut d_h = zeros(f);
                    gemm::matmul(&cpu, d_y, &offsets, &back, ViewMut::Bf16(&mut d_h), false);
                    let run = |d_h: Option<&[bf16]>| {
                        let (mut d_w, mut h, mut d_gu) = (vec![0.0; n], zeros(f), zeros(2 * f));
                        let (h_out, out) = (ViewMut::Bf16(&mut h), ViewMut::Bf16(&mut d_gu));
                        let (gu, w) = (View::Bf16(&gu), Some(&by_row[..]));
                        match d_h {
                            Some(d_h) => {
                                let d_h = View::Bf16(d_h);
                                swiglu_backward(&cpu, gate, gu, f, d_h, w, Some(&mut d_w), Some(h_out), out);
                            }
                            None => swiglu_backward_of_product(
                                &cpu,
                                Product::Numbers { a: d_y, b: &back },
                                &offsets,
                                gate,
                                GateUp::Numbers(gu),
                                w,
                                Some(&mut d_w),
                                h_out,
                                out,
                            ),
                        }
                        [d_w, widen(&h), widen(&d_gu)].concat()
                    };
                    assert_same_bits("backward", &run(None), &run(Some(&d_h)));
                }
            }
        }
    }

    #[test]
    fn fused_with_products_in_fp8_bits_stay() {
        use crate::fp8::{Cuts, Fp8, Values};
        use crate::gemm::{Operand, Packed8, Weight8, matmul8};
        let (d, f, groups) = (150, 40, 3);
        let (gate, how) = (Gate::Silu, Fp8::default());
        let (gate_up, down) = (normal(2, groups * 2 * f * d), normal(3, groups * d * f));
        let packed = |cpu: &Cpu, w, rows, cols, transposed| {
            let mut packed = Packed8::empty();
            packed.pack(cpu, Weight8 { w, how, groups, rows, cols }, transposed, true);
            packed
        };
        for offsets in [[0, 1, 1, 5], [0, 700, 1000, 1000]] {
            let n = offsets[groups] as usize;
            let (x, d_y, by_row) = (halve(&normal(1, n * d)), halve(&normal(4, n * d)), normal(5, n));
            let index: Vec<u32> = (0..n as u32).rev().collect();
            for (level, threads) in crate::Level::available().into_iter().flat_map(|l| [(l, 1), (l, 3)]) {
                let cpu = Cpu::with_level(level, threads);
                let cuts = Cuts::parts(2 * f, 2);
                let up = packed(&cpu, &gate_up, cuts, d, true);
                let back = packed(&cpu, &down, Cuts::whole(d), f, false);
                let x = Values::Plain(Operand::gathered(View::Bf16(&x), d, &index));
                let d_y = Values::Plain(Operand::gathered(View::Bf16(&d_y), d, &index));
                let zeros = |width: usize| vec![bf16::ZERO; n * width];
                let coded = || (vec![0u8; n * 2 * f], vec![0.0; n * cuts.blocks()]);

                let (mut gu, mut h, mut codes) = (zeros(2 * f), zeros(f), coded());
                matmul8(&cpu, x, how, &offsets, &up, ViewMut::Bf16(&mut gu));
                swiglu(&cpu, gate, View::Bf16(&gu), f, ViewMut::Bf16(&mut h));
                fp8::quantize(&cpu, View::Bf16(&gu), cuts, how, &mut codes.0, &mut codes.1);
                let (mut fused, mut kept) = (zeros(f), coded());
                let target = CodesMut { codes: &mut kept.0, scales: &mut kept.1, cuts, how };
                let (product, target) =
                    (Product::Codes { a: x, how, b: &up }, Kept::Codes(DType::Bf16, target));
                swiglu_of_product(&cpu, product, &offsets, gate, target, ViewMut::Bf16(&mut fused));
                assert_same_bits("h", &widen(&fused), &widen(&h));
                assert!(kept == codes, "codes of gate and up, {level:?}");

                let codes = Codes { codes: &codes.0, scales: &codes.1, cuts, index: None };
                let (mut d_h, mut numbers) = (zeros(f), zeros(2 * f));
                matmul8(&cpu, d_y, how, &offsets, &back, ViewMut::Bf16(&mut d_h));
                fp8::dequantize(&cpu, codes, ViewMut::Bf16(&mut numbers));
                let run = |fused: bool| {
                    let (mut d_w, mut h, mut d_gu) = (vec![0.0; n], zeros(f), zeros(2 * f));
                    let (h_out, out) = (ViewMut::Bf16(&mut h), ViewMut::Bf16(&mut d_gu));
                    let (w, d_w_out) = (Some(&by_row[..]), Some(&mut d_w[..]));
                    if fused {
                        let (product, gu) = (Product::Codes { a: d_y, how, b: &back }, GateUp::Codes(codes));
                        swiglu_backward_of_product(&cpu, product, &offsets, gate, gu, w, d_w_out, h_out, out);
                    } else {
                        let (gu, d_h) = (View::Bf16(&numbers), View::Bf16(&d_h));
                        swiglu_backward(&cpu, gate, gu, f, d_h, w, d_w_out, Some(h_out), out);
                    }
                    [d_w, widen(&h), widen(&d_gu)].concat()
                };
                assert_same_bits("backward", &run(true), &run(false));
            }
        }
    }

    fn narrow(x: &[f64]) -> Vec<f32> {
        x.iter().map(|&x| x as f32).collect()
    }
}
