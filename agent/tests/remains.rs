//! What belongs to no image goes over gRPC as it was told, and nothing else goes.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use api::image::CopyState;
use backing_image_agent::data_source;
use backing_image_agent::layout::ImageKey;
use proto::bimrpc::{BackingImageSpec, Remains, RemoveRemainsRequest};
use support::*;
use tokio::net::TcpListener;
use tonic::Code;

/// Another image of the same name.
const OTHER_UUID: &str = "ffffffff";

fn other() -> ImageKey {
    ImageKey::parse("parrot", OTHER_UUID).unwrap()
}

/// All that lies on a disk, links not followed.
fn all_files(disk: &TestDisk) -> BTreeSet<String> {
    fn collect(root: &Path, folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            found.insert(path.strip_prefix(root).unwrap().display().to_string());
            if path.symlink_metadata().unwrap().is_dir() {
                collect(root, &path, found);
            }
        }
    }
    let mut found = BTreeSet::new();
    collect(disk.path(), disk.path(), &mut found);
    found
}

fn write(disk: &TestDisk, path: &str) {
    let path = disk.path().join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, "content").unwrap();
}

async fn told(manager: &RunningManager) -> Vec<Remains> {
    let list = manager.client().await.list(()).await.unwrap().into_inner();
    assert!(list.surveyed, "the disk is there");
    list.remains
}

/// The request that removes what was told of an image in one place.
async fn request(manager: &RunningManager, key: &ImageKey, is_preparation: bool) -> RemoveRemainsRequest {
    let told = told(manager).await;
    let (name, uuid) = (key.name.to_string(), key.uuid.to_string());
    let found = told.into_iter().find(|r| (&r.name, &r.uuid, r.is_preparation) == (&name, &uuid, is_preparation));
    let mark = found.expect("it is told").mark;
    assert!(!mark.is_empty(), "what no agent knows has a mark");
    RemoveRemainsRequest { name, uuid, is_preparation, mark }
}

async fn remove(manager: &RunningManager, request: RemoveRemainsRequest) -> Result<(), tonic::Status> {
    manager.client().await.remove_remains(request).await.map(|_| ())
}

#[tokio::test]
async fn what_is_removed_is_exactly_what_was_named_as_it_was_told() {
    let (disk, manager) = first().await;
    for key in ["parrot-ffffffff", "parrot2-0a1b2c3d", "ara-ffffffff"] {
        for path in [format!("backing-images/{key}/backing"), format!("backing-images/{key}/backing.cfg")] {
            write(&disk, &path);
        }
        for suffix in [".tmp", ".resume"] {
            write(&disk, &format!("tmp/{key}{suffix}"));
        }
    }
    for is_preparation in [false, true] {
        let right = request(&manager, &other(), is_preparation).await;
        let before = all_files(&disk);
        let foreign_mark = request(&manager, &"ara-ffffffff".parse().unwrap(), is_preparation).await.mark;
        for wrong in [
            RemoveRemainsRequest { name: "parro".into(), ..right.clone() },
            RemoveRemainsRequest { name: "parrot2".into(), ..right.clone() },
            RemoveRemainsRequest { name: "ara".into(), ..right.clone() },
            RemoveRemainsRequest { uuid: UUID.into(), ..right.clone() },
            RemoveRemainsRequest { uuid: "fffffffe".into(), ..right.clone() },
            RemoveRemainsRequest { is_preparation: !is_preparation, ..right.clone() },
            RemoveRemainsRequest { mark: foreign_mark, ..right.clone() },
            RemoveRemainsRequest { mark: String::new(), ..right.clone() },
        ] {
            let answer = remove(&manager, wrong.clone()).await;
            assert_eq!(all_files(&disk), before, "{wrong:?} removes nothing: {answer:?}");
        }
        let place = if is_preparation { "tmp/" } else { "backing-images/" };
        // Asked again, it is done already.
        for _ in 0..2 {
            remove(&manager, right.clone()).await.unwrap();
            let gone: Vec<String> = before.difference(&all_files(&disk)).cloned().collect();
            assert!(gone.len() >= 2 && gone.iter().all(|path| path.starts_with(&format!("{place}parrot-ffffffff"))));
            assert!(
                !told(&manager)
                    .await
                    .iter()
                    .any(|r| r.uuid == OTHER_UUID && r.name == "parrot" && r.is_preparation == is_preparation)
            );
        }
    }
    assert_eq!(manager.get().await.status.unwrap().state, "ready", "the copy of the image is as it was");
    assert!(fs::read(disk.copy_file()).unwrap() == image());
}

#[tokio::test]
async fn what_changed_since_it_was_told_is_not_removed() {
    let (disk, manager) = first().await;
    write(&disk, "backing-images/parrot-ffffffff/backing.tmp");
    write(&disk, "tmp/parrot-ffffffff.tmp");
    for is_preparation in [false, true] {
        let before = request(&manager, &other(), is_preparation).await;
        let path = if is_preparation { "tmp/parrot-ffffffff.cfg" } else { "backing-images/parrot-ffffffff/backing" };
        write(&disk, path);
        let error = remove(&manager, before).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        assert!(error.message().contains("changed since"), "{error}");
        assert!(disk.path().join(path).exists());
        let now = request(&manager, &other(), is_preparation).await;
        remove(&manager, now).await.unwrap();
        assert!(!disk.path().join(path).exists());
    }
}

