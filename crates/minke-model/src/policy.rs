//! Passes that train a policy: log-probabilities of what was sampled, any objective over them; and distillation.
//!
//! They run the same trunk as [`Model::train_step`] and [`Model::infer`], so at the weights that sampled a token its
//! log-probability here is the sampler's, to the bit, and every router chooses the experts that it chose there.

use minke_cpu::Cpu;
use minke_cpu::policy::{Divergence, Kept, Teacher};
use minke_tensor::{Context, ops};

use crate::forward::Model;
use crate::train::{IGNORE, LossOptions, StepStats, TrainBatch};

/// Sequences whose labelled rows were sampled.
#[derive(Clone, Debug, Default)]
pub struct PolicyBatch {
    /// The rows; labels are what was sampled next, [`IGNORE`] where nothing was. Segments are the sequences.
    pub rows: TrainBatch,
    /// The temperature of sampling.
    pub temperature: f32,
    /// What the filters of sampling left, by labelled row.
    pub kept: Kept,
}

/// What a pass over a policy's batch measured.
#[derive(Clone, Debug, Default)]
pub struct PolicyStats {
    /// Log-probability of each labelled row's label, in order.
    pub log_probs: Vec<f32>,
    /// Everything else; its main loss is minus the sum of `log_probs`.
    pub stats: StepStats,
}

/// The labelled rows of a batch, and where each sequence begins among them.
fn labelled(batch: &TrainBatch) -> (Vec<u32>, Vec<u32>, Vec<usize>) {
    let (mut rows, mut labels, mut groups) = (Vec::new(), Vec::new(), vec![0]);
    for segment in &batch.segments {
        for row in segment.start..segment.start + segment.len {
            if batch.labels[row] != IGNORE {
                rows.push(row as u32);
                labels.push(batch.labels[row]);
            }
        }
        groups.push(rows.len());
    }
    (rows, labels, groups)
}

impl Model {
    /// Forward and backward of an objective over log-probabilities; gradients are added to those of `params`.
    ///
    /// `slope(s, log_probs, out)` is asked once for each sequence s: it writes dL/dlog p of each of its labelled rows.
    /// MTP modules are trained beside it on the same rows, by cross entropy times `loss.mtp_scale`, without touching
    /// embedding, trunk and head: they follow the policy and do not pull at it. `loss.loss_scale` is not used.
    ///
    /// # Panics
    /// As [`Model::train_step`].
    pub fn policy_step(
        &mut self,
        cpu: &Cpu,
        batch: &PolicyBatch,
        loss: &LossOptions,
        slope: &mut ops::Slope<'_>,
    ) -> PolicyStats {
        let (rows, labels, groups) = labelled(&batch.rows);
        let mut log_probs = Vec::new();
        let mut stats = self.recorded(cpu, &batch.rows, loss, true, &mut |cx, h, head| {
            let policy = ops::PolicyRows {
                rows: &rows,
                labels: &labels,
                groups: &groups,
                temperature: batch.temperature,
                kept: &batch.kept,
            };
            log_probs = ops::head_policy(cx, h, head, policy, slope);
        });
        stats.loss_sum = -log_probs.iter().map(|&l| f64::from(l)).sum::<f64>();
        stats.tokens = log_probs.len();
        PolicyStats { log_probs, stats }
    }

    /// The log-probability of each labelled row's label, in order, without a backward pass.
    ///
    /// # Panics
    /// As [`Model::train_step`].
    pub fn log_probs(&mut self, cpu: &Cpu, batch: &PolicyBatch) -> Vec<f32> {
        let (rows, labels, groups) = labelled(&batch.rows);
        let mut pass = self.pass(&batch.rows, 0.0);
        let mut cx = Context::inference(cpu, &mut self.params);
        let h = self.net.trunk(&mut cx, &mut pass, &batch.rows.tokens.clone().into());
        let policy = ops::PolicyRows {
            rows: &rows,
            labels: &labels,
            groups: &groups,
            temperature: batch.temperature,
            kept: &batch.kept,
        };
        ops::head_policy(&mut cx, &h, self.net.head, policy, &mut |_, _, _| {})
    }

    /// What the model takes to be likeliest at each labelled row: its k best tokens at a temperature.
    ///
    /// # Panics
    /// As [`Model::train_step`].
    pub fn likeliest(&mut self, cpu: &Cpu, batch: &TrainBatch, k: usize, temperature: f32) -> Teacher {
        let (rows, ..) = labelled(batch);
        let mut pass = self.pass(batch, 0.0);
        let mut cx = Context::inference(cpu, &mut self.params);
        let h = self.net.trunk(&mut cx, &mut pass, &batch.tokens.clone().into());
        ops::head_likeliest(&mut cx, &h, self.net.head, &rows, k, temperature)
    }

    /// Forward and backward of a divergence from a teacher's likeliest tokens at each labelled row, times
    /// `loss.loss_scale`; gradients are added to those of `params`. The stats' main loss is the sum of divergences.
    ///
    /// # Panics
    /// As [`Model::train_step`].
    pub fn distill_step(
        &mut self,
        cpu: &Cpu,
        batch: &TrainBatch,
        loss: &LossOptions,
        teacher: &Teacher,
        divergence: Divergence,
        temperature: f32,
    ) -> StepStats {
        let (rows, ..) = labelled(batch);
        let mut values = Vec::new();
        let scale = loss.loss_scale;
        let mut stats = self.recorded(cpu, batch, loss, false, &mut |cx, h, head| {
            values = ops::head_distill(cx, h, head, &rows, teacher, divergence, temperature, scale);
        });
        stats.loss_sum = values.iter().map(|&v| f64::from(v)).sum();
        stats.tokens = values.len();
        stats
    }
}
