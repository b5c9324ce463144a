//! Agents: who the model plays on a call.
//!
//! An agent stands in the configuration as `[agents.NAME]`, or in a file `NAME.toml` of the agents' directory with the
//! same fields at its top. Agents can change while the server runs: a call keeps the [`Agent`] that it began with, and
//! a definition that cannot be used never takes the place of one that can.

use std::{
    collections::BTreeMap,
    fmt, future,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock},
    time::Duration,
};

use jiff::{Timestamp, tz::TimeZone};
use minijinja::{AutoEscape, Environment, Error as JinjaError, ErrorKind, UndefinedBehavior, Value as Jinja};
use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, Visitor},
    forward_to_deserialize_any,
};
use serde_json::{Map, Value as Json};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use toml::{Table, Value};
use url::Url;

use crate::{
    session::{Persona, Settings},
    tool::{By, Control, Dtmf, Hand, Kit, OnInterrupt, guard::Guard, http::Callback, mcp},
    turn::{FillerPolicy, Phrase, Sampling, Tool, ToolChoice},
};

/// Most characters of one text that a call brings.
const MAX_VALUE: usize = 512;

/// Most characters in all texts of one variable that is an array or an object.
const MAX_NESTED: usize = 16_384;

/// Deeper than this a variable has nothing.
const MAX_DEPTH: usize = 8;

/// Longest fault value that is shown.
const MAX_SHOWN: usize = 120;

/// Pause between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Variables that every call has.
const ALWAYS: [&str; 4] = ["agent", "date", "time", "weekday"];

/// Settings whose values are not shown when they are wrong.
const SECRET: [&str; 5] = ["secret", "headers", "authorization", "token", "password"];

const NAME_ALLOWED: &str = "1 to 64 letters, digits, underscores and dashes";

/// What an operator says of an agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Definition {
    /// The system prompt, a template.
    pub instructions: String,
    /// What the agent says first, a template. Empty: the caller speaks first.
    pub greeting: String,
    /// What is said when the model ends the call without a word. Empty: a phrase from the book.
    pub farewell: String,
    /// BCP 47, such as `en-US`. Empty: the caller's words tell it.
    pub language: String,
    /// Name in the IANA database, in whose time `date`, `time` and `weekday` are told.
    pub timezone: String,
    /// Values of variables that a call does not bring.
    pub variables: BTreeMap<String, String>,
    /// Whether the caller hears something before a tool runs; `None` leaves it to the server's setting.
    pub filler: Option<FillerPolicy>,
    /// After this long in a tool the caller is told that it goes on; 0 is never.
    #[serde(with = "humantime_serde")]
    pub still_waiting_after: Duration,
    /// Most times in a row that the model may call tools before it has to answer.
    pub max_tool_rounds: usize,
    /// 0 (greedy) to 2.
    pub temperature: f32,
    /// 0 to 1: the share of probability mass that is drawn from.
    pub top_p: f32,
    /// Most tokens of one answer; `None` leaves it to the model's context.
    pub max_tokens: Option<usize>,
    /// Makes the answers repeatable.
    pub seed: Option<u64>,
    /// Of the first round of a turn; in later rounds the model decides. `auto`, `none`, `required`, or a tool's name.
    #[serde(deserialize_with = "tool_choice")]
    pub tool_choice: ToolChoice,
    /// Whether one turn may hold several calls.
    pub parallel_tool_calls: bool,
    /// Functions that the model may call.
    pub tools: Vec<ToolDefinition>,
    /// Servers whose tools it may call.
    pub mcp: Vec<mcp::Server>,
    /// What it may do to the call itself.
    pub controls: Vec<Control>,
    /// Whom it may hand the caller over to: names that the model chooses from, and their numbers or addresses.
    pub transfer_to: BTreeMap<String, String>,
    /// How keys that the caller presses become one message.
    pub dtmf: Dtmf,
    /// Name of the configured key to which the agent's calls are counted. Empty: the first one.
    pub key: String,
}

/// A function of an agent.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ToolDefinition {
    /// Letters, digits, `_`, `-` and `.`, at most 64.
    pub name: String,
    /// What it does, for the model to read.
    pub description: String,
    /// JSON schema of the arguments, an object.
    #[serde(deserialize_with = "parameters")]
    pub parameters: Map<String, Json>,
    /// Where the gateway asks for the result. Without it the client answers.
    pub callback: Option<Callback>,
    /// What becomes of a running call when the caller interrupts.
    pub on_interrupt: OnInterrupt,
}

/// An agent that can be used: everything in its definition was checked.
#[derive(Debug)]
pub struct Agent {
    /// Unique among the agents.
    pub name: Arc<str>,
    /// What the operator says of it.
    pub definition: Definition,
    timezone: TimeZone,
}

/// The agents of the server, by name.
pub struct Agents {
    config_file: Option<PathBuf>,
    dir: Option<PathBuf>,
    guard: Arc<Guard>,
    current: RwLock<BTreeMap<Arc<str>, Entry>>,
    /// What else an agent has to pass, once it is known.
    check: OnceLock<Check>,
    /// What was taken last. Held over a whole reload, so that an older reading never overtakes a newer one.
    taken: Mutex<Snapshot>,
}

/// What a reload did, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Agents that were not there before.
    pub added: Vec<Arc<str>>,
    /// Agents with a new definition.
    pub changed: Vec<Arc<str>>,
    /// Agents that are gone.
    pub removed: Vec<Arc<str>>,
    /// Agents, or whole files, that cannot be used. What was there before stays.
    pub refused: Vec<Arc<str>>,
}

#[derive(Clone)]
struct Entry {
    agent: Arc<Agent>,
    /// As it was written, to see whether it changed.
    table: Table,
    source: Source,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Config,
    Dir,
}

type Content = Result<Vec<u8>, String>;

/// An agent with the table that it was read from, or its faults.
type Read = Result<(Agent, Table), Vec<String>>;

/// The bytes of all files at one time.
#[derive(Clone, Default, PartialEq, Eq)]
struct Snapshot {
    config: Option<Content>,
    /// By the name of the file without `.toml`.
    files: Option<Result<BTreeMap<String, Content>, String>>,
}

/// What a snapshot says.
#[derive(Default)]
struct Found {
    agents: BTreeMap<String, (Source, Read)>,
    /// A source that cannot be read as a whole, and why: it says nothing about its agents.
    lost: Vec<(Source, Arc<str>, String)>,
}

// === impl Definition ===

impl Default for Definition {
    fn default() -> Self {
        Self {
            instructions: String::new(),
            greeting: String::new(),
            farewell: String::new(),
            language: String::new(),
            timezone: "UTC".into(),
            variables: BTreeMap::new(),
            filler: None,
            still_waiting_after: Duration::from_secs(4),
            max_tool_rounds: 8,
            temperature: 1.0,
            top_p: 1.0,
            max_tokens: None,
            seed: None,
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            tools: Vec::new(),
            mcp: Vec::new(),
            controls: Vec::new(),
            transfer_to: BTreeMap::new(),
            dtmf: Dtmf::default(),
            key: String::new(),
        }
    }
}

