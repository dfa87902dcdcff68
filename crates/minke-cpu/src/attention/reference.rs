//! Attention in f64, as the formula says it: the whole matrix, no blocks.

use super::{AttentionShape, Segment};

#[expect(clippy::struct_field_names, reason = "gradients are named d_ and what they belong to")]
pub struct Gradients {
    pub d_q: Vec<f64>,
    pub d_k: Vec<f64>,
    pub d_v: Vec<f64>,
}

/// Probabilities of query row `i` of head `head` over the keys `0..=i` of its segment (zero outside its window), the
/// logarithm of their sum, and the slope of the soft cap at each.
fn probabilities(
    x: &AttentionShape,
    q: &[f64],
    k: &[f64],
    segment: Segment,
    i: usize,
    head: usize,
) -> (Vec<f64>, f64, Vec<f64>) {
    let kv_head = head / (x.heads / x.kv_heads);
    let q = &q[((segment.start + i) * x.heads + head) * x.qk_dim..][..x.qk_dim];
    let scores: Vec<f64> = (0..=i)
        .map(|j| {
            let k = &k[((segment.start + j) * x.kv_heads + kv_head) * x.qk_dim..][..x.qk_dim];
            q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * f64::from(x.scale)
        })
        .collect();
    let mut slopes = vec![1.0; scores.len()];
    let scores: Vec<f64> = scores
        .into_iter()
        .zip(&mut slopes)
        .enumerate()
        .map(|(j, (score, slope))| {
            let capped = x.softcap.map_or(score, |cap| {
                let t = (score / f64::from(cap)).tanh();
                *slope = 1.0 - t * t;
                f64::from(cap) * t
            });
            if x.window.is_some_and(|window| j + window <= i) { f64::NEG_INFINITY } else { capped }
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let lse = max + sum.ln();
    (scores.iter().map(|s| (s - lse).exp()).collect(), lse, slopes)
}

/// Outputs and logarithms.
pub fn forward_ref(
    x: &AttentionShape,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    segments: &[Segment],
) -> (Vec<f64>, Vec<f64>) {
    let tokens = q.len() / (x.heads * x.qk_dim);
    let (mut out, mut lse) = (vec![0.0; tokens * x.heads * x.v_dim], vec![0.0; tokens * x.heads]);
    for &segment in segments {
        for i in 0..segment.len {
            for head in 0..x.heads {
                let kv_head = head / (x.heads / x.kv_heads);
                let (p, l, _) = probabilities(x, q, k, segment, i, head);
                let row = (segment.start + i) * x.heads + head;
                lse[row] = l;
                for (j, p) in p.iter().enumerate() {
                    for c in 0..x.v_dim {
                        let v = v[((segment.start + j) * x.kv_heads + kv_head) * x.v_dim + c];
                        out[row * x.v_dim + c] += p * v;
                    }
                }
            }
        }
    }
    (out, lse)
}

/// Gradients of `sum(out * d_out)`.
pub fn backward_ref(
    x: &AttentionShape,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    d_out: &[f64],
    segments: &[Segment],
) -> Gradients {
    let mut g = Gradients { d_q: vec![0.0; q.len()], d_k: vec![0.0; k.len()], d_v: vec![0.0; v.len()] };
    for &segment in segments {
        for i in 0..segment.len {
            for head in 0..x.heads {
                let kv_head = head / (x.heads / x.kv_heads);
                let (p, _, slopes) = probabilities(x, q, k, segment, i, head);
                let row = (segment.start + i) * x.heads + head;
                let d_out = &d_out[row * x.v_dim..][..x.v_dim];
                let at = |j: usize| (segment.start + j) * x.kv_heads + kv_head;
                let d_p: Vec<f64> = (0..=i)
                    .map(|j| d_out.iter().zip(&v[at(j) * x.v_dim..]).map(|(a, b)| a * b).sum())
                    .collect();
                let delta: f64 = p.iter().zip(&d_p).map(|(a, b)| a * b).sum();
                for j in 0..=i {
                    for (d_v, d_out) in g.d_v[at(j) * x.v_dim..].iter_mut().zip(d_out) {
                        *d_v += p[j] * d_out;
                    }
                    let d_s = p[j] * (d_p[j] - delta) * slopes[j] * f64::from(x.scale);
                    for c in 0..x.qk_dim {
                        g.d_q[row * x.qk_dim + c] += d_s * k[at(j) * x.qk_dim + c];
                        g.d_k[at(j) * x.qk_dim + c] += d_s * q[row * x.qk_dim + c];
                    }
                }
            }
        }
    }
    g
}
