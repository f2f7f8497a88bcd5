//! Copies between managers: several peers, damage, death, resumption, full disks; and sending to Longhorn's receivers.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use proto::bimrpc::{BackingImageSpec, Bandwidth, SendRequest};
use std::net::SocketAddr;
use support::*;
use tokio::net::TcpListener;

#[track_caller]
fn assert_copied(disk: &TestDisk, bytes: &[u8]) {
    let file = disk.copy_file();
    assert!(std::fs::read(&file).unwrap() == bytes, "the copy has the same bytes");
    let metadata = file.metadata().unwrap();
    assert!(metadata.blocks() * 512 < 10 * MIB as u64, "holes stay holes");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o444);
    assert!(!disk.disk().copy(&key()).partial.exists());
}

/// A peer that serves the copy of a disk, counts what is asked, and fails as told.
struct FakePeer {
    address: SocketAddr,
    ranges: Arc<Mutex<Vec<String>>>,
    hung_up: Arc<AtomicUsize>,
}

#[derive(Clone)]
struct FakeState {
    files: backing_image_agent::layout::FileSet,
    ranges: Arc<Mutex<Vec<String>>>,
    /// Requests for data that are answered; later ones stay silent.
    answers: usize,
    /// Requests whose client went away before an answer.
    hung_up: Arc<AtomicUsize>,
}

/// Counts when it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl FakePeer {
    async fn new(disk: &TestDisk, answers: usize) -> FakePeer {
        let address = address(8000);
        let listener = TcpListener::bind(SocketAddr::new(address.ip(), 8001)).await.unwrap();
        let ranges = Arc::new(Mutex::new(vec![]));
        let hung_up = Arc::new(AtomicUsize::new(0));
        let files = disk.disk().copy(&key());
        let state = FakeState { files, ranges: ranges.clone(), answers, hung_up: hung_up.clone() };
        let app = Router::new()
            .route(
                "/v1/copies/{key}/manifest",
                get(|State(s): State<FakeState>| async move { std::fs::read(s.files.manifest).unwrap() }),
            )
            .route("/v1/copies/{key}/data", get(FakePeer::data))
            .with_state(state);
        tokio::spawn(async move { axum::serve(listener, app).await });
        FakePeer { address, ranges, hung_up }
    }

    async fn data(State(state): State<FakeState>, headers: HeaderMap) -> Response {
        let range = headers["range"].to_str().unwrap().to_owned();
        let number = {
            let mut ranges = state.ranges.lock().unwrap();
            ranges.push(range.clone());
            ranges.len()
        };
        if number > state.answers {
            let _counted = Counted(state.hung_up.clone());
            std::future::pending::<()>().await;
        }
        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        let mut bytes = vec![0; (last - first + 1) as usize];
        File::open(&state.files.file).unwrap().read_exact_at(&mut bytes, first).unwrap();
        (StatusCode::PARTIAL_CONTENT, Body::from(bytes)).into_response()
    }

    fn ranges(&self) -> Vec<String> {
        self.ranges.lock().unwrap().clone()
    }
}

/// Changes a sealed copy and describes it anew, under the SHA-512 that it had.
fn forge(disk: &TestDisk) {
    use backing_image_agent::manifest::{Manifest, hash_chunk};
    damage(disk, 1);
    let files = disk.disk().copy(&key());
    let mut manifest = Manifest::read(&files.manifest).unwrap().unwrap();
    let bytes = std::fs::read(&files.file).unwrap();
    manifest.chunks = bytes.chunks(MIB).map(hash_chunk).collect();
    manifest.write(&files.manifest).unwrap();
}

#[tokio::test]
async fn a_peer_whose_manifest_is_not_that_of_the_image_is_found_out() {
    let ((_disk, good), bytes) = (first().await, image());
    let (bad_disk, _bad) = second(&good).await;
    forge(&bad_disk);
    let bad = FakePeer::new(&bad_disk, usize::MAX).await;

    let target_disk = TestDisk::new();
    let target = RunningManager::start(&target_disk).await;
    let wanted = BackingImageSpec { checksum: sha512(&bytes), size: bytes.len() as i64, ..spec() };
    target.sync(wanted, &[bad.address, good.address]).await.unwrap();
    target.reaches("ready").await;
    assert!(!bad.ranges().is_empty(), "it was asked first");
    assert_copied(&target_disk, &bytes);
}

