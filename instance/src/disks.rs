//! The disks of a node: made when wished, looked at, reported.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use api::ids::DiskId;
use api::names::condition::{READY, SCHEDULABLE};
use api::node::{DiskSpec, DiskStatus};
use api::{Condition, ConditionStatus, Node, condition};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::decide::Disk;
use crate::{InstanceError, Shared, limits, sentence};

const DISK_CONFIG: &str = "longhorn-disk.cfg";

/// Longhorn's file that makes a directory a disk (LF 1.7).
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DiskConfig {
    #[serde(default)]
    disk_name: String,
    #[serde(rename = "diskUUID")]
    disk_uuid: DiskId,
    #[serde(default)]
    disk_driver: String,
    #[serde(default)]
    state: String,
}

/// Reports at every change of the node object, and now and then without one.
pub(crate) async fn drive(shared: Arc<Shared>, changed: Arc<Notify>) {
    let mut failures = 0;
    while !shared.shutdown.is_cancelled() {
        let wait = match report(&shared).await {
            Ok(()) => {
                failures = 0;
                limits::DISK_INTERVAL
            }
            Err(error) => {
                failures += 1;
                if !error.is_conflict() {
                    tracing::warn!(error = sentence(&error), failures, "disks not reported");
                }
                limits::RETRY.delay(failures)
            }
        };
        tokio::select! {
            () = changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
            () = shared.shutdown.cancelled() => {}
        }
    }
}

async fn report(shared: &Shared) -> Result<(), InstanceError> {
    let store = &shared.config.store;
    let Some(mut node) = store.get::<Node>(shared.config.node.as_str()).await? else { return Ok(()) };
    let old = node.status.clone().unwrap_or_default();
    let mut status = old.clone();
    let now = Timestamp::now();
    let mut found = BTreeMap::new();
    let mut uuids = BTreeSet::new();
    for (name, spec) in &node.spec.disks {
        let mut disk = old.disk_status.get(name).cloned().unwrap_or_default();
        // Another path is another disk.
        if disk.disk_path != spec.path {
            disk = DiskStatus::default();
        }
        let problem = match look(name, spec, &mut disk, shared.config.create_disks) {
            Ok(()) if !uuids.insert(disk.disk_uuid.clone()) => Some(Problem {
                reason: "DuplicateUUID",
                message: format!("another disk of this node has the UUID {}; was it copied?", disk.disk_uuid),
            }),
            Ok(()) => None,
            Err(problem) => Some(problem),
        };
        for condition in conditions(name, spec, problem) {
            condition::set(&mut disk.conditions, condition, now);
        }
        found.insert(name.clone(), disk);
    }
    status.disk_status = found;
    status.ip = shared.config.ip.to_string();
    let ready = Condition::new(READY, ConditionStatus::True, "NodeReady", "the node serves its disks");
    condition::set(&mut status.conditions, ready, now);
    let schedulable = match node.spec.allow_scheduling {
        true => Condition::new(SCHEDULABLE, ConditionStatus::True, "Allowed", ""),
        false => Condition::new(SCHEDULABLE, ConditionStatus::False, "NotAllowed", "spec.allowScheduling is false"),
    };
    condition::set(&mut status.conditions, schedulable, now);
    if status != old {
        node.status = Some(status);
        store.replace_status(&node).await?;
    }
    Ok(())
}

/// What is wrong with a disk.
struct Problem {
    reason: &'static str,
    message: String,
}

fn conditions(name: &str, spec: &DiskSpec, problem: Option<Problem>) -> Vec<Condition> {
    let (yes, no) = (ConditionStatus::True, ConditionStatus::False);
    match problem {
        Some(problem) => vec![
            Condition::new(READY, no, problem.reason, problem.message)
                .with_hint(format!("make `{}` right, or remove disk `{name}` from spec.disks", spec.path)),
            Condition::new(SCHEDULABLE, no, "DiskNotReady", format!("disk `{name}` is not ready")),
        ],
        None => vec![
            Condition::new(READY, yes, "DiskReady", format!("disk `{name}` is ready")),
            match spec.allow_scheduling {
                true => Condition::new(SCHEDULABLE, yes, "Allowed", ""),
                false => Condition::new(SCHEDULABLE, no, "NotAllowed", "the disk's allowScheduling is false"),
            },
        ],
    }
}

