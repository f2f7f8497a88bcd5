//! Many images on many disks, all settled, and what the controller does about one change: passes, and bytes from and to the store.

#![allow(dead_code, reason = "each program uses its part")]

mod counting;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use api::data_source::BackingImageDataSourceSpec;
use api::ids::DiskId;
use api::image::{BackingImageSpec, BackingImageStatus, CopyState, DiskFileStatus, SourceType};
use api::manager::BackingImageManagerSpec;
use api::names::{FINALIZER, manager_name};
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Node, Setting};
use backing_image_controller::{Context, Metrics, run};
use store::{Selector, Store};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::counting::Traffic;
use self::counting::{Counting, Traffics};
use crate::world::agents::FakeWorkloads;
use crate::world::{create_node, eventually};

/// What changes: an image's annotation, a heartbeat without news, a setting, a wish to verify one image, the failure of one copy.
pub const CHANGES: [&str; 5] = ["touched", "heartbeat", "setting", "verified", "failed"];
pub const NODES: u32 = 10;
pub const COPIES: u32 = 3;
/// Where the first image has a copy.
const FIRST_DISK: &str = "uuid-1";
const UUID: &str = "0a1b2c3d";
/// What is quiet for so many looks in a row has settled.
const QUIET_LOOKS: u32 = 30;
const LOOK: Duration = Duration::from_millis(10);
/// How long that is at the least.
pub const QUIET: Duration = Duration::from_millis(LOOK.as_millis() as u64 * QUIET_LOOKS as u64);
const PATIENCE: Duration = Duration::from_secs(300);

pub struct Fleet {
    /// Not counted: what users and instance roles do.
    pub store: Store,
    pub workloads: FakeWorkloads,
    counted: Store,
    traffic: Arc<Traffics>,
    metrics: Metrics,
    text: runtime::metrics::Metrics,
    running: Option<DropGuard>,
}

/// What a change cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost {
    pub passes: u64,
    /// From and to the store: answers, watches and writes.
    pub bytes: u64,
    /// Kind of pass → how many.
    pub by_kind: BTreeMap<String, u64>,
    pub traffic: Traffic,
}

impl Fleet {
    /// So many images, each with three copies on ten disks. The controller does not run yet.
    pub async fn of(images: u32) -> Fleet {
        let traffic = Arc::<Traffics>::default();
        let inner: Arc<dyn store::ObjectStore> = Arc::new(store::embedded::Embedded::in_memory());
        let store = Store::new(inner.clone(), "longhorn-system");
        let counted = Store::new(Arc::new(Counting { inner, traffic: traffic.clone() }), "longhorn-system");
        let workloads = FakeWorkloads::new();
        workloads.script.lock().unwrap().remembers = true;
        let text = runtime::metrics::Metrics::default();
        let metrics = Metrics::default();
        text.register(|registry| metrics.register(registry));
        for n in 1..=NODES {
            create_node(&store, n).await;
        }
        let mut held: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for n in 0..images {
            let name = image_name(n);
            let disks: Vec<String> = (0..COPIES).map(|copy| format!("uuid-{}", (n + copy) % NODES + 1)).collect();
            for disk in &disks {
                held.entry(disk.clone()).or_default().insert(name.clone(), UUID.into());
                let spec =
                    proto::bimrpc::BackingImageSpec { name: name.clone(), uuid: UUID.into(), ..Default::default() };
                workloads.put(disk, spec);
            }
            create_image(&store, &name, &disks).await;
        }
        for (disk, images) in held {
            create_manager(&store, &disk, images).await;
        }
        Fleet { store, workloads, counted, traffic, metrics, text, running: None }
    }

    /// Runs the controller, anew if it ran before, until nothing moves.
    pub async fn start(&mut self) -> Cost {
        self.running = None;
        let before = self.so_far();
        let stop = CancellationToken::new();
        let context = Context {
            store: self.counted.clone(),
            workloads: Arc::new(self.workloads.clone()),
            metrics: self.metrics.clone(),
            security: Default::default(),
            kubernetes: false,
            watching: Default::default(),
            deposed: CancellationToken::new(),
        };
        tokio::spawn(run(context, stop.clone()));
        self.running = Some(stop.drop_guard());
        self.settled().await;
        self.so_far().since(&before)
    }

    /// What a change cost until nothing moved any more: the least of three, since every half minute everything is looked at anyway.
    pub async fn cost_of(&self, change: &str) -> Cost {
        let mut costs = vec![];
        for round in 1..=3 {
            let before = self.so_far();
            let since = self.first_copy().await.last_state_transition_time;
            self.change(change, round).await;
            if change == "failed" {
                // It is made anew after a moment, in which nothing moves.
                let is_made_anew = async || {
                    let copy = self.first_copy().await;
                    copy.state == CopyState::Ready && copy.last_state_transition_time != since
                };
                eventually("the copy is made anew", is_made_anew).await;
            }
            self.settled().await;
            costs.push(self.so_far().since(&before));
        }
        costs.into_iter().min().unwrap_or_default()
    }

    /// What is known of the copy that fails.
    async fn first_copy(&self) -> DiskFileStatus {
        let image = self.store.get::<BackingImage>(&image_name(0)).await.unwrap().unwrap();
        image.status.unwrap_or_default().disk_file_status_map.remove(FIRST_DISK).unwrap_or_default()
    }