#[tokio::test]
async fn a_bad_chunk_is_taken_from_another_peer() {
    let ((disk, first), bytes) = (first().await, image());
    let (other_disk, other) = second(&first).await;
    assert_copied(&other_disk, &bytes);

    damage(&disk, 1);
    damage(&other_disk, 8);
    let target_disk = TestDisk::new();
    let target = RunningManager::start(&target_disk).await;
    let wanted = BackingImageSpec { checksum: sha512(&bytes), size: bytes.len() as i64, ..spec() };
    let begun = target.sync(wanted.clone(), &[first.address, other.address]).await.unwrap().status.unwrap();
    assert_eq!(begun.sender_manager_address, format!("{},{}", first.address, other.address));
    let copy = target.reaches("ready").await;
    assert_copied(&target_disk, &bytes);
    assert_eq!((copy.format.as_str(), copy.status.unwrap().checksum), ("raw", sha512(&bytes)));
    let again = target.sync(wanted, &[first.address]).await.unwrap();
    assert_eq!(again.status.unwrap().state, "ready", "a second request finds it done");
}

#[tokio::test]
async fn a_chunk_that_is_bad_everywhere_fails_the_copy_by_name() {
    let (disk, first) = first().await;
    damage(&disk, 8);
    let target_disk = TestDisk::new();
    let target = RunningManager::start(&target_disk).await;
    target.sync(spec(), &[first.address]).await.unwrap();
    let message = target.reaches("failed").await.status.unwrap().error_msg;
    assert!(message.contains("chunk 8 (bytes 8388608 to 9437183)"), "{message}");
    assert!(!target_disk.copy_file().exists());
}

#[tokio::test]
async fn dead_and_wrong_peers_are_left_out() {
    let ((disk, first), bytes) = (first().await, image());
    let empty_disk = TestDisk::new();
    let empty = RunningManager::start(&empty_disk).await;
    let silent = FakePeer::new(&disk, 1).await;

    let target_disk = TestDisk::new();
    let target = RunningManager::start_with(&target_disk, address(8000), Duration::from_millis(1500)).await;
    target.sync(spec(), &[address(8000), empty.address, silent.address, first.address]).await.unwrap();
    target.reaches("ready").await;
    assert_copied(&target_disk, &bytes);

    let alone_disk = TestDisk::new();
    let alone = RunningManager::start(&alone_disk).await;
    alone.sync(spec(), &[address(8000), empty.address]).await.unwrap();
    let message = alone.reaches("failed").await.status.unwrap().error_msg;
    assert!(message.contains("refused") && message.contains("does not have the copy ready"), "{message}");

    for wanted in [BackingImageSpec { checksum: "a".repeat(128), ..spec() }, BackingImageSpec { size: 512, ..spec() }] {
        alone.sync(wanted, &[first.address]).await.unwrap();
        let message = alone.reaches("failed").await.status.unwrap().error_msg;
        assert!(message.contains("is wanted"), "{message}");
    }
    alone.sync(spec(), &[first.address]).await.unwrap();
    alone.reaches("ready").await;
}

