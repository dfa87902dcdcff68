//! One error type for all that can be wrong with a file.
//!
//! Every variant names what was looked at and what was wrong with it; where there is a next step, the text
//! says so. Nothing here is a programmer's error: those panic.

use std::io;
use std::path::{Path, PathBuf};

/// What went wrong at the border to the disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), io_hint(source))]
    Io {
        /// What was tried, as a verb: "read", "write".
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A data source of a recipe is missing, empty or described wrongly.
    #[error("data source `{name}`: {reason}")]
    Source {
        /// The source as the recipe names it.
        name: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// One record of a table of documents cannot be used.
    #[error("{}, {unit} {number}: {reason}", path.display())]
    Record {
        /// The table.
        path: PathBuf,
        /// "line" or "row".
        unit: &'static str,
        /// Counted from 1.
        number: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A tokenizer file is broken, or a vocabulary cannot be trained.
    #[error("tokenizer {place}: {reason}")]
    Tokenizer {
        /// The file, or what stood in for it.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// A shard of tokens is truncated, inconsistent or of another tokenizer.
    #[error("shard {}: {reason}", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A weight file breaks its format.
    #[error("{}{}: expected {expected}, got {got}", path.display(), tensor_place(tensor.as_ref()))]
    Weights {
        /// The file.
        path: PathBuf,
        /// The tensor that it is about, if it is about one.
        tensor: Option<String>,
        /// What the format asks for.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A GGUF file breaks its format, or says something else than is needed.
    #[error("{}, {place}: expected {expected}, got {got}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The key, the tensor or the part of the file that it is about.
        place: String,
        /// What is asked for.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A model cannot be found or is not of a kind that can be read.
    #[error("model `{name}`: {reason}")]
    Model {
        /// As the user typed it.
        name: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A chat template is broken, or cannot say what a conversation needs.
    #[error("chat template {place}: {reason}")]
    Template {
        /// The file, or its built-in name.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// A file of a conversation is broken.
    #[error("{}: {reason}", path.display())]
    Transcript {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A setting cannot be used.
    #[error("{what}: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        what: &'static str,
        /// What may stand there.
        expected: String,
        /// What stands there.
        got: String,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an I/O error with what was tried and where; made for `map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.as_ref().to_owned(), source }
    }

    /// True when the user can mend it by changing an argument, a recipe or a file: exit code 2 rather than 1.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
            }
            Self::Source { .. }
            | Self::Record { .. }
            | Self::Tokenizer { .. }
            | Self::Shard { .. }
            | Self::Weights { .. }
            | Self::Gguf { .. }
            | Self::Model { .. }
            | Self::Template { .. }
            | Self::Transcript { .. }
            | Self::Setting { .. } => true,
        }
    }

    pub(crate) fn source(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Source { name: name.into(), reason: reason.into() }
    }

    pub(crate) fn shard(path: &Path, reason: impl Into<String>) -> Self {
        Self::Shard { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tokenizer(place: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Tokenizer { place: place.into(), reason: reason.to_string() }
    }

    pub(crate) fn template(place: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Template { place: place.into(), reason: reason.into() }
    }

    pub(crate) fn model(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Model { name: name.into(), reason: reason.into() }
    }

    pub(crate) fn weights(
        path: &Path,
        tensor: Option<&str>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Weights {
            path: path.to_owned(),
            tensor: tensor.map(str::to_owned),
            expected: expected.into(),
            got: got.into(),
        }
    }

    pub(crate) fn gguf(
        path: &Path,
        place: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Gguf { path: path.to_owned(), place: place.into(), expected: expected.into(), got: got.into() }
    }

    pub(crate) fn setting(
        what: &'static str,
        expected: impl Into<String>,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Setting { what, expected: expected.into(), got: got.to_string() }
    }
}

fn io_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; free some space and run again, what was there before is untouched",
        io::ErrorKind::QuotaExceeded => "; the quota is used up, what was there before is untouched",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a folder on a file system that can be written",
        _ => "",
    }
}

fn tensor_place(tensor: Option<&String>) -> String {
    tensor.map(|name| format!(", tensor `{}`", name.escape_debug())).unwrap_or_default()
}

/// Runs third-party parsing code that is known to panic on odd input, and turns a panic into text.
pub(crate) fn guard<T>(work: impl FnOnce() -> T) -> std::result::Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|payload| {
        let text = payload
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| payload.downcast_ref::<String>().cloned());
        text.unwrap_or_else(|| "the parser gave up".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_so_and_where() {
        let error = Error::io("write", "runs/a/model.safetensors")(io::ErrorKind::StorageFull.into());
        let text = error.to_string();
        assert!(text.contains("runs/a/model.safetensors") && text.contains("free some space"), "{text}");
        assert!(!error.is_user_error());
    }

    #[test]
    fn a_panic_becomes_text() {
        assert_eq!(guard(|| 3), Ok(3));
        assert_eq!(guard(|| panic!("odd {}", 7)).unwrap_err(), "odd 7");
    }
}
