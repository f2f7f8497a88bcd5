//! The disks of a node: their configuration files, what they hold, whether something may be placed there.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use api::names::condition::{CLOCK_STEADY, IN_SERVICE, READY, SCHEDULABLE};
use api::node::{DiskSpec, DiskStatus, NodeStatus};
use api::{Condition, ConditionStatus, Node, condition};
use jiff::Timestamp;
use runtime::files;
use serde::{Deserialize, Serialize};

use crate::claims::{Claim, SAME_UUID};
use crate::disk_calls::{DiskCalls, Silent};
use crate::error::InstanceError;
use crate::role::Config;
use crate::{discovery, image_files, ownership};

/// Longhorn's file at the root of a disk (LF 1.7).
pub const CONFIG_FILE: &str = "longhorn-disk.cfg";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DiskFile {
    #[serde(default)]
    disk_name: String,
    #[serde(rename = "diskUUID")]
    disk_uuid: String,
    #[serde(default)]
    disk_driver: String,
    #[serde(default)]
    state: String,
}

/// What was seen of a disk.
struct Seen {
    uuid: String,
    fs_type: String,
    maximum: u64,
    available: u64,
    holds_image_files: bool,
    images_under_replicas: Option<Vec<String>>,
}

/// Why a disk cannot be used: reason, sentence, what to do.
struct Unusable {
    reason: &'static str,
    message: String,
    hint: &'static str,
}

/// Reason of a disk that is not known to be broken.
const NOT_ANSWERING: &str = "NotAnswering";

impl From<Silent> for Unusable {
    fn from(silent: Silent) -> Unusable {
        let hint = "check the disk; the other disks of the node are not concerned";
        Unusable { reason: NOT_ANSWERING, message: silent.to_string(), hint }
    }
}

/// Whether the disk of this UUID is what lies at `path` now. An empty directory below which a disk was mounted is not it.
pub fn is_there(path: &Path, uuid: &str) -> Result<(), String> {
    let file = path.join(CONFIG_FILE);
    let text = fs::read(&file)
        .map_err(|e| format!("disk {uuid} is not at `{}`: cannot read `{}`: {e}", path.display(), file.display()))?;
    let found: DiskFile =
        serde_json::from_slice(&text).map_err(|e| format!("`{}` is not understood: {e}", file.display()))?;
    if found.disk_uuid == uuid {
        Ok(())
    } else {
        Err(format!("`{}` holds disk {}, not disk {uuid}", path.display(), found.disk_uuid))
    }
}

