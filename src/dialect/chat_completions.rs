//! OpenAI's Chat Completions, with Electron's filler: spoken `content` beside `tool_calls`.
//!
//! Served under `/v1/chat/completions` and `/waves/v1/chat/completions`.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, Response, StatusCode, header},
};
use futures::{Stream, StreamExt, stream};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    Access,
    fields::{Faults, Fields, kind},
};
use crate::{
    error::Error,
    session::{
        Content, Delivery, Event, History, Item, OnLeave, Outcome, Outlet, Respond, Role, Sessions, Settings, Status,
        history::Bounds, new_id,
    },
    turn::{
        FinishReason, Message, Model, OutputFormat, Sampling, TokenLogprob, Tool, ToolCall, ToolChoice, Turn,
        TurnEvent, TurnStream, Usage,
    },
};

/// Most messages of a request.
const MOST_MESSAGES: usize = 200;
/// Most tools of a request.
const MOST_TOOLS: usize = 64;
/// Most stop texts of a request.
const MOST_STOPS: usize = 4;

/// A request, parsed.
#[derive(Debug)]
pub struct Request {
    /// The name of the model that was asked for.
    pub model: String,
    /// What it is to do.
    pub turn: Turn,
    /// What an agent brings with it, where the model's name names one.
    pub settings: Settings,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// Whether the stream ends with a chunk of usage figures.
    pub include_usage: bool,
}

// === parse ===

/// Reads a request's body. `settings` gives what a turn is made with where it says nothing, by the model's name and the
/// request's metadata.
///
/// # Errors
/// [`Error::Invalid`] with everything that is wrong, [`Error::ModelNotFound`] for an agent that is not there.
pub fn parse(
    body: &[u8],
    settings: impl FnOnce(&str, &Map<String, Value>) -> Result<Settings, Error>,
) -> Result<Request, Error> {
    if body.is_empty() {
        return Err(Error::Invalid(vec![crate::error::Fault::new(
            [],
            "The body is empty; a JSON object is expected.",
        )]));
    }
    let body: Value = serde_json::from_slice(body)
        .map_err(|e| Error::Invalid(vec![crate::error::Fault::new([], format!("The body is not valid JSON: {e}"))]))?;
    let mut faults = Faults::default();
    let Some(fields) = Fields::of(&body, Vec::new(), &mut faults) else {
        return Err(faults.into_error());
    };
    let faults_ref = &mut faults;
    let model = fields.required_text("model", faults_ref).unwrap_or_default().to_owned();
    let settings = settings(&model, &variables(&body))?;
    let messages = messages(&fields, faults_ref);
    let tools = tools(&fields, faults_ref);
    let tool_choice = match fields.get("tool_choice") {
        None => settings.tool_choice.clone(),
        Some(_) => tool_choice(&fields, &tools, &settings, faults_ref),
    };
    let sampling = sampling(&fields, &settings.sampling, faults_ref);
    let format = format(&fields, faults_ref);
    let parallel_tool_calls = fields.flag("parallel_tool_calls", faults_ref);
    let parallel_tool_calls = parallel_tool_calls.unwrap_or(settings.parallel_tool_calls);
    let stream = fields.flag("stream", faults_ref).unwrap_or(false);
    let include_usage = fields
        .get("stream_options")
        .and_then(|value| Fields::of(value, fields.at("stream_options"), faults_ref))
        .and_then(|options| options.flag("include_usage", faults_ref))
        .unwrap_or(false);
    fields.text("user", faults_ref);
    if fields.get("n").is_some() && fields.whole("n", 1..=i64::MAX, faults_ref).is_some_and(|n| n > 1) {
        faults_ref.add(fields.at("n"), "n > 1 is not supported");
    }
    if fields.get("prompt_logprobs").is_some() {
        faults_ref.add(fields.at("prompt_logprobs"), "prompt_logprobs is not supported");
    }
    let (tools, filler) = (tools.into(), settings.filler);
    let language = None;
    let whole = !stream;
    let turn = Turn { messages, tools, tool_choice, parallel_tool_calls, sampling, format, filler, language, whole };
    faults.or(Request { model, turn, settings, stream, include_usage })
}

