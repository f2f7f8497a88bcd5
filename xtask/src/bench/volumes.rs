//! The block device of a volume against a `qemu-storage-daemon` alone; what a request costs; memory and idle CPU.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::alone::StorageDaemon;
use super::fio::{Job, Target};
use super::table::Table;
use super::volume::Volume;
use super::world::{World, memory_mib};
use super::{images, kills, server};

/// Each volume; its first half is worked on and was written before anything is measured.
const VOLUME_MIB: u64 = 2048;
const WORKING_SET_MIB: u64 = VOLUME_MIB / 2;
/// The three are measured in turn this often, so that a change of the machine's speed meets all of them.
const ROUNDS: u32 = 4;
/// How long an idle instance is watched.
const IDLE: Duration = Duration::from_secs(10);
/// Ticks of `/proc/PID/stat` per second (`USER_HZ` on every architecture that we build for).
const TICKS: f64 = 100.0;

const FILL: Job = Job { mode: "write", block: "1M", depth: 4, size_mib: WORKING_SET_MIB, seconds: None };

/// A workload and its rows: 1 replica / alone, its limit, 3 replicas / 1 replica, its limit.
struct Comparison {
    mode: &'static str,
    block: &'static str,
    depth: u32,
    one: (&'static str, &'static str),
    three: (&'static str, &'static str),
}

const COMPARISONS: [Comparison; 4] = [
    Comparison {
        mode: "write",
        block: "1M",
        depth: 4,
        one: ("1 replica / qemu-storage-daemon alone: 1 MiB sequential write, depth 4", "≥ 0.85"),
        three: ("3 replicas / 1 replica: 1 MiB sequential write, depth 4", ""),
    },
    Comparison {
        mode: "read",
        block: "1M",
        depth: 4,
        one: ("1 replica / qemu-storage-daemon alone: 1 MiB sequential read, depth 4", "≥ 0.85"),
        three: ("3 replicas / 1 replica: 1 MiB sequential read, depth 4", ""),
    },
    Comparison {
        mode: "randwrite",
        block: "4k",
        depth: 16,
        one: ("1 replica / qemu-storage-daemon alone: 4k random write, depth 16", "≥ 0.5"),
        three: ("3 replicas / 1 replica: 4k random write, depth 16", "≥ 0.6"),
    },
    Comparison {
        mode: "randread",
        block: "4k",
        depth: 16,
        one: ("1 replica / qemu-storage-daemon alone: 4k random read, depth 16", "≥ 0.6"),
        three: ("3 replicas / 1 replica: 4k random read, depth 16", ""),
    },
];

/// Measures one run.
pub fn measure(binary: &Path, seconds: u32, table: &mut Table) -> anyhow::Result<()> {
    let world = World::start(binary, 3)?;
    let image = world.scratch("image.raw");
    images::half_random(&image, 16)?;
    let url = server::serve(&image)?;
    world.cli(&["image", "create", "base", "--url", &url, "--min-copies", "1", "--wait"])?;

    let daemon = StorageDaemon::start(&world, &image, VOLUME_MIB)?;
    let one = Volume::attach(&world, "one", 1, VOLUME_MIB)?;
    let three = Volume::attach(&world, "three", 3, VOLUME_MIB)?;
    let targets = [daemon.target(), one.target(), three.target()];
    for target in &targets {
        FILL.run(target)?;
    }
    let mut rates = vec![];
    for comparison in &COMPARISONS {
        rates.push(in_turn(comparison, &targets, seconds)?);
    }
    for (comparison, [alone, one, _]) in COMPARISONS.iter().zip(&rates) {
        table.add(comparison.one.0, comparison.one.1, "", one / alone);
    }
    for (comparison, [_, one, three]) in COMPARISONS.iter().zip(&rates) {
        table.add(comparison.three.0, comparison.three.1, "", three / one);
    }
    cost_of_a_write(&three, seconds, table)?;
    let processes = [three.engine_processes(), three.replica_processes()].concat();
    let memory = processes.iter().map(|pid| memory_mib(*pid, "VmRSS")).sum();
    table.add("RSS of the processes of one attached volume with 3 replicas", "≤ 80 MiB", " MiB", memory);
    one.remove()?;
    three.remove()?;
    drop(daemon);
    kills::measure(&world, table)
}

