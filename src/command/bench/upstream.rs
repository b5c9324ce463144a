//! `bench upstream`: what it costs to be in between, measured on a mock upstream whose tokens tell when they left.
//!
//! The mock, the gateway and this client are processes of their own on the same machine. Requests come when they come
//! (open loop, Poisson), whether or not earlier ones have been answered, and times count from when a request was due, so
//! that a server that stalls is not spared the wait of those behind it. Each measure is taken of the mock alone, of the
//! gateway, and of other proxies that are named, one after the other in the same run.

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clap::Args;
use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    task::JoinSet,
    time::Instant,
};

use super::mock;
use crate::server;

/// Options of `bench upstream`.
#[derive(Clone, Debug, Args)]
pub(super) struct Options {
    /// A mock that runs already: its base URL, as `bench mock` prints it. Without it one is started.
    #[arg(long, value_name = "URL")]
    mock: Option<String>,
    /// Another proxy in front of the mock, for comparison: NAME=BASE_URL,KEY,PROCESS_ID. May be repeated.
    #[arg(long, value_name = "PROXY")]
    also: Vec<String>,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "first-token,rate,streams,memory")]
    measure: Vec<Measure>,
    /// Streaming requests a second for the time to the first token.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    /// The ramp for the highest rate of whole answers, in requests a second.
    #[arg(long, value_delimiter = ',', default_value = "500,1000,1500,2000,2500,3000,3500,4000")]
    ramp: Vec<u32>,
    /// The 99th percentile under which a rate is held, in milliseconds.
    #[arg(long, default_value_t = 5.0)]
    bound: f64,
    /// How long each step and each measure takes.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Streams that are open at once while the delay of each token is measured, at 20 tokens a second.
    #[arg(long, default_value_t = 1_000)]
    streams: usize,
    /// How long they are open.
    #[arg(long, default_value_t = 60)]
    stream_seconds: u64,
    /// Streams that are open at once while memory is measured, at 1 token a second.
    #[arg(long, default_value_t = 5_000)]
    open: usize,
    /// Makes the arrivals repeatable.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON in place of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Measure {
    FirstToken,
    Rate,
    Streams,
    Memory,
}

/// From one stream's beginning to the next one's.
const OPENING: Duration = Duration::from_millis(1);

/// A server that is measured.
struct Target {
    name: String,
    base: String,
    key: String,
    process: Option<u32>,
    http: reqwest::Client,
}

/// One figure of one server.
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    server: String,
    load: String,
    requests: usize,
    errors: usize,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    /// Of one core.
    cpu_percent: f64,
    resident_mib: f64,
    note: String,
}

/// What came of a load.
struct Outcome {
    /// Microseconds.
    times: Histogram<u64>,
    errors: usize,
    first_error: Option<String>,
}

/// Processor time and memory of a process while a load ran.
struct Usage {
    cpu_percent: f64,
    resident: u64,
}

pub(super) async fn run(options: Options) -> Result<(), String> {
    let _ = rlimit::increase_nofile_limit(rlimit::INFINITY);
    let mut children = Vec::new();
    let base = match &options.mock {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => {
            let (child, line) = spawn(&["bench", "mock"], "The mock upstream is on ").await?;
            children.push(child);
            line
        }
    };
    let gateway = gateway(&base, &mut children).await?;
    let mut targets = vec![Target::new("the mock alone", &base, "none", None)?, gateway];
    for also in &options.also {
        let wrong = || format!("--also {also}: write NAME=BASE_URL,KEY,PROCESS_ID");
        let (name, rest) = also.split_once('=').ok_or_else(wrong)?;
        let parts: Vec<&str> = rest.split(',').collect();
        let [url, key, process] = parts[..] else { return Err(wrong()) };
        targets.push(Target::new(name, url, key, Some(process.parse().map_err(|_| wrong())?))?);
    }
    let mut rows = Vec::new();
    for measure in &options.measure {
        for target in &targets {
            // Nothing is to be learnt of the mock's own memory.
            if *measure == Measure::Memory && target.process.is_none() {
                continue;
            }
            eprintln!("{} of {}", measure.told(), target.name);
            rows.extend(measure.take(target, &options).await);
            if !options.json {
                rows.last().into_iter().for_each(Row::print);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows).map_err(|e| e.to_string())?);
    }
    for mut child in children {
        let _ = child.kill().await;
    }
    Ok(())
}

