//! What the cache takes in, and what it waits for.

use std::time::Duration;

use api::replica::ReplicaSpec;
use serde_json::json;
use store::Preconditions;
use store::embedded::Embedded;

use super::*;

/// A cache over an empty store: the store as passes use it, and as others do.
fn cache() -> (Arc<Cache>, Store, Store) {
    let others = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let (cache, own) = Cache::new(&others);
    (cache, own, others)
}

fn image(version: u64, disks: &[&str]) -> WatchEvent {
    let map: BTreeMap<&str, serde_json::Value> = disks.iter().map(|disk| (*disk, json!({}))).collect();
    let image = json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage", "spec": {"diskFileSpecMap": map},
        "metadata": {"name": "ubuntu", "resourceVersion": version.to_string()}, "status": {"size": 5},
    });
    WatchEvent::Applied(Object(image.as_object().unwrap().clone()))
}

fn gone(event: WatchEvent) -> WatchEvent {
    match event {
        WatchEvent::Applied(object) => WatchEvent::Deleted(object),
        other => other,
    }
}

async fn is_behind(cache: &Cache) -> bool {
    tokio::time::timeout(Duration::from_millis(50), cache.settled()).await.is_err()
}

#[test]
fn what_is_heard_is_found_by_all_its_sides_until_it_is_gone() {
    let (cache, ..) = cache();
    let found = |disk: &str| cache.of::<BackingImage>(&Facet::Disk(disk.into())).len();
    let load = |disk: &str| cache.loads().get(disk).map_or(0, |load| load.copy_bytes);
    assert!(cache.hear::<BackingImage>(image(3, &["a", "b"])).is_some_and(|step| step.before.is_none()));
    assert_eq!((found("a"), found("b"), load("a"), load("b")), (1, 1, 5, 5));
    let step = cache.hear::<BackingImage>(image(4, &["b", "c"])).unwrap();
    assert!(step.before.is_some() && step.after.is_some());
    assert_eq!((found("a"), found("b"), found("c"), load("a"), load("c")), (0, 1, 1, 0, 5));
    assert!(cache.hear::<BackingImage>(gone(image(5, &["b", "c"]))).is_some_and(|step| step.after.is_none()));
    assert_eq!((found("b"), cache.loads().len(), cache.disks_of_images().len()), (0, 0, 0));
}

#[test]
fn what_was_known_already_changes_nothing() {
    let (cache, ..) = cache();
    cache.hear::<BackingImage>(image(4, &["a"]));
    assert!(cache.hear::<BackingImage>(image(3, &["b"])).is_none(), "it is older");
    assert!(cache.hear::<BackingImage>(gone(image(4, &["a"]))).is_none(), "it is as old");
    assert_eq!(cache.disks_of_images(), ["a"]);
}

#[test]
fn an_object_that_cannot_be_read_stays_as_it_was_known() {
    let (cache, ..) = cache();
    cache.hear::<BackingImage>(image(3, &["a"]));
    let WatchEvent::Applied(mut broken) = image(4, &["b"]) else { unreachable!() };
    broken.0.insert("spec".into(), json!("no object"));
    assert!(cache.hear::<BackingImage>(WatchEvent::Applied(broken)).is_none());
    assert_eq!(cache.disks_of_images(), ["a"]);
    assert!(cache.hear::<BackingImage>(image(5, &["c"])).is_some(), "the next one is taken");
}

#[tokio::test]
async fn no_pass_decides_on_something_older_than_what_was_written_or_read() {
    let (cache, own, others) = cache();
    assert!(cache.settled().await.is_ok(), "nothing was written");
    let replica = Replica::new("r", ReplicaSpec { backing_image: "ubuntu".into(), ..Default::default() });
    own.create(&replica).await.unwrap();
    assert!(is_behind(&cache).await, "a write");
    cache.list::<Replica>(&own).await.unwrap();
    assert!(!is_behind(&cache).await);
    others.modify::<Replica>("r", |r| r.spec.active = true).await.unwrap();
    assert!(!is_behind(&cache).await, "nobody knows of it");
    own.get::<Replica>("r").await.unwrap();
    assert!(is_behind(&cache).await, "a reading");
    cache.list::<Replica>(&own).await.unwrap();
    own.delete::<Replica>("r", &Preconditions::default()).await.unwrap();
    assert!(is_behind(&cache).await, "a deletion");
    cache.list::<Replica>(&own).await.unwrap();
    assert!(!is_behind(&cache).await && cache.all::<Replica>().is_empty());
}

#[tokio::test]
async fn passes_wait_while_events_may_be_missing() {
    let (cache, own, others) = cache();
    cache.list::<Replica>(&own).await.unwrap();
    for name in ["kept", "lost"] {
        others.create(&Replica::new(name, Default::default())).await.unwrap();
    }
    cache.list::<Replica>(&own).await.unwrap();
    cache.hear::<Replica>(WatchEvent::Relist);
    assert!(is_behind(&cache).await);
    others.delete::<Replica>("lost", &Preconditions::default()).await.unwrap();
    others.create(&Replica::new("new", Default::default())).await.unwrap();
    let (steps, _) = cache.list::<Replica>(&own).await.unwrap();
    let names = |side: fn(&Step<Replica>) -> Option<&Replica>| -> Vec<String> {
        steps.iter().filter_map(side).filter_map(|replica| replica.metadata.name.clone()).collect()
    };
    assert_eq!(names(|step| step.before.as_deref()), ["lost"], "nobody heard that it went");
    assert_eq!(names(|step| step.after.as_deref()), ["new"], "nor that this one came; the other did not change");
    assert!(!is_behind(&cache).await);
}

#[tokio::test]
async fn a_store_that_was_put_back_is_waited_for_no_longer_than_it_goes() {
    let (cache, own, _) = cache();
    own.create(&Replica::new("r", Default::default())).await.unwrap();
    let kind = ResourceType::of::<Replica>();
    let list = |version: &str| ObjectList { items: vec![], resource_version: version.into() };
    cache.replace::<Replica>(&kind, list("900"));
    own.modify::<Replica>("r", |r| r.spec.active = true).await.unwrap();
    assert!(!is_behind(&cache).await);
    cache.replace::<Replica>(&kind, list("1"));
    assert!(!is_behind(&cache).await, "later versions are of a state that is no more");
}
