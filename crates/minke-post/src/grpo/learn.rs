//! The updates of a rollout: advantages, passes, slopes, the optimizer; and the proof that the engine is one.

use minke_cpu::Cpu;
use minke_model::{LossOptions, Model};
use minke_train::trainer::{self, Course, Load, Trainer};

use super::objective::{Objective, Sampled, Terms, Totals};
use super::rollout::{Answer, batch};
use crate::error::Result;
use crate::metrics::Values;

/// Learns from rollouts.
pub struct Learner {
    /// What is trained for.
    pub objective: Objective,
    /// The temperature of sampling.
    pub temperature: f32,
    /// Most tokens of an answer.
    pub longest: usize,
    /// Parts that a rollout is cut into, with an update for each.
    pub minibatches: usize,
    /// How often a rollout is gone through.
    pub epochs: usize,
    /// Rows of one pass, at most.
    pub rows_per_pass: usize,
    /// What the policy shall stay near to.
    pub reference: Option<Model>,
}

/// An answer that is learned from.
struct Lesson<'a> {
    answer: &'a Answer,
    advantage: f64,
    reference: Option<Vec<f32>>,
}

/// What is learned beside an objective: MTP modules, and an even use of experts. Both are means over all answers of an
/// update, into whatever passes these are cut.
pub(crate) struct Beside {
    /// MTP modules that learn.
    pub modules: usize,
    mtp_scale: f64,
    /// Of one answer.
    balance_alpha: f64,
}

impl Beside {
    /// For an update on answers, of which none is empty.
    pub fn of(trainer: &Trainer, answers: &[&Answer]) -> Self {
        let Course { mtp_loss_weight, balance_alpha, .. } = *trainer.course();
        let modules = if mtp_loss_weight > 0.0 { trainer.model.config.num_nextn_predict_layers } else { 0 };
        let tokens: usize = answers.iter().map(|answer| answer.len()).sum();
        Self {
            modules,
            mtp_scale: mtp_loss_weight / (modules.max(1) * tokens) as f64,
            balance_alpha: balance_alpha / answers.len() as f64,
        }
    }

    /// The weights of a pass on some of the answers.
    pub fn options(&self, answers: usize) -> LossOptions {
        LossOptions {
            loss_scale: 0.0,
            mtp_scale: vec![self.mtp_scale as f32; self.modules],
            // the balance loss of a pass is a mean over its sequences
            balance_alpha: (self.balance_alpha * answers as f64) as f32,
        }
    }
}

/// What the updates of a rollout amounted to.
#[derive(Default)]
pub struct Learned {
    loss: f64,
    kl: f64,
    clipped: usize,
    tokens: usize,
    updates: usize,
    grad_norm: f64,
    skipped: u64,
    lr: f64,
    /// Of the first update alone, where trainer and sampler have the same weights.
    drift: f64,
    drifted: usize,
    compared: usize,
    routes: usize,
    routes_differ: usize,
    mtp_loss: f64,
    mtp_tokens: usize,
    mtp_hits: usize,
    load: Vec<Load>,
    with_reference: bool,
}

impl Learner {
    /// The updates of a rollout.
    ///
    /// # Errors
    /// A loss or a gradient that is not finite.
    pub fn learn(&mut self, cpu: &Cpu, trainer: &mut Trainer, groups: &[Vec<&Answer>]) -> Result<Learned> {
        let mut learned = Learned { with_reference: self.reference.is_some(), ..Learned::default() };
        if groups.is_empty() {
            return Ok(learned);
        }
        let size = groups.len().div_ceil(self.minibatches);
        let mut parts = Vec::new();
        for part in groups.chunks(size) {
            parts.push(self.lessons(cpu, part));
        }
        let place = trainer.place();
        for epoch in 0..self.epochs {
            for (index, lessons) in parts.iter().enumerate() {
                // an update that is left out takes its place in the schedule all the same
                trainer.seek(place + (epoch * self.minibatches + index) as u64);
                let first = epoch == 0 && index == 0;
                self.update(cpu, trainer, lessons, first, &mut learned)?;
            }
        }
        Ok(learned)
    }

