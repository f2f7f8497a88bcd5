//! What users may read: every change of every block, when it was submitted, when it ended, whether it was acknowledged and flushed.

use super::BLOCKS;

const FOREVER: u64 = u64::MAX;

/// A change of one block.
#[derive(Clone, Debug)]
pub struct Write {
    pub tag: u64,
    pub value: u64,
    pub submitted: u64,
    /// From then on it can take effect no more.
    pub end: u64,
    /// `FOREVER`: not acknowledged, so it may be there or not.
    pub acknowledged: u64,
    /// A later flush was acknowledged.
    pub flushed: bool,
    /// Under which generation it was acknowledged.
    pub generation: u64,
    /// And flushed.
    pub flushed_under: u64,
}

#[derive(Default)]
pub struct Block {
    pub writes: Vec<Write>,
    /// What a read gave since the last change: it must not change by itself.
    observed: Option<u64>,
}

pub struct Oracle {
    pub blocks: Vec<Block>,
}

impl Oracle {
    pub fn new() -> Oracle {
        let (tag, value, submitted, end, acknowledged) = (0, 0, 0, 0, 0);
        let blank = Write { tag, value, submitted, end, acknowledged, flushed: true, generation: 0, flushed_under: 0 };
        let block = || Block { writes: vec![blank.clone()], observed: None };
        Oracle { blocks: (0..BLOCKS).map(|_| block()).collect() }
    }

    pub fn submit(&mut self, block: usize, tag: u64, value: u64, now: u64) {
        let block = &mut self.blocks[block];
        block.observed = None;
        block.writes.push(Write {
            tag,
            value,
            submitted: now,
            end: FOREVER,
            acknowledged: FOREVER,
            flushed: false,
            generation: 0,
            flushed_under: 0,
        });
    }

    /// A change ended; acknowledged under a generation, or by an error.
    pub fn end(&mut self, block: usize, tag: u64, now: u64, generation: Option<u64>) {
        for write in self.blocks[block].writes.iter_mut().filter(|write| write.tag == tag && write.end == FOREVER) {
            write.end = now;
            if let Some(generation) = generation {
                (write.acknowledged, write.generation) = (now, generation);
            }
        }
    }

    /// Requests that nobody waits for any more can take effect until the exports that they were sent to are ended.
    pub fn end_abandoned(&mut self, now: u64, is_open: impl Fn(u64) -> bool) {
        for write in self.blocks.iter_mut().flat_map(|block| &mut block.writes) {
            if write.end == FOREVER && !is_open(write.tag) {
                write.end = now;
            }
        }
    }

    /// A flush that was submitted then is acknowledged under a generation.
    pub fn flush(&mut self, submitted: u64, generation: u64) {
        for block in &mut self.blocks {
            let mut newest = 0;
            for write in block.writes.iter_mut().filter(|write| write.acknowledged < submitted) {
                if !write.flushed {
                    (write.flushed, write.flushed_under) = (true, generation);
                }
                newest = newest.max(write.submitted);
            }
            // Nothing that ended before a flushed change began can come back.
            block.writes.retain(|write| write.end >= newest || write.submitted == newest);
        }
    }

    /// The acknowledged change that a block with this value misses, for somebody who begins to look at `since`.
    pub fn missing(&self, block: usize, value: u64, since: u64) -> Option<&Write> {
        let writes = &self.blocks[block].writes;
        let later = |write: &Write| {
            let end = write.end;
            writes.iter().find(|later| later.acknowledged < since && later.submitted > end)
        };
        // A value that is no more in the list was overwritten by what was flushed.
        let mut missed = writes.iter().rev().find(|write| write.flushed);
        for write in writes.iter().filter(|write| write.value == value) {
            missed = later(write);
            missed?;
        }
        missed
    }

    /// The acknowledged changes that a replica lost with its process, and nobody flushed, may be gone after the attachment.
    ///
    /// Tells whether something was lost that had been flushed.
    pub fn forgive(&mut self, block: usize, value: u64, since: u64) -> Result<bool, Write> {
        let mut forgiven = false;
        while let Some(missed) = self.missing(block, value, since).cloned() {
            if missed.flushed {
                return Err(missed);
            }
            let of_it = |write: &&mut Write| write.tag == missed.tag && write.value == missed.value;
            for write in self.blocks[block].writes.iter_mut().filter(of_it) {
                write.acknowledged = FOREVER;
            }
            self.blocks[block].observed = None;
            forgiven = true;
        }
        Ok(forgiven)
    }

    /// A read gave this value, and no change of the block was in flight meanwhile. Tells what was read before if it differs.
    pub fn observe(&mut self, block: usize, value: u64, since: u64) -> Option<u64> {
        let block = &mut self.blocks[block];
        if block.writes.iter().any(|write| write.end >= since) {
            return None;
        }
        let before = block.observed.replace(value);
        before.filter(|before| *before != value)
    }

    /// What was in flight when an attachment ended uncleanly may be read from another replica from now on.
    pub fn forget_observations(&mut self) {
        for block in &mut self.blocks {
            block.observed = None;
        }
    }
}
