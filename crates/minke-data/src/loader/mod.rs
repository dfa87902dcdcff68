//! Batches: a pure function of the seed and the step.
//!
//! The stream of tokens is laid into windows of `sequence_len` positions, which a row of a batch holds
//! ([`Packing`]): cut side by side from the start, or filled with whole documents ([`pack`]). An epoch visits every
//! window once, in an order that a keyed permutation gives ([`permute`]); no order is ever stored. Row `r` of step
//! `s` is draw number `s * batch + r`, so a resumed run asks for its step and has its data, and nothing about the
//! loader belongs into a checkpoint.
//!
//! **Labels.** A row of a stream that is cut holds `sequence_len + 1 + mtp_depth` tokens of the stream, `w[0], w[1], ...`. At position
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
//! or more tokens ahead teaches nothing. Whole documents always have borders. No token of a document's context is a
//! label, at any depth.
//!
//! **Segments.** With borders on a row is several sequences: [`Segment`]s that attention must not cross, with
//! positions from 0 in each. With borders off a row is one segment. A window that starts in the middle of a
//! document starts its first segment there, without `bos`. What whole documents leave of a row is in no segment and has
//! no labels.
//!
//! **Bits per byte.** [`Batch::text_bytes`] is the length of the text that the labels of depth 0 cover. Of a
//! document that lies partly in a window, the share of bytes is by the share of tokens, rounded so that all
//! shares of a document add up to its length: over a whole [`Evaluation`] the figure is exact. `bos` and `eos`
//! count no bytes, nor does a context; predicting `eos` costs bits all the same, as an honest code must say where a
//! text ends.

mod pack;
mod permute;

use std::ops::Range;

use minke_num::rng;
use serde::{Deserialize, Serialize};

use crate::shards::{DocumentSpan, ShardSet};
use crate::{Error, Result};
use pack::Plan;
use permute::permute;

/// Stands where a position has no label.
pub const NO_LABEL: u32 = u32::MAX;

/// How documents come into windows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// The stream is cut wherever a window ends: no position is lost, and most windows begin within a document.
    #[default]
    Stream,
    /// Documents stay whole where they fit: what is left of a window stays empty.
    Whole,
}

impl Packing {
    /// Names that recipes use.
    pub const CHOICES: [(&'static str, Self); 2] = [("stream", Self::Stream), ("whole", Self::Whole)];

    /// The name that recipes use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Whole => "whole",
        }
    }
}

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
    /// How documents come into windows; whole ones need borders.
    pub packing: Packing,
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
    /// What rows hold and what follows, [b, t + 1 + `mtp_depth`]: MTP modules read their inputs from it.
    pub windows_bt: Vec<u32>,
    /// Labels of depth 0 up to `mtp_depth`, each [b, t].
    pub labels_bt: Vec<Vec<u32>>,
    /// Positions, [b, t], from 0 in each segment.
    pub positions_bt: Vec<u32>,
    /// Segments in order; together they cover [b, t] but for what whole documents left empty.
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

/// Training batches. With [`Packing::Whole`] it keeps which documents share a window: 8 bytes a document and 8 a window,
/// made once from the index of the shards.
#[derive(Debug, Clone)]
pub struct Loader {
    shards: ShardSet,
    options: LoaderOptions,
    windows: Windows,
}

/// The windows of a stream.
#[derive(Debug, Clone)]
enum Windows {
    /// So many, side by side.
    Stream(u64),
    /// As planned.
    Whole(Plan),
}

impl Windows {
    /// The windows for `options` with, where the stream is cut, what `stream` says of their number.
    fn new(shards: &ShardSet, options: &LoaderOptions, stream: impl FnOnce() -> u64) -> Self {
        match options.packing {
            Packing::Stream => Self::Stream(stream()),
            Packing::Whole => Self::Whole(Plan::new(shards, options.sequence_len)),
        }
    }

    fn count(&self) -> u64 {
        match self {
            Self::Stream(count) => *count,
            Self::Whole(plan) => plan.windows(),
        }
    }
}

impl Loader {
    /// A loader over a stream.
    ///
    /// # Errors
    /// Sizes of zero, or a stream that holds not even one window.
    pub fn new(shards: ShardSet, options: LoaderOptions) -> Result<Self> {
        check(&options)?;
        let (len, extra) = (options.sequence_len as u64, 1 + options.mtp_depth as u64);
        let windows = Windows::new(&shards, &options, || shards.tokens().saturating_sub(extra) / len);
        if windows.count() == 0 {
            let expected = match options.packing {
                Packing::Stream => {
                    format!("at least {} tokens, for one sequence and its labels", len + extra)
                }
                Packing::Whole => "a document of at least 2 tokens".to_owned(),
            };
            return Err(Error::setting("training data", expected, shards.tokens()));
        }
        Ok(Self { shards, options, windows })
    }

