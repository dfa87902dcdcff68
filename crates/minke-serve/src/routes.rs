//! Paths, and what stands behind them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Value, json};
use tokio::sync::SemaphorePermit;

use crate::answer::{Choice, answered};
use crate::app::{App, Limits, Underway};
use crate::error::ApiError;
use crate::log::Line;
use crate::request::Endpoint;

/// All paths.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(text))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/health", get(health))
        .fallback(|uri: Uri| ready(nowhere(&uri)))
        .method_not_allowed_fallback(not_so)
        .layer(from_fn_with_state(app.clone(), around))
        .with_state(app)
}

/// Around every request: its line in the log, whether it may be asked, and what a browser must be told before a page of
/// another origin may ask and read.
async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let line = Line::new(&app.options.log, request.method(), request.uri());
    request.extensions_mut().insert(line.clone());
    if let Err(error) = may_ask(&app, request.headers()) {
        line.status(error.status());
        return error.into_response();
    }
    let origin = request.headers().get(header::ORIGIN).cloned();
    let asks_first = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let wants = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let mut response = if origin.is_some() && asks_first {
        StatusCode::NO_CONTENT.into_response()
    } else {
        next.run(request).await
    };
    if let Some(origin) = origin {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        if asks_first {
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
            headers.extend(wants.map(|wants| (header::ACCESS_CONTROL_ALLOW_HEADERS, wants)));
        }
    }
    line.status(response.status());
    response
}

/// Whether somebody may ask who sends these headers. Browsers say whose page asks, and under which name it found the
/// server: any page that they show could use it otherwise, a stranger's under a name of its own that leads here too.
///
/// # Errors
/// The page's origin was not named by the server's owner, or a server that only this machine reaches is asked under a name
/// that others may give.
fn may_ask(app: &App, headers: &HeaderMap) -> Result<(), ApiError> {
    let refuse = |what: &str, got: &HeaderValue, hint: &str| {
        let got: String = String::from_utf8_lossy(got.as_bytes()).chars().take(200).collect();
        let message = format!("{what} `{got}` may not ask here, unless the server was started with {hint}");
        Err(ApiError::Http { status: StatusCode::FORBIDDEN.as_u16(), message })
    };
    let named = &app.options.origins;
    match headers.get(header::ORIGIN) {
        Some(origin) if !named.iter().any(|named| named.as_bytes() == origin.as_bytes()) => {
            return refuse("pages of the origin", origin, "--allow-origin and that origin");
        }
        _ => {}
    }
    match headers.get(header::HOST) {
        Some(host) if app.is_local && !host.to_str().is_ok_and(|host| is_ours(host, named)) => {
            refuse("who calls this server", host, "--allow-origin and an origin of that host")
        }
        _ => Ok(()),
    }
}

/// Whether a host, with its port or without, is this machine by a name that nobody else can give, or is that of an origin
/// that was named.
fn is_ours(host: &str, origins: &[String]) -> bool {
    let name = |host: &str| -> String {
        let end = host.rfind(':').filter(|&at| !host[at..].contains(']'));
        host[..end.unwrap_or(host.len())].to_ascii_lowercase()
    };
    let host = name(host);
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&host);
    let is_loopback = address.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    let of_origin = |origin: &String| origin.split_once("://").is_some_and(|(_, named)| name(named) == host);
    host == "localhost" || is_loopback || origins.iter().any(of_origin)
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(&app, Endpoint::Chat, request).await
}

async fn text(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(&app, Endpoint::Text, request).await
}

/// A request for answers, the way of every token that is served.
async fn complete(app: &Arc<App>, endpoint: Endpoint, request: Request) -> Result<Response, ApiError> {
    let line = request.extensions().get::<Line>().cloned().expect("laid around all paths");
    // other types need no permission to be sent by any page that a browser shows
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let message = "expected the header `content-type: application/json`".to_owned();
        return Err(ApiError::Http { status: StatusCode::UNSUPPORTED_MEDIA_TYPE.as_u16(), message });
    }
    let submitted = Instant::now();
    let (place, bytes) = read(app, request.into_body()).await?;
    let encoded = app.read(endpoint, bytes).await?;
    // the body is tokens
    drop(place);
    let mut underway = app.begin(endpoint, encoded, submitted).await?;
    if underway.stream {
        return Ok(Sse::new(Chunks::new(underway, line)).keep_alive(KeepAlive::default()).into_response());
    }
    let whole = underway.whole().await?;
    line.answered(answered(&underway.choices));
    Ok(Json(whole).into_response())
}

