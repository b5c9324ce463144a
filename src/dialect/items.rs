//! Items, tools and settings as OpenAI's Responses and Realtime APIs both write them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::{Value, json};
use url::Url;

use super::fields::{Faults, Fields, kind};
use crate::{
    error::PathPart,
    secret::Secret,
    session::{Answer, Content, Id, Item, Phase, Role, Run, RunState, Settings, Status, new_id},
    tool::{
        By, CALLBACKS, Hand, Kit, OnInterrupt,
        guard::Guard,
        http::Callback,
        mcp::{Approval, Server},
    },
    turn::{OutputFormat, Tool, ToolChoice},
};

/// Most tools of a session or a request.
const MOST_TOOLS: usize = 64;
/// Most MCP servers of a session or a request.
const MOST_SERVERS: usize = 16;
/// How long a client's tools may take where it says nothing.
const TOOL_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that it may say.
const LONGEST_TOOL_TIMEOUT: i64 = 600;
/// Longest id that a client may give.
const LONGEST_ID: usize = 64;

// === parse ===

/// An item as a client gives it. A message may leave its `type` out.
pub(super) fn item(value: &Value, path: Vec<PathPart>, faults: &mut Faults) -> Option<Arc<Item>> {
    let fields = Fields::of(value, path, faults)?;
    let given = id(&fields, "id", faults);
    let prefix = match fields.get("type").map(|kind| kind.as_str().unwrap_or_default()) {
        None | Some("message") => "msg",
        Some("function_call") => "fc",
        Some("function_call_output") => "fco",
        Some("mcp_call") => "mcp",
        Some("mcp_list_tools") => "mcpl",
        Some("mcp_approval_response") => "mcpa",
        Some(other) => {
            let allowed =
                "message, function_call, function_call_output, mcp_call, mcp_list_tools or mcp_approval_response";
            faults.add(fields.at("type"), format!("type has to be {allowed}, not `{other}`"));
            return None;
        }
    };
    let content = match prefix {
        "msg" => message(&fields, faults)?,
        "fc" => Content::Call {
            call_id: required_id(&fields, "call_id", faults)?,
            name: fields.required_text("name", faults)?.to_owned(),
            arguments: fields.required_text("arguments", faults)?.to_owned(),
            run: None,
        },
        "mcp" => ran(&fields, faults)?,
        "mcpl" => Content::Listing {
            server: fields.required_text("server_label", faults)?.into(),
            // What a client sends again of an earlier conversation; the server is asked itself.
            tools: Ok(Arc::new([])),
        },
        "mcpa" => Content::Approval {
            request: required_id(&fields, "approval_request_id", faults)?,
            approve: match fields.flag("approve", faults) {
                Some(approve) => approve,
                None => {
                    faults.add(fields.at("approve"), "approve is required: true or false");
                    return None;
                }
            },
        },
        _ => Content::Output {
            call_id: required_id(&fields, "call_id", faults)?,
            output: match fields.get("output") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(parts)) => texts(parts, &fields, "output", faults),
                Some(other) => {
                    let what = kind(other);
                    faults.add(fields.at("output"), format!("output has to be a string, not {what}"));
                    return None;
                }
                None => {
                    faults.add(fields.at("output"), "output is required");
                    return None;
                }
            },
        },
    };
    let status = match fields.text("status", faults) {
        Some("incomplete") => Status::Incomplete,
        _ => Status::Completed,
    };
    Some(Arc::new(Item { id: given.unwrap_or_else(|| new_id(prefix)), content, status }))
}

/// A call that the gateway ran, in a conversation that a client sends again.
fn ran(fields: &Fields<'_>, faults: &mut Faults) -> Option<Content> {
    let error = fields.get("error").map(|error| {
        let told = [error.pointer("/content/0/text"), error.get("message"), Some(error)];
        told.into_iter().flatten().find_map(Value::as_str).map_or_else(|| error.to_string(), str::to_owned)
    });
    let output = match (fields.text("output", faults), &error) {
        (Some(output), _) => output.to_owned(),
        (None, Some(error)) => json!({"error": error}).to_string(),
        (None, None) => String::new(),
    };
    Some(Content::Call {
        call_id: id(fields, "call_id", faults).unwrap_or_else(|| new_id("call")),
        name: fields.required_text("name", faults)?.to_owned(),
        arguments: fields.required_text("arguments", faults)?.to_owned(),
        run: Some(Run {
            server: fields.text("server_label", faults).unwrap_or(CALLBACKS).into(),
            state: RunState::Done(Answer { output, error }),
            approval: id(fields, "approval_request_id", faults),
        }),
    })
}

