//! The config of the one transformer, as `config.json` carries it.
//!
//! Outside, a model is described by the field names of Hugging Face transformers; inside, the model code
//! matches on the typed form below and nothing else. [`Config::from_json`] is the border: everything after it
//! may assume that sizes are positive and bounded, that heads and groups divide, and that no product of sizes
//! overflows. [`Config::to_json`] writes what transformers writes for the same family, and gives back
//! unknown fields untouched.
//!
//! The families differ in values of the typed form and in nothing else: there is one model. `deepseek_v3` (and
//! `kimi_k2`, which is one) and `deepseek_v2` differ in scoring, choice of experts and rope defaults; `llama`,
//! `mistral`, `qwen2`, `qwen3` and `qwen3_moe` in biases, norms of heads, windows and experts; `gemma2` and
//! `gemma3_text` also in norms, gates, caps and a second rope. What a file leaves out is what transformers has for the
//! family.

mod read;
mod rope;
#[cfg(test)]
pub(crate) mod tests;
mod write;

use minke_cpu::attention::AttentionShape;
pub use minke_cpu::swiglu::Gate;
pub use rope::{Rope, RopeScaling};
use serde_json::{Map, Value};

/// Largest accepted single size (width, vocabulary, heads...).
pub const MAX_SIZE: usize = 1 << 24;
/// Largest accepted number of layers.
pub const MAX_LAYERS: usize = 1024;
/// Largest accepted number of experts over all layers, so that a table of tensors stays small.
pub const MAX_EXPERTS: usize = 1 << 18;
/// Largest accepted number of parameters.
pub const MAX_PARAMETERS: u128 = 1 << 48;
/// Epsilon of the norms on the query and KV latents: the reference leaves them at its default, whatever
/// `rms_norm_eps` says.
pub const LATENT_NORM_EPS: f64 = 1e-6;

/// What a `config.json` may say wrongly.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// The document is not a JSON object.
    #[error("config: expected a JSON object, got {got}")]
    NotAnObject {
        /// The JSON type found.
        got: &'static str,
    },
    /// `model_type` names a family that this program does not know.
    #[error("config field `model_type`: unknown family \"{found}\"; known families: {known}")]
    UnknownFamily {
        /// The name found.
        found: String,
        /// The names known, comma-separated.
        known: &'static str,
    },
    /// A required field is absent.
    #[error("config field `{field}`: missing, expected {expected}")]
    Missing {
        /// The field's name, dotted when nested.
        field: String,
        /// What should stand there.
        expected: String,
    },
    /// A field has the wrong type, is out of bounds, or contradicts another.
    #[error("config field `{field}`: expected {expected}, got {got}")]
    Invalid {
        /// The field's name, dotted when nested.
        field: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        got: String,
    },
    /// A field asks for something that exists but is not built here.
    #[error("config field `{field}`: {got} is not supported yet; {hint}")]
    Unsupported {
        /// The field's name, dotted when nested.
        field: String,
        /// What stands there.
        got: String,
        /// What can be used instead.
        hint: String,
    },
}

impl ConfigError {
    /// The field that the error is about, dotted when nested; empty when it is about the whole document.
    pub fn field(&self) -> &str {
        match self {
            Self::NotAnObject { .. } => "",
            Self::UnknownFamily { .. } => "model_type",
            Self::Missing { field, .. } | Self::Invalid { field, .. } | Self::Unsupported { field, .. } => {
                field
            }
        }
    }
}

/// The family names that `model_type` may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// DeepSeek-V3 and R1: MLA, sigmoid routing with a correction bias, MTP.
    DeepseekV3,
    /// Kimi-K2: DeepSeek-V3 under another name.
    KimiK2,
    /// DeepSeek-V2 and V2-Lite: MLA, softmax routing.
    DeepseekV2,
    /// Llama: grouped-query attention, dense.
    Llama,
    /// Mistral: Llama with a window on all layers, or none.
    Mistral,
    /// Qwen2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: norms on the heads of queries and keys.
    Qwen3,
    /// Qwen3 with experts: softmax routing, none shared.
    Qwen3Moe,
    /// Gemma 2: norms before and after blocks, windows on every other layer, soft caps.
    Gemma2,
    /// Gemma 3, its text model: norms of heads, two ropes, no caps.
    Gemma3Text,
}

