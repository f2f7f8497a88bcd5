//! Barriers and the end: stop taking requests, wait until none is in flight, flush, act, go on.

use std::time::Duration;

use super::request::Purpose;
use super::{ControlRequest, Core, Operation, Output, Set};

/// What a barrier is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    Pause,
    End,
}

/// Where the core stands between serving and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Serving,
    /// Requests in flight are finished, new ones wait.
    Draining(Goal),
    Flushing(Goal),
    /// `flushed`: whether everything acknowledged is on stable storage.
    Paused {
        flushed: bool,
    },
    /// The members record that the attachment ended cleanly.
    Closing {
        waiting_for: Set,
        since: Duration,
        clean: bool,
    },
    Ended,
}

impl Phase {
    /// Whether requests start.
    pub(super) fn admits(self) -> bool {
        self == Phase::Serving
    }

    pub(super) fn is_closing(self) -> bool {
        matches!(self, Phase::Closing { .. } | Phase::Ended)
    }

    pub(super) fn is_ending(self) -> bool {
        self.is_closing() || matches!(self, Phase::Draining(Goal::End) | Phase::Flushing(Goal::End))
    }
}

impl Core {
    pub(super) fn pause(&mut self) {
        match self.phase {
            Phase::Serving => self.phase = Phase::Draining(Goal::Pause),
            Phase::Paused { flushed: true } => self.outputs.push(Output::Paused { flushed: true }),
            // Asked again after a flush that failed: only another one can tell.
            Phase::Paused { flushed: false } => self.phase = Phase::Draining(Goal::Pause),
            _ => {}
        }
    }

    pub(super) fn resume(&mut self) {
        if matches!(self.phase, Phase::Paused { .. } | Phase::Draining(Goal::Pause) | Phase::Flushing(Goal::Pause)) {
            self.phase = Phase::Serving;
            self.start_waiting();
        }
    }

    pub(super) fn shutdown(&mut self) {
        match self.phase {
            Phase::Flushing(Goal::Pause) => self.phase = Phase::Flushing(Goal::End),
            Phase::Serving | Phase::Paused { .. } | Phase::Draining(Goal::Pause) => {
                self.phase = Phase::Draining(Goal::End);
            }
            _ => return,
        }
        if let Some(fault) = &mut self.fault {
            fault.until = self.clock;
            self.check_fault();
        }
    }

    pub(super) fn advance_barrier(&mut self) {
        let Phase::Draining(goal) = self.phase else { return };
        if !self.active.is_empty() || self.fence.is_some() {
            return;
        }
        self.phase = Phase::Flushing(goal);
        if self.members.is_empty() {
            return self.barrier_flushed(false);
        }
        let id = self.allocate(Purpose::BarrierFlush, Operation::Flush, 0, 0, None);
        self.admit(id);
    }

    pub(super) fn barrier_flushed(&mut self, flushed: bool) {
        match self.phase {
            Phase::Flushing(Goal::Pause) => {
                self.phase = Phase::Paused { flushed };
                self.outputs.push(Output::Paused { flushed });
            }
            Phase::Flushing(Goal::End) => self.close(flushed),
            // Resumed meanwhile.
            _ => {}
        }
    }

    /// A clean record says that all members hold the same bytes, so there is none while they are being compared.
    fn close(&mut self, flushed: bool) {
        let equal = self.members == self.in_sync;
        if !flushed || !equal || self.members.is_empty() {
            self.phase = Phase::Ended;
            self.outputs.push(Output::Ended { clean: false });
            return;
        }
        self.phase = Phase::Closing { waiting_for: self.members, since: self.clock, clean: true };
        for replica in self.members.iter() {
            self.controls[replica].push_back(self.generation);
            let request = ControlRequest::Close { generation: self.generation };
            self.outputs.push(Output::Control { replica, request });
        }
    }

    pub(super) fn on_closed(&mut self, replica: usize, done: bool) {
        let Phase::Closing { waiting_for, clean, .. } = &mut self.phase else { return };
        if !waiting_for.contains(replica) {
            return;
        }
        *waiting_for = waiting_for.without(Set::only(replica));
        *clean &= done;
        if waiting_for.is_empty() {
            let clean = *clean;
            self.phase = Phase::Ended;
            self.outputs.push(Output::Ended { clean });
        }
    }
}
