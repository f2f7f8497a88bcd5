//! A disk that hangs: the others of its node work on, also when the role begins, and the disk is told and comes back.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::engine::{DesireState, InstanceState};
use api::names::condition::READY;
use api::node::{DiskSpec, DiskStatus, NodeSpec};
use api::quantity::SizeBytes;
use api::replica::ReplicaSpec;
use api::{ConditionStatus, Node, Replica, condition};
use backing_image_instance::{Config, run};
use runtime::process::ProcessIdentity;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use store::Store;
use store::embedded::Embedded;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(60);

/// A FUSE filesystem whose server never answers. It ends, and everything that waits for it fails, when this is dropped.
struct Hung {
    place: PathBuf,
    _connection: OwnedFd,
}

impl Hung {
    fn at(place: &Path) -> Hung {
        let connection = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", connection.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("hung", place, "fuse", MountFlags::NOSUID, options.as_c_str()).unwrap();
        Hung { place: place.to_owned(), _connection: connection }
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.place, UnmountFlags::FORCE | UnmountFlags::DETACH).unwrap();
    }
}

struct World {
    store: Store,
    folder: tempfile::TempDir,
    /// Of its own, since ports are given by node.
    ip: IpAddr,
}

impl World {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn disk(&self, name: &str) -> DiskStatus {
        let node = self.store.get::<Node>("node-1").await.unwrap().unwrap();
        node.status.and_then(|s| s.disk_status.get(name).cloned()).unwrap_or_default()
    }

    /// Status and reason of a disk's readiness.
    async fn readiness(&self, name: &str) -> Option<(ConditionStatus, String, String)> {
        let disk = self.disk(name).await;
        let ready = condition::find(&disk.conditions, READY)?;
        Some((ready.status, ready.reason.clone(), ready.message.clone()))
    }

    async fn replica_on(&self, disk: &str, name: &str, uuid: &str) {
        let spec = ReplicaSpec {
            volume_name: "vol".into(),
            volume_size: SizeBytes(16 << 20),
            node_id: "node-1".into(),
            desire_state: DesireState::Running,
            disk_id: uuid.into(),
            disk_path: self.path(disk).display().to_string(),
            data_directory_name: name.into(),
            ..Default::default()
        };
        self.store.create(&Replica::new(name, spec)).await.unwrap();
    }

    async fn runs(&self, name: &str) {
        let is_running = async || (self.replica(name).await.0 == InstanceState::Running).then_some(());
        until(&format!("{name} runs"), is_running).await;
    }

    /// The process of a replica.
    fn process(&self, name: &str) -> Option<ProcessIdentity> {
        let text = std::fs::read(self.path(&format!("instance/replicas/{name}/process.json"))).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
        serde_json::from_value(record["identity"].clone()).ok()
    }

    async fn wish_stopped(&self, name: &str) {
        self.store.modify::<Replica>(name, |r| r.spec.desire_state = DesireState::Stopped).await.unwrap();
    }

    async fn stop(&self, name: &str) {
        self.wish_stopped(name).await;
        let is_stopped = async || (self.replica(name).await.0 == InstanceState::Stopped).then_some(());
        until(&format!("{name} is stopped"), is_stopped).await;
    }

    async fn replica(&self, name: &str) -> (InstanceState, String) {
        let replica = self.store.get::<Replica>(name).await.unwrap().unwrap();
        let status = replica.status.unwrap_or_default();
        let message = condition::find(&status.conditions, READY).map(|c| c.message.clone());
        (status.current_state, message.unwrap_or_default())
    }
}

impl Drop for World {
    /// Nothing of a test that failed is in the way of the next one.
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.path("instance/replicas")).into_iter().flatten().flatten() {
            let process = self.process(&entry.file_name().to_string_lossy());
            let _ = process.map(|process| process.signal(rustix::process::Signal::KILL));
        }
    }
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await; // poll
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("never: {what}"))
}

fn config(world: &World, ready: tokio::sync::watch::Sender<bool>) -> Config {
    let test = std::env::current_exe().unwrap();
    Config {
        node: "node-1".parse().unwrap(),
        ip: world.ip,
        directory: world.path("instance"),
        program: test.parent().unwrap().parent().unwrap().join("examples/replica"),
        store: world.store.clone(),
        create_disks: true,
        discover: false,
        disk_owner: None,
        engines: Default::default(),
        security: Default::default(),
        metrics: Default::default(),
        ready,
    }
}

