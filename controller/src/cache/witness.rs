//! A store that remembers the versions that went through it: what this controller has written or read must be known before it decides.
//!
//! Lists are not remembered: whoever reads one decides on it at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use store::{
    Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, StoreError, WatchStream,
};

/// The highest version of each kind. Cheap to clone.
#[derive(Clone)]
pub struct Noted(Arc<BTreeMap<ResourceType, AtomicU64>>);

impl Noted {
    /// None yet of these kinds; others are nobody's concern.
    pub fn of(kinds: impl IntoIterator<Item = ResourceType>) -> Noted {
        Noted(Arc::new(kinds.into_iter().map(|kind| (kind, AtomicU64::new(0))).collect()))
    }

    fn note(&self, kind: &ResourceType, object: &Object) {
        // Every version there is, is a number; one that is not cannot be waited for.
        let version = object.resource_version().parse().unwrap_or_default();
        if let Some(noted) = self.0.get(kind) {
            noted.fetch_max(version, Ordering::AcqRel);
        }
    }

    /// Versions after this one were of a state that is no more.
    pub fn go_back(&self, kind: &ResourceType, version: u64) {
        if let Some(noted) = self.0.get(kind) {
            noted.fetch_min(version, Ordering::AcqRel);
        }
    }

    /// What is to be known now.
    pub fn all(&self) -> Vec<(&ResourceType, u64)> {
        self.0.iter().map(|(kind, version)| (kind, version.load(Ordering::Acquire))).collect()
    }
}

pub struct Witness {
    inner: Arc<dyn ObjectStore>,
    noted: Noted,
}

impl Witness {
    pub fn new(inner: Arc<dyn ObjectStore>, noted: Noted) -> Witness {
        Witness { inner, noted }
    }

    fn seen(&self, kind: &ResourceType, answer: Result<Object, StoreError>) -> Result<Object, StoreError> {
        answer.inspect(|object| self.noted.note(kind, object))
    }

    fn maybe(
        &self,
        kind: &ResourceType,
        answer: Result<Option<Object>, StoreError>,
    ) -> Result<Option<Object>, StoreError> {
        answer.inspect(|found| found.iter().for_each(|object| self.noted.note(kind, object)))
    }
}

#[async_trait]
impl ObjectStore for Witness {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.seen(resource, self.inner.create(resource, object).await)
    }

    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        self.maybe(resource, self.inner.get(resource, key).await)
    }

    async fn list(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        selector: &Selector,
    ) -> Result<ObjectList, StoreError> {
        self.inner.list(resource, namespace, selector).await
    }

    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.seen(resource, self.inner.replace(resource, object).await)
    }

    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.seen(resource, self.inner.replace_status(resource, object).await)
    }

    async fn delete(
        &self,
        resource: &ResourceType,
        key: &ObjectKey,
        preconditions: &Preconditions,
    ) -> Result<Option<Object>, StoreError> {
        self.maybe(resource, self.inner.delete(resource, key, preconditions).await)
    }

    async fn watch(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        from: Option<String>,
    ) -> Result<WatchStream, StoreError> {
        self.inner.watch(resource, namespace, from).await
    }
}
