//! What a command ends with when it cannot do what was asked.

use std::io::{self, Write};
use std::process::ExitCode;

use minke_gym::SuiteError;
use minke_infer::{AssistantError, EngineError, LoadModelError, SettingError};
use minke_model::LoadError;
use minke_post::PostError;
use minke_post::make::MakeError;
use minke_train::TrainError;
use minke_train::export::ExportError;
use minke_train::recipe::RecipeError;

/// One message, the next step if there is one, and an exit code.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// Something that the user can mend: exit code 2.
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(2, message.into())
    }

    /// Something else: exit code 1.
    pub fn other(message: impl Into<String>) -> Self {
        Self::new(1, message.into())
    }

    /// Errors of recipes and runs end with their next step on a line of its own.
    fn new(code: u8, message: String) -> Self {
        match message.rsplit_once("\n  = help: ") {
            Some((message, hint)) => Self { code, message: message.to_owned(), hint: Some(hint.to_owned()) },
            None => Self { code, message, hint: None },
        }
    }

    /// Stopped from outside, which needs no message: exit code 130, as shells have it.
    pub fn interrupted() -> Self {
        Self { code: 130, message: String::new(), hint: None }
    }

    /// Adds the next step.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Either kind.
    pub fn of(is_user_error: bool, message: impl Into<String>) -> Self {
        if is_user_error { Self::user(message) } else { Self::other(message) }
    }

    /// Puts words before the message, such as the name of what it is about.
    pub fn context(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// Prints the message and gives the exit code.
    pub fn report(&self) -> ExitCode {
        let mut text = String::new();
        if !self.message.is_empty() {
            text = format!("error: {}\n", self.message.trim_end());
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        // where standard error is closed there is no one to tell
        let _ = io::stderr().lock().write_all(text.as_bytes());
        ExitCode::from(self.code)
    }
}

impl From<minke_data::Error> for Failure {
    fn from(error: minke_data::Error) -> Self {
        let failure = Self::of(error.is_user_error(), error.to_string());
        match error {
            minke_data::Error::Weights { .. } => {
                failure.hint("the file is damaged or incomplete: copy or download it again")
            }
            // these end with their next step
            minke_data::Error::Model { .. } => match failure.message.split_once("; ") {
                Some((message, hint)) => Self::new(failure.code, message.to_owned()).hint(hint),
                None => failure,
            },
            _ => failure,
        }
    }
}

impl From<LoadModelError> for Failure {
    fn from(error: LoadModelError) -> Self {
        match error {
            LoadModelError::Data(error) => error.into(),
            LoadModelError::Weights { source: LoadError::Read { .. }, .. } => Self::user(error.to_string()),
            LoadModelError::Weights { .. } => Self::user(error.to_string())
                .hint("config.json and the weight files must be of the same model"),
            other => Self::of(other.is_user_error(), other.to_string()),
        }
    }
}

impl From<AssistantError> for Failure {
    fn from(error: AssistantError) -> Self {
        match error {
            AssistantError::Load(error) => error.into(),
            AssistantError::Data(error) => error.into(),
            AssistantError::Engine(error) => error.into(),
            AssistantError::NoTokenizer { .. } => {
                Self::user(error.to_string()).hint("minke score reads token ids")
            }
            other => Self::user(other.to_string()),
        }
    }
}

impl From<RecipeError> for Failure {
    fn from(error: RecipeError) -> Self {
        Self::user(error.to_string())
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Data(error) => error.into(),
            TrainError::Recipe(error) => error.into(),
            other => Self::of(other.is_user_error(), other.to_string()),
        }
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        match error {
            ExportError::Data(error) => error.into(),
            ExportError::Model(error) => error.into(),
            ExportError::Stopped => Self { message: error.to_string(), ..Self::interrupted() },
            other => Self::of(other.is_user_error(), other.to_string()),
        }
    }
}

impl From<PostError> for Failure {
    fn from(error: PostError) -> Self {
        match error {
            PostError::Train(error) => error.into(),
            PostError::Recipe(error) => error.into(),
            PostError::Data(error) => error.into(),
            PostError::Model(error) => error.into(),
            PostError::Engine(error) => error.into(),
            other => Self::of(other.is_user_error(), other.to_string()),
        }
    }
}

impl From<MakeError> for Failure {
    fn from(error: MakeError) -> Self {
        match error {
            MakeError::Recipe(error) => error.into(),
            MakeError::Data(error) => error.into(),
            other => Self::of(other.is_user_error(), other.to_string()),
        }
    }
}

impl From<SuiteError> for Failure {
    fn from(error: SuiteError) -> Self {
        Self::user(error.to_string())
    }
}

impl From<SettingError> for Failure {
    fn from(error: SettingError) -> Self {
        Self::user(error.to_string())
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let failure = Self::user(error.to_string());
        match error {
            EngineError::Context { .. } => failure.hint("give a shorter text"),
            _ => failure,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // whoever read our output has seen enough
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self { code: 0, message: String::new(), hint: None };
        }
        Self::other(format!("cannot write the output: {error}"))
    }
}
