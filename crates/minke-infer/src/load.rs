//! A model folder, opened: weights in the engine, tokenizer, and what the folder says about generation.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use minke_cpu::Cpu;
use minke_cpu::stored::{Bytes, Form, Owner, Stored};
use minke_data::hf::{Dtype, QuantizedView, TensorView, WeightFiles};
use minke_data::{ChatTemplate, MappedFile, Tokenizer};
use minke_model::config::{Config, ConfigError};
use minke_model::{DType, LoadError, Loading, Model, Precision, Purpose, Unmoved, WeightSource};
use minke_num::{bf16, f16};
use serde_json::Value;

use crate::files::{self, ModelFiles};
use crate::machine;

/// The largest of the small JSON files that is read.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// Bytes of codes that are looked through when a model is loaded to run. With more it would be felt; a row of a weight with
/// a code that is no number then has no product that is one, nor has it in a model that memory does not hold.
const CHECKED_BYTES: usize = 4 << 30;

/// Why a model folder cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadModelError {
    /// A file is missing or breaks its format.
    #[error(transparent)]
    Data(#[from] minke_data::Error),
    /// `config.json` describes no model that can be built.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// A file beside the weights cannot be used.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tensors are not those that the config asks for.
    #[error("{}: {source}", folder.display())]
    Weights {
        /// The folder.
        folder: PathBuf,
        /// What is wrong.
        source: LoadError,
    },
    /// Weights that cannot run from their files are more than the memory that is free.
    #[error(
        "{}: {:.1} GiB of its weights cannot run from where they are stored (such as numbers of which FP8 is made), and \
         {:.1} GiB of memory are free; `minke quantize` makes a file that runs from the disk",
        folder.display(), gib(*.needed), gib(*.free)
    )]
    Memory {
        /// The folder.
        folder: PathBuf,
        /// Bytes that they take.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
}

impl LoadModelError {
    /// True when the user can mend it by giving another folder or other files.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Data(error) => error.is_user_error(),
            Self::Config { .. } | Self::File { .. } | Self::Weights { .. } | Self::Memory { .. } => true,
        }
    }
}

/// What `generation_config.json` suggests; all of it may be absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// `temperature`, and 0 where `do_sample` is false.
    pub temperature: Option<f32>,
    /// `top_k`.
    pub top_k: Option<usize>,
    /// `top_p`.
    pub top_p: Option<f32>,
    /// `min_p`.
    pub min_p: Option<f32>,
    /// `typical_p`.
    pub typical_p: Option<f32>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f32>,
    /// `eos_token_id`, one or several.
    pub eos: Vec<u32>,
}

/// A model, ready to run.
pub struct Loaded {
    /// The weights in the engine.
    pub model: Model,
    /// The tokenizer, if the folder has one.
    pub tokenizer: Option<Tokenizer>,
    /// What the folder suggests for generation.
    pub generation: GenerationDefaults,
    /// What the user should know, such as announced tensors that are absent.
    pub notes: Vec<String>,
    /// Where it was found: a folder, or a GGUF file.
    pub folder: PathBuf,
    /// What was opened there; none for a model that was made.
    pub files: Option<ModelFiles>,
}

impl Loaded {
    /// The chat template that turns messages into a prompt, read from where the model is; a base model has none.
    ///
    /// # Errors
    /// There is one, and it is broken.
    pub fn template(&self) -> Result<Option<ChatTemplate>, LoadModelError> {
        match &self.files {
            Some(files) => files.template(),
            None => files::template(&self.folder),
        }
    }

    /// Leaves memory for caches that may come to so many bytes: weights are copied only where there is room for both.
    /// Tells where there is too little for the caches and the weights as they are.
    pub fn leave_room(&mut self, caches: u64) -> Option<String> {
        let free = machine::available_bytes()?;
        let mapped = self.model.mapped_bytes() as u64;
        // as when it was loaded: the copy, and as much again for whatever else runs
        if free <= caches.saturating_add(2 * mapped) {
            self.model.leave_mapped_weights();
        }
        (free < caches.saturating_add(mapped)).then(|| too_little(caches, mapped, free))
    }

