//! Copies on a disk that are not what they should be, and requests that meet others: each guard alone.

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Duration;

use api::image::CopyState;
use backing_image_agent::client;
use backing_image_agent::config_file::FileConfig;
use backing_image_agent::layout::FileSet;
use backing_image_agent::manifest::{Manifest, hash_chunk};
use proto::bimrpc::{BackingImageSpec, VerifyRequest};
use support::*;
use tokio::net::TcpListener;
use tonic::Code;

/// A disk with a ready copy, whose manager has ended.
async fn left_behind() -> TestDisk {
    let (disk, manager) = first().await;
    manager.kill();
    disk
}

/// A peer that takes connections and says nothing.
async fn silent_peer() -> (std::net::SocketAddr, TcpListener) {
    let address = address(8000);
    let listener = TcpListener::bind(std::net::SocketAddr::new(address.ip(), 8001)).await.unwrap();
    (address, listener)
}

#[tokio::test]
async fn a_prepared_file_about_which_not_everything_agrees_is_not_taken_over() {
    type Change = fn(&FileSet);
    let changes: [(&str, Change); 4] = [
        ("its time", |f| File::open(&f.file).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap()),
        ("the manifest of another image", |f| change_manifest(f, |m| m.uuid = "ffffffff".parse().unwrap())),
        ("the manifest of another file", |f| change_manifest(f, |m| m.sha512 = "a".repeat(128).parse().unwrap())),
        ("a longer manifest", |f| {
            change_manifest(f, |m| {
                (m.size_bytes, m.chunks) = (m.size_bytes + MIB as u64, [&m.chunks[..], &[None]].concat())
            });
        }),
    ];
    for (what, change) in changes {
        let disk = TestDisk::new();
        let manager = RunningManager::start(&disk).await;
        let source = Source::of(&image()).await;
        let data_source = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
        data_source.end().await;
        change(&disk.disk().source(&key()));
        let error = manager.fetch(spec(), &data_source.address.to_string()).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{what}");
        assert!(error.message().contains("is not what its `.cfg` and `.chunks` say"), "{what}: {error}");
        assert_eq!(data_source.get().await.state, CopyState::ReadyForTransfer, "{what}: nothing was let go");
        let other = BackingImageSpec { uuid: "ffffffff".into(), ..spec() };
        let error = manager.fetch(other, &data_source.address.to_string()).await.unwrap_err();
        assert!(error.message().contains("works on uuid `0a1b2c3d`, not `ffffffff`"), "{error}");
    }
}

/// What it does not let go stays where it is; and nobody waits for it for ever, with the copy locked.
#[tokio::test]
async fn nothing_is_taken_from_a_data_source_that_refuses_or_says_nothing() {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    let source = Source::of(&image()).await;
    let data_source = RunningSource::start(source_config(&disk, &[("url", &source.url())], None)).await;
    let status = serde_json::to_string(&data_source.end().await).unwrap();
    let refusing = Source::new(move |_, request| match request.starts_with("POST") {
        true => Reply::status("409 Conflict"),
        false => Reply::whole(status.as_bytes()),
    })
    .await;
    let error = manager.fetch(spec(), &refusing.address.to_string()).await.unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("answered 409"), "{error}");
    assert!(disk.disk().source(&key()).file.exists() && !disk.copy_file().exists());
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let asked = manager.fetch(spec(), &silent.local_addr().unwrap().to_string()).await;
    let error = asked.unwrap_err();
    assert!(error.code() == Code::Unavailable && error.message().contains("cannot be asked"), "{error}");
    manager.fetch(spec(), &data_source.address.to_string()).await.unwrap();
    assert_eq!(data_source.get().await.state, CopyState::Ready, "it knows that its work is done");
}

