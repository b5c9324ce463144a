//! A turn as the body of a chat completion, and what a server says when it refuses one.

use serde::{
    Serialize, Serializer,
    ser::{SerializeMap, SerializeSeq},
};
use serde_json::{Value, json};

use crate::{
    config,
    error::Error,
    turn::{Message, OutputFormat, Tool, ToolCall, ToolChoice, Turn},
};

/// The body that asks a server for a turn.
///
/// # Errors
/// [`Error::Internal`] when it cannot be written, which no turn makes happen.
pub(super) fn body(turn: &Turn, settings: &config::Upstream, model: &str) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(&Body { turn, settings, model }).map_err(|e| Error::Internal(e.to_string()))
}

/// Serialized from where it is: a conversation is not copied to be sent.
struct Body<'a> {
    turn: &'a Turn,
    settings: &'a config::Upstream,
    model: &'a str,
}

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Turn { messages, tools, tool_choice, parallel_tool_calls, sampling, format, .. } = self.turn;
        let mut fields = Fields { map: serializer.serialize_map(None)?, own: &self.settings.body };
        fields.add("model", self.model)?;
        fields.add("messages", &Messages(messages))?;
        fields.add("stream", &true)?;
        if self.settings.stream_options {
            fields.add("stream_options", &json!({"include_usage": true}))?;
        }
        if !tools.is_empty() {
            fields.add("tools", &Tools(tools))?;
            fields.add("tool_choice", &choice(tool_choice))?;
            // Most servers do not know the field; it is the default of those that do.
            if !parallel_tool_calls {
                fields.add("parallel_tool_calls", &false)?;
            }
        }
        fields.add("temperature", &sampling.temperature)?;
        fields.add("top_p", &sampling.top_p)?;
        if let Some(most) = sampling.max_tokens {
            fields.add("max_tokens", &most)?;
        }
        if !sampling.stop.is_empty() {
            fields.add("stop", &sampling.stop)?;
        }
        if let Some(seed) = sampling.seed {
            fields.add("seed", &seed)?;
        }
        if sampling.presence_penalty != 0.0 {
            fields.add("presence_penalty", &sampling.presence_penalty)?;
        }
        if sampling.frequency_penalty != 0.0 {
            fields.add("frequency_penalty", &sampling.frequency_penalty)?;
        }
        if !sampling.logit_bias.is_empty() {
            let bias: std::collections::BTreeMap<String, f32> =
                sampling.logit_bias.iter().map(|(token, bias)| (token.to_string(), *bias)).collect();
            fields.add("logit_bias", &bias)?;
        }
        if let Some(top) = sampling.logprobs {
            fields.add("logprobs", &true)?;
            fields.add("top_logprobs", &top)?;
        }
        match format {
            OutputFormat::Text => {}
            OutputFormat::JsonObject => fields.add("response_format", &json!({"type": "json_object"}))?,
            OutputFormat::JsonSchema(schema) => {
                let schema = json!({"name": "answer", "strict": true, "schema": schema});
                fields.add("response_format", &json!({"type": "json_schema", "json_schema": schema}))?;
            }
        }
        let Fields { mut map, own } = fields;
        for (name, value) in own {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// The fields of a body; those that the settings have are not written twice.
struct Fields<'a, M> {
    map: M,
    own: &'a toml::Table,
}

impl<M: SerializeMap> Fields<'_, M> {
    fn add<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), M::Error> {
        if self.own.contains_key(name) { Ok(()) } else { self.map.serialize_entry(name, value) }
    }
}

struct Messages<'a>(&'a [Message]);

impl Serialize for Messages<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for message in self.0 {
            list.serialize_element(&OneMessage(message))?;
        }
        list.end()
    }
}

struct OneMessage<'a>(&'a Message);

