//! The contract of a store, run against a real API server, and what only an API server can do: refuse, restart, forget.
//!
//! `make cluster-test` runs it; it needs the programs that `sanity-tests/cluster/build.sh` builds.

mod apiserver;
mod suite;

use std::sync::Arc;

use apiserver::{Server, real};
use backing_image_store::{ObjectStore, Preconditions, Selector, StoreError, WatchEvent};
use serde_json::json;
use suite::{Any, brief, brief_events, kind, next, read, set, widget, widgets};
use tokio::sync::MutexGuard;

async fn begin() -> Option<MutexGuard<'static, Option<Server>>> {
    apiserver::take().await
}

async fn open(server: &Option<Server>) -> Any {
    Arc::new(server.as_ref().unwrap().store("admin").await)
}

suite::promises!(real);

/// A watch on an older state than the API server remembers, and one that was open while it was away.
#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn goes_on_after_the_api_server_was_away() {
    let Some(mut server) = apiserver::take().await else { return };
    let server = server.as_mut().unwrap();
    let store: Any = Arc::new(server.store("admin").await);
    let old = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    assert_eq!(brief_events(&mut watch, 1).await, ["+a 1"]);
    // It waits while nobody is there.
    let waiting = tokio::spawn(async move { (next(&mut watch).await, watch) });

    server.ask("stop");
    let error = store.get(&widgets(), &suite::key("a")).await.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::Unavailable, "{error}");
    server.ask("start");

    store.create(&widgets(), widget("b", 2)).await.unwrap();
    let (mut event, mut watch) = waiting.await.unwrap();
    if matches!(event, WatchEvent::Relist) {
        let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
        assert!(list.items.iter().any(|o| o.name() == "b"), "whoever lists then sees it");
        store.create(&widgets(), widget("c", 3)).await.unwrap();
        event = next(&mut watch).await;
    }
    assert!(["+b 2", "+c 3"].contains(&brief(&event).as_str()), "{}", brief(&event));

    // Its memory begins with its start.
    let mut late = store.watch(&widgets(), None, Some(old.resource_version().into())).await.unwrap();
    assert_eq!(brief_events(&mut late, 1).await, ["relist"]);
    store.create(&widgets(), widget("d", 4)).await.unwrap();
    while brief(&next(&mut late).await) != "+d 4" {}
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn says_what_is_forbidden() {
    let Some(server) = apiserver::take().await else { return };
    let stranger = server.as_ref().unwrap().store("stranger").await;
    let widgets = &widgets();
    for (call, error) in [
        ("get", stranger.get(widgets, &suite::key("a")).await.unwrap_err()),
        ("list", stranger.list(widgets, None, &Selector::default()).await.unwrap_err()),
        ("create", stranger.create(widgets, widget("a", 1)).await.unwrap_err()),
        ("delete", stranger.delete(widgets, &suite::key("a"), &Preconditions::default()).await.unwrap_err()),
        ("watch", stranger.watch(widgets, None, None).await.err().unwrap()),
    ] {
        assert!(matches!(error, StoreError::Forbidden { .. }), "{call}: {error}");
        assert_eq!(error.kind(), api::ErrorKind::NotReady, "{call}");
        assert!(error.to_string().contains(r#"User "stranger" cannot"#), "{call}: {error}");
    }
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn an_unknown_kind_is_not_an_absent_object() {
    let Some(server) = apiserver::take().await else { return };
    let store = server.as_ref().unwrap().store("admin").await;
    let newer = backing_image_store::ResourceType { version: "v9".into(), ..widgets() };
    for unknown in [kind("example.net", "Widget", true), kind("example.org", "Wodget", true), newer] {
        for error in [
            store.get(&unknown, &suite::key("a")).await.unwrap_err(),
            store.list(&unknown, None, &Selector::default()).await.unwrap_err(),
            store.create(&unknown, widget("a", 1)).await.unwrap_err(),
            store.replace(&unknown, widget("a", 1)).await.unwrap_err(),
            store.delete(&unknown, &suite::key("a"), &Preconditions::default()).await.unwrap_err(),
            store.watch(&unknown, None, None).await.err().unwrap(),
        ] {
            assert!(matches!(error, StoreError::UnknownKind { .. }), "{error}");
        }
    }
    let nowhere = set(&widget("a", 1), "/metadata/namespace", "nowhere");
    let error = store.create(&widgets(), nowhere).await.unwrap_err();
    assert_eq!(error.to_string(), "Namespace `nowhere` does not exist");
    // A kind without a status of its own.
    let map = suite::object(json!({"metadata": {"name": "a", "namespace": "shop"}}));
    let maps = kind("", "ConfigMap", true);
    let map = store.create(&maps, map).await.unwrap();
    let error = store.replace_status(&maps, map).await.unwrap_err();
    assert!(matches!(error, StoreError::UnknownKind { .. }), "{error}");
}

/// More objects than a page has.
#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn lists_and_watches_in_pages() {
    let Some(server) = apiserver::take().await else { return };
    let store: Any = Arc::new(server.as_ref().unwrap().store("admin").await);
    let made = (0..1100).map(|n| {
        let store = store.clone();
        async move { store.create(&widgets(), widget(&format!("w-{n:04}"), n)).await.unwrap() }
    });
    let made: Vec<_> = futures::StreamExt::collect(futures::StreamExt::buffered(futures::stream::iter(made), 16)).await;
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    // After its first page, so that the later ones must be of the same moment.
    store.delete(&widgets(), &suite::key("w-1099"), &Preconditions::default()).await.unwrap();
    for n in 0..1100 {
        assert_eq!(brief(&next(&mut watch).await), format!("+w-{n:04} {n}"));
    }
    assert_eq!(brief(&next(&mut watch).await), "-w-1099");
    let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    assert_eq!(list.items, made[..1099]);
    assert_eq!(read(&store, "w-0000").await, Some(made[0].clone()));
    assert!(!made[0].0["metadata"].as_object().unwrap().contains_key("managedFields"));
}
