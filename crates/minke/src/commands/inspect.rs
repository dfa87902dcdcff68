//! `minke inspect`: what a model or recipe is and needs, without running it.

use minke_cpu::Cpu;
use minke_data::gguf::TensorType;
use minke_data::hf::weight_of_scales;
use minke_infer::gguf::GgufWeights;
use minke_infer::{ModelFiles, Weights, machine};
use minke_model::config::{AttentionKind, Config};
use minke_model::spec::{self, Role};
use minke_model::{
    CacheKind, DType, KvFormat, Loading, PAGE, Precision, Purpose, Unmoved, WeightSource, running_bytes,
};
use minke_train::plan;
use minke_train::recipe::{self, Optim, Optimizer, Resolved};
use serde::Serialize;

use super::train::duration;
use super::{is_recipe, resolve, threads};
use crate::cli::Inspect;
use crate::failure::Failure;
use crate::output::{self, bytes, count, percent};

#[derive(Serialize)]
struct Parameters {
    total: u64,
    active: u64,
    embedding: u64,
    head: u64,
    mtp: u64,
    mtp_active: u64,
}

#[derive(Serialize)]
struct Group {
    role: &'static str,
    tensors: usize,
    parameters: u64,
}

#[derive(Serialize)]
struct Memory {
    /// Weights as they are stored.
    weights_bytes: u64,
    /// Weights as they are in memory while the model runs: a byte for each in FP8, and their scales; of others an f32
    /// master and the copy that products read.
    running_weights_bytes: u64,
    /// Keys and values of one token.
    kv_cache_bytes_per_token: u64,
    /// Of `context` tokens.
    kv_cache_bytes: u64,
    /// Of one token, in 8 bits.
    kv_int8_bytes_per_token: u64,
    /// The same as latents, where attention has them.
    kv_latent_bytes_per_token: Option<u64>,
    kv_latent_int8_bytes_per_token: Option<u64>,
    /// Masters, gradients and optimizer state, without activations.
    training_state_bytes: u64,
}

#[derive(Serialize)]
struct FlopsPerToken {
    forward: u64,
    training: u64,
    training_with_mtp: u64,
}

/// What weight files hold.
#[derive(Serialize)]
struct Files {
    tensors: usize,
    bytes: u64,
    dtypes: Vec<String>,
    missing: usize,
    unknown: usize,
    /// Of a GGUF file: what the tensors of each role are stored in.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    formats: Vec<Stored>,
    /// Of a GGUF file: bits of all tensors over numbers in them.
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_weight: Option<f64>,
}

/// Tensors of one role in one format.
#[derive(Serialize)]
struct Stored {
    role: &'static str,
    format: &'static str,
    tensors: usize,
    parameters: u64,
    bytes: u64,
    #[serde(skip)]
    in_blocks: bool,
}

