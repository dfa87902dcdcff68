//! Checkpoints: the model as a Hugging Face folder, with what training needs to go on inside it.
//!
//! ```text
//! checkpoints/step-200/
//!   config.json  generation_config.json  model.safetensors  tokenizer.json ...     a model for everyone
//!   training/state.json           step, tokens, time, seed, data
//!   training/state.safetensors    f32 masters, moments of the optimizer
//!   training/manifest.json        size and blake3 of every file above
//! ```
//!
//! A weight whose products run in bf16 is stored in bf16: the products round it to bf16 anyway, so the folder is the
//! model that trained, to the bit. The f32 masters, which remember what rounding drops, are training's own.
//!
//! A folder is built under another name and renamed, so a killed process leaves a whole checkpoint or none. The
//! manifest is for what happens afterwards, to disks and by hands: a checkpoint that does not match it is named,
//! left alone, and the one before it is taken.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use minke_cpu::{Cpu, View, ViewMut};
use minke_data::hf::{
    Dtype, SafetensorsWriter, TensorSpec, WeightFiles, recover_folder, write_folder_atomic,
};
use minke_data::{ChatTemplate, Tokenizer};
use minke_model::{DType, Model};
use minke_num::bf16;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Result, TrainError};
use crate::trainer::Trainer;

const TRAINING: &str = "training";
const STATE: &str = "training/state.json";
const TENSORS: &str = "training/state.safetensors";
const MANIFEST: &str = "training/manifest.json";
/// Changes whenever an older program could not go on from here.
const VERSION: u32 = 1;
/// No manifest and no state is longer.
const MAX_JSON_BYTES: u64 = 1 << 20;

/// How far a run is, and what it must find again to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of the format.
    version: u32,
    /// Steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds of training so far.
    pub elapsed_s: f64,
    /// The run's seed.
    pub seed: u64,
    /// Fingerprint of the prepared data, or of the model that a stage starts from.
    pub data: String,
    /// Updates of the optimizer, where a step is not one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updates: Option<u64>,
    /// What else the loop must find again.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub more: Value,
}

impl State {
    /// A state in the present format.
    pub fn new(step: u64, tokens: u64, elapsed_s: f64, seed: u64, data: String) -> Self {
        Self { version: VERSION, step, tokens, elapsed_s, seed, data, updates: None, more: Value::Null }
    }
}

/// A whole checkpoint on the disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// How far the run was.
    pub state: State,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    path: String,
    bytes: u64,
    blake3: String,
}

/// Writes a model as a Hugging Face folder: config, generation config, weights, tokenizer, and the chat template of a
/// model that has one.
///
/// # Errors
/// I/O.
pub fn write_model(
    folder: &Path,
    model: &Model,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> minke_data::Result<()> {
    if model.params.only_runs() {
        let why = "the model was loaded to run: of its weights in FP8 there are codes and no numbers to save";
        return Err(minke_data::Error::io("write", folder)(std::io::Error::other(why)));
    }
    let config = model.config.to_json();
    // a model that talks is asked as R1's model card says
    let mut generation = match template {
        Some(_) => json!({"do_sample": true, "temperature": 0.6, "top_p": 0.95}),
        None => json!({"do_sample": true, "temperature": 0.8}),
    };
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = config.get(key).filter(|id| !id.is_null()) {
            generation[key] = id.clone();
        }
    }
    // other programs stop at what this file names, and a template may end turns with a token of its own
    if let Some(end) = template.map(|template| template.end_of_turn(tokenizer)).transpose()?.flatten()
        && !model.config.eos_token_id.contains(&end)
    {
        generation["eos_token_id"] = json!([&model.config.eos_token_id[..], &[end]].concat());
    }
    write_json(&folder.join("config.json"), &config)?;
    write_json(&folder.join("generation_config.json"), &generation)?;
    tokenizer.save(folder)?;
    if let Some(template) = template {
        template.save(folder)?;
    }
    let specs = model.params.entries.iter().map(|param| TensorSpec {
        name: param.name.clone(),
        dtype: match param.dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
        },
        shape: param.shape.clone(),
    });
    let mut writer = SafetensorsWriter::create(folder.join("model.safetensors"), specs.collect())?;
    let mut rounded: Vec<bf16> = Vec::new();
    for param in &model.params.entries {
        let master = &model.params.data[param.range.clone()];
        let bytes: &[u8] = match param.dtype {
            DType::F32 => bytemuck::cast_slice(master),
            DType::Bf16 => {
                rounded.clear();
                rounded.extend(master.iter().map(|&x| bf16::from_f32(x)));
                bytemuck::cast_slice(&rounded)
            }
        };
        writer.tensor(&param.name, bytes)?;
    }
    writer.finish()
}

