//! The experts of a config: how many, where, and how they are chosen.

use serde_json::Value;

use super::fields::{Fields, invalid, show, unsupported};
use crate::config::{
    ConfigError, Family, MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, MoeConfig, MoeLayers, Scoring, TopkMethod,
};

/// The experts, where the family has them.
pub(super) fn experts(fields: &mut Fields, family: Family) -> Result<Option<MoeLayers>, ConfigError> {
    match family {
        Family::DeepseekV3 | Family::KimiK2 | Family::DeepseekV2 => deepseek(fields, family).map(Some),
        Family::Qwen3Moe => qwen(fields).map(Some),
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Gemma2
        | Family::Gemma3Text => Ok(None),
    }
}

/// Softmax scores, the best k of all, no shared experts; layers are counted from 1, and some are excepted.
fn qwen(fields: &mut Fields) -> Result<MoeLayers, ConfigError> {
    let published = fields.integer("num_experts", 1, MAX_EXPERTS)?;
    let saved = fields.integer("num_local_experts", 1, MAX_EXPERTS)?;
    let n_routed_experts = published.or(saved).unwrap_or(128);
    let num_experts_per_tok = fields.integer("num_experts_per_tok", 1, MAX_SIZE)?.unwrap_or(8);
    if num_experts_per_tok > n_routed_experts {
        let expected = format!("at most num_experts = {n_routed_experts}");
        return Err(invalid("num_experts_per_tok", expected, num_experts_per_tok));
    }
    let moe = MoeConfig {
        n_routed_experts,
        num_experts_per_tok,
        moe_intermediate_size: fields.integer("moe_intermediate_size", 1, MAX_SIZE)?.unwrap_or(768),
        n_shared_experts: 0,
        n_group: 1,
        topk_group: 1,
        norm_topk_prob: fields.flag("norm_topk_prob", false)?,
        routed_scaling_factor: 1.0,
        scoring: Scoring::Softmax,
        topk_method: TopkMethod::Greedy,
    };
    let moe_layer_freq = fields.integer("decoder_sparse_step", 1, MAX_LAYERS)?.unwrap_or(1);
    let index = |value: &Value| value.as_u64().filter(|&i| i < MAX_LAYERS as u64).map(|i| i as usize);
    let dense_layers = match fields.take("mlp_only_layers") {
        None => Some(Vec::new()),
        Some(Value::Array(layers)) if layers.len() <= MAX_LAYERS => layers.iter().map(index).collect(),
        Some(_) => None,
    };
    let dense_layers = dense_layers.ok_or_else(|| {
        let value = fields.object.get("mlp_only_layers").map_or_else(String::new, show);
        invalid("mlp_only_layers", "a list of layers", value)
    })?;
    Ok(MoeLayers { first_k_dense_replace: 0, moe_layer_freq, phase: 1, dense_layers, moe })
}

fn deepseek(fields: &mut Fields, family: Family) -> Result<MoeLayers, ConfigError> {
    let n_routed_experts = fields.size_to("n_routed_experts", MAX_EXPERTS)?;
    let num_experts_per_tok = fields.size("num_experts_per_tok")?;
    if num_experts_per_tok > n_routed_experts {
        let expected = format!("at most n_routed_experts = {n_routed_experts}");
        return Err(invalid("num_experts_per_tok", expected, num_experts_per_tok));
    }
    let (scoring, topk_method) = routing(fields, family)?;
    let grouped = topk_method != TopkMethod::Greedy;
    let mut group = |field: &'static str| match fields.integer(field, 1, MAX_EXPERTS)? {
        None if grouped => Err(fields.missing(field, "a positive integer")),
        // greedy choice ignores groups
        found => Ok(if grouped { found.unwrap_or(1) } else { 1 }),
    };
    let (n_group, topk_group) = (group("n_group")?, group("topk_group")?);
    if !n_routed_experts.is_multiple_of(n_group) {
        return Err(invalid(
            "n_group",
            format!("a divisor of n_routed_experts = {n_routed_experts}"),
            n_group,
        ));
    }
    if topk_group > n_group {
        return Err(invalid("topk_group", format!("at most n_group = {n_group}"), topk_group));
    }
    let experts_per_group = n_routed_experts / n_group;
    if topk_method == TopkMethod::NoAuxTc && experts_per_group < 2 {
        let expected = format!("at least 2 experts in a group, so at most {}", n_routed_experts / 2);
        return Err(invalid("n_group", expected, n_group));
    }
    if num_experts_per_tok > topk_group * experts_per_group {
        let expected = format!("at most topk_group * experts per group = {}", topk_group * experts_per_group);
        return Err(invalid("num_experts_per_tok", expected, num_experts_per_tok));
    }
    let norm_topk_prob = fields.flag("norm_topk_prob", family.is_v3())?;
    if norm_topk_prob && family == Family::DeepseekV2 {
        // the published model code divides, transformers does not: no meaning to follow
        let hint = "implementations of deepseek_v2 disagree on it, and no published model sets it";
        return Err(unsupported("norm_topk_prob", "true", hint));
    }
    let moe = MoeConfig {
        n_routed_experts,
        num_experts_per_tok,
        moe_intermediate_size: fields.size("moe_intermediate_size")?,
        n_shared_experts: fields.integer("n_shared_experts", 0, MAX_EXPERTS)?.unwrap_or(0),
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor: fields.positive("routed_scaling_factor")?.unwrap_or(if family.is_v3() {
            2.5
        } else {
            1.0
        }),
        scoring,
        topk_method,
    };
    if moe.n_shared_experts.checked_mul(moe.moe_intermediate_size).is_none_or(|width| width > MAX_SIZE) {
        let expected = format!("at most {MAX_SIZE} when multiplied by moe_intermediate_size");
        return Err(invalid("n_shared_experts", expected, moe.n_shared_experts));
    }
    let first_k_dense_replace =
        fields.integer("first_k_dense_replace", 0, MAX_LAYERS)?.unwrap_or(if family.is_v3() { 3 } else { 0 });
    let moe_layer_freq = fields.integer("moe_layer_freq", 1, MAX_LAYERS)?.unwrap_or(1);
    Ok(MoeLayers { first_k_dense_replace, moe_layer_freq, phase: 0, dense_layers: Vec::new(), moe })
}

fn routing(fields: &mut Fields, family: Family) -> Result<(Scoring, TopkMethod), ConfigError> {
    let scoring = fields.text("scoring_func")?;
    let method = fields.text("topk_method")?;
    let refuse = |field: &str, got: &str, expected: &str| Err(invalid(field, expected, format!("\"{got}\"")));
    if family.is_v3() {
        return match (scoring.unwrap_or("sigmoid"), method.unwrap_or("noaux_tc")) {
            ("sigmoid", "noaux_tc") => Ok((Scoring::Sigmoid, TopkMethod::NoAuxTc)),
            ("sigmoid", other) => refuse("topk_method", other, "\"noaux_tc\" in family deepseek_v3"),
            (other, _) => refuse("scoring_func", other, "\"sigmoid\" in family deepseek_v3"),
        };
    }
    match (scoring.unwrap_or("softmax"), method.unwrap_or("greedy")) {
        ("softmax", "greedy") => Ok((Scoring::Softmax, TopkMethod::Greedy)),
        ("softmax", "group_limited_greedy") => Ok((Scoring::Softmax, TopkMethod::GroupLimitedGreedy)),
        ("softmax", other) => {
            refuse("topk_method", other, "\"greedy\" or \"group_limited_greedy\" in family deepseek_v2")
        }
        (other, _) => refuse("scoring_func", other, "\"softmax\" in family deepseek_v2"),
    }
}
