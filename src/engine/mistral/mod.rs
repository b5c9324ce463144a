//! The engine in this process: mistral.rs, with our own queue, sampling and token accounting around it.
//!
//! One dispatcher task takes work from the queue and hands it to the engine's thread, `slots` at a time. On a CPU that is
//! one: the engine then runs a sequence from start to end, which is both the fastest and what keeps the mirror of its
//! prefix cache exact.

mod convert;
mod delta;
mod load;
mod prefix;
mod queue;
mod sampler;

use std::{
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mistralrs_core::{
    Constraint, CustomLogitsProcessor, DefaultSchedulerMethod, MistralRs, MistralRsBuilder, NormalRequest, Pipeline,
    Request, RequestMessage, Response, SamplingParams, SchedulerConfig, StopTokens,
};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use self::delta::{WEIGHTS, merge};
use self::{
    load::Loaded,
    prefix::PrefixMirror,
    queue::{Class, Queue, Waiting},
    sampler::{Endings, Events, Sampler, Sentinel},
};
use super::{
    RETRY_AFTER,
    token::{Generation, ModelInfo, TokenEngine, TokenEvent, TokenFinish, Tokens},
};
use crate::{
    config::Weights,
    error::Error,
    turn::{Gauges, Readiness},
};

/// How the engine runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A GGUF file, a folder with safetensors, or a Hugging Face id.
    pub source: String,
    /// In what form the weights are kept.
    pub weights: Weights,
    /// Most tokens of prompt and answer together; 0 leaves it to the model.
    pub context: usize,
    /// Turns that run at once.
    pub slots: usize,
    /// Turns that may wait.
    pub queue: usize,
    /// Bytes that the prefix cache may hold.
    pub prefix_cache: u64,
    /// Tokens that a warm-up computes before it lets a caller go first.
    pub warm_up_step: usize,
}

/// A model that runs in this process.
pub struct MistralEngine {
    info: Arc<ModelInfo>,
    queue: Arc<Queue<Job>>,
    state: Arc<State>,
}

/// What the dispatcher and the handle share.
struct State {
    mirror: Mutex<PrefixMirror>,
    readiness: watch::Sender<Readiness>,
    running: AtomicU64,
    flushes: AtomicU64,
}

/// A piece of work for the engine.
enum Job {
    Turn(Box<Generation>, Events, CancellationToken),
    WarmUp(WarmUp),
}

/// A prompt to compute in advance.
struct WarmUp {
    prompt: Vec<u32>,
    /// Tokens that earlier steps have computed.
    done: usize,
    /// Who waits for it, if somebody does; without, it restores what the cache lost.
    asked_by: Option<(Events, CancellationToken)>,
}

impl Job {
    fn prompt(&self) -> &[u32] {
        match self {
            Self::Turn(generation, ..) => &generation.prompt,
            Self::WarmUp(warm_up) => &warm_up.prompt,
        }
    }
}

impl WarmUp {
    fn tell(&self, event: TokenEvent) {
        if let Some((events, _)) = &self.asked_by {
            let _ = events.try_send(Ok(event));
        }
    }
}

/// After so long without a caller, warm-ups take larger steps.
const CALM: Duration = Duration::from_millis(700);
/// How many times larger.
const CALM_STEPS: usize = 4;
/// What is missing of a prompt is not computed ahead when it is less than this many tokens: it would cost a copy of the
/// whole prompt, and saves no time that could be felt.
const WORTH_WARMING: usize = 8;

/// What a number of bytes takes with what the allocator adds: buffers of some hundred KiB are rounded up. Measured: 27 MiB
/// a sequence whose buffers have 22.5.
fn with_allocator(bytes: u64) -> u64 {
    bytes * 6 / 5
}

/// How long no caller must have come before a warm-up starts: clients that send turn after turn without a pause
/// should not find a warm-up's step in front of them.
const QUIET: Duration = Duration::from_millis(60);

/// How long after its last turn a conversation is taken to go on.
const LIVE: Duration = Duration::from_secs(30);

/// Conversations that are computed again after the prefix cache had to be emptied.
const RESTORED: usize = 8;

// === impl MistralEngine ===

