//! `config.json` in: every field typed, bounded and checked against the others.

use serde_json::{Map, Value};

use super::{
    AttentionKind, Config, ConfigError, Family, MAX_EXPERTS, MAX_LAYERS, MAX_PARAMETERS, MAX_SIZE, MoeConfig,
    MoeLayers, Quantization, Rope, RopeScaling, Scoring, TopkMethod,
};

/// Fields that other fields give, so they are neither read nor kept.
const DERIVED: [&str; 2] = ["qk_head_dim", "architectures"];

/// An object whose fields are taken one by one; what is never asked for is left over.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: &'static str,
    taken: Vec<&'static str>,
}

fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A value for a message: short ones whole, long ones by type.
fn show(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= 40 { text } else { json_type(value).to_owned() }
}

#[expect(clippy::needless_pass_by_value, reason = "callers hand over numbers and fresh strings")]
fn invalid(field: &str, expected: impl Into<String>, got: impl ToString) -> ConfigError {
    ConfigError::Invalid { field: field.to_owned(), expected: expected.into(), got: got.to_string() }
}

fn unsupported(field: &str, got: impl Into<String>, hint: impl Into<String>) -> ConfigError {
    ConfigError::Unsupported { field: field.to_owned(), got: got.into(), hint: hint.into() }
}

impl<'a> Fields<'a> {
    fn new(object: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Self { object, prefix, taken: Vec::new() }
    }

    fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// The value, with null as absent.
    fn take(&mut self, field: &'static str) -> Option<&'a Value> {
        self.taken.push(field);
        self.object.get(field).filter(|value| !value.is_null())
    }

    fn missing(&self, field: &str, expected: &str) -> ConfigError {
        ConfigError::Missing { field: self.name(field), expected: expected.to_owned() }
    }

    fn integer(
        &mut self,
        field: &'static str,
        low: usize,
        high: usize,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let found = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match found.filter(|number| (low..=high).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(&self.name(field), format!("an integer from {low} to {high}"), show(value))),
        }
    }

    /// A required positive size.
    fn size(&mut self, field: &'static str) -> Result<usize, ConfigError> {
        self.size_to(field, MAX_SIZE)
    }

    fn size_to(&mut self, field: &'static str, high: usize) -> Result<usize, ConfigError> {
        self.integer(field, 1, high)?
            .ok_or_else(|| self.missing(field, &format!("an integer from 1 to {high}")))
    }

    fn flag(&mut self, field: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.take(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(invalid(&self.name(field), "true or false", show(value))),
        }
    }

