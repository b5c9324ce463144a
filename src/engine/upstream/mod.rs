//! Models on other servers that speak OpenAI's Chat Completions: vLLM, mistral.rs, llama.cpp, a hosted API.
//!
//! A turn goes to one of a model's servers. Which one, its conversation decides ([`Upstreams::order`]): the next turn of
//! the same conversation finds its prompt in that server's prefix cache. A server that fails is passed over
//! ([`health`]), and a turn that failed goes to the next one as long as nothing of its answer has left.

mod health;
mod request;
mod stream;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use reqwest::{
    StatusCode,
    header::{
        ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER as RETRY_AFTER_HEADER,
    },
};
use tokio::time::Instant;

pub use self::stream::{Answer, Decoder};
use self::{
    health::{Health, Verdict},
    stream::Lease,
};
use super::RETRY_AFTER;
use crate::{
    config,
    error::Error,
    turn::{Message, Origin, OutputFormat, Readiness, Turn},
};

/// A server may have this many times its share of the running turns before a conversation goes elsewhere.
const BOUND: f64 = 1.25;
/// For so long a turn goes on asking servers that fail at once, as they do while they are restarted, unless another model
/// answers in their place; and the pause between two rounds.
const PATIENCE: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_millis(100);
/// Longest part of a server's error that is passed on.
const TOLD: usize = 400;

/// The servers of one model.
pub struct Upstreams {
    /// The name under which clients ask for it.
    name: String,
    settings: config::Upstream,
    servers: Vec<Server>,
    http: reqwest::Client,
    /// Turns that run, on all servers.
    open: AtomicUsize,
}

/// One of a model's servers.
struct Server {
    /// The base URL, such as `http://10.0.0.1:8000/v1`.
    base: Arc<str>,
    completions: reqwest::Url,
    weight: f64,
    health: Health,
    /// Turns that run on it.
    open: AtomicUsize,
}

/// Why a server did not answer.
enum Failure {
    /// Another one might.
    Next(Error),
    /// None would.
    Final(Error),
}

// === impl Upstreams ===

impl Upstreams {
    /// Needs a runtime: servers that fail are looked after until this is dropped.
    ///
    /// # Errors
    /// A text for the operator: which setting is wrong.
    pub fn new(name: &str, settings: config::Upstream) -> Result<Arc<Self>, String> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let secret = |setting: &str, value: &str| {
            let mut value = HeaderValue::from_str(value)
                .map_err(|_| format!("models.{name}.{setting} cannot stand in an HTTP header"))?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        };
        if !settings.key.is_empty() {
            headers.insert(AUTHORIZATION, secret("key", &format!("Bearer {}", settings.key.reveal()))?);
        }
        for (header, value) in &settings.headers {
            let setting = format!("headers.{header}");
            let header =
                HeaderName::try_from(header).map_err(|_| format!("models.{name}.{setting}: no header's name"))?;
            headers.insert(header, secret(&setting, value.reveal())?);
        }
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("electron-gateway/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(settings.connect_timeout)
            .pool_idle_timeout(Duration::from_secs(60))
            .redirect(reqwest::redirect::Policy::none())
            .tcp_nodelay(true);
        if settings.http2 {
            http = http.http2_prior_knowledge();
        }
        let http = http.build().map_err(|e| format!("models.{name}: {e}"))?;
        let mut servers = Vec::new();
        for (at, url) in settings.urls.iter().enumerate() {
            let base: Arc<str> = url.trim_end_matches('/').into();
            let completions = reqwest::Url::parse(&format!("{base}/chat/completions"));
            let completions = completions.map_err(|e| format!("models.{name}.urls: {url}: {e}"))?;
            let weight = f64::from(settings.weights.get(at).copied().unwrap_or(1));
            servers.push(Server { base, completions, weight, health: Health::default(), open: AtomicUsize::new(0) });
        }
        let upstreams = Arc::new(Self { name: name.to_owned(), settings, servers, http, open: AtomicUsize::new(0) });
        if !upstreams.settings.probe_interval.is_zero() {
            tokio::spawn(look_after(Arc::downgrade(&upstreams), upstreams.settings.probe_interval));
        }
        Ok(upstreams)
    }

    /// What is set for it.
    pub fn settings(&self) -> &config::Upstream {
        &self.settings
    }

