//! Reconcilers against an in-memory store, fake agents on real sockets, and a fake instance role.

mod nodes;
mod world;

use api::engine::{InstanceState, ReplicaMode};
use api::image::CopyState;
use api::names::condition::READY;
use api::names::manager_name;
use api::volume::{Robustness, VolumeState};
use api::{
    BackingImage, BackingImageDataSource, BackingImageManager, Engine, ErrorKind, Replica, Setting, Volume, condition,
};
use store::{Preconditions, Selector};
use world::{World, eventually, world};

async fn attached(world: &World, volume: &str, node: &str) {
    eventually(&format!("{volume} attached to {node}"), async || {
        let status = world.volume(volume).await;
        status.state == VolumeState::Attached && status.current_node_id == node
    })
    .await;
}

/// What the engine does before it goes on without a replica.
async fn fence_without(world: &World, dropped: &str) {
    let replicas: Vec<Replica> = world.store.list(&Selector::default()).await.unwrap();
    let names: Vec<String> = replicas.into_iter().filter_map(|r| r.metadata.name).filter(|n| n != dropped).collect();
    for name in &names {
        let fence = |r: &mut Replica| {
            let status = r.status.get_or_insert_default();
            status.generation += 1;
            status.generation_members.clone_from(&names);
        };
        world.store.modify_status::<Replica>(name, fence).await.unwrap();
    }
}

async fn detached(world: &World, volume: &str) {
    eventually("detached", async || world.volume(volume).await.state == VolumeState::Detached).await;
}

#[tokio::test]
async fn an_image_gets_three_copies_soon() {
    let world = world().await;
    let begin = std::time::Instant::now();
    world.create_image("ubuntu").await;
    eventually("first copy", async || world.ready_copies("ubuntu").await >= 1).await;
    let first = begin.elapsed();
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    assert!(first.as_secs_f64() < 2.0, "first copy after {first:?}; nothing but events drives this");
    eventually("data source ended", async || !world.workloads.names().contains(&"backing-image-ds-ubuntu".to_owned()))
        .await;
    let status = world.image("ubuntu").await;
    assert_eq!((status.size, status.checksum.as_str(), status.format.as_str()), (1 << 20, "c0ffee", "raw"));
    assert_eq!(condition::find(&status.conditions, READY).unwrap().message, "3 of 3 copies ready");
    let counts = world.workloads.script.lock().unwrap().counts.clone();
    assert_eq!((counts["source"], counts["fetch"], counts["sync"]), (1, 1, 2), "{counts:?}");
}

#[tokio::test]
async fn agents_of_another_version_make_room_and_their_copies_stay() {
    let world = world().await;
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    eventually("only agents", async || world.workloads.names().iter().all(|name| name.starts_with("bim-"))).await;
    world.workloads.outdate();
    eventually("agents of this version", async || world.workloads.all().iter().all(|w| !w.is_outdated)).await;
    eventually("three copies again", async || world.ready_copies("ubuntu").await == 3).await;
    for workload in world.workloads.all() {
        let manager: BackingImageManager = world.store.get(&workload.spec.name).await.unwrap().unwrap();
        assert!(workload.spec.owner.is_some() && workload.spec.owner == api::Owner::of(&manager));
    }
    let counts = world.workloads.script.lock().unwrap().counts.clone();
    assert_eq!((counts["source"], counts["sync"]), (1, 2), "{counts:?}");
}

#[tokio::test]
async fn a_failed_download_is_tried_again_and_says_why() {
    let world = world().await;
    world
        .workloads
        .script
        .lock()
        .unwrap()
        .source_failures
        .push((ErrorKind::Unavailable, "cannot download `x`: connection refused".into()));
    world.create_image("ubuntu").await;
    eventually("reason", async || {
        let status = world.image("ubuntu").await;
        condition::find(&status.conditions, READY).is_some_and(|c| {
            c.reason == "DataSourceFailed" && c.message.contains("connection refused") && !c.next_retry_time.is_empty()
        })
    })
    .await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
}

#[tokio::test]
async fn a_wrong_checksum_waits_long_but_a_new_wish_is_tried_at_once() {
    let world = world().await;
    let failure = (ErrorKind::Corrupt, "SHA-512 is a, but b was expected".into());
    world.workloads.script.lock().unwrap().source_failures.push(failure);
    world.create_image("ubuntu").await;
    eventually("failed", async || {
        let source = world.store.get::<BackingImageDataSource>("ubuntu").await.unwrap();
        source.and_then(|s| s.status).is_some_and(|s| s.current_state == CopyState::Failed)
    })
    .await;
    let change =
        |i: &mut BackingImage| drop(i.spec.source_parameters.insert("url".into(), "http://images.test/b".into()));
    world.store.modify::<BackingImage>("ubuntu", change).await.unwrap();
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
}

