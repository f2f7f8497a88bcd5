//! A work queue: each key at most once in it, never two passes over one key at a time, back-off after failures.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::backoff::Backoff;

struct State<K> {
    ready: VecDeque<K>,
    is_ready: HashSet<K>,
    later: BTreeMap<K, Instant>,
    running: HashSet<K>,
    /// Asked for while it was running: one more pass follows.
    again: HashSet<K>,
    failures: HashMap<K, u32>,
}

/// Keys to reconcile. Bounded by the number of different keys.
pub struct Queue<K> {
    state: Mutex<State<K>>,
    wake: Notify,
    backoff: Backoff,
}

impl<K: Clone + Eq + Ord + Hash> Queue<K> {
    /// An empty queue; `backoff` is the delay after failures in a row.
    pub fn new(backoff: Backoff) -> Queue<K> {
        let state = State {
            ready: VecDeque::new(),
            is_ready: HashSet::new(),
            later: BTreeMap::new(),
            running: HashSet::new(),
            again: HashSet::new(),
            failures: HashMap::new(),
        };
        Queue { state: Mutex::new(state), wake: Notify::new(), backoff }
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Asks for a pass as soon as possible.
    pub fn add(&self, key: K) {
        self.lock().add(key);
        self.wake.notify_one();
    }

    /// Waits for the next key; it counts as running until [`Queue::finish`] or [`Queue::fail`].
    pub async fn next(&self) -> K {
        loop {
            let due = {
                let mut state = self.lock();
                state.release_due(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.is_ready.remove(&key);
                    state.running.insert(key.clone());
                    return key;
                }
                state.later.values().min().copied()
            };
            match due {
                Some(due) => {
                    tokio::select! { () = self.wake.notified() => {}, () = tokio::time::sleep_until(due) => {} }
                }
                None => self.wake.notified().await,
            }
        }
    }

    /// A pass went well; the next one comes with an event, or after `recheck`.
    pub fn finish(&self, key: &K, recheck: Option<Duration>) {
        let mut state = self.lock();
        state.failures.remove(key);
        state.running.remove(key);
        if state.again.remove(key) {
            state.add(key.clone());
        } else if let Some(recheck) = recheck {
            state.later.insert(key.clone(), Instant::now() + recheck);
        }
        drop(state);
        self.wake.notify_one();
    }

    /// A pass failed; the next one comes after a back-off, whatever events came during it.
    pub fn fail(&self, key: &K) {
        let mut state = self.lock();
        let failures = state.failures.entry(key.clone()).or_insert(0);
        *failures = failures.saturating_add(1);
        let delay = self.backoff.delay(*failures);
        state.running.remove(key);
        state.again.remove(key);
        state.later.insert(key.clone(), Instant::now() + delay);
        drop(state);
        self.wake.notify_one();
    }

    /// How many keys are ready for a pass.
    pub fn len(&self) -> usize {
        self.lock().ready.len()
    }

    /// Whether no key is ready for a pass.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Clone + Eq + Ord + Hash> State<K> {
    fn add(&mut self, key: K) {
        if self.running.contains(&key) {
            self.again.insert(key);
            return;
        }
        self.later.remove(&key);
        if self.is_ready.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    fn release_due(&mut self, now: Instant) {
        let due: Vec<K> = self.later.iter().filter(|(_, at)| **at <= now).map(|(k, _)| k.clone()).collect();
        for key in due {
            self.add(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(50);

    fn queue() -> Queue<&'static str> {
        Queue::new(Backoff { initial: FIRST, max: Duration::from_secs(30) })
    }

    #[tokio::test(start_paused = true)]
    async fn never_hands_out_a_key_twice_at_a_time() {
        let queue = queue();
        queue.add("a");
        queue.add("a");
        let key = queue.next().await;
        queue.add("a");
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.next()).await.is_err(), "it is running");
        queue.finish(&key, None);
        assert_eq!(queue.next().await, key, "asked for while it was running");
        queue.finish(&key, None);
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.next()).await.is_err(), "nobody asked");
    }

    #[tokio::test(start_paused = true)]
    async fn backs_off_after_failures_and_forgets_them_after_a_success() {
        let queue = queue();
        queue.add("v");
        let mut waits = vec![];
        for _ in 0..3 {
            let before = Instant::now();
            let key = queue.next().await;
            waits.push(before.elapsed().as_millis());
            queue.fail(&key);
        }
        assert_eq!(waits, [0, 50, 100]);
        let key = queue.next().await;
        queue.finish(&key, Some(Duration::from_secs(5)));
        let before = Instant::now();
        assert_eq!(queue.next().await, key);
        assert_eq!(before.elapsed(), Duration::from_secs(5));
        queue.fail(&key);
        let before = Instant::now();
        queue.next().await;
        assert_eq!(before.elapsed(), FIRST);
    }
}
