//! Routes of telephony platforms and of tools' late results. Neither brings a key: a platform signs its requests or knows
//! a secret path, a tool has the token of its call.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Extension, Json,
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, Response, Uri, header},
    response::IntoResponse,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha1::Sha1;
use subtle::ConstantTimeEq;
use url::Url;

use super::{
    App, Peer,
    access::{Granted, PathAgent},
    auth::given_key,
    observe::{Observed, RequestId},
    read_body,
    sessions::{Connecting, Upgrade, not_upgraded, serve},
};
use crate::{
    agent::Agent,
    dialect::{conversation_relay, phone::Opening, retell},
    error::Error,
};

/// Largest result that a tool may send.
const MOST_OUTPUT: usize = 64 << 10;

type Names = Result<Path<Vec<String>>, PathRejection>;

fn names<const N: usize>(names: Names) -> Result<[String; N], Error> {
    let wrong = || Error::invalid("path", "the path is not valid UTF-8");
    names.map_err(|_| wrong())?.0.try_into().map_err(|_| wrong())
}

impl App {
    fn agent(&self, name: &str) -> Result<Arc<Agent>, Error> {
        self.agents.get(name).ok_or_else(|| Error::NotFound(format!("There is no agent `{name}`.")))
    }

    /// The agent of a call: none where it was taken out of the settings and one of its calls may go on.
    fn agent_of_call(&self, dialect: &str, name: &str) -> Result<Option<Arc<Agent>>, Error> {
        match self.agent(name) {
            Err(_) if self.sessions.has_alias(&format!("{dialect}/{name}/")) => Ok(None),
            found => found.map(Some),
        }
    }

    /// Where this server is reached from outside.
    pub(super) fn public_url(&self) -> &str {
        self.public_url.trim_end_matches('/')
    }

    fn opening(
        self: &Arc<Self>,
        name: &str,
        agent: Option<Arc<Agent>>,
        dialect: &'static str,
        observed: Observed,
        request_id: RequestId,
    ) -> Result<Opening, Error> {
        let key = agent.as_ref().map_or("", |agent| &agent.definition.key);
        let caller = self.auth.named(key).ok_or_else(|| {
            Error::Internal(format!("the agent `{name}` names the key `{key}`, which is not configured"))
        })?;
        let path = PathAgent(name.into());
        let access = Granted::new(self.clone(), caller, observed, request_id).of(dialect, Some(path));
        let model = format!("{}:{name}", self.config.default_model());
        Ok(Opening { access: Arc::new(access), sessions: self.sessions.clone(), agent: name.into(), model })
    }
}

// === Twilio ===

/// Answers the webhook of a phone number.
pub(super) async fn twilio_voice(
    State(app): State<Arc<App>>,
    uri: Uri,
    path: Names,
    request: Request,
) -> Result<Response<Body>, Error> {
    let [name] = names(path)?;
    signed_form(&app, &uri, request).await?;
    let agent = app.agent(&name)?;
    Ok(twiml(connect(&app, &name, &agent.definition.language)))
}

/// Answers what is to become of the call when its WebSocket has ended.
pub(super) async fn twilio_action(
    State(app): State<Arc<App>>,
    uri: Uri,
    path: Names,
    request: Request,
) -> Result<Response<Body>, Error> {
    let [name] = names(path)?;
    let form = signed_form(&app, &uri, request).await?;
    let field = |name: &str| form.iter().find(|(field, _)| field == name).map_or("", |(_, value)| value);
    let status = field("SessionStatus");
    tracing::info!(status, call = field("CallSid"), error = field("ErrorCode"), "twilio's session ended");
    let session = app.sessions.find_alias(&format!("conversation_relay/{name}/{}", field("CallSid")));
    let Some(session) = session else {
        app.agent(&name)?;
        return Ok(twiml(conversation_relay::hangup_twiml()));
    };
    let persona = session.describe().await.ok().and_then(|snapshot| snapshot.settings.persona.clone());
    // The connection broke and the caller is still there: they go on where they were.
    if status == "failed" && field("CallStatus") != "completed" {
        let language = persona.as_ref().and_then(|persona| persona.language.as_deref());
        return Ok(twiml(connect(&app, &name, language.unwrap_or_default())));
    }
    session.close().await;
    let handoff: Value = serde_json::from_str(field("HandoffData")).unwrap_or_default();
    let number = handoff["number"].as_str().filter(|number| {
        // Only where the agent of this call may transfer to.
        persona.is_some_and(|persona| persona.transfer_to.values().any(|known| known == number))
    });
    Ok(twiml(number.map_or_else(conversation_relay::hangup_twiml, conversation_relay::dial_twiml)))
}

