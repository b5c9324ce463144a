//! The engine below the Electron layer: failures, warm-ups, the prefix cache's budget.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::{config, run};
use electron_gateway::{
    command::model,
    config::Model,
    engine::token::{Flow, Generation, Guide, TokenEngine, TokenEvent, TokenFinish},
    error::Error,
    turn::{Readiness, Sampling},
};
use llguidance::toktrie::SimpleVob;

/// Lets everything pass, and panics at the n-th token.
struct Free(Option<usize>);

impl Guide for Free {
    fn allowed(&mut self) -> Result<Option<SimpleVob>, String> {
        Ok(None)
    }
    fn vetoes(&self, _token: u32) -> bool {
        false
    }
    fn commit(&mut self, _token: u32) -> Result<Flow, String> {
        if let Some(left) = &mut self.0 {
            assert!(*left > 0, "a fault in the engine's thread");
            *left -= 1;
        }
        Ok(Flow::Continue)
    }
}

async fn engine(change: impl FnOnce(&mut Model)) -> Arc<dyn TokenEngine> {
    let mut config = config();
    change(&mut config.model);
    model::load(&config.model).await.unwrap().engine().clone()
}

fn generation(engine: &Arc<dyn TokenEngine>, text: &str, tokens: usize, guide: Free) -> Generation {
    Generation {
        prompt: engine.model().vocabulary.encode(text).unwrap(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: tokens,
        guide: Box::new(guide),
        goes_on: false,
    }
}

/// Runs a generation: prompt tokens served from the cache, tokens, and how it ended.
async fn finish(
    engine: &Arc<dyn TokenEngine>,
    generation: Generation,
) -> Result<(usize, Vec<u32>, TokenFinish), Error> {
    let mut tokens = engine.generate(generation)?;
    let (mut cached, mut ids) = (0, Vec::new());
    loop {
        match tokens.next().await.unwrap()? {
            TokenEvent::Started { cached_tokens, .. } => cached = cached_tokens,
            TokenEvent::Token(token) => ids.push(token.id),
            TokenEvent::Finished(why) => return Ok((cached, ids, why)),
        }
    }
}

#[test]
fn a_panic_in_the_engine_is_an_error_and_the_engine_comes_back() {
    run(async {
        let engine = engine(|_| {}).await;
        let failed = finish(&engine, generation(&engine, "Once upon a time", 8, Free(Some(2)))).await;
        assert!(matches!(failed, Err(Error::EngineFailed(_))), "{failed:?}");
        // Until it has answered again nobody is let in, and everybody is told why.
        while let Readiness::NotReady(why) = engine.readiness() {
            assert!(!why.is_empty());
            let refused = engine.generate(generation(&engine, "Hello", 2, Free(None)));
            assert!(matches!(refused, Err(Error::Overloaded { .. })) || engine.readiness() == Readiness::Ready);
            tokio::task::yield_now().await;
        }
        let (_, ids, why) = finish(&engine, generation(&engine, "Once upon a time", 4, Free(None))).await.unwrap();
        assert_eq!((ids.len(), why), (4, TokenFinish::Length));
    });
}

#[test]
fn a_warm_up_serves_the_turn_that_extends_it() {
    run(async {
        let engine = engine(|model| model.warm_up_step = 32).await;
        let start = "The quick brown fox jumps over the lazy dog. ".repeat(12);
        let start = start.trim_end();
        let prompt = engine.model().vocabulary.encode(start).unwrap();
        let mut warming = engine.warm(prompt.clone()).unwrap();
        while !matches!(warming.next().await.unwrap().unwrap(), TokenEvent::Finished(_)) {}
        let turn = generation(&engine, &format!("{start} And then"), 1, Free(None));
        assert_eq!(finish(&engine, turn).await.unwrap().0, prompt.len());

        // The very same prompt again has nothing left to compute, and is done at once.
        let mut again = engine.warm(prompt.clone()).unwrap();
        while !matches!(again.next().await.unwrap().unwrap(), TokenEvent::Finished(_)) {}
    });
}

#[test]
fn a_turn_does_not_wait_for_a_whole_warm_up() {
    run(async {
        let engine = engine(|model| model.warm_up_step = 32).await;
        let long = engine.model().vocabulary.encode(&"One more word and then another. ".repeat(60)).unwrap();
        let mut warming = engine.warm(long).unwrap();
        assert!(matches!(warming.next().await.unwrap().unwrap(), TokenEvent::Started { .. }));
        let (.., why) = finish(&engine, generation(&engine, "Hello", 1, Free(None))).await.unwrap();
        assert_eq!(why, TokenFinish::Length);
        // The turn is over and the warm-up, which came first, is not.
        let over = tokio::time::timeout(Duration::ZERO, warming.next()).await;
        assert!(over.is_err(), "the warm-up ran to its end before the turn");
    });
}

#[test]
fn an_emptied_prefix_cache_is_noticed_and_answers_stay_right() {
    run(async {
        // Room for two conversations of up to 512 tokens.
        let engine = engine(|model| model.prefix_cache = bytesize::ByteSize::mib(50)).await;
        let ask = |text: String| {
            let engine = engine.clone();
            async move { finish(&engine, generation(&engine, &text, 6, Free(None))).await.unwrap() }
        };
        let (_, first, _) = ask("The capital of France is".into()).await;
        for n in 0..6 {
            ask(format!("Number {n} is a number, and")).await;
            assert!(engine.gauges().prefix_cache_bytes <= 50 << 20);
        }
        assert!(engine.gauges().prefix_cache_flushes >= 1);
        let (_, again, _) = ask("The capital of France is".into()).await;
        assert_eq!(first, again);
    });
}

#[test]
fn generations_are_served_in_order_and_cancelled_ones_not_at_all() {
    run(async {
        let engine = engine(|_| {}).await;
        // It does not end by itself, whatever the model would rather say.
        let mut long = generation(&engine, "A long story:", 1000, Free(None));
        long.sampling.logit_bias = engine.model().vocabulary.end_of_turn().iter().map(|end| (*end, -100.0)).collect();
        let mut running = engine.generate(long).unwrap();
        let dropped = engine.generate(generation(&engine, "Never", 500, Free(None))).unwrap();
        drop(dropped);
        let last = tokio::spawn({
            let engine = engine.clone();
            async move { finish(&engine, generation(&engine, "At last", 2, Free(None))).await.unwrap() }
        });
        // The first is stopped in the middle, and still ends properly.
        let (mut seen, mut late, mut cancelled) = (0, 0, None);
        loop {
            match running.next().await.unwrap().unwrap() {
                TokenEvent::Token(token) => {
                    seen += 1;
                    late += usize::from(cancelled.is_some_and(|at| token.at > at));
                    if seen == 3 {
                        running.cancel();
                        cancelled = Some(Instant::now());
                    }
                }
                TokenEvent::Finished(why) => {
                    assert_eq!(why, TokenFinish::Cancelled);
                    break;
                }
                TokenEvent::Started { .. } => {}
            }
        }
        // The step that was under way may bring one.
        assert!(late <= 1, "{late} tokens were drawn after the cancel");
        assert_eq!(last.await.unwrap().1.len(), 2);
    });
}

#[test]
fn several_slots_share_the_engine_and_its_budget() {
    run(async {
        let engine = engine(|model| {
            model.slots = 2;
            model.prefix_cache = bytesize::ByteSize::mib(50);
        })
        .await;
        let alone = finish(&engine, generation(&engine, "The capital of France is", 6, Free(None))).await.unwrap().1;
        for round in 0..4 {
            let one = finish(&engine, generation(&engine, "The capital of France is", 6, Free(None)));
            let other = finish(&engine, generation(&engine, &format!("In round {round} of the"), 9, Free(None)));
            let (one, other) = tokio::join!(one, other);
            assert_eq!(one.unwrap().1, alone);
            assert_eq!(other.unwrap().1.len(), 9);
        }
        assert!(engine.gauges().prefix_cache_flushes > 0);
    });
}
