//! Writing so that a reader sees the old file or the new one, never half of either.
//!
//! A file is written beside its place under a temporary name, synced, and renamed over it; the folder is
//! synced last, so that the rename itself survives a power cut.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// A file under a temporary name, which [`AtomicFile::commit`] moves to its place and a drop removes.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    writer: BufWriter<File>,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl AtomicFile {
    pub(crate) fn create(target: &Path) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = target
            .file_name()
            .ok_or_else(|| Error::io("write", target)(std::io::Error::other("this names no file")))?;
        let prefix = format!(".{}.tmp-", name.to_string_lossy());
        remove_litter(parent_of(target), &prefix);
        let (process, number) = (std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let temporary = target.with_file_name(format!("{prefix}{process}-{number}"));
        let file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
        let writer = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { writer, temporary, target: target.to_owned(), committed: false })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(Error::io("write", &self.target))
    }

    /// Overwrites the first bytes, for headers that are known last.
    pub(crate) fn write_head(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.seek(SeekFrom::Start(0)).map_err(Error::io("write", &self.target))?;
        self.write(bytes)
    }

    pub(crate) fn commit(mut self) -> Result<()> {
        self.writer.flush().map_err(Error::io("write", &self.target))?;
        self.writer.get_ref().sync_all().map_err(Error::io("sync", &self.target))?;
        fs::rename(&self.temporary, &self.target).map_err(Error::io("replace", &self.target))?;
        self.committed = true;
        sync_folder(parent_of(&self.target))
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // the file was never promised to anyone; if it cannot be removed it is only litter
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole file atomically.
pub(crate) fn write_atomic(target: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(target)?;
    file.write(bytes)?;
    file.commit()
}

/// Removes what dead processes left half-written in a folder: `prefix`, the process, and `-` with more or nothing.
pub(crate) fn remove_litter(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix(prefix).and_then(|rest| rest.split('-').next()?.parse().ok());
        if process.is_some_and(is_dead) {
            // litter on a read-only disk is no reason to stop
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

/// Known to be dead: only where the system lists its processes.
fn is_dead(process: u32) -> bool {
    Path::new("/proc/self").exists() && !Path::new(&format!("/proc/{process}")).exists()
}

/// The folder that holds `path`.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|handle| handle.sync_all()).map_err(Error::io("sync", folder))
}

/// Reads a whole file of at most `limit_bytes`.
pub(crate) fn read_bounded(path: &Path, limit_bytes: u64) -> Result<Vec<u8>> {
    use std::io::Read;
    let file = File::open(path).map_err(Error::io("open", path))?;
    let length = file.metadata().map_or(0, |metadata| metadata.len()).min(limit_bytes);
    let mut bytes = Vec::with_capacity(length as usize + 1);
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit_bytes {
        let reason = format!("larger than the {limit_bytes} bytes that such a file may have");
        return Err(Error::io("read", path)(std::io::Error::other(reason)));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abandoned_write_leaves_the_old_file_and_no_litter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        write_atomic(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write(b"half of the new").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn what_a_dead_process_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        // no process has so high a number
        let [dead, alive, other] = [
            ".a.bin.tmp-4194305-0",
            &format!(".a.bin.tmp-{}-77", std::process::id()),
            ".b.bin.tmp-4194305-0",
        ]
        .map(|name| folder.path().join(name));
        for litter in [&dead, &alive, &other] {
            fs::write(litter, b"half").unwrap();
        }
        write_atomic(&path, b"new").unwrap();
        assert_eq!(dead.exists(), !Path::new("/proc/self").exists());
        assert!(alive.exists() && other.exists());
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = write_atomic(Path::new("/nonexistent-minke/a.bin"), b"x").unwrap_err();
        assert!(error.to_string().contains("/nonexistent-minke/"), "{error}");
    }

    #[test]
    fn reading_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, [1; 11]).unwrap();
        assert!(read_bounded(&path, 10).is_err());
        assert_eq!(read_bounded(&path, 11).unwrap().len(), 11);
    }
}
