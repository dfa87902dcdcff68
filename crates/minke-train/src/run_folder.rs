//! The folder of a run: what lies where, and that one process writes it at a time.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::error::{Result, TrainError};

/// Held by the process that trains; the system lets go of it however that process ends.
const LOCK: &str = ".lock";
/// The resolved recipe, by which a run's folder is known: it is written before anything else.
pub const RECIPE: &str = "recipe.toml";

/// A run's folder, held by this process.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// What was made for it.
    made: Vec<PathBuf>,
    /// Whether nothing was in it when it was taken.
    was_empty: bool,
    _lock: File,
}

impl RunFolder {
    /// Takes the folder, making it if there is none.
    ///
    /// # Errors
    /// As [`RunFolder::take_with`].
    pub fn take(path: &Path, resume: bool) -> Result<Self> {
        Self::take_with(path, resume, RECIPE)
    }

    /// Takes the folder of a run that is known by another file than its recipe, making it if there is none.
    ///
    /// # Errors
    /// It cannot be written to, another process has it, or it holds something, and either `resume` is not said or what it
    /// holds is no run.
    pub fn take_with(path: &Path, resume: bool, known_by: &str) -> Result<Self> {
        let made = absent(path);
        fs::create_dir_all(path).map_err(TrainError::io("create the run's folder", path))?;
        let is_run = path.join(known_by).is_file();
        let was_empty = is_empty(path)?;
        if !(resume && is_run || was_empty) {
            return Err(TrainError::Occupied { path: path.to_owned(), is_run });
        }
        let lock_path = path.join(LOCK);
        let lock =
            File::create(&lock_path).map_err(TrainError::io("write to the run's folder", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(TrainError::Busy { path: path.to_owned() }),
            // some network file systems have no locks: nothing to hold, nothing to wait for
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(TrainError::io("lock", &lock_path)(error)),
        }
        let folder = Self { path: path.to_owned(), made, was_empty, _lock: lock };
        let checkpoints = folder.checkpoints();
        fs::create_dir_all(&checkpoints).map_err(TrainError::io("create", &checkpoints))?;
        Ok(folder)
    }

    /// Removes what a run wrote that ended before its first step, so that it can be started as if it had not been.
    ///
    /// # Errors
    /// I/O.
    pub fn clear(&self) -> Result<()> {
        if self.was_empty {
            // the recipe last, as it came first
            for path in [self.metrics(), self.recipe()] {
                fs::remove_file(&path).map_err(TrainError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The resolved recipe.
    pub fn recipe(&self) -> PathBuf {
        self.path.join(RECIPE)
    }

    /// The metrics.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The model's folder, the result.
    pub fn model(&self) -> PathBuf {
        self.path.join("model")
    }
}

impl Drop for RunFolder {
    /// A run that failed before it wrote anything leaves nothing.
    fn drop(&mut self) {
        if is_empty(&self.path).unwrap_or(false) {
            // what cannot be removed is in nobody's way
            let _ = fs::remove_dir(self.checkpoints());
            let _ = fs::remove_file(self.recipe().with_extension("tmp"));
            let _ = fs::remove_file(self.path.join(LOCK));
            remove_empty(&self.made);
        }
    }
}

/// A folder and those around it that are not there yet, the innermost first.
pub fn absent(path: &Path) -> Vec<PathBuf> {
    let named = path.ancestors().take_while(|path| !path.as_os_str().is_empty());
    named.take_while(|path| !path.exists()).map(Path::to_owned).collect()
}

/// Removes folders, the innermost first, as far as nothing is in them.
pub fn remove_empty(folders: &[PathBuf]) {
    let _ = folders.iter().try_for_each(fs::remove_dir);
}

/// Whether nothing was ever written here but what [`RunFolder::take`] makes, and a recipe that was cut off: a run that
/// ended before its first step.
fn is_empty(path: &Path) -> Result<bool> {
    for entry in fs::read_dir(path).map_err(TrainError::io("read", path))? {
        let entry = entry.map_err(TrainError::io("read", path))?;
        let name = entry.file_name();
        let bare = name == LOCK
            || name == "recipe.tmp"
            || name == "checkpoints"
                && fs::read_dir(entry.path()).is_ok_and(|mut entries| entries.next().is_none());
        if !bare {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes a file whole or not at all.
///
/// # Errors
/// I/O; what was there before is then untouched.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let temporary = path.with_extension("tmp");
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(TrainError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_taken_once_and_never_written_over() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("runs/a");
        let held = RunFolder::take(&path, false).unwrap();
        // the lock belongs to the open file, so a second one of this process stands for another process
        assert!(matches!(RunFolder::take(&path, true), Err(TrainError::Busy { .. })));
        drop(held);
        assert!(!root.path().join("runs").exists(), "nothing was written, and something is left");
        fs::create_dir_all(&path).unwrap();
        drop(RunFolder::take(&path, false).unwrap());
        assert!(path.exists(), "it was there before");
        fs::write(path.join("recipe.tmp"), "cut o").unwrap();
        drop(RunFolder::take(&path, false).unwrap());
        assert!(!path.join("recipe.tmp").exists());
        fs::write(path.join("metrics.jsonl"), "kept").unwrap();
        // what is no run is nobody's to go on with
        for resume in [false, true] {
            let error = RunFolder::take(&path, resume).unwrap_err().to_string();
            assert!(error.contains("holds no such run") && error.contains("--out"), "{error}");
            assert!(!error.contains("--resume"), "{error}");
        }
        assert_eq!(fs::read(path.join("metrics.jsonl")).unwrap(), b"kept");
        assert!(RunFolder::take_with(&path, true, "metrics.jsonl").is_ok());
        fs::write(path.join(RECIPE), "").unwrap();
        let error = RunFolder::take(&path, false).unwrap_err().to_string();
        for option in ["--resume", "--out", "delete"] {
            assert!(error.contains(option), "{error}");
        }
        assert!(RunFolder::take(&path, true).is_ok());
        let error = RunFolder::take(&path.join("metrics.jsonl"), false).unwrap_err().to_string();
        assert!(
            error.contains("cannot create the run's folder") && error.contains("metrics.jsonl"),
            "{error}"
        );
    }
}