    /// Starts a turn and waits for the first event of its answer.
    ///
    /// # Errors
    /// [`Error::Invalid`] and [`Error::ContextLength`] when the server refuses the turn itself, [`Error::RateLimited`] and
    /// [`Error::Overloaded`] when no server has room, [`Error::EngineFailed`] when none answers.
    pub async fn start(self: &Arc<Self>, turn: &Turn) -> Result<Answer, Error> {
        self.check(turn)?;
        let body = Bytes::from(request::body(turn, &self.settings, self.model())?);
        let deadline = Instant::now() + self.settings.request_timeout;
        let until = Instant::now() + if self.settings.fallback.is_empty() { PATIENCE } else { Duration::ZERO };
        let mut last = None;
        loop {
            for at in self.order(turn) {
                if !self.servers[at].health.admits(Instant::now()) {
                    continue;
                }
                match self.attempt(at, body.clone(), deadline).await {
                    Ok(answer) => return Ok(answer),
                    Err(Failure::Final(e)) => return Err(e),
                    Err(Failure::Next(e)) => last = Some(kinder(last, e)),
                }
            }
            // Who said when to come back meant it.
            let busy = last.as_ref().is_some_and(|e| e.retry_after().is_some());
            if busy || Instant::now() + AGAIN > until {
                break;
            }
            tokio::time::sleep(AGAIN).await;
        }
        Err(last.unwrap_or_else(|| Error::Overloaded {
            message: format!("No server of the model `{}` is available. Try again in a moment.", self.name).into(),
            retry_after: self.soonest(),
        }))
    }

    /// Whether a server would be asked now.
    pub fn readiness(&self) -> Readiness {
        if self.servers.iter().any(|server| server.health.is_good()) {
            Readiness::Ready
        } else {
            Readiness::NotReady(format!("no server of the model {} is available", self.name))
        }
    }

    /// For the metrics page: each server's URL, whether it is asked, and the turns that run on it.
    pub fn figures(&self) -> impl Iterator<Item = (&str, bool, usize)> {
        self.servers.iter().map(|server| (&*server.base, server.health.is_good(), server.open.load(Ordering::Relaxed)))
    }

    /// When one of the servers is asked again.
    fn soonest(&self) -> Duration {
        let now = Instant::now();
        let soonest = self.servers.iter().map(|server| server.health.pause(now)).min();
        soonest.unwrap_or(RETRY_AFTER).max(Duration::from_secs(1))
    }

    /// The name of the model there.
    fn model(&self) -> &str {
        if self.settings.model.is_empty() { &self.name } else { &self.settings.model }
    }

    fn check(&self, turn: &Turn) -> Result<(), Error> {
        let lacks = |field, what: &str| Err(Error::invalid(field, format!("the model `{}` {what}", self.name)));
        let settings = &self.settings;
        if !settings.tools && !turn.tools.is_empty() {
            return lacks("tools", "calls no tools");
        }
        if !settings.json_schema && matches!(turn.format, OutputFormat::JsonSchema(_)) {
            return lacks("response_format", "keeps to no JSON schema");
        }
        if !settings.logprobs && turn.sampling.logprobs.is_some() {
            return lacks("logprobs", "tells no log-probabilities");
        }
        Ok(())
    }

