//! What was said in a conversation: a tree of immutable records.
//!
//! A [`History`] is a path from the root of the tree to one of its nodes. Adding to it makes a new node and changes
//! nothing that exists, so any earlier state can be continued, and what two conversations have in common is held once.
//! Truncating and deleting are records too: the caller's version of what happened is what the path adds up to.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use uuid::Uuid;

use crate::{
    error::{Error, Fault},
    turn::{Message, Tool, ToolCall},
};

/// An id on the wire, such as `item_…`.
pub type Id = Arc<str>;

/// A new id: a prefix and a UUIDv7, so that ids sort by time.
pub fn new_id(prefix: &str) -> Id {
    format!("{prefix}_{}", Uuid::now_v7().simple()).into()
}

/// What stands in the prompt for the result of a call that was never answered.
const CANCELLED: &str = "{\"error\": \"The call was cancelled before it had a result.\"}";
/// What stands there while a call still runs and the conversation goes on.
const STILL_RUNNING: &str = "{\"status\": \"This still runs; the result is not known yet.\"}";

/// One thing that was said, called or answered. Never changed once it is part of a history.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Unique in the conversation; the client's own, or `item_…`.
    pub id: Id,
    /// What it is.
    pub content: Content,
    /// How far it came.
    pub status: Status,
}

/// What an item is.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Words.
    Message {
        /// Whose.
        role: Role,
        /// The text.
        text: String,
        /// Why they were said.
        phase: Phase,
    },
    /// A call that the model made.
    Call {
        /// What its output names, `call_…`.
        call_id: Id,
        /// The tool.
        name: String,
        /// JSON text.
        arguments: String,
        /// Of a tool that the gateway runs.
        run: Option<Run>,
    },
    /// What a tool of the client's answered.
    Output {
        /// The call that it answers.
        call_id: Id,
        /// Text or JSON.
        output: String,
    },
    /// The tools of a server, as it listed them.
    Listing {
        /// The server's label.
        server: Id,
        /// Its tools, or why they are not known.
        tools: Result<Arc<[Tool]>, String>,
    },
    /// A person's word on a call that had to be approved.
    Approval {
        /// The item that asked for it.
        request: Id,
        /// Whether the tool may run.
        approve: bool,
    },
}

/// Why something was said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// To answer.
    #[default]
    Answer,
    /// On the way to a tool call.
    Filler,
    /// While a tool ran. The model does not read it again, since it tells nothing.
    Waiting,
}

/// How far a call came that the gateway runs. It has one outcome, [`RunState::Done`].
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// What clients read as the tool's server.
    pub server: Id,
    /// How far it came.
    pub state: RunState,
    /// The request that was approved.
    pub approval: Option<Id>,
}

/// How far a call came.
#[derive(Clone, Debug, PartialEq)]
pub enum RunState {
    /// The model writes its arguments.
    Called,
    /// It waits for a person's approval. A conversation that goes on without gives it up.
    AwaitsApproval,
    /// It was approved; the call itself is an item of its own.
    Approved,
    /// The tool runs.
    Running,
    /// It is over.
    Done(Answer),
}

/// The outcome of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// What the model reads: text or JSON.
    pub output: String,
    /// Why there is no result, in words for a person.
    pub error: Option<String>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The agent's operator.
    System,
    /// The caller.
    User,
    /// The model.
    Assistant,
}

/// How far an item or a response came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It is being made.
    InProgress,
    /// All of it is there.
    Completed,
    /// It was cut off.
    Incomplete,
}

/// A state of a conversation. Cloning it is cheap, and the clone can be continued on its own.
#[derive(Clone, Debug, Default)]
pub struct History {
    head: Option<Arc<Node>>,
}

#[derive(Debug)]
struct Node {
    parent: Option<Arc<Node>>,
    record: Record,
    /// Records on the path up to here.
    length: usize,
    /// Bytes of text on the path up to here.
    bytes: usize,
}

#[derive(Debug)]
enum Record {
    /// At the end, or behind an item; behind none is at the start.
    Add { item: Arc<Item>, place: Place },
    /// Another version of the item with this id: it was completed, or only a part of it was heard.
    Replace(Arc<Item>),
    /// The client deleted them, or they had to make room.
    Remove(Vec<Id>),
    /// These calls will not be answered any more.
    CancelCalls(Vec<Id>),
}

/// Where an item goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Place {
    /// At the end.
    #[default]
    End,
    /// At the start.
    Start,
    /// Behind this item.
    Behind(Id),
}

/// Bounds of one history.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most records.
    pub records: usize,
    /// Most bytes of text.
    pub bytes: usize,
}

/// What a history adds up to.
#[derive(Debug, Default)]
pub struct View {
    /// In conversation order.
    pub items: Vec<Arc<Item>>,
    /// Calls that will not be answered.
    pub cancelled: HashSet<Id>,
}

// === impl Item ===

