//! The header of a safetensors file, parsed into a form that the rest may trust.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

/// The format's own cap on a header.
pub(super) const MAX_HEADER_BYTES: u64 = 100 << 20;
/// More axes than any model has.
const MAX_AXES: usize = 16;

/// What the elements of a tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the format's own")]
pub enum Dtype {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    F16,
    BF16,
    F32,
    F64,
}

impl Dtype {
    const ALL: [(Self, &'static str, usize); 16] = [
        (Self::Bool, "BOOL", 1),
        (Self::U8, "U8", 1),
        (Self::I8, "I8", 1),
        (Self::U16, "U16", 2),
        (Self::I16, "I16", 2),
        (Self::U32, "U32", 4),
        (Self::I32, "I32", 4),
        (Self::U64, "U64", 8),
        (Self::I64, "I64", 8),
        (Self::F8E4M3, "F8_E4M3", 1),
        (Self::F8E5M2, "F8_E5M2", 1),
        (Self::F8E8M0, "F8_E8M0", 1),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::F32, "F32", 4),
        (Self::F64, "F64", 8),
    ];

    fn row(self) -> (Self, &'static str, usize) {
        Self::ALL.into_iter().find(|row| row.0 == self).expect("the table holds every dtype")
    }

    /// The name in a header.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        self.row().2
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|row| row.1 == name).map(|row| row.0)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The bytes of a tensor of this shape, if that is a number.
pub(super) fn byte_count(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |bytes, &axis| bytes.checked_mul(axis))
}

/// A tensor's place in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// From the start of the file.
    pub(super) start: usize,
    pub(super) end: usize,
}

/// What broke a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) tensor: Option<String>,
    pub(super) expected: String,
    pub(super) got: String,
}

#[expect(clippy::needless_pass_by_value, reason = "what is shown is mostly a temporary")]
fn broken(tensor: Option<&str>, expected: impl Into<String>, got: impl ToString) -> Broken {
    Broken { tensor: tensor.map(str::to_owned), expected: expected.into(), got: got.to_string() }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A JSON object as a list, so that a name that comes twice is seen twice.
pub(super) struct Pairs<V>(pub(super) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
            type Value = Vec<(String, V)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }
        deserializer.deserialize_map(PairsVisitor(std::marker::PhantomData)).map(Pairs)
    }
}

/// The header's object: `__metadata__` of strings, every other key a tensor.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Pairs<String>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Validates a whole file's bytes and gives its tensors in the order of their names.
pub(super) fn parse(file: &[u8]) -> Result<Vec<Entry>, Broken> {
    let length: &[u8; 8] = file
        .first_chunk()
        .ok_or_else(|| broken(None, "8 bytes of header length", format!("{} bytes", file.len())))?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(broken(None, format!("a header of at most {MAX_HEADER_BYTES} bytes"), length));
    }
    let data_start = 8 + length as usize;
    if data_start > file.len() {
        let got = format!("a file of {} bytes; it is truncated or no safetensors file", file.len());
        return Err(broken(None, format!("a header of {length} bytes"), got));
    }
    let RawHeader(raw) = serde_json::from_slice(&file[8..data_start])
        .map_err(|error| broken(None, "a JSON header of tensors", error))?;
    let data_bytes = (file.len() - data_start) as u64;
    let mut entries = Vec::with_capacity(raw.len());
    for (name, entry) in raw {
        entries.push(check(name, &entry, data_start, data_bytes)?);
    }
    // by place: side by side from the first byte to the last, no gap to hide in and no overlap
    entries.sort_by_key(|entry| (entry.start, entry.end));
    let mut next = data_start;
    for entry in &entries {
        if entry.start != next {
            let expected = format!("its bytes to start at {}", next - data_start);
            return Err(broken(Some(&entry.name), expected, entry.start - data_start));
        }
        next = entry.end;
    }
    if next != file.len() {
        let got = format!("{data_bytes}; the file is truncated or has a tail");
        return Err(broken(None, format!("{} bytes of tensors", next - data_start), got));
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(broken(Some(&pair[0].name), "each name once", "it twice"));
    }
    Ok(entries)
}