/// Writes `model/`, the result of a run.
///
/// # Errors
/// I/O; what was there before is then untouched.
pub fn save_model(
    folder: &Path,
    model: &Model,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<()> {
    Ok(write_folder_atomic(folder, |folder| write_model(folder, model, tokenizer, template))?)
}

/// The checkpoints of a run in work.
///
/// Of weights that ran away the next step tells. So a checkpoint counts as good once a step after it was taken, and only
/// then older ones are let go.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
    /// The newest.
    pub newest: Option<PathBuf>,
    /// The newest that is known to be good.
    good: Option<PathBuf>,
}

impl Checkpoints {
    /// Those in `folder`, of which `keep` good ones are kept, for a run that goes on from `resumed`.
    ///
    /// # Errors
    /// I/O.
    pub fn new(folder: PathBuf, keep: usize, resumed: Option<&Checkpoint>) -> Result<Self> {
        let newest = resumed.map(|checkpoint| checkpoint.path.clone());
        let mut checkpoints = Self { folder, keep, newest, good: None };
        // the newest was written after a step that the one before it led to
        checkpoints.good = checkpoints.older()?.pop();
        Ok(checkpoints)
    }

    /// Writes `step-N`.
    ///
    /// # Errors
    /// [`TrainError::Diverged`], or I/O; all older checkpoints are then still there.
    pub fn save(
        &mut self,
        cpu: &Cpu,
        trainer: &Trainer,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        state: &State,
    ) -> Result<&Path> {
        trainer.check(cpu)?;
        let path = self.folder.join(format!("step-{}", state.step));
        write_folder_atomic(&path, |folder| {
            write_model(folder, &trainer.model, tokenizer, template)?;
            let training = folder.join(TRAINING);
            fs::create_dir(&training).map_err(minke_data::Error::io("create", &training))?;
            write_json(&folder.join(STATE), &serde_json::to_value(state).expect("plain data serialises"))?;
            write_tensors(&folder.join(TENSORS), trainer)?;
            seal(folder)
        })?;
        Ok(self.newest.insert(path))
    }

    /// Notes that a step was taken: the newest is good.
    ///
    /// # Errors
    /// An old checkpoint cannot be removed.
    pub fn settle(&mut self) -> Result<()> {
        if self.good == self.newest {
            return Ok(());
        }
        self.good.clone_from(&self.newest);
        let mut older = self.older()?;
        older.truncate((older.len() + 1).saturating_sub(self.keep));
        for path in older {
            fs::remove_dir_all(&path).map_err(TrainError::io("remove the old checkpoint", &path))?;
        }
        Ok(())
    }

    /// Adds to an error what is left on the disk.
    pub fn explain(&self, mut error: TrainError) -> TrainError {
        if let TrainError::Diverged { good, .. } = &mut error {
            good.clone_from(&self.good);
        }
        error
    }

    /// Those before the newest, ascending. Behind it there can only be damaged ones that a resumed run went back from:
    /// they are not ours to remove.
    fn older(&self) -> Result<Vec<PathBuf>> {
        let all = list(&self.folder)?.into_iter().map(|(_, path)| path);
        Ok(all.take_while(|path| self.newest.as_ref().is_some_and(|newest| path != newest)).collect())
    }
}

