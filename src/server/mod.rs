//! The HTTP server: routes, middleware, connections, shutdown.

mod access;
mod agents;
mod auth;
mod health;
mod observe;
mod sessions;
pub mod telemetry;
mod unread;

use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{Path as UrlPath, Request, State, rejection::PathRejection},
    http::{HeaderValue, Method, Response, header},
    middleware,
    response::IntoResponse,
    routing::{get, post},
};
use futures::{FutureExt, StreamExt};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, CorsLayer},
};

pub use self::auth::{hash_key, new_key};
use self::{
    access::{Granted, PathAgent},
    auth::{Auth, Caller},
    observe::{Observed, RequestId},
};
use crate::{
    agent::Agents,
    config::Config,
    dialect::{
        Access,
        chat_completions::{self, Answering},
        socket,
    },
    electron::{Fallback, Remote},
    engine::{RETRY_AFTER, upstream::Upstreams},
    error::Error,
    session::{Limits, Sessions, store::Memory},
    tool::{Control, Tools, guard::Guard},
    turn::{FillerPolicy, Model, Readiness},
};

/// The public contract of all HTTP routes.
const OPENAPI: &str = include_str!("../../proto/openapi.yaml");
/// The public contract of all WebSockets.
const ASYNCAPI: &str = include_str!("../../proto/asyncapi.yaml");

/// What every handler shares.
pub struct App {
    config: Config,
    auth: Auth,
    agents: Arc<Agents>,
    tools: Arc<Tools>,
    public_url: String,
    /// The model in this process, once it is loaded.
    own: Own,
    /// Models on other servers, by name.
    remotes: BTreeMap<String, Arc<Remote>>,
    sessions: Arc<Sessions>,
    limits: Limits,
    /// Cancelled when the server is told to stop.
    stop: CancellationToken,
    /// Open WebSockets.
    sockets: TaskTracker,
    metrics: metrics_exporter_prometheus::PrometheusHandle,
    started: u64,
}

/// A model in this process; other models may answer with it, so they hold it too.
type Own = Arc<OnceLock<Arc<dyn Model>>>;

