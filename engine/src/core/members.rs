//! Membership: dropping replicas, fences, deadlines, and the end of the last replica.

use std::time::Duration;

use super::barrier::Phase;
use super::{ControlRequest, Core, Output, Set};

/// A new generation that is being recorded by all members. Nothing that changes data is acknowledged meanwhile.
pub(super) struct Fence {
    pub(super) generation: u64,
    pub(super) waiting_for: Set,
    pub(super) since: Duration,
}

/// No replica is left.
pub(super) struct Fault {
    pub(super) until: Duration,
    /// Requests are not held any more, they fail.
    pub(super) expired: bool,
}

impl Fault {
    pub(super) fn sentence(&self) -> &'static str {
        if self.expired {
            "no replica is left; reads and writes fail, the data that was acknowledged stays on the replicas"
        } else {
            "no replica is left; reads and writes are held for a while, then they fail; the data stays on the replicas"
        }
    }
}

impl Core {
    /// The replica that serves reads, other than these. One that is being compared only when the ones in sync failed.
    pub(super) fn reader_except(&self, failed: Set) -> Option<usize> {
        let choose = |candidates: Set| match self.options.read_from {
            Some(preferred) if candidates.contains(preferred) => Some(preferred),
            _ => candidates.lowest(),
        };
        choose(self.in_sync.without(failed)).or_else(|| choose(self.members.without(failed)))
    }

    pub(super) fn on_connection_lost(&mut self, replica: usize, reason: &str) {
        // After `Close` a replica ends its export by itself.
        if !self.phase.is_closing() {
            self.drop_replicas(Set::only(replica), None, reason);
        }
    }

    /// Takes replicas out for good: nothing is acknowledged until the others have recorded that.
    ///
    /// `promote` is the one to read from when none in sync is left.
    pub(super) fn drop_replicas(&mut self, replicas: Set, promote: Option<usize>, reason: &str) {
        let replicas = replicas.and(self.members);
        if replicas.is_empty() {
            return;
        }
        self.members = self.members.without(replicas);
        self.in_sync = self.in_sync.without(replicas);
        for replica in replicas.iter() {
            self.errors[replica] = Some(reason.to_owned());
            self.controls[replica].clear();
            self.outputs.push(Output::Drop { replica, reason: reason.to_owned() });
        }
        for &id in &self.active {
            let slot = &mut self.slots[id];
            if !slot.pending.and(replicas).is_empty() {
                slot.pending = slot.pending.without(replicas);
                if slot.pending.is_empty() {
                    self.ready.push_back(id);
                }
            }
        }
        if self.members.is_empty() {
            self.lose_last();
        } else {
            self.ensure_reader(promote);
            self.begin_fence();
        }
        self.outputs.push(Output::StatusChanged);
    }

    /// When the one that served reads is gone, one of those that were compared with it takes its place.
    ///
    /// What was compared so far is equal on both; the rest is compared with the new one. It holds every acknowledged write, and
    /// may hold another state only of writes that were in flight when the volume ended uncleanly.
    fn ensure_reader(&mut self, promote: Option<usize>) {
        if self.in_sync.is_empty() {
            let wished = promote.filter(|replica| self.members.contains(*replica));
            let chosen = wished.or_else(|| self.reader_except(Set::EMPTY));
            self.in_sync = Set::only(chosen.expect("there are members"));
        }
    }

    fn begin_fence(&mut self) {
        self.generation += 1;
        let (generation, members) = (self.generation, self.members);
        self.fence = Some(Fence { generation, waiting_for: members, since: self.clock });
        for replica in members.iter() {
            self.controls[replica].push_back(generation);
            self.outputs.push(Output::Control { replica, request: ControlRequest::Fence { generation, members } });
        }
    }

    pub(super) fn on_fenced(&mut self, replica: usize, generation: u64) {
        let Some(fence) = &mut self.fence else { return };
        // The answer to an earlier fence says nothing about this one.
        if fence.generation != generation {
            return;
        }
        fence.waiting_for = fence.waiting_for.without(Set::only(replica));
        if fence.waiting_for.is_empty() {
            self.fence = None;
            self.recorded_generation = generation;
            self.outputs.push(Output::Record { generation, members: self.members });
            self.outputs.push(Output::StatusChanged);
            self.ready.extend(self.held.drain(..));
        }
    }

    fn lose_last(&mut self) {
        self.fence = None;
        self.ready.extend(self.held.drain(..));
        let hold = if self.phase.is_ending() { Duration::ZERO } else { self.options.no_replica_hold };
        self.fault = Some(Fault { until: self.clock + hold, expired: false });
        if hold.is_zero() {
            self.check_fault();
        }
    }

    pub(super) fn check_fault(&mut self) {
        let Some(fault) = &mut self.fault else { return };
        if !fault.expired && self.clock >= fault.until {
            fault.expired = true;
            self.outputs.push(Output::StatusChanged);
            self.fail_everything();
        }
    }

    pub(super) fn check_deadlines(&mut self) {
        self.check_fault();
        if let Phase::Closing { waiting_for, since, .. } = self.phase {
            if self.clock.saturating_sub(since) > self.options.replica_timeout {
                for replica in waiting_for.iter() {
                    self.on_closed(replica, false);
                }
            }
            return;
        }
        let late = self.overdue(self.options.replica_timeout);
        if late == self.members {
            // Nobody is left to go on with, so silence gets the time that a loss would get.
            let late = self.overdue(self.options.replica_timeout + self.options.no_replica_hold);
            if late == self.members && !late.is_empty() {
                self.drop_replicas(late, None, &self.silence());
                if let Some(fault) = &mut self.fault {
                    fault.until = self.clock;
                }
                self.check_fault();
            }
        } else {
            self.drop_replicas(late, None, &self.silence());
        }
        let silent = match &self.fence {
            Some(fence) if self.clock.saturating_sub(fence.since) > self.options.replica_timeout => fence.waiting_for,
            _ => Set::EMPTY,
        };
        let reason = format!("it did not record a new generation within {:?}", self.options.replica_timeout);
        self.drop_replicas(silent, None, &reason);
    }

    fn silence(&self) -> String {
        format!("it did not answer within {:?}", self.options.replica_timeout)
    }

    fn overdue(&self, limit: Duration) -> Set {
        let late = self.active.iter().map(|id| &self.slots[*id]);
        let late = late.filter(|slot| self.clock.saturating_sub(slot.sent_at) > limit);
        late.fold(Set::EMPTY, |set, slot| set.with(slot.pending)).and(self.members)
    }
}
