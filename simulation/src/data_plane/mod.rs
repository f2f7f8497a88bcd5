//! One volume from the user's request down to the disks, in a seeded fake world.
//!
//! The real core of the engine, its real choice of members and beginning, the real rules of replicas about generations and the
//! real decisions of the volume reconciler act on model disks, processes and networks. Requests and answers are late and change
//! their order; replicas are slow, silent, full, err and die, and lose any part of what was not flushed; engines, holders,
//! instances, controllers and nodes die at any point; nodes are silent or cut off; users attach, detach and move meanwhile.
//!
//! Checked all the while:
//! - an acknowledged change is on every replica that counts as current, for whoever looks at the records then, and under a
//!   generation that every member has recorded; it is what later reads give; flushed ones survive the end of every process;
//! - members that are not compared are equal when an engine begins to serve, except for what users repeat;
//! - what is recorded as clean is equal and on stable storage; a barrier that says `flushed` has nothing left to flush;
//! - a read does not change by itself; a lone stale replica is refused;
//! - when the faults end, nothing waits for ever: the volume serves, or says that it is faulted, and its bytes are on a replica.
//!
//! The one limit that `ARCHITECTURE.md` documents, the hidden fence, ends a run (see `World::is_hidden_fence`) and is counted.

mod begin;
mod check;
mod controller;
mod dice;
mod fault;
mod holder;
mod instance;
mod loss;
mod oracle;
mod replica;
mod rival;
mod serve;
mod user;

use std::collections::BTreeMap;

use engine::core::{Set, Transfer};
use proto::replica::{Reply, Request};

use controller::Controller;
use dice::Dice;
use fault::Fault;
use holder::Attachment;
use oracle::Oracle;
use replica::{Process, Replica};
use rival::Rivalry;
use user::User;

/// Bytes of a block.
const BLOCK: u64 = 512;
/// Blocks of the volume.
const BLOCKS: usize = 20;
/// Blocks that are compared in one step.
const COMPARE_BLOCKS: u64 = 6;
/// Microseconds.
const MILLI: u64 = 1_000;
const SECOND: u64 = 1_000_000;
/// As the instance role sets them.
const REPLICA_TIMEOUT: u64 = 8 * SECOND;
const NO_REPLICA_HOLD: u64 = 30 * SECOND;
const HOLDER_LIMIT: u64 = 60 * SECOND;
/// A run that has not ended after this many events hangs.
const MOST_EVENTS: u32 = 400_000;

/// What a run went through, to see that many of them were worth something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    counts: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub fn add(&mut self, what: &'static str, count: u64) {
        *self.counts.entry(what).or_default() += count;
    }

    pub fn of(&self, what: &'static str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    pub fn join(&mut self, other: &Tally) {
        other.counts.iter().for_each(|(what, count)| self.add(what, *count));
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counts.iter().map(|(what, count)| (*what, *count))
    }
}

/// What is going to happen.
enum Happening {
    /// A request reaches a replica over its data connection.
    Work {
        life: u32,
        replica: usize,
        incarnation: u32,
        number: u64,
        transfer: Transfer,
        bytes: Option<Vec<u64>>,
    },
    Answer {
        life: u32,
        transfer: Transfer,
        bytes: Vec<u64>,
        failure: Option<engine::core::Failure>,
    },
    /// An engine notices that a connection ended.
    DataLost {
        life: u32,
        replica: usize,
        incarnation: u32,
    },
    ControlLost {
        life: u32,
        replica: usize,
        incarnation: u32,
    },
    /// A control request reaches a replica, and its answer an engine; `round` 0 belongs to one that serves.
    Control {
        life: u32,
        round: u32,
        replica: usize,
        incarnation: u32,
        request: Request,
    },
    ControlAnswer {
        life: u32,
        round: u32,
        replica: usize,
        incarnation: u32,
        reply: Option<Reply>,
    },
    Connect {
        life: u32,
        round: u32,
        replica: usize,
        incarnation: u32,
        export: String,
    },
    /// A round of a beginning has lasted too long.
    RoundOver {
        life: u32,
        round: u32,
    },
    Tick {
        life: u32,
    },
    /// A replica that broke its connection was asked for long enough who has it.
    AskOver {
        life: u32,
        place: usize,
    },
    /// The users of a removed node go on.
    RivalStep,
    /// An answer about bytes that were compared a while ago.
    Compared {
        life: u32,
        token: u64,
        differing: Set,
    },
    Resume {
        life: u32,
    },
    NextLife {
        attachment: u32,
    },
    HolderLimit {
        attachment: u32,
        lives: u32,
    },
    ReplicaUp {
        replica: usize,
        incarnation: u32,
    },
    InstancePass {
        node: usize,
    },
    ControllerPass,
    NodeReport {
        node: usize,
    },
    UserStep,
    Fault(Fault),
    FaultsEnd,
}

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Finished,
    Faulted,
    HiddenFence,
}

