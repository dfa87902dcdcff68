//! The header of a GGUF file, parsed into a form that the rest may trust.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use super::value::{ARRAY, Kind, Value, raw_strings};
use super::{DEFAULT_ALIGNMENT, MAX_AXES, TensorType, type_name};

/// The format's cap on keys.
const MAX_KEY_BYTES: usize = 65_535;
/// Longer than any name that other programs read, so that a file of theirs never fails here first.
const MAX_READ_NAME_BYTES: usize = 255;
/// More keys than any model has.
const MAX_KEYS: u64 = 1 << 16;
/// More tensors than any model has: DeepSeek-V3 has 1,025.
const MAX_TENSORS: u64 = 1 << 20;
/// The least that a key with its value takes, and a tensor's entry.
const MIN_KEY_BYTES: u64 = 14;
const MIN_TENSOR_BYTES: u64 = 25;

/// A value's place in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) kind: Kind,
    pub(super) count: Option<usize>,
    /// From the start of the file.
    pub(super) range: Range<usize>,
}

impl Item {
    pub(super) fn of<'a>(&self, file: &'a [u8]) -> Value<'a> {
        Value { kind: self.kind, count: self.count, bytes: Cow::Borrowed(&file[self.range.clone()]) }
    }
}

/// A tensor's place in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) kind: TensorType,
    /// Outermost axis first.
    pub(super) shape: Vec<usize>,
    /// From the start of the file.
    pub(super) range: Range<usize>,
}

/// What a file says before its tensors.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: Vec<(String, Item)>,
    /// In the order of the file.
    pub(super) tensors: Vec<Entry>,
}

/// What broke a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) place: String,
    pub(super) expected: String,
    pub(super) got: String,
}

#[expect(clippy::needless_pass_by_value, reason = "what is shown is mostly a temporary")]
fn broken(place: impl Into<String>, expected: impl Into<String>, got: impl ToString) -> Broken {
    Broken { place: place.into(), expected: expected.into(), got: got.to_string() }
}

fn key_place(key: &str) -> String {
    format!("key `{}`", key.escape_debug())
}

