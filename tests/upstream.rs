//! Models on other servers: scripted ones that fail in every way that servers do, and this gateway as its own upstream.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use common::{KEY, PLAIN, SERVER, VOICE, find_order, key, request, run, tool};
use electron_gateway::{
    config::{Config, Upstream},
    server::{self, App},
};
use futures::{StreamExt, stream};
use rand::Rng;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

// === A server that does what it is told ===

/// A step of what a scripted server does with a request.
#[derive(Clone)]
enum Act {
    Say(String),
    Wait(Duration),
    /// Ends the connection with a reset in place of a proper end.
    Reset,
    /// Notes when the other side leaves.
    Watch,
}

type Script = Arc<dyn Fn(usize, &Value) -> Vec<Act> + Send + Sync>;

/// Answers each request by a script that gets its number and its body.
struct Scripted {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Value>>>,
    /// How many clients left while they were watched.
    left: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Scripted {
    async fn start(script: impl Fn(usize, &Value) -> Vec<Act> + Send + Sync + 'static) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), Arc::new(script)).await
    }

    async fn start_at(address: SocketAddr, script: Script) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        let listener = socket.listen(1024).unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, left) = (Arc::<Mutex<Vec<Value>>>::default(), Arc::<AtomicUsize>::default());
        let (asked_too, left_too) = (asked.clone(), left.clone());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, script.clone(), asked_too.clone(), left_too.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, asked, left, task }
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    fn requests(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, script: Script, asked: Arc<Mutex<Vec<Value>>>, left: Arc<AtomicUsize>) {
    let _ = stream.set_nodelay(true);
    let mut buffer = Vec::new();
    loop {
        let head = loop {
            if let Some(end) = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break end + 4;
            }
            let mut piece = [0; 4096];
            match stream.read(&mut piece).await {
                Ok(0) | Err(_) => return,
                Ok(read) => buffer.extend_from_slice(&piece[..read]),
            }
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_lowercase();
        let length: usize =
            text.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok()).unwrap_or(0);
        while buffer.len() < head + length {
            let mut piece = [0; 4096];
            match stream.read(&mut piece).await {
                Ok(0) | Err(_) => return,
                Ok(read) => buffer.extend_from_slice(&piece[..read]),
            }
        }
        if text.starts_with("get ") {
            buffer.drain(..head + length);
            let body = r#"{"object":"list","data":[]}"#;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
            continue;
        }
        let body: Value = serde_json::from_slice(&buffer[head..head + length]).unwrap();
        buffer.drain(..head + length);
        let number = {
            let mut asked = asked.lock().unwrap();
            asked.push(body.clone());
            asked.len() - 1
        };
        let mut keeps = false;
        for act in script(number, &body) {
            match act {
                Act::Say(text) => {
                    keeps |= text.ends_with("0\r\n\r\n");
                    if stream.write_all(text.as_bytes()).await.is_err() {
                        return;
                    }
                }
                Act::Wait(pause) => tokio::time::sleep(pause).await,
                Act::Reset => {
                    let _ = stream.set_zero_linger();
                    return;
                }
                Act::Watch => {
                    let mut piece = [0; 64];
                    if matches!(stream.read(&mut piece).await, Ok(0) | Err(_)) {
                        left.fetch_add(1, Ordering::SeqCst);
                    }
                    return;
                }
            }
        }
        if !keeps {
            return;
        }
    }
}

const SSE: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

fn event(delta: Value, finish: Option<&str>) -> String {
    format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}))
}

/// A whole answer of these words.
fn words(said: &[&str]) -> Vec<Act> {
    let mut text = SSE.to_owned();
    text.extend(said.iter().map(|word| event(json!({"content": word}), None)));
    text.push_str(&event(json!({}), Some("stop")));
    text.push_str("data: [DONE]\n\n");
    vec![Act::Say(text)]
}

