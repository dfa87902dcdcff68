//! All weights of a model: one flat buffer of f32 masters, a gradient for each, and packed copies for products.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use crate::grads::Grads;
use crate::inputs::{InputSums, Inputs};
use crate::tensor::Tensor;
use minke_cpu::fp8::{Cuts, Fp8};
use minke_cpu::gemm::{Compute, Packed, Packed8, Weight8};
use minke_cpu::stored::{Multiplied, StoredWeight};
use minke_cpu::{Cpu, DType, View};

/// Names a weight of a [`Store`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightId(usize);

impl WeightId {
    pub(crate) fn index(self) -> usize {
        self.0
    }
}

/// Writes all numbers of a matrix, row by row, whenever they are wanted: of a matrix that no product can read as it lies.
pub type Made = Arc<dyn Fn(&mut [f32]) + Send + Sync>;

/// The shape of a weight [groups, rows, cols].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    /// One for a linear layer; an expert each.
    pub groups: usize,
    /// Matrices of equal size that are stacked in the rows of a group, such as gate and up.
    pub parts: usize,
    /// Outputs of a group.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// One weight [groups, rows, cols]; a linear layer has one group, the experts of a layer one each.
struct Weight {
    /// Where its elements are in `data`; empty where they are codes and nothing else.
    range: Range<usize>,
    /// Whether what products read for y = x Wᵀ, codes or a file, is all that there is of it: it runs and cannot be trained.
    only_runs: bool,
    groups: usize,
    rows: usize,
    cols: usize,
    dtype: DType,
    /// How products code it and what they multiply it by, if they are in FP8; activations are in `dtype` then.
    fp8: Option<Fp8>,
    /// Matrices that are stacked in the rows of a group.
    parts: usize,
    /// For y = x Wᵀ and for dx = dy W.
    packed: [Copy; 2],
    fresh: [bool; 2],
    /// What its packed copies are made of, where neither masters nor codes are kept.
    made: Option<Made>,
    /// Keys and values of heads, where latent attention runs in its absorbed form.
    absorbed: Option<Box<[Packed; 2]>>,
    /// Its gradient, if a backward pass came by since it was last zero.
    grad: Option<Tensor>,
}

impl Weight {
    /// The numbers of a weight that is made of them; none of others.
    fn make(&self) -> Vec<f32> {
        let Some(made) = &self.made else { return Vec::new() };
        let mut numbers = vec![0.0; self.rows * self.cols];
        made(&mut numbers);
        numbers
    }
}

/// A packed copy, in the form that the weight's products read; or where they read it without one.
enum Copy {
    Plain(Packed),
    Eight(Packed8),
    Stored(StoredWeight),
}

impl Copy {
    fn empty(fp8: Option<Fp8>) -> Self {
        if fp8.is_some() { Copy::Eight(Packed8::empty()) } else { Copy::Plain(Packed::empty()) }
    }

    fn bytes(&self) -> usize {
        match self {
            Copy::Plain(packed) => packed.bytes(),
            Copy::Eight(packed) => packed.bytes(),
            Copy::Stored(_) => 0,
        }
    }
}

