//! Which copies are missing, and where they come.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus};

use super::limit::being_made_of;
use super::{Plan, has_no_room};
use crate::disk::Health;
use crate::image::{Observed, name_of, request, selectors};
use crate::placement::{Choice, Limit, choose_for_copies, refusal};
use crate::retry::{after, parse, since, sooner, until};

/// Adds what is missing to the map and to the plan, which says why that is not possible, if so, and when to look again.
pub(super) fn replenish(
    o: &Observed,
    status: &BackingImageStatus,
    map: &mut BTreeMap<String, DiskFileSpec>,
    plan: &mut Plan,
) {
    let scene = o.scene(status);
    let mut good = BTreeSet::new();
    for disk in map.keys().filter(|d| !scene.is_evicting(d)) {
        let file = status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
        let (counted, wait) = counts(o, &file, disk);
        if counted {
            good.insert(disk.clone());
        }
        plan.recheck_after = sooner(plan.recheck_after, wait);
    }
    let need = scene.need();
    if good.len() >= need {
        return;
    }
    let missing = need - good.len();
    if o.settings.replenish_limit == 0 {
        let why = "setting concurrent-backing-image-replenish-per-node-limit is 0";
        plan.shortage = Some(format!("{missing} more wanted, but {why}"));
        return;
    }
    let mut making = o.making.clone();
    for node in being_made_of(o, status, map) {
        making.entry(node).or_default().push(name_of(&o.image).to_owned());
    }
    let limit = Limit { per_node: o.settings.replenish_limit, making: &making };
    let (selectors, taken) = (selectors(&o.image), map.keys().cloned().collect());
    let bytes = status.copy_bytes();
    let choice = choose_for_copies(&request(o, &selectors, &taken, &good, bytes), missing, Some(limit));
    for (n, chosen) in choice.chosen.iter().enumerate() {
        let reason = format!("copy {} of the {need} that are wanted; {}", good.len() + n + 1, chosen.why);
        map.insert(chosen.disk.id.clone(), DiskFileSpec { reason, ..Default::default() });
        plan.replenish.added.insert(chosen.disk.id.clone());
        making.entry(chosen.disk.node.clone()).or_default().push(name_of(&o.image).to_owned());
    }
    let limit = Limit { per_node: o.settings.replenish_limit, making: &making };
    plan.shortage = shortage(&choice, missing, limit);
    plan.replenish.waits_for = choice.waiting.into_iter().collect();
}

/// Why not all that is missing was placed, if so.
fn shortage(choice: &Choice, missing: usize, limit: Limit<'_>) -> Option<String> {
    let lacking = missing - choice.chosen.len();
    if lacking == 0 {
        return None;
    }
    let busy: BTreeSet<&String> = choice.waiting.iter().collect();
    let mut why: Vec<String> = busy.into_iter().map(|node| limit.sentence(node)).collect();
    if choice.waiting.len() < lacking {
        why.push(format!("no further disk is eligible: {}", choice.reasons()));
    }
    Some(format!("{lacking} more wanted, but {}", why.join(", and ")))
}

/// Whether a copy counts as one that there is or will be. A silent disk counts for a while: its copies are most likely intact.
fn counts(o: &Observed, file: &DiskFileStatus, disk: &str) -> (bool, Option<Duration>) {
    let is_away = o.disks.get(disk).is_none_or(|d| d.health != Health::Ready);
    let silent_since = match file.state {
        CopyState::Unknown => parse(&file.last_state_transition_time),
        // What nobody has begun with comes as soon as its disk does.
        CopyState::NotStarted | CopyState::Pending | CopyState::Starting if is_away => {
            o.disks.get(disk).and_then(|d| d.away_since)
        }
        // It is tried again in place, as long as its disk could hold it.
        CopyState::Failed | CopyState::FailedAndCleanup => {
            let could_hold = o.disks.get(disk).is_some_and(|d| refusal(d, &[], &o.settings).is_none());
            return (could_hold && !has_no_room(file), None);
        }
        _ => return (true, None),
    };
    let Some(silent_since) = silent_since else { return (true, None) };
    let patience = if o.disks.is_gone(disk) { Duration::ZERO } else { o.settings.replenish_wait };
    let counts = since(o.now, silent_since) < patience;
    (counts, counts.then(|| until(o.now, after(silent_since, patience))))
}
