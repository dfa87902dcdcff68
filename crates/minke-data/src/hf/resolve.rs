//! From what a person typed to a folder.

use std::fs;
use std::path::{Path, PathBuf};

use super::recover_folder;
use crate::gguf::is_gguf;
use crate::paths::expand_path;
use crate::{Error, Result};

/// Finds the model that an argument means: its folder, or its GGUF file.
///
/// In this order: a file that ends in `.gguf`; a folder with `config.json`; the `model/` folder of a run; the highest `checkpoints/step-N` of a
/// run (itself or its `model/`); a hub id `OWNER/NAME` in the local cache. A replacement that was cut off
/// is recovered on the way.
///
/// # Errors
/// Nothing is found; the text says what to do.
pub fn resolve_model(argument: &str) -> Result<PathBuf> {
    let path = expand_path(argument).map_err(|reason| Error::model(argument, reason))?;
    if is_gguf(&path) && !path.is_dir() {
        return if path.is_file() { Ok(path) } else { Err(Error::model(argument, "there is no such file")) };
    }
    if path.file_name().is_some() {
        // a replacement that died may have left the folder under its other name; reading must work without
        // the right to write, so a failure here is no failure
        let _ = recover_folder(&path);
    }
    if path.is_file() {
        let reason = "this is no .gguf file; give one, or the folder that holds config.json and the weights";
        return Err(Error::model(argument, reason));
    }
    if path.is_dir() {
        return in_folder(&path).ok_or_else(|| {
            let reason = "the folder has no config.json, no model/config.json and no checkpoints/step-N with one; \
                          a run that was stopped before its first checkpoint has no model yet";
            Error::model(argument, reason)
        });
    }
    if hub_id(argument).is_some() {
        return cached_snapshot("models", argument);
    }
    Err(Error::model(argument, "there is no such folder, and it is no hub id of the form OWNER/NAME"))
}

fn in_folder(folder: &Path) -> Option<PathBuf> {
    let is_model = |folder: &Path| folder.join("config.json").is_file();
    let itself_or_inside = |folder: PathBuf| {
        if is_model(&folder) {
            return Some(folder);
        }
        let inside = folder.join("model");
        // as above
        let _ = recover_folder(&inside);
        is_model(&inside).then_some(inside)
    };
    if let Some(found) = itself_or_inside(folder.to_owned()) {
        return Some(found);
    }
    let checkpoints = folder.join("checkpoints");
    let mut steps: Vec<(u64, PathBuf)> = fs::read_dir(&checkpoints)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let name = name.strip_suffix(".old-minke").unwrap_or(&name);
            let step = name.strip_prefix("step-")?.parse().ok()?;
            Some((step, checkpoints.join(name)))
        })
        .collect();
    steps.sort();
    steps.into_iter().rev().find_map(|(_, path)| {
        let _ = recover_folder(&path);
        itself_or_inside(path)
    })
}

/// OWNER and NAME, if the text is a hub id and nothing that could leave the cache.
fn hub_id(text: &str) -> Option<(&str, &str)> {
    let (owner, name) = text.split_once('/')?;
    let plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with('.')
            && !part.contains("..")
            && part.chars().all(allowed)
    };
    (plain(owner) && plain(name)).then_some((owner, name))
}

/// The snapshot of a hub repository in the local cache; `kind` is `models` or `datasets`.
pub(crate) fn cached_snapshot(kind: &str, id: &str) -> Result<PathBuf> {
    snapshot_in(&hub_cache(&|name| std::env::var(name).ok().filter(|value| !value.is_empty())), kind, id)
}

fn hub_cache(lookup: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    if let Some(folder) = lookup("HF_HUB_CACHE") {
        return PathBuf::from(folder);
    }
    let user_cache = || match lookup("XDG_CACHE_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(&lookup("HOME").unwrap_or_default()).join(".cache"),
    };
    let home = lookup("HF_HOME").map_or_else(|| user_cache().join("huggingface"), PathBuf::from);
    home.join("hub")
}

