//! What lies among the files of images on a disk and belongs to no image that exists: told first, removed later.
//!
//! The agent says what is there, this says whose it is. What may belong to somebody is left alone, and so is what something below
//! `replicas/` lies over: objects may have been lost, and a replica without its base is lost too. The rest is told, and goes when it
//! is seen unchanged after [`WAIT`]. Whoever removes it asks [`owner`] once more, with objects that were read after the disk.

use std::collections::BTreeMap;
use std::time::Duration;

use api::image::CopyState;
use api::manager::{FileInfo, Orphan};
use api::names::condition::{NO_FOREIGN_FILES, NO_ORPHANS};
use api::{BackingImage, BackingImageDataSource, Condition, ConditionStatus, condition};
use jiff::Timestamp;

use super::{Action, Agent, Decision, Observed, over};
use crate::disk::{Disk, Health};
use crate::retry::{after, sooner, until};

/// How long something is told before it is removed. No file comes before its object, so nothing of an image that is being created looks
/// like an orphan; this is for who puts objects back that were removed by mistake, and finds the event in time to switch removal off.
pub const WAIT: Duration = Duration::from_secs(60);

/// How long a disk that was found empty counts as empty although its node has not said so yet: nodes look every 30 s.
const EMPTY_FOR: Duration = Duration::from_secs(60);

/// Paths that a condition names; the others stand in the status.
const NAMED: usize = 3;

/// One of the directories in which files of images lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// `backing-images/`
    Copies,
    /// The same, without the file itself: what an unfinished sync left, for one.
    Parts,
    /// `tmp/`: what a data source works on.
    Preparations,
}

/// Something of one image in one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remains {
    pub place: Place,
    pub image: String,
    pub uuid: String,
    pub size: u64,
    /// Another one when something of it changed; empty: a copy that its agent knows.
    pub mark: String,
    /// It holds something that is not of an image.
    pub is_mixed: bool,
}

/// An orphan as it was seen first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sighting {
    pub mark: String,
    pub since: Timestamp,
    /// Why the agent did not remove it.
    pub refused: String,
}

impl Remains {
    /// Its path below the disk.
    pub fn path(&self) -> String {
        let folder = match self.place {
            Place::Copies | Place::Parts => "backing-images",
            Place::Preparations => "tmp",
        };
        format!("{folder}/{}-{}", self.image, self.uuid)
    }
}

/// Whose something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Somebody's, or nobody can tell.
    Somebody,
    /// Nobody's; the phrase says why.
    Nobody(String),
}

/// Decides by the objects of that name as they are: `None` is one that does not exist.
pub fn owner(
    found: &Remains,
    disk: &str,
    image: Option<&BackingImage>,
    source: Option<&BackingImageDataSource>,
) -> Owner {
    let source = source.filter(|s| s.spec.uuid == found.uuid);
    let is_prepared = source.is_some_and(|s| !s.spec.file_transferred && s.spec.disk_uuid == disk);
    let Some(image) = image else {
        return match source {
            Some(_) => Owner::Somebody,
            None => Owner::Nobody(format!("image {} does not exist", found.image)),
        };
    };
    let status = image.status.clone().unwrap_or_default();
    if status.uuid.is_empty() || source.is_some() && status.uuid != found.uuid {
        return Owner::Somebody;
    }
    if status.uuid != found.uuid {
        return Owner::Nobody(format!("image {} is another one now, with uuid {}", found.image, status.uuid));
    }
    let is_wanted =
        || image.spec.disk_file_spec_map.contains_key(disk) || status.disk_file_status_map.contains_key(disk);
    if found.place == Place::Copies || is_prepared || found.place == Place::Parts && is_wanted() {
        return Owner::Somebody;
    }
    // The end of an image, which begins with its data source, has its own way.
    let is_ending = image.metadata.deletion_timestamp.is_some();
    // What was made there may be the only file of the image, unless the next one is made elsewhere or there are others.
    let is_ready = || status.disk_file_status_map.values().any(|copy| copy.state == CopyState::Ready);
    match source {
        // What lies elsewhere than in `tmp/` is not the work of a data source.
        _ if found.place == Place::Parts && is_ready() && !is_ending => {
            Owner::Nobody(format!("it is a part of a copy of image {} that is not wanted here any more", found.image))
        }
        _ if found.place == Place::Parts => Owner::Somebody,
        Some(_) => Owner::Nobody(format!("the preparation of image {} needs it no more", found.image)),
        None if is_ready() && !is_ending => Owner::Nobody(format!("image {} is ready without it", found.image)),
        None => Owner::Somebody,
    }
}

