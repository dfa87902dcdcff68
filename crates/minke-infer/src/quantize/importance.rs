//! Importance matrix: the mean square of what each column of a linear layer reads.
//!
//! The output of `y = x Wᵀ` errs by `x (W - W')ᵀ`; where inputs are uncorrelated, its expected square is
//! `sum over columns of E[x^2] (w - w')^2`, so `E[x^2]` is what an error of a column weighs. It is measured by running the
//! model over a text, in pieces of 512 tokens.
//!
//! Of the keys of latent attention ([h, p] rows of `kv_b_proj`) there is a second one: GGUF has them turned over, so that
//! queries read their rows, and what errors weigh is the mean square of the queries, head by head.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use minke_cpu::Cpu;
use minke_model::spec::Role;
use minke_model::{Cache, DraftCache, DraftStep, Model, Step, Want};

use crate::engine::{Engine, EngineError};

/// Tokens of a piece.
const PIECE: usize = 512;
/// Tokens of a call of the model: there are logits of all of them.
const CHUNK: usize = 64;
/// An expert that fewer tokens came to is taken for all experts of its layer together.
const FEWEST_ROWS: u64 = 128;

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum ImportanceError {
    /// There is nothing to read.
    #[error("expected a text of at least 2 tokens, got {tokens}")]
    NoText {
        /// Tokens in it.
        tokens: usize,
    },
    /// The model cannot read it.
    #[error(transparent)]
    Model(#[from] EngineError),
}

/// How much errors of columns matter, by the published names of tensors.
#[derive(Debug, Clone, Default)]
pub struct Importance {
    tensors: BTreeMap<String, Vec<f32>>,
    /// Of keys that are turned over, [h, p].
    keys: BTreeMap<String, Vec<f32>>,
    /// Tokens read.
    pub tokens: usize,
    /// Tokens that came to each expert, by layer with experts.
    pub layers: Vec<LayerRows>,
}

/// What the experts of a layer read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRows {
    /// The layer.
    pub layer: usize,
    /// Tokens that came to each expert.
    pub rows: Vec<u64>,
}

/// An expert that few tokens came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertRows {
    /// Its layer.
    pub layer: usize,
    /// Which it is.
    pub expert: usize,
    /// Tokens that came to it.
    pub rows: u64,
}

