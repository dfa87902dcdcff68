//! Shards: tokenised documents in files that are mapped, not read.
//!
//! A shard is a header, the tokens of its documents one after the other, and an index with the start, the text
//! length and the context of every document:
//!
//! ```text
//! offset 0     magic "MINKTOKS", version, bytes per token (2 or 4), flags
//!        24    token count, document count, vocabulary size
//!        48    fingerprint of the tokenizer (blake3)
//!        80    blake3 of everything after the header
//!        112   zeros up to 128
//! offset 128   tokens, little-endian; zeros up to a multiple of 8
//!              start of each document in tokens, u64
//!              text of each document behind its context in bytes, u64
//!              context of each document in tokens, u64
//! ```
//!
//! Tokens take two bytes when the vocabulary fits. A document is `bos, text, eos` with those of the two that the
//! tokenizer has (at least one). The text's length in bytes is kept so that a loss can be stated in bits per
//! byte: the number of bits is the model's, the number of bytes is the text's, and neither depends on how the
//! tokenizer cuts.
//!
//! The context of a document is what stands at its beginning only to be read, such as a question: that many tokens,
//! `bos` included, are no labels, and their text counts no bytes. Most documents have none.
//!
//! A reader trusts nothing: sizes must add up to the file's length with checked arithmetic, starts must
//! ascend from 0, and every token is compared with the vocabulary as it is read. [`ShardSet::verify`] also
//! checks the content hash, which reads the whole file.
//!
//! Several shards form a [`ShardSet`], one long stream of tokens.

mod read;
mod write;

pub use read::{DocumentSpan, ShardSet};
pub use write::ShardWriter;

const MAGIC: [u8; 8] = *b"MINKTOKS";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 128;
/// What the index holds of one document.
const INDEX_BYTES: u64 = 24;
const FLAG_BOS: u32 = 1;
const FLAG_EOS: u32 = 2;

/// The first 128 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    token_bytes: u32,
    flags: u32,
    tokens: u64,
    documents: u64,
    vocab_size: u64,
    tokenizer: [u8; 32],
    content: [u8; 32],
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.token_bytes.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.flags.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.documents.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.vocab_size.to_le_bytes());
        bytes[48..80].copy_from_slice(&self.tokenizer);
        bytes[80..112].copy_from_slice(&self.content);
        bytes
    }

    fn parse(file: &[u8]) -> Result<Self, String> {
        let bytes: &[u8; HEADER_BYTES] = file
            .first_chunk()
            .ok_or_else(|| format!("expected at least {HEADER_BYTES} bytes, got {}", file.len()))?;
        if bytes[..8] != MAGIC {
            return Err("this is not a shard of tokens".to_owned());
        }
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("inside the header"));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside the header"));
        if u32_at(8) != VERSION {
            let got = u32_at(8);
            return Err(format!("expected version {VERSION}, got {got}; delete it to make it again"));
        }
        let header = Self {
            token_bytes: u32_at(12),
            flags: u32_at(16),
            tokens: u64_at(24),
            documents: u64_at(32),
            vocab_size: u64_at(40),
            tokenizer: *bytes[48..].first_chunk().expect("inside the header"),
            content: *bytes[80..].first_chunk().expect("inside the header"),
        };
        if !matches!(header.token_bytes, 2 | 4) {
            return Err(format!("expected 2 or 4 bytes per token, got {}", header.token_bytes));
        }
        if header.flags & !(FLAG_BOS | FLAG_EOS) != 0 || header.flags == 0 {
            return Err(format!("unknown flags {:#x}", header.flags));
        }
        if header.vocab_size == 0 || header.vocab_size > u64::from(u32::MAX) {
            return Err(format!("impossible vocabulary size {}", header.vocab_size));
        }
        Ok(header)
    }

    /// Where the index starts and where the file ends; None if that is no number.
    fn layout(&self) -> Option<(u64, u64)> {
        let tokens_end =
            self.tokens.checked_mul(u64::from(self.token_bytes))?.checked_add(HEADER_BYTES as u64)?;
        let index = tokens_end.checked_next_multiple_of(8)?;
        Some((index, index.checked_add(self.documents.checked_mul(INDEX_BYTES)?)?))
    }
}

#[cfg(test)]
pub(crate) mod tests;
