//! From sources to shards, once: the pipeline with its cache.
//!
//! 1. **Scan.** Every file is read, hashed, deduplicated and given its side of the split. What comes out is a
//!    fingerprint of the content (paths, hashes, settings).
//! 2. The fingerprint names a folder in the cache. If it is there and its shards open, that is all. If not, the folder's
//!    lock is taken, so of several runs that start at once one prepares and the others wait.
//! 3. **Train the tokenizer** on training documents picked by hash up to a bound, or load the given one.
//! 4. **Tokenize** and write. The folder is built under another name and moved into place whole, so a killed
//!    run leaves nothing that a later one would trust.
//!
//! Files are read again in step 4; if their content changed meanwhile, that is an error and not a quiet mix.
//!
//! A source's `weight` says how often its documents are read per epoch. Copies are written in rounds (all
//! documents once, then those that are due again), so two copies never stand side by side.
//! Held-out documents are written once, as shards and as plain text for the compression yardstick.
//!
//! The tokenizer learns from whole texts, prompts included.

use std::fs::{self, File, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::{read_bounded, write_atomic};
use crate::hf::write_folder_atomic;
use crate::shards::{ShardSet, ShardWriter};
use crate::source::{Corpus, CorpusStats, Document, SourceSpec};
use crate::split::{KeyRange, Side, Split, split_key};
use crate::tokenizer::{Tokenizer, TrainOptions};
use crate::{Error, Progress, Result, Stage};

/// Changes whenever the same sources would give other shards.
const CACHE_VERSION: u32 = 2;
/// Tokens per shard file.
const SHARD_TOKENS: u64 = 1 << 28;
/// Text that is tokenised together.
const BATCH_BYTES: usize = 8 << 20;

/// Where the vocabulary comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizerSpec {
    /// A `tokenizer.json` or a folder with one.
    File(PathBuf),
    /// Trained on a sample of the training documents.
    Train {
        /// Size and kind of the vocabulary; its `threads` is replaced by the one of [`DataSettings`].
        options: TrainOptions,
        /// How much text the sample holds.
        sample_bytes: u64,
    },
}

/// All that decides what the shards hold, and where they are kept.
#[derive(Debug, Clone)]
pub struct DataSettings {
    /// Sources, in the order of the recipe.
    pub sources: Vec<SourceSpec>,
    /// The share of documents (or groups) that is held out, 0 to 0.5.
    pub validation_share: f64,
    /// Whether files of one package stay on one side of the split (see [`crate::split`]).
    pub split_by_group: bool,
    /// The vocabulary.
    pub tokenizer: TokenizerSpec,
    /// Where prepared data is kept.
    pub cache: PathBuf,
    /// Threads for tokenising; the result does not depend on it.
    pub threads: usize,
}

/// Data that is ready to train on.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The vocabulary.
    pub tokenizer: Tokenizer,
    /// Tokens to learn from.
    pub train: ShardSet,
    /// Tokens held out; none if the share was 0.
    pub validation: Option<ShardSet>,
    /// The held-out text, for the compression yardstick.
    pub validation_text: Option<PathBuf>,
    /// What was read and left out.
    pub stats: CorpusStats,
    /// The cache folder.
    pub folder: PathBuf,
    /// Whether an earlier run had prepared it.
    pub reused: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    stats: CorpusStats,
    train: Vec<String>,
    validation: Vec<String>,
}

