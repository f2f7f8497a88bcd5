//! How an engine begins: ask, choose, open, connect, fence.

use api::generations::attachment_of;
use engine::core::Set;
use engine::process::beginning::{Beginning, Next, Round, is_rival};
use engine::process::choice::{Answer, Choice, Claim, Situation, choose};
use proto::replica::{Record, Reply, Request};

use super::holder::Attachment;
use super::serve::Serving;
use super::{HOLDER_LIMIT, Happening, REPLICA_TIMEOUT, World, is_up};

/// One engine process.
pub struct Life {
    pub id: u32,
    pub began: u64,
    /// The replica process that each connection leads to, by place.
    pub controls: Vec<Option<u32>>,
    pub exports: Vec<Option<String>>,
    /// Requests and answers of a control connection keep their order.
    pub control_at: Vec<u64>,
    pub stage: Stage,
}

pub enum Stage {
    Beginning(Start),
    Serving(Box<Serving>),
}

/// A beginning under way.
pub struct Start {
    round: u32,
    waiting: Set,
    answered: Set,
    rival: bool,
    answers: Vec<Option<Answer>>,
    links: Vec<Option<u32>>,
    beginning: Option<Beginning>,
}

impl Start {
    /// The generation of a replica by which the members were chosen.
    fn seen(&self, place: usize) -> u64 {
        self.answers[place].as_ref().map_or(0, |answer| answer.record.generation)
    }
}

impl Attachment {
    /// The generations that replicas answered while the engine begins, as far as it can go by them: an earlier attachment's record
    /// tells nothing about a member that this attachment has opened already without it.
    pub fn answered_generations(&self) -> Vec<u64> {
        let Some(Stage::Beginning(start)) = self.life.as_ref().map(|life| &life.stage) else { return vec![] };
        let answers =
            || start.answers.iter().zip(&self.config.names).filter_map(|(a, name)| Some((&a.as_ref()?.record, name)));
        let Some((top, _)) = answers().max_by_key(|(record, _)| record.generation) else { return vec![] };
        let counts = |record: &Record, name: &String| {
            attachment_of(record.generation) == attachment_of(top.generation) || top.members.contains(name)
        };
        answers().filter(|(record, name)| counts(record, name)).map(|(record, _)| record.generation).collect()
    }

    pub fn describe(&self) -> String {
        let stage = match self.life.as_ref().map(|life| &life.stage) {
            None => "no engine".to_owned(),
            Some(Stage::Beginning(start)) => format!("round {} waits for {:?}", start.round, start.waiting),
            Some(Stage::Serving(serving)) => {
                format!("serves with {:?}, {} in flight", serving.core.members(), serving.core.in_flight())
            }
        };
        let Attachment { node, lives, holder, mounted, device, shutdown_at, disowned, .. } = self;
        format!(
            "n{node}: {stage}; life {lives}, holder {holder}, mounted {mounted}, device {device}, shutdown {shutdown_at:?}, disowned {disowned}"
        )
    }
}

impl World {
    pub(super) fn of_life(&self, life: u32) -> Option<usize> {
        self.attachments.iter().position(|a| a.life.as_ref().is_some_and(|l| l.id == life))
    }

    pub(super) fn of_attachment(&self, id: u32) -> Option<usize> {
        self.attachments.iter().position(|a| a.id == id)
    }

    pub(super) fn next_life(&mut self, attachment: u32) {
        let Some(a) = self.of_attachment(attachment) else { return };
        if !self.attachments[a].holder || self.attachments[a].life.is_some() {
            return;
        }
        self.next_id += 1;
        let id = self.next_id;
        let (now, holder_limit) = (self.now, self.attachments[a].without_engine + HOLDER_LIMIT);
        let attachment = &mut self.attachments[a];
        let count = attachment.config.replicas.len();
        if attachment.lives == 0 {
            (attachment.known, attachment.claim, attachment.differ) = (None, Claim::default(), false);
        }
        let start = Start {
            round: 1,
            waiting: Set::first(count),
            answered: Set::EMPTY,
            rival: false,
            answers: vec![None; count],
            links: vec![None; count],
            beginning: None,
        };
        attachment.life = Some(Life {
            id,
            began: now,
            controls: vec![None; count],
            exports: vec![None; count],
            control_at: vec![0; count],
            stage: Stage::Beginning(start),
        });
        let (attachment, lives) = (attachment.id, attachment.lives);
        self.at(holder_limit, Happening::HolderLimit { attachment, lives });
        self.after(REPLICA_TIMEOUT, Happening::RoundOver { life: id, round: 1 });
        for place in 0..count {
            let replica = self.attachments[a].config.replicas[place];
            let incarnation = self.replicas[replica].incarnation;
            self.attachments[a].life.as_mut().expect("it began").controls[place] = Some(incarnation);
            self.send_control(a, 1, place, Request::Status);
        }
        self.tally.add("engines begun", 1);
    }

