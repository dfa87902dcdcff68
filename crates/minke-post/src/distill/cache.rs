//! What a teacher said of a set of samples, on the disk.
//!
//! ```text
//! FOLDER/KEY.teacher   magic | key | k | vocabulary | rows | [rows][k] (token u32, log-probability f32) | blake3
//! FOLDER/KEY.part      the same, growing: an interrupted one goes on after its last whole sample
//! ```
//!
//! Rows are those of the samples one after the other, so that a batch of any samples finds its own. What stands there
//! is what the teacher says when asked again, to the bit, since no row depends on what else is in a batch. The key is a
//! hash of the teacher, of how it is asked, and of the samples; the last hash is over all that comes before it. All
//! numbers are little-endian.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use minke_cpu::Cpu;
use minke_model::{Model, Teacher};

use super::logits::Telling;
use crate::error::{PostError, Result};
use crate::events::Event;
use crate::sft::data::Sample;
use crate::sft::pack::pack;

const MAGIC: &[u8; 16] = b"minke-teacher-1\n";
/// Magic, key, k, vocabulary, rows.
const HEADER_BYTES: u64 = 16 + 32 + 4 + 4 + 8;
const HASH_BYTES: u64 = 32;
/// A token and its log-probability.
const PAIR_BYTES: u64 = 8;
/// Rows of one pass of the teacher, at most, but for a single sample that is longer.
const ROWS_AT_ONCE: usize = 4096;

/// An entry of a cache, there or not.
pub struct Entry<'a> {
    folder: PathBuf,
    key: [u8; 32],
    telling: &'a Telling,
    samples: &'a [Sample],
    /// The first row of each sample, and the number of rows.
    starts: Vec<u64>,
}

/// A cache that is whole.
pub struct Cache {
    file: File,
    path: PathBuf,
    k: usize,
    vocabulary: u32,
    starts: Vec<u64>,
}

