//! The head where a policy is trained: log-probabilities of what was sampled, and gradients of whatever depends on them.
//!
//! As in the loss, logits exist in chunks only. A chunk holds whole sequences, since an objective may weigh a token by
//! its sequence; a sequence that is longer than a chunk is walked twice.

use minke_cpu::gemm::{self, Operand};
use minke_cpu::loss;
use minke_cpu::policy::{self, Divergence, Kept, Teacher};
use minke_cpu::{DType, ViewMut, copy, pointwise};

use super::loss::{HeadWeights, chunk_rows};
use crate::context::{Context, Var};
use crate::store::compute;
use crate::tensor::Tensor;

/// Writes dL/dlog p of each token of a sequence, given its number and the tokens' log-probabilities.
pub type Slope<'a> = dyn FnMut(usize, &[f32], &mut [f32]) + 'a;

/// The rows of a call that count: those that predict a sampled token.
#[derive(Clone, Copy, Debug)]
pub struct PolicyRows<'a> {
    /// Rows of x, ascending [r].
    pub rows: &'a [u32],
    /// What was sampled after each [r].
    pub labels: &'a [u32],
    /// Where sequences begin among `rows`, and the end.
    pub groups: &'a [usize],
    /// The temperature of sampling.
    pub temperature: f32,
    /// What its filters left, row by row.
    pub kept: &'a Kept,
}

/// Log-probabilities [r] of the labels under the softmax of the head's logits, divided by the temperature, over what was kept: x [n, d].
///
/// With a tape, `slope` is asked once for each sequence: given its number and log-probabilities it writes dL/dlog p of
/// each, and that gradient goes on to x and W. Without a tape it is not called.
pub fn head_policy(
    cx: &mut Context<'_>,
    x: &Var,
    head: impl Into<HeadWeights>,
    policy: PolicyRows<'_>,
    slope: &mut Slope<'_>,
) -> Vec<f32> {
    let weights: HeadWeights = head.into();
    let w = weights.w;
    let PolicyRows { labels, groups, temperature, kept, .. } = policy;
    let limit = chunk_rows(cx.store.rows(w));
    let recording = cx.recording();
    cx.timed("head and policy", |cx| {
        let mut head = Head::new(cx, x, weights, policy.rows);
        let mut log_probs = vec![0.0; labels.len()];
        let mut slopes = vec![0.0; labels.len()];
        let mut group = 0;
        while group + 1 < groups.len() {
            // as many whole sequences as fit, at least one
            let (first, start) = (group, groups[group]);
            group += 1;
            while group + 1 < groups.len() && groups[group + 1] - start <= limit {
                group += 1;
            }
            let end = groups[group];
            let parts: Vec<_> = (start..end).step_by(limit).map(|at| at..end.min(at + limit)).collect();
            let mut kept_logits = None;
            for part in &parts {
                let mut logits = head.logits(cx, part.clone());
                let vocabulary = logits.cols();
                policy::temper(
                    cx.cpu,
                    logits.f32_mut(),
                    vocabulary,
                    temperature,
                    &kept.rows(part.start, part.end),
                );
                let out = &mut log_probs[part.clone()];
                loss::log_probs(cx.cpu, logits.f32(), vocabulary, &labels[part.clone()], out);
                kept_logits = Some(logits);
            }
            if !recording {
                continue;
            }
            for sequence in first..group {
                let of = groups[sequence]..groups[sequence + 1];
                slope(sequence, &log_probs[of.clone()], &mut slopes[of]);
            }
            for part in &parts {
                let logits = match kept_logits.take() {
                    Some(logits) if parts.len() == 1 => logits,
                    _ => {
                        let mut logits = head.logits(cx, part.clone());
                        let vocabulary = logits.cols();
                        let kept = kept.rows(part.start, part.end);
                        policy::temper(cx.cpu, logits.f32_mut(), vocabulary, temperature, &kept);
                        logits
                    }
                };
                // the logits were divided by the temperature
                let scales: Vec<f32> = slopes[part.clone()].iter().map(|s| s / temperature).collect();
                let (labels, log_probs) = (&labels[part.clone()], &log_probs[part.clone()]);
                let vocabulary = logits.cols();
                let mut d_logits = Tensor::uninit(part.len(), vocabulary, cx.store.dtype(w));
                let (x, to) = (logits.f32(), d_logits.view_mut());
                policy::log_prob_gradients(cx.cpu, x, vocabulary, labels, log_probs, &scales, to);
                head.backward(cx, part.clone(), d_logits);
            }
        }
        head.finish(cx, x, policy.rows);
        log_probs
    })
}

