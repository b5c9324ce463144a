//! Every setting: its default, its unit, its check.
//!
//! Settings come from a TOML file, then the environment (`ELECTRON_SERVER_LISTEN` for `server.listen`), then flags; the
//! later wins. A wrong value is refused with its name, its value and what is allowed; an unknown name with the nearest
//! known one.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::Path, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use ipnet::IpNet;

use crate::{secret::Secret, turn::FillerPolicy};

/// Whether this program has an engine of its own.
const ENGINE: bool = cfg!(feature = "mistral");

/// All settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How the server listens and what it accepts.
    pub server: Server,
    /// The model that runs in this process.
    pub model: Model,
    /// Models on other servers, by the name under which clients ask for them.
    pub models: BTreeMap<String, Upstream>,
    /// How the model speaks and calls.
    pub electron: Electron,
    /// How long conversations live and how large they may get.
    pub session: Session,
    /// What the tools that the gateway runs may reach.
    pub tools: Tools,
    /// Phone calls by Twilio.
    pub twilio: Twilio,
    /// Phone calls by Retell.
    pub retell: Retell,
    /// Whom the model plays, by name. Checked apart, since agents are read again while the server runs.
    #[serde(skip_serializing)]
    pub agents: Table,
    /// What is logged.
    pub log: Log,
    /// Keys that may use the server. Without any, the server listens on loopback only and makes one key at each start.
    pub keys: Vec<Key>,
}

/// How the server listens and what it accepts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address and port. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Largest body of a request.
    pub max_body: ByteSize,
    /// Longest that a request may take, its whole answer included.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Longest that reading a request's head or body may take.
    #[serde(with = "humantime_serde")]
    pub read_timeout: Duration,
    /// Longest that a client may take nothing of its answer.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// How long running answers may go on after the server was told to stop.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// Origins whose pages may call the server from a browser; `*` is any.
    pub cors_origins: Vec<String>,
    /// Most connections at once.
    pub max_connections: usize,
    /// Where the server is reached from outside, such as `https://voice.example.com`, also behind a proxy. Platforms sign
    /// it, and tools send late results to it. Empty is the address that it listens on.
    pub public_url: String,
    /// Networks of proxies whose `X-Forwarded-For` is believed.
    #[serde(with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
    /// A folder with a TOML file for each agent.
    pub agents_dir: String,
    /// The model of callers who name none, such as phones. Empty is the one in this process, or else the first.
    pub default_model: String,
}

/// What the tools that the gateway runs may reach.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tools {
    /// URLs that clients may name for callbacks and MCP servers, with all that is below them: `https://bot.example.com/tools/`,
    /// `https://*.example.com/`. Without any, clients may name none.
    pub allow_urls: Vec<String>,
    /// Networks that tools may be in besides the public ones, such as `127.0.0.1/32` or `10.1.0.0/16`.
    #[serde(with = "networks")]
    pub allow_networks: Vec<IpNet>,
}

/// Phone calls by Twilio.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Twilio {
    /// The account's auth token, with which Twilio signs its requests. Without it the routes are closed.
    pub auth_token: Secret,
}

/// Phone calls by Retell.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retell {
    /// A path segment that only Retell knows: `/agents/NAME/retell/SECRET/llm-websocket`.
    pub secret: Secret,
    /// Addresses from which Retell may connect without it.
    #[serde(with = "networks")]
    pub allow_addresses: Vec<IpNet>,
}

/// The model that runs in this process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// The name under which clients ask for it.
    pub name: String,
    /// `electron-nano`, `smollm2`, a GGUF file, a folder with safetensors, or a Hugging Face id.
    pub source: String,
    /// In what form the weights are kept: `auto`, `f32`, `q8_0` or `as-is`.
    pub weights: Weights,
    /// Most tokens of prompt and answer together; 0 leaves it to the model.
    pub context: usize,
    /// Turns that run at once. More than one lowers the total speed of a CPU.
    pub slots: usize,
    /// Turns that may wait for a slot.
    pub queue: usize,
    /// Memory for the keys and values of conversations that may go on.
    pub prefix_cache: ByteSize,
    /// Tokens that a warm-up computes before it lets a caller go first.
    pub warm_up_step: usize,
    /// Other calls that a turn at temperature 0 may try, where they begin likelier than what was called; 0 tries none.
    pub call_tries: usize,
}

