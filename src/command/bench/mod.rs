//! `bench`: what callers feel, measured.
//!
//! A load is a number of callers that each hold conversations: a first turn on a cold history, then turns that add a few
//! words to it. The same load can be put on a server, on the engine in this process, or on both in turn, so that what the
//! server costs is seen within one run.

mod mock;
mod sessions;
mod talk;
mod tools;
mod upstream;

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use futures::{StreamExt, future::join_all};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Settings,
    client::{Remote, Target},
    model,
};
use crate::{
    server::{self, App, telemetry},
    turn::{TurnEvent, Usage},
};

/// Options of `bench`.
#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Options {
    #[command(subcommand)]
    other: Option<Other>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    server: Remote,
    /// With the model in this process: measure the engine, a server in front of it, or both in turn.
    #[arg(long, value_enum, default_value_t = Through::Both)]
    through: Through,
    /// Callers at once; several counts are measured one after the other.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    concurrency: Vec<usize>,
    /// Conversations of each caller.
    #[arg(long, default_value_t = 3)]
    conversations: usize,
    /// Turns of a conversation: the first is cold, the others are warm.
    #[arg(long, default_value_t = 4)]
    turns: usize,
    /// Tokens of the first turn's history, about.
    #[arg(long, default_value_t = 600)]
    history: usize,
    /// Tokens that each further turn adds, about.
    #[arg(long, default_value_t = 20)]
    new: usize,
    /// Tokens of an answer at most.
    #[arg(long, default_value_t = 24)]
    output: usize,
    /// Makes the prompts repeatable.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The caller talks with a phone agent that looks up orders: measures the filler. The model decides by itself to
    /// call, as earlier turns of the conversation did.
    #[arg(long)]
    tools: bool,
    /// Print JSON in place of a table.
    #[arg(long)]
    json: bool,
}

/// What else can be measured.
#[derive(Clone, Debug, Subcommand)]
enum Other {
    /// Measure long-lived sessions: barge-in, warm-ups, a long call, thousands of idle ones.
    Sessions(sessions::Options),
    /// Measure tools that the gateway runs: whether the caller waits for them in silence, and how soon the answer begins.
    Tools(tools::Options),
    /// Measure what it costs to be in between: the gateway in front of an upstream that answers on a schedule.
    Upstream(upstream::Options),
    /// Serve that upstream.
    Mock(mock::Options),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Through {
    Engine,
    Server,
    Both,
}

/// What was measured of one load.
#[derive(Debug, Serialize)]
struct Row {
    through: &'static str,
    concurrency: usize,
    turns: usize,
    errors: usize,
    cold_ttft_ms: Percentiles,
    warm_ttft_ms: Percentiles,
    tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
    /// Prompt tokens of the cold turns and of the warm ones, on average, and how many of the latter were not cached.
    cold_prompt: f64,
    warm_prompt: f64,
    warm_new: f64,
    /// The slowest caller's tokens by the fastest's: 1 is fair.
    fairness: f64,
}

#[derive(Debug, Default, Serialize)]
struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
}

/// What one turn took.
struct Sample {
    cold: bool,
    first: Duration,
    usage: Usage,
}

pub(super) async fn run(options: Options) -> Result<(), String> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| format!("signals cannot be received: {e}"))?;
    let serves = matches!(options.other, Some(Other::Mock(_)));
    // With the future go the processes that it has started.
    tokio::select! {
        measured = measure_all(options) => return measured,
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
    if serves { Ok(()) } else { Err("stopped before all was measured".into()) }
}

