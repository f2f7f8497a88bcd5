//! The node service with real loop devices, filesystems and mounts.

mod formatting;
mod growth;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use api::engine::{DesireState, EngineStatus, InstanceState};
use api::volume::{Robustness, VolumeStatus};
use api::{Engine, ErrorKind, Volume, names};
use dataplane::loop_device::{self, LoopDevice, Owner};
use proto::csi::volume_capability::{AccessType, BlockVolume, MountVolume, access_mode::Mode};
use proto::csi::{VolumeCapability, volume_usage::Unit};
use store::embedded::Embedded;

use super::*;
use crate::capability::tests::{capability, mount};
use crate::deadline::Deadline;

/// A volume `v`, attached to `node-1`, whose device is a loop device over a file. Everything ends with it.
struct World {
    context: Context,
    folder: tempfile::TempDir,
    device: Option<LoopDevice>,
}

impl World {
    async fn new(prepare: impl FnOnce(&Path)) -> World {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(names::engine_name("v")).join(names::ENGINE_VOLUME_FILE);
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::File::create(&file).unwrap().set_len(320 << 20).unwrap();
        prepare(&file);
        let device = loop_device::attach(&file, &Owner::of(folder.path()).unwrap()).await.unwrap();
        let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
        let mut volume = Volume::new("v", Default::default());
        volume.spec.node_id = "node-1".into();
        store.create(&volume).await.unwrap();
        let mut engine = Engine::new(&names::engine_name("v"), Default::default());
        engine.spec.node_id = "node-1".into();
        engine.spec.desire_state = DesireState::Running;
        let mut engine = store.create(&engine).await.unwrap();
        let endpoint = device.path.display().to_string();
        engine.status = Some(EngineStatus { current_state: InstanceState::Running, endpoint, ..Default::default() });
        store.replace_status(&engine).await.unwrap();
        let context =
            Context { store, node_name: "node-1".into(), in_flight: InFlight::default(), ungrown: Ungrown::default() };
        World { context, folder, device: Some(device) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join(name)
    }

    fn volume_file(&self) -> PathBuf {
        self.path(&names::engine_name("v")).join(names::ENGINE_VOLUME_FILE)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    async fn stage(&self, capability: VolumeCapability) -> Result<(), CsiError> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: "v".into(),
            staging_target_path: self.text("staging"),
            volume_capability: Some(capability),
            ..Default::default()
        };
        stage::stage(&self.context, request, &never()).await.map(drop)
    }

    async fn unstage(&self) -> Result<(), CsiError> {
        let request =
            csi::NodeUnstageVolumeRequest { volume_id: "v".into(), staging_target_path: self.text("staging") };
        stage::unstage(&self.context, request, &never()).await.map(drop)
    }

    async fn publish(&self, target: &str, capability: VolumeCapability, readonly: bool) -> Result<(), CsiError> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: "v".into(),
            staging_target_path: self.text("staging"),
            target_path: self.text(target),
            volume_capability: Some(capability),
            readonly,
            ..Default::default()
        };
        publish::publish(&self.context, request, &never()).await.map(drop)
    }

    async fn unpublish(&self, target: &str) -> Result<(), CsiError> {
        let request = csi::NodeUnpublishVolumeRequest { volume_id: "v".into(), target_path: self.text(target) };
        publish::unpublish(&self.context, request, &never()).await.map(drop)
    }

    async fn stats(&self, path: &str) -> Result<Vec<csi::VolumeUsage>, CsiError> {
        let request =
            csi::NodeGetVolumeStatsRequest { volume_id: "v".into(), volume_path: path.into(), ..Default::default() };
        Ok(stats::get_stats(&self.context, request, &never()).await?.usage)
    }

    async fn volume(&self) -> Volume {
        self.context.store.get::<Volume>("v").await.unwrap().unwrap()
    }

    /// As if a formatting had begun and this process had died.
    async fn note(&self, fs_type: &str) {
        let note = |v: &mut Volume| v.status.get_or_insert_default().unfinished_filesystem = fs_type.into();
        self.context.store.modify_status("v", note).await.unwrap();
    }

    async fn noted(&self) -> String {
        self.volume().await.status.unwrap_or_default().unfinished_filesystem
    }

    /// The device's loop, gone for good.
    async fn end(mut self) {
        let device = self.device.take().unwrap();
        loop_device::detach(&device).await.unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // After a failed test.
        let Some(device) = self.device.take() else { return };
        let below = self.folder.path().canonicalize().unwrap();
        for mounted in dataplane::mount::list().unwrap().into_iter().rev().filter(|m| m.target.starts_with(&below)) {
            dataplane::mount::unmount_lazily(&mounted.target).unwrap();
        }
        Command::new("losetup").arg("-d").arg(device.path).status().unwrap();
    }
}

