//! Sessions: conversations that live longer than a connection.
//!
//! A session is a task of its own ([`actor`]) that owns a conversation: its history, its settings with the tools, its
//! running turn. Whoever wants something sends it a [`Command`] and reads its [`Event`]s; so there is one place that
//! decides what came first. A connection may drop: the session goes on for `session.resume_window`.

mod actor;
pub mod history;
pub mod response;
pub mod store;

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use tokio::sync::{mpsc, oneshot};

use self::{history::Bounds, response::now, store::Store};
pub use self::{
    history::{Answer, Content, History, Id, Item, Phase, Place, Role, Run, RunState, Status, new_id},
    response::{Event, Outcome, Persona, Response, Settings},
};
use crate::{
    config,
    engine::RETRY_AFTER,
    error::Error,
    tool::Tools,
    turn::{Model, TurnStream, Usage},
};

/// Whose a session is: what all keys of one owner have in common.
pub type Owner = Arc<str>;

/// Put around the events of each turn of a response: counts them, and holds the caller's place until it is dropped.
pub type Watch = Arc<dyn Fn(TurnStream) -> TurnStream + Send + Sync>;

/// All sessions of this process, and the responses that they made.
pub struct Sessions {
    live: DashMap<Id, Handle>,
    /// Sessions by what a platform calls them, such as a phone call's id.
    aliases: DashMap<Id, Id>,
    store: Arc<dyn Store>,
    tools: Arc<Tools>,
    limits: Limits,
    itself: Weak<Self>,
    /// Sessions that are live or being opened.
    count: AtomicUsize,
}

/// Bounds of sessions.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a session outlives its connection.
    pub resume_window: Duration,
    /// Longest that a turn may take.
    pub turn_timeout: Duration,
    /// Most sessions at once.
    pub sessions: usize,
    /// Events that are kept for a client that comes back.
    pub replay_events: usize,
    /// Of each history.
    pub history: Bounds,
    /// How long a response with `store: true` is kept.
    pub store_for: Duration,
}

/// A way to a session.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::Sender<Box<Command>>,
    about: Arc<About>,
}

/// What can be known of a session without asking it.
pub struct About {
    /// `sess_…`.
    pub id: Id,
    /// Who may see it.
    pub owner: Owner,
    /// The model's public name.
    pub model: Arc<str>,
    /// The dialect that opened it.
    pub dialect: &'static str,
    /// When, in seconds since 1970.
    pub created_at: u64,
    /// What its platform calls it.
    pub alias: Option<Id>,
    /// Whether it lasts as long as one request, and is not worth a place in a list.
    brief: bool,
    connected: AtomicBool,
    running: AtomicBool,
    responses: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    completion_tokens: AtomicU64,
}

/// What a session does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It waits for the caller.
    Idle,
    /// The model answers.
    Generating,
    /// Calls of the last turn wait for their outputs.
    WaitingForTools,
}

/// A session, looked into.
pub struct Snapshot {
    /// Its settings.
    pub settings: Arc<Settings>,
    /// What it does.
    pub state: State,
    /// The conversation.
    pub items: Vec<Arc<Item>>,
    /// Calls that wait for their outputs.
    pub unanswered: Vec<Id>,
}

/// Something that a session is asked to do.
pub struct Command {
    /// The client's own id of the event that asked for it; a refusal names it.
    pub cause: Option<Id>,
    /// What.
    pub action: Action,
}

/// What a session can be asked to do.
pub enum Action {
    /// Send events here from now on, in the place of an earlier reader.
    Attach(Attach),
    /// Use these settings from the next turn on. Calls in flight are not touched.
    Configure(Arc<Settings>),
    /// Add an item.
    Add(Arc<Item>, Place),
    /// Show an item.
    Retrieve(Id),
    /// Take an item out.
    Remove(Id),
    /// Keep only what was heard.
    Truncate(Spoken, Heard),
    /// Begin a response.
    Respond(Box<Respond>),
    /// Stop a response; `None` is the one of the conversation. With what was heard of it, where the client knows.
    Cancel(Option<Id>, Option<Heard>),
    /// The caller interrupts: what is being said stops. With what they heard of it, where that is known.
    Interrupt(Option<String>),
    /// A call has a result that came by another way than the tool's answer. A token has to be the call's own.
    Settle(Settle),
    /// The caller is still speaking, and this is what they said so far.
    Partial(String),
    /// Send events here no more.
    Leave,
    /// Look into it.
    Describe(oneshot::Sender<Snapshot>),
    /// End it.
    Close,
}

