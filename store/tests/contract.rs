//! The contract of a store, run against the embedded one (`kubernetes.rs` runs it against an API server).

mod suite;

use std::sync::Arc;

use api::Setting;
use backing_image_store::embedded::Embedded;
use backing_image_store::{ObjectStore, Store, TypedEvent};
use futures::StreamExt;

/// A store and what must live as long as it.
struct Fixture {
    store: Arc<dyn ObjectStore>,
    _directory: Option<tempfile::TempDir>,
}

fn in_memory() -> Fixture {
    Fixture { store: Arc::new(Embedded::in_memory()), _directory: None }
}

fn in_file() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Embedded::open(&directory.path().join("store.redb")).unwrap());
    Fixture { store, _directory: Some(directory) }
}

macro_rules! embedded {
    ($($promise:ident)*) => {
        mod memory { $(#[tokio::test] async fn $promise() { let f = super::in_memory(); super::suite::$promise(f.store.clone()).await; })* }
        mod file { $(#[tokio::test] async fn $promise() { let f = super::in_file(); super::suite::$promise(f.store.clone()).await; })* }
    };
}

suite::promises!(embedded);

#[tokio::test]
async fn allows_names_as_longhorn_does() {
    suite::allows_names_as_longhorn_does(in_memory().store).await;
}

/// In Kubernetes our roles may read their own namespace only.
#[tokio::test]
async fn a_typed_watch_is_of_its_own_namespace_unless_it_asks_for_all() {
    let store = Store::new(in_memory().store, "longhorn-system");
    let setting = |namespace: &str, name: &str| {
        let mut setting: Setting = serde_json::from_value(serde_json::json!({"metadata": {"name": name}})).unwrap();
        setting.metadata.namespace = Some(namespace.to_owned());
        setting
    };
    store.create(&setting("elsewhere", "theirs")).await.unwrap();
    store.create(&setting("longhorn-system", "ours")).await.unwrap();
    let own = store.watch::<Setting>().await.unwrap();
    let all = store.watch_everywhere::<Setting>().await.unwrap();
    store.create(&setting("elsewhere", "theirs-2")).await.unwrap();
    store.create(&setting("longhorn-system", "ours-2")).await.unwrap();
    let name = |event: Result<TypedEvent<Setting>, _>| match event {
        Ok(TypedEvent::Applied(setting)) => setting.metadata.name.unwrap_or_default(),
        other => panic!("{other:?}"),
    };
    assert_eq!(own.take(2).map(name).collect::<Vec<_>>().await, ["ours", "ours-2"]);
    assert_eq!(all.take(4).map(name).collect::<Vec<_>>().await.len(), 4);
}
