//! A tool that is a callback: each call is a signed POST to a URL.
//!
//! The message is one of [Standard Webhooks](https://www.standardwebhooks.com), so that any of its libraries can verify
//! it. The answer is the result, or `202` says that the result comes later, at `output_url`. A later result may also be
//! there before the answer is; the first of the two counts.
//!
//! A call may book a table, so a second attempt is made only where the first cannot have been acted upon, or where the
//! settings say that acting twice is the same as acting once. All attempts share one time and one `webhook-id`.

use std::{
    collections::BTreeMap,
    error::Error,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use hmac::{Hmac, Mac};
use reqwest::{
    Response, StatusCode,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};
use sha2::Sha256;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout_at},
};
use url::Url;

use super::{
    Call, Failure,
    guard::{Guard, is_forbidden},
};
use crate::secret::Secret;

/// Largest result, in bytes. What is larger would fill the model's context.
pub const MOST_OUTPUT: usize = 64 * 1024;

/// Longest `timeout`.
pub const MOST_TIMEOUT: Duration = Duration::from_secs(600);

/// The result of a tool that answers without one.
const DONE: &str = r#"{"status":"done"}"#;

/// What stands before a secret of Standard Webhooks.
const SECRET_PREFIX: &str = "whsec_";

/// Before the second attempt; doubled before each further one.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// Longest that an attempt waits without being told to.
const MOST_WAIT: Duration = Duration::from_secs(2);

/// Headers that belong to the message or to the connection, beside `webhook-…`. Another `host` would lead to another
/// site at the same address.
const RESERVED: [&str; 10] = [
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Where and how a tool is called. Only the operator's may be deserialized: [`Secret`] then reads the environment and
/// files, which a client must not have sent to a URL of its own. What a client gives is put in as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Callback {
    /// Takes the POSTs.
    #[serde(serialize_with = "serialize_url", deserialize_with = "deserialize_url")]
    pub url: Url,
    /// Longest that a call may take, with all its attempts and with waiting for a later result. At most 10 min.
    #[serde(default = "ten_seconds", with = "humantime_serde")]
    pub timeout: Duration,
    /// Signs the messages: `whsec_` and 24 to 64 bytes in base64, or the base64 alone. Without it they are not signed.
    #[serde(default)]
    pub secret: Secret,
    /// Sent along with each message.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// Whether a call may be sent again although it may have been acted upon.
    #[serde(default)]
    pub idempotent: bool,
}

/// What is sent.
#[derive(Serialize)]
struct Message<'a> {
    session: &'a str,
    call_id: &'a str,
    name: &'a str,
    arguments: Value,
    agent: Option<&'a str>,
    caller: &'a Map<String, Value>,
    output_url: &'a str,
    output_token: &'a str,
}

/// What an attempt brought.
enum Answer {
    /// The result.
    Output(String),
    /// The result comes later.
    Later,
}

/// Why an attempt brought nothing.
struct Problem {
    failure: Failure,
    again: Again,
    status: Option<StatusCode>,
    /// For the log.
    detail: String,
    /// How long the tool asked to be left alone.
    after: Option<Duration>,
}

/// Whether what failed may be sent again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    Never,
    /// It may have been acted upon.
    IfIdempotent,
    /// It cannot have been acted upon.
    Always,
}

/// The key in a secret of Standard Webhooks.
///
/// # Errors
/// A text for the operator, without the secret: it is not base64, or not of 24 to 64 bytes.
pub fn key(secret: &Secret) -> Result<Vec<u8>, String> {
    let text = secret.reveal();
    let key = STANDARD
        .decode(text.strip_prefix(SECRET_PREFIX).unwrap_or(text))
        .map_err(|_| format!("the secret must be {SECRET_PREFIX} and base64"))?;
    if !(24..=64).contains(&key.len()) {
        return Err(format!("the secret must have 24 to 64 bytes, not {}", key.len()));
    }
    Ok(key)
}

