//! Random histories: whatever is written, watchers and readers agree, and the rules of metadata hold.

#[path = "suite/mod.rs"]
mod suite;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use backing_image_store::embedded::Embedded;
use backing_image_store::{Object, Preconditions, Selector, WatchEvent, WatchStream};
use proptest::prelude::*;
use serde_json::{Value, json};
use suite::{Any, at, key, next, read, set, version, widget, widgets};

#[derive(Clone, Debug)]
enum Step {
    Create { name: u8, owner: Option<u8>, finalizer: bool },
    Wish { name: u8, size: u8 },
    Report { name: u8, size: u8 },
    Release { name: u8 },
    Delete { name: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0..6_u8;
    prop_oneof![
        3 => (name.clone(), proptest::option::of(name.clone()), any::<bool>())
            .prop_map(|(name, owner, finalizer)| Step::Create { name, owner, finalizer }),
        2 => (name.clone(), 0..3_u8).prop_map(|(name, size)| Step::Wish { name, size }),
        2 => (name.clone(), 0..3_u8).prop_map(|(name, size)| Step::Report { name, size }),
        2 => name.clone().prop_map(|name| Step::Release { name }),
        3 => name.prop_map(|name| Step::Delete { name }),
    ]
}

fn called(name: u8) -> String {
    format!("w-{name}")
}

async fn take(store: &Any, step: Step) {
    match step {
        Step::Create { name, owner, finalizer } => {
            let mut object = widget(&called(name), 0);
            if let Some(owner) = owner {
                let uid = read(store, &called(owner)).await.map_or("gone".to_owned(), |o| o.uid().to_owned());
                object.0["metadata"]["ownerReferences"] =
                    json!([{"apiVersion": "example.org/v1", "kind": "Widget", "name": called(owner), "uid": uid}]);
            }
            if finalizer {
                object.0["metadata"]["finalizers"] = json!(["f"]);
            }
            let _ = store.create(&widgets(), object).await;
        }
        Step::Wish { name, size } => change(store, name, "/spec/size", size.into(), false).await,
        Step::Report { name, size } => change(store, name, "/status", json!({"size": size}), true).await,
        Step::Release { name } => change(store, name, "/metadata/finalizers", json!([]), false).await,
        Step::Delete { name } => {
            store.delete(&widgets(), &key(&called(name)), &Preconditions::default()).await.unwrap();
        }
    }
}

/// A change of one field; raises the generation exactly when it should.
async fn change(store: &Any, name: u8, pointer: &str, value: Value, status: bool) {
    let Some(old) = read(store, &called(name)).await else { return };
    let wanted = set(&old, pointer, value);
    let same = wanted == old;
    let new = if status {
        store.replace_status(&widgets(), wanted).await.unwrap()
    } else {
        store.replace(&widgets(), wanted).await.unwrap()
    };
    let generation = |o: &Object| at(o, "/metadata/generation").as_i64().unwrap();
    let raised = i64::from(pointer.starts_with("/spec") && !same);
    assert_eq!(generation(&new), generation(&old) + raised);
    assert_eq!(version(&new) > version(&old), !same);
    assert_eq!(new.uid(), old.uid());
}

/// Events applied to what was there before, until the object `end` comes.
async fn follow(mut seen: BTreeMap<String, Object>, watch: &mut WatchStream) -> BTreeMap<String, Object> {
    let mut last = 0;
    loop {
        match next(watch).await {
            WatchEvent::Applied(o) if o.name() == "end" => return seen,
            WatchEvent::Applied(o) => {
                last = version(&o).max(last);
                seen.insert(o.name().to_owned(), o);
            }
            WatchEvent::Deleted(o) => {
                assert!(version(&o) > last, "a removal has a version of its own");
                last = version(&o);
                seen.remove(o.name()).expect("only what is there goes");
            }
            WatchEvent::Relist => panic!("nothing is lost in so short a history"),
        }
    }
}

async fn snapshot(store: &Any) -> (BTreeMap<String, Object>, String) {
    let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    (list.items.into_iter().map(|o| (o.name().to_owned(), o)).collect(), list.resource_version)
}

async fn check(steps: Vec<Step>, split: usize, path: Option<&std::path::Path>) {
    let mut store: Any = match path {
        Some(path) => Arc::new(Embedded::open(path).unwrap()),
        None => Arc::new(Embedded::in_memory()),
    };
    let mut early = store.watch(&widgets(), None, None).await.unwrap();
    let split = split.min(steps.len());
    let (before, after) = steps.split_at(split);
    for step in before {
        take(&store, step.clone()).await;
    }
    if let Some(path) = path {
        let before = snapshot(&store).await;
        drop(early);
        drop(store);
        store = Arc::new(Embedded::open(path).unwrap());
        assert_eq!(snapshot(&store).await, before, "a restart changes nothing");
        early = store.watch(&widgets(), None, None).await.unwrap();
    }
    let (known, from) = snapshot(&store).await;
    for step in after {
        take(&store, step.clone()).await;
    }
    let (list, _) = snapshot(&store).await;
    let uids: BTreeSet<_> = list.values().map(|o| o.uid().to_owned()).collect();
    for object in list.values() {
        let owner = at(object, "/metadata/ownerReferences/0/uid").as_str();
        let orphan = owner.is_some_and(|uid| !uids.contains(uid));
        assert!(
            !orphan || at(object, "/metadata/deletionTimestamp").is_string(),
            "nothing outlives its owner: {object:?}"
        );
    }
    let mut late = store.watch(&widgets(), None, Some(from)).await.unwrap();
    store.create(&widgets(), widget("end", 0)).await.unwrap();
    assert_eq!(follow(BTreeMap::new(), &mut early).await, list);
    assert_eq!(follow(known, &mut late).await, list);
}

fn run(steps: Vec<Step>, split: usize, path: Option<&std::path::Path>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(check(steps, split, path));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn watchers_end_with_what_readers_see(steps in proptest::collection::vec(step(), 1..60), split in 0..60_usize) {
        run(steps, split, None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn a_restart_changes_nothing(steps in proptest::collection::vec(step(), 1..40), split in 0..40_usize) {
        let directory = tempfile::tempdir().unwrap();
        run(steps, split, Some(&directory.path().join("store.redb")));
    }
}
