//! Turns for `chat` and `bench`: of a running server over HTTP, or of a model in this process.

use std::{pin::Pin, sync::Arc};

use clap::Args;
use futures::{Stream, StreamExt, stream};
use serde_json::Value;

use crate::{
    dialect::chat_completions,
    session::Settings,
    turn::{FillerPolicy, FinishReason, Model, TurnEvent, Usage},
};

/// The server to use, if it is to be one.
#[derive(Clone, Debug, Args)]
pub(super) struct Remote {
    /// A running server, such as http://127.0.0.1:8080. Without it the model is loaded into this process.
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// The server's key.
    #[arg(long, value_name = "KEY", env = "ELECTRON_API_KEY", default_value = "", hide_env_values = true)]
    pub key: String,
}

/// What answers.
#[derive(Clone)]
pub(super) enum Target {
    /// A server.
    Server { http: reqwest::Client, url: String, key: String },
    /// A model in this process, without a server in between.
    Engine(Arc<dyn Model>),
}

/// The events of a turn, from wherever they come.
pub(super) type Events = Pin<Box<dyn Stream<Item = Result<TurnEvent, String>> + Send>>;

// === impl Target ===

impl Target {
    /// A server at a base URL such as `http://127.0.0.1:8080`.
    pub(super) fn server(url: &str, key: &str) -> Result<Self, String> {
        let http = reqwest::Client::builder().tcp_nodelay(true).build().map_err(|e| e.to_string())?;
        Ok(Self::Server { http, url: url.trim_end_matches('/').to_owned(), key: key.to_owned() })
    }

    /// Starts a turn from the body of a chat completion.
    pub(super) async fn turn(&self, mut body: Value) -> Result<Events, String> {
        body["stream"] = true.into();
        body["stream_options"]["include_usage"] = true.into();
        match self {
            Self::Engine(electron) => {
                let request = chat_completions::parse(body.to_string().as_bytes(), |model, _| {
                    Ok(Settings::new(model, FillerPolicy::Auto))
                })
                .map_err(|e| e.to_string())?;
                let events = electron.clone().turn(request.turn).await.map_err(|e| e.to_string())?;
                Ok(Box::pin(events.map(|event| event.map_err(|e| e.to_string()))))
            }
            Self::Server { http, url, key } => {
                let sent = http.post(format!("{url}/v1/chat/completions")).bearer_auth(key).json(&body).send().await;
                let response = sent.map_err(|e| format!("{url} did not answer: {e}"))?;
                let status = response.status();
                if !status.is_success() {
                    let body: Value = response.json().await.unwrap_or_default();
                    let why = body["error"]["message"].as_str().unwrap_or("no reason given").to_owned();
                    return Err(format!("{status}: {why}"));
                }
                Ok(Box::pin(events(response.bytes_stream().map(|chunk| chunk.map_err(|e| e.to_string())))))
            }
        }
    }
}

/// Events from the bytes of a stream of server-sent events.
fn events(
    bytes: impl Stream<Item = Result<bytes::Bytes, String>> + Send + 'static,
) -> impl Stream<Item = Result<TurnEvent, String>> + Send {
    let lines = stream::unfold((Box::pin(bytes), Vec::new()), |(mut bytes, mut held)| async move {
        loop {
            if let Some(end) = held.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = held.drain(..=end).collect();
                return Some((Ok(String::from_utf8_lossy(&line).trim().to_owned()), (bytes, held)));
            }
            match bytes.next().await? {
                Ok(chunk) => held.extend_from_slice(&chunk),
                Err(e) => return Some((Err(e), (bytes, held))),
            }
        }
    });
    let mut reason = FinishReason::Stop;
    lines.flat_map(move |line| {
        let parsed = match line {
            Ok(line) => line.strip_prefix("data: ").map_or_else(Vec::new, |data| chunk_events(data, &mut reason)),
            Err(e) => vec![Err(e)],
        };
        stream::iter(parsed)
    })
}

/// The events of one chunk.
fn chunk_events(data: &str, reason: &mut FinishReason) -> Vec<Result<TurnEvent, String>> {
    let Ok(chunk) = serde_json::from_str::<Value>(data) else {
        return Vec::new();
    };
    if let Some(message) = chunk["error"]["message"].as_str() {
        return vec![Err(message.to_owned())];
    }
    let mut out = Vec::new();
    let delta = &chunk["choices"][0]["delta"];
    if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
        out.push(Ok(TurnEvent::Text { delta: text.to_owned(), logprobs: Vec::new() }));
    }
    for call in delta["tool_calls"].as_array().into_iter().flatten() {
        let index = call["index"].as_u64().unwrap_or(0) as usize;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        if call["id"].is_string() {
            out.push(Ok(TurnEvent::CallBegun { index, id: text(&call["id"]), name: text(&call["function"]["name"]) }));
        }
        let delta = text(&call["function"]["arguments"]);
        if !delta.is_empty() {
            out.push(Ok(TurnEvent::Arguments { index, delta }));
        }
    }
    match chunk["choices"][0]["finish_reason"].as_str() {
        Some("length") => *reason = FinishReason::Length,
        Some("tool_calls") => *reason = FinishReason::ToolCalls,
        _ => {}
    }
    if chunk["usage"].is_object() {
        let number = |value: &Value| value.as_u64().unwrap_or(0) as usize;
        let usage = Usage {
            prompt_tokens: number(&chunk["usage"]["prompt_tokens"]),
            cached_tokens: number(&chunk["usage"]["prompt_tokens_details"]["cached_tokens"]),
            completion_tokens: number(&chunk["usage"]["completion_tokens"]),
        };
        out.push(Ok(TurnEvent::Finished { reason: *reason, usage }));
    }
    out
}
