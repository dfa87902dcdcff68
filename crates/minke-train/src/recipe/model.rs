//! `[model]`: one dial, `depth`, and every field of the config by its Hugging Face name.
//!
//! What the recipe does not say is derived, from what it says where it says something. With D the depth:
//!
//! | field | formula | D = 6 |
//! |---|---|---|
//! | `num_hidden_layers` | D | 6 |
//! | `hidden_size` d | 32 D, rounded up to whole heads | 192 |
//! | `v_head_dim`, `qk_nope_head_dim`, `head_dim` | 32 below depth 16, else 64 | 32 |
//! | `qk_rope_head_dim` | half of that | 16 |
//! | `num_attention_heads` | d / `v_head_dim` | 6 |
//! | `kv_lora_rank` | d / 3, rounded to 16 | 64 |
//! | `q_lora_rank` | none below depth 16, else d / 3, rounded to 16 | none |
//! | `intermediate_size` | 8 d / 3, rounded up to 32 | 512 |
//! | `moe_intermediate_size` | d / 2, rounded up to 16 | 96 |
//! | `n_routed_experts` | 16 below depth 8, 32 below 16, else 64 | 16 |
//! | `num_experts_per_tok`, `n_shared_experts`, `first_k_dense_replace` | 4, 1, 1 | |
//! | `num_experts` of `qwen3_moe` | as `n_routed_experts` | |
//! | `query_pre_attn_scalar` of Gemma | `head_dim` | |
//! | `num_key_value_heads` | `num_attention_heads` | |
//! | `n_group`, `topk_group`, `routed_scaling_factor` | 1, 1, 1.0 | |
//! | `num_nextn_predict_layers` | 1 in `deepseek_v3` | 1 |
//!
//! The learning rates and the token budget follow from the model: `lr = 0.003 sqrt(192 / d)`,
//! `muon_lr = 0.005`, and twenty tokens for each active parameter outside the embedding.

use std::collections::BTreeMap;

use minke_model::config::{Config, ConfigError, Family};
use minke_model::spec;
use serde_json::{Map, Value, json};

use super::error::{Frame, RecipeError};
use super::reader::Section;
use super::tree::{Kind, Node};

/// `[model]` as given: what a model shall be, but for its vocabulary and the length of its sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct GivenModel {
    /// The architecture.
    pub family: Family,
    /// The dial.
    pub depth: usize,
    /// Given fields, by Hugging Face name, not yet checked.
    pub(super) fields: Map<String, Value>,
    /// What the section is called.
    section: String,
    /// Where the fields, the dial and (without a name) the section stand.
    frames: BTreeMap<String, Box<Frame>>,
}

/// Fields of every family.
const COMMON: [&str; 17] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "hidden_act",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
];

/// Further fields of the `DeepSeek` families.
const DEEPSEEK: [&str; 18] = [
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "first_k_dense_replace",
    "moe_layer_freq",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
    "num_nextn_predict_layers",
];

/// The fields that `[model]` may give in a family, in the order in which the resolved recipe shows them.
pub(super) fn fields(family: Family) -> Vec<&'static str> {
    let own: &[&str] = match family {
        Family::DeepseekV3 | Family::KimiK2 => &["rope_interleave"],
        Family::DeepseekV2 => &["mlp_bias"],
        Family::Llama => &["head_dim", "mlp_bias"],
        Family::Mistral => &["head_dim", "sliding_window"],
        Family::Qwen2 | Family::Qwen3 => &["head_dim", "use_sliding_window", "sliding_window", "layer_types"],
        Family::Qwen3Moe => &[
            "head_dim",
            "use_sliding_window",
            "sliding_window",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
            "decoder_sparse_step",
            "mlp_only_layers",
        ],
        Family::Gemma2 | Family::Gemma3Text => &[
            "hidden_activation",
            "head_dim",
            "sliding_window",
            "layer_types",
            "query_pre_attn_scalar",
            "final_logit_softcapping",
            "attn_logit_softcapping",
        ],
    };
    let local: &[&str] = if family == Family::Gemma3Text { &["rope_local_base_freq"] } else { &[] };
    let deepseek: &[&str] = if family.is_latent() { &DEEPSEEK } else { &[] };
    let mut all = [&COMMON, deepseek, own, local].concat();
    all.retain(|field| *field != "hidden_act" || !family.is_gemma());
    all
}

