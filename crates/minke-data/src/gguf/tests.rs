use std::fs;
use std::path::PathBuf;

use minke_num::blocks::BlockFormat;
use proptest::prelude::*;

use super::*;
use crate::Result;

fn plan(name: &str, kind: TensorType, shape: &[usize]) -> TensorPlan {
    TensorPlan { name: name.into(), kind, shape: shape.to_vec() }
}

fn metadata() -> Vec<(String, Value<'static>)> {
    let pairs: Vec<(&str, Value<'static>)> = vec![
        ("general.architecture", "llama".into()),
        ("a.u8", 200u8.into()),
        ("a.i8", (-3i8).into()),
        ("a.u16", 60_000u16.into()),
        ("a.i16", (-300i16).into()),
        ("a.u32", 4_000_000_000u32.into()),
        ("a.i32", (-70_000i32).into()),
        ("a.u64", (1u64 << 40).into()),
        ("a.i64", (-(1i64 << 40)).into()),
        ("a.f32", 0.5f32.into()),
        ("a.f64", 1e300f64.into()),
        ("a.true", true.into()),
        ("tokens", Value::strings(["a", "", "<|é|>"])),
        ("scores", Value::f32s(&[0.0, -1.5])),
        ("types", Value::i32s(&[1, 3, -1])),
        ("none", Value::i32s(&[])),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn tensors() -> Vec<(TensorPlan, Vec<u8>)> {
    let q4 = TensorType::Blocks(BlockFormat::Q4K);
    let plans = [
        plan("token_embd.weight", TensorType::F32, &[3, 2]),
        plan("blk.0.ffn_up_exps.weight", q4, &[2, 3, 256]),
        plan("blk.0.attn_norm.weight", TensorType::Bf16, &[5]),
        plan("half", TensorType::F16, &[1, 1, 1, 1]),
    ];
    let bytes = |plan: &TensorPlan| (0..plan.bytes().unwrap()).map(|i| (i * 7) as u8).collect();
    plans.into_iter().map(|plan| (plan.clone(), bytes(&plan))).collect()
}

struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(
        &self,
        name: &str,
        metadata: &[(String, Value<'_>)],
        tensors: &[(TensorPlan, Vec<u8>)],
    ) -> Vec<u8> {
        let plans = tensors.iter().map(|(plan, _)| plan.clone()).collect();
        let mut writer = GgufWriter::create(self.path(name), metadata, plans).unwrap();
        for (plan, bytes) in tensors {
            writer.tensor(&plan.name, bytes).unwrap();
        }
        writer.finish().unwrap();
        fs::read(self.path(name)).unwrap()
    }

    fn open(&self, bytes: &[u8]) -> Result<GgufFile> {
        fs::write(self.path("x.gguf"), bytes).unwrap();
        GgufFile::open(self.path("x.gguf"))
    }
}

#[test]
fn what_is_written_is_read() {
    let folder = Folder::new();
    let written = folder.write("a.gguf", &metadata(), &tensors());
    assert_eq!(written, folder.write("b.gguf", &metadata(), &tensors()), "the same bytes for the same model");
    let file = GgufFile::open(folder.path("a.gguf")).unwrap();
    assert_eq!((file.version(), file.len(), file.file_bytes()), (3, 4, written.len() as u64));
    for (key, value) in metadata() {
        assert_eq!(file.value(&key).unwrap(), value, "{key}");
    }
    assert_eq!(file.keys().count(), metadata().len());
    for (plan, bytes) in tensors() {
        let found = file.tensor(&plan.name).unwrap();
        assert_eq!((found.kind, found.shape, found.bytes), (plan.kind, &plan.shape[..], &bytes[..]));
        let (owner, range) = file.shared(&plan.name).unwrap();
        assert_eq!((*owner).as_ref()[range.clone()], bytes);
        assert!(range.start.is_multiple_of(DEFAULT_ALIGNMENT));
    }
    assert_eq!(file.uint("a.u64").unwrap(), Some(1 << 40));
    assert_eq!(file.float("a.i16").unwrap(), Some(-300.0));
    assert_eq!(file.float("a.f64").unwrap(), Some(1e300));
    assert_eq!(file.flag("a.true").unwrap(), Some(true));
    assert_eq!(file.text("general.architecture").unwrap().unwrap(), "llama");
    assert_eq!(file.strings("tokens").unwrap().unwrap(), ["a", "", "<|é|>"]);
    assert_eq!(file.ints("types").unwrap().unwrap(), [1, 3, -1]);
    assert_eq!(file.floats("scores").unwrap().unwrap(), [0.0, -1.5]);
    assert!(file.ints("none").unwrap().unwrap().is_empty());
    assert_eq!(file.uint("absent").unwrap(), None);
    for (error, why) in [
        (file.uint("a.i8").unwrap_err(), "key `a.i8`: expected a whole number that is not negative, got i8"),
        (file.text("tokens").unwrap_err(), "key `tokens`: expected a string, got 3 of string"),
        (file.strings("scores").unwrap_err(), "expected an array of strings, got 2 of f32"),
        (file.flag("a.u8").unwrap_err(), "expected true or false, got u8"),
        (file.ints("tokens").unwrap_err(), "expected an array of whole numbers"),
    ] {
        assert!(error.to_string().contains(why) && error.to_string().contains("a.gguf"), "{error}");
    }
}

/// The file of `scripts/gguf_vectors.py`, which the format's own package wrote.
#[test]
fn a_file_of_the_reference_is_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/reference.gguf");
    let file = GgufFile::open(path).unwrap();
    assert_eq!(file.text("general.architecture").unwrap().unwrap(), "test");
    assert_eq!(file.uint("test.u64").unwrap(), Some(1 << 40));
    assert_eq!(file.float("test.f32").unwrap(), Some(0.25));
    assert_eq!(file.float("test.i8").unwrap(), Some(-5.0));
    assert_eq!(file.flag("test.yes").unwrap(), Some(true));
    assert_eq!(file.strings("test.strings").unwrap().unwrap(), ["one", "zwei", "三"]);
    assert_eq!(file.ints("test.ints").unwrap().unwrap(), [1, -2, 3]);
    assert_eq!(file.floats("test.floats").unwrap().unwrap(), [0.5, -1.5]);
    assert_eq!(file.value("test.bools").unwrap().as_bools().unwrap(), [true, false]);
    let plain = file.tensor("plain").unwrap();
    assert_eq!((plain.kind, plain.shape), (TensorType::F32, &[2, 3][..]));
    let numbers: Vec<f32> =
        plain.bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
    assert_eq!(numbers, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    for format in BlockFormat::ALL {
        let name = format!("blocks.{}", format.name());
        let found = file.tensor(&name).unwrap();
        assert_eq!((found.kind, found.shape), (TensorType::Blocks(format), &[2, 512][..]), "{name}");
        let len = found.bytes.len();
        assert!(
            found.bytes.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8),
            "{name}, {len} bytes"
        );
    }
    assert_eq!(file.len(), 1 + BlockFormat::ALL.len());
}

#[test]
fn every_truncation_is_an_error_with_the_path() {
    let folder = Folder::new();
    let good = folder.write("a.gguf", &metadata(), &tensors());
    // the padding behind the last tensor is nobody's
    let padding = DEFAULT_ALIGNMENT - 2;
    assert!(folder.open(&good[..good.len() - padding]).is_ok());
    for cut in 0..good.len() - padding {
        let text = folder.open(&good[..cut]).unwrap_err().to_string();
        assert!(text.contains("x.gguf") && text.contains("expected"), "{cut}: {text}");
    }
}

/// A file by hand: what a writer would refuse.
struct Raw(Vec<u8>);

impl Raw {
    fn new(tensors: u64, keys: u64) -> Self {
        Self(b"GGUF\x03\0\0\0".to_vec()).u64(tensors).u64(keys)
    }
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn u32(self, x: u32) -> Self {
        self.bytes(&x.to_le_bytes())
    }
    fn u64(self, x: u64) -> Self {
        self.bytes(&x.to_le_bytes())
    }
    fn text(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }
    fn tensor(self, name: &str, axes: &[u64], kind: u32, offset: u64) -> Self {
        let head = self.text(name).u32(axes.len() as u32);
        axes.iter().fold(head, |raw, axis| raw.u64(*axis)).u32(kind).u64(offset)
    }
    fn data(mut self, bytes: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + bytes, 0);
        self
    }
}

#[test]
fn hostile_headers_are_refused_with_a_reason() {
    let one = || Raw::new(1, 0);
    let key = |name: &str| Raw::new(0, 1).text(name);
    let pad = |raw: Raw| raw.bytes(&[0; 64]);
    let cases: Vec<(Raw, &str)> = vec![
        (Raw(vec![]), "4 bytes of magic"),
        (Raw(b"GGUX\x03\0\0\0".to_vec()), "begins with GGUF"),
        (Raw(b"GGUF\0\0\0\x03".to_vec()), "little-endian"),
        (Raw(b"GGUF\x01\0\0\0".to_vec()), "version 1"),
        (Raw(b"GGUF\x04\0\0\0".to_vec()), "version 2 or 3, got 4"),
        (Raw(b"GGUF\0\0\0\0".to_vec()), "version 2 or 3, got 0"),
        (Raw::new(u64::MAX, 0), "at most 0 tensors"),
        (Raw::new(0, u64::MAX), "at most 0 keys"),
        (pad(Raw::new(1000, 0)), "at most 2 tensors"),
        (pad(key("").u32(4).u32(1)), "key 0: expected 1 to"),
        (Raw::new(0, 1).u64(1 << 60).bytes(&[0; 32]), "a key, got 32"),
        (pad(Raw::new(0, 1).u64(2).bytes(&[0xff, 0xfe])), "UTF-8"),
        (pad(key("k").u32(13)), "key `k`: expected a type from 0 to 12, got 13"),
        (pad(key("k").u32(9).u32(9).u64(1)), "array of arrays"),
        (pad(key("k").u32(9).u32(10).u64(u64::MAX)), "at most 8 elements"),
        (pad(key("k").u32(9).u32(8).u64(9)), "at most 8 elements"),
        (pad(key("k").u32(9).u32(8).u64(1).u64(1 << 40)), "a string, got"),
        (pad(key("k").u32(7).bytes(&[2])), "0 or 1, got 2"),
        (pad(key("k").u32(9).u32(7).u64(1).bytes(&[3])), "0 or 1, got 3"),
        (pad(Raw::new(0, 2).text("k").u32(4).u32(1).text("k").u32(4).u32(1)), "each key once"),
        (pad(key("general.alignment").u32(4).u32(3)), "a power of two up to 2^20, got 3"),
        (pad(key("general.alignment").u32(4).u32(0)), "a power of two"),
        (pad(key("general.alignment").u32(8).text("x")), "a power of two up to 2^20, got string"),
        (pad(one().text("").u32(0)), "a name of 1 to"),
        (pad(one().text(&"x".repeat(256)).u32(0)), "a name of 1 to 255 bytes, got 256"),
        (pad(one().text("w").u32(5)), "at most 4 axes, got 5"),
        (pad(one().text("w").u32(u32::MAX)), "at most 4 axes"),
        (one().tensor("w", &[0], 0, 0).data(32), "axes from 1"),
        (one().tensor("w", &[u64::MAX], 0, 0).data(32), "axes from 1"),
        (one().tensor("w", &[1 << 40, 1 << 40], 0, 0).data(32), "below 2^64"),
        (one().tensor("w", &[4], 99, 0).data(32), "got type 99"),
        (one().tensor("w", &[256], 16, 0).data(99), "got IQ2_XXS (type 16)"),
        (one().tensor("w", &[31], 8, 0).data(99), "rows of a multiple of 32 in Q8_0, got 31"),
        (one().tensor("w", &[4], 0, 1).data(32), "a multiple of 32, got 1"),
        (one().tensor("w", &[4], 0, 32).data(32), "16 bytes inside the 32 of data"),
        (one().tensor("w", &[4], 0, u64::MAX - 31).data(32), "inside"),
        (one().tensor("w", &[4], 0, 0).data(15), "16 bytes inside the 15"),
        (Raw::new(2, 0).tensor("w", &[4], 0, 0).tensor("w", &[4], 0, 32).data(64), "each name once"),
        (Raw::new(2, 0).tensor("a", &[9], 0, 0).tensor("b", &[4], 0, 32).data(64), "over each other"),
        (Raw::new(2, 0).tensor("a", &[4], 0, 0).tensor("b", &[4], 0, 0).data(64), "over each other"),
    ];
    let folder = Folder::new();
    for (raw, why) in cases {
        let text = folder.open(&raw.0).unwrap_err().to_string();
        assert!(text.contains(why), "expected `{why}` in: {text}");
    }
    let good = Raw::new(2, 0).tensor("a", &[8], 0, 32).tensor("b", &[4], 0, 0).data(64);
    assert_eq!(folder.open(&good.0).unwrap().len(), 2, "the order of tensors is free");
    let scalar = one().tensor("s", &[], 0, 0).data(4);
    assert_eq!(folder.open(&scalar.0).unwrap().tensor("s").unwrap().bytes.len(), 4);
    assert!(folder.open(&Raw::new(0, 0).0).unwrap().is_empty());
}

#[test]
fn a_write_that_fails_in_the_middle_leaves_the_old_file() {
    let folder = Folder::new();
    let old = folder.write("a.gguf", &metadata(), &tensors());
    let start = || {
        let plans = vec![plan("a", TensorType::F32, &[2]), plan("b", TensorType::F32, &[3])];
        GgufWriter::create(folder.path("a.gguf"), &metadata(), plans).unwrap()
    };
    let attempts: [&dyn Fn(GgufWriter) -> Result<()>; 7] = [
        &GgufWriter::finish,
        &|mut w| w.tensor("b", &[0; 12]),
        &|mut w| w.tensor("a", &[0; 7]),
        &|mut w| w.part(&[0; 9]),
        &|mut w| w.part(&[0; 8]).and_then(|()| w.part(&[0; 11])).and_then(|()| w.finish()),
        &|mut w| w.part(&[0; 4]).and_then(|()| w.tensor("a", &[0; 8])),
        &|mut w| w.tensor("a", &[0; 8]).and_then(|()| w.tensor("b", &[0; 12])).and_then(|()| w.part(&[0])),
    ];
    for (i, attempt) in attempts.iter().enumerate() {
        assert!(attempt(start()).is_err(), "attempt {i}");
        assert_eq!(fs::read(folder.path("a.gguf")).unwrap(), old);
        assert_eq!(fs::read_dir(folder.folder.path()).unwrap().count(), 1, "no litter");
    }
    let mut writer = start();
    for piece in [4, 4, 0, 5, 7] {
        writer.part(&vec![1; piece]).unwrap();
    }
    writer.finish().unwrap();
    let file = GgufFile::open(folder.path("a.gguf")).unwrap();
    assert_eq!(file.tensor("b").unwrap().bytes, [1; 12]);
    let create =
        |metadata: &[(String, Value<'_>)], plans| GgufWriter::create(folder.path("b.gguf"), metadata, plans);
    let long = "x".repeat(64);
    for bad in [
        vec![plan("a", TensorType::F32, &[1]), plan("a", TensorType::F32, &[1])],
        vec![plan(&long, TensorType::F32, &[1])],
        vec![plan("", TensorType::F32, &[1])],
        vec![plan("a", TensorType::F32, &[1; 5])],
        vec![plan("a", TensorType::F32, &[0])],
        vec![plan("a", TensorType::F32, &[usize::MAX, 2])],
        vec![plan("a", TensorType::Blocks(BlockFormat::Q6K), &[2, 255])],
    ] {
        assert!(create(&[], bad).is_err());
    }
    let twice = [("k".to_owned(), 1u32.into()), ("k".to_owned(), 2u32.into())];
    assert!(create(&twice, Vec::new()).is_err());
    assert!(create(&[("general.alignment".to_owned(), 64u32.into())], Vec::new()).is_err());
}

#[test]
fn parts_are_joined_and_checked() {
    let folder = Folder::new();
    let part = |name: &str, number: u16, count: u16, all: i32, tensor: &str| {
        let metadata: Vec<(String, Value<'_>)> = vec![
            ("split.no".to_owned(), number.into()),
            ("split.count".to_owned(), count.into()),
            ("split.tensors.count".to_owned(), all.into()),
        ];
        folder.write(name, &metadata, &[(plan(tensor, TensorType::F32, &[2]), vec![number as u8; 8])]);
    };
    let open = |name: &str| GgufFile::open(folder.path(name));
    let fails = |name: &str, why: &str| {
        let text = open(name).unwrap_err().to_string();
        assert!(text.contains(why), "expected `{why}` in: {text}");
    };
    let (first, second) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    part(first, 0, 2, 2, "a");
    fails(first, "m-00002-of-00002.gguf");
    part(second, 1, 2, 2, "b");
    let file = open(first).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(file.tensor("b").unwrap().bytes, [1; 8]);
    fails(second, "the first part, got part 2; give");
    part(second, 1, 2, 2, "a");
    fails(first, "each name once");
    part(second, 0, 2, 2, "b");
    fails(first, "1 of 2");
    part(second, 1, 2, 2, "b");
    part(first, 0, 2, 3, "a");
    fails(first, "3 tensors");
    part("odd.gguf", 0, 2, 2, "a");
    fails("odd.gguf", "NAME-00001-of-00002.gguf");
    part("odd.gguf", 0, 5000, 2, "a");
    fails("odd.gguf", "at most 1024 parts");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is changed, the reader gives an error or a file all of whose values and tensors can be looked at.
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        words in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(vec![0u64, 1, 31, 255, u64::MAX, 1 << 40, 1 << 63])), 0..2),
    ) {
        let folder = Folder::new();
        let mut bytes = folder.write("a.gguf", &metadata(), &tensors());
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for (at, word) in words {
            let at = at.index(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(file) = folder.open(&bytes) {
            for key in file.keys() {
                let value = file.value(key).unwrap();
                let _ = (value.as_u64(), value.as_f64(), value.as_bool(), value.as_str().map(str::len));
                let _ = (value.as_strings().map(Iterator::count), value.as_i64s(), value.as_f32s(), value.as_bools());
            }
            for name in file.names() {
                let tensor = file.tensor(name).unwrap();
                prop_assert_eq!(Some(tensor.bytes.len()), tensor.kind.bytes(tensor.shape));
            }
        }
    }
}
