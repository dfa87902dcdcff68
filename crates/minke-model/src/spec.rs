//! The one table of tensors: every weight of a model with its published name, shape and role.
//!
//! Loading, saving, initialising, counting and choosing an optimizer all walk this table, so a name is
//! written here and nowhere else. The order is fixed: embedding, trunk layers, final norm, head, then the MTP
//! modules.
//!
//! Counts of parameters and FLOPs come from the same table or from the same sizes, as pure functions.

use crate::config::{AttentionKind, Config, FfnKind, MoeConfig, ProjectionBias, TopkMethod};

/// What a tensor is for; decides its initialisation, its optimizer and its precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token embedding `[w, d]`.
    Embedding,
    /// Output head `[w, d]`.
    Head,
    /// Gain of an `RMSNorm`.
    Norm,
    /// Bias of a projection.
    Bias,
    /// Projection of the attention.
    AttentionLinear,
    /// Projection of a dense FFN or of the shared experts.
    FfnLinear,
    /// Projection of one routed expert.
    ExpertLinear {
        /// Index of the expert within its layer.
        expert: usize,
    },
    /// Router `[e, d]`.
    Router,
    /// `e_score_correction_bias` `[e]`: moved by the balance rule, never by a gradient; kept in f32.
    RouterBias,
    /// Projection of an MTP module `[d, 2d]`, the embedding's half first.
    MtpProjection,
}

impl Role {
    /// Whether a folder in FP8 stores such tensors in FP8: the projections, and neither what looks up or chooses
    /// (embedding, head, router) nor what scales (norms).
    pub fn takes_fp8(self) -> bool {
        match self {
            Self::AttentionLinear | Self::FfnLinear | Self::ExpertLinear { .. } | Self::MtpProjection => true,
            Self::Embedding | Self::Head | Self::Norm | Self::Bias | Self::Router | Self::RouterBias => false,
        }
    }
}

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The key in published checkpoints.
    pub name: String,
    /// The shape, outermost axis first; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// The layer that it belongs to, MTP modules counted on behind the trunk.
    pub layer: Option<usize>,
    /// The MTP module that it belongs to, counted from 0.
    pub mtp: Option<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A key that some checkpoints carry though its tensor is another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    /// The key that may be present.
    pub name: String,
    /// The key of the tensor that it repeats.
    pub of: String,
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// All tensors of the model, MTP modules included, in their fixed order.
pub fn tensors(config: &Config) -> Vec<TensorSpec> {
    let d = config.hidden_size;
    let mut table = Table { config, specs: Vec::new() };
    table.push(EMBEDDING.to_owned(), [config.vocab_size, d], Role::Embedding, None);
    for layer in 0..config.num_hidden_layers {
        table.layer(layer);
    }
    table.push("model.norm.weight".to_owned(), [d], Role::Norm, None);
    if !config.tie_word_embeddings {
        table.push(HEAD.to_owned(), [config.vocab_size, d], Role::Head, None);
    }
    for module in 0..config.num_nextn_predict_layers {
        let layer = config.num_hidden_layers + module;
        let prefix = format!("model.layers.{layer}");
        table.push(format!("{prefix}.enorm.weight"), [d], Role::Norm, Some(layer));
        table.push(format!("{prefix}.hnorm.weight"), [d], Role::Norm, Some(layer));
        table.push(format!("{prefix}.eh_proj.weight"), [d, 2 * d], Role::MtpProjection, Some(layer));
        table.layer(layer);
        table.push(format!("{prefix}.shared_head.norm.weight"), [d], Role::Norm, Some(layer));
    }
    table.specs
}

/// Keys that a checkpoint may carry beside [`tensors`]: copies of the embedding and the head in MTP modules,
/// and a tied head.
pub fn optional_aliases(config: &Config) -> Vec<Alias> {
    let head = if config.tie_word_embeddings { EMBEDDING } else { HEAD };
    let mut aliases = Vec::new();
    if config.tie_word_embeddings {
        aliases.push(Alias { name: HEAD.to_owned(), of: EMBEDDING.to_owned() });
    }
    for module in 0..config.num_nextn_predict_layers {
        let prefix = format!("model.layers.{}", config.num_hidden_layers + module);
        aliases.push(Alias { name: format!("{prefix}.embed_tokens.weight"), of: EMBEDDING.to_owned() });
        aliases.push(Alias { name: format!("{prefix}.shared_head.head.weight"), of: head.to_owned() });
    }
    aliases
}