/// What a request tells of the call: its `metadata`, and what Vapi sends beside it. None of it is needed, so none of it is
/// refused.
fn variables(body: &Value) -> Map<String, Value> {
    let mut variables = body["metadata"].as_object().cloned().unwrap_or_default();
    for (name, told) in [
        ("caller", "/customer/number"),
        ("caller_name", "/customer/name"),
        ("called", "/phoneNumber/number"),
        ("call_id", "/call/id"),
    ] {
        if let Some(text) = body.pointer(told).and_then(Value::as_str).filter(|_| !variables.contains_key(name)) {
            variables.insert(name.to_owned(), text.into());
        }
    }
    variables
}

fn messages(fields: &Fields<'_>, faults: &mut Faults) -> Vec<Message> {
    let path = || fields.at("messages");
    let Some(list) = fields.list("messages", faults) else {
        if fields.get("messages").is_none() {
            faults.add(path(), "messages is required");
        }
        return Vec::new();
    };
    if list.is_empty() || list.len() > MOST_MESSAGES {
        faults.add(path(), format!("messages has to hold 1 to {MOST_MESSAGES} messages, not {}", list.len()));
        return Vec::new();
    }
    let mut messages = Vec::with_capacity(list.len());
    let mut called: HashSet<String> = HashSet::new();
    for (i, value) in list.iter().enumerate() {
        let at: Vec<_> = path().into_iter().chain([i.into()]).collect();
        let Some(message) = Fields::of(value, at, faults) else {
            continue;
        };
        if let Some(message) = self::message(&message, &mut called, faults) {
            messages.push(message);
        }
    }
    messages
}

fn message(fields: &Fields<'_>, called: &mut HashSet<String>, faults: &mut Faults) -> Option<Message> {
    let role = fields.required_text("role", faults)?;
    match role {
        "system" | "developer" => Some(Message::System(required_content(fields, faults)?)),
        "user" => Some(Message::User(required_content(fields, faults)?)),
        "assistant" => {
            let tool_calls = tool_calls(fields, faults);
            called.extend(tool_calls.iter().map(|call| call.id.clone()));
            let content = content(fields, faults);
            if content.is_none() && tool_calls.is_empty() && faults.is_empty() {
                faults.add(fields.at("content"), "content is required on an assistant message without tool_calls");
            }
            Some(Message::Assistant { content, tool_calls })
        }
        "tool" => {
            let call_id = fields.required_text("tool_call_id", faults)?;
            if !called.contains(call_id) {
                faults.add(
                    fields.at("tool_call_id"),
                    format!("tool_call_id `{call_id}` answers no call of an earlier assistant message"),
                );
            }
            Some(Message::Tool { call_id: call_id.to_owned(), content: required_content(fields, faults)? })
        }
        other => {
            let allowed = "system, developer, user, assistant or tool";
            faults.add(fields.at("role"), format!("role has to be {allowed}, not `{other}`"));
            None
        }
    }
}

fn required_content(fields: &Fields<'_>, faults: &mut Faults) -> Option<String> {
    if fields.get("content").is_none() {
        faults.add(fields.at("content"), "content is required");
    }
    content(fields, faults)
}

/// A string, or the texts of a list of parts.
fn content(fields: &Fields<'_>, faults: &mut Faults) -> Option<String> {
    match fields.get("content")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let mut whole = String::new();
            for (i, part) in parts.iter().enumerate() {
                let at: Vec<_> = fields.at("content").into_iter().chain([i.into()]).collect();
                let Some(part) = Fields::of(part, at, faults) else {
                    continue;
                };
                match part.required_text("type", faults) {
                    Some("text") => whole.push_str(part.required_text("text", faults).unwrap_or_default()),
                    Some(other) => {
                        faults.add(part.at("type"), format!("only parts of type text are served, not `{other}`"));
                    }
                    None => {}
                }
            }
            Some(whole)
        }
        other => {
            faults.add(
                fields.at("content"),
                format!("content has to be a string or a list of parts, not {}", kind(other)),
            );
            None
        }
    }
}

