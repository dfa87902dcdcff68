//! The forward pass, as a list of calls.

use std::sync::Arc;

use minke_cpu::attention::{AttentionShape, KvCache, Segment};
use minke_cpu::routing::{Choice, RouterConfig, Scoring};
use minke_cpu::swiglu::Gate;
use minke_cpu::{DType, rope};
use minke_num::bf16;
use minke_tensor::ops::{
    self, AttentionWeights, HeadWeights, Keys, Linear, MlaWeights, MoeWeights, Norm, Rotary,
};
use minke_tensor::{Context, Timers, Var, WeightId};

use crate::config::{
    self, AttentionKind, Config, FfnKind, LATENT_NORM_EPS, MoeConfig, ProjectionBias, Rope, TopkMethod,
};
use crate::params::{Keep, Layout, Params, Precision};
use crate::train::ExpertLoad;

/// What is computed a second time on the way back, instead of being kept from the way there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// Every layer, from what goes into it: a third more arithmetic, and of all layers but one only the inputs are held.
    Layer,
}

/// A transformer: config, weights, and the order of its calls.
pub struct Model {
    /// What it was built from.
    pub config: Config,
    /// Its weights.
    pub params: Params,
    /// What its products compute in.
    pub precision: Precision,
    /// Where the time of its passes went, per operation.
    pub timers: Timers,
    /// What its training passes compute twice; no bit depends on it.
    pub recompute: Recompute,
    pub(crate) net: Net,
}

/// The handles of all weights, in the order of their use.
pub(crate) struct Net {
    pub embedding: WeightId,
    /// What embeddings are multiplied by.
    embedding_scale: Option<f32>,
    pub layers: Vec<Layer>,
    pub norm: Norm,
    pub head: HeadWeights,
    pub mtp: Vec<MtpModule>,
    tables: Tables,
    /// Of layers that slide, where their rope is another.
    sliding_tables: Option<Tables>,
}

#[derive(Clone, Copy)]
pub(crate) struct Layer {
    index: usize,
    input_norm: Norm,
    attention: Attention,
    /// Heads and widths, and the window of this layer.
    shape: AttentionWeights,
    /// Of the attention's output, before it is added.
    attended_norm: Option<Norm>,
    ffn_norm: Norm,
    ffn: Ffn,
    /// Of the feed-forward's output, before it is added.
    out_norm: Option<Norm>,
}

#[derive(Clone, Copy)]
enum Attention {
    Mla { q: Query, kv_a: WeightId, latent: MlaWeights, o: WeightId },
    Gqa { q: Linear, k: Linear, v: Linear, o: Linear, head_norms: Option<[Norm; 2]> },
}

#[derive(Clone, Copy)]
enum Query {
    Direct(WeightId),
    Latent { a: WeightId, norm: Norm, b: WeightId },
}

#[derive(Clone, Copy)]
enum Ffn {
    Dense { gate: Gate, gate_up: Linear, down: Linear },
    Moe { weights: MoeWeights, router: RouterConfig },
}

/// A multi-token-prediction module: its own layer behind a projection of [embedding ; state].
pub(crate) struct MtpModule {
    pub enorm: Norm,
    pub hnorm: Norm,
    pub eh_proj: WeightId,
    pub layer: Layer,
    pub norm: Norm,
}

/// Cosines and sines, for as many positions as were asked for so far.
struct Tables {
    inv_freq: Vec<f32>,
    scale: f32,
    interleaved: bool,
    positions: usize,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
}

impl Tables {
    fn new(rope: &Rope, width: usize) -> Self {
        Self {
            inv_freq: rope.inv_freq(width),
            scale: rope.cos_sin_scale(),
            interleaved: rope.interleaved,
            positions: 0,
            cos: Arc::new([]),
            sin: Arc::new([]),
        }
    }

    /// The rotation of rows at `positions`.
    fn rotary(&mut self, positions: Arc<[u32]>) -> Rotary {
        let needed = positions.iter().map(|&p| p as usize + 1).max().unwrap_or(0);
        if needed > self.positions {
            self.positions = needed.next_power_of_two();
            let (cos, sin) = rope::cos_sin(&self.inv_freq, self.positions, self.scale);
            (self.cos, self.sin) = (cos.into(), sin.into());
        }
        Rotary { cos: self.cos.clone(), sin: self.sin.clone(), positions, interleaved: self.interleaved }
    }
}