/// What training by a recipe will need on this machine.
#[derive(Serialize)]
struct Training {
    threads: usize,
    level: &'static str,
    /// What products compute in.
    precision: String,
    recompute: &'static str,
    steps: u64,
    tokens_per_step: u64,
    memory: plan::Memory,
    available_bytes: Option<u64>,
    /// None where it does not fit.
    time: Option<plan::Time>,
    #[serde(skip)]
    rows: Vec<(&'static str, String)>,
}

#[derive(Serialize)]
struct Report {
    what: String,
    family: &'static str,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    /// Heads and their widths.
    #[serde(skip)]
    attention: String,
    /// Widths of dense layers and of experts.
    #[serde(skip)]
    feed_forward: String,
    context: usize,
    optimizer: &'static str,
    parameters: Parameters,
    tensors: Vec<Group>,
    memory: Memory,
    flops_per_token: FlopsPerToken,
    training: Option<Training>,
    /// Of a recipe: all that it says and all that follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    recipe: Option<serde_json::Value>,
    files: Option<Files>,
}

/// Runs the command.
pub fn run(args: &Inspect) -> Result<(), Failure> {
    let mut too_large = None;
    let report = if is_recipe(&args.what) {
        let resolved = resolve("inspect", args.what.as_ref(), &args.set)?;
        if args.resolved {
            return output::text(&resolved.to_toml());
        }
        let context = args.context.map_or(resolved.train.sequence_length, |n| n as usize);
        let precision = minke_model::Precision::from(resolved.precision);
        let optim = &resolved.train.optim;
        let mut report = describe(args.what.clone(), &resolved.config, precision, context, optim);
        let (training, why) = training(&resolved, threads(args.threads));
        (report.training, too_large) = (Some(training), why);
        report.recipe = Some(resolved.to_json());
        report
    } else {
        if !args.set.is_empty() || args.resolved {
            return Err(Failure::user("--set and --resolved are for recipes, and this is a model")
                .hint("give a recipe file, whose name ends in .toml"));
        }
        let found = ModelFiles::find(&args.what)?;
        let weights = found.weights()?;
        let config = &found.config;
        let context = args.context.map_or(config.max_position_embeddings, |n| n as usize);
        let files = files(config, &weights);
        let is = |dtype: &str| files.dtypes.iter().any(|found| found == dtype);
        let in_blocks = files.formats.iter().any(|group| group.in_blocks);
        // products with weights in blocks have their other numbers in bf16
        let half = is("BF16") || in_blocks;
        let name = found.path.display().to_string();
        let mut precision = Precision::uniform(if half { DType::Bf16 } else { DType::F32 });
        if is("F8_E4M3") {
            precision.attention = DType::Bf16;
        }
        let mut report = describe(
            name,
            config,
            precision,
            context,
            &Optim { optimizer: Optimizer::AdamW, ..Optim::PRETRAIN },
        );
        report.memory.weights_bytes = files.bytes;
        // of files that do not fit the config there is nothing that would run
        let cpu = Cpu::detect(1);
        report.memory.running_weights_bytes =
            Loading::new(config.clone(), None, &weights, Purpose::Run(&cpu), Unmoved::AsStored)
                .map_or(report.memory.running_weights_bytes, |loading| {
                    loading.held_bytes() + loading.mapped_bytes()
                });
        report.files = Some(files);
        report
    };
    if args.json {
        output::json(&report)?;
    } else {
        output::text(&text(&report))?;
    }
    too_large.map_or(Ok(()), |why| Err(Failure::user(why.to_string())))
}

fn training(recipe: &Resolved, threads: usize) -> (Training, Option<plan::TooLarge>) {
    let (shape, cpu) = (plan::Shape::from(recipe), Cpu::detect(threads));
    let available_bytes = machine::available_bytes();
    let fit = shape.fit(cpu.level(), cpu.threads(), available_bytes);
    let too_large = if let plan::Fit::TooLarge(why) = fit { Some(why) } else { None };
    let training = Training {
        threads: cpu.threads(),
        level: cpu.level().name(),
        precision: precision_name(recipe.precision),
        recompute: recipe.train.optim.recompute.name(),
        steps: recipe.steps(),
        tokens_per_step: recipe.tokens_per_step(),
        memory: shape.memory(cpu.level(), cpu.threads()),
        available_bytes,
        time: too_large.is_none().then(|| shape.time(&cpu)),
        rows: settings(recipe),
    };
    (training, too_large)
}

/// How a recipe trains.
fn settings(recipe: &Resolved) -> Vec<(&'static str, String)> {
    let Resolved { train, .. } = recipe;
    let optim = &train.optim;
    let rates = match optim.optimizer {
        Optimizer::AdamW => format!("adamw, lr {}", optim.lr),
        Optimizer::Muon => format!("muon, lr {} for matrices, {} for the rest", optim.muon_lr, optim.lr),
    };
    let accumulated =
        if train.accumulation > 1 { format!(" x {}", train.accumulation) } else { String::new() };
    vec![
        (
            "  batch",
            format!(
                "{} x {}{accumulated} tokens, {} in all",
                train.batch_size,
                train.sequence_length,
                count(train.tokens as f64)
            ),
        ),
        ("  optimizer", format!("{rates}; weight decay {}", optim.weight_decay)),
        (
            "  schedule",
            format!(
                "{} of {} steps to warm up, the last {} to decay",
                percent(optim.warmup_share),
                recipe.steps(),
                percent(optim.decay_share)
            ),
        ),
    ]
}

/// The word of a recipe for what products compute in, or that of each role.
fn precision_name(precision: recipe::Precision) -> String {
    let (scaling, scales) = (precision.scaling, precision.scales);
    if precision == (recipe::Precision { scaling, scales, ..recipe::Precision::all(precision.linear) }) {
        return precision.name().to_owned();
    }
    precision.roles().map(|(role, dtype)| format!("{role} {}", dtype.name())).join(", ")
}

fn describe(what: String, config: &Config, precision: Precision, context: usize, optim: &Optim) -> Report {
    let tensors = spec::tensors(config);
    let counts = spec::parameters(config);
    let size = |dtype: DType| dtype.size_bytes() as u64;
    let weights_bytes = tensors
        .iter()
        .map(|t| t.numel() as u64 * size(precision.of(t.role, config.tie_word_embeddings)))
        .sum();
    // masters and gradients; AdamW keeps two moments, Muon one in f32 for the matrices that it moves
    let moments = 2 * size(optim.moments.dtype(precision, optim.betas));
    let state = tensors.iter().filter(|t| t.role != Role::RouterBias).map(|t| {
        let by_muon = match t.role {
            Role::AttentionLinear | Role::FfnLinear | Role::ExpertLinear { .. } | Role::MtpProjection => {
                optim.optimizer == Optimizer::Muon
            }
            Role::Embedding | Role::Head | Role::Norm | Role::Bias | Role::Router | Role::RouterBias => false,
        };
        t.numel() as u64 * if by_muon { 12 } else { 8 + moments }
    });
    let cached = |kind: CacheKind| kind.page_bytes(config, &precision).map(|page| page.div_ceil(PAGE) as u64);
    let expanded = |kind| cached(kind).expect("every model has keys and values");
    let kv_cache_bytes_per_token = expanded(CacheKind::Model);
    let trunk = spec::flops_per_token(config, context, false);
    Report {
        what,
        family: config.family.model_type(),
        layers: config.num_hidden_layers,
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        attention: attention(config),
        feed_forward: feed_forward(config),
        context,
        optimizer: match optim.optimizer {
            Optimizer::AdamW => "adamw",
            Optimizer::Muon => "muon",
        },
        parameters: Parameters {
            total: counts.total,
            active: counts.active,
            embedding: counts.embedding,
            head: counts.head,
            mtp: counts.mtp,
            mtp_active: counts.mtp_active,
        },
        memory: Memory {
            weights_bytes,
            running_weights_bytes: tensors
                .iter()
                .map(|tensor| running_bytes(config, &precision, tensor, false))
                .sum(),
            kv_cache_bytes_per_token,
            kv_cache_bytes: kv_cache_bytes_per_token.saturating_mul(context as u64),
            kv_int8_bytes_per_token: expanded(CacheKind::Expanded(KvFormat::Int8)),
            kv_latent_bytes_per_token: cached(CacheKind::Latent(None)),
            kv_latent_int8_bytes_per_token: cached(CacheKind::Latent(Some(KvFormat::Int8))),
            training_state_bytes: state.sum(),
        },
        tensors: groups(&tensors),
        flops_per_token: FlopsPerToken {
            forward: trunk.forward(),
            training: trunk.training(),
            training_with_mtp: spec::flops_per_token(config, context, true).training(),
        },
        training: None,
        recipe: None,
        files: None,
    }
}

fn attention(config: &Config) -> String {
    let heads = config.num_attention_heads;
    match config.attention {
        AttentionKind::Mla { q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
            let queries = q_lora_rank.map_or(String::new(), |rank| format!(", {rank} of queries"));
            format!(
                "{heads} heads of {qk_nope_head_dim} + {qk_rope_head_dim} rotated, values of {v_head_dim}; \
                 latents: {kv_lora_rank} of keys and values{queries}"
            )
        }
        AttentionKind::Gqa { num_key_value_heads, head_dim, .. } => {
            format!("{heads} heads of {head_dim}, {num_key_value_heads} of keys and values")
        }
    }
}

fn feed_forward(config: &Config) -> String {
    let layers = config.num_hidden_layers;
    let Some(sparse) = &config.moe_layers else { return format!("width {}", config.intermediate_size) };
    let with = (0..layers).filter(|layer| sparse.has_experts(*layer)).count();
    let moe = &sparse.moe;
    let dense = match layers - with {
        0 => String::new(),
        n => format!("width {} in {n} of {layers} layers; ", config.intermediate_size),
    };
    format!(
        "{dense}{} experts of width {}, {} a token, {} shared",
        moe.n_routed_experts, moe.moe_intermediate_size, moe.num_experts_per_tok, moe.n_shared_experts
    )
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Embedding => "embedding",
        Role::Head => "head",
        Role::Norm => "norms",
        Role::Bias => "biases",
        Role::AttentionLinear => "attention",
        Role::FfnLinear => "dense and shared feed-forward",
        Role::ExpertLinear { .. } => "routed experts",
        Role::Router => "router",
        Role::RouterBias => "router bias",
        Role::MtpProjection => "MTP projection",
    }
}

