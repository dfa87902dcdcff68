//! The sections of a recipe but for `[model]`: their types, bounds and defaults.

use std::path::Path;

use minke_cpu::fp8::Fp8;
use minke_data::{Packing, SourceSpec};
use minke_model::{Coded, DType};
use serde::Serialize;

use super::SMALLEST_VOCABULARY;
use super::document::Document;
use super::error::RecipeError;
use super::reader::{self, BYTES, Section, TOKENS};
use super::tree::Kind;
use crate::schedule::{Decay, Schedule};

/// `[run]`: what the run is called and where it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Run {
    /// Its name; the recipe's file name by default.
    pub name: String,
    /// Seed of everything random.
    pub seed: u64,
    /// Folder that it writes; `runs/NAME` by default.
    pub out: String,
}

/// One entry of `data.sources`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Folder or file. `~`, `$NAME` and `${NAME:-default}` are expanded when it is opened; a relative path is
    /// taken from the recipe's folder and is absolute here.
    pub path: String,
    /// Patterns of files to take; empty takes what the data reader knows.
    pub include: Vec<String>,
    /// Patterns of files to leave out.
    pub exclude: Vec<String>,
    /// Most bytes to take from this source.
    pub max_bytes: Option<u64>,
}

/// `[data]`: the text.
#[derive(Debug, Clone, PartialEq)]
pub struct Data {
    /// Folders and files of text; empty when tokens are random.
    pub sources: Vec<Source>,
    /// Random tokens instead of text, for benchmarks.
    pub random: bool,
    /// Share of files that are held out.
    pub validation_share: f64,
    /// Whether attention stops at the borders of documents.
    pub document_borders: bool,
    /// How documents come into windows; whole ones need borders.
    pub packing: Packing,
    /// A `tokenizer.json` to use, its path treated as [`Source::path`] is.
    pub tokenizer: Option<String>,
    /// Size of the vocabulary to train when no tokenizer is given.
    pub vocab_size: Option<usize>,
    /// Most bytes to take from all sources.
    pub max_bytes: Option<u64>,
}

impl Data {
    /// The sources as the data reader takes them.
    pub fn specs(&self) -> Vec<SourceSpec> {
        // the bound on all sources is shared out evenly
        let each = self.max_bytes.map(|bytes| bytes / self.sources.len().max(1) as u64);
        let spec = |source: &Source| SourceSpec {
            path: source.path.clone(),
            include: source.include.clone(),
            exclude: source.exclude.clone(),
            max_bytes: [source.max_bytes, each].into_iter().flatten().min(),
            ..SourceSpec::default()
        };
        self.sources.iter().map(spec).collect()
    }
}

/// The optimizer of the matrices; everything else is trained by `AdamW`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// `AdamW` for all.
    AdamW,
    /// Muon for matrices, `AdamW` for the rest.
    Muon,
}

/// The keys of `[train]` that are the same in every kind of training: optimizer, rates, clipping, balance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Optim {
    /// Optimizer of the matrices.
    pub optimizer: Optimizer,
    /// Peak rate of `AdamW`.
    pub lr: f64,
    /// Peak rate of Muon.
    pub muon_lr: f64,
    /// Momentum of Muon.
    pub muon_momentum: f64,
    /// Decay rates of `AdamW`'s two moments.
    pub betas: [f64; 2],
    /// What these moments are kept in.
    pub moments: Moments,
    /// Epsilon of `AdamW`.
    pub eps: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Share of steps of warm-up.
    pub warmup_share: f64,
    /// Share of steps of decay.
    pub decay_share: f64,
    /// Shape of the decay.
    pub decay: Decay,
    /// Share of the peak rate that is left at the end.
    pub final_lr_share: f64,
    /// Norm that gradients are clipped to; 0 for no clipping.
    pub clip: f64,
    /// Steps in a row that are skipped because a loss or a gradient is not finite; one more ends the run.
    pub skip_limit: u64,
    /// Weight of the multi-token-prediction loss.
    pub mtp_loss_weight: f64,
    /// Speed gamma of the router's bias update.
    pub bias_update_speed: f64,
    /// Weight alpha of the sequence-wise balance loss.
    pub sequence_balance_alpha: f64,
    /// What is computed again on the way back instead of being kept: memory for time, and no bit of difference.
    pub recompute: Recompute,
}

