//! The one table of tensors in GGUF: for each published name, where it is in a file.

use minke_model::Config;
use minke_model::spec::TensorSpec;

/// The architectures that are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Llama and Mistral.
    Llama,
    /// Qwen2 and 2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
    /// Qwen3 with experts.
    Qwen3Moe,
    /// Gemma 2.
    Gemma2,
    /// Gemma 3, its text model.
    Gemma3,
    /// DeepSeek-V2, V3, R1 and Kimi-K2.
    Deepseek2,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Qwen3Moe, Self::Gemma2, Self::Gemma3, Self::Deepseek2];

    /// The value of `general.architecture`, and the first part of its keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Deepseek2 => "deepseek2",
        }
    }

    /// The architecture of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|arch| arch.name() == name)
    }

    /// The architecture that models of a family are written as.
    pub fn of(config: &Config) -> Option<Self> {
        Some(match config.family.model_type() {
            "llama" | "mistral" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "qwen3_moe" => Self::Qwen3Moe,
            "gemma2" => Self::Gemma2,
            "gemma3_text" => Self::Gemma3,
            "deepseek_v3" | "kimi_k2" | "deepseek_v2" => Self::Deepseek2,
            _ => return None,
        })
    }

    /// Whether pairs of a head that are rotated together are neighbours in a file, and not in a folder.
    pub fn permutes(self) -> bool {
        self == Self::Llama
    }

    /// Whether norms are stored as distances from one in a folder, and not in a file.
    pub fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }
}

/// Where a published tensor is in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// It is a tensor of its own.
    Whole(String),
    /// It is one of a stack, the expert's of its index.
    Expert {
        /// The stack.
        stack: String,
        /// Which matrix of it.
        expert: usize,
        /// The stack that older and fused files have instead, and whether the second half of its rows is meant.
        fused: Option<(String, bool)>,
    },
    /// Keys and values from the latent: a tensor of its own in older files, else two.
    KeyValue {
        /// `kv_b_proj` as it is.
        whole: String,
        /// Keys, [heads, c, p].
        keys: String,
        /// Values, [heads, v, c].
        values: String,
    },
}

/// How many experts a file stacks, and how heads are permuted, are the business of whoever reads; this is where.
pub fn place(arch: Arch, spec: &TensorSpec) -> Option<Place> {
    let whole = |name: &str| Some(Place::Whole(name.to_owned()));
    match spec.name.as_str() {
        "model.embed_tokens.weight" => return whole("token_embd.weight"),
        "model.norm.weight" => return whole("output_norm.weight"),
        "lm_head.weight" => return whole("output.weight"),
        _ => {}
    }
    let (layer, name) = spec.name.strip_prefix("model.layers.")?.split_once('.')?;
    let in_layer = |name: &str| format!("blk.{layer}.{name}");
    if let Some(expert) = name.strip_prefix("mlp.experts.") {
        let (expert, projection) = expert.split_once('.')?;
        let part = match projection {
            "gate_proj.weight" => "gate",
            "up_proj.weight" => "up",
            "down_proj.weight" => "down",
            _ => return None,
        };
        let fused = (part != "down").then(|| (in_layer("ffn_gate_up_exps.weight"), part == "up"));
        let stack = in_layer(&format!("ffn_{part}_exps.weight"));
        return Some(Place::Expert { stack, expert: expert.parse().ok()?, fused });
    }
    if name == "self_attn.kv_b_proj.weight" {
        return Some(Place::KeyValue {
            whole: in_layer("attn_kv_b.weight"),
            keys: in_layer("attn_k_b.weight"),
            values: in_layer("attn_v_b.weight"),
        });
    }
    if name == "mlp.gate.e_score_correction_bias" {
        return Some(Place::Whole(in_layer("exp_probs_b.bias")));
    }
    let (stem, kind) = name.rsplit_once('.')?;
    let stem = match stem {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if arch.is_gemma() => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "self_attn.q_a_proj" => "attn_q_a",
        "self_attn.q_a_layernorm" => "attn_q_a_norm",
        "self_attn.q_b_proj" => "attn_q_b",
        "self_attn.kv_a_proj_with_mqa" => "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm" => "attn_kv_a_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.gate" => "ffn_gate_inp",
        "mlp.shared_experts.gate_proj" => "ffn_gate_shexp",
        "mlp.shared_experts.up_proj" => "ffn_up_shexp",
        "mlp.shared_experts.down_proj" => "ffn_down_shexp",
        "enorm" => "nextn.enorm",
        "hnorm" => "nextn.hnorm",
        "eh_proj" => "nextn.eh_proj",
        "shared_head.norm" => "nextn.shared_head_norm",
        "shared_head.head" => "nextn.shared_head_head",
        "embed_tokens" => "nextn.embed_tokens",
        _ => return None,
    };
    Some(Place::Whole(in_layer(&format!("{stem}.{kind}"))))
}

/// The heads whose rows are permuted in a file of `arch`: those of queries or keys.
pub fn permuted_heads(arch: Arch, spec: &TensorSpec, config: &Config) -> Option<usize> {
    if !arch.permutes() {
        return None;
    }
    let (_, name) = spec.name.strip_prefix("model.layers.")?.split_once('.')?;
    match name.rsplit_once('.')?.0 {
        "self_attn.q_proj" => Some(config.num_attention_heads),
        "self_attn.k_proj" => Some(config.attention_shape().kv_heads),
        _ => None,
    }
}

/// The row of a folder that is row `row` of a file: row `2 j + s` of a head holds row `s w / 2 + j`, for heads of width w.
pub fn row_in_folder(row: usize, head_dim: usize) -> usize {
    let (head, at) = (row / head_dim, row % head_dim);
    head * head_dim + at % 2 * (head_dim / 2) + at / 2
}