/// Whether an agent is needed to look what lies on the disk; the wait until that is to be asked again.
pub(super) fn must_look(o: &Observed, disk: &Disk) -> Result<(), Option<Duration>> {
    if disk.health != Health::Ready || !disk.holds_image_files {
        return Err(None);
    }
    let again = o.memory.empty_since.map(|at| after(at, EMPTY_FOR)).filter(|at| *at > o.now);
    match again.map(|at| until(o.now, at)) {
        // A clock that was set back must not put it off for long.
        Some(wait) if wait <= EMPTY_FOR => Err(Some(wait)),
        _ => Ok(()),
    }
}

/// Whether an agent without work stays, because of what lies on its disk.
pub(super) fn must_stay(o: &Observed) -> bool {
    let disk = o.disks.get(&o.disk_id).filter(|disk| disk.health == Health::Ready);
    disk.is_some_and(|disk| is_empty(o).map_or_else(|| must_look(o, disk).is_ok(), |is_empty| !is_empty))
}

/// Whether nothing of any image lies there any more; `None`: the agent does not say.
fn is_empty(o: &Observed) -> Option<bool> {
    let Some(Ok(agent)) = &o.agent else { return None };
    agent.remains.as_ref().map(|remains| remains.is_empty() && agent.files.is_empty())
}

/// Tells of orphans, and removes those that were told long enough.
pub(super) fn plan(o: &Observed, agent: &Agent, disk: &Disk, decision: &mut Decision) {
    let Some(remains) = &agent.remains else {
        // The disk could not be looked through: what was said of it stands, and counts anew.
        decision.memory.orphans.clear();
        return;
    };
    let before = std::mem::take(&mut decision.memory.orphans);
    decision.status.orphans.clear();
    let is_of = |f: &FileInfo, image: &BackingImage| {
        let uuid = image.status.as_ref().map(|s| &s.uuid);
        image.metadata.name.as_ref() == Some(&f.name) && uuid == Some(&f.uuid)
    };
    // What its agent knows of an image that exists is dealt with as a copy of it. One of another uuid is of none.
    let strange = agent.files.iter().filter(|f| !o.images.iter().any(|image| is_of(f, image)));
    let copies = strange.map(|f| Remains {
        place: Place::Copies,
        image: f.name.clone(),
        uuid: f.uuid.clone(),
        size: f.real_size.max(f.size),
        mark: String::new(),
        is_mixed: false,
    });
    for found in remains.iter().cloned().chain(copies) {
        let Some(why) = nobodys(o, disk, &found) else { continue };
        let path = found.path();
        let seen = before.get(&path).filter(|seen| seen.mark == found.mark && seen.since <= o.now).cloned();
        let seen = seen.unwrap_or(Sighting { mark: found.mark.clone(), since: o.now, refused: String::new() });
        let what = match kept(o, disk, &found) {
            Some(kept) => format!("{why}; {kept}"),
            None => {
                let due = after(seen.since, WAIT);
                if due <= o.now {
                    let Remains { place, image, uuid, mark, .. } = found.clone();
                    decision.actions.push(Action::RemoveOrphan { place, image, uuid, mark });
                } else {
                    decision.recheck_after = sooner(decision.recheck_after, Some(until(o.now, due)));
                }
                let refused = if seen.refused.is_empty() { String::new() } else { format!(" ({})", seen.refused) };
                format!("{why}; it is removed at {due:.0}{refused}")
            }
        };
        let orphan = Orphan { size: found.size, found_at: seen.since.to_string(), message: what };
        decision.status.orphans.insert(path.clone(), orphan);
        decision.memory.orphans.insert(path, seen);
    }
    decision.status.foreign_files.clone_from(&agent.foreign);
    report(o, decision);
}

