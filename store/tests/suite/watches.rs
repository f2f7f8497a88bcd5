//! Watches: nothing is lost in silence.

use backing_image_store::Selector;
use serde_json::json;

use super::*;

pub async fn shows_what_exists_and_then_each_change(store: Any) {
    let a = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    let mut elsewhere = store.watch(&widgets(), Some("attic"), None).await.unwrap();
    store.create(&widgets(), widget("b", 2)).await.unwrap();
    store.create(&kind("example.com", "Widget", true), widget("not-seen", 9)).await.unwrap();
    store.replace(&widgets(), set(&a, "/spec/size", 3)).await.unwrap();
    delete(&store, "b").await;
    assert_eq!(brief_events(&mut watch, 4).await, ["+a 1", "+b 2", "+a 3", "-b"]);
    store.create(&widgets(), set(&widget("c", 5), "/metadata/namespace", "attic")).await.unwrap();
    assert_eq!(brief_events(&mut elsewhere, 1).await, ["+c 5"]);
}

pub async fn replays_changes_from_the_version_of_a_list(store: Any) {
    store.create(&widgets(), widget("a", 1)).await.unwrap();
    let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    let b = store.create(&widgets(), widget("b", 2)).await.unwrap();
    delete(&store, "a").await;
    let mut watch = store.watch(&widgets(), None, Some(list.resource_version)).await.unwrap();
    assert_eq!(brief_events(&mut watch, 2).await, ["+b 2", "-a"]);
    let mut later = store.watch(&widgets(), None, Some(b.resource_version().into())).await.unwrap();
    store.create(&widgets(), widget("c", 3)).await.unwrap();
    assert_eq!(brief_events(&mut later, 2).await, ["-a", "+c 3"]);
}

pub async fn says_relist_when_the_version_is_unknown(store: Any) {
    let a = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let future = (version(&a) + 1000).to_string();
    let mut watch = store.watch(&widgets(), None, Some(future)).await.unwrap();
    assert_eq!(brief_events(&mut watch, 1).await, ["relist"]);
    store.create(&widgets(), widget("b", 2)).await.unwrap();
    assert_eq!(brief_events(&mut watch, 1).await, ["+b 2"], "it goes on from then");
    let error = store.watch(&widgets(), None, Some("yesterday".into())).await.err().expect("no version at all");
    assert_eq!(error.kind(), api::ErrorKind::Invalid);
}

/// More changes than any store remembers for a watcher that does not listen.
pub async fn says_relist_to_a_slow_watcher(store: Any) {
    let mut last = store.create(&widgets(), widget("a", 0)).await.unwrap();
    let mut watch = store.watch(&widgets(), None, Some(last.resource_version().into())).await.unwrap();
    let mut objects: Vec<_> = (0..250).map(|n| widget(&format!("w-{n}"), 0)).collect();
    for round in 0..40 {
        let writes = objects.into_iter().map(|object| {
            let store = &store;
            async move {
                let object = set(&object, "/spec/size", round);
                match round {
                    0 => store.create(&widgets(), object).await.unwrap(),
                    _ => store.replace(&widgets(), object).await.unwrap(),
                }
            }
        });
        objects = futures::future::join_all(writes).await;
    }
    last = store.replace(&widgets(), set(&last, "/spec/size", 7)).await.unwrap();
    // Either all of them come, or it says so: never a gap. Each object was written once in each round.
    let mut rounds = std::collections::BTreeMap::new();
    let mut seen = 0;
    loop {
        match next(&mut watch).await {
            WatchEvent::Relist => break,
            WatchEvent::Applied(o) if version(&o) == version(&last) => {
                assert_eq!(rounds.values().sum::<i64>(), 250 * 40);
                return;
            }
            WatchEvent::Applied(o) | WatchEvent::Deleted(o) => {
                assert!(version(&o) > seen, "versions grow");
                seen = version(&o);
                let round: &mut i64 = rounds.entry(o.name().to_owned()).or_default();
                assert_eq!(at(&o, "/spec/size"), &json!(*round), "no gap");
                *round += 1;
            }
        }
    }
    let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    assert_eq!(list.items.len(), 251);
    store.create(&widgets(), widget("z", 1)).await.unwrap();
    while brief(&next(&mut watch).await) != "+z 1" {}
}

pub async fn ends_with_the_same_objects_for_watchers_and_readers(store: Any) {
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    let follower = tokio::spawn(async move {
        let mut seen = std::collections::BTreeMap::new();
        loop {
            match next(&mut watch).await {
                WatchEvent::Applied(o) if o.name() == "end" => return seen,
                WatchEvent::Applied(o) => drop(seen.insert(o.name().to_owned(), o)),
                WatchEvent::Deleted(o) => drop(seen.remove(o.name()).expect("it was there")),
                WatchEvent::Relist => panic!("a watcher that keeps up is never told to list"),
            }
        }
    });
    let writers = (0..8).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for step in 0..60_i64 {
                let name = format!("w-{}", (step * 7 + writer) % 13);
                let _ = match step % 4 {
                    0 => store.create(&widgets(), widget(&name, step)).await.map(Some),
                    1 => store.replace(&widgets(), widget(&name, step * writer)).await.map(Some),
                    2 => store
                        .replace_status(&widgets(), set(&widget(&name, 0), "/status", json!({"by": writer})))
                        .await
                        .map(Some),
                    _ if writer % 2 == 0 => store.delete(&widgets(), &key(&name), &Preconditions::default()).await,
                    _ => store.get(&widgets(), &key(&name)).await,
                };
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    store.create(&widgets(), widget("end", 0)).await.unwrap();
    let seen = follower.await.unwrap();
    assert_eq!(seen.into_values().collect::<Vec<_>>(), list.items);
}
