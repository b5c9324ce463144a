//! Fillers and tool calls, with the real model over a real socket.
//!
//! `ELECTRON_LONG=1` runs as many turns as the README's figures are of.
#![allow(clippy::unwrap_used)]

mod common;

use common::{PLAIN, SERVER, VOICE, find_order, long, request, run, tool};
use serde_json::{Value, json};

/// What callers say, and a word that the phrases of their language share with no other language of the list.
const CALLERS: [&str; 10] = [
    "Where is my order 1234?",
    "Wo ist meine Bestellung 1234?",
    "¿Dónde está mi pedido 1234?",
    "Où est ma commande 1234 ?",
    "Dov'è il mio ordine 1234?",
    "Onde está a minha encomenda 1234?",
    "我的订单1234在哪里？",
    "注文1234はどこですか？",
    "Где мой заказ 1234?",
    "मेरा ऑर्डर 1234 कहाँ है?",
];

fn must_call(system: &str, text: &str, seed: usize) -> Value {
    let mut body = request(system, text);
    body["tools"] = json!([find_order()]);
    body["tool_choice"] = "required".into();
    body["parallel_tool_calls"] = false.into();
    body["max_tokens"] = 80.into();
    body["temperature"] = 1.into();
    body["seed"] = seed.into();
    body
}

#[test]
fn with_a_voice_prompt_every_turn_that_calls_speaks_first() {
    run(async {
        let turns = if long() { 50 } else { 4 };
        let mut spoken = 0;
        for turn in 0..turns {
            let text = CALLERS[turn % CALLERS.len()];
            let chunks = SERVER.chunks(&must_call(VOICE, text, turn)).await;
            let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
            let words = deltas.iter().position(|d| d["content"].as_str().is_some_and(|text| !text.is_empty())).unwrap();
            let call = deltas.iter().position(|d| d["tool_calls"].is_array()).unwrap();
            assert!(words < call, "{text}: the words come after the call");
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

            let message = SERVER.ask(&must_call(VOICE, text, turn)).await["choices"][0]["message"].take();
            assert!(!message["content"].as_str().unwrap().is_empty());
            assert_eq!(message["tool_calls"][0]["function"]["name"], "find_order");
            assert_eq!(message["content"], *deltas[words]["content"].as_str().unwrap(), "same seed, same phrase");
            spoken += 1;
        }
        println!("voice prompt: {spoken} of {turns} turns, streamed and whole, speak before they call");
    });
}

#[test]
fn without_a_voice_prompt_no_turn_that_calls_has_content() {
    run(async {
        let turns = if long() { 50 } else { 3 };
        for turn in 0..turns {
            let body = must_call(PLAIN, CALLERS[turn % CALLERS.len()], turn);
            let message = SERVER.ask(&body).await["choices"][0]["message"].take();
            assert!(message["content"].is_null(), "{message}");
            assert_eq!(message["tool_calls"].as_array().unwrap().len(), 1);
        }
        println!("no voice prompt: {turns} of {turns} turns have content null");
    });
}

#[test]
fn the_phrase_is_in_the_callers_language_and_worded_for_its_place() {
    run(async {
        let body = must_call(VOICE, "Ich möchte bitte wissen, wo meine Bestellung ist.", 1);
        let german = SERVER.ask(&body).await["choices"][0]["message"].take();
        let book = include_str!("../src/electron/phrases.toml");
        let german_table = book.split("\n[de]\n").nth(1).unwrap().split("\n[").next().unwrap();
        let (first, chained) = german_table.split_once("chained").unwrap();
        assert!(first.contains(german["content"].as_str().unwrap()), "{german}");

        // The next turn of the same conversation calls again: its phrase is one for a further call.
        let mut next = body.clone();
        let messages = next["messages"].as_array_mut().unwrap();
        let id = german["tool_calls"][0]["id"].clone();
        messages.push(german);
        messages.push(json!({"role": "tool", "tool_call_id": id, "content": "unterwegs"}));
        let again = SERVER.ask(&next).await["choices"][0]["message"].take();
        let chained = chained.split("still_waiting").next().unwrap();
        assert!(chained.contains(again["content"].as_str().unwrap()), "{again}");
    });
}

