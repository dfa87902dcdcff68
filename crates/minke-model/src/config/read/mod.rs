//! `config.json` in: every field typed, bounded and checked against the others.

mod attention;
mod experts;
mod fields;
mod rope;

use serde_json::{Map, Value};

use super::{Config, ConfigError, Family, Gate, MAX_EXPERTS, MAX_LAYERS, MAX_PARAMETERS, Quantization};
use fields::{Fields, invalid, json_type, show, unsupported};

/// Fields that other fields give, so they are neither read nor kept.
const DERIVED: [&str; 2] = ["qk_head_dim", "architectures"];

/// The whole document; see [`Config::from_json`].
pub(super) fn config(value: &Value) -> Result<Config, ConfigError> {
    let object = value.as_object().ok_or_else(|| ConfigError::NotAnObject { got: json_type(value) })?;
    let mut fields = Fields::new(object, "");
    let name = fields.text("model_type")?.ok_or_else(|| fields.missing("model_type", Family::KNOWN))?;
    let family = Family::from_model_type(name)
        .ok_or_else(|| ConfigError::UnknownFamily { found: name.to_owned(), known: Family::KNOWN })?;

    let vocab_size = fields.size("vocab_size")?;
    let hidden_size = fields.size("hidden_size")?;
    let intermediate_size = fields.size("intermediate_size")?;
    let num_hidden_layers = fields.size_to("num_hidden_layers", MAX_LAYERS)?;
    let num_attention_heads = fields.size("num_attention_heads")?;
    let attention = attention::attention(&mut fields, family, hidden_size, num_attention_heads)?;
    let max_position_embeddings = fields.integer("max_position_embeddings", 1, 1 << 31)?;
    let max_position_embeddings = max_position_embeddings.unwrap_or(match family {
        Family::DeepseekV3 | Family::KimiK2 => 4096,
        Family::DeepseekV2 | Family::Llama => 2048,
        Family::Mistral | Family::Gemma3Text => 131_072,
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => 32_768,
        Family::Gemma2 => 8192,
    });
    let (rope, sliding_rope) = rope::ropes(&mut fields, family, max_position_embeddings)?;
    let sliding = attention::sliding(&mut fields, family, num_hidden_layers, sliding_rope)?;
    let [attn_logit_softcapping, final_logit_softcapping] = attention::caps(&mut fields, family)?;
    let query_pre_attn_scalar = match family {
        Family::Gemma2 | Family::Gemma3Text => {
            Some(fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0))
        }
        _ => None,
    };
    let moe_layers = experts::experts(&mut fields, family)?;
    let num_nextn_predict_layers = fields.integer("num_nextn_predict_layers", 0, 16)?.unwrap_or(0);
    if num_nextn_predict_layers > 0 && !family.is_v3() {
        return Err(unsupported(
            "num_nextn_predict_layers",
            format!("{num_nextn_predict_layers} in family {}", family.model_type()),
            "only deepseek_v3 has multi-token-prediction modules",
        ));
    }
    if let Some(experts) = &moe_layers {
        let all = experts.moe.n_routed_experts * (num_hidden_layers + num_nextn_predict_layers);
        if all > MAX_EXPERTS {
            let expected = format!("at most {MAX_EXPERTS} experts over all layers");
            let field = if family.is_latent() { "n_routed_experts" } else { "num_experts" };
            return Err(invalid(field, expected, all));
        }
    }
    let gate = gate(&mut fields, family)?;
    let mlp_bias = fields.flag("mlp_bias", false)?;
    if mlp_bias && family != Family::Llama {
        return Err(unsupported("mlp_bias", "true", "only family llama has biases there"));
    }
    if fields.flag("mtp_hidden_states_first", false)? {
        return Err(unsupported("mtp_hidden_states_first", "true", "the embedding comes first here"));
    }

    let config = Config {
        family,
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        attention,
        rope,
        sliding,
        query_pre_attn_scalar,
        attn_logit_softcapping,
        final_logit_softcapping,
        gate,
        mlp_bias,
        post_norms: family.is_gemma(),
        norm_offset: family.is_gemma(),
        scales_embedding: family.is_gemma(),
        moe_layers,
        num_nextn_predict_layers,
        max_position_embeddings,
        rms_norm_eps: fields
            .number("rms_norm_eps", "a number above 0 and below 1", |eps| eps > 0.0 && eps < 1.0)?
            .unwrap_or(1e-6),
        initializer_range: fields
            .number("initializer_range", "a number from 0 to 1", |range| (0.0..=1.0).contains(&range))?
            .unwrap_or(0.02),
        tie_word_embeddings: fields.flag("tie_word_embeddings", family.is_gemma())?,
        bos_token_id: fields.token("bos_token_id")?,
        eos_token_id: fields.tokens("eos_token_id")?,
        pad_token_id: fields.token("pad_token_id")?,
        dtype: match fields.text("dtype")? {
            Some(dtype) => {
                fields.taken.push("torch_dtype");
                Some(dtype.to_owned())
            }
            None => fields.text("torch_dtype")?.map(str::to_owned),
        },
        quantization: quantization(&mut fields)?,
        extra: Map::new(),
    };
    let parameters = crate::spec::parameter_total(&config);
    if parameters > MAX_PARAMETERS {
        return Err(invalid(
            "hidden_size",
            format!("at most {MAX_PARAMETERS} parameters in all"),
            parameters,
        ));
    }
    let known = |key: &String| fields.taken.contains(&key.as_str()) || DERIVED.contains(&key.as_str());
    let extra = object.iter().filter(|(key, _)| !known(key)).map(|(key, value)| (key.clone(), value.clone()));
    Ok(Config { extra: extra.collect(), ..config })
}

