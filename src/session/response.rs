//! One answer of the model in a conversation, and how the events of a turn become its items.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use super::history::{Content, Id, Item, Role, Status, new_id};
use crate::{
    error::Error,
    turn::{
        FillerPolicy, FinishReason, Message, OutputFormat, Sampling, TokenLogprob, Tool, ToolChoice, Turn, TurnEvent,
        Usage,
    },
};

/// What a turn is made with, besides the conversation.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model's public name.
    pub model: Arc<str>,
    /// What stands in front of every prompt; empty is nothing.
    pub instructions: Arc<str>,
    /// The tool registry: what the model may call, checked when it was declared.
    pub tools: Arc<[Tool]>,
    /// Whether it may, must or must not call.
    pub tool_choice: ToolChoice,
    /// Whether one turn may hold several calls.
    pub parallel_tool_calls: bool,
    /// How tokens are drawn. [`Sampling::max_tokens`] is what the client asked for.
    pub sampling: Sampling,
    /// The form of the answer.
    pub format: OutputFormat,
    /// Whether the caller hears something before a tool runs.
    pub filler: FillerPolicy,
    /// Whether old exchanges make room when the conversation nears the model's context.
    pub trim: bool,
    /// The client's own notes, handed back as they came.
    pub metadata: Map<String, Value>,
}

/// An answer, finished or not.
#[derive(Clone, Debug)]
pub struct Response {
    /// `resp_…`.
    pub id: Id,
    /// When it began, in seconds since 1970.
    pub created_at: u64,
    /// When it ended.
    pub completed_at: Option<u64>,
    /// How it ended, once it did.
    pub outcome: Option<Outcome>,
    /// The response that it continues.
    pub previous: Option<Id>,
    /// What it was made with.
    pub settings: Arc<Settings>,
    /// What the client added to the conversation with it.
    pub input: Vec<Arc<Item>>,
    /// What the model said and called.
    pub output: Vec<Arc<Item>>,
    /// What it cost.
    pub usage: Usage,
    /// Whether its output is part of the conversation.
    pub in_conversation: bool,
    /// Whether it is kept after the session has ended.
    pub store: bool,
}

/// How a response ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The model was done.
    Completed,
    /// The limit of tokens or the end of the context was reached.
    Length,
    /// Somebody stopped it.
    Cancelled,
    /// The turn failed.
    Failed(Error),
}

/// What happens in a session, in order. Every event says all that is needed to render it.
#[derive(Clone, Debug)]
pub enum Event {
    /// The settings of the session are these now.
    Configured(Arc<Settings>),
    /// An item joined the conversation, behind the other one.
    ItemAdded {
        /// The item.
        item: Arc<Item>,
        /// The item before it; `None` at the start.
        previous: Option<Id>,
    },
    /// An item as the conversation holds it.
    ItemRetrieved(Arc<Item>),
    /// An item left the conversation.
    ItemRemoved(Id),
    /// Only this much of an item was heard.
    ItemTruncated {
        /// What is left of it.
        item: Arc<Item>,
        /// The response that said it, where the client named one.
        response: Option<Id>,
        /// The milliseconds that the client gave.
        audio_end_ms: u64,
    },
    /// A response began.
    Begun(Arc<Response>),
    /// These items made room for what is to come.
    Trimmed {
        /// For this response.
        response: Id,
        /// Oldest first.
        items: Vec<Id>,
    },
    /// An item of a response began. Its content is empty yet.
    OutputBegun {
        /// Where it stands.
        at: Arc<At>,
        /// The item.
        item: Arc<Item>,
    },
    /// More of a message.
    Text {
        /// Of which item.
        at: Arc<At>,
        /// The text to add.
        delta: String,
        /// Its tokens, when log-probabilities were asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// More of a call's arguments.
    Arguments {
        /// Of which item.
        at: Arc<At>,
        /// JSON text to add.
        delta: String,
    },
    /// An item of a response is over.
    OutputEnded {
        /// Where it stands.
        at: Arc<At>,
        /// The whole item.
        item: Arc<Item>,
    },
    /// A response is over; nothing of it follows.
    Ended(Arc<Response>),
    /// What a client asked for cannot be done.
    Refused {
        /// The client's own id of the event that asked for it.
        cause: Option<Id>,
        /// Why.
        error: Error,
    },
}

/// The place of an item in a response.
#[derive(Debug)]
pub struct At {
    /// The response.
    pub response: Id,
    /// Position in its output, from 0.
    pub index: usize,
    /// The item.
    pub item: Id,
    /// Of a call, what its output will name.
    pub call_id: Option<Id>,
    /// The item before it in the conversation.
    pub previous: Option<Id>,
    /// Whether the item is part of the conversation.
    pub in_conversation: bool,
}

/// Makes items of a turn's events.
pub(super) struct Assembly {
    /// The response so far.
    pub response: Response,
    /// The item that is being made.
    open: Option<Open>,
    /// The item before the next one.
    previous: Option<Id>,
}

struct Open {
    at: Arc<At>,
    content: Content,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

// === impl Settings ===

impl Settings {
    /// Settings in which a model is asked for nothing in particular.
    pub fn new(model: &str, filler: FillerPolicy) -> Self {
        Self {
            model: model.into(),
            instructions: "".into(),
            tools: Arc::new([]),
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            sampling: Sampling::default(),
            format: OutputFormat::Text,
            filler,
            trim: true,
            metadata: Map::new(),
        }
    }

