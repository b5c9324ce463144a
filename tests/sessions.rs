//! Sessions over real sockets: resuming, barge-in, tools, limits, clients that misbehave.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{KEY, SERVER, Server, config, key, run};
use electron_gateway::config::Config;
use futures::{SinkExt, StreamExt};
use proptest::{
    prelude::{Strategy, any, prop},
    strategy::ValueTree,
    test_runner::TestRunner,
};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::frame::coding::CloseCode},
};

const RESPONSES: &str = "/v1/responses";
const REALTIME: &str = "/v1/realtime?model=electron";
const ENDS: [&str; 4] = ["response.completed", "response.incomplete", "response.failed", "response.done"];

/// A client's side of a conversation: send, expect, send, expect.
struct Talk {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// Types of all events so far.
    heard: Vec<String>,
    /// The last event's id, if it has one.
    last: Option<String>,
}

async fn open(server: &Server, path: &str, key: &str) -> Result<Talk, tungstenite::Error> {
    let url = format!("{}{path}", server.url.replacen("http", "ws", 1));
    let mut request = url.into_client_request().unwrap();
    request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    let (socket, _) = connect_async(request).await?;
    Ok(Talk { socket, heard: Vec::new(), last: None })
}

impl Talk {
    async fn to(path: &str) -> Self {
        open(&SERVER, path, KEY).await.unwrap()
    }

    async fn send(&mut self, event: Value) {
        self.socket.send(Message::text(event.to_string())).await.unwrap();
    }

    /// The next event, or the code with which the server closes the connection.
    async fn next(&mut self) -> Result<Value, Option<u16>> {
        tokio::time::timeout(Duration::from_secs(60), self.read()).await.expect("an event in time")
    }

    async fn read(&mut self) -> Result<Value, Option<u16>> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    let event: Value = serde_json::from_str(&text).unwrap();
                    self.heard.push(event["type"].as_str().unwrap().to_owned());
                    if event["type"] != "session.created" {
                        self.last = event["event_id"].as_str().map(str::to_owned).or(self.last.take());
                    }
                    return Ok(event);
                }
                Some(Ok(Message::Close(frame))) => return Err(frame.map(|frame| frame.code.into())),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Err(None),
            }
        }
    }

    /// The next event of one of these types.
    async fn until(&mut self, kinds: &[&str]) -> Value {
        loop {
            let event = self.next().await.unwrap();
            if kinds.contains(&event["type"].as_str().unwrap()) {
                return event;
            }
        }
    }

    /// The next error.
    async fn error(&mut self) -> Value {
        self.until(&["error"]).await["error"].clone()
    }

    /// The response to a request on the Responses protocol.
    async fn respond(&mut self, more: Value) -> Value {
        self.send(create(more)).await;
        self.until(&ENDS).await["response"].clone()
    }

    /// The response to what the caller says on the Realtime protocol.
    async fn say(&mut self, words: &str, options: Value) -> Value {
        self.send(user(words)).await;
        self.send(json!({"type": "response.create", "response": options})).await;
        self.until(&ENDS).await["response"].clone()
    }
}

fn create(more: Value) -> Value {
    let mut event = json!({"type": "response.create", "model": "electron", "temperature": 0, "max_output_tokens": 8,
                           "instructions": "Be brief.", "store": false});
    event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    event
}

/// An answer that the model cannot end early.
fn endless() -> Value {
    let numbers = json!({"type": "array", "minItems": 300, "items": {"type": "integer", "enum": [1, 2, 3]}});
    let schema = json!({"type": "object", "required": ["numbers"], "properties": {"numbers": numbers}});
    json!({"input": "Many numbers, please.", "max_output_tokens": 1000,
           "text": {"format": {"type": "json_schema", "name": "numbers", "schema": schema}}})
}

fn user(words: &str) -> Value {
    json!({"type": "conversation.item.create",
           "item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": words}]}})
}

fn output(call: &Value, text: &str) -> Value {
    json!({"type": "conversation.item.create",
           "item": {"type": "function_call_output", "call_id": call["call_id"], "output": text}})
}

fn find_order() -> Value {
    json!([{"type": "function", "name": "find_order", "description": "Looks up an order.",
            "parameters": {"type": "object", "required": ["order_id"],
                           "properties": {"order_id": {"type": "string", "maxLength": 6}}}}])
}

fn agent() -> Value {
    json!({"type": "session.update", "session": {
        "type": "realtime", "instructions": common::VOICE, "tools": find_order(), "temperature": 0, "seed": 7,
        "max_output_tokens": 120, "parallel_tool_calls": false}})
}

