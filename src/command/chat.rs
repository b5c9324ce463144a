//! `chat`: talk with a model in the terminal, and see what a caller would hear and when.

use std::{
    io::{BufRead, IsTerminal, Write},
    path::PathBuf,
    time::Instant,
};

use clap::Args;
use futures::StreamExt;
use serde_json::{Value, json};

use super::{
    Settings,
    client::{Remote, Target},
    model,
};
use crate::{server::telemetry, turn::TurnEvent};

/// Options of `chat`.
#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    server: Remote,
    /// The system prompt. The default is that of a phone agent, which turns the filler on.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// A JSON file with a list of OpenAI function tools. You play the tools: a result is asked for at each call.
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Whether the model has to call: auto, required, none, or a tool's name.
    #[arg(long, default_value = "auto")]
    tool_choice: String,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 200)]
    max_tokens: u32,
    /// 0 (always the likeliest word) to 2.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
}

const AGENT: &str = "You are a friendly phone agent. Answer in one or two short spoken sentences. \
                     Briefly acknowledge out loud before using any tool, like 'Let me check that' or 'One moment'.";

pub(super) async fn run(options: Options) -> Result<(), String> {
    let mut config = options.settings.load()?;
    let tools = options.tools.as_ref().map(|path| read_tools(path)).transpose()?;
    let target = match &options.server.url {
        Some(url) => Target::server(url, &options.server.key)?,
        None => {
            config.log.level = "warn".into();
            let _telemetry = telemetry::start(&config.log)?;
            eprintln!("Loading {} …", config.model.source);
            Target::Engine(model::load(&config.model).await?)
        }
    };
    let mut messages = vec![json!({"role": "system", "content": options.system.as_deref().unwrap_or(AGENT)})];
    eprintln!("Type what the caller says; an empty line or Ctrl-D ends.");
    while let Some(said) = ask("you")? {
        messages.push(json!({"role": "user", "content": said}));
        // A turn that calls tools is followed by one that answers from their results.
        let mut choice = options.tool_choice.clone();
        loop {
            let body = body(&options, &config.model.name, &messages, tools.as_ref(), &choice);
            let answer = show(&target, body).await?;
            let calls = answer["tool_calls"].as_array().cloned().unwrap_or_default();
            messages.push(answer);
            if calls.is_empty() {
                break;
            }
            for call in calls {
                let name = call["function"]["name"].as_str().unwrap_or_default();
                let Some(result) = ask(&format!("result of {name}"))? else { return Ok(()) };
                messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": result}));
            }
            choice = "auto".into();
        }
    }
    Ok(())
}

fn read_tools(path: &std::path::Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("{}: not valid JSON: {e}", path.display()))
}

fn body(options: &Options, model: &str, messages: &[Value], tools: Option<&Value>, choice: &str) -> Value {
    let mut body = json!({
        "model": model, "messages": messages,
        "max_tokens": options.max_tokens, "temperature": (f64::from(options.temperature) * 100.0).round() / 100.0,
    });
    if let Some(tools) = tools {
        body["tools"] = tools.clone();
        body["tool_choice"] = match choice {
            "auto" | "none" | "required" => choice.into(),
            name => json!({"type": "function", "function": {"name": name}}),
        };
    }
    body
}

/// Prints a turn as it comes, with its timings, and returns it as a message.
async fn show(target: &Target, body: Value) -> Result<Value, String> {
    let started = Instant::now();
    let mut events = target.turn(body).await?;
    let mut text = String::new();
    let mut calls: Vec<Value> = Vec::new();
    let mut first = None;
    let ms = |at: Instant| (at - started).as_millis();
    while let Some(event) = events.next().await {
        match event? {
            TurnEvent::Text { delta, .. } => {
                if text.is_empty() {
                    print!("agent> ");
                }
                first.get_or_insert_with(Instant::now);
                print!("{delta}");
                let _ = std::io::stdout().flush();
                text.push_str(&delta);
            }
            TurnEvent::CallBegun { id, name, .. } => {
                first.get_or_insert_with(Instant::now);
                print!("\n  calls {name} at {} ms: ", started.elapsed().as_millis());
                calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}}));
            }
            TurnEvent::Arguments { index, delta } => {
                print!("{delta}");
                let _ = std::io::stdout().flush();
                if let Some(Value::String(arguments)) =
                    calls.get_mut(index).map(|call| &mut call["function"]["arguments"])
                {
                    arguments.push_str(&delta);
                }
            }
            TurnEvent::CallEnded { .. } => {}
            TurnEvent::Finished { usage, .. } => println!(
                "\n  first word after {} ms, whole turn {} ms; {} tokens in ({} cached), {} out",
                first.map_or(0, ms),
                started.elapsed().as_millis(),
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens
            ),
        }
    }
    let mut message = json!({"role": "assistant", "content": text});
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    Ok(message)
}

/// A line from the person at the terminal; none at the end.
fn ask(who: &str) -> Result<Option<String>, String> {
    if std::io::stdin().is_terminal() {
        print!("{who}> ");
        std::io::stdout().flush().map_err(|e| e.to_string())?;
    }
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(|e| e.to_string())?;
    let line = line.trim();
    Ok((!line.is_empty()).then(|| line.to_owned()))
}
