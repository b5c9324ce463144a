//! The likeliest calls of a turn, where taking the likeliest token each time finds less likely ones.
//!
//! A model that is torn between two tools names one of them by a hair, and may then have to make up arguments that the
//! caller never gave, each of them unlikely; the arguments of the other were in the conversation. At temperature 0 the
//! engine therefore tells the [`Odds`] of every token of a turn's calls. From the first place on where another token came
//! close, what follows is held back. When the calls are complete, and one of those other beginnings alone is likelier than
//! all of them, the engine goes on from there, and what it writes takes their place if it is likelier as a whole.
//!
//! Where the model is sure, this costs a copy of the prompt's tokens and of the guide. A try costs one step and a copy in
//! the prefix cache, which holds everything up to its beginning, and then a step for each token until it is complete or
//! less likely than what it has to beat. The end of the turn is not weighed, only the other token that could have come in
//! its place.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use super::grammar::TurnGuide;
use crate::{
    engine::token::{Flow, Generation, Guide, Odds, Token, TokenEngine, TokenEvent, TokenFinish, Tokens},
    error::Error,
    turn::Sampling,
};

/// The least likely token that is tried in place of the likeliest: one in 20, as a logarithm.
const CLOSE: f32 = -3.0;

/// The tokens of one turn, of its likeliest calls.
pub(super) struct Search {
    /// What is being written.
    tokens: Tokens,
    /// What another try needs; without it, all tokens pass as they come.
    again: Option<Box<Again>>,
    /// Everything that was written, the first line by greedy choice, each of the others from a fork. Tokens before the
    /// calls are part of it.
    lines: Vec<Vec<Token>>,
    /// How likely the calls of the last line are as far as they go.
    logprob: f32,
    /// The likeliest complete line.
    best: Option<Best>,
    /// Where other tokens came close, the likeliest first; no more than may be tried.
    forks: Vec<Fork>,
    /// Tokens of the first line that all lines begin with, and that did not have to wait.
    passed: usize,
    /// Tokens that were computed for all lines.
    written: usize,
    /// Tokens that have left.
    sent: usize,
    ready: VecDeque<TokenEvent>,
}

/// What it takes to write a turn's calls once more.
struct Again {
    /// How often it may be done.
    tries: usize,
    /// As it was at the start of the turn.
    guide: TurnGuide,
    engine: Arc<dyn TokenEngine>,
    prompt: Vec<u32>,
    sampling: Sampling,
    max_tokens: usize,
}

/// A complete line.
#[derive(Clone, Copy)]
struct Best {
    line: usize,
    logprob: f32,
    why: TokenFinish,
}

/// Another way to begin.
struct Fork {
    line: usize,
    /// Tokens of that line that it begins with.
    length: usize,
    /// The token behind them.
    token: u32,
    /// How likely all of that is.
    logprob: f32,
}

// === impl Search ===

impl Search {
    /// Starts a turn. `tries` is how often its calls may be written once more, with the guide as it is now.
    ///
    /// # Errors
    /// As [`TokenEngine::generate`].
    pub(super) fn start(
        engine: &Arc<dyn TokenEngine>,
        generation: Generation,
        again: Option<(usize, TurnGuide)>,
    ) -> Result<Self, Error> {
        let again = again.map(|(tries, guide)| {
            let Generation { prompt, sampling, max_tokens, .. } = &generation;
            let sampling = Sampling { logprobs: None, ..sampling.clone() };
            let (engine, prompt, max_tokens) = (engine.clone(), prompt.clone(), *max_tokens);
            Box::new(Again { tries, guide, engine, prompt, sampling, max_tokens })
        });
        Ok(Self {
            tokens: engine.generate(generation)?,
            again,
            lines: vec![Vec::new()],
            logprob: 0.0,
            best: None,
            forks: Vec::new(),
            passed: 0,
            written: 0,
            sent: 0,
            ready: VecDeque::new(),
        })
    }