/// A connection's place among those that the server may have. Whatever the connection becomes holds it.
#[derive(Clone)]
struct Place(#[expect(dead_code, reason = "held, not used")] Arc<OwnedSemaphorePermit>);

/// The other end of a connection.
#[derive(Clone, Copy)]
struct Peer(SocketAddr);

// === impl App ===

impl App {
    /// The state of a server whose model is not loaded yet. Has to be called on a runtime.
    ///
    /// `file` is where the settings come from, whose agents are read again when it changes, `address` where the server
    /// listens, and `extra_key` a key in the clear that is accepted besides the configured ones.
    ///
    /// # Errors
    /// A text for the operator that says what is wrong with the agents or with a model on other servers.
    pub fn new(
        config: Config,
        file: Option<&Path>,
        address: SocketAddr,
        extra_key: Option<&str>,
    ) -> Result<Arc<Self>, String> {
        let auth = Auth::new(&config.keys, extra_key);
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let limits = Limits::new(&config);
        let public_url = match config.server.public_url.as_str() {
            "" => format!("http://{address}"),
            url => url.to_owned(),
        };
        let tools = Tools::new(&config.tools.allow_urls, &config.tools.allow_networks, &public_url)?;
        let agents = Arc::new(load_agents(&config, file, tools.guard().clone())?);
        let store = Arc::new(Memory::new(config.session.max_stored));
        let sessions = Sessions::new(limits, store, tools.clone());
        let own = Own::default();
        let remotes = remotes(&config, &own)?;
        let stop = CancellationToken::new();
        tokio::spawn(agents.clone().watch(stop.clone()));
        Ok(Arc::new(Self {
            config,
            auth,
            agents,
            tools,
            public_url,
            own,
            remotes,
            sessions,
            limits,
            stop,
            sockets: TaskTracker::new(),
            metrics: telemetry::metrics(),
            started,
        }))
    }

    /// Starts to serve the model in this process.
    ///
    /// # Errors
    /// As [`App::check_agents`].
    pub fn serve_model(&self, model: Arc<dyn Model>) -> Result<(), String> {
        let _ = self.own.set(model);
        self.check_agents()
    }

    /// Sees to it that agents, as they are now and as they will be, have tools that the default model can call.
    ///
    /// # Errors
    /// A text for the operator, when an agent's tools cannot be used with it.
    pub fn check_agents(&self) -> Result<(), String> {
        let name = self.config.default_model().to_owned();
        let model = self.any_model(&name).map_err(|e| e.to_string())?;
        self.agents.set_check(Box::new(move |agent| {
            let settings = agent.settings(&name, FillerPolicy::Auto, &Default::default(), &Control::ALL, true);
            let tools = settings.persona.as_ref().map_or(&[][..], |persona| &persona.kit.tools);
            model.check_tools(tools).map_err(|e| e.to_string())
        }))
    }

    /// Whether the model of callers who name none is ready.
    fn readiness(&self) -> Readiness {
        match self.any_model(self.config.default_model()) {
            Ok(model) => model.readiness(),
            Err(e) => Readiness::NotReady(e.to_string()),
        }
    }

    /// The agents that are served.
    pub fn agent_names(&self) -> Vec<Arc<str>> {
        self.agents.names()
    }

    /// What a caller can name as a model: the models, and each as each of the agents.
    fn model_names(&self, caller: &Caller) -> Vec<String> {
        let own = self.config.has_own_model().then_some(&self.config.model.name);
        let models = own.into_iter().chain(self.remotes.keys()).filter(|model| caller.check_model(model).is_ok());
        let agents = self.agents.names();
        models
            .flat_map(|model| {
                std::iter::once(model.clone()).chain(agents.iter().map(move |agent| format!("{model}:{agent}")))
            })
            .collect()
    }

    /// The model of this name, for a caller who may use it.
    fn model(&self, name: &str, caller: &Caller) -> Result<Arc<dyn Model>, Error> {
        let model = self.any_model(name);
        if matches!(model, Err(Error::ModelNotFound(_))) {
            return model;
        }
        caller.check_model(name)?;
        model
    }

    fn any_model(&self, name: &str) -> Result<Arc<dyn Model>, Error> {
        if let Some(remote) = self.remotes.get(name) {
            return Ok(remote.clone());
        }
        if !self.config.has_own_model() || name != self.config.model.name {
            return Err(Error::ModelNotFound(name.to_owned()));
        }
        let own = self.own.get().ok_or_else(|| Error::Overloaded {
            message: "The model is still being loaded. Try again in a moment.".into(),
            retry_after: RETRY_AFTER,
        })?;
        Ok(own.clone())
    }
}

/// The models on other servers, each with what answers in its place.
///
/// # Errors
/// A text for the operator that says which setting is wrong.
fn remotes(config: &Config, own: &Own) -> Result<BTreeMap<String, Arc<Remote>>, String> {
    let mut made = BTreeMap::<String, Arc<Remote>>::new();
    // One that another falls back to comes before it; the settings have been checked for circles.
    while let Some((name, settings)) = config.models.iter().find(|(name, settings)| {
        let other = &settings.fallback;
        !made.contains_key(*name) && (!config.models.contains_key(other) || made.contains_key(other))
    }) {
        let fallback: Option<Fallback> = match made.get(&settings.fallback).cloned() {
            Some(other) => Some(Box::new(move || Some(other.clone()))),
            None if settings.fallback.is_empty() => None,
            None => {
                let own = own.clone();
                Some(Box::new(move || own.get().cloned()))
            }
        };
        made.insert(name.clone(), Arc::new(Remote::new(Upstreams::new(name, settings.clone())?, fallback)));
    }
    Ok(made)
}

/// The agents of the settings and of their folder.
///
/// # Errors
/// A text for the operator with everything that is wrong.
pub fn load_agents(config: &Config, file: Option<&Path>, guard: Arc<Guard>) -> Result<Agents, String> {
    let dir = Some(config.server.agents_dir.as_str()).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let agents = Agents::load(file.map(Path::to_owned), dir, guard)?;
    for agent in agents.names().iter().filter_map(|name| agents.get(name)) {
        let key = &agent.definition.key;
        if !key.is_empty() && !config.keys.iter().any(|known| known.name == *key) {
            return Err(format!("agents.{}.key = {key}: there is no such key among [[keys]]", agent.name));
        }
    }
    Ok(agents)
}

/// All routes with their middleware.
pub fn router(app: Arc<App>) -> Router {
    let mut api = Router::new();
    for prefix in ["/v1", "/waves/v1"] {
        api = api
            .route(&format!("{prefix}/chat/completions"), post(chat_completions))
            .route(&format!("{prefix}/models"), get(models))
            .route(&format!("{prefix}/models/{{id}}"), get(model))
            .route(&format!("{prefix}/responses"), post(sessions::create_response).get(sessions::connect_responses))
            .route(&format!("{prefix}/responses/{{id}}"), get(sessions::response).delete(sessions::delete_response))
            .route(&format!("{prefix}/responses/{{id}}/cancel"), post(sessions::cancel_response))
            .route(&format!("{prefix}/responses/{{id}}/input_items"), get(sessions::input_items));
    }
    // The same for clients that choose an agent by their base URL.
    let of_agent = Router::new()
        .route("/agents/{agent}/v1/chat/completions", post(chat_completions))
        .route("/agents/{agent}/v1/models", get(models))
        .route("/agents/{agent}/v1/responses", post(sessions::create_response).get(sessions::connect_responses))
        .route("/agents/{agent}/v1/realtime", get(sessions::connect_realtime))
        .layer(middleware::from_fn_with_state(app.clone(), path_agent));
    let api = api
        .merge(of_agent)
        .route("/v1/realtime", get(sessions::connect_realtime))
        .route("/v1/realtime/client_secrets", post(sessions::client_secret))
        .route("/v1/sessions", get(sessions::list_sessions))
        .route("/v1/sessions/{id}", get(sessions::session).delete(sessions::delete_session));
    let api = api.layer(middleware::from_fn_with_state(app.clone(), auth::authenticate));
    Router::new()
        .merge(api)
        .route("/v1/sessions/{id}/tool_calls/{call_id}/output", post(agents::tool_output))
        .route("/agents/{agent}/twilio/voice", post(agents::twilio_voice))
        .route("/agents/{agent}/twilio/action", post(agents::twilio_action))
        .route("/agents/{agent}/twilio/relay", get(agents::twilio_relay))
        .route("/agents/{agent}/retell/llm-websocket/{call_id}", get(agents::retell))
        .route("/agents/{agent}/retell/{secret}/llm-websocket/{call_id}", get(agents::retell_secret))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(health::metrics))
        .route("/openapi.yaml", get(|| yaml(OPENAPI)))
        .route("/asyncapi.yaml", get(|| yaml(ASYNCAPI)))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(cors(&app.config.server.cors_origins))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.config.server.read_timeout, unread::drain))
        .layer(middleware::from_fn(observe::observe))
        .with_state(app)
}

