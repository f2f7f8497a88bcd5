//! The contract of a store, run against the embedded one (`kubernetes.rs` runs it against an API server).

mod suite;

use std::sync::Arc;

use backing_image_store::ObjectStore;
use backing_image_store::embedded::Embedded;

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
