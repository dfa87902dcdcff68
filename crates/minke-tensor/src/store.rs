//! All weights of a model: one flat buffer of f32 masters, one of gradients, and packed copies for products.

use std::ops::Range;

use minke_cpu::gemm::{Compute, Packed};
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
    /// For y = x Wᵀ and for dx = dy W.
    packed: [Packed; 2],
    fresh: [bool; 2],
    /// Whether its gradient was written since it was last zero; until then what lies there is of an earlier step.
    summed: bool,
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
    /// Packed copies that large weights share while training: a step reads each once per direction, one after another.
    shared: [Shared; 2],
}

/// A packed copy and the weight that it is of.
#[derive(Default)]
struct Shared {
    of: Option<WeightId>,
    packed: Option<Packed>,
}

/// Elements above which a weight's packed copies are shared while training.
const SHARED_ELEMENTS: usize = 1 << 20;

impl Store {
    /// Adds a weight [groups, rows, cols] behind the others, zero. `dtype` is what products compute in.
    pub fn add(&mut self, groups: usize, rows: usize, cols: usize, dtype: DType) -> WeightId {
        let start = self.data.len();
        self.data.resize(start + groups * rows * cols, 0.0);
        let range = start..self.data.len();
        let packed = [Packed::empty(), Packed::empty()];
        self.weights.push(Weight {
            range,
            groups,
            rows,
            cols,
            dtype,
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
            shared.of = None;
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

    /// The weight packed for y = x Wᵀ.
    pub fn forward(&mut self, cpu: &Cpu, id: WeightId) -> &Packed {
        self.packed(cpu, id, 0)
    }

    /// The weight packed for dx = dy W.
    pub fn backward(&mut self, cpu: &Cpu, id: WeightId) -> &Packed {
        self.packed(cpu, id, 1)
    }

    fn packed(&mut self, cpu: &Cpu, id: WeightId, direction: usize) -> &Packed {
        let Weight { range, groups, rows, cols, dtype, packed, fresh, .. } = &mut self.weights[id.0];
        let w = View::F32(&self.data[range.clone()]);
        let (packed, fresh) = if range.len() > SHARED_ELEMENTS && !self.grad.is_empty() {
            let shared = &mut self.shared[direction];
            let fresh = shared.of.replace(id) == Some(id);
            (shared.packed.get_or_insert_with(Packed::empty), fresh)
        } else {
            let fresh = std::mem::replace(&mut fresh[direction], true);
            (&mut packed[direction], fresh)
        };
        if !fresh && direction == 0 {
            packed.pack_nt(cpu, w, *groups, *rows, *cols, compute(*dtype));
        } else if !fresh {
            packed.pack_nn(cpu, w, *groups, *rows, *cols, compute(*dtype));
        }
        packed
    }
}

/// The arithmetic of products with weights of this dtype.
pub(crate) fn compute(dtype: DType) -> Compute {
    match dtype {
        DType::F32 => Compute::F32,
        DType::Bf16 => Compute::Bf16,
    }
}