/// What an operator sees of a session.
async fn look(server: &Server, id: &str) -> Value {
    let request = server.http.get(format!("{}/v1/sessions/{id}", server.url)).bearer_auth(KEY);
    request.send().await.unwrap().json().await.unwrap()
}

/// A session's history without the ids that the server made up.
async fn history(server: &Server, id: &str) -> Vec<Value> {
    let session = look(server, id).await;
    let mut items = session["items"].as_array().unwrap_or_else(|| panic!("{session}")).clone();
    for item in &mut items {
        let item = item.as_object_mut().unwrap();
        item.remove("id");
        item.remove("call_id");
    }
    items
}

// === resuming ===

/// What a robust client does: a tool turn on the Realtime protocol, over a connection that is cut when so many events have
/// come or so many have been sent.
struct Robust {
    talk: Option<Talk>,
    session: String,
    seen: Option<String>,
    /// Steps until the connection is cut; every event that comes or goes is one.
    left: usize,
    steps: usize,
}

impl Robust {
    async fn connect(&mut self) {
        let path = match (&self.session, &self.seen) {
            (id, _) if id.is_empty() => REALTIME.to_owned(),
            (id, None) => format!("{REALTIME}&session_id={id}"),
            (id, Some(seen)) => format!("{REALTIME}&session_id={id}&last_event_id={seen}"),
        };
        let mut talk = Talk::to(&path).await;
        let created = talk.next().await.unwrap();
        assert_eq!(created["type"], "session.created");
        self.session = created["session"]["id"].as_str().unwrap().to_owned();
        self.talk = Some(talk);
    }

    /// Cuts the connection if it is time to. Gives whether it did.
    async fn step(&mut self) -> bool {
        self.steps += 1;
        self.left = self.left.wrapping_sub(1);
        if self.left != 0 {
            return false;
        }
        let talk = self.talk.take().unwrap();
        // Without a goodbye: the socket is closed with bytes unread.
        if let MaybeTlsStream::Plain(stream) = talk.socket.get_ref() {
            socket2_linger(stream);
        }
        drop(talk);
        self.connect().await;
        true
    }

    /// Sends an event until an answer to it has come. `is_answer` says what that is; a refusal that says it was done
    /// already is one as well.
    async fn ask(&mut self, event: Value, is_answer: impl Fn(&Value) -> bool) -> Value {
        let mut refused = Value::Null;
        for _ in 0..3 {
            self.talk.as_mut().unwrap().send(event.clone()).await;
            self.step().await;
            // Whatever happens, an answer to this comes behind the answer to that.
            let mark = format!("mark_{}", self.steps);
            let barrier = json!({"type": "conversation.item.retrieve", "item_id": mark, "event_id": mark});
            self.talk.as_mut().unwrap().send(barrier).await;
            let mut answer = None;
            loop {
                let Ok(next) = self.talk.as_mut().unwrap().next().await else { panic!("closed") };
                self.seen.clone_from(&self.talk.as_ref().unwrap().last);
                if is_answer(&next) {
                    answer = Some(next.clone());
                } else if next["type"] == "error" && next["error"]["event_id"] != mark.as_str() {
                    refused = next["error"].clone();
                }
                let marked = next["error"]["event_id"] == mark.as_str();
                if self.step().await && !marked {
                    // The barrier may be lost with the connection.
                    let barrier = json!({"type": "conversation.item.retrieve", "item_id": mark, "event_id": mark});
                    self.talk.as_mut().unwrap().send(barrier).await;
                }
                if marked {
                    break;
                }
            }
            if let Some(answer) = answer {
                return answer;
            }
        }
        panic!("{event} is not answered: {refused}");
    }

    async fn wait(&mut self, kind: &str) -> Value {
        loop {
            let next = self.talk.as_mut().unwrap().next().await.unwrap();
            self.seen.clone_from(&self.talk.as_ref().unwrap().last);
            self.step().await;
            if next["type"] == kind {
                return next;
            }
        }
    }

    async fn add(&mut self, id: &str, mut event: Value) {
        event["item"]["id"] = id.into();
        self.ask(event, |answer| {
            let added = answer["type"] == "conversation.item.done" && answer["item"]["id"] == id;
            added || answer["error"]["message"].as_str().is_some_and(|why| why.contains("is taken"))
        })
        .await;
    }

