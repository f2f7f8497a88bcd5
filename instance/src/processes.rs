//! Records of detached processes: how the next life of this role finds them again.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use runtime::files;
use runtime::process::{Launch, ProcessIdentity};
use serde::{Deserialize, Serialize};

use crate::limits;

/// A process that was started, or was about to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessRecord {
    /// `None`: the start was cut short, so nobody knows whether it happened.
    pub identity: Option<ProcessIdentity>,
    /// First of its TCP ports; 0 when it has none.
    pub port: u16,
}

/// Where the record, log and configuration of one process are.
#[derive(Clone, Debug)]
pub struct Place {
    pub directory: PathBuf,
}

impl Place {
    pub fn record(&self) -> PathBuf {
        self.directory.join("process.json")
    }

    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    pub fn config(&self) -> PathBuf {
        self.directory.join("config.json")
    }

    /// The record, `None` when nothing was started. A record that cannot be read is an error: unknown is not absent.
    pub fn read(&self) -> io::Result<Option<ProcessRecord>> {
        match fs::read(self.record()) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Starts `program args… --config FILE` and records it, before and after.
    pub fn start<C: Serialize>(
        &self,
        program: &Path,
        role: &str,
        config: &C,
        port: u16,
    ) -> io::Result<ProcessIdentity> {
        fs::create_dir_all(&self.directory)?;
        files::write_durably(&self.config(), &serde_json::to_vec_pretty(config).map_err(io::Error::other)?)?;
        files::remove_if_present(&self.log())?;
        self.write(&ProcessRecord { identity: None, port })?;
        let mut launch = Launch::new(program).arg(role).flag("--config", self.config());
        launch.log_file = Some(self.log());
        let identity = match launch.spawn_detached() {
            Ok(identity) => identity,
            Err(error) => {
                files::remove_if_present(&self.record())?;
                return Err(error);
            }
        };
        self.write(&ProcessRecord { identity: Some(identity.clone()), port })?;
        Ok(identity)
    }

    fn write(&self, record: &ProcessRecord) -> io::Result<()> {
        files::write_durably(&self.record(), &serde_json::to_vec(record).map_err(io::Error::other)?)
    }

    /// Forgets the process and removes its files.
    pub fn forget(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.directory) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The last words of the process, as the end of a sentence.
    pub fn log_tail(&self) -> String {
        let text = fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.trim().lines().collect();
        let tail = lines[lines.len().saturating_sub(limits::LOG_TAIL_LINES)..].join("; ");
        if tail.is_empty() { String::new() } else { format!(": {tail}") }
    }
}

/// A pair of ports, an even one and the next, that no record claims and nobody listens on.
pub fn free_ports(ip: IpAddr, range: &RangeInclusive<u16>, taken: &BTreeSet<u16>) -> io::Result<u16> {
    let candidates = range.clone().step_by(2).filter(|p| *p < *range.end() && !taken.contains(p));
    for port in candidates {
        if TcpListener::bind((ip, port)).is_ok() && TcpListener::bind((ip, port + 1)).is_ok() {
            return Ok(port);
        }
    }
    Err(io::Error::other(format!("no free pair of ports on {ip} in {}–{}", range.start(), range.end())))
}

/// Ports that the records below a directory claim.
pub fn taken_ports(directory: &Path) -> BTreeSet<u16> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|e| Place { directory: e.path() }.read().ok().flatten()).map(|r| r.port).collect()
}