struct Table<'a> {
    config: &'a Config,
    specs: Vec<TensorSpec>,
}

impl Table<'_> {
    fn push<const N: usize>(&mut self, name: String, shape: [usize; N], role: Role, layer: Option<usize>) {
        let mtp = layer.and_then(|layer| layer.checked_sub(self.config.num_hidden_layers));
        self.specs.push(TensorSpec { name, shape: shape.to_vec(), role, layer, mtp });
    }

    fn layer(&mut self, layer: usize) {
        let d = self.config.hidden_size;
        let prefix = format!("model.layers.{layer}");
        self.push(format!("{prefix}.input_layernorm.weight"), [d], Role::Norm, Some(layer));
        self.attention(&format!("{prefix}.self_attn"), layer);
        self.push(format!("{prefix}.post_attention_layernorm.weight"), [d], Role::Norm, Some(layer));
        if self.config.post_norms {
            // the norm behind the attention has the name that is elsewhere that of the next one
            self.push(format!("{prefix}.pre_feedforward_layernorm.weight"), [d], Role::Norm, Some(layer));
            self.push(format!("{prefix}.post_feedforward_layernorm.weight"), [d], Role::Norm, Some(layer));
        }
        let mlp = format!("{prefix}.mlp");
        match self.config.ffn(layer) {
            FfnKind::Dense { intermediate_size } => {
                self.swiglu(&mlp, intermediate_size, Role::FfnLinear, layer);
                if self.config.mlp_bias {
                    self.bias(&mlp, "gate_proj", intermediate_size, layer);
                    self.bias(&mlp, "up_proj", intermediate_size, layer);
                    self.bias(&mlp, "down_proj", d, layer);
                }
            }
            FfnKind::Moe(moe) => self.experts(&mlp, &moe, layer),
        }
    }

    fn attention(&mut self, prefix: &str, layer: usize) {
        let d = self.config.hidden_size;
        let h = self.config.num_attention_heads;
        match self.config.attention {
            AttentionKind::Mla {
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
            } => {
                let queries = h * (qk_nope_head_dim + qk_rope_head_dim);
                match q_lora_rank {
                    None => self.projection(prefix, "q_proj", [queries, d], layer),
                    Some(rank) => {
                        self.projection(prefix, "q_a_proj", [rank, d], layer);
                        self.push(format!("{prefix}.q_a_layernorm.weight"), [rank], Role::Norm, Some(layer));
                        self.projection(prefix, "q_b_proj", [queries, rank], layer);
                    }
                }
                let latent = kv_lora_rank + qk_rope_head_dim;
                self.projection(prefix, "kv_a_proj_with_mqa", [latent, d], layer);
                self.push(format!("{prefix}.kv_a_layernorm.weight"), [kv_lora_rank], Role::Norm, Some(layer));
                let keys_and_values = h * (qk_nope_head_dim + v_head_dim);
                self.projection(prefix, "kv_b_proj", [keys_and_values, kv_lora_rank], layer);
                self.projection(prefix, "o_proj", [d, h * v_head_dim], layer);
            }
            AttentionKind::Gqa { num_key_value_heads, head_dim, bias, qk_norm } => {
                let (queries, keys) = (h * head_dim, num_key_value_heads * head_dim);
                self.projection(prefix, "q_proj", [queries, d], layer);
                self.projection(prefix, "k_proj", [keys, d], layer);
                self.projection(prefix, "v_proj", [keys, d], layer);
                self.projection(prefix, "o_proj", [d, queries], layer);
                if bias != ProjectionBias::None {
                    self.bias(prefix, "q_proj", queries, layer);
                    self.bias(prefix, "k_proj", keys, layer);
                    self.bias(prefix, "v_proj", keys, layer);
                }
                if bias == ProjectionBias::All {
                    self.bias(prefix, "o_proj", d, layer);
                }
                if qk_norm {
                    self.push(format!("{prefix}.q_norm.weight"), [head_dim], Role::Norm, Some(layer));
                    self.push(format!("{prefix}.k_norm.weight"), [head_dim], Role::Norm, Some(layer));
                }
            }
        }
    }

    fn projection(&mut self, prefix: &str, name: &str, shape: [usize; 2], layer: usize) {
        self.push(format!("{prefix}.{name}.weight"), shape, Role::AttentionLinear, Some(layer));
    }

    fn bias(&mut self, prefix: &str, name: &str, len: usize, layer: usize) {
        self.push(format!("{prefix}.{name}.bias"), [len], Role::Bias, Some(layer));
    }

    fn swiglu(&mut self, prefix: &str, f: usize, role: Role, layer: usize) {
        let d = self.config.hidden_size;
        self.push(format!("{prefix}.gate_proj.weight"), [f, d], role, Some(layer));
        self.push(format!("{prefix}.up_proj.weight"), [f, d], role, Some(layer));
        self.push(format!("{prefix}.down_proj.weight"), [d, f], role, Some(layer));
    }

    fn experts(&mut self, prefix: &str, moe: &MoeConfig, layer: usize) {
        let e = moe.n_routed_experts;
        self.push(format!("{prefix}.gate.weight"), [e, self.config.hidden_size], Role::Router, Some(layer));
        if moe.topk_method == TopkMethod::NoAuxTc {
            let name = format!("{prefix}.gate.e_score_correction_bias");
            self.push(name, [e], Role::RouterBias, Some(layer));
        }
        for expert in 0..e {
            let role = Role::ExpertLinear { expert };
            self.swiglu(&format!("{prefix}.experts.{expert}"), moe.moe_intermediate_size, role, layer);
        }
        if moe.n_shared_experts > 0 {
            let f = moe.n_shared_experts * moe.moe_intermediate_size;
            self.swiglu(&format!("{prefix}.shared_experts"), f, Role::FfnLinear, layer);
        }
    }
}

