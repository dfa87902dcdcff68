//! Errors as clients of this kind of API read them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use minke_infer::{ConstraintError, EngineError, SubmitError};
use serde_json::{Value, json};

use crate::request::Endpoint;

/// Why a request got no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// The body is not what it should be; the field, where it is one.
    #[error("{message}")]
    Invalid {
        /// What is wrong.
        message: String,
        /// Where.
        param: Option<String>,
    },
    /// Another model is served here.
    #[error("the model `{got}` is not served here; it is `{served}`")]
    Model {
        /// The name asked for.
        got: String,
        /// The name that there is.
        served: String,
    },
    /// Prompt and answer do not fit.
    #[error(
        "{got} tokens do not fit into {}: {prompt} of the prompt, {answer} of the answer; shorten the prompt or ask for \
         fewer{}",
        limit_of(*limit, *model),
        if limit < model { ", or give the server more memory (--cache-gib)" } else { "" }
    )]
    Context {
        /// Where it was asked.
        endpoint: Endpoint,
        /// All tokens.
        got: usize,
        /// Tokens that fit.
        limit: usize,
        /// Tokens that the model takes: more, where memory is what is short.
        model: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        answer: usize,
    },
    /// A body that is too long, of another type, or a path that is not there.
    #[error("{message}")]
    Http {
        /// The status.
        status: u16,
        /// What is wrong.
        message: String,
    },
    /// Nothing that is allowed can come next.
    #[error(
        "the answer cannot go on: of what its form and `logit_bias` allow nothing can come next; check whether anything has \
         this form"
    )]
    DeadEnd,
    /// Its time was over before it was taken up.
    #[error("the server is busy: the request waited for all the time that it has; try again later")]
    Late,
    /// Too many wait.
    #[error("the server is busy: {0}; try again later")]
    Busy(SubmitError),
    /// It is being stopped.
    #[error("the server is being stopped")]
    Stopped,
    /// The model cannot go on.
    #[error("{0}")]
    Engine(EngineError),
}

impl ApiError {
    /// An error in a field.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = param.into();
        Self::Invalid { message: format!("`{param}`: {}", message.into()), param: Some(param) }
    }

    /// An error in the body.
    pub fn body(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: None }
    }

    /// The status of the response.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Model { .. } => StatusCode::NOT_FOUND,
            Self::Http { status, .. } => StatusCode::from_u16(*status).unwrap_or(StatusCode::BAD_REQUEST),
            Self::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Stopped | Self::Late => StatusCode::SERVICE_UNAVAILABLE,
            Self::Engine(EngineError::NotANumber { .. }) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Engine(EngineError::Constraint(ConstraintError::NoThread)) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Invalid { .. } | Self::Context { .. } | Self::DeadEnd | Self::Engine(_) => {
                StatusCode::BAD_REQUEST
            }
        }
    }

    /// The body that says it.
    pub fn to_json(&self) -> Value {
        let status = self.status();
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let (param, code) = match self {
            Self::Invalid { param, .. } => (param.as_deref(), None),
            Self::Model { .. } => (Some("model"), Some("model_not_found")),
            Self::Context { endpoint: Endpoint::Chat, .. } => {
                (Some("messages"), Some("context_length_exceeded"))
            }
            Self::Context { endpoint: Endpoint::Text, .. } => {
                (Some("prompt"), Some("context_length_exceeded"))
            }
            Self::Engine(EngineError::Context { .. } | EngineError::Memory { .. }) => {
                (None, Some("context_length_exceeded"))
            }
            Self::Busy(_) => (None, Some("rate_limit_exceeded")),
            Self::Http { .. } | Self::DeadEnd | Self::Late | Self::Stopped | Self::Engine(_) => (None, None),
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": param, "code": code}})
    }
}

/// What tokens do not fit into.
fn limit_of(limit: usize, model: usize) -> String {
    if limit < model {
        format!("the memory for caches, which holds {limit} of the {model} that the model takes")
    } else {
        format!("the context of {limit}")
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Full(_) => Self::Busy(error),
            SubmitError::Stopped => Self::Stopped,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let is_busy = matches!(self, Self::Busy(_) | Self::Late);
        let mut response = (status, axum::Json(self.to_json())).into_response();
        if is_busy {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