async fn measure_all(options: Options) -> Result<(), String> {
    match options.other {
        Some(Other::Sessions(options)) => return sessions::run(options).await,
        Some(Other::Tools(options)) => return tools::run(options).await,
        Some(Other::Upstream(options)) => return upstream::run(options).await,
        Some(Other::Mock(options)) => return mock::run(options).await,
        None => {}
    }
    let mut config = options.settings.load()?;
    config.log.level = "warn".into();
    let _telemetry = telemetry::start(&config.log)?;
    let mut targets = Vec::new();
    let stop = CancellationToken::new();
    match &options.server.url {
        Some(url) => targets.push(("server", Target::server(url, &options.server.key)?)),
        None => {
            eprintln!("Loading {} …", config.model.source);
            let electron = model::load(&config.model).await?;
            if options.through != Through::Server {
                targets.push(("engine", Target::Engine(electron.clone())));
            }
            if options.through != Through::Engine {
                config.server.listen.set_port(0);
                let key = server::new_key()?;
                let app = App::new(config.clone(), None, config.server.listen, Some(&key))?;
                app.serve_model(electron)?;
                let listener = server::bind(config.server.listen).await?;
                let url = format!("http://{}", listener.local_addr().map_err(|e| e.to_string())?);
                tokio::spawn(server::serve(app, listener, stop.clone().cancelled_owned()));
                targets.push(("server", Target::server(&url, &key)?));
            }
        }
    }
    let name = config.model.name.clone();
    let mut rows = Vec::new();
    for concurrency in &options.concurrency {
        rows.extend(measure(&options, &targets, &name, *concurrency).await);
    }
    if options.tools {
        for (_, target) in &targets {
            if let Some(delay) = filler_delay(target).await {
                eprintln!("{delay}");
            }
        }
    }
    stop.cancel();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows).map_err(|e| e.to_string())?);
    } else {
        print(&rows);
    }
    Ok(())
}

/// What a server says of the time from the token that opens a call to its phrase.
async fn filler_delay(target: &Target) -> Option<String> {
    let Target::Server { http, url, .. } = target else { return None };
    let text = http.get(format!("{url}/metrics")).send().await.ok()?.text().await.ok()?;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix("electron_filler_delay_seconds")?.strip_prefix(name));
        line.and_then(|value| value.trim().parse::<f64>().ok())
    };
    let (count, sum) = (value("_count")?, value("_sum")?);
    let soon = value("_bucket{le=\"0.005\"}")?;
    Some(format!(
        "phrases from the book: {count}, {soon} of them within 5 ms of the token that opened the call, {:.3} ms on average",
        1e3 * sum / count.max(1.0)
    ))
}

