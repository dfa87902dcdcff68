//! The config of the one transformer, as `config.json` carries it.
//!
//! Outside, a model is described by the field names of Hugging Face transformers; inside, the model code
//! matches on the typed form below and nothing else. [`Config::from_json`] is the border: everything after it
//! may assume that sizes are positive and bounded, that heads and groups divide, and that no product of sizes
//! overflows. [`Config::to_json`] writes what transformers writes for the same family, and gives back
//! unknown fields untouched.
//!
//! Three families are known. `deepseek_v3` and `deepseek_v2` differ only in values of the typed form (scoring,
//! choice of experts, rope defaults), and `llama` only in the attention and in having no experts: there is one
//! model, not three.

mod read;
mod rope;
#[cfg(test)]
pub(crate) mod tests;
mod write;

use minke_cpu::attention::AttentionShape;
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
    /// DeepSeek-V2 and V2-Lite: MLA, softmax routing.
    DeepseekV2,
    /// Llama: grouped-query attention, dense.
    Llama,
}

impl Family {
    /// All families, in the order in which errors list them.
    pub const ALL: [Self; 3] = [Self::DeepseekV3, Self::DeepseekV2, Self::Llama];
    /// The names of [`Self::ALL`] for messages.
    pub const KNOWN: &'static str = "deepseek_v3, deepseek_v2, llama";

    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::DeepseekV3 => "deepseek_v3",
            Self::DeepseekV2 => "deepseek_v2",
            Self::Llama => "llama",
        }
    }

    /// The class name that transformers expects in `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::DeepseekV3 => "DeepseekV3ForCausalLM",
            Self::DeepseekV2 => "DeepseekV2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
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
        /// Biases on the projections. Always false today: a config that asks for them is refused.
        bias: bool,
    },
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
    /// Of the rest, every layer whose index this divides has experts.
    pub moe_layer_freq: usize,
    /// The experts.
    pub moe: MoeConfig,
}

/// The FFN of one layer.
#[derive(Debug, Clone, PartialEq)]
pub enum FfnKind {
    /// `SwiGLU` of one hidden width.
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

    /// Heads, widths and the factor of scores of the expanded attention.
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
        }
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
        self.rope.softmax_scale(self.qk_head_dim())
    }
}

impl MoeLayers {
    /// Whether layer `layer` (MTP modules count on behind the trunk) has experts.
    pub fn has_experts(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq)
    }
}
