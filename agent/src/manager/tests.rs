//! What requests, tasks and looks at the files may do to one copy at the same time: each guard alone.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::pin::pin;
use std::time::{Duration, SystemTime};

use api::image::CopyState;
use jiff::Timestamp;
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::operations::Wanted;
use super::registry::Copy;
use super::verification::Verification;
use super::*;
use crate::config_file::{FileConfig, Format};
use crate::layout::{FileSet, ImageKey};
use crate::limits::{MAX_SCRUBS, MAX_SYNCS, MAX_VERIFICATIONS};
use crate::manifest::{Manifest, hash_chunk};
use crate::seal::seal;

/// For what must happen.
const DEADLINE: Duration = Duration::from_secs(60);
/// For what must not.
const WHILE: Duration = Duration::from_millis(100);

const FAST: Verification = Verification::FAST;
/// Twelve days for a chunk.
const SLOW: Verification = Verification { requested_at: None, bytes_per_second: 1 };

pub(super) fn key() -> ImageKey {
    "parrot-0a1b2c3d".parse().unwrap()
}

/// A disk with one sealed copy.
pub(super) fn sealed() -> (TempDir, FileSet) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(crate::layout::DISK_CONFIG), r#"{"diskUUID":"disk-uuid"}"#).unwrap();
    let disk = Disk::new(folder.path());
    let (files, bytes) = (disk.copy(&key()), vec![7; (2 << 20) + 512]);
    std::fs::create_dir_all(disk.image_dir(&key())).unwrap();
    std::fs::write(&files.partial, &bytes).unwrap();
    let manifest = Manifest {
        uuid: key().uuid,
        sha512: hex::encode(openssl::sha::sha512(&bytes)).parse().unwrap(),
        format: Format::Raw,
        size_bytes: bytes.len() as u64,
        virtual_size_bytes: bytes.len() as u64,
        chunks: bytes.chunks(1 << 20).map(hash_chunk).collect(),
    };
    seal(&File::open(&files.partial).unwrap(), &files.partial, &files, &manifest, "").unwrap();
    (folder, files)
}

/// Sets the time of a copy's file.
pub(super) fn touch(files: &FileSet, time: SystemTime) {
    File::open(&files.file).unwrap().set_modified(time).unwrap();
}

fn registry(folder: &TempDir) -> Arc<Registry> {
    let uuid = "disk-uuid".parse().unwrap();
    Arc::new(Registry::new(
        Disk::new(folder.path()),
        uuid,
        Duration::from_secs(20),
        Default::default(),
        CancellationToken::new(),
    ))
}

/// The same with the copy adopted.
async fn ready() -> (TempDir, FileSet, Arc<Registry>) {
    let (folder, files) = sealed();
    let registry = registry(&folder);
    registry.adopt_all().await.unwrap();
    assert_eq!(state(&registry), CopyState::Ready);
    (folder, files, registry)
}

fn state(registry: &Registry) -> CopyState {
    registry.get(&key()).unwrap_or_default().state
}

fn wanted() -> Wanted {
    Wanted { key: key(), size_bytes: None, sha512: None }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await; // poll
        }
    };
    timeout(DEADLINE, met).await.unwrap_or_else(|_| panic!("never happened: {what}"));
}

#[tokio::test]
async fn one_operation_on_a_copy_at_a_time() {
    let (_folder, files, registry) = ready().await;
    let turn = registry.lock(&key()).await;
    // So that a look would find something.
    std::fs::rename(&files.file, &files.partial).unwrap();
    assert!(timeout(WHILE, registry.recheck(&key())).await.is_err());
    assert!(timeout(WHILE, registry.sync(wanted(), "127.0.0.1:9")).await.is_err());
    assert!(timeout(WHILE, registry.fetch(wanted(), "")).await.is_err());
    assert!(timeout(WHILE, registry.verify(key(), FAST)).await.is_err());
    assert!(timeout(WHILE, registry.delete(key())).await.is_err());
    assert!(files.partial.exists() && state(&registry) == CopyState::Ready);
    drop(turn);
    registry.recheck(&key()).await;
    assert_eq!(state(&registry), CopyState::Failed);
}

