//! Loss of power at every moment of the life of a copy, on the disk that forgets most: what has its final name is whole, and what
//! was promised holds.

mod forgetful;
mod support;

use std::path::Path;
use std::time::Duration;

use api::image::CopyState;
use backing_image_agent::client;
use backing_image_agent::config_file::FileConfig;
use backing_image_agent::layout::{Disk, FileSet};
use backing_image_agent::manifest::Manifest;
use forgetful::Journal;
use proto::bimrpc::VerifyRequest;
use support::*;

/// What a disk says of a file after a loss of power.
#[derive(Debug, PartialEq)]
enum Found {
    Nothing,
    /// It is taken for what it was without being read.
    Trusted,
    /// It is read before anybody uses it.
    Doubted,
}

/// Judges a file by what lies beside it; what is trusted must be whole.
fn judge(files: &FileSet, bytes: &[u8], moment: &str) -> Found {
    let Ok(metadata) = files.file.metadata() else { return Found::Nothing };
    let config = FileConfig::read(&files.config).unwrap_or_else(|| panic!("{moment}: backing.cfg is gone or torn"));
    let manifest = Manifest::read(&files.manifest).unwrap_or_else(|error| panic!("{moment}: {}", error.chain()));
    let manifest = manifest.unwrap_or_else(|| panic!("{moment}: there is no manifest"));
    for recorded in [manifest.sha512.as_str(), &config.current_checksum] {
        assert_eq!(recorded, sha512(bytes), "{moment}");
    }
    if config.matches(&metadata) { Found::Trusted } else { Found::Doubted }
}

fn is_whole(files: &FileSet, bytes: &[u8]) -> bool {
    std::fs::read(&files.file).is_ok_and(|found| found == bytes)
}

/// A disk as it is when power went behind so many moments.
fn after(journal: &Journal, moments: usize) -> TestDisk {
    let folder = tempfile::tempdir().unwrap();
    journal.cut(moments, folder.path());
    TestDisk::found(folder)
}

/// The part of an interrupted download is what its record says.
fn check_part(disk: &Disk, bytes: &[u8], moment: &str) {
    let files = disk.source(&key());
    let Ok(record) = std::fs::read(&files.unfinished) else { return };
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap_or_else(|e| panic!("{moment}: {e}"));
    let safe = record["durableBytes"].as_u64().unwrap() as usize;
    if let Ok(part) = std::fs::read(&files.partial) {
        assert!(part.len() >= safe && part[..safe] == bytes[..safe], "{moment}: {safe} bytes are not safe");
    }
}

fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none())
}

/// Random bytes, zeros, and an end that is not full.
fn small_image() -> Vec<u8> {
    [&image()[..MIB], &vec![0; MIB], &image()[MIB..2 * MIB + 512]].concat()
}

