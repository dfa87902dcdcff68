//! Importance matrices: what a model is seen to read.

use std::ops::ControlFlow;
use std::path::Path;

use minke_cpu::Cpu;
use minke_infer::Engine;
use minke_infer::quantize::{Importance, ImportanceError};
use minke_model::config::Config;
use minke_model::spec::{self, Role};
use minke_model::{DType, Model, Precision};

fn model(name: &str) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors").join(name);
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = Config::from_json(&serde_json::from_str(&text).unwrap()).unwrap();
    Model::random(config, Precision::uniform(DType::F32), 7)
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 7) % model.config.vocab_size) as u32).collect()
}

fn measure(model: &mut Model, threads: usize, count: usize) -> Importance {
    let tokens = tokens(model, count);
    let cpu = Cpu::detect(threads);
    let mut done = Vec::new();
    let found = Importance::measure(model, &cpu, None, &tokens, &mut |now, all| {
        assert_eq!(all, count);
        done.push(now);
        ControlFlow::Continue(())
    });
    assert!(done.is_sorted() && done.last() == Some(&count), "{done:?}");
    found.unwrap().unwrap()
}

/// Every matrix has an importance of each of its columns, whatever the attention and the feed-forward block, and those of
/// prediction modules, too.
#[test]
fn every_matrix_is_seen() {
    for name in ["v3_mtp1", "v3_mtp2", "v3_tied_all_moe", "v2_greedy_qlora_tied", "llama_gqa"] {
        let mut model = model(name);
        let mut found = measure(&mut model, 2, 300);
        assert_eq!(found.tokens, 300);
        for spec in spec::tensors(&model.config) {
            let seen = found.of_tensor(&spec.name);
            let of_product = !matches!(spec.role, Role::Norm | Role::RouterBias | Role::Embedding);
            if !of_product {
                let tied = spec.role == Role::Embedding && model.config.tie_word_embeddings;
                assert_eq!(seen.is_some(), tied, "{name}: {}", spec.name);
                continue;
            }
            let seen = seen.unwrap_or_else(|| panic!("{name}: nothing of {}", spec.name));
            assert_eq!(seen.len(), spec.shape[1], "{name}: {}", spec.name);
            assert!(seen.iter().all(|x| x.is_finite() && *x >= 0.0), "{name}: {}", spec.name);
            assert!(seen.iter().any(|x| *x > 0.0), "{name}: {}", spec.name);
        }
        // what reads the same sees the same
        let layer = |part: &str| {
            found.of_tensor(&format!("model.layers.0.mlp.{part}_proj.weight")).map(<[f32]>::to_vec)
        };
        assert_eq!(layer("gate"), layer("up"));
        // each token goes to so many experts
        found.layers.retain(|layer| {
            let per_token = match model.config.ffn(layer.layer) {
                minke_model::config::FfnKind::Moe(moe) => moe.num_experts_per_tok,
                minke_model::config::FfnKind::Dense { .. } => panic!("experts in a dense layer"),
            };
            // behind the last token of a piece there is none that the first module could read, and so on
            let pieces = 300_u64.div_ceil(model.config.max_position_embeddings.min(512) as u64);
            let ahead = (layer.layer + 1).saturating_sub(model.config.num_hidden_layers) as u64;
            let tokens = 300 - ahead * pieces;
            assert_eq!(layer.rows.iter().sum::<u64>(), tokens * per_token as u64);
            true
        });
        let moe = spec::tensors(&model.config).iter().any(|s| matches!(s.role, Role::ExpertLinear { .. }));
        assert_eq!(found.layers.is_empty(), !moe, "{name}");
    }
}

/// `x Wᵀ` of each row.
fn product(model: &Model, name: &str, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let entry = &model.params.entries[model.params.find(name).unwrap()];
    let w = &model.params.data[entry.range.clone()];
    let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
    x.iter().map(|x| w.chunks(x.len()).map(|w| dot(w, x)).collect()).collect()
}

/// Rows divided by their root mean square: gains of a fresh model are one.
fn normed(x: &[Vec<f64>], eps: f64) -> Vec<Vec<f64>> {
    let of_row = |x: &Vec<f64>| {
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().map(|x| x / rms).collect()
    };
    x.iter().map(of_row).collect()
}

