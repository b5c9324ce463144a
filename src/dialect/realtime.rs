//! OpenAI's Realtime API, its text side: a session on a WebSocket.
//!
//! Served under `/v1/realtime`. Speech-to-text and text-to-speech are the client's; audio is refused with an error that
//! says so. Beyond the hosted service:
//!
//! - `?session_id=` goes on with a session whose connection dropped, within `session.resume_window`. With
//!   `&last_event_id=` everything after that event is sent again, without it what was never sent.
//! - `input_transcript.partial` with `text` tells what the caller said so far. The model reads it while they speak.
//! - `conversation.item.truncate` takes `text`, the words that were heard; from `audio_end_ms` they are estimated.
//! - `response.cancel` takes `heard`, the words that were heard of the response.
//! - When old exchanges make room, a `conversation.trimmed` event names them.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    Access,
    fields::{Faults, Fields, kind},
    items, renamed,
    responses::{metadata, shorten, tidy},
    socket::{Flow, Frames, Protocol, TAKEN_OVER},
};
use crate::{
    error::{Error, Fault, PathPart},
    session::{
        Action, Attached, Content, Delivery, Event, Handle, Heard, History, Id, Item, OnLeave, Outcome, Outlet, Place,
        Respond, Response, Run, RunState, Sessions, Settings, Spoken, Status, history::Bounds, new_id, response::At,
    },
    tool::guard::Guard,
    turn::{Model, ToolChoice},
};

/// Events on their way from the session to the connection.
const DELIVERIES: usize = 32;
/// Longest id of a client's event that an error repeats.
const LONGEST_EVENT_ID: usize = 512;
/// Most items of a response's own input.
const MOST_INPUT: usize = 1_000;

/// The fields of a session that are served, those with which our own go beyond the hosted service last.
const SETTINGS: [&str; 13] = [
    "type",
    "model",
    "instructions",
    "tools",
    "tool_choice",
    "output_modalities",
    "max_output_tokens",
    "parallel_tool_calls",
    "truncation",
    "metadata",
    "temperature",
    "top_p",
    "seed",
];
/// Fields that a response has besides.
const OF_RESPONSE: [&str; 2] = ["conversation", "input"];
/// Fields that are known and may be given, if they say nothing.
const EMPTY: [&str; 4] = ["include", "prompt", "reasoning", "tracing"];

// === parse ===

/// Reads the settings of a session: those given replace those that are in force.
///
/// # Errors
/// [`Error::Invalid`] with everything that is wrong; then nothing applies.
pub fn settings(value: &Value, in_force: &Settings, guard: &Guard, path: &'static str) -> Result<Settings, Error> {
    let mut faults = Faults::default();
    let Some(fields) = Fields::of(value, vec![path.into()], &mut faults) else {
        return Err(faults.into_error());
    };
    let read = read_settings(&fields, in_force, guard, &[], &mut faults);
    faults.or(read)
}

