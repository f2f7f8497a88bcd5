//! The work queue: each object at most once in it, never two passes over one object at a time.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::limits::{FIRST_RETRY, RESYNC};

/// Which reconciler is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Image,
    Manager,
    DataSource,
    Volume,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Image => "image",
            Kind::Manager => "manager",
            Kind::DataSource => "data_source",
            Kind::Volume => "volume",
        }
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub kind: Kind,
    pub name: String,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Key>,
    is_ready: HashSet<Key>,
    later: BTreeMap<Key, Instant>,
    running: HashSet<Key>,
    /// Asked for while it was running: one more pass follows.
    again: HashSet<Key>,
    failures: HashMap<Key, u32>,
}

/// Keys to reconcile. Bounded by the number of objects.
#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
    wake: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Asks for a pass as soon as possible.
    pub fn add(&self, kind: Kind, name: impl Into<String>) {
        let key = Key { kind, name: name.into() };
        if key.name.is_empty() {
            return;
        }
        self.lock().add(key);
        self.wake.notify_one();
    }

    /// Waits for the next object; it counts as running until [`Queue::finish`] or [`Queue::fail`].
    pub async fn next(&self) -> Key {
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
    pub fn finish(&self, key: &Key, recheck: Option<Duration>) {
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
    pub fn fail(&self, key: &Key) {
        let mut state = self.lock();
        let failures = state.failures.entry(key.clone()).or_insert(0);
        let delay = FIRST_RETRY.saturating_mul(2u32.saturating_pow(*failures)).min(RESYNC);
        *failures = failures.saturating_add(1);
        state.running.remove(key);
        state.again.remove(key);
        state.later.insert(key.clone(), Instant::now() + delay);
        drop(state);
        self.wake.notify_one();
    }

    /// How many objects are ready for a pass.
    pub fn len(&self) -> usize {
        self.lock().ready.len()
    }
}

impl State {
    fn add(&mut self, key: Key) {
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
        let due: Vec<Key> = self.later.iter().filter(|(_, at)| **at <= now).map(|(k, _)| k.clone()).collect();
        for key in due {
            self.add(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn never_hands_out_an_object_twice_at_a_time() {
        let queue = Queue::default();
        queue.add(Kind::Image, "a");
        queue.add(Kind::Image, "a");
        let key = queue.next().await;
        queue.add(Kind::Image, "a");
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.next()).await.is_err(), "it is running");
        queue.finish(&key, None);
        assert_eq!(queue.next().await, key, "asked for while it was running");
        queue.finish(&key, None);
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.next()).await.is_err(), "nobody asked");
    }

    #[tokio::test(start_paused = true)]
    async fn backs_off_after_failures_and_forgets_them_after_a_success() {
        let queue = Queue::default();
        queue.add(Kind::Volume, "v");
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
        assert_eq!(before.elapsed(), FIRST_RETRY);
    }
}
