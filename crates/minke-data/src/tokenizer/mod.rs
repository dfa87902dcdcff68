//! Tokenizers: text to ids and back, as a `tokenizer.json` says.
//!
//! The file is the truth: a [`Tokenizer`] keeps its bytes, saves exactly those, and hashes them into its
//! fingerprint, so a tokenizer that was trained, saved and loaded is the same to every cache. Hugging Face's own
//! `tokenizers` says what a file means. Byte-pair models are our own, read in a hundredth of the time; and for the cut
//! that training uses, ASCII text takes a shorter way that gives the same ids about ten times as fast. Tests hold both
//! to the library.
//!
//! **Text from outside cannot forge control tokens.** [`Tokenizer::encode`] treats its input as plain text:
//! the eight characters of `<|user|>` in a document stay eight characters. Only
//! [`Tokenizer::encode_with_special`], meant for what a chat template rendered, recognises them.
//!
//! **The tokens that training makes** are, in this order and from id 0: `<|bos|>`, `<|eos|>`, `<|pad|>`,
//! `<|user|>`, `<|assistant|>`, `<|system|>`, `<think>`, `</think>` and eight in reserve for later stages. They
//! play the parts of `DeepSeek`'s tokens but are plain ASCII, because a person types them into recipes and
//! reads them in terminals. As in DeepSeek-R1, `<think>` and `</think>` are not marked special, so decoders
//! that drop special tokens still show where thinking starts and ends.
//!
//! **Streaming**: an id may stand for part of a character. [`StreamDecoder`] hands out text only up to the
//! last complete character, and its pieces join to exactly what decoding at once gives.

pub(crate) mod bpe;
mod bytes;
mod fast;
mod model;
pub(crate) mod pieces;
mod stream;
mod train;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{AddedToken, DecoderWrapper, Model as _, PreTokenizerWrapper};

use crate::error::guard;
use crate::files::{read_bounded, write_atomic};
use crate::gguf::tokenizer::Ends;
use crate::gguf::{self, GgufFile};
use crate::{Error, Result};

use bytes::{ByteTable, Spelling};
use fast::{FastBpe, Words};
use model::{Library, Model};

pub use stream::StreamDecoder;
#[cfg(test)]
pub(crate) use train::skeleton;
pub use train::{SPECIAL_TOKENS, TrainOptions};

/// The largest `tokenizer.json` that is read; published ones stay below 40 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// No published vocabulary has a million entries; an id far above its count would only cost memory.
const MAX_VOCABULARY: usize = 4 << 20;

const BOS_NAMES: [&str; 6] =
    ["<|bos|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"];
const EOS_NAMES: [&str; 8] = [
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
];

/// A tokenizer; a clone shares the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

/// A token that text from outside must not be able to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlToken {
    /// How a template writes it.
    pub content: String,
    /// Its id.
    pub id: u32,
    /// Whether it swallows white space before it.
    pub lstrip: bool,
    /// Whether it swallows white space behind it.
    pub rstrip: bool,
}

struct Shared {
    /// Recognises control tokens in text.
    special: Library,
    /// Does not.
    plain: Library,
    /// Nor does this, and it puts nothing before the first word; where `plain` does.
    inside: Option<Library>,
    file: JsonFile,
    fingerprint: OnceLock<[u8; 32]>,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    /// For byte-level vocabularies the bytes of each id, which make decoding exact and simple.
    token_bytes: Option<ByteTable>,
    /// For others how their tokens spell bytes, if each does so for itself.
    spelling: Option<Spelling>,
    is_special: Vec<bool>,
    /// The longest first.
    control: Vec<ControlToken>,
    /// A short way for ASCII text, where there is one.
    fast: Option<FastBpe>,
    /// The letter that stands for each byte.
    letters: [char; 256],
}

/// The `tokenizer.json` of a tokenizer.
enum JsonFile {
    /// It was read from one.
    Read(Vec<u8>),
    /// It was read from something else, and the file is written when somebody asks for it.
    Unwritten(Box<gguf::tokenizer::Frame>, OnceLock<Vec<u8>>),
}