    /// The tokens that end an answer, where it continues a text: [`Loaded::stop_ids_with`] no template.
    pub fn stop_ids(&self) -> Vec<u32> {
        self.stop_ids_with(None)
    }

    /// The tokens that end an answer by this template, ascending: see [`end_ids`].
    pub fn stop_ids_with(&self, template: Option<&ChatTemplate>) -> Vec<u32> {
        let mut ids = end_ids(&self.model.config, &self.generation, self.tokenizer.as_ref(), template);
        ids.sort_unstable();
        ids
    }

    /// The token that begins a text which is to be continued, where its tokenizer begins texts with one.
    pub fn bos(&self) -> Option<u32> {
        let within = |id: &u32| (*id as usize) < self.model.config.vocab_size;
        match &self.tokenizer {
            Some(tokenizer) => tokenizer.bos_of_text(),
            None => self.model.config.bos_token_id,
        }
        .filter(within)
    }
}

/// The tokens that end an answer, each once: those of config, generation config and tokenizer, and the one with which the
/// template ends a turn. A template that refuses to be asked has said nothing about how turns end.
pub fn end_ids(
    config: &Config,
    generation: &GenerationDefaults,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
) -> Vec<u32> {
    let mut ids = config.eos_token_id.clone();
    ids.extend(&generation.eos);
    if let Some(tokenizer) = tokenizer {
        ids.extend(tokenizer.eos());
        ids.extend(template.and_then(|template| template.end_of_turn(tokenizer).ok().flatten()));
    }
    let mut seen = HashSet::new();
    ids.retain(|id| seen.insert(*id));
    ids
}

/// Opens the model that `argument` means: a folder, a run, a GGUF file, or a hub id in the local cache.
///
/// With `precision` the products run in that type whatever the tensors are stored in; without, weights in FP8 stay as they
/// are in a model that is loaded to run, and become f32 in one that is loaded to be trained.
///
/// # Errors
/// Nothing is there, or a file is missing, inconsistent or hostile; nothing is ever written.
pub fn load_model(
    argument: &str,
    precision: Option<Precision>,
    purpose: Purpose<'_>,
) -> Result<Loaded, LoadModelError> {
    let files = ModelFiles::find(argument)?;
    let generation = files.generation()?;
    let (config, weights) = match purpose {
        Purpose::Run(_) => files.to_run()?,
        Purpose::Train => (files.config.clone(), files.weights()?),
    };
    let folder = files.path.clone();
    let loading = |unmoved| {
        Loading::new(config.clone(), precision, &weights, purpose, unmoved)
            .map_err(|source| LoadModelError::Weights { folder: folder.clone(), source })
    };
    let mut planned = loading(Unmoved::AsStored)?;
    let free = machine::available_bytes().filter(|_| matches!(purpose, Purpose::Run(_)));
    let mut of_memory = Vec::new();
    if let Some(free) = free {
        let wanted = planned.held_bytes();
        if wanted > free {
            planned = loading(Unmoved::Converted)?;
            of_memory.push(converted(wanted, free, precision.is_some()));
        }
        of_memory.extend(judge_memory(&folder, planned.held_bytes(), planned.mapped_bytes(), free)?);
    }
    if let (Purpose::Run(cpu), Some(folder), true) = (purpose, weights.folder(), of_memory.is_empty()) {
        folder.check_codes(cpu)?;
    }
    let mapped = planned.mapped_bytes();
    // a vocabulary takes about as long as weights that are converted
    let (tokenizer, model) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| files.tokenizer());
        let model = planned.load(&weights, purpose);
        (tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), model)
    });
    let tokenizer = tokenizer?;
    let (mut model, mut notes) =
        model.map_err(|source| LoadModelError::Weights { folder: folder.clone(), source })?;
    notes.extend(of_memory);
    let left = machine::available_bytes().filter(|_| matches!(purpose, Purpose::Run(_)));
    // the copy, and as much again for whatever else runs
    if left.is_some_and(|left| left > 2 * mapped) {
        model.copy_mapped_weights();
    }
    match &tokenizer {
        Some(tokenizer) => notes.extend(mismatch(tokenizer.vocab_size(), model.config.vocab_size)),
        None => notes.extend(files.unread_tokenizer().map(|what| format!("no tokenizer: {what}"))),
    }
    Ok(Loaded { model, tokenizer, generation, notes, folder, files: Some(files) })
}

