//! Drafts: what a prediction module takes to be the tokens behind the next one.

use std::sync::Arc;

use minke_cpu::attention::KvCache;
use minke_cpu::{Cpu, copy};
use minke_tensor::{Context, Tensor, ops};

use crate::forward::{Model, Pass, Source};

/// Keys and values of one sequence in the first prediction module.
///
/// It need not hold all positions: a draft from fewer is a worse guess and nothing else, for what is drafted is verified.
#[derive(Clone)]
pub struct DraftCache([KvCache; 1]);

impl DraftCache {
    /// An empty cache; `None` for a model without prediction modules.
    pub fn new(model: &Model) -> Option<Self> {
        let shape = &model.config.attention_shape();
        (!model.net.mtp.is_empty()).then(|| Self([KvCache::new(shape, model.precision.attention)]))
    }

    /// Memory that [`PAGE`](crate::PAGE) rows take; `None` for a model without prediction modules.
    pub fn page_bytes(model: &Model) -> Option<usize> {
        let shape = &model.config.attention_shape();
        (!model.net.mtp.is_empty()).then(|| KvCache::block_bytes(shape, model.precision.attention))
    }

    /// Rows held.
    pub fn len(&self) -> usize {
        self.0[0].len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all rows from `len` on.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.0[0].truncate(len);
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.0[0].bytes()
    }
}

/// Rows of one sequence for the module: row i has the state of position p + i and the token of position p + i + 1, and
/// says what may come at p + i + 2.
pub struct DraftStep<'a> {
    /// States after the final norm [rows, d], or what the module gave for the row before.
    pub states: &'a [f32],
    /// The tokens behind them [rows].
    pub tokens: &'a [u32],
    /// Position of the first state, p.
    pub position: usize,
    /// The rows so far; the new ones are appended.
    pub cache: &'a mut DraftCache,
}

/// What a module made of the last row of each step.
pub struct Drafted {
    /// Logits [steps, w].
    pub logits: Tensor,
    /// States after the module's norm [steps, d], for its next row.
    pub states: Vec<f32>,
}

impl Model {
    /// Runs rows through the first prediction module, as training does: embedding of the token and state, each normed,
    /// joined and projected; a layer; the model's own head. Drafting on from its own state, as DeepSeek-V3 report,
    /// section 2.2, has one module per step, is the module used once more in the place of the next one.
    ///
    /// # Panics
    /// When there is no module, no step, a step without rows, or states and tokens do not fit.
    pub fn draft(&mut self, cpu: &Cpu, steps: &mut [DraftStep<'_>]) -> Drafted {
        let d = self.config.hidden_size;
        let (mut tokens, mut positions, mut states) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sequences, mut last) = (Vec::new(), Vec::new());
        for step in steps {
            let (start, len) = (tokens.len(), step.tokens.len());
            assert!(len > 0 && step.states.len() == len * d, "draft: {} states of {d}", step.states.len());
            tokens.extend_from_slice(step.tokens);
            // the rotation of the token's place, as in training
            positions.extend((step.position + 1..step.position + 1 + len).map(|p| p as u32));
            states.extend_from_slice(step.states);
            last.push((start + len - 1) as u32);
            sequences.push((start, len, &mut step.cache.0[..]));
        }
        let n = tokens.len();
        let first = self.config.num_hidden_layers;
        let source = Source::Caches { sequences, latent: false, first };
        let mut pass = Pass::new(self.net.rotary(positions.into()), source, Arc::new([0, n as u32]));
        let mut cx = Context::inference(cpu, &mut self.params);
        let dtype = cx.store.dtype(self.net.head.w);
        let h = cx.var(Tensor::from_f32(n, d, &states).converted(cpu, dtype));
        let h = self.net.mtp(&mut cx, &mut pass, 0, &h, &tokens.into(), false);
        let mut rows = Tensor::uninit(last.len(), d, h.value.dtype());
        copy::take_rows(cpu, h.value.view(), d, &last, rows.view_mut());
        let head = self.net.head;
        let logits = cx.timed("head", |cx| ops::head_logits(cx, &rows, head));
        self.timers.merge(&cx.timers);
        Drafted { logits, states: rows.to_vec() }
    }
}
