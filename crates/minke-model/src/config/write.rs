//! `config.json` out, as transformers writes it.

use serde_json::{Map, Value, json};

use super::{AttentionKind, Config, Family, Rope, RopeScaling, TopkMethod};

/// The whole document; see [`Config::to_json`].
pub(super) fn config(config: &Config) -> Value {
    let mut object = Map::new();
    let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
    put("architectures", json!([config.family.architecture()]));
    put("model_type", json!(config.family.model_type()));
    if let Some(dtype) = &config.dtype {
        // version 5 of transformers reads the first name, version 4 the second
        put("dtype", json!(dtype));
        put("torch_dtype", json!(dtype));
    }
    put("vocab_size", json!(config.vocab_size));
    put("hidden_size", json!(config.hidden_size));
    put("intermediate_size", json!(config.intermediate_size));
    put("num_hidden_layers", json!(config.num_hidden_layers));
    put("num_attention_heads", json!(config.num_attention_heads));
    match &config.attention {
        AttentionKind::Mla { q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
            put("num_key_value_heads", json!(config.num_attention_heads));
            put("head_dim", json!(qk_rope_head_dim));
            put("q_lora_rank", json!(q_lora_rank));
            put("kv_lora_rank", json!(kv_lora_rank));
            put("qk_head_dim", json!(qk_nope_head_dim + qk_rope_head_dim));
            put("qk_nope_head_dim", json!(qk_nope_head_dim));
            put("qk_rope_head_dim", json!(qk_rope_head_dim));
            put("v_head_dim", json!(v_head_dim));
            put("attention_bias", json!(false));
        }
        AttentionKind::Gqa { num_key_value_heads, head_dim, bias } => {
            put("num_key_value_heads", json!(num_key_value_heads));
            put("head_dim", json!(head_dim));
            put("attention_bias", json!(bias));
        }
    }
    if config.family != Family::DeepseekV3 {
        put("mlp_bias", json!(false));
    }
    put("hidden_act", json!("silu"));
    if let Some(layers) = &config.moe_layers {
        let moe = &layers.moe;
        put("first_k_dense_replace", json!(layers.first_k_dense_replace));
        put("moe_layer_freq", json!(layers.moe_layer_freq));
        put("n_routed_experts", json!(moe.n_routed_experts));
        put("num_experts_per_tok", json!(moe.num_experts_per_tok));
        put("n_shared_experts", json!(moe.n_shared_experts));
        put("moe_intermediate_size", json!(moe.moe_intermediate_size));
        put("n_group", json!(moe.n_group));
        put("topk_group", json!(moe.topk_group));
        put("norm_topk_prob", json!(moe.norm_topk_prob));
        put("routed_scaling_factor", json!(moe.routed_scaling_factor));
        let (scoring, method) = match moe.topk_method {
            TopkMethod::NoAuxTc => ("sigmoid", "noaux_tc"),
            TopkMethod::Greedy => ("softmax", "greedy"),
            TopkMethod::GroupLimitedGreedy => ("softmax", "group_limited_greedy"),
        };
        put("scoring_func", json!(scoring));
        put("topk_method", json!(method));
    }
    if config.family == Family::DeepseekV3 {
        put("num_nextn_predict_layers", json!(config.num_nextn_predict_layers));
        put("rope_interleave", json!(config.rope.interleaved));
    }
    put("max_position_embeddings", json!(config.max_position_embeddings));
    let (parameters, scaling) = rope(&config.rope);
    put("rope_parameters", parameters);
    put("rope_theta", json!(config.rope.theta));
    put("rope_scaling", scaling);
    put("rms_norm_eps", json!(config.rms_norm_eps));
    put("initializer_range", json!(config.initializer_range));
    put("tie_word_embeddings", json!(config.tie_word_embeddings));
    put("bos_token_id", json!(config.bos_token_id));
    put(
        "eos_token_id",
        match config.eos_token_id.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        },
    );
    put("pad_token_id", json!(config.pad_token_id));
    if let Some(quantization) = config.quantization {
        // in the order in which DeepSeek has it
        let mut value = json!({
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
        });
        if quantization.power_of_two {
            value["scale_fmt"] = json!("ue8m0");
        }
        put("quantization_config", value);
    }
    for (key, value) in &config.extra {
        object.entry(key.clone()).or_insert_with(|| value.clone());
    }
    Value::Object(object)
}

/// `rope_parameters` of newer files and `rope_scaling` of older ones (null without scaling).
fn rope(rope: &Rope) -> (Value, Value) {
    let mut parameters = Map::new();
    let mut put = |key: &str, value: Value| parameters.insert(key.to_owned(), value);
    match &rope.scaling {
        RopeScaling::None => {
            return (json!({"rope_theta": rope.theta, "rope_type": "default"}), Value::Null);
        }
        RopeScaling::Linear { factor } => {
            put("rope_type", json!("linear"));
            put("factor", json!(factor));
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            attention_factor,
            truncate,
        } => {
            put("rope_type", json!("yarn"));
            put("factor", json!(factor));
            put("original_max_position_embeddings", json!(original_max_position_embeddings));
            put("beta_fast", json!(beta_fast));
            put("beta_slow", json!(beta_slow));
            let optional = [("mscale", mscale), ("mscale_all_dim", mscale_all_dim)];
            for (key, value) in optional.into_iter().chain([("attention_factor", attention_factor)]) {
                if let Some(value) = value {
                    put(key, json!(value));
                }
            }
            if !truncate {
                put("truncate", json!(false));
            }
        }
    }
    let mut scaling = parameters.clone();
    // files of the time when models were published call it `type`
    scaling.insert("type".to_owned(), parameters["rope_type"].clone());
    parameters.insert("rope_theta".to_owned(), json!(rope.theta));
    (Value::Object(parameters), Value::Object(scaling))
}