/// Divergence [r] of the softmax of `logits / temperature` from a teacher's likeliest tokens at some rows.
///
/// With a tape, `scale T²` times the sum of the divergences is differentiated: the factor keeps the gradient's size
/// when the temperature changes (Hinton et al. 2015, section 2).
pub fn head_distill(
    cx: &mut Context<'_>,
    x: &Var,
    head: impl Into<HeadWeights>,
    rows: &[u32],
    teacher: &Teacher,
    divergence: Divergence,
    temperature: f32,
    scale: f32,
) -> Vec<f32> {
    let weights: HeadWeights = head.into();
    let w = weights.w;
    let limit = chunk_rows(cx.store.rows(w));
    cx.timed("head and distillation", |cx| {
        let mut head = Head::new(cx, x, weights, rows);
        let mut out = vec![0.0; rows.len()];
        for start in (0..rows.len()).step_by(limit) {
            let part = start..rows.len().min(start + limit);
            let mut logits = head.logits(cx, part.clone());
            let vocabulary = logits.cols();
            policy::temper(cx.cpu, logits.f32_mut(), vocabulary, temperature, &Kept::default());
            let of = part.start * teacher.k..part.end * teacher.k;
            let teacher = Teacher {
                k: teacher.k,
                ids: teacher.ids[of.clone()].to_vec(),
                log_probs: teacher.log_probs[of].to_vec(),
            };
            let scales = vec![scale * temperature; part.len()];
            let values = &mut out[part.clone()];
            policy::distill(cx.cpu, logits.f32_mut(), vocabulary, &teacher, divergence, &scales, values);
            head.backward(cx, part, logits);
        }
        head.finish(cx, x, rows);
        out
    })
}

/// What a model takes to be likeliest at some rows: the k best tokens under the softmax of
/// `logits / temperature`.
pub fn head_likeliest(
    cx: &mut Context<'_>,
    x: &Var,
    head: impl Into<HeadWeights>,
    rows: &[u32],
    k: usize,
    temperature: f32,
) -> Teacher {
    let weights: HeadWeights = head.into();
    let w = weights.w;
    let limit = chunk_rows(cx.store.rows(w));
    let mut head = Head::new(cx, x, weights, rows);
    let mut all = Teacher { k: k.min(cx.store.rows(w)), ..Teacher::default() };
    for start in (0..rows.len()).step_by(limit) {
        let mut logits = head.logits(cx, start..rows.len().min(start + limit));
        let vocabulary = logits.cols();
        policy::temper(cx.cpu, logits.f32_mut(), vocabulary, temperature, &Kept::default());
        let part = policy::likeliest(cx.cpu, logits.f32(), vocabulary, k);
        all.ids.extend(part.ids);
        all.log_probs.extend(part.log_probs);
    }
    all
}

/// The head over chosen rows: logits forward, gradients of them backward.
struct Head {
    weights: HeadWeights,
    /// The chosen rows [r, d].
    x: Tensor,
    d_x: Option<Tensor>,
}

impl Head {
    fn new(cx: &mut Context<'_>, x: &Var, weights: HeadWeights, rows: &[u32]) -> Self {
        let (d, dtype) = (x.value.cols(), x.value.dtype());
        let mut chosen = Tensor::uninit(rows.len(), d, dtype);
        copy::take_rows(cx.cpu, x.value.view(), d, rows, chosen.view_mut());
        let d_x = cx.recording().then(|| Tensor::uninit(rows.len(), d, dtype));
        Self { weights, x: chosen, d_x }
    }

    fn part(&self, rows: &std::ops::Range<usize>) -> Operand<'_> {
        let d = self.x.cols();
        Operand::new(self.x.view().slice(rows.start * d, rows.end * d), d)
    }

    fn logits(&mut self, cx: &mut Context<'_>, rows: std::ops::Range<usize>) -> Tensor {
        let mut logits = Tensor::uninit(rows.len(), cx.store.rows(self.weights.w), DType::F32);
        let packed = cx.store.plain_forward(cx.cpu, self.weights.w);
        gemm::matmul(cx.cpu, self.part(&rows), &[0, rows.len() as u32], packed, logits.view_mut(), false);
        if let Some(cap) = self.weights.softcap {
            pointwise::softcap(cx.cpu, logits.f32_mut(), cap);
        }
        logits
    }

    /// From the gradient of the logits, which becomes that of the product behind a soft cap.
    fn backward(&mut self, cx: &mut Context<'_>, rows: std::ops::Range<usize>, mut d_logits: Tensor) {
        let Some(mut d_x) = self.d_x.take() else { return };
        if let Some(cap) = self.weights.softcap {
            // once more: what was made of them does not tell
            let logits = self.logits(cx, rows.clone());
            pointwise::softcap_backward(cx.cpu, logits.f32(), cap, d_logits.view_mut());
        }
        let d = self.x.cols();
        let offsets = [0, rows.len() as u32];
        let d_logits = Operand::new(d_logits.view(), d_logits.cols());
        let compute = compute(cx.store.dtype(self.weights.w));
        let part = self.part(&rows);
        let (d_w, add) = cx.store.grad_sum(self.weights.w);
        gemm::matmul_tn(cx.cpu, d_logits, part, &offsets, compute, d_w, add);
        let packed = cx.store.plain_backward(cx.cpu, self.weights.w);
        let of = rows.start * d..rows.end * d;
        let out = match d_x.view_mut() {
            ViewMut::F32(x) => ViewMut::F32(&mut x[of]),
            ViewMut::Bf16(x) => ViewMut::Bf16(&mut x[of]),
        };
        gemm::matmul(cx.cpu, d_logits, &offsets, packed, out, false);
        self.d_x = Some(d_x);
    }

    /// Hands the rows' gradients to x; all other rows have none.
    fn finish(self, cx: &mut Context<'_>, x: &Var, rows: &[u32]) {
        let Some(d_x) = self.d_x else { return };
        let (n, d) = (x.value.rows(), x.value.cols());
        let mut whole = Tensor::zeros(n, d, x.value.dtype());
        copy::put_rows(cx.cpu, d_x.view(), d, rows, whole.view_mut());
        cx.add_grad(x, whole);
    }
}
