//! An engine that serves: does what its core wants done, as `engine::process` does, with processes and networks that may fail.

use std::time::Duration;

use engine::core::{
    BufferId, ControlReply, ControlRequest, Core, Event, Failure, Operation, Options, Output, ReplicaState, Set,
    Transfer,
};
use engine::process::choice::{Choice, Known};
use proto::replica::{Reply, Request};

use super::begin::{Life, Stage};
use super::holder::{Attachment, Told};
use super::{
    BLOCK, BLOCKS, COMPARE_BLOCKS, Happening, MILLI, NO_REPLICA_HOLD, REPLICA_TIMEOUT, SECOND, World, is_up, micros,
};

pub struct Serving {
    pub core: Core,
    since: u64,
    /// The replica process that each data connection leads to.
    pub links: Vec<Option<u32>>,
    /// Requests sent to replicas are numbered, so that a tail of them can be lost with a connection.
    sent: u64,
    pub buffers: Vec<Vec<u64>>,
    pub free: Vec<usize>,
    pub unanswered: Vec<u32>,
    /// By place: what the core is told of a replica unless a newer attachment has it.
    pub lost: Vec<Vec<Event>>,
    /// When the replica at this place was asked who has it, and which said that no newer attachment does.
    pub asked_at: Vec<u64>,
    pub told: Set,
    /// It goes on without a replica, which another engine may take without its knowledge.
    pub blind: bool,
    tick_at: Option<u64>,
    /// What all members have recorded; none while a fence is under way.
    pub recorded: Option<(u64, Set)>,
    pub nbd_changed: bool,
    /// Replicas may differ, so another one to read from may give another state of what was in flight at an unclean end.
    comparing: bool,
    ended: Option<bool>,
    outputs: Vec<Output>,
}

impl World {
    pub(super) fn begin_to_serve(&mut self, a: usize, choice: Choice, links: Vec<Option<u32>>) {
        let Choice { generation, members, compare, .. } = choice;
        let (id, first_life) =
            (self.attachments[a].life.as_ref().expect("it begins").id, self.attachments[a].lives == 0);
        if self.check_start(a, generation, members, compare) {
            return;
        }
        let now = self.now;
        let attachment = &mut self.attachments[a];
        let config = &attachment.config;
        let count = config.replicas.len();
        let names = members.iter().map(|m| config.names[m].clone()).collect();
        let core = Core::new(Options {
            size_bytes: BLOCKS as u64 * BLOCK,
            generation,
            replicas: count,
            members,
            read_from: config.read_from,
            compare,
            replica_timeout: Duration::from_micros(REPLICA_TIMEOUT),
            no_replica_hold: Duration::from_micros(NO_REPLICA_HOLD),
            scratch: (0..count as u32).map(BufferId).collect(),
            compare_step_bytes: COMPARE_BLOCKS * BLOCK,
            zero_piece_bytes: 4 * BLOCK,
        });
        let serving = Serving {
            core,
            since: now,
            links,
            sent: 0,
            buffers: vec![vec![0; COMPARE_BLOCKS as usize]; count],
            free: vec![],
            unanswered: vec![0; count],
            lost: vec![vec![]; count],
            asked_at: vec![0; count],
            told: Set::EMPTY,
            blind: members.len() < count,
            tick_at: None,
            recorded: Some((generation, members)),
            nbd_changed: false,
            comparing: compare,
            ended: None,
            outputs: vec![],
        };
        // The members must be remembered before anything is acknowledged.
        attachment.known = Some(Known { generation, members: names });
        attachment.recorded = generation;
        let again = attachment.served;
        attachment.served = true;
        attachment.life.as_mut().expect("it begins").stage = Stage::Serving(Box::new(serving));
        self.tally.add("engines that served", 1);
        self.tally.add(if first_life { "attachments" } else { "engines that took over" }, 1);
        self.hear(a);
        self.notice_losses(a);
        self.obey(id);
        if again {
            self.resend(id);
        }
        if self.of_life(id).is_some_and(|a| !self.attachments[a].mounted) {
            // The kernel says at once that nobody is there any more.
            self.tell(id, Event::Shutdown);
        }
        self.wake_user();
    }

    pub(super) fn serving(&mut self, life: u32) -> Option<(usize, &mut Serving)> {
        let a = self.of_life(life)?;
        match &mut self.attachments[a].life.as_mut()?.stage {
            Stage::Serving(serving) => Some((a, serving)),
            Stage::Beginning(_) => None,
        }
    }

    /// Passes an event on and does what follows from it.
    pub(super) fn tell(&mut self, life: u32, event: Event) {
        self.pass_on(life, event);
        self.obey(life);
    }

