//! What can end a run, with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::metrics::MetricsError;
use crate::recipe::RecipeError;
use crate::report::ReportError;

/// Why a run, its resumption or a benchmark cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The recipe is wrong.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// Data, tokenizer or weights cannot be read or written.
    #[error(transparent)]
    Data(#[from] minke_data::Error),
    /// The metrics cannot be read or written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The report cannot be written.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A sample cannot be written.
    #[error("`sample`: {0}")]
    Sample(#[from] minke_infer::EngineError),
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
    /// A new run would be written over something.
    #[error(
        "{path} is not empty{what}write to another folder with --out DIR, or delete it",
        path = path.display(),
        what = if *is_run {
            "\n  = help: continue the run in it with --resume, "
        } else {
            " and holds no such run\n  = help: "
        }
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// Whether it is a run's.
        is_run: bool,
    },
    /// Another process writes the same run.
    #[error("another process is training in {path}; wait for it, or choose another folder with --out DIR", path = path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// The run that is to be resumed was another one.
    #[error(
        "cannot resume {path}: it was started otherwise\n{differences}\n  = help: give what it was started with, or start another run with --out DIR",
        path = path.display()
    )]
    Changed {
        /// The run's folder.
        path: PathBuf,
        /// One line for each thing that differs.
        differences: String,
    },
    /// There are checkpoints, and none of them is whole.
    #[error("no checkpoint in {path} is whole:\n{reasons}\n  = help: start another run with --out DIR; nothing here was changed", path = path.display())]
    NoWholeCheckpoint {
        /// The folder of checkpoints.
        path: PathBuf,
        /// One line for each.
        reasons: String,
    },
    /// The recipe is for something else.
    #[error("`{key}`: {reason}")]
    Unsuitable {
        /// The recipe's key.
        key: &'static str,
        /// Why it cannot be used here, and what to do.
        reason: String,
    },
    /// It would not fit into memory.
    #[error("{0}, or start anyway with --force")]
    TooLarge(crate::plan::TooLarge),
    /// Numbers ran away and did not come back.
    #[error(
        "step {step}: the {what} is not finite{times}; {left}\n  = help: --resume comes to the same end; start another run with --out DIR{from}: a lower `train.lr` or `train.muon_lr`{clip} or a longer `train.warmup_share` may hold it; `train.skip_limit` says how many such steps are skipped",
        times = times(*in_a_row), left = left(good.as_deref()), from = from_there(*from, good.as_deref()),
        clip = if *clips { ", a smaller `train.clip`" } else { "" }
    )]
    Diverged {
        /// The step that was tried, from 1.
        step: u64,
        /// What ran away.
        what: &'static str,
        /// Steps in a row without a finite loss and gradient, this one included; 0 when it was taken.
        in_a_row: u64,
        /// Whether gradients are clipped.
        clips: bool,
        /// The newest checkpoint after which a step was taken, if there is one.
        good: Option<PathBuf>,
        /// The recipe's key for the model to start from, if there is one.
        from: Option<&'static str>,
    },
}

fn times(in_a_row: u64) -> String {
    match in_a_row {
        0 | 1 => String::new(),
        _ => format!(", {in_a_row} times in a row"),
    }
}

fn left(good: Option<&Path>) -> String {
    match good {
        Some(path) => format!("the last checkpoint that is known to be good is {}", path.display()),
        None => "there is no checkpoint that is known to be good".to_owned(),
    }
}

fn from_there(key: Option<&str>, good: Option<&Path>) -> String {
    match (key, good) {
        (Some(key), Some(good)) => format!(", from there with --set {key}={}", good.display()),
        _ => String::new(),
    }
}

/// The crate's result.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

impl TrainError {
    /// Wraps an I/O error with what was tried and where; made for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// True when the user can mend it by changing an argument, a recipe or a file: exit code 2 rather than 1.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Recipe(_)
            | Self::Sample(_)
            | Self::Occupied { .. }
            | Self::Busy { .. }
            | Self::Changed { .. }
            | Self::NoWholeCheckpoint { .. }
            | Self::TooLarge(_)
            | Self::Unsuitable { .. } => true,
            Self::Data(error) => error.is_user_error(),
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
            }
            Self::Metrics(_) | Self::Report(_) | Self::Diverged { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_diverged_says_where_to_go_on() {
        let told = |clips, good: Option<&str>, from| {
            let good = good.map(PathBuf::from);
            TrainError::Diverged { step: 7, what: "loss", in_a_row: 3, clips, good, from }.to_string()
        };
        insta::assert_snapshot!(told(true, None, Some("model.path")), @r"
        step 7: the loss is not finite, 3 times in a row; there is no checkpoint that is known to be good
          = help: --resume comes to the same end; start another run with --out DIR: a lower `train.lr` or `train.muon_lr`, a smaller `train.clip` or a longer `train.warmup_share` may hold it; `train.skip_limit` says how many such steps are skipped
        ");
        insta::assert_snapshot!(told(false, Some("run/checkpoints/step-4"), Some("model.path")), @r"
        step 7: the loss is not finite, 3 times in a row; the last checkpoint that is known to be good is run/checkpoints/step-4
          = help: --resume comes to the same end; start another run with --out DIR, from there with --set model.path=run/checkpoints/step-4: a lower `train.lr` or `train.muon_lr` or a longer `train.warmup_share` may hold it; `train.skip_limit` says how many such steps are skipped
        ");
    }
}