/// A model on other servers that speak OpenAI's Chat Completions.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// What runs it. There is one such engine.
    pub engine: UpstreamEngine,
    /// Base URLs, such as `http://10.0.0.1:8000/v1`. A conversation stays with one of them while it can.
    pub urls: Vec<String>,
    /// How much of the load each of them takes, in their order; 1 where none is said.
    pub weights: Vec<u32>,
    /// The model's name there; empty is its name here.
    pub model: String,
    /// The key, sent as a bearer token.
    pub key: Secret,
    /// More headers of each request.
    pub headers: BTreeMap<String, Secret>,
    /// More fields of each request's body; they replace the gateway's own.
    pub body: Table,
    /// Longest that connecting may take.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Longest until the first token; then the next server is asked.
    #[serde(with = "humantime_serde")]
    pub first_token_timeout: Duration,
    /// Longest between two tokens.
    #[serde(with = "humantime_serde")]
    pub token_timeout: Duration,
    /// Longest for the whole answer.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Pause between looks at a server that failed; 0 looks never, and a turn finds out.
    #[serde(with = "humantime_serde")]
    pub probe_interval: Duration,
    /// Whether `http://` servers speak HTTP/2 from the first byte on. `https://` finds out by itself.
    pub http2: bool,
    /// Whether it calls tools.
    pub tools: bool,
    /// Whether it keeps to a JSON schema.
    pub json_schema: bool,
    /// Whether it tells log-probabilities.
    pub logprobs: bool,
    /// Whether it knows `stream_options` and so tells what a streamed answer costs. Without it, usage is estimated.
    pub stream_options: bool,
    /// Tokens that a prompt and its answer may have together.
    pub context: usize,
    /// Another model, which answers while none of the servers does.
    pub fallback: String,
}

/// What runs a model of `[models]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamEngine {
    /// Other servers.
    #[default]
    Upstream,
}

/// In what form a model's weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Weights {
    /// What is best for the size of the model and the device.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// 32-bit floats: the lowest time to first token on a CPU, four bytes a parameter.
    #[serde(rename = "f32")]
    F32,
    /// Types without a fast kernel become Q8_0.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// As the file has them.
    #[serde(rename = "as-is")]
    AsIs,
}

/// How the model speaks and calls.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Electron {
    /// When the caller hears something before a tool runs: `auto`, `always` or `never`.
    pub filler: FillerPolicy,
}

/// How long conversations live and how large they may get.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Session {
    /// How long a session outlives its connection.
    #[serde(with = "humantime_serde")]
    pub resume_window: Duration,
    /// How long a WebSocket may stay without a message from its client; 0 is no limit.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Pause between pings. A connection that is silent for two of them is given up; 0 sends none.
    #[serde(with = "humantime_serde")]
    pub ping_interval: Duration,
    /// Largest WebSocket message that is read.
    pub max_message: ByteSize,
    /// Most sessions at once.
    pub max_sessions: usize,
    /// Most conversations at once on one WebSocket, told apart by `stream_id`.
    pub max_lanes: usize,
    /// Most items, and changes of items, in a conversation.
    pub max_records: usize,
    /// Most text in a conversation.
    pub max_history: ByteSize,
    /// Events that are kept for a client that comes back.
    pub replay_events: usize,
    /// Most responses that are kept to be continued; the oldest makes room.
    pub max_stored: usize,
    /// How long a response with `store: true` is kept.
    #[serde(with = "humantime_serde")]
    pub store_for: Duration,
}

/// What is logged.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `human` or `json`.
    pub format: LogFormat,
    /// A level, or filters as `tracing` has them: `info,electron_gateway=debug`.
    pub level: String,
    /// Whether prompts and answers may be written to logs and traces.
    pub content: bool,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// A key that may use the server.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Whose it is; it stands in logs.
    pub name: String,
    /// `sha256:` and 64 hex digits, as `electron-gateway key create` prints it.
    pub hash: String,
    /// Models that it may use; none listed are all.
    #[serde(default)]
    pub models: Vec<String>,
    /// Requests a minute; 0 is no limit.
    #[serde(default)]
    pub requests_per_minute: u32,
    /// Requests at once; 0 is no limit.
    #[serde(default)]
    pub concurrency: u32,
}

