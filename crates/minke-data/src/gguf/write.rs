//! Writing GGUF: metadata, then one tensor after the other, each in as many parts as its maker likes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::value::{ARRAY, Value, push_string};
use super::{DEFAULT_ALIGNMENT, MAX_AXES, MAX_NAME_BYTES, TensorType};
use crate::files::AtomicFile;
use crate::{Error, Result};

/// What a header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// Its name.
    pub name: String,
    /// What its elements are.
    pub kind: TensorType,
    /// Its axes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorPlan {
    /// Its bytes; `None` where blocks do not fill a row, or past 2^64.
    pub fn bytes(&self) -> Option<usize> {
        self.kind.bytes(&self.shape)
    }
}

/// Writes a file whose tensors arrive in the announced order, each in one or more parts; memory is that of a part.
///
/// Only [`GgufWriter::finish`] makes the file appear under its name; dropped before, it leaves what was there.
#[derive(Debug)]
pub struct GgufWriter {
    file: AtomicFile,
    path: PathBuf,
    plans: Vec<TensorPlan>,
    /// The tensor that comes next or is being written, and how much of it has come.
    current: usize,
    written: usize,
}

impl GgufWriter {
    /// Starts a file of version 3 with these keys and, later, these tensors, in this order.
    ///
    /// # Errors
    /// I/O, a key or name that comes twice or is too long, more than four axes, or rows that blocks do not fill.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: &[(String, Value<'_>)],
        plans: Vec<TensorPlan>,
    ) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mut head = b"GGUF".to_vec();
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(plans.len() as u64).to_le_bytes());
        head.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
        let mut seen = HashSet::new();
        for (key, value) in metadata {
            if key.is_empty() || key.len() > 65_535 || !seen.insert(key.as_str()) {
                return Err(Error::gguf(
                    &path,
                    format!("key `{key}`"),
                    "each key once, of 1 to 65535 bytes",
                    "another",
                ));
            }
            if key == "general.alignment" && value.as_u64() != Some(DEFAULT_ALIGNMENT as u64) {
                return Err(Error::gguf(
                    &path,
                    format!("key `{key}`"),
                    DEFAULT_ALIGNMENT.to_string(),
                    value.type_name(),
                ));
            }
            push_string(&mut head, key);
            if let Some(count) = value.count {
                head.extend_from_slice(&ARRAY.to_le_bytes());
                head.extend_from_slice(&(value.kind as u32).to_le_bytes());
                head.extend_from_slice(&(count as u64).to_le_bytes());
            } else {
                head.extend_from_slice(&(value.kind as u32).to_le_bytes());
            }
            head.extend_from_slice(&value.bytes);
        }
        let (mut offset, mut seen) = (0usize, HashSet::new());
        for plan in &plans {
            let fail = |expected: String, got: String| {
                Error::gguf(&path, format!("tensor `{}`", plan.name.escape_debug()), expected, got)
            };
            if plan.name.is_empty() || plan.name.len() > MAX_NAME_BYTES {
                return Err(fail(
                    format!("a name of 1 to {MAX_NAME_BYTES} bytes"),
                    plan.name.len().to_string(),
                ));
            }
            if !seen.insert(plan.name.as_str()) {
                return Err(fail("each name once".to_owned(), "it twice".to_owned()));
            }
            if plan.shape.len() > MAX_AXES || plan.shape.contains(&0) {
                return Err(fail(
                    format!("at most {MAX_AXES} axes, none of them 0"),
                    format!("{:?}", plan.shape),
                ));
            }
            let bytes =
                plan.bytes().filter(|bytes| offset.checked_add(*bytes).is_some_and(|end| end < 1 << 62));
            let Some(bytes) = bytes else {
                let expected = format!("rows that blocks of {} fill, below 2^62 bytes", plan.kind);
                return Err(fail(expected, format!("shape {:?}", plan.shape)));
            };
            push_string(&mut head, &plan.name);
            head.extend_from_slice(&(plan.shape.len() as u32).to_le_bytes());
            for axis in plan.shape.iter().rev() {
                head.extend_from_slice(&(*axis as u64).to_le_bytes());
            }
            head.extend_from_slice(&plan.kind.number().to_le_bytes());
            head.extend_from_slice(&(offset as u64).to_le_bytes());
            offset = (offset + bytes).next_multiple_of(DEFAULT_ALIGNMENT);
        }
        head.resize(head.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
        let mut file = AtomicFile::create(&path)?;
        file.write(&head)?;
        Ok(Self { file, path, plans, current: 0, written: 0 })
    }

    /// The tensor whose bytes come next, if one is missing.
    pub fn next_tensor(&self) -> Option<&TensorPlan> {
        self.plans.get(self.current)
    }

    /// Writes the next bytes of the tensor that is due; with its last ones the next tensor is due.
    ///
    /// # Errors
    /// I/O (a full disk, say), or more bytes than the tensor has left.
    pub fn part(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(plan) = self.plans.get(self.current) else {
            return Err(Error::gguf(&self.path, "end", "no more tensors", "another"));
        };
        let size = plan.bytes().expect("sizes were checked at creation");
        let left = size - self.written;
        if bytes.len() > left {
            let place = format!("tensor `{}`", plan.name.escape_debug());
            return Err(Error::gguf(
                &self.path,
                place,
                format!("{size} bytes"),
                format!("{}", self.written + bytes.len()),
            ));
        }
        self.file.write(bytes)?;
        self.written += bytes.len();
        if self.written == size {
            let padding = size.next_multiple_of(DEFAULT_ALIGNMENT) - size;
            self.file.write(&[0; DEFAULT_ALIGNMENT][..padding])?;
            (self.current, self.written) = (self.current + 1, 0);
        }
        Ok(())
    }

    /// Writes a whole tensor.
    ///
    /// # Errors
    /// As [`GgufWriter::part`], or another name or size than announced.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let place = format!("tensor `{}`", name.escape_debug());
        match self.next_tensor() {
            Some(plan) if plan.name == name && self.written == 0 => {
                let size = plan.bytes().expect("sizes were checked at creation");
                if size != bytes.len() {
                    return Err(Error::gguf(
                        &self.path,
                        place,
                        format!("{size} bytes"),
                        bytes.len().to_string(),
                    ));
                }
                self.part(bytes)
            }
            Some(plan) => {
                let expected = format!("bytes of `{}`", plan.name.escape_debug());
                Err(Error::gguf(&self.path, place, expected, "this"))
            }
            None => Err(Error::gguf(&self.path, place, "no more tensors", "another")),
        }
    }

    /// Syncs and moves the file to its name.
    ///
    /// # Errors
    /// I/O, or a tensor that was announced and never came whole.
    pub fn finish(self) -> Result<()> {
        match self.next_tensor() {
            Some(missing) => {
                let size = missing.bytes().expect("sizes were checked at creation");
                let place = format!("tensor `{}`", missing.name.escape_debug());
                Err(Error::gguf(&self.path, place, format!("{size} bytes"), self.written.to_string()))
            }
            None => self.file.commit(),
        }
    }
}
