//! Memory for what comes and goes in all sizes: the values of a pass, and the gradients that lie where values were.
//!
//! Pieces are cut from slabs of address space, small ones from the lowest place that they fit into, large ones from the
//! smallest, so that little is left between them; places that are given back join their neighbours. The system adds memory
//! to a slab where it is first written, so what is held is what lies below the highest piece that ever was.

use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapOptions};

/// A cache line: pieces start on one, so that vector loads never straddle two.
const LINE: usize = 64;
/// Address space of a slab, where a piece does not need more. Windows counts it as memory.
const SLAB_BYTES: usize = if cfg!(windows) { 64 << 20 } else { 1 << 30 };
/// Pieces from here on take the smallest place that they fit into.
const LARGE_BYTES: usize = 1 << 20;
/// Slabs are whole pages of the large kind.
const PAGE_BYTES: usize = 2 << 20;

/// A place in a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    slab: usize,
    from: usize,
    bytes: usize,
}

impl Place {
    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Address space of which some is in use.
#[derive(Debug)]
struct Slab {
    bytes: usize,
    /// Start and length of what is not in use, in order; no two touch. There are few: pieces take the first of them mostly,
    /// which a list finds and shortens sooner than a tree.
    free: Vec<(usize, usize)>,
    /// Everything below was in use at some time.
    top: usize,
}

impl Slab {
    fn new(bytes: usize) -> Self {
        Self { bytes, free: vec![(0, bytes)], top: 0 }
    }

    fn take(&mut self, bytes: usize) -> Option<usize> {
        let mut fit = self.free.iter().enumerate().filter(|&(_, &(_, there))| there >= bytes);
        let found = if bytes < LARGE_BYTES { fit.next() } else { fit.min_by_key(|&(_, &(_, there))| there) };
        let (at, &(from, there)) = found?;
        if there > bytes {
            self.free[at] = (from + bytes, there - bytes);
        } else {
            self.free.remove(at);
        }
        self.top = self.top.max(from + bytes);
        Some(from)
    }

    fn give(&mut self, from: usize, bytes: usize) {
        let at = self.free.partition_point(|&(start, _)| start < from);
        let joins_before = at > 0 && self.free[at - 1].0 + self.free[at - 1].1 == from;
        let joins_behind = self.free.get(at).is_some_and(|&(start, _)| start == from + bytes);
        match (joins_before, joins_behind) {
            (true, true) => {
                self.free[at - 1].1 += bytes + self.free[at].1;
                self.free.remove(at);
            }
            (true, false) => self.free[at - 1].1 += bytes,
            (false, true) => self.free[at] = (from, bytes + self.free[at].1),
            (false, false) => self.free.insert(at, (from, bytes)),
        }
    }

    fn is_free(&self) -> bool {
        self.free == [(0, self.bytes)]
    }
}

/// Which places are in use, without the memory: the same calls give the same places.
#[derive(Debug, Default)]
pub struct Places {
    slabs: Vec<Slab>,
    used: usize,
}

impl Places {
    /// A place of so many bytes, or a cache line's rest more.
    pub fn take(&mut self, bytes: usize) -> Place {
        let bytes = bytes.max(1).next_multiple_of(LINE);
        self.used += bytes;
        for (slab, places) in self.slabs.iter_mut().enumerate() {
            if let Some(from) = places.take(bytes) {
                return Place { slab, from, bytes };
            }
        }
        let mut slab = Slab::new(SLAB_BYTES.max(bytes.next_multiple_of(PAGE_BYTES)));
        let from = slab.take(bytes).expect("a new slab has room");
        self.slabs.push(slab);
        Place { slab: self.slabs.len() - 1, from, bytes }
    }

    /// Gives a place back, once.
    pub fn give(&mut self, place: Place) {
        self.used -= place.bytes;
        self.slabs[place.slab].give(place.from, place.bytes);
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.used
    }

    /// Bytes that were ever in use.
    pub fn held_bytes(&self) -> usize {
        self.slabs.iter().map(|slab| slab.top).sum()
    }
}

/// Places and the memory that they are in.
struct Arena {
    places: Places,
    /// Of each slab; none until it is first used, and after it was released.
    maps: Vec<Option<MmapMut>>,
}

static ARENA: Mutex<Arena> =
    Mutex::new(Arena { places: Places { slabs: Vec::new(), used: 0 }, maps: Vec::new() });

fn arena() -> MutexGuard<'static, Arena> {
    ARENA.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of memory that pieces had or have.
pub fn held_bytes() -> usize {
    arena().places.held_bytes()
}

/// Gives the system back the slabs in which nothing is in use.
pub fn release() {
    let Arena { places, maps } = &mut *arena();
    for (slab, map) in places.slabs.iter_mut().zip(maps) {
        if slab.is_free() {
            (*map, slab.top) = (None, 0);
        }
    }
}

/// A piece of memory, given back when dropped; what is in a new one is unspecified.
pub struct Piece {
    start: NonNull<u8>,
    place: Place,
}

// SAFETY: a piece is the only owner of its bytes, which are plain numbers.
unsafe impl Send for Piece {}
// SAFETY: shared, it is only read.
unsafe impl Sync for Piece {}

impl Piece {
    /// At least so many bytes, from the start of a cache line on.
    ///
    /// # Panics
    /// When the system has no address space left.
    pub fn new(bytes: usize) -> Self {
        let Arena { places, maps } = &mut *arena();
        let place = places.take(bytes);
        maps.resize_with(places.slabs.len(), || None);
        let map = maps[place.slab].get_or_insert_with(|| slab(places.slabs[place.slab].bytes));
        // SAFETY: the place lies within the slab, and so does a pointer to its start.
        let start = unsafe { map.as_mut_ptr().add(place.from) };
        Self { start: NonNull::new(start).expect("memory is not at address 0"), place }
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.place.bytes
    }

