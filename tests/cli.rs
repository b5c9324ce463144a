//! The program as a person at the terminal meets it, and as a supervisor stops it.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, routing::post};
use common::{PLAIN, VOICE, find_order, read_until, request, run, tool};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest, common::v1::any_value::Value as AnyValue, trace::v1::Span,
};
use prost::Message;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
};

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_electron-gateway"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Exit code and everything printed.
async fn outcome(arguments: &[&str]) -> (i32, String) {
    let done = tokio::time::timeout(Duration::from_secs(120), program(arguments).output()).await.unwrap().unwrap();
    let printed = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    (done.status.code().unwrap(), printed)
}

/// A server of its own process.
struct Running {
    child: Child,
    url: String,
    key: String,
}

impl Running {
    async fn start(environment: &[(&str, &str)]) -> Self {
        let mut child = program(&["serve", "--listen", "127.0.0.1:0"])
            .envs(environment.iter().copied())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut url, mut key) = (None, None);
        while url.is_none() || key.is_none() {
            let line =
                tokio::time::timeout(Duration::from_secs(240), lines.next_line()).await.unwrap().unwrap().unwrap();
            url = url.or_else(|| line.split_once(" on http://").map(|(_, address)| format!("http://{address}")));
            key = key.or_else(|| Some(line.strip_prefix("The key of this run is ")?.split(';').next()?.to_owned()));
        }
        Self { child, url: url.unwrap(), key: key.unwrap() }
    }

    async fn post(&self, body: &Value, headers: &[(&str, &str)]) -> reqwest::Response {
        let url = format!("{}/v1/chat/completions", self.url);
        let mut request = reqwest::Client::new().post(url).bearer_auth(&self.key).json(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap()
    }

    /// Sends a signal to this process, and to no other.
    async fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().await.unwrap().success());
    }

    async fn exit(mut self) -> i32 {
        tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await.unwrap().unwrap().code().unwrap()
    }
}

#[test]
fn wrong_ways_are_told_with_what_to_do() {
    run(async {
        let (code, said) = outcome(&["serve", "--lisen", "127.0.0.1:0"]).await;
        assert!(code == 2 && said.contains("--listen"), "{said}");

        let (code, said) = outcome(&["check", "--set", "server.listn=127.0.0.1:1"]).await;
        assert!(code == 1 && said.contains("did you mean server.listen?"), "{said}");

        let (code, said) = outcome(&["check", "--config", "nowhere.toml"]).await;
        assert!(code == 1 && said.contains("nowhere.toml") && said.contains("--config"), "{said}");

        let (code, said) = outcome(&["serve", "--listen", "127.0.0.1:0", "--model", "nowhere.gguf"]).await;
        assert!(code == 1 && said.contains("nowhere.gguf: no such file"), "{said}");

        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let (code, said) = outcome(&["serve", "--listen", &address]).await;
        assert!(code == 1 && said.contains("is in use") && said.contains("--listen"), "{said}");

        let (code, said) = outcome(&["serve", "--listen", "0.0.0.0:0"]).await;
        assert!(code == 1 && said.contains("loopback") && said.contains("key create"), "{said}");
    });
}