fn read_settings(
    fields: &Fields<'_>,
    in_force: &Settings,
    guard: &Guard,
    more: &[&str],
    faults: &mut Faults,
) -> Settings {
    let mut settings = in_force.clone();
    for name in fields.names() {
        let known = |names: &[&str]| names.contains(&name);
        if known(&SETTINGS) || known(more) || (known(&EMPTY) && fields.is_empty(name)) {
            continue;
        }
        let why = match name {
            "audio" | "input_audio_format" | "output_audio_format" | "voice" | "turn_detection" => {
                "audio is not served here: the client does speech-to-text and text-to-speech".to_owned()
            }
            _ => format!("`{}` is not supported here; there are {}", shorten(name), SETTINGS.join(", ")),
        };
        faults.add(fields.at_any(name), why);
    }
    if let Some(other) = fields.text("type", faults).filter(|kind| *kind != "realtime") {
        faults.add(fields.at("type"), format!("type has to be realtime, not `{other}`"));
    }
    if let Some(other) = fields.text("model", faults).filter(|model| **model != *in_force.model) {
        faults.add(fields.at("model"), format!("the model of a session cannot be changed to `{other}`"));
    }
    if let Some(text) = fields.text("instructions", faults) {
        settings.instructions = text.into();
    }
    if let Some((tools, kit)) = items::tools(fields, guard, faults) {
        (settings.tools, settings.kit) = (tools.into(), kit.into());
    }
    if let Some(choice) = items::tool_choice(fields, &settings, faults) {
        settings.tool_choice = choice;
    } else if let ToolChoice::Named(name) = &settings.tool_choice
        && !settings.may_know(name)
    {
        // The tool that had to be called is gone.
        settings.tool_choice = ToolChoice::Auto;
    }
    if !settings.has_tools() && settings.tool_choice == ToolChoice::Required {
        settings.tool_choice = ToolChoice::Auto;
    }
    for (i, modality) in fields.list("output_modalities", faults).unwrap_or_default().iter().enumerate() {
        if modality != "text" {
            let at = fields.at("output_modalities").into_iter().chain([i.into()]).collect();
            faults.add(at, "audio is not served here: output_modalities has to be [\"text\"]");
        }
    }
    match fields.get("max_output_tokens") {
        Some(Value::String(text)) if text == "inf" => settings.sampling.max_tokens = None,
        Some(_) => {
            let most = fields.whole("max_output_tokens", 1..=i64::MAX, faults);
            settings.sampling.max_tokens = most.and_then(|n| usize::try_from(n).ok());
        }
        None => {}
    }
    if let Some(parallel) = fields.flag("parallel_tool_calls", faults) {
        settings.parallel_tool_calls = parallel;
    }
    match fields.get("truncation") {
        None => {}
        Some(Value::String(text)) if text == "auto" => settings.trim = true,
        Some(Value::String(text)) if text == "disabled" => settings.trim = false,
        Some(value) if value["type"] == "retention_ratio" => settings.trim = true,
        Some(_) => faults.add(fields.at("truncation"), "truncation has to be auto, disabled or a retention_ratio"),
    }
    if fields.get("metadata").is_some() {
        settings.metadata = metadata(fields, faults);
    }
    if let Some(temperature) = fields.number("temperature", 0.0..=2.0, faults) {
        settings.sampling.temperature = temperature as f32;
    }
    if let Some(top_p) = fields.number("top_p", 0.0..=1.0, faults) {
        settings.sampling.top_p = top_p as f32;
    }
    if let Some(seed) = fields.whole("seed", i64::MIN..=i64::MAX, faults) {
        settings.sampling.seed = Some(seed as u64);
    }
    settings
}

/// An item of a response's own input: a new one, or one of the conversation.
enum Given {
    Item(Arc<Item>),
    Reference(Id),
}

fn given(value: &Value, path: Vec<PathPart>, faults: &mut Faults) -> Option<Given> {
    if value["type"] == "item_reference" {
        let fields = Fields::of(value, path, faults)?;
        return items::required_id(&fields, "id", faults).map(Given::Reference);
    }
    items::item(value, path, faults).map(Given::Item)
}

/// Where an event stands among those of its session: which of the session's events, and which part of it.
fn position(event_id: &str) -> Option<(u64, usize)> {
    let (number, part) = event_id.strip_prefix("event_")?.split_once('_')?;
    Some((u64::from_str_radix(number, 16).ok()?, usize::from_str_radix(part, 16).ok()?))
}

// === render ===

/// An event with its id.
#[derive(Serialize)]
struct Identified<'a, T: Serialize> {
    event_id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(flatten)]
    body: T,
}

#[derive(Serialize)]
struct Delta<'a> {
    response_id: &'a str,
    item_id: &'a str,
    output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    call_id: Option<&'a str>,
    delta: &'a str,
}

/// A session as the API writes it.
pub fn session_value(id: &str, settings: &Settings) -> Value {
    json!({
        "type": "realtime",
        "object": "realtime.session",
        "id": id,
        "model": settings.model,
        "output_modalities": ["text"],
        "instructions": &*settings.instructions,
        "tools": tools_value(settings),
        "tool_choice": items::tool_choice_value(&settings.tool_choice),
        "max_output_tokens": max_tokens(settings),
        "parallel_tool_calls": settings.parallel_tool_calls,
        "truncation": if settings.trim { "auto" } else { "disabled" },
        "metadata": settings.metadata,
        "temperature": tidy(settings.sampling.temperature),
        "top_p": tidy(settings.sampling.top_p),
    })
}

