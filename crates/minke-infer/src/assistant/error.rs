//! Why an assistant does not answer.

use std::path::{Path, PathBuf};

use crate::files::unread_tokenizer;
use crate::{EngineError, LoadModelError};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum AssistantError {
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadModelError),
    /// The template or the tokenizer refuses what was said.
    #[error(transparent)]
    Data(#[from] minke_data::Error),
    /// A setting is out of its bounds, or the weights are damaged.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model reads token ids only.
    #[error("{} has no tokenizer, so it cannot read text{}", folder.display(), unread(folder))]
    NoTokenizer {
        /// Its folder.
        folder: PathBuf,
    },
    /// The conversation leaves no room for an answer.
    #[error(
        "the conversation has {tokens} tokens and the model's context {context}, so there is no room for an answer"
    )]
    Full {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that fit, with the answer.
        context: usize,
    },
    /// There is nothing to answer.
    #[error("expected something to answer, got an empty text")]
    NothingSaid,
    /// There is no turn to forget.
    #[error("there is no turn to undo")]
    NothingToUndo,
    /// There is no turn to answer again.
    #[error("there is no turn to answer again")]
    NothingToRetry,
    /// A base model has text, not turns.
    #[error("this is a base model, which has no chat template: it continues text and knows no turns")]
    NoTemplate,
    /// A chat model has turns, not text.
    #[error("this model has a chat template: it knows turns, not a running text")]
    NotBase,
}

fn unread(folder: &Path) -> String {
    unread_tokenizer(folder).map_or_else(String::new, |what| format!(": {what}"))
}

impl AssistantError {
    /// True when the user can mend it by other arguments or files.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Load(error) => error.is_user_error(),
            Self::Data(error) => error.is_user_error(),
            _ => true,
        }
    }
}
