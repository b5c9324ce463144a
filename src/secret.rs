//! Settings that must not be seen: in logs, in errors, in what `check` prints.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What stands in the place of a secret wherever it would be shown.
const HIDDEN: &str = "(hidden)";

/// A secret text. In the settings it stands as it is, or as `env:NAME` for the environment variable of that name, or as
/// `file:PATH` for the content of a file.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

// === impl Secret ===

impl Secret {
    /// Reads a secret as the settings have it.
    ///
    /// # Errors
    /// A text for the operator, when the variable or the file is not there.
    pub fn resolve(setting: &str) -> Result<Self, String> {
        let text = if let Some(name) = setting.strip_prefix("env:") {
            std::env::var(name).map_err(|_| format!("the environment variable {name} is not set"))?
        } else if let Some(path) = setting.strip_prefix("file:") {
            std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?.trim().to_owned()
        } else {
            setting.to_owned()
        };
        Ok(Self(text))
    }

    /// A secret as it stands. What a client gives names no variable and no file of ours.
    pub fn literal(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The secret itself, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "\"\"" } else { HIDDEN })
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if self.is_empty() { "" } else { HIDDEN })
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::resolve(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}
