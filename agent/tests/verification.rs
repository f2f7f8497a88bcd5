//! Silent damage of ready copies: found when they are read again, repaired from peers where it lies.

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use backing_image_agent::config_file::FileConfig;
use proto::bimrpc::{BackingImageResponse, VerifyRequest};
use support::*;
use tonic::{Code, Status};

async fn verify(
    manager: &RunningManager,
    requested_at: &str,
    bytes_per_second: i64,
) -> Result<BackingImageResponse, Status> {
    let requested_at = requested_at.to_owned();
    let request = VerifyRequest { name: "parrot".into(), uuid: UUID.into(), requested_at, bytes_per_second };
    Ok(manager.client().await.verify(request).await?.into_inner())
}

#[tokio::test]
async fn a_flipped_byte_is_found_by_a_verification_and_repaired_where_it_lies() {
    let (disk, manager, other_disk, other) = two().await;
    damage(&disk, 10);
    assert_eq!(manager.get().await.status.unwrap().state, "ready", "nothing shows it but its bytes");
    let begun = verify(&manager, "", 0).await.unwrap();
    assert_eq!(begun.status.unwrap().state, "ready", "it is used while it is read");
    let copy = manager.reaches("failed").await;
    assert_eq!(copy.error_kind, "Corrupt");
    let message = copy.status.unwrap().error_msg;
    assert!(message.contains("1 of 13 chunks differ") && message.contains("chunk 10"), "{message}");

    // Who has the file open, as a replica has, sees the repair. Another bad chunk on the peer does no harm: it is not asked for.
    let open = File::open(disk.copy_file()).unwrap();
    damage(&other_disk, 1);
    manager.sync(spec(), &[other.address]).await.unwrap();
    let copy = manager.reaches("ready").await;
    let bytes = image();
    let mut seen = vec![0; bytes.len()];
    open.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == bytes && std::fs::read(disk.copy_file()).unwrap() == bytes);
    assert_eq!(open.metadata().unwrap().ino(), disk.copy_file().metadata().unwrap().ino());
    assert!(copy.damage.contains("1 of 13 chunks differed") && copy.damage.contains("chunk 10"), "{}", copy.damage);
    assert!(copy.damage.contains(&other.address.to_string()) && !copy.verified_at.is_empty(), "{copy:?}");
    assert_eq!(copy.error_kind, "");

    manager.kill();
    let manager = RunningManager::start(&disk).await;
    let again = manager.get().await;
    assert_eq!((again.status.unwrap().state.as_str(), again.damage), ("ready", copy.damage));
}

#[tokio::test]
async fn a_copy_that_was_found_damaged_is_not_taken_for_good_again() {
    let (disk, manager, _other_disk, _other) = two().await;
    damage(&disk, 2);
    verify(&manager, "", 0).await.unwrap();
    manager.reaches("failed").await;
    // What the controller does when nobody else has a copy.
    manager.fetch(spec(), "").await.unwrap();
    let copy = manager.reaches("failed").await;
    assert!(copy.status.unwrap().error_msg.contains("1 of 13 chunks differ"));
    manager.kill();
    let manager = RunningManager::start(&disk).await;
    assert_ne!(manager.get().await.status.unwrap().state, "ready");
    manager.reaches("failed").await;
}

#[tokio::test]
async fn a_chunk_that_is_bad_on_every_peer_too_leaves_the_copy_failed() {
    let (disk, manager, other_disk, other) = two().await;
    damage(&disk, 2);
    damage(&other_disk, 2);
    verify(&manager, "", 0).await.unwrap();
    manager.reaches("failed").await;
    manager.sync(spec(), &[other.address]).await.unwrap();
    wait_until("it says who was asked", async || {
        let copy = manager.get().await;
        let status = copy.status.unwrap();
        let says = status.error_msg.contains(&format!("{}: it has the wrong BLAKE3 hash there too", other.address));
        status.state == "failed" && copy.error_kind == "Corrupt" && says && status.error_msg.contains("chunk 2")
    })
    .await;
}

#[tokio::test]
async fn a_good_copy_stays_ready_and_says_when_it_was_read() {
    let (disk, manager, _other_disk, _other) = two().await;
    assert_eq!(manager.get().await.verified_at, "");
    // A wish of a machine whose clock is ahead is answered all the same.
    let wish = "2099-01-01T00:00:00Z";
    let mut watch = manager.client().await.watch(()).await.unwrap().into_inner();
    verify(&manager, wish, 0).await.unwrap();
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(60);
    while manager.get().await.verified_at.is_empty() {
        assert_eq!(manager.get().await.status.unwrap().state, "ready");
        tokio::time::timeout_at(deadline, watch.message()).await.expect("news in time").unwrap();
    }
    assert_eq!(manager.get().await.verified_at, wish);
    let config = FileConfig::read(&disk.disk().copy(&key()).config).unwrap();
    assert_eq!((config.verified_at.as_str(), config.damage.as_str()), (wish, ""));
    manager.kill();
    let manager = RunningManager::start(&disk).await;
    let copy = manager.get().await;
    assert_eq!((copy.status.unwrap().state.as_str(), copy.verified_at.as_str()), ("ready", wish));
}

#[tokio::test]
async fn nobody_waits_for_a_slow_reading() {
    let (disk, manager, _other_disk, _other) = two().await;
    // Twelve days for a chunk.
    verify(&manager, "", 1).await.unwrap();
    verify(&manager, "", 1).await.unwrap();
    assert_eq!(manager.get().await.verified_at, "");
    verify(&manager, "", 0).await.unwrap();
    wait_until("the fast one is done", async || !manager.get().await.verified_at.is_empty()).await;
    verify(&manager, "", 1).await.unwrap();
    let url = manager.address.to_string();
    backing_image_agent::client::delete(&url, "parrot", UUID, &Default::default()).await.unwrap();
    assert!(!disk.disk().image_dir(&key()).exists());
}

#[tokio::test]
async fn what_cannot_be_verified_is_refused_with_its_kind() {
    let (disk, manager, _other_disk, other) = two().await;
    let refusal = async |requested_at: &str, speed: i64| verify(&manager, requested_at, speed).await.unwrap_err();
    let named = |status: &Status| status.metadata().get(proto::ERROR_KIND_KEY).unwrap().to_str().unwrap().to_owned();
    for status in [refusal("yesterday", 0).await, refusal("", -1).await] {
        assert_eq!((status.code(), named(&status).as_str()), (Code::InvalidArgument, "Invalid"));
    }
    std::fs::remove_dir_all(disk.path().join("backing-images")).unwrap();
    manager.reaches("failed").await;
    let status = refusal("", 0).await;
    assert_eq!((status.code(), named(&status).as_str()), (Code::FailedPrecondition, "NotReady"));
    backing_image_agent::client::delete(&other.address.to_string(), "parrot", UUID, &Default::default()).await.unwrap();
    let status = verify(&other, "", 0).await.unwrap_err();
    assert_eq!((status.code(), named(&status).as_str()), (Code::NotFound, "NotFound"));
}