/// A body, and its place among those that are held.
async fn read(app: &App, body: Body) -> Result<(SemaphorePermit<'_>, Vec<u8>), ApiError> {
    let limits = &app.options.limits;
    let mut body = Limited::new(body, limits.body_bytes);
    // who only announces a body holds no place
    let mut bytes = piece(&mut body, limits).await?.unwrap_or_default().to_vec();
    let place = within(limits.body_time, "there was no place for the body", app.bodies.acquire()).await?;
    let place = place.expect("nobody closes it");
    let rest = async {
        while let Some(piece) = piece(&mut body, limits).await? {
            bytes.extend_from_slice(&piece);
        }
        Ok::<_, ApiError>(bytes)
    };
    let bytes = within(limits.body_time, "the body did not come", rest).await??;
    Ok((place, bytes))
}

/// The next bytes of a body, unless it is over.
async fn piece(body: &mut Limited<Body>, limits: &Limits) -> Result<Option<Bytes>, ApiError> {
    let next = within(limits.stall_time, "nothing of the body came", body.frame()).await?;
    match next.transpose() {
        // (trailers say nothing)
        Ok(frame) => Ok(frame.map(|frame| frame.into_data().unwrap_or_default())),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {} bytes", limits.body_bytes);
            Err(ApiError::Http { status: StatusCode::PAYLOAD_TOO_LARGE.as_u16(), message })
        }
        Err(_) => Err(ApiError::body("the body ends before its end")),
    }
}

/// What becomes ready in time.
async fn within<T>(time: Duration, what: &str, ready: impl Future<Output = T>) -> Result<T, ApiError> {
    tokio::time::timeout(time, ready).await.map_err(|_| {
        let message = format!("{what} within {time:?}");
        ApiError::Http { status: StatusCode::REQUEST_TIMEOUT.as_u16(), message }
    })
}

fn models(State(app): State<Arc<App>>) -> Ready<Json<Value>> {
    ready(Json(json!({"object": "list", "data": [described(&app)]})))
}

fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Ready<Result<Json<Value>, ApiError>> {
    ready(app.check_model(Some(&name)).map(|()| Json(described(&app))))
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

fn health(State(app): State<Arc<App>>) -> Ready<Response> {
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
    ready((status, Json(body)).into_response())
}

fn nowhere(uri: &Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("there is nothing at {path}");
    ApiError::Http { status: StatusCode::NOT_FOUND.as_u16(), message }
}

fn not_so() -> Ready<ApiError> {
    let message = "this path takes another method".to_owned();
    ready(ApiError::Http { status: StatusCode::METHOD_NOT_ALLOWED.as_u16(), message })
}

/// An answer as a stream of events. Dropping it, as when the client goes away, cancels.
struct Chunks {
    underway: Option<Underway>,
    ready: VecDeque<sse::Event>,
    line: Line,
}

impl Drop for Chunks {
    fn drop(&mut self) {
        if self.underway.is_some() {
            self.line.gone();
        }
    }
}

impl Chunks {
    fn new(underway: Underway, line: Line) -> Self {
        let first = |choice: &Choice| Some(event(&underway.frame.chunk(&[choice.first()?])));
        let ready = underway.choices.iter().filter_map(first).collect();
        Self { underway: Some(underway), ready, line }
    }

    /// What an event of the service makes; the answers are over when there is nothing more to come.
    fn take(&mut self, next: Option<(usize, minke_infer::Event)>) {
        let Some(underway) = &mut self.underway else { return };
        match underway.take(next) {
            Ok(chunk) => self.ready.extend(chunk.map(|chunk| event(&underway.frame.chunk(&[chunk])))),
            Err(error) => {
                self.ready.push_back(event(&error.to_json()));
                self.line.status(error.status());
                self.underway = None;
                return;
            }
        }
        if underway.choices.iter().all(Choice::is_done) {
            self.line.answered(answered(&underway.choices));
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