/// Loads the teacher, when it is needed after all.
pub type Load<'a> = &'a mut dyn FnMut(&mut dyn FnMut(Event<'_>)) -> Result<Model>;

/// How building ended.
pub enum Built {
    /// The cache is there.
    Whole(Cache),
    /// It was stopped; what is done will be taken up.
    Stopped,
}

/// Labelled rows of a sample.
fn rows(sample: &Sample) -> u64 {
    sample.mask.iter().skip(1).filter(|&&learned| learned).count() as u64
}

impl<'a> Entry<'a> {
    /// The entry of a teacher, how it is asked, and samples, in the cache's folder `place`.
    pub fn new(place: &str, teacher: &str, telling: &'a Telling, samples: &'a [Sample]) -> Result<Self> {
        let folder = minke_data::expand_path(place)
            .map_err(|reason| PostError::unsuitable("distill.cache", reason))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(MAGIC).update(teacher.as_bytes()).update(telling.key().as_bytes());
        let mut starts = vec![0];
        for sample in samples {
            hasher.update(&(sample.ids.len() as u64).to_le_bytes());
            for (id, learned) in sample.ids.iter().zip(&sample.mask) {
                hasher.update(&id.to_le_bytes()).update(&[u8::from(*learned)]);
            }
            starts.push(starts.last().expect("it begins with one") + rows(sample));
        }
        Ok(Self { folder, key: *hasher.finalize().as_bytes(), telling, samples, starts })
    }

    fn path(&self, extension: &str) -> PathBuf {
        let name: String = blake3::Hash::from_bytes(self.key).to_hex().chars().take(24).collect();
        self.folder.join(format!("{name}.{extension}"))
    }

    fn rows(&self) -> u64 {
        *self.starts.last().expect("it begins with one")
    }

    fn header(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.key);
        bytes.extend((self.telling.k as u32).to_le_bytes());
        bytes.extend((self.telling.vocabulary as u32).to_le_bytes());
        bytes.extend(self.rows().to_le_bytes());
        bytes
    }

    fn row_bytes(&self) -> u64 {
        self.telling.k as u64 * PAIR_BYTES
    }

    /// Opens the entry, or asks the teacher that `load` gives and writes it.
    ///
    /// # Errors
    /// An entry that was damaged, or one that another process is writing; what the system refuses.
    pub fn open_or_build(
        self,
        cpu: &Cpu,
        stop: &AtomicBool,
        on_event: &mut dyn FnMut(Event<'_>),
        load: Load<'_>,
    ) -> Result<Built> {
        let path = self.path("teacher");
        if !path.is_file() && !self.build(&path, cpu, stop, on_event, load)? {
            return Ok(Built::Stopped);
        }
        self.open(path).map(Built::Whole)
    }

    fn build(
        &self,
        whole: &Path,
        cpu: &Cpu,
        stop: &AtomicBool,
        on_event: &mut dyn FnMut(Event<'_>),
        load: Load<'_>,
    ) -> Result<bool> {
        fs::create_dir_all(&self.folder).map_err(PostError::io("create", &self.folder))?;
        let path = self.path("part");
        let io = |action| PostError::io(action, &path);
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).map_err(io("open"))?;
        if file.try_lock().is_err() {
            let reason = "another run is writing it; wait for that, or take another distill.cache";
            return Err(PostError::unsuitable(path.display().to_string(), reason));
        }
        let mut sample = self.resume(&mut file).map_err(io("read"))?;
        let mut model = load(on_event)?;
        while sample < self.samples.len() {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let first = sample;
            let mut held = 0;
            while sample < self.samples.len()
                && (held == 0 || held + self.samples[sample].ids.len() <= ROWS_AT_ONCE)
            {
                held += self.samples[sample].ids.len();
                sample += 1;
            }
            let teacher = self.telling.ask(cpu, &mut model, &pack(&self.samples[first..sample], 0));
            let mut bytes = Vec::with_capacity(teacher.ids.len() * PAIR_BYTES as usize);
            for (id, log_prob) in teacher.ids.iter().zip(&teacher.log_probs) {
                bytes.extend(id.to_le_bytes());
                bytes.extend(log_prob.to_le_bytes());
            }
            file.write_all(&bytes).map_err(io("write"))?;
            on_event(Event::Progress { what: "teacher", done: self.starts[sample], total: self.rows() });
        }
        let hash = hash(&mut file, self.body_bytes()).map_err(io("read"))?;
        file.write_all(&hash).map_err(io("write"))?;
        file.sync_all().map_err(io("write"))?;
        fs::rename(&path, whole).map_err(io("rename"))?;
        Ok(true)
    }

    /// Header and pairs.
    fn body_bytes(&self) -> u64 {
        HEADER_BYTES + self.rows() * self.row_bytes()
    }

    /// Where a part goes on: behind its last whole sample, whose number it gives.
    fn resume(&self, file: &mut File) -> std::io::Result<usize> {
        let header = self.header();
        let mut found = vec![0; header.len()];
        let length = file.metadata()?.len();
        if length < HEADER_BYTES || file.read_exact(&mut found).is_err() || found != header {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            return Ok(0);
        }
        let rows = (length - HEADER_BYTES) / self.row_bytes();
        let done = self.starts.partition_point(|&start| start <= rows) - 1;
        let end = HEADER_BYTES + self.starts[done] * self.row_bytes();
        file.set_len(end)?;
        file.seek(SeekFrom::Start(end))?;
        Ok(done)
    }

    fn open(self, path: PathBuf) -> Result<Cache> {
        let damaged =
            |reason: &str| PostError::unsuitable(path.display().to_string(), format!("{reason}; remove it"));
        let mut file = File::open(&path).map_err(PostError::io("open", &path))?;
        let length = file.metadata().map_err(PostError::io("read", &path))?.len();
        let expected = self.body_bytes() + HASH_BYTES;
        if length != expected {
            return Err(damaged(&format!("expected {expected} bytes, got {length}")));
        }
        let io = || PostError::io("read", &path);
        let mut header = vec![0; HEADER_BYTES as usize];
        file.read_exact(&mut header).map_err(io())?;
        if header != self.header() {
            return Err(damaged("its header is not that of this teacher and these samples"));
        }
        let hash = hash(&mut file, self.body_bytes()).map_err(io())?;
        let mut stored = [0; HASH_BYTES as usize];
        file.read_exact(&mut stored).map_err(io())?;
        if hash != stored {
            return Err(damaged("it was changed after it was written"));
        }
        let Telling { k, vocabulary, .. } = *self.telling;
        Ok(Cache { file, path, k, vocabulary: vocabulary as u32, starts: self.starts })
    }
}

/// blake3 of the first `length` bytes; the file then stands behind them.
fn hash(file: &mut File, length: u64) -> std::io::Result<[u8; 32]> {
    file.seek(SeekFrom::Start(0))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(Read::by_ref(file).take(length))?;
    file.seek(SeekFrom::Start(length))?;
    Ok(*hasher.finalize().as_bytes())
}

impl Cache {
    /// What the teacher said of samples, one after the other, by their numbers.
    ///
    /// # Errors
    /// The file cannot be read, or was changed since it was opened.
    pub fn tell(&mut self, samples: &[u32]) -> Result<Teacher> {
        let mut teacher = Teacher { k: self.k, ..Teacher::default() };
        for &sample in samples {
            let (first, end) = (self.starts[sample as usize], self.starts[sample as usize + 1]);
            let row_bytes = self.k as u64 * PAIR_BYTES;
            let mut bytes = vec![0; ((end - first) * row_bytes) as usize];
            let at = SeekFrom::Start(HEADER_BYTES + first * row_bytes);
            self.file.seek(at).map_err(PostError::io("read", &self.path))?;
            self.file.read_exact(&mut bytes).map_err(PostError::io("read", &self.path))?;
            for pair in bytes.chunks_exact(PAIR_BYTES as usize) {
                let id = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]);
                let log_prob = f32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]]);
                if id >= self.vocabulary || log_prob.is_nan() {
                    let reason = format!("it holds token {id} at {log_prob} nats; remove it");
                    return Err(PostError::unsuitable(self.path.display().to_string(), reason));
                }
                teacher.ids.push(id);
                teacher.log_probs.push(log_prob);
            }
        }
        Ok(teacher)
    }
}