fn tool_calls(fields: &Fields<'_>, faults: &mut Faults) -> Vec<ToolCall> {
    let mut calls = Vec::new();
    for (i, value) in fields.list("tool_calls", faults).unwrap_or_default().iter().enumerate() {
        let at: Vec<_> = fields.at("tool_calls").into_iter().chain([i.into()]).collect();
        let Some(call) = Fields::of(value, at, faults) else {
            continue;
        };
        let id = call.required_text("id", faults);
        let Some(function) = call.get("function") else {
            faults.add(call.at("function"), "function is required");
            continue;
        };
        let Some(function) = Fields::of(function, call.at("function"), faults) else {
            continue;
        };
        let name = function.required_text("name", faults);
        let arguments = function.required_text("arguments", faults);
        if let (Some(id), Some(name), Some(arguments)) = (id, name, arguments) {
            calls.push(ToolCall { id: id.to_owned(), name: name.to_owned(), arguments: arguments.to_owned() });
        }
    }
    calls
}

fn tools(fields: &Fields<'_>, faults: &mut Faults) -> Vec<Tool> {
    let list = fields.list("tools", faults).unwrap_or_default();
    if list.len() > MOST_TOOLS {
        faults.add(fields.at("tools"), format!("tools may hold up to {MOST_TOOLS} tools, not {}", list.len()));
        return Vec::new();
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let at: Vec<_> = fields.at("tools").into_iter().chain([i.into()]).collect();
        let Some(tool) = Fields::of(value, at, faults) else {
            continue;
        };
        if let Some(other) = tool.required_text("type", faults).filter(|t| *t != "function") {
            faults.add(tool.at("type"), format!("only tools of type function are served, not `{other}`"));
            continue;
        }
        let Some(function) = tool.get("function") else {
            faults.add(tool.at("function"), "function is required");
            continue;
        };
        let Some(function) = Fields::of(function, tool.at("function"), faults) else {
            continue;
        };
        if let Some(tool) = super::tool(&function, &tools, faults) {
            tools.push(tool);
        }
    }
    tools
}

fn tool_choice(fields: &Fields<'_>, tools: &[Tool], settings: &Settings, faults: &mut Faults) -> ToolChoice {
    let choice = match fields.get("tool_choice") {
        None => return ToolChoice::Auto,
        Some(Value::String(text)) => match text.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            other => {
                let allowed = "auto, none, required or a function";
                faults.add(fields.at("tool_choice"), format!("tool_choice has to be {allowed}, not `{other}`"));
                return ToolChoice::Auto;
            }
        },
        Some(value) => {
            let Some(choice) = Fields::of(value, fields.at("tool_choice"), faults) else {
                return ToolChoice::Auto;
            };
            if let Some(other) = choice.required_text("type", faults).filter(|kind| *kind != "function") {
                faults.add(choice.at("type"), format!("type has to be function, not `{other}`"));
            }
            let Some(function) = choice.get("function") else {
                faults.add(choice.at("function"), "function is required");
                return ToolChoice::Auto;
            };
            let Some(function) = Fields::of(function, choice.at("function"), faults) else {
                return ToolChoice::Auto;
            };
            let Some(name) = function.required_text("name", faults) else {
                return ToolChoice::Auto;
            };
            if !tools.iter().any(|tool| tool.name == name) && !settings.may_know(name) {
                faults.add(function.at("name"), format!("`{name}` is none of the request's tools"));
            }
            ToolChoice::Named(name.to_owned())
        }
    };
    if tools.is_empty() && !settings.has_tools() && choice != ToolChoice::None {
        if fields.get("tools").is_none() {
            faults.add(fields.at("tool_choice"), "tool_choice is only allowed with tools");
        } else if choice == ToolChoice::Required {
            faults.add(fields.at("tool_choice"), "tool_choice required needs at least one tool");
        }
    }
    choice
}