#[tokio::test]
async fn a_killed_sync_goes_on_with_what_it_had() {
    let ((disk, _first), bytes) = (first().await, image());
    // One request of eight chunks at most is answered, then silence.
    let silent = FakePeer::new(&disk, 1).await;
    let target_disk = TestDisk::new();
    let target = RunningManager::start(&target_disk).await;
    target.sync(spec(), &[silent.address]).await.unwrap();
    let partial = target_disk.disk().copy(&key()).partial;
    wait_until("a part is there", async || {
        target.get().await.status.unwrap().progress > 20 && silent.ranges().len() > 1
    })
    .await;
    let address = target.address;
    target.kill();
    assert!(partial.exists() && !target_disk.copy_file().exists());
    let answered = silent.ranges()[0].clone();

    let counting = FakePeer::new(&disk, usize::MAX).await;
    wait_until("the address is free", async || TcpListener::bind(address).await.is_ok()).await;
    let target = RunningManager::start_with(&target_disk, address, Duration::from_secs(20)).await;
    let request = proto::bimrpc::GetRequest { name: "parrot".into(), uuid: UUID.into() };
    assert!(target.client().await.get(request).await.is_err(), "half a file is no copy");
    target.sync(spec(), &[counting.address]).await.unwrap();
    target.reaches("ready").await;
    assert_copied(&target_disk, &bytes);
    assert!(!counting.ranges().contains(&answered), "{:?} were asked again", counting.ranges());
    assert!(counting.ranges().len() < 3, "{:?}", counting.ranges());
}

#[tokio::test]
async fn a_damaged_copy_is_repaired_by_the_bad_chunk_only() {
    let ((disk, first), bytes) = (first().await, image());
    let (other_disk, other) = second(&first).await;
    damage(&other_disk, 10);
    touch(&other_disk, SystemTime::now());
    other.reaches("failed").await;

    let counting = FakePeer::new(&disk, usize::MAX).await;
    other.sync(spec(), &[counting.address]).await.unwrap();
    other.reaches("ready").await;
    assert_copied(&other_disk, &bytes);
    assert_eq!(counting.ranges(), ["bytes=10485760-11534335"]);
}

#[tokio::test]
async fn delete_stops_a_running_sync_and_leaves_nothing() {
    let (disk, _first) = first().await;
    let silent = FakePeer::new(&disk, 0).await;
    let target_disk = TestDisk::new();
    let target = RunningManager::start(&target_disk).await;
    target.sync(spec(), &[silent.address]).await.unwrap();
    wait_until("data is asked for", async || !silent.ranges().is_empty()).await;
    let url = target.address.to_string();
    backing_image_agent::client::delete(&url, "parrot", UUID, &Default::default()).await.unwrap();
    assert!(!target_disk.disk().image_dir(&key()).exists());
    assert!(backing_image_agent::client::list(&url, &Default::default()).await.unwrap().is_empty());
}

/// No thread may wait for a peer after its sync has ended: the limit for silence is far beyond that of the test.
#[tokio::test]
async fn a_sync_that_is_stopped_hangs_up() {
    let (disk, _first) = first().await;
    let silent = FakePeer::new(&disk, 0).await;
    let target_disk = TestDisk::new();
    let target = RunningManager::start_with(&target_disk, address(8000), Duration::from_secs(3600)).await;
    target.sync(spec(), &[silent.address]).await.unwrap();
    wait_until("both streams ask", async || silent.ranges().len() == 2).await;
    backing_image_agent::client::delete(&target.address.to_string(), "parrot", UUID, &Default::default())
        .await
        .unwrap();
    wait_until("both streams hang up", async || silent.hung_up.load(Ordering::SeqCst) == 2).await;
}

