//! What is formatted and what is not: blank devices once, cut-off attempts again, whatever holds anything never.

use super::*;

/// Of [`World::half_format`]: everything.
const ALL: usize = 9;

impl World {
    /// Writes what a cut may leave of a new filesystem: any part of what was not flushed. Another one with each seed.
    async fn half_format(&self, fs_type: &str, seed: usize) {
        let whole = self.path("whole");
        fs::File::create(&whole).unwrap().set_len(320 << 20).unwrap();
        let uuid = self.volume().await.metadata.uid.unwrap();
        let (program, option) =
            if fs_type == "xfs" { ("mkfs.xfs", format!("-muuid={uuid}")) } else { ("mkfs.ext4", format!("-U{uuid}")) };
        assert!(Command::new(program).args(["-q", &option]).arg(&whole).status().unwrap().success());
        let content = fs::read(&whole).unwrap();
        let device = fs::File::options().write(true).open(&self.device.as_ref().unwrap().path).unwrap();
        let blocks = content.chunks(4096).enumerate().filter(|(_, block)| **block != [0; 4096]);
        for (nth, (number, block)) in blocks.enumerate() {
            let kept = match seed {
                0 => nth % 2 == 0,
                1 => nth % 2 == 1,
                // The superblock only, and everything but the superblock.
                2 => nth == 0,
                3 => nth != 0,
                ALL => true,
                // The first part.
                _ => number < content.len() / 4096 / 3,
            };
            if kept {
                std::os::unix::fs::FileExt::write_all_at(&device, block, number as u64 * 4096).unwrap();
            }
        }
        device.sync_all().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_blank_is_never_formatted() {
    let world = World::new(|file| fs::write(file, vec![7u8; 8 << 20]).unwrap()).await;
    let (kind, text) = error(world.stage(mount()).await);
    assert!(kind == ErrorKind::NotReady && text.contains("volumeMode: Block"), "{text}");
    assert!(fs::read(world.volume_file()).unwrap().iter().all(|b| *b == 7));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_formatting_that_was_cut_off_is_done_again() {
    for (fs_type, seed) in ["ext4", "xfs"].into_iter().flat_map(|fs_type| (0..5).map(move |seed| (fs_type, seed))) {
        let world = World::new(|_| ()).await;
        world.half_format(fs_type, seed).await;
        world.note(fs_type).await;
        // The wish has changed meanwhile; what was begun is made.
        world.stage(mount()).await.unwrap_or_else(|e| panic!("{fs_type} {seed}: {e}"));
        assert_eq!(world.noted().await, "", "{fs_type} {seed}: it is mounted, and still counts as unfinished");
        let mounted = dataplane::mount::find(&world.path("staging")).unwrap().unwrap();
        assert_eq!(mounted.fs_type, fs_type, "{seed}");
        fs::write(world.path("staging/file"), vec![seed as u8; 1 << 20]).unwrap();
        world.unstage().await.unwrap();
        world.stage(mount()).await.unwrap();
        assert_eq!(fs::read(world.path("staging/file")).unwrap(), vec![seed as u8; 1 << 20]);
        world.unstage().await.unwrap();
        world.end().await;
    }
}

/// Nobody knows whose it is.
#[tokio::test(flavor = "multi_thread")]
async fn what_looks_like_half_a_filesystem_is_left_as_it_is_without_a_note() {
    for (fs_type, seed) in [("ext4", 1), ("ext4", 3), ("xfs", 1), ("xfs", 3)] {
        let world = World::new(|_| ()).await;
        world.half_format(fs_type, seed).await;
        let (kind, text) = error(world.stage(mount_as(fs_type)).await);
        assert!(kind == ErrorKind::NotReady && text.contains("left as it is"), "{fs_type} {seed}: {text}");
        world.end().await;
    }
}

/// A note that should be gone formats nothing that anybody used.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_note_never_formats_what_was_used_since() {
    for fs_type in ["ext4", "xfs"] {
        let world = World::new(|_| ()).await;
        world.stage(mount_as(fs_type)).await.unwrap();
        fs::write(world.path("staging/file"), "precious").unwrap();
        world.unstage().await.unwrap();
        world.note(fs_type).await;
        world.stage(mount_as(fs_type)).await.unwrap();
        assert_eq!(
            (fs::read(world.path("staging/file")).unwrap(), world.noted().await),
            (b"precious".to_vec(), String::new())
        );
        world.unstage().await.unwrap();
        world.end().await;
    }
    // Formatted, but the note stayed; then mounted by hand, and power went while it was in use.
    for (fs_type, damaged_at) in [("ext4", 4096), ("xfs", 8192)] {
        let world = World::new(|_| ()).await;
        world.half_format(fs_type, ALL).await;
        let device = world.device.as_ref().unwrap().path.clone();
        fs::create_dir(world.path("by-hand")).unwrap();
        dataplane::mount::mount(&device, &world.path("by-hand"), fs_type, &[]).unwrap();
        fs::write(world.path("by-hand/file"), "precious").unwrap();
        assert!(Command::new("sync").arg("-f").arg(world.path("by-hand")).status().unwrap().success());
        let content = fs::read(world.volume_file()).unwrap();
        world.unpublish("by-hand").await.unwrap();
        let file = fs::File::options().write(true).open(&device).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 512], damaged_at).unwrap();
        file.sync_all().unwrap();
        drop(file);
        world.note(fs_type).await;
        let _ = world.stage(mount_as(fs_type)).await;
        let found = Command::new("grep").args(["-q", "precious"]).arg(world.volume_file()).status().unwrap();
        assert!(found.success(), "{fs_type}: it was formatted");
        world.unstage().await.unwrap();
        world.end().await;
    }
    // As a block device it holds whatever its user wrote: both calls take the note away before he gets it.
    let world = World::new(|_| ()).await;
    world.note("ext4").await;
    world.stage(block()).await.unwrap();
    assert_eq!(world.noted().await, "");
    world.note("ext4").await;
    world.publish("target", block(), false).await.unwrap();
    assert_eq!(world.noted().await, "");
    fs::write(world.path("target"), vec![7; 1 << 20]).unwrap();
    world.unpublish("target").await.unwrap();
    let (kind, text) = error(world.stage(mount()).await);
    assert!(kind == ErrorKind::NotReady && text.contains("left as it is"), "{text}");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_formatting_is_noted_before_it_begins_and_only_for_a_volume_of_this_node() {
    let world = World::new(|_| ()).await;
    // `mkfs` refuses this, so that the attempt ends in its middle.
    let parameters = [("mkfsParams".to_owned(), "-Onosuchfeature".to_owned())].into();
    let request = csi::NodeStageVolumeRequest {
        volume_id: "v".into(),
        staging_target_path: world.text("staging"),
        volume_capability: Some(mount()),
        volume_context: parameters,
        ..Default::default()
    };
    error(stage::stage(&world.context, request, &never()).await);
    assert_eq!(world.noted().await, "ext4");
    world.context.store.modify::<Volume>("v", |v| v.spec.node_id = "node-2".into()).await.unwrap();
    let clear = |v: &mut Volume| v.status.get_or_insert_default().unfinished_filesystem.clear();
    world.context.store.modify_status("v", clear).await.unwrap();
    let (kind, text) = error(world.stage(mount()).await);
    assert!(kind == ErrorKind::NotReady && text.contains("told to leave"), "{text}");
    assert_eq!(world.noted().await, "");
    assert!(fs::read(world.volume_file()).unwrap().iter().all(|b| *b == 0), "it was formatted");
    world.end().await;
}