/// `quantization_config`: the one form that is read, by each field that could say something else.
fn quantization(fields: &mut Fields) -> Result<Option<Quantization>, ConfigError> {
    let object = match fields.take("quantization_config") {
        None => return Ok(None),
        Some(Value::Object(object)) => object,
        Some(value) => return Err(invalid("quantization_config", "an object or null", show(value))),
    };
    let mut inner = Fields::new(object, "quantization_config.");
    let mut only = |field: &'static str, known: &str, absent: Option<&'static str>| {
        let Some(found) = inner.text(field)?.or(absent) else {
            return Err(inner.missing(field, &format!("\"{known}\"")));
        };
        if found == known {
            return Ok(());
        }
        Err(unsupported(&inner.name(field), format!("\"{found}\""), format!("only \"{known}\" is read")))
    };
    only("quant_method", "fp8", None)?;
    only("fmt", "e4m3", Some("e4m3"))?;
    only("activation_scheme", "dynamic", Some("dynamic"))?;
    only("expert_dtype", "fp8", Some("fp8"))?;
    let sides = "[128, 128]";
    match inner.take("weight_block_size") {
        None => return Err(inner.missing("weight_block_size", sides)),
        Some(value) if *value == serde_json::json!([128, 128]) => {}
        Some(value) => {
            let hint = format!("only {sides} is read");
            return Err(unsupported(&inner.name("weight_block_size"), show(value), hint));
        }
    }
    let power_of_two = match inner.text("scale_fmt")? {
        // the second is how transformers calls what others leave out
        None | Some("float") => false,
        Some("ue8m0") => true,
        Some(other) => {
            let hint = "only \"ue8m0\" is read, and \"float\" or no such field for f32";
            return Err(unsupported(&inner.name("scale_fmt"), format!("\"{other}\""), hint));
        }
    };
    Ok(Some(Quantization { power_of_two }))
}

/// The activation of feed-forward gates.
fn gate(fields: &mut Fields, family: Family) -> Result<Gate, ConfigError> {
    let plain = fields.text("hidden_act")?;
    // Gemma's older files repeat it under the other name, which nobody reads
    let (field, found) = if family.is_gemma() {
        ("hidden_activation", fields.text("hidden_activation")?.or(Some("gelu_pytorch_tanh")))
    } else {
        ("hidden_act", plain)
    };
    match found.unwrap_or("silu") {
        "silu" | "swish" => Ok(Gate::Silu),
        "gelu_pytorch_tanh" => Ok(Gate::GeluTanh),
        other => {
            let hint = "only \"silu\" and \"gelu_pytorch_tanh\" are built";
            Err(unsupported(field, format!("\"{other}\""), hint))
        }
    }
}
