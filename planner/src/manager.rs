//! The agent of one disk: whether it runs, and what it is asked to do with each file.
//!
//! An entry stays in `spec.backingImages` until the agent has confirmed that the file is gone, so nothing is forgotten on a disk.

mod bandwidth;
mod copy;
mod files;
mod object;
pub mod orphans;
mod over;
mod verification;

use std::collections::BTreeMap;
use std::time::Duration;

use api::image::CopyState;
use api::manager::{BackingImageManagerSpec, BackingImageManagerStatus, FileInfo, ManagerState};
use api::names::condition::READY;
use api::{
    BackingImage, BackingImageDataSource, BackingImageManager, Condition, ConditionStatus, ErrorKind, Owner, Replica,
    condition,
};
use jiff::Timestamp;

pub use self::bandwidth::Bandwidth;
use self::files::{files, wanted};
use self::object::{object, wish};
use self::orphans::{Place, Remains, Sighting};
pub use self::over::lies_over;
use crate::disk::{Disk, Disks, Health};
use crate::retry::{Retry, after};
use crate::workload::{SILENCE_LIMIT, State, Wish, Workload};

/// What an agent says, when it is asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Agent {
    pub api_version: i64,
    pub api_min_version: i64,
    /// Two images of one name, one after the other, differ in their uuids.
    pub files: Vec<FileInfo>,
    /// What else lies on the disk and could be of an image; `None`: it could not be looked through.
    pub remains: Option<Vec<Remains>>,
    /// What lies there and is not of an image, by its path below the disk.
    pub foreign: Vec<String>,
    /// How many bytes a second it sends at most; `None`: it cannot be told.
    pub bandwidth: Option<Bandwidth>,
}

impl Agent {
    fn file(&self, image: &str, uuid: &str) -> Option<&FileInfo> {
        self.files.iter().find(|file| file.name == image && file.uuid == uuid)
    }
}

/// What the controller remembers of its attempts; a restart of it starts anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Starts of the agent.
    pub restart: Retry,
    /// Attempts to get a copy, by image name.
    pub copies: BTreeMap<String, Attempt>,
    /// Since when the agent runs and does not answer.
    pub silent_since: Option<Timestamp>,
    /// What belongs to no image, by its path below the disk.
    pub orphans: BTreeMap<String, Sighting>,
    /// When nothing of any image lay on the disk.
    pub empty_since: Option<Timestamp>,
}

/// The attempts to get one copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    pub retry: Retry,
    /// The kind of failure that `retry` tells of.
    pub kind: Option<ErrorKind>,
    /// An attempt was made whose end has not been seen.
    pub is_running: bool,
    /// The last attempt was to take over what a data source prepared.
    pub is_hand_over: bool,
}

impl Attempt {
    /// Whether what a data source prepared was not there when it was to be taken over.
    pub fn misses_the_prepared_file(&self) -> bool {
        self.is_hand_over && self.kind == Some(ErrorKind::NotFound)
    }
}

/// One reading.
#[derive(Clone, Debug)]
pub struct Observed {
    pub now: Timestamp,
    /// The object's and the workload's name.
    pub name: String,
    /// The disk, by UUID; empty when neither a node, nor an image, nor the object itself names it.
    pub disk_id: String,
    pub disks: Disks,
    pub manager: Option<BackingImageManager>,
    pub workload: Option<Workload>,
    /// `None`: it was not asked, since it does not run. `Err`: it does not answer, and why.
    pub agent: Option<Result<Agent, String>>,
    pub images: Vec<BackingImage>,
    pub data_sources: BTreeMap<String, BackingImageDataSource>,
    /// Those on this disk, as far as they are of images whose copy here may be nobody's.
    pub replicas: Vec<Replica>,
    /// Image name → addresses of other agents that have a ready copy of it.
    pub peers: BTreeMap<String, Vec<String>>,
    /// How old the last verification of a copy may become; zero: no limit.
    pub scrub_interval: Duration,
    pub removes_orphans: bool,
    /// The setting `backing-image-bandwidth-limit`.
    pub bandwidth_limit: u64,
    pub memory: Memory,
}

impl Observed {
    /// The image of that name.
    fn image(&self, name: &str) -> Option<&BackingImage> {
        self.images.iter().find(|image| image.metadata.name.as_deref() == Some(name))
    }
}