fn groups(tensors: &[spec::TensorSpec]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for tensor in tensors {
        let role = role_name(tensor.role);
        match groups.iter_mut().find(|group| group.role == role) {
            Some(group) => {
                group.tensors += 1;
                group.parameters += tensor.numel() as u64;
            }
            None => groups.push(Group { role, tensors: 1, parameters: tensor.numel() as u64 }),
        }
    }
    groups
}

fn files(config: &Config, weights: &Weights) -> Files {
    let specs = spec::tensors(config);
    let aliases = spec::optional_aliases(config);
    let known: std::collections::HashSet<&str> =
        specs.iter().map(|s| s.name.as_str()).chain(aliases.iter().map(|a| a.name.as_str())).collect();
    let (mut dtypes, tensors, bytes, names): (Vec<String>, usize, u64, Vec<String>) = match weights {
        Weights::Folder(folder) => {
            let files = folder.files();
            let views = || files.names().filter_map(|name| files.get(name));
            (
                views().map(|view| view.dtype.name().to_owned()).collect(),
                files.len(),
                views().map(|view| view.bytes.len() as u64).sum(),
                files.names().map(str::to_owned).collect(),
            )
        }
        Weights::Gguf(weights) => {
            let file = weights.file();
            let tensors = || file.names().filter_map(|name| file.tensor(name));
            (
                tensors().map(|tensor| tensor.kind.name().to_owned()).collect(),
                file.len(),
                tensors().map(|tensor| tensor.bytes.len() as u64).sum(),
                weights.names(),
            )
        }
    };
    dtypes.sort();
    dtypes.dedup();
    let formats = weights.gguf().map_or(Vec::new(), |weights| stored(&specs, weights));
    let parameters: u64 = formats.iter().map(|group| group.parameters).sum();
    let in_groups: u64 = formats.iter().map(|group| group.bytes).sum();
    Files {
        tensors,
        bytes,
        dtypes,
        missing: specs.iter().filter(|s| weights.shape(&s.name).is_none()).count(),
        // scales are known with their weights
        unknown: names.iter().filter(|name| !known.contains(weight_of_scales(name).unwrap_or(name))).count(),
        bits_per_weight: (parameters > 0).then(|| in_groups as f64 * 8.0 / parameters as f64),
        formats,
    }
}