fn tensor_place(name: &str) -> String {
    format!("tensor `{}`", name.escape_debug())
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, bytes: usize, place: &str, what: &str) -> Result<&'a [u8], Broken> {
        if bytes > self.left() {
            let got = format!("{} at byte {}; the file is truncated", self.left(), self.at);
            return Err(broken(place, format!("{bytes} bytes of {what}"), got));
        }
        let taken = &self.file[self.at..self.at + bytes];
        self.at += bytes;
        Ok(taken)
    }

    fn u32(&mut self, place: &str, what: &str) -> Result<u32, Broken> {
        let four = self.take(4, place, what)?;
        Ok(u32::from_le_bytes(four.try_into().expect("four bytes were taken")))
    }

    fn u64(&mut self, place: &str, what: &str) -> Result<u64, Broken> {
        let eight = self.take(8, place, what)?;
        Ok(u64::from_le_bytes(eight.try_into().expect("eight bytes were taken")))
    }

    fn string(&mut self, place: &str, what: &str) -> Result<&'a str, Broken> {
        let length = self.u64(place, what)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let bytes = self.take(length, place, what)?;
        std::str::from_utf8(bytes)
            .map_err(|error| broken(place, format!("UTF-8 in {what}"), format!("other bytes ({error})")))
    }

    fn value(&mut self, key: &str) -> Result<Item, Broken> {
        let place = key_place(key);
        let number = self.u32(&place, "a type")?;
        let known = |number: u32| {
            Kind::from_number(number).ok_or_else(|| broken(&place, "a type from 0 to 12", number))
        };
        if number != ARRAY {
            let kind = known(number)?;
            let start = self.at;
            self.skip(kind, &place)?;
            return Ok(Item { kind, count: None, range: start..self.at });
        }
        let number = self.u32(&place, "an element type")?;
        if number == ARRAY {
            return Err(broken(place, "an array of plain values", "an array of arrays"));
        }
        let kind = known(number)?;
        let count = self.u64(&place, "a length")?;
        // before a loop or a product with it: as many elements as there can be
        let least = kind.size().unwrap_or(8) as u64;
        if count > self.left() as u64 / least {
            let expected =
                format!("at most {} elements in the {} bytes left", self.left() as u64 / least, self.left());
            return Err(broken(place, expected, format!("{count}; the file is truncated or hostile")));
        }
        let (start, count) = (self.at, count as usize);
        match kind.size() {
            Some(size) if kind != Kind::Bool => _ = self.take(count * size, &place, "an array")?,
            _ => {
                let good = if kind == Kind::String { self.skip_strings(count) } else { 0 };
                for _ in good..count {
                    self.skip(kind, &place)?;
                }
            }
        }
        Ok(Item { kind, count: Some(count), range: start..self.at })
    }

    /// Checks strings and goes behind those before the first that is broken, which [`Cursor::skip`] names; gives how many.
    fn skip_strings(&mut self, count: usize) -> usize {
        let mut good = 0;
        for text in raw_strings(&self.file[self.at..]).take(count) {
            if std::str::from_utf8(text).is_err() {
                break;
            }
            self.at += 8 + text.len();
            good += 1;
        }
        good
    }

    /// Checks one value and goes behind it.
    fn skip(&mut self, kind: Kind, place: &str) -> Result<(), Broken> {
        match kind.size() {
            Some(size) => {
                let bytes = self.take(size, place, kind.name())?;
                if kind == Kind::Bool && bytes[0] > 1 {
                    return Err(broken(place, "0 or 1", bytes[0]));
                }
            }
            None => _ = self.string(place, "a string")?,
        }
        Ok(())
    }

    fn tensor(&mut self, index: u64) -> Result<(String, TensorType, Vec<usize>, u64), Broken> {
        let place = format!("tensor {index}");
        let name = self.string(&place, "a name")?;
        if name.is_empty() || name.len() > MAX_READ_NAME_BYTES {
            return Err(broken(place, format!("a name of 1 to {MAX_READ_NAME_BYTES} bytes"), name.len()));
        }
        let place = tensor_place(name);
        let axes = self.u32(&place, "a number of axes")?;
        if axes as usize > MAX_AXES {
            return Err(broken(place, format!("at most {MAX_AXES} axes"), axes));
        }
        let mut shape = Vec::with_capacity(axes as usize);
        for _ in 0..axes {
            let axis = self.u64(&place, "an axis")?;
            let axis = usize::try_from(axis).ok().filter(|&axis| axis > 0 && axis < 1 << 48);
            shape.push(axis.ok_or_else(|| broken(&place, "axes from 1 to 2^48", "another"))?);
        }
        shape.reverse();
        let number = self.u32(&place, "a type")?;
        let kind = TensorType::from_number(number).ok_or_else(|| {
            let expected = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL or IQ4_XS";
            broken(&place, expected, type_name(number))
        })?;
        let offset = self.u64(&place, "an offset")?;
        Ok((name.to_owned(), kind, shape, offset))
    }
}

fn version(cursor: &mut Cursor) -> Result<u32, Broken> {
    let magic = cursor.take(4, "header", "magic")?;
    if magic != b"GGUF" {
        return Err(broken(
            "header",
            "a file that begins with GGUF",
            format!("{:?}", magic.escape_ascii().to_string()),
        ));
    }
    let version = cursor.u32("header", "a version")?;
    match version {
        2 | 3 => Ok(version),
        _ if version.trailing_zeros() >= 16 && version != 0 => Err(broken(
            "header",
            "a little-endian file",
            "a big-endian one; convert it on the machine that it is from",
        )),
        1 => Err(broken("header", "version 2 or 3", "version 1, which no program has written since 2023")),
        _ => Err(broken("header", "version 2 or 3", version)),
    }
}