/// The newest whole checkpoint, if there is any checkpoint; `warn` hears of each that is not whole.
///
/// # Errors
/// There are checkpoints, and none is whole.
pub fn newest(checkpoints: &Path, warn: &mut dyn FnMut(&str)) -> Result<Option<Checkpoint>> {
    let mut reasons = Vec::new();
    for (step, path) in list(checkpoints)?.into_iter().rev() {
        match open(&path).and_then(|state| {
            if state.step == step { Ok(state) } else { Err(format!("its state is of step {}", state.step)) }
        }) {
            Ok(state) => return Ok(Some(Checkpoint { path, state })),
            Err(reason) => {
                warn(&format!("the checkpoint {} is not whole and is left alone: {reason}", path.display()));
                reasons.push(format!("  {}: {reason}", path.display()));
            }
        }
    }
    if reasons.is_empty() {
        return Ok(None);
    }
    Err(TrainError::NoWholeCheckpoint { path: checkpoints.to_owned(), reasons: reasons.join("\n") })
}

impl Checkpoint {
    /// Puts the trainer where it was, to the bit.
    ///
    /// # Errors
    /// The tensors are not those of this model and optimizer.
    pub fn restore(&self, trainer: &mut Trainer) -> Result<()> {
        let files = WeightFiles::open_file(self.path.join(TENSORS))?;
        let mut expected = 0;
        {
            let (model, optimizer) = trainer.parts_mut();
            for param in model.params.entries.clone() {
                let out = ViewMut::F32(&mut model.params.data[param.range]);
                self.read(&files, &format!("master.{}", param.name), out)?;
                expected += 1;
            }
            for (kind, entry, part) in optimizer.state_mut() {
                self.read(&files, &format!("{kind}.{}", model.params.entries[entry].name), part)?;
                expected += 1;
            }
        }
        if files.len() != expected {
            return Err(self.foreign(&format!("{} tensors instead of {expected}", files.len())));
        }
        trainer.restored(self.state.updates.unwrap_or(self.state.step));
        Ok(())
    }

    fn read(&self, files: &WeightFiles, name: &str, out: ViewMut<'_>) -> Result<()> {
        let Some(view) = files.get(name) else { return Err(self.foreign(&format!("no tensor `{name}`"))) };
        let wanted = dtype(out.dtype());
        if view.dtype != wanted || view.bytes.len() != out.dtype().size_bytes() * out.len() {
            let got = format!("`{name}` is {} {:?}, not {wanted} of {}", view.dtype, view.shape, out.len());
            return Err(self.foreign(&got));
        }
        match out {
            ViewMut::F32(out) => {
                for (x, four) in out.iter_mut().zip(view.bytes.chunks_exact(4)) {
                    *x = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
                }
            }
            ViewMut::Bf16(out) => {
                for (x, two) in out.iter_mut().zip(view.bytes.chunks_exact(2)) {
                    *x = bf16::from_le_bytes([two[0], two[1]]);
                }
            }
        }
        Ok(())
    }

    fn foreign(&self, what: &str) -> TrainError {
        TrainError::Changed {
            path: self.path.clone(),
            differences: format!("  training/state.safetensors: {what}"),
        }
    }
}

/// Checkpoints by step, ascending; replacements that were cut off are finished or undone first.
fn list(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(checkpoints) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TrainError::io("read", checkpoints)(error)),
    };
    let mut found = std::collections::BTreeMap::new();
    for entry in entries {
        let name = entry.map_err(TrainError::io("read", checkpoints))?.file_name();
        let name = name.to_string_lossy();
        // `step-200`, or `step-200.old-minke` and `step-200.tmp-1234` of a process that died
        let stem = name.split('.').next().unwrap_or_default();
        if let Some(step) = stem.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok()) {
            found.insert(step, checkpoints.join(stem));
        }
    }
    for path in found.values() {
        recover_folder(path)?;
    }
    Ok(found.into_iter().filter(|(_, path)| path.is_dir()).collect())
}

/// As files name it.
fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
    }
}