fn never() -> Deadline {
    Deadline::after(Duration::from_secs(60), &CancellationToken::new())
}

fn block() -> VolumeCapability {
    capability(AccessType::Block(BlockVolume {}), Mode::SingleNodeWriter)
}

fn single_writer() -> VolumeCapability {
    capability(AccessType::Mount(MountVolume::default()), Mode::SingleNodeSingleWriter)
}

fn error<T: std::fmt::Debug>(result: Result<T, CsiError>) -> (ErrorKind, String) {
    let error = result.unwrap_err();
    (error.kind(), crate::status::sentence(&error))
}

fn mount_as(fs_type: &str) -> VolumeCapability {
    let fs_type = fs_type.into();
    capability(AccessType::Mount(MountVolume { fs_type, ..Default::default() }), Mode::SingleNodeWriter)
}

fn mkfs(file: &Path, program: &str, args: &[&str], blocks: &str) {
    assert!(Command::new(program).args(args).arg(file).arg(blocks).output().unwrap().status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blank_volume_is_formatted_once_and_used_by_several() {
    let world = World::new(|_| ()).await;
    for _ in 0..2 {
        world.stage(mount()).await.unwrap();
    }
    for target in ["a/target", "a/target", "b"] {
        world.publish(target, mount(), false).await.unwrap();
    }
    fs::write(world.path("a/target/file"), "hello").unwrap();
    assert_eq!(fs::read(world.path("b/file")).unwrap(), b"hello");
    let (kind, text) = error(world.publish("c", single_writer(), false).await);
    assert!(kind == ErrorKind::NotReady && text.contains("one user only"), "{text}");
    for target in ["a/target", "b", "b"] {
        world.unpublish(target).await.unwrap();
        assert!(!world.path(target).exists());
    }
    for _ in 0..2 {
        world.unstage().await.unwrap();
    }
    world.stage(mount()).await.unwrap();
    assert_eq!(fs::read(world.path("staging/file")).unwrap(), b"hello");
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_keeps_its_filesystem_which_grows_to_the_volume() {
    // The image's filesystem has 64 MiB, the volume 320.
    let world = World::new(|file| mkfs(file, "mkfs.ext4", &["-q", "-b", "4096"], "16384")).await;
    let fs_type = "xfs".into();
    let wish = capability(AccessType::Mount(MountVolume { fs_type, ..Default::default() }), Mode::SingleNodeWriter);
    world.stage(wish).await.unwrap();
    let mounted = dataplane::mount::find(&world.path("staging")).unwrap().unwrap();
    assert_eq!(mounted.fs_type, "ext4");
    let usage = world.stats(&world.text("staging")).await.unwrap();
    assert!(usage[0].total > 250 << 20, "{usage:?}: the filesystem did not grow");
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn xfs_is_made_mounted_and_counted() {
    let world = World::new(|_| ()).await;
    let xfs = capability(
        AccessType::Mount(MountVolume {
            fs_type: "xfs".into(),
            mount_flags: vec!["noatime".into()],
            ..Default::default()
        }),
        Mode::SingleNodeMultiWriter,
    );
    world.stage(xfs.clone()).await.unwrap();
    world.publish("target", xfs, false).await.unwrap();
    let mounted = dataplane::mount::find(&world.path("staging")).unwrap().unwrap();
    assert!(mounted.fs_type == "xfs" && mounted.options.contains("noatime"), "{mounted:?}");
    let usage = world.stats(&world.text("target")).await.unwrap();
    assert_eq!((usage[0].unit(), usage[1].unit()), (Unit::Bytes, Unit::Inodes));
    assert!(usage.iter().all(|u| u.total > 0 && u.used > 0 && u.available > 0 && u.total >= u.used), "{usage:?}");
    world.unpublish("target").await.unwrap();
    world.unstage().await.unwrap();
    world.end().await;
}

/// After a loss of power the engine's last report names a device that may be anybody's by now.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_of_something_else_is_neither_formatted_nor_mounted() {
    let world = World::new(|_| ()).await;
    let device = world.device.clone().unwrap();
    loop_device::detach(&device).await.unwrap();
    let (kind, text) = error(world.stage(mount()).await);
    assert!(kind == ErrorKind::NotReady && text.contains("nothing behind it"), "{text}");

    let foreign = world.path("foreign");
    fs::File::create(&foreign).unwrap().set_len(320 << 20).unwrap();
    let theirs = loop_device::attach(&foreign, &Owner::of(foreign.parent().unwrap()).unwrap()).await.unwrap();
    let mut engine = world.context.store.get::<Engine>(&names::engine_name("v")).await.unwrap().unwrap();
    engine.status.as_mut().unwrap().endpoint = theirs.path.display().to_string();
    world.context.store.replace_status(&engine).await.unwrap();
    let refusals = [error(world.stage(mount()).await), error(world.publish("target", block(), false).await)];
    loop_device::detach(&theirs).await.unwrap();
    for (kind, text) in refusals {
        assert!(kind == ErrorKind::NotReady && text.contains("foreign") && text.contains("repeat the call"), "{text}");
    }
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&foreign).unwrap()), 0, "it was formatted");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_volume_is_the_device_itself() {
    let world = World::new(|_| ()).await;
    for _ in 0..2 {
        world.stage(block()).await.unwrap();
        world.publish("pod/block", block(), false).await.unwrap();
    }
    let device = &world.device.as_ref().unwrap().path;
    assert_eq!(mounts::device_number(&world.path("pod/block")).unwrap(), mounts::device_number(device).unwrap());
    let usage = world.stats(&world.text("pod/block")).await.unwrap();
    assert_eq!((usage.len(), usage[0].total, usage[0].unit()), (1, 320 << 20, Unit::Bytes));
    let writer = capability(AccessType::Block(BlockVolume {}), Mode::SingleNodeSingleWriter);
    assert_eq!(error(world.publish("other", writer, false).await).0, ErrorKind::NotReady);
    for _ in 0..2 {
        world.unpublish("pod/block").await.unwrap();
        assert!(!world.path("pod/block").exists());
    }
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_users_cannot_write() {
    let world = World::new(|_| ()).await;
    world.stage(mount()).await.unwrap();
    world.publish("target", mount(), true).await.unwrap();
    assert!(fs::write(world.path("target/file"), "x").is_err());
    let (kind, text) = error(world.publish("target", mount(), false).await);
    assert!(kind == ErrorKind::Incompatible && text.contains("read-only"), "{text}");
    assert_eq!(error(world.stage(block()).await).0, ErrorKind::Incompatible);
    world.unpublish("target").await.unwrap();
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_attached_or_not_staged_says_what_to_do_first() {
    let mut world = World::new(|_| ()).await;
    let (kind, text) = error(world.publish("target", mount(), false).await);
    assert!(kind == ErrorKind::NotReady && text.contains("stage it first"), "{text}");
    world.context.node_name = "node-2".into();
    let (kind, text) = error(world.stage(mount()).await);
    assert!(kind == ErrorKind::NotReady && text.contains("attach it first"), "{text}");
    world.context.node_name = "node-1".into();
    for path in ["some/path", "/no/such/path", &world.text(""), "/"] {
        assert_eq!(error(world.stats(path).await).0, ErrorKind::NotFound, "{path}");
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_holds_data_is_not_removed() {
    let world = World::new(|_| ()).await;
    fs::create_dir(world.path("target")).unwrap();
    fs::write(world.path("target/precious"), "x").unwrap();
    // Somebody's own: the volume is off it, and it stays.
    world.unpublish("target").await.unwrap();
    fs::write(world.path("file"), "x").unwrap();
    assert_eq!(error(world.unpublish("file").await).0, ErrorKind::Incompatible);
    assert!(world.path("target/precious").exists() && world.path("file").exists());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_degraded_volume_is_reported() {
    let world = World::new(|_| ()).await;
    let mut volume = world.context.store.get::<Volume>("v").await.unwrap().unwrap();
    volume.status = Some(VolumeStatus { robustness: Robustness::Degraded, ..Default::default() });
    world.context.store.replace_status(&volume).await.unwrap();
    let request = |id: &str| csi::NodeGetVolumeHealthRequest { volume_id: id.into(), ..Default::default() };
    let health = stats::get_health(&world.context, request("v"), &never()).await.unwrap().volume_health.unwrap();
    assert_eq!(health.health_statuses[0].status(), csi::VolumeHealthErrorType::Degraded);
    for (id, kind) in [("", ErrorKind::Invalid), ("w", ErrorKind::NotFound)] {
        assert_eq!(error(stats::get_health(&world.context, request(id), &never()).await).0, kind);
    }
    world.end().await;
}

/// Something of somebody else's at a path, until it is dropped.
struct Foreign(PathBuf);

impl Foreign {
    fn at(path: PathBuf) -> Foreign {
        fs::create_dir_all(&path).unwrap();
        assert!(Command::new("mount").args(["-t", "tmpfs", "theirs"]).arg(&path).status().unwrap().success());
        Foreign(path)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_has_mounted_is_neither_covered_nor_taken_for_the_volume() {
    let world = World::new(|_| ()).await;
    let theirs = Foreign::at(world.path("staging"));
    let (kind, text) = error(world.stage(mount()).await);
    assert!(kind == ErrorKind::Incompatible && text.contains("theirs"), "{text}");
    let (kind, text) = error(world.publish("target", mount(), false).await);
    assert!(kind == ErrorKind::NotReady && text.contains("stage it first"), "{text}");
    drop(theirs);
    world.stage(mount()).await.unwrap();
    let theirs = Foreign::at(world.path("target"));
    for wish in [mount(), block()] {
        let (kind, text) = error(world.publish("target", wish, false).await);
        assert!(kind == ErrorKind::Incompatible && text.contains("mount"), "{text}");
    }
    drop(theirs);
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_user_may_ask_again() {
    let world = World::new(|_| ()).await;
    world.stage(single_writer()).await.unwrap();
    for _ in 0..2 {
        world.publish("target", single_writer(), false).await.unwrap();
    }
    world.unpublish("target").await.unwrap();
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_with_the_volume_to_write_does_not_pass_for_one_who_only_reads() {
    let world = World::new(|_| ()).await;
    world.stage(mount()).await.unwrap();
    world.publish("target", mount(), false).await.unwrap();
    let (kind, text) = error(world.publish("target", mount(), true).await);
    assert!(kind == ErrorKind::Incompatible && text.contains("writable"), "{text}");
    world.unpublish("target").await.unwrap();
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_run_or_names_no_device_gives_none() {
    let world = World::new(|_| ()).await;
    let report = async |state, endpoint: String| {
        let mut engine = world.context.store.get::<Engine>(&names::engine_name("v")).await.unwrap().unwrap();
        let status = engine.status.as_mut().unwrap();
        (status.current_state, status.endpoint) = (state, endpoint);
        world.context.store.replace_status(&engine).await.unwrap();
        error(world.stage(mount()).await)
    };
    let device = world.device.as_ref().unwrap().path.display().to_string();
    for (state, endpoint, why) in [
        (InstanceState::Stopped, device, "has no block device on node `node-1` yet"),
        (InstanceState::Running, String::new(), "has no block device on node `node-1` yet"),
        (InstanceState::Running, world.volume_file().display().to_string(), "which is no block device"),
        (InstanceState::Running, world.text("nothing"), "which is not there"),
    ] {
        let (kind, text) = report(state, endpoint).await;
        assert!(kind == ErrorKind::NotReady && text.contains(why), "{text}");
    }
    let refusal = device::find_volume(&world.context, "").await.unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::Invalid);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_volumes_of_one_xfs_image_are_used_on_one_node() {
    let uuid = "uuid=0a1b2c3d-0000-4000-8000-000000000001";
    let make = |file: &Path| {
        let made = Command::new("mkfs.xfs").args(["-q", "-m", uuid]).arg(file).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    };
    let (one, other) = (World::new(make).await, World::new(make).await);
    one.stage(mount()).await.unwrap();
    other.stage(mount()).await.unwrap();
    for world in [one, other] {
        world.unstage().await.unwrap();
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn staging_reads_only_what_is_about_the_filesystem() {
    let world = World::new(|_| ()).await;
    let mut volume = world.context.store.get::<Volume>("v").await.unwrap().unwrap();
    volume.spec.parameters = [("fsType", "xfs"), ("a-later-key", "x")].map(|(k, v)| (k.into(), v.into())).into();
    world.context.store.replace(&volume).await.unwrap();
    world.stage(mount()).await.unwrap();
    assert_eq!(dataplane::mount::find(&world.path("staging")).unwrap().unwrap().fs_type, "xfs");
    world.unstage().await.unwrap();
    world.end().await;
}

#[test]
fn paths_are_whole() {
    assert!(path("target_path", "/var/lib/x").is_ok());
    for bad in ["", "relative/path", "/a/../b", "/"] {
        assert_eq!(path("target_path", bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
    }
}