fn message(fields: &Fields<'_>, faults: &mut Faults) -> Option<Content> {
    let role = match fields.required_text("role", faults)? {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        other => {
            let allowed = "system, developer, user or assistant";
            faults.add(fields.at("role"), format!("role has to be {allowed}, not `{other}`"));
            return None;
        }
    };
    let text = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => texts(parts, fields, "content", faults),
        Some(other) => {
            let what = kind(other);
            faults.add(fields.at("content"), format!("content has to be a string or a list of parts, not {what}"));
            return None;
        }
        None => {
            faults.add(fields.at("content"), "content is required");
            return None;
        }
    };
    let phase = if fields.text("phase", faults) == Some("commentary") { Phase::Filler } else { Phase::Answer };
    Some(Content::Message { role, text, phase })
}

/// The texts of a list of parts, joined.
fn texts(parts: &[Value], fields: &Fields<'_>, name: &'static str, faults: &mut Faults) -> String {
    let mut whole = String::new();
    for (i, part) in parts.iter().enumerate() {
        let at: Vec<_> = fields.at(name).into_iter().chain([i.into()]).collect();
        let Some(part) = Fields::of(part, at, faults) else { continue };
        match part.required_text("type", faults) {
            Some("input_text" | "output_text" | "text") => {
                whole.push_str(part.required_text("text", faults).unwrap_or_default());
            }
            Some(other) => {
                let why = format!("only text is served: input_text or output_text, not `{other}`");
                faults.add(part.at("type"), why);
            }
            None => {}
        }
    }
    whole
}

/// An id that a client may give.
pub(super) fn id(fields: &Fields<'_>, name: &'static str, faults: &mut Faults) -> Option<Id> {
    let id = fields.text(name, faults)?;
    if id.is_empty() || id.len() > LONGEST_ID || !id.bytes().all(|b| b.is_ascii_graphic()) {
        faults.add(fields.at(name), format!("{name} has to be 1 to {LONGEST_ID} visible ASCII characters"));
        return None;
    }
    Some(id.into())
}

/// An id that has to be there.
pub(super) fn required_id(fields: &Fields<'_>, name: &'static str, faults: &mut Faults) -> Option<Id> {
    if fields.get(name).is_none() {
        faults.add(fields.at(name), format!("{name} is required"));
    }
    id(fields, name, faults)
}

