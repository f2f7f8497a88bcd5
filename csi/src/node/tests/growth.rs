//! A volume that became larger while it was detached: its filesystem grows, its bytes stay.

use std::os::unix::fs::FileExt;

use super::*;

const GROWN: u64 = 640 << 20;

/// Bytes of a mounted filesystem.
fn bytes(path: &Path) -> u64 {
    dataplane::stats::filesystem(path).unwrap().total_bytes
}

fn written() -> Vec<u8> {
    (0..5 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

impl World {
    /// As if it had been detached, expanded and attached again.
    async fn reattach(&mut self, size: u64) {
        loop_device::detach(&self.device.take().unwrap()).await.unwrap();
        let file = self.volume_file();
        fs::File::options().write(true).open(&file).unwrap().set_len(size).unwrap();
        let device = loop_device::attach(&file, &Owner::of(self.folder.path()).unwrap()).await.unwrap();
        let endpoint = device.path.display().to_string();
        self.device = Some(device);
        let told = |e: &mut Engine| e.status.get_or_insert_default().endpoint.clone_from(&endpoint);
        self.context.store.modify_status(&names::engine_name("v"), told).await.unwrap();
    }

    /// A volume of 320 MiB that was used, and has 640 MiB now.
    async fn grown(fs_type: &str) -> World {
        let mut world = World::new(|_| ()).await;
        world.stage(mount_as(fs_type)).await.unwrap();
        fs::write(world.path("staging/file"), written()).unwrap();
        world.unstage().await.unwrap();
        world.reattach(GROWN).await;
        world
    }

    async fn expand(&self, path: &Path, required: u64) -> Result<u64, CsiError> {
        let request = csi::NodeExpandVolumeRequest {
            volume_id: "v".into(),
            volume_path: path.display().to_string(),
            capacity_range: Some(csi::CapacityRange { required_bytes: required as i64, limit_bytes: 0 }),
            staging_target_path: self.text("staging"),
            ..Default::default()
        };
        Ok(expand::expand(&self.context, request, &never()).await?.capacity_bytes as u64)
    }

    fn device(&self) -> PathBuf {
        self.device.as_ref().unwrap().path.clone()
    }

    /// Mounted by somebody who did not grow it.
    fn mount_as_it_is(&self, fs_type: &str) {
        fs::create_dir_all(self.path("staging")).unwrap();
        dataplane::mount::mount(&self.device(), &self.path("staging"), fs_type, &[]).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filesystem_grows_when_it_is_staged_and_keeps_its_files() {
    for fs_type in ["ext4", "xfs"] {
        let world = World::grown(fs_type).await;
        world.stage(mount_as(fs_type)).await.unwrap();
        world.publish("target", mount_as(fs_type), false).await.unwrap();
        let grown = bytes(&world.path("target"));
        assert!(grown > 500 << 20, "{fs_type} has {grown} bytes");
        assert_eq!(fs::read(world.path("target/file")).unwrap(), written(), "{fs_type}");
        for path in ["target", "staging"] {
            assert_eq!(world.expand(&world.path(path), GROWN).await.unwrap(), GROWN);
        }
        world.unpublish("target").await.unwrap();
        world.unstage().await.unwrap();
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_growth_that_was_cut_off_after_the_mount_is_done_by_the_next_stage() {
    let world = World::grown("xfs").await;
    world.mount_as_it_is("xfs");
    assert!(bytes(&world.path("staging")) < 400 << 20);
    world.stage(mount_as("xfs")).await.unwrap();
    assert!(bytes(&world.path("staging")) > 500 << 20);
    world.unstage().await.unwrap();
    world.end().await;
}

/// The kernel may refuse to grow a mounted ext4; it is never said to be what it is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_filesystem_that_is_smaller_is_grown_or_the_reason_is_told() {
    for fs_type in ["ext4", "xfs"] {
        let world = World::grown(fs_type).await;
        world.mount_as_it_is(fs_type);
        let answer = world.expand(&world.path("staging"), GROWN).await;
        let is_grown = bytes(&world.path("staging")) > 500 << 20;
        match answer {
            Ok(size) => assert!(is_grown && size == GROWN, "{fs_type} counts as grown and is not"),
            Err(refused) => {
                assert!(fs_type == "ext4" && !is_grown);
                let (kind, text) = error(Err::<(), _>(refused));
                assert!(kind == ErrorKind::NotReady && text.contains("before it is mounted the next time"), "{text}");
            }
        }
        world.unstage().await.unwrap();
        world.stage(mount_as(fs_type)).await.unwrap();
        assert_eq!(world.expand(&world.path("staging"), GROWN).await.unwrap(), GROWN);
        assert_eq!(fs::read(world.path("staging/file")).unwrap(), written(), "{fs_type}");
        world.unstage().await.unwrap();
        world.end().await;
    }
}

/// By the kernel where it may; where it refuses, or was said to be able and is not, before it is mounted.
#[tokio::test(flavor = "multi_thread")]
async fn an_ext4_that_the_kernel_does_not_grow_is_grown_before_it_is_mounted() {
    let world = World::grown("ext4").await;
    let (device, staging) = (world.device(), world.path("staging"));
    mounts::mount_grown(&device, &staging, "ext4", &["noatime".into()], true).await.unwrap();
    assert!(bytes(&staging) > 500 << 20, "{} bytes", bytes(&staging));
    assert_eq!(fs::read(staging.join("file")).unwrap(), written());
    let mounted = dataplane::mount::list().unwrap().into_iter().filter(|m| m.target == staging).count();
    assert_eq!(mounted, 1);
    world.unstage().await.unwrap();
    assert!(Command::new("e2fsck").args(["-f", "-n"]).arg(&device).output().unwrap().status.success());
    world.end().await;
}

/// `resize2fs` refuses this feature, and the kernel grows it only where it lets this process.
#[tokio::test(flavor = "multi_thread")]
async fn a_filesystem_that_cannot_grow_is_used_with_the_size_that_it_has() {
    let mut world = World::new(|file| mkfs(file, "mkfs.ext4", &["-q", "-Obigalloc"], "320M")).await;
    world.stage(mount()).await.unwrap();
    fs::write(world.path("staging/file"), written()).unwrap();
    world.unstage().await.unwrap();
    world.reattach(GROWN).await;
    let (device, staging) = (world.device(), world.path("staging"));
    for by_kernel in [false, true] {
        mounts::mount_grown(&device, &staging, "ext4", &[], by_kernel).await.unwrap();
        assert_eq!(fs::read(staging.join("file")).unwrap(), written());
        world.unstage().await.unwrap();
    }
    world.stage(mount()).await.unwrap();
    world.stage(mount()).await.unwrap();
    assert_eq!(fs::read(staging.join("file")).unwrap(), written());
    if bytes(&staging) < 400 << 20 {
        let (kind, text) = error(world.expand(&staging, GROWN).await);
        assert!(kind == ErrorKind::NotReady && text.contains("resize2fs") && text.contains("at each mount"), "{text}");
        let request = csi::NodeGetVolumeHealthRequest { volume_id: "v".into(), ..Default::default() };
        let health = stats::get_health(&world.context, request, &never()).await.unwrap().volume_health.unwrap();
        assert_eq!(health.health_statuses[0].reason, "FilesystemNotGrown");
    }
    world.unstage().await.unwrap();
    world.end().await;
}

/// The kernel may refuse to grow a mounted ext4: it is used as it is until it is mounted the next time.
#[tokio::test(flavor = "multi_thread")]
async fn a_growth_that_the_kernel_refuses_keeps_nobody_from_the_volume() {
    let world = World::grown("ext4").await;
    world.mount_as_it_is("ext4");
    world.stage(mount()).await.unwrap();
    let there = mounts::at(&world.path("staging")).await.unwrap().unwrap();
    // As a kernel that refuses what this process has the right to: there is no such device.
    mounts::finish_growth(&world.path("nothing"), &there).await;
    assert_eq!(fs::read(world.path("staging/file")).unwrap(), written());
    world.unstage().await.unwrap();
    world.stage(mount()).await.unwrap();
    assert!(bytes(&world.path("staging")) > 500 << 20);
    world.unstage().await.unwrap();
    world.end().await;
}

/// Begun by a process that has ended since: the device is its alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_growth_that_goes_on_is_waited_for() {
    let world = World::grown("ext4").await;
    let alone = std::os::unix::fs::OpenOptionsExt::custom_flags(
        fs::File::options().read(true),
        rustix::fs::OFlags::EXCL.bits() as i32,
    )
    .open(world.device())
    .unwrap();
    let (kind, text) = error(world.stage(mount()).await);
    assert!(kind == ErrorKind::Pending && text.contains("goes on"), "{text}");
    assert!(mounts::at(&world.path("staging")).await.unwrap().is_none());
    drop(alone);
    world.stage(mount()).await.unwrap();
    assert!(bytes(&world.path("staging")) > 500 << 20);
    world.unstage().await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_mounted_read_only_is_not_grown() {
    for fs_type in ["ext4", "xfs"] {
        let world = World::grown(fs_type).await;
        let (flags, fs_type) = (vec!["noatime,ro".to_owned()], fs_type.to_owned());
        let wish = MountVolume { fs_type, mount_flags: flags, ..Default::default() };
        world.stage(capability(AccessType::Mount(wish), Mode::SingleNodeWriter)).await.unwrap();
        assert!(bytes(&world.path("staging")) < 400 << 20);
        let (kind, text) = error(world.expand(&world.path("staging"), GROWN).await);
        assert!(kind == ErrorKind::NotReady && text.contains("mounted read-only"), "{text}");
        assert_eq!(fs::read(world.path("staging/file")).unwrap(), written());
        world.unstage().await.unwrap();
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_filesystem_is_neither_grown_nor_mounted_and_says_so() {
    let world = World::grown("ext4").await;
    let device = fs::File::options().read(true).write(true).open(world.device()).unwrap();
    // The group descriptors: `e2fsck -p` takes another set of them, finds that much differs, and leaves that to a person.
    let found = Command::new("dumpe2fs").arg(world.device()).output().unwrap();
    let text = String::from_utf8(found.stdout).unwrap();
    let table = text.lines().find_map(|line| line.trim().strip_prefix("Inode table at ")).unwrap();
    let block: u64 = table.split(['-', ' ']).next().unwrap().parse().unwrap();
    device.write_all_at(&[0x77; 4096], block * 4096).unwrap();
    device.sync_all().unwrap();
    let mut before = [0; 1024];
    device.read_exact_at(&mut before, 1024).unwrap();
    let (kind, text) = error(world.stage(mount_as("ext4")).await);
    assert_eq!(kind, ErrorKind::NotReady, "{text}");
    assert!(text.contains("is damaged, so it is neither grown nor mounted") && text.contains("e2fsck"), "{text}");
    assert!(dataplane::mount::find(&world.path("staging")).unwrap().is_none());
    let mut after = [0; 1024];
    device.read_exact_at(&mut after, 1024).unwrap();
    assert_eq!(before[4..8], after[4..8], "the number of its blocks");
    drop(device);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_volume_answers_what_its_device_has() {
    let world = World::new(|_| ()).await;
    world.stage(block()).await.unwrap();
    world.publish("device", block(), false).await.unwrap();
    assert_eq!(world.expand(&world.path("device"), 320 << 20).await.unwrap(), 320 << 20);
    // Still attached from before it was expanded.
    let (kind, text) = error(world.expand(&world.path("device"), GROWN).await);
    assert!(kind == ErrorKind::NotReady && text.contains("has 335544320 bytes on node `node-1`"), "{text}");
    world.unpublish("device").await.unwrap();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_expanded_must_be_named_and_be_there() {
    let world = World::new(|_| ()).await;
    let ask = async |volume_id: &str, volume_path: String| {
        let volume_id = volume_id.to_owned();
        let request = csi::NodeExpandVolumeRequest { volume_id, volume_path, ..Default::default() };
        error(expand::expand(&world.context, request, &never()).await).0
    };
    assert_eq!(ask("", world.text("staging")).await, ErrorKind::Invalid);
    assert_eq!(ask("v", String::new()).await, ErrorKind::Invalid);
    assert_eq!(ask("w", world.text("staging")).await, ErrorKind::NotFound);
    assert_eq!(ask("v", world.text("nowhere")).await, ErrorKind::NotFound);
    // There, and nothing of the volume.
    assert_eq!(ask("v", world.text("")).await, ErrorKind::NotFound);
    world.end().await;
}
