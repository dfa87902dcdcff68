//! Inference: the forward pass over new tokens, with caches of what came before.

use std::sync::Arc;

use minke_cpu::attention::{AttentionShape, BLOCK, KvCache, KvFormat, KvPage};
use minke_cpu::{Cpu, DType, copy};
use minke_tensor::{Context, Tensor, ops};

use crate::config::{AttentionKind, Config};
use crate::forward::{Model, Pass, Source};
use crate::params::Precision;

/// Positions of a [`Page`].
pub const PAGE: usize = BLOCK;

/// What a cache keeps of a sequence, and in which form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheKind {
    /// Keys and values in the dtype that the model's attention computes in: the bits of training.
    #[default]
    Model,
    /// What the model needs to go on and no more, in the dtype that its attention computes in: latents if it has latent
    /// attention, else keys and values.
    Auto,
    /// Keys and values in this format. Another one than the model's is another model, and may give other bits.
    Expanded(KvFormat),
    /// Latents in this format, or in the dtype that the model's attention computes in, read by the absorbed form of latent
    /// attention: much smaller, and equal to the expanded form up to rounding. Only for models with latent attention.
    Latent(Option<KvFormat>),
}

impl CacheKind {
    /// An empty cache of a layer, and whether it is of latents; `None` for latents of a model without latent attention.
    fn layer(self, config: &Config, precision: &Precision) -> Option<(KvCache, bool)> {
        let (full, own) = (config.attention_shape(), KvFormat::from(precision.attention));
        let latent = |format| Some((KvCache::of_latents(&latent_shape(config)?, format), true));
        match self {
            CacheKind::Model => Some((KvCache::new(&full, own), false)),
            CacheKind::Auto => latent(own).or_else(|| Some((KvCache::new(&full, own), false))),
            CacheKind::Expanded(format) => Some((KvCache::new(&full, format), false)),
            CacheKind::Latent(format) => latent(format.unwrap_or(own)),
        }
    }

    /// Whether a cache of this kind is of latents, for a model that has them.
    pub fn is_latent(self, config: &Config) -> bool {
        match self {
            CacheKind::Model | CacheKind::Expanded(_) => false,
            CacheKind::Auto | CacheKind::Latent(_) => latent_shape(config).is_some(),
        }
    }

    /// Memory that [`PAGE`] positions take in all layers; `None` for latents of a model without latent attention.
    pub fn page_bytes(self, config: &Config, precision: &Precision) -> Option<usize> {
        let (layer, _) = self.layer(config, precision)?;
        Some(layer.bytes_per_block() * config.num_hidden_layers)
    }
}

/// Keys and values of one sequence, for every layer. Copies share their full pages.
#[derive(Clone)]
pub struct Cache {
    layers: Vec<KvCache>,
    latent: bool,
}

/// [`PAGE`] positions of a sequence in every layer, which caches of one kind and model share.
#[derive(Clone)]
pub struct Page(Box<[KvPage]>);

impl Page {
    /// Whether a cache holds it, beside whoever asks.
    pub fn is_shared(&self) -> bool {
        self.0.first().is_some_and(KvPage::is_shared)
    }
}

impl Cache {
    /// An empty cache of the model's own keys and values: with it, inference gives the bits of training.
    pub fn new(model: &Model) -> Self {
        Self::of_kind(model, CacheKind::Model).expect("every model has keys and values")
    }

    /// An empty cache of a kind; `None` for latents of a model without latent attention.
    pub fn of_kind(model: &Model, kind: CacheKind) -> Option<Self> {
        let (layer, latent) = kind.layer(&model.config, &model.precision)?;
        Some(Self { layers: vec![layer; model.net.layers.len()], latent })
    }

    /// Page `index`, if it is full.
    pub fn page(&self, index: usize) -> Option<Page> {
        self.layers.iter().map(|layer| layer.page(index)).collect::<Option<_>>().map(Page)
    }

    /// Appends a page of another cache of this kind and model.
    ///
    /// # Panics
    /// When the positions held are not whole pages, or it is of another kind or model.
    pub fn push_page(&mut self, page: &Page) {
        assert_eq!(self.layers.len(), page.0.len(), "cache page: layers");
        self.layers.iter_mut().zip(&page.0).for_each(|(layer, page)| layer.push_page(page));
    }

    /// Holds another's page instead of its own of the same tokens, which frees that one.
    ///
    /// # Panics
    /// When page `index` is not full, or it is of another kind or model.
    pub fn replace_page(&mut self, index: usize, page: &Page) {
        assert_eq!(self.layers.len(), page.0.len(), "cache page: layers");
        self.layers.iter_mut().zip(&page.0).for_each(|(layer, page)| layer.replace_page(index, page));
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, KvCache::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all positions from `len` on.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(len));
    }

    /// Memory held, shared pages included.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(KvCache::bytes).sum()
    }
}

