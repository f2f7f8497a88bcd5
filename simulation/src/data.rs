//! Replicas and engines: instance roles of all nodes, and the writes of users.

use std::collections::BTreeSet;

use api::engine::{DesireState, EngineStatus, InstanceState, ReplicaMode};
use api::image::CopyState;
use api::replica::ReplicaStatus;
use rand::Rng;
use rand::rngs::StdRng;

use crate::any;
use crate::world::{World, remove_finalizer};

/// A replica as it lies on its disk.
#[derive(Clone, Debug, Default)]
pub struct ReplicaFiles {
    pub node: String,
    pub generation: u64,
    pub members: BTreeSet<String>,
    pub clean: bool,
    /// How many of the volume's writes it holds.
    pub writes: u64,
    pub is_up: bool,
    /// Its process ended unasked; it stays so until it is not wanted any more.
    pub has_ended: bool,
}

/// An engine process.
#[derive(Clone, Debug, Default)]
pub struct EngineProcess {
    pub node: String,
    pub generation: u64,
    pub members: BTreeSet<String>,
    pub dropped: BTreeSet<String>,
    pub is_alive: bool,
}

impl World {
    pub fn any_instance(&mut self, random: &mut StdRng) {
        let nodes: Vec<String> = self.nodes.keys().cloned().collect();
        let node = nodes[random.random_range(0..nodes.len())].clone();
        self.instance(&node, random);
    }

    /// One pass of a node's instance role.
    pub fn instance(&mut self, node: &str, random: &mut StdRng) {
        if !self.answers(node) {
            return;
        }
        let engines: Vec<String> =
            self.engines.iter().filter(|(_, e)| e.spec.node_id == node).map(|(n, _)| n.clone()).collect();
        for name in engines {
            self.instance_engine(&name, random);
        }
        let replicas: Vec<String> =
            self.replicas.iter().filter(|(_, r)| r.spec.node_id == node).map(|(n, _)| n.clone()).collect();
        for name in replicas {
            self.instance_replica(&name);
        }
        self.report_disks(node);
    }

    /// As `instance/src/replicas.rs` and `replica_decision.rs` do.
    fn instance_replica(&mut self, name: &str) {
        let replica = self.replicas[name].clone();
        let spec = &replica.spec;
        let is_there = self.is_mounted(&spec.disk_id, &spec.disk_path);
        if replica.metadata.deletion_timestamp.is_some() {
            // Its data lies on a disk that is away: until that is back, taken off the node, or replaced there.
            let is_replaced = self.known_at(&spec.disk_path).is_some_and(|id| id != spec.disk_id);
            if is_there || is_replaced || !self.wished_paths().contains(&spec.disk_path) {
                if is_there && let Some(disk) = self.disks.get_mut(&spec.disk_id) {
                    disk.over.remove(name);
                }
                self.replica_files.remove(name);
                remove_finalizer(&mut self.replicas, name);
            }
            return;
        }
        let copy = self.images.get(&spec.backing_image).and_then(|i| i.status.clone()).unwrap_or_default();
        let is_told = copy.disk_file_status_map.get(&spec.disk_id).is_some_and(|f| f.state == CopyState::Ready);
        let key = (spec.backing_image.clone(), copy.uuid.clone());
        let has_copy = self.disks.get(&spec.disk_id).is_some_and(|d| d.files.contains_key(&key));
        let files = self.replica_files.entry(name.to_owned()).or_insert_with(|| ReplicaFiles {
            node: spec.node_id.clone(),
            clean: true,
            ..Default::default()
        });
        let is_wished = spec.desire_state == DesireState::Running;
        files.has_ended &= is_wished;
        if is_wished && !files.has_ended && !files.is_up && is_told && is_there {
            // Without the file that it was told of its process ends.
            (files.is_up, files.has_ended) = (has_copy, !has_copy);
            if has_copy && let Some(disk) = self.disks.get_mut(&spec.disk_id) {
                disk.over.insert(name.to_owned(), key);
            }
        }
        files.is_up &= is_wished;
        if is_wished && !is_there && !files.is_up {
            files.has_ended = true;
        }
        let state = match (replica.spec.desire_state, files.is_up) {
            (DesireState::Running, _) if files.has_ended => InstanceState::Error,
            (DesireState::Running, true) => InstanceState::Running,
            (DesireState::Running, false) => InstanceState::Starting,
            (DesireState::Stopped, _) => InstanceState::Stopped,
        };
        let status = ReplicaStatus {
            current_state: state,
            ip: "ip".into(),
            port: 1,
            generation: files.generation,
            generation_members: files.members.iter().cloned().collect(),
            clean: files.clean,
            ..Default::default()
        };
        self.replicas.get_mut(name).expect("it is there").status = Some(status);
    }

