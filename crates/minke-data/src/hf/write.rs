//! Writing safetensors: one tensor after the other, the same bytes for the same weights.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::header::{Dtype, byte_count};
use crate::files::AtomicFile;
use crate::{Error, Result};

/// What a header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// What its elements are.
    pub dtype: Dtype,
    /// Its axes, outermost first.
    pub shape: Vec<usize>,
}

/// Writes a file whose tensors arrive in the announced order, whole or in parts; memory is that of what arrives at once.
///
/// Only [`SafetensorsWriter::finish`] makes the file appear under its name; dropped before, it leaves what was
/// there.
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    path: PathBuf,
    specs: std::vec::IntoIter<TensorSpec>,
    /// Bytes of the next tensor that were written.
    written: usize,
}

impl SafetensorsWriter {
    /// Starts a file for these tensors, in this order.
    ///
    /// # Errors
    /// I/O, a name that comes twice or is `__metadata__`, or a size beyond 2^63.
    pub fn create(path: impl AsRef<Path>, specs: Vec<TensorSpec>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mut header = Map::new();
        // transformers asks for it
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut start = 0usize;
        for spec in &specs {
            let end = byte_count(spec.dtype, &spec.shape)
                .and_then(|bytes| start.checked_add(bytes))
                .filter(|&end| end < 1 << 63)
                .ok_or_else(|| {
                    Error::weights(
                        &path,
                        Some(&spec.name),
                        "a size below 2^63",
                        format!("shape {:?}", spec.shape),
                    )
                })?;
            let entry =
                json!({"dtype": spec.dtype.name(), "shape": spec.shape, "data_offsets": [start, end]});
            if header.insert(spec.name.clone(), entry).is_some() {
                return Err(Error::weights(&path, Some(&spec.name), "each name once", "it twice"));
            }
            start = end;
        }
        let mut text = serde_json::to_vec(&Value::Object(header)).expect("JSON values serialise");
        // the data starts at a multiple of eight, as the reference writer has it
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut file = AtomicFile::create(&path)?;
        file.write(&(text.len() as u64).to_le_bytes())?;
        file.write(&text)?;
        Ok(Self { file, path, specs: specs.into_iter(), written: 0 })
    }

    /// The tensor that comes next, if one is missing.
    pub fn next_tensor(&self) -> Option<&TensorSpec> {
        self.specs.as_slice().first()
    }

    /// Writes the next bytes of the next tensor: little-endian, row-major. With its last ones the one behind it is next; one
    /// without bytes takes a part without any.
    ///
    /// # Errors
    /// I/O (a full disk, say), or more bytes than the tensor has left.
    pub fn part(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(spec) = self.next_tensor() else {
            return Err(Error::weights(&self.path, None, "no more tensors", "another"));
        };
        let size = byte_count(spec.dtype, &spec.shape).expect("sizes were checked at creation");
        let written = self.written.saturating_add(bytes.len());
        if written > size {
            let expected = format!("{size} bytes for {} {:?}", spec.dtype, spec.shape);
            return Err(Error::weights(&self.path, Some(&spec.name), expected, written.to_string()));
        }
        self.file.write(bytes)?;
        self.written = written;
        if written == size {
            self.specs.next();
            self.written = 0;
        }
        Ok(())
    }

    /// Writes the next tensor as a whole.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::part`], or another name or size than announced.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(spec) = self.next_tensor() else {
            return Err(Error::weights(&self.path, Some(name), "no more tensors", "another"));
        };
        if spec.name != name || self.written > 0 {
            return Err(Error::weights(&self.path, Some(name), format!("`{}` next", spec.name), "this"));
        }
        let size = byte_count(spec.dtype, &spec.shape).expect("sizes were checked at creation");
        if bytes.len() != size {
            let expected = format!("{size} bytes for {} {:?}", spec.dtype, spec.shape);
            return Err(Error::weights(&self.path, Some(name), expected, bytes.len().to_string()));
        }
        self.part(bytes)
    }

    /// Syncs and moves the file to its name.
    ///
    /// # Errors
    /// I/O, or a tensor that was announced and never came.
    pub fn finish(self) -> Result<()> {
        match self.next_tensor() {
            Some(missing) => Err(Error::weights(&self.path, Some(&missing.name), "its bytes", "none")),
            None => self.file.commit(),
        }
    }
}