    /// The next event, as [`Tokens::next`] gives it.
    pub(super) async fn next(&mut self) -> Option<Result<TokenEvent, Error>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.sent += usize::from(matches!(event, TokenEvent::Token(_)));
                return Some(Ok(event));
            }
            match self.tokens.next().await {
                Some(Ok(event)) => {
                    if let Some(event) = self.take(event) {
                        return Some(Ok(event));
                    }
                }
                // There is a complete line, whatever became of this one.
                Some(Err(_)) | None if self.best.is_some() => self.go_on(),
                failed => return failed,
            }
        }
    }

    /// Takes note of an event, and gives it back when it may leave.
    fn take(&mut self, event: TokenEvent) -> Option<TokenEvent> {
        if self.again.is_none() {
            return Some(event);
        }
        match event {
            TokenEvent::Started { .. } => self.best.is_none().then_some(event),
            TokenEvent::Token(token) => {
                if let Some(odds) = token.odds {
                    self.weigh(odds);
                }
                self.written += 1;
                self.lines.last_mut()?.push(Token { logprob: None, odds: None, ..token });
                match self.best {
                    Some(best) if self.logprob <= best.logprob => self.go_on(),
                    Some(_) => {}
                    None if self.forks.is_empty() => {
                        self.passed += 1;
                        self.sent += 1;
                        return Some(TokenEvent::Token(token));
                    }
                    None => {}
                }
                None
            }
            TokenEvent::Finished(why) => {
                let complete = matches!(why, TokenFinish::EndOfTurn | TokenFinish::Guide);
                match self.best {
                    Some(_) if complete => self.prefer_last(why),
                    Some(_) => {}
                    None => {
                        self.prefer_last(why);
                        if !complete {
                            self.forks.clear();
                        }
                    }
                }
                self.go_on();
                None
            }
        }
    }

    /// Takes note of how likely the next token is, and of the one that could have come in its place.
    fn weigh(&mut self, odds: Odds) {
        if let (Some((token, logprob)), Some(again)) = (odds.runner_up.filter(|r| r.1 >= CLOSE), &self.again) {
            let (line, logprob) = (self.lines.len() - 1, self.logprob + logprob);
            let fork = Fork { line, length: self.lines[line].len(), token, logprob };
            let place = self.forks.partition_point(|other| other.logprob >= logprob);
            self.forks.insert(place, fork);
            self.forks.truncate(again.tries);
        }
        self.logprob += odds.chosen;
    }

    /// The last line is complete, and the likeliest so far.
    fn prefer_last(&mut self, why: TokenFinish) {
        self.best = Some(Best { line: self.lines.len() - 1, logprob: self.logprob, why });
    }

    /// Tries the likeliest fork that may still win; without one, the likeliest line leaves.
    fn go_on(&mut self) {
        while let Some(fork) = self.next_fork() {
            match self.begin(&fork) {
                Ok(Some(tokens)) => {
                    self.tokens = tokens;
                    return;
                }
                Ok(None) => {}
                Err(e) => {
                    tracing::debug!(error = %e, "other calls could not be tried");
                    break;
                }
            }
        }
        let Some(best) = self.best else { return };
        // A try that lost may still run.
        self.tokens.cancel();
        let line = std::mem::take(&mut self.lines[best.line]);
        if best.line > 0 {
            metrics::counter!("electron_calls_replaced_total").increment(1);
        }
        self.ready.extend(line.into_iter().skip(self.passed).map(TokenEvent::Token));
        self.ready.push_back(TokenEvent::Finished(best.why));
    }

    /// The likeliest fork, if it is likelier than the best line and may be tried.
    fn next_fork(&mut self) -> Option<Fork> {
        let (best, again) = (self.best?, self.again.as_ref()?);
        let wins = again.tries > 0 && self.forks.first()?.logprob > best.logprob;
        wins.then(|| self.forks.remove(0))
    }

    /// Writes on from a fork. `None` when nothing remains to be written.
    fn begin(&mut self, fork: &Fork) -> Result<Option<Tokens>, Error> {
        let Some(again) = &mut self.again else { return Ok(None) };
        let mut line = self.lines[fork.line][..fork.length].to_vec();
        self.logprob = fork.logprob;
        if again.engine.model().vocabulary.end_of_turn().contains(&fork.token) {
            self.lines.push(line);
            self.prefer_last(TokenFinish::EndOfTurn);
            return Ok(None);
        }
        line.push(Token { id: fork.token, at: Instant::now(), logprob: None, odds: None });
        let mut guide = again.guide.deep_clone();
        let mut flow = Flow::Continue;
        for token in &line {
            flow = guide.commit(token.id).map_err(Error::EngineFailed)?;
        }
        let prompt: Vec<u32> = again.prompt.iter().copied().chain(line.iter().map(|token| token.id)).collect();
        let max_tokens = again.max_tokens.saturating_sub(line.len());
        again.tries -= 1;
        self.written += 1;
        self.lines.push(line);
        metrics::counter!("electron_call_tries_total").increment(1);
        if flow == Flow::Stop {
            self.prefer_last(TokenFinish::Guide);
            return Ok(None);
        }
        if max_tokens == 0 {
            return Ok(None);
        }
        let sampling = Sampling { max_tokens: Some(max_tokens), ..again.sampling.clone() };
        let generation = Generation { prompt, sampling, max_tokens, guide: Box::new(guide), goes_on: true };
        again.engine.generate(generation).map(Some)
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        metrics::counter!("electron_discarded_tokens_total").increment((self.written - self.sent) as u64);
    }
}