/// Validates a whole file's bytes.
pub(super) fn parse(file: &[u8]) -> Result<Header, Broken> {
    let mut cursor = Cursor { file, at: 0 };
    let version = version(&mut cursor)?;
    let tensors = cursor.u64("header", "a number of tensors")?;
    let keys = cursor.u64("header", "a number of keys")?;
    let left = cursor.left() as u64;
    for (what, count, cap, least) in
        [("tensors", tensors, MAX_TENSORS, MIN_TENSOR_BYTES), ("keys", keys, MAX_KEYS, MIN_KEY_BYTES)]
    {
        let most = cap.min(left / least);
        if count > most {
            let got = format!("{count}; the file is truncated or hostile");
            return Err(broken("header", format!("at most {most} {what} in {left} bytes"), got));
        }
    }
    let mut seen = HashSet::new();
    let mut metadata = Vec::new();
    for index in 0..keys {
        let key = cursor.string(&format!("key {index}"), "a key")?;
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            let place = format!("key {index}");
            return Err(broken(place, format!("1 to {MAX_KEY_BYTES} bytes"), key.len()));
        }
        if !seen.insert(key) {
            return Err(broken(key_place(key), "each key once", "it twice"));
        }
        metadata.push((key.to_owned(), cursor.value(key)?));
    }
    let alignment = alignment(file, &metadata)?;
    let mut raw = Vec::new();
    for index in 0..tensors {
        raw.push(cursor.tensor(index)?);
    }
    let data_start = cursor.at.next_multiple_of(alignment);
    let tensors = places(file, raw, data_start, alignment)?;
    Ok(Header { version, metadata, tensors })
}

fn alignment(file: &[u8], metadata: &[(String, Item)]) -> Result<usize, Broken> {
    const KEY: &str = "general.alignment";
    let Some((_, item)) = metadata.iter().find(|(key, _)| key == KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    let value = item.of(file);
    let found = value.as_u64().filter(|x| x.is_power_of_two() && *x <= 1 << 20);
    let got = || value.as_u64().map_or_else(|| value.type_name(), |x| x.to_string());
    found.map(|x| x as usize).ok_or_else(|| broken(key_place(KEY), "a power of two up to 2^20", got()))
}

/// Tensors with their bytes in the file: aligned, inside, and none over another.
fn places(
    file: &[u8],
    raw: Vec<(String, TensorType, Vec<usize>, u64)>,
    data_start: usize,
    alignment: usize,
) -> Result<Vec<Entry>, Broken> {
    let data_bytes = file.len().saturating_sub(data_start) as u64;
    let mut entries = Vec::with_capacity(raw.len());
    for (name, kind, shape, offset) in raw {
        let place = || tensor_place(&name);
        let cols = shape.last().copied().unwrap_or(1);
        if kind.row_bytes(cols).is_none() {
            let expected = match kind {
                TensorType::Blocks(format) => {
                    format!("rows of a multiple of {} in {kind}", format.block_len())
                }
                TensorType::F32 | TensorType::F16 | TensorType::Bf16 => "a size below 2^64".to_owned(),
            };
            return Err(broken(place(), expected, cols));
        }
        let Some(bytes) = kind.bytes(&shape) else {
            return Err(broken(place(), "a size in bytes below 2^64", format!("shape {shape:?}")));
        };
        if !offset.is_multiple_of(alignment as u64) {
            return Err(broken(place(), format!("an offset that is a multiple of {alignment}"), offset));
        }
        let end = offset.checked_add(bytes as u64).filter(|&end| end <= data_bytes);
        let Some(end) = end else {
            let expected = format!("{bytes} bytes inside the {data_bytes} of data");
            return Err(broken(
                place(),
                expected,
                format!("offset {offset}; the file is truncated or hostile"),
            ));
        };
        let range = data_start + offset as usize..data_start + end as usize;
        entries.push(Entry { name, kind, shape, range });
    }
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(broken(tensor_place(pair[0]), "each name once", "it twice"));
    }
    let mut by_place: Vec<&Entry> = entries.iter().collect();
    by_place.sort_by_key(|entry| (entry.range.start, entry.range.end));
    if let Some(pair) = by_place.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
        let expected = format!("its bytes behind those of `{}`", pair[0].name.escape_debug());
        return Err(broken(tensor_place(&pair[1].name), expected, "them over each other"));
    }
    Ok(entries)
}
