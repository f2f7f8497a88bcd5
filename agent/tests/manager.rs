//! The manager role: hand-over, adoption, verification, deletion, and its gRPC face.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use backing_image_agent::config_file::FileConfig;
use backing_image_agent::{client, manager};
use proto::bimrpc::{
    BackingImageSpec, BackupStatusRequest, DeleteRequest, GetRequest, PrepareDownloadRequest, RemoveRemainsRequest,
    SendRequest,
};
use support::*;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::Code;

#[tokio::test]
async fn a_prepared_file_is_taken_over_by_rename_and_adopted_after_a_restart() {
    let (disk, bytes) = (TestDisk::new(), image());
    let manager = RunningManager::start(&disk).await;
    let source = Source::of(&bytes).await;
    let data_source = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    data_source.end().await;
    let inode = std::os::unix::fs::MetadataExt::ino(&disk.disk().source(&key()).file.metadata().unwrap());

    let wanted = BackingImageSpec { size: bytes.len() as i64, checksum: sha512(&bytes), ..spec() };
    for _ in 0..2 {
        let copy = manager.fetch(wanted.clone(), &data_source.address.to_string()).await.unwrap();
        let (spec, status) = (copy.spec.unwrap(), copy.status.unwrap());
        assert_eq!((status.state.as_str(), status.checksum), ("ready", sha512(&bytes)));
        assert_eq!((spec.size, spec.virtual_size), (bytes.len() as i64, bytes.len() as i64));
        assert_eq!(copy.format, "raw");
    }
    assert_eq!(disk.temporary_files(), Vec::<String>::new());
    let file = disk.copy_file();
    let metadata = file.metadata().unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::ino(&metadata), inode, "renamed, not copied");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o444);
    let config = FileConfig::read(&disk.disk().copy(&key()).config).unwrap();
    assert_eq!(config.name, file.display().to_string());
    assert_eq!((config.expected_checksum.as_str(), config.format.as_str()), (sha512(&bytes).as_str(), "raw"));

    // A data source that is started again after the hand-over has nothing to do.
    let again = source_config(&disk, &[("url", &source.url())], None);
    let again = RunningSource::start(again).await;
    wait_until("it knows of the hand-over", async || again.get().await.state.as_str() == "ready").await;
    assert_eq!(source.requests().len(), 1);

    manager.kill();
    let manager = RunningManager::start(&disk).await;
    let copy = manager.get().await;
    assert_eq!(copy.status.unwrap().state, "ready", "unchanged files are ready without being read");
    assert!(std::fs::read(&file).unwrap() == bytes);
}

#[tokio::test]
async fn a_hand_over_that_was_interrupted_is_finished() {
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::of(&bytes).await;
    let data_source = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    data_source.end().await;
    data_source.post("action=transfer").await;
    // The directory is made, the file not yet renamed.
    std::fs::create_dir_all(disk.disk().image_dir(&key())).unwrap();
    let manager = RunningManager::start(&disk).await;
    let copy = manager.fetch(spec(), &data_source.address.to_string()).await.unwrap();
    assert_eq!(copy.status.unwrap().state, "ready");
    // Renamed, but the caller never heard of it.
    manager.kill();
    let manager = RunningManager::start(&disk).await;
    let copy = manager.fetch(spec(), &data_source.address.to_string()).await.unwrap();
    assert_eq!(copy.status.unwrap().state, "ready");
    let copy = manager.fetch(spec(), "").await.unwrap();
    assert_eq!(copy.status.unwrap().state, "ready");
    // The same when the manager itself has not seen the file yet.
    manager.kill();
    let (place, away) = (disk.disk().images_dir(), disk.path().join("away"));
    std::fs::rename(&place, &away).unwrap();
    let manager = RunningManager::start(&disk).await;
    std::fs::rename(&away, &place).unwrap();
    let copy = manager.fetch(spec(), &data_source.address.to_string()).await.unwrap();
    assert_eq!(copy.status.unwrap().state, "ready");
}