/// Prepares the data of a recipe, or finds it prepared.
///
/// # Errors
/// Any source, tokenizer or file that cannot be used; the cache then holds nothing new.
pub fn prepare(settings: &DataSettings, progress: &mut dyn FnMut(Progress)) -> Result<Prepared> {
    let given = match &settings.tokenizer {
        TokenizerSpec::File(path) => Some(Tokenizer::load(path)?),
        TokenizerSpec::Train { .. } => None,
    };
    let corpus = Corpus::open(&settings.sources)?;
    let scan = scan(&corpus, settings, progress)?;
    let folder = settings.cache.join(cache_key(settings, &scan, given.as_ref()));
    if let Some(prepared) = usable(&folder) {
        return Ok(prepared);
    }
    let _held = hold(settings, &folder)?;
    // whoever held it may have made it
    if let Some(prepared) = usable(&folder) {
        return Ok(prepared);
    }
    let tokenizer = match (given, &settings.tokenizer) {
        (Some(tokenizer), _) => tokenizer,
        (None, TokenizerSpec::Train { options, sample_bytes }) => {
            let sample = sample(&corpus, settings, &scan, *sample_bytes, progress)?;
            Tokenizer::train(&sample, &TrainOptions { threads: settings.threads, ..options.clone() })?
        }
        (None, TokenizerSpec::File(_)) => unreachable!("a file was loaded above"),
    };
    write_folder_atomic(&folder, |folder| write(&corpus, settings, &scan, &tokenizer, folder, progress))?;
    let prepared = open_prepared(&folder)?.ok_or_else(|| {
        Error::io("open", &folder)(std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "it was removed just now",
        ))
    })?;
    Ok(Prepared { reused: false, ..prepared })
}

/// Opens what [`prepare`] left in a folder of its cache, without looking at the sources: a run that goes on needs its
/// own data, not what became of the files since. None if there is nothing.
///
/// # Errors
/// The data is there and damaged.
pub fn reopen(folder: &Path) -> Result<Option<Prepared>> {
    open_prepared(folder)
}

/// What an earlier run prepared, unless it is damaged.
fn usable(folder: &Path) -> Option<Prepared> {
    open_prepared(folder).unwrap_or_else(|error| {
        tracing::warn!("the prepared data in {} is made again: {error}", folder.display());
        None
    })
}

/// Taken by the run that makes a folder of the cache: others that start meanwhile and want the same data wait for it.
fn hold(settings: &DataSettings, folder: &Path) -> Result<File> {
    fs::create_dir_all(&settings.cache).map_err(Error::io("create", &settings.cache))?;
    let path = folder.with_extension("lock");
    let lock = File::create(&path).map_err(Error::io("create", &path))?;
    let taken = match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            tracing::warn!("another run prepares this data in {}: waiting for it", folder.display());
            lock.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    };
    match taken {
        // some network file systems have no locks: nothing to hold, nothing to wait for
        Err(error) if error.kind() != std::io::ErrorKind::Unsupported => Err(Error::io("lock", &path)(error)),
        _ => Ok(lock),
    }
}

struct Scan {
    split: Split,
    fingerprint: [u8; 32],
    stats: CorpusStats,
    total_bytes: u64,
}

fn scan(corpus: &Corpus, settings: &DataSettings, progress: &mut dyn FnMut(Progress)) -> Result<Scan> {
    let total_bytes = corpus.total_bytes();
    let (mut keys, mut hasher) = (KeyRange::default(), blake3::Hasher::new());
    let mut documents = corpus.documents();
    let mut ticks = Ticks::new(Stage::Scan, total_bytes);
    while let Some(document) = documents.next().transpose()? {
        keys.add(split_key(&document, settings.split_by_group));
        add_to_fingerprint(&mut hasher, &document);
        ticks.at(documents.read_bytes(), progress);
    }
    ticks.end(progress);
    let split = Split::new(settings.validation_share, keys)?;
    Ok(Scan { split, fingerprint: *hasher.finalize().as_bytes(), stats: documents.stats(), total_bytes })
}

fn add_to_fingerprint(hasher: &mut blake3::Hasher, document: &Document) {
    hasher.update(&document.hash);
    hasher.update(&(document.prompt_bytes as u64).to_le_bytes());
    hasher.update(&(document.source as u64).to_le_bytes());
    // the group is what of the path reaches the shards
    let group = document.group.as_deref().unwrap_or_default();
    hasher.update(&(group.len() as u64).to_le_bytes());
    hasher.update(group.as_bytes());
}