    /// The first `len` elements.
    ///
    /// # Panics
    /// When it is shorter.
    pub fn view<T: bytemuck::Pod>(&self, len: usize) -> &[T] {
        self.holds::<T>(len);
        // SAFETY: the bytes are there, mapped and initialised by the system; lines are aligned for every number; no other
        // piece has them, and this one is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), len) }
    }

    /// The first `len` elements, to be written.
    ///
    /// # Panics
    /// When it is shorter.
    pub fn get<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        self.holds::<T>(len);
        // SAFETY: as in `view`, and this piece is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), len) }
    }

    fn holds<T>(&self, len: usize) {
        const { assert!(align_of::<T>() <= LINE) };
        let fits = len.checked_mul(size_of::<T>()).is_some_and(|bytes| bytes <= self.place.bytes);
        assert!(fits, "{len} elements in a piece of {} bytes", self.place.bytes);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        arena().places.give(self.place);
    }
}

fn slab(bytes: usize) -> MmapMut {
    // address space, of which little may ever be used
    let map = MmapOptions::new().len(bytes).no_reserve_swap().map_anon();
    let map = map.expect("the system has address space for a slab of memory");
    // a hint: without huge pages it is only slower
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_never_overlap_and_join_again() {
        let mut places = Places::default();
        let mut held: Vec<Place> = Vec::new();
        let mut state = 1_u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = (state >> 33) as usize;
            if draw % 5 < 3 {
                let new = places.take(if draw.is_multiple_of(50) {
                    draw % (SLAB_BYTES / 4)
                } else {
                    draw % 100_000
                });
                for old in &held {
                    let apart = new.from + new.bytes <= old.from || old.from + old.bytes <= new.from;
                    assert!(new.slab != old.slab || apart, "{new:?} {old:?}");
                }
                held.push(new);
            } else if !held.is_empty() {
                places.give(held.swap_remove(draw % held.len()));
            }
            assert_eq!(places.used_bytes(), held.iter().map(|place| place.bytes).sum::<usize>());
            assert!(places.used_bytes() <= places.held_bytes());
        }
        for place in held {
            places.give(place);
        }
        assert!(places.slabs.iter().all(Slab::is_free) && places.slabs.len() > 1);
    }

    #[test]
    fn small_pieces_lie_low_and_large_ones_close() {
        let mut places = Places::default();
        let [a, b, c] = [100, 1000, 64].map(|bytes| places.take(bytes));
        assert_eq!((a.from, b.from, c.from, places.held_bytes()), (0, 128, 1152, 1216));
        places.give(a);
        places.give(b);
        assert_eq!((places.take(1100).from, places.take(64).from), (0, 1216));
        let mut places = Places::default();
        let [wide, _, close, _] = [3 * LARGE_BYTES, 64, 2 * LARGE_BYTES, 64].map(|bytes| places.take(bytes));
        places.give(wide);
        places.give(close);
        assert_eq!((places.take(2 * LARGE_BYTES).from, places.take(64).from), (close.from, wide.from));
        let huge = places.take(SLAB_BYTES + 1);
        assert_eq!((huge.slab, huge.from), (1, 0));
    }

    #[test]
    fn pieces_are_apart_and_come_back() {
        let pieces = std::thread::scope(|scope| {
            let each = |number: u32| {
                move || -> Vec<Piece> {
                    let mut pieces: Vec<_> = (1..200).map(|i| Piece::new(i * 36)).collect();
                    for round in 0..50 {
                        pieces.swap_remove(round * 3);
                        pieces.push(Piece::new(round * 1000 + 4));
                        for piece in &mut pieces {
                            let words = piece.bytes() / 4;
                            piece.get::<u32>(words).fill(number);
                        }
                    }
                    pieces
                }
            };
            let threads = [1, 2, 3].map(|number| scope.spawn(each(number)));
            threads.map(|thread| thread.join().unwrap())
        });
        for (pieces, number) in pieces.iter().zip(1..) {
            for piece in pieces {
                assert!(piece.view::<u32>(piece.bytes() / 4).iter().all(|&x| x == number));
                assert_eq!(piece.start.as_ptr() as usize % LINE, 0);
            }
        }
        assert!(held_bytes() >= pieces.iter().flatten().map(Piece::bytes).sum());
    }

    #[test]
    #[should_panic(expected = "elements in a piece")]
    fn a_piece_is_not_read_beyond_its_end() {
        Piece::new(64).view::<u32>(17);
    }
}
