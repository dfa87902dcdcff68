//! The forward pass, as a list of calls.

use std::sync::Arc;

use minke_cpu::attention::{KvCache, Segment};
use minke_cpu::routing::{Choice, RouterConfig, Scoring};
use minke_cpu::{DType, rope};
use minke_tensor::ops::{self, AttentionWeights, Keys, MlaWeights, MoeWeights, Rotary};
use minke_tensor::{Context, Timers, Var, WeightId};

use crate::config::{self, AttentionKind, Config, FfnKind, LATENT_NORM_EPS, MoeConfig, TopkMethod};
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
    pub layers: Vec<Layer>,
    pub norm: WeightId,
    pub head: WeightId,
    pub mtp: Vec<MtpModule>,
    pub block: Block,
    tables: Tables,
}

/// What all layers have in common.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub attention: AttentionWeights,
    pub eps: f32,
}

#[derive(Clone, Copy)]
pub(crate) struct Layer {
    index: usize,
    input_norm: WeightId,
    attention: Attention,
    post_norm: WeightId,
    ffn: Ffn,
}

#[derive(Clone, Copy)]
enum Attention {
    Mla { q: Query, kv_a: WeightId, latent: MlaWeights, o: WeightId },
    Gqa { q: WeightId, k: WeightId, v: WeightId, o: WeightId },
}

#[derive(Clone, Copy)]
enum Query {
    Direct(WeightId),
    Latent { a: WeightId, norm: WeightId, b: WeightId },
}

#[derive(Clone, Copy)]
enum Ffn {
    Dense { gate_up: WeightId, down: WeightId },
    Moe { weights: MoeWeights, router: RouterConfig },
}

/// A multi-token-prediction module: its own layer behind a projection of [embedding ; state].
pub(crate) struct MtpModule {
    pub enorm: WeightId,
    pub hnorm: WeightId,
    pub eh_proj: WeightId,
    pub layer: Layer,
    pub norm: WeightId,
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
    pub rotary: Rotary,
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
        let embedding = layout.one("model.embed_tokens.weight");
        let layers = (0..config.num_hidden_layers).map(|l| Layer::new(config, layout, l)).collect();
        let norm = layout.one("model.norm.weight");
        let head = if config.tie_word_embeddings { embedding } else { layout.one("lm_head.weight") };
        let mtp = (0..config.num_nextn_predict_layers)
            .map(|module| {
                let layer = config.num_hidden_layers + module;
                let mut one = |name: &str| layout.one(format!("model.layers.{layer}.{name}.weight"));
                let (enorm, hnorm, eh_proj) = (one("enorm"), one("hnorm"), one("eh_proj"));
                let norm = one("shared_head.norm");
                MtpModule { enorm, hnorm, eh_proj, layer: Layer::new(config, layout, layer), norm }
            })
            .collect();
        let shape = config.attention_shape();
        let tables = Tables {
            inv_freq: config.inv_freq(),
            scale: config.rope.cos_sin_scale(),
            interleaved: config.rope.interleaved,
            positions: 0,
            cos: Arc::new([]),
            sin: Arc::new([]),
        };
        let attention = AttentionWeights { shape, rotary: config.rotary_dim() };
        let block = Block { attention, eps: config.rms_norm_eps as f32 };
        Self { embedding, layers, norm, head, mtp, block, tables }
    }

    /// The rotation of rows at `positions`.
    pub fn rotary(&mut self, positions: Arc<[u32]>) -> Rotary {
        let tables = &mut self.tables;
        let needed = positions.iter().map(|&p| p as usize + 1).max().unwrap_or(0);
        if needed > tables.positions {
            tables.positions = needed.next_power_of_two();
            let (cos, sin) = rope::cos_sin(&tables.inv_freq, tables.positions, tables.scale);
            (tables.cos, tables.sin) = (cos.into(), sin.into());
        }
        let (cos, sin) = (tables.cos.clone(), tables.sin.clone());
        Rotary { cos, sin, positions, interleaved: tables.interleaved }
    }

    /// Embedding and layers; the state after the final norm [n, d], in the head's dtype.
    pub fn trunk(&self, cx: &mut Context<'_>, pass: &mut Pass<'_>, tokens: &Arc<[u32]>) -> Var {
        let x = ops::embedding(cx, self.embedding, tokens);
        let mut state = (x, None);
        for layer in &self.layers {
            state = layer.pass(cx, self.block, pass, state);
        }
        self.block.normed(cx, state, self.norm, cx.store.dtype(self.head)).1
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
        let mut embedded = ops::embedding(cx, self.embedding, tokens);
        let mut h = h.clone();
        if detached {
            // new values on the tape, whose gradients nobody takes
            (embedded, h) = (cx.var(embedded.value), if k == 0 { cx.var(h.value) } else { h });
        }
        let embedded = ops::rmsnorm(cx, &embedded, m.enorm, self.block.eps, act);
        let state = ops::rmsnorm(cx, &h, m.hnorm, self.block.eps, act);
        let joined = ops::concat(cx, &embedded, &state);
        let x = ops::linear(cx, &joined, m.eh_proj, DType::F32);
        let state = m.layer.pass(cx, self.block, pass, (x, None));
        self.block.normed(cx, state, m.norm, cx.store.dtype(self.head)).1
    }
}

impl Block {
    /// The residual stream with the last block's output added, and its norm.
    fn normed(&self, cx: &mut Context<'_>, (x, delta): State, w: WeightId, dtype: DType) -> (Var, Var) {
        match delta {
            None => {
                let y = ops::rmsnorm(cx, &x, w, self.eps, dtype);
                (x, y)
            }
            Some(delta) => ops::add_rmsnorm(cx, &x, &delta, w, self.eps, dtype),
        }
    }
}