async fn chat_completions(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    Extension(observed): Extension<Observed>,
    request: Request,
) -> Result<Response<Body>, Error> {
    let deadline = Instant::now() + app.config.server.request_timeout;
    let agent = request.extensions().get::<PathAgent>().cloned();
    let access = Granted::new(app.clone(), caller.clone(), observed.clone(), request_id.clone());
    let access = access.of("chat_completions", agent);
    let permit = caller.admit()?;
    let body = read_body(request, &app.config).await?;
    let mut request = chat_completions::parse(&body, |model, variables| access.settings(model, variables))?;
    let electron = access.model(&request.model)?;
    observed.asked(&request.model, &request.turn, app.config.log.content);
    let wants_logprobs = request.turn.sampling.logprobs.is_some();
    let events = if request.settings.persona.is_some() {
        // The turn is counted where its rounds are.
        drop(permit);
        chat_completions::agent_turn(&mut request, electron, &access, &app.sessions, app.limits.history).await?
    } else {
        observed.watch(electron.turn(request.turn).await?, Arc::new(permit))
    };
    let answering = Answering {
        events,
        model: request.model,
        stream: request.stream,
        include_usage: request.include_usage,
        wants_logprobs,
        request_id: request_id.0.to_string(),
        deadline,
    };
    chat_completions::answer(answering).await
}

async fn models(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>) -> Json<serde_json::Value> {
    let names = app.model_names(&caller);
    Json(chat_completions::models(names.iter().map(String::as_str), app.started))
}

/// Names the agent of a request by its path.
async fn path_agent(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: middleware::Next,
) -> Result<Response<Body>, Error> {
    let name = request.uri().path().split('/').nth(2).unwrap_or_default();
    let agent = app.agents.get(name).ok_or_else(|| Error::NotFound(format!("There is no agent `{name}`.")))?;
    request.extensions_mut().insert(PathAgent(agent.name.clone()));
    Ok(next.run(request).await)
}

async fn model(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    id: Result<UrlPath<String>, PathRejection>,
) -> Result<Json<serde_json::Value>, Error> {
    let UrlPath(id) = id.map_err(|_| Error::invalid("id", "the model's name is not valid UTF-8"))?;
    if !app.model_names(&caller).contains(&id) {
        return Err(Error::NotFound(format!("The model `{id}` does not exist.")));
    }
    let mut list = chat_completions::models(Some(id.as_str()), app.started);
    Ok(Json(list["data"][0].take()))
}

async fn yaml(text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/yaml")], text)
}