/// Why something is nobody's; `None`: it may be somebody's.
fn nobodys(o: &Observed, disk: &Disk, found: &Remains) -> Option<String> {
    let image = o.image(&found.image);
    let is_same = image.and_then(|i| i.status.as_ref()).is_some_and(|s| s.uuid == found.uuid);
    // An entry that is still to be deleted takes all of its image along.
    if is_entry(o, found) && (!is_same || found.place == Place::Parts) && over_entry(o, disk, found).is_none() {
        return None;
    }
    match owner(found, &o.disk_id, image, o.data_sources.get(&found.image)) {
        Owner::Somebody => None,
        Owner::Nobody(why) => Some(why),
    }
}

fn is_entry(o: &Observed, found: &Remains) -> bool {
    o.manager.as_ref().is_some_and(|m| m.spec.records(&found.image, &found.uuid))
}

/// What lies over a copy that is recorded and of no image any more.
fn over_entry(o: &Observed, disk: &Disk, found: &Remains) -> Option<String> {
    if is_entry(o, found) { over::keeps(o, disk, &found.image, &found.uuid) } else { None }
}

/// Why an orphan is not removed, however long it is told.
fn kept(o: &Observed, disk: &Disk, found: &Remains) -> Option<String> {
    if !o.removes_orphans {
        return Some(format!("setting {} says to leave it", api::setting::REMOVE_ORPHANS));
    }
    if found.is_mixed {
        return Some("it is left because files of somebody else lie in it".into());
    }
    if found.place == Place::Preparations {
        return None;
    }
    let over = over_entry(o, disk, found).or_else(|| over::directory(&found.image, &found.uuid, disk))?;
    Some(format!("it is left because {over}"))
}

fn report(o: &Observed, decision: &mut Decision) {
    let status = &mut decision.status;
    let orphans = summary(status.orphans.iter().map(|(path, orphan)| format!("`{path}` ({})", orphan.message)));
    let told = |r#type, reason, message| Condition::new(r#type, ConditionStatus::False, reason, message);
    let conditions = [
        (
            NO_ORPHANS,
            (!orphans.is_empty())
                .then(|| told(NO_ORPHANS, "OrphansFound", format!("it belongs to no image that exists: {orphans}"))),
        ),
        (
            NO_FOREIGN_FILES,
            (!status.foreign_files.is_empty()).then(|| {
                let files = summary(status.foreign_files.iter().map(|path| format!("`{path}`")));
                told(NO_FOREIGN_FILES, "ForeignFiles", format!("it is no file of an image, and is left alone: {files}"))
                    .with_hint("move it away from the directories of images")
            }),
        ),
    ];
    for (r#type, condition) in conditions {
        match condition {
            Some(condition) => condition::set(&mut status.conditions, condition, o.now),
            None => status.conditions.retain(|c| c.r#type != r#type),
        }
    }
}

/// The first of several, and how many more there are.
fn summary(all: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = all.collect();
    let more = all.len().saturating_sub(NAMED);
    let named = all.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

/// Notes that a disk was found empty just now.
pub(super) fn memory_of_empty(o: &Observed) -> super::Memory {
    super::Memory { empty_since: (is_empty(o) == Some(true)).then_some(o.now), ..Default::default() }
}

/// Notes that the agent did not remove an orphan: it is told with the reason, and tried again after the same wait.
pub fn refuse(orphans: &mut BTreeMap<String, Sighting>, path: &str, now: Timestamp, why: String) {
    if let Some(seen) = orphans.get_mut(path) {
        (seen.since, seen.refused) = (now, why);
    }
}

#[cfg(test)]
mod tests;
