//! The head and cross entropy, fused and in chunks: the logits of a whole batch never exist at once.

use minke_cpu::gemm::{self, Operand};
use minke_cpu::loss::{self as kernel, Gradient, Scales};
use minke_cpu::{DType, ViewMut};

use crate::context::{Context, Var};
use crate::store::{WeightId, compute};
use crate::tensor::Tensor;

/// Logits that exist at once, at most (but those of 64 rows at least). Chunks depend on the vocabulary alone: the
/// head's gradient sums over rows in this order.
const CHUNK_LOGITS: usize = 1 << 21;

pub(super) fn chunk_rows(vocabulary: usize) -> usize {
    (CHUNK_LOGITS / vocabulary.max(1)).clamp(64, 1024)
}

/// Sum of the losses of labelled rows, and how many there are.
pub struct HeadLoss {
    /// In nats.
    pub sum: f64,
    /// Rows with a label.
    pub count: usize,
    /// Rows in which no token was likelier than the label.
    pub hits: usize,
}

/// Cross entropy of `softmax(x Wᵀ)` against `labels` (`u32::MAX`: no label): x [n, d], W [w, d].
///
/// With a tape, gradients of `scale * sum of losses` are computed on the way: the chunk's logits are at hand, and the
/// derivative of a sum needs nothing from above. A `frozen` head passes gradients on to x and gets none itself.
pub fn head_loss(
    cx: &mut Context<'_>,
    x: &Var,
    w: WeightId,
    labels: &[u32],
    scale: f32,
    frozen: bool,
) -> HeadLoss {
    let (n, d) = (x.value.rows(), x.value.cols());
    let (mut losses, mut hits) = (vec![0.0; n], 0);
    let mut d_x = cx.recording().then(|| Tensor::uninit(n, d, x.value.dtype()));
    cx.timed("head and loss", |cx| {
        chunks(cx, &x.value, w, |cx, rows, mut logits| {
            let vocabulary = logits.cols();
            let (labels, losses) = (&labels[rows.clone()], &mut losses[rows.clone()]);
            let scales = Scales::All(scale);
            let Some(d_x) = &mut d_x else {
                let (logits, to) = (logits.f32_mut(), Gradient::None);
                hits += kernel::cross_entropy(cx.cpu, logits, vocabulary, labels, scales, losses, to);
                return;
            };
            let (d_logits, of_chunk) = logits_gradient(cx, logits, labels, scales, losses, cx.store.dtype(w));
            hits += of_chunk;
            let offsets = [0, rows.len() as u32];
            let x = Operand::new(x.value.view().slice(rows.start * d, rows.end * d), d);
            let d_logits = Operand::new(d_logits.view(), vocabulary);
            if !frozen {
                let compute = compute(cx.store.dtype(w));
                gemm::matmul_tn(cx.cpu, d_logits, x, &offsets, compute, cx.store.with_grad(w).1, true);
            }
            let packed = cx.store.backward(cx.cpu, w);
            let out = match d_x.view_mut() {
                ViewMut::F32(x) => ViewMut::F32(&mut x[rows.start * d..rows.end * d]),
                ViewMut::Bf16(x) => ViewMut::Bf16(&mut x[rows.start * d..rows.end * d]),
            };
            gemm::matmul(cx.cpu, d_logits, &offsets, packed, out, false);
        });
    });
    if let Some(d_x) = d_x {
        cx.add_grad(x, d_x);
    }
    let sum = losses.iter().map(|&l| f64::from(l)).sum();
    HeadLoss { sum, count: labels.iter().filter(|&&l| l != kernel::IGNORED).count(), hits }
}

/// Losses of rows of logits, the logits' gradient in `dtype` (what products with the head compute in), and the hits.
pub(super) fn logits_gradient(
    cx: &Context<'_>,
    mut logits: Tensor,
    labels: &[u32],
    scales: Scales<'_>,
    losses: &mut [f32],
    dtype: DType,
) -> (Tensor, usize) {
    let vocabulary = logits.cols();
    match dtype {
        DType::F32 => {
            let to = Gradient::InPlace;
            let hits =
                kernel::cross_entropy(cx.cpu, logits.f32_mut(), vocabulary, labels, scales, losses, to);
            (logits, hits)
        }
        DType::Bf16 => {
            let mut d_logits = Tensor::uninit(logits.rows(), vocabulary, DType::Bf16);
            let ViewMut::Bf16(out) = d_logits.view_mut() else { unreachable!("made as bf16") };
            let to = Gradient::Bf16(out);
            let hits =
                kernel::cross_entropy(cx.cpu, logits.f32_mut(), vocabulary, labels, scales, losses, to);
            (d_logits, hits)
        }
    }
}

/// The loss of every row, 0 where there is no label.
pub fn head_losses(cx: &mut Context<'_>, x: &Var, w: WeightId, labels: &[u32]) -> Vec<f32> {
    let mut losses = vec![0.0; x.value.rows()];
    chunks(cx, &x.value, w, |cx, rows, mut logits| {
        let (vocabulary, losses) = (logits.cols(), &mut losses[rows.clone()]);
        let labels = &labels[rows];
        let (scales, to) = (Scales::All(1.0), Gradient::None);
        kernel::cross_entropy(cx.cpu, logits.f32_mut(), vocabulary, labels, scales, losses, to);
    });
    losses
}

/// Logits `x Wᵀ` [n, w] in f32.
pub fn head_logits(cx: &mut Context<'_>, x: &Tensor, w: WeightId) -> Tensor {
    super::linear::forward(cx, x, w, DType::F32)
}

fn chunks(
    cx: &mut Context<'_>,
    x: &Tensor,
    w: WeightId,
    mut f: impl FnMut(&mut Context<'_>, std::ops::Range<usize>, Tensor),
) {
    let (n, d) = (x.rows(), x.cols());
    let chunk = chunk_rows(cx.store.rows(w));
    for start in (0..n).step_by(chunk) {
        let rows = start..n.min(start + chunk);
        let mut logits = Tensor::uninit(rows.len(), cx.store.rows(w), DType::F32);
        let part = Operand::new(x.view().slice(rows.start * d, rows.end * d), d);
        let packed = cx.store.forward(cx.cpu, w);
        gemm::matmul(cx.cpu, part, &[0, rows.len() as u32], packed, logits.view_mut(), false);
        f(cx, rows, logits);
    }
}