async fn not_found(request: Request) -> Error {
    Error::NotFound(format!("There is no route {}. GET /openapi.yaml lists those that are.", request.uri().path()))
}

async fn method_not_allowed(request: Request) -> Error {
    let (method, path) = (request.method(), request.uri().path());
    Error::MethodNotAllowed(format!("{path} does not take {method}. GET /openapi.yaml says what it takes."))
}

fn panicked(cause: Box<dyn std::any::Any + Send>) -> Response<Body> {
    let text = cause.downcast_ref::<String>().map(String::as_str).or(cause.downcast_ref::<&str>().copied());
    Error::Internal(format!("a handler panicked: {}", text.unwrap_or("no message"))).into_response()
}

fn cors(origins: &[String]) -> CorsLayer {
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // SDKs send headers of their own, by which nothing is decided here.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([observe::HEADER.clone(), header::RETRY_AFTER]);
    if origins.iter().any(|origin| origin == "*") {
        layer.allow_origin(tower_http::cors::Any)
    } else {
        let origins = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
        layer.allow_origin(origins.collect::<Vec<_>>())
    }
}

/// The whole body, within its limit of size and time.
async fn read_body(request: Request, config: &Config) -> Result<Vec<u8>, Error> {
    let limit = usize::try_from(config.server.max_body.as_u64()).unwrap_or(usize::MAX);
    let mut stream = request.into_body().into_data_stream();
    let read = async {
        let mut body = Vec::new();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| Error::invalid("body", "the body broke off"))?;
            if body.len() + chunk.len() > limit {
                return Err(Error::BodyTooLarge { limit });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    };
    tokio::time::timeout(config.server.read_timeout, read)
        .await
        .unwrap_or_else(|_| Err(Error::invalid("body", "the body did not come within the server's read_timeout")))
}

/// Serves connections until `stop` resolves, and then until running answers have ended or the grace is over.
///
/// # Errors
/// When the listener fails for good.
pub async fn serve(app: Arc<App>, listener: TcpListener, stop: impl Future<Output = ()>) -> std::io::Result<()> {
    let server = &app.config.server;
    let (grace, read_timeout, write_timeout) = (server.shutdown_grace, server.read_timeout, server.write_timeout);
    let places = Arc::new(Semaphore::new(server.max_connections));
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(read_timeout);
    http.http2().timer(TokioTimer::new()).keep_alive_interval(Some(Duration::from_secs(30)));
    let router = router(app.clone());
    let graceful = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let place = places.clone().acquire_owned();
        let (place, stream, peer) = tokio::select! {
            () = &mut stop => break,
            accepted = async { (place.await, listener.accept().await) } => match accepted {
                (Ok(place), Ok((stream, peer))) => (place, stream, peer),
                // Out of file descriptors, or the client is gone already: neither ends the server.
                (_, Err(e)) => {
                    tracing::warn!(error = %e, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                (Err(_), _) => break,
            },
        };
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        // A WebSocket has a timeout of its own, and then says why it is closed.
        stream.set_write_timeout(Some(write_timeout + socket::LAST_WORDS));
        let stream = TokioIo::new(Box::pin(stream));
        let place = Place(Arc::new(place));
        let held = place.clone();
        let service = router.clone().map_request(move |mut request: Request<_>| {
            request.extensions_mut().insert(place.clone());
            request.extensions_mut().insert(Peer(peer));
            request
        });
        let service = TowerToHyperService::new(service);
        let connection = http.serve_connection_with_upgrades(stream, service).into_owned();
        // An async block would hold the connection twice: before it awaits it, and then.
        tokio::spawn(graceful.watch(connection).map(move |ended| {
            if let Err(e) = ended {
                tracing::debug!(error = %e, "a connection ended early");
            }
            drop(held);
        }));
    }
    drop(listener);
    app.stop.cancel();
    app.sockets.close();
    if graceful.count() > 0 || !app.sockets.is_empty() {
        let connections = graceful.count() + app.sockets.len();
        tracing::info!(connections, ?grace, "waiting for running answers");
    }
    let ended = async { tokio::join!(graceful.shutdown(), app.sockets.wait()) };
    if tokio::time::timeout(grace, ended).await.is_err() {
        tracing::warn!("the grace is over; running answers are cut off");
    }
    Ok(())
}

/// Opens the port.
///
/// # Errors
/// A text for the operator that says which address and what to do.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("{address} is in use. Stop what listens there, or choose another with --listen.")
        }
        std::io::ErrorKind::PermissionDenied => format!("{address}: no permission; ports below 1024 need privileges."),
        _ => format!("{address}: {e}. Choose another address with --listen."),
    })
}