#[tokio::test]
async fn a_hand_over_clears_away_what_earlier_attempts_left() {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    let partial = disk.disk().copy(&key()).partial;
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::fs::write(&partial, "half").unwrap();
    prepare(&disk, &manager, &image()).await;
    assert!(!partial.exists());
    // A data source that is started again finds the copy, and what one before it left.
    std::fs::write(disk.disk().source(&key()).partial, "half").unwrap();
    let again = RunningSource::start(source_config(&disk, &[("url", "http://127.0.0.1:9/x")], None)).await;
    wait_until("it knows of the hand-over", async || again.get().await.state == CopyState::Ready).await;
    assert_eq!(disk.temporary_files(), Vec::<String>::new());
}

/// Verified anew: a copy that was taken as it is says nothing of a verification.
#[tokio::test]
async fn a_copy_about_which_not_everything_agrees_is_read_before_it_is_ready() {
    type Change = fn(&FileSet);
    let changes: [(&str, Change); 4] = [
        ("the config of another image", |f| change_config(f, |c| c.uuid = "ffffffff".into())),
        ("the manifest of another image", |f| change_manifest(f, |m| m.uuid = "ffffffff".parse().unwrap())),
        ("another checksum", |f| change_config(f, |c| c.current_checksum = "a".repeat(128))),
        ("another format", |f| change_config(f, |c| c.format = "qcow2".into())),
    ];
    for (what, change) in changes {
        let disk = left_behind().await;
        change(&disk.disk().copy(&key()));
        let manager = RunningManager::start(&disk).await;
        let copy = manager.reaches("ready").await;
        assert!(!copy.verified_at.is_empty(), "{what}");
        assert_eq!(copy.status.unwrap().checksum, sha512(&image()), "{what}");
    }
    let disk = left_behind().await;
    assert_eq!(RunningManager::start(&disk).await.reaches("ready").await.verified_at, "");
}

#[tokio::test]
async fn a_copy_that_is_not_what_was_recorded_is_not_ready() {
    type Change = fn(&FileSet);
    let changes: [(&str, Change, &str); 6] = [
        ("bytes behind the end", |f| rewrite(f, |file| file.set_len(image().len() as u64 + 512).unwrap()), "differ"),
        ("the last bytes gone", |f| rewrite(f, |file| file.set_len(image().len() as u64 - 512).unwrap()), "differ"),
        (
            "a longer manifest",
            |f| {
                let longer = |m: &mut Manifest| {
                    (m.size_bytes, m.chunks) = (m.size_bytes + MIB as u64, [&m.chunks[..], &[None]].concat());
                };
                change_manifest(f, longer);
            },
            "differ",
        ),
        (
            "nothing that describes it",
            |f| {
                std::fs::remove_file(&f.config).unwrap();
                std::fs::remove_file(&f.manifest).unwrap();
            },
            "neither `backing.cfg` nor `backing.chunks`",
        ),
        (
            "no manifest, and a config without any checksum",
            |f| {
                std::fs::remove_file(&f.manifest).unwrap();
                change_config(f, |c| c.current_checksum.clear());
            },
            "neither `backing.cfg` nor `backing.chunks`",
        ),
        (
            "no manifest, and only what was expected of it",
            |f| {
                std::fs::remove_file(&f.manifest).unwrap();
                change_config(f, |c| {
                    (c.current_checksum, c.expected_checksum) = (String::new(), "a".repeat(128));
                });
            },
            "there is no manifest to repair it by",
        ),
    ];
    for (what, change, why) in changes {
        let disk = left_behind().await;
        change(&disk.disk().copy(&key()));
        let manager = RunningManager::start(&disk).await;
        let message = manager.reaches("failed").await.status.unwrap().error_msg;
        assert!(message.contains(why), "{what}: {message}");
    }
    // While the manager runs: another length alone is seen.
    let disk = left_behind().await;
    let manager = RunningManager::start(&disk).await;
    rewrite(&disk.disk().copy(&key()), |file| file.set_len(MIB as u64).unwrap());
    manager.reaches("failed").await;
}

