//! The promises, as they are checked.

use std::collections::{BTreeMap, BTreeSet};

use api::generations::attachment_of;
use engine::core::{Operation, ReplicaState, Set};
use planner::generations::{Record, Sight, judge};

use super::World;
use super::oracle::Write;
use super::replica::Replica;
use super::user::Request;

impl World {
    /// Whoever begins to serve holds everything that was acknowledged. Tells whether the run ends by the documented limit.
    pub(super) fn check_start(&mut self, a: usize, generation: u64, members: Set, compare: bool) -> bool {
        self.check_recorded(a, generation, members);
        if self.attachments[a].disowned {
            return false;
        }
        let now = self.now;
        let open: BTreeSet<u64> = self.user.open.keys().copied().collect();
        self.oracle.end_abandoned(now, |tag| open.contains(&tag));
        for place in members.iter() {
            let replica = self.attachments[a].config.replicas[place];
            if self.replicas[replica].client != self.attachments[a].life.as_ref().map(|life| life.id) {
                // It ended or was taken over since; the engine notices and drops it.
                continue;
            }
            if let Some((block, missed)) = self.misses(replica) {
                let lossy = self.replicas[replica].lossy;
                if self.is_hidden_fence(a, &missed, lossy) {
                    self.end = Some(super::End::HiddenFence);
                    return true;
                }
                panic!("r{replica} is to serve and misses {missed:?} of block {block}: {}", self.state());
            }
            self.replicas[replica].lossy = false;
        }
        if compare || self.attachments[a].differ {
            // Also when only one is left of those that were being compared.
            let first = members.lowest().expect("an engine has members");
            self.set_reader(self.attachments[a].config.replicas[first]);
        } else {
            self.reader = None;
        }
        if !compare {
            self.check_equal_but_for_repeated(a, members);
        }
        false
    }

    /// What may differ between replicas is read from this one from now on. What was in flight may look different only when that
    /// is another one than before, or has lost something.
    pub(super) fn set_reader(&mut self, replica: usize) {
        let reader = Some((replica, self.replicas[replica].incarnation));
        if self.reader.is_some() && self.reader != reader {
            self.oracle.forget_observations();
            self.tally.add("lost readers", 1);
        }
        self.reader = reader;
    }

    /// The first acknowledged change that a replica misses.
    fn misses(&self, replica: usize) -> Option<(usize, Write)> {
        let cells = self.replicas[replica].disk.iter().enumerate();
        cells
            .filter_map(|(block, cell)| Some((block, self.oracle.missing(block, cell.value(), self.now + 1)?.clone())))
            .next()
    }

    /// An engine dropped replicas and acknowledged without them; then it and every replica that recorded the fence went away, before
    /// the controller or any replica that answers heard of the generation (`ARCHITECTURE.md`, "the hidden fence").
    ///
    /// One that was dropped and started anew may have lost what was flushed only after that.
    fn is_hidden_fence(&self, a: usize, missed: &Write, lossy: bool) -> bool {
        let attachment = &self.attachments[a];
        let known = attachment.known.as_ref().map_or(0, |known| known.generation);
        let told = [attachment.config.generation, known, attachment.heard].into_iter();
        // What a later attachment recorded tells nothing of an earlier one.
        let of = attachment_of(missed.generation);
        let told = told.chain(attachment.answered_generations()).filter(|generation| attachment_of(*generation) <= of);
        let told = told.max().unwrap_or(0).max(self.overwritten.get(&of).copied().unwrap_or(0));
        let since = if lossy { missed.generation.max(missed.flushed_under) } else { missed.generation };
        since > told
    }

    /// The highest generation that is written down in the store.
    pub(super) fn heard(&self) -> u64 {
        let engine = &self.controller.engine;
        let replicas = self.controller.replicas.iter().filter_map(|r| r.status.as_ref()).map(|s| s.generation);
        let status = engine.status.as_ref().map_or(0, |s| s.generation);
        replicas.max().unwrap_or(0).max(status).max(engine.spec.generation)
    }

    fn reaches(&self, a: usize, replica: usize) -> bool {
        self.replicas[replica].client.is_some()
            && self.replicas[replica].client == self.attachments[a].life.as_ref().map(|l| l.id)
    }

