//! How soon harm to an idle copy is noticed and mended.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};

use super::images::half_random;
use super::server;
use super::table::Table;
use super::world::{World, ready};

const IMAGE_MIB: u64 = 64;
const COPIES: usize = 2;
/// What the design promises for each.
const LIMIT: &str = "≤ 2 s";

/// Measures one run.
pub fn measure(binary: &Path, table: &mut Table) -> anyhow::Result<()> {
    let world = World::start(binary, COPIES as u32)?;
    let image = world.scratch("image.raw");
    half_random(&image, IMAGE_MIB)?;
    let url = server::serve(&image)?;
    let copies = COPIES.to_string();
    world.cli(&["image", "create", "idle", "--url", &url, "--min-copies", &copies, "--wait"])?;
    world.wait_for_copies("idle", COPIES)?;
    let copy = copy_of(&world)?;
    let remove = || Ok(fs::remove_file(&copy)?);
    let damage = || Ok(fs::File::options().write(true).open(&copy)?.write_all_at(b"damage", 1 << 20)?);
    let kill = || {
        let pid = *world.processes("backing-image-manager").first().context("there is no agent")?;
        ensure!(Command::new("kill").args(["-9", &pid.to_string()]).status()?.success(), "cannot kill {pid}");
        Ok(())
    };
    let (noticed, mended) = harmed(&world, remove)?;
    table.add("file of an idle copy of 64 MiB removed: its repair begins after", LIMIT, " s", noticed);
    table.add("it is ready again after", "", " s", mended);
    let (noticed, mended) = harmed(&world, damage)?;
    table.add("bytes of an idle copy of 64 MiB overwritten: its repair begins after", LIMIT, " s", noticed);
    table.add("it is repaired after", "", " s", mended);
    let (_, mended) = harmed(&world, kill)?;
    table.add("agent killed with -9: its copies are ready again after", LIMIT, " s", mended);
    Ok(())
}

/// Seconds until a copy is said not to be ready any more, and until all are again.
fn harmed(world: &World, harm: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<(f64, f64)> {
    let mut copies = world.follow("idle")?;
    copies.until(|files| ready(files) == COPIES)?;
    let began = Instant::now();
    harm()?;
    let noticed = copies.until(|files| ready(files) < COPIES)?;
    let mended = copies.until(|files| ready(files) == COPIES)?;
    Ok(((noticed - began).as_secs_f64(), (mended - began).as_secs_f64()))
}

/// The file of one copy.
fn copy_of(world: &World) -> anyhow::Result<PathBuf> {
    let images = world.data().join("nodes/node-1/disk-1/backing-images");
    let found = fs::read_dir(&images)?.next().with_context(|| format!("nothing is in {}", images.display()))?;
    Ok(found?.path().join("backing"))
}
