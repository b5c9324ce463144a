//! One answer of the model in a conversation, and how the events of a turn become its items.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use super::history::{Answer, Content, Id, Item, Phase, Role, Run, RunState, Status, new_id};
use crate::{
    error::Error,
    tool::{Dtmf, Failure, Hand, Kit, control, mcp::Server},
    turn::{
        FillerPolicy, FinishReason, Message, OutputFormat, Sampling, TokenLogprob, Tool, ToolChoice, Turn, TurnEvent,
        Usage,
    },
};

/// Most rounds of tool calls in a response, where an agent's definition says nothing else.
const TOOL_ROUNDS: usize = 8;
/// How long a tool may run in silence, where an agent's definition says nothing else.
const STILL_WAITING_AFTER: Duration = Duration::from_secs(4);

/// What a turn is made with, besides the conversation.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model's public name.
    pub model: Arc<str>,
    /// What stands in front of every prompt; empty is nothing.
    pub instructions: Arc<str>,
    /// The tools that the client declared, checked when they were.
    pub tools: Arc<[Tool]>,
    /// What of them the gateway runs, and servers with more.
    pub kit: Arc<Kit>,
    /// Whom the model plays.
    pub persona: Option<Arc<Persona>>,
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

/// Whom the model plays: an agent's definition with what is known of the call.
#[derive(Debug)]
pub struct Persona {
    /// The agent's name.
    pub agent: Arc<str>,
    /// What stands in front of every prompt.
    pub instructions: String,
    /// What the caller hears first.
    pub greeting: Option<String>,
    /// Its tools.
    pub kit: Kit,
    /// Whether somebody is there to approve calls. Without, tools that need it are not offered.
    pub attended: bool,
    /// The names that it may hand a caller over to, with their numbers.
    pub transfer_to: BTreeMap<String, String>,
    /// Most rounds of tool calls in a response. After them the model has to answer with what it knows.
    pub tool_rounds: usize,
    /// How long a tool may run before the caller hears that it still does; zero is for ever.
    pub still_waiting_after: Duration,
    /// How keys that the caller presses become a turn.
    pub dtmf: Dtmf,
    /// The language that it speaks, such as `en-US`.
    pub language: Option<Arc<str>>,
    /// What is known of the call, for tools.
    pub caller: Arc<Map<String, Value>>,
}

/// All tools of a turn: the agent's, the client's, those that servers listed.
#[derive(Debug, Default)]
pub(super) struct Armed {
    /// As the model sees them.
    pub tools: Arc<[Tool]>,
    /// Those that the gateway runs, with how.
    pub kit: Kit,
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
    /// The arguments of a call that the gateway runs are complete, and its tool runs.
    CallRuns {
        /// Of which item.
        at: Arc<At>,
        /// The item.
        item: Arc<Item>,
    },
    /// A call has its outcome although its response is over.
    CallSettled(Arc<Item>),
    /// The dialect is to do something with the call itself.
    Control {
        /// The response in which the model asked for it.
        response: Id,
        /// What.
        request: control::Request,
    },
    /// A server was asked for its tools outside of a response. The item says how far that came.
    Listing(Arc<Item>),
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
    /// Whether it is a call that the gateway runs.
    pub runs: bool,
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
    /// Calls that run, and listings that are waited for.
    waiting: Vec<(Arc<At>, Item)>,
    /// What earlier rounds cost.
    spent: Usage,
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
            kit: Arc::default(),
            persona: None,
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
    pub(super) fn turn(&self, tools: &Arc<[Tool]>, mut conversation: Vec<Message>, most_tokens: usize) -> Turn {
        let agents = self.persona.as_ref().map_or("", |persona| &persona.instructions);
        let instructions = match (agents, &*self.instructions) {
            ("", own) => own.to_owned(),
            (agents, "") => agents.to_owned(),
            (agents, own) => format!("{agents}\n\n{own}"),
        };
        if !instructions.is_empty() {
            conversation.insert(0, Message::System(instructions));
        }
        let mut sampling = self.sampling.clone();
        sampling.max_tokens = sampling.max_tokens.or(Some(most_tokens));
        Turn {
            messages: conversation,
            tools: tools.clone(),
            tool_choice: if tools.is_empty() { ToolChoice::Auto } else { self.tool_choice.clone() },
            parallel_tool_calls: self.parallel_tool_calls,
            sampling,
            format: self.format.clone(),
            filler: self.filler,
            language: self.persona.as_ref().and_then(|persona| persona.language.clone()),
            whole: false,
        }
    }