impl MistralEngine {
    /// Loads a model and starts its engine. Not ready until a first token came: await [`MistralEngine::first_token`].
    ///
    /// # Errors
    /// A text for the operator.
    pub async fn start(settings: Settings) -> Result<Self, String> {
        let (source, weights) = (settings.source.clone(), settings.weights);
        let loaded = tokio::task::spawn_blocking(move || load::load(&source, weights))
            .await
            .map_err(|e| format!("loading was interrupted: {e}"))??;
        let Loaded { pipeline, mut info, bytes_per_token, paged, sentinel, .. } = loaded;
        if settings.context > 0 {
            info.context = info.context.min(settings.context);
        }
        let info = Arc::new(info);
        let slots = settings.slots.max(1);
        let method = {
            let metadata = pipeline.lock().await.get_metadata();
            match (paged, &metadata.cache_config) {
                (true, Some(config)) => {
                    SchedulerConfig::PagedAttentionMeta { max_num_seqs: slots, config: config.clone() }
                }
                _ => SchedulerConfig::DefaultScheduler {
                    method: DefaultSchedulerMethod::Fixed(NonZeroUsize::new(slots).unwrap_or(NonZeroUsize::MIN)),
                },
            }
        };
        let engine = MistralRsBuilder::new(pipeline.clone(), method, false, None).build().await;
        let queue = Arc::new(Queue::new(settings.queue, QUIET));
        let (readiness, _) = watch::channel(Readiness::NotReady("the model has not answered yet".into()));
        let state = Arc::new(State {
            mirror: Mutex::new(PrefixMirror::new(if paged { 0 } else { with_allocator(bytes_per_token) })),
            readiness,
            running: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        });
        let endings = Endings { end_of_turn: info.vocabulary.end_of_turn().into(), sentinel };
        let dispatcher = Dispatcher {
            engine,
            pipeline,
            queue: queue.clone(),
            state: state.clone(),
            slots: Arc::new(Semaphore::new(slots)),
            slot_count: slots as u32,
            endings,
            prefix_cache: settings.prefix_cache,
            warm_up_step: settings.warm_up_step.max(1),
            first_token: info.vocabulary.encode("Hello").map_err(|e| e.to_string())?,
        };
        tokio::spawn(Arc::new(dispatcher).run());
        Ok(Self { info, queue, state })
    }

    fn check_ready(&self) -> Result<(), Error> {
        match self.readiness() {
            Readiness::Ready => Ok(()),
            Readiness::NotReady(why) => {
                let message = format!("The model is not ready: {why}.").into();
                Err(Error::Overloaded { message, retry_after: RETRY_AFTER })
            }
        }
    }

    /// Waits until the model has answered a first token.
    ///
    /// # Errors
    /// A text for the operator, when it fails to.
    pub async fn first_token(&self) -> Result<(), String> {
        let mut readiness = self.state.readiness.subscribe();
        let seen = readiness.wait_for(|r| !matches!(r, Readiness::NotReady(why) if why.contains("not answered"))).await;
        match seen.map(|r| r.clone()) {
            Ok(Readiness::Ready) => Ok(()),
            Ok(Readiness::NotReady(why)) => Err(why),
            Err(_) => Err("the engine stopped".into()),
        }
    }
}

impl TokenEngine for MistralEngine {
    fn model(&self) -> &Arc<ModelInfo> {
        &self.info
    }

    fn generate(&self, generation: Generation) -> Result<Tokens, Error> {
        self.check_ready()?;
        // Room for every event of the generation: start, tokens, end. The engine's thread never waits for a reader, and
        // memory is taken as tokens come.
        let (events, receiver) = mpsc::channel(generation.max_tokens + 3);
        let cancel = CancellationToken::new();
        let goes_on = generation.goes_on;
        let job = Job::Turn(Box::new(generation), events, cancel.clone());
        if goes_on {
            self.queue.put_back(job);
        } else {
            self.queue.push(job).map_err(|_| full())?;
        }
        Ok(Tokens::new(receiver, cancel))
    }

    fn warm(&self, prompt: Vec<u32>) -> Result<Tokens, Error> {
        self.check_ready()?;
        let (events, receiver) = mpsc::channel(2);
        let cancel = CancellationToken::new();
        let warm_up = WarmUp { prompt, done: 0, asked_by: Some((events, cancel.clone())) };
        self.queue.push(Job::WarmUp(warm_up)).map_err(|_| full())?;
        Ok(Tokens::new(receiver, cancel))
    }

    fn readiness(&self) -> Readiness {
        self.state.readiness.borrow().clone()
    }

    fn gauges(&self) -> Gauges {
        Gauges {
            queued: self.queue.waiting(),
            running: self.state.running.load(Ordering::Relaxed) as usize,
            prefix_cache_bytes: self.state.mirror().bytes(),
            prefix_cache_flushes: self.state.flushes.load(Ordering::Relaxed),
        }
    }
}

