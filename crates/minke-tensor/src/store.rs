//! All weights of a model: one flat buffer of f32 masters, one of gradients, and packed copies for products.

use std::ops::Range;

use minke_cpu::fp8::{Cuts, Fp8};
use minke_cpu::gemm::{Compute, Packed, Packed8, Weight8};
use minke_cpu::{Cpu, DType, View};

/// Names a weight of a [`Store`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightId(usize);

/// One weight [groups, rows, cols]; a linear layer has one group, the experts of a layer one each.
struct Weight {
    range: Range<usize>,
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
    /// Whether its gradient was written since it was last zero; until then what lies there is of an earlier step.
    summed: bool,
}

/// A packed copy, in the form that the weight's products read.
enum Copy {
    Plain(Packed),
    Eight(Packed8),
}

impl Copy {
    fn empty(fp8: Option<Fp8>) -> Self {
        if fp8.is_some() { Copy::Eight(Packed8::empty()) } else { Copy::Plain(Packed::empty()) }
    }

    fn bytes(&self) -> usize {
        match self {
            Copy::Plain(packed) => packed.bytes(),
            Copy::Eight(packed) => packed.bytes(),
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
}

/// Weights, gradients and packed copies. Optimizers see two flat slices; products see packed operands that are made
/// again, once, after each change of the weights.
#[derive(Default)]
pub struct Store {
    /// The f32 masters of all weights.
    pub data: Vec<f32>,
    /// Their gradients in the same order, after each backward pass; empty until training asks for them.
    pub grad: Vec<f32>,
    weights: Vec<Weight>,
    any_fp8: bool,
    /// Packed copies that large weights share while training: a step reads each once per direction, one after another.
    shared: [Shared; 2],
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
        self.add_stacked(groups, rows, cols, dtype, 1, None)
    }

    /// Like [`Store::add`]: rows of `parts` matrices of equal size, and products in FP8 if `fp8` says how.
    pub fn add_stacked(
        &mut self,
        groups: usize,
        rows: usize,
        cols: usize,
        dtype: DType,
        parts: usize,
        fp8: Option<Fp8>,
    ) -> WeightId {
        let start = self.data.len();
        self.data.resize(start + groups * rows * cols, 0.0);
        let range = start..self.data.len();
        let packed = [Copy::empty(fp8), Copy::empty(fp8)];
        self.any_fp8 |= fp8.is_some();
        self.weights.push(Weight {
            range,
            groups,
            rows,
            cols,
            dtype,
            fp8,
            parts,
            packed,
            fresh: [false; 2],
            summed: false,
        });
        WeightId(self.weights.len() - 1)
    }

    /// Where the weight lies in `data` and `grad`.
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

    /// The weight's elements.
    pub fn slice(&self, id: WeightId) -> &[f32] {
        &self.data[self.range(id)]
    }

    /// The weight's elements beside its gradient, to be added to.
    pub fn with_grad(&mut self, id: WeightId) -> (&[f32], &mut [f32]) {
        let range = self.range(id);
        if !std::mem::replace(&mut self.weights[id.0].summed, true) {
            self.grad[range.clone()].fill(0.0);
        }
        (&self.data[range.clone()], &mut self.grad[range])
    }

    /// The weight's gradient, to be written by a product, and whether the product adds to what is there.
    pub fn grad_sum(&mut self, id: WeightId) -> (&mut [f32], bool) {
        let range = self.range(id);
        let summed = std::mem::replace(&mut self.weights[id.0].summed, true);
        (&mut self.grad[range], summed)
    }

    /// Marks every packed copy as stale.
    pub fn changed(&mut self) {
        for weight in &mut self.weights {
            weight.fresh = [false; 2];
        }
        for shared in &mut self.shared {
            shared.of = [None; 2];
        }
    }

    /// Makes all gradients zero. Memory is not touched: the next product that sums one overwrites it, and
    /// [`Store::settle_grad`] does the rest.
    pub fn zero_grad(&mut self) {
        if self.grad.len() != self.data.len() {
            self.grad = vec![0.0; self.data.len()];
        }
        for weight in &mut self.weights {
            weight.summed = false;
        }
    }

    /// Writes the zeros of gradients that nothing was added to, after which `grad` is what it says.
    pub fn settle_grad(&mut self) {
        for weight in &mut self.weights {
            if !std::mem::replace(&mut weight.summed, true) {
                self.grad[weight.range.clone()].fill(0.0);
            }
        }
    }

    /// Memory of all packed copies.
    pub fn packed_bytes(&self) -> usize {
        let shared = self.shared.iter().flat_map(|shared| shared.packed.iter().flatten());
        self.weights.iter().flat_map(|weight| &weight.packed).chain(shared).map(Copy::bytes).sum()
    }

    /// The weight packed for y = x Wᵀ.
    pub fn forward(&mut self, cpu: &Cpu, id: WeightId) -> PackedWeight<'_> {
        self.packed(cpu, id, 0)
    }

    /// The weight packed for dx = dy W.
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

    fn packed(&mut self, cpu: &Cpu, id: WeightId, direction: usize) -> PackedWeight<'_> {
        let training = !self.grad.is_empty();
        let Weight { range, groups, rows, cols, dtype, fp8, parts, packed, fresh, .. } =
            &mut self.weights[id.0];
        let w = &self.data[range.clone()];
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
                    let (rows, how) = (Cuts::parts(*rows, *parts), fp8.unwrap_or_default());
                    let weight = Weight8 { w, groups: *groups, rows, cols: *cols, how };
                    // many rows pass in training: widened once
                    packed.pack(cpu, weight, direction == 0, training);
                }
                PackedWeight::Eight(packed)
            }
        }
    }
}

fn plain(packed: PackedWeight<'_>) -> &Packed {
    match packed {
        PackedWeight::Plain(packed) => packed,
        PackedWeight::Eight(_) => panic!("a product in FP8 where there is none"),
    }
}

/// The arithmetic of products with weights of this dtype.
pub(crate) fn compute(dtype: DType) -> Compute {
    match dtype {
        DType::F32 => Compute::F32,
        DType::Bf16 => Compute::Bf16,
    }
}