    /// Whether there may be a tool of this name. What a server has is known later.
    pub fn may_know(&self, name: &str) -> bool {
        let agents = |persona: &Arc<Persona>| persona.kit.tools.iter().any(|tool| tool.name == name);
        self.tools.iter().any(|tool| tool.name == name)
            || self.persona.as_ref().is_some_and(agents)
            || self.servers().next().is_some()
    }

    /// Whether there may be any tools.
    pub fn has_tools(&self) -> bool {
        let agents = self.persona.as_ref().is_some_and(|persona| !persona.kit.is_empty());
        !self.tools.is_empty() || !self.kit.is_empty() || agents
    }

    /// Servers whose tools the model may call.
    pub(super) fn servers(&self) -> impl Iterator<Item = &Arc<Server>> {
        let agents = self.persona.iter().flat_map(|persona| &persona.kit.servers);
        agents.chain(&self.kit.servers)
    }

    /// All tools of a turn. `listed` gives what is known of a server.
    pub(super) fn arm(&self, listed: impl Fn(&Server) -> Option<Arc<[Tool]>>) -> Armed {
        if self.persona.is_none() && self.kit.is_empty() {
            return Armed { tools: self.tools.clone(), kit: Kit::default() };
        }
        let mut kit = Kit::default();
        if let Some(persona) = &self.persona {
            kit.tools.extend(persona.kit.tools.iter().cloned());
            kit.hands.extend(persona.kit.hands.iter().map(|(name, hand)| (name.clone(), hand.clone())));
        }
        for tool in self.tools.iter() {
            // The agent's own tools come first.
            if !kit.tools.iter().any(|other| other.name == tool.name) {
                kit.tools.push(tool.clone());
                if let Some(hand) = self.kit.hands.get(&tool.name) {
                    kit.hands.insert(tool.name.clone(), hand.clone());
                }
            }
        }
        for server in self.servers() {
            if let Some(tools) = listed(server) {
                kit.add(server, &tools);
            }
        }
        if self.persona.as_ref().is_some_and(|persona| !persona.attended) {
            let Kit { tools, hands, .. } = &mut kit;
            tools.retain(|tool| hands.get(&tool.name).is_none_or(|hand| !hand.approval));
        }
        Armed { tools: kit.tools.clone().into(), kit }
    }

    /// Most rounds of tool calls in a response.
    pub(super) fn tool_rounds(&self) -> usize {
        self.persona.as_ref().map_or(TOOL_ROUNDS, |persona| persona.tool_rounds)
    }

    /// How long a tool may run in silence.
    pub(super) fn still_waiting_after(&self) -> Duration {
        self.persona.as_ref().map_or(STILL_WAITING_AFTER, |persona| persona.still_waiting_after)
    }

    /// What is known of the call.
    pub(super) fn caller(&self) -> Arc<Map<String, Value>> {
        self.persona.as_ref().map_or_else(|| Arc::new(self.metadata.clone()), |persona| persona.caller.clone())
    }
}

// === impl Assembly ===

impl Assembly {
    pub(super) fn new(response: Response, previous: Option<Id>) -> Self {
        Self { response, open: None, waiting: Vec::new(), spent: Usage::default(), previous }
    }

