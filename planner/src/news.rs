//! What is worth an event of an object: told when it begins to be true.
//!
//! Facts are read off the object as it is now. Whoever tells them compares them with those of the last look: a topic with another
//! reason is news, also when it comes back. The sentences are those of the status.

use api::event::News;
use api::image::{CopyState, DiskFileStatus};
use api::names::condition::{
    CLEANED_UP, CLOCK_STEADY, DEFAULT_DISKS, ENGINE_REPLACEMENT, EVICTED, NO_FOREIGN_FILES, NO_ORPHANS, READY,
    SCHEDULABLE, SCHEDULED, UPGRADED,
};
use api::{
    BackingImage, BackingImageDataSource, BackingImageManager, Condition, ConditionStatus, Engine, ErrorKind, Node,
    Replica, Volume, condition,
};

use crate::disk::Disks;

/// Reasons of conditions that nobody needs an event for: the next one comes soon, or nothing is wanted.
const QUIET: [&str; 5] = ["Creating", "Preparing", "Starting", "Stopped", "Stopping"];

/// Reasons of conditions that do not hold yet, or not any more, as it was wished.
const PROGRESS: [&str; 9] = [
    "Attaching",
    "Detaching",
    "Deleting",
    "DataSourceEnds",
    "EvictionWaits",
    "InProgress",
    "WaitForBackingImage",
    "SchedulingDisabled",
    "NodeSchedulingDisabled",
];

/// Reasons of conditions that hold, and yet somebody should look.
const MEAGER: [&str; 2] = ["Degraded", "FewerCopies"];

/// Something that is true of an object now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// A later fact of the same topic takes the place of this one.
    pub topic: String,
    /// `None`: nobody can tell at the moment, so what was true last stands.
    pub news: Option<News>,
    /// Since when (RFC 3339); empty when that is not known.
    pub since: String,
    /// Another one is news although the reason is the same: the time of the next attempt, or a sentence that matters.
    pub again: String,
}

impl Fact {
    fn new(topic: impl Into<String>, news: News, since: &str) -> Fact {
        Fact { topic: topic.into(), news: Some(news), since: since.to_owned(), again: String::new() }
    }
}

/// What is true of an image: whether it is ready, and where its copies are.
pub fn of_image(image: &BackingImage, disks: &Disks) -> Vec<Fact> {
    let status = image.status.clone().unwrap_or_default();
    let mut facts: Vec<Fact> = of_ready(&status.conditions, "the image can be used").into_iter().collect();
    // Which copies it is about matters as much as that there are some.
    let of_copies = [EVICTED, CLEANED_UP].into_iter().filter_map(|t| of_problem(&status.conditions, t));
    facts.extend(of_copies.map(|fact| {
        let message = fact.news.as_ref().map(|n| n.message.clone()).unwrap_or_default();
        Fact { again: message, ..fact }
    }));
    for (disk, copy) in &status.disk_file_status_map {
        facts.extend(of_copy(disk, copy, disks));
        if !copy.damage.is_empty() {
            let news = News::warning("CopyDamaged", format!("{}: {}", disks.label(disk), copy.damage)).of_part(disk);
            let fact = Fact::new(format!("damage/{disk}"), news, &copy.verified_at);
            facts.push(Fact { again: copy.damage.clone(), ..fact });
        }
    }
    facts
}

fn of_copy(disk: &str, copy: &DiskFileStatus, disks: &Disks) -> Option<Fact> {
    let label = disks.label(disk);
    let news = match copy.state {
        CopyState::NotStarted | CopyState::Pending => return None,
        CopyState::Unknown if disks.is_gone(disk) => Some(News::warning("CopyDiskGone", copy.message.clone())),
        CopyState::Unknown => None,
        CopyState::Starting | CopyState::InProgress | CopyState::ReadyForTransfer => {
            Some(News::normal("CopyStarted", format!("the copy on {label} is being made")))
        }
        CopyState::Ready => Some(News::normal("CopyReady", format!("the copy on {label} is ready"))),
        CopyState::Failed | CopyState::FailedAndCleanup => {
            let reason = match copy.error_kind {
                Some(ErrorKind::Corrupt) => "CopyCorrupt",
                Some(ErrorKind::Exhausted) => "CopyDiskFull",
                _ => "CopyFailed",
            };
            Some(News::warning(reason, format!("the copy on {label} failed: {}", copy.message)))
        }
    };
    Some(Fact {
        topic: format!("copy/{disk}"),
        news: news.map(|n| n.of_part(disk)),
        since: copy.last_state_transition_time.clone(),
        again: copy.next_retry_time.clone(),
    })
}

/// What is true of a volume: where it is attached, what it waits for, what it lacks.
pub fn of_volume(volume: &Volume) -> Vec<Fact> {
    let conditions = volume.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let mut facts: Vec<Fact> = of_ready(conditions, "the volume can be used").into_iter().collect();
    for fact in &mut facts {
        // Which replicas are lost and who holds a device matter as much as that there is one.
        if let Some(news) = fact.news.as_ref().filter(|n| ["Degraded", "Detaching", "Faulted"].contains(&&*n.reason)) {
            fact.again.clone_from(&news.message);
        }
    }
    facts.extend(of_problem(conditions, SCHEDULED));
    facts
}

