//! Which calls a turn makes when its model is torn between several.
//!
//! The engine is a double that would say one of a few texts, each as likely as its share; it draws, tells odds and holds
//! itself to the guide as a real one does.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use common::{SERVER, VOICE, run};
use electron_gateway::{
    electron::Electron,
    engine::token::{
        ChatTemplate, Flow, Generation, ModelInfo, Odds, Token, TokenEngine, TokenEvent, TokenFinish, Tokens,
        Vocabulary,
    },
    error::Error,
    turn::{
        FillerPolicy, FinishReason, Gauges, Message, Model, OutputFormat, Readiness, Sampling, Tool, ToolChoice, Turn,
        TurnEvent, Usage,
    },
};
use futures::StreamExt;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

struct Torn {
    model: Arc<ModelInfo>,
    /// Tokens that it may say, and how likely each is in percent.
    says: Vec<(Vec<u32>, f32)>,
    /// The first generation that fails.
    fails: usize,
    /// Length of the first prompt, and the tokens that each generation has drawn.
    seen: Arc<Mutex<(usize, Vec<usize>)>>,
}

impl TokenEngine for Torn {
    fn model(&self) -> &Arc<ModelInfo> {
        &self.model
    }

    fn generate(&self, mut generation: Generation) -> Result<Tokens, Error> {
        let (events, receiver) = mpsc::channel(1);
        let (at, mut written) = {
            let mut seen = self.seen.lock().unwrap();
            if seen.1.is_empty() {
                seen.0 = generation.prompt.len();
            }
            assert_eq!(generation.goes_on, !seen.1.is_empty());
            seen.1.push(0);
            (seen.1.len() - 1, generation.prompt[seen.0..].to_vec())
        };
        if at >= self.fails {
            return Err(Error::EngineFailed("it is broken".into()));
        }
        let (model, says, seen) = (self.model.clone(), self.says.clone(), self.seen.clone());
        tokio::spawn(async move {
            let mut left = generation.max_tokens;
            let started = TokenEvent::Started { at: Instant::now(), cached_tokens: 0 };
            let mut sent = events.send(Ok(started)).await;
            while sent.is_ok() {
                let mut shares = vec![0.0; model.vocabulary.size()];
                for (text, share) in &says {
                    if let Some(rest) = text.strip_prefix(written.as_slice()) {
                        shares[*rest.first().unwrap_or(&model.vocabulary.end_of_turn()[0]) as usize] += share;
                    }
                }
                let norm = shares.iter().sum::<f32>().ln();
                if let Some(mask) = generation.guide.allowed().unwrap() {
                    let narrow =
                        |(id, share): (usize, &mut f32)| *share *= f32::from(u8::from(mask.is_allowed(id as u32)));
                    shares.iter_mut().enumerate().for_each(narrow);
                }
                let mut order: Vec<u32> = (0..shares.len() as u32).filter(|id| shares[*id as usize] > 0.0).collect();
                order.sort_by(|a, b| shares[*b as usize].total_cmp(&shares[*a as usize]));
                let logprob = |id: u32| shares[id as usize].ln() - norm;
                let id = order[0];
                if model.vocabulary.end_of_turn().contains(&id) {
                    let _ = events.send(Ok(TokenEvent::Finished(TokenFinish::EndOfTurn))).await;
                    return;
                }
                let runner_up = order.get(1).map(|id| (*id, logprob(*id)));
                let odds = generation.guide.weighs().then(|| Odds { chosen: logprob(id), runner_up });
                let flow = generation.guide.commit(id).unwrap();
                written.push(id);
                seen.lock().unwrap().1[at] += 1;
                sent = events.send(Ok(TokenEvent::Token(Token { id, at: Instant::now(), logprob: None, odds }))).await;
                left -= 1;
                let why = match flow {
                    Flow::Stop => TokenFinish::Guide,
                    Flow::Continue if left == 0 => TokenFinish::Length,
                    Flow::Continue => continue,
                };
                let _ = events.send(Ok(TokenEvent::Finished(why))).await;
                return;
            }
        });
        Ok(Tokens::new(receiver, CancellationToken::new()))
    }

    fn warm(&self, _prompt: Vec<u32>) -> Result<Tokens, Error> {
        Err(Error::NotFound("not needed".into()))
    }

    fn readiness(&self) -> Readiness {
        Readiness::Ready
    }

    fn gauges(&self) -> Gauges {
        Gauges::default()
    }
}

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
    let real = SERVER.electron.model();
    let end = real.vocabulary.end_of_turn().to_vec();
    let source = "{% for m in messages %}{{ m.content }}{% endfor %}".into();
    let model = Arc::new(ModelInfo {
        source: "torn".into(),
        architecture: "torn".into(),
        context: 2048,
        chat_template: ChatTemplate { source, ..ChatTemplate::default() },
        vocabulary: Vocabulary::new(real.vocabulary.tokenizer().clone(), None, end).unwrap(),
    });
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
    let seen = Arc::default();
    let engine = Torn { model: model.clone(), says: says.collect(), fails, seen: Arc::clone(&seen) };
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
