//! The attention of a config: heads, biases, windows, caps.

use serde_json::{Map, Value};

use super::fields::{Fields, invalid, show, unsupported};
use crate::config::{AttentionKind, ConfigError, Family, MAX_SIZE, ProjectionBias, Rope, Sliding};

/// How queries, keys and values are made.
pub(super) fn attention(
    fields: &mut Fields,
    family: Family,
    hidden_size: usize,
    num_attention_heads: usize,
) -> Result<AttentionKind, ConfigError> {
    let bias = bias(fields, family)?;
    let width = hidden_size / num_attention_heads;
    // transformers refuses to load these families otherwise, and the others where nothing else gives the width
    let strict = matches!(family, Family::DeepseekV2 | Family::Llama) || family.is_gemma();
    let derived = !family.is_latent()
        && family != Family::Qwen3
        && fields.object.get("head_dim").is_none_or(Value::is_null);
    if (strict || derived) && !hidden_size.is_multiple_of(num_attention_heads) {
        let expected = format!("a divisor of hidden_size = {hidden_size}");
        return Err(invalid("num_attention_heads", expected, num_attention_heads));
    }
    let num_key_value_heads = match fields.integer("num_key_value_heads", 1, MAX_SIZE)? {
        Some(heads) => heads,
        None if fields.object.contains_key("num_key_value_heads") => num_attention_heads,
        None => match family {
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
            Family::Qwen3Moe | Family::Gemma2 | Family::Gemma3Text => 4,
            Family::DeepseekV3 | Family::KimiK2 | Family::DeepseekV2 | Family::Llama => num_attention_heads,
        },
    };
    let head_bound = |field: &str, width: usize| match num_attention_heads.checked_mul(width) {
        Some(all) if all <= MAX_SIZE => Ok(width),
        _ => Err(invalid(field, format!("at most {MAX_SIZE} when multiplied by num_attention_heads"), width)),
    };
    let even = |field: &str, width: usize| {
        if width.is_multiple_of(2) { Ok(width) } else { Err(invalid(field, "an even number", width)) }
    };
    if family.is_latent() {
        if num_key_value_heads != num_attention_heads {
            let expected = format!("num_attention_heads = {num_attention_heads} (latent attention)");
            return Err(invalid("num_key_value_heads", expected, num_key_value_heads));
        }
        // null means direct projection; an absent key would mean the reference's default of 1536
        if !fields.object.contains_key("q_lora_rank") {
            return Err(fields.missing("q_lora_rank", "an integer, or null for none"));
        }
        // older files repeat qk_rope_head_dim here
        fields.taken.push("head_dim");
        let kv_lora_rank = fields.size("kv_lora_rank")?;
        let q_lora_rank = fields.integer("q_lora_rank", 1, MAX_SIZE)?;
        let qk_nope_head_dim = head_bound("qk_nope_head_dim", fields.size("qk_nope_head_dim")?)?;
        let qk_rope_head_dim = head_bound("qk_rope_head_dim", fields.size("qk_rope_head_dim")?)?;
        let v_head_dim = head_bound("v_head_dim", fields.size("v_head_dim")?)?;
        return Ok(AttentionKind::Mla {
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim: even("qk_rope_head_dim", qk_rope_head_dim)?,
            v_head_dim,
        });
    }
    if num_key_value_heads > num_attention_heads || !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let expected = format!("a divisor of num_attention_heads = {num_attention_heads}");
        return Err(invalid("num_key_value_heads", expected, num_key_value_heads));
    }
    let head_dim = fields.integer("head_dim", 1, MAX_SIZE)?.unwrap_or(match family {
        Family::Qwen3 => 128,
        Family::Gemma2 | Family::Gemma3Text => 256,
        _ => width,
    });
    let head_dim = even("head_dim", head_bound("head_dim", head_dim)?)?;
    let qk_norm = matches!(family, Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3Text);
    Ok(AttentionKind::Gqa { num_key_value_heads, head_dim, bias, qk_norm })
}

fn bias(fields: &mut Fields, family: Family) -> Result<ProjectionBias, ConfigError> {
    if family == Family::Qwen2 {
        // always, whatever the file says: transformers does not ask it
        fields.taken.push("attention_bias");
        return Ok(ProjectionBias::QueryKeyValue);
    }
    if !fields.flag("attention_bias", false)? {
        return Ok(ProjectionBias::None);
    }
    match family {
        Family::DeepseekV3 | Family::KimiK2 | Family::DeepseekV2 | Family::Mistral => {
            let hint = format!("family {} is built without biases", family.model_type());
            Err(unsupported("attention_bias", "true", hint))
        }
        Family::Llama
        | Family::Qwen2
        | Family::Qwen3
        | Family::Qwen3Moe
        | Family::Gemma2
        | Family::Gemma3Text => Ok(ProjectionBias::All),
    }
}

