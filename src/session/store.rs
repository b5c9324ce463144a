//! Where responses are kept, so that they can be continued, also from another connection.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dashmap::{DashMap, mapref::entry::Entry};
use tokio::time::Instant;

use super::{
    Handle, Owner,
    history::{History, Id},
    response::Response,
};

/// A response and what continues it.
#[derive(Clone)]
pub struct Stored {
    /// Who may see it.
    pub owner: Owner,
    /// The response; without an outcome while it runs.
    pub response: std::sync::Arc<Response>,
    /// The conversation up to and with its output.
    pub history: History,
    /// The session in which it was made.
    pub session: Handle,
}

/// How long a response is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// For as long as its session lives, which says so when it ends.
    WithSession,
    /// For this long from now.
    For(Duration),
}

/// A place for responses. Its methods take no time that a caller could feel.
pub trait Store: Send + Sync + 'static {
    /// Keeps a response, or a later version of it.
    fn put(&self, stored: Stored, keep: Keep);
    /// A response that is still kept.
    fn get(&self, id: &str) -> Option<Stored>;
    /// Forgets a response. Gives whether it was there.
    fn remove(&self, id: &str) -> bool;
    /// Changes how long a response is kept.
    fn keep(&self, id: &str, keep: Keep);
    /// Forgets what is not kept any longer.
    fn sweep(&self);
}

/// Responses in the memory of this process.
pub struct Memory {
    responses: DashMap<Id, (Stored, Option<Instant>)>,
    /// Oldest first; ids may have been removed since.
    order: Mutex<std::collections::VecDeque<Id>>,
    count: AtomicUsize,
    most: usize,
}

// === impl Memory ===

impl Memory {
    /// A store of at most so many responses. The oldest one makes room for one too many.
    pub fn new(most: usize) -> Self {
        Self { responses: DashMap::new(), order: Mutex::default(), count: AtomicUsize::new(0), most }
    }

    fn until(keep: Keep) -> Option<Instant> {
        match keep {
            Keep::WithSession => None,
            Keep::For(time) => Some(Instant::now() + time),
        }
    }
}

impl Store for Memory {
    fn put(&self, stored: Stored, keep: Keep) {
        let id = stored.response.id.clone();
        let value = (stored, Self::until(keep));
        match self.responses.entry(id.clone()) {
            Entry::Occupied(mut entry) => {
                entry.insert(value);
                return;
            }
            Entry::Vacant(entry) => drop(entry.insert(value)),
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order.push_back(id);
        // Names of what was removed must not pile up either.
        while self.count.load(Ordering::Relaxed) > self.most || order.len() > 2 * self.most {
            let Some(oldest) = order.pop_front() else { break };
            self.remove(&oldest);
        }
    }

    fn get(&self, id: &str) -> Option<Stored> {
        let entry = self.responses.get(id)?;
        let (stored, until) = entry.value();
        until.is_none_or(|until| until > Instant::now()).then(|| stored.clone())
    }

    fn remove(&self, id: &str) -> bool {
        let removed = self.responses.remove(id).is_some();
        if removed {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        removed
    }

    fn keep(&self, id: &str, keep: Keep) {
        if let Some(mut entry) = self.responses.get_mut(id) {
            entry.1 = Self::until(keep);
        }
    }

    fn sweep(&self) {
        let now = Instant::now();
        self.responses.retain(|_, (_, until)| {
            let kept = until.is_none_or(|until| until > now);
            if !kept {
                self.count.fetch_sub(1, Ordering::Relaxed);
            }
            kept
        });
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        if order.len() > 2 * self.count.load(Ordering::Relaxed) {
            order.retain(|id| self.responses.contains_key(id));
        }
    }
}