/// The `webhook-signature` of a message after Standard Webhooks, `v1,…`. Takes the [`key`], the message's id, the time
/// of the attempt in seconds since 1970, and the body as it is sent.
pub fn sign(key: &[u8], id: &str, timestamp: u64, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

// === impl Callback ===

impl Callback {
    /// Whether calls can be made with these settings.
    ///
    /// # Errors
    /// A text for the operator with what is wrong, without secrets.
    pub fn check(&self, guard: &Guard) -> Result<(), String> {
        guard.check(&self.url)?;
        if self.timeout.is_zero() || self.timeout > MOST_TIMEOUT {
            return Err("the timeout must be more than 0 up to 10 min".to_owned());
        }
        if !self.secret.is_empty() {
            key(&self.secret)?;
        }
        self.own_headers().map(drop)
    }

    /// Runs a call: sends it until it is answered, and waits for its result.
    ///
    /// `client` is that of [`Guard::client`]. `late` is a result that is sent to `output_url`; it counts at any time,
    /// and without a sender it is not waited for. To drop the future ends the request.
    ///
    /// # Errors
    /// A failure for the model: the tool could not be reached, answered with something else than a result, or took
    /// longer than [`Self::timeout`].
    pub async fn run(
        &self,
        guard: &Guard,
        client: &reqwest::Client,
        call: &Call,
        mut late: oneshot::Receiver<String>,
    ) -> Result<String, Failure> {
        let deadline = Instant::now() + self.timeout.min(MOST_TIMEOUT);
        let body = message(call);
        let mut backoff = FIRST_WAIT;
        loop {
            let attempt = timeout_at(deadline, self.attempt(guard, client, call, body.clone()));
            let answer = tokio::select! {
                biased;
                Ok(output) = &mut late, if !late.is_terminated() => Ok(Answer::Output(output)),
                answer = attempt => answer.unwrap_or_else(|_| Err(self.timed_out())),
            };
            let result = answer.as_ref().map_or_else(|problem| problem.failure.kind, |_| "ok");
            metrics::counter!("electron_tool_attempts_total", "result" => result).increment(1);
            let problem = match answer {
                Ok(Answer::Output(output)) => return Ok(output),
                Ok(Answer::Later) => return self.wait(call, late, deadline).await,
                Err(problem) => problem,
            };
            problem.log(call);
            let wait = backoff.mul_f64(rand::random_range(0.5..1.0)).max(problem.after.unwrap_or_default());
            let again = match problem.again {
                Again::Never => false,
                Again::IfIdempotent => self.idempotent,
                Again::Always => true,
            };
            // Nobody is kept waiting for an attempt that could not be made any more.
            if !again || wait >= deadline.saturating_duration_since(Instant::now()) {
                return Err(problem.failure);
            }
            tokio::select! {
                biased;
                Ok(output) = &mut late, if !late.is_terminated() => return Ok(output),
                () = sleep(wait) => {}
            }
            backoff = MOST_WAIT.min(backoff * 2);
        }
    }

    /// Sends a message once.
    async fn attempt(
        &self,
        guard: &Guard,
        client: &reqwest::Client,
        call: &Call,
        body: Bytes,
    ) -> Result<Answer, Problem> {
        guard.check(&self.url).map_err(forbidden)?;
        let headers = self
            .headers(call, &body)
            .map_err(|e| Problem::new("protocol", "The tool is not set up correctly.".to_owned(), Again::Never, e))?;
        let request = client.post(self.url.clone()).headers(headers).body(body);
        let response = request.send().await.map_err(not_sent)?;
        let status = response.status();
        match status {
            StatusCode::OK | StatusCode::CREATED | StatusCode::NON_AUTHORITATIVE_INFORMATION => {
                let json = is_json(response.headers());
                let body = read(response).await.map_err(|problem| problem.with(status))?;
                output(&body, json).map(Answer::Output).map_err(|problem| problem.with(status))
            }
            StatusCode::NO_CONTENT => Ok(Answer::Output(DONE.to_owned())),
            StatusCode::ACCEPTED => Ok(Answer::Later),
            _ => Err(refused(status, response.headers())),
        }
    }

    /// Waits for a result that the tool has promised.
    async fn wait(&self, call: &Call, late: oneshot::Receiver<String>, deadline: Instant) -> Result<String, Failure> {
        let cancelled = || {
            let told = "The call was given up before the tool had answered.".to_owned();
            Problem::new("cancelled", told, Again::Never, "nobody takes the late result any more".to_owned())
        };
        let output = if late.is_terminated() {
            Err(cancelled())
        } else {
            match timeout_at(deadline, late).await {
                Ok(Ok(output)) => Ok(output),
                Ok(Err(_)) => Err(cancelled()),
                Err(_) => Err(self.timed_out()),
            }
        };
        output.map_err(|problem| {
            problem.log(call);
            problem.failure
        })
    }

    fn headers(&self, call: &Call, body: &[u8]) -> Result<HeaderMap, String> {
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("electron-gateway/", env!("CARGO_PKG_VERSION"))));
        headers.extend(self.own_headers()?);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let id = HeaderValue::from_str(&call.call_id).map_err(|_| "the call's id is no value of a header")?;
        headers.insert("webhook-id", id);
        headers.insert("webhook-timestamp", timestamp.into());
        if !self.secret.is_empty() {
            let signature = sign(&key(&self.secret)?, &call.call_id, timestamp, body);
            let signature = HeaderValue::try_from(signature).expect("base64 is a value of a header");
            headers.insert("webhook-signature", signature);
        }
        Ok(headers)
    }

    /// The headers of the settings.
    fn own_headers(&self) -> Result<HeaderMap, String> {
        let mut headers = HeaderMap::new();
        for (text, value) in &self.headers {
            let name =
                HeaderName::from_bytes(text.as_bytes()).map_err(|_| format!("{text:?} is no name of a header"))?;
            if RESERVED.contains(&name.as_str()) || name.as_str().starts_with("webhook-") {
                return Err(format!("the header {name} is the gateway's own"));
            }
            let mut value =
                HeaderValue::from_str(value.reveal()).map_err(|_| format!("the header {name} has no valid value"))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(headers)
    }

    fn timed_out(&self) -> Problem {
        let told = format!("The tool did not answer within {} s.", self.timeout.as_secs_f64());
        Problem::new("timeout", told, Again::Never, "timed out".to_owned())
    }
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn serialize_url<S: Serializer>(url: &Url, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(url.as_str())
}

fn deserialize_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Url, D::Error> {
    let text = String::deserialize(deserializer)?;
    Url::parse(&text).map_err(|e| de::Error::custom(format_args!("{text:?} is no URL: {e}")))
}

/// The body. It is made once, so that all attempts have the same.
fn message(call: &Call) -> Bytes {
    let message = Message {
        session: &call.session,
        call_id: &call.call_id,
        name: &call.name,
        arguments: serde_json::from_str(&call.arguments).unwrap_or_else(|_| Value::from(call.arguments.as_str())),
        agent: call.agent.as_deref(),
        caller: &call.caller,
        output_url: &call.output_url,
        output_token: &call.output_token,
    };
    serde_json::to_vec(&message).expect("texts and JSON values become JSON").into()
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    matches!(essence.as_str(), "application/json" | "text/json") || essence.ends_with("+json")
}

/// Reads a body, and not further than to where it is too large.
async fn read(mut response: Response) -> Result<Vec<u8>, Problem> {
    let too_large = || {
        let told = "The tool's answer is too large.".to_owned();
        Problem::new("too_large", told, Again::Never, format!("the body has more than {MOST_OUTPUT} bytes"))
    };
    if response.content_length().is_some_and(|length| length > MOST_OUTPUT as u64) {
        return Err(too_large());
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(broken)? {
        if body.len() + chunk.len() > MOST_OUTPUT {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The result in a body.
fn output(body: &[u8], json: bool) -> Result<String, Problem> {
    let invalid = |told: &str, detail| Problem::new("invalid", told.to_owned(), Again::Never, detail);
    let text = std::str::from_utf8(body)
        .map_err(|e| invalid("The tool answered with something that is not text.", e.to_string()))?
        .trim();
    if text.is_empty() {
        return Ok(DONE.to_owned());
    }
    if !json {
        return Ok(text.to_owned());
    }
    let value: Value = serde_json::from_str(text)
        .map_err(|e| invalid("The tool answered with JSON that is not valid.", e.to_string()))?;
    Ok(value.to_string())
}

// === impl Problem ===

impl Problem {
    fn new(kind: &'static str, told: String, again: Again, detail: String) -> Self {
        Self { failure: Failure { kind, told }, again, status: None, detail, after: None }
    }

    fn with(self, status: StatusCode) -> Self {
        Self { status: Some(status), ..self }
    }

    fn log(&self, call: &Call) {
        tracing::warn!(
            call_id = %call.call_id,
            tool = %call.name,
            kind = self.failure.kind,
            status = self.status.map(|status| status.as_u16()),
            error = %self.detail,
            "an attempt to call a tool failed"
        );
    }
}

fn forbidden(detail: String) -> Problem {
    Problem::new("forbidden", "The tool's address is not allowed.".to_owned(), Again::Never, detail)
}

/// A request without an answer.
fn not_sent(error: reqwest::Error) -> Problem {
    if is_forbidden(&error) {
        forbidden(chain(error))
    } else if error.is_connect() {
        Problem::new("refused", "The tool could not be reached.".to_owned(), Again::Always, chain(error))
    } else if error.is_builder() {
        Problem::new("protocol", "The tool is not set up correctly.".to_owned(), Again::Never, chain(error))
    } else {
        broken(error)
    }
}

/// A connection that ended before its answer did.
fn broken(error: reqwest::Error) -> Problem {
    let told = "The connection to the tool broke off.".to_owned();
    Problem::new("protocol", told, Again::IfIdempotent, chain(error))
}

/// An answer that is no result.
fn refused(status: StatusCode, headers: &HeaderMap) -> Problem {
    let again = match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Again::Always,
        StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => Again::IfIdempotent,
        _ => Again::Never,
    };
    let told = if status.is_redirection() {
        "The tool answered with a redirect, which is not followed.".to_owned()
    } else if again == Again::Always {
        "The tool is too busy.".to_owned()
    } else {
        format!("The tool answered with an error, status {}.", status.as_u16())
    };
    let after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let detail = status.canonical_reason().unwrap_or("unknown status").to_owned();
    Problem { after: after.map(Duration::from_secs), ..Problem::new("status", told, again, detail).with(status) }
}

/// An error with its causes, without the URL, which may hold a secret.
fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        net::IpAddr,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use futures::future::BoxFuture;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        sync::mpsc,
    };

    use super::*;
    use crate::tool::guard::Lookup;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    /// What the tool does with a request.
    enum Reply {
        /// Answers with this and closes.
        Send(String),
        /// Closes without an answer.
        Close,
        /// Sends this and then nothing, until the gateway closes.
        Stall(&'static str),
        /// Sends this and then text, until the gateway closes.
        Flood(&'static str),
    }

    /// A request as the tool got it.
    struct Request {
        head: String,
        body: String,
    }

    /// A tool on a real socket, which answers each connection with the next reply.
    struct Bot {
        port: u16,
        requests: mpsc::Receiver<Request>,
        /// Told when the gateway closes a connection that stalls or floods.
        left: mpsc::Receiver<()>,
    }

    impl Request {
        fn header(&self, name: &str) -> Option<&str> {
            self.head.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then_some(value.trim())
            })
        }
    }

    impl Bot {
        async fn start(replies: Vec<Reply>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let (heard, requests) = mpsc::channel(16);
            let (leave, left) = mpsc::channel(16);
            tokio::spawn(async move {
                let mut replies = replies.into_iter();
                while let Ok((mut stream, _)) = listener.accept().await {
                    // Without a whole request the gateway has left.
                    let Some(request) = receive(&mut stream).await else { continue };
                    heard.send(request).await.unwrap();
                    match replies.next().unwrap_or(Reply::Close) {
                        Reply::Close => {}
                        // The gateway may leave in the middle of any answer.
                        Reply::Send(text) => drop(stream.write_all(text.as_bytes()).await),
                        Reply::Stall(text) => {
                            drop(stream.write_all(text.as_bytes()).await);
                            while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
                            leave.send(()).await.unwrap();
                        }
                        Reply::Flood(text) => {
                            drop(stream.write_all(text.as_bytes()).await);
                            while stream.write_all(&[b'a'; 4096]).await.is_ok() {}
                            leave.send(()).await.unwrap();
                        }
                    }
                }
            });
            Self { port, requests, left }
        }

        fn callback(&self) -> Callback {
            callback(&format!("http://127.0.0.1:{}/tools/book", self.port))
        }

        /// The requests so far. Nothing is under way when a call has ended.
        fn requests(&mut self) -> Vec<Request> {
            std::iter::from_fn(|| self.requests.try_recv().ok()).collect()
        }
    }

    async fn receive(stream: &mut TcpStream) -> Option<Request> {
        let mut bytes = Vec::new();
        loop {
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
            let text = String::from_utf8(bytes.clone()).unwrap();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let request = Request { head: head.to_owned(), body: body.to_owned() };
            if request.header("content-length").unwrap().parse::<usize>().unwrap() == body.len() {
                return Some(request);
            }
        }
    }

    fn send(status: &str, headers: &str, body: &str) -> Reply {
        Reply::Send(format!(
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        ))
    }

    fn json(body: &str) -> Reply {
        send("200 OK", "Content-Type: application/json; charset=utf-8\r\n", body)
    }

    fn text(body: &str) -> Reply {
        send("200 OK", "Content-Type: text/plain\r\n", body)
    }

    fn callback(url: &str) -> Callback {
        toml::from_str(&format!("url = {url:?}\nsecret = {SECRET:?}")).unwrap()
    }

    fn short(callback: Callback) -> Callback {
        Callback { timeout: Duration::from_millis(300), ..callback }
    }

    fn guard(networks: &[&str]) -> Arc<Guard> {
        let networks: Vec<_> = networks.iter().map(|text| text.parse().unwrap()).collect();
        Arc::new(Guard::new(&[], &networks).unwrap())
    }

    fn call() -> Call {
        let caller = serde_json::json!({"caller": "+4930123456", "called": "+4930654321"});
        Call {
            session: "sess_1".into(),
            call_id: "call_1".into(),
            name: "book".to_owned(),
            arguments: r#"{"seats": 4, "at": "19:30"}"#.to_owned(),
            agent: Some("host".into()),
            caller: Arc::new(caller.as_object().unwrap().clone()),
            output_url: "https://gateway.test/calls/call_1/output".to_owned(),
            output_token: "token".to_owned(),
        }
    }

    async fn run_late(callback: &Callback, late: oneshot::Receiver<String>) -> Result<String, Failure> {
        let guard = guard(&["127.0.0.0/8"]);
        let client = guard.client().unwrap();
        callback.run(&guard, &client, &call(), late).await
    }

    /// Runs a call whose late result nobody sends, and that can still be sent.
    async fn run(callback: &Callback) -> Result<String, Failure> {
        let (_sender, late) = oneshot::channel();
        run_late(callback, late).await
    }

    fn kind(result: Result<String, Failure>) -> &'static str {
        result.unwrap_err().kind
    }

    #[test]
    fn a_signature_is_that_of_the_published_example() {
        let key = key(&Secret::resolve(SECRET).unwrap()).unwrap();
        let signature = sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn settings_have_defaults_and_refuse_what_they_do_not_know() {
        let read: Callback = toml::from_str(r#"url = "https://bot.example.com/tools""#).unwrap();
        assert_eq!(
            read,
            Callback {
                url: Url::parse("https://bot.example.com/tools").unwrap(),
                timeout: Duration::from_secs(10),
                secret: Secret::default(),
                headers: BTreeMap::new(),
                idempotent: false,
            }
        );
        for text in [
            r#"url = "tools""#,
            "timeout = \"1s\"",
            "url = \"https://bot.example.com/\"\nretries = 1",
            "url = \"https://bot.example.com/\"\ntimeout = 5",
        ] {
            assert!(toml::from_str::<Callback>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn settings_are_shown_without_secrets() {
        let settings = format!(
            "url = \"https://bot.example.com/\"\nsecret = {SECRET:?}\ntimeout = \"1m\"\nheaders = {{ x-key = \"abc\" }}"
        );
        let callback: Callback = toml::from_str(&settings).unwrap();
        for shown in [toml::to_string(&callback).unwrap(), format!("{callback:?}")] {
            assert!(!shown.contains("MfKQ") && !shown.contains("abc"), "{shown}");
        }
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let guard = guard(&[]);
        let fine = callback("https://bot.example.com/");
        let bare = Secret::resolve(SECRET.strip_prefix("whsec_").unwrap()).unwrap();
        let header = |name: &str, value: &str| {
            let headers = [(name.to_owned(), Secret::resolve(value).unwrap())].into();
            Callback { headers, ..fine.clone() }
        };
        let secret = |text: &str| Callback { secret: Secret::resolve(text).unwrap(), ..fine.clone() };
        for callback in [
            fine.clone(),
            Callback { secret: Secret::default(), ..fine.clone() },
            Callback { secret: bare, ..fine.clone() },
            Callback { timeout: MOST_TIMEOUT, ..fine.clone() },
            header("Authorization", "Bearer abc"),
        ] {
            assert_eq!(callback.check(&guard), Ok(()), "{callback:?}");
        }
        for callback in [
            callback("http://127.0.0.1/"),
            callback("ftp://bot.example.com/"),
            Callback { timeout: Duration::ZERO, ..fine.clone() },
            Callback { timeout: MOST_TIMEOUT + Duration::from_secs(1), ..fine.clone() },
            secret("hunter2!"),
            secret("whsec_c2hvcnQ="),
            secret(&format!("whsec_{}", STANDARD.encode([7; 65]))),
            header("X Key", "hunter2"),
            header("X-Key", "hunter2\r\nX-Other: a"),
            header("Host", "hunter2.example.com"),
            header("Webhook-Id", "hunter2"),
        ] {
            let error = callback.check(&guard).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_call_is_a_signed_message() {
        let mut bot = Bot::start(vec![json("{}")]).await;
        let mut callback = bot.callback();
        callback.headers.insert("X-Key".to_owned(), Secret::resolve("abc").unwrap());
        run(&callback).await.unwrap();
        let [request] = &bot.requests()[..] else { panic!("not one request") };
        assert_eq!(request.head.lines().next(), Some("POST /tools/book HTTP/1.1"));
        assert_eq!(request.header("content-type"), Some("application/json"));
        assert_eq!(request.header("user-agent"), Some(concat!("electron-gateway/", env!("CARGO_PKG_VERSION"))));
        assert_eq!(request.header("x-key"), Some("abc"));
        assert_eq!(request.header("webhook-id"), Some("call_1"));
        assert_eq!(
            request.body,
            concat!(
                r#"{"session":"sess_1","call_id":"call_1","name":"book","arguments":{"seats":4,"at":"19:30"},"#,
                r#""agent":"host","caller":{"caller":"+4930123456","called":"+4930654321"},"#,
                r#""output_url":"https://gateway.test/calls/call_1/output","output_token":"token"}"#
            )
        );
        let timestamp = request.header("webhook-timestamp").unwrap().parse().unwrap();
        let key = key(&callback.secret).unwrap();
        let signature = sign(&key, "call_1", timestamp, request.body.as_bytes());
        assert_eq!(request.header("webhook-signature"), Some(signature.as_str()));
    }

    #[tokio::test]
    async fn without_a_secret_a_message_has_no_signature() {
        let mut bot = Bot::start(vec![json("{}")]).await;
        run(&Callback { secret: Secret::default(), ..bot.callback() }).await.unwrap();
        assert_eq!(bot.requests()[0].header("webhook-signature"), None);
    }

    #[test]
    fn arguments_that_are_not_json_are_sent_as_text() {
        let body = message(&Call { arguments: "{".to_owned(), agent: None, ..call() });
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["arguments"], "{");
        assert_eq!(body["agent"], Value::Null);
    }

    #[tokio::test]
    async fn an_answer_is_the_result() {
        for (reply, result) in [
            (json("{ \"z\": 1,\n  \"a\": [ 2 ] }"), r#"{"z":1,"a":[2]}"#),
            (json(" \"booked\" "), r#""booked""#),
            (send("201 Created", "Content-Type: application/problem+json\r\n", "[ ]"), "[]"),
            (send("203 Non-Authoritative Information", "", "booked"), "booked"),
            (text(" Table 4 is booked.\n"), "Table 4 is booked."),
            (text("{ \"a\": 1 }"), "{ \"a\": 1 }"),
            (text(&"a".repeat(MOST_OUTPUT)), &"a".repeat(MOST_OUTPUT)),
            (text(""), DONE),
            (json("\n"), DONE),
            (Reply::Send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n".to_owned()), DONE),
            (
                Reply::Send(
                    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nboo\r\n3\r\nked\r\n0\r\n\r\n".into(),
                ),
                "booked",
            ),
        ] {
            let bot = Bot::start(vec![reply]).await;
            assert_eq!(run(&bot.callback()).await.as_deref(), Ok(result));
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_no_result_fails_at_once() {
        for (reply, expected) in [
            (json("{\"a\": "), "invalid"),
            (json("<html>"), "invalid"),
            (text(&"a".repeat(MOST_OUTPUT + 1)), "too_large"),
            (send("500 Internal Server Error", "", "at line 12 of secrets.py"), "status"),
            (send("404 Not Found", "", ""), "status"),
            (send("401 Unauthorized", "", ""), "status"),
            (send("206 Partial Content", "", "a"), "status"),
            (Reply::Send("nonsense\r\n\r\n".to_owned()), "protocol"),
        ] {
            let mut bot = Bot::start(vec![reply, text("twice")]).await;
            let failure = run(&bot.callback()).await.unwrap_err();
            assert_eq!(failure.kind, expected, "{failure}");
            assert!(!failure.told.contains("127.0.0.1") && !failure.told.contains("secrets.py"), "{failure}");
            assert_eq!(bot.requests().len(), 1);
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_not_text_is_invalid() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let callback = callback(&format!("http://{}/", listener.local_addr().unwrap()));
        let (result, ()) = tokio::join!(run(&callback), async {
            let (mut stream, _) = listener.accept().await.unwrap();
            receive(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe").await.unwrap();
        });
        assert_eq!(kind(result), "invalid");
    }

    #[tokio::test]
    async fn a_body_is_not_read_beyond_its_limit() {
        for head in [
            "HTTP/1.1 200 OK\r\nContent-Length: 10485760\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 10485760\r\nContent-Type: application/json\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
        ] {
            let mut bot = Bot::start(vec![Reply::Flood(head)]).await;
            assert_eq!(kind(run(&Callback { idempotent: true, ..bot.callback() }).await), "too_large");
            bot.left.recv().await.unwrap();
            assert_eq!(bot.requests().len(), 1);
        }
    }

    #[tokio::test]
    async fn a_tool_that_stalls_runs_into_the_timeout() {
        for text in ["", "HTTP/1.1 200 OK\r\nCont", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nboo"] {
            let bot = Bot::start(vec![Reply::Stall(text)]).await;
            let failure = run(&short(bot.callback())).await.unwrap_err();
            let told = "The tool did not answer within 0.3 s.".to_owned();
            assert_eq!(failure, Failure { kind: "timeout", told });
        }
    }

    #[tokio::test]
    async fn a_call_that_is_dropped_ends_its_request() {
        let mut bot = Bot::start(vec![Reply::Stall("")]).await;
        let callback = bot.callback();
        tokio::select! {
            _ = run(&callback) => panic!("the tool has not answered"),
            request = bot.requests.recv() => assert!(request.is_some()),
        }
        bot.left.recv().await.unwrap();
    }

    #[tokio::test]
    async fn a_late_result_is_waited_for_after_202() {
        let mut bot = Bot::start(vec![send("202 Accepted", "", "on it")]).await;
        let (sender, late) = oneshot::channel();
        let callback = bot.callback();
        let (result, ()) = tokio::join!(run_late(&callback, late), async {
            bot.requests.recv().await.unwrap();
            sender.send("late".to_owned()).unwrap();
        });
        assert_eq!(result.as_deref(), Ok("late"));
    }

    #[tokio::test]
    async fn a_late_result_that_never_comes_is_a_timeout() {
        let bot = Bot::start(vec![send("202 Accepted", "", "")]).await;
        assert_eq!(kind(run(&short(bot.callback())).await), "timeout");
    }

    #[tokio::test]
    async fn a_late_result_counts_before_the_answer() {
        let mut bot = Bot::start(vec![Reply::Stall("")]).await;
        let (sender, late) = oneshot::channel();
        let callback = bot.callback();
        let (result, ()) = tokio::join!(run_late(&callback, late), async {
            bot.requests.recv().await.unwrap();
            sender.send("late".to_owned()).unwrap();
        });
        assert_eq!(result.as_deref(), Ok("late"));
        bot.left.recv().await.unwrap();
    }

    #[tokio::test]
    async fn a_late_result_counts_between_attempts() {
        let mut bot = Bot::start(vec![send("503 Service Unavailable", "Retry-After: 5\r\n", "")]).await;
        let (sender, late) = oneshot::channel();
        let callback = bot.callback();
        let (result, ()) = tokio::join!(run_late(&callback, late), async {
            bot.requests.recv().await.unwrap();
            sender.send("late".to_owned()).unwrap();
        });
        assert_eq!(result.as_deref(), Ok("late"));
        assert!(bot.requests().is_empty());
    }

    #[tokio::test]
    async fn without_a_sender_for_a_late_result_the_answer_counts() {
        let mut bot = Bot::start(vec![send("503 Service Unavailable", "", ""), text("booked")]).await;
        let (sender, late) = oneshot::channel();
        drop(sender);
        assert_eq!(run_late(&bot.callback(), late).await.as_deref(), Ok("booked"));
        assert_eq!(bot.requests().len(), 2);
    }

    #[tokio::test]
    async fn without_a_sender_for_a_late_result_202_is_a_failure() {
        let bot = Bot::start(vec![send("202 Accepted", "", "")]).await;
        let (sender, late) = oneshot::channel();
        drop(sender);
        assert_eq!(kind(run_late(&bot.callback(), late).await), "cancelled");
    }

    #[tokio::test]
    async fn a_busy_tool_is_called_again_with_the_same_message() {
        for status in ["503 Service Unavailable", "429 Too Many Requests"] {
            let mut bot = Bot::start(vec![send(status, "Retry-After: 0\r\n", ""), text("booked")]).await;
            assert_eq!(run(&bot.callback()).await.as_deref(), Ok("booked"));
            let [first, second] = &bot.requests()[..] else { panic!("not two requests") };
            assert_eq!(first.body, second.body);
            assert_eq!(first.header("webhook-id"), Some("call_1"));
            assert_eq!(second.header("webhook-id"), Some("call_1"));
        }
    }

    #[tokio::test]
    async fn a_tool_that_stays_busy_fails_in_time() {
        let busy = || send("503 Service Unavailable", "", "");
        let bot = Bot::start((0..8).map(|_| busy()).collect()).await;
        let failure = run(&short(bot.callback())).await.unwrap_err();
        assert!(matches!(failure.kind, "status" | "timeout"), "{failure:?}");
    }

    #[tokio::test]
    async fn a_tool_that_is_busy_for_too_long_fails_at_once() {
        let reply = send("503 Service Unavailable", "Retry-After: 3600\r\n", "");
        let mut bot = Bot::start(vec![reply, text("booked")]).await;
        let failure = run(&bot.callback()).await.unwrap_err();
        assert_eq!(failure, Failure { kind: "status", told: "The tool is too busy.".to_owned() });
        assert_eq!(bot.requests().len(), 1);
    }

    #[tokio::test]
    async fn what_may_have_been_acted_upon_is_sent_again_only_if_idempotent() {
        type Make = fn() -> Reply;
        let replies: [(Make, &str); 4] = [
            (|| send("502 Bad Gateway", "", ""), "status"),
            (|| send("504 Gateway Timeout", "", ""), "status"),
            (|| Reply::Close, "protocol"),
            (|| Reply::Send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nboo".to_owned()), "protocol"),
        ];
        for (reply, expected) in replies {
            let mut bot = Bot::start(vec![reply(), text("booked")]).await;
            assert_eq!(kind(run(&bot.callback()).await), expected);
            assert_eq!(bot.requests().len(), 1);

            let mut bot = Bot::start(vec![reply(), text("booked")]).await;
            let result = run(&Callback { idempotent: true, ..bot.callback() }).await;
            assert_eq!(result.as_deref(), Ok("booked"));
            assert_eq!(bot.requests().len(), 2);
        }
    }

    #[tokio::test]
    async fn a_refused_connection_fails_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let callback = short(callback(&format!("http://{}/", listener.local_addr().unwrap())));
        drop(listener);
        let failure = run(&callback).await.unwrap_err();
        assert!(matches!(failure.kind, "refused" | "timeout"), "{failure:?}");
    }

    /// Leads to an address where nobody listens, and then to 127.0.0.1.
    struct SecondTime(AtomicUsize);

    impl Lookup for SecondTime {
        fn lookup(&self, _: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
            let last = if self.0.fetch_add(1, Ordering::Relaxed) == 0 { 9 } else { 1 };
            Box::pin(async move { Ok(vec![IpAddr::from([127, 0, 0, last])]) })
        }
    }

    #[tokio::test]
    async fn a_connection_that_was_never_made_is_tried_again() {
        let mut bot = Bot::start(vec![text("booked")]).await;
        let lookup = Arc::new(SecondTime(AtomicUsize::new(0)));
        let networks = ["127.0.0.0/8".parse().unwrap()];
        let guard = Arc::new(Guard::with_lookup(&[], &networks, Arc::clone(&lookup) as Arc<dyn Lookup>).unwrap());
        let client = guard.client().unwrap();
        let callback = callback(&format!("http://bot.test:{}/", bot.port));
        let (_sender, late) = oneshot::channel();
        assert_eq!(callback.run(&guard, &client, &call(), late).await.as_deref(), Ok("booked"));
        assert_eq!(lookup.0.load(Ordering::Relaxed), 2);
        assert_eq!(bot.requests().len(), 1);
    }

    #[tokio::test]
    async fn a_redirect_is_not_followed() {
        for status in ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"] {
            for location in ["http://169.254.169.254/", "/elsewhere"] {
                let reply = send(status, &format!("Location: {location}\r\n"), "");
                let mut bot = Bot::start(vec![reply, text("followed")]).await;
                let failure = run(&Callback { idempotent: true, ..bot.callback() }).await.unwrap_err();
                let told = "The tool answered with a redirect, which is not followed.".to_owned();
                assert_eq!(failure, Failure { kind: "status", told });
                assert_eq!(bot.requests().len(), 1);
            }
        }
    }

    #[tokio::test]
    async fn a_forbidden_address_is_not_connected_to() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let guard = guard(&[]);
        let client = guard.client().unwrap();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let callback = Callback { idempotent: true, ..callback(&format!("http://{host}:{port}/")) };
            let (_sender, late) = oneshot::channel();
            let failure = callback.run(&guard, &client, &call(), late).await.unwrap_err();
            let told = "The tool's address is not allowed.".to_owned();
            assert_eq!(failure, Failure { kind: "forbidden", told });
        }
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
