//! Comparing replicas in the background and repairing what differs.
//!
//! After an unclean end members hold every acknowledged write, but may differ in writes that were in flight. One of them is
//! pinned: it alone serves reads. The others get all changes and are read and compared with it step by step, each step under an
//! exclusive range lock; what differs is rewritten from the pinned one. At the end comes a flush, then they count as in sync.
//!
//! A change that failed on all members leads here as well, for its range: some may have stored a part of it.
//! When the pinned one is lost before the end, another takes its place and the rest is compared with that
//! (see `members::ensure_reader`).

use std::collections::VecDeque;
use std::time::Duration;

use super::request::Purpose;
use super::{Core, Operation, Output, Payload, Set};
use crate::limits;

/// How far comparing is.
#[derive(Default)]
pub(super) struct Compare {
    running: bool,
    /// What is still to be compared.
    ranges: VecDeque<(u64, u64)>,
    step: Option<Step>,
    flushing: bool,
    not_before: Duration,
}

struct Step {
    id: usize,
    started: Duration,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Reading,
    /// The surroundings compare the buffers of these, the first one being pinned.
    Judging {
        pinned: usize,
        members: Set,
    },
    Rewriting,
}

/// How long to wait before a failed flush at the end of comparing is repeated.
const FLUSH_RETRY: Duration = Duration::from_secs(1);

impl Core {
    /// Members other than the pinned one may differ in this range.
    pub(super) fn compare_range(&mut self, start: u64, end: u64) {
        if self.members.len() < 2 || start >= end {
            return;
        }
        // Not the preferred one: whoever begins after another crash must choose the same, so that what was read stays as it was read.
        let pinned = self.in_sync.lowest().or_else(|| self.members.lowest()).expect("there are members");
        self.in_sync = Set::only(pinned);
        self.compare.running = true;
        self.compare.ranges.push_back((start, end));
        if self.compare.ranges.len() > limits::MAX_COMPARE_RANGES {
            let (first, last) = self.compare.ranges.iter().fold((u64::MAX, 0), |(a, b), r| (a.min(r.0), b.max(r.1)));
            self.compare.ranges = VecDeque::from([(first, last)]);
        }
        self.outputs.push(Output::MayDiffer);
        self.outputs.push(Output::StatusChanged);
    }

    pub(super) fn scratch(&self, replica: usize) -> Payload {
        Payload { buffer: self.options.scratch[replica], start: 0 }
    }

    fn comparing(&self) -> Set {
        self.members.without(self.in_sync)
    }

    /// When the next step is due.
    pub(super) fn compare_due(&self) -> Option<Duration> {
        let idle = self.compare.step.is_none() && !self.compare.flushing && self.phase.admits();
        (self.compare.running && idle && !self.members.is_empty())
            .then(|| self.compare.not_before.saturating_sub(self.clock))
    }

    pub(super) fn advance_compare(&mut self) {
        if !self.compare.running || self.compare.step.is_some() || self.compare.flushing || self.members.is_empty() {
            return;
        }
        if self.comparing().is_empty() {
            self.compare.running = false;
            self.compare.ranges.clear();
            self.outputs.push(Output::Equal);
            self.outputs.push(Output::StatusChanged);
            return;
        }
        if !self.phase.admits() || self.clock < self.compare.not_before {
            return;
        }
        let Some((start, end)) = self.compare.ranges.pop_front() else {
            self.compare.flushing = true;
            let id = self.allocate(Purpose::CompareFlush, Operation::Flush, 0, 0, None);
            return self.admit(id);
        };
        let middle = end.min(start + self.options.compare_step_bytes);
        if middle < end {
            self.compare.ranges.push_front((middle, end));
        }
        let id = self.allocate(Purpose::CompareStep, Operation::Read, start, middle, None);
        self.compare.step = Some(Step { id, started: self.clock, stage: Stage::Reading });
        self.admit(id);
    }

    /// Reads the step's range from every member, each into a buffer of its own (see `Slot::receives`).
    pub(super) fn launch_step(&mut self, id: usize) {
        let clock = self.clock;
        let step = self.compare.step.as_mut().expect("a step is under way");
        (step.stage, step.started) = (Stage::Reading, clock);
        let length = self.slots[id].end - self.slots[id].start;
        self.slots[id].failed = Set::EMPTY;
        self.transfer(id, self.members, Operation::Read, None, length);
    }

    pub(super) fn settle_step(&mut self, id: usize) {
        let failed = self.slots[id].failed.and(self.members);
        let asked = self.slots[id].asked.and(self.members);
        let length = self.slots[id].end - self.slots[id].start;
        let step = self.compare.step.as_mut().expect("a step is under way");
        match step.stage {
            Stage::Reading if self.members.without(self.in_sync).is_empty() => self.finish(id, Ok(())),
            // Nobody can read it, so nobody can tell a difference.
            Stage::Reading if failed == asked => self.finish(id, Ok(())),
            Stage::Reading if !failed.is_empty() => {
                self.drop_replicas(failed, None, "it could not be read while it was compared with the others");
                self.launch_step(id);
            }
            Stage::Reading => {
                let pinned = self.in_sync.lowest().expect("one is in sync");
                step.stage = Stage::Judging { pinned, members: self.members };
                self.counters.compared_bytes += length;
                let others = self.members.without(self.in_sync);
                let others = others.iter().map(|replica| (replica, self.options.scratch[replica])).collect();
                let pinned = self.options.scratch[pinned];
                let token = self.cookie(id);
                self.outputs.push(Output::Compare { token, length: length as usize, pinned, others });
            }
            Stage::Judging { .. } => {}
            Stage::Rewriting => {
                self.drop_replicas(failed, None, "it could not be rewritten where it differed from the others");
                self.finish(id, Ok(()));
            }
        }
    }

    pub(super) fn on_compared(&mut self, token: u64, differing: Set) {
        let Some(Step { id, stage: Stage::Judging { pinned, members }, .. }) = self.compare.step else { return };
        if self.cookie(id) != token {
            return;
        }
        if self.members.is_empty() {
            return self.ready.push_back(id);
        }
        if self.members != members || !self.in_sync.contains(pinned) {
            return self.launch_step(id);
        }
        let differing = differing.and(self.comparing());
        if differing.is_empty() {
            return self.finish(id, Ok(()));
        }
        if let Some(step) = &mut self.compare.step {
            step.stage = Stage::Rewriting;
        }
        let length = self.slots[id].end - self.slots[id].start;
        self.counters.repaired_bytes += length;
        self.transfer(id, differing, Operation::Write, Some(self.scratch(pinned)), length);
    }

    /// Half of the time belongs to clients while there are any.
    pub(super) fn step_over(&mut self) {
        let Some(step) = self.compare.step.take() else { return };
        let busy =
            self.active.iter().chain(&self.waiting).any(|id| matches!(self.slots[*id].purpose, Purpose::Client(_)));
        let pause = if busy { self.clock.saturating_sub(step.started) } else { Duration::ZERO };
        self.compare.not_before = self.clock + pause;
    }

    pub(super) fn compare_flushed(&mut self, flushed: bool) {
        self.compare.flushing = false;
        if !flushed {
            self.compare.not_before = self.clock + FLUSH_RETRY;
        } else if self.compare.ranges.is_empty() {
            self.in_sync = self.members;
        }
    }
}