/// The same on a connection that goes on.
fn words_kept(said: &str) -> Vec<Act> {
    let body =
        [event(json!({"content": said}), None), event(json!({}), Some("stop")), "data: [DONE]\n\n".into()].concat();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    vec![Act::Say(format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n", body.len()))]
}

/// An answer that makes calls, behind these words.
fn calls(said: &str, made: &[(&str, &str)]) -> Vec<Act> {
    let mut text = SSE.to_owned();
    if !said.is_empty() {
        text.push_str(&event(json!({"content": said}), None));
    }
    for (index, (name, arguments)) in made.iter().enumerate() {
        let function = json!({"name": name, "arguments": ""});
        let call = json!({"index": index, "id": format!("x{index}"), "type": "function", "function": function});
        text.push_str(&event(json!({"tool_calls": [call]}), None));
        for piece in arguments.as_bytes().chunks(5) {
            let piece = String::from_utf8_lossy(piece);
            let call = json!({"index": index, "function": {"arguments": piece}});
            text.push_str(&event(json!({"tool_calls": [call]}), None));
        }
    }
    text.push_str(&event(json!({}), Some("tool_calls")));
    let usage = json!({"prompt_tokens": 50, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 30}});
    text.push_str(&format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage})));
    vec![Act::Say(text)]
}

fn status(line: &str, headers: &str, body: &str) -> Vec<Act> {
    let length = body.len();
    vec![Act::Say(format!("HTTP/1.1 {line}\r\ncontent-length: {length}\r\n{headers}connection: close\r\n\r\n{body}"))]
}

// === A gateway in front ===

struct Gateway {
    url: String,
    http: reqwest::Client,
    stop: CancellationToken,
}

/// A model on these servers, impatient.
fn upstream(urls: Vec<String>) -> Upstream {
    Upstream {
        urls,
        connect_timeout: Duration::from_millis(500),
        first_token_timeout: Duration::from_millis(400),
        token_timeout: Duration::from_millis(400),
        probe_interval: Duration::from_millis(100),
        ..Upstream::default()
    }
}