/// The residual stream and the output of the last block, not yet added to it: the addition is part of the next norm.
type State = (Var, Option<Var>);

impl Layer {
    fn new(config: &Config, layout: &mut Layout, index: usize) -> Self {
        let prefix = format!("model.layers.{index}");
        let input_norm = layout.one(format!("{prefix}.input_layernorm.weight"));
        let attention = Attention::new(config, layout, &format!("{prefix}.self_attn"));
        let post_norm = layout.one(format!("{prefix}.post_attention_layernorm.weight"));
        let mlp = format!("{prefix}.mlp");
        let ffn = match config.ffn(index) {
            FfnKind::Dense { .. } => {
                let (gate_up, down) = swiglu(layout, &mlp);
                Ffn::Dense { gate_up, down }
            }
            FfnKind::Moe(moe) => Ffn::new_moe(&moe, layout, &mlp),
        };
        Self { index, input_norm, attention, post_norm, ffn }
    }

    /// Forward; where the pass says so, with a tape that keeps of it only what goes in and what comes out.
    fn pass(&self, cx: &mut Context<'_>, block: Block, pass: &mut Pass<'_>, state: State) -> State {
        let Source::Rows(segments) = &pass.source else { return self.forward(cx, block, pass, state) };
        if pass.recompute == Recompute::None {
            return self.forward(cx, block, pass, state);
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
            let (x, out) = layer.forward(cx, block, pass, state);
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

    fn forward(&self, cx: &mut Context<'_>, net: Block, pass: &mut Pass<'_>, state: State) -> State {
        let act = self.attention.dtype(cx);
        let (x, y) = net.normed(cx, state, self.input_norm, act);
        let attended = self.attention.forward(cx, net, pass, &y, self.index);
        let act = self.ffn.dtype(cx);
        let (x, y) = ops::add_rmsnorm(cx, &x, &attended, self.post_norm, net.eps, act);
        let out = match &self.ffn {
            Ffn::Dense { gate_up, down } => ops::swiglu_ffn(cx, &y, *gate_up, *down, act),
            Ffn::Moe { weights, router } => {
                let (out, routed) =
                    ops::moe_ffn(cx, &y, *weights, router, &pass.borders, pass.balance_alpha, act);
                pass.balance_loss += f64::from(routed.balance_loss);
                pass.routes.push(routed.experts);
                pass.loads.push(ExpertLoad { layer: self.index, bias: weights.bias, counts: routed.counts });
                out
            }
        };
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
                        Query::Latent { a: one("q_a_proj"), norm: one("q_a_layernorm"), b: one("q_b_proj") }
                    }
                };
                let kv_a = one("kv_a_proj_with_mqa");
                let (kv_a_norm, kv_b) = (one("kv_a_layernorm"), one("kv_b_proj"));
                let latent = MlaWeights { kv_a_norm, kv_b, eps: LATENT_NORM_EPS as f32 };
                Attention::Mla { q, kv_a, latent, o: one("o_proj") }
            }
            AttentionKind::Gqa { .. } => {
                Attention::Gqa { q: one("q_proj"), k: one("k_proj"), v: one("v_proj"), o: one("o_proj") }
            }
        }
    }

    fn dtype(&self, cx: &Context<'_>) -> DType {
        match self {
            Attention::Mla { o, .. } | Attention::Gqa { o, .. } => cx.store.dtype(*o),
        }
    }

    fn forward(&self, cx: &mut Context<'_>, net: Block, pass: &mut Pass<'_>, y: &Var, layer: usize) -> Var {
        let act = self.dtype(cx);
        let rotary = pass.rotary.clone();
        let (attended, o) = match self {
            Attention::Mla { q, kv_a, latent, o } => {
                // before the queries: what reads the same input reads the same codes of it
                let kv_a = ops::linear(cx, y, *kv_a, act);
                let q = match q {
                    Query::Direct(w) => ops::linear(cx, y, *w, act),
                    Query::Latent { a, norm, b } => {
                        let low = ops::linear(cx, y, *a, act);
                        let low = ops::rmsnorm(cx, &low, *norm, LATENT_NORM_EPS as f32, act);
                        ops::linear(cx, &low, *b, act)
                    }
                };
                let absorbed = matches!(pass.source, Source::Caches { latent: true, .. });
                let keys = pass.source.keys(layer);
                let attended = if absorbed {
                    let (q, kv_a) = (&q.value, &kv_a.value);
                    let out = ops::mla_absorbed(cx, q, kv_a, *latent, net.attention, &rotary, keys);
                    let out = out.converted(cx.cpu, act);
                    cx.var(out)
                } else {
                    ops::mla_attention(cx, &q, &kv_a, *latent, net.attention, &rotary, keys)
                };
                (attended, *o)
            }
            Attention::Gqa { q, k, v, o } => {
                let [q, k, v] = [q, k, v].map(|w| ops::linear(cx, y, *w, act));
                let keys = pass.source.keys(layer);
                (ops::gqa_attention(cx, [&q, &k, &v], net.attention, &rotary, keys), *o)
            }
        };
        ops::linear_of_kept(cx, &attended, o, act)
    }
}

impl Ffn {
    fn new_moe(moe: &MoeConfig, layout: &mut Layout, mlp: &str) -> Self {
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
        let weights = MoeWeights { router, bias, gate_up, down, shared };
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
            Ffn::Dense { down, .. } => cx.store.dtype(*down),
            Ffn::Moe { weights, .. } => cx.store.dtype(weights.down),
        }
    }
}
