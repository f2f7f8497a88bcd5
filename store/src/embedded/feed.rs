//! What readers and watchers see: the committed objects, and a bounded history of changes.
//!
//! A watcher is a position in the history, not a queue: a slow one costs nothing, and learns that it must list again when the history
//! no longer reaches back to its position.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use futures::StreamExt;
use futures::stream;
use tokio::sync::watch::{Receiver, Sender};

use super::limits;
use super::state::{Change, ObjectId, State};
use crate::{Object, ResourceType, WatchEvent, WatchStream};

/// The committed state. Everything in it is durable.
pub struct Feed {
    published: RwLock<Published>,
    /// The version of the state; its sender lives in the writing thread, so it closes with the store.
    versions: Receiver<u64>,
}

struct Published {
    state: State,
    history: VecDeque<Change>,
    /// All changes after this version are in the history.
    complete_after: u64,
}

/// What a watcher gets in one turn.
struct Turn {
    events: Vec<WatchEvent>,
    position: u64,
}

impl Feed {
    pub fn new(state: State, versions: &Sender<u64>) -> Feed {
        let complete_after = state.version();
        let published = RwLock::new(Published { state, history: VecDeque::new(), complete_after });
        Feed { published, versions: versions.subscribe() }
    }

    fn read(&self) -> RwLockReadGuard<'_, Published> {
        self.published.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows committed changes.
    pub fn publish(&self, changes: Vec<Change>) {
        let mut published = self.published.write().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            published.state.redo(&change);
            published.history.push_back(change);
        }
        while published.history.len() > limits::HISTORY_EVENTS {
            if let Some(dropped) = published.history.pop_front() {
                published.complete_after = dropped.version;
            }
        }
    }

    /// Shows another state whose way from the last one is unknown: every watcher must list again.
    pub fn reset(&self, state: State) {
        let mut published = self.published.write().unwrap_or_else(PoisonError::into_inner);
        published.history.clear();
        published.complete_after = state.version();
        published.state = state;
    }

    pub fn get(&self, id: &ObjectId) -> Option<Arc<Object>> {
        self.read().state.get(id).cloned()
    }

    /// The objects of a kind and the version at which this is all of them.
    pub fn list(&self, resource: &ResourceType, namespace: Option<&str>) -> (Vec<Arc<Object>>, u64) {
        let published = self.read();
        (published.state.of_kind(resource, namespace).cloned().collect(), published.state.version())
    }

    pub fn counts(&self) -> BTreeMap<String, usize> {
        self.read().state.counts()
    }

    /// The next changes of a kind after `position`, or `Relist`.
    fn turn(&self, wanted: &Wanted, position: u64) -> Turn {
        let published = self.read();
        let now = published.state.version();
        if position < published.complete_after || position > now {
            return Turn { events: vec![WatchEvent::Relist], position: now };
        }
        let mut turn = Turn { events: vec![], position: now };
        let first = published.history.partition_point(|change| change.version <= position);
        for change in published.history.range(first..) {
            if !wanted.matches(&change.id) {
                continue;
            }
            let object = Object::clone(&change.object);
            turn.events.push(if change.removed { WatchEvent::Deleted(object) } else { WatchEvent::Applied(object) });
            if turn.events.len() == limits::EVENTS_PER_TURN {
                turn.position = change.version;
                break;
            }
        }
        turn
    }
}

struct Wanted {
    resource: ResourceType,
    namespace: Option<String>,
}

impl Wanted {
    fn matches(&self, id: &ObjectId) -> bool {
        id.is_of(&self.resource) && self.namespace.as_deref().is_none_or(|namespace| namespace == id.namespace)
    }
}

struct Watcher {
    feed: Arc<Feed>,
    wanted: Wanted,
    position: u64,
    versions: Receiver<u64>,
    existing: VecDeque<Arc<Object>>,
    ready: VecDeque<WatchEvent>,
}

/// Changes of a kind after version `from`; without it every object that exists, first.
pub fn watch(feed: Arc<Feed>, resource: &ResourceType, namespace: Option<&str>, from: Option<u64>) -> WatchStream {
    let (existing, position) = match from {
        Some(version) => (vec![], version),
        None => feed.list(resource, namespace),
    };
    let watcher = Watcher {
        wanted: Wanted { resource: resource.clone(), namespace: namespace.map(str::to_owned) },
        position,
        versions: feed.versions.clone(),
        existing: existing.into(),
        ready: VecDeque::new(),
        feed,
    };
    stream::unfold(watcher, |mut watcher| async move { Some((Ok(watcher.next().await?), watcher)) }).boxed()
}

impl Watcher {
    /// The next event; `None` when the store has ended.
    async fn next(&mut self) -> Option<WatchEvent> {
        loop {
            if let Some(object) = self.existing.pop_front() {
                return Some(WatchEvent::Applied(Object::clone(&object)));
            }
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let turn = self.feed.turn(&self.wanted, self.position);
            self.position = turn.position;
            self.ready = turn.events.into();
            if self.ready.is_empty() {
                let position = self.position;
                self.versions.wait_for(|version| *version > position).await.ok()?;
            }
        }
    }
}
