//! Sources: what a recipe names, turned into documents.
//!
//! A source is a folder or file of text, Markdown or source code, JSONL, Parquet, or a data set in the local
//! Hugging Face cache. Three rules make the documents a function of the content and of nothing else:
//!
//! 1. Files come in the order of their path below the source's root, never in the order of the disk.
//! 2. A cap (`max_files`, `max_bytes`) does not take the head of the alphabet: candidates are ranked by a
//!    hash of their path, the cap is applied in that order, and what is left is sorted again. The hash leaves
//!    out leading folders that all files share, so a cache that is named differently on another machine
//!    gives the same choice.
//! 3. Equal texts count once, over all sources, by content hash; which path they had does not matter.
//!
//! Memory is bounded by the list of paths, sixteen bytes per document for the hashes, and one document: texts
//! are streamed. What cannot be text (a NUL byte, or many control bytes at the start) is skipped and counted,
//! invalid UTF-8 is replaced and counted, and a source that gives nothing at all is an error with its name.
//!
//! A text file that is named by itself (not found in a folder) may be large: it is cut into documents of
//! [`PIECE_BYTES`] at paragraph or line ends, so that a single book can be split and shuffled. Lines of JSON with
//! `messages`, or with `prompt` and `answer`, become plain text. Of those with the strings `prompt` and `completion`
//! the text is both, one behind the other, and only the completion is learned ([`Document::prompt_bytes`]).

mod list;
mod records;

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};
use list::{FileKind, ListedFile, list_files};
use records::{JsonLines, ParquetColumn, Records, TextPieces};

/// The size to which a text file that is named by itself is cut.
pub const PIECE_BYTES: usize = 16 << 10;

/// Where documents come from, as a recipe says it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceSpec {
    /// A folder, a file, or `hf:OWNER/NAME`; `~`, `$VAR` and `${VAR:-default}` are expanded.
    pub path: String,
    /// Patterns of files to take; none takes all. `rs`, `*.md`, `docs/**/*.txt`, `*.{md,txt}`.
    pub include: Vec<String>,
    /// Patterns of files and folders to leave out; wins over `include`. Hidden ones are always left out.
    pub exclude: Vec<String>,
    /// At most this many files.
    pub max_files: Option<u64>,
    /// At most this many bytes of text.
    pub max_bytes: Option<u64>,
    /// Larger text files of a folder, and larger records of a table, are skipped and counted.
    pub max_file_bytes: u64,
    /// The column or key that holds the text of Parquet and JSONL.
    pub text_field: String,
    /// How often each document is read per epoch: 2 twice, 0.5 every other one (chosen by content hash).
    pub weight: f64,
}

impl Default for SourceSpec {
    fn default() -> Self {
        Self {
            path: String::new(),
            include: Vec::new(),
            exclude: Vec::new(),
            max_files: None,
            max_bytes: None,
            max_file_bytes: 1 << 20,
            text_field: "text".to_owned(),
            weight: 1.0,
        }
    }
}

/// One text with where it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// The text; never empty.
    pub text: String,
    /// How much of the text, from its beginning, is a prompt: read, not learned. 0 for most.
    pub prompt_bytes: usize,
    /// The position of its source in the recipe.
    pub source: usize,
    /// The file's path below the source's root, with `/`.
    pub path: String,
    /// blake3 of the text.
    pub hash: [u8; 32],
    /// The file's group in the training/validation split, if its source has groups (see [`crate::split`]).
    pub group: Option<String>,
}

/// What was read and what was left out, with counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorpusStats {
    /// Files opened.
    pub files: u64,
    /// Documents kept.
    pub documents: u64,
    /// Bytes of text kept.
    pub bytes: u64,
    /// Documents dropped because an equal one was kept.
    pub duplicates: u64,
    /// Files that are not text.
    pub binary: u64,
    /// Documents in which invalid UTF-8 was replaced.
    pub invalid_utf8: u64,
    /// Files or records above `max_file_bytes`.
    pub skipped_large: u64,
    /// Files or records without any text.
    pub empty: u64,
}

