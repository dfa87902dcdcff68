//! Typed values of metadata, as bytes: borrowed from a file that is read, or made for one that is written.

use std::borrow::Cow;

/// What a value or the elements of an array are; the number is the one in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the format's own")]
pub enum Kind {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

/// The number that says "array".
pub(super) const ARRAY: u32 = 9;

impl Kind {
    const ALL: [Self; 12] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(super) fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// Bytes of an element; `None` for strings, which have their own lengths.
    pub(super) fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String => None,
        }
    }

    /// The name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }
}

/// A value of metadata, or an array of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Value<'a> {
    pub(super) kind: Kind,
    /// Elements, if it is an array.
    pub(super) count: Option<usize>,
    /// As in a file, without type and count; whoever made it has checked it.
    pub(super) bytes: Cow<'a, [u8]>,
}

/// One number of metadata.
enum Number {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
}

impl Value<'_> {
    /// An array of strings.
    pub fn strings<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> Value<'static> {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for item in items {
            push_string(&mut bytes, item.as_ref());
            count += 1;
        }
        Value { kind: Kind::String, count: Some(count), bytes: Cow::Owned(bytes) }
    }

    /// An array of f32.
    pub fn f32s(items: &[f32]) -> Value<'static> {
        let bytes: Vec<u8> = items.iter().flat_map(|x| x.to_le_bytes()).collect();
        Value { kind: Kind::F32, count: Some(items.len()), bytes: Cow::Owned(bytes) }
    }

    /// An array of i32.
    pub fn i32s(items: &[i32]) -> Value<'static> {
        let bytes: Vec<u8> = items.iter().flat_map(|x| x.to_le_bytes()).collect();
        Value { kind: Kind::I32, count: Some(items.len()), bytes: Cow::Owned(bytes) }
    }

    /// The same, not borrowed.
    pub fn into_owned(self) -> Value<'static> {
        Value { kind: self.kind, count: self.count, bytes: Cow::Owned(self.bytes.into_owned()) }
    }

    /// What it is, for messages.
    pub fn type_name(&self) -> String {
        match self.count {
            None => self.kind.name().to_owned(),
            Some(count) => format!("{count} of {}", self.kind.name()),
        }
    }

    /// The elements, if this is an array.
    pub fn len(&self) -> Option<usize> {
        self.count
    }

    /// Whether it is an array without elements.
    pub fn is_empty(&self) -> bool {
        self.count == Some(0)
    }

    /// Bytes that it takes in a file, without type and count.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn number_at(&self, at: usize) -> Option<Number> {
        let size = self.kind.size()?;
        let bytes = self.bytes.get(at * size..)?.get(..size)?;
        let mut eight = [0; 8];
        eight[..size].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(eight);
        Some(match self.kind {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Number::Unsigned(unsigned),
            Kind::I8 => Number::Signed(i64::from(unsigned as u8 as i8)),
            Kind::I16 => Number::Signed(i64::from(unsigned as u16 as i16)),
            Kind::I32 => Number::Signed(i64::from(unsigned as u32 as i32)),
            Kind::I64 => Number::Signed(unsigned as i64),
            Kind::F32 => Number::Float(f64::from(f32::from_bits(unsigned as u32))),
            Kind::F64 => Number::Float(f64::from_bits(unsigned)),
            Kind::Bool | Kind::String => return None,
        })
    }

    fn scalar(&self) -> Option<Number> {
        if self.count.is_some() { None } else { self.number_at(0) }
    }

    /// A whole number that is not negative, of any integer type.
    pub fn as_u64(&self) -> Option<u64> {
        match self.scalar()? {
            Number::Unsigned(x) => Some(x),
            Number::Signed(x) => u64::try_from(x).ok(),
            Number::Float(_) => None,
        }
    }

    /// A number of any type; an f32 as the shortest decimal that means it, 1e-6 and not 9.99999997e-7.
    pub fn as_f64(&self) -> Option<f64> {
        Some(match self.scalar()? {
            Number::Float(x) if self.kind == Kind::F32 => (x as f32).to_string().parse().unwrap_or(x),
            Number::Unsigned(x) => x as f64,
            Number::Signed(x) => x as f64,
            Number::Float(x) => x,
        })
    }

    /// True or false.
    pub fn as_bool(&self) -> Option<bool> {
        (self.kind == Kind::Bool && self.count.is_none()).then(|| self.bytes.first() == Some(&1))
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        if self.kind != Kind::String || self.count.is_some() {
            return None;
        }
        strings(&self.bytes).next()
    }

    /// The elements of an array of strings.
    pub fn as_strings(&self) -> Option<impl Iterator<Item = &str>> {
        (self.kind == Kind::String && self.count.is_some()).then(|| strings(&self.bytes))
    }

    /// The same elements as bytes, for whoever looks at few of many.
    pub(super) fn as_raw_strings(&self) -> Option<impl Iterator<Item = &[u8]>> {
        (self.kind == Kind::String && self.count.is_some()).then(|| raw_strings(&self.bytes))
    }

    /// The elements of an array of integers; those that do not fit are `None`.
    pub fn as_i64s(&self) -> Option<Vec<i64>> {
        let fours = self.bytes.as_chunks::<4>().0;
        // a vocabulary has a quarter of a million of them
        if self.kind == Kind::I32 && self.count.is_some() {
            return Some(fours.iter().map(|four| i64::from(i32::from_le_bytes(*four))).collect());
        }
        (0..self.count?)
            .map(|at| match self.number_at(at)? {
                Number::Unsigned(x) => i64::try_from(x).ok(),
                Number::Signed(x) => Some(x),
                Number::Float(_) => None,
            })
            .collect()
    }

    /// The elements of an array of numbers.
    pub fn as_f32s(&self) -> Option<Vec<f32>> {
        let fours = self.bytes.as_chunks::<4>().0;
        if self.kind == Kind::F32 && self.count.is_some() {
            return Some(fours.iter().map(|four| f32::from_le_bytes(*four)).collect());
        }
        (0..self.count?)
            .map(|at| {
                Some(match self.number_at(at)? {
                    Number::Unsigned(x) => x as f32,
                    Number::Signed(x) => x as f32,
                    Number::Float(x) => x as f32,
                })
            })
            .collect()
    }

    /// The elements of an array of truth values.
    pub fn as_bools(&self) -> Option<Vec<bool>> {
        (self.kind == Kind::Bool && self.count.is_some())
            .then(|| self.bytes.iter().map(|byte| *byte != 0).collect())
    }
}

