//! Working memory of a thread, kept between calls: a hot path allocates nothing after its first run.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// 64 bytes, so that a buffer starts on a cache line and vector loads never straddle two.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Buffers from this size on are mapped by themselves, in huge pages where the system has them: the working set of a
/// training step is larger than what the address translation cache covers in small pages.
const HUGE_BYTES: usize = 1 << 20;

/// A growable buffer that starts on a cache line; contents are what was there before.
#[derive(Default)]
pub struct AlignedBuf(Memory);

enum Memory {
    Lines(Vec<Line>),
    Mapped(memmap2::MmapMut),
}

impl Default for Memory {
    fn default() -> Self {
        Memory::Lines(Vec::new())
    }
}

impl Clone for AlignedBuf {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        copy.get::<u8>(self.capacity_bytes()).copy_from_slice(self.view(self.capacity_bytes()));
        copy
    }
}

impl AlignedBuf {
    /// The first `len` elements, after growing the buffer if it is too small. New memory is zero.
    ///
    /// # Panics
    /// When the system has no memory left.
    pub fn get<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer size fits usize");
        if self.capacity_bytes() < bytes {
            self.grow(bytes.next_multiple_of(64));
        }
        &mut bytemuck::cast_slice_mut::<u8, T>(&mut self.bytes_mut()[..bytes])[..len]
    }

    /// The first `len` elements, read-only.
    ///
    /// # Panics
    /// When the buffer was never made that large.
    pub fn view<T: bytemuck::Pod>(&self, len: usize) -> &[T] {
        let bytes: &[u8] = match &self.0 {
            Memory::Lines(lines) => bytemuck::cast_slice(lines),
            Memory::Mapped(map) => map,
        };
        bytemuck::cast_slice(&bytes[..len * size_of::<T>()])
    }

    /// Bytes held.
    pub fn capacity_bytes(&self) -> usize {
        match &self.0 {
            Memory::Lines(lines) => lines.len() * 64,
            Memory::Mapped(map) => map.len(),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Mapped(map) => map,
        }
    }

    fn grow(&mut self, bytes: usize) {
        match &mut self.0 {
            Memory::Lines(lines) if bytes < HUGE_BYTES => lines.resize(bytes / 64, Line([0; 64])),
            Memory::Lines(_) | Memory::Mapped(_) => {
                let mut map = memmap2::MmapMut::map_anon(bytes).expect("the system has memory for a buffer");
                // a hint: without huge pages it is only slower
                #[cfg(target_os = "linux")]
                let _ = map.advise(memmap2::Advice::HugePage);
                let before = self.capacity_bytes();
                map[..before].copy_from_slice(self.bytes_mut());
                self.0 = Memory::Mapped(map);
            }
        }
    }
}

/// Memory from which blocks are cut, at least: some pages of the large kind, of which the ends may be small ones.
const SLAB_BYTES: usize = 16 << 20;

/// Blocks that are not in use, by length.
type FreeBlocks = HashMap<usize, Vec<&'static mut [u32]>>;

/// Their memory is never given back: what was needed once is needed again.
static BLOCKS: Mutex<Option<FreeBlocks>> = Mutex::new(None);

/// A piece of memory of one of a few lengths that come and go in large numbers, such as the pages of a cache. Pieces are
/// cut from slabs in large pages and used again; the contents of a new one are unspecified.
pub struct Block(&'static mut [u32]);

impl Block {
    /// A block of `words`.
    ///
    /// # Panics
    /// When the system has no memory left.
    pub fn new(words: usize) -> Self {
        let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        let free = blocks.get_or_insert_with(HashMap::new).entry(words).or_default();
        if let Some(block) = free.pop() {
            return Self(block);
        }
        let line = words.max(1).next_multiple_of(16);
        let count = SLAB_BYTES.div_ceil(line * size_of::<u32>());
        let slab = Box::leak(Box::<AlignedBuf>::default()).get::<u32>(count * line);
        free.extend(slab.chunks_exact_mut(line).map(|block| &mut block[..words]).rev());
        Self(free.pop().expect("a slab has a block"))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let block = std::mem::take(&mut self.0);
        let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.get_or_insert_with(HashMap::new).entry(block.len()).or_default().push(block);
    }
}

impl std::ops::Deref for Block {
    type Target = [u32];
    #[inline]
    fn deref(&self) -> &[u32] {
        self.0
    }
}

impl std::ops::DerefMut for Block {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u32] {
        self.0
    }
}

thread_local! {
    static FREE: RefCell<Vec<AlignedBuf>> = const { RefCell::new(Vec::new()) };
}

/// Working memory on loan from this thread; goes back when dropped.
pub struct Scratch<T> {
    buf: AlignedBuf,
    len: usize,
    element: std::marker::PhantomData<T>,
}

/// Borrows `len` elements of this thread's working memory; the contents are unspecified.
///
/// A guard and not a closure: vector code inside a closure would not be compiled with the level's instructions.
pub fn take<T: bytemuck::Pod>(len: usize) -> Scratch<T> {
    let mut buf = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    buf.get::<T>(len);
    Scratch { buf, len, element: std::marker::PhantomData }
}

impl<T: bytemuck::Pod> std::ops::Deref for Scratch<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        self.buf.view(self.len)
    }
}

impl<T: bytemuck::Pod> std::ops::DerefMut for Scratch<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        self.buf.get(self.len)
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        let buf = std::mem::take(&mut self.buf);
        FREE.with_borrow_mut(|free| free.push(buf));
    }
}

/// Lends `len` elements of this thread's working memory to `f`, for code without vectors; see [`take`].
pub fn with_scratch<T: bytemuck::Pod, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    f(&mut take(len))
}
