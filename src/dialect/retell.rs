//! Retell's custom LLM: Retell does speech-to-text, text-to-speech and turn-taking, and asks for words over a WebSocket.
//!
//! Served under `/agents/{name}/retell/llm-websocket/{call_id}`, and with a secret segment in front of `llm-websocket`.
//! Follows <https://docs.retellai.com/api-references/llm-websocket>.
//!
//! - Retell's transcript decides what was heard and what the caller said. The session keeps beside it what only it knows:
//!   calls and their results.
//! - A newer `response_id` ends the response before it.
//! - Calls and results are told for Retell's log.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    phone::{Line, Opening, left_hanging},
    socket::{Flow, Frames, Protocol, TAKEN_OVER},
};
use crate::{
    error::Error,
    session::{Content, Delivery, Event, Id, Item, Role, RunState, new_id},
    tool::control::Request,
};

/// Largest message that is read, in bytes: each brings the whole call so far, and the time of every word.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Said to the model when the caller has been silent for so long that Retell asks for a word.
const REMINDER: &str = "The caller has been silent for a while. Ask in one short sentence whether they are still there, or \
                        help them on.";

// === wire types ===

#[derive(Serialize)]
struct Words<'a> {
    response_type: &'static str,
    response_id: i64,
    content: &'a str,
    content_complete: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    end_call: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    transfer_number: Option<&'a str>,
}

/// What a transcript says, in order.
fn utterances(event: &Value) -> Vec<(Role, String)> {
    let list = event["transcript"].as_array().map(Vec::as_slice).unwrap_or_default();
    let read = |utterance: &Value| {
        let role = match utterance["role"].as_str()? {
            "agent" => Role::Assistant,
            "user" => Role::User,
            _ => return None,
        };
        Some((role, utterance["content"].as_str()?.to_owned()))
    };
    list.iter().filter_map(read).collect()
}

// === connection ===

/// A call on a WebSocket.
pub struct Connection {
    opening: Opening,
    call: String,
    line: Option<Line>,
    /// Sent before anything else.
    config: bool,
    /// The request that is being answered, with the response that answers it.
    answering: Option<(i64, Id)>,
    /// The newest request.
    newest: i64,
    /// What the agent asked for once all is said.
    last: Option<Request>,
}

impl Connection {
    /// A connection for this call.
    pub fn new(opening: Opening, call: String) -> Self {
        Self { opening, call, line: None, config: true, answering: None, newest: 0, last: None }
    }

    async fn act(&mut self, event: &Value, out: &mut Frames) -> Result<(), Error> {
        match event["interaction_type"].as_str().unwrap_or_default() {
            "ping_pong" => {
                out.push(&json!({"response_type": "ping_pong", "timestamp": event["timestamp"]}));
                Ok(())
            }
            "call_details" => self.begin(&event["call"], out).await,
            "update_only" => {
                let Some(line) = &self.line else { return Ok(()) };
                // Who speaks at the moment, and so far; the model reads along.
                match utterances(event).pop() {
                    Some((Role::User, words)) if self.answering.is_none() => line.partial(words.trim()).await,
                    _ => Ok(()),
                }
            }
            kind @ ("response_required" | "reminder_required") => {
                let id = event["response_id"].as_i64();
                let id = id.ok_or_else(|| Error::invalid("response_id", "response_id is required"))?;
                if self.line.is_none() {
                    // The call's details may be turned off.
                    self.begin(&Value::Null, out).await?;
                }
                self.answer(id, utterances(event), kind == "reminder_required").await
            }
            kind => {
                tracing::debug!(kind, "not understood");
                Ok(())
            }
        }
    }

    /// Begins the call, with what is known of it.
    async fn begin(&mut self, call: &Value, out: &mut Frames) -> Result<(), Error> {
        if self.line.is_some() {
            return Ok(());
        }
        let mut caller = Map::new();
        for given in ["metadata", "retell_llm_dynamic_variables"] {
            if let Value::Object(given) = &call[given] {
                caller.extend(given.iter().map(|(name, value)| (name.clone(), value.clone())));
            }
        }
        for (name, field) in [("caller", "from_number"), ("called", "to_number"), ("direction", "direction")] {
            if let Some(value) = call[field].as_str() {
                caller.insert(name.into(), value.into());
            }
        }
        caller.insert("call_id".into(), self.call.as_str().into());
        let line = self.opening.line("retell", &self.call, &caller).await?;
        if !line.resumed {
            // Without words the caller speaks first.
            let greeting = line.greeting().unwrap_or_default().to_owned();
            if !greeting.is_empty() {
                line.spoke(&greeting).await?;
            }
            words(0, &greeting, true, None, out);
        }
        self.line = Some(line);
        Ok(())
    }

    async fn answer(&mut self, id: i64, transcript: Vec<(Role, String)>, reminder: bool) -> Result<(), Error> {
        let Some(line) = &mut self.line else { return Ok(()) };
        if id < self.newest {
            return Ok(());
        }
        self.newest = id;
        self.last = None;
        let input =
            if reminder { vec![Arc::new(Item::message(new_id("msg"), Role::System, REMINDER))] } else { Vec::new() };
        let response = line.ask(input, Some(transcript)).await?;
        self.answering = Some((id, response));
        Ok(())
    }

