//! The data source role against real HTTP servers and real files.

mod support;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use api::image::{CopyState, SourceType};
use backing_image_agent::config_file::FileConfig;
use backing_image_agent::data_source::{self, FileStatus};
use backing_image_agent::manifest::Manifest;
use support::*;
use tokio_util::sync::CancellationToken;

async fn outcome(disk: &TestDisk, source: &Source, parameters: &[(&str, &str)], checksum: Option<&str>) -> FileStatus {
    let url = source.url();
    let mut all = vec![("url", url.as_str())];
    all.extend_from_slice(parameters);
    RunningSource::start(source_config(disk, &all, checksum)).await.end().await
}

#[track_caller]
fn assert_failed(disk: &TestDisk, status: &FileStatus, wanted: &str) {
    assert_eq!(status.state, CopyState::Failed);
    assert!(status.message.contains(wanted), "{}", status.message);
    assert_eq!(disk.temporary_files(), Vec::<String>::new(), "nothing is left behind");
}

#[track_caller]
fn assert_prepared(disk: &TestDisk, status: &FileStatus, bytes: &[u8]) {
    assert_eq!(status.state, CopyState::ReadyForTransfer, "{}", status.message);
    assert_eq!(status.current_checksum, sha512(bytes));
    assert!(std::fs::read(disk.disk().source(&key()).file).unwrap() == bytes, "the bytes are those of the source");
}

#[tokio::test]
async fn a_download_is_whole_sparse_and_described() {
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::of(&bytes).await;
    let status = outcome(&disk, &source, &[], None).await;
    assert_prepared(&disk, &status, &bytes);
    assert_eq!((status.size, status.virtual_size, status.progress), (bytes.len() as u64, bytes.len() as u64, 100));
    assert_eq!((status.format.as_str(), status.disk_uuid.as_str()), ("raw", "disk-uuid"));

    let files = disk.disk().source(&key());
    let metadata = files.file.metadata().unwrap();
    assert!(metadata.blocks() * 512 < 10 * MIB as u64, "the zeros are a hole");
    let config = FileConfig::read(&files.config).unwrap();
    assert!(config.matches(&metadata));
    assert_eq!(config.name, files.file.display().to_string());
    let manifest = Manifest::read(&files.manifest).unwrap().unwrap();
    assert_eq!(manifest.sha512.as_str(), sha512(&bytes));
    assert_eq!(manifest.chunks.iter().filter(|chunk| chunk.is_none()).count(), 3);
    assert!(!files.partial.exists());

    let requests = source.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(requests[0].starts_with("GET "), "HEAD is never needed");
}

#[tokio::test]
async fn the_json_has_longhorns_keys() {
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::of(&bytes).await;
    let running = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    running.end().await;
    let value = serde_json::to_value(running.get().await).unwrap();
    let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "sourceType",
            "parameters",
            "name",
            "diskUUID",
            "expectedChecksum",
            "filePath",
            "uuid",
            "size",
            "virtualSize",
            "realSize",
            "state",
            "progress",
            "processedSize",
            "modificationTime",
            "currentChecksum",
            "message",
            "sendingReference",
            "format",
            "nextRetryTime",
            "bandwidthLimit"
        ]
    );
    assert_eq!(value["state"], "ready-for-transfer");
}

#[tokio::test]
async fn not_found_fails_at_once_with_the_status() {
    let disk = TestDisk::new();
    let source = Source::new(|_, _| Reply::status("404 Not Found")).await;
    let status = outcome(&disk, &source, &[], None).await;
    assert_failed(&disk, &status, "the server answered 404");
    assert_eq!(source.requests().len(), 1);
}

#[tokio::test]
async fn a_server_error_is_tried_again_and_the_next_try_is_visible() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |number, _| match number {
        1 => Reply::status("503 Service Unavailable"),
        _ => Reply::whole(&body),
    })
    .await;
    let mut config = source_config(&disk, &[("url", &source.url())], None);
    config.patience.backoff.initial = Duration::from_millis(300);
    config.patience.backoff.max = config.patience.backoff.initial;
    let history = RunningSource::start(config).await.history().await;
    let waiting = history.iter().find(|status| !status.next_retry_time.is_empty()).expect("a visible retry");
    assert!(waiting.message.contains("503"), "{}", waiting.message);
    assert_prepared(&disk, history.last().unwrap(), &bytes);
}

