//! The record of a workload on disk: `<directory>/<name>/workload.json`, beside its log.
//!
//! It is written before the process is started (without process) and again after it. After a crash in between the process is found
//! by the file `started`, into which it wrote itself; its token stands in its environment and in that of what it starts.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use runtime::files;
use runtime::process::ProcessIdentity;
use serde::{Deserialize, Serialize};

use crate::WorkloadSpec;

/// What is known of a workload across restarts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub spec: WorkloadSpec,
    pub ip: Ipv4Addr,
    /// Unique to this start; in the environment of the process and its children.
    pub token: String,
    /// `None`: about to be started.
    #[serde(default)]
    pub process: Option<ProcessIdentity>,
    /// Why it ended, once it has.
    #[serde(default)]
    pub failure: Option<String>,
}

/// The directory of all local workloads.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
    /// Keeps instances apart, also those that see the same path in another file system or container.
    instance: String,
}

impl Records {
    /// Makes the directory if needed.
    pub fn open(directory: &Path) -> io::Result<Records> {
        files::create_dir_durably(directory)?;
        let directory = directory.canonicalize()?;
        let found = fs::metadata(&directory)?;
        let instance = format!("{}:{:x}-{:x}", directory.display(), found.dev(), found.ino());
        Ok(Records { directory, instance })
    }

    fn directory(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory(name).join("workload.json")
    }

    /// The log of a workload.
    pub fn log(&self, name: &str) -> PathBuf {
        self.directory(name).join("log")
    }

    /// Where the process of a workload writes itself down.
    pub fn started(&self, name: &str) -> PathBuf {
        self.directory(name).join("started")
    }

    /// Writes a record durably.
    pub fn save(&self, record: &Record) -> io::Result<()> {
        let name = &record.spec.name;
        files::create_dir_durably(&self.directory(name))?;
        files::write_durably(&self.file(name), &serde_json::to_vec_pretty(record)?)
    }

    /// Forgets a workload. The record goes first, so that a half-done removal is finished by the next start.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let directory = self.directory(name);
        if !directory.exists() {
            return Ok(());
        }
        files::remove_if_present(&self.file(name))?;
        files::sync_parent(&self.file(name))?;
        files::remove_dir_durably(&directory)
    }

    /// Every record; directories without one are remains of a removal or of a start that never came to be, and are removed.
    pub fn load(&self) -> io::Result<Vec<Record>> {
        let mut records = vec![];
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let path = self.file(&name);
            let text = match fs::read(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    self.remove(&name)?;
                    continue;
                }
                other => other?,
            };
            let record: Record = serde_json::from_slice(&text).map_err(|e| {
                let text = format!("{} is not the record of a workload: {e}; move it away", path.display());
                io::Error::new(io::ErrorKind::InvalidData, text)
            })?;
            records.push(record);
        }
        Ok(records)
    }

    /// The environment variable that marks the processes of a start.
    pub fn marker(&self, token: &str) -> (String, String) {
        (MARKER.to_owned(), format!("{}:{token}", self.instance))
    }
}

/// Name of the marking environment variable.
pub const MARKER: &str = "BACKING_IMAGE_WORKLOAD";
