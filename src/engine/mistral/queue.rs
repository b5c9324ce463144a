//! The bounded, fair queue in front of the model: turns before warm-ups, those before what is restored, and first come
//! first served in each class.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// Which class of work, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Somebody waits for it.
    Turn,
    /// It makes a later turn faster, and somebody asked for it.
    WarmUp,
    /// It computes again what had to be given up, in case that it is of use.
    Restore,
}

/// Something that can wait in the queue.
pub(super) trait Waiting {
    /// In which class.
    fn class(&self) -> Class;
    /// Whether nobody wants it any more.
    fn is_abandoned(&self) -> bool;
}

/// A bounded queue of classes.
pub(super) struct Queue<T> {
    lanes: Mutex<Lanes<T>>,
    arrived: Notify,
    bound: usize,
    /// How long there must have been no turn before a warm-up may start.
    quiet: Duration,
}

struct Lanes<T> {
    turns: VecDeque<T>,
    warm_ups: VecDeque<T>,
    restores: VecDeque<T>,
    last_turn: Option<Instant>,
}

// === impl Queue ===

impl<T: Waiting> Queue<T> {
    /// A queue that holds `bound` of each class.
    pub(super) fn new(bound: usize, quiet: Duration) -> Self {
        let lanes =
            Lanes { turns: VecDeque::new(), warm_ups: VecDeque::new(), restores: VecDeque::new(), last_turn: None };
        Self { lanes: Mutex::new(lanes), arrived: Notify::new(), bound, quiet }
    }

    /// Adds an item at the end of its class, or gives it back when the class is full.
    pub(super) fn push(&self, item: T) -> Result<(), T> {
        let mut lanes = self.lock();
        let lane = lanes.of(item.class());
        if lane.len() >= self.bound {
            lane.retain(|waiting| !waiting.is_abandoned());
        }
        if lane.len() >= self.bound {
            return Err(item);
        }
        lane.push_back(item);
        drop(lanes);
        self.arrived.notify_one();
        Ok(())
    }

    /// Puts an item that is not done yet in front of its class. It had a place, so the bound is not asked.
    pub(super) fn put_back(&self, item: T) {
        self.lock().of(item.class()).push_front(item);
        self.arrived.notify_one();
    }

    /// The next item that somebody still wants. A warm-up only after a while without turns, since callers often come
    /// in quick succession and would have to wait for its step to end.
    pub(super) async fn next(&self) -> T {
        loop {
            let arrived = self.arrived.notified();
            let pause = {
                let mut lanes = self.lock();
                while let Some(turn) = lanes.turns.pop_front() {
                    if !turn.is_abandoned() {
                        lanes.last_turn = Some(Instant::now());
                        return turn;
                    }
                }
                lanes.warm_ups.retain(|waiting| !waiting.is_abandoned());
                let quiet_from = lanes.last_turn.map(|last| last + self.quiet);
                match quiet_from.filter(|from| *from > Instant::now()) {
                    None => match lanes.warm_ups.pop_front().or_else(|| lanes.restores.pop_front()) {
                        Some(warm_up) => return warm_up,
                        None => None,
                    },
                    Some(from) => (!lanes.warm_ups.is_empty() || !lanes.restores.is_empty()).then_some(from),
                }
            };
            match pause {
                Some(until) => {
                    let _ = tokio::time::timeout_at(until, arrived).await;
                }
                None => arrived.await,
            }
        }
    }

    /// Notes that a turn has just ended, so that warm-ups keep off for a while.
    pub(super) fn turn_ended(&self) {
        self.lock().last_turn = Some(Instant::now());
    }

    /// Whether no turn waits or has run for this long.
    pub(super) fn is_calm(&self, pause: Duration) -> bool {
        let lanes = self.lock();
        lanes.turns.is_empty() && lanes.last_turn.is_none_or(|last| last.elapsed() >= pause)
    }

    /// Turns that wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().turns.len()
    }

    fn lock(&self) -> MutexGuard<'_, Lanes<T>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Lanes<T> {
    fn of(&mut self, class: Class) -> &mut VecDeque<T> {
        match class {
            Class::Turn => &mut self.turns,
            Class::WarmUp => &mut self.warm_ups,
            Class::Restore => &mut self.restores,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Item(u32, Class, bool);

    impl Waiting for Item {
        fn class(&self) -> Class {
            self.1
        }
        fn is_abandoned(&self) -> bool {
            self.2
        }
    }

    fn turn(n: u32) -> Item {
        Item(n, Class::Turn, false)
    }

    fn warm_up(n: u32) -> Item {
        Item(n, Class::WarmUp, false)
    }

    #[tokio::test]
    async fn turns_go_before_warm_ups_and_each_in_order() {
        let queue = Queue::new(4, Duration::from_millis(20));
        for item in [warm_up(1), turn(2), turn(3)] {
            queue.push(item).unwrap();
        }
        assert_eq!(queue.next().await.0, 2);
        assert_eq!(queue.next().await.0, 3);
        let before = Instant::now();
        assert_eq!(queue.next().await.0, 1);
        assert!(before.elapsed() >= Duration::from_millis(10), "a warm-up waits until it is quiet");
    }

    #[tokio::test]
    async fn what_is_asked_for_goes_before_what_is_restored() {
        let queue = Queue::new(4, Duration::ZERO);
        for item in [Item(1, Class::Restore, false), warm_up(2), turn(3)] {
            queue.push(item).unwrap();
        }
        for expected in [3, 2, 1] {
            assert_eq!(queue.next().await.0, expected);
        }
    }

    #[tokio::test]
    async fn a_turn_that_comes_while_a_warm_up_waits_goes_first() {
        let queue = std::sync::Arc::new(Queue::new(4, Duration::from_secs(3600)));
        queue.turn_ended();
        queue.push(warm_up(1)).unwrap();
        let next = tokio::spawn({
            let queue = queue.clone();
            async move { queue.next().await.0 }
        });
        tokio::task::yield_now().await;
        queue.push(turn(2)).unwrap();
        assert_eq!(next.await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_full_class_refuses_until_an_abandoned_one_makes_room() {
        let queue = Queue::new(2, Duration::ZERO);
        queue.push(turn(1)).unwrap();
        queue.push(turn(2)).unwrap();
        assert!(queue.push(turn(3)).is_err());
        assert!(queue.push(warm_up(4)).is_ok());

        let queue = Queue::new(1, Duration::ZERO);
        queue.push(Item(1, Class::Turn, true)).unwrap();
        queue.push(turn(2)).unwrap();
        assert_eq!(queue.next().await.0, 2);
    }
}
