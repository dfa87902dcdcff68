//! Optimizers over the flat master weights: Muon for the hidden matrices, `AdamW` for everything else.
//!
//! | tensor | `optimizer = "adamw"` | `optimizer = "muon"` | decay |
//! |---|---|---|---|
//! | projections of attention, FFNs, MTP modules; each expert's by itself | `AdamW` | Muon | yes |
//! | embedding, head, router | `AdamW` | `AdamW` | yes |
//! | norm gains | `AdamW` | `AdamW` | no |
//! | router bias | the balance rule alone | the balance rule alone | no |
//!
//! The router is an output layer, a classifier whose rows are experts: rows that no token chose have no gradient, and
//! orthogonalising would move them as far as the others. So it goes with the head.
//!
//! State is kept only where it is used (two moments for `AdamW`, one momentum for Muon), in the order of the tensors. The
//! moments of `AdamW` are f32 or bf16, as `train.moments` says.
//! Every element's update depends on its own tensor only, so threads change no bit.

pub mod adamw;
pub mod muon;

use minke_cpu::{Cpu, DType, View, ViewMut};
use minke_model::Param;
use minke_model::spec::Role;
use minke_tensor::Grads;

use crate::recipe;

/// What does not change during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Which optimizer the hidden matrices have.
    pub optimizer: recipe::Optimizer,
    /// Decay rates of `AdamW`'s two moments.
    pub betas: [f64; 2],
    /// What these moments are kept in.
    pub moments: recipe::Moments,
    /// Epsilon of `AdamW`.
    pub eps: f64,
    /// Decoupled weight decay of matrices, in both optimizers.
    pub weight_decay: f64,
    /// Momentum of Muon.
    pub muon_momentum: f64,
}

impl From<&recipe::Optim> for Settings {
    fn from(optim: &recipe::Optim) -> Self {
        let recipe::Optim { optimizer, betas, moments, eps, weight_decay, muon_momentum, .. } = *optim;
        Self { optimizer, betas, moments, eps, weight_decay, muon_momentum }
    }
}

/// Learning rates of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Of `AdamW`.
    pub adamw: f64,
    /// Of Muon.
    pub muon: f64,
}

/// Moments of all trained tensors and the rule that uses them.
#[derive(Debug)]
pub struct Optimizer {
    adamw: adamw::Group,
    muon: muon::Group,
    steps: u64,
}

/// Which rule trains a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    AdamW,
    Muon,
    /// Moved by something else than a gradient.
    None,
}

pub(crate) fn rule_of(role: Role, optimizer: recipe::Optimizer) -> Rule {
    match (role, optimizer) {
        (Role::RouterBias, _) => Rule::None,
        (
            Role::AttentionLinear | Role::FfnLinear | Role::ExpertLinear { .. } | Role::MtpProjection,
            recipe::Optimizer::Muon,
        ) => Rule::Muon,
        (
            Role::Embedding
            | Role::Head
            | Role::Norm
            | Role::Bias
            | Role::Router
            | Role::AttentionLinear
            | Role::FfnLinear
            | Role::ExpertLinear { .. }
            | Role::MtpProjection,
            recipe::Optimizer::AdamW | recipe::Optimizer::Muon,
        ) => Rule::AdamW,
    }
}

impl Optimizer {
    /// Fresh state, all zero, for these tensors; `moments` is what `AdamW`'s are kept in.
    pub fn new(settings: &Settings, entries: &[Param], moments: DType) -> Self {
        let with = |wanted| {
            let all = entries.iter().enumerate();
            let mut chosen: Vec<(usize, &Param)> =
                all.filter(|(_, param)| rule_of(param.role, settings.optimizer) == wanted).collect();
            // as they lie in memory: neighbours can go together
            chosen.sort_by_key(|(_, param)| param.range.start);
            chosen
        };
        Self {
            adamw: adamw::Group::new(settings, &with(Rule::AdamW), moments),
            muon: muon::Group::new(settings, &with(Rule::Muon)),
            steps: 0,
        }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the count of steps: when state is restored, or a step is skipped.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// Bytes of state.
    pub fn bytes(&self) -> usize {
        self.adamw.bytes() + self.muon.bytes()
    }

    /// One step: the flat weights `data` move against `grad_scale` times their gradients.
    ///
    /// # Panics
    /// When the weights are not laid out as the entries given to [`Optimizer::new`], or one has no gradient.
    pub fn step(&mut self, cpu: &Cpu, data: &mut [f32], grads: &Grads<'_>, rates: Rates, grad_scale: f32) {
        self.steps += 1;
        self.adamw.step(cpu, self.steps, rates.adamw, grad_scale, data, grads);
        self.muon.step(cpu, rates.muon, grad_scale, data, grads);
    }

    /// Shows every piece of state: `(kind, index of the tensor, elements)`, in one order.
    pub fn state(&self) -> Vec<(&'static str, usize, View<'_>)> {
        let mut all = self.adamw.state();
        all.extend(self.muon.state());
        all
    }

    /// The same pieces in the same order, to be filled.
    pub fn state_mut(&mut self) -> Vec<(&'static str, usize, ViewMut<'_>)> {
        let mut all = self.adamw.state_mut();
        all.extend(self.muon.state_mut());
        all
    }
}

/// Where a tensor lies in the flat weights, and where its state lies.
#[derive(Debug, Clone)]
struct Slot {
    /// Index in the model's entries.
    entry: usize,
    /// In the weights.
    range: std::ops::Range<usize>,
    /// First element in the group's state.
    offset: usize,
}

impl Slot {
    fn len(&self) -> usize {
        self.range.len()
    }
}

/// Gives each tensor its place, side by side, and returns how much state there is.
fn slots(chosen: &[(usize, &Param)]) -> (Vec<Slot>, usize) {
    let mut total = 0;
    let mut slots = Vec::with_capacity(chosen.len());
    for (entry, param) in chosen {
        slots.push(Slot { entry: *entry, range: param.range.clone(), offset: total });
        total += param.range.len();
    }
    (slots, total)
}

/// Cuts a group's state into its tensors' parts.
fn cut<'a>(kind: &'static str, slots: &[Slot], state: View<'a>) -> Vec<(&'static str, usize, View<'a>)> {
    slots.iter().map(|slot| (kind, slot.entry, state.slice(slot.offset, slot.offset + slot.len()))).collect()
}

fn cut_mut<'a>(
    kind: &'static str,
    slots: &[Slot],
    mut state: ViewMut<'a>,
) -> Vec<(&'static str, usize, ViewMut<'a>)> {
    let mut parts = Vec::with_capacity(slots.len());
    for slot in slots {
        let (part, rest) = state.split_at(slot.len());
        parts.push((kind, slot.entry, part));
        state = rest;
    }
    parts
}

#[cfg(test)]
mod tests;
