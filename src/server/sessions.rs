//! Routes of what is kept between requests: responses, realtime sessions, sessions of any dialect.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Extension, Json,
    body::Body,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
        ws::{WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    http::Response,
};
use serde_json::{Value, json};
use tracing::Instrument;

use super::{
    App, Place,
    access::{Granted, PathAgent},
    auth::Caller,
    observe::{Observed, RequestId},
    read_body,
};
use crate::{
    dialect::{
        Access, realtime, responses, sessions,
        socket::{self, Protocol},
    },
    error::{Error, Fault},
    session::response::now,
};

type Params = Result<Query<HashMap<String, String>>, QueryRejection>;
type Id = Result<Path<String>, PathRejection>;
/// What a connection that becomes a WebSocket brings with it.
pub(super) type Connecting = (Extension<RequestId>, Extension<Observed>, Extension<Place>);
pub(super) type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

fn id(id: Id) -> Result<String, Error> {
    id.map(|Path(id)| id).map_err(|_| Error::invalid("id", "the id is not valid UTF-8"))
}

fn params(params: Params) -> Result<HashMap<String, String>, Error> {
    params.map(|Query(params)| params).map_err(|e| Error::invalid("query", e.body_text()))
}

pub(super) async fn body(request: Request, app: &App) -> Result<Value, Error> {
    let body = read_body(request, &app.config).await?;
    let fault = |why: String| Error::Invalid(vec![Fault::new([], why)]);
    if body.is_empty() {
        return Err(fault("The body is empty; a JSON object is expected.".into()));
    }
    serde_json::from_slice(&body).map_err(|e| fault(format!("The body is not valid JSON: {e}")))
}

// === responses ===

pub(super) async fn create_response(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    Extension(observed): Extension<Observed>,
    request: Request,
) -> Result<Response<Body>, Error> {
    let agent = request.extensions().get::<PathAgent>().cloned();
    let body = body(request, &app).await?;
    let access = Arc::new(Granted::new(app.clone(), caller, observed, request_id).of("responses", agent));
    let create = responses::parse(&body, None, &*access)?;
    responses::answer(create, access, &app.sessions).await
}

pub(super) async fn connect_responses(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    (Extension(request_id), Extension(observed), Extension(place)): Connecting,
    agent: Option<Extension<PathAgent>>,
    query: Params,
    upgrade: Upgrade,
) -> Result<Response<Body>, Error> {
    let upgrade = upgrade.map_err(|e| not_upgraded("/v1/responses", &e))?;
    let model = params(query)?.remove("model");
    drop(caller.admit()?);
    let agent = agent.map(|Extension(agent)| agent);
    let access = Arc::new(Granted::new(app.clone(), caller, observed, request_id).of("responses", agent));
    let connection = responses::Connection::new(access, app.sessions.clone(), model, app.config.session.max_lanes);
    Ok(serve(&app, place, upgrade, connection, 0))
}

pub(super) async fn response(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    path: Id,
    query: Params,
) -> Result<Json<Value>, Error> {
    let id = id(path)?;
    if params(query)?.get("stream").is_some_and(|stream| stream == "true") {
        return Err(Error::invalid("stream", "a response cannot be streamed again; ask without stream"));
    }
    let stored = app.sessions.stored(responses::shorten(&id), &caller.owner())?;
    Ok(Json(responses::response_value(&stored.response)))
}

