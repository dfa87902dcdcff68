//! Paths, and what stands behind them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::to_bytes;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::answer::Choice;
use crate::app::{App, Underway};
use crate::error::ApiError;
use crate::request::Endpoint;

/// All paths.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(text))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/health", get(health))
        .fallback(nowhere)
        .method_not_allowed_fallback(not_so)
        .with_state(app)
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(&app, Endpoint::Chat, request).await
}

async fn text(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(&app, Endpoint::Text, request).await
}

/// A request for answers, the way of every token that is served.
async fn complete(app: &Arc<App>, endpoint: Endpoint, request: Request) -> Result<Response, ApiError> {
    // other types need no permission to be sent by any page that a browser shows
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let message = "expected the header `content-type: application/json`".to_owned();
        return Err(ApiError::Http { status: StatusCode::UNSUPPORTED_MEDIA_TYPE.as_u16(), message });
    }
    // bodies are held until their tokens are with the service
    let room = app.bodies.try_acquire().map_err(|_| ApiError::Crowd(app.limits.bodies))?;
    let reading =
        tokio::time::timeout(app.limits.body_time, to_bytes(request.into_body(), app.limits.body_bytes));
    let bytes = match reading.await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            let too_large = error.into_inner().downcast_ref::<http_body_util::LengthLimitError>().is_some();
            return Err(if too_large {
                let message = format!("the body is larger than {} bytes", app.limits.body_bytes);
                ApiError::Http { status: StatusCode::PAYLOAD_TOO_LARGE.as_u16(), message }
            } else {
                ApiError::body("the body ends before its end")
            });
        }
        Err(_) => {
            let message = format!("the body did not come within {:?}", app.limits.body_time);
            return Err(ApiError::Http { status: StatusCode::REQUEST_TIMEOUT.as_u16(), message });
        }
    };
    let underway = app.begin(endpoint, bytes).await?;
    drop(room);
    if underway.stream {
        return Ok(Sse::new(Chunks::new(underway)).keep_alive(KeepAlive::default()).into_response());
    }
    Ok(Json(underway.whole().await?).into_response())
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [described(&app)]}))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    app.check_model(Some(&name))?;
    Ok(Json(described(&app)))
}

fn described(app: &App) -> Value {
    json!({
        "id": app.served.name,
        "object": "model",
        "created": app.started,
        "owned_by": "minke",
        "context_length": app.handle.context(),
    })
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let stats = app.handle.stats();
    let (status, word) = if app.handle.is_alive() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "stopped")
    };
    let body = json!({
        "status": word,
        "running": stats.running,
        "waiting": stats.waiting,
        "pages": stats.pages,
        "most_pages": stats.most_pages,
        "tokens": stats.tokens,
        "cached_tokens": stats.cached,
        "preempted": stats.preempted,
        "ended": stats.ended,
    });
    (status, Json(body)).into_response()
}

async fn nowhere(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::Http { status: StatusCode::NOT_FOUND.as_u16(), message: format!("there is nothing at {path}") }
}

async fn not_so() -> ApiError {
    let message = "this path takes another method".to_owned();
    ApiError::Http { status: StatusCode::METHOD_NOT_ALLOWED.as_u16(), message }
}

/// An answer as a stream of events. Dropping it, as when the client goes away, cancels.
struct Chunks {
    underway: Option<Underway>,
    ready: VecDeque<sse::Event>,
}

impl Chunks {
    fn new(underway: Underway) -> Self {
        let first = |choice: &Choice| Some(event(&underway.frame.chunk(vec![choice.first()?])));
        let ready = underway.choices.iter().filter_map(first).collect();
        Self { underway: Some(underway), ready }
    }

    /// What an event of the service makes; the answers are over when there is nothing more to come.
    fn take(&mut self, next: Option<(usize, minke_infer::Event)>) {
        let Some(underway) = &mut self.underway else { return };
        let chunk = match next {
            None => Err(ApiError::Stopped),
            Some((index, event)) => underway.choices[index].take(event),
        };
        match chunk {
            Ok(chunk) => self.ready.extend(chunk.map(|chunk| event(&underway.frame.chunk(vec![chunk])))),
            Err(error) => {
                self.ready.push_back(event(&error.to_json()));
                self.underway = None;
                return;
            }
        }
        if underway.choices.iter().all(Choice::is_done) {
            if underway.include_usage {
                self.ready.push_back(event(&underway.frame.last(&underway.choices)));
            }
            self.ready.push_back(sse::Event::default().data("[DONE]"));
            self.underway = None;
        }
    }
}

fn event(value: &Value) -> sse::Event {
    // JSON on one line: line ends within texts are escaped
    sse::Event::default().data(value.to_string())
}

impl tokio_stream::Stream for Chunks {
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(underway) = &mut self.underway else { return Poll::Ready(None) };
            match underway.poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(next) => self.take(next),
            }
        }
    }
}