/// What is wrong with the settings, each with its name, its value and what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(Vec<String>);

// === impl Config ===

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            max_body: ByteSize::mib(1),
            request_timeout: Duration::from_secs(300),
            read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            shutdown_grace: Duration::from_secs(30),
            cors_origins: Vec::new(),
            max_connections: 20_000,
            public_url: String::new(),
            trusted_proxies: Vec::new(),
            agents_dir: String::new(),
            default_model: String::new(),
        }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            name: "electron".into(),
            source: if ENGINE { "electron-nano".into() } else { String::new() },
            weights: Weights::Auto,
            context: 0,
            slots: 1,
            queue: 64,
            prefix_cache: ByteSize::gib(4),
            warm_up_step: 64,
            call_tries: 2,
        }
    }
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            engine: UpstreamEngine::Upstream,
            urls: Vec::new(),
            weights: Vec::new(),
            model: String::new(),
            key: Secret::default(),
            headers: BTreeMap::new(),
            body: Table::new(),
            connect_timeout: Duration::from_secs(2),
            first_token_timeout: Duration::from_secs(30),
            token_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(300),
            probe_interval: Duration::from_secs(2),
            http2: false,
            tools: true,
            json_schema: true,
            logprobs: true,
            stream_options: true,
            context: 32_768,
            fallback: String::new(),
        }
    }
}

impl Default for Session {
    fn default() -> Self {
        Self {
            resume_window: Duration::from_secs(300),
            idle_timeout: Duration::ZERO,
            ping_interval: Duration::from_secs(30),
            max_message: ByteSize::kib(256),
            max_sessions: 20_000,
            max_lanes: 64,
            max_records: 10_000,
            max_history: ByteSize::mib(4),
            replay_events: 1_000,
            max_stored: 100_000,
            store_for: Duration::from_secs(30 * 86_400),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Human, level: "info".into(), content: false }
    }
}

