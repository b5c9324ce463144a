//! A phone agent with two tools, on a session of Electron Gateway, to be tried in the terminal.
//!
//! ```sh
//! ELECTRON_URL=ws://127.0.0.1:8080/v1/realtime ELECTRON_API_KEY=… cargo run --example voice_agent
//! ```
//!
//! Type what the caller says, a line at a time; what the agent would speak is printed as it comes. Ctrl-D hangs up. A real
//! agent has speech-to-text in the place of the keyboard and text-to-speech in the place of the screen.

use std::{collections::HashMap, error::Error, io::Write};

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest},
};

type Socket = WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>;

/// The sentence about acknowledging turns the gateway's filler on: the caller hears something before a tool runs.
const INSTRUCTIONS: &str = "You are a friendly phone agent of a shop. Briefly acknowledge out loud before using any tool, \
                            like 'Let me check that'. Answer in one short sentence.";

/// A session, and how to come back to it.
struct Call {
    url: String,
    key: String,
    socket: Socket,
    session: String,
    /// The last event that arrived. The server sends again what came after it.
    seen: Option<String>,
}

impl Call {
    async fn begin(url: String, key: String) -> Result<Self, Box<dyn Error>> {
        let socket = connect(&url, &key).await?;
        let mut call = Self { url, key, socket, session: String::new(), seen: None };
        let created = call.next().await?;
        call.session = created["session"]["id"].as_str().unwrap_or_default().to_owned();
        // The first event of a connection is no part of the session's history.
        call.seen = None;
        Ok(call)
    }

    async fn send(&mut self, event: Value) -> Result<(), Box<dyn Error>> {
        Ok(self.socket.send(Message::text(event.to_string())).await?)
    }

    /// The next event, from another connection if this one has dropped.
    async fn next(&mut self) -> Result<Value, Box<dyn Error>> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    let event: Value = serde_json::from_str(&text)?;
                    if event["type"] != "session.created" {
                        self.seen = event["event_id"].as_str().map(str::to_owned);
                    }
                    return Ok(event);
                }
                Some(Ok(Message::Close(Some(frame)))) => return Err(format!("closed: {}", frame.reason).into()),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => {
                    let after = self.seen.as_ref().map(|id| format!("&last_event_id={id}")).unwrap_or_default();
                    let url = format!("{}?session_id={}{after}", self.url, self.session);
                    self.socket = connect(&url, &self.key).await?;
                }
            }
        }
    }

    /// What the caller said.
    async fn hear(&mut self, words: &str) -> Result<(), Box<dyn Error>> {
        let content = json!([{"type": "input_text", "text": words}]);
        let item = json!({"type": "message", "role": "user", "content": content});
        self.send(json!({"type": "conversation.item.create", "item": item})).await
    }

    /// Lets the model answer. What it says is spoken at once, also while it goes on to call tools; they are run and the
    /// model is asked again until it has nothing more to call.
    async fn answer(&mut self, orders: &mut HashMap<&str, &str>) -> Result<(), Box<dyn Error>> {
        // A model may call tool after tool; a caller will not wait for ever.
        for round in 0..4 {
            let options = if round == 3 { json!({"tool_choice": "none"}) } else { json!({}) };
            self.send(json!({"type": "response.create", "response": options})).await?;
            let response = loop {
                let event = self.next().await?;
                match event["type"].as_str().unwrap_or_default() {
                    "response.output_text.delta" => speak(event["delta"].as_str().unwrap_or_default()),
                    "response.output_text.done" => speak("\n"),
                    "response.done" => break event["response"].clone(),
                    "error" => return Err(event["error"]["message"].to_string().into()),
                    _ => {}
                }
            };
            let calls: Vec<&Value> = response["output"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|item| item["type"] == "function_call")
                .collect();
            if calls.is_empty() {
                return Ok(());
            }
            for call in calls {
                let output = run(call, orders).to_string();
                let item = json!({"type": "function_call_output", "call_id": call["call_id"], "output": output});
                self.send(json!({"type": "conversation.item.create", "item": item})).await?;
            }
        }
        Ok(())
    }
}

async fn connect(url: &str, key: &str) -> Result<Socket, Box<dyn Error>> {
    let mut request = url.into_client_request()?;
    request.headers_mut().insert("authorization", format!("Bearer {key}").parse()?);
    let (mut socket, _) = connect_async(request).await?;
    // A word is a small packet that should not wait for the next one.
    if let MaybeTlsStream::Plain(stream) = socket.get_mut() {
        stream.set_nodelay(true)?;
    }
    Ok(socket)
}

/// Text-to-speech would be here.
fn speak(text: &str) {
    print!("{text}");
    let _ = std::io::stdout().flush();
}

/// The tools, as the model gets to know them.
fn tools() -> Value {
    // A maximum length keeps a small model from running on inside an argument.
    let order = json!({"type": "object", "required": ["order_id"],
                       "properties": {"order_id": {"type": "string", "maxLength": 8}}});
    json!([
        {"type": "function", "name": "find_order", "description": "Looks up the state of an order.", "parameters": order},
        {"type": "function", "name": "cancel_order", "description": "Cancels an order.", "parameters": order},
    ])
}

/// Runs a call. Whatever goes wrong is told to the model, which can put it into words.
fn run(call: &Value, orders: &mut HashMap<&str, &str>) -> Value {
    let arguments: Value =
        call["arguments"].as_str().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let id = arguments["order_id"].as_str().unwrap_or_default();
    eprintln!("[{} {id}]", call["name"].as_str().unwrap_or_default());
    match (call["name"].as_str(), orders.get_mut(id)) {
        (_, None) => json!({"error": "There is no such order."}),
        (Some("find_order"), Some(state)) => json!({"order": id, "state": state}),
        (Some("cancel_order"), Some(state)) if *state == "packed" => {
            *state = "cancelled";
            json!({"order": id, "state": state})
        }
        (_, Some(state)) => json!({"error": format!("It cannot be cancelled, it is {state}.")}),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let url = setting("ELECTRON_URL", "ws://127.0.0.1:8080/v1/realtime");
    let mut call = Call::begin(url, setting("ELECTRON_API_KEY", "")).await?;
    let session = json!({"type": "realtime", "instructions": INSTRUCTIONS, "tools": tools(), "max_output_tokens": 80});
    call.send(json!({"type": "session.update", "session": session})).await?;
    let mut orders = HashMap::from([("1234", "packed"), ("5678", "shipped")]);
    speak("Hello, how can I help you?\n");
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(words) = lines.next_line().await? {
        call.hear(&words).await?;
        call.answer(&mut orders).await?;
    }
    Ok(())
}
