//! Matrices as they lie in a file, row by row: what a model that only runs reads, without a copy.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use minke_num::blocks::BlockFormat;

/// Bytes that somebody owns, such as a mapped file; cloning shares them.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes `range` of `owner`.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        let len = (*owner).as_ref().len();
        assert!(range.start <= range.end && range.end <= len, "bytes {range:?} of {len}");
        Self { owner, range }
    }

    /// A part of them.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "bytes {range:?} of {}", self.len());
        Self {
            owner: self.owner.clone(),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// What the elements of a stored matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Little-endian f32.
    F32,
    /// Little-endian f16.
    F16,
    /// Little-endian bf16.
    Bf16,
    /// Blocks of a few bits per weight.
    Blocks(BlockFormat),
}

impl Form {
    /// Bytes of a row of `cols` elements; `None` where blocks do not fill it.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Self::F32 => cols.checked_mul(4),
            Self::F16 | Self::Bf16 => cols.checked_mul(2),
            Self::Blocks(format) => format.row_bytes(cols),
        }
    }
}

/// A matrix [rows, cols] as it lies in a file, row-major, at any alignment.
#[derive(Clone, Debug)]
pub struct Stored {
    /// What its elements are.
    pub form: Form,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
    /// Its elements.
    pub bytes: Bytes,
}

impl Stored {
    /// A matrix over bytes.
    ///
    /// # Panics
    /// When they are not as many as it has.
    pub fn new(form: Form, rows: usize, cols: usize, bytes: Bytes) -> Self {
        let expected = form.row_bytes(cols).and_then(|row| row.checked_mul(rows));
        assert_eq!(Some(bytes.len()), expected, "stored: {rows} x {cols} of {form:?}");
        Self { form, rows, cols, bytes }
    }
}