impl Config {
    /// Settings from a file, the environment and flags.
    ///
    /// `flags` are pairs of a dotted name and a value as it would stand in the file, quotes left out.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        let defaults = Table::try_from(Self::default()).map_err(|e| ConfigError(vec![e.to_string()]))?;
        let mut table = match file {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| {
                    ConfigError(vec![format!("{}: {e}. Name an existing file with --config.", path.display())])
                })?;
                text.parse::<Table>().map_err(|e| ConfigError(vec![format!("{}: {e}", path.display())]))?
            }
            None => Table::new(),
        };
        let mut faults = Vec::new();
        let variables: BTreeMap<String, (String, String)> =
            leaves(&defaults).into_iter().map(|name| (variable_of(&name), (name, String::new()))).collect();
        for (variable, value) in environment {
            if let Some((name, _)) = variables.get(&variable) {
                set(&mut table, &defaults, name, &value, &format!("{variable} (environment)"), &mut faults);
            }
        }
        for (name, value) in flags {
            set(&mut table, &defaults, name, value, name, &mut faults);
        }
        unknown(&table, &defaults, "", &mut faults);
        if faults.is_empty() {
            wrong(&table, &defaults, &mut faults);
        }
        if !faults.is_empty() {
            return Err(ConfigError(faults));
        }
        let config: Self =
            Value::Table(table).try_into().map_err(|e: toml::de::Error| ConfigError(vec![e.to_string()]))?;
        config.check()?;
        Ok(config)
    }

    /// The effective settings as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }

    fn check(&self) -> Result<(), ConfigError> {
        let mut faults = Vec::new();
        let mut refuse = |name: &str, value: &dyn fmt::Display, allowed: &str| {
            faults.push(format!("{name} = {value}: allowed is {allowed}"));
        };
        let (server, model) = (&self.server, &self.model);
        let within = |size: ByteSize, low: ByteSize, high: ByteSize| (low.0..=high.0).contains(&size.0);
        if !within(server.max_body, ByteSize::kib(1), ByteSize::gib(1)) {
            refuse("server.max_body", &server.max_body, "1 KiB to 1 GiB");
        }
        for (name, value) in [
            ("server.request_timeout", server.request_timeout),
            ("server.read_timeout", server.read_timeout),
            ("server.write_timeout", server.write_timeout),
        ] {
            if value.is_zero() || value > Duration::from_secs(86_400) {
                refuse(name, &humantime_serde::re::humantime::format_duration(value), "more than 0 up to 1 day");
            }
        }
        if server.max_connections == 0 {
            refuse("server.max_connections", &0, "1 or more");
        }
        for origin in &server.cors_origins {
            if origin != "*" && axum::http::HeaderValue::from_str(origin).is_err() {
                refuse("server.cors_origins", origin, "origins such as https://example.com, or *");
            }
        }
        let url = url::Url::parse(&server.public_url).ok();
        let sane = |url: &url::Url| matches!(url.scheme(), "http" | "https") && url.query().is_none();
        if !server.public_url.is_empty() && !url.as_ref().is_some_and(sane) {
            refuse("server.public_url", &server.public_url, "a URL such as https://voice.example.com");
        }
        if let Err(why) = crate::tool::guard::Guard::new(&self.tools.allow_urls, &[]) {
            refuse("tools.allow_urls", &self.tools.allow_urls.join(", "), &why);
        }
        let secret = self.retell.secret.reveal();
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        if !secret.is_empty() && (secret.len() < 16 || !secret.bytes().all(plain)) {
            refuse("retell.secret", &"(hidden)", "16 or more letters, digits, dashes and underscores");
        }
        if model.name.contains(':') {
            refuse("model.name", &model.name, "a name without a colon, behind which an agent's name stands");
        }
        if model.name.is_empty() {
            refuse("model.name", &"\"\"", "any name of one letter or more");
        }
        if !(1..=256).contains(&model.slots) {
            refuse("model.slots", &model.slots, "1 to 256");
        }
        if !(1..=100_000).contains(&model.queue) {
            refuse("model.queue", &model.queue, "1 to 100000");
        }
        if !(16..=4096).contains(&model.warm_up_step) {
            refuse("model.warm_up_step", &model.warm_up_step, "16 to 4096 tokens");
        }
        if model.call_tries > 16 {
            refuse("model.call_tries", &model.call_tries, "0 to 16");
        }
        self.check_models(&mut refuse);
        let session = &self.session;
        for (name, value, longest) in [
            ("session.resume_window", session.resume_window, 86_400),
            ("session.store_for", session.store_for, 366 * 86_400),
        ] {
            if value.is_zero() || value > Duration::from_secs(longest) {
                let allowed = format!("more than 0 up to {} days", longest / 86_400);
                refuse(name, &humantime_serde::re::humantime::format_duration(value), &allowed);
            }
        }
        if !within(session.max_message, ByteSize::kib(1), ByteSize::mib(64)) {
            refuse("session.max_message", &session.max_message, "1 KiB to 64 MiB");
        }
        if !within(session.max_history, ByteSize::kib(1), ByteSize::gib(1)) {
            refuse("session.max_history", &session.max_history, "1 KiB to 1 GiB");
        }
        for (name, value, most) in [
            ("session.max_sessions", session.max_sessions, 10_000_000),
            ("session.max_lanes", session.max_lanes, 100_000),
            ("session.max_records", session.max_records, 10_000_000),
            ("session.replay_events", session.replay_events, 1_000_000),
            ("session.max_stored", session.max_stored, 100_000_000),
        ] {
            if !(1..=most).contains(&value) {
                refuse(name, &value, &format!("1 to {most}"));
            }
        }
        if tracing_subscriber::EnvFilter::try_new(&self.log.level).is_err() {
            refuse("log.level", &self.log.level, "error, warn, info, debug, trace, or filters such as info,hyper=warn");
        }
        for (i, key) in self.keys.iter().enumerate() {
            let hex = key.hash.strip_prefix("sha256:").unwrap_or_default();
            if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
                let allowed = "sha256: and 64 hex digits, as `electron-gateway key create` prints it";
                refuse(&format!("keys[{i}].hash"), &"(hidden)", allowed);
            }
        }
        if self.keys.is_empty() && !server.listen.ip().is_loopback() {
            refuse(
                "server.listen",
                &server.listen,
                "a loopback address as long as no [[keys]] are configured; make one with `electron-gateway key create`",
            );
        }
        if faults.is_empty() { Ok(()) } else { Err(ConfigError(faults)) }
    }

    fn check_models(&self, refuse: &mut impl FnMut(&str, &dyn fmt::Display, &str)) {
        let known = |name: &str| self.models.contains_key(name) || (self.has_own_model() && name == self.model.name);
        if !ENGINE && self.has_own_model() {
            refuse("model.source", &self.model.source, "none, for this program was built without an engine");
        } else if !ENGINE && self.models.is_empty() {
            refuse("models", &"{}", "a section [models.NAME] with urls, for this program was built without an engine");
        } else if !self.has_own_model() && self.models.is_empty() {
            refuse("model.source", &"\"\"", "a model, or none when there is a section [models.NAME]");
        }
        if !self.server.default_model.is_empty() && !known(&self.server.default_model) {
            refuse("server.default_model", &self.server.default_model, "the name of a model that is served");
        }
        for (name, model) in &self.models {
            let at = |setting: &str| format!("models.{name}.{setting}");
            if name.is_empty() || name.contains(':') || (self.has_own_model() && *name == self.model.name) {
                refuse(&format!("models.{name}"), name, "a name without a colon that no other model has");
            }
            let http = |url: &String| {
                let url = url::Url::parse(url).ok();
                url.is_some_and(|url| matches!(url.scheme(), "http" | "https") && url.query().is_none())
            };
            if model.urls.is_empty() || !model.urls.iter().all(http) {
                refuse(&at("urls"), &model.urls.join(", "), "one or more URLs such as http://10.0.0.1:8000/v1");
            }
            if model.weights.len() > model.urls.len() || model.weights.iter().any(|w| !(1..=1_000).contains(w)) {
                let shown: Vec<String> = model.weights.iter().map(u32::to_string).collect();
                refuse(&at("weights"), &shown.join(", "), "at most one for each URL, each 1 to 1000");
            }
            for (setting, value) in [
                ("connect_timeout", model.connect_timeout),
                ("first_token_timeout", model.first_token_timeout),
                ("token_timeout", model.token_timeout),
                ("request_timeout", model.request_timeout),
            ] {
                if value.is_zero() || value > Duration::from_secs(86_400) {
                    let shown = humantime_serde::re::humantime::format_duration(value);
                    refuse(&at(setting), &shown, "more than 0 up to 1 day");
                }
            }
            if !(16..=100_000_000).contains(&model.context) {
                refuse(&at("context"), &model.context, "16 to 100000000 tokens");
            }
            let mut seen = vec![name];
            let mut next = &model.fallback;
            while !next.is_empty() {
                if !known(next) || seen.contains(&next) {
                    refuse(&at("fallback"), next, "another model that is served, and that does not lead back here");
                    break;
                }
                seen.push(next);
                next = match self.models.get(next) {
                    Some(model) => &model.fallback,
                    None => break,
                };
            }
        }
    }

    /// Whether a model runs in this process.
    pub fn has_own_model(&self) -> bool {
        !self.model.source.is_empty()
    }

    /// The model of callers who name none.
    pub fn default_model(&self) -> &str {
        match self.server.default_model.as_str() {
            "" if self.has_own_model() => &self.model.name,
            "" => self.models.keys().next().map_or("", String::as_str),
            name => name,
        }
    }
}