/// The result of a call.
pub struct Settle {
    /// The call.
    pub call_id: Id,
    /// Text or JSON.
    pub output: String,
    /// What authorizes it, unless the session's owner sends it.
    pub token: Option<String>,
    /// Told whether it was taken.
    pub reply: oneshot::Sender<Result<(), Error>>,
}

/// Which words were heard.
#[derive(Clone, Debug)]
pub enum Spoken {
    /// A message.
    Item(Id),
    /// The messages of the latest response.
    Response(Id),
}

/// How much was heard.
#[derive(Clone, Debug)]
pub enum Heard {
    /// The words.
    Text(String),
    /// Milliseconds of speech, of which the words are estimated.
    Milliseconds(u64),
}

/// A reader of a session's events.
pub struct Attach {
    /// Takes the events.
    pub outlet: Outlet,
    /// What becomes of a turn when this reader goes, and whether events are kept for it.
    pub on_leave: OnLeave,
    /// Send what followed this event again.
    pub after: Option<u64>,
    /// Send the message that is being said again, from its beginning.
    pub again: bool,
    /// Only if nobody reads yet.
    pub if_free: bool,
    /// Told once it is done; dropped when it is not.
    pub reply: oneshot::Sender<Attached>,
}

/// Where events go. Several sessions can share a channel; `tag` tells them apart.
#[derive(Clone)]
pub struct Outlet {
    /// The channel.
    pub sender: mpsc::Sender<Delivery>,
    /// Comes with every event.
    pub tag: u32,
}

/// An event on its way to a client.
#[derive(Clone)]
pub struct Delivery {
    /// Of the outlet.
    pub tag: u32,
    /// Its number in the session, from 1.
    pub number: u64,
    /// The event.
    pub event: Arc<Event>,
}

/// What becomes of a session whose reader has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLeave {
    /// The turn goes on, and its events wait for a reader.
    GoOn,
    /// The turn is cancelled: the client will ask again.
    CancelTurn,
    /// The session ends.
    End,
}

/// The answer to [`Attach`].
#[derive(Debug)]
pub struct Attached {
    /// The effective settings.
    pub settings: Arc<Settings>,
    /// Whether events were lost that should have been sent again.
    pub gap: bool,
    /// Responses that are being made and whose beginning is not sent again.
    pub running: usize,
}

/// A response that is asked for.
pub struct Respond {
    /// The id that it gets.
    pub id: Id,
    /// What it is made with.
    pub settings: Arc<Settings>,
    /// What it continues. `None` is the session's own conversation.
    pub base: Option<Base>,
    /// What comes before it, added to the conversation.
    pub input: Vec<Arc<Item>>,
    /// All that was said on the call, as the platform heard it; it decides what was heard and what the caller said.
    pub transcript: Option<Vec<(Role, String)>>,
    /// What the model reads instead of the conversation.
    pub context: Option<History>,
    /// Whether its output joins the conversation.
    pub in_conversation: bool,
    /// Whether what comes before it stays in the conversation although it is refused: a caller has said it all the same.
    pub lasting: bool,
    /// Whether calls without an output are refused; otherwise they are given up.
    pub needs_outputs: bool,
    /// Whether the model answers. Without that its prompt is only computed.
    pub generate: bool,
    /// Whether it can be continued and looked up by its id.
    pub keep: bool,
    /// Whether it is kept when the session has ended.
    pub store: bool,
    /// Around its events.
    pub watch: Watch,
}

/// An earlier state of a conversation.
#[derive(Clone, Default)]
pub struct Base {
    /// The conversation.
    pub history: History,
    /// The response that it ends with.
    pub response: Option<Id>,
}

// === impl Limits ===

impl Limits {
    /// As configured.
    pub fn new(config: &config::Config) -> Self {
        let session = &config.session;
        let bytes = usize::try_from(session.max_history.as_u64()).unwrap_or(usize::MAX);
        Self {
            resume_window: session.resume_window,
            turn_timeout: config.server.request_timeout,
            sessions: session.max_sessions,
            replay_events: session.replay_events,
            history: Bounds { records: session.max_records, bytes },
            store_for: session.store_for,
        }
    }
}

// === impl Sessions ===