fn sampling(fields: &Fields<'_>, default: &Sampling, faults: &mut Faults) -> Sampling {
    let stop = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) if list.len() <= MOST_STOPS && list.iter().all(Value::is_string) => {
            list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        }
        Some(_) => {
            faults.add(fields.at("stop"), format!("stop has to be a string or a list of up to {MOST_STOPS} strings"));
            Vec::new()
        }
    };
    if stop.iter().any(String::is_empty) {
        faults.add(fields.at("stop"), "stop may not hold an empty string");
    }
    let logprobs = fields.flag("logprobs", faults).unwrap_or(false);
    let top_logprobs = fields.whole("top_logprobs", 0..=20, faults);
    if top_logprobs.is_some() && !logprobs {
        faults.add(fields.at("top_logprobs"), "top_logprobs needs logprobs to be true");
    }
    let max_tokens = fields.whole("max_tokens", 1..=i64::MAX, faults);
    let max_completion_tokens = fields.whole("max_completion_tokens", 1..=i64::MAX, faults);
    Sampling {
        temperature: fields.number("temperature", 0.0..=2.0, faults).map_or(default.temperature, |n| n as f32),
        top_p: fields.number("top_p", 0.0..=1.0, faults).map_or(default.top_p, |n| n as f32),
        max_tokens: max_completion_tokens.or(max_tokens).and_then(|n| usize::try_from(n).ok()).or(default.max_tokens),
        stop: stop.into_iter().filter(|text| !text.is_empty()).collect(),
        seed: fields.whole("seed", i64::MIN..=i64::MAX, faults).map(|seed| seed as u64).or(default.seed),
        logit_bias: logit_bias(fields, faults),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0, faults).unwrap_or(0.0) as f32,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0, faults).unwrap_or(0.0) as f32,
        logprobs: logprobs.then(|| top_logprobs.unwrap_or(0) as usize),
    }
}

fn logit_bias(fields: &Fields<'_>, faults: &mut Faults) -> Vec<(u32, f32)> {
    let Some(value) = fields.get("logit_bias") else {
        return Vec::new();
    };
    let Value::Object(map) = value else {
        faults.add(fields.at("logit_bias"), format!("logit_bias has to be an object, not {}", kind(value)));
        return Vec::new();
    };
    let mut biases = Vec::with_capacity(map.len());
    for (token, bias) in map {
        match (token.parse(), bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))) {
            (Ok(token), Some(bias)) => biases.push((token, bias as f32)),
            _ => {
                let at = fields.at("logit_bias").into_iter().chain([token.clone().into()]).collect();
                faults.add(at, "logit_bias has to map token ids to numbers from -100 to 100");
            }
        }
    }
    biases
}

fn format(fields: &Fields<'_>, faults: &mut Faults) -> OutputFormat {
    let Some(value) = fields.get("response_format") else {
        return OutputFormat::Text;
    };
    let Some(format) = Fields::of(value, fields.at("response_format"), faults) else {
        return OutputFormat::Text;
    };
    match format.required_text("type", faults) {
        Some("json_object") => OutputFormat::JsonObject,
        Some("json_schema") => {
            let Some(value) = format.get("json_schema") else {
                faults.add(format.at("json_schema"), "json_schema is required");
                return OutputFormat::Text;
            };
            let Some(named) = Fields::of(value, format.at("json_schema"), faults) else {
                return OutputFormat::Text;
            };
            match named.get("schema") {
                None => OutputFormat::JsonObject,
                Some(schema) if schema.is_object() => OutputFormat::JsonSchema(schema.clone()),
                Some(other) => {
                    faults.add(named.at("schema"), format!("schema has to be an object, not {}", kind(other)));
                    OutputFormat::Text
                }
            }
        }
        Some("text") | None => OutputFormat::Text,
        Some(other) => {
            let allowed = "text, json_object or json_schema";
            faults.add(format.at("type"), format!("type has to be {allowed}, not `{other}`"));
            OutputFormat::Text
        }
    }
}

