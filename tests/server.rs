//! The server over real sockets: figures, limits, errors, clients that leave.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{KEY, PLAIN, SERVER, Server, config, key, read_until, request, run, user};
use electron_gateway::config::Config;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

#[test]
fn a_stream_has_the_chunks_that_clients_expect() {
    run(async {
        let mut body = request(PLAIN, "Count from one to five.");
        body["stream_options"] = json!({"include_usage": true});
        let chunks = SERVER.chunks(&body).await;
        let (last, others) = chunks.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert!(last["usage"]["completion_tokens"].as_u64().unwrap() > 0);
        assert!(
            others.iter().all(|chunk| chunk["usage"].is_null() && chunk.as_object().unwrap().contains_key("usage"))
        );
        let roles = others.iter().filter(|chunk| chunk["choices"][0]["delta"].get("role").is_some());
        assert_eq!(roles.count(), 1);
        let reasons: Vec<&Value> = others.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
        assert!(reasons[..reasons.len() - 1].iter().all(|reason| reason.is_null()));
        assert!(reasons.last().unwrap().is_string());
        assert!(others.iter().all(|chunk| chunk["id"] == others[0]["id"]));
    });
}

#[test]
fn figures_are_exact_and_a_conversation_that_goes_on_is_cached() {
    run(async {
        let mut body = request(PLAIN, "Remember the number 4711 please.");
        let first = SERVER.ask(&body).await;
        let usage = |answer: &Value, name: &str| answer["usage"][name].as_u64().unwrap();
        assert_eq!(usage(&first, "total_tokens"), usage(&first, "prompt_tokens") + usage(&first, "completion_tokens"));

        let messages = body["messages"].as_array_mut().unwrap();
        messages.push(first["choices"][0]["message"].clone());
        messages.push(user("Which number was it?"));
        let second = SERVER.ask(&body).await;
        let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        let known = usage(&first, "prompt_tokens") + usage(&first, "completion_tokens");
        assert!(cached + 2 >= known, "{cached} of the {known} tokens of the first turn were cached");
        assert!(cached < usage(&second, "prompt_tokens"));
    });
}

