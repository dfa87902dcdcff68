//! Bytes of a file that a model runs from.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that somebody owns, such as a mapped file; cloning shares them.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    near: Option<Arc<Near>>,
}

/// What makes ranges of the owner's bytes faster to read, until it is told to stop.
type Near = dyn Fn(&[Range<usize>], &AtomicBool) + Send + Sync;

impl Bytes {
    /// The bytes `range` of `owner`.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        let len = (*owner).as_ref().len();
        assert!(range.start <= range.end && range.end <= len, "bytes {range:?} of {len}");
        Self { owner, range, near: None }
    }

    /// With what makes ranges of the owner's bytes faster to read: they stay where they are, and the same.
    #[must_use]
    pub fn brought_near_by(
        self,
        near: impl Fn(&[Range<usize>], &AtomicBool) + Send + Sync + 'static,
    ) -> Self {
        Self { near: Some(Arc::new(near)), ..self }
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
    let mut all: Vec<(&Bytes, &Arc<Near>)> =
        all.iter().filter_map(|bytes| Some((bytes, bytes.near.as_ref()?))).collect();
    all.sort_by_key(|(bytes, _)| owner(bytes));
    for of_one in all.chunk_by(|(a, _), (b, _)| owner(a) == owner(b)) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let ranges: Vec<_> = of_one.iter().map(|(bytes, _)| bytes.range.clone()).collect();
        of_one[0].1(&ranges, stop);
    }
}