/// Who says which tokens begin and end a text.
enum EndTokens {
    /// Files beside the tokenizer, by name, where they do; else names that are known.
    Named { names: [Option<String>; 2], add_bos: bool },
    /// The file that the tokenizer is in.
    Ids(Ends),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json`, or the one in a folder; `tokenizer_config.json` beside it names bos and eos.
    ///
    /// # Errors
    /// A missing, oversized or invalid file, with its path and what the parser found.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let given = path.as_ref();
        let path: PathBuf = if given.is_dir() { given.join("tokenizer.json") } else { given.to_owned() };
        let json = read_bounded(&path, MAX_FILE_BYTES)?;
        let (mut names, mut add_bos) = ([None, None], false);
        for beside in ["tokenizer_config.json", "special_tokens_map.json"] {
            let Ok(bytes) = read_bounded(&path.with_file_name(beside), 64 << 20) else { continue };
            let value: Value = serde_json::from_slice(&bytes).map_err(|error| {
                Error::tokenizer(path.with_file_name(beside).display().to_string(), error)
            })?;
            add_bos |= value["add_bos_token"] == true;
            for (name, key) in names.iter_mut().zip(["bos_token", "eos_token"]) {
                let entry = value.get(key).map(|entry| entry.get("content").unwrap_or(entry));
                *name = name.take().or_else(|| entry.and_then(Value::as_str).map(str::to_owned));
            }
        }
        Self::build(json, &path.display().to_string(), &EndTokens::Named { names, add_bos })
    }

    /// Reads the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// Invalid content.
    pub fn from_json(json: Vec<u8>) -> Result<Self> {
        Self::build(json, "(in memory)", &EndTokens::Named { names: [None, None], add_bos: false })
    }

    /// The tokenizer in a GGUF file; None where it has none.
    ///
    /// # Errors
    /// Metadata that contradicts itself, or says what is not known.
    pub fn from_gguf(file: &GgufFile) -> Result<Option<Self>> {
        let Some(parts) = gguf::tokenizer::parts(file)? else { return Ok(None) };
        let place = file.path().display().to_string();
        let fail = |error: serde_json::Error| Error::tokenizer(place.clone(), error);
        let gguf::tokenizer::Parts { bpe, added, frame } = parts;
        let mut special = Library::new(Model::Own(Arc::new(bpe)));
        let read = serde_json::from_value::<Option<tokenizers::NormalizerWrapper>>;
        special.with_normalizer(read(frame.normalizer.clone()).map_err(fail)?);
        let read = serde_json::from_value::<Option<tokenizers::PreTokenizerWrapper>>;
        special.with_pre_tokenizer(read(frame.pre_tokenizer.clone()).map_err(fail)?);
        let read = serde_json::from_value::<Option<DecoderWrapper>>;
        special.with_decoder(read(frame.decoder.clone()).map_err(fail)?);
        special.add_tokens(&added);
        let ends = EndTokens::Ids(gguf::tokenizer::ends(file)?);
        let json = JsonFile::Unwritten(Box::new(frame), OnceLock::new());
        Self::finish(special, json, &place, &ends).map(Some)
    }

    /// Trains a byte-level BPE vocabulary, the same on every run and with any number of threads.
    ///
    /// The text is cut as in DeepSeek-V3 (digits one by one or up to three, runs of CJK, words with the
    /// character before them, punctuation, line ends) and merges never cross a cut.
    ///
    /// # Errors
    /// A vocabulary size that does not hold the bytes and the special tokens, or an empty sample.
    pub fn train(sample: &[String], options: &TrainOptions) -> Result<Self> {
        Self::from_json(train::train_json(sample, options)?)
    }

    fn build(json: Vec<u8>, place: &str, ends: &EndTokens) -> Result<Self> {
        let special = match guard(|| serde_json::from_slice::<Library>(&json)) {
            Ok(Ok(own)) => own,
            // what ours cannot do the library can, and what it refuses is told in its words
            Ok(Err(_)) | Err(_) => Self::by_library(&json, place)?,
        };
        Self::finish(special, JsonFile::Read(json), place, ends)
    }

    fn by_library(json: &[u8], place: &str) -> Result<Library> {
        let fail = |reason: String| Error::tokenizer(place, reason);
        // the parser of the model wraps errors so that they lose their line; look at the syntax first
        let _: IgnoredAny =
            serde_json::from_slice(json).map_err(|error| fail(format!("not JSON: {error}")))?;
        let read = guard(|| tokenizers::Tokenizer::from_bytes(json)).map_err(fail)?;
        Ok(model::wrapped(&read.map_err(|error| fail(format!("not a tokenizer: {error}")))?))
    }

    fn finish(mut special: Library, file: JsonFile, place: &str, ends: &EndTokens) -> Result<Self> {
        let fail = |reason: String| Error::tokenizer(place, reason);
        // both would silently change documents
        special.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        special.with_padding(None);

        let added = special.get_added_vocabulary().get_added_tokens_decoder();
        let added_end = added.keys().max().map_or(0, |&id| id as usize + 1);
        let vocab_size = special.get_model().end().max(added_end);
        if vocab_size == 0 {
            return Err(fail("the vocabulary is empty".to_owned()));
        }
        if vocab_size > MAX_VOCABULARY {
            return Err(fail(format!(
                "the largest id is {}, expected below {MAX_VOCABULARY}",
                vocab_size - 1
            )));
        }
        let mut is_special = vec![false; vocab_size];
        for (id, token) in added {
            is_special[*id as usize] = token.special;
        }
        let mut plain = special.clone();
        let is_control = |t: &AddedToken| t.special || t.content.starts_with('<') && t.content.ends_with('>');
        let all_control = added.values().all(is_control);
        let mut control: Vec<ControlToken> = added
            .iter()
            .filter(|(_, token)| is_control(token) && token.content.chars().nth(1).is_some())
            .map(|(&id, token)| ControlToken {
                content: token.content.clone(),
                id,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
            })
            .collect();
        control.sort_by(|a, b| (b.content.len(), a.id).cmp(&(a.content.len(), b.id)));
        plain.with_added_vocabulary(tokenizers::AddedVocabulary::new());
        if !all_control {
            // some are ordinary text (runs of spaces, say) and must still be found; in the order of ids, to get the same
            let mut all: Vec<(&u32, &AddedToken)> = added.iter().collect();
            all.sort_unstable_by_key(|(id, _)| **id);
            let marked = |(_, token): (_, &AddedToken)| token.clone().special(is_control(token));
            let marked: Vec<AddedToken> = all.into_iter().map(marked).collect();
            plain.add_tokens(&marked);
            plain.set_encode_special_tokens(true);
        }
        let mut pre = plain.get_pre_tokenizer().cloned();
        let inside = pre.as_mut().is_some_and(drop_first_prefix).then(|| {
            let mut inside = plain.clone();
            inside.with_pre_tokenizer(pre);
            inside
        });
        let byte_level = matches!(special.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let token_bytes = byte_level.then(|| ByteTable::new(&special, vocab_size));
        let fast = if all_control && byte_level { FastBpe::new(&special) } else { None };
        let spelling = if byte_level {
            None
        } else {
            serde_json::to_value(special.get_decoder()).ok().as_ref().and_then(Spelling::of)
        };
        let letters = stream::byte_letters();
        let find = |named: &Option<String>, known: &[&str]| match named {
            Some(name) => special.token_to_id(name),
            None => known.iter().find_map(|name| special.token_to_id(name)),
        };
        let (bos, eos, add_bos) = match ends {
            EndTokens::Named { names: [bos, eos], add_bos } => {
                (find(bos, &BOS_NAMES), find(eos, &EOS_NAMES), *add_bos)
            }
            EndTokens::Ids(ends) => (ends.bos, ends.eos, true),
        };
        let adds_bos = bos.is_some()
            && (add_bos || ids_of(&special, "", true).is_ok_and(|ids| ids.first().copied() == bos));
        let shared = Shared {
            special,
            plain,
            inside,
            file,
            fingerprint: OnceLock::new(),
            vocab_size,
            bos,
            eos,
            adds_bos,
            token_bytes,
            spelling,
            is_special,
            control,
            fast,
            letters,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The tokens that a template may write and a person may not, the longest first.
    pub fn control_tokens(&self) -> &[ControlToken] {
        &self.shared.control
    }

    /// The largest id plus one: the rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// The id of a token as it is written in the vocabulary.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.shared.special.token_to_id(token)
    }

    /// The token of an id as it is written in the vocabulary.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.shared.special.id_to_token(id)
    }

    /// The token that starts a document.
    pub fn bos(&self) -> Option<u32> {
        self.shared.bos
    }

    /// The token that begins a text which is to be continued: that of documents, where the file puts it there.
    pub fn bos_of_text(&self) -> Option<u32> {
        self.bos().filter(|_| self.shared.adds_bos)
    }

    /// The token that ends a document.
    pub fn eos(&self) -> Option<u32> {
        self.shared.eos
    }

    /// The content of its `tokenizer.json`.
    pub(crate) fn json(&self) -> &[u8] {
        match &self.shared.file {
            JsonFile::Read(json) => json,
            JsonFile::Unwritten(frame, json) => json.get_or_init(|| {
                let Model::Own(bpe) = self.shared.special.get_model() else {
                    unreachable!("only a model of ours is read from anything but a tokenizer.json")
                };
                frame.json(bpe, self.shared.special.get_added_vocabulary())
            }),
        }
    }

    /// blake3 of the `tokenizer.json`.
    pub fn fingerprint(&self) -> [u8; 32] {
        *self.shared.fingerprint.get_or_init(|| *blake3::hash(self.json()).as_bytes())
    }

    /// Encodes plain text; control tokens in it are only characters. Adds no bos.
    ///
    /// # Errors
    /// What the tokenizer's model refuses, such as an unknown character in a vocabulary without bytes.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_plain(text, &mut Words::default())
    }

    /// Encodes plain text that stands behind other tokens of a text: what goes before a text's first word is left out.
    pub(crate) fn encode_inside(&self, text: &str) -> Result<Vec<u32>> {
        match &self.shared.inside {
            Some(inside) => ids_of(inside, text, false),
            None => self.encode(text),
        }
    }

    fn encode_plain(&self, text: &str, words: &mut Words) -> Result<Vec<u32>> {
        let Some(fast) = &self.shared.fast else { return ids_of(&self.shared.plain, text, false) };
        let mut out = Vec::with_capacity(text.len() / 3);
        for (part, is_ascii) in fast::parts(text) {
            if is_ascii {
                fast.encode_ascii(part.as_bytes(), words, &mut out, &mut |word, out| {
                    let letters: String =
                        word.iter().map(|&byte| self.shared.letters[byte as usize]).collect();
                    let model = self.shared.plain.get_model();
                    let tokens =
                        model.tokenize(&letters).map_err(|error| Error::tokenizer("(encoding)", error))?;
                    out.extend(tokens.iter().map(|token| token.id));
                    Ok(())
                })?;
            } else {
                out.extend(ids_of(&self.shared.plain, part, false)?);
            }
        }
        Ok(out)
    }

    /// Encodes text in which control tokens are recognised, such as a rendered chat template. Adds no bos.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        ids_of(&self.shared.special, text, false)
    }

    /// Encodes many plain texts on up to `threads` threads; results are in order.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], for the first text in order that fails.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<Vec<Vec<u32>>> {
        let work = |words: &mut Words, at: usize| self.encode_plain(texts[at].as_ref(), words);
        parallel_map(texts.len(), threads, Words::default, work).into_iter().collect()
    }

    /// Decodes ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        if self.has_bytes() {
            let (mut bytes, mut begun) = (Vec::new(), false);
            for &id in ids {
                bytes.extend_from_slice(&self.shown_bytes(id, skip_special, &mut begun));
            }
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        // decoders of some files panic on some tokens; what they spell is then shown as it stands in the vocabulary
        let done = guard(|| self.shared.special.decode(ids, skip_special).unwrap_or_default());
        done.unwrap_or_else(|_| ids.iter().filter_map(|&id| self.token_of(id)).collect())
    }

    /// A decoder for ids that arrive one by one.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`, as `AutoTokenizer` expects.
    ///
    /// # Errors
    /// I/O.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "model_max_length": 1_000_000_000_000_000_000u64,
        });
        let mut map = json!({});
        let pad = self.id_of("<|pad|>").or(self.eos());
        for (key, id) in [("bos_token", self.bos()), ("eos_token", self.eos()), ("pad_token", pad)] {
            if let Some(token) = id.and_then(|id| self.token_of(id)) {
                config[key] = json!(token);
                map[key] = json!(token);
            }
        }
        let pretty = |value: &Value| {
            let mut text = serde_json::to_vec_pretty(value).expect("JSON values serialise");
            text.push(b'\n');
            text
        };
        write_atomic(&folder.join("tokenizer.json"), self.json())?;
        write_atomic(&folder.join("tokenizer_config.json"), &pretty(&config))?;
        write_atomic(&folder.join("special_tokens_map.json"), &pretty(&map))
    }
}

