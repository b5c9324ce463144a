//! `bench mock`: an upstream that generates nothing, on a schedule that is known to the microsecond.
//!
//! The last message says what to answer: `tokens=50 every=20` is 50 tokens, one each 20 ms, the first at once. Each token is
//! the time at which the request had come and the time at which the token leaves, in microseconds since 1970, so that
//! whoever reads it on the same machine knows how long it was on its way.

use std::{
    convert::Infallible,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Args;
use futures::stream;
use serde::Deserialize;
use serde_json::json;
use tokio::{net::TcpListener, time::Instant};

/// Options of `bench mock`.
#[derive(Clone, Debug, Args)]
pub(super) struct Options {
    /// Address and port.
    #[arg(short, long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

/// The time in microseconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

pub(super) async fn run(options: Options) -> Result<(), String> {
    let _ = rlimit::increase_nofile_limit(rlimit::INFINITY);
    let listener = TcpListener::bind(options.listen).await.map_err(|e| format!("{}: {e}", options.listen))?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    println!("The mock upstream is on http://{address}/v1");
    let models = || async { Json(json!({"object": "list", "data": [{"id": "mock", "object": "model"}]})) };
    let router = Router::new().route("/v1/chat/completions", post(complete)).route("/v1/models", get(models));
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await.map_err(|e| e.to_string())
}

#[derive(Deserialize)]
struct Request {
    messages: Vec<Message>,
    #[serde(default)]
    stream: bool,
}

#[derive(Deserialize)]
struct Message {
    content: String,
}

async fn complete(body: Bytes) -> Response {
    let came = now();
    let Ok(request) = serde_json::from_slice::<Request>(&body) else {
        return (StatusCode::BAD_REQUEST, "no chat completion").into_response();
    };
    let plan = request.messages.last().map_or("", |message| message.content.as_str());
    let number =
        |name: &str| plan.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok());
    let (tokens, every) = (number("tokens").unwrap_or(1), Duration::from_millis(number("every").unwrap_or(0)));
    let usage = json!({"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens});
    if !request.stream {
        let content = format!("{came}:{}", now());
        let choice = json!({"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"});
        return Json(json!({"id": "chatcmpl-mock", "object": "chat.completion", "created": 0, "model": "mock",
                           "choices": [choice], "usage": usage}))
        .into_response();
    }
    let begun = Instant::now();
    let events = stream::unfold(0, move |at| {
        let usage = usage.clone();
        async move {
            let head =
                r#"data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":0,"model":"mock","choices":"#;
            let text = match at {
                at if at < tokens => {
                    let due = begun + every * at as u32;
                    if due > Instant::now() {
                        tokio::time::sleep_until(due).await;
                    }
                    format!(
                        "{head}[{{\"index\":0,\"delta\":{{\"content\":\"{came}:{} \"}},\"finish_reason\":null}}]}}\n\n",
                        now()
                    )
                }
                at if at == tokens => format!(
                    "{head}[{{\"index\":0,\"delta\":{{}},\"finish_reason\":\"stop\"}}]}}\n\n\
                     {head}[],\"usage\":{usage}}}\n\ndata: [DONE]\n\n"
                ),
                _ => return None,
            };
            Some((Ok::<_, Infallible>(Bytes::from(text)), at + 1))
        }
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
}
