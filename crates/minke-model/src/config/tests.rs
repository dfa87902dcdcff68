pub mod families;

use insta::assert_snapshot;
use serde_json::{Value, json};

use super::*;

/// The published config of DeepSeek-V3.
pub fn deepseek_v3() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
    })
}

/// The published config of DeepSeek-V2-Lite.
pub fn deepseek_v2_lite() -> Value {
    json!({
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "bos_token_id": 100000,
        "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn"
        },
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
        "v_head_dim": 128, "vocab_size": 102400
    })
}

/// A small Llama.
pub fn llama() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 3, "eos_token_id": [2, 3]
    })
}

fn read(value: &Value) -> Config {
    Config::from_json(value).unwrap()
}

fn error(mut value: Value, changes: &[(&str, Value)]) -> String {
    for (key, change) in changes {
        value[*key] = change.clone();
    }
    Config::from_json(&value).unwrap_err().to_string()
}

#[test]
fn deepseek_v3_is_read_as_published() {
    let config = read(&deepseek_v3());
    assert_eq!(
        config.attention,
        AttentionKind::Mla {
            q_lora_rank: Some(1536),
            kv_lora_rank: 512,
            qk_nope_head_dim: 128,
            qk_rope_head_dim: 64,
            v_head_dim: 128
        }
    );
    assert_eq!(config.ffn(2), FfnKind::Dense { intermediate_size: 18432 });
    let FfnKind::Moe(moe) = config.ffn(61) else { panic!("the MTP layer has experts") };
    assert_eq!((moe.scoring, moe.topk_method), (Scoring::Sigmoid, TopkMethod::NoAuxTc));
    assert!(config.rope.interleaved);
    assert_eq!(config.eos_token_id, [1]);
    assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    assert_eq!(config.extra.keys().collect::<Vec<_>>(), ["attention_dropout", "ep_size", "use_cache"]);
}

#[test]
fn what_is_written_reads_the_same() {
    let mut odd = deepseek_v3();
    odd["rope_interleave"] = json!(false);
    odd["rope_scaling"] =
        json!({"rope_type": "yarn", "factor": 4.0, "truncate": false, "attention_factor": 1.5});
    let mut linear = llama();
    linear["rope_parameters"] = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0});
    linear["num_key_value_heads"] = json!(1);
    let mut grouped = deepseek_v2_lite();
    for (key, value) in [("topk_method", json!("group_limited_greedy")), ("n_group", json!(8))] {
        grouped[key] = value;
    }
    grouped["topk_group"] = json!(3);
    for value in [deepseek_v3(), deepseek_v2_lite(), llama(), odd, linear, grouped] {
        let config = read(&value);
        let written = config.to_json();
        assert_eq!(read(&written), config, "{written:#}");
        assert_eq!(read(&written).to_json(), written);
    }
}