/// Starts this program with these arguments, and gives what it prints behind a mark.
async fn spawn(arguments: &[&str], mark: &str) -> Result<(Child, String), String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("{} did not start: {e}", arguments.join(" ")))?;
    let output = child.stdout.take().ok_or("a process without output")?;
    let mut lines = BufReader::new(output).lines();
    let found = loop {
        let line = lines.next_line().await.map_err(|e| e.to_string())?;
        let line = line.ok_or_else(|| format!("{} ended before it served", arguments.join(" ")))?;
        if let Some((_, rest)) = line.split_once(mark) {
            break rest.split(' ').next().unwrap_or_default().to_owned();
        }
    };
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Ok((child, found))
}

/// Starts a gateway in front of the mock.
async fn gateway(mock: &str, children: &mut Vec<Child>) -> Result<Target, String> {
    let key = server::new_key()?;
    let file = std::env::temp_dir().join(format!("electron-bench-{}.toml", std::process::id()));
    let text = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nmax_connections = 100000\n[model]\nsource = \"\"\n\
         [models.mock]\nurls = [\"{mock}\"]\nfirst_token_timeout = \"60s\"\n[log]\nlevel = \"error\"\n\
         [[keys]]\nname = \"bench\"\nhash = \"{}\"\n",
        server::hash_key(&key)
    );
    std::fs::write(&file, text).map_err(|e| format!("{}: {e}", file.display()))?;
    let started = spawn(&["serve", "--config", &file.to_string_lossy()], " on http://").await;
    let _ = std::fs::remove_file(&file);
    let (child, address) = started?;
    let process = child.id();
    children.push(child);
    Target::new("electron-gateway", &format!("http://{address}/v1"), &key, process)
}

// === impl Measure ===

impl Measure {
    fn told(self) -> &'static str {
        match self {
            Self::FirstToken => "time to first token",
            Self::Rate => "highest rate",
            Self::Streams => "delay of each token",
            Self::Memory => "memory of open streams",
        }
    }

    async fn take(self, target: &Target, options: &Options) -> Vec<Row> {
        match self {
            Self::FirstToken => {
                let load = format!("{} streams/s", options.rate);
                let (outcome, usage) = target.arrivals(options.rate, true, options).await;
                vec![Row::new("first token", target, load, &outcome, &usage)]
            }
            Self::Rate => {
                let mut best = None;
                for &rate in &options.ramp {
                    let (outcome, usage) = target.arrivals(rate, false, options).await;
                    let row = Row::new("whole answer", target, format!("{rate} requests/s"), &outcome, &usage);
                    let good = row.errors == 0 && row.p99_ms < options.bound;
                    if good {
                        best = Some(row);
                        continue;
                    }
                    let note = format!("at {rate}: p99 {:.1} ms, {} errors", row.p99_ms, row.errors);
                    let mut held = best.unwrap_or(row);
                    held.note = note;
                    return vec![held];
                }
                best.into_iter().collect()
            }
            Self::Streams => {
                let (outcome, usage, streams) = target.streams(options.streams, 50, options.stream_seconds).await;
                let load = format!("{streams} streams, 20 tokens/s");
                vec![Row::new("token delay", target, load, &outcome, &usage)]
            }
            Self::Memory => {
                let before = target.resident();
                let (outcome, usage, streams) = target.streams(options.open, 1_000, options.seconds.max(10)).await;
                let mut row =
                    Row::new("open streams", target, format!("{streams} streams, 1 token/s"), &outcome, &usage);
                let each = usage.resident.saturating_sub(before) as f64 / 1024.0 / streams.max(1) as f64;
                row.note = format!("{each:.1} KiB a stream");
                vec![row]
            }
        }
    }
}

// === impl Target ===

