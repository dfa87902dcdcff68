//! Reading shards: validated once, mapped, seen as one stream of tokens.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{FLAG_BOS, FLAG_EOS, HEADER_BYTES, Header};
use crate::map::MappedFile;
use crate::{Error, Result};

/// One or more shards of the same tokenizer; a clone shares the maps.
#[derive(Debug, Clone)]
pub struct ShardSet {
    shards: Arc<[Shard]>,
    /// Where each shard begins in the stream, and the stream's length last.
    token_starts: Arc<[u64]>,
    document_starts: Arc<[u64]>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: MappedFile,
    header: Header,
    index: usize,
}

/// A document's place in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentSpan {
    /// Its tokens, bos and eos included.
    pub tokens: Range<u64>,
    /// The length of its text behind the context.
    pub text_bytes: u64,
    /// Tokens at its beginning, bos included, that are read and not learned; 0 for most.
    pub context: u64,
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let fail = |reason: String| Error::shard(path, reason);
        let header = Header::parse(&map).map_err(fail)?;
        let (index, end) = header.layout().ok_or_else(|| fail("its counts are impossible".to_owned()))?;
        if end != map.len() as u64 {
            return Err(fail(format!("expected {end} bytes by its header, got {}", map.len())));
        }
        if header.documents == 0 || header.tokens == 0 {
            return Err(fail("it is empty".to_owned()));
        }
        let shard = Self { path: path.to_owned(), map, header, index: index as usize };
        let mut previous = None;
        for at in 0..header.documents {
            let start = shard.start(at);
            if previous.map_or(start != 0, |previous| start <= previous) || start >= header.tokens {
                return Err(fail(format!("document {at} starts at token {start}, which is out of order")));
            }
            previous = Some(start);
        }
        for at in 0..header.documents {
            let (length, context) = (shard.end(at) - shard.start(at), shard.context(at));
            if context > length {
                return Err(fail(format!("document {at} has {length} tokens and {context} of context")));
            }
        }
        Ok(shard)
    }

    /// The `at`-th number of the index: starts, then text lengths, then contexts.
    fn entry(&self, at: u64) -> u64 {
        let at = self.index + at as usize * 8;
        u64::from_le_bytes(*self.map[at..].first_chunk().expect("the layout was checked at opening"))
    }

    fn start(&self, document: u64) -> u64 {
        self.entry(document)
    }

    fn end(&self, document: u64) -> u64 {
        if document + 1 == self.header.documents { self.header.tokens } else { self.start(document + 1) }
    }

    fn text_bytes(&self, document: u64) -> u64 {
        self.entry(self.header.documents + document)
    }

    fn context(&self, document: u64) -> u64 {
        self.entry(2 * self.header.documents + document)
    }

    /// Copies tokens; the caller keeps inside the shard.
    fn read(&self, start: u64, out: &mut [u32]) -> Result<()> {
        let width = self.header.token_bytes as usize;
        let from = HEADER_BYTES + start as usize * width;
        let bytes = &self.map[from..from + out.len() * width];
        if width == 2 {
            for (id, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *id = u32::from(u16::from_le_bytes([pair[0], pair[1]]));
            }
        } else {
            for (id, four) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *id = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
            }
        }
        match out.iter().position(|&id| u64::from(id) >= self.header.vocab_size) {
            Some(at) => {
                let (id, at) = (out[at], start + at as u64);
                let reason =
                    format!("token {at} is {id}, outside the vocabulary of {}", self.header.vocab_size);
                Err(Error::shard(&self.path, reason))
            }
            None => Ok(()),
        }
    }
}

