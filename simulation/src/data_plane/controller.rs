//! The volume reconciler: its real decisions on what the store says, with an end of the controller possible after every action.

use std::collections::BTreeMap;

use api::engine::EngineSpec;
use api::names::{FINALIZER, engine_name};
use api::quantity::SizeBytes;
use api::replica::ReplicaSpec;
use api::volume::VolumeSpec;
use api::{Engine, Replica, Volume};
use jiff::Timestamp;
use planner::disk::{Disks, Health};
use planner::retry::{self, Retry};
use planner::setting::Settings;
use planner::volume::{Action, Observed, decide};

use super::{BLOCK, BLOCKS, Happening, MILLI, SECOND, World, micros};

/// After this long without a report a node counts as silent.
const NODE_GRACE: u64 = 5 * SECOND;

/// The store, as far as this volume is concerned, and what the controller keeps in memory.
pub struct Controller {
    pub volume: Volume,
    pub engine: Engine,
    pub replicas: Vec<Replica>,
    pub disks: Disks,
    silent_since: BTreeMap<String, Timestamp>,
    settings: Settings,
    restart: Retry,
    pub down_until: u64,
    /// The highest generation that stood in the store when it looked last.
    pub heard: u64,
    pass_at: Option<u64>,
    begin: Timestamp,
}

impl Controller {
    pub fn new(replicas: usize, nodes: usize) -> Controller {
        let size = SizeBytes(BLOCKS as u64 * BLOCK);
        let spec = VolumeSpec { size, number_of_replicas: replicas as u32, ..Default::default() };
        let mut volume = Volume::new("v", spec);
        volume.metadata.finalizers = Some(vec![FINALIZER.into()]);
        let engine = EngineSpec { volume_name: "v".into(), volume_size: size, ..Default::default() };
        let replica = |n: usize| {
            let spec = ReplicaSpec {
                volume_name: "v".into(),
                volume_size: size,
                node_id: format!("n{n}"),
                disk_id: format!("d{n}"),
                ..Default::default()
            };
            Replica::new(&format!("r{n}"), spec)
        };
        let ready = (0..nodes).map(|n| (format!("n{n}"), Health::Ready)).collect();
        Controller {
            volume,
            engine: Engine::new(&engine_name("v"), engine),
            replicas: (0..replicas).map(replica).collect(),
            disks: Disks { nodes: ready, ..Disks::default() },
            silent_since: BTreeMap::new(),
            settings: Settings::default(),
            restart: Retry::default(),
            down_until: 0,
            heard: 0,
            pass_at: None,
            begin: "2026-01-01T00:00:00Z".parse().expect("a time"),
        }
    }
}

impl World {
    pub(super) fn wake_controller(&mut self) {
        let wait = self.dice.upto(10 * MILLI);
        self.wake_controller_at(self.now + wait);
    }

    fn wake_controller_at(&mut self, at: u64) {
        let at = at.max(self.controller.down_until + 1);
        if self.controller.pass_at.is_none_or(|planned| planned > at) {
            self.controller.pass_at = Some(at);
            self.at(at, Happening::ControllerPass);
        }
    }

    fn timestamp(&self, at: u64) -> Timestamp {
        retry::after(self.controller.begin, micros(at))
    }

    pub(super) fn controller_pass(&mut self) {
        if self.controller.pass_at != Some(self.now) {
            return;
        }
        self.controller.pass_at = None;
        if self.controller.down_until > self.now {
            return self.wake_controller_at(self.controller.down_until + 1);
        }
        self.controller.heard = self.heard();
        let decision = decide(&Observed {
            now: self.timestamp(self.now),
            random: 7,
            volume: self.controller.volume.clone(),
            engine: Some(self.controller.engine.clone()),
            replicas: self.controller.replicas.clone(),
            image: None,
            disks: self.controller.disks.clone(),
            silent_since: self.controller.silent_since.clone(),
            loads: BTreeMap::new(),
            settings: self.controller.settings.clone(),
            restart: self.controller.restart.clone(),
        });
        self.controller.restart = decision.restart;
        if self.controller.volume.status.as_ref() != Some(&decision.status) {
            self.controller.volume.status = Some(decision.status);
            self.wake_user();
        }
        for action in decision.actions {
            match action {
                Action::SetReplicaSpec { name, spec } => {
                    let of_it = |r: &Replica| r.metadata.name.as_deref() == Some(name.as_str());
                    let place = self.controller.replicas.iter().position(of_it).expect("it is there");
                    self.controller.replicas[place].spec = *spec;
                    self.wake_instance(place);
                }
                Action::SetEngineSpec(spec) => {
                    assert!(spec.generation >= self.controller.engine.spec.generation, "a generation was forgotten");
                    self.controller.engine.spec = *spec;
                    (0..self.nodes.len()).for_each(|node| self.wake_instance(node));
                }
                other => panic!("nothing of this kind is to be done: {other:?}"),
            }
            self.wake_controller();
            if self.faults && self.dice.permille(15) {
                // It dies here; what it kept in memory is gone, and the next one looks at everything.
                self.controller.restart = Retry::default();
                self.controller.down_until = self.now + self.dice.upto(2 * SECOND);
                self.tally.add("controllers that died", 1);
                return self.wake_controller();
            }
        }
        if let Some(wait) = decision.recheck_after {
            let at = self.now + wait.as_micros() as u64 + 1;
            self.wake_controller_at(at);
        }
    }

    /// What the control plane says of a node.
    pub(super) fn node_report(&mut self, node: usize) {
        let Some(target) = self.nodes.get(node) else { return };
        let name = target.name.clone();
        if target.removed {
            self.controller.disks.nodes.remove(&name);
            self.controller.silent_since.remove(&name);
            return self.wake_controller();
        }
        let is_silent = !target.up || target.silent_until > self.now;
        let was_silent = self.controller.silent_since.contains_key(&name);
        let known = self.controller.disks.nodes.contains_key(&name);
        if is_silent == was_silent && known {
            return;
        }
        if is_silent {
            let since = self.timestamp(self.now);
            self.controller.silent_since.insert(name.clone(), since);
            self.controller.disks.nodes.insert(name.clone(), Health::Unknown(format!("node {name} does not answer")));
        } else {
            self.controller.silent_since.remove(&name);
            self.controller.disks.nodes.insert(name, Health::Ready);
            self.wake_instance(node);
        }
        self.wake_controller();
    }

    /// Silence is noticed after a while; the end of it soon.
    pub(super) fn plan_reports(&mut self, node: usize, until: u64) {
        self.after(NODE_GRACE, Happening::NodeReport { node });
        let wait = self.dice.upto(SECOND);
        self.at(until + wait, Happening::NodeReport { node });
    }
}