impl Sessions {
    /// No sessions yet. Has to be called on a runtime: what expires is swept by a task.
    pub fn new(limits: Limits, store: Arc<dyn Store>, tools: Arc<Tools>) -> Arc<Self> {
        let sessions = Arc::new_cyclic(|itself| Self {
            live: DashMap::new(),
            aliases: DashMap::new(),
            store,
            tools,
            limits,
            itself: itself.clone(),
            count: AtomicUsize::new(0),
        });
        let swept = Arc::downgrade(&sessions);
        tokio::spawn(async move {
            let pause = limits.resume_window.clamp(Duration::from_secs(1), Duration::from_secs(30)) / 4;
            loop {
                tokio::time::sleep(pause).await;
                let Some(sessions) = swept.upgrade() else { break };
                sessions.store.sweep();
            }
        });
        sessions
    }

    /// Opens a session. It is listed until it ends, unless it is to end with its reader. It can be found by its alias.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when there are too many.
    pub fn open(
        &self,
        electron: Arc<dyn Model>,
        owner: Owner,
        dialect: &'static str,
        settings: Settings,
        on_leave: OnLeave,
        alias: Option<Id>,
    ) -> Result<Handle, Error> {
        if self.count.fetch_add(1, Ordering::AcqRel) >= self.limits.sessions {
            self.count.fetch_sub(1, Ordering::AcqRel);
            return Err(Error::Overloaded {
                message: "This server holds as many sessions as it may. Try again in a moment.".into(),
                retry_after: RETRY_AFTER,
            });
        }
        let (commands, received) = mpsc::channel(8);
        let about = Arc::new(About {
            id: new_id("sess"),
            owner,
            model: settings.model.clone(),
            dialect,
            created_at: now(),
            alias,
            brief: on_leave == OnLeave::End,
            connected: AtomicBool::new(false),
            running: AtomicBool::new(false),
            responses: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            cached_tokens: AtomicU64::new(0),
            completion_tokens: AtomicU64::new(0),
        });
        let handle = Handle { commands, about: about.clone() };
        self.live.insert(about.id.clone(), handle.clone());
        if let Some(alias) = &about.alias {
            self.aliases.insert(alias.clone(), about.id.clone());
        }
        let sessions = (self.itself.clone(), self.tools.clone());
        let actor = actor::Actor::new(sessions, electron, handle.clone(), settings, on_leave, self.limits);
        tokio::spawn(actor.run(received));
        Ok(handle)
    }

    /// A live session of this owner.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none, also when it is somebody else's.
    pub fn find(&self, id: &str, owner: &Owner) -> Result<Handle, Error> {
        let found = self.live.get(id).map(|entry| entry.value().clone()).filter(|found| found.about.owner == *owner);
        found.ok_or_else(|| Error::NotFound(format!("There is no session `{id}`. It may have expired.")))
    }

    /// A live session, whoever's it is. For results of tools, which bring a token of the session's own.
    pub fn find_any(&self, id: &str) -> Option<Handle> {
        self.live.get(id).map(|entry| entry.value().clone())
    }

    /// The live session that its platform calls so.
    pub fn find_alias(&self, alias: &str) -> Option<Handle> {
        let id = self.aliases.get(alias)?.clone();
        self.find_any(&id)
    }

    /// Whether a platform calls a live session by a name that begins so.
    pub fn has_alias(&self, prefix: &str) -> bool {
        self.aliases.iter().any(|alias| alias.key().starts_with(prefix))
    }

    /// Live sessions of this owner, oldest first.
    pub fn list(&self, owner: &Owner) -> Vec<Arc<About>> {
        let mut found: Vec<Arc<About>> =
            self.live.iter().filter(|s| s.about.owner == *owner && !s.about.brief).map(|s| s.about.clone()).collect();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        found
    }

    /// How many sessions there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// A response of this owner that can be looked up: one that is stored, or still being made.
    ///
    /// # Errors
    /// [`Error::NotFound`], also when it is somebody else's.
    pub fn stored(&self, id: &str, owner: &Owner) -> Result<store::Stored, Error> {
        let visible = |stored: &store::Stored| stored.response.store || stored.response.outcome.is_none();
        let missing = || Error::NotFound(format!("There is no response `{id}`. It may have expired."));
        self.response(id, owner).filter(visible).ok_or_else(missing)
    }

