//! The surroundings of a pass: machine, weights, tape, timers.

use std::time::{Duration, Instant};

use minke_cpu::fp8::{Cuts, Fp8};
use minke_cpu::{Cpu, DType};

use crate::store::Store;
use crate::tensor::{Memory, Tensor, Tensor8};

/// A value that operations take and give; its number names its gradient on the tape.
#[derive(Clone)]
pub struct Var {
    /// The value.
    pub value: Tensor,
    id: usize,
}

/// Where on the tape a value's gradient is, and what it looks like: all that a backward pass needs of a value that it
/// does not read.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    id: usize,
    rows: usize,
    /// Row length.
    pub cols: usize,
    /// The value's storage format.
    pub dtype: DType,
}

impl Var {
    /// The place of its gradient, without the value.
    pub fn slot(&self) -> Slot {
        let value = &self.value;
        Slot { id: self.id, rows: value.rows(), cols: value.cols(), dtype: value.dtype() }
    }
}

impl From<&Var> for Slot {
    fn from(var: &Var) -> Self {
        var.slot()
    }
}

type Backward = Box<dyn FnOnce(&mut Context<'_>)>;

/// Time spent per operation; forward and backward apart.
#[derive(Clone, Debug, Default)]
pub struct Timers {
    entries: Vec<(&'static str, Duration, u64)>,
}

impl Timers {
    /// Adds a span to `name`.
    pub fn add(&mut self, name: &'static str, span: Duration) {
        match self.entries.iter_mut().find(|(n, ..)| *n == name) {
            Some((_, total, calls)) => {
                *total += span;
                *calls += 1;
            }
            None => self.entries.push((name, span, 1)),
        }
    }

    /// Adds all spans of `other`.
    pub fn merge(&mut self, other: &Timers) {
        for &(name, span, calls) in &other.entries {
            self.add(name, span);
            if let Some(entry) = self.entries.iter_mut().find(|(n, ..)| *n == name) {
                entry.2 += calls - 1;
            }
        }
    }

    /// (operation, total time, calls), the longest first.
    pub fn table(&self) -> Vec<(&'static str, Duration, u64)> {
        let mut rows = self.entries.clone();
        rows.sort_by_key(|&(_, span, _)| std::cmp::Reverse(span));
        rows
    }
}

/// What a context does for a backward pass.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tracking {
    /// Nothing: there is none.
    Off,
    /// Operations write themselves on the tape.
    Tape,
    /// Operations write nothing: they are part of a checkpoint, and run again on the way back.
    Checkpoint,
}

/// What every operation takes first.
pub struct Context<'a> {
    /// The machine.
    pub cpu: &'a Cpu,
    /// The weights.
    pub store: &'a mut Store,
    /// Where the time went.
    pub timers: Timers,
    tracking: Tracking,
    tape: Vec<Backward>,
    grads: Vec<Option<Tensor>>,
    /// The last activation that was coded in FP8: layers that read the same one read the same codes.
    coded: Option<(Tensor, Fp8, Tensor8)>,
}

impl<'a> Context<'a> {
    /// A context without a tape: operations keep nothing for a backward pass.
    pub fn inference(cpu: &'a Cpu, store: &'a mut Store) -> Self {
        let (tape, grads) = (Vec::new(), Vec::new());
        Self { cpu, store, timers: Timers::default(), tracking: Tracking::Off, tape, grads, coded: None }
    }

    /// A context that records; gradients of weights are added to those of the store.
    pub fn training(cpu: &'a Cpu, store: &'a mut Store) -> Self {
        Self { tracking: Tracking::Tape, ..Self::inference(cpu, store) }
    }

    /// Whether calls are recorded for a backward pass.
    pub fn recording(&self) -> bool {
        self.tracking == Tracking::Tape
    }

    /// Whether a backward pass is to come, be this call itself recorded or run again for it.
    pub fn differentiated(&self) -> bool {
        self.tracking != Tracking::Off
    }

    /// A new value on the tape.
    pub fn var(&mut self, value: Tensor) -> Var {
        self.grads.push(None);
        Var { value, id: self.grads.len() - 1 }
    }

