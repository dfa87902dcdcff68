//! Batches: a pure function of the seed and the step.
//!
//! The stream of tokens is cut into windows of `sequence_len` tokens, side by side from the start. An epoch
//! visits every window once, in an order that a keyed permutation gives ([`permute`]); no order is ever
//! stored. Row `r` of step `s` is draw number `s * batch + r`, so a resumed run asks for its step and has its
//! data, and nothing about the loader belongs into a checkpoint.
//!
//! **Labels.** A row holds `sequence_len + 1 + mtp_depth` tokens of the stream, `w[0], w[1], ...`. At position
//! `i` the label of depth 0 is the next token, `w[i + 1]`; the label of MTP depth `k` is `w[i + k + 1]`. A label that
//! does not exist is [`NO_LABEL`]. The rule at document borders:
//!
//! | | depth 0 | depth k > 0 |
//! |---|---|---|
//! | `document_borders` on | only within the document | only within the document |
//! | `document_borders` off | always (`eos` is followed by `bos`) | only within the document |
//!
//! With borders off attention sees the whole row, so what follows an `eos` is fair to predict; with borders on
//! the next document is another sequence. MTP labels never cross, for guessing past the end of a document two
//! or more tokens ahead teaches nothing.
//!
//! **Segments.** With borders on a row is several sequences: [`Segment`]s that attention must not cross, with
//! positions from 0 in each. With borders off a row is one segment. A window that starts in the middle of a
//! document starts its first segment there, without `bos`.
//!
//! **Bits per byte.** [`Batch::text_bytes`] is the length of the text that the labels of depth 0 cover. Of a
//! document that lies partly in a window, the share of bytes is by the share of tokens, rounded so that all
//! shares of a document add up to its length: over a whole [`Evaluation`] the figure is exact. `bos` and `eos`
//! count no bytes; predicting `eos` costs bits all the same, as an honest code must say where a text ends.

mod permute;

use minke_num::rng;
use serde::{Deserialize, Serialize};

use crate::shards::{DocumentSpan, ShardSet};
use crate::{Error, Result};
use permute::permute;

/// Stands where a position has no label.
pub const NO_LABEL: u32 = u32::MAX;

/// The shape of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderOptions {
    /// Tokens per row, t.
    pub sequence_len: usize,
    /// Rows, b.
    pub batch: usize,
    /// Keys the order of windows.
    pub seed: u64,
    /// How many tokens past the next one are labelled.
    pub mtp_depth: usize,
    /// Whether documents of a row are sequences of their own.
    pub document_borders: bool,
}

/// A run of positions that attend to each other only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The row.
    pub row: usize,
    /// The first position in the row.
    pub start: usize,
    /// How many positions.
    pub len: usize,
}

/// Tokens and labels of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// b, the number of rows.
    pub rows: usize,
    /// t, the number of positions per row.
    pub sequence_len: usize,
    /// The highest depth of labels.
    pub mtp_depth: usize,
    /// Inputs, [b, t].
    pub tokens_bt: Vec<u32>,
    /// The raw stream, [b, t + 1 + `mtp_depth`]: MTP modules read their inputs from it.
    pub windows_bt: Vec<u32>,
    /// Labels of depth 0 up to `mtp_depth`, each [b, t].
    pub labels_bt: Vec<Vec<u32>>,
    /// Positions, [b, t], from 0 in each segment.
    pub positions_bt: Vec<u32>,
    /// Segments in order; together they cover [b, t].
    pub segments: Vec<Segment>,
    /// Bytes of text that the labels of depth 0 cover.
    pub text_bytes: u64,
}

impl Batch {
    /// How many labels of a depth there are.
    pub fn label_count(&self, depth: usize) -> usize {
        self.labels_bt[depth].iter().filter(|&&label| label != NO_LABEL).count()
    }
}