#[tokio::test]
async fn a_refused_connection_fails_after_some_tries() {
    let disk = TestDisk::new();
    let config = source_config(&disk, &[("url", &format!("http://{}/x", address(9)))], None);
    let status = RunningSource::start(config).await.end().await;
    assert_failed(&disk, &status, "refused");
    assert!(status.message.contains("gave up after 4 tries"), "{}", status.message);
}

#[tokio::test]
async fn a_wrong_checksum_names_both() {
    let (disk, bytes) = (TestDisk::new(), image());
    let expected = "a".repeat(128);
    let status = outcome(&disk, &Source::of(&bytes).await, &[], Some(&expected)).await;
    assert_failed(&disk, &status, &expected);
    assert!(status.message.contains(&sha512(&bytes)), "{}", status.message);
}

#[tokio::test]
async fn a_raw_size_that_is_no_multiple_of_512_is_refused_unless_padding_is_wished() {
    let disk = TestDisk::new();
    let bytes = vec![7u8; 1000];
    let source = Source::of(&bytes).await;
    let status = outcome(&disk, &source, &[], None).await;
    assert_failed(&disk, &status, "multiple of 512 bytes, this one has 1000");

    let mut padded = bytes.clone();
    padded.resize(1024, 0);
    let status = outcome(&disk, &source, &[("padToSector", "true")], None).await;
    assert_prepared(&disk, &status, &padded);

    let other = TestDisk::new();
    let status = outcome(&other, &source, &[("padToSector", "true")], Some(&sha512(&bytes))).await;
    assert_failed(&other, &status, "before it was padded");
    let status = outcome(&other, &source, &[("padToSector", "yes")], None).await;
    assert_failed(&other, &status, "give `true` or `false`");
}

#[tokio::test]
async fn dangerous_and_cut_qcow2_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("raw"), image()).unwrap();
    run_program("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", &path("raw"), &path("good")]);
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("good"), "-F", "qcow2", &path("backed")]);
    let option = format!("data_file={}", path("data"));
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, &path("split"), "1M"]);
    let good = std::fs::read(path("good")).unwrap();
    let cases = [
        (std::fs::read(path("backed")).unwrap(), "has a backing file"),
        (std::fs::read(path("split")).unwrap(), "external data file"),
        (good[..good.len() / 2].to_vec(), "the qcow2 file is cut"),
    ];
    for (bytes, wanted) in cases {
        let disk = TestDisk::new();
        let status = outcome(&disk, &Source::of(&bytes).await, &[], None).await;
        assert_failed(&disk, &status, wanted);
    }

    let disk = TestDisk::new();
    let status = outcome(&disk, &Source::of(&good).await, &[], Some(&sha512(&good))).await;
    assert_prepared(&disk, &status, &good);
    assert_eq!((status.format.as_str(), status.virtual_size), ("qcow2", image().len() as u64));
}

#[tokio::test]
async fn a_dangerous_header_ends_the_transfer_before_the_rest_is_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", &path("base"), "1M"]);
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("base"), "-F", "qcow2", &path("top")]);
    let mut bytes = std::fs::read(path("top")).unwrap();
    bytes.resize(40 * MIB, 1);
    let source = Source::new(move |_, _| Reply::whole(&bytes).cut(2 * MIB).stalled()).await;
    let disk = TestDisk::new();
    let status = outcome(&disk, &source, &[], None).await;
    assert_failed(&disk, &status, "has a backing file");
    assert!(status.processed_size < 3 * MIB as u64, "{}", status.processed_size);
}