#[tokio::test]
async fn a_setting_takes_effect_without_a_restart() {
    let world = world().await;
    let failure = (ErrorKind::Invalid, "`127.0.0.1` is a loopback address".into());
    world.workloads.script.lock().unwrap().source_failures.push(failure);
    world.create_image("ubuntu").await;
    eventually("failed", async || {
        let source = world.store.get::<BackingImageDataSource>("ubuntu").await.unwrap();
        source.and_then(|s| s.status).is_some_and(|s| s.current_state == CopyState::Failed)
    })
    .await;
    // The next attempt is five minutes away.
    let set = async |name: &str, value: &str| {
        world.store.modify::<Setting>(name, |s| s.value = value.into()).await.unwrap();
    };
    set("backing-image-allowed-source-addresses", "127.0.0.1").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;

    let lowered = |i: &mut BackingImage| i.spec.min_number_of_copies = 1;
    world.store.modify::<BackingImage>("ubuntu", lowered).await.unwrap();
    set("backing-image-cleanup-wait-interval", "0").await;
    eventually("one copy", async || world.image("ubuntu").await.disk_file_status_map.len() == 1).await;
}

#[tokio::test]
async fn a_failed_copy_is_synced_again() {
    let world = world().await;
    world.workloads.script.lock().unwrap().sync_failures.push("the peer went away".into());
    world.create_image("ubuntu").await;
    eventually("reason", async || {
        let files = world.image("ubuntu").await.disk_file_status_map;
        files
            .values()
            .any(|f| f.state == CopyState::Failed && f.message.contains("went away") && !f.next_retry_time.is_empty())
    })
    .await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
}

#[tokio::test]
async fn what_an_agent_takes_for_a_copy_and_is_none_is_replaced() {
    let world = world().await;
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    let count = |what: &str| world.workloads.script.lock().unwrap().counts.get(what).copied().unwrap_or(0);
    let (syncs, source) = (count("sync"), count("source"));
    world.workloads.mistake(&manager_name(&"uuid-2".parse().unwrap()), "ubuntu");
    eventually("it is got anew", async || count("sync") > syncs).await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    assert_eq!((count("remove"), count("delete"), count("source")), (1, 0, source), "what is prepared is not touched");
}

#[tokio::test]
async fn a_wish_to_verify_is_answered_by_every_copy() {
    let world = world().await;
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    let wish = "2026-01-01T00:00:00Z";
    world.store.modify::<BackingImage>("ubuntu", |i| i.spec.verify_requested_at = wish.into()).await.unwrap();
    eventually("three answers", async || {
        world.image("ubuntu").await.disk_file_status_map.values().all(|f| f.verified_at == wish)
    })
    .await;
    assert_eq!(world.ready_copies("ubuntu").await, 3);
}

#[tokio::test]
async fn a_killed_agent_comes_back_and_adopts_its_copies() {
    let world = world().await;
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    world.workloads.kill("bim-uuid-2");
    eventually("unknown meanwhile", async || {
        world.image("ubuntu").await.disk_file_status_map["uuid-2"].state == CopyState::Unknown
    })
    .await;
    eventually("three copies again", async || world.ready_copies("ubuntu").await == 3).await;
    let counts = world.workloads.script.lock().unwrap().counts.clone();
    assert_eq!((counts["source"], counts["adopt"], counts["sync"]), (1, 1, 2), "{counts:?}");
}

#[tokio::test]
async fn a_deleted_image_leaves_nothing() {
    let world = world().await;
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    world.store.delete::<BackingImage>("ubuntu", &Preconditions::default()).await.unwrap();
    eventually("image gone", async || world.store.get::<BackingImage>("ubuntu").await.unwrap().is_none()).await;
    eventually("agents gone", async || world.workloads.names().is_empty()).await;
    for disk in ["uuid-1", "uuid-2", "uuid-3"] {
        assert!(world.workloads.files(disk).is_empty());
    }
    eventually("managers gone", async || {
        world.store.list::<BackingImageManager>(&Selector::default()).await.unwrap().is_empty()
    })
    .await;
}

