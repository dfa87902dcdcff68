//! Tensors without elements: the pool that they come from, and the tape.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use minke_cpu::DType;
use minke_cpu::arena::{Place, Places};
use minke_cpu::fp8::{Cuts, Fp8};

use super::{Shapes, Work};

/// Places of buffers, as the tensors' own.
pub(super) type Pool = Rc<RefCell<Places>>;

pub(super) struct Block {
    place: Place,
    pool: Pool,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.borrow_mut().give(self.place);
    }
}

/// A tensor without elements.
#[derive(Clone)]
pub(super) struct Tensor {
    /// Held for as long as the tensor is there.
    pub(super) block: Rc<Block>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: DType,
}

/// A tensor in FP8: a byte per element, and scales.
#[derive(Clone)]
pub(super) struct Tensor8 {
    #[expect(dead_code, reason = "its end is what counts")]
    pub(super) codes: Rc<Block>,
    #[expect(dead_code, reason = "its end is what counts")]
    pub(super) scales: Tensor,
    pub(super) rows: usize,
    pub(super) cuts: Cuts,
}

/// What a product reads, and how it waits for the way back.
#[derive(Clone)]
pub(super) enum Input {
    Plain(Tensor),
    Codes(Tensor8),
}

impl Input {
    pub(super) fn rows(&self) -> usize {
        match self {
            Input::Plain(x) => x.rows,
            Input::Codes(x) => x.rows,
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            Input::Plain(x) => x.cols,
            Input::Codes(x) => x.cuts.len,
        }
    }
}

/// Whose scales are powers of two whatever the weight says: activations that are coded twice.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scales {
    Usual,
    PowersOfTwo,
}

impl Scales {
    pub(super) fn of(self, how: Fp8) -> Fp8 {
        Fp8 { power_of_two: how.power_of_two || self == Scales::PowersOfTwo, ..how }
    }
}

#[derive(Clone)]
pub(super) struct Var {
    pub(super) value: Tensor,
    pub(super) id: usize,
}

#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub(super) id: usize,
    pub(super) cols: usize,
    pub(super) dtype: DType,
}

impl Var {
    pub(super) fn slot(&self) -> Slot {
        Slot { id: self.id, cols: self.value.cols, dtype: self.value.dtype }
    }
}

/// Gradients of weights, from the first micro-batch that adds to them on.
#[derive(Default)]
pub(super) struct WeightGrads {
    /// Whether there are any.
    pub(super) wanted: bool,
    /// Whether this is the first micro-batch.
    pub(super) first: bool,
    /// Whether the head is the embedding.
    pub(super) tied: bool,
    pub(super) all: Vec<Tensor>,
    pub(super) shared: [Option<Tensor>; 2],
}

impl WeightGrads {
    pub(super) fn bytes(&self) -> usize {
        self.all.iter().chain(self.shared.iter().flatten()).map(|grad| grad.block.place.bytes()).sum()
    }
}

/// Weights that several operations read.
#[derive(Clone, Copy)]
pub(super) enum Shared {
    Head,
    Embedding,
}

pub(super) type Step = Box<dyn FnOnce(&mut Walk)>;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Tracking {
    Tape,
    Checkpoint,
}

pub(super) struct Walk {
    pub(super) pool: Pool,
    pub(super) weight_grads: WeightGrads,
    pub(super) tracking: Tracking,
    pub(super) tape: Vec<Step>,
    pub(super) grads: Vec<Option<Tensor>>,
    /// The last activation that was coded: whoever reads the same one reads the same codes.
    pub(super) coded: Option<(Tensor, Fp8, Tensor8)>,
    pub(super) model: Rc<Shapes>,
    pub(super) n: usize,
    pub(super) work: HashMap<Work, u64>,
    pub(super) moved_bytes: u64,
}

impl Walk {
    pub(super) fn block(&mut self, rows: usize, row_bytes: usize) -> Rc<Block> {
        let bytes = (rows as u64).saturating_mul(row_bytes as u64).min(1 << 50);
        let place = self.pool.borrow_mut().take(bytes as usize);
        Rc::new(Block { place, pool: self.pool.clone() })
    }

    /// The gradient of a weight of so many elements, which has one operation.
    pub(super) fn weight_grad_of(&mut self, elements: usize) {
        if self.weight_grads.wanted && self.weight_grads.first {
            let grad = self.uninit(1, elements, DType::F32);
            self.weight_grads.all.push(grad);
        }
    }

    /// The gradient of a weight that several operations read.
    pub(super) fn shared_grad_of(&mut self, which: Shared) {
        let WeightGrads { wanted, tied, .. } = self.weight_grads;
        let which = if tied { Shared::Head } else { which } as usize;
        if wanted && self.weight_grads.shared[which].is_none() {
            let grad = self.uninit(self.model.config.vocab_size, self.model.config.hidden_size, DType::F32);
            self.weight_grads.shared[which] = Some(grad);
        }
    }

    pub(super) fn uninit(&mut self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let block = self.block(rows, cols * dtype.size_bytes());
        Tensor { block, rows, cols, dtype }
    }

    pub(super) fn recording(&self) -> bool {
        self.tracking == Tracking::Tape
    }

    pub(super) fn var(&mut self, value: Tensor) -> Var {
        self.grads.push(None);
        Var { value, id: self.grads.len() - 1 }
    }

    pub(super) fn record(&mut self, step: impl FnOnce(&mut Walk) + 'static) {
        if self.recording() {
            self.tape.push(Box::new(step));
        }
    }

    pub(super) fn take_grad(&mut self, of: Slot) -> Option<Tensor> {
        self.grads[of.id].take()
    }

    pub(super) fn add_grad(&mut self, of: Slot, grad: Tensor) {
        self.grads[of.id] = Some(match self.grads[of.id].take() {
            None => grad,
            Some(before) => {
                let sum = self.uninit(grad.rows, grad.cols, before.dtype);
                self.moves(&[&before, &grad, &sum]);
                sum
            }
        });
    }

    pub(super) fn unwind(&mut self) {
        self.coded = None;
        for step in std::mem::take(&mut self.tape).into_iter().rev() {
            step(self);
        }
    }

    pub(super) fn does(&mut self, work: Work) {
        *self.work.entry(work).or_default() += 1;
    }

    /// A pass over memory that reads or writes these.
    pub(super) fn moves(&mut self, tensors: &[&Tensor]) {
        self.moved_bytes +=
            tensors.iter().map(|t| (t.rows * t.cols * t.dtype.size_bytes()) as u64).sum::<u64>();
    }
}
