//! Sources that answer in odd ways, and files of an earlier life that are not what they should be: each guard alone.

mod support;

use std::fs::File;
use std::time::Duration;

use api::ErrorKind;
use api::image::CopyState;
use backing_image_agent::data_source::{self, FileStatus};
use backing_image_agent::layout::FileSet;
use support::*;
use tokio::net::TcpListener;

async fn outcome(disk: &TestDisk, source: &Source) -> FileStatus {
    RunningSource::start(source_config(disk, &[("url", &source.url())], None)).await.end().await
}

#[track_caller]
fn assert_prepared(disk: &TestDisk, status: &FileStatus, bytes: &[u8]) {
    assert_eq!(status.state, CopyState::ReadyForTransfer, "{}", status.message);
    assert!(std::fs::read(disk.disk().source(&key()).file).unwrap() == bytes, "the bytes are those of the source");
    assert_eq!(status.current_checksum, sha512(bytes));
}

/// A part of the file, as long as it says, of a whole that is longer.
fn piece(bytes: &[u8], start: usize, end: usize) -> Reply {
    let (last, length, total) = (end - 1, end - start, bytes.len());
    Reply {
        head: format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {length}\r\nContent-Range: bytes {start}-{last}/{total}\r\n"
        ),
        body: bytes[start..end].to_vec(),
        stall: false,
    }
}

#[tokio::test]
async fn nothing_but_the_bytes_themselves_is_asked_for() {
    let disk = TestDisk::new();
    let source = Source::of(&image()).await;
    outcome(&disk, &source).await;
    let request = source.requests()[0].to_ascii_lowercase();
    assert!(request.contains("accept-encoding: identity\r\n") && !request.contains("range"), "{request}");
}

#[tokio::test]
async fn a_redirect_away_from_http_is_refused_by_its_name() {
    let disk = TestDisk::new();
    let away = Source::new(|_, _| Reply::status("302 Found").with("Location: ftp://h/x")).await;
    let status = outcome(&disk, &away).await;
    assert_eq!(status.error_kind, Some(ErrorKind::Invalid));
    assert!(status.message.contains("a redirect to something else than http or https"), "{}", status.message);
    assert_eq!(away.requests().len(), 1);
}

#[tokio::test]
async fn a_server_that_takes_the_request_and_says_nothing_is_left() {
    let disk = TestDisk::new();
    // The kernel takes the connection, nobody ever reads from it.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/x", listener.local_addr().unwrap());
    let mut config = source_config(&disk, &[("url", &url)], None);
    config.patience.idle_timeout = Duration::from_millis(300);
    config.patience.tries_without_progress = 1;
    let status = RunningSource::start(config).await.end().await;
    assert!(status.message.contains("the server was silent for 300ms"), "{}", status.message);
}

#[tokio::test]
async fn a_source_that_breaks_again_and_again_but_gets_on_is_not_given_up() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |_, request| match range_start(request) {
        None => Reply::whole(&body).with("ETag: \"v1\"").cut(MIB),
        Some(start) => partial(&body, start).cut(MIB),
    })
    .await;
    // Thirteen tries, of which four in a row without a byte would be too many.
    assert_prepared(&disk, &outcome(&disk, &source).await, &bytes);
    assert_eq!(source.requests().len(), 13);
}

#[tokio::test]
async fn a_part_that_ends_before_the_file_is_no_end() {
    let (disk, bytes) = (TestDisk::new(), image());
    let body = bytes.clone();
    let source = Source::new(move |number, request| match (number, range_start(request)) {
        (1, _) => Reply::whole(&body).with("ETag: \"v1\"").cut(2 * MIB),
        (2, Some(start)) => piece(&body, start, start + MIB),
        (_, Some(start)) => partial(&body, start),
        _ => Reply::status("400 Bad Request"),
    })
    .await;
    assert_prepared(&disk, &outcome(&disk, &source).await, &bytes);
    assert_eq!(range_start(&source.requests()[2]), Some(3 * MIB));
}

#[tokio::test]
async fn a_part_with_more_bytes_than_the_file_has_is_refused() {
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::new(move |number, request| match (number, range_start(request)) {
        (1, _) => Reply::whole(&bytes).with("ETag: \"v1\"").cut(2 * MIB),
        (_, Some(start)) => {
            let (last, total) = (bytes.len() - 1, bytes.len());
            let mut body = bytes[start..].to_vec();
            body.extend_from_slice(&[1; 512]);
            Reply::whole(&body).with(&format!("Content-Range: bytes {start}-{last}/{total}")).called_a_part()
        }
        _ => Reply::status("400 Bad Request"),
    })
    .await;
    let status = outcome(&disk, &source).await;
    assert!(status.message.contains("the server sent more bytes than it announced"), "{}", status.message);
    assert_eq!(status.error_kind, Some(ErrorKind::Invalid));
    assert_eq!(disk.temporary_files(), Vec::<String>::new());
}

/// The file has become longer or shorter than what was announced, or than what is here.
#[tokio::test]
async fn a_range_that_does_not_fit_means_to_begin_again() {
    let bytes = image();
    type Answer = fn(&[u8], usize) -> Reply;
    let answers: [Answer; 3] = [
        |_, _| Reply::status("416 Range Not Satisfiable").with("Content-Range: bytes */512"),
        |bytes, start| {
            let (last, total) = (bytes.len() - 1, bytes.len() + 512);
            Reply::whole(&bytes[start..]).with(&format!("Content-Range: bytes {start}-{last}/{total}")).called_a_part()
        },
        |bytes, start| piece(bytes, start - 512, bytes.len()),
    ];
    for answer in answers {
        let (disk, body) = (TestDisk::new(), bytes.clone());
        let source = Source::new(move |number, request| match (number, range_start(request)) {
            (1, _) => Reply::whole(&[9; 6 * MIB][..]).with("ETag: \"v1\"").cut(2 * MIB).announcing(body.len()),
            (2, Some(start)) => answer(&body, start),
            (3, None) => Reply::whole(&body),
            _ => Reply::status("400 Bad Request"),
        })
        .await;
        let running = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
        let history = running.history().await;
        assert_prepared(&disk, history.last().unwrap(), &bytes);
        assert!(history.iter().any(|s| s.message.contains("began again from the first byte")), "{history:?}");
    }
}

