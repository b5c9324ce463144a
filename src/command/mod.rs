//! The commands of the command line, one file each.

mod bench;
mod chat;
mod check;
mod client;
mod key;
#[cfg(feature = "mistral")]
pub mod model;
#[cfg(not(feature = "mistral"))]
mod no_engine;
mod serve;

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

#[cfg(not(feature = "mistral"))]
use self::no_engine as model;
use crate::config::Config;

/// A gateway for real-time voice agents: a language model that speaks while its tools run.
#[derive(Debug, Parser)]
#[command(name = "electron-gateway", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the model over HTTP.
    Serve(serve::Options),
    /// Talk with a model in the terminal.
    Chat(chat::Options),
    /// Measure a running server, or the engine in this process.
    Bench(bench::Options),
    /// Get and look at models.
    #[cfg(feature = "mistral")]
    #[command(subcommand)]
    Model(model::Command),
    /// Make keys.
    #[command(subcommand)]
    Key(key::Command),
    /// Check the settings and print the effective ones.
    Check(Settings),
}

/// Where settings come from.
#[derive(Debug, Clone, Args)]
pub(crate) struct Settings {
    /// A TOML file with settings.
    #[arg(short, long, value_name = "FILE", env = "ELECTRON_CONFIG")]
    config: Option<PathBuf>,
    /// Sets one setting, for instance model.slots=2. May be repeated.
    #[arg(short, long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// The model: electron-nano, smollm2, a GGUF file, a folder, or a Hugging Face id. Same as --set model.source=…
    #[arg(short, long, value_name = "SOURCE")]
    model: Option<String>,
    /// Address and port. Same as --set server.listen=…
    #[arg(short, long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
}

/// Runs a command to its end.
///
/// # Errors
/// A text for the person at the terminal.
pub fn run(cli: Cli) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("the runtime could not be started: {e}"))?;
    let done = match cli.command {
        Command::Serve(options) => runtime.block_on(serve::run(options)),
        Command::Chat(options) => runtime.block_on(chat::run(options)),
        Command::Bench(options) => runtime.block_on(bench::run(options)),
        #[cfg(feature = "mistral")]
        Command::Model(command) => runtime.block_on(model::run(command)),
        Command::Key(command) => key::run(&command),
        Command::Check(settings) => check::run(&settings),
    };
    // The exit ends everything. Were the tasks dropped before it, the engine's thread would find nobody to answer to, and
    // a model that is being loaded would hold the exit up.
    std::mem::forget(runtime);
    done
}

impl Settings {
    /// Arguments that give another process of this program the same settings.
    fn arguments(&self) -> Vec<std::ffi::OsString> {
        let mut arguments = Vec::new();
        let mut add = |flag: &str, value: std::ffi::OsString| arguments.extend([flag.into(), value]);
        if let Some(config) = &self.config {
            add("--config", config.into());
        }
        for pair in &self.set {
            add("--set", pair.into());
        }
        if let Some(model) = &self.model {
            add("--model", model.into());
        }
        arguments
    }

    /// The file that they come from.
    fn file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// The effective settings.
    fn load(&self) -> Result<Config, String> {
        let mut flags = Vec::new();
        for pair in &self.set {
            let (name, value) = pair
                .split_once('=')
                .ok_or_else(|| format!("--set {pair}: write NAME=VALUE, for instance model.slots=2"))?;
            flags.push((name.trim().to_owned(), value.trim().to_owned()));
        }
        let short = [("model.source", &self.model), ("server.listen", &self.listen)];
        flags.extend(short.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?))));
        Config::load(self.config.as_deref(), std::env::vars(), &flags).map_err(|e| e.to_string())
    }
}
