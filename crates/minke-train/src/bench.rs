//! `bench train`: how fast a recipe trains on this machine, and where the time goes.
//!
//! Tokens are random and every label is there; a step is forward, backward and optimizer, as in a run. The rate of
//! one large matrix product, measured in the same process, is what the figures are set against.

use std::path::PathBuf;
use std::time::Instant;

use minke_cpu::Cpu;
use minke_infer::machine::{available_bytes, gemm_peak_gflops, median, peak_rss_bytes};
use minke_model::{DType, Model, Precision, spec};
use serde::Serialize;

use crate::batch;
use crate::error::Result;
use crate::optim::Settings;
use crate::plan::{self, Shape};
use crate::recipe::{self, Recipe};
use crate::trainer::{Course, Trainer};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The recipe's file.
    pub recipe: PathBuf,
    /// `a.b=v`, in order.
    pub overrides: Vec<String>,
    /// Steps that count, after two that do not; at least one.
    pub steps: usize,
    /// Threads; 0 for as many as there are cores.
    pub threads: usize,
    /// Whether to start what needs more memory than there is.
    pub force: bool,
}

/// Share of one operation in a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    /// The operation; forward and backward apart.
    pub operation: &'static str,
    /// Milliseconds of a step.
    pub ms: f64,
    /// Of the whole step.
    pub share: f64,
    /// Calls in a step.
    pub calls: f64,
}

/// Where the memory of a step is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryUse {
    /// f32 masters.
    pub weights_bytes: usize,
    /// The same weights as products read them.
    pub packed_bytes: usize,
    /// Gradients of weights, which are in `tensors_bytes`.
    pub gradients_bytes: usize,
    /// Moments.
    pub optimizer_bytes: usize,
    /// Values that forward passes keep for backward passes: activations.
    pub kept_bytes: usize,
    /// All tensors of a step when there were most: activations, gradients, working memory of operations.
    pub tensors_bytes: usize,
}

/// What was measured. Rates are those of the median step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Tokens per second.
    pub tok_s: f64,
    /// The median step.
    pub step_ms: f64,
    /// The fastest step.
    pub best_step_ms: f64,
    /// The very first step, which makes all memory.
    pub first_step_ms: f64,
    /// The most memory that the process held, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// Where it is.
    pub memory: MemoryUse,
    /// Useful operations of a token, forward and backward.
    pub flops_per_token: u64,
    /// Rate of useful operations.
    pub gflops: f64,
    /// Rate of a 1024 x 1024 x 1024 product in the type of the linear layers, best of several before and after.
    pub gemm_peak_gflops: f64,
    /// The same in f32.
    pub gemm_peak_f32_gflops: f64,
    /// `gflops / gemm_peak_gflops`.
    pub gemm_share: f64,
    /// Threads that computed.
    pub threads: usize,
    /// Instruction-set level.
    pub level: &'static str,
    /// Type of the linear layers.
    pub precision: &'static str,
    /// The optimizer.
    pub optimizer: &'static str,
    /// Steps that counted.
    pub steps: usize,
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Parameters, MTP modules included.
    pub parameters: u64,
    /// Parameters that one token uses.
    pub active_parameters: u64,
    /// Loss of the last step: random tokens cannot be predicted, so about the logarithm of the vocabulary.
    pub loss: f64,
    /// Where the time of the counted steps went, the longest first.
    pub profile: Vec<Part>,
}

/// Measures; `on_step` hears between steps how many of all are done.
///
/// # Errors
/// A recipe that is wrong, or training that diverges.
pub fn run(options: &Options, on_step: &mut dyn FnMut(u64, u64)) -> Result<Figures> {
    let recipe = Recipe::load(&options.recipe, &options.overrides)?.resolve()?;
    let cpu = Cpu::detect(options.threads);
    if !options.force {
        plan::check(&Shape::from(&recipe), &cpu, available_bytes())?;
    }
    let (config, train, seed) = (recipe.config.clone(), &recipe.train, recipe.run.seed);
    let linear = Precision::from(recipe.precision).linear;
    let peaks = || (gemm_peak_gflops(&cpu, linear), gemm_peak_gflops(&cpu, DType::F32));
    let before = peaks();
    let model = Model::random(config.clone(), Precision::from(recipe.precision), seed);
    let mut trainer = Trainer::new(model, &Settings::from(&train.optim), Course::from(&recipe));
    let micro = |step: u64| -> Vec<_> {
        let first = step * train.accumulation as u64;
        (first..first + train.accumulation as u64)
            .map(|at| batch::random(&config, train.batch_size, train.sequence_length, seed, at))
            .collect()
    };
    let steps = options.steps.max(1);
    let mut times_ms = Vec::with_capacity(steps + 2);
    let mut loss = 0.0;
    for step in 0..steps + 2 {
        on_step(step as u64, steps as u64 + 2);
        let batch = micro(step as u64);
        if step == 2 {
            trainer.model.timers = minke_tensor::Timers::default();
            minke_tensor::Memory::reset();
        }
        let start = Instant::now();
        loss = trainer.step(&cpu, &batch)?.loss;
        times_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let tensors = minke_tensor::Memory::now();
    let params = &trainer.model.params;
    let memory = MemoryUse {
        weights_bytes: size_of_val(&params.data[..]),
        packed_bytes: params.packed_bytes(),
        gradients_bytes: size_of_val(&params.data[..]),
        optimizer_bytes: trainer.optimizer().bytes(),
        kept_bytes: tensors.kept_bytes,
        tensors_bytes: tensors.peak_bytes,
    };
    // the machine's clock may have changed meanwhile: the better of both is the limit
    let after = peaks();
    let peak = (before.0.max(after.0), before.1.max(after.1));
    let counted = &times_ms[2..];
    let total_ms: f64 = counted.iter().sum();
    let profile = trainer.model.timers.table().into_iter().map(|(operation, span, calls)| {
        let ms = span.as_secs_f64() * 1e3;
        Part { operation, ms: ms / steps as f64, share: ms / total_ms, calls: calls as f64 / steps as f64 }
    });
    let profile = profile.collect();
    let step_ms = median(counted);
    let tok_s = recipe.tokens_per_step() as f64 / step_ms * 1e3;
    let flops_per_token = spec::flops_per_token(&config, train.sequence_length, true).training();
    let gflops = tok_s * flops_per_token as f64 / 1e9;
    let counts = spec::parameters(&config);
    Ok(Figures {
        tok_s,
        step_ms,
        best_step_ms: counted.iter().copied().fold(f64::INFINITY, f64::min),
        first_step_ms: times_ms[0],
        peak_rss_bytes: peak_rss_bytes(),
        memory,
        flops_per_token,
        gflops,
        gemm_peak_gflops: peak.0,
        gemm_peak_f32_gflops: peak.1,
        gemm_share: gflops / peak.0,
        threads: cpu.threads(),
        level: cpu.level().name(),
        precision: recipe.precision.name(),
        optimizer: match train.optim.optimizer {
            recipe::Optimizer::AdamW => "adamw",
            recipe::Optimizer::Muon => "muon",
        },
        steps,
        tokens_per_step: recipe.tokens_per_step(),
        parameters: counts.total + counts.mtp,
        active_parameters: counts.active,
        loss,
        profile,
    })
}