// === an agent ===

/// Events on their way from the session to the answer.
const DELIVERIES: usize = 32;

/// Lets an agent answer: its tools run here, in as many rounds as it takes, and the caller reads what is said, and calls of
/// their own tools.
///
/// # Errors
/// What the turn fails with before its first event.
pub async fn agent_turn(
    request: &mut Request,
    electron: Arc<dyn Model>,
    access: &dyn Access,
    sessions: &Sessions,
    bounds: Bounds,
) -> Result<TurnStream, Error> {
    let turn = &mut request.turn;
    let mut settings = request.settings.clone();
    settings.tools = turn.tools.clone();
    settings.tool_choice = turn.tool_choice.clone();
    settings.parallel_tool_calls = turn.parallel_tool_calls;
    settings.sampling = turn.sampling.clone();
    settings.format = turn.format.clone();
    let mut history = History::default();
    history.extend(&items(std::mem::take(&mut turn.messages)), "messages", bounds)?;
    let watch = access.admit(&request.model)?;
    let owner = access.owner().clone();
    let session = sessions.open(electron, owner, "chat_completions", settings.clone(), OnLeave::End, None)?;
    let (sender, mut deliveries) = tokio::sync::mpsc::channel(DELIVERIES);
    session.attach(Outlet { sender, tag: 0 }, OnLeave::End, None, false).await?;
    let respond = Respond {
        id: new_id("resp"),
        settings: Arc::new(settings),
        base: Some(crate::session::Base { history, response: None }),
        input: Vec::new(),
        transcript: None,
        context: None,
        in_conversation: true,
        lasting: false,
        needs_outputs: false,
        generate: true,
        keep: false,
        store: false,
        watch,
    };
    session.send(None, crate::session::Action::Respond(Box::new(respond))).await?;
    let broken = || Error::Internal("a session ended before its response".into());
    let first = deliveries.recv().await.ok_or_else(broken)?;
    if let Event::Refused { error, .. } = &*first.event {
        return Err(error.clone());
    }
    let progress = Arc::<crate::turn::Progress>::default();
    let state = (Said::default(), deliveries, progress.clone());
    let events = stream::unfold(state, |(mut said, mut deliveries, progress)| async move {
        loop {
            if let Some(event) = said.ready.pop_front() {
                return Some((event, (said, deliveries, progress)));
            }
            if said.over {
                return None;
            }
            match deliveries.recv().await {
                Some(delivery) => said.take(&delivery, &progress),
                None => {
                    said.over = true;
                    let broken = Error::Internal("a session ended before its response".into());
                    return Some((Err(broken), (said, deliveries, progress)));
                }
            }
        }
    });
    Ok(TurnStream::new(events, progress))
}

/// The messages of a request as a conversation.
fn items(messages: Vec<Message>) -> Vec<Arc<Item>> {
    let mut items = Vec::with_capacity(messages.len());
    let mut add = |content: Content| {
        items.push(Arc::new(Item { id: new_id("item"), content, status: Status::Completed }));
    };
    let message = |role: Role, text: String| Content::Message { role, text, phase: Default::default() };
    for said in messages {
        match said {
            Message::System(text) => add(message(Role::System, text)),
            Message::User(text) => add(message(Role::User, text)),
            Message::Assistant { content, tool_calls } => {
                if let Some(text) = content {
                    add(message(Role::Assistant, text));
                }
                for ToolCall { id, name, arguments } in tool_calls {
                    add(Content::Call { call_id: id.into(), name, arguments, run: None });
                }
            }
            Message::Tool { call_id, content } => add(Content::Output { call_id: call_id.into(), output: content }),
        }
    }
    items
}

/// What a session's events are to a caller who asked once.
#[derive(Default)]
struct Said {
    ready: std::collections::VecDeque<Result<TurnEvent, Error>>,
    /// Whether the next message follows another one.
    spoken: bool,
    /// Calls of the caller's own tools.
    calls: usize,
    over: bool,
}