/// One step; each can be repeated.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Create(Box<BackingImageManager>),
    SetSpec(Box<BackingImageManagerSpec>),
    EnsureWorkload(Wish),
    RemoveWorkload,
    /// Remove a file and everything temporary of it.
    DeleteFile {
        image: String,
        uuid: String,
    },
    /// Remove a file that its agent takes for good and that is no copy of the image: it is wanted, and got anew. What a data source
    /// prepared of the image stays: it may be what the copy is got from.
    ReplaceFile {
        image: String,
        uuid: String,
    },
    /// Take the file over from the data source at this address; without one, adopt what is on the disk.
    FetchFile {
        file: FileWish,
        from: Option<String>,
    },
    /// Receive it from peers.
    SyncFile {
        file: FileWish,
        from: Vec<String>,
    },
    /// Read a ready copy and compare it with its manifest; 0 bytes a second: as fast as possible.
    VerifyFile {
        image: String,
        uuid: String,
        requested_at: String,
        bytes_per_second: u64,
    },
    /// From now on so much is sent at most, also of what is being sent.
    LimitBandwidth(Bandwidth),
    /// Remove what belongs to no image, if it still has that mark.
    RemoveOrphan {
        place: Place,
        image: String,
        uuid: String,
        mark: String,
    },
    /// Nothing is left: delete the object and its finalizer.
    Remove,
}

/// The file that is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileWish {
    pub image: String,
    pub uuid: String,
    /// 0 and empty: not known yet.
    pub size: u64,
    pub checksum: String,
}

/// What to do now, what to report, and what to remember.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub actions: Vec<Action>,
    pub status: BackingImageManagerStatus,
    pub memory: Memory,
    pub recheck_after: Option<Duration>,
}

impl Decision {
    /// Whether the agent ends, what lies on its disk is forgotten, or an orphan goes. That is decided on a sure reading only; whoever
    /// removes a file asks for its image right before.
    pub fn takes_away(&self) -> bool {
        let takes_away =
            |a: &Action| matches!(a, Action::RemoveWorkload | Action::Remove | Action::RemoveOrphan { .. });
        self.actions.iter().any(takes_away)
    }
}

/// Decides about the agent of one disk.
pub fn decide(observed: &Observed) -> Decision {
    let o = observed;
    let status = o.manager.as_ref().and_then(|m| m.status.clone()).unwrap_or_default();
    // Silence counts anew after each look that did not meet it.
    let memory = Memory { silent_since: None, ..o.memory.clone() };
    let mut decision = Decision { actions: vec![], status, memory, recheck_after: None };
    let wanted = wanted(o);
    let Some(manager) = &o.manager else {
        let disk = o.disks.get(&o.disk_id);
        let look = disk.map_or(Err(None), |disk| orphans::must_look(o, disk));
        match (disk, look) {
            (Some(disk), look) if !wanted.is_empty() || look.is_ok() => {
                decision.actions.push(Action::Create(Box::new(object(o, disk, wanted))));
            }
            (_, look) => {
                if wanted.is_empty() && o.workload.is_some() {
                    decision.actions.push(Action::RemoveWorkload);
                }
                decision.recheck_after = look.err().flatten();
            }
        }
        return decision;
    };
    let has_entries = !manager.spec.backing_images.is_empty();
    if wanted.is_empty() && !has_entries && !orphans::must_stay(o) || o.disks.is_gone(&o.disk_id) {
        // A disk that is gone for good takes its files along.
        if o.workload.is_some() {
            decision.actions.push(Action::RemoveWorkload);
        }
        decision.actions.push(Action::Remove);
        decision.memory = orphans::memory_of_empty(o);
        return decision;
    }
    let mut spec = manager.spec.clone();
    if let Some(disk) = o.disks.get(&o.disk_id) {
        spec.node_id.clone_from(&disk.node);
        spec.disk_path.clone_from(&disk.path);
    }
    for (image, uuid) in &wanted {
        // An entry of another uuid goes first; see `files`.
        spec.backing_images.entry(image.clone()).or_insert_with(|| uuid.clone());
    }
    if spec != manager.spec {
        // Also while the disk is away: what may lie there is remembered.
        decision.actions.push(Action::SetSpec(Box::new(spec.clone())));
    }
    let disk = match o.disks.get(&o.disk_id) {
        Some(disk) if disk.health == Health::Ready => disk,
        Some(Disk { health: Health::NotReady(why) | Health::Unknown(why), .. }) => {
            silence(&mut decision.status, ManagerState::Unknown, why, o.now);
            return decision;
        }
        _ => {
            silence(&mut decision.status, ManagerState::Unknown, "no node has reported this disk yet", o.now);
            return decision;
        }
    };
    if let Some(agent) = running(o, disk, &mut decision) {
        files(o, (agent, disk), &spec, &wanted, &mut decision);
        orphans::plan(o, agent, disk, &mut decision);
        bandwidth::plan(o, agent, &mut decision);
    }
    decision
}

/// Reports an agent that cannot be asked: what it had is unknown, not gone.
fn silence(status: &mut BackingImageManagerStatus, state: ManagerState, why: &str, now: Timestamp) {
    status.current_state = state;
    for file in status.backing_image_file_map.values_mut() {
        if !matches!(file.state, CopyState::Failed | CopyState::FailedAndCleanup) {
            file.state = CopyState::Unknown;
            file.message = why.into();
        }
    }
    let (verdict, reason) = match state {
        ManagerState::Unknown => (ConditionStatus::Unknown, "Unknown"),
        ManagerState::Error | ManagerState::Stopped => (ConditionStatus::False, "Ended"),
        _ => (ConditionStatus::False, "Starting"),
    };
    condition::set(&mut status.conditions, Condition::new(READY, verdict, reason, why), now);
}

