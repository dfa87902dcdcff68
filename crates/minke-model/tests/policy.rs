//! Rollout and training are one engine: what sampled a token and what learns from it agree to the bit.

use minke_cpu::Cpu;
use minke_cpu::policy::{Kept, draw, temper};
use minke_model::{
    Cache, Config, DType, Divergence, Fp8, IGNORE, LossOptions, Model, MtpTargets, PolicyBatch, Precision,
    Segment, Step, Want,
};
use minke_num::rng;
use minke_num::tolerance::assert_same_bits;

fn model(precision: Precision) -> Model {
    let config = serde_json::json!({
        "model_type": "deepseek_v3", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": true,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "kv_lora_rank": 16, "q_lora_rank": null,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_nextn_predict_layers": 1, "initializer_range": 0.3,
        "tie_word_embeddings": false, "hidden_act": "silu", "attention_bias": false,
    });
    let config = Config::from_json(&config).unwrap();
    Model::random(config, precision, 5)
}

fn precisions() -> [Precision; 3] {
    let of = |dtype| Precision {
        linear: dtype,
        expert: dtype,
        head: dtype,
        attention: dtype,
        ..Precision::uniform(DType::F32)
    };
    [of(DType::F32), of(DType::Bf16), Precision::fp8(Fp8::default())]
}

const TEMPERATURE: f32 = 0.9;

/// A sampled sequence: its tokens, where the answer begins, and what the sampler knew of each token of it.
struct Rollout {
    tokens: Vec<u32>,
    prompt: usize,
    log_probs: Vec<f32>,
    kept: Kept,
    /// The experts of every token that was fed, [k] by layer.
    routes: Vec<Vec<u32>>,
}

/// Samples sequences of odd lengths, all of them in one batch with caches; every other one through a filter.
fn roll(model: &mut Model, cpu: &Cpu) -> Vec<Rollout> {
    let w = model.config.vocab_size;
    let lengths = [(3, 17), (7, 5), (1, 30), (12, 1)];
    let mut caches: Vec<Cache> = lengths.iter().map(|_| Cache::new(model)).collect();
    let mut all: Vec<Rollout> = lengths
        .iter()
        .enumerate()
        .map(|(s, &(prompt, _))| Rollout {
            tokens: (0..prompt).map(|i| rng::below(9, s as u64, i, w as u64) as u32).collect(),
            prompt: prompt as usize,
            log_probs: Vec::new(),
            kept: Kept::default(),
            routes: Vec::new(),
        })
        .collect();
    let mut fed = [0; 4];
    loop {
        let alive: Vec<usize> = (0..4).filter(|&s| all[s].log_probs.len() < lengths[s].1).collect();
        if alive.is_empty() {
            return all;
        }
        let mut steps = Vec::new();
        let mut rows = Vec::new();
        for (s, cache) in caches.iter_mut().enumerate() {
            if alive.contains(&s) {
                rows.push((s, all[s].tokens.len() - fed[s]));
                steps.push(Step { tokens: &all[s].tokens[fed[s]..], cache, want: Want::Last });
                fed[s] = all[s].tokens.len();
            }
        }
        let (logits, routes) = model.infer_traced(cpu, &mut steps);
        let mut logits = logits.to_vec();
        drop(steps);
        let mut row = 0;
        for &(s, n) in &rows {
            for _ in 0..n {
                all[s]
                    .routes
                    .push(routes.iter().flat_map(|layer| layer[2 * row..2 * row + 2].to_vec()).collect());
                row += 1;
            }
        }
        let mut kept = Kept::default();
        for &s in &alive {
            let ids: Vec<u32> =
                if s % 2 == 0 { vec![] } else { (0..w as u32).filter(|i| i % 3 != 1).collect() };
            kept.push(ids.clone());
            all[s].kept.push(ids);
        }
        temper(cpu, &mut logits, w, TEMPERATURE, &kept);
        let uniforms: Vec<f64> =
            alive.iter().map(|&s| rng::uniform_f64(3, s as u64, all[s].tokens.len() as u64)).collect();
        let (mut ids, mut log_probs) = (vec![0; alive.len()], vec![0.0; alive.len()]);
        draw(cpu, &logits, w, &uniforms, &mut ids, &mut log_probs);
        for (i, &s) in alive.iter().enumerate() {
            all[s].tokens.push(ids[i]);
            all[s].log_probs.push(log_probs[i]);
        }
    }
}

/// The rollouts as a batch: the last token of each is predicted, not read.
fn batch(rollouts: &[Rollout]) -> PolicyBatch {
    let mut batch = PolicyBatch { temperature: TEMPERATURE, ..PolicyBatch::default() };
    let rows = &mut batch.rows;
    for rollout in rollouts {
        let len = rollout.tokens.len() - 1;
        rows.segments.push(Segment { start: rows.tokens.len(), len });
        rows.tokens.extend(&rollout.tokens[..len]);
        rows.positions.extend(0..len as u32);
        rows.labels
            .extend((0..len).map(|i| if i + 1 < rollout.prompt { IGNORE } else { rollout.tokens[i + 1] }));
        for r in 0..rollout.log_probs.len() {
            batch.kept.push(rollout.kept.row(r).iter().copied());
        }
    }
    rows.mtp = vec![MtpTargets {
        tokens: rows.labels.iter().map(|&l| if l == IGNORE { 0 } else { l }).collect(),
        labels: vec![IGNORE; rows.labels.len()],
    }];
    batch
}