    /// A response of this owner that can be continued.
    pub fn response(&self, id: &str, owner: &Owner) -> Option<store::Stored> {
        self.store.get(id).filter(|stored| stored.owner == *owner)
    }

    /// Forgets a response of this owner.
    ///
    /// # Errors
    /// As [`Sessions::stored`].
    pub fn forget(&self, id: &str, owner: &Owner) -> Result<(), Error> {
        self.stored(id, owner)?;
        self.store.remove(id);
        Ok(())
    }

    fn ended(&self, about: &About) {
        self.live.remove(&about.id);
        if let Some(alias) = &about.alias {
            // A later call may have taken the name.
            self.aliases.remove_if(alias, |_, id| *id == about.id);
        }
        self.count.fetch_sub(1, Ordering::AcqRel);
    }
}

// === impl Handle ===

impl Handle {
    /// What is known of the session.
    pub fn about(&self) -> &Arc<About> {
        &self.about
    }

    /// Whether the session has ended.
    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// Asks for something.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the session has ended.
    pub async fn send(&self, cause: Option<Id>, action: Action) -> Result<(), Error> {
        let gone = || Error::NotFound(format!("The session `{}` has ended.", self.about.id));
        self.commands.send(Box::new(Command { cause, action })).await.map_err(|_| gone())
    }

    /// Becomes the reader of the session's events.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the session has ended, or is read already though it should not be.
    pub async fn attach(
        &self,
        outlet: Outlet,
        on_leave: OnLeave,
        after: Option<u64>,
        if_free: bool,
    ) -> Result<Attached, Error> {
        let (reply, attached) = oneshot::channel();
        let attach = Attach { outlet, on_leave, after, again: false, if_free, reply };
        self.send(None, Action::Attach(attach)).await?;
        attached.await.map_err(|_| Error::NotFound(format!("The session `{}` is not to be had.", self.about.id)))
    }

    /// Becomes the reader of a session whose reader was cut off: what it was hearing begins again.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the session has ended.
    pub async fn take_over(&self, outlet: Outlet, on_leave: OnLeave) -> Result<Attached, Error> {
        let (reply, attached) = oneshot::channel();
        let attach = Attach { outlet, on_leave, after: None, again: true, if_free: false, reply };
        self.send(None, Action::Attach(attach)).await?;
        attached.await.map_err(|_| Error::NotFound(format!("The session `{}` has ended.", self.about.id)))
    }

    /// Ends the session, and waits until it has.
    pub async fn close(&self) {
        if self.send(None, Action::Close).await.is_ok() {
            self.commands.closed().await;
        }
    }

    /// Gives a call its result.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a session or a call that is not there, [`Error::Unauthenticated`] for a wrong token,
    /// [`Error::Settled`] for a call that has its outcome.
    pub async fn settle(&self, call_id: Id, output: String, token: Option<String>) -> Result<(), Error> {
        let (reply, settled) = oneshot::channel();
        self.send(None, Action::Settle(Settle { call_id, output, token, reply })).await?;
        settled.await.unwrap_or_else(|_| Err(Error::NotFound(format!("The session `{}` has ended.", self.about.id))))
    }

    /// Looks into the session.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it has ended.
    pub async fn describe(&self) -> Result<Snapshot, Error> {
        let (reply, snapshot) = oneshot::channel();
        self.send(None, Action::Describe(reply)).await?;
        snapshot.await.map_err(|_| Error::NotFound(format!("The session `{}` has ended.", self.about.id)))
    }
}

// === impl About ===

impl About {
    /// Whether a client reads its events.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Whether the model answers.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// Responses so far.
    pub fn responses(&self) -> u64 {
        self.responses.load(Ordering::Relaxed)
    }

    /// What all its responses cost.
    pub fn usage(&self) -> Usage {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as usize;
        Usage {
            prompt_tokens: read(&self.prompt_tokens),
            cached_tokens: read(&self.cached_tokens),
            completion_tokens: read(&self.completion_tokens),
        }
    }

    fn count(&self, usage: Usage) {
        self.responses.fetch_add(1, Ordering::Relaxed);
        self.prompt_tokens.fetch_add(usage.prompt_tokens as u64, Ordering::Relaxed);
        self.cached_tokens.fetch_add(usage.cached_tokens as u64, Ordering::Relaxed);
        self.completion_tokens.fetch_add(usage.completion_tokens as u64, Ordering::Relaxed);
    }
}