    fn instance_engine(&mut self, name: &str, random: &mut StdRng) {
        let engine = self.engines[name].clone();
        let volume = engine.spec.volume_name.clone();
        let wants = engine.spec.desire_state == DesireState::Running && engine.metadata.deletion_timestamp.is_none();
        let state = engine.status.as_ref().map_or(InstanceState::NotStarted, |s| s.current_state);
        let process = self.engine_processes.get(&volume).cloned();
        match (wants, process) {
            (true, Some(old)) if old.node != engine.spec.node_id => {
                assert!(
                    !old.is_alive,
                    "invariant 4: volume {volume} is started on {} and still runs on {}",
                    engine.spec.node_id, old.node
                );
                self.engine_processes.remove(&volume);
                self.start_engine(name, random);
            }
            (true, None) if matches!(state, InstanceState::NotStarted | InstanceState::Stopped) => {
                self.start_engine(name, random)
            }
            (true, _) => {}
            (false, Some(process)) => {
                if process.is_alive {
                    self.drop_unreachable(&volume, random);
                    // Invariant 4 needs the end to be real before it is said.
                    self.close_engine(&volume);
                }
                self.report_engine(&volume);
                self.engine_processes.remove(&volume);
                self.set_engine_state(name, InstanceState::Stopped);
            }
            (false, None) => self.set_engine_state(name, InstanceState::Stopped),
        }
        self.report_engine(&volume);
        if engine.metadata.deletion_timestamp.is_some() {
            self.engine_processes.remove(&volume);
            remove_finalizer(&mut self.engines, name);
        }
    }

    fn set_engine_state(&mut self, name: &str, state: InstanceState) {
        let status = self.engines.get_mut(name).expect("it is there").status.get_or_insert_default();
        status.current_state = state;
        status.endpoint.clear();
    }

    fn start_engine(&mut self, name: &str, random: &mut StdRng) {
        let engine = self.engines[name].clone();
        let (volume, node) = (engine.spec.volume_name.clone(), engine.spec.node_id.clone());
        let members: BTreeSet<String> = engine.spec.replica_address_map.keys().cloned().collect();
        let mut process = EngineProcess { node, members: members.clone(), is_alive: true, ..Default::default() };
        let is_reachable = |n: &String| self.replica_files.get(n).is_some_and(|f| f.is_up && self.answers(&f.node));
        if members.is_empty() || !members.iter().all(is_reachable) {
            process.is_alive = false;
            process.generation = engine.spec.generation;
            self.engine_processes.insert(volume, process);
            return;
        }
        // Invariant 5: who is to serve holds every acknowledged write.
        let acknowledged = self.acknowledged.get(&volume).copied().unwrap_or(0);
        for member in &members {
            let writes = self.replica_files[member].writes;
            assert!(
                writes >= acknowledged,
                "invariant 5: replica {member} holds {writes} of {acknowledged} acknowledged writes and is to serve"
            );
        }
        let highest = members.iter().map(|m| self.replica_files[m].generation).max().unwrap_or(0);
        process.generation = 1 + highest.max(engine.spec.generation);
        for member in &members {
            if self.faults && random.random_bool(0.03) {
                // Half done.
                process.is_alive = false;
                break;
            }
            let files = self.replica_files.get_mut(member).expect("it is there");
            (files.generation, files.members, files.clean) = (process.generation, members.clone(), false);
        }
        if process.is_alive {
            self.happens("attachments", name);
        }
        self.engine_processes.insert(volume, process);
    }

    fn close_engine(&mut self, volume: &str) {
        let process = self.engine_processes[volume].clone();
        for member in &process.members {
            let files = self.replica_files.get_mut(member).expect("it is there");
            files.clean = files.generation == process.generation;
        }
    }