fn cache_key(settings: &DataSettings, scan: &Scan, tokenizer: Option<&Tokenizer>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&CACHE_VERSION.to_le_bytes());
    hasher.update(&scan.fingerprint);
    hasher.update(&settings.validation_share.to_le_bytes());
    hasher.update(&[u8::from(settings.split_by_group)]);
    for source in &settings.sources {
        hasher.update(&source.weight.to_le_bytes());
    }
    match (tokenizer, &settings.tokenizer) {
        (None, TokenizerSpec::Train { options, sample_bytes }) => {
            hasher.update(&(options.vocab_size as u64).to_le_bytes());
            hasher.update(&[options.digits]);
            hasher.update(&sample_bytes.to_le_bytes())
        }
        (tokenizer, _) => hasher.update(&tokenizer.map(Tokenizer::fingerprint).unwrap_or_default()),
    };
    hasher.finalize().to_hex()[..24].to_owned()
}

/// Training documents picked by a part of their hash that the split does not use.
fn sample(
    corpus: &Corpus,
    settings: &DataSettings,
    scan: &Scan,
    sample_bytes: u64,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<String>> {
    let share = sample_bytes as f64 / scan.stats.bytes.max(1) as f64;
    let (mut sample, mut bytes) = (Vec::new(), 0u64);
    let mut documents = corpus.documents();
    let mut ticks = Ticks::new(Stage::TrainTokenizer, scan.total_bytes);
    while let Some(document) = documents.next().transpose()? {
        ticks.at(documents.read_bytes(), progress);
        let held_out = scan.split.side(split_key(&document, settings.split_by_group)) == Side::Validation;
        if held_out || unit(&document, 8) >= share {
            continue;
        }
        bytes += document.text.len() as u64;
        sample.push(document.text);
        // a few large documents may pass the bound by chance, but not by much
        if bytes > sample_bytes.saturating_mul(2) {
            break;
        }
    }
    ticks.end(progress);
    Ok(sample)
}

/// A number in [0, 1) from eight bytes of the content's hash.
fn unit(document: &Document, at: usize) -> f64 {
    let bits = u64::from_le_bytes(*document.hash[at..].first_chunk().expect("inside the hash"));
    (bits >> 11) as f64 / 2f64.powi(53)
}

/// How many copies of a document an epoch holds.
fn copies(document: &Document, weight: f64) -> u64 {
    weight as u64 + u64::from(unit(document, 16) < weight.fract())
}

fn write(
    corpus: &Corpus,
    settings: &DataSettings,
    scan: &Scan,
    tokenizer: &Tokenizer,
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    tokenizer.save(folder)?;
    let text_path = folder.join("validation.txt");
    let mut text = BufWriter::new(File::create(&text_path).map_err(Error::io("create", &text_path))?);
    let mut train = Output::new(folder, "train", tokenizer);
    let mut validation = Output::new(folder, "validation", tokenizer);
    let rounds = settings.sources.iter().map(|source| source.weight.ceil() as u64).max().unwrap_or(1);
    let mut ticks = Ticks::new(Stage::Tokenize, scan.total_bytes * rounds);
    for round in 0..rounds {
        let mut hasher = blake3::Hasher::new();
        let mut documents = corpus.documents();
        while let Some(document) = documents.next().transpose()? {
            add_to_fingerprint(&mut hasher, &document);
            let weight = settings.sources[document.source].weight;
            match scan.split.side(split_key(&document, settings.split_by_group)) {
                Side::Validation if round == 0 => {
                    text.write_all(document.text.as_bytes()).map_err(Error::io("write", &text_path))?;
                    validation.push(document, settings.threads)?;
                }
                Side::Training if copies(&document, weight) > round => {
                    train.push(document, settings.threads)?;
                }
                Side::Validation | Side::Training => {}
            }
            ticks.at(round * scan.total_bytes + documents.read_bytes(), progress);
        }
        if *hasher.finalize().as_bytes() != scan.fingerprint {
            let path = &settings.sources[0].path;
            return Err(Error::source(
                path,
                "files changed while they were read; run again when they are still",
            ));
        }
    }
    ticks.end(progress);
    text.flush().map_err(Error::io("write", &text_path))?;
    let (train, validation) = (train.finish(settings.threads)?, validation.finish(settings.threads)?);
    if train.is_empty() {
        return Err(Error::setting("data", "some text to train on", "none after the split and the weights"));
    }
    let manifest = Manifest { version: CACHE_VERSION, stats: scan.stats, train, validation };
    let bytes = serde_json::to_vec_pretty(&manifest).expect("plain data serialises");
    write_atomic(&folder.join("manifest.json"), &bytes)
}

/// A side of the split on its way to shards.
struct Output<'a> {
    folder: &'a Path,
    name: &'static str,
    tokenizer: &'a Tokenizer,
    writer: Option<ShardWriter>,
    files: Vec<String>,
    waiting: Vec<Document>,
    waiting_bytes: usize,
}

