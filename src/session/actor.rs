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
//!
//! **Tools** that the gateway runs are futures of this task, so they end with it. A response takes as many rounds as
//! the model calls such tools: it answers when all of a round have their outcome. A call that outlives its response,
//! because its tool is not to be stopped by an interruption, brings its result for the turns to come. Who waits for a tool is
//! told from time to time that it still runs.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{Arc, Weak, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use futures::{
    Stream, StreamExt,
    future::{self, AbortHandle, Abortable, BoxFuture},
    stream::{self, FuturesUnordered},
};
use rand::RngCore;
use subtle::ConstantTimeEq;
use tokio::{
    sync::{
        mpsc::{self, OwnedPermit},
        oneshot,
    },
    time::Instant,
};

use super::{
    Action, Attach, Attached, Base, Command, Delivery, Handle, Heard, Limits, OnLeave, Outlet, Respond, Sessions,
    Settle, Snapshot, Spoken, State, Watch,
    history::{Answer, Content, History, Id, Item, Phase, RunState, View, heard_of, new_id},
    response::{Armed, Assembly, Event, Outcome, Response, Settings, now},
    store::{Keep, Stored},
};
use crate::{
    electron::{
        self,
        filler::{self, Phrases},
    },
    error::Error,
    tool::{By, Call, Failure, OnInterrupt, Tools, mcp::Server},
    turn::{FinishReason, Message, Model, Progress, Tool, ToolChoice, Turn, TurnEvent, TurnStream, Usage},
};

/// Most responses at once: the conversation's own and others beside it.
const MOST_RUNNING: usize = 4;
/// Most responses of a session that are remembered for its life; the oldest is forgotten.
const MOST_KEPT: usize = 1_000;
/// Longest that a response without generation waits for its prompt to be computed.
const WARM_UP_PATIENCE: Duration = Duration::from_secs(10);
/// Most calls whose tokens are remembered, to tell a second result from a wrong one.
const MOST_SETTLED: usize = 256;
/// Most servers whose tools a session knows.
const MOST_LISTS: usize = 32;
/// Letters a second of speech, to tell from a time what was heard.
const LETTERS_PER_SECOND: u64 = 15;

pub(super) struct Actor {
    sessions: Weak<Sessions>,
    electron: Arc<dyn Model>,
    handle: Handle,
    limits: Limits,
    settings: Arc<Settings>,
    history: History,
    /// The latest response of the conversation, and its items.
    latest: Option<Arc<Response>>,
    making: Vec<Making>,
    /// What the prefix cache is being filled with, and the response that waits for it.
    warming: Option<Warming>,
    /// The words of a caller who still speaks.
    partial: Option<String>,
    /// Responses that are kept for as long as this session lives.
    kept: VecDeque<Id>,
    tools: Arc<Tools>,
    /// Tools and servers that are waited for.
    jobs: FuturesUnordered<BoxFuture<'static, Job>>,
    /// Calls whose tools run.
    calls: Vec<Running>,
    /// Calls that have their outcome, with their tokens.
    settled: VecDeque<(Id, String)>,
    /// The tools of servers; without any yet while they are asked.
    lists: Vec<(Arc<Server>, Option<Listed>)>,
    /// The tools of the latest turn.
    armed: Arc<Armed>,
    /// How much of the platform's transcript is part of the history.
    transcribed: usize,
    log: Log,
    outlet: Option<Outlet>,
    on_leave: OnLeave,
    /// Whether it ends with the last of its tools.
    finishing: bool,
    /// When it ends, if nobody comes.
    expires: Option<Instant>,
}

/// A response that is being made.
struct Making {
    assembly: Assembly,
    stage: Stage,
    settings: Arc<Settings>,
    armed: Arc<Armed>,
    watch: Watch,
    /// Of a response that is no part of the conversation, its own.
    aside: Option<History>,
    /// Calls that were approved and are to run first.
    approved: Vec<Arc<Item>>,
    /// Whether anybody knows of it.
    begun: bool,
    /// Of the present round, once the turn was accepted.
    progress: Option<Arc<Progress>>,
    /// Rounds of tool calls so far.
    rounds: usize,
    /// What was called in the present round.
    round: Round,
    /// When the caller is told that a tool still runs.
    patience: Option<Patience>,
    cause: Option<Id>,
    /// The conversation before it, in case it is not accepted.
    before: History,
    /// Whether what came before it stays in the conversation anyway.
    lasting: bool,
    keep: bool,
}

/// What a response waits for.
enum Stage {
    /// The tools of servers.
    Servers,
    /// The model.
    Model(Pin<Box<dyn Stream<Item = Step> + Send>>),
    /// Tools that run.
    Tools,
}

/// What was called in one round.
#[derive(Clone, Copy, Default)]
struct Round {
    /// Calls that the gateway runs.
    own: usize,
    /// Whether some are left to the client, to answer or to approve.
    leaves: bool,
    /// Whether nothing is to be said after them.
    last: bool,
}

/// When the next phrase is due, in growing pauses.
struct Patience {
    due: Instant,
    pause: Duration,
    phrases: Phrases,
}