impl Definition {
    /// Takes what can be taken from a table, so that the rest can still be checked when something is wrong.
    fn read(table: &Table, prefix: &str, faults: &mut Vec<String>) -> Self {
        let mut table = table.clone();
        let at = |key: &str| dotted(prefix, key);
        if let Some(Value::Array(tools)) = table.get_mut("tools") {
            each(tools, &at("tools"), faults, |tool, name, faults| {
                if let Some(callback) = tool.remove("callback") {
                    let name = dotted(name, "callback");
                    match callback {
                        Value::Table(mut callback) => {
                            if whole::<Callback>(&mut callback, &name, faults) {
                                tool.insert("callback".into(), Value::Table(callback));
                            }
                        }
                        _ => faults.push(format!("{name}: allowed is a table with a url")),
                    }
                }
                whole::<ToolDefinition>(tool, name, faults)
            });
        }
        if let Some(Value::Array(servers)) = table.get_mut("mcp") {
            each(servers, &at("mcp"), faults, |server, name, faults| {
                // The check tells what has to be there.
                for key in ["label", "url"] {
                    server.entry(key).or_insert(Value::String(String::new()));
                }
                whole::<mcp::Server>(server, name, faults)
            });
        }
        if let Some(Value::Table(dtmf)) = table.get_mut("dtmf") {
            whole::<Dtmf>(dtmf, &at("dtmf"), faults);
        }
        if let Some(Value::Array(controls)) = table.get_mut("controls") {
            let mut i = 0..;
            controls.retain(|control| {
                let name = format!("{}[{}]", at("controls"), i.next().unwrap_or_default());
                let known = Control::ALL.map(Control::name);
                let fits = control.as_str().is_some_and(|control| known.contains(&control));
                if !fits {
                    let nearest = control.as_str().map_or_else(String::new, |control| did_you_mean(control, known));
                    faults.push(format!("{name} = {}: allowed is {}{nearest}", shown(control), known.join(", ")));
                }
                fits
            });
        }
        for key in ["variables", "transfer_to"] {
            if let Some(Value::Table(texts)) = table.get_mut(key) {
                texts.retain(|name, value| {
                    if !value.is_str() {
                        let name = dotted(&at(key), name);
                        faults.push(format!("{name} = {}: allowed is a text", shown(value)));
                    }
                    value.is_str()
                });
            }
        }
        whole::<Self>(&mut table, prefix, faults);
        Value::Table(table).try_into().unwrap_or_else(|e: toml::de::Error| {
            faults.push(format!("{}: {}", if prefix.is_empty() { "agent" } else { prefix }, e.message()));
            Self::default()
        })
    }

    /// Everything that the types of the settings do not say.
    fn check(&self, prefix: &str, table: &Table, faults: &mut Vec<String>) {
        let at = |key: &str| dotted(prefix, key);
        if !(self.language.is_empty() || is_language(&self.language)) {
            let allowed = "a BCP 47 language tag such as en-US, or empty";
            refuse(faults, &at("language"), quoted(&self.language), allowed);
        }
        for name in self.variables.keys() {
            if !is_variable(name) || ALWAYS.contains(&name.as_str()) {
                let allowed =
                    "letters, digits and underscores, no digit first; agent, date, time and weekday are taken";
                faults.push(format!("{}: allowed as a name are {allowed}", dotted(&at("variables"), name)));
            }
        }
        let duration = humantime_serde::re::humantime::format_duration;
        if self.still_waiting_after > Duration::from_secs(3600) {
            refuse(faults, &at("still_waiting_after"), duration(self.still_waiting_after), "0s (never) up to 1h");
        }
        if !(1..=64).contains(&self.max_tool_rounds) {
            refuse(faults, &at("max_tool_rounds"), self.max_tool_rounds, "1 to 64");
        }
        if !(0.0..=2.0).contains(&self.temperature) {
            refuse(faults, &at("temperature"), self.temperature, "0 to 2");
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            refuse(faults, &at("top_p"), self.top_p, "0 to 1");
        }
        if self.max_tokens == Some(0) {
            refuse(faults, &at("max_tokens"), 0, "1 or more");
        }
        if self.dtmf.timeout.is_zero() || self.dtmf.timeout > Duration::from_secs(60) {
            refuse(faults, &dotted(&at("dtmf"), "timeout"), duration(self.dtmf.timeout), "more than 0 up to 1m");
        }
        if !(1..=128).contains(&self.dtmf.max_digits) {
            refuse(faults, &dotted(&at("dtmf"), "max_digits"), self.dtmf.max_digits, "1 to 128");
        }
        for (name, number) in &self.transfer_to {
            if name.trim().is_empty() || name.chars().count() > 64 || name.chars().any(char::is_control) {
                faults.push(format!("{}: allowed as a name are 1 to 64 characters", dotted(&at("transfer_to"), name)));
            }
            if !is_destination(number) {
                let allowed = "a number such as +15551234567, or a sip:, sips: or tel: address";
                refuse(faults, &dotted(&at("transfer_to"), name), quoted(number), allowed);
            }
        }
        for (i, control) in self.controls.iter().enumerate() {
            if self.controls[..i].contains(control) {
                refuse(faults, &at("controls"), quoted(control.name()), "each control once");
            }
        }
        let nobody = table.get("transfer_to").is_none_or(|names| names.as_table().is_some_and(Table::is_empty));
        if self.controls.contains(&Control::TransferCall) && nobody {
            faults.push(format!("{} = \"transfer_call\": this needs names in {}", at("controls"), at("transfer_to")));
        }
        self.check_tools(prefix, table, faults);
        self.check_servers(prefix, faults);
    }

    fn check_tools(&self, prefix: &str, table: &Table, faults: &mut Vec<String>) {
        for (i, tool) in self.tools.iter().enumerate() {
            let at = |key: &str| format!("{}[{i}].{key}", dotted(prefix, "tools"));
            let shown = quoted(&tool.name);
            if !is_name(&tool.name, "_-.") {
                let allowed = "1 to 64 letters, digits, underscores, dashes and dots";
                refuse(faults, &at("name"), shown, allowed);
            } else if Control::ALL.iter().any(|control| control.name() == tool.name) {
                refuse(faults, &at("name"), shown, "any name that no control has");
            } else if self.tools[..i].iter().any(|other| other.name == tool.name) {
                refuse(faults, &at("name"), shown, "a name that no other tool has");
            }
            match tool.parameters.get("type") {
                None => {}
                Some(Json::String(kind)) if kind == "object" => {}
                Some(kind) => faults.push(format!("{} = {kind}: allowed is \"object\"", at("parameters.type"))),
            }
            if tool.parameters.get("properties").is_some_and(|properties| !properties.is_object()) {
                faults.push(format!("{}: allowed is a table of JSON schemas", at("parameters.properties")));
            }
        }
        let ToolChoice::Named(choice) = &self.tool_choice else { return };
        // A list that is wrong as a whole was told; that nothing can be found in it need not be.
        let written = |key: &str| table.get(key).map_or(Some(0), |list| list.as_array().map(Vec::len));
        let readable = written("tools") == Some(self.tools.len()) && written("controls") == Some(self.controls.len());
        let known = || {
            let tools = self.tools.iter().map(|tool| tool.name.as_str());
            tools.chain(self.controls.iter().map(|control| control.name()))
        };
        if readable && !known().any(|name| name == choice) {
            faults.push(format!(
                "{} = {}: allowed is auto, none, required, or the name of a tool or control of the agent{}",
                dotted(prefix, "tool_choice"),
                quoted(choice),
                did_you_mean(choice, known().chain(["auto", "none", "required"])),
            ));
        }
    }

    fn check_servers(&self, prefix: &str, faults: &mut Vec<String>) {
        for (i, server) in self.mcp.iter().enumerate() {
            let at = |key: &str| format!("{}[{i}].{key}", dotted(prefix, "mcp"));
            let shown = quoted(&server.label);
            if !is_name(&server.label, "_-") {
                refuse(faults, &at("label"), shown, NAME_ALLOWED);
            } else if self.mcp[..i].iter().any(|other| other.label == server.label) {
                refuse(faults, &at("label"), shown, "a label that no other server has");
            }
            if address(server).is_none() {
                let allowed = "an address such as https://example.com/mcp";
                refuse(faults, &at("url"), public(&server.url), allowed);
            }
        }
    }

    /// Addresses that the guard does not let the gateway ask.
    fn check_addresses(&self, prefix: &str, guard: &Guard, faults: &mut Vec<String>) {
        for (i, tool) in self.tools.iter().enumerate() {
            if let Some(Err(why)) = tool.callback.as_ref().map(|callback| callback.check(guard)) {
                faults.push(format!("{}[{i}].callback: {why}", dotted(prefix, "tools")));
            }
        }
        for (i, server) in self.mcp.iter().enumerate() {
            if let Some(Err(why)) = address(server).map(|url| guard.check(&url)) {
                faults.push(format!("{}[{i}].url = {}: {why}", dotted(prefix, "mcp"), public(&server.url)));
            }
        }
    }

    /// Whether the secrets of two definitions with the same text are the same. What `env:` and `file:` stand for may
    /// have changed.
    fn has_secrets_of(&self, other: &Self) -> bool {
        let secrets = |definition: &Self| -> Vec<_> {
            let callbacks = definition.tools.iter().map(|tool| tool.callback.as_ref());
            callbacks.map(|callback| callback.map(|it| (it.secret.clone(), it.headers.clone()))).collect()
        };
        secrets(self) == secrets(other) && self.mcp == other.mcp
    }
}

