//! Where objects live: one trait, two implementations (the Kubernetes API, or an embedded redb file).
//!
//! [`ObjectStore`] speaks in dynamic objects (JSON), so that it stays object safe and fits `kube`; [`Store`] is the typed face that
//! everybody uses. Semantics are those of the Kubernetes API: optimistic concurrency by `resourceVersion`, status as a
//! subresource, finalizers, owner references with background garbage collection, watches that never lose an event or say "relist".

pub mod embedded;
mod error;
pub mod events;
pub mod kubernetes;
mod object;
mod rules;
mod typed;

pub use error::StoreError;
pub use object::{Object, ObjectKey, ObjectList, ResourceType, Scoped, Selector, WatchEvent};
pub use typed::{Store, TypedEvent};

use async_trait::async_trait;
use futures::stream::BoxStream;

/// A stream of changes; it ends only with the store.
pub type WatchStream = BoxStream<'static, Result<WatchEvent, StoreError>>;

/// What a deletion was decided on; refused with `NotReady` when it has changed.
#[derive(Clone, Debug, Default)]
pub struct Preconditions {
    pub uid: Option<String>,
    pub resource_version: Option<String>,
}

impl Preconditions {
    /// Whether anything goes.
    pub fn is_empty(&self) -> bool {
        self.uid.is_none() && self.resource_version.is_none()
    }
}

/// A place for objects, with the semantics of the Kubernetes API.
#[async_trait]
pub trait ObjectStore: Send + Sync + 'static {
    /// Stores a new object: fills `uid`, `resourceVersion`, `creationTimestamp`, `generation`; drops `status`.
    /// Kind `Incompatible` when the name is taken.
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError>;

    /// The object, or `None`.
    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError>;

    /// All objects of a namespace (or of all, when `None`) that the selector matches, with the version to watch from.
    async fn list(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        selector: &Selector,
    ) -> Result<ObjectList, StoreError>;

    /// Replaces metadata and spec (everything but `status`). With a `resourceVersion` in the object, fails with a conflict
    /// ([`StoreError::is_conflict`]) unless it is the current one. Removing the last finalizer of an object that is being deleted removes it.
    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError>;

    /// Replaces `status` only, under the same rule.
    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError>;

    /// Marks an object with finalizers as being deleted (`deletionTimestamp`), removes one without.
    /// Returns the object as it was last; `None` when there was none.
    async fn delete(
        &self,
        resource: &ResourceType,
        key: &ObjectKey,
        preconditions: &Preconditions,
    ) -> Result<Option<Object>, StoreError>;

    /// Changes after `from` (the version of a list). Without `from`: first every existing object as `Applied`, then changes.
    /// When the changes since `from` are no longer known, the stream says [`WatchEvent::Relist`] and goes on from now.
    async fn watch(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        from: Option<String>,
    ) -> Result<WatchStream, StoreError>;
}