impl Family {
    /// All families, in the order in which errors list them.
    pub const ALL: [Self; 10] = [
        Self::DeepseekV3,
        Self::KimiK2,
        Self::DeepseekV2,
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen3Moe,
        Self::Gemma2,
        Self::Gemma3Text,
    ];
    /// The names of [`Self::ALL`] for messages.
    pub const KNOWN: &'static str =
        "deepseek_v3, kimi_k2, deepseek_v2, llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3_text";

    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::DeepseekV3 => "deepseek_v3",
            Self::KimiK2 => "kimi_k2",
            Self::DeepseekV2 => "deepseek_v2",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Gemma2 => "gemma2",
            Self::Gemma3Text => "gemma3_text",
        }
    }

    /// The class name that transformers expects in `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::DeepseekV3 | Self::KimiK2 => "DeepseekV3ForCausalLM",
            Self::DeepseekV2 => "DeepseekV2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
            Self::Gemma2 => "Gemma2ForCausalLM",
            Self::Gemma3Text => "Gemma3ForCausalLM",
        }
    }

    /// Whether it is DeepSeek-V3 by this or another name.
    pub fn is_v3(self) -> bool {
        matches!(self, Self::DeepseekV3 | Self::KimiK2)
    }

    /// Whether attention is latent.
    pub fn is_latent(self) -> bool {
        self.is_v3() || self == Self::DeepseekV2
    }

    /// Whether norms stand before and after blocks, as distances from one, and the embedding is scaled.
    pub fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3Text)
    }

    /// The family of a `model_type`, if known.
    pub fn from_model_type(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.model_type() == name)
    }
}

/// How queries, keys and values are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttentionKind {
    /// Multi-head latent attention: keys and values from a latent of width c, position in separate widths.
    Mla {
        /// Width q of the query latent; `None` projects queries directly.
        q_lora_rank: Option<usize>,
        /// Width c of the KV latent.
        kv_lora_rank: usize,
        /// Width p of a query or key head without position.
        qk_nope_head_dim: usize,
        /// Width r of a query or key head with position (even).
        qk_rope_head_dim: usize,
        /// Width v of a value head.
        v_head_dim: usize,
    },
    /// Grouped-query attention; multi-head attention when the two head counts are equal.
    Gqa {
        /// Key and value heads; divides the query heads.
        num_key_value_heads: usize,
        /// Width of a head (even), all of it rotated.
        head_dim: usize,
        /// Biases on the projections.
        bias: ProjectionBias,
        /// Whether each head of queries and keys goes through a norm, before it is rotated.
        qk_norm: bool,
    },
}

/// Which projections of an attention have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProjectionBias {
    /// None.
    None,
    /// Those of queries, keys and values.
    QueryKeyValue,
    /// Those, and that of the output.
    All,
}

/// Layers that see only the positions right before each.
#[derive(Debug, Clone, PartialEq)]
pub struct Sliding {
    /// Positions that a row sees, its own included.
    pub window: usize,
    /// Of each layer, whether it is one of them.
    pub layers: Vec<bool>,
    /// Their rope, where it is another than that of the rest.
    pub rope: Option<Rope>,
}

/// How router logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Each expert by itself (V3).
    Sigmoid,
    /// Over all experts (V2).
    Softmax,
}

/// How experts are chosen from scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopkMethod {
    /// Scores plus a correction bias; groups ranked by the sum of their best two (V3).
    NoAuxTc,
    /// The best k of all experts (V2-Lite).
    Greedy,
    /// The best k within the groups ranked by their best expert (V2).
    GroupLimitedGreedy,
}