// === impl Agent ===

/// Templates are the operator's. They were compiled when they were checked, and are again for each call: that takes
/// microseconds, and an environment of its own for each agent would keep more than it saves.
static JINJA: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Chainable);
    environment.set_recursion_limit(64);
    environment
});

impl Agent {
    /// Reads and checks a definition. `prefix` is the dotted name of the table, such as `agents.shop`, or empty.
    ///
    /// # Errors
    /// Everything that is wrong, at once: each fault with its dotted name, its value and what is allowed, an unknown
    /// name with the nearest known one.
    pub fn parse(name: &str, table: &Table, prefix: &str) -> Result<Self, Vec<String>> {
        Self::read(name, table, prefix, None)
    }

    fn read(name: &str, table: &Table, prefix: &str, guard: Option<&Guard>) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        if !is_name(name, "_-") {
            faults.push(format!("agent {}: allowed as its name is {NAME_ALLOWED}", quoted(name)));
        }
        let definition = Definition::read(table, prefix, &mut faults);
        definition.check(prefix, table, &mut faults);
        if let Some(guard) = guard {
            definition.check_addresses(prefix, guard, &mut faults);
        }
        let timezone = TimeZone::get(&definition.timezone).unwrap_or_else(|_| {
            let known: Vec<_> = jiff::tz::db().available().map(|known| known.as_str().to_owned()).collect();
            faults.push(format!(
                "{} = {}: allowed is an IANA time zone such as Europe/Berlin{}",
                dotted(prefix, "timezone"),
                quoted(&definition.timezone),
                did_you_mean(&definition.timezone, known.iter().map(String::as_str)),
            ));
            TimeZone::UTC
        });
        let agent = Self { name: name.into(), definition, timezone };
        for (key, source) in
            [("instructions", &agent.definition.instructions), ("greeting", &agent.definition.greeting)]
        {
            if let Err(e) = agent.try_template(source) {
                let line = e.line().map_or_else(String::new, |line| format!(" (line {line})"));
                let detail = e.detail().map_or_else(String::new, |detail| format!(": {detail}"));
                faults.push(format!("{}: {}{detail}{line}", dotted(prefix, key), e.kind()));
            }
        }
        if faults.is_empty() { Ok(agent) } else { Err(faults) }
    }

    /// What a session is made with in which the model plays this agent. `filler` holds where the definition says nothing,
    /// `controls` is what the dialect can do with the call, and `attended` whether somebody can approve calls.
    pub fn settings(
        &self,
        model: &str,
        filler: FillerPolicy,
        variables: &Map<String, Json>,
        controls: &[Control],
        attended: bool,
    ) -> Settings {
        let definition = &self.definition;
        let now = Timestamp::now();
        let mut kit = Kit { servers: definition.mcp.iter().cloned().map(Arc::new).collect(), ..Kit::default() };
        for tool in &definition.tools {
            if let Some(callback) = &tool.callback {
                let by = By::Callback(callback.clone());
                let hand = Hand { by, on_interrupt: tool.on_interrupt, approval: false };
                kit.hands.insert(tool.name.clone(), Arc::new(hand));
            }
            kit.tools.push(Tool {
                name: tool.name.clone(),
                description: Some(tool.description.clone()).filter(|text| !text.is_empty()),
                parameters: Json::Object(tool.parameters.clone()),
                phrase: Phrase::Filler,
            });
        }
        let text = |text: &str| Some(text).filter(|text| !text.is_empty()).map(Arc::<str>::from);
        for control in definition.controls.iter().filter(|control| controls.contains(control)) {
            let hand = Hand { by: By::Control(*control), on_interrupt: OnInterrupt::Finish, approval: false };
            kit.hands.insert(control.name().into(), Arc::new(hand));
            kit.tools.push(control.tool(&definition.transfer_to, text(&definition.farewell)));
        }
        let offered = |choice: &ToolChoice| match choice {
            ToolChoice::Named(name) => kit.tools.iter().any(|tool| tool.name == *name),
            _ => true,
        };
        let tool_choice = Some(definition.tool_choice.clone()).filter(offered).unwrap_or_default();
        let persona = Persona {
            agent: self.name.clone(),
            instructions: self.instructions(variables, now),
            greeting: self.greeting(variables, now),
            kit,
            attended,
            transfer_to: definition.transfer_to.clone(),
            dtmf: definition.dtmf.clone(),
            tool_rounds: definition.max_tool_rounds,
            still_waiting_after: definition.still_waiting_after,
            language: text(&definition.language),
            caller: Arc::new(variables.clone()),
        };
        let mut settings = Settings::new(model, definition.filler.unwrap_or(filler));
        settings.persona = Some(Arc::new(persona));
        settings.tool_choice = tool_choice;
        settings.parallel_tool_calls = definition.parallel_tool_calls;
        settings.sampling = Sampling {
            temperature: definition.temperature,
            top_p: definition.top_p,
            max_tokens: definition.max_tokens,
            seed: definition.seed,
            ..Sampling::default()
        };
        settings
    }

    /// The instructions for one call. `variables` are the call's own; their texts are cut to 512 characters, hold no
    /// line breaks or other control characters, and are never read as templates.
    ///
    /// A template that fails is logged and stays as it was written.
    pub fn instructions(&self, variables: &Map<String, Json>, now: Timestamp) -> String {
        self.render("instructions", &self.definition.instructions, variables, now)
    }

    /// What the agent says first on one call; `None` when the caller speaks first. Otherwise as
    /// [`Agent::instructions`].
    pub fn greeting(&self, variables: &Map<String, Json>, now: Timestamp) -> Option<String> {
        let greeting = self.render("greeting", &self.definition.greeting, variables, now);
        (!greeting.trim().is_empty()).then_some(greeting)
    }

    fn render(&self, template: &str, source: &str, variables: &Map<String, Json>, now: Timestamp) -> String {
        JINJA.render_str(source, self.context(variables, now)).unwrap_or_else(|e| {
            // Not the error's own words: they may hold what the call brought.
            let (agent, line) = (&self.name, e.line());
            tracing::warn!(%agent, template, line, "the template fails and is used as it is: {}", e.kind());
            source.to_owned()
        })
    }

    /// Whether a template compiles, and uses no filter and no test that there is not, which only rendering tells.
    fn try_template(&self, source: &str) -> Result<(), JinjaError> {
        let template = JINJA.template_from_str(source)?;
        match template.render(self.context(&Map::new(), Timestamp::UNIX_EPOCH)) {
            Err(e) if matches!(e.kind(), ErrorKind::UnknownFilter | ErrorKind::UnknownTest) => Err(e),
            _ => Ok(()),
        }
    }

    fn context(&self, variables: &Map<String, Json>, now: Timestamp) -> Jinja {
        let defaults =
            self.definition.variables.iter().map(|(name, value)| (name.clone(), Jinja::from(value.as_str())));
        let mut context: BTreeMap<String, Jinja> = defaults.collect();
        for (name, value) in variables {
            // A platform that sends null knows nothing.
            if !value.is_null() {
                context.insert(name.clone(), clean(value, &mut { MAX_NESTED }, MAX_DEPTH));
            }
        }
        let local = now.to_zoned_datetime(self.timezone.clone());
        // After the call's variables: a caller does not tell the agent what day it is.
        context.extend([
            ("agent".to_owned(), Jinja::from(&*self.name)),
            ("date".to_owned(), Jinja::from(local.strftime("%Y-%m-%d").to_string())),
            ("time".to_owned(), Jinja::from(local.strftime("%H:%M").to_string())),
            ("weekday".to_owned(), Jinja::from(local.strftime("%A").to_string())),
        ]);
        Jinja::from(context)
    }
}

/// A variable of a call as templates may have it. `left` are the characters that it may still have altogether; what
/// does not fit is left out.
fn clean(value: &Json, left: &mut usize, depth: usize) -> Jinja {
    match value {
        Json::String(text) => Jinja::from(clean_text(text, left)),
        Json::Bool(value) => Jinja::from(*value),
        Json::Number(value) => Jinja::from_serialize(value),
        Json::Array(values) if depth > 0 => {
            let mut array = Vec::new();
            for value in values {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    break;
                }
                array.push(clean(value, left, depth - 1));
            }
            Jinja::from(array)
        }
        Json::Object(values) if depth > 0 => {
            let mut object = BTreeMap::new();
            for (name, value) in values {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    break;
                }
                object.insert(clean_text(name, left), clean(value, left, depth - 1));
            }
            Jinja::from(object)
        }
        // Null is nothing too: it would read "none".
        _ => Jinja::UNDEFINED,
    }
}

