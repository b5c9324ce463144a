//! An answer as it comes: server-sent events in, turn events out, nothing held back.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::BytesMut;
use reqwest::header::CONTENT_TYPE;
use serde::Deserialize;
use tokio::time::Instant;

use super::{Upstreams, health::Verdict, request::error_of};
use crate::{
    config,
    error::Error,
    turn::{FinishReason, Origin, TokenLogprob, TurnEvent, Usage},
};

/// Longest line of a stream.
const LINE: usize = 1 << 20;
/// Most that is read of an error.
const ERROR: usize = 16 << 10;
/// For servers that count nothing.
const BYTES_A_TOKEN: usize = 4;

/// The answer of a server. Dropping it closes the stream, by which the server stops.
pub struct Answer {
    response: reqwest::Response,
    origin: Origin,
    decoder: Decoder,
    ready: VecDeque<TurnEvent>,
    between: Duration,
    begun: Instant,
    deadline: Instant,
    lease: Lease,
    over: bool,
}

/// A turn's place on a server.
pub(super) struct Lease {
    upstreams: Arc<Upstreams>,
    at: usize,
    /// Whether the server has answered, so that its health is known without the end of the turn.
    answered: bool,
}

// === impl Answer ===

impl Answer {
    /// The answer to a request of so many bytes.
    ///
    /// # Errors
    /// A text for the log, when the response is no stream of events.
    pub(super) fn new(
        mut response: reqwest::Response,
        origin: Origin,
        lease: Lease,
        asked: usize,
        settings: &config::Upstream,
        deadline: Instant,
    ) -> Result<Self, String> {
        let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.to_ascii_lowercase().starts_with("text/event-stream") {
            return Err(format!("its server answered with {}, not with a stream of events", shown(kind)));
        }
        // They would hold on to the memory that they were read into for as long as the answer lasts.
        response.headers_mut().clear();
        Ok(Self {
            response,
            origin,
            decoder: Decoder { asked, ..Decoder::default() },
            ready: VecDeque::new(),
            between: settings.token_timeout,
            begun: Instant::now(),
            deadline,
            lease,
            over: false,
        })
    }

    /// Waits until there is an event.
    ///
    /// # Errors
    /// [`Error::EngineFailed`] when there will be none.
    pub(super) async fn first(&mut self) -> Result<(), Error> {
        while self.ready.is_empty() {
            self.read().await?;
        }
        self.lease.answered = true;
        Ok(())
    }

    /// The next event. `None` only after [`TurnEvent::Finished`] or an error.
    pub async fn next(&mut self) -> Option<Result<TurnEvent, Error>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.over = matches!(event, TurnEvent::Finished { .. });
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            let until = self.deadline.min(Instant::now() + self.between);
            let read = tokio::time::timeout_at(until, self.read()).await;
            let read = read.unwrap_or_else(|_| Err(Error::EngineFailed("its server stopped in the middle".into())));
            if let Err(e) = read {
                self.over = true;
                self.lease.note(Verdict::Bad { begun: self.begun });
                let Origin { server, request_id } = &self.origin;
                tracing::warn!(upstream = &**server, upstream_request_id = request_id, error = %e, "an upstream failed");
                return Some(Err(e));
            }
        }
    }

    /// Who answers.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What it has cost so far. Where the server gives no figures they are estimated.
    pub fn usage(&self) -> Usage {
        self.decoder.usage()
    }

    /// Reads a piece of the stream.
    async fn read(&mut self) -> Result<(), Error> {
        let failed = |why: &str| Err(Error::EngineFailed(why.to_owned()));
        match self.response.chunk().await {
            Ok(Some(chunk)) => self.decoder.push(&chunk, &mut self.ready).map_err(Error::EngineFailed),
            Err(_) => failed("its server broke the answer off"),
            Ok(None) if self.decoder.end(&mut self.ready) => Ok(()),
            Ok(None) => failed("its server ended the answer before it was complete"),
        }
    }
}

// === impl Lease ===