fn tools_value(settings: &Settings) -> Vec<Value> {
    let mut values = items::tools_value(settings);
    for map in values.iter_mut().filter_map(Value::as_object_mut) {
        map.remove("strict");
    }
    values
}

fn max_tokens(settings: &Settings) -> Value {
    settings.sampling.max_tokens.map_or_else(|| "inf".into(), Value::from)
}

/// An item as the API writes it.
pub fn item_value(item: &Item) -> Value {
    let mut value = items::item_value(item, |text| json!({"type": "output_text", "text": text}));
    value["object"] = "realtime.item".into();
    // This API has a form of its own for what became of a call.
    if let Some(Run { state: RunState::Done(answer), .. }) = item.run()
        && let Some(error) = &answer.error
    {
        value["error"] = json!({"type": "tool_execution_error", "message": error});
    }
    value
}

fn response_value(response: &Response, conversation: &str) -> Value {
    let (status, details) = match &response.outcome {
        None => ("in_progress", Value::Null),
        Some(Outcome::Completed) => ("completed", json!({"type": "completed"})),
        Some(Outcome::Length) => ("incomplete", json!({"type": "incomplete", "reason": "max_output_tokens"})),
        Some(Outcome::Cancelled) => ("cancelled", json!({"type": "cancelled", "reason": "client_cancelled"})),
        Some(Outcome::Failed(error)) => (
            "failed",
            json!({"type": "failed",
                   "error": {"type": error.kind(), "code": error.code(), "message": error.to_string()}}),
        ),
    };
    let usage = response.outcome.as_ref().map(|_| {
        let usage = response.usage;
        json!({
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "input_token_details": {
                "text_tokens": usage.prompt_tokens, "audio_tokens": 0, "image_tokens": 0,
                "cached_tokens": usage.cached_tokens,
                "cached_tokens_details": {"text_tokens": usage.cached_tokens, "audio_tokens": 0, "image_tokens": 0},
            },
            "output_token_details": {"text_tokens": usage.completion_tokens, "audio_tokens": 0},
        })
    });
    let settings = &response.settings;
    json!({
        "object": "realtime.response",
        "id": response.id,
        "status": status,
        "status_details": details,
        "output": response.output.iter().map(|item| item_value(item)).collect::<Vec<_>>(),
        "conversation_id": Some(conversation).filter(|_| response.in_conversation),
        "output_modalities": ["text"],
        "max_output_tokens": max_tokens(settings),
        "metadata": Some(&settings.metadata).filter(|metadata| !metadata.is_empty()),
        "usage": usage,
    })
}

/// What is wrong with tools that were declared for a session.
pub fn in_session(error: Error) -> Error {
    renamed(error).under(&["session".into()])
}

/// What is wrong with a turn is wrong with the `response` that asked for it.
fn of_response(error: Error) -> Error {
    match error.param().as_deref() {
        Some(param) if ["tools", "max_output_tokens", "input"].iter().any(|name| param.starts_with(name)) => {
            error.under(&["response".into()])
        }
        _ => error,
    }
}

fn error_value(event_id: &str, error: &Error, cause: Option<&str>, request_id: &str) -> Value {
    let mut value = json!({"type": "error", "event_id": event_id});
    if let Ok(Value::Object(mut body)) = serde_json::to_value(error.body(request_id)) {
        value["error"] = body.remove("error").unwrap_or_default();
        value["error"]["event_id"] = cause.into();
    }
    value
}

/// Renders the events of one session. What it makes of an event depends on that event alone, so an event that is sent
/// again is the same again.
struct Renderer<'a> {
    number: u64,
    part: usize,
    conversation: &'a str,
    session: &'a str,
    request_id: &'a str,
    out: &'a mut Frames,
}

