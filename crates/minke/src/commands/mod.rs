//! One module per command, and what several of them need.

mod bench_infer;
mod chat;
mod eval;
mod export;
mod generate;
mod gym;
mod inspect;
mod make;
mod paint;
mod post;
mod progress;
mod quantize;
mod sample;
mod score;
mod screen;
mod serve;
mod train;

use std::io::Read;
use std::path::Path;

use clap::ValueEnum;
use minke_cpu::Cpu;
use minke_data::{Thinking, Tokenizer};
use minke_infer::{Loaded, Sampling, Settings, Speculation, load_model};
use minke_model::{CacheKind, DType, Fp8, KvFormat, Precision, Purpose};
use minke_train::recipe::{Recipe, RecipeError, Resolved};

use crate::cli::{Bench, Command, Drafts, KeptAs, ModelArgs, SamplingArgs, SpeculationArgs, Threads, Word};
use crate::failure::Failure;
use crate::output;

/// Runs a command.
pub fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Pretrain(args) => train::pretrain(args),
        Command::Sft(args) => post::run(args, minke_post::sft::run),
        Command::Grpo(args) => post::run(args, minke_post::grpo::run),
        Command::Make(args) => make::run(args),
        Command::Sample(args) => sample::run(args),
        Command::Distill(args) => post::run(args, minke_post::distill::run),
        Command::Chat(args) => chat::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Score(args) => score::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Export(args) => export::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Gym(gym) => gym::run(gym),
        Command::Bench(Bench::Infer(args)) => bench_infer::run(args),
        Command::Bench(Bench::Train(args)) => train::bench(args),
        Command::Bench(Bench::Grpo(args)) => post::bench(args),
    }
}

/// Threads asked for; 0 stands for all cores.
fn threads(args: Threads) -> usize {
    args.threads.map_or(0, usize::from)
}

fn precision(word: Option<Word>) -> Option<Precision> {
    word.map(|word| match word {
        Word::F32 => Precision::uniform(DType::F32),
        Word::Bf16 => Precision::uniform(DType::Bf16),
        // a folder in FP8 has its own kind of scales
        Word::Fp8 => Precision::fp8(Fp8::default()),
    })
}

/// Loads a model that is to run on `cpu`, and tells its notes.
fn open(args: &ModelArgs, cpu: &Cpu) -> Result<Loaded, Failure> {
    let loaded = load_model(&args.model, precision(args.precision), Purpose::Run(cpu))?;
    for note in &loaded.notes {
        output::note(&format!("note: {note}"));
    }
    Ok(loaded)
}

/// The tokenizer of a model that is to read text.
fn tokenizer(loaded: &Loaded) -> Result<Tokenizer, Failure> {
    loaded.tokenizer.clone().ok_or_else(|| {
        Failure::user(format!("{} has no tokenizer, so it cannot read text", loaded.folder.display()))
            .hint("minke score reads token ids")
    })
}

/// What the user says, else what the model suggests, else plain sampling.
fn sampling(args: &SamplingArgs, loaded: &Loaded) -> Result<Sampling, Failure> {
    let suggested = Settings::suggested(&loaded.generation).sampling;
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(suggested.temperature),
        top_k: args.top_k.map_or(suggested.top_k, |k| k as usize),
        top_p: args.top_p.unwrap_or(suggested.top_p),
        min_p: args.min_p.unwrap_or(suggested.min_p),
        typical_p: args.typical_p.unwrap_or(suggested.typical_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(suggested.repetition_penalty),
        presence_penalty: args.presence_penalty.unwrap_or(suggested.presence_penalty),
        frequency_penalty: args.frequency_penalty.unwrap_or(suggested.frequency_penalty),
        seed: args.seed,
    };
    sampling.validate()?;
    Ok(sampling)
}

/// Where drafts come from.
fn speculation(drafts: Drafts) -> Speculation {
    match drafts {
        Drafts::Auto => Speculation::Auto,
        Drafts::Off => Speculation::Off,
        Drafts::Ngram => Speculation::Ngram,
        Drafts::Mtp => Speculation::Mtp,
        Drafts::Draft => Speculation::Draft,
    }
}