/// Training batches.
#[derive(Debug, Clone)]
pub struct Loader {
    shards: ShardSet,
    options: LoaderOptions,
    windows: u64,
}

impl Loader {
    /// A loader over a stream.
    ///
    /// # Errors
    /// Sizes of zero, or a stream that holds not even one window.
    pub fn new(shards: ShardSet, options: LoaderOptions) -> Result<Self> {
        check(&options)?;
        let (len, extra) = (options.sequence_len as u64, 1 + options.mtp_depth as u64);
        let windows = shards.tokens().saturating_sub(extra) / len;
        if windows == 0 {
            let expected = format!("at least {} tokens, for one sequence and its labels", len + extra);
            return Err(Error::setting("training data", expected, shards.tokens()));
        }
        Ok(Self { shards, options, windows })
    }

    /// Windows in an epoch.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Steps in an epoch; the last may be shared with the next epoch.
    pub fn steps_per_epoch(&self) -> f64 {
        self.windows as f64 / self.options.batch as f64
    }

    /// The stream.
    pub fn shards(&self) -> &ShardSet {
        &self.shards
    }

    /// The window that a row of a step holds.
    pub fn window(&self, step: u64, row: usize) -> u64 {
        let draw = u128::from(step) * self.options.batch as u128 + row as u128;
        let (epoch, at) = (draw / u128::from(self.windows), draw % u128::from(self.windows));
        permute(at as u64, self.windows, self.options.seed, epoch as u64)
    }

    /// The batch of a step.
    ///
    /// # Errors
    /// A shard with a token outside its vocabulary.
    pub fn batch(&self, step: u64) -> Result<Batch> {
        let starts: Vec<u64> = (0..self.options.batch)
            .map(|row| self.window(step, row) * self.options.sequence_len as u64)
            .collect();
        build(&self.shards, &self.options, &starts)
    }
}

/// Every window of a held-out stream once, in order; the last rows may be shorter and are padded.
#[derive(Debug, Clone)]
pub struct Evaluation {
    shards: ShardSet,
    options: LoaderOptions,
}

impl Evaluation {
    /// An evaluation over a stream; the seed is not used.
    ///
    /// # Errors
    /// Sizes of zero, or a stream with fewer than two tokens.
    pub fn new(shards: ShardSet, options: LoaderOptions) -> Result<Self> {
        check(&options)?;
        if shards.tokens() < 2 {
            return Err(Error::setting("validation data", "at least 2 tokens", shards.tokens()));
        }
        Ok(Self { shards, options })
    }

    /// How many windows cover the stream.
    pub fn windows(&self) -> u64 {
        (self.shards.tokens() - 1).div_ceil(self.options.sequence_len as u64)
    }

    /// How many batches cover the stream.
    pub fn batches(&self) -> u64 {
        self.windows().div_ceil(self.options.batch as u64)
    }

    /// A batch; the last may have fewer rows. Padding has no labels and lies in segments of its own when borders
    /// are on, else after everything that counts.
    ///
    /// # Errors
    /// A shard with a token outside its vocabulary.
    ///
    /// # Panics
    /// If `index` is not below [`Evaluation::batches`].
    pub fn batch(&self, index: u64) -> Result<Batch> {
        assert!(index < self.batches(), "batch {index} of {}", self.batches());
        let rows = self.options.batch as u64;
        let windows = index * rows..((index + 1) * rows).min(self.windows());
        let starts: Vec<u64> = windows.map(|window| window * self.options.sequence_len as u64).collect();
        build(&self.shards, &self.options, &starts)
    }
}

fn check(options: &LoaderOptions) -> Result<()> {
    if options.sequence_len == 0 || options.sequence_len > 1 << 24 {
        return Err(Error::setting("sequence_len", format!("1 to {}", 1 << 24), options.sequence_len));
    }
    if options.batch == 0 || options.batch > 1 << 20 {
        return Err(Error::setting("batch", format!("1 to {}", 1 << 20), options.batch));
    }
    if options.mtp_depth > 16 {
        return Err(Error::setting("mtp_depth", "0 to 16", options.mtp_depth));
    }
    Ok(())
}

