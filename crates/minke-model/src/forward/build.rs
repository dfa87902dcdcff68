//! Handles of the weights, layer by layer, from the config.

use minke_cpu::DType;
use minke_cpu::attention::AttentionShape;
use minke_cpu::routing::{Choice, RouterConfig, Scoring};
use minke_cpu::swiglu::Gate;
use minke_num::bf16;
use minke_tensor::WeightId;
use minke_tensor::ops::{AttentionWeights, HeadWeights, Linear, MlaWeights, MoeWeights, Norm};

use super::{Attention, Ffn, Layer, MtpModule, Net, Query};
use crate::config::{
    self, AttentionKind, Config, FfnKind, LATENT_NORM_EPS, MoeConfig, ProjectionBias, TopkMethod,
};
use crate::params::Layout;
use crate::rotary::Tables;

impl Net {
    pub(super) fn new(config: &Config, layout: &mut Layout) -> Self {
        let norm_of = |w| norm(config, w);
        let embedding = layout.one("model.embed_tokens.weight");
        let layers = (0..config.num_hidden_layers).map(|l| Layer::new(config, layout, l)).collect();
        let norm = norm_of(layout.one("model.norm.weight"));
        let head = if config.tie_word_embeddings { embedding } else { layout.one("lm_head.weight") };
        let mtp = (0..config.num_nextn_predict_layers)
            .map(|module| {
                let layer = config.num_hidden_layers + module;
                let mut one = |name: &str| layout.one(format!("model.layers.{layer}.{name}.weight"));
                let (enorm, hnorm, eh_proj) = (one("enorm"), one("hnorm"), one("eh_proj"));
                let [enorm, hnorm, norm] = [enorm, hnorm, one("shared_head.norm")].map(norm_of);
                MtpModule { enorm, hnorm, eh_proj, layer: Layer::new(config, layout, layer), norm }
            })
            .collect();
        let width = config.rotary_dim();
        let sliding_rope = config.sliding.as_ref().and_then(|sliding| sliding.rope.as_ref());
        // as transformers, which holds the factor in the dtype of the embedding
        let scale = (config.hidden_size as f32).sqrt();
        let half = layout.dtype(embedding) == DType::Bf16;
        let scale = if half { bf16::from_f32(scale).to_f32() } else { scale };
        Self {
            embedding,
            embedding_scale: config.scales_embedding.then_some(scale),
            layers,
            norm,
            head: HeadWeights { w: head, softcap: config.final_logit_softcapping.map(|cap| cap as f32) },
            mtp,
            tables: Tables::new(&config.rope, width),
            sliding_tables: sliding_rope.map(|rope| Tables::new(rope, width)),
        }
    }
}

/// A norm over the model's width.
fn norm(config: &Config, w: WeightId) -> Norm {
    Norm { w, offset: if config.norm_offset { 1.0 } else { 0.0 }, eps: config.rms_norm_eps as f32 }
}

impl Layer {
    fn new(config: &Config, layout: &mut Layout, index: usize) -> Self {
        let prefix = format!("model.layers.{index}");
        let one = |layout: &mut Layout, name: &str| {
            norm(config, layout.one(format!("{prefix}.{name}_layernorm.weight")))
        };
        let input_norm = one(layout, "input");
        let attention = Attention::new(config, layout, &format!("{prefix}.self_attn"));
        let post = one(layout, "post_attention");
        let (attended_norm, ffn_norm) =
            if config.post_norms { (Some(post), one(layout, "pre_feedforward")) } else { (None, post) };
        let out_norm = config.post_norms.then(|| one(layout, "post_feedforward"));
        let mlp = format!("{prefix}.mlp");
        let ffn = match config.ffn(index) {
            FfnKind::Dense { .. } => Ffn::new_dense(config, layout, &mlp),
            FfnKind::Moe(moe) => Ffn::new_moe(&moe, config.gate, layout, &mlp),
        };
        let shape = AttentionShape { window: config.window(index), ..config.attention_shape() };
        let shape = AttentionWeights { shape, rotary: config.rotary_dim() };
        Self { index, input_norm, attention, shape, attended_norm, ffn_norm, ffn, out_norm }
    }
}

fn swiglu(layout: &mut Layout, prefix: &str) -> (WeightId, WeightId) {
    let gate_up = layout.weight(1, &["gate", "up"].map(|w| format!("{prefix}.{w}_proj.weight")));
    (gate_up, layout.one(format!("{prefix}.down_proj.weight")))
}

