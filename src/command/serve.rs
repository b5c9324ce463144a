//! `serve`: the server.

use std::{io::Write, path::Path, sync::Arc};

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Settings, model};
use crate::{
    config::Config,
    server::{self, App, telemetry},
};

/// Options of `serve`.
#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    settings: Settings,
}

pub(super) async fn run(options: Options) -> Result<(), String> {
    let config = options.settings.load()?;
    let telemetry = telemetry::start(&config.log)?;
    let served = serve(config, options.settings.file()).await;
    // Sending the last spans blocks.
    let _ = tokio::task::spawn_blocking(move || telemetry.stop()).await;
    served
}

async fn serve(config: Config, file: Option<&Path>) -> Result<(), String> {
    let stop = signals()?;
    // Every connection is a file, and the usual limit is that of a desktop program.
    let _ = rlimit::increase_nofile_limit(rlimit::INFINITY);
    // The port first: if it is taken, nobody should wait for a model to learn that.
    let listener = server::bind(config.server.listen).await?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let key = if config.keys.is_empty() { Some(server::new_key()?) } else { None };
    let app = App::new(config.clone(), file, address, key.as_deref())?;

    // While the model loads, /health/live answers and everything else says that it is loading.
    let failed = CancellationToken::new();
    let until = {
        let (stop, failed) = (stop.clone(), failed.clone());
        async move {
            tokio::select! { () = stop.cancelled() => {}, () = failed.cancelled() => {} }
        }
    };
    let server = tokio::spawn(server::serve(app.clone(), listener, until));
    let served = if config.has_own_model() {
        let loaded = tokio::select! {
            loaded = model::load(&config.model) => loaded,
            () = stop.cancelled() => Err(String::new()),
        };
        loaded.and_then(|model| app.serve_model(model))
    } else {
        app.check_agents()
    };
    match served {
        Ok(()) => {
            announce(&config, &app.agent_names(), address, key.as_deref());
        }
        Err(why) => {
            failed.cancel();
            let _ = server.await;
            // Stopped while it was loading: no fault.
            return if why.is_empty() { Ok(()) } else { Err(why) };
        }
    }
    match server.await {
        Ok(served) => served.map_err(|e| format!("{address}: {e}")),
        Err(e) => Err(format!("the server ended unexpectedly: {e}")),
    }
}

/// A token that is cancelled on SIGTERM and SIGINT. A second signal ends the process at once.
fn signals() -> Result<CancellationToken, String> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = CancellationToken::new();
    let told = stop.clone();
    let listen = |kind| signal(kind).map_err(|e| format!("signals cannot be received: {e}"));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    tokio::spawn(async move {
        for again in [false, true] {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            if again {
                std::process::exit(130);
            }
            tracing::info!("stopping; once more to stop at once");
            told.cancel();
        }
    });
    Ok(stop)
}

/// Tells what to type next. Whoever started the server may have closed its output, which is no reason to stop.
fn announce(config: &Config, agents: &[Arc<str>], address: std::net::SocketAddr, key: Option<&str>) {
    let shown = key.unwrap_or("$ELECTRON_API_KEY");
    let name = config.default_model();
    let own = match key {
        Some(key) => format!("The key of this run is {key}; for keys that last, use the command `key create`\n"),
        None => String::new(),
    };
    let mut reach = String::new();
    for agent in agents {
        reach.push_str(&format!("Agent {agent}: the model {name}:{agent}"));
        if !config.twilio.auth_token.is_empty() {
            reach.push_str(&format!(
                "; Twilio's webhook is POST {}/agents/{agent}/twilio/voice",
                app_url(config, address)
            ));
        }
        reach.push('\n');
    }
    let own_model = config.has_own_model().then(|| format!("{} ({})", config.model.name, config.model.source));
    let remote = config.models.iter().map(|(name, model)| format!("{name} ({})", model.urls.join(", ")));
    let models = own_model.into_iter().chain(remote).collect::<Vec<_>>().join(", ");
    // However the program was called, it can be called again.
    let program = std::env::args().next().unwrap_or_else(|| "electron-gateway".into());
    let text = format!(
        "\nServing {models} on http://{address}\n{own}{reach}\nTry it:\n\n  \
         curl http://{address}/v1/chat/completions -H 'Authorization: Bearer {shown}' \\\n    \
         -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\":\"{name}\",\"messages\":[{{\"role\":\"user\",\"content\":\"Say hello.\"}}],\"max_tokens\":40}}'\n\n  \
         {program} chat --url http://{address} --key {shown}\n\n"
    );
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Where the server is reached from outside.
fn app_url(config: &Config, address: std::net::SocketAddr) -> String {
    match config.server.public_url.trim_end_matches('/') {
        "" => format!("http://{address}"),
        url => url.to_owned(),
    }
}
