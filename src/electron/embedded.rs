//! Electron over a model in this process: a prompt and a grammar for the engine, and tokens that become events.

use std::{collections::VecDeque, ops::Range, sync::Arc, time::Instant};

use futures::{FutureExt, future::BoxFuture, stream};
use uuid::Uuid;

use super::{
    Filler, fills,
    form::{self, Form},
    grammar::{Grammars, TurnGuide},
    parser::{Parsed, Parser},
    search::Search,
    template::Template,
};
use crate::{
    engine::token::{Generation, ModelInfo, TokenEngine, TokenEvent, TokenFinish},
    error::Error,
    turn::{
        FinishReason, Gauges, Message, Model, OutputFormat, Progress, Readiness, TokenLogprob, Tool, Turn, TurnEvent,
        TurnStream, Usage,
    },
};

/// A model in this process, with its template and its grammars.
pub struct Electron {
    engine: Arc<dyn TokenEngine>,
    template: Template,
    grammars: Grammars,
    call_tries: usize,
}

/// A conversation for training.
#[derive(Debug, serde::Serialize)]
pub struct Example {
    /// All of it, up to the end of the last answer.
    pub tokens: Vec<u32>,
    /// Which of them the model generates, the end of each turn included.
    pub answers: Vec<Range<usize>>,
    /// Whether its prompt asks for a filler.
    pub speaks: bool,
}

/// A turn, ready for the engine.
struct Prepared {
    generation: Generation,
    /// How often its calls may be written once more, and the guide for that.
    again: Option<(usize, TurnGuide)>,
    reader: Reader,
}

// === impl Electron ===

impl Electron {
    /// Puts the layer on an engine. `call_tries` is how many other calls a turn at temperature 0 may try.
    ///
    /// # Errors
    /// A text for the operator, when the model's template or vocabulary cannot be used.
    pub fn new(engine: Arc<dyn TokenEngine>, call_tries: usize) -> Result<Self, String> {
        let template = Template::new(engine.model().clone())?;
        let grammars = Grammars::new(engine.model().clone(), template.form())?;
        Ok(Self { engine, template, grammars, call_tries })
    }

    /// What is known of the model.
    pub fn model(&self) -> &ModelInfo {
        self.engine.model()
    }

    /// How the model writes calls, and whether its own template teaches that.
    pub fn call_form(&self) -> (Form, bool) {
        (self.template.form(), self.template.knows_tools())
    }

    /// The engine, for its figures.
    pub fn engine(&self) -> &Arc<dyn TokenEngine> {
        &self.engine
    }

    async fn speak(self: Arc<Self>, turn: Turn) -> Result<TurnStream, Error> {
        let electron = self.clone();
        // Templates, tokenizing and grammars take milliseconds, which other connections should not wait for.
        let prepared = tokio::task::spawn_blocking(move || electron.prepare(&turn))
            .await
            .map_err(|e| Error::Internal(e.to_string()))??;
        let mut reader = prepared.reader;
        reader.tokens = Some(Search::start(&self.engine, prepared.generation, prepared.again)?);
        let progress = reader.progress.clone();
        progress.set(reader.usage);
        let events = stream::unfold(reader, |mut reader| async move { Some((reader.next().await?, reader)) });
        Ok(TurnStream::new(events, progress))
    }

    async fn read_ahead(self: Arc<Self>, turn: Turn) -> Result<Usage, Error> {
        let electron = self.clone();
        let prepare = move || {
            let rendered = electron.template.render_open(turn.messages, &turn.tools)?;
            let prompt = electron.template.tokenize(&rendered)?;
            let context = electron.model().context;
            if prompt.len() >= context {
                return Err(Error::ContextLength { context, prompt: prompt.len(), asked: None, param: "messages" });
            }
            Ok(prompt)
        };
        let prompt: Vec<u32> =
            tokio::task::spawn_blocking(prepare).await.map_err(|e| Error::Internal(e.to_string()))??;
        let mut usage = Usage { prompt_tokens: prompt.len(), ..Usage::default() };
        if prompt.is_empty() {
            return Ok(usage);
        }
        let mut tokens = self.engine.warm(prompt)?;
        while let Some(event) = tokens.next().await {
            match event? {
                TokenEvent::Started { cached_tokens, .. } => usage.cached_tokens = cached_tokens,
                TokenEvent::Token(_) => {}
                TokenEvent::Finished(_) => break,
            }
        }
        Ok(usage)
    }

    /// The prompt of a turn as text.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the model's template refuses the conversation.
    pub fn render(&self, turn: &Turn) -> Result<String, Error> {
        Ok(Template::readable(&self.template.render(&turn.messages, &turn.tools)?))
    }