#[tokio::test]
async fn a_cut_transfer_goes_on_where_it_stopped() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |number, head| match (number, range_start(head)) {
        (1, _) => Reply::whole(&body).with("ETag: \"v1\"").cut(body.len() / 2),
        (2, Some(start)) => partial(&body, start).cut(MIB),
        (_, Some(start)) => partial(&body, start),
        _ => Reply::status("400 Bad Request"),
    })
    .await;
    let status = outcome(&disk, &source, &[], Some(&sha512(&bytes))).await;
    assert_prepared(&disk, &status, &bytes);
    let requests = source.requests();
    assert_eq!(requests.len(), 3);
    assert_eq!(range_start(&requests[1]), Some(bytes.len() / 2));
    assert_eq!(range_start(&requests[2]), Some(bytes.len() / 2 + MIB));
    assert!(requests[1].to_ascii_lowercase().contains("if-range: \"v1\""), "{}", requests[1]);
}

#[tokio::test]
async fn a_cut_transfer_without_ranges_begins_again_and_says_so() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |number, _| match number {
        1 => Reply::whole(&body).with("ETag: \"v1\"").cut(body.len() / 2),
        _ => Reply::whole(&body).with("ETag: \"v1\""),
    })
    .await;
    let running = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    let history = running.history().await;
    assert!(history.iter().any(|status| status.message.contains("began again from the first byte")), "{history:?}");
    assert_prepared(&disk, history.last().unwrap(), &bytes);
    assert_eq!(source.requests().len(), 2);
}

#[tokio::test]
async fn a_file_that_changes_in_between_is_not_mixed() {
    let (disk, bytes) = (TestDisk::new(), image());
    let old = vec![1u8; bytes.len() + 512];
    let body = bytes.clone();
    let source = Source::new(move |number, _| match number {
        1 => Reply::whole(&old).with("ETag: \"old\"").cut(2 * MIB + 5),
        _ => Reply::whole(&body).with("ETag: \"new\""),
    })
    .await;
    let status = outcome(&disk, &source, &[], None).await;
    assert_prepared(&disk, &status, &bytes);
}

#[tokio::test]
async fn a_silent_server_is_left_and_asked_again() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |number, head| match (number, range_start(head)) {
        (1, _) => Reply::whole(&body).with("Last-Modified: Sun, 22 Nov 2026 07:00:00 GMT").cut(MIB).stalled(),
        (_, Some(start)) => partial(&body, start),
        _ => Reply::status("400 Bad Request"),
    })
    .await;
    let mut config = source_config(&disk, &[("url", &source.url())], None);
    config.patience.idle_timeout = Duration::from_millis(500);
    let status = RunningSource::start(config).await.end().await;
    assert_prepared(&disk, &status, &bytes);
    assert_eq!(range_start(&source.requests()[1]), Some(MIB));
}

