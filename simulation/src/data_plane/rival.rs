//! An engine whose node was removed, and that lives on: it has users of its own, who go on writing, and fights for the replicas.
//!
//! What it acknowledges before a newer attachment serves is there when that one begins. What it acknowledges later would be
//! nowhere: so it must not acknowledge any more as soon as it can know, which is when it loses a replica that still answers.

use std::collections::BTreeMap;

use api::generations::attachment_of;
use engine::core::{BufferId, Event, Failure, Operation, Payload, Set, Submission};

use super::{BLOCK, BLOCKS, Happening, MILLI, SECOND, World};

/// Tells these requests from those of the volume's user.
const FIRST_TAG: u64 = 1_000_000;
/// How many changes such a user makes, at most.
const CHANGES: u64 = 60;

/// What the users of a removed node still do.
#[derive(Default)]
pub struct Rivalry {
    made: u64,
    /// Changes that are not answered: the block, and the buffer within the engine.
    open: BTreeMap<u64, (usize, usize)>,
    /// The replicas that have worked on a change.
    pub reached: BTreeMap<u64, Set>,
}

pub fn is_rivals(tag: u64) -> bool {
    tag >= FIRST_TAG
}

impl World {
    /// The user takes a node that may still write for gone. Its engine goes on as a rival of the next one.
    pub(super) fn remove_node(&mut self) {
        let Some(a) = self.attachments.iter().position(|a| !a.is_over() && !a.disowned) else { return };
        let node = self.attachments[a].node;
        if self.nodes.len() < 2 || self.nodes.iter().any(|n| n.removed) {
            return;
        }
        self.attachments[a].disowned = true;
        self.nodes[node].removed = true;
        let id = self.attachments[a].id;
        self.oracle.forget_observations();
        self.user_lost_device(id);
        self.forgive_losses();
        self.node_report(node);
        let others: Vec<usize> = (0..self.nodes.len()).filter(|n| *n != node).collect();
        let other = others[self.dice.below(others.len())];
        self.wish(Some(other));
        self.after(1, Happening::RivalStep);
        self.tally.add("rivals", 1);
    }

    /// The newest attachment that has served since the node was removed.
    fn successor(&self) -> Option<usize> {
        self.attachments.iter().position(|a| !a.disowned && a.served)
    }

    pub(super) fn rival_step(&mut self) {
        let Some(a) = self.attachments.iter().position(|a| a.disowned) else { return };
        if !self.faults || self.rivalry.made >= CHANGES {
            return;
        }
        let most = if self.dice.percent(90) { 3 * MILLI } else { SECOND };
        let wait = self.dice.upto(most);
        self.after(wait, Happening::RivalStep);
        let Some(life) = self.attachments[a].serving().and(self.attachments[a].life.as_ref()).map(|l| l.id) else {
            // What it did not answer is not repeated.
            return self.rivalry.open.clear();
        };
        self.rivalry.made += 1;
        let (tag, block) = (FIRST_TAG + self.rivalry.made, self.dice.below(BLOCKS));
        if self.successor().is_none() {
            // Whoever begins now may find it. What comes later must never be seen.
            self.oracle.submit(block, tag, tag, self.now);
        }
        let Some((_, serving)) = self.serving(life) else { return };
        let buffer = serving.free.pop().unwrap_or(serving.buffers.len());
        serving.buffers.resize_with(serving.buffers.len().max(buffer + 1), Vec::new);
        serving.buffers[buffer] = vec![tag];
        self.rivalry.open.insert(tag, (block, buffer));
        let payload = Some(Payload { buffer: BufferId(buffer as u32), start: 0 });
        let (operation, offset) = (Operation::Write, block as u64 * BLOCK);
        self.tell(life, Event::Submit(Submission { tag, operation, offset, length: BLOCK, payload }));
    }

    pub(super) fn rival_reached(&mut self, replica: usize, bytes: Option<&Vec<u64>>) {
        for tag in bytes.into_iter().flatten().filter(|tag| is_rivals(**tag)) {
            let reached = self.rivalry.reached.entry(*tag).or_insert(Set::EMPTY);
            *reached = reached.with(Set::only(replica));
        }
    }

    pub(super) fn rival_completed(&mut self, a: usize, tag: u64, result: Result<(), Failure>) {
        let Some((block, buffer)) = self.rivalry.open.remove(&tag) else { return };
        let Some((_, serving)) = self.attachments[a].life.as_ref().map(|l| l.id).and_then(|l| self.serving(l)) else {
            return;
        };
        serving.free.push(buffer);
        let (blind, recorded) = (serving.blind, serving.recorded);
        if result.is_err() {
            return self.oracle.end(block, tag, self.now, None);
        }
        self.tally.add("changes that rivals acknowledged", 1);
        let (generation, members) = recorded.unwrap_or_else(|| panic!("acknowledged during a fence: {}", self.state()));
        let own = self.attachments[a].config.attachment;
        let is_taken = self.replicas.iter().any(|r| attachment_of(r.record.generation) > own);
        let is_removed = |place: usize| self.nodes[self.node_of(self.attachments[a].config.replicas[place])].removed;
        let is_alone = members.iter().all(is_removed);
        if blind && is_taken || is_alone && !is_taken {
            // It had gone on without a replica before that was taken, or with those of its own node alone: the removal was the
            // user's word that they are gone.
            return self.tally.add("changes that rivals acknowledged alone", 1);
        }
        let Some(successor) = self.successor() else {
            self.oracle.end(block, tag, self.now, Some(generation));
            // A replica may have lost it before the answer came.
            return self.forgive_losses();
        };
        let reached = self.rivalry.reached.get(&tag).copied().unwrap_or(Set::EMPTY);
        let config = &self.attachments[successor].config;
        let names = self.attachments[successor].known.iter().flat_map(|known| &known.members);
        let mut members = names.filter_map(|name| config.names.iter().position(|other| other == name));
        let missed = members.find(|place| !reached.contains(config.replicas[*place]));
        assert!(missed.is_none(), "a rival acknowledged {tag} after it had lost the volume: {}", self.state());
    }
}
