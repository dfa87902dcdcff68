//! One training step, and nothing else: no files, no output.
//!
//! A step is a function of the weights, the optimizer's state and the batch. It walks: count the labels of the whole
//! batch; forward and backward of each micro-batch, gradients adding up; norm and clipping; the optimizer; the
//! router's bias. The loss is the mean over all labelled tokens of the whole batch, so that accumulating changes only
//! the order in which gradients are added.

use std::time::Instant;

use minke_cpu::Cpu;
use minke_cpu::reduce::sum_squares;
use minke_model::{ExpertLoad, IGNORE, LossOptions, Model, Recompute, StepStats, TrainBatch};
use minke_tensor::WeightId;

use crate::error::{Result, TrainError};
use crate::optim::{Optimizer, Rates, Settings};
use crate::recipe::{Optim, Resolved};
use crate::schedule::Schedule;

/// What the loop needs to know of a recipe.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Course {
    /// Steps of the whole run.
    pub steps: u64,
    /// Peak rates.
    pub rates: Rates,
    /// Their course.
    pub schedule: Schedule,
    /// Norm that gradients are clipped to; 0 for no clipping.
    pub clip: f64,
    /// Steps in a row that are skipped because a loss or a gradient is not finite; one more is an error.
    pub skip_limit: u64,
    /// Weight lambda of the mean loss of the MTP modules.
    pub mtp_loss_weight: f64,
    /// Speed gamma of the router's bias.
    pub bias_update_speed: f64,
    /// Weight alpha of the sequence-wise balance loss.
    pub balance_alpha: f64,
    /// What its passes compute twice.
    pub recompute: Recompute,
}

impl From<&Resolved> for Course {
    fn from(recipe: &Resolved) -> Self {
        Self::new(&recipe.train.optim, recipe.steps())
    }
}

impl Course {
    /// The course of a run of `steps` steps.
    pub fn new(optim: &Optim, steps: u64) -> Self {
        Self {
            steps,
            rates: Rates { adamw: optim.lr, muon: optim.muon_lr },
            schedule: optim.schedule(),
            clip: optim.clip,
            skip_limit: optim.skip_limit,
            mtp_loss_weight: optim.mtp_loss_weight,
            bias_update_speed: optim.bias_update_speed,
            balance_alpha: optim.sequence_balance_alpha,
            recompute: optim.recompute.into(),
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Its number, from 1.
    pub step: u64,
    /// Mean cross entropy of the next token, nats.
    pub loss: f64,
    /// Mean over the MTP modules of theirs, before its weight.
    pub mtp_loss: Option<f64>,
    /// Sequence-wise balance loss, after its weight.
    pub balance_loss: f64,
    /// The learning rates.
    pub rates: Rates,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// What was not finite, if the step was skipped for it.
    pub skipped: Option<&'static str>,
    /// Tokens per expert over the whole batch, by layer with experts.
    pub counts: Vec<Vec<u64>>,
}

/// A model, its optimizer and how far they are.
pub struct Trainer {
    /// The model; its weights are the masters.
    pub model: Model,
    optimizer: Optimizer,
    course: Course,
    /// Where the next update stands in the schedule, from 0.
    place: u64,
    /// Updates so far, since this trainer is there.
    tally: Tally,
    /// Steps skipped since the last that was not, and what was not finite in the last of them.
    skipped: u64,
    runaway: &'static str,
}

/// Updates by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Those that changed weights.
    pub taken: u64,
    /// Those that changed nothing, because a loss or a gradient was not finite.
    pub skipped: u64,
}

impl Tally {
    /// Those that are not among `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { taken: self.taken - before.taken, skipped: self.skipped - before.skipped }
    }
}

/// What an update did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Its number, from 1.
    pub step: u64,
    /// The learning rates.
    pub rates: Rates,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// What was not finite, if the update was skipped for it.
    pub skipped: Option<&'static str>,
}

/// The bias of a layer's router, if it has one, and the tokens that each expert got.
pub type Load = (Option<WeightId>, Vec<u64>);

/// Adds the loads of a pass to those of a batch.
pub fn add_load(total: &mut Vec<Load>, pass: &[ExpertLoad]) {
    if total.is_empty() {
        *total = pass.iter().map(|l| (l.bias, vec![0; l.counts.len()])).collect();
    }
    for ((_, total), load) in total.iter_mut().zip(pass) {
        for (total, count) in total.iter_mut().zip(&load.counts) {
            *total += u64::from(*count);
        }
    }
}

/// Sums of a step's micro-batches.
#[derive(Default)]
struct Totals {
    loss: f64,
    mtp: Vec<f64>,
    balance: f64,
    load: Vec<Load>,
}

