//! Electron: a model that speaks while its tools run.
//!
//! This layer turns a [`Turn`] into a prompt and a grammar for the engine, and the tokens that come back into
//! [`TurnEvent`]s. It sees to it that a call is always valid, and that the caller hears something before a tool runs.
//!
//! The filler's timing: text leaves as the model makes it, so when a call opens it is known whether the caller has heard
//! anything in this turn. If not, a phrase from the book leaves at that moment, before the call's name and arguments
//! exist. A turn that has to call a tool needs no token to know that: there the phrase leaves when the turn starts. Only
//! where one of the tools ends the conversation is the name waited for, since that decides between a moment and a goodbye.

#[cfg(feature = "mistral")]
mod embedded;
pub mod filler;
#[cfg(feature = "mistral")]
pub mod form;
#[cfg(feature = "mistral")]
pub mod grammar;
pub mod language;
#[cfg(feature = "mistral")]
pub mod parser;
mod remote;
#[cfg(feature = "mistral")]
mod search;
#[cfg(feature = "mistral")]
pub mod template;

use std::sync::Arc;

#[cfg(feature = "mistral")]
pub use self::embedded::{Electron, Example};
pub use self::remote::{Fallback, Remote};
use self::{
    filler::{Phrases, Place},
    language::Language,
};
use crate::turn::{FillerPolicy, Message, Phrase, Turn};

/// Whether this turn speaks before it calls, and while its tools run.
pub fn fills(turn: &Turn) -> bool {
    match turn.filler {
        _ if turn.tools.is_empty() => false,
        FillerPolicy::Always => true,
        FillerPolicy::Never => false,
        FillerPolicy::Auto => system_prompts(turn).any(filler::is_voice_prompt),
    }
}

fn system_prompts(turn: &Turn) -> impl Iterator<Item = &str> {
    turn.messages.iter().filter_map(|message| match message {
        Message::System(text) => Some(text.as_str()),
        _ => None,
    })
}

/// Where a turn's phrase comes from.
struct Filler {
    phrases: Phrases,
    language: Language,
    place: Place,
    /// What the agent said last, which is not said again.
    last: Option<String>,
    /// Tools with which the conversation ends, and what is said then.
    goodbyes: Vec<(String, Option<Arc<str>>)>,
}

/// The language in which a turn's caller is spoken to.
pub fn language_of(turn: &Turn) -> Language {
    let users = turn.messages.iter().filter_map(|message| match message {
        Message::User(text) => Some(text.as_str()),
        _ => None,
    });
    let chosen = turn.language.as_deref().and_then(Language::from_code);
    chosen.unwrap_or_else(|| language::detect(users, system_prompts(turn).next()))
}

impl Filler {
    fn new(turn: &Turn) -> Self {
        let last = turn.messages.iter().rev().find_map(|message| match message {
            Message::Assistant { content: Some(text), .. } if !text.is_empty() => Some(text.clone()),
            _ => None,
        });
        let chained = matches!(turn.messages.last(), Some(Message::Tool { .. }));
        let goodbyes = turn.tools.iter().filter_map(|tool| match &tool.phrase {
            Phrase::Filler => None,
            Phrase::Goodbye(words) => Some((tool.name.clone(), words.clone())),
        });
        Self {
            phrases: Phrases::new(turn.sampling.seed),
            language: language_of(turn),
            place: if chained { Place::Chained } else { Place::First },
            last,
            goodbyes: goodbyes.collect(),
        }
    }

    /// The words before a call of this tool; before any call, where the name is not known yet.
    fn draw(mut self, tool: Option<&str>) -> String {
        let goodbye = tool.and_then(|tool| self.goodbyes.iter().find(|(name, _)| name == tool));
        let place = match goodbye {
            Some((_, Some(words))) => return words.to_string(),
            Some((_, None)) => Place::Goodbye,
            None => self.place,
        };
        self.phrases.draw(self.language, place, self.last.as_deref()).to_owned()
    }
}
