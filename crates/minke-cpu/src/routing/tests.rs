use minke_num::tolerance::{Tolerance, assert_same_bits};

use super::*;
use crate::testing::{assert_gradient, dot, everywhere, normal, wide};

const CONFIGS: [RouterConfig; 8] = [
    config(1, 1, 1, 1, Scoring::Sigmoid, Choice::NoAuxTc, true, 1.0),
    config(16, 4, 1, 1, Scoring::Sigmoid, Choice::NoAuxTc, true, 2.5),
    config(32, 5, 8, 3, Scoring::Sigmoid, Choice::NoAuxTc, true, 2.5),
    config(6, 3, 6, 3, Scoring::Sigmoid, Choice::NoAuxTc, false, 1.0),
    config(64, 6, 1, 1, Scoring::Softmax, Choice::Greedy, false, 1.0),
    config(17, 17, 1, 1, Scoring::Softmax, Choice::Greedy, true, 16.0),
    config(40, 6, 8, 3, Scoring::Softmax, Choice::GroupLimitedGreedy, false, 16.0),
    config(129, 2, 3, 1, Scoring::Softmax, Choice::GroupLimitedGreedy, true, 1.0),
];

const fn config(
    experts: usize,
    top_k: usize,
    groups: usize,
    top_groups: usize,
    scoring: Scoring,
    choice: Choice,
    normalize: bool,
    scale: f32,
) -> RouterConfig {
    RouterConfig { experts, top_k, groups, top_groups, scoring, choice, normalize, scale }
}

fn scores_ref(cfg: &RouterConfig, logits: &[f64]) -> Vec<f64> {
    match cfg.scoring {
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::Softmax => {
            let rows = logits.chunks(cfg.experts).flat_map(|x| {
                let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
                x.iter().map(move |x| (x - max).exp() / sum)
            });
            rows.collect()
        }
    }
}

fn order(x: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    // a stable sort: of equals the lower index comes first
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    order
}

/// The papers' words with sorts in place of selection.
fn experts_ref(cfg: &RouterConfig, scores: &[f64], bias: &[f32]) -> Vec<u32> {
    let size = cfg.experts / cfg.groups;
    let mut chosen = Vec::new();
    for scores in scores.chunks(cfg.experts) {
        let value = |i: usize| scores[i] + bias.get(i).map_or(0.0, |&b| f64::from(b));
        let values: Vec<f64> = (0..cfg.experts).map(value).collect();
        let group_scores: Vec<f64> = values
            .chunks(size)
            .map(|group| {
                let order = order(group);
                let counted = if cfg.choice == Choice::NoAuxTc { 2 } else { 1 };
                order.iter().take(counted).map(|&i| group[i]).sum()
            })
            .collect();
        let allowed = match cfg.choice {
            Choice::Greedy => (0..cfg.groups).collect(),
            Choice::NoAuxTc | Choice::GroupLimitedGreedy => order(&group_scores)[..cfg.top_groups].to_vec(),
        };
        let best = order(&values).into_iter().filter(|i| allowed.contains(&(i / size)));
        let mut best: Vec<u32> = best.take(cfg.top_k).map(|i| i as u32).collect();
        best.sort_unstable();
        chosen.extend(best);
    }
    chosen
}

fn weights_ref(cfg: &RouterConfig, scores: &[f64], experts: &[u32]) -> Vec<f64> {
    let mut weights = Vec::new();
    for (scores, experts) in scores.chunks(cfg.experts).zip(experts.chunks(cfg.top_k)) {
        let chosen: Vec<f64> = experts.iter().map(|&i| scores[i as usize]).collect();
        let sum: f64 = if cfg.normalize { chosen.iter().sum::<f64>() + 1e-20 } else { 1.0 };
        weights.extend(chosen.iter().map(|s| s / sum * f64::from(cfg.scale)));
    }
    weights
}