impl<'a> Output<'a> {
    fn new(folder: &'a Path, name: &'static str, tokenizer: &'a Tokenizer) -> Self {
        let (files, waiting) = (Vec::new(), Vec::new());
        Self { folder, name, tokenizer, writer: None, files, waiting, waiting_bytes: 0 }
    }

    fn push(&mut self, document: Document, threads: usize) -> Result<()> {
        self.waiting_bytes += document.text.len();
        self.waiting.push(document);
        if self.waiting_bytes >= BATCH_BYTES { self.flush(threads) } else { Ok(()) }
    }

    fn flush(&mut self, threads: usize) -> Result<()> {
        let documents = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        // a prompt is encoded apart from what follows it, as it is when a model is asked: no token spans the border
        let parts: Vec<&str> = documents
            .iter()
            .flat_map(|document| {
                let (prompt, rest) = document.text.split_at(document.prompt_bytes);
                [(document.prompt_bytes > 0).then_some(prompt), Some(rest)]
            })
            .flatten()
            .collect();
        let mut encoded = self.tokenizer.encode_batch(&parts, threads)?.into_iter();
        let mut next = || encoded.next().expect("every part was encoded");
        for document in &documents {
            let mut ids = if document.prompt_bytes > 0 { next() } else { Vec::new() };
            let context = ids.len();
            ids.extend(next());
            let mut writer = if let Some(writer) = self.writer.take() {
                writer
            } else {
                let name = format!("{}-{:05}.shard", self.name, self.files.len());
                let writer = ShardWriter::create(self.folder.join(&name), self.tokenizer)?;
                self.files.push(name);
                writer
            };
            writer.push(&ids, context, (document.text.len() - document.prompt_bytes) as u64)?;
            if writer.tokens() >= SHARD_TOKENS {
                writer.finish()?;
            } else {
                self.writer = Some(writer);
            }
        }
        Ok(())
    }

    fn finish(mut self, threads: usize) -> Result<Vec<String>> {
        self.flush(threads)?;
        if let Some(writer) = self.writer.take() {
            writer.finish()?;
        }
        Ok(self.files)
    }
}

/// Opens a cache folder; None if there is none.
fn open_prepared(folder: &Path) -> Result<Option<Prepared>> {
    crate::hf::recover_folder(folder)?;
    let path = folder.join("manifest.json");
    if !path.exists() {
        return Ok(None);
    }
    let manifest: Manifest = serde_json::from_slice(&read_bounded(&path, 16 << 20)?)
        .map_err(|error| Error::shard(&path, error.to_string()))?;
    if manifest.version != CACHE_VERSION {
        return Ok(None);
    }
    let open = |names: &[String]| {
        if let Some(name) = names.iter().find(|name| name.contains(['/', '\\'])) {
            return Err(Error::shard(&path, format!("`{}` is no plain name", name.escape_debug())));
        }
        ShardSet::open(&names.iter().map(|name| folder.join(name)).collect::<Vec<_>>())
    };
    let tokenizer = Tokenizer::load(folder)?;
    let train = open(&manifest.train)?;
    let validation = if manifest.validation.is_empty() { None } else { Some(open(&manifest.validation)?) };
    for shards in [Some(&train), validation.as_ref()].into_iter().flatten() {
        if shards.tokenizer() != tokenizer.fingerprint() {
            return Err(Error::shard(&path, "the shards were made with another tokenizer"));
        }
    }
    let validation_text = validation.is_some().then(|| folder.join("validation.txt"));
    let folder = folder.to_owned();
    Ok(Some(Prepared {
        tokenizer,
        train,
        validation,
        validation_text,
        stats: manifest.stats,
        folder,
        reused: true,
    }))
}

