//! `check`: are the settings right, and what are they in the end?

use std::sync::Arc;

use super::Settings;
use crate::{server, tool::guard::Guard};

pub(super) fn run(settings: &Settings) -> Result<(), String> {
    let config = settings.load()?;
    let guard = Guard::new(&config.tools.allow_urls, &config.tools.allow_networks)?;
    let agents = server::load_agents(&config, settings.file(), Arc::new(guard))?;
    print!("{}", config.to_toml());
    for name in agents.names() {
        println!("\n# and the agent `{name}`");
    }
    eprintln!("The settings are right.");
    Ok(())
}
