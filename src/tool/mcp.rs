//! Tools of remote MCP servers, over streamable HTTP.
//!
//! A session lists the tools of the servers that its agent names and calls them. What is expensive, the connection with
//! its handshake and the list, is shared by all sessions in a [`Pool`].
//!
//! A connection ends without a word when its server is restarted: the next request is answered with 404, because the
//! session that it names is unknown. Such a request was turned away before any tool saw it, as was one that found
//! nobody to connect to, and only these two are sent again, once, over a new connection. A call that broke off later
//! may have been carried out, and a second one could book the table twice, so it fails.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use reqwest::{
    StatusCode,
    header::{HeaderName, HeaderValue},
};
use rmcp::{
    ClientHandler, RoleClient, ServiceExt,
    model::{
        CallToolRequestParams, CallToolResult, ClientCapabilities, ClientConfig, ClientJsonRpcMessage, ClientRequest,
        ContentBlock, Implementation, JsonRpcMessage, PaginatedRequestParams, ProtocolVersion, ResourceContents,
    },
    service::{
        ClientCacheConfig, ClientInitializeError, NotificationContext, RunningService, ServiceError as RequestError,
    },
    transport::{
        DynamicTransportError, StreamableHttpClientTransport,
        common::client_side_sse::{BoxedSseResponse, ExponentialBackoff},
        streamable_http_client::{
            SseError, StreamableHttpClient, StreamableHttpClientTransportConfig, StreamableHttpError,
            StreamableHttpPostResponse, StreamableHttpResponseLimits,
        },
    },
};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use tokio::{
    task::JoinHandle,
    time::{Instant, interval_at, sleep, sleep_until, timeout, timeout_at},
};
use url::Url;

use super::Failure;
use crate::{
    secret::Secret,
    turn::{Phrase, Tool},
};

/// Time for connecting, the handshake and the list of tools together.
const SETUP: Duration = Duration::from_secs(10);
/// Time for each step of a handshake when nobody waits for it any more: longer, so that it never decides what is told.
const HANDSHAKE: Duration = Duration::from_secs(12);
/// A connection that nobody has used for this long is closed.
const IDLE: Duration = Duration::from_secs(5 * 60);
/// How often idle connections are looked for.
const SWEEP: Duration = Duration::from_secs(30);
/// How old a list of tools may get. Servers without sessions have no way to say that it changed.
const FRESH: Duration = Duration::from_secs(60);
/// Least time between two openings of a stream; a server could ask for none.
const REOPEN: Duration = Duration::from_millis(200);
/// Most time between two openings of a stream.
const REOPEN_MOST: Duration = Duration::from_secs(30);
/// Most servers at the same time.
const SERVERS: usize = 256;
/// Most requests at the same time to one server.
const REQUESTS: usize = 256;
/// Most tools of one server.
const TOOLS: usize = 128;
/// Most pages that a list of tools may have.
const PAGES: usize = 32;
/// Most characters of a tool's name.
const NAME: usize = 64;
/// Most characters of a tool's description.
const DESCRIPTION: usize = 1024;
/// Most bytes of a tool's result.
const RESULT: usize = 64 * 1024;
/// Most bytes of what a tool or its server says about an error.
const ERROR: usize = 1024;
/// Most bytes of one message of a server, which is read no further. It leaves room for what is not passed on, such as
/// pictures, and for results that come twice, as text and as JSON.
const MESSAGE: usize = 4 * 1024 * 1024;
/// Most bytes of a body that only explains an HTTP status.
const DIAGNOSTIC: usize = 4 * 1024;

/// Headers that belong to HTTP or to the protocol, not to whoever names a server.
const RESERVED: &[&str] = &[
    "accept",
    "connection",
    "content-length",
    "content-type",
    "host",
    "last-event-id",
    "mcp-protocol-version",
    "mcp-session-id",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// A remote MCP server, as settings and clients name it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// What it is called in logs and in what clients see.
    pub label: String,
    /// Where it takes requests, `https://…/mcp`.
    pub url: String,
    /// Sent with every request, for instance `authorization`.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// The tools that may be used. `None` means all of them.
    #[serde(default)]
    pub allowed_tools: Option<Vec<String>>,
    /// Whose calls a person has to approve first.
    #[serde(default)]
    pub approval: Approval,
    /// How long one call may take.
    #[serde(default = "default_timeout", with = "humantime_serde")]
    pub timeout: Duration,
}

/// Whose calls a person has to approve first: `"never"`, `"always"`, or a table with lists of tools, `always` and
/// `never`. A list may also stand in a table of its own as `tool_names`, as OpenAI's API has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Approval {
    /// Nobody's.
    #[default]
    Never,
    /// Everybody's.
    Always,
    /// Those of some tools.
    Some {
        /// These tools', also when the other list has them too.
        always: Vec<String>,
        /// Those of all tools but these, unless the list is empty.
        never: Vec<String>,
    },
}

