//! Seeded runs of the core against replicas that are slow, silent, erring, full or dying.
//!
//! Checked at each acknowledgement and each answer to a read, and at the end:
//! - a change that is acknowledged is on every member, and on every member of the highest record that any replica has;
//! - all members have recorded the generation under which it is acknowledged;
//! - a read returns what was written last, or something that was in flight at the time;
//! - members that count as in sync are equal at the end; nothing is left waiting.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const BLOCK: u64 = 512;
const BLOCKS: u64 = 48;
const FOREVER: Duration = Duration::from_secs(1 << 30);

#[derive(Clone, Copy, PartialEq, Debug)]
enum Mood {
    Well,
    Slow,
    Silent,
    Erring,
    Dead,
}

struct Replica {
    blocks: Vec<u64>,
    mood: Mood,
    generation: u64,
    members: Set,
    clean: bool,
    /// When its latest control request arrives, and when it answers it.
    control_at: Duration,
    answer_at: Duration,
}

enum Happening {
    /// A replica works on a request, then answers.
    Work(Transfer, Option<Vec<u64>>),
    Answer(Transfer, Vec<u64>, Option<Failure>),
    Control(usize, ControlRequest),
    ControlAnswer(usize, bool),
    Mood(usize, Mood),
    /// From now on every change fails on every replica, until the time comes.
    Full(Duration),
    Pause,
    Resume,
    Tick,
}

/// What was written to a block: value, when it was submitted, when it was acknowledged.
type Writes = Vec<(u64, Duration, Duration)>;

struct World {
    seed: u64,
    random: StdRng,
    now: Duration,
    core: Core,
    replicas: Vec<Replica>,
    dropped: Set,
    /// What all members have recorded, by the outputs so far; none while a fence is under way.
    recorded: Option<(u64, Set)>,
    agenda: BTreeMap<(Duration, u64), Happening>,
    sequence: u64,
    buffers: BTreeMap<u32, Vec<u64>>,
    history: Vec<Writes>,
    /// Requests in flight: the submission and when it was made.
    open: BTreeMap<u64, (Submission, Duration)>,
    full_until: Duration,
    submitted: u64,
    goal: u64,
    ended: Option<bool>,
}

fn run(seed: u64) -> Counters {
    let mut random = StdRng::seed_from_u64(seed);
    let count = random.random_range(1..=4usize);
    let compare = random.random_bool(0.3);
    let mut replicas = Vec::new();
    let mut history: Vec<Writes> = vec![vec![(0, Duration::ZERO, Duration::ZERO)]; BLOCKS as usize];
    for number in 0..count {
        let mut blocks = vec![0; BLOCKS as usize];
        if compare {
            // What was in flight when the last attachment ended.
            for (at, block) in blocks.iter_mut().enumerate().filter(|_| random.random_bool(0.2)) {
                *block = 1_000_000 + number as u64;
                history[at].push((*block, Duration::ZERO, FOREVER));
            }
        }
        replicas.push(Replica {
            blocks,
            mood: Mood::Well,
            generation: 7,
            members: Set::first(count),
            clean: false,
            control_at: Duration::ZERO,
            answer_at: Duration::ZERO,
        });
    }
    let core = Core::new(Options {
        size_bytes: BLOCKS * BLOCK,
        generation: 7,
        replicas: count,
        members: Set::first(count),
        read_from: random.random_bool(0.5).then(|| random.random_range(0..count)),
        compare,
        replica_timeout: Duration::from_secs(2),
        no_replica_hold: Duration::from_secs(3),
        scratch: (0..count as u32).map(BufferId).collect(),
        compare_step_bytes: 8 * BLOCK,
        zero_piece_bytes: 16 * BLOCK,
    });
    let buffers = (0..count as u32).map(|id| (id, vec![0; 8])).collect();
    let goal = random.random_range(20..200);
    let mut world = World {
        seed,
        random,
        now: Duration::ZERO,
        core,
        replicas,
        dropped: Set::EMPTY,
        recorded: Some((7, Set::first(count))),
        agenda: BTreeMap::new(),
        sequence: 0,
        buffers,
        history,
        open: BTreeMap::new(),
        full_until: Duration::ZERO,
        submitted: 0,
        goal,
        ended: None,
    };
    world.live();
    world.core.counters()
}