#[test]
fn rope_is_read_from_old_and_new_files() {
    let old = read(&deepseek_v3());
    let mut new = deepseek_v3();
    let object = new.as_object_mut().unwrap();
    object.remove("rope_theta");
    let mut parameters = object.remove("rope_scaling").unwrap();
    parameters["rope_theta"] = json!(10000.0);
    parameters["rope_type"] = json!("yarn");
    object.insert("rope_parameters".to_owned(), parameters);
    assert_eq!(read(&new).rope, old.rope);
    // as transformers: rope_scaling wins where both stand
    new["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
    new["rope_theta"] = json!(500.0);
    assert_eq!(read(&new).rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(read(&new).rope.theta, 500.0);
}

/// Frequencies, cos/sin scale and softmax factor as transformers 5 computes them, in nine digits.
#[test]
#[expect(clippy::excessive_precision, reason = "the reference's digits as it printed them")]
fn rope_numbers_are_the_reference_ones() {
    let yarn = |factor: f64, mscale, mscale_all_dim, truncate| RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale,
        mscale_all_dim,
        attention_factor: None,
        truncate,
    };
    let rope = |theta, scaling| Rope { theta, interleaved: true, scales_softmax: true, scaling };
    let cases: [(Rope, &[f32], f32, f32); 4] = [
        (
            rope(10000.0, RopeScaling::None),
            &[
                1.0,
                0.316227764,
                0.100000001,
                0.0316227786,
                0.00999999978,
                0.00316227786,
                0.001,
                0.000316227786,
            ],
            1.0,
            1.0,
        ),
        (
            rope(10000.0, yarn(40.0, Some(0.707), Some(0.5), true)),
            &[
                1.0,
                0.316227764,
                0.1,
                0.0239147246,
                0.00512499968,
                0.000849862176,
                2.49999994e-5,
                7.90569447e-6,
            ],
            1.064468903941252,
            1.4029075244788534,
        ),
        (
            rope(50000.0, yarn(40.0, None, None, false)),
            &[
                1.0,
                0.258600146,
                0.0668740347,
                0.0122180097,
                0.00145799853,
                2.89123745e-5,
                7.47674403e-6,
                1.93348706e-6,
            ],
            1.3688879454113936,
            1.0,
        ),
        (
            rope(10000.0, RopeScaling::Linear { factor: 4.0 }),
            &[0.25, 0.079056941, 0.025, 0.00790569466, 0.0025, 0.000790569466, 0.00025, 7.90569466e-5],
            1.0,
            1.0,
        ),
    ];
    for (rope, inv_freq, cos_sin, softmax) in cases {
        let got = rope.inv_freq(16);
        assert_eq!(got.len(), inv_freq.len());
        for (got, want) in got.iter().zip(inv_freq) {
            assert!((got - want).abs() <= want * 2.0 * f32::EPSILON, "{rope:?}: {got} for {want}");
        }
        assert!((rope.cos_sin_scale() - cos_sin).abs() < 1e-6);
        assert!((rope.softmax_scale(1) - softmax).abs() < 1e-6);
        assert!((rope.softmax_scale(64) - softmax / 8.0).abs() < 1e-6);
    }
    // the whole published rope of V3: its ends, and the middle of its ramp
    let config = read(&deepseek_v3());
    let inv_freq = config.inv_freq();
    for (index, want) in [(0, 1.0), (15, 0.0083345091), (20, 0.000790569407_f32), (31, 3.33380353e-6)] {
        assert!((inv_freq[index] - want).abs() <= want * 2.0 * f32::EPSILON, "{index}: {}", inv_freq[index]);
    }
    assert!((config.softmax_scale() - 1.8738542070926265 / 192_f32.sqrt()).abs() < 1e-7);
    let plain = Rope { scales_softmax: false, ..config.rope };
    assert_eq!(plain.softmax_scale(64), 0.125);
}

#[test]
fn messages_name_field_expected_and_got() {
    let v3 = deepseek_v3;
    let mut missing = v3();
    missing.as_object_mut().unwrap().remove("kv_lora_rank");
    let messages = [
        error(json!([1]), &[]),
        error(v3(), &[("model_type", json!("gpt2"))]),
        error(missing, &[]),
        error(v3(), &[("hidden_size", json!(0))]),
        error(v3(), &[("hidden_size", json!(1_u64 << 60))]),
        error(v3(), &[("hidden_size", json!("wide"))]),
        error(v3(), &[("vocab_size", json!(-5))]),
        error(v3(), &[("num_experts_per_tok", json!(257))]),
        error(v3(), &[("n_group", json!(7))]),
        error(v3(), &[("topk_group", json!(9))]),
        error(v3(), &[("n_group", json!(256))]),
        error(v3(), &[("topk_group", json!(1)), ("num_experts_per_tok", json!(33))]),
        error(v3(), &[("qk_rope_head_dim", json!(63))]),
        error(v3(), &[("num_key_value_heads", json!(8))]),
        error(v3(), &[("attention_bias", json!(true))]),
        error(v3(), &[("hidden_act", json!("gelu"))]),
        error(v3(), &[("scoring_func", json!("softmax"))]),
        error(v3(), &[("rope_scaling", json!({"type": "llama3", "factor": 8.0}))]),
        error(v3(), &[("rope_scaling", json!({"type": "linear"}))]),
        error(v3(), &[("rope_theta", json!(1.0))]),
        error(v3(), &[("eos_token_id", json!("end"))]),
        error(v3(), &[("n_routed_experts", json!(4096)), ("num_hidden_layers", json!(1000))]),
        error(v3(), &[("hidden_size", json!(1 << 24)), ("intermediate_size", json!(1 << 24))]),
        error(deepseek_v2_lite(), &[("norm_topk_prob", json!(true))]),
        error(deepseek_v2_lite(), &[("num_nextn_predict_layers", json!(1))]),
        error(llama(), &[("num_attention_heads", json!(5))]),
        error(llama(), &[("num_key_value_heads", json!(2))]),
        error(llama(), &[("head_dim", json!(7))]),
    ];
    assert_snapshot!(messages.join("\n"));
}

#[test]
fn no_single_field_makes_it_panic() {
    let hostile = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1e300),
        json!(u64::MAX),
        json!("x"),
        json!([1]),
        json!({"a": 1}),
        json!({"full_attention": 1, "sliding_attention": {"rope_theta": -1}}),
        json!({"rope_type": "llama3", "factor": 1e-300, "low_freq_factor": 1e-300, "high_freq_factor": 1e300}),
    ];
    let families = families::published().map(|(value, _)| value);
    for base in [deepseek_v3(), deepseek_v2_lite(), llama()].into_iter().chain(families) {
        for key in base.as_object().unwrap().keys() {
            for value in &hostile {
                let mut changed = base.clone();
                changed[key] = value.clone();
                if let Ok(config) = Config::from_json(&changed) {
                    assert!(
                        config.inv_freq().iter().all(|frequency| frequency.is_finite()),
                        "{key} = {value}"
                    );
                    assert!(config.softmax_scale().is_finite() && config.cos_sin_scale_is_finite());
                }
            }
        }
    }
}