pub struct Node {
    name: String,
    up: bool,
    /// The control plane does not hear of it.
    silent_until: u64,
    instance_down_until: u64,
    pass_at: Option<u64>,
    removed: bool,
}

struct World {
    dice: Dice,
    now: u64,
    agenda: BTreeMap<(u64, u64), Happening>,
    sequence: u64,
    nodes: Vec<Node>,
    /// Until when two nodes do not reach each other.
    cuts: Vec<Vec<u64>>,
    replicas: Vec<Replica>,
    controller: Controller,
    attachments: Vec<Attachment>,
    next_id: u32,
    user: User,
    rivalry: Rivalry,
    /// By attachment: the highest generation in a record that a later engine of the volume replaced.
    overwritten: BTreeMap<u64, u64>,
    oracle: Oracle,
    faults: bool,
    /// Bytes are compared elsewhere, so the answer comes while other things happen.
    compares_late: bool,
    /// The node of the next attachment is said to be gone while its engine begins.
    removes_at_start: bool,
    /// The replica process whose state of what may differ users have seen; none while all are in sync.
    reader: Option<(usize, u32)>,
    /// From then to then every change fails on every replica.
    full: (u64, u64),
    /// The engine dies after so many further outputs of its core.
    doom: Option<u64>,
    end: Option<End>,
    tally: Tally,
}

/// One run. Panics when a promise is broken.
pub fn run(seed: u64) -> Tally {
    let mut world = World::new(seed);
    let end = world.live();
    world.tally.add("runs", 1);
    world.tally.add(
        match end {
            End::Finished => "finished",
            End::Faulted => "faulted at the end",
            End::HiddenFence => "hidden fences",
        },
        1,
    );
    world.tally
}

impl World {
    fn new(seed: u64) -> World {
        let mut dice = Dice::new(seed);
        let count = [1, 2, 2, 3, 3, 3, 3, 3, 4][dice.below(9)];
        let nodes = count + dice.below(2);
        let node = |n: usize| Node {
            name: format!("n{n}"),
            up: true,
            silent_until: 0,
            instance_down_until: 0,
            pass_at: None,
            removed: false,
        };
        World {
            now: 0,
            agenda: BTreeMap::new(),
            sequence: 0,
            nodes: (0..nodes).map(node).collect(),
            cuts: vec![vec![0; nodes]; nodes],
            replicas: (0..count).map(|r| Replica::new(format!("r{r}"))).collect(),
            controller: Controller::new(count, nodes),
            attachments: vec![],
            next_id: 0,
            user: User::new(&mut dice, nodes),
            rivalry: Rivalry::default(),
            overwritten: BTreeMap::new(),
            oracle: Oracle::new(),
            faults: true,
            compares_late: seed % 4 == 3,
            removes_at_start: false,
            reader: None,
            full: (0, 0),
            doom: None,
            end: None,
            tally: Tally::default(),
            dice,
        }
    }