/// It was told as nobody's, and a data source that was started again found it whole before the request to remove it came.
#[tokio::test]
async fn what_a_data_source_found_again_is_not_removed_as_it_was_told() {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    let source = Source::of(&image()).await;
    let config = source_config(&disk, &[("url", &source.url())], None);
    RunningSource::start(config.clone()).await.end().await;
    let before = request(&manager, &key(), true).await;
    let again = RunningSource::start(data_source::Config { listen: address(8000), ..config }).await;
    assert_eq!(again.end().await.state, CopyState::ReadyForTransfer);
    let error = remove(&manager, before).await.unwrap_err();
    assert!(error.message().contains("changed since"), "{error}");
    let copy = manager.fetch(spec(), &again.address.to_string()).await.unwrap();
    assert_eq!(copy.status.unwrap().state, "ready");
}

/// It was told as nobody's, and the agent took it for a copy before the request to remove it came.
#[tokio::test]
async fn what_became_a_copy_since_it_was_told_is_not_removed() {
    let (disk, manager) = first().await;
    let (from, to) = (disk.disk().image_dir(&key()), disk.disk().image_dir(&other()));
    run_program("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
    let files = disk.disk().copy(&other());
    change_config(&files, |config| config.uuid = OTHER_UUID.into());
    change_manifest(&files, |manifest| manifest.uuid = other().uuid);
    let late = request(&manager, &other(), false).await;
    let wanted = BackingImageSpec { uuid: OTHER_UUID.into(), ..spec() };
    manager.fetch(wanted, "").await.unwrap();
    let error = remove(&manager, late).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("is a copy of this disk by now"), "{error}");
    assert!(files.file.exists());
    // As what it is now it can be named.
    let as_copy = RemoveRemainsRequest { name: "parrot".into(), uuid: OTHER_UUID.into(), ..Default::default() };
    remove(&manager, as_copy).await.unwrap();
    assert!(!disk.disk().image_dir(&other()).exists());
    assert_eq!(manager.get().await.status.unwrap().state, "ready", "the other one of its name is as it was");
}

#[tokio::test]
async fn what_is_received_or_lies_on_a_disk_that_is_away_is_not_removed() {
    let disk = TestDisk::new();
    let manager = RunningManager::start_with(&disk, address(8000), Duration::from_secs(3600)).await;
    write(&disk, "backing-images/parrot-ffffffff/backing");
    let orphan = request(&manager, &other(), false).await;
    let silent = address(8000);
    let _listener = TcpListener::bind(SocketAddr::new(silent.ip(), 8001)).await.unwrap();
    manager.sync(spec(), &[silent]).await.unwrap();
    let received = RemoveRemainsRequest { name: "parrot".into(), uuid: UUID.into(), ..Default::default() };
    let error = remove(&manager, received).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("is being received"), "{error}");

    fs::rename(disk.path().join("longhorn-disk.cfg"), disk.path().join("away")).unwrap();
    let error = remove(&manager, orphan.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let list = manager.client().await.list(()).await.unwrap().into_inner();
    assert!(!list.surveyed && list.remains.is_empty(), "nothing is known of it");
    fs::rename(disk.path().join("away"), disk.path().join("longhorn-disk.cfg")).unwrap();
    assert!(disk.path().join("backing-images/parrot-ffffffff/backing").exists());
    remove(&manager, orphan).await.unwrap();
}

#[tokio::test]
async fn a_name_that_leads_elsewhere_removes_nothing() {
    let (disk, manager) = first().await;
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("backing"), "content").unwrap();
    // A directory that is a link, and a file that is one.
    symlink(outside.path(), disk.disk().image_dir(&other())).unwrap();
    let mixed = ImageKey::parse("ara", OTHER_UUID).unwrap();
    write(&disk, "backing-images/ara-ffffffff/backing.cfg");
    symlink(outside.path().join("backing"), disk.disk().copy(&mixed).file).unwrap();
    symlink(outside.path().join("backing"), disk.disk().source(&other()).partial).unwrap();
    let before = all_files(&disk);
    let hostile = ["", ".", "..", "../..", "../backing-images/parrot", "a/b", "/etc", "parrot\0", "parrot ", "Parrot"];
    for (name, uuid) in hostile.map(|name| (name, UUID)).into_iter().chain(hostile.map(|uuid| ("parrot", uuid))) {
        for is_preparation in [false, true] {
            let (name, uuid) = (name.into(), uuid.into());
            let request = RemoveRemainsRequest { name, uuid, is_preparation, mark: String::new() };
            let error = remove(&manager, request.clone()).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{request:?}: {error}");
        }
    }
    let list = manager.client().await.list(()).await.unwrap().into_inner();
    assert_eq!(list.foreign, ["backing-images/parrot-ffffffff", "tmp/parrot-ffffffff.tmp"]);
    let told = list.remains.iter().find(|r| r.name == "ara").unwrap();
    assert!(told.is_mixed);
    for key in [other(), mixed] {
        for (is_preparation, mark) in [(false, ""), (false, told.mark.as_str()), (true, ""), (true, "1")] {
            let (name, uuid) = (key.name.to_string(), key.uuid.to_string());
            let request = RemoveRemainsRequest { name, uuid, is_preparation, mark: mark.into() };
            let answer = remove(&manager, request.clone()).await;
            assert_eq!(all_files(&disk), before, "{request:?}: {answer:?}");
        }
    }
    assert!(outside.path().join("backing").exists());
}
