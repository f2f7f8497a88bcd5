//! The disks of the cluster, and what is promised on each.

use std::collections::{BTreeMap, BTreeSet};

use api::condition;
use api::image::CopyState;
use api::names::condition::{CORDONED, IN_SERVICE, READY, SCHEDULABLE};
use api::{BackingImage, Condition, ConditionStatus, Node, Replica};
use jiff::Timestamp;

use crate::retry::parse;
use crate::setting::Settings;

/// Whether something can be used now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Ready,
    /// It is known not to work; the sentence says why.
    NotReady(String),
    /// It does not answer: nothing may be concluded from that.
    Unknown(String),
}

/// One disk of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its UUID.
    pub id: String,
    pub name: String,
    pub node: String,
    /// The zone of its node; empty when that has none.
    pub zone: String,
    pub path: String,
    pub node_tags: Vec<String>,
    pub tags: Vec<String>,
    pub health: Health,
    /// Since when it is not ready, if so and if that is known.
    pub away_since: Option<Timestamp>,
    /// Why nothing may be placed here, if so.
    pub unschedulable: Option<String>,
    /// A user asked that it be emptied.
    pub evicting: bool,
    /// Kubernetes calls its node unschedulable; what that means is a matter of settings.
    pub cordoned: bool,
    pub maximum_bytes: u64,
    pub available_bytes: u64,
    pub reserved_bytes: u64,
    /// Files of images lie there, whoever they belong to.
    pub holds_image_files: bool,
    /// `<name>-<uuid>` of each image that something below `replicas/` lies over; `None`: that is not known.
    pub under_replicas: Option<BTreeSet<String>>,
}

/// Why something shall leave its disk: a user's word.
pub(crate) const EVICTION: &str = "eviction is requested there";

impl Disk {
    /// Why it shall be emptied, if so.
    pub fn leaving(&self, settings: &Settings) -> Option<&'static str> {
        match self {
            Disk { evicting: true, .. } => Some(EVICTION),
            Disk { cordoned: true, .. } if settings.evict_cordoned => {
                Some("its node is cordoned and setting backing-image-cordoned-node-policy is evict")
            }
            _ => None,
        }
    }

    /// What users read: the disk's name and its node.
    pub fn label(&self) -> String {
        format!("{} of {}", self.name, self.node)
    }
}

/// What is promised on one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Σ sizes of the volumes that have a replica here.
    pub replica_bytes: u64,
    /// Σ sizes of the copies here, those on their way included.
    pub copy_bytes: u64,
    /// The part of them that is not written yet.
    pub incoming_bytes: u64,
}

/// All disks that nodes have reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disks {
    /// By node, then by name.
    pub list: Vec<Disk>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Health>,
    /// Nodes that a user declared to be off: nothing of them writes any more.
    pub out_of_service: BTreeSet<String>,
    /// Nodes that have not reported each of their disks yet: a disk that is missing may be one of theirs.
    pub incomplete: BTreeSet<String>,
}

impl Disks {
    /// The disk of that UUID.
    pub fn get(&self, id: &str) -> Option<&Disk> {
        self.list.iter().find(|d| d.id == id)
    }

    /// Whether the disk is known to be gone: nobody has it, and everybody has told. A cluster without nodes has told nothing.
    pub fn is_gone(&self, id: &str) -> bool {
        self.get(id).is_none() && self.incomplete.is_empty() && !self.nodes.is_empty()
    }

    /// How users know a disk; its UUID when nobody has it.
    pub fn label(&self, id: &str) -> String {
        self.get(id).map_or_else(|| format!("disk {id}"), Disk::label)
    }

