//! What every store promises. Each function takes an empty store of its own.

#![allow(dead_code, unused_imports, unused_macros, reason = "each test binary uses its part")]

mod news;
mod objects;
mod watches;
mod writers;

pub use news::*;
pub use objects::*;
pub use watches::*;
pub use writers::*;

use std::sync::Arc;
use std::time::Duration;

use backing_image_store::{Object, ObjectKey, ObjectStore, Preconditions, ResourceType, WatchEvent, WatchStream};
use futures::StreamExt;
use serde_json::{Value, json};

/// All promises, for a macro that makes a test of each.
macro_rules! promises {
    ($with:ident) => {
        $with! {
            fills_in_system_fields_of_a_new_object
            refuses_a_name_that_is_taken
            refuses_what_kubernetes_would_refuse
            makes_a_name_out_of_a_prefix
            replaces_the_wish_and_keeps_the_status
            replaces_the_status_and_keeps_the_wish
            raises_the_generation_with_the_wish_only
            writes_nothing_when_nothing_changes
            refuses_a_write_that_rests_on_an_old_version
            never_changes_system_fields
            keeps_an_object_while_it_has_finalizers
            deletes_only_what_the_decision_was_made_on
            collects_what_nobody_owns_any_more
            keeps_what_has_another_owner
            collects_an_object_whose_owner_was_gone_before
            lists_by_namespace_and_label_in_order
            keeps_kinds_and_scopes_apart
            shows_what_exists_and_then_each_change
            replays_changes_from_the_version_of_a_list
            says_relist_when_the_version_is_unknown
            says_relist_to_a_slow_watcher
            ends_with_the_same_objects_for_watchers_and_readers
            lets_one_of_many_writers_win
            modifies_under_contention_without_losing_a_change
            writes_one_content_as_one_text
            counts_news_of_one_reason_and_part_in_one_event
        }
    };
}
pub(crate) use promises;

pub type Any = Arc<dyn ObjectStore>;

/// A namespaced kind that nobody knows.
pub fn widgets() -> ResourceType {
    kind("example.org", "Widget", true)
}

/// A cluster-scoped one.
pub fn gadgets() -> ResourceType {
    kind("example.org", "Gadget", false)
}

pub fn kind(group: &str, kind: &str, namespaced: bool) -> ResourceType {
    let plural = format!("{}s", kind.to_lowercase());
    ResourceType { group: group.into(), version: "v1".into(), kind: kind.into(), plural, namespaced }
}

pub fn object(value: Value) -> Object {
    let Value::Object(map) = value else { panic!("not an object: {value}") };
    Object(map)
}

pub fn widget(name: &str, size: i64) -> Object {
    object(json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"size": size}}))
}

pub fn key(name: &str) -> ObjectKey {
    ObjectKey { namespace: Some("shop".into()), name: name.into() }
}

pub async fn read(store: &Any, name: &str) -> Option<Object> {
    store.get(&widgets(), &key(name)).await.unwrap()
}

pub async fn delete(store: &Any, name: &str) -> Option<Object> {
    store.delete(&widgets(), &key(name), &Preconditions::default()).await.unwrap()
}

pub fn version(object: &Object) -> u64 {
    object.resource_version().parse().unwrap()
}

/// A copy with one field set: `set(&o, "/spec/size", 3)`.
pub fn set(object: &Object, pointer: &str, value: impl Into<Value>) -> Object {
    let mut whole = Value::Object(object.0.clone());
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    whole.pointer_mut(parent).unwrap()[field] = value.into();
    self::object(whole)
}

pub fn at<'a>(object: &'a Object, pointer: &str) -> &'a Value {
    let mut parts = pointer[1..].splitn(2, '/');
    let first = object.0.get(parts.next().unwrap()).unwrap_or(&Value::Null);
    parts.next().map_or(first, |rest| first.pointer(&format!("/{rest}")).unwrap_or(&Value::Null))
}

/// The next event, or a failure when it does not come.
pub async fn next(stream: &mut WatchStream) -> WatchEvent {
    let event = tokio::time::timeout(Duration::from_secs(20), stream.next()).await.expect("an event comes");
    event.expect("the watch goes on").unwrap()
}

/// An event in short: `+name size`, `-name`, `relist`.
pub fn brief(event: &WatchEvent) -> String {
    match event {
        WatchEvent::Applied(o) => format!("+{} {}", o.name(), at(o, "/spec/size")),
        WatchEvent::Deleted(o) => format!("-{}", o.name()),
        WatchEvent::Relist => "relist".into(),
    }
}

pub async fn brief_events(stream: &mut WatchStream, count: usize) -> Vec<String> {
    let mut events = vec![];
    for _ in 0..count {
        events.push(brief(&next(stream).await));
    }
    events
}

/// Waits until the store says so.
pub async fn wait_until_gone(store: &Any, resource: &ResourceType, key: &ObjectKey) {
    let mut watch = store.watch(resource, None, None).await.unwrap();
    while store.get(resource, key).await.unwrap().is_some() {
        next(&mut watch).await;
    }
}