/// What is true of an engine.
pub fn of_engine(engine: &Engine) -> Vec<Fact> {
    let conditions = engine.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let node = &engine.spec.node_id;
    let upgraded = condition::find(conditions, UPGRADED).and_then(|c| of_condition(c, ""));
    of_ready(conditions, &format!("it serves on node {node}")).into_iter().chain(upgraded).collect()
}

/// What is true of a replica: whether it serves, or why it failed.
pub fn of_replica(replica: &Replica, disks: &Disks) -> Vec<Fact> {
    let (spec, label) = (&replica.spec, disks.label(&replica.spec.disk_id));
    let conditions = replica.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let mut facts: Vec<Fact> = of_ready(conditions, &format!("it serves from {label}")).into_iter().collect();
    if !spec.failed_at.is_empty() {
        let why = if spec.failed_reason.is_empty() { "it was marked as failed" } else { &spec.failed_reason };
        let news = News::warning("ReplicaFailed", format!("{why} ({label}, volume {})", spec.volume_name));
        facts.push(Fact { again: spec.failed_at.clone(), ..Fact::new("failed", news, &spec.failed_at) });
    }
    facts
}

/// What is true of the agent of a disk.
pub fn of_manager(manager: &BackingImageManager, disks: &Disks) -> Vec<Fact> {
    let conditions = manager.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let mut facts: Vec<Fact> = of_ready(conditions, "").into_iter().collect();
    let found = manager.status.clone().unwrap_or_default();
    let paths: [(_, Vec<String>); 2] =
        [(NO_ORPHANS, found.orphans.into_keys().collect()), (NO_FOREIGN_FILES, found.foreign_files)];
    for (r#type, paths) in paths {
        // One more is news, another time of its removal is not.
        let fact = of_problem(conditions, r#type);
        facts.extend(fact.map(|fact| Fact { again: paths.join(", "), ..fact }));
    }
    for news in facts.iter_mut().filter_map(|f| f.news.as_mut()) {
        news.message += &format!(" ({})", disks.label(&manager.spec.disk_uuid));
    }
    facts
}

/// What is true of the preparation of an image's first file.
pub fn of_data_source(source: &BackingImageDataSource, disks: &Disks) -> Vec<Fact> {
    let conditions = source.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let mut facts: Vec<Fact> = of_ready(conditions, "").into_iter().collect();
    for news in facts.iter_mut().filter_map(|f| f.news.as_mut()).filter(|n| n.reason == "InProgress") {
        news.message = format!("the file is being prepared on {}", disks.label(&source.spec.disk_uuid));
    }
    facts
}

/// What is true of a node and its disks.
pub fn of_node(node: &Node) -> Vec<Fact> {
    let status = node.status.clone().unwrap_or_default();
    let mut facts: Vec<Fact> = of_ready(&status.conditions, "the node reports").into_iter().collect();
    facts.extend(
        [DEFAULT_DISKS, ENGINE_REPLACEMENT, CLOCK_STEADY].iter().filter_map(|t| of_problem(&status.conditions, t)),
    );
    for (name, disk) in &status.disk_status {
        let ready = condition::find(&disk.conditions, READY);
        let fact = match ready {
            Some(ready) if ready.is_true() => of_problem(&disk.conditions, SCHEDULABLE).or_else(|| {
                let news = News::normal("DiskReady", "it can be used");
                Some(Fact::new("", news, &ready.last_transition_time))
            }),
            Some(ready) => of_condition(ready, ""),
            None => None,
        };
        facts.extend(fact.map(|fact| Fact {
            topic: format!("disk/{name}"),
            news: fact.news.map(|n| News { message: format!("{name}: {}", n.message), part: name.clone(), ..n }),
            ..fact
        }));
    }
    facts
}

fn of_ready(conditions: &[Condition], holds: &str) -> Option<Fact> {
    of_condition(condition::find(conditions, READY)?, holds)
}

/// A condition of which only the absence is news.
fn of_problem(conditions: &[Condition], r#type: &str) -> Option<Fact> {
    of_condition(condition::find(conditions, r#type).filter(|c| !c.is_true())?, "")
}

/// `holds`: what to say of one that holds and says nothing itself.
fn of_condition(condition: &Condition, holds: &str) -> Option<Fact> {
    let Condition { r#type, status, last_transition_time, reason, message, next_retry_time, hint, .. } = condition;
    let reason = if reason.is_empty() { r#type.as_str() } else { reason };
    if QUIET.contains(&reason) {
        return None;
    }
    let mut text = if message.is_empty() { holds.to_owned() } else { message.clone() };
    if !hint.is_empty() {
        text += &format!("; {hint}");
    }
    let is_fine = match status {
        ConditionStatus::True => !MEAGER.contains(&reason),
        ConditionStatus::False | ConditionStatus::Unknown => PROGRESS.contains(&reason),
    };
    let news = if is_fine { News::normal(reason, text) } else { News::warning(reason, text) };
    let fact = Fact::new(r#type.as_str(), news, last_transition_time);
    Some(Fact { again: next_retry_time.clone(), ..fact })
}

#[cfg(test)]
mod tests;