/// Networks as `10.0.0.0/8`, single addresses also without the slash.
mod networks {
    use std::net::IpAddr;

    use ipnet::IpNet;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    pub(super) fn serialize<S: Serializer>(networks: &[IpNet], serializer: S) -> Result<S::Ok, S::Error> {
        networks.iter().map(IpNet::to_string).collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
        let read = |text: &String| {
            let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            network.map_err(|_| de::Error::custom(format!("{text} is no network such as 10.0.0.0/8 or 127.0.0.1")))
        };
        Vec::<String>::deserialize(deserializer)?.iter().map(read).collect()
    }
}

/// The environment variable of a setting.
pub fn variable_of(name: &str) -> String {
    format!("ELECTRON_{}", name.replace('.', "_").to_uppercase())
}

/// Dotted names of all settings but lists of tables.
fn leaves(defaults: &Table) -> Vec<String> {
    let mut names = Vec::new();
    for (section, value) in defaults {
        if let Value::Table(inner) = value {
            names.extend(inner.keys().map(|key| format!("{section}.{key}")));
        }
    }
    names
}

/// Puts a text value at a dotted name, read as the type that its default has.
fn set(table: &mut Table, defaults: &Table, name: &str, value: &str, told: &str, faults: &mut Vec<String>) {
    let Some((section, key)) = name.split_once('.') else {
        faults.push(format!("{told}: {}", nearest(name, &leaves(defaults))));
        return;
    };
    let default = defaults.get(section).and_then(|s| s.get(key));
    let parsed = match default {
        Some(Value::String(_)) => Ok(Value::String(value.to_owned())),
        Some(Value::Array(_)) => {
            let items = value.split(',').map(str::trim).filter(|item| !item.is_empty());
            Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
        }
        Some(Value::Integer(_)) => value.parse().map(Value::Integer).map_err(|_| "a whole number"),
        Some(Value::Boolean(_)) => value.parse().map(Value::Boolean).map_err(|_| "true or false"),
        Some(_) | None => {
            faults.push(format!("{told}: {}", nearest(name, &leaves(defaults))));
            return;
        }
    };
    match parsed {
        Ok(parsed) => {
            let inner = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                inner.insert(key.to_owned(), parsed);
            }
        }
        Err(allowed) => faults.push(format!("{told} = {value}: allowed is {allowed}")),
    }
}

