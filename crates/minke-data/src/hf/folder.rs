//! Replacing a whole folder.
//!
//! A checkpoint is several files that belong together. They are built in `NAME.tmp-PID` beside the target and
//! synced; then the old folder is renamed to `NAME.old-minke`, the new one to `NAME`, and the old one removed. A rename
//! is atomic, so whenever the process dies, one of these is on the disk:
//!
//! | `NAME` | `NAME.old-minke` | meaning | recovery |
//! |---|---|---|---|
//! | old | - | died while building | the temporary folder is litter |
//! | - | old | died between the renames | `NAME.old-minke` goes back to `NAME` |
//! | new | old | died while removing | `NAME.old-minke` is removed |
//!
//! [`recover_folder`] does the last column; it runs before every write and before a model is opened.

use std::fs;
use std::path::{Path, PathBuf};

use crate::files::{parent_of, remove_litter, sync_folder};
use crate::{Error, Result};

const OLD: &str = ".old-minke";
const TEMPORARY: &str = ".tmp-";

/// Builds a folder under a temporary name and puts it in the place of `target`, whole.
///
/// # Errors
/// What `build` gives, or I/O; the old folder is then as it was, and the half-built one removed.
pub fn write_folder_atomic(target: impl AsRef<Path>, build: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let target = target.as_ref();
    recover_folder(target)?;
    let temporary = beside(target, &format!("{TEMPORARY}{}", std::process::id()))?;
    let old = beside(target, OLD)?;
    remove_if_there(&temporary)?;
    fs::create_dir(&temporary).map_err(Error::io("create", &temporary))?;
    let built = build(&temporary).and_then(|()| sync_tree(&temporary));
    let moved = built.and_then(|()| {
        let replaces = target.symlink_metadata().is_ok();
        if replaces {
            fs::rename(target, &old).map_err(Error::io("replace", target))?;
        }
        if let Err(error) = fs::rename(&temporary, target) {
            if replaces {
                // back to where it was; recovery would do the same at the next start
                let _ = fs::rename(&old, target);
            }
            return Err(Error::io("replace", target)(error));
        }
        sync_folder(parent_of(target))
    });
    if moved.is_err() {
        // half-built and never announced
        let _ = fs::remove_dir_all(&temporary);
        return moved;
    }
    remove_if_there(&old)
}

/// Finishes or undoes a replacement that was cut off, and removes what dead processes left half-built.
///
/// # Errors
/// I/O.
pub fn recover_folder(target: impl AsRef<Path>) -> Result<()> {
    let target = target.as_ref();
    let old = beside(target, OLD)?;
    if old.is_dir() {
        if target.symlink_metadata().is_ok() {
            remove_if_there(&old)?;
        } else {
            fs::rename(&old, target).map_err(Error::io("recover", target))?;
            sync_folder(parent_of(target))?;
            tracing::info!(
                "{} was being replaced when a process died; the whole one is back",
                target.display()
            );
        }
    }
    let prefix = format!("{}{TEMPORARY}", target.file_name().unwrap_or_default().to_string_lossy());
    remove_litter(parent_of(target), &prefix);
    Ok(())
}

fn beside(target: &Path, suffix: &str) -> Result<PathBuf> {
    let name = target
        .file_name()
        .ok_or_else(|| Error::io("write", target)(std::io::Error::other("this names no folder")))?;
    let mut name = name.to_owned();
    name.push(suffix);
    Ok(target.with_file_name(name))
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// Makes every file and name below a folder durable.
fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let metadata = path.symlink_metadata().map_err(Error::io("read", &path))?;
        if metadata.is_dir() {
            sync_tree(&path)?;
        } else if metadata.is_file() {
            fs::File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io("sync", &path))?;
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(folder: &Path, text: &str) -> Result<()> {
        fs::create_dir_all(folder.join("inner")).unwrap();
        fs::write(folder.join("inner/a"), text).unwrap();
        fs::write(folder.join(text), text).map_err(Error::io("write", folder))
    }

    fn content(folder: &Path) -> String {
        let text = fs::read_to_string(folder.join("inner/a")).unwrap();
        assert!(folder.join(&text).is_file(), "the folder is whole");
        text
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        write_folder_atomic(&target, |folder| put(folder, "one")).unwrap();
        write_folder_atomic(&target, |folder| {
            assert_eq!(content(&target), "one", "the old one stays while the new one is built");
            put(folder, "two")
        })
        .unwrap();
        assert_eq!(content(&target), "two");
        assert!(!target.join("one").exists());
        assert_eq!(names(root.path()), ["model"]);
    }

    #[test]
    fn a_build_that_fails_leaves_the_old_one() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        write_folder_atomic(&target, |folder| put(folder, "one")).unwrap();
        let failed = write_folder_atomic(&target, |folder| {
            put(folder, "two")?;
            Err(Error::io("write", folder)(std::io::ErrorKind::StorageFull.into()))
        });
        assert!(failed.unwrap_err().to_string().contains("free some space"));
        assert_eq!(content(&target), "one");
        assert_eq!(names(root.path()), ["model"]);
        assert!(write_folder_atomic(root.path().join("no/such/model"), |_| Ok(())).is_err());
    }

    #[test]
    fn every_instant_of_a_replacement_can_be_recovered() {
        let root = tempfile::tempdir().unwrap();
        let (target, old) = (root.path().join("model"), root.path().join("model.old-minke"));
        let dead = root.path().join(format!("model.tmp-{}", u32::MAX));
        // while building
        put(&target, "one").unwrap();
        fs::create_dir(&dead).unwrap();
        recover_folder(&target).unwrap();
        assert_eq!((content(&target), names(root.path())), ("one".into(), vec!["model".into()]));
        // between the renames
        fs::rename(&target, &old).unwrap();
        put(&dead, "two").unwrap();
        recover_folder(&target).unwrap();
        assert_eq!((content(&target), names(root.path())), ("one".into(), vec!["model".into()]));
        // while removing
        put(&old, "zero").unwrap();
        fs::remove_file(old.join("zero")).unwrap();
        recover_folder(&target).unwrap();
        assert_eq!((content(&target), names(root.path())), ("one".into(), vec!["model".into()]));
    }

    #[test]
    fn folders_of_living_processes_and_of_other_names_stay() {
        let root = tempfile::tempdir().unwrap();
        let living = format!("model.tmp-{}", std::process::id());
        for name in [living.as_str(), "model.tmp-notes", "model2.tmp-4294967295"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        recover_folder(root.path().join("model")).unwrap();
        assert_eq!(names(root.path()).len(), 3);
    }
}