    /// Sends a control request over the connection of an engine.
    pub(super) fn send_control(&mut self, a: usize, round: u32, place: usize, request: Request) {
        let (node, replica) = (self.attachments[a].node, self.attachments[a].config.replicas[place]);
        let arrival = self.arrival(node, self.node_of(replica), 0);
        let life = self.attachments[a].life.as_mut().expect("it asks");
        let incarnation = life.controls[place].unwrap_or_default();
        let at = arrival.max(life.control_at[place] + 1);
        life.control_at[place] = at;
        let life = life.id;
        self.at(at, Happening::Control { life, round, replica, incarnation, request });
    }

    pub(super) fn node_of(&self, replica: usize) -> usize {
        // Each replica has a node of its own; others may have none.
        replica
    }

    pub(super) fn control(&mut self, life: u32, round: u32, replica: usize, incarnation: u32, request: Request) {
        let stopped = self.replicas[replica].stopped_until;
        if stopped > self.now {
            return self.at(stopped + 1, Happening::Control { life, round, replica, incarnation, request });
        }
        let from = self.node_of(replica);
        let reply = if self.replicas[replica].incarnation != incarnation || !is_up(&self.replicas[replica]) {
            // The connection is refused, or was reset.
            None
        } else {
            let dies = self.faults && self.dice.permille(4);
            let errs = self.replicas[replica].erring_until > self.now && self.dice.percent(30);
            let served = self.replicas[replica].client;
            let before = self.replicas[replica].record.generation;
            let (target, dice) = (&mut self.replicas[replica], &mut self.dice);
            let reply = target.control(&request, self.now, errs, dies, dice);
            self.note_overwritten(life, replica, before);
            let Ok(reply) = reply else {
                self.tally.add("replicas that died in a request", 1);
                return self.kill_replica(replica);
            };
            if let Some(client) = served.filter(|_| self.replicas[replica].client.is_none()) {
                self.tell_data_lost(client, replica);
            }
            Some(reply)
        };
        let Some(a) = self.of_life(life) else { return };
        let arrival = self.arrival(from, self.attachments[a].node, 0);
        let Some(place) = self.place(a, replica) else { return };
        let engine = self.attachments[a].life.as_mut().expect("it asked");
        let at = arrival.max(engine.control_at[place] + 1);
        engine.control_at[place] = at;
        self.at(at, Happening::ControlAnswer { life, round, replica, incarnation, reply });
    }

    /// A record was replaced by a later attachment: nobody else tells of it any more, except whoever replaced it.
    fn note_overwritten(&mut self, life: u32, replica: usize, before: u64) {
        let is_replaced = attachment_of(self.replicas[replica].record.generation) > attachment_of(before);
        if is_replaced && self.of_life(life).is_some_and(|a| !self.attachments[a].disowned) {
            let overwritten = self.overwritten.entry(attachment_of(before)).or_default();
            *overwritten = (*overwritten).max(before);
        }
    }

    pub(super) fn place(&self, a: usize, replica: usize) -> Option<usize> {
        self.attachments[a].config.replicas.iter().position(|other| *other == replica)
    }

    pub(super) fn control_answer(
        &mut self,
        life: u32,
        round: u32,
        replica: usize,
        incarnation: u32,
        reply: Option<Reply>,
    ) {
        let Some(a) = self.of_life(life) else { return };
        let Some(place) = self.place(a, replica) else { return };
        let engine = self.attachments[a].life.as_mut().expect("it asked");
        let Stage::Beginning(start) = &mut engine.stage else {
            return self.take_control_answer(a, place, incarnation, reply);
        };
        if start.round != round || !start.waiting.contains(place) {
            return;
        }
        let mut asks_again = false;
        let is_right = match (start.beginning.as_ref().map(Beginning::round), reply) {
            (None, Some(Reply::Status { record, export, .. })) => {
                start.answers[place] = Some(Answer { record, serves: export.is_some() });
                true
            }
            (Some(Round::Open { .. }), Some(Reply::Opened { export })) => {
                engine.exports[place] = Some(export);
                true
            }
            (Some(Round::Open { .. }), Some(Reply::Refused { .. })) => {
                asks_again = true;
                false
            }
            (Some(Round::Open { generation, members }), Some(Reply::Status { record, export, .. })) => {
                let names: Vec<String> = members.iter().map(|m| self.attachments[a].config.names[m].clone()).collect();
                let start = start_of(&mut self.attachments[a]);
                let seen = start.seen(place);
                start.rival |= is_rival(&record, export.is_some(), generation, &names, seen);
                false
            }
            (Some(Round::Fence { .. }), Some(Reply::Done)) => true,
            _ => false,
        };
        if asks_again {
            return self.send_control(a, round, place, Request::Status);
        }
        self.settle_answer(a, place, is_right);
    }