/// The rotations of a pass.
#[derive(Clone)]
pub(crate) struct Rotaries {
    full: Rotary,
    /// Of layers that slide, where it is another.
    sliding: Option<Rotary>,
}

/// Where the keys of a pass are.
pub(crate) enum Source<'a> {
    /// Whole sequences in the rows of this call.
    Rows(Arc<[Segment]>),
    /// One cache list (a cache per layer) per sequence: (first row, rows, caches).
    /// The first cache is that of layer `first`.
    Caches { sequences: Vec<(usize, usize, &'a mut [KvCache])>, latent: bool, first: usize },
}

impl Source<'_> {
    fn keys(&mut self, layer: usize) -> Keys<'_> {
        match self {
            Source::Rows(segments) => Keys::Rows(segments.clone()),
            Source::Caches { sequences, first, .. } => {
                let at = layer - *first;
                let keys = sequences.iter_mut().map(|(start, len, caches)| (*start, *len, &mut caches[at]));
                Keys::Caches(keys.collect())
            }
        }
    }
}

/// What a pass collects on its way, beside values.
pub(crate) struct Pass<'a> {
    pub rotary: Rotaries,
    pub source: Source<'a>,
    /// Rows where sequences begin, and the end.
    pub borders: Arc<[u32]>,
    pub balance_alpha: f32,
    pub recompute: Recompute,
    pub balance_loss: f64,
    pub loads: Vec<ExpertLoad>,
    /// The experts of each row [n, k], by layer with experts.
    pub routes: Vec<Arc<[u32]>>,
}

impl Model {
    /// A model with fresh weights.
    pub fn random(config: Config, precision: Precision, seed: u64) -> Self {
        let mut model = Self::zero(config, precision, Keep::default());
        model.params.randomize(&model.config, seed);
        model
    }

    /// A model whose weights are all zero, to be filled.
    pub(crate) fn zero(config: Config, precision: Precision, keep: Keep) -> Self {
        let mut layout = Layout::new(&config, precision, keep);
        let net = Net::new(&config, &mut layout);
        Self {
            config,
            params: layout.finish(),
            precision,
            timers: Timers::default(),
            recompute: Recompute::None,
            net,
        }
    }

    /// Marks the packed copies of the weights as stale; to be called after every change of `params.data`.
    pub fn weights_changed(&mut self) {
        self.params.changed();
    }
}