/// The files of all sources, listed; documents are read when asked for, as often as asked.
#[derive(Debug, Clone)]
pub struct Corpus {
    specs: Vec<SourceSpec>,
    files: Vec<ListedFile>,
}

impl Corpus {
    /// Lists the files of every source without reading them.
    ///
    /// # Errors
    /// A source that is missing, unreadable, holds no file that its patterns take, or has a weight that is
    /// not in (0, 100].
    pub fn open(specs: &[SourceSpec]) -> Result<Self> {
        if specs.is_empty() {
            return Err(Error::setting("data sources", "at least one", "none"));
        }
        let mut files = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            if !(spec.weight > 0.0 && spec.weight <= 100.0) {
                let reason = format!("weight must be above 0 and at most 100, got {}", spec.weight);
                return Err(Error::source(&spec.path, reason));
            }
            files.extend(list_files(index, spec)?);
        }
        Ok(Self { specs: specs.to_vec(), files })
    }

    /// The sources.
    pub fn specs(&self) -> &[SourceSpec] {
        &self.specs
    }

    /// The size of all listed files, an upper bound for text files and the scale of a progress bar.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Reads the documents, in order, without duplicates.
    pub fn documents(&self) -> Documents<'_> {
        Documents {
            corpus: self,
            next_file: 0,
            open: None,
            seen: HashSet::new(),
            stats: CorpusStats::default(),
            read_bytes: 0,
            source_bytes: 0,
            source_start: CorpusStats::default(),
            finished: false,
        }
    }
}

/// The stream of documents; an error ends it.
#[derive(Debug)]
pub struct Documents<'a> {
    corpus: &'a Corpus,
    next_file: usize,
    open: Option<OpenFile<'a>>,
    // sixteen bytes of blake3: two different texts meet with probability below 2^-64 for 2^32 documents
    seen: HashSet<[u8; 16]>,
    stats: CorpusStats,
    read_bytes: u64,
    source_bytes: u64,
    source_start: CorpusStats,
    finished: bool,
}

#[derive(Debug)]
struct OpenFile<'a> {
    file: &'a ListedFile,
    records: Records,
}

/// What one look at a file gave.
#[derive(Debug)]
pub(crate) enum Record {
    Text { text: String, prompt_bytes: usize, invalid_utf8: bool },
    TooLarge,
    Empty,
}