/// Reads `[model]`, or a section like it.
///
/// # Errors
/// Unknown keys and families, and a depth out of bounds; the fields are checked by [`GivenModel::config`].
pub fn model(mut section: Section) -> Result<GivenModel, RecipeError> {
    let families = Family::ALL.map(|family| (family.model_type(), family));
    let family = section.choice("family", &families)?.unwrap_or(Family::DeepseekV3);
    let depth = section.integer("depth", 1, 128)?.unwrap_or(6) as usize;
    let mut given = Map::new();
    for field in fields(family) {
        if let Some(node) = section.take(field) {
            // TOML has no null: a rank of zero says that queries are projected directly
            let none = field == "q_lora_rank" && matches!(node.kind, Kind::Integer(0));
            given.insert(field.to_owned(), if none { Value::Null } else { json_value(node) });
        }
    }
    let places = given.keys().map(String::as_str).chain(["depth", ""]);
    let frames = places.filter_map(|key| Some((key.to_owned(), section.frame(key)?))).collect();
    let path = section.name().to_owned();
    section.finish()?;
    Ok(GivenModel { family, depth, fields: given, section: path, frames })
}

impl GivenModel {
    /// The whole config for `vocab_size` tokens, where the section does not say them, in sequences of
    /// `sequence_length`.
    ///
    /// # Errors
    /// An impossible model, reported at the key that says so or at the one that it was derived from.
    pub fn config(&self, vocab_size: usize, sequence_length: usize) -> Result<Config, RecipeError> {
        config(self, vocab_size, sequence_length).map_err(|source| self.impossible(source))
    }

    /// A field as given, by its Hugging Face name.
    pub fn given(&self, field: &str) -> Option<&Value> {
        self.fields.get(field)
    }

    /// The section with every field said, for a config that [`GivenModel::config`] gave; reading it gives the same.
    pub fn table(&self, config: &Config) -> toml::Table {
        let json = config.to_json();
        let mut table = toml::Table::new();
        table.insert("family".to_owned(), self.family.model_type().into());
        table.insert("depth".to_owned(), toml::Value::Integer(self.depth as i64));
        for field in fields(self.family) {
            match toml_value(&json[field]) {
                Some(value) => table.insert(field.to_owned(), value),
                None if field == "q_lora_rank" => table.insert(field.to_owned(), toml::Value::Integer(0)),
                None => None,
            };
        }
        table
    }

    /// Points a config's error at the key that gave the field, or at what it was derived from.
    fn impossible(&self, source: ConfigError) -> RecipeError {
        let field = source.field().split('.').next().unwrap_or_default().to_owned();
        let own = self.frames.get(&field);
        let hint = match own {
            Some(_) => String::new(),
            None => format!(
                "`{field}` was derived, from {section}.depth = {} where nothing else is given; it can be given in [{section}]",
                self.depth,
                section = self.section
            ),
        };
        let derived_from = || ["hidden_size", "depth", ""].iter().find_map(|key| self.frames.get(*key));
        let frame = own.or_else(derived_from).cloned();
        RecipeError::Model { source, frame, hint }
    }
}

/// A JSON value of the config; null has no TOML.
fn toml_value(value: &Value) -> Option<toml::Value> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(flag) => toml::Value::Boolean(*flag),
        Value::Number(number) => match number.as_i64() {
            Some(integer) => toml::Value::Integer(integer),
            None => toml::Value::Float(number.as_f64()?),
        },
        Value::String(text) => toml::Value::String(text.clone()),
        Value::Array(values) => toml::Value::Array(values.iter().filter_map(toml_value).collect()),
        Value::Object(object) => toml::Value::Table(
            object.iter().filter_map(|(key, value)| Some((key.clone(), toml_value(value)?))).collect(),
        ),
    })
}

fn json_value(node: &Node) -> Value {
    match &node.kind {
        Kind::Boolean(flag) => json!(flag),
        Kind::Integer(number) => match i64::try_from(*number) {
            Ok(number) => json!(number),
            Err(_) => json!(number.to_string()),
        },
        // infinities and NaN have no JSON; as strings they are refused with the text that was written
        Kind::Float(number) if !number.is_finite() => json!(number.to_string()),
        Kind::Float(number) => json!(number),
        Kind::Text(text) => json!(text),
        Kind::Datetime => json!("a date"),
        Kind::Array(nodes) => nodes.iter().map(json_value).collect(),
        Kind::Table(entries) => {
            Value::Object(entries.iter().map(|entry| (entry.key.clone(), json_value(&entry.node))).collect())
        }
    }
}