/// Tools, each with its name at the top: `{"type": "function", "name", "description", "parameters"}`, with a `callback` where
/// the gateway runs it; and MCP servers: `{"type": "mcp", "server_label", "server_url", …}`.
pub(super) fn tools(fields: &Fields<'_>, guard: &Guard, faults: &mut Faults) -> Option<(Vec<Tool>, Kit)> {
    let list = fields.list("tools", faults)?;
    if list.len() > MOST_TOOLS {
        faults.add(fields.at("tools"), format!("tools may hold up to {MOST_TOOLS} tools, not {}", list.len()));
        return None;
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    let mut kit = Kit::default();
    for (i, value) in list.iter().enumerate() {
        let at: Vec<_> = fields.at("tools").into_iter().chain([i.into()]).collect();
        let Some(tool) = Fields::of(value, at, faults) else { continue };
        match tool.required_text("type", faults) {
            Some("function") => {
                let Some(parsed) = super::tool(&tool, &tools, faults) else { continue };
                if let Some(callback) = tool.get("callback")
                    && let Some(callback) = Fields::of(callback, tool.at("callback"), faults)
                    && let Some(hand) = callback_hand(&callback, guard, faults)
                {
                    kit.hands.insert(parsed.name.clone(), Arc::new(hand));
                }
                tools.push(parsed);
            }
            Some("mcp") if kit.servers.len() >= MOST_SERVERS => {
                faults.add(fields.at("tools"), format!("tools may hold up to {MOST_SERVERS} MCP servers"));
            }
            Some("mcp") => {
                let Some(server) = server(&tool, guard, faults) else { continue };
                if kit.servers.iter().any(|other| other.label == server.label) {
                    faults.add(tool.at("server_label"), format!("`{}` is the label of two servers", server.label));
                }
                kit.servers.push(Arc::new(server));
            }
            Some(other) => {
                let why = format!("only tools of type function and mcp are served, not `{other}`");
                faults.add(tool.at("type"), why);
            }
            None => {}
        }
    }
    Some((tools, kit))
}

/// A URL that a client names, if the gateway may ask it.
fn named_url(fields: &Fields<'_>, name: &'static str, guard: &Guard, faults: &mut Faults) -> Option<Url> {
    let text = fields.required_text(name, faults)?;
    let Ok(url) = Url::parse(text) else {
        faults.add(fields.at(name), format!("{name} has to be a URL such as https://bot.example.com/tools"));
        return None;
    };
    if !guard.allows(&url) {
        let why = format!("this {name} is not on the server's allow-list; its operator can add it to tools.allow_urls");
        faults.add(fields.at(name), why);
        return None;
    }
    if let Err(why) = guard.check(&url) {
        faults.add(fields.at(name), why);
        return None;
    }
    Some(url)
}

fn headers(fields: &Fields<'_>, faults: &mut Faults) -> BTreeMap<String, Secret> {
    let mut headers = BTreeMap::new();
    let given = fields.get("headers").and_then(|value| Fields::of(value, fields.at("headers"), faults));
    if let Some(given) = given {
        for name in given.names() {
            let valid = axum::http::HeaderName::from_bytes(name.as_bytes()).is_ok();
            match given.get(name).and_then(Value::as_str) {
                Some(value) if valid && axum::http::HeaderValue::from_str(value).is_ok() => {
                    headers.insert(name.to_owned(), Secret::literal(value));
                }
                _ => faults.add(given.at_any(name), "headers have to be names of HTTP headers with strings"),
            }
        }
    }
    headers
}

fn callback_hand(fields: &Fields<'_>, guard: &Guard, faults: &mut Faults) -> Option<Hand> {
    let seconds = fields.whole("timeout", 1..=LONGEST_TOOL_TIMEOUT, faults);
    let on_interrupt = match fields.text("on_interrupt", faults) {
        None | Some("cancel") => OnInterrupt::Cancel,
        Some("finish") => OnInterrupt::Finish,
        Some(other) => {
            faults.add(fields.at("on_interrupt"), format!("on_interrupt has to be cancel or finish, not `{other}`"));
            OnInterrupt::Cancel
        }
    };
    let callback = Callback {
        url: named_url(fields, "url", guard, faults)?,
        timeout: seconds.map_or(TOOL_TIMEOUT, |seconds| Duration::from_secs(seconds as u64)),
        secret: Secret::literal(fields.text("secret", faults).unwrap_or_default()),
        headers: headers(fields, faults),
        idempotent: fields.flag("idempotent", faults).unwrap_or(false),
    };
    if let Err(why) = callback.check(guard) {
        faults.add(fields.at("secret"), why);
    }
    Some(Hand { by: By::Callback(callback), on_interrupt, approval: false })
}

fn server(fields: &Fields<'_>, guard: &Guard, faults: &mut Faults) -> Option<Server> {
    let label = fields.required_text("server_label", faults)?;
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if label.is_empty() || label.len() > 64 || !label.chars().all(valid) {
        faults.add(fields.at("server_label"), "server_label has to be 1 to 64 letters, digits, underscores or dashes");
    }
    if fields.get("connector_id").is_some() {
        faults.add(fields.at("connector_id"), "connectors are not served; give a server_url");
    }
    let url = named_url(fields, "server_url", guard, faults)?;
    let mut headers = headers(fields, faults);
    if let Some(token) = fields.text("authorization", faults) {
        headers.insert("authorization".into(), Secret::literal(&format!("Bearer {token}")));
    }
    let allowed_tools = match fields.get("allowed_tools") {
        None => None,
        Some(Value::Object(filter)) => names(filter.get("tool_names"), fields.at("allowed_tools"), faults),
        list => names(list, fields.at("allowed_tools"), faults),
    };
    let approval = match fields.get("require_approval") {
        // As the hosted service has it.
        None => Approval::Always,
        Some(Value::String(word)) if word == "always" => Approval::Always,
        Some(Value::String(word)) if word == "never" => Approval::Never,
        Some(Value::Object(filter)) => {
            let mut of = |name: &str| {
                let list = filter.get(name).and_then(|filter| filter.get("tool_names"));
                list.and_then(|list| names(Some(list), fields.at("require_approval"), faults)).unwrap_or_default()
            };
            Approval::Some { always: of("always"), never: of("never") }
        }
        Some(_) => {
            faults.add(fields.at("require_approval"), "require_approval has to be always, never or a filter");
            Approval::Always
        }
    };
    let timeout = Duration::from_secs(30);
    Some(Server { label: label.to_owned(), url: url.into(), headers, allowed_tools, approval, timeout })
}

fn names(value: Option<&Value>, at: Vec<PathPart>, faults: &mut Faults) -> Option<Vec<String>> {
    let list = value.and_then(Value::as_array);
    let names: Option<Vec<String>> = list.and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
    if names.is_none() {
        faults.add(at, "a list of tools' names is expected");
    }
    names
}

/// Whether the model may call: a word, or one tool by its name.
pub(super) fn tool_choice(fields: &Fields<'_>, settings: &Settings, faults: &mut Faults) -> Option<ToolChoice> {
    let choice = match fields.get("tool_choice")? {
        Value::String(text) => match text.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            other => {
                let allowed = "auto, none, required or a function";
                faults.add(fields.at("tool_choice"), format!("tool_choice has to be {allowed}, not `{other}`"));
                return None;
            }
        },
        value => {
            let choice = Fields::of(value, fields.at("tool_choice"), faults)?;
            let name = match choice.required_text("type", faults)? {
                "function" => choice.required_text("name", faults)?,
                // Any tool of a server, or the one that is named.
                "mcp" => {
                    choice.required_text("server_label", faults)?;
                    match choice.text("name", faults) {
                        Some(name) => name,
                        None if settings.has_tools() => return Some(ToolChoice::Required),
                        None => "",
                    }
                }
                other => {
                    faults.add(choice.at("type"), format!("type has to be function or mcp, not `{other}`"));
                    return None;
                }
            };
            if !settings.may_know(name) {
                faults.add(choice.at("name"), format!("`{name}` is none of the tools"));
            }
            ToolChoice::Named(name.to_owned())
        }
    };
    if choice == ToolChoice::Required && !settings.has_tools() {
        faults.add(fields.at("tool_choice"), "tool_choice required needs at least one tool");
    }
    Some(choice)
}

