//! Each change asks for the passes of whoever reads what changed, and for no other.

use std::collections::BTreeSet;
use std::sync::Arc;

use api::image::{CopyState, DiskFileStatus};
use api::manager::{FileInfo, ManagerState};
use api::node::DiskStatus;
use store::Store;
use store::embedded::Embedded;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::fake_agents::FakeWorkloads;

struct World {
    shared: Shared,
    store: Store,
}

/// `ubuntu` wants a copy on disk `a`, has one on `b`, is being prepared, and is used by volume `v`. Of `debian`, which volume `w`
/// uses, nothing is anywhere. An image that is gone left something on disk `c`, there is a manager of a disk `d`, and nothing on disk `e`.
async fn world() -> World {
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let mut node = Node::new("node-1", Default::default());
    for (disk, holds_image_files) in [("a", false), ("c", true), ("e", false)] {
        let status = DiskStatus { disk_uuid: disk.into(), holds_image_files, ..Default::default() };
        node.status.get_or_insert_default().disk_status.insert(disk.into(), status);
        node.spec.disks.insert(disk.into(), Default::default());
    }
    let created = store.create(&node).await.unwrap();
    store.replace_status(&Node { status: node.status, ..created }).await.unwrap();
    let mut ubuntu = BackingImage::new("ubuntu", Default::default());
    ubuntu.spec.disk_file_spec_map.insert("a".into(), Default::default());
    let created = store.create(&ubuntu).await.unwrap();
    let copy = DiskFileStatus { state: CopyState::Ready, ..Default::default() };
    ubuntu.status.get_or_insert_default().disk_file_status_map.insert("b".into(), copy);
    store.replace_status(&BackingImage { status: ubuntu.status, ..created }).await.unwrap();
    store.create(&BackingImage::new("debian", Default::default())).await.unwrap();
    for disk in ["a", "d"] {
        let mut manager = BackingImageManager::new(&manager_name(&disk.parse().unwrap()), Default::default());
        manager.spec.disk_uuid = disk.into();
        if disk == "a" {
            manager.spec.backing_images.insert("ubuntu".into(), "0a1b2c3d".into());
        }
        store.create(&manager).await.unwrap();
    }
    let mut source = BackingImageDataSource::new("ubuntu", Default::default());
    source.spec.disk_uuid = "a".into();
    store.create(&source).await.unwrap();
    for (volume, image) in [("v", "ubuntu"), ("w", "debian")] {
        store.create(&volume_of(volume, image)).await.unwrap();
    }
    let mut engine = Engine::new("v-e-0", Default::default());
    engine.spec.volume_name = "v".into();
    store.create(&engine).await.unwrap();
    let mut replica = Replica::new("v-r-0", Default::default());
    (replica.spec.volume_name, replica.spec.backing_image) = ("v".into(), "ubuntu".into());
    store.create(&replica).await.unwrap();
    let mut setting = Setting { value: "3".into(), ..Default::default() };
    setting.metadata.name = Some(api::setting::DEFAULT_MIN_COPIES.into());
    store.create(&setting).await.unwrap();
    let context = crate::Context {
        store: store.clone(),
        workloads: Arc::new(FakeWorkloads::new()),
        metrics: Default::default(),
        security: Default::default(),
        kubernetes: false,
        watching: Default::default(),
        deposed: CancellationToken::new(),
    };
    let world = World { shared: Shared::new(context, &TaskTracker::new(), &CancellationToken::new()), store };
    world.hear::<Node>().await;
    world.hear::<BackingImage>().await;
    world.hear::<BackingImageManager>().await;
    world.hear::<BackingImageDataSource>().await;
    world.hear::<Volume>().await;
    world.hear::<Engine>().await;
    world.hear::<Replica>().await;
    world.hear::<Setting>().await;
    world.asked().await;
    world
}

fn volume_of(name: &str, image: &str) -> Volume {
    let mut volume = Volume::new(name, Default::default());
    volume.spec.backing_image = image.into();
    volume
}

impl World {
    /// Takes in what changed of a kind.
    async fn hear<T: Concern>(&self) {
        let (steps, _) = self.shared.cache.list::<T>(&self.store).await.unwrap();
        steps.iter().for_each(|step| T::concern(step, &self.shared));
    }