/// Keys of latent attention that are turned over are read by queries: in the first layer those of embeddings alone.
#[test]
fn keys_are_weighed_by_queries() {
    for name in ["v3_plain", "v2_greedy_qlora_tied"] {
        let mut model = model(name);
        let found = measure(&mut model, 2, 300);
        let entry = &model.params.entries[model.params.find("model.embed_tokens.weight").unwrap()];
        let width = model.config.hidden_size;
        let embeddings: Vec<Vec<f64>> = tokens(&model, 300)
            .iter()
            .map(|&token| &model.params.data[entry.range.clone()][token as usize * width..][..width])
            .map(|row| row.iter().map(|x| f64::from(*x)).collect())
            .collect();
        let x = normed(&embeddings, model.config.rms_norm_eps);
        let of = |name: &str, x| product(&model, &format!("model.layers.0.self_attn.{name}.weight"), x);
        let q = if name == "v3_plain" {
            of("q_proj", &x)
        } else {
            of("q_b_proj", &normed(&of("q_a_proj", &x), 1e-6))
        };
        let (heads, rotary) = (model.config.num_attention_heads, model.config.rotary_dim());
        let head = q[0].len() / heads;
        let mut expected = Vec::new();
        for first in (0..heads).map(|number| number * head) {
            for at in first..first + head - rotary {
                expected.push(q.iter().map(|q| q[at] * q[at]).sum::<f64>() / q.len() as f64);
            }
        }
        let got = found.of_keys("model.layers.0.self_attn.kv_b_proj.weight").unwrap();
        assert_eq!(got.len(), expected.len());
        for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!((f64::from(*got) / expected - 1.0).abs() < 1e-3, "{name} {at}: {got}, {expected}");
        }
        for spec in spec::tensors(&model.config) {
            let seen = found.of_keys(&spec.name);
            assert_eq!(seen.is_some(), spec.name.ends_with("kv_b_proj.weight"), "{name}: {}", spec.name);
            assert!(seen.is_none_or(|seen| seen.len() == expected.len()), "{name}: {}", spec.name);
        }
    }
}

/// Nothing depends on the threads, and a model that is no longer watched is as it was.
#[test]
fn any_threads_and_no_trace() {
    let mut model = model("v3_plain");
    let (one, two) = (measure(&mut model, 1, 64), measure(&mut model, 3, 64));
    for spec in spec::tensors(&model.config) {
        assert_eq!(one.of_tensor(&spec.name), two.of_tensor(&spec.name), "{}", spec.name);
        assert_eq!(one.of_keys(&spec.name), two.of_keys(&spec.name), "{}", spec.name);
    }
    assert!(model.params.weights.iter().all(|(id, _)| model.params.inputs(*id).is_none()));
    let cpu = Cpu::detect(1);
    let tokens = tokens(&model, 20);
    let before = Engine::new(&mut model, &cpu, None).score(&tokens, &mut |_| {}).unwrap();
    measure(&mut model, 1, 64);
    assert_eq!(Engine::new(&mut model, &cpu, None).score(&tokens, &mut |_| {}).unwrap(), before);
}

/// An expert that hardly anything came to has the importance of its layer.
#[test]
fn rare_experts_have_their_layers() {
    let mut model = model("v3_plain");
    let found = measure(&mut model, 1, 40);
    let rare: Vec<_> = found.rare_experts().collect();
    // 40 tokens are few for any
    assert_eq!(rare.len(), found.layers.iter().map(|layer| layer.rows.len()).sum::<usize>());
    let layer = found.layers[0].layer;
    let of = |expert: usize| {
        found.of_tensor(&format!("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight")).unwrap()
    };
    assert_eq!(of(0), of(1));
}

#[test]
fn no_text() {
    let mut model = model("v3_plain");
    let cpu = Cpu::detect(1);
    let mut measure = |tokens: &[u32], stop: bool| {
        Importance::measure(&mut model, &cpu, None, tokens, &mut |_, _| {
            if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    let error = measure(&[1], false).unwrap_err();
    assert!(matches!(error, ImportanceError::NoText { tokens: 1 }));
    assert_eq!(error.to_string(), "expected a text of at least 2 tokens, got 1");
    assert!(matches!(measure(&[1, 1_000_000], false).unwrap_err(), ImportanceError::Model(_)));
    assert!(measure(&[1, 2, 3], true).unwrap().is_none());
}
