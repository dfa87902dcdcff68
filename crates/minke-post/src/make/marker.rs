//! What was done, on the disk: `stages/NAME.json` beside each stage's recipe, written whole or not at all.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use minke_train::run_folder::{absent, remove_empty};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::MakeError;
use super::pipeline::{Pipeline, Stage};
use crate::metrics::Values;

/// Changes whenever an older program would misread what is stored.
const VERSION: u32 = 1;
/// No marker is longer.
const MAX_BYTES: u64 = 16 << 20;
/// Held by the process that makes the pipeline.
const LOCK: &str = ".make-lock";
/// Folder of the stages' recipes and markers.
pub(super) const STAGES: &str = "stages";

/// What a finished stage says about itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageResult {
    /// What it did, as rows for people.
    pub facts: Vec<(String, String)>,
    /// What its model was found to be able to do: `pass@1`, `pass@1/FAMILY`, `pass@1/FAMILY:LEVEL`, `thought`.
    pub scores: Option<Values>,
}

/// How far a stage is, and what it was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Marker {
    version: u32,
    /// Hash of everything that decides what the stage makes.
    pub identity: String,
    /// Its kind.
    pub kind: String,
    /// Its recipe as the pipeline gave it.
    pub recipe: String,
    /// Identities of the stages that it uses.
    pub inputs: BTreeMap<String, String>,
    /// Seconds of work so far.
    pub seconds: f64,
    /// What came of it; `None` while it is in work.
    pub result: Option<StageResult>,
}

/// A pipeline's folder, held by this process.
pub(super) struct Folder {
    path: PathBuf,
    /// What was made for it.
    made: Vec<PathBuf>,
    _lock: File,
}

impl Marker {
    /// The marker of a stage as it is given now, with its inputs' identities.
    pub fn now(stage: &Stage, inputs: BTreeMap<String, String>) -> Result<Self, MakeError> {
        let recipe = text(stage, &stage.recipe)?;
        let whole = format!("{VERSION}\n{}\n{recipe}\n{inputs:?}", stage.kind.name);
        let identity = blake3::hash(whole.as_bytes()).to_hex().to_string();
        let kind = stage.kind.name.to_owned();
        Ok(Self { version: VERSION, identity, kind, recipe, inputs, seconds: 0.0, result: None })
    }

    /// What differs from what is given now: keys of the recipe first, else the inputs. Empty when nothing does.
    pub fn differences(&self, now: &Self, stage: &str) -> Vec<String> {
        let shown = |value: Option<&String>| value.cloned().unwrap_or_else(|| "nothing".to_owned());
        let mut lines = Vec::new();
        if self.kind != now.kind {
            lines.push(format!("  {stage}.kind: was {:?}, is {:?}", self.kind, now.kind));
        }
        let (was, is) = (leaves(&self.recipe), leaves(&now.recipe));
        let keys: std::collections::BTreeSet<&String> = was.keys().chain(is.keys()).collect();
        for key in keys {
            if was.get(key) != is.get(key) {
                let (was, is) = (shown(was.get(key)), shown(is.get(key)));
                lines.push(format!("  {stage}.{key}: was {was}, is {is}"));
            }
        }
        if lines.is_empty() {
            let changed =
                now.inputs.iter().filter(|(name, identity)| self.inputs.get(*name) != Some(*identity));
            lines.extend(
                changed.map(|(name, _)| format!("  its input `{name}` is another than it was made from")),
            );
        }
        lines
    }
}

/// A recipe as TOML text, its keys sorted.
pub(super) fn text(stage: &Stage, recipe: &Table) -> Result<String, MakeError> {
    toml::to_string(recipe)
        .map_err(|error| MakeError::Unwritable { stage: stage.name.clone(), reason: error.to_string() })
}

fn leaves(recipe: &str) -> BTreeMap<String, String> {
    fn flatten(prefix: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
        match value {
            Value::Table(table) => {
                for (key, value) in table {
                    let dot = if prefix.is_empty() { "" } else { "." };
                    flatten(&format!("{prefix}{dot}{key}"), value, leaves);
                }
            }
            leaf => {
                leaves.insert(prefix.to_owned(), leaf.to_string());
            }
        }
    }
    let mut found = BTreeMap::new();
    // what is no TOML any more differs as a whole
    match toml::from_str::<Table>(recipe) {
        Ok(table) => flatten("", &Value::Table(table), &mut found),
        Err(_) => flatten("recipe", &Value::String(recipe.to_owned()), &mut found),
    }
    found
}

