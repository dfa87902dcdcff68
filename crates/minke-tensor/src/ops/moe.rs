//! The mixture of experts: router, routed experts as grouped products, shared experts.

use std::sync::Arc;

use minke_cpu::gemm::{self, Operand};
use minke_cpu::moe::{self as kernel, Permutation};
use minke_cpu::routing::{self, RouterConfig};
use minke_cpu::{DType, swiglu};

use super::{ffn, linear};
use crate::context::{Context, Var};
use crate::store::{WeightId, compute};
use crate::tensor::Tensor;

/// The weights of one layer of experts.
#[derive(Clone, Copy)]
pub struct MoeWeights {
    /// Router [e, d].
    pub router: WeightId,
    /// Correction bias of the choice [e], if the router has one; moved by the balance rule, not by a gradient.
    pub bias: Option<WeightId>,
    /// Gate and up of every expert [e, 2f, d].
    pub gate_up: WeightId,
    /// Down of every expert [e, d, f].
    pub down: WeightId,
    /// Gate and up [2F, d], and down [d, F], of the shared experts as one.
    pub shared: Option<(WeightId, WeightId)>,
}

/// What the router did.
pub struct Routed {
    /// Tokens per expert.
    pub counts: Vec<u32>,
    /// The sequence-wise balance loss, alpha included; 0 without one.
    pub balance_loss: f32,
    /// The experts of each token [n, k], ascending within a token.
    pub experts: Arc<[u32]>,
}

/// `y = sum over the chosen experts e of g_e FFN_e(x) + shared(x)`: x [n, d], y [n, d] in `dtype`.
///
/// No token is dropped and none is padded: tokens are sorted by expert, experts run as one grouped product, and a
/// token's outputs are added in ascending expert order. `borders` are the rows where sequences begin, and the end;
/// with `alpha > 0` their balance loss times `balance_scale` is part of what is differentiated.
///
/// DeepSeek-V3 report, section 2.1.2, equations 12-20.
pub fn moe_ffn(
    cx: &mut Context<'_>,
    x: &Var,
    w: MoeWeights,
    cfg: &RouterConfig,
    borders: &Arc<[u32]>,
    alpha: f32,
    dtype: DType,
) -> (Var, Routed) {
    let (n, d, e, k) = (x.value.rows(), x.value.cols(), cfg.experts, cfg.top_k);
    let f = cx.store.cols(w.down);
    let act = cx.store.dtype(w.down);
    let (scores, experts, weights, perm, balance_loss) = cx.timed("router", |cx| {
        let logits = linear::forward(cx, &x.value, w.router, DType::F32);
        let mut scores = Tensor::uninit(n, e, DType::F32);
        let (mut experts, mut weights) = (vec![0; n * k], vec![0.0; n * k]);
        let bias = w.bias.map_or(&[][..], |b| cx.store.slice(b));
        routing::route(cx.cpu, logits.f32(), bias, cfg, scores.f32_mut(), &mut experts, &mut weights);
        let mut perm = Permutation::default();
        perm.build(&experts, n, k, e);
        let balance = if alpha > 0.0 && cx.differentiated() {
            routing::sequence_balance_loss(cx.cpu, scores.f32(), &experts, borders, cfg, alpha, None)
        } else {
            0.0
        };
        (scores, Arc::<[u32]>::from(experts), weights, perm, balance)
    });
    let (gu, y_slots) = cx.timed("experts", |cx| {
        let gathered = Operand::gathered(x.value.view(), d, &perm.token_of_slot);
        let mut gu = Tensor::uninit(n * k, 2 * f, act);
        let packed = cx.store.forward(cx.cpu, w.gate_up);
        gemm::matmul(cx.cpu, gathered, &perm.offsets, packed, gu.view_mut(), false);
        let mut h = Tensor::uninit(n * k, f, act);
        swiglu::swiglu(cx.cpu, gu.view(), f, h.view_mut());
        let mut y = Tensor::uninit(n * k, d, act);
        let packed = cx.store.forward(cx.cpu, w.down);
        gemm::matmul(cx.cpu, Operand::new(h.view(), f), &perm.offsets, packed, y.view_mut(), false);
        (gu, y)
    });
    let shared = w.shared.map(|(gate_up, down)| ffn::forward(cx, &x.value, gate_up, down, act));
    let y = cx.timed("combine", |cx| {
        let mut y = Tensor::uninit(n, d, dtype);
        let shared = shared.as_ref().map(|(y, _)| y.view());
        kernel::combine(cx.cpu, y_slots.view(), &perm, &weights, k, shared, y.view_mut());
        y
    });
    drop(y_slots);
    let counts = perm.offsets.windows(2).map(|w| w[1] - w[0]).collect();
    let routed = Routed { counts, balance_loss, experts: experts.clone() };
    let y = cx.var(y);
    if !cx.recording() {
        return (y, routed);
    }
    let shared_gu = shared.map(|(_, gu)| gu);
    let (x, out, cfg, borders) = (x.clone(), y.slot(), *cfg, borders.clone());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        let saved = Saved {
            x: &x.value,
            gu: &gu,
            scores: &scores,
            experts: &experts,
            weights: &weights,
            perm: &perm,
        };
        let d_x = backward(cx, &saved, &d_y, w, &cfg, &borders, alpha, shared_gu.as_ref());
        cx.add_grad(&x, d_x);
    });
    (y, routed)
}