    /// The finished response. It begins a moment after it was asked for, and may have ended when that is looked for.
    async fn respond(&mut self, options: Value) -> Value {
        let begun = self
            .ask(json!({"type": "response.create", "response": options}), |answer| {
                let runs = answer["error"]["code"] == "conversation_already_has_active_response";
                runs || ["response.created", "response.done"].contains(&answer["type"].as_str().unwrap())
            })
            .await;
        if begun["type"] == "response.done" {
            return begun["response"].clone();
        }
        self.wait("response.done").await["response"].clone()
    }
}

/// Closing resets the connection, as a network that is gone does.
fn socket2_linger(stream: &TcpStream) {
    #[expect(deprecated, reason = "it blocks for a time that is zero here")]
    let _ = stream.set_linger(Some(Duration::ZERO));
}

/// A whole tool turn with the connection cut at one step; the history, and how many steps there were.
async fn tool_turn(cut: usize) -> (Vec<Value>, usize) {
    let mut client = Robust { talk: None, session: String::new(), seen: None, left: cut, steps: 0 };
    client.connect().await;
    client.ask(agent(), |answer| answer["type"] == "session.updated").await;
    client.add("item_question", user("Where is my order 1234?")).await;
    let response = client.respond(json!({"tool_choice": "required"})).await;
    let call = response["output"].as_array().unwrap().iter().find(|item| item["type"] == "function_call");
    let call = call.unwrap_or_else(|| panic!("cut {cut}: {response}")).clone();
    client.add("item_output", output(&call, "It is on its way.")).await;
    client.respond(json!({"tool_choice": "none", "max_output_tokens": 10})).await;
    (history(&SERVER, &client.session).await, client.steps)
}

#[test]
fn a_connection_can_drop_at_any_point_of_a_tool_turn() {
    run(async {
        let (whole, steps) = tool_turn(0).await;
        let kinds: Vec<&str> = whole.iter().map(|item| item["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["message", "message", "function_call", "function_call_output", "message"], "{whole:?}");
        assert!(steps >= 20, "{steps}");
        for point in 0..20 {
            let cut = 1 + point * (steps - 1) / 19;
            let (with_a_drop, _) = tool_turn(cut).await;
            assert_eq!(with_a_drop, whole, "cut at step {cut} of {steps}");
        }
    });
}

#[test]
fn events_are_sent_again_behind_the_last_one_that_was_seen() {
    run(async {
        let mut talk = Talk::to(REALTIME).await;
        let id = talk.until(&["session.created"]).await["session"]["id"].as_str().unwrap().to_owned();
        talk.say("Say something.", json!({"max_output_tokens": 6, "temperature": 0})).await;
        let all = talk.heard.clone();
        // Every event of this session has an id by which it can be come back to.
        let mut again = Talk::to(&format!("{REALTIME}&session_id={id}&last_event_id=event_1_0")).await;
        let created = again.next().await.unwrap();
        assert_eq!((&created["resumed"], &created["events_lost"]), (&json!(true), &json!(false)));
        again.until(&["response.done"]).await;
        assert_eq!(again.heard[1..], all[2..], "what came after the first event comes again");
        assert_eq!(talk.next().await.unwrap_err(), Some(4409), "the earlier connection learns that it was replaced");
    });
}

#[test]
fn a_chain_goes_on_over_another_connection() {
    run(async {
        let mut talk = Talk::to(RESPONSES).await;
        let first = talk.respond(json!({"input": "My name is Ada."})).await;
        drop(talk);
        let mut talk = Talk::to(RESPONSES).await;
        let second = talk.respond(json!({"input": "What is it?", "previous_response_id": first["id"]})).await;
        let (used, known) = (&second["usage"]["input_tokens"], &first["usage"]["total_tokens"]);
        assert!(used.as_u64() > known.as_u64(), "{second}");
        // And from any earlier place.
        let fork = talk.respond(json!({"input": "Who are you?", "previous_response_id": first["id"]})).await;
        assert_eq!(fork["previous_response_id"], first["id"]);
        talk.send(create(json!({"input": "x", "previous_response_id": "resp_unknown"}))).await;
        let error = talk.error().await;
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("previous_response_not_found"), &json!("previous_response_id"))
        );
    });
}