/// A look that waited for its turn finds another copy than the one it meant to judge, or none.
#[tokio::test]
async fn a_look_at_a_copy_judges_what_is_there_when_its_turn_comes() {
    let (_folder, files, registry) = ready().await;
    let turn = registry.lock(&key()).await;
    let key = key();
    let mut look = pin!(registry.recheck(&key));
    assert!(futures::poll!(&mut look).is_pending());
    std::fs::remove_file(&files.file).unwrap();
    registry.change(&key, |copy| copy.state = CopyState::InProgress);
    drop(turn);
    look.await;
    assert_eq!(state(&registry), CopyState::InProgress, "what is being received is not gone");
}

#[tokio::test]
async fn a_copy_that_waits_for_its_turn_is_deleted_at_once() {
    // Received, found changed, read again fast and slowly.
    for case in 0..4 {
        let (_folder, files, registry) = ready().await;
        let _end = registry.tasks.clone().drop_guard();
        let _syncs = registry.syncs.acquire_many(MAX_SYNCS as u32).await.unwrap();
        let _verifications = registry.verifications.acquire_many(MAX_VERIFICATIONS as u32).await.unwrap();
        let _scrubs = registry.scrubs.acquire_many(MAX_SCRUBS as u32).await.unwrap();
        match case {
            0 => {
                registry.change(&key(), |copy| copy.state = CopyState::Failed);
                registry.sync(wanted(), "127.0.0.1:9").await.unwrap();
            }
            1 => {
                touch(&files, SystemTime::UNIX_EPOCH);
                registry.adopt_all().await.unwrap();
            }
            2 => drop(registry.verify(key(), FAST).await.unwrap()),
            _ => drop(registry.verify(key(), SLOW).await.unwrap()),
        }
        assert_eq!(registry.tracker.len(), 1, "{case}: it waits");
        timeout(DEADLINE, registry.delete(key()))
            .await
            .unwrap_or_else(|_| panic!("{case}: it waits for ever"))
            .unwrap();
        assert!(registry.get(&key()).is_none() && !files.file.exists(), "{case}");
    }
}

/// What still writes may make the files anew.
#[tokio::test]
async fn a_copy_is_removed_when_nothing_works_on_it_any_more() {
    let (_folder, files, registry) = ready().await;
    let release = Arc::new(Notify::new());
    let own = release.clone();
    registry.start(&key(), |cancel| {
        tokio::spawn(async move {
            cancel.cancelled().await;
            own.notified().await;
        })
    });
    let mut deletion = pin!(registry.delete(key()));
    assert!(timeout(WHILE, &mut deletion).await.is_err());
    assert!(files.file.exists());
    release.notify_one();
    timeout(DEADLINE, deletion).await.expect("it was cancelled").unwrap();
    assert!(!files.file.exists());
}

#[tokio::test]
async fn a_reading_goes_on_until_a_faster_one_is_wished_and_none_is_the_last() {
    let (_folder, _files, registry) = ready().await;
    // A test that fails must not wait for it.
    let _end = registry.tasks.clone().drop_guard();
    registry.verify(key(), SLOW).await.unwrap();
    until("it reads", || registry.scrubs.available_permits() == 0).await;
    assert_eq!(registry.verifications.available_permits(), MAX_VERIFICATIONS, "others need not wait for it");
    registry.verify(key(), SLOW).await.unwrap();
    assert_eq!(registry.tracker.len(), 1, "the same wish does not make it begin again");
    for second in 1..3 {
        // Later than now, so that each is told from the one before.
        let wish = Timestamp::now().checked_add(Duration::from_secs(3600 * second)).unwrap();
        registry.verify(key(), Verification { requested_at: Some(wish), ..FAST }).await.unwrap();
        until("it is read again", || registry.get(&key()).unwrap().verified_at == wish.to_string()).await;
    }
    registry.tracker.close();
    timeout(DEADLINE, registry.tracker.wait()).await.expect("the slow reading ended as well");
    assert_eq!(state(&registry), CopyState::Ready, "that one was replaced says nothing of the copy");
}