    /// The servers in the order in which they are asked: rendezvous hashing of how the conversation begins, weighted, and
    /// those that have much more than their share behind the others.
    fn order(&self, turn: &Turn) -> Vec<usize> {
        if self.servers.len() == 1 {
            return vec![0];
        }
        let conversation = beginning(turn);
        let weights: f64 = self.servers.iter().map(|server| server.weight).sum();
        let open = self.open.load(Ordering::Relaxed) as f64;
        let mut ranked: Vec<(bool, f64, usize)> = Vec::with_capacity(self.servers.len());
        for (at, server) in self.servers.iter().enumerate() {
            let share = ((open + 1.0) * server.weight / weights * BOUND).ceil();
            let full = server.open.load(Ordering::Relaxed) as f64 + 1.0 > share;
            let mut hasher = DefaultHasher::new();
            (conversation, &server.base).hash(&mut hasher);
            // A number in (0, 1]; its logarithm by the weight makes each the first as often as its weight says.
            let drawn = ((hasher.finish() >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
            ranked.push((full, -drawn.ln() / server.weight, at));
        }
        ranked.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        ranked.into_iter().map(|(_, _, at)| at).collect()
    }

    /// Asks one server, up to the first event of its answer.
    async fn attempt(self: &Arc<Self>, at: usize, body: Bytes, deadline: Instant) -> Result<Answer, Failure> {
        let server = &self.servers[at];
        let lease = Lease::new(self.clone(), at);
        let (asked, begun) = (body.len(), Instant::now());
        let first = deadline.min(Instant::now() + self.settings.first_token_timeout);
        let answering = async {
            let sent = self.http.post(server.completions.clone()).body(body).send().await;
            let response = sent.map_err(|e| Failure::Next(Error::EngineFailed(told(&e))))?;
            let id = response.headers().get("x-request-id").and_then(|id| id.to_str().ok());
            let origin = Origin { server: server.base.clone(), request_id: id.unwrap_or_default().to_owned() };
            if response.status() != StatusCode::OK {
                tracing::info!(
                    upstream = &*origin.server,
                    upstream_request_id = origin.request_id,
                    status = response.status().as_u16(),
                    "refused"
                );
                return Err(refusal(response).await);
            }
            let mut answer = Answer::new(response, origin, lease, asked, &self.settings, deadline)
                .map_err(|why| Failure::Next(Error::EngineFailed(why)))?;
            answer.first().await.map_err(Failure::Next)?;
            Ok(answer)
        };
        let answered = tokio::time::timeout_at(first, answering)
            .await
            .unwrap_or_else(|_| Err(Failure::Next(Error::EngineFailed("it did not begin to answer in time".into()))));
        match &answered {
            Ok(_) | Err(Failure::Final(_)) => server.health.note(Verdict::Good, Instant::now()),
            Err(Failure::Next(e)) => {
                // Who says that it is busy is alive.
                let busy = matches!(e, Error::RateLimited { .. } | Error::Overloaded { .. });
                server.health.note(if busy { Verdict::Good } else { Verdict::Bad { begun } }, Instant::now());
                metrics::counter!("electron_upstream_failures_total", "model" => self.name.clone()).increment(1);
                tracing::warn!(model = self.name, upstream = &*server.base, error = reason(e), "an upstream failed");
            }
        }
        answered
    }
}

/// Looks after servers that are not asked: one that answers again is asked again.
async fn look_after(upstreams: Weak<Upstreams>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(upstreams) = upstreams.upgrade() else { return };
        for server in upstreams.servers.iter().filter(|server| !server.health.is_good()) {
            let asked = upstreams.http.get(format!("{}/models", server.base)).timeout(interval.max(AGAIN)).send().await;
            // Whatever it says of the route: it is there.
            if asked.is_ok_and(|response| !response.status().is_server_error()) {
                server.health.note(Verdict::Good, Instant::now());
                tracing::info!(model = upstreams.name, upstream = &*server.base, "an upstream answers again");
            }
        }
    }
}

/// How a conversation begins, which its later turns have in common: the instructions and the caller's first words.
fn beginning(turn: &Turn) -> u64 {
    let mut hasher = DefaultHasher::new();
    for message in &turn.messages {
        match message {
            Message::System(text) => text.hash(&mut hasher),
            Message::User(text) => {
                text.hash(&mut hasher);
                break;
            }
            Message::Assistant { .. } | Message::Tool { .. } => {}
        }
    }
    hasher.finish()
}

/// The one of two errors that tells the caller more of what to do: when to come back.
fn kinder(last: Option<Error>, new: Error) -> Error {
    match last {
        Some(last @ (Error::RateLimited { .. } | Error::Overloaded { .. }))
            if last.retry_after() <= new.retry_after() =>
        {
            last
        }
        Some(last @ (Error::RateLimited { .. } | Error::Overloaded { .. })) if new.retry_after().is_none() => last,
        _ => new,
    }
}

/// What stands in the log.
fn reason(e: &Error) -> String {
    match e {
        Error::EngineFailed(why) => why.clone(),
        other => other.to_string(),
    }
}

/// Why a request failed, without its URL, which is nothing for a caller.
fn told(e: &reqwest::Error) -> String {
    if e.is_connect() {
        "its server could not be reached".into()
    } else if e.is_timeout() {
        "its server did not answer in time".into()
    } else {
        "its server closed the connection".into()
    }
}

/// What an answer that is none means.
async fn refusal(response: reqwest::Response) -> Failure {
    let status = response.status();
    let after = response.headers().get(RETRY_AFTER_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
    let after = after.map(Duration::from_secs);
    let body = stream::beginning_of(response).await;
    let why = request::error_of(&body);
    let short: String = why.message.chars().take(TOLD).collect();
    match status.as_u16() {
        429 => Failure::Next(Error::RateLimited {
            message: "The model's server takes no more requests for now.",
            retry_after: after.unwrap_or(RETRY_AFTER),
        }),
        503 => Failure::Next(Error::Overloaded {
            message: "The model's server is overloaded. Try again in a moment.".into(),
            retry_after: after.unwrap_or(RETRY_AFTER),
        }),
        400 | 413 | 422 => Failure::Final(why.into_error(short)),
        // The gateway's own key or address is wrong there, which no caller can mend.
        401 | 403 | 404 => Failure::Next(Error::EngineFailed(format!("its server refused the gateway with {status}"))),
        _ => Failure::Next(Error::EngineFailed(format!("its server answered with {status}"))),
    }
}
