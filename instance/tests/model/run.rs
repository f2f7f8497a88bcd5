//! One story on one volume, compared with the array after every step.

use rustix::process::{Signal, kill_process};

use crate::array::{Array, Change, SECTOR, first_difference};
use crate::clients::{Answer, Call, by_device, by_nbd, read_device};
use crate::steps::{Event, Kind, Place, Request, Step, Way};
use crate::world::{Shape, World, image_content};

const CLUSTER: u64 = 128 << 10;

/// A place and a length within the volume, for NBD any byte, else whole sectors.
fn place(world: &World, request: &Request, way: Way) -> (u64, u64) {
    let size = world.volume_bytes;
    let near = |center: u64, by: i64| (center as i64 + by).rem_euclid(size as i64) as u64;
    let mut start = match request.place {
        Place::Anywhere(at) => u64::from(at) % size,
        Place::Crowded(at) => u64::from(at) % size,
        Place::AtImageEnd(by) => near(world.image_bytes.min(size), i64::from(by)),
        Place::BeforeEnd(by) => size - 1 - u64::from(by) % size,
        Place::AtCluster(cluster, by) => near(u64::from(cluster) * CLUSTER, i64::from(by) * 256),
    };
    let mut length = u64::from(request.length).min(size - start);
    if way == Way::Device {
        start = start / SECTOR * SECTOR;
        length = length.next_multiple_of(SECTOR).min(size - start);
    }
    (start, length)
}

fn change(call: &Call, answer: &Answer, way: Way) -> Option<Change> {
    let stamp = match call.kind {
        Kind::Read | Kind::Flush => return None,
        Kind::Write => Some(call.stamp),
        Kind::Zero { .. } | Kind::Discard => None,
    };
    // A discard by the block device need not reach every sector.
    let certain = answer.is_ok() && !(call.kind == Kind::Discard && way == Way::Device);
    Some(Change { range: call.offset..call.offset + call.length, stamp, certain, whole: way == Way::Nbd })
}

struct Run {
    world: World,
    array: Array,
    next_stamp: u64,
}

/// Plays a story; panics when the volume is not what the array is.
pub fn run(shape: &Shape, (size, steps): &(u16, Vec<Step>)) {
    let mut world = World::new(shape, *size);
    let mut bytes = image_content(world.image_bytes);
    bytes.resize(world.volume_bytes as usize, 0);
    world.attach();
    let mut run = Run { world, array: Array { bytes }, next_stamp: 1 };
    for step in steps {
        run.step(step);
    }
    run.finish();
}

impl Run {
    fn step(&mut self, step: &Step) {
        let calls: Vec<Call> = step.requests.iter().map(|request| self.call(request, step.way)).collect();
        let victim = self.victim(step.event);
        if victim.is_some() {
            // What was in flight at an earlier crash must be the same everywhere before the one that is read from goes.
            self.world.wait_compared();
        }
        let (engine, lives) = self.world.engine();
        let answers = self.send(step.way, &calls, |world| match step.event {
            Event::KillEngine => kill_process(engine, Signal::KILL).expect("the engine lives"),
            Event::KillBoth => {
                kill_process(world.holder(), Signal::KILL).expect("the holder lives");
                kill_process(engine, Signal::KILL).expect("the engine lives");
            }
            Event::KillReplica(_) => victim.into_iter().for_each(|number| world.kill_replica(number)),
            Event::Nothing | Event::Reattach => {}
        });
        let may_fail = match step.event {
            Event::KillBoth => true,
            // The kernel repeats what was in flight, an NBD client does not.
            Event::KillEngine => step.way == Way::Nbd,
            Event::Nothing | Event::KillReplica(_) | Event::Reattach => false,
        };
        for (call, answer) in calls.iter().zip(&answers) {
            assert!(may_fail || answer.is_ok(), "{step:?}: {call:?} failed: {answer:?}");
        }
        match step.event {
            Event::Nothing => {}
            Event::KillEngine => self.world.wait_replaced(lives),
            Event::KillBoth => self.world.recover(),
            Event::KillReplica(_) => victim.into_iter().for_each(|number| self.world.wait_dropped(number)),
            Event::Reattach => {
                self.world.detach();
                self.world.attach();
            }
        }
        self.compare(step, &calls, &answers);
    }

    fn call(&mut self, request: &Request, way: Way) -> Call {
        let (offset, length) = place(&self.world, request, way);
        self.next_stamp += 1;
        let (offset, length) = if request.kind == Kind::Flush { (0, 0) } else { (offset, length) };
        Call { kind: request.kind, offset, length, stamp: self.next_stamp }
    }

    /// The replica that an event kills: never the last one.
    fn victim(&self, event: Event) -> Option<usize> {
        let Event::KillReplica(choice) = event else { return None };
        let current: Vec<usize> = self.world.current.iter().copied().collect();
        (current.len() > 1).then(|| current[usize::from(choice) % current.len()])
    }

    fn send(&mut self, way: Way, calls: &[Call], meanwhile: impl FnOnce(&mut World)) -> Vec<Answer> {
        let (device, socket) = (self.world.device.clone(), self.world.config.nbd_socket.clone());
        let world = &mut self.world;
        match way {
            Way::Device => by_device(&device, calls, || meanwhile(world)),
            Way::Nbd => by_nbd(&socket, "vol", calls, || meanwhile(world)),
        }
    }

    fn compare(&mut self, step: &Step, calls: &[Call], answers: &[Answer]) {
        let done = || calls.iter().zip(answers);
        let changes: Vec<Change> = done().filter_map(|(call, answer)| change(call, answer, step.way)).collect();
        let mut check = || {
            for (call, answer) in done().filter(|(call, _)| call.kind == Kind::Read) {
                if let Ok(bytes) = answer {
                    self.array.check_read(call.offset, bytes, &changes)?;
                }
            }
            let observed = read_device(&self.world.device, self.world.volume_bytes);
            self.array.settle(&changes, &observed)
        };
        if let Err(message) = check() {
            panic!("{message}\nin {step:?}\nwith {calls:?}");
        }
    }

    /// The other way shows the same, nothing behind the end can be read, and all replicas hold the array.
    fn finish(mut self) {
        let size = self.world.volume_bytes;
        let whole = Call { kind: Kind::Read, offset: 0, length: size, stamp: 0 };
        let beyond = Call { kind: Kind::Read, offset: size - 512, length: 1024, stamp: 0 };
        let behind = Call { kind: Kind::Read, offset: size, length: 512, stamp: 0 };
        let answers = self.send(Way::Nbd, &[whole, beyond, behind], |_| {});
        assert_eq!(first_difference(answers[0].as_ref().unwrap(), &self.array.bytes), None);
        for answer in &answers[1..] {
            assert_eq!(answer, &Err("NBD error 22".to_owned()), "what lies behind the volume's end is nobody's");
        }
        self.world.wait_compared();
        self.world.detach();
        self.world.assert_replicas_hold(&self.array.bytes);
    }
}