impl Item {
    /// A message of any role.
    pub fn message(id: Id, role: Role, text: impl Into<String>) -> Self {
        let content = Content::Message { role, text: text.into(), phase: Phase::Answer };
        Self { id, content, status: Status::Completed }
    }

    /// The bytes of text that it holds.
    fn bytes(&self) -> usize {
        match &self.content {
            Content::Message { text, .. } => text.len(),
            Content::Call { name, arguments, run, .. } => {
                let output = run.as_ref().map_or(0, |run| match &run.state {
                    RunState::Done(answer) => answer.output.len(),
                    _ => 0,
                });
                name.len() + arguments.len() + output
            }
            Content::Output { output, .. } => output.len(),
            // What a server lists is shared by all who ask it.
            Content::Listing { .. } | Content::Approval { .. } => 0,
        }
    }

    /// The text of a message of the model.
    pub fn spoken(&self) -> Option<&str> {
        match &self.content {
            Content::Message { role: Role::Assistant, text, .. } => Some(text),
            _ => None,
        }
    }

    /// How far a call came that the gateway runs.
    pub fn run(&self) -> Option<&Run> {
        match &self.content {
            Content::Call { run, .. } => run.as_ref(),
            _ => None,
        }
    }

    /// The same call, further on.
    pub fn with_run(&self, state: RunState) -> Self {
        let mut item = self.clone();
        let done = matches!(state, RunState::Done(_));
        if let Content::Call { run: Some(run), .. } = &mut item.content {
            run.state = state;
        }
        if done {
            item.status = Status::Completed;
        }
        item
    }

    /// The id of a call.
    pub fn call(&self) -> Option<&Id> {
        match &self.content {
            Content::Call { call_id, .. } => Some(call_id),
            _ => None,
        }
    }

    /// The version of a spoken message of which only this much was heard.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the item was not spoken by the model, or does not start with the text.
    pub fn heard(&self, heard: &str) -> Result<Self, Error> {
        let Content::Message { role: Role::Assistant, text, phase } = &self.content else {
            return Err(Error::invalid("item_id", format!("`{}` is no message of the assistant", self.id)));
        };
        let end = heard_end(text, heard).ok_or_else(|| {
            Error::invalid("text", format!("text has to be the beginning of what `{}` says", self.id))
        })?;
        let status = if end == text.len() { self.status } else { Status::Incomplete };
        let content = Content::Message { role: Role::Assistant, text: text[..end].to_owned(), phase: *phase };
        Ok(Self { id: self.id.clone(), content, status })
    }
}

/// Where in `text` the part ends that sounds like `heard`; `None` when it begins otherwise. Only letters and digits are
/// compared, since transcripts of speech have punctuation and case of their own.
fn heard_end(text: &str, heard: &str) -> Option<usize> {
    let heard = heard.trim();
    if text.starts_with(heard) {
        return Some(heard.len());
    }
    let sounds = |c: &char| c.is_alphanumeric();
    let mut rest = text.char_indices();
    let mut end = 0;
    for wanted in heard.chars().filter(sounds) {
        let (at, found) = rest.find(|(_, c)| sounds(c))?;
        if found != wanted && !found.to_lowercase().eq(wanted.to_lowercase()) {
            return None;
        }
        end = at + found.len_utf8();
    }
    let whole = !text[end..].chars().any(|c| sounds(&c));
    // A mark behind the last word belongs to it.
    let marks = text[end..].find(|c: char| c.is_whitespace() || sounds(&c)).unwrap_or(text.len() - end);
    Some(if whole && end > 0 {
        text.len()
    } else if end > 0 {
        end + marks
    } else {
        0
    })
}

// === impl History ===

impl History {
    /// Adds an item.
    ///
    /// # Errors
    /// [`Error::Invalid`] when its id or call id is taken, when it answers no open call, or when the history is full.
    pub fn add(&mut self, item: Arc<Item>, place: Place, bounds: Bounds) -> Result<(), Error> {
        let view = self.view();
        view.check(&item, &place)?;
        self.check_room(item.bytes(), bounds)?;
        self.push(Record::Add { item, place });
        Ok(())
    }

    /// Adds several items at the end, checked as [`History::add`] does, or none of them.
    ///
    /// # Errors
    /// Of the first item that cannot be added, with its place in the list as the path.
    pub fn extend(&mut self, items: &[Arc<Item>], field: &'static str, bounds: Bounds) -> Result<(), Error> {
        let mut next = self.clone();
        let mut view = next.view();
        for (i, item) in items.iter().enumerate() {
            view.check(item, &Place::End).map_err(|e| e.under(&[field.into(), i.into()]))?;
            next.check_room(item.bytes(), bounds)?;
            view.items.push(item.clone());
            next.push(Record::Add { item: item.clone(), place: Place::End });
        }
        *self = next;
        Ok(())
    }

