//! `check`: are the settings right, and what are they in the end?

use super::Settings;

pub(super) fn run(settings: &Settings) -> Result<(), String> {
    let config = settings.load()?;
    print!("{}", config.to_toml());
    eprintln!("The settings are right.");
    Ok(())
}
