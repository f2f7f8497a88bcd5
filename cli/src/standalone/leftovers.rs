//! What is left of an instance on this machine: processes, mounts and loop devices below its data directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use runtime::process::ProcessIdentity;

/// How long a process may take to end when it is asked.
const GRACE: Duration = Duration::from_secs(5);

/// Everything that is left, one sentence each.
pub fn list(data: &Path) -> Vec<String> {
    let processes = processes(data).into_iter().map(|(pid, command)| format!("process {pid}: {command}"));
    let mounts = mounts(data).into_iter().map(|place| format!("mount at {}", place.display()));
    let loops = loop_devices(data).into_iter().map(|device| format!("loop device {device}"));
    processes.chain(mounts).chain(loops).collect()
}

/// Ends processes of ours that nobody knows any more, e.g. because they were started right before a crash.
pub async fn end_processes(data: &Path) {
    for (pid, command) in processes(data) {
        if let Ok(process) = ProcessIdentity::of(pid) {
            tracing::warn!(pid, command, "ending a process that nobody knows");
            let _ = process.terminate(GRACE).await;
        }
    }
}

/// Processes of ours (and QEMU's) that have the directory in their command line, this one and its callers excepted.
fn processes(data: &Path) -> Vec<(u32, String)> {
    let mut found = vec![];
    let own = std::process::id();
    let inside = format!("{}/", data.display());
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        if pid == own {
            continue;
        }
        let raw = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<String> = raw.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        if is_ours(&program) && words.iter().skip(1).any(|w| w.contains(&inside)) {
            found.push((pid, words.join(" ").trim_end().to_owned()));
        }
    }
    found
}

fn is_ours(program: &Path) -> bool {
    let name = program.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let name = name.trim_end_matches(" (deleted)");
    let own = std::env::current_exe().ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    name == "qemu-storage-daemon"
        || name == "backing-image-csi"
        || own.is_some_and(|own| own.trim_end_matches(" (deleted)") == name)
}

fn mounts(data: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|p| PathBuf::from(crate::orchestrator::unescape(p)));
    places.filter(|place| place.starts_with(data) && place != data).collect()
}

fn loop_devices(data: &Path) -> Vec<String> {
    let mut found = vec![];
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(file.trim_end().trim_end_matches(" (deleted)")).starts_with(data) {
            found.push(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    found
}