    pub(super) fn connect(&mut self, life: u32, round: u32, replica: usize, incarnation: u32, export: &str) {
        let target = &self.replicas[replica];
        let stopped = target.stopped_until;
        if stopped > self.now {
            return self
                .at(stopped + 1, Happening::Connect { life, round, replica, incarnation, export: export.into() });
        }
        let serves = target.incarnation == incarnation && is_up(target) && target.export.as_deref() == Some(export);
        let Some(a) = self.of_life(life) else { return };
        let Some(place) = self.place(a, replica) else { return };
        let engine = self.attachments[a].life.as_mut().expect("it connects");
        let Stage::Beginning(start) = &mut engine.stage else { return };
        if start.round != round || !start.waiting.contains(place) {
            return;
        }
        if serves {
            assert!(self.replicas[replica].client.is_none(), "invariant 4: a replica has two writers");
            self.replicas[replica].client = Some(life);
            start.links[place] = Some(incarnation);
        }
        self.settle_answer(a, place, serves);
    }

    /// A replica that was asked in this round is gone.
    pub(super) fn lose_answer(&mut self, a: usize, place: usize) {
        if start_of(&mut self.attachments[a]).waiting.contains(place) {
            self.settle_answer(a, place, false);
        }
    }

    fn settle_answer(&mut self, a: usize, place: usize, is_right: bool) {
        let start = start_of(&mut self.attachments[a]);
        start.waiting = start.waiting.without(Set::only(place));
        if is_right {
            start.answered = start.answered.with(Set::only(place));
        }
        if start.waiting.is_empty() {
            self.finish_round(a);
        }
    }

    pub(super) fn round_over(&mut self, life: u32, round: u32) {
        let Some(a) = self.of_life(life) else { return };
        if matches!(&self.attachments[a].life.as_ref().expect("it begins").stage, Stage::Beginning(s) if s.round == round)
        {
            self.finish_round(a);
        }
    }

    fn finish_round(&mut self, a: usize) {
        if self.faults && self.dice.percent(2) {
            return self.end_life(a, false);
        }
        let attachment = &mut self.attachments[a];
        let (known, differ, lives) = (attachment.known.clone(), attachment.differ, attachment.lives);
        let (mut claim, mut may_differ) = (attachment.claim.clone(), differ);
        let config = attachment.config.clone();
        let start = start_of(attachment);
        let next = match &mut start.beginning {
            None => {
                let situation = Situation {
                    config_generation: config.generation,
                    attachment: config.attachment,
                    config_compare: config.compare,
                    names: &config.names,
                    answers: &start.answers,
                    first_life: lives == 0,
                    known: known.as_ref(),
                    claim: &claim,
                    known_to_differ: differ,
                };
                match choose(&situation) {
                    Ok(choice) => {
                        claim = choice.claim();
                        may_differ |= choice.compare;
                        let beginning = Beginning::new(choice);
                        let round = beginning.round();
                        start.beginning = Some(beginning);
                        Next::Ask(round)
                    }
                    Err(_) => Next::Fail("nobody can be chosen"),
                }
            }
            Some(beginning) => beginning.next(start.answered, start.rival),
        };
        (attachment.claim, attachment.differ) = (claim, may_differ);
        match next {
            Next::Ask(round) => self.ask(a, round),
            Next::Serve(choice) => self.serve(a, choice),
            Next::Fail(why) => {
                if why.contains("at the same time") {
                    self.tally.add("rivals noticed", 1);
                }
                self.end_life(a, false);
            }
        }
    }

    fn ask(&mut self, a: usize, round: Round) {
        let (members, node) = match round {
            Round::Open { members, .. } | Round::Connect { members } | Round::Fence { members, .. } => {
                (members, self.attachments[a].node)
            }
        };
        let start = start_of(&mut self.attachments[a]);
        start.round += 1;
        (start.waiting, start.answered) = (members, Set::EMPTY);
        let number = start.round;
        let config = self.attachments[a].config.clone();
        let names: Vec<String> = members.iter().map(|m| config.names[m].clone()).collect();
        let engine = self.attachments[a].life.as_ref().expect("it begins");
        let (life, exports) = (engine.id, engine.exports.clone());
        self.after(REPLICA_TIMEOUT, Happening::RoundOver { life, round: number });
        for place in members.iter() {
            let export = exports[place].clone().unwrap_or_default();
            match round {
                Round::Open { generation, .. } => {
                    let seen = Some(start_of(&mut self.attachments[a]).seen(place));
                    self.send_control(a, number, place, Request::Open { generation, members: names.clone(), seen });
                }
                Round::Fence { generation, .. } => {
                    self.send_control(a, number, place, Request::Fence { generation, members: names.clone(), export });
                }
                Round::Connect { .. } => {
                    let replica = config.replicas[place];
                    // A new connection reaches whatever process is there.
                    let incarnation = self.replicas[replica].incarnation;
                    let at = self.arrival(node, self.node_of(replica), 0);
                    self.at(at, Happening::Connect { life, round: number, replica, incarnation, export });
                }
            }
        }
    }

    fn serve(&mut self, a: usize, choice: Choice) {
        let attachment = &mut self.attachments[a];
        let start = start_of(attachment);
        let links = std::mem::take(&mut start.links);
        self.begin_to_serve(a, choice, links);
    }
}

fn start_of(attachment: &mut Attachment) -> &mut Start {
    match &mut attachment.life.as_mut().expect("an engine begins").stage {
        Stage::Beginning(start) => start,
        Stage::Serving(_) => panic!("the engine serves already"),
    }
}
