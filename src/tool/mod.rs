//! What the gateway itself runs for the model: HTTP callbacks, tools of MCP servers, call control.
//!
//! A tool that is run here has a [`Hand`]; one that has none is the client's, who answers its calls. What a session can
//! run is its [`Kit`]; [`Tools`] runs it.

pub mod control;
pub mod guard;
pub mod http;
pub mod mcp;

use std::{collections::HashMap, sync::Arc};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::{sync::oneshot, time::Instant};
use tracing::Instrument;

pub use self::control::{Control, Dtmf};
use self::{
    guard::Guard,
    http::Callback,
    mcp::{Pool, Server},
};
use crate::turn::Tool;

/// What a client reads as the server of tools that are HTTP callbacks.
pub const CALLBACKS: &str = "callbacks";

/// A call of the model, on its way to whoever runs the tool.
#[derive(Clone, Debug)]
pub struct Call {
    /// The session, `sess_…`.
    pub session: Arc<str>,
    /// The call, `call_…`. The same in every attempt.
    pub call_id: Arc<str>,
    /// The tool.
    pub name: String,
    /// JSON text, valid under the tool's schema.
    pub arguments: String,
    /// The agent that the session plays.
    pub agent: Option<Arc<str>>,
    /// What is known of the call: `caller`, `called`, parameters of the platform.
    pub caller: Arc<Map<String, Value>>,
    /// Where a late result may be sent.
    pub output_url: String,
    /// Authorizes one result for this call.
    pub output_token: String,
}

/// Why a tool has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{told}")]
pub struct Failure {
    /// For metrics: `timeout`, `refused`, `status`, `invalid`, `too_large`, `forbidden`, `cancelled`, `protocol`, `tool`.
    pub kind: &'static str,
    /// A sentence that the model reads and can put into words. It holds no address and no secret.
    pub told: String,
}

/// How a tool is run here.
#[derive(Clone, Debug)]
pub struct Hand {
    /// By whom.
    pub by: By,
    /// What becomes of a running call when the caller interrupts.
    pub on_interrupt: OnInterrupt,
    /// Whether a person has to approve a call first.
    pub approval: bool,
}

/// Who runs a tool.
#[derive(Clone, Debug)]
pub enum By {
    /// A bot, over HTTP.
    Callback(Callback),
    /// An MCP server, under the tool's name there.
    Mcp(Arc<Server>, String),
    /// The dialect, on the call itself.
    Control(Control),
}

/// What becomes of a running call when the caller interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnInterrupt {
    /// It is stopped, and its result is not waited for.
    #[default]
    Cancel,
    /// It goes on, and later turns know its result.
    Finish,
}

/// What a session can run here.
#[derive(Clone, Debug, Default)]
pub struct Kit {
    /// As the model sees them.
    pub tools: Vec<Tool>,
    /// How each of them is run, by name.
    pub hands: HashMap<String, Arc<Hand>>,
    /// Servers that have more of them.
    pub servers: Vec<Arc<Server>>,
}

/// Runs tools.
pub struct Tools {
    guard: Arc<Guard>,
    client: reqwest::Client,
    mcp: Arc<Pool>,
    public_url: String,
}

// === impl Failure ===

impl Failure {
    /// The call was stopped before it had a result.
    pub fn cancelled() -> Self {
        Self { kind: "cancelled", told: "The call was cancelled before it had a result.".into() }
    }

    /// What the model reads in the place of a result.
    pub fn output(&self) -> String {
        json!({"error": self.told}).to_string()
    }
}

// === impl Hand ===

impl Hand {
    /// What a client reads as the tool's server.
    pub fn label(&self) -> &str {
        match &self.by {
            By::Callback(_) => CALLBACKS,
            By::Mcp(server, _) => &server.label,
            By::Control(_) => "call",
        }
    }

    /// For metrics.
    fn kind(&self) -> &'static str {
        match &self.by {
            By::Callback(_) => "http",
            By::Mcp(..) => "mcp",
            By::Control(_) => "control",
        }
    }
}

// === impl Kit ===

