//! The head and cross entropy, fused and in chunks: logits exist for a few rows at a time, their gradients for a chunk.

use minke_cpu::copy;
use minke_cpu::gemm::{self, Operand};
use minke_cpu::loss::{self as kernel, Scales};
use minke_cpu::{DType, ViewMut, pointwise};

use crate::context::{Context, Var};
use crate::store::{WeightId, compute};
use crate::tensor::Tensor;

/// Logits that exist at once where they must, at most (but those of 64 rows at least).
const CHUNK_LOGITS: usize = 1 << 21;

/// The same for gradients of logits alone: each chunk adds to the whole gradient of the head. Chunks depend on the
/// vocabulary alone, since that gradient sums over rows in this order.
const CHUNK_GRADIENTS: usize = 1 << 23;

/// Rows of which logits exist at once.
pub(super) fn chunk_rows(vocabulary: usize) -> usize {
    rows_of(CHUNK_LOGITS, vocabulary)
}

/// Rows of which [`head_loss`] holds gradients of logits at once.
pub fn gradient_rows(vocabulary: usize) -> usize {
    rows_of(CHUNK_GRADIENTS, vocabulary)
}

fn rows_of(logits: usize, vocabulary: usize) -> usize {
    (logits / vocabulary.max(1)).clamp(64, 1024)
}

/// The head: logits are `x Wᵀ`, or `cap tanh(x Wᵀ / cap)`.
#[derive(Clone, Copy, Debug)]
pub struct HeadWeights {
    /// [w, d].
    pub w: WeightId,
    /// The soft cap of the logits.
    pub softcap: Option<f32>,
}

impl From<WeightId> for HeadWeights {
    fn from(w: WeightId) -> Self {
        Self { w, softcap: None }
    }
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

/// Cross entropy of the softmax of the head's logits against `labels` (`u32::MAX`: no label): x [n, d], W [w, d].
///
/// With a tape, gradients of `scale * sum of losses` are computed on the way: the chunk's logits are at hand, and the
/// derivative of a sum needs nothing from above. A `frozen` head passes gradients on to x and gets none itself.
pub fn head_loss(
    cx: &mut Context<'_>,
    x: &Var,
    head: impl Into<HeadWeights>,
    labels: &[u32],
    scale: f32,
    frozen: bool,
) -> HeadLoss {
    let HeadWeights { w, softcap } = head.into();
    let (n, d) = (x.value.rows(), x.value.cols());
    let (mut losses, mut hits) = (vec![0.0; n], 0);
    let mut d_x = cx.recording().then(|| Tensor::uninit(n, d, x.value.dtype()));
    cx.timed("head and loss", |cx| {
        for rows in chunks(n, cx.store.rows(w)) {
            let (dtype, vocabulary) = (cx.store.dtype(w), cx.store.rows(w));
            let (labels, losses) = (&labels[rows.clone()], &mut losses[rows.clone()]);
            let part = x.value.view().slice(rows.start * d, rows.end * d);
            let packed = cx.store.plain_forward(cx.cpu, w);
            let mut d_logits = d_x.is_some().then(|| Tensor::uninit(rows.len(), vocabulary, dtype));
            let to = d_logits.as_mut().map(Tensor::view_mut);
            hits += kernel::head(cx.cpu, part, packed, softcap, labels, Scales::All(scale), losses, to);
            let (Some(d_x), Some(d_logits)) = (&mut d_x, d_logits) else { continue };
            let offsets = [0, rows.len() as u32];
            let d_logits = Operand::new(d_logits.view(), vocabulary);
            if !frozen {
                let (d_w, add) = cx.store.grad_sum(w);
                let part = Operand::new(part, d);
                gemm::matmul_tn(cx.cpu, d_logits, part, &offsets, compute(dtype), d_w, add);
            }
            let packed = cx.store.plain_backward(cx.cpu, w);
            let out = match d_x.view_mut() {
                ViewMut::F32(x) => ViewMut::F32(&mut x[rows.start * d..rows.end * d]),
                ViewMut::Bf16(x) => ViewMut::Bf16(&mut x[rows.start * d..rows.end * d]),
            };
            gemm::matmul(cx.cpu, d_logits, &offsets, packed, out, false);
        }
    });
    if let Some(d_x) = d_x {
        cx.add_grad(x, d_x);
    }
    let sum = losses.iter().map(|&l| f64::from(l)).sum();
    HeadLoss { sum, count: labels.iter().filter(|&&l| l != kernel::IGNORED).count(), hits }
}

/// The loss of every row, 0 where there is no label.
pub fn head_losses(cx: &mut Context<'_>, x: &Var, head: impl Into<HeadWeights>, labels: &[u32]) -> Vec<f32> {
    let HeadWeights { w, softcap } = head.into();
    let mut losses = vec![0.0; x.value.rows()];
    if cx.store.stored(w).is_some() {
        let (d, vocabulary) = (x.value.cols(), cx.store.rows(w));
        for rows in chunks(x.value.rows(), vocabulary) {
            let mut part = Tensor::uninit(rows.len(), d, x.value.dtype());
            let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
            copy::take_rows(cx.cpu, x.value.view(), d, &ids, part.view_mut());
            let logits = head_logits(cx, &part, HeadWeights { w, softcap });
            let out = &mut losses[rows.clone()];
            kernel::log_probs(cx.cpu, logits.f32(), vocabulary, &labels[rows], out);
            for x in out {
                *x = if *x == 0.0 { 0.0 } else { -*x };
            }
        }
        return losses;
    }
    let packed = cx.store.plain_forward(cx.cpu, w);
    kernel::head(cx.cpu, x.value.view(), packed, softcap, labels, Scales::All(1.0), &mut losses, None);
    losses
}

/// Logits [n, w] in f32.
pub fn head_logits(cx: &mut Context<'_>, x: &Tensor, head: impl Into<HeadWeights>) -> Tensor {
    let HeadWeights { w, softcap } = head.into();
    let mut logits = super::linear::forward(cx, &super::linear::Input::Plain(x.clone()), w, DType::F32);
    if let Some(cap) = softcap {
        pointwise::softcap(cx.cpu, logits.f32_mut(), cap);
    }
    logits
}

/// The rows of each chunk.
fn chunks(n: usize, vocabulary: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let chunk = gradient_rows(vocabulary);
    (0..n).step_by(chunk).map(move |start| start..n.min(start + chunk))
}
