//! A small fork-join thread pool.
//!
//! One loop at a time. Every thread has an equal part of its tasks, one after the other, and takes over from the ends of
//! others' parts when it is through: loops over the same rows find them in the cache of the thread that wrote them. Which
//! thread runs a task is up to the moment in the end; what a task computes is not, and tasks never add into each other's
//! outputs, so results are the same for any number of threads. Workers spin for some microseconds before they sleep: a training step is thousands of short loops.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// How often an idle thread looks for work before it sleeps.
const SPINS: u32 = 4_000;

thread_local! {
    /// Set while this thread runs a task: loops inside it run in place.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

#[derive(Default)]
struct Slot {
    /// The open loop: workers that look while it is here take part.
    job: Option<*const Task<'static>>,
    /// Workers that wait for a signal.
    asleep: usize,
    stop: bool,
}

// SAFETY: the pointer is read only between `run` publishing it and `run` returning, while the closure is borrowed.
unsafe impl Send for Slot {}

/// The tasks that a thread has left: the first in the upper half of the word, behind the last in the lower one.
#[derive(Default)]
#[repr(align(128))]
struct Part(AtomicU64);

impl Part {
    fn set(&self, tasks: std::ops::Range<usize>) {
        self.0.store((tasks.start as u64) << 32 | tasks.end as u64, Ordering::Relaxed);
    }

    /// One of them: the first, or the last for another thread.
    fn take(&self, first: bool) -> Option<usize> {
        let mut tasks = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = (tasks >> 32, tasks & u64::from(u32::MAX));
            if start >= end {
                return None;
            }
            let (left, taken) =
                if first { ((start + 1) << 32 | end, start) } else { (start << 32 | (end - 1), end - 1) };
            match self.0.compare_exchange_weak(tasks, left, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken as usize),
                Err(now) => tasks = now,
            }
        }
    }
}

#[derive(Default)]
struct Shared {
    /// Counts loops; workers wait for it to change.
    epoch: AtomicUsize,
    slot: Mutex<Slot>,
    wake: Condvar,
    /// Of each thread, the caller first.
    parts: Vec<Part>,
    /// Workers that take part in the current loop and have not finished.
    busy: AtomicUsize,
    panicked: AtomicBool,
}

/// Threads that run parallel loops; the calling thread is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held for the length of a loop: callers of one pool take turns.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads (at least one: the caller).
    pub fn new(threads: usize) -> Self {
        let parts = (0..threads.max(1)).map(|_| Part::default()).collect();
        let shared = Arc::new(Shared { parts, ..Shared::default() });
        let workers = (1..threads.max(1))
            .map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("minke-{i}"))
                    .spawn(move || worker(&shared, i))
                    .expect("the system can start a thread")
            })
            .collect();
        Self { shared, turn: Mutex::new(()), workers }
    }

    /// Threads of a loop, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` for `i` in `0..tasks` and returns when all have returned.
    ///
    /// # Panics
    /// When a task panicked.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        if tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            (0..tasks).for_each(task);
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let shared = &*self.shared;
        assert!(u32::try_from(tasks).is_ok(), "a parallel loop of {tasks} tasks");
        let threads = shared.parts.len();
        for (i, part) in shared.parts.iter().enumerate() {
            part.set(i * tasks / threads..(i + 1) * tasks / threads);
        }
        let asleep = {
            let mut slot = shared.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // SAFETY: only the lifetime is erased; this function does not return before every worker that came in is
            // done, and none comes in after it closed the loop.
            let erased: *const Task<'static> =
                unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
            slot.job = Some(erased);
            shared.epoch.fetch_add(1, Ordering::Release);
            slot.asleep
        };
        if asleep > 0 {
            shared.wake.notify_all();
        }
        work(shared, 0, task);
        // closed: a worker that did not come in time is not waited for (its core may be busy with something else)
        shared.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner).job = None;
        let mut spins = 0u32;
        while shared.busy.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins > SPINS { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        drop(turn);
        assert!(!panicked, "a task of a parallel loop panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let mut slot = self.shared.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            slot.stop = true;
            // under the lock: a worker between its check and its wait must not miss this
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // a worker only ends by returning; its tasks' panics were caught
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, thread: usize, task: &Task<'_>) {
    INSIDE.set(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let (before, from) = shared.parts.split_at(thread);
        for (n, part) in from.iter().chain(before).enumerate() {
            while let Some(i) = part.take(n == 0) {
                task(i);
            }
        }
    }));
    INSIDE.set(false);
    if result.is_err() {
        shared.panicked.store(true, Ordering::Relaxed);
        shared.parts.iter().for_each(|part| part.set(0..0));
    }
}

fn worker(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0u32;
        while shared.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
            std::hint::spin_loop();
            spins += 1;
        }
        let mut slot = shared.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        while shared.epoch.load(Ordering::Acquire) == seen {
            slot.asleep += 1;
            slot = shared.wake.wait(slot).unwrap_or_else(std::sync::PoisonError::into_inner);
            slot.asleep -= 1;
        }
        seen = shared.epoch.load(Ordering::Acquire);
        let (stop, job) = (slot.stop, slot.job);
        if job.is_some() {
            // under the lock: the caller closes the loop under it, and then waits for those who came in
            shared.busy.fetch_add(1, Ordering::Relaxed);
        }
        drop(slot);
        if stop {
            return;
        }
        if let Some(task) = job {
            // SAFETY: this worker came in before the loop was closed, and `run` waits for it: the closure is alive.
            work(shared, thread, unsafe { &*task });
            shared.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..4 {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 17, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn loops_nest_and_panics_reach_the_caller() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(5, &|j| {
                sum.fetch_add(j, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 40);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(8, &|i| assert!(i != 3));
        }));
        assert!(caught.is_err());
        pool.run(2, &|_| {});
    }
}