impl Said {
    fn take(&mut self, delivery: &Delivery, progress: &crate::turn::Progress) {
        let index = self.calls.saturating_sub(1);
        match &*delivery.event {
            Event::OutputBegun { item, .. } => match &item.content {
                Content::Call { call_id, name, run: None, .. } => {
                    let (id, name) = (call_id.to_string(), name.clone());
                    self.ready.push_back(Ok(TurnEvent::CallBegun { index: self.calls, id, name }));
                    self.calls += 1;
                }
                Content::Message { .. } if self.spoken => {
                    self.ready.push_back(Ok(TurnEvent::Text { delta: " ".into(), logprobs: Vec::new() }));
                }
                _ => {}
            },
            Event::Text { delta, logprobs, .. } => {
                self.spoken = true;
                let text = TurnEvent::Text { delta: delta.clone(), logprobs: logprobs.clone() };
                self.ready.push_back(Ok(text));
            }
            Event::Arguments { at, delta } if !at.runs => {
                self.ready.push_back(Ok(TurnEvent::Arguments { index, delta: delta.clone() }));
            }
            Event::OutputEnded { item, .. } if item.call().is_some() && item.run().is_none() => {
                self.ready.push_back(Ok(TurnEvent::CallEnded { index }));
            }
            Event::Ended(response) => {
                self.over = true;
                progress.set(response.usage);
                let reason = match &response.outcome {
                    Some(Outcome::Failed(error)) => return self.ready.push_back(Err(error.clone())),
                    Some(Outcome::Length) => FinishReason::Length,
                    Some(Outcome::Cancelled) => FinishReason::Cancelled,
                    _ if self.calls > 0 => FinishReason::ToolCalls,
                    _ => FinishReason::Stop,
                };
                self.ready.push_back(Ok(TurnEvent::Finished { reason, usage: response.usage }));
            }
            _ => {}
        }
    }
}

// === render ===

/// What all parts of one answer have in common.
#[derive(Clone, Debug, Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: Arc<str>,
}

#[derive(Serialize)]
struct Completion {
    #[serde(flatten)]
    head: Head,
    choices: [Choice; 1],
    usage: UsageFigures,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    message: AnswerMessage,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct AnswerMessage {
    role: &'static str,
    content: Option<String>,
    refusal: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<AnswerCall>,
}

#[derive(Serialize)]
struct AnswerCall {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: AnswerFunction,
}

#[derive(Serialize)]
struct AnswerFunction {
    name: String,
    arguments: String,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[DeltaCall<'a>; 1]>,
}

#[derive(Serialize)]
struct DeltaCall<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: DeltaFunction<'a>,
}

#[derive(Serialize)]
struct DeltaFunction<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

#[derive(Clone, Copy, Serialize)]
struct UsageFigures {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<LogprobEntry>,
    refusal: Option<&'static str>,
}

#[derive(Serialize)]
struct LogprobEntry {
    #[serde(flatten)]
    token: LogprobToken,
    top_logprobs: Vec<LogprobToken>,
}

#[derive(Serialize)]
struct LogprobToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl From<Usage> for UsageFigures {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens },
        }
    }
}

impl Head {
    fn new(object: &'static str, model: &str) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        Self { id: format!("chatcmpl-{}", Uuid::now_v7().simple()), object, created, model: model.into() }
    }
}

fn logprob_token(bytes: Vec<u8>, logprob: f32) -> LogprobToken {
    // JSON has no infinity; a token that could not come at all is given the least likelihood of a double.
    const IMPOSSIBLE: f32 = -9999.0;
    LogprobToken { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: logprob.max(IMPOSSIBLE), bytes }
}

fn logprob_entries(tokens: Vec<TokenLogprob>) -> impl Iterator<Item = LogprobEntry> {
    tokens.into_iter().map(|token| LogprobEntry {
        token: logprob_token(token.bytes, token.logprob),
        top_logprobs: token.top.into_iter().map(|(bytes, logprob)| logprob_token(bytes, logprob)).collect(),
    })
}

