//! `minke bench infer`: how fast prompts are read and answers written, beside what the machine can do.

use std::ops::ControlFlow;
use std::time::Instant;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_infer::{Engine, Request, Sampling, Session, Speculated, Speculation, load_model, machine};
use minke_model::config::{Config, FfnKind};
use minke_model::spec::{self, Role};
use minke_model::{CacheKind, Model, Param, Purpose};
use minke_num::rng;
use serde::Serialize;

use super::progress::Bar;
use super::{cache, is_recipe, precision, precision_name, rate, resolve, speculation, threads, value_name};
use crate::cli::{BenchInfer, Drafts, KeptAs};
use crate::failure::Failure;
use crate::output::{self, bytes, percent};

const PREFILL: usize = 512;
const DECODE: usize = 64;
/// Random prompts and weights are the same on every run.
const SEED: u64 = 1;

#[derive(Serialize)]
struct Report {
    model: String,
    precision: &'static str,
    prefill: usize,
    decode: usize,
    batch: usize,
    runs: usize,
    threads: usize,
    level: &'static str,
    prefill_tok_s: f64,
    decode_tok_s: f64,
    peak_rss_bytes: Option<u64>,
    kv_cache_bytes: usize,
    kv_cache: String,
    prefill_gflops: f64,
    gemm_peak_gflops: f64,
    prefill_share_of_gemm_peak: f64,
    decode_bytes_per_step: f64,
    decode_gb_s: f64,
    read_bandwidth_gb_s: f64,
    decode_share_of_bandwidth: f64,
    speculate: String,
    drafted: usize,
    accepted: usize,
    tokens_per_call: f64,
    profile: Vec<Part>,
}

/// What an operation took, of all that was timed, over all runs.
#[derive(Serialize)]
struct Part {
    operation: &'static str,
    share: f64,
    calls: u64,
}

/// The operations of a model's passes, those that took longest first.
fn profile(model: &Model) -> Vec<Part> {
    let table = model.timers.table();
    let total: f64 = table.iter().map(|(_, span, _)| span.as_secs_f64()).sum();
    let part = |(operation, span, calls): (&'static str, std::time::Duration, u64)| Part {
        operation,
        share: span.as_secs_f64() / total,
        calls,
    };
    let mut parts: Vec<Part> = table.into_iter().map(part).collect();
    parts.sort_by(|a, b| b.share.total_cmp(&a.share));
    parts
}

