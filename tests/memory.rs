//! Memory under many conversations stays within the model, the prefix cache's budget, and a margin.
#![allow(clippy::unwrap_used)]

mod common;

use bytesize::ByteSize;
use common::{PLAIN, Server, config, long, request, run, user};
use serde_json::Value;

/// The allocator of the program, so that what is measured is what runs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Resident bytes of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn conversations_stay_within_the_budget() {
    run(async {
        let mut config = config();
        config.model.prefix_cache = ByteSize::mib(256);
        let server = Server::start(config).await;
        server.ask(&request(PLAIN, "Hello")).await;
        let model = resident();
        let bound = model + (256 << 20) + (200 << 20);
        let (conversations, turns) = if long() { (150, 50) } else { (14, 3) };
        let mut curve = Vec::new();
        let mut last = Value::Null;
        for n in 0..conversations {
            let text = format!("Story {n}. {}", "The sea was calm and the boat was small. ".repeat(16));
            last = request(PLAIN, &text);
            last["max_tokens"] = 4.into();
            let answer = server.ask(&last).await;
            last["messages"].as_array_mut().unwrap().push(answer["choices"][0]["message"].clone());
            curve.push(resident());
        }
        for n in 0..turns {
            last["messages"].as_array_mut().unwrap().push(user(&format!("And then, {n}?")));
            let answer = server.ask(&last).await;
            last["messages"].as_array_mut().unwrap().push(answer["choices"][0]["message"].clone());
            curve.push(resident());
        }
        let mib = |bytes: u64| bytes >> 20;
        let sampled: Vec<u64> = curve.iter().step_by(curve.len().div_ceil(20)).map(|bytes| mib(*bytes)).collect();
        let most = curve.iter().max().copied().unwrap();
        println!(
            "model {} MiB, highest {} MiB of {} allowed; curve in MiB: {sampled:?}",
            mib(model),
            mib(most),
            mib(bound)
        );
        let gauges = server.electron.engine().gauges();
        println!("prefix cache emptied {} times", gauges.prefix_cache_flushes);
        assert!(gauges.prefix_cache_flushes > 0, "the budget was never reached");
        assert!(most <= bound, "{} MiB of {} MiB", mib(most), mib(bound));
    });
}
