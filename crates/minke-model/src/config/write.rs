//! `config.json` out, as transformers writes it.

use serde_json::{Map, Value, json};

use super::{AttentionKind, Config, Family, Gate, MoeLayers, ProjectionBias, Rope, RopeScaling, TopkMethod};

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
        AttentionKind::Gqa { num_key_value_heads, head_dim, bias, qk_norm: _ } => {
            put("num_key_value_heads", json!(num_key_value_heads));
            put("head_dim", json!(head_dim));
            if !matches!(config.family, Family::Qwen2 | Family::Mistral) {
                put("attention_bias", json!(*bias == ProjectionBias::All));
            }
        }
    }
    if matches!(config.family, Family::DeepseekV2 | Family::Llama) {
        put("mlp_bias", json!(config.mlp_bias));
    }
    let gate = match config.gate {
        Gate::Silu => "silu",
        Gate::GeluTanh => "gelu_pytorch_tanh",
    };
    put(if config.family.is_gemma() { "hidden_activation" } else { "hidden_act" }, json!(gate));
    for (key, value) in looks(config) {
        put(key, value);
    }
    if let Some(layers) = &config.moe_layers {
        experts(&mut put, config.family, layers);
    }
    if config.family.is_v3() {
        put("num_nextn_predict_layers", json!(config.num_nextn_predict_layers));
        put("rope_interleave", json!(config.rope.interleaved));
    }
    put("max_position_embeddings", json!(config.max_position_embeddings));
    let (parameters, scaling) = rope(&config.rope);
    match config.sliding.as_ref().and_then(|sliding| sliding.rope.as_ref()) {
        _ if config.family != Family::Gemma3Text => put("rope_parameters", parameters),
        sliding => {
            let sliding = sliding.unwrap_or(&PLAIN);
            put("rope_local_base_freq", json!(sliding.theta));
            let both = json!({"full_attention": parameters, "sliding_attention": rope(sliding).0});
            put("rope_parameters", both)
        }
    };
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

/// The rope of sliding layers where a model has none.
const PLAIN: Rope =
    Rope { theta: 10_000.0, interleaved: false, scales_softmax: false, scaling: RopeScaling::None };

/// Windows, caps and the scale of scores, for the families that have them.
fn looks(config: &Config) -> Vec<(&'static str, Value)> {
    let sliding = config.sliding.as_ref();
    let mut all = Vec::new();
    match config.family {
        Family::DeepseekV3 | Family::KimiK2 | Family::DeepseekV2 | Family::Llama => return all,
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => {
            all.push(("use_sliding_window", json!(sliding.is_some())));
        }
        Family::Gemma2 | Family::Gemma3Text => {
            all.push(("query_pre_attn_scalar", json!(config.query_pre_attn_scalar)));
            all.push(("attn_logit_softcapping", json!(config.attn_logit_softcapping)));
            all.push(("final_logit_softcapping", json!(config.final_logit_softcapping)));
        }
        Family::Mistral => {}
    }
    all.push(("sliding_window", json!(sliding.map(|sliding| sliding.window))));
    if !matches!(config.family, Family::Mistral | Family::Qwen3Moe) {
        let kind = |layer| match config.window(layer) {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        let kinds: Vec<_> = (0..config.num_hidden_layers).map(kind).collect();
        all.push(("layer_types", json!(kinds)));
    }
    all
}

fn experts<R>(put: &mut impl FnMut(&str, Value) -> R, family: Family, layers: &MoeLayers) {
    let moe = &layers.moe;
    if family == Family::Qwen3Moe {
        // version 5 of transformers writes the second name, everyone reads the first
        put("num_experts", json!(moe.n_routed_experts));
        put("num_local_experts", json!(moe.n_routed_experts));
        put("num_experts_per_tok", json!(moe.num_experts_per_tok));
        put("moe_intermediate_size", json!(moe.moe_intermediate_size));
        put("norm_topk_prob", json!(moe.norm_topk_prob));
        put("decoder_sparse_step", json!(layers.moe_layer_freq));
        put("mlp_only_layers", json!(layers.dense_layers));
        return;
    }
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
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            put("rope_type", json!("llama3"));
            put("factor", json!(factor));
            put("low_freq_factor", json!(low_freq_factor));
            put("high_freq_factor", json!(high_freq_factor));
            put("original_max_position_embeddings", json!(original_max_position_embeddings));
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