impl World {
    fn within(&mut self, most: u64) -> Duration {
        Duration::from_micros(self.random.random_range(1..=most))
    }

    fn later(&mut self, after: Duration, what: Happening) {
        self.sequence += 1;
        self.agenda.insert((self.now + after, self.sequence), what);
    }

    fn live(&mut self) {
        for replica in 0..self.replicas.len() {
            if self.random.random_bool(0.3) {
                let moods = [Mood::Slow, Mood::Silent, Mood::Erring, Mood::Dead, Mood::Dead];
                let mood = moods[self.random.random_range(0..moods.len())];
                let after = self.within(60_000);
                self.later(after, Happening::Mood(replica, mood));
            }
        }
        if self.random.random_bool(0.1) {
            let (after, duration) = (self.within(50_000), self.within(20_000));
            self.later(after, Happening::Full(duration));
        }
        if self.random.random_bool(0.3) {
            let after = self.within(50_000);
            self.later(after, Happening::Pause);
        }
        self.later(Duration::ZERO, Happening::Tick);
        for step in 0.. {
            assert!(step < 200_000, "seed {}: no end, {} requests are left", self.seed, self.open.len());
            while self.submitted < self.goal && self.open.len() < 12 {
                self.submit_something();
            }
            let idle = self.open.is_empty() && self.submitted == self.goal;
            let equal = (0..self.replicas.len()).all(|r| self.core.replica_state(r) != ReplicaState::Comparing);
            if idle && equal && self.ended.is_none() && self.core.in_flight() == 0 {
                self.handle(Event::Resume);
                self.handle(Event::Shutdown);
            }
            if let Some(clean) = self.ended {
                return self.check_end(clean);
            }
            let Some(((at, _), what)) = self.agenda.pop_first() else { panic!("seed {}: stuck", self.seed) };
            self.now = at;
            self.happen(what);
        }
    }

    fn submit_something(&mut self) {
        self.submitted += 1;
        let tag = 100 + self.submitted;
        let offset = self.random.random_range(0..BLOCKS);
        let length = self.random.random_range(1..=(BLOCKS - offset).min(if tag.is_multiple_of(7) { 40 } else { 6 }));
        let operation = match self.random.random_range(0..10) {
            0..4 => Operation::Write,
            4..8 => Operation::Read,
            8 => Operation::Flush,
            _ => Operation::Zero { allocate: false },
        };
        let (offset, length) = if operation == Operation::Flush { (0, 0) } else { (offset * BLOCK, length * BLOCK) };
        let carries = matches!(operation, Operation::Read | Operation::Write);
        let payload = carries.then(|| {
            self.buffers.insert(tag as u32, vec![tag; (length / BLOCK) as usize]);
            Payload { buffer: BufferId(tag as u32), start: 0 }
        });
        let submission = Submission { tag, operation, offset, length, payload };
        self.open.insert(tag, (submission, self.now));
        if let Some(value) = value_of(&submission) {
            for block in blocks_of(&submission) {
                self.history[block].push((value, self.now, FOREVER));
            }
        }
        self.handle(Event::Submit(submission));
    }

    fn handle(&mut self, event: Event) {
        self.core.handle(self.now, event);
        let mut outputs = Vec::new();
        self.core.take_outputs(&mut outputs);
        for output in outputs {
            self.obey(output);
        }
    }

