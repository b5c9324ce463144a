//! An engine that says what it is told to, for what depends on the model's words.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use electron_gateway::{
    engine::token::{
        ChatTemplate, Flow, Generation, ModelInfo, Odds, Token, TokenEngine, TokenEvent, TokenFinish, Tokens,
        Vocabulary,
    },
    error::Error,
    turn::{Gauges, Readiness},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::SERVER;

/// An engine whose model would say one of a few texts, each as likely as its share. It draws the likeliest token, tells odds, and
/// holds itself to the guide, as a real one does.
pub struct Torn {
    pub model: Arc<ModelInfo>,
    /// Tokens that it may say, and how likely each is in percent.
    pub says: Vec<(Vec<u32>, f32)>,
    /// Which generation of a turn is the first that fails.
    pub fails: usize,
    /// Of the last turn: the length of its prompt, and the tokens that each of its generations has drawn.
    pub seen: Arc<Mutex<(usize, Vec<usize>)>>,
}

impl Torn {
    pub fn new(model: &Arc<ModelInfo>, says: Vec<(Vec<u32>, f32)>) -> Self {
        Self { model: model.clone(), says, fails: usize::MAX, seen: Arc::default() }
    }
}

/// A model with this template and the words of the real one.
pub fn model(template: &str) -> Arc<ModelInfo> {
    let real = SERVER.electron.model();
    let end = real.vocabulary.end_of_turn().to_vec();
    Arc::new(ModelInfo {
        source: "torn".into(),
        architecture: "torn".into(),
        context: 2048,
        chat_template: ChatTemplate { source: template.into(), ..ChatTemplate::default() },
        vocabulary: Vocabulary::new(real.vocabulary.tokenizer().clone(), None, end).unwrap(),
    })
}

impl TokenEngine for Torn {
    fn model(&self) -> &Arc<ModelInfo> {
        &self.model
    }

    fn generate(&self, mut generation: Generation) -> Result<Tokens, Error> {
        let (events, receiver) = mpsc::channel(1);
        let (at, mut written) = {
            let mut seen = self.seen.lock().unwrap();
            if !generation.goes_on {
                *seen = (generation.prompt.len(), Vec::new());
            }
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
                let id = *order.first().expect("the grammar allows none of the texts");
                assert!(!generation.guide.vetoes(id), "the guide vetoes token {id}");
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