/// Strings with their lengths in front, in bytes that were checked.
fn strings(bytes: &[u8]) -> impl Iterator<Item = &str> {
    raw_strings(bytes).map_while(|text| std::str::from_utf8(text).ok())
}

/// The same strings as bytes; looking at them costs a part of reading them.
pub(super) fn raw_strings(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        bytes = rest;
        Some(text)
    })
}

pub(super) fn push_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

macro_rules! from_number {
    ($($type:ty => $kind:ident),*) => {$(
        impl From<$type> for Value<'static> {
            fn from(x: $type) -> Self {
                Self { kind: Kind::$kind, count: None, bytes: Cow::Owned(x.to_le_bytes().to_vec()) }
            }
        }
    )*};
}

from_number!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, u64 => U64, i64 => I64, f64 => F64);

impl From<bool> for Value<'static> {
    fn from(x: bool) -> Self {
        Self { kind: Kind::Bool, count: None, bytes: Cow::Owned(vec![u8::from(x)]) }
    }
}

impl From<&str> for Value<'static> {
    fn from(text: &str) -> Self {
        let mut bytes = Vec::with_capacity(8 + text.len());
        push_string(&mut bytes, text);
        Self { kind: Kind::String, count: None, bytes: Cow::Owned(bytes) }
    }
}

impl From<String> for Value<'static> {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}