fn clean_text(text: &str, left: &mut usize) -> String {
    let kept = text.chars().take(MAX_VALUE.min(*left));
    let kept: String = kept.map(|c| if breaks(c) { ' ' } else { c }).collect();
    *left -= kept.chars().count();
    kept
}

/// Control characters, and the two line breaks that are none.
fn breaks(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')
}

// === Reading ===

/// Takes out of a table what a `T` cannot take, and tells of it. Whether the rest is a `T`.
fn whole<T: DeserializeOwned>(table: &mut Table, prefix: &str, faults: &mut Vec<String>) -> bool {
    const MISSING: &str = "missing field";
    let known = fields_of::<T>();
    let mut dropped = Vec::new();
    table.retain(|key, value| {
        let name = dotted(prefix, key);
        if let Some(known) = known
            && !known.contains(&key)
        {
            let nearest = closest(key, known.iter().copied());
            let nearest =
                nearest.map_or_else(String::new, |known| format!("; did you mean {}?", dotted(prefix, known)));
            faults.push(format!("{name}: there is no such setting{nearest}"));
            return false;
        }
        // Alone, so that one fault does not hide another.
        match Table::from_iter([(key.to_owned(), value.clone())]).try_into::<T>() {
            Err(e) if !e.message().starts_with(MISSING) => {
                faults.push(wrong(&name, key, value, e.message()));
                dropped.push(key.to_owned());
                false
            }
            _ => true,
        }
    });
    let Err(e) = table.clone().try_into::<T>() else { return true };
    let missing = e.message().strip_prefix(MISSING).map(|field| field.trim().trim_matches('`'));
    match missing {
        Some(field) if dropped.iter().any(|key| key == field) => {}
        Some(field) => faults.push(format!("{}: this setting is required", dotted(prefix, field))),
        None => faults.push(format!("{prefix}: {}", e.message())),
    }
    false
}

/// Reads every table of a list. A list with one that cannot be read is emptied, so that the places of the others stay
/// right in what is told of them.
fn each(
    items: &mut Vec<Value>,
    prefix: &str,
    faults: &mut Vec<String>,
    mut read: impl FnMut(&mut Table, &str, &mut Vec<String>) -> bool,
) {
    let mut good = true;
    for (i, item) in items.iter_mut().enumerate() {
        let name = format!("{prefix}[{i}]");
        good &= match item {
            Value::Table(table) => read(table, &name, faults),
            _ => {
                faults.push(format!("{name}: allowed is a table"));
                false
            }
        };
    }
    if !good {
        items.clear();
    }
}

/// The settings that a type has, as its own `Deserialize` knows them.
fn fields_of<T: DeserializeOwned>() -> Option<&'static [&'static str]> {
    struct Fields<'a>(&'a mut Option<&'static [&'static str]>);

    impl<'de> Deserializer<'de> for Fields<'_> {
        type Error = de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("only the names are asked for"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = Some(fields);
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut fields = None;
    let _ = T::deserialize(Fields(&mut fields));
    fields
}

/// What is told of a value that a setting cannot take. Secrets stand neither in it nor in what serde says of them.
fn wrong(name: &str, key: &str, value: &Value, why: &str) -> String {
    if SECRET.contains(&key) {
        // Only what resolving a secret says holds nothing of it.
        let resolved = match value {
            Value::Table(texts) => key == "headers" && texts.values().all(Value::is_str),
            value => key == "secret" && value.is_str(),
        };
        let why = if resolved { why } else { "allowed is text, env:NAME or file:PATH" };
        return format!("{name}: {why}");
    }
    match value {
        Value::String(url) if key == "url" => format!("{name} = {}: {why}", public(url)),
        Value::Table(_) => format!("{name}: {why}"),
        Value::Array(items) if items.iter().any(|item| item.is_table() || item.is_array()) => format!("{name}: {why}"),
        value => format!("{name} = {}: {why}", shown(value)),
    }
}

fn refuse(faults: &mut Vec<String>, name: &str, value: impl fmt::Display, allowed: &str) {
    faults.push(format!("{name} = {value}: allowed is {allowed}"));
}

fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

fn quoted(text: &str) -> String {
    cut(&format!("{text:?}"))
}

/// An address without what may be secret in it: who asks, and the query.
fn public(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => quoted(&format!("{scheme}://{host}")),
        (None, Some((_, host))) => quoted(host),
        (_, None) => quoted(url),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn dotted(prefix: &str, key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    let key = if bare { key.to_owned() } else { quoted(key) };
    if prefix.is_empty() { key } else { format!("{prefix}.{key}") }
}

fn closest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |known: &str| strsim::jaro_winkler(name, known);
    known.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
}

fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    closest(name, known).map_or_else(String::new, |known| format!("; did you mean {known}?"))
}

/// 1 to 64 ASCII letters, digits and some others.
fn is_name(name: &str, others: &str) -> bool {
    (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || others.contains(c))
}

