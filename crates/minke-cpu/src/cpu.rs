//! The machine as kernels see it: an instruction-set level and a thread pool.

use std::sync::Arc;

use crate::pool::Pool;
use crate::simd::{Kernel, Level};

/// What every kernel takes first: which instructions to use and which threads to run on. Cheap to clone.
#[derive(Clone)]
pub struct Cpu {
    level: Level,
    pool: Arc<Pool>,
}

impl Cpu {
    /// The best level of this machine and `threads` threads (0: as many as there are cores).
    pub fn detect(threads: usize) -> Self {
        Self::with_level(Level::detect(), threads)
    }

    /// A chosen level (tests force each one in turn; see [`Level::available`]).
    pub fn with_level(level: Level, threads: usize) -> Self {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            n => n,
        };
        Self { level, pool: Arc::new(Pool::new(threads)) }
    }

    /// The instruction-set level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Threads that take part in a parallel loop, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `task(i)` for every `i` in `0..tasks`, on all threads, in no promised order; returns when all are done.
    /// Inside a task it runs the loop on the calling thread.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        self.pool.run(tasks, &task);
    }

    /// Runs `kernel` compiled for this machine's level, on the calling thread.
    #[inline]
    pub fn dispatch<K: Kernel>(&self, kernel: K) -> K::Out {
        self.level.dispatch(kernel)
    }
}

/// A raw pointer that tasks of one parallel loop may share: each writes its own part.
#[derive(Clone, Copy)]
pub struct SharedMut<T>(*mut T, usize);

// SAFETY: the type only carries the pointer; every access goes through `slice`, whose caller promises disjointness.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Shares `slice` among the tasks of a loop that ends before the borrow does.
    pub fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// The first element.
    #[inline]
    pub fn start(&self) -> *mut T {
        self.0
    }

    /// The part `start..start + len`.
    ///
    /// # Safety
    /// No two tasks that run at once may ask for overlapping parts, and the slice given to `new` must still be
    /// borrowed.
    ///
    /// # Panics
    /// When the part is out of bounds.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "disjoint parts of one buffer: the caller's promise")]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.1 && len <= self.1 - start, "part {start}+{len} of {} elements", self.1);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
