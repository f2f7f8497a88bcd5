//! What to do with one replica or engine: pure, from one observation.

use std::collections::BTreeMap;

use api::engine::{DesireState, EngineStatus, InstanceState, ReplicaMode};
use api::image::CopyState;
use api::names::condition::{DETACHED, READY, WAIT_FOR_BACKING_IMAGE};
use api::replica::ReplicaStatus;
use api::{Condition, ConditionStatus};
use proto::engine::{ReplicaState, Status as LiveEngine};
use proto::replica::Record;

/// A process of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Process {
    /// Never started, or ended as wished.
    None,
    Alive,
    /// It ended by itself; the sentence says how.
    Died(String),
}

/// What is done next, once per pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Rest,
    Start,
    Stop,
    /// Removes what the object stands for on this node.
    Remove,
    /// Removes the finalizer: nothing is left.
    Release,
    /// Attaches the block device (engines only).
    AttachDevice,
}

/// The disk of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    Available,
    /// It is there in the wish, but not on the machine; the sentence says what is wrong.
    Unavailable(String),
    /// The user has taken it out of the node.
    GivenUp,
}

/// The image of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    NotNeeded,
    Absent,
    Copy { state: CopyState, progress: u32, message: String, next_retry: String },
    Ready,
}

/// One reading of a replica.
#[derive(Clone, Debug)]
pub struct ObservedReplica {
    pub name: String,
    pub image_name: String,
    pub deleted: bool,
    pub desire: DesireState,
    pub process: Process,
    pub disk: Disk,
    pub image: Image,
    /// From its directory; `None` when there is none (only meaningful when the disk is available).
    pub record: Option<Record>,
    /// From the process: its record and the bytes its files take. `None`: it does not answer yet.
    pub live: Option<(Record, u64)>,
    pub data_exists: bool,
    /// A sentence about the last attempt to do something, when it failed.
    pub failure: Option<String>,
}

/// What to do with a replica, and what to report. Times and addresses are filled in by the caller.
pub fn replica(seen: &ObservedReplica, status: &mut ReplicaStatus) -> (Action, Vec<Condition>) {
    let mut conditions = vec![];
    let record = seen.live.as_ref().map(|(r, _)| r).or(seen.record.as_ref());
    match record {
        Some(record) => {
            status.generation = record.generation;
            status.generation_members = record.members.clone();
            status.clean = record.clean || record.generation == 0;
        }
        // Absent is only known when the disk is there; otherwise the last report stays.
        None if seen.disk == Disk::Available && seen.process == Process::None => {
            (status.generation, status.clean) = (0, true);
            status.generation_members.clear();
        }
        None => {}
    }
    if let Some((_, bytes)) = seen.live {
        status.actual_size_bytes = bytes;
    }
    let running = seen.desire == DesireState::Running && !seen.deleted;
    let ready = |reason: &str, text: String| Condition::new(READY, ConditionStatus::False, reason, text);
    let (action, state) = match (&seen.process, running) {
        (Process::Alive, true) if seen.live.is_some() => {
            conditions.push(Condition::new(READY, ConditionStatus::True, "Running", "the replica serves"));
            (Action::Rest, InstanceState::Running)
        }
        (Process::Alive, true) => {
            conditions.push(ready("Starting", "the process was started and does not answer yet".into()));
            (Action::Rest, InstanceState::Starting)
        }
        (Process::Alive, false) => {
            conditions.push(ready("Stopping", "the process flushes and ends".into()));
            (Action::Stop, InstanceState::Stopping)
        }
        (Process::Died(how), true) => {
            conditions.push(ready("ProcessDied", how.clone()).with_hint(
                "its data is untouched; the volume goes on without it and uses it again only if it is still current",
            ));
            (Action::Rest, InstanceState::Error)
        }
        (Process::Died(_), false) => (Action::Stop, InstanceState::Stopping),
        (Process::None, true) => decide_start(seen, &mut conditions),
        (Process::None, false) if seen.deleted => (decide_removal(seen, &mut conditions), InstanceState::Stopped),
        (Process::None, false) => {
            if let Disk::Unavailable(why) = &seen.disk {
                conditions.push(ready("DiskUnavailable", why.clone()).with_hint("bring the disk back"));
            } else {
                conditions.push(ready("Stopped", "the volume is not attached".into()));
            }
            (Action::Rest, InstanceState::Stopped)
        }
    };
    if !running {
        let text = "the replica is not about to start";
        conditions.push(Condition::new(WAIT_FOR_BACKING_IMAGE, ConditionStatus::False, "NotStarting", text));
    }
    status.current_state = state;
    status.started = state == InstanceState::Running;
    (action, conditions)
}

