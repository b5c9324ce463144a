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
    turn::{Message, ToolCall},
};

/// An id on the wire, such as `item_…`.
pub type Id = Arc<str>;

/// A new id: a prefix and a UUIDv7, so that ids sort by time.
pub fn new_id(prefix: &str) -> Id {
    format!("{prefix}_{}", Uuid::now_v7().simple()).into()
}

/// What stands in the prompt for the result of a call that was never answered.
const CANCELLED: &str = "{\"error\": \"The call was cancelled before it had a result.\"}";

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
        /// Whether they were spoken on the way to a tool call, as a filler is.
        commentary: bool,
    },
    /// A call that the model made.
    Call {
        /// What its output names, `call_…`.
        call_id: Id,
        /// The tool.
        name: String,
        /// JSON text.
        arguments: String,
    },
    /// What a tool answered.
    Output {
        /// The call that it answers.
        call_id: Id,
        /// Text or JSON.
        output: String,
    },
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
        Self { id, content: Content::Message { role, text: text.into(), commentary: false }, status: Status::Completed }
    }

    /// The bytes of text that it holds.
    fn bytes(&self) -> usize {
        match &self.content {
            Content::Message { text, .. } => text.len(),
            Content::Call { name, arguments, .. } => name.len() + arguments.len(),
            Content::Output { output, .. } => output.len(),
        }
    }

    /// The text of a message of the model.
    pub fn spoken(&self) -> Option<&str> {
        match &self.content {
            Content::Message { role: Role::Assistant, text, .. } => Some(text),
            _ => None,
        }
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
        let Content::Message { role: Role::Assistant, text, commentary } = &self.content else {
            return Err(Error::invalid("item_id", format!("`{}` is no message of the assistant", self.id)));
        };
        let end = heard_end(text, heard).ok_or_else(|| {
            Error::invalid("text", format!("text has to be the beginning of what `{}` says", self.id))
        })?;
        let status = if end == text.len() { self.status } else { Status::Incomplete };
        let content = Content::Message { role: Role::Assistant, text: text[..end].to_owned(), commentary: *commentary };
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

    /// Ids of all calls that are part of the prompt.
    fn calls(&self) -> impl Iterator<Item = &Id> {
        self.items.iter().filter(|item| item.status == Status::Completed).filter_map(|item| item.call())
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
        let mut waiting: Vec<&Id> = Vec::new();
        let mut answer = |waiting: &mut Vec<&Id>, messages: &mut Vec<Message>| {
            for call in waiting.drain(..) {
                let content = outputs.remove(call).unwrap_or(CANCELLED).to_owned();
                messages.push(Message::Tool { call_id: call.to_string(), content });
            }
        };
        for item in &self.items {
            match &item.content {
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
                Content::Call { call_id, name, arguments } if item.status == Status::Completed => {
                    let call = ToolCall { id: call_id.to_string(), name: name.clone(), arguments: arguments.clone() };
                    match messages.last_mut() {
                        Some(Message::Assistant { tool_calls, .. }) => tool_calls.push(call),
                        _ => messages.push(Message::Assistant { content: None, tool_calls: vec![call] }),
                    }
                    waiting.push(call_id);
                }
                Content::Call { .. } | Content::Output { .. } => {}
            }
        }
        answer(&mut waiting, &mut messages);
        messages
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

#[cfg(test)]
mod tests {
    use super::*;

    const ROOMY: Bounds = Bounds { records: 100_000, bytes: 1 << 20 };

    fn said(role: Role, text: &str) -> Arc<Item> {
        Arc::new(Item::message(new_id("msg"), role, text))
    }

    fn call(id: &str) -> Arc<Item> {
        let content = Content::Call { call_id: id.into(), name: "find".into(), arguments: "{}".into() };
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
}