fn check(name: String, entry: &RawEntry, data_start: usize, data_bytes: u64) -> Result<Entry, Broken> {
    let some = Some(name.as_str());
    let dtype = Dtype::parse(&entry.dtype)
        .ok_or_else(|| broken(some, "a known dtype", entry.dtype.escape_debug().to_string()))?;
    if entry.shape.len() > MAX_AXES {
        return Err(broken(some, format!("at most {MAX_AXES} axes"), entry.shape.len()));
    }
    let shape: Option<Vec<usize>> = entry.shape.iter().map(|&axis| usize::try_from(axis).ok()).collect();
    let bytes = shape.as_ref().and_then(|shape| byte_count(dtype, shape));
    let (Some(shape), Some(bytes)) = (shape, bytes) else {
        return Err(broken(some, "a size in bytes below 2^64", format!("shape {:?}", entry.shape)));
    };
    let (start, end) = entry.data_offsets;
    if start > end || end > data_bytes {
        return Err(broken(
            some,
            format!("a range inside the {data_bytes} bytes of data"),
            format!("{start}..{end}"),
        ));
    }
    if end - start != bytes as u64 {
        return Err(broken(some, format!("{bytes} bytes for {dtype} {shape:?}"), end - start));
    }
    Ok(Entry { dtype, shape, start: data_start + start as usize, end: data_start + end as usize, name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend(std::iter::repeat_n(7, data_bytes));
        bytes
    }

    fn tensor(dtype: &str, shape: &str, range: &str) -> String {
        format!("{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{range}}}")
    }

    #[test]
    fn good_headers_pass() {
        let (a, b) = (tensor("F32", "[2,2]", "[4,20]"), tensor("BF16", "[2]", "[0,4]"));
        let header = format!(
            "{{\"__metadata__\":{{\"format\":\"pt\"}},\"b\":{a},\"a\":{b},\"z\":{}}}   ",
            tensor("F32", "[0]", "[20,20]")
        );
        let entries = parse(&file(&header, 20)).unwrap();
        let names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "z"]);
        assert_eq!(entries[1].shape, [2, 2]);
        assert!(parse(&file("{}", 0)).unwrap().is_empty());
        assert_eq!(parse(&file(&format!("{{\"s\":{}}}", tensor("F32", "[]", "[0,4]")), 4)).unwrap().len(), 1);
    }

    #[test]
    fn hostile_headers_are_refused_with_a_reason() {
        let one = |body: &str| format!("{{\"w\":{body}}}");
        let good = tensor("F32", "[2]", "[0,8]");
        let max = u64::MAX;
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (vec![], "header length"),
            (vec![1, 2, 3], "header length"),
            (max.to_le_bytes().to_vec(), "at most"),
            ((MAX_HEADER_BYTES + 1).to_le_bytes().to_vec(), "at most"),
            (9u64.to_le_bytes().to_vec(), "header of 9"),
            (file("", 0), "JSON"),
            (file("[]", 0), "JSON"),
            (file("{\"w\":3}", 0), "JSON"),
            (file("{\"w\":{}}", 0), "JSON"),
            (file(&"{\"w\":".repeat(50_000), 0), "JSON"),
            (file(&one(&"[".repeat(50_000)), 0), "JSON"),
            (file("{\"__metadata__\":{\"a\":{\"b\":1}}}", 0), "JSON"),
            (file(&one("{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}"), 8), "JSON"),
            (file(&one(&tensor("F32", "[-2]", "[0,8]")), 8), "JSON"),
            (file(&one(&tensor("F32", "[2.5]", "[0,8]")), 8), "JSON"),
            (file(&one(&tensor("F32", "[2]", "[-8,0]")), 8), "JSON"),
            (file(&one(&tensor("F32", "[2]", "[0]")), 8), "JSON"),
            (file(&one(&tensor("F33", "[2]", "[0,8]")), 8), "known dtype"),
            (file(&one(&tensor("F32", &format!("[{max},{max}]"), "[0,8]")), 8), "below 2^64"),
            (file(&one(&tensor("F32", &format!("[{}]", 1u64 << 62), "[0,0]")), 0), "below 2^64"),
            (file(&one(&tensor("F32", &format!("{:?}", [1; 17]), "[0,4]")), 4), "axes"),
            (file(&one(&tensor("F32", "[2]", "[8,0]")), 8), "range inside"),
            (file(&one(&tensor("F32", "[2]", "[0,9]")), 8), "range inside"),
            (file(&one(&tensor("F32", "[2]", &format!("[0,{max}]"))), 8), "range inside"),
            (file(&one(&tensor("F16", "[2]", "[0,8]")), 8), "4 bytes for F16"),
            (file(&one(&tensor("F32", "[3]", "[0,8]")), 8), "12 bytes"),
            (file(&one(&tensor("F32", "[2]", "[4,12]")), 12), "start at 0"),
            (file(&one(&good), 9), "bytes of tensors"),
            (file(&format!("{{\"a\":{good},\"b\":{}}}", tensor("F32", "[2]", "[4,12]")), 12), "start at 8"),
            (file(&format!("{{\"a\":{good},\"b\":{}}}", tensor("F32", "[2]", "[12,20]")), 20), "start at 8"),
            (file(&format!("{{\"a\":{good},\"b\":{good}}}"), 8), "start at 8"),
            (
                file(&format!("{{\"a\":{good},\"a\":{}}}", tensor("F32", "[2]", "[8,16]")), 16),
                "each name once",
            ),
        ];
        for (bytes, why) in cases {
            let head = String::from_utf8_lossy(&bytes[..bytes.len().min(90)]).into_owned();
            let broken = parse(&bytes).unwrap_err();
            assert!(broken.expected.contains(why), "{why}: {broken:?} of {head}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(length in 0u64..64, body in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = parse(&[&length.to_le_bytes()[..], &body].concat());
        }

        #[test]
        fn any_change_of_a_good_header_agrees_with_the_library(at in 0usize..120, to: u8) {
            let header = format!("{{\"a\":{},\"b\":{}}}", tensor("F32", "[2]", "[0,8]"), tensor("BF16", "[3,1]", "[8,14]"));
            let mut bytes = file(&header, 14);
            let at = at % bytes.len();
            bytes[at] = to;
            // we may refuse what the library takes (unknown keys, say), never the other way round
            if let Ok(entries) = parse(&bytes) {
                let theirs = safetensors::SafeTensors::deserialize(&bytes);
                prop_assert!(theirs.is_ok(), "{:?}", theirs.err());
                let theirs = theirs.unwrap();
                for entry in entries {
                    prop_assert_eq!(theirs.tensor(&entry.name).unwrap().data(), &bytes[entry.start..entry.end]);
                }
            }
        }
    }
}