#[tokio::test]
async fn a_raw_copy_stays_raw_when_its_manifest_is_lost() {
    let disk = left_behind().await;
    let files = disk.disk().copy(&key());
    rewrite(&files, |file| file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap());
    std::fs::remove_file(&files.manifest).unwrap();
    change_config(&files, |c| c.current_checksum = sha512(&std::fs::read(&files.file).unwrap()));
    let manager = RunningManager::start(&disk).await;
    assert_eq!(manager.reaches("ready").await.format, "raw");
}

#[tokio::test]
async fn a_copy_that_is_found_on_the_disk_must_be_the_one_that_is_wanted() {
    for wanted in [BackingImageSpec { checksum: "a".repeat(128), ..spec() }, BackingImageSpec { size: 512, ..spec() }] {
        for synced in [true, false] {
            let (disk, known) = (left_behind().await, TestDisk::new());
            let manager = RunningManager::start(&known).await;
            // It appears while the manager runs, as after a disk was mounted late.
            let moved = known.disk().image_dir(&key());
            std::fs::create_dir_all(moved.parent().unwrap()).unwrap();
            run_program("cp", &["-a", disk.disk().image_dir(&key()).to_str().unwrap(), moved.to_str().unwrap()]);
            let (peer, _listener) = silent_peer().await;
            let code = async || {
                let answer = match synced {
                    true => manager.sync(wanted.clone(), &[peer]).await,
                    false => manager.fetch(wanted.clone(), "").await,
                };
                answer.unwrap_err().code()
            };
            assert_eq!(code().await, Code::FailedPrecondition);
            assert_eq!(code().await, Code::FailedPrecondition, "the same when it is known by now");
        }
    }
}

#[tokio::test]
async fn a_copy_that_is_on_its_way_is_neither_begun_again_nor_fetched() {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    let (peer, _listener) = silent_peer().await;
    let (other, _other_listener) = silent_peer().await;
    manager.sync(spec(), &[peer]).await.unwrap();
    let again = manager.sync(spec(), &[other]).await.unwrap();
    assert_eq!(again.status.unwrap().sender_manager_address, peer.to_string());
    let error = manager.fetch(spec(), "").await.unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("is being received"), "{error}");
}

#[tokio::test]
async fn a_peer_that_says_nothing_of_its_manifest_is_left() {
    let disk = TestDisk::new();
    let manager = RunningManager::start_with(&disk, address(8000), Duration::from_millis(300)).await;
    let (peer, _listener) = silent_peer().await;
    manager.sync(spec(), &[peer]).await.unwrap();
    let message = manager.reaches("failed").await.status.unwrap().error_msg;
    assert!(message.contains("it was silent for 300ms"), "{message}");
}

#[tokio::test]
async fn a_copy_whose_peers_say_nothing_is_deleted_at_once() {
    let disk = TestDisk::new();
    let manager = RunningManager::start_with(&disk, address(8000), Duration::from_secs(3600)).await;
    let (peer, _listener) = silent_peer().await;
    manager.sync(spec(), &[peer]).await.unwrap();
    manager.reaches("starting").await;
    let url = manager.address.to_string();
    client::delete(&url, "parrot", UUID, &Default::default()).await.unwrap();
    assert!(client::list(&url, &Default::default()).await.unwrap().is_empty());
}

/// A part that a killed sync left is kept only where it is right.
#[tokio::test]
async fn wrong_bytes_in_a_part_are_not_kept() {
    let ((_from, peer), bytes) = (first().await, image());
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    let partial = disk.disk().copy(&key()).partial;
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    // Longer than the file, with wrong chunks, and with bytes where holes must be.
    std::fs::write(&partial, vec![0xff; bytes.len() + MIB]).unwrap();
    manager.sync(spec(), &[peer.address]).await.unwrap();
    manager.reaches("ready").await;
    assert!(std::fs::read(disk.copy_file()).unwrap() == image());
}