/// What a user should know of weights of which `held` bytes must be in memory and `mapped` run from their file, where `free`
/// bytes are free.
///
/// # Errors
/// [`LoadModelError::Memory`]: what must be in memory does not fit.
fn judge_memory(folder: &Path, held: u64, mapped: u64, free: u64) -> Result<Option<String>, LoadModelError> {
    if held > free {
        return Err(LoadModelError::Memory { folder: folder.to_owned(), needed: held, free });
    }
    let note = || {
        format!(
            "the weights take {:.1} GiB, and {:.1} GiB of memory are free: much of them is read from the disk again for \
             every token, which is slow; fewer bits (minke quantize) or less beside it would help",
            gib(held + mapped),
            gib(free)
        )
    };
    Ok((held + mapped > free).then(note))
}

/// What to say of weights that would take so much memory in what their products are in.
fn converted(wanted: u64, free: u64, asked_for: bool) -> String {
    let instead = if asked_for { "; without --precision they may run as they are stored" } else { "" };
    format!(
        "weights in the precision of their products would take {:.1} GiB, and {:.1} GiB of memory are free: they are made of \
         what the file has for every product, which is slow{instead}",
        gib(wanted),
        gib(free)
    )
}

/// What to say of a tokenizer with so many ids and a head with so many rows. Heads are padded, by 2,400 rows at most in
/// published models.
fn mismatch(ids: usize, rows: usize) -> Option<String> {
    let last = ids.saturating_sub(1);
    if ids > rows {
        Some(format!(
            "the tokenizer has ids up to {last}, the model only {rows} rows; the others cannot be used"
        ))
    } else if rows > ids + ids / 16 + 1024 {
        Some(format!(
            "the tokenizer has ids up to {last}, the model {rows} rows: it may be another model's, and what the model \
             says beyond it is no text"
        ))
    } else {
        None
    }
}

fn too_little(caches: u64, weights: u64, free: u64) -> String {
    let beside =
        if weights > 0 { format!(" beside {:.1} GiB of weights", gib(weights)) } else { String::new() };
    format!(
        "caches may come to {:.1} GiB{beside}, and {:.1} GiB of memory are free: the system may end this program when they do",
        gib(caches),
        gib(free)
    )
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Reads and checks the `config.json` of a folder.
///
/// # Errors
/// It is missing, no JSON, or describes no model that can be built.
pub fn read_config(folder: &Path) -> Result<Config, LoadModelError> {
    let path = folder.join("config.json");
    let value = read_json(&path)?;
    Config::from_json(&value).map_err(|source| LoadModelError::Config { path, source })
}

fn read_text(path: &Path) -> Result<String, LoadModelError> {
    let fail = |reason: String| LoadModelError::File { path: path.to_owned(), reason };
    let file = File::open(path).map_err(minke_data::Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(minke_data::Error::io("read", path))?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(fail(format!("larger than the {MAX_JSON_BYTES} bytes that such a file may have")));
    }
    String::from_utf8(bytes)
        .map_err(|error| fail(format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to())))
}

fn read_json(path: &Path) -> Result<Value, LoadModelError> {
    serde_json::from_str(&read_text(path)?).map_err(|error| LoadModelError::File {
        path: path.to_owned(),
        reason: format!("expected JSON, got a syntax error: {error}"),
    })
}

