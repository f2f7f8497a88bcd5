//! What users read with `kubectl describe`: events of images, volumes and replicas, written by the real controller.

mod world;

use api::engine::ReplicaMode;
use api::names::condition::READY;
use api::volume::{Robustness, VolumeState};
use api::{BackingImage, Condition, ConditionStatus, Engine, ErrorKind, Node, Replica};
use backing_image_controller::{Context, Metrics, run};
use k8s_openapi::api::core::v1::Event;
use store::{Selector, Store};
use tokio_util::sync::CancellationToken;
use world::{World, eventually, world};

/// The events of an object: type, reason, message, count.
async fn told(store: &Store, kind: &str, name: &str) -> Vec<String> {
    let all: Vec<Event> = store.list(&Selector::default()).await.unwrap();
    let of = |e: &&Event| {
        let of = &e.involved_object;
        (of.kind.as_deref(), of.name.as_deref()) == (Some(kind), Some(name))
    };
    let say = |e: &Event| {
        let text = |part: &Option<String>| part.clone().unwrap_or_default();
        format!("{} {} {} x{}", text(&e.type_), text(&e.reason), text(&e.message), e.count.unwrap_or(0))
    };
    all.iter().filter(of).map(say).collect()
}

async fn tells(store: &Store, kind: &str, name: &str, wanted: &str) {
    let mut last = vec![];
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    while !last.iter().any(|e: &String| e.contains(wanted)) {
        assert!(tokio::time::Instant::now() < deadline, "{kind} {name} does not tell `{wanted}`: {last:#?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await; // poll
        last = told(store, kind, name).await;
    }
}

async fn attached(world: &World, volume: &str) {
    eventually("attached", async || world.volume(volume).await.state == VolumeState::Attached).await;
}

#[tokio::test]
async fn an_image_tells_of_its_copies_and_why_a_download_failed_and_how_often() {
    let world = world().await;
    for why in ["connection refused", "connection reset"] {
        let failure = (ErrorKind::Unavailable, format!("cannot download `http://images.test/`: {why}"));
        world.workloads.script.lock().unwrap().source_failures.push(failure);
    }
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    for disk in ["disk-1 of node-1", "disk-1 of node-2", "disk-1 of node-3"] {
        let ready = format!("Normal CopyReady the copy on {disk} is ready x1");
        tells(&world.store, "BackingImage", "ubuntu", &ready).await;
    }
    tells(&world.store, "BackingImage", "ubuntu", "Normal Ready ").await;
    tells(&world.store, "BackingImageDataSource", "ubuntu", "Normal Ready the file is whole").await;
    tells(&world.store, "BackingImageManager", "bim-uuid-1", "Normal Running").await;
    let lose_disk = |node: &mut Node| {
        let disk = node.status.as_mut().unwrap().disk_status.get_mut("disk-1").unwrap();
        disk.conditions = vec![Condition::new(READY, ConditionStatus::False, "NoDirectory", "`/disks/2` is not there")];
    };
    world.store.modify_status::<Node>("node-2", lose_disk).await.unwrap();
    tells(&world.store, "Node", "node-2", "Warning NoDirectory disk-1: `/disks/2` is not there x1").await;
    // What is counted within seconds is written at the latest when the controller ends.
    let store = world.end();
    let failed = "connection reset";
    tells(&store, "BackingImage", "ubuntu", failed).await;
    eventually("counted", async || {
        let events = told(&store, "BackingImage", "ubuntu").await;
        events.iter().any(|e| e.starts_with("Warning DataSourceFailed") && e.contains(failed) && e.ends_with(" x2"))
    })
    .await;
    let source = told(&store, "BackingImageDataSource", "ubuntu").await;
    assert!(source.iter().any(|e| e.starts_with("Warning Failed") && e.contains(failed)), "{source:#?}");
}

#[tokio::test]
async fn a_volume_tells_of_its_attachment_and_of_a_replica_that_is_lost() {
    let world = world().await;
    world.create_image("ubuntu").await;
    world.create_volume("v", "ubuntu").await;
    world.attach("v", "node-1").await;
    attached(&world, "v").await;
    tells(&world.store, "Volume", "v", "Normal Attached attached to node node-1").await;
    let mut dropped = String::new();
    let drop_one = |e: &mut Engine| {
        let status = e.status.get_or_insert_default();
        dropped = status.replica_mode_map.keys().next().cloned().unwrap();
        status.replica_mode_map.insert(dropped.clone(), ReplicaMode::Err);
        status.replica_errors.insert(dropped.clone(), "its process was killed".into());
    };
    world.store.modify_status::<Engine>("v-e-0", drop_one).await.unwrap();
    eventually("degraded", async || world.volume("v").await.robustness == Robustness::Degraded).await;
    let replica = world.store.get::<Replica>(&dropped).await.unwrap().unwrap();
    let why = format!("its process was killed (disk-1 of {}, volume v)", replica.spec.node_id);
    tells(&world.store, "Replica", &dropped, &format!("Warning ReplicaFailed {why} x1")).await;
    tells(&world.store, "Volume", "v", "Warning Degraded 2 of 3 replicas are in sync").await;
    world.attach("v", "").await;
    tells(&world.store, "Volume", "v", "Detach").await;
}

#[tokio::test]
async fn a_controller_that_is_started_anew_counts_nothing_twice() {
    let world = world().await;
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    for disk in 1..=3 {
        tells(&world.store, "BackingImage", "ubuntu", &format!("the copy on disk-1 of node-{disk} is ready")).await;
    }
    let workloads = world.workloads.clone();
    let store = world.end();
    let before = told(&store, "BackingImage", "ubuntu").await;
    let stop = CancellationToken::new();
    let context = Context {
        store: store.clone(),
        workloads: std::sync::Arc::new(workloads),
        metrics: Metrics::default(),
        security: Default::default(),
        kubernetes: false,
        watching: Default::default(),
        deposed: CancellationToken::new(),
    };
    let running = tokio::spawn(run(context, stop.clone()));
    // The next one is at work once it tells of something new.
    let spec = BackingImage::new("other", Default::default());
    store.create(&spec).await.unwrap();
    tells(&store, "BackingImage", "other", "Warning Invalid sourceType is missing").await;
    stop.cancel();
    running.await.unwrap().unwrap();
    let after = told(&store, "BackingImage", "ubuntu").await;
    assert_eq!(after, before);
}
