//! What a run that goes on must find again, by content: blake3 in hexadecimal. Where it lies may change.

use std::fs;
use std::path::{Path, PathBuf};

use minke_data::Tokenizer;
use minke_data::template::ChatTemplate;
use minke_model::Model;

use crate::error::{PostError, Result};

/// Of files, with their names.
///
/// # Errors
/// A file cannot be read.
pub fn of_files(paths: &[PathBuf]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = fs::File::open(path).map_err(PostError::io("open", path))?;
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        let length = file.metadata().map_err(PostError::io("read", path))?.len();
        hasher.update(&length.to_le_bytes());
        hasher.update_reader(file).map_err(PostError::io("read", path))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Of the config and weights of a model in a folder or GGUF file.
///
/// # Errors
/// A file cannot be read.
pub fn of_weights(model: &Path) -> Result<String> {
    if model.is_file() {
        return of_files(&[model.to_owned()]);
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(model).map_err(PostError::io("read", model))? {
        let path = entry.map_err(PostError::io("read", model))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name == "config.json" || name.ends_with(".safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    of_files(&paths)
}

/// Of all about a model but its weights, which checkpoints have.
pub fn of_base(model: &Model, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(model.config.to_json().to_string().as_bytes());
    hasher.update(format!("{:?}", model.precision).as_bytes());
    hasher.update(&tokenizer.fingerprint());
    hasher.update(template.map_or("", ChatTemplate::source).as_bytes());
    hasher.update(template.and_then(ChatTemplate::tool_use).unwrap_or_default().as_bytes());
    hasher.finalize().to_hex().to_string()
}
