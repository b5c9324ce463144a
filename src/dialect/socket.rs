//! What all WebSocket dialects have in common: frames in and out, limits, pings, the end.
//!
//! One task serves a connection. It reads while it waits for something to tell, so pings are answered and a barge-in
//! is seen in the middle of an answer. What is ready to be told at one moment leaves in one write.

use std::{borrow::Cow, future::Future, time::Duration};

use axum::{
    body::Bytes,
    extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code},
};
use futures::SinkExt;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Fault};

/// Bytes that are read at once. Clients' messages are short, and idle connections are many.
const READ_BUFFER: usize = 2 << 10;
/// Bytes of frames that are gathered before they are written though more may follow.
const WRITE_BUFFER: usize = 16 << 10;
/// A message of up to so many times the limit is read to its end, since a client that still sends would not see why
/// the connection is closed.
const DRAINED: usize = 8;
/// How long a client that did not read may take to read why it is closed.
pub const LAST_WORDS: Duration = Duration::from_secs(5);
/// Closed because another connection took the session over.
pub const TAKEN_OVER: u16 = 4409;

/// Limits of a connection.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest message that is read, in bytes.
    pub max_message: usize,
    /// Longest that a client may take nothing of what it is sent.
    pub write_timeout: Duration,
    /// Longest that a client may send nothing; zero is no limit.
    pub idle_timeout: Duration,
    /// Pause between pings; zero is none.
    pub ping_interval: Duration,
    /// Cancelled when the server stops.
    pub stop: CancellationToken,
}

/// Frames that are ready to be sent, each the JSON of one event.
#[derive(Debug, Default)]
pub struct Frames(Vec<String>);

/// Whether a connection goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    GoOn,
    /// It is closed with this code and reason.
    Close(u16, Cow<'static, str>),
}

/// What a dialect does on a connection.
pub trait Protocol: Send {
    /// Takes a client's event.
    fn receive(&mut self, event: Value, out: &mut Frames) -> impl Future<Output = Flow> + Send;

    /// Tells that a frame was no event.
    fn refuse(&mut self, error: Error, out: &mut Frames);

    /// Waits until there is something to tell. Nothing is lost when the future is dropped before it is ready.
    fn deliver(&mut self, out: &mut Frames) -> impl Future<Output = Flow> + Send;

    /// Does what receiving or delivering left to be done. It is never dropped in the middle.
    fn settle(&mut self, _out: &mut Frames) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// The client closed the connection, with this code.
    fn closed(&mut self, _code: Option<u16>) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Whether an answer is under way that should be heard to its end before the server stops.
    fn is_busy(&self) -> bool;
}

// === impl Frames ===