impl Lease {
    pub(super) fn new(upstreams: Arc<Upstreams>, at: usize) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        upstreams.open.fetch_add(1, Relaxed);
        upstreams.servers[at].open.fetch_add(1, Relaxed);
        Self { upstreams, at, answered: false }
    }

    fn note(&self, verdict: Verdict) {
        self.upstreams.servers[self.at].health.note(verdict, Instant::now());
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        use std::sync::atomic::Ordering::Relaxed;
        self.upstreams.open.fetch_sub(1, Relaxed);
        self.upstreams.servers[self.at].open.fetch_sub(1, Relaxed);
        if !self.answered {
            self.note(Verdict::Unknown);
        }
    }
}

// === Decoder ===

/// Bytes of a streamed chat completion in, events out.
#[derive(Default)]
pub struct Decoder {
    /// The beginning of a line.
    held: BytesMut,
    /// The call that is open: its index here, and its index and id there.
    call: Option<(usize, u64, String)>,
    calls: usize,
    reason: Option<FinishReason>,
    told: Option<Usage>,
    /// Bytes of the request.
    asked: usize,
    /// Pieces of text and of arguments, each of which is about a token.
    pieces: usize,
    done: bool,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Figures>,
    error: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: u64,
    delta: Option<Delta>,
    finish_reason: Option<String>,
    logprobs: Option<Logprobs>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    refusal: Option<String>,
    tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Deserialize)]
struct CallDelta {
    index: Option<u64>,
    id: Option<String>,
    function: Option<FunctionDelta>,
}

#[derive(Deserialize)]
struct FunctionDelta {
    name: Option<String>,
    arguments: Option<String>,
}

#[derive(Deserialize)]
struct Figures {
    #[serde(default)]
    prompt_tokens: usize,
    #[serde(default)]
    completion_tokens: usize,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<LogprobOf>>,
}

#[derive(Deserialize)]
struct LogprobOf {
    #[serde(flatten)]
    token: TokenOf,
    #[serde(default)]
    top_logprobs: Vec<TokenOf>,
}

#[derive(Deserialize)]
struct TokenOf {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

impl Decoder {
    /// Takes a piece of the stream, however it was cut.
    ///
    /// # Errors
    /// A text for the log and the caller: what is wrong with the stream.
    pub fn push(&mut self, mut chunk: &[u8], out: &mut VecDeque<TurnEvent>) -> Result<(), String> {
        while let Some(end) = chunk.iter().position(|b| *b == b'\n') {
            let (line, rest) = (&chunk[..end], &chunk[end + 1..]);
            chunk = rest;
            if self.held.is_empty() {
                self.line(line, out)?;
            } else {
                self.held.extend_from_slice(line);
                let line = self.held.split();
                self.line(&line, out)?;
            }
            if self.done {
                return Ok(());
            }
        }
        if self.held.len() + chunk.len() > LINE {
            return Err("its server sent an event that is too long".into());
        }
        self.held.extend_from_slice(chunk);
        Ok(())
    }

    fn line(&mut self, line: &[u8], out: &mut VecDeque<TurnEvent>) -> Result<(), String> {
        // Comments keep a connection open; other fields are of no interest.
        let Some(data) = line.strip_prefix(b"data:") else { return Ok(()) };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.done = true;
            let reason = self.reason.unwrap_or(FinishReason::Stop);
            self.finish(reason, out);
            return Ok(());
        }
        if data.is_empty() {
            return Ok(());
        }
        let chunk: Chunk =
            serde_json::from_slice(data).map_err(|_| "its server sent an event that is no chunk of an answer")?;
        if chunk.error.is_some() {
            let message = error_of(data).message;
            return Err(format!("its server says: {}", message.chars().take(super::TOLD).collect::<String>()));
        }
        if let Some(figures) = chunk.usage {
            self.told = Some(Usage {
                prompt_tokens: figures.prompt_tokens,
                cached_tokens: figures.prompt_tokens_details.and_then(|d| d.cached_tokens).unwrap_or(0),
                completion_tokens: figures.completion_tokens,
            });
        }
        for choice in chunk.choices.into_iter().filter(|choice| choice.index == 0) {
            let logprobs = choice.logprobs.and_then(|logprobs| logprobs.content).unwrap_or_default();
            if let Some(delta) = choice.delta {
                self.delta(delta, logprobs, out);
            }
            if let Some(reason) = choice.finish_reason {
                self.reason = Some(match reason.as_str() {
                    "length" => FinishReason::Length,
                    "tool_calls" | "function_call" => FinishReason::ToolCalls,
                    _ => FinishReason::Stop,
                });
            }
        }
        Ok(())
    }