    /// The replica process that serves at this place is still the one that the engine is connected to.
    pub(super) fn is_connected(&self, a: usize, place: usize) -> bool {
        let replica = self.attachments[a].config.replicas[place];
        let link = self.attachments[a].serving().and_then(|serving| serving.links[place]);
        link == Some(self.replicas[replica].incarnation)
    }

    fn pass_on(&mut self, life: u32, event: Event) {
        let now = self.now;
        if let Some((_, serving)) = self.serving(life) {
            serving.core.handle(micros(now - serving.since), event);
        }
    }

    /// Does what the core wants done, in its order.
    fn obey(&mut self, life: u32) {
        let mut told = false;
        loop {
            let Some((_, serving)) = self.serving(life) else { return };
            let mut outputs = std::mem::take(&mut serving.outputs);
            serving.core.take_outputs(&mut outputs);
            if outputs.is_empty() {
                break;
            }
            for output in outputs.drain(..) {
                if self.doom == Some(0) {
                    self.doom = None;
                    return self.kill_engine(life);
                }
                self.doom = self.doom.map(|left| left - 1);
                told |= output == Output::StatusChanged;
                self.obey_one(life, output);
            }
            let Some((_, serving)) = self.serving(life) else { return };
            serving.outputs = outputs;
        }
        let Some((a, serving)) = self.serving(life) else { return };
        if let Some(clean) = serving.ended {
            self.check_end(a, clean);
            self.attachments[a].clean = clean;
            self.hear(a);
            return self.end_life(a, true);
        }
        if told {
            self.hear(a);
        }
        self.plan_tick(life);
    }

    fn plan_tick(&mut self, life: u32) {
        let now = self.now;
        let Some((_, serving)) = self.serving(life) else { return };
        let Some(due) = serving.core.next_tick() else { return };
        let at = now + due.as_micros() as u64;
        if serving.tick_at.is_none_or(|planned| planned > at) {
            serving.tick_at = Some(at);
            self.at(at, Happening::Tick { life });
        }
    }

    pub(super) fn tick(&mut self, life: u32) {
        let now = self.now;
        let Some((_, serving)) = self.serving(life) else { return };
        if serving.tick_at == Some(now) {
            serving.tick_at = None;
            self.tell(life, Event::Tick);
        }
    }

    fn obey_one(&mut self, life: u32, output: Output) {
        let Some((a, serving)) = self.serving(life) else { return };
        match output {
            Output::Send(transfer) => self.send(a, &transfer),
            Output::Control { replica, request } => {
                if matches!(request, ControlRequest::Fence { .. }) {
                    serving.recorded = None;
                    self.tally.add("fence requests", 1);
                }
                self.send_core_control(a, replica, request);
            }
            Output::Drop { replica: place, reason } => {
                self.check_drop(a, place, &reason);
                let Some((a, serving)) = self.serving(life) else { return };
                (serving.links[place], serving.recorded) = (None, None);
                serving.lost[place].clear();
                serving.blind = true;
                let is_comparing = serving.comparing;
                self.tally.add("replicas dropped", 1);
                let life = self.attachments[a].life.take().expect("it serves");
                let replica = self.attachments[a].config.replicas[place];
                self.cut_connection(&life, place, replica);
                self.attachments[a].life = Some(life);
                if is_comparing {
                    self.reads_come_from(a);
                }
            }
            Output::Record { generation, members } => {
                serving.recorded = Some((generation, members));
                self.check_recorded(a, generation, members);
                let attachment = &mut self.attachments[a];
                attachment.recorded = generation;
                let members = members.iter().map(|m| attachment.config.names[m].clone()).collect();
                attachment.known = Some(Known { generation, members });
                self.tally.add("fences", 1);
            }
            Output::MayDiffer => {
                serving.comparing = true;
                self.attachments[a].differ = true;
                self.reads_come_from(a);
            }
            Output::Equal => {
                serving.comparing = false;
                let may_lose = serving.nbd_changed;
                if !may_lose {
                    self.attachments[a].differ = false;
                }
                self.reader = None;
                self.tally.add("comparisons finished", 1);
                if may_lose && self.faults && self.dice.percent(30) {
                    // What an NBD client has in flight is not repeated: all may differ again.
                    self.doom = Some(self.dice.upto(30));
                }
            }
            Output::Compare { token, length, pinned, others } => {
                let count = (length as u64 / BLOCK) as usize;
                let bytes = |buffer: BufferId| &serving.buffers[buffer.0 as usize][..count];
                let differing = others.iter().filter(|(_, buffer)| bytes(*buffer) != bytes(pinned));
                let differing = differing.fold(Set::EMPTY, |set, (replica, _)| set.with(Set::only(*replica)));
                if !differing.is_empty() {
                    self.tally.add("repairs", 1);
                }
                if self.compares_late {
                    let wait = self.dice.upto(2 * MILLI);
                    return self.after(wait, Happening::Compared { life, token, differing });
                }
                self.pass_on(life, Event::Compared { token, differing });
            }
            Output::Complete { tag, result } => self.complete(a, tag, result),
            Output::Paused { flushed } => {
                self.check_barrier(a, flushed);
                let wait = self.dice.upto(5 * MILLI);
                self.after(wait, Happening::Resume { life });
            }
            Output::Ended { clean } => serving.ended = Some(clean),
            Output::StatusChanged => {}
        }
    }