pub(crate) fn generation_defaults(folder: &Path) -> Result<GenerationDefaults, LoadModelError> {
    let path = folder.join("generation_config.json");
    if !path.is_file() {
        return Ok(GenerationDefaults::default());
    }
    let value = read_json(&path)?;
    let fail = |field: &str, expected: &str, got: &Value| {
        let got: String = got.to_string().chars().take(40).collect();
        LoadModelError::File {
            path: path.clone(),
            reason: format!("`{field}`: expected {expected}, got {got}"),
        }
    };
    let field = |name: &str| value.get(name).filter(|value| !value.is_null());
    let number = |name: &str, most: f64| match field(name) {
        None => Ok(None),
        Some(found) => match found.as_f64().filter(|x| (0.0..=most).contains(x)) {
            Some(x) => Ok(Some(x as f32)),
            None => Err(fail(name, &format!("a number from 0 to {most}"), found)),
        },
    };
    let id = |found: &Value| found.as_u64().and_then(|id| u32::try_from(id).ok());
    let eos = match field("eos_token_id") {
        None => Vec::new(),
        Some(Value::Array(list)) if list.len() <= 1024 => list
            .iter()
            .map(|entry| id(entry).ok_or_else(|| fail("eos_token_id", "token ids", entry)))
            .collect::<Result<_, _>>()?,
        Some(found) => {
            vec![id(found).ok_or_else(|| fail("eos_token_id", "a token id or a list of them", found))?]
        }
    };
    let greedy = field("do_sample") == Some(&Value::Bool(false));
    let temperature = number("temperature", 100.0)?;
    Ok(GenerationDefaults {
        temperature: if greedy { Some(0.0) } else { temperature },
        top_k: number("top_k", 16_777_216.0)?.map(|k| k as usize),
        // 0 stands for "off" in some published files
        top_p: number("top_p", 1.0)?.filter(|p| *p > 0.0),
        min_p: number("min_p", 1.0)?,
        typical_p: number("typical_p", 1.0)?.filter(|p| *p > 0.0),
        repetition_penalty: number("repetition_penalty", 100.0)?.filter(|x| *x > 0.0),
        eos,
    })
}

/// The weights of a folder as the model reads them: numbers, whatever they are stored in.
#[derive(Debug)]
pub struct WeightFolder(WeightFiles);

impl WeightFolder {
    /// Maps and validates the weight files of a folder whose `config.json` is `config`.
    ///
    /// # Errors
    /// They are missing, truncated or inconsistent, or are in FP8 and lack scales or the config's word for it.
    pub fn open(folder: &Path, config: &Config) -> Result<Self, LoadModelError> {
        let weights = WeightFiles::open(folder)?;
        weights.check_quantized()?;
        if config.quantization.is_none()
            && let Some(name) = weights.names().find(|name| weights.is_quantized(name))
        {
            return Err(LoadModelError::File {
                path: folder.join("config.json"),
                reason: format!("tensor `{name}` is in F8_E4M3: expected `quantization_config`, got none"),
            });
        }
        Ok(Self(weights))
    }

    /// Looks through codes, where they are not too many.
    ///
    /// # Errors
    /// One is no number.
    fn check_codes(&self, cpu: &Cpu) -> Result<(), LoadModelError> {
        let coded: Vec<&str> = self.0.names().filter(|name| self.0.is_quantized(name)).collect();
        let bytes: usize =
            coded.iter().filter_map(|name| self.0.get(name)).map(|view| view.bytes.len()).sum();
        if bytes > CHECKED_BYTES {
            return Ok(());
        }
        let found: Vec<OnceLock<minke_data::Error>> = coded.iter().map(|_| OnceLock::new()).collect();
        cpu.run(coded.len(), |i| {
            if let Err(error) = self.0.check_codes(coded[i]) {
                let _ = found[i].set(error);
            }
        });
        found.into_iter().find_map(OnceLock::into_inner).map_or(Ok(()), |error| Err(error.into()))
    }

    /// The files, where a tensor can be seen as it lies there, in FP8 with its scales.
    pub fn files(&self) -> &WeightFiles {
        &self.0
    }

    /// A tensor as it lies in its file.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.0.get(name)
    }

    fn quantized(&self, name: &str) -> Result<QuantizedView<'_>, String> {
        self.0.quantized_view(name).map_err(|error| match error {
            // whoever asked knows the folder, and the scales were checked when it was opened
            minke_data::Error::Weights { expected, got, .. } => format!("expected {expected}, got {got}"),
            other => other.to_string(),
        })
    }
}

