//! The block device of a volume against a `qemu-storage-daemon` alone; memory and idle CPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::table::Table;
use super::world::{World, memory_mib, timed, wait};
use super::{images, server};

const SIZE_MIB: u64 = 1024;
/// How long an idle instance is watched.
const IDLE: Duration = Duration::from_secs(10);
/// Ticks of `/proc/PID/stat` per second (`USER_HZ` on every architecture that we build for).
const TICKS: f64 = 100.0;

/// One fio workload: name, mode, block size, depth.
const JOBS: [(&str, &str, &str, u32); 4] = [
    ("write 1M", "write", "1M", 4),
    ("read 1M", "read", "1M", 4),
    ("randwrite 4k", "randwrite", "4k", 16),
    ("randread 4k", "randread", "4k", 16),
];
const ONE: [(&str, &str); 4] = [
    ("1 replica / qemu-storage-daemon alone: 1 MiB sequential write, depth 4", "≥ 0.85"),
    ("1 replica / qemu-storage-daemon alone: 1 MiB sequential read, depth 4", "≥ 0.85"),
    ("1 replica / qemu-storage-daemon alone: 4k random write, depth 16", "≥ 0.5"),
    ("1 replica / qemu-storage-daemon alone: 4k random read, depth 16", "≥ 0.6"),
];
const THREE: [(&str, &str); 4] = [
    ("3 replicas / 1 replica: 1 MiB sequential write, depth 4", ""),
    ("3 replicas / 1 replica: 1 MiB sequential read, depth 4", ""),
    ("3 replicas / 1 replica: 4k random write, depth 16", "≥ 0.6"),
    ("3 replicas / 1 replica: 4k random read, depth 16", ""),
];

/// Measures one run.
pub fn measure(binary: &Path, seconds: u32, table: &mut Table) -> anyhow::Result<()> {
    let world = World::start(binary, 3)?;
    let image = world.scratch("image.raw");
    images::half_random(&image, 16)?;
    let url = server::serve(&image)?;
    world.cli(&["image", "create", "base", "--url", &url, "--min-copies", "1", "--wait"])?;

    let mut alone = vec![];
    let daemon = StorageDaemon::start(&world, &image)?;
    for (name, mode, block, depth) in JOBS {
        alone.push(fio(name, mode, block, depth, seconds, &["--ioengine=nbd", &format!("--uri={}", daemon.uri())])?);
    }
    drop(daemon);
    let one = with_volume(&world, 1, |device| jobs(device, seconds))?;
    let mut memory = 0.0;
    let three = with_volume(&world, 3, |device| {
        let rates = jobs(device, seconds)?;
        memory = ["replica", "engine", "qemu-storage-daemon"]
            .iter()
            .flat_map(|word| world.processes(word))
            .collect::<std::collections::BTreeSet<u32>>()
            .iter()
            .filter(|pid| {
                !fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().windows(10).any(|w| w == b"standalone")
            })
            .map(|pid| memory_mib(*pid, "VmRSS"))
            .sum();
        Ok(rates)
    })?;
    for n in 0..JOBS.len() {
        table.add(ONE[n].0, ONE[n].1, "", one[n] / alone[n]);
    }
    for n in 0..JOBS.len() {
        table.add(THREE[n].0, THREE[n].1, "", three[n] / one[n]);
    }
    table.add("RSS of the processes of one attached volume with 3 replicas", "≤ 80 MiB", " MiB", memory);
    Ok(())
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

fn jobs(device: &str, seconds: u32) -> anyhow::Result<Vec<f64>> {
    let target = ["--ioengine=libaio", "--direct=1", &format!("--filename={device}")];
    JOBS.iter().map(|(name, mode, block, depth)| fio(name, mode, block, *depth, seconds, &target)).collect()
}

/// Bytes per second of one job. Reads read what the job before has written.
fn fio(name: &str, mode: &str, block: &str, depth: u32, seconds: u32, target: &[&str]) -> anyhow::Result<f64> {
    let output = Command::new("fio")
        .args([
            &format!("--name={name}"),
            &format!("--rw={mode}"),
            &format!("--bs={block}"),
            &format!("--iodepth={depth}"),
        ])
        .args([
            &format!("--runtime={seconds}"),
            "--time_based",
            &format!("--size={}M", SIZE_MIB / 2),
            "--output-format=json",
            "--randseed=1",
        ])
        .args(target)
        .output()
        .context("cannot start fio: is it installed?")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // fio prints notes before its JSON.
    let report: Value = serde_json::from_str(&text[text.find('{').context("fio printed no report")?..])?;
    let job = &report["jobs"][0];
    if !output.status.success() || job["error"] != json!(0) {
        bail!("fio {name}: {} {}", String::from_utf8_lossy(&output.stderr), job["error"]);
    }
    let side = if mode.ends_with("write") { "write" } else { "read" };
    job[side]["bw_bytes"].as_f64().context("fio reported no bandwidth")
}

/// Attaches a new volume on node-1, works on its device, removes it.
fn with_volume<T>(world: &World, replicas: u32, work: impl FnOnce(&str) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let name = format!("bench-{replicas}");
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}, "provisioner": "driver.longhorn.io",
        "parameters": {"numberOfReplicas": replicas.to_string(), "backingImage": "base"},
    });
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": "default"},
        "spec": {"accessModes": ["ReadWriteOnce"], "volumeMode": "Block", "storageClassName": name, "resources": {"requests": {"storage": format!("{SIZE_MIB}Mi")}}},
    });
    world.apply(&format!("{}---\n{}", serde_yaml_ng::to_string(&class)?, serde_yaml_ng::to_string(&claim)?))?;
    let device = world.cli(&["volume", "attach", &name, "--node", "node-1"])?;
    let result = work(device.trim());
    world.cli(&["volume", "detach", &name])?;
    world.cli(&["delete", "pvc", &name])?;
    result
}

/// A `qemu-storage-daemon` with one head like that of a replica, and nothing else.
struct StorageDaemon {
    process: Child,
    socket: PathBuf,
}

impl StorageDaemon {
    fn start(world: &World, base: &Path) -> anyhow::Result<StorageDaemon> {
        let (head, socket) = (world.scratch("alone.qcow2"), world.scratch("alone.sock"));
        let head_text = head.to_string_lossy().into_owned();
        timed(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "extended_l2=on,cluster_size=128k",
                &head_text,
                &format!("{SIZE_MIB}M"),
            ],
        )?;
        let file = |name: &str, path: &Path| {
            json!({"driver": "file", "node-name": name, "filename": path, "cache": {"direct": true}, "aio": "native", "discard": "unmap"}).to_string()
        };
        let base_node =
            json!({"driver": "raw", "node-name": "base", "file": "base-file", "read-only": true}).to_string();
        let head_node =
            json!({"driver": "qcow2", "node-name": "head", "file": "head-file", "backing": "base", "discard": "unmap"})
                .to_string();
        let process = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file("base-file", base), "--blockdev", &base_node])
            .args(["--blockdev", &file("head-file", &head), "--blockdev", &head_node])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", "type=nbd,id=e,node-name=head,name=head,writable=on"])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start qemu-storage-daemon")?;
        let mut daemon = StorageDaemon { process, socket };
        wait(|| {
            if let Some(status) = daemon.process.try_wait()? {
                bail!("qemu-storage-daemon ended with {status}");
            }
            Ok(daemon.socket.exists().then_some(()))
        })?;
        Ok(daemon)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///head?socket={}", self.socket.display())
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
