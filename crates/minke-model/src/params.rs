//! The weights of a model: published names over one flat store.

use std::collections::{HashMap, HashSet};
use std::ops::{Deref, DerefMut, Range};

use minke_cpu::DType;
use minke_cpu::fp8::Fp8;
use minke_cpu::stored::{Stored, StoredWeight};
use minke_num::rng;
use minke_tensor::{Made, Stack, Store, WeightId};

use crate::config::Config;
use crate::spec::{self, Role, TensorSpec};

/// What products compute in, by role. Norms, biases and an untied embedding are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Dense and shared feed-forward blocks, and the projection of MTP modules.
    pub linear: DType,
    /// Routed experts.
    pub expert: DType,
    /// Projections of the attention, and its queries, keys and values.
    pub attention: DType,
    /// The output head, and the embedding when they are tied.
    pub head: DType,
    /// The router.
    pub router: DType,
    /// Which of these products are in FP8; their activations have the dtype above.
    pub coded: Coded,
}

/// Roles whose products are in FP8. Embedding, head, router, norms and the inner products of attention never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Coded {
    /// Dense and shared feed-forward blocks, and the projection of MTP modules.
    pub linear: bool,
    /// Routed experts.
    pub expert: bool,
    /// Projections of the attention.
    pub attention: bool,
    /// How numbers become codes.
    pub how: Fp8,
}

impl Coded {
    /// Whether any product is in FP8.
    pub fn any(&self) -> bool {
        self.linear || self.expert || self.attention
    }

    /// Whether an output row depends on other rows of its call: one scale for all of them.
    pub fn couples_rows(&self) -> bool {
        self.any() && self.how.per_tensor
    }

    /// How a tensor's products are coded.
    pub fn of(&self, role: Role) -> Option<Fp8> {
        let coded = match role {
            Role::AttentionLinear => self.attention,
            Role::FfnLinear | Role::MtpProjection => self.linear,
            Role::ExpertLinear { .. } => self.expert,
            Role::Embedding | Role::Head | Role::Norm | Role::Bias | Role::Router | Role::RouterBias => false,
        };
        coded.then_some(self.how)
    }
}

impl Precision {
    /// One dtype for all products but the router's, which stays f32.
    pub fn uniform(dtype: DType) -> Self {
        Self {
            linear: dtype,
            expert: dtype,
            attention: dtype,
            head: dtype,
            router: DType::F32,
            coded: Coded::default(),
        }
    }

    /// bf16, and FP8 where DeepSeek-V3 has it: all linear layers but head and router.
    pub fn fp8(how: Fp8) -> Self {
        let coded = Coded { linear: true, expert: true, attention: true, how };
        Self { coded, ..Self::uniform(DType::Bf16) }
    }

    /// The dtype of a tensor's products, and of its storage in checkpoints.
    pub fn of(&self, role: Role, tied: bool) -> DType {
        match role {
            Role::Embedding if tied => self.head,
            Role::Embedding | Role::Norm | Role::Bias | Role::RouterBias => DType::F32,
            Role::Head => self.head,
            Role::AttentionLinear => self.attention,
            Role::FfnLinear | Role::MtpProjection => self.linear,
            Role::ExpertLinear { .. } => self.expert,
            Role::Router => self.router,
        }
    }
}

/// One published tensor and where it lies in the flat buffer.
#[derive(Clone, Debug)]
pub struct Param {
    /// The key in checkpoints.
    pub name: String,
    /// Outermost axis first; linear weights are [out, in].
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// Where it lies in `data`; empty where there are only codes of it.
    pub range: Range<usize>,
    /// What products with it compute in, and what checkpoints store it in.
    pub dtype: DType,
}

/// All weights. Derefs to the [`Store`], so `params.data` is the flat buffer.
pub struct Params {
    /// The published tensors, in the order of [`spec::tensors`].
    pub entries: Vec<Param>,
    /// Weights of which there are only codes, and the entries whose tensors they are of.
    pub(crate) coded: Vec<(WeightId, Vec<usize>)>,
    /// All weights, and the entries whose tensors they are of: those of a group one after the other.
    pub weights: Vec<(WeightId, Vec<usize>)>,
    /// The entries whose tensors run from where they are stored, and their bytes there or, where products read a copy, in it.
    pub(crate) stored: HashMap<usize, usize>,
    store: Store,
}

impl Deref for Params {
    type Target = Store;
    fn deref(&self) -> &Store {
        &self.store
    }
}

impl DerefMut for Params {
    fn deref_mut(&mut self) -> &mut Store {
        &mut self.store
    }
}

impl Params {
    /// Draws fresh weights: normal with `initializer_range`, gains one, biases zero.
    pub(crate) fn randomize(&mut self, config: &Config, seed: u64) {
        let Self { entries, store, .. } = self;
        for (stream, entry) in entries.iter().enumerate() {
            let out = &mut store.data[entry.range.clone()];
            match entry.role {
                Role::Norm => out.fill(if config.norm_offset { 0.0 } else { 1.0 }),
                Role::Bias | Role::RouterBias => out.fill(0.0),
                Role::Embedding
                | Role::Head
                | Role::AttentionLinear
                | Role::FfnLinear
                | Role::ExpertLinear { .. }
                | Role::Router
                | Role::MtpProjection => {
                    rng::fill_normal(seed, stream as u64, config.initializer_range as f32, out);
                }
            }
        }
    }