impl Kit {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.tools.is_empty() && self.hands.is_empty() && self.servers.is_empty()
    }

    /// Adds a server's tools. One whose name is taken gets its server's label in front.
    pub fn add(&mut self, server: &Arc<Server>, tools: &[Tool]) {
        for tool in tools {
            let mut known = tool.clone();
            if self.tools.iter().any(|other| other.name == tool.name) {
                known.name = format!("{}_{}", server.label, tool.name).chars().take(64).collect();
            }
            if self.tools.iter().any(|other| other.name == known.name) {
                continue;
            }
            let hand = Hand {
                by: By::Mcp(server.clone(), tool.name.clone()),
                on_interrupt: OnInterrupt::Cancel,
                approval: server.approval.needed(&tool.name),
            };
            self.hands.insert(known.name.clone(), Arc::new(hand));
            self.tools.push(known);
        }
    }
}

// === impl Tools ===

impl Tools {
    /// With what may be reached: URLs that clients may name, and networks besides the public ones. `public_url` is where
    /// results can be sent.
    ///
    /// # Errors
    /// A text for the operator.
    pub fn new(allow_urls: &[String], allow_networks: &[IpNet], public_url: &str) -> Result<Arc<Self>, String> {
        let guard = Arc::new(Guard::new(allow_urls, allow_networks)?);
        let client = guard.client()?;
        let checked = guard.clone();
        let mcp = Pool::new(client.clone(), move |url| checked.check(url));
        Ok(Arc::new(Self { guard, client, mcp, public_url: public_url.trim_end_matches('/').to_owned() }))
    }

    /// What may be reached.
    pub fn guard(&self) -> &Arc<Guard> {
        &self.guard
    }

    /// Where the result of a call can be sent.
    pub fn output_url(&self, session: &str, call_id: &str) -> String {
        format!("{}/v1/sessions/{session}/tool_calls/{call_id}/output", self.public_url)
    }

    /// The tools of a server.
    ///
    /// # Errors
    /// When it cannot be reached or does not speak the protocol.
    pub async fn list(&self, server: &Server) -> Result<Arc<[Tool]>, Failure> {
        self.mcp.list(server).await
    }

    /// Runs a call to its end. `late` brings a result that comes by another way. Dropping the future stops it.
    ///
    /// # Errors
    /// When there is no result.
    pub async fn run(&self, hand: &Hand, call: Call, late: oneshot::Receiver<String>) -> Result<String, Failure> {
        let span = tracing::info_span!(
            "tool",
            otel.name = format!("execute_tool {}", call.name),
            gen_ai.operation.name = "execute_tool",
            gen_ai.tool.name = call.name,
            gen_ai.tool.call.id = &*call.call_id,
            session = &*call.session,
        );
        let mut record = Record { hand, agent: call.agent.clone(), started: Instant::now(), result: "cancelled" };
        let done = match &hand.by {
            By::Callback(callback) => {
                callback.run(&self.guard, &self.client, &call, late).instrument(span.clone()).await
            }
            By::Mcp(server, tool) => self.mcp.call(server, tool, &call.arguments).instrument(span.clone()).await,
            By::Control(control) => Ok(control.output()),
        };
        record.result = done.as_ref().map_or_else(|failure| failure.kind, |_| "ok");
        let ms = record.started.elapsed().as_millis() as u64;
        match &done {
            Ok(_) => tracing::info!(parent: &span, tool = call.name, call_id = &*call.call_id, ms, "tool answered"),
            Err(failure) => tracing::warn!(
                parent: &span, tool = call.name, call_id = &*call.call_id, ms, result = failure.kind, "tool failed"
            ),
        }
        done
    }
}

/// Counts a call when it ends, also one that is stopped.
struct Record<'a> {
    hand: &'a Hand,
    agent: Option<Arc<str>>,
    started: Instant,
    result: &'static str,
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let labels = [
            ("agent", self.agent.as_deref().unwrap_or_default().to_owned()),
            ("kind", self.hand.kind().to_owned()),
            ("result", self.result.to_owned()),
        ];
        metrics::histogram!("electron_tool_seconds", &labels).record(self.started.elapsed().as_secs_f64());
    }
}