/// Schemas of many kinds, each with what a small model easily gets wrong.
fn schemas() -> Vec<Value> {
    let object =
        |properties: Value, required: Value| json!({"type": "object", "properties": properties, "required": required});
    vec![
        object(json!({"city": {"type": "string", "maxLength": 20}}), json!(["city"])),
        object(
            json!({"unit": {"enum": ["celsius", "fahrenheit"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}}),
            json!(["unit", "days"]),
        ),
        object(
            json!({"amount": {"type": "number"}, "currency": {"enum": ["EUR", "USD", "¥"]}}),
            json!(["amount", "currency"]),
        ),
        object(
            json!({"address": object(json!({"street": {"type": "string", "maxLength": 12}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}), json!(["street", "zip"]))}),
            json!(["address"]),
        ),
        object(
            json!({"items": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 1, "maxItems": 3}}),
            json!(["items"]),
        ),
        object(
            json!({"date": {"type": "string", "format": "date"}, "time": {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}}),
            json!(["date", "time"]),
        ),
        object(
            json!({"größe": {"enum": ["klein", "groß"]}, "名前": {"type": "string", "maxLength": 6}}),
            json!(["größe", "名前"]),
        ),
        object(
            json!({"confirm": {"type": "boolean"}, "note": {"type": "string", "maxLength": 10}}),
            json!(["confirm"]),
        ),
        object(json!({"priority": {"type": "integer", "enum": [1, 2, 3]}}), json!(["priority"])),
        json!({"type": "object", "$defs": {"point": object(json!({"x": {"type": "integer", "minimum": -9, "maximum": 9}, "y": {"type": "integer", "minimum": -9, "maximum": 9}}), json!(["x", "y"]))},
               "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}, "required": ["from", "to"]}),
        object(
            json!({"choice": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"enum": ["none"]}]}}),
            json!(["choice"]),
        ),
        object(json!({}), json!([])),
        object(json!({"nickname": {"type": ["string", "null"], "maxLength": 8}}), json!(["nickname"])),
        object(
            json!({"kind": {"const": "refund"}, "order": {"type": "string", "pattern": "^A-[0-9]{4}$"}}),
            json!(["kind", "order"]),
        ),
        object(
            json!({"guests": {"type": "array", "minItems": 2, "maxItems": 2, "items": object(json!({"age": {"type": "integer", "minimum": 0, "maximum": 120}}), json!(["age"]))}}),
            json!(["guests"]),
        ),
        object(
            json!({"query": {"type": "string", "minLength": 3, "maxLength": 12}, "limit": {"type": "integer", "minimum": 1, "maximum": 5}, "sort": {"enum": ["asc", "desc"]}}),
            json!(["query"]),
        ),
        object(
            json!({"a": object(json!({"b": object(json!({"c": {"type": "boolean"}}), json!(["c"]))}), json!(["b"]))}),
            json!(["a"]),
        ),
        object(
            json!({"flags": {"type": "array", "items": {"enum": ["x", "y", "z"]}, "maxItems": 3}}),
            json!(["flags"]),
        ),
        object(
            json!({"email": {"type": "string", "pattern": "^[a-z]{1,6}@[a-z]{1,6}\\.(com|org)$"}}),
            json!(["email"]),
        ),
        object(json!({"free": {"type": "string"}}), json!(["free"])),
    ]
}

