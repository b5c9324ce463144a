//! The task that is a session.
//!
//! Everything that happens to a conversation passes through one loop: commands from clients, the events of running
//! turns, the reader's arrival and departure, time. Each is handled to its end before the next is looked at, and no
//! handler waits for anything, so a barge-in is never behind a slow reader.
//!
//! **Events** go into a log first and from there to the reader. What the reader has not taken yet is merged: a reader
//! that is slow or gone costs one growing text, not a queue of tokens. The log also holds the latest events that were
//! sent, for a reader that comes back and names the last one that it saw.
//!
//! **Barge-in**: cancelling drops the turn's stream. The response ends at once with what was streamed; the engine stops
//! at its next token and keeps its prefix cache. Calls of a cancelled response are given up.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{Arc, Weak, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use futures::{Stream, StreamExt, future, stream};
use tokio::{
    sync::mpsc::{self, OwnedPermit},
    time::Instant,
};

use super::{
    Action, Attach, Attached, Base, Command, Delivery, Handle, Heard, Limits, OnLeave, Outlet, Respond, Sessions,
    Snapshot, Spoken, State, Watch,
    history::{History, Id, Item, View},
    response::{Assembly, Event, Outcome, Response, Settings, now},
    store::{Keep, Stored},
};
use crate::{
    electron::Electron,
    error::Error,
    turn::{Message, Progress, Turn, TurnEvent, TurnStream, Usage},
};

/// Most responses at once: the conversation's own and others beside it.
const MOST_RUNNING: usize = 4;
/// Most responses of a session that are remembered for its life; the oldest is forgotten.
const MOST_KEPT: usize = 1_000;
/// Longest that a response without generation waits for its prompt to be computed.
const WARM_UP_PATIENCE: Duration = Duration::from_secs(10);
/// Letters a second of speech, to tell from a time what was heard.
const LETTERS_PER_SECOND: u64 = 15;

pub(super) struct Actor {
    sessions: Weak<Sessions>,
    electron: Arc<Electron>,
    handle: Handle,
    limits: Limits,
    settings: Arc<Settings>,
    history: History,
    /// The latest response of the conversation, and its items.
    latest: Option<Arc<Response>>,
    running: Vec<Running>,
    /// What the prefix cache is being filled with, and the response that waits for it.
    warming: Option<Warming>,
    /// The words of a caller who still speaks.
    partial: Option<String>,
    /// Responses that are kept for as long as this session lives.
    kept: VecDeque<Id>,
    log: Log,
    outlet: Option<Outlet>,
    on_leave: OnLeave,
    /// When it ends, if nobody comes.
    expires: Option<Instant>,
}

/// A response that is being made.
struct Running {
    assembly: Assembly,
    steps: Pin<Box<dyn Stream<Item = Step> + Send>>,
    /// Known once the turn was accepted.
    progress: Option<Arc<Progress>>,
    cause: Option<Id>,
    /// The conversation before it, in case it is not accepted.
    before: History,
    keep: bool,
}

/// What comes of a turn.
enum Step {
    /// It was accepted, after these items made room.
    Started { trimmed: Vec<Id>, progress: Arc<Progress> },
    /// It goes on.
    Event(TurnEvent),
    /// It failed; nothing follows.
    Failed(Error),
}

struct Warming {
    work: Pin<Box<dyn Future<Output = Usage> + Send>>,
    response: Option<(Assembly, bool)>,
}

/// Events for the reader.
struct Log {
    events: VecDeque<Arc<Event>>,
    /// The number of the first of them.
    first: u64,
    /// The number of the next one to be sent.
    next: u64,
    /// Most sent and unsent events that are held.
    most: usize,
}

/// What woke the loop.
enum Wake {
    Command(Option<Box<Command>>),
    Step(usize, Option<Step>),
    Warmed(Usage),
    Room(OwnedPermit<Delivery>),
    Left,
    Expired,
}

