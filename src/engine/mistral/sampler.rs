//! Draws the next token. Everything about sampling is here, in one logits processor.
//!
//! mistral.rs has a sampler of its own, which is not used, because it has one shared random generator (no seed a
//! request), counts the prompt in its penalties and reports logarithms to base 10. Ours is given to the engine as a
//! logits processor that picks the token and leaves the engine's greedy sampler no other choice.
//!
//! A token goes to its reader from here, in the step that drew it, not from the engine's own response stream.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use candle_core::Tensor;
use mistralrs_core::CustomLogitsProcessor;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    engine::token::{Flow, Guide, Logprob, Odds, Token, TokenEvent, TokenFinish},
    error::Error,
    turn::Sampling,
};

/// What the sampler needs to know of a model.
#[derive(Clone, Debug)]
pub(super) struct Endings {
    /// Tokens with which the model ends its turn.
    pub end_of_turn: Arc<[u32]>,
    /// A token that no prompt contains. Every sequence is ended with it, whatever the reason, for two flaws of the
    /// engine's prefix cache: the last token of a sequence is part of the cache's key though it was never computed, so
    /// a prompt that goes on with it would read an empty place; and a prompt that is wholly contained in a key is
    /// not served at all.
    pub sentinel: u32,
}

/// Where a generation's tokens go.
pub(super) type Events = mpsc::Sender<Result<TokenEvent, Error>>;

/// The sampler of one generation, a logits processor.
pub(super) struct Sampler(Mutex<State>);

struct State {
    sampling: Sampling,
    guide: Box<dyn Guide>,
    endings: Endings,
    events: Events,
    cancel: CancellationToken,
    rng: StdRng,
    /// Tokens that may still be generated.
    left: usize,
    /// How often each token was generated.
    counts: HashMap<u32, u32>,
    /// Set with the last token: what comes after it is the sentinel.
    finished: Option<TokenFinish>,
    /// Tokens that the engine was given to go on from.
    computed: Vec<u32>,
}

// === impl Sampler ===

impl Sampler {
    pub(super) fn new(
        sampling: Sampling,
        max_tokens: usize,
        guide: Box<dyn Guide>,
        endings: Endings,
        events: Events,
        cancel: CancellationToken,
    ) -> Self {
        let rng = match sampling.seed {
            Some(seed) => StdRng::seed_from_u64(seed),
            None => StdRng::from_os_rng(),
        };
        Self(Mutex::new(State {
            sampling,
            guide,
            endings,
            events,
            cancel,
            rng,
            left: max_tokens,
            counts: HashMap::new(),
            finished: None,
            computed: Vec::new(),
        }))
    }

    /// The tokens that the engine has computed behind the prompt, once the generation has ended.
    pub(super) fn computed(&self) -> Option<Vec<u32>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.finished.is_some().then(|| std::mem::take(&mut state.computed))
    }
}

impl CustomLogitsProcessor for Sampler {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> candle_core::Result<Tensor> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scores = logits.to_vec1::<f32>()?;
        let token = state.step(&mut scores).map_err(candle_core::Error::msg)?;
        only(token, scores, logits)
    }
}

/// Ends a warm-up right behind its prompt.
///
/// One token more is computed, the prompt's last one again: a sequence that ends with its first step leaves twice the
/// memory behind (measured: 53 MiB in place of 27 for 200 tokens of SmolLM2-135M).
pub(super) struct Sentinel {
    /// The token that ends it.
    pub end: u32,
    /// Length of the prompt.
    pub prompt: usize,
}

impl CustomLogitsProcessor for Sentinel {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        let last = context.last().filter(|_| context.len() <= self.prompt);
        only(last.copied().unwrap_or(self.end), vec![0.0; logits.elem_count()], logits)
    }
}

/// What a client learns of a guide's failure; the rest is for the log.
fn unguided(why: String) -> String {
    tracing::warn!(why, "a grammar failed");
    "the answer could not be kept to the request's schema".into()
}

/// Logits that leave one choice.
fn only(token: u32, mut scores: Vec<f32>, like: &Tensor) -> candle_core::Result<Tensor> {
    scores.fill(f32::NEG_INFINITY);
    if let Some(score) = scores.get_mut(token as usize) {
        *score = 0.0;
    }
    Tensor::from_vec(scores, like.shape(), like.device())
}

