//! A volume: its replicas placed, attached, detached, deleted; what it waits for.
//!
//! Writes the volume's status, its Engine and its Replicas. Data rules come first: only current replicas are attached, one
//! that is left out is marked as failed before the engine may start, and nothing is attached elsewhere while an engine may still write.

mod attach;
pub mod growth;
mod place;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::engine::{DesireState, EngineSpec, InstanceState};
use api::names::FINALIZER;
use api::names::condition::{DETACHED, READY};
use api::replica::ReplicaSpec;
use api::volume::VolumeStatus;
use api::{BackingImage, Condition, ConditionStatus, Engine, Replica, Volume};
use jiff::Timestamp;

use crate::disk::{Disks, Health, Load};
use crate::retry::{Retry, sooner};
use crate::setting::Settings;

/// How long a silent node is waited for before an attachment goes on without its replicas.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// What the user can do about an engine on a silent node.
const SILENT_ENGINE_HINT: &str = "bring the node back; when it is certain that it is off, give its Kubernetes node the taint node.kubernetes.io/out-of-service, or delete its Node object";

/// One reading.
#[derive(Clone, Debug)]
pub struct Observed {
    pub now: Timestamp,
    pub random: u64,
    pub volume: Volume,
    pub engine: Option<Engine>,
    /// The replicas of this volume.
    pub replicas: Vec<Replica>,
    /// `None`: it has none, or there is no image of that name.
    pub image: Option<BackingImage>,
    pub disks: Disks,
    /// Since when a node is not ready, by its condition.
    pub silent_since: BTreeMap<String, Timestamp>,
    pub loads: BTreeMap<String, Load>,
    pub settings: Settings,
    /// Ends of the engine that nobody wished for; kept by the controller.
    pub restart: Retry,
}

/// One step; each can be repeated.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    AddFinalizer,
    CreateEngine(Box<Engine>),
    CreateReplica(Box<Replica>),
    SetReplicaSpec {
        name: String,
        spec: Box<ReplicaSpec>,
    },
    SetEngineSpec(Box<EngineSpec>),
    DeleteEngine,
    DeleteReplica(String),
    /// Nobody is left who could say that its files are gone: its node is no more, or it never had one.
    ForgetEngine,
    ForgetReplica(String),
    RemoveFinalizer,
}

/// What to do now, what to report, what to remember.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub actions: Vec<Action>,
    pub status: VolumeStatus,
    pub restart: Retry,
    pub recheck_after: Option<Duration>,
}

impl Decision {
    /// Whether everything is as it shall be.
    pub fn is_nothing(&self, observed: &Observed) -> bool {
        let is_told = observed.volume.status.as_ref() == Some(&self.status);
        self.actions.is_empty() && is_told && self.restart == observed.restart
    }
}

/// The pass as it goes: wishes are collected here and become actions where they differ from what is stored.
struct Pass<'a> {
    o: &'a Observed,
    replicas: BTreeMap<String, ReplicaSpec>,
    engine: Option<EngineSpec>,
    created: Vec<Action>,
    restart: Retry,
    recheck_after: Option<Duration>,
    /// The first thing that this volume waits for; reported as its condition `Ready`.
    waits: Option<Condition>,
    /// Why it is not fully placed.
    unplaced: Option<String>,
    /// Why a detachment waits.
    undetached: Option<String>,
    incompatible: Option<Condition>,
}

/// How it is known that an engine does not count any more.
enum Ended {
    /// It was seen to be gone.
    Surely,
    /// A user declared that its node is off. The process may live all the same, until it meets the next attachment at its replicas.
    Declared,
}