impl Renderer<'_> {
    fn id(&mut self) -> String {
        let id = format!("event_{:x}_{:x}", self.number, self.part);
        self.part += 1;
        id
    }

    fn event(&mut self, kind: &'static str, body: impl Serialize) {
        let id = self.id();
        self.out.push(&Identified { event_id: &id, kind, body });
    }

    fn of_item(&mut self, kind: &'static str, at: &At, mut body: Value) {
        body["response_id"] = (*at.response).into();
        body["item_id"] = (*at.item).into();
        body["output_index"] = at.index.into();
        self.event(kind, body);
    }

    fn delta(&mut self, kind: &'static str, at: &At, delta: &str) {
        let call_id = at.call_id.as_deref();
        let body = Delta {
            response_id: &at.response,
            item_id: &at.item,
            output_index: at.index,
            content_index: call_id.is_none().then_some(0),
            call_id,
            delta,
        };
        self.event(kind, body);
    }

    fn render(&mut self, event: &Event) {
        match event {
            Event::Configured(settings) => {
                self.event("session.updated", json!({"session": session_value(self.session, settings)}));
            }
            Event::ItemAdded { item, previous } => {
                let body = json!({"item": item_value(item), "previous_item_id": previous});
                self.event("conversation.item.added", &body);
                self.event("conversation.item.done", &body);
            }
            Event::ItemRetrieved(item) => self.event("conversation.item.retrieved", json!({"item": item_value(item)})),
            Event::ItemRemoved(id) => self.event("conversation.item.deleted", json!({"item_id": id})),
            Event::ItemTruncated { item, audio_end_ms, .. } => {
                let text = item.spoken().unwrap_or_default();
                let body = json!({"item_id": item.id, "content_index": 0, "audio_end_ms": audio_end_ms, "text": text});
                self.event("conversation.item.truncated", body);
            }
            Event::Trimmed { response, items } => {
                self.event("conversation.trimmed", json!({"response_id": response, "item_ids": items}));
            }
            Event::Begun(response) => {
                self.event("response.created", json!({"response": response_value(response, self.conversation)}));
            }
            Event::OutputBegun { at, item } => {
                let value = item_value(item);
                let body = json!({"response_id": at.response, "output_index": at.index, "item": value});
                self.event("response.output_item.added", body);
                if at.in_conversation {
                    let body = json!({"item": value, "previous_item_id": at.previous});
                    self.event("conversation.item.added", body);
                }
                if let Content::Listing { .. } = item.content {
                    self.event("mcp_list_tools.in_progress", json!({"item_id": at.item}));
                }
                if item.spoken().is_some() {
                    let body = json!({"content_index": 0, "part": {"type": "text", "text": ""}});
                    self.of_item("response.content_part.added", at, body);
                }
            }
            Event::Text { at, delta, .. } => self.delta("response.output_text.delta", at, delta),
            Event::Arguments { at, delta } if at.runs => {
                self.delta("response.mcp_call_arguments.delta", at, delta);
            }
            Event::Arguments { at, delta } => self.delta("response.function_call_arguments.delta", at, delta),
            Event::CallRuns { at, item } => {
                if let Content::Call { arguments, .. } = &item.content {
                    self.of_item("response.mcp_call_arguments.done", at, json!({"arguments": arguments}));
                    self.event("response.mcp_call.in_progress", json!({"item_id": at.item, "output_index": at.index}));
                }
            }
            Event::Listing(item) => {
                let done = item.status == Status::Completed;
                let body = json!({"item": item_value(item), "previous_item_id": null});
                if done {
                    let kind = items::settled(item).map_or("", |kind| kind.trim_start_matches("response."));
                    self.event(kind, json!({"item_id": item.id}));
                    self.event("conversation.item.done", body);
                } else {
                    self.event("conversation.item.added", body);
                    self.event("mcp_list_tools.in_progress", json!({"item_id": item.id}));
                }
            }
            Event::CallSettled(_) | Event::Control { .. } => {}
            Event::OutputEnded { at, item } => {
                if let Content::Call { call_id, name, arguments, run: None } = &item.content {
                    let body = json!({"call_id": call_id, "name": name, "arguments": arguments});
                    self.of_item("response.function_call_arguments.done", at, body);
                } else if let Some(kind) = items::settled(item) {
                    let (of_call, kind) = match kind.strip_prefix("response.") {
                        Some(listing) if listing.starts_with("mcp_list_tools") => (false, listing),
                        _ => (true, kind),
                    };
                    let mut body = json!({"item_id": at.item});
                    if of_call {
                        body["output_index"] = at.index.into();
                    }
                    self.event(kind, body);
                } else if let Some(text) = item.spoken() {
                    self.of_item("response.output_text.done", at, json!({"content_index": 0, "text": text}));
                    let body = json!({"content_index": 0, "part": {"type": "text", "text": text}});
                    self.of_item("response.content_part.done", at, body);
                }
                let value = item_value(item);
                let body = json!({"response_id": at.response, "output_index": at.index, "item": value});
                self.event("response.output_item.done", body);
                if at.in_conversation {
                    let body = json!({"item": value, "previous_item_id": at.previous});
                    self.event("conversation.item.done", body);
                }
            }
            Event::Ended(response) => {
                self.event("response.done", json!({"response": response_value(response, self.conversation)}));
            }
            Event::Refused { cause, error } => {
                let id = self.id();
                let error = of_response(renamed(error.clone()));
                self.out.push(&error_value(&id, &error, cause.as_deref(), self.request_id));
            }
        }
    }
}