#[test]
fn arguments_are_always_valid_under_their_schema() {
    run(async {
        let schemas = schemas();
        let (turns, step) = if long() { (200, 1) } else { (10, 3) };
        let mut valid = 0;
        for turn in 0..turns {
            let schema = &schemas[turn * step % schemas.len()];
            let mut body = must_call(PLAIN, "Please do it now for me.", turn);
            body["tools"] = json!([tool("act", schema.clone())]);
            body["max_tokens"] = 400.into();
            let message = SERVER.ask(&body).await["choices"][0]["message"].take();
            let arguments = message["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
            let value: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {arguments}"));
            if let Err(e) = jsonschema::validate(schema, &value) {
                panic!("{e}: {arguments} under {schema}");
            }
            valid += 1;
        }
        println!("arguments: {valid} of {turns} turns over {} schemas are valid", schemas.len());
    });
}

#[test]
fn other_calls_that_are_tried_are_valid_too() {
    run(async {
        let schemas = schemas();
        let tools: Vec<Value> = [0, 2, 15].map(|at| tool(&format!("act{at}"), schemas[at].clone())).to_vec();
        for text in ["Please do it now for me.", "How much is it in London?", "The three latest, please."] {
            let mut body = must_call(PLAIN, text, 1);
            body["tools"] = tools.clone().into();
            body["temperature"] = 0.into();
            body["max_tokens"] = 200.into();
            let answer = SERVER.ask(&body).await;
            let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
            let schema =
                &schemas[call["name"].as_str().unwrap().strip_prefix("act").unwrap().parse::<usize>().unwrap()];
            let arguments = call["arguments"].as_str().unwrap();
            jsonschema::validate(schema, &serde_json::from_str(arguments).unwrap()).unwrap();

            let chunks = SERVER.chunks(&body).await;
            let pieces = chunks
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str());
            assert_eq!(pieces.collect::<String>(), arguments, "the same calls when they are streamed");
        }
        let metrics = SERVER.http.get(format!("{}/metrics", SERVER.url)).send().await.unwrap().text().await.unwrap();
        let tries = metrics.lines().find_map(|line| line.strip_prefix("electron_call_tries_total "));
        assert!(tries.is_some_and(|tries| tries.parse::<u64>().unwrap() > 0), "none was tried");
    });
}

#[test]
fn a_call_comes_to_its_end_though_its_schema_has_none() {
    run(async {
        // Nothing in this schema bounds the text, and the penalty makes the model avoid its own closing quote.
        let schema = json!({"type": "object", "properties": {"story": {"type": "string"}, "mood": {"enum": ["good", "bad"]}},
                            "required": ["story", "mood"]});
        let mut body = must_call(PLAIN, "Tell a very long story.", 3);
        body["tools"] = json!([tool("tell", schema.clone())]);
        body["max_tokens"] = 120.into();
        body["temperature"] = 2.into();
        let answer = SERVER.ask(&body).await;
        let arguments = answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
        let value: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {arguments}"));
        jsonschema::validate(&schema, &value).unwrap();
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    });
}

#[test]
fn tool_choice_and_parallel_calls_are_kept() {
    run(async {
        let other = tool("cancel_order", json!({"type": "object", "properties": {}}));
        let mut named = must_call(PLAIN, "Where is it?", 1);
        named["tools"] = json!([find_order(), other]);
        named["tool_choice"] = json!({"type": "function", "function": {"name": "cancel_order"}});
        let message = SERVER.ask(&named).await["choices"][0]["message"].take();
        assert_eq!(message["tool_calls"][0]["function"], json!({"name": "cancel_order", "arguments": "{}"}));

        let mut none = named.clone();
        none["tool_choice"] = "none".into();
        none["max_tokens"] = 12.into();
        let message = SERVER.ask(&none).await["choices"][0]["message"].take();
        assert!(message.get("tool_calls").is_none() && message["content"].is_string(), "{message}");
    });
}

#[test]
fn json_answers_are_json() {
    run(async {
        let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["name", "age"], "additionalProperties": false});
        let mut body = request(PLAIN, "Who are you?");
        body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema}});
        body["max_tokens"] = 60.into();
        let answer = SERVER.ask(&body).await;
        let value: Value = serde_json::from_str(answer["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
        jsonschema::validate(&schema, &value).unwrap();
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    });
}

#[test]
fn names_of_control_tokens_in_a_callers_words_are_only_words() {
    run(async {
        let usage = |text: &'static str| async move {
            SERVER.ask(&request(PLAIN, text)).await["usage"]["prompt_tokens"].as_u64().unwrap()
        };
        let plain = usage("x").await;
        // One control token would be one token; its name spelled out is several.
        assert!(usage("x<|im_end|>").await >= plain + 4);
    });
}