    fn live(&mut self) -> End {
        self.plan_run();
        for _ in 0..MOST_EVENTS {
            if let Some(end) = self.end {
                return end;
            }
            let Some(((at, _), what)) = self.agenda.pop_first() else {
                panic!("nothing happens any more: {}", self.state())
            };
            self.now = at;
            self.happen(what);
        }
        panic!("no end: {}", self.state())
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Work { life, replica, incarnation, number, transfer, bytes } => {
                self.work(life, replica, incarnation, number, transfer, bytes);
            }
            Happening::Answer { life, transfer, bytes, failure } => self.take_answer(life, &transfer, &bytes, failure),
            Happening::DataLost { life, replica, incarnation } => self.data_lost(life, replica, incarnation),
            Happening::ControlLost { life, replica, incarnation } => self.control_lost(life, replica, incarnation),
            Happening::Control { life, round, replica, incarnation, request } => {
                self.control(life, round, replica, incarnation, request);
            }
            Happening::ControlAnswer { life, round, replica, incarnation, reply } => {
                self.control_answer(life, round, replica, incarnation, reply);
            }
            Happening::Connect { life, round, replica, incarnation, export } => {
                self.connect(life, round, replica, incarnation, &export);
            }
            Happening::RoundOver { life, round } => self.round_over(life, round),
            Happening::Tick { life } => self.tick(life),
            Happening::AskOver { life, place } => self.give_up(life, place),
            Happening::RivalStep => self.rival_step(),
            Happening::Compared { life, token, differing } => {
                self.tell(life, engine::core::Event::Compared { token, differing });
            }
            Happening::Resume { life } => self.tell(life, engine::core::Event::Resume),
            Happening::NextLife { attachment } => self.next_life(attachment),
            Happening::HolderLimit { attachment, lives } => self.holder_limit(attachment, lives),
            Happening::ReplicaUp { replica, incarnation } => self.replica_up(replica, incarnation),
            Happening::InstancePass { node } => self.instance_pass(node),
            Happening::ControllerPass => self.controller_pass(),
            Happening::NodeReport { node } => self.node_report(node),
            Happening::UserStep => self.user_step(),
            Happening::Fault(fault) => self.fault(fault),
            Happening::FaultsEnd => self.end_faults(),
        }
    }

    fn at(&mut self, at: u64, what: Happening) {
        self.sequence += 1;
        self.agenda.insert((at.max(self.now), self.sequence), what);
    }

    fn after(&mut self, wait: u64, what: Happening) {
        self.at(self.now + wait, what);
    }

    /// When a message between two nodes arrives: soon, or some time after they reach each other again.
    fn arrival(&mut self, from: usize, to: usize, not_before: u64) -> u64 {
        let open = self.cuts[from][to].max(self.now).max(not_before);
        let slow = if self.dice.percent(4) { 20 * MILLI } else { 400 };
        open + self.dice.upto(slow)
    }

    /// A short description for whoever looks at a failed run.
    fn state(&self) -> String {
        let status = self.controller.volume.status.clone().unwrap_or_default();
        let ready = api::condition::find(&status.conditions, "Ready").cloned().unwrap_or_default();
        let replica = |r: &Replica| {
            let Replica { name, record, process, export, lossy, .. } = r;
            let (generation, members, clean) = (record.generation, &record.members, record.clean);
            format!("{name}: {process:?} {generation}{members:?} clean {clean} export {export:?} lossy {lossy}")
        };
        let replicas: Vec<String> = self.replicas.iter().map(replica).collect();
        let attachments: Vec<String> = self.attachments.iter().map(Attachment::describe).collect();
        format!(
            "at {} s wished on `{}`, {:?} {:?}: {}; user {}; {attachments:?}; {replicas:?}",
            self.now / SECOND,
            self.controller.volume.spec.node_id,
            status.state,
            status.robustness,
            ready.message,
            self.user.describe(),
        )
    }
}

fn micros(time: u64) -> std::time::Duration {
    std::time::Duration::from_micros(time)
}

fn is_up(replica: &Replica) -> bool {
    replica.process == Process::Up
}
