//! Downloads that are interrupted, also by the death of the data source: nothing is fetched twice that need not be, nothing is mixed.

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use api::ErrorKind;
use api::image::CopyState;
use backing_image_agent::data_source::{self, FileStatus};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A data source with a runtime of its own, so that it can be killed with all that it was doing.
struct MortalSource(tokio::runtime::Runtime);

impl MortalSource {
    async fn start(config: data_source::Config) -> MortalSource {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let address = config.listen;
        runtime.spawn(data_source::run(config, CancellationToken::new()));
        wait_for_port(address).await;
        MortalSource(runtime)
    }

    fn kill(self) {
        self.0.shutdown_background();
    }
}

/// How many bytes of the partial file are recorded as safe.
fn safe_bytes(disk: &TestDisk) -> u64 {
    let text = std::fs::read_to_string(disk.disk().source(&key()).unfinished).unwrap_or_default();
    serde_json::from_str::<serde_json::Value>(&text).map_or(0, |record| record["durableBytes"].as_u64().unwrap())
}

/// Answers the first request with the head of `bytes` and then silence; later ones as `later` says. Counts what it sends.
async fn interrupted(
    bytes: &[u8],
    head: usize,
    validator: &'static str,
    later: impl Fn(&str) -> Reply + Send + Sync + 'static,
) -> (Source, Arc<AtomicUsize>) {
    let (body, served) = (bytes.to_vec(), Arc::new(AtomicUsize::new(0)));
    let count = served.clone();
    let source = Source::new(move |number, request| {
        let reply = match number {
            1 if validator.is_empty() => Reply::whole(&body).cut(head).stalled(),
            1 => Reply::whole(&body).with(validator).cut(head).stalled(),
            _ => later(request),
        };
        count.fetch_add(reply.body.len(), Ordering::SeqCst);
        reply
    })
    .await;
    (source, served)
}

/// Lets a first data source receive `head` bytes and kills it; returns what the second one says until it ends.
async fn second_life(disk: &TestDisk, source: &Source, head: usize, checksum: Option<&str>) -> Vec<FileStatus> {
    let url = source.url();
    let config = source_config(disk, &[("url", &url)], checksum);
    let first = MortalSource::start(config.clone()).await;
    let whole_chunks = (head / MIB * MIB) as u64;
    wait_until("what came is safe", async || safe_bytes(disk) == whole_chunks).await;
    first.kill();
    RunningSource::start(data_source::Config { listen: address(8000), ..config }).await.history().await
}

#[track_caller]
fn assert_prepared(disk: &TestDisk, status: &FileStatus, bytes: &[u8]) {
    assert_eq!(status.state, CopyState::ReadyForTransfer, "{}", status.message);
    assert_eq!(status.current_checksum, sha512(bytes));
    assert!(std::fs::read(disk.disk().source(&key()).file).unwrap() == bytes, "the bytes are those of the source");
    let mut files = disk.temporary_files();
    files.sort();
    assert_eq!(files, ["parrot-0a1b2c3d", "parrot-0a1b2c3d.cfg", "parrot-0a1b2c3d.chunks"]);
}

#[track_caller]
fn assert_says(history: &[FileStatus], wanted: &str) {
    assert!(history.iter().any(|status| status.message.contains(wanted)), "{history:?}");
}

#[tokio::test]
async fn a_killed_data_source_goes_on_with_what_it_had() {
    let (disk, bytes) = (TestDisk::new(), image());
    let (body, head) = (bytes.clone(), bytes.len() / 2 + 1000);
    let (source, served) = interrupted(&bytes, head, "ETag: \"v1\"", move |request| match range_start(request) {
        Some(start) => partial(&body, start),
        None => Reply::status("400 Bad Request"),
    })
    .await;
    let history = second_life(&disk, &source, head, Some(&sha512(&bytes))).await;
    assert_prepared(&disk, history.last().unwrap(), &bytes);
    assert_says(&history, "went on after the first 6291456 bytes");
    let requests = source.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(range_start(&requests[1]), Some(6 * MIB));
    assert!(requests[1].to_ascii_lowercase().contains("if-range: \"v1\""), "{}", requests[1]);
    let served = served.load(Ordering::SeqCst);
    assert!(served <= bytes.len() + MIB, "{served} bytes were served");
}

#[tokio::test]
async fn a_killed_data_source_begins_again_where_it_must_and_says_why() {
    let cases = [
        ("", false, "neither ETag nor Last-Modified"),
        ("ETag: W/\"weak\"", false, "neither ETag nor Last-Modified"),
        ("ETag: \"v1\"", false, "does not support ranges, or its file has changed"),
        ("ETag: \"v1\"", true, "does not support ranges, or its file has changed"),
    ];
    for (validator, changes, reason) in cases {
        let (disk, mut bytes) = (TestDisk::new(), image());
        let old = bytes.clone();
        if changes {
            // As long as before, and different from its first byte to its last.
            bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
        }
        let body = bytes.clone();
        let (source, _) = interrupted(&old, 5 * MIB, validator, move |_| Reply::whole(&body)).await;
        let history = second_life(&disk, &source, 5 * MIB, None).await;
        assert_prepared(&disk, history.last().unwrap(), &bytes);
        assert_says(&history, "began again from the first byte");
        assert_says(&history, reason);
        assert_eq!(source.requests().len(), 2, "{validator}");
    }
}