/// Keeps the agent running; returns what it says when it does.
fn running<'a>(o: &'a Observed, disk: &Disk, decision: &mut Decision) -> Option<&'a Agent> {
    let wish = Wish { owner: o.manager.as_ref().and_then(Owner::of), ..wish(&o.name, disk) };
    let Some(workload) = &o.workload else {
        let retry = &decision.memory.restart;
        if retry.is_due(o.now) {
            decision.actions.push(Action::EnsureWorkload(wish));
            silence(&mut decision.status, ManagerState::Starting, "the agent of the disk is starting", o.now);
        } else {
            let (why, wait) = (retry.message.clone(), retry.wait(o.now));
            silence(&mut decision.status, ManagerState::Error, &why, o.now);
            set_next_retry(&mut decision.status, decision.memory.restart.next_text());
            decision.recheck_after = wait;
        }
        return None;
    };
    if !workload.wish.is_same_work(&wish) {
        // The disk moved to another node or path.
        decision.actions.extend([Action::RemoveWorkload, Action::EnsureWorkload(wish)]);
        silence(&mut decision.status, ManagerState::Starting, "the agent of the disk is started anew", o.now);
        return None;
    }
    let is_silent = workload.state == State::Running && matches!(o.agent, Some(Err(_)));
    let since = o.memory.silent_since.unwrap_or(o.now);
    decision.memory.silent_since = is_silent.then_some(since);
    if must_be_replaced(workload, &wish, o.agent.as_ref(), after(since, SILENCE_LIMIT) <= o.now) {
        decision.actions.extend([Action::RemoveWorkload, Action::EnsureWorkload(wish)]);
        let why = "the agent of the disk is replaced by one of the present version";
        silence(&mut decision.status, ManagerState::Starting, why, o.now);
        return None;
    }
    match (&workload.state, &o.agent) {
        (State::Unknown(why), _) => silence(&mut decision.status, ManagerState::Unknown, why, o.now),
        (State::Starting(_), _) | (State::Running, None) => {
            let why = workload.state.starting("the agent of the disk");
            silence(&mut decision.status, ManagerState::Starting, &why, o.now);
        }
        (State::Failed(why), _) => {
            decision.actions.push(Action::RemoveWorkload);
            decision.memory.restart = decision.memory.restart.failed(o.now, why.clone());
            for attempt in decision.memory.copies.values_mut() {
                attempt.is_running = false;
            }
            silence(&mut decision.status, ManagerState::Error, why, o.now);
            set_next_retry(&mut decision.status, decision.memory.restart.next_text());
            decision.recheck_after = decision.memory.restart.wait(o.now);
        }
        (State::Running, Some(Err(why))) => {
            let why = format!("the agent of the disk does not answer: {why}");
            silence(&mut decision.status, ManagerState::Unknown, &why, o.now);
            decision.recheck_after = Some(Duration::from_secs(1));
        }
        (State::Running, Some(Ok(agent))) => {
            let status = &mut decision.status;
            status.current_state = ManagerState::Running;
            status.ip.clone_from(&workload.ip);
            status.storage_ip.clone_from(&workload.ip);
            status.api_version = agent.api_version;
            status.api_min_version = agent.api_min_version;
            let condition = Condition::new(READY, ConditionStatus::True, "Running", "the agent of the disk answers");
            condition::set(&mut status.conditions, condition, o.now);
            return Some(agent);
        }
    }
    None
}

/// Whether an agent of another version, or of another object, makes room: once it has nothing in hand. One that does not get ready,
/// such as one whose image cannot be pulled any more, has nothing. One that is silent for long may have: what it receives goes on where
/// it was or is begun again, who receives from it asks another one, and what it holds is looked at when its successor adopts it. That
/// costs less than an agent with which the present version may never be able to speak.
fn must_be_replaced(
    workload: &Workload,
    wish: &Wish,
    agent: Option<&Result<Agent, String>>,
    is_silent_for_long: bool,
) -> bool {
    let is_idle = match (&workload.state, agent) {
        (State::Starting(_), _) => true,
        (State::Running, Some(Ok(agent))) => agent.files.iter().all(|file| {
            let is_settled = matches!(file.state, CopyState::Ready | CopyState::Failed | CopyState::FailedAndCleanup);
            is_settled && file.sending_reference == 0
        }),
        (State::Running, Some(Err(_))) => is_silent_for_long,
        // What it does is not known, or it ended and is started anew anyway.
        (State::Running | State::Unknown(_) | State::Failed(_), _) => false,
    };
    is_idle && (workload.is_outdated || workload.wish.owner != wish.owner)
}

fn set_next_retry(status: &mut BackingImageManagerStatus, at: String) {
    if let Some(condition) = status.conditions.iter_mut().find(|c| c.r#type == READY) {
        condition.next_retry_time = at;
    }
}

#[cfg(test)]
mod tests;