    fn delta(&mut self, delta: Delta, logprobs: Vec<LogprobOf>, out: &mut VecDeque<TurnEvent>) {
        if let Some(text) = delta.content.or(delta.refusal).filter(|text| !text.is_empty()) {
            self.pieces += 1;
            let logprobs = logprobs.into_iter().map(LogprobOf::read).collect();
            out.push_back(TurnEvent::Text { delta: text, logprobs });
        }
        for (at, call) in delta.tool_calls.into_iter().flatten().enumerate() {
            let there = call.index.unwrap_or(at as u64);
            let id = call.id.unwrap_or_default();
            let (name, arguments) = call.function.map_or((None, None), |f| (f.name, f.arguments));
            let name = name.filter(|name| !name.is_empty());
            // Some servers say id and name in each piece; some number all calls with 0.
            let goes_on = self
                .call
                .as_ref()
                .is_some_and(|(_, index, known)| *index == there && (id.is_empty() || id == *known || name.is_none()));
            if !goes_on {
                self.end_call(out);
                let Some(name) = name else { continue };
                let index = self.calls;
                self.calls += 1;
                out.push_back(TurnEvent::CallBegun { index, id: id.clone(), name });
                self.call = Some((index, there, id));
            }
            if let (Some((index, ..)), Some(delta)) = (&self.call, arguments.filter(|delta| !delta.is_empty())) {
                self.pieces += 1;
                out.push_back(TurnEvent::Arguments { index: *index, delta });
            }
        }
    }

    fn end_call(&mut self, out: &mut VecDeque<TurnEvent>) {
        if let Some((index, ..)) = self.call.take() {
            out.push_back(TurnEvent::CallEnded { index });
        }
    }

    fn finish(&mut self, reason: FinishReason, out: &mut VecDeque<TurnEvent>) {
        self.end_call(out);
        out.push_back(TurnEvent::Finished { reason, usage: self.usage() });
    }

    /// The end of a stream without `[DONE]`, which is good when the answer said why it ends.
    pub fn end(&mut self, out: &mut VecDeque<TurnEvent>) -> bool {
        let Some(reason) = self.reason else { return false };
        self.finish(reason, out);
        true
    }

    fn usage(&self) -> Usage {
        self.told.unwrap_or(Usage {
            prompt_tokens: self.asked / BYTES_A_TOKEN,
            cached_tokens: 0,
            completion_tokens: self.pieces,
        })
    }
}

impl LogprobOf {
    fn read(self) -> TokenLogprob {
        let bytes = |token: TokenOf| token.bytes.unwrap_or_else(|| token.token.into_bytes());
        let logprob = self.token.logprob;
        let top = self.top_logprobs.into_iter().map(|token| {
            let logprob = token.logprob;
            (bytes(token), logprob)
        });
        let top = top.collect();
        TokenLogprob { bytes: bytes(self.token), logprob, top }
    }
}

fn shown(kind: &str) -> &str {
    if kind.is_empty() { "something" } else { kind.split(';').next().unwrap_or(kind) }
}

