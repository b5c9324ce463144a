//! `bench tools`: what a caller feels of a tool that the gateway runs.
//!
//! A server, a bot and a caller in one process, so that the time between the bot's answer and the caller's first word is
//! read off one clock. Two things are measured: whether the first spoken word waits for the tool, and how soon after the
//! tool's result the answer begins, beside the prefill that this takes at least.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{Json, Router, extract::State, routing::post};
use clap::Args;
use indicatif::ProgressBar;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;
use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{talk::Talk, words};
use crate::{
    command::{Settings, model},
    server::{self, App},
};

/// Options of `bench tools`.
#[derive(Clone, Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    settings: Settings,
    /// Turns with each tool.
    #[arg(long, default_value_t = 15)]
    samples: usize,
    /// How long the slow tool takes.
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = humantime_serde::re::humantime::parse_duration)]
    slow: Duration,
    /// Makes the prompts repeatable.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// When the bot answered, the latest time.
type Answered = Arc<Mutex<Option<Instant>>>;

pub(super) async fn run(options: Options) -> Result<(), String> {
    let mut config = options.settings.load()?;
    let answered = Answered::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|e| e.to_string())?;
    let bot = format!("http://{}", listener.local_addr().map_err(|e| e.to_string())?);
    let slow = options.slow;
    let fast = Duration::from_millis(10);
    let tool = move |pause: Duration| {
        post(move |State(answered): State<Answered>| async move {
            tokio::time::sleep(pause).await;
            *answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            Json(json!({"status": "shipped", "arrives": "tomorrow"}))
        })
    };
    let routes = Router::new().route("/fast", tool(fast)).route("/slow", tool(slow)).with_state(answered.clone());
    tokio::spawn(async move { axum::serve(listener, routes).await });

    config.tools.allow_networks = vec![std::net::IpAddr::from([127, 0, 0, 1]).into()];
    config.server.listen = ([127, 0, 0, 1], 0).into();
    eprintln!("Loading {} …", config.model.source);
    let electron = model::load(&config.model).await?;
    let listener = server::bind(config.server.listen).await?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let key = server::new_key()?;
    let name = config.model.name.clone();
    let file = std::env::temp_dir().join(format!("electron-bench-{}.toml", std::process::id()));
    std::fs::write(&file, agents(&bot)).map_err(|e| format!("{}: {e}", file.display()))?;
    let app = App::new(config, Some(&file), address, Some(&key));
    let _ = std::fs::remove_file(&file);
    let app = app?;
    app.serve_model(electron)?;
    let stop = CancellationToken::new();
    let served = tokio::spawn(server::serve(app, listener, stop.clone().cancelled_owned()));

    let url = format!("http://{address}");
    let mut rng = StdRng::seed_from_u64(options.seed);
    let progress = ProgressBar::new(3 * options.samples as u64);
    let (mut first, mut begins, mut prefill) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()], Vec::new());
    for _ in 0..options.samples {
        // In turns, so that whatever else the machine does meets all of them.
        for (at, path) in ["fast", "slow"].into_iter().enumerate() {
            let mut talk = begin(&url, &format!("{name}:{path}"), &key, &mut rng).await?;
            let asked = Instant::now();
            talk.send(&json!({"type": "response.create"})).await?;
            talk.until(&["response.output_text.delta"]).await?;
            first[at].push(asked.elapsed());
            talk.until(&["response.mcp_call.completed"]).await?;
            talk.until(&["response.output_text.delta"]).await?;
            let spoken = Instant::now();
            let answered = *answered.lock().unwrap_or_else(PoisonError::into_inner);
            begins[at].push(spoken - answered.ok_or("the tool was not asked")?);
            talk.until(&["response.done"]).await?;
            progress.inc(1);
        }
        // The same turn with the caller's own tool: from its result to the first word there is one prefill.
        let mut talk = begin(&url, &format!("{name}:own"), &key, &mut rng).await?;
        talk.send(&json!({"type": "response.create"})).await?;
        let call = talk.until(&["response.function_call_arguments.done"]).await?;
        talk.until(&["response.done"]).await?;
        tokio::time::sleep(fast).await;
        let output = json!({"type": "function_call_output", "call_id": call["call_id"],
                            "output": "{\"status\":\"shipped\",\"arrives\":\"tomorrow\"}"});
        let asked = Instant::now();
        talk.send(&json!({"type": "conversation.item.create", "item": output})).await?;
        talk.send(&json!({"type": "response.create", "response": {"tool_choice": "none"}})).await?;
        talk.until(&["response.output_text.delta"]).await?;
        prefill.push(asked.elapsed());
        talk.until(&["response.done"]).await?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    stop.cancel();
    let _ = served.await;

    println!("| ms, of {} turns | p50 | least | most |", options.samples);
    println!("| --- | --- | --- | --- |");
    let row = |what: &str, times: &[Duration]| {
        let mut ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let (least, most) = (ms.first().copied().unwrap_or_default(), ms.last().copied().unwrap_or_default());
        println!("| {what} | {:.1} | {least:.1} | {most:.1} |", ms.get(ms.len() / 2).copied().unwrap_or_default());
    };
    let slow = humantime_serde::re::humantime::format_duration(slow);
    row("first spoken word, tool of 10 ms", &first[0]);
    row(&format!("first spoken word, tool of {slow}"), &first[1]);
    row("from the tool's answer to the first word of the answer, tool of 10 ms", &begins[0]);
    row(&format!("the same, tool of {slow}"), &begins[1]);
    row("the same with the caller's own tool: one prefill", &prefill);
    Ok(())
}

/// Agents that differ in how their tool is run. After one round they answer.
fn agents(bot: &str) -> String {
    let agent = |name: &str, callback: String| {
        format!(
            "[agents.{name}]\ninstructions = \"You are a phone agent and speak with callers.\"\nmax_tool_rounds = 1\n\
             tool_choice = \"required\"\ntemperature = 0.0\nmax_tokens = 24\n[[agents.{name}.tools]]\n\
             name = \"order_status\"\ndescription = \"Find out where an order is.\"\n{callback}\
             parameters = {{ type = \"object\", properties = {{ order = {{ type = \"string\", maxLength = 6 }} }}, \
             required = [\"order\"] }}\n"
        )
    };
    let run = |path: &str| format!("callback = {{ url = \"{bot}/{path}\", timeout = \"60s\" }}\n");
    [agent("fast", run("fast")), agent("slow", run("slow")), agent("own", String::new())].concat()
}

/// A call on which a tool has to be called next.
async fn begin(url: &str, model: &str, key: &str, rng: &mut StdRng) -> Result<Talk, String> {
    let mut talk = Talk::connect(url, &format!("/v1/realtime?model={model}"), key).await?;
    let session = json!({"instructions": words(rng, 60)});
    talk.send(&json!({"type": "session.update", "session": session})).await?;
    talk.until(&["session.updated"]).await?;
    let text = format!("Where is my order? {}", words(rng, 12));
    let item = json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]});
    talk.send(&json!({"type": "conversation.item.create", "item": item})).await?;
    talk.until(&["conversation.item.done"]).await?;
    Ok(talk)
}
