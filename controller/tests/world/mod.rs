//! A world for reconcilers: an in-memory store, nodes, fake agents and a fake instance role.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod agents;
pub mod before;
pub mod instance;

use std::sync::Arc;
use std::time::Duration;

use api::image::{BackingImageSpec, BackingImageStatus, SourceType};
use api::node::{DiskSpec, DiskStatus, NodeSpec, NodeStatus};
use api::quantity::SizeBytes;
use api::volume::{VolumeSpec, VolumeStatus};
use api::{BackingImage, Condition, ConditionStatus, Node, Volume};
use backing_image_controller::{Context, Metrics, run};
use store::{Preconditions, Store};
use tokio_util::sync::{CancellationToken, DropGuard};

use agents::FakeWorkloads;

const GIB: u64 = 1 << 30;

pub struct World {
    pub store: Store,
    pub workloads: FakeWorkloads,
    stop: DropGuard,
}

/// Three nodes with one disk each, and a running controller.
pub async fn world() -> World {
    world_of(false).await
}

/// The same, whose nodes are those of a Kubernetes cluster or not.
pub async fn world_of(kubernetes: bool) -> World {
    let store = Store::new(Arc::new(store::embedded::Embedded::in_memory()), "longhorn-system");
    for n in 1..=3 {
        create_node(&store, n).await;
    }
    let workloads = FakeWorkloads::new();
    let stop = CancellationToken::new();
    let context = Context {
        store: store.clone(),
        workloads: Arc::new(workloads.clone()),
        metrics: Metrics::default(),
        security: Default::default(),
        kubernetes,
        watching: Default::default(),
        deposed: CancellationToken::new(),
    };
    tokio::spawn(run(context, stop.clone()));
    tokio::spawn(stop.clone().run_until_cancelled_owned(instance::run(store.clone())));
    World { store, workloads, stop: stop.drop_guard() }
}

/// A node with one disk, which has nothing to do yet.
pub async fn create_node(store: &Store, n: u32) {
    let name = format!("node-{n}");
    let disk = DiskSpec { path: format!("/disks/{n}"), ..Default::default() };
    let mut node = Node::new(
        &name,
        NodeSpec { name: name.clone(), disks: [("disk-1".to_owned(), disk)].into(), ..Default::default() },
    );
    node = store.create(&node).await.unwrap();
    let status = DiskStatus {
        disk_uuid: format!("uuid-{n}"),
        storage_available: 10 * GIB,
        storage_maximum: 10 * GIB,
        ..Default::default()
    };
    node.status = Some(NodeStatus {
        conditions: vec![Condition::new("Ready", ConditionStatus::True, "Ready", "")],
        disk_status: [("disk-1".to_owned(), status)].into(),
        ..Default::default()
    });
    store.replace_status(&node).await.unwrap();
}

impl World {
    /// Asks the controller to end.
    pub fn end(self) -> Store {
        drop(self.stop);
        self.store
    }

    pub async fn create_image(&self, name: &str) {
        let spec = BackingImageSpec {
            source_type: Some(SourceType::Download),
            source_parameters: [("url".to_owned(), "http://images.test/a.qcow2".to_owned())].into(),
            ..Default::default()
        };
        self.store.create(&BackingImage::new(name, spec)).await.unwrap();
    }

    pub async fn create_volume(&self, name: &str, image: &str) {
        let spec = VolumeSpec {
            size: SizeBytes(GIB),
            backing_image: image.into(),
            number_of_replicas: 3,
            ..Default::default()
        };
        self.store.create(&Volume::new(name, spec)).await.unwrap();
    }

    pub async fn attach(&self, volume: &str, node: &str) {
        self.store.modify::<Volume>(volume, |v| v.spec.node_id = node.into()).await.unwrap();
    }

    pub async fn delete_volume(&self, name: &str) {
        self.store.delete::<Volume>(name, &Preconditions::default()).await.unwrap();
    }

    pub async fn image(&self, name: &str) -> BackingImageStatus {
        self.store.get::<BackingImage>(name).await.unwrap().and_then(|i| i.status).unwrap_or_default()
    }

    pub async fn volume(&self, name: &str) -> VolumeStatus {
        self.store.get::<Volume>(name).await.unwrap().and_then(|v| v.status).unwrap_or_default()
    }

    pub async fn ready_copies(&self, image: &str) -> usize {
        planner::image::ready_disks(&self.image(image).await).count()
    }
}

/// Waits for a condition; the text says what for when it does not come.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await; // poll
    }
}