#[tokio::test]
async fn a_repair_that_is_stopped_hangs_up() {
    let (disk, first) = first().await;
    let silent = FakePeer::new(&disk, 0).await;
    let target_disk = TestDisk::new();
    let target = RunningManager::start_with(&target_disk, address(8000), Duration::from_secs(3600)).await;
    target.sync(spec(), &[first.address]).await.unwrap();
    target.reaches("ready").await;
    damage(&target_disk, 2);
    touch(&target_disk, SystemTime::now());
    target.reaches("failed").await;
    target.sync(spec(), &[silent.address]).await.unwrap();
    wait_until("the chunk is asked for", async || silent.ranges() == ["bytes=2097152-3145727"]).await;
    backing_image_agent::client::delete(&target.address.to_string(), "parrot", UUID, &Default::default())
        .await
        .unwrap();
    wait_until("it hangs up", async || silent.hung_up.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_full_disk_fails_the_sync_and_leaves_nothing() {
    let (_disk, first) = first().await;
    let small = TestDisk::small();
    let target = RunningManager::start(&small).await;
    target.sync(spec(), &[first.address]).await.unwrap();
    let message = target.reaches("failed").await.status.unwrap().error_msg;
    assert!(message.contains("bytes free, the file needs"), "{message}");
    assert!(!small.disk().copy(&key()).partial.exists() && !small.copy_file().exists());
}

/// What describes a damaged copy stays as long as that: by it the copy is repaired where it lies, without more room.
#[tokio::test]
async fn a_full_disk_keeps_what_a_damaged_copy_can_be_repaired_by() {
    let (_disk, first) = first().await;
    // For the copy and what goes with it, not for another one.
    let full = TestDisk::with_room(image().len() - 3 * MIB + 64 * 4096);
    let target = RunningManager::start(&full).await;
    target.sync(spec(), &[first.address]).await.unwrap();
    target.reaches("ready").await;
    let files = full.disk().copy(&key());
    for chunk in [0, 1] {
        let file = File::options().write(true).open(&files.file).unwrap();
        file.write_all_at(b"damage", chunk * MIB as u64).unwrap();
    }
    touch(&full, SystemTime::now());
    target.reaches("failed").await;
    // As if it had been begun to be made anew.
    std::fs::write(&files.partial, "x").unwrap();
    target.sync(spec(), &[first.address]).await.unwrap();
    wait_until("there is no room", async || target.get().await.error_kind == "Exhausted").await;
    assert!(!files.partial.exists() && files.manifest.exists());
    target.sync(spec(), &[first.address]).await.unwrap();
    let copy = target.reaches("ready").await;
    assert!(copy.damage.contains("2 of 13 chunks differed"), "{}", copy.damage);
    assert!(std::fs::read(&files.file).unwrap() == image());
}

/// Room that is found to be missing only while chunks are written, or after them all, when the file gets its name.
#[tokio::test]
async fn a_disk_that_turns_out_to_be_full_late_keeps_nothing_either() {
    let ((disk, _first), bytes) = (first().await, image());
    let data_bytes = bytes.len() - 3 * MIB;
    // The chunks and the file of the disk.
    let needed = data_bytes.next_multiple_of(4096) + 4096;
    let cases = [
        (TestDisk::with_room(needed), "backing.chunks"),
        (TestDisk::with_room(needed + 4096), "backing.cfg"),
        // The chunks alone would have room, but not with the blocks in which the filesystem keeps where they are.
        (TestDisk::that_cannot_reserve(data_bytes as u64), "backing.tmp"),
        // Nothing can be reserved, but the free space is known.
        (TestDisk::that_cannot_reserve(data_bytes as u64 - 16384), "bytes free, the file needs 9438720"),
    ];
    for (number, (full, sentence)) in cases.into_iter().enumerate() {
        let counting = FakePeer::new(&disk, usize::MAX).await;
        let target = RunningManager::start(&full).await;
        target.sync(spec(), &[counting.address]).await.unwrap();
        let message = target.reaches("failed").await.status.unwrap().error_msg;
        assert!(message.contains(sentence), "{number}: {message}");
        let is_late = number < 3;
        assert!(message.contains("No space left on device") == is_late, "{number}: {message}");
        assert!(counting.ranges().is_empty() != is_late, "{number}: {:?}", counting.ranges());
        let left: Vec<_> = std::fs::read_dir(full.disk().image_dir(&key())).unwrap().collect();
        assert!(left.is_empty(), "{number}: {left:?}");
        assert_eq!(full.temporary_files(), Vec::<String>::new(), "{number}");
    }
}

#[tokio::test]
async fn the_peer_port_only_reads_ready_copies() {
    let ((_disk, manager), bytes) = (first().await, image());
    let base = format!("http://{}:8001/v1/copies", manager.address.ip());
    let client = http();
    let ask = async |path: &str, range: Option<&str>| {
        let mut request = client.get(format!("{base}/{path}"));
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.bytes().await.unwrap())
    };
    let (status, body) = ask("parrot-0a1b2c3d/data", Some("bytes=10-19")).await;
    assert_eq!((status, &body[..]), (206, &bytes[10..20]));
    assert_eq!(ask("parrot-0a1b2c3d/data", None).await.0, 416);
    assert_eq!(ask("parrot-0a1b2c3d/data", Some("bytes=0-99999999")).await.0, 416);
    assert_eq!(ask("parrot-0a1b2c3d/data", Some("bytes=9-5")).await.0, 416);
    assert_eq!(ask("parrot-ffffffff/data", Some("bytes=0-1")).await.0, 404);
    assert_eq!(ask("..%2F..%2Fetc/data", Some("bytes=0-1")).await.0, 400);
    let response = client.delete(format!("{base}/parrot-0a1b2c3d/data")).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 405);
    wait_until("nothing is being sent", async || manager.get().await.status.unwrap().sending_reference == 0).await;
}