/// Connections to MCP servers, shared by all sessions.
///
/// There is one for each address with its headers, made when it is first needed and closed when nobody has used it for
/// five minutes.
pub struct Pool {
    client: reqwest::Client,
    check: Box<Check>,
    /// In no order; so few that looking through them costs less than a key that would hold the secrets once more.
    entries: Mutex<Vec<Arc<Entry>>>,
    sweeper: JoinHandle<()>,
}

type Check = dyn Fn(&Url) -> Result<(), String> + Send + Sync;

/// A server and the connection to it. Whoever uses it holds a [`Lease`]; with none it is idle.
struct Entry {
    url: String,
    headers: BTreeMap<String, Secret>,
    used: Mutex<Instant>,
    /// Locked while somebody connects, so that the others wait for the same connection.
    slot: tokio::sync::Mutex<Slot>,
}

/// The use of an entry, which notes when it ends.
struct Lease(Arc<Entry>);

#[derive(Default)]
struct Slot {
    connection: Option<Arc<Connection>>,
    /// When connecting failed last and why, for those who waited meanwhile.
    failed: Option<(Instant, Failure)>,
}

/// An established connection. Dropping it ends the session at the server and the tasks that serve it.
struct Connection {
    service: RunningService<RoleClient, Listener>,
    signs: Arc<Signs>,
    /// Locked while somebody asks for the tools, so that the others wait for the same list.
    listed: tokio::sync::Mutex<Option<Listed>>,
}

struct Listed {
    tools: Arc<[Tool]>,
    at: Instant,
    /// [`Signs::changes`] before they were asked for.
    changes: u64,
}

/// What is learned about a connection on the side.
#[derive(Default)]
struct Signs {
    /// It is of no use any more.
    gone: AtomicBool,
    /// The server does not know the session any more.
    expired: AtomicBool,
    /// Whether the stream of notifications was opened before.
    listening: AtomicBool,
    /// How often the list of tools may have changed.
    changes: AtomicU64,
    /// How many messages were over the limit.
    oversized: AtomicU64,
}

/// Hears what the server says without being asked.
struct Listener(Arc<Signs>);

/// The HTTP client of a connection. It looks after what the transport leaves open: limits in time while the transport
/// can't be cancelled, addresses in errors, which end up in logs, and signs that the connection is gone.
#[derive(Clone)]
struct Wire {
    client: reqwest::Client,
    signs: Arc<Signs>,
}

/// Why a request has no answer.
struct Trouble {
    failure: Failure,
    loss: Loss,
}

/// What a failed request says about its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// It can still be used.
    None,
    /// It is of no use, and the request reached no tool.
    Unsent,
    /// It is of no use, and the request may have been carried out.
    Broken,
}

type Headers = HashMap<HeaderName, HeaderValue>;

fn default_timeout() -> Duration {
    Duration::from_secs(30)
}

fn failure(kind: &'static str, told: impl Into<String>) -> Failure {
    Failure { kind, told: told.into() }
}

fn unreachable() -> Failure {
    failure("refused", "The tool's server can't be reached.")
}

fn silent() -> Failure {
    failure("timeout", "The tool's server did not answer in time.")
}

fn too_large() -> Failure {
    failure("too_large", "The answer of the tool's server is too large.")
}

fn unintelligible() -> Failure {
    failure("protocol", "The tool's server gave an answer that can't be understood.")
}

fn broken() -> Failure {
    failure("protocol", "The connection to the tool's server broke off. Whether the call took effect is not known.")
}

fn refused_with(status: &str) -> Failure {
    failure("status", format!("The tool's server refused the request with status {status}."))
}

fn said(message: &str) -> Failure {
    failure("protocol", format!("The tool's server reported an error: {}", cut(message, ERROR)))
}

/// The beginning of a text, at most so many bytes.
fn cut(text: &str, most: usize) -> &str {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Server ===

impl Server {
    /// Whether this tool may be used.
    pub fn allows(&self, tool: &str) -> bool {
        self.allowed_tools.as_ref().is_none_or(|allowed| allowed.iter().any(|name| name == tool))
    }

    fn headers(&self) -> Result<Headers, Failure> {
        let invalid = || failure("invalid", "The tool's server is set up with a header that can't be sent.");
        let mut headers = Headers::new();
        for (name, value) in &self.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
            let mut value = HeaderValue::from_str(value.reveal()).map_err(|_| invalid())?;
            if RESERVED.contains(&name.as_str()) {
                return Err(invalid());
            }
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(headers)
    }
}

// === impl Approval ===

impl Approval {
    /// Whether a call of this tool has to be approved.
    pub fn needed(&self, tool: &str) -> bool {
        let among = |names: &[String]| names.iter().any(|name| name == tool);
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Some { always, never } => among(always) || !never.is_empty() && !among(never),
        }
    }
}

