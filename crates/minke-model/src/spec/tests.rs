use serde_json::{Value, json};

use super::*;
use crate::config::tests::families::{gemma2, gemma3, kimi_k2, published, qwen2, qwen3_moe};
use crate::config::tests::{deepseek_v2_lite, deepseek_v3, llama};

fn counted(config: &Config, keep: impl Fn(&TensorSpec) -> bool) -> u64 {
    tensors(config).iter().filter(|spec| keep(spec)).map(|spec| spec.numel() as u64).sum()
}

#[test]
fn deepseek_v3_has_its_published_size() {
    let config = Config::from_json(&deepseek_v3()).unwrap();
    let counts = parameters(&config);
    // its report: 671B in all, 37B active per token (the embedding is looked up, not multiplied)
    assert_eq!((counts.total as f64 / 1e9).round(), 671.0);
    assert_eq!(((counts.active - counts.embedding) as f64 / 1e9).round(), 37.0);
    assert_eq!(format!("{:.1}", counts.embedding as f64 / 1e9), "0.9");
    // its weights readme: MTP 11.5B of its own, and 2.4B active with the shared embedding and head; both
    // leave out the projection of 0.1B
    let projection = 2 * 7168 * 7168;
    assert_eq!(format!("{:.1}", (counts.mtp - projection) as f64 / 1e9), "11.5");
    let active = counts.mtp_active - projection + counts.embedding + counts.head;
    assert_eq!(format!("{:.1}", active as f64 / 1e9), "2.4");
}

#[test]
fn deepseek_v2_lite_has_its_published_size() {
    let counts = parameters(&Config::from_json(&deepseek_v2_lite()).unwrap());
    // its report: 15.7B in all and 2.4B active, which is 2.45 (without the embedding) cut short
    assert_eq!(format!("{:.1}", counts.total as f64 / 1e9), "15.7");
    assert_eq!((counts.active - counts.embedding) / 100_000_000, 24);
    assert_eq!(counts.mtp, 0);
}

#[test]
fn families_have_their_published_sizes() {
    for (value, total) in published() {
        let counts = parameters(&Config::from_json(&value).unwrap());
        assert_eq!(counts.total, total, "{}", value["model_type"]);
    }
    let counts = parameters(&Config::from_json(&qwen3_moe()).unwrap());
    // its card: 3.3B active, which is 3.35 cut short
    assert_eq!(counts.active / 100_000_000, 33);
    // its report: 1.04T in all, 32.6B active
    let counts = parameters(&Config::from_json(&kimi_k2()).unwrap());
    assert_eq!(format!("{:.2}", counts.total as f64 / 1e12), "1.03");
    assert_eq!(format!("{:.0}", counts.active as f64 / 1e9), "33");
}

#[test]
fn names_of_families_are_the_published_ones() {
    let names = |value: &Value| -> Vec<String> {
        let config = Config::from_json(value).unwrap();
        let of_layer = |spec: &TensorSpec| spec.layer == Some(1);
        tensors(&config)
            .into_iter()
            .filter(of_layer)
            .map(|spec| format!("{} {:?}", spec.name, spec.shape))
            .collect()
    };
    let mut small = qwen3_moe();
    small["num_experts"] = json!(2);
    small["num_experts_per_tok"] = json!(2);
    insta::assert_snapshot!(
        [qwen2(), small, gemma2(), gemma3()].map(|value| names(&value).join("\n")).join("\n\n")
    );
}

#[test]
fn formulas_count_what_the_table_lists() {
    let mut small = deepseek_v3();
    for (key, value) in [("num_hidden_layers", 5), ("n_routed_experts", 16), ("num_nextn_predict_layers", 2)]
    {
        small[key] = json!(value);
    }
    for key in ["q_lora_rank", "none"] {
        small[key] = json!(null);
        let mut biased = llama();
        (biased["attention_bias"], biased["mlp_bias"]) = (json!(true), json!(true));
        let others = published().into_iter().map(|(value, _)| value).chain([biased]);
        for value in [small.clone(), deepseek_v2_lite(), llama()].into_iter().chain(others) {
            let config = Config::from_json(&value).unwrap();
            let counts = parameters(&config);
            assert_eq!(counts.total, counted(&config, |spec| spec.mtp.is_none()));
            assert_eq!(counts.mtp, counted(&config, |spec| spec.mtp.is_some()));
            assert_eq!(u128::from(counts.total + counts.mtp), parameter_total(&config));
            let k = config.moe_layers.as_ref().map_or(0, |layers| layers.moe.num_experts_per_tok);
            let used = |spec: &TensorSpec| match spec.role {
                Role::ExpertLinear { expert } => expert < k,
                _ => true,
            };
            assert_eq!(counts.active, counted(&config, |spec| spec.mtp.is_none() && used(spec)));
            assert_eq!(counts.mtp_active, counted(&config, |spec| spec.mtp.is_some() && used(spec)));
            // each weight that is multiplied costs one multiply-add per token
            let product = |spec: &TensorSpec| {
                let adds = matches!(spec.role, Role::Norm | Role::Bias | Role::RouterBias | Role::Embedding);
                used(spec) && !adds
            };
            let tied = if config.tie_word_embeddings { counts.embedding } else { 0 };
            let trunk = counted(&config, |spec| spec.mtp.is_none() && product(spec));
            assert_eq!(flops_per_token(&config, 1, false).linear, 2 * (trunk + tied));
        }
    }
}