impl Optim {
    /// The learning rate's course.
    pub fn schedule(&self) -> Schedule {
        let Self { warmup_share, decay_share, decay, final_lr_share, .. } = *self;
        Schedule { warmup_share, decay_share, decay, final_share: final_lr_share }
    }
}

/// What `AdamW`'s moments are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// bf16 where linear layers are in FP8, f32 elsewhere.
    Auto,
    /// f32.
    F32,
    /// bf16: DeepSeek-V3 report, section 3.3.3.
    Bf16,
}

impl Moments {
    /// Names that recipes use.
    const CHOICES: [(&'static str, Self); 3] =
        [("auto", Self::Auto), ("f32", Self::F32), ("bf16", Self::Bf16)];
    /// The slowest decay of a moment that bf16 can follow: with a slower one it changes by less than half of its last place
    /// in a step and stands still.
    pub const SLOWEST_BF16: f64 = 0.99;

    /// The name that recipes use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// The type, for a model of this precision and these decay rates.
    pub fn dtype(self, precision: minke_model::Precision, betas: [f64; 2]) -> DType {
        let coded = precision.coded.any() && Self::bf16_follows(betas);
        if self == Self::Bf16 || self == Self::Auto && coded { DType::Bf16 } else { DType::F32 }
    }

    fn bf16_follows(betas: [f64; 2]) -> bool {
        betas.iter().all(|&beta| beta <= Self::SLOWEST_BF16)
    }
}

/// What is computed a second time on the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing: everything that the way back reads is kept.
    None,
    /// Every layer, from its inputs.
    Layer,
}

impl Recompute {
    /// Names that recipes use.
    const CHOICES: [(&'static str, Self); 2] = [("none", Self::None), ("layer", Self::Layer)];

    /// The name that recipes use.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Layer => "layer",
        }
    }
}

impl From<Recompute> for minke_model::Recompute {
    fn from(recompute: Recompute) -> Self {
        match recompute {
            Recompute::None => Self::None,
            Recompute::Layer => Self::Layer,
        }
    }
}

/// `[train]`: the loop.
#[derive(Debug, Clone, PartialEq)]
pub struct Train {
    /// Tokens of one sequence.
    pub sequence_length: usize,
    /// Sequences of one micro-batch.
    pub batch_size: usize,
    /// Micro-batches of one step.
    pub accumulation: usize,
    /// Tokens to train on.
    pub tokens: u64,
    /// How gradients become steps.
    pub optim: Optim,
    /// Steps between evaluations; 0 for none but the last.
    pub eval_every: u64,
    /// Held-out tokens of one evaluation.
    pub eval_tokens: u64,
    /// Steps between samples; 0 for none but the last.
    pub sample_every: u64,
    /// Steps between checkpoints; 0 for none but the last.
    pub checkpoint_every: u64,
    /// Checkpoints kept that are known to be good.
    pub keep: usize,
}

/// A type that products are computed in; masters and sums are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16 operands, f32 accumulators.
    Bf16,
    /// E4M3 operands with a scale per tile or block, f32 accumulators; activations in bf16. Linear layers alone.
    Fp8,
}

impl Dtype {
    /// Names that recipes use.
    const CHOICES: [(&'static str, Self); 3] = [("f32", Self::F32), ("bf16", Self::Bf16), ("fp8", Self::Fp8)];

    /// The name that recipes use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        }
    }
}

/// `precision = "..."` or `[precision]`: the type of each role's products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Precision {
    /// Projections of attention and dense FFNs.
    pub linear: Dtype,
    /// Projections of routed experts.
    pub expert: Dtype,
    /// The head.
    pub head: Dtype,
    /// Scores and values of attention.
    pub attention: Dtype,
    /// The router; f32 unless asked for, since near ties decide which experts run.
    pub router: Dtype,
    /// What shares a scale in FP8.
    pub scaling: Scaling,
    /// What scales are in FP8.
    pub scales: Scales,
}

/// What shares a scale in FP8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// 128 neighbours of an activation's row, 128 x 128 of a weight.
    Block,
    /// A whole tensor: what the fine grain is compared with. Not for sampling: rows of a batch share it.
    Tensor,
}

