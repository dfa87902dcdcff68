//! A training pass: forward, losses, backward; and evaluation without the backward pass.

use std::sync::Arc;

use minke_cpu::Cpu;
use minke_cpu::attention::Segment;
use minke_tensor::ops::HeadWeights;
use minke_tensor::{Context, Var, ops};

use crate::forward::{Model, Pass, Source};

/// The label of a row that has none.
pub const IGNORE: u32 = u32::MAX;

/// Sequences, flattened into n rows.
#[derive(Clone, Debug, Default)]
pub struct TrainBatch {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence, for the rotation.
    pub positions: Vec<u32>,
    /// The sequences: attention stays within one.
    pub segments: Vec<Segment>,
    /// The next token, or [`IGNORE`].
    pub labels: Vec<u32>,
    /// One per MTP module.
    pub mtp: Vec<MtpTargets>,
}

/// What MTP module k (from 1) reads and predicts in row i.
#[derive(Clone, Debug, Default)]
pub struct MtpTargets {
    /// Token i + k; any valid id where there is none.
    pub tokens: Vec<u32>,
    /// Token i + k + 1, or [`IGNORE`].
    pub labels: Vec<u32>,
}

/// What is differentiated: `loss_scale * sum of losses + sum over k (mtp_scale[k] * sum of module k's losses) + balance
/// losses`.
#[derive(Clone, Debug, Default)]
pub struct LossOptions {
    /// Factor of the main losses' sum; one over the labels of the whole step for a mean.
    pub loss_scale: f32,
    /// Factor of the sum of each MTP module's losses.
    pub mtp_scale: Vec<f32>,
    /// Factor alpha of the sequence-wise balance loss, a mean over the sequences of this call; 0 for none.
    pub balance_alpha: f32,
}

/// What a pass measured.
#[derive(Clone, Debug, Default)]
pub struct StepStats {
    /// Sum of the main losses, in nats.
    pub loss_sum: f64,
    /// Rows with a label.
    pub tokens: usize,
    /// Sum of the losses of each MTP module.
    pub mtp_loss_sum: Vec<f64>,
    /// Rows with a label of each MTP module.
    pub mtp_tokens: Vec<usize>,
    /// Rows in which the label was what the module took to be likeliest: what it would have drafted.
    pub mtp_hits: Vec<usize>,
    /// Sum of the balance losses of all layers, alpha included.
    pub balance_loss: f64,
    /// Tokens per expert of every layer with experts, MTP modules last.
    pub expert_load: Vec<ExpertLoad>,
    /// The experts of each row [n, k], by layer of the trunk with experts.
    pub routes: Vec<Arc<[u32]>>,
}

/// How the tokens of a pass were spread over the experts of a layer.
#[derive(Clone, Debug)]
pub struct ExpertLoad {
    /// The layer, MTP modules counted on behind the trunk.
    pub layer: usize,
    /// The layer's correction bias, if it has one: `params.range(bias)` is where it lies.
    pub bias: Option<minke_tensor::WeightId>,
    /// Tokens per expert.
    pub counts: Vec<u32>,
}

impl Model {
    /// Forward and backward over a batch; gradients are added to those of `params`.
    ///
    /// # Panics
    /// When the batch contradicts itself or names tokens outside the vocabulary.
    pub fn train_step(&mut self, cpu: &Cpu, batch: &TrainBatch, loss: &LossOptions) -> StepStats {
        let mut main = None;
        let mut stats = self.recorded(cpu, batch, loss, false, &mut |cx, h, head| {
            main = Some(ops::head_loss(cx, h, head, &batch.labels, loss.loss_scale, false));
        });
        let main = main.expect("the head was called");
        (stats.loss_sum, stats.tokens) = (main.sum, main.count);
        stats
    }

    /// Forward with a tape, whatever `head` makes of the final state, the MTP modules, backward.
    pub(crate) fn recorded(
        &mut self,
        cpu: &Cpu,
        batch: &TrainBatch,
        loss: &LossOptions,
        detached: bool,
        head: &mut dyn FnMut(&mut Context<'_>, &Var, HeadWeights),
    ) -> StepStats {
        if !self.params.trains() {
            self.params.zero_grad();
        }
        let mut pass = self.pass(batch, loss.balance_alpha);
        let mtp_rotaries: Vec<_> = (1..=self.net.mtp.len() as u32)
            .map(|k| self.net.rotary(batch.positions.iter().map(|p| p + k).collect()))
            .collect();
        let net = &self.net;
        let mut cx = Context::training(cpu, &mut self.params);
        let h = net.trunk(&mut cx, &mut pass, &batch.tokens.clone().into());
        // the modules read h: their gradients are on the tape behind it, and the head's loss is added first
        head(&mut cx, &h, net.head);
        let mut stats = StepStats { routes: std::mem::take(&mut pass.routes), ..StepStats::default() };
        assert!(
            batch.mtp.is_empty() || batch.mtp.len() == net.mtp.len(),
            "targets for every MTP module or none"
        );
        let mut state = h;
        for (k, targets) in batch.mtp.iter().enumerate() {
            pass.rotary = mtp_rotaries[k].clone();
            state = net.mtp(&mut cx, &mut pass, k, &state, &targets.tokens.clone().into(), detached);
            let scale = loss.mtp_scale[k];
            let loss = ops::head_loss(&mut cx, &state, net.head, &targets.labels, scale, detached);
            stats.mtp_loss_sum.push(loss.sum);
            stats.mtp_tokens.push(loss.count);
            stats.mtp_hits.push(loss.hits);
        }
        cx.backward();
        self.timers.merge(&cx.timers);
        stats.balance_loss = pass.balance_loss;
        stats.expert_load = pass.loads;
        stats
    }

    /// The main loss of every row in nats, 0 where there is no label.
    ///
    /// # Panics
    /// As [`Model::train_step`].
    pub fn evaluate(&mut self, cpu: &Cpu, batch: &TrainBatch) -> Vec<f32> {
        let mut pass = self.pass(batch, 0.0);
        let mut cx = Context::inference(cpu, &mut self.params);
        let h = self.net.trunk(&mut cx, &mut pass, &batch.tokens.clone().into());
        ops::head_losses(&mut cx, &h, self.net.head, &batch.labels)
    }

    pub(crate) fn pass(&mut self, batch: &TrainBatch, balance_alpha: f32) -> Pass<'static> {
        let n = batch.tokens.len();
        assert_eq!(
            (n, n),
            (batch.positions.len(), batch.labels.len()),
            "rows, positions and labels of a batch"
        );
        let starts = batch.segments.iter().map(|s| s.start as u32);
        let borders = starts.chain([n as u32]).collect();
        let rotary = self.net.rotary(batch.positions.clone().into());
        let source = Source::Rows(batch.segments.clone().into());
        Pass { balance_alpha, recompute: self.recompute, ..Pass::new(rotary, source, borders) }
    }
}
