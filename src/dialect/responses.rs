//! OpenAI's Responses API, over WebSocket and over HTTP.
//!
//! Served under `/v1/responses` and `/waves/v1/responses`. The shapes are those of the types of OpenAI's SDKs. Beyond
//! them:
//!
//! - A response with `store: false` can be continued for as long as its connection lives and `session.resume_window` longer, so
//!   a client that reconnects goes on with `previous_response_id`.
//! - A cancelled response ends with `response.incomplete` and the reason `cancelled`.
//! - `response.cancel` with `heard`, and `response.truncate`, tell what the caller heard of a response; what continues it
//!   then continues that. So does an `input` that begins with a shorter version of what the response said.
//! - When old exchanges make room, a `conversation.trimmed` event names them.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, Response as HttpResponse, header},
};
use futures::{Stream, stream};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::{
    Access,
    fields::{Faults, Fields, kind},
    items, renamed,
    socket::{Flow, Frames, Protocol},
};
use crate::{
    error::{Error, Fault},
    session::{
        Action, Base, Content, Delivery, Event, Handle, Heard, Id, Item, OnLeave, Outcome, Outlet, Respond, Response,
        Role, Sessions, Settings, Spoken, new_id, response::At,
    },
    turn::{Model, OutputFormat, Sampling, TokenLogprob},
};

/// Most items of a request's input.
const MOST_INPUT: usize = 1_000;
/// Requests of a named lane that may wait for the one that is being answered.
const MOST_WAITING: usize = 8;
/// Events on their way from sessions to one connection.
const DELIVERIES: usize = 32;
/// Longest `stream_id`.
const LONGEST_STREAM_ID: usize = 128;

/// A request, parsed.
#[derive(Debug)]
pub struct Create {
    /// The name of the model that was asked for.
    pub model: String,
    /// What the response is made with.
    pub settings: Settings,
    /// What comes before it.
    pub input: Vec<Arc<Item>>,
    /// The response that it continues.
    pub previous: Option<Id>,
    /// Whether it is kept when its session has ended.
    pub store: bool,
    /// Whether the model answers.
    pub generate: bool,
    /// Whether the answer is streamed, over HTTP.
    pub stream: bool,
    /// The conversation on a socket that it belongs to.
    pub stream_id: Option<Arc<str>>,
}

// === parse ===

/// Reads the body of a request. `model` is the one that is asked when the body names none, as a connection's URL may do.
///
/// # Errors
/// [`Error::Invalid`] with everything that is wrong, [`Error::ModelNotFound`] for an agent that is not there.
pub fn parse(body: &Value, model: Option<&str>, access: &dyn Access) -> Result<Create, Error> {
    let mut faults = Faults::default();
    let Some(fields) = Fields::of(body, Vec::new(), &mut faults) else {
        return Err(faults.into_error());
    };
    let faults_ref = &mut faults;
    let model = match fields.text("model", faults_ref).or(model) {
        Some(model) => model.to_owned(),
        None => {
            if fields.get("model").is_none() {
                faults_ref.add(fields.at("model"), "model is required");
            }
            String::new()
        }
    };
    let metadata = metadata(&fields, faults_ref);
    let mut settings = access.settings(&model, &metadata)?;
    settings.metadata = metadata;
    if let Some(text) = fields.text("instructions", faults_ref) {
        settings.instructions = text.into();
    }
    let (tools, kit) = items::tools(&fields, access.guard(), faults_ref).unwrap_or_default();
    (settings.tools, settings.kit) = (tools.into(), kit.into());
    if let Some(choice) = items::tool_choice(&fields, &settings, faults_ref) {
        settings.tool_choice = choice;
    }
    if let Some(parallel) = fields.flag("parallel_tool_calls", faults_ref) {
        settings.parallel_tool_calls = parallel;
    }
    settings.sampling = sampling(&fields, settings.sampling, faults_ref);
    settings.format = format(&fields, faults_ref);
    settings.trim = match fields.text("truncation", faults_ref) {
        None | Some("auto") => true,
        Some("disabled") => false,
        Some(other) => {
            faults_ref.add(fields.at("truncation"), format!("truncation has to be auto or disabled, not `{other}`"));
            true
        }
    };
    let input = input(&fields, faults_ref);
    let previous = items::id(&fields, "previous_response_id", faults_ref);
    let store = fields.flag("store", faults_ref).unwrap_or(true);
    let prewarm = fields
        .get("prompt_cache_options")
        .and_then(|value| Fields::of(value, fields.at("prompt_cache_options"), faults_ref))
        .and_then(|options| options.flag("prewarm", faults_ref))
        .unwrap_or(false);
    let generate = fields.flag("generate", faults_ref).unwrap_or(true) && !prewarm;
    let stream = fields.flag("stream", faults_ref).unwrap_or(false);
    let stream_id = stream_id(&fields, faults_ref);
    for name in ["conversation", "prompt"] {
        if fields.get(name).is_some() {
            faults_ref
                .add(fields.at(name), format!("{name} is not supported; use previous_response_id and instructions"));
        }
    }
    if fields.flag("background", faults_ref) == Some(true) {
        faults_ref.add(fields.at("background"), "background is not supported; read the answer as a stream");
    }
    faults.or(Create { model, settings, input, previous, store, generate, stream, stream_id })
}

