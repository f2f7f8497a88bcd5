//! A store in which something happens right before a call.

use async_trait::async_trait;
use store::embedded::Embedded;
use store::{
    Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, StoreError, WatchStream,
};

/// A call that something may come before.
pub enum Call<'a> {
    List(&'a ResourceType),
    Replace(&'a ResourceType, &'a Object),
    Watch(&'a ResourceType),
}

/// What happens then, and may fail the call.
#[async_trait]
pub trait Hook: Send + Sync + 'static {
    async fn before(&self, call: Call<'_>, inner: &Embedded) -> Result<(), StoreError>;
}

/// The store.
pub struct Before<H> {
    pub inner: Embedded,
    pub hook: H,
}

#[async_trait]
impl<H: Hook> ObjectStore for Before<H> {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.inner.create(resource, object).await
    }
    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        self.inner.get(resource, key).await
    }
    async fn list(&self, r: &ResourceType, namespace: Option<&str>, s: &Selector) -> Result<ObjectList, StoreError> {
        self.hook.before(Call::List(r), &self.inner).await?;
        self.inner.list(r, namespace, s).await
    }
    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.hook.before(Call::Replace(resource, &object), &self.inner).await?;
        self.inner.replace(resource, object).await
    }
    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.inner.replace_status(resource, object).await
    }
    async fn delete(&self, r: &ResourceType, k: &ObjectKey, p: &Preconditions) -> Result<Option<Object>, StoreError> {
        self.inner.delete(r, k, p).await
    }
    async fn watch(&self, r: &ResourceType, ns: Option<&str>, from: Option<String>) -> Result<WatchStream, StoreError> {
        self.hook.before(Call::Watch(r), &self.inner).await?;
        self.inner.watch(r, ns, from).await
    }
}