fn options() -> LossOptions {
    LossOptions { loss_scale: 0.0, mtp_scale: vec![0.1], balance_alpha: 0.0 }
}

#[test]
fn the_trainer_sees_the_samplers_log_probabilities_and_routes_to_the_bit() {
    for precision in precisions() {
        for threads in [1, 2, 3] {
            let cpu = Cpu::detect(threads);
            let mut model = model(precision);
            let rollouts = roll(&mut model, &cpu);
            let sampled: Vec<f32> = rollouts.iter().flat_map(|r| r.log_probs.clone()).collect();
            assert!(sampled.iter().all(|l| l.is_finite() && *l <= 0.0));
            let batch = batch(&rollouts);
            assert_same_bits("without a tape", &model.log_probs(&cpu, &batch), &sampled);
            let mut asked = Vec::new();
            let stats = model.policy_step(&cpu, &batch, &options(), &mut |s, log_probs, out| {
                asked.push((s, log_probs.len()));
                out.fill(-0.01);
            });
            assert_same_bits("training", &stats.log_probs, &sampled);
            assert_eq!(asked, [(0, 17), (1, 5), (2, 30), (3, 1)]);
            let mut row = 0;
            let mut compared = 0;
            for rollout in &rollouts {
                for (i, at) in (row..row + rollout.tokens.len() - 1).enumerate() {
                    let trained: Vec<u32> = stats
                        .stats
                        .routes
                        .iter()
                        .flat_map(|layer| layer[2 * at..2 * at + 2].to_vec())
                        .collect();
                    assert_eq!(trained, rollout.routes[i]);
                    compared += trained.len();
                }
                row += rollout.tokens.len() - 1;
            }
            assert!(compared > 200, "{compared} choices of experts");
        }
    }
}

#[test]
fn a_constant_slope_is_cross_entropy() {
    let cpu = Cpu::detect(2);
    let mut model = model(precisions()[0]);
    let rollouts = roll(&mut model, &cpu);
    let mut batch = PolicyBatch { kept: Kept::default(), temperature: 1.0, ..batch(&rollouts) };
    batch.rows.mtp.clear();
    let n = rollouts.iter().map(|r| r.log_probs.len()).sum::<usize>() as f32;
    let loss = LossOptions { loss_scale: 1.0 / n, mtp_scale: vec![], balance_alpha: 0.0 };
    let plain = model.train_step(&cpu, &batch.rows, &loss);
    let expected = model.params.grads().to_vec();
    model.params.zero_grad();
    let stats = model.policy_step(&cpu, &batch, &loss, &mut |_, _, out| out.fill(-1.0 / n));
    assert!((plain.loss_sum - stats.stats.loss_sum).abs() < 1e-4 * plain.loss_sum.abs());
    let largest = expected.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let worst =
        expected.iter().zip(&model.params.grads().to_vec()).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst <= 1e-6 * largest, "{worst} of {largest}");
}

#[test]
fn prediction_modules_learn_beside_the_policy_and_do_not_pull_at_it() {
    let cpu = Cpu::detect(2);
    let mut model = model(precisions()[0]);
    let rollouts = roll(&mut model, &cpu);
    let mut batch = batch(&rollouts);
    batch.rows.mtp[0].labels = batch.rows.labels.clone();
    let mut gradients = |mtp_scale: f32| {
        model.params.zero_grad();
        let loss = LossOptions { mtp_scale: vec![mtp_scale], ..options() };
        model.policy_step(&cpu, &batch, &loss, &mut |_, _, out| out.fill(-0.02));
        let of = |module: bool| -> Vec<f32> {
            let entries =
                model.params.entries.iter().filter(|e| e.name.starts_with("model.layers.3.") == module);
            entries.flat_map(|e| model.params.grads().of(e.range.clone()).to_vec()).collect()
        };
        (of(false), of(true))
    };
    let ((without, still), (with, moved)) = (gradients(0.0), gradients(0.5));
    assert_same_bits("trunk, embedding and head", &with, &without);
    assert!(still.iter().all(|g| *g == 0.0) && moved.iter().any(|g| *g != 0.0));
}

#[test]
fn a_model_has_nothing_to_learn_from_itself() {
    let cpu = Cpu::detect(2);
    let mut model = model(precisions()[0]);
    let rollouts = roll(&mut model, &cpu);
    let mut rows = batch(&rollouts).rows;
    rows.mtp.clear();
    let loss = LossOptions { loss_scale: 1.0, mtp_scale: vec![], balance_alpha: 0.0 };
    for divergence in [Divergence::Forward, Divergence::Reverse] {
        for (k, temperature) in [(8, 1.0), (300, 2.0)] {
            let teacher = model.likeliest(&cpu, &rows, k, temperature);
            model.params.zero_grad();
            let stats = model.distill_step(&cpu, &rows, &loss, &teacher, divergence, temperature);
            assert!(stats.loss_sum.abs() < 1e-4, "{divergence:?} {k}: {}", stats.loss_sum);
            let largest = model.params.grads().to_vec().iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            assert!(largest < 1e-3, "{divergence:?} {k}: {largest}");
        }
    }
}
