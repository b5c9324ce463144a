//! Renders a conversation into the text that the model reads, with the model's own chat template.
//!
//! A template that knows no tools gets them in its system message, and their results in a user's, in the Hermes form.

use std::sync::Arc;

use minijinja::{Environment, Error as JinjaError, ErrorKind, Value as Jinja, context};
use serde_json::{Value, json};

use super::form::Form;
use crate::{
    engine::token::ModelInfo,
    error::{Error, Fault},
    turn::{Message, Tool, ToolCall},
};

/// Marks a place at which a text is cut before it is tokenized, so that a special token's name in a caller's words does
/// not become that token. A character that no model has seen.
const CUT: char = '\u{F8F0}';

/// Marks where a text that is not complete yet would go on. A character that no model has seen either.
const OPEN: char = '\u{F8F1}';

/// A model's chat template, ready to render.
pub struct Template {
    model: Arc<ModelInfo>,
    environment: Environment<'static>,
    /// Whether the template itself knows tools.
    knows_tools: bool,
    form: Form,
    special: Vec<String>,
}

const NAME: &str = "chat";

// === impl Template ===

impl Template {
    /// Compiles the model's template.
    ///
    /// # Errors
    /// A text for the operator, when it is no valid Jinja.
    pub fn new(model: Arc<ModelInfo>) -> Result<Self, String> {
        let mut environment = Environment::new();
        // As Hugging Face's library has it.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", |value: Jinja| spaced(&serde_json::to_value(value).unwrap_or_default()));
        environment.add_function("raise_exception", |message: String| -> Result<String, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        // Dates would change the prompt, and with it the cached prefix, from day to day.
        environment.add_function("strftime_now", |_format: String| String::new());
        let source = model.chat_template.source.clone();
        environment
            .add_template_owned(NAME, source.clone())
            .map_err(|e| format!("the model's chat template cannot be used: {e:#}"))?;
        let (form, knows_tools) = Form::of_template(&source);
        let special = model.vocabulary.special_names();
        Ok(Self { model, environment, knows_tools, form, special })
    }

    /// How calls are written.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Whether the model's own template teaches it to call tools.
    pub fn knows_tools(&self) -> bool {
        self.knows_tools
    }

    /// The text that the model continues.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the template's own words when it refuses the conversation.
    pub fn render(&self, messages: &[Message], tools: &[Tool]) -> Result<String, Error> {
        let (messages, tools) = if self.knows_tools {
            (self.native(messages), tools.iter().map(tool_value).collect::<Vec<_>>())
        } else {
            (self.plain(messages, tools), Vec::new())
        };
        let template = self.environment.get_template(NAME).map_err(|e| Error::Internal(e.to_string()))?;
        let chat = &self.model.chat_template;
        let rendered = template.render(context! {
            messages => messages,
            tools => if tools.is_empty() { Jinja::from(()) } else { Jinja::from_serialize(tools) },
            add_generation_prompt => true,
            bos_token => chat.bos_token,
            eos_token => chat.eos_token,
            enable_thinking => false,
        });
        rendered.map_err(|e| {
            let why = e.detail().unwrap_or("the model's chat template refuses this conversation").to_owned();
            Error::Invalid(vec![Fault::new(["messages".into()], why)])
        })
    }

    /// The text that any continuation of the last message begins with, the model's answer not included: what can be
    /// computed before the message is complete.
    ///
    /// # Errors
    /// As [`Template::render`]; also when the template drops the last message.
    pub fn render_open(&self, mut messages: Vec<Message>, tools: &[Tool]) -> Result<String, Error> {
        match messages.last_mut() {
            Some(Message::System(text) | Message::User(text) | Message::Tool { content: text, .. }) => text.push(OPEN),
            Some(Message::Assistant { content, .. }) => content.get_or_insert_default().push(OPEN),
            None => return Err(Error::Internal("an open conversation has no message".into())),
        }
        let mut rendered = self.render(&messages, tools)?;
        let end = rendered.rfind(OPEN).ok_or_else(|| Error::invalid("input", "the model's template drops it"))?;
        rendered.truncate(end);
        Ok(rendered)
    }

    /// The tokens of a rendered text.
    ///
    /// # Errors
    /// [`Error::Internal`] when the tokenizer refuses it.
    pub fn tokenize(&self, rendered: &str) -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::new();
        for part in rendered.split(CUT).filter(|part| !part.is_empty()) {
            tokens.extend(self.model.vocabulary.encode(part)?);
        }
        Ok(tokens)
    }

    /// The rendered text for people to read.
    pub fn readable(rendered: &str) -> String {
        rendered.replace(CUT, "")
    }

    /// Keeps special tokens' names in a text from becoming those tokens.
    fn defused(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for name in &self.special {
            if text.contains(name.as_str()) {
                let middle = name.chars().next().map_or(0, char::len_utf8);
                text = text.replace(name.as_str(), &format!("{}{CUT}{}", &name[..middle], &name[middle..]));
            }
        }
        text
    }