/// A call whose tool runs.
struct Running {
    call_id: Id,
    /// The response that made it.
    response: Id,
    /// As the history has it.
    item: Arc<Item>,
    /// Takes a result that comes by another way.
    late: Option<oneshot::Sender<String>>,
    /// Such a result, from when it was taken until the tool's future has passed it on.
    taken: Option<String>,
    token: String,
    on_interrupt: OnInterrupt,
    /// Whether its response is over.
    outlives: bool,
    stop: AbortHandle,
}

/// What comes of waiting for tools and servers.
enum Job {
    Called(Id, Result<String, Failure>),
    Listed(Arc<Server>, Listed),
    /// It was stopped.
    Stopped,
}

type Listed = Result<Arc<[Tool]>, Failure>;

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
    Job(Job),
    /// A caller waits for a tool.
    Impatient(usize),
    Warmed(Usage),
    Room(OwnedPermit<Delivery>),
    Left,
    Expired,
}

// === impl Actor ===

impl Actor {
    pub(super) fn new(
        (sessions, tools): (Weak<Sessions>, Arc<Tools>),
        electron: Arc<dyn Model>,
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
            making: Vec::new(),
            warming: None,
            partial: None,
            kept: VecDeque::new(),
            tools,
            jobs: FuturesUnordered::new(),
            calls: Vec::new(),
            settled: VecDeque::new(),
            lists: Vec::new(),
            armed: Arc::default(),
            transcribed: 0,
            log: Log { events: VecDeque::new(), first: 1, next: 1, most: limits.replay_events },
            outlet: None,
            on_leave,
            finishing: false,
            // A reader is on its way; if it never comes, the session must not stay.
            expires: Some(Instant::now() + limits.resume_window),
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Box<Command>>) {
        self.ask_servers(self.on_leave == OnLeave::GoOn);
        self.armed = Arc::new(self.arm(&self.settings));
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
                Wake::Job(job) => self.done(job),
                Wake::Impatient(at) => self.still_waiting(at),
                Wake::Warmed(usage) => self.warmed(usage),
                Wake::Room(permit) => self.log.send_by(permit, self.outlet.as_ref(), self.on_leave),
                Wake::Left if self.on_leave == OnLeave::End => {
                    while !self.making.is_empty() {
                        self.stop(0, Outcome::Cancelled);
                    }
                    self.outlet = None;
                    self.finishing = true;
                }
                Wake::Left => self.left(),
                Wake::Expired | Wake::Command(None) => break,
            }
            // Tools that are to finish have as long as their definition gives them.
            if self.finishing && self.calls.is_empty() {
                break;
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
        let Self { making, warming, outlet, log, expires, jobs, .. } = self;
        let impatient = making
            .iter()
            .enumerate()
            .filter(|(_, making)| matches!(making.stage, Stage::Tools))
            .filter_map(|(at, making)| Some((making.patience.as_ref()?.due, at)))
            .min();
        let impatient = async {
            match impatient {
                Some((due, at)) => {
                    tokio::time::sleep_until(due).await;
                    at
                }
                None => future::pending().await,
            }
        };
        let steps = future::poll_fn(|cx| {
            for (at, making) in making.iter_mut().enumerate() {
                if let Stage::Model(steps) = &mut making.stage
                    && let Poll::Ready(step) = steps.as_mut().poll_next(cx)
                {
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
            Some(job) = jobs.next(), if !jobs.is_empty() => Wake::Job(job),
            (at, step) = steps => Wake::Step(at, step),
            Ok(permit) = room => Wake::Room(permit),
            at = impatient => Wake::Impatient(at),
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
                self.ask_servers(true);
                self.armed = Arc::new(self.arm(&self.settings));
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
                let item = self.settled_item(&id)?;
                self.history.remove(vec![item.id.clone()]);
                self.emit(Event::ItemRemoved(item.id.clone()));
            }
            Action::Truncate(spoken, heard) => self.truncate(&spoken, &heard)?,
            Action::Respond(respond) => self.respond(cause, *respond)?,
            Action::Cancel(response, heard) => self.cancel(response, heard)?,
            Action::Interrupt(heard) => {
                if let Some(at) = self.making.iter().position(|making| making.assembly.response.in_conversation) {
                    self.stop(at, Outcome::Cancelled);
                }
                if let Some(heard) = heard {
                    let said = self.history.view().latest_words();
                    self.heard(heard_of(&said, &heard), None, 0);
                }
            }
            Action::Settle(Settle { call_id, output, token, reply }) => {
                let _ = reply.send(self.settle(&call_id, output, token.as_deref()));
            }
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
        let Attach { outlet, on_leave, after, again, if_free, reply } = attach;
        let gone = self.outlet.as_ref().map(|outlet| outlet.sender.is_closed());
        if if_free && gone == Some(false) {
            return;
        }
        // An earlier reader's end, which was not noticed yet.
        if gone == Some(true) && self.on_leave != OnLeave::End {
            self.left();
        }
        let after = if again {
            let own = self.making.iter().find(|making| making.assembly.response.in_conversation);
            own.and_then(|making| self.log.begin_of(making.assembly.speaking()?))
        } else {
            after
        };
        let gap = self.log.rewind(after);
        // An earlier reader learns by the end of its channel that it was replaced.
        self.outlet = Some(outlet);
        self.on_leave = on_leave;
        self.expires = None;
        self.handle.about.connected.store(true, Ordering::Relaxed);
        let begun_again = self.log.unsent().filter(|event| matches!(event, Event::Begun(_))).count();
        let begun = self.making.iter().filter(|making| making.begun).count();
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
            while !self.making.is_empty() {
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
        let Respond {
            id, settings, base, input, transcript, context, in_conversation, needs_outputs, generate, ..
        } = respond;
        if in_conversation && let Some(making) = self.making.iter().find(|m| m.assembly.response.in_conversation) {
            let id = &making.assembly.response.id;
            return Err(Error::Conflict {
                code: "conversation_already_has_active_response",
                message: format!("The response `{id}` is being made. Wait until it is over, or cancel it."),
            });
        }
        if self.making.len() >= MOST_RUNNING {
            return Err(Error::Conflict {
                code: "too_many_active_responses",
                message: format!("A session makes at most {MOST_RUNNING} responses at once. Wait for one to end."),
            });
        }
        let Base { mut history, response: previous } =
            base.unwrap_or_else(|| Base { history: self.history.clone(), response: None });
        let transcribed = match &transcript {
            Some(transcript) => history.transcribe(transcript, self.transcribed),
            None => self.transcribed,
        };
        history.extend(&input, "input", self.limits.history)?;
        let approved = approve(&mut history);
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
        self.transcribed = transcribed;
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
        let asked = self.ask(&settings, true);
        if !generate {
            self.history = history;
            self.emit(Event::Begun(Arc::new(assembly.response.clone())));
            let turn = waiting_turn(&settings, &self.arm(&settings).tools, view, None);
            let electron = self.electron.clone();
            let work = async move {
                let warmed = tokio::time::timeout(WARM_UP_PATIENCE, electron.warm(turn)).await;
                warmed.ok().and_then(Result::ok).unwrap_or_default()
            };
            self.warming = Some(Warming { work: Box::pin(work), response: Some((assembly, respond.keep)) });
            return Ok(());
        }
        let aside = if in_conversation { None } else { Some(context.unwrap_or_else(|| history.clone())) };
        let before = if in_conversation { std::mem::replace(&mut self.history, history) } else { History::default() };
        self.making.push(Making {
            assembly,
            stage: Stage::Servers,
            armed: Arc::default(),
            watch: respond.watch,
            aside,
            approved,
            begun: false,
            progress: None,
            rounds: 0,
            round: Round::default(),
            patience: None,
            cause,
            before,
            lasting: respond.lasting,
            keep: respond.keep,
            settings,
        });
        self.handle.about.running.store(true, Ordering::Relaxed);
        let at = self.making.len() - 1;
        if !asked.is_empty() || !self.making[at].approved.is_empty() {
            self.begun(at);
        }
        let mut out = Vec::new();
        for server in &asked {
            self.making[at].assembly.begin_listing(&server.label, &mut out);
        }
        self.happened(at, out);
        self.go_on(at);
        Ok(())
    }

    /// Goes on with a response as far as there is nothing to wait for.
    fn go_on(&mut self, at: usize) {
        let making = &self.making[at];
        match making.stage {
            Stage::Model(_) => {}
            Stage::Servers => {
                let known = |server: &Arc<Server>| self.lists.iter().any(|(s, listed)| s == server && listed.is_some());
                if !making.settings.servers().all(known) {
                    return;
                }
                let armed = Arc::new(self.arm(&making.settings));
                if making.assembly.response.in_conversation {
                    self.armed = armed.clone();
                }
                let making = &mut self.making[at];
                making.armed = armed;
                if making.approved.is_empty() {
                    return self.ask_model(at);
                }
                making.stage = Stage::Tools;
                let mut out = Vec::new();
                for request in std::mem::take(&mut making.approved) {
                    making.assembly.begin_approved(&request, &mut out);
                    making.round.own += 1;
                }
                self.happened(at, out);
            }
            Stage::Tools if making.assembly.is_waiting() => {}
            Stage::Tools => {
                let making = &mut self.making[at];
                let round = std::mem::take(&mut making.round);
                making.patience = None;
                if round.own == 0 || round.leaves || round.last {
                    let mut out = Vec::with_capacity(1);
                    making.assembly.end(Outcome::Completed, &mut out);
                    return self.happened(at, out);
                }
                making.rounds += 1;
                self.ask_model(at);
            }
        }
    }

    /// Lets the model answer what the conversation adds up to.
    fn ask_model(&mut self, at: usize) {
        let making = &mut self.making[at];
        if making.assembly.response.in_conversation {
            // What it was computing is the beginning of what it computes now.
            self.warming = None;
        }
        let view = making.aside.as_ref().unwrap_or(&self.history).view();
        let mut settings = making.settings.clone();
        let most = settings.tool_rounds();
        if making.rounds > 0 {
            // What had to be called was called; after the last round the model has to say what it knows.
            let mut later = Settings::clone(&settings);
            later.tool_choice = if making.rounds < most { ToolChoice::Auto } else { ToolChoice::None };
            settings = Arc::new(later);
        }
        let tools = making.armed.tools.clone();
        let timeout = self.limits.turn_timeout;
        making.progress = None;
        making.stage = Stage::Model(steps(self.electron.clone(), settings, tools, view, making.watch.clone(), timeout));
    }

    fn step(&mut self, at: usize, step: Step) {
        let making = &mut self.making[at];
        match step {
            Step::Started { trimmed, progress } => {
                making.progress = Some(progress);
                let response = making.assembly.response.id.clone();
                if !making.begun {
                    self.begun(at);
                }
                if !trimmed.is_empty() {
                    self.history_of(at).remove(trimmed.clone());
                    self.emit(Event::Trimmed { response, items: trimmed });
                }
            }
            Step::Event(event) => {
                let mut out = Vec::with_capacity(2);
                let armed = making.armed.clone();
                let ended = making.assembly.take(event, |name| armed.kit.hands.get(name).cloned(), &mut out);
                self.happened(at, out);
                let Some(ended) = ended else { return };
                self.making[at].stage = Stage::Tools;
                match ended {
                    FinishReason::Stop | FinishReason::ToolCalls => {
                        self.go_on(at);
                        self.warm_up();
                    }
                    // A call that is complete runs, and the answer has tokens of its own.
                    FinishReason::Length if self.making[at].round.own > 0 => {
                        self.go_on(at);
                        self.warm_up();
                    }
                    FinishReason::Length => self.stop(at, Outcome::Length),
                    FinishReason::Cancelled => self.stop(at, Outcome::Cancelled),
                }
            }
            Step::Failed(error) if !making.begun => {
                // Not accepted: it is as if it had never been asked for.
                let Making { cause, before, assembly, lasting, .. } = self.making.swap_remove(at);
                if assembly.response.in_conversation && !lasting {
                    self.history = before;
                }
                self.handle.about.running.store(!self.making.is_empty(), Ordering::Relaxed);
                self.emit(Event::Refused { cause, error });
            }
            Step::Failed(error) => self.stop(at, Outcome::Failed(error)),
        }
    }

    /// Tells that a response has begun.
    fn begun(&mut self, at: usize) {
        let making = &mut self.making[at];
        making.begun = true;
        let (response, keep) = (Arc::new(making.assembly.response.clone()), making.keep);
        if keep {
            self.keep(response.clone(), Keep::WithSession);
        }
        self.emit(Event::Begun(response));
    }

    /// Ends a response where it is.
    fn stop(&mut self, at: usize, outcome: Outcome) {
        if !self.making[at].begun {
            // Nobody knows of it yet.
            self.begun(at);
        }
        let mut out = Vec::with_capacity(3);
        let assembly = &mut self.making[at].assembly;
        let id = assembly.response.id.clone();
        let (stopped, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.calls)
            .into_iter()
            .partition(|call| call.response == id && call.on_interrupt == OnInterrupt::Cancel);
        self.calls = others;
        for call in stopped {
            call.stop.abort();
            // A result that was taken counts, even if an interruption overtakes it.
            let result = call.taken.clone().ok_or_else(Failure::cancelled);
            assembly.answered(&call.call_id, result.into(), &mut out);
            remember(&mut self.settled, call);
        }
        for call in self.calls.iter_mut().filter(|call| call.response == id) {
            call.outlives = true;
        }
        let making = &mut self.making[at];
        if let (Stage::Model(_), Some(progress)) = (&making.stage, &making.progress) {
            making.assembly.cost(progress.get());
        }
        making.assembly.end(outcome, &mut out);
        self.happened(at, out);
    }

    /// The conversation that a response is part of.
    fn history_of(&mut self, at: usize) -> &mut History {
        self.making[at].aside.as_mut().unwrap_or(&mut self.history)
    }

    /// Takes note of what a response did, and tells it.
    fn happened(&mut self, at: usize, events: Vec<Event>) {
        for event in events {
            match &event {
                Event::OutputBegun { item, .. } => self.history_of(at).add_own(item.clone()),
                Event::OutputEnded { item, .. } => {
                    self.history_of(at).replace(item.clone());
                    let leaves = match item.run() {
                        None => item.call().is_some(),
                        Some(run) => run.state == RunState::AwaitsApproval,
                    };
                    self.making[at].round.leaves |= leaves;
                }
                Event::CallRuns { item, .. } => {
                    self.history_of(at).replace(item.clone());
                    let (item, event) = (item.clone(), event);
                    self.emit(event);
                    self.call(at, item);
                    continue;
                }
                Event::Ended(response) => {
                    let making = self.making.swap_remove(at);
                    self.ended(response, making.keep);
                }
                _ => {}
            }
            self.emit(event);
        }
    }

    fn ended(&mut self, response: &Arc<Response>, keep: bool) {
        self.handle.about.running.store(!self.making.is_empty(), Ordering::Relaxed);
        self.handle.about.count(response.usage);
        if !response.in_conversation {
            return;
        }
        if matches!(response.outcome, Some(Outcome::Cancelled | Outcome::Failed(_))) {
            // Who is cut off in a tool turn cannot be expected to answer its calls.
            let clients = response.output.iter().filter(|item| item.run().is_none());
            let calls = clients.filter_map(|item| item.call().cloned()).collect();
            self.history.cancel_calls(calls);
        }
        self.latest = Some(response.clone());
        if keep {
            self.keep(response.clone(), self.how_long(response));
        }
        self.warm_up();
    }

    // --- tools ---

    /// All tools that are known at the moment.
    fn arm(&self, settings: &Settings) -> Armed {
        settings.arm(|server| {
            let known = self.lists.iter().find(|(known, _)| **known == *server)?;
            known.1.as_ref()?.as_ref().ok().cloned()
        })
    }

    /// Asks servers for their tools that were not asked yet, or in vain. Gives those of the client's among them.
    fn ask(&mut self, settings: &Settings, clients: bool) -> Vec<Arc<Server>> {
        let mut asked = Vec::new();
        for server in settings.servers().filter(|server| clients || !settings.kit.servers.contains(server)) {
            match self.lists.iter().position(|(known, _)| known == server) {
                Some(at) if matches!(self.lists[at].1, Some(Err(_))) => drop(self.lists.remove(at)),
                Some(_) => continue,
                None => {}
            }
            if self.lists.len() >= MOST_LISTS
                && let Some(at) = self.lists.iter().position(|(_, listed)| listed.is_some())
            {
                self.lists.remove(at);
            }
            self.lists.push((server.clone(), None));
            let (server, tools) = (server.clone(), self.tools.clone());
            if settings.kit.servers.contains(&server) {
                asked.push(server.clone());
            }
            self.jobs.push(Box::pin(async move {
                let listed = tools.list(&server).await;
                Job::Listed(server, listed)
            }));
        }
        asked
    }

    /// Asks the servers of the session's own settings. Where those come with each request, so do the client's servers.
    fn ask_servers(&mut self, clients: bool) {
        let settings = self.settings.clone();
        for server in self.ask(&settings, clients) {
            let content = Content::Listing { server: server.label.as_str().into(), tools: Ok(Arc::new([])) };
            let item = Arc::new(Item { id: new_id("mcpl"), content, status: super::Status::InProgress });
            self.history.add_own(item.clone());
            self.emit(Event::Listing(item));
        }
    }

    /// Runs a call.
    fn call(&mut self, at: usize, item: Arc<Item>) {
        let making = &mut self.making[at];
        let Content::Call { call_id, name, arguments, .. } = &item.content else { return };
        making.round.own += 1;
        let hand = making.armed.kit.hands.get(name).cloned();
        let (late, receiver) = oneshot::channel();
        let (stop, stopped) = AbortHandle::new_pair();
        let response = making.assembly.response.id.clone();
        let persona = making.settings.persona.clone();
        if let Some(By::Control(control)) = hand.as_deref().map(|hand| &hand.by) {
            making.round.last |= control.is_last();
            let numbers = persona.as_ref().map(|persona| persona.transfer_to.clone()).unwrap_or_default();
            let request = control.request(arguments, &numbers);
            self.emit(Event::Control { response: response.clone(), request });
        }
        let making = &mut self.making[at];
        let patience = making.settings.still_waiting_after();
        if making.patience.is_none() && !patience.is_zero() {
            let phrases = Phrases::new(making.settings.sampling.seed);
            making.patience = Some(Patience { due: Instant::now() + patience, pause: patience, phrases });
        }
        let token = new_token();
        let call = Call {
            session: self.handle.about.id.clone(),
            call_id: call_id.clone(),
            name: name.clone(),
            arguments: arguments.clone(),
            agent: persona.map(|persona| persona.agent.clone()),
            caller: making.settings.caller(),
            output_url: self.tools.output_url(&self.handle.about.id, call_id),
            output_token: token.clone(),
        };
        let on_interrupt = hand.as_ref().map_or(OnInterrupt::Cancel, |hand| hand.on_interrupt);
        let (tools, id) = (self.tools.clone(), call_id.clone());
        let work = async move {
            let result = match hand {
                Some(hand) => tools.run(&hand, call, receiver).await,
                // Its server listed it before and does no more.
                None => Err(Failure { kind: "protocol", told: "This tool is not there any more.".into() }),
            };
            Job::Called(id, result)
        };
        self.jobs.push(Box::pin(async move { Abortable::new(work, stopped).await.unwrap_or(Job::Stopped) }));
        let (call_id, late) = (call_id.clone(), Some(late));
        self.calls.push(Running {
            call_id,
            response,
            item,
            late,
            token,
            on_interrupt,
            outlives: false,
            stop,
            taken: None,
        });
    }

    /// A tool or a server answered.
    fn done(&mut self, job: Job) {
        match job {
            Job::Stopped => {}
            Job::Called(call_id, result) => {
                let Some(at) = self.calls.iter().position(|call| call.call_id == call_id) else { return };
                let call = self.calls.swap_remove(at);
                let answer: Answer = result.into();
                let making = self.making.iter().position(|making| making.assembly.response.id == call.response);
                match making.filter(|_| !call.outlives) {
                    Some(at) => {
                        let mut out = Vec::with_capacity(1);
                        self.making[at].assembly.answered(&call_id, answer, &mut out);
                        self.happened(at, out);
                        self.go_on(at);
                    }
                    None => {
                        let item = Arc::new(call.item.with_run(RunState::Done(answer)));
                        self.history.replace(item.clone());
                        self.emit(Event::CallSettled(item));
                        self.warm_up();
                    }
                }
                remember(&mut self.settled, call);
            }
            Job::Listed(server, listed) => {
                if let Some((_, list)) = self.lists.iter_mut().find(|(known, _)| *known == server) {
                    *list = Some(listed.clone());
                }
                let is_it = |item: &Arc<Item>| {
                    item.status == super::Status::InProgress
                        && matches!(&item.content, Content::Listing { server: label, .. } if **label == *server.label)
                };
                let open = self.history.view().items.into_iter().filter(is_it).collect::<Vec<_>>();
                let told: Vec<Id> =
                    self.making.iter().flat_map(|m| &m.assembly.response.output).map(|item| item.id.clone()).collect();
                for item in open.into_iter().filter(|item| !told.contains(&item.id)) {
                    let tools = listed.clone().map_err(|failure| failure.told);
                    let content = Content::Listing { server: server.label.as_str().into(), tools };
                    let item = Arc::new(Item { id: item.id.clone(), content, status: super::Status::Completed });
                    self.history.replace(item.clone());
                    self.emit(Event::Listing(item));
                }
                // From the last one, since those that end leave the list.
                for at in (0..self.making.len()).rev() {
                    let mut out = Vec::new();
                    self.making[at].assembly.listed(&server.label, &listed, &mut out);
                    self.happened(at, out);
                    if matches!(self.making[at].stage, Stage::Servers) {
                        self.go_on(at);
                    }
                }
                if self.making.is_empty() {
                    self.armed = Arc::new(self.arm(&self.settings));
                    self.warm_up();
                }
            }
        }
    }

    /// Tells the caller that a tool still runs, if this agent speaks while it waits.
    fn still_waiting(&mut self, at: usize) {
        let making = &self.making[at];
        let history = making.aside.as_ref().unwrap_or(&self.history);
        let turn = making.settings.turn(&making.armed.tools, history.view().messages(), 1);
        let last = making.assembly.response.output.iter().rev().find_map(|item| item.spoken()).map(str::to_owned);
        let speaks = electron::fills(&turn);
        let making = &mut self.making[at];
        let Some(patience) = making.patience.as_mut().filter(|_| speaks) else {
            making.patience = None;
            return;
        };
        let language = electron::language_of(&turn);
        let phrase = patience.phrases.draw(language, filler::Place::StillWaiting, last.as_deref());
        patience.pause = patience.pause.saturating_mul(2);
        patience.due = Instant::now() + patience.pause;
        let mut out = Vec::with_capacity(3);
        making.assembly.say(phrase, Phase::Waiting, &mut out);
        self.happened(at, out);
    }

    /// Takes the result of a call that came by another way.
    fn settle(&mut self, call_id: &str, output: String, token: Option<&str>) -> Result<(), Error> {
        let fits = |own: &str| token.is_none_or(|token| bool::from(token.as_bytes().ct_eq(own.as_bytes())));
        let wrong = || Error::Unauthenticated("This token is not the call's. Use the output_token that came with it.");
        let over = || Error::Settled(format!("The call `{call_id}` has its outcome already."));
        if let Some(call) = self.calls.iter_mut().find(|call| *call.call_id == *call_id) {
            if !fits(&call.token) {
                return Err(wrong());
            }
            let taken = call.late.take().is_some_and(|late| late.send(output.clone()).is_ok());
            if !taken {
                return Err(over());
            }
            call.taken = Some(output);
            return Ok(());
        }
        match self.settled.iter().find(|(settled, _)| **settled == *call_id) {
            Some((_, own)) if !fits(own) => Err(wrong()),
            Some(_) => Err(over()),
            None if token.is_some() => Err(wrong()),
            None if self.history.view().items.iter().any(|item| item.call().is_some_and(|id| **id == *call_id)) => {
                Err(over())
            }
            None => Err(Error::NotFound(format!("There is no call `{call_id}` in this session."))),
        }
    }

    fn cancel(&mut self, id: Option<Id>, heard: Option<Heard>) -> Result<(), Error> {
        let wanted = |response: &Response| match &id {
            Some(id) => response.id == *id,
            None => response.in_conversation,
        };
        let making = self.making.iter().position(|making| wanted(&making.assembly.response));
        let warming = self.warming.as_ref().and_then(|warming| warming.response.as_ref());
        let spoken = match (making, warming, &id) {
            (Some(at), ..) => {
                let id = self.making[at].assembly.response.id.clone();
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
        let (said, response) = match spoken {
            Spoken::Item(id) => (vec![self.settled_item(id)?], None),
            Spoken::Response(id) => {
                let latest = self.latest.as_ref().filter(|latest| latest.id == *id).ok_or_else(|| {
                    Error::invalid("response_id", format!("`{id}` is not the latest response of this conversation"))
                })?;
                let said: Vec<_> = latest.output.iter().filter(|item| item.spoken().is_some()).cloned().collect();
                (said, Some(id.clone()))
            }
        };
        // Where nothing was said, nothing could have been heard.
        let Some(last) = said.last() else { return Ok(()) };
        let (text, audio_end_ms) = match heard {
            Heard::Text(text) => (text.as_str(), 0),
            Heard::Milliseconds(ms) => (spoken_by(last.spoken().unwrap_or_default(), *ms), *ms),
        };
        let heard = match last.heard(text) {
            Ok(item) => vec![item],
            Err(why) => Some(heard_of(&said, text)).filter(|heard| !heard.is_empty()).ok_or(why)?,
        };
        self.heard(heard, response.as_ref(), audio_end_ms);
        Ok(())
    }

    /// Puts what was heard in the place of what was said.
    fn heard(&mut self, heard: Vec<Item>, response: Option<&Id>, audio_end_ms: u64) {
        for item in heard {
            let item = Arc::new(item);
            self.history.replace(item.clone());
            if let Some(latest) = &mut self.latest
                && let Some(at) = latest.output.iter().position(|said| said.id == item.id)
            {
                // Whoever continues that response continues what was heard.
                let mut changed = Response::clone(latest);
                changed.output[at] = item.clone();
                let changed = Arc::new(changed);
                *latest = changed.clone();
                if self.sessions.upgrade().is_some_and(|sessions| sessions.store.get(&changed.id).is_some()) {
                    self.keep(changed.clone(), self.how_long(&changed));
                }
            }
            self.emit(Event::ItemTruncated { item, response: response.cloned(), audio_end_ms });
        }
        self.warm_up();
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
        let own = |making: &&Making| making.assembly.response.in_conversation;
        let answers = |making: &Making| !matches!(making.stage, Stage::Tools);
        let making = self.making.iter().find(own);
        let awaited = self.warming.as_ref().is_some_and(|warming| warming.response.is_some());
        // Who asks once has nothing to come but the next round.
        let over = making.is_none() && self.on_leave == OnLeave::End;
        if making.is_some_and(answers) || awaited || over {
            return;
        }
        let view = self.history.view();
        let settings = making.map_or(&self.settings, |making| &making.settings);
        if view.items.is_empty()
            && settings.instructions.is_empty()
            && settings.persona.is_none()
            && self.armed.tools.is_empty()
        {
            return;
        }
        let turn = waiting_turn(settings, &self.armed.tools, view, self.partial.clone());
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
    fn settled_item(&self, id: &str) -> Result<Arc<Item>, Error> {
        let item = self.item(id)?;
        if item.status == super::Status::InProgress {
            return Err(Error::invalid("item_id", format!("`{id}` is still being made; cancel its response first")));
        }
        Ok(item)
    }

    fn snapshot(&self) -> Snapshot {
        let view = self.history.view();
        let unanswered = view.unanswered();
        let answers = |making: &Making| matches!(making.stage, Stage::Model(_));
        let state = match (self.making.is_empty(), unanswered.is_empty()) {
            (false, _) if self.making.iter().any(answers) => State::Generating,
            (true, true) => State::Idle,
            _ => State::WaitingForTools,
        };
        Snapshot { settings: self.settings.clone(), state, items: view.items, unanswered }
    }

    fn end(&mut self) {
        while !self.making.is_empty() {
            self.stop(0, Outcome::Cancelled);
        }
        self.jobs.clear();
        self.warming = None;
        if let Some(sessions) = self.sessions.upgrade() {
            for id in self.kept.drain(..) {
                sessions.store.remove(&id);
            }
            sessions.ended(&self.handle.about);
        }
        self.handle.about.connected.store(false, Ordering::Relaxed);
    }
}

/// A turn whose last message is not complete: the caller's words so far, or the output of the first open call.
fn waiting_turn(settings: &Settings, tools: &Arc<[Tool]>, view: View, partial: Option<String>) -> Turn {
    let mut messages = view.messages();
    let open = view.running().cloned().or_else(|| view.unanswered().first().cloned());
    match (partial, open) {
        (None, Some(call)) => {
            let open = |message: &Message| matches!(message, Message::Tool { call_id, .. } if **call_id == *call);
            if let Some(at) = messages.iter().position(open) {
                messages.truncate(at);
            }
            messages.push(Message::Tool { call_id: call.to_string(), content: String::new() });
        }
        (partial, _) => messages.push(Message::User(partial.unwrap_or_default())),
    }
    settings.turn(tools, messages, 1)
}

/// Takes a person's word on calls: gives those that may run, and tells the model of the others.
fn approve(history: &mut History) -> Vec<Arc<Item>> {
    let view = history.view();
    let mut approved = Vec::new();
    for item in &view.items {
        let Content::Approval { request, approve } = &item.content else { continue };
        let waits = |item: &&Arc<Item>| item.run().is_some_and(|run| run.state == RunState::AwaitsApproval);
        let Some(found) = view.item(request).filter(waits) else { continue };
        if *approve {
            history.replace(Arc::new(found.with_run(RunState::Approved)));
            approved.push(found.clone());
        } else {
            let told = "The person who was asked did not approve this call.";
            let denied = Failure { kind: "denied", told: told.into() };
            history.replace(Arc::new(found.with_run(RunState::Done(denied.into()))));
        }
    }
    approved
}

/// Keeps the token of a call that has its outcome.
fn remember(settled: &mut VecDeque<(Id, String)>, call: Running) {
    if settled.len() >= MOST_SETTLED {
        settled.pop_front();
    }
    settled.push_back((call.call_id, call.token));
}

/// Authorizes one result. Long and random, so that it cannot be guessed.
fn new_token() -> String {
    let mut bytes = [0u8; 32];
    rand::rng().fill_bytes(&mut bytes);
    format!("out_{}", BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

impl From<Failure> for Answer {
    fn from(failure: Failure) -> Self {
        Self { output: failure.output(), error: Some(failure.told) }
    }
}

impl From<Result<String, Failure>> for Answer {
    fn from(result: Result<String, Failure>) -> Self {
        result.map_or_else(Self::from, |output| Self { output, error: None })
    }
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
    electron: Arc<dyn Model>,
    settings: Arc<Settings>,
    tools: Arc<[Tool]>,
    view: View,
    watch: Watch,
    timeout: Duration,
) -> Pin<Box<dyn Stream<Item = Step> + Send>> {
    enum At {
        Start(Arc<dyn Model>, Arc<Settings>, Arc<[Tool]>, View, Watch),
        Run(TurnStream),
        Over,
    }
    let deadline = Instant::now() + timeout;
    let late = || Step::Failed(Error::EngineFailed("the answer took longer than the server's request_timeout".into()));
    let next = move |stage| async move {
        match stage {
            At::Start(electron, settings, tools, view, watch) => {
                match tokio::time::timeout_at(deadline, start(&electron, &settings, &tools, view)).await {
                    Ok(Ok((events, trimmed))) => {
                        let started = Step::Started { trimmed, progress: events.progress() };
                        Some((started, At::Run(watch(events))))
                    }
                    Ok(Err(e)) => Some((Step::Failed(e), At::Over)),
                    Err(_) => Some((late(), At::Over)),
                }
            }
            At::Run(mut events) => match tokio::time::timeout_at(deadline, events.next()).await {
                Ok(Some(Ok(event))) => Some((Step::Event(event), At::Run(events))),
                Ok(Some(Err(e))) => Some((Step::Failed(e), At::Over)),
                Ok(None) => None,
                Err(_) => Some((late(), At::Over)),
            },
            At::Over => None,
        }
    };
    Box::pin(stream::unfold(At::Start(electron, settings, tools, view, watch), next))
}

/// Starts a turn. When the conversation leaves too little of the model's context, its oldest exchanges make room: more of
/// them than this turn needs, since what follows a gap has to be computed anew each time that there is one.
async fn start(
    electron: &Arc<dyn Model>,
    settings: &Settings,
    tools: &Arc<[Tool]>,
    mut view: View,
) -> Result<(TurnStream, Vec<Id>), Error> {
    let context = electron.context();
    // Without a limit of the client's, an answer gets a quarter of the context.
    let most_tokens = (context / 4).clamp(1, 4096);
    let room = settings.sampling.max_tokens.unwrap_or(most_tokens);
    let mut trimmed = Vec::new();
    loop {
        let prompt = match electron.clone().turn(settings.turn(tools, view.messages(), most_tokens)).await {
            Err(Error::ContextLength { prompt, .. }) if settings.trim && room < context => prompt,
            Err(e) => return Err(e),
            Ok(events) => return Ok((events, trimmed)),
        };
        let target = (context - room) * 4 / 5;
        let bytes = |view: &View| -> usize { view.messages().iter().map(message_bytes).sum() };
        let instructions = settings.persona.as_ref().map_or(0, |persona| persona.instructions.len());
        let declared: usize = tools.iter().map(|tool| tool.parameters.to_string().len()).sum();
        let fixed = instructions + settings.instructions.len() + declared;
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

    /// The number of the event before an item began, if that is still known.
    fn begin_of(&self, id: &Id) -> Option<u64> {
        let is_it = |event: &Arc<Event>| matches!(&**event, Event::OutputBegun { at, .. } if at.item == *id);
        self.events.iter().position(is_it).map(|at| self.first + at as u64 - 1)
    }

    fn forget(&mut self) {
        self.first = self.last() + 1;
        self.next = self.first;
        self.events = VecDeque::new();
    }
}