/// What scales are in FP8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scales {
    /// Any f32, and powers of two where activations are coded twice.
    F32,
    /// Powers of two everywhere.
    Ue8m0,
}

impl Precision {
    /// What one word means: that type for all but the router.
    pub fn all(dtype: Dtype) -> Self {
        let head = if dtype == Dtype::Fp8 { Dtype::Bf16 } else { dtype };
        let (scaling, scales) = (Scaling::Block, Scales::F32);
        Self { linear: dtype, expert: dtype, head, attention: dtype, router: Dtype::F32, scaling, scales }
    }

    /// The word or words for it: `fp8`, or `fp8, tensor scales`.
    pub fn name(&self) -> &'static str {
        match (self.linear, self.scaling) {
            (Dtype::Fp8, Scaling::Tensor) => "fp8, a scale per tensor",
            (dtype, _) => dtype.name(),
        }
    }

    /// Each role by name.
    pub fn roles(&self) -> [(&'static str, Dtype); 5] {
        [
            ("linear", self.linear),
            ("expert", self.expert),
            ("head", self.head),
            ("attention", self.attention),
            ("router", self.router),
        ]
    }
}

impl From<Precision> for minke_model::Precision {
    fn from(precision: Precision) -> Self {
        let of = |dtype| match dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 | Dtype::Fp8 => DType::Bf16,
        };
        let Precision { linear, expert, head, attention, router, scaling, scales } = precision;
        let coded = |dtype| dtype == Dtype::Fp8;
        let how = Fp8 { power_of_two: scales == Scales::Ue8m0, per_tensor: scaling == Scaling::Tensor };
        Self {
            coded: Coded { linear: coded(linear), expert: coded(expert), attention: coded(attention), how },
            linear: of(linear),
            expert: of(expert),
            attention: of(attention),
            head: of(head),
            router: of(router),
        }
    }
}

/// `[sample]`: text written during training.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Texts to continue; empty for none.
    pub prompts: Vec<String>,
    /// Tokens to write after each.
    pub tokens: usize,
    /// Temperature; 0 takes the likeliest token.
    pub temperature: f64,
}

/// `[train]` as given, where what is absent is derived from the model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GivenTrain {
    /// Everything that has a plain default; the derived fields below stand in `train` as zero.
    pub train: Train,
    pub tokens: Option<u64>,
}

const MOST_STEPS: u64 = 1 << 40;

/// `[run]`; its name is the recipe's unless it says another, and its folder what [`Document::written_to`] says.
///
/// # Errors
/// Wrong types, and a name that is to be a folder and is a path.
pub fn run(section: &mut Section, document: &Document) -> Result<Run, RecipeError> {
    let stem = Path::new(document.name()).file_stem().and_then(|stem| stem.to_str()).unwrap_or("run");
    let name = section.text("name")?.unwrap_or_else(|| stem.to_owned());
    // beyond 2^63 TOML has no integers
    let seed = section.integer("seed", 0, i64::MAX as u64)?.unwrap_or(0);
    let given = section.text("out")?;
    let out = match document.out().map(str::to_owned).or(given) {
        Some(out) => out,
        None if matches!(&name[..], "." | "..") || name.contains(['/', '\\']) => {
            let expected = "the name of a folder in runs/, or run.out beside it";
            return Err(section.conflict("name", &format!("the string {name:?}"), expected));
        }
        None => format!("runs/{name}"),
    };
    Ok(Run { name, seed, out })
}