    fn text(&mut self, field: &'static str) -> Result<Option<&'a str>, ConfigError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(invalid(&self.name(field), "a string", show(value))),
        }
    }

    /// A finite number for which `ok` holds.
    fn number(
        &mut self,
        field: &'static str,
        expected: &str,
        ok: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite() && ok(*number)) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(&self.name(field), expected, show(value))),
        }
    }

    fn positive(&mut self, field: &'static str) -> Result<Option<f64>, ConfigError> {
        self.number(field, "a positive number", |number| number > 0.0)
    }

    fn token(&mut self, field: &'static str) -> Result<Option<u32>, ConfigError> {
        Ok(self.integer(field, 0, MAX_SIZE)?.map(|id| id as u32))
    }

    fn tokens(&mut self, field: &'static str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().filter(|id| *id <= MAX_SIZE as u64).map(|id| id as u32);
        let Some(value) = self.take(field) else { return Ok(Vec::new()) };
        let ids = match value {
            Value::Array(ids) if ids.len() <= 64 => ids.iter().map(id).collect(),
            Value::Number(_) => id(value).map(|id| vec![id]),
            _ => None,
        };
        ids.ok_or_else(|| invalid(&self.name(field), "a token id or a list of at most 64", show(value)))
    }
}

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
    let attention = attention(&mut fields, family, hidden_size, num_attention_heads)?;
    let max_position_embeddings = fields.integer("max_position_embeddings", 1, 1 << 31)?;
    let max_position_embeddings = max_position_embeddings.unwrap_or(match family {
        Family::DeepseekV3 => 4096,
        Family::DeepseekV2 | Family::Llama => 2048,
    });
    let rope = rope(&mut fields, family, max_position_embeddings)?;
    let moe_layers = match family {
        Family::DeepseekV3 | Family::DeepseekV2 => Some(experts(&mut fields, family)?),
        Family::Llama => None,
    };
    let num_nextn_predict_layers = fields.integer("num_nextn_predict_layers", 0, 16)?.unwrap_or(0);
    if num_nextn_predict_layers > 0 && family != Family::DeepseekV3 {
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
            return Err(invalid("n_routed_experts", expected, all));
        }
    }
    refuse_unbuilt(&mut fields)?;

    let config = Config {
        family,
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        attention,
        rope,
        moe_layers,
        num_nextn_predict_layers,
        max_position_embeddings,
        rms_norm_eps: fields
            .number("rms_norm_eps", "a number above 0 and below 1", |eps| eps > 0.0 && eps < 1.0)?
            .unwrap_or(1e-6),
        initializer_range: fields
            .number("initializer_range", "a number from 0 to 1", |range| (0.0..=1.0).contains(&range))?
            .unwrap_or(0.02),
        tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
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

fn attention(
    fields: &mut Fields,
    family: Family,
    hidden_size: usize,
    num_attention_heads: usize,
) -> Result<AttentionKind, ConfigError> {
    if fields.flag("attention_bias", false)? {
        return Err(unsupported("attention_bias", "true", "only projections without bias are built"));
    }
    // transformers refuses to load these two families otherwise
    if family != Family::DeepseekV3 && !hidden_size.is_multiple_of(num_attention_heads) {
        let expected = format!("a divisor of hidden_size = {hidden_size}");
        return Err(invalid("num_attention_heads", expected, num_attention_heads));
    }
    let num_key_value_heads =
        fields.integer("num_key_value_heads", 1, MAX_SIZE)?.unwrap_or(num_attention_heads);
    let head_bound = |field: &str, width: usize| match num_attention_heads.checked_mul(width) {
        Some(all) if all <= MAX_SIZE => Ok(width),
        _ => Err(invalid(field, format!("at most {MAX_SIZE} when multiplied by num_attention_heads"), width)),
    };
    let even = |field: &str, width: usize| {
        if width.is_multiple_of(2) { Ok(width) } else { Err(invalid(field, "an even number", width)) }
    };
    match family {
        Family::DeepseekV3 | Family::DeepseekV2 => {
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
            Ok(AttentionKind::Mla {
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim: even("qk_rope_head_dim", qk_rope_head_dim)?,
                v_head_dim,
            })
        }
        Family::Llama => {
            if num_key_value_heads > num_attention_heads
                || !num_attention_heads.is_multiple_of(num_key_value_heads)
            {
                let expected = format!("a divisor of num_attention_heads = {num_attention_heads}");
                return Err(invalid("num_key_value_heads", expected, num_key_value_heads));
            }
            let head_dim =
                fields.integer("head_dim", 1, MAX_SIZE)?.unwrap_or(hidden_size / num_attention_heads);
            let head_dim = even("head_dim", head_bound("head_dim", head_dim)?)?;
            Ok(AttentionKind::Gqa { num_key_value_heads, head_dim, bias: false })
        }
    }
}

/// Rope from `rope_parameters`, or from `rope_theta` with `rope_scaling`, which wins when both stand there, as
/// in the reference.
fn rope(fields: &mut Fields, family: Family, max_position_embeddings: usize) -> Result<Rope, ConfigError> {
    let theta_outside = fields.number("rope_theta", "a number above 1", |theta| theta > 1.0)?;
    let interleave = fields.flag("rope_interleave", true)?;
    if let Some(factor) = fields.number("partial_rotary_factor", "a number", |_| true)?
        && factor != 1.0
    {
        return Err(unsupported("partial_rotary_factor", factor.to_string(), "only whole heads are rotated"));
    }
    let mut found = None;
    for prefix in ["rope_parameters", "rope_scaling"] {
        match fields.take(prefix) {
            None => {}
            Some(Value::Object(object)) if object.is_empty() => {}
            Some(Value::Object(object)) => found = Some((prefix, object)),
            Some(value) => return Err(invalid(prefix, "an object or null", show(value))),
        }
    }
    let deepseek = family != Family::Llama;
    let interleaved = match family {
        Family::DeepseekV3 => interleave,
        Family::DeepseekV2 => true,
        Family::Llama => false,
    };
    let Some((prefix, object)) = found else {
        let theta = theta_outside.unwrap_or(10_000.0);
        return Ok(Rope { theta, interleaved, scales_softmax: deepseek, scaling: RopeScaling::None });
    };
    let prefix = if prefix == "rope_scaling" { "rope_scaling." } else { "rope_parameters." };
    let mut inner = Fields::new(object, prefix);
    let theta = inner.number("rope_theta", "a number above 1", |theta| theta > 1.0)?;
    let theta = theta.or(theta_outside).unwrap_or(10_000.0);
    let kind = match inner.text("rope_type")? {
        Some(kind) => kind,
        None => inner.text("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: inner.positive("factor")?.ok_or_else(|| inner.missing("factor", "a positive number"))?,
        },
        "yarn" => yarn(&mut inner, max_position_embeddings)?,
        other => {
            let known = "known kinds are default, linear and yarn";
            return Err(unsupported(&inner.name("rope_type"), format!("\"{other}\""), known));
        }
    };
    if let Some(factor) = inner.number("partial_rotary_factor", "a number", |_| true)?
        && factor != 1.0
    {
        let field = inner.name("partial_rotary_factor");
        return Err(unsupported(&field, factor.to_string(), "only whole heads are rotated"));
    }
    Ok(Rope { theta, interleaved, scales_softmax: deepseek, scaling })
}

fn yarn(inner: &mut Fields, max_position_embeddings: usize) -> Result<RopeScaling, ConfigError> {
    let original = inner.integer("original_max_position_embeddings", 1, 1 << 31)?;
    let original = original.unwrap_or(max_position_embeddings);
    let factor = inner.positive("factor")?;
    let weight = "a number that is not negative";
    let not_negative = |number: f64| number >= 0.0;
    // the reference takes 0 for absent here
    let beta_fast = inner.number("beta_fast", weight, not_negative)?.filter(|beta| *beta != 0.0);
    let beta_slow = inner.number("beta_slow", weight, not_negative)?.filter(|beta| *beta != 0.0);
    Ok(RopeScaling::Yarn {
        factor: factor.unwrap_or(max_position_embeddings as f64 / original as f64),
        original_max_position_embeddings: original,
        beta_fast: beta_fast.unwrap_or(32.0),
        beta_slow: beta_slow.unwrap_or(1.0),
        mscale: inner.number("mscale", weight, not_negative)?,
        mscale_all_dim: inner.number("mscale_all_dim", weight, not_negative)?,
        attention_factor: inner.positive("attention_factor")?,
        truncate: inner.flag("truncate", true)?,
    })
}

fn experts(fields: &mut Fields, family: Family) -> Result<MoeLayers, ConfigError> {
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
    let norm_topk_prob = fields.flag("norm_topk_prob", family == Family::DeepseekV3)?;
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
        routed_scaling_factor: fields.positive("routed_scaling_factor")?.unwrap_or(match family {
            Family::DeepseekV3 => 2.5,
            Family::DeepseekV2 | Family::Llama => 1.0,
        }),
        scoring,
        topk_method,
    };
    if moe.n_shared_experts.checked_mul(moe.moe_intermediate_size).is_none_or(|width| width > MAX_SIZE) {
        let expected = format!("at most {MAX_SIZE} when multiplied by moe_intermediate_size");
        return Err(invalid("n_shared_experts", expected, moe.n_shared_experts));
    }
    let first_k_dense_replace =
        fields.integer("first_k_dense_replace", 0, MAX_LAYERS)?.unwrap_or(match family {
            Family::DeepseekV3 => 3,
            Family::DeepseekV2 | Family::Llama => 0,
        });
    let moe_layer_freq = fields.integer("moe_layer_freq", 1, MAX_LAYERS)?.unwrap_or(1);
    Ok(MoeLayers { first_k_dense_replace, moe_layer_freq, moe })
}