#[test]
fn names_are_the_published_ones_and_unique() {
    let config = Config::from_json(&deepseek_v3()).unwrap();
    let specs = tensors(&config);
    let names: std::collections::HashSet<_> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names.len(), specs.len());
    for (name, shape) in [
        ("model.embed_tokens.weight", vec![129280, 7168]),
        ("model.layers.0.self_attn.q_a_proj.weight", vec![1536, 7168]),
        ("model.layers.0.self_attn.q_a_layernorm.weight", vec![1536]),
        ("model.layers.0.self_attn.q_b_proj.weight", vec![24576, 1536]),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", vec![576, 7168]),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", vec![512]),
        ("model.layers.0.self_attn.kv_b_proj.weight", vec![32768, 512]),
        ("model.layers.0.self_attn.o_proj.weight", vec![7168, 16384]),
        ("model.layers.2.mlp.gate_proj.weight", vec![18432, 7168]),
        ("model.layers.3.mlp.gate.weight", vec![256, 7168]),
        ("model.layers.3.mlp.gate.e_score_correction_bias", vec![256]),
        ("model.layers.3.mlp.experts.255.down_proj.weight", vec![7168, 2048]),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", vec![2048, 7168]),
        ("model.norm.weight", vec![7168]),
        ("lm_head.weight", vec![129280, 7168]),
        ("model.layers.61.enorm.weight", vec![7168]),
        ("model.layers.61.hnorm.weight", vec![7168]),
        ("model.layers.61.eh_proj.weight", vec![7168, 14336]),
        ("model.layers.61.mlp.experts.0.gate_proj.weight", vec![2048, 7168]),
        ("model.layers.61.shared_head.norm.weight", vec![7168]),
    ] {
        let spec = specs.iter().find(|spec| spec.name == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(spec.shape, shape, "{name}");
        assert_eq!(spec.mtp, name.contains("layers.61").then_some(0), "{name}");
    }
    let aliases: Vec<_> = optional_aliases(&config).into_iter().map(|alias| (alias.name, alias.of)).collect();
    let of = |name: &str, of: &str| (name.to_owned(), of.to_owned());
    assert_eq!(
        aliases,
        [
            of("model.layers.61.embed_tokens.weight", "model.embed_tokens.weight"),
            of("model.layers.61.shared_head.head.weight", "lm_head.weight"),
        ]
    );
}

#[test]
fn a_tied_head_is_an_alias() {
    let mut value = llama();
    value["tie_word_embeddings"] = json!(true);
    let config = Config::from_json(&value).unwrap();
    assert!(tensors(&config).iter().all(|spec| spec.role != Role::Head));
    assert_eq!(optional_aliases(&config)[0].name, "lm_head.weight");
}

#[test]
fn causal_attention_costs_half_the_square() {
    let config = Config::from_json(&llama()).unwrap();
    let flops = flops_per_token(&config, 8, false);
    // 2 flops, keys of 1..=8 tokens, both products of 3 heads of 8, 2 layers
    let by_hand: u64 = (1..=8).map(|keys| 2 * keys * 3 * (8 + 8) * 2).sum();
    assert_eq!(flops.attention * 8, by_hand);
    assert_eq!(flops.training(), 3 * (flops.linear + flops.attention));
}

#[test]
fn a_window_bounds_the_keys_of_a_row() {
    let mut value = qwen2();
    for (key, change) in [
        ("use_sliding_window", json!(true)),
        ("sliding_window", json!(3)),
        ("max_window_layers", json!(1)),
        ("num_hidden_layers", json!(2)),
    ] {
        value[key] = change;
    }
    let config = Config::from_json(&value).unwrap();
    let flops = flops_per_token(&config, 10, false);
    // 14 heads of 64, both products; the first layer sees everything, the second three keys at most
    let by_hand: u64 = (1..=10_u64).map(|keys| 2 * (keys + keys.min(3)) * 14 * (64 + 64)).sum();
    assert!(flops.attention.abs_diff(by_hand / 10) <= 1, "{} for {}", flops.attention, by_hand / 10);
    let short = flops_per_token(&config, 3, false);
    assert_eq!(short.attention, 2 * 14 * 128 * 4);
}