/// What the tensors of each role are stored in, in the order of the table of tensors.
fn stored(specs: &[spec::TensorSpec], weights: &GgufWeights) -> Vec<Stored> {
    let mut groups: Vec<Stored> = Vec::new();
    for spec in specs {
        let (Some(kind), Some(bytes)) = (weights.kind(&spec.name), weights.bytes(&spec.name)) else {
            continue;
        };
        let (role, format, bytes) = (role_name(spec.role), kind.name(), bytes as u64);
        match groups.iter_mut().find(|group| (group.role, group.format) == (role, format)) {
            Some(group) => {
                group.tensors += 1;
                group.parameters += spec.numel() as u64;
                group.bytes += bytes;
            }
            None => groups.push(Stored {
                role,
                format,
                tensors: 1,
                parameters: spec.numel() as u64,
                bytes,
                in_blocks: matches!(kind, TensorType::Blocks(_)),
            }),
        }
    }
    groups
}

fn training_rows(training: &Training) -> Vec<(&'static str, String)> {
    let m = &training.memory;
    let size = |n: u64| bytes(n as f64);
    let there = training
        .available_bytes
        .map_or(String::new(), |available| format!(" of {} available", size(available)));
    let mut rows = vec![(
        "training here",
        format!("{} threads, {}; products in {}", training.threads, training.level, training.precision),
    )];
    rows.extend(training.rows.iter().cloned());
    rows.extend([
        ("  peak memory", format!("{}{there}", size(m.peak_bytes))),
        ("    weights", size(m.weights_bytes)),
        ("    packed for products", size(m.packed_bytes)),
        ("    gradients", format!("{} more than values leave room for", size(m.gradients_bytes))),
        ("    optimizer", size(m.optimizer_bytes)),
        (
            "    activations",
            format!("{} (recompute = \"{}\")", size(m.activations_bytes), training.recompute),
        ),
        ("    in passing", size(m.passing_bytes)),
        ("    threads", size(m.threads_bytes)),
        ("    process", size(m.process_bytes)),
        ("    data", size(m.data_bytes)),
    ]);
    if let Some(time) = &training.time {
        let step = format!("{:.0} ms for {} tokens", time.step_s * 1e3, training.tokens_per_step);
        let run = format!("{} for {} steps", duration(time.run_s), training.steps);
        rows.push(("  step", step));
        let parts = [
            ("    products", time.products_s),
            ("    attention", time.attention_s),
            ("    head", time.head_s),
            ("    passes over memory", time.passes_s),
            ("    update", time.update_s),
        ];
        rows.extend(parts.map(|(name, seconds)| (name, format!("{:.0} ms", seconds * 1e3))));
        rows.push(("  speed", format!("{:.0} tokens/s", time.tok_s)));
        rows.push(("  whole run", run));
    }
    rows
}

