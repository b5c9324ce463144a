//! Electron Gateway: the middle of a voice agent.
//!
//! Speech-to-text gives it the caller's words, it drives a language model, and text-to-speech speaks what it answers.
//! Data flows one way, from a dialect over the Electron layer to an engine, and events flow back up.

pub mod agent;
pub mod command;
pub mod config;
pub mod dialect;
pub mod electron;
pub mod engine;
pub mod error;
pub mod secret;
pub mod server;
pub mod session;
pub mod tool;
pub mod turn;
