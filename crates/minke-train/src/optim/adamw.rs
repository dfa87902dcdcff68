//! `AdamW` over the tensors that have it, neighbours of one kind together.

use minke_cpu::adamw::{AdamW, adamw};
use minke_cpu::{Cpu, DType, View, ViewMut};
use minke_model::Param;
use minke_num::bf16;
use minke_tensor::Grads;

use super::{Settings, Slot, cut, cut_mut, slots};

/// A stretch of the flat weights that is updated as one.
#[derive(Debug, Clone)]
struct Run {
    /// In the weights.
    range: std::ops::Range<usize>,
    /// First element in the moments.
    offset: usize,
    /// Whether weights decay: matrices do, vectors (gains) do not.
    decays: bool,
}

/// The tensors trained by `AdamW` and their two moments.
#[derive(Debug)]
pub struct Group {
    settings: Settings,
    slots: Vec<Slot>,
    runs: Vec<Run>,
    mean: Moment,
    square: Moment,
}

/// One moment of all elements.
#[derive(Debug)]
enum Moment {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Moment {
    fn zero(len: usize, dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
        }
    }

    fn view(&self) -> View<'_> {
        match self {
            Self::F32(x) => View::F32(x),
            Self::Bf16(x) => View::Bf16(x),
        }
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        match self {
            Self::F32(x) => ViewMut::F32(x),
            Self::Bf16(x) => ViewMut::Bf16(x),
        }
    }

    fn bytes(&self) -> usize {
        self.view().len() * self.view().dtype().size_bytes()
    }
}

impl Group {
    /// Fresh moments for these tensors.
    pub(super) fn new(settings: &Settings, chosen: &[(usize, &Param)], moments: DType) -> Self {
        let (slots, total) = slots(chosen);
        let mut runs: Vec<Run> = Vec::new();
        for (slot, (_, param)) in slots.iter().zip(chosen) {
            let decays = param.shape.len() >= 2;
            match runs.last_mut() {
                Some(run) if run.decays == decays && run.range.end == slot.range.start => {
                    run.range.end = slot.range.end;
                }
                _ => runs.push(Run { range: slot.range.clone(), offset: slot.offset, decays }),
            }
        }
        let (mean, square) = (Moment::zero(total, moments), Moment::zero(total, moments));
        Self { settings: *settings, slots, runs, mean, square }
    }

    /// The step with number `step`, from 1; see [`adamw`].
    pub(super) fn step(
        &mut self,
        cpu: &Cpu,
        step: u64,
        lr: f64,
        grad_scale: f32,
        data: &mut [f32],
        grads: &Grads<'_>,
    ) {
        let Settings { betas: [beta1, beta2], eps, weight_decay, .. } = self.settings;
        for Run { range, offset, decays } in &self.runs {
            let weight_decay = if *decays { weight_decay } else { 0.0 };
            let by = AdamW { lr, beta1, beta2, eps, weight_decay };
            let mut updated = range.start;
            for (part, grad) in grads.within(range.clone()) {
                assert_eq!(part.start, updated, "every weight that is trained has a gradient");
                updated = part.end;
                let state = offset + part.start - range.start..offset + part.end - range.start;
                let mean = self.mean.view_mut().part(state.clone());
                let square = self.square.view_mut().part(state);
                adamw(cpu, &by, step, grad_scale, &mut data[part], grad, mean, square);
            }
            assert_eq!(updated, range.end, "every weight that is trained has a gradient");
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.mean.bytes() + self.square.bytes()
    }

    pub(super) fn state(&self) -> Vec<(&'static str, usize, View<'_>)> {
        let mut all = cut("adamw.mean", &self.slots, self.mean.view());
        all.extend(cut("adamw.square", &self.slots, self.square.view()));
        all
    }

    pub(super) fn state_mut(&mut self) -> Vec<(&'static str, usize, ViewMut<'_>)> {
        let mut all = cut_mut("adamw.mean", &self.slots, self.mean.view_mut());
        all.extend(cut_mut("adamw.square", &self.slots, self.square.view_mut()));
        all
    }
}