#[test]
fn a_cached_history_gives_the_same_answer_as_a_cold_one() {
    run(async {
        let history = |n: u32| {
            json!([{"role": "system", "content": PLAIN}, user(&format!("My house has {n} rooms and a red door.")),
                   {"role": "assistant", "content": "That sounds lovely."}])
        };
        let mut body = json!({"model": "electron", "messages": history(31), "max_tokens": 12, "temperature": 0,
                              "logprobs": true});
        body["messages"].as_array_mut().unwrap().push(user("What colour is my door?"));
        let cold = SERVER.ask(&body).await;
        // A turn that shares the history and ends elsewhere, after which the first prompt is partly cached.
        let mut other = body.clone();
        other["messages"].as_array_mut().unwrap().pop();
        other["messages"].as_array_mut().unwrap().push(user("What colour is the sky over my house?"));
        let warm = SERVER.ask(&other).await;
        assert!(warm["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 20);
        let text = |answer: &Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        assert!(!text(&cold).is_empty() && !text(&warm).is_empty());

        // The same prompt, now cold on a server that has cached nothing.
        let fresh = Server::start(config()).await;
        let again = fresh.ask(&other).await;
        assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
        assert_eq!(text(&again), text(&warm));
    });
}

#[test]
fn a_seed_repeats_an_answer() {
    run(async {
        let mut body = request(PLAIN, "Tell me something surprising.");
        body["temperature"] = 1.into();
        body["seed"] = 42.into();
        let text = |answer: Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        let first = text(SERVER.ask(&body).await);
        assert_eq!(first, text(SERVER.ask(&body).await));
        body["seed"] = 43.into();
        assert_ne!(first, text(SERVER.ask(&body).await));
    });
}

#[test]
fn a_stop_text_ends_the_answer_and_is_no_part_of_it() {
    run(async {
        let mut body = request(PLAIN, "What is the capital of France?");
        let whole = SERVER.ask(&body).await["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        // A text in the middle of the answer, across the border of two words.
        let middle: String = whole.chars().skip(6).take(5).collect();
        body["stop"] = json!([middle]);
        let answer = SERVER.ask(&body).await;
        let expected = &whole[..whole.find(&middle).unwrap()];
        assert_eq!(answer["choices"][0]["message"]["content"], expected);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    });
}

#[test]
fn a_client_that_leaves_stops_its_turn_and_is_counted() {
    run(async {
        let server = &*SERVER;
        let counted = server.metric("electron_turns_total{finish_reason=\"cancelled\"}").await;
        let mut body = request(PLAIN, "Write a very long story about the sea.");
        body["max_tokens"] = 2000.into();
        body["stream"] = true.into();
        let response = server.post(&body).await;
        read_until(response, "content\":\"").await;
        // The connection is closed by now. The next caller is served long before 2000 tokens would have come.
        let answer = tokio::time::timeout(Duration::from_secs(20), server.ask(&request(PLAIN, "Hi"))).await;
        assert!(answer.is_ok(), "the turn of a client that left went on");
        // Figures are of the whole process, and other tests count too.
        let counts = async {
            while server.metric("electron_turns_total{finish_reason=\"cancelled\"}").await <= counted {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), counts).await.expect("the turn was not counted");
    });
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    run(async {
        let mut config = config();
        config.model.queue = 1;
        let server = Server::start(config).await;
        let mut body = request(PLAIN, "Write a very long story.");
        body["max_tokens"] = 400.into();
        body["stream"] = true.into();
        // The first runs once its first token is there; the second waits; the third finds no place.
        let running = server.post(&body).await;
        let waiting = tokio::spawn({
            let (http, url, body) = (server.http.clone(), server.url.clone(), body.clone());
            async move {
                http.post(format!("{url}/v1/chat/completions"))
                    .bearer_auth(KEY)
                    .json(&body)
                    .send()
                    .await
                    .unwrap()
                    .status()
            }
        });
        while server.electron.engine().gauges().queued < 1 {
            tokio::task::yield_now().await;
        }
        let refused = server.post(&body).await;
        assert_eq!(refused.status(), 503);
        assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
        let why: Value = refused.json().await.unwrap();
        assert_eq!(why["error"]["type"], "overloaded_error");
        drop(running);
        assert_eq!(waiting.await.unwrap(), 200, "the one that waited is served");
    });
}

#[test]
fn keys_have_their_limits() {
    run(async {
        let keys = vec![key("a", 1, 0, &[]), key("b", 0, 1, &[]), key("c", 0, 0, &["other"])];
        let config = Config { keys, ..config() };
        let server = Server::start(config).await;
        let ask = |key: &'static str, stream: bool| {
            let mut body = request(PLAIN, "Hi");
            body["stream"] = stream.into();
            if stream {
                // Longer than the next request takes to come, whatever the model would rather say: token 2 ends a turn.
                body["max_tokens"] = 200.into();
                body["logit_bias"] = json!({"2": -100});
            }
            server.http.post(format!("{}/v1/chat/completions", server.url)).bearer_auth(key).json(&body).send()
        };
        assert_eq!(ask("a", false).await.unwrap().status(), 200);
        let refused = ask("a", false).await.unwrap();
        assert_eq!(refused.status(), 429);
        assert!(refused.headers().contains_key("retry-after"));

        let running = ask("b", true).await.unwrap();
        let second = ask("b", false).await.unwrap();
        assert_eq!(second.status(), 429);
        assert!(
            second.json::<Value>().await.unwrap()["error"]["message"]
                .as_str()
                .unwrap()
                .starts_with("Concurrency limit reached")
        );
        running.text().await.unwrap();
        assert_eq!(ask("b", false).await.unwrap().status(), 200);

        assert_eq!(ask("c", false).await.unwrap().status(), 403);
        assert_eq!(ask("d", false).await.unwrap().status(), 401);
    });
}

#[test]
fn every_answer_carries_an_id_and_every_error_its_details() {
    run(async {
        let url = format!("{}/v1/chat/completions", SERVER.url);
        let kept =
            SERVER.http.post(&url).bearer_auth(KEY).header("x-request-id", "mine-1").body("{").send().await.unwrap();
        assert_eq!(kept.headers()["x-request-id"], "mine-1");
        let error: Value = kept.json().await.unwrap();
        assert_eq!(error["error"]["request_id"], "mine-1");

        let odd =
            SERVER.http.get(format!("{}/nothing", SERVER.url)).header("x-request-id", "a b").send().await.unwrap();
        assert_eq!(odd.status(), 404);
        assert_ne!(odd.headers()["x-request-id"], "a b");
        assert_eq!(SERVER.http.get(&url).bearer_auth(KEY).send().await.unwrap().status(), 405);

        let faults = SERVER.post(&json!({"model": 1, "messages": [{"role": "ghost"}], "temperature": 3, "n": 2})).await;
        let error: Value = faults.json().await.unwrap();
        let paths: Vec<&Value> = error["error"]["details"].as_array().unwrap().iter().map(|d| &d["path"]).collect();
        for path in [json!(["model"]), json!(["messages", 0, "role"]), json!(["temperature"]), json!(["n"])] {
            assert!(paths.contains(&&path), "{path} is missing in {paths:?}");
        }
    });
}

#[test]
fn broken_bytes_on_the_wire_do_no_harm() {
    run(async {
        let address = SERVER.url.strip_prefix("http://").unwrap();
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01\x00"[..],
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"\0\0\0\0",
        ] {
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.write_all(bytes).await.unwrap();
            socket.shutdown().await.unwrap();
            let mut rest = Vec::new();
            let _ = socket.read_to_end(&mut rest).await;
        }
        // A client that sends half a body and leaves.
        let mut socket = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{\"model\""
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        drop(socket);
        assert_eq!(SERVER.post(&request(PLAIN, "Hi")).await.status(), 200);
    });
}

#[test]
fn a_connection_outlives_an_answer_that_comes_before_the_body_is_read() {
    run(async {
        let mut socket = TcpStream::connect(SERVER.url.strip_prefix("http://").unwrap()).await.unwrap();
        for _ in 0..100 {
            for (path, key, status) in [("chat/completions", "wrong", 401), ("nowhere", KEY, 404)] {
                let length = 200_000;
                let head = format!(
                    "POST /v1/{path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
                );
                socket.write_all(head.as_bytes()).await.unwrap();
                tokio::task::yield_now().await;
                socket.write_all(&vec![b' '; length]).await.unwrap();
                let answer = read_answer(&mut socket).await;
                assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
            }
        }
    });
}

/// The head and body of an answer with a length.
async fn read_answer(socket: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    loop {
        assert_ne!(socket.read_buf(&mut answer).await.unwrap(), 0, "the connection was closed");
        let text = String::from_utf8_lossy(&answer).to_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        if body.len() == length.parse::<usize>().unwrap() {
            return String::from_utf8(answer).unwrap();
        }
    }
}

#[test]
fn the_contract_is_served() {
    run(async {
        let text = SERVER.http.get(format!("{}/openapi.yaml", SERVER.url)).send().await.unwrap().text().await.unwrap();
        assert!(text.contains("/waves/v1/chat/completions"));
        let waves = SERVER.http.get(format!("{}/waves/v1/models", SERVER.url)).bearer_auth(KEY).send().await.unwrap();
        assert_eq!(waves.json::<Value>().await.unwrap()["data"][0]["id"], "electron");
    });
}