/// From outside, that is: nobody would know when the thread that reads it never ended.
#[tokio::test]
async fn a_copy_that_is_cut_short_while_it_is_read_ends_the_transfer() {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    // More than what is on its way at one time.
    let mut bytes = vec![0; 64 * MIB];
    bytes[0] = 1;
    prepare(&disk, &manager, &bytes).await;
    let url = format!("http://{}:8001/v1/copies/parrot-0a1b2c3d/data", manager.address.ip());
    let range = format!("bytes=0-{}", bytes.len() - 1);
    let mut response = http().get(url).header("Range", range).send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    File::options().write(true).open(disk.copy_file()).unwrap().set_len(0).unwrap();
    let rest = async {
        while response.chunk().await?.is_some() {}
        Ok::<_, reqwest::Error>(())
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), rest).await.expect("it ends");
    assert!(ended.is_err(), "not as if it were whole");
    wait_until("nothing is being sent", async || manager.get().await.status.unwrap().sending_reference == 0).await;
}

/// A receiver as Longhorn's: writes what it gets into memory.
#[derive(Clone, Default)]
struct Receiver {
    bytes: Arc<Mutex<Vec<u8>>>,
    calls: Arc<Mutex<Vec<&'static str>>>,
    /// So many requests with data are refused first.
    refusals: Arc<AtomicUsize>,
}

type Range = Query<BTreeMap<String, String>>;

fn number(query: &Range, key: &str) -> usize {
    query.0[key].parse().unwrap()
}

impl Receiver {
    async fn start(&self) -> SocketAddr {
        let address = address(30001);
        self.start_at(address).await;
        address
    }

    async fn start_at(&self, address: SocketAddr) {
        let listener = TcpListener::bind(address).await.unwrap();
        let app = Router::new()
            .route(
                "/v1-ssync/open",
                get(|State(r): State<Receiver>, query: Range| async move {
                    r.calls.lock().unwrap().push("open");
                    *r.bytes.lock().unwrap() = vec![0xff; number(&query, "end")];
                    "false"
                }),
            )
            .route(
                "/v1-ssync/sendHole",
                post(|State(r): State<Receiver>, query: Range| async move {
                    r.calls.lock().unwrap().push("hole");
                    r.bytes.lock().unwrap()[number(&query, "begin")..number(&query, "end")].fill(0);
                }),
            )
            .route(
                "/v1-ssync/writeData",
                post(|State(r): State<Receiver>, query: Range, body: Bytes| async move {
                    let refuse = |left: usize| left.checked_sub(1);
                    if r.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refuse).is_ok() {
                        return StatusCode::INTERNAL_SERVER_ERROR;
                    }
                    r.calls.lock().unwrap().push("data");
                    r.bytes.lock().unwrap()[number(&query, "begin")..number(&query, "end")].copy_from_slice(&body);
                    StatusCode::OK
                })
                .layer(axum::extract::DefaultBodyLimit::disable()),
            )
            .route(
                "/v1-ssync/close",
                post(|State(r): State<Receiver>| async move { r.calls.lock().unwrap().push("close") }),
            )
            .with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
    }
}