    /// What users do not repeat is the same on all members.
    fn check_equal_but_for_repeated(&self, a: usize, members: Set) {
        let repeats = !self.user.nbd && self.user.device == Some(self.attachments[a].id);
        let repeated: BTreeSet<usize> = if repeats {
            let changes = self.user.open.iter().filter(|(tag, request)| request.value(**tag).is_some());
            changes.flat_map(|(_, request)| request.blocks()).collect()
        } else {
            BTreeSet::new()
        };
        let config = &self.attachments[a].config;
        let connected: Vec<usize> =
            members.iter().map(|place| config.replicas[place]).filter(|r| self.reaches(a, *r)).collect();
        for block in (0..super::BLOCKS).filter(|block| !repeated.contains(block)) {
            let values: BTreeSet<u64> = connected.iter().map(|r| self.replicas[*r].disk[block].value()).collect();
            assert!(values.len() <= 1, "block {block} differs and is not compared: {values:?}: {}", self.state());
        }
    }

    /// Every member has recorded the generation.
    pub(super) fn check_recorded(&self, a: usize, generation: u64, members: Set) {
        let config = &self.attachments[a].config;
        let names: Vec<String> = members.iter().map(|place| config.names[place].clone()).collect();
        if self.attachments[a].disowned {
            return;
        }
        for place in members.iter() {
            let record = &self.replicas[config.replicas[place]].record;
            let is_recorded = record.generation == generation && record.members == names;
            assert!(is_recorded, "{} has not recorded {generation}{names:?}: {}", config.names[place], self.state());
        }
    }

    /// What an engine acknowledged under is known to the controller before everything that it left is removed.
    pub(super) fn check_reported(&self, a: usize) {
        let (recorded, heard) = (self.attachments[a].recorded, self.heard());
        assert!(heard >= recorded || self.has_rivals(), "generation {recorded} was not reported: {}", self.state());
    }

    fn has_rivals(&self) -> bool {
        self.nodes.iter().any(|node| node.removed) || self.attachments.iter().any(|a| a.disowned)
    }

    pub(super) fn check_completion(&mut self, a: usize, tag: u64, request: &Request, bytes: &[u64]) {
        if request.operation == Operation::Read {
            return self.check_read(request, bytes);
        }
        let serving = self.attachments[a].serving().expect("it answers");
        let Some((generation, members)) = serving.recorded else {
            panic!("acknowledged during a fence: {}", self.state());
        };
        self.check_recorded(a, generation, members);
        request.blocks().for_each(|block| self.oracle.end(block, tag, self.now, Some(generation)));
        if request.operation == Operation::Flush {
            self.oracle.flush(request.since, generation);
        }
        for place in members.iter().filter(|place| self.is_connected(a, *place)) {
            let replica = self.attachments[a].config.replicas[place];
            for block in request.blocks() {
                let value = self.replicas[replica].disk[block].value();
                let missed = self.oracle.missing(block, value, self.now + 1);
                assert!(
                    missed.is_none(),
                    "r{replica} misses {missed:?} of block {block}, just acknowledged: {}",
                    self.state()
                );
            }
            if request.operation == Operation::Flush {
                for (block, cell) in self.replicas[replica].disk.iter().enumerate() {
                    let missed = self.oracle.missing(block, cell.durable, request.since);
                    assert!(missed.is_none(), "r{replica} did not flush {missed:?} of block {block}: {}", self.state());
                }
            }
        }
        if self.dice.percent(10) {
            self.check_judgements();
        }
    }

    fn check_read(&mut self, request: &Request, bytes: &[u64]) {
        for (block, value) in request.blocks().zip(bytes) {
            if let Some(missed) = self.oracle.missing(block, *value, request.since) {
                panic!("a read of block {block} gave {value} and misses {missed:?}: {}", self.state());
            }
            if let Some(before) = self.oracle.observe(block, *value, request.since) {
                panic!("block {block} changed from {before} to {value} by itself: {}", self.state());
            }
        }
    }