#[tokio::test]
async fn a_peer_with_another_image_of_the_name_cannot_help() {
    let (from, peer) = first().await;
    change_manifest(&from.disk().copy(&key()), |m| m.uuid = "ffffffff".parse().unwrap());
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    manager.sync(spec(), &[peer.address]).await.unwrap();
    let message = manager.reaches("failed").await.status.unwrap().error_msg;
    assert!(message.contains("the image with uuid ffffffff"), "{message}");
}

/// Damages a chunk, and has the copy verified.
async fn damaged(disk: &TestDisk, manager: &RunningManager, chunk: usize) {
    damage(disk, chunk);
    let request = VerifyRequest { name: "parrot".into(), uuid: UUID.into(), ..Default::default() };
    manager.client().await.verify(request).await.unwrap();
    manager.reaches("failed").await;
}

#[tokio::test]
async fn a_repaired_copy_is_read_only_again_and_holes_need_no_peer() {
    let (_from, _peer, disk, manager) = two().await;
    // A chunk of zeros; the only peer is dead.
    damaged(&disk, &manager, 4).await;
    manager.sync(spec(), &[address(8000)]).await.unwrap();
    let copy = manager.reaches("ready").await;
    assert!(copy.damage.contains("repaired from its manifest"), "{}", copy.damage);
    assert!(std::fs::read(disk.copy_file()).unwrap() == image());
    assert_eq!(disk.copy_file().metadata().unwrap().permissions().mode() & 0o777, 0o444);
}

/// A copy that cannot be repaired where it lies, since nothing is known of it any more: what is right in it is kept.
#[tokio::test]
async fn a_copy_is_made_anew_from_the_right_chunks_of_a_damaged_one_only() {
    type Change = fn(&FileSet);
    let changes: [(&str, Change); 4] = [
        ("no manifest", |f| std::fs::remove_file(&f.manifest).unwrap()),
        ("a torn manifest", |f| std::fs::write(&f.manifest, "BIchunks").unwrap()),
        ("the manifest of another image", |f| change_manifest(f, |m| m.uuid = "ffffffff".parse().unwrap())),
        ("bytes behind the end", |f| rewrite(f, |file| file.set_len(image().len() as u64 + 512).unwrap())),
    ];
    let (_from, peer, disk, manager) = two().await;
    for (what, change) in changes {
        damaged(&disk, &manager, 2).await;
        let files = disk.disk().copy(&key());
        change(&files);
        manager.sync(spec(), &[peer.address]).await.unwrap();
        manager.reaches("ready").await;
        assert!(std::fs::read(&files.file).unwrap() == image(), "{what}");
        let (config, manifest) = (FileConfig::read(&files.config).unwrap(), Manifest::read(&files.manifest));
        assert_eq!((config.uuid.as_str(), manifest.unwrap().unwrap().uuid), (UUID, key().uuid), "{what}");
    }
}

/// What a damaged copy shall become is not what it was: nothing of it is written over.
#[tokio::test]
async fn a_damaged_copy_is_repaired_only_into_what_is_wanted() {
    for wanted in [BackingImageSpec { checksum: "a".repeat(128), ..spec() }, BackingImageSpec { size: 512, ..spec() }] {
        let (_from, peer, disk, manager) = two().await;
        damaged(&disk, &manager, 2).await;
        manager.sync(wanted, &[peer.address]).await.unwrap();
        wait_until("no peer fits", async || {
            let status = manager.get().await.status.unwrap();
            status.state == "failed" && status.error_msg.contains("is wanted")
        })
        .await;
        let chunk = &std::fs::read(disk.copy_file()).unwrap()[2 * MIB..3 * MIB];
        assert_ne!(hash_chunk(chunk), hash_chunk(&image()[2 * MIB..3 * MIB]), "it was not touched");
    }
}