    /// A conversation as this model is trained on it.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the model's template refuses it, or does not render an answer as it would be generated.
    pub fn example(&self, turn: &Turn) -> Result<Example, Error> {
        let tokens_of = |messages: &[Message]| {
            self.template.render(messages, &turn.tools).and_then(|rendered| self.template.tokenize(&rendered))
        };
        let mut tokens = tokens_of(&turn.messages)?;
        let mut answers: Vec<Range<usize>> = Vec::new();
        for (at, message) in turn.messages.iter().enumerate() {
            if !matches!(message, Message::Assistant { .. }) {
                continue;
            }
            let prompt = tokens_of(&turn.messages[..at])?;
            let ends = self.model().vocabulary.end_of_turn();
            let answer = tokens.strip_prefix(prompt.as_slice());
            let length = answer.and_then(|answer| answer.iter().position(|token| ends.contains(token)));
            let length = length.ok_or_else(|| {
                Error::invalid("messages", format!("message {at} is no continuation of the prompt before it"))
            })?;
            answers.push(prompt.len()..prompt.len() + length + 1);
        }
        tokens.truncate(answers.last().map_or(tokens.len(), |answer| answer.end));
        Ok(Example { tokens, answers, speaks: fills(turn) })
    }

    fn prepare(&self, turn: &Turn) -> Result<Prepared, Error> {
        let rendered = self.template.render(&turn.messages, &turn.tools)?;
        let mut prompt = self.template.tokenize(&rendered)?;
        let prompt_tokens = prompt.len();
        let context = self.model().context;
        let room = context.saturating_sub(prompt_tokens);
        let asked = turn.sampling.max_tokens;
        if room == 0 || asked.is_some_and(|asked| asked > room) {
            let asked = asked.filter(|_| room > 0);
            let param = if asked.is_some() { "max_tokens" } else { "messages" };
            return Err(Error::ContextLength { context, prompt: prompt_tokens, asked, param });
        }
        let max_tokens = asked.unwrap_or(room);

        let fills = fills(turn);
        let mut plan = self.grammars.plan(turn, fills, max_tokens)?;
        let syntax = (!turn.tools.is_empty()).then(|| self.template.form().syntax());
        let mut parser = Parser::new(syntax, turn.format != OutputFormat::Text, &turn.sampling.stop);
        let opening_tokens = plan.opening.len();
        if opening_tokens > 0 {
            parser.opened();
        }
        prompt.extend(&plan.opening);
        let max_tokens = max_tokens - opening_tokens;
        let mut sampling = turn.sampling.clone();
        sampling.max_tokens = Some(max_tokens);
        // What was generated before weighs in penalties, which a new generation would not know of.
        let penalized = sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        let searches = self.call_tries > 0 && turn.may_call() && sampling.is_greedy() && !penalized;
        let again = searches.then(|| {
            plan.guide.weigh();
            (self.call_tries, plan.guide.deep_clone())
        });
        let generation = Generation { prompt, sampling, max_tokens, guide: Box::new(plan.guide), goes_on: false };
        let reader = Reader {
            model: self.engine.model().clone(),
            tokens: None,
            parser,
            filler: fills.then(|| Filler::new(turn)),
            wants_logprobs: turn.sampling.logprobs.is_some(),
            opened: opening_tokens > 0,
            ready: VecDeque::new(),
            logprobs: Vec::new(),
            spoken: false,
            stopped: false,
            calls: 0,
            latest: Instant::now(),
            usage: Usage { prompt_tokens, cached_tokens: 0, completion_tokens: opening_tokens },
            progress: Arc::default(),
            over: false,
        };
        Ok(Prepared { generation, again, reader })
    }
}

impl Model for Electron {
    fn turn(self: Arc<Self>, turn: Turn) -> BoxFuture<'static, Result<TurnStream, Error>> {
        self.speak(turn).boxed()
    }

    fn warm(self: Arc<Self>, turn: Turn) -> BoxFuture<'static, Result<Usage, Error>> {
        self.read_ahead(turn).boxed()
    }

    fn check_tools(&self, tools: &[Tool]) -> Result<(), Error> {
        self.grammars.check_tools(tools)
    }

    fn context(&self) -> usize {
        self.model().context
    }

    fn readiness(&self) -> Readiness {
        self.engine.readiness()
    }

    fn gauges(&self) -> Option<Gauges> {
        Some(self.engine.gauges())
    }
}