// === render ===

/// A tool as it was declared.
pub(super) fn tool_value(tool: &Tool) -> Value {
    json!({"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters,
           "strict": false})
}

/// All tools of a client as it declared them, its secrets left out.
pub(super) fn tools_value(settings: &Settings) -> Vec<Value> {
    let functions = settings.tools.iter().map(|tool| {
        let mut value = tool_value(tool);
        if let Some(By::Callback(callback)) = settings.kit.hands.get(&tool.name).map(|hand| &hand.by) {
            value["callback"] = json!({"url": callback.url.as_str(), "timeout": callback.timeout.as_secs(),
                                       "idempotent": callback.idempotent});
        }
        value
    });
    let servers = settings.kit.servers.iter().map(|server| {
        let approval = match &server.approval {
            Approval::Always => "always".into(),
            Approval::Never => "never".into(),
            Approval::Some { always, never } => {
                json!({"always": {"tool_names": always}, "never": {"tool_names": never}})
            }
        };
        json!({"type": "mcp", "server_label": server.label, "server_url": server.url,
               "allowed_tools": server.allowed_tools, "require_approval": approval, "headers": null})
    });
    functions.chain(servers).collect()
}

/// A tool choice as it was given.
pub(super) fn tool_choice_value(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::Auto => "auto".into(),
        ToolChoice::None => "none".into(),
        ToolChoice::Required => "required".into(),
        ToolChoice::Named(name) => json!({"type": "function", "name": name}),
    }
}

/// The form of an answer as the Responses API writes it.
pub(super) fn format_value(format: &OutputFormat) -> Value {
    match format {
        OutputFormat::Text => json!({"type": "text"}),
        OutputFormat::JsonObject => json!({"type": "json_object"}),
        OutputFormat::JsonSchema(schema) => json!({"type": "json_schema", "name": "answer", "schema": schema}),
    }
}

