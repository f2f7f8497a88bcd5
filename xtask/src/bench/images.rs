//! Import and sync of images against `curl`, `openssl` and `cp`.

use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::server;
use super::table::Table;
use super::world::{World, context_switches, cpu_seconds, memory_mib, timed, wait};

/// Measures one run.
pub fn measure(binary: &Path, size_mib: u64, table: &mut Table) -> anyhow::Result<()> {
    // One node more than copies on the way: the first copy stays, three are made at once.
    let world = World::start(binary, 4)?;
    let (large, small) = (world.scratch("large.raw"), world.scratch("small.raw"));
    half_random(&large, size_mib)?;
    half_random(&small, 1)?;
    let url = server::serve(&large)?;
    let download = world.scratch("download.raw").to_string_lossy().into_owned();

    let curl = timed("curl", &["-sf", "-o", &download, &url])?;
    let openssl = timed("openssl", &["dgst", "-sha512", &download])?;
    let sha512sum = timed("sha512sum", &[&download])?;
    let began = Instant::now();
    world.cli(&["sha512", &download])?;
    let hash = began.elapsed();
    table.add("SHA-512 throughput: the agent's library / openssl dgst -sha512", "≥ 0.95", "", ratio(openssl, hash));

    let (import, peak) = with_peak_memory(&world, || {
        let began = Instant::now();
        world.cli(&["image", "create", "large", "--url", &url, "--min-copies", "1", "--wait"])?;
        Ok(began.elapsed())
    })?;
    table.add(
        "import / max(curl -o, one SHA-512 pass by the agent's library)",
        "≤ 1.15",
        "",
        ratio(import, curl.max(hash)),
    );
    table.add("import / (curl -o && sha512sum)", "≤ 0.8", "", ratio(import, curl + sha512sum));
    table.add("peak RSS of the data source and agents during import", "≤ 64 MiB", " MiB", peak);

    let copy = world.scratch("copy.raw").to_string_lossy().into_owned();
    let cp = timed("cp", &["--sparse=always", &download, &copy])? + timed("sync", &[&copy])?;
    let before = Spent::of_agents(&world);
    let (to_one, peak) = with_peak_memory(&world, || copies(&world, "large", 2))?;
    let spent = Spent::of_agents(&world);
    let data_mib = size_mib as f64 / 2.0;
    table.add("CPU of all agents during that, per GiB of data", "", " s", (spent.cpu - before.cpu) / data_mib * 1024.0);
    table.add(
        "context switches of all agents during that, per MiB of data",
        "",
        "",
        (spent.switches - before.switches) / data_mib,
    );
    table.add("sync to one disk / (cp --sparse=always && sync)", "≤ 1.5", "", ratio(to_one, cp));
    table.add("peak RSS of agents during sync", "≤ 64 MiB", " MiB", peak);

    world.cli(&["image", "create", "fan-out", "--url", &url, "--min-copies", "1", "--wait"])?;
    let to_three = copies(&world, "fan-out", 4)?;
    table.add(
        "sync to three disks at once / three times (cp --sparse=always && sync)",
        "",
        "",
        ratio(to_three, cp * 3),
    );
    table.add("sync to three disks at once / to one disk", "≤ 2", "", ratio(to_three, to_one));

    let url = server::serve(&small)?;
    let began = Instant::now();
    world.cli(&["image", "create", "small", "--url", &url, "--min-copies", "1", "--wait"])?;
    table.add(
        "create to ready of a 1 MiB image, the command line included",
        "≤ 1 s",
        " s",
        began.elapsed().as_secs_f64(),
    );
    Ok(())
}

/// What the managers of all disks have used since they were started.
struct Spent {
    cpu: f64,
    switches: f64,
}

impl Spent {
    fn of_agents(world: &World) -> Spent {
        let pids = world.processes("backing-image-manager");
        let cpu = pids.iter().map(|pid| cpu_seconds(*pid)).sum();
        Spent { cpu, switches: pids.iter().map(|pid| context_switches(*pid)).sum() }
    }
}

/// Wishes more copies and waits for them.
fn copies(world: &World, image: &str, count: usize) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut object = world.get(&["backingimage", image])?;
    object["spec"]["minNumberOfCopies"] = count.into();
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    world.apply(&serde_yaml_ng::to_string(&object)?)?;
    world.wait_for_copies(image, count)?;
    Ok(began.elapsed())
}

/// The highest resident size of any data source or agent while something runs.
fn with_peak_memory<T: Send>(
    world: &World,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<(T, f64)> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peak: f64 = 0.0;
            wait(|| {
                for word in ["data-source", "backing-image-manager"] {
                    for pid in world.processes(word) {
                        peak = peak.max(memory_mib(pid, "VmHWM"));
                    }
                }
                // The high-water mark is kept by the kernel, so a few looks a second suffice.
                thread::sleep(Duration::from_millis(250));
                Ok(over.load(Ordering::Relaxed).then_some(()))
            })
            .map(|()| peak)
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        let peak = watcher.join().expect("the watcher does not panic")?;
        Ok((result?, peak))
    })
}

fn ratio(ours: Duration, theirs: Duration) -> f64 {
    ours.as_secs_f64() / theirs.as_secs_f64()
}

/// A file whose first half is random bytes and whose second half is a hole.
pub fn half_random(path: &Path, size_mib: u64) -> anyhow::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..size_mib * (1 << 20) / 2 / 8 {
        // xorshift64*: incompressible is all that is needed.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        file.write_all(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())?;
    }
    let mut file = file.into_inner()?;
    let half = file.stream_position()?;
    file.set_len(half * 2)?;
    file.sync_all()?;
    Ok(())
}
