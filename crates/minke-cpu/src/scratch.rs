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
