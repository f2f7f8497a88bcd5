//! A store that counts what goes in and out of it, as JSON.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::StreamExt;
use store::{
    Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, StoreError, WatchEvent,
    WatchStream,
};

/// Requests and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Traffic {
    pub lists: u64,
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub events: u64,
    pub event_bytes: u64,
    /// The part of all bytes that are managers: one for each disk, which names all copies on it, as Longhorn has it.
    pub manager_bytes: u64,
}

#[derive(Default)]
pub struct Traffics([AtomicU64; 8]);

impl Traffic {
    pub fn bytes(&self) -> u64 {
        self.read_bytes + self.written_bytes + self.event_bytes
    }

    pub fn since(&self, before: &Traffic) -> Traffic {
        Traffic {
            lists: self.lists - before.lists,
            reads: self.reads - before.reads,
            read_bytes: self.read_bytes - before.read_bytes,
            writes: self.writes - before.writes,
            written_bytes: self.written_bytes - before.written_bytes,
            events: self.events - before.events,
            event_bytes: self.event_bytes - before.event_bytes,
            manager_bytes: self.manager_bytes - before.manager_bytes,
        }
    }
}

impl Traffics {
    pub fn so_far(&self) -> Traffic {
        let [lists, reads, read_bytes, writes, written_bytes, events, event_bytes, manager_bytes] =
            [0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| self.0[n].load(Ordering::Relaxed));
        Traffic { lists, reads, read_bytes, writes, written_bytes, events, event_bytes, manager_bytes }
    }

    fn add(&self, n: usize, count: u64) {
        self.0[n].fetch_add(count, Ordering::Relaxed);
    }

    fn bytes(&self, object: &Object) -> u64 {
        let bytes = serde_json::to_vec(&object.0).unwrap().len() as u64;
        if object.0.get("kind").is_some_and(|kind| kind == "BackingImageManager") {
            self.add(7, bytes);
        }
        bytes
    }

    fn read<'a>(&self, objects: impl Iterator<Item = &'a Object>) {
        self.add(1, 1);
        self.add(2, objects.map(|object| self.bytes(object)).sum());
    }

    fn written(&self, object: &Object) {
        // Events for users are paced by the clock, and are no work of reconcilers.
        if object.0.get("kind").is_none_or(|kind| kind != "Event") {
            self.add(3, 1);
            self.add(4, self.bytes(object));
        }
    }

    fn heard(&self, event: &WatchEvent) {
        if let WatchEvent::Applied(object) | WatchEvent::Deleted(object) = event {
            self.add(5, 1);
            self.add(6, self.bytes(object));
        }
    }
}

pub struct Counting {
    pub inner: Arc<dyn ObjectStore>,
    pub traffic: Arc<Traffics>,
}

#[async_trait]
impl ObjectStore for Counting {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.traffic.written(&object);
        self.inner.create(resource, object).await
    }
    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        let found = self.inner.get(resource, key).await?;
        if resource.kind != "Event" {
            self.traffic.read(found.iter());
        }
        Ok(found)
    }
    async fn list(&self, r: &ResourceType, namespace: Option<&str>, s: &Selector) -> Result<ObjectList, StoreError> {
        let found = self.inner.list(r, namespace, s).await?;
        self.traffic.add(0, 1);
        self.traffic.read(found.items.iter());
        Ok(found)
    }
    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.traffic.written(&object);
        self.inner.replace(resource, object).await
    }
    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.traffic.written(&object);
        self.inner.replace_status(resource, object).await
    }
    async fn delete(&self, r: &ResourceType, k: &ObjectKey, p: &Preconditions) -> Result<Option<Object>, StoreError> {
        self.inner.delete(r, k, p).await
    }
    async fn watch(&self, r: &ResourceType, ns: Option<&str>, from: Option<String>) -> Result<WatchStream, StoreError> {
        let traffic = self.traffic.clone();
        let events = self.inner.watch(r, ns, from).await?;
        Ok(events.inspect(move |event| event.iter().for_each(|event| traffic.heard(event))).boxed())
    }
}