    /// Windows in an epoch.
    pub fn windows(&self) -> u64 {
        self.windows.count()
    }

    /// The share of positions that hold no token, since no whole document fitted there.
    pub fn padding_share(&self) -> f64 {
        match &self.windows {
            Windows::Stream(_) => 0.0,
            Windows::Whole(plan) => {
                1.0 - plan.filled() as f64 / (plan.windows() as f64 * self.options.sequence_len as f64)
            }
        }
    }

    /// The stream.
    pub fn shards(&self) -> &ShardSet {
        &self.shards
    }

    /// The window that a row of a step holds.
    pub fn window(&self, step: u64, row: usize) -> u64 {
        let draw = u128::from(step) * self.options.batch as u128 + row as u128;
        let windows = u128::from(self.windows());
        let (epoch, at) = (draw / windows, draw % windows);
        permute(at as u64, self.windows(), self.options.seed, epoch as u64)
    }

    /// The batch of a step.
    ///
    /// # Errors
    /// A shard with a token outside its vocabulary.
    pub fn batch(&self, step: u64) -> Result<Batch> {
        let windows: Vec<u64> = (0..self.options.batch).map(|row| self.window(step, row)).collect();
        build(&self.shards, &self.options, &self.windows, &windows)
    }
}

/// Every window of a held-out stream once, in order; the last rows may be shorter and are padded. Of whole documents
/// every label sees its document's beginning, as far as it is within a window's length.
#[derive(Debug, Clone)]
pub struct Evaluation {
    shards: ShardSet,
    options: LoaderOptions,
    windows: Windows,
}

impl Evaluation {
    /// An evaluation over a stream; the seed is not used.
    ///
    /// # Errors
    /// Sizes of zero, or a stream with nothing to predict.
    pub fn new(shards: ShardSet, options: LoaderOptions) -> Result<Self> {
        check(&options)?;
        let len = options.sequence_len as u64;
        let windows = Windows::new(&shards, &options, || shards.tokens().saturating_sub(1).div_ceil(len));
        if windows.count() == 0 {
            return Err(Error::setting("validation data", "at least 2 tokens", shards.tokens()));
        }
        Ok(Self { shards, options, windows })
    }

    /// How many windows cover the stream.
    pub fn windows(&self) -> u64 {
        self.windows.count()
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
        let windows: Vec<u64> = (index * rows..((index + 1) * rows).min(self.windows())).collect();
        build(&self.shards, &self.options, &self.windows, &windows)
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
    if options.packing == Packing::Whole && !options.document_borders {
        return Err(Error::setting("packing", "stream, or document borders", options.packing.name()));
    }
    Ok(())
}

fn build(shards: &ShardSet, options: &LoaderOptions, windows: &Windows, numbers: &[u64]) -> Result<Batch> {
    let (len, depth, rows) = (options.sequence_len, options.mtp_depth, numbers.len());
    let wide = len + 1 + depth;
    let mut batch = Batch {
        rows,
        sequence_len: len,
        mtp_depth: depth,
        tokens_bt: Vec::with_capacity(rows * len),
        windows_bt: vec![0; rows * wide],
        labels_bt: vec![vec![NO_LABEL; rows * len]; depth + 1],
        positions_bt: Vec::with_capacity(rows * len),
        segments: Vec::new(),
        text_bytes: 0,
    };
    for (row, &number) in numbers.iter().enumerate() {
        match windows {
            Windows::Stream(_) => batch.cut(shards, row, number * len as u64, options.document_borders)?,
            Windows::Whole(plan) => batch.fill(shards, row, plan.pieces(number))?,
        }
        batch.tokens_bt.extend_from_slice(&batch.windows_bt[row * wide..][..len]);
    }
    Ok(batch)
}

impl Batch {
    /// Makes a row of the stream from `start` on; past its end there is padding.
    fn cut(&mut self, shards: &ShardSet, row: usize, start: u64, borders: bool) -> Result<()> {
        let (len, wide) = (self.sequence_len, self.sequence_len + 1 + self.mtp_depth);
        let window = &mut self.windows_bt[row * wide..][..wide];
        let held = (shards.tokens() - start).min(wide as u64) as usize;
        shards.read(start, &mut window[..held])?;
        // the document of each token of the window, counted from the window's first; padding is a document too
        let mut document_of = vec![u32::MAX; wide];
        let mut in_context = vec![false; wide];
        let mut number = shards.document_at(start);
        let (mut at, mut local) = (0, 0);
        while at < held {
            let span = shards.document(number);
            let end = (span.tokens.end - start).min(held as u64) as usize;
            document_of[at..end].fill(local);
            let context = (span.tokens.start + span.context).saturating_sub(start).min(end as u64) as usize;
            in_context[at..context.max(at)].fill(true);
            // the window's first token is no label, nor is a document's first one if nothing predicts it
            let from = (start + 1).max(span.tokens.start + u64::from(borders));
            self.text_bytes += labelled_bytes(shards, &span, from..start + end.min(len + 1) as u64);
            (at, local, number) = (end, local + 1, number + 1);
        }
        for (k, labels) in self.labels_bt.iter_mut().enumerate() {
            let crosses = k == 0 && !borders;
            for (i, label) in labels[row * len..][..len].iter_mut().enumerate() {
                let to = i + k + 1;
                let inside = to < held && (crosses || document_of[i] == document_of[to]);
                if inside && !in_context[to] {
                    *label = window[to];
                }
            }
        }
        let mut first = 0;
        for i in 0..len {
            if borders && i > first && document_of[i] != document_of[i - 1] {
                self.segments.push(Segment { row, start: first, len: i - first });
                first = i;
            }
            self.positions_bt.push((i - first) as u32);
        }
        self.segments.push(Segment { row, start: first, len: len - first });
        Ok(())
    }

