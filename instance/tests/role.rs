//! The instance role with real replica processes: start, adoption, death, removal.

#[path = "../../runtime/tests/authority/mod.rs"]
mod authority;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::engine::{DesireState, EngineSpec, EngineStatus, InstanceState};
use api::image::{BackingImageSpec, BackingImageStatus, CopyState, DiskFileStatus};
use api::names::FINALIZER;
use api::node::{DiskSpec, NodeSpec};
use api::quantity::SizeBytes;
use api::replica::{ReplicaSpec, ReplicaStatus};
use api::{BackingImage, Engine, Node, Replica};
use authority::Authority;
use backing_image_instance::{Config, run};
use futures::StreamExt;
use runtime::transport::{Identity, PEER_NAME, Security};
use store::embedded::Embedded;
use store::{Preconditions, Store, TypedEvent};
use tokio_util::sync::CancellationToken;

const NAME: &str = "vol-r-1";

fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples/replica")
}

/// An address for the ports of one test's node, as each node has one.
fn address(folder: &Path) -> IpAddr {
    let mut hasher = DefaultHasher::new();
    folder.hash(&mut hasher);
    let [a, b, c, ..] = hasher.finish().to_le_bytes();
    [127, a, b, c | 1].into()
}

fn config(store: &Store, folder: &Path) -> Config {
    Config {
        node: "node-1".parse().unwrap(),
        ip: address(folder),
        directory: folder.join("instance"),
        program: program(),
        store: store.clone(),
        create_disks: true,
        discover: false,
        disk_owner: None,
        engines: Default::default(),
        security: Default::default(),
        metrics: Default::default(),
        ready: Default::default(),
    }
}

async fn disk_uuid(store: &Store) -> String {
    loop {
        let node = store.get::<Node>("node-1").await.unwrap().unwrap();
        match node.status.and_then(|s| s.disk_status.get("d").map(|d| d.disk_uuid.clone())) {
            Some(uuid) if !uuid.is_empty() => return uuid,
            _ => tokio::task::yield_now().await,
        }
    }
}