#[test]
fn a_dropped_chain_is_one_session_and_ends_after_the_window() {
    run(async {
        let mut config = config();
        config.session.resume_window = Duration::from_secs(3);
        let server = Server::start(config).await;
        let mut talk = open(&server, RESPONSES, KEY).await.unwrap();
        let list = async || {
            let request = server.http.get(format!("{}/v1/sessions", server.url)).bearer_auth(KEY);
            request.send().await.unwrap().json::<Value>().await.unwrap()["data"].as_array().unwrap().clone()
        };
        let first = talk.respond(json!({"input": "Hello."})).await;
        drop(talk);
        // A chain that another connection still holds is forked, so the server has to know first that this one is gone.
        while list().await[0]["connected"] == true {
            tokio::task::yield_now().await;
        }
        let mut talk = open(&server, RESPONSES, KEY).await.unwrap();
        talk.respond(json!({"input": "Hello again.", "previous_response_id": first["id"]})).await;
        let sessions = list().await;
        assert_eq!(sessions.len(), 1, "{sessions:?}");
        assert_eq!((&sessions[0]["responses"], &sessions[0]["connected"]), (&json!(2), &json!(true)));
        drop(talk);
        while !list().await.is_empty() {
            tokio::task::yield_now().await;
        }
        let mut talk = open(&server, RESPONSES, KEY).await.unwrap();
        talk.send(create(json!({"input": "x", "previous_response_id": first["id"]}))).await;
        assert_eq!(talk.error().await["code"], "previous_response_not_found");
    });
}

// === barge-in ===