    /// Takes the next event of the turn. Gives why the turn ended, when it did; whether the response ends with it is not
    /// decided here.
    pub(super) fn take(
        &mut self,
        event: TurnEvent,
        hands: impl Fn(&str) -> Option<Arc<Hand>>,
        out: &mut Vec<Event>,
    ) -> Option<FinishReason> {
        match event {
            TurnEvent::Text { delta, logprobs } => {
                if !matches!(self.open, Some(Open { content: Content::Message { .. }, .. })) {
                    self.close(Status::Completed, out);
                    self.begin_message(Phase::Answer, out);
                }
                if let Some(Open { at, content: Content::Message { text, .. } }) = &mut self.open {
                    text.push_str(&delta);
                    out.push(Event::Text { at: at.clone(), delta, logprobs });
                }
            }
            TurnEvent::CallBegun { id, name, .. } => {
                // What was said before a call was said on the way to it.
                if let Some(Open { content: Content::Message { phase, .. }, .. }) = &mut self.open {
                    *phase = Phase::Filler;
                }
                self.close(Status::Completed, out);
                let run = hands(&name).map(|hand| Run {
                    server: hand.label().into(),
                    state: if hand.approval { RunState::AwaitsApproval } else { RunState::Called },
                    approval: None,
                });
                self.begin(Content::Call { call_id: id.into(), name, arguments: String::new(), run }, out);
            }
            TurnEvent::Arguments { delta, .. } => {
                if let Some(Open { at, content: Content::Call { arguments, run, .. } }) = &mut self.open {
                    arguments.push_str(&delta);
                    // A call that has to be approved is shown when it is complete.
                    if !matches!(run, Some(Run { state: RunState::AwaitsApproval, .. })) {
                        out.push(Event::Arguments { at: at.clone(), delta });
                    }
                }
            }
            TurnEvent::CallEnded { .. } => match &self.open {
                Some(Open {
                    content: Content::Call { run: Some(Run { state: RunState::Called, .. }), .. }, ..
                }) => {
                    if let Some(Open { at, content }) = self.open.take() {
                        let item = Item { id: at.item.clone(), content, status: Status::InProgress };
                        self.run(at, item.with_run(RunState::Running), out);
                    }
                }
                _ => self.close(Status::Completed, out),
            },
            TurnEvent::Finished { reason, usage } => {
                self.cost(usage);
                self.spent = self.response.usage;
                self.close(if reason == FinishReason::Length { Status::Incomplete } else { Status::Completed }, out);
                return Some(reason);
            }
        }
        None
    }

    /// Takes note of what the present round cost so far.
    pub(super) fn cost(&mut self, usage: Usage) {
        self.response.usage = Usage {
            prompt_tokens: self.spent.prompt_tokens + usage.prompt_tokens,
            cached_tokens: self.spent.cached_tokens + usage.cached_tokens,
            completion_tokens: self.spent.completion_tokens + usage.completion_tokens,
        };
    }

    /// Says something that the model did not.
    pub(super) fn say(&mut self, text: &str, phase: Phase, out: &mut Vec<Event>) {
        self.close(Status::Completed, out);
        self.begin_message(phase, out);
        if let Some(Open { at, content: Content::Message { text: said, .. } }) = &mut self.open {
            said.push_str(text);
            out.push(Event::Text { at: at.clone(), delta: text.to_owned(), logprobs: Vec::new() });
        }
        self.close(Status::Completed, out);
    }

    /// Begins a call that was approved.
    pub(super) fn begin_approved(&mut self, request: &Item, out: &mut Vec<Event>) {
        let Content::Call { call_id, name, arguments, run: Some(run) } = &request.content else { return };
        let content = |arguments: String, state| Content::Call {
            call_id: call_id.clone(),
            name: name.clone(),
            arguments,
            run: Some(Run { server: run.server.clone(), state, approval: Some(request.id.clone()) }),
        };
        self.begin(content(String::new(), RunState::Called), out);
        if let Some(Open { at, .. }) = self.open.take() {
            out.push(Event::Arguments { at: at.clone(), delta: arguments.clone() });
            let id = at.item.clone();
            let content = content(arguments.clone(), RunState::Running);
            self.run(at, Item { id, content, status: Status::InProgress }, out);
        }
    }

    /// Begins to ask a server for its tools.
    pub(super) fn begin_listing(&mut self, server: &str, out: &mut Vec<Event>) {
        self.begin(Content::Listing { server: server.into(), tools: Ok(Arc::new([])) }, out);
        if let Some(Open { at, content }) = self.open.take() {
            let item = Item { id: at.item.clone(), content, status: Status::InProgress };
            self.waiting.push((at, item));
        }
    }