fn snapshot_in(cache: &Path, kind: &str, id: &str) -> Result<PathBuf> {
    let Some((owner, name)) = hub_id(id) else {
        return Err(Error::model(id, "a hub id has the form OWNER/NAME"));
    };
    let repository = cache.join(format!("{kind}--{owner}--{name}"));
    let snapshots = repository.join("snapshots");
    let (option, or_a_folder) = match kind {
        "datasets" => (" --repo-type dataset", ""),
        _ => ("", "there is no such folder, and it is "),
    };
    let absent = || {
        let reason = format!(
            "{or_a_folder}not in the local cache {}; Minke does not download: run `hf download{option} {id}` where there is a \
             network, or give a folder",
            cache.display()
        );
        Error::model(id, reason)
    };
    if let Ok(commit) = crate::files::read_bounded(&repository.join("refs/main"), 256) {
        let commit = String::from_utf8_lossy(&commit).trim().to_owned();
        let plain = !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric());
        let folder = snapshots.join(&commit);
        return if plain && folder.is_dir() { Ok(folder) } else { Err(absent()) };
    }
    let mut folders: Vec<PathBuf> = fs::read_dir(&snapshots)
        .map_err(|_| absent())?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    match (folders.pop(), folders.is_empty()) {
        (Some(only), true) => Ok(only),
        (None, _) => Err(absent()),
        (Some(_), false) => {
            let reason = format!(
                "several snapshots in {} and no refs/main; give the folder of one",
                snapshots.display()
            );
            Err(Error::model(id, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), "{}").unwrap();
    }

    #[test]
    fn folders_and_runs_are_found() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        let resolve = || resolve_model(run.to_str().unwrap());
        assert!(resolve().unwrap_err().to_string().contains("no such folder"));
        fs::create_dir_all(run.join("checkpoints/step-x")).unwrap();
        assert!(resolve().unwrap_err().to_string().contains("no model yet"));
        model(&run.join("checkpoints/step-9"));
        model(&run.join("checkpoints/step-10/model"));
        fs::create_dir_all(run.join("checkpoints/step-11")).unwrap();
        assert_eq!(resolve().unwrap(), run.join("checkpoints/step-10/model"));
        // a checkpoint that was being replaced
        model(&run.join("checkpoints/step-12.old-minke"));
        assert_eq!(resolve().unwrap(), run.join("checkpoints/step-12"));
        model(&run.join("model.old-minke"));
        assert_eq!(resolve().unwrap(), run.join("model"));
        model(&run);
        assert_eq!(resolve().unwrap(), run);
        fs::rename(&run, root.path().join("run.old-minke")).unwrap();
        assert_eq!(resolve().unwrap(), run);
        let file = run.join("config.json");
        assert!(resolve_model(file.to_str().unwrap()).unwrap_err().to_string().contains("or the folder"));
        let gguf = run.join("model.gguf");
        fs::write(&gguf, "GGUF").unwrap();
        assert_eq!(resolve_model(gguf.to_str().unwrap()).unwrap(), gguf);
    }

    #[test]
    fn what_cannot_be_read_says_so() {
        let gguf = resolve_model("x/model.GGUF").unwrap_err().to_string();
        assert!(gguf.contains("there is no such file"), "{gguf}");
        let hub = resolve_model("nobody-at-all/nothing").unwrap_err().to_string();
        assert!(hub.contains("there is no such folder, and it is not in the local cache"), "{hub}");
        assert!(hub.contains("hf download nobody-at-all/nothing"), "{hub}");
        for text in ["../x", "a/b/c", "", "a/..", "/", "a/b c"] {
            assert!(resolve_model(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_cache_is_found_and_cannot_be_left() {
        let root = tempfile::tempdir().unwrap();
        let lookup = |pairs: &'static [(&str, &str)]| {
            hub_cache(&|name| {
                pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(lookup(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]), Path::new("/c"));
        assert_eq!(lookup(&[("HF_HOME", "/h")]), Path::new("/h/hub"));
        assert_eq!(lookup(&[("HOME", "/u")]), Path::new("/u/.cache/huggingface/hub"));

        let repository = root.path().join("models--a--b");
        let find = || snapshot_in(root.path(), "models", "a/b");
        assert!(find().is_err());
        model(&repository.join("snapshots/abc"));
        assert_eq!(find().unwrap(), repository.join("snapshots/abc"));
        model(&repository.join("snapshots/def"));
        assert!(find().unwrap_err().to_string().contains("several"));
        fs::create_dir_all(repository.join("refs")).unwrap();
        for (commit, found) in [("abc\n", true), ("gone", false), ("../../x", false), ("", false)] {
            fs::write(repository.join("refs/main"), commit).unwrap();
            assert_eq!(find().is_ok(), found, "{commit}");
        }
        for id in ["a/../b", "../b", "a", "a/b/c", "a/.b"] {
            assert!(snapshot_in(root.path(), "models", id).is_err(), "{id}");
        }
    }
}