fn build(shards: &ShardSet, options: &LoaderOptions, starts: &[u64]) -> Result<Batch> {
    let (len, depth, rows) = (options.sequence_len, options.mtp_depth, starts.len());
    let wide = len + 1 + depth;
    let mut batch = Batch {
        rows,
        sequence_len: len,
        mtp_depth: depth,
        tokens_bt: Vec::with_capacity(rows * len),
        windows_bt: vec![0; rows * wide],
        labels_bt: vec![Vec::with_capacity(rows * len); depth + 1],
        positions_bt: Vec::with_capacity(rows * len),
        segments: Vec::new(),
        text_bytes: 0,
    };
    // the document of each token of the window, counted from the window's first; padding is a document too
    let mut document_of = vec![0u32; wide];
    for (row, &start) in starts.iter().enumerate() {
        let window = &mut batch.windows_bt[row * wide..(row + 1) * wide];
        let held = (shards.tokens() - start).min(wide as u64) as usize;
        shards.read(start, &mut window[..held])?;
        document_of.fill(u32::MAX);
        let mut number = shards.document_at(start);
        let (mut at, mut local) = (0, 0);
        while at < held {
            let span = shards.document(number);
            let end = ((span.tokens.end - start).min(held as u64)) as usize;
            document_of[at..end].fill(local);
            batch.text_bytes +=
                labelled_bytes(shards, &span, start, end.min(len + 1), options.document_borders);
            (at, local, number) = (end, local + 1, number + 1);
        }
        batch.tokens_bt.extend_from_slice(&window[..len]);
        for (k, labels) in batch.labels_bt.iter_mut().enumerate() {
            let crosses = k == 0 && !options.document_borders;
            labels.extend((0..len).map(|i| {
                let to = i + k + 1;
                let inside = to < held && (crosses || document_of[i] == document_of[to]);
                if inside { window[to] } else { NO_LABEL }
            }));
        }
        let mut first = 0;
        for i in 0..len {
            if options.document_borders && i > first && document_of[i] != document_of[i - 1] {
                batch.segments.push(Segment { row, start: first, len: i - first });
                first = i;
            }
            batch.positions_bt.push((i - first) as u32);
        }
        batch.segments.push(Segment { row, start: first, len: len - first });
    }
    Ok(batch)
}

/// The bytes of a document's text among the labels of the window at `start`, which end before `end`.
fn labelled_bytes(shards: &ShardSet, span: &DocumentSpan, start: u64, end: usize, borders: bool) -> u64 {
    let (bos, eos) = shards.frame();
    let length = span.tokens.end - span.tokens.start;
    let text_tokens = length.saturating_sub(bos + eos);
    // the bytes before a token of the document; eos and bos stand for none
    let before = |token: u64| {
        let share = token.saturating_sub(bos).min(text_tokens);
        let bytes = u128::from(span.text_bytes) * u128::from(share) / u128::from(text_tokens.max(1));
        bytes as u64
    };
    // the window's first token is no label, nor is a document's first one if nothing predicts it
    let from = (start + 1).max(span.tokens.start + u64::from(borders));
    let to = start + end as u64;
    if from >= to { 0 } else { before(to - span.tokens.start) - before(from - span.tokens.start) }
}

/// A round of the permutation: 32 random bits for (seed, epoch, round, half).
fn round_bits(seed: u64, epoch: u64, round: u64, half: u64) -> u64 {
    // halves stay below 2^32, so the counter is unique; the stream keeps clear of the model's own draws
    let draws = rng::philox(seed, epoch ^ 0x6c6f_6164_6572_0000, (round << 32) | half);
    u64::from(draws[0])
}

#[cfg(test)]
mod tests;
