//! The embedded store: objects in one redb file, with the semantics of the Kubernetes API.
//!
//! A write is acknowledged only when its commit is durable. Reads come from memory and never show what is not durable yet.
//! One thread does all writing: it takes every request that waits, decides them one after another ([`state`]), commits them together
//! ([`disk`]), and only then shows them to readers and watchers ([`feed`]). One process at a time may have the file open.

mod disk;
mod expiry;
mod feed;
mod limits;
mod metrics;
mod state;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use async_trait::async_trait;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{mpsc, oneshot};

use crate::{
    Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, StoreError, WatchStream, rules,
};
use disk::Disk;
use feed::Feed;
use state::{ObjectId, Operation};
use writer::Request;

/// An embedded store. Dropping it ends its thread and closes the file.
pub struct Embedded {
    feed: Arc<Feed>,
    /// `None` only while dropping.
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
    commits: Histogram,
}

impl Embedded {
    /// Opens the store file of that path, or makes it; its directory must exist.
    ///
    /// Blocks while it reads the whole file. [`StoreError::InUse`] when another process, or another `Embedded`, has it open.
    pub fn open(path: &Path) -> Result<Embedded, StoreError> {
        Embedded::start(Disk::open(path)?)
    }

    /// A store without a file, for tests and simulations.
    pub fn in_memory() -> Embedded {
        Embedded::start(Disk::none()).expect("a store without a file reads nothing that could fail")
    }

    fn start(disk: Disk) -> Result<Embedded, StoreError> {
        let state = disk.load()?;
        let (versions, _) = tokio::sync::watch::channel(state.version());
        let feed = Arc::new(Feed::new(state.clone(), &versions));
        let (requests, waiting) = mpsc::channel(limits::WAITING_REQUESTS);
        let commits = metrics::commit_seconds();
        let writer = writer::Writer::new(disk, state, feed.clone(), versions, commits.clone());
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run(waiting))
            .map_err(|source| StoreError::Unavailable { source: source.into() })?;
        Ok(Embedded { feed, requests: Some(requests), thread: Some(thread), commits })
    }

    /// Shows its metrics: objects by kind and the time of commits.
    pub fn register_metrics(&self, metrics: &runtime::metrics::Metrics) {
        metrics.register(|registry| metrics::register(registry, &self.feed, &self.commits));
    }

    async fn write(&self, operation: Operation) -> Result<Option<Object>, StoreError> {
        let ended = || StoreError::Unavailable { source: "the thread that writes the store has ended".into() };
        let (answer, answered) = oneshot::channel();
        let requests = self.requests.as_ref().ok_or_else(ended)?;
        requests.send(Request { operation, answer }).await.map_err(|_| ended())?;
        let object = answered.await.map_err(|_| ended())??;
        Ok(object.map(|object| Object::clone(&object)))
    }

    async fn write_one(&self, operation: Operation) -> Result<Object, StoreError> {
        Ok(self.write(operation).await?.expect("create and replace answer with an object"))
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // The file must be closed when this returns, so that it can be opened again. At most one commit is waited for.
            let _ = thread.join();
        }
    }
}

#[async_trait]
impl ObjectStore for Embedded {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.write_one(Operation::Create { resource: resource.clone(), object }).await
    }

    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        let id = ObjectId::new(resource, key)?;
        Ok(self.feed.get(&id).map(|object| Object::clone(&object)))
    }

    async fn list(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        selector: &Selector,
    ) -> Result<ObjectList, StoreError> {
        let (objects, version) = self.feed.list(resource, namespace);
        let items = objects.iter().filter(|o| selector.matches(o)).map(|o| Object::clone(o)).collect();
        Ok(ObjectList { items, resource_version: version.to_string() })
    }

    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.write_one(Operation::Replace { resource: resource.clone(), object }).await
    }

    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.write_one(Operation::ReplaceStatus { resource: resource.clone(), object }).await
    }

    async fn delete(
        &self,
        resource: &ResourceType,
        key: &ObjectKey,
        preconditions: &Preconditions,
    ) -> Result<Option<Object>, StoreError> {
        let (resource, key, preconditions) = (resource.clone(), key.clone(), preconditions.clone());
        self.write(Operation::Delete { resource, key, preconditions }).await
    }

    async fn watch(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        from: Option<String>,
    ) -> Result<WatchStream, StoreError> {
        let from = from.map(|version| rules::parse_version(resource, &version)).transpose()?;
        Ok(feed::watch(self.feed.clone(), resource, namespace, from))
    }
}