/// Collects a turn into one answer.
///
/// # Errors
/// What the turn fails with.
async fn whole(
    mut events: TurnStream,
    model: &str,
    wants_logprobs: bool,
    deadline: Instant,
) -> Result<Completion, Error> {
    let mut text = String::new();
    let mut calls: Vec<AnswerCall> = Vec::new();
    let mut logprobs = Vec::new();
    loop {
        match next(&mut events, deadline).await? {
            TurnEvent::Text { delta, logprobs: tokens } => {
                text.push_str(&delta);
                logprobs.extend(logprob_entries(tokens));
            }
            TurnEvent::CallBegun { id, name, .. } => {
                calls.push(AnswerCall {
                    id,
                    kind: "function",
                    function: AnswerFunction { name, arguments: String::new() },
                });
            }
            TurnEvent::Arguments { index, delta } => {
                if let Some(call) = calls.get_mut(index) {
                    call.function.arguments.push_str(&delta);
                }
            }
            TurnEvent::CallEnded { .. } => {}
            TurnEvent::Finished { reason, usage } => {
                let content = (!text.is_empty() || calls.is_empty()).then_some(text);
                let message = AnswerMessage { role: "assistant", content, refusal: None, tool_calls: calls };
                let logprobs = wants_logprobs.then_some(Logprobs { content: logprobs, refusal: None });
                let choice = Choice { index: 0, message, logprobs, finish_reason: reason.as_str() };
                return Ok(Completion {
                    head: Head::new("chat.completion", model),
                    choices: [choice],
                    usage: usage.into(),
                });
            }
        }
    }
}

/// Renders a turn as server-sent events, each the moment that it comes.
struct Sse {
    /// What all chunks begin with.
    opening: Vec<u8>,
    include_usage: bool,
    wants_logprobs: bool,
    /// Whether the first chunk, which names the role, was sent.
    begun: bool,
}

impl Sse {
    fn new(head: &Head, include_usage: bool, wants_logprobs: bool) -> Self {
        let mut opening = b"data: ".to_vec();
        // These types hold nothing that cannot be written as JSON.
        let _ = serde_json::to_writer(&mut opening, head);
        // The object goes on.
        opening.pop();
        Self { opening, include_usage, wants_logprobs, begun: false }
    }

    /// The text of an event's chunks.
    fn render(&mut self, event: TurnEvent) -> Vec<u8> {
        let mut out = Vec::with_capacity(320);
        if !self.begun {
            self.begun = true;
            let delta = Delta { role: Some("assistant"), content: Some(""), tool_calls: None };
            self.chunk(&mut out, delta, None, None);
        }
        let call = |index, id, kind, name, arguments| Delta {
            tool_calls: Some([DeltaCall { index, id, kind, function: DeltaFunction { name, arguments } }]),
            ..Delta::default()
        };
        match &event {
            TurnEvent::Text { delta, logprobs } => {
                let logprobs = self
                    .wants_logprobs
                    .then(|| Logprobs { content: logprob_entries(logprobs.clone()).collect(), refusal: None });
                self.chunk(&mut out, Delta { content: Some(delta), ..Delta::default() }, logprobs, None);
            }
            TurnEvent::CallBegun { index, id, name } => {
                self.chunk(&mut out, call(*index, Some(id), Some("function"), Some(name), ""), None, None);
            }
            TurnEvent::Arguments { index, delta } => {
                self.chunk(&mut out, call(*index, None, None, None, delta), None, None);
            }
            TurnEvent::CallEnded { .. } => {}
            TurnEvent::Finished { reason, usage } => {
                self.chunk(&mut out, Delta::default(), None, Some(*reason));
                if self.include_usage {
                    self.write(&mut out, &[], Some((*usage).into()));
                }
                out.extend_from_slice(b"data: [DONE]\n\n");
            }
        }
        out
    }