    /// Makes one of [`CHANGES`], another one in each round.
    async fn change(&self, change: &str, round: u32) {
        let (store, image) = (&self.store, image_name(0));
        // An older time would be one at which everything is due to be read again.
        let now = jiff::Timestamp::now().to_string();
        match change {
            "touched" => {
                let touch = |i: &mut BackingImage| {
                    i.metadata.annotations.get_or_insert_default().insert("touched".into(), now.clone());
                };
                store.modify::<BackingImage>(&image, touch).await.unwrap();
            }
            "verified" => {
                let wish = |i: &mut BackingImage| i.spec.verify_requested_at.clone_from(&now);
                store.modify::<BackingImage>(&image, wish).await.unwrap();
            }
            "failed" => self.workloads.fail(&manager_name(&FIRST_DISK.parse().unwrap()), &image),
            "heartbeat" => {
                let beat = |n: &mut Node| {
                    let status = n.status.get_or_insert_default();
                    status.conditions[0].last_probe_time.clone_from(&now);
                    status.disk_status.get_mut("disk-1").unwrap().storage_available -= 1;
                };
                store.modify_status::<Node>("node-1", beat).await.unwrap();
            }
            "setting" => {
                let set = |s: &mut Setting| s.value = (round + 70).to_string();
                store.modify::<Setting>(api::setting::CLEANUP_WAIT_INTERVAL, set).await.unwrap();
            }
            other => panic!("there is no change `{other}`"),
        }
    }

    /// What was done until now.
    pub fn so_far(&self) -> Cost {
        let mut by_kind: BTreeMap<String, u64> = BTreeMap::new();
        for line in self.text.render().lines().filter(|line| line.contains("reconcile_passes_total{")) {
            let (labels, count) = line.rsplit_once(' ').unwrap();
            let kind = labels.split_once("kind=\"").unwrap().1.split_once('"').unwrap().0;
            *by_kind.entry(kind.to_owned()).or_default() += count.parse::<u64>().unwrap();
        }
        let traffic = self.traffic.so_far();
        Cost { passes: by_kind.values().sum(), bytes: traffic.bytes(), by_kind, traffic }
    }

    async fn settled(&self) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let (mut last, mut looks) = (self.so_far(), 0);
        while looks < QUIET_LOOKS {
            assert!(tokio::time::Instant::now() < deadline, "it does not settle: {last:?}");
            tokio::time::sleep(LOOK).await; // poll
            let now = self.so_far();
            looks = if now == last { looks + 1 } else { 0 };
            last = now;
        }
    }

    /// Whether every copy of every image is ready.
    pub async fn is_whole(&self) -> bool {
        let images: Vec<BackingImage> = self.store.list(&Selector::default()).await.unwrap();
        let is_whole = |status: &BackingImageStatus| planner::image::ready_disks(status).count() == COPIES as usize;
        images.iter().all(|image| image.status.as_ref().is_some_and(is_whole))
    }
}

impl Cost {
    fn since(&self, before: &Cost) -> Cost {
        let mut by_kind = self.by_kind.clone();
        for (kind, count) in &before.by_kind {
            *by_kind.entry(kind.clone()).or_default() -= count;
        }
        by_kind.retain(|_, count| *count > 0);
        let traffic = self.traffic.since(&before.traffic);
        Cost { passes: self.passes - before.passes, bytes: traffic.bytes(), by_kind, traffic }
    }
}

pub fn image_name(n: u32) -> String {
    format!("image-{n}")
}

async fn create_image(store: &Store, name: &str, disks: &[String]) {
    let now = "2026-01-01T00:00:00Z";
    let spec = BackingImageSpec {
        source_type: Some(SourceType::Download),
        source_parameters: [("url".to_owned(), format!("http://images.test/{name}.qcow2"))].into(),
        disk_file_spec_map: disks.iter().map(|disk| (disk.clone(), Default::default())).collect(),
        ..Default::default()
    };
    let mut image = BackingImage::new(name, spec.clone());
    image.metadata.finalizers = Some(vec![FINALIZER.into()]);
    let mut image = store.create(&image).await.unwrap();
    let copy = DiskFileStatus {
        state: CopyState::Ready,
        progress: 100,
        last_state_transition_time: now.into(),
        ..Default::default()
    };
    image.status = Some(BackingImageStatus {
        uuid: UUID.into(),
        size: 1 << 20,
        virtual_size: 1 << 20,
        real_size: 1 << 20,
        checksum: "c0ffee".into(),
        format: "raw".into(),
        disk_file_status_map: disks.iter().map(|disk| (disk.clone(), copy.clone())).collect(),
        ..Default::default()
    });
    let image = store.replace_status(&image).await.unwrap();
    let source = BackingImageDataSourceSpec {
        uuid: UUID.into(),
        disk_uuid: disks[0].clone(),
        source_type: spec.source_type,
        parameters: spec.source_parameters,
        file_transferred: true,
        ..Default::default()
    };
    let mut source = BackingImageDataSource::new(name, source);
    source.metadata.finalizers = Some(vec![FINALIZER.into()]);
    source.metadata.owner_references =
        Some(vec![kube::Resource::controller_owner_ref(&image, &()).expect("it is stored")]);
    store.create(&source).await.unwrap();
}

async fn create_manager(store: &Store, disk: &str, images: BTreeMap<String, String>) {
    let id: DiskId = disk.parse().unwrap();
    let spec = BackingImageManagerSpec { disk_uuid: disk.to_owned(), backing_images: images, ..Default::default() };
    let mut manager = BackingImageManager::new(&manager_name(&id), spec);
    manager.metadata.finalizers = Some(vec![FINALIZER.into()]);
    store.create(&manager).await.unwrap();
}
