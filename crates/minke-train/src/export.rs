//! A model for other programs: a folder in another dtype (f32, bf16, or FP8 as DeepSeek publishes it), or a GGUF file.
//!
//! One tensor after the other goes from the source to the new folder, so memory is that of the largest tensor. In an
//! FP8 folder the projections ([`Role::takes_fp8`](minke_model::spec::Role::takes_fp8)) are E4M3 codes with an f32
//! scale for each square of 128 by 128 (`X.weight_scale_inv`); embedding, head, norms and router are bf16, and the
//! router's correction bias is f32 in every folder. Codes that the source has already, under scales of the kind that is
//! wanted, are copied: nothing is rounded twice. The tokenizer's files, the chat template and the generation config are
//! copied as they are, and written where the source is a GGUF file. What a file has in other words than a folder is in
//! [`minke_infer::gguf`].

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use minke_data::gguf::{TensorType, Value};
use minke_data::hf::{Dtype, SafetensorsWriter, TensorSpec, scales_name, write_folder_atomic};
use minke_infer::gguf::{Storage, ToWrite, WriteError, write_gguf};
use minke_infer::{GenerationDefaults, LoadModelError, ModelFiles, Weights, end_ids};
use minke_model::config::Quantization;
use minke_model::load::{self, Checked};
use minke_model::spec::{self, Role};
use minke_model::{DType, LoadError, WeightSource};
use minke_num::bf16;
use minke_num::fp8::{self, Quantized};

use crate::checkpoint::write_json;

/// Files beside the weights that say how a model reads and answers.
const BESIDE: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// The folder of a model's other chat templates.
const TEMPLATES: &str = "additional_chat_templates";

/// What the weights of the new folder are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// All in f32.
    F32,
    /// bf16, but for the router's correction bias.
    Bf16,
    /// Projections in FP8, the others as in [`Format::Bf16`].
    Fp8 {
        /// Whether scales are powers of two; as the source has them where it is in FP8 and nothing is said, else not.
        power_of_two: Option<bool>,
    },
}

/// What to write, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The new folder.
    pub out: PathBuf,
    /// What the weights are stored in.
    pub format: Format,
    /// Replace a model folder that is there.
    pub force: bool,
}

/// A GGUF file to write.
#[derive(Debug, Clone)]
pub struct GgufOptions {
    /// The new file.
    pub out: PathBuf,
    /// What matrices are stored in; vectors and routers are f32.
    pub kind: TensorType,
    /// Replace a file that is there.
    pub force: bool,
}

/// The figures of an export.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// The folder or file that was read.
    pub source: PathBuf,
    /// How its projections are stored, if in FP8.
    pub quantization: Option<Quantization>,
    /// Tensors written, those of scales included.
    pub tensors: usize,
    /// Of these, weights in FP8.
    pub quantized: usize,
    /// Of these, weights whose codes and scales are the source's.
    pub kept: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// The weight that quantising changed most, and by how much: `|w - w'| / |w|`, norms over the whole weight. None
    /// where nothing was quantised.
    pub largest_error: Option<(String, f64)>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// How far an export is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Weights written.
    pub done: u64,
    /// Of so many.
    pub total: u64,
    /// Bytes written.
    pub bytes: u64,
}

/// Why a model is not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A file cannot be found, read or written.
    #[error(transparent)]
    Data(#[from] minke_data::Error),
    /// The folder holds no model that can be read.
    #[error(transparent)]
    Model(#[from] LoadModelError),
    /// A GGUF file cannot be written.
    #[error(transparent)]
    Gguf(#[from] WriteError),
    /// A weight cannot be quantised.
    #[error("{}: tensor `{tensor}`: expected finite numbers, got {got}; FP8 has no place for it", folder.display())]
    NotFinite {
        /// The source.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first that is not finite.
        got: f32,
    },
    /// There is something where the new folder or file should be, or it is called like none.
    #[error("{} {what}\n  = help: {help}", path.display())]
    Occupied {
        /// The new folder or file.
        path: PathBuf,
        /// What is there.
        what: &'static str,
        /// What to do.
        help: &'static str,
    },
    /// The caller said so.
    #[error("stopped before the end; what was written so far is removed")]
    Stopped,
}

impl ExportError {
    /// True when the user can mend it by giving another model or folder.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Data(error) => error.is_user_error(),
            Self::Model(error) => error.is_user_error(),
            Self::Gguf(error) => error.is_user_error(),
            Self::NotFinite { .. } | Self::Occupied { .. } | Self::Stopped => true,
        }
    }
}