#[tokio::test]
async fn another_address_is_not_continued() {
    let (disk, bytes) = (TestDisk::new(), image());
    let (source, _) = interrupted(&bytes, 5 * MIB, "ETag: \"v1\"", |_| Reply::status("400 Bad Request")).await;
    let first = MortalSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    wait_until("what came is safe", async || safe_bytes(&disk) == 5 << 20).await;
    first.kill();
    let other = Source::of(&bytes).await;
    let running = RunningSource::start(source_config(&disk, &[("url", &other.url())], None)).await;
    let history = running.history().await;
    assert_prepared(&disk, history.last().unwrap(), &bytes);
    assert_says(&history, "from another address");
    assert_eq!(range_start(&other.requests()[0]), None);
}

#[tokio::test]
async fn a_part_that_was_damaged_meanwhile_costs_a_second_download_only() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let (source, _) = interrupted(&bytes, 5 * MIB, "ETag: \"v1\"", move |request| match range_start(request) {
        Some(start) => partial(&body, start),
        None => Reply::whole(&body),
    })
    .await;
    let url = source.url();
    let config = source_config(&disk, &[("url", &url)], Some(&sha512(&bytes)));
    let first = MortalSource::start(config.clone()).await;
    wait_until("what came is safe", async || safe_bytes(&disk) == 5 << 20).await;
    first.kill();
    let part = std::fs::File::options().write(true).open(disk.disk().source(&key()).partial).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&part, b"damage", 12345).unwrap();
    let history = RunningSource::start(data_source::Config { listen: address(8000), ..config }).await.history().await;
    assert_prepared(&disk, history.last().unwrap(), &bytes);
    assert_says(&history, "with what an earlier process had it is not a valid image");
}

#[tokio::test]
async fn a_part_that_is_everything_needs_no_server() {
    let (disk, bytes) = (TestDisk::new(), image()[..4 * MIB].to_vec());
    let files = disk.disk().source(&key());
    std::fs::create_dir(disk.path().join("tmp")).unwrap();
    std::fs::write(&files.partial, &bytes).unwrap();
    let nobody = format!("http://{}/x", address(9));
    let record = serde_json::json!({
        "address": nobody, "queryHash": blake3::hash(b"").to_hex().to_string(), "length": 4 * MIB,
        "validator": "\"v1\"", "durableBytes": 4 * MIB,
    });
    std::fs::write(&files.unfinished, record.to_string()).unwrap();
    let status = RunningSource::start(source_config(&disk, &[("url", &nobody)], None)).await.end().await;
    assert_prepared(&disk, &status, &bytes);
}

#[tokio::test]
async fn a_failed_or_ended_preparation_leaves_no_part() {
    let disk = TestDisk::new();
    let (source, _) = interrupted(&image(), 5 * MIB, "ETag: \"v1\"", |_| Reply::status("404 Not Found")).await;
    let url = source.url();
    let mut config = source_config(&disk, &[("url", &url)], None);
    config.patience.idle_timeout = Duration::from_millis(500);
    let running = RunningSource::start(config.clone()).await;
    assert_eq!(running.end().await.state, CopyState::Failed);
    assert_eq!(disk.temporary_files(), Vec::<String>::new());

    let (source, _) = interrupted(&image(), 5 * MIB, "ETag: \"v1\"", |_| Reply::status("404 Not Found")).await;
    let url = source.url();
    let config = data_source::Config { listen: address(8000), ..source_config(&disk, &[("url", &url)], None) };
    let shutdown = CancellationToken::new();
    let role = tokio::spawn(data_source::run(config, shutdown.clone()));
    wait_until("a part is there", async || safe_bytes(&disk) == 5 << 20).await;
    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(20), role).await.expect("it ends soon").unwrap().unwrap();
    assert_eq!(disk.temporary_files(), Vec::<String>::new());
}

#[tokio::test]
async fn a_transfer_of_unknown_length_that_breaks_goes_on_too() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |number, request| match (number, range_start(request)) {
        (1, _) => {
            let mut chunk = format!("{:x}\r\n", 3 * MIB).into_bytes();
            chunk.extend_from_slice(&body[..3 * MIB]);
            chunk.extend_from_slice(b"\r\n");
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nETag: \"v1\"\r\n".into();
            Reply { head, body: chunk, stall: false }
        }
        (_, Some(start)) => partial(&body, start),
        _ => Reply::status("400 Bad Request"),
    })
    .await;
    let status = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await.end().await;
    assert_prepared(&disk, &status, &bytes);
    assert_eq!(range_start(&source.requests()[1]), Some(3 * MIB));
}