// === impl State ===

impl State {
    /// One step: the token that the engine is to append.
    fn step(&mut self, scores: &mut [f32]) -> Result<u32, String> {
        if self.finished.is_some() {
            return Ok(self.endings.sentinel);
        }
        if self.cancel.is_cancelled() || self.events.is_closed() {
            return Ok(self.finish(TokenFinish::Cancelled));
        }
        let allowed = self.guide.allowed().map_err(unguided)?;
        // The distribution that is reported is the model's own, so it is kept from before anything is changed.
        let reported = self.sampling.logprobs.map(|top| Report::new(scores, top));

        if let Some(score) = scores.get_mut(self.endings.sentinel as usize) {
            *score = f32::NEG_INFINITY;
        }
        self.penalize(scores);
        let norm = self.guide.weighs().then(|| log_sum(scores));
        if let Some(allowed) = allowed {
            for (id, score) in scores.iter_mut().enumerate() {
                if id >= allowed.len() || !allowed.is_allowed(id as u32) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        let token = loop {
            let token = self.draw(scores).ok_or("no token is allowed here")?;
            if !self.guide.vetoes(token) {
                break token;
            }
            scores[token as usize] = f32::NEG_INFINITY;
        };

        if self.endings.end_of_turn.contains(&token) {
            return Ok(self.finish(TokenFinish::EndOfTurn));
        }
        let odds = norm.map(|norm| odds(scores, token, norm));
        let flow = self.guide.commit(token).map_err(unguided)?;
        *self.counts.entry(token).or_default() += 1;
        self.left = self.left.saturating_sub(1);
        let logprob = reported.map(|r| r.of(token));
        self.send(TokenEvent::Token(Token { id: token, at: Instant::now(), logprob, odds }));
        Ok(match flow {
            Flow::Stop => self.finish(TokenFinish::Guide),
            Flow::Continue if self.left == 0 => self.finish(TokenFinish::Length),
            Flow::Continue => {
                self.computed.push(token);
                token
            }
        })
    }

    fn finish(&mut self, why: TokenFinish) -> u32 {
        self.finished = Some(why);
        self.send(TokenEvent::Finished(why));
        self.endings.sentinel
    }

    /// The channel holds a whole generation, so that sending never waits; a reader that is gone is noticed at the next
    /// step.
    fn send(&self, event: TokenEvent) {
        let _ = self.events.try_send(Ok(event));
    }

    /// Logit bias, and the penalties over what was generated.
    fn penalize(&self, scores: &mut [f32]) {
        for &(token, bias) in &self.sampling.logit_bias {
            if let Some(score) = scores.get_mut(token as usize) {
                *score += bias;
            }
        }
        let (presence, frequency) = (self.sampling.presence_penalty, self.sampling.frequency_penalty);
        if presence == 0.0 && frequency == 0.0 {
            return;
        }
        for (&token, &count) in &self.counts {
            if let Some(score) = scores.get_mut(token as usize) {
                *score -= presence + frequency * count as f32;
            }
        }
    }

    /// Draws from the scores; `None` when all are minus infinity.
    fn draw(&mut self, scores: &[f32]) -> Option<u32> {
        let (best, top) = argmax(scores)?;
        if self.sampling.is_greedy() {
            return Some(best);
        }
        let scale = 1.0 / self.sampling.temperature;
        // Weights below this share of the best one never add up to anything that is drawn.
        const NEGLIGIBLE: f32 = 1e-9;
        let mut weights: Vec<(u32, f32)> = scores
            .iter()
            .enumerate()
            .map(|(id, &score)| (id as u32, ((score - top) * scale).exp()))
            .filter(|&(_, weight)| weight > NEGLIGIBLE)
            .collect();
        let mut total: f32 = weights.iter().map(|w| w.1).sum();
        if self.sampling.top_p < 1.0 {
            weights.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let wanted = total * self.sampling.top_p;
            let mut sum = 0.0;
            let kept = weights.iter().position(|w| {
                sum += w.1;
                sum >= wanted
            });
            if let Some(last) = kept {
                weights.truncate(last + 1);
                total = sum;
            }
        }
        let mut at = self.rng.random::<f32>() * total;
        for &(id, weight) in &weights {
            at -= weight;
            if at <= 0.0 {
                return Some(id);
            }
        }
        weights.last().map(|w| w.0)
    }
}

/// The highest score that is not minus infinity (nor NaN), the first of equals.
fn argmax(scores: &[f32]) -> Option<(u32, f32)> {
    let mut best = None;
    for (id, &score) in scores.iter().enumerate() {
        if score > best.map_or(f32::NEG_INFINITY, |(_, top)| top) {
            best = Some((id as u32, score));
        }
    }
    best
}

/// The logarithm of the sum of all exponentials.
fn log_sum(scores: &[f32]) -> f32 {
    let max = argmax(scores).map_or(0.0, |(_, max)| max);
    let sum: f64 = scores.iter().map(|&s| f64::from(s - max).exp()).sum();
    max + sum.ln() as f32
}

/// What is told of a token that was drawn from these scores, whose [`log_sum`] was `norm` before they were narrowed.
fn odds(scores: &mut [f32], token: u32, norm: f32) -> Odds {
    let chosen = scores.get_mut(token as usize).map_or(f32::NEG_INFINITY, |s| std::mem::replace(s, f32::NEG_INFINITY));
    Odds { chosen: chosen - norm, runner_up: argmax(scores).map(|(id, score)| (id, score - norm)) }
}

/// The model's distribution at one step, for log-probabilities.
struct Report {
    scores: Vec<f32>,
    /// Their [`log_sum`].
    norm: f32,
    top: usize,
}

impl Report {
    fn new(scores: &[f32], top: usize) -> Self {
        Self { scores: scores.to_vec(), norm: log_sum(scores), top }
    }

    fn of(mut self, token: u32) -> Logprob {
        let chosen = self.scores.get(token as usize).map_or(f32::NEG_INFINITY, |s| s - self.norm);
        let mut ids: Vec<u32> = (0..self.scores.len() as u32).collect();
        let top = self.top.min(ids.len());
        let scores = std::mem::take(&mut self.scores);
        let order = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
        if top > 0 && top < ids.len() {
            ids.select_nth_unstable_by(top - 1, order);
        }
        ids.truncate(top);
        ids.sort_unstable_by(order);
        Logprob { chosen, top: ids.into_iter().map(|id| (id, scores[id as usize] - self.norm)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Free;

    impl Guide for Free {
        fn allowed(&mut self) -> Result<Option<llguidance::toktrie::SimpleVob>, String> {
            Ok(None)
        }
        fn vetoes(&self, token: u32) -> bool {
            token == 4
        }
        fn commit(&mut self, _token: u32) -> Result<Flow, String> {
            Ok(Flow::Continue)
        }
    }

    /// Tokens 0 to 5; 3 ends the turn, 4 is vetoed, 5 is the sentinel.
    fn state(sampling: Sampling, max_tokens: usize) -> (State, mpsc::Receiver<Result<TokenEvent, Error>>) {
        let (events, receiver) = mpsc::channel(64);
        let endings = Endings { end_of_turn: Arc::new([3]), sentinel: 5 };
        let sampler = Sampler::new(sampling, max_tokens, Box::new(Free), endings, events, CancellationToken::new());
        (sampler.0.into_inner().unwrap(), receiver)
    }

    fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    #[test]
    fn greedy_takes_the_best_that_is_not_vetoed_nor_the_sentinel() {
        let (mut state, _events) = state(greedy(), 10);
        assert_eq!(state.step(&mut [0.0, 2.0, 1.0, -9.0, 5.0, 9.0]), Ok(1));
    }

    #[test]
    fn the_end_of_turn_becomes_the_sentinel_and_stays_it() {
        let (mut state, mut events) = state(greedy(), 10);
        assert_eq!(state.step(&mut [0.0, 0.0, 0.0, 9.0, 0.0, 0.0]), Ok(5));
        assert_eq!(state.step(&mut [9.0, 0.0, 0.0, 0.0, 0.0, 0.0]), Ok(5));
        assert!(matches!(events.try_recv(), Ok(Ok(TokenEvent::Finished(TokenFinish::EndOfTurn)))));
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn the_token_limit_counts_the_last_token() {
        let (mut state, mut events) = state(greedy(), 1);
        assert_eq!(state.step(&mut [9.0, 0.0, 0.0, 0.0, 0.0, 0.0]), Ok(5));
        assert!(matches!(events.try_recv(), Ok(Ok(TokenEvent::Token(Token { id: 0, .. })))));
        assert!(matches!(events.try_recv(), Ok(Ok(TokenEvent::Finished(TokenFinish::Length)))));
    }

    #[test]
    fn a_cancelled_generation_ends_at_the_next_step() {
        let (mut state, _events) = state(greedy(), 10);
        state.cancel.cancel();
        assert_eq!(state.step(&mut [9.0, 0.0, 0.0, 0.0, 0.0, 0.0]), Ok(5));
        assert_eq!(state.finished, Some(TokenFinish::Cancelled));
    }

    #[test]
    fn penalties_count_what_was_generated() {
        let sampling = Sampling { frequency_penalty: 1.0, presence_penalty: 0.5, ..greedy() };
        let (mut state, _events) = state(sampling, 10);
        let scores = [2.0, 1.0, 0.0, -9.0, 0.0, 0.0];
        assert_eq!(state.step(&mut scores.clone()), Ok(0), "2.0 wins");
        assert_eq!(state.step(&mut scores.clone()), Ok(1), "2.0 - 1.5 is less than 1.0");
        assert_eq!(state.step(&mut scores.clone()), Ok(0), "1.0 - 1.5 is less than 0.5");
    }

    #[test]
    fn a_bias_of_minus_hundred_bans_and_of_hundred_forces() {
        let sampling = Sampling { logit_bias: vec![(0, -100.0), (2, 100.0)], ..greedy() };
        let (mut state, _events) = state(sampling, 10);
        assert_eq!(state.step(&mut [9.0, 1.0, -9.0, -9.0, 0.0, 0.0]), Ok(2));
    }

    #[test]
    fn a_seed_makes_the_draw_repeatable_and_top_p_cuts_the_tail() {
        let draw = |seed, top_p| {
            let sampling = Sampling { seed: Some(seed), top_p, ..Sampling::default() };
            let (mut state, _events) = state(sampling, 64);
            (0..32).map(|_| state.draw(&[1.0, 1.0, 1.0, f32::NEG_INFINITY]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7, 1.0), draw(7, 1.0));
        assert_ne!(draw(7, 1.0), draw(8, 1.0));
        assert!(draw(7, 1.0).contains(&2));
        assert!(!draw(7, 0.5).contains(&2), "two of three equal tokens hold half the mass");
    }

    #[test]
    fn logprobs_are_natural_and_sorted() {
        let report = Report::new(&[0.0, (2.0f32).ln(), (5.0f32).ln()], 2).of(1);
        assert!((report.chosen - (0.25f32).ln()).abs() < 1e-5);
        assert_eq!(report.top.iter().map(|t| t.0).collect::<Vec<_>>(), [2, 1]);
        assert!((report.top[0].1 - (0.625f32).ln()).abs() < 1e-5);
    }

    #[test]
    fn odds_are_of_all_tokens_and_name_the_best_of_the_rest() {
        let all = [(1.0f32).ln(), (6.0f32).ln(), (3.0f32).ln(), f32::NEG_INFINITY];
        let norm = log_sum(&all);
        let mut narrowed = all;
        narrowed[1] = f32::NEG_INFINITY;
        let Odds { chosen, runner_up } = odds(&mut narrowed, 2, norm);
        assert!((chosen - (0.3f32).ln()).abs() < 1e-5);
        assert!(matches!(runner_up, Some((0, logprob)) if (logprob - (0.1f32).ln()).abs() < 1e-5));
        let mut single = [f32::NEG_INFINITY, 0.0];
        assert_eq!(odds(&mut single, 1, 0.0), Odds { chosen: 0.0, runner_up: None });
    }

    #[test]
    fn nothing_allowed_is_an_error_not_a_loop() {
        let (mut state, _events) = state(greedy(), 10);
        assert!(
            state.step(&mut [f32::NEG_INFINITY, f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY, 1.0, 1.0]).is_err()
        );
    }
}
