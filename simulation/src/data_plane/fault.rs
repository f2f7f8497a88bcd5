//! What goes wrong.

use engine::core::Event;

use super::dice::Dice;
use super::{Happening, MILLI, Process, SECOND, World, is_up};

#[derive(Clone, Copy, Debug)]
pub enum Fault {
    KillReplica(usize),
    StopReplica(usize, u64),
    SlowReplica(usize, u64),
    ErringReplica(usize, u64),
    /// Every change fails on every replica.
    Full(u64),
    KillEngine,
    /// After so many further outputs of the core.
    KillEngineSoon(u64),
    KillHolder,
    /// An engine and one of its replicas, whose process is there again at once.
    KillBoth(usize),
    CrashNode(usize, u64),
    NodeUp(usize),
    SilentNode(usize, u64),
    CutNodes(usize, usize, u64),
    IsolateNode(usize, u64),
    InstanceDown(usize, u64),
    ControllerDown(u64),
    Barrier,
    /// The user says that the engine's node is gone, and it is not.
    RemoveNode,
    /// The same of the next one, while its engine begins.
    RemoveNextNode,
}

impl World {
    /// Something goes wrong after a while.
    pub(super) fn plan_fault(&mut self, wait: u64) {
        let fault = self.some_fault();
        self.after(wait, Happening::Fault(fault));
        if self.dice.percent(15) {
            // Two at once.
            let fault = self.some_fault();
            let later = wait + self.dice.upto(MILLI);
            self.after(later, Happening::Fault(fault));
        }
    }