#[tokio::test]
async fn an_image_in_use_is_not_deleted() {
    let world = world().await;
    world.create_image("ubuntu").await;
    world.create_volume("v", "ubuntu").await;
    detached(&world, "v").await;
    // Until then nothing holds it.
    let image = async || world.store.get::<BackingImage>("ubuntu").await.unwrap().unwrap();
    eventually("has its finalizer", async || image().await.metadata.finalizers.is_some()).await;
    world.store.delete::<BackingImage>("ubuntu", &Preconditions::default()).await.unwrap();
    eventually("says who uses it", async || {
        let status = world.image("ubuntu").await;
        condition::find(&status.conditions, READY)
            .is_some_and(|c| c.reason == "InUse" && c.message.contains("volume v"))
    })
    .await;
    eventually("copies are made all the same", async || world.ready_copies("ubuntu").await == 3).await;
    world.delete_volume("v").await;
    eventually("image gone", async || world.store.get::<BackingImage>("ubuntu").await.unwrap().is_none()).await;
}

#[tokio::test]
async fn a_volume_is_attached_moved_and_deleted() {
    let world = world().await;
    world.create_volume("v", "ubuntu").await;
    world.attach("v", "node-1").await;
    eventually("waits for its image", async || {
        let status = world.volume("v").await;
        condition::find(&status.conditions, READY).is_some_and(|c| c.message.contains("there is no image ubuntu"))
    })
    .await;
    world.create_image("ubuntu").await;
    attached(&world, "v", "node-1").await;
    assert_eq!(world.volume("v").await.robustness, Robustness::Healthy);
    world.attach("v", "node-2").await;
    attached(&world, "v", "node-2").await;
    world.attach("v", "").await;
    detached(&world, "v").await;
    let engine = world.store.get::<Engine>("v-e-0").await.unwrap().unwrap();
    assert_eq!(engine.spec.generation, 2_000_001, "the first one of the second attachment");
    world.delete_volume("v").await;
    eventually("volume gone", async || world.store.get::<Volume>("v").await.unwrap().is_none()).await;
    assert!(world.store.list::<Replica>(&Selector::default()).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_dropped_replica_is_marked_and_left_out() {
    let world = world().await;
    world.create_image("ubuntu").await;
    world.create_volume("v", "ubuntu").await;
    world.attach("v", "node-1").await;
    attached(&world, "v", "node-1").await;
    let mut dropped = String::new();
    let drop_one = |e: &mut Engine| {
        let status = e.status.get_or_insert_default();
        dropped = status.replica_mode_map.keys().next().cloned().unwrap();
        status.replica_mode_map.insert(dropped.clone(), ReplicaMode::Err);
        status.replica_errors.insert(dropped.clone(), "its process was killed".into());
        status.generation += 1;
    };
    world.store.modify_status::<Engine>("v-e-0", drop_one).await.unwrap();
    fence_without(&world, &dropped).await;
    eventually("degraded", async || world.volume("v").await.robustness == Robustness::Degraded).await;
    let reason = async || world.store.get::<Replica>(&dropped).await.unwrap().unwrap().spec.failed_reason;
    eventually("told", async || !reason().await.is_empty()).await;
    assert_eq!(reason().await, "its process was killed");
    world.attach("v", "").await;
    detached(&world, "v").await;
    world.attach("v", "node-3").await;
    attached(&world, "v", "node-3").await;
    let engine = world.store.get::<Engine>("v-e-0").await.unwrap().unwrap();
    assert_eq!(engine.spec.replica_address_map.len(), 2);
    assert!(!engine.spec.replica_address_map.contains_key(&dropped));
    let status = world.volume("v").await;
    assert!(
        condition::find(&status.conditions, READY).unwrap().message.contains("its process was killed"),
        "{status:?}"
    );
}

#[tokio::test]
async fn an_engine_that_ended_by_surprise_is_attached_again() {
    let world = world().await;
    world.create_volume("v", "").await;
    world.attach("v", "node-1").await;
    attached(&world, "v", "node-1").await;
    let crash = |e: &mut Engine| {
        let status = e.status.get_or_insert_default();
        status.current_state = InstanceState::Error;
        status.replica_mode_map.clear();
        status.endpoint.clear();
    };
    world.store.modify_status::<Engine>("v-e-0", crash).await.unwrap();
    eventually("attached anew, to be compared", async || {
        let engine = world.store.get::<Engine>("v-e-0").await.unwrap().unwrap();
        let state = engine.status.map(|s| (s.current_state, s.generation));
        engine.spec.compare_replicas && state == Some((InstanceState::Running, 2_000_001))
    })
    .await;
    attached(&world, "v", "node-1").await;
}

#[tokio::test]
async fn an_attachment_to_an_unknown_node_says_so() {
    let world = world().await;
    world.create_volume("v", "").await;
    world.attach("v", "node-9").await;
    eventually("reason", async || {
        let status = world.volume("v").await;
        condition::find(&status.conditions, READY)
            .is_some_and(|c| c.message.contains("there is no such node; known are node-1, node-2, node-3"))
    })
    .await;
}