    /// A server gave its tools, or did not.
    pub(super) fn listed(&mut self, server: &str, listed: &Result<Arc<[Tool]>, Failure>, out: &mut Vec<Event>) {
        let is_it = |item: &Item| matches!(&item.content, Content::Listing { server: label, .. } if **label == *server);
        while let Some(at) = self.waiting.iter().position(|(_, item)| is_it(item)) {
            let (at, mut item) = self.waiting.swap_remove(at);
            item.content =
                Content::Listing { server: server.into(), tools: listed.clone().map_err(|failure| failure.told) };
            item.status = Status::Completed;
            self.settle(at, item, out);
        }
    }

    /// A call has its outcome. Gives whether it is one of this response.
    pub(super) fn answered(&mut self, call_id: &str, answer: Answer, out: &mut Vec<Event>) -> bool {
        let Some(at) = self.waiting.iter().position(|(_, item)| item.call().is_some_and(|id| **id == *call_id)) else {
            return false;
        };
        let (at, item) = self.waiting.swap_remove(at);
        self.settle(at, item.with_run(RunState::Done(answer)), out);
        true
    }

    /// The message that is being said.
    pub(super) fn speaking(&self) -> Option<&Id> {
        let open = self.open.as_ref().filter(|open| matches!(open.content, Content::Message { .. }))?;
        Some(&open.at.item)
    }

    /// Whether calls or listings have no outcome yet.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Ends the response where it is. Calls that still run stay as they are.
    pub(super) fn end(&mut self, outcome: Outcome, out: &mut Vec<Event>) {
        let whole = matches!(outcome, Outcome::Completed);
        self.close(if whole { Status::Completed } else { Status::Incomplete }, out);
        for (at, mut item) in std::mem::take(&mut self.waiting) {
            item.status = Status::Incomplete;
            self.settle(at, item, out);
        }
        self.response.completed_at = Some(now());
        self.response.outcome = Some(outcome);
        out.push(Event::Ended(Arc::new(self.response.clone())));
    }

    fn begin_message(&mut self, phase: Phase, out: &mut Vec<Event>) {
        self.begin(Content::Message { role: Role::Assistant, text: String::new(), phase }, out);
    }

    fn begin(&mut self, content: Content, out: &mut Vec<Event>) {
        let prefix = match &content {
            Content::Call { run: Some(Run { state: RunState::AwaitsApproval, .. }), .. } => "mcpr",
            Content::Call { run: Some(_), .. } => "mcp",
            Content::Call { .. } => "fc",
            Content::Listing { .. } => "mcpl",
            _ => "msg",
        };
        let id = new_id(prefix);
        let item = Arc::new(Item { id: id.clone(), content: content.clone(), status: Status::InProgress });
        let at = Arc::new(At {
            response: self.response.id.clone(),
            index: self.response.output.len(),
            item: id.clone(),
            call_id: item.call().cloned(),
            runs: item.run().is_some(),
            previous: self.previous.replace(id),
            in_conversation: self.response.in_conversation,
        });
        self.response.output.push(item.clone());
        out.push(Event::OutputBegun { at: at.clone(), item });
        self.open = Some(Open { at, content });
    }

    /// The arguments of a call are complete.
    fn run(&mut self, at: Arc<At>, item: Item, out: &mut Vec<Event>) {
        self.response.output[at.index] = Arc::new(item.clone());
        out.push(Event::CallRuns { at: at.clone(), item: Arc::new(item.clone()) });
        self.waiting.push((at, item));
    }

    fn close(&mut self, status: Status, out: &mut Vec<Event>) {
        if let Some(Open { at, content }) = self.open.take() {
            let item = Item { id: at.item.clone(), content, status };
            self.settle(at, item, out);
        }
    }

    fn settle(&mut self, at: Arc<At>, item: Item, out: &mut Vec<Event>) {
        let item = Arc::new(item);
        self.response.output[at.index] = item.clone();
        out.push(Event::OutputEnded { at, item });
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