#[tokio::test]
async fn a_raw_file_that_turns_qcow2_in_between_is_judged_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("raw"), image()).unwrap();
    run_program("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &path("raw"), &path("good")]);
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("good"), "-F", "qcow2", &path("backed")]);
    for (name, wanted) in [("good", None), ("backed", Some("has a backing file"))] {
        let (disk, new) = (TestDisk::new(), std::fs::read(path(name)).unwrap());
        let body = new.clone();
        let source = Source::new(move |number, _| match number {
            1 => Reply::whole(&image()).with("ETag: \"raw\"").cut(5 * MIB),
            _ => Reply::whole(&body).with("ETag: \"qcow2\""),
        })
        .await;
        let status = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await.end().await;
        match wanted {
            None => {
                assert_prepared(&disk, &status, &new);
                assert_eq!((status.format.as_str(), status.virtual_size), ("qcow2", image().len() as u64));
            }
            Some(wanted) => assert!(status.message.contains(wanted), "{}", status.message),
        }
    }
}

/// Sends a file in small pieces with pauses between; returns its address.
async fn slow_server(bytes: Vec<u8>, pieces: usize, pause: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let _ = stream.read(&mut request).await;
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut ticks = tokio::time::interval(pause);
        for piece in bytes.chunks(bytes.len().div_ceil(pieces)) {
            ticks.tick().await;
            stream.write_all(piece).await.unwrap();
        }
        let _ = stream.read(&mut request).await;
    });
    address
}

#[tokio::test]
async fn a_source_that_always_moves_is_never_given_up() {
    let (disk, bytes) = (TestDisk::new(), vec![7u8; 64 * 512]);
    let address = slow_server(bytes.clone(), 30, Duration::from_millis(100)).await;
    let mut config = source_config(&disk, &[("url", &format!("http://{address}/x"))], None);
    // It takes six times as long as it may be silent, and no try may fail.
    config.patience.idle_timeout = Duration::from_millis(500);
    config.patience.tries_without_progress = 1;
    let status = RunningSource::start(config).await.end().await;
    assert_prepared(&disk, &status, &bytes);
}

#[tokio::test]
async fn each_failure_says_of_what_kind_it_is() {
    let status_of = async |reply: fn() -> Reply, parameters: &[(&str, &str)], checksum: Option<&str>| {
        let disk = TestDisk::new();
        let source = Source::new(move |_, _| reply()).await;
        let url = source.url();
        let mut all = vec![("url", url.as_str())];
        all.extend_from_slice(parameters);
        let status = RunningSource::start(source_config(&disk, &all, checksum)).await.end().await;
        assert_eq!(disk.temporary_files(), Vec::<String>::new());
        (status.error_kind, status.message)
    };
    let good = || Reply::whole(&[1; 512]);
    let wrong = "a".repeat(128);
    type Case<'a> = (fn() -> Reply, Option<&'a str>, ErrorKind, &'a str);
    let cases: [Case<'_>; 10] = [
        (|| Reply::status("404 Not Found"), None, ErrorKind::NotFound, "answered 404"),
        (|| Reply::status("410 Gone"), None, ErrorKind::NotFound, "answered 410"),
        (|| Reply::status("403 Forbidden"), None, ErrorKind::Invalid, "answered 403"),
        (|| Reply::status("500 Internal Server Error"), None, ErrorKind::Unavailable, "gave up after 4 tries"),
        (|| Reply::status("302 Found").with("Location: /again"), None, ErrorKind::Invalid, "more than 10 redirects"),
        (good, Some(&wrong), ErrorKind::Corrupt, "was expected"),
        (|| Reply::whole(&[1; 100]), None, ErrorKind::Invalid, "multiple of 512"),
        (|| Reply::whole(&[]), None, ErrorKind::Invalid, "0 bytes are no image"),
        (
            || Reply::whole(&[1; 512]).with("Content-Encoding: gzip"),
            None,
            ErrorKind::Invalid,
            "compresses the transfer (gzip)",
        ),
        (
            || Reply { head: "HTTP/1.1 200 OK\r\n".into(), body: vec![1; 512], stall: false },
            None,
            ErrorKind::Invalid,
            "without saying how many",
        ),
    ];
    for (reply, checksum, kind, sentence) in cases {
        let (found, message) = status_of(reply, &[], checksum).await;
        assert!(found == Some(kind) && message.contains(sentence), "{kind}: {found:?} {message}");
    }
    let disk = TestDisk::new();
    let unknown = source_config(&disk, &[("url", "http://no-such-host.invalid/x")], None);
    let status = RunningSource::start(unknown).await.end().await;
    assert!(status.message.contains("`http://no-such-host.invalid/x`: cannot connect"), "{}", status.message);
    assert_eq!(status.error_kind, Some(ErrorKind::Unavailable));
    let small = TestDisk::small();
    let source = Source::of(&image()).await;
    let status = RunningSource::start(source_config(&small, &[("url", &source.url())], None)).await.end().await;
    assert_eq!(status.error_kind, Some(ErrorKind::Exhausted), "{}", status.message);
}