#[tokio::test]
async fn a_file_beyond_every_limit_is_refused_before_room_is_looked_for() {
    let disk = TestDisk::new();
    let source = Source::new(|_, _| Reply::whole(&[1]).announcing(5 << 40)).await;
    let status = outcome(&disk, &source).await;
    assert_eq!(status.error_kind, Some(ErrorKind::OutOfRange), "{}", status.message);
}

/// What an earlier process left of a download: `durable` bytes are recorded as safe.
fn leave_part(disk: &TestDisk, url: &str, part: &[u8], durable: usize) {
    let files = disk.disk().source(&key());
    std::fs::create_dir(disk.path().join("tmp")).unwrap();
    std::fs::write(&files.partial, part).unwrap();
    let record = serde_json::json!({
        "address": url, "queryHash": blake3::hash(b"").to_hex().to_string(), "length": null,
        "validator": "\"v1\"", "durableBytes": durable,
    });
    std::fs::write(&files.unfinished, record.to_string()).unwrap();
}

#[tokio::test]
async fn what_lies_behind_the_safe_part_does_not_shine_through() {
    let (disk, mut bytes) = (TestDisk::new(), vec![0; 4 * MIB]);
    bytes[..MIB].fill(7);
    let body = bytes.clone();
    let source = Source::new(move |_, request| partial(&body, range_start(request).unwrap())).await;
    let mut part = vec![0xff; 3 * MIB];
    part[..MIB].fill(7);
    leave_part(&disk, &source.url(), &part, MIB);
    assert_prepared(&disk, &outcome(&disk, &source).await, &bytes);
}

#[tokio::test]
async fn a_part_of_a_qcow2_file_stays_one_and_a_damaged_one_costs_a_second_download_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("raw"), image()).unwrap();
    run_program("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &path("raw"), &path("good")]);
    let bytes = std::fs::read(path("good")).unwrap();
    for damage in [None, Some(8)] {
        let (disk, body) = (TestDisk::new(), bytes.clone());
        let source = Source::new(move |_, request| match range_start(request) {
            Some(start) => partial(&body, start),
            None => Reply::whole(&body),
        })
        .await;
        let mut part = bytes[..3 * MIB].to_vec();
        if let Some(position) = damage {
            part[position] = 1;
        }
        leave_part(&disk, &source.url(), &part, 3 * MIB);
        let status = outcome(&disk, &source).await;
        assert_prepared(&disk, &status, &bytes);
        assert_eq!((status.format.as_str(), status.virtual_size), ("qcow2", image().len() as u64));
        assert_eq!(range_start(source.requests().last().unwrap()).is_some(), damage.is_none());
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_described_leaves_nothing() {
    let (disk, bytes) = (TestDisk::new(), image());
    let files = disk.disk().source(&key());
    let in_the_way = files.manifest.clone();
    let source = Source::new(move |_, _| {
        std::fs::create_dir_all(in_the_way.join("x")).unwrap();
        Reply::whole(&bytes)
    })
    .await;
    assert_eq!(outcome(&disk, &source).await.state, CopyState::Failed);
    assert_eq!(disk.temporary_files(), ["parrot-0a1b2c3d.chunks"], "what is not ours");
}

/// A finished file of an earlier life is offered only when everything about it agrees.
#[tokio::test]
async fn a_finished_file_that_is_not_what_it_should_be_is_made_anew() {
    type Change = fn(&FileSet);
    let changes: [(&str, Change); 6] = [
        ("its time", |f| File::open(&f.file).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap()),
        ("no manifest", |f| std::fs::remove_file(&f.manifest).unwrap()),
        ("another manifest", |f| change_manifest(f, |m| m.sha512 = "a".repeat(128).parse().unwrap())),
        ("a longer manifest", |f| {
            change_manifest(f, |m| {
                (m.size_bytes, m.chunks) = (m.size_bytes + MIB as u64, [&m.chunks[..], &[None]].concat())
            });
        }),
        ("an unknown format", |f| change_config(f, |c| c.format = "vmdk".into())),
        ("another image", |f| change_config(f, |c| c.uuid = "ffffffff".into())),
    ];
    for (what, change) in changes {
        let (disk, bytes) = (TestDisk::new(), image());
        let source = Source::of(&bytes).await;
        assert_prepared(&disk, &outcome(&disk, &source).await, &bytes);
        change(&disk.disk().source(&key()));
        assert_prepared(&disk, &outcome(&disk, &source).await, &bytes);
        assert_eq!(source.requests().len(), 2, "{what}");
    }
}

#[tokio::test]
async fn a_finished_file_with_another_checksum_than_is_wanted_goes() {
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::new(move |number, _| match number {
        1 => Reply::whole(&bytes),
        _ => Reply::status("404 Not Found"),
    })
    .await;
    outcome(&disk, &source).await;
    let url = source.url();
    let wanted = "a".repeat(128);
    let config: data_source::Config = source_config(&disk, &[("url", &url)], Some(&wanted));
    let status = RunningSource::start(config).await.end().await;
    assert!(status.message.contains("answered 404"), "{}", status.message);
    assert_eq!(disk.temporary_files(), Vec::<String>::new());
}