impl Net {
    fn new(config: &Config, layout: &mut Layout) -> Self {
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

    /// The rotations of rows at `positions`.
    pub fn rotary(&mut self, positions: Arc<[u32]>) -> Rotaries {
        let sliding = self.sliding_tables.as_mut().map(|tables| tables.rotary(positions.clone()));
        Rotaries { full: self.tables.rotary(positions), sliding }
    }

    /// Embedding and layers; the state after the final norm [n, d], in the head's dtype.
    pub fn trunk(&self, cx: &mut Context<'_>, pass: &mut Pass<'_>, tokens: &Arc<[u32]>) -> Var {
        let x = ops::embedding(cx, self.embedding, tokens, self.embedding_scale);
        let mut state = (x, None);
        for layer in &self.layers {
            state = layer.pass(cx, pass, state);
        }
        normed(cx, state, self.norm, cx.store.dtype(self.head.w)).1
    }

    /// A multi-token-prediction module: `h` [n, d] is the state after the norm before it, `tokens` the token k places
    /// ahead of each row. `detached` modules learn without teaching embedding and trunk. Returns the state after its own norm, which goes to the head and to the next module.
    ///
    /// DeepSeek-V3 report, section 2.2, equations 21-23; like transformers, the state passed on is normed.
    pub fn mtp(
        &self,
        cx: &mut Context<'_>,
        pass: &mut Pass<'_>,
        k: usize,
        h: &Var,
        tokens: &Arc<[u32]>,
        detached: bool,
    ) -> Var {
        let m = &self.mtp[k];
        let act = cx.store.dtype(m.eh_proj);
        let mut embedded = ops::embedding(cx, self.embedding, tokens, self.embedding_scale);
        let mut h = h.clone();
        if detached {
            // new values on the tape, whose gradients nobody takes
            (embedded, h) = (cx.var(embedded.value), if k == 0 { cx.var(h.value) } else { h });
        }
        let embedded = ops::rmsnorm(cx, &embedded, m.enorm, act);
        let state = ops::rmsnorm(cx, &h, m.hnorm, act);
        let joined = ops::concat(cx, &embedded, &state);
        let x = ops::linear(cx, &joined, m.eh_proj, DType::F32);
        let state = m.layer.pass(cx, pass, (x, None));
        normed(cx, state, m.norm, cx.store.dtype(self.head.w)).1
    }
}

/// A norm over the model's width.
fn norm(config: &Config, w: WeightId) -> Norm {
    Norm { w, offset: if config.norm_offset { 1.0 } else { 0.0 }, eps: config.rms_norm_eps as f32 }
}

/// The residual stream with the last block's output added, and its norm.
fn normed(cx: &mut Context<'_>, (x, delta): State, norm: Norm, dtype: DType) -> (Var, Var) {
    match delta {
        None => {
            let y = ops::rmsnorm(cx, &x, norm, dtype);
            (x, y)
        }
        Some(delta) => ops::add_rmsnorm(cx, &x, &delta, norm, dtype),
    }
}

/// The residual stream and the output of the last block, not yet added to it: the addition is part of the next norm.
type State = (Var, Option<Var>);

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
            FfnKind::Dense { .. } => {
                let (gate_up, down) = swiglu(layout, &mlp);
                let [gate_up, down] =
                    [(gate_up, &["gate", "up"][..]), (down, &["down"][..])].map(|(w, parts)| {
                        let names: Vec<_> =
                            parts.iter().map(|part| format!("{mlp}.{part}_proj.bias")).collect();
                        Linear { w, bias: config.mlp_bias.then(|| layout.weight(1, &names)) }
                    });
                Ffn::Dense { gate: config.gate, gate_up, down }
            }
            FfnKind::Moe(moe) => Ffn::new_moe(&moe, config.gate, layout, &mlp),
        };
        let shape = AttentionShape { window: config.window(index), ..config.attention_shape() };
        let shape = AttentionWeights { shape, rotary: config.rotary_dim() };
        Self { index, input_norm, attention, shape, attended_norm, ffn_norm, ffn, out_norm }
    }

    /// Forward; where the pass says so, with a tape that keeps of it only what goes in and what comes out.
    fn pass(&self, cx: &mut Context<'_>, pass: &mut Pass<'_>, state: State) -> State {
        let Source::Rows(segments) = &pass.source else { return self.forward(cx, pass, state) };
        if pass.recompute == Recompute::None {
            return self.forward(cx, pass, state);
        }
        // what the second time counts was counted the first time
        let mut aside = Pass {
            rotary: pass.rotary.clone(),
            source: Source::Rows(segments.clone()),
            borders: pass.borders.clone(),
            loads: Vec::new(),
            routes: Vec::new(),
            balance_alpha: pass.balance_alpha,
            recompute: pass.recompute,
            balance_loss: 0.0,
        };
        let layer = *self;
        let once = move |cx: &mut Context<'_>, pass: &mut Pass<'_>, state| {
            let (x, out) = layer.forward(cx, pass, state);
            [x, out.expect("a layer ends with a block's output")]
        };
        let [x, out] = match state {
            (x, None) => cx.checkpoint(
                [x],
                |cx, [x]| once(cx, pass, (x, None)),
                move |cx, [x]| once(cx, &mut aside, (x, None)),
            ),
            (x, Some(delta)) => cx.checkpoint(
                [x, delta],
                |cx, [x, delta]| once(cx, pass, (x, Some(delta))),
                move |cx, [x, delta]| once(cx, &mut aside, (x, Some(delta))),
            ),
        };
        (x, Some(out))
    }

    fn forward(&self, cx: &mut Context<'_>, pass: &mut Pass<'_>, state: State) -> State {
        let act = self.attention.dtype(cx);
        let (x, y) = normed(cx, state, self.input_norm, act);
        let mut attended = self.attention.forward(cx, self.shape, pass, &y, self.index);
        if let Some(norm) = self.attended_norm {
            attended = ops::rmsnorm(cx, &attended, norm, act);
        }
        let act = self.ffn.dtype(cx);
        let (x, y) = ops::add_rmsnorm(cx, &x, &attended, self.ffn_norm, act);
        let mut out = match &self.ffn {
            Ffn::Dense { gate, gate_up, down } if gate_up.bias.is_some() => {
                let gu = ops::linear(cx, &y, *gate_up, act);
                let h = ops::gated_unit(cx, &gu, *gate);
                ops::linear(cx, &h, *down, act)
            }
            Ffn::Dense { gate, gate_up, down } => ops::swiglu_ffn(cx, &y, *gate, gate_up.w, down.w, act),
            Ffn::Moe { weights, router } => {
                let (out, routed) =
                    ops::moe_ffn(cx, &y, *weights, router, &pass.borders, pass.balance_alpha, act);
                pass.balance_loss += f64::from(routed.balance_loss);
                pass.routes.push(routed.experts);
                pass.loads.push(ExpertLoad { layer: self.index, bias: weights.bias, counts: routed.counts });
                out
            }
        };
        if let Some(norm) = self.out_norm {
            out = ops::rmsnorm(cx, &out, norm, act);
        }
        (x, Some(out))
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

    fn dtype(&self, cx: &Context<'_>) -> DType {
        match self {
            Attention::Mla { o, .. } => cx.store.dtype(*o),
            Attention::Gqa { o, .. } => cx.store.dtype(o.w),
        }
    }

    fn forward(
        &self,
        cx: &mut Context<'_>,
        shape: AttentionWeights,
        pass: &mut Pass<'_>,
        y: &Var,
        layer: usize,
    ) -> Var {
        let act = self.dtype(cx);
        let Rotaries { full, sliding } = &pass.rotary;
        let rotary = sliding.as_ref().filter(|_| shape.shape.window.is_some()).unwrap_or(full).clone();
        let (attended, o) = match self {
            Attention::Mla { q, kv_a, latent, o } => {
                // before the queries: what reads the same input reads the same codes of it
                let kv_a = ops::linear(cx, y, *kv_a, act);
                let q = match q {
                    Query::Direct(w) => ops::linear(cx, y, *w, act),
                    Query::Latent { a, norm, b } => {
                        let low = ops::linear(cx, y, *a, act);
                        let low = ops::rmsnorm(cx, &low, *norm, act);
                        ops::linear(cx, &low, *b, act)
                    }
                };
                let absorbed = matches!(pass.source, Source::Caches { latent: true, .. });
                let keys = pass.source.keys(layer);
                let attended = if absorbed {
                    let (q, kv_a) = (&q.value, &kv_a.value);
                    let out = ops::mla_absorbed(cx, q, kv_a, *latent, shape, &rotary, keys);
                    let out = out.converted(cx.cpu, act);
                    cx.var(out)
                } else {
                    ops::mla_attention(cx, &q, &kv_a, *latent, shape, &rotary, keys)
                };
                (attended, Linear::from(*o))
            }
            Attention::Gqa { q, k, v, o, head_norms } => {
                let [mut q, mut k, v] = [q, k, v].map(|layer| ops::linear(cx, y, *layer, act));
                if let Some([q_norm, k_norm]) = head_norms {
                    q = ops::rmsnorm(cx, &q, *q_norm, act);
                    k = ops::rmsnorm(cx, &k, *k_norm, act);
                }
                let keys = pass.source.keys(layer);
                (ops::gqa_attention(cx, [&q, &k, &v], shape, &rotary, keys), *o)
            }
        };
        ops::linear_of_kept(cx, &attended, o, act)
    }
}

impl Ffn {
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

    fn dtype(&self, cx: &Context<'_>) -> DType {
        match self {
            Ffn::Dense { down, .. } => cx.store.dtype(down.w),
            Ffn::Moe { weights, .. } => cx.store.dtype(weights.down),
        }
    }
}
