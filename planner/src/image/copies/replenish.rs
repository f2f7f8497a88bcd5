//! Which copies are missing, and where they come.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus};

use super::{has_no_room, is_evicting};
use crate::image::{Observed, request, selectors};
use crate::placement::{choose_for_copies, refusal};
use crate::retry::{after, parse, since, sooner, until};

/// Adds what is missing; returns why that is not possible, if so, and when to look again.
pub(super) fn replenish(
    o: &Observed,
    status: &BackingImageStatus,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> (Option<String>, Option<Duration>) {
    let (mut good, mut recheck) = (0, None);
    for (disk, _) in map.iter().filter(|(d, s)| !is_evicting(&o.disks, d, s)) {
        let file = status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
        let (counted, wait) = counts(o, &file, disk);
        good += usize::from(counted);
        recheck = sooner(recheck, wait);
    }
    let need = o.scene(status).need();
    if good >= need {
        return (None, recheck);
    }
    let missing = need - good;
    if o.settings.replenish_limit == 0 {
        let why = "setting concurrent-backing-image-replenish-per-node-limit is 0";
        return (Some(format!("{missing} more wanted, but {why}{}", staying(o, status, map))), recheck);
    }
    let selectors = selectors(&o.image);
    let bytes = if status.real_size > 0 { status.real_size } else { status.size };
    let taken: BTreeSet<String> = map.keys().cloned().collect();
    let choice = choose_for_copies(&request(o, &selectors, bytes), &taken, missing);
    for disk in &choice.chosen {
        map.insert(disk.id.clone(), DiskFileSpec::default());
    }
    if choice.chosen.len() < missing {
        let lacking = missing - choice.chosen.len();
        let why = format!("no further disk is eligible: {}", choice.reasons());
        return (Some(format!("{lacking} more wanted, but {why}{}", staying(o, status, map))), recheck);
    }
    (None, recheck)
}

/// Which copies stay for want of others, although they shall leave.
fn staying(o: &Observed, status: &BackingImageStatus, map: &BTreeMap<String, DiskFileSpec>) -> String {
    let is_ready = |disk: &str| status.disk_file_status_map.get(disk).is_some_and(|f| f.state == CopyState::Ready);
    let leaving = map.iter().filter(|(disk, spec)| is_evicting(&o.disks, disk, spec) && is_ready(disk));
    let names: Vec<String> = leaving.map(|(disk, _)| o.disks.label(disk)).collect();
    if names.is_empty() {
        return String::new();
    }
    format!("; until then the copy on {} stays, although eviction is requested there", names.join(" and on "))
}

/// Whether a copy counts as one that there is or will be. A silent disk counts for a while: its copies are most likely intact.
fn counts(o: &Observed, file: &DiskFileStatus, disk: &str) -> (bool, Option<Duration>) {
    match file.state {
        CopyState::Unknown => {
            let Some(since_when) = parse(&file.last_state_transition_time) else { return (true, None) };
            let gone = o.disks.is_gone(disk);
            let patience = if gone { Duration::ZERO } else { o.settings.recovery_wait };
            let counts = since(o.now, since_when) < patience;
            (counts, counts.then(|| until(o.now, after(since_when, patience))))
        }
        // It is tried again in place, as long as its disk could hold it.
        CopyState::Failed | CopyState::FailedAndCleanup => {
            (o.disks.get(disk).is_some_and(|d| refusal(d, &[], &o.settings).is_none() && !has_no_room(file)), None)
        }
        _ => (true, None),
    }
}