#[tokio::test]
async fn what_is_known_of_a_copy_outlives_its_being_read_again() {
    let (_folder, files, registry) = ready().await;
    let damage = "at some time a chunk was repaired".to_owned();
    let config = FileConfig { damage: damage.clone(), ..FileConfig::read(&files.config).unwrap() };
    config.write(&files.config).unwrap();
    touch(&files, SystemTime::UNIX_EPOCH);
    registry.adopt_all().await.unwrap();
    until("it is ready again", || state(&registry) == CopyState::Ready).await;
    assert_eq!(registry.get(&key()).unwrap().damage, damage);
    assert_eq!(FileConfig::read(&files.config).unwrap().damage, damage);
}

/// One entry of the disk that nobody understands must not keep the others from their users.
#[tokio::test]
async fn a_copy_that_cannot_be_looked_at_is_the_only_one_that_fails() {
    let (folder, _) = sealed();
    let images = Disk::new(folder.path()).images_dir();
    std::fs::write(images.join("file-ffffffff"), "no directory").unwrap();
    let registry = registry(&folder);
    registry.adopt_all().await.unwrap();
    assert_eq!(state(&registry), CopyState::Ready);
    let copy = registry.get(&"file-ffffffff".parse().unwrap()).unwrap();
    assert!(copy.state == CopyState::Failed && copy.message.contains("cannot look at"), "{copy:?}");
    // The same while it runs.
    std::fs::rename(images.join("parrot-0a1b2c3d"), images.join("elsewhere")).unwrap();
    std::fs::write(images.join("parrot-0a1b2c3d"), "no directory").unwrap();
    registry.recheck_all().await;
    let copy = registry.get(&key()).unwrap();
    assert!(copy.state == CopyState::Failed && copy.message.contains("cannot look at"), "{copy:?}");
}

#[tokio::test]
async fn a_torn_manifest_is_made_anew() {
    let (folder, files) = sealed();
    std::fs::write(&files.manifest, "BIchunks").unwrap();
    let registry = registry(&folder);
    registry.adopt_all().await.unwrap();
    until("it was read", || state(&registry) == CopyState::Ready).await;
    assert!(Manifest::read(&files.manifest).unwrap().is_some());
}

#[tokio::test]
async fn only_ready_copies_are_sent_and_transfers_are_counted() {
    let (_folder, _files, registry) = ready().await;
    let sending = || registry.get(&key()).unwrap().sending;
    let first = registry.begin_sending(&key(), 2).unwrap();
    let second = registry.begin_sending(&key(), 2).unwrap();
    assert!(registry.begin_sending(&key(), 2).is_none(), "two are the limit");
    let copy = Copy { sending: 0, ..registry.get(&key()).unwrap() };
    registry.put(&key(), copy);
    assert_eq!(sending(), 2, "they go on when the copy is described anew");
    drop((first, second));
    assert_eq!(sending(), 0);
    registry.change(&key(), |copy| copy.state = CopyState::Failed);
    assert!(registry.begin_sending(&key(), 2).is_none());
}

#[tokio::test]
async fn everything_that_changes_is_told() {
    let (_folder, _files, registry) = ready().await;
    registry.clone().spawn_background(DEADLINE, true);
    let mut watch = registry.watch();
    type Change = fn(&Registry);
    let changes: [(&str, Change); 4] = [
        ("put", |r| r.put(&key(), Copy::default())),
        ("change", |r| r.change(&key(), |copy| copy.message = "new".into())),
        ("progress", |r| r.progress(&key(), |copy| copy.progress += 1)),
        ("remove", |r| r.remove(&key())),
    ];
    for (what, change) in changes {
        watch.borrow_and_update();
        change(&registry);
        timeout(DEADLINE, watch.changed()).await.unwrap_or_else(|_| panic!("{what} was not told")).unwrap();
    }
    registry.tasks.cancel();
    timeout(DEADLINE, registry.close(2 * DEADLINE)).await.expect("the background work ended");
}