/// A mixture-of-experts FFN.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// Routed experts e.
    pub n_routed_experts: usize,
    /// Experts per token k.
    pub num_experts_per_tok: usize,
    /// Hidden width f of one expert.
    pub moe_intermediate_size: usize,
    /// Shared experts, fused into one FFN of `n_shared_experts * moe_intermediate_size`; 0 for none.
    pub n_shared_experts: usize,
    /// Expert groups g.
    pub n_group: usize,
    /// Groups that a token may use.
    pub topk_group: usize,
    /// Whether the chosen weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// Multiplier of the chosen weights.
    pub routed_scaling_factor: f64,
    /// Scores from logits.
    pub scoring: Scoring,
    /// Choice from scores.
    pub topk_method: TopkMethod,
}

/// Which layers have experts, and what they are.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeLayers {
    /// The first layers are dense.
    pub first_k_dense_replace: usize,
    /// Of the rest, every layer whose index, plus `phase`, this divides has experts.
    pub moe_layer_freq: usize,
    /// 0 where layers are counted from 0, 1 where they are counted from 1.
    pub phase: usize,
    /// Layers that are dense all the same.
    pub dense_layers: Vec<usize>,
    /// The experts.
    pub moe: MoeConfig,
}

/// The FFN of one layer.
#[derive(Debug, Clone, PartialEq)]
pub enum FfnKind {
    /// A gated unit of one hidden width.
    Dense {
        /// Hidden width f.
        intermediate_size: usize,
    },
    /// Routed and shared experts.
    Moe(MoeConfig),
}

/// Linear weights in E4M3 with a scale for each square of 128 by 128, as DeepSeek publishes them; activations are
/// quantised as they come, or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    /// Whether scales are powers of two (`scale_fmt` "ue8m0").
    pub power_of_two: bool,
}

/// The typed config of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which `model_type` it is read from and written as.
    pub family: Family,
    /// Vocabulary w.
    pub vocab_size: usize,
    /// Width d of the residual stream.
    pub hidden_size: usize,
    /// Hidden width f of dense layers.
    pub intermediate_size: usize,
    /// Layers l of the trunk, without MTP modules.
    pub num_hidden_layers: usize,
    /// Query heads h.
    pub num_attention_heads: usize,
    /// The attention.
    pub attention: AttentionKind,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Layers with a window.
    pub sliding: Option<Sliding>,
    /// The scores' multiplier is this to the power -1/2; the width of a head where absent.
    pub query_pre_attn_scalar: Option<f64>,
    /// Soft cap of attention scores.
    pub attn_logit_softcapping: Option<f64>,
    /// Soft cap of the logits.
    pub final_logit_softcapping: Option<f64>,
    /// The activation of feed-forward gates.
    pub gate: Gate,
    /// Biases on the projections of dense feed-forward layers.
    pub mlp_bias: bool,
    /// Whether the output of a block goes through a norm before it is added.
    pub post_norms: bool,
    /// Whether norms are stored as distances from one.
    pub norm_offset: bool,
    /// Whether embeddings are multiplied by the root of their width.
    pub scales_embedding: bool,
    /// Experts, if the family has them.
    pub moe_layers: Option<MoeLayers>,
    /// Multi-token-prediction modules behind the trunk.
    pub num_nextn_predict_layers: usize,
    /// Longest sequence that the positions are meant for.
    pub max_position_embeddings: usize,
    /// Epsilon of the layer norms and the final norm (the latent norms use [`LATENT_NORM_EPS`]).
    pub rms_norm_eps: f64,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Token that begins a document.
    pub bos_token_id: Option<u32>,
    /// Tokens that end one; the file may hold one number or a list.
    pub eos_token_id: Vec<u32>,
    /// Token that pads.
    pub pad_token_id: Option<u32>,
    /// Type that the weights are stored in, as torch names it.
    pub dtype: Option<String>,
    /// How a folder stores its linear weights, if in FP8. A model in memory has none: its weights are numbers.
    pub quantization: Option<Quantization>,
    /// Fields that this program does not know, written back as they came.
    pub extra: Map<String, Value>,
}

