//! The removal of what belongs to nobody rests on what the store says at that moment, whatever the cache shows.

use api::node::{DiskSpec, DiskStatus, NodeSpec, NodeStatus};
use api::replica::ReplicaSpec;
use api::{Condition, ConditionStatus, Node, Setting, Volume};
use planner::manager::orphans::WAIT;
use store::Store;
use store::embedded::Embedded;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::removal::is_wanted;
use super::*;
use crate::Context;
use crate::fake_agents::FakeWorkloads;

mod former;

const MANAGER: &str = "bim-uuid-1";
const UUID: &str = "0a1b2c3d";
const MARK: &str = "m1";

/// One pass after the other over the manager of one disk, whose cache knows only what it is told.
pub(crate) struct World {
    pub shared: Shared,
    /// As others use the store.
    pub store: Store,
    workloads: FakeWorkloads,
    _stop: DropGuard,
}

fn remains(image: &str, is_preparation: bool) -> proto::bimrpc::Remains {
    let (name, uuid, mark) = (image.into(), UUID.into(), MARK.into());
    proto::bimrpc::Remains { name, uuid, is_preparation, size: 7, mark, is_mixed: false, is_partial: false }
}

fn node() -> Node {
    let disk = DiskSpec { path: "/disks/1".into(), ..Default::default() };
    let spec = NodeSpec { name: "node-1".into(), disks: [("disk-1".to_owned(), disk)].into(), ..Default::default() };
    let mut node = Node::new("node-1", spec);
    let disk = DiskStatus {
        disk_uuid: "uuid-1".into(),
        storage_available: 10 << 30,
        storage_maximum: 10 << 30,
        holds_image_files: true,
        images_under_replicas: Some(vec![]),
        ..Default::default()
    };
    node.status = Some(NodeStatus {
        conditions: vec![Condition::new("Ready", ConditionStatus::True, "Ready", "")],
        disk_status: [("disk-1".to_owned(), disk)].into(),
        ..Default::default()
    });
    node
}

/// An image as it is once its reconciler has looked at it.
fn image(name: &str, uuid: &str) -> BackingImage {
    let mut image = BackingImage::new(name, Default::default());
    image.status.get_or_insert_default().uuid = uuid.into();
    image
}

pub(crate) fn data_source(name: &str, uuid: &str) -> BackingImageDataSource {
    let mut source = BackingImageDataSource::new(name, Default::default());
    (source.spec.uuid, source.spec.disk_uuid) = (uuid.into(), "uuid-1".into());
    source
}

fn replica(disk: &str) -> Replica {
    let (volume_name, backing_image) = ("v".into(), "ubuntu".into());
    let spec = ReplicaSpec { volume_name, backing_image, disk_id: disk.into(), ..Default::default() };
    Replica::new("r", spec)
}

impl World {
    /// A disk on which these lie, and nothing was looked at yet.
    pub async fn begin(found: Vec<proto::bimrpc::Remains>) -> World {
        let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
        let created = store.create(&node()).await.unwrap();
        store.replace_status(&Node { status: node().status, ..created }).await.unwrap();
        let (workloads, stop) = (FakeWorkloads::new(), CancellationToken::new());
        workloads.script.lock().unwrap().remains = Some(found);
        let context = Context {
            store: store.clone(),
            workloads: Arc::new(workloads.clone()),
            metrics: Default::default(),
            security: Default::default(),
            kubernetes: false,
            watching: Default::default(),
            deposed: CancellationToken::new(),
        };
        let shared = Shared::new(context, &TaskTracker::new(), &stop);
        World { shared, store, workloads, _stop: stop.drop_guard() }
    }

    /// The same, whose agent was heard, and which were told long enough ago.
    async fn of(found: Vec<proto::bimrpc::Remains>) -> World {
        let world = World::begin(found).await;
        world.hear().await;
        // The object, the agent, and what it says.
        for _ in 0..3 {
            world.pass().await;
            world.hear().await;
        }
        assert!(!world.sightings().is_empty() && world.removed().is_empty(), "it is told first");
        world.wait();
        world
    }

    /// What was told was told long enough ago.
    fn wait(&self) {
        let mut memory = self.shared.manager_memory.lock().unwrap();
        for seen in memory.get_mut(MANAGER).unwrap().orphans.values_mut() {
            seen.since = seen.since.checked_sub(WAIT).unwrap();
        }
    }

    /// The cache learns what the store has.
    pub async fn hear(&self) {
        let (cache, store) = (&self.shared.cache, &self.store);
        cache.list::<Node>(store).await.unwrap();
        cache.list::<Setting>(store).await.unwrap();
        cache.list::<BackingImage>(store).await.unwrap();
        cache.list::<BackingImageManager>(store).await.unwrap();
        cache.list::<BackingImageDataSource>(store).await.unwrap();
        cache.list::<Volume>(store).await.unwrap();
        cache.list::<Replica>(store).await.unwrap();
    }

    async fn pass(&self) {
        reconcile(MANAGER, &self.shared).await.unwrap();
    }

    fn sightings(&self) -> BTreeMap<String, planner::manager::orphans::Sighting> {
        self.shared.manager_memory.lock().unwrap().get(MANAGER).map(|m| m.orphans.clone()).unwrap_or_default()
    }

    /// What the agent was asked to remove.
    fn removed(&self) -> Vec<RemoveRemainsRequest> {
        self.workloads.script.lock().unwrap().removed.clone()
    }