/// Reports about every megabyte.
struct Ticks {
    stage: Stage,
    total_bytes: u64,
    last: Option<u64>,
}

impl Ticks {
    fn new(stage: Stage, total_bytes: u64) -> Self {
        Self { stage, total_bytes, last: None }
    }

    fn at(&mut self, done_bytes: u64, progress: &mut dyn FnMut(Progress)) {
        if self.last.is_none_or(|last| done_bytes >= last + (1 << 20)) {
            self.last = Some(done_bytes);
            progress(Progress { stage: self.stage, done_bytes, total_bytes: self.total_bytes });
        }
    }

    fn end(&mut self, progress: &mut dyn FnMut(Progress)) {
        progress(Progress { stage: self.stage, done_bytes: self.total_bytes, total_bytes: self.total_bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(root: &Path) {
        for i in 0..60 {
            for version in ["1.0.0", "1.2.0"] {
                let folder = root.join(format!("pkg{i}-{version}"));
                fs::create_dir_all(&folder).unwrap();
                let text = format!("Package {i} in version {version}.\n").repeat(20);
                fs::write(folder.join("lib.rs"), text).unwrap();
                fs::write(folder.join("LICENSE"), "the same everywhere").unwrap();
            }
        }
    }

    fn settings(root: &Path, cache: &Path) -> DataSettings {
        DataSettings {
            sources: vec![SourceSpec { path: root.display().to_string(), ..SourceSpec::default() }],
            validation_share: 0.1,
            split_by_group: true,
            tokenizer: TokenizerSpec::Train {
                options: TrainOptions { vocab_size: 320, digits: 1, threads: 1 },
                sample_bytes: 1 << 20,
            },
            cache: cache.to_owned(),
            threads: 2,
        }
    }

    fn text_of(shards: &ShardSet, tokenizer: &Tokenizer) -> Vec<String> {
        (0..shards.documents())
            .map(|number| {
                let span = shards.document(number);
                let mut ids = vec![0; (span.tokens.end - span.tokens.start) as usize];
                shards.read(span.tokens.start, &mut ids).unwrap();
                assert_eq!((ids[0], ids[ids.len() - 1]), (0, 1));
                let text = tokenizer.decode(&ids, true);
                assert_eq!(text.len() as u64, span.text_bytes);
                text
            })
            .collect()
    }

    #[test]
    fn sources_become_shards_once_and_no_package_leaks() {
        let (data, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        corpus(data.path());
        let settings = settings(data.path(), cache.path());
        let mut stages = Vec::new();
        let first = prepare(&settings, &mut |p| {
            assert!(p.done_bytes <= p.total_bytes);
            if stages.last() != Some(&p.stage) {
                stages.push(p.stage);
            }
        })
        .unwrap();
        assert_eq!(stages, [Stage::Scan, Stage::TrainTokenizer, Stage::Tokenize]);
        assert!(!first.reused);
        assert_eq!((first.stats.files, first.stats.documents, first.stats.duplicates), (240, 121, 119));
        let held_out = text_of(first.validation.as_ref().unwrap(), &first.tokenizer);
        let train = text_of(&first.train, &first.tokenizer);
        assert_eq!(train.len() + held_out.len(), 121);
        let package = |text: &String| text.split(' ').nth(1).unwrap_or_default().to_owned();
        let held_packages: Vec<String> =
            held_out.iter().filter(|t| t.starts_with("Package")).map(package).collect();
        assert!(!held_packages.is_empty());
        assert!(
            train.iter().filter(|t| t.starts_with("Package")).all(|t| !held_packages.contains(&package(t)))
        );
        assert_eq!(fs::read_to_string(first.validation_text.as_ref().unwrap()).unwrap(), held_out.concat());

        let second = prepare(&DataSettings { threads: 1, ..settings.clone() }, &mut |_| {}).unwrap();
        assert!(second.reused && second.folder == first.folder && second.stats == first.stats);
        // a damaged cache is made again, to the same bytes
        let shard = first.folder.join("train-00000.shard");
        let good = fs::read(&shard).unwrap();
        fs::write(&shard, &good[..good.len() / 2]).unwrap();
        assert!(!prepare(&settings, &mut |_| {}).unwrap().reused);
        assert_eq!(fs::read(&shard).unwrap(), good);
        // another setting or another text is another folder
        let other = DataSettings { validation_share: 0.2, ..settings.clone() };
        assert_ne!(prepare(&other, &mut |_| {}).unwrap().folder, first.folder);
        fs::write(data.path().join("pkg0-1.0.0/lib.rs"), "changed").unwrap();
        assert_ne!(prepare(&settings, &mut |_| {}).unwrap().folder, first.folder);
    }

    #[test]
    fn runs_that_start_at_once_prepare_their_data_once() {
        let (data, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        corpus(data.path());
        let settings = settings(data.path(), cache.path());
        // nobody goes on before all have scanned, so all find the cache empty
        let scanned = std::sync::Barrier::new(4);
        let reused: Vec<bool> = std::thread::scope(|scope| {
            let run = || {
                let mut waited = false;
                let mut progress = |p: Progress| {
                    if p.stage == Stage::Scan && p.done_bytes == p.total_bytes && !waited {
                        waited = true;
                        scanned.wait();
                    }
                };
                prepare(&settings, &mut progress).unwrap().reused
            };
            let runs: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        });
        assert_eq!(reused.iter().filter(|reused| !**reused).count(), 1, "{reused:?}");
    }

    #[test]
    fn a_prompt_is_context_to_the_token() {
        let (data, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = data.path().join("pairs.jsonl");
        let lines = |border: usize| {
            let lines = (10..60).map(|i| {
                let text = format!("what follows {i}: what follows {}", i + 1);
                let (prompt, completion) = text.split_at(border);
                serde_json::json!({ "prompt": prompt, "completion": completion }).to_string()
            });
            lines.collect::<Vec<_>>().join("\n")
        };
        // in the middle of a word that is a token
        let border = "what follows 10: wh".len();
        fs::write(&path, lines(border)).unwrap();
        let settings = settings(&path, cache.path());
        let prepared = prepare(&settings, &mut |_| {}).unwrap();
        let (shards, tokenizer) = (&prepared.train, &prepared.tokenizer);
        assert!(shards.documents() > 30 && shards.has_context());
        for span in (0..shards.documents()).map(|number| shards.document(number)) {
            let mut ids = vec![0; (span.tokens.end - span.tokens.start) as usize];
            shards.read(span.tokens.start, &mut ids).unwrap();
            let (context, rest) = ids.split_at(span.context as usize);
            let (prompt, rest) = (tokenizer.decode(&context[1..], true), tokenizer.decode(rest, true));
            assert_eq!((prompt.len(), rest.len() as u64), (border, span.text_bytes));
            assert_eq!(tokenizer.encode(&prompt).unwrap(), context[1..], "as when a model is asked");
        }
        // another border in the same texts is other data; none is the text itself
        fs::write(&path, lines(border - 2)).unwrap();
        assert_ne!(prepare(&settings, &mut |_| {}).unwrap().folder, prepared.folder);
        fs::write(&path, lines(0)).unwrap();
        assert!(!prepare(&settings, &mut |_| {}).unwrap().train.has_context());
    }

    #[test]
    fn weights_repeat_documents_but_not_side_by_side() {
        let (data, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        corpus(data.path());
        let mut settings = settings(data.path(), cache.path());
        settings.validation_share = 0.0;
        settings.sources[0].weight = 2.5;
        let prepared = prepare(&settings, &mut |_| {}).unwrap();
        assert!(prepared.validation.is_none() && prepared.validation_text.is_none());
        let texts = text_of(&prepared.train, &prepared.tokenizer);
        assert!((121 * 2 + 30..121 * 3 - 30).contains(&texts.len()), "{}", texts.len());
        assert!(texts.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn one_document_cannot_be_split() {
        let (data, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(data.path().join("a.txt"), "only this").unwrap();
        let error = prepare(&settings(data.path(), cache.path()), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("validation_share = 0"), "{error}");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    }
}
