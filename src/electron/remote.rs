//! Electron over a model on other servers, which knows nothing of fillers and may make calls that are not valid.
//!
//! Text passes as it comes. A call is held until its arguments are complete, since no tool could run before, and checked
//! against its schema; one that is not valid is asked for again, once, with what is wrong with it. The filler does not
//! wait for that: it leaves as the call begins, and where the turn has to call a tool, before the server is asked.
//!
//! Without a voice agent's prompt `content` is `null` beside calls. A server may say something before it calls all the
//! same. Where the turn has to call, such words are dropped; where the caller takes the answer as a whole, they are held
//! until it is known that no call follows. In a stream they have left by then: what the caller waits for is not held back
//! for what might follow.

use std::{collections::VecDeque, sync::Arc};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use serde_json::Value;
use uuid::Uuid;

use super::{Filler, fills};
use crate::{
    engine::upstream::{Answer, Upstreams},
    error::{Error, Fault},
    turn::{
        FillerPolicy, FinishReason, Message, Model, Progress, Readiness, Tool, ToolCall, ToolChoice, Turn, TurnEvent,
        TurnStream, Usage,
    },
};

/// Longest arguments of a call.
const ARGUMENTS: usize = 1 << 20;

/// A model on other servers.
pub struct Remote {
    upstreams: Arc<Upstreams>,
    /// What answers when none of its servers does.
    fallback: Option<Fallback>,
}

/// Another model, by the time that it is needed.
pub type Fallback = Box<dyn Fn() -> Option<Arc<dyn Model>> + Send + Sync>;

// === impl Remote ===

impl Remote {
    /// Puts the layer on a model's servers.
    pub fn new(upstreams: Arc<Upstreams>, fallback: Option<Fallback>) -> Self {
        Self { upstreams, fallback }
    }

    /// The servers, for their figures.
    pub fn upstreams(&self) -> &Upstreams {
        &self.upstreams
    }

    async fn speak(self: Arc<Self>, turn: Turn) -> Result<TurnStream, Error> {
        let must = matches!(turn.tool_choice, ToolChoice::Required | ToolChoice::Named(_)) && !turn.tools.is_empty();
        let filler = fills(&turn).then(|| Filler::new(&turn));
        let mut speaking = Speaking {
            remote: self.clone(),
            other: None,
            speaks: filler.is_some(),
            must,
            holds: filler.is_none() && turn.whole && !turn.tools.is_empty() && !must,
            tools: turn.tools.clone(),
            turn: None,
            answer: None,
            ready: VecDeque::new(),
            filler,
            spoken: false,
            held: String::new(),
            call: None,
            wrong: Vec::new(),
            made: 0,
            repaired: Usage::default(),
            progress: Arc::default(),
            over: false,
        };
        let progress = speaking.progress.clone();
        if must && speaking.filler.as_ref().is_some_and(|filler| filler.goodbyes.is_empty()) {
            speaking.fill(None);
        } else {
            match self.upstreams.start(&turn).await {
                Ok(answer) => speaking.begin(answer),
                Err(e) => return self.other(e)?.turn(turn).await,
            }
        }
        speaking.turn = (!speaking.tools.is_empty()).then(|| Box::new(turn));
        let events = stream::unfold(speaking, |mut speaking| async move { Some((speaking.next().await?, speaking)) });
        Ok(TurnStream::new(events, progress))
    }

    /// The model that answers in this one's place, if what went wrong is that none of its servers does.
    ///
    /// # Errors
    /// What went wrong, where there is none.
    fn other(&self, wrong: Error) -> Result<Arc<dyn Model>, Error> {
        if !matches!(wrong, Error::EngineFailed(_) | Error::Overloaded { .. }) {
            return Err(wrong);
        }
        let other = self.fallback.as_ref().and_then(|fallback| fallback()).ok_or(wrong.clone())?;
        tracing::warn!(error = %wrong, "another model answers in this one's place");
        Ok(other)
    }
}

impl Model for Remote {
    fn turn(self: Arc<Self>, turn: Turn) -> BoxFuture<'static, Result<TurnStream, Error>> {
        self.speak(turn).boxed()
    }

    /// Its servers read ahead by themselves, or not.
    fn warm(self: Arc<Self>, _turn: Turn) -> BoxFuture<'static, Result<Usage, Error>> {
        futures::future::ready(Ok(Usage::default())).boxed()
    }

    fn check_tools(&self, tools: &[Tool]) -> Result<(), Error> {
        for (at, tool) in tools.iter().enumerate() {
            jsonschema::validator_for(&tool.parameters).map_err(|e| {
                let why = format!("the parameters of `{}` are no JSON schema: {e}", tool.name);
                Error::Invalid(vec![Fault::new(
                    ["tools".into(), at.into(), "function".into(), "parameters".into()],
                    why,
                )])
            })?;
        }
        Ok(())
    }

    fn context(&self) -> usize {
        self.upstreams.settings().context
    }

    fn readiness(&self) -> Readiness {
        match (self.upstreams.readiness(), self.fallback.as_ref().and_then(|fallback| fallback())) {
            (Readiness::NotReady(_), Some(other)) => other.readiness(),
            (own, _) => own,
        }
    }
}

