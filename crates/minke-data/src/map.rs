//! Memory-mapped files: the one place of this crate with `unsafe`.
//!
//! A map is a view of a file that the operating system pages in as it is touched. The danger is a file that
//! another program cuts short while it is mapped: touching the lost part then kills the process. Minke never
//! changes a file in place (it writes a new one and renames it, and a map keeps the old file alive), so only
//! a foreign program that truncates a model under our feet can do that.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use crate::{Error, Result};

/// The bytes of a file, read-only.
#[derive(Debug)]
pub struct MappedFile {
    // an empty file cannot be mapped everywhere
    map: Option<memmap2::Mmap>,
    /// Whether pages of it may be memory of the process, which must not be let go.
    near: Mutex<bool>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read", path))?;
        if !metadata.is_file() {
            return Err(Error::io("map", path)(std::io::Error::other("not a plain file")));
        }
        if metadata.len() == 0 {
            return Ok(Self { map: None, near: Mutex::new(false) });
        }
        // SAFETY: the map is read-only and private to this struct, which hands out shared slices only; that
        // no one shortens the file meanwhile is the module's documented assumption about other programs
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(Self { map: Some(map), near: Mutex::new(false) })
    }

    /// Lets go of the pages of some bytes: they no longer count as memory of this process, and come back from the file
    /// if they are read again. A hint that changes no byte.
    pub fn forget(&self, bytes: Range<usize>) {
        #[cfg(unix)]
        if let (Some(map), near) = (&self.map, self.near.lock().unwrap_or_else(PoisonError::into_inner))
            && !*near
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and of a file, so its pages hold nothing that the file does not
            let _ = unsafe { map.unchecked_advise_range(advice, bytes.start, bytes.len()) };
        }
        #[cfg(not(unix))]
        let _ = bytes;
    }

    /// Puts copies of some bytes, in huge pages of the process, in the place of their pages of the file, one piece after
    /// another; what reads them meanwhile notices nothing. A map of a file has small pages, and the processor looks up each of
    /// them: with huge ones two cores of a Xeon read a third more in the same time. Takes no more memory than a piece beside
    /// the bytes themselves.
    ///
    /// Ends early when told to `stop`, or when there is no memory; bytes at the ends that fill no huge page stay. Nothing
    /// happens on other systems than Linux.
    pub fn bring_near(&self, bytes: &[Range<usize>], stop: &AtomicBool) {
        #[cfg(target_os = "linux")]
        if let Some(map) = &self.map {
            *self.near.lock().unwrap_or_else(PoisonError::into_inner) = true;
            near::bring(map, bytes, stop);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (bytes, stop);
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(target_os = "linux")]
mod near {
    use std::ffi::c_void;
    use std::ops::Range;
    use std::ptr;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::mm;

    /// Bytes of a huge page.
    const HUGE: usize = 2 << 20;

    /// Bytes that are replaced at once, at least.
    const PIECE: usize = 8 << 20;

    /// Pieces of a map, about: each is an entry in the process's list of mappings, which has room for 65,530, and a model may
    /// have some hundred files.
    const PIECES: usize = 128;

    /// As [`MappedFile::bring_near`](super::MappedFile::bring_near).
    pub fn bring(map: &[u8], bytes: &[Range<usize>], stop: &AtomicBool) {
        let start = map.as_ptr().addr();
        let most = start.next_multiple_of(HUGE)..(start + map.len()) / HUGE * HUGE;
        let piece = (map.len() / PIECES).next_multiple_of(HUGE).max(PIECE);
        let mut wanted: Vec<&Range<usize>> = bytes.iter().filter(|bytes| !bytes.is_empty()).collect();
        wanted.sort_unstable_by_key(|bytes| bytes.start);
        let mut done = most.start;
        for bytes in wanted {
            let end = (start + bytes.end).next_multiple_of(HUGE).min(most.end);
            let mut at = done.max((start + bytes.start) / HUGE * HUGE);
            while at < end {
                let to = end.min(at + piece);
                if stop.load(Ordering::Relaxed) || replace(&map[at - start..to - start]).is_err() {
                    return;
                }
                at = to;
            }
            done = done.max(end);
        }
    }

    /// Puts a copy in the place of whole huge pages of a map.
    fn replace(pages: &[u8]) -> rustix::io::Result<()> {
        let (len, room) = (pages.len(), pages.len() + HUGE);
        let place = pages.as_ptr().cast_mut().cast::<c_void>();
        // SAFETY: the new mapping is this function's until it takes the place of pages that have the same bytes and are
        // read-only as well; the system exchanges them between two reads. `MappedFile` owns that place, gives it back with the
        // rest of the map, and no longer lets its pages go.
        unsafe {
            let readable = mm::ProtFlags::READ | mm::ProtFlags::WRITE;
            let memory = mm::mmap_anonymous(ptr::null_mut(), room, readable, mm::MapFlags::PRIVATE)?;
            let before = memory.addr().next_multiple_of(HUGE) - memory.addr();
            let copy = memory.byte_add(before);
            let _ = mm::madvise(copy, len, mm::Advice::LinuxHugepage);
            ptr::copy_nonoverlapping(pages.as_ptr(), copy.cast::<u8>(), len);
            let moved = mm::mprotect(copy, len, mm::MprotectFlags::READ)
                .and_then(|()| mm::mremap_fixed(copy, len, len, mm::MremapFlags::MAYMOVE, place));
            if before > 0 {
                let _ = mm::munmap(memory, before);
            }
            if moved.is_err() {
                let _ = mm::munmap(copy, len);
            }
            if before < HUGE {
                let _ = mm::munmap(copy.byte_add(len), HUGE - before);
            }
            moved.map(|_| ())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_come_near_are_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let bytes: Vec<u8> = (0..(24 << 20) + 4099u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = MappedFile::open(&path).unwrap();
        let wanted = [(13 << 20)..bytes.len(), 100..(3 << 20), (3 << 20)..(3 << 20) + 17];
        let of_file = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
            let sizes = maps.lines().filter(|line| line.ends_with(path.to_str().unwrap())).map(|line| {
                let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                usize::from_str_radix(to, 16).unwrap() - usize::from_str_radix(from, 16).unwrap()
            });
            sizes.sum::<usize>()
        };
        let all = of_file();
        file.bring_near(&wanted, &AtomicBool::new(true));
        assert_eq!(of_file(), all, "stopped before it began");
        let reading = std::thread::scope(|scope| {
            let reading = scope.spawn(|| (0..5).all(|_| file[..] == bytes[..]));
            file.bring_near(&wanted, &AtomicBool::new(false));
            reading.join().unwrap()
        });
        assert!(reading && file[..] == bytes[..]);
        // pages of the process are not let go
        file.forget(0..bytes.len());
        assert!(file[..] == bytes[..]);
        if cfg!(target_os = "linux") {
            let left = of_file();
            assert!((8 << 20..14 << 20).contains(&left), "{left} of {all} bytes still belong to the file");
        }
        // a second time it is a copy of the copy
        file.bring_near(&wanted, &AtomicBool::new(false));
        assert!(file[..] == bytes[..]);
        drop(file);
        assert_eq!(of_file(), 0);
    }
}