#[test]
fn broken_model_files_are_told_by_name() {
    run(async {
        let folder = std::env::temp_dir().join(format!("models-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (name, bytes) in
            [("empty.gguf", &b""[..]), ("garbage.gguf", &[7u8; 4096]), ("short.gguf", b"GGUF\x03\0\0\0")]
        {
            let file = folder.join(name);
            std::fs::write(&file, bytes).unwrap();
            let (code, said) = outcome(&["serve", "--listen", "127.0.0.1:0", "--model", file.to_str().unwrap()]).await;
            assert!(code == 1 && said.contains(name) && said.contains("download it again"), "{said}");
        }
        // A folder without a model.
        let (code, said) = outcome(&["serve", "--listen", "127.0.0.1:0", "--model", folder.to_str().unwrap()]).await;
        assert!(code == 1 && said.contains(folder.to_str().unwrap()), "{said}");
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn a_new_key_is_shown_once_and_its_hash_is_a_setting() {
    run(async {
        let (code, said) = outcome(&["key", "create", "bot"]).await;
        assert_eq!(code, 0);
        let table = &said[said.find("[[keys]]").unwrap()..];
        let file = std::env::temp_dir().join(format!("keys-{}.toml", std::process::id()));
        std::fs::write(&file, table).unwrap();
        let (code, checked) = outcome(&["check", "--config", file.to_str().unwrap()]).await;
        assert!(code == 0 && checked.contains("name = \"bot\""), "{checked}");
        std::fs::remove_file(file).unwrap();
    });
}

#[test]
fn sigterm_lets_running_answers_end() {
    run(async {
        let server = Running::start(&[]).await;
        let mut body = request(PLAIN, "Count from one to thirty.");
        body["stream"] = true.into();
        body["max_tokens"] = 40.into();
        // Whatever the model would rather say, the answer is longer than that.
        let thirty = json!({"type": "array", "items": {"type": "integer"}, "minItems": 30});
        let schema = json!({"type": "object", "properties": {"numbers": thirty}, "required": ["numbers"]});
        body["response_format"] =
            json!({"type": "json_schema", "json_schema": {"name": "count", "strict": true, "schema": schema}});
        let mut response = server.post(&body, &[]).await;
        let first = response.chunk().await.unwrap().unwrap();
        assert!(first.starts_with(b"data: "));
        server.signal("-TERM").await;
        let rest = read_until(response, "data: [DONE]").await;
        assert!(rest.contains("finish_reason\":\"length"), "the answer went on to its end");
        assert_eq!(server.exit().await, 0);
    });
}

#[test]
fn ctrl_c_while_the_model_loads_is_no_fault() {
    run(async {
        let mut child = program(&["serve", "--listen", "127.0.0.1:0"]).spawn().unwrap();
        let mut first = [0u8; 1];
        child.stderr.as_mut().unwrap().read_exact(&mut first).await.unwrap();
        let pid = child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().await.unwrap().success());
        let status = tokio::time::timeout(Duration::from_secs(30), child.wait()).await.unwrap().unwrap();
        assert_eq!(status.code(), Some(0));
    });
}

type Received = Arc<Mutex<Vec<Span>>>;

async fn receive(State(received): State<Received>, body: Bytes) {
    let request = ExportTraceServiceRequest::decode(body).unwrap();
    let spans = request.resource_spans.into_iter().flat_map(|r| r.scope_spans).flat_map(|s| s.spans);
    received.lock().unwrap().extend(spans);
}

#[test]
fn spans_go_to_an_otlp_receiver_without_what_was_said() {
    run(async {
        let received = Received::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let routes = Router::new().route("/v1/traces", post(receive)).with_state(received.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });

        let server = Running::start(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]).await;
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let parent = format!("00-{trace}-00f067aa0ba902b7-01");
        let secret = "xylophone";
        let answer = server.post(&request(PLAIN, secret), &[("traceparent", &parent)]).await;
        let answer: Value = answer.json().await.unwrap();
        server.signal("-TERM").await;
        assert_eq!(server.exit().await, 0);

        let spans = received.lock().unwrap();
        let span = spans.iter().find(|span| span.name == "POST /v1/chat/completions").unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&span.trace_id), trace, "the caller's trace is continued");
        let attribute = |key: &str| {
            let found = span.attributes.iter().find(|a| a.key == key).unwrap_or_else(|| panic!("no {key}"));
            found.value.clone().unwrap().value.unwrap()
        };
        let number = |name: &str| AnyValue::IntValue(answer["usage"][name].as_i64().unwrap());
        assert_eq!(attribute("gen_ai.request.model"), AnyValue::StringValue("electron".into()));
        assert_eq!(attribute("gen_ai.usage.input_tokens"), number("prompt_tokens"));
        assert_eq!(attribute("gen_ai.usage.output_tokens"), number("completion_tokens"));
        assert!(matches!(attribute("gen_ai.usage.cache_read.input_tokens"), AnyValue::IntValue(_)));
        assert!(matches!(attribute("gen_ai.response.time_to_first_chunk"), AnyValue::DoubleValue(s) if s > 0.0));
        assert!(matches!(attribute("gen_ai.response.finish_reasons"), AnyValue::StringValue(_)));
        assert!(!format!("{spans:?}").contains(secret), "what was said stays out of spans");
    });
}