    /// The judged answers of groups, with their advantages.
    fn lessons<'g>(&mut self, cpu: &Cpu, groups: &[Vec<&'g Answer>]) -> Vec<Lesson<'g>> {
        let mut lessons = Vec::new();
        for group in groups {
            let judged: Vec<&Answer> = group
                .iter()
                .copied()
                .filter(|answer| answer.grade.reward.is_some() && !answer.is_empty())
                .collect();
            let rewards: Vec<f64> = judged.iter().filter_map(|answer| answer.grade.reward).collect();
            let advantages = self.objective.advantages(&rewards);
            lessons.extend(judged.into_iter().zip(advantages).map(|(answer, advantage)| Lesson {
                answer,
                advantage,
                reference: None,
            }));
        }
        if let Some(reference) = &mut self.reference {
            for pass in passes(lessons.iter().map(|lesson| lesson.answer), self.rows_per_pass) {
                let answers: Vec<&Answer> =
                    lessons[pass.clone()].iter().map(|lesson| lesson.answer).collect();
                let log_probs = reference.log_probs(cpu, &batch(&answers, self.temperature, 0));
                let mut rest = &log_probs[..];
                for lesson in &mut lessons[pass] {
                    let (own, others) = rest.split_at(lesson.answer.len());
                    lesson.reference = Some(own.to_vec());
                    rest = others;
                }
            }
        }
        lessons
    }

    fn update(
        &self,
        cpu: &Cpu,
        trainer: &mut Trainer,
        lessons: &[Lesson<'_>],
        first: bool,
        learned: &mut Learned,
    ) -> Result<()> {
        let objective = self.objective;
        let totals = Totals {
            answers: lessons.len(),
            tokens: lessons.iter().map(|lesson| lesson.answer.len()).sum(),
            longest: self.longest,
        };
        // what has no slope is not worth a pass
        let taught: Vec<&Lesson<'_>> =
            lessons.iter().filter(|lesson| lesson.advantage != 0.0 || objective.beta > 0.0).collect();
        if taught.is_empty() {
            return Ok(());
        }
        let answers: Vec<&Answer> = taught.iter().map(|lesson| lesson.answer).collect();
        let beside = Beside::of(trainer, &answers);
        let (mut loss, mut load) = (0.0, Vec::new());
        for pass in passes(answers.iter().copied(), self.rows_per_pass) {
            let (part, answers) = (&taught[pass.clone()], &answers[pass]);
            let batch = batch(answers, self.temperature, beside.modules);
            let options = beside.options(answers.len());
            let mut terms = Terms::default();
            let stats = trainer.model.policy_step(cpu, &batch, &options, &mut |s, log_probs, out| {
                let lesson = &part[s];
                let sampled = Sampled {
                    advantage: lesson.advantage,
                    log_probs: &lesson.answer.generation.trace.log_probs,
                    reference: lesson.reference.as_deref(),
                };
                let of = objective.slopes(totals, &sampled, log_probs, out);
                terms.loss += of.loss;
                terms.kl += of.kl;
                terms.clipped += of.clipped;
                terms.drift += of.drift;
            });
            loss += terms.loss;
            learned.kl += terms.kl;
            learned.clipped += terms.clipped;
            learned.tokens += stats.log_probs.len();
            learned.mtp_loss += stats.stats.mtp_loss_sum.iter().sum::<f64>();
            learned.mtp_tokens += stats.stats.mtp_tokens.iter().sum::<usize>();
            learned.mtp_hits += stats.stats.mtp_hits.iter().sum::<usize>();
            trainer::add_load(&mut load, &stats.stats.expert_load);
            if first {
                learned.compare(answers, &stats.log_probs, &stats.stats.routes, terms.drift);
            }
        }
        let update = trainer.update(cpu, loss, &load)?;
        learned.loss += loss;
        learned.updates += 1;
        learned.grad_norm += update.grad_norm;
        learned.skipped += u64::from(update.skipped.is_some());
        learned.lr = update.rates.adamw;
        learned.load = load;
        Ok(())
    }
}

impl Learned {
    /// Sampled tokens of the first update whose log-probability was another one in the trainer.
    pub fn bits_differ(&self) -> usize {
        self.drifted
    }

    /// Adds what a step shows.
    pub fn put_into(&self, values: &mut Values) {
        if self.updates == 0 {
            return;
        }
        values.put("loss", self.loss / self.updates as f64);
        values.put("grad_norm", self.grad_norm / self.updates as f64);
        values.put("lr", self.lr);
        values.put_skipped(self.skipped);
        values.put("clipped", self.clipped as f64 / self.tokens as f64);
        // both are 0 to the bit: one engine
        values.put("kl_rollout", self.drift / self.compared as f64);
        values.put("bits_differ", self.drifted as f64 / self.compared as f64);
        values.put("router_diff", self.routes_differ as f64 / self.routes as f64);
        if self.with_reference {
            values.put("kl_reference", self.kl / self.tokens as f64);
        }
        if self.mtp_tokens > 0 {
            values.put("mtp_loss", self.mtp_loss / self.mtp_tokens as f64);
            // the share of sampled tokens that the modules would have drafted
            values.put("mtp_hits", self.mtp_hits as f64 / self.mtp_tokens as f64);
        }
        values.put_balance(self.load.iter().map(|(_, counts)| counts));
    }

    /// Trainer against sampler, at the same weights.
    fn compare(
        &mut self,
        answers: &[&Answer],
        log_probs: &[f32],
        routes: &[std::sync::Arc<[u32]>],
        drift: f64,
    ) {
        let sampled = answers.iter().flat_map(|answer| &answer.generation.trace.log_probs);
        self.compared += log_probs.len();
        self.drift += drift;
        self.drifted += sampled.zip(log_probs).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let rows: usize = answers.iter().map(|answer| answer.prompt.len() + answer.len() - 1).sum();
        for (layer, trained) in routes.iter().enumerate() {
            let k = trained.len() / rows.max(1);
            let mut rest = &trained[..];
            for answer in answers {
                let sampled = &answer.generation.trace.routes[layer];
                let (own, others) = rest.split_at(sampled.len().min(rest.len()));
                self.routes += own.len() / k.max(1);
                self.routes_differ +=
                    own.chunks(k.max(1)).zip(sampled.chunks(k.max(1))).filter(|(a, b)| a != b).count();
                rest = others;
            }
        }
    }
}

/// Cuts answers into passes of at most `rows`, at least one answer each.
pub(crate) fn passes<'a>(
    answers: impl Iterator<Item = &'a Answer>,
    rows: usize,
) -> Vec<std::ops::Range<usize>> {
    let mut passes = Vec::new();
    let (mut start, mut end, mut held) = (0, 0, 0);
    for answer in answers {
        let own = answer.prompt.len() + answer.len();
        if end > start && held + own > rows {
            passes.push(start..end);
            (start, held) = (end, 0);
        }
        held += own;
        end += 1;
    }
    if start < end {
        passes.push(start..end);
    }
    passes
}
