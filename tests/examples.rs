//! The Rust examples, run as a user would.
#![allow(clippy::unwrap_used)]

mod common;

use std::{path::Path, process::Stdio, time::Duration};

use common::{KEY, SERVER, run};
use tokio::{io::AsyncWriteExt, process::Command};

#[test]
fn the_voice_agent_speaks_and_runs_its_tools() {
    run(async {
        let programs = Path::new(env!("CARGO_BIN_EXE_electron-gateway")).parent().unwrap().join("examples");
        let mut agent = Command::new(programs.join("voice_agent"))
            .env("ELECTRON_URL", format!("{}/v1/realtime", SERVER.url.replacen("http", "ws", 1)))
            .env("ELECTRON_API_KEY", KEY)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut words = agent.stdin.take().unwrap();
        words.write_all(b"Good morning.\nWhere is my order 1234?\n").await.unwrap();
        drop(words);
        let ended = tokio::time::timeout(Duration::from_secs(120), agent.wait_with_output()).await.unwrap().unwrap();
        let (spoken, logged) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.success(), "{logged}");
        let spoken: Vec<&str> = spoken.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(spoken[0], "Hello, how can I help you?");
        assert!(spoken.len() >= 3, "{spoken:?}");
    });
}
