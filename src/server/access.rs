//! What a caller may do, as the dialects ask it.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    App,
    auth::Caller,
    observe::{Observed, RequestId},
};
use crate::{
    dialect::Access,
    error::Error,
    session::{Owner, Settings, Watch},
    tool::{Control, guard::Guard},
    turn::Model,
};

/// A caller on a connection.
pub(super) struct Granted {
    app: Arc<App>,
    caller: Caller,
    observed: Observed,
    request_id: RequestId,
    owner: Owner,
    /// The agent that the request's path names.
    agent: Option<Arc<str>>,
    /// Which protocol it is.
    dialect: &'static str,
}

/// The agent that a request's path names.
#[derive(Clone)]
pub(super) struct PathAgent(pub Arc<str>);

impl Granted {
    pub(super) fn new(app: Arc<App>, caller: Caller, observed: Observed, request_id: RequestId) -> Self {
        let owner = caller.owner();
        Self { app, caller, observed, request_id, owner, agent: None, dialect: "" }
    }

    /// For this protocol, with the agent that the path names.
    #[must_use]
    pub(super) fn of(mut self, dialect: &'static str, agent: Option<PathAgent>) -> Self {
        self.agent = agent.map(|PathAgent(name)| name);
        self.dialect = dialect;
        self
    }
}

impl Access for Granted {
    fn owner(&self) -> &Owner {
        &self.owner
    }

    fn model(&self, name: &str) -> Result<Arc<dyn Model>, Error> {
        if self.agent.is_some() {
            return self.app.model(self.app.config.default_model(), &self.caller);
        }
        let (model, agent) = split(name);
        if agent.is_some_and(|agent| self.app.agents.get(agent).is_none()) {
            return Err(Error::ModelNotFound(name.to_owned()));
        }
        self.app.model(model, &self.caller).map_err(|e| match e {
            Error::ModelNotFound(_) => Error::ModelNotFound(name.to_owned()),
            other => other,
        })
    }

    fn settings(&self, model: &str, variables: &Map<String, Value>) -> Result<Settings, Error> {
        let filler = self.app.config.electron.filler;
        let Some(name) = self.agent.as_deref().or(split(model).1) else {
            return Ok(Settings::new(model, filler));
        };
        let agent = self.app.agents.get(name).ok_or_else(|| Error::ModelNotFound(model.to_owned()))?;
        let (controls, attended): (&[Control], _) = match self.dialect {
            "conversation_relay" => (&Control::ALL, false),
            "retell" => (&[Control::EndCall, Control::TransferCall], false),
            "responses" | "realtime" => (&[], true),
            _ => (&[], false),
        };
        Ok(agent.settings(model, filler, variables, controls, attended))
    }

    fn guard(&self) -> &Guard {
        self.app.tools.guard()
    }

    fn admit(&self, model: &str) -> Result<Watch, Error> {
        let permit = Arc::new(self.caller.admit()?);
        let observed = self.observed.turn(model);
        Ok(Arc::new(move |turn| observed.again().watch(turn, permit.clone())))
    }

    fn request_id(&self) -> &str {
        &self.request_id.0
    }
}

/// A model's name and the agent's that stands behind it.
fn split(name: &str) -> (&str, Option<&str>) {
    match name.split_once(':') {
        Some((model, agent)) => (model, Some(agent)),
        None => (name, None),
    }
}
