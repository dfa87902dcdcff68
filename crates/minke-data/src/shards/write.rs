//! Writing a shard as the documents come.

use std::path::{Path, PathBuf};

use super::{FLAG_BOS, FLAG_EOS, HEADER_BYTES, Header};
use crate::files::AtomicFile;
use crate::{Error, Result, Tokenizer};

/// Writes one shard; only [`ShardWriter::finish`] makes it appear under its name.
#[derive(Debug)]
pub struct ShardWriter {
    file: AtomicFile,
    path: PathBuf,
    header: Header,
    bos: Option<u32>,
    eos: Option<u32>,
    hasher: blake3::Hasher,
    starts: Vec<u64>,
    text_bytes: Vec<u64>,
    contexts: Vec<u64>,
    buffer: Vec<u8>,
}

impl ShardWriter {
    /// Starts a shard for the documents of one tokenizer.
    ///
    /// # Errors
    /// I/O, or a tokenizer with neither bos nor eos, whose documents could not be told apart.
    pub fn create(path: impl AsRef<Path>, tokenizer: &Tokenizer) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let (bos, eos) = (tokenizer.bos(), tokenizer.eos());
        let flags = if bos.is_some() { FLAG_BOS } else { 0 } | if eos.is_some() { FLAG_EOS } else { 0 };
        if flags == 0 {
            let reason = "has neither a token that starts nor one that ends a document; name them in tokenizer_config.json";
            return Err(Error::tokenizer("(given)", reason));
        }
        let vocab_size = tokenizer.vocab_size() as u64;
        let header = Header {
            token_bytes: if vocab_size <= 1 << 16 { 2 } else { 4 },
            flags,
            tokens: 0,
            documents: 0,
            vocab_size,
            tokenizer: tokenizer.fingerprint(),
            content: [0; 32],
        };
        let mut file = AtomicFile::create(&path)?;
        file.write(&[0; HEADER_BYTES])?;
        Ok(Self {
            file,
            path,
            header,
            bos,
            eos,
            hasher: blake3::Hasher::new(),
            starts: Vec::new(),
            text_bytes: Vec::new(),
            contexts: Vec::new(),
            buffer: Vec::new(),
        })
    }

    /// Appends a document: its ids without bos and eos, how many of them are context (0 for a document without), and
    /// the length of the text behind these.
    ///
    /// # Errors
    /// I/O, or an id outside the vocabulary.
    ///
    /// # Panics
    /// If there are more ids of context than ids.
    pub fn push(&mut self, ids: &[u32], context: usize, text_bytes: u64) -> Result<()> {
        assert!(context <= ids.len(), "context of {context} of {} ids", ids.len());
        self.starts.push(self.header.tokens);
        self.text_bytes.push(text_bytes);
        let bos = usize::from(self.bos.is_some());
        self.contexts.push(if context == 0 { 0 } else { (bos + context) as u64 });
        self.buffer.clear();
        for &id in self.bos.iter().chain(ids).chain(&self.eos) {
            if u64::from(id) >= self.header.vocab_size {
                let reason = format!("token {id} is outside the vocabulary of {}", self.header.vocab_size);
                return Err(Error::shard(&self.path, reason));
            }
            if self.header.token_bytes == 2 {
                self.buffer.extend_from_slice(&(id as u16).to_le_bytes());
            } else {
                self.buffer.extend_from_slice(&id.to_le_bytes());
            }
            self.header.tokens += 1;
        }
        self.hasher.update(&self.buffer);
        self.file.write(&self.buffer)
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Writes the index and the header, syncs, and moves the shard to its name.
    ///
    /// # Errors
    /// I/O; the file that was there before is untouched then.
    pub fn finish(mut self) -> Result<()> {
        self.header.documents = self.starts.len() as u64;
        let written = self.header.tokens * u64::from(self.header.token_bytes);
        self.buffer.clear();
        self.buffer.resize((written.next_multiple_of(8) - written) as usize, 0);
        for value in self.starts.iter().chain(&self.text_bytes).chain(&self.contexts) {
            self.buffer.extend_from_slice(&value.to_le_bytes());
        }
        self.hasher.update(&self.buffer);
        self.file.write(&self.buffer)?;
        self.header.content = *self.hasher.finalize().as_bytes();
        self.file.write_head(&self.header.to_bytes())?;
        self.file.commit()
    }
}