/// What a template can write between its braces.
fn is_variable(name: &str) -> bool {
    is_name(name, "_") && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// The shape of a language tag, RFC 5646 section 2.1: a language of two or three letters, then subtags of at most
/// eight.
fn is_language(tag: &str) -> bool {
    let mut subtags = tag.split('-');
    let language = subtags.next().unwrap_or_default();
    (2..=3).contains(&language.len())
        && language.bytes().all(|b| b.is_ascii_alphabetic())
        && subtags.all(|tag| (1..=8).contains(&tag.len()) && tag.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// A number in E.164, or the address of a phone.
fn is_destination(text: &str) -> bool {
    if let Some(digits) = text.strip_prefix('+') {
        return (2..=15).contains(&digits.len())
            && digits.bytes().all(|b| b.is_ascii_digit())
            && !digits.starts_with('0');
    }
    let address = ["sip:", "sips:", "tel:"].iter().find_map(|scheme| text.strip_prefix(scheme));
    address.is_some_and(|address| {
        (1..=256).contains(&address.len()) && !address.contains(|c: char| c.is_whitespace() || c.is_control())
    })
}

fn address(server: &mcp::Server) -> Option<Url> {
    Url::parse(&server.url).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}

fn tool_choice<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ToolChoice, D::Error> {
    let choice = String::deserialize(deserializer)?;
    Ok(match choice.as_str() {
        "auto" => ToolChoice::Auto,
        "none" => ToolChoice::None,
        "required" => ToolChoice::Required,
        _ => ToolChoice::Named(choice),
    })
}

fn parameters<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map<String, Json>, D::Error> {
    let table = Table::deserialize(deserializer)?;
    table.into_iter().map(|(key, value)| Some((key, json(value)?))).collect::<Option<_>>().ok_or_else(|| {
        // TOML has numbers that JSON has not.
        de::Error::custom("allowed is a JSON schema, in which no number is infinite or nan")
    })
}

fn json(value: Value) -> Option<Json> {
    Some(match value {
        Value::String(text) => text.into(),
        Value::Integer(number) => number.into(),
        Value::Float(number) => Json::Number(serde_json::Number::from_f64(number)?),
        Value::Boolean(value) => value.into(),
        Value::Datetime(time) => time.to_string().into(),
        Value::Array(items) => Json::Array(items.into_iter().map(json).collect::<Option<_>>()?),
        Value::Table(table) => {
            let entries = table.into_iter().map(|(key, value)| Some((key, json(value)?)));
            Json::Object(entries.collect::<Option<_>>()?)
        }
    })
}

// === impl Agents ===

/// Says what is wrong with an agent.
pub type Check = Box<dyn Fn(&Agent) -> Result<(), String> + Send + Sync>;

impl Agents {
    /// Reads the `agents` of the server's configuration file, and one file for each agent from a directory.
    ///
    /// `guard` decides which addresses callbacks and MCP servers may have.
    ///
    /// # Errors
    /// Everything that is wrong in all files, a fault a line. A name that stands in both places is a fault.
    pub fn load(config_file: Option<PathBuf>, dir: Option<PathBuf>, guard: Arc<Guard>) -> Result<Self, String> {
        let (current, taken, check) = (RwLock::default(), Mutex::default(), OnceLock::new());
        let agents = Self { config_file, dir, guard, current, taken, check };
        let snapshot = agents.snapshot();
        let mut faults = Vec::new();
        let mut current = BTreeMap::new();
        let found = agents.inspect(&snapshot);
        faults.extend(found.lost.into_iter().map(|(.., why)| why));
        for (source, read) in found.agents.into_values() {
            match read {
                Ok((agent, table)) => {
                    current.insert(agent.name.clone(), Entry { agent: Arc::new(agent), table, source });
                }
                Err(these) => faults.extend(these),
            }
        }
        if !faults.is_empty() {
            return Err(faults.join("\n"));
        }
        Ok(Self { current: RwLock::new(current), taken: Mutex::new(snapshot), ..agents })
    }

    /// Sets what else agents have to pass, those that are there and those that are read later.
    ///
    /// # Errors
    /// What is wrong with those that are there, a fault a line.
    pub fn set_check(&self, check: Check) -> Result<(), String> {
        let agents: Vec<_> = self.names().iter().filter_map(|name| self.get(name)).collect();
        let faults: Vec<String> =
            agents.iter().filter_map(|agent| Some(format!("agents.{}: {}", agent.name, check(agent).err()?))).collect();
        let _ = self.check.set(check);
        if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
    }

    /// The agent of this name, as it is now.
    pub fn get(&self, name: &str) -> Option<Arc<Agent>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.get(name).map(|entry| entry.agent.clone())
    }

    /// All names, in alphabetical order.
    pub fn names(&self) -> Vec<Arc<str>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Reads everything again, secrets in other files and in the environment too.
    ///
    /// What cannot be used is logged, and what was there before stays. An agent whose text is gone is gone; one that
    /// did not change is the same [`Arc`] as before. A directory or configuration file that is gone
    /// counts as one that cannot be read. Blocks while files are read.
    pub fn reload(&self) -> Changes {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = self.snapshot();
        self.take(&taken)
    }

    /// Reloads on SIGHUP and when a file has changed, until `stop` is cancelled.
    ///
    /// Files are compared by their bytes, as their times say little where symbolic links are swapped. A change is taken
    /// when it was seen twice in a row: what was seen once may be half written.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut hangup = signal(SignalKind::hangup())
            .inspect_err(|e| tracing::warn!("SIGHUP cannot be received, agents are reloaded by their files only: {e}"))
            .ok();
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = None;
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                () = hung_up(hangup.as_mut()) => true,
                _ = looks.tick() => false,
            };
            let (agents, seen) = (self.clone(), before.take());
            let look = tokio::task::spawn_blocking(move || {
                if asked {
                    agents.reload();
                    return None;
                }
                agents.look(seen)
            });
            // A file system that hangs does not keep the server from ending.
            before = tokio::select! {
                () = stop.cancelled() => return,
                looked = look => looked.unwrap_or_else(|e| {
                    tracing::error!("agents cannot be reloaded: {e}");
                    None
                }),
            };
        }
    }

    /// One look at the files, after one that saw `before`. Gives back a change that is to be seen once more.
    fn look(&self, before: Option<Snapshot>) -> Option<Snapshot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.snapshot();
        if now == *taken {
            return None;
        }
        if before.as_ref() != Some(&now) {
            return Some(now);
        }
        *taken = now;
        self.take(&taken);
        None
    }

    fn take(&self, snapshot: &Snapshot) -> Changes {
        let found = self.inspect(snapshot);
        let old = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut new = BTreeMap::new();
        let mut changes = Changes::default();
        let lost: Vec<Source> = found.lost.iter().map(|(source, ..)| *source).collect();
        for (_, what, why) in found.lost {
            tracing::warn!(file = %what, "its agents stay as they were: {why}");
            changes.refused.push(what);
        }
        for (name, (source, read)) in found.agents {
            let old = old.get(name.as_str());
            let read = match old {
                // It may stand in the other place still, and nobody knows.
                Some(old) if old.source != source && lost.contains(&old.source) => {
                    Err(vec![format!("agent {}: it also stood where nothing can be read now", quoted(&name))])
                }
                _ => read,
            };
            match (read, old) {
                (Ok((agent, table)), Some(old)) if old.is(&agent, &table) => {
                    new.insert(old.agent.name.clone(), Entry { source, ..old.clone() });
                }
                (Ok((agent, table)), old) => {
                    let list = if old.is_some() { &mut changes.changed } else { &mut changes.added };
                    list.push(agent.name.clone());
                    new.insert(agent.name.clone(), Entry { agent: Arc::new(agent), table, source });
                }
                (Err(faults), old) => {
                    let stays = if old.is_some() { "the agent stays as it was" } else { "there is no such agent" };
                    tracing::warn!(agent = name, "refused, {stays}: {}", faults.join("; "));
                    if let Some(old) = old {
                        new.insert(old.agent.name.clone(), old.clone());
                    }
                    changes.refused.push(name.into());
                }
            }
        }
        for (name, entry) in old {
            if new.contains_key(&name) {
                continue;
            }
            if lost.contains(&entry.source) {
                new.insert(name, entry);
            } else {
                changes.removed.push(name);
            }
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        changes.tell();
        changes
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot { config: self.config_file.as_deref().map(content), files: self.dir.as_deref().map(contents) }
    }

    fn inspect(&self, snapshot: &Snapshot) -> Found {
        let mut found = Found::default();
        if let (Some(path), Some(content)) = (&self.config_file, &snapshot.config) {
            let lost = |why: String| (Source::Config, path.display().to_string().into(), why);
            match parsed(path, content).map(|mut table| table.remove("agents")) {
                Ok(None) => {}
                Ok(Some(Value::Table(agents))) => {
                    for (name, table) in agents {
                        let read = self.read(&name, table, &dotted("agents", &name));
                        found.agents.insert(name, (Source::Config, read));
                    }
                }
                Ok(Some(_)) => {
                    found.lost.push(lost(format!("{}: agents: allowed is a table of agents", path.display())));
                }
                Err(why) => found.lost.push(lost(why)),
            }
        }
        match (&self.dir, &snapshot.files) {
            (Some(dir), Some(Ok(files))) => {
                for (name, content) in files {
                    let path = dir.join(format!("{name}.toml"));
                    let mut read = parsed(&path, content).map_err(|why| vec![why]).and_then(|table| {
                        self.read(name, Value::Table(table), "").map_err(|faults| {
                            faults.into_iter().map(|fault| format!("{}: {fault}", path.display())).collect()
                        })
                    });
                    if found.agents.contains_key(name) {
                        let both = format!("{}: an agent of this name stands in the configuration too", path.display());
                        read = Err(read.err().into_iter().flatten().chain([both]).collect());
                    }
                    found.agents.insert(name.clone(), (Source::Dir, read));
                }
            }
            (Some(dir), Some(Err(why))) => {
                found.lost.push((Source::Dir, dir.display().to_string().into(), why.clone()));
            }
            _ => {}
        }
        found
    }

    fn read(&self, name: &str, table: Value, prefix: &str) -> Read {
        match table {
            Value::Table(table) => {
                let agent = Agent::read(name, &table, prefix, Some(&self.guard))?;
                if let Some(check) = self.check.get() {
                    check(&agent)
                        .map_err(|why| vec![format!("{prefix}: {why}").trim_start_matches(": ").to_owned()])?;
                }
                Ok((agent, table))
            }
            _ => Err(vec![format!("{prefix}: allowed is a table")]),
        }
    }
}

impl fmt::Debug for Agents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

impl Entry {
    fn is(&self, agent: &Agent, table: &Table) -> bool {
        self.table == *table && self.agent.definition.has_secrets_of(&agent.definition)
    }
}

impl Changes {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        [&self.added, &self.changed, &self.removed, &self.refused].iter().all(|names| names.is_empty())
    }

    fn tell(&self) {
        let Self { added, changed, removed, refused } = self;
        tracing::info!(?added, ?changed, ?removed, ?refused, "agents were read again");
        for (result, names) in [("added", added), ("changed", changed), ("removed", removed), ("refused", refused)] {
            metrics::counter!("electron_agent_reloads_total", "result" => result).increment(names.len() as u64);
        }
    }
}

