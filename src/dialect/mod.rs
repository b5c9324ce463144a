//! The protocols that clients speak, one file each: wire types, parsing, rendering, handler.

pub mod chat_completions;
pub mod conversation_relay;
mod fields;
mod items;
pub mod phone;
pub mod realtime;
pub mod responses;
pub mod retell;
pub mod sessions;
pub mod socket;

use std::sync::Arc;

use serde_json::{Map, Value};

use self::fields::{Faults, Fields, kind};
use crate::{
    error::{Error, PathPart},
    session::{Owner, Settings, Watch},
    tool::guard::Guard,
    turn::{Model, Phrase, Tool},
};

/// What a connection may do, asked each time. The server knows the answers.
pub trait Access: Send + Sync + 'static {
    /// Whose sessions and responses it sees.
    fn owner(&self) -> &Owner;

    /// The model of this name.
    ///
    /// # Errors
    /// [`Error::ModelNotFound`], [`Error::Forbidden`] for this key, [`Error::Overloaded`] while it is being loaded.
    fn model(&self, name: &str) -> Result<Arc<dyn Model>, Error>;

    /// What a turn is made with where a request says nothing: for `MODEL:AGENT` what the agent's definition comes to with
    /// these variables.
    ///
    /// # Errors
    /// [`Error::ModelNotFound`] for an agent that is not there.
    fn settings(&self, model: &str, variables: &Map<String, Value>) -> Result<Settings, Error>;

    /// What may be reached on a client's behalf.
    fn guard(&self) -> &Guard;

    /// Counts a turn against the limits of the key, and gives what watches over it.
    ///
    /// # Errors
    /// [`Error::RateLimited`].
    fn admit(&self, model: &str) -> Result<Watch, Error>;

    /// The id under which the log knows the connection.
    fn request_id(&self) -> &str;
}

/// An error of the layers below, which name fields as chat completions do, with the names that the Responses and
/// Realtime APIs have for them.
fn renamed(error: Error) -> Error {
    match error {
        Error::Invalid(mut faults) => {
            for fault in &mut faults {
                let names: Vec<&str> = fault.path.iter().map_while(PathPart::field).collect();
                let renamed: Option<(usize, &[&'static str])> = match names.as_slice() {
                    ["max_tokens", ..] => Some((1, &["max_output_tokens"])),
                    ["messages", ..] => Some((1, &["input"])),
                    ["response_format", "json_schema", "schema", ..] => Some((3, &["text", "format", "schema"])),
                    _ => None,
                };
                if let Some((old, new)) = renamed {
                    fault.path.splice(..old, new.iter().map(|name| PathPart::from(*name)));
                }
                fault.path.retain(|part| part.field() != Some("function"));
            }
            Error::Invalid(faults)
        }
        Error::ContextLength { context, prompt, asked, param } => {
            let param = if param == "max_tokens" { "max_output_tokens" } else { "input" };
            Error::ContextLength { context, prompt, asked, param }
        }
        other => other,
    }
}

/// A tool's name, description and parameters, read from the object that holds them.
fn tool(fields: &Fields<'_>, others: &[Tool], faults: &mut Faults) -> Option<Tool> {
    let name = fields.required_text("name", faults)?;
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > 64 || !name.chars().all(valid) {
        faults.add(fields.at("name"), "name has to be 1 to 64 letters, digits, underscores, dashes or dots");
    }
    if others.iter().any(|tool| tool.name == name) {
        faults.add(fields.at("name"), format!("name `{name}` is used by two tools"));
    }
    let parameters = fields.get("parameters").cloned().unwrap_or_else(|| Value::Object(Default::default()));
    if !parameters.is_object() {
        let what = kind(&parameters);
        faults.add(fields.at("parameters"), format!("parameters has to be a JSON schema, an object, not {what}"));
    }
    let description = fields.text("description", faults).map(str::to_owned);
    Some(Tool { name: name.to_owned(), description, parameters, phrase: Phrase::Filler })
}