// === impl Actor ===

impl Actor {
    pub(super) fn new(
        sessions: Weak<Sessions>,
        electron: Arc<Electron>,
        handle: Handle,
        settings: Settings,
        on_leave: OnLeave,
        limits: Limits,
    ) -> Self {
        Self {
            sessions,
            electron,
            handle,
            limits,
            settings: Arc::new(settings),
            history: History::default(),
            latest: None,
            running: Vec::new(),
            warming: None,
            partial: None,
            kept: VecDeque::new(),
            log: Log { events: VecDeque::new(), first: 1, next: 1, most: limits.replay_events },
            outlet: None,
            on_leave,
            // A reader is on its way; if it never comes, the session must not stay.
            expires: Some(Instant::now() + limits.resume_window),
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Box<Command>>) {
        loop {
            match self.wake(&mut commands).await {
                Wake::Command(Some(command)) => {
                    let Command { cause, action } = *command;
                    if let Action::Close = action {
                        break;
                    }
                    if let Err(error) = self.act(cause.clone(), action) {
                        self.emit(Event::Refused { cause, error });
                    }
                }
                Wake::Step(at, Some(step)) => self.step(at, step),
                Wake::Step(at, None) => {
                    self.step(at, Step::Failed(Error::EngineFailed("it stopped in the middle of an answer".into())));
                }
                Wake::Warmed(usage) => self.warmed(usage),
                Wake::Room(permit) => self.log.send_by(permit, self.outlet.as_ref(), self.on_leave),
                Wake::Left if self.on_leave == OnLeave::End => break,
                Wake::Left => self.left(),
                Wake::Expired | Wake::Command(None) => break,
            }
        }
        self.end();
        // A reader that is slow gets what can still be sent.
        let rest = async {
            while let (true, Some(outlet)) = (self.log.has_unsent(), &self.outlet) {
                let Ok(permit) = outlet.sender.clone().reserve_owned().await else { break };
                self.log.send_by(permit, self.outlet.as_ref(), self.on_leave);
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), rest).await;
    }

    /// Waits for the next thing to happen.
    async fn wake(&mut self, commands: &mut mpsc::Receiver<Box<Command>>) -> Wake {
        let Self { running, warming, outlet, log, expires, .. } = self;
        let steps = future::poll_fn(|cx| {
            for (at, running) in running.iter_mut().enumerate() {
                if let Poll::Ready(step) = running.steps.as_mut().poll_next(cx) {
                    return Poll::Ready((at, step));
                }
            }
            Poll::Pending
        });
        let warmed = async {
            match warming {
                Some(warming) => warming.work.as_mut().await,
                None => future::pending().await,
            }
        };
        let room = async {
            match outlet.as_ref().filter(|_| log.has_unsent()) {
                Some(outlet) => outlet.sender.clone().reserve_owned().await,
                None => future::pending().await,
            }
        };
        let left = async {
            match outlet.as_ref() {
                Some(outlet) => outlet.sender.closed().await,
                None => future::pending().await,
            }
        };
        let expired = async {
            match *expires {
                Some(at) => tokio::time::sleep_until(at).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            biased;
            command = commands.recv() => Wake::Command(command),
            () = left => Wake::Left,
            (at, step) = steps => Wake::Step(at, step),
            Ok(permit) = room => Wake::Room(permit),
            usage = warmed => Wake::Warmed(usage),
            () = expired => Wake::Expired,
        }
    }

    fn act(&mut self, cause: Option<Id>, action: Action) -> Result<(), Error> {
        match action {
            Action::Attach(attach) => self.attach(attach),
            Action::Configure(settings) => {
                self.settings = settings.clone();
                self.emit(Event::Configured(settings));
                self.warm_up();
            }
            Action::Add(item, place) => {
                let in_item = |e: Error| match e.param().as_deref() {
                    Some("previous_item_id") => e,
                    _ => e.under(&["item".into()]),
                };
                self.history.add(item.clone(), place, self.limits.history).map_err(in_item)?;
                let previous = self.history.view().previous(&item.id);
                self.emit(Event::ItemAdded { item, previous });
            }
            Action::Retrieve(id) => {
                let item = self.item(&id)?;
                self.emit(Event::ItemRetrieved(item));
            }
            Action::Remove(id) => {
                let item = self.settled(&id)?;
                self.history.remove(vec![item.id.clone()]);
                self.emit(Event::ItemRemoved(item.id.clone()));
            }
            Action::Truncate(spoken, heard) => self.truncate(&spoken, &heard)?,
            Action::Respond(respond) => self.respond(cause, *respond)?,
            Action::Cancel(response, heard) => self.cancel(response, heard)?,
            Action::Leave => self.left(),
            Action::Partial(text) => {
                self.partial = Some(text);
                self.warm_up();
            }
            Action::Describe(reply) => drop(reply.send(self.snapshot())),
            // The loop has ended.
            Action::Close => {}
        }
        Ok(())
    }

    // --- readers ---

    fn attach(&mut self, attach: Attach) {
        let Attach { outlet, on_leave, after, if_free, reply } = attach;
        if if_free && self.outlet.as_ref().is_some_and(|outlet| !outlet.sender.is_closed()) {
            return;
        }
        let gap = self.log.rewind(after);
        // An earlier reader learns by the end of its channel that it was replaced.
        self.outlet = Some(outlet);
        self.on_leave = on_leave;
        self.expires = None;
        self.handle.about.connected.store(true, Ordering::Relaxed);
        let begun_again = self.log.unsent().filter(|event| matches!(event, Event::Begun(_))).count();
        let begun = self.running.iter().filter(|running| running.progress.is_some()).count();
        let ends_again = self.log.unsent().filter(|event| matches!(event, Event::Ended(_))).count();
        let running = (begun + ends_again).saturating_sub(begun_again);
        let _ = reply.send(Attached { settings: self.settings.clone(), gap, running });
        self.log.send(self.outlet.as_ref(), self.on_leave);
    }

    fn left(&mut self) {
        self.outlet = None;
        self.partial = None;
        self.handle.about.connected.store(false, Ordering::Relaxed);
        if self.on_leave == OnLeave::CancelTurn {
            while !self.running.is_empty() {
                self.stop(0, Outcome::Cancelled);
            }
            self.log.forget();
        }
        self.expires = Some(Instant::now() + self.limits.resume_window);
    }

    fn emit(&mut self, event: Event) {
        self.log.push(event);
        self.log.send(self.outlet.as_ref(), self.on_leave);
    }

    // --- responses ---

    fn respond(&mut self, cause: Option<Id>, respond: Respond) -> Result<(), Error> {
        let Respond { id, settings, base, input, context, in_conversation, needs_outputs, generate, keep, .. } =
            respond;
        if in_conversation && let Some(running) = self.running.iter().find(|r| r.assembly.response.in_conversation) {
            let id = &running.assembly.response.id;
            return Err(Error::Conflict {
                code: "conversation_already_has_active_response",
                message: format!("The response `{id}` is being made. Wait until it is over, or cancel it."),
            });
        }
        if self.running.len() >= MOST_RUNNING {
            return Err(Error::Conflict {
                code: "too_many_active_responses",
                message: format!("A session makes at most {MOST_RUNNING} responses at once. Wait for one to end."),
            });
        }
        let Base { mut history, response: previous } =
            base.unwrap_or_else(|| Base { history: self.history.clone(), response: None });
        history.extend(&input, "input", self.limits.history)?;
        if in_conversation {
            let open = history.view().unanswered();
            if needs_outputs && !open.is_empty() {
                return Err(Error::Conflict {
                    code: "missing_function_call_outputs",
                    message: format!(
                        "Calls of the last response have no output yet: {}. Add a function_call_output for each, or \
                         delete the calls.",
                        open.join(", ")
                    ),
                });
            }
            history.cancel_calls(open);
        }
        // From here on it is accepted, or puts everything back.
        self.partial = None;
        if self.on_leave != OnLeave::GoOn {
            // In this dialect settings come with each request, and the next will most likely bring the same.
            self.settings = settings.clone();
        }
        if let Some(Warming { response: Some((assembly, keep)), .. }) = self.warming.take() {
            self.end_warm_up(assembly, keep, Usage::default());
        }
        let view = history.view();
        let response = Response {
            id,
            created_at: now(),
            completed_at: None,
            outcome: None,
            previous,
            settings: settings.clone(),
            input,
            output: Vec::new(),
            usage: Usage::default(),
            in_conversation,
            store: respond.store,
        };
        let last = view.items.last().map(|item| item.id.clone());
        let assembly = Assembly::new(response, last.filter(|_| in_conversation));
        let before = if in_conversation { std::mem::replace(&mut self.history, history) } else { History::default() };
        if !generate {
            self.emit(Event::Begun(Arc::new(assembly.response.clone())));
            let turn = waiting_turn(&settings, view, None);
            let electron = self.electron.clone();
            let work = async move {
                let warmed = tokio::time::timeout(WARM_UP_PATIENCE, electron.warm(turn)).await;
                warmed.ok().and_then(Result::ok).unwrap_or_default()
            };
            self.warming = Some(Warming { work: Box::pin(work), response: Some((assembly, keep)) });
            return Ok(());
        }
        let view = context.map_or(view, |context| context.view());
        let steps = steps(self.electron.clone(), settings, view, respond.watch, self.limits.turn_timeout);
        self.running.push(Running { assembly, steps, progress: None, cause, before, keep });
        self.handle.about.running.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn step(&mut self, at: usize, step: Step) {
        let running = &mut self.running[at];
        match step {
            Step::Started { trimmed, progress } => {
                running.progress = Some(progress);
                let response = running.assembly.response.clone();
                self.begun(at);
                if !trimmed.is_empty() {
                    if response.in_conversation {
                        self.history.remove(trimmed.clone());
                    }
                    self.emit(Event::Trimmed { response: response.id, items: trimmed });
                }
            }
            Step::Event(event) => {
                let mut out = Vec::with_capacity(2);
                running.assembly.take(event, &mut out);
                self.happened(at, out);
            }
            Step::Failed(error) if running.progress.is_none() => {
                // Not accepted: it is as if it had never been asked for.
                let Running { cause, before, assembly, .. } = self.running.swap_remove(at);
                if assembly.response.in_conversation {
                    self.history = before;
                }
                self.handle.about.running.store(!self.running.is_empty(), Ordering::Relaxed);
                self.emit(Event::Refused { cause, error });
            }
            Step::Failed(error) => self.stop(at, Outcome::Failed(error)),
        }
    }

    /// Tells that a response has begun.
    fn begun(&mut self, at: usize) {
        let running = &self.running[at];
        let response = Arc::new(running.assembly.response.clone());
        if running.keep {
            self.keep(response.clone(), Keep::WithSession);
        }
        self.emit(Event::Begun(response));
    }

    /// Ends a running response where it is.
    fn stop(&mut self, at: usize, outcome: Outcome) {
        match &self.running[at].progress {
            Some(progress) => self.running[at].assembly.response.usage = progress.get(),
            // Nobody knows of it yet.
            None => self.begun(at),
        }
        let mut out = Vec::with_capacity(3);
        self.running[at].assembly.end(outcome, &mut out);
        self.happened(at, out);
    }

    /// Takes note of what a running response did, and tells it.
    fn happened(&mut self, at: usize, events: Vec<Event>) {
        for event in events {
            match &event {
                Event::OutputBegun { at, item } if at.in_conversation => self.history.add_own(item.clone()),
                Event::OutputEnded { at, item } if at.in_conversation => self.history.replace(item.clone()),
                Event::Ended(response) => {
                    let running = self.running.swap_remove(at);
                    self.ended(response, running.keep);
                }
                _ => {}
            }
            self.emit(event);
        }
    }

    fn ended(&mut self, response: &Arc<Response>, keep: bool) {
        self.handle.about.running.store(!self.running.is_empty(), Ordering::Relaxed);
        self.handle.about.count(response.usage);
        if !response.in_conversation {
            return;
        }
        if matches!(response.outcome, Some(Outcome::Cancelled | Outcome::Failed(_))) {
            // Who is cut off in a tool turn cannot be expected to answer its calls.
            let calls = response.output.iter().filter_map(|item| item.call().cloned()).collect();
            self.history.cancel_calls(calls);
        }
        self.latest = Some(response.clone());
        if keep {
            self.keep(response.clone(), self.how_long(response));
        }
        self.warm_up();
    }

    fn cancel(&mut self, id: Option<Id>, heard: Option<Heard>) -> Result<(), Error> {
        let wanted = |response: &Response| match &id {
            Some(id) => response.id == *id,
            None => response.in_conversation,
        };
        let running = self.running.iter().position(|running| wanted(&running.assembly.response));
        let warming = self.warming.as_ref().and_then(|warming| warming.response.as_ref());
        let spoken = match (running, warming, &id) {
            (Some(at), ..) => {
                let id = self.running[at].assembly.response.id.clone();
                self.stop(at, Outcome::Cancelled);
                id
            }
            (None, Some((assembly, _)), _) if wanted(&assembly.response) => {
                if let Some(Warming { response: Some((assembly, keep)), .. }) = self.warming.take() {
                    self.end_warm_up(assembly, keep, Usage::default());
                }
                return Ok(());
            }
            // It may have ended while the client's words were on their way; what was heard of it still counts.
            (None, _, Some(id)) if heard.is_some() => id.clone(),
            _ => {
                return Err(Error::Conflict {
                    code: "response_cancel_not_active",
                    message: "There is no such response to cancel: it is over, or never was.".into(),
                });
            }
        };
        match heard {
            Some(heard) => self.truncate(&Spoken::Response(spoken), &heard),
            None => Ok(()),
        }
    }

    fn truncate(&mut self, spoken: &Spoken, heard: &Heard) -> Result<(), Error> {
        let (id, response) = match spoken {
            Spoken::Item(id) => (id.clone(), None),
            Spoken::Response(id) => {
                let latest = self.latest.as_ref().filter(|latest| latest.id == *id).ok_or_else(|| {
                    Error::invalid("response_id", format!("`{id}` is not the latest response of this conversation"))
                })?;
                match latest.output.iter().rev().find(|item| item.spoken().is_some()) {
                    Some(item) => (item.id.clone(), Some(id.clone())),
                    // Nothing was said that could have been heard.
                    None => return Ok(()),
                }
            }
        };
        let item = self.settled(&id)?;
        let (text, audio_end_ms) = match heard {
            Heard::Text(text) => (text.as_str(), 0),
            Heard::Milliseconds(ms) => (spoken_by(item.spoken().unwrap_or_default(), *ms), *ms),
        };
        let item = Arc::new(item.heard(text)?);
        self.history.replace(item.clone());
        if let Some(latest) = &mut self.latest
            && let Some(at) = latest.output.iter().position(|said| said.id == item.id)
        {
            // Whoever continues that response continues what was heard.
            let mut response = Response::clone(latest);
            response.output[at] = item.clone();
            let response = Arc::new(response);
            *latest = response.clone();
            if self.sessions.upgrade().is_some_and(|sessions| sessions.store.get(&response.id).is_some()) {
                self.keep(response.clone(), self.how_long(&response));
            }
        }
        self.emit(Event::ItemTruncated { item, response, audio_end_ms });
        self.warm_up();
        Ok(())
    }

    fn how_long(&self, response: &Response) -> Keep {
        match (self.on_leave, response.store) {
            (_, true) => Keep::For(self.limits.store_for),
            (OnLeave::End, false) => Keep::For(self.limits.resume_window),
            (_, false) => Keep::WithSession,
        }
    }

    fn keep(&mut self, response: Arc<Response>, keep: Keep) {
        let Some(sessions) = self.sessions.upgrade() else { return };
        if keep == Keep::WithSession && !self.kept.contains(&response.id) {
            self.kept.push_back(response.id.clone());
            if self.kept.len() > MOST_KEPT
                && let Some(oldest) = self.kept.pop_front()
            {
                sessions.store.remove(&oldest);
            }
        }
        if keep != Keep::WithSession {
            self.kept.retain(|id| *id != response.id);
        }
        let (owner, session) = (self.handle.about.owner.clone(), self.handle.clone());
        sessions.store.put(Stored { owner, response, history: self.history.clone(), session }, keep);
    }

    // --- warm-ups ---

    /// Computes what the next turn will begin with while the model has nothing better to do.
    fn warm_up(&mut self) {
        let conversation_runs = self.running.iter().any(|running| running.assembly.response.in_conversation);
        let awaited = self.warming.as_ref().is_some_and(|warming| warming.response.is_some());
        if conversation_runs || awaited || self.on_leave == OnLeave::End {
            return;
        }
        let view = self.history.view();
        if view.items.is_empty() && self.settings.instructions.is_empty() && self.settings.tools.is_empty() {
            return;
        }
        let turn = waiting_turn(&self.settings, view, self.partial.clone());
        let electron = self.electron.clone();
        // Whether it succeeds shows in the next turn's cached tokens.
        let work = async move { electron.warm(turn).await.unwrap_or_default() };
        self.warming = Some(Warming { work: Box::pin(work), response: None });
    }

    fn warmed(&mut self, usage: Usage) {
        if let Some(Warming { response: Some((assembly, keep)), .. }) = self.warming.take() {
            self.end_warm_up(assembly, keep, usage);
        }
    }

    fn end_warm_up(&mut self, mut assembly: Assembly, keep: bool, usage: Usage) {
        let mut out = Vec::with_capacity(1);
        assembly.response.usage = usage;
        assembly.end(Outcome::Completed, &mut out);
        let response = Arc::new(assembly.response);
        self.handle.about.count(usage);
        self.latest = Some(response.clone());
        if keep {
            let how_long = self.how_long(&response);
            self.keep(response, how_long);
        }
        for event in out {
            self.emit(event);
        }
    }

    // --- looking into it ---

    fn item(&self, id: &str) -> Result<Arc<Item>, Error> {
        let missing = || Error::invalid("item_id", format!("there is no item `{id}` in this conversation"));
        self.history.view().item(id).cloned().ok_or_else(missing)
    }

    /// An item that is not being made any more.
    fn settled(&self, id: &str) -> Result<Arc<Item>, Error> {
        let item = self.item(id)?;
        if item.status == super::Status::InProgress {
            return Err(Error::invalid("item_id", format!("`{id}` is still being made; cancel its response first")));
        }
        Ok(item)
    }

    fn snapshot(&self) -> Snapshot {
        let view = self.history.view();
        let unanswered = view.unanswered();
        let state = match (self.running.is_empty(), unanswered.is_empty()) {
            (false, _) => State::Generating,
            (true, false) => State::WaitingForTools,
            (true, true) => State::Idle,
        };
        Snapshot { settings: self.settings.clone(), state, items: view.items, unanswered }
    }

    fn end(&mut self) {
        while !self.running.is_empty() {
            self.stop(0, Outcome::Cancelled);
        }
        self.warming = None;
        if let Some(sessions) = self.sessions.upgrade() {
            for id in self.kept.drain(..) {
                sessions.store.remove(&id);
            }
            sessions.ended(&self.handle.about.id);
        }
        self.handle.about.connected.store(false, Ordering::Relaxed);
    }
}

/// A turn whose last message is not complete: the caller's words so far, or the output of the first open call.
fn waiting_turn(settings: &Settings, view: View, partial: Option<String>) -> Turn {
    let mut messages = view.messages();
    match (partial, view.unanswered().first()) {
        (None, Some(call)) => {
            let open = |message: &Message| matches!(message, Message::Tool { call_id, .. } if **call_id == **call);
            if let Some(at) = messages.iter().position(open) {
                messages.truncate(at);
            }
            messages.push(Message::Tool { call_id: call.to_string(), content: String::new() });
        }
        (partial, _) => messages.push(Message::User(partial.unwrap_or_default())),
    }
    settings.turn(messages, 1)
}

/// What can be said of a text in so many milliseconds, in whole words.
fn spoken_by(text: &str, ms: u64) -> &str {
    let letters = usize::try_from(ms.saturating_mul(LETTERS_PER_SECOND) / 1_000).unwrap_or(usize::MAX);
    match text.char_indices().nth(letters) {
        None => text,
        Some((end, _)) => text[..end].rfind(char::is_whitespace).map_or("", |space| &text[..space]),
    }
}

/// Runs a turn on what a conversation adds up to.
fn steps(
    electron: Arc<Electron>,
    settings: Arc<Settings>,
    view: View,
    watch: Watch,
    timeout: Duration,
) -> Pin<Box<dyn Stream<Item = Step> + Send>> {
    enum Stage {
        Start(Arc<Electron>, Arc<Settings>, View, Watch),
        Run(TurnStream),
        Over,
    }
    let deadline = Instant::now() + timeout;
    let late = || Step::Failed(Error::EngineFailed("the answer took longer than the server's request_timeout".into()));
    let next = move |stage| async move {
        match stage {
            Stage::Start(electron, settings, view, watch) => {
                match tokio::time::timeout_at(deadline, start(&electron, &settings, view)).await {
                    Ok(Ok((events, trimmed))) => {
                        let started = Step::Started { trimmed, progress: events.progress() };
                        Some((started, Stage::Run(watch(events))))
                    }
                    Ok(Err(e)) => Some((Step::Failed(e), Stage::Over)),
                    Err(_) => Some((late(), Stage::Over)),
                }
            }
            Stage::Run(mut events) => match tokio::time::timeout_at(deadline, events.next()).await {
                Ok(Some(Ok(event))) => Some((Step::Event(event), Stage::Run(events))),
                Ok(Some(Err(e))) => Some((Step::Failed(e), Stage::Over)),
                Ok(None) => None,
                Err(_) => Some((late(), Stage::Over)),
            },
            Stage::Over => None,
        }
    };
    Box::pin(stream::unfold(Stage::Start(electron, settings, view, watch), next))
}

/// Starts a turn. When the conversation leaves too little of the model's context, its oldest exchanges make room: more of
/// them than this turn needs, since what follows a gap has to be computed anew each time that there is one.
async fn start(electron: &Arc<Electron>, settings: &Settings, mut view: View) -> Result<(TurnStream, Vec<Id>), Error> {
    let context = electron.model().context;
    // Without a limit of the client's, an answer gets a quarter of the context.
    let most_tokens = (context / 4).clamp(1, 4096);
    let room = settings.sampling.max_tokens.unwrap_or(most_tokens);
    let mut trimmed = Vec::new();
    loop {
        let prompt = match electron.turn(settings.turn(view.messages(), most_tokens)).await {
            Err(Error::ContextLength { prompt, .. }) if settings.trim && room < context => prompt,
            Err(e) => return Err(e),
            Ok(events) => return Ok((events, trimmed)),
        };
        let target = (context - room) * 4 / 5;
        let bytes = |view: &View| -> usize { view.messages().iter().map(message_bytes).sum() };
        let fixed =
            settings.instructions.len() + settings.tools.iter().map(|t| t.parameters.to_string().len()).sum::<usize>();
        let per_byte = prompt as f64 / (fixed + bytes(&view)).max(1) as f64;
        let before = trimmed.len();
        while ((fixed + bytes(&view)) as f64 * per_byte) as usize > target || trimmed.len() == before {
            let Some(oldest) = view.oldest_exchange() else { break };
            view.items.retain(|item| !oldest.contains(&item.id));
            trimmed.extend(oldest);
        }
        if trimmed.len() == before {
            return Err(Error::ContextLength { context, prompt, asked: Some(room), param: "messages" });
        }
    }
}

fn message_bytes(message: &Message) -> usize {
    match message {
        Message::System(text) | Message::User(text) | Message::Tool { content: text, .. } => text.len(),
        Message::Assistant { content, tool_calls } => {
            content.as_ref().map_or(0, String::len)
                + tool_calls.iter().map(|call| call.name.len() + call.arguments.len()).sum::<usize>()
        }
    }
}

// === impl Log ===

impl Log {
    /// The number of the last event.
    fn last(&self) -> u64 {
        self.first + self.events.len() as u64 - 1
    }

    fn has_unsent(&self) -> bool {
        self.next <= self.last()
    }

    /// Events that the reader will get.
    fn unsent(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().skip((self.next - self.first) as usize).map(|event| &**event)
    }

    fn push(&mut self, event: Event) {
        let mut event = event;
        if self.has_unsent()
            && let Some(last) = self.events.back_mut().and_then(Arc::get_mut)
        {
            match last.merge(event) {
                Ok(()) => return,
                Err(other) => event = other,
            }
        }
        self.events.push_back(Arc::new(event));
        while self.events.len() > self.most {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        self.events.pop_front();
        self.first += 1;
        self.next = self.next.max(self.first);
    }

    /// Hands on what the reader has room for. Only a session that can be resumed keeps what was sent.
    fn send(&mut self, outlet: Option<&Outlet>, on_leave: OnLeave) {
        let Some(outlet) = outlet else { return };
        while let Some(delivery) = self.unsent_first(outlet)
            && outlet.sender.try_send(delivery).is_ok()
        {
            self.sent(on_leave);
        }
    }

    /// Uses a place that was waited for. (Sessions that share a channel wait in a queue for its places, so one that gave its
    /// place back to take it again would find it gone.)
    fn send_by(&mut self, place: OwnedPermit<Delivery>, outlet: Option<&Outlet>, on_leave: OnLeave) {
        if let Some(delivery) = outlet.and_then(|outlet| self.unsent_first(outlet)) {
            place.send(delivery);
            self.sent(on_leave);
        }
        self.send(outlet, on_leave);
    }

    fn unsent_first(&self, outlet: &Outlet) -> Option<Delivery> {
        let event = self.events.get((self.next - self.first) as usize)?.clone();
        Some(Delivery { tag: outlet.tag, number: self.next, event })
    }

    fn sent(&mut self, on_leave: OnLeave) {
        self.next += 1;
        if on_leave != OnLeave::GoOn {
            self.drop_first();
        }
        if self.events.is_empty() {
            self.events = VecDeque::new();
        }
    }

    /// Goes back to behind an event. Gives whether some of what followed it is lost.
    fn rewind(&mut self, after: Option<u64>) -> bool {
        let Some(after) = after else { return false };
        self.next = (after.saturating_add(1)).clamp(self.first, self.last() + 1);
        after + 1 < self.first
    }

    fn forget(&mut self) {
        self.first = self.last() + 1;
        self.next = self.first;
        self.events = VecDeque::new();
    }
}
