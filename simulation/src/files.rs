//! Disks, what lies on them, and what their nodes say of them.

use std::collections::{BTreeMap, BTreeSet};

use api::image::CopyState;
use api::manager::FileInfo;
use api::node::DiskStatus;
use api::{Condition, ConditionStatus, condition};
use planner::data_source::Report;
use planner::manager::Bandwidth;
use planner::manager::orphans::{Place, Remains};

use crate::world::{GIB, World};

/// Image name and uuid: what a file is a copy of.
pub type Key = (String, String);

/// A whole file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// A byte is not what it was.
    pub is_damaged: bool,
    /// Its time is another one than was recorded.
    pub is_touched: bool,
}

/// One disk, wherever it is.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub capacity: u64,
    /// Others took all that was free.
    pub is_full: bool,
    pub is_read_only: bool,
    pub files: BTreeMap<Key, File>,
    /// What data sources work on, or have made, and the file is not handed over yet.
    pub made: BTreeMap<Key, Report>,
    /// What the present life of its agent knows.
    pub known: BTreeMap<Key, FileInfo>,
    /// The directories of replicas, and the files that they lie over. One stays when its object goes while the disk is away.
    pub over: BTreeMap<String, Key>,
    /// Syncs under way: the disks of the peers.
    pub syncs: BTreeMap<Key, Vec<String>>,
    /// The limits that its agent keeps.
    pub bandwidth: Bandwidth,
    /// Readings under way, and when they were asked for.
    pub readings: BTreeMap<Key, String>,
}

impl Disk {
    pub fn free(&self) -> u64 {
        // What is handed over lies among the files.
        let made = self.made.values().filter(|report| report.state != CopyState::Ready).count();
        let files = self.files.len() + made;
        if self.is_full { 0 } else { self.capacity.saturating_sub(files as u64 * GIB) }
    }

    /// Whether something of an image lies there.
    fn holds_image_files(&self) -> bool {
        !self.files.is_empty() || self.made.values().any(|report| report.state != CopyState::Ready)
    }

    /// What lies there besides the copies that its agent knows.
    pub fn remains(&self) -> Vec<Remains> {
        let of = |place, key: &Key, mark| Remains {
            place,
            image: key.0.clone(),
            uuid: key.1.clone(),
            size: GIB,
            mark,
            is_mixed: false,
        };
        let unknown = self.files.iter().filter(|(key, _)| !self.known.contains_key(*key));
        let copies = unknown.map(|(key, file)| of(Place::Copies, key, format!("{file:?}")));
        let made = self.made.iter().filter(|(_, report)| report.state != CopyState::Ready);
        copies.chain(made.map(|(key, report)| of(Place::Preparations, key, format!("{report:?}")))).collect()
    }

    /// Whether a directory of a replica lies over that file.
    pub fn is_base(&self, key: &Key) -> bool {
        self.over.values().any(|base| base == key)
    }

    pub fn is_good(&self, key: &Key) -> bool {
        self.files.get(key).is_some_and(|file| !file.is_damaged)
    }
}

pub fn whole_file(key: &Key) -> FileInfo {
    FileInfo {
        name: key.0.clone(),
        uuid: key.1.clone(),
        size: GIB,
        virtual_size: GIB,
        real_size: GIB,
        state: CopyState::Ready,
        current_checksum: "c0ffee".into(),
        progress: 100,
        format: "raw".into(),
        ..Default::default()
    }
}

/// The node of a path `/node-1/disk-1`.
pub fn node_of_path(path: &str) -> &str {
    path.trim_start_matches('/').split('/').next().unwrap_or_default()
}

impl World {
    /// Where a disk is mounted.
    pub fn path_of(&self, id: &str) -> Option<&str> {
        self.mounts.iter().find(|(_, mounted)| mounted.as_deref() == Some(id)).map(|(path, _)| path.as_str())
    }

    pub fn is_mounted(&self, id: &str, path: &str) -> bool {
        self.mounts.get(path).and_then(|m| m.as_deref()) == Some(id)
    }

    /// The path of each disk in the spec of some node.
    pub fn wished_paths(&self) -> BTreeSet<String> {
        self.nodes.values().flat_map(|n| n.spec.disks.values().map(|d| d.path.clone())).collect()
    }

    /// What the instance role of a node says of its disks, as `instance/src/disks.rs` does.
    pub fn report_disks(&mut self, name: &str) {
        let Some(node) = self.nodes.get(name) else { return };
        let old = node.status.clone().unwrap_or_default().disk_status;
        let mut new = BTreeMap::new();
        for (disk_name, spec) in &node.spec.disks {
            let mut status: DiskStatus = old.get(disk_name).cloned().unwrap_or_default();
            let known = status.disk_uuid.clone();
            let mounted = self.mounts.get(&spec.path).cloned().flatten();
            let disk = mounted.as_ref().map(|id| &self.disks[id]);
            let problem = match (&mounted, disk) {
                (None, _) => Some(("NoDirectory", format!("`{}` is not there", spec.path))),
                (Some(id), _) if !known.is_empty() && *id != known => {
                    Some(("DiskChanged", format!("`{}` now holds disk {id}, not disk {known}", spec.path)))
                }
                (_, Some(disk)) if disk.is_read_only => {
                    Some(("ReadOnly", format!("`{}` is mounted read-only", spec.path)))
                }
                _ => None,
            };
            let (ready, schedulable) = match (problem, disk) {
                (None, Some(disk)) => {
                    status.disk_uuid = mounted.clone().unwrap_or_default();
                    status.holds_image_files = disk.holds_image_files();
                    let under: BTreeSet<String> =
                        disk.over.values().map(|(name, uuid)| format!("{name}-{uuid}")).collect();
                    status.images_under_replicas = Some(under.into_iter().collect());
                    (status.storage_available, status.storage_maximum) = (disk.free(), disk.capacity);
                    let pressure = Condition::new("Schedulable", ConditionStatus::False, "DiskPressure", "it is full");
                    let fine = Condition::new("Schedulable", ConditionStatus::True, "Schedulable", "");
                    let ready = Condition::new("Ready", ConditionStatus::True, "Ready", "");
                    (ready, if disk.free() == 0 { pressure } else { fine })
                }
                (why, _) => {
                    let (reason, message) = why.unwrap_or_default();
                    let said = |r#type| Condition::new(r#type, ConditionStatus::False, reason, message.clone());
                    (said("Ready"), said("Schedulable"))
                }
            };
            condition::set(&mut status.conditions, ready, self.now);
            condition::set(&mut status.conditions, schedulable, self.now);
            new.insert(disk_name.clone(), status);
        }
        if let Some(node) = self.nodes.get_mut(name) {
            node.status.get_or_insert_default().disk_status = new;
        }
    }

    /// The uuid of the image of that name.
    pub fn uuid_of(&self, image: &str) -> String {
        self.images.get(image).and_then(|i| i.status.as_ref()).map(|s| s.uuid.clone()).unwrap_or_default()
    }
}