/// Names that no setting has.
fn unknown(table: &Table, defaults: &Table, prefix: &str, faults: &mut Vec<String>) {
    for (key, value) in table {
        let name = format!("{prefix}{key}");
        match (value, defaults.get(key)) {
            // Agents are checked where they are read.
            _ if name == "agents" => {}
            (Value::Table(models), Some(_)) if name == "models" => {
                let Ok(mut known) = Table::try_from(Upstream::default()) else { continue };
                for (model, fields) in models {
                    let Value::Table(fields) = fields else { continue };
                    // What is in these two is the server's business.
                    for free in ["headers", "body"] {
                        known.insert(free.into(), fields.get(free).cloned().unwrap_or(Value::Table(Table::new())));
                    }
                    unknown(fields, &known, &format!("models.{model}."), faults);
                }
            }
            (_, None) => {
                let known: Vec<String> = defaults.keys().map(|known| format!("{prefix}{known}")).collect();
                faults.push(format!("{name}: {}", nearest(&name, &known)));
            }
            (Value::Table(inner), Some(Value::Table(known))) => unknown(inner, known, &format!("{name}."), faults),
            (Value::Array(items), Some(_)) if name == "keys" => {
                if let Ok(known) = Table::try_from(Key::default()) {
                    for (i, item) in items.iter().enumerate() {
                        if let Value::Table(item) = item {
                            unknown(item, &known, &format!("keys[{i}]."), faults);
                        }
                    }
                }
            }
            _ => {}
        }
    }
}

fn nearest(name: &str, known: &[String]) -> String {
    let best = known.iter().max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)));
    match best {
        Some(best) => format!("there is no such setting; did you mean {best}?"),
        None => "there is no such setting".into(),
    }
}