    fn chunk(&self, out: &mut Vec<u8>, delta: Delta<'_>, logprobs: Option<Logprobs>, reason: Option<FinishReason>) {
        let choice = ChunkChoice { index: 0, delta, logprobs, finish_reason: reason.map(FinishReason::as_str) };
        self.write(out, &[choice], None);
    }

    fn write(&self, out: &mut Vec<u8>, choices: &[ChunkChoice<'_>], usage: Option<UsageFigures>) {
        out.extend_from_slice(&self.opening);
        out.extend_from_slice(b",\"choices\":");
        let _ = serde_json::to_writer(&mut *out, choices);
        // Absent unless it was asked for, and then null but for the last chunk.
        if self.include_usage {
            out.extend_from_slice(b",\"usage\":");
            let _ = serde_json::to_writer(&mut *out, &usage);
        }
        out.extend_from_slice(b"}\n\n");
    }
}

/// The next event, or an error when the turn takes too long.
async fn next(events: &mut TurnStream, deadline: Instant) -> Result<TurnEvent, Error> {
    match tokio::time::timeout_at(deadline, events.next()).await {
        Ok(Some(event)) => event,
        Ok(None) => Err(Error::EngineFailed("it stopped in the middle of an answer".into())),
        Err(_) => Err(Error::EngineFailed("the answer took longer than the server's request_timeout".into())),
    }
}

// === handler ===

/// What a handler needs to answer.
pub struct Answering {
    /// The turn that runs.
    pub events: TurnStream,
    /// The model's name, as the client gave it.
    pub model: String,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// Whether the stream ends with usage figures.
    pub include_usage: bool,
    /// Whether log-probabilities were asked for.
    pub wants_logprobs: bool,
    /// For errors in mid-stream.
    pub request_id: String,
    /// When the turn has to be over.
    pub deadline: Instant,
}

/// Answers a request from its running turn.
///
/// # Errors
/// What the turn fails with before its first event; later failures end the stream with an error event.
pub async fn answer(mut answering: Answering) -> Result<Response<Body>, Error> {
    if !answering.stream {
        let Answering { events, model, wants_logprobs, deadline, .. } = answering;
        let completion = whole(events, &model, wants_logprobs, deadline).await?;
        let body = serde_json::to_vec(&completion).map_err(|e| Error::Internal(e.to_string()))?;
        return Ok(response("application/json", Body::from(body)));
    }
    // Until the first event the status is open, so that a failure before it is a plain error response.
    let first = next(&mut answering.events, answering.deadline).await?;
    let mut response = response("text/event-stream", Body::from_stream(sse(answering, first)));
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells nginx and its like to pass on each event as it comes.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn sse(answering: Answering, first: TurnEvent) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let Answering { events, model, include_usage, wants_logprobs, request_id, deadline, .. } = answering;
    let render = Sse::new(&Head::new("chat.completion.chunk", &model), include_usage, wants_logprobs);
    let state = (render, events, Some(Ok(first)), request_id, false);
    stream::unfold(state, move |(mut render, mut events, ready, request_id, over)| async move {
        if over {
            return None;
        }
        let event = match ready {
            Some(event) => event,
            None => next(&mut events, deadline).await,
        };
        let (text, over) = match event {
            Ok(event) => {
                let over = matches!(event, TurnEvent::Finished { .. });
                (render.render(event), over)
            }
            Err(e) => {
                let body = serde_json::to_string(&e.body(&request_id)).unwrap_or_default();
                (format!("data: {body}\n\n").into_bytes(), true)
            }
        };
        Some((Ok(Bytes::from(text)), (render, events, None, request_id, over)))
    })
}

fn response(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The list of models for `GET /v1/models`.
pub fn models<'a>(names: impl IntoIterator<Item = &'a str>, started: u64) -> Value {
    let data: Vec<Value> = names
        .into_iter()
        .map(|name| serde_json::json!({"id": name, "object": "model", "created": started, "owned_by": "electron-gateway"}))
        .collect();
    serde_json::json!({"object": "list", "data": data})
}