#[tokio::test]
async fn a_fetch_that_does_not_fit_is_refused_and_the_file_stays() {
    let (disk, bytes) = (TestDisk::new(), image());
    let manager = RunningManager::start(&disk).await;
    let body = bytes.clone();
    let slow = Source::new(move |_, _| Reply::whole(&body).cut(MIB).stalled()).await;
    let mut config = source_config(&disk, &[("url", &slow.url())], None);
    config.patience.idle_timeout = Duration::from_secs(60);
    let unfinished = RunningSource::start(config).await;
    let error = manager.fetch(spec(), &unfinished.address.to_string()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("not `ready-for-transfer`"), "{error}");
    drop(unfinished);

    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    let source = Source::of(&bytes).await;
    let data_source = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    data_source.end().await;
    let address = data_source.address.to_string();
    for wanted in [
        BackingImageSpec { checksum: "a".repeat(128), ..spec() },
        BackingImageSpec { size: 512, ..spec() },
        BackingImageSpec { uuid: "ffffffff".into(), ..spec() },
    ] {
        let error = manager.fetch(wanted, &address).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    }
    assert_eq!(manager.fetch(spec(), "").await.unwrap_err().code(), Code::NotFound);
    let error = manager.fetch(spec(), &support::address(9).to_string()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert_eq!(data_source.get().await.state.as_str(), "ready-for-transfer", "nothing was let go");
    manager.fetch(spec(), &address).await.unwrap();
}

/// The only copy of the disk differs from the image, which was prepared again there.
#[tokio::test]
async fn a_copy_that_is_none_of_its_image_makes_room_for_the_prepared_file() {
    let (disk, bytes) = (TestDisk::new(), image());
    let manager = RunningManager::start(&disk).await;
    prepare(&disk, &manager, &bytes[..MIB]).await;
    let source = Source::of(&bytes).await;
    let config = source_config(&disk, &[("url", &source.url())], Some(&sha512(&bytes)));
    let data_source = RunningSource::start(config).await;
    data_source.end().await;
    let address = data_source.address.to_string();
    let wanted = BackingImageSpec { checksum: sha512(&bytes), ..spec() };
    let error = manager.fetch(wanted.clone(), &address).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");

    // As the controller replaces it.
    let (name, uuid) = (key().name.to_string(), key().uuid.to_string());
    let only_the_copy = RemoveRemainsRequest { name, uuid, is_preparation: false, mark: String::new() };
    manager.client().await.remove_remains(only_the_copy).await.unwrap();
    let copy = manager.fetch(wanted, &address).await.unwrap();
    let status = copy.status.unwrap();
    assert_eq!((status.state.as_str(), status.checksum), ("ready", sha512(&bytes)));
    assert!(std::fs::read(disk.copy_file()).unwrap() == bytes);
    assert_eq!(source.requests().len(), 1, "it is prepared once");
}

#[tokio::test]
async fn a_prepared_file_that_is_gone_is_refused_as_one_that_is_not_there() {
    let (disk, bytes) = (TestDisk::new(), image());
    let manager = RunningManager::start(&disk).await;
    let source = Source::of(&bytes).await;
    let data_source = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    data_source.end().await;
    std::fs::remove_file(disk.disk().source(&key()).file).unwrap();
    let error = manager.fetch(spec(), &data_source.address.to_string()).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    assert!(error.message().contains("is missing"), "{error}");
}

#[tokio::test]
async fn a_changed_time_means_verify_and_damage_is_found() {
    let (disk, manager) = first().await;
    let before = FileConfig::read(&disk.disk().copy(&key()).config).unwrap();
    touch(&disk, SystemTime::UNIX_EPOCH);
    wait_until("the new time is recorded", async || {
        FileConfig::read(&disk.disk().copy(&key()).config)
            .is_some_and(|c| c.modification_time != before.modification_time)
    })
    .await;
    manager.reaches("ready").await;

    damage(&disk, 2);
    touch(&disk, SystemTime::now());
    let copy = manager.reaches("failed").await;
    let message = copy.status.unwrap().error_msg;
    assert!(message.contains("1 of 13 chunks differ") && message.contains("chunk 2"), "{message}");

    // The same after a restart.
    manager.kill();
    let manager = RunningManager::start(&disk).await;
    manager.reaches("failed").await;
}

#[tokio::test]
async fn a_file_that_longhorn_left_is_adopted_by_its_checksum() {
    let ((disk, manager), bytes) = (first().await, image());
    manager.kill();
    let files = disk.disk().copy(&key());
    std::fs::remove_file(&files.manifest).unwrap();
    let config = FileConfig { format: String::new(), ..FileConfig::read(&files.config).unwrap() };
    std::fs::write(&files.config, serde_json::to_string(&config).unwrap()).unwrap();

    let manager = RunningManager::start(&disk).await;
    let copy = manager.reaches("ready").await;
    assert_eq!((copy.format.as_str(), copy.status.unwrap().checksum), ("raw", sha512(&bytes)));
    assert!(files.manifest.exists());

    manager.kill();
    std::fs::remove_file(&files.manifest).unwrap();
    damage(&disk, 0);
    let manager = RunningManager::start(&disk).await;
    let message = manager.reaches("failed").await.status.unwrap().error_msg;
    assert!(message.contains(&sha512(&bytes)), "{message}");
}

#[tokio::test]
async fn a_file_that_vanished_is_reported() {
    let (disk, manager) = first().await;
    std::fs::remove_dir_all(disk.path().join("backing-images")).unwrap();
    let message = manager.reaches("failed").await.status.unwrap().error_msg;
    assert!(message.contains("gone"), "{message}");
}

#[tokio::test]
async fn delete_removes_everything_and_can_be_repeated() {
    let (disk, manager) = first().await;
    let source = disk.disk().source(&key());
    let torn = source.config.with_extension("cfg.writing");
    for leftover in [&source.partial, &source.file, &source.config, &torn, &disk.disk().copy(&key()).partial] {
        std::fs::write(leftover, "x").unwrap();
    }
    for _ in 0..2 {
        let request = DeleteRequest { name: key().name.to_string(), uuid: UUID.into() };
        manager.client().await.delete(request).await.unwrap();
        assert!(!disk.disk().image_dir(&key()).exists());
        assert_eq!(disk.temporary_files(), Vec::<String>::new());
    }
    let request = GetRequest { name: key().name.to_string(), uuid: UUID.into() };
    assert_eq!(manager.client().await.get(request).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn bad_requests_get_the_right_codes() {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    let mut client = manager.client().await;
    for (name, uuid) in [("", UUID), ("parrot", ""), ("../../etc", UUID), ("parrot", "../../..")] {
        let request = GetRequest { name: name.into(), uuid: uuid.into() };
        assert_eq!(client.get(request).await.unwrap_err().code(), Code::InvalidArgument, "{name} {uuid}");
        let request = DeleteRequest { name: name.into(), uuid: uuid.into() };
        assert_eq!(client.delete(request).await.unwrap_err().code(), Code::InvalidArgument, "{name} {uuid}");
    }
    assert_eq!(manager.sync(spec(), &[]).await.unwrap_err().code(), Code::InvalidArgument);
    let to_nobody = SendRequest { name: "parrot".into(), uuid: UUID.into(), to_address: " ".into() };
    assert_eq!(client.send(to_nobody).await.unwrap_err().code(), Code::InvalidArgument);
    let negative = BackingImageSpec { size: -1, ..spec() };
    assert_eq!(manager.sync(negative, &[address(8000)]).await.unwrap_err().code(), Code::InvalidArgument);
    let checksum = BackingImageSpec { checksum: "abc".into(), ..spec() };
    let error = manager.sync(checksum, &[address(8000)]).await.unwrap_err();
    assert!(error.message().contains("128 lower-case hexadecimal digits"), "{error}");
    assert_eq!(
        client.prepare_download(PrepareDownloadRequest::default()).await.unwrap_err().code(),
        Code::Unimplemented
    );
    assert_eq!(client.backup_status(BackupStatusRequest::default()).await.unwrap_err().code(), Code::Unimplemented);
    let version = client.version_get(()).await.unwrap().into_inner();
    assert_eq!((version.backing_image_manager_api_version, version.backing_image_manager_api_min_version), (3, 3));
}

#[tokio::test]
async fn a_watcher_hears_of_every_change_at_once() {
    let (disk, bytes) = (TestDisk::new(), image());
    let manager = RunningManager::start(&disk).await;
    let mut ticks = manager.client().await.watch(()).await.unwrap().into_inner();
    ticks.next().await.unwrap().unwrap();
    prepare(&disk, &manager, &bytes).await;
    tokio::time::timeout(Duration::from_secs(1), ticks.next()).await.expect("a tick").unwrap().unwrap();
}

#[tokio::test]
async fn the_command_line_prints_longhorns_json() {
    let (disk, bytes) = (TestDisk::new(), image());
    let manager = RunningManager::start(&disk).await;
    let url = manager.address.to_string();
    assert_eq!(client::to_json(&client::list(&url, &Default::default()).await.unwrap()), "{}");
    prepare(&disk, &manager, &bytes).await;
    let copy = client::get(&url, "parrot", UUID, &Default::default()).await.unwrap();
    assert_eq!((copy.size, copy.status.state.as_str()), (bytes.len() as i64, "ready"));
    let list = client::to_json(&client::list(&url, &Default::default()).await.unwrap());
    assert!(list.starts_with("{\n\t\"parrot\": {\n\t\t\"name\": \"parrot\",\n\t\t\"uuid\": \"0a1b2c3d\""), "{list}");
    client::delete(&url, "parrot", UUID, &Default::default()).await.unwrap();
    let error = client::get(&url, "parrot", UUID, &Default::default()).await.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::NotFound);
    let error = client::list(&address(8000).to_string(), &Default::default()).await.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::Unavailable);
}

/// One was deleted and made again under its name: neither may hide the other.
#[tokio::test]
async fn two_images_of_one_name_are_both_listed() {
    let (disk, manager) = first().await;
    manager.kill();
    let other: backing_image_agent::layout::ImageKey = "parrot-ffffffff".parse().unwrap();
    let (from, to) = (disk.disk().image_dir(&key()), disk.disk().image_dir(&other));
    run_program("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
    let files = disk.disk().copy(&other);
    change_config(&files, |config| config.uuid = "ffffffff".into());
    change_manifest(&files, |manifest| manifest.uuid = other.uuid);
    let manager = RunningManager::start(&disk).await;
    let list = client::list(&manager.address.to_string(), &Default::default()).await.unwrap();
    let mut uuids: Vec<&str> = list.values().map(|copy| copy.uuid.as_str()).collect();
    uuids.sort();
    assert_eq!(uuids, [UUID, "ffffffff"]);
}

#[tokio::test]
async fn a_wrong_disk_is_refused() {
    let disk = TestDisk::new();
    let mut config = manager::Config::new(address(8000), disk.path());
    config.disk_uuid = Some("other".parse().unwrap());
    let error = manager::run(config, CancellationToken::new()).await.unwrap_err();
    assert!(error.to_string().contains("it is disk `disk-uuid`, not `other`"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let config = manager::Config::new(address(8000), folder.path());
    let error = manager::run(config, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::NotReady);
}

#[tokio::test]
async fn shutdown_ends_also_with_open_watches() {
    let disk = TestDisk::new();
    let (config, shutdown) = (manager::Config::new(address(8000), disk.path()), CancellationToken::new());
    let address = config.listen;
    let role = tokio::spawn(manager::run(config, shutdown.clone()));
    wait_for_port(address).await;
    let mut client = proto::bimrpc::backing_image_manager_service_client::BackingImageManagerServiceClient::connect(
        format!("http://{address}"),
    )
    .await
    .unwrap();
    let _ticks = client.watch(()).await.unwrap();
    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), role).await.expect("it ends soon").unwrap().unwrap();
}