pub(super) async fn delete_response(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    path: Id,
) -> Result<Json<Value>, Error> {
    let id = id(path)?;
    app.sessions.forget(responses::shorten(&id), &caller.owner())?;
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

pub(super) async fn cancel_response(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    Extension(observed): Extension<Observed>,
    path: Id,
) -> Result<Json<Value>, Error> {
    let id = id(path)?;
    let access = Granted::new(app.clone(), caller, observed, request_id);
    Ok(Json(responses::stop(&id, &access, &app.sessions).await?))
}

pub(super) async fn input_items(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    path: Id,
    query: Params,
) -> Result<Json<Value>, Error> {
    let id = id(path)?;
    let stored = app.sessions.stored(responses::shorten(&id), &caller.owner())?;
    Ok(Json(responses::input_page(&stored.response, &params(query)?)?))
}

// === realtime ===

pub(super) async fn connect_realtime(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    (Extension(request_id), Extension(observed), Extension(place)): Connecting,
    agent: Option<Extension<PathAgent>>,
    query: Params,
    upgrade: Upgrade,
) -> Result<Response<Body>, Error> {
    // A browser offers its key as a second protocol, which must not be the one that is chosen.
    let upgrade = upgrade.map_err(|e| not_upgraded("/v1/realtime", &e))?.protocols(["realtime"]);
    let mut params = params(query)?;
    drop(caller.admit()?);
    let agent = agent.map(|Extension(agent)| agent);
    let secret = caller.secret().cloned();
    let access = Arc::new(Granted::new(app.clone(), caller, observed, request_id).of("realtime", agent));
    let settings = match secret {
        Some(settings) => settings,
        None => {
            let model = params.remove("model").unwrap_or_else(|| app.config.default_model().to_owned());
            // What else stands in the URL is known of the call.
            let known = |(name, _): &(&String, &String)| !["session_id", "last_event_id"].contains(&name.as_str());
            let variables = params.iter().filter(known).map(|(name, value)| (name.clone(), value.as_str().into()));
            access.settings(&model, &variables.collect())?
        }
    };
    let opening = realtime::Opening {
        session_id: params.remove("session_id"),
        last_event_id: params.remove("last_event_id"),
        settings,
    };
    let connection = realtime::connect(access, &app.sessions, opening, app.limits.history).await?;
    Ok(serve(&app, place, upgrade, connection, 0))
}

pub(super) async fn client_secret(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    Extension(observed): Extension<Observed>,
    request: Request,
) -> Result<Json<Value>, Error> {
    let body = body(request, &app).await?;
    let access = Granted::new(app.clone(), caller.clone(), observed, request_id).of("realtime", None);
    let Value::Object(mut body) = body else {
        return Err(Error::Invalid(vec![Fault::new([], "The body has to be an object.")]));
    };
    let session = body.remove("session").filter(|value| !value.is_null()).unwrap_or_else(|| json!({}));
    let model = session.get("model").and_then(Value::as_str).unwrap_or(app.config.default_model()).to_owned();
    let electron = access.model(&model).map_err(|e| match e {
        Error::ModelNotFound(_) => Error::invalid("model", e.to_string()).under(&["session".into()]),
        other => other,
    })?;
    let variables = session.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
    let settings = access.settings(&model, &variables)?;
    let settings = realtime::settings(&session, &settings, access.guard(), "session")?;
    electron.check_tools_apart(settings.tools.clone()).await.map_err(realtime::in_session)?;
    let seconds = match body.get("expires_after").filter(|value| !value.is_null()) {
        None => 600,
        Some(expiry) => whole(&expiry["seconds"]).filter(|seconds| (10..=7200).contains(seconds)).ok_or_else(|| {
            Error::invalid("expires_after", "expires_after.seconds has to be a whole number from 10 to 7200")
        })?,
    };
    let mut value = realtime::session_value(&crate::session::new_id("sess"), &settings);
    let secret = app.auth.new_secret(&caller, settings, seconds)?;
    let expires_at = now() + seconds;
    value["expires_at"] = expires_at.into();
    Ok(Json(json!({"value": secret, "expires_at": expires_at, "session": value})))
}

/// JSON has one kind of number: 600.0 is whole.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0).map(|n| n as u64))
}

// === sessions ===

pub(super) async fn list_sessions(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    query: Params,
) -> Result<Json<Value>, Error> {
    Ok(Json(sessions::list(&app.sessions, &caller.owner(), &params(query)?)?))
}

pub(super) async fn session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    path: Id,
) -> Result<Json<Value>, Error> {
    Ok(Json(sessions::show(&app.sessions, &caller.owner(), &id(path)?).await?))
}

pub(super) async fn delete_session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    path: Id,
) -> Result<Json<Value>, Error> {
    Ok(Json(sessions::end(&app.sessions, &caller.owner(), &id(path)?).await?))
}

// === WebSockets ===

pub(super) fn not_upgraded(path: &str, why: &WebSocketUpgradeRejection) -> Error {
    Error::UpgradeRequired(format!("GET {path} is a WebSocket: connect to it with ws:// or wss://. ({why})"))
}

/// Serves a connection. A protocol whose messages are large by nature reads so many bytes at least.
pub(super) fn serve(
    app: &Arc<App>,
    place: Place,
    upgrade: WebSocketUpgrade,
    protocol: impl Protocol + 'static,
    max_message: usize,
) -> Response<Body> {
    let config = &app.config;
    let limits = socket::Limits {
        max_message: usize::try_from(config.session.max_message.as_u64()).unwrap_or(usize::MAX).max(max_message),
        write_timeout: config.server.write_timeout,
        idle_timeout: config.session.idle_timeout,
        ping_interval: config.session.ping_interval,
        stop: app.stop.clone(),
    };
    let open = app.sockets.token();
    let span = tracing::Span::current();
    socket::configure(upgrade, &limits).on_upgrade(move |socket| {
        let served = async move {
            // The connection keeps its place until it is closed, and the server waits for it when it stops.
            let _held = (place, open);
            socket::serve(socket, protocol, limits).await;
        };
        served.instrument(span)
    })
}