fn look(name: &str, spec: &DiskSpec, disk: &mut DiskStatus, create: bool) -> Result<(), Problem> {
    let path = Path::new(&spec.path);
    (disk.disk_name, disk.disk_path, disk.r#type) = (name.into(), spec.path.clone(), spec.r#type.clone());
    let problem = |reason, message| Problem { reason, message };
    if !path.is_absolute() {
        return Err(problem("InvalidPath", format!("`{}` is not an absolute path", spec.path)));
    }
    let known = !disk.disk_uuid.is_empty();
    if !path.is_dir() {
        if known || !create {
            return Err(problem("NoDirectory", format!("the directory `{}` does not exist", spec.path)));
        }
        fs::create_dir_all(path)
            .map_err(|e| problem("NoDirectory", format!("the directory `{}` cannot be made: {e}", spec.path)))?;
    }
    let config = match read_config(path) {
        Ok(Some(config)) => config,
        // A known disk without its file is a disk that is not mounted, not a new one.
        Ok(None) if known => {
            let text = format!("`{}` has no `{DISK_CONFIG}`, it had before; is the disk mounted?", spec.path);
            return Err(problem("NoDiskInfo", text));
        }
        Ok(None) => make_config(name, path).map_err(|e| {
            let text = format!("`{DISK_CONFIG}` cannot be written in `{}`: {e}", spec.path);
            problem("ReadOnly", text)
        })?,
        Err(error) => return Err(problem("NoDiskInfo", format!("`{DISK_CONFIG}` in `{}`: {error}", spec.path))),
    };
    if known && disk.disk_uuid != config.disk_uuid.as_str() {
        return Err(problem(
            "DiskFilesystemChanged",
            format!("`{}` holds disk {} instead of {}", spec.path, config.disk_uuid, disk.disk_uuid),
        ));
    }
    disk.disk_uuid = config.disk_uuid.to_string();
    let stats = dataplane::stats::filesystem(path).map_err(|e| problem("NoStatistics", sentence(&e)))?;
    disk.storage_maximum = stats.total_bytes;
    disk.storage_available = stats.available_bytes;
    disk.fs_type = filesystem_type(path);
    if stats.read_only {
        return Err(problem("ReadOnly", format!("the filesystem of `{}` is mounted read-only", spec.path)));
    }
    Ok(())
}

/// The type of the filesystem that holds a path: the mount with the longest matching target.
fn filesystem_type(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mounts = dataplane::mount::list().unwrap_or_default();
    let holding = mounts.into_iter().filter(|m| path.starts_with(&m.target));
    holding.max_by_key(|m| m.target.as_os_str().len()).map(|m| m.fs_type).unwrap_or_default()
}

fn read_config(path: &Path) -> Result<Option<DiskConfig>, std::io::Error> {
    match fs::read(path.join(DISK_CONFIG)) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(std::io::Error::other),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn make_config(name: &str, path: &Path) -> std::io::Result<DiskConfig> {
    let disk_uuid = uuid::Uuid::new_v4().to_string().parse().map_err(std::io::Error::other)?;
    let config = DiskConfig { disk_name: name.into(), disk_uuid, disk_driver: String::new(), state: "ready".into() };
    let text = serde_json::to_vec(&config).map_err(std::io::Error::other)?;
    runtime::files::write_durably(&path.join(DISK_CONFIG), &text)?;
    Ok(config)
}

/// Whether the disk of a replica is there, looked at now.
pub(crate) fn of_replica(node: Option<&Node>, disk_uuid: &str, disk_path: &str) -> Disk {
    let wished = node.is_some_and(|n| n.spec.disks.values().any(|d| d.path == disk_path));
    match read_config(Path::new(disk_path)) {
        Ok(Some(config)) if config.disk_uuid.as_str() == disk_uuid => Disk::Available,
        _ if node.is_some() && !wished => Disk::GivenUp,
        Ok(Some(config)) => {
            Disk::Unavailable(format!("`{disk_path}` holds disk {} instead of {disk_uuid}", config.disk_uuid))
        }
        Ok(None) => Disk::Unavailable(format!("disk {disk_uuid} is not mounted at `{disk_path}`")),
        Err(error) => Disk::Unavailable(format!("disk {disk_uuid} at `{disk_path}` cannot be read: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_disk_gets_a_uuid_and_keeps_it_and_a_lost_one_is_not_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk-1");
        let spec = DiskSpec { path: path.display().to_string(), ..Default::default() };
        let mut disk = DiskStatus::default();
        assert_eq!(look("d", &spec, &mut disk.clone(), false).unwrap_err().reason, "NoDirectory");
        assert!(look("d", &spec, &mut disk, true).is_ok());
        let uuid = disk.disk_uuid.clone();
        assert!(disk.storage_maximum > 0 && look("d", &spec, &mut disk, true).is_ok());
        assert_eq!(disk.disk_uuid, uuid);
        fs::remove_file(path.join(DISK_CONFIG)).unwrap();
        assert_eq!(look("d", &spec, &mut disk, true).unwrap_err().reason, "NoDiskInfo");
        make_config("d", &path).unwrap();
        assert_eq!(look("d", &spec, &mut disk, true).unwrap_err().reason, "DiskFilesystemChanged");
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(look("d", &spec, &mut disk, true).unwrap_err().reason, "NoDirectory");
    }
}