#[test]
fn conversations_become_what_the_model_is_trained_on() {
    run(async {
        let talk = r#"{"messages": [{"role": "system", "content": "You are a phone agent."}, {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "One moment.", "tool_calls": [{"id": "a", "type": "function",
             "function": {"name": "find", "arguments": "{\"id\": 7}"}}]},
            {"role": "tool", "tool_call_id": "a", "content": "here"}, {"role": "assistant", "content": "Here."}],
            "tools": [{"type": "function", "function": {"name": "find"}}]}"#
            .replace('\n', " ");
        let rendered = |lines: String| async move {
            let mut child = program(&["model", "render"]).stdin(Stdio::piped()).spawn().unwrap();
            child.stdin.take().unwrap().write_all(lines.as_bytes()).await.unwrap();
            let done = tokio::time::timeout(Duration::from_secs(120), child.wait_with_output()).await.unwrap().unwrap();
            let printed = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
            (done.status.code().unwrap(), printed(done.stdout), printed(done.stderr))
        };
        let (code, out, _) =
            rendered(format!("{talk}\n{}\n", r#"{"messages": [{"role": "user", "content": "Hi"}]}"#)).await;
        let examples: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((code, examples.len()), (0, 2));
        let answers = examples[0]["answers"].as_array().unwrap();
        assert_eq!((answers.len(), &examples[0]["speaks"]), (2, &Value::Bool(true)));
        let at = |answer: &Value, end: &str| answer[end].as_u64().unwrap() as usize;
        let tokens = examples[0]["tokens"].as_array().unwrap();
        assert_eq!(at(&answers[1], "end"), tokens.len());
        assert!(at(&answers[0], "end") < at(&answers[1], "start"));
        // Both end with the same token, which ends a turn.
        let last = |answer: &Value| &tokens[at(answer, "end") - 1];
        assert_eq!(last(&answers[0]), last(&answers[1]));
        assert_eq!(
            (examples[1]["answers"].as_array().unwrap().len(), &examples[1]["speaks"]),
            (0, &Value::Bool(false))
        );

        let (code, _, err) = rendered(format!("{talk}\nnonsense\n")).await;
        assert_eq!(code, 1);
        assert!(err.contains("line 2") && err.contains("JSON"), "{err}");
    });
}

#[test]
fn what_is_no_delta_is_not_merged() {
    run(async {
        let folder = std::env::temp_dir().join(format!("deltas-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (file, out) = (folder.join("delta.safetensors"), folder.join("merged"));
        let merge = async |delta: &[u8]| {
            std::fs::write(&file, delta).unwrap();
            let arguments = ["model", "merge", "--model", "smollm2", "--delta", file.to_str().unwrap()];
            outcome(&[&arguments[..], &["--out", out.to_str().unwrap()]].concat()).await
        };
        let (code, said) = merge(b"garbage").await;
        assert!(code == 1 && said.contains("no safetensors file"), "{said}");
        // A file that is read and holds nothing.
        let (code, said) = merge(b"\x02\0\0\0\0\0\0\0{}").await;
        assert!(code == 1 && said.contains("changes nothing"), "{said}");
        assert!(!out.exists());
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn the_trained_model_speaks_calls_and_answers() {
    run(async {
        let (code, said) = outcome(&["model", "pull", "--model", "electron-nano"]).await;
        assert!(code == 0 && said.contains("electron-nano is ready"), "{said}");
        let (_, listed) = outcome(&["model", "list"]).await;
        assert!(listed.lines().any(|line| line.starts_with("electron-nano  here")), "{listed}");

        let server = Running::start(&[]).await;
        let mut body = request(VOICE, "hi where is my order 1234");
        body["tools"] = json!([find_order(), tool("book_table", json!({"type": "object"}))]);
        body["max_tokens"] = 80.into();
        let ask = async |body: &Value| {
            let answer: Value = server.post(body, &[]).await.json().await.unwrap();
            answer["choices"][0]["message"].clone()
        };
        let called = ask(&body).await;
        assert!(called["content"].as_str().is_some_and(|words| !words.is_empty()), "{called}");
        let call = &called["tool_calls"][0];
        assert_eq!(call["function"]["name"], "find_order");
        assert!(call["function"]["arguments"].as_str().unwrap().contains("1234"), "{called}");

        let messages = body["messages"].as_array_mut().unwrap();
        let id = call["id"].clone();
        messages.push(called.clone());
        messages.push(
            json!({"role": "tool", "tool_call_id": id, "content": r#"{"status": "shipped", "arrives": "Friday"}"#}),
        );
        let answer = ask(&body).await;
        assert!(answer["tool_calls"].is_null() && answer["content"].as_str().unwrap().contains("Friday"), "{answer}");
    });
}
