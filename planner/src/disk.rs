//! The disks of the cluster, and what is promised on each.

use std::collections::{BTreeMap, BTreeSet};

use api::condition;
use api::image::{BackingImageStatus, CopyState};
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

    /// A disk that was moved is still claimed by a node that has been silent since: who has it now counts.
    fn add(&mut self, disk: Disk) {
        match self.list.iter_mut().find(|known| known.id == disk.id) {
            None => self.list.push(disk),
            Some(claimed) if claimed.health != Health::Ready && disk.health == Health::Ready => *claimed = disk,
            Some(_) => {}
        }
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
                all.add(Disk {
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
    let mut loads = Loads::default();
    replicas.iter().for_each(|replica| loads.add(of_replica(replica)));
    images.iter().for_each(|image| loads.add(of_image(image)));
    loads.all()
}

/// The same, kept up to date: what an object took goes, what it takes comes.
#[derive(Clone, Debug, Default)]
pub struct Loads(BTreeMap<String, Sums>);

/// What [`Load`] says, wide enough that nothing is lost at the upper end, so that what was added can be taken away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sums([u128; 3]);

impl Loads {
    /// Adds what an object takes.
    pub fn add(&mut self, takes: impl IntoIterator<Item = (String, Load)>) {
        self.change(takes, u128::checked_add);
    }

    /// Takes away what was added before.
    ///
    /// # Panics
    /// When it was not: the sums would be wrong from here on.
    pub fn take(&mut self, took: impl IntoIterator<Item = (String, Load)>) {
        self.change(took, u128::checked_sub);
    }

    fn change(&mut self, takes: impl IntoIterator<Item = (String, Load)>, change: fn(u128, u128) -> Option<u128>) {
        for (disk, load) in takes {
            let sums = self.0.entry(disk.clone()).or_default();
            let parts = [load.replica_bytes, load.copy_bytes, load.incoming_bytes];
            for (sum, part) in sums.0.iter_mut().zip(parts) {
                *sum = change(*sum, part.into()).expect("what is taken away was added before");
            }
            if *sums == Sums::default() {
                self.0.remove(&disk);
            }
        }
    }

    /// The load of each disk.
    pub fn all(&self) -> BTreeMap<String, Load> {
        let load = |Sums(sums): &Sums| {
            let [replica_bytes, copy_bytes, incoming_bytes] = sums.map(|sum| u64::try_from(sum).unwrap_or(u64::MAX));
            Load { replica_bytes, copy_bytes, incoming_bytes }
        };
        self.0.iter().map(|(disk, sums)| (disk.clone(), load(sums))).collect()
    }
}

/// What a replica takes on its disk.
pub fn of_replica(replica: &Replica) -> Option<(String, Load)> {
    let Replica { spec, .. } = replica;
    let load = Load { replica_bytes: spec.volume_size.0, ..Load::default() };
    (!spec.disk_id.is_empty()).then(|| (spec.disk_id.clone(), load))
}

/// What the copies of an image take on their disks.
pub fn of_image(image: &BackingImage) -> Vec<(String, Load)> {
    let known = image.status.as_ref();
    let bytes = known.map_or(0, BackingImageStatus::copy_bytes);
    let load = |disk: &String| {
        let state = known.and_then(|s| s.disk_file_status_map.get(disk)).map_or(CopyState::NotStarted, |f| f.state);
        let is_written = matches!(state, CopyState::Ready | CopyState::ReadyForTransfer | CopyState::Unknown);
        Load { copy_bytes: bytes, incoming_bytes: if is_written { 0 } else { bytes }, ..Load::default() }
    };
    image.spec.disk_file_spec_map.keys().map(|disk| (disk.clone(), load(disk))).collect()
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

#[cfg(test)]
mod tests {
    use api::image::DiskFileStatus;
    use api::node::{DiskStatus, NodeStatus};
    use api::quantity::SizeBytes;

    use super::*;

    fn image(bytes: u64, copies: &[(&str, CopyState)]) -> BackingImage {
        let mut image = BackingImage::new("image", Default::default());
        let mut status = BackingImageStatus { size: bytes, ..Default::default() };
        for (disk, state) in copies {
            image.spec.disk_file_spec_map.insert((*disk).into(), Default::default());
            let file = DiskFileStatus { state: *state, ..Default::default() };
            status.disk_file_status_map.insert((*disk).into(), file);
        }
        image.status = Some(status);
        image
    }

    fn replica(bytes: u64, disk: &str) -> Replica {
        let mut replica = Replica::new("replica", Default::default());
        (replica.spec.volume_size, replica.spec.disk_id) = (SizeBytes(bytes), disk.into());
        replica
    }

    fn load(replica_bytes: u64, copy_bytes: u64, incoming_bytes: u64) -> Load {
        Load { replica_bytes, copy_bytes, incoming_bytes }
    }

    #[test]
    fn loads_that_are_kept_are_those_that_are_counted_anew() {
        let first = image(10, &[("a", CopyState::Ready), ("b", CopyState::InProgress)]);
        let second = image(5, &[("b", CopyState::Unknown)]);
        let replicas = [replica(100, "a"), replica(7, ""), replica(u64::MAX, "b"), replica(1, "b")];
        let mut kept = Loads::default();
        replicas.iter().for_each(|r| kept.add(of_replica(r)));
        [&first, &second].into_iter().for_each(|i| kept.add(of_image(i)));
        let all = [("a".to_owned(), load(100, 10, 0)), ("b".to_owned(), load(u64::MAX, 15, 10))].into();
        assert_eq!(kept.all(), all);
        assert_eq!(loads(&replicas, &[first.clone(), second.clone()]), all);

        let whole = image(10, &[("a", CopyState::Ready), ("b", CopyState::Ready)]);
        kept.take(of_image(&first));
        kept.add(of_image(&whole));
        kept.take(of_replica(&replicas[2]));
        assert_eq!(kept.all(), loads(&[replicas[0].clone(), replicas[3].clone()], &[whole.clone(), second.clone()]));
        [&whole, &second].into_iter().for_each(|i| kept.take(of_image(i)));
        [0, 3].into_iter().for_each(|n: usize| kept.take(of_replica(&replicas[n])));
        assert_eq!(kept.all(), BTreeMap::new(), "nothing is left of what is gone");
    }

    #[test]
    fn a_disk_that_was_moved_is_where_it_answers() {
        let node = |name: &str, status: ConditionStatus| {
            let mut node = Node::new(name, Default::default());
            node.spec.disks.insert("disk-1".into(), Default::default());
            let seen = DiskStatus { disk_uuid: "a".into(), ..Default::default() };
            node.status = Some(NodeStatus {
                conditions: vec![Condition::new(READY, status, "", "")],
                disk_status: [("disk-1".to_owned(), seen)].into(),
                ..Default::default()
            });
            node
        };
        let of = |one: ConditionStatus, two: ConditionStatus| {
            let disks = Disks::of(&[node("node-1", one), node("node-2", two)]);
            assert_eq!(disks.list.len(), 1, "there is one disk");
            disks.get("a").unwrap().node.clone()
        };
        let (silent, ready) = (ConditionStatus::Unknown, ConditionStatus::True);
        assert_eq!(of(silent, ready), "node-2", "its former node has been silent since");
        assert_eq!(of(ready, silent), "node-1");
        assert_eq!(of(silent, silent), "node-1");
    }
}
