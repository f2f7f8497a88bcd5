//! The copies of an image: what they are, and which are wanted.

mod clean_up;
mod observe;
mod replenish;

use std::collections::BTreeMap;
use std::time::Duration;

use api::ErrorKind;
use api::engine::DesireState;
use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus};

pub use self::clean_up::{Cause, Leaving, leaving};
pub(super) use self::observe::observe;
use super::Observed;
use crate::disk::Disks;
use crate::retry::{sooner, until};

/// Adds and removes wanted copies; returns why there are fewer than asked for, if so, and when to look again.
pub(super) fn plan(
    o: &Observed,
    status: &BackingImageStatus,
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
    let mut recheck = None;
    for Leaving { disk, at, .. } in leaving(&o.scene(status), o.now, map) {
        if at > o.now {
            recheck = Some(until(o.now, at));
            break;
        }
        map.remove(&disk);
    }
    let (shortage, other) = replenish::replenish(o, status, map);
    (shortage, sooner(recheck, other))
}

fn ready_in(status: &BackingImageStatus, map: &BTreeMap<String, DiskFileSpec>) -> usize {
    let is_ready = |disk| status.disk_file_status_map.get(disk).is_some_and(|f| f.state == CopyState::Ready);
    map.keys().filter(|disk| is_ready(*disk)).count()
}

fn is_evicting(disks: &Disks, disk: &str, spec: &DiskFileSpec) -> bool {
    spec.eviction_requested || disks.get(disk).is_some_and(|d| d.evicting)
}

/// Whether a failure says that the disk is full.
pub(super) fn has_no_room(file: &DiskFileStatus) -> bool {
    file.error_kind == Some(ErrorKind::Exhausted)
}
