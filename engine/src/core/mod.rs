//! The engine's decisions as a state machine: events in, outputs out.
//!
//! No input or output, no clock, no threads: time is a parameter, buffers are numbers. So it can be run through any course of
//! events in a simulation.
//!
//! What it promises:
//! - A change is acknowledged only when every member has it, and only under a generation that every member has recorded (invariant 5).
//! - Requests that overlap reach all members in the same order (the range lock: reads share, everything else excludes). A flush
//!   covers what is acknowledged, so it never waits for the lock.
//! - An error is judged when all members have answered: what failed on all is the caller's error and costs no replica, what
//!   failed on some drops those.
//! - Reads go to one replica at a time, never to one that is being compared.

mod barrier;
mod compare;
mod members;
mod request;
#[cfg(test)]
mod tests;
mod types;

use std::collections::VecDeque;
use std::time::Duration;

pub use types::*;

use crate::limits;
use barrier::Phase;
use compare::Compare;
use members::{Fault, Fence};
use request::Slot;

/// The state machine. See the module.
pub struct Core {
    options: Options,
    /// Advances with the time that is passed in, but never by more than [`limits::MAX_CLOCK_STEP`] at once.
    clock: Duration,
    last_seen: Duration,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Slots that hold their range lock.
    active: Vec<usize>,
    /// Slots that wait for a range lock or the end of a barrier, oldest first.
    waiting: VecDeque<usize>,
    /// Slots on which all that were asked have answered: to be judged before an event is over.
    ready: VecDeque<usize>,
    /// Changes that are stored but must not be acknowledged before the fence under way is over.
    held: Vec<usize>,
    generation: u64,
    /// The highest generation that all of its members recorded. Nothing was ever acknowledged under a higher one.
    recorded_generation: u64,
    members: Set,
    /// Members that may serve reads; the other members are being compared.
    in_sync: Set,
    errors: Vec<Option<String>>,
    fence: Option<Fence>,
    /// Per replica: the generations of its unanswered control requests.
    controls: Vec<VecDeque<u64>>,
    fault: Option<Fault>,
    phase: Phase,
    compare: Compare,
    counters: Counters,
    outputs: Vec<Output>,
}

impl Core {
    pub fn new(options: Options) -> Core {
        assert!(!options.members.is_empty(), "an engine begins with at least one replica");
        assert!(options.scratch.len() >= options.replicas, "comparing needs a buffer for each replica");
        let mut core = Core {
            clock: Duration::ZERO,
            last_seen: Duration::ZERO,
            slots: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
            waiting: VecDeque::new(),
            ready: VecDeque::new(),
            held: Vec::new(),
            generation: options.generation,
            recorded_generation: options.generation,
            members: options.members,
            in_sync: options.members,
            errors: vec![None; options.replicas],
            fence: None,
            controls: vec![VecDeque::new(); options.replicas],
            fault: None,
            phase: Phase::Serving,
            compare: Compare::default(),
            counters: Counters::default(),
            outputs: Vec::new(),
            options,
        };
        if core.options.compare {
            core.compare_range(0, core.options.size_bytes);
            if core.members.len() == 1 {
                core.outputs.push(Output::Equal);
            }
        }
        core
    }

    /// Takes one event. What is to be done then is in [`Core::take_outputs`].
    pub fn handle(&mut self, now: Duration, event: Event) {
        self.clock += now.saturating_sub(self.last_seen).min(limits::MAX_CLOCK_STEP);
        self.last_seen = self.last_seen.max(now);
        match event {
            Event::Submit(submission) => self.submit(submission),
            Event::Reply { replica, cookie, failure } => self.on_reply(replica, cookie, failure),
            Event::ConnectionLost { replica, reason } => self.on_connection_lost(replica, &reason),
            Event::ControlReply { replica, reply } => self.on_control_reply(replica, reply),
            Event::ControlLost { replica, reason } => self.on_control_lost(replica, &reason),
            Event::Compared { token, differing } => self.on_compared(token, differing),
            Event::Pause => self.pause(),
            Event::Resume => self.resume(),
            Event::Shutdown => self.shutdown(),
            Event::Tick => self.check_deadlines(),
        }
        loop {
            while let Some(id) = self.ready.pop_front() {
                self.settle(id);
            }
            self.advance_barrier();
            self.advance_compare();
            if self.ready.is_empty() {
                break;
            }
        }
    }

    /// What is to be done since the last call, in this order.
    pub fn take_outputs(&mut self, into: &mut Vec<Output>) {
        into.append(&mut self.outputs);
    }

    /// Whether there is something to be done.
    pub fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// After how long [`Event::Tick`] is due, unless something happens before.
    pub fn next_tick(&self) -> Option<Duration> {
        let busy = !self.active.is_empty()
            || self.fence.is_some()
            || self.fault.as_ref().is_some_and(|fault| !fault.expired)
            || self.phase.is_closing();
        match (busy, self.compare_due()) {
            (true, Some(due)) => Some(due.min(limits::TICK)),
            (true, None) => Some(limits::TICK),
            (false, due) => due,
        }
    }

    /// The generation that the controller is told: one that a fence did not reach is none that anybody must have.
    pub fn recorded_generation(&self) -> u64 {
        self.recorded_generation
    }

    pub fn members(&self) -> Set {
        self.members
    }

    pub fn replica_state(&self, replica: usize) -> ReplicaState {
        match (self.members.contains(replica), self.in_sync.contains(replica)) {
            (false, _) => ReplicaState::Dropped,
            (true, true) => ReplicaState::InSync,
            (true, false) => ReplicaState::Comparing,
        }
    }

    /// Why a replica was dropped.
    pub fn replica_error(&self, replica: usize) -> Option<&str> {
        self.errors[replica].as_deref()
    }

    /// No replica is left: what happens to requests now.
    pub fn faulted(&self) -> Option<&'static str> {
        self.fault.as_ref().map(Fault::sentence)
    }

    /// Whether a generation is being recorded; changes are not acknowledged meanwhile.
    pub fn is_fencing(&self) -> bool {
        self.fence.is_some()
    }

    pub fn in_flight(&self) -> usize {
        self.active.len() + self.waiting.len()
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether this replica still owes an answer to that request, and where the bytes of a read go.
    ///
    /// # Errors
    /// When it does not: the replica breaks the protocol.
    pub fn expected(&self, replica: usize, cookie: u64) -> Result<Option<(Payload, usize)>, UnknownCookie> {
        let id = self.find(replica, cookie).ok_or(UnknownCookie)?;
        Ok(self.slots[id].receives(replica, self))
    }
}

/// A reply to nothing that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownCookie;
