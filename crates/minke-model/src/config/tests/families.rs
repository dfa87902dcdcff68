//! The published configs of the families beside DeepSeek, and what they may say wrongly.

use super::*;

/// Qwen2.5-0.5B.
pub fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
    })
}

/// Llama-3.2-1B.
pub fn llama3() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        },
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256
    })
}

/// Mistral-7B-v0.1.
pub fn mistral() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 32000
    })
}

/// Qwen3-0.6B.
pub fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_sliding_window": false,
        "vocab_size": 151936
    })
}

/// Qwen3-30B-A3B.
pub fn qwen3_moe() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
        "use_sliding_window": false, "vocab_size": 151936
    })
}

/// Gemma-2-2B, whose file says its activation twice.
pub fn gemma2() -> Value {
    json!({
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attn_logit_softcapping": 50.0,
        "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "vocab_size": 256000
    })
}

/// Gemma-3-1B.
pub fn gemma3() -> Value {
    json!({
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attn_logit_softcapping": null,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144
    })
}

/// Kimi-K2.
pub fn kimi_k2() -> Value {
    let mut value = deepseek_v3();
    for (key, change) in [
        ("model_type", json!("kimi_k2")),
        ("n_routed_experts", json!(384)),
        ("first_k_dense_replace", json!(1)),
        ("num_attention_heads", json!(64)),
        ("num_key_value_heads", json!(64)),
        ("num_nextn_predict_layers", json!(0)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("routed_scaling_factor", json!(2.827)),
        ("rope_theta", json!(50000.0)),
        ("vocab_size", json!(163840)),
    ] {
        value[key] = change;
    }
    value
}

/// Each with its published number of parameters, as transformers counts them.
pub fn published() -> [(Value, u64); 7] {
    [
        (qwen2(), 494_032_768),
        (llama3(), 1_235_814_400),
        (mistral(), 7_241_732_096),
        (qwen3(), 596_049_920),
        (qwen3_moe(), 30_532_122_624),
        (gemma2(), 2_614_341_888),
        (gemma3(), 999_885_952),
    ]
}

#[test]
fn published_files_are_read_as_they_are_meant() {
    let gqa = |num_key_value_heads, head_dim, bias, qk_norm| AttentionKind::Gqa {
        num_key_value_heads,
        head_dim,
        bias,
        qk_norm,
    };
    let none = ProjectionBias::None;
    let config = read(&qwen2());
    assert_eq!(config.attention, gqa(2, 64, ProjectionBias::QueryKeyValue, false));
    assert_eq!((config.sliding, config.rope.theta), (None, 1_000_000.0));
    assert_eq!(read(&llama3()).attention, gqa(8, 64, none, false));
    let config = read(&mistral());
    assert_eq!(config.attention, gqa(8, 128, none, false));
    assert!((0..32).all(|layer| config.window(layer) == Some(4096)));
    let config = read(&qwen3());
    assert_eq!((config.attention.clone(), config.sliding.clone()), (gqa(8, 128, none, true), None));
    assert_eq!(config.softmax_scale(), 1.0 / 128_f32.sqrt());
    let config = read(&qwen3_moe());
    let FfnKind::Moe(moe) = config.ffn(0) else { panic!("experts everywhere") };
    assert_eq!(
        (moe.scoring, moe.topk_method, moe.norm_topk_prob),
        (Scoring::Softmax, TopkMethod::Greedy, true)
    );
    assert_eq!((moe.n_routed_experts, moe.n_shared_experts, moe.routed_scaling_factor), (128, 0, 1.0));
    let config = read(&gemma2());
    assert_eq!(config.attention, gqa(4, 256, none, false));
    assert_eq!((config.attn_logit_softcapping, config.final_logit_softcapping), (Some(50.0), Some(30.0)));
    assert_eq!([0, 1, 24, 25].map(|layer| config.window(layer)), [Some(4096), None, Some(4096), None]);
    assert_eq!((config.gate, config.tie_word_embeddings), (Gate::GeluTanh, true));
    let config = read(&gemma3());
    assert_eq!(config.attention, gqa(1, 256, none, true));
    assert_eq!(
        [0, 4, 5, 11, 25].map(|layer| config.window(layer).is_some()),
        [true, true, false, false, true]
    );
    assert_eq!((config.attn_logit_softcapping, config.final_logit_softcapping), (None, None));
    let sliding = config.sliding.as_ref().unwrap();
    assert_eq!((config.rope.theta, sliding.rope.as_ref().unwrap().theta), (1_000_000.0, 10_000.0));
    assert!(config.post_norms && config.norm_offset && config.scales_embedding);
    let config = read(&kimi_k2());
    assert!(config.family.is_v3() && config.rope.interleaved && config.rope.scales_softmax);
    assert_eq!(config.to_json()["model_type"], "kimi_k2");
    assert_eq!(config.to_json()["architectures"], json!(["DeepseekV3ForCausalLM"]));
}

/// What a file leaves out is the default of the family's class.
#[test]
fn what_is_left_out_is_what_transformers_has() {
    let small = |family: &str| {
        read(&json!({
            "model_type": family, "vocab_size": 32, "hidden_size": 64, "intermediate_size": 40,
            "num_hidden_layers": 30, "num_attention_heads": 32
        }))
    };
    let of = |family: &str| {
        let config = small(family);
        let AttentionKind::Gqa { num_key_value_heads, head_dim, .. } = config.attention else { panic!() };
        let windows = config.sliding.as_ref().map(|sliding| sliding.window);
        (num_key_value_heads, head_dim, config.max_position_embeddings, windows, config.tie_word_embeddings)
    };
    assert_eq!(of("llama"), (32, 2, 2048, None, false));
    assert_eq!(of("mistral"), (8, 2, 131_072, Some(4096), false));
    assert_eq!(of("qwen2"), (32, 2, 32_768, None, false));
    assert_eq!(of("qwen3"), (32, 128, 32_768, None, false));
    assert_eq!(of("qwen3_moe"), (4, 2, 32_768, None, false));
    assert_eq!(of("gemma2"), (4, 256, 8192, Some(4096), true));
    assert_eq!(of("gemma3_text"), (4, 256, 131_072, Some(4096), true));
    assert_eq!(small("gemma2").attn_logit_softcapping, Some(50.0));
    assert_eq!(small("gemma3_text").attn_logit_softcapping, None);
    let FfnKind::Moe(moe) = small("qwen3_moe").ffn(0) else { panic!() };
    assert_eq!((moe.n_routed_experts, moe.num_experts_per_tok, moe.moe_intermediate_size), (128, 8, 768));
}

#[test]
fn windows_are_read_from_either_form() {
    let with = |mut value: Value, changes: &[(&str, Value)]| {
        for (key, change) in changes {
            value[*key] = change.clone();
        }
        read(&value)
    };
    let slides = |config: &Config| {
        let of = |layer| config.window(layer).is_some();
        (0..config.num_hidden_layers).filter(|&layer| of(layer)).collect::<Vec<_>>()
    };
    let on = ("use_sliding_window", json!(true));
    let config = with(qwen2(), &[on.clone(), ("max_window_layers", json!(21))]);
    assert_eq!(slides(&config), [21, 22, 23]);
    let kinds: Vec<_> =
        (0..24).map(|i| if i == 3 { "sliding_attention" } else { "full_attention" }).collect();
    let config = with(qwen2(), &[on.clone(), ("layer_types", json!(kinds))]);
    assert_eq!(slides(&config), [3]);
    // what is written says the layers by name, and older fields do not contradict it
    assert_eq!(read(&config.to_json()), config);
    let config = with(qwen3_moe(), &[on, ("sliding_window", json!(100))]);
    assert_eq!(slides(&config).len(), 48);
    let config = with(mistral(), &[("sliding_window", json!(null))]);
    assert!(slides(&config).is_empty() && config.to_json()["sliding_window"].is_null());
    let config = with(gemma3(), &[("sliding_window_pattern", json!(2))]);
    assert_eq!(slides(&config), (0..26).step_by(2).collect::<Vec<_>>());
    assert_eq!(read(&config.to_json()), config);
}

#[test]
fn two_ropes_are_read_from_either_form() {
    let old = {
        let mut value = gemma3();
        value["rope_scaling"] = json!({"factor": 8.0, "rope_type": "linear"});
        value["rope_local_base_freq"] = json!(777.0);
        value
    };
    let mut new = gemma3();
    for key in ["rope_theta", "rope_scaling", "rope_local_base_freq"] {
        new.as_object_mut().unwrap().remove(key);
    }
    new["rope_parameters"] = json!({
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 777.0}
    });
    let (old, new) = (read(&old), read(&new));
    assert_eq!((&old.rope, &old.sliding), (&new.rope, &new.sliding));
    assert_eq!(old.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(old.sliding.as_ref().unwrap().rope.as_ref().unwrap().scaling, RopeScaling::None);
    let mut silent = gemma3();
    for key in ["rope_theta", "rope_scaling", "rope_local_base_freq"] {
        silent.as_object_mut().unwrap().remove(key);
    }
    assert_eq!(read(&silent).rope, read(&gemma3()).rope);
    assert_eq!(read(&old.to_json()), old);
}

/// Of Llama-3.2-1B, in nine digits as transformers prints them: kept, mixed and divided frequencies.
#[test]
#[expect(clippy::excessive_precision, reason = "the reference's digits as it printed them")]
fn llama3_frequencies_are_the_reference_ones() {
    let frequencies = read(&llama3()).inv_freq();
    for (index, want) in [
        (0, 1.0),
        (10, 0.0165604409_f32),
        (13, 0.00483942125),
        (14, 0.00321144611),
        (15, 0.00129054801),
        (16, 0.000429556705),
        (17, 9.70828623e-05),
        (18, 1.94616387e-05),
        (31, 9.41830649e-08),
    ] {
        let got = frequencies[index];
        assert!((got - want).abs() <= want * 8.0 * f32::EPSILON, "{index}: {got} for {want}");
    }
}

#[test]
fn what_is_written_reads_the_same_in_every_family() {
    let mut odd = vec![kimi_k2()];
    let change = |mut value: Value, changes: &[(&str, Value)]| {
        for (key, change) in changes {
            value[*key] = change.clone();
        }
        value
    };
    odd.push(change(llama(), &[("attention_bias", json!(true)), ("mlp_bias", json!(true))]));
    odd.push(change(llama(), &[("hidden_act", json!("gelu_pytorch_tanh"))]));
    odd.push(change(
        qwen3(),
        &[("attention_bias", json!(true)), ("use_sliding_window", json!(true)), ("sliding_window", json!(9))],
    ));
    odd.push(change(qwen3_moe(), &[("mlp_only_layers", json!([0, 5])), ("decoder_sparse_step", json!(2))]));
    odd.push(change(gemma2(), &[("attn_logit_softcapping", json!(null)), ("attention_bias", json!(true))]));
    odd.push(change(
        gemma3(),
        &[("final_logit_softcapping", json!(7.5)), ("tie_word_embeddings", json!(false))],
    ));
    for value in published().into_iter().map(|(value, _)| value).chain(odd) {
        let config = read(&value);
        let written = config.to_json();
        assert_eq!(read(&written), config, "{written:#}");
        assert_eq!(read(&written).to_json(), written);
    }
}

#[test]
fn experts_stand_where_the_steps_say() {
    let mut value = qwen3_moe();
    value["decoder_sparse_step"] = json!(3);
    value["mlp_only_layers"] = json!([5, 11]);
    let config = read(&value);
    let with: Vec<_> = (0..12).filter(|&layer| matches!(config.ffn(layer), FfnKind::Moe(_))).collect();
    assert_eq!(with, [2, 8]);
}

#[test]
fn messages_of_families_name_field_expected_and_got() {
    let dynamic = json!({"type": "dynamic", "factor": 2.0});
    let nested = json!({"full_attention": {"rope_theta": 3.0}});
    let types = |kind: &str| json!([kind, "full_attention"]);
    let messages = [
        error(llama(), &[("rope_scaling", dynamic)]),
        error(llama(), &[("rope_scaling", json!({"rope_type": "longrope", "short_factor": [1.0]}))]),
        error(llama(), &[("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}))]),
        error(
            llama3(),
            &[(
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
            )],
        ),
        error(llama(), &[("rope_parameters", nested)]),
        error(llama(), &[("partial_rotary_factor", json!(0.5))]),
        error(mistral(), &[("sliding_window", json!(0))]),
        error(mistral(), &[("num_hidden_layers", json!(2)), ("layer_types", types("sliding_attention"))]),
        error(mistral(), &[("attention_bias", json!(true))]),
        error(qwen2(), &[("layer_types", json!(["full_attention"]))]),
        error(qwen2(), &[("num_hidden_layers", json!(2)), ("layer_types", types("sliding_attention"))]),
        error(qwen3(), &[("num_hidden_layers", json!(2)), ("layer_types", types("chunked_attention"))]),
        error(qwen3(), &[("mlp_bias", json!(true))]),
        error(qwen3_moe(), &[("num_experts_per_tok", json!(129))]),
        error(qwen3_moe(), &[("mlp_only_layers", json!([-1]))]),
        error(qwen3_moe(), &[("num_experts", json!(8192))]),
        error(gemma3(), &[("attn_logit_softcapping", json!(50.0))]),
        error(gemma3(), &[("use_bidirectional_attention", json!(true))]),
        error(gemma3(), &[("rope_parameters", json!({"rope_theta": 5.0}))]),
        error(gemma3(), &[("hidden_activation", json!("gelu"))]),
        error(gemma2(), &[("final_logit_softcapping", json!(-1.0))]),
        error(gemma2(), &[("query_pre_attn_scalar", json!(0))]),
    ];
    assert_snapshot!(messages.join("\n"));
}
