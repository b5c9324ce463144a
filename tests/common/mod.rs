//! A real server with a real model, once a test program.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

pub mod torn;

use std::sync::{Arc, LazyLock};

use electron_gateway::{
    command::model,
    config::{Config, Key},
    electron::Electron,
    server::{self, App},
};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

pub const KEY: &str = "egw_test";
/// A voice agent's prompt, and one that is none.
pub const VOICE: &str = "You are a friendly phone agent. Briefly acknowledge out loud before using any tool, like 'Let \
                         me check that' or 'One moment'.";
pub const PLAIN: &str = "You are a helpful assistant.";

/// The runtime of all tests of a program; the server and the engine live on it.
pub static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// The settings of a server here. Its model is one as published: what is trained anew changes no test.
pub fn config() -> Config {
    let mut config = Config::default();
    config.model.source = "smollm2".into();
    config
}

/// A model behind a server on a free port.
pub static SERVER: LazyLock<Server> = LazyLock::new(|| {
    // The first test to ask runs on the runtime already, where waiting has to be done by another thread.
    std::thread::spawn(|| RUNTIME.block_on(Server::start(config()))).join().unwrap()
});

pub struct Server {
    pub url: String,
    pub electron: Arc<Electron>,
    pub http: reqwest::Client,
    stop: CancellationToken,
}

impl Server {
    pub async fn start(mut config: Config) -> Self {
        config.server.listen.set_port(0);
        let electron = model::load(&config.model).await.unwrap();
        let listener = server::bind(config.server.listen).await.unwrap();
        let app = App::new(config.clone(), None, listener.local_addr().unwrap(), Some(KEY)).unwrap();
        app.serve_model(electron.clone()).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(server::serve(app, listener, stop.clone().cancelled_owned()));
        Self { url, electron, http: reqwest::Client::new(), stop }
    }

    pub async fn post(&self, body: &Value) -> reqwest::Response {
        let request = self.http.post(format!("{}/v1/chat/completions", self.url)).bearer_auth(KEY).json(body);
        request.send().await.unwrap()
    }

    /// The answer to a request that succeeds.
    pub async fn ask(&self, body: &Value) -> Value {
        let response = self.post(body).await;
        let (status, answer) = (response.status(), response.json::<Value>().await.unwrap());
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// All chunks of a streamed answer, up to `[DONE]`.
    pub async fn chunks(&self, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = self.post(&body).await;
        assert_eq!(response.status(), 200);
        let text = response.text().await.unwrap();
        let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }

    /// The sum of a metric over all its labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.http.get(format!("{}/metrics", self.url)).send().await.unwrap().text().await.unwrap();
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Runs a test on the shared runtime.
pub fn run<F: Future>(test: F) -> F::Output {
    RUNTIME.block_on(test)
}

pub fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

/// A request of one user message.
pub fn request(system: &str, text: &str) -> Value {
    json!({"model": "electron", "messages": [{"role": "system", "content": system}, user(text)],
           "max_tokens": 16, "temperature": 0})
}

pub fn tool(name: &str, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}})
}

/// A tool with one short argument, so that calls are quick.
pub fn find_order() -> Value {
    let order = json!({"type": "object", "required": ["order_id"],
                       "properties": {"order_id": {"type": "string", "maxLength": 8}}});
    tool("find_order", order)
}

/// Reads a response's body until it holds a text.
pub async fn read_until(response: reqwest::Response, wanted: &str) -> String {
    let mut body = response.bytes_stream();
    let mut text = String::new();
    while !text.contains(wanted) {
        text.push_str(&String::from_utf8_lossy(&body.next().await.unwrap().unwrap()));
    }
    text
}

/// A key for a configuration.
pub fn key(text: &str, requests_per_minute: u32, concurrency: u32, models: &[&str]) -> Key {
    Key {
        name: text.into(),
        hash: server::hash_key(text),
        models: models.iter().map(|m| (*m).to_owned()).collect(),
        requests_per_minute,
        concurrency,
    }
}

/// Whether the long form of a test was asked for, whose figures the README quotes.
pub fn long() -> bool {
    std::env::var_os("ELECTRON_LONG").is_some()
}