/// Writes tensors that are in memory.
///
/// # Errors
/// As [`SafetensorsWriter`].
pub fn write_safetensors(path: impl AsRef<Path>, tensors: &[(TensorSpec, &[u8])]) -> Result<()> {
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, specs)?;
    for (spec, bytes) in tensors {
        writer.tensor(&spec.name, bytes)?;
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf::WeightFiles;
    use proptest::prelude::*;
    use std::fs;

    fn spec(name: &str, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype: Dtype::U8, shape: shape.to_vec() }
    }

    #[test]
    fn a_write_that_fails_in_the_middle_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write_safetensors(&path, &[(spec("a", &[2]), &[1, 2])]).unwrap();
        let old = fs::read(&path).unwrap();
        let specs = || vec![spec("a", &[2]), spec("b", &[1_000_000])];
        let attempts: [&dyn Fn(SafetensorsWriter) -> Result<()>; 8] = [
            &|mut w| w.tensor("a", &[1, 2]).and_then(|()| w.finish()),
            &|mut w| w.tensor("b", &[0; 2]),
            &|mut w| w.tensor("a", &[1, 2, 3]),
            &|mut w| w.tensor("a", &[1, 2]).and_then(|()| w.tensor("b", &vec![0; 999_999])),
            &SafetensorsWriter::finish,
            &|mut w| w.part(&[1, 2, 3]),
            &|mut w| w.part(&[1]).and_then(|()| w.tensor("a", &[1, 2])),
            &|mut w| {
                w.tensor("a", &[1, 2]).and_then(|()| w.part(&vec![0; 999_999])).and_then(|()| w.finish())
            },
        ];
        for attempt in attempts {
            let writer = SafetensorsWriter::create(&path, specs()).unwrap();
            assert!(attempt(writer).is_err());
            assert_eq!(fs::read(&path).unwrap(), old);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no litter");
        }
        for bad in [
            vec![spec("a", &[1]), spec("a", &[1])],
            vec![spec("__metadata__", &[1])],
            vec![spec("a", &[usize::MAX, 2])],
        ] {
            assert!(SafetensorsWriter::create(&path, bad).is_err());
        }
        assert!(SafetensorsWriter::create(folder.path().join("no/model.safetensors"), specs()).is_err());
    }

    #[test]
    fn parts_make_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
        let specs = [spec("a", &[5]), spec("none", &[0, 3]), spec("b", &[2])];
        let of = |i: usize, bytes: &'static [u8]| (specs[i].clone(), bytes);
        write_safetensors(&whole, &[of(0, &[1, 2, 3, 4, 5]), of(1, &[]), of(2, &[6, 7])]).unwrap();
        let mut writer = SafetensorsWriter::create(&parts, specs.to_vec()).unwrap();
        for part in [&[1, 2][..], &[], &[3, 4, 5], &[], &[6], &[7]] {
            writer.part(part).unwrap();
        }
        assert!(writer.part(&[]).is_err());
        writer.finish().unwrap();
        assert_eq!(fs::read(parts).unwrap(), fs::read(whole).unwrap());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn the_library_reads_what_we_write(
            tensors in prop::collection::btree_map("[a-z\"\\\\é.0-9]{1,8}", (0usize..16, prop::collection::vec(0usize..4, 0..4)), 0..6)
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.safetensors");
            let dtypes = [
                Dtype::Bool, Dtype::U8, Dtype::I8, Dtype::U16, Dtype::I16, Dtype::U32, Dtype::I32, Dtype::U64,
                Dtype::I64, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::F8E8M0, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64,
            ];
            let tensors: Vec<(TensorSpec, Vec<u8>)> = tensors
                .into_iter()
                .map(|(name, (dtype, shape))| {
                    let spec = TensorSpec { name, dtype: dtypes[dtype], shape };
                    let bytes = byte_count(spec.dtype, &spec.shape).unwrap();
                    let data = (0..bytes).map(|i| (i * 7) as u8).collect();
                    (spec, data)
                })
                .collect();
            let borrowed: Vec<(TensorSpec, &[u8])> = tensors.iter().map(|(s, b)| (s.clone(), b.as_slice())).collect();
            write_safetensors(&path, &borrowed).unwrap();
            let bytes = fs::read(&path).unwrap();
            write_safetensors(&path, &borrowed).unwrap();
            prop_assert_eq!(&fs::read(&path).unwrap(), &bytes);
            let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let ours = WeightFiles::open(folder.path()).unwrap();
            prop_assert_eq!(ours.len(), tensors.len());
            for (spec, data) in &tensors {
                let (theirs, ours) = (theirs.tensor(&spec.name).unwrap(), ours.get(&spec.name).unwrap());
                prop_assert_eq!(theirs.data(), data.as_slice());
                prop_assert_eq!(theirs.shape(), spec.shape.as_slice());
                prop_assert_eq!(theirs.dtype().to_string(), spec.dtype.to_string());
                prop_assert_eq!((ours.bytes, ours.shape, ours.dtype), (data.as_slice(), spec.shape.as_slice(), spec.dtype));
            }
        }
    }
}