/// Derives what is not given and checks the whole.
fn config(given: &GivenModel, vocab_size: usize, sequence_length: usize) -> Result<Config, ConfigError> {
    let depth = given.depth;
    let mut object = given.fields.clone();
    object.insert("model_type".to_owned(), json!(given.family.model_type()));
    object.insert("dtype".to_owned(), json!("float32"));
    let mut derive = |field: &str, value: Value| {
        object.entry(field).or_insert_with(|| value);
    };
    // a given size of the wrong type derives nothing: the check below reports it
    let size = |field: &str, default: usize| {
        let value = given.fields.get(field).and_then(Value::as_u64);
        value.map_or(default, |value| value.clamp(1, 1 << 24) as usize)
    };
    let width = if depth < 16 { 32 } else { 64 };
    let d = size("hidden_size", (32 * depth).next_multiple_of(width));
    let experts = if depth < 8 { 16 } else { 32 << usize::from(depth >= 16) };
    let thirds = (d / 3).next_multiple_of(16).max(16);
    derive("vocab_size", json!(vocab_size));
    derive("hidden_size", json!(d));
    derive("num_hidden_layers", json!(depth));
    derive("max_position_embeddings", json!(sequence_length));
    derive("intermediate_size", json!((8 * d / 3).next_multiple_of(32)));
    match given.family {
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Qwen3Moe
        | Family::Gemma2
        | Family::Gemma3Text => {
            let width = size("head_dim", width);
            let heads = size("num_attention_heads", (d / width).max(1));
            let width = size("head_dim", (d / heads).max(1));
            derive("num_attention_heads", json!(heads));
            derive("num_key_value_heads", json!(heads));
            derive("head_dim", json!(width));
            match given.family {
                Family::Mistral => derive("sliding_window", Value::Null),
                Family::Qwen3Moe => {
                    derive("moe_intermediate_size", json!((d / 2).next_multiple_of(16)));
                    derive("num_experts", json!(experts));
                    derive("num_experts_per_tok", json!(4));
                    derive("norm_topk_prob", json!(true));
                }
                Family::Gemma2 | Family::Gemma3Text => derive("query_pre_attn_scalar", json!(width)),
                _ => {}
            }
        }
        Family::DeepseekV3 | Family::KimiK2 | Family::DeepseekV2 => {
            let width = size("v_head_dim", width);
            derive("v_head_dim", json!(width));
            derive("qk_nope_head_dim", json!(width));
            derive("qk_rope_head_dim", json!((width / 2).max(2)));
            derive("num_attention_heads", json!((d / width).max(1)));
            derive("kv_lora_rank", json!(thirds));
            derive("q_lora_rank", if depth < 16 { Value::Null } else { json!(thirds) });
            derive("moe_intermediate_size", json!((d / 2).next_multiple_of(16)));
            derive("n_routed_experts", json!(experts));
            derive("num_experts_per_tok", json!(4));
            derive("n_shared_experts", json!(1));
            derive("first_k_dense_replace", json!(1));
            derive("n_group", json!(1));
            derive("topk_group", json!(1));
            derive("routed_scaling_factor", json!(1.0));
            if given.family.is_v3() {
                derive("num_nextn_predict_layers", json!(1));
            }
        }
    }
    Config::from_json(&Value::Object(object))
}

/// Peak rate of `AdamW`.
pub(super) fn lr(config: &Config) -> f64 {
    0.003 * (192.0 / config.hidden_size as f64).sqrt()
}

/// Peak rate of Muon, whose updates have one size whatever the width. On a depth of 4 and 400,000 tokens of source code
/// 0.003 to 0.007 are within a hundredth of a bit per byte of each other; 0.02 is worse by six.
pub(super) const MUON_LR: f64 = 0.005;

/// Token budget.
pub(super) fn tokens(config: &Config) -> u64 {
    let counts = spec::parameters(config);
    20 * (counts.active - counts.embedding)
}
