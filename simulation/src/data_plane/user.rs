//! Users: several overlapping requests at a time, and the wishes where the volume is to be attached.

use std::collections::BTreeMap;

use api::volume::{Robustness, VolumeState};
use engine::core::{BufferId, Event, Failure, Operation, Payload, Submission};

use super::dice::Dice;
use super::{BLOCK, BLOCKS, End, Happening, MILLI, SECOND, World};

/// A request that is not answered.
#[derive(Clone, Copy)]
pub struct Request {
    pub operation: Operation,
    pub first: usize,
    pub count: usize,
    pub since: u64,
    buffer: usize,
}

impl Request {
    pub fn blocks(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }

    /// What it writes; all zeroes look alike.
    pub fn value(&self, tag: u64) -> Option<u64> {
        match self.operation {
            Operation::Write => Some(tag),
            Operation::Zero { .. } => Some(0),
            Operation::Read | Operation::Flush => None,
        }
    }
}

pub struct User {
    /// An NBD client rather than the kernel: its unanswered requests are not repeated.
    pub nbd: bool,
    depth: usize,
    pub open: BTreeMap<u64, Request>,
    /// The attachment whose device is in use.
    pub device: Option<u32>,
    next_tag: u64,
    /// Requests that are still to be made before the next wish.
    budget: usize,
    phases: u32,
    /// When the wait for this phase is given up.
    deadline: u64,
    step_at: Option<u64>,
    /// The blocks that are still to be read at the end.
    sweep: Option<usize>,
    detaching: bool,
    faulted_since: Option<u64>,
}

impl User {
    pub fn new(dice: &mut Dice, _nodes: usize) -> User {
        User {
            nbd: dice.percent(15),
            depth: 1 + dice.below(8),
            open: BTreeMap::new(),
            device: None,
            next_tag: 100,
            budget: 0,
            phases: 2 + dice.below(3) as u32,
            deadline: 0,
            step_at: None,
            sweep: None,
            detaching: false,
            faulted_since: None,
        }
    }

    pub fn describe(&self) -> String {
        let User { device, budget, phases, sweep, detaching, .. } = self;
        format!(
            "device {device:?}, {} open, budget {budget}, phases {phases}, sweep {sweep:?}, detaching {detaching}",
            self.open.len()
        )
    }
}

impl World {
    pub(super) fn plan_run(&mut self) {
        for node in 0..self.nodes.len() {
            self.wake_instance(node);
        }
        self.begin_phase();
    }

    pub(super) fn wake_user(&mut self) {
        self.wake_user_in(1);
    }

    fn wake_user_in(&mut self, wait: u64) {
        let at = self.now + wait;
        if self.user.step_at.is_none_or(|planned| planned > at || planned <= self.now) {
            self.user.step_at = Some(at);
            self.at(at, Happening::UserStep);
        }
    }

    /// The next wish.
    fn begin_phase(&mut self) {
        self.user.phases = self.user.phases.saturating_sub(1);
        self.user.deadline = self.now + self.dice.upto(150) * SECOND;
        self.user.budget = 4 + self.dice.below(24);
        if self.user.phases == 0 && self.faults {
            // From now on everything works.
            self.user.phases = 2;
            self.user.budget = 4;
            let wait = self.dice.upto(10 * MILLI);
            self.after(wait, Happening::FaultsEnd);
            return;
        }
        let usable: Vec<usize> = (0..self.nodes.len()).filter(|n| !self.nodes[*n].removed).collect();
        let node = usable[self.dice.below(usable.len())];
        self.wish(Some(node));
        if self.faults && self.dice.percent(40) {
            let most = if self.dice.percent(50) { 300 * MILLI } else { 20 * SECOND };
            let wait = self.dice.upto(most);
            self.plan_fault(wait);
        }
        self.wake_user_in(50 * MILLI);
    }

    pub(super) fn wish(&mut self, node: Option<usize>) {
        let name = node.map(|n| self.nodes[n].name.clone()).unwrap_or_default();
        self.controller.volume.spec.node_id = name;
        self.wake_controller();
    }

    pub(super) fn begin_final(&mut self) {
        self.user.sweep = Some(0);
        self.user.deadline = self.now + 3000 * SECOND;
        self.user.faulted_since = None;
        if self.controller.volume.spec.node_id.is_empty() {
            let node = self.dice.below(self.nodes.len());
            self.wish(Some(node));
        }
        self.user.detaching = false;
        self.wake_user();
    }

