//! What the engine's prefix cache holds, known from outside.
//!
//! mistral.rs keeps the keys and values of every finished sequence under its tokens. On a CPU it never drops one, does
//! not say what a prompt found there, and has no call to empty it. But what it does is deterministic, so a mirror of its
//! keys knows both how much it holds and what a prompt will be served.
//!
//! The cache can only be emptied whole. What live conversations lose by that is computed again while the engine is idle:
//! [`PrefixMirror::clear`] says what is worth it.

use std::time::{Duration, Instant};

/// Tokens by which a sequence's buffers grow.
const GROWTH: usize = 512;

/// The keys of the engine's prefix cache, and what they cost.
///
/// Exact as long as one sequence runs at a time: entries are added when a sequence ends and looked up when one starts.
#[derive(Debug)]
pub(super) struct PrefixMirror {
    entries: Vec<Entry>,
    bytes_per_token: u64,
}

#[derive(Debug)]
struct Entry {
    /// The sequence's tokens. Its end mark is left out: it occurs in no prompt.
    tokens: Vec<u32>,
    /// Tokens that the entry's buffers have room for.
    capacity: usize,
    /// When it was made.
    at: Instant,
}

impl PrefixMirror {
    pub(super) fn new(bytes_per_token: u64) -> Self {
        Self { entries: Vec::new(), bytes_per_token }
    }

    /// How many tokens of this prompt the cache will serve.
    pub(super) fn lookup(&self, prompt: &[u32]) -> usize {
        self.best(prompt).map_or(0, |(len, _)| len)
    }

    /// How many tokens of this prompt are in the cache, though the prompt itself may not be served.
    pub(super) fn covers(&self, prompt: &[u32]) -> usize {
        self.entries.iter().map(|entry| common(prompt, &entry.tokens)).max().unwrap_or(0)
    }

    /// The entry with the longest common prefix, the first of equals. None for a prompt that an entry wholly contains:
    /// there would be nothing left to compute, and the engine does not use the entry then.
    fn best(&self, prompt: &[u32]) -> Option<(usize, &Entry)> {
        let mut best: Option<(usize, &Entry)> = None;
        for entry in &self.entries {
            let len = common(prompt, &entry.tokens);
            if len > best.map_or(0, |(longest, _)| longest) {
                best = Some((len, entry));
            }
        }
        best.filter(|(len, _)| *len < prompt.len())
    }

    /// Takes note of a finished sequence: `tokens` starts with the prompt that was looked up when it started.
    pub(super) fn insert(&mut self, prompt_len: usize, tokens: Vec<u32>) {
        let start = self.best(&tokens[..prompt_len]).map_or(grown(prompt_len), |(_, entry)| entry.capacity);
        let capacity = if tokens.len() > start { start + grown(tokens.len() - start) } else { start };
        self.entries.retain(|entry| entry.tokens != tokens);
        self.entries.push(Entry { tokens, capacity, at: Instant::now() });
    }

    /// What the entries cost at most, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.entries.iter().map(|e| e.capacity as u64).sum::<u64>() * self.bytes_per_token
    }

    /// What a sequence of this length costs when nothing of it is cached, in bytes.
    pub(super) fn cost(&self, tokens: usize) -> u64 {
        grown(tokens) as u64 * self.bytes_per_token
    }

    /// Whether nothing was added for this long.
    pub(super) fn is_stale(&self, pause: Duration) -> bool {
        self.entries.last().is_none_or(|latest| latest.at.elapsed() >= pause)
    }

    /// Forgets everything. Returns what is worth computing again: of the latest `most` conversations the longest
    /// sequence each, latest first, as many as fit `budget` bytes, and none whose last turn is longer ago than `live`.
    pub(super) fn clear(&mut self, most: usize, budget: u64, live: Duration) -> Vec<Vec<u32>> {
        let mut kept: Vec<Vec<u32>> = Vec::new();
        let mut cost = 0;
        for entry in std::mem::take(&mut self.entries).into_iter().rev() {
            // An older sequence that a kept one continues is the same conversation at an earlier turn.
            if kept.iter().any(|later| common(later, &entry.tokens) * 4 >= entry.tokens.len() * 3) {
                continue;
            }
            cost += self.cost(entry.tokens.len());
            if kept.len() == most || cost > budget || entry.at.elapsed() > live {
                break;
            }
            kept.push(entry.tokens);
        }
        kept
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn grown(tokens: usize) -> usize {
    tokens.div_ceil(GROWTH) * GROWTH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_served_its_longest_common_prefix() {
        let mut mirror = PrefixMirror::new(1);
        mirror.insert(3, vec![1, 2, 3, 4, 5]);
        mirror.insert(3, vec![1, 2, 9, 9, 9]);
        assert_eq!(mirror.lookup(&[1, 2, 3, 4, 7]), 4);
        assert_eq!(mirror.lookup(&[1, 2, 9, 8]), 3);
        assert_eq!(mirror.lookup(&[7, 8]), 0);
    }

    #[test]
    fn a_prompt_that_is_wholly_contained_is_not_served() {
        let mut mirror = PrefixMirror::new(1);
        mirror.insert(2, vec![1, 2, 3]);
        assert_eq!(mirror.lookup(&[1, 2]), 0);
        assert_eq!(mirror.lookup(&[1, 2, 3]), 0);
        assert_eq!(mirror.lookup(&[1, 2, 3, 4]), 3);
    }

    #[test]
    fn buffers_grow_in_blocks_from_what_they_were_copied_from() {
        let mut mirror = PrefixMirror::new(10);
        mirror.insert(4, (0..500).collect());
        assert_eq!(mirror.bytes(), 5_120);
        mirror.insert(501, (0..520).collect());
        assert_eq!(mirror.bytes(), 5_120 + 10_240);
    }

    #[test]
    fn the_same_sequence_is_held_once() {
        let mut mirror = PrefixMirror::new(1);
        mirror.insert(2, vec![1, 2, 3]);
        mirror.insert(2, vec![1, 2, 3]);
        assert_eq!(mirror.bytes(), 512);
    }

    #[test]
    fn clearing_names_the_latest_turn_of_each_conversation() {
        let mut mirror = PrefixMirror::new(1);
        mirror.insert(2, (0..100).collect());
        mirror.insert(2, (1000..1100).collect());
        mirror.insert(2, (0..130).collect());
        let live = mirror.clear(8, u64::MAX, Duration::MAX);
        assert_eq!(live, vec![(0..130).collect::<Vec<_>>(), (1000..1100).collect()]);
        assert_eq!(mirror.bytes(), 0);
    }
}