/// The beginning of a response's body.
pub(super) async fn beginning_of(mut response: reqwest::Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk[..chunk.len().min(ERROR - body.len())]);
        if body.len() >= ERROR {
            break;
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a stream that comes in pieces of this size, and what is wrong with it.
    fn decoded(stream: &str, size: usize) -> (Vec<TurnEvent>, Option<String>) {
        let (mut decoder, mut out) = (Decoder { asked: 400, ..Decoder::default() }, VecDeque::new());
        for piece in stream.as_bytes().chunks(size) {
            if let Err(why) = decoder.push(piece, &mut out) {
                return (out.into(), Some(why));
            }
        }
        if !decoder.done && !decoder.end(&mut out) {
            return (out.into(), Some("cut".into()));
        }
        (out.into(), None)
    }

    fn chunk(delta: &str, more: &str) -> String {
        format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta}{more}}}]}}\r\n\r\n")
    }

    fn text(text: &str) -> TurnEvent {
        TurnEvent::Text { delta: text.into(), logprobs: Vec::new() }
    }

    #[test]
    fn text_and_usage_are_read_however_they_are_cut() {
        let stream = [
            ": keep-alive\n\n".to_owned(),
            chunk(r#"{"role":"assistant","content":""}"#, ""),
            chunk(r#"{"content":"Grüß "}"#, ""),
            chunk(r#"{"content":"dich"}"#, r#","finish_reason":null"#),
            chunk("{}", r#","finish_reason":"length""#),
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\
             \"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\ndata: [DONE]\n\n"
                .to_owned(),
        ]
        .concat();
        let usage = Usage { prompt_tokens: 9, cached_tokens: 4, completion_tokens: 2 };
        let wanted = vec![text("Grüß "), text("dich"), TurnEvent::Finished { reason: FinishReason::Length, usage }];
        for size in [1, 2, 3, 7, 50, 10_000] {
            assert_eq!(decoded(&stream, size), (wanted.clone(), None), "{size}");
        }
    }

    #[test]
    fn calls_are_told_apart_as_servers_write_them() {
        let usage = Usage { prompt_tokens: 100, cached_tokens: 0, completion_tokens: 2 };
        let begun = |index, id: &str, name: &str| TurnEvent::CallBegun { index, id: id.into(), name: name.into() };
        let arguments = |index, delta: &str| TurnEvent::Arguments { index, delta: delta.into() };
        let wanted = vec![
            begun(0, "a", "f"),
            arguments(0, "{}"),
            TurnEvent::CallEnded { index: 0 },
            begun(1, "b", "g"),
            arguments(1, "{}"),
            TurnEvent::CallEnded { index: 1 },
            TurnEvent::Finished { reason: FinishReason::ToolCalls, usage },
        ];
        let call = |index: &str, id: &str, name: &str, arguments: &str| {
            let (id, name) = (format!("\"id\":\"{id}\","), format!("\"name\":\"{name}\","));
            chunk(&format!(r#"{{"tool_calls":[{{{index}{id}"function":{{{name}"arguments":"{arguments}"}}}}]}}"#), "")
        };
        let end = chunk("{}", r#","finish_reason":"tool_calls""#);
        let pieces = |index: &str, id: &str, name: &str| {
            let rest = format!(r#"{{"tool_calls":[{{{index}"function":{{"arguments":"{{}}"}}}}]}}"#);
            [call(index, id, name, ""), chunk(&rest, "")].concat()
        };
        for stream in [
            // As OpenAI does it.
            [pieces("\"index\":0,", "a", "f"), pieces("\"index\":1,", "b", "g"), end.clone()].concat(),
            // Each whole, all with the same number.
            [call("\"index\":0,", "a", "f", "{}"), call("\"index\":0,", "b", "g", "{}"), end.clone()].concat(),
            // Without numbers.
            [call("", "a", "f", "{}"), call("", "b", "g", "{}"), end.clone()].concat(),
            // Id and name in each piece.
            [
                call("\"index\":0,", "a", "f", ""),
                call("\"index\":0,", "a", "f", "{}"),
                call("\"index\":1,", "b", "g", ""),
                call("\"index\":1,", "b", "g", "{}"),
                end.clone(),
            ]
            .concat(),
        ] {
            assert_eq!(decoded(&stream, 33), (wanted.clone(), None), "{stream}");
        }
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        let half = chunk(r#"{"content":"half"}"#, "");
        for (stream, why) in [
            (half.clone(), "cut"),
            (format!("{half}data: {{\"choi\n\n"), "no chunk"),
            (format!("{half}data: {{\"error\":{{\"message\":\"out of memory\"}}}}\n\n"), "out of memory"),
            (format!("data: {}", "x".repeat(LINE + 1)), "too long"),
        ] {
            let (_, fault) = decoded(&stream, 4096);
            assert!(fault.as_ref().is_some_and(|fault| fault.contains(why)), "{fault:?}");
        }
    }
}
