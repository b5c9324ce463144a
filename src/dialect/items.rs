//! Items, tools and settings as OpenAI's Responses and Realtime APIs both write them.

use std::sync::Arc;

use serde_json::{Value, json};

use super::fields::{Faults, Fields, kind};
use crate::{
    error::PathPart,
    session::{Content, Id, Item, Role, Status, new_id},
    turn::{OutputFormat, Tool, ToolChoice},
};

/// Most tools of a session or a request.
const MOST_TOOLS: usize = 64;
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
        Some(other) => {
            let allowed = "message, function_call or function_call_output";
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
    let commentary = fields.text("phase", faults) == Some("commentary");
    Some(Content::Message { role, text, commentary })
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

/// Tools, each with its name at the top: `{"type": "function", "name", "description", "parameters"}`.
pub(super) fn tools(fields: &Fields<'_>, faults: &mut Faults) -> Option<Vec<Tool>> {
    let list = fields.list("tools", faults)?;
    if list.len() > MOST_TOOLS {
        faults.add(fields.at("tools"), format!("tools may hold up to {MOST_TOOLS} tools, not {}", list.len()));
        return None;
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let at: Vec<_> = fields.at("tools").into_iter().chain([i.into()]).collect();
        let Some(tool) = Fields::of(value, at, faults) else { continue };
        if let Some(other) = tool.required_text("type", faults).filter(|kind| *kind != "function") {
            faults.add(tool.at("type"), format!("only tools of type function are served, not `{other}`"));
            continue;
        }
        if let Some(parsed) = super::tool(&tool, &tools, faults) {
            tools.push(parsed);
        }
    }
    Some(tools)
}

/// Whether the model may call: a word, or one tool by its name.
pub(super) fn tool_choice(fields: &Fields<'_>, tools: &[Tool], faults: &mut Faults) -> Option<ToolChoice> {
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
            if let Some(other) = choice.required_text("type", faults).filter(|kind| *kind != "function") {
                faults.add(choice.at("type"), format!("type has to be function, not `{other}`"));
                return None;
            }
            let name = choice.required_text("name", faults)?;
            if !tools.iter().any(|tool| tool.name == name) {
                faults.add(choice.at("name"), format!("`{name}` is none of the tools"));
            }
            ToolChoice::Named(name.to_owned())
        }
    };
    if choice == ToolChoice::Required && tools.is_empty() {
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
        Content::Message { role: speaker, text, commentary } => {
            let part = match speaker {
                Role::Assistant => text_part(text),
                _ => json!({"type": "input_text", "text": text}),
            };
            // An item that has just begun has no parts.
            let empty = item.status == Status::InProgress && text.is_empty();
            let content = if empty { Value::Array(Vec::new()) } else { Value::Array(vec![part]) };
            let mut value = json!({"id": item.id, "type": "message", "status": status, "role": role(*speaker),
                                   "content": content});
            if *commentary {
                value["phase"] = "commentary".into();
            }
            value
        }
        Content::Call { call_id, name, arguments } => json!({
            "id": item.id, "type": "function_call", "status": status, "call_id": call_id, "name": name,
            "arguments": arguments,
        }),
        Content::Output { call_id, output } => json!({
            "id": item.id, "type": "function_call_output", "status": status, "call_id": call_id, "output": output,
        }),
    }
}
