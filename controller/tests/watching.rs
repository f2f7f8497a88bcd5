//! Reconcilers say whether they see what changes, on the in-memory store.

mod world;

use std::sync::Arc;

use async_trait::async_trait;
use backing_image_controller::{Context, Metrics, run};
use store::embedded::Embedded;
use store::{
    Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, Store, StoreError, WatchStream,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use world::agents::FakeWorkloads;

/// A store that gives watches of replicas once it may.
struct Gate {
    inner: Embedded,
    open: watch::Receiver<bool>,
}

#[async_trait]
impl ObjectStore for Gate {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.inner.create(resource, object).await
    }
    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        self.inner.get(resource, key).await
    }
    async fn list(&self, r: &ResourceType, namespace: Option<&str>, s: &Selector) -> Result<ObjectList, StoreError> {
        self.inner.list(r, namespace, s).await
    }
    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.inner.replace(resource, object).await
    }
    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.inner.replace_status(resource, object).await
    }
    async fn delete(&self, r: &ResourceType, k: &ObjectKey, p: &Preconditions) -> Result<Option<Object>, StoreError> {
        self.inner.delete(r, k, p).await
    }
    async fn watch(&self, r: &ResourceType, ns: Option<&str>, from: Option<String>) -> Result<WatchStream, StoreError> {
        if r.kind == "Replica" {
            let _ = self.open.clone().wait_for(|open| *open).await;
        }
        self.inner.watch(r, ns, from).await
    }
}

#[tokio::test]
async fn reconcilers_that_wait_for_a_watch_say_that_they_do_not_see() {
    let (gate, open) = watch::channel(false);
    let store = Store::new(Arc::new(Gate { inner: Embedded::in_memory(), open }), "longhorn-system");
    let (watching, mut sees) = watch::channel(true);
    let context = Context {
        store,
        workloads: Arc::new(FakeWorkloads::new()),
        metrics: Metrics::default(),
        security: Default::default(),
        kubernetes: false,
        watching,
        deposed: CancellationToken::new(),
    };
    // They are cut off in the middle, as when the lease is lost: then there is nothing to see.
    let running = tokio::spawn(run(context.clone(), CancellationToken::new()));
    sees.wait_for(|sees| !sees).await.unwrap();
    running.abort();
    sees.wait_for(|sees| *sees).await.unwrap();

    let stop = CancellationToken::new();
    let running = tokio::spawn(run(context, stop.clone()));
    sees.wait_for(|sees| !sees).await.unwrap();
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), sees.wait_for(|sees| *sees)).await.is_err();
    assert!(early, "replicas are not watched");
    gate.send_replace(true);
    sees.wait_for(|sees| *sees).await.unwrap();
    stop.cancel();
    running.await.unwrap().unwrap();
}
