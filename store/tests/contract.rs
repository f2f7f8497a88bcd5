//! The contract of a store, run against every implementation.

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

macro_rules! contract {
    ($($promise:ident)*) => {
        mod memory { $(#[tokio::test] async fn $promise() { let f = super::in_memory(); super::suite::$promise(f.store.clone()).await; })* }
        mod file { $(#[tokio::test] async fn $promise() { let f = super::in_file(); super::suite::$promise(f.store.clone()).await; })* }
    };
}

contract! {
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
}
