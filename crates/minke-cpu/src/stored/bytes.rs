//! Bytes of a file that a model runs from.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What bytes belong to, such as a mapped file.
pub trait Owner: AsRef<[u8]> + Send + Sync {
    /// Makes ranges of the bytes faster to read, until told to stop; they stay where they are, and the same.
    fn bring_near(&self, _ranges: &[Range<usize>], _stop: &AtomicBool) {}

    /// Gives back the memory of a range that will hardly be read again, where the bytes come from elsewhere.
    fn forget(&self, _range: Range<usize>) {}
}

impl Owner for Vec<u8> {}

/// Bytes that somebody owns; cloning shares them.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes `range` of `owner`.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn new(owner: Arc<dyn Owner>, range: Range<usize>) -> Self {
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
        let range = self.range.start + range.start..self.range.start + range.end;
        Self { range, ..self.clone() }
    }

    /// Gives back their memory, where their owner can; they can be read all the same.
    pub fn forget(&self) {
        self.owner.forget(self.range.clone());
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

/// Makes bytes faster to read, where their owners can; ends early when told to `stop`.
pub fn bring_near(all: &[Bytes], stop: &AtomicBool) {
    let owner = |bytes: &Bytes| (*bytes.owner).as_ref().as_ptr();
    let mut all: Vec<&Bytes> = all.iter().collect();
    all.sort_by_key(|bytes| owner(bytes));
    for of_one in all.chunk_by(|a, b| owner(a) == owner(b)) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let ranges: Vec<_> = of_one.iter().map(|bytes| bytes.range.clone()).collect();
        of_one[0].owner.bring_near(&ranges, stop);
    }
}
