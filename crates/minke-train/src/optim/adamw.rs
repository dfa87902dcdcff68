//! `AdamW` over the tensors that have it, neighbours of one kind in one call.

use minke_cpu::Cpu;
use minke_cpu::adamw::{AdamW, adamw};
use minke_model::Param;

use super::{Settings, Slot, cut, cut_mut, slots};

/// A stretch of the flat weights that one kernel call updates.
#[derive(Debug, Clone)]
struct Run {
    /// In weights and gradients.
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
    mean: Vec<f32>,
    square: Vec<f32>,
}

impl Group {
    /// Fresh moments for these tensors.
    pub(super) fn new(settings: &Settings, chosen: &[(usize, &Param)]) -> Self {
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
        Self { settings: *settings, slots, runs, mean: vec![0.0; total], square: vec![0.0; total] }
    }

    /// The step with number `step`, from 1; see [`adamw`].
    pub(super) fn step(
        &mut self,
        cpu: &Cpu,
        step: u64,
        lr: f64,
        grad_scale: f32,
        data: &mut [f32],
        grad: &[f32],
    ) {
        let Settings { betas: [beta1, beta2], eps, weight_decay, .. } = self.settings;
        for Run { range, offset, decays } in &self.runs {
            let weight_decay = if *decays { weight_decay } else { 0.0 };
            let state = *offset..offset + range.len();
            adamw(
                cpu,
                &AdamW { lr, beta1, beta2, eps, weight_decay },
                step,
                grad_scale,
                &mut data[range.clone()],
                &grad[range.clone()],
                &mut self.mean[state.clone()],
                &mut self.square[state],
            );
        }
    }

    pub(super) fn bytes(&self) -> usize {
        4 * (self.mean.len() + self.square.len())
    }

    pub(super) fn state(&self) -> Vec<(&'static str, usize, &[f32])> {
        let mut all = cut("adamw.mean", &self.slots, &self.mean);
        all.extend(cut("adamw.square", &self.slots, &self.square));
        all
    }

    pub(super) fn state_mut(&mut self) -> Vec<(&'static str, usize, &mut [f32])> {
        let mut all = cut_mut("adamw.mean", &self.slots, &mut self.mean);
        all.extend(cut_mut("adamw.square", &self.slots, &mut self.square));
        all
    }
}