    fn some_fault(&mut self) -> Fault {
        let duration = |dice: &mut Dice| {
            let most = [5 * MILLI, SECOND, 12 * SECOND, 60 * SECOND][dice.below(4)];
            dice.upto(most)
        };
        let (replica, node) = (self.dice.below(self.replicas.len()), self.dice.below(self.nodes.len()));
        let other = self.dice.below(self.nodes.len());
        let time = duration(&mut self.dice);
        match self.dice.below(48) {
            0..5 => Fault::KillReplica(replica),
            5..8 => Fault::StopReplica(replica, time),
            8..10 => Fault::SlowReplica(replica, time),
            10..13 => Fault::ErringReplica(replica, time),
            13..15 => Fault::Full(self.dice.upto(5 * MILLI)),
            15..19 => Fault::KillEngine,
            19..24 => Fault::KillEngineSoon(self.dice.upto(30)),
            24..26 => Fault::KillHolder,
            26..29 => Fault::CrashNode(node, time),
            29..31 => Fault::SilentNode(node, time),
            31..34 => Fault::CutNodes(node, other, time),
            34..36 => Fault::IsolateNode(node, time),
            36..38 => Fault::InstanceDown(node, time),
            38..39 => Fault::ControllerDown(time),
            39..43 => Fault::Barrier,
            43..47 => Fault::KillBoth(replica),
            _ if self.dice.percent(50) => Fault::RemoveNextNode,
            _ => Fault::RemoveNode,
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        if !self.faults {
            if let Fault::NodeUp(node) = fault {
                self.node_up(node);
            }
            return;
        }
        let now = self.now;
        match fault {
            Fault::KillReplica(r) if is_up(&self.replicas[r]) => self.kill_replica(r),
            Fault::StopReplica(r, time) => self.replicas[r].stopped_until = now + time,
            Fault::SlowReplica(r, time) => self.replicas[r].slow_until = now + time,
            Fault::ErringReplica(r, time) => self.replicas[r].erring_until = now + time,
            Fault::Full(time) => self.full = (now, now + time),
            Fault::KillEngine => match self.engine_that_dropped() {
                Some(a) if self.dice.percent(50) => self.lose_members(a),
                _ => self.kill_some_engine(),
            },
            Fault::KillEngineSoon(outputs) => self.doom = Some(outputs),
            Fault::KillHolder => self.kill_holder(),
            Fault::KillBoth(r) => {
                if is_up(&self.replicas[r]) {
                    self.kill_replica(r);
                    // As an instance that did not see its end would start it.
                    self.replicas[r].process = Process::Up;
                }
                self.kill_some_engine();
            }
            Fault::CrashNode(node, time) => self.crash_node(node, time),
            Fault::NodeUp(node) => self.node_up(node),
            Fault::SilentNode(node, time) => {
                self.nodes[node].silent_until = now + time;
                self.plan_reports(node, now + time);
            }
            Fault::CutNodes(a, b, time) if a != b => self.cut(a, b, now + time),
            Fault::IsolateNode(node, time) => {
                for other in (0..self.nodes.len()).filter(|other| *other != node) {
                    self.cut(node, other, now + time);
                }
                self.nodes[node].silent_until = now + time;
                self.plan_reports(node, now + time);
            }
            Fault::InstanceDown(node, time) => {
                self.nodes[node].instance_down_until = now + time;
                // What it heard of engines is gone with it.
                for attachment in self.attachments.iter_mut().filter(|a| a.node == node && a.serving().is_none()) {
                    attachment.told = None;
                }
            }
            Fault::ControllerDown(time) => self.controller.down_until = now + time,
            Fault::Barrier => {
                let lives = self.attachments.iter().filter_map(|a| a.life.as_ref()).map(|life| life.id);
                for life in lives.collect::<Vec<_>>() {
                    self.tell(life, Event::Pause);
                }
            }
            Fault::RemoveNode => self.remove_node(),
            Fault::RemoveNextNode => self.removes_at_start = true,
            Fault::KillReplica(_) | Fault::CutNodes(..) => return,
        }
        self.tally.add("faults", 1);
    }

    fn cut(&mut self, a: usize, b: usize, until: u64) {
        (self.cuts[a][b], self.cuts[b][a]) = (until, until);
    }

    pub(super) fn kill_replica(&mut self, r: usize) {
        self.end_replica(r, Process::Ended, true);
        self.tally.add("replicas killed", 1);
        let node = self.node_of(r);
        self.wake_instance(node);
    }

    /// The process of a replica ends, and whoever is connected hears of it, unless its machine is gone too.
    pub(super) fn end_replica(&mut self, r: usize, next: Process, is_heard: bool) {
        let incarnation = self.replicas[r].incarnation;
        self.replicas[r].end(next, &mut self.dice);
        if is_heard {
            self.tell_lost(r, incarnation);
        }
        let is_in_use = self.attachments.iter().any(|a| a.mounted && a.served && !a.disowned);
        if !is_in_use {
            self.forgive_losses();
        }
    }

    fn kill_some_engine(&mut self) {
        let lives: Vec<u32> = self.attachments.iter().filter_map(|a| a.life.as_ref()).map(|life| life.id).collect();
        if !lives.is_empty() {
            let life = lives[self.dice.below(lives.len())];
            self.kill_engine(life);
        }
    }

    /// An engine that serves and dropped a replica whose process is still there.
    fn engine_that_dropped(&self) -> Option<usize> {
        (0..self.attachments.len()).find(|a| !self.dropped_by(*a).is_empty())
    }

    fn dropped_by(&self, a: usize) -> Vec<usize> {
        let Some(serving) = self.attachments[a].serving() else { return vec![] };
        let members = serving.core.members();
        let replicas = self.attachments[a].config.replicas.iter().enumerate();
        let dropped = replicas.filter(|(place, r)| !members.contains(*place) && is_up(&self.replicas[**r]));
        dropped.map(|(_, r)| *r).collect()
    }

    /// An engine dies, and for a while the next one meets only replicas that were dropped before.
    fn lose_members(&mut self, a: usize) {
        let (dropped, node) = (self.dropped_by(a), self.attachments[a].node);
        for r in self.attachments[a].config.replicas.clone() {
            if dropped.contains(&r) {
                self.replicas[r].stopped_until = 0;
                let other = self.node_of(r);
                self.cut(node, other, 0);
            } else {
                self.replicas[r].stopped_until = self.now + 12 * SECOND;
            }
        }
        self.end_life(a, false);
        self.tally.add("engines lost with their members", 1);
    }

    /// An engine goes on without its holder, but is not replaced any more.
    fn kill_holder(&mut self) {
        let Some(a) = self.attachments.iter().position(|a| a.holder) else { return };
        self.attachments[a].holder = false;
        if self.attachments[a].life.is_none() {
            self.device_ended(a);
        } else if self.dice.percent(60) {
            self.end_life(a, false);
        }
        let node = self.attachments[a].node;
        self.wake_instance(node);
    }

    /// A machine loses its power: nobody says good-bye.
    fn crash_node(&mut self, node: usize, time: u64) {
        if !self.nodes[node].up {
            return;
        }
        self.nodes[node].up = false;
        for a in 0..self.attachments.len() {
            if self.attachments[a].node == node && !self.attachments[a].is_over() {
                self.attachments[a].holder = false;
                self.attachments[a].told = None;
                if self.attachments[a].life.is_some() {
                    self.end_life(a, false);
                } else {
                    self.device_ended(a);
                }
                if self.dice.percent(50) {
                    // It was not brought to stable storage.
                    (self.attachments[a].known, self.attachments[a].recorded) = (None, 0);
                }
                // The loop device goes with the machine.
                self.attachments[a].device = false;
            }
        }
        if node < self.replicas.len() && matches!(self.replicas[node].process, Process::Up | Process::Starting) {
            self.end_replica(node, Process::Ended, false);
        }
        self.after(time, Happening::Fault(Fault::NodeUp(node)));
        self.plan_reports(node, self.now + time);
        self.tally.add("machines crashed", 1);
    }

    fn node_up(&mut self, node: usize) {
        if self.nodes[node].up {
            return;
        }
        self.nodes[node].up = true;
        if node < self.replicas.len() {
            // Only now are its connections reset.
            let incarnation = self.replicas[node].incarnation;
            (0..incarnation).for_each(|old| self.tell_lost(node, old));
        }
        self.wake_instance(node);
    }

    /// From now on everything works.
    pub(super) fn end_faults(&mut self) {
        self.faults = false;
        self.doom = None;
        self.full = (0, 0);
        self.controller.down_until = self.now;
        for row in &mut self.cuts {
            row.fill(0);
        }
        for replica in &mut self.replicas {
            (replica.stopped_until, replica.slow_until, replica.erring_until) = (0, 0, 0);
        }
        // A node that comes back after it was given up for gone was started anew.
        while let Some(a) = self.attachments.iter().position(|a| a.disowned) {
            self.attachments[a].holder = false;
            self.end_life(a, false);
            self.attachments.remove(a);
        }
        for node in 0..self.nodes.len() {
            (self.nodes[node].silent_until, self.nodes[node].instance_down_until) = (0, 0);
            self.nodes[node].removed = false;
            self.node_up(node);
            self.after(1, Happening::NodeReport { node });
            self.wake_instance(node);
        }
        self.wake_controller();
        let lives: Vec<u32> = self.attachments.iter().filter_map(|a| a.life.as_ref()).map(|life| life.id).collect();
        for life in lives {
            self.tell(life, Event::Resume);
        }
        self.begin_final();
    }
}