/// Values that a setting cannot take: each is tried alone in otherwise default settings.
fn wrong(table: &Table, defaults: &Table, faults: &mut Vec<String>) {
    for (section, value) in table {
        let Value::Table(inner) = value else {
            let mut trial = defaults.clone();
            trial.insert(section.clone(), value.clone());
            if let Err(e) = Value::Table(trial).try_into::<Config>() {
                faults.push(format!("{section}: {}", e.message()));
            }
            continue;
        };
        for (key, value) in inner {
            let mut trial = defaults.clone();
            if let Some(Value::Table(trial)) = trial.get_mut(section) {
                trial.insert(key.clone(), value.clone());
            }
            if let Err(e) = Value::Table(trial).try_into::<Config>() {
                // What stands in a table may be secret.
                let shown = if value.is_table() { String::new() } else { format!(" = {value}") };
                faults.push(format!("{section}.{key}{shown}: {}", e.message()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, String> {
        let path = std::env::temp_dir().join(format!("config-{}-{}", std::process::id(), rand::random::<u64>()));
        std::fs::write(&path, text).unwrap();
        let own = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
        };
        let loaded = Config::load(Some(&path), own(environment), &own(flags)).map_err(|e| e.to_string());
        std::fs::remove_file(path).unwrap();
        loaded
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = "[server]\nlisten = \"127.0.0.1:1\"\nmax_body = \"2 MiB\"\n[model]\nslots = 2\n";
        let config = load(
            file,
            &[("ELECTRON_SERVER_LISTEN", "127.0.0.1:2"), ("ELECTRON_MODEL_QUEUE", "9")],
            &[("server.listen", "127.0.0.1:3")],
        )
        .unwrap();
        assert_eq!(config.server.listen.port(), 3);
        assert_eq!(config.server.max_body, ByteSize::mib(2));
        assert_eq!((config.model.slots, config.model.queue), (2, 9));
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_nearest_known_one() {
        let fault = load("[server]\nlistn = \"x\"\n", &[], &[]).unwrap_err();
        assert!(fault.contains("server.listn") && fault.contains("server.listen"), "{fault}");
        let fault = load("[sever]\n", &[], &[]).unwrap_err();
        assert!(fault.contains("did you mean server"), "{fault}");
        let fault = load("[[keys]]\nname = \"a\"\nhsh = \"b\"\n", &[], &[]).unwrap_err();
        assert!(fault.contains("keys[0].hash"), "{fault}");
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_name_and_value() {
        for (text, name, value) in [
            ("[server]\nlisten = \"here\"\n", "server.listen", "here"),
            ("[server]\nmax_body = \"much\"\n", "server.max_body", "much"),
            ("[server]\nrequest_timeout = \"soon\"\n", "server.request_timeout", "soon"),
            ("[model]\nweights = \"q2\"\n", "model.weights", "q2"),
            ("[model]\nslots = 0\n", "model.slots", "0"),
            ("[electron]\nfiller = \"maybe\"\n", "electron.filler", "maybe"),
            ("[models.a]\n", "models.a.urls", ""),
            ("[models.a]\nurls = [\"ftp://a\"]\n", "models.a.urls", "ftp://a"),
            ("[models.a]\nurls = [\"http://a\"]\nweights = [1, 2]\n", "models.a.weights", "1, 2"),
            ("[models.a]\nurls = [\"http://a\"]\nfallback = \"b\"\n", "models.a.fallback", "b"),
            ("[models.a]\nurls = [\"http://a\"]\nfallback = \"a\"\n", "models.a.fallback", "a"),
            ("[models.a]\nulrs = []\n", "models.a.urls", "did you mean"),
            ("[models.electron]\nurls = [\"http://a\"]\n", "models.electron", "no other model"),
            ("[server]\ndefault_model = \"x\"\n", "server.default_model", "x"),
        ] {
            let fault = load(text, &[], &[]).unwrap_err();
            assert!(fault.contains(name) && fault.contains(value), "{fault}");
        }
        let fault = load("", &[("ELECTRON_MODEL_SLOTS", "two")], &[]).unwrap_err();
        assert!(fault.contains("ELECTRON_MODEL_SLOTS") && fault.contains("two") && fault.contains("whole number"));
    }

    #[test]
    fn several_faults_are_told_at_once() {
        let fault = load("[server]\nlisten = \"here\"\n[model]\nweights = \"q2\"\n", &[], &[]).unwrap_err();
        assert!(fault.contains("server.listen") && fault.contains("model.weights"), "{fault}");
    }

    #[test]
    fn without_keys_only_loopback_is_served() {
        assert!(load("", &[], &[("server.listen", "0.0.0.0:80")]).unwrap_err().contains("key create"));
        let keyed = format!("[[keys]]\nname = \"a\"\nhash = \"sha256:{}\"\n", "0".repeat(64));
        assert!(load(&keyed, &[], &[("server.listen", "0.0.0.0:80")]).is_ok());
    }

    #[test]
    fn the_effective_settings_are_settings() {
        let text = Config::default().to_toml();
        assert_eq!(load(&text, &[], &[]).unwrap().to_toml(), text);
    }
}
