//! Attention blocks from projected queries to concatenated heads: multi-head latent, and grouped-query.
//!
//! Training and inference run the same code; they differ in where keys come from ([`Keys`]): the rows of this call, or
//! a cache to which the rows of this call are appended first.

use std::sync::Arc;

use minke_cpu::attention::{self as kernel, AttentionShape, CachedSegment, KvCache, Segment};
use minke_cpu::gemm::{self, HeadColumns};
use minke_cpu::rope::{self, MlaShape};
use minke_cpu::{DType, copy, norm};

use super::linear::{self, Input, Scales};
use crate::context::{Context, Var};
use crate::store::WeightId;
use crate::tensor::Tensor;

/// Cosines and sines of every position [positions, r/2], and the position of each row of this call.
#[derive(Clone)]
pub struct Rotary {
    /// Cosines, scaled.
    pub cos: Arc<[f32]>,
    /// Sines, scaled.
    pub sin: Arc<[f32]>,
    /// Position of each row.
    pub positions: Arc<[u32]>,
    /// Whether rotated pairs are neighbours (DeepSeek) or halves apart.
    pub interleaved: bool,
}

/// Where the keys and values of a call are.
pub enum Keys<'a> {
    /// Rows of this call, in whole sequences.
    Rows(Arc<[Segment]>),
    /// One cache per sequence: (first row, rows, cache).
    Caches(Vec<(usize, usize, &'a mut KvCache)>),
}

/// Weights of latent attention behind the first projections.
#[derive(Clone, Copy)]
pub struct MlaWeights {
    /// Norm of the latent [c].
    pub kv_a_norm: WeightId,
    /// Keys without position and values from the latent [h (p + v), c].
    pub kv_b: WeightId,
    /// Epsilon of the latent's norm.
    pub eps: f32,
}

/// Shapes of an attention block.
#[derive(Clone, Copy)]
pub struct AttentionWeights {
    /// Heads and widths.
    pub shape: AttentionShape,
    /// Rotated width of a head; its last columns for latent attention, all of it otherwise.
    pub rotary: usize,
}

fn rotate(
    cx: &Context<'_>,
    x: &mut Tensor,
    heads: usize,
    a: &AttentionWeights,
    rotary: &Rotary,
    inverse: bool,
) {
    let width = a.shape.qk_dim;
    let Rotary { cos, sin, positions, interleaved } = rotary;
    let (offset, r) = (width - a.rotary, a.rotary);
    rope::rope_inplace(
        cx.cpu,
        x.view_mut(),
        heads,
        width,
        offset,
        r,
        positions,
        cos,
        sin,
        *interleaved,
        inverse,
    );
}

fn rotated(cx: &Context<'_>, x: &Tensor, heads: usize, a: &AttentionWeights, rotary: &Rotary) -> Tensor {
    let mut out = Tensor::uninit(x.rows(), x.cols(), x.dtype());
    let Rotary { cos, sin, positions, interleaved } = rotary;
    let (width, r) = (a.shape.qk_dim, a.rotary);
    let (x, offset) = (x.view(), width - r);
    rope::rope(cx.cpu, x, heads, width, offset, r, positions, cos, sin, *interleaved, false, out.view_mut());
    out
}

struct Attended {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Arc<[Segment]>,
}

/// Attention proper over rotated queries and keys.
fn attend(
    cx: &mut Context<'_>,
    shape: &AttentionShape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Keys<'_>,
) -> Attended {
    cx.timed("attention", |cx| {
        let n = q.rows();
        let mut out = Tensor::uninit(n, shape.heads * shape.v_dim, v.dtype());
        match keys {
            Keys::Rows(segments) => {
                let mut lse = Tensor::uninit(n, shape.heads, DType::F32);
                let (views, lse_out) = ((q.view(), k.view(), v.view()), lse.f32_mut());
                kernel::forward(cx.cpu, shape, views.0, views.1, views.2, &segments, out.view_mut(), lse_out);
                Attended { q, k, v, out, lse, segments }
            }
            Keys::Caches(mut caches) => {
                kernel::append_all(cx.cpu, &mut caches, k.view(), v.view());
                let segments: Vec<_> = caches
                    .iter()
                    .map(|(start, len, cache)| CachedSegment { start: *start, len: *len, cache })
                    .collect();
                kernel::forward_cached(cx.cpu, shape, q.view(), &segments, out.view_mut());
                let lse = Tensor::uninit(0, shape.heads, DType::F32);
                Attended { q, k, v, out, lse, segments: Arc::new([]) }
            }
        }
    })
}

/// Gradients of rotated queries, keys and values.
fn attend_backward(
    cx: &mut Context<'_>,
    shape: &AttentionShape,
    a: &Attended,
    d_out: &Tensor,
) -> [Tensor; 3] {
    cx.timed("attention backward", |cx| {
        let [mut d_q, mut d_k, mut d_v] =
            [&a.q, &a.k, &a.v].map(|x| Tensor::uninit(x.rows(), x.cols(), x.dtype()));
        let (q, k, v) = (a.q.view(), a.k.view(), a.v.view());
        let (out, lse, d_out) = (a.out.view(), a.lse.f32(), d_out.view());
        let (d_q_out, d_k_out, d_v_out) = (d_q.view_mut(), d_k.view_mut(), d_v.view_mut());
        kernel::backward(cx.cpu, shape, q, k, v, out, lse, d_out, &a.segments, d_q_out, d_k_out, d_v_out);
        [d_q, d_k, d_v]
    })
}

/// Multi-head latent attention in its expanded form.
///
/// q [n, h (p + r)] and kv_a [n, c + r] are the projections of the layer's input (latent first, then the shared rotary
/// key, not normed); the result is [n, h v]. Keys and values come from the normed latent through `kv_b`.
///
/// DeepSeek-V2, section 2.1, equations 9-19.
pub fn mla_attention(
    cx: &mut Context<'_>,
    q: &Var,
    kv_a: &Var,
    w: MlaWeights,
    a: AttentionWeights,
    rotary: &Rotary,
    keys: Keys<'_>,
) -> Var {
    let shape = a.shape;
    let (n, c) = (q.value.rows(), cx.store.cols(w.kv_b));
    let mla = MlaShape {
        heads: shape.heads,
        nope: shape.qk_dim - a.rotary,
        value: shape.v_dim,
        rotary: a.rotary,
        interleaved: rotary.interleaved,
    };
    let act = q.value.dtype();
    note_queries(cx, &q.value, w, [shape.heads, shape.qk_dim, mla.nope]);
    let stride = kv_a.value.cols();
    let (latent, normed, rstd) = cx.timed("mla latent", |cx| latent(cx, &kv_a.value, w, c));
    let normed = cx.timed("linear", |cx| Input::of(cx, &normed, w.kv_b, Scales::Usual));
    let (k, v) = expand(cx, mla, &normed, &kv_a.value, w.kv_b, rotary, act);
    let q_turned = cx.timed("rope", |cx| rotated(cx, &q.value, shape.heads, &a, rotary));
    let mut attended = attend(cx, &shape, q_turned, k, v, keys);
    let out = cx.var(attended.out.clone());
    // in FP8 keys and values are made again on the way back, from codes that are smaller than they (V3 report, 3.2.3)
    let source = (cx.recording() && cx.store.fp8(w.kv_b).is_some()).then(|| kv_a.value.clone());
    let latent = if source.is_some() {
        (attended.k, attended.v) = (Tensor::uninit(0, 0, act), Tensor::uninit(0, 0, act));
        None
    } else {
        Some(latent)
    };
    let (q, kv_a, result, rotary) = (q.slot(), kv_a.slot(), out.slot(), rotary.clone());
    cx.record(move |cx| {
        let Some(d_out) = cx.take_grad(result) else { return };
        if let Some(kv_a) = &source {
            (attended.k, attended.v) = expand(cx, mla, &normed, kv_a, w.kv_b, &rotary, act);
        }
        let latent = latent.or_else(|| source.as_ref().map(|kv_a| latent_columns(cx, kv_a, c)));
        let latent = latent.expect("the latent, or what it is a part of");
        let [mut d_q, d_k, d_v] = attend_backward(cx, &shape, &attended, &d_out);
        let mut d_kv_a = Tensor::uninit(n, stride, act);
        let mut d_kv = Tensor::uninit(n, shape.heads * (mla.nope + mla.value), act);
        cx.timed("rope backward", |cx| {
            rotate(cx, &mut d_q, shape.heads, &a, &rotary, true);
            let (cos, sin, positions) = (&rotary.cos, &rotary.sin, &rotary.positions);
            let (d_kv_out, d_kv_a_out) = (d_kv.view_mut(), d_kv_a.view_mut());
            let (d_k, d_v) = (d_k.view(), d_v.view());
            rope::mla_keys_backward(
                cx.cpu, mla, d_k, d_v, positions, cos, sin, d_kv_out, d_kv_a_out, stride, c,
            );
        });
        cx.timed("linear dW", |cx| linear::weight_grad(cx, &d_kv, &normed, w.kv_b));
        let d_normed = cx.timed("linear dx", |cx| linear::input_grad(cx, &d_kv, w.kv_b, act));
        cx.timed("mla latent backward", |cx| {
            let mut d_latent = Tensor::uninit(n, c, act);
            let (weight, d_w) = cx.store.with_grad(w.kv_a_norm);
            let (x, d_y) = (latent.view(), d_normed.view());
            norm::rmsnorm_backward(cx.cpu, x, weight.into(), rstd.f32(), d_y, None, d_latent.view_mut(), d_w);
            copy::put_columns(cx.cpu, d_latent.view(), c, d_kv_a.view_mut(), stride, 0);
        });
        cx.add_grad(q, d_q);
        cx.add_grad(kv_a, d_kv_a);
    });
    out
}

/// Tells the store which queries keys without position are multiplied with, if it wants to know: `nope` numbers of each
/// of `heads` of `width`.
fn note_queries(cx: &mut Context<'_>, q: &Tensor, w: MlaWeights, [heads, width, nope]: [usize; 3]) {
    if let Some(inputs) = cx.store.noted_inputs() {
        inputs.add_queries(w.kv_b, q.converted(cx.cpu, DType::F32).f32(), [heads, width, nope]);
    }
}

/// Keys [n, h (p + r)], rotated, and values [n, h v] of the normed latent; rotary keys are the last columns of `kv_a`.
fn expand(
    cx: &mut Context<'_>,
    mla: MlaShape,
    normed: &Input,
    kv_a: &Tensor,
    kv_b: WeightId,
    rotary: &Rotary,
    act: DType,
) -> (Tensor, Tensor) {
    let kv = cx.timed("linear", |cx| linear::forward(cx, normed, kv_b, act));
    cx.timed("rope", |cx| {
        let (n, c) = (normed.rows(), normed.cols());
        let mut k = Tensor::uninit(n, mla.heads * (mla.nope + mla.rotary), act);
        let mut v = Tensor::uninit(n, mla.heads * mla.value, act);
        let (cos, sin, positions) = (&rotary.cos, &rotary.sin, &rotary.positions);
        let (rope_keys, k_out, v_out) = (kv_a.view(), k.view_mut(), v.view_mut());
        rope::mla_keys(cx.cpu, mla, kv.view(), rope_keys, kv_a.cols(), c, positions, cos, sin, k_out, v_out);
        (k, v)
    })
}

/// The first `c` columns of `kv_a`.
fn latent_columns(cx: &Context<'_>, kv_a: &Tensor, c: usize) -> Tensor {
    let mut latent = Tensor::uninit(kv_a.rows(), c, kv_a.dtype());
    copy::take_columns(cx.cpu, kv_a.view(), kv_a.cols(), 0, c, latent.view_mut());
    latent
}

/// The latent [n, c] of `kv_a`, its norm, and the norm's reciprocal deviations.
fn latent(cx: &mut Context<'_>, kv_a: &Tensor, w: MlaWeights, c: usize) -> (Tensor, Tensor, Tensor) {
    let n = kv_a.rows();
    let latent = latent_columns(cx, kv_a, c);
    let mut normed = Tensor::uninit(n, c, kv_a.dtype());
    let mut rstd = Tensor::uninit(n, 1, DType::F32);
    let weight = cx.store.slice(w.kv_a_norm);
    norm::rmsnorm(cx.cpu, latent.view(), weight.into(), w.eps, normed.view_mut(), rstd.f32_mut());
    (latent, normed, rstd)
}

/// Multi-head latent attention in its absorbed form, for inference: queries are carried into the latent space, where
/// all heads share one key (latent and rotary part) and one value (the latent), and results are carried back.
///
/// Each cache is one [of latents](KvCache::of_latents): c + r numbers per position instead of h (p + r + v). Equal to
/// [`mla_attention`] up to rounding: what is carried is rounded to the dtype of q. DeepSeek-V2, section 2.1.2.
pub fn mla_absorbed(
    cx: &mut Context<'_>,
    q: &Tensor,
    kv_a: &Tensor,
    w: MlaWeights,
    a: AttentionWeights,
    rotary: &Rotary,
    caches: Vec<(usize, usize, &mut KvCache)>,
) -> Tensor {
    let AttentionShape { heads, qk_dim, v_dim, .. } = a.shape;
    let (n, c, r, p) = (q.rows(), cx.store.cols(w.kv_b), a.rotary, qk_dim - a.rotary);
    let act = q.dtype();
    note_queries(cx, q, w, [heads, qk_dim, p]);
    let shape = AttentionShape { kv_heads: 1, qk_dim: c + r, v_dim: c, ..a.shape };
    let of = |width, at| HeadColumns { width, at };
    // [latent ; rotary key] of each row
    let k = cx.timed("mla latent", |cx| {
        let (_, normed, _) = latent(cx, kv_a, w, c);
        let mut k = Tensor::uninit(n, c + r, act);
        copy::put_columns(cx.cpu, normed.view(), c, k.view_mut(), c + r, 0);
        copy::move_columns(cx.cpu, (kv_a.view(), kv_a.cols(), c), r, (k.view_mut(), c + r, c));
        rotate(cx, &mut k, 1, &AttentionWeights { shape, rotary: r }, rotary, false);
        k
    });
    // queries in the latent space: [q_nope K_h ; q_rope] of each head
    let mut q_latent = Tensor::uninit(n, heads * (c + r), act);
    cx.timed("mla absorb", |cx| {
        let [keys, _] = cx.store.absorbed(cx.cpu, w.kv_b, p, v_dim);
        gemm::matmul_heads(cx.cpu, (q.view(), of(qk_dim, 0)), keys, (q_latent.view_mut(), of(c + r, 0)));
        copy::move_columns(cx.cpu, (q.view(), qk_dim, p), r, (q_latent.view_mut(), c + r, c));
        rotate(cx, &mut q_latent, heads, &AttentionWeights { shape, rotary: r }, rotary, false);
    });
    let nothing = Tensor::uninit(0, c, act);
    let attended = attend(cx, &shape, q_latent, k, nothing, Keys::Caches(caches));
    // results in the latent space, carried back by each head's value rows
    let mut out = Tensor::uninit(n, heads * v_dim, act);
    cx.timed("mla absorb", |cx| {
        let [_, values] = cx.store.absorbed(cx.cpu, w.kv_b, p, v_dim);
        let from = (attended.out.view(), of(c, 0));
        gemm::matmul_heads(cx.cpu, from, values, (out.view_mut(), of(v_dim, 0)));
    });
    out
}

/// Grouped-query attention over projected q [n, h p], k and v [n, h_kv p]: rotation, attention, within the shape's window
/// and under its soft cap; the result is [n, h p]. Multi-head attention when h_kv = h.
///
/// Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models" (2023), section 2.2.
pub fn gqa_attention(
    cx: &mut Context<'_>,
    [q, k, v]: [&Var; 3],
    a: AttentionWeights,
    rotary: &Rotary,
    keys: Keys<'_>,
) -> Var {
    let shape = a.shape;
    let (q_turned, k_turned) = cx.timed("rope", |cx| {
        (rotated(cx, &q.value, shape.heads, &a, rotary), rotated(cx, &k.value, shape.kv_heads, &a, rotary))
    });
    let attended = attend(cx, &shape, q_turned, k_turned, v.value.clone(), keys);
    let out = cx.var(attended.out.clone());
    let (q, k, v, result, rotary) = (q.slot(), k.slot(), v.slot(), out.slot(), rotary.clone());
    cx.record(move |cx| {
        let Some(d_out) = cx.take_grad(result) else { return };
        let [mut d_q, mut d_k, d_v] = attend_backward(cx, &shape, &attended, &d_out);
        cx.timed("rope backward", |cx| {
            rotate(cx, &mut d_q, shape.heads, &a, &rotary, true);
            rotate(cx, &mut d_k, shape.kv_heads, &a, &rotary, true);
        });
        cx.add_grad(q, d_q);
        cx.add_grad(k, d_k);
        cx.add_grad(v, d_v);
    });
    out
}