/// Mean rates of one workload on each target.
fn in_turn(comparison: &Comparison, targets: &[Target; 3], seconds: u32) -> anyhow::Result<[f64; 3]> {
    let Comparison { mode, block, depth, .. } = *comparison;
    let seconds = Some(seconds.div_ceil(ROUNDS));
    let job = Job { mode, block, depth, size_mib: WORKING_SET_MIB, seconds };
    let mut rates = [0.0; 3];
    for _ in 0..ROUNDS {
        for (rate, target) in rates.iter_mut().zip(targets) {
            *rate += job.run(target)?.bytes_per_second / f64::from(ROUNDS);
        }
    }
    Ok(rates)
}

/// Where the time of a small write goes, by process.
fn cost_of_a_write(volume: &Volume<'_>, seconds: u32, table: &mut Table) -> anyhow::Result<()> {
    let (engine, replicas) = (volume.engine_processes(), volume.replica_processes());
    let before = (Spent::by(&engine), Spent::by(&replicas));
    let job =
        Job { mode: "randwrite", block: "4k", depth: 16, size_mib: WORKING_SET_MIB, seconds: Some(seconds.max(1)) };
    let requests = job.run(&volume.target())?.requests;
    let after = (Spent::by(&engine), Spent::by(&replicas));
    let micros = |before: &Spent, after: &Spent| (after.nanos - before.nanos) / 1e3 / requests;
    let switches = |before: &Spent, after: &Spent| (after.switches - before.switches) / requests;
    table.add("CPU of the engine for one 4k write to 3 replicas", "", " µs", micros(&before.0, &after.0));
    table.add("CPU of the 3 replicas for it", "", " µs", micros(&before.1, &after.1));
    table.add("context switches of the engine for it", "", "", switches(&before.0, &after.0));
    table.add("context switches of the 3 replicas for it", "", "", switches(&before.1, &after.1));
    Ok(())
}

/// CPU time and context switches of some processes so far, all threads that live.
struct Spent {
    nanos: f64,
    switches: f64,
}

impl Spent {
    fn by(pids: &[u32]) -> Spent {
        let mut spent = Spent { nanos: 0.0, switches: 0.0 };
        let threads = pids.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok());
        for thread in threads.flatten().flatten() {
            let read = |name: &str| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            let number = |word: Option<&str>| word.and_then(|w| w.parse::<f64>().ok()).unwrap_or(0.0);
            spent.nanos += number(read("schedstat").split_whitespace().next());
            let status = read("status");
            let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
            spent.switches += lines.map(|line| number(line.split_whitespace().last())).sum::<f64>();
        }
        spent
    }
}

/// CPU of all processes of an instance with ten images while nothing happens.
pub fn measure_idle(binary: &Path, table: &mut Table) -> anyhow::Result<()> {
    let world = World::start(binary, 3)?;
    let image = world.scratch("image.raw");
    images::half_random(&image, 1)?;
    let url = server::serve(&image)?;
    for n in 0..10 {
        world.cli(&["image", "create", &format!("idle-{n}"), "--url", &url, "--min-copies", "1", "--wait"])?;
    }
    // What follows the last image (its data source ends) is not idleness.
    thread::sleep(Duration::from_secs(2));
    let before = ticks(&world);
    thread::sleep(IDLE);
    let spent = (ticks(&world) - before) / TICKS / IDLE.as_secs_f64() * 100.0;
    table.add("idle instance of 3 nodes and 10 images: CPU of all processes, % of a core", "≤ 1", " %", spent);
    Ok(())
}

fn ticks(world: &World) -> f64 {
    let of = |pid: u32| -> Option<f64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
    };
    world.processes("").into_iter().filter_map(of).sum()
}