/// The WebSocket of a call.
pub(super) async fn twilio_relay(
    State(app): State<Arc<App>>,
    uri: Uri,
    (Extension(request_id), Extension(observed), Extension(place)): Connecting,
    path: Names,
    headers: HeaderMap,
    upgrade: Upgrade,
) -> Result<Response<Body>, Error> {
    let [name] = names(path)?;
    verify(&app, &uri, true, &[], &headers)?;
    let agent = app.agent_of_call("conversation_relay", &name)?;
    let upgrade = upgrade.map_err(|e| not_upgraded(uri.path(), &e))?;
    let opening = app.opening(&name, agent, "conversation_relay", observed, request_id)?;
    Ok(serve(&app, place, upgrade, conversation_relay::Connection::new(opening), 0))
}

fn connect(app: &App, agent: &str, language: &str) -> String {
    let at = format!("{}/agents/{agent}/twilio", app.public_url());
    // `http` becomes `ws`, and `https` becomes `wss`.
    let relay = format!("{}/relay", at.replacen("http", "ws", 1));
    conversation_relay::connect_twiml(&relay, &format!("{at}/action"), language)
}

fn twiml(text: String) -> Response<Body> {
    ([(header::CONTENT_TYPE, "text/xml; charset=utf-8")], text).into_response()
}

/// The fields of a form that Twilio signed.
async fn signed_form(app: &App, uri: &Uri, request: Request) -> Result<Vec<(String, String)>, Error> {
    let headers = request.headers().clone();
    let body = read_body(request, &app.config).await?;
    let form: Vec<(String, String)> =
        url::form_urlencoded::parse(&body).map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
    verify(app, uri, false, &form, &headers)?;
    Ok(form)
}

/// Whether Twilio signed this request: HMAC-SHA1 with the account's token of the URL as it was configured there, and of the
/// form's fields, sorted by name.
fn verify(app: &App, uri: &Uri, socket: bool, form: &[(String, String)], headers: &HeaderMap) -> Result<(), Error> {
    let token = &app.config.twilio.auth_token;
    if token.is_empty() {
        return Err(Error::Forbidden("Twilio is not set up here: set twilio.auth_token.".into()));
    }
    let given = headers.get("x-twilio-signature").and_then(|value| value.to_str().ok());
    let given = given.ok_or(Error::Forbidden("The X-Twilio-Signature header is missing.".into()))?;
    let public = if socket { app.public_url().replacen("http", "ws", 1) } else { app.public_url().to_owned() };
    let url = format!("{public}{}", uri.path_and_query().map_or("", |path| path.as_str()));
    let mut found = subtle::Choice::from(0);
    // Whether a port that goes without saying is signed differs.
    for url in [Some(url.clone()), other_port(&url)].into_iter().flatten() {
        found |= given.as_bytes().ct_eq(twilio_signature(token.reveal(), &url, form).as_bytes());
    }
    if bool::from(found) {
        return Ok(());
    }
    tracing::warn!(url, "a request with a wrong X-Twilio-Signature; is server.public_url what Twilio was told?");
    Err(Error::Forbidden("The X-Twilio-Signature does not fit.".into()))
}