    /// Whoever looks at any part of the records now takes only those for current that hold everything, or refuses; except where
    /// nothing in sight can tell.
    fn check_judgements(&mut self) {
        if self.has_rivals() {
            return;
        }
        let heard = self.heard();
        let mut sights = BTreeMap::new();
        let mut highest = 0;
        for r in 0..self.replicas.len() {
            let object = &self.controller.replicas[r];
            if !object.spec.failed_at.is_empty() {
                continue;
            }
            let record = &self.replicas[r].record;
            let sight = if self.dice.percent(70) {
                highest = highest.max(record.generation);
                let members = record.members.iter().cloned().collect();
                Sight::Seen(Record { generation: record.generation, members, clean: record.clean })
            } else {
                let generation = object.status.as_ref().map_or(0, |s| s.generation);
                Sight::Unseen { why: String::new(), generation }
            };
            sights.insert(self.replicas[r].name.clone(), sight);
        }
        let engine = &self.controller.engine;
        let recorded = engine.status.as_ref().map_or(0, |s| s.generation).max(engine.spec.generation);
        let judgement = judge(&sights, recorded);
        if judgement.refused.is_some() {
            return self.tally.add("judgements that refused", 1);
        }
        self.tally.add("judgements", 1);
        for name in &judgement.current {
            let replica = self.replicas.iter().position(|r| r.name == *name).expect("it was judged");
            // A process that ended within the attachment may have lost what was not flushed; its engine never takes it again.
            if self.replicas[replica].lossy {
                continue;
            }
            if let Some((block, missed)) = self.misses(replica) {
                let is_hidden = missed.generation > highest.max(heard);
                assert!(is_hidden, "{name} counts as current and misses {missed:?} of block {block}: {}", self.state());
            }
        }
    }

    /// A barrier that says so has nothing left to flush, and members in sync are equal.
    pub(super) fn check_barrier(&mut self, a: usize, flushed: bool) {
        let Some(serving) = self.attachments[a].serving() else { return };
        if !flushed || self.attachments[a].disowned {
            return;
        }
        let members = serving.core.members();
        let mut equal: Option<usize> = None;
        for place in members.iter().filter(|place| self.is_connected(a, *place)) {
            let replica = self.attachments[a].config.replicas[place];
            for (block, cell) in self.replicas[replica].disk.iter().enumerate() {
                let missed = self.oracle.missing(block, cell.durable, self.now + 1);
                assert!(missed.is_none(), "r{replica} is paused and did not flush {missed:?}: {}", self.state());
            }
            if serving.core.replica_state(place) == ReplicaState::InSync {
                let first = *equal.get_or_insert(replica);
                let differs = |block: &usize| {
                    self.replicas[first].disk[*block].value() != self.replicas[replica].disk[*block].value()
                };
                // What is repeated after an engine's end and waits for the end of the barrier may be on some already.
                let waits = |block: &usize| self.user.open.values().any(|request| request.blocks().contains(block));
                let differing = (0..super::BLOCKS).find(|block| differs(block) && !waits(block));
                assert!(differing.is_none(), "r{first} and r{replica} differ in a barrier: {}", self.state());
            }
        }
        self.tally.add("barriers", 1);
    }

    fn check_equal(&self, one: usize, other: usize) {
        for block in 0..super::BLOCKS {
            let (a, b) = (self.replicas[one].disk[block].value(), self.replicas[other].disk[block].value());
            assert!(a == b, "r{one} has {a} and r{other} {b} in block {block}: {}", self.state());
        }
    }

    /// A clean end is recorded by equal members that have flushed everything.
    pub(super) fn check_end(&mut self, a: usize, clean: bool) {
        self.tally.add(if clean { "clean ends" } else { "unclean ends" }, 1);
        let Some(serving) = self.attachments[a].serving().filter(|_| clean) else { return };
        let members = serving.core.members();
        let replicas: Vec<usize> = members.iter().map(|place| self.attachments[a].config.replicas[place]).collect();
        if self.has_rivals() {
            return;
        }
        for &replica in &replicas {
            assert!(self.replicas[replica].record.clean, "r{replica} has not recorded a clean end: {}", self.state());
            self.check_equal(replicas[0], replica);
            let missed = self.misses(replica);
            assert!(missed.is_none(), "r{replica} ended cleanly and misses {missed:?}: {}", self.state());
        }
    }