/// Decides about one volume.
pub fn decide(observed: &Observed) -> Decision {
    let o = observed;
    let mut pass = Pass {
        o,
        replicas: o.replicas.iter().map(|r| (name_of_replica(r).to_owned(), r.spec.clone())).collect(),
        engine: o.engine.as_ref().map(|e| e.spec.clone()),
        created: vec![],
        restart: o.restart.clone(),
        recheck_after: None,
        waits: None,
        unplaced: None,
        undetached: None,
        incompatible: None,
    };
    if o.volume.metadata.deletion_timestamp.is_some() {
        return pass.delete();
    }
    if !o.volume.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
        pass.created.push(Action::AddFinalizer);
    }
    pass.check_image();
    pass.place();
    pass.record_generation();
    if let Some(engine) = &mut pass.engine {
        engine.upgrade_requested_at = o.volume.spec.engine_upgrade_requested_at.clone();
    }
    if o.volume.spec.node_id.is_empty() {
        pass.detach();
    } else if pass.incompatible.is_none() {
        pass.attach();
    }
    pass.finish()
}

impl Pass<'_> {
    fn wait(&mut self, reason: &str, message: impl Into<String>) {
        self.wait_for(Condition::new(READY, ConditionStatus::False, reason, message));
    }

    fn wait_for(&mut self, condition: Condition) {
        self.waits.get_or_insert(condition);
    }

    fn recheck(&mut self, after: Option<Duration>) {
        self.recheck_after = sooner(self.recheck_after, after);
    }

    fn engine_state(&self) -> InstanceState {
        self.o.engine.as_ref().and_then(|e| e.status.as_ref()).map_or(InstanceState::NotStarted, |s| s.current_state)
    }

    /// Whether a user declared that nothing of this node writes any more: by the taint, or by taking its Node object away.
    fn is_declared_off(&self, node: &str) -> bool {
        self.o.disks.out_of_service.contains(node) || !self.o.disks.nodes.contains_key(node)
    }

    /// Why the engine process counts as gone; otherwise who or what keeps it.
    fn engine_ended(&self) -> Result<Ended, String> {
        let Some(engine) = &self.o.engine else { return Ok(Ended::Surely) };
        let node = &engine.spec.node_id;
        if node.is_empty() {
            return Ok(Ended::Surely);
        }
        // Stopped, or never looked at and hence never started.
        let is_over = matches!(self.engine_state(), InstanceState::NotStarted | InstanceState::Stopped);
        if self.is_declared_off(node) {
            return Ok(if is_over { Ended::Surely } else { Ended::Declared });
        }
        match self.o.disks.nodes.get(node) {
            Some(Health::Ready) if engine.spec.desire_state == DesireState::Running => {
                return Err(format!("the engine on node {node} is being stopped"));
            }
            Some(Health::Ready) | None => {}
            Some(Health::NotReady(why) | Health::Unknown(why)) => {
                if is_over && engine.spec.desire_state == DesireState::Stopped {
                    return Ok(Ended::Surely);
                }
                let since = self.silence_of(node);
                return Err(format!(
                    "{why}{since}; the engine there may still write, so it is waited for until the node returns, is declared out of service, or its Node object is deleted"
                ));
            }
        }
        if is_over {
            return Ok(Ended::Surely);
        }
        let state = self.engine_state();
        // Who uses its device says more than how it ended.
        let said = engine.status.iter().flat_map(|s| &s.conditions);
        let said = said.filter(|c| !c.message.is_empty() && !c.is_true()).max_by_key(|c| c.r#type == DETACHED);
        let said = said.map(|c| format!(": {}", c.message)).unwrap_or_default();
        Err(format!("the engine on node {node} is {}{said}", format!("{state:?}").to_lowercase()))
    }

    /// ` since TIME`, when a node is silent.
    fn silence_of(&self, node: &str) -> String {
        self.o.silent_since.get(node).map(|since| format!(" since {since}")).unwrap_or_default()
    }

    /// What the user can do about an engine that is waited for.
    fn engine_hint(&self) -> &'static str {
        let node = self.o.engine.as_ref().map_or("", |e| &e.spec.node_id);
        match self.o.disks.nodes.get(node) {
            Some(Health::NotReady(_) | Health::Unknown(_)) => SILENT_ENGINE_HINT,
            _ => "end what uses the device",
        }
    }

    /// Rule 4 of the generations: what the engine or a replica reached is never forgotten, also when that one failed; unless a
    /// user says so, who sets `failedAt` without a reason to salvage what others hold.
    fn record_generation(&mut self) {
        let counts = |r: &&Replica| r.spec.failed_at.is_empty() || !r.spec.failed_reason.is_empty();
        let recorded = self.o.replicas.iter().filter(counts).filter_map(|r| r.status.as_ref()).map(|s| s.generation);
        let reached = self.o.engine.as_ref().and_then(|e| e.status.as_ref()).map(|s| s.generation);
        if let Some(engine) = &mut self.engine {
            engine.generation = recorded.chain(reached).fold(engine.generation, u64::max);
        }
    }

    /// Takes what the engine says of its replicas: one that it dropped has failed. One whose node was declared to be off is heard no
    /// more: what it drops now it loses to the next attachment, and what it dropped before shows in the records.
    fn take_over_drops(&mut self) {
        let Some(status) = self.o.engine.as_ref().and_then(|e| e.status.clone()) else { return };
        let Some(engine) = self.engine.clone() else { return };
        if self.is_declared_off(&engine.node_id) {
            return;
        }
        let is_before_start = matches!(
            status.current_state,
            InstanceState::Stopped | InstanceState::NotStarted | InstanceState::Starting
        );
        if engine.desire_state == DesireState::Running && is_before_start {
            // It still speaks of the attachment before.
            return;
        }
        // What is said of a former attachment was taken over then.
        let is_of_this_attachment = |name: &String| engine.replica_address_map.contains_key(name);
        let dropped = status
            .replica_mode_map
            .iter()
            .filter(|(n, m)| **m == api::engine::ReplicaMode::Err && is_of_this_attachment(n));
        for (name, _) in dropped {
            let why = status.replica_errors.get(name).cloned().unwrap_or_else(|| "the engine dropped it".into());
            self.fail_replica(name, &why);
            if let Some(engine) = &mut self.engine {
                engine.replica_address_map.remove(name);
            }
        }
    }

    fn fail_replica(&mut self, name: &str, why: &str) {
        let now = self.o.now.to_string();
        if let Some(spec) = self.replicas.get_mut(name).filter(|s| s.failed_at.is_empty()) {
            spec.failed_at = now;
            spec.failed_reason = why.to_owned();
            spec.desire_state = DesireState::Stopped;
            spec.active = false;
        }
    }

    fn good_replicas(&self) -> Vec<String> {
        self.replicas.iter().filter(|(_, s)| s.failed_at.is_empty()).map(|(n, _)| n.clone()).collect()
    }

    fn replica(&self, name: &str) -> Option<&Replica> {
        self.o.replicas.iter().find(|r| name_of_replica(r) == name)
    }

    fn detach(&mut self) {
        // The next attachment is a new wish.
        self.restart = Retry::default();
        self.take_over_drops();
        if let Some(engine) = &mut self.engine {
            engine.desire_state = DesireState::Stopped;
            engine.active = false;
        }
        match self.engine_ended() {
            // Replicas end after the engine, which closes them cleanly.
            Ok(Ended::Surely) => {
                self.replicas.values_mut().for_each(|spec| spec.desire_state = DesireState::Stopped);
                self.carry_size();
            }
            // An engine that lives in spite of it would go on with those that are left; where all stay, the next attachment meets it.
            // What they recorded while it served is looked at anew.
            Ok(Ended::Declared) => self.replicas.values_mut().for_each(|spec| spec.active = false),
            Err(why) => {
                self.undetached = Some(why.clone());
                let condition =
                    Condition::new(READY, ConditionStatus::False, "Detaching", format!("detachment waits: {why}"));
                self.wait_for(condition.with_hint(self.engine_hint()));
            }
        }
    }

    /// Takes the volume's size over into its replicas, all at once, while nothing uses them: a process that serves less is ended for
    /// it. One that is away, or failed, gets it too, so that it has the size of the others whenever it is started.
    fn carry_size(&mut self) {
        if self.o.volume.metadata.deletion_timestamp.is_none() {
            let size = self.o.volume.spec.size;
            self.replicas.values_mut().for_each(|spec| spec.volume_size = spec.volume_size.max(size));
        }
    }

    fn delete(mut self) -> Decision {
        self.detach();
        if self.undetached.is_some() {
            return self.finish();
        }
        let mut actions = vec![];
        let mut rest = vec![];
        if let Some(engine) = &self.o.engine {
            rest.push("its engine".to_owned());
            if engine.metadata.deletion_timestamp.is_none() {
                actions.push(Action::DeleteEngine);
            } else if !self.o.disks.nodes.contains_key(&engine.spec.node_id) {
                actions.push(Action::ForgetEngine);
            }
        }
        for replica in &self.o.replicas {
            let name = name_of_replica(replica).to_owned();
            let node = &replica.spec.node_id;
            let silent = match self.o.disks.nodes.get(node) {
                Some(Health::Ready) => String::new(),
                Some(Health::NotReady(why) | Health::Unknown(why)) => format!(" ({why})"),
                None => " (its node is no more)".into(),
            };
            rest.push(format!("replica {name} on node {node}{silent}"));
            if replica.metadata.deletion_timestamp.is_none() {
                actions.push(Action::DeleteReplica(name));
            } else if !self.o.disks.nodes.contains_key(node) {
                actions.push(Action::ForgetReplica(name));
            }
        }
        if rest.is_empty() {
            let status = self.o.volume.status.clone().unwrap_or_default();
            return Decision {
                actions: vec![Action::RemoveFinalizer],
                status,
                restart: Retry::default(),
                recheck_after: None,
            };
        }
        self.undetached = None;
        self.waits = Some(Condition::new(
            READY,
            ConditionStatus::False,
            "Deleting",
            format!("deletion waits for {} to be removed", rest.join(", ")),
        ));
        let mut decision = self.finish();
        decision.actions.extend(actions);
        decision
    }

    fn finish(self) -> Decision {
        let mut actions = self.created.clone();
        for replica in &self.o.replicas {
            let name = name_of_replica(replica);
            if let Some(spec) = self.replicas.get(name).filter(|s| **s != replica.spec) {
                actions.push(Action::SetReplicaSpec { name: name.to_owned(), spec: Box::new(spec.clone()) });
            }
        }
        // After the replicas: who is left out is marked as failed before the engine may start without it.
        if let (Some(engine), Some(spec)) = (&self.o.engine, &self.engine)
            && engine.spec != *spec
        {
            actions.push(Action::SetEngineSpec(Box::new(spec.clone())));
        }
        let status = self.report();
        Decision { actions, status, restart: self.restart, recheck_after: self.recheck_after }
    }
}

/// The replicas in the engine's map that it says are in sync.
fn in_sync(engine: &Engine) -> BTreeSet<String> {
    let Some(status) = &engine.status else { return BTreeSet::new() };
    let is_good =
        |name: &&String| status.replica_mode_map.get(*name).is_some_and(|m| *m != api::engine::ReplicaMode::Err);
    engine.spec.replica_address_map.keys().filter(is_good).cloned().collect()
}

pub(crate) fn name_of_replica(replica: &Replica) -> &str {
    replica.metadata.name.as_deref().unwrap_or_default()
}

/// Reason of `Ready`: the engine ended for good under users of the device.
pub(crate) const ENGINE_LOST: &str = "EngineLost";

pub(crate) const DETACHED_CONDITION: &str = DETACHED;

#[cfg(test)]
mod tests;
