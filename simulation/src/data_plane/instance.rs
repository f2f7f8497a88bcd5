//! The instance role of each node: processes as they are wished, and reports of what is seen.

use std::collections::BTreeMap;

use api::engine::{DesireState, EngineStatus, InstanceState, ReplicaMode};
use api::replica::ReplicaStatus;
use engine::core::ReplicaState;

use super::fault::Fault;
use super::holder::{Attachment, Config};
use super::{Happening, MILLI, Process, SECOND, World};

/// Everything is looked at again after this long.
const RESYNC: u64 = 30 * SECOND;
/// And this soon while something is on its way that makes no event.
const SOON: u64 = SECOND / 2;

impl World {
    pub(super) fn wake_instance(&mut self, node: usize) {
        let wait = self.dice.upto(5 * MILLI);
        self.wake_instance_at(node, self.now + wait);
    }

    fn wake_instance_at(&mut self, node: usize, at: u64) {
        let Some(target) = self.nodes.get_mut(node) else { return };
        if target.pass_at.is_none_or(|planned| planned > at) {
            target.pass_at = Some(at);
            self.at(at, Happening::InstancePass { node });
        }
    }

    pub(super) fn instance_pass(&mut self, node: usize) {
        let target = &mut self.nodes[node];
        if target.pass_at != Some(self.now) {
            return;
        }
        target.pass_at = None;
        let until = target.silent_until.max(target.instance_down_until);
        if until > self.now || !target.up || target.removed {
            // It looks at everything when it is back.
            return self.wake_instance_at(node, until.max(self.now + SECOND));
        }
        let soon = self.engine_pass(node);
        if node < self.replicas.len() {
            self.replica_pass(node);
        }
        let next = if soon { SOON } else { RESYNC };
        self.wake_instance_at(node, self.now + next);
    }

    /// Tells whether it is to be looked at again soon.
    fn engine_pass(&mut self, node: usize) -> bool {
        let spec = self.controller.engine.spec.clone();
        let is_ours = spec.node_id == self.nodes[node].name;
        let is_wished = is_ours && spec.desire_state == DesireState::Running;
        let found = self.attachments.iter().position(|a| a.node == node);
        let (mut again, mut soon) = (false, false);
        let state = match (is_wished, found) {
            (true, None) => InstanceState::Starting,
            (true, Some(a)) if self.attachments[a].is_over() => InstanceState::Error,
            (true, Some(a)) => {
                let serves = self.attachments[a].serving().is_some();
                if self.is_faulted(a) || self.attachments[a].device {
                    InstanceState::Running
                } else {
                    if serves {
                        // The device is made after the report.
                        self.attachments[a].device = true;
                        again = true;
                    }
                    InstanceState::Starting
                }
            }
            (false, None) => InstanceState::Stopped,
            (false, Some(_)) => InstanceState::Stopping,
        };
        if is_ours {
            self.report_engine(found, state);
        }
        match (is_wished, found) {
            (true, None) => {
                self.start_attachment(node);
                again = true;
            }
            (false, Some(a)) => {
                let attachment = &self.attachments[a];
                let is_busy = attachment.device && self.user.device == Some(attachment.id);
                if is_busy {
                    soon = true;
                } else if attachment.device {
                    self.attachments[a].device = false;
                    again = true;
                } else if attachment.is_over() {
                    self.check_reported(a);
                    self.attachments.remove(a);
                    again = true;
                } else {
                    self.shut_down(a);
                    soon = true;
                }
            }
            _ => {}
        }
        if again {
            self.wake_instance(node);
        }
        soon
    }