// === WebSocket ===

/// How a client wants to be connected.
pub struct Opening {
    /// The session to go on with; otherwise a new one.
    pub session_id: Option<String>,
    /// The last event that the client has seen of it.
    pub last_event_id: Option<String>,
    /// The settings of a new session.
    pub settings: Settings,
}

/// A connection to a session.
pub struct Connection {
    access: Arc<dyn Access>,
    electron: Arc<dyn Model>,
    session: Handle,
    conversation: String,
    deliveries: mpsc::Receiver<Delivery>,
    settings: Arc<Settings>,
    bounds: Bounds,
    /// The event of which the client has seen the first parts already.
    seen: Option<(u64, usize)>,
    /// Responses that are being made.
    running: usize,
    /// Sent before anything else.
    greeting: Option<Value>,
}

/// What is refused before a connection is made.
///
/// # Errors
/// [`Error::NotFound`] for a session that is gone, [`Error::Invalid`] for an event id that is none,
/// [`Error::Overloaded`] when there are too many sessions.
pub async fn connect(
    access: Arc<dyn Access>,
    sessions: &Sessions,
    opening: Opening,
    bounds: Bounds,
) -> Result<Connection, Error> {
    let electron = access.model(&opening.settings.model)?;
    let seen = match &opening.last_event_id {
        None => None,
        Some(_) if opening.session_id.is_none() => {
            return Err(Error::invalid("last_event_id", "last_event_id needs the session_id that it belongs to"));
        }
        Some(id) if !id.starts_with("event_") => {
            return Err(Error::invalid("last_event_id", format!("`{}` is no event of a session", shorten(id))));
        }
        // The greeting, and errors that are no part of the session's history, come before everything.
        Some(id) => Some(position(id).unwrap_or((1, usize::MAX))),
    };
    let (sender, deliveries) = mpsc::channel(DELIVERIES);
    let outlet = Outlet { sender, tag: 0 };
    let (session, resumed) = match &opening.session_id {
        Some(id) => (sessions.find(shorten(id), access.owner())?, true),
        None => {
            let owner = access.owner().clone();
            (sessions.open(electron.clone(), owner, "realtime", opening.settings, OnLeave::GoOn, None)?, false)
        }
    };
    let after = seen.map(|(number, _)| number.saturating_sub(1));
    let Attached { settings, gap, running, .. } = session.attach(outlet, OnLeave::GoOn, after, false).await?;
    let id = &session.about().id;
    let mut greeting = json!({
        "type": "session.created",
        "event_id": format!("event_{}", Uuid::now_v7().simple()),
        "session": session_value(id, &settings),
    });
    if resumed {
        greeting["resumed"] = true.into();
        greeting["events_lost"] = gap.into();
    }
    let conversation = id.replace("sess_", "conv_");
    let greeting = Some(greeting);
    Ok(Connection { access, electron, session, conversation, deliveries, settings, bounds, seen, running, greeting })
}

