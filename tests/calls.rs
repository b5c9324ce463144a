//! Which calls a turn makes when its model is torn between several.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{
    VOICE, run,
    torn::{self, Torn},
};
use electron_gateway::{
    electron::Electron,
    turn::{
        FillerPolicy, FinishReason, Message, Model, OutputFormat, Sampling, Tool, ToolChoice, Turn, TurnEvent, Usage,
    },
};
use futures::StreamExt;
use serde_json::json;

/// Calls of one turn, as the model writes them.
fn calls(calls: &[(&str, &str)]) -> String {
    let written = calls
        .iter()
        .map(|(name, id)| format!("\n{{\"name\": \"{name}\", \"arguments\": {{\"id\": \"{id}\"}}}}\n</tool_call>"));
    written.collect::<Vec<_>>().join("\n<tool_call>")
}

/// What a turn came to.
#[derive(Debug, PartialEq)]
struct Outcome {
    text: String,
    /// Names and arguments.
    calls: Vec<(String, String)>,
    /// Pieces in which arguments came.
    pieces: usize,
    reason: FinishReason,
    usage: Usage,
    /// Tokens that each generation has drawn.
    drawn: Vec<usize>,
}

/// A turn of a model that says "I will look." and then one of these calls, each with its share in percent.
async fn turn(says: &[(String, f32)], tries: usize, fails: usize, change: impl FnOnce(&mut Turn)) -> Outcome {
    let model = torn::model("{% for m in messages %}{{ m.content }}{% endfor %}");
    let parameters = json!({"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]});
    let tool = |name: &str| Tool {
        name: name.into(),
        description: None,
        parameters: parameters.clone(),
        phrase: Default::default(),
    };
    let mut turn = Turn {
        messages: vec![Message::System(VOICE.into()), Message::User("What about order 8?".into())],
        tools: ["find", "cancel"].map(tool).into(),
        tool_choice: ToolChoice::Auto,
        parallel_tool_calls: true,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        format: OutputFormat::Text,
        filler: FillerPolicy::Auto,
        language: None,
        whole: false,
    };
    change(&mut turn);
    // A turn that has to call begins behind the opening.
    let before = if turn.tool_choice == ToolChoice::Auto { &["I will look.\n", "<tool_call>"][..] } else { &[] };
    let says = says.iter().map(|(calls, share)| {
        let pieces = before.iter().copied().chain([calls.as_str()]);
        (pieces.flat_map(|piece| model.vocabulary.encode(piece).unwrap()).collect(), *share)
    });
    let engine = Torn { fails, ..Torn::new(&model, says.collect()) };
    let seen = engine.seen.clone();
    let electron = Arc::new(Electron::new(Arc::new(engine), tries).unwrap());
    let mut stream = electron.turn(turn).await.unwrap();
    let (mut text, mut calls, mut pieces) = (String::new(), Vec::<(String, String)>::new(), 0);
    loop {
        match stream.next().await.unwrap().unwrap() {
            TurnEvent::Text { delta, .. } => text.push_str(&delta),
            TurnEvent::CallBegun { name, .. } => calls.push((name, String::new())),
            TurnEvent::Arguments { index, delta } => {
                calls[index].1.push_str(&delta);
                pieces += 1;
            }
            TurnEvent::CallEnded { .. } => {}
            TurnEvent::Finished { reason, usage } => {
                assert!(stream.next().await.is_none());
                let drawn = seen.lock().unwrap().1.clone();
                return Outcome { text, calls, pieces, reason, usage, drawn };
            }
        }
    }
}

fn call(name: &str, id: &str) -> (String, String) {
    (name.into(), format!("{{\"id\": \"{id}\"}}"))
}

/// `find` is likelier than `cancel`, but no call of it is.
fn torn() -> Vec<(String, f32)> {
    [("find", "1", 20.0), ("find", "2", 18.0), ("find", "3", 17.0), ("cancel", "8", 45.0)]
        .map(|(name, id, share)| (calls(&[(name, id)]), share))
        .to_vec()
}

#[test]
fn the_likeliest_calls_are_made_and_only_they_are_counted() {
    run(async {
        let outcome = turn(&torn(), 2, 9, |_| {}).await;
        assert_eq!((outcome.text.as_str(), &outcome.calls), ("I will look.", &vec![call("cancel", "8")]));
        assert_eq!(outcome.reason, FinishReason::ToolCalls);
        assert_eq!(outcome.drawn.len(), 2);
        let sure = turn(&torn()[3..], 2, 9, |_| {}).await;
        assert_eq!(sure.drawn, [sure.usage.completion_tokens], "a sure model is asked once");
        assert_eq!((outcome.usage, outcome.pieces), (sure.usage, sure.pieces));
        assert!(sure.pieces > 1, "arguments leave as they are generated");
    });
}

#[test]
fn a_model_is_asked_once_when_it_need_not_or_may_not_be_asked_again() {
    run(async {
        let first = vec![call("find", "1")];
        let likeliest = [(calls(&[("find", "1")]), 60.0), (calls(&[("cancel", "8")]), 40.0)];
        let far = [(calls(&[("find", "1")]), 97.0), (calls(&[("cancel", "8")]), 3.0)];
        for says in [&likeliest[..], &far] {
            let outcome = turn(says, 2, 9, |_| {}).await;
            assert_eq!((&outcome.calls, outcome.drawn.len()), (&first, 1));
        }
        let without = turn(&torn(), 0, 9, |_| {}).await;
        let sampled = turn(&torn(), 2, 9, |turn| turn.sampling.temperature = 1.0).await;
        let penalized = turn(&torn(), 2, 9, |turn| turn.sampling.frequency_penalty = 0.1).await;
        for outcome in [without, sampled, penalized] {
            assert_eq!((&outcome.calls, outcome.drawn.len()), (&first, 1));
        }
    });
}

#[test]
fn a_try_ends_once_it_is_less_likely_than_what_it_has_to_beat() {
    run(async {
        let mut says = vec![(calls(&[("find", "1")]), 30.0), (calls(&[("find", "2")]), 25.0)];
        says.extend((1..=9).map(|id| (calls(&[("cancel", &format!("{id}000000000"))]), 5.0)));
        let outcome = turn(&says, 2, 9, |_| {}).await;
        assert_eq!(outcome.calls, [call("find", "1")]);
        assert_eq!(outcome.drawn.len(), 2, "{outcome:?}");
        assert!(outcome.drawn[1] < 16, "{outcome:?}");
        assert_eq!(outcome.usage.completion_tokens, outcome.drawn[0]);
    });
}

#[test]
fn calls_are_weighed_together() {
    run(async {
        let two = |id| (calls(&[("find", "8"), ("cancel", id)]), 20.0);
        let says = [two("1"), two("2"), two("3"), (calls(&[("find", "8")]), 40.0)];
        let outcome = turn(&says, 2, 9, |_| {}).await;
        assert_eq!(outcome.calls, [call("find", "8")], "the second call was not sure");
        assert_eq!(outcome.drawn.len(), 1, "an end needs no try");

        let says = [(calls(&[("find", "8")]), 40.0), (calls(&[("find", "8"), ("cancel", "8")]), 60.0)];
        let outcome = turn(&says, 2, 9, |_| {}).await;
        assert_eq!(outcome.calls, [call("find", "8"), call("cancel", "8")]);
    });
}

#[test]
fn a_try_that_fails_or_does_not_fit_leaves_the_first_calls() {
    run(async {
        let outcome = turn(&torn(), 2, 1, |_| {}).await;
        assert_eq!((outcome.calls, outcome.reason), (vec![call("find", "1")], FinishReason::ToolCalls));

        let whole = turn(&torn(), 2, 9, |_| {}).await.usage.completion_tokens;
        let outcome = turn(&torn(), 2, 9, |turn| turn.sampling.max_tokens = Some(whole - 30)).await;
        assert_eq!((outcome.reason, outcome.drawn.len()), (FinishReason::Length, 1));
        assert_eq!(outcome.usage.completion_tokens, whole - 30);
    });
}

#[test]
fn a_call_that_has_to_be_is_searched_too() {
    run(async {
        let outcome = turn(&torn(), 2, 9, |turn| turn.tool_choice = ToolChoice::Required).await;
        assert!(!outcome.text.is_empty(), "the book spoke");
        assert_eq!((outcome.calls, outcome.drawn.len()), (vec![call("cancel", "8")], 2));
    });
}