    /// Makes a row of pieces that begin at `starts` in the stream, each a segment; what is left is empty.
    fn fill(&mut self, shards: &ShardSet, row: usize, starts: &[u64]) -> Result<()> {
        let (len, wide) = (self.sequence_len, self.sequence_len + 1 + self.mtp_depth);
        let window = &mut self.windows_bt[row * wide..][..wide];
        let mut at = 0;
        for &start in starts {
            let span = shards.document(shards.document_at(start));
            let inputs = (span.tokens.end - 1 - start).min(len as u64) as usize;
            // the labels lie behind the inputs, in the place of what comes next: the next piece, or what is behind the row
            let held = (span.tokens.end - start).min((wide - at) as u64) as usize;
            shards.read(start, &mut window[at..at + held])?;
            let context = (span.tokens.start + span.context).saturating_sub(start) as usize;
            for (k, labels) in self.labels_bt.iter_mut().enumerate() {
                for i in 0..inputs {
                    let to = i + k + 1;
                    if (context..held).contains(&to) {
                        labels[row * len + at + i] = window[at + to];
                    }
                }
            }
            self.text_bytes += labelled_bytes(shards, &span, start + 1..start + 1 + inputs as u64);
            self.segments.push(Segment { row, start: at, len: inputs });
            self.positions_bt.extend(0..inputs as u32);
            at += inputs;
        }
        if at < len {
            window[at..].fill(0);
            self.positions_bt.resize((row + 1) * len, 0);
        }
        Ok(())
    }
}

/// The bytes of a document's text among those of its tokens that are labels, `labels` in the stream.
fn labelled_bytes(shards: &ShardSet, span: &DocumentSpan, labels: Range<u64>) -> u64 {
    let (bos, eos) = shards.frame();
    let length = span.tokens.end - span.tokens.start;
    let first = span.context.max(bos);
    let text_tokens = length.saturating_sub(first + eos);
    // the bytes before a token of the document; its context, eos and bos stand for none
    let before = |token: u64| {
        let share = token.saturating_sub(first).min(text_tokens);
        let bytes = u128::from(span.text_bytes) * u128::from(share) / u128::from(text_tokens.max(1));
        bytes as u64
    };
    if labels.is_empty() {
        return 0;
    }
    before(labels.end - span.tokens.start) - before(labels.start - span.tokens.start)
}

/// A round of the permutation: 32 random bits for (seed, epoch, round, half).
fn round_bits(seed: u64, epoch: u64, round: u64, half: u64) -> u64 {
    // halves stay below 2^32, so the counter is unique; the stream keeps clear of the model's own draws
    let draws = rng::philox(seed, epoch ^ 0x6c6f_6164_6572_0000, (round << 32) | half);
    u64::from(draws[0])
}

#[cfg(test)]
mod tests;
