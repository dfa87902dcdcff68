//! Bytes of a file that a model runs from, and their way into memory of the process.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::scratch::AlignedBuf;

/// Least bytes of a piece of memory into which bytes are copied: huge pages of 2 MiB shall fill nearly all of it.
const PIECE: usize = 64 << 20;

/// Bytes after which what they are copied from is let go, so that not all of it is held twice.
const STEP: usize = 8 << 20;

/// Bytes that somebody owns, such as a mapped file; cloning shares them.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    near: Arc<Near>,
}

/// A copy that is read instead, once there is one.
struct Near {
    /// What it is a copy of.
    range: Range<usize>,
    copy: OnceLock<(Arc<AlignedBuf>, usize)>,
    forget: Option<Forget>,
}

impl Near {
    fn forget(&self, range: Range<usize>) {
        if let Some(forget) = &self.forget {
            forget(range);
        }
    }
}

/// Lets go of pages of a map.
type Forget = Box<dyn Fn(Range<usize>) + Send + Sync>;

impl Bytes {
    /// The bytes `range` of `owner`.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        let len = (*owner).as_ref().len();
        assert!(range.start <= range.end && range.end <= len, "bytes {range:?} of {len}");
        let near = Near { range: range.clone(), copy: OnceLock::new(), forget: None };
        Self { owner, range, near: Arc::new(near) }
    }

    /// With what lets go of bytes of the owner's that [`bring_near`] has copied, if they come back when they are read.
    #[must_use]
    pub fn forgetting(self, forget: impl Fn(Range<usize>) + Send + Sync + 'static) -> Self {
        let near = Near { range: self.range.clone(), copy: OnceLock::new(), forget: Some(Box::new(forget)) };
        Self { near: Arc::new(near), ..self }
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
        match self.near.copy.get() {
            Some((copy, at)) => {
                let (from, to) =
                    (self.range.start - self.near.range.start, self.range.end - self.near.range.start);
                &copy.view::<u8>(at + to)[at + from..]
            }
            None => &(*self.owner).as_ref()[self.range.clone()],
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// Copies bytes into memory in huge pages, where the system has them, and has them read from there from then on; what reads
/// them meanwhile notices nothing. A map of a file has small pages, and the processor looks up each of them: with huge ones
/// two cores of a Xeon read a third more in the same time.
///
/// Ends early when told to `stop`.
pub fn bring_near(all: &[Bytes], stop: &AtomicBool) {
    let far: Vec<&Bytes> = all.iter().filter(|bytes| bytes.near.copy.get().is_none()).collect();
    let mut rest = &far[..];
    while !rest.is_empty() && !stop.load(Ordering::Relaxed) {
        let (mut count, mut len) = (0, 0);
        let mut places = Vec::new();
        while count < rest.len() && len < PIECE {
            places.push(len);
            len += rest[count].near.range.len().next_multiple_of(64);
            count += 1;
        }
        let (lot, behind) = rest.split_at(count);
        rest = behind;
        let mut copy = AlignedBuf::default();
        let room = copy.get::<u8>(len);
        for (bytes, &place) in lot.iter().zip(&places) {
            let Range { start, end } = bytes.near.range;
            for from in (start..end).step_by(STEP) {
                let range = from..end.min(from + STEP);
                let part = &(*bytes.owner).as_ref()[range.clone()];
                room[place + from - start..][..part.len()].copy_from_slice(part);
                bytes.near.forget(range);
            }
        }
        let copy = Arc::new(copy);
        for (bytes, place) in lot.iter().zip(places) {
            // (two that copy at once make the same)
            let _ = bytes.near.copy.set((copy.clone(), place));
            // what was read meanwhile
            bytes.near.forget(bytes.near.range.clone());
        }
    }
}