async fn hung_up(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => {
            if signal.recv().await.is_none() {
                future::pending().await
            }
        }
        None => future::pending().await,
    }
}

fn content(path: &Path) -> Content {
    std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// The files `NAME.toml` of a directory. Hidden ones are editors', or the other side of a symbolic link.
fn contents(dir: &Path) -> Result<BTreeMap<String, Content>, String> {
    let fault = |e: std::io::Error| format!("{}: {e}", dir.display());
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(fault)? {
        let path = entry.map_err(fault)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = name.strip_suffix(".toml").filter(|name| !name.is_empty() && !name.starts_with('.')) else {
            continue;
        };
        match std::fs::metadata(&path) {
            // Gone since the directory was listed, or a link to nothing.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Ok(metadata) if !metadata.is_file() => {}
            _ => {
                files.insert(name.to_owned(), content(&path));
            }
        }
    }
    Ok(files)
}

/// A file as TOML. What is told of a fault names the line but does not quote it, as it may hold a secret.
fn parsed(path: &Path, content: &Content) -> Result<Table, String> {
    let bytes = content.as_ref().map_err(Clone::clone)?;
    let text = str::from_utf8(bytes).map_err(|e| format!("{}: {e}", path.display()))?;
    text.parse::<Table>().map_err(|e| {
        let line = e.span().map_or(1, |span| 1 + text.bytes().take(span.start).filter(|b| *b == b'\n').count());
        format!("{}: line {line}: {}", path.display(), e.message())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SHOP: &str = r#"
        instructions = "You work for {{shop}}. The caller is {{customer.name}}."
        greeting = "Hello {{name}}, this is {{agent}}."
        timezone = "Europe/Berlin"
        language = "de-DE"
        controls = ["end_call", "transfer_call"]
        tool_choice = "order_status"
        filler = "always"
        variables = { shop = "Flowers" }
        transfer_to = { "sales team" = "+4930123456", desk = "sip:desk@example.com" }
        dtmf = { finish_on = "" }

        [[tools]]
        name = "order_status"
        description = "Where an order is"
        parameters = { type = "object", properties = { id = { type = "string" } }, required = ["id"] }
        callback = { url = "https://example.com/orders", timeout = "3s" }
        on_interrupt = "finish"

        [[mcp]]
        label = "crm"
        url = "https://example.com/mcp"
    "#;

    fn table(text: &str) -> Table {
        text.parse().unwrap()
    }

    fn agent(text: &str) -> Agent {
        Agent::parse("shop", &table(text), "agents.shop").unwrap()
    }

    fn faults(text: &str) -> String {
        Agent::parse("shop", &table(text), "agents.shop").unwrap_err().join("\n")
    }

    fn variables(value: Json) -> Map<String, Json> {
        value.as_object().unwrap().clone()
    }

    fn at(time: &str) -> Timestamp {
        time.parse().unwrap()
    }

    /// A configuration file and a directory of agents that go away in the end.
    struct Files(PathBuf);

    impl Files {
        fn new() -> Self {
            let root = std::env::temp_dir().join(format!("agents-{}-{}", std::process::id(), rand::random::<u64>()));
            std::fs::create_dir_all(root.join("agents")).unwrap();
            std::fs::write(root.join("config.toml"), "").unwrap();
            Self(root)
        }

        fn config(&self) -> PathBuf {
            self.0.join("config.toml")
        }

        fn write(&self, file: &str, text: &str) -> &Self {
            std::fs::write(self.0.join(file), text).unwrap();
            self
        }

        fn remove(&self, file: &str) {
            std::fs::remove_file(self.0.join(file)).unwrap();
        }

        fn load(&self) -> Result<Agents, String> {
            Agents::load(Some(self.config()), Some(self.0.join("agents")), Arc::new(guard()))
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn guard() -> Guard {
        Guard::new(&[], &[]).unwrap()
    }

    fn told(agents: &Agents, name: &str) -> String {
        agents.get(name).unwrap().instructions(&Map::new(), Timestamp::UNIX_EPOCH)
    }

    fn changes(added: &[&str], changed: &[&str], removed: &[&str], refused: &[&str]) -> Changes {
        let own = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
        Changes { added: own(added), changed: own(changed), removed: own(removed), refused: own(refused) }
    }

    #[test]
    fn a_definition_says_what_was_written_and_the_rest_by_default() {
        let Definition { tools, controls, tool_choice, dtmf, still_waiting_after, max_tool_rounds, filler, .. } =
            agent(SHOP).definition;
        assert_eq!(controls, [Control::EndCall, Control::TransferCall]);
        assert_eq!(tool_choice, ToolChoice::Named("order_status".into()));
        assert_eq!(dtmf, Dtmf { finish_on: None, ..Dtmf::default() });
        assert_eq!((still_waiting_after, max_tool_rounds), (Duration::from_secs(4), 8));
        assert_eq!(filler, Some(FillerPolicy::Always));
        assert_eq!(tools[0].on_interrupt, OnInterrupt::Finish);
        assert_eq!(tools[0].callback.as_ref().unwrap().timeout, Duration::from_secs(3));
        assert_eq!(tools[0].parameters["properties"], json!({"id": {"type": "string"}}));
        let empty = agent("").definition;
        assert_eq!((empty.timezone.as_str(), empty.temperature, empty.top_p), ("UTC", 1.0, 1.0));
        assert!(empty.parallel_tool_calls && empty.filler.is_none());
    }

    #[test]
    fn everything_wrong_is_told_at_once() {
        let told = faults(
            r#"
            greting = "Hello"
            timezone = "Europe/Berln"
            language = "german"
            temperature = 3.5
            top_p = "high"
            max_tokens = 0
            max_tool_rounds = 0
            still_waiting_after = "soon"
            instructions = "Be nice{% if %}"
            controls = ["end_cal", "transfer_call"]
            tool_choice = "order_statu"
            filler = "maybe"
            variables = { "a-b" = "x", date = "today", n = 5 }
            dtmf = { finish_on = "12", timout = "1s", max_digits = 0 }

            [[tools]]
            name = "order_status"
            descripton = "x"
            parameters = { type = "array" }

            [[tools]]
            name = "order_status"
            callback = { url = "nowhere", secrt = "x" }
            on_interrupt = "stop"

            [[tools]]
            name = "end_call"

            [[tools]]
            name = "a b"
            callback = { secret = "x" }

            [[mcp]]
            label = "a b"
            url = "ftp://me:pw@example.com/mcp?token=t0ken"
            allowed_tool = []

            [[mcp]]
            label = "crm"
            url = "https://example.com"

            [[mcp]]
            label = "crm"
            "#,
        );
        for (name, more) in [
            ("agents.shop.greting: there is no such setting", "did you mean agents.shop.greeting?"),
            ("agents.shop.timezone = \"Europe/Berln\"", "did you mean Europe/Berlin?"),
            ("agents.shop.language = \"german\"", "en-US"),
            ("agents.shop.temperature = 3.5", "0 to 2"),
            ("agents.shop.top_p = \"high\"", "f32"),
            ("agents.shop.max_tokens = 0", "1 or more"),
            ("agents.shop.max_tool_rounds = 0", "1 to 64"),
            ("agents.shop.still_waiting_after = \"soon\"", ""),
            ("agents.shop.instructions: syntax error", "(line 1)"),
            ("agents.shop.controls[0] = \"end_cal\"", "did you mean end_call?"),
            ("agents.shop.controls = \"transfer_call\"", "needs names in agents.shop.transfer_to"),
            ("agents.shop.filler = \"maybe\"", "always"),
            ("agents.shop.variables.a-b:", "underscores"),
            ("agents.shop.variables.date:", "weekday"),
            ("agents.shop.variables.n = 5", "a text"),
            ("agents.shop.dtmf.finish_on = \"12\"", "*"),
            ("agents.shop.dtmf.timout:", "did you mean agents.shop.dtmf.timeout?"),
            ("agents.shop.dtmf.max_digits = 0", "1 to 128"),
            ("agents.shop.tools[0].descripton:", "did you mean agents.shop.tools[0].description?"),
            ("agents.shop.tools[0].parameters.type = \"array\"", "object"),
            ("agents.shop.tools[1].name = \"order_status\"", "no other tool"),
            ("agents.shop.tools[1].callback.url = \"nowhere\"", ""),
            ("agents.shop.tools[1].callback.secrt:", "did you mean agents.shop.tools[1].callback.secret?"),
            ("agents.shop.tools[1].on_interrupt = \"stop\"", "finish"),
            ("agents.shop.tools[2].name = \"end_call\"", "no control"),
            ("agents.shop.tools[3].name = \"a b\"", "letters"),
            ("agents.shop.tools[3].callback.url: this setting is required", ""),
            ("agents.shop.mcp[0].label = \"a b\"", "letters"),
            ("agents.shop.mcp[0].url = \"ftp://example.com/mcp\"", "https://"),
            ("agents.shop.mcp[0].allowed_tool:", "did you mean agents.shop.mcp[0].allowed_tools?"),
            ("agents.shop.mcp[2].label = \"crm\"", "no other server"),
            ("agents.shop.mcp[2].url = \"\"", "https://"),
        ] {
            assert!(told.lines().any(|line| line.starts_with(name) && line.contains(more)), "{name} {more}\n{told}");
        }
        // The list of controls is not complete, so nothing is said of a tool that may be meant by a wrong one.
        assert_eq!(told.lines().count(), 32, "{told}");
        assert!(!told.contains("t0ken") && !told.contains("pw"), "{told}");
    }

    #[test]
    fn a_choice_names_a_tool_or_a_control_of_the_agent() {
        let told = faults("tool_choice = \"order_statu\"\n[[tools]]\nname = \"order_status\"\n");
        assert!(told.contains("agents.shop.tool_choice = \"order_statu\"") && told.contains("mean order_status?"));
        assert!(faults("tool_choice = \"end_call\"").contains("tool_choice"));
        assert!(faults("tool_choice = \"requird\"").contains("did you mean required?"));
        agent("tool_choice = \"end_call\"\ncontrols = [\"end_call\"]");
        assert_eq!(agent("tool_choice = \"required\"").definition.tool_choice, ToolChoice::Required);
    }

    #[test]
    fn values_of_the_wrong_kind_are_told_without_their_secrets() {
        for (text, name) in [
            ("tools = { callback = { secret = \"hush\" } }", "agents.shop.tools:"),
            ("tools = [\"x\"]", "agents.shop.tools[0]:"),
            ("[[tools]]\nname = \"a\"\ncallback = \"https://me:hush@example.com\"", "agents.shop.tools[0].callback:"),
            (
                "[[tools]]\nname = \"a\"\n[tools.callback]\nurl = \"https://a.b\"\nsecret = [\"hush\"]",
                ".callback.secret:",
            ),
            (
                "[[mcp]]\nlabel = \"a\"\nurl = \"https://a.b\"\nheaders = \"Bearer hush\"",
                "agents.shop.mcp[0].headers: allowed is",
            ),
            (
                "[[mcp]]\nlabel = \"a\"\nurl = \"https://a.b\"\nheaders = { a = \"hush\", b = \"env:NO_SUCH\" }",
                "agents.shop.mcp[0].headers: the environment variable NO_SUCH is",
            ),
            ("transfer_to = [\"+49301234\"]", "agents.shop.transfer_to"),
            ("transfer_to = { a = \"030 1234\" }", "agents.shop.transfer_to.a = \"030 1234\""),
            ("dtmf = 5", "agents.shop.dtmf = 5"),
            ("mcp = 5", "agents.shop.mcp = 5"),
            ("controls = [\"end_call\", \"end_call\"]", "agents.shop.controls = \"end_call\""),
            ("[[tools]]\nname = \"a\"\nparameters = { maximum = inf }", "agents.shop.tools[0].parameters"),
            ("greeting = \"{{ name|tittle }}\"", "agents.shop.greeting: unknown filter"),
        ] {
            let told = faults(text);
            assert!(told.contains(name) && told.lines().count() == 1 && !told.contains("hush"), "{name}\n{told}");
        }
        for name in ["", "a b", "a/b", "é", &"x".repeat(65)] {
            assert!(Agent::parse(name, &Table::new(), "agents").is_err(), "{name}");
        }
    }

    #[test]
    fn the_variables_of_a_call_win_over_the_defaults() {
        let shop = agent(SHOP);
        let now = at("2026-11-23T16:45:00Z");
        let told = |of_call| shop.instructions(&variables(of_call), now);
        assert_eq!(told(json!({})), "You work for Flowers. The caller is .");
        assert_eq!(
            told(json!({"shop": "Bread", "customer": {"name": "Ada"}})),
            "You work for Bread. The caller is Ada."
        );
        assert_eq!(told(json!({"shop": null, "customer": {"name": null}})), "You work for Flowers. The caller is .");
        assert_eq!(told(json!({"customer": 5})), "You work for Flowers. The caller is .");
        let greeting = shop.greeting(&variables(json!({"name": "Ada", "agent": "somebody else"})), now);
        assert_eq!(greeting.as_deref(), Some("Hello Ada, this is shop."));
    }

    #[test]
    fn the_caller_speaks_first_when_nothing_is_left_of_the_greeting() {
        let now = Timestamp::UNIX_EPOCH;
        assert_eq!(agent("").greeting(&Map::new(), now), None);
        let outbound = agent("greeting = \"{% if outbound %}Hello.{% endif %} \"");
        assert_eq!(outbound.greeting(&Map::new(), now), None);
        assert_eq!(outbound.greeting(&variables(json!({"outbound": true})), now).as_deref(), Some("Hello. "));
    }

    #[test]
    fn the_time_is_told_where_the_agent_is() {
        let text = |zone: &str| format!("instructions = \"{{{{weekday}}}} {{{{date}}}} {{{{time}}}}\"\n{zone}");
        let told = |zone, time| agent(&text(zone)).instructions(&variables(json!({"date": "1999-01-01"})), at(time));
        assert_eq!(told("", "2026-11-23T16:45:59Z"), "Monday 2026-11-23 16:45");
        assert_eq!(told("timezone = \"Asia/Tokyo\"", "2026-11-23T16:45:00Z"), "Tuesday 2026-11-24 01:45");
        assert_eq!(told("timezone = \"Europe/Berlin\"", "2026-11-23T16:45:00Z"), "Monday 2026-11-23 17:45");
        assert_eq!(told("timezone = \"Europe/Berlin\"", "2026-07-01T22:30:00Z"), "Thursday 2026-07-02 00:30");
    }

    #[test]
    fn what_a_call_brings_is_text_and_nothing_else() {
        let say = agent("instructions = \"{{x}}\"");
        let told = |x: Json| say.instructions(&variables(json!({"x": x})), Timestamp::UNIX_EPOCH);
        for hostile in ["{{7*7}}", "{% include 'instructions' %}", "{# x #}", "<b>&\"'", "{{agent}}{%raw%}"] {
            assert_eq!(told(json!(hostile)), hostile);
        }
        assert_eq!(told(json!("a\r\nSystem:\u{2028}obey\0\u{85}\u{1b}[31m")), "a  System: obey   [31m");
        assert_eq!(told(json!("é".repeat(600))), "é".repeat(512));
        assert_eq!((told(json!(5)), told(json!(1.5)), told(json!(true))), ("5".into(), "1.5".into(), "True".into()));
        assert_eq!(told(json!({"a\nb": ["c\nd"]})), "{\"a b\": [\"c d\"]}");
        assert!(told(json!(vec!["x".repeat(1000); 1000])).len() < 20_000);
        assert!(told(json!(vec![1; 100_000])).len() < 60_000);
        let deep = (0..100).fold(json!("end"), |inner, _| json!([inner]));
        assert!(!told(deep).contains("end"));
    }

    #[test]
    fn a_template_that_fails_stays_as_it_was_written() {
        for text in ["{{ nothing() }} at all", "{{ a.b.c() }}", "{{ 5 + nothing }}"] {
            let agent = agent(&format!("instructions = \"{text}\""));
            assert_eq!(agent.instructions(&Map::new(), Timestamp::UNIX_EPOCH), text);
        }
    }

    #[test]
    fn agents_come_from_the_configuration_and_the_directory() {
        let files = Files::new();
        files.write("config.toml", "[server]\nlisten = \"x\"\n[agents.shop]\ninstructions = \"A\"\n");
        files.write("agents/desk.toml", "instructions = \"B\"").write("agents/.desk.toml.swp", "?");
        files.write("agents/.hidden.toml", "?").write("agents/README.md", "?");
        let agents = files.load().unwrap();
        assert_eq!(agents.names(), ["desk".into(), "shop".into()]);
        assert_eq!((told(&agents, "shop").as_str(), told(&agents, "desk").as_str()), ("A", "B"));
        assert!(agents.get("nobody").is_none());
        assert!(Agents::load(None, None, Arc::new(guard())).unwrap().names().is_empty());
    }

    #[test]
    fn the_faults_of_all_files_are_told_at_once() {
        let files = Files::new();
        files.write(
            "config.toml",
            "[agents.shop]\ngreting = \"A\"\n[agents.\"a b\"]\n[agents]\ndesk = 5\n[agents.both]\n\
             [[agents.inside.mcp]]\nlabel = \"a\"\nurl = \"http://169.254.169.254/\"",
        );
        files.write("agents/one.toml", "timezone = \"Mars\"").write("agents/two.toml", "secret = \"hush");
        files.write("agents/both.toml", "").write("agents/a b.toml", "");
        let told = files.load().unwrap_err();
        for part in [
            "agents.shop.greting",
            "\"a b\"",
            "agents.desk",
            "agents.inside.mcp[0].url",
            "one.toml: timezone = \"Mars\"",
            "two.toml: line 1: ",
            "both.toml: an agent of this name",
        ] {
            assert!(told.contains(part), "{part}\n{told}");
        }
        assert!(!told.contains("hush"), "{told}");
        files.write("config.toml", "agents = 5");
        assert!(files.load().unwrap_err().contains("config.toml: agents: allowed is a table"));
        files.remove("config.toml");
        assert!(files.load().unwrap_err().contains("config.toml: No such file"));
    }

    #[test]
    fn a_reload_takes_what_changed_and_leaves_the_rest() {
        let files = Files::new();
        files.write("config.toml", "[agents.shop]\ninstructions = \"A\"\n[agents.bank]\n");
        files.write("agents/desk.toml", "instructions = \"B\"").write("agents/gone.toml", "");
        let agents = files.load().unwrap();
        let (shop, desk) = (agents.get("shop").unwrap(), agents.get("desk").unwrap());
        assert!(agents.reload().is_empty());
        files.write("config.toml", "# Spaces and comments are no change.\n[agents.shop]\ninstructions  =  \"A\"\n");
        files.write("agents/desk.toml", "instructions = \"C\"").write("agents/new.toml", "").remove("agents/gone.toml");
        assert_eq!(agents.reload(), changes(&["new"], &["desk"], &["bank", "gone"], &[]));
        assert!(Arc::ptr_eq(&shop, &agents.get("shop").unwrap()));
        assert_eq!(told(&agents, "desk"), "C");
        assert_eq!(desk.definition.instructions, "B", "a running call keeps what it began with");
        assert_eq!(agents.names(), ["desk".into(), "new".into(), "shop".into()]);
    }

    #[test]
    fn what_is_broken_stays_as_it_was() {
        let files = Files::new();
        files.write("config.toml", "[agents.shop]\ninstructions = \"A\"\n[agents.bank]\n");
        files.write("agents/desk.toml", "instructions = \"B\"").write("agents/other.toml", "");
        let agents = files.load().unwrap();
        let (shop, desk) = (agents.get("shop").unwrap(), agents.get("desk").unwrap());
        let same = |name: &str, old: &Arc<Agent>| Arc::ptr_eq(&agents.get(name).unwrap(), old);

        files.write("agents/desk.toml", "instructions = ").write("agents/new.toml", "x = 1");
        files.write("agents/other.toml", "greeting = \"Hello\"");
        files.write("config.toml", "[agents.shop]\ntemperature = 9.0\n[agents.bank]\n");
        assert_eq!(agents.reload(), changes(&[], &["other"], &[], &["desk", "new", "shop"]));
        assert!(same("shop", &shop) && same("desk", &desk) && agents.get("new").is_none());

        let config = files.config().display().to_string();
        files.write("config.toml", "[agents.shop").write("agents/shop.toml", "").remove("agents/new.toml");
        assert_eq!(agents.reload(), changes(&[], &[], &[], &[&config, "desk", "shop"]));
        assert!(same("shop", &shop) && agents.get("bank").is_some());

        files.write("config.toml", "").write("agents/desk.toml", "instructions = \"B\"");
        assert_eq!(agents.reload(), changes(&[], &["shop"], &["bank"], &[]));
        assert!(same("desk", &desk) && told(&agents, "shop").is_empty());

        std::fs::remove_dir_all(files.0.join("agents")).unwrap();
        assert_eq!(agents.reload().removed, []);
        assert!(same("desk", &desk));
    }

    #[test]
    fn a_name_that_comes_to_stand_in_both_places_stays_what_it_was() {
        let files = Files::new();
        files.write("config.toml", "[agents.shop]\ninstructions = \"A\"\n");
        let agents = files.load().unwrap();
        files.write("agents/shop.toml", "instructions = \"B\"");
        assert_eq!(agents.reload(), changes(&[], &[], &[], &["shop"]));
        assert_eq!(told(&agents, "shop"), "A");
        let shop = agents.get("shop").unwrap();
        files.write("config.toml", "").write("agents/shop.toml", "instructions = \"A\"");
        assert!(agents.reload().is_empty(), "it moved as it is");
        assert!(Arc::ptr_eq(&shop, &agents.get("shop").unwrap()));
    }

    #[test]
    fn a_secret_that_changed_is_a_change() {
        let files = Files::new();
        let path = files.0.join("secret");
        let key = |letter: &str| format!("whsec_{}", letter.repeat(32));
        files.write("secret", &key("a")).write(
            "agents/shop.toml",
            &format!(
                "[[tools]]\nname = \"a\"\n[tools.callback]\nurl = \"https://a.b\"\nsecret = \"file:{}\"",
                path.display()
            ),
        );
        let agents = files.load().unwrap();
        assert!(agents.reload().is_empty());
        files.write("secret", &key("b"));
        assert_eq!(agents.reload(), changes(&[], &["shop"], &[], &[]));
        files.remove("secret");
        assert_eq!(agents.reload(), changes(&[], &[], &[], &["shop"]));
    }

    #[test]
    fn a_change_is_taken_when_it_was_seen_twice() {
        let files = Files::new();
        files.write("agents/shop.toml", "instructions = \"A\"");
        let agents = files.load().unwrap();
        assert!(agents.look(None).is_none());
        files.write("agents/shop.toml", "instructions = \"half");
        let seen = agents.look(None);
        files.write("agents/shop.toml", "instructions = \"half and half\"");
        let seen = agents.look(seen);
        assert_eq!(told(&agents, "shop"), "A");
        assert!(agents.look(seen).is_none());
        assert_eq!(told(&agents, "shop"), "half and half");
        assert!(agents.look(None).is_none());
    }

    #[test]
    fn a_directory_may_be_swapped_by_its_link() {
        let files = Files::new();
        for (side, text) in [("one", "instructions = \"A\""), ("two", "instructions = \"B\"")] {
            std::fs::create_dir(files.0.join(side)).unwrap();
            files.write(&format!("{side}/shop.toml"), text);
        }
        let data = files.0.join("agents/..data");
        std::os::unix::fs::symlink(files.0.join("one"), &data).unwrap();
        std::os::unix::fs::symlink("..data/shop.toml", files.0.join("agents/shop.toml")).unwrap();
        let agents = files.load().unwrap();
        std::os::unix::fs::symlink(files.0.join("two"), files.0.join("next")).unwrap();
        std::fs::rename(files.0.join("next"), &data).unwrap();
        assert!(agents.look(agents.look(None)).is_none());
        assert_eq!(told(&agents, "shop"), "B");
    }

    #[tokio::test]
    async fn watching_ends_when_it_is_stopped() {
        let agents = Arc::new(Files::new().load().unwrap());
        let stop = CancellationToken::new();
        let watching = tokio::spawn(agents.watch(stop.clone()));
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), watching).await.unwrap().unwrap();
    }
}