fn routing(fields: &mut Fields, family: Family) -> Result<(Scoring, TopkMethod), ConfigError> {
    let scoring = fields.text("scoring_func")?;
    let method = fields.text("topk_method")?;
    let refuse = |field: &str, got: &str, expected: &str| Err(invalid(field, expected, format!("\"{got}\"")));
    match family {
        Family::DeepseekV3 => match (scoring.unwrap_or("sigmoid"), method.unwrap_or("noaux_tc")) {
            ("sigmoid", "noaux_tc") => Ok((Scoring::Sigmoid, TopkMethod::NoAuxTc)),
            ("sigmoid", other) => refuse("topk_method", other, "\"noaux_tc\" in family deepseek_v3"),
            (other, _) => refuse("scoring_func", other, "\"sigmoid\" in family deepseek_v3"),
        },
        Family::DeepseekV2 | Family::Llama => {
            match (scoring.unwrap_or("softmax"), method.unwrap_or("greedy")) {
                ("softmax", "greedy") => Ok((Scoring::Softmax, TopkMethod::Greedy)),
                ("softmax", "group_limited_greedy") => Ok((Scoring::Softmax, TopkMethod::GroupLimitedGreedy)),
                ("softmax", other) => refuse(
                    "topk_method",
                    other,
                    "\"greedy\" or \"group_limited_greedy\" in family deepseek_v2",
                ),
                (other, _) => refuse("scoring_func", other, "\"softmax\" in family deepseek_v2"),
            }
        }
    }
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

/// Switches that change the model and are not built: silence about them would give wrong numbers.
fn refuse_unbuilt(fields: &mut Fields) -> Result<(), ConfigError> {
    if let Some(activation) = fields.text("hidden_act")?
        && activation != "silu"
    {
        return Err(unsupported("hidden_act", format!("\"{activation}\""), "only \"silu\" is built"));
    }
    if fields.flag("mlp_bias", false)? {
        return Err(unsupported("mlp_bias", "true", "only projections without bias are built"));
    }
    if fields.flag("mtp_hidden_states_first", false)? {
        return Err(unsupported("mtp_hidden_states_first", "true", "the embedding comes first here"));
    }
    Ok(())
}
