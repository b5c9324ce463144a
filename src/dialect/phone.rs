//! What the dialects of telephony platforms have in common: a call is a session of an agent.

use std::{collections::VecDeque, sync::Arc};

use serde_json::{Map, Value};
use tokio::sync::mpsc;

use super::Access;
use crate::{
    electron::{
        filler::{Phrases, Place as Spoken},
        language::Language,
    },
    error::Error,
    session::{
        Action, Content, Delivery, Handle, Id, Item, OnLeave, Outcome, Outlet, Phase, Place, Respond, Response, Role,
        Sessions, Settings, new_id,
    },
    tool::{Control, Dtmf, control::Request},
};

/// Events on their way from the session to the connection.
const DELIVERIES: usize = 32;
/// Most interrupted responses of which something can be on its way.
const MOST_MUTED: usize = 64;

/// What a connection of a platform needs to begin.
pub struct Opening {
    /// What the connection may do.
    pub access: Arc<dyn Access>,
    /// Where calls live.
    pub sessions: Arc<Sessions>,
    /// The agent's name.
    pub agent: Arc<str>,
    /// The name by which a client would ask for it.
    pub model: String,
}

/// A call's session, and the connection's place in it.
pub(super) struct Line {
    pub session: Handle,
    pub deliveries: mpsc::Receiver<Delivery>,
    /// Whether the session was there before this connection.
    pub resumed: bool,
    /// What the agent had asked for when an earlier connection broke, and nobody did.
    pub last: Option<Request>,
    access: Arc<dyn Access>,
    settings: Arc<Settings>,
    /// The response that is being made.
    pub active: Option<Id>,
    /// Those that were interrupted last: what is still on its way of them is not spoken any more.
    muted: VecDeque<Id>,
    phrases: Phrases,
}

// === impl Opening ===

impl Opening {
    /// Goes on with the call that the platform calls so, or begins it. `caller` is what is known of it.
    pub(super) async fn line(
        &self,
        dialect: &'static str,
        call: &str,
        caller: &Map<String, Value>,
    ) -> Result<Line, Error> {
        let alias: Id = format!("{dialect}/{}/{call}", self.agent).into();
        let (sender, deliveries) = mpsc::channel(DELIVERIES);
        let outlet = Outlet { sender, tag: 0 };
        let known = self.sessions.find_alias(&alias).filter(|known| !known.is_closed());
        let (session, resumed) = match known {
            Some(session) => (session, true),
            None => {
                let electron = self.access.model(&self.model)?;
                let settings = self.access.settings(&self.model, caller)?;
                let owner = self.access.owner().clone();
                (self.sessions.open(electron, owner, dialect, settings, OnLeave::GoOn, Some(alias))?, false)
            }
        };
        let attached = session.take_over(outlet, OnLeave::GoOn).await?;
        let last = if resumed { last_request(&session, &attached.settings).await } else { None };
        tracing::info!(session = &*session.about().id, call, resumed, "on the line");
        Ok(Line {
            session,
            deliveries,
            resumed,
            last,
            access: self.access.clone(),
            settings: attached.settings,
            active: None,
            muted: VecDeque::new(),
            phrases: Phrases::new(None),
        })
    }
}

/// The end or the transfer of a call that was asked for since the caller spoke last.
async fn last_request(session: &Handle, settings: &Settings) -> Option<Request> {
    let items = session.describe().await.ok()?.items;
    let transfer_to = &settings.persona.as_ref()?.transfer_to;
    let since =
        items.iter().rev().take_while(|item| !matches!(item.content, Content::Message { role: Role::User, .. }));
    since.into_iter().find_map(|item| match &item.content {
        Content::Call { name, arguments, run: Some(_), .. } => {
            let control = Control::ALL.into_iter().find(|control| control.is_last() && control.name() == name)?;
            Some(control.request(arguments, transfer_to))
        }
        _ => None,
    })
}

/// Whether a response ended without what it was to tell: it failed, or was cut off before it had said anything but that it
/// takes a moment.
pub(super) fn left_hanging(response: &Response) -> bool {
    let answered = response.output.last().is_some_and(
        |item| matches!(&item.content, Content::Message { phase: Phase::Answer, text, .. } if !text.is_empty()),
    );
    match &response.outcome {
        Some(Outcome::Failed(error)) => {
            tracing::warn!(%error, "a turn failed");
            true
        }
        Some(Outcome::Length) => !answered,
        _ => false,
    }
}

// === impl Line ===

impl Line {
    /// What the caller hears first.
    pub(super) fn greeting(&self) -> Option<&str> {
        self.settings.persona.as_ref()?.greeting.as_deref()
    }

    /// How keys that the caller presses become a turn.
    pub(super) fn dtmf(&self) -> Dtmf {
        self.settings.persona.as_ref().map(|persona| persona.dtmf.clone()).unwrap_or_default()
    }

    /// The language that the agent speaks.
    pub(super) fn language(&self) -> Option<&str> {
        self.settings.persona.as_ref()?.language.as_deref()
    }

    /// Takes words into the history that were spoken without the model.
    pub(super) async fn spoke(&self, text: &str) -> Result<(), Error> {
        let item = Arc::new(Item::message(new_id("msg"), Role::Assistant, text));
        self.session.send(None, Action::Add(item, Place::End)).await
    }

    /// Lets the agent answer. What it was saying stops.
    pub(super) async fn ask(
        &mut self,
        input: Vec<Arc<Item>>,
        transcript: Option<Vec<(Role, String)>>,
    ) -> Result<Id, Error> {
        self.interrupt(None).await?;
        let watch = self.access.admit(&self.settings.model)?;
        let id = new_id("resp");
        let respond = Respond {
            id: id.clone(),
            settings: self.settings.clone(),
            base: None,
            input,
            transcript,
            context: None,
            in_conversation: true,
            lasting: true,
            needs_outputs: false,
            generate: true,
            keep: false,
            store: false,
            watch,
        };
        self.session.send(Some(id.clone()), Action::Respond(Box::new(respond))).await?;
        self.active = Some(id.clone());
        Ok(id)
    }

    /// Stops what is being said.
    pub(super) async fn interrupt(&mut self, heard: Option<String>) -> Result<(), Error> {
        if let Some(active) = self.active.take() {
            self.muted.truncate(MOST_MUTED - 1);
            self.muted.push_front(active);
        }
        self.session.send(None, Action::Interrupt(heard)).await
    }

    /// The connection was closed. Who hangs up waits for no answer; whether they come back, nobody knows.
    pub(super) async fn closed(&mut self, code: Option<u16>) {
        if code == Some(1000) && !self.session.is_closed() {
            let _ = self.interrupt(None).await;
        }
    }

    /// The caller is still speaking.
    pub(super) async fn partial(&self, text: &str) -> Result<(), Error> {
        self.session.send(None, Action::Partial(text.to_owned())).await
    }

    /// Whether events of a response are not for the caller any more.
    pub(super) fn is_muted(&self, response: &str) -> bool {
        self.muted.iter().any(|muted| **muted == *response)
    }

    /// Takes note that a response is being made, which may have begun before this connection.
    pub(super) fn makes(&mut self, response: &Id) {
        if self.active.is_none() && !self.is_muted(response) {
            self.active = Some(response.clone());
        }
    }

    /// What is said when there is no answer.
    pub(super) fn trouble(&mut self, language: Option<&str>) -> &'static str {
        let language = language.or(self.language()).and_then(Language::from_code).unwrap_or(Language::ENGLISH);
        self.phrases.draw(language, Spoken::Trouble, None)
    }
}