#[test]
fn a_cancelled_response_ends_at_once_and_holds_what_was_streamed() {
    run(async {
        let mut talk = Talk::to(RESPONSES).await;
        talk.send(create(endless())).await;
        let mut streamed = String::new();
        for _ in 0..4 {
            let delta = talk.until(&["response.output_text.delta"]).await;
            streamed.push_str(delta["delta"].as_str().unwrap());
        }
        talk.send(json!({"type": "response.cancel"})).await;
        let ended = loop {
            let event = talk.next().await.unwrap();
            match event["type"].as_str().unwrap() {
                "response.output_text.delta" => streamed.push_str(event["delta"].as_str().unwrap()),
                kind if ENDS.contains(&kind) => break event,
                _ => {}
            }
        };
        assert_eq!(ended["type"], "response.incomplete");
        let response = &ended["response"];
        assert_eq!(response["incomplete_details"]["reason"], "cancelled");
        assert_eq!(response["output"][0]["content"][0]["text"], streamed);
        // A second cancel is too late, and nobody is told.
        talk.send(json!({"type": "response.cancel", "response_id": response["id"]})).await;
        let next = talk.respond(json!({"input": "Stop.", "previous_response_id": response["id"]})).await;
        assert!(!talk.heard.contains(&"error".to_owned()));
        let usage = &next["usage"];
        let cached = usage["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
        let known = response["usage"]["input_tokens"].as_u64().unwrap();
        assert!(cached >= known, "{cached} of the first turn's {known} tokens were cached");
    });
}

#[test]
fn only_what_was_heard_goes_on() {
    run(async {
        let mut talk = Talk::to(RESPONSES).await;
        let said = talk.respond(json!({"input": "Tell me a story.", "max_output_tokens": 16})).await;
        let text = said["output"][0]["content"][0]["text"].as_str().unwrap();
        let heard = text.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
        talk.send(json!({"type": "response.truncate", "response_id": said["id"], "text": heard})).await;
        let left = talk.until(&["response.truncated"]).await["item"]["content"][0]["text"].as_str().unwrap().to_owned();
        assert!(left.starts_with(&heard) && left.len() < text.len(), "{left} of {text}");
        let continued = talk.respond(json!({"input": "Go on.", "previous_response_id": said["id"]})).await;
        // The same conversation told anew has as many tokens.
        let anew = json!([{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": left},
                          {"role": "user", "content": "Go on."}]);
        let anew = talk.respond(json!({"input": anew})).await;
        assert_eq!(continued["usage"]["input_tokens"], anew["usage"]["input_tokens"]);

        let mut talk = Talk::to(REALTIME).await;
        let id = talk.until(&["session.created"]).await["session"]["id"].as_str().unwrap().to_owned();
        let said = talk.say("Tell me a story.", json!({"max_output_tokens": 16, "temperature": 0})).await;
        let item = said["output"][0]["id"].clone();
        talk.send(json!({"type": "conversation.item.truncate", "item_id": item, "content_index": 0, "text": heard}))
            .await;
        assert_eq!(talk.until(&["conversation.item.truncated"]).await["text"], left);
        assert_eq!(history(&SERVER, &id).await[1]["content"][0]["text"], left);
        let time =
            json!({"type": "conversation.item.truncate", "item_id": item, "content_index": 0, "audio_end_ms": 0});
        talk.send(time).await;
        assert_eq!(talk.until(&["conversation.item.truncated"]).await["text"], "");
        talk.send(json!({"type": "conversation.item.truncate", "item_id": item, "text": "Other words"})).await;
        assert_eq!(talk.error().await["param"], "text");
    });
}

#[test]
fn a_client_that_leaves_stops_its_turn() {
    run(async {
        let mut talk = Talk::to(RESPONSES).await;
        let before = SERVER.metric("electron_turns_total{finish_reason=\"cancelled\"").await;
        talk.send(create(endless())).await;
        talk.until(&["response.output_text.delta"]).await;
        drop(talk);
        while SERVER.metric("electron_turns_total{finish_reason=\"cancelled\"").await <= before {
            tokio::task::yield_now().await;
        }
    });
}

// === tools ===

#[test]
fn outputs_have_to_answer_open_calls() {
    run(async {
        let mut talk = Talk::to(REALTIME).await;
        talk.send(agent()).await;
        let response = talk.say("Where is my order 1?", json!({"tool_choice": "required"})).await;
        let call = response["output"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(call["type"], "function_call", "{response}");

        talk.send(json!({"type": "response.create", "event_id": "too_early"})).await;
        let error = talk.error().await;
        assert_eq!(
            (&error["code"], &error["event_id"]),
            (&json!("missing_function_call_outputs"), &json!("too_early"))
        );
        assert!(error["message"].as_str().unwrap().contains(call["call_id"].as_str().unwrap()));

        // Tools can be replaced while a call of one is out.
        talk.send(json!({"type": "session.update", "session": {"tools": []}})).await;
        talk.until(&["session.updated"]).await;
        talk.send(output(&json!({"call_id": "call_unknown"}), "x")).await;
        assert!(talk.error().await["message"].as_str().unwrap().contains("No tool call found"));
        talk.send(output(&call, "On its way.")).await;
        talk.until(&["conversation.item.done"]).await;
        talk.send(output(&call, "On its way again.")).await;
        assert!(talk.error().await["message"].as_str().unwrap().contains("has an output already"));
        let answer = json!({"type": "response.create", "response": {"max_output_tokens": 6}});
        talk.send(answer).await;
        assert!(talk.until(&["response.done"]).await["response"]["output"][0]["content"][0]["text"].is_string());
    });
}

#[test]
fn calls_of_a_cancelled_response_are_given_up() {
    run(async {
        let mut talk = Talk::to(REALTIME).await;
        let id = talk.until(&["session.created"]).await["session"]["id"].as_str().unwrap().to_owned();
        talk.send(agent()).await;
        talk.send(user("Where is my order 1?")).await;
        talk.send(json!({"type": "response.create", "response": {"tool_choice": "required"}})).await;
        let call =
            talk.until(&["response.function_call_arguments.delta", "response.function_call_arguments.done"]).await;
        talk.send(json!({"type": "response.cancel"})).await;
        let ended = talk.until(&["response.done"]).await["response"].clone();
        if ended["status"] == "cancelled" {
            assert_eq!(ended["status_details"]["reason"], "client_cancelled");
            talk.send(output(&call, "late")).await;
            assert_eq!(talk.error().await["param"], "item.call_id");
        }
        assert_eq!(
            look(&SERVER, &id).await["unanswered"].as_array().map(Vec::len),
            Some(usize::from(ended["status"] == "completed"))
        );
    });
}

#[test]
fn a_history_with_an_unanswered_call_can_be_continued() {
    run(async {
        let mut talk = Talk::to(RESPONSES).await;
        let input = json!([{"role": "user", "content": "Where is my order?"},
                           {"type": "function_call", "call_id": "call_1", "name": "find_order", "arguments": "{}"},
                           {"role": "user", "content": "Never mind. Hello?"}]);
        let response = talk.respond(json!({"input": input})).await;
        assert!(["completed", "incomplete"].contains(&response["status"].as_str().unwrap()), "{response}");
        let late = json!([{"type": "function_call_output", "call_id": "call_1", "output": "late"}]);
        talk.send(create(json!({"input": late, "previous_response_id": response["id"]}))).await;
        assert!(talk.error().await["message"].as_str().unwrap().contains("cancelled"));
    });
}

#[test]
fn an_unusable_tool_is_named_when_it_is_declared() {
    run(async {
        let mut talk = Talk::to(REALTIME).await;
        let tools = json!([{"type": "function", "name": "a", "parameters": {"type": "object"}},
                           {"type": "function", "name": "b", "parameters": {"type": "string"}}]);
        talk.send(json!({"type": "session.update", "session": {"tools": tools, "instructions": "New."}})).await;
        assert_eq!(talk.error().await["param"], "session.tools[1].parameters");
        talk.send(json!({"type": "session.update", "session": {}})).await;
        assert_eq!(talk.until(&["session.updated"]).await["session"]["instructions"], "", "nothing was applied");
    });
}

// === long conversations ===

#[test]
fn old_exchanges_make_room_and_an_event_says_so() {
    run(async {
        let mut config = config();
        config.model.context = 400;
        let server = Server::start(config).await;
        let mut talk = open(&server, REALTIME, KEY).await.unwrap();
        let id = talk.until(&["session.created"]).await["session"]["id"].as_str().unwrap().to_owned();
        talk.send(json!({"type": "session.update", "session": {"instructions": "Be brief.", "max_output_tokens": 16}}))
            .await;
        let words = "time year people way day man thing ".repeat(5);
        let mut trimmed = Vec::new();
        for _ in 0..9 {
            let response = talk.say(&words, json!({})).await;
            assert_ne!(response["status"], "failed", "{response}");
            assert!(response["usage"]["input_tokens"].as_u64().unwrap() < 400);
            trimmed.push(talk.heard.iter().filter(|kind| *kind == "conversation.trimmed").count());
        }
        let last = *trimmed.last().unwrap();
        assert!(last >= 1, "{trimmed:?}");
        assert!(last <= 3, "room is made for several turns at once: {trimmed:?}");
        let items = history(&server, &id).await;
        assert_eq!(items[0]["role"], "user", "whole exchanges go: {items:?}");

        talk.send(json!({"type": "session.update", "session": {"truncation": "disabled"}})).await;
        talk.send(user(&words.repeat(9))).await;
        talk.send(json!({"type": "response.create"})).await;
        assert_eq!(talk.error().await["code"], "context_length_exceeded");
    });
}

// === lanes ===

#[test]
fn lanes_of_one_socket_are_conversations_of_their_own() {
    run(async {
        let mut talk = Talk::to(RESPONSES).await;
        for lane in ["a", "b"] {
            talk.send(create(json!({"input": "Hello.", "stream_id": lane}))).await;
            // A lane's second request waits for its first.
            talk.send(create(json!({"input": "Hello again.", "stream_id": lane}))).await;
        }
        let mut ended = Vec::new();
        while ended.len() < 4 {
            let event = talk.until(&ENDS).await;
            ended.push(event["stream_id"].as_str().unwrap().to_owned());
        }
        ended.sort();
        assert_eq!(ended, ["a", "a", "b", "b"]);
        talk.send(create(endless())).await;
        talk.until(&["response.created"]).await;
        talk.send(create(json!({"input": "Hello."}))).await;
        assert_eq!(talk.error().await["code"], "conversation_already_has_active_response");
        talk.send(json!({"type": "response.cancel"})).await;
        let ended = talk.until(&ENDS).await;
        assert!(ended.get("stream_id").is_none(), "{ended}");
    });
}

#[test]
fn a_thousand_lanes_are_too_many() {
    run(async {
        let mut talk = Talk::to(RESPONSES).await;
        for lane in 0..1_000 {
            talk.send(create(json!({"generate": false, "stream_id": format!("lane {lane}")}))).await;
        }
        let (mut ended, mut refused) = (0, 0);
        while ended + refused < 1_000 {
            let event = talk.until(&["response.completed", "error"]).await;
            if event["type"] == "error" {
                assert_eq!(event["error"]["code"], "too_many_streams");
                refused += 1;
            } else {
                ended += 1;
            }
        }
        // Lanes that have nothing to do make room.
        assert!(ended >= config().session.max_lanes && refused > 0, "{ended} {refused}");
        talk.respond(json!({"input": "Hello.", "stream_id": "one more"})).await;
    });
}

// === keys, limits, the end ===

#[test]
fn a_session_is_seen_by_the_key_that_made_it() {
    run(async {
        let mut config = Config { keys: vec![key("one", 0, 0, &[]), key("two", 3, 0, &[])], ..config() };
        config.server.max_body = bytesize::ByteSize::kib(64);
        let server = Server::start(config).await;
        let mut talk = open(&server, REALTIME, "one").await.unwrap();
        let id = talk.until(&["session.created"]).await["session"]["id"].as_str().unwrap().to_owned();
        let get = async |key: &str| {
            let request = server.http.get(format!("{}/v1/sessions/{id}", server.url)).bearer_auth(key);
            request.send().await.unwrap().status().as_u16()
        };
        assert_eq!((get("one").await, get("two").await), (200, 404));
        let refused = async |path: &str, key: &str| match open(&server, path, key).await {
            Err(tungstenite::Error::Http(response)) => response.status().as_u16(),
            Err(e) => panic!("{e}"),
            Ok(_) => 101,
        };
        assert_eq!(refused(&format!("{REALTIME}&session_id={id}"), "two").await, 404);
        assert_eq!(refused("/v1/realtime?model=other", "one").await, 400);
        assert_eq!(refused(REALTIME, "wrong").await, 401);
        assert_eq!(refused(RESPONSES, "two").await, 101);
        assert_eq!(refused(RESPONSES, "two").await, 101);
        assert_eq!(refused(RESPONSES, "two").await, 429, "a connection counts as a request");

        let request = server.http.delete(format!("{}/v1/sessions/{id}", server.url)).bearer_auth("one");
        assert_eq!(request.send().await.unwrap().status(), 200);
        assert_eq!(talk.next().await.unwrap_err(), Some(1000));
        assert_eq!(get("one").await, 404);
    });
}

#[test]
fn what_is_no_event_is_an_error_and_the_connection_goes_on() {
    run(async {
        for path in [RESPONSES, REALTIME] {
            let mut talk = Talk::to(path).await;
            let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
            for frame in ["", "null", "7", "[]", "{", "{}", "{\"type\":7}", "{\"type\":\"no.such\"}", &deep] {
                talk.socket.send(Message::text(frame)).await.unwrap();
                assert_eq!(talk.error().await["type"], "invalid_request_error", "{frame:.40}");
            }
            talk.socket.send(Message::binary(vec![0u8; 10])).await.unwrap();
            talk.error().await;
            talk.send(json!({"type": "input_audio_buffer.append", "audio": "AAAA"})).await;
            let error = talk.error().await;
            assert_eq!(path == REALTIME, error["message"].as_str().unwrap().contains("Audio is not served"), "{error}");
        }
    });
}

#[test]
fn a_message_that_is_too_large_closes_the_connection() {
    run(async {
        for path in [RESPONSES, REALTIME] {
            let mut talk = Talk::to(path).await;
            let event = create(json!({"input": "x".repeat(1 << 20)}));
            talk.socket.send(Message::text(event.to_string())).await.unwrap();
            let code = loop {
                if let Err(code) = talk.next().await {
                    break code;
                }
            };
            assert_eq!(code, Some(1009));
        }
    });
}

#[test]
fn a_reader_that_stalls_is_closed_and_its_turn_is_cancelled() {
    run(async {
        let mut config = config();
        config.server.write_timeout = Duration::from_millis(300);
        let server = Server::start(config).await;
        let mut talk = open(&server, REALTIME, KEY).await.unwrap();
        let id = talk.until(&["session.created"]).await["session"]["id"].as_str().unwrap().to_owned();
        // Answers of about 100 KiB each, which nobody reads, fill every buffer on the way.
        let instructions = "x".repeat(100_000);
        talk.send(json!({"type": "session.update", "session": {"instructions": instructions}})).await;
        let update = json!({"type": "session.update", "session": {}}).to_string();
        for _ in 0..2_000 {
            if tokio::time::timeout(Duration::from_millis(100), talk.socket.send(Message::text(update.clone())))
                .await
                .is_err()
            {
                break;
            }
            if look(&server, &id).await["connected"] == false {
                break;
            }
        }
        while look(&server, &id).await["connected"] != false {
            tokio::task::yield_now().await;
        }
        let code = loop {
            if let Err(code) = talk.next().await {
                break code;
            }
        };
        assert_eq!(code, Some(1013));
    });
}

#[test]
fn a_server_that_stops_lets_an_answer_end() {
    run(async {
        let server = Server::start(config()).await;
        let mut idle = open(&server, REALTIME, KEY).await.unwrap();
        idle.until(&["session.created"]).await;
        let mut talk = open(&server, RESPONSES, KEY).await.unwrap();
        talk.send(create(json!({"input": "Count to ten.", "max_output_tokens": 24}))).await;
        talk.until(&["response.output_text.delta"]).await;
        drop(server);
        assert_eq!(idle.next().await.unwrap_err(), Some(u16::from(CloseCode::Away)));
        talk.until(&ENDS).await;
        assert_eq!(talk.next().await.unwrap_err(), Some(u16::from(CloseCode::Away)));
    });
}

// === fuzzing ===

/// Frames that are nearly events: right names with wrong values, wrong names with right ones, and noise.
fn frames() -> impl Strategy<Value = String> {
    let kinds = [
        "response.create",
        "response.cancel",
        "response.truncate",
        "response.steer",
        "session.update",
        "conversation.item.create",
        "conversation.item.delete",
        "conversation.item.retrieve",
        "conversation.item.truncate",
        "input_transcript.partial",
        "input_audio_buffer.append",
        "x",
    ];
    let names = [
        "type",
        "event_id",
        "item",
        "item_id",
        "session",
        "response",
        "response_id",
        "text",
        "input",
        "tools",
        "model",
        "instructions",
        "content",
        "role",
        "call_id",
        "output",
        "arguments",
        "name",
        "parameters",
        "previous_item_id",
        "previous_response_id",
        "stream_id",
        "generate",
        "tool_choice",
        "temperature",
        "max_output_tokens",
        "metadata",
        "audio_end_ms",
        "content_index",
        "conversation",
        "output_modalities",
        "truncation",
        "heard",
        "status",
        "id",
    ];
    let words = [
        "message",
        "function_call",
        "function_call_output",
        "user",
        "assistant",
        "system",
        "none",
        "auto",
        "required",
        "electron",
        "input_text",
        "output_text",
        "root",
        "realtime",
        "call_1",
        "item_1",
        "\u{0}",
        "🙂",
        "<|im_end|>",
    ];
    let leaf = proptest::prop_oneof![
        prop::sample::select(words.to_vec()).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        proptest::strategy::Just(Value::Null),
    ];
    let name = prop::sample::select(names.to_vec());
    let value = leaf.prop_recursive(4, 24, 6, move |inner| {
        proptest::prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((name.clone(), inner), 0..6)
                .prop_map(|pairs| pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()),
        ]
    });
    let fields = prop::collection::vec((prop::sample::select(names.to_vec()), value.clone()), 0..6);
    let event = (prop::sample::select(kinds.to_vec()), fields).prop_map(|(kind, fields)| {
        let mut event = json!({});
        for (name, value) in fields {
            event[name] = value;
        }
        event["type"] = kind.into();
        // Most of what is asked for should cost nothing, or the model would be all that is tested.
        if kind == "response.create" {
            event["generate"] = false.into();
            if !event["response"].is_object() {
                event["response"] = json!({});
            }
            event["response"]["max_output_tokens"] = 1.into();
        }
        event.to_string()
    });
    let cut = (event.clone(), any::<prop::sample::Index>()).prop_map(|(event, at)| {
        let end = at.index(event.len() + 1);
        event.chars().take(end).collect::<String>()
    });
    proptest::prop_oneof![8 => event, 1 => cut, 1 => value.prop_map(|v| v.to_string()), 1 => "\\PC{0,64}"]
}

#[test]
fn no_frame_kills_the_server_or_another_session() {
    let count = if common::long() { 100_000 } else { 4_000 };
    run(async move {
        let mut config = config();
        config.session.max_records = 200;
        let server = Server::start(config).await;
        let mut other = open(&server, REALTIME, KEY).await.unwrap();
        other.say("Remember me.", json!({"max_output_tokens": 4})).await;
        let mut runner = TestRunner::deterministic();
        let frames = frames();
        let mut sent = 0;
        while sent < count {
            // Answers the server's pings.
            let _ = tokio::time::timeout(Duration::ZERO, other.socket.next()).await;
            for path in [RESPONSES, REALTIME] {
                let mut talk = open(&server, path, KEY).await.unwrap();
                for _ in 0..500 {
                    let frame = frames.new_tree(&mut runner).unwrap().current();
                    if talk.socket.feed(Message::text(frame)).await.is_err() {
                        break;
                    }
                    sent += 1;
                    // What comes back is read on the way, so that nobody waits for the other.
                    while let Ok(Some(next)) = tokio::time::timeout(Duration::ZERO, talk.socket.next()).await {
                        assert!(next.is_ok(), "{next:?}");
                    }
                }
                talk.socket.flush().await.unwrap();
                // The connection still answers.
                talk.socket.send(Message::text("{\"type\":\"no.such\",\"event_id\":\"last\"}")).await.unwrap();
                loop {
                    let event = talk.next().await.unwrap();
                    if event["type"] == "error" && event["error"]["message"].as_str().unwrap().contains("no.such") {
                        break;
                    }
                }
            }
        }
        println!("{sent} frames");
        let answer = other.say("Are you there?", json!({"max_output_tokens": 4})).await;
        assert_ne!(answer["status"], "failed", "{answer}");
    });
}