impl Target {
    fn new(name: &str, base: &str, key: &str, process: Option<u32>) -> Result<Self, String> {
        let http = reqwest::Client::builder().tcp_nodelay(true).no_proxy().pool_max_idle_per_host(4_096);
        let http = http.build().map_err(|e| e.to_string())?;
        let base = base.trim_end_matches('/').to_owned();
        Ok(Self { name: name.to_owned(), base, key: key.to_owned(), process, http })
    }

    fn request(&self, plan: &str, stream: bool) -> reqwest::RequestBuilder {
        let messages =
            [json!({"role": "system", "content": "You are a mock."}), json!({"role": "user", "content": plan})];
        let body = json!({"model": "mock", "stream": stream, "messages": messages});
        self.http.post(format!("{}/chat/completions", self.base)).bearer_auth(&self.key).json(&body)
    }

    /// Requests at random times, so many a second on average: the time from when each was due to its first token, or to
    /// its whole answer.
    async fn arrivals(&self, rate: u32, stream: bool, options: &Options) -> (Outcome, Usage) {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let mut requests = JoinSet::new();
        // Connections first: what is measured is not their opening.
        let warm = (0..64).map(|_| self.request("tokens=1", stream).send());
        for answer in futures::future::join_all(warm).await.into_iter().flatten() {
            let _ = answer.bytes().await;
        }
        let meter = Meter::start(self.process);
        let begun = Instant::now();
        let mut due = begun;
        let end = begun + Duration::from_secs(options.seconds);
        while due < end {
            tokio::time::sleep_until(due).await;
            let at = due;
            // The gateway reads every answer as a stream, so that one that has no time in it is all that tells its own time.
            let sent = self.request(if stream { "tokens=4 every=5" } else { "tokens=4" }, stream).send();
            requests.spawn(async move {
                let mut response = sent.await.map_err(|e| e.to_string())?;
                if !response.status().is_success() {
                    return Err(format!("status {}", response.status()));
                }
                let mut first = None;
                let mut seen = Vec::new();
                while let Some(chunk) = response.chunk().await.map_err(|e| e.to_string())? {
                    seen.extend_from_slice(&chunk);
                    if stream && first.is_none() && stamp(&seen).is_some() {
                        first = Some(at.elapsed());
                    }
                }
                let complete = if stream { seen.ends_with(b"[DONE]\n\n") } else { stamp(&seen).is_some() };
                if complete { Ok(first.unwrap_or_else(|| at.elapsed())) } else { Err("the answer is cut".into()) }
            });
            // The gap between two arrivals of a Poisson process.
            let gap = -(1.0 - rng.random::<f64>()).ln() / f64::from(rate);
            due += Duration::from_secs_f64(gap);
        }
        let mut outcome = Outcome::new();
        let late = end + Duration::from_secs(20);
        while let Ok(Some(answered)) = tokio::time::timeout_at(late, requests.join_next()).await {
            outcome.add(answered.unwrap_or_else(|e| Err(e.to_string())));
        }
        for _ in 0..requests.len() {
            outcome.add(Err("no answer came".into()));
        }
        (outcome, meter.stop())
    }