impl Serialize for OneMessage<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut said = |role: &str, content: &str| {
            map.serialize_entry("role", role)?;
            map.serialize_entry("content", content)
        };
        match self.0 {
            Message::System(text) => said("system", text)?,
            Message::User(text) => said("user", text)?,
            Message::Tool { call_id, content } => {
                said("tool", content)?;
                map.serialize_entry("tool_call_id", call_id)?;
            }
            Message::Assistant { content, tool_calls } => {
                map.serialize_entry("role", "assistant")?;
                map.serialize_entry("content", content)?;
                if !tool_calls.is_empty() {
                    map.serialize_entry("tool_calls", &Calls(tool_calls))?;
                }
            }
        }
        map.end()
    }
}

struct Calls<'a>(&'a [ToolCall]);

impl Serialize for Calls<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let calls = self.0.iter().map(|call| {
            json!({"id": call.id, "type": "function",
                   "function": {"name": call.name, "arguments": call.arguments}})
        });
        serializer.collect_seq(calls)
    }
}

struct Tools<'a>(&'a [Tool]);

impl Serialize for Tools<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Wire<'a> {
            r#type: &'static str,
            function: Function<'a>,
        }
        #[derive(Serialize)]
        struct Function<'a> {
            name: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            description: Option<&'a str>,
            parameters: &'a Value,
        }
        serializer.collect_seq(self.0.iter().map(|tool| Wire {
            r#type: "function",
            function: Function {
                name: &tool.name,
                description: tool.description.as_deref(),
                parameters: &tool.parameters,
            },
        }))
    }
}

fn choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::Auto => "auto".into(),
        ToolChoice::None => "none".into(),
        ToolChoice::Required => "required".into(),
        ToolChoice::Named(name) => json!({"type": "function", "function": {"name": name}}),
    }
}

/// What a server says is wrong with a request.
pub(super) struct Refused {
    /// In its words.
    pub message: String,
    code: String,
}

/// Reads an error as OpenAI has it, or as others have it: `{"error": "…"}`, `{"message": "…"}`, `{"detail": "…"}`, a text.
pub(super) fn error_of(body: &[u8]) -> Refused {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let inner = if value["error"].is_object() { &value["error"] } else { &value };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let message = text(&inner["message"]).or_else(|| text(&value["error"])).or_else(|| text(&value["detail"]));
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(body).trim().to_owned());
    let code = text(&inner["code"]).or_else(|| text(&inner["type"])).unwrap_or_default();
    Refused { message, code }
}

impl Refused {
    /// The error that the caller gets, with so much of the server's words.
    pub(super) fn into_error(self, short: String) -> Error {
        let long = self.code == "context_length_exceeded"
            || ["context length", "context window", "maximum context"].iter().any(|what| self.message.contains(what));
        if long {
            let numbers: Vec<usize> = self
                .message
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|number| number.parse().ok())
                .filter(|number| *number > 64)
                .collect();
            // "maximum context length is 4096 tokens. However, you requested 5000", "5000 tokens exceed the window of 4096"
            if let [one, other, ..] = numbers[..] {
                let (context, prompt) = (one.min(other), one.max(other));
                return Error::ContextLength { context, prompt, asked: None, param: "messages" };
            }
        }
        Error::invalid("", format!("The model's server refuses the request: {short}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_servers_say_of_long_prompts_is_understood() {
        let openai = json!({"error": {"message": "This model's maximum context length is 4096 tokens. However, you \
                            requested 5012 tokens (4900 in the messages, 112 in the completion).",
                            "type": "BadRequestError", "code": 400}});
        let refused = error_of(openai.to_string().as_bytes());
        let short = refused.message.clone();
        assert!(matches!(refused.into_error(short), Error::ContextLength { context: 4096, prompt: 5012, .. }));
        for (body, told) in [
            (r#"{"error": "no tools here"}"#, "no tools here"),
            (r#"{"detail": "wrong"}"#, "wrong"),
            (r#"{"object": "error", "message": "bad seed"}"#, "bad seed"),
            ("<html>", "<html>"),
        ] {
            let refused = error_of(body.as_bytes());
            assert_eq!(refused.message, told);
            assert!(matches!(refused.into_error(told.into()), Error::Invalid(_)));
        }
    }
}
