//! `bench sessions`: what a caller on a long-lived session feels, and what idle sessions cost.

use std::{process::Stdio, time::Duration};

use clap::Args;
use futures::{StreamExt, stream};
use indicatif::ProgressBar;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::Instant,
};

use super::{Percentiles, talk::Talk, words};
use crate::command::{Settings, client::Remote};

/// Options of `bench sessions`.
#[derive(Clone, Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    server: Remote,
    /// Idle sessions at once; 0 leaves them out.
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
    /// Turns of the live caller, with and without the idle sessions.
    #[arg(long, default_value_t = 100)]
    live: usize,
    /// Turns of one long call; 0 leaves it out.
    #[arg(long, default_value_t = 30)]
    turns: usize,
    /// Barge-ins, warm-ups and spoken partial transcripts that are measured; 0 leaves them out.
    #[arg(long, default_value_t = 10)]
    samples: usize,
    /// Makes the prompts repeatable.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A server to measure, in a process of its own unless one runs already.
struct Server {
    url: String,
    key: String,
    model: String,
    child: Option<Child>,
}

pub(super) async fn run(options: Options) -> Result<(), String> {
    raise_file_limit(options.idle as u64 + 1_000);
    let server = Server::start(&options).await?;
    let mut rng = StdRng::seed_from_u64(options.seed);
    if options.samples > 0 {
        warm_ups(&server, &options, &mut rng).await?;
        barge_ins(&server, &options, &mut rng).await?;
    }
    if options.turns > 0 {
        long_call(&server, &options, &mut rng).await?;
    }
    if options.idle > 0 {
        idle_sessions(&server, &options, &mut rng).await?;
    }
    server.stop().await;
    Ok(())
}

/// Lets this process, and those that it starts, open so many files, as far as it may.
fn raise_file_limit(wanted: u64) {
    if let Ok((soft, hard)) = rlimit::Resource::NOFILE.get()
        && soft < wanted
    {
        let _ = rlimit::Resource::NOFILE.set(wanted.min(hard), hard);
    }
}

// === impl Server ===

impl Server {
    async fn start(options: &Options) -> Result<Self, String> {
        let model = options.settings.load()?.model.name;
        if let Some(url) = &options.server.url {
            let url = url.trim_end_matches('/').to_owned();
            return Ok(Self { url, key: options.server.key.clone(), model, child: None });
        }
        eprintln!("Starting a server …");
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        let mut command = Command::new(program);
        command.arg("serve").args(options.settings.arguments()).args(["--listen", "127.0.0.1:0"]);
        command.args(["--set", "log.level=warn", "--set", "server.max_connections=1000000"]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("the server did not start: {e}"))?;
        let output = child.stdout.take().ok_or("the server has no output")?;
        let mut lines = BufReader::new(output).lines();
        let (mut url, mut key) = (None, None);
        while url.is_none() || key.is_none() {
            let line = lines.next_line().await.map_err(|e| e.to_string())?;
            let line = line.ok_or("the server ended before it served; try `serve` with the same options")?;
            let after = |mark: &str, end: char| {
                line.split_once(mark).map(|(_, rest)| rest.split(end).next().unwrap_or_default().to_owned())
            };
            if line.starts_with("Serving") {
                url = after(" on ", ' ');
            }
            key = key.or_else(|| after("The key of this run is ", ';'));
        }
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { url: url.unwrap_or_default(), key: key.unwrap_or_default(), model, child: Some(child) })
    }

    async fn stop(mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill().await;
        }
    }

    /// Bytes of memory that are resident in the server.
    fn resident(&self) -> Option<u64> {
        let id = self.child.as_ref()?.id()?;
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    }

    async fn responses(&self) -> Result<Talk, String> {
        Talk::connect(&self.url, "/v1/responses", &self.key).await
    }

    async fn realtime(&self) -> Result<Talk, String> {
        let mut talk = Talk::connect(&self.url, &format!("/v1/realtime?model={}", self.model), &self.key).await?;
        talk.until(&["session.created"]).await?;
        Ok(talk)
    }
}

