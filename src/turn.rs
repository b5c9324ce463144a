//! The vocabulary of the whole program: what a model turn needs, and what it produces.
//!
//! A dialect parses a client's request into a [`Turn`] and renders the [`TurnEvent`]s that come back. Nothing here
//! knows a wire format or an engine.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::{Stream, future::BoxFuture};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::Error;

/// Everything that one model turn needs.
#[derive(Clone, Debug)]
pub struct Turn {
    /// The conversation, oldest first. Every tool message answers a call of an earlier assistant message.
    pub messages: Vec<Message>,
    /// The tools that the model may call; names are unique.
    pub tools: Arc<[Tool]>,
    /// Whether the model may, must or must not call one of them.
    pub tool_choice: ToolChoice,
    /// Whether one turn may hold several calls.
    pub parallel_tool_calls: bool,
    /// How tokens are drawn and when to stop.
    pub sampling: Sampling,
    /// What form the answer's text has to take.
    pub format: OutputFormat,
    /// Whether the caller hears something before a tool runs.
    pub filler: FillerPolicy,
    /// The language that the agent speaks, such as `en-US`. Without it the caller's words tell.
    pub language: Option<Arc<str>>,
    /// Whether the answer is taken as a whole, when it is complete.
    pub whole: bool,
}

/// A model as sessions and dialects see it: turns in, events out.
pub trait Model: Send + Sync + 'static {
    /// Starts a turn. The stream ends with [`TurnEvent::Finished`] or an error; dropping it stops the generation.
    ///
    /// # Errors
    /// [`Error::Invalid`] and [`Error::ContextLength`] for the turn itself, [`Error::Overloaded`] when there is no place.
    fn turn(self: Arc<Self>, turn: Turn) -> BoxFuture<'static, Result<TurnStream, Error>>;

    /// Computes what a later turn will begin with while the model has nothing better to do. The turn's last message is
    /// taken as one that will go on: it may be empty. Dropping the future stops the work.
    ///
    /// Gives the tokens that are in the prefix cache then, and how many of them were before.
    ///
    /// # Errors
    /// As [`Model::turn`].
    fn warm(self: Arc<Self>, turn: Turn) -> BoxFuture<'static, Result<Usage, Error>>;

    /// Checks tools before a turn needs them. It may keep its thread busy for some milliseconds.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the tool whose schema cannot be used.
    fn check_tools(&self, tools: &[Tool]) -> Result<(), Error>;

    /// Tokens that a prompt and its answer may have together.
    fn context(&self) -> usize;

    /// Whether turns are likely to succeed now.
    fn readiness(&self) -> Readiness;

    /// Figures for the metrics page, where the model runs in this process.
    fn gauges(&self) -> Option<Gauges> {
        None
    }
}

impl dyn Model {
    /// Checks tools on a thread that may be kept busy.
    ///
    /// # Errors
    /// As [`Model::check_tools`].
    pub async fn check_tools_apart(self: &Arc<Self>, tools: Arc<[Tool]>) -> Result<(), Error> {
        let model = self.clone();
        tokio::task::spawn_blocking(move || model.check_tools(&tools))
            .await
            .map_err(|e| Error::Internal(e.to_string()))?
    }
}

/// Figures of an engine in this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauges {
    /// Generations that wait.
    pub queued: usize,
    /// Generations and warm-ups that run.
    pub running: usize,
    /// Bytes that the prefix cache may hold at this moment.
    pub prefix_cache_bytes: u64,
    /// How often the prefix cache was emptied to stay in its budget.
    pub prefix_cache_flushes: u64,
}

/// Whether a model can take work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It has answered a first token.
    Ready,
    /// Not yet or no longer, and why.
    NotReady(String),
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Instructions of the agent's operator.
    System(String),
    /// What the caller said.
    User(String),
    /// What the model said, called, or both.
    Assistant {
        /// Spoken or written text; `None` when the turn only called tools.
        content: Option<String>,
        /// The calls, in the order in which they were made.
        tool_calls: Vec<ToolCall>,
    },
    /// The result of one tool call.
    Tool {
        /// The [`ToolCall::id`] that this answers.
        call_id: String,
        /// The result as the tool gave it, text or JSON.
        content: String,
    },
}

/// A call that the model made.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Unique in the conversation, `call_…`.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// The arguments as JSON text.
    pub arguments: String,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Letters, digits, `_`, `-` and `.`, at most 64.
    pub name: String,
    /// What it does, for the model to read.
    pub description: Option<String>,
    /// JSON schema of the arguments, an object.
    pub parameters: Value,
    /// What the caller hears when the model calls it without a word.
    pub phrase: Phrase,
}

/// What the caller hears when the model calls a tool without a word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phrase {
    /// That it takes a moment.
    #[default]
    Filler,
    /// That the conversation ends here: these words, or some from the book.
    Goodbye(Option<Arc<str>>),
}

/// Whether the model may call tools.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// No calls.
    None,
    /// At least one call.
    Required,
    /// A call of this tool.
    Named(String),
}

