//! Twilio ConversationRelay: Twilio does speech-to-text and text-to-speech, and sends and takes text over a WebSocket.
//!
//! Served under `/agents/{name}/twilio/relay`; `/agents/{name}/twilio/voice` is the webhook for a phone number, which answers
//! the TwiML that leads there, and `/agents/{name}/twilio/action` is asked when the WebSocket has ended.
//! Follows <https://www.twilio.com/docs/voice/conversationrelay/websocket-messages>.
//!
//! - Text leaves in whole words, since speech is made of what has arrived. Each message of the model's is an utterance of
//!   its own, so that a filler is spoken while its tool runs.
//! - `interrupt` brings the words that were heard. What of the answer is still on its way is not spoken any more.
//! - Digits are collected until the key that ends them, or a pause, and are a turn of the caller's then.
//! - A WebSocket that comes back for the same call goes on with its session.

use std::{sync::Arc, time::Duration};

use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::{
    phone::{Line, Opening, left_hanging},
    socket::{Flow, Frames, Protocol, TAKEN_OVER},
};
use crate::{
    error::Error,
    session::{Delivery, Event, Item, Role, new_id},
    tool::control::Request,
};

/// Letters a second of speech, to tell when what was sent has been spoken.
const LETTERS_PER_SECOND: u32 = 15;
/// Longest that a goodbye is waited for.
const LONGEST_GOODBYE: Duration = Duration::from_secs(20);
/// How long Twilio may take to close the connection after the end.
const CLOSING: Duration = Duration::from_secs(5);
/// Longest text of what Twilio tells that is kept.
const LONGEST_TEXT: usize = 16 << 10;

// === wire types ===

#[derive(Serialize)]
struct Text<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    token: &'a str,
    last: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    lang: Option<&'a str>,
    interruptible: bool,
}

/// What is asked of Twilio's `<Connect>` when the session ended with a transfer.
pub fn handoff(request: &Request) -> Value {
    match request {
        Request::Transfer { name, number, reason } => {
            json!({"reason": "transfer_call", "transfer_to": name, "number": number, "details": reason})
        }
        Request::End { reason } => json!({"reason": "end_call", "details": reason}),
        Request::Digits(_) | Request::Language(_) => Value::Null,
    }
}

// === TwiML ===

/// Answers a call: the caller is connected with the agent. `url` is that of the relay, `action` is asked at the end.
pub fn connect_twiml(url: &str, action: &str, language: &str) -> String {
    let language = match language {
        "" => String::new(),
        language => format!(" language=\"{}\"", escape(language)),
    };
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Response><Connect action=\"{}\"><ConversationRelay url=\"{}\"{language} \
         interruptible=\"any\" dtmfDetection=\"true\" partialPrompts=\"true\"/></Connect></Response>",
        escape(action),
        escape(url)
    )
}

/// Dials a number.
pub fn dial_twiml(number: &str) -> String {
    let number = escape(number);
    let noun = if number.starts_with("sip:") { format!("<Sip>{number}</Sip>") } else { number };
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?><Response><Dial>{noun}</Dial></Response>")
}