// === what is measured ===

/// About this many tokens of instructions and tools, different each time.
fn agent(rng: &mut StdRng) -> Value {
    let order = json!({"type": "object", "required": ["order_id"],
                       "properties": {"order_id": {"type": "string", "description": "As the caller says it."}}});
    let tool =
        |name: &str, does: &str| json!({"type": "function", "name": name, "description": does, "parameters": order});
    json!({
        "instructions": format!("{} You are a friendly phone agent. {}", rng.random_range(0..1_000_000), words(rng, 400)),
        "tools": [tool("find_order", "Looks up an order."), tool("cancel_order", "Cancels an order.")],
        "tool_choice": "none",
        "temperature": 0,
    })
}

fn with(mut agent: Value, more: Value) -> Value {
    if let (Some(agent), Value::Object(more)) = (agent.as_object_mut(), more) {
        agent.extend(more);
    }
    agent
}

/// Time from the request to the first word, and the finished response.
async fn first_word(talk: &mut Talk, request: &Value) -> Result<(Duration, Value), String> {
    let started = Instant::now();
    talk.send(request).await?;
    let ends = ["response.completed", "response.incomplete", "response.failed", "response.done"];
    let mut first = None;
    loop {
        let event = talk.next().await?;
        let kind = event["type"].as_str().unwrap_or_default();
        if kind == "response.output_text.delta" {
            first.get_or_insert_with(|| started.elapsed());
        }
        if ends.contains(&kind) {
            // An answer without a word has its end as its first sign.
            return Ok((first.unwrap_or_else(|| started.elapsed()), event["response"].clone()));
        }
    }
}