impl Connection {
    async fn act(&mut self, kind: &str, event: &Value, cause: Option<Id>) -> Result<(), Error> {
        let mut faults = Faults::default();
        let Some(fields) = Fields::of(event, Vec::new(), &mut faults) else {
            return Err(faults.into_error());
        };
        let faults_ref = &mut faults;
        let action = match kind {
            "session.update" => {
                let Some(given) = fields.get("session") else {
                    return Err(Error::invalid("session", "session is required"));
                };
                let settings = Arc::new(settings(given, &self.settings, self.access.guard(), "session")?);
                self.electron.check_tools_apart(settings.tools.clone()).await.map_err(in_session)?;
                self.settings = settings.clone();
                Some(Action::Configure(settings))
            }
            "conversation.item.create" => {
                let place = match fields.text("previous_item_id", faults_ref) {
                    None => Place::End,
                    Some("root") => Place::Start,
                    Some(id) => Place::Behind(id.into()),
                };
                match fields.get("item") {
                    Some(item) => {
                        items::item(item, vec!["item".into()], faults_ref).map(|item| Action::Add(item, place))
                    }
                    None => {
                        faults_ref.add(fields.at("item"), "item is required");
                        None
                    }
                }
            }
            "conversation.item.retrieve" => items::required_id(&fields, "item_id", faults_ref).map(Action::Retrieve),
            "conversation.item.delete" => items::required_id(&fields, "item_id", faults_ref).map(Action::Remove),
            "conversation.item.truncate" => truncate(&fields, faults_ref),
            "response.create" => self.respond(&fields, faults_ref).await?,
            "response.cancel" => {
                let id = items::id(&fields, "response_id", faults_ref);
                let heard = fields.text("heard", faults_ref).map(|text| Heard::Text(text.to_owned()));
                Some(Action::Cancel(id, heard))
            }
            "input_transcript.partial" => {
                fields.required_text("text", faults_ref).map(|text| Action::Partial(text.to_owned()))
            }
            _ if kind.starts_with("input_audio_buffer.") || kind.starts_with("output_audio_buffer.") => {
                let why = "Audio is not served here: the client does speech-to-text and text-to-speech. Send the \
                           caller's words as conversation.item.create.";
                faults_ref.add(fields.at("type"), why);
                None
            }
            other => {
                let why = format!(
                    "There is no event `{}`; there are session.update, conversation.item.create, \
                     conversation.item.retrieve, conversation.item.delete, conversation.item.truncate, response.create, \
                     response.cancel and input_transcript.partial.",
                    shorten(other)
                );
                faults_ref.add(fields.at("type"), why);
                None
            }
        };
        match faults.or(action)? {
            Some(action) => self.session.send(cause, action).await,
            None => Ok(()),
        }
    }

    async fn respond(&self, event: &Fields<'_>, faults: &mut Faults) -> Result<Option<Action>, Error> {
        let empty = Value::Object(Default::default());
        let given = event.get("response").unwrap_or(&empty);
        let Some(fields) = Fields::of(given, event.at("response"), faults) else {
            return Ok(None);
        };
        let settings = read_settings(&fields, &self.settings, self.access.guard(), &OF_RESPONSE, faults);
        let in_conversation = match fields.text("conversation", faults) {
            None | Some("auto") => true,
            Some("none") => false,
            Some(other) => {
                faults.add(fields.at("conversation"), format!("conversation has to be auto or none, not `{other}`"));
                return Ok(None);
            }
        };
        let context = match fields.list("input", faults) {
            None => None,
            Some(list) if list.len() > MOST_INPUT => {
                let count = list.len();
                faults.add(fields.at("input"), format!("input may hold up to {MOST_INPUT} items, not {count}"));
                return Ok(None);
            }
            Some(list) => {
                let path = |i: usize| fields.at("input").into_iter().chain([i.into()]).collect();
                let given: Vec<Given> =
                    list.iter().enumerate().filter_map(|(i, item)| self::given(item, path(i), faults)).collect();
                Some(self.context(given).await?)
            }
        };
        if !faults.is_empty() {
            return Ok(None);
        }
        let watch = self.access.admit(&settings.model)?;
        Ok(Some(Action::Respond(Box::new(Respond {
            id: new_id("resp"),
            settings: Arc::new(settings),
            base: None,
            input: Vec::new(),
            transcript: None,
            context,
            in_conversation,
            lasting: false,
            needs_outputs: true,
            generate: true,
            keep: false,
            store: false,
            watch,
        }))))
    }

