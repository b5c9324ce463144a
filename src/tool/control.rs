//! What happens to the call itself: tools that act on it, of which the model is offered those that its dialect can carry
//! out, and keys that the caller presses.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Value, json};

use crate::turn::{Phrase, Tool};

/// A tool that acts on the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Hangs up.
    EndCall,
    /// Hands the caller over to somebody else.
    TransferCall,
    /// Presses keys.
    SendDigits,
    /// Speaks and listens in another language.
    SetLanguage,
}

/// What a dialect is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Hang up once everything was said.
    End {
        /// In the model's words.
        reason: String,
    },
    /// Hand the caller over once everything was said.
    Transfer {
        /// The name that the agent's definition has for it.
        name: String,
        /// A phone number or SIP address.
        number: String,
        /// In the model's words.
        reason: String,
    },
    /// Press these keys: digits, `*`, `#`, and `w` for half a second.
    Digits(String),
    /// Go on in this language, such as `sv-SE`.
    Language(String),
}

/// How keys that the caller presses become one message.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dtmf {
    /// Pause after a key that ends the message.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// The key that ends the message and is not part of it; `None` for none, an empty text in the settings.
    #[serde(deserialize_with = "finish_on")]
    pub finish_on: Option<char>,
    /// So many keys end the message too.
    pub max_digits: usize,
}

// === impl Control ===

impl Control {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::EndCall, Self::TransferCall, Self::SendDigits, Self::SetLanguage];

    /// The tool's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndCall => "end_call",
            Self::TransferCall => "transfer_call",
            Self::SendDigits => "send_digits",
            Self::SetLanguage => "set_language",
        }
    }

    /// Whether the agent has nothing more to say after it.
    pub fn is_last(self) -> bool {
        matches!(self, Self::EndCall | Self::TransferCall)
    }

    /// The tool as the model sees it. `transfer_to` are the names that it may hand a caller over to, `farewell` what is said
    /// when it ends the call without a word.
    pub fn tool(self, transfer_to: &BTreeMap<String, String>, farewell: Option<Arc<str>>) -> Tool {
        let reason = json!({"type": "string", "description": "Why, in a few words", "maxLength": 200});
        let (description, properties, required) = match self {
            Self::EndCall => ("Hang up, after the caller has said goodbye.", json!({"reason": reason}), json!([])),
            Self::TransferCall => (
                "Hand the caller over to a person.",
                json!({"to": {"type": "string", "enum": transfer_to.keys().collect::<Vec<_>>()}, "reason": reason}),
                json!(["to"]),
            ),
            Self::SendDigits => (
                "Press keys on the phone's keypad.",
                json!({"digits": {"type": "string", "pattern": "^[0-9*#w]{1,32}$"}}),
                json!(["digits"]),
            ),
            Self::SetLanguage => (
                "Speak another language with the caller.",
                json!({"language": {"type": "string", "pattern": "^[a-z]{2,3}-[A-Z]{2}$", "description": "Such as es-MX"}}),
                json!(["language"]),
            ),
        };
        let phrase = if self == Self::EndCall { Phrase::Goodbye(farewell) } else { Phrase::Filler };
        Tool {
            name: self.name().into(),
            description: Some(description.into()),
            parameters: json!({"type": "object", "properties": properties, "required": required,
                               "additionalProperties": false}),
            phrase,
        }
    }

    /// What a call asks of the dialect.
    pub fn request(self, arguments: &str, transfer_to: &BTreeMap<String, String>) -> Request {
        let arguments: Value = serde_json::from_str(arguments).unwrap_or_default();
        let text = |name: &str| arguments[name].as_str().unwrap_or_default().to_owned();
        match self {
            Self::EndCall => Request::End { reason: text("reason") },
            Self::TransferCall => {
                let name = text("to");
                let number = transfer_to.get(&name).cloned().unwrap_or_default();
                Request::Transfer { name, number, reason: text("reason") }
            }
            Self::SendDigits => Request::Digits(text("digits")),
            Self::SetLanguage => Request::Language(text("language")),
        }
    }

    /// What the model reads as the result.
    pub fn output(self) -> String {
        json!({"status": match self {
            Self::EndCall => "the call ends",
            Self::TransferCall => "the caller is being handed over",
            Self::SendDigits => "the keys were pressed",
            Self::SetLanguage => "the language was changed",
        }})
        .to_string()
    }
}

// === impl Dtmf ===

impl Default for Dtmf {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(2), finish_on: Some('#'), max_digits: 32 }
    }
}

fn finish_on<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<char>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let mut keys = text.chars();
    match (keys.next(), keys.next()) {
        (None, _) => Ok(None),
        (Some(key), None) if key.is_ascii_digit() || matches!(key, '*' | '#') => Ok(Some(key)),
        _ => Err(de::Error::custom("allowed is one of 0 to 9, * and #, or empty")),
    }
}