fn full() -> Error {
    let message = "Every place in the queue is taken. Try again in a moment.".into();
    Error::Overloaded { message, retry_after: RETRY_AFTER }
}

impl Waiting for Job {
    fn class(&self) -> Class {
        match self {
            Self::Turn(..) => Class::Turn,
            Self::WarmUp(WarmUp { asked_by: Some(_), .. }) => Class::WarmUp,
            Self::WarmUp(_) => Class::Restore,
        }
    }

    fn is_abandoned(&self) -> bool {
        match self {
            Self::Turn(_, events, cancel) => events.is_closed() || cancel.is_cancelled(),
            Self::WarmUp(warm_up) => {
                warm_up.asked_by.as_ref().is_some_and(|(events, cancel)| events.is_closed() || cancel.is_cancelled())
            }
        }
    }
}

impl State {
    fn mirror(&self) -> std::sync::MutexGuard<'_, PrefixMirror> {
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task that feeds the engine.
struct Dispatcher {
    engine: Arc<MistralRs>,
    pipeline: Arc<tokio::sync::Mutex<dyn Pipeline + Send + Sync>>,
    queue: Arc<Queue<Job>>,
    state: Arc<State>,
    slots: Arc<Semaphore>,
    slot_count: u32,
    endings: Endings,
    prefix_cache: u64,
    warm_up_step: usize,
    /// A prompt to try the engine with.
    first_token: Vec<u32>,
}

// === impl Dispatcher ===

impl Dispatcher {
    async fn run(self: Arc<Self>) {
        if let Err(why) = self.try_out().await {
            tracing::error!(why, "the model did not answer");
            self.state.readiness.send_replace(Readiness::NotReady(why));
        }
        loop {
            let Ok(slot) = self.slots.clone().acquire_owned().await else {
                return;
            };
            let job = self.queue.next().await;
            self.make_room(job.prompt()).await;
            let dispatcher = self.clone();
            self.state.running.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let outcome = dispatcher.perform(job).await;
                dispatcher.state.running.fetch_sub(1, Ordering::Relaxed);
                if let Err(why) = outcome {
                    dispatcher.recover(why).await;
                } else if dispatcher.slot_count == 1 && dispatcher.over_budget() {
                    dispatcher.empty().await;
                }
                drop(slot);
            });
        }
    }

    fn over_budget(&self) -> bool {
        self.state.mirror().bytes() > self.prefix_cache
    }

    /// Generates one token; the server is ready when that works.
    async fn try_out(&self) -> Result<(), String> {
        self.prefill(self.first_token.clone()).await?;
        self.state.readiness.send_replace(Readiness::Ready);
        Ok(())
    }

    /// After the engine failed: nobody is let in until it has answered again. It starts its thread anew when something is
    /// sent to it, once the old one is gone.
    async fn recover(&self, why: String) {
        const TRIES: u32 = 20;
        let not_ready = Readiness::NotReady(format!("it failed ({why}) and is being restarted"));
        if !self.state.readiness.send_if_modified(|r| std::mem::replace(r, not_ready.clone()) == Readiness::Ready) {
            // Somebody else is at it.
            return;
        }
        tracing::error!(why, "the engine failed");
        self.state.mirror().clear(0, 0, Duration::ZERO);
        for attempt in 1..=TRIES {
            // The old thread holds the model until it has unwound.
            drop(self.pipeline.lock().await);
            match self.try_out().await {
                Ok(()) => {
                    tracing::warn!(attempt, "the engine was restarted");
                    return;
                }
                Err(why) => tracing::debug!(attempt, why, "the engine does not answer yet"),
            }
            tokio::time::sleep(Duration::from_millis(100) * attempt).await;
        }
        tracing::error!("the engine could not be restarted; restart the server");
    }

    /// Does one piece of work. An error means that the engine is broken, not that the work was.
    async fn perform(&self, job: Job) -> Result<(), String> {
        match job {
            Job::Turn(generation, events, cancel) => {
                let outcome = self.generate(*generation, events, cancel).await;
                self.queue.turn_ended();
                outcome
            }
            Job::WarmUp(warm_up) => self.warm(warm_up).await,
        }
    }

    async fn generate(&self, generation: Generation, events: Events, cancel: CancellationToken) -> Result<(), String> {
        let Generation { prompt, sampling, max_tokens, guide, .. } = generation;
        let cached_tokens = self.state.mirror().lookup(&prompt);
        let _ = events.try_send(Ok(TokenEvent::Started { at: Instant::now(), cached_tokens }));
        let prompt_len = prompt.len();
        let sampler = Arc::new(Sampler::new(sampling, max_tokens, guide, self.endings.clone(), events.clone(), cancel));
        match self.send(prompt.clone(), sampler.clone()).await {
            Ok(()) => {
                match sampler.computed() {
                    Some(answer) => {
                        let mut tokens = prompt;
                        tokens.extend(answer);
                        self.finished(prompt_len, tokens);
                    }
                    // The engine ended the sequence on its own account, at the model's length.
                    None => {
                        let _ = events.try_send(Ok(TokenEvent::Finished(TokenFinish::Length)));
                    }
                }
                Ok(())
            }
            Err(Failure::Request(why)) => {
                // A failed step empties the engine's cache.
                self.state.mirror().clear(0, 0, Duration::ZERO);
                tracing::warn!(why, "a generation failed");
                let _ = events.try_send(Err(Error::EngineFailed(why)));
                Ok(())
            }
            Err(Failure::Engine(why)) => {
                let _ = events.try_send(Err(Error::EngineFailed(why.clone())));
                Err(why)
            }
        }
    }

    /// Computes the next step of a warm-up, and puts the rest back into the queue.
    async fn warm(&self, mut warm_up: WarmUp) -> Result<(), String> {
        let prompt = &warm_up.prompt;
        let known = self.state.mirror().covers(prompt).max(warm_up.done);
        if warm_up.done == 0 {
            warm_up.tell(TokenEvent::Started { at: Instant::now(), cached_tokens: known });
        }
        let step = self.step(prompt.len());
        let end = (known + step).min(prompt.len());
        // What remains is too short to be worth a step of its own.
        let end = if prompt.len() - end < step / 4 { prompt.len() } else { end };
        let done = warm_up.done == 0 && prompt.len() - known < WORTH_WARMING;
        let end = if done { known } else { end };
        if end > known {
            self.prefill(prompt[..end].to_vec()).await?;
        }
        if end < prompt.len() && !done {
            warm_up.done = end;
            self.queue.put_back(Job::WarmUp(warm_up));
        } else {
            warm_up.tell(TokenEvent::Finished(TokenFinish::Length));
        }
        Ok(())
    }

    async fn prefill(&self, prompt: Vec<u32>) -> Result<(), String> {
        match self.send(prompt.clone(), Arc::new(self.sentinel(prompt.len()))).await {
            Ok(()) => {
                let mut tokens = prompt;
                let length = tokens.len();
                tokens.extend(tokens.last().copied());
                self.finished(length, tokens);
                Ok(())
            }
            Err(Failure::Request(why) | Failure::Engine(why)) => Err(why),
        }
    }

    /// Notes what the engine's prefix cache now holds.
    fn finished(&self, prompt_len: usize, tokens: Vec<u32>) {
        self.state.mirror().insert(prompt_len, tokens);
    }

    /// Empties the prefix cache when this prompt would take it over its budget, unless most of the prompt is in it: then
    /// the budget is exceeded by this one sequence, and [`Dispatcher::run`] puts that right behind it. A conversation that
    /// begins while no other is live gets the whole budget, so that it is less likely to lose its history in the middle.
    /// The caller holds one slot.
    async fn make_room(&self, prompt: &[u32]) {
        /// Tokens that an answer is taken to have.
        const ANSWER: usize = 64;
        {
            let mirror = self.state.mirror();
            let share = if mirror.is_stale(LIVE) { self.prefix_cache / 4 } else { self.prefix_cache };
            let full = mirror.bytes() + mirror.cost(prompt.len() + ANSWER) > share;
            if mirror.bytes() == 0 || !full || mirror.covers(prompt) * 2 >= prompt.len() {
                return;
            }
        }
        // Sequences that run in the same step would fail with the one that is made to fail.
        let Ok(_others) = self.slots.acquire_many(self.slot_count - 1).await else { return };
        self.empty().await;
    }

    /// Empties the prefix cache, and queues what live conversations lose by that. Nothing else may run.
    async fn empty(&self) {
        let live = self.state.mirror().clear(RESTORED, self.prefix_cache / 2, LIVE);
        // The engine has no call for it, but it empties its cache when a step fails, and a token that no vocabulary has
        // makes one fail at once. (Not the largest number: embeddings take that for a place to leave empty.)
        match self.send(vec![u32::MAX - 1], Arc::new(self.sentinel(0))).await {
            Err(Failure::Request(why)) => tracing::debug!(why, restored = live.len(), "prefix cache emptied"),
            Err(Failure::Engine(why)) => tracing::warn!(why, "the engine died while its prefix cache was emptied"),
            Ok(()) => tracing::warn!("the prefix cache could not be emptied"),
        }
        self.state.flushes.fetch_add(1, Ordering::Relaxed);
        for tokens in live {
            // In a small cache the steps of a long restoration would soon have to make room again.
            if self.step(tokens.len()) <= 2 * CALM_STEPS * self.warm_up_step {
                let _ = self.queue.push(Job::WarmUp(WarmUp { prompt: tokens, done: 0, asked_by: None }));
            }
        }
    }

    fn sentinel(&self, prompt: usize) -> Sentinel {
        Sentinel { end: self.endings.sentinel, prompt }
    }

    /// Tokens that a warm-up of this length computes at a time. Every step leaves a copy of all before it in the prefix
    /// cache, so that there may only be as many as fit.
    fn step(&self, tokens: usize) -> usize {
        // Where no caller has come for a while, it is less likely that one has to wait for a step, and each step leaves a
        // copy and takes time to copy.
        let calm = if self.queue.is_calm(CALM) { CALM_STEPS } else { 1 };
        let steps = self.prefix_cache / self.state.mirror().cost(tokens).max(1);
        (self.warm_up_step * calm).max(tokens.div_ceil(usize::try_from(steps).unwrap_or(usize::MAX).max(1)))
    }

    /// Hands a prompt to the engine and waits until its sequence has ended.
    async fn send(&self, prompt: Vec<u32>, sampler: Arc<dyn CustomLogitsProcessor>) -> Result<(), Failure> {
        let (response, mut answer) = mpsc::channel(1);
        let mut params = SamplingParams::neutral();
        params.stop_toks = Some(StopTokens::Ids(vec![self.endings.sentinel]));
        let request = NormalRequest {
            messages: RequestMessage::CompletionTokens(prompt),
            sampling_params: params,
            response,
            return_logprobs: false,
            is_streaming: false,
            id: 0,
            constraint: Constraint::None,
            suffix: None,
            tools: None,
            tool_choice: None,
            logits_processors: Some(vec![sampler]),
            return_raw_logits: false,
            web_search_options: None,
            model_id: None,
            truncate_sequence: false,
        };
        let sender = self.engine.get_sender(None).map_err(|e| Failure::Engine(format!("no engine: {e}")))?;
        sender
            .send(Request::Normal(Box::new(request)))
            .await
            .map_err(|_| Failure::Engine("the engine's thread is gone".into()))?;
        drop(sender);
        match answer.recv().await {
            Some(Response::CompletionDone(_)) => Ok(()),
            Some(Response::CompletionModelError(why, _)) => Err(Failure::Request(without_frames(why))),
            Some(Response::InternalError(e) | Response::ValidationError(e)) => Err(Failure::Request(without_frames(e))),
            Some(_) => Err(Failure::Request("an answer of an unknown kind".into())),
            None => Err(Failure::Engine("the engine's thread died".into())),
        }
    }
}

/// The text of an error, without the backtrace that the engine's crates put into it where `RUST_BACKTRACE` is set.
fn without_frames(e: impl std::fmt::Display) -> String {
    let frame = |line: &&str| {
        let text = line.trim_start();
        let number = text.trim_start_matches(|c: char| c.is_ascii_digit());
        text.len() < line.len() && (text.starts_with("at ") || number.len() < text.len() && number.starts_with(": "))
    };
    format!("{e:#}").lines().filter(|line| !frame(line)).collect::<Vec<_>>().join("\n").trim_end().to_owned()
}

/// Why a request to the engine did not end well.
enum Failure {
    /// This request failed; the engine works.
    Request(String),
    /// The engine is broken.
    Engine(String),
}

#[cfg(test)]
mod tests {
    use super::without_frames;

    #[test]
    fn a_backtrace_is_left_out_of_an_error_and_nothing_else_is() {
        let text = "bad file\n   0: candle_core::error::Error::bt\n             at /src/error.rs:1:2\n  12: main\n";
        assert_eq!(without_frames(text), "bad file");
        let kept = "line 3: no such field\n  it has two\nat last";
        assert_eq!(without_frames(kept), kept);
    }
}