    /// Replicas may differ: the pinned one alone decides what users see of what was in flight at an unclean end. When it is lost
    /// before the others were repaired, they see what another one holds (`ARCHITECTURE.md`, "the lost reader").
    fn reads_come_from(&mut self, a: usize) {
        let Some(serving) = self.attachments[a].serving() else { return };
        let is_pinned = |place: &usize| serving.core.replica_state(*place) == ReplicaState::InSync;
        let Some(place) = serving.core.members().iter().find(is_pinned) else { return };
        let replica = self.attachments[a].config.replicas[place];
        self.set_reader(replica);
    }

    fn send(&mut self, a: usize, transfer: &Transfer) {
        let node = self.attachments[a].node;
        let replica = self.attachments[a].config.replicas[transfer.replica];
        let at = self.arrival(node, self.node_of(replica), 0);
        let life = self.attachments[a].life.as_mut().expect("it serves");
        let Stage::Serving(serving) = &mut life.stage else { return };
        let incarnation = serving.links[transfer.replica].expect("a request to a replica that was dropped");
        let bytes = transfer.payload.map(|payload| {
            let count = (u64::from(transfer.length) / BLOCK) as usize;
            serving.buffers[payload.buffer.0 as usize][..count].to_vec()
        });
        serving.sent += 1;
        let (life, number, transfer) = (life.id, serving.sent, *transfer);
        self.at(at, Happening::Work { life, replica, incarnation, number, transfer, bytes });
    }

    pub(super) fn work(
        &mut self,
        life: u32,
        replica: usize,
        incarnation: u32,
        number: u64,
        transfer: Transfer,
        bytes: Option<Vec<u64>>,
    ) {
        let now = self.now;
        let target = &self.replicas[replica];
        // Its export was ended, or the request was still on the way out when the connection ended.
        let is_cut = target.cut.is_some_and(|(cut, last)| cut == life && number > last);
        if target.incarnation != incarnation || target.client != Some(life) || is_cut {
            return;
        }
        if target.stopped_until > now {
            let at = target.stopped_until + self.dice.upto(MILLI);
            return self.at(at, Happening::Work { life, replica, incarnation, number, transfer, bytes });
        }
        let slow = target.slow_until > now;
        let changes = transfer.operation != Operation::Read;
        let full = changes && (self.full.0..self.full.1).contains(&now);
        let errs = target.erring_until > now && self.dice.percent(30);
        let failure = if full { Some(Failure::NoSpace) } else { errs.then_some(Failure::Io) };
        let takes = self.dice.upto(if slow { 300 * MILLI } else { 300 });
        self.rival_reached(replica, bytes.as_ref());
        let (target, dice) = (&mut self.replicas[replica], &mut self.dice);
        let bytes = target.work(&transfer, bytes, now, now + takes, failure, dice);
        let Some(a) = self.of_life(life) else { return };
        let at = self.arrival(self.node_of(replica), self.attachments[a].node, now + takes);
        self.at(at, Happening::Answer { life, transfer, bytes, failure });
    }

    pub(super) fn take_answer(&mut self, life: u32, transfer: &Transfer, bytes: &[u64], failure: Option<Failure>) {
        let Some((_, serving)) = self.serving(life) else { return };
        let (replica, cookie) = (transfer.replica, transfer.cookie);
        if serving.links[replica].is_none() {
            return;
        }
        let place = serving.core.expected(replica, cookie).expect("the replica was asked");
        if let (Some((payload, _)), None) = (place, failure) {
            serving.buffers[payload.buffer.0 as usize][..bytes.len()].copy_from_slice(bytes);
        }
        self.tell(life, Event::Reply { replica, cookie, failure });
    }