    /// Takes out of a client's input what only repeats how this history ends. Some clients send what a response said and
    /// called again when they continue it. Words that stop early are what was heard, and replace those that were said.
    pub fn repeat(&mut self, said: &[Arc<Item>], input: &mut Vec<Arc<Item>>) {
        let view = self.view();
        let mut words = said.iter().filter(|item| item.spoken().is_some()).peekable();
        // Once something new was said, what follows is new as well; a call is known by its id wherever it stands.
        let mut repeats = true;
        input.retain(|item| match &item.content {
            Content::Call { call_id, .. } => !view.calls().any(|call| call == call_id),
            Content::Message { role: Role::Assistant, text, .. } if repeats && text.trim().is_empty() => false,
            Content::Message { role: Role::Assistant, text, .. } if repeats => {
                let Some(Ok(heard)) = words.peek().map(|said| said.heard(text)) else {
                    repeats = false;
                    return true;
                };
                words.next();
                if view.item(&heard.id).is_some_and(|item| item.spoken() != heard.spoken()) {
                    self.replace(Arc::new(heard));
                }
                false
            }
            _ => {
                repeats = false;
                true
            }
        });
    }

    /// Takes a platform's transcript of the whole call as what was heard: what the agent is shown to have said replaces what
    /// it said since the caller spoke last, and what the caller said since is added. `known` is how much of an earlier
    /// version is part of the history; gives how much is now.
    pub(super) fn transcribe(&mut self, transcript: &[(Role, String)], known: usize) -> usize {
        // Platforms join and split what one speaker says in a row.
        let mut spoken: Vec<(Role, String)> = Vec::new();
        for (role, text) in transcript.iter().map(|(role, text)| (*role, text.trim())) {
            match spoken.last_mut() {
                _ if text.is_empty() => {}
                Some((last, words)) if *last == role => {
                    words.push(' ');
                    words.push_str(text);
                }
                _ => spoken.push((role, text.to_owned())),
            }
        }
        let view = self.view();
        let known = known.min(spoken.len());
        // A caller who went on speaking after an answer had begun: their last words are more now.
        if let Some((Role::User, now)) = known.checked_sub(1).map(|at| &spoken[at]) {
            self.went_on(&view, now);
        }
        let mut new = spoken[known..].iter().peekable();
        let heard = new.next_if(|(role, _)| *role == Role::Assistant).map_or("", |(_, text)| text);
        self.correct(&view.latest_words(), heard);
        // Whatever is left: the caller's words, and words of the agent's that this history does not know.
        for (role, text) in new {
            let item = Arc::new(Item::message(new_id("msg"), *role, text.as_str()));
            self.push(Record::Add { item, place: Place::End });
        }
        spoken.iter().rposition(|(role, _)| *role == Role::User).map_or(0, |at| at + 1)
    }

    /// What the caller said since they last heard anything is this by now.
    fn went_on(&mut self, view: &View, now: &str) {
        let text = |item: &Arc<Item>| match &item.content {
            Content::Message { role: Role::User, text, .. } => Some(text.clone()),
            _ => None,
        };
        let Some(last) = view.items.iter().rposition(|item| text(item).is_some()) else { return };
        let heard = |item: &Arc<Item>| item.spoken().is_some_and(|words| !words.is_empty());
        let from = view.items[..last].iter().rposition(heard).map_or(0, |at| at + 1);
        let said: Vec<&Arc<Item>> = view.items[from..=last].iter().filter(|item| text(item).is_some()).collect();
        let known = said.iter().filter_map(|item| text(item)).collect::<Vec<_>>().join(" ");
        if known == now {
            return;
        }
        let more = heard_end(now, &known).map(|end| now[end..].trim()).filter(|_| !known.is_empty());
        let called = view.items[last..].iter().any(|item| item.call().is_some());
        match more {
            Some("") => {}
            // What a tool told meanwhile stands between.
            Some(more) if called => {
                let item = Arc::new(Item::message(new_id("msg"), Role::User, more));
                self.push(Record::Add { item, place: Place::End });
            }
            _ => {
                self.replace(Arc::new(Item::message(said[0].id.clone(), Role::User, now)));
                let others: Vec<Id> = said[1..].iter().map(|item| item.id.clone()).collect();
                if !others.is_empty() {
                    self.remove(others);
                }
            }
        }
    }

    /// Makes of what was said what was heard.
    fn correct(&mut self, said: &[Arc<Item>], heard: &str) {
        let spoken = said.iter().filter_map(|item| item.spoken()).collect::<Vec<_>>().join(" ");
        let Some(last) = said.last() else {
            if !heard.is_empty() {
                self.push(Record::Add {
                    item: Arc::new(Item::message(new_id("msg"), Role::Assistant, heard)),
                    place: Place::End,
                });
            }
            return;
        };
        if heard_end(&spoken, heard).is_some_and(|end| end == spoken.len()) && !heard.is_empty() {
            return;
        }
        let part = if heard.is_empty() { None } else { heard_from(said, 0, heard) };
        let changed = part.unwrap_or_else(|| {
            // Nothing of it was heard, or it was heard in other words.
            let mut changed: Vec<Item> = said.iter().filter_map(|item| item.heard("").ok()).collect();
            if let (false, Some(Item { content: Content::Message { text, .. }, .. })) =
                (heard.is_empty(), changed.iter_mut().find(|item| item.id == last.id))
            {
                *text = heard.to_owned();
            }
            changed
        });
        for item in changed {
            self.replace(Arc::new(item));
        }
    }

