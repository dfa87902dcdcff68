//! Drafts: what prediction modules take to be the tokens behind the next one.

use std::sync::Arc;

use minke_cpu::attention::KvCache;
use minke_cpu::{Cpu, copy};
use minke_tensor::{Context, Tensor, ops};

use crate::forward::{Model, Pass, Source};

/// Keys and values of one sequence in a prediction module.
///
/// It need not hold all positions: a draft from fewer is a worse guess and nothing else, for what is drafted is verified.
#[derive(Clone)]
pub struct DraftCache([KvCache; 1]);

impl DraftCache {
    /// Empty caches, one for each of the model's prediction modules.
    pub fn of_modules(model: &Model) -> Vec<Self> {
        let shape = &model.config.attention_shape();
        let cache = |_: &_| Self([KvCache::new(shape, model.precision.attention)]);
        model.net.mtp.iter().map(cache).collect()
    }

    /// Memory that [`PAGE`](crate::PAGE) rows take in all of the model's prediction modules.
    pub fn page_bytes(model: &Model) -> usize {
        let shape = &model.config.attention_shape();
        model.net.mtp.len() * KvCache::block_bytes(shape, model.precision.attention)
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

/// Rows of one sequence for module k: row i has the token of position p + i and the state of position p + i - k - 1,
/// and says what may come at p + i + 1.
pub struct DraftStep<'a> {
    /// States after the final norm [rows, d], or, for all modules but the first, what the one before made of them.
    pub states: &'a [f32],
    /// The tokens [rows].
    pub tokens: &'a [u32],
    /// Position of the first token, p.
    pub position: usize,
    /// The rows so far; the new ones are appended.
    pub cache: &'a mut DraftCache,
}

/// What a module made of its rows.
pub struct Drafted {
    /// Logits of the last row of each step [steps, w].
    pub logits: Tensor,
    /// States of all rows after the module's norm [rows, d], for the next module.
    pub states: Vec<f32>,
}

impl Model {
    /// Runs rows through prediction module `k`, as training does: embedding of the token and state, each normed, joined
    /// and projected; a layer; the model's own head. Step k of a draft has module k, as in DeepSeek-V3 report,
    /// section 2.2; beyond the last, that is used once more in the place of the next one, with its own last state.
    ///
    /// # Panics
    /// When there is no such module, no step, a step without rows, or states and tokens do not fit.
    pub fn draft(&mut self, cpu: &Cpu, k: usize, steps: &mut [DraftStep<'_>]) -> Drafted {
        let d = self.config.hidden_size;
        let (mut tokens, mut positions, mut states) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sequences, mut last) = (Vec::new(), Vec::new());
        for step in steps {
            let (start, len) = (tokens.len(), step.tokens.len());
            assert!(len > 0 && step.states.len() == len * d, "draft: {} states of {d}", step.states.len());
            tokens.extend_from_slice(step.tokens);
            // the rotation of the token's place, as in training
            positions.extend((step.position..step.position + len).map(|p| p as u32));
            states.extend_from_slice(step.states);
            last.push((start + len - 1) as u32);
            sequences.push((start, len, &mut step.cache.0[..]));
        }
        let n = tokens.len();
        let first = self.config.num_hidden_layers + k;
        let source = Source::Caches { sequences, latent: false, first };
        let mut pass = Pass::new(self.net.rotary(positions.into()), source, Arc::new([0, n as u32]));
        let mut cx = Context::inference(cpu, &mut self.params);
        let dtype = cx.store.dtype(self.net.head.w);
        let h = cx.var(Tensor::from_f32(n, d, &states).converted(cpu, dtype));
        let h = self.net.mtp(&mut cx, &mut pass, k, &h, &tokens.into(), false);
        let mut rows = Tensor::uninit(last.len(), d, h.value.dtype());
        copy::take_rows(cpu, h.value.view(), d, &last, rows.view_mut());
        let head = self.net.head;
        let logits = cx.timed("head", |cx| ops::head_logits(cx, &rows, head));
        self.timers.merge(&cx.timers);
        Drafted { logits, states: h.value.to_vec() }
    }
}
