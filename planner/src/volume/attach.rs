//! Attaching: replicas first, then a judgement of their generations, then the engine.

use std::collections::{BTreeMap, BTreeSet};

use api::engine::{DesireState, InstanceState};
use api::generations::attachment_of;
use api::names::condition::{ENGINE_WAITS, READY, WAIT_FOR_BACKING_IMAGE};
use api::quantity::SizeBytes;
use api::{Condition, ConditionStatus, Replica, condition};

use super::{Action, ENGINE_LOST, Ended, Pass, SILENCE_LIMIT, SILENT_ENGINE_HINT, name_of_replica};
use crate::disk::Health;
use crate::generations::{Judgement, Record, Sight, judge};
use crate::retry::{after, until};

/// How often a replica whose process ended is started again before the others go on without it.
const RESTARTS: u32 = 3;

/// Where a replica stands on its way to serve.
enum Way {
    /// It serves; its record can be trusted, since nobody writes it before the engine starts.
    Up(Record),
    /// It is on its way; what it waits for.
    Coming(String),
    /// It cannot be had now.
    Away(String),
}

/// The record that was reported last.
fn record_of(replica: &Replica) -> Record {
    let status = replica.status.clone().unwrap_or_default();
    Record {
        generation: status.generation,
        members: status.generation_members.iter().cloned().collect(),
        clean: status.clean,
    }
}