fn decide_start(seen: &ObservedReplica, conditions: &mut Vec<Condition>) -> (Action, InstanceState) {
    let waits =
        |reason: &str, text: String| Condition::new(WAIT_FOR_BACKING_IMAGE, ConditionStatus::True, reason, text);
    if let Disk::Unavailable(why) = &seen.disk {
        conditions.push(Condition::new(READY, ConditionStatus::False, "DiskUnavailable", why.clone()));
        return (Action::Rest, InstanceState::Error);
    }
    if seen.disk == Disk::GivenUp {
        let text = "its disk is no longer a disk of this node";
        conditions.push(Condition::new(READY, ConditionStatus::False, "DiskRemoved", text));
        return (Action::Rest, InstanceState::Error);
    }
    match &seen.image {
        Image::NotNeeded | Image::Ready => {
            let text = "the copy of the image on this disk is ready";
            conditions.push(Condition::new(WAIT_FOR_BACKING_IMAGE, ConditionStatus::False, "Ready", text));
            if let Some(failure) = &seen.failure {
                conditions.push(Condition::new(READY, ConditionStatus::False, "StartFailed", failure.clone()));
            }
            (Action::Start, InstanceState::Starting)
        }
        Image::Absent => {
            let text = format!("image `{}` does not exist or has no copy on this disk yet", seen.image_name);
            let hint = format!("backing-image-csi why image {}", seen.image_name);
            conditions.push(waits("Waiting", text).with_hint(hint));
            (Action::Rest, InstanceState::Stopped)
        }
        Image::Copy { state, progress, message, next_retry } => {
            let mut text = match state {
                CopyState::Failed | CopyState::FailedAndCleanup => {
                    format!("the copy of image `{}` on this disk failed", seen.image_name)
                }
                _ => format!("the copy of image `{}` on this disk is at {progress} %", seen.image_name),
            };
            if !message.is_empty() {
                text = format!("{text}: {message}");
            }
            let mut condition = waits("Waiting", text);
            condition.next_retry_time = next_retry.clone();
            if matches!(state, CopyState::Failed | CopyState::FailedAndCleanup) {
                condition.hint = format!("backing-image-csi why image {}", seen.image_name);
            }
            conditions.push(condition);
            (Action::Rest, InstanceState::Stopped)
        }
    }
}

fn decide_removal(seen: &ObservedReplica, conditions: &mut Vec<Condition>) -> Action {
    match &seen.disk {
        Disk::Available if seen.data_exists => Action::Remove,
        Disk::Available | Disk::GivenUp => Action::Release,
        // Invariant 6: its data may still be there.
        Disk::Unavailable(why) => {
            let hint = "bring the disk back, or remove it from the node's spec.disks to give up what is on it";
            let text = format!("the data of the replica cannot be removed: {why}");
            conditions.push(Condition::new(READY, ConditionStatus::False, "DiskUnavailable", text).with_hint(hint));
            Action::Rest
        }
    }
}