/// How many parameters a model has, by what they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCounts {
    /// The trunk with embedding and head (once when tied), without MTP modules; as published counts have it.
    pub total: u64,
    /// Of these, what one token uses: all but the routed experts that it does not choose.
    pub active: u64,
    /// The embedding.
    pub embedding: u64,
    /// The head; 0 when tied.
    pub head: u64,
    /// The MTP modules, without the embedding and head that they share.
    pub mtp: u64,
    /// Of these, what one token uses.
    pub mtp_active: u64,
}

/// Multiply-add elements of one token through one layer, norms apart.
struct LayerSizes {
    attention: u128,
    /// Norms, and biases.
    norms: u128,
    ffn: u128,
    ffn_active: u128,
    /// The correction bias: stored, never multiplied.
    router_bias: u128,
}

fn layer_sizes(config: &Config, layer: usize) -> LayerSizes {
    let d = config.hidden_size as u128;
    let h = config.num_attention_heads as u128;
    let (attention, inner_norms) = match config.attention {
        AttentionKind::Mla { q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
            let [c, p, r, v] =
                [kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim].map(|size| size as u128);
            let queries = match q_lora_rank {
                None => d * h * (p + r),
                Some(rank) => rank as u128 * (d + h * (p + r)),
            };
            let norms = q_lora_rank.unwrap_or(0) as u128 + c;
            (queries + d * (c + r) + c * h * (p + v) + h * v * d, norms)
        }
        AttentionKind::Gqa { num_key_value_heads, head_dim, bias, qk_norm } => {
            let (p, kv_heads) = (head_dim as u128, num_key_value_heads as u128);
            let biases = match bias {
                ProjectionBias::None => 0,
                ProjectionBias::QueryKeyValue => (h + 2 * kv_heads) * p,
                ProjectionBias::All => (h + 2 * kv_heads) * p + d,
            };
            (2 * d * (h + kv_heads) * p, biases + if qk_norm { 2 * p } else { 0 })
        }
    };
    let mut norms = inner_norms + if config.post_norms { 4 * d } else { 2 * d };
    let (ffn, ffn_active, router_bias) = match config.ffn(layer) {
        FfnKind::Dense { intermediate_size } => {
            norms += if config.mlp_bias { 2 * intermediate_size as u128 + d } else { 0 };
            let dense = 3 * d * intermediate_size as u128;
            (dense, dense, 0)
        }
        FfnKind::Moe(moe) => {
            let e = moe.n_routed_experts as u128;
            let expert = 3 * d * moe.moe_intermediate_size as u128;
            let always = e * d + moe.n_shared_experts as u128 * expert;
            let bias = if moe.topk_method == TopkMethod::NoAuxTc { e } else { 0 };
            (always + e * expert, always + moe.num_experts_per_tok as u128 * expert, bias)
        }
    };
    LayerSizes { attention, norms, ffn, ffn_active, router_bias }
}

