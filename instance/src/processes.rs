//! Detached processes of one node, found again after a restart of the role.
//!
//! Each has a directory with its configuration, its log and a record. The record is written after the start; a crash in
//! between is healed at the next start of the role, because every process carries its directory in its environment.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use runtime::files;
use runtime::process::{Launch, ProcessIdentity};
use serde::{Deserialize, Serialize};

use crate::limits::LOG_TAIL_BYTES;

/// Environment variable that carries the directory of a process.
const MARKER: &str = "BACKING_IMAGE_PROCESS";
const RECORD: &str = "process.json";
const LOG: &str = "log";

/// What runs, or ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessRecord {
    pub identity: ProcessIdentity,
    /// TCP port, when it has one.
    #[serde(default)]
    pub port: Option<u16>,
}

/// The directory of processes of one kind on one node.
#[derive(Clone, Debug)]
pub struct Processes {
    root: PathBuf,
}

impl Processes {
    /// Opens `root`, made when absent, and finds again what runs without a record.
    pub fn open(root: PathBuf) -> io::Result<Processes> {
        fs::create_dir_all(&root)?;
        let root = root.canonicalize()?;
        let processes = Processes { root };
        for (directory, identity) in marked(&processes.root)? {
            let Some(name) = directory.file_name().and_then(|n| n.to_str()) else { continue };
            let known = processes.record(name)?.is_some_and(|record| record.identity == identity);
            if !known && directory.is_dir() {
                let port = processes.port(name)?;
                processes.write(name, &ProcessRecord { identity, port })?;
            }
        }
        Ok(processes)
    }

    /// The directory of a process.
    pub fn directory(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Names of all that run or ran and were not forgotten.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = vec![];
        for entry in fs::read_dir(&self.root)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    /// What is recorded of a process.
    pub fn record(&self, name: &str) -> io::Result<Option<ProcessRecord>> {
        match fs::read(self.directory(name).join(RECORD)) {
            // Unknown is not absent: a record that cannot be read may be of a process that runs.
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn write(&self, name: &str, record: &ProcessRecord) -> io::Result<()> {
        let text = serde_json::to_vec(record).map_err(io::Error::other)?;
        files::write_durably(&self.directory(name).join(RECORD), &text)
    }

    /// The port that was given to a process, kept apart from its record, which does not exist before the process does.
    pub fn port(&self, name: &str) -> io::Result<Option<u16>> {
        match fs::read_to_string(self.directory(name).join("port")) {
            Ok(text) => Ok(text.trim().parse().ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Gives a process the lowest free pair of ports of a range; the one that it has, if any.
    pub fn allocate_port(&self, name: &str, first: u16, last: u16) -> io::Result<Option<u16>> {
        if let Some(port) = self.port(name)? {
            return Ok(Some(port));
        }
        let mut taken = vec![];
        for other in self.names()? {
            taken.extend(self.port(&other)?);
        }
        let Some(port) = (first..last).step_by(2).find(|port| !taken.contains(port)) else { return Ok(None) };
        fs::create_dir_all(self.directory(name))?;
        files::write_durably(&self.directory(name).join("port"), port.to_string().as_bytes())?;
        Ok(Some(port))
    }

    /// Starts a process detached; its directory exists already.
    pub fn start(&self, name: &str, mut launch: Launch, port: Option<u16>) -> io::Result<ProcessRecord> {
        let directory = self.directory(name);
        launch.env.insert(MARKER.into(), directory.display().to_string());
        launch.log_file = Some(directory.join(LOG));
        files::remove_if_present(&directory.join(LOG))?;
        let identity = launch.spawn_detached()?;
        let record = ProcessRecord { identity, port };
        self.write(name, &record)?;
        Ok(record)
    }

    /// Forgets a process that has ended, and removes its directory.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.directory(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// The last lines of its log, in one line.
    pub fn last_words(&self, name: &str) -> String {
        tail(&self.directory(name).join(LOG)).unwrap_or_default()
    }
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = vec![];
    file.read_to_end(&mut bytes)?;
    Ok(runtime::words::last(&String::from_utf8_lossy(&bytes)))
}

/// Session leaders whose marker names a directory below `root`.
fn marked(root: &Path) -> io::Result<BTreeMap<PathBuf, ProcessIdentity>> {
    let prefix = format!("{MARKER}={}/", root.display());
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Processes come and go, and some belong to others.
        let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else { continue };
        let mut variables = environment.split(|byte| *byte == 0).filter_map(|v| std::str::from_utf8(v).ok());
        let Some(name) = variables.find_map(|v| v.strip_prefix(&prefix)) else { continue };
        let raw = rustix::process::Pid::from_raw(pid as i32);
        if raw.is_some()
            && rustix::process::getsid(raw).ok() == raw
            && let Ok(identity) = ProcessIdentity::of(pid)
            && identity.is_alive()
        {
            found.insert(root.join(name), identity);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn finds_a_process_whose_record_was_lost() {
        let folder = tempfile::tempdir().unwrap();
        let processes = Processes::open(folder.path().join("replicas")).unwrap();
        let port = processes.allocate_port("r-1", 10_000, 10_010).unwrap();
        // Its child carries the same environment.
        let child = folder.path().join("child");
        let script = format!("sleep 60 & echo $! > {0}.new; mv {0}.new {0}; wait", child.display());
        let launch = Launch::new("/bin/sh").arg("-c").arg(&script);
        let record = processes.start("r-1", launch, port).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !child.exists() {
            assert!(std::time::Instant::now() < deadline, "the process has no child");
            tokio::time::sleep(Duration::from_millis(5)).await; // poll
        }
        fs::remove_file(processes.directory("r-1").join(RECORD)).unwrap();
        let again = Processes::open(folder.path().join("replicas")).unwrap();
        assert_eq!(again.record("r-1").unwrap(), Some(record.clone()));
        // Unknown is not absent: it may be of a process that runs.
        fs::write(processes.directory("r-1").join(RECORD), "{").unwrap();
        assert!(again.record("r-1").is_err());
        let child: i32 = fs::read_to_string(&child).unwrap().trim().parse().unwrap();
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_raw(child).unwrap(),
            rustix::process::Signal::KILL,
        );
        record.identity.terminate(Duration::from_secs(5)).await.unwrap();
        again.forget("r-1").unwrap();
        assert_eq!(again.names().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn gives_each_process_a_pair_of_ports_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let processes = Processes::open(folder.path().to_owned()).unwrap();
        let ports: Vec<_> = ["a", "b", "a", "c", "d"].map(|n| processes.allocate_port(n, 10, 16).unwrap()).into();
        assert_eq!(ports, [Some(10), Some(12), Some(10), Some(14), None]);
    }
}
