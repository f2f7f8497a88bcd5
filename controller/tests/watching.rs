//! Reconcilers say whether they see what changes, on the in-memory store.

mod world;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use backing_image_controller::{Context, Metrics, run};
use store::embedded::Embedded;
use store::{Store, StoreError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use world::agents::FakeWorkloads;
use world::before::{Before, Call, Hook};

/// Gives watches of replicas once it may.
struct Gate {
    open: watch::Receiver<bool>,
    /// Lists, by kind.
    lists: Arc<Mutex<BTreeMap<String, usize>>>,
}

#[async_trait]
impl Hook for Gate {
    async fn before(&self, call: Call<'_>, _: &Embedded) -> Result<(), StoreError> {
        match call {
            Call::List(r) => *self.lists.lock().unwrap().entry(r.kind.clone()).or_default() += 1,
            Call::Watch(r) if r.kind == "Replica" => drop(self.open.clone().wait_for(|open| *open).await),
            Call::Watch(_) | Call::Replace(..) => {}
        }
        Ok(())
    }
}

fn context(gate: Gate, watching: watch::Sender<bool>) -> Context {
    let gated = Before { inner: Embedded::in_memory(), hook: gate };
    Context {
        store: Store::new(Arc::new(gated), "longhorn-system"),
        workloads: Arc::new(FakeWorkloads::new()),
        metrics: Metrics::default(),
        security: Default::default(),
        kubernetes: false,
        watching,
        deposed: CancellationToken::new(),
    }
}

async fn until(sees: &mut watch::Receiver<bool>, wanted: bool) {
    let in_time = tokio::time::timeout(std::time::Duration::from_secs(10), sees.wait_for(|sees| *sees == wanted)).await;
    in_time.expect("it says so in time").unwrap();
}

#[tokio::test]
async fn reconcilers_that_wait_for_a_watch_say_that_they_do_not_see() {
    let (gate, open) = watch::channel(false);
    let (watching, mut sees) = watch::channel(true);
    let context = context(Gate { open, lists: Arc::default() }, watching);
    // They are cut off in the middle, as when the lease is lost: then there is nothing to see.
    let running = tokio::spawn(run(context.clone(), CancellationToken::new()));
    until(&mut sees, false).await;
    running.abort();
    until(&mut sees, true).await;

    let stop = CancellationToken::new();
    let running = tokio::spawn(run(context, stop.clone()));
    until(&mut sees, false).await;
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), sees.wait_for(|sees| *sees)).await.is_err();
    assert!(early, "replicas are not watched");
    gate.send_replace(true);
    until(&mut sees, true).await;
    stop.cancel();
    running.await.unwrap().unwrap();
}

/// A cluster may have thousands of objects. What they are afterwards is heard.
#[tokio::test]
async fn the_beginning_costs_one_list_of_each_kind() {
    let lists = Arc::new(Mutex::new(BTreeMap::new()));
    let (_gate, open) = watch::channel(true);
    let (watching, mut sees) = watch::channel(false);
    let context = context(Gate { open, lists: lists.clone() }, watching);
    let store = context.store.clone();
    let stop = CancellationToken::new();
    let running = tokio::spawn(run(context, stop.clone()));
    until(&mut sees, true).await;
    store.create(&api::BackingImage::new("ubuntu", Default::default())).await.unwrap();
    let is_looked_at = async || {
        let image = store.get::<api::BackingImage>("ubuntu").await.unwrap().unwrap();
        image.status.is_some_and(|status| !status.uuid.is_empty() && !status.conditions.is_empty())
    };
    world::eventually("a pass over the image", is_looked_at).await;
    let of_kinds =
        ["BackingImage", "BackingImageDataSource", "BackingImageManager", "Engine", "Node", "Replica", "Volume"];
    // Those that are missing are made first.
    let expected: BTreeMap<String, usize> = of_kinds
        .into_iter()
        .map(|kind| (kind, 1))
        .chain([("Setting", 2)])
        .map(|(kind, n)| (kind.to_owned(), n))
        .collect();
    assert_eq!(*lists.lock().unwrap(), expected);
    stop.cancel();
    running.await.unwrap().unwrap();
}
