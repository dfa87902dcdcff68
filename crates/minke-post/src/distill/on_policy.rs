//! Learning from what a teacher says of the student's own answers.
//!
//! With S the student and T the teacher, both at the temperature of sampling, the student descends
//! `KL(S || T) = E_{x ~ S} sum_t [ln S(x_t) - ln T(x_t)]` token by token: the gradient of what a token can still change
//! is `E (ln S(x_t) - ln T(x_t)) grad ln S(x_t)`, so the advantage of a token is `A_t = ln T(x_t) - ln S(x_t)` and its
//! slope `-A_t / N`, N tokens of the rollout. Where both agree there is none.
//!
//! Papers: Agarwal et al. 2024, "On-Policy Distillation of Language Models"; Gu et al. 2024, "`MiniLLM`".

use std::time::Instant;

use minke_model::Model;
use minke_train::plan::{Batch, Caches};
use minke_train::trainer::{self, Load};
use serde_json::{Value, json};

use super::logits::same_teacher;
use crate::error::Result;
use crate::events::Event;
use crate::grpo::{Answer, Beside, Drawn, Grpo, batch, passes};
use crate::metrics::{Sample, Values};
use crate::session::{Stage, Workshop};

/// The stage: tasks, rollouts and examinations of reinforcement learning, with a teacher for a verifier.
pub struct OnPolicy {
    grpo: Grpo,
    teacher: Model,
    fingerprint: String,
}

/// What an update amounted to.
#[derive(Default)]
struct Learned {
    /// Sum of `ln S - ln T`.
    divergence: f64,
    tokens: usize,
    /// Sum of `exp(d) - 1 - d`, d the trainer's log-probability less the sampler's.
    drift: f64,
    drifted: usize,
    mtp_loss: f64,
    mtp_tokens: usize,
    load: Vec<Load>,
}

impl OnPolicy {
    /// A stage whose student answers the tasks of `grpo`.
    pub fn new(grpo: Grpo, teacher: Model, fingerprint: &str) -> Self {
        Self { grpo, teacher, fingerprint: fingerprint.to_owned() }
    }

    /// Forward and backward of all answers, in passes; gradients are left in the trainer.
    fn learn(&mut self, shop: &mut Workshop, answers: &[&Answer]) -> Learned {
        let temperature = self.grpo.recipe.rollout.temperature;
        let tokens: usize = answers.iter().map(|answer| answer.len()).sum();
        let beside = Beside::of(&shop.trainer, answers);
        let mut learned = Learned { tokens, ..Learned::default() };
        for pass in passes(answers.iter().copied(), self.grpo.recipe.train.rows_per_pass) {
            let part = &answers[pass];
            // filters of sampling count for both: two distributions over the tokens that were left
            let taught = self.teacher.log_probs(&shop.cpu, &batch(part, temperature, 0));
            let mut starts = vec![0];
            for answer in part {
                starts.push(starts.last().expect("it begins with one") + answer.len());
            }
            let rows = batch(part, temperature, beside.modules);
            let options = beside.options(part.len());
            let stats =
                shop.trainer.model.policy_step(&shop.cpu, &rows, &options, &mut |s, log_probs, out| {
                    let sampled = &part[s].generation.trace.log_probs;
                    let taught = &taught[starts[s]..starts[s + 1]];
                    for (((out, &own), &now), &its) in out.iter_mut().zip(sampled).zip(log_probs).zip(taught)
                    {
                        let gap = f64::from(own) - f64::from(its);
                        *out = (gap / tokens as f64) as f32;
                        learned.divergence += gap;
                        let moved = f64::from(now) - f64::from(own);
                        learned.drift += moved.exp_m1() - moved;
                        learned.drifted += usize::from(now.to_bits() != own.to_bits());
                    }
                });
            learned.mtp_loss += stats.stats.mtp_loss_sum.iter().sum::<f64>();
            learned.mtp_tokens += stats.stats.mtp_tokens.iter().sum::<usize>();
            trainer::add_load(&mut learned.load, &stats.stats.expert_load);
        }
        learned
    }
}

impl Stage for OnPolicy {
    fn batch(&self) -> Option<Batch> {
        self.grpo.batch()
    }

    fn caches(&self, model: &Model) -> Caches {
        self.grpo.caches(model)
    }

    fn facts(&self) -> Vec<(String, String)> {
        let rollout = &self.grpo.recipe.rollout;
        let mut facts = self.grpo.facts();
        facts.retain(|(name, _)| name != "objective");
        let shape =
            format!("KL(student||teacher) of {} prompts x {} answers", rollout.prompts, rollout.group);
        facts.insert(0, ("objective".to_owned(), shape));
        facts
    }

    fn turn(
        &mut self,
        shop: &mut Workshop,
        turn: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Values> {
        let start = Instant::now();
        let mut drawn = Drawn::default();
        let wanted = self.grpo.recipe.rollout.prompts;
        let groups = self.grpo.round(shop, turn, wanted, &mut drawn)?;
        on_event(Event::Progress { what: "rollout", done: wanted as u64, total: wanted as u64 });
        let training = Instant::now();
        // an answer that no verifier could judge teaches as well as any
        let answers: Vec<&Answer> =
            groups.iter().flat_map(|group| &group.answers).filter(|answer| !answer.is_empty()).collect();
        let mut values = Values::default();
        drawn.stats.put_into(&mut values);
        values.put("long_prompts", drawn.long as f64);
        if !answers.is_empty() {
            let learned = self.learn(shop, &answers);
            let tokens = learned.tokens as f64;
            let divergence = learned.divergence / tokens;
            let update = shop.trainer.update(&shop.cpu, divergence, &learned.load)?;
            values.put("divergence", divergence);
            values.put("grad_norm", update.grad_norm);
            values.put("lr", update.rates.adamw);
            values.put_skipped(update.skipped.is_some().into());
            // both are 0 to the bit: one engine
            values.put("kl_rollout", learned.drift / tokens);
            values.put("bits_differ", learned.drifted as f64 / tokens);
            if learned.mtp_tokens > 0 {
                values.put("mtp_loss", learned.mtp_loss / learned.mtp_tokens as f64);
            }
            values.put_balance(learned.load.iter().map(|(_, counts)| counts));
        }
        values.put("train_s", training.elapsed().as_secs_f64());
        values.put("tok_s", drawn.stats.tokens as f64 / start.elapsed().as_secs_f64());
        self.grpo.curriculum.put_into(&mut values);
        Ok(values)
    }

    fn evaluate(
        &mut self,
        shop: &mut Workshop,
        step: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Values>> {
        self.grpo.evaluate(shop, step, on_event)
    }

    fn samples(&mut self, shop: &mut Workshop, step: u64) -> Result<Vec<Sample>> {
        self.grpo.samples(shop, step)
    }

    fn state(&self) -> Value {
        json!({ "tasks": self.grpo.state(), "teacher": self.fingerprint })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        same_teacher(state, &self.fingerprint)?;
        self.grpo.restore(&state["tasks"])
    }
}