impl Config {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// Every wrong field gives a [`ConfigError`] with its name, what was expected and what was found.
    pub fn from_json(value: &Value) -> Result<Self, ConfigError> {
        read::config(value)
    }

    /// The `config.json` of this config, as transformers writes it, readable by its versions 4 and 5 (rope
    /// settings stand there both as `rope_parameters` and as `rope_theta` with `rope_scaling`).
    pub fn to_json(&self) -> Value {
        write::config(self)
    }

    /// The FFN of layer `layer`, counted through the trunk into the MTP modules (module k is layer
    /// `num_hidden_layers + k`).
    pub fn ffn(&self, layer: usize) -> FfnKind {
        match &self.moe_layers {
            Some(layers) if layers.has_experts(layer) => FfnKind::Moe(layers.moe.clone()),
            Some(_) | None => FfnKind::Dense { intermediate_size: self.intermediate_size },
        }
    }

    /// Width of a whole query or key head: p + r, or the head width.
    pub fn qk_head_dim(&self) -> usize {
        match self.attention {
            AttentionKind::Mla { qk_nope_head_dim, qk_rope_head_dim, .. } => {
                qk_nope_head_dim + qk_rope_head_dim
            }
            AttentionKind::Gqa { head_dim, .. } => head_dim,
        }
    }

    /// Width v of a value head.
    pub fn v_head_dim(&self) -> usize {
        match self.attention {
            AttentionKind::Mla { v_head_dim, .. } => v_head_dim,
            AttentionKind::Gqa { head_dim, .. } => head_dim,
        }
    }

    /// Heads, widths, the factor of scores and their cap in the expanded attention; no window.
    pub fn attention_shape(&self) -> AttentionShape {
        let heads = self.num_attention_heads;
        AttentionShape {
            heads,
            kv_heads: match self.attention {
                AttentionKind::Mla { .. } => heads,
                AttentionKind::Gqa { num_key_value_heads, .. } => num_key_value_heads,
            },
            qk_dim: self.qk_head_dim(),
            v_dim: self.v_head_dim(),
            scale: self.softmax_scale(),
            window: None,
            softcap: self.attn_logit_softcapping.map(|cap| cap as f32),
        }
    }

    /// The window of layer `layer` (MTP modules count on behind the trunk and have none).
    pub fn window(&self, layer: usize) -> Option<usize> {
        let sliding = self.sliding.as_ref()?;
        sliding.layers.get(layer).is_some_and(|slides| *slides).then_some(sliding.window)
    }

    /// Width of the part of a head that is rotated.
    pub fn rotary_dim(&self) -> usize {
        match self.attention {
            AttentionKind::Mla { qk_rope_head_dim, .. } => qk_rope_head_dim,
            AttentionKind::Gqa { head_dim, .. } => head_dim,
        }
    }

    /// The rotary frequencies of this model, `rotary_dim / 2` of them.
    pub fn inv_freq(&self) -> Vec<f32> {
        self.rope.inv_freq(self.rotary_dim())
    }

    /// The multiplier of attention scores.
    pub fn softmax_scale(&self) -> f32 {
        match self.query_pre_attn_scalar {
            Some(scalar) => scalar.powf(-0.5) as f32,
            None => self.rope.softmax_scale(self.qk_head_dim()),
        }
    }
}

impl MoeLayers {
    /// Whether layer `layer` (MTP modules count on behind the trunk) has experts.
    pub fn has_experts(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace
            && (layer + self.phase).is_multiple_of(self.moe_layer_freq)
            && !self.dense_layers.contains(&layer)
    }
}
