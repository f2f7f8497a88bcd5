//! The copies of an image: what they are, and which are wanted.

mod clean_up;
pub(super) mod eviction;
pub(super) mod limit;
mod observe;
mod replenish;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::ErrorKind;
use api::engine::DesireState;
use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus};

pub use self::clean_up::{Cause, Leaving, leaving};
pub(super) use self::observe::{observe, take_back};
use super::Observed;
use crate::retry::until;

/// What comes of the copies that are wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Plan {
    /// Why there are fewer than asked for, if so.
    pub shortage: Option<String>,
    pub replenish: Replenish,
    /// When to look again.
    pub recheck_after: Option<Duration>,
}

/// Copies that no replica asks for: whoever adds some counted those that are being made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replenish {
    /// The disks on which they are wanted now.
    pub added: BTreeSet<String>,
    /// The nodes whose limit others wait for.
    pub waits_for: BTreeSet<String>,
    /// The nodes on which some are being made, those that were added just now included: one for each copy.
    pub being_made: Vec<String>,
}

/// Adds and removes wanted copies.
pub(super) fn plan(o: &Observed, status: &BackingImageStatus, map: &mut BTreeMap<String, DiskFileSpec>) -> Plan {
    let wanted_by_replicas =
        o.replicas.iter().filter(|r| r.spec.desire_state == DesireState::Running && r.spec.failed_at.is_empty());
    for replica in wanted_by_replicas.filter(|r| o.disks.get(&r.spec.disk_id).is_some()) {
        let (name, volume) = (replica.metadata.name.as_deref().unwrap_or_default(), &replica.spec.volume_name);
        let reason = || format!("replica {name} of volume {volume} lies there");
        let entry = || DiskFileSpec { reason: reason(), ..Default::default() };
        map.entry(replica.spec.disk_id.clone()).or_insert_with(entry);
    }
    let mut plan = Plan::default();
    if ready_in(status, map) == 0 {
        return plan;
    }
    for Leaving { disk, at, .. } in leaving(&o.scene(status), o.now, map) {
        if at > o.now {
            plan.recheck_after = Some(until(o.now, at));
            break;
        }
        map.remove(&disk);
    }
    replenish::replenish(o, status, map, &mut plan);
    plan
}

fn ready_in(status: &BackingImageStatus, map: &BTreeMap<String, DiskFileSpec>) -> usize {
    let is_ready = |disk| status.disk_file_status_map.get(disk).is_some_and(|f| f.state == CopyState::Ready);
    map.keys().filter(|disk| is_ready(*disk)).count()
}

/// Whether a failure says that the disk is full.
pub(super) fn has_no_room(file: &DiskFileStatus) -> bool {
    file.error_kind == Some(ErrorKind::Exhausted)
}
