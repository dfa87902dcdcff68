//! Memory-mapped files: the one place of this crate with `unsafe`.
//!
//! A map is a view of a file that the operating system pages in as it is touched. The danger is a file that
//! another program cuts short while it is mapped: touching the lost part then kills the process. Minke never
//! changes a file in place (it writes a new one and renames it, and a map keeps the old file alive), so only
//! a foreign program that truncates a model under our feet can do that.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use crate::{Error, Result};

/// The bytes of a file, read-only.
#[derive(Debug)]
pub struct MappedFile {
    // an empty file cannot be mapped everywhere
    map: Option<memmap2::Mmap>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read", path))?;
        if !metadata.is_file() {
            return Err(Error::io("map", path)(std::io::Error::other("not a plain file")));
        }
        if metadata.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the map is read-only and private to this struct, which hands out shared slices only; that
        // no one shortens the file meanwhile is the module's documented assumption about other programs
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(Self { map: Some(map) })
    }

    /// Lets go of the pages of some bytes: they no longer count as memory of this process, and come back from the file
    /// if they are read again. A hint that changes no byte.
    pub fn forget(&self, bytes: std::ops::Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and of a file, so its pages hold nothing that the file does not
            let _ = unsafe { map.unchecked_advise_range(advice, bytes.start, bytes.len()) };
        }
        #[cfg(not(unix))]
        let _ = bytes;
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
