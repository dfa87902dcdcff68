//! How well a model foretells a text.

use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_infer::Engine;
use minke_model::Model;
use serde::Serialize;

use crate::error::{PostError, Result};

/// No text is larger.
const MOST_TEXT_BYTES: u64 = 256 << 20;
/// Windows are no longer than this, so that a text is not read in one piece by models of long context.
const MOST_WINDOW: usize = 4096;

/// How well a model foretells a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextReport {
    /// The file.
    pub path: String,
    /// Bytes of what was foretold.
    pub bytes: usize,
    /// Tokens foretold.
    pub tokens: usize,
    /// Sum of their negative log-probabilities, in nats.
    pub nats: f64,
    /// `nats / ln 2 / bytes`: comparable between tokenizers.
    pub bits_per_byte: f64,
    /// `exp(nats / tokens)`: not comparable between tokenizers.
    pub perplexity: f64,
    /// Tokens that the model saw at once.
    pub window: usize,
}

/// A text that is to be foretold.
pub(super) struct Text {
    /// At least two.
    pub tokens: Vec<u32>,
    /// Bytes of all tokens but the first.
    bytes: usize,
}

impl Text {
    /// Reads a file; its tokens begin with `bos`.
    pub fn read(tokenizer: &Tokenizer, bos: Option<u32>, path: &Path) -> Result<Self> {
        let place = || path.display().to_string();
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(PostError::io("open", path))?;
        file.take(MOST_TEXT_BYTES + 1).read_to_end(&mut bytes).map_err(PostError::io("read", path))?;
        if bytes.len() as u64 > MOST_TEXT_BYTES {
            return Err(PostError::unsuitable(place(), format!("larger than {} MiB", MOST_TEXT_BYTES >> 20)));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            PostError::unsuitable(place(), format!("not UTF-8 at byte {at}"))
        })?;
        let mut tokens: Vec<u32> = bos.into_iter().collect();
        tokens.extend(tokenizer.encode(&text)?);
        if tokens.len() < 2 {
            return Err(PostError::unsuitable(place(), "there is no text in it"));
        }
        let first = if bos.is_some() { 0 } else { tokenizer.decode(&tokens[..1], false).len() };
        Ok(Self { tokens, bytes: text.len().saturating_sub(first) })
    }
}

/// Tokens that a model of this context sees at once.
pub(super) fn window(context: usize) -> usize {
    context.clamp(2, MOST_WINDOW)
}

/// Measures a text in windows of the model's context (at most 4096 tokens) that overlap by half, so that every token
/// but the first ones is foretold from at least half a window.
///
/// `on_progress` gets tokens done and all tokens, and may end it: then there is no report. Without `bos` the first
/// token has nothing that could foretell it and does not count.
///
/// # Errors
/// The file cannot be read, is no UTF-8, too large, or has nothing to foretell.
pub fn perplexity(
    model: &mut Model,
    cpu: &Cpu,
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    path: &Path,
    on_progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<TextReport>> {
    let Text { tokens, bytes } = Text::read(tokenizer, bos, path)?;
    let to_foretell = tokens.len() - 1;
    let mut engine = Engine::new(model, cpu, None);
    let window = window(engine.context());
    let mut nats = 0.0;
    // log-probabilities are of tokens[1..]; this many are in the sum
    let mut done = 0;
    let mut start = 0;
    while done < to_foretell {
        if on_progress(done, to_foretell).is_break() {
            return Ok(None);
        }
        let end = (start + window).min(tokens.len());
        let log_probs = engine.score(&tokens[start..end], &mut |_| {})?;
        // the first of them is of token start + 1
        let new = &log_probs[done - start..];
        nats -= new.iter().map(|&x| f64::from(x)).sum::<f64>();
        done += new.len();
        start += (window / 2).max(1);
    }
    let _ = on_progress(done, to_foretell);
    Ok(Some(TextReport {
        path: path.display().to_string(),
        bytes,
        tokens: done,
        nats,
        bits_per_byte: nats / std::f64::consts::LN_2 / bytes.max(1) as f64,
        perplexity: (nats / done as f64).exp(),
        window,
    }))
}
