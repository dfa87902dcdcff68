//! The speed of one step of reinforcement learning, at fixed lengths, beside what the machine can do.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use minke_cpu::Cpu;
use minke_gym::Verdict;
use minke_infer::machine::{median, peak_rss_bytes};
use minke_infer::{Engine, Request, Sampling};
use minke_model::{Model, Precision};
use minke_num::rng;
use minke_tensor::Timers;
use minke_train::optim::Settings;
use minke_train::recipe::Recipe;
use minke_train::trainer::{Course, Trainer};
use serde::Serialize;

use super::{Algorithm, Answer, Grade, Learner, Objective};
use crate::error::{PostError, Result};
use crate::recipe::refuse_coupled;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// A recipe of pretraining, whose model and optimizer are taken.
    pub recipe: PathBuf,
    /// `a.b=v`, in order.
    pub overrides: Vec<String>,
    /// Prompts of a step.
    pub prompts: usize,
    /// Answers to each.
    pub group: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens of an answer.
    pub new_tokens: usize,
    /// Steps that count, after one that does not.
    pub steps: usize,
    /// Threads; 0 for as many as there are cores.
    pub threads: usize,
}

/// What was measured; times are medians.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Seconds of a step.
    pub step_s: f64,
    /// Seconds of its rollout.
    pub rollout_s: f64,
    /// Seconds of its update.
    pub train_s: f64,
    /// Tokens sampled a second, while sampling.
    pub rollout_tok_s: f64,
    /// Tokens trained on a second, while training.
    pub train_tok_s: f64,
    /// Tokens sampled in a step.
    pub new_tokens: usize,
    /// Sampled tokens whose log-probability was another one in the trainer than in the sampler.
    pub bits_differ: usize,
    /// Most memory held.
    pub peak_rss_bytes: Option<u64>,
    /// Threads that computed.
    pub threads: usize,
    /// Instruction-set level.
    pub level: &'static str,
    /// Steps that counted.
    pub steps: usize,
    /// Parts of the rollout, in milliseconds a step, the longest first.
    pub rollout_profile: Vec<(&'static str, f64)>,
    /// Parts of the update.
    pub train_profile: Vec<(&'static str, f64)>,
}

/// Measures steps on random weights and prompts: sample groups, reward the share of even tokens, one update.
/// `on_step` hears between steps how many of all are done.
///
/// # Errors
/// A recipe that is wrong, or lengths that do not fit into the model's context.
pub fn run(options: &Options, on_step: &mut dyn FnMut(u64, u64)) -> Result<Figures> {
    let recipe = Recipe::load(&options.recipe, &options.overrides)?.resolve()?;
    let cpu = Cpu::detect(options.threads);
    let config = recipe.config.clone();
    let (vocabulary, context) = (config.vocab_size as u64, config.max_position_embeddings);
    if options.prompt_tokens + options.new_tokens > context {
        let reason =
            format!("{} + {} tokens in a context of {context}", options.prompt_tokens, options.new_tokens);
        return Err(PostError::unsuitable("--prompt-tokens, --new-tokens", reason));
    }
    let seed = recipe.run.seed;
    let precision = Precision::from(recipe.precision);
    refuse_coupled("precision", Some(precision))?;
    let model = Model::random(config, precision, seed);
    let mut trainer = Trainer::new(model, &Settings::from(&recipe.train.optim), Course::from(&recipe));
    let mut learner = Learner {
        objective: Objective::from(Algorithm::Grpo),
        temperature: 1.0,
        longest: options.new_tokens,
        minibatches: 1,
        epochs: 1,
        rows_per_pass: 8192,
        reference: None,
    };
    let (mut rollouts, mut updates, mut bits_differ) = (Vec::new(), Vec::new(), 0);
    let answers = options.prompts * options.group;
    let mut profiles = [Timers::default(), Timers::default()];
    for step in 0..=options.steps as u64 {
        on_step(step, options.steps as u64 + 1);
        if step == 1 {
            profiles = [Timers::default(), Timers::default()];
        }
        let prompt = |prompt: u64| -> Vec<u32> {
            (0..options.prompt_tokens as u64)
                .map(|i| rng::below(seed, step << 32 | prompt, i, vocabulary) as u32)
                .collect()
        };
        let requests: Vec<Request> = (0..answers as u64)
            .map(|at| Request {
                prompt: prompt(at / options.group as u64),
                max_tokens: options.new_tokens,
                sampling: Sampling { seed, ..Sampling::default() },
                sequence: step << 32 | at,
                ..Request::default()
            })
            .collect();
        let start = Instant::now();
        let mut engine = Engine::new(&mut trainer.model, &cpu, None).traced().without_log_probs();
        let generations = engine.generate(&requests, &mut |_| ControlFlow::Continue(()))?;
        let graded: Vec<Answer> = requests
            .into_iter()
            .zip(generations)
            .map(|(request, generation)| {
                let tokens = &generation.trace.tokens;
                let even = tokens.iter().filter(|&&id| id % 2 == 0).count();
                let reward = Some(even as f64 / tokens.len().max(1) as f64);
                let grade =
                    Grade { reward, right: false, answered: true, formed: true, verdict: Verdict::Wrong };
                Answer { prompt: request.prompt, generation, grade }
            })
            .collect();
        let sampled = start.elapsed().as_secs_f64();
        profiles[0].merge(&std::mem::take(&mut trainer.model.timers));
        let groups: Vec<Vec<&Answer>> =
            graded.chunks(options.group).map(|group| group.iter().collect()).collect();
        let learned = learner.learn(&cpu, &mut trainer, &groups)?;
        let whole = start.elapsed().as_secs_f64();
        profiles[1].merge(&std::mem::take(&mut trainer.model.timers));
        bits_differ += learned.bits_differ();
        if step > 0 {
            rollouts.push(sampled);
            updates.push(whole - sampled);
        }
    }
    let (rollout_s, train_s) = (median(&rollouts), median(&updates));
    let wholes: Vec<f64> = rollouts.iter().zip(&updates).map(|(a, b)| a + b).collect();
    let new_tokens = answers * options.new_tokens;
    let rows = answers * (options.prompt_tokens + options.new_tokens - 1);
    let [rollout_profile, train_profile] = profiles.map(|timers| {
        let ms = |span: std::time::Duration| span.as_secs_f64() * 1e3 / options.steps.max(1) as f64;
        timers.table().into_iter().map(|(name, span, _)| (name, ms(span))).collect()
    });
    Ok(Figures {
        step_s: median(&wholes),
        rollout_s,
        train_s,
        rollout_tok_s: new_tokens as f64 / rollout_s,
        train_tok_s: rows as f64 / train_s,
        new_tokens,
        bits_differ,
        peak_rss_bytes: peak_rss_bytes(),
        threads: cpu.threads(),
        level: cpu.level().name(),
        steps: options.steps,
        rollout_profile,
        train_profile,
    })
}