/// Takes away what is put before the first word of a text alone; whether there was any.
fn drop_first_prefix(pre: &mut PreTokenizerWrapper) -> bool {
    match pre {
        PreTokenizerWrapper::Metaspace(spaces) if spaces.get_prepend_scheme() == PrependScheme::First => {
            spaces.set_prepend_scheme(PrependScheme::Never);
            true
        }
        PreTokenizerWrapper::Sequence(parts) => {
            // of all of them, not up to the first
            parts.as_mut().iter_mut().map(drop_first_prefix).filter(|found| *found).count() > 0
        }
        _ => false,
    }
}

/// The ids of a text, with the tokens that the file puts around one or without.
fn ids_of(tokenizer: &Library, text: &str, around: bool) -> Result<Vec<u32>> {
    let run = || tokenizer.encode_fast(tokenizers::InputSequence::Raw(Cow::Borrowed(text)), around);
    let encoding = guard(run)
        .map_err(|reason| Error::tokenizer("(encoding)", reason))?
        .map_err(|error| Error::tokenizer("(encoding)", error))?;
    Ok(encoding.get_ids().to_vec())
}

/// Maps 0..n on up to `threads` threads, each with a state of its own; the result does not depend on how many.
fn parallel_map<S, R: Send>(
    n: usize,
    threads: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> R + Sync,
) -> Vec<R> {
    let threads = threads.clamp(1, n.max(1));
    let next = AtomicUsize::new(0);
    let take = || {
        let (mut state, mut done) = (state(), Vec::new());
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= n {
                return done;
            }
            done.push((at, work(&mut state, at)));
        }
    };
    if threads == 1 {
        return take().into_iter().map(|(_, result)| result).collect();
    }
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(take)).collect();
        handles.into_iter().flat_map(|handle| handle.join().expect("the work does not panic")).collect()
    });
    results.sort_unstable_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod against_library;
#[cfg(test)]
mod tests;