pub(super) fn data(mut section: Section) -> Result<Data, RecipeError> {
    let mut sources = Vec::new();
    for mut source in section.sections("sources")? {
        let Some(path) = source.path("path")? else {
            return Err(source.missing("path", "a folder or file"));
        };
        let entry = Source {
            path,
            include: source.texts("include")?.unwrap_or_default(),
            exclude: source.texts("exclude")?.unwrap_or_default(),
            max_bytes: source.count("max_bytes", &BYTES)?,
        };
        source.finish()?;
        sources.push(entry);
    }
    let random = section.flag("random")?.unwrap_or(false);
    if random && !sources.is_empty() {
        return Err(section.conflict("random", "true", "false, since data.sources are given"));
    }
    if !random && sources.is_empty() {
        return Err(section.missing("sources", "at least one source, or data.random = true"));
    }
    let data = Data {
        sources,
        random,
        validation_share: section
            .float("validation_share", "a number from 0 to 0.5", |share| (0.0..=0.5).contains(&share))?
            .unwrap_or(if random { 0.0 } else { 0.02 }),
        document_borders: section.flag("document_borders")?.unwrap_or(true),
        packing: section.choice("packing", &Packing::CHOICES)?.unwrap_or_default(),
        tokenizer: section.path("tokenizer")?,
        vocab_size: section
            .integer("vocab_size", SMALLEST_VOCABULARY as u64, 1 << 24)?
            .map(|size| size as usize),
        max_bytes: section.count("max_bytes", &BYTES)?,
    };
    if data.packing == Packing::Whole && !data.document_borders {
        let expected =
            "\"stream\", or data.document_borders = true: attention must stop where a document ends";
        return Err(section.conflict("packing", "\"whole\"", expected));
    }
    if data.packing == Packing::Whole && data.random {
        return Err(section.conflict(
            "packing",
            "\"whole\"",
            "\"stream\", since random tokens are no documents",
        ));
    }
    if data.vocab_size.is_some() && (data.random || data.tokenizer.is_some()) {
        let expected = "no value, since no tokenizer is trained (the model's is model.vocab_size)";
        return Err(section.conflict("vocab_size", "a size", expected));
    }
    if data.tokenizer.is_some() && data.random {
        return Err(section.conflict("tokenizer", "a path", "no value, since the tokens are random"));
    }
    section.finish()?;
    Ok(data)
}

/// A relative path, from a folder; what the data reader expands or resolves itself stays.
pub fn located(path: String, folder: Option<&Path>) -> String {
    let own = path.starts_with(['/', '~', '$']) || path.starts_with("hf:") || path.is_empty();
    match folder {
        Some(folder) if !own => {
            let joined = folder.join(&path);
            std::path::absolute(&joined).unwrap_or(joined).to_string_lossy().into_owned()
        }
        _ => path,
    }
}

/// Optimizer, rates, clipping and balance; the rates are `defaults`' where the section does not say them.
pub fn optim(s: &mut Section, defaults: Optim) -> Result<Optim, RecipeError> {
    let optimizers = [("adamw", Optimizer::AdamW), ("muon", Optimizer::Muon)];
    let decays = [("linear", Decay::Linear), ("one_minus_sqrt", Decay::OneMinusSqrt)];
    let betas = s.decays("betas")?.unwrap_or(defaults.betas);
    let moments = s.choice("moments", &Moments::CHOICES)?.unwrap_or(defaults.moments);
    if moments == Moments::Bf16 && !Moments::bf16_follows(betas) {
        let expected =
            format!("\"f32\", or betas of {} at most: bf16 cannot follow slower ones", Moments::SLOWEST_BF16);
        return Err(s.conflict("moments", "\"bf16\"", &expected));
    }
    Ok(Optim {
        optimizer: s.choice("optimizer", &optimizers)?.unwrap_or(defaults.optimizer),
        lr: s.positive("lr")?.unwrap_or(defaults.lr),
        muon_lr: s.positive("muon_lr")?.unwrap_or(defaults.muon_lr),
        muon_momentum: s
            .float("muon_momentum", "a number from 0 to below 1", |share| (0.0..1.0).contains(&share))?
            .unwrap_or(defaults.muon_momentum),
        betas,
        moments,
        eps: s.positive("eps")?.unwrap_or(defaults.eps),
        weight_decay: s.not_negative("weight_decay")?.unwrap_or(defaults.weight_decay),
        warmup_share: s.share("warmup_share")?.unwrap_or(defaults.warmup_share),
        decay_share: s.share("decay_share")?.unwrap_or(defaults.decay_share),
        decay: s.choice("decay", &decays)?.unwrap_or(defaults.decay),
        final_lr_share: s.share("final_lr_share")?.unwrap_or(defaults.final_lr_share),
        clip: s.not_negative("clip")?.unwrap_or(defaults.clip),
        skip_limit: s.integer("skip_limit", 0, 1 << 32)?.unwrap_or(defaults.skip_limit),
        mtp_loss_weight: s.not_negative("mtp_loss_weight")?.unwrap_or(defaults.mtp_loss_weight),
        bias_update_speed: s.not_negative("bias_update_speed")?.unwrap_or(defaults.bias_update_speed),
        sequence_balance_alpha: s
            .not_negative("sequence_balance_alpha")?
            .unwrap_or(defaults.sequence_balance_alpha),
        recompute: s.choice("recompute", &Recompute::CHOICES)?.unwrap_or(defaults.recompute),
    })
}