/// One reading of an engine.
#[derive(Clone, Debug)]
pub struct ObservedEngine {
    pub deleted: bool,
    pub desire: DesireState,
    pub process: Process,
    /// What the engine last said; `None`: nothing yet, or it is being replaced.
    pub live: Option<LiveEngine>,
    /// Its block device.
    pub device: Option<String>,
    /// Files of it are left on this node.
    pub files_exist: bool,
    /// A sentence about the last attempt to do something, when it failed.
    pub failure: Option<String>,
}

/// What to do with an engine, and what to report.
pub fn engine(seen: &ObservedEngine, status: &mut EngineStatus) -> (Action, Vec<Condition>) {
    let mut conditions = vec![];
    let running = seen.desire == DesireState::Running && !seen.deleted;
    let ready = |reason: &str, text: String| Condition::new(READY, ConditionStatus::False, reason, text);
    if let Some(live) = &seen.live {
        status.generation = status.generation.max(live.generation);
        status.replica_mode_map = live.replicas.iter().map(|(name, state)| (name.clone(), mode(*state))).collect();
        status.replica_errors = live.replica_errors.clone();
    }
    let (action, state) = match (&seen.process, running) {
        (Process::None, true) => {
            if let Some(failure) = &seen.failure {
                conditions.push(ready("StartFailed", failure.clone()));
            }
            (Action::Start, InstanceState::Starting)
        }
        (Process::Alive, true) => match (&seen.live, &seen.device) {
            (Some(live), Some(_)) if live.serving => {
                conditions.push(match &live.faulted {
                    Some(why) => ready("NoReplicaLeft", why.clone()),
                    None => Condition::new(READY, ConditionStatus::True, "Running", "the engine serves"),
                });
                (Action::Rest, InstanceState::Running)
            }
            (Some(live), None) if live.serving => {
                if let Some(failure) = &seen.failure {
                    conditions.push(ready("NoDevice", failure.clone()));
                }
                (Action::AttachDevice, InstanceState::Starting)
            }
            // Adopted, or its engine is being replaced under the holder: the device goes on.
            (_, Some(_)) => (Action::Rest, InstanceState::Running),
            (_, None) => {
                conditions.push(ready("Starting", "the engine connects to its replicas".into()));
                (Action::Rest, InstanceState::Starting)
            }
        },
        (Process::Died(how), true) => {
            conditions.push(ready("ProcessDied", how.clone()).with_hint("detach the volume and attach it again"));
            (Action::Rest, InstanceState::Error)
        }
        (Process::Alive | Process::Died(_), false) => {
            if let Some(failure) = &seen.failure {
                conditions.push(
                    Condition::new(DETACHED, ConditionStatus::False, "DeviceInUse", failure.clone())
                        .with_hint("unmount the volume or end the processes that use it"),
                );
            }
            (Action::Stop, InstanceState::Stopping)
        }
        (Process::None, false) if seen.files_exist || seen.device.is_some() => (Action::Stop, InstanceState::Stopping),
        (Process::None, false) => {
            conditions.push(ready("Stopped", "the volume is not attached".into()));
            conditions.push(Condition::new(DETACHED, ConditionStatus::True, "Detached", ""));
            (if seen.deleted { Action::Release } else { Action::Rest }, InstanceState::Stopped)
        }
    };
    status.current_state = state;
    status.started = state == InstanceState::Running;
    status.endpoint = match state {
        InstanceState::Running => seen.device.clone().unwrap_or_default(),
        _ => String::new(),
    };
    if state == InstanceState::Stopped {
        status.replica_mode_map = BTreeMap::new();
        status.replica_errors = BTreeMap::new();
        status.current_replica_address_map = BTreeMap::new();
        status.nbd_socket = String::new();
    }
    (action, conditions)
}

fn mode(state: ReplicaState) -> ReplicaMode {
    match state {
        ReplicaState::InSync => ReplicaMode::Rw,
        ReplicaState::Comparing => ReplicaMode::Wo,
        ReplicaState::Dropped => ReplicaMode::Err,
    }
}

#[cfg(test)]
mod tests;
