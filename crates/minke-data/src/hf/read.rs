//! Reading the weights of a folder.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minke_num::{bf16, f16};

use super::header::{self, Dtype, Entry, MAX_HEADER_BYTES, Pairs};
use crate::files::read_bounded;
use crate::map::MappedFile;
use crate::{Error, Result};

/// A tensor as it lies in its file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// What its elements are.
    pub dtype: Dtype,
    /// Its axes, outermost first.
    pub shape: &'a [usize],
    /// Its elements, little-endian, row-major; not aligned.
    pub bytes: &'a [u8],
}

/// The weights of a model folder, mapped and validated.
#[derive(Debug)]
pub struct WeightFiles {
    files: Vec<(PathBuf, Arc<MappedFile>)>,
    tensors: BTreeMap<String, (usize, Entry)>,
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: Pairs<String>,
}

impl WeightFiles {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Neither is there, the index names a file outside the folder or a tensor that its file lacks, or a header
    /// is broken.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let (single, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        if single.is_file() {
            return Self::open_file(single);
        }
        if !index.is_file() {
            let reason = "has neither model.safetensors nor model.safetensors.index.json";
            return Err(Error::model(folder.display().to_string(), reason));
        }
        let bytes = read_bounded(&index, MAX_HEADER_BYTES)?;
        let parsed: Index = serde_json::from_slice(&bytes).map_err(|error| {
            Error::weights(&index, None, "a JSON index with `weight_map`", error.to_string())
        })?;
        let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, file) in parsed.weight_map.0 {
            if !is_plain_name(&file) {
                let expected = "a file of the same folder that ends in .safetensors";
                return Err(Error::weights(&index, Some(&tensor), expected, file.escape_debug().to_string()));
            }
            by_file.entry(file).or_default().push(tensor);
        }
        let mut weights = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for (file, wanted) in by_file {
            let path = folder.join(file);
            let mut entries = weights.map_file(&path)?;
            for tensor in wanted {
                let Some(entry) = entries.remove(&tensor) else {
                    return Err(Error::weights(
                        &path,
                        Some(&tensor),
                        "it here, by the index",
                        "no such tensor",
                    ));
                };
                if weights.tensors.insert(tensor.clone(), (weights.files.len() - 1, entry)).is_some() {
                    return Err(Error::weights(&index, Some(&tensor), "each name once", "it twice"));
                }
            }
        }
        Ok(weights)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// I/O, or a broken header.
    pub fn open_file(path: impl AsRef<Path>) -> Result<Self> {
        let mut weights = Self { files: Vec::new(), tensors: BTreeMap::new() };
        let entries = weights.map_file(path.as_ref())?;
        weights.tensors = entries.into_iter().map(|(name, entry)| (name, (0, entry))).collect();
        Ok(weights)
    }

    fn map_file(&mut self, path: &Path) -> Result<BTreeMap<String, Entry>> {
        let map = MappedFile::open(path)?;
        let entries = header::parse(&map).map_err(|broken| Error::Weights {
            path: path.to_owned(),
            tensor: broken.tensor,
            expected: broken.expected,
            got: broken.got,
        })?;
        self.files.push((path.to_owned(), Arc::new(map)));
        Ok(entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect())
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
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (file, entry) = self.tensors.get(name)?;
        let bytes = &self.files[*file].1[entry.start..entry.end];
        Some(TensorView { dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// Where a tensor's bytes are, for whoever keeps the map alive beyond this struct.
    pub fn shared(&self, name: &str) -> Option<(Arc<MappedFile>, Range<usize>)> {
        let (file, entry) = self.tensors.get(name)?;
        Some((self.files[*file].1.clone(), entry.start..entry.end))
    }

    /// A tensor has been read: its pages need not stay in memory. It can be read again.
    pub fn forget(&self, name: &str) {
        if let Some((file, entry)) = self.tensors.get(name) {
            self.files[*file].1.forget(entry.start..entry.end);
        }
    }

    /// The file that holds a tensor, for messages.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|(file, _)| self.files[*file].0.as_path())
    }

    /// The file that holds a tensor, or else the first.
    pub(super) fn place(&self, name: &str) -> &Path {
        let first = || self.files.first().map_or(Path::new("(no file)"), |(path, _)| path.as_path());
        self.file_of(name).unwrap_or_else(first)
    }

    /// A tensor's elements as f32; exact for f32, f16 and bf16, and `code * scale` for E4M3 with its scales.
    ///
    /// # Errors
    /// A tensor that is not there or of another dtype, or as [`WeightFiles::quantized_view`].
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let Some(view) = self.get(name) else {
            return Err(Error::weights(self.place(name), Some(name), "this tensor", "no such tensor"));
        };
        let pairs = || view.bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        match view.dtype {
            Dtype::F32 => {
                let fours = view.bytes.chunks_exact(4);
                Ok(fours.map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect())
            }
            Dtype::BF16 => Ok(pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect()),
            Dtype::F16 => Ok(pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect()),
            Dtype::F8E4M3 => {
                let mut out = vec![0.0; view.bytes.len()];
                self.quantized_view(name)?.dequantize(&mut out);
                Ok(out)
            }
            Dtype::Bool
            | Dtype::U8
            | Dtype::I8
            | Dtype::U16
            | Dtype::I16
            | Dtype::U32
            | Dtype::I32
            | Dtype::U64
            | Dtype::I64
            | Dtype::F8E5M2
            | Dtype::F8E8M0
            | Dtype::F64 => {
                Err(Error::weights(self.place(name), Some(name), "F32, F16 or BF16", view.dtype.name()))
            }
        }
    }
}