impl WeightSource for WeightFolder {
    /// All but the scales of others.
    fn names(&self) -> Vec<String> {
        self.0.names().filter(|name| !self.0.is_scales(name)).map(str::to_owned).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|view| view.shape.to_vec())
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        self.0.get(name).map(|view| if view.dtype == Dtype::BF16 { DType::Bf16 } else { DType::F32 })
    }

    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String> {
        let Some(view) = self.0.get(name) else { return Err("no such tensor".to_owned()) };
        let elements = view.bytes.len() / view.dtype.size();
        if elements != out.len() {
            return Err(format!("expected {} elements, got {elements}", out.len()));
        }
        let pairs = view.bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        match view.dtype {
            Dtype::F32 => {
                for (x, four) in out.iter_mut().zip(view.bytes.chunks_exact(4)) {
                    *x = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
                }
            }
            Dtype::BF16 => {
                for (x, pair) in out.iter_mut().zip(pairs) {
                    *x = bf16::from_le_bytes(pair).to_f32();
                }
            }
            Dtype::F16 => {
                for (x, pair) in out.iter_mut().zip(pairs) {
                    *x = f16::from_le_bytes(pair).to_f32();
                }
            }
            Dtype::F8E4M3 => self.quantized(name)?.dequantize(out),
            other => return Err(format!("expected F32, F16, BF16 or F8_E4M3, got {other}")),
        }
        Ok(())
    }

    fn is_coded(&self, name: &str) -> bool {
        self.0.is_quantized(name)
    }

    fn stored(&self, name: &str) -> Option<Stored> {
        let view = self.0.get(name)?;
        let form = match view.dtype {
            Dtype::F32 => Form::F32,
            Dtype::F16 => Form::F16,
            Dtype::BF16 => Form::Bf16,
            Dtype::F8E4M3 => Form::E4m3,
            _ => return None,
        };
        let [rows, cols] = *view.shape else { return None };
        let (owner, range) = self.0.shared(name)?;
        let bytes = mapped_bytes(owner, range);
        Some(match form {
            Form::E4m3 => Stored::coded(rows, cols, bytes, self.0.scales(name).ok()?.into()),
            Form::F32 | Form::F16 | Form::Bf16 | Form::Blocks(_) => Stored::new(form, rows, cols, bytes),
        })
    }

    fn done(&self, name: &str) {
        self.0.forget(name);
    }
}

/// Bytes of a map.
pub(crate) fn mapped_bytes(file: Arc<MappedFile>, range: Range<usize>) -> Bytes {
    Bytes::new(Arc::new(Mapped(file)), range)
}

/// A map that owns bytes of weights.
struct Mapped(Arc<MappedFile>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Owner for Mapped {
    fn bring_near(&self, ranges: &[Range<usize>], stop: &AtomicBool) {
        self.0.bring_near(ranges, stop);
    }

    fn forget(&self, range: Range<usize>) {
        self.0.forget(range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_or_refused() {
        let judge = |held: u64, mapped: u64, free: u64| {
            judge_memory(Path::new("models/whale"), held << 30, mapped << 30, free << 30)
        };
        assert_eq!(judge(3, 4, 8).unwrap(), None);
        insta::assert_snapshot!(judge(3, 4, 6).unwrap().unwrap());
        insta::assert_snapshot!(judge(16, 0, 8).unwrap_err());
    }

    #[test]
    fn a_head_is_padded_and_not_of_another_tokenizer() {
        // Qwen3, Phi-3.5, DeepSeek-V3, DeepSeek-LLM, a tiny one
        for (ids, rows) in
            [(151_669, 151_936), (32_011, 32_064), (128_815, 129_280), (100_015, 102_400), (300, 512)]
        {
            assert_eq!(mismatch(ids, rows), None);
        }
        let smaller = mismatch(32_000, 151_936).unwrap();
        assert!(smaller.starts_with("the tokenizer has ids up to 31999, the model 151936 rows"), "{smaller}");
        let larger = mismatch(151_669, 32_000).unwrap();
        assert!(larger.ends_with("the model only 32000 rows; the others cannot be used"), "{larger}");
    }
}