impl Pass<'_> {
    pub(super) fn attach(&mut self) {
        let node = self.o.volume.spec.node_id.clone();
        let Some(engine) = self.engine.clone() else {
            self.wait("Creating", "the volume is being created");
            return;
        };
        let is_wished = engine.desire_state == DesireState::Running && engine.node_id == node;
        if is_wished && !self.has_ended_by_surprise() && !self.has_lost_all_before_it_served() {
            self.take_over_drops();
            self.maintain();
            return;
        }
        // Whatever ran before must be gone before anything may run anew: a replica has one writer (invariant 4).
        self.take_over_drops();
        if let Some(e) = &mut self.engine {
            e.desire_state = DesireState::Stopped;
            e.active = false;
        }
        if engine.desire_state == DesireState::Running {
            // This makes their nodes look at them anew: what they recorded while an engine served is not reported by itself.
            self.replicas.values_mut().for_each(|spec| spec.active = false);
        }
        let ended = self.engine_ended();
        if let Ok(Ended::Surely) = ended {
            self.carry_size();
        }
        if let Err(why) = ended {
            let is_move = engine.node_id != node;
            let (reason, message, hint) = match self.lost_engine() {
                Some(lost) => (
                    ENGINE_LOST,
                    format!(
                        "{lost}; requests on its device fail; it is attached again when nobody uses that any more: {why}"
                    ),
                    "unmount the volume, or end what uses its device; then mount it again",
                ),
                None if is_move => {
                    let message = format!("it must be detached from node {} first: {why}", engine.node_id);
                    ("Detaching", message, self.engine_hint())
                }
                None => ("Detaching", why.clone(), self.engine_hint()),
            };
            self.wait_for(Condition::new(READY, ConditionStatus::False, reason, message).with_hint(hint));
            self.undetached = Some(why);
            return;
        }
        if self.created.iter().any(|a| matches!(a, Action::CreateReplica(_))) {
            // Whoever is born now belongs to the first attachment too.
            self.wait("Creating", "the replicas are being created");
            return;
        }
        if !self.check_node(&node) {
            return;
        }
        if self.good_replicas().is_empty() {
            self.no_good_replica();
            return;
        }
        let (broken, stop_now) = self.broken();
        for name in self.good_replicas() {
            let is_broken = broken.contains(&name);
            if let Some(spec) = self.replicas.get_mut(&name).filter(|_| !is_broken || stop_now) {
                spec.desire_state = if is_broken { DesireState::Stopped } else { DesireState::Running };
            }
        }
        self.join(&node, &broken);
    }

    /// Replicas whose process ended and that are to be stopped and started again, and whether now: all of a machine's processes end with
    /// it, and that is no reason to lose a replica. One that ends again and again is given up when others can serve.
    fn broken(&mut self) -> (BTreeSet<String>, bool) {
        let state = |r: &Replica| r.status.as_ref().map_or(InstanceState::NotStarted, |s| s.current_state);
        let good: Vec<&Replica> = self.o.replicas.iter().filter(|r| r.spec.failed_at.is_empty()).collect();
        let has_ended = |r: &&&Replica| {
            state(r) == InstanceState::Error && self.o.disks.nodes.get(&r.spec.node_id) == Some(&Health::Ready)
        };
        let broken: Vec<&Replica> = good.iter().filter(has_ended).copied().collect();
        let others_serve = good.iter().any(|r| state(r) == InstanceState::Running);
        if broken.is_empty() || others_serve && self.restart.failures >= RESTARTS {
            return (BTreeSet::new(), false);
        }
        let names: BTreeSet<String> = broken.iter().map(|r| name_of_replica(r).to_owned()).collect();
        let is_wished = broken.iter().any(|r| r.spec.desire_state == DesireState::Running);
        let stop_now = is_wished && self.restart.is_due(self.o.now);
        if stop_now {
            let status = broken[0].status.clone().unwrap_or_default();
            let said = status.conditions.iter().find(|c| !c.message.is_empty() && !c.is_true());
            let why = said.map_or_else(|| "its process ended".to_owned(), |c| c.message.clone());
            self.restart = self.restart.failed(self.o.now, why);
        } else if is_wished {
            // Not yet; it stays as it is until its back-off is over.
            self.recheck(self.restart.wait(self.o.now));
        }
        (names, stop_now)
    }

    /// Why users of the device get errors: the engine ended under them, and the device is not gone yet.
    fn lost_engine(&self) -> Option<String> {
        let status = self.o.engine.as_ref()?.status.as_ref()?;
        let ready = condition::find(&status.conditions, READY)?;
        (ready.reason == "EngineEnded").then(|| ready.message.clone())
    }

    /// The engine ended although it shall run: its end is taken as unclean, and it is attached anew after a back-off.
    fn has_ended_by_surprise(&mut self) -> bool {
        // Stopped is what it was before the wish; the instance role is about to take that up.
        if self.engine_state() != InstanceState::Error {
            return false;
        }
        let status = self.o.engine.as_ref().and_then(|e| e.status.clone()).unwrap_or_default();
        let said = status.conditions.iter().find(|c| !c.message.is_empty() && !c.is_true());
        let why = said.map_or_else(|| "the engine ended by surprise".to_owned(), |c| c.message.clone());
        self.restart = self.restart.failed(self.o.now, why);
        true
    }

    /// The processes of all its replicas ended before the engine served anybody: rather than wait for what cannot come, they are
    /// started again and judged anew.
    fn has_lost_all_before_it_served(&mut self) -> bool {
        if self.engine_state() != InstanceState::Starting {
            return false;
        }
        let map = self.o.engine.iter().flat_map(|e| e.spec.replica_address_map.keys());
        let ended = map.map(|name| {
            let replica = self.replica(name)?;
            let is_seen = self.o.disks.nodes.get(&replica.spec.node_id) == Some(&Health::Ready);
            let status = replica.status.as_ref().filter(|s| is_seen && s.current_state == InstanceState::Error)?;
            let said = status.conditions.iter().find(|c| !c.message.is_empty() && !c.is_true());
            Some(said.map_or_else(|| "its process ended".to_owned(), |c| c.message.clone()))
        });
        let Some(reason) = ended.collect::<Option<Vec<String>>>().and_then(|reasons| reasons.into_iter().next()) else {
            return false;
        };
        self.restart = self.restart.failed(self.o.now, format!("no replica was left when the engine began: {reason}"));
        true
    }

    fn check_node(&mut self, node: &str) -> bool {
        let hint = "detach the volume or bring the node back";
        match self.o.disks.nodes.get(node) {
            Some(Health::Ready) => true,
            Some(Health::NotReady(why) | Health::Unknown(why)) => {
                let message = format!("cannot attach to node {node}: {why}");
                self.wait_for(Condition::new(READY, ConditionStatus::False, "NodeNotReady", message).with_hint(hint));
                false
            }
            None => {
                let known = self.o.disks.nodes.keys().cloned().collect::<Vec<_>>().join(", ");
                let message = format!("cannot attach to node {node}: there is no such node; known are {known}");
                self.wait_for(Condition::new(READY, ConditionStatus::False, "NodeNotFound", message).with_hint(hint));
                false
            }
        }
    }

    fn no_good_replica(&mut self) {
        if self.o.replicas.is_empty() {
            self.wait("Creating", "no replica has a place yet");
            return;
        }
        let reasons = self.failures();
        let message = format!("every replica has failed; their data is untouched: {reasons}");
        let hint = "clear failedAt of the replica that you trust most, to salvage its data";
        self.wait_for(Condition::new(READY, ConditionStatus::False, "Faulted", message).with_hint(hint));
    }

    pub(super) fn failures(&self) -> String {
        let failed = self.replicas.iter().filter(|(_, s)| !s.failed_at.is_empty());
        failed.map(|(n, s)| format!("{n} on node {}: {}", s.node_id, s.failed_reason)).collect::<Vec<_>>().join("; ")
    }

    fn way(&mut self, replica: &Replica) -> Way {
        let node = &replica.spec.node_id;
        let why = match self.o.disks.nodes.get(node) {
            Some(Health::Ready) => None,
            Some(Health::NotReady(why) | Health::Unknown(why)) => Some(why.clone()),
            None => Some(format!("there is no node {node} any more")),
        };
        if let Some(why) = why {
            let is_gone = self.is_declared_off(node);
            let limit = self.o.silent_since.get(node).map(|since| after(*since, SILENCE_LIMIT));
            return match limit.filter(|limit| !is_gone && *limit > self.o.now) {
                Some(limit) => {
                    self.recheck(Some(until(self.o.now, limit)));
                    Way::Coming(format!("{why}; the attachment goes on without it at {limit}"))
                }
                None => Way::Away(why),
            };
        }
        let status = replica.status.clone().unwrap_or_default();
        match status.current_state {
            InstanceState::Running => match (status.current_size, self.size_of(name_of_replica(replica))) {
                // From before the volume grew; the engine would leave it out. 0: it does not tell.
                (has, wanted) if has < wanted && has.0 > 0 => {
                    Way::Coming(format!("it is started again, to grow from {has} to {wanted} bytes"))
                }
                _ => Way::Up(record_of(replica)),
            },
            InstanceState::Error => {
                let said = status.conditions.iter().find(|c| !c.message.is_empty() && !c.is_true());
                Way::Away(said.map_or_else(|| "its process could not be started".to_owned(), |c| c.message.clone()))
            }
            _ => {
                let waits = condition::find(&status.conditions, WAIT_FOR_BACKING_IMAGE).filter(|c| c.is_true());
                let why = waits.map(|c| c.message.clone()).filter(|m| !m.is_empty());
                Way::Coming(why.unwrap_or_else(|| "it is starting".into()))
            }
        }
    }

    /// The size that a replica is wished to have.
    fn size_of(&self, name: &str) -> SizeBytes {
        self.replicas.get(name).map_or_else(SizeBytes::default, |spec| spec.volume_size)
    }

    /// All replicas that can come are up: judges them, fills the engine's map, starts the engine.
    fn join(&mut self, node: &str, broken: &BTreeSet<String>) {
        let mut sights = BTreeMap::new();
        let mut coming = vec![];
        for name in self.good_replicas() {
            let Some(replica) = self.replica(&name).cloned() else { continue };
            if broken.contains(&name) {
                let next = self.restart.next.map(|n| format!(", not before {n}")).unwrap_or_default();
                coming.push(format!(
                    "{name} on node {}: {}; it is started again{next}",
                    replica.spec.node_id, self.restart.message
                ));
                continue;
            }
            match self.way(&replica) {
                Way::Up(record) => drop(sights.insert(name, Sight::Seen(record))),
                Way::Away(why) => {
                    let generation = record_of(&replica).generation;
                    sights.insert(name, Sight::Unseen { why, generation });
                }
                Way::Coming(why) => coming.push(format!("{name} on node {}: {why}", replica.spec.node_id)),
            }
        }
        if !coming.is_empty() {
            match self.image_progress() {
                Some(image) => {
                    let (r#type, reason) = (READY.to_owned(), "Attaching".to_owned());
                    self.wait_for(Condition { r#type, status: ConditionStatus::False, reason, ..image });
                }
                None => self.wait("Attaching", format!("waits for replica {}", coming.join("; "))),
            }
            return;
        }
        if !self.restart.is_due(self.o.now) {
            let (wait, next, why) = (self.restart.wait(self.o.now), self.restart.next, self.restart.message.clone());
            self.recheck(wait);
            let condition = Condition::new(READY, ConditionStatus::False, "EngineFailed", why);
            self.wait_for(match next {
                Some(next) => condition.with_next_retry(next),
                None => condition,
            });
            return;
        }
        let recorded = self.engine.as_ref().map_or(0, |e| e.generation);
        let judgement = judge(&sights, recorded);
        if let Some(why) = &judgement.refused {
            let unseen = judgement.unknown.iter().map(|(n, why)| format!("{n}: {why}")).collect::<Vec<_>>().join("; ");
            let message = if unseen.is_empty() { why.clone() } else { format!("{why} ({unseen})") };
            let hint = "bring the missing replicas back; or, to salvage what is there, set failedAt and clear failedReason of those that are lost, then lower generation in the Engine's spec and status";
            self.wait_for(Condition::new(READY, ConditionStatus::False, "StaleReplica", message).with_hint(hint));
            return;
        }
        if judgement.current.is_empty() {
            let unseen = judgement.unknown.iter().map(|(n, why)| format!("{n}: {why}")).collect::<Vec<_>>().join("; ");
            self.wait("ReplicasAway", format!("no replica can be reached: {unseen}"));
            return;
        }
        self.start(node, &judgement);
    }

    fn start(&mut self, node: &str, judgement: &Judgement) {
        let mut addresses = BTreeMap::new();
        for name in &judgement.current {
            let status = self.replica(name).and_then(|r| r.status.clone()).unwrap_or_default();
            if status.ip.is_empty() || status.port == 0 {
                self.wait("Attaching", format!("replica {name} has not told its address yet"));
                return;
            }
            addresses.insert(name.clone(), format!("{}:{}", status.ip, status.port));
        }
        // Whoever is left out misses every write from now on, so this is recorded before the engine starts.
        for (name, why) in &judgement.stale {
            self.fail_replica(name, &format!("stale: {why}"));
        }
        for (name, why) in &judgement.unknown {
            self.fail_replica(name, &format!("the volume was attached without it: {why}"));
        }
        for name in &judgement.current {
            if let Some(spec) = self.replicas.get_mut(name) {
                spec.active = true;
            }
        }
        // What the replicas have, which is not the volume's yet when it grew while an engine of a node that is off may still use them.
        let size = judgement.current.iter().map(|name| self.size_of(name)).min().unwrap_or(self.o.volume.spec.size);
        let frontend = self.o.volume.spec.frontend.clone();
        if let Some(engine) = &mut self.engine {
            engine.node_id = node.to_owned();
            engine.desire_state = DesireState::Running;
            engine.active = true;
            engine.volume_size = size;
            engine.frontend = frontend;
            engine.replica_address_map = addresses;
            engine.compare_replicas = judgement.compare;
            engine.generation = engine.generation.max(judgement.highest);
            // Also above one that was counted in an Engine that is gone.
            engine.attachment = engine.attachment.max(attachment_of(engine.generation)) + 1;
        }
        self.wait("Attaching", format!("the engine on node {node} is starting"));
    }

    /// The engine runs, or is about to.
    fn maintain(&mut self) {
        let Some(engine) = self.o.engine.clone() else { return };
        let status = engine.status.clone().unwrap_or_default();
        let node = &engine.spec.node_id;
        if let Some(Health::NotReady(why) | Health::Unknown(why)) = self.o.disks.nodes.get(node) {
            let since = self.silence_of(node);
            let message = format!(
                "{why}{since}; the volume stays attached to node {node}, whose engine is waited for until the node returns, is declared out of service, or its Node object is deleted"
            );
            let condition = Condition::new(READY, ConditionStatus::Unknown, "NodeNotReady", message);
            self.wait_for(condition.with_hint(SILENT_ENGINE_HINT));
            return;
        }
        if !self.o.disks.nodes.contains_key(node) {
            let hint = "detach the volume, then attach it to another node";
            let message = format!("node {node}, where the volume is attached, is no more");
            self.wait_for(Condition::new(READY, ConditionStatus::Unknown, "NodeNotFound", message).with_hint(hint));
            return;
        }
        if status.current_state != InstanceState::Running || status.endpoint.is_empty() {
            let said = status.conditions.iter().find(|c| !c.message.is_empty() && !c.is_true());
            let said = said.map(|c| format!(": {}", c.message)).unwrap_or_default();
            self.wait("Attaching", format!("the engine on node {node} is starting{said}"));
            return;
        }
        // Attached, and yet requests wait.
        let ready = condition::find(&status.conditions, READY).filter(|c| c.status == ConditionStatus::False);
        if let Some(waits) = ready.filter(|c| ENGINE_WAITS.contains(&c.reason.as_str())) {
            let message = format!("on node {node} {}", waits.message);
            self.wait_for(Condition { message, last_transition_time: String::new(), ..waits.clone() });
        }
    }

    /// "image ubuntu: 2 of 3 copies ready, disk-1 of node-3 at 61 %", when not all replicas have their copy; each fact once.
    pub(super) fn image_progress(&self) -> Option<Condition> {
        let image = self.o.image.as_ref()?;
        let status = image.status.clone().unwrap_or_default();
        let disks: BTreeSet<&str> = self
            .replicas
            .values()
            .filter(|s| s.failed_at.is_empty() && s.desire_state == DesireState::Running)
            .map(|s| s.disk_id.as_str())
            .collect();
        let is_ready =
            |d: &&str| status.disk_file_status_map.get(*d).is_some_and(|f| f.state == api::image::CopyState::Ready);
        if disks.is_empty() || disks.iter().all(is_ready) {
            return None;
        }
        // While there is no copy at all, the image itself says best what it waits for.
        let said = condition::find(&status.conditions, READY).filter(|c| !c.is_true() && !c.message.is_empty());
        let text = match said {
            Some(why) => why.message.clone(),
            None => crate::image::progress(&status, disks.into_iter(), &self.o.disks),
        };
        let wait = Condition::new(
            WAIT_FOR_BACKING_IMAGE,
            ConditionStatus::True,
            "Waiting",
            format!("image {}: {text}", self.o.volume.spec.backing_image),
        );
        Some(match said {
            Some(why) => Condition { next_retry_time: why.next_retry_time.clone(), hint: why.hint.clone(), ..wait },
            None => wait,
        })
    }
}