impl Optim {
    /// What training from scratch starts from; rates of 0 stand for those that the model decides.
    pub const PRETRAIN: Self = Self {
        optimizer: Optimizer::Muon,
        lr: 0.0,
        muon_lr: 0.0,
        muon_momentum: 0.95,
        betas: [0.9, 0.95],
        moments: Moments::Auto,
        eps: 1e-8,
        weight_decay: 0.1,
        warmup_share: 0.02,
        decay_share: 0.3,
        decay: Decay::OneMinusSqrt,
        final_lr_share: 0.0,
        clip: 1.0,
        skip_limit: 10,
        mtp_loss_weight: 0.3,
        bias_update_speed: 0.001,
        sequence_balance_alpha: 0.0001,
        recompute: Recompute::None,
    };
}

pub(super) fn train(mut section: Section) -> Result<GivenTrain, RecipeError> {
    let s = &mut section;
    let given = GivenTrain {
        tokens: s.count("tokens", &TOKENS)?,
        train: Train {
            sequence_length: s.integer("sequence_length", 2, 1 << 20)?.unwrap_or(256) as usize,
            batch_size: s.integer("batch_size", 1, 1 << 16)?.unwrap_or(16) as usize,
            accumulation: s.integer("accumulation", 1, 1 << 16)?.unwrap_or(1) as usize,
            tokens: 0,
            optim: optim(s, Optim::PRETRAIN)?,
            eval_every: s.integer("eval_every", 0, MOST_STEPS)?.unwrap_or(100),
            eval_tokens: s.count("eval_tokens", &TOKENS)?.unwrap_or(65_536),
            sample_every: s.integer("sample_every", 0, MOST_STEPS)?.unwrap_or(0),
            checkpoint_every: s.integer("checkpoint_every", 0, MOST_STEPS)?.unwrap_or(200),
            keep: s.integer("keep", 1, 1 << 16)?.unwrap_or(2) as usize,
        },
    };
    section.finish()?;
    Ok(given)
}

/// Either one word or a table of roles.
pub fn precision(root: &mut Section) -> Result<Precision, RecipeError> {
    let Some(node) = root.take("precision") else { return Ok(Precision::all(Dtype::Bf16)) };
    if !matches!(node.kind, Kind::Table(_)) {
        let expected = format!("{}, or a table of roles", reader::listed(&Dtype::CHOICES));
        let dtype = reader::one_of(node, &Dtype::CHOICES);
        return dtype.map(Precision::all).ok_or_else(|| root.invalid("precision", node, &expected, ""));
    }
    let mut section = root.section("precision")?;
    let default = Precision::all(Dtype::Bf16);
    let mut role = |key, default| Ok(section.choice(key, &Dtype::CHOICES)?.unwrap_or(default));
    let (linear, expert) = (role("linear", default.linear)?, role("expert", default.expert)?);
    let attention = role("attention", default.attention)?;
    let mut role = |key, default| Ok(section.choice(key, &Dtype::CHOICES[..2])?.unwrap_or(default));
    let (head, router) = (role("head", default.head)?, role("router", default.router)?);
    let scaling = section.choice("scaling", &[("block", Scaling::Block), ("tensor", Scaling::Tensor)])?;
    let scales = section.choice("scales", &[("f32", Scales::F32), ("ue8m0", Scales::Ue8m0)])?;
    let (scaling, scales) = (scaling.unwrap_or(default.scaling), scales.unwrap_or(default.scales));
    let precision = Precision { linear, expert, head, attention, router, scaling, scales };
    section.finish()?;
    Ok(precision)
}

pub(super) fn sample(mut section: Section) -> Result<Sample, RecipeError> {
    let sample = Sample {
        prompts: section.texts("prompts")?.unwrap_or_default(),
        tokens: section.integer("tokens", 1, 1 << 16)?.unwrap_or(64) as usize,
        temperature: section.temperature("temperature")?.unwrap_or(0.8),
    };
    section.finish()?;
    Ok(sample)
}
