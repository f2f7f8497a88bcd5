//! Requests: the range lock, the fan-out, and the judgement of the answers.

use std::time::Duration;

use super::{ControlReply, Core, Failure, Operation, Output, Payload, Set, Submission, Transfer};

/// Whose request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Client(u64),
    BarrierFlush,
    CompareFlush,
    CompareStep,
}

/// A place for one request. The serial number in the cookie tells a late answer from one to the place's next tenant.
pub(super) struct Slot {
    pub(super) live: bool,
    pub(super) serial: u32,
    pub(super) purpose: Purpose,
    pub(super) operation: Operation,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) piece_start: u64,
    pub(super) piece_length: u64,
    pub(super) payload: Option<Payload>,
    /// Replicas that were asked, that still owe an answer, that answered with an error.
    pub(super) asked: Set,
    pub(super) pending: Set,
    pub(super) failed: Set,
    pub(super) failure: Failure,
    pub(super) sent_at: Duration,
}

impl Slot {
    fn excludes(&self) -> bool {
        self.operation != Operation::Read || self.purpose == Purpose::CompareStep
    }

    fn changes_bytes(&self) -> bool {
        matches!(self.operation, Operation::Write | Operation::Zero { .. })
    }

    /// Where a replica's read reply goes, and its length.
    pub(super) fn receives(&self, replica: usize, core: &Core) -> Option<(Payload, usize)> {
        if self.operation != Operation::Read {
            return None;
        }
        let payload = match self.purpose {
            Purpose::CompareStep => Some(core.scratch(replica)),
            _ => self.payload,
        };
        payload.map(|payload| (payload, self.piece_length as usize))
    }
}