/// The shape of attention over latents: one key head for all, whose values are the first part of its keys.
fn latent_shape(config: &Config) -> Option<AttentionShape> {
    let AttentionKind::Mla { kv_lora_rank: c, qk_rope_head_dim: r, .. } = config.attention else {
        return None;
    };
    Some(AttentionShape { kv_heads: 1, qk_dim: c + r, v_dim: c, ..config.attention_shape() })
}

/// Which rows of a step need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None: the step only fills the cache.
    None,
    /// The last row's.
    Last,
    /// All rows'.
    All,
}

/// New tokens of one sequence.
pub struct Step<'a> {
    /// They follow what is in the cache.
    pub tokens: &'a [u32],
    /// The sequence so far; the new tokens are appended.
    pub cache: &'a mut Cache,
    /// Which logits are wanted.
    pub want: Want,
}

/// What a call gave.
pub struct Inferred {
    /// The wanted logits [rows, w].
    pub logits: Tensor,
    /// The experts that each row was sent to, [rows, k] by layer with experts.
    pub routes: Vec<Arc<[u32]>>,
    /// The state after the final norm of every row of the call [n, d], or nothing.
    pub states: Vec<f32>,
}

impl Model {
    /// Runs new tokens of any number of sequences; returns the wanted logits [rows, w] in the order of steps and rows.
    ///
    /// A row's logits do not depend on what else is in the call, nor on how a sequence is cut into steps.
    ///
    /// # Panics
    /// When a token is outside the vocabulary or caches of several kinds are mixed.
    pub fn infer(&mut self, cpu: &Cpu, steps: &mut [Step<'_>]) -> Vec<f32> {
        self.infer_traced(cpu, steps).0.to_vec()
    }

    /// As [`Model::infer`], not copied, and with the experts that each row of the call was sent to: [rows, k] by layer with experts.
    ///
    /// # Panics
    /// As [`Model::infer`].
    pub fn infer_traced(&mut self, cpu: &Cpu, steps: &mut [Step<'_>]) -> (Tensor, Vec<Arc<[u32]>>) {
        let Inferred { logits, routes, .. } = self.infer_whole(cpu, steps, false);
        (logits, routes)
    }

    /// As [`Model::infer_traced`], and with the final states if `states` says so, from which prediction modules draft.
    ///
    /// # Panics
    /// As [`Model::infer`].
    pub fn infer_whole(&mut self, cpu: &Cpu, steps: &mut [Step<'_>], states: bool) -> Inferred {
        self.come_near(cpu);
        let (mut tokens, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        let kind = |cache: &Cache| (cache.latent, cache.layers.first().map(KvCache::format));
        let all = steps.first().map(|s| kind(s.cache)).unwrap_or_default();
        let latent = all.0;
        let mut sequences = Vec::new();
        for step in steps {
            assert_eq!(kind(step.cache), all, "infer: caches of one kind in a call");
            let (start, before, len) = (tokens.len(), step.cache.len(), step.tokens.len());
            tokens.extend_from_slice(step.tokens);
            positions.extend((before..before + len).map(|p| p as u32));
            let rows = match step.want {
                Want::None => 0,
                Want::Last => len.min(1),
                Want::All => len,
            };
            wanted.extend((start + len - rows..start + len).map(|r| r as u32));
            sequences.push((start, len, &mut step.cache.layers[..]));
        }
        let n = tokens.len();
        let source = Source::Caches { sequences, latent, first: 0 };
        let mut pass = Pass::new(self.net.rotary(positions.into()), source, Arc::new([0, n as u32]));
        let mut cx = Context::inference(cpu, &mut self.params);
        let h = self.net.trunk(&mut cx, &mut pass, &tokens.into());
        let states = if states { h.value.to_vec() } else { Vec::new() };
        if wanted.is_empty() {
            self.timers.merge(&cx.timers);
            let logits = Tensor::uninit(0, self.config.vocab_size, DType::F32);
            return Inferred { logits, routes: pass.routes, states };
        }
        let mut rows = Tensor::uninit(wanted.len(), h.value.cols(), h.value.dtype());
        copy::take_rows(cpu, h.value.view(), h.value.cols(), &wanted, rows.view_mut());
        let head = self.net.head;
        let logits = cx.timed("head", |cx| ops::head_logits(cx, &rows, head));
        self.timers.merge(&cx.timers);
        Inferred { logits, routes: pass.routes, states }
    }
}
