//! What is known of a request: its id, its span, its figures, and the form of its errors.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Body,
    extract::{MatchedPath, Request},
    http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header},
    middleware::Next,
    response::IntoResponse,
};
use futures::Stream;
use opentelemetry::propagation::Extractor;
use tokio::time::Instant;
use tracing::{Instrument, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use uuid::Uuid;

use super::auth::Permit;
use crate::{
    error::Error,
    turn::{FinishReason, Message, Turn, TurnEvent, TurnStream, Usage},
};

/// Carries a request's id in both directions.
pub(super) static HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// A request's id: the caller's own, or a new one.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub Arc<str>);

/// The outermost layer: id, span, duration, and the body of errors.
pub(super) async fn observe(mut request: Request, next: Next) -> Response<Body> {
    let started = Instant::now();
    let id: Arc<str> = request
        .headers()
        .get(&HEADER)
        .and_then(|value| value.to_str().ok())
        .filter(|id| is_sane(id))
        .map_or_else(|| Uuid::now_v7().to_string().into(), Into::into);
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!(
        "request",
        otel.name = format!("{} {route}", request.method()),
        otel.kind = "server",
        otel.status_code = Empty,
        request_id = &*id,
        http.request.method = request.method().as_str(),
        http.route = route,
        http.response.status_code = Empty,
        key = Empty,
        gen_ai.operation.name = Empty,
        gen_ai.provider.name = Empty,
        gen_ai.request.model = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.cache_read.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.response.time_to_first_chunk = Empty,
    );
    let _ = span.set_parent(parent(request.headers()));
    request.extensions_mut().insert(RequestId(id.clone()));
    request.extensions_mut().insert(Observed { span: span.clone(), started });
    let mut response = next.run(request).instrument(span.clone()).await;

    if let Some(error) = response.extensions_mut().remove::<Arc<Error>>() {
        if let Error::Internal(why) = &*error {
            tracing::error!(parent: &span, why, "internal error");
        }
        let body = serde_json::to_vec(&error.body(&id)).unwrap_or_default();
        *response.body_mut() = Body::from(body);
        response.headers_mut().remove(header::CONTENT_LENGTH);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HEADER.clone(), value);
    }
    let status = response.status();
    span.record("http.response.status_code", status.as_u16());
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    let labels = [("route", route.clone()), ("status", status.as_u16().to_string())];
    metrics::counter!("electron_requests_total", &labels).increment(1);
    // A turn is logged when it ends; health checks and scrapes are not worth a line.
    let quiet =
        route.starts_with("/health") || route == "/metrics" || (status.is_success() && route.contains("/chat/"));
    if !quiet {
        let ms = started.elapsed().as_millis() as u64;
        tracing::info!(parent: &span, status = status.as_u16(), ms, route, "answered");
    }
    response
}

/// Ids that can stand in a log and a header: up to 128 visible ASCII characters.
fn is_sane(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// The trace that the caller is part of.
fn parent(headers: &HeaderMap) -> opentelemetry::Context {
    struct Headers<'a>(&'a HeaderMap);
    impl Extractor for Headers<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key).and_then(|value| value.to_str().ok())
        }
        fn keys(&self) -> Vec<&str> {
            self.0.keys().map(HeaderName::as_str).collect()
        }
    }
    opentelemetry::global::get_text_map_propagator(|propagator| propagator.extract(&Headers(headers)))
}