impl Attention {
    fn new(config: &Config, layout: &mut Layout, prefix: &str) -> Self {
        let mut one = |name: &str| layout.one(format!("{prefix}.{name}.weight"));
        match config.attention {
            AttentionKind::Mla { q_lora_rank, .. } => {
                let q = match q_lora_rank {
                    None => Query::Direct(one("q_proj")),
                    Some(_) => {
                        let (a, w, b) = (one("q_a_proj"), one("q_a_layernorm"), one("q_b_proj"));
                        Query::Latent { a, norm: Norm { w, offset: 0.0, eps: LATENT_NORM_EPS as f32 }, b }
                    }
                };
                let kv_a = one("kv_a_proj_with_mqa");
                let (kv_a_norm, kv_b) = (one("kv_a_layernorm"), one("kv_b_proj"));
                let latent = MlaWeights { kv_a_norm, kv_b, eps: LATENT_NORM_EPS as f32 };
                Attention::Mla { q, kv_a, latent, o: one("o_proj") }
            }
            AttentionKind::Gqa { bias, qk_norm, .. } => {
                let [q, k, v, o] = ["q", "k", "v", "o"].map(|name| {
                    let w = layout.one(format!("{prefix}.{name}_proj.weight"));
                    let biased = match bias {
                        ProjectionBias::None => false,
                        ProjectionBias::QueryKeyValue => name != "o",
                        ProjectionBias::All => true,
                    };
                    let bias = biased.then(|| layout.one(format!("{prefix}.{name}_proj.bias")));
                    Linear { w, bias }
                });
                let mut of_heads = |name| norm(config, layout.one(format!("{prefix}.{name}.weight")));
                let head_norms = qk_norm.then(|| ["q_norm", "k_norm"].map(&mut of_heads));
                Attention::Gqa { q, k, v, o, head_norms }
            }
        }
    }
}

impl Ffn {
    fn new_dense(config: &Config, layout: &mut Layout, mlp: &str) -> Self {
        let (gate_up, down) = swiglu(layout, mlp);
        let mut linear = |w, parts: &[&str]| {
            let names: Vec<_> = parts.iter().map(|part| format!("{mlp}.{part}_proj.bias")).collect();
            Linear { w, bias: config.mlp_bias.then(|| layout.weight(1, &names)) }
        };
        Ffn::Dense {
            gate: config.gate,
            gate_up: linear(gate_up, &["gate", "up"]),
            down: linear(down, &["down"]),
        }
    }

    fn new_moe(moe: &MoeConfig, gate: Gate, layout: &mut Layout, mlp: &str) -> Self {
        let router = layout.one(format!("{mlp}.gate.weight"));
        let bias = (moe.topk_method == TopkMethod::NoAuxTc)
            .then(|| layout.one(format!("{mlp}.gate.e_score_correction_bias")));
        let experts = moe.n_routed_experts;
        let names = |parts: &[&str]| -> Vec<String> {
            let of = |e: usize| parts.iter().map(move |p| format!("{mlp}.experts.{e}.{p}_proj.weight"));
            (0..experts).flat_map(of).collect()
        };
        let gate_up = layout.weight(experts, &names(&["gate", "up"]));
        let down = layout.weight(experts, &names(&["down"]));
        let shared = (moe.n_shared_experts > 0).then(|| swiglu(layout, &format!("{mlp}.shared_experts")));
        let weights = MoeWeights { router, bias, gate_up, down, shared, gate };
        let router = RouterConfig {
            experts,
            top_k: moe.num_experts_per_tok,
            groups: moe.n_group,
            top_groups: moe.topk_group,
            scoring: match moe.scoring {
                config::Scoring::Sigmoid => Scoring::Sigmoid,
                config::Scoring::Softmax => Scoring::Softmax,
            },
            choice: match moe.topk_method {
                TopkMethod::NoAuxTc => Choice::NoAuxTc,
                TopkMethod::Greedy => Choice::Greedy,
                TopkMethod::GroupLimitedGreedy => Choice::GroupLimitedGreedy,
            },
            normalize: moe.norm_topk_prob,
            scale: moe.routed_scaling_factor as f32,
        };
        Ffn::Moe { weights, router }
    }
}
