//! `minke score`: log-probabilities, and logits, of given tokens.

use std::path::Path;

use minke_cpu::Cpu;
use minke_data::hf::{Dtype, SafetensorsWriter, TensorSpec};
use minke_infer::{Engine, EngineError};
use serde::{Deserialize, Serialize};

use super::{open, read_file, threads};
use crate::cli::Score;
use crate::failure::Failure;
use crate::output;

/// No file of tokens is larger; a hundred million ids fit.
const MAX_TOKENS_BYTES: u64 = 1 << 30;

#[derive(Deserialize)]
struct Input {
    sequences: Vec<Vec<u32>>,
}

/// One sequence's figures.
#[derive(Serialize)]
struct Scored {
    tokens: usize,
    /// One per token: the first has none before it that could foretell it.
    logprobs: Vec<Option<f32>>,
    sum_logprob: f64,
    nats_per_token: Option<f64>,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    sequences: Vec<Scored>,
    logits: Option<&'a Path>,
    threads: usize,
}

/// Runs the command.
pub fn run(args: &Score) -> Result<(), Failure> {
    let bytes = read_file(&args.tokens, MAX_TOKENS_BYTES)?;
    let Input { sequences } = serde_json::from_slice(&bytes).map_err(|error| {
        Failure::user(format!("{}: {error}", args.tokens.display()))
            .hint("the file holds {\"sequences\": [[1, 2, 3], [4, 5]]}")
    })?;
    drop(bytes);
    let cpu = Cpu::detect(threads(args.model.threads));
    let mut loaded = open(&args.model, &cpu)?;
    let w = loaded.model.config.vocab_size;
    let mut engine = Engine::new(&mut loaded.model, &cpu, None);
    // all of the input before any of the work
    for (number, sequence) in sequences.iter().enumerate() {
        engine.check_tokens(sequence).map_err(|error| {
            let hint = match error {
                EngineError::Context { .. } => "cut long sequences into several",
                _ => "the ids must come from this model's tokenizer",
            };
            Failure::user(error.to_string())
                .context(&format!("{}: sequence {number}", args.tokens.display()))
                .hint(hint)
        })?;
    }
    let mut writer = match &args.logits {
        Some(path) => Some(SafetensorsWriter::create(path, specs(&sequences, w))?),
        None => None,
    };
    let mut scored = Vec::with_capacity(sequences.len());
    let mut bytes = Vec::new();
    for sequence in &sequences {
        let mut written = Ok(());
        let mut write = |rows: &[f32]| {
            if let (Some(writer), Ok(())) = (&mut writer, &written) {
                bytes.clear();
                bytes.extend(rows.iter().flat_map(|x| x.to_le_bytes()));
                written = writer.part(&bytes);
            }
        };
        if sequence.is_empty() {
            write(&[]);
        }
        let log_probs = engine.score(sequence, &mut write)?;
        written?;
        let sum: f64 = log_probs.iter().map(|&x| f64::from(x)).sum();
        let first = (!sequence.is_empty()).then_some(None);
        scored.push(Scored {
            tokens: sequence.len(),
            nats_per_token: (!log_probs.is_empty()).then(|| -sum / log_probs.len() as f64),
            logprobs: first.into_iter().chain(log_probs.into_iter().map(Some)).collect(),
            sum_logprob: sum,
        });
    }
    if let Some(writer) = writer {
        writer.finish()?;
    }
    if args.json {
        let logits = args.logits.as_deref();
        return output::json(&Report {
            model: &args.model.model,
            sequences: scored,
            logits,
            threads: cpu.threads(),
        });
    }
    let mut text = "sequence    tokens   log-probability   nats/token\n".to_owned();
    for (number, one) in scored.iter().enumerate() {
        let per_token = one.nats_per_token.map_or("-".to_owned(), |nats| format!("{nats:.4}"));
        text.push_str(&format!("{number:8}  {:8}  {:16.4}  {per_token:>11}\n", one.tokens, one.sum_logprob));
    }
    if let Some(path) = &args.logits {
        text.push_str(&format!("logits of shape [tokens, {w}] are in {}\n", path.display()));
    }
    output::text(&text)
}

fn specs(sequences: &[Vec<u32>], w: usize) -> Vec<TensorSpec> {
    let spec = |(number, sequence): (usize, &Vec<u32>)| TensorSpec {
        name: format!("logits.{number}"),
        dtype: Dtype::F32,
        shape: vec![sequence.len(), w],
    };
    sequences.iter().enumerate().map(spec).collect()
}
