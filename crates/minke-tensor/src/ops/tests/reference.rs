//! The operations in f64, as their formulas say them.

use minke_cpu::attention::AttentionShape;
use minke_cpu::routing::{Choice, RouterConfig, Scoring};
use minke_cpu::swiglu::Gate;

/// `x Wᵀ`: x [n, cols], w [rows, cols].
pub fn product(x: &[f64], w: &[f64], cols: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(x, w))).collect()
}

pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Columns `from..to` of rows of `cols`.
pub fn columns(x: &[f64], cols: usize, from: usize, to: usize) -> Vec<f64> {
    x.chunks(cols).flat_map(|row| row[from..to].iter().copied()).collect()
}

pub fn concat(a: &[f64], a_cols: usize, b: &[f64], b_cols: usize) -> Vec<f64> {
    a.chunks(a_cols).zip(b.chunks(b_cols)).flat_map(|(a, b)| a.iter().chain(b).copied()).collect()
}

pub fn rmsnorm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let d = w.len();
    x.chunks(d)
        .flat_map(|row| {
            let rstd = (row.iter().map(|x| x * x).sum::<f64>() / d as f64 + eps).sqrt().recip();
            row.iter().zip(w).map(move |(x, w)| x * rstd * w)
        })
        .collect()
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// x [n, d], gate and up stacked [2f, d], down [d, f].
pub fn swiglu(gate: Gate, x: &[f64], gate_up: &[f64], down: &[f64], d: usize) -> Vec<f64> {
    let f = down.len() / d;
    product(&gated(gate, &product(x, gate_up, d), f), down, f)
}

/// gu [n, 2f].
pub fn gated(gate: Gate, gu: &[f64], f: usize) -> Vec<f64> {
    let act = |x: f64| match gate {
        Gate::Silu => x * sigmoid(x),
        Gate::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
    };
    gu.chunks(2 * f).flat_map(|gu| (0..f).map(move |i| act(gu[i]) * gu[f + i])).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let sum: f64 = x.iter().map(|x| x.exp()).sum();
    x.iter().map(|x| x.exp() / sum).collect()
}

/// Scores [n, e] of logits.
pub fn scores(logits: &[f64], cfg: &RouterConfig) -> Vec<f64> {
    match cfg.scoring {
        Scoring::Sigmoid => logits.iter().map(|&x| sigmoid(x)).collect(),
        Scoring::Softmax => logits.chunks(cfg.experts).flat_map(softmax).collect(),
    }
}