/// Reports the disks of this node; makes what is missing where that is allowed. One that does not answer holds up no other.
pub async fn reconcile(
    config: &Config,
    calls: &DiskCalls,
    engine_replacement: &Condition,
    clock: Option<Condition>,
    elsewhere: &[Claim],
) -> Result<Option<Duration>, InstanceError> {
    let Some(mut node) = config.store.get::<Node>(config.node.as_str()).await? else { return Ok(None) };
    let mut found = None;
    if config.discover {
        let (completed, more) = discovery::complete_node(config, node).await?;
        (node, found) = (completed, Some(more));
    }
    let old = node.status.clone().unwrap_or_default();
    let rules = Rules::of(config);
    let looks = node.spec.disks.clone().into_iter().map(|(name, disk)| {
        let uuid = old.disk_status.get(&name).map(|d| d.disk_uuid.clone()).unwrap_or_default();
        let (label, spec) = (name.clone(), disk.clone());
        async move {
            let seen = calls.ask(Path::new(&disk.path), move || look_at(&label, &spec, &uuid, rules)).await;
            (name, (disk, seen.unwrap_or_else(|silent| Err(silent.into()))))
        }
    });
    let mut looked: BTreeMap<_, _> = futures::future::join_all(looks).await.into_iter().collect();
    yield_to_others(config.node.as_str(), &mut looked, &old, elsewhere);
    let now = Timestamp::now();
    let allowed = node.spec.allow_scheduling;
    let report = |(name, (disk, seen)): (String, (DiskSpec, Result<Seen, Unusable>))| {
        let before = old.disk_status.get(&name).cloned().unwrap_or_default();
        let status = disk_status(&name, &disk, seen, before, allowed, now);
        (name, status)
    };
    let mut conditions = old.conditions.clone();
    // Otherwise the controller says whether this node is ready: others may not reach what runs here.
    if condition::find(&conditions, IN_SERVICE).is_none_or(Condition::is_true) {
        condition::set(&mut conditions, Condition::new(READY, ConditionStatus::True, "Ready", ""), now);
    }
    condition::set(&mut conditions, engine_replacement.clone(), now);
    match clock {
        Some(condition) => condition::set(&mut conditions, condition, now),
        None => conditions.retain(|c| c.r#type != CLOCK_STEADY),
    }
    // Without Kubernetes it is the user who says where a machine stands, on our own object.
    let (mut region, mut zone) = discovery::place(&node.metadata);
    if let Some(found) = found {
        (region, zone) = (found.region, found.zone);
        condition::set(&mut conditions, found.condition, now);
    }
    let status = NodeStatus {
        conditions,
        disk_status: looked.into_iter().map(report).collect(),
        region,
        zone,
        ip: config.ip.to_string(),
        other: old.other.clone(),
    };
    if is_same(&old, &status) {
        return Ok(None);
    }
    let mut changed = node;
    changed.status = Some(status);
    config.store.replace_status(&changed).await?;
    Ok(None)
}

/// Of the disks that hold one UUID all but one are unusable.
fn yield_to_others(
    node: &str,
    looked: &mut BTreeMap<String, (DiskSpec, Result<Seen, Unusable>)>,
    old: &NodeStatus,
    elsewhere: &[Claim],
) {
    let claim = |(name, (_, seen)): (&String, &(DiskSpec, Result<Seen, Unusable>))| match seen {
        Ok(seen) => Some(Claim::of(node, name, &seen.uuid, old.disk_status.get(name))),
        Err(_) => Claim::of_absent(node, name, old.disk_status.get(name)?),
    };
    let own: Vec<Claim> = looked.iter().filter_map(claim).collect();
    for claim in &own {
        let Some(keeper) = claim.yields_to(own.iter().chain(elsewhere)) else { continue };
        let Some((spec, seen)) = looked.get_mut(&claim.disk) else { continue };
        let Ok(Seen { uuid, .. }) = seen else { continue };
        let message = format!("`{}` holds disk {uuid}, and so does {} of {}", spec.path, keeper.disk, keeper.node);
        let hint = "if it is a copy of that disk, empty it, its longhorn-disk.cfg included; if it is the same directory, remove one of the two from its node";
        *seen = Err(Unusable { reason: SAME_UUID, message, hint });
    }
}

/// Whether two reports say the same. Free space that moves by less than 1 % of the disk is no news.
fn is_same(old: &NodeStatus, new: &NodeStatus) -> bool {
    let mut rounded = new.clone();
    for (name, disk) in &mut rounded.disk_status {
        let Some(before) = old.disk_status.get(name) else { return false };
        if before.storage_available.abs_diff(disk.storage_available) < disk.storage_maximum / 100 {
            disk.storage_available = before.storage_available;
        }
    }
    *old == rounded
}

fn disk_status(
    name: &str,
    disk: &DiskSpec,
    seen: Result<Seen, Unusable>,
    before: DiskStatus,
    node_allowed: bool,
    now: Timestamp,
) -> DiskStatus {
    let mut status =
        DiskStatus { disk_name: name.to_owned(), disk_path: disk.path.clone(), r#type: disk.r#type.clone(), ..before };
    let (ready, schedulable) = match seen {
        Ok(seen) => {
            status.storage_maximum = seen.maximum;
            status.storage_available = seen.available;
            status.disk_uuid = seen.uuid;
            status.fs_type = seen.fs_type;
            status.holds_image_files = seen.holds_image_files;
            status.images_under_replicas = seen.images_under_replicas;
            (Condition::new(READY, ConditionStatus::True, "Ready", ""), schedulable(disk, node_allowed, seen.available))
        }
        // Unknown is not absent: its uuid and sizes stay as they were seen last.
        Err(why) => {
            let condition =
                |r#type, is| Condition::new(r#type, is, why.reason, why.message.clone()).with_hint(why.hint);
            let is_ready = if why.reason == NOT_ANSWERING { ConditionStatus::Unknown } else { ConditionStatus::False };
            (condition(READY, is_ready), condition(SCHEDULABLE, ConditionStatus::False))
        }
    };
    condition::set(&mut status.conditions, ready, now);
    condition::set(&mut status.conditions, schedulable, now);
    status
}

fn schedulable(disk: &DiskSpec, node_allowed: bool, available: u64) -> Condition {
    let no = |reason, message: &str| Condition::new(SCHEDULABLE, ConditionStatus::False, reason, message);
    if !node_allowed {
        return no("NodeSchedulingDisabled", "scheduling is disabled on its node");
    }
    if !disk.allow_scheduling {
        return no("SchedulingDisabled", "scheduling is disabled on it");
    }
    if available <= disk.storage_reserved {
        let message = format!("{available} bytes are free, and {} are reserved", disk.storage_reserved);
        return no("DiskPressure", &message).with_hint("free space on it, or lower its storageReserved");
    }
    Condition::new(SCHEDULABLE, ConditionStatus::True, "Schedulable", "")
}

/// How the disks of a node are dealt with.
#[derive(Clone, Copy, Default)]
struct Rules {
    /// Whether an absent directory is made.
    create: bool,
    /// Whether a directory may be one of a container, and is none then.
    mounted: bool,
    owner: Option<u32>,
}

impl Rules {
    fn of(config: &Config) -> Rules {
        Rules { create: config.create_disks, mounted: config.discover, owner: config.disk_owner }
    }
}

fn look_at(name: &str, disk: &DiskSpec, known_uuid: &str, rules: Rules) -> Result<Seen, Unusable> {
    let path = Path::new(&disk.path);
    let cannot = |reason, hint, action: &str, e: io::Error| Unusable {
        reason,
        message: format!("cannot {action} `{}`: {e}", disk.path),
        hint,
    };
    if disk.r#type != "filesystem" {
        let message = format!("disk type `{}` is not offered, only `filesystem`", disk.r#type);
        return Err(Unusable { reason: "Unsupported", message, hint: "set the disk's type to filesystem" });
    }
    // A disk that was there before and is gone was unmounted or removed: an empty directory must not take its place.
    if rules.create && known_uuid.is_empty() {
        files::create_dir_durably(path)
            .map_err(|e| cannot("NoDirectory", "make it, or correct the disk's path", "make", e))?;
    }
    if !path.is_dir() {
        let message = format!("`{}` is not there", disk.path);
        return Err(Unusable {
            reason: "NoDirectory",
            message,
            hint: "mount the disk again, or remove it from the node",
        });
    }
    if rules.mounted && discovery::is_of_container(path) {
        let message = format!("`{}` is a directory of this container, not of the machine", disk.path);
        return Err(Unusable { reason: "NotMounted", message, hint: discovery::NOT_MOUNTED_HINT });
    }
    let uuid = uuid_of(path, name, known_uuid)?;
    if let Some(owner) = rules.owner {
        ownership::give(path, owner)
            .map_err(|e| cannot("NotPrepared", "check the disk", "give the agents their directories on", e))?;
    }
    let statistics =
        rustix::fs::statvfs(path).map_err(|e| cannot("NoStatistics", "check the disk", "ask the size of", e.into()))?;
    let fs_type = filesystem_name(path);
    if statistics.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        let message = format!("`{}` is mounted read-only", disk.path);
        return Err(Unusable { reason: "ReadOnly", message, hint: "check the disk and mount it writable again" });
    }
    let unit = statistics.f_frsize;
    Ok(Seen {
        uuid,
        fs_type,
        maximum: statistics.f_blocks * unit,
        available: statistics.f_bavail * unit,
        holds_image_files: image_files::are_there(path),
        images_under_replicas: image_files::under_replicas(path),
    })
}

/// The disk's own UUID; made once, for a disk that never had one.
fn uuid_of(path: &Path, name: &str, known_uuid: &str) -> Result<String, Unusable> {
    let file = path.join(CONFIG_FILE);
    let unusable = |reason, message: String, hint| Unusable { reason, message, hint };
    match fs::read(&file) {
        Ok(text) => {
            let read: DiskFile = serde_json::from_slice(&text).map_err(|e| {
                unusable(
                    "BadDiskFile",
                    format!("`{}` is not understood: {e}", file.display()),
                    "restore the file; it holds the disk's identity",
                )
            })?;
            if !known_uuid.is_empty() && known_uuid != read.disk_uuid {
                let message = format!("`{}` now holds disk {}, not disk {known_uuid}", path.display(), read.disk_uuid);
                return Err(unusable(
                    "DiskChanged",
                    message,
                    "mount the right disk, or remove this one from the node and add it anew",
                ));
            }
            Ok(read.disk_uuid)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound && known_uuid.is_empty() => {
            let made = DiskFile {
                disk_name: name.to_owned(),
                disk_uuid: uuid::Uuid::new_v4().to_string(),
                disk_driver: String::new(),
                state: "ready".into(),
            };
            let written =
                serde_json::to_vec(&made).map_err(io::Error::other).and_then(|text| files::write_durably(&file, &text));
            written.map_err(|e| {
                unusable("NotWritable", format!("cannot write `{}`: {e}", file.display()), "make the disk writable")
            })?;
            Ok(made.disk_uuid)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let message = format!("`{}` is gone, so this may be another disk than {known_uuid}", file.display());
            Err(unusable("NoDiskFile", message, "mount the disk again, or restore the file"))
        }
        Err(e) => Err(unusable("BadDiskFile", format!("cannot read `{}`: {e}", file.display()), "check the disk")),
    }
}

fn filesystem_name(path: &Path) -> String {
    const NAMES: [(u64, &str); 5] = [
        (0xEF53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683E, "btrfs"),
        (0x0102_1994, "tmpfs"),
        (0x794C_7630, "overlay"),
    ];
    let Ok(statistics) = rustix::fs::statfs(path) else { return String::new() };
    let magic = statistics.f_type as u64;
    NAMES
        .iter()
        .find(|(number, _)| *number == magic)
        .map_or_else(|| format!("{magic:#x}"), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAKE: Rules = Rules { create: true, mounted: false, owner: None };

    fn spec(path: &Path) -> DiskSpec {
        DiskSpec { path: path.display().to_string(), ..DiskSpec::default() }
    }

    #[test]
    fn gives_a_new_disk_a_uuid_and_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let disk = spec(&folder.path().join("disk-1"));
        let first = look_at("disk-1", &disk, "", MAKE).map_err(|u| u.message).unwrap();
        let again = look_at("disk-1", &disk, &first.uuid, Rules::default()).map_err(|u| u.message).unwrap();
        assert_eq!(first.uuid, again.uuid);
        assert!(again.maximum >= again.available && again.available > 0);
        let text = fs::read_to_string(folder.path().join("disk-1/longhorn-disk.cfg")).unwrap();
        assert_eq!(
            text,
            format!(r#"{{"diskName":"disk-1","diskUUID":"{}","diskDriver":"","state":"ready"}}"#, first.uuid)
        );
    }

    #[test]
    fn says_why_a_disk_cannot_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let disk = spec(&folder.path().join("disk-1"));
        let reason = |known: &str, create| {
            look_at("disk-1", &disk, known, Rules { create, ..Rules::default() }).map(|_| ()).map_err(|u| u.reason)
        };
        assert_eq!(reason("", false), Err("NoDirectory"));
        assert_eq!(reason("5e1f", true), Err("NoDirectory"), "a disk that was there before is not made anew");
        assert_eq!(reason("", true), Ok(()));
        assert_eq!(reason("5e1f", true), Err("DiskChanged"));
        fs::remove_file(folder.path().join("disk-1/longhorn-disk.cfg")).unwrap();
        assert_eq!(reason("5e1f", true), Err("NoDiskFile"));
        fs::write(folder.path().join("disk-1/longhorn-disk.cfg"), "{").unwrap();
        assert_eq!(reason("5e1f", true), Err("BadDiskFile"));
    }

    #[test]
    fn free_space_that_moves_a_little_is_no_news() {
        let status = |available| NodeStatus {
            disk_status: [(
                "a".into(),
                DiskStatus { storage_maximum: 1000, storage_available: available, ..DiskStatus::default() },
            )]
            .into(),
            ..NodeStatus::default()
        };
        assert!(is_same(&status(500), &status(505)));
        assert!(!is_same(&status(500), &status(510)));
    }
}