    /// Adds a backward step; dropped without a tape.
    pub fn record(&mut self, backward: impl FnOnce(&mut Context<'_>) + 'static) {
        if self.recording() {
            self.tape.push(Box::new(backward));
        }
    }

    /// Takes the gradient that later operations left for a value.
    pub fn take_grad(&mut self, of: impl Into<Slot>) -> Option<Tensor> {
        self.grads[of.into().id].take()
    }

    /// Adds `grad` (of the value's shape) to the gradient of a value.
    ///
    /// # Panics
    /// When shapes differ.
    pub fn add_grad(&mut self, of: impl Into<Slot>, grad: Tensor) {
        let Slot { id, rows, cols, .. } = of.into();
        assert_eq!((grad.rows(), grad.cols()), (rows, cols), "add_grad: shape of gradient and value");
        self.grads[id] = Some(match self.grads[id].take() {
            None => grad,
            Some(before) => {
                let mut sum = Tensor::uninit(grad.rows(), grad.cols(), before.dtype());
                minke_cpu::copy::add(self.cpu, before.view(), grad.view(), sum.view_mut());
                sum
            }
        });
    }

    /// `x` in FP8 with one scale per 128 columns.
    pub fn coded(&mut self, x: &Tensor, how: Fp8) -> Tensor8 {
        if let Some((of, by, codes)) = &self.coded
            && of.is(x)
            && *by == how
        {
            return codes.clone();
        }
        let codes = Tensor8::quantize(self.cpu, x, Cuts::whole(x.cols()), how);
        self.coded = Some((x.clone(), how, codes.clone()));
        codes
    }

    /// Runs the recorded steps, the last first. The tape is empty afterwards.
    pub fn backward(&mut self) {
        Memory::turns_back(self.store.grad_bytes());
        self.unwind();
        self.store.settle_grad();
    }

    fn unwind(&mut self) {
        self.coded = None;
        for step in std::mem::take(&mut self.tape).into_iter().rev() {
            step(self);
        }
    }

    /// Runs `first` and keeps of it nothing but `inputs` and its results; on the way back `again`, which must compute
    /// the same from the same inputs, is recorded on a tape of its own, and that tape gives the gradients. The bits
    /// are those of a run that records at once. Without a tape it is `first` alone.
    ///
    /// Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
    pub fn checkpoint<const I: usize, const O: usize>(
        &mut self,
        inputs: [Var; I],
        first: impl FnOnce(&mut Self, [Var; I]) -> [Var; O],
        again: impl FnOnce(&mut Context<'_>, [Var; I]) -> [Var; O] + 'static,
    ) -> [Var; O] {
        if !self.recording() {
            return first(self, inputs);
        }
        self.tracking = Tracking::Checkpoint;
        let outputs = first(self, inputs.clone());
        self.tracking = Tracking::Tape;
        let slots = outputs.each_ref().map(Var::slot);
        self.record(move |cx| {
            let grads = slots.map(|slot| cx.take_grad(slot));
            if grads.iter().all(Option::is_none) {
                return;
            }
            let outer = inputs.each_ref().map(Var::slot);
            let inner = inputs.map(|input| cx.var(input.value));
            let slots = inner.each_ref().map(Var::slot);
            let outputs = again(cx, inner).map(|output| output.slot());
            for (output, grad) in outputs.into_iter().zip(grads) {
                if let Some(grad) = grad {
                    cx.add_grad(output, grad);
                }
            }
            cx.unwind();
            for (outer, inner) in outer.into_iter().zip(slots) {
                if let Some(grad) = cx.take_grad(inner) {
                    cx.add_grad(outer, grad);
                }
            }
        });
        outputs
    }

    /// Runs `f` and books its time under `name`.
    pub fn timed<T>(&mut self, name: &'static str, f: impl FnOnce(&mut Self) -> T) -> T {
        let start = Instant::now();
        let result = f(self);
        self.timers.add(name, start.elapsed());
        result
    }
}