    /// What the instance role says of an engine; its node must answer.
    pub fn report_engine(&mut self, volume: &str) {
        let Some(process) = self.engine_processes.get(volume) else { return };
        if !self.answers(&process.node) {
            return;
        }
        let Some(engine) = self.engines.get_mut(&api::names::engine_name(volume)) else { return };
        let modes = process.members.iter().map(|m| (m.clone(), ReplicaMode::Rw));
        let modes = modes.chain(process.dropped.iter().map(|m| (m.clone(), ReplicaMode::Err)));
        engine.status = Some(EngineStatus {
            current_state: if process.is_alive { InstanceState::Running } else { InstanceState::Error },
            endpoint: if process.is_alive { "/dev/loop0".into() } else { String::new() },
            generation: process.generation,
            replica_mode_map: modes.collect(),
            ..Default::default()
        });
    }

    pub fn any_write(&mut self, random: &mut StdRng) {
        let volumes: Vec<String> =
            self.engine_processes.iter().filter(|(_, p)| p.is_alive).map(|(v, _)| v.clone()).collect();
        if volumes.is_empty() {
            return;
        }
        let volume = volumes[random.random_range(0..volumes.len())].clone();
        self.drop_unreachable(&volume, random);
        let process = &self.engine_processes[&volume];
        if !process.is_alive || process.members.is_empty() {
            return;
        }
        let number = 1 + self.acknowledged.get(&volume).copied().unwrap_or(0);
        for member in &process.members {
            self.replica_files.get_mut(member).expect("it is there").writes = number;
        }
        self.acknowledged.insert(volume, number);
        self.tally.add("acknowledged writes", 1);
    }

    /// Fence: the remaining replicas record the next generation before anything goes on.
    fn drop_unreachable(&mut self, volume: &str, random: &mut StdRng) {
        let mut process = self.engine_processes[volume].clone();
        let is_away = |n: &&String| {
            !self.replica_files.get(*n).is_some_and(|f| f.is_up && (self.answers(&f.node) || f.node == process.node))
                || (!self.answers(&process.node) && self.replica_files[*n].node != process.node)
        };
        let away: BTreeSet<String> = process.members.iter().filter(is_away).cloned().collect();
        if away.is_empty() || !process.is_alive {
            return;
        }
        self.happens("fences", volume);
        process.members.retain(|m| !away.contains(m));
        process.dropped.extend(away);
        process.generation += 1;
        for member in &process.members {
            if self.faults && random.random_bool(0.05) {
                // Dies half way; nothing was acknowledged under the new generation.
                process.is_alive = false;
                break;
            }
            let files = self.replica_files.get_mut(member).expect("it is there");
            (files.generation, files.members) = (process.generation, process.members.clone());
        }
        if !process.is_alive {
            // What it decided last is known to nobody but the replicas that have recorded it.
            process.generation -= 1;
            process.members.extend(std::mem::take(&mut process.dropped));
            process.dropped.clear();
        }
        self.engine_processes.insert(volume.to_owned(), process);
        self.report_engine(volume);
    }

    pub fn kill_replica(&mut self, random: &mut StdRng) {
        let names: Vec<String> = self.replica_files.keys().cloned().collect();
        any(&names, random).into_iter().for_each(|name| self.end_replica(name, random));
    }

    /// The replicas on a disk lose it.
    pub fn end_replicas_on(&mut self, id: &str, random: &mut StdRng) {
        let names: Vec<String> =
            self.replicas.iter().filter(|(_, r)| r.spec.disk_id == id).map(|(n, _)| n.clone()).collect();
        names
            .iter()
            .filter(|n| self.replica_files.contains_key(*n))
            .cloned()
            .collect::<Vec<_>>()
            .iter()
            .for_each(|n| self.end_replica(n, random));
    }

    fn end_replica(&mut self, name: &str, random: &mut StdRng) {
        let name = name.to_owned();
        let users: Vec<String> =
            self.engine_processes.iter().filter(|(_, p)| p.members.contains(&name)).map(|(v, _)| v.clone()).collect();
        let files = self.replica_files.get_mut(&name).expect("it is there");
        files.has_ended = files.is_up;
        files.is_up = false;
        for volume in users {
            // Its export is gone at once, however soon it is started again.
            self.drop_unreachable(&volume, random);
        }
    }

    pub fn crash_engine(&mut self, random: &mut StdRng) {
        let volumes: Vec<String> = self.engine_processes.keys().cloned().collect();
        if volumes.is_empty() {
            return;
        }
        let process =
            self.engine_processes.get_mut(&volumes[random.random_range(0..volumes.len())]).expect("it is there");
        process.is_alive = false;
    }
}