/// A node with these disks, its role not begun.
async fn world(ip: [u8; 4], disks: [&str; 2]) -> World {
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let world = World { store, folder: tempfile::tempdir().unwrap(), ip: ip.into() };
    let spec = |name: &str| DiskSpec { path: world.path(name).display().to_string(), ..Default::default() };
    let disks = disks.map(|name| (name.to_owned(), spec(name))).into();
    let node = NodeSpec { name: "node-1".into(), disks, ..Default::default() };
    world.store.create(&Node::new("node-1", node)).await.unwrap();
    world
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_is_told_and_the_others_of_its_node_work() {
    let world = world([127, 83, 11, 7], ["good", "hung"]).await;
    std::fs::create_dir(world.path("hung")).unwrap();
    let hung = Hung::at(&world.path("hung"));
    // More than there are workers of the role.
    for n in 0..12 {
        world.replica_on("hung", &format!("hung-{n}"), "some-uuid").await;
    }
    let (ready, mut is_ready) = tokio::sync::watch::channel(false);
    let token = CancellationToken::new();
    let role = tokio::spawn(run(config(&world, ready), token.clone()));

    let (status, reason, message) = until("the disk is told", async || world.readiness("hung").await).await;
    assert_eq!((status, reason.as_str()), (ConditionStatus::Unknown, "NotAnswering"), "{message}");
    assert!(message.contains("has not answered since"), "{message}");
    assert_eq!(world.readiness("good").await.unwrap().0, ConditionStatus::True);
    tokio::time::timeout(LIMIT, is_ready.wait_for(|ready| *ready)).await.expect("the node is in service").unwrap();
    world.replica_on("good", "good-0", &world.disk("good").await.disk_uuid).await;
    world.runs("good-0").await;
    let (state, why) = until("the other says why it does not", async || {
        Some(world.replica("hung-11").await).filter(|(state, _)| *state == InstanceState::Error)
    })
    .await;
    assert!(why.contains("has not answered since"), "{state:?}: {why}");

    // The mount is gone, and the disk below it is an ordinary one.
    drop(hung);
    until("it is used again", async || {
        world.readiness("hung").await.filter(|(status, ..)| *status == ConditionStatus::True)
    })
    .await;
    world.stop("good-0").await;
    token.cancel();
    role.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_process_is_told_while_its_disk_hangs() {
    let world = world([127, 83, 11, 8], ["good", "hangs"]).await;
    let (ready, mut is_ready) = tokio::sync::watch::channel(false);
    let token = CancellationToken::new();
    let role = tokio::spawn(run(config(&world, ready), token.clone()));
    is_ready.wait_for(|ready| *ready).await.unwrap();
    let uuid = world.disk("hangs").await.disk_uuid;
    for name in ["ends", "stays"] {
        world.replica_on("hangs", name, &uuid).await;
        world.runs(name).await;
    }
    let hung = Hung::at(&world.path("hangs"));
    until("the disk is told", async || {
        world.readiness("hangs").await.filter(|(status, ..)| *status == ConditionStatus::Unknown)
    })
    .await;
    world.process("ends").unwrap().signal(rustix::process::Signal::KILL).unwrap();
    let why = until("its end is told", async || {
        let (state, why) = world.replica("ends").await;
        (state == InstanceState::Error).then_some(why)
    })
    .await;
    assert!(why.starts_with("the replica process ended"), "{why}");
    assert_eq!(world.replica("stays").await.0, InstanceState::Running, "its engine knows more");
    world.stop("ends").await;
    drop(hung);
    world.stop("stays").await;
    token.cancel();
    role.await.unwrap().unwrap();
}

/// Whether a living process was sent SIGKILL, which waits for it to come back from the disk.
fn is_killed(process: &ProcessIdentity) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let kill = 1 << (rustix::process::Signal::KILL.as_raw() - 1);
    pending.map(|mask| u64::from_str_radix(mask.trim(), 16).unwrap()).any(|mask| mask & kill != 0)
}

/// More than there are workers of the role, each in an uninterruptible wait for the disk once it is asked to end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_cannot_end_hold_up_no_replica_of_another_disk() {
    let world = world([127, 83, 11, 9], ["good", "hangs"]).await;
    let (ready, mut is_ready) = tokio::sync::watch::channel(false);
    let token = CancellationToken::new();
    let role = tokio::spawn(run(config(&world, ready), token.clone()));
    is_ready.wait_for(|ready| *ready).await.unwrap();
    let (bad, good) = (world.disk("hangs").await.disk_uuid, world.disk("good").await.disk_uuid);
    let names: Vec<String> = (0..10).map(|n| format!("bad-{n}")).collect();
    for name in &names {
        world.replica_on("hangs", name, &bad).await;
    }
    for name in &names {
        world.runs(name).await;
    }
    let hung = Hung::at(&world.path("hangs"));
    until("the disk is told", async || {
        world.readiness("hangs").await.filter(|(status, ..)| *status == ConditionStatus::Unknown)
    })
    .await;
    for name in &names {
        world.wish_stopped(name).await;
    }
    for name in &names {
        let is_stopping = async || (world.replica(name).await.0 == InstanceState::Stopping).then_some(());
        until("it is being stopped", is_stopping).await;
    }
    world.replica_on("good", "good-0", &good).await;
    world.runs("good-0").await;
    let processes: Vec<ProcessIdentity> = names.iter().map(|name| world.process(name).unwrap()).collect();
    assert!(processes.iter().all(|p| p.is_alive() && !is_killed(p)), "it waited until one of them was given up");
    let (stuck, before) = until("what is in the way is told", async || {
        for (name, process) in names.iter().zip(&processes) {
            if world.replica(name).await.1.contains("does not end after SIGKILL; it may wait for a disk") {
                return Some((name, process));
            }
        }
        None
    })
    .await;
    let again = |r: &mut Replica| r.spec.desire_state = DesireState::Running;
    world.store.modify::<Replica>(stuck, again).await.unwrap();
    until("no attachment waits for it", async || (world.replica(stuck).await.0 == InstanceState::Error).then_some(()))
        .await;
    assert!(is_killed(before));
    assert_eq!(world.process(stuck).as_ref(), Some(before), "nothing takes its place while it may live");
    drop(hung);
    until("it has ended", async || (!before.is_alive()).then_some(())).await;
    for name in &names {
        world.stop(name).await;
    }
    world.stop("good-0").await;
    token.cancel();
    role.await.unwrap().unwrap();
}