/// What form the answer's text has to take.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum OutputFormat {
    /// Free text.
    #[default]
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema.
    JsonSchema(Value),
}

/// How tokens are drawn, and when to stop.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// 0 (greedy) to 2.
    pub temperature: f32,
    /// 0 to 1: the share of probability mass that is drawn from.
    pub top_p: f32,
    /// Most tokens to generate; `None` leaves it to the model's context.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Makes the turn repeatable.
    pub seed: Option<u64>,
    /// Added to the logits of these token ids, -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Subtracted once from the logit of each token that was already generated, -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted for every time that a token was already generated, -2 to 2.
    pub frequency_penalty: f32,
    /// Report log-probabilities, with this many alternatives a token.
    pub logprobs: Option<usize>,
}

impl Turn {
    /// Whether the model may call a tool.
    pub fn may_call(&self) -> bool {
        !self.tools.is_empty() && self.tool_choice != ToolChoice::None
    }
}

impl Sampling {
    /// Whether the likeliest token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature < 1e-4 || self.top_p <= 0.0
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            max_tokens: None,
            stop: Vec::new(),
            seed: None,
            logit_bias: Vec::new(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logprobs: None,
        }
    }
}

/// Whether the caller hears something before a tool runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FillerPolicy {
    /// When the system prompt is written in the style of a voice agent.
    #[default]
    Auto,
    /// In every turn that calls a tool.
    Always,
    /// Never: a turn that calls tools has no content.
    Never,
}

/// What a turn produces, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum TurnEvent {
    /// More text of the answer, or a filler phrase.
    Text {
        /// The text to add.
        delta: String,
        /// The tokens that it was made of, when log-probabilities were asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// A call has begun; its arguments follow.
    CallBegun {
        /// Position of the call in the turn, from 0.
        index: usize,
        /// Unique id, `call_…`.
        id: String,
        /// The tool's name.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call.
        index: usize,
        /// JSON text to add.
        delta: String,
    },
    /// A call's arguments are complete.
    CallEnded {
        /// Which call.
        index: usize,
    },
    /// The turn is over; nothing follows.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
}

/// Why a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model was done, or a stop text came up.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
    /// The turn ends with tool calls that wait for their results.
    ToolCalls,
    /// Somebody stopped the turn.
    Cancelled,
}

impl FinishReason {
    /// The name that OpenAI's chat API gives it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop | Self::Cancelled => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// What a turn cost, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// The part of the prompt that the prefix cache served.
    pub cached_tokens: usize,
    /// Tokens generated, call syntax included and the end-of-turn token not.
    pub completion_tokens: usize,
}

/// A generated token and how likely it was, in natural logarithms.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token's bytes, which need not be valid UTF-8 on their own.
    pub bytes: Vec<u8>,
    /// Its log-probability under the model, before temperature and grammar.
    pub logprob: f32,
    /// The most likely tokens at this place, best first.
    pub top: Vec<(Vec<u8>, f32)>,
}

/// The events of one turn. Dropping it stops the generation at the next token.
pub struct TurnStream {
    events: Pin<Box<dyn Stream<Item = Result<TurnEvent, Error>> + Send>>,
    progress: Arc<Progress>,
}

/// What a running turn has cost so far, readable while it runs and when nobody reads its events any more.
#[derive(Debug, Default)]
pub struct Progress {
    prompt: AtomicUsize,
    cached: AtomicUsize,
    completion: AtomicUsize,
    origin: OnceLock<Origin>,
}

/// Who answers a turn, where that is another server.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Its URL.
    pub server: Arc<str>,
    /// What it calls the request; empty if it said nothing.
    pub request_id: String,
}

// === impl TurnStream ===

impl TurnStream {
    /// Pairs events with the progress that their source keeps.
    pub fn new(events: impl Stream<Item = Result<TurnEvent, Error>> + Send + 'static, progress: Arc<Progress>) -> Self {
        Self { events: Box::pin(events), progress }
    }

    /// What the turn has cost so far.
    pub fn usage(&self) -> Usage {
        self.progress.get()
    }

    /// The same, for somebody who has the stream no more.
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }
}

impl Stream for TurnStream {
    type Item = Result<TurnEvent, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.as_mut().poll_next(cx)
    }
}

// === impl Progress ===

impl Progress {
    /// The present figures.
    pub fn get(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt.load(Ordering::Relaxed),
            cached_tokens: self.cached.load(Ordering::Relaxed),
            completion_tokens: self.completion.load(Ordering::Relaxed),
        }
    }

    /// Who answers, once that is known.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.get()
    }

    /// Says who answers.
    pub fn comes_from(&self, origin: Origin) {
        let _ = self.origin.set(origin);
    }

    /// Replaces the figures.
    pub fn set(&self, usage: Usage) {
        self.prompt.store(usage.prompt_tokens, Ordering::Relaxed);
        self.cached.store(usage.cached_tokens, Ordering::Relaxed);
        self.completion.store(usage.completion_tokens, Ordering::Relaxed);
    }
}
