//! `key create`.

use clap::Subcommand;

use crate::server::{hash_key, new_key};

/// Commands for keys.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a key and print it once, with what to put into the configuration.
    Create {
        /// Whose key it is; it stands in logs.
        name: String,
    },
}

pub(super) fn run(command: &Command) -> Result<(), String> {
    let Command::Create { name } = command;
    let key = new_key()?;
    println!("The key, shown this once:\n\n  {key}\n\nFor the configuration, which holds only its hash:\n");
    println!("[[keys]]\nname = {}\nhash = \"{}\"", toml::Value::String(name.clone()), hash_key(&key));
    println!("# models = [\"electron\"]      # none listed are all\n# requests_per_minute = 600\n# concurrency = 8");
    Ok(())
}
