//! The mixture of experts: router, routed experts as grouped products, shared experts.

use std::sync::Arc;

use minke_cpu::DType;
use minke_cpu::moe::{self as kernel, Permutation};
use minke_cpu::routing::{self, RouterConfig};
use minke_cpu::swiglu::Gate;

use super::ffn;
use super::linear::{self, Input, Scales};
use crate::context::{Context, Var};
use crate::store::WeightId;
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
    /// The activation of all of them.
    pub gate: Gate,
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
    let act = cx.store.dtype(w.down);
    let (scores, experts, weights, perm, balance_loss) = cx.timed("router", |cx| {
        let logits = linear::forward(cx, &Input::Plain(x.value.clone()), w.router, DType::F32);
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
    // routed and shared experts read the same codes, where their products are of the same kind
    let (input, shared_input) = cx.timed("experts", |cx| {
        let mut of = |gate_up| Input::of(cx, &x.value, gate_up, Scales::PowersOfTwo);
        (of(w.gate_up), w.shared.map(|(gate_up, _)| of(gate_up)))
    });
    let (gu, y_slots) = cx.timed("experts", |cx| {
        let (index, offsets) = (Some(&perm.token_of_slot[..]), &perm.offsets[..]);
        let (h, gu) = ffn::gated(cx, &input, index, offsets, w.gate, w.gate_up);
        let input = Input::once(cx, &h, w.down, Scales::Usual);
        drop(h);
        let y = linear::grouped(cx, &input, None, offsets, w.down, act);
        (gu, y)
    });
    let shared = w.shared.zip(shared_input.as_ref());
    let shared = shared.map(|((gate_up, down), input)| ffn::forward(cx, input, w.gate, gate_up, down, act));
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
    let (x, out, cfg, borders) = (x.slot(), y.slot(), *cfg, borders.clone());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        let saved = Saved {
            x: &input,
            shared_x: shared_input.as_ref(),
            dtype: x.dtype,
            scores: &scores,
            experts: &experts,
            weights: &weights,
            perm: &perm,
        };
        let d_x = backward(cx, &saved, gu, shared_gu, &d_y, w, &cfg, &borders, alpha);
        cx.add_grad(x, d_x);
    });
    (y, routed)
}

struct Saved<'a> {
    x: &'a Input,
    /// What the shared experts read.
    shared_x: Option<&'a Input>,
    /// Of the gradient of x.
    dtype: DType,
    scores: &'a Tensor,
    experts: &'a [u32],
    weights: &'a [f32],
    perm: &'a Permutation,
}

/// Takes gate and up values of routed and shared experts. The gradient of a token's weight for an expert is `h . (dy D)`, so
/// the experts' outputs need not be kept.
fn backward(
    cx: &mut Context<'_>,
    saved: &Saved<'_>,
    gu: Input,
    shared_gu: Option<Input>,
    d_y: &Tensor,
    w: MoeWeights,
    cfg: &RouterConfig,
    borders: &[u32],
    alpha: f32,
) -> Tensor {
    let Saved { x, shared_x, dtype, scores, experts, weights, perm } = *saved;
    let (n, d, k, slots) = (x.rows(), x.cols(), cfg.top_k, perm.slots());
    let act = cx.store.dtype(w.down);
    let (of_slot, offsets) = (Some(&perm.token_of_slot[..]), &perm.offsets[..]);
    let d_shared = match (w.shared, shared_x, shared_gu) {
        (Some((gate_up, down)), Some(x), Some(gu)) => {
            Some(ffn::backward(cx, x, &gu, d_y, w.gate, gate_up, down, dtype))
        }
        _ => None,
    };
    let mut d_weights = Tensor::uninit(n, k, DType::F32);
    let (h, d_gu) = cx.timed("experts gate and up backward", |cx| {
        let mut by_slot = Tensor::uninit(slots, 1, DType::F32);
        let mut d_by_slot = Tensor::uninit(slots, 1, DType::F32);
        kernel::weights_by_slot(perm, weights, by_slot.f32_mut());
        let by_row = Some((by_slot.f32(), d_by_slot.f32_mut()));
        let parts = ffn::gated_backward(cx, d_y, of_slot, offsets, &gu, w.gate, w.down, by_row);
        kernel::weights_by_token(cx.cpu, perm, d_by_slot.f32(), d_weights.f32_mut());
        parts
    });
    // each is let go of as soon as it was read: here a step holds most
    drop(gu);
    cx.timed("experts dW", |cx| {
        linear::grouped_weight_grad(cx, d_y, of_slot, &Input::Plain(h), None, offsets, w.down);
        linear::grouped_weight_grad(cx, &d_gu, None, x, of_slot, offsets, w.gate_up);
    });
    let d_x_slots = cx.timed("experts dx", |cx| {
        linear::grouped_input_grad(cx, &d_gu, None, offsets, w.gate_up, act, Scales::Usual)
    });
    drop(d_gu);
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
        // in FP8 the forward product read the numbers, of which the codes are left: they would be kept for this alone
        let x = Input::Plain(x.numbers(cx, dtype));
        linear::weight_grad(cx, &d_logits, &x, w.router);
        linear::input_grad(cx, &d_logits, w.router, DType::F32)
    });
    cx.timed("combine backward", |cx| {
        let mut d_x = Tensor::uninit(n, d, dtype);
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