/// A call while it comes.
struct Call {
    name: String,
    arguments: String,
}

/// A turn's events, made from those of a server.
struct Speaking {
    remote: Arc<Remote>,
    /// The answer of the model that takes this one's place.
    other: Option<TurnStream>,
    tools: Arc<[Tool]>,
    /// What may be asked again: a turn with tools.
    turn: Option<Box<Turn>>,
    /// Whether the turn has to call a tool.
    must: bool,
    /// Whether it speaks before it calls.
    speaks: bool,
    /// Whether text is held until it is known that no call follows.
    holds: bool,
    /// `None` before the server is asked.
    answer: Option<Answer>,
    ready: VecDeque<TurnEvent>,
    /// Taken when it is used, or when the model speaks for itself.
    filler: Option<Filler>,
    spoken: bool,
    held: String,
    /// A call that is not complete.
    call: Option<Call>,
    /// Calls that are not valid, and why.
    wrong: Vec<(Call, String)>,
    /// Calls that left.
    made: usize,
    /// What calls that were asked for again have cost.
    repaired: Usage,
    progress: Arc<Progress>,
    over: bool,
}

// === impl Speaking ===

impl Speaking {
    async fn next(&mut self) -> Option<Result<TurnEvent, Error>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            if let Err(e) = self.step().await {
                self.over = true;
                return Some(Err(e));
            }
        }
    }

    async fn step(&mut self) -> Result<(), Error> {
        if let Some(other) = &mut self.other {
            let event = other.next().await;
            self.progress.set(other.usage());
            return match event {
                Some(Ok(event)) => {
                    self.pass(event);
                    Ok(())
                }
                Some(Err(e)) => Err(e),
                None => Err(Error::EngineFailed("it stopped in the middle of an answer".into())),
            };
        }
        if let (None, Some(turn)) = (&self.answer, &self.turn) {
            match Box::pin(self.remote.upstreams.start(turn)).await {
                Ok(answer) => self.begin(answer),
                Err(e) => {
                    // The phrase has been said.
                    let turn = Turn { filler: FillerPolicy::Never, ..(**turn).clone() };
                    self.other = Some(self.remote.other(e)?.turn(turn).await?);
                    return Ok(());
                }
            }
        }
        let Some(answer) = &mut self.answer else { return Ok(()) };
        let event = answer.next().await;
        let usage = answer.usage();
        self.progress.set(sum(usage, self.repaired));
        match event {
            Some(Ok(event)) => self.take(event).await,
            Some(Err(e)) => Err(e),
            None => Err(Error::EngineFailed("its server stopped in the middle of an answer".into())),
        }
    }

    fn begin(&mut self, answer: Answer) {
        self.progress.comes_from(answer.origin().clone());
        self.answer = Some(answer);
    }

    /// Passes on what another model says.
    fn pass(&mut self, event: TurnEvent) {
        self.over = matches!(event, TurnEvent::Finished { .. });
        self.ready.push_back(event);
    }

    async fn take(&mut self, event: TurnEvent) -> Result<(), Error> {
        match event {
            // The phrase has been said, or nothing is to be said.
            TurnEvent::Text { .. } if self.must || (!self.speaks && self.calls()) => {}
            TurnEvent::Text { delta, .. } if self.holds => self.held.push_str(&delta),
            TurnEvent::Text { delta, logprobs } => {
                // White space at the start of a turn is no speech.
                if self.spoken || !delta.trim_start().is_empty() {
                    let delta = if self.spoken { delta } else { delta.trim_start().to_owned() };
                    self.spoken = true;
                    self.filler = None;
                    self.ready.push_back(TurnEvent::Text { delta, logprobs });
                }
            }
            TurnEvent::CallBegun { name, .. } => {
                self.held.clear();
                self.fill(Some(&name));
                self.call = Some(Call { name, arguments: String::new() });
            }
            TurnEvent::Arguments { delta, .. } => {
                if let Some(call) = &mut self.call {
                    if call.arguments.len() + delta.len() > ARGUMENTS {
                        return Err(Error::EngineFailed("the arguments of a call have no end".into()));
                    }
                    call.arguments.push_str(&delta);
                }
            }
            TurnEvent::CallEnded { .. } => {
                if let Some(call) = self.call.take() {
                    match checked(self.tools.clone(), call).await? {
                        (call, Ok(())) => self.make(call),
                        (call, Err(why)) => self.wrong.push((call, why)),
                    }
                }
            }
            TurnEvent::Finished { reason, usage } => {
                for (call, why) in std::mem::take(&mut self.wrong) {
                    // Rare, and larger than all the rest.
                    let call = Box::pin(self.again(call, &why)).await?;
                    self.make(call);
                }
                if !self.held.is_empty() {
                    let delta = std::mem::take(&mut self.held);
                    self.ready.push_back(TurnEvent::Text { delta, logprobs: Vec::new() });
                }
                let reason = if self.made > 0 { FinishReason::ToolCalls } else { reason };
                let usage = sum(usage, self.repaired);
                self.progress.set(usage);
                self.ready.push_back(TurnEvent::Finished { reason, usage });
                self.over = true;
            }
        }
        Ok(())
    }

    /// Whether the turn has made a call, be it complete and valid or not.
    fn calls(&self) -> bool {
        self.made > 0 || self.call.is_some() || !self.wrong.is_empty()
    }

    fn make(&mut self, call: Call) {
        let index = self.made;
        self.made += 1;
        let id = format!("call_{}", Uuid::now_v7().simple());
        self.ready.push_back(TurnEvent::CallBegun { index, id, name: call.name });
        self.ready.push_back(TurnEvent::Arguments { index, delta: call.arguments });
        self.ready.push_back(TurnEvent::CallEnded { index });
    }

    /// Asks again for a call that is not valid.
    async fn again(&mut self, call: Call, why: &str) -> Result<Call, Error> {
        metrics::counter!("electron_calls_repaired_total").increment(1);
        tracing::info!(tool = call.name, why, "a call is not valid and is asked for again");
        let turn = self.turn.as_deref();
        let mut turn = turn.cloned().ok_or_else(|| Error::EngineFailed("it made a call without a tool".into()))?;
        let known = turn.tools.iter().any(|tool| tool.name == call.name);
        turn.tool_choice = if known { ToolChoice::Named(call.name.clone()) } else { ToolChoice::Required };
        turn.parallel_tool_calls = false;
        let id = format!("call_{}", Uuid::now_v7().simple());
        let content = format!("This call was not made, because {why}. Make it again so that it is right.");
        let tool_calls = vec![ToolCall { id: id.clone(), name: call.name, arguments: call.arguments }];
        turn.messages.push(Message::Assistant { content: None, tool_calls });
        turn.messages.push(Message::Tool { call_id: id, content });
        let mut answer = self.remote.upstreams.start(&turn).await?;
        let mut new: Option<Call> = None;
        let mut first = true;
        while let Some(event) = answer.next().await {
            match event? {
                TurnEvent::CallBegun { index: 0, name, .. } => new = Some(Call { name, arguments: String::new() }),
                TurnEvent::Arguments { index: 0, delta } if first => {
                    if let Some(new) = new.as_mut().filter(|new| new.arguments.len() + delta.len() <= ARGUMENTS) {
                        new.arguments.push_str(&delta);
                    }
                }
                TurnEvent::CallEnded { index: 0 } => first = false,
                _ => {}
            }
        }
        self.repaired = sum(self.repaired, answer.usage());
        let new = new.ok_or_else(|| Error::EngineFailed(format!("it made a call that is not valid: {why}")))?;
        match checked(self.tools.clone(), new).await? {
            (new, Ok(())) => Ok(new),
            (_, Err(why)) => Err(Error::EngineFailed(format!("it made a call twice that is not valid: {why}"))),
        }
    }

    fn fill(&mut self, tool: Option<&str>) {
        if let Some(filler) = self.filler.take() {
            self.spoken = true;
            self.ready.push_back(TurnEvent::Text { delta: filler.draw(tool), logprobs: Vec::new() });
            metrics::histogram!("electron_filler_delay_seconds").record(0.0);
        }
    }
}