/// Ends the call.
pub fn hangup_twiml() -> String {
    "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Response><Hangup/></Response>".into()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

// === connection ===

/// A call on a WebSocket.
pub struct Connection {
    opening: Opening,
    /// Once Twilio has told which call it is.
    line: Option<Line>,
    /// The language that is spoken now, where it is known.
    language: Option<String>,
    /// The beginning of a word that is not complete.
    tail: String,
    /// Whether something of the present utterance was sent.
    speaking: bool,
    /// When all that was sent has been spoken, as far as that can be told.
    spoken_by: Instant,
    digits: String,
    digits_due: Option<Instant>,
    /// What the agent asked for once all is said.
    last: Option<Request>,
    /// When it is done.
    last_due: Option<Instant>,
    /// When the connection is closed if Twilio does not.
    closing: Option<Instant>,
}

impl Connection {
    /// A connection that waits for its setup message.
    pub fn new(opening: Opening) -> Self {
        Self {
            opening,
            line: None,
            language: None,
            tail: String::new(),
            speaking: false,
            spoken_by: Instant::now(),
            digits: String::new(),
            digits_due: None,
            last: None,
            last_due: None,
            closing: None,
        }
    }

    async fn act(&mut self, event: &Value, out: &mut Frames) -> Result<(), Error> {
        let text = |name: &str| event[name].as_str().unwrap_or_default();
        // Who is being handed over, or has been said goodbye, is not answered any more.
        let leaves = self.closing.is_some() || matches!(self.last, Some(Request::Transfer { .. }));
        match (text("type"), &mut self.line) {
            ("prompt" | "interrupt" | "dtmf", _) if leaves => Ok(()),
            ("setup", None) => self.setup(event, out).await,
            ("error", _) => {
                tracing::warn!(description = text("description"), "twilio reports an error");
                Ok(())
            }
            ("prompt", Some(line)) => {
                let words = cut(text("voicePrompt")).trim();
                if words.is_empty() {
                    return Ok(());
                }
                if event["last"] == false {
                    return line.partial(words).await;
                }
                let plain =
                    |lang: &&str| lang.len() <= 16 && lang.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
                if let (None, Some(lang)) = (line.language(), event["lang"].as_str().filter(plain)) {
                    self.language = Some(lang.to_owned());
                }
                self.said(words.to_owned(), out).await
            }
            ("interrupt", Some(line)) => {
                let heard = event["utteranceUntilInterrupt"].as_str().map(|heard| cut(heard).to_owned());
                (self.tail, self.speaking, self.spoken_by) = (String::new(), false, Instant::now());
                line.interrupt(heard).await
            }
            ("dtmf", Some(_)) => self.pressed(text("digit"), out).await,
            (kind, _) => {
                tracing::debug!(kind, "not understood");
                Ok(())
            }
        }
    }

    async fn setup(&mut self, event: &Value, out: &mut Frames) -> Result<(), Error> {
        let mut caller = Map::new();
        if let Value::Object(parameters) = &event["customParameters"] {
            caller.extend(parameters.iter().map(|(name, value)| (name.clone(), value.clone())));
        }
        for (name, field) in [
            ("caller", "from"),
            ("called", "to"),
            ("caller_name", "callerName"),
            ("forwarded_from", "forwardedFrom"),
            ("direction", "direction"),
            ("call_id", "callSid"),
        ] {
            if let Some(value) = event[field].as_str().filter(|value| !value.is_empty()) {
                caller.insert(name.into(), value.into());
            }
        }
        let call = event["callSid"].as_str().filter(|sid| (1..=64).contains(&sid.len()));
        let call = call.ok_or_else(|| Error::invalid("callSid", "callSid is required"))?;
        let line = self.opening.line("conversation_relay", call, &caller).await?;
        self.language = line.language().map(str::to_owned);
        if let (false, Some(greeting)) = (line.resumed, line.greeting()) {
            let greeting = greeting.to_owned();
            line.spoke(&greeting).await?;
            self.say(&greeting, true, out);
        }
        if let Some(last) = &line.last {
            (self.last, self.last_due) = (Some(last.clone()), Some(Instant::now()));
        }
        self.line = Some(line);
        Ok(())
    }

    /// The caller has spoken.
    async fn said(&mut self, words: String, out: &mut Frames) -> Result<(), Error> {
        // Who is still talking does not want to hang up.
        (self.last, self.last_due) = (None, None);
        // Keys that were pressed before come before.
        self.digits_due = None;
        let keys = std::mem::take(&mut self.digits);
        let Some(line) = &mut self.line else { return Ok(()) };
        if line.active.is_some() {
            (self.tail, self.spoken_by) = (String::new(), Instant::now());
            // What was cut off ends here. Otherwise Twilio would put the answer behind it, in the same utterance.
            self.say("", true, out);
        }
        let Some(line) = &mut self.line else { return Ok(()) };
        let said = [keys, words].into_iter().filter(|said| !said.is_empty());
        let input = said.map(|said| Arc::new(Item::message(new_id("msg"), Role::User, said))).collect();
        line.ask(input, None).await.map(drop)
    }

    async fn pressed(&mut self, digit: &str, out: &mut Frames) -> Result<(), Error> {
        let Some(dtmf) = self.line.as_ref().map(Line::dtmf) else { return Ok(()) };
        let Some(digit) =
            digit.chars().next().filter(|digit| digit.is_ascii_digit() || matches!(digit, '*' | '#' | 'A'..='D'))
        else {
            return Ok(());
        };
        if dtmf.finish_on == Some(digit) {
            return self.dialled(out).await;
        }
        self.digits.push(digit);
        if self.digits.len() >= dtmf.max_digits {
            return self.dialled(out).await;
        }
        self.digits_due = Some(Instant::now() + dtmf.timeout);
        Ok(())
    }

    /// The digits are complete.
    async fn dialled(&mut self, out: &mut Frames) -> Result<(), Error> {
        self.digits_due = None;
        match std::mem::take(&mut self.digits) {
            digits if digits.is_empty() => Ok(()),
            digits => self.said(digits, out).await,
        }
    }

    /// Sends text, whole words at a time; at the end of an utterance all that is left.
    fn say(&mut self, text: &str, last: bool, out: &mut Frames) {
        self.tail.push_str(text);
        let end = if last { self.tail.len() } else { word_end(&self.tail) };
        if end == 0 && !(last && self.speaking) {
            return;
        }
        let rest = self.tail.split_off(end.min(self.tail.len()));
        let token = std::mem::replace(&mut self.tail, rest);
        let lang = self.language.as_deref();
        out.push(&Text { kind: "text", token: &token, last, lang, interruptible: true });
        self.speaking = !last;
        let letters = u32::try_from(token.chars().count()).unwrap_or(u32::MAX);
        self.spoken_by = self.spoken_by.max(Instant::now()) + Duration::from_secs(1) * letters / LETTERS_PER_SECOND;
    }

    fn trouble(&mut self, out: &mut Frames) {
        let language = self.language.clone();
        if let Some(line) = &mut self.line {
            let phrase = line.trouble(language.as_deref());
            self.tail.clear();
            self.say(phrase, true, out);
        }
    }

    fn render(&mut self, delivery: &Delivery, out: &mut Frames) {
        let muted = |response: &str| self.line.as_ref().is_some_and(|line| line.is_muted(response));
        match &*delivery.event {
            Event::Text { at, delta, .. } if !muted(&at.response) => {
                self.say(delta, false, out);
                self.line.iter_mut().for_each(|line| line.makes(&at.response));
            }
            Event::OutputEnded { at, item } if item.spoken().is_some() && !muted(&at.response) => {
                self.say("", true, out);
            }
            Event::Control { response, request } if !muted(response) => match request {
                Request::Digits(digits) => out.push(&json!({"type": "sendDigits", "digits": digits})),
                Request::Language(language) => {
                    self.language = Some(language.clone());
                    out.push(&json!({"type": "language", "ttsLanguage": language, "transcriptionLanguage": language}));
                }
                last => self.last = Some(last.clone()),
            },
            Event::Ended(response) if !muted(&response.id) => {
                if left_hanging(response) {
                    self.trouble(out);
                }
                if self.last.is_some() {
                    let longest = Instant::now() + LONGEST_GOODBYE;
                    self.last_due = Some(self.spoken_by.min(longest));
                }
                self.over(&response.id);
            }
            Event::Refused { cause, error } if cause.as_deref().is_some_and(|id| id.starts_with("resp_")) => {
                let id = cause.clone().unwrap_or_default();
                if !muted(&id) {
                    tracing::warn!(%error, "a turn was refused");
                    self.trouble(out);
                }
                self.over(&id);
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

impl Protocol for Connection {
    async fn receive(&mut self, event: Value, out: &mut Frames) -> Flow {
        match self.act(&event, out).await {
            Ok(()) => Flow::GoOn,
            Err(error) if self.line.is_none() => {
                tracing::warn!(%error, "the call cannot be answered");
                Flow::Close(1011, "the call cannot be answered".into())
            }
            Err(error) => {
                tracing::warn!(%error, "the call has trouble");
                self.trouble(out);
                Flow::GoOn
            }
        }
    }

    fn refuse(&mut self, error: Error, _out: &mut Frames) {
        // Twilio reads no errors, and a frame that is none of its own must not end a call.
        tracing::warn!(%error, "a frame was not understood");
    }

    async fn deliver(&mut self, out: &mut Frames) -> Flow {
        let due = [self.digits_due, self.last_due, self.closing].into_iter().flatten().min();
        let due = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let next = async {
            match &mut self.line {
                Some(line) => line.deliveries.recv().await,
                None => std::future::pending().await,
            }
        };
        let delivery = tokio::select! {
            delivery = next => Some(delivery),
            () = due => None,
        };
        match delivery {
            Some(None) if self.line.as_ref().is_some_and(|line| line.session.is_closed()) => {
                Flow::Close(1000, "the call is over".into())
            }
            Some(None) => Flow::Close(TAKEN_OVER, "another connection goes on with this call".into()),
            Some(Some(delivery)) => {
                self.render(&delivery, out);
                while let Some(delivery) = self.line.as_mut().and_then(|line| line.deliveries.try_recv().ok()) {
                    self.render(&delivery, out);
                }
                Flow::GoOn
            }
            None if self.closing.is_some_and(|due| due <= Instant::now()) => {
                Flow::Close(1000, "the call is over".into())
            }
            // What is due is done without being dropped in the middle.
            None => Flow::GoOn,
        }
    }

    async fn settle(&mut self, out: &mut Frames) {
        let now = Instant::now();
        if self.digits_due.is_some_and(|due| due <= now)
            && let Err(error) = self.dialled(out).await
        {
            tracing::warn!(%error, "the call has trouble");
            self.trouble(out);
        }
        if self.last_due.is_some_and(|due| due <= now) {
            self.last_due = None;
            if let Some(last) = self.last.take() {
                out.push(&json!({"type": "end", "handoffData": handoff(&last).to_string()}));
                self.closing = Some(now + CLOSING);
            }
        }
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

/// Where the last complete word ends: behind a space, or a letter of a script that has none.
fn word_end(text: &str) -> usize {
    let ends = |c: char| {
        c.is_whitespace()
            || matches!(c, '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}'
                | '\u{2e80}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{ff00}'..='\u{ffef}' | '\u{20000}'..)
    };
    text.char_indices().rev().find(|(_, c)| ends(*c)).map_or(0, |(at, c)| at + c.len_utf8())
}

/// What Twilio tells, within bounds.
fn cut(text: &str) -> &str {
    text.char_indices().nth(LONGEST_TEXT).map_or(text, |(end, _)| &text[..end])
}