fn input(fields: &Fields<'_>, faults: &mut Faults) -> Vec<Arc<Item>> {
    match fields.get("input") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![Arc::new(Item::message(new_id("msg"), Role::User, text.as_str()))],
        Some(Value::Array(list)) if list.len() > MOST_INPUT => {
            faults.add(fields.at("input"), format!("input may hold up to {MOST_INPUT} items, not {}", list.len()));
            Vec::new()
        }
        Some(Value::Array(list)) => {
            let path = |i: usize| fields.at("input").into_iter().chain([i.into()]).collect();
            list.iter().enumerate().filter_map(|(i, item)| items::item(item, path(i), faults)).collect()
        }
        Some(other) => {
            let what = kind(other);
            faults.add(fields.at("input"), format!("input has to be a string or a list of items, not {what}"));
            Vec::new()
        }
    }
}

fn sampling(fields: &Fields<'_>, default: Sampling, faults: &mut Faults) -> Sampling {
    let include = fields.list("include", faults).unwrap_or_default();
    let wants_logprobs = include.iter().any(|wanted| wanted == "message.output_text.logprobs");
    let top_logprobs = fields.whole("top_logprobs", 0..=20, faults).unwrap_or(0);
    let max_tokens = fields.whole("max_output_tokens", 1..=i64::MAX, faults);
    Sampling {
        temperature: fields.number("temperature", 0.0..=2.0, faults).map_or(default.temperature, |n| n as f32),
        top_p: fields.number("top_p", 0.0..=1.0, faults).map_or(default.top_p, |n| n as f32),
        max_tokens: max_tokens.and_then(|n| usize::try_from(n).ok()).or(default.max_tokens),
        seed: fields.whole("seed", i64::MIN..=i64::MAX, faults).map(|seed| seed as u64).or(default.seed),
        logprobs: (wants_logprobs || top_logprobs > 0).then_some(top_logprobs as usize),
        ..Sampling::default()
    }
}

fn format(fields: &Fields<'_>, faults: &mut Faults) -> OutputFormat {
    let text = fields.get("text").and_then(|text| Fields::of(text, fields.at("text"), faults));
    let format = text.and_then(|text| Fields::of(text.get("format")?, text.at("format"), faults));
    let Some(format) = format else {
        return OutputFormat::Text;
    };
    match format.required_text("type", faults) {
        Some("text") | None => OutputFormat::Text,
        Some("json_object") => OutputFormat::JsonObject,
        Some("json_schema") => match format.get("schema") {
            Some(schema) if schema.is_object() => OutputFormat::JsonSchema(schema.clone()),
            Some(other) => {
                faults.add(format.at("schema"), format!("schema has to be an object, not {}", kind(other)));
                OutputFormat::Text
            }
            None => {
                faults.add(format.at("schema"), "schema is required");
                OutputFormat::Text
            }
        },
        Some(other) => {
            let allowed = "text, json_object or json_schema";
            faults.add(format.at("type"), format!("type has to be {allowed}, not `{other}`"));
            OutputFormat::Text
        }
    }
}

/// Up to 16 pairs of short strings.
pub(super) fn metadata(fields: &Fields<'_>, faults: &mut Faults) -> Map<String, Value> {
    match fields.get("metadata") {
        None => Map::new(),
        Some(Value::Object(map))
            if map.len() <= 16
                && map.iter().all(|(key, value)| {
                    key.chars().count() <= 64 && value.as_str().is_some_and(|v| v.chars().count() <= 512)
                }) =>
        {
            map.clone()
        }
        Some(_) => {
            let allowed = "up to 16 pairs of a name of 64 letters and a string of 512 letters at most";
            faults.add(fields.at("metadata"), format!("metadata has to be an object of {allowed}"));
            Map::new()
        }
    }
}

fn stream_id(fields: &Fields<'_>, faults: &mut Faults) -> Option<Arc<str>> {
    let id = fields.text("stream_id", faults)?;
    if id.is_empty() || id.len() > LONGEST_STREAM_ID {
        faults.add(fields.at("stream_id"), format!("stream_id has to be 1 to {LONGEST_STREAM_ID} bytes"));
        return None;
    }
    Some(id.into())
}

// === render ===