struct Saved<'a> {
    x: &'a Tensor,
    gu: &'a Tensor,
    scores: &'a Tensor,
    experts: &'a [u32],
    weights: &'a [f32],
    perm: &'a Permutation,
}

/// The gradient of a token's weight for an expert is `h . (dy D)`, so the experts' outputs need not be kept.
fn backward(
    cx: &mut Context<'_>,
    saved: &Saved<'_>,
    d_y: &Tensor,
    w: MoeWeights,
    cfg: &RouterConfig,
    borders: &[u32],
    alpha: f32,
    shared_gu: Option<&Tensor>,
) -> Tensor {
    let Saved { x, gu, scores, experts, weights, perm } = *saved;
    let (n, d, k, slots, f) = (x.rows(), x.cols(), cfg.top_k, perm.slots(), gu.cols() / 2);
    let act = gu.dtype();
    let d_shared = match (w.shared, shared_gu) {
        (Some((gate_up, down)), Some(gu)) => Some(ffn::backward(cx, x, gu, d_y, gate_up, down)),
        _ => None,
    };
    let d_y_slots = Operand::gathered(d_y.view(), d, &perm.token_of_slot);
    let d_h = cx.timed("experts dx", |cx| {
        let mut d_h = Tensor::uninit(slots, f, act);
        let packed = cx.store.backward(cx.cpu, w.down);
        gemm::matmul(cx.cpu, d_y_slots, &perm.offsets, packed, d_h.view_mut(), false);
        d_h
    });
    let mut d_weights = Tensor::uninit(n, k, DType::F32);
    let (h, d_gu) = cx.timed("experts swiglu backward", |cx| {
        let mut by_slot = Tensor::uninit(slots, 1, DType::F32);
        let mut d_by_slot = Tensor::uninit(slots, 1, DType::F32);
        kernel::weights_by_slot(perm, weights, by_slot.f32_mut());
        let (mut h, mut d_gu) = (Tensor::uninit(slots, f, act), Tensor::uninit(slots, 2 * f, act));
        swiglu::swiglu_backward(
            cx.cpu,
            gu.view(),
            f,
            d_h.view(),
            Some(by_slot.f32()),
            Some(d_by_slot.f32_mut()),
            Some(h.view_mut()),
            d_gu.view_mut(),
        );
        kernel::weights_by_token(cx.cpu, perm, d_by_slot.f32(), d_weights.f32_mut());
        (h, d_gu)
    });
    drop(d_h);
    cx.timed("experts dW", |cx| {
        let (compute, offsets) = (compute(act), &perm.offsets);
        let h = Operand::new(h.view(), f);
        let (d_w, add) = cx.store.grad_sum(w.down);
        gemm::matmul_tn(cx.cpu, d_y_slots, h, offsets, compute, d_w, add);
        let x = Operand::gathered(x.view(), d, &perm.token_of_slot);
        let d_gu = Operand::new(d_gu.view(), 2 * f);
        let (d_w, add) = cx.store.grad_sum(w.gate_up);
        gemm::matmul_tn(cx.cpu, d_gu, x, offsets, compute, d_w, add);
    });
    let d_x_slots = cx.timed("experts dx", |cx| {
        let mut d_x_slots = Tensor::uninit(slots, d, act);
        let packed = cx.store.backward(cx.cpu, w.gate_up);
        let d_gu = Operand::new(d_gu.view(), 2 * f);
        gemm::matmul(cx.cpu, d_gu, &perm.offsets, packed, d_x_slots.view_mut(), false);
        d_x_slots
    });
    let d_router = cx.timed("router backward", |cx| {
        let mut d_logits = Tensor::uninit(n, cfg.experts, DType::F32);
        let mut d_scores = (alpha > 0.0).then(|| Tensor::uninit(n, cfg.experts, DType::F32));
        if let Some(d_scores) = &mut d_scores {
            let d_scores = Some(d_scores.f32_mut());
            routing::sequence_balance_loss(cx.cpu, scores.f32(), experts, borders, cfg, alpha, d_scores);
        }
        let extra = d_scores.as_ref().map(Tensor::f32);
        let (scores, d_weights) = (scores.f32(), d_weights.f32());
        routing::route_backward(cx.cpu, cfg, scores, experts, d_weights, extra, d_logits.f32_mut());
        linear::weight_grad(cx, &d_logits, x, w.router);
        linear::input_grad(cx, &d_logits, w.router, DType::F32)
    });
    cx.timed("combine backward", |cx| {
        let mut d_x = Tensor::uninit(n, d, x.dtype());
        let mut sum = Tensor::uninit(n, d, DType::F32);
        let add = match &d_shared {
            Some(d_shared) => {
                minke_cpu::copy::add(cx.cpu, d_router.view(), d_shared.view(), sum.view_mut());
                &sum
            }
            None => &d_router,
        };
        kernel::combine_dx(cx.cpu, d_x_slots.view(), perm, k, Some(add.view()), d_x.view_mut());
        d_x
    })
}