/// What a product with a weight reads.
#[derive(Clone, Copy)]
pub enum PackedWeight<'a> {
    /// f32, or bf16.
    Plain(&'a Packed),
    /// FP8.
    Eight(&'a Packed8),
    /// As it lies in a file.
    Stored(&'a StoredWeight),
}

/// Weights, gradients and packed copies. Optimizers see the flat weights and a gradient for each; products see packed
/// operands that are made again, once, after each change of the weights.
///
/// A gradient exists from its backward pass to the end of the step, in memory that values of the pass have left: the most
/// that a step holds is about the larger of both, not their sum.
#[derive(Default)]
pub struct Store {
    /// The f32 masters of all weights.
    pub data: Vec<f32>,
    weights: Vec<Weight>,
    /// Whether gradients are asked for.
    trains: bool,
    any_fp8: bool,
    /// Packed copies that large weights share while training: a step reads each once per direction, one after another.
    shared: [Shared; 2],
    /// What products forward have read, if somebody wants to know.
    inputs: Option<Box<Inputs>>,
}

/// A packed copy and the weight that it is of; one for each form.
#[derive(Default)]
struct Shared {
    of: [Option<WeightId>; 2],
    packed: [Option<Copy>; 2],
}

/// Elements above which a weight's packed copies are shared while training.
const SHARED_ELEMENTS: usize = 1 << 20;

impl Store {
    /// Adds a weight [groups, rows, cols] behind the others, zero. `dtype` is what products compute in.
    pub fn add(&mut self, groups: usize, rows: usize, cols: usize, dtype: DType) -> WeightId {
        self.add_stacked(Stack { groups, parts: 1, rows, cols }, dtype, None)
    }

    /// Like [`Store::add`], with products in FP8 if `fp8` says how.
    pub fn add_stacked(&mut self, shape: Stack, dtype: DType, fp8: Option<Fp8>) -> WeightId {
        let start = self.data.len();
        self.data.resize(start + shape.groups * shape.rows * shape.cols, 0.0);
        self.push(start..self.data.len(), shape, dtype, fp8, false)
    }

    /// Like [`Store::add_stacked`] with products in FP8, for a weight that only runs: it has no elements in `data`, and
    /// one byte for each in its packed copy, which [`Store::set_codes`] makes.
    pub fn add_codes(&mut self, shape: Stack, dtype: DType, fp8: Fp8) -> WeightId {
        let end = self.data.len();
        self.push(end..end, shape, dtype, Some(fp8), true)
    }

    /// Adds a weight that only runs, from where it is stored; activations of its products are in `dtype`, and where it is
    /// stored in FP8 coded as `fp8` says.
    pub fn add_stored(&mut self, weight: StoredWeight, dtype: DType, fp8: Option<Fp8>) -> WeightId {
        let codes = weight.multiplied() == Multiplied::Codes;
        assert_eq!(codes, fp8.is_some(), "add_stored: codes are multiplied by codes, and nothing else is");
        let end = self.data.len();
        let shape = Stack { groups: weight.groups(), parts: 1, rows: weight.rows, cols: weight.cols };
        let id = self.push(end..end, shape, dtype, fp8, true);
        let Weight { packed, fresh, .. } = &mut self.weights[id.0];
        (packed[0], fresh[0]) = (Copy::Stored(weight), true);
        id
    }

    /// Adds a weight [rows, cols] that only runs, whose packed copy is made of numbers when a product first wants it.
    pub fn add_made(&mut self, rows: usize, cols: usize, dtype: DType, made: Made) -> WeightId {
        let end = self.data.len();
        let id = self.push(end..end, Stack { groups: 1, parts: 1, rows, cols }, dtype, None, true);
        self.weights[id.0].made = Some(made);
        id
    }

    /// All weights that run from where they lie in files.
    pub fn all_stored(&self) -> impl Iterator<Item = (WeightId, &StoredWeight)> {
        (0..self.weights.len()).map(WeightId).filter_map(|id| Some((id, self.stored(id)?)))
    }

    /// The weight as it lies in a file, if it runs from there.
    pub fn stored(&self, id: WeightId) -> Option<&StoredWeight> {
        match &self.weights[id.0].packed[0] {
            Copy::Stored(weight) => Some(weight),
            Copy::Plain(_) | Copy::Eight(_) => None,
        }
    }

    fn push(
        &mut self,
        range: Range<usize>,
        shape: Stack,
        dtype: DType,
        fp8: Option<Fp8>,
        only_runs: bool,
    ) -> WeightId {
        let Stack { groups, parts, rows, cols } = shape;
        let packed = [Copy::empty(fp8), Copy::empty(fp8)];
        self.any_fp8 |= fp8.is_some();
        let (fresh, grad) = ([false; 2], None);
        let (made, absorbed) = (None, None);
        let weight = Weight {
            range,
            only_runs,
            groups,
            rows,
            cols,
            dtype,
            fp8,
            parts,
            packed,
            fresh,
            made,
            absorbed,
            grad,
        };
        self.weights.push(weight);
        WeightId(self.weights.len() - 1)
    }

    /// Makes the packed copy of a weight of [`Store::add_codes`], of numbers that become codes.
    ///
    /// # Panics
    /// When the weight has elements in `data`, or another shape.
    pub fn set_codes(&mut self, cpu: &Cpu, id: WeightId, w: &[f32], how: Fp8) {
        let Weight { only_runs, groups, rows, cols, parts, packed, fresh, .. } = &mut self.weights[id.0];
        assert!(*only_runs, "set_codes: a weight with elements in `data`");
        let Copy::Eight(packed) = &mut packed[0] else {
            panic!("set_codes: a weight whose products are not in FP8")
        };
        let rows = Cuts::parts(*rows, *parts);
        packed.pack(cpu, Weight8 { w, how, groups: *groups, rows, cols: *cols }, true, false);
        fresh[0] = true;
    }

    /// Whether codes or files are all that there is of some weight, so that the model runs and cannot be trained or saved.
    pub fn only_runs(&self) -> bool {
        self.weights.iter().any(|weight| weight.only_runs)
    }

    /// All weights, in the order in which they were added.
    pub fn ids(&self) -> impl Iterator<Item = WeightId> + use<> {
        (0..self.weights.len()).map(WeightId)
    }

    /// Groups of the weight.
    pub fn groups(&self, id: WeightId) -> usize {
        self.weights[id.0].groups
    }

    /// The numbers of a group of the weight, made from its codes where it has nothing else.
    pub fn numbers(&self, id: WeightId, group: usize) -> Cow<'_, [f32]> {
        match &self.weights[id.0] {
            weight @ Weight { made: Some(_), .. } => weight.make().into(),
            Weight { only_runs: true, packed: [Copy::Eight(packed), _], .. } => packed.numbers(group).into(),
            Weight { only_runs: true, packed: [Copy::Stored(stored), _], rows, cols, .. } => {
                let mut all = vec![0.0; rows * cols];
                all.chunks_mut((*cols).max(1))
                    .enumerate()
                    .for_each(|(i, row)| stored.numbers_into(group, i, row));
                all.into()
            }
            weight => {
                let each = weight.rows * weight.cols;
                self.slice(id)[group * each..][..each].into()
            }
        }
    }

    /// Where the weight lies in `data`: nowhere, if codes are all that there is of it.
    pub fn range(&self, id: WeightId) -> Range<usize> {
        self.weights[id.0].range.clone()
    }

    /// What products with the weight compute in.
    pub fn dtype(&self, id: WeightId) -> DType {
        self.weights[id.0].dtype
    }

    /// How products with the weight code their operands, if they are in FP8.
    pub fn fp8(&self, id: WeightId) -> Option<Fp8> {
        self.weights[id.0].fp8
    }

    /// Whether any products are in FP8.
    pub fn any_fp8(&self) -> bool {
        self.any_fp8
    }

    /// How the outputs of the weight are cut into blocks.
    pub fn row_cuts(&self, id: WeightId) -> Cuts {
        Cuts::parts(self.rows(id), self.weights[id.0].parts)
    }

    /// Rows (outputs) of one group.
    pub fn rows(&self, id: WeightId) -> usize {
        self.weights[id.0].rows
    }

    /// Columns (inputs).
    pub fn cols(&self, id: WeightId) -> usize {
        self.weights[id.0].cols
    }

    /// Where the weight's elements lie.
    fn elements(&self, id: WeightId) -> Range<usize> {
        assert!(!self.weights[id.0].only_runs, "a weight that only runs has no elements in f32");
        self.range(id)
    }

    /// The weight's elements.
    ///
    /// # Panics
    /// When codes are all that there is of it; [`Store::numbers`] makes them.
    pub fn slice(&self, id: WeightId) -> &[f32] {
        &self.data[self.elements(id)]
    }

    /// The weight's elements beside its gradient, to be added to.
    ///
    /// # Panics
    /// When codes are all that there is of it.
    pub fn with_grad(&mut self, id: WeightId) -> (&[f32], &mut [f32]) {
        let range = self.elements(id);
        let grad = self.weights[id.0].grad.get_or_insert_with(|| Tensor::zeros(1, range.len(), DType::F32));
        (&self.data[range], grad.f32_mut())
    }

    /// The weight's gradient, to be written by a product, and whether the product adds to what is there.
    ///
    /// # Panics
    /// When codes are all that there is of the weight.
    pub fn grad_sum(&mut self, id: WeightId) -> (&mut [f32], bool) {
        let len = self.elements(id).len();
        let grad = &mut self.weights[id.0].grad;
        let summed = grad.is_some();
        (grad.get_or_insert_with(|| Tensor::uninit(1, len, DType::F32)).f32_mut(), summed)
    }

    /// The weight's gradient after a backward pass.
    ///
    /// # Panics
    /// When there was none.
    pub fn grad(&self, id: WeightId) -> &[f32] {
        let grad = self.weights[id.0].grad.as_ref();
        grad.expect("a gradient is there between a backward pass and `zero_grad`").f32()
    }

    /// The gradients that there are.
    pub fn grads(&self) -> Grads<'_> {
        grads(&self.weights)
    }

    /// All weights, to be moved, and the gradients that there are.
    pub fn data_and_grads(&mut self) -> (&mut [f32], Grads<'_>) {
        (&mut self.data, grads(&self.weights))
    }

    /// Bytes of the gradients that there are.
    pub fn grad_bytes(&self) -> usize {
        self.weights.iter().filter_map(|weight| weight.grad.as_ref()).map(Tensor::bytes).sum()
    }

    /// From now on sums up what products forward read ([`Store::inputs`]), from zero, or no longer does.
    pub fn watch_inputs(&mut self, watch: bool) {
        self.inputs = watch.then(Box::default);
    }

    /// What products forward with the weight have read since [`Store::watch_inputs`].
    pub fn inputs(&self, id: WeightId) -> Option<&InputSums> {
        self.inputs.as_ref()?.of(id)
    }

    /// What queries of latent attention have read since then of the keys in the weight, without what is rotated of them: a
    /// group for each head.
    pub fn queries(&self, id: WeightId) -> Option<&InputSums> {
        self.inputs.as_ref()?.of_queries(id)
    }

    /// Where inputs are to be noted, if they are.
    pub(crate) fn noted_inputs(&mut self) -> Option<&mut Inputs> {
        self.inputs.as_deref_mut()
    }

    /// Marks every packed copy as stale that is made of elements in `data`.
    pub fn changed(&mut self) {
        for weight in self.weights.iter_mut().filter(|weight| !weight.only_runs) {
            weight.fresh = [false; 2];
            weight.absorbed = None;
        }
        for shared in &mut self.shared {
            shared.of = [None; 2];
        }
    }

    /// Makes all gradients zero, which is to have none: the next backward pass writes them anew.
    ///
    /// # Panics
    /// When codes are all that there is of a weight.
    pub fn zero_grad(&mut self) {
        assert!(
            !self.only_runs(),
            "a model that was loaded to run, with weights in codes or files alone, cannot be trained"
        );
        self.trains = true;
        for weight in &mut self.weights {
            weight.grad = None;
        }
    }

    /// Whether somebody asked for gradients.
    pub fn trains(&self) -> bool {
        self.trains
    }

    /// Writes the zeros of gradients that nothing was added to.
    pub fn settle_grad(&mut self) {
        for weight in &mut self.weights {
            let len = weight.range.len();
            weight.grad.get_or_insert_with(|| Tensor::zeros(1, len, DType::F32));
        }
    }

    /// Memory of all packed copies.
    pub fn packed_bytes(&self) -> usize {
        let shared = self.shared.iter().flat_map(|shared| shared.packed.iter().flatten());
        let absorbed = self.weights.iter().flat_map(|weight| weight.absorbed.iter().flat_map(|both| &**both));
        self.weights.iter().flat_map(|weight| &weight.packed).chain(shared).map(Copy::bytes).sum::<usize>()
            + absorbed.map(Packed::bytes).sum::<usize>()
    }

    /// The weight packed for y = x Wᵀ.
    pub fn forward(&mut self, cpu: &Cpu, id: WeightId) -> PackedWeight<'_> {
        self.packed(cpu, id, 0)
    }

    /// The weight packed for dx = dy W.
    ///
    /// # Panics
    /// When codes are all that there is of it.
    pub fn backward(&mut self, cpu: &Cpu, id: WeightId) -> PackedWeight<'_> {
        self.packed(cpu, id, 1)
    }

    /// The weight packed for y = x Wᵀ, where products are not in FP8.
    ///
    /// # Panics
    /// When they are.
    pub fn plain_forward(&mut self, cpu: &Cpu, id: WeightId) -> &Packed {
        plain(self.forward(cpu, id))
    }

    /// The weight packed for dx = dy W, where products are not in FP8.
    ///
    /// # Panics
    /// When they are.
    pub fn plain_backward(&mut self, cpu: &Cpu, id: WeightId) -> &Packed {
        plain(self.backward(cpu, id))
    }

    /// The weight [h (p + v), c], in which p rows of keys and v rows of values follow each other for each head, packed for the
    /// absorbed form of latent attention: keys as right operands [h, p, c], values as [h, c, v]. Made at the first call, of
    /// numbers: a token's share of a head is too little to unpack codes for.
    ///
    /// # Panics
    /// When it has several groups, or rows that are no such heads.
    pub fn absorbed(&mut self, cpu: &Cpu, id: WeightId, p: usize, v: usize) -> [&Packed; 2] {
        if self.weights[id.0].absorbed.is_none() {
            let Weight { groups, rows, cols: c, dtype, .. } = self.weights[id.0];
            assert!(groups == 1 && rows % (p + v) == 0, "absorbed: heads of {p} and {v} in {rows} rows");
            let (heads, numbers) = (rows / (p + v), self.numbers(id, 0));
            let part = |rows: Range<usize>| -> Vec<f32> {
                let head = |head: &[f32]| head[rows.start * c..rows.end * c].to_vec();
                numbers.chunks_exact((p + v) * c).flat_map(head).collect()
            };
            let mut both = Box::new([Packed::empty(), Packed::empty()]);
            both[0].pack_nn(cpu, View::F32(&part(0..p)), heads, p, c, compute(dtype));
            both[1].pack_nt(cpu, View::F32(&part(p..p + v)), heads, v, c, compute(dtype));
            self.weights[id.0].absorbed = Some(both);
        }
        let [keys, values] = &**self.weights[id.0].absorbed.as_ref().expect("made above");
        [keys, values]
    }

    fn packed(&mut self, cpu: &Cpu, id: WeightId, direction: usize) -> PackedWeight<'_> {
        let training = self.trains;
        let made = if self.weights[id.0].fresh[direction] { Vec::new() } else { self.weights[id.0].make() };
        let Weight { range, only_runs, groups, rows, cols, dtype, fp8, parts, packed, fresh, .. } =
            &mut self.weights[id.0];
        assert!(
            !*only_runs || direction == 0 && (fresh[0] || !made.is_empty()),
            "a weight that only runs is packed forward, and once it has codes"
        );
        let w = if made.is_empty() { &self.data[range.clone()] } else { &made };
        let (packed, fresh) = if range.len() > SHARED_ELEMENTS && training {
            let (shared, form) = (&mut self.shared[direction], usize::from(fp8.is_some()));
            let fresh = shared.of[form].replace(id) == Some(id);
            (shared.packed[form].get_or_insert_with(|| Copy::empty(*fp8)), fresh)
        } else {
            let fresh = std::mem::replace(&mut fresh[direction], true);
            (&mut packed[direction], fresh)
        };
        match packed {
            Copy::Plain(packed) => {
                if !fresh && direction == 0 {
                    packed.pack_nt(cpu, View::F32(w), *groups, *rows, *cols, compute(*dtype));
                } else if !fresh {
                    packed.pack_nn(cpu, View::F32(w), *groups, *rows, *cols, compute(*dtype));
                }
                PackedWeight::Plain(packed)
            }
            Copy::Eight(packed) => {
                if !fresh {
                    let (how, rows) = (fp8.unwrap_or_default(), Cuts::parts(*rows, *parts));
                    let weight = Weight8 { w, how, groups: *groups, rows, cols: *cols };
                    // many rows pass in training: widened once
                    packed.pack(cpu, weight, direction == 0, training);
                }
                PackedWeight::Eight(packed)
            }
            Copy::Stored(weight) => PackedWeight::Stored(weight),
        }
    }
}

fn grads(weights: &[Weight]) -> Grads<'_> {
    let with = weights.iter().filter(|weight| !weight.range.is_empty());
    Grads::new(with.filter_map(|weight| Some((weight.range.start, weight.grad.as_ref()?.f32()))).collect())
}

fn plain(packed: PackedWeight<'_>) -> &Packed {
    match packed {
        PackedWeight::Plain(packed) => packed,
        PackedWeight::Eight(_) => panic!("a product in FP8 where there is none"),
        PackedWeight::Stored(_) => panic!("a packed copy of a weight that runs from its file"),
    }
}

/// The arithmetic of products with weights of this dtype.
pub(crate) fn compute(dtype: DType) -> Compute {
    match dtype {
        DType::F32 => Compute::F32,
        DType::Bf16 => Compute::Bf16,
    }
}