fn write_tensors(path: &Path, trainer: &Trainer) -> minke_data::Result<()> {
    let params = &trainer.model.params;
    let masters =
        params.entries.iter().map(|param| ("master", param, View::F32(&params.data[param.range.clone()])));
    let state = trainer.optimizer().state();
    let moments = state.iter().map(|(kind, entry, part)| (*kind, &params.entries[*entry], *part));
    let all: Vec<(String, &[usize], View<'_>)> = masters
        .chain(moments)
        .map(|(kind, param, part)| (format!("{kind}.{}", param.name), &param.shape[..], part))
        .collect();
    let specs = all.iter().map(|(name, shape, part)| TensorSpec {
        name: name.clone(),
        dtype: dtype(part.dtype()),
        shape: shape.to_vec(),
    });
    let mut writer = SafetensorsWriter::create(path, specs.collect())?;
    for (name, _, part) in &all {
        let bytes = match part {
            View::F32(x) => bytemuck::cast_slice(x),
            View::Bf16(x) => bytemuck::cast_slice(x),
        };
        writer.tensor(name, bytes)?;
    }
    writer.finish()
}

pub(crate) fn write_json(path: &Path, value: &Value) -> minke_data::Result<()> {
    let mut text = serde_json::to_vec_pretty(value).expect("JSON values serialise");
    text.push(b'\n');
    if text.len() as u64 > MAX_JSON_BYTES {
        let why = format!("{} bytes are more than the {MAX_JSON_BYTES} that would be read again", text.len());
        return Err(minke_data::Error::io("write", path)(std::io::Error::other(why)));
    }
    fs::write(path, text).map_err(minke_data::Error::io("write", path))
}

/// Writes down what every file is.
fn seal(folder: &Path) -> minke_data::Result<()> {
    let mut sealed = Vec::new();
    for part in ["", TRAINING] {
        let within = folder.join(part);
        let io = |action| minke_data::Error::io(action, &within);
        for entry in fs::read_dir(&within).map_err(io("read"))? {
            let entry = entry.map_err(io("read"))?;
            if entry.path().is_file() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let (bytes, blake3) =
                    digest(&entry.path()).map_err(minke_data::Error::io("read", entry.path()))?;
                let path = if part.is_empty() { name } else { format!("{part}/{name}") };
                sealed.push(Sealed { path, bytes, blake3 });
            }
        }
    }
    sealed.sort_by(|a, b| a.path.cmp(&b.path));
    write_json(&folder.join(MANIFEST), &json!({ "files": sealed }))
}

/// Length and hash of a file.
fn digest(path: &Path) -> std::io::Result<(u64, String)> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok((hasher.count(), hasher.finalize().to_hex().to_string()))
}

/// Reads a checkpoint's state if every file is what the manifest says, else says what is not.
fn open(folder: &Path) -> Result<State, String> {
    #[derive(Deserialize)]
    struct Manifest {
        files: Vec<Sealed>,
    }
    let manifest: Manifest = read_json(&folder.join(MANIFEST)).map_err(|why| format!("{MANIFEST}: {why}"))?;
    for wanted in [STATE, TENSORS, "model.safetensors", "config.json"] {
        if !manifest.files.iter().any(|file| file.path == wanted) {
            return Err(format!("{MANIFEST}: does not list {wanted}"));
        }
    }
    for Sealed { path, bytes, blake3 } in &manifest.files {
        // the manifest may be anyone's: nothing outside the folder is opened
        let (plain, inside) =
            (path.split('/').next_back().unwrap_or_default(), path.strip_prefix("training/"));
        if plain != inside.unwrap_or(path) || matches!(plain, "" | "." | "..") {
            return Err(format!("{MANIFEST}: `{}` is no file of a checkpoint", path.escape_debug()));
        }
        let got = digest(&folder.join(path)).map_err(|error| format!("{path}: {error}"))?;
        if got.0 != *bytes {
            return Err(format!("{path} is truncated or has a tail: expected {bytes} bytes, got {}", got.0));
        }
        if got.1 != *blake3 {
            return Err(format!(
                "{path} was damaged or changed: its hash is not the one it was written with"
            ));
        }
    }
    let state: State = read_json(&folder.join(STATE)).map_err(|why| format!("{STATE}: {why}"))?;
    if state.version != VERSION {
        return Err(format!(
            "{STATE}: version {} is not {VERSION}, which this program writes",
            state.version
        ));
    }
    Ok(state)
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| error.to_string())
}
