//! The command line.

use std::process::ExitCode;

use clap::Parser;
use electron_gateway::command::{Cli, run};

/// The engine frees the prefix cache in large pieces; glibc's allocator would keep them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("electron-gateway: {fault}");
            ExitCode::FAILURE
        }
    }
}