/// Turns tokens into events.
struct Reader {
    model: Arc<ModelInfo>,
    tokens: Option<Search>,
    parser: Parser,
    /// Taken when it is used, or when the model speaks for itself.
    filler: Option<Filler>,
    wants_logprobs: bool,
    /// Whether the prompt already opened a call.
    opened: bool,
    ready: VecDeque<TurnEvent>,
    /// Of tokens whose text has not left yet.
    logprobs: Vec<TokenLogprob>,
    spoken: bool,
    /// Whether a stop text came.
    stopped: bool,
    /// Calls that have begun.
    calls: usize,
    /// When the engine made what is being read.
    latest: Instant,
    usage: Usage,
    progress: Arc<Progress>,
    over: bool,
}

// === impl Reader ===

impl Reader {
    async fn next(&mut self) -> Option<Result<TurnEvent, Error>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            match self.tokens.as_mut()?.next().await {
                Some(Ok(event)) => {
                    self.take(event);
                    self.progress.set(self.usage);
                }
                Some(Err(e)) => {
                    self.over = true;
                    return Some(Err(e));
                }
                None => {
                    self.over = true;
                    return Some(Err(Error::EngineFailed("it stopped in the middle of an answer".into())));
                }
            }
        }
    }

    fn take(&mut self, event: TokenEvent) {
        let mut parsed = Vec::new();
        match event {
            TokenEvent::Started { at, cached_tokens } => {
                self.latest = at;
                self.usage.cached_tokens = cached_tokens.min(self.usage.prompt_tokens);
                if self.opened {
                    self.call_opened();
                }
            }
            TokenEvent::Token(token) => {
                self.latest = token.at;
                self.usage.completion_tokens += 1;
                let vocabulary = &self.model.vocabulary;
                if let Some(logprob) = token.logprob.filter(|_| self.wants_logprobs && self.calls == 0) {
                    let bytes = |id: u32| vocabulary.bytes(id).to_vec();
                    self.logprobs.push(TokenLogprob {
                        bytes: bytes(token.id),
                        logprob: logprob.chosen,
                        top: logprob.top.into_iter().map(|(id, logprob)| (bytes(id), logprob)).collect(),
                    });
                }
                let bytes = vocabulary.bytes(token.id);
                if !vocabulary.is_special(token.id) || form::is_marker(bytes) {
                    self.parser.push(bytes, &mut parsed);
                }
            }
            TokenEvent::Finished(why) => {
                self.parser.finish(&mut parsed);
                self.tell(parsed);
                let reason = match why {
                    TokenFinish::Cancelled => FinishReason::Cancelled,
                    TokenFinish::Length => FinishReason::Length,
                    TokenFinish::EndOfTurn | TokenFinish::Guide if self.calls > 0 => FinishReason::ToolCalls,
                    TokenFinish::EndOfTurn | TokenFinish::Guide => FinishReason::Stop,
                };
                self.ready.push_back(TurnEvent::Finished { reason, usage: self.usage });
                self.over = true;
                return;
            }
        }
        self.tell(parsed);
    }

    fn tell(&mut self, parsed: Vec<Parsed>) {
        for piece in parsed {
            let index = self.calls.saturating_sub(1);
            match piece {
                _ if self.stopped => {}
                Parsed::Text(delta) => self.say(delta),
                Parsed::CallOpened => self.call_opened(),
                Parsed::CallNamed(name) => {
                    self.fill(Some(&name));
                    let id = format!("call_{}", Uuid::now_v7().simple());
                    self.ready.push_back(TurnEvent::CallBegun { index: self.calls, id, name });
                    self.calls += 1;
                }
                Parsed::Arguments(delta) => self.ready.push_back(TurnEvent::Arguments { index, delta }),
                Parsed::CallEnded => self.ready.push_back(TurnEvent::CallEnded { index }),
                Parsed::Stopped => self.stopped = true,
            }
        }
    }

    fn say(&mut self, delta: String) {
        // White space at the start of a turn is no speech.
        let delta = if self.spoken { delta } else { delta.trim_start().to_owned() };
        if delta.is_empty() {
            return;
        }
        self.spoken = true;
        self.filler = None;
        let logprobs = std::mem::take(&mut self.logprobs);
        self.ready.push_back(TurnEvent::Text { delta, logprobs });
    }

    fn call_opened(&mut self) {
        self.logprobs.clear();
        if self.filler.as_ref().is_some_and(|filler| filler.goodbyes.is_empty()) {
            self.fill(None);
        }
    }

    fn fill(&mut self, tool: Option<&str>) {
        if let Some(filler) = self.filler.take() {
            self.say(filler.draw(tool));
            metrics::histogram!("electron_filler_delay_seconds").record(self.latest.elapsed().as_secs_f64());
        }
    }
}