impl Config {
    fn cos_sin_scale_is_finite(&self) -> bool {
        self.rope.cos_sin_scale().is_finite()
    }
}

#[test]
fn fp8_is_read_and_written_as_published() {
    let published = json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    });
    let with = |quantization: Value| {
        let mut value = deepseek_v3();
        value["quantization_config"] = quantization;
        value
    };
    let config = read(&with(published.clone()));
    assert_eq!(config.quantization, Some(Quantization { power_of_two: false }));
    assert_eq!(config.to_json()["quantization_config"], published);
    let mut rounded = published.clone();
    rounded["scale_fmt"] = "ue8m0".into();
    let config = read(&with(rounded.clone()));
    assert_eq!(config.quantization, Some(Quantization { power_of_two: true }));
    assert_eq!(config.to_json()["quantization_config"], rounded);
    assert_eq!(read(&with(Value::Null)).quantization, None);
    assert!(read(&deepseek_v3()).to_json().get("quantization_config").is_none());
    // as transformers writes it
    let mut theirs = published.clone();
    theirs.as_object_mut().unwrap().remove("fmt");
    theirs["scale_fmt"] = "float".into();
    theirs["modules_to_not_convert"] = json!(["lm_head"]);
    assert_eq!(read(&with(theirs)).quantization, Some(Quantization { power_of_two: false }));

    let mut all = Vec::new();
    for (field, value) in [
        ("quant_method", json!("awq")),
        ("quant_method", Value::Null),
        ("fmt", json!("e5m2")),
        ("activation_scheme", json!("static")),
        ("expert_dtype", json!("fp4")),
        ("weight_block_size", json!([1, 128])),
        ("weight_block_size", Value::Null),
        ("scale_fmt", json!("e8m0")),
        ("scale_fmt", json!(3)),
    ] {
        let mut quantization = published.clone();
        quantization[field] = value;
        let error = Config::from_json(&with(quantization)).unwrap_err();
        assert_eq!(error.field(), format!("quantization_config.{field}"));
        all.push(error.to_string());
    }
    all.push(Config::from_json(&with(json!("fp8"))).unwrap_err().to_string());
    assert_snapshot!(all.join("\n"));
}