impl Totals {
    fn add(&mut self, stats: &StepStats) {
        self.loss += stats.loss_sum;
        self.mtp.resize(stats.mtp_loss_sum.len(), 0.0);
        for (total, sum) in self.mtp.iter_mut().zip(&stats.mtp_loss_sum) {
            *total += sum;
        }
        self.balance += stats.balance_loss;
        add_load(&mut self.load, &stats.expert_load);
    }
}

fn labelled(labels: &[u32]) -> usize {
    labels.iter().filter(|&&label| label != IGNORE).count()
}

/// `1 / n`, or 0 of nothing.
fn share(n: usize) -> f64 {
    if n == 0 { 0.0 } else { 1.0 / n as f64 }
}

impl Trainer {
    /// A trainer at its first step.
    pub fn new(mut model: Model, settings: &Settings, course: Course) -> Self {
        let moments = settings.moments.dtype(model.precision, settings.betas);
        let optimizer = Optimizer::new(settings, &model.params.entries, moments);
        model.params.zero_grad();
        model.recompute = course.recompute;
        Self { model, optimizer, course, place: 0, tally: Tally::default(), skipped: 0, runaway: "" }
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Steps skipped in a row, up to now.
    pub fn skipped_in_a_row(&self) -> u64 {
        self.skipped
    }

    /// Updates so far, since this trainer is there.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// What a person is told of a step whose updates were these, if one was skipped.
    pub fn skip_warning(&self, step: u64, updates: Tally) -> Option<String> {
        let Self { skipped: in_a_row, course: Course { skip_limit, .. }, .. } = self;
        let Tally { taken, skipped } = updates;
        (skipped > 0).then(|| {
            format!(
                "step {step}: a loss or a gradient is not finite: {skipped} of {} updates changed nothing, {in_a_row} in a row of {skip_limit} that are borne",
                taken + skipped
            )
        })
    }

    /// That numbers ran away: what was not finite after the last step.
    pub fn diverged(&self, what: &'static str) -> TrainError {
        TrainError::Diverged {
            step: self.steps_done(),
            what,
            in_a_row: self.skipped,
            clips: self.course.clip > 0.0,
            good: None,
            from: None,
        }
    }

    /// The same of the last step that was skipped.
    pub fn ran_away(&self) -> TrainError {
        self.diverged(self.runaway)
    }

    /// Refuses weights that are no numbers.
    ///
    /// # Errors
    /// [`TrainError::Diverged`].
    pub fn check(&self, cpu: &Cpu) -> Result<()> {
        if !sum_squares(cpu, &[&self.model.params.data]).is_finite() {
            return Err(self.diverged("norm of the weights"));
        }
        Ok(())
    }

    /// Where the next update stands in the schedule, from 0.
    pub fn place(&self) -> u64 {
        self.place
    }

    /// Says where the next update stands, for a run that may leave updates out.
    pub fn seek(&mut self, place: u64) {
        self.place = place;
    }

    /// The course of the run.
    pub fn course(&self) -> &Course {
        &self.course
    }

    /// The optimizer's state.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Weights and optimizer state together, to be restored; call [`Trainer::restored`] afterwards.
    pub fn parts_mut(&mut self) -> (&mut Model, &mut Optimizer) {
        (&mut self.model, &mut self.optimizer)
    }

    /// Tells the trainer that its parts were overwritten with those after `steps` steps.
    pub fn restored(&mut self, steps: u64) {
        self.optimizer.set_steps(steps);
        self.place = steps;
        self.model.params.zero_grad();
        self.model.weights_changed();
    }

    /// One step on the micro-batches of one batch.
    ///
    /// `loss = 1/N sum of token losses + lambda/K sum_k 1/N_k sum of module k's + alpha balance`, N and N_k labelled
    /// tokens of the whole batch.
    ///
    /// # Errors
    /// As [`Trainer::update`].
    pub fn step(&mut self, cpu: &Cpu, batch: &[TrainBatch]) -> Result<StepReport> {
        self.step_by(cpu, batch, &mut |model, at, options| model.train_step(cpu, &batch[at], options))
    }

    /// One step whose passes are not the usual one: `pass(model, m, options)` goes forward and backward through
    /// micro-batch m, adds to the gradients what `options` scale, and gives its sums.
    ///
    /// # Errors
    /// As [`Trainer::update`].
    pub fn step_by(
        &mut self,
        cpu: &Cpu,
        batch: &[TrainBatch],
        pass: &mut dyn FnMut(&mut Model, usize, &LossOptions) -> StepStats,
    ) -> Result<StepReport> {
        let step = self.optimizer.steps() + 1;
        let Course { mtp_loss_weight, balance_alpha, .. } = self.course;
        let modules = batch.first().map_or(0, |micro| micro.mtp.len());
        let tokens: usize = batch.iter().map(|micro| labelled(&micro.labels)).sum();
        let mtp_tokens: Vec<usize> =
            (0..modules).map(|k| batch.iter().map(|micro| labelled(&micro.mtp[k].labels)).sum()).collect();
        let options = LossOptions {
            loss_scale: share(tokens) as f32,
            mtp_scale: mtp_tokens
                .iter()
                .map(|&n| (mtp_loss_weight * share(modules) * share(n)) as f32)
                .collect(),
            balance_alpha: (balance_alpha * share(batch.len())) as f32,
        };
        let mut totals = Totals::default();
        for micro in 0..batch.len() {
            totals.add(&pass(&mut self.model, micro, &options));
        }
        let loss = totals.loss * share(tokens);
        let Update { rates, grad_norm, skipped, .. } = self.update(cpu, loss, &totals.load)?;
        let mtp_losses: f64 = totals.mtp.iter().zip(&mtp_tokens).map(|(sum, &n)| sum * share(n)).sum();
        Ok(StepReport {
            step,
            loss,
            mtp_loss: (modules > 0).then(|| mtp_losses * share(modules)),
            balance_loss: totals.balance,
            rates,
            grad_norm,
            skipped,
            counts: totals.load.into_iter().map(|(_, counts)| counts).collect(),
        })
    }

    /// The second half of a step: norm and clipping of the gradients of `model.params`, the optimizer,
    /// and the router's bias by `load`, the tokens per expert of the whole batch by layer.
    ///
    /// Where the loss or the gradient is not finite, the step is counted and nothing else: weights, the optimizer's
    /// state and the router's bias stay, and the gradient is dropped.
    ///
    /// # Errors
    /// More such steps in a row than the course allows.
    pub fn update(&mut self, cpu: &Cpu, loss: f64, load: &[Load]) -> Result<Update> {
        let start = Instant::now();
        let step = self.optimizer.steps() + 1;
        let Course { clip, bias_update_speed, .. } = self.course;
        // zeros where no pass came by: a part of a rollout may have nothing to learn from
        self.model.params.settle_grad();
        let grad_norm = sum_squares(cpu, &self.model.params.grads().parts()).sqrt();
        let factor = self.course.schedule.factor(self.place, self.course.steps);
        self.place += 1;
        let rates = Rates { adamw: self.course.rates.adamw * factor, muon: self.course.rates.muon * factor };
        let runaway =
            [("loss", loss), ("gradient", grad_norm)].into_iter().find(|(_, value)| !value.is_finite());
        if let Some((what, _)) = runaway {
            self.model.params.zero_grad();
            self.optimizer.set_steps(step);
            self.tally.skipped += 1;
            (self.skipped, self.runaway) = (self.skipped + 1, what);
            if self.skipped > self.course.skip_limit {
                return Err(self.diverged(what));
            }
            return Ok(Update { step, rates, grad_norm, skipped: Some(what) });
        }
        self.tally.taken += 1;
        self.skipped = 0;
        // the formula of torch.nn.utils.clip_grad_norm_
        let scale = if clip > 0.0 { (clip / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        let (data, grads) = self.model.params.data_and_grads();
        self.optimizer.step(cpu, data, &grads, rates, scale as f32);
        for (bias, counts) in load {
            if let Some(bias) = bias {
                let range = self.model.params.range(*bias);
                balance(&mut self.model.params.data[range], counts, bias_update_speed as f32);
            }
        }
        self.model.params.zero_grad();
        self.model.weights_changed();
        self.model.timers.add("optimizer", start.elapsed());
        Ok(Update { step, rates, grad_norm, skipped: None })
    }
}

/// `bias_i += gamma sign(mean load - load_i)`: overloaded experts lose, underloaded ones gain.
///
/// Paper: `DeepSeek`-V3 Technical Report, section 2.1.2, auxiliary-loss-free load balancing.
fn balance(bias_e: &mut [f32], counts: &[u64], gamma: f32) {
    let total: u64 = counts.iter().sum();
    for (bias, &count) in bias_e.iter_mut().zip(counts) {
        // in whole numbers: the mean itself may not be one
        match (count * counts.len() as u64).cmp(&total) {
            std::cmp::Ordering::Less => *bias += gamma,
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => *bias -= gamma,
        }
    }
}

#[cfg(test)]
mod tests {
    use minke_model::{Config, DType, Precision};

    use super::*;
    use crate::{batch, recipe};

    fn config() -> Config {
        let config = r#"{"model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 64, "intermediate_size": 32,
            "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": null,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1}"#;
        Config::from_json(&serde_json::from_str(config).unwrap()).unwrap()
    }

    fn trainer(steps: u64) -> Trainer {
        let optim = Optim { lr: 0.01, muon_lr: 0.01, skip_limit: 1, ..recipe::Optim::PRETRAIN };
        let model = Model::random(config(), Precision::uniform(DType::F32), 1);
        Trainer::new(model, &Settings::from(&optim), Course::new(&optim, steps))
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing_but_the_count() {
        let (cpu, mut trainer) = (Cpu::detect(2), trainer(10));
        let batch = |step| [batch::random(&config(), 2, 16, 1, step)];
        let all = |trainer: &Trainer| {
            let state = trainer.optimizer.state().into_iter().flat_map(|(_, _, x)| x.to_vec());
            trainer.model.params.data.iter().copied().chain(state).map(f32::to_bits).collect::<Vec<_>>()
        };
        trainer.step(&cpu, &batch(0)).unwrap();
        let before = all(&trainer);
        let spoiled = |trainer: &mut Trainer| {
            let batch = batch(1);
            trainer.step_by(&cpu, &batch, &mut |model, at, options| {
                let stats = model.train_step(&cpu, &batch[at], options);
                let first = model.params.ids().next().unwrap();
                model.params.with_grad(first).1[7] = f32::NAN;
                stats
            })
        };
        let report = spoiled(&mut trainer).unwrap();
        assert_eq!((report.step, report.skipped, trainer.steps_done()), (2, Some("gradient"), 2));
        assert_eq!(trainer.tally(), Tally { taken: 1, skipped: 1 });
        let warning = |trainer: &Trainer, before| trainer.skip_warning(7, trainer.tally().since(before));
        let first = Tally { taken: 1, skipped: 0 };
        insta::assert_snapshot!(warning(&trainer, first).unwrap(), @"step 7: a loss or a gradient is not finite: 1 of 1 updates changed nothing, 1 in a row of 1 that are borne");
        assert!(all(&trainer) == before);
        // the next is a step as any other, and what was skipped before it is forgiven
        let report = trainer.step(&cpu, &batch(2)).unwrap();
        assert!(report.skipped.is_none() && report.grad_norm.is_finite());
        // and told of the turn that it was in, and of no other
        assert!(warning(&trainer, first).unwrap().contains("1 of 2 updates changed nothing, 0 in a row"));
        assert_eq!(warning(&trainer, trainer.tally()), None);
        assert!(all(&trainer) != before);
        let idle = trainer.update(&cpu, 0.0, &[]).unwrap();
        assert_eq!((idle.step, idle.grad_norm, idle.skipped), (4, 0.0, None));
        spoiled(&mut trainer).unwrap();
        let error = spoiled(&mut trainer).unwrap_err();
        assert!(
            matches!(error, TrainError::Diverged { step: 6, what: "gradient", in_a_row: 2, good: None, .. }),
            "{error}"
        );
    }

    #[test]
    fn weights_are_kept_when_they_are_numbers() {
        let (cpu, mut trainer) = (Cpu::detect(2), trainer(10));
        trainer.check(&cpu).unwrap();
        trainer.update(&cpu, f64::NAN, &[]).unwrap();
        trainer.check(&cpu).unwrap();
        let error = trainer.ran_away();
        assert!(matches!(error, TrainError::Diverged { step: 1, what: "loss", in_a_row: 1, .. }), "{error}");
        trainer.update(&cpu, 1.0, &[]).unwrap();
        for runaway in [f32::NAN, f32::INFINITY, 1e30] {
            trainer.model.params.data[3] = runaway;
            let error = trainer.check(&cpu).unwrap_err();
            assert!(error.to_string().contains("step 2: the norm of the weights is not finite;"), "{error}");
        }
    }

    #[test]
    fn an_update_has_the_rate_of_its_place() {
        let (cpu, mut trainer) = (Cpu::detect(1), trainer(10));
        let mut rate = |place: Option<u64>| {
            if let Some(place) = place {
                trainer.seek(place);
            }
            trainer.update(&cpu, 0.0, &[]).unwrap().rates.adamw
        };
        // warm-up of one step, decay of the last three
        let whole: Vec<f64> = (0..10).map(|_| rate(None)).collect();
        assert!(whole[9] < whole[8] && whole[8] < whole[7], "{whole:?}");
        assert_eq!([rate(Some(8)), rate(None)], [whole[8], whole[9]]);
    }

    #[test]
    fn bias_moves_against_the_load() {
        let mut bias = [0.5, 0.0, 0.0, -0.5];
        balance(&mut bias, &[9, 2, 3, 0], 0.25);
        assert_eq!(bias, [0.25, 0.25, 0.25, -0.25]);
        let mut even = [0.1; 3];
        balance(&mut even, &[4, 4, 4], 0.25);
        balance(&mut even, &[0, 0, 0], 0.25);
        assert_eq!(even, [0.1; 3]);
    }
}