impl<'de> Deserialize<'de> for Approval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "\"never\", \"always\", or a table with the lists `always` and `never`")]
        enum Form {
            Word(Word),
            Lists(Lists),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Word {
            Never,
            Always,
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Lists {
            #[serde(default)]
            always: Names,
            #[serde(default)]
            never: Names,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Names {
            List(Vec<String>),
            Filter(Filter),
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Filter {
            tool_names: Vec<String>,
        }
        impl Default for Names {
            fn default() -> Self {
                Self::List(Vec::new())
            }
        }
        let list = |names| match names {
            Names::List(names) | Names::Filter(Filter { tool_names: names }) => names,
        };
        Ok(match Form::deserialize(deserializer)? {
            Form::Word(Word::Never) => Self::Never,
            Form::Word(Word::Always) => Self::Always,
            Form::Lists(Lists { always, never }) => Self::Some { always: list(always), never: list(never) },
        })
    }
}

// === impl Pool ===

impl Pool {
    /// A pool that has no connections yet. It has to be made in a runtime, which runs a task that closes idle
    /// connections.
    ///
    /// `client` must follow no redirects and connect to no host that must not be reached. `check` refuses addresses
    /// that name such a host literally, and says why to the operator.
    pub fn new(
        client: reqwest::Client,
        check: impl Fn(&Url) -> Result<(), String> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new_cyclic(|pool: &Weak<Self>| {
            let pool = pool.clone();
            let sweeper = tokio::spawn(async move {
                let mut ticks = interval_at(Instant::now() + SWEEP, SWEEP);
                loop {
                    ticks.tick().await;
                    let Some(pool) = pool.upgrade() else { return };
                    pool.sweep();
                }
            });
            Self { client, check: Box::new(check), entries: Mutex::default(), sweeper }
        })
    }

    /// The tools of a server that may be used, connecting to it when need be. They are kept for a minute, or until the
    /// server says that they changed.
    ///
    /// # Errors
    /// When the server can't be reached, must not be, or gives no list of tools in ten seconds.
    pub async fn list(&self, server: &Server) -> Result<Arc<[Tool]>, Failure> {
        let deadline = Instant::now() + SETUP;
        let lease = self.lease(server)?;
        let mut retried = false;
        let tools = loop {
            let (connection, new) = lease.connection(self, server, deadline).await?;
            let trouble = match timeout_at(deadline, connection.tools(&server.label)).await {
                Ok(Ok(tools)) => break tools,
                Ok(Err(trouble)) => trouble,
                Err(_) => Trouble { failure: silent(), loss: Loss::None },
            };
            let lost = connection.note(&trouble);
            if lost && !new && !retried {
                retried = true;
                continue;
            }
            tracing::warn!(label = server.label, kind = trouble.failure.kind, "no list of tools from the MCP server");
            return Err(without_call(trouble.failure));
        };
        if server.allowed_tools.is_none() {
            return Ok(tools);
        }
        Ok(tools.iter().filter(|tool| server.allows(&tool.name)).cloned().collect())
    }

    /// Calls a tool with `arguments`, the JSON text of an object, and gives its result as text. Dropping the future
    /// tells the server to give the call up.
    ///
    /// # Errors
    /// `tool` when the tool itself reports an error; otherwise as for [`Self::list`], with the server's own time for
    /// the call, and when the result is over 64 KiB.
    pub async fn call(&self, server: &Server, tool: &str, arguments: &str) -> Result<String, Failure> {
        if !server.allows(tool) {
            return Err(failure("forbidden", "This tool of the server may not be used."));
        }
        let arguments: Map<String, Value> = match arguments.trim() {
            "" => Map::new(),
            text => serde_json::from_str(text).map_err(|_| failure("invalid", "The arguments are no JSON object."))?,
        };
        let request = CallToolRequestParams::new(tool.to_owned()).with_arguments(arguments);
        let lease = self.lease(server)?;
        let mut left = server.timeout;
        let mut retried = false;
        loop {
            let (connection, new) = lease.connection(self, server, Instant::now() + SETUP).await?;
            let oversized = connection.signs.oversized.load(Ordering::Relaxed);
            let sent = Instant::now();
            let trouble = match timeout(left, connection.service.call_tool(request.clone())).await {
                Ok(Ok(result)) => return outcome(result),
                Ok(Err(error)) => connection.trouble(&error, oversized),
                Err(_) => Trouble { failure: silent(), loss: Loss::None },
            };
            connection.note(&trouble);
            if trouble.loss == Loss::Unsent && !new && !retried {
                left = left.saturating_sub(sent.elapsed());
                retried = true;
                continue;
            }
            tracing::warn!(label = server.label, kind = trouble.failure.kind, "a call of an MCP server's tool failed");
            return Err(trouble.failure);
        }
    }

    fn lease(&self, server: &Server) -> Result<Lease, Failure> {
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.iter().find(|entry| entry.url == server.url && entry.headers == server.headers) {
            return Ok(Lease(entry.clone()));
        }
        if entries.len() >= SERVERS {
            let idle = entries.iter().enumerate().filter(|(_, entry)| entry.is_idle());
            let Some((oldest, _)) = idle.min_by_key(|(_, entry)| *lock(&entry.used)) else {
                tracing::warn!(label = server.label, "too many MCP servers are in use");
                return Err(failure("refused", "Too many tool servers are in use at the moment."));
            };
            entries.swap_remove(oldest);
        }
        let entry = Arc::new(Entry {
            url: server.url.clone(),
            headers: server.headers.clone(),
            used: Mutex::new(Instant::now()),
            slot: tokio::sync::Mutex::default(),
        });
        entries.push(entry.clone());
        Ok(Lease(entry))
    }

    fn sweep(&self) {
        lock(&self.entries).retain(|entry| !entry.is_idle() || lock(&entry.used).elapsed() < IDLE);
    }

    async fn connect(&self, server: &Server, deadline: Instant) -> Result<Connection, Failure> {
        let result = timeout_at(deadline, self.handshake(server)).await.unwrap_or_else(|_| Err(silent()));
        let label = server.label.as_str();
        match &result {
            Ok(_) => tracing::debug!(label, "connected to an MCP server"),
            Err(failure) => tracing::warn!(label, kind = failure.kind, "no connection to an MCP server"),
        }
        let result_label = result.as_ref().err().map_or("ok", |failure| failure.kind);
        metrics::counter!("electron_mcp_connects_total", "result" => result_label).increment(1);
        result
    }

    async fn handshake(&self, server: &Server) -> Result<Connection, Failure> {
        let url = Url::parse(&server.url)
            .map_err(|_| failure("invalid", "The tool's server is set up with an address that is none."))?;
        (self.check)(&url).map_err(|why| {
            tracing::warn!(label = server.label, why, "the address of an MCP server is refused");
            failure("forbidden", "The address of the tool's server is not allowed.")
        })?;
        let signs = Arc::new(Signs::default());
        let mut backoff = ExponentialBackoff::default();
        backoff.max_delay = Some(REOPEN_MOST);
        let mut config = StreamableHttpClientTransportConfig::with_uri(url.as_str())
            .custom_headers(server.headers()?)
            .max_concurrent_requests(REQUESTS)
            .max_json_response_size(MESSAGE)
            .max_sse_event_size(MESSAGE)
            .max_error_response_size(DIAGNOSTIC)
            // A server that was restarted may have other tools. The transport would not tell that it began a new
            // session.
            .reinit_on_expired_session(false);
        config.retry_config = Arc::new(backoff);
        let wire = Wire { client: self.client.clone(), signs: signs.clone() };
        let transport = StreamableHttpClientTransport::with_client(wire, config);
        let service = Listener(signs.clone()).serve(transport).await.map_err(|error| unconnected(&error))?;
        // It would answer with an old list when there is no new one.
        service.set_response_cache_config(ClientCacheConfig::disabled()).await;
        Ok(Connection { service, signs, listed: tokio::sync::Mutex::default() })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.sweeper.abort();
    }
}

// === impl Entry ===

impl Entry {
    /// Whether nobody uses it. The pool's entries must be locked, so that nobody begins to.
    fn is_idle(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) == 1
    }
}

// === impl Lease ===

impl Lease {
    /// The connection, and whether it was made for this.
    async fn connection(
        &self,
        pool: &Pool,
        server: &Server,
        deadline: Instant,
    ) -> Result<(Arc<Connection>, bool), Failure> {
        let since = Instant::now();
        let mut slot = timeout_at(deadline, self.0.slot.lock()).await.map_err(|_| silent())?;
        if let Some(connection) = slot.connection.take_if(|connection| !connection.is_alive()) {
            drop(connection);
        }
        if let Some(connection) = &slot.connection {
            return Ok((connection.clone(), false));
        }
        if let Some((at, failure)) = &slot.failed
            && *at >= since
        {
            return Err(failure.clone());
        }
        match pool.connect(server, deadline).await {
            Ok(connection) => {
                let connection = Arc::new(connection);
                slot.connection = Some(connection.clone());
                Ok((connection, true))
            }
            Err(failure) => {
                slot.failed = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *lock(&self.0.used) = Instant::now();
    }
}

// === impl Connection ===

impl Connection {
    fn is_alive(&self) -> bool {
        !self.signs.gone.load(Ordering::Relaxed) && !self.service.is_transport_closed()
    }

    /// Gives the connection up if the trouble says that it is lost, and whether it does.
    fn note(&self, trouble: &Trouble) -> bool {
        let lost = trouble.loss != Loss::None;
        if lost {
            self.signs.gone.store(true, Ordering::Relaxed);
        }
        lost
    }

    fn trouble(&self, error: &RequestError, oversized: u64) -> Trouble {
        // A stream with a message over the limit is cut off like one that broke. When two calls end at once it may
        // have been the other one's; they only tell each other's reason then.
        let cut_off = matches!(error, RequestError::TransportClosed) && !self.service.is_transport_closed();
        if cut_off && self.signs.oversized.load(Ordering::Relaxed) != oversized {
            return Trouble { failure: too_large(), loss: Loss::None };
        }
        Trouble::of(error)
    }

    async fn tools(&self, label: &str) -> Result<Arc<[Tool]>, Trouble> {
        let mut listed = self.listed.lock().await;
        let changes = self.signs.changes.load(Ordering::Relaxed);
        if let Some(listed) = &*listed
            && listed.changes == changes
            && listed.at.elapsed() < FRESH
        {
            return Ok(listed.tools.clone());
        }
        let tools = self.ask_for_tools(label).await?;
        *listed = Some(Listed { tools: tools.clone(), at: Instant::now(), changes });
        Ok(tools)
    }

    async fn ask_for_tools(&self, label: &str) -> Result<Arc<[Tool]>, Trouble> {
        let oversized = self.signs.oversized.load(Ordering::Relaxed);
        let mut tools = Vec::new();
        let mut names = HashSet::new();
        let mut left_out = 0_usize;
        let mut cursor = None;
        for _ in 0..PAGES {
            let page = PaginatedRequestParams::default().with_cursor(cursor.take());
            let page = self.service.list_tools(Some(page)).await.map_err(|error| self.trouble(&error, oversized))?;
            for tool in page.tools {
                if tools.len() < TOOLS && is_name(&tool.name) && names.insert(tool.name.clone()) {
                    tools.push(translate(tool));
                } else {
                    left_out += 1;
                }
            }
            cursor = page.next_cursor;
            if cursor.is_none() || tools.len() >= TOOLS {
                break;
            }
        }
        if left_out > 0 || cursor.is_some() {
            tracing::warn!(
                label,
                left_out,
                further_pages = cursor.is_some(),
                "tools of an MCP server are left out: too many, or names that can't be used"
            );
        }
        tracing::debug!(label, tools = tools.len(), "the tools of an MCP server");
        Ok(tools.into())
    }
}

/// Whether engines and clients take this as the name of a tool.
fn is_name(name: &str) -> bool {
    (1..=NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn translate(tool: rmcp::model::Tool) -> Tool {
    Tool {
        name: tool.name.into_owned(),
        description: tool.description.map(|text| text.chars().take(DESCRIPTION).collect()),
        parameters: Value::Object(Arc::unwrap_or_clone(tool.input_schema)),
        phrase: Phrase::Filler,
    }
}

/// What a tool's result means for the model. What a voice agent can't say is only named.
fn outcome(result: CallToolResult) -> Result<String, Failure> {
    let failed = result.is_error.unwrap_or_default();
    let mut parts = Vec::with_capacity(result.content.len() + 1);
    let mut texts = 0;
    for block in result.content {
        parts.push(match block {
            ContentBlock::Text(content) => {
                texts += 1;
                content.text
            }
            ContentBlock::Resource(content) => match content.resource {
                ResourceContents::TextResourceContents { text, .. } => {
                    texts += 1;
                    text
                }
                _ => "[resource]".to_owned(),
            },
            ContentBlock::Image(_) => "[image]".to_owned(),
            ContentBlock::Audio(_) => "[audio]".to_owned(),
            _ => "[resource]".to_owned(),
        });
    }
    if texts == 0
        && let Some(structured) = result.structured_content
    {
        parts.insert(0, structured.to_string());
    }
    let text = parts.join("\n");
    if failed {
        let told = if text.trim().is_empty() { "The tool failed and did not say why." } else { &text };
        return Err(failure("tool", cut(told, ERROR)));
    }
    if text.len() > RESULT { Err(failure("too_large", "The result of the tool is too large.")) } else { Ok(text) }
}

// === impl Trouble ===

impl Trouble {
    fn of(error: &RequestError) -> Self {
        let kept = |failure| Self { failure, loss: Loss::None };
        match error {
            RequestError::McpError(error) => kept(said(&error.message)),
            RequestError::TransportSend(error) => Self::of_transport(error),
            RequestError::TransportClosed => Self { failure: broken(), loss: Loss::Broken },
            RequestError::Timeout { .. } => kept(silent()),
            RequestError::Cancelled { .. } => kept(failure("cancelled", "The call was cancelled.")),
            _ => kept(unintelligible()),
        }
    }

    fn of_transport(error: &DynamicTransportError) -> Self {
        let kept = |failure| Self { failure, loss: Loss::None };
        let Some(error) = error.error.downcast_ref::<StreamableHttpError<reqwest::Error>>() else {
            return Self { failure: broken(), loss: Loss::Broken };
        };
        match error {
            StreamableHttpError::SessionExpired => Self { failure: unreachable(), loss: Loss::Unsent },
            StreamableHttpError::Client(error) if error.is_connect() => {
                Self { failure: unreachable(), loss: Loss::Unsent }
            }
            StreamableHttpError::Client(error) if error.is_timeout() => Self { failure: silent(), loss: Loss::Broken },
            StreamableHttpError::Client(_) | StreamableHttpError::TransportChannelClosed => {
                Self { failure: broken(), loss: Loss::Broken }
            }
            StreamableHttpError::Io(error) if error.kind() == io::ErrorKind::TimedOut => kept(silent()),
            StreamableHttpError::HttpStatus(error) => kept(refused_with(&error.status.to_string())),
            StreamableHttpError::AuthRequired(_) => kept(refused_with("401")),
            StreamableHttpError::InsufficientScope(_) => kept(refused_with("403")),
            StreamableHttpError::ResponseBodyTooLarge { .. } => kept(too_large()),
            StreamableHttpError::UnexpectedServerResponse(text) => match status_in(text) {
                Some(status) => kept(refused_with(status)),
                None => kept(unintelligible()),
            },
            _ => kept(unintelligible()),
        }
    }
}

/// The status of a response whose body is no message of the protocol, from the transport's `HTTP 403 Forbidden: …`.
fn status_in(text: &str) -> Option<&str> {
    let status = text.strip_prefix("HTTP ")?.get(..3)?;
    status.bytes().all(|b| b.is_ascii_digit()).then_some(status)
}

/// The same failure when there was no call that could have taken effect.
fn without_call(failure: Failure) -> Failure {
    if failure == broken() { unreachable() } else { failure }
}

/// Why a handshake failed.
fn unconnected(error: &ClientInitializeError) -> Failure {
    match error {
        ClientInitializeError::TransportError { error, .. } => without_call(Trouble::of_transport(error).failure),
        ClientInitializeError::JsonRpcError(error) => said(&error.message),
        ClientInitializeError::ConnectionClosed(_) => unreachable(),
        _ => unintelligible(),
    }
}

// === impl Signs ===

impl Signs {
    fn forget_tools(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
        self.gone.store(true, Ordering::Relaxed);
    }
}

// === impl Listener ===

impl ClientHandler for Listener {
    async fn on_tool_list_changed(&self, _: NotificationContext<RoleClient>) {
        self.0.forget_tools();
    }

    fn get_info(&self) -> ClientConfig {
        // No capabilities: nobody here could answer for a person or lend the server a model.
        ClientConfig::new(
            ClientCapabilities::default(),
            Implementation::new("electron-gateway", env!("CARGO_PKG_VERSION")),
        )
        // Later versions have no handshake, and servers that have them also take this one.
        .with_protocol_version(ProtocolVersion::LATEST_WITH_INITIALIZE)
    }
}

// === impl Wire ===

impl Wire {
    /// An error as it may be logged, after noting what it says about the connection.
    fn note(&self, error: StreamableHttpError<reqwest::Error>) -> StreamableHttpError<reqwest::Error> {
        match error {
            StreamableHttpError::SessionExpired => {
                self.signs.expire();
                error
            }
            // An address may hold a key in its query.
            StreamableHttpError::Client(error) => StreamableHttpError::Client(error.without_url()),
            error => error,
        }
    }
}

/// What servers built with early versions of the SDKs say, with status 400, to a session that they don't know.
fn is_unknown_session(told: &str) -> bool {
    told.contains("Bad Request: No valid session ID")
}

/// Whether an event was refused because of its size. The transport keeps the type of this error to itself; if it ever
/// chooses other words, a too large answer is told as one that broke off.
fn is_oversized(error: &SseError) -> bool {
    matches!(error, SseError::Body(error) if error.to_string().contains("exceeded the maximum size"))
}

impl StreamableHttpClient for Wire {
    type Error = reqwest::Error;

    async fn post_message(
        &self,
        uri: Arc<str>,
        message: ClientJsonRpcMessage,
        session: Option<Arc<str>>,
        auth: Option<String>,
        headers: Headers,
    ) -> Result<StreamableHttpPostResponse, StreamableHttpError<Self::Error>> {
        let limits = StreamableHttpResponseLimits::default();
        self.post_message_with_response_limits(uri, message, session, auth, headers, limits).await
    }

    async fn post_message_with_response_limits(
        &self,
        uri: Arc<str>,
        message: ClientJsonRpcMessage,
        session: Option<Arc<str>>,
        auth: Option<String>,
        headers: Headers,
        limits: StreamableHttpResponseLimits,
    ) -> Result<StreamableHttpPostResponse, StreamableHttpError<Self::Error>> {
        let in_session = session.is_some();
        // The transport can cancel a request. It can't cancel the handshake: a server that never answers would keep
        // its task and socket for ever.
        let deadline = match &message {
            JsonRpcMessage::Request(message) if !matches!(message.request, ClientRequest::InitializeRequest(_)) => None,
            _ => Some(Instant::now() + HANDSHAKE),
        };
        let post = self.client.post_message_with_response_limits(uri, message, session, auth, headers, limits);
        let response = match deadline {
            None => post.await,
            Some(deadline) => timeout_at(deadline, post)
                .await
                .unwrap_or_else(|_| Err(StreamableHttpError::Io(io::ErrorKind::TimedOut.into()))),
        };
        let error = match response {
            Ok(StreamableHttpPostResponse::Sse(stream, id)) => {
                let signs = self.signs.clone();
                let stream = stream.inspect(move |event| {
                    if event.as_ref().is_err_and(is_oversized) {
                        signs.oversized.fetch_add(1, Ordering::Relaxed);
                    }
                });
                let stream = match deadline {
                    None => stream.boxed(),
                    Some(deadline) => stream.take_until(sleep_until(deadline)).boxed(),
                };
                return Ok(StreamableHttpPostResponse::Sse(stream, id));
            }
            Ok(StreamableHttpPostResponse::Json(JsonRpcMessage::Error(error), _))
                if in_session && is_unknown_session(&error.error.message) =>
            {
                StreamableHttpError::SessionExpired
            }
            Ok(response) => return Ok(response),
            Err(StreamableHttpError::UnexpectedServerResponse(text)) if in_session && is_unknown_session(&text) => {
                StreamableHttpError::SessionExpired
            }
            Err(error) => error,
        };
        Err(self.note(error))
    }

    async fn delete_session(
        &self,
        uri: Arc<str>,
        session: Arc<str>,
        auth: Option<String>,
        headers: Headers,
    ) -> Result<(), StreamableHttpError<Self::Error>> {
        if self.signs.expired.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.client.delete_session(uri, session, auth, headers).await {
            // It is gone already, as it should be.
            Err(StreamableHttpError::Client(error)) if error.status() == Some(StatusCode::NOT_FOUND) => Ok(()),
            result => result.map_err(|error| self.note(error)),
        }
    }

    async fn get_stream(
        &self,
        uri: Arc<str>,
        session: Option<Arc<str>>,
        last_event: Option<String>,
        auth: Option<String>,
        headers: Headers,
    ) -> Result<BoxedSseResponse, StreamableHttpError<Self::Error>> {
        self.get_stream_with_max_sse_event_size(uri, session, last_event, auth, headers, MESSAGE).await
    }

    async fn get_stream_with_max_sse_event_size(
        &self,
        uri: Arc<str>,
        session: Option<Arc<str>>,
        last_event: Option<String>,
        auth: Option<String>,
        headers: Headers,
        most: usize,
    ) -> Result<BoxedSseResponse, StreamableHttpError<Self::Error>> {
        if self.signs.listening.swap(true, Ordering::Relaxed) {
            sleep(REOPEN).await;
            // What was said while the stream was down went unheard.
            self.signs.forget_tools();
        }
        let stream = self
            .client
            .get_stream_with_max_sse_event_size(uri, session, last_event, auth, headers, most)
            .await
            .map_err(|error| self.note(error));
        if let Err(StreamableHttpError::Client(error)) = &stream
            && error.status() == Some(StatusCode::NOT_FOUND)
        {
            self.signs.expire();
        }
        stream
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn approval(value: Value) -> Result<Approval, serde_json::Error> {
        serde_json::from_value(value)
    }

    fn result(value: Value) -> Result<String, Failure> {
        outcome(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn server_needs_a_label_and_an_address_only() {
        let server: Server = toml::from_str("label = 'desk'\nurl = 'https://desk.example/mcp'").unwrap();
        assert_eq!(server.approval, Approval::Never);
        assert_eq!(server.timeout, Duration::from_secs(30));
        assert!(server.allows("anything"));

        let server: Server = toml::from_str(
            "label = 'desk'\nurl = 'https://desk.example/mcp'\nheaders = { authorization = 'Bearer sesame' }\n\
             allowed_tools = ['book']\napproval = { always = ['book'] }\ntimeout = '5s'",
        )
        .unwrap();
        assert_eq!(server.timeout, Duration::from_secs(5));
        assert!(server.allows("book") && !server.allows("cancel"));
        assert!(!format!("{server:?}").contains("sesame"));
        assert!(server.headers().unwrap()[&HeaderName::from_static("authorization")].is_sensitive());
        assert!(toml::from_str::<Server>("label = 'desk'\nurl = ''\ntools = []").is_err());
    }

    #[test]
    fn headers_of_the_protocol_can_not_be_set() {
        let text = "label = 'desk'\nurl = 'https://desk.example/mcp'\nheaders = { Content-Length = '5' }";
        let server: Server = toml::from_str(text).unwrap();
        assert_eq!(server.headers().unwrap_err().kind, "invalid");
    }

    #[test]
    fn approval_is_a_word_or_lists() {
        let some = |always: &[&str], never: &[&str]| {
            let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
            Approval::Some { always: own(always), never: own(never) }
        };
        assert_eq!(approval(json!("never")).unwrap(), Approval::Never);
        assert_eq!(approval(json!("always")).unwrap(), Approval::Always);
        assert_eq!(approval(json!({"always": ["a"], "never": ["b"]})).unwrap(), some(&["a"], &["b"]));
        assert_eq!(approval(json!({"never": {"tool_names": ["b"]}})).unwrap(), some(&[], &["b"]));
        let error = approval(json!("sometimes")).unwrap_err().to_string();
        assert!(error.contains("\"never\", \"always\""), "{error}");
        assert!(approval(json!({"allways": ["a"]})).is_err());
    }

    #[test]
    fn approval_of_unlisted_tools_follows_the_exceptions() {
        let of = |value| approval(value).unwrap();
        assert!(!of(json!("never")).needed("a"));
        assert!(of(json!("always")).needed("a"));

        let only = of(json!({"always": ["a"]}));
        assert!(only.needed("a") && !only.needed("b"));
        let all_but = of(json!({"never": ["a"]}));
        assert!(!all_but.needed("a") && all_but.needed("b"));
        let both = of(json!({"always": ["a", "b"], "never": ["b", "c"]}));
        assert!(both.needed("a") && both.needed("b") && !both.needed("c") && both.needed("d"));
        assert!(!of(json!({})).needed("a"));
    }

    #[test]
    fn result_is_the_texts_and_the_names_of_the_rest() {
        let text = result(json!({"content": [
            {"type": "text", "text": "It rains."},
            {"type": "image", "data": "aGk=", "mimeType": "image/png"},
            {"type": "audio", "data": "aGk=", "mimeType": "audio/wav"},
            {"type": "resource", "resource": {"uri": "file:///a", "text": "Take a coat."}},
            {"type": "resource", "resource": {"uri": "file:///b", "blob": "aGk="}},
            {"type": "resource_link", "uri": "file:///c", "name": "c"},
        ], "structuredContent": {"rain": true}}));
        assert_eq!(text.unwrap(), "It rains.\n[image]\n[audio]\nTake a coat.\n[resource]\n[resource]");
    }

    #[test]
    fn structured_content_stands_in_for_missing_text() {
        let text = result(json!({"content": [], "structuredContent": {"rain": true, "chance": 0.5}}));
        assert_eq!(text.unwrap(), r#"{"rain":true,"chance":0.5}"#);
        assert_eq!(result(json!({"content": []})).unwrap(), "");
    }

    #[test]
    fn result_has_a_limit() {
        let of = |length| result(json!({"content": [{"type": "text", "text": "x".repeat(length)}]}));
        assert_eq!(of(RESULT).unwrap().len(), RESULT);
        assert_eq!(of(RESULT + 1).unwrap_err().kind, "too_large");
    }

    #[test]
    fn error_of_a_tool_is_told_in_its_words() {
        let of = |content| result(json!({"content": content, "isError": true})).unwrap_err();
        assert_eq!(of(json!([{"type": "text", "text": "No table left."}])), failure("tool", "No table left."));
        assert_eq!(of(json!([])).kind, "tool");
        let long = of(json!([{"type": "text", "text": "é".repeat(RESULT)}]));
        assert_eq!(long.told, "é".repeat(ERROR / 2));
    }

    #[test]
    fn names_are_those_that_engines_take() {
        assert!(is_name("get_weather-2.0") && is_name(&"a".repeat(NAME)));
        assert!(!is_name("") && !is_name("get weather") && !is_name("größe") && !is_name(&"a".repeat(NAME + 1)));
    }

    #[test]
    fn status_is_found_in_the_transports_words() {
        assert_eq!(status_in("HTTP 403 Forbidden: go away"), Some("403"));
        assert_eq!(status_in("HTTP ok"), None);
        assert_eq!(status_in("expect initialized, accepted"), None);
    }
}