struct Routed {
    scores: Vec<f32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

fn routed(cpu: &Cpu, logits: &[f32], bias: &[f32], cfg: &RouterConfig) -> Routed {
    let n = logits.len() / cfg.experts;
    let (mut scores, mut experts, mut weights) =
        (vec![9.0; n * cfg.experts], vec![99; n * cfg.top_k], vec![9.0; n * cfg.top_k]);
    route(cpu, logits, bias, cfg, &mut scores, &mut experts, &mut weights);
    Routed { scores, experts, weights }
}

fn bias_of(cfg: &RouterConfig) -> Vec<f32> {
    match cfg.choice {
        Choice::NoAuxTc => normal(7, cfg.experts).iter().map(|x| 0.3 * x).collect(),
        Choice::Greedy | Choice::GroupLimitedGreedy => Vec::new(),
    }
}

#[test]
fn choices_match_sorting() {
    for cfg in &CONFIGS {
        for n in [1, 2, 300] {
            let logits = normal(1, n * cfg.experts);
            let bias = bias_of(cfg);
            let bits = everywhere("route", |cpu| {
                let Routed { scores, experts, weights } = routed(cpu, &logits, &bias, cfg);
                [scores, experts.iter().map(|&i| i as f32).collect(), weights].concat()
            });
            let Routed { scores, experts, weights } = routed(&Cpu::detect(1), &logits, &bias, cfg);
            assert_eq!(bits.len(), scores.len() + experts.len() + weights.len());
            let exact = scores_ref(cfg, &wide(&logits));
            Tolerance::new(1e-7, 2e-6).check("scores", &scores, &exact).unwrap();
            // the choice is over f32 scores: the twin sorts the same ones
            assert_eq!(experts, experts_ref(cfg, &wide(&scores), &bias), "{cfg:?}");
            Tolerance::new(1e-7, 4e-6)
                .check("weights", &weights, &weights_ref(cfg, &exact, &experts))
                .unwrap();
        }
    }
}

#[test]
fn ties_go_to_the_lower_index_and_nan_does_not_break_the_choice() {
    let cpu = Cpu::detect(1);
    let cfg = config(8, 2, 4, 2, Scoring::Sigmoid, Choice::NoAuxTc, true, 1.0);
    assert_eq!(routed(&cpu, &[0.0; 8], &[], &cfg).experts, [0, 1]);
    assert_eq!(routed(&cpu, &[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], &[], &cfg).experts, [1, 3]);
    // the bias chooses, the scores weigh
    let biased = routed(&cpu, &[0.0; 8], &[0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5], &cfg);
    assert_eq!((biased.experts, biased.weights), (vec![5, 7], vec![0.5, 0.5]));
    for cfg in &CONFIGS {
        let Routed { experts, .. } = routed(&cpu, &vec![f32::NAN; 3 * cfg.experts], &[], cfg);
        for row in experts.chunks(cfg.top_k) {
            assert!(row.is_sorted_by(|a, b| a < b) && row[cfg.top_k - 1] < cfg.experts as u32);
        }
    }
}

/// Gradient of `dot(weights, d_weights) + dot(scores, extra)` for the logits.
fn backward_ref(
    cfg: &RouterConfig,
    scores: &[f64],
    experts: &[u32],
    d_weights: &[f64],
    extra: &[f64],
) -> Vec<f64> {
    let (e, k) = (cfg.experts, cfg.top_k);
    let mut d_logits = Vec::new();
    for (row, scores) in scores.chunks(e).enumerate() {
        let mut d = extra[row * e..(row + 1) * e].to_vec();
        let experts = &experts[row * k..(row + 1) * k];
        let sum: f64 = experts.iter().map(|&i| scores[i as usize]).sum::<f64>() + 1e-20;
        for (a, &i) in experts.iter().enumerate() {
            for (b, &j) in experts.iter().enumerate() {
                // d weight_b / d score_a
                let same = f64::from(u8::from(a == b));
                let slope = if cfg.normalize { same / sum - scores[j as usize] / (sum * sum) } else { same };
                d[i as usize] += f64::from(cfg.scale) * slope * d_weights[row * k + b];
            }
        }
        let mean = dot(&d, scores);
        d_logits.extend(d.iter().zip(scores).map(|(d, s)| match cfg.scoring {
            Scoring::Sigmoid => d * s * (1.0 - s),
            Scoring::Softmax => s * (d - mean),
        }));
    }
    d_logits
}

#[test]
fn gradient_matches_differences_and_f64() {
    for cfg in &CONFIGS {
        for n in [2, 130] {
            let (logits, bias) = (normal(1, n * cfg.experts), bias_of(cfg));
            let (d_weights, extra) = (normal(2, n * cfg.top_k), normal(3, n * cfg.experts));
            let Routed { scores, experts, .. } = routed(&Cpu::detect(1), &logits, &bias, cfg);
            let exact_scores = scores_ref(cfg, &wide(&logits));
            let (d64, extra64) = (wide(&d_weights), wide(&extra));
            let exact = backward_ref(cfg, &exact_scores, &experts, &d64, &extra64);
            if n == 2 {
                let value = |logits: &[f64]| {
                    let scores = scores_ref(cfg, logits);
                    dot(&weights_ref(cfg, &scores, &experts), &d64) + dot(&scores, &extra64)
                };
                assert_gradient("d_logits", value, &wide(&logits), &exact);
            }
            let got = everywhere("route_backward", |cpu| {
                let mut d = vec![9.0; scores.len()];
                route_backward(cpu, cfg, &scores, &experts, &d_weights, Some(&extra), &mut d);
                d
            });
            Tolerance::new(2e-6 * f64::from(cfg.scale), 1e-5).check("route_backward", &got, &exact).unwrap();
            let (mut without, mut zero) = (got.clone(), got);
            let cpu = Cpu::detect(1);
            route_backward(&cpu, cfg, &scores, &experts, &d_weights, None, &mut without);
            let extra = vec![0.0; scores.len()];
            route_backward(&cpu, cfg, &scores, &experts, &d_weights, Some(&extra), &mut zero);
            assert_same_bits("nothing extra", &without, &zero);
        }
    }
}

/// The report's equations, one by one.
fn balance_ref(cfg: &RouterConfig, scores: &[f64], experts: &[u32], offsets: &[u32], alpha: f64) -> f64 {
    let (e, k) = (cfg.experts, cfg.top_k);
    let (mut total, mut filled) = (0.0, 0.0);
    for span in offsets.windows(2) {
        let (from, to) = (span[0] as usize, span[1] as usize);
        if from == to {
            continue;
        }
        filled += 1.0;
        let t = (to - from) as f64;
        for i in 0..e {
            let chosen = experts[from * k..to * k].iter().filter(|&&x| x as usize == i).count() as f64;
            let f = e as f64 / (k as f64 * t) * chosen;
            let p = scores[from * e..to * e].chunks(e).map(|s| s[i] / s.iter().sum::<f64>()).sum::<f64>() / t;
            total += alpha * f * p;
        }
    }
    total / filled
}

#[test]
fn balance_loss_and_gradient() {
    for cfg in &CONFIGS {
        let n = 9;
        let logits = normal(1, n * cfg.experts);
        let Routed { scores, experts, .. } = routed(&Cpu::detect(1), &logits, &bias_of(cfg), cfg);
        for offsets in [&[0, 9][..], &[0, 4, 4, 9], &[0, 1, 2, 3, 9]] {
            let got = everywhere("sequence_balance_loss", |cpu| {
                let mut d = vec![9.0; scores.len()];
                let loss = sequence_balance_loss(cpu, &scores, &experts, offsets, cfg, 0.5, Some(&mut d));
                let alone = sequence_balance_loss(cpu, &scores, &experts, offsets, cfg, 0.5, None);
                assert_eq!(loss, alone);
                d.push(loss);
                d
            });
            let value = |scores: &[f64]| balance_ref(cfg, scores, &experts, offsets, 0.5);
            let exact = value(&wide(&scores));
            let (loss, d) = got.split_last().unwrap();
            assert!((f64::from(*loss) - exact).abs() < 2e-6 * exact, "{loss} for {exact}");
            for i in 0..scores.len() {
                let mut at = wide(&scores);
                let step = 1e-4 * at[i];
                at[i] += step;
                let above = value(&at);
                at[i] -= 2.0 * step;
                let difference = (above - value(&at)) / (2.0 * step);
                let bound = 2e-6 + 2e-5 * difference.abs();
                assert!((f64::from(d[i]) - difference).abs() < bound, "{i}: {} for {difference}", d[i]);
            }
        }
    }
    let none = sequence_balance_loss(&Cpu::detect(1), &[], &[], &[0], &CONFIGS[1], 0.5, None);
    assert_eq!(none, 0.0);
}

#[test]
#[should_panic(expected = "route: 7 experts from groups that hold 4")]
fn too_few_in_the_groups_panics() {
    let cfg = config(8, 7, 4, 2, Scoring::Sigmoid, Choice::NoAuxTc, true, 1.0);
    routed(&Cpu::detect(1), &[0.0; 8], &[], &cfg);
}
