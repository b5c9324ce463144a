//! What a handler leaves unread of a request's body.
//!
//! An answer can be due before the body has been read: the key is wrong, the route is unknown, the body too large. HTTP/1
//! has no way to skip the rest of a body, so the connection would be closed behind the answer, and a client that still
//! sends, or that already asks again over it, would see that and not the answer. So the rest is read first and dropped.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream, Bytes, HttpBody},
    extract::{Request, State},
    http::{HeaderValue, Response, Version, header},
    middleware::Next,
};
use futures::{Stream, StreamExt};
use tokio::{sync::oneshot, time::Instant};

/// Bytes that are read and dropped; of a longer body the client learns nothing but that the connection is closed.
const DRAINED: usize = 64 << 20;

/// Reads what the handler has left of the body, for as long as a body may take to come.
pub(super) async fn drain(State(read_timeout): State<Duration>, request: Request, next: Next) -> Response<Body> {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let deadline = Instant::now() + read_timeout;
    let (parts, body) = request.into_parts();
    let version = parts.version;
    let (back, mut rest) = oneshot::channel();
    // Such a client sends its body when that begins to be read.
    let waits = parts.headers.contains_key(header::EXPECT);
    let lent = Lent { body: Some(body.into_data_stream()), begun: !waits, back: Some(back) };
    let mut response = next.run(Request::from_parts(parts, Body::from_stream(lent))).await;
    // A body that was read to its end does not come back.
    if let Ok(rest) = rest.try_recv()
        && !tokio::time::timeout_at(deadline, ends(rest)).await.unwrap_or(false)
        && version < Version::HTTP_2
    {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Whether a body ends within the bytes that are read and dropped.
async fn ends(rest: Option<BodyDataStream>) -> bool {
    let Some(mut rest) = rest else { return false };
    let mut length = 0;
    while let Some(chunk) = rest.next().await {
        match chunk {
            Ok(chunk) if length + chunk.len() <= DRAINED => length += chunk.len(),
            _ => return false,
        }
    }
    true
}

/// A body in the hands of a handler.
struct Lent {
    /// None when it has been read to its end.
    body: Option<BodyDataStream>,
    /// Whether the client sends it.
    begun: bool,
    /// Takes what is left when the handler lets go of it: nothing that can be read, if the client has not begun.
    back: Option<oneshot::Sender<Option<BodyDataStream>>>,
}

// === impl Lent ===

impl Stream for Lent {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.begun = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let chunk = ready!(body.poll_next_unpin(cx));
        if !matches!(chunk, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(chunk)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take()) {
            let _ = back.send(self.begun.then_some(body));
        }
    }
}