    /// The conversation that a response is asked to read.
    async fn context(&self, given: Vec<Given>) -> Result<History, Error> {
        let known = if given.iter().any(|item| matches!(item, Given::Reference(_))) {
            self.session.describe().await?.items
        } else {
            Vec::new()
        };
        let mut items = Vec::with_capacity(given.len());
        for item in given {
            items.push(match item {
                Given::Item(item) => item,
                Given::Reference(id) => {
                    let found = known.iter().find(|item| item.id == id).cloned();
                    let missing = || Error::invalid("input", format!("there is no item `{id}`"));
                    found.ok_or_else(|| missing().under(&["response".into()]))?
                }
            });
        }
        let mut context = History::default();
        context.extend(&items, "input", self.bounds).map_err(|e| e.under(&["response".into()]))?;
        Ok(context)
    }

    fn render(&mut self, delivery: &Delivery, out: &mut Frames) {
        match &*delivery.event {
            Event::Begun(_) => self.running += 1,
            Event::Ended(_) => self.running = self.running.saturating_sub(1),
            // It may come of an earlier connection, whose last words were still on their way.
            Event::Configured(settings) => self.settings = settings.clone(),
            _ => {}
        }
        let before = out.len();
        let mut renderer = Renderer {
            number: delivery.number,
            part: 0,
            conversation: &self.conversation,
            session: &self.session.about().id,
            request_id: self.access.request_id(),
            out,
        };
        renderer.render(&delivery.event);
        if let Some((number, part)) = self.seen.take()
            && number == delivery.number
            && part != usize::MAX
        {
            out.skip(before, part + 1);
        }
    }
}

fn truncate(fields: &Fields<'_>, faults: &mut Faults) -> Option<Action> {
    let id = items::required_id(fields, "item_id", faults);
    fields.whole("content_index", 0..=0, faults);
    let heard = match fields.text("text", faults) {
        Some(text) => Some(Heard::Text(text.to_owned())),
        None => fields.whole("audio_end_ms", 0..=i64::MAX, faults).map(|ms| Heard::Milliseconds(ms as u64)),
    };
    if heard.is_none() && faults.is_empty() {
        faults.add(fields.at("text"), "text is required: the words that were heard; or audio_end_ms");
    }
    Some(Action::Truncate(Spoken::Item(id?), heard?))
}

impl Protocol for Connection {
    async fn receive(&mut self, event: Value, out: &mut Frames) -> Flow {
        let cause = event.get("event_id").and_then(Value::as_str).filter(|id| id.len() <= LONGEST_EVENT_ID);
        let cause: Option<Id> = cause.map(Into::into);
        let done = match event.get("type") {
            Some(Value::String(kind)) => self.act(kind, &event, cause.clone()).await,
            Some(other) => Err(Error::invalid("type", format!("type has to be a string, not {}", self::kind(other)))),
            None if event.is_object() => Err(Error::invalid("type", "type is required")),
            None => Err(Error::Invalid(vec![Fault::new([], "an event has to be a JSON object")])),
        };
        if let Err(e) = done {
            let id = format!("event_{}", Uuid::now_v7().simple());
            out.push(&error_value(&id, &e, cause.as_deref(), self.access.request_id()));
        }
        Flow::GoOn
    }

    fn refuse(&mut self, error: Error, out: &mut Frames) {
        let id = format!("event_{}", Uuid::now_v7().simple());
        out.push(&error_value(&id, &error, None, self.access.request_id()));
    }

    async fn deliver(&mut self, out: &mut Frames) -> Flow {
        if let Some(greeting) = self.greeting.take() {
            out.push(&greeting);
            return Flow::GoOn;
        }
        let Some(first) = self.deliveries.recv().await else {
            return if self.session.is_closed() {
                Flow::Close(1000, "the session has ended".into())
            } else {
                Flow::Close(TAKEN_OVER, "another connection goes on with this session".into())
            };
        };
        self.render(&first, out);
        while let Ok(next) = self.deliveries.try_recv() {
            self.render(&next, out);
        }
        Flow::GoOn
    }

    fn is_busy(&self) -> bool {
        self.running > 0
    }
}