    /// Adds an item of the model, which needs no check.
    pub(super) fn add_own(&mut self, item: Arc<Item>) {
        self.push(Record::Add { item, place: Place::End });
    }

    /// Puts another version in the place of the item with the same id.
    pub fn replace(&mut self, item: Arc<Item>) {
        self.push(Record::Replace(item));
    }

    /// Takes items out.
    pub fn remove(&mut self, ids: Vec<Id>) {
        self.push(Record::Remove(ids));
    }

    /// Gives up calls that have no output.
    pub fn cancel_calls(&mut self, calls: Vec<Id>) {
        if !calls.is_empty() {
            self.push(Record::CancelCalls(calls));
        }
    }

    /// What it adds up to.
    pub fn view(&self) -> View {
        let mut records = Vec::with_capacity(self.head.as_ref().map_or(0, |node| node.length));
        let mut at = self.head.as_deref();
        while let Some(node) = at {
            records.push(&node.record);
            at = node.parent.as_deref();
        }
        let mut view = View::default();
        for record in records.into_iter().rev() {
            view.apply(record);
        }
        view
    }

    fn check_room(&self, bytes: usize, bounds: Bounds) -> Result<(), Error> {
        let (length, held) = self.head.as_ref().map_or((0, 0), |node| (node.length, node.bytes));
        if length >= bounds.records || held.saturating_add(bytes) > bounds.bytes {
            return Err(Error::Invalid(vec![Fault::new(
                [],
                format!(
                    "The conversation is full: a session may hold {} records of {} bytes of text in all. Start a new one.",
                    bounds.records, bounds.bytes
                ),
            )]));
        }
        Ok(())
    }

    fn push(&mut self, record: Record) {
        let (length, bytes) = self.head.as_ref().map_or((0, 0), |node| (node.length, node.bytes));
        let added = match &record {
            Record::Add { item, .. } | Record::Replace(item) => item.bytes(),
            Record::Remove(_) | Record::CancelCalls(_) => 0,
        };
        let node = Node { parent: self.head.take(), record, length: length + 1, bytes: bytes + added };
        self.head = Some(Arc::new(node));
    }
}

impl Drop for Node {
    /// A long history would overflow the stack if every node dropped the one before it.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(node) = next {
            match Arc::try_unwrap(node) {
                Ok(mut node) => next = node.parent.take(),
                Err(_) => break,
            }
        }
    }
}

// === impl View ===

impl View {
    fn apply(&mut self, record: &Record) {
        match record {
            Record::Add { item, place } => {
                let at = match place {
                    Place::End => self.items.len(),
                    Place::Start => 0,
                    Place::Behind(id) => self.position(id).map_or(self.items.len(), |at| at + 1),
                };
                self.items.insert(at, item.clone());
            }
            Record::Replace(item) => {
                if let Some(at) = self.position(&item.id) {
                    self.items[at] = item.clone();
                }
            }
            Record::Remove(ids) => self.items.retain(|item| !ids.contains(&item.id)),
            Record::CancelCalls(calls) => self.cancelled.extend(calls.iter().cloned()),
        }
    }

    fn position(&self, id: &str) -> Option<usize> {
        self.items.iter().rposition(|item| &*item.id == id)
    }

    /// The item with this id.
    pub fn item(&self, id: &str) -> Option<&Arc<Item>> {
        self.position(id).map(|at| &self.items[at])
    }

    /// The id of the item before this one.
    pub fn previous(&self, id: &str) -> Option<Id> {
        let at = self.position(id)?.checked_sub(1)?;
        Some(self.items[at].id.clone())
    }

