//! A GGUF file, mapped: metadata by key, tensors by name.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::TensorType;
use super::header::{self, Entry, Item};
use super::value::Value;
use crate::map::MappedFile;
use crate::{Error, Result};

/// More parts than anybody cuts a model into.
const MAX_PARTS: u64 = 1024;

/// Whether a path means a GGUF file, by its name.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// A tensor as it lies in its file.
#[derive(Debug, Clone, Copy)]
pub struct GgufTensor<'a> {
    /// What its elements are.
    pub kind: TensorType,
    /// Its axes, outermost first.
    pub shape: &'a [usize],
    /// Its elements, little-endian, row-major, at any alignment.
    pub bytes: &'a [u8],
}

/// A model in a GGUF file, or in the parts of one, mapped and validated.
#[derive(Debug)]
pub struct GgufFile {
    parts: Vec<(PathBuf, Arc<MappedFile>)>,
    version: u32,
    metadata: BTreeMap<String, Item>,
    tensors: BTreeMap<String, (usize, Entry)>,
}

impl GgufFile {
    /// Maps and validates a file; of a model in parts (`NAME-00001-of-0000N.gguf`), given the first, all of them.
    ///
    /// # Errors
    /// I/O, a header that breaks the format, or parts that are missing or do not belong together.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut file =
            Self { parts: Vec::new(), version: 0, metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        let (version, metadata) = file.add(path)?;
        (file.version, file.metadata) = (version, metadata.into_iter().collect());
        let count = file.uint("split.count")?.unwrap_or(1);
        if count <= 1 {
            return Ok(file);
        }
        if count > MAX_PARTS {
            return Err(file.wrong(
                "key `split.count`",
                format!("at most {MAX_PARTS} parts"),
                count.to_string(),
            ));
        }
        let number = file.uint("split.no")?.unwrap_or(0);
        let place = "key `split.no`";
        let Some(name) = part_names(path, number, count) else {
            let expected = format!(
                "a file named as part {} of {count}: NAME-{:05}-of-{count:05}.gguf",
                number + 1,
                number + 1
            );
            return Err(file.wrong(place, expected, path.display().to_string()));
        };
        if number != 0 {
            let got = format!("part {}; give {}", number + 1, name(1).display());
            return Err(file.wrong(place, "the first part", got));
        }
        for part in 2..=count {
            let path = name(part);
            let (_, metadata) = file.add(&path)?;
            let map = &file.parts.last().expect("a part was added").1;
            let find = |key: &str| {
                metadata.iter().find(|(found, _)| found == key).and_then(|(_, item)| item.of(map).as_u64())
            };
            if (find("split.no"), find("split.count")) != (Some(part - 1), Some(count)) {
                let got = format!("{:?} of {:?}", find("split.no"), find("split.count"));
                return Err(Error::gguf(&path, place, format!("{} of {count}", part - 1), got));
            }
        }
        if let Some(tensors) = file.uint("split.tensors.count")?
            && tensors != file.tensors.len() as u64
        {
            let got = format!("{} in all parts", file.tensors.len());
            return Err(file.wrong("key `split.tensors.count`", format!("{tensors} tensors"), got));
        }
        Ok(file)
    }

    /// Maps one file and takes its tensors; gives its version and metadata.
    fn add(&mut self, path: &Path) -> Result<(u32, Vec<(String, Item)>)> {
        let map = MappedFile::open(path)?;
        let header = header::parse(&map)
            .map_err(|broken| Error::gguf(path, broken.place, broken.expected, broken.got))?;
        let part = self.parts.len();
        for entry in header.tensors {
            let name = entry.name.clone();
            if self.tensors.insert(name.clone(), (part, entry)).is_some() {
                let place = format!("tensor `{}`", name.escape_debug());
                return Err(Error::gguf(path, place, "each name once in all parts", "it twice"));
            }
        }
        self.parts.push((path.to_owned(), Arc::new(map)));
        Ok((header.version, header.metadata))
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.parts[0].0
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|(_, map)| map.len() as u64).sum()
    }

    /// The keys of the metadata, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<Value<'_>> {
        self.metadata.get(key).map(|item| item.of(&self.parts[0].1))
    }

    /// An error about this file.
    pub fn wrong(
        &self,
        place: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Error {
        Error::gguf(self.path(), place, expected, got)
    }

    fn typed<'s, T>(
        &'s self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value<'s>) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| self.wrong(format!("key `{key}`"), expected, value.type_name()))
    }

    /// A whole number that is not negative.
    ///
    /// # Errors
    /// The key has a value of another type.
    pub fn uint(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number that is not negative", Value::as_u64)
    }

    /// A number.
    ///
    /// # Errors
    /// The key has a value of another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// True or false.
    ///
    /// # Errors
    /// The key has a value of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    /// The key has a value of another type.
    pub fn text(&self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// An array of strings.
    ///
    /// # Errors
    /// The key has a value of another type.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let read = |value: &Value<'_>| value.as_strings().map(|items| items.map(str::to_owned).collect());
        self.typed(key, "an array of strings", read)
    }

    /// An array of whole numbers.
    ///
    /// # Errors
    /// The key has a value of another type.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, "an array of whole numbers", Value::as_i64s)
    }

    /// An array of numbers.
    ///
    /// # Errors
    /// The key has a value of another type.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "an array of numbers", Value::as_f32s)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        let (part, entry) = self.tensors.get(name)?;
        let bytes = &self.parts[*part].1[entry.range.clone()];
        Some(GgufTensor { kind: entry.kind, shape: &entry.shape, bytes })
    }

    /// Where a tensor's bytes are, for whoever keeps the map alive beyond this struct.
    pub fn shared(&self, name: &str) -> Option<(Arc<MappedFile>, Range<usize>)> {
        let (part, entry) = self.tensors.get(name)?;
        Some((self.parts[*part].1.clone(), entry.range.clone()))
    }

    /// A part of a tensor's bytes has been read: its pages need not stay in memory. It can be read again.
    pub fn forget(&self, name: &str, bytes: Range<usize>) {
        if let Some((part, entry)) = self.tensors.get(name) {
            let (start, end) = (entry.range.start + bytes.start, entry.range.start + bytes.end);
            self.parts[*part].1.forget(start.min(entry.range.end)..end.min(entry.range.end));
        }
    }
}

/// The names of all parts, if `path` is named as one: what gives the path of a part, counted from 1.
fn part_names(path: &Path, number: u64, count: u64) -> Option<impl Fn(u64) -> PathBuf> {
    let suffix = move |part: u64| format!("-{part:05}-of-{count:05}.gguf");
    let name = path.file_name()?.to_str()?.to_owned();
    let stem = name.strip_suffix(&suffix(number + 1))?.to_owned();
    let folder = path.to_owned();
    Some(move |part: u64| folder.with_file_name(format!("{stem}{}", suffix(part))))
}