    /// The device is gone and with it the users that rely on what was not flushed: what a member lost then may be gone.
    pub(super) fn forgive_losses(&mut self) {
        let members = self.possible_members();
        for r in 0..self.replicas.len() {
            // One that has failed is asked again only by the engine of a removed node, which may bring the others to its state.
            let is_asked = self.controller.replicas[r].spec.failed_at.is_empty() || self.is_rivals_own(r);
            if !is_asked || !self.replicas[r].lossy || !self.has_rivals() && !members.contains(&self.replicas[r].name) {
                continue;
            }
            for block in 0..super::BLOCKS {
                let value = self.replicas[r].disk[block].value();
                let forgiven = self.oracle.forgive(block, value, self.now + 1);
                if let Err(missed) = forgiven
                    && !self.has_rivals()
                {
                    panic!("r{r} lost {missed:?} of block {block}, which was flushed: {}", self.state());
                }
            }
            self.tally.add("losses that users must expect", 1);
        }
    }

    fn is_rivals_own(&self, replica: usize) -> bool {
        self.attachments.iter().any(|a| a.disowned && !a.is_over() && a.config.replicas.contains(&replica))
    }

    /// The members of the highest record, and of the highest one that all of its members recorded: a fence that was half done
    /// may be known to nobody who is left.
    fn possible_members(&self) -> BTreeSet<String> {
        let generation_of = |name: &String| {
            self.replicas.iter().find(|r| r.name == *name).map_or(0, |replica| replica.record.generation)
        };
        let is_recorded = |r: &&Replica| r.record.members.iter().all(|name| generation_of(name) >= r.record.generation);
        let highest = self.replicas.iter().map(|r| r.record.generation).max();
        let recorded = self.replicas.iter().filter(is_recorded).map(|r| r.record.generation).max();
        let newest = self.replicas.iter().filter(|r| [highest, recorded].contains(&Some(r.record.generation)));
        newest.flat_map(|r| r.record.members.iter().cloned()).collect()
    }

    /// The volume is faulted: a replica still has everything.
    pub(super) fn check_faulted(&mut self) {
        // What was not flushed went with the last process.
        let is_whole = |r: usize| {
            let mut cells = self.replicas[r].disk.iter().enumerate();
            cells.all(|(block, cell)| self.oracle.forgive(block, cell.value(), self.now + 1).is_ok())
        };
        let whole = (0..self.replicas.len()).any(is_whole);
        assert!(whole || self.has_rivals(), "faulted, and no replica has everything: {}", self.state());
    }

    /// After an end without faults all current replicas are whole, and equal when they say that it was clean.
    pub(super) fn check_final(&mut self) {
        let good: Vec<usize> =
            (0..self.replicas.len()).filter(|r| self.controller.replicas[*r].spec.failed_at.is_empty()).collect();
        if good.is_empty() {
            // The last one was dropped within the last attachment.
            self.end = Some(super::End::Faulted);
            return self.check_faulted();
        }
        let sight = |r: &usize| {
            let Replica { name, record, .. } = &self.replicas[*r];
            let (members, clean) = (record.members.iter().cloned().collect(), record.clean);
            (name.clone(), Sight::Seen(Record { generation: record.generation, members, clean }))
        };
        // One that was dropped just before the end has not failed yet: it is stale.
        let current = judge(&good.iter().map(sight).collect(), self.heard()).current;
        let current: Vec<usize> = good.into_iter().filter(|r| current.contains(&self.replicas[*r].name)).collect();
        if current.is_empty() {
            return self.check_faulted();
        }
        let is_clean = current.iter().all(|r| self.replicas[*r].record.clean);
        for &r in &current {
            if is_clean {
                // Otherwise they were still being compared, and are the next time.
                self.check_equal(current[0], r);
            }
            let missed = self.misses(r);
            assert!(missed.is_none(), "r{r} misses {missed:?} at the end: {}", self.state());
        }
    }
}