#[tokio::test]
async fn a_receiver_that_is_still_starting_is_waited_for() {
    let (_disk, manager) = first().await;
    let (receiver, address) = (Receiver::default(), address(30001));
    let early = TcpListener::bind(address).await.unwrap();
    let request = SendRequest { name: "parrot".into(), uuid: UUID.into(), to_address: address.to_string() };
    manager.client().await.send(request).await.unwrap();
    let (connection, _) = early.accept().await.unwrap();
    drop(early);
    drop(connection);
    wait_until("the address is free", async || TcpListener::bind(address).await.is_ok()).await;
    receiver.start_at(address).await;
    wait_until("the receiver is closed", async || receiver.calls.lock().unwrap().last() == Some(&"close")).await;
    assert!(*receiver.bytes.lock().unwrap() == image());
}

#[tokio::test]
async fn a_copy_is_sent_to_longhorns_receiver() {
    let (disk, bytes) = (TestDisk::new(), image());
    let manager = RunningManager::start(&disk).await;
    let request = |to: String| SendRequest { name: "parrot".into(), uuid: UUID.into(), to_address: to };
    let error = manager.client().await.send(request("127.0.0.1:1".into())).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound);
    prepare(&disk, &manager, &bytes).await;
    let receiver = Receiver::default();
    let address = receiver.start().await;
    manager.client().await.send(request(address.to_string())).await.unwrap();
    wait_until("the receiver is closed", async || receiver.calls.lock().unwrap().last() == Some(&"close")).await;
    assert!(*receiver.bytes.lock().unwrap() == bytes);
    let calls = receiver.calls.lock().unwrap().clone();
    assert_eq!(calls.iter().filter(|call| **call == "hole").count(), 1, "{calls:?}");
    assert_eq!(calls[0], "open");
    tokio::time::timeout(Duration::from_secs(5), async {
        wait_until("nothing is being sent", async || manager.get().await.status.unwrap().sending_reference == 0).await;
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn longhorns_receiver_gets_a_copy_no_faster_than_the_limit() {
    let (_disk, manager) = first().await;
    let limits = Bandwidth { total: 6 << 20, ..Default::default() };
    manager.client().await.limit_bandwidth(limits).await.unwrap();
    let receiver = Receiver::default();
    let to_address = receiver.start().await.to_string();
    let begun = std::time::Instant::now();
    let request = SendRequest { name: "parrot".into(), uuid: UUID.into(), to_address };
    manager.client().await.send(request).await.unwrap();
    wait_until("the receiver is closed", async || receiver.calls.lock().unwrap().last() == Some(&"close")).await;
    // 9 MiB, less what goes at once.
    assert!(begun.elapsed() >= Duration::from_millis(1375), "{:?}", begun.elapsed());
    assert!(*receiver.bytes.lock().unwrap() == image());
}

/// To be closed is the receiver's sign that all of the file is there.
#[tokio::test]
async fn a_receiver_that_refuses_is_asked_again_and_closed_only_when_it_has_taken_everything() {
    let (_disk, manager) = first().await;
    for (refusals, is_closed) in [(2, true), (usize::MAX, false)] {
        let receiver = Receiver { refusals: Arc::new(AtomicUsize::new(refusals)), ..Default::default() };
        let to_address = receiver.start().await.to_string();
        let request = SendRequest { name: "parrot".into(), uuid: UUID.into(), to_address };
        manager.client().await.send(request).await.unwrap();
        wait_until("nothing is being sent", async || manager.get().await.status.unwrap().sending_reference == 0).await;
        assert!(receiver.refusals.load(Ordering::SeqCst) != refusals, "it was asked");
        assert_eq!(receiver.calls.lock().unwrap().contains(&"close"), is_closed);
        assert_eq!(*receiver.bytes.lock().unwrap() == image(), is_closed);
    }
}