/// Puts the same load on every target. They take turns conversation by conversation, so that a machine whose speed
/// drifts treats them alike.
async fn measure(options: &Options, targets: &[(&'static str, Target)], model: &str, concurrency: usize) -> Vec<Row> {
    let total = (targets.len() * options.conversations * concurrency * options.turns) as u64;
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} turns {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(format!("{concurrency} at once"));
    struct Total {
        through: &'static str,
        samples: Vec<Sample>,
        errors: Vec<String>,
        busy: Duration,
        by_caller: Vec<usize>,
    }
    let mut totals: Vec<Total> = targets
        .iter()
        .map(|(through, _)| Total {
            through,
            samples: Vec::new(),
            errors: Vec::new(),
            busy: Duration::ZERO,
            by_caller: vec![0; concurrency],
        })
        .collect();
    for round in 0..options.conversations {
        for (at, (_, target)) in targets.iter().enumerate() {
            let started = Instant::now();
            let callers = (0..concurrency).map(|caller| {
                // Every conversation of the whole run is a different one.
                let seed = [options.seed, concurrency as u64, round as u64, at as u64, caller as u64]
                    .iter()
                    .fold(17u64, |sum, part| sum.wrapping_mul(1_000_003).wrapping_add(*part));
                converse(target, options, model, seed, &bar)
            });
            let outcomes = join_all(callers).await;
            let total = &mut totals[at];
            total.busy += started.elapsed();
            for (caller, (samples, errors)) in outcomes.into_iter().enumerate() {
                total.by_caller[caller] += samples.iter().map(|s| s.usage.completion_tokens).sum::<usize>();
                total.samples.extend(samples);
                total.errors.extend(errors);
            }
        }
    }
    bar.finish_and_clear();
    let row = |total: Total| {
        if let Some(error) = total.errors.first() {
            eprintln!("{} of {}: {error}", total.errors.len(), total.through);
        }
        let average = |cold: bool, of: fn(&Usage) -> usize| {
            let of_kind: Vec<usize> = total.samples.iter().filter(|s| s.cold == cold).map(|s| of(&s.usage)).collect();
            of_kind.iter().sum::<usize>() as f64 / of_kind.len().max(1) as f64
        };
        let tokens: usize = total.samples.iter().map(|s| s.usage.completion_tokens).sum();
        let (least, most) = (total.by_caller.iter().min(), total.by_caller.iter().max());
        Row {
            through: total.through,
            concurrency,
            turns: total.samples.len(),
            errors: total.errors.len(),
            cold_ttft_ms: Percentiles::of(total.samples.iter().filter(|s| s.cold).map(|s| &s.first)),
            warm_ttft_ms: Percentiles::of(total.samples.iter().filter(|s| !s.cold).map(|s| &s.first)),
            tokens,
            seconds: total.busy.as_secs_f64(),
            tokens_per_second: tokens as f64 / total.busy.as_secs_f64().max(1e-9),
            cold_prompt: average(true, |usage| usage.prompt_tokens),
            warm_prompt: average(false, |usage| usage.prompt_tokens),
            warm_new: average(false, |usage| usage.prompt_tokens - usage.cached_tokens),
            fairness: least.copied().unwrap_or(0) as f64 / most.copied().unwrap_or(0).max(1) as f64,
        }
    };
    totals.into_iter().map(row).collect()
}

/// One caller's conversation.
async fn converse(
    target: &Target,
    options: &Options,
    model: &str,
    seed: u64,
    bar: &ProgressBar,
) -> (Vec<Sample>, Vec<String>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut samples, mut errors) = (Vec::new(), Vec::new());
    let system = if options.tools { AGENT } else { "You are a helpful assistant." };
    let mut messages = vec![json!({"role": "system", "content": system})];
    if options.tools {
        for order in 0..3 {
            messages.extend(looked_up(order + rng.random_range(100..900)));
        }
    }
    for turn in 0..options.turns {
        let text = match (options.tools, turn) {
            (true, _) => format!("Where is my order {}?", rng.random_range(1000..9999)),
            (false, 0) => words(&mut rng, options.history),
            (false, _) => words(&mut rng, options.new),
        };
        messages.push(json!({"role": "user", "content": text}));
        let mut body = json!({
            "model": model, "messages": messages, "max_tokens": options.output, "temperature": 0,
        });
        if options.tools {
            body["tools"] = tools();
            body["max_tokens"] = options.output.max(80).into();
        }
        match take(target, body).await {
            Ok((first, usage, message)) => {
                let answered = message["tool_calls"].as_array().cloned().unwrap_or_default();
                messages.push(message);
                for call in answered {
                    messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": "{\"ok\": true}"}));
                }
                samples.push(Sample { cold: turn == 0, first, usage });
            }
            Err(e) => {
                errors.push(e);
                break;
            }
        }
        bar.inc(1);
    }
    (samples, errors)
}

const AGENT: &str = "You are a friendly phone agent. Briefly acknowledge out loud before using any tool, like \
                     'Let me check that' or 'One moment'.";

/// A finished exchange in which an order was looked up.
fn looked_up(order: u32) -> [Value; 4] {
    let id = format!("call_{order}");
    let function = json!({"name": "find_order", "arguments": json!({"order_id": order.to_string()}).to_string()});
    [
        json!({"role": "user", "content": format!("Where is my order {order}?")}),
        json!({"role": "assistant", "content": null, "tool_calls": [{"id": id, "type": "function", "function": function}]}),
        json!({"role": "tool", "tool_call_id": id, "content": "on its way"}),
        json!({"role": "assistant", "content": "It is on its way."}),
    ]
}

