//! What can keep a pipeline from going on, with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use minke_train::recipe::RecipeError;

/// Why a pipeline cannot be made, apart from what its stages say themselves.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The recipe is wrong.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A stage's recipe, which stands in the pipeline's, cannot be written down.
    #[error("stage `{stage}`: its recipe cannot be written: {reason}")]
    Unwritable {
        /// The stage.
        stage: String,
        /// Why not.
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
        source: io::Error,
    },
    /// The model cannot be published.
    #[error(transparent)]
    Data(#[from] minke_data::Error),
    /// The report cannot be written.
    #[error("cannot draw a plot of the report: {0}")]
    Plot(String),
    /// A new pipeline would be written over something.
    #[error(
        "{path} is not empty{what}write to another folder with --out DIR, or delete it",
        path = path.display(),
        what = if *is_pipeline {
            "\n  = help: continue in it with --resume, make stages again with --from STAGE, "
        } else {
            " and holds no pipeline\n  = help: "
        }
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// Whether it is a pipeline's.
        is_pipeline: bool,
    },
    /// Another process makes the same pipeline.
    #[error("another process is at work in {path}; wait for it, or choose another folder with --out DIR", path = path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// `--only` or `--from` names nothing.
    #[error("{option} {name}: there is no such stage; the stages are {stages}")]
    NoStage {
        /// The option.
        option: &'static str,
        /// What it says.
        name: String,
        /// The stages, in order.
        stages: String,
    },
    /// A stage that others need is not there.
    #[error(
        "stage `{stage}` needs stage `{needs}`, which is not finished in {path}\n  = help: --resume makes all that is missing; --from {needs} makes it and what follows",
        path = path.display()
    )]
    Unfinished {
        /// The stage that is to run.
        stage: String,
        /// What it needs.
        needs: String,
        /// The pipeline's folder.
        path: PathBuf,
    },
    /// A stage was made from another recipe than the one given now.
    #[error(
        "stage `{stage}` in {path} was made otherwise:\n{differences}\n  = help: --from {stage} makes it and what follows again; to keep it, give what it was made with",
        path = path.display()
    )]
    Changed {
        /// The stage.
        stage: String,
        /// The pipeline's folder.
        path: PathBuf,
        /// One line for each key that differs.
        differences: String,
    },
    /// A stage is to use a file that an earlier one did not write.
    #[error("stage `{stage}` uses `{reference}`, but {path} is not there{found}", path = path.display())]
    NoFile {
        /// The stage that is to run.
        stage: String,
        /// The reference in its recipe.
        reference: String,
        /// What it means.
        path: PathBuf,
        /// `; the stage wrote a, b`, or empty.
        found: String,
    },
    /// A file that tells what was done is not ours.
    #[error("{path} is damaged: {reason}\n  = help: delete it to make that stage again", path = path.display())]
    Marker {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl MakeError {
    /// Wraps an I/O error with what was tried and where; made for `map_err`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// True when the user can mend it by changing an argument, a recipe or a file: exit code 2 rather than 1.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Recipe(_)
            | Self::Unwritable { .. }
            | Self::Occupied { .. }
            | Self::Busy { .. }
            | Self::NoStage { .. }
            | Self::Unfinished { .. }
            | Self::Changed { .. }
            | Self::NoFile { .. }
            | Self::Marker { .. } => true,
            Self::Data(error) => error.is_user_error(),
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
            }
            Self::Plot(_) => false,
        }
    }
}

/// How making a pipeline fails: by itself, or in one of its stages.
#[derive(Debug)]
pub enum Failed<E> {
    /// By itself.
    Make(MakeError),
    /// In a stage.
    Stage {
        /// Its name.
        name: String,
        /// What it says.
        error: E,
    },
}

impl<E, M: Into<MakeError>> From<M> for Failed<E> {
    fn from(error: M) -> Self {
        Self::Make(error.into())
    }
}