/// How far an item came.
pub(super) fn status(status: Status) -> &'static str {
    match status {
        Status::InProgress => "in_progress",
        Status::Completed => "completed",
        Status::Incomplete => "incomplete",
    }
}

/// The name of a role.
pub(super) fn role(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    }
}

/// An item. `text_part` makes the parts of the model's messages, which the two APIs write differently.
pub(super) fn item_value(item: &Item, text_part: impl Fn(&str) -> Value) -> Value {
    let status = status(item.status);
    match &item.content {
        Content::Message { role: speaker, text, phase } => {
            let part = match speaker {
                Role::Assistant => text_part(text),
                _ => json!({"type": "input_text", "text": text}),
            };
            // An item that has just begun has no parts.
            let empty = item.status == Status::InProgress && text.is_empty();
            let content = if empty { Value::Array(Vec::new()) } else { Value::Array(vec![part]) };
            let mut value = json!({"id": item.id, "type": "message", "status": status, "role": role(*speaker),
                                   "content": content});
            if *phase != Phase::Answer {
                value["phase"] = "commentary".into();
            }
            value
        }
        Content::Call { name, arguments, run: Some(run), .. }
            if matches!(run.state, RunState::AwaitsApproval | RunState::Approved) =>
        {
            json!({
                "id": item.id, "type": "mcp_approval_request", "server_label": run.server, "name": name,
                "arguments": arguments,
            })
        }
        Content::Call { call_id, name, arguments, run: Some(run) } => {
            let status = match &run.state {
                RunState::Done(Answer { error: Some(_), .. }) => "failed",
                RunState::Done(_) => "completed",
                RunState::Running => "calling",
                _ if item.status == Status::Incomplete => "incomplete",
                RunState::Called | RunState::AwaitsApproval | RunState::Approved => "in_progress",
            };
            let (output, error) = match &run.state {
                RunState::Done(Answer { error: Some(error), .. }) => {
                    let content = json!([{"type": "text", "text": error}]);
                    (None, Some(json!({"type": "mcp_tool_execution_error", "content": content})))
                }
                RunState::Done(answer) => (Some(answer.output.as_str()), None),
                _ => (None, None),
            };
            json!({
                "id": item.id, "type": "mcp_call", "status": status, "call_id": call_id, "server_label": run.server,
                "name": name, "arguments": arguments, "output": output, "error": error,
                "approval_request_id": run.approval,
            })
        }
        Content::Listing { server, tools } => {
            let (tools, error) = match tools {
                Ok(tools) => (tools.iter().map(listed_value).collect(), None),
                Err(error) => (Vec::new(), Some(error)),
            };
            json!({"id": item.id, "type": "mcp_list_tools", "server_label": server, "tools": tools, "error": error})
        }
        Content::Approval { request, approve } => json!({
            "id": item.id, "type": "mcp_approval_response", "approval_request_id": request, "approve": approve,
        }),
        Content::Call { call_id, name, arguments, run: None } => json!({
            "id": item.id, "type": "function_call", "status": status, "call_id": call_id, "name": name,
            "arguments": arguments,
        }),
        Content::Output { call_id, output } => json!({
            "id": item.id, "type": "function_call_output", "status": status, "call_id": call_id, "output": output,
        }),
    }
}

fn listed_value(tool: &Tool) -> Value {
    json!({"name": tool.name, "description": tool.description, "input_schema": tool.parameters, "annotations": null})
}

/// The event that tells how a call of the gateway's, or the listing of a server's tools, ended. Its name is preceded by
/// `response.` where it is part of one.
pub(super) fn settled(item: &Item) -> Option<&'static str> {
    match &item.content {
        Content::Call { run: Some(Run { state: RunState::Done(answer), .. }), .. } => match answer.error {
            None => Some("response.mcp_call.completed"),
            Some(_) => Some("response.mcp_call.failed"),
        },
        Content::Listing { tools: Ok(_), .. } => Some("response.mcp_list_tools.completed"),
        Content::Listing { tools: Err(_), .. } => Some("response.mcp_list_tools.failed"),
        _ => None,
    }
}