/// A call, and what is wrong with it.
async fn checked(tools: Arc<[Tool]>, mut call: Call) -> Result<(Call, Result<(), String>), Error> {
    // What schemas and patterns clients send decides how long this takes.
    let checked = tokio::task::spawn_blocking(move || {
        let verdict = check(&tools, &mut call);
        (call, verdict)
    });
    checked.await.map_err(|e| Error::Internal(e.to_string()))
}

/// Whether a call is one of a tool of these with arguments that its schema allows. No arguments become an empty object.
///
/// # Errors
/// What is wrong, for the model to read.
fn check(tools: &[Tool], call: &mut Call) -> Result<(), String> {
    let Some(tool) = tools.iter().find(|tool| tool.name == call.name) else {
        let names: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).collect();
        return Err(format!("there is no tool `{}`; there are {}", call.name, names.join(", ")));
    };
    if call.arguments.trim().is_empty() {
        call.arguments = "{}".into();
    }
    let arguments: Value =
        serde_json::from_str(&call.arguments).map_err(|e| format!("its arguments are no valid JSON: {e}"))?;
    if !arguments.is_object() {
        return Err("its arguments are no JSON object".into());
    }
    // What is no schema cannot be kept to.
    let Ok(validator) = jsonschema::validator_for(&tool.parameters) else { return Ok(()) };
    let faults: Vec<String> = validator
        .iter_errors(&arguments)
        .take(4)
        .map(|fault| match fault.instance_path.as_str() {
            "" => fault.to_string(),
            path => format!("{path}: {fault}"),
        })
        .collect();
    if faults.is_empty() { Ok(()) } else { Err(format!("its arguments are wrong: {}", faults.join("; "))) }
}

fn sum(one: Usage, other: Usage) -> Usage {
    Usage {
        prompt_tokens: one.prompt_tokens + other.prompt_tokens,
        cached_tokens: one.cached_tokens + other.cached_tokens,
        completion_tokens: one.completion_tokens + other.completion_tokens,
    }
}
