//! How long a writer waits when a process of the data path is killed.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Context;

use super::fio::{Job, Report};
use super::table::Table;
use super::volume::Volume;
use super::world::World;

const SIZE_MIB: u64 = 512;
const LOAD: Job = Job { mode: "randwrite", block: "4k", depth: 16, size_mib: SIZE_MIB, seconds: Some(5) };
const FILL: Job = Job { mode: "write", block: "1M", depth: 4, size_mib: SIZE_MIB, seconds: None };
/// From the start of fio to the kill: it is under way then.
const WARM_UP: Duration = Duration::from_secs(2);

/// Measures one run.
pub fn measure(world: &World, table: &mut Table) -> anyhow::Result<()> {
    let volume = Volume::attach(world, "kills", 3, SIZE_MIB)?;
    FILL.run(&volume.target())?;
    let longest = under_load(&volume, || Ok(()))?;
    table.add("3 replicas, 4k random write, depth 16, nothing is killed: longest request", "", " ms", longest);
    let longest = under_load(&volume, || kill(Volume::find(&volume.engine_processes(), "engine")?))?;
    table.add("the same, engine killed with -9: longest request", "≤ 100 ms", " ms", longest);
    let longest = under_load(&volume, || kill(Volume::find(&volume.replica_processes(), "replica")?))?;
    table.add("the same, one replica process killed with -9: longest request", "≤ 50 ms", " ms", longest);
    volume.remove()?;

    let volume = Volume::attach(world, "kills-daemon", 3, SIZE_MIB)?;
    FILL.run(&volume.target())?;
    let longest = under_load(&volume, || kill(Volume::find(&volume.replica_processes(), "qemu-storage-daemon")?))?;
    table.add("the same, one qemu-storage-daemon killed with -9: longest request", "≤ 50 ms", " ms", longest);
    volume.remove()
}

/// The longest request of a load in whose midst something happens. Any error of the load is an error.
fn under_load(volume: &Volume<'_>, event: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let target = volume.target();
    thread::scope(|scope| {
        let load = scope.spawn(|| LOAD.run(&target));
        thread::sleep(WARM_UP);
        let happened = event();
        let Report { longest_ms, .. } = load.join().expect("the load does not panic")?;
        happened.map(|()| longest_ms)
    })
}

fn kill(pid: u32) -> anyhow::Result<()> {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status().context("cannot start kill")?;
    anyhow::ensure!(status.success(), "cannot kill {pid}");
    Ok(())
}