fn tools() -> Value {
    let order = json!({"type": "object", "properties": {"order_id": {"type": "string", "maxLength": 12}},
                       "required": ["order_id"]});
    json!([{"type": "function", "function": {
        "name": "find_order", "description": "Look up an order.", "parameters": order}}])
}

/// Runs a turn to its end: time to its first word or call, what it cost, and its message.
async fn take(target: &Target, body: Value) -> Result<(Duration, Usage, Value), String> {
    let started = Instant::now();
    let mut events = target.turn(body).await?;
    let (mut first, mut text, mut calls) = (None, String::new(), Vec::<Value>::new());
    while let Some(event) = events.next().await {
        match event? {
            TurnEvent::Text { delta, .. } => {
                first.get_or_insert_with(|| started.elapsed());
                text.push_str(&delta);
            }
            TurnEvent::CallBegun { id, name, .. } => {
                first.get_or_insert_with(|| started.elapsed());
                calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}}));
            }
            TurnEvent::Arguments { index, delta } => {
                if let Some(Value::String(all)) = calls.get_mut(index).map(|call| &mut call["function"]["arguments"]) {
                    all.push_str(&delta);
                }
            }
            TurnEvent::CallEnded { .. } => {}
            TurnEvent::Finished { usage, .. } => {
                let mut message = json!({"role": "assistant", "content": text});
                if !calls.is_empty() {
                    message["tool_calls"] = calls.into();
                }
                // A turn whose first token ended it has nothing to hear; its end is its first sign.
                return Ok((first.unwrap_or_else(|| started.elapsed()), usage, message));
            }
        }
    }
    Err("the stream ended too early".into())
}

/// Words of about one token each.
fn words(rng: &mut StdRng, count: usize) -> String {
    const WORDS: [&str; 48] = [
        "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
        "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company",
        "system", "program", "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area",
        "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business",
    ];
    let mut text = String::new();
    for i in 0..count {
        if i > 0 {
            text.push(' ');
        }
        text.push_str(WORDS.choose(rng).copied().unwrap_or("word"));
    }
    // Makes sure that no two conversations begin alike by chance.
    format!("{} {text}", rng.random_range(0..1000))
}

impl Percentiles {
    fn of<'a>(times: impl Iterator<Item = &'a Duration>) -> Self {
        // Microseconds to an hour, three digits.
        let Ok(mut histogram) = Histogram::<u64>::new_with_bounds(1, 3_600_000_000, 3) else {
            return Self::default();
        };
        for time in times {
            let _ = histogram.record(time.as_micros() as u64);
        }
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}

fn print(rows: &[Row]) {
    println!("time to first token in ms: on a cold history, and on one that the prefix cache holds\n");
    println!(
        "{:<8} {:>7} {:>6} {:>6} | {:>6} {:>6} {:>6} {:>6} | {:>6} {:>5} {:>6} {:>6} {:>6} | {:>8} {:>8}",
        "through",
        "callers",
        "turns",
        "errors",
        "prompt",
        "p50",
        "p95",
        "p99",
        "prompt",
        "new",
        "p50",
        "p95",
        "p99",
        "tokens/s",
        "fairness"
    );
    for row in rows {
        let (cold, warm) = (&row.cold_ttft_ms, &row.warm_ttft_ms);
        println!(
            "{:<8} {:>7} {:>6} {:>6} | {:>6.0} {:>6.0} {:>6.0} {:>6.0} | {:>6.0} {:>5.0} {:>6.0} {:>6.0} {:>6.0} | {:>8.1} {:>8.2}",
            row.through,
            row.concurrency,
            row.turns,
            row.errors,
            row.cold_prompt,
            cold.p50,
            cold.p95,
            cold.p99,
            row.warm_prompt,
            row.warm_new,
            warm.p50,
            warm.p95,
            warm.p99,
            row.tokens_per_second,
            row.fairness
        );
    }
}