/// The indices of the `k` largest, ascending.
fn top(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// The experts of each token, ascending.
pub fn choose(scores: &[f64], bias: &[f64], cfg: &RouterConfig) -> Vec<usize> {
    let size = cfg.experts / cfg.groups;
    let of_token = |scores: &[f64]| {
        let mut values = scores.to_vec();
        values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        if cfg.choice != Choice::Greedy {
            let best = |group: &[f64]| {
                let count = if cfg.choice == Choice::NoAuxTc { size.min(2) } else { 1 };
                top(group, count).into_iter().map(|i| group[i]).sum::<f64>()
            };
            let groups = top(&values.chunks(size).map(best).collect::<Vec<_>>(), cfg.top_groups);
            let outside = |e: &usize| !groups.contains(&(e / size));
            (0..cfg.experts).filter(outside).for_each(|e| values[e] = f64::NEG_INFINITY);
        }
        top(&values, cfg.top_k)
    };
    scores.chunks(cfg.experts).flat_map(of_token).collect()
}

/// The weights of the chosen experts [n, k].
pub fn weights(scores: &[f64], experts: &[usize], cfg: &RouterConfig) -> Vec<f64> {
    let of_token = |(scores, experts): (&[f64], &[usize])| {
        let chosen: Vec<f64> = experts.iter().map(|&e| scores[e]).collect();
        let sum = if cfg.normalize { chosen.iter().sum::<f64>() } else { 1.0 };
        chosen.into_iter().map(move |s| f64::from(cfg.scale) * s / sum)
    };
    scores.chunks(cfg.experts).zip(experts.chunks(cfg.top_k)).flat_map(of_token).collect()
}

/// `alpha sum of f_i P_i`, a mean over sequences that have tokens.
pub fn balance(scores: &[f64], experts: &[usize], borders: &[u32], cfg: &RouterConfig, alpha: f64) -> f64 {
    let (e, k) = (cfg.experts, cfg.top_k);
    let spans = borders.windows(2).map(|w| w[0] as usize..w[1] as usize).filter(|s| !s.is_empty());
    let losses: Vec<f64> = spans
        .map(|span| {
            let tokens = span.len() as f64;
            let chosen = &experts[span.start * k..span.end * k];
            let of_expert = |i: usize| {
                let share =
                    chosen.iter().filter(|&&x| x == i).count() as f64 * e as f64 / (k as f64 * tokens);
                let normed = |t: usize| scores[t * e + i] / scores[t * e..][..e].iter().sum::<f64>();
                share * span.clone().map(normed).sum::<f64>() / tokens
            };
            (0..e).map(of_expert).sum::<f64>()
        })
        .collect();
    alpha * losses.iter().sum::<f64>() / losses.len().max(1) as f64
}

/// Rotates the last `r` of every `width` columns; `positions` are of rows of `heads * width`.
pub fn rope(
    x: &[f64],
    heads: usize,
    width: usize,
    r: usize,
    positions: &[u32],
    frequencies: &[f32],
    interleaved: bool,
) -> Vec<f64> {
    let mut out = x.to_vec();
    for (row, x) in out.chunks_mut(heads * width).enumerate() {
        for head in x.chunks_mut(width) {
            let part = &mut head[width - r..];
            for (j, &frequency) in frequencies.iter().enumerate() {
                let (a, b) = if interleaved { (2 * j, 2 * j + 1) } else { (j, j + r / 2) };
                // angles are products in f32, as published models compute them
                let (sin, cos) = f64::from(positions[row] as f32 * frequency).sin_cos();
                (part[a], part[b]) = (part[a] * cos - part[b] * sin, part[b] * cos + part[a] * sin);
            }
        }
    }
    out
}

/// Causal attention within sequences of `lengths`, through the shape's window and soft cap.
pub fn attention(x: &AttentionShape, q: &[f64], k: &[f64], v: &[f64], lengths: &[usize]) -> Vec<f64> {
    let AttentionShape { heads, kv_heads, qk_dim, v_dim, scale, window, softcap } = *x;
    let mut out = Vec::new();
    let mut start = 0;
    for &len in lengths {
        for i in start..start + len {
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let q = &q[(i * heads + head) * qk_dim..][..qk_dim];
                let score = |j: usize| {
                    let k = &k[(j * kv_heads + kv) * qk_dim..][..qk_dim];
                    let score = f64::from(scale) * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                    softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                };
                let first = window.map_or(start, |window| start.max((i + 1).saturating_sub(window)));
                let p = softmax(&(first..=i).map(score).collect::<Vec<_>>());
                let value = |c: usize| {
                    p.iter()
                        .enumerate()
                        .map(|(j, p)| p * v[((first + j) * kv_heads + kv) * v_dim + c])
                        .sum::<f64>()
                };
                out.extend((0..v_dim).map(value));
            }
        }
        start += len;
    }
    out
}

/// The sum of cross entropies of labelled rows; logits [n, w].
pub fn cross_entropy(logits: &[f64], vocabulary: usize, labels: &[u32]) -> f64 {
    let of_row = |(row, &label): (&[f64], &u32)| match label {
        u32::MAX => 0.0,
        label => row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[label as usize],
    };
    logits.chunks(vocabulary).zip(labels).map(of_row).sum()
}
