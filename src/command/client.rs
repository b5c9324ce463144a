//! Turns for `chat` and `bench`: of a running server over HTTP, or of a model in this process.

use std::{collections::VecDeque, pin::Pin, sync::Arc};

use clap::Args;
use futures::{Stream, StreamExt, stream};
use serde_json::Value;

use crate::{
    dialect::chat_completions,
    engine::upstream::Decoder,
    session::Settings,
    turn::{FillerPolicy, Model, TurnEvent},
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
                Ok(Box::pin(events(response)))
            }
        }
    }
}

/// Events from the response of a server.
fn events(response: reqwest::Response) -> impl Stream<Item = Result<TurnEvent, String>> + Send {
    let state = (response, Decoder::default(), VecDeque::new(), false);
    stream::unfold(state, |(mut response, mut decoder, mut ready, mut over)| async move {
        while ready.is_empty() && !over {
            let read = match response.chunk().await {
                Ok(Some(chunk)) => decoder.push(&chunk, &mut ready),
                Ok(None) if decoder.end(&mut ready) => Ok(()),
                Ok(None) => Err("the server ended the answer before it was complete".into()),
                Err(e) => Err(e.to_string()),
            };
            if let Err(why) = read {
                ready.clear();
                return Some((Err(why), (response, decoder, ready, true)));
            }
        }
        let event = ready.pop_front()?;
        over |= matches!(event, TurnEvent::Finished { .. });
        Some((Ok(event), (response, decoder, ready, over)))
    })
}
