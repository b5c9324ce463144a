//! What a caller may do, as the dialects ask it.

use std::sync::Arc;

use super::{
    App,
    auth::Caller,
    observe::{Observed, RequestId},
};
use crate::{
    dialect::Access,
    electron::Electron,
    error::Error,
    session::{Owner, Watch},
};

/// A caller on a connection.
pub(super) struct Granted {
    app: Arc<App>,
    caller: Caller,
    observed: Observed,
    request_id: RequestId,
    owner: Owner,
}

impl Granted {
    pub(super) fn on(app: Arc<App>, caller: Caller, observed: Observed, request_id: RequestId) -> Arc<dyn Access> {
        let owner = caller.owner();
        Arc::new(Self { app, caller, observed, request_id, owner })
    }
}

impl Access for Granted {
    fn owner(&self) -> &Owner {
        &self.owner
    }

    fn model(&self, name: &str) -> Result<Arc<Electron>, Error> {
        self.app.model(name, &self.caller)
    }

    fn admit(&self, model: &str) -> Result<Watch, Error> {
        let permit = self.caller.admit()?;
        let observed = self.observed.turn(model);
        Ok(Box::new(move |turn| observed.watch(turn, permit)))
    }

    fn request_id(&self) -> &str {
        &self.request_id.0
    }
}