    fn send_core_control(&mut self, a: usize, place: usize, request: ControlRequest) {
        let (node, replica) = (self.attachments[a].node, self.attachments[a].config.replicas[place]);
        let names = |a: &Attachment, members: Set| members.iter().map(|m| a.config.names[m].clone()).collect();
        let request = match request {
            ControlRequest::Fence { generation, members } => {
                let export = self.attachments[a].life.as_ref().expect("it serves").exports[place].clone();
                let members = names(&self.attachments[a], members);
                Request::Fence { generation, members, export: export.unwrap_or_default() }
            }
            ControlRequest::Close { generation } => Request::Close { generation },
        };
        let is_reachable = is_up(&self.replicas[replica]) && self.cuts[node][self.node_of(replica)] <= self.now;
        let incarnation = self.replicas[replica].incarnation;
        let life = self.attachments[a].life.as_mut().expect("it serves");
        let id = life.id;
        let Stage::Serving(serving) = &mut life.stage else { return };
        if life.controls[place].is_none() {
            // A connection that ended while it was idle is made again.
            if !is_reachable {
                let reason = "it cannot be reached".to_owned();
                return self.pass_on(id, Event::ControlLost { replica: place, reason });
            }
            life.controls[place] = Some(incarnation);
        }
        serving.unanswered[place] += 1;
        self.send_control(a, 0, place, request);
    }

    pub(super) fn take_control_answer(&mut self, a: usize, place: usize, incarnation: u32, reply: Option<Reply>) {
        let life = self.attachments[a].life.as_mut().expect("it serves");
        let id = life.id;
        let Stage::Serving(serving) = &mut life.stage else { return };
        if serving.links[place].is_none() || life.controls[place] != Some(incarnation) {
            return;
        }
        let Some(left) = serving.unanswered[place].checked_sub(1) else { return };
        serving.unanswered[place] = left;
        let reply = match reply {
            Some(Reply::Done) => ControlReply::Done,
            Some(Reply::Refused { message }) => {
                let reply = ControlReply::Refused(message);
                return self.lose(id, place, Event::ControlReply { replica: place, reply });
            }
            Some(Reply::Status { record, .. }) => return self.take_record(a, place, record.generation),
            None => {
                life.controls[place] = None;
                serving.unanswered[place] = 0;
                self.give_up(id, place);
                return self.tell(id, Event::ControlLost { replica: place, reason: "it ended the connection".into() });
            }
            Some(other) => panic!("an answer of another kind: {other:?}"),
        };
        self.tell(id, Event::ControlReply { replica: place, reply });
    }

    /// The engine's side of a connection ends: what was on its way out may be lost from some request on.
    pub(super) fn cut_connection(&mut self, life: &Life, _place: usize, replica: usize) {
        let Stage::Serving(serving) = &life.stage else { return };
        if self.dice.percent(50) && self.replicas[replica].client == Some(life.id) {
            let last = serving.sent - self.dice.below(8).min(serving.sent as usize) as u64;
            self.replicas[replica].cut = Some((life.id, last));
        }
    }

    pub(super) fn kill_engine(&mut self, life: u32) {
        let Some(a) = self.of_life(life) else { return };
        self.end_life(a, false);
    }

    /// The instance role hears of a change of the engine, a moment later.
    pub(super) fn hear(&mut self, a: usize) {
        let attachment = &mut self.attachments[a];
        let Some(serving) = attachment.serving() else { return };
        let names = attachment.config.names.iter().enumerate();
        let modes: Vec<(String, ReplicaState)> =
            names.map(|(place, name)| (name.clone(), serving.core.replica_state(place))).collect();
        let generation = serving.core.recorded_generation();
        attachment.told = Some(Told { generation, serving: serving.ended.is_none(), modes });
        let node = attachment.node;
        self.wake_instance(node);
    }

    /// Whether the engine holds or fails requests because no replica is left.
    pub(super) fn is_faulted(&self, a: usize) -> bool {
        self.attachments[a].serving().is_some_and(|serving| serving.core.faulted().is_some())
    }

    pub(super) fn shut_down(&mut self, a: usize) {
        let now = self.now;
        let attachment = &mut self.attachments[a];
        attachment.mounted = false;
        let asked = *attachment.shutdown_at.get_or_insert(now);
        let life = attachment.life.as_ref().map(|life| life.id);
        let serves = attachment.serving().is_some();
        match life {
            Some(life) if serves => self.tell(life, Event::Shutdown),
            // Noticed when it begins to serve.
            Some(_) => {}
            None if self.attachments[a].holder => {
                self.attachments[a].holder = false;
                self.device_ended(a);
            }
            None => {}
        }
        if now > asked + 40 * SECOND {
            self.attachments[a].holder = false;
        }
    }
}