/// Trunk and MTP parameters in all, wide enough that no config that passed its size bounds overflows.
pub(crate) fn parameter_total(config: &Config) -> u128 {
    let d = config.hidden_size as u128;
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
    let all: u128 = (0..layers)
        .map(|layer| {
            let sizes = layer_sizes(config, layer);
            sizes.attention + sizes.norms + sizes.ffn + sizes.router_bias
        })
        .sum();
    let mtp_own = 2 * d * d + 3 * d;
    all + d + tables * config.vocab_size as u128 * d + config.num_nextn_predict_layers as u128 * mtp_own
}

/// Counts the parameters of a model.
///
/// The correction bias of the router counts as a parameter, since checkpoints hold it.
pub fn parameters(config: &Config) -> ParameterCounts {
    let d = config.hidden_size as u64;
    let trunk = config.num_hidden_layers;
    let sum = |range: std::ops::Range<usize>| {
        range.fold((0_u64, 0_u64), |(total, active), layer| {
            let sizes = layer_sizes(config, layer);
            let rest = sizes.attention + sizes.norms + sizes.router_bias;
            (total + (rest + sizes.ffn) as u64, active + (rest + sizes.ffn_active) as u64)
        })
    };
    let embedding = config.vocab_size as u64 * d;
    let head = if config.tie_word_embeddings { 0 } else { embedding };
    let (total, active) = sum(0..trunk);
    let (mtp, mtp_active) = sum(trunk..trunk + config.num_nextn_predict_layers);
    let mtp_own = config.num_nextn_predict_layers as u64 * (2 * d * d + 3 * d);
    let outside = embedding + head + d;
    ParameterCounts {
        total: total + outside,
        active: active + outside,
        embedding,
        head,
        mtp: mtp + mtp_own,
        mtp_active: mtp_active + mtp_own,
    }
}

/// Floating-point operations per token, a multiply-add counted as two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flops {
    /// Matrix products with weights, forward: layers and head, without the embedding's lookup.
    pub linear: u64,
    /// Attention scores and their product with values, forward, averaged over a causal context.
    pub attention: u64,
}

impl Flops {
    /// One forward pass.
    pub fn forward(self) -> u64 {
        self.linear.saturating_add(self.attention)
    }

    /// Forward and backward: three times the forward pass, since each product has two gradients. Work that is
    /// repeated to save memory does not count.
    pub fn training(self) -> u64 {
        self.forward().saturating_mul(3)
    }
}

/// FLOPs per token of sequences of length `context`, with the MTP modules (each a layer, a projection and the
/// head again) when `mtp` is true.
///
/// `linear = 2 (active weights of layers + w d)`, `attention = l h (qk + v) (T + 1)`: the token at position t
/// looks at t + 1 keys, `(T + 1) / 2` on average, and each key costs `2 (qk + v)` per head; in a layer with a window
/// w at w keys at most. Latent attention is
/// counted in its expanded form, which is the one that trains.
pub fn flops_per_token(config: &Config, context: usize, mtp: bool) -> Flops {
    let d = config.hidden_size as u128;
    let head = config.vocab_size as u128 * d;
    let modules = if mtp { config.num_nextn_predict_layers } else { 0 };
    let layers = config.num_hidden_layers + modules;
    let in_layers: u128 = (0..layers)
        .map(|layer| {
            let sizes = layer_sizes(config, layer);
            sizes.attention + sizes.ffn_active
        })
        .sum();
    let linear = 2 * (in_layers + head + modules as u128 * (2 * d * d + head));
    let widths = (config.num_attention_heads * (config.qk_head_dim() + config.v_head_dim())) as u128;
    let whole = widths * (context as u128 + 1);
    let attention = (0..layers).map(|layer| match config.window(layer) {
        Some(window) if window < context => {
            let (t, w) = (context as u128, window as u128);
            2 * widths * (w * (w + 1) / 2 + (t - w) * w) / t
        }
        Some(_) | None => whole,
    });
    let attention: u128 = attention.sum();
    let narrow = |flops: u128| u64::try_from(flops).unwrap_or(u64::MAX);
    Flops { linear: narrow(linear), attention: narrow(attention) }
}

#[cfg(test)]
mod tests;