/// What is damaged must not become good because that could not be written down.
#[tokio::test]
async fn damage_that_cannot_be_recorded_is_damage_all_the_same() {
    let (_folder, files, registry) = ready().await;
    {
        use std::os::unix::fs::FileExt;
        let time = files.file.metadata().unwrap().modified().unwrap();
        File::options().write(true).open(&files.file).unwrap().write_all_at(b"damage", 5).unwrap();
        touch(&files, time);
    }
    // Nobody can write the config: its temporary file is a directory.
    let blocked = files.config.with_file_name("backing.cfg.writing");
    std::fs::create_dir(&blocked).unwrap();
    registry.verify(key(), FAST).await.unwrap();
    until("it is found", || state(&registry) == CopyState::Failed).await;
    assert_eq!(registry.get(&key()).unwrap().kind, Some(api::ErrorKind::Corrupt));
    registry.adopt_all().await.unwrap();
    assert_ne!(state(&registry), CopyState::Ready, "it is not taken for good by the next process");
    until("it is found again", || state(&registry) == CopyState::Failed).await;
}

/// The directory of a disk that is away is that of another filesystem.
#[tokio::test]
async fn nothing_is_written_or_said_to_be_gone_where_the_disk_is_not() {
    let (folder, _files, registry) = ready().await;
    let away = folder.path().with_extension("away");
    let another = r#"{"diskUUID":"another"}"#;
    for replaced in [false, true] {
        std::fs::rename(folder.path(), &away).unwrap();
        if replaced {
            std::fs::create_dir(folder.path()).unwrap();
            std::fs::write(folder.path().join(crate::layout::DISK_CONFIG), another).unwrap();
        }
        let other = || Wanted { key: "other-0a1b2c3d".parse().unwrap(), size_bytes: None, sha512: None };
        let refused = [
            registry.sync(other(), "127.0.0.1:9").await.unwrap_err(),
            registry.fetch(other(), "").await.unwrap_err(),
            registry.delete(key()).await.unwrap_err(),
        ];
        for error in refused {
            let said = if replaced { "it holds disk `another` now" } else { "longhorn-disk.cfg` is missing" };
            assert!(error.to_string().contains(said), "{error}");
        }
        registry.recheck(&key()).await;
        assert_eq!(state(&registry), CopyState::Ready, "its node tells that the disk is away");
        assert!(!Disk::new(folder.path()).images_dir().exists());
        if replaced {
            std::fs::remove_dir_all(folder.path()).unwrap();
        }
        std::fs::rename(&away, folder.path()).unwrap();
    }
    registry.delete(key()).await.unwrap();
    assert!(registry.get(&key()).is_none());
}

/// Whether this process watches a copy's file, as the kernel tells it.
fn is_watched(files: &FileSet) -> bool {
    let wanted = format!(" ino:{:x} ", files.file.metadata().unwrap().ino());
    let descriptors = std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    // One may be closed meanwhile.
    descriptors.filter_map(|d| std::fs::read_to_string(d.path()).ok()).any(|text| text.contains(&wanted))
}