    /// Streams that are open at once, for so many seconds, with a token each so many ms: how long each token is on its way.
    /// Gives also how many were open.
    async fn streams(&self, count: usize, every: u64, seconds: u64) -> (Outcome, Usage, usize) {
        let tokens = (seconds * 1_000 + count as u64 * OPENING.as_millis() as u64) / every;
        let plan = format!("tokens={tokens} every={every}");
        let open = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let mut tasks = Vec::new();
        for n in 0..count {
            let (sent, open, most) = (self.request(&plan, true).send(), open.clone(), most.clone());
            tasks.push(tokio::spawn(async move {
                let mut times = Vec::with_capacity(tokens as usize);
                let mut response = sent.await.map_err(|e| e.to_string())?;
                if !response.status().is_success() {
                    return Err(format!("status {}", response.status()));
                }
                most.fetch_max(open.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                let mut held = Vec::new();
                while let Some(chunk) = response.chunk().await.map_err(|e| e.to_string())? {
                    held.extend_from_slice(&chunk);
                    while let Some((left, end)) = stamp(&held) {
                        times.push(mock::now().saturating_sub(left));
                        held.drain(..end);
                    }
                }
                open.fetch_sub(1, Ordering::Relaxed);
                if times.len() as u64 == tokens {
                    Ok(times)
                } else {
                    Err(format!("{} of {tokens} tokens", times.len()))
                }
            }));
            // They come one after the other, as callers do.
            if n % 8 == 7 {
                tokio::time::sleep(OPENING * 8).await;
            }
        }
        let meter = Meter::start(self.process);
        let mut outcome = Outcome::new();
        let late = Instant::now() + Duration::from_secs(seconds * 2 + 60);
        // While all are open.
        tokio::time::sleep(Duration::from_secs(seconds) * 3 / 4).await;
        let usage = meter.stop();
        for task in tasks {
            match tokio::time::timeout_at(late, task).await {
                Ok(Ok(Ok(times))) => {
                    for time in times {
                        outcome.add(Ok(Duration::from_micros(time)));
                    }
                }
                Ok(Ok(Err(why))) => outcome.add(Err(why)),
                _ => outcome.add(Err("a stream did not end".into())),
            }
        }
        (outcome, usage, most.load(Ordering::Relaxed))
    }

    fn resident(&self) -> u64 {
        self.process.and_then(resident).unwrap_or(0)
    }
}

/// When the first token in these bytes left, and where it ends.
fn stamp(bytes: &[u8]) -> Option<(u64, usize)> {
    const MARK: &[u8] = b"\"content\":\"1";
    let begin = bytes.windows(MARK.len()).position(|found| found == MARK)? + MARK.len() - 1;
    let end = begin + bytes[begin..].iter().position(|b| !b.is_ascii_digit() && *b != b':')?;
    let text = std::str::from_utf8(&bytes[begin..end]).ok()?;
    Some((text.split_once(':')?.1.parse().ok()?, end))
}

// === Processes ===

/// Watches a process.
struct Meter {
    process: Option<u32>,
    begun: Instant,
    ticks: u64,
}

impl Meter {
    fn start(process: Option<u32>) -> Self {
        Self { process, begun: Instant::now(), ticks: process.and_then(ticks).unwrap_or(0) }
    }

    fn stop(&self) -> Usage {
        let ticks = self.process.and_then(ticks).unwrap_or(0).saturating_sub(self.ticks);
        // Linux counts in hundredths of a second, whatever the kernel's own clock.
        let cpu_percent = ticks as f64 / self.begun.elapsed().as_secs_f64();
        Usage { cpu_percent, resident: self.process.and_then(resident).unwrap_or(0) }
    }
}

/// Processor time that a process has used, in hundredths of a second.
fn ticks(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Bytes of memory that are resident in a process.
fn resident(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

// === impl Outcome ===

impl Outcome {
    fn new() -> Self {
        // Microseconds to an hour, three digits.
        let times = Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("these bounds are valid");
        Self { times, errors: 0, first_error: None }
    }

    fn add(&mut self, answered: Result<Duration, String>) {
        match answered {
            Ok(time) => self.times.saturating_record((time.as_micros() as u64).max(1)),
            Err(why) => {
                self.errors += 1;
                self.first_error.get_or_insert(why);
            }
        }
    }
}

// === impl Row ===

impl Row {
    fn new(what: &'static str, target: &Target, load: String, outcome: &Outcome, usage: &Usage) -> Self {
        let at = |quantile| outcome.times.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            what,
            server: target.name.clone(),
            load,
            requests: outcome.times.len() as usize + outcome.errors,
            errors: outcome.errors,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: outcome.times.max() as f64 / 1e3,
            cpu_percent: usage.cpu_percent,
            resident_mib: usage.resident as f64 / f64::from(1 << 20),
            note: outcome.first_error.clone().unwrap_or_default(),
        }
    }

    fn print(&self) {
        println!(
            "{:<13} {:<17} {:<27} {:>7} times {:>5} errors | p50 {:>8.3} p99 {:>8.3} max {:>8.1} ms | {:>4.0} % cpu {:>6.0} MiB {}",
            self.what,
            self.server,
            self.load,
            self.requests,
            self.errors,
            self.p50_ms,
            self.p99_ms,
            self.max_ms,
            self.cpu_percent,
            self.resident_mib,
            self.note
        );
    }
}
