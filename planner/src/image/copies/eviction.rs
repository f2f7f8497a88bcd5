//! Copies that shall leave their disks and are still there: the image says of each what it waits for.

use std::collections::BTreeMap;

use api::image::{CopyState, DiskFileSpec};
use api::names::condition::EVICTED;
use api::{Condition, ConditionStatus};

use crate::image::guard::{Guard, Scene};

/// The condition; nothing when no copy of `map` shall leave. `shortage`: why no further ones are to be had.
pub(in crate::image) fn condition(
    scene: &Scene<'_>,
    map: &BTreeMap<String, DiskFileSpec>,
    shortage: Option<&str>,
) -> Option<Condition> {
    let staying = map.keys().filter_map(|disk| Some((disk, scene.evicting(disk)?, keeps(scene, map, disk))));
    let staying: Vec<(&String, &str, Guard)> = staying.collect();
    let (_, _, first) = staying.first()?;
    // What is being made elsewhere is only waited for.
    let is_counted = |guard: &Guard| matches!(guard, Guard::TooFew { .. });
    let is_moving = shortage.is_none() && staying.iter().all(|(_, _, guard)| is_counted(guard));
    let reason = if is_moving { "EvictionWaits" } else { "EvictionBlocked" };
    let sentence = |(disk, cause, guard): &(&String, &str, Guard)| {
        format!("the copy on {} stays, although {cause}: {}", scene.disks.label(disk), guard.sentence())
    };
    let shortage = shortage.filter(|_| staying.iter().any(|(_, _, guard)| is_counted(guard))).map(str::to_owned);
    let message = staying.iter().map(sentence).chain(shortage).collect::<Vec<_>>().join("; ");
    let condition = Condition::new(EVICTED, ConditionStatus::False, reason, message);
    Some(if is_moving { condition } else { condition.with_hint(first.hint()) })
}

/// What keeps a copy that is still wanted although it shall leave.
fn keeps(scene: &Scene<'_>, map: &BTreeMap<String, DiskFileSpec>, disk: &str) -> Guard {
    let file = scene.status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
    let is_ready = |disk: &&String| {
        scene.status.disk_file_status_map.get(*disk).is_some_and(|other| other.state == CopyState::Ready)
    };
    let others = map.keys().filter(|other| *other != disk && scene.evicting(other).is_none());
    let guard = scene.guard(disk, map.keys().map(String::as_str));
    guard.unwrap_or_else(|| match file.state {
        CopyState::Unknown => Guard::Silent(file.message),
        _ => Guard::TooFew { left: others.filter(is_ready).count(), wanted: scene.need() },
    })
}
