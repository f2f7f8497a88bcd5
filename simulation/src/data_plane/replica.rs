//! A replica: its disk, which loses any part of what was not flushed when its process ends, and its process.

use proto::generation::{Step, plan};
use proto::replica::{Record, Reply, Request};

use engine::core::{Failure, Operation, Transfer};

use super::dice::Dice;
use super::{BLOCK, BLOCKS};

/// One block: what is on stable storage, and what was written since, oldest first, with the time of the answer.
#[derive(Clone, Default)]
pub struct Cell {
    pub durable: u64,
    pub volatile: Vec<(u64, u64)>,
}

impl Cell {
    pub fn value(&self) -> u64 {
        self.volatile.last().map_or(self.durable, |entry| entry.0)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Process {
    None,
    Starting,
    Up,
    /// It ended without being asked.
    Ended,
}

pub struct Replica {
    pub name: String,
    pub record: Record,
    pub disk: Vec<Cell>,
    pub process: Process,
    /// Tells processes apart: what was sent to one never reaches the next.
    pub incarnation: u32,
    pub export: Option<String>,
    /// The engine that is connected to the export.
    pub client: Option<u32>,
    /// Requests of this engine beyond this number were never sent.
    pub cut: Option<(u32, u64)>,
    /// Its process is stopped until then; what arrives waits.
    pub stopped_until: u64,
    pub slow_until: u64,
    pub erring_until: u64,
    /// It lost something that was not flushed since it was last opened.
    pub lossy: bool,
}

impl Replica {
    pub fn new(name: String) -> Replica {
        let record = Record { volume: "v".into(), replica: name.clone(), clean: true, ..Record::default() };
        Replica {
            name,
            record,
            disk: vec![Cell::default(); BLOCKS],
            process: Process::None,
            incarnation: 0,
            export: None,
            client: None,
            cut: None,
            stopped_until: 0,
            slow_until: 0,
            erring_until: 0,
            lossy: false,
        }
    }

    /// The process ends: of each block that was not flushed any state may be left. Tells whether something may be lost.
    pub fn end(&mut self, next: Process, dice: &mut Dice) -> bool {
        self.process = next;
        self.incarnation += 1;
        (self.export, self.client, self.cut) = (None, None, None);
        (self.stopped_until, self.slow_until, self.erring_until) = (0, 0, 0);
        let mut lost = false;
        for cell in self.disk.iter_mut().filter(|cell| !cell.volatile.is_empty()) {
            let kept = dice.below(cell.volatile.len() + 1);
            lost |= kept < cell.volatile.len();
            if kept > 0 {
                cell.durable = cell.volatile[kept - 1].0;
            }
            cell.volatile.clear();
        }
        self.lossy |= lost;
        lost
    }

    /// An orderly end brings everything to stable storage.
    pub fn flush(&mut self, now: u64) {
        for cell in self.disk.iter_mut().filter(|cell| !cell.volatile.is_empty()) {
            let covered = cell.volatile.iter().take_while(|entry| entry.1 <= now).count();
            if covered > 0 {
                cell.durable = cell.volatile[covered - 1].0;
                cell.volatile.drain(..covered);
            }
        }
    }

    /// Works on a request that arrived; `answered`: when its answer leaves. A failed change may be stored in part.
    pub fn work(
        &mut self,
        transfer: &Transfer,
        bytes: Option<Vec<u64>>,
        now: u64,
        answered: u64,
        failure: Option<Failure>,
        dice: &mut Dice,
    ) -> Vec<u64> {
        let (first, count) = ((transfer.offset / BLOCK) as usize, (u64::from(transfer.length) / BLOCK) as usize);
        let stored = if failure.is_some() { dice.below(count + 1) } else { count };
        match transfer.operation {
            Operation::Read => return self.disk[first..first + count].iter().map(Cell::value).collect(),
            Operation::Flush if failure.is_none() => self.flush(now),
            Operation::Flush => {}
            Operation::Write | Operation::Zero { .. } => {
                for (at, cell) in self.disk[first..first + stored].iter_mut().enumerate() {
                    let value = bytes.as_ref().map_or(0, |bytes| bytes[at]);
                    cell.volatile.push((value, answered));
                }
            }
        }
        vec![]
    }

    /// Carries out a control request. `Err`: the process ended between two steps.
    pub fn control(
        &mut self,
        request: &Request,
        now: u64,
        errs: bool,
        dies: bool,
        dice: &mut Dice,
    ) -> Result<Reply, ()> {
        let steps = match plan(&self.record, self.export.as_deref(), request) {
            Ok(steps) => steps,
            Err(message) => return Ok(Reply::Refused { message }),
        };
        let last = if dies { dice.below(steps.len() + 1) } else { usize::MAX };
        for (at, step) in steps.into_iter().enumerate() {
            if at == last {
                return Err(());
            }
            match step {
                Step::EndExport => {
                    (self.export, self.client) = (None, None);
                    // What was being worked on is finished first.
                    self.disk
                        .iter_mut()
                        .flat_map(|cell| &mut cell.volatile)
                        .for_each(|entry| entry.1 = entry.1.min(now));
                }
                // Nobody writes any more: everything that was written is covered.
                Step::Flush => self.flush(u64::MAX),
                Step::Record(_) if errs => return Ok(Reply::Refused { message: "its disk errs".into() }),
                Step::Record(record) => {
                    assert!(record.generation >= self.record.generation, "a generation went down");
                    assert!(
                        !record.clean || self.disk.iter().all(|cell| cell.volatile.is_empty()),
                        "clean, not flushed"
                    );
                    self.record = record;
                }
                Step::AddExport(export) => self.export = Some(export),
            }
        }
        if dies && last != usize::MAX {
            return Err(());
        }
        Ok(match request {
            Request::Status => self.status(),
            Request::Open { .. } => Reply::Opened { export: self.export.clone().unwrap_or_default() },
            Request::Fence { .. } | Request::Close { .. } => Reply::Done,
        })
    }

    fn status(&self) -> Reply {
        Reply::Status { record: self.record.clone(), export: self.export.clone(), actual_size_bytes: 0 }
    }
}