/// Runs the command.
pub fn run(args: &BenchInfer) -> Result<(), Failure> {
    let cpu = Cpu::detect(threads(args.threads));
    let mut tokenizer = None;
    let mut model = if is_recipe(&args.model) {
        let resolved = resolve("bench infer", args.model.as_ref(), &[])?;
        let dtypes = precision(args.precision).unwrap_or(minke_model::Precision::from(resolved.precision));
        if dtypes.coded.couples_rows() {
            let reason =
                "precision.scaling = \"tensor\" gives all tokens of a call one scale: it cannot generate";
            return Err(Failure::user(reason).hint("--precision fp8 has a scale for each block"));
        }
        Model::random(resolved.config, dtypes, SEED)
    } else {
        let loaded = load_model(&args.model, precision(args.precision), Purpose::Run(&cpu))?;
        tokenizer = loaded.tokenizer;
        loaded.model
    };
    let context = model.config.max_position_embeddings;
    let (mut prefill, decode) = lengths(args, context);
    let read = args.prompt.as_ref().map(|text| encode(tokenizer.as_ref(), text)).transpose()?;
    if let Some(ids) = &read {
        prefill = ids.len();
    }
    if prefill + decode + 1 > context {
        output::note(&format!(
            "note: longer than the model's context of {context}: the speed is right, the text is not"
        ));
        model.config.max_position_embeddings = prefill + decode + 1;
    }
    let (batch, runs) = (args.batch as usize, args.runs as usize);
    let w = model.config.vocab_size as u64;
    let random = |b| (0..prefill as u64).map(|i| rng::below(SEED, b, i, w) as u32).collect();
    let prompts: Vec<Vec<u32>> =
        (0..batch as u64).map(|b| read.clone().unwrap_or_else(|| random(b))).collect();
    // as they are after a second or two of use
    model.copy_mapped_weights_first(&cpu);
    let mut draft = match &args.draft_model {
        Some(draft) if matches!(args.speculate, Drafts::Auto | Drafts::Draft) => {
            let mut loaded = load_model(draft, precision(args.precision), Purpose::Run(&cpu))?;
            loaded.model.copy_mapped_weights_first(&cpu);
            Some(loaded)
        }
        Some(_) => return Err(Failure::user("--draft-model drafts with --speculate draft or auto")),
        None => None,
    };
    // only so that a draft's vocabulary is compared with the model's: nobody asks for the text
    let of_draft = tokenizer.as_ref().filter(|_| draft.is_some());
    let mut engine = Engine::new(&mut model, &cpu, of_draft).with_cache(cache(args.cache.cache))?;
    if let Some(draft) = &mut draft {
        engine = engine.with_draft(&mut draft.model, draft.tokenizer.as_ref())?;
    }
    let (mut reading, mut writing) = (Vec::new(), Vec::new());
    let (mut kv_cache_bytes, mut speculated) = (0, Speculated::default());
    // the first run packs weights and touches memory: it does not count
    let mut bar = Bar::new("runs", args.json);
    for run in 0..=runs {
        bar.set(run as u64, runs as u64 + 1, String::new);
        let (read_s, written_s, kv, drafts) =
            measure(&mut engine, &prompts, decode, speculation(args.speculate))?;
        (kv_cache_bytes, speculated) = (kv, drafts);
        if run > 0 {
            reading.push(rate(batch * prefill, read_s));
            writing.push(rate(batch * decode, written_s));
        }
    }
    drop(bar);
    let (prefill_tok_s, decode_tok_s) = (machine::median(&reading), machine::median(&writing));
    // before the loops below, whose memory is not the model's
    let peak_rss_bytes = machine::peak_rss_bytes();
    let dtype = model.precision.linear;
    let gemm_peak_gflops = machine::gemm_peak_gflops(&cpu, dtype);
    let read_bandwidth_gb_s = machine::read_bandwidth_gb_s(&cpu);
    let prefill_gflops = prefill_tok_s * flops_per_prompt_token(&model.config, prefill) / 1e9;
    let half_way = kv_cache_bytes as f64 * (prefill as f64 + decode as f64 / 2.0) / (prefill + decode) as f64;
    let decode_bytes_per_step = weight_bytes_per_step(&model, batch) + half_way;
    let decode_gb_s = decode_tok_s / batch as f64 * decode_bytes_per_step / 1e9;
    let kept = match args.cache.cache {
        KeptAs::Auto if CacheKind::Auto.is_latent(&model.config) => KeptAs::Latent,
        KeptAs::Auto => KeptAs::Model,
        kept => kept,
    };
    let report = Report {
        model: args.model.clone(),
        precision: precision_name(&model.precision),
        prefill,
        decode,
        batch,
        runs,
        threads: cpu.threads(),
        level: cpu.level().name(),
        prefill_tok_s,
        decode_tok_s,
        peak_rss_bytes,
        kv_cache_bytes,
        kv_cache: value_name(&kept),
        prefill_gflops,
        gemm_peak_gflops,
        prefill_share_of_gemm_peak: prefill_gflops / gemm_peak_gflops,
        decode_bytes_per_step,
        decode_gb_s,
        read_bandwidth_gb_s,
        decode_share_of_bandwidth: decode_gb_s / read_bandwidth_gb_s,
        speculate: value_name(&args.speculate),
        drafted: speculated.drafted,
        accepted: speculated.accepted,
        tokens_per_call: speculated.tokens_per_call(),
        profile: profile(&model),
    };
    if args.json { output::json(&report) } else { output::text(&text(&report)) }
}

/// Seconds of reading all prompts, seconds of writing all answers, bytes of keys and values, and what came of drafts.
fn measure(
    engine: &mut Engine<'_>,
    prompts: &[Vec<u32>],
    decode: usize,
    speculation: Speculation,
) -> Result<(f64, f64, usize, Speculated), Failure> {
    let mut sessions: Vec<Session> = prompts.iter().map(|_| engine.empty_session()).collect();
    let requests = |prompts: &[Vec<u32>], max_tokens| -> Vec<Request> {
        let request = |prompt: &Vec<u32>| Request {
            prompt: prompt.clone(),
            max_tokens,
            sampling: Sampling::greedy(),
            speculation,
            ..Request::default()
        };
        prompts.iter().map(request).collect()
    };
    let mut go = |_: minke_infer::Delta<'_>| ControlFlow::Continue(());
    let first = requests(prompts, 1);
    let start = Instant::now();
    let begun = engine.generate_in(&mut sessions, &first, &mut go)?;
    let read_s = start.elapsed().as_secs_f64();
    let longer: Vec<Vec<u32>> =
        prompts.iter().zip(&begun).map(|(prompt, one)| [&prompt[..], &one.tokens].concat()).collect();
    let rest = requests(&longer, decode);
    let start = Instant::now();
    let written = engine.generate_in(&mut sessions, &rest, &mut go)?;
    let written_s = start.elapsed().as_secs_f64();
    let mut all = Speculated::default();
    for Speculated { drafted, accepted, calls } in written.iter().map(|one| one.speculated) {
        (all.drafted, all.accepted, all.calls) =
            (all.drafted + drafted, all.accepted + accepted, all.calls + calls);
    }
    Ok((read_s, written_s, sessions.iter().map(Session::bytes).sum(), all))
}