    /// The bytes that products read of entry `index`, if it runs from where it is stored.
    pub fn stored_bytes(&self, index: usize) -> Option<usize> {
        self.stored.get(&index).copied()
    }

    /// The index of an entry by name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }
}

/// What is kept of weights that shall only run.
#[derive(Default)]
pub(crate) struct Keep {
    /// Tensors that run from where they are stored.
    pub stored: HashMap<String, Stored>,
    /// Matrices that are put together of what is stored, when a product wants them.
    pub made: HashMap<String, Made>,
    /// Their codes and nothing else.
    pub only_codes: bool,
    /// Tensors whose products are not in FP8 although those of their role are.
    pub plain: HashSet<String>,
}

impl Keep {
    /// The matrices of a weight, if all of them run from where they are stored, together: products multiply the same of them.
    fn stored_parts(&self, names: &[String]) -> Option<Vec<Stored>> {
        let parts: Vec<Stored> =
            names.iter().map(|name| self.stored.get(name).cloned()).collect::<Option<_>>()?;
        let alike = |part: &Stored| part.multiplied() == parts[0].multiplied();
        parts.iter().all(alike).then_some(parts)
    }
}

/// Lays tensors out in a store. Tensors that one product reads together (gate and up; all experts of a layer) are put
/// next to each other and become one weight.
pub(crate) struct Layout {
    keep: Keep,
    coded: Vec<(WeightId, Vec<usize>)>,
    weights: Vec<(WeightId, Vec<usize>)>,
    stored: HashMap<usize, usize>,
    specs: HashMap<String, (usize, TensorSpec)>,
    entries: Vec<Option<Param>>,
    store: Store,
    precision: Precision,
    tied: bool,
}

impl Layout {
    pub fn new(config: &Config, precision: Precision, keep: Keep) -> Self {
        let specs: Vec<TensorSpec> = spec::tensors(config);
        Self {
            keep,
            coded: Vec::new(),
            weights: Vec::new(),
            stored: HashMap::new(),
            entries: vec![None; specs.len()],
            specs: specs.into_iter().enumerate().map(|(i, spec)| (spec.name.clone(), (i, spec))).collect(),
            store: Store::default(),
            precision,
            tied: config.tie_word_embeddings,
        }
    }

    /// Adds the named tensors as one weight of `groups` groups, stacked in the order given.
    pub fn weight(&mut self, groups: usize, names: &[String]) -> WeightId {
        let start = self.store.data.len();
        let (mut at, mut cols, mut dtype, mut fp8) = (start, 1, DType::F32, None);
        let plain = names.iter().any(|name| self.keep.plain.contains(name));
        let mut indices = Vec::with_capacity(names.len());
        for name in names {
            let (index, spec) = self.specs.get(name).expect("the model asks for tensors of its own table");
            dtype = self.precision.of(spec.role, self.tied);
            fp8 = self.precision.coded.of(spec.role).filter(|_| !plain);
            indices.push(*index);
            cols = spec.shape.last().copied().unwrap_or(1);
            let range = at..at + spec.numel();
            at = range.end;
            let (name, shape, role) = (spec.name.clone(), spec.shape.clone(), spec.role);
            self.entries[*index] = Some(Param { name, shape, role, range, dtype });
        }
        if let Some(parts) = self.keep.stored_parts(names) {
            for &index in &indices {
                self.entries[index].as_mut().expect("placed above").range = start..start;
            }
            self.stored.extend(indices.iter().copied().zip(parts.iter().map(|part| part.bytes.len())));
            let id = self.store.add_stored(StoredWeight::new(groups, parts), dtype, fp8);
            self.weights.push((id, indices));
            return id;
        }
        if let [name] = names
            && let Some(made) = self.keep.made.remove(name)
        {
            let entry = self.entries[indices[0]].as_mut().expect("placed above");
            entry.range = start..start;
            self.stored.insert(indices[0], (at - start) * dtype.size_bytes());
            let id = self.store.add_made((at - start) / cols, cols, dtype, made);
            self.weights.push((id, indices));
            return id;
        }
        let shape = Stack { groups, parts: names.len() / groups, rows: (at - start) / groups / cols, cols };
        if let Some(how) = fp8.filter(|_| self.keep.only_codes) {
            for &index in &indices {
                self.entries[index].as_mut().expect("placed above").range = start..start;
            }
            let id = self.store.add_codes(shape, dtype, how);
            self.coded.push((id, indices.clone()));
            self.weights.push((id, indices));
            return id;
        }
        let id = self.store.add_stacked(shape, dtype, fp8);
        self.weights.push((id, indices));
        id
    }

    /// What products with a weight compute in.
    pub fn dtype(&self, id: WeightId) -> DType {
        self.store.dtype(id)
    }

    /// Adds one tensor as one weight.
    pub fn one(&mut self, name: impl Into<String>) -> WeightId {
        self.weight(1, &[name.into()])
    }

    pub fn finish(self) -> Params {
        let entries =
            self.entries.into_iter().map(|e| e.expect("the model places every tensor of its table"));
        let Self { coded, weights, stored, store, .. } = self;
        Params { entries: entries.collect(), coded, weights, stored, store }
    }
}
