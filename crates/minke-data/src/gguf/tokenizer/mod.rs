//! Tokenizers in GGUF: `tokenizer.ggml.*` to a `tokenizer.json` and back.
//!
//! Two kinds of vocabulary are known. `gpt2` is byte-level BPE: tokens in GPT-2's letters, merges in order, and the name of
//! a cut ([`pre`]). `llama` is SentencePiece's BPE: tokens with `▁` for a space, a score for each, bytes as `<0x0A>` for
//! what is no token; the pair whose joint has the highest score is merged first. Text is encoded by that rule itself; only
//! where a `tokenizer.json` is asked for do scores become merges in order.
//!
//! Types of tokens (`tokenizer.ggml.token_type`): 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Control
//! tokens are special, text cannot write them; user-defined ones are found in text before all else.

mod from;
mod pre;
#[cfg(test)]
mod tests;
mod to;

pub use from::{Ends, end_ids, ends, template, tokenizer_json};
pub(crate) use from::{Frame, Parts, parts};
pub use to::{Endings, metadata};

/// Types of tokens.
mod kind {
    pub(super) const NORMAL: i64 = 1;
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
    pub(super) const UNUSED: i64 = 5;
    pub(super) const BYTE: i64 = 6;
}

/// The character that stands for a space in SentencePiece's vocabularies.
const SPACE: char = '\u{2581}';