    async fn create_image(&self, image: BackingImage) {
        let created = self.store.create(&image).await.unwrap();
        self.store.replace_status(&BackingImage { status: image.status, ..created }).await.unwrap();
    }
}

/// Whether a copy and a preparation of `ubuntu` are removed after a change that the cache does not show.
async fn check(what: &str, change: impl AsyncFnOnce(&World), expected: (bool, bool)) {
    let world = World::of(vec![remains("ubuntu", false), remains("ubuntu", true)]).await;
    change(&world).await;
    world.pass().await;
    let is_removed = |is_preparation| {
        let of = RemoveRemainsRequest { name: "ubuntu".into(), uuid: UUID.into(), is_preparation, mark: MARK.into() };
        world.removed().contains(&of)
    };
    assert_eq!((is_removed(false), is_removed(true)), expected, "{what}");
    let all = usize::from(expected.0) + usize::from(expected.1);
    assert_eq!(world.removed().len(), all, "nothing else is asked for: {what}");
}

#[tokio::test]
async fn what_the_cache_does_not_show_yet_keeps_its_files() {
    check("nothing changed", async |_| {}, (true, true)).await;
    check("its image", async |w| w.create_image(image("ubuntu", UUID)).await, (false, false)).await;
    check("an image without uuid", async |w| w.create_image(image("ubuntu", "")).await, (false, false)).await;
    check("the next of its name", async |w| w.create_image(image("ubuntu", "ffffffff")).await, (true, true)).await;
    check("another image", async |w| w.create_image(image("debian", UUID)).await, (true, true)).await;
    let source = async |w: &World| drop(w.store.create(&data_source("ubuntu", UUID)).await.unwrap());
    check("its data source", source, (false, false)).await;
    let source = async |w: &World| drop(w.store.create(&data_source("ubuntu", "ffffffff")).await.unwrap());
    check("the data source of the next", source, (true, true)).await;
    let over = async |w: &World| drop(w.store.create(&replica("uuid-1")).await.unwrap());
    check("a replica over it", over, (false, true)).await;
    let over = async |w: &World| drop(w.store.create(&replica("uuid-2")).await.unwrap());
    check("a replica on another disk", over, (true, true)).await;
}

#[tokio::test]
async fn what_a_node_says_of_its_replicas_and_the_setting_are_read_anew() {
    let of_disk = async |w: &World, change: fn(&mut DiskStatus)| {
        let change = |n: &mut Node| change(n.status.as_mut().unwrap().disk_status.get_mut("disk-1").unwrap());
        w.store.modify_status::<Node>("node-1", change).await.unwrap();
    };
    let used = async |w: &World| {
        of_disk(w, |disk| disk.images_under_replicas = Some(vec![format!("ubuntu-{UUID}")])).await;
    };
    check("something lies over it", used, (false, true)).await;
    let unsaid = async |w: &World| of_disk(w, |disk| disk.images_under_replicas = None).await;
    check("the node does not say what lies over it", unsaid, (false, true)).await;
    let away = async |w: &World| {
        let change = |n: &mut Node| n.status.as_mut().unwrap().conditions[0].status = ConditionStatus::Unknown;
        w.store.modify_status::<Node>("node-1", change).await.unwrap();
    };
    check("the node is silent", away, (false, false)).await;
    let off = async |w: &World| {
        let mut setting = Setting { value: "false".into(), ..Default::default() };
        setting.metadata.name = Some(api::setting::REMOVE_ORPHANS.into());
        w.store.create(&setting).await.unwrap();
    };
    check("the setting says to leave it", off, (false, false)).await;
}

#[tokio::test]
async fn an_orphan_that_the_agent_does_not_remove_holds_up_no_other() {
    let world = World::of(vec![remains("ubuntu", false), remains("debian", false)]).await;
    world.workloads.script.lock().unwrap().undeletable = "debian".into();
    world.pass().await;
    let removed: Vec<String> = world.removed().into_iter().map(|request| request.name).collect();
    assert_eq!(removed, ["ubuntu"]);
    let refused = world.sightings()[&format!("backing-images/debian-{UUID}")].refused.clone();
    assert!(refused.contains("Operation not permitted"), "{refused}");
    // It is told with the reason, and not asked for again before its time.
    world.hear().await;
    world.workloads.script.lock().unwrap().undeletable.clear();
    world.pass().await;
    assert_eq!(world.removed().len(), 1);
    let manager: BackingImageManager = world.store.get(MANAGER).await.unwrap().unwrap();
    let told = &manager.status.unwrap().orphans[&format!("backing-images/debian-{UUID}")].message;
    assert!(told.contains("Operation not permitted"), "{told}");
}

#[test]
fn a_copy_with_a_place_is_wanted_also_while_the_deletion_of_its_image_waits() {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    let placed = |disk: &str| {
        let mut image = image("ubuntu", UUID);
        image.spec.disk_file_spec_map.insert(disk.into(), Default::default());
        image
    };
    let mut known = image("ubuntu", UUID);
    known.status.as_mut().unwrap().disk_file_status_map.insert("uuid-1".into(), Default::default());
    for mut image in [placed("uuid-1"), known] {
        assert!(is_wanted(&image, UUID, "uuid-1"));
        image.metadata.deletion_timestamp = Some(Time(Default::default()));
        assert!(is_wanted(&image, UUID, "uuid-1"), "a volume may use it");
        assert!(!is_wanted(&image, "ffffffff", "uuid-1"), "of another image of this name");
    }
    assert!(!is_wanted(&placed("uuid-2"), UUID, "uuid-1"));
}