impl Frames {
    /// Adds an event.
    pub fn push(&mut self, event: &impl Serialize) {
        // These types hold nothing that cannot be written as JSON.
        self.0.push(serde_json::to_string(event).unwrap_or_default());
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Leaves out the first ones.
    pub fn skip(&mut self, from: usize, count: usize) {
        let end = (from + count).min(self.0.len());
        self.0.drain(from..end);
    }
}

/// Sets a connection up before it is upgraded.
pub fn configure(upgrade: WebSocketUpgrade, limits: &Limits) -> WebSocketUpgrade {
    upgrade
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_message_size(limits.max_message.saturating_mul(DRAINED))
        .max_frame_size(limits.max_message.saturating_mul(DRAINED))
}

/// Serves a connection to its end.
pub async fn serve(mut socket: WebSocket, mut protocol: impl Protocol, limits: Limits) {
    let flow = exchange(&mut socket, &mut protocol, &limits).await;
    // What is read no more is stopped before the goodbye.
    drop(protocol);
    let Flow::Close(code, reason) = flow else { return };
    tracing::debug!(code, %reason, "closing");
    let frame = CloseFrame { code, reason: reason.as_ref().into() };
    let bye = async {
        socket.send(Message::Close(Some(frame))).await?;
        // The client's own close frame; what else it sends is of no interest any more.
        while let Some(Ok(_)) = socket.recv().await {}
        Ok::<(), axum::Error>(())
    };
    let _ = tokio::time::timeout(LAST_WORDS, bye).await;
}

/// Passes events in both directions until the connection is to be closed. [`Flow::GoOn`] is given when it is gone
/// already.
async fn exchange(socket: &mut WebSocket, protocol: &mut impl Protocol, limits: &Limits) -> Flow {
    let mut out = Frames::default();
    let mut heard = Instant::now();
    let mut spoken = heard;
    let mut pinged = false;
    let mut stopping = false;
    loop {
        if stopping && !protocol.is_busy() {
            return Flow::Close(close_code::AWAY, "the server is stopping".into());
        }
        let silent = deadline(heard, limits.ping_interval * if pinged { 2 } else { 1 });
        let idle = deadline(spoken, limits.idle_timeout);
        let flow = tokio::select! {
            biased;
            message = socket.recv() => {
                (heard, pinged) = (Instant::now(), false);
                match message {
                    None | Some(Ok(Message::Close(_))) => {
                        if let Some(Ok(Message::Close(frame))) = message {
                            protocol.closed(frame.map(|frame| frame.code)).await;
                        }
                        // The answer to a close frame is written while reading on.
                        let rest = async { while let Some(Ok(_)) = socket.recv().await {} };
                        let _ = tokio::time::timeout(LAST_WORDS, rest).await;
                        return Flow::GoOn;
                    }
                    Some(Err(e)) => return broken(&e, limits.max_message),
                    // Its answer is written while reading on.
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => Flow::GoOn,
                    Some(Ok(Message::Binary(_))) => {
                        spoken = heard;
                        refuse(protocol, "Binary frames are not served here; send each event as a text frame.", &mut out);
                        Flow::GoOn
                    }
                    Some(Ok(Message::Text(text))) => {
                        spoken = heard;
                        if text.len() > limits.max_message {
                            return too_large(limits.max_message);
                        }
                        match serde_json::from_str::<Value>(&text) {
                            Ok(event) => protocol.receive(event, &mut out).await,
                            Err(e) => {
                                refuse(protocol, &format!("The frame is not valid JSON: {e}"), &mut out);
                                Flow::GoOn
                            }
                        }
                    }
                }
            }
            flow = protocol.deliver(&mut out) => flow,
            () = silent => {
                if pinged || !send(socket, Message::Ping(Bytes::new()), limits).await {
                    tracing::debug!("the client does not answer pings");
                    return Flow::GoOn;
                }
                pinged = true;
                Flow::GoOn
            }
            () = idle => Flow::Close(close_code::POLICY, "no message came for the server's session.idle_timeout".into()),
            () = limits.stop.cancelled(), if !stopping => {
                stopping = true;
                Flow::GoOn
            }
        };
        protocol.settle(&mut out).await;
        if !write(socket, &mut out, limits).await {
            return Flow::Close(close_code::AGAIN, "the client takes nothing of what it is sent".into());
        }
        if flow != Flow::GoOn {
            return flow;
        }
    }
}

/// Resolves so long after a time; never when the pause is zero.
async fn deadline(from: Instant, pause: Duration) {
    if pause.is_zero() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep_until(from + pause).await;
}

fn refuse(protocol: &mut impl Protocol, why: &str, out: &mut Frames) {
    protocol.refuse(Error::Invalid(vec![Fault::new([], why)]), out);
}

fn too_large(limit: usize) -> Flow {
    Flow::Close(close_code::SIZE, format!("a message may have up to {limit} bytes").into())
}

/// Why a connection can not be read any more.
fn broken(error: &axum::Error, limit: usize) -> Flow {
    use tokio_tungstenite::tungstenite::Error as Fault;
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<Fault>());
    match source {
        Some(Fault::Capacity(_)) => too_large(limit),
        Some(Fault::Utf8(_)) => Flow::Close(close_code::INVALID, "a text frame has to be valid UTF-8".into()),
        Some(Fault::Protocol(e)) => Flow::Close(close_code::PROTOCOL, e.to_string().into()),
        _ => Flow::GoOn,
    }
}

/// Writes all frames at once. Gives false when the client does not take them.
async fn write(socket: &mut WebSocket, out: &mut Frames, limits: &Limits) -> bool {
    if out.0.is_empty() {
        return true;
    }
    let written = async {
        for frame in out.0.drain(..) {
            socket.feed(Message::Text(frame.into())).await?;
        }
        socket.flush().await
    };
    // A connection that broke is noticed by reading.
    tokio::time::timeout(limits.write_timeout, written).await.is_ok()
}

async fn send(socket: &mut WebSocket, message: Message, limits: &Limits) -> bool {
    matches!(tokio::time::timeout(limits.write_timeout, socket.send(message)).await, Ok(Ok(())))
}