async fn warm_ups(server: &Server, options: &Options, rng: &mut StdRng) -> Result<(), String> {
    let (mut cold, mut warm, mut spoken) = (Vec::new(), Vec::new(), Vec::new());
    let mut prompt = 0;
    let bar = ProgressBar::new(options.samples as u64);
    for _ in 0..options.samples {
        let question = format!("My number is {}. What can you do for me?", rng.random_range(1000..9999));
        let create = |agent: Value, more: Value| {
            let common =
                json!({"type": "response.create", "model": server.model, "max_output_tokens": 4, "store": false});
            with(with(agent, common), more)
        };
        let mut talk = server.responses().await?;
        let request = create(agent(rng), json!({"input": question}));
        let (first, response) = first_word(&mut talk, &request).await?;
        prompt = response["usage"]["input_tokens"].as_u64().unwrap_or(0);
        cold.push(first);

        let mut talk = server.responses().await?;
        let agent_of_call = agent(rng);
        talk.send(&create(agent_of_call.clone(), json!({"generate": false}))).await?;
        let warmed = talk.until(&["response.completed"]).await?;
        let request =
            create(agent_of_call, json!({"input": question, "previous_response_id": warmed["response"]["id"]}));
        warm.push(first_word(&mut talk, &request).await?.0);

        // The agent says hello; then the caller speaks three words a second, and is heard as they do.
        let mut talk = server.realtime().await?;
        talk.send(&json!({"type": "session.update", "session": agent(rng)})).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let question = format!("{question} {}", super::words(rng, 12));
        let words: Vec<&str> = question.split(' ').collect();
        for end in 1..=words.len() {
            talk.send(&json!({"type": "input_transcript.partial", "text": words[..end].join(" ")})).await?;
            tokio::time::sleep(Duration::from_millis(330)).await;
        }
        let item = json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": question}]});
        talk.send(&json!({"type": "conversation.item.create", "item": item})).await?;
        let request = json!({"type": "response.create", "response": {"max_output_tokens": 4}});
        spoken.push(first_word(&mut talk, &request).await?.0);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let (cold, warm, spoken) = (median(&cold), median(&warm), median(&spoken));
    println!(
        "time to first word, {prompt} tokens of instructions, tools and question, median of {}: {cold:.0} ms cold, \
         {warm:.0} ms after generate: false ({:.2}), {spoken:.0} ms after partial transcripts ({:.2})",
        options.samples,
        warm / cold,
        spoken / cold
    );
    Ok(())
}

async fn barge_ins(server: &Server, options: &Options, rng: &mut StdRng) -> Result<(), String> {
    let (mut stops, mut tokens, mut cached, mut prompts) = (Vec::new(), Vec::new(), 0, 0);
    let mut talk = server.responses().await?;
    let agent_of_call = agent(rng);
    let create = |input: &str, most: usize, previous: &Value| {
        let common = json!({"type": "response.create", "model": server.model, "max_output_tokens": most, "input": input,
                            "store": false, "previous_response_id": previous});
        with(agent_of_call.clone(), common)
    };
    talk.send(&with(create("", 1, &Value::Null), json!({"generate": false, "input": []}))).await?;
    let mut previous = talk.until(&["response.completed"]).await?["response"]["id"].clone();
    for at in 0..options.samples {
        talk.send(&create("Please tell me a long story about a house, a man and a dog.", 60, &previous)).await?;
        let mut heard = Vec::new();
        let cut = 4 + at % 8;
        let kinds = ["response.output_text.delta", "response.completed", "response.incomplete", "response.failed"];
        let mut ended = Value::Null;
        while heard.len() < cut && ended.is_null() {
            let event = talk.until(&kinds).await?;
            match event["response"].is_object() {
                true => ended = event,
                false => heard.push(Instant::now()),
            }
        }
        tokens.extend(heard.windows(2).map(|pair| pair[1] - pair[0]));
        if ended.is_null() {
            let started = Instant::now();
            talk.send(&json!({"type": "response.cancel"})).await?;
            ended = talk.until(&kinds[1..]).await?;
            stops.push(started.elapsed());
        }
        previous = ended["response"]["id"].clone();
        let (_, response) = first_word(&mut talk, &create("Stop. What did you say?", 2, &previous)).await?;
        previous = response["id"].clone();
        cached += response["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        prompts += response["usage"]["input_tokens"].as_u64().unwrap_or(0);
    }
    stops.sort();
    println!(
        "barge-in, {} of them: the response ends {:.1} ms after response.cancel (median; longest {:.1} ms), a token takes \
         {:.1} ms (median); of the next turn's prompt {:.0} % was in the prefix cache",
        stops.len(),
        median(&stops),
        ms(stops.last().copied().unwrap_or_default()),
        median(&tokens),
        100.0 * cached as f64 / prompts.max(1) as f64
    );
    Ok(())
}

async fn long_call(server: &Server, options: &Options, rng: &mut StdRng) -> Result<(), String> {
    let mut talk = server.realtime().await?;
    talk.send(&json!({"type": "session.update", "session": agent(rng)})).await?;
    let bar = ProgressBar::new(options.turns as u64);
    let mut turns = Vec::new();
    for _ in 0..options.turns {
        // While the caller speaks the model idles.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let item = json!({"type": "message", "role": "user",
                          "content": [{"type": "input_text", "text": words(rng, 16)}]});
        talk.send(&json!({"type": "conversation.item.create", "item": item})).await?;
        let request = json!({"type": "response.create", "response": {"max_output_tokens": 24}});
        let (first, response) = first_word(&mut talk, &request).await?;
        let prompt = response["usage"]["input_tokens"].as_u64().unwrap_or(0);
        let cached = response["usage"]["input_token_details"]["cached_tokens"].as_u64().unwrap_or(0);
        turns.push((first, prompt, prompt - cached));
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!(
        "a call of {} turns: time to first word, tokens of the prompt, tokens of it that were computed",
        turns.len()
    );
    for (at, (first, prompt, new)) in turns.iter().enumerate() {
        println!("  turn {:>2}: {:>5.0} ms {prompt:>6} {new:>5}", at + 1, ms(*first));
    }
    if let (Some(third), Some(last)) = (turns.get(2), turns.last()) {
        let attention = |turn: &(Duration, u64, u64)| (turn.1 * turn.2).max(1) as f64;
        println!(
            "  the last turn by the third: time {:.2}, attention (new tokens times prompt) {:.2}",
            last.0.as_secs_f64() / third.0.as_secs_f64(),
            attention(last) / attention(third)
        );
    }
    Ok(())
}

async fn idle_sessions(server: &Server, options: &Options, rng: &mut StdRng) -> Result<(), String> {
    /// Connections that are being made at once.
    const AT_ONCE: usize = 64;
    // A first round, so that what the process takes once is not counted.
    let before_first = idle(server, 200, AT_ONCE).await?.0;
    for task in before_first {
        task.abort();
    }
    let mut without = live(server, options.live / 2, rng).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = server.resident();
    let (tasks, took) = idle(server, options.idle, AT_ONCE).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = server.resident();
    let with = live(server, options.live, rng).await?;
    for task in &tasks {
        task.abort();
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    without.extend(live(server, options.live - options.live / 2, rng).await?);
    println!(
        "{} idle sessions: connected at {:.0} a second",
        options.idle,
        options.idle as f64 / took.as_secs_f64().max(1e-9)
    );
    if let (Some(before), Some(after)) = (before, after) {
        let each = (after as f64 - before as f64) / options.idle as f64;
        println!("  resident memory of the server: {:.1} KiB each", each / 1024.0);
    }
    let (without, with) = (Percentiles::of(without.iter()), Percentiles::of(with.iter()));
    println!(
        "  a live caller's time to first word, p50 and p99 of {} turns: {:.0} and {:.0} ms without them, {:.0} and {:.0} ms \
         with them ({:.2}, {:.2})",
        options.live,
        without.p50,
        without.p99,
        with.p50,
        with.p99,
        with.p50 / without.p50,
        with.p99 / without.p99
    );
    Ok(())
}

/// Opens sessions that do nothing but answer pings.
async fn idle(
    server: &Server,
    count: usize,
    at_once: usize,
) -> Result<(Vec<tokio::task::JoinHandle<()>>, Duration), String> {
    let bar = ProgressBar::new(count as u64);
    let started = Instant::now();
    let connected = stream::iter(0..count).map(|_| server.realtime()).buffer_unordered(at_once);
    let mut tasks = Vec::with_capacity(count);
    futures::pin_mut!(connected);
    while let Some(talk) = connected.next().await {
        tasks.push(tokio::spawn(talk?.idle()));
        bar.inc(1);
    }
    let took = started.elapsed();
    bar.finish_and_clear();
    Ok((tasks, took))
}

/// Turns of one caller, each a different continuation of the same conversation.
async fn live(server: &Server, turns: usize, rng: &mut StdRng) -> Result<Vec<Duration>, String> {
    let mut talk = server.responses().await?;
    let instructions = format!("{} You are a friendly phone agent.", rng.random_range(0..1_000_000));
    let create = |more: Value| {
        let common = json!({"type": "response.create", "model": server.model, "instructions": instructions, "store": false,
                            "temperature": 0, "max_output_tokens": 2});
        with(common, more)
    };
    talk.send(&create(json!({"generate": false}))).await?;
    let base = talk.until(&["response.completed"]).await?["response"]["id"].clone();
    let bar = ProgressBar::new(turns as u64);
    let mut times = Vec::with_capacity(turns);
    for _ in 0..turns {
        let request = create(json!({"input": words(rng, 12), "previous_response_id": base}));
        times.push(first_word(&mut talk, &request).await?.0);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(times)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// In milliseconds.
fn median(times: &[Duration]) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    times.get(times.len() / 2).copied().map_or(0.0, ms)
}