    /// The disks of nodes.
    pub fn of(nodes: &[Node]) -> Disks {
        let mut nodes: Vec<&Node> = nodes.iter().collect();
        nodes.sort_by_key(|n| name_of(n).to_owned());
        let mut all = Disks::default();
        for node in nodes {
            let name = name_of(node).to_owned();
            let status = node.status.clone().unwrap_or_default();
            let node_health = health(&status.conditions, &format!("node {name}"));
            let node_unschedulable = unschedulable(node.spec.allow_scheduling, &status.conditions);
            for (disk_name, spec) in &node.spec.disks {
                let Some(seen) = status.disk_status.get(disk_name).filter(|d| !d.disk_uuid.is_empty()) else {
                    all.incomplete.insert(name.clone());
                    continue;
                };
                // A disk without conditions of its own is as well as its node.
                let disk_health = match condition::find(&seen.conditions, READY) {
                    None => Health::Ready,
                    Some(_) => health(&seen.conditions, &format!("{disk_name} of {name}")),
                };
                let at_fault = if node_health == Health::Ready { &seen.conditions } else { &status.conditions };
                let health = if node_health == Health::Ready { disk_health } else { node_health.clone() };
                all.list.push(Disk {
                    id: seen.disk_uuid.clone(),
                    name: disk_name.clone(),
                    node: name.clone(),
                    zone: status.zone.clone(),
                    path: if spec.path.is_empty() { seen.disk_path.clone() } else { spec.path.clone() },
                    node_tags: node.spec.tags.clone(),
                    tags: spec.tags.clone(),
                    away_since: (health != Health::Ready).then(|| since(at_fault)).flatten(),
                    health,
                    unschedulable: node_unschedulable
                        .clone()
                        .or_else(|| unschedulable(spec.allow_scheduling, &seen.conditions)),
                    evicting: spec.eviction_requested || node.spec.eviction_requested,
                    cordoned: condition::find(&status.conditions, CORDONED).is_some_and(Condition::is_true),
                    maximum_bytes: seen.storage_maximum,
                    available_bytes: seen.storage_available,
                    reserved_bytes: spec.storage_reserved,
                    holds_image_files: seen.holds_image_files,
                    under_replicas: seen.images_under_replicas.clone().map(|keys| keys.into_iter().collect()),
                });
            }
            let in_service = condition::find(&status.conditions, IN_SERVICE);
            if in_service.is_some_and(|c| c.status == ConditionStatus::False) {
                all.out_of_service.insert(name.clone());
            }
            all.nodes.insert(name, node_health);
        }
        all
    }
}

fn name_of(node: &Node) -> &str {
    node.metadata.name.as_deref().unwrap_or_default()
}

fn health(conditions: &[Condition], what: &str) -> Health {
    match condition::find(conditions, READY) {
        None => Health::Unknown(format!("{what} has not reported yet")),
        Some(c) if c.status == ConditionStatus::True => Health::Ready,
        Some(c) if c.status == ConditionStatus::False => Health::NotReady(sentence(c, format!("{what} is not ready"))),
        Some(c) => Health::Unknown(sentence(c, format!("{what} does not answer"))),
    }
}

fn since(conditions: &[Condition]) -> Option<Timestamp> {
    parse(&condition::find(conditions, READY)?.last_transition_time)
}

fn sentence(condition: &Condition, fallback: String) -> String {
    if condition.message.is_empty() { fallback } else { format!("{fallback}: {}", condition.message) }
}

fn unschedulable(allowed: bool, conditions: &[Condition]) -> Option<String> {
    if !allowed {
        return Some("scheduling is switched off there".into());
    }
    let condition = condition::find(conditions, SCHEDULABLE)?;
    (condition.status == ConditionStatus::False).then(|| sentence(condition, "nothing may be placed there".into()))
}

/// What replicas and copies take on each disk, by UUID.
pub fn loads(replicas: &[Replica], images: &[BackingImage]) -> BTreeMap<String, Load> {
    let mut loads: BTreeMap<String, Load> = BTreeMap::new();
    for replica in replicas.iter().filter(|r| !r.spec.disk_id.is_empty()) {
        let load = loads.entry(replica.spec.disk_id.clone()).or_default();
        load.replica_bytes = load.replica_bytes.saturating_add(replica.spec.volume_size.0);
    }
    for image in images {
        let status = image.status.clone().unwrap_or_default();
        let bytes = if status.real_size > 0 { status.real_size } else { status.size };
        for disk in image.spec.disk_file_spec_map.keys() {
            let load = loads.entry(disk.clone()).or_default();
            load.copy_bytes = load.copy_bytes.saturating_add(bytes);
            let state = status.disk_file_status_map.get(disk).map_or(CopyState::NotStarted, |f| f.state);
            if !matches!(state, CopyState::Ready | CopyState::ReadyForTransfer | CopyState::Unknown) {
                load.incoming_bytes = load.incoming_bytes.saturating_add(bytes);
            }
        }
    }
    loads
}

/// A disk for tests: ready, empty, without tags.
#[cfg(test)]
pub(crate) fn ready_disk(id: &str, bytes: u64) -> Disk {
    Disk {
        id: id.into(),
        name: id.into(),
        node: format!("node-{id}"),
        zone: String::new(),
        path: format!("/{id}"),
        node_tags: vec![],
        tags: vec![],
        health: Health::Ready,
        away_since: None,
        unschedulable: None,
        evicting: false,
        cordoned: false,
        maximum_bytes: bytes,
        available_bytes: bytes,
        reserved_bytes: 0,
        holds_image_files: false,
        under_replicas: Some(BTreeSet::new()),
    }
}