impl Core {
    pub(super) fn submit(&mut self, submission: Submission) {
        let Submission { tag, operation, offset, length, payload } = submission;
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.options.size_bytes);
        let carries = matches!(operation, Operation::Read | Operation::Write);
        if !fits || carries != payload.is_some() {
            self.outputs.push(Output::Complete { tag, result: Err(Failure::Invalid) });
            return;
        }
        match operation {
            Operation::Read => {
                self.counters.read_ops += 1;
                self.counters.read_bytes += length;
            }
            Operation::Flush => self.counters.flush_ops += 1,
            Operation::Write | Operation::Zero { .. } => {
                self.counters.write_ops += 1;
                self.counters.write_bytes += length;
            }
        }
        if length == 0 && operation != Operation::Flush {
            self.outputs.push(Output::Complete { tag, result: Ok(()) });
            return;
        }
        let (start, end) = if operation == Operation::Flush { (0, 0) } else { (offset, offset + length) };
        let id = self.allocate(Purpose::Client(tag), operation, start, end, payload);
        self.admit(id);
    }

    pub(super) fn allocate(
        &mut self,
        purpose: Purpose,
        operation: Operation,
        start: u64,
        end: u64,
        payload: Option<Payload>,
    ) -> usize {
        let id = self.free.pop().unwrap_or(self.slots.len());
        let serial = self.slots.get(id).map_or(0, |slot| slot.serial.wrapping_add(1));
        let slot = Slot {
            live: true,
            serial,
            purpose,
            operation,
            start,
            end,
            piece_start: start,
            piece_length: 0,
            payload,
            asked: Set::EMPTY,
            pending: Set::EMPTY,
            failed: Set::EMPTY,
            failure: Failure::Io,
            sent_at: self.clock,
        };
        if id == self.slots.len() {
            self.slots.push(slot);
        } else {
            self.slots[id] = slot;
        }
        id
    }

    /// Starts a request, or lets it wait for its range or the end of a barrier.
    pub(super) fn admit(&mut self, id: usize) {
        let own = self.slots[id].purpose == Purpose::BarrierFlush;
        if !own && (!self.phase.admits() || self.blocked(id, self.waiting.len())) {
            self.counters.waited_ops += 1;
            self.waiting.push_back(id);
        } else {
            self.active.push(id);
            self.launch(id);
        }
    }

    /// Whether something that is active, or that waits before it, overlaps.
    fn blocked(&self, id: usize, ahead: usize) -> bool {
        let slot = &self.slots[id];
        let clashes = |other: &usize| {
            let other = &self.slots[*other];
            slot.start < other.end && other.start < slot.end && (slot.excludes() || other.excludes())
        };
        slot.operation != Operation::Flush
            && (self.active.iter().any(clashes) || self.waiting.iter().take(ahead).any(clashes))
    }

    pub(super) fn start_waiting(&mut self) {
        let mut at = 0;
        while self.phase.admits() && at < self.waiting.len() {
            let id = self.waiting[at];
            if self.blocked(id, at) {
                at += 1;
            } else {
                self.waiting.remove(at);
                self.active.push(id);
                self.launch(id);
            }
        }
    }

    fn launch(&mut self, id: usize) {
        if self.members.is_empty() {
            // Judged as soon as the event is over: held for a while, then failed.
            return self.ready.push_back(id);
        }
        match self.slots[id].purpose {
            Purpose::CompareStep => self.launch_step(id),
            _ => self.send_piece(id),
        }
    }

    /// Sends the current piece of a request to those that are to have it.
    fn send_piece(&mut self, id: usize) {
        let slot = &self.slots[id];
        let targets = match slot.operation {
            Operation::Read => match self.reader_except(slot.failed) {
                Some(replica) => Set::only(replica),
                None => return self.finish(id, Err(self.slots[id].failure)),
            },
            _ => self.members,
        };
        let piece = slot.end - slot.piece_start;
        let piece = match slot.operation {
            Operation::Zero { .. } => piece.min(self.options.zero_piece_bytes),
            _ => piece,
        };
        self.transfer(id, targets, slot.operation, slot.payload, piece);
    }

    /// Sends one piece to a set of replicas; all of them owe an answer then.
    pub(super) fn transfer(
        &mut self,
        id: usize,
        targets: Set,
        operation: Operation,
        payload: Option<Payload>,
        length: u64,
    ) {
        let slot = &mut self.slots[id];
        slot.operation = operation;
        slot.piece_length = length;
        (slot.asked, slot.pending) = (targets, targets);
        slot.sent_at = self.clock;
        let cookie = u64::from(slot.serial) << 32 | id as u64;
        let (offset, length) = (slot.piece_start, length as u32);
        let payload = payload.filter(|_| operation == Operation::Write);
        for replica in targets.iter() {
            self.outputs.push(Output::Send(Transfer { replica, cookie, operation, offset, length, payload }));
        }
    }

    pub(super) fn cookie(&self, id: usize) -> u64 {
        u64::from(self.slots[id].serial) << 32 | id as u64
    }

    pub(super) fn find(&self, replica: usize, cookie: u64) -> Option<usize> {
        let id = cookie as u32 as usize;
        let slot = self.slots.get(id)?;
        (slot.live && slot.serial == (cookie >> 32) as u32 && slot.pending.contains(replica)).then_some(id)
    }

    pub(super) fn on_reply(&mut self, replica: usize, cookie: u64, failure: Option<Failure>) {
        let Some(id) = self.find(replica, cookie) else {
            // From a replica that was dropped meanwhile, or one that breaks the protocol.
            return self.on_connection_lost(replica, "it answered a request that it was not asked");
        };
        let slot = &mut self.slots[id];
        slot.pending = slot.pending.without(Set::only(replica));
        if let Some(failure) = failure {
            slot.failed = slot.failed.with(Set::only(replica));
            slot.failure = failure;
        }
        if slot.pending.is_empty() {
            self.ready.push_back(id);
        }
    }

    /// Everybody who was asked has answered or is gone.
    pub(super) fn settle(&mut self, id: usize) {
        let slot = &self.slots[id];
        if !slot.live || !slot.pending.is_empty() || self.held.contains(&id) {
            return;
        }
        if self.members.is_empty() {
            if self.fault.as_ref().is_none_or(|fault| fault.expired) {
                self.note_lost_changes([id]);
                self.finish(id, Err(Failure::Io));
            }
            return;
        }
        match (slot.purpose, slot.operation) {
            (Purpose::CompareStep, _) => self.settle_step(id),
            (_, Operation::Read) => self.settle_read(id),
            _ => self.settle_change(id),
        }
    }

    fn settle_read(&mut self, id: usize) {
        let slot = &self.slots[id];
        let gone = slot.asked.and(self.members).is_empty();
        if gone || !slot.asked.and(slot.failed).is_empty() {
            // The next one; when all of them fail it is the caller's error.
            return self.send_piece(id);
        }
        let (failed, served_by) = (slot.failed.and(self.members), slot.asked.lowest());
        if !failed.is_empty() {
            self.drop_replicas(failed, served_by, "it answered a read with an error that another replica did not have");
        }
        self.finish(id, Ok(()));
    }

    fn settle_change(&mut self, id: usize) {
        if self.fence.is_some() {
            return self.held.push(id);
        }
        let slot = &self.slots[id];
        assert!(
            self.members.without(slot.asked).is_empty(),
            "a change was sent to every member, and members never join"
        );
        let failed = slot.failed.and(self.members);
        if failed.is_empty() {
            let next = slot.piece_start + slot.piece_length;
            if next < slot.end {
                self.slots[id].piece_start = next;
                return self.send_piece(id);
            }
            return self.finish(id, Ok(()));
        }
        if failed == self.members {
            let (failure, start, end) = (slot.failure, slot.piece_start, slot.end);
            if start < end && self.members.len() > 1 {
                // Some may have stored a part of it; also of what was not sent, when this repeats what an earlier engine had sent.
                self.compare_range(start, end);
            }
            return self.finish(id, Err(failure));
        }
        self.slots[id].failed = Set::EMPTY;
        self.drop_replicas(failed, None, "it answered a change with an error that other replicas did not have");
        self.held.push(id);
    }

    pub(super) fn finish(&mut self, id: usize, result: Result<(), Failure>) {
        self.active.retain(|other| *other != id);
        let slot = &mut self.slots[id];
        slot.live = false;
        let (purpose, changes) = (slot.purpose, slot.operation != Operation::Read);
        self.free.push(id);
        match purpose {
            Purpose::Client(tag) => {
                // Invariant 5.
                let fenced = self.fence.is_none() && !self.members.is_empty();
                assert!(!changes || result.is_err() || fenced, "a change is acknowledged only after the fence");
                self.outputs.push(Output::Complete { tag, result });
            }
            Purpose::BarrierFlush => self.barrier_flushed(result.is_ok()),
            Purpose::CompareFlush => self.compare_flushed(result.is_ok()),
            Purpose::CompareStep => self.step_over(),
        }
        self.start_waiting();
    }

    /// These fail for want of replicas.
    ///
    /// Their user does not repeat them, and each replica may have stored a change or not, if not from this engine then from an
    /// earlier one. Replicas that were only silent may be members again in a next life.
    fn note_lost_changes(&mut self, requests: impl IntoIterator<Item = usize>) {
        if requests.into_iter().any(|id| self.slots[id].changes_bytes()) {
            self.outputs.push(Output::MayDiffer);
        }
    }

    /// Fails everything that is there, when no replica is left.
    pub(super) fn fail_everything(&mut self) {
        self.held.clear();
        self.active.extend(std::mem::take(&mut self.waiting));
        let all = self.active.clone();
        self.note_lost_changes(all.iter().copied());
        for id in all {
            self.finish(id, Err(Failure::Io));
        }
    }

    pub(super) fn on_control_reply(&mut self, replica: usize, reply: ControlReply) {
        let Some(generation) = self.controls[replica].pop_front() else { return };
        match reply {
            _ if self.phase.is_closing() => self.on_closed(replica, reply == ControlReply::Done),
            ControlReply::Done => self.on_fenced(replica, generation),
            ControlReply::Refused(message) => {
                let reason = format!("it refused generation {generation}: {message}");
                self.drop_replicas(Set::only(replica), None, &reason);
            }
        }
    }

    pub(super) fn on_control_lost(&mut self, replica: usize, reason: &str) {
        self.controls[replica].clear();
        if self.phase.is_closing() {
            self.on_closed(replica, false);
        } else {
            let reason = format!("it could not be told about a new generation: {reason}");
            self.drop_replicas(Set::only(replica), None, &reason);
        }
    }
}

#[cfg(test)]
impl super::Event {
    pub(super) fn write(tag: u64, offset: u64, length: u64, buffer: u32) -> super::Event {
        let payload = Some(Payload { buffer: super::BufferId(buffer), start: 0 });
        super::Event::Submit(Submission { tag, operation: Operation::Write, offset, length, payload })
    }

    pub(super) fn read(tag: u64, offset: u64, length: u64, buffer: u32) -> super::Event {
        let payload = Some(Payload { buffer: super::BufferId(buffer), start: 0 });
        super::Event::Submit(Submission { tag, operation: Operation::Read, offset, length, payload })
    }
}