impl Gateway {
    async fn start(models: impl IntoIterator<Item = (&'static str, Upstream)>) -> Self {
        let mut config = Config::default();
        config.model.source = String::new();
        config.models = models.into_iter().map(|(name, model)| (name.to_owned(), model)).collect();
        Self::with(config).await
    }

    async fn with(mut config: Config) -> Self {
        config.server.listen.set_port(0);
        let listener = server::bind(config.server.listen).await.unwrap();
        let app = App::new(config, None, listener.local_addr().unwrap(), Some(KEY)).unwrap();
        app.check_agents().unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(server::serve(app, listener, stop.clone().cancelled_owned()));
        Self { url, http: reqwest::Client::new(), stop }
    }

    async fn post(&self, body: &Value) -> reqwest::Response {
        let request = self.http.post(format!("{}/v1/chat/completions", self.url)).bearer_auth(KEY).json(body);
        request.send().await.unwrap()
    }

    /// Status, `Retry-After` and body of an answer.
    async fn outcome(&self, body: &Value) -> (u16, Option<String>, Value) {
        let response = self.post(body).await;
        let after = response.headers().get("retry-after").map(|after| after.to_str().unwrap().to_owned());
        (response.status().as_u16(), after, response.json().await.unwrap())
    }

    async fn message(&self, body: &Value) -> Value {
        let (status, _, answer) = self.outcome(body).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["message"].clone()
    }

    /// The data lines of a streamed answer.
    async fn lines(&self, body: &Value) -> Vec<String> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = self.post(&body).await;
        assert_eq!(response.status(), 200);
        let text = response.text().await.unwrap();
        text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn ask(model: &str, system: &str) -> Value {
    let mut body = request(system, "Where is my order 1234?");
    body["model"] = model.into();
    body
}

#[test]
fn a_turn_is_translated_both_ways() {
    run(async {
        let there = Scripted::start(|_, _| words(&["Good", " day."])).await;
        let mut settings = upstream(vec![there.url()]);
        settings.model = "big".into();
        settings.body = toml::from_str("top_k = 3\ntemperature = 0.5").unwrap();
        let gateway = Gateway::start([("m", settings)]).await;
        let mut body = ask("m", PLAIN);
        body["stop"] = json!(["x"]);
        body["seed"] = 7.into();
        body["tools"] = json!([find_order()]);
        body["messages"] = json!([
            {"role": "system", "content": PLAIN}, {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
                "function": {"name": "find_order", "arguments": "{\"order_id\":\"1\"}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "lost"}, {"role": "user", "content": "And now?"}]);
        let (status, _, answer) = gateway.outcome(&body).await;
        assert_eq!((status, &answer["choices"][0]["message"]["content"]), (200, &json!("Good day.")));
        // The server tells no figures: what was sent and what came gives them.
        assert_eq!(answer["usage"]["completion_tokens"], 2);
        assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 50, "{answer}");
        let sent = there.asked.lock().unwrap()[0].clone();
        for (name, value) in [
            ("model", json!("big")),
            ("messages", body["messages"].clone()),
            ("tools", body["tools"].clone()),
            ("tool_choice", json!("auto")),
            ("stream", json!(true)),
            ("stream_options", json!({"include_usage": true})),
            ("seed", json!(7)),
            ("stop", json!(["x"])),
            ("max_tokens", json!(16)),
            ("top_k", json!(3)),
            ("temperature", json!(0.5)),
        ] {
            assert_eq!(sent[name], value, "{name}");
        }
    });
}

#[test]
fn calls_come_with_a_filler_or_strictly_without() {
    run(async {
        let there = Scripted::start(|_, body| {
            let said = if body["messages"][1]["content"] == "Speak." { "Looking" } else { "" };
            calls(said, &[("find_order", r#"{"order_id": "1234"}"#), ("find_order", r#"{"order_id": "5"}"#)])
        })
        .await;
        let gateway = Gateway::start([("m", upstream(vec![there.url()]))]).await;
        let mut voice = ask("m", VOICE);
        voice["tools"] = json!([find_order()]);
        let message = gateway.message(&voice).await;
        assert!(message["content"].as_str().is_some_and(|said| !said.is_empty()), "{message}");
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], r#"{"order_id": "1234"}"#);
        assert_eq!(message["tool_calls"][1]["function"]["arguments"], r#"{"order_id": "5"}"#);
        assert_ne!(message["tool_calls"][0]["id"], message["tool_calls"][1]["id"]);

        let lines = gateway.lines(&voice).await;
        let at = |what: &str| lines.iter().position(|line| line.contains(what)).unwrap();
        assert!(at("\"content\":\"") < at("find_order"), "{lines:?}");

        // Its own words are the filler.
        voice["messages"][1]["content"] = "Speak.".into();
        assert_eq!(gateway.message(&voice).await["content"], "Looking");
        // Without a voice agent's prompt there is none, whatever the server says.
        let mut plain = ask("m", PLAIN);
        plain["tools"] = json!([find_order()]);
        plain["messages"][1]["content"] = "Speak.".into();
        assert_eq!(gateway.message(&plain).await["content"], Value::Null);
        plain["tool_choice"] = "required".into();
        let lines = gateway.lines(&plain).await;
        assert!(!lines.iter().any(|line| line.contains("Looking")), "{lines:?}");

        let (_, _, answer) = gateway.outcome(&plain).await;
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 30);
    });
}

#[test]
fn where_a_call_is_certain_the_filler_does_not_wait_for_the_server() {
    run(async {
        let there = Scripted::start(|_, _| {
            let mut acts = vec![Act::Wait(Duration::from_millis(300))];
            acts.extend(calls("", &[("find_order", r#"{"order_id": "1"}"#)]));
            acts
        })
        .await;
        let gateway = Gateway::start([("m", upstream(vec![there.url()]))]).await;
        let mut body = ask("m", VOICE);
        body["tools"] = json!([find_order()]);
        body["tool_choice"] = "required".into();
        body["stream"] = true.into();
        let mut stream = gateway.post(&body).await.bytes_stream();
        let mut text = String::new();
        while !text.contains("\"content\":\"")
            || text.contains("\"content\":\"\"") && text.matches("content").count() < 2
        {
            text.push_str(&String::from_utf8_lossy(&stream.next().await.unwrap().unwrap()));
        }
        assert!(!text.contains("find_order"));
        while let Some(Ok(piece)) = stream.next().await {
            text.push_str(&String::from_utf8_lossy(&piece));
        }
        assert!(text.contains("find_order") && text.contains("[DONE]"), "{text}");
    });
}

#[test]
fn a_call_that_is_not_valid_is_asked_for_again_once() {
    run(async {
        let there = Scripted::start(|_, body| {
            let repaired = body["messages"].as_array().unwrap().len() > 2;
            match (body["messages"][1]["content"].as_str().unwrap(), repaired) {
                ("mend", true) => calls("", &[("find_order", r#"{"order_id": "1"}"#)]),
                ("unknown", true) => calls("", &[("find_order", r#"{"order_id": "2"}"#)]),
                ("unknown", false) => calls("", &[("lookup", "{}")]),
                ("cut", false) => calls("", &[("find_order", r#"{"order_id": "1"#)]),
                ("talks on", false) => {
                    let end = event(json!({}), Some("tool_calls"));
                    let mut acts = calls("", &[("find_order", "{}")]);
                    if let Act::Say(text) = &mut acts[0] {
                        *text = text.replace(&end, &format!("{}{end}", event(json!({"content": "Done."}), None)));
                    }
                    acts
                }
                ("talks on", true) => calls("", &[("find_order", r#"{"order_id": "3"}"#)]),
                ("cut", true) => words(&["I would rather not."]),
                (_, _) => calls("", &[("find_order", r#"{"order_id": 1}"#)]),
            }
        })
        .await;
        let gateway = Gateway::start([("m", upstream(vec![there.url()]))]).await;
        let mut body = ask("m", PLAIN);
        body["tools"] = json!([find_order()]);
        for (what, id) in [("mend", "1"), ("unknown", "2"), ("talks on", "3")] {
            body["messages"][1]["content"] = what.into();
            let (status, _, answer) = gateway.outcome(&body).await;
            assert_eq!(status, 200, "{answer}");
            let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
            assert_eq!(call["arguments"], format!(r#"{{"order_id": "{id}"}}"#));
            assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
            // Both answers are counted.
            assert_eq!(answer["usage"]["completion_tokens"], 18);
        }
        let again = there.asked.lock().unwrap()[1].clone();
        assert_eq!(again["tool_choice"]["function"]["name"], "find_order");
        let told = again["messages"][3]["content"].as_str().unwrap();
        assert!(told.contains("/order_id") && told.contains("string"), "{told}");
        for what in ["cut", "stubborn"] {
            body["messages"][1]["content"] = what.into();
            let (status, _, answer) = gateway.outcome(&body).await;
            assert_eq!((status, &answer["error"]["type"]), (502, &json!("api_error")), "{answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains("not valid"), "{answer}");
        }
    });
}

/// What a server may do wrong before its first token.
fn faults() -> Vec<(&'static str, Vec<Act>)> {
    let long = Duration::from_secs(5);
    vec![
        ("resets at once", vec![Act::Reset]),
        ("resets after the headers", vec![Act::Say(SSE.into()), Act::Wait(Duration::from_millis(20)), Act::Reset]),
        ("stalls before the headers", vec![Act::Wait(long)]),
        ("stalls after the headers", vec![Act::Say(SSE.into()), Act::Wait(long)]),
        ("is no SSE", vec![Act::Say(format!("{SSE}data: {{\"choices\": [\n\n"))]),
        ("is no chunk", vec![Act::Say(format!("{SSE}data: 7\n\n"))]),
        ("is JSON", status("200 OK", "content-type: application/json\r\n", r#"{"choices":[]}"#)),
        ("is HTML", status("200 OK", "content-type: text/html\r\n", "<html>")),
        ("says 500", status("500 Internal Server Error", "", "oops")),
        ("says 401", status("401 Unauthorized", "", "")),
        ("ends at once", vec![Act::Say(SSE.into())]),
        (
            "says error in the stream",
            vec![Act::Say(format!("{SSE}data: {{\"error\": {{\"message\": \"out of memory\"}}}}\n\n"))],
        ),
    ]
}

#[test]
fn a_server_that_fails_before_its_first_token_is_an_error_or_passed_over() {
    run(async {
        for (what, acts) in faults() {
            let wrong = Scripted::start(move |_, _| acts.clone()).await;
            let gateway = Gateway::start([("m", upstream(vec![wrong.url()]))]).await;
            let mut body = ask("m", PLAIN);
            for stream in [false, true] {
                body["stream"] = stream.into();
                let (status, _, answer) = gateway.outcome(&body).await;
                assert_eq!((status, &answer["error"]["type"]), (502, &json!("api_error")), "{what}: {answer}");
            }
            // With another server nobody notices, whichever the conversation prefers.
            let right = Scripted::start(|_, _| words(&["Here."])).await;
            let gateway = Gateway::start([("m", upstream(vec![wrong.url(), right.url()]))]).await;
            let answers = stream::iter(0..8)
                .map(|n| {
                    let mut body = ask("m", PLAIN);
                    body["messages"][1]["content"] = format!("Question {n}").into();
                    let gateway = &gateway;
                    async move { gateway.message(&body).await["content"].clone() }
                })
                .buffer_unordered(8)
                .collect::<Vec<_>>();
            assert!(answers.await.iter().all(|said| said == "Here."), "{what}");
        }
        // Nobody listens.
        let gone = Scripted::start(|_, _| Vec::new()).await.url();
        let gateway = Gateway::start([("m", upstream(vec![gone]))]).await;
        let (status, _, answer) = gateway.outcome(&ask("m", PLAIN)).await;
        assert_eq!(status, 502, "{answer}");
        // After some failures it is not asked any more, and the caller is told when to come back.
        let mut statuses = Vec::new();
        for _ in 0..3 {
            let (status, after, _) = gateway.outcome(&ask("m", PLAIN)).await;
            statuses.push((status, after));
        }
        // Now and then one is let through to find out, and fails.
        let told = |(status, after): &(u16, Option<String>)| {
            *status == 503 && after.as_ref().is_some_and(|after| after.parse::<u64>().is_ok())
        };
        assert!(statuses.iter().any(told), "{statuses:?}");
        assert!(statuses.iter().all(|outcome| outcome.0 == 502 || told(outcome)), "{statuses:?}");
    });
}

#[test]
fn what_a_server_refuses_is_told_as_what_it_is() {
    run(async {
        let there = Scripted::start(|_, body| match body["messages"][1]["content"].as_str().unwrap() {
            "429" => status("429 Too Many Requests", "retry-after: 7\r\n", r#"{"error": {"message": "slow down"}}"#),
            "429 bare" => status("429 Too Many Requests", "", ""),
            "503" => status("503 Service Unavailable", "retry-after: 9\r\n", ""),
            "400" => status("400 Bad Request", "", r#"{"error": {"message": "bad seed"}}"#),
            _ => {
                let why = "This model's maximum context length is 4096 tokens, you requested 5000 tokens.";
                status("400 Bad Request", "", &json!({"error": {"message": why}}).to_string())
            }
        })
        .await;
        let gateway = Gateway::start([("m", upstream(vec![there.url()]))]).await;
        for (what, wanted, after, kind, says) in [
            ("429", 429, Some("7"), "rate_limit_error", "no more requests"),
            ("429 bare", 429, Some("2"), "rate_limit_error", "no more requests"),
            ("503", 503, Some("9"), "overloaded_error", "overloaded"),
            ("400", 400, None, "invalid_request_error", "bad seed"),
            ("long", 400, None, "invalid_request_error", "4096"),
        ] {
            let mut body = ask("m", PLAIN);
            body["messages"][1]["content"] = what.into();
            let before = there.requests();
            let (status, found, answer) = gateway.outcome(&body).await;
            assert_eq!(
                (status, found.as_deref(), answer["error"]["type"].as_str()),
                (wanted, after, Some(kind)),
                "{answer}"
            );
            assert!(answer["error"]["message"].as_str().unwrap().contains(says), "{answer}");
            assert_eq!(there.requests() - before, 1, "{what} was tried again");
        }
    });
}

#[test]
fn a_server_that_fails_in_the_middle_ends_the_stream_with_an_error() {
    run(async {
        let long = Duration::from_secs(5);
        let begun = format!("{SSE}{}", event(json!({"content": "Half"}), None));
        for (what, rest) in [
            ("resets", vec![Act::Wait(Duration::from_millis(50)), Act::Reset]),
            ("stalls", vec![Act::Wait(long)]),
            ("ends without a reason", vec![]),
            ("is no SSE", vec![Act::Wait(Duration::from_millis(50)), Act::Say("data: {\n\n".into()), Act::Wait(long)]),
        ] {
            let mut acts = vec![Act::Say(begun.clone())];
            acts.extend(rest);
            let there = Scripted::start(move |_, _| acts.clone()).await;
            let gateway = Gateway::start([("m", upstream(vec![there.url()]))]).await;
            let lines = gateway.lines(&ask("m", PLAIN)).await;
            assert!(lines[0].contains("Half") || lines[1].contains("Half"), "{what}: {lines:?}");
            let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
            assert_eq!(last["error"]["type"], "api_error", "{what}: {lines:?}");
            assert_eq!(there.requests(), 1, "{what}: a token had left, and it was tried again");
        }
        // An answer that said why it ends is complete without [DONE].
        let text = format!("{begun}{}", event(json!({}), Some("length")));
        let there = Scripted::start(move |_, _| vec![Act::Say(text.clone())]).await;
        let gateway = Gateway::start([("m", upstream(vec![there.url()]))]).await;
        let lines = gateway.lines(&ask("m", PLAIN)).await;
        assert_eq!(lines.last().unwrap(), "[DONE]");
        assert!(lines.iter().any(|line| line.contains("\"finish_reason\":\"length\"")), "{lines:?}");
    });
}

#[test]
fn a_server_that_was_down_is_used_again_without_a_restart() {
    run(async {
        let down = Arc::new(AtomicBool::new(true));
        let script = down.clone();
        let there = Scripted::start(move |_, _| {
            if script.load(Ordering::SeqCst) { status("500 Internal Server Error", "", "") } else { words(&["Back."]) }
        })
        .await;
        let gateway = Gateway::start([("m", upstream(vec![there.url()]))]).await;
        for _ in 0..6 {
            assert!(gateway.outcome(&ask("m", PLAIN)).await.0 >= 502);
        }
        down.store(false, Ordering::SeqCst);
        let until = Instant::now() + Duration::from_secs(20);
        while gateway.outcome(&ask("m", PLAIN)).await.0 != 200 {
            assert!(Instant::now() < until, "it was never asked again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn a_caller_who_leaves_closes_the_stream_to_the_server() {
    run(async {
        let there = Scripted::start(|_, _| {
            vec![Act::Say(format!("{SSE}{}", event(json!({"content": "Well"}), None))), Act::Watch]
        })
        .await;
        let mut settings = upstream(vec![there.url()]);
        settings.token_timeout = Duration::from_secs(60);
        let gateway = Gateway::start([("m", settings)]).await;
        let mut body = ask("m", PLAIN);
        body["stream"] = true.into();
        let mut stream = gateway.post(&body).await.bytes_stream();
        stream.next().await.unwrap().unwrap();
        drop(stream);
        let until = Instant::now() + Duration::from_secs(10);
        while there.left.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < until, "the server still waits for its client");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
}

#[test]
fn a_conversation_stays_with_its_server_and_load_is_shared() {
    run(async {
        let mut servers = Vec::new();
        for _ in 0..3 {
            servers.push(Scripted::start(|_, _| words_kept("Yes.")).await);
        }
        let mut settings = upstream(servers.iter().map(Scripted::url).collect());
        settings.weights = vec![1, 1, 2];
        let gateway = Gateway::start([("m", settings)]).await;
        for n in 0..120 {
            let mut body = ask("m", PLAIN);
            body["messages"][1]["content"] = format!("Conversation {n}").into();
            gateway.message(&body).await;
            let messages = body["messages"].as_array_mut().unwrap();
            messages
                .extend([json!({"role": "assistant", "content": "Yes."}), json!({"role": "user", "content": "Sure?"})]);
            gateway.message(&body).await;
        }
        let mut homes = BTreeMap::new();
        for (at, server) in servers.iter().enumerate() {
            for body in server.asked.lock().unwrap().iter() {
                let first = body["messages"][1]["content"].as_str().unwrap().to_owned();
                assert_eq!(*homes.entry(first).or_insert(at), at, "a conversation moved");
            }
        }
        let share = |at: usize| homes.values().filter(|home| **home == at).count();
        assert!(share(0) >= 15 && share(1) >= 15 && share(2) >= 40, "{} {} {}", share(0), share(1), share(2));

        // Many turns of one conversation at once go elsewhere rather than wait in line.
        let busy = Scripted::start(|_, _| {
            let mut acts = vec![Act::Wait(Duration::from_millis(200))];
            acts.extend(words(&["Yes."]));
            acts
        });
        let other = Scripted::start(|_, _| {
            let mut acts = vec![Act::Wait(Duration::from_millis(200))];
            acts.extend(words(&["Yes."]));
            acts
        });
        let (one, other) = (busy.await, other.await);
        let gateway = Gateway::start([("m", upstream(vec![one.url(), other.url()]))]).await;
        let body = ask("m", PLAIN);
        futures::future::join_all((0..20).map(|_| gateway.message(&body))).await;
        assert!(one.requests() >= 6 && other.requests() >= 6, "{} {}", one.requests(), other.requests());
    });
}

#[test]
fn keys_have_models_and_models_have_fallbacks() {
    run(async {
        let there = Scripted::start(|_, _| words(&["There."])).await;
        let other = Scripted::start(|_, body| {
            if body["tools"].is_array() {
                calls("", &[("find_order", r#"{"order_id": "1"}"#)])
            } else {
                words(&["Other."])
            }
        })
        .await;
        let gone = Scripted::start(|_, _| Vec::new()).await.url();
        let mut config = Config::default();
        config.model.source = String::new();
        config.server.default_model = "good".into();
        let broken = Upstream { fallback: "other".into(), ..upstream(vec![gone]) };
        for (name, model) in
            [("good", upstream(vec![there.url()])), ("other", upstream(vec![other.url()])), ("broken", broken)]
        {
            config.models.insert(name.into(), model);
        }
        config.keys = vec![key("some", 0, 0, &["good"])];
        let gateway = Gateway::with(config).await;
        assert_eq!(gateway.message(&ask("broken", PLAIN)).await["content"], "Other.");
        // Also where the phrase has left before it is known that no server answers.
        let mut call = ask("broken", VOICE);
        call["tools"] = json!([find_order()]);
        call["tool_choice"] = "required".into();
        let message = gateway.message(&call).await;
        assert_eq!(message["tool_calls"][0]["function"]["name"], "find_order", "{message}");
        assert!(message["content"].as_str().is_some_and(|said| !said.is_empty()), "{message}");
        let (status, _, answer) = gateway.outcome(&ask("nothing", PLAIN)).await;
        assert_eq!((status, &answer["error"]["code"]), (400, &json!("model_not_found")));
        let as_some = |path: &str| gateway.http.get(format!("{}{path}", gateway.url)).bearer_auth("some");
        let listed: Value = as_some("/v1/models").send().await.unwrap().json().await.unwrap();
        let names: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
        assert_eq!(names, ["good"]);
        let refused = gateway.http.post(format!("{}/v1/chat/completions", gateway.url)).bearer_auth("some");
        let refused = refused.json(&ask("other", PLAIN)).send().await.unwrap();
        assert_eq!(refused.status(), 403);
    });
}

#[test]
fn capabilities_are_refused_before_a_server_is_asked() {
    run(async {
        let there = Scripted::start(|_, _| words(&["Hm."])).await;
        let settings = Upstream { tools: false, json_schema: false, logprobs: false, ..upstream(vec![there.url()]) };
        let gateway = Gateway::start([("m", settings)]).await;
        for (field, value) in [
            ("tools", json!([tool("f", json!({"type": "object"}))])),
            (
                "response_format",
                json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}),
            ),
            ("logprobs", json!(true)),
        ] {
            let mut body = ask("m", PLAIN);
            body[field] = value;
            let (status, _, answer) = gateway.outcome(&body).await;
            assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(field)), "{answer}");
        }
        assert_eq!(there.requests(), 0);
    });
}

#[test]
fn of_ten_thousand_requests_none_fails_while_servers_come_and_go() {
    run(async {
        // Long enough for a kill to meet turns that wait.
        let script: Script = Arc::new(|_, _| [vec![Act::Wait(Duration::from_millis(4))], words_kept("Yes.")].concat());
        let mut servers = Vec::new();
        for _ in 0..3 {
            servers.push(Some(Scripted::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), script.clone()).await));
        }
        let addresses: Vec<SocketAddr> = servers.iter().flatten().map(|server| server.address).collect();
        let gateway = Gateway::start([("m", upstream(servers.iter().flatten().map(Scripted::url).collect()))]).await;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let chaos = tokio::spawn(async move {
            let mut kills = 0;
            while !stopped.is_cancelled() {
                let (at, down, up) = {
                    let mut rng = rand::rng();
                    (rng.random_range(0..3), rng.random_range(2..60), rng.random_range(2..30))
                };
                if let Some(mut server) = servers[at].take() {
                    server.task.abort();
                    // Only behind its end is the port free.
                    let _ = (&mut server.task).await;
                }
                kills += 1;
                tokio::time::sleep(Duration::from_millis(down)).await;
                servers[at] = Some(Scripted::start_at(addresses[at], script.clone()).await);
                tokio::time::sleep(Duration::from_millis(up)).await;
            }
            kills
        });
        let failed = stream::iter(0..10_000)
            .map(|n| {
                let mut body = ask("m", PLAIN);
                body["messages"][1]["content"] = format!("Conversation {}", n % 97).into();
                let gateway = &gateway;
                async move {
                    let (status, _, answer) = gateway.outcome(&body).await;
                    (status != 200).then(|| answer.to_string())
                }
            })
            .buffer_unordered(16)
            .filter_map(futures::future::ready)
            .collect::<Vec<_>>()
            .await;
        stop.cancel();
        println!("{} kills, {} of 10,000 failed", chaos.await.unwrap(), failed.len());
        assert!(failed.is_empty(), "{} failed, first {}", failed.len(), failed[0]);
    });
}

#[test]
fn the_gateway_is_its_own_upstream() {
    run(async {
        let mut settings = upstream(vec![format!("{}/v1", SERVER.url)]);
        settings.model = "electron".into();
        settings.key = electron_gateway::secret::Secret::literal(KEY);
        settings.first_token_timeout = Duration::from_secs(120);
        settings.token_timeout = Duration::from_secs(60);
        let gateway = Gateway::start([("m", settings)]).await;
        let own = SERVER.ask(&request(PLAIN, "Say hello.")).await;
        let mut body = request(PLAIN, "Say hello.");
        body["model"] = "m".into();
        let (status, _, through) = gateway.outcome(&body).await;
        assert_eq!(status, 200, "{through}");
        assert_eq!(through["choices"][0]["message"], own["choices"][0]["message"]);
        assert_eq!(through["usage"]["prompt_tokens"], own["usage"]["prompt_tokens"]);
        assert_eq!(through["usage"]["completion_tokens"], own["usage"]["completion_tokens"]);

        body["logprobs"] = true.into();
        body["top_logprobs"] = 2.into();
        let (_, _, through) = gateway.outcome(&body).await;
        let first = &through["choices"][0]["logprobs"]["content"][0];
        assert_eq!(first["top_logprobs"].as_array().unwrap().len(), 2, "{through}");

        let mut body = ask("m", VOICE);
        body["tools"] = json!([find_order()]);
        body["tool_choice"] = "required".into();
        body["max_tokens"] = 80.into();
        let lines = gateway.lines(&body).await;
        let at = |what: &str| lines.iter().position(|line| line.contains(what)).unwrap();
        assert!(at("\"content\":\"") < at("find_order") && lines.last().unwrap() == "[DONE]", "{lines:?}");
        let spoken =
            lines.iter().filter(|line| line.contains("\"content\":\"") && !line.contains("\"content\":\"\"")).count();
        assert_eq!(spoken, 1, "two fillers: {lines:?}");
    });
}