/// Whether an index may name this file: something in the same folder.
fn is_plain_name(file: &str) -> bool {
    file.ends_with(".safetensors") && !file.starts_with('.') && !file.contains(['/', '\\', '\0', ':'])
}

#[cfg(test)]
mod tests {
    use super::super::{TensorSpec, write_safetensors};
    use super::*;
    use std::fs;

    fn save(folder: &Path, file: &str, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
        let specs: Vec<(TensorSpec, &[u8])> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                (TensorSpec { name: (*name).into(), dtype: *dtype, shape: shape.to_vec() }, bytes.as_slice())
            })
            .collect();
        write_safetensors(folder.join(file), &specs).unwrap();
    }

    #[test]
    fn floats_of_three_kinds_are_read_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let values = [0.0f32, -1.5, 0.15625, 448.0, f32::NEG_INFINITY, 6.1035156e-5];
        let bytes = |f: &dyn Fn(f32) -> Vec<u8>| values.iter().flat_map(|&v| f(v)).collect::<Vec<u8>>();
        save(
            folder.path(),
            "model.safetensors",
            &[
                ("half", Dtype::F16, &[2, 3], bytes(&|v| f16::from_f32(v).to_le_bytes().to_vec())),
                ("odd", Dtype::U8, &[1], vec![3]),
                ("brain", Dtype::BF16, &[6], bytes(&|v| bf16::from_f32(v).to_le_bytes().to_vec())),
                ("single", Dtype::F32, &[3, 2], bytes(&|v| v.to_le_bytes().to_vec())),
            ],
        );
        let weights = WeightFiles::open(folder.path()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["brain", "half", "odd", "single"]);
        for name in ["brain", "half", "single"] {
            assert_eq!(weights.read_f32(name).unwrap(), values, "{name}");
        }
        assert_eq!(weights.get("half").unwrap().shape, [2, 3]);
        let text = weights.read_f32("odd").unwrap_err().to_string();
        assert!(
            text.contains("model.safetensors, tensor `odd`: expected F32, F16 or BF16, got U8"),
            "{text}"
        );
        assert!(weights.read_f32("gone").unwrap_err().to_string().contains("no such tensor"));
        assert!(weights.get("gone").is_none());
    }

    #[test]
    fn an_index_joins_files_and_cannot_leave_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert!(WeightFiles::open(root).unwrap_err().to_string().contains("neither model.safetensors"));
        save(
            root,
            "model-1.safetensors",
            &[("a", Dtype::U8, &[2], vec![1, 2]), ("extra", Dtype::U8, &[1], vec![9])],
        );
        save(root, "model-2.safetensors", &[("b", Dtype::U8, &[1], vec![3])]);
        let index = |text: &str| {
            fs::write(root.join("model.safetensors.index.json"), text).unwrap();
            WeightFiles::open(root)
        };
        let good = "{\"metadata\":{\"total_size\":3},\"weight_map\":{\"a\":\"model-1.safetensors\",\"b\":\"model-2.safetensors\"}}";
        let weights = index(good).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(weights.get("b").unwrap().bytes, [3]);
        assert!(weights.file_of("a").unwrap().ends_with("model-1.safetensors"));
        for file in [
            "../model-1.safetensors",
            "/etc/passwd",
            "x/model-1.safetensors",
            "model-1.bin",
            "..",
            ".safetensors",
            "C:\\m.safetensors",
        ] {
            let text = serde_json::json!({"weight_map": {"a": file}}).to_string();
            let error = index(&text).unwrap_err().to_string();
            assert!(error.contains("a file of the same folder"), "{file}: {error}");
        }
        for (text, why) in [
            ("{}", "weight_map"),
            ("{\"weight_map\": []}", "weight_map"),
            ("{\"weight_map\":{\"c\":\"model-1.safetensors\"}}", "tensor `c`"),
            ("{\"weight_map\":{\"a\":\"model-3.safetensors\"}}", "model-3.safetensors"),
            ("{\"weight_map\":{\"a\":\"model-1.safetensors\",\"a\":\"model-1.safetensors\"}}", "tensor `a`"),
        ] {
            let error = index(text).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn every_truncation_is_an_error_with_the_path() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), "model.safetensors", &[("a", Dtype::F32, &[4], vec![1; 16])]);
        let path = folder.path().join("model.safetensors");
        let good = fs::read(&path).unwrap();
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            let text = WeightFiles::open(folder.path()).unwrap_err().to_string();
            assert!(text.contains("model.safetensors") && text.contains("expected"), "{cut}: {text}");
        }
    }
}
