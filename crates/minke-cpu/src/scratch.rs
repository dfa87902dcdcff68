//! Working memory of a thread, kept between calls: a hot path allocates nothing after its first run.

use std::cell::RefCell;

/// 64 bytes, so that a buffer starts on a cache line and vector loads never straddle two.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A growable buffer that starts on a cache line; contents are what was there before.
#[derive(Default, Clone)]
pub struct AlignedBuf(Vec<Line>);

impl AlignedBuf {
    /// The first `len` elements, after growing the buffer if it is too small. New memory is zero.
    pub fn get<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer size fits usize");
        let lines = bytes.div_ceil(64);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 64]));
        }
        &mut bytemuck::cast_slice_mut::<Line, T>(&mut self.0[..lines])[..len]
    }

    /// The first `len` elements, read-only.
    ///
    /// # Panics
    /// When the buffer was never made that large.
    pub fn view<T: bytemuck::Pod>(&self, len: usize) -> &[T] {
        &bytemuck::cast_slice::<Line, T>(&self.0[..(len * size_of::<T>()).div_ceil(64)])[..len]
    }

    /// Bytes held.
    pub fn capacity_bytes(&self) -> usize {
        self.0.len() * 64
    }
}

thread_local! {
    static FREE: RefCell<Vec<AlignedBuf>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` elements of this thread's working memory to `f`. Calls may nest; the contents are unspecified.
pub fn with_scratch<T: bytemuck::Pod, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    let mut buf = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    let result = f(buf.get(len));
    FREE.with_borrow_mut(|free| free.push(buf));
    result
}
