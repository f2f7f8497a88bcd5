//! Which copies are not needed any more: unused for long, on a disk that shall be emptied, or on one that is gone for good.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use api::image::{CopyState, DiskFileSpec};
use jiff::Timestamp;

use crate::image::guard::Scene;
use crate::placement::refusal;
use crate::retry::{after, parse};

/// Copies that are due within so long of each other compete: the replicas of a volume that is deleted go one after the other, and the
/// order in which they do says nothing of what should stay.
const TOGETHER: Duration = Duration::from_secs(10);

/// A copy that goes by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    pub disk: String,
    /// When; it may have passed.
    pub at: Timestamp,
    pub cause: Cause,
}

/// Why a copy goes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// No node has its disk any more, and each has told.
    Gone,
    /// Its disk or its entry shall be emptied.
    Evicted,
    /// No replica used it for `backing-image-cleanup-wait-interval`.
    Unused,
}

impl Cause {
    /// The cause as a part of a sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Cause::Gone => "no node has its disk any more",
            Cause::Evicted => "it is evicted",
            Cause::Unused => "no replica uses it",
        }
    }
}

/// The copies of `map` that go by themselves, the first one first, as long as nothing else happens: each under the guards
/// ([`Scene::guard`]), given those before it (LF 4.6, 4.3). Among those that are due together the ones go that lie closest to others,
/// by zone, then by node.
pub fn leaving(scene: &Scene<'_>, now: Timestamp, map: &BTreeMap<String, DiskFileSpec>) -> Vec<Leaving> {
    let mut candidates: Vec<Leaving> = map.keys().filter_map(|disk| candidate(scene, now, disk)).collect();
    let mut rest = map.clone();
    let mut going = vec![];
    while let Some(due) = candidates.iter().map(|leaving| leaving.at.max(now)).min() {
        let together = candidates.iter().enumerate().filter(|(_, leaving)| leaving.at <= after(due, TOGETHER));
        let next = together.min_by_key(|(_, l)| (l.cause, Reverse(company(scene, &rest, &l.disk)), l.at, &l.disk));
        let Some((index, _)) = next else { break };
        let leaving = candidates.remove(index);
        // What may not go now may not go either when there are fewer.
        if may_go(scene, &rest, &leaving) {
            rest.remove(&leaving.disk);
            going.push(leaving);
        }
    }
    going.sort_by(|a, b| (a.at, a.cause, &a.disk).cmp(&(b.at, b.cause, &b.disk)));
    going
}

/// How many of the other copies of `map` that are ready and stay lie in the zone of a disk, and how many on its node.
fn company(scene: &Scene<'_>, map: &BTreeMap<String, DiskFileSpec>, disk: &str) -> (usize, usize) {
    let Some(place) = scene.disks.get(disk) else { return (0, 0) };
    let others = staying(scene, map, disk).filter_map(|other| scene.disks.get(other));
    others.fold((0, 0), |(in_zone, on_node), other| {
        (in_zone + usize::from(other.zone == place.zone), on_node + usize::from(other.node == place.node))
    })
}

/// The copies of `map` beside that on a disk which are ready and need not leave.
fn staying<'a>(
    scene: &'a Scene<'_>,
    map: &'a BTreeMap<String, DiskFileSpec>,
    disk: &'a str,
) -> impl Iterator<Item = &'a String> {
    map.keys().filter(move |other| *other != disk && scene.is_ready(other) && !scene.is_evicting(other))
}

fn candidate(scene: &Scene<'_>, now: Timestamp, disk: &str) -> Option<Leaving> {
    let leaving = |at, cause| Some(Leaving { disk: disk.to_owned(), at, cause });
    let file = scene.status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
    if scene.disks.is_gone(disk) && file.state == CopyState::Unknown {
        // A disk may be on its way from one node to another; that it was silent before says nothing of that.
        let since = parse(&file.gone_since).unwrap_or(now);
        return leaving(after(since, scene.settings.recovery_wait), Cause::Gone);
    }
    if scene.is_evicting(disk) {
        return leaving(now, Cause::Evicted);
    }
    let last_use = scene.status.disk_last_ref_at_map.get(disk).and_then(|at| parse(at))?;
    leaving(after(last_use, scene.settings.cleanup_wait), Cause::Unused)
}

fn may_go(scene: &Scene<'_>, map: &BTreeMap<String, DiskFileSpec>, leaving: &Leaving) -> bool {
    if scene.guard(&leaving.disk, map.keys().map(String::as_str)).is_some() {
        return false;
    }
    let ready = staying(scene, map, &leaving.disk).count();
    // One that would be chosen again at once goes only when it is not missed.
    let would_return = match leaving.cause {
        Cause::Gone => false,
        Cause::Evicted => scene.disks.get(&leaving.disk).is_some_and(|d| refusal(d, &[], scene.settings).is_none()),
        Cause::Unused => true,
    };
    // Unknown is not absent: only that its disk is gone says something.
    let state = scene.status.disk_file_status_map.get(&leaving.disk).map(|f| f.state).unwrap_or_default();
    let is_silent = state == CopyState::Unknown && leaving.cause != Cause::Gone;
    !is_silent && (!would_return || ready >= scene.need())
}