    fn start_attachment(&mut self, node: usize) {
        let spec = &self.controller.engine.spec;
        let names: Vec<String> = spec.replica_address_map.keys().cloned().collect();
        let number = |name: &String| self.replicas.iter().position(|r| r.name == *name).expect("it is there");
        let replicas: Vec<usize> = names.iter().map(number).collect();
        let read_from = replicas.iter().position(|r| *r == node);
        let (generation, attachment, compare) = (spec.generation, spec.attachment, spec.compare_replicas);
        let config = Config { generation, attachment, compare, replicas, names, read_from };
        self.next_id += 1;
        let id = self.next_id;
        let mut attachment = Attachment::new(id, node, config, self.now);
        attachment.heard = self.controller.heard;
        self.attachments.push(attachment);
        let wait = self.dice.upto(5 * MILLI);
        self.after(wait, Happening::NextLife { attachment: id });
        if std::mem::take(&mut self.removes_at_start) && self.faults {
            // When they answer again, both begin at the same moment and with the same generation.
            let until = self.now + 3 * SECOND;
            self.replicas.iter_mut().for_each(|replica| replica.stopped_until = until);
            let wait = self.dice.upto(SECOND);
            self.after(wait, Happening::Fault(Fault::RemoveNode));
        }
    }

    fn report_engine(&mut self, found: Option<usize>, state: InstanceState) {
        let old = self.controller.engine.status.clone().unwrap_or_default();
        let attachment = found.map(|a| &self.attachments[a]);
        // What an engine said goes with its holder; what it left beside its socket stays until it is cleaned up.
        let seen = attachment.filter(|a| !a.is_over()).and_then(|a| a.told.as_ref()).filter(|told| told.generation > 0);
        let left = attachment.and_then(|a| a.known.as_ref()).map_or(0, |known| known.generation);
        let is_up = state == InstanceState::Running;
        let is_gone = state == InstanceState::Stopped;
        let has_device = attachment.is_some_and(|a| a.device);
        let mode = |state: &ReplicaState| match state {
            ReplicaState::InSync => ReplicaMode::Rw,
            ReplicaState::Comparing => ReplicaMode::Wo,
            ReplicaState::Dropped => ReplicaMode::Err,
        };
        let status = EngineStatus {
            current_state: state,
            endpoint: if is_up && has_device { "/dev/loop0".into() } else { String::new() },
            started: is_up,
            generation: seen.map_or(0, |told| told.generation).max(left).max(old.generation),
            replica_mode_map: match seen {
                Some(told) => told.modes.iter().map(|(name, state)| (name.clone(), mode(state))).collect(),
                None if is_gone => BTreeMap::new(),
                None => old.replica_mode_map.clone(),
            },
            ..EngineStatus::default()
        };
        if self.controller.engine.status.as_ref() != Some(&status) {
            self.controller.engine.status = Some(status);
            self.wake_controller();
        }
    }

    fn replica_pass(&mut self, r: usize) {
        let is_wished = self.controller.replicas[r].spec.desire_state == DesireState::Running;
        let (target, process) = (&self.replicas[r], self.replicas[r].process);
        let state = match (is_wished, process) {
            (true, Process::Up) => InstanceState::Running,
            (true, Process::Starting | Process::None) => InstanceState::Starting,
            (true, Process::Ended) => InstanceState::Error,
            (false, Process::None) => InstanceState::Stopped,
            (false, _) => InstanceState::Stopping,
        };
        let is_up = state == InstanceState::Running;
        let status = ReplicaStatus {
            current_state: state,
            ip: if is_up { "ip".into() } else { String::new() },
            port: u16::from(is_up),
            started: is_up,
            generation: target.record.generation,
            generation_members: target.record.members.clone(),
            clean: target.record.clean,
            ..ReplicaStatus::default()
        };
        if self.controller.replicas[r].status.as_ref() != Some(&status) {
            self.controller.replicas[r].status = Some(status);
            self.wake_controller();
        }
        match (is_wished, process) {
            (true, Process::None) => {
                let target = &mut self.replicas[r];
                target.process = Process::Starting;
                target.incarnation += 1;
                let incarnation = target.incarnation;
                let wait = self.dice.upto(20 * MILLI);
                self.after(wait, Happening::ReplicaUp { replica: r, incarnation });
            }
            (false, Process::Up | Process::Starting) => {
                // In order: everything reaches its disk; unless it takes too long and is killed.
                if !(self.faults && self.dice.percent(10)) {
                    self.replicas[r].flush(u64::MAX);
                }
                self.end_replica(r, Process::None, true);
                self.wake_instance(r);
            }
            (false, Process::Ended) => {
                self.replicas[r].process = Process::None;
                self.wake_instance(r);
            }
            _ => {}
        }
    }
}