    /// Whether an item can be added.
    fn check(&self, item: &Item, place: &Place) -> Result<(), Error> {
        if self.item(&item.id).is_some() {
            return Err(Error::invalid("id", format!("the id `{}` is taken by another item", item.id)));
        }
        if let Place::Behind(id) = place
            && self.item(id).is_none()
        {
            return Err(Error::invalid("previous_item_id", format!("there is no item `{id}`")));
        }
        match &item.content {
            Content::Call { call_id, .. } if self.calls().any(|call| call == call_id) => {
                Err(Error::invalid("call_id", format!("the call_id `{call_id}` is taken by another call")))
            }
            Content::Output { call_id, .. } => self.check_output(call_id),
            Content::Approval { request, .. } => {
                let waits = |item: &Arc<Item>| item.run().is_some_and(|run| run.state == RunState::AwaitsApproval);
                let answers = |item: &Arc<Item>| matches!(&item.content, Content::Approval { request: other, .. } if other == request);
                if self.items.iter().any(answers) || !self.item(request).is_some_and(waits) {
                    let why = format!("there is no call `{request}` that waits for an approval");
                    return Err(Error::invalid("approval_request_id", why));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn check_output(&self, call_id: &Id) -> Result<(), Error> {
        let why = if !self.calls().any(|call| call == call_id) {
            format!("No tool call found for function call output with call_id `{call_id}`.")
        } else if self.cancelled.contains(call_id) {
            format!("The call `{call_id}` was cancelled: the conversation went on without its output.")
        } else if self.outputs().any(|(answered, _)| answered == call_id) {
            format!("The call `{call_id}` has an output already.")
        } else {
            return Ok(());
        };
        Err(Error::invalid("call_id", why))
    }

    /// Ids of the client's calls that are part of the prompt.
    fn calls(&self) -> impl Iterator<Item = &Id> {
        let clients = |item: &&Arc<Item>| item.status == Status::Completed && item.run().is_none();
        self.items.iter().filter(clients).filter_map(|item| item.call())
    }

    /// The first call of the gateway's that is running.
    pub fn running(&self) -> Option<&Id> {
        let runs = |item: &&Arc<Item>| item.run().is_some_and(|run| run.state == RunState::Running);
        self.items.iter().find(runs).and_then(|item| item.call())
    }

    fn outputs(&self) -> impl Iterator<Item = (&Id, &str)> {
        self.items.iter().filter_map(|item| match &item.content {
            Content::Output { call_id, output } => Some((call_id, output.as_str())),
            _ => None,
        })
    }

    /// Calls that wait for their outputs.
    pub fn unanswered(&self) -> Vec<Id> {
        let answered: HashSet<&Id> = self.outputs().map(|(call, _)| call).collect();
        let open = |call: &&Id| !answered.contains(*call) && !self.cancelled.contains(*call);
        self.calls().filter(open).cloned().collect()
    }

    /// The conversation as the model reads it: every call has its output right behind it, and one that has none is told
    /// to be cancelled. The same items always give the same messages in front, so that a turn extends the prompt of the
    /// one before it.
    pub fn messages(&self) -> Vec<Message> {
        let mut outputs: HashMap<&Id, &str> = self.outputs().collect();
        let mut messages = Vec::with_capacity(self.items.len());
        for item in &self.items {
            if let Content::Call { call_id, run: Some(run), .. } = &item.content {
                match &run.state {
                    RunState::Done(answer) => drop(outputs.insert(call_id, &answer.output)),
                    RunState::Running => drop(outputs.insert(call_id, STILL_RUNNING)),
                    RunState::Called | RunState::AwaitsApproval | RunState::Approved => {}
                }
            }
        }
        let mut waiting: Vec<&Id> = Vec::new();
        let mut answer = |waiting: &mut Vec<&Id>, messages: &mut Vec<Message>| {
            for call in waiting.drain(..) {
                let content = outputs.remove(call).unwrap_or(CANCELLED).to_owned();
                messages.push(Message::Tool { call_id: call.to_string(), content });
            }
        };
        for item in &self.items {
            match &item.content {
                Content::Message { phase: Phase::Waiting, .. } => {}
                Content::Message { role: Role::Assistant, text, .. } => {
                    answer(&mut waiting, &mut messages);
                    if !text.is_empty() {
                        messages.push(Message::Assistant { content: Some(text.clone()), tool_calls: Vec::new() });
                    }
                }
                Content::Message { role, text, .. } => {
                    answer(&mut waiting, &mut messages);
                    messages.push(match role {
                        Role::System => Message::System(text.clone()),
                        _ => Message::User(text.clone()),
                    });
                }
                Content::Call { call_id, name, arguments, run } if is_called(item.status, run.as_ref()) => {
                    let call = ToolCall { id: call_id.to_string(), name: name.clone(), arguments: arguments.clone() };
                    match messages.last_mut() {
                        Some(Message::Assistant { tool_calls, .. }) => tool_calls.push(call),
                        _ => messages.push(Message::Assistant { content: None, tool_calls: vec![call] }),
                    }
                    waiting.push(call_id);
                }
                Content::Call { .. } | Content::Output { .. } | Content::Listing { .. } | Content::Approval { .. } => {}
            }
        }
        answer(&mut waiting, &mut messages);
        messages
    }

    /// What was said to the caller since they spoke last.
    pub fn latest_words(&self) -> Vec<Arc<Item>> {
        let is_user = |item: &Arc<Item>| matches!(item.content, Content::Message { role: Role::User, .. });
        let from = self.items.iter().rposition(is_user).map_or(0, |at| at + 1);
        self.items[from..].iter().filter(|item| item.spoken().is_some()).cloned().collect()
    }

    /// The items of the oldest exchange: what a caller said and all that followed until they spoke again. Instructions
    /// stay, and so does the last exchange, since the next turn answers it.
    pub fn oldest_exchange(&self) -> Option<Vec<Id>> {
        let is = |item: &Item, wanted: Role| matches!(item.content, Content::Message { role, .. } if role == wanted);
        let spoken: Vec<&Arc<Item>> = self.items.iter().filter(|item| !is(item, Role::System)).collect();
        let next = spoken.iter().skip(1).position(|item| is(item, Role::User))? + 1;
        Some(spoken[..next].iter().map(|item| item.id.clone()).collect())
    }
}

/// Whether a call is part of the prompt.
fn is_called(status: Status, run: Option<&Run>) -> bool {
    match run {
        None => status == Status::Completed,
        Some(run) => matches!(run.state, RunState::Running | RunState::Done(_)),
    }
}

/// Applies to several messages, said one after the other, what was heard of them. `heard` is what was heard of all of
/// them, or of those from some message on, or of the sentence that was being spoken, when the caller heard what comes
/// before to its end. Gives those that change; messages that nothing was heard of become empty.
pub fn heard_of(said: &[Arc<Item>], heard: &str) -> Vec<Item> {
    if heard.trim().is_empty() {
        return said.last().and_then(|last| last.heard("").ok()).into_iter().collect();
    }
    if let Some(changed) = (0..said.len()).rev().find_map(|from| heard_from(said, from, heard)) {
        return changed;
    }
    // A part that begins within a message.
    for (at, item) in said.iter().enumerate().rev() {
        let words = item.spoken().unwrap_or_default();
        let starts = words.char_indices().rev().filter(|(at, c)| {
            c.is_alphanumeric() && !words[..*at].chars().next_back().is_some_and(char::is_alphanumeric)
        });
        let found = { starts }.find_map(|(start, _)| Some(start + heard_end(&words[start..], heard)?));
        if let Some(end) = found {
            let mut changed = unheard(&said[at + 1..]);
            changed.extend(item.heard(&words[..end]));
            return changed;
        }
    }
    Vec::new()
}

/// The same for what was heard from one message on; `None` when they say something else.
fn heard_from(said: &[Arc<Item>], from: usize, heard: &str) -> Option<Vec<Item>> {
    let mut rest = heard.trim();
    for (at, item) in said.iter().enumerate().skip(from) {
        let words = item.spoken().unwrap_or_default().trim();
        // All of this one was heard, and more.
        if let Some(end) = heard_end(rest, words)
            && (end < rest.len() || words.is_empty())
        {
            rest = rest[end..].trim_start();
            continue;
        }
        let part = item.heard(rest).ok()?;
        let mut changed = unheard(&said[at + 1..]);
        if part.spoken() != item.spoken() {
            changed.insert(0, part);
        }
        return Some(changed);
    }
    None
}

/// The versions of messages of which nothing was heard.
fn unheard(said: &[Arc<Item>]) -> Vec<Item> {
    said.iter().filter_map(|item| item.heard("").ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOMY: Bounds = Bounds { records: 100_000, bytes: 1 << 20 };

    fn said(role: Role, text: &str) -> Arc<Item> {
        Arc::new(Item::message(new_id("msg"), role, text))
    }

    fn call(id: &str) -> Arc<Item> {
        let content = Content::Call { call_id: id.into(), name: "find".into(), arguments: "{}".into(), run: None };
        Arc::new(Item { id: new_id("fc"), content, status: Status::Completed })
    }

    fn output(id: &str, text: &str) -> Arc<Item> {
        let content = Content::Output { call_id: id.into(), output: text.into() };
        Arc::new(Item { id: new_id("fco"), content, status: Status::Completed })
    }

    fn history(items: &[Arc<Item>]) -> History {
        let mut history = History::default();
        history.extend(items, "input", ROOMY).unwrap();
        history
    }

    fn roles(messages: &[Message]) -> String {
        let role = |message: &Message| match message {
            Message::System(_) => 's',
            Message::User(_) => 'u',
            Message::Assistant { tool_calls, .. } if !tool_calls.is_empty() => 'c',
            Message::Assistant { .. } => 'a',
            Message::Tool { .. } => 't',
        };
        messages.iter().map(role).collect()
    }

    #[test]
    fn what_is_added_to_a_fork_is_not_in_the_other() {
        let mut one = history(&[said(Role::User, "Hello.")]);
        let mut other = one.clone();
        one.add(said(Role::User, "One."), Place::End, ROOMY).unwrap();
        other.add(said(Role::User, "Other."), Place::End, ROOMY).unwrap();
        assert_eq!((one.view().items.len(), other.view().items.len()), (2, 2));
        assert_eq!(one.view().items[0].id, other.view().items[0].id);
        assert_ne!(one.view().items[1], other.view().items[1]);
    }

    #[test]
    fn a_long_history_is_dropped_without_a_deep_stack() {
        let mut history = History::default();
        for _ in 0..200_000 {
            history.add_own(said(Role::User, ""));
        }
        drop(history);
    }

    #[test]
    fn items_go_where_they_are_put() {
        let first = said(Role::User, "first");
        let mut history = history(std::slice::from_ref(&first));
        history.add(said(Role::User, "last"), Place::End, ROOMY).unwrap();
        history.add(said(Role::System, "before"), Place::Start, ROOMY).unwrap();
        history.add(said(Role::User, "second"), Place::Behind(first.id.clone()), ROOMY).unwrap();
        let view = history.view();
        let text = |message| match message {
            Message::User(text) | Message::System(text) => text,
            other => panic!("{other:?}"),
        };
        let texts: Vec<String> = view.messages().into_iter().map(text).collect();
        assert_eq!(texts, ["before", "first", "second", "last"]);
        assert_eq!(view.previous(&first.id), Some(view.items[0].id.clone()));
        assert!(history.add(said(Role::User, ""), Place::Behind("none".into()), ROOMY).is_err());
        assert!(history.add(first, Place::End, ROOMY).is_err(), "the same id twice");
    }

    #[test]
    fn every_call_is_answered_right_behind_it() {
        let mut history =
            history(&[said(Role::User, "x"), call("a"), call("b"), said(Role::User, "y"), output("b", "B")]);
        assert_eq!(history.view().unanswered(), ["a".into()]);
        history.cancel_calls(vec!["a".into()]);
        let messages = history.view().messages();
        assert_eq!(roles(&messages), "ucttu");
        assert_eq!(messages[2], Message::Tool { call_id: "a".into(), content: CANCELLED.into() });
        assert_eq!(messages[3], Message::Tool { call_id: "b".into(), content: "B".into() });
        for (id, why) in [("a", "cancelled"), ("b", "already"), ("c", "No tool call")] {
            let refused = history.add(output(id, ""), Place::End, ROOMY).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn a_call_that_was_cut_off_is_not_in_the_prompt() {
        let mut cut = Item::clone(&call("a"));
        cut.status = Status::Incomplete;
        let history = history(&[said(Role::User, "x"), Arc::new(cut), said(Role::User, "y")]);
        assert_eq!(roles(&history.view().messages()), "uu");
        assert!(history.view().unanswered().is_empty());
    }

    #[test]
    fn what_was_heard_is_the_beginning_of_what_was_said() {
        let item = said(Role::Assistant, "Hello there. How are you?");
        let heard = |text: &str| item.heard(text).map(|item| item.spoken().unwrap_or_default().to_owned());
        assert_eq!(heard("Hello there").unwrap(), "Hello there");
        assert_eq!(heard("hello there").unwrap(), "Hello there.");
        assert_eq!(heard("hello  there how").unwrap(), "Hello there. How");
        assert_eq!(heard("hello there how are you").unwrap(), "Hello there. How are you?");
        assert_eq!(heard("").unwrap(), "");
        assert!(heard("Goodbye").is_err());
        assert!(heard("Hello there. How are you? Fine.").is_err());
        assert!(said(Role::User, "Hello").heard("Hello").is_err());
    }

    #[test]
    fn a_client_that_repeats_what_was_said_says_it_once() {
        let spoken = said(Role::Assistant, "One two three.");
        let output_items = [spoken.clone(), call("a")];
        let base = history(&[said(Role::User, "x"), spoken.clone(), output_items[1].clone()]);

        let mut same = base.clone();
        let mut input = vec![said(Role::Assistant, "One two three."), call("a"), output("a", "A")];
        same.repeat(&output_items, &mut input);
        assert_eq!(input.len(), 1);
        assert_eq!(same.view().item(&spoken.id).unwrap().spoken(), Some("One two three."));

        let mut shorter = base.clone();
        let mut input = vec![said(Role::Assistant, "One two"), said(Role::User, "Stop.")];
        shorter.repeat(&output_items, &mut input);
        assert_eq!(input.len(), 1);
        assert_eq!(shorter.view().item(&spoken.id).unwrap().spoken(), Some("One two"));

        let mut other = base.clone();
        let mut input = vec![said(Role::Assistant, "Something else."), call("a"), said(Role::User, "Stop.")];
        other.repeat(&output_items, &mut input);
        assert_eq!(input.len(), 2, "a known call is not said twice");
        assert_eq!(other.view().item(&spoken.id).unwrap().spoken(), Some("One two three."));

        let mut empty = base.clone();
        let mut input = vec![said(Role::Assistant, ""), said(Role::User, "Stop.")];
        empty.repeat(&output_items, &mut input);
        assert_eq!(empty.view().item(&spoken.id).unwrap().spoken(), Some("One two three."));
    }

    #[test]
    fn old_exchanges_make_room_but_not_instructions_nor_the_last_one() {
        let items = [
            said(Role::System, "s"),
            said(Role::User, "one"),
            call("a"),
            output("a", "A"),
            said(Role::Assistant, "One."),
            said(Role::User, "two"),
            said(Role::Assistant, "Two."),
        ];
        let mut history = history(&items);
        let oldest = history.view().oldest_exchange().unwrap();
        assert_eq!(oldest, items[1..5].iter().map(|item| item.id.clone()).collect::<Vec<_>>());
        history.remove(oldest);
        assert_eq!(roles(&history.view().messages()), "sua");
        assert_eq!(history.view().oldest_exchange(), None);
    }

    #[test]
    fn a_history_has_bounds() {
        let bounds = Bounds { records: 3, bytes: 10 };
        let mut history = History::default();
        history.add(said(Role::User, "12345678"), Place::End, bounds).unwrap();
        assert!(history.add(said(Role::User, "123"), Place::End, bounds).is_err());
        history.add(said(Role::User, ""), Place::End, bounds).unwrap();
        history.add(said(Role::User, ""), Place::End, bounds).unwrap();
        assert!(history.add(said(Role::User, ""), Place::End, bounds).unwrap_err().to_string().contains("full"));
    }

    fn words(history: &History) -> Vec<(Role, String)> {
        let read = |item: &Arc<Item>| match &item.content {
            Content::Message { role, text, .. } => Some((*role, text.clone())),
            _ => None,
        };
        history.view().items.iter().filter_map(read).collect()
    }

    fn transcript(utterances: &[(Role, &str)]) -> Vec<(Role, String)> {
        utterances.iter().map(|(role, text)| (*role, (*text).to_owned())).collect()
    }

    #[test]
    fn what_was_heard_of_several_messages_ends_in_one_of_them() {
        let said =
            [said(Role::Assistant, "One moment."), said(Role::Assistant, "It ships today. It arrives on Friday.")];
        let heard = |text: &str| -> Vec<(usize, String)> {
            let place = |item: &Item| said.iter().position(|said| said.id == item.id).unwrap();
            heard_of(&said, text).iter().map(|item| (place(item), item.spoken().unwrap().to_owned())).collect()
        };
        assert_eq!(heard("One moment."), [(1, String::new())]);
        assert_eq!(heard("one mo"), [(0, "One mo".into()), (1, String::new())]);
        assert_eq!(heard("It ships"), [(1, "It ships".into())]);
        assert_eq!(heard("One moment. It ships today"), [(1, "It ships today".into())]);
        assert_eq!(heard("It ships today. It arrives on Friday."), []);
        // A platform that tells of the sentence that was being spoken.
        assert_eq!(heard("It arrives on"), [(1, "It ships today. It arrives on".into())]);
        assert_eq!(heard(""), [(1, String::new())]);
        assert_eq!(heard("Something else"), []);
    }

    #[test]
    fn a_transcript_decides_what_was_heard() {
        let mut history = history(&[said(Role::Assistant, "Hello, how can I help you?")]);
        let mut known = 0;
        let mut hear = |history: &mut History, utterances: &[(Role, &str)]| {
            known = history.transcribe(&transcript(utterances), known);
        };
        let (agent, user) = (Role::Assistant, Role::User);
        hear(&mut history, &[(agent, "hello how can I"), (user, "Where is my order?")]);
        assert_eq!(words(&history), transcript(&[(agent, "Hello, how can I"), (user, "Where is my order?")]));
        // The caller goes on before the agent was heard.
        history.add_own(said(agent, "Which one?"));
        hear(&mut history, &[(agent, "hello how can I"), (user, "Where is my order? Number seven.")]);
        let longer = [(agent, "Hello, how can I"), (user, "Where is my order? Number seven."), (agent, "")];
        assert_eq!(words(&history), transcript(&longer));
        // All of it was heard, and the same transcript again changes nothing.
        history.add_own(said(agent, "Let me see."));
        history.add_own(said(agent, "It ships today."));
        let whole = [
            (agent, "hello how can I"),
            (user, "Where is my order? Number seven."),
            (agent, "let me see it ships today"),
            (user, "Thanks."),
        ];
        hear(&mut history, &whole);
        hear(&mut history, &whole);
        let expected = [longer[0], longer[1], longer[2], (agent, "Let me see."), (agent, "It ships today."), whole[3]];
        assert_eq!(words(&history), transcript(&expected));
    }

    #[test]
    fn a_call_that_the_gateway_runs_is_answered_by_its_own_item() {
        let run = Run { server: "callbacks".into(), state: RunState::Called, approval: None };
        let content =
            Content::Call { call_id: "a".into(), name: "find".into(), arguments: "{}".into(), run: Some(run) };
        let item = Item { id: "mcp_a".into(), content, status: Status::InProgress };
        let mut history = history(&[said(Role::User, "Where?")]);
        history.add_own(Arc::new(item.clone()));
        assert_eq!(roles(&history.view().messages()), "u");
        history.replace(Arc::new(item.with_run(RunState::Running)));
        assert_eq!(roles(&history.view().messages()), "uct");
        // Words that pass the time are not read again.
        let waiting = Content::Message { role: Role::Assistant, text: "Still looking.".into(), phase: Phase::Waiting };
        history.add_own(Arc::new(Item { id: "msg_w".into(), content: waiting, status: Status::Completed }));
        let answer = Answer { output: "here".into(), error: None };
        history.replace(Arc::new(item.with_run(RunState::Done(answer))));
        let messages = history.view().messages();
        assert_eq!(messages[2], Message::Tool { call_id: "a".into(), content: "here".into() });
        assert_eq!(messages.len(), 3);
        assert!(history.view().unanswered().is_empty());
    }
}