    /// The request that a response answers, unless it is void by now.
    fn request(&self, response: &str) -> Option<i64> {
        self.answering.as_ref().filter(|(_, own)| **own == *response).map(|(id, _)| *id)
    }

    fn trouble(&mut self, id: i64, out: &mut Frames) {
        if let Some(line) = &mut self.line {
            words(id, line.trouble(None), false, None, out);
        }
    }

    fn render(&mut self, delivery: &Delivery, out: &mut Frames) {
        match &*delivery.event {
            Event::Text { at, delta, .. } => {
                if let Some(id) = self.request(&at.response) {
                    words(id, delta, false, None, out);
                }
            }
            Event::CallRuns { item, .. } => {
                if let Content::Call { call_id, name, arguments, .. } = &item.content {
                    out.push(&json!({"response_type": "tool_call_invocation", "tool_call_id": call_id, "name": name,
                                     "arguments": arguments}));
                }
            }
            Event::CallSettled(item) => result(item, out),
            Event::OutputEnded { at, item } => {
                result(item, out);
                // The next message begins with a new word.
                if item.spoken().is_some_and(|text| !text.is_empty() && !text.ends_with(char::is_whitespace))
                    && let Some(id) = self.request(&at.response)
                {
                    words(id, " ", false, None, out);
                }
            }
            Event::Control { response, request } if self.request(response).is_some() => {
                self.last = Some(request.clone());
            }
            Event::Ended(response) => {
                self.over(&response.id);
                if let Some(id) = self.request(&response.id) {
                    if left_hanging(response) {
                        self.trouble(id, out);
                    }
                    self.answering = None;
                    words(id, "", true, self.last.take().as_ref(), out);
                }
            }
            Event::Refused { cause: Some(cause), error } => {
                self.over(cause);
                if let Some(id) = self.request(cause) {
                    tracing::warn!(%error, "a turn was refused");
                    self.trouble(id, out);
                    self.answering = None;
                    words(id, "", true, None, out);
                }
            }
            _ => {}
        }
    }

    fn over(&mut self, response: &str) {
        if let Some(line) = self.line.as_mut().filter(|line| line.active.as_deref() == Some(response)) {
            line.active = None;
        }
    }
}

/// A part of what is said in answer to a request.
fn words(id: i64, content: &str, complete: bool, last: Option<&Request>, out: &mut Frames) {
    let transfer_number = match last {
        Some(Request::Transfer { number, .. }) => Some(number.as_str()),
        _ => None,
    };
    out.push(&Words {
        response_type: "response",
        response_id: id,
        content,
        content_complete: complete,
        end_call: matches!(last, Some(Request::End { .. })),
        transfer_number,
    });
}

/// The result of a call, for Retell's log.
fn result(item: &Item, out: &mut Frames) {
    if let (Some(call_id), Some(RunState::Done(answer))) = (item.call(), item.run().map(|run| &run.state)) {
        out.push(&json!({"response_type": "tool_call_result", "tool_call_id": call_id, "content": answer.output}));
    }
}

impl Protocol for Connection {
    async fn receive(&mut self, event: Value, out: &mut Frames) -> Flow {
        match self.act(&event, out).await {
            Ok(()) => Flow::GoOn,
            Err(error) => {
                tracing::warn!(%error, "the call has trouble");
                if let Some(id) = event["response_id"].as_i64() {
                    self.trouble(id, out);
                    words(id, "", true, None, out);
                }
                Flow::GoOn
            }
        }
    }

    fn refuse(&mut self, error: Error, _out: &mut Frames) {
        // Retell reads no errors, and a frame that is none of its own must not end a call.
        tracing::warn!(%error, "a frame was not understood");
    }

    async fn deliver(&mut self, out: &mut Frames) -> Flow {
        if std::mem::take(&mut self.config) {
            out.push(&json!({"response_type": "config", "config": {"auto_reconnect": true, "call_details": true}}));
            return Flow::GoOn;
        }
        let Some(line) = &mut self.line else { return std::future::pending().await };
        let Some(delivery) = line.deliveries.recv().await else {
            // To Retell the code 1000 means that the agent hangs up.
            return if line.session.is_closed() {
                Flow::Close(1000, "the call is over".into())
            } else {
                Flow::Close(TAKEN_OVER, "another connection goes on with this call".into())
            };
        };
        self.render(&delivery, out);
        while let Some(delivery) = self.line.as_mut().and_then(|line| line.deliveries.try_recv().ok()) {
            self.render(&delivery, out);
        }
        Flow::GoOn
    }

    async fn closed(&mut self, code: Option<u16>) {
        if let Some(line) = &mut self.line {
            line.closed(code).await;
        }
    }

    fn is_busy(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.active.is_some())
    }
}