/// Writes the model that `model` means (a folder, a run, a GGUF file, or a hub id in the local cache) as a new folder.
///
/// # Errors
/// There is no such model, it is broken, or the folder cannot be written; what was there before is then as it was.
pub fn export(
    model: &str,
    options: &Options,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Exported, ExportError> {
    let files = ModelFiles::find(model)?;
    let (folder, stored) = (files.path.clone(), files.config.quantization);
    let source = files.weights()?;
    let Checked { mut config, specs, mut notes } = load::check(files.config.clone(), &source)
        .map_err(|source| LoadModelError::Weights { folder: folder.clone(), source })?;
    let aliases =
        spec::optional_aliases(&config).into_iter().filter(|alias| source.shape(&alias.name).is_some());
    match aliases.count() {
        0 => {}
        1 => notes
            .push("1 copy of the embedding or head is left out: it is the tensor that it repeats".to_owned()),
        n => notes.push(format!(
            "{n} copies of embedding and head are left out: they are the tensors that they repeat"
        )),
    }
    may_write(&options.out, &folder, options.force)?;
    let quantization = match options.format {
        Format::F32 | Format::Bf16 => None,
        Format::Fp8 { power_of_two } => {
            let power_of_two = power_of_two.or(stored.map(|stored| stored.power_of_two)).unwrap_or(false);
            Some(Quantization { power_of_two })
        }
    };
    config.quantization = quantization;
    config.dtype = Some(match options.format {
        Format::F32 => "float32".to_owned(),
        Format::Bf16 | Format::Fp8 { .. } => "bfloat16".to_owned(),
    });
    let mut written = Exported {
        source: folder.clone(),
        quantization,
        tensors: 0,
        quantized: 0,
        kept: 0,
        bytes: 0,
        largest_error: None,
        notes,
    };
    if let Some(parent) = options.out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(minke_data::Error::io("create", parent))?;
    }
    let mut failed = None;
    let built = write_folder_atomic(&options.out, |new| {
        write_json(&new.join("config.json"), &config.to_json())?;
        if files.gguf().is_some() {
            failed = write_beside(&files, new).err();
        } else {
            copy_beside(&folder, new, config.extra.contains_key("auto_map"))?;
        }
        if failed.is_some() {
            return Err(interrupted(new));
        }
        let writer = SafetensorsWriter::create(
            new.join("model.safetensors"),
            layout(&specs, options.format, &source),
        )?;
        let mut pass = Pass { source: &source, folder: &folder, quantization, writer, written: &mut written };
        let weights = |spec: &spec::TensorSpec| spec.shape.iter().product::<usize>() as u64;
        let (mut done, total) = (0, specs.iter().map(weights).sum());
        for spec in &specs {
            let flow = on_progress(Progress { done, total, bytes: pass.written.bytes });
            let written =
                if flow.is_break() { Err(ExportError::Stopped) } else { pass.tensor(spec, options.format) };
            if let Err(error) = written {
                // the folder is given up with an error of files; what is told is this one
                failed = Some(error);
                return Err(interrupted(new));
            }
            done += weights(spec);
        }
        // the last moment: from here on it is there or about to be
        let _ = on_progress(Progress { done, total, bytes: pass.written.bytes });
        pass.writer.finish()
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(built.map(|()| written)?),
    }
}

fn interrupted(new: &Path) -> minke_data::Error {
    minke_data::Error::io("write", new)(std::io::ErrorKind::Interrupted.into())
}

/// Writes the model that `model` means as a GGUF file, with its tokenizer and its chat template.
///
/// # Errors
/// There is no such model, it is broken, GGUF has no words for it, or the file cannot be written; what was there before is
/// then as it was.
pub fn export_gguf(
    model: &str,
    options: &GgufOptions,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Exported, ExportError> {
    let files = ModelFiles::find(model)?;
    write_file(&files, &options.out, options.force, &[], &mut { options.kind }, on_progress)
}

/// [`export_gguf`] with tensors as `storage` has them, and `more` keys.
///
/// # Errors
/// As [`export_gguf`].
pub fn write_file(
    files: &ModelFiles,
    out: &Path,
    force: bool,
    more: &[(String, Value<'static>)],
    storage: &mut dyn Storage,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Exported, ExportError> {
    may_write_file(out, &files.path, force)?;
    let source = files.weights()?;
    let Checked { config, specs: _, mut notes } = load::check(files.config.clone(), &source)
        .map_err(|source| LoadModelError::Weights { folder: files.path.clone(), source })?;
    let (tokenizer, template) = (files.tokenizer()?, files.template()?);
    if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(minke_data::Error::io("create", parent))?;
    }
    let generation = files.generation()?;
    let name = out.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let to_write = ToWrite {
        config: &config,
        source: &source,
        tokenizer: tokenizer.as_ref(),
        template: template.as_ref(),
        generation: &generation,
        name: name.as_deref(),
        more,
    };
    let written = write_gguf(out, &to_write, storage, &mut |step| {
        on_progress(Progress { done: step.done, total: step.total, bytes: step.bytes })
    });
    let written = written.map_err(|error| match error {
        WriteError::Stopped => ExportError::Stopped,
        other => other.into(),
    })?;
    notes.extend(written.notes);
    Ok(Exported {
        source: files.path.clone(),
        quantization: None,
        tensors: written.tensors,
        quantized: 0,
        kept: 0,
        bytes: written.bytes,
        largest_error: None,
        notes,
    })
}

/// What a tensor of this role is stored in, which has numbers in `source` now.
fn stored_in(role: Role, format: Format, source: Option<DType>) -> Dtype {
    match format {
        Format::F32 => Dtype::F32,
        Format::Fp8 { .. } if role.takes_fp8() => Dtype::F8E4M3,
        // small beside what it is added to, and moved in steps that bf16 would lose
        Format::Bf16 | Format::Fp8 { .. } if role == Role::RouterBias => Dtype::F32,
        // what is not quantised loses nothing
        Format::Fp8 { .. } if matches!(role, Role::Norm | Role::Router) && source != Some(DType::Bf16) => {
            Dtype::F32
        }
        Format::Bf16 | Format::Fp8 { .. } => Dtype::BF16,
    }
}

/// The tensors of the new file; scales follow their weights.
fn layout(specs: &[spec::TensorSpec], format: Format, source: &Weights) -> Vec<TensorSpec> {
    let mut tensors = Vec::new();
    for spec in specs {
        let dtype = stored_in(spec.role, format, source.dtype(&spec.name));
        tensors.push(TensorSpec { name: spec.name.clone(), dtype, shape: spec.shape.clone() });
        if dtype == Dtype::F8E4M3 {
            let shape = fp8::scale_shape(spec.shape[0], spec.shape[1]).to_vec();
            tensors.push(TensorSpec { name: scales_name(&spec.name), dtype: Dtype::F32, shape });
        }
    }
    tensors
}

/// One walk over the tensors.
struct Pass<'a> {
    source: &'a Weights,
    folder: &'a Path,
    quantization: Option<Quantization>,
    writer: SafetensorsWriter,
    written: &'a mut Exported,
}

impl Pass<'_> {
    fn tensor(&mut self, spec: &spec::TensorSpec, format: Format) -> Result<(), ExportError> {
        match stored_in(spec.role, format, self.source.dtype(&spec.name)) {
            Dtype::F8E4M3 => {
                let quantized = self.quantized(spec)?;
                self.put(&spec.name, &quantized.codes)?;
                self.put(&scales_name(&spec.name), bytemuck::cast_slice(&quantized.scales))?;
                self.written.quantized += 1;
            }
            Dtype::BF16 => {
                let rounded: Vec<bf16> = self.read(spec)?.into_iter().map(bf16::from_f32).collect();
                self.put(&spec.name, bytemuck::cast_slice(&rounded))?;
            }
            _ => self.put(&spec.name, bytemuck::cast_slice(&self.read(spec)?))?,
        }
        Ok(())
    }

    /// The source's codes where they are of the right kind, else the nearest ones.
    fn quantized(&mut self, spec: &spec::TensorSpec) -> Result<Quantized, ExportError> {
        let power_of_two = self.quantization.is_some_and(|quantization| quantization.power_of_two);
        if let Some(folder) = self.source.folder().filter(|_| self.source.is_coded(&spec.name)) {
            let found = folder.files().quantized(&spec.name)?;
            if !power_of_two || found.has_power_of_two_scales() {
                self.written.kept += 1;
                return Ok(found);
            }
        }
        let w = self.read(spec)?;
        if let Some(&got) = w.iter().find(|x| !x.is_finite()) {
            let (folder, tensor) = (self.folder.to_owned(), spec.name.clone());
            return Err(ExportError::NotFinite { folder, tensor, got });
        }
        let quantized = Quantized::quantize(&w, spec.shape[0], spec.shape[1], power_of_two);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let norm: f64 = w.iter().map(|&x| square(x)).sum();
        let lost: f64 = w.iter().zip(quantized.dequantize()).map(|(x, y)| square(x - y)).sum();
        let error = if norm > 0.0 { (lost / norm).sqrt() } else { 0.0 };
        if self.written.largest_error.as_ref().is_none_or(|(_, largest)| error > *largest) {
            self.written.largest_error = Some((spec.name.clone(), error));
        }
        Ok(quantized)
    }

    fn read(&self, spec: &spec::TensorSpec) -> Result<Vec<f32>, ExportError> {
        let mut out = vec![0.0; spec.numel()];
        self.source.read_into(&spec.name, &mut out).map_err(|why| {
            let source = LoadError::Read { name: spec.name.clone(), why };
            LoadModelError::Weights { folder: self.folder.to_owned(), source }
        })?;
        Ok(out)
    }

    fn put(&mut self, name: &str, bytes: &[u8]) -> Result<(), ExportError> {
        self.writer.tensor(name, bytes)?;
        self.written.tensors += 1;
        self.written.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Refuses to write over what is no model folder, over the source, and without `force` over anything.
fn may_write(out: &Path, source: &Path, force: bool) -> Result<(), ExportError> {
    let occupied = |what, help| Err(ExportError::Occupied { path: out.to_owned(), what, help });
    let elsewhere = "choose another folder with --out DIR";
    let Ok(metadata) = out.symlink_metadata() else { return Ok(()) };
    if !metadata.is_dir() {
        return occupied("is there and is no folder", elsewhere);
    }
    if let (Ok(out), Ok(source)) = (out.canonicalize(), source.canonicalize())
        && source.starts_with(&out)
    {
        return occupied("holds the model that is to be exported", elsewhere);
    }
    let entries = fs::read_dir(out).map_err(minke_data::Error::io("read", out))?;
    let entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    if !force {
        return occupied(
            "is not empty",
            "choose another folder with --out DIR, or replace this one with --force",
        );
    }
    // a run, a checkpoint that goes on, or somebody's files
    if !out.join("config.json").is_file()
        || entries.iter().any(|entry| entry.is_dir() && !holds_templates(entry))
    {
        return occupied("is not only a model, so --force does not replace it", elsewhere);
    }
    Ok(())
}

/// Whether a folder within a model's is that of its other templates, and nothing else.
fn holds_templates(folder: &Path) -> bool {
    let is_template =
        |entry: fs::DirEntry| entry.path().extension().is_some_and(|extension| extension == "jinja");
    folder.ends_with(TEMPLATES)
        && fs::read_dir(folder).is_ok_and(|entries| entries.flatten().all(is_template))
}

/// Refuses to write a GGUF file over a folder, over the source, and without `force` over anything: before long work.
///
/// # Errors
/// The path is the source, a folder, not called like a GGUF file, or there without `force`.
pub fn may_write_file(out: &Path, source: &Path, force: bool) -> Result<(), ExportError> {
    let occupied = |what, help| Err(ExportError::Occupied { path: out.to_owned(), what, help });
    if !minke_data::gguf::is_gguf(out) {
        return occupied("does not end in .gguf", "programs know GGUF files by that: --out FILE.gguf");
    }
    if out.is_dir() {
        return occupied("is a folder", "choose another file with --out FILE.gguf");
    }
    if let (Ok(out), Ok(source)) = (out.canonicalize(), source.canonicalize())
        && out == source
    {
        return occupied("is the model that is to be exported", "choose another file with --out FILE.gguf");
    }
    if out.exists() && !force {
        return occupied("is there", "choose another file with --out FILE.gguf, or replace it with --force");
    }
    Ok(())
}

/// Writes what a GGUF file says beside its weights as the files of a folder.
fn write_beside(files: &ModelFiles, new: &Path) -> Result<(), ExportError> {
    let (tokenizer, template) = (files.tokenizer()?, files.template()?);
    if let Some(tokenizer) = &tokenizer {
        tokenizer.save(new)?;
    }
    if let Some(template) = &template {
        template.save(new)?;
    }
    let generation = files.generation()?;
    let mut value = serde_json::json!({
        "bos_token_id": files.config.bos_token_id,
        "eos_token_id": end_ids(&files.config, &generation, tokenizer.as_ref(), template.as_ref()),
    });
    let GenerationDefaults { temperature, top_k, top_p, min_p, typical_p, repetition_penalty, eos: _ } =
        generation;
    // by the shortest decimal that means it: 0.6 and not 0.6000000238418579
    let number = |x: f32| x.to_string().parse().ok().map(|x: f64| serde_json::json!(x));
    let suggestions = [
        ("temperature", temperature.filter(|x| *x > 0.0).and_then(number)),
        ("top_k", top_k.map(|x| serde_json::json!(x))),
        ("top_p", top_p.and_then(number)),
        ("min_p", min_p.and_then(number)),
        ("typical_p", typical_p.and_then(number)),
        ("repetition_penalty", repetition_penalty.and_then(number)),
    ];
    // other programs take the likeliest token where this is not true, and know no temperature of 0
    if temperature.is_some() || suggestions.iter().any(|(_, suggestion)| suggestion.is_some()) {
        value["do_sample"] = serde_json::json!(temperature != Some(0.0));
    }
    for (key, suggestion) in suggestions {
        if let Some(suggestion) = suggestion {
            value[key] = suggestion;
        }
    }
    Ok(write_json(&new.join("generation_config.json"), &value)?)
}

/// Copies what is no weight and no config; code that a config names goes with it.
fn copy_beside(source: &Path, new: &Path, code: bool) -> minke_data::Result<()> {
    let mut names: Vec<PathBuf> = BESIDE.iter().map(Into::into).collect();
    let mut add = |folder: &Path, ends: &str, within: &Path| {
        for entry in fs::read_dir(folder).map_err(minke_data::Error::io("read", folder))?.flatten() {
            if entry.path().extension().is_some_and(|extension| extension == ends) {
                names.push(within.join(entry.file_name()));
            }
        }
        Ok(())
    };
    if code {
        add(source, "py", Path::new(""))?;
    }
    let templates = source.join(TEMPLATES);
    if templates.is_dir() {
        add(&templates, "jinja", Path::new(TEMPLATES))?;
        let to = new.join(TEMPLATES);
        fs::create_dir(&to).map_err(minke_data::Error::io("create", &to))?;
    }
    for name in names {
        let from = source.join(&name);
        if from.is_file() {
            // not fs::copy: what may be read-only in a cache is the user's own here
            let bytes = fs::read(&from).map_err(minke_data::Error::io("read", &from))?;
            let to = new.join(&name);
            fs::write(&to, bytes).map_err(minke_data::Error::io("write", &to))?;
        }
    }
    Ok(())
}