    /// Messages as templates with tools expect them.
    fn native(&self, messages: &[Message]) -> Vec<Value> {
        messages
            .iter()
            .map(|message| match message {
                Message::System(text) => json!({"role": "system", "content": self.defused(text)}),
                Message::User(text) => json!({"role": "user", "content": self.defused(text)}),
                Message::Assistant { content, tool_calls } => {
                    let mut value =
                        json!({"role": "assistant", "content": self.defused(content.as_deref().unwrap_or_default())});
                    if !tool_calls.is_empty() {
                        let calls = tool_calls.iter().map(|call| {
                            let function = json!({"name": call.name, "arguments": arguments(call)});
                            json!({"id": call.id, "type": "function", "function": function})
                        });
                        value["tool_calls"] = calls.collect();
                    }
                    value
                }
                Message::Tool { call_id, content } => {
                    let name = name_of(messages, call_id).unwrap_or_default();
                    json!({"role": "tool", "tool_call_id": call_id, "name": name, "content": self.defused(content)})
                }
            })
            .collect()
    }

    /// Messages for templates that know only system, user and assistant, each with a text.
    fn plain(&self, messages: &[Message], tools: &[Tool]) -> Vec<Value> {
        let mut out: Vec<(&str, String)> = Vec::new();
        for message in messages {
            let (role, text) = match message {
                Message::System(text) => ("system", self.defused(text)),
                Message::User(text) => ("user", self.defused(text)),
                Message::Assistant { content, tool_calls } => {
                    let mut text = self.defused(content.as_deref().unwrap_or_default());
                    text.push_str(&self.calls(tool_calls, !text.is_empty()));
                    ("assistant", text)
                }
                Message::Tool { content, .. } => {
                    ("tool", format!("<tool_response>\n{}\n</tool_response>", self.defused(content)))
                }
            };
            match out.last_mut() {
                // Results of one turn's calls are one message.
                Some((last, before)) if *last == "tool" && role == "tool" => {
                    before.push('\n');
                    before.push_str(&text);
                }
                _ => out.push((role, text)),
            }
        }
        if !tools.is_empty() {
            let section = tools_section(tools);
            match out.iter_mut().find(|(role, _)| *role == "system") {
                Some((_, text)) => {
                    text.push_str("\n\n");
                    text.push_str(&section);
                }
                None => out.insert(0, ("system", section)),
            }
        }
        out.into_iter()
            .map(|(role, text)| json!({"role": if role == "tool" { "user" } else { role }, "content": text}))
            .collect()
    }

    /// Calls as the model wrote them.
    fn calls(&self, calls: &[ToolCall], after_text: bool) -> String {
        let syntax = self.form.syntax();
        let mut text = String::new();
        for (i, call) in calls.iter().enumerate() {
            if i == 0 {
                if after_text {
                    text.push('\n');
                }
                text.push_str(syntax.opening);
            }
            text.push_str(if i == 0 { syntax.before_name } else { syntax.separator });
            text.push_str(&call.name);
            text.push_str(syntax.after_name);
            text.push_str(&self.defused(&spaced(&arguments(call))));
            text.push_str(syntax.after_arguments);
        }
        if !calls.is_empty() {
            text.push_str(syntax.closing);
        }
        text
    }
}

/// The section that tells a model without tools of its own about them: a line for each, as short as a signature, since on a
/// CPU every token of a prompt is felt. What else the schema asks for is seen to by the grammar.
fn tools_section(tools: &[Tool]) -> String {
    let mut text = String::from("You can call these tools:\n");
    for tool in tools {
        let mut parameters = String::new();
        properties(&tool.parameters, &tool.parameters, DEEPEST, &mut parameters);
        text.push_str(&format!("{}({parameters})", tool.name));
        if let Some(description) = &tool.description {
            text.push_str(&format!(": {}", one_line(description)));
        }
        text.push('\n');
    }
    text.push_str("To call one, answer with:\n<tool_call>\n{\"name\": NAME, \"arguments\": ARGUMENTS}\n</tool_call>");
    text
}

/// Levels of a schema that are told.
const DEEPEST: usize = 4;

/// Bytes of a signature from which on nothing is opened any more: references to one another make a short schema endless.
const LONGEST: usize = 4 << 10;

/// Adds the properties of an object, `order_id: string (The number), detail?: tracking|items`.
fn properties(schema: &Value, root: &Value, depth: usize, out: &mut String) {
    let required = |name: &str| schema["required"].as_array().is_some_and(|names| names.iter().any(|n| n == name));
    for (at, (name, property)) in schema["properties"].as_object().into_iter().flatten().enumerate() {
        out.push_str(if at > 0 { ", " } else { "" });
        out.push_str(name);
        out.push_str(if required(name) { ": " } else { "?: " });
        type_of(property, root, depth, out);
        if let Some(about) = property["description"].as_str() {
            out.push_str(&format!(" ({})", one_line(about)));
        }
    }
}