    /// The passes that are asked for.
    async fn asked(&self) -> String {
        let mut asked = BTreeSet::new();
        while !self.shared.queue.is_empty() {
            let key = self.shared.queue.next().await;
            asked.insert(format!("{} {}", key.kind.as_str(), key.name));
            self.shared.queue.finish(&key, None);
        }
        asked.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// What a change asks for.
    async fn check<T: Concern>(&self, what: &str, change: impl AsyncFnOnce(&Store), expected: &str) {
        change(&self.store).await;
        self.hear::<T>().await;
        assert_eq!(self.asked().await, expected, "{what}");
    }
}

fn copy(image: &mut BackingImage) -> &mut DiskFileStatus {
    image.status.as_mut().unwrap().disk_file_status_map.get_mut("b").unwrap()
}

#[tokio::test]
async fn a_change_of_an_image_asks_for_its_agents_its_preparation_and_its_volumes() {
    let world = world().await;
    let labels = async |s: &Store| {
        let label = |i: &mut BackingImage| drop(i.metadata.labels.replace([("a".into(), "b".into())].into()));
        s.modify::<BackingImage>("ubuntu", label).await.unwrap();
    };
    world.check::<BackingImage>("a label", labels, "image ubuntu").await;
    let told = async |s: &Store| {
        s.modify_status::<BackingImage>("ubuntu", |i| copy(i).message = "why".into()).await.unwrap();
    };
    world.check::<BackingImage>("a sentence", told, "image ubuntu, volume v").await;
    let all = "data_source ubuntu, image ubuntu, manager bim-a, manager bim-b, volume v";
    let failed = async |s: &Store| {
        s.modify_status::<BackingImage>("ubuntu", |i| copy(i).state = CopyState::Failed).await.unwrap();
    };
    world.check::<BackingImage>("a state", failed, all).await;
    // Who is to let go something is told too.
    let taken = async |s: &Store| {
        s.modify::<BackingImage>("ubuntu", |i| i.spec.disk_file_spec_map.clear()).await.unwrap();
    };
    world.check::<BackingImage>("a copy taken out", taken, all).await;
    let gone = async |s: &Store| {
        s.delete::<BackingImage>("ubuntu", &Default::default()).await.unwrap();
    };
    let without_a = "data_source ubuntu, image ubuntu, manager bim-b, volume v";
    world.check::<BackingImage>("it is gone", gone, without_a).await;
}

#[tokio::test]
async fn a_change_of_an_agent_asks_for_the_images_whose_file_it_is() {
    let world = world().await;
    let labels = async |s: &Store| {
        let label = |m: &mut BackingImageManager| drop(m.metadata.labels.replace([("a".into(), "b".into())].into()));
        s.modify::<BackingImageManager>("bim-a", label).await.unwrap();
    };
    world.check::<BackingImageManager>("a label", labels, "manager bim-a").await;
    let file = async |s: &Store| {
        let file = FileInfo { state: CopyState::Ready, ..Default::default() };
        let report = |m: &mut BackingImageManager| {
            drop(m.status.get_or_insert_default().backing_image_file_map.insert("ubuntu".into(), file.clone()))
        };
        s.modify_status::<BackingImageManager>("bim-a", report).await.unwrap();
    };
    world.check::<BackingImageManager>("a file", file, "data_source ubuntu, image ubuntu, manager bim-a").await;
    let transferred = |d: &mut BackingImageDataSource| d.spec.file_transferred = true;
    world.store.modify::<BackingImageDataSource>("ubuntu", transferred).await.unwrap();
    world.hear::<BackingImageDataSource>().await;
    assert_eq!(world.asked().await, "data_source ubuntu, image ubuntu, manager bim-a");
    let silent = async |s: &Store| {
        let silent = |m: &mut BackingImageManager| m.status.as_mut().unwrap().current_state = ManagerState::Unknown;
        s.modify_status::<BackingImageManager>("bim-a", silent).await.unwrap();
    };
    world.check::<BackingImageManager>("what was handed over", silent, "image ubuntu, manager bim-a").await;
}

#[tokio::test]
async fn changes_of_volumes_engines_and_replicas_ask_for_their_volume() {
    let world = world().await;
    let attach = async |s: &Store| {
        s.modify::<Volume>("v", |v| v.spec.node_id = "node-1".into()).await.unwrap();
    };
    world.check::<Volume>("attached", attach, "volume v").await;
    let create = async |s: &Store| drop(s.create(&volume_of("x", "debian")).await.unwrap());
    world.check::<Volume>("a further one", create, "image debian, volume x").await;
    let delete = async |s: &Store| {
        s.delete::<Volume>("x", &Default::default()).await.unwrap();
    };
    world.check::<Volume>("it is gone", delete, "image debian, volume x").await;
    let engine = async |s: &Store| {
        s.modify_status::<Engine>("v-e-0", |e| e.status.get_or_insert_default().generation = 7).await.unwrap();
    };
    world.check::<Engine>("an engine", engine, "volume v").await;
    let fares = async |s: &Store| {
        s.modify_status::<Replica>("v-r-0", |r| r.status.get_or_insert_default().generation = 7).await.unwrap();
    };
    world.check::<Replica>("how a replica fares", fares, "volume v").await;
    let wanted = async |s: &Store| {
        s.modify::<Replica>("v-r-0", |r| r.spec.failed_at = "now".into()).await.unwrap();
    };
    world.check::<Replica>("what is wanted of it", wanted, "image ubuntu, volume v").await;
}

#[tokio::test]
async fn a_change_of_a_node_or_a_setting_asks_for_everything() {
    let world = world().await;
    let everything = "data_source ubuntu, image debian, image ubuntu, manager bim-a, manager bim-b, manager bim-c, manager bim-d, \
                      node node-1, volume v, volume w";
    let room = async |s: &Store| {
        let disk = |n: &mut Node| n.status.as_mut().unwrap().disk_status.get_mut("a").unwrap().storage_available = 7;
        s.modify_status::<Node>("node-1", disk).await.unwrap();
    };
    world.check::<Node>("a heartbeat", room, "").await;
    let closed = async |s: &Store| {
        s.modify::<Node>("node-1", |n| n.spec.allow_scheduling ^= true).await.unwrap();
    };
    world.check::<Node>("a node", closed, everything).await;
    let label = async |s: &Store| {
        let label = |s: &mut Setting| drop(s.metadata.labels.replace([("a".into(), "b".into())].into()));
        s.modify::<Setting>(api::setting::DEFAULT_MIN_COPIES, label).await.unwrap();
    };
    world.check::<Setting>("the label of a setting", label, "").await;
    let value = async |s: &Store| {
        s.modify::<Setting>(api::setting::DEFAULT_MIN_COPIES, |s| s.value = "2".into()).await.unwrap();
    };
    world.check::<Setting>("a setting", value, everything).await;
}