/// Takes events as they are rendered.
trait Sink {
    fn event(&mut self, kind: &'static str, body: &impl Serialize);
}

impl Sink for Frames {
    fn event(&mut self, _kind: &'static str, body: &impl Serialize) {
        self.push(body);
    }
}

/// Server-sent events.
#[derive(Default)]
struct Sse(String);

impl Sink for Sse {
    fn event(&mut self, kind: &'static str, body: &impl Serialize) {
        let body = serde_json::to_string(body).unwrap_or_default();
        self.0.reserve(kind.len() + body.len() + 16);
        self.0.push_str("event: ");
        self.0.push_str(kind);
        self.0.push_str("\ndata: ");
        self.0.push_str(&body);
        self.0.push_str("\n\n");
    }
}

/// Renders the events of one response after another.
#[derive(Clone, Debug, Default)]
struct Renderer {
    /// The number of the next event of the response.
    sequence: u64,
    stream_id: Option<Arc<str>>,
    /// Log-probabilities of the response's messages by the place of the message, where they were asked for.
    logprobs: HashMap<usize, Vec<Value>>,
}

/// What all events have in common.
#[derive(Serialize)]
struct Head<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    sequence_number: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_id: Option<&'a str>,
}

#[derive(Serialize)]
struct OfResponse<'a> {
    #[serde(flatten)]
    head: Head<'a>,
    response: Value,
}

#[derive(Serialize)]
struct OfItem<'a, T: Serialize> {
    #[serde(flatten)]
    head: Head<'a>,
    output_index: usize,
    #[serde(flatten)]
    body: T,
}

#[derive(Serialize)]
struct TextDelta<'a> {
    item_id: &'a str,
    content_index: usize,
    delta: &'a str,
    logprobs: Vec<Logprob>,
}

#[derive(Serialize)]
struct ArgumentsDelta<'a> {
    item_id: &'a str,
    delta: &'a str,
}

#[derive(Serialize)]
struct Logprob {
    token: String,
    logprob: f32,
    top_logprobs: Vec<TopLogprob>,
}

#[derive(Serialize)]
struct TopLogprob {
    token: String,
    logprob: f32,
}

fn logprobs(tokens: &[TokenLogprob]) -> Vec<Logprob> {
    // JSON has no infinity.
    const IMPOSSIBLE: f32 = -9999.0;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let top = |token: &TokenLogprob| {
        let one =
            |(bytes, logprob): &(Vec<u8>, f32)| TopLogprob { token: text(bytes), logprob: logprob.max(IMPOSSIBLE) };
        token.top.iter().map(one).collect()
    };
    let one = |token: &TokenLogprob| Logprob {
        token: text(&token.bytes),
        logprob: token.logprob.max(IMPOSSIBLE),
        top_logprobs: top(token),
    };
    tokens.iter().map(one).collect()
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn item_value(item: &Item) -> Value {
    items::item_value(item, text_part)
}

/// A response as the API writes it.
pub fn response_value(response: &Response) -> Value {
    let (status, reason, error) = match &response.outcome {
        None => ("in_progress", None, None),
        Some(Outcome::Completed) => ("completed", None, None),
        Some(Outcome::Length) => ("incomplete", Some("max_output_tokens"), None),
        Some(Outcome::Cancelled) => ("incomplete", Some("cancelled"), None),
        // The API's own list of codes is short, and clients hold to it.
        Some(Outcome::Failed(error)) => {
            ("failed", None, Some(json!({"code": "server_error", "message": error.to_string()})))
        }
    };
    let settings = &response.settings;
    let sampling = &settings.sampling;
    let usage = response.outcome.as_ref().map(|_| {
        let usage = response.usage;
        json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        })
    });
    json!({
        "id": response.id,
        "object": "response",
        "created_at": response.created_at,
        "completed_at": response.completed_at,
        "status": status,
        "background": false,
        "error": error,
        "incomplete_details": reason.map(|reason| json!({"reason": reason})),
        "instructions": Some(&*settings.instructions).filter(|text| !text.is_empty()),
        "max_output_tokens": sampling.max_tokens,
        "metadata": settings.metadata,
        "model": settings.model,
        "output": response.output.iter().map(|item| item_value(item)).collect::<Vec<_>>(),
        "parallel_tool_calls": settings.parallel_tool_calls,
        "previous_response_id": response.previous,
        "reasoning": null,
        "service_tier": "default",
        "store": response.store,
        "temperature": tidy(sampling.temperature),
        "text": {"format": items::format_value(&settings.format)},
        "tool_choice": items::tool_choice_value(&settings.tool_choice),
        "tools": items::tools_value(settings),
        "top_logprobs": sampling.logprobs.unwrap_or(0),
        "top_p": tidy(sampling.top_p),
        "truncation": if settings.trim { "auto" } else { "disabled" },
        "usage": usage,
        "user": null,
    })
}