/// What may be done to the files of a ready copy from outside, and what is said of it then.
#[tokio::test]
async fn what_is_done_to_a_ready_copy_from_outside_is_noticed_at_once() {
    type Deed = fn(&FileSet);
    fn parent(files: &FileSet) -> std::path::PathBuf {
        files.file.parent().unwrap().into()
    }
    /// Writes over a byte, with the file's time as it was.
    fn flip(files: &FileSet) {
        use std::os::unix::fs::FileExt;
        let time = files.file.metadata().unwrap().modified().unwrap();
        let file = File::options().write(true).open(&files.file).unwrap();
        file.write_all_at(b"X", 1 << 20).unwrap();
        file.sync_all().unwrap();
        touch(files, time);
    }
    /// Puts another file in its place, as a restored backup would be.
    fn swap(files: &FileSet) {
        let before = files.file.metadata().unwrap();
        let other = parent(files).join("restored");
        std::fs::write(&other, vec![9; before.len() as usize]).unwrap();
        File::open(&other).unwrap().set_modified(before.modified().unwrap()).unwrap();
        std::fs::rename(&other, &files.file).unwrap();
    }
    let deeds: [(&str, Deed, &str); 8] = [
        ("removed", |files| std::fs::remove_file(&files.file).unwrap(), "the file is gone"),
        ("moved away", |files| std::fs::rename(&files.file, &files.partial).unwrap(), "the file is gone"),
        ("its directory removed", |files| std::fs::remove_dir_all(parent(files)).unwrap(), "the file is gone"),
        (
            "its directory moved",
            |files| std::fs::rename(parent(files), parent(files).with_extension("x")).unwrap(),
            "the file is gone",
        ),
        (
            "all images moved",
            |files| {
                std::fs::rename(parent(files).parent().unwrap(), parent(files).parent().unwrap().with_extension("x"))
                    .unwrap()
            },
            "the file is gone",
        ),
        ("written to", flip, "1 of 3 chunks"),
        ("replaced by another of the same length and time", swap, "3 of 3 chunks"),
        ("cut", |files| File::options().write(true).open(&files.file).unwrap().set_len(5).unwrap(), "3 of 3 chunks"),
    ];
    for (what, deed, said) in deeds {
        let (_folder, files, registry) = ready().await;
        let _end = registry.tasks.clone().drop_guard();
        // The periodic look does not help.
        registry.clone().spawn_background(2 * DEADLINE, true);
        let is_watched = || is_watched(&files);
        until("it is watched", is_watched).await;
        // Also where a program has it open.
        let _open = File::open(&files.file).unwrap();
        deed(&files);
        until(what, || state(&registry) == CopyState::Failed).await;
        let message = registry.get(&key()).unwrap().message;
        assert!(message.contains(said), "{what}: {message}");
    }
}

/// A copy that is lost by half is read and described anew, one of which nothing is known must come from others.
#[tokio::test]
async fn what_describes_a_ready_copy_is_made_again_when_it_is_lost() {
    let (_folder, files, registry) = ready().await;
    let _end = registry.tasks.clone().drop_guard();
    registry.clone().spawn_background(2 * DEADLINE, true);
    let is_ready = || state(&registry) == CopyState::Ready && is_watched(&files);
    type Deed = fn(&FileSet);
    let deeds: [(&str, Deed); 4] = [
        ("no config", |files| std::fs::remove_file(&files.config).unwrap()),
        ("no manifest", |files| std::fs::rename(&files.manifest, &files.unfinished).unwrap()),
        ("a torn config", |files| std::fs::write(&files.config, "{").unwrap()),
        ("a torn manifest", |files| std::fs::write(&files.manifest, "BIchunks").unwrap()),
    ];
    for (what, deed) in deeds {
        until("it is watched", is_ready).await;
        deed(&files);
        let is_described = || {
            let config = FileConfig::read(&files.config).is_some_and(|config| !config.current_checksum.is_empty());
            config && Manifest::read(&files.manifest).is_ok_and(|manifest| manifest.is_some())
        };
        until(what, || is_described() && is_ready()).await;
    }
    for path in [&files.manifest, &files.config] {
        std::fs::remove_file(path).unwrap();
    }
    until("nothing is known of it", || state(&registry) == CopyState::Failed).await;
}

#[tokio::test]
async fn a_copy_that_is_ready_again_is_watched_again() {
    let (_folder, files, registry) = ready().await;
    let _end = registry.tasks.clone().drop_guard();
    registry.clone().spawn_background(2 * DEADLINE, true);
    for time in [SystemTime::UNIX_EPOCH, SystemTime::now()] {
        let before = registry.get(&key()).unwrap();
        touch(&files, time);
        until("it was read", || {
            let copy = registry.get(&key()).unwrap();
            copy.state == CopyState::Ready && copy.modification_time != before.modification_time
        })
        .await;
    }
    std::fs::remove_file(&files.file).unwrap();
    until("it is gone", || state(&registry) == CopyState::Failed).await;
    // Another file in its place.
    let (_other, sealed) = sealed();
    for (from, to) in [(&sealed.file, &files.file), (&sealed.config, &files.config)] {
        std::fs::rename(from, to).unwrap();
    }
    registry.adopt_all().await.unwrap();
    assert_eq!(state(&registry), CopyState::Ready);
    until("it is watched", || is_watched(&files)).await;
}
