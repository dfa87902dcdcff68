//! The surroundings of a pass: machine, weights, tape, timers.

use std::time::{Duration, Instant};

use minke_cpu::Cpu;
use minke_cpu::fp8::{Cuts, Fp8};

use crate::store::Store;
use crate::tensor::{Tensor, Tensor8};

/// A value that operations take and give; its number names its gradient on the tape.
#[derive(Clone)]
pub struct Var {
    /// The value.
    pub value: Tensor,
    id: usize,
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

/// What every operation takes first.
pub struct Context<'a> {
    /// The machine.
    pub cpu: &'a Cpu,
    /// The weights.
    pub store: &'a mut Store,
    /// Where the time went.
    pub timers: Timers,
    recording: bool,
    tape: Vec<Backward>,
    grads: Vec<Option<Tensor>>,
    /// The last activation that was coded in FP8: layers that read the same one read the same codes.
    coded: Option<(Tensor, Fp8, Tensor8)>,
}

impl<'a> Context<'a> {
    /// A context without a tape: operations keep nothing for a backward pass.
    pub fn inference(cpu: &'a Cpu, store: &'a mut Store) -> Self {
        let (tape, grads) = (Vec::new(), Vec::new());
        Self { cpu, store, timers: Timers::default(), recording: false, tape, grads, coded: None }
    }

    /// A context that records; gradients of weights are added to `store.grad`.
    pub fn training(cpu: &'a Cpu, store: &'a mut Store) -> Self {
        Self { recording: true, ..Self::inference(cpu, store) }
    }

    /// Whether calls are recorded for a backward pass.
    pub fn recording(&self) -> bool {
        self.recording
    }

    /// A new value on the tape.
    pub fn var(&mut self, value: Tensor) -> Var {
        self.grads.push(None);
        Var { value, id: self.grads.len() - 1 }
    }

    /// Adds a backward step; dropped without a tape.
    pub fn record(&mut self, backward: impl FnOnce(&mut Context<'_>) + 'static) {
        if self.recording {
            self.tape.push(Box::new(backward));
        }
    }

    /// Takes the gradient that later operations left for `var`.
    pub fn take_grad(&mut self, var: &Var) -> Option<Tensor> {
        self.grads[var.id].take()
    }

    /// Adds `grad` (of the value's shape) to the gradient of `var`.
    ///
    /// # Panics
    /// When shapes differ.
    pub fn add_grad(&mut self, var: &Var, grad: Tensor) {
        let shape = (var.value.rows(), var.value.cols());
        assert_eq!((grad.rows(), grad.cols()), shape, "add_grad: shape of gradient and value");
        self.grads[var.id] = Some(match self.grads[var.id].take() {
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
        self.coded = None;
        for step in std::mem::take(&mut self.tape).into_iter().rev() {
            step(self);
        }
        self.store.settle_grad();
    }

    /// Runs `f` and books its time under `name`.
    pub fn timed<T>(&mut self, name: &'static str, f: impl FnOnce(&mut Self) -> T) -> T {
        let start = Instant::now();
        let result = f(self);
        self.timers.add(name, start.elapsed());
        result
    }
}