    pub(super) fn user_step(&mut self) {
        if self.user.step_at.is_some_and(|at| at > self.now) {
            return;
        }
        self.user.step_at = None;
        match self.user.device {
            Some(device) => self.use_device(device),
            None if self.user.detaching => self.await_detachment(),
            None => self.await_device(),
        }
        if self.end.is_none() && self.user.step_at.is_none() {
            self.wake_user_in(if self.user.device.is_some() { SECOND } else { 100 * MILLI });
        }
    }

    fn await_device(&mut self) {
        if self.is_faulted_for_good() {
            return;
        }
        let is_attached = self.controller.volume.status.as_ref().is_some_and(|s| s.state == VolumeState::Attached);
        let wish = &self.controller.volume.spec.node_id;
        let found = self.attachments.iter().position(|a| {
            self.nodes[a.node].name == *wish && a.device && a.mounted && !a.disowned && a.serving().is_some()
        });
        if let Some(a) = found.filter(|_| is_attached) {
            self.user.device = Some(self.attachments[a].id);
            if self.faults {
                for _ in 0..self.dice.below(4) {
                    let wait = self.dice.upto(12 * MILLI);
                    self.plan_fault(wait);
                }
            }
            return self.wake_user();
        }
        self.give_up_when_late();
    }

    fn give_up_when_late(&mut self) {
        if self.now <= self.user.deadline {
            return;
        }
        assert!(self.faults, "it waits for ever: {}", self.state());
        self.user.detaching = false;
        self.begin_phase();
    }

    /// A volume without a replica that may be used says so, and its bytes are on one of them.
    fn is_faulted_for_good(&mut self) -> bool {
        let is_faulted = self.controller.volume.status.as_ref().is_some_and(|s| s.robustness == Robustness::Faulted);
        if !is_faulted || self.faults {
            self.user.faulted_since = None;
            return false;
        }
        let since = *self.user.faulted_since.get_or_insert(self.now);
        if self.now > since + 120 * SECOND {
            self.check_faulted();
            self.end.get_or_insert(End::Faulted);
        }
        self.end.is_some()
    }

    fn use_device(&mut self, device: u32) {
        let Some(a) = self.of_attachment(device) else { panic!("a device without its attachment") };
        let serves = self.attachments[a].serving().is_some();
        if !serves && self.user.nbd {
            return self.give_up_device_when_late();
        }
        let mut submitted = 0;
        while self.user.device == Some(device) && self.user.open.len() < self.user.depth {
            if self.user.budget > 0 {
                self.user.budget -= 1;
                let request = self.some_request();
                self.submit(device, request);
            } else if let Some(at) = self.user.sweep.filter(|at| *at < BLOCKS) {
                self.user.sweep = Some(at + 5);
                let request = Request { operation: Operation::Read, first: at, count: 5, since: self.now, buffer: 0 };
                self.submit(device, request);
            } else {
                break;
            }
            submitted += 1;
            if self.user.nbd && self.of_attachment(device).is_some_and(|a| self.attachments[a].serving().is_none()) {
                break;
            }
        }
        if submitted == 0 && self.user.open.is_empty() && self.user.device == Some(device) {
            self.close_device();
        } else if self.dice.percent(3) {
            self.wake_user_in(3 * SECOND);
        } else if !self.faults && self.now > self.user.deadline {
            panic!("requests wait for ever: {}", self.state());
        }
    }

    /// A device that does not work any more is left, as a user would do; what was in flight is nobody's.
    fn give_up_device_when_late(&mut self) {
        if self.now > self.user.deadline {
            assert!(self.faults, "the device waits for ever: {}", self.state());
            self.user.open.clear();
            self.close_device();
        }
    }

    /// All that was to be done is done: detach, or ask for another node at once.
    fn close_device(&mut self) {
        self.user.device = None;
        self.user.detaching = true;
        for node in 0..self.nodes.len() {
            self.wake_instance(node);
        }
        if self.faults && self.dice.percent(25) {
            self.user.detaching = false;
            return self.begin_phase();
        }
        self.wish(None);
    }

    fn await_detachment(&mut self) {
        let state = self.controller.volume.status.as_ref().map(|s| s.state).unwrap_or_default();
        let is_busy = self.attachments.iter().any(|a| !a.disowned);
        if state == VolumeState::Detached && !is_busy {
            if self.user.sweep.is_some() {
                self.check_final();
                self.end.get_or_insert(End::Finished);
                return;
            }
            self.user.detaching = false;
            return self.begin_phase();
        }
        if !self.is_faulted_for_good() {
            self.give_up_when_late();
        }
    }