async fn until(store: &Store, what: &str, is_it: impl Fn(Option<&Replica>) -> bool) -> Option<Replica> {
    let wait = async {
        loop {
            let replica = store.get::<Replica>(NAME).await.unwrap();
            if is_it(replica.as_ref()) {
                return replica;
            }
            tokio::task::yield_now().await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(30), wait).await {
        Ok(replica) => replica,
        Err(_) => panic!("never {what}: {:#?}", store.get::<Replica>(NAME).await.unwrap().and_then(|r| r.status)),
    }
}

fn state(replica: Option<&Replica>) -> Option<InstanceState> {
    replica?.status.as_ref().map(|s| s.current_state)
}

fn status(replica: Option<Replica>) -> ReplicaStatus {
    replica.unwrap().status.unwrap()
}

async fn wish(store: &Store, desire: DesireState) {
    loop {
        let mut replica = store.get::<Replica>(NAME).await.unwrap().unwrap();
        replica.spec.desire_state = desire;
        match store.replace(&replica).await {
            Ok(_) => return,
            Err(error) => assert!(error.is_conflict(), "{error}"),
        }
    }
}

fn pid(folder: &Path) -> u32 {
    let text = std::fs::read(folder.join("instance/replicas").join(NAME).join("process.json")).unwrap();
    serde_json::from_slice::<serde_json::Value>(&text).unwrap()["identity"]["pid"].as_u64().unwrap() as u32
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_waits_for_its_image_runs_is_adopted_dies_and_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let disk_path = folder.path().join("disk-1");
    let disks = [("d".to_owned(), DiskSpec { path: disk_path.display().to_string(), ..Default::default() })];
    let node = NodeSpec { name: "node-1".into(), disks: disks.into(), ..Default::default() };
    store.create(&Node::new("node-1", node)).await.unwrap();
    let mut token = CancellationToken::new();
    let mut role = tokio::spawn(run(config(&store, folder.path()), token.clone()));
    let uuid = disk_uuid(&store).await;

    let mut image = store.create(&BackingImage::new("img", BackingImageSpec::default())).await.unwrap();
    let spec = ReplicaSpec {
        volume_name: "vol".into(),
        volume_size: SizeBytes(16 << 20),
        node_id: "node-1".into(),
        desire_state: DesireState::Running,
        disk_id: uuid.clone(),
        disk_path: disk_path.display().to_string(),
        data_directory_name: "vol-01234567".into(),
        backing_image: "img".into(),
        ..Default::default()
    };
    let mut replica = Replica::new(NAME, spec);
    replica.metadata.finalizers = Some(vec![FINALIZER.into()]);
    store.create(&replica).await.unwrap();
    until(&store, "waiting", |r| {
        r.and_then(|r| r.status.as_ref())
            .is_some_and(|s| s.conditions.iter().any(|c| c.r#type == "WaitForBackingImage" && c.is_true()))
    })
    .await;

    let copies = disk_path.join("backing-images/img-0123abcd");
    std::fs::create_dir_all(&copies).unwrap();
    std::fs::write(copies.join("backing"), vec![1; 1 << 20]).unwrap();
    let copy = DiskFileStatus { state: CopyState::Ready, ..Default::default() };
    image.status = Some(BackingImageStatus {
        uuid: "0123abcd".into(),
        format: "raw".into(),
        disk_file_status_map: [(uuid, copy)].into(),
        ..Default::default()
    });
    store.replace_status(&image).await.unwrap();
    let running = status(until(&store, "running", |r| state(r) == Some(InstanceState::Running)).await);
    assert!(running.port >= 10_000 && running.clean && running.generation == 0);
    let first = pid(folder.path());

    token.cancel();
    role.await.unwrap().unwrap();
    token = CancellationToken::new();
    role = tokio::spawn(run(config(&store, folder.path()), token.clone()));
    wish(&store, DesireState::Running).await;
    until(&store, "running again", |r| state(r) == Some(InstanceState::Running)).await;
    assert_eq!(pid(folder.path()), first);

    let victim = rustix::process::Pid::from_raw(first as i32).unwrap();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();
    until(&store, "an error", |r| state(r) == Some(InstanceState::Error)).await;
    wish(&store, DesireState::Stopped).await;
    until(&store, "stopped", |r| state(r) == Some(InstanceState::Stopped)).await;
    // A loss of power cut off a write of its record.
    let unfinished = disk_path.join("replicas/vol-01234567/replica.json.writing");
    std::fs::write(&unfinished, "{").unwrap();
    token.cancel();
    role.await.unwrap().unwrap();
    token = CancellationToken::new();
    role = tokio::spawn(run(config(&store, folder.path()), token.clone()));
    let removed = async {
        while unfinished.exists() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), removed).await.unwrap();
    wish(&store, DesireState::Running).await;
    until(&store, "running after the death", |r| state(r) == Some(InstanceState::Running)).await;
    assert_ne!(pid(folder.path()), first);

    store.delete::<Replica>(NAME, &Preconditions::default()).await.unwrap();
    until(&store, "gone", |r| r.is_none()).await;
    assert!(!disk_path.join("replicas/vol-01234567").exists());
    assert!(!folder.path().join("instance/replicas").join(NAME).exists());
    token.cancel();
    role.await.unwrap().unwrap();
}

/// A node is in service from then on, so what is known of it is to be true by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_ready_when_its_disks_are_reported_and_its_replicas_were_come_to() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let path = folder.path().join("disk-1").display().to_string();
    let disks = [("d".to_owned(), DiskSpec { path: path.clone(), ..Default::default() })];
    let node = NodeSpec { name: "node-1".into(), disks: disks.into(), ..Default::default() };
    let mut node = Node::new("node-1", node);
    node.metadata.labels = Some([("topology.kubernetes.io/zone".to_owned(), "east".to_owned())].into());
    store.create(&node).await.unwrap();
    let run_until_ready = async || {
        let (ready, mut is_ready) = tokio::sync::watch::channel(false);
        let token = CancellationToken::new();
        let role = tokio::spawn(run(Config { ready, ..config(&store, folder.path()) }, token.clone()));
        let in_time = tokio::time::timeout(Duration::from_secs(20), is_ready.wait_for(|ready| *ready)).await;
        in_time.expect("it is ready in time").unwrap();
        (token, role)
    };
    let (token, role) = run_until_ready().await;
    let node = store.get::<Node>("node-1").await.unwrap().unwrap();
    let status = node.status.unwrap();
    assert_eq!(status.zone, "east", "without Kubernetes the object's own label says where the machine stands");
    let uuid = status.disk_status["d"].disk_uuid.clone();
    assert!(!uuid.is_empty());
    token.cancel();
    role.await.unwrap().unwrap();

    let spec = |node: &str| ReplicaSpec {
        volume_name: "vol".into(),
        volume_size: SizeBytes(16 << 20),
        node_id: node.into(),
        disk_id: uuid.clone(),
        disk_path: path.clone(),
        data_directory_name: "vol-01234567".into(),
        desire_state: DesireState::Running,
        ..Default::default()
    };
    let mut replica = Replica::new(NAME, spec("node-1"));
    replica.metadata.finalizers = Some(vec![FINALIZER.into()]);
    store.create(&replica).await.unwrap();
    store.create(&Replica::new("elsewhere", spec("node-2"))).await.unwrap();
    let (token, role) = run_until_ready().await;
    // Its process was started meanwhile, which takes longer than a look at the disk.
    assert_eq!(state(store.get::<Replica>(NAME).await.unwrap().as_ref()), Some(InstanceState::Running));
    store.delete::<Replica>(NAME, &Preconditions::default()).await.unwrap();
    until(&store, "gone", |r| r.is_none()).await;
    token.cancel();
    role.await.unwrap().unwrap();
}

async fn reported(store: &Store, is_it: impl Fn(&EngineStatus) -> bool) -> EngineStatus {
    let wait = async {
        loop {
            let status = store.get::<Engine>("vol-e").await.unwrap().unwrap().status.unwrap_or_default();
            if is_it(&status) {
                return status;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("the engine's state is reported")
}

/// An engine may raise its generation and end before anybody hears of it; and a role that knows of no engine must not lower it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_takes_over_the_generation_that_an_engine_left_and_never_lowers_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    store.create(&Node::new("node-1", NodeSpec { name: "node-1".into(), ..Default::default() })).await.unwrap();
    let left = folder.path().join("instance/engines/vol-e/control.sock.generation");
    std::fs::create_dir_all(left.parent().unwrap()).unwrap();
    std::fs::write(&left, r#"{"generation":9,"members":["r1"]}"#).unwrap();
    let spec = EngineSpec {
        volume_name: "vol".into(),
        node_id: "node-1".into(),
        desire_state: DesireState::Stopped,
        ..Default::default()
    };
    let mut engine = Engine::new("vol-e", spec);
    engine.metadata.finalizers = Some(vec![FINALIZER.into()]);
    store.create(&engine).await.unwrap();
    for (before, after) in [(7, 9), (11, 11)] {
        let mut engine = store.get::<Engine>("vol-e").await.unwrap().unwrap();
        engine.status = Some(EngineStatus { generation: before, ..Default::default() });
        store.replace_status(&engine).await.unwrap();
        let token = CancellationToken::new();
        let role = tokio::spawn(run(config(&store, folder.path()), token.clone()));
        let status = reported(&store, |status| status.owner_id == "node-1").await;
        assert_eq!((status.current_state, status.generation), (InstanceState::Stopped, after));
        token.cancel();
        role.await.unwrap().unwrap();
        std::fs::remove_dir_all(left.parent().unwrap()).unwrap_or_default();
    }
}

/// Replicas and engines are processes of their own: they read the files themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_and_engines_are_told_where_the_certificates_are() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = folder.path().join("certificates");
    std::fs::create_dir(&certificates).unwrap();
    let authority = Authority::new();
    authority.issue(&certificates);
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let disk_path = folder.path().join("disk-1");
    let disks = [("d".to_owned(), DiskSpec { path: disk_path.display().to_string(), ..Default::default() })];
    let node = NodeSpec { name: "node-1".into(), disks: disks.into(), ..Default::default() };
    store.create(&Node::new("node-1", node)).await.unwrap();
    // The first pair of ports of this address is nobody else's.
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    let config = Config { ip: [127, 79, high, low].into(), ..config(&store, folder.path()) };
    let in_memory = Config { security: authority.member(), ..config.clone() };
    let refused = tokio::time::timeout(Duration::from_secs(30), run(in_memory, CancellationToken::new()));
    let error = refused.await.expect("it does not begin").unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::Invalid);
    assert!(error.to_string().contains("give it a directory"), "{error}");

    let security = Security::from_directory(Some(&certificates)).unwrap();
    let token = CancellationToken::new();
    let role = tokio::spawn(run(Config { security, ..config.clone() }, token.clone()));
    let spec = ReplicaSpec {
        volume_name: "vol".into(),
        volume_size: SizeBytes(16 << 20),
        node_id: "node-1".into(),
        desire_state: DesireState::Running,
        disk_id: disk_uuid(&store).await,
        disk_path: disk_path.display().to_string(),
        data_directory_name: "vol-01234567".into(),
        ..Default::default()
    };
    let mut replica = Replica::new(NAME, spec);
    replica.metadata.finalizers = Some(vec![FINALIZER.into()]);
    store.create(&replica).await.unwrap();
    let running = status(until(&store, "running", |r| state(r) == Some(InstanceState::Running)).await);
    let (ip, port) = (config.ip, running.port);
    let asked = tokio::task::spawn_blocking(move || {
        let stream = std::net::TcpStream::connect((ip, port + 1)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut stream = authority.member().secure(stream).unwrap();
        stream.write_all(b"{\"request\":\"status\"}\n").unwrap();
        let mut line = String::new();
        std::io::BufReader::new(stream).read_line(&mut line).unwrap();
        line
    });
    assert!(asked.await.unwrap().contains("\"record\""));

    let spec = EngineSpec {
        volume_name: "vol".into(),
        volume_size: SizeBytes(16 << 20),
        node_id: "node-1".into(),
        desire_state: DesireState::Running,
        replica_address_map: [(NAME.to_owned(), format!("{ip}:{port}"))].into(),
        ..Default::default()
    };
    store.create(&Engine::new("vol-e", spec)).await.unwrap();
    // The program of this test is no engine; what one would read is there.
    let file = folder.path().join("instance/engines/vol-e/config.json");
    let told = async {
        loop {
            match std::fs::read(&file) {
                Ok(text) => break serde_json::from_slice::<proto::engine::Config>(&text).unwrap(),
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(30), told).await.unwrap();
    assert_eq!(told.certificates.as_deref(), Some(certificates.as_path()));

    store.delete::<Replica>(NAME, &Preconditions::default()).await.unwrap();
    until(&store, "gone", |r| r.is_none()).await;
    token.cancel();
    role.await.unwrap().unwrap();
}

/// The user took its disk off, and has another one at the same path.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_goes_although_another_disk_took_the_place_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let disk_path = folder.path().join("disk-1");
    let disks = [("d".to_owned(), DiskSpec { path: disk_path.display().to_string(), ..Default::default() })];
    let node = NodeSpec { name: "node-1".into(), disks: disks.into(), ..Default::default() };
    store.create(&Node::new("node-1", node)).await.unwrap();
    let token = CancellationToken::new();
    let role = tokio::spawn(run(config(&store, folder.path()), token.clone()));
    disk_uuid(&store).await;
    // What the other disk has under the same name is not the replica's.
    let theirs = disk_path.join("replicas/vol-01234567/precious");
    std::fs::create_dir_all(theirs.parent().unwrap()).unwrap();
    std::fs::write(&theirs, "theirs").unwrap();
    let spec = ReplicaSpec {
        volume_name: "vol".into(),
        node_id: "node-1".into(),
        disk_id: "the-old-one".into(),
        disk_path: disk_path.display().to_string(),
        data_directory_name: "vol-01234567".into(),
        ..Default::default()
    };
    let mut replica = Replica::new(NAME, spec);
    replica.metadata.finalizers = Some(vec![FINALIZER.into()]);
    store.create(&replica).await.unwrap();
    let mut events = store.watch::<Replica>().await.unwrap();
    store.delete::<Replica>(NAME, &Preconditions::default()).await.unwrap();
    let mut last_words = String::new();
    let gone = async {
        while let Some(event) = events.next().await {
            match event.unwrap() {
                TypedEvent::Applied(replica) => {
                    let said = replica.status.unwrap_or_default().conditions;
                    last_words = said.into_iter().map(|c| format!("{}: {}", c.reason, c.message)).collect();
                }
                TypedEvent::Deleted(_) => return,
                TypedEvent::Relist => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("it goes");
    assert!(last_words.contains("DataLeftBehind: ") && last_words.contains("disk the-old-one"), "{last_words}");
    assert_eq!(std::fs::read(&theirs).unwrap(), b"theirs");
    token.cancel();
    role.await.unwrap().unwrap();
}
