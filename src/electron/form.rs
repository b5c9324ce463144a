//! How a model writes a tool call into its text.

use crate::engine::token::Vocabulary;

/// The syntax of tool calls that a model was trained on.
///
/// A turn's calls are written as `opening`, then for each call `before_name NAME after_name ARGUMENTS after_arguments`,
/// with `separator` in place of `before_name` from the second on, then `closing`. The grammar leaves the model no other
/// spelling, so the parser may rely on it to the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`; for models without a form of their own, too.
    Hermes,
    /// `{"name": …, "parameters": …}`.
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": …}]`.
    Mistral,
}

/// The fixed texts of a [`Form`].
#[derive(Clone, Copy, Debug)]
pub struct Syntax {
    /// Where the calls begin; it occurs in no spoken text.
    pub opening: &'static str,
    /// Between the opening and the first name.
    pub before_name: &'static str,
    /// Between name and arguments.
    pub after_name: &'static str,
    /// Behind the arguments.
    pub after_arguments: &'static str,
    /// Between two calls, up to the next name.
    pub separator: &'static str,
    /// Behind the last call.
    pub closing: &'static str,
}

// === impl Form ===

impl Form {
    /// The form that a chat template teaches, and whether it teaches one at all.
    pub fn of_template(template: &str) -> (Self, bool) {
        let own = template.contains("tools");
        let form = if template.contains("[TOOL_CALLS]") {
            Self::Mistral
        } else if template.contains("<|python_tag|>") || template.contains("\"parameters\": ") {
            Self::Llama3
        } else {
            Self::Hermes
        };
        (if own { form } else { Self::Hermes }, own)
    }

    /// Its fixed texts.
    pub fn syntax(self) -> Syntax {
        match self {
            Self::Hermes => Syntax {
                opening: "<tool_call>",
                before_name: "\n{\"name\": \"",
                after_name: "\", \"arguments\": ",
                after_arguments: "}\n</tool_call>",
                separator: "\n<tool_call>\n{\"name\": \"",
                closing: "",
            },
            Self::Llama3 => Syntax {
                opening: "{\"name\": \"",
                before_name: "",
                after_name: "\", \"parameters\": ",
                after_arguments: "}",
                separator: "; {\"name\": \"",
                closing: "",
            },
            Self::Mistral => Syntax {
                opening: "[TOOL_CALLS]",
                before_name: "[{\"name\": \"",
                after_name: "\", \"arguments\": ",
                after_arguments: "}",
                separator: ", {\"name\": \"",
                closing: "]",
            },
        }
    }
}

/// Texts of the forms that some vocabularies have as one special token.
const MARKERS: [&str; 3] = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"];

/// Whether a special token of this name is part of a call.
pub fn is_marker(name: &[u8]) -> bool {
    MARKERS.iter().any(|marker| marker.as_bytes() == name)
}

/// Pieces of a text: plain ones, and names that are one special token of the vocabulary.
pub fn pieces<'a>(text: &'a str, vocabulary: &Vocabulary) -> Vec<Piece<'a>> {
    let mut out = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let next = MARKERS
            .iter()
            .filter_map(|marker| Some((rest.find(marker)?, marker.len(), vocabulary.special(marker)?)))
            .min_by_key(|(at, ..)| *at);
        let Some((at, len, id)) = next else { break };
        if at > 0 {
            out.push(Piece::Text(&rest[..at]));
        }
        out.push(Piece::Special(id));
        rest = &rest[at + len..];
    }
    if !rest.is_empty() {
        out.push(Piece::Text(rest));
    }
    out
}

/// See [`pieces`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Ordinary text.
    Text(&'a str),
    /// A special token.
    Special(u32),
}