    fn some_request(&mut self) -> Request {
        let operation = match self.dice.below(20) {
            0..8 => Operation::Write,
            8..15 => Operation::Read,
            15..17 => Operation::Zero { allocate: false },
            _ => Operation::Flush,
        };
        let most = if matches!(operation, Operation::Zero { .. }) { 10 } else { 5 };
        let first = self.dice.below(BLOCKS);
        let count = (1 + self.dice.below(most)).min(BLOCKS - first);
        let (first, count) = if operation == Operation::Flush { (0, 0) } else { (first, count) };
        Request { operation, first, count, since: self.now, buffer: 0 }
    }

    fn submit(&mut self, device: u32, request: Request) {
        let tag = self.user.next_tag;
        self.user.next_tag += 1;
        self.user.open.insert(tag, request);
        if let Some(value) = request.value(tag) {
            for block in request.blocks() {
                self.oracle.submit(block, tag, value, self.now);
            }
        }
        self.tally.add("requests", 1);
        let Some(a) = self.of_attachment(device) else { return };
        if let Some(life) = self.attachments[a].serving().and(self.attachments[a].life.as_ref()).map(|life| life.id) {
            self.pass_request(life, tag);
        }
    }

    /// Gives a request to an engine.
    fn pass_request(&mut self, life: u32, tag: u64) {
        let Some(request) = self.user.open.get(&tag).copied() else { return };
        let nbd = self.user.nbd;
        let Some((a, serving)) = self.serving(life) else { return };
        let Request { operation, first, count, .. } = request;
        let carries = matches!(operation, Operation::Read | Operation::Write);
        let mut changed = false;
        if nbd && request.value(tag).is_some() && !serving.nbd_changed {
            (serving.nbd_changed, changed) = (true, true);
        }
        let payload = carries.then(|| {
            let buffer = serving.free.pop().unwrap_or_else(|| {
                serving.buffers.push(vec![]);
                serving.buffers.len() - 1
            });
            serving.buffers[buffer].clear();
            serving.buffers[buffer].resize(count, if operation == Operation::Write { tag } else { u64::MAX });
            Payload { buffer: BufferId(buffer as u32), start: 0 }
        });
        if changed {
            self.attachments[a].differ = true;
        }
        if let Some(payload) = payload {
            self.user.open.get_mut(&tag).expect("it is open").buffer = payload.buffer.0 as usize;
        }
        let (offset, length) = (first as u64 * BLOCK, count as u64 * BLOCK);
        self.tell(life, Event::Submit(Submission { tag, operation, offset, length, payload }));
    }

    /// The kernel repeats what was not answered, in any order.
    pub(super) fn resend(&mut self, life: u32) {
        let Some(a) = self.of_life(life) else { return };
        if self.user.device != Some(self.attachments[a].id) || self.user.nbd {
            return;
        }
        let mut tags: Vec<u64> = self.user.open.keys().copied().collect();
        while !tags.is_empty() {
            let tag = tags.swap_remove(self.dice.below(tags.len()));
            self.tally.add("requests repeated", 1);
            self.pass_request(life, tag);
        }
    }

    pub(super) fn complete(&mut self, a: usize, tag: u64, result: Result<(), Failure>) {
        if super::rival::is_rivals(tag) {
            return self.rival_completed(a, tag, result);
        }
        let id = self.attachments[a].id;
        if self.user.device != Some(id) {
            return;
        }
        let request = self.user.open.remove(&tag).expect("a request is completed once");
        let Some((_, serving)) = self.attachments[a].life.as_ref().map(|life| life.id).and_then(|l| self.serving(l))
        else {
            return;
        };
        let bytes = match request.operation {
            Operation::Read | Operation::Write => {
                serving.free.push(request.buffer);
                serving.buffers[request.buffer].clone()
            }
            _ => vec![],
        };
        match result {
            Ok(()) => self.check_completion(a, tag, &request, &bytes),
            Err(_) => {
                self.tally.add("requests failed", 1);
                request.blocks().for_each(|block| self.oracle.end(block, tag, self.now, None));
            }
        }
        let wait = self.dice.upto(300);
        self.wake_user_in(wait);
    }

    pub(super) fn user_lost_engine(&mut self, a: usize) {
        if self.user.nbd && self.user.device == Some(self.attachments[a].id) {
            // Its connection is gone, and with it what was not answered.
            self.user.open.clear();
        }
    }

    pub(super) fn user_lost_device(&mut self, id: u32) {
        if self.user.device == Some(id) {
            self.tally.add("devices lost", 1);
            self.user.open.clear();
            self.user.device = None;
            self.wake_user();
        }
    }
}