#[tokio::test]
async fn a_body_of_unknown_length_needs_a_checksum_or_framing() {
    let bytes = image();
    let body = bytes.clone();
    let unknown =
        Source::new(move |_, _| Reply { head: "HTTP/1.1 200 OK\r\n".into(), body: body.clone(), stall: false }).await;
    let disk = TestDisk::new();
    let status = outcome(&disk, &unknown, &[], None).await;
    assert_failed(&disk, &status, "without saying how many there are");
    let status = outcome(&disk, &unknown, &[], Some(&sha512(&bytes))).await;
    assert_prepared(&disk, &status, &bytes);

    let mut chunked = vec![];
    for part in bytes.chunks(100_000) {
        chunked.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
        chunked.extend_from_slice(part);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    let framed = Source::new(move |_, _| Reply {
        head: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n".into(),
        body: chunked.clone(),
        stall: false,
    })
    .await;
    let disk = TestDisk::new();
    let status = outcome(&disk, &framed, &[], None).await;
    assert_prepared(&disk, &status, &bytes);
}

#[tokio::test]
async fn redirects_are_followed_to_a_limit() {
    let (disk, bytes) = (TestDisk::new(), image());
    let target = Source::of(&bytes).await;
    let location = format!("Location: {}", target.url());
    let source = Source::new(move |_, _| Reply::status("302 Found").with(&location)).await;
    assert_prepared(&disk, &outcome(&disk, &source, &[], None).await, &bytes);

    let disk = TestDisk::new();
    let circle = Source::new(|_, _| Reply::status("302 Found").with("Location: /again")).await;
    assert_failed(&disk, &outcome(&disk, &circle, &[], None).await, "more than 10 redirects");
    assert_eq!(circle.requests().len(), 11);
    let disk = TestDisk::new();
    let away = Source::new(|_, _| Reply::status("302 Found").with("Location: file:///etc/passwd")).await;
    assert_eq!(outcome(&disk, &away, &[], None).await.state, CopyState::Failed);
}

#[tokio::test]
async fn secrets_of_the_address_are_not_shown() {
    let disk = TestDisk::new();
    let source = Source::new(|_, _| Reply::status("403 Forbidden")).await;
    let url = format!("http://user:hunter2@{}/image?token=hunter2", source.address);
    let running = RunningSource::start(source_config(&disk, &[("url", &url)], None)).await;
    let history = serde_json::to_string(&running.history().await).unwrap();
    assert!(history.contains("answered 403") && !history.contains("hunter2"), "{history}");
}

#[tokio::test]
async fn transfer_is_idempotent_and_other_actions_say_what_is_wrong() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |_, _| Reply::whole(&body).cut(MIB).stalled()).await;
    let mut config = source_config(&disk, &[("url", &source.url())], None);
    config.patience.idle_timeout = Duration::from_secs(60);
    let early = RunningSource::start(config).await;
    let (code, text) = early.post("action=transfer").await;
    assert_eq!(code, 409, "{text}");
    drop(early);

    let disk = TestDisk::new();
    let source = Source::of(&bytes).await;
    let running = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    running.end().await;
    for _ in 0..2 {
        let (code, text) = running.post("action=transfer").await;
        assert_eq!(code, 200, "{text}");
        assert_eq!(running.get().await.state, CopyState::Ready);
    }
    let (code, text) = running.post("action=upload&size=5").await;
    assert!(code == 501 && text.contains("not supported yet"), "{code} {text}");
    assert_eq!(running.post("action=dance").await.0, 400);
}

#[tokio::test]
async fn a_finished_file_is_offered_again_after_a_restart() {
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::of(&bytes).await;
    let config = source_config(&disk, &[("url", &source.url())], None);
    RunningSource::start(config.clone()).await.end().await;
    let again = data_source::Config { listen: address(8000), ..config };
    assert_prepared(&disk, &RunningSource::start(again).await.end().await, &bytes);
    assert_eq!(source.requests().len(), 1, "it was not downloaded again");
}

#[tokio::test]
async fn other_sources_are_refused_with_a_reason() {
    let disk = TestDisk::new();
    for source_type in [SourceType::Upload, SourceType::ExportFromVolume, SourceType::Restore, SourceType::Clone] {
        let config = data_source::Config { source_type, ..source_config(&disk, &[], None) };
        let status = RunningSource::start(config).await.end().await;
        assert_failed(&disk, &status, "is not supported yet");
    }
    let status = RunningSource::start(source_config(&disk, &[("url", "file:///etc/passwd")], None)).await.end().await;
    assert_failed(&disk, &status, "only http and https");
}

#[tokio::test]
async fn a_full_disk_fails_before_the_first_byte_and_leaves_nothing() {
    let (disk, bytes) = (TestDisk::small(), image());
    let status = outcome(&disk, &Source::of(&bytes).await, &[], None).await;
    assert_failed(&disk, &status, &format!("the file needs {}", bytes.len()));
    assert_eq!(status.processed_size, 0);

    // Without a length it shows only while writing.
    let body = bytes.clone();
    let unknown =
        Source::new(move |_, _| Reply { head: "HTTP/1.1 200 OK\r\n".into(), body: body.clone(), stall: false }).await;
    let status = outcome(&disk, &unknown, &[], Some(&sha512(&bytes))).await;
    assert_failed(&disk, &status, "No space left");
}

#[tokio::test]
async fn a_directory_that_is_no_disk_is_refused() {
    let disk = TestDisk::new();
    std::fs::remove_file(disk.path().join("longhorn-disk.cfg")).unwrap();
    let config = source_config(&disk, &[("url", "http://127.0.0.1/x")], None);
    let error = data_source::run(config, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::NotReady);
}
