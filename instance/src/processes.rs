//! Detached processes of one node, found again after a restart of the role.
//!
//! Each has a directory with its configuration, its log and a record. The record is written after the start; a crash in
//! between is healed at the next start of the role, because every process writes itself down before it runs its program.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use runtime::files;
use runtime::process::{Launch, ProcessIdentity, started};
use serde::{Deserialize, Serialize};

use crate::limits::LOG_TAIL_BYTES;

const RECORD: &str = "process.json";
const LOG: &str = "log";
/// Into which a process writes itself.
const STARTED: &str = "started";

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
        for name in processes.names()? {
            let Some(identity) = started(&processes.directory(&name).join(STARTED))? else { continue };
            if processes.record(&name)?.is_none_or(|record| record.identity != identity) {
                let port = processes.port(&name)?;
                processes.write(&name, &ProcessRecord { identity, port })?;
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
            let entry = entry?;
            // Somebody else's file is no process.
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string());
            }
        }
        Ok(names)
    }

    /// Whether anything of a process is left to forget; also where that cannot be said.
    pub fn is_known(&self, name: &str) -> bool {
        fs::exists(self.directory(name)).unwrap_or(true)
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
        launch.log_file = Some(directory.join(LOG));
        launch.started_file = Some(directory.join(STARTED));
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn finds_a_process_whose_record_was_lost() {
        let folder = tempfile::tempdir().unwrap();
        let processes = Processes::open(folder.path().join("replicas")).unwrap();
        let port = processes.allocate_port("r-1", 10_000, 10_010).unwrap();
        let launch = Launch::new("/bin/sleep").arg("60");
        let record = processes.start("r-1", launch, port).unwrap();
        fs::remove_file(processes.directory("r-1").join(RECORD)).unwrap();
        let again = Processes::open(folder.path().join("replicas")).unwrap();
        assert_eq!(again.record("r-1").unwrap(), Some(record.clone()));
        // Unknown is not absent: it may be of a process that runs.
        fs::write(processes.directory("r-1").join(RECORD), "{").unwrap();
        assert!(again.record("r-1").is_err());
        record.identity.terminate(Duration::from_secs(5)).await.unwrap();
        again.forget("r-1").unwrap();
        assert_eq!(again.names().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_file_among_the_processes_is_none() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("notes"), "").unwrap();
        let processes = Processes::open(folder.path().to_owned()).unwrap();
        assert_eq!(processes.names().unwrap(), Vec::<String>::new());
        assert_eq!(processes.allocate_port("a", 10, 12).unwrap(), Some(10));
    }

    #[test]
    fn gives_each_process_a_pair_of_ports_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let processes = Processes::open(folder.path().to_owned()).unwrap();
        let ports: Vec<_> = ["a", "b", "a", "c", "d"].map(|n| processes.allocate_port(n, 10, 16).unwrap()).into();
        assert_eq!(ports, [Some(10), Some(12), Some(10), Some(14), None]);
    }
}