/// Layers with a window; `rope` is that of theirs.
pub(super) fn sliding(
    fields: &mut Fields,
    family: Family,
    num_hidden_layers: usize,
    rope: Option<Rope>,
) -> Result<Option<Sliding>, ConfigError> {
    let switch = match family {
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => fields.flag("use_sliding_window", false)?,
        Family::Mistral | Family::Gemma2 | Family::Gemma3Text => true,
        // whose files may carry such fields without a meaning
        Family::DeepseekV3 | Family::KimiK2 | Family::DeepseekV2 | Family::Llama => return Ok(None),
    };
    if fields.flag("use_bidirectional_attention", false)? {
        let hint = "only causal attention is built";
        return Err(unsupported("use_bidirectional_attention", "true", hint));
    }
    let window = match fields.integer("sliding_window", 1, MAX_SIZE.pow(2))? {
        Some(window) => Some(window),
        None if fields.object.contains_key("sliding_window") => None,
        None => Some(4096),
    };
    let window = window.filter(|_| switch);
    let layers = match layer_types(fields, family, num_hidden_layers)? {
        Some(layers) => layers,
        // the fields that older files have instead stay where they are: this one says the same
        None => {
            let begin = match family {
                Family::Qwen2 | Family::Qwen3 => integer(fields, "max_window_layers", 0)?.unwrap_or(28),
                _ => 0,
            };
            let pattern = match family {
                Family::Gemma2 => Some(2),
                Family::Gemma3Text => {
                    let own = integer(fields, "sliding_window_pattern", 1)?;
                    Some(own.or(integer(fields, "_sliding_window_pattern", 1)?).unwrap_or(6))
                }
                _ => None,
            };
            let slides = |i: usize| {
                window.is_some() && i >= begin && pattern.is_none_or(|pattern| (i + 1) % pattern != 0)
            };
            (0..num_hidden_layers).map(slides).collect()
        }
    };
    match window {
        Some(window) => Ok(Some(Sliding { window, layers, rope })),
        None if layers.contains(&true) => {
            Err(fields.missing("sliding_window", "a window for the layers that slide"))
        }
        None => Ok(None),
    }
}

/// A field that is read and stays in the file.
fn integer(fields: &Fields, field: &'static str, low: usize) -> Result<Option<usize>, ConfigError> {
    Fields::new(fields.object, "").integer(field, low, MAX_SIZE)
}

/// Which layers slide, by `layer_types`.
fn layer_types(
    fields: &mut Fields,
    family: Family,
    num_hidden_layers: usize,
) -> Result<Option<Vec<bool>>, ConfigError> {
    let types = match fields.take("layer_types") {
        None => return Ok(None),
        Some(Value::Array(types)) if types.len() == num_hidden_layers => types,
        Some(value) => {
            let expected = format!("a list of num_hidden_layers = {num_hidden_layers} names");
            return Err(invalid("layer_types", expected, show(value)));
        }
    };
    let slides = |name: &Value| match name.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(invalid("layer_types", "names \"sliding_attention\" or \"full_attention\"", show(name))),
    };
    let layers: Vec<bool> = types.iter().map(slides).collect::<Result<_, _>>()?;
    if matches!(family, Family::Mistral | Family::Qwen3Moe) && layers.windows(2).any(|w| w[0] != w[1]) {
        let hint = format!("in family {} all layers are of one kind", family.model_type());
        return Err(unsupported("layer_types", "a mixture", hint));
    }
    Ok(Some(layers))
}

/// Soft caps of attention scores and of logits.
pub(super) fn caps(fields: &mut Fields, family: Family) -> Result<[Option<f64>; 2], ConfigError> {
    if !family.is_gemma() {
        return Ok([None; 2]);
    }
    let default = |field: &str, default: f64| {
        // null is none, and only Gemma 2 has a cap where nothing is said
        (family == Family::Gemma2 && !fields.object.contains_key(field)).then_some(default)
    };
    let defaults = [default("attn_logit_softcapping", 50.0), default("final_logit_softcapping", 30.0)];
    let attention = fields.positive("attn_logit_softcapping")?.or(defaults[0]);
    if let Some(cap) = attention
        && family == Family::Gemma3Text
    {
        // published code caps, transformers does not: no meaning to follow
        let hint = "implementations of gemma3_text disagree on it, and no published model sets it";
        return Err(unsupported("attn_logit_softcapping", cap.to_string(), hint));
    }
    Ok([attention, fields.positive("final_logit_softcapping")?.or(defaults[1])])
}

/// An object's keys, where a mistake is likely to be one level too deep.
pub(super) fn is_nested(object: &Map<String, Value>) -> bool {
    ["full_attention", "sliding_attention"].iter().any(|key| object.contains_key(*key))
}
