//! The objects, what is really there, and the dice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::node::{DiskSpec, NodeSpec, NodeStatus};
use api::{
    BackingImage, BackingImageDataSource, BackingImageManager, Condition, ConditionStatus, Engine, Node, Replica,
    Volume, condition,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use planner::disk::Disks;
use planner::retry::Retry;
use planner::setting::Settings;
use planner::workload::Workload;
use rand::Rng;
use rand::rngs::StdRng;

use crate::data::{EngineProcess, ReplicaFiles};
use crate::data_plane::Tally;
use crate::files::{Disk, Key};

pub const IMAGES: [&str; 2] = ["alpine", "ubuntu"];
pub const VOLUMES: [&str; 3] = ["va", "vb", "vc"];
pub const GIB: u64 = 1 << 30;

/// Objects, reality, the controller's memory, and what is remembered to judge it.
pub struct World {
    pub now: Timestamp,
    pub settings: Settings,
    pub nodes: BTreeMap<String, Node>,
    /// Until when a node does not answer.
    pub silent: BTreeMap<String, Timestamp>,
    /// Until when a workload does not answer, by its name.
    pub stopped: BTreeMap<String, Timestamp>,
    pub images: BTreeMap<String, BackingImage>,
    pub sources: BTreeMap<String, BackingImageDataSource>,
    pub managers: BTreeMap<String, BackingImageManager>,
    pub volumes: BTreeMap<String, Volume>,
    pub engines: BTreeMap<String, Engine>,
    pub replicas: BTreeMap<String, Replica>,
    pub workloads: BTreeMap<String, Workload>,
    /// Every disk that there ever was, by its UUID.
    pub disks: BTreeMap<String, Disk>,
    /// What is mounted where, by path: `/node-1/disk-1`.
    pub mounts: BTreeMap<String, Option<String>>,
    pub replica_files: BTreeMap<String, ReplicaFiles>,
    pub engine_processes: BTreeMap<String, EngineProcess>,
    /// Acknowledged writes of each volume.
    pub acknowledged: BTreeMap<String, u64>,
    pub manager_memory: BTreeMap<String, planner::manager::Memory>,
    pub restarts: BTreeMap<String, Retry>,
    /// When the controller asked a data source last, of those that were silent then.
    pub source_silence: BTreeMap<String, Timestamp>,
    /// The latest time that any clock showed.
    pub latest: Timestamp,
    pub faults: bool,
    pub told: bool,
    pub tally: Tally,
    /// Actions so far, other than readings of what is there.
    pub actions: u64,
    /// When some pass wants to look again, at the soonest; since it was taken last.
    pub recheck: Option<Duration>,
    /// Copies that may go, and on which other ones that relies: disk, file → disks.
    pub licenses: BTreeMap<(String, Key), BTreeSet<String>>,
    /// Copies that were removed on purpose.
    pub taken: BTreeSet<(String, Key)>,
    /// Since when a copy is not used, by disk and image.
    pub unused_since: BTreeMap<(String, String), Timestamp>,
    /// Since when a copy is unknown, by disk and image.
    pub unknown_since: BTreeMap<(String, String), Timestamp>,
    /// Since when nobody has a disk with an entry, by disk and image.
    pub gone_since: BTreeMap<(String, String), Timestamp>,
    /// Disks that were away when something of theirs should have been removed.
    pub left_behind: BTreeSet<String>,
}

impl World {
    /// Nodes with one or two disks each, nothing else.
    pub fn new(random: &mut StdRng) -> World {
        let mut world = World {
            now: "2026-01-01T00:00:00Z".parse().expect("a time"),
            settings: Settings::default(),
            nodes: BTreeMap::new(),
            silent: BTreeMap::new(),
            stopped: BTreeMap::new(),
            images: BTreeMap::new(),
            sources: BTreeMap::new(),
            managers: BTreeMap::new(),
            volumes: BTreeMap::new(),
            engines: BTreeMap::new(),
            replicas: BTreeMap::new(),
            workloads: BTreeMap::new(),
            disks: BTreeMap::new(),
            mounts: BTreeMap::new(),
            replica_files: BTreeMap::new(),
            engine_processes: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            manager_memory: BTreeMap::new(),
            restarts: BTreeMap::new(),
            source_silence: BTreeMap::new(),
            latest: Timestamp::MIN,
            faults: true,
            told: false,
            tally: Tally::default(),
            actions: 0,
            recheck: None,
            licenses: BTreeMap::new(),
            taken: BTreeSet::new(),
            unused_since: BTreeMap::new(),
            unknown_since: BTreeMap::new(),
            gone_since: BTreeMap::new(),
            left_behind: BTreeSet::new(),
        };
        let has_zones = random.random_bool(0.7);
        for n in 1..=random.random_range(2..=4) {
            world.add_node(n, has_zones, random);
        }
        world
    }

    fn add_node(&mut self, n: u32, has_zones: bool, random: &mut StdRng) {
        let name = format!("node-{n}");
        let mut specs = BTreeMap::new();
        for d in 1..=1 + n % 2 {
            let path = format!("/{name}/disk-{d}");
            specs.insert(format!("disk-{d}"), DiskSpec { path: path.clone(), ..Default::default() });
            // A small one takes a single image.
            let capacity = if random.random_bool(0.15) { 3 * GIB / 2 } else { 100 * GIB };
            self.disks.insert(format!("d{n}{d}"), Disk { capacity, ..Default::default() });
            self.mounts.insert(path, Some(format!("d{n}{d}")));
        }
        let mut node = Node::new(&name, NodeSpec { name: name.clone(), disks: specs, ..Default::default() });
        // Two in a zone.
        let zone = if has_zones { format!("zone-{}", n.div_ceil(2)) } else { String::new() };
        node.status = Some(NodeStatus { zone, ..Default::default() });
        self.nodes.insert(name.clone(), node);
        self.report_nodes();
        self.report_disks(&name);
    }

    /// Writes which nodes answer.
    pub fn report_nodes(&mut self) {
        let now = self.now;
        self.silent.retain(|_, until| *until > now);
        self.stopped.retain(|_, until| *until > now);
        for (name, node) in &mut self.nodes {
            let (status, why) = match self.silent.contains_key(name) {
                true => (ConditionStatus::Unknown, "it is cut off"),
                false => (ConditionStatus::True, ""),
            };
            let conditions = &mut node.status.get_or_insert_default().conditions;
            condition::set(conditions, Condition::new("Ready", status, "Simulated", why), now);
        }
    }

    pub fn disks(&self) -> Disks {
        Disks::of(&self.nodes.values().cloned().collect::<Vec<_>>())
    }

    pub fn answers(&self, node: &str) -> bool {
        !self.silent.contains_key(node)
    }

    /// Counts something worth counting, and prints it when the run is told.
    pub fn happens(&mut self, what: &'static str, about: impl std::fmt::Display) {
        self.tally.add(what, 1);
        if self.told {
            println!("{} {what}: {about}", self.now);
        }
    }

    /// One step: time goes on, and one thing happens.
    pub fn tick(&mut self, random: &mut StdRng) {
        let step = match random.random_range(0..1000) {
            0..=3 => Duration::from_secs(random.random_range(300..7200)),
            4..=30 => Duration::from_secs(random.random_range(10..300)),
            _ => Duration::from_millis(random.random_range(10..2000)),
        };
        self.now = planner::retry::after(self.now, step);
        self.latest = self.latest.max(self.now);
        self.report_nodes();
        match random.random_range(0..1000) {
            0..=59 => self.user(random),
            // Passes and reports are far more frequent than anything that users or faults do.
            60..=399 => (0..8).for_each(|_| self.any_pass(random)),
            400..=649 => self.any_instance(random),
            650..=809 => self.any_write(random),
            810..=959 => self.work_on_files(random),
            _ => self.fault(random),
        }
    }

    /// Forgets what a controller keeps in memory.
    pub fn crash_controller(&mut self) {
        self.manager_memory.clear();
        self.restarts.clear();
        self.source_silence.clear();
        self.happens("crashes of the controller", "");
    }
}

pub fn mark<T: kube_meta::Meta>(object: Option<&mut T>, now: Timestamp) {
    if let Some(object) = object {
        object.meta_mut().deletion_timestamp.get_or_insert(Time(now));
    }
}

/// Access to metadata without naming each kind.
pub mod kube_meta {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    pub trait Meta {
        fn meta_mut(&mut self) -> &mut ObjectMeta;
    }

    macro_rules! meta {
        ($($kind:ty),*) => { $(impl Meta for $kind { fn meta_mut(&mut self) -> &mut ObjectMeta { &mut self.metadata } })* };
    }
    meta!(
        api::BackingImage,
        api::BackingImageDataSource,
        api::BackingImageManager,
        api::Volume,
        api::Engine,
        api::Replica
    );
}

/// As a store does: an object with finalizers is marked, one without goes.
pub fn delete<T: kube_meta::Meta>(objects: &mut BTreeMap<String, T>, name: &str, now: Timestamp) {
    let Some(object) = objects.get_mut(name) else { return };
    if object.meta_mut().finalizers.iter().flatten().next().is_some() {
        object.meta_mut().deletion_timestamp.get_or_insert(Time(now));
    } else {
        objects.remove(name);
    }
}

/// As a store does: an object that is being deleted goes with its last finalizer.
pub fn remove_finalizer<T: kube_meta::Meta>(objects: &mut BTreeMap<String, T>, name: &str) {
    let Some(object) = objects.get_mut(name) else { return };
    object.meta_mut().finalizers = None;
    if object.meta_mut().deletion_timestamp.is_some() {
        objects.remove(name);
    }
}