/// Adds what a schema allows, as a type.
fn type_of(schema: &Value, root: &Value, depth: usize, out: &mut String) {
    let Some(depth) = depth.checked_sub(1).filter(|_| out.len() < LONGEST) else { return out.push_str("any") };
    let bare = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let listed = |values: &[Value], between| values.iter().map(bare).collect::<Vec<_>>().join(between);
    if let Some(values) = schema["enum"].as_array() {
        return out.push_str(&listed(values, "|"));
    }
    if let Some(value) = schema.get("const") {
        return out.push_str(&bare(value));
    }
    if let Some(path) = schema["$ref"].as_str() {
        let target = path.strip_prefix('#').and_then(|path| root.pointer(path));
        return type_of(target.unwrap_or(&Value::Null), root, depth, out);
    }
    if let Some(schemas) = ["anyOf", "oneOf"].iter().find_map(|key| schema[*key].as_array()) {
        for (at, schema) in schemas.iter().enumerate() {
            out.push_str(if at > 0 { " | " } else { "" });
            type_of(schema, root, depth, out);
        }
        return;
    }
    let is_object = schema["type"].is_null() || schema["type"] == "object";
    match &schema["type"] {
        _ if is_object && schema["properties"].is_object() => {
            out.push('{');
            properties(schema, root, depth, out);
            out.push('}');
        }
        Value::Array(names) => out.push_str(&listed(names, " | ")),
        Value::String(name) if name == "array" && schema["items"].is_object() => {
            out.push('[');
            type_of(&schema["items"], root, depth, out);
            out.push(']');
        }
        Value::String(name) if name == "string" => out.push_str(schema["format"].as_str().unwrap_or("string")),
        Value::String(name) => out.push_str(name),
        _ => out.push_str("any"),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn tool_value(tool: &Tool) -> Value {
    let mut function = json!({"name": tool.name});
    function["description"] = tool.description.clone().unwrap_or_default().into();
    function["parameters"] = tool.parameters.clone();
    json!({"type": "function", "function": function})
}

/// A call's arguments as a value; text that is no JSON stays text.
fn arguments(call: &ToolCall) -> Value {
    serde_json::from_str(&call.arguments).unwrap_or_else(|_| Value::from(call.arguments.as_str()))
}

fn name_of<'m>(messages: &'m [Message], id: &str) -> Option<&'m str> {
    messages.iter().rev().find_map(|message| match message {
        Message::Assistant { tool_calls, .. } => {
            tool_calls.iter().find(|call| call.id == id).map(|call| call.name.as_str())
        }
        _ => None,
    })
}

/// JSON with a space behind `,` and `:`, as models know it from Python.
fn spaced(value: &Value) -> String {
    struct Spaces;
    impl serde_json::ser::Formatter for Spaces {
        fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
            w.write_all(b": ")
        }
    }
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, Spaces);
    match serde::Serialize::serialize(value, &mut serializer) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::turn::Phrase;

    fn section(name: &str, description: Option<&str>, parameters: Value) -> String {
        let description = description.map(str::to_owned);
        let section = tools_section(&[Tool { name: name.into(), description, parameters, phrase: Phrase::Filler }]);
        section.lines().nth(1).unwrap().to_owned()
    }

    #[test]
    fn a_tool_is_told_in_a_line() {
        let parameters = json!({"type": "object", "required": ["order_id", "lines"], "properties": {
            "order_id": {"type": "string", "description": "The number\n on the receipt"},
            "detail": {"enum": ["tracking", "items"]},
            "day": {"type": "string", "format": "date"},
            "note": {"type": ["string", "null"]},
            "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
            "limit": {"anyOf": [{"type": "integer"}, {"const": "all"}]},
            "anything": {},
        }, "$defs": {"line": {"type": "object", "required": ["sku"], "properties": {
            "sku": {"type": "string"}, "count": {"type": "integer"}}}}});
        assert_eq!(
            section("find_order", Some("Finds an order"), parameters),
            "find_order(order_id: string (The number on the receipt), detail?: tracking|items, day?: date, \
             note?: string | null, lines: [{sku: string, count?: integer}], limit?: integer | all, anything?: any): \
             Finds an order"
        );
        assert_eq!(section("hang_up", None, json!({})), "hang_up()");
    }

    #[test]
    fn a_schema_without_an_end_comes_to_one() {
        let parameters = json!({"$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}},
            "properties": {"first": {"$ref": "#/$defs/node"}}});
        assert_eq!(section("walk", None, parameters), "walk(first?: {next?: {next?: any}})");
        let wide: serde_json::Map<String, Value> =
            (0..2_000).map(|at| (format!("p{at}"), json!({"$ref": "#/$defs/node"}))).collect();
        let parameters =
            json!({"$defs": {"node": {"properties": wide}}, "properties": {"first": {"$ref": "#/$defs/node"}}});
        let length = section("grow", None, parameters).len();
        assert!((LONGEST..100_000).contains(&length), "{length}");
        let itself = json!({"properties": {"a": {"$ref": "#/properties/a"}}});
        assert_eq!(section("turn", None, itself), "turn(a?: any)");
    }
}
