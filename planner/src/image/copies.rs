//! The copies of an image: what they are, and which are wanted.

mod clean_up;
mod observe;
mod replenish;

use std::collections::BTreeMap;
use std::time::Duration;

use api::ErrorKind;
use api::engine::DesireState;
use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus};

pub(super) use self::observe::observe;
use super::Observed;
use crate::retry::sooner;

/// Adds and removes wanted copies; returns why there are fewer than asked for, if so, and when to look again.
pub(super) fn plan(
    o: &Observed,
    status: &mut BackingImageStatus,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> (Option<String>, Option<Duration>) {
    let wanted_by_replicas =
        o.replicas.iter().filter(|r| r.spec.desire_state == DesireState::Running && r.spec.failed_at.is_empty());
    for replica in wanted_by_replicas.filter(|r| o.disks.get(&r.spec.disk_id).is_some()) {
        map.entry(replica.spec.disk_id.clone()).or_default();
    }
    let ready = ready_in(status, map);
    if ready == 0 {
        return (None, None);
    }
    let recheck = clean_up::remove_unused(o, status, map);
    let (shortage, other) = replenish::replenish(o, status, map);
    (shortage, sooner(recheck, other))
}

fn need(o: &Observed) -> usize {
    let asked = o.image.spec.min_number_of_copies;
    (if asked == 0 { o.settings.min_copies } else { asked }).max(1) as usize
}

fn state(status: &BackingImageStatus, disk: &str) -> CopyState {
    status.disk_file_status_map.get(disk).map_or(CopyState::NotStarted, |f| f.state)
}

fn ready_in(status: &BackingImageStatus, map: &BTreeMap<String, DiskFileSpec>) -> usize {
    map.keys().filter(|d| state(status, d) == CopyState::Ready).count()
}

fn is_evicting(o: &Observed, disk: &str, spec: &DiskFileSpec) -> bool {
    spec.eviction_requested || o.disks.get(disk).is_some_and(|d| d.evicting)
}

/// Whether a failure says that the disk is full.
pub(super) fn has_no_room(file: &DiskFileStatus) -> bool {
    file.error_kind == Some(ErrorKind::Exhausted)
}
