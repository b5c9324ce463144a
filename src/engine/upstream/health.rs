//! Whether a server is asked: a circuit breaker that opens after failures in a row, and lets one turn try again after a
//! pause that grows.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Failures in a row after which a server is not asked.
const FAILURES: u32 = 3;
/// How long it is not asked the first time, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// What became of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The server answered.
    Good,
    /// It did not.
    Bad {
        /// When it was asked.
        begun: Instant,
    },
    /// Nobody waited for it.
    Unknown,
}

/// A server's state.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// When it failed last.
    failed: Option<Instant>,
    /// Until when it is not asked; `None` while it is.
    until: Option<Instant>,
    pause: Duration,
    /// Whether a turn is finding out if it answers again.
    trying: bool,
}

// === impl Health ===

impl Health {
    /// Whether a turn may go there now. One that may has to say what became of it.
    pub(super) fn admits(&self, now: Instant) -> bool {
        let mut state = self.state();
        match state.until {
            None => true,
            Some(until) if until > now || state.trying => false,
            Some(_) => {
                state.trying = true;
                true
            }
        }
    }

    /// Whether it is asked without reserve.
    pub(super) fn is_good(&self) -> bool {
        self.state().until.is_none()
    }

    /// How long it is not asked any more.
    pub(super) fn pause(&self, now: Instant) -> Duration {
        self.state().until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// Takes note of what became of a turn.
    pub(super) fn note(&self, verdict: Verdict, now: Instant) {
        let mut state = self.state();
        match verdict {
            Verdict::Good => *state = State::default(),
            Verdict::Unknown => state.trying = false,
            // Turns that a server's end meets at once are one failure.
            Verdict::Bad { begun } if state.failed.is_some_and(|failed| begun < failed) => state.trying = false,
            Verdict::Bad { .. } => {
                state.failures += 1;
                state.failed = Some(now);
                if state.failures >= FAILURES {
                    state.pause = (state.pause * 2).clamp(PAUSE.0, PAUSE.1);
                    state.until = Some(now + state.pause);
                }
                state.trying = false;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_fails_is_left_alone_and_tried_again_by_one() {
        let health = Health::default();
        let mut now = Instant::now();
        for _ in 0..FAILURES {
            assert!(health.admits(now));
            health.note(Verdict::Bad { begun: now }, now);
            // Another that was under way.
            health.note(Verdict::Bad { begun: now - PAUSE.0 }, now);
        }
        assert!(!health.admits(now) && !health.is_good());
        now += PAUSE.0;
        assert!(health.admits(now));
        assert!(!health.admits(now), "a second turn tries too");
        health.note(Verdict::Bad { begun: now }, now);
        now += PAUSE.0;
        assert!(!health.admits(now), "the pause did not grow");
        now += PAUSE.0;
        assert!(health.admits(now));
        // The caller left before it was known.
        health.note(Verdict::Unknown, now);
        assert!(health.admits(now));
        health.note(Verdict::Good, now);
        assert!(health.is_good() && health.admits(now) && health.admits(now));
    }
}