    /// A turn that continues this conversation.
    pub(super) fn turn(&self, mut conversation: Vec<Message>, most_tokens: usize) -> Turn {
        if !self.instructions.is_empty() {
            conversation.insert(0, Message::System(self.instructions.to_string()));
        }
        let mut sampling = self.sampling.clone();
        sampling.max_tokens = sampling.max_tokens.or(Some(most_tokens));
        Turn {
            messages: conversation,
            tools: self.tools.clone(),
            tool_choice: self.tool_choice.clone(),
            parallel_tool_calls: self.parallel_tool_calls,
            sampling,
            format: self.format.clone(),
            filler: self.filler,
        }
    }
}

// === impl Assembly ===

impl Assembly {
    pub(super) fn new(response: Response, previous: Option<Id>) -> Self {
        Self { response, open: None, previous }
    }

    /// Takes the next event of the turn.
    pub(super) fn take(&mut self, event: TurnEvent, out: &mut Vec<Event>) {
        match event {
            TurnEvent::Text { delta, logprobs } => {
                if !matches!(self.open, Some(Open { content: Content::Message { .. }, .. })) {
                    self.close(Status::Completed, out);
                    let text = String::new();
                    self.begin(Content::Message { role: Role::Assistant, text, commentary: false }, out);
                }
                if let Some(Open { at, content: Content::Message { text, .. } }) = &mut self.open {
                    text.push_str(&delta);
                    out.push(Event::Text { at: at.clone(), delta, logprobs });
                }
            }
            TurnEvent::CallBegun { id, name, .. } => {
                // What was said before a call was said on the way to it.
                if let Some(Open { content: Content::Message { commentary, .. }, .. }) = &mut self.open {
                    *commentary = true;
                }
                self.close(Status::Completed, out);
                self.begin(Content::Call { call_id: id.into(), name, arguments: String::new() }, out);
            }
            TurnEvent::Arguments { delta, .. } => {
                if let Some(Open { at, content: Content::Call { arguments, .. } }) = &mut self.open {
                    arguments.push_str(&delta);
                    out.push(Event::Arguments { at: at.clone(), delta });
                }
            }
            TurnEvent::CallEnded { .. } => self.close(Status::Completed, out),
            TurnEvent::Finished { reason, usage } => {
                self.response.usage = usage;
                match reason {
                    FinishReason::Stop | FinishReason::ToolCalls => self.end(Outcome::Completed, out),
                    FinishReason::Length => self.end(Outcome::Length, out),
                    FinishReason::Cancelled => self.end(Outcome::Cancelled, out),
                }
            }
        }
    }

    /// Ends the response where it is.
    pub(super) fn end(&mut self, outcome: Outcome, out: &mut Vec<Event>) {
        let whole = matches!(outcome, Outcome::Completed);
        self.close(if whole { Status::Completed } else { Status::Incomplete }, out);
        self.response.completed_at = Some(now());
        self.response.outcome = Some(outcome);
        out.push(Event::Ended(Arc::new(self.response.clone())));
    }

    fn begin(&mut self, content: Content, out: &mut Vec<Event>) {
        let prefix = if matches!(content, Content::Call { .. }) { "fc" } else { "msg" };
        let id = new_id(prefix);
        let item = Item { id: id.clone(), content: content.clone(), status: Status::InProgress };
        let at = Arc::new(At {
            response: self.response.id.clone(),
            index: self.response.output.len(),
            item: id.clone(),
            call_id: item.call().cloned(),
            previous: self.previous.replace(id),
            in_conversation: self.response.in_conversation,
        });
        out.push(Event::OutputBegun { at: at.clone(), item: Arc::new(item) });
        self.open = Some(Open { at, content });
    }

    fn close(&mut self, status: Status, out: &mut Vec<Event>) {
        if let Some(Open { at, content }) = self.open.take() {
            let item = Arc::new(Item { id: at.item.clone(), content, status });
            self.response.output.push(item.clone());
            out.push(Event::OutputEnded { at, item });
        }
    }
}

// === impl Event ===

impl Event {
    /// Adds a later event to this one, where nobody would see the difference. Gives it back where they would.
    pub(super) fn merge(&mut self, later: Self) -> Result<(), Self> {
        match (self, later) {
            (
                Self::Text { at, delta, logprobs },
                Self::Text { at: later_at, delta: later, logprobs: later_logprobs },
            ) if Arc::ptr_eq(at, &later_at) => {
                delta.push_str(&later);
                logprobs.extend(later_logprobs);
                Ok(())
            }
            (Self::Arguments { at, delta }, Self::Arguments { at: later_at, delta: later })
                if Arc::ptr_eq(at, &later_at) =>
            {
                delta.push_str(&later);
                Ok(())
            }
            (_, later) => Err(later),
        }
    }
}