/// The model that drafts, if one is named.
fn draft_model(args: &SpeculationArgs, model: &ModelArgs, cpu: &Cpu) -> Result<Option<Loaded>, Failure> {
    let Some(draft) = &args.draft_model else {
        return Ok(None);
    };
    if !matches!(args.speculate, Drafts::Auto | Drafts::Draft) {
        output::note("note: --draft-model has no effect without --speculate draft or auto");
    }
    open(&ModelArgs { model: draft.clone(), ..model.clone() }, cpu).map(Some)
}

/// What a cache keeps.
fn cache(kept: KeptAs) -> CacheKind {
    match kept {
        KeptAs::Auto => CacheKind::Auto,
        KeptAs::Model => CacheKind::Model,
        KeptAs::F32 => CacheKind::Expanded(KvFormat::F32),
        KeptAs::Bf16 => CacheKind::Expanded(KvFormat::Bf16),
        KeptAs::Int8 => CacheKind::Expanded(KvFormat::Int8),
        KeptAs::Latent => CacheKind::Latent(None),
        KeptAs::LatentInt8 => CacheKind::Latent(Some(KvFormat::Int8)),
    }
}

/// The name of an argument's value.
fn value_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Sets whether and how long a model thinks: `on`, `off`, `auto` or a number of tokens, which may be called a budget.
fn think(settings: &mut Settings, how: &str) -> Result<(), String> {
    let (thinking, budget) = match how {
        "on" => (Thinking::Open, None),
        "off" => (Thinking::Empty, None),
        "auto" => (Thinking::Default, None),
        "budget" => {
            return Err("think: expected a number of tokens behind `budget`, as in budget 200".to_owned());
        }
        _ => match how.strip_prefix("budget ").map_or(how, str::trim_start).parse::<u32>() {
            Ok(n) => (Thinking::Open, Some(n as usize)),
            Err(_) => {
                return Err(format!("think: expected on, off, auto or a number of tokens, got `{how}`"));
            }
        },
    };
    (settings.thinking, settings.thinking_budget) = (thinking, budget);
    Ok(())
}

/// Whether an argument means a recipe rather than a model.
fn is_recipe(argument: &str) -> bool {
    let path = Path::new(argument);
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml")) && !path.is_dir()
}

/// A pretrain recipe, complete, for a command that reads no other; a tokenizer that it names is opened for the size of its
/// vocabulary.
fn resolve(command: &str, path: &Path, overrides: &[String]) -> Result<Resolved, Failure> {
    let recipe = Recipe::load(path, overrides).map_err(|error| match error {
        RecipeError::OtherCommand { name, got, .. } => Failure::user(format!(
            "{name} is a recipe for `minke {got}`: `minke {command}` reads pretrain recipes"
        )),
        other => other.into(),
    })?;
    let Some(tokenizer) = &recipe.data().tokenizer else { return Ok(recipe.resolve()?) };
    let path = minke_data::expand_path(tokenizer)
        .map_err(|reason| Failure::user(format!("`data.tokenizer`: {reason}")))?;
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path };
    let tokenizer = minke_data::Tokenizer::load(&file)?;
    Ok(recipe.resolve_with_vocabulary(tokenizer.vocab_size())?)
}

/// The name of what most products compute in, as recipes have it.
fn precision_name(precision: &Precision) -> &'static str {
    match precision.linear {
        _ if precision.coded.any() => "fp8",
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
    }
}

/// Reads a file of at most `limit_bytes` that the user named.
fn read_file(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, Failure> {
    let fail = |error| minke_data::Error::io("read", path)(error);
    let file = std::fs::File::open(path).map_err(fail)?;
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > limit_bytes {
        let limit = output::bytes(limit_bytes as f64);
        return Err(Failure::user(format!("{}: expected at most {limit}", path.display())));
    }
    Ok(bytes)
}

/// Refuses to write over a file, unless told to.
fn may_write(path: &Path, force: bool) -> Result<(), Failure> {
    if force || !path.exists() {
        return Ok(());
    }
    Err(Failure::user(format!("{} is there", path.display()))
        .hint("choose another file, or replace it with --force"))
}

/// Tokens per second, or 0 where nothing was timed.
fn rate(tokens: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}
