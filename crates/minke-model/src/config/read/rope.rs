//! The ropes of a config, from newer files (`rope_parameters`) and older ones (`rope_theta`, `rope_scaling`).

use serde_json::{Map, Value};

use super::attention::is_nested;
use super::fields::{Fields, invalid, show, unsupported};
use crate::config::{ConfigError, Family, Rope, RopeScaling};

/// What a rope is where its object does not say it.
#[derive(Clone, Copy)]
struct Outside {
    family: Family,
    theta: f64,
    interleaved: bool,
    max_position_embeddings: usize,
}

impl Outside {
    fn plain(self) -> Rope {
        let Self { family, theta, interleaved, .. } = self;
        Rope { theta, interleaved, scales_softmax: family.is_latent(), scaling: RopeScaling::None }
    }
}

/// The rope of the model, and that of its sliding layers where it is another.
///
/// From `rope_parameters`, or from `rope_theta` with `rope_scaling`, which wins when both stand there, as in the
/// reference.
pub(super) fn ropes(
    fields: &mut Fields,
    family: Family,
    max_position_embeddings: usize,
) -> Result<(Rope, Option<Rope>), ConfigError> {
    let theta_outside = theta(fields, "rope_theta")?;
    let interleave = fields.flag("rope_interleave", true)?;
    whole_heads(fields)?;
    let mut found = [None, None];
    for (found, field) in found.iter_mut().zip(["rope_parameters", "rope_scaling"]) {
        *found = match fields.take(field) {
            None => None,
            Some(Value::Object(object)) if object.is_empty() => None,
            Some(Value::Object(object)) => Some(object),
            Some(value) => return Err(invalid(field, "an object or null", show(value))),
        };
    }
    let interleaved = match family {
        Family::DeepseekV3 | Family::KimiK2 => interleave,
        Family::DeepseekV2 => true,
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Qwen3Moe
        | Family::Gemma2
        | Family::Gemma3Text => false,
    };
    let theta_outside = theta_outside.unwrap_or(10_000.0);
    let outside = Outside { family, theta: theta_outside, interleaved, max_position_embeddings };
    let [parameters, scaling] = found;
    if family == Family::Gemma3Text {
        return two_ropes(fields, outside, parameters, scaling);
    }
    let (object, prefix) = match (parameters, scaling) {
        (_, Some(object)) => (object, "rope_scaling."),
        (Some(object), None) => (object, "rope_parameters."),
        (None, None) => return Ok((outside.plain(), None)),
    };
    if is_nested(object) {
        let hint = format!("family {} has one rope for all layers", family.model_type());
        return Err(unsupported(prefix.trim_end_matches('.'), "a rope by kind of layer", hint));
    }
    Ok((rope(object, prefix, outside)?, None))
}

/// Gemma 3: one for full attention, which alone is ever scaled, and one for the layers that slide.
fn two_ropes(
    fields: &mut Fields,
    outside: Outside,
    parameters: Option<&Map<String, Value>>,
    scaling: Option<&Map<String, Value>>,
) -> Result<(Rope, Option<Rope>), ConfigError> {
    let given = fields.object.get("rope_theta").is_some_and(|theta| !theta.is_null());
    let full = Outside { theta: if given { outside.theta } else { 1_000_000.0 }, ..outside };
    let sliding = Outside { theta: theta(fields, "rope_local_base_freq")?.unwrap_or(10_000.0), ..outside };
    let of = |key: &str, prefix, outside: Outside| match parameters.and_then(|object| object.get(key)) {
        None | Some(Value::Null) => Ok(outside.plain()),
        Some(Value::Object(object)) => rope(object, prefix, outside),
        Some(value) => Err(invalid(&format!("rope_parameters.{key}"), "an object or null", show(value))),
    };
    if let Some(object) = parameters
        && !is_nested(object)
    {
        let expected = "ropes named full_attention and sliding_attention";
        return Err(invalid("rope_parameters", expected, show(&Value::Object(object.clone()))));
    }
    let mut of_full = of("full_attention", "rope_parameters.full_attention.", full)?;
    if let Some(object) = scaling {
        of_full = rope(object, "rope_scaling.", Outside { theta: of_full.theta, ..full })?;
    }
    Ok((of_full, Some(of("sliding_attention", "rope_parameters.sliding_attention.", sliding)?)))
}

fn theta(fields: &mut Fields, field: &'static str) -> Result<Option<f64>, ConfigError> {
    fields.number(field, "a number above 1", |theta| theta > 1.0)
}

fn whole_heads(fields: &mut Fields) -> Result<(), ConfigError> {
    match fields.number("partial_rotary_factor", "a number", |_| true)? {
        Some(factor) if factor != 1.0 => {
            let field = fields.name("partial_rotary_factor");
            Err(unsupported(&field, factor.to_string(), "only whole heads are rotated"))
        }
        _ => Ok(()),
    }
}

fn rope(object: &Map<String, Value>, prefix: &'static str, outside: Outside) -> Result<Rope, ConfigError> {
    let mut inner = Fields::new(object, prefix);
    let theta = theta(&mut inner, "rope_theta")?.unwrap_or(outside.theta);
    let kind = match inner.text("rope_type")? {
        Some(kind) => kind,
        None => inner.text("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: required(&mut inner, "factor")? },
        "llama3" => llama3(&mut inner, outside.max_position_embeddings)?,
        "yarn" => yarn(&mut inner, outside.max_position_embeddings)?,
        "dynamic" | "longrope" | "su" => {
            let hint = "its frequencies change with the length of what is read, so a token would depend on \
                        what comes after it; known kinds are default, linear, llama3 and yarn";
            return Err(unsupported(&inner.name("rope_type"), format!("\"{kind}\""), hint));
        }
        other => {
            let known = "known kinds are default, linear, llama3 and yarn";
            return Err(unsupported(&inner.name("rope_type"), format!("\"{other}\""), known));
        }
    };
    whole_heads(&mut inner)?;
    Ok(Rope { theta, scaling, ..outside.plain() })
}

/// A factor of frequencies: none makes them infinite or zero.
fn factor(inner: &mut Fields, field: &'static str) -> Result<Option<f64>, ConfigError> {
    inner.number(field, FACTOR, |factor| (1e-3..=1e6).contains(&factor))
}

const FACTOR: &str = "a number from 0.001 to 1000000";

fn required(inner: &mut Fields, field: &'static str) -> Result<f64, ConfigError> {
    factor(inner, field)?.ok_or_else(|| inner.missing(field, FACTOR))
}

fn llama3(inner: &mut Fields, max_position_embeddings: usize) -> Result<RopeScaling, ConfigError> {
    let [factor, low_freq_factor, high_freq_factor] = [
        required(inner, "factor")?,
        required(inner, "low_freq_factor")?,
        required(inner, "high_freq_factor")?,
    ];
    if high_freq_factor as f32 <= low_freq_factor as f32 {
        let expected = format!("more than low_freq_factor = {low_freq_factor}");
        return Err(invalid(&inner.name("high_freq_factor"), expected, high_freq_factor));
    }
    let original = inner.integer("original_max_position_embeddings", 1, 1 << 31)?;
    let original_max_position_embeddings = original.unwrap_or(max_position_embeddings);
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings })
}

fn yarn(inner: &mut Fields, max_position_embeddings: usize) -> Result<RopeScaling, ConfigError> {
    let original = inner.integer("original_max_position_embeddings", 1, 1 << 31)?;
    let original = original.unwrap_or(max_position_embeddings);
    let factor = factor(inner, "factor")?;
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