#[tokio::test]
async fn a_prepared_copy_is_safe_when_it_is_ready_and_gone_when_it_is_deleted() {
    let (disk, bytes) = (TestDisk::new(), small_image());
    let journal = forgetful::watch(disk.path());
    let manager = RunningManager::start(&disk).await;
    let body = bytes.clone();
    // In two parts, so that the first is recorded as safe.
    let source = Source::new(move |_, request| match range_start(request) {
        None => Reply::whole(&body).with("ETag: \"v1\"").cut(2 * MIB + 99).stalled(),
        Some(start) => partial(&body, start),
    })
    .await;
    let mut config = source_config(&disk, &[("url", &source.url())], None);
    config.patience.idle_timeout = Duration::from_secs(1);
    let data_source = RunningSource::start(config).await;
    let status = data_source.end().await;
    assert_eq!(status.state, CopyState::ReadyForTransfer, "{}", status.message);
    let prepared = journal.now();
    manager.fetch(spec(), &data_source.address.to_string()).await.unwrap();
    let ready = journal.now();
    client::delete(&manager.address.to_string(), "parrot", UUID, &Default::default()).await.unwrap();
    let deleted = journal.now();
    assert!(0 < prepared && prepared < ready && ready < deleted, "{prepared} {ready} {deleted}");

    let mut parts = 0;
    for moments in 0..=deleted {
        let moment = format!("behind {moments} of {prepared}, {ready}, {deleted} moments");
        let folder = after(&journal, moments);
        let left = folder.disk();
        parts += usize::from(left.source(&key()).unfinished.exists());
        check_part(&left, &bytes, &moment);
        for files in [left.source(&key()), left.copy(&key())] {
            if judge(&files, &bytes, &moment) == Found::Trusted {
                assert!(is_whole(&files, &bytes), "{moment}: {} is not whole", files.file.display());
            }
        }
        if moments == prepared {
            assert_eq!(judge(&left.source(&key()), &bytes, &moment), Found::Trusted, "{moment}");
        }
        if moments == ready {
            assert_eq!(judge(&left.copy(&key()), &bytes, &moment), Found::Trusted, "{moment}");
            assert!(is_empty(&left.tmp_dir()), "{moment}: what was handed over is still in `tmp`");
        }
        if moments == deleted {
            assert!(is_empty(&left.images_dir()) && is_empty(&left.tmp_dir()), "{moment}: it came back");
        }
    }
    assert!(parts > 0, "a part was recorded");
    let disk = after(&journal, ready);
    let manager = RunningManager::start(&disk).await;
    assert_eq!(manager.get().await.verified_at, "", "it is ready without being read");
    assert!(is_whole(&disk.disk().copy(&key()), &bytes));
}

#[tokio::test]
async fn a_synced_and_a_repaired_copy_are_safe_when_they_are_ready() {
    let (first_disk, bytes) = (TestDisk::new(), small_image());
    let first = RunningManager::start(&first_disk).await;
    prepare(&first_disk, &first, &bytes).await;
    let disk = TestDisk::new();
    let journal = forgetful::watch(disk.path());
    let manager = RunningManager::start(&disk).await;
    manager.sync(spec(), &[first.address]).await.unwrap();
    manager.reaches("ready").await;
    let synced = journal.now();
    damage(&disk, 0);
    journal.settle();
    let damaged = journal.now();
    let request = VerifyRequest { name: "parrot".into(), uuid: UUID.into(), ..Default::default() };
    manager.client().await.verify(request).await.unwrap();
    manager.reaches("failed").await;
    let noticed = journal.now();
    manager.sync(spec(), &[first.address]).await.unwrap();
    manager.reaches("ready").await;
    let repaired = journal.now();
    assert!(0 < synced && synced < damaged && damaged < noticed && noticed < repaired);

    for moments in (0..=repaired).filter(|moments| *moments <= synced || *moments >= noticed) {
        let moment = format!("behind {moments} of {synced}, {damaged}, {noticed}, {repaired} moments");
        let folder = after(&journal, moments);
        let files = folder.disk().copy(&key());
        let found = judge(&files, &bytes, &moment);
        if found == Found::Trusted {
            assert!(is_whole(&files, &bytes), "{moment}: it is not whole");
        }
        if moments == synced || moments == repaired {
            assert_eq!(found, Found::Trusted, "{moment}");
        }
        if moments == noticed {
            assert_eq!(found, Found::Doubted, "{moment}: the damage is forgotten");
        }
    }
    let disk = after(&journal, repaired);
    let manager = RunningManager::start(&disk).await;
    assert!(manager.get().await.damage.contains("1 of 4 chunks differed"), "the repair is remembered");
}

#[tokio::test]
async fn what_was_prepared_for_an_image_that_is_deleted_does_not_come_back() {
    let (disk, bytes) = (TestDisk::new(), small_image());
    let manager = RunningManager::start(&disk).await;
    let source = Source::of(&bytes).await;
    let data_source = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    assert_eq!(data_source.end().await.state, CopyState::ReadyForTransfer);
    let journal = forgetful::watch(disk.path());
    assert_eq!(after(&journal, journal.now()).temporary_files().len(), 3);
    client::delete(&manager.address.to_string(), "parrot", UUID, &Default::default()).await.unwrap();
    assert!(is_empty(&after(&journal, journal.now()).disk().tmp_dir()));
}