impl Documents<'_> {
    /// What has been read and left out so far.
    pub fn stats(&self) -> CorpusStats {
        self.stats
    }

    /// The size of the files that are done, for a progress bar.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    fn step(&mut self) -> Result<Option<Document>> {
        loop {
            if self.open.is_none() && !self.open_next()? {
                return Ok(None);
            }
            let Some(open) = &mut self.open else { continue };
            let file = open.file;
            let spec = &self.corpus.specs[file.source];
            let over = spec.max_bytes.is_some_and(|most| self.source_bytes >= most);
            let record = if over { None } else { open.records.next(&file.path)? };
            match record {
                None => {
                    self.open = None;
                    self.read_bytes += file.bytes;
                }
                Some(Record::TooLarge) => self.stats.skipped_large += 1,
                Some(Record::Empty) => self.stats.empty += 1,
                Some(Record::Text { text, prompt_bytes, invalid_utf8 }) => {
                    let hash = *blake3::hash(text.as_bytes()).as_bytes();
                    let short = *hash.first_chunk().expect("32 bytes hold 16");
                    if !self.seen.insert(short) {
                        self.stats.duplicates += 1;
                        continue;
                    }
                    self.stats.documents += 1;
                    self.stats.bytes += text.len() as u64;
                    self.stats.invalid_utf8 += u64::from(invalid_utf8);
                    self.source_bytes += text.len() as u64;
                    let (path, group) = (file.relative.clone(), file.group.clone());
                    return Ok(Some(Document { text, prompt_bytes, source: file.source, path, hash, group }));
                }
            }
        }
    }

    /// Opens the next file; false when there is none left.
    fn open_next(&mut self) -> Result<bool> {
        let previous = self.next_file.checked_sub(1).map(|last| self.corpus.files[last].source);
        let file = self.corpus.files.get(self.next_file);
        if let Some(source) = previous
            && file.map(|file| file.source) != previous
        {
            self.check_source(source)?;
            self.source_bytes = 0;
            self.source_start = self.stats;
        }
        let Some(file) = file else { return Ok(false) };
        self.next_file += 1;
        self.stats.files += 1;
        let spec = &self.corpus.specs[file.source];
        self.open = match open_records(file, spec)? {
            Opened::Records(records) => Some(OpenFile { file, records }),
            skipped => {
                self.read_bytes += file.bytes;
                match skipped {
                    Opened::Binary => self.stats.binary += 1,
                    Opened::TooLarge => self.stats.skipped_large += 1,
                    Opened::Records(_) => {}
                }
                None
            }
        };
        Ok(true)
    }

    /// A source that was read to its end and gave nothing is a mistake of its owner, who should hear why.
    fn check_source(&self, source: usize) -> Result<()> {
        let (now, start) = (&self.stats, &self.source_start);
        if now.documents > start.documents || now.duplicates > start.duplicates {
            return Ok(());
        }
        let reason = format!(
            "holds no text: of {} files {} are binary, {} too large (max_file_bytes), {} empty",
            now.files - start.files,
            now.binary - start.binary,
            now.skipped_large - start.skipped_large,
            now.empty - start.empty,
        );
        Err(Error::source(&self.corpus.specs[source].path, reason))
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let item = self.step().transpose();
        self.finished = !matches!(item, Some(Ok(_)));
        item
    }
}

enum Opened {
    Records(Records),
    Binary,
    TooLarge,
}

fn open_records(file: &ListedFile, spec: &SourceSpec) -> Result<Opened> {
    let path: &PathBuf = &file.path;
    let limit = spec.max_file_bytes;
    let records = match file.kind {
        FileKind::Parquet => Records::Parquet(Box::new(ParquetColumn::open(path, &spec.text_field, limit)?)),
        FileKind::JsonLines => Records::JsonLines(JsonLines::open(path, &spec.text_field, limit)?),
        FileKind::Text | FileKind::TextAlone => {
            let mut reader = BufReader::new(File::open(path).map_err(Error::io("open", path))?);
            let mut head = Vec::new();
            reader.by_ref().take(8192).read_to_end(&mut head).map_err(Error::io("read", path))?;
            if looks_binary(&head) {
                return Ok(Opened::Binary);
            }
            if file.kind == FileKind::TextAlone {
                Records::Pieces(TextPieces::new(reader, head))
            } else {
                let mut bytes = head;
                reader
                    .take(limit.saturating_add(1))
                    .read_to_end(&mut bytes)
                    .map_err(Error::io("read", path))?;
                if bytes.len() as u64 > limit {
                    return Ok(Opened::TooLarge);
                }
                Records::One(Some(text_record(bytes)))
            }
        }
    };
    Ok(Opened::Records(records))
}

/// Whether the first bytes of a file are those of something else than text.
fn looks_binary(head: &[u8]) -> bool {
    let control =
        head.iter().filter(|&&b| b < 32 && !matches!(b, b'\t' | b'\n' | b'\r' | 0x0c | 0x1b)).count();
    head.contains(&0) || control * 10 > head.len()
}

/// Bytes to text: a byte-order mark goes, invalid UTF-8 becomes U+FFFD.
pub(crate) fn text_record(bytes: Vec<u8>) -> Record {
    let (mut text, invalid_utf8) = match String::from_utf8(bytes) {
        Ok(text) => (text, false),
        Err(error) => (String::from_utf8_lossy(error.as_bytes()).into_owned(), true),
    };
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    if text.trim().is_empty() { Record::Empty } else { Record::Text { text, prompt_bytes: 0, invalid_utf8 } }
}

#[cfg(test)]
mod tests;