/// The tokens of a text, for a model that reads text.
fn encode(tokenizer: Option<&Tokenizer>, text: &str) -> Result<Vec<u32>, Failure> {
    let Some(tokenizer) = tokenizer else {
        return Err(Failure::user("--prompt: the model has no tokenizer, so it cannot read text"));
    };
    let ids: Vec<u32> = tokenizer.bos().into_iter().chain(tokenizer.encode(text)?).collect();
    if ids.is_empty() { Err(Failure::user("--prompt: expected a text, got none")) } else { Ok(ids) }
}

/// The lengths asked for, or what fits into the context: prompt, its first token, answer.
fn lengths(args: &BenchInfer, context: usize) -> (usize, usize) {
    let asked = |n: Option<u32>| n.map(|n| n as usize);
    let decode = asked(args.decode).unwrap_or(DECODE.min((context / 4).max(1)));
    let prefill = asked(args.prefill).unwrap_or(PREFILL.min(context.saturating_sub(decode + 1)).max(1));
    (prefill, decode)
}

/// Forward FLOPs of a token of a prompt; the head runs for the last one only.
fn flops_per_prompt_token(config: &Config, prefill: usize) -> f64 {
    let head = 2.0 * config.vocab_size as f64 * config.hidden_size as f64;
    spec::flops_per_token(config, prefill, false).forward() as f64 - head * (1.0 - 1.0 / prefill as f64)
}

/// Bytes of weights that one decoding step must read: of routed experts, those that `batch` tokens choose when they
/// choose evenly, `e (1 - (1 - k/e)^batch)`.
fn weight_bytes_per_step(model: &Model, batch: usize) -> f64 {
    let config = &model.config;
    let share = |entry: &Param| {
        let layer = entry.name.split('.').nth(2).and_then(|layer| layer.parse::<usize>().ok());
        if layer.is_some_and(|layer| layer >= config.num_hidden_layers) {
            // MTP modules do not run
            return 0.0;
        }
        match entry.role {
            Role::Embedding if !config.tie_word_embeddings => 0.0,
            Role::ExpertLinear { .. } => match config.ffn(layer.unwrap_or(0)) {
                FfnKind::Moe(moe) => {
                    let chosen = moe.num_experts_per_tok as f64 / moe.n_routed_experts as f64;
                    1.0 - (1.0 - chosen).powi(i32::try_from(batch).unwrap_or(i32::MAX))
                }
                FfnKind::Dense { .. } => 1.0,
            },
            Role::Embedding
            | Role::Head
            | Role::Norm
            | Role::Bias
            | Role::AttentionLinear
            | Role::FfnLinear
            | Role::Router
            | Role::RouterBias
            | Role::MtpProjection => 1.0,
        }
    };
    let entries = model.params.entries.iter();
    let each = |entry: &Param| match model.precision.coded.of(entry.role) {
        Some(_) => 1,
        None => entry.dtype.size_bytes(),
    };
    let bytes = |(i, entry): (usize, &Param)| {
        let packed = entry.shape.iter().product::<usize>() * each(entry);
        share(entry) * model.params.stored_bytes(i).unwrap_or(packed) as f64
    };
    entries.enumerate().map(bytes).sum()
}

/// The operations that took most.
fn most(profile: &[Part]) -> String {
    let named = |part: &Part| format!("{} {}", part.operation, percent(part.share));
    profile.iter().take(5).map(named).collect::<Vec<_>>().join(", ")
}

fn text(report: &Report) -> String {
    let prefill = format!(
        "{:.0} tokens/s   {:.1} GFLOP/s, {} of the machine's {:.0} ({})",
        report.prefill_tok_s,
        report.prefill_gflops,
        percent(report.prefill_share_of_gemm_peak),
        report.gemm_peak_gflops,
        report.precision
    );
    let decode = format!(
        "{:.0} tokens/s   {:.2} GB/s, {} of the machine's {:.1}",
        report.decode_tok_s,
        report.decode_gb_s,
        percent(report.decode_share_of_bandwidth),
        report.read_bandwidth_gb_s
    );
    let drafts = match report.drafted {
        0 => "none".to_owned(),
        drafted => format!(
            "{} of {drafted} came, {:.2} tokens a call ({})",
            report.accepted, report.tokens_per_call, report.speculate
        ),
    };
    output::table(&[
        ("model", report.model.clone()),
        ("machine", format!("{} threads, {}", report.threads, report.level)),
        (
            "work",
            format!(
                "{} x ({} read + {} written), median of {}",
                report.batch, report.prefill, report.decode, report.runs
            ),
        ),
        ("prefill", prefill),
        ("decode", decode),
        ("drafts", drafts),
        ("where time goes", most(&report.profile)),
        ("peak memory", report.peak_rss_bytes.map_or("unknown".to_owned(), |n| bytes(n as f64))),
        ("keys and values", format!("{} ({})", bytes(report.kv_cache_bytes as f64), report.kv_cache)),
    ])
}
