//! The objects, what is really there, and the dice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::image::{BackingImageSpec, SourceType};
use api::node::{DiskSpec, DiskStatus, NodeSpec, NodeStatus};
use api::quantity::SizeBytes;
use api::volume::{Robustness, VolumeSpec, VolumeState};
use api::{
    BackingImage, BackingImageDataSource, BackingImageManager, Condition, ConditionStatus, Engine, Node, Replica,
    Volume, condition,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use planner::disk::Disks;
use planner::retry::Retry;
use planner::workload::Workload;
use rand::Rng;
use rand::rngs::StdRng;

use crate::Summary;
use crate::data::{EngineProcess, ReplicaFiles};
use crate::files::Disk;

pub const IMAGES: [&str; 2] = ["alpine", "ubuntu"];
pub const VOLUMES: [&str; 3] = ["va", "vb", "vc"];
pub const GIB: u64 = 1 << 30;

/// Objects, reality, and the controller's memory.
pub struct World {
    pub now: Timestamp,
    pub nodes: BTreeMap<String, Node>,
    /// Until when a node does not answer.
    pub silent: BTreeMap<String, Timestamp>,
    pub images: BTreeMap<String, BackingImage>,
    pub sources: BTreeMap<String, BackingImageDataSource>,
    pub managers: BTreeMap<String, BackingImageManager>,
    pub volumes: BTreeMap<String, Volume>,
    pub engines: BTreeMap<String, Engine>,
    pub replicas: BTreeMap<String, Replica>,
    pub workloads: BTreeMap<String, Workload>,
    pub disks: BTreeMap<String, Disk>,
    pub replica_files: BTreeMap<String, ReplicaFiles>,
    pub engine_processes: BTreeMap<String, EngineProcess>,
    /// Acknowledged writes of each volume.
    pub acknowledged: BTreeMap<String, u64>,
    pub manager_memory: BTreeMap<String, planner::manager::Memory>,
    pub restarts: BTreeMap<String, Retry>,
    pub faults: bool,
    pub summary: Summary,
}

impl World {
    /// Nodes with one or two disks each, nothing else.
    pub fn new(nodes: u32) -> World {
        let mut world = World {
            now: "2026-01-01T00:00:00Z".parse().expect("a time"),
            nodes: BTreeMap::new(),
            silent: BTreeMap::new(),
            images: BTreeMap::new(),
            sources: BTreeMap::new(),
            managers: BTreeMap::new(),
            volumes: BTreeMap::new(),
            engines: BTreeMap::new(),
            replicas: BTreeMap::new(),
            workloads: BTreeMap::new(),
            disks: BTreeMap::new(),
            replica_files: BTreeMap::new(),
            engine_processes: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            manager_memory: BTreeMap::new(),
            restarts: BTreeMap::new(),
            faults: true,
            summary: Summary::default(),
        };
        for n in 1..=nodes {
            world.add_node(n);
        }
        world
    }

    fn add_node(&mut self, n: u32) {
        let name = format!("node-{n}");
        let (mut specs, mut statuses) = (BTreeMap::new(), BTreeMap::new());
        for d in 1..=1 + n % 2 {
            let (disk, id) = (format!("disk-{d}"), format!("d{n}{d}"));
            specs.insert(disk.clone(), DiskSpec { path: format!("/{id}"), ..Default::default() });
            let status = DiskStatus {
                disk_uuid: id.clone(),
                storage_available: 100 * GIB,
                storage_maximum: 100 * GIB,
                ..Default::default()
            };
            statuses.insert(disk, status);
            self.disks.insert(id, Disk::default());
        }
        let mut node = Node::new(&name, NodeSpec { name: name.clone(), disks: specs, ..Default::default() });
        node.status = Some(NodeStatus { disk_status: statuses, ..Default::default() });
        self.nodes.insert(name, node);
        self.report_nodes();
    }

    /// Writes which nodes answer.
    pub fn report_nodes(&mut self) {
        let now = self.now;
        self.silent.retain(|_, until| *until > now);
        for (name, node) in &mut self.nodes {
            let status = if self.silent.contains_key(name) { ConditionStatus::Unknown } else { ConditionStatus::True };
            let conditions = &mut node.status.get_or_insert_default().conditions;
            condition::set(conditions, Condition::new("Ready", status, "Simulated", ""), now);
        }
    }

    pub fn disks(&self) -> Disks {
        Disks::of(&self.nodes.values().cloned().collect::<Vec<_>>())
    }

    pub fn answers(&self, node: &str) -> bool {
        !self.silent.contains_key(node)
    }

    pub fn node_of_disk(&self, disk: &str) -> String {
        self.disks().get(disk).map(|d| d.node.clone()).unwrap_or_default()
    }

    /// One step: time goes on, and one thing happens.
    pub fn tick(&mut self, random: &mut StdRng) {
        let step = Duration::from_millis(random.random_range(10..2000));
        self.now = planner::retry::after(self.now, step);
        self.report_nodes();
        match random.random_range(0..100) {
            0..=2 => self.user(random),
            // Passes and reports are far more frequent than anything that users or faults do.
            3..=39 => (0..8).for_each(|_| self.any_pass(random)),
            40..=64 => self.any_instance(random),
            65..=82 => self.any_write(random),
            83..=96 => self.work_on_files(random),
            _ => self.fault(random),
        }
    }

    fn user(&mut self, random: &mut StdRng) {
        let image = IMAGES[random.random_range(0..IMAGES.len())];
        let volume = VOLUMES[random.random_range(0..VOLUMES.len())];
        match random.random_range(0..10) {
            0..=1 => self.create_image(image, random.random_range(1..=3)),
            2 if random.random_bool(0.3) => mark(self.images.get_mut(image), self.now),
            3..=4 => self.create_volume(volume, image, random.random_range(1..=3)),
            5 if random.random_bool(0.2) => mark(self.volumes.get_mut(volume), self.now),
            6..=8 => {
                let nodes: Vec<String> = self.nodes.keys().cloned().collect();
                if let Some(volume) = self.volumes.get_mut(volume) {
                    volume.spec.node_id = nodes[random.random_range(0..nodes.len())].clone();
                }
            }
            9 => {
                if let Some(volume) = self.volumes.get_mut(volume) {
                    volume.spec.node_id.clear();
                }
            }
            _ => {}
        }
    }

    fn create_image(&mut self, name: &str, copies: u32) {
        let spec = BackingImageSpec {
            source_type: Some(SourceType::Download),
            source_parameters: [("url".to_owned(), "http://images.test/x".to_owned())].into(),
            min_number_of_copies: copies,
            ..Default::default()
        };
        self.images.entry(name.into()).or_insert_with(|| BackingImage::new(name, spec));
    }

    fn create_volume(&mut self, name: &str, image: &str, replicas: u32) {
        let spec = VolumeSpec {
            size: SizeBytes(GIB),
            backing_image: image.into(),
            number_of_replicas: replicas,
            ..Default::default()
        };
        self.volumes.entry(name.into()).or_insert_with(|| Volume::new(name, spec));
    }

    fn fault(&mut self, random: &mut StdRng) {
        match random.random_range(0..4) {
            0 => {
                let nodes: Vec<String> = self.nodes.keys().cloned().collect();
                let node = nodes[random.random_range(0..nodes.len())].clone();
                self.summary.silences += 1;
                self.silent
                    .insert(node, planner::retry::after(self.now, Duration::from_secs(random.random_range(1..90))));
            }
            1 => self.kill_workload(random),
            2 => self.kill_replica(random),
            _ => self.crash_engine(random),
        }
    }

    /// Forgets what a controller keeps in memory.
    pub fn crash_controller(&mut self) {
        self.manager_memory.clear();
        self.restarts.clear();
        self.summary.crashes += 1;
    }

    /// Everything answers from here on, and what was wished must come true.
    pub fn settle(&mut self, random: &mut StdRng, rounds: u32) {
        self.faults = false;
        self.silent.clear();
        // A user who wants an image that is being deleted would wait for ever, and rightly so.
        let missing: BTreeSet<String> = self.volumes.values().map(|v| v.spec.backing_image.clone()).collect();
        // A report that comes late in one round is acted on in the next.
        let mut quiet_rounds = 0;
        for _ in 0..rounds {
            // Long steps: some back-offs and intervals are minutes.
            self.now = planner::retry::after(self.now, Duration::from_secs(5));
            self.report_nodes();
            for image in &missing {
                self.create_image(image, 1);
            }
            let before = self.summary.actions;
            self.round(random);
            let is_quiet = self.summary.actions == before && self.unmet().is_none();
            quiet_rounds = if is_quiet { quiet_rounds + 1 } else { 0 };
            if quiet_rounds == 2 {
                break;
            }
        }
        if let Some(wish) = self.unmet() {
            panic!("does not settle: {wish}");
        }
        for _ in 0..5 {
            self.now = planner::retry::after(self.now, Duration::from_secs(1));
            let before = self.summary.actions;
            self.round(random);
            assert_eq!(before, self.summary.actions, "a settled world plans further actions");
        }
    }

    /// The first wish that is not fulfilled.
    fn unmet(&self) -> Option<String> {
        for (name, image) in &self.images {
            let status = image.status.clone().unwrap_or_default();
            let ready = planner::image::ready_disks(&status).count();
            let wanted = (image.spec.min_number_of_copies as usize).min(self.disks.len());
            let in_use = self.volumes.values().any(|v| v.spec.backing_image == *name);
            let deleting = image.metadata.deletion_timestamp.is_some();
            if deleting && !in_use || !deleting && ready < wanted {
                return Some(format!(
                    "image {name}: {ready} of {wanted} copies, deleting {deleting}, {:?}",
                    status.conditions
                ));
            }
        }
        for (name, volume) in &self.volumes {
            let status = volume.status.clone().unwrap_or_default();
            let wish = &volume.spec.node_id;
            let is_met = match (wish.is_empty(), status.state) {
                _ if volume.metadata.deletion_timestamp.is_some() => false,
                (_, _) if status.robustness == Robustness::Faulted => true,
                (true, state) => state == VolumeState::Detached,
                (false, state) => state == VolumeState::Attached && status.current_node_id == *wish,
            };
            if !is_met {
                return Some(format!("volume {name}: wished `{wish}`, {:?}: {:?}", status.state, status.conditions));
            }
        }
        let no_images = self.images.is_empty();
        (no_images && !self.managers.is_empty()).then(|| "a manager is left without images".into())
    }
}

fn mark<T: kube_meta::Meta>(object: Option<&mut T>, now: Timestamp) {
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