fn twilio_signature(token: &str, url: &str, form: &[(String, String)]) -> String {
    let mut fields: Vec<_> = form.iter().collect();
    fields.sort();
    fields.dedup();
    let mut mac = Hmac::<Sha1>::new_from_slice(token.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(url.as_bytes());
    for (name, value) in fields {
        mac.update(name.as_bytes());
        mac.update(value.as_bytes());
    }
    BASE64_STANDARD.encode(mac.finalize().into_bytes())
}

/// The same URL with its usual port written out, or left out.
fn other_port(url: &str) -> Option<String> {
    let parsed = Url::parse(url).ok()?;
    let (scheme, rest) = url.split_once("://")?;
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let usual = match scheme {
        "https" | "wss" => 443,
        _ => 80,
    };
    match parsed.port_or_known_default() {
        Some(port) if port == usual => match host.strip_suffix(&format!(":{usual}")) {
            Some(bare) => Some(format!("{scheme}://{bare}{path}")),
            None => Some(format!("{scheme}://{host}:{usual}{path}")),
        },
        _ => None,
    }
}

// === Retell ===

/// The WebSocket of a call, opened from an address that Retell is known to have.
pub(super) async fn retell(
    state: State<Arc<App>>,
    connecting: Connecting,
    Extension(Peer(peer)): Extension<Peer>,
    path: Names,
    headers: HeaderMap,
    upgrade: Upgrade,
) -> Result<Response<Body>, Error> {
    let [name, call] = names(path)?;
    let config = &state.config;
    let address = client_address(peer.ip(), &headers, &config.server.trusted_proxies);
    if !config.retell.allow_addresses.iter().any(|network| network.contains(&address)) {
        tracing::warn!(%address, "retell is not known to have this address; see retell.allow_addresses");
        return Err(Error::Forbidden("This address may not connect; use the URL with the secret.".into()));
    }
    retell_call(state, connecting, &name, call, upgrade)
}

/// The WebSocket of a call, opened by who knows the secret.
pub(super) async fn retell_secret(
    state: State<Arc<App>>,
    connecting: Connecting,
    path: Names,
    upgrade: Upgrade,
) -> Result<Response<Body>, Error> {
    let [name, secret, call] = names(path)?;
    let own = state.config.retell.secret.reveal();
    if own.is_empty() || !bool::from(own.as_bytes().ct_eq(secret.as_bytes())) {
        return Err(Error::Forbidden("The secret in the path is not the one of retell.secret.".into()));
    }
    retell_call(state, connecting, &name, call, upgrade)
}

fn retell_call(
    State(app): State<Arc<App>>,
    (Extension(request_id), Extension(observed), Extension(place)): Connecting,
    name: &str,
    call: String,
    upgrade: Upgrade,
) -> Result<Response<Body>, Error> {
    let agent = app.agent_of_call("retell", name)?;
    if call.len() > 128 {
        return Err(Error::invalid("call_id", "the call's id may have up to 128 bytes"));
    }
    let upgrade = upgrade.map_err(|e| not_upgraded("…/llm-websocket/{call_id}", &e))?;
    let opening = app.opening(name, agent, "retell", observed, request_id)?;
    Ok(serve(&app, place, upgrade, retell::Connection::new(opening, call), retell::MAX_MESSAGE))
}

/// Who connects, seen through proxies that are trusted: the last address that none of them is.
fn client_address(peer: IpAddr, headers: &HeaderMap, proxies: &[ipnet::IpNet]) -> IpAddr {
    let trusted = |address: &IpAddr| proxies.iter().any(|network| network.contains(address));
    let mut address = peer.to_canonical();
    let forwarded = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
    let forwarded: Vec<&str> = forwarded.flat_map(|list| list.split(',')).map(str::trim).collect();
    for before in forwarded.iter().rev() {
        if !trusted(&address) {
            break;
        }
        let Ok(next) = before.parse::<IpAddr>() else { break };
        address = next.to_canonical();
    }
    address
}

// === results of tools ===

/// Takes the result of a call that its tool could not give at once.
pub(super) async fn tool_output(
    State(app): State<Arc<App>>,
    path: Names,
    request: Request,
) -> Result<Json<Value>, Error> {
    let [session, call] = names(path)?;
    let taken = take_output(&app, &session, &call, request).await;
    if let Err(error) = &taken {
        tracing::warn!(call_id = call, status = error.status(), "a tool's result was not taken");
        metrics::counter!("electron_tool_results_refused_total", "status" => error.status().to_string()).increment(1);
    }
    taken?;
    Ok(Json(json!({"object": "tool_call.output", "session": session, "call_id": call, "accepted": true})))
}

async fn take_output(app: &App, session: &str, call: &str, request: Request) -> Result<(), Error> {
    let key = given_key(request.headers())?;
    let is_json = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().ends_with("json")));
    let unknown = || Error::NotFound("There is no such session. It may have ended.".into());
    // A client secret opens sessions, and its holder answers no calls.
    let (session, token) = match app.auth.find(&key).filter(|caller| caller.secret().is_none()) {
        Some(caller) => (app.sessions.find(session, &caller.owner())?, None),
        None => (app.sessions.find_any(session).ok_or_else(unknown)?, Some(key)),
    };
    let body = read_body(request, &app.config).await?;
    if body.len() > MOST_OUTPUT {
        return Err(Error::BodyTooLarge { limit: MOST_OUTPUT });
    }
    let text = String::from_utf8(body).map_err(|_| Error::invalid("body", "the result is not valid UTF-8"))?;
    let output = if is_json {
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| Error::invalid("body", format!("the result is not valid JSON: {e}")))?;
        value.to_string()
    } else {
        text.trim().to_owned()
    };
    session.settle(call.into(), output, token).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_signed_as_twilio_signs_it() {
        // The example of https://www.twilio.com/docs/usage/security.
        let form = [
            ("CallSid", "CA1234567890ABCDE"),
            ("Caller", "+14158675310"),
            ("Digits", "1234"),
            ("From", "+14158675310"),
            ("To", "+18005551212"),
        ];
        let form: Vec<_> = form.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let url = "https://example.com/myapp.php?foo=1&bar=2";
        assert_eq!(twilio_signature("12345", url, &form), "L/OH5YylLD5NRKLltdqwSvS0BnU=");
    }

    #[test]
    fn a_usual_port_may_be_written_or_not() {
        assert_eq!(other_port("wss://a.example/x?y").as_deref(), Some("wss://a.example:443/x?y"));
        assert_eq!(other_port("https://a.example:443/x").as_deref(), Some("https://a.example/x"));
        assert_eq!(other_port("https://a.example:8443/x"), None);
    }

    #[test]
    fn a_forwarded_address_is_believed_of_a_trusted_proxy_only() {
        let mut headers = HeaderMap::new();
        headers.insert("x-forwarded-for", "6.6.6.6, 100.20.5.228, 10.0.0.2".parse().unwrap());
        let proxies = ["10.0.0.0/8".parse().unwrap()];
        let address = |peer: &str| client_address(peer.parse().unwrap(), &headers, &proxies).to_string();
        assert_eq!(address("10.0.0.1"), "100.20.5.228");
        assert_eq!(address("7.7.7.7"), "7.7.7.7");
    }
}