impl Importance {
    /// Runs the model over the tokens of a text, in pieces that each begin with `bos`; `on_progress` gets tokens done and all tokens, and may end it: then there is nothing.
    ///
    /// # Errors
    /// The text is too short, or the model cannot read it.
    pub fn measure(
        model: &mut Model,
        cpu: &Cpu,
        bos: Option<u32>,
        tokens: &[u32],
        on_progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Self>, ImportanceError> {
        if tokens.len() < 2 {
            return Err(ImportanceError::NoText { tokens: tokens.len() });
        }
        model.params.watch_inputs(true);
        let read = read(model, cpu, bos, tokens, on_progress);
        let found = match read {
            Ok(ControlFlow::Continue(())) => Some(Self::of(model, tokens.len())),
            Ok(ControlFlow::Break(())) => None,
            Err(error) => {
                model.params.watch_inputs(false);
                return Err(error.into());
            }
        };
        model.params.watch_inputs(false);
        Ok(found)
    }

    /// What the weights of a model have read.
    fn of(model: &Model, tokens: usize) -> Self {
        let mut found = Self { tokens, ..Self::default() };
        for (id, entries) in &model.params.weights {
            if let (Some(sums), &[entry]) = (model.params.queries(*id), &entries[..]) {
                let heads = (0..sums.rows.len()).filter_map(|head| sums.mean_squares(head));
                found.keys.insert(model.params.entries[entry].name.clone(), heads.flatten().collect());
            }
            let Some(sums) = model.params.inputs(*id) else { continue };
            let groups = sums.rows.len();
            let parts = entries.len() / groups.max(1);
            let together = sums.mean_square_of_all();
            for (at, &entry) in entries.iter().enumerate() {
                let entry = &model.params.entries[entry];
                let group = at / parts.max(1);
                let few = groups > 1 && sums.rows[group] < FEWEST_ROWS;
                let own = if few { None } else { sums.mean_squares(group) };
                if let Some(columns) = own.or_else(|| together.clone()) {
                    found.tensors.insert(entry.name.clone(), columns);
                }
            }
            // gate and up of the experts see what the router sends
            let first = entries.first().map(|&entry| &model.params.entries[entry]);
            if let Some(layer) =
                first.filter(|_| parts == 2).and_then(|entry| expert_layer(&entry.name, entry.role))
            {
                found.layers.push(LayerRows { layer, rows: sums.rows.clone() });
            }
        }
        found.layers.sort_by_key(|layer| layer.layer);
        found
    }

    /// What errors of the columns of a tensor weigh; `None` for one that nothing was seen of.
    pub fn of_tensor(&self, name: &str) -> Option<&[f32]> {
        self.tensors.get(name).map(Vec::as_slice)
    }

    /// What errors of the keys in a `kv_b_proj` weigh where queries read them: [h, p].
    pub fn of_keys(&self, name: &str) -> Option<&[f32]> {
        self.keys.get(name).map(Vec::as_slice)
    }

    /// Tensors that something was seen of, keys that are turned over apart.
    pub fn len(&self) -> usize {
        self.tensors.len() + self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Experts that so few tokens came to that their layer stands for them.
    pub fn rare_experts(&self) -> impl Iterator<Item = ExpertRows> {
        self.layers.iter().flat_map(|LayerRows { layer, rows }| {
            let expert = |(expert, &rows)| ExpertRows { layer: *layer, expert, rows };
            rows.iter().enumerate().map(expert).filter(|expert| expert.rows < FEWEST_ROWS)
        })
    }
}

/// Reads all tokens, in pieces that each begin as a text does.
fn read(
    model: &mut Model,
    cpu: &Cpu,
    bos: Option<u32>,
    tokens: &[u32],
    on_progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, EngineError> {
    let engine = Engine::new(model, cpu, None);
    let own = PIECE.min(engine.context()).saturating_sub(usize::from(bos.is_some())).max(1);
    let texts = || tokens.chunks(own).map(|piece| bos.into_iter().chain(piece.iter().copied()).collect());
    for text in texts() {
        let text: Vec<u32> = text;
        engine.check_tokens(&text)?;
    }
    let mut done = 0;
    for (text, piece) in texts().zip(tokens.chunks(own)) {
        if on_progress(done, tokens.len()).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        read_text(model, cpu, &text);
        done += piece.len();
    }
    let _ = on_progress(done, tokens.len());
    Ok(ControlFlow::Continue(()))
}

/// Reads a text: model and head all tokens, and prediction modules each state with the tokens behind it.
fn read_text(model: &mut Model, cpu: &Cpu, text: &[u32]) {
    let (mut cache, mut modules) = (Cache::new(model), DraftCache::of_modules(model));
    for (at, chunk) in text.chunks(CHUNK).enumerate().map(|(i, chunk)| (i * CHUNK, chunk)) {
        let mut steps = [Step { tokens: chunk, cache: &mut cache, want: Want::All }];
        let mut states = model.infer_whole(cpu, &mut steps, !modules.is_empty()).states;
        for (k, cache) in modules.iter_mut().enumerate() {
            let position = at + k + 1;
            let tokens = &text[position.min(text.len())..text.len().min(position + chunk.len())];
            if tokens.is_empty() {
                break;
            }
            states.truncate(tokens.len() * model.config.hidden_size);
            states =
                model.draft(cpu, k, &mut [DraftStep { states: &states, tokens, position, cache }]).states;
        }
    }
}

/// The layer of an expert's tensor.
fn expert_layer(name: &str, role: Role) -> Option<usize> {
    let Role::ExpertLinear { .. } = role else { return None };
    name.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
}