impl Folder {
    /// Takes the folder, making it if there is none; `again` says that it may hold a pipeline already.
    pub fn take(path: &Path, again: bool) -> Result<Self, MakeError> {
        let (stages, made) = (path.join(STAGES), absent(path));
        let is_pipeline = kinds(&stages).iter().any(|kind| kind == "toml" || kind == "json");
        if !(again && is_pipeline || is_fresh(path)?) {
            return Err(MakeError::Occupied { path: path.to_owned(), is_pipeline });
        }
        fs::create_dir_all(&stages).map_err(MakeError::io("create the pipeline's folder", &stages))?;
        let lock_path = path.join(LOCK);
        let lock =
            File::create(&lock_path).map_err(MakeError::io("write to the pipeline's folder", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(MakeError::Busy { path: path.to_owned() }),
            // some network file systems have no locks: nothing to hold, nothing to wait for
            Err(fs::TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(fs::TryLockError::Error(error)) => return Err(MakeError::io("lock", &lock_path)(error)),
        }
        Ok(Self { path: path.to_owned(), made, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a stage's recipe lies, complete.
    pub fn recipe(&self, stage: &str) -> PathBuf {
        self.path.join(STAGES).join(format!("{stage}.toml"))
    }

    /// Where a stage works.
    pub fn stage(&self, stage: &str) -> PathBuf {
        self.path.join(stage)
    }

    fn marker_path(&self, stage: &str) -> PathBuf {
        self.path.join(STAGES).join(format!("{stage}.json"))
    }

    /// What is known of a stage; `None` before it began.
    pub fn marker(&self, stage: &str) -> Result<Option<Marker>, MakeError> {
        let path = self.marker_path(stage);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(MakeError::io("open", &path)(error)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(MakeError::io("read", &path))?;
        let marker: Marker = serde_json::from_slice(&bytes)
            .map_err(|error| MakeError::Marker { path: path.clone(), reason: error.to_string() })?;
        if marker.version != VERSION {
            let reason = format!("version {} is not {VERSION}, which this program writes", marker.version);
            return Err(MakeError::Marker { path, reason });
        }
        Ok(Some(marker))
    }

    /// Stores what is known of a stage.
    pub fn mark(&self, stage: &str, marker: &Marker) -> Result<(), MakeError> {
        let mut bytes = serde_json::to_vec_pretty(marker).expect("plain data serialises");
        bytes.push(b'\n');
        replace(&self.marker_path(stage), &bytes)
    }

    /// Forgets a stage and removes what it made.
    pub fn forget(&self, stage: &str) -> Result<(), MakeError> {
        let absent_is_fine = |path: &Path, result: std::io::Result<()>| match result {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(MakeError::io("remove", path)(error))
            }
            _ => Ok(()),
        };
        // the marker first: a folder without one is not taken for a finished stage
        let (marker, folder) = (self.marker_path(stage), self.stage(stage));
        absent_is_fine(&marker, fs::remove_file(&marker))?;
        absent_is_fine(&folder, fs::remove_dir_all(&folder))
    }

    /// Whether a stage's folder holds anything but a lock and empty folders, as one that failed at once leaves.
    pub fn has_begun(&self, stage: &str) -> bool {
        let is_empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        fs::read_dir(self.stage(stage)).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| {
                    !entry.file_name().to_string_lossy().starts_with('.') && !is_empty(&entry.path())
                })
            })
        })
    }

    /// Writes a stage's complete recipe.
    pub fn write_recipe(&self, pipeline: &Pipeline, stage: &Stage) -> Result<(), MakeError> {
        let path = self.recipe(&stage.name);
        let recipe = text(stage, &pipeline.resolved(stage, &self.path))?;
        let alone = stage.kind.command.map(|command| format!(": `minke {command}` runs it alone"));
        let head = format!("# Stage {} of {}{}.\n", stage.name, pipeline.name, alone.unwrap_or_default());
        replace(&path, format!("{head}{recipe}").as_bytes())
    }
}

impl Drop for Folder {
    /// A pipeline whose recipe is wrong leaves nothing.
    fn drop(&mut self) {
        // a folder that holds something is not removed
        if fs::remove_dir(self.path.join(STAGES)).is_ok() {
            let _ = fs::remove_file(self.path.join(LOCK));
            remove_empty(&self.made);
        }
    }
}

/// Whether nothing was ever made here: there may be recipes that were written down and found wrong.
fn is_fresh(path: &Path) -> Result<bool, MakeError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(MakeError::io("read", path)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(MakeError::io("read", path))?;
        let name = entry.file_name();
        if !(name == LOCK || name == STAGES && kinds(&entry.path()).iter().all(|kind| kind == "toml")) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The endings of the files in the folder of recipes (`toml`) and markers (`json`).
fn kinds(stages: &Path) -> Vec<OsString> {
    let entries = fs::read_dir(stages).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().extension().unwrap_or_default().to_owned()).collect()
}

/// Writes a file whole or not at all.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), MakeError> {
    let temporary = path.with_extension("tmp");
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(MakeError::io("write", path))
}