impl IntoResponse for Error {
    /// The status and the headers; the body, which names the request's id, is written by [`observe`].
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if let Some(wait) = self.retry_after() {
            // Whole seconds, and never less than the wait.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if let Self::UpgradeRequired(_) = self {
            response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
        if let Self::Unauthenticated(_) = self {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}

/// Watches the turn of a request.
#[derive(Clone)]
pub(super) struct Observed {
    span: Span,
    started: Instant,
}

// === impl Observed ===

impl Observed {
    /// Notes what was asked.
    pub(super) fn asked(&self, model: &str, turn: &Turn, with_content: bool) {
        self.span.record("gen_ai.operation.name", "chat");
        self.span.record("gen_ai.provider.name", "electron");
        self.span.record("gen_ai.request.model", model);
        if with_content {
            let last = turn.messages.iter().rev().find_map(|message| match message {
                Message::User(text) => Some(text.as_str()),
                _ => None,
            });
            tracing::info!(parent: &self.span, user = last, messages = turn.messages.len(), "asked");
        }
    }

    /// One turn of many on a connection, from now on.
    pub(super) fn turn(&self, model: &str) -> Self {
        let span = tracing::info_span!(
            parent: &self.span,
            "turn",
            otel.name = format!("chat {model}"),
            gen_ai.operation.name = "chat",
            gen_ai.provider.name = "electron",
            gen_ai.request.model = model,
            gen_ai.usage.input_tokens = Empty,
            gen_ai.usage.cache_read.input_tokens = Empty,
            gen_ai.usage.output_tokens = Empty,
            gen_ai.response.finish_reasons = Empty,
            gen_ai.response.time_to_first_chunk = Empty,
        );
        Self { span, started: Instant::now() }
    }

    /// The same, from now on: a round of a turn has a duration of its own.
    pub(super) fn again(&self) -> Self {
        Self { span: self.span.clone(), started: Instant::now() }
    }

    /// Counts what a turn costs, also when nobody reads it to its end.
    pub(super) fn watch(self, turn: TurnStream, permit: Arc<Permit>) -> TurnStream {
        let progress = turn.progress();
        let watched = Watched {
            turn: Mutex::new(turn),
            span: self.span,
            started: self.started,
            first: None,
            calls: false,
            ended: None,
            _permit: permit,
        };
        TurnStream::new(watched, progress)
    }
}

/// A turn whose figures are recorded when it ends or is dropped.
struct Watched {
    turn: Mutex<TurnStream>,
    span: Span,
    started: Instant,
    first: Option<Duration>,
    calls: bool,
    ended: Option<FinishReason>,
    _permit: Arc<Permit>,
}

impl Stream for Watched {
    type Item = Result<TurnEvent, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let turn = this.turn.get_mut().unwrap_or_else(PoisonError::into_inner);
        let polled = Pin::new(turn).poll_next(cx);
        if let Poll::Ready(Some(Ok(event))) = &polled {
            match event {
                TurnEvent::Text { .. } | TurnEvent::CallBegun { .. } if this.first.is_none() => {
                    this.first = Some(this.started.elapsed());
                }
                _ => {}
            }
            match event {
                TurnEvent::CallBegun { .. } => this.calls = true,
                TurnEvent::Finished { reason, .. } => this.ended = Some(*reason),
                _ => {}
            }
        }
        polled
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let turn = self.turn.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Usage { prompt_tokens, cached_tokens, completion_tokens } = turn.usage();
        let progress = turn.progress();
        let origin = progress.origin();
        let reason = self.ended.unwrap_or(FinishReason::Cancelled);
        let told = if reason == FinishReason::Cancelled { "cancelled" } else { reason.as_str() };
        metrics::counter!("electron_prompt_tokens_total").increment(prompt_tokens as u64);
        metrics::counter!("electron_cached_tokens_total").increment(cached_tokens as u64);
        metrics::counter!("electron_completion_tokens_total").increment(completion_tokens as u64);
        metrics::counter!("electron_turns_total", "finish_reason" => told).increment(1);
        if let Some(first) = self.first {
            metrics::histogram!("electron_time_to_first_token_seconds", "calls" => self.calls.to_string())
                .record(first.as_secs_f64());
            self.span.record("gen_ai.response.time_to_first_chunk", first.as_secs_f64());
        }
        metrics::histogram!("electron_turn_seconds").record(self.started.elapsed().as_secs_f64());
        self.span.record("gen_ai.usage.input_tokens", prompt_tokens as i64);
        self.span.record("gen_ai.usage.cache_read.input_tokens", cached_tokens as i64);
        self.span.record("gen_ai.usage.output_tokens", completion_tokens as i64);
        self.span.record("gen_ai.response.finish_reasons", told);
        tracing::info!(
            parent: &self.span,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            first_ms = self.first.map(|first| first.as_millis() as u64),
            ms = self.started.elapsed().as_millis() as u64,
            reason = told,
            upstream = origin.map(|origin| &*origin.server),
            upstream_request_id = origin.map(|origin| &*origin.request_id).filter(|id| !id.is_empty()),
            "turn ended"
        );
    }
}
