//! The holder of an attachment: it keeps the mount, and starts the next engine when one dies.

use engine::core::ReplicaState;
use engine::process::choice::{Claim, Known};

use super::begin::{Life, Stage};
use super::serve::Serving;
use super::{HOLDER_LIMIT, Happening, MILLI, Process, SECOND, World};

/// What the engines of an attachment work on.
#[derive(Clone)]
pub struct Config {
    pub generation: u64,
    pub attachment: u64,
    pub compare: bool,
    /// Replicas by their number in the world; within an engine by their place here.
    pub replicas: Vec<usize>,
    pub names: Vec<String>,
    pub read_from: Option<usize>,
}

/// A holder, its engine, the mount and what they keep beside their socket.
pub struct Attachment {
    pub id: u32,
    pub node: usize,
    pub config: Config,
    pub lives: u32,
    pub life: Option<Life>,
    pub holder: bool,
    /// Users of the mount can be there.
    pub mounted: bool,
    pub served: bool,
    /// Its last engine said that every member recorded a clean end.
    pub clean: bool,
    /// It was asked to end since.
    pub shutdown_at: Option<u64>,
    pub without_engine: u64,
    quick_deaths: u32,
    pub known: Option<Known>,
    pub claim: Claim,
    /// The highest generation that the controller had seen in the store when it was started.
    pub heard: u64,
    pub differ: bool,
    /// The highest generation under which it acknowledged.
    pub recorded: u64,
    /// What the instance role heard of the engine.
    pub told: Option<Told>,
    /// The block device is there.
    pub device: bool,
    /// The user said that its node is gone: whatever it still does is nobody's.
    pub disowned: bool,
}

/// The part of an engine's status that leads to a report.
#[derive(Clone, Default)]
pub struct Told {
    pub generation: u64,
    pub serving: bool,
    pub modes: Vec<(String, ReplicaState)>,
}

impl Attachment {
    pub fn new(id: u32, node: usize, config: Config, now: u64) -> Attachment {
        Attachment {
            id,
            node,
            config,
            lives: 0,
            life: None,
            holder: true,
            mounted: true,
            served: false,
            clean: false,
            shutdown_at: None,
            without_engine: now,
            quick_deaths: 0,
            known: None,
            claim: Claim::default(),
            heard: 0,
            differ: false,
            recorded: 0,
            told: None,
            device: false,
            disowned: false,
        }
    }

    pub fn is_over(&self) -> bool {
        !self.holder && self.life.is_none()
    }

    pub fn serving(&self) -> Option<&Serving> {
        match &self.life.as_ref()?.stage {
            Stage::Serving(serving) => Some(serving),
            Stage::Beginning(_) => None,
        }
    }
}

impl World {
    /// An engine process ends. Its holder starts the next one, unless it ended in order.
    pub(super) fn end_life(&mut self, a: usize, in_order: bool) {
        let node = self.attachments[a].node;
        let Some(life) = self.attachments[a].life.take() else { return };
        let count = self.attachments[a].config.replicas.len();
        for place in 0..count {
            let replica = self.attachments[a].config.replicas[place];
            self.cut_connection(&life, place, replica);
        }
        let (now, had_served) = (self.now, matches!(life.stage, Stage::Serving(_)));
        let attachment = &mut self.attachments[a];
        if let Some(told) = &mut attachment.told {
            told.serving = false;
        }
        attachment.lives += 1;
        if had_served {
            attachment.without_engine = now;
        }
        let unmounted = !attachment.mounted && !had_served;
        if in_order || unmounted {
            (attachment.holder, attachment.mounted) = (false, false);
        }
        attachment.quick_deaths = if now - life.began < 10 * SECOND { attachment.quick_deaths + 1 } else { 0 };
        let pause = match attachment.quick_deaths {
            0 | 1 => 0,
            n => ((100 * MILLI) << (n - 2).min(8)).min(2 * SECOND),
        };
        let (id, holder) = (attachment.id, attachment.holder);
        if had_served && !in_order {
            self.tally.add("engines that died", 1);
            self.user_lost_engine(a);
        }
        if holder {
            let wait = pause + self.dice.upto(20 * MILLI);
            self.after(wait, Happening::NextLife { attachment: id });
        } else {
            self.device_ended(a);
        }
        self.wake_instance(node);
    }

    /// The holder waits no longer for an engine that serves: it ends the device.
    pub(super) fn holder_limit(&mut self, attachment: u32, _lives: u32) {
        let Some(a) = self.of_attachment(attachment) else { return };
        let attachment = &self.attachments[a];
        let serves = attachment.serving().is_some();
        if !attachment.holder || serves || self.now < attachment.without_engine + HOLDER_LIMIT {
            return;
        }
        self.tally.add("holders that gave up", 1);
        self.attachments[a].holder = false;
        self.attachments[a].mounted = false;
        if self.attachments[a].life.is_some() {
            self.end_life(a, false);
        } else {
            self.device_ended(a);
        }
        self.wake_instance(self.attachments[a].node);
    }

    /// Nothing of this attachment works any more.
    pub(super) fn device_ended(&mut self, a: usize) {
        self.attachments[a].mounted = false;
        let (id, clean) = (self.attachments[a].id, self.attachments[a].clean);
        self.user_lost_device(id);
        if !clean && !self.attachments[a].disowned {
            self.oracle.forget_observations();
            self.forgive_losses();
        }
    }

    pub(super) fn replica_up(&mut self, replica: usize, incarnation: u32) {
        let target = &mut self.replicas[replica];
        if target.incarnation == incarnation && target.process == Process::Starting {
            target.process = Process::Up;
            let node = self.node_of(replica);
            self.wake_instance(node);
        }
    }
}