fn text(report: &Report) -> String {
    let p = &report.parameters;
    let m = &report.memory;
    let f = &report.flops_per_token;
    let mut rows = vec![
        ("model", report.what.clone()),
        ("family", report.family.to_owned()),
        (
            "shape",
            format!(
                "{} layers of width {}, vocabulary {}",
                report.layers, report.hidden_size, report.vocab_size
            ),
        ),
        ("attention", report.attention.clone()),
        ("feed-forward", report.feed_forward.clone()),
        ("parameters", format!("{} ({} active per token)", count(p.total as f64), count(p.active as f64))),
        ("  embedding, head", format!("{}, {}", count(p.embedding as f64), count(p.head as f64))),
    ];
    if p.mtp > 0 {
        let mtp = format!("{} more ({} active)", count(p.mtp as f64), count(p.mtp_active as f64));
        rows.push(("  MTP modules", mtp));
    }
    if let Some(files) = &report.files {
        let mut line = format!("{} in {}", files.tensors, files.dtypes.join(", "));
        if files.missing > 0 {
            line.push_str(&format!("; {} missing", files.missing));
        }
        if files.unknown > 0 {
            line.push_str(&format!("; {} unknown", files.unknown));
        }
        rows.push(("tensors in files", line));
        if let Some(bits) = files.bits_per_weight {
            rows.push(("bits per weight", format!("{bits:.2}")));
        }
    }
    rows.push(("tensors by role", String::new()));
    let indented: Vec<String> = report.tensors.iter().map(|group| format!("  {}", group.role)).collect();
    for (name, group) in indented.iter().zip(&report.tensors) {
        let tensors = if group.tensors == 1 { "tensor, " } else { "tensors," };
        let mut line =
            format!("{:>6} {tensors} {} parameters", group.tensors, count(group.parameters as f64));
        let formats =
            report.files.iter().flat_map(|files| &files.formats).filter(|stored| stored.role == group.role);
        let formats: Vec<String> =
            formats.map(|stored| format!("{} {}", count(stored.parameters as f64), stored.format)).collect();
        match &formats[..] {
            [] => {}
            [one] => line.push_str(&format!(" in {}", one.rsplit(' ').next().unwrap_or_default())),
            several => line.push_str(&format!(": {}", several.join(", "))),
        }
        rows.push((name.as_str(), line));
    }
    rows.push(("memory", String::new()));
    rows.push(("  weights", bytes(m.weights_bytes as f64)));
    rows.push(("  while it runs", bytes(m.running_weights_bytes as f64)));
    let cache = format!(
        "{} per token, {} for {} tokens",
        bytes(m.kv_cache_bytes_per_token as f64),
        bytes(m.kv_cache_bytes as f64),
        report.context
    );
    rows.push(("  keys and values", cache));
    let per_token = |n: u64| format!("{} per token", bytes(n as f64));
    rows.push(("  in 8 bits", per_token(m.kv_int8_bytes_per_token)));
    if let (Some(latent), Some(coded)) = (m.kv_latent_bytes_per_token, m.kv_latent_int8_bytes_per_token) {
        rows.push(("  as latents", format!("{}, {} in 8 bits", per_token(latent), bytes(coded as f64))));
    }
    let state =
        format!("{} with {}, without activations", bytes(m.training_state_bytes as f64), report.optimizer);
    rows.push(("  training state", state));
    rows.push(("FLOPs per token", format!("in sequences of {} tokens", report.context)));
    rows.push(("  forward", count(f.forward as f64)));
    rows.push(("  training", count(f.training as f64)));
    if p.mtp > 0 {
        rows.push(("  training with MTP", count(f.training_with_mtp as f64)));
    }
    if let Some(training) = &report.training {
        rows.extend(training_rows(training));
    }
    let lines = output::table(&rows);
    lines.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}