    fn obey(&mut self, output: Output) {
        match output {
            Output::Send(transfer) => {
                assert!(!self.dropped.contains(transfer.replica), "seed {}: sent to a dropped replica", self.seed);
                let bytes = transfer.payload.map(|payload| self.buffers[&payload.buffer.0].clone());
                let most = if self.replicas[transfer.replica].mood == Mood::Slow { 900_000 } else { 3_000 };
                let after = self.within(most);
                self.later(after, Happening::Work(transfer, bytes));
            }
            Output::Control { replica, request } => {
                if matches!(request, ControlRequest::Fence { .. }) {
                    self.recorded = None;
                }
                // Requests and answers of one control connection keep their order.
                let at =
                    (self.now + self.within(2_000)).max(self.replicas[replica].control_at + Duration::from_micros(1));
                self.replicas[replica].control_at = at;
                self.later(at - self.now, Happening::Control(replica, request));
            }
            Output::Drop { replica, .. } => {
                self.dropped = self.dropped.with(Set::only(replica));
                self.recorded = None;
            }
            Output::Record { generation, members } => {
                self.recorded = Some((generation, members));
                for replica in members.iter() {
                    let record = &self.replicas[replica];
                    assert_eq!((record.generation, record.members), (generation, members), "seed {}", self.seed);
                }
            }
            Output::Compare { token, length, pinned, others } => {
                let count = (length as u64 / BLOCK) as usize;
                let reference = self.buffers[&pinned.0][..count].to_vec();
                let differing = others.iter().filter(|(_, buffer)| self.buffers[&buffer.0][..count] != reference);
                let differing = differing.fold(Set::EMPTY, |set, (replica, _)| set.with(Set::only(*replica)));
                self.handle(Event::Compared { token, differing });
            }
            Output::Complete { tag, result } => self.check_completion(tag, result),
            Output::Paused { .. } => {
                let after = self.within(5_000);
                self.later(after, Happening::Resume);
            }
            Output::Ended { clean } => self.ended = Some(clean),
            Output::MayDiffer | Output::Equal | Output::StatusChanged => {}
        }
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Work(transfer, bytes) => self.work(transfer, bytes),
            Happening::Answer(transfer, bytes, failure) => {
                if self.dropped.contains(transfer.replica) || self.replicas[transfer.replica].mood == Mood::Dead {
                    return;
                }
                let place = self.core.expected(transfer.replica, transfer.cookie).expect("it was asked");
                if let (Some((payload, _)), None) = (place, failure) {
                    let buffer = self.buffers.get_mut(&payload.buffer.0).unwrap();
                    buffer[..bytes.len()].copy_from_slice(&bytes);
                }
                let (replica, cookie) = (transfer.replica, transfer.cookie);
                self.handle(Event::Reply { replica, cookie, failure });
            }
            Happening::Control(replica, request) => {
                let record = &mut self.replicas[replica];
                match (record.mood, request) {
                    (Mood::Dead | Mood::Silent, _) => return,
                    (_, ControlRequest::Fence { generation, members }) => {
                        assert!(generation > record.generation, "seed {}: generations only rise", self.seed);
                        (record.generation, record.members) = (generation, members);
                    }
                    (_, ControlRequest::Close { generation }) => record.clean = generation == record.generation,
                }
                let refused = self.random.random_bool(0.02);
                let at =
                    (self.now + self.within(2_000)).max(self.replicas[replica].answer_at + Duration::from_micros(1));
                self.replicas[replica].answer_at = at;
                self.later(at - self.now, Happening::ControlAnswer(replica, !refused));
            }
            Happening::ControlAnswer(replica, done) => {
                if !self.dropped.contains(replica) && self.replicas[replica].mood != Mood::Dead {
                    let reply = if done { ControlReply::Done } else { ControlReply::Refused("no".into()) };
                    self.handle(Event::ControlReply { replica, reply });
                }
            }
            Happening::Mood(replica, mood) => {
                self.replicas[replica].mood = mood;
                if mood == Mood::Dead {
                    self.handle(Event::ConnectionLost { replica, reason: "it died".into() });
                    self.handle(Event::ControlLost { replica, reason: "it died".into() });
                }
            }
            Happening::Full(duration) => self.full_until = self.now + duration,
            Happening::Pause => self.handle(Event::Pause),
            Happening::Resume => self.handle(Event::Resume),
            Happening::Tick => {
                self.later(Duration::from_millis(100), Happening::Tick);
                self.handle(Event::Tick);
            }
        }
    }

    /// A replica works on a request, also after it was dropped: the connection's end does not undo what was sent.
    fn work(&mut self, transfer: Transfer, bytes: Option<Vec<u64>>) {
        let mood = self.replicas[transfer.replica].mood;
        if mood == Mood::Dead || mood == Mood::Silent && self.random.random_bool(0.5) {
            return;
        }
        let changes = transfer.operation != Operation::Read;
        let full = changes && self.now < self.full_until;
        let fails = full || mood == Mood::Erring && self.random.random_bool(0.3);
        let (first, count) = ((transfer.offset / BLOCK) as usize, (u64::from(transfer.length) / BLOCK) as usize);
        let stored = if fails { self.random.random_range(0..=count) } else { count };
        let target = &mut self.replicas[transfer.replica].blocks[first..first + count];
        let mut read = Vec::new();
        match transfer.operation {
            Operation::Read => read = target.to_vec(),
            Operation::Write => target[..stored].copy_from_slice(&bytes.expect("a write has bytes")[..stored]),
            Operation::Zero { .. } => target[..stored].fill(0),
            Operation::Flush => {}
        }
        if mood != Mood::Silent {
            let after = self.within(2_000);
            let failure = fails.then_some(if full { Failure::NoSpace } else { Failure::Io });
            self.later(after, Happening::Answer(transfer, read, failure));
        }
    }

    fn check_completion(&mut self, tag: u64, result: Result<(), Failure>) {
        let (submission, since) = self.open.remove(&tag).expect("completed once");
        let buffer = self.buffers.remove(&(tag as u32));
        if result.is_err() {
            return;
        }
        if submission.operation == Operation::Read {
            for (block, value) in blocks_of(&submission).zip(buffer.unwrap()) {
                self.check_value(block, value, since, "read");
            }
            return;
        }
        let Some((generation, members)) = self.recorded else {
            panic!("seed {}: acknowledged during a fence", self.seed);
        };
        for replica in members.iter() {
            let record = &self.replicas[replica];
            assert_eq!((record.generation, record.members), (generation, members), "seed {}: not recorded", self.seed);
        }
        let highest = self.replicas.iter().max_by_key(|replica| replica.generation).unwrap();
        assert_eq!(highest.generation, generation, "seed {}", self.seed);
        let Some(value) = value_of(&submission) else { return };
        for block in blocks_of(&submission) {
            for replica in highest.members.iter() {
                let stored = self.replicas[replica].blocks[block];
                assert_eq!(stored, value, "seed {}: replica {replica} misses block {block} of {tag}", self.seed);
            }
            let write = self.history[block].iter_mut().find(|write| write.0 == value && write.1 == since).unwrap();
            write.2 = self.now;
        }
    }

    /// A value is right when no later change of the block was acknowledged before the read began.
    fn check_value(&self, block: usize, value: u64, since: Duration, what: &str) {
        let writes = &self.history[block];
        let right = writes
            .iter()
            .filter(|write| write.0 == value)
            .any(|(_, _, acknowledged)| !writes.iter().any(|later| later.1 > *acknowledged && later.2 < since));
        assert!(right, "seed {}: {what} of block {block} gave {value}, written were {writes:?}", self.seed);
    }

    fn check_end(&mut self, clean: bool) {
        let members = self.core.members();
        let Some(first) = members.lowest() else { return };
        for replica in members.iter() {
            assert_eq!(self.replicas[replica].blocks, self.replicas[first].blocks, "seed {}: not equal", self.seed);
            assert!(!clean || self.replicas[replica].clean, "seed {}: not recorded as clean", self.seed);
        }
        for block in 0..BLOCKS as usize {
            self.check_value(block, self.replicas[first].blocks[block], FOREVER, "the end");
        }
    }
}

fn value_of(submission: &Submission) -> Option<u64> {
    match submission.operation {
        Operation::Write => Some(submission.tag),
        Operation::Zero { .. } => Some(0),
        Operation::Read | Operation::Flush => None,
    }
}

fn blocks_of(submission: &Submission) -> std::ops::Range<usize> {
    (submission.offset / BLOCK) as usize..((submission.offset + submission.length) / BLOCK) as usize
}

#[test]
fn keeps_its_promises_in_every_seeded_world() {
    let seeds = std::env::var("ENGINE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(1_500);
    let mut repaired = 0;
    let mut waited = 0;
    for seed in 0..seeds {
        let counters = run(seed);
        repaired += counters.repaired_bytes;
        waited += counters.waited_ops;
    }
    assert!(repaired > 0 && waited > 0, "the worlds are too peaceful to show anything");
}
