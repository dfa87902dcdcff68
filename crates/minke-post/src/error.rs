//! What can end a stage, with what to do about it.

use std::path::PathBuf;

use minke_infer::EngineError;
use minke_infer::LoadModelError;
use minke_train::TrainError;
use minke_train::metrics::MetricsError;
use minke_train::recipe::RecipeError;

/// Why a stage cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum PostError {
    /// The loop, its folder or its checkpoints.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The recipe is wrong.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// Data, tokenizer or weights cannot be read or written.
    #[error(transparent)]
    Data(#[from] minke_data::Error),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] LoadModelError),
    /// The metrics cannot be read or written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// An answer cannot be generated.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A file's content, or a setting, cannot be used.
    #[error("{place}: {reason}")]
    Unsuitable {
        /// The file or the recipe's key.
        place: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The system refuses.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

/// The crate's result.
pub type Result<T, E = PostError> = std::result::Result<T, E>;

impl PostError {
    /// Something that the user gave cannot be used.
    pub fn unsuitable(place: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsuitable { place: place.into(), reason: reason.into() }
    }

    /// Wraps an I/O error with what was tried and where; made for `map_err`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// True when the user can mend it by changing an argument, a recipe or a file: exit code 2 rather than 1.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Train(error) => error.is_user_error(),
            Self::Data(error) => error.is_user_error(),
            Self::Model(error) => error.is_user_error(),
            Self::Recipe(_) | Self::Engine(_) | Self::Unsuitable { .. } => true,
            Self::Metrics(_) => false,
            Self::Io { source, .. } => {
                matches!(source.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied)
            }
        }
    }
}