impl ShardSet {
    /// Opens shards in the given order.
    ///
    /// # Errors
    /// A shard that is truncated, inconsistent, or of another tokenizer than the first.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let shards = paths.iter().map(|path| Shard::open(path.as_ref())).collect::<Result<Vec<_>>>()?;
        let first = shards.first().ok_or_else(|| Error::setting("shards", "at least one", "none"))?.header;
        let (mut tokens, mut documents) = (vec![0], vec![0]);
        for shard in &shards {
            let header = &shard.header;
            if (header.tokenizer, header.vocab_size, header.flags)
                != (first.tokenizer, first.vocab_size, first.flags)
            {
                return Err(Error::shard(
                    &shard.path,
                    "it was made with another tokenizer than the first shard",
                ));
            }
            tokens.push(tokens[tokens.len() - 1] + header.tokens);
            documents.push(documents[documents.len() - 1] + header.documents);
        }
        Ok(Self { shards: shards.into(), token_starts: tokens.into(), document_starts: documents.into() })
    }

    /// Tokens in all.
    pub fn tokens(&self) -> u64 {
        *self.token_starts.last().expect("there is an end")
    }

    /// Documents in all.
    pub fn documents(&self) -> u64 {
        *self.document_starts.last().expect("there is an end")
    }

    /// Bytes of text in all, contexts left out.
    pub fn text_bytes(&self) -> u64 {
        self.shards.iter().flat_map(|shard| (0..shard.header.documents).map(|at| shard.text_bytes(at))).sum()
    }

    /// Whether some document begins with a context.
    pub fn has_context(&self) -> bool {
        self.shards.iter().any(|shard| (0..shard.header.documents).any(|at| shard.context(at) > 0))
    }

    /// The vocabulary that every token is below.
    pub fn vocab_size(&self) -> usize {
        self.shards[0].header.vocab_size as usize
    }

    /// The fingerprint of the tokenizer that made the tokens.
    pub fn tokenizer(&self) -> [u8; 32] {
        self.shards[0].header.tokenizer
    }

    /// How many tokens without text stand before and after each document's text (0 or 1 each).
    pub fn frame(&self) -> (u64, u64) {
        let flags = self.shards[0].header.flags;
        (u64::from(flags & FLAG_BOS != 0), u64::from(flags & FLAG_EOS != 0))
    }

    /// Copies `out.len()` tokens of the stream from `start` on.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    ///
    /// # Panics
    /// If the range leaves the stream.
    pub fn read(&self, start: u64, mut out: &mut [u32]) -> Result<()> {
        let end = start.checked_add(out.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.tokens()),
            "read of {} at {start} of {}",
            out.len(),
            self.tokens()
        );
        let mut start = start;
        while !out.is_empty() {
            let at = self.token_starts.partition_point(|&first| first <= start) - 1;
            let here = (self.token_starts[at + 1] - start).min(out.len() as u64) as usize;
            let (now, later) = out.split_at_mut(here);
            self.shards[at].read(start - self.token_starts[at], now)?;
            start += here as u64;
            out = later;
        }
        Ok(())
    }

    /// The number of the document that holds a token.
    ///
    /// # Panics
    /// If the token is outside the stream.
    pub fn document_at(&self, token: u64) -> u64 {
        assert!(token < self.tokens(), "token {token} of {}", self.tokens());
        let at = self.token_starts.partition_point(|&first| first <= token) - 1;
        let (shard, local) = (&self.shards[at], token - self.token_starts[at]);
        let (mut low, mut high) = (0, shard.header.documents);
        // the last document that starts at or before the token
        while high - low > 1 {
            let middle = u64::midpoint(low, high);
            if shard.start(middle) <= local { low = middle } else { high = middle }
        }
        self.document_starts[at] + low
    }

    /// A document's place and size.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn document(&self, number: u64) -> DocumentSpan {
        assert!(number < self.documents(), "document {number} of {}", self.documents());
        let at = self.document_starts.partition_point(|&first| first <= number) - 1;
        let (shard, local, base) =
            (&self.shards[at], number - self.document_starts[at], self.token_starts[at]);
        DocumentSpan {
            tokens: base + shard.start(local)..base + shard.end(local),
            text_bytes: shard.text_bytes(local),
            context: shard.context(local),
        }
    }

    /// Reads everything and compares it with the content hashes.
    ///
    /// # Errors
    /// A shard whose content is not what was written.
    pub fn verify(&self) -> Result<()> {
        for shard in self.shards.iter() {
            if *blake3::hash(&shard.map[HEADER_BYTES..]).as_bytes() != shard.header.content {
                return Err(Error::shard(
                    &shard.path,
                    "its content does not match its hash; delete it to make it again",
                ));
            }
        }
        Ok(())
    }
}