/// A setting as it was written, without the digits that come from halving its precision.
pub(super) fn tidy(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The items of a request, a page of them.
///
/// # Errors
/// [`Error::Invalid`] for a `limit` or an `order` that cannot be.
pub fn input_page(response: &Response, query: &HashMap<String, String>) -> Result<Value, Error> {
    let limit = match query.get("limit").map(|limit| limit.parse::<usize>()) {
        None => 20,
        Some(Ok(limit @ 1..=100)) => limit,
        Some(_) => return Err(Error::invalid("limit", "limit has to be a whole number from 1 to 100")),
    };
    let mut items: Vec<&Arc<Item>> = response.input.iter().collect();
    match query.get("order").map(String::as_str) {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(other) => return Err(Error::invalid("order", format!("order has to be asc or desc, not `{other}`"))),
    }
    if let Some(after) = query.get("after") {
        let at = items.iter().position(|item| *item.id == **after);
        let at = at.ok_or_else(|| Error::invalid("after", format!("there is no item `{after}`")))?;
        items.drain(..=at);
    }
    let has_more = items.len() > limit;
    items.truncate(limit);
    Ok(json!({
        "object": "list",
        "data": items.iter().map(|item| item_value(item)).collect::<Vec<_>>(),
        "first_id": items.first().map(|item| &item.id),
        "last_id": items.last().map(|item| &item.id),
        "has_more": has_more,
    }))
}

impl Renderer {
    fn head(&mut self, kind: &'static str) -> Head<'_> {
        let sequence_number = self.sequence;
        self.sequence += 1;
        Head { kind, sequence_number, stream_id: self.stream_id.as_deref() }
    }

    fn of_response(&mut self, kind: &'static str, response: &Response, out: &mut impl Sink) {
        let response = self.response(response);
        let head = self.head(kind);
        out.event(kind, &OfResponse { head, response });
    }

    /// A response with what is known of its tokens.
    fn response(&self, response: &Response) -> Value {
        let mut value = response_value(response);
        for (index, known) in &self.logprobs {
            if let Some(part) = value.pointer_mut(&format!("/output/{index}/content/0")) {
                part["logprobs"] = known.clone().into();
            }
        }
        value
    }

    /// Takes note of the tokens of a text.
    fn note(&mut self, index: usize, tokens: &[TokenLogprob]) {
        if tokens.is_empty() {
            return;
        }
        let values = logprobs(tokens).into_iter().zip(tokens).map(|(logprob, token)| {
            let mut value = serde_json::to_value(logprob).unwrap_or_default();
            value["bytes"] = token.bytes.clone().into();
            for (top, (bytes, _)) in value["top_logprobs"].as_array_mut().into_iter().flatten().zip(&token.top) {
                top["bytes"] = bytes.clone().into();
            }
            value
        });
        self.logprobs.entry(index).or_default().extend(values);
    }

    fn of_item(&mut self, kind: &'static str, at: &At, body: impl Serialize, out: &mut impl Sink) {
        let head = self.head(kind);
        out.event(kind, &OfItem { head, output_index: at.index, body });
    }

    fn render(&mut self, event: &Event, out: &mut impl Sink) {
        match event {
            Event::Begun(response) => {
                self.sequence = 0;
                self.logprobs.clear();
                self.of_response("response.created", response, out);
                self.of_response("response.in_progress", response, out);
            }
            Event::Trimmed { response, items } => {
                let kind = "conversation.trimmed";
                let mut event = json!({"response_id": response, "item_ids": items});
                self.complete(kind, &mut event);
                out.event(kind, &event);
            }
            Event::OutputBegun { at, item } => {
                self.of_item("response.output_item.added", at, json!({"item": item_value(item)}), out);
                if let Content::Listing { .. } = item.content {
                    let body = json!({"item_id": at.item});
                    self.of_item("response.mcp_list_tools.in_progress", at, body, out);
                }
                if item.spoken().is_some() {
                    let part = json!({"item_id": at.item, "content_index": 0, "part": text_part("")});
                    self.of_item("response.content_part.added", at, part, out);
                }
            }
            Event::Text { at, delta, logprobs: tokens } => {
                self.note(at.index, tokens);
                let body = TextDelta { item_id: &at.item, content_index: 0, delta, logprobs: logprobs(tokens) };
                self.of_item("response.output_text.delta", at, body, out);
            }
            Event::Arguments { at, delta } => {
                let body = ArgumentsDelta { item_id: &at.item, delta };
                let kind = if at.runs {
                    "response.mcp_call_arguments.delta"
                } else {
                    "response.function_call_arguments.delta"
                };
                self.of_item(kind, at, body, out);
            }
            Event::CallRuns { at, item } => {
                if let Content::Call { arguments, .. } = &item.content {
                    let done = json!({"item_id": at.item, "arguments": arguments});
                    self.of_item("response.mcp_call_arguments.done", at, done, out);
                    self.of_item("response.mcp_call.in_progress", at, json!({"item_id": at.item}), out);
                }
            }
            Event::OutputEnded { at, item } => {
                if let Content::Call { name, arguments, run: None, .. } = &item.content {
                    let done = json!({"item_id": at.item, "name": name, "arguments": arguments});
                    self.of_item("response.function_call_arguments.done", at, done, out);
                } else if let Some(kind) = items::settled(item) {
                    self.of_item(kind, at, json!({"item_id": at.item}), out);
                } else if let Some(text) = item.spoken() {
                    let known = Value::from(self.logprobs.get(&at.index).cloned().unwrap_or_default());
                    let done = json!({"item_id": at.item, "content_index": 0, "text": text, "logprobs": known});
                    self.of_item("response.output_text.done", at, done, out);
                    let mut part = text_part(text);
                    part["logprobs"] = known;
                    let part = json!({"item_id": at.item, "content_index": 0, "part": part});
                    self.of_item("response.content_part.done", at, part, out);
                }
                let mut item = item_value(item);
                if let Some(known) = self.logprobs.get(&at.index)
                    && let Some(part) = item.pointer_mut("/content/0")
                {
                    part["logprobs"] = known.clone().into();
                }
                self.of_item("response.output_item.done", at, json!({"item": item}), out);
            }
            Event::Ended(response) => {
                let kind = match response.outcome {
                    Some(Outcome::Length | Outcome::Cancelled) => "response.incomplete",
                    Some(Outcome::Failed(_)) => "response.failed",
                    Some(Outcome::Completed) | None => "response.completed",
                };
                self.of_response(kind, response, out);
            }
            Event::ItemTruncated { item, response, .. } => {
                let kind = "response.truncated";
                let mut event = json!({"response_id": response, "item": item_value(item)});
                self.complete(kind, &mut event);
                out.event(kind, &event);
            }
            // These come of commands that this dialect does not send.
            Event::Configured(_)
            | Event::CallSettled(_)
            | Event::Control { .. }
            | Event::Listing(_)
            | Event::ItemAdded { .. }
            | Event::ItemRetrieved(_)
            | Event::ItemRemoved(_)
            | Event::Refused { .. } => {}
        }
    }

    /// Puts the head on an event that is a value already.
    fn complete(&mut self, kind: &'static str, event: &mut Value) {
        let head = self.head(kind);
        event["type"] = kind.into();
        event["sequence_number"] = head.sequence_number.into();
        if let Some(id) = head.stream_id {
            event["stream_id"] = id.into();
        }
    }
}

/// An error as this API's WebSocket writes it: in an object of its own, and its fields at the top as in a stream.
fn error_value(error: &Error, stream_id: Option<&str>, request_id: &str) -> Value {
    let mut value = json!({
        "type": "error",
        "status": error.status(),
        "code": error.code(),
        "message": error.to_string(),
        "param": error.param(),
        "sequence_number": 0,
    });
    if let Ok(Value::Object(mut body)) = serde_json::to_value(error.body(request_id)) {
        value["error"] = body.remove("error").unwrap_or_default();
    }
    if let Some(wait) = error.retry_after() {
        value["error"]["headers"] = json!({"retry-after": wait.as_secs().max(1).to_string()});
    }
    if let Some(id) = stream_id {
        value["stream_id"] = id.into();
    }
    value
}

// === the conversation that a request continues ===

/// Finds what a request continues, and leaves of its input what is new.
fn base(
    previous: Option<&Id>,
    input: &mut Vec<Arc<Item>>,
    sessions: &Sessions,
    access: &dyn Access,
) -> Result<(Base, Option<Handle>), Error> {
    let Some(id) = previous else {
        return Ok((Base::default(), None));
    };
    let stored =
        sessions.response(id, access.owner()).ok_or_else(|| Error::PreviousResponseNotFound(id.to_string()))?;
    if stored.response.outcome.is_none() {
        return Err(Error::Conflict {
            code: "response_not_completed",
            message: format!("The response `{id}` is still being made. Wait until it is over, or cancel it."),
        });
    }
    let mut history = stored.history;
    history.repeat(&stored.response.output, input);
    Ok((Base { history, response: Some(id.clone()) }, Some(stored.session)))
}

// === WebSocket ===

/// A connection on which responses are asked for.
pub struct Connection {
    access: Arc<dyn Access>,
    sessions: Arc<Sessions>,
    /// The model that is asked when a request names none.
    model: Option<String>,
    sender: mpsc::Sender<Delivery>,
    deliveries: mpsc::Receiver<Delivery>,
    /// By the tag with which their events come.
    lanes: HashMap<u32, Lane>,
    named: HashMap<Option<Arc<str>>, u32>,
    most_lanes: usize,
    next_tag: u32,
    /// Lanes that have become free and may have something waiting.
    ready: Vec<u32>,
}

/// One conversation on a connection.
struct Lane {
    renderer: Renderer,
    session: Option<Handle>,
    /// The response that is being made.
    active: Option<Id>,
    /// Responses that have not ended: that one, and one whose prompt is only computed.
    open: usize,
    /// The last one that ended.
    latest: Option<Id>,
    waiting: VecDeque<Create>,
}

/// Reasons of commands that are not responses, by which a refusal is known.
const TRUNCATE: &str = "truncate";
const CANCEL: &str = "cancel";

impl Connection {
    /// A connection without conversations yet.
    pub fn new(access: Arc<dyn Access>, sessions: Arc<Sessions>, model: Option<String>, most_lanes: usize) -> Self {
        let (sender, deliveries) = mpsc::channel(DELIVERIES);
        let (lanes, named, ready) = (HashMap::new(), HashMap::new(), Vec::new());
        Self { access, sessions, model, sender, deliveries, lanes, named, most_lanes, next_tag: 0, ready }
    }

    fn error(&self, error: &Error, stream_id: Option<&str>, out: &mut Frames) {
        out.push(&error_value(error, stream_id, self.access.request_id()));
    }

    /// The lane of this name, made if it is new. Where there are as many as there may be, one that has nothing to do makes
    /// room; its conversation can be gone on with by `previous_response_id`.
    async fn lane(&mut self, stream_id: &Option<Arc<str>>) -> Result<u32, Error> {
        if let Some(tag) = self.named.get(stream_id) {
            return Ok(*tag);
        }
        if self.lanes.len() >= self.most_lanes {
            let idle = self.lanes.iter().filter(|(_, lane)| lane.open == 0 && lane.waiting.is_empty());
            let Some(oldest) = idle.map(|(tag, _)| *tag).min() else {
                return Err(Error::Conflict {
                    code: "too_many_streams",
                    message: format!(
                        "A connection carries at most {} conversations at once. Wait for one to end, or use another \
                         connection.",
                        self.most_lanes
                    ),
                });
            };
            self.named.retain(|_, tag| *tag != oldest);
            if let Some(Lane { session: Some(session), .. }) = self.lanes.remove(&oldest) {
                let _ = session.send(None, Action::Leave).await;
            }
        }
        let tag = self.next_tag;
        self.next_tag = self.next_tag.wrapping_add(1);
        let renderer = Renderer { stream_id: stream_id.clone(), ..Renderer::default() };
        let lane = Lane { renderer, session: None, active: None, open: 0, latest: None, waiting: VecDeque::new() };
        self.lanes.insert(tag, lane);
        self.named.insert(stream_id.clone(), tag);
        Ok(tag)
    }

    async fn create(&mut self, event: &Value) -> Result<(), Error> {
        let create = parse(event, self.model.as_deref(), &*self.access)?;
        let tag = self.lane(&create.stream_id).await?;
        let Some(lane) = self.lanes.get_mut(&tag) else { return Ok(()) };
        match (&lane.active, &create.stream_id) {
            (None, _) => self.start(tag, create).await,
            // The conversations of named lanes wait for each other, as the hosted service has it.
            (Some(_), Some(_)) if lane.waiting.len() < MOST_WAITING => {
                lane.waiting.push_back(create);
                Ok(())
            }
            (Some(active), name) => {
                let what = match name {
                    Some(_) => format!("{MOST_WAITING} requests wait for the response `{active}`"),
                    None => format!("The response `{active}` is being made"),
                };
                Err(Error::Conflict {
                    code: "conversation_already_has_active_response",
                    message: format!("{what}. Wait until it is over, cancel it, or use another stream_id."),
                })
            }
        }
    }

    async fn start(&mut self, tag: u32, create: Create) -> Result<(), Error> {
        let Create { model, settings, mut input, previous, store, generate, .. } = create;
        let electron = self.access.model(&model)?;
        let (base, made_in) = base(previous.as_ref(), &mut input, &self.sessions, &*self.access)?;
        let watch = self.access.admit(&model)?;
        let session = self.session(tag, made_in, electron, &settings).await?;
        let id = new_id("resp");
        let respond = Respond {
            id: id.clone(),
            settings: Arc::new(settings),
            base: Some(base),
            input,
            transcript: None,
            context: None,
            in_conversation: true,
            lasting: false,
            needs_outputs: false,
            generate,
            keep: true,
            store,
            watch,
        };
        session.send(Some(id.clone()), Action::Respond(Box::new(respond))).await?;
        if let Some(lane) = self.lanes.get_mut(&tag) {
            lane.open += 1;
            // Filling the prefix cache does not keep a lane from being used.
            lane.active = generate.then_some(id);
        }
        Ok(())
    }

    /// The session of a lane: its own, or the one whose conversation a client that came back goes on with, or a new one.
    async fn session(
        &mut self,
        tag: u32,
        made_in: Option<Handle>,
        electron: Arc<dyn Model>,
        settings: &Settings,
    ) -> Result<Handle, Error> {
        let own = self.lanes.get(&tag).and_then(|lane| lane.session.clone());
        if let Some(own) = own.filter(|own| !own.is_closed()) {
            return Ok(own);
        }
        let outlet = || Outlet { sender: self.sender.clone(), tag };
        let mut session = None;
        if let Some(made_in) = made_in
            && self.sessions.find(&made_in.about().id, self.access.owner()).is_ok()
            && made_in.attach(outlet(), OnLeave::CancelTurn, None, true).await.is_ok()
        {
            session = Some(made_in);
        }
        let session = match session {
            Some(session) => session,
            None => {
                let owner = self.access.owner().clone();
                let session =
                    self.sessions.open(electron, owner, "responses", settings.clone(), OnLeave::CancelTurn, None)?;
                session.attach(outlet(), OnLeave::CancelTurn, None, false).await?;
                session
            }
        };
        if let Some(lane) = self.lanes.get_mut(&tag) {
            lane.session = Some(session.clone());
        }
        Ok(session)
    }

    async fn cancel(&mut self, event: &Value) -> Result<(), Error> {
        let mut faults = Faults::default();
        let Some(fields) = Fields::of(event, Vec::new(), &mut faults) else {
            return Err(faults.into_error());
        };
        let id = items::id(&fields, "response_id", &mut faults);
        let name = stream_id(&fields, &mut faults);
        let heard = fields.text("heard", &mut faults).map(|text| Heard::Text(text.to_owned()));
        faults.or(())?;
        let lane = match &id {
            None => self.named.get(&name).and_then(|tag| self.lanes.get(tag)),
            Some(_) => self.lanes.values().find(|lane| lane.active == id || lane.latest == id),
        };
        // A response that is over needs no cancelling, and a client that is late to know needs no error.
        if let Some(session) = lane.and_then(|lane| lane.session.clone()) {
            let _ = session.send(Some(CANCEL.into()), Action::Cancel(id, heard)).await;
        }
        Ok(())
    }

    async fn truncate(&mut self, event: &Value) -> Result<(), Error> {
        let mut faults = Faults::default();
        let Some(fields) = Fields::of(event, Vec::new(), &mut faults) else {
            return Err(faults.into_error());
        };
        let id = items::required_id(&fields, "response_id", &mut faults);
        let name = stream_id(&fields, &mut faults);
        let text = fields.required_text("text", &mut faults).map(str::to_owned);
        let (Some(id), Some(text)) = (id, text) else {
            return Err(faults.into_error());
        };
        faults.or(())?;
        let session = self.named.get(&name).and_then(|tag| self.lanes.get(tag)?.session.clone());
        let session = session.ok_or_else(|| {
            Error::invalid("response_id", format!("`{id}` is not the latest response of this conversation"))
        })?;
        session.send(Some(TRUNCATE.into()), Action::Truncate(Spoken::Response(id), Heard::Text(text))).await
    }

    fn render(&mut self, delivery: &Delivery, out: &mut Frames) {
        let tag = delivery.tag;
        let Some(lane) = self.lanes.get_mut(&tag) else { return };
        match &*delivery.event {
            Event::Ended(response) => {
                lane.open = lane.open.saturating_sub(1);
                lane.latest = Some(response.id.clone());
                if lane.active.as_ref() == Some(&response.id) {
                    lane.active = None;
                    self.ready.push(tag);
                }
            }
            Event::Refused { cause, error } => {
                if cause.as_deref().is_some_and(|cause| cause.starts_with("resp_")) {
                    lane.open = lane.open.saturating_sub(1);
                }
                if cause.is_some() && *cause == lane.active {
                    lane.active = None;
                    self.ready.push(tag);
                }
                // A cancel that comes too late is no fault of anybody.
                if error.code() != Some("response_cancel_not_active") {
                    let stream_id = lane.renderer.stream_id.clone();
                    self.error(&renamed(error.clone()), stream_id.as_deref(), out);
                }
                return;
            }
            _ => {}
        }
        if let Some(lane) = self.lanes.get_mut(&tag) {
            lane.renderer.render(&delivery.event, out);
        }
    }

    /// The next request of a lane that can be answered now.
    fn next_waiting(&mut self, tag: u32) -> Option<Create> {
        self.lanes.get_mut(&tag).filter(|lane| lane.active.is_none())?.waiting.pop_front()
    }
}

impl Protocol for Connection {
    async fn receive(&mut self, event: Value, out: &mut Frames) -> Flow {
        let kind = event.get("type").and_then(Value::as_str).unwrap_or_default();
        let done = match kind {
            "response.create" => self.create(&event).await,
            "response.cancel" => self.cancel(&event).await,
            "response.truncate" => self.truncate(&event).await,
            "response.steer" => {
                let mut failed = json!({
                    "type": "response.steer.failed",
                    "sequence_number": 0,
                    "error": {"type": "invalid_request_error", "code": "steering_not_supported",
                              "message": "Responses are not steered here; cancel this one and create another."},
                    "steer": {"previous_response_id": event["previous_response_id"], "input": event["input"]},
                });
                if event["stream_id"].is_string() {
                    failed["stream_id"] = event["stream_id"].clone();
                }
                out.push(&failed);
                Ok(())
            }
            other => {
                let allowed = "response.create, response.cancel, response.truncate";
                let why = format!("type has to be one of {allowed}, not `{}`", shorten(other));
                Err(Error::Invalid(vec![Fault::new(["type".into()], why)]))
            }
        };
        if let Err(e) = done {
            let stream_id = event.get("stream_id").and_then(Value::as_str).filter(|id| id.len() <= LONGEST_STREAM_ID);
            self.error(&e, stream_id, out);
        }
        Flow::GoOn
    }

    fn refuse(&mut self, error: Error, out: &mut Frames) {
        self.error(&error, None, out);
    }

    async fn deliver(&mut self, out: &mut Frames) -> Flow {
        // This side holds a sender, so the channel does not end.
        if let Some(first) = self.deliveries.recv().await {
            self.render(&first, out);
            while let Ok(next) = self.deliveries.try_recv() {
                self.render(&next, out);
            }
        }
        Flow::GoOn
    }

    async fn settle(&mut self, out: &mut Frames) {
        while let Some(tag) = self.ready.pop() {
            while let Some(create) = self.next_waiting(tag) {
                let stream_id = create.stream_id.clone();
                if let Err(e) = self.start(tag, create).await {
                    self.error(&e, stream_id.as_deref(), out);
                }
            }
        }
    }

    fn is_busy(&self) -> bool {
        self.lanes.values().any(|lane| lane.active.is_some())
    }
}

/// The beginning of a text that a client sent, for an error.
pub fn shorten(text: &str) -> &str {
    const LONGEST: usize = 64;
    text.char_indices().nth(LONGEST).map_or(text, |(end, _)| &text[..end])
}

// === HTTP ===

/// Answers `POST /v1/responses`.
///
/// # Errors
/// What the turn fails with before its first event, or, unless the answer is streamed, at all.
pub async fn answer(
    create: Create,
    access: Arc<dyn Access>,
    sessions: &Arc<Sessions>,
) -> Result<HttpResponse<Body>, Error> {
    let Create { model, settings, mut input, previous, store, generate, stream, .. } = create;
    let electron = access.model(&model)?;
    let (base, _) = base(previous.as_ref(), &mut input, sessions, &*access)?;
    let watch = access.admit(&model)?;
    let session = sessions.open(electron, access.owner().clone(), "responses", settings.clone(), OnLeave::End, None)?;
    // The session ends with this channel, and with it the turn of a client that has gone.
    let (sender, mut deliveries) = mpsc::channel(DELIVERIES);
    session.attach(Outlet { sender, tag: 0 }, OnLeave::End, None, false).await?;
    let id = new_id("resp");
    let respond = Respond {
        id: id.clone(),
        settings: Arc::new(settings),
        base: Some(base),
        input,
        transcript: None,
        context: None,
        in_conversation: true,
        lasting: false,
        needs_outputs: false,
        generate,
        keep: true,
        store,
        watch,
    };
    session.send(Some(id), Action::Respond(Box::new(respond))).await?;
    let broken = || Error::Internal("a session ended before its response".into());
    // Until the first event the status is open.
    let first = deliveries.recv().await.ok_or_else(broken)?;
    if let Event::Refused { error, .. } = &*first.event {
        return Err(renamed(error.clone()));
    }
    if stream {
        let mut response = HttpResponse::new(Body::from_stream(sse(first, deliveries)));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        return Ok(response);
    }
    let mut renderer = Renderer::default();
    loop {
        let delivery = deliveries.recv().await.ok_or_else(broken)?;
        match &*delivery.event {
            Event::Text { at, logprobs, .. } => renderer.note(at.index, logprobs),
            Event::Ended(response) => {
                if let Some(Outcome::Failed(error)) = &response.outcome {
                    return Err(error.clone());
                }
                let body =
                    serde_json::to_vec(&renderer.response(response)).map_err(|e| Error::Internal(e.to_string()))?;
                let mut answer = HttpResponse::new(Body::from(body));
                answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                return Ok(answer);
            }
            _ => {}
        }
    }
}

fn sse(
    first: Delivery,
    deliveries: mpsc::Receiver<Delivery>,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let state = (Renderer::default(), Some(first), deliveries, false);
    stream::unfold(state, |(mut renderer, ready, mut deliveries, over)| async move {
        if over {
            return None;
        }
        let mut next = match ready {
            Some(first) => Some(first),
            None => Some(deliveries.recv().await?),
        };
        let mut out = Sse::default();
        let mut over = false;
        while let Some(delivery) = next {
            renderer.render(&delivery.event, &mut out);
            over |= matches!(&*delivery.event, Event::Ended(_));
            next = deliveries.try_recv().ok();
        }
        Some((Ok(Bytes::from(out.0)), (renderer, None, deliveries, over)))
    })
}

/// Stops a response that is being made.
///
/// # Errors
/// [`Error::NotFound`], and [`Error::Conflict`] when it is over already.
pub async fn stop(id: &str, access: &dyn Access, sessions: &Sessions) -> Result<Value, Error> {
    let stored = sessions.stored(shorten(id), access.owner())?;
    if stored.response.outcome.is_some() {
        return Err(Error::Conflict {
            code: "response_cancel_not_active",
            message: format!("The response `{id}` is over; there is nothing to cancel."),
        });
    }
    stored.session.send(None, Action::Cancel(Some(id.into()), None)).await?;
    // Commands are done in order: when this one is answered, that one was done.
    stored.session.describe().await?;
    let stored = sessions
        .response(id, access.owner())
        .ok_or_else(|| Error::NotFound(format!("There is no response `{id}`.")))?;
    Ok(response_value(&stored.response))
}
