//! The forward pass, as a list of calls.

mod build;

use std::sync::Arc;

use minke_cpu::DType;
use minke_cpu::attention::{KvCache, Segment};
use minke_cpu::routing::RouterConfig;
use minke_cpu::swiglu::Gate;
use minke_tensor::ops::{self, AttentionWeights, HeadWeights, Keys, Linear, MlaWeights, MoeWeights, Norm};
use minke_tensor::{Context, Timers, Var, WeightId};

use crate::config::Config;
use crate::near::Near;
use crate::params::{Keep, Layout, Params, Precision};
use crate::rotary::{Rotaries, Tables};
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
    pub(crate) near: Near,
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

impl<'a> Pass<'a> {
    /// A pass that has collected nothing, without a loss of balance, that keeps all it makes.
    pub fn new(rotary: Rotaries, source: Source<'a>, borders: Arc<[u32]>) -> Self {
        Self {
            rotary,
            source,
            borders,
            balance_alpha: 0.0,
            recompute: Recompute::None,
            balance_loss: 0.0,
            loads: Vec::new(),
            routes: Vec::new(),
        }
    }
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
            near: Near::default(),
        }
    }

    /// Marks the packed copies of the weights as stale; to be called after every change of `params.data`.
    pub fn weights_changed(&mut self) {
        self.params.changed();
    }
}

impl Net {
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
    /// Forward; where the pass says so, with a tape that keeps of it only what goes in and what comes out.
    fn pass(&self, cx: &mut Context<'_>, pass: &mut Pass<'_>, state: State) -> State {
        let Source::Rows(segments) = &pass.source else { return self.forward(cx, pass, state) };
        if pass.recompute == Recompute::None {
            return self.forward(cx, pass, state);
        }
        // what the second time counts was counted the first time
        let mut aside = Pass {
            balance_alpha: pass.balance_alpha,
            recompute: pass.recompute,
            ..Pass::new(pass.rotary.clone(), Source::Rows(segments.clone()), pass.borders.clone())
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

impl Attention {
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
                let attended = match pass.source.keys(layer) {
                    Keys::Caches(caches) if absorbed => {
                        let (q, kv_a) = (&q.value, &kv_a.value);
                        let out = ops::mla_absorbed(cx, q, kv_a, *latent, shape, &rotary, caches);
                        cx.var(out)
                    }
                    keys => ops::mla_attention(cx, &q, &kv_a, *latent, shape, &rotary, keys),
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
    fn dtype(&self, cx: &Context<'_>) -> DType {
        match self {
            Ffn::Dense { down, .. } => cx.store.dtype(down.w),
            Ffn::Moe { weights, .. } => cx.store.dtype(weights.down),
        }
    }
}
