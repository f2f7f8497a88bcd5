//! The copies of an image: what they are, and which are wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::ErrorKind;
use api::engine::DesireState;
use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus};
use api::manager::{FileInfo, ManagerState};

use super::{Observed, difference, name_of, request, selectors};
use crate::disk::Health;
use crate::placement::{choose_for_copies, refusal};
use crate::retry::{after, parse, since, sooner, until};

/// Writes what managers and the data source report into the status; the first complete file decides size, checksum and format.
pub(super) fn observe(o: &Observed, status: &mut BackingImageStatus) {
    let reports: BTreeMap<String, FileInfo> =
        o.image.spec.disk_file_spec_map.keys().map(|disk| (disk.clone(), report(o, status, disk))).collect();
    let has_file = |f: &&FileInfo| f.state == CopyState::Ready;
    let is_known = !status.checksum.is_empty();
    if let Some(first) =
        reports.values().filter(has_file).find(|f| is_known || difference(f, &o.image.spec, status).is_none())
    {
        let take = |known: &mut u64, seen: u64| {
            if *known == 0 {
                *known = seen;
            }
        };
        if !is_known && first.size > 0 {
            status.size = first.size;
        }
        take(&mut status.virtual_size, first.virtual_size);
        take(&mut status.real_size, first.real_size);
        if status.checksum.is_empty() {
            status.checksum.clone_from(&first.current_checksum);
        }
        if status.format.is_empty() {
            status.format.clone_from(&first.format);
        }
    } else if status.checksum.is_empty()
        && let Some(working) = reports.values().find(|f| f.size > 0)
    {
        // The length that the source announced; it is fixed once the file is whole.
        status.size = working.size;
    }

    let before = std::mem::take(&mut status.disk_file_status_map);
    for (disk, mut file) in reports {
        if matches!(file.state, CopyState::Ready | CopyState::ReadyForTransfer)
            && let Some(why) = difference(&file, &o.image.spec, status)
        {
            file.state = CopyState::Failed;
            file.message = why;
            file.error_kind = Some(ErrorKind::Incompatible);
        }
        let mut seen = before.get(&disk).cloned().unwrap_or_default();
        if seen.state != file.state || seen.last_state_transition_time.is_empty() {
            seen.last_state_transition_time = o.now.to_string();
        }
        seen.state = file.state;
        seen.progress = if file.state == CopyState::Ready { 100 } else { file.progress };
        seen.message = file.message;
        seen.next_retry_time = file.next_retry_time;
        seen.error_kind = file.error_kind;
        if file.state != CopyState::Unknown {
            seen.verified_at = file.verified_at;
            seen.damage = file.damage;
        }
        status.disk_file_status_map.insert(disk, seen);
    }
    remember_last_use(o, status);
}

/// What is known of the copy on one disk.
fn report(o: &Observed, status: &BackingImageStatus, disk: &str) -> FileInfo {
    let name = name_of(&o.image);
    let before = status.disk_file_status_map.get(disk).map_or(CopyState::NotStarted, |f| f.state);
    let say = |state, message: String| FileInfo { state, message, ..Default::default() };
    // What was there is unknown now; what was not there is still to come.
    let silent = |message: String| match before {
        CopyState::NotStarted | CopyState::Pending | CopyState::Starting => say(CopyState::Pending, message),
        _ => say(CopyState::Unknown, message),
    };
    let manager = o.managers.iter().find(|m| m.spec.disk_uuid == disk);
    let manager_status = manager.and_then(|m| m.status.clone()).unwrap_or_default();
    let file = manager_status.backing_image_file_map.get(name).filter(|f| f.uuid == status.uuid);
    let source = o.data_source.as_ref().filter(|s| !s.spec.file_transferred && s.spec.disk_uuid == disk);

    if let Some(source) = source {
        let taken = file.filter(|f| matches!(f.state, CopyState::Ready | CopyState::Failed));
        if let Some(file) = taken {
            return file.clone();
        }
        let seen = source.status.clone().unwrap_or_default();
        return FileInfo {
            state: if seen.current_state == CopyState::Ready {
                CopyState::ReadyForTransfer
            } else {
                seen.current_state
            },
            size: seen.size,
            progress: seen.progress,
            current_checksum: seen.checksum,
            message: seen.message,
            error_kind: seen.error_kind,
            next_retry_time: seen.next_retry_time,
            ..Default::default()
        };
    }
    if let Some(file) = file {
        return file.clone();
    }
    match o.disks.get(disk).map(|d| &d.health) {
        None if o.disks.is_gone(disk) => say(
            CopyState::Unknown,
            format!("no node has a disk {disk}; remove it from diskFileSpecMap if it is gone for good"),
        ),
        None => silent(format!("no node has reported disk {disk} yet")),
        Some(Health::NotReady(why) | Health::Unknown(why)) => silent(why.clone()),
        Some(Health::Ready) => match manager_status.current_state {
            ManagerState::Running => say(CopyState::Pending, String::new()),
            ManagerState::Error => silent("the agent of the disk ended and is started again".into()),
            _ => silent("the agent of the disk is starting".into()),
        },
    }
}

/// Keeps the time since when no replica uses the copy of a disk.
fn remember_last_use(o: &Observed, status: &mut BackingImageStatus) {
    let used: BTreeSet<&str> = o.replicas.iter().map(|r| r.spec.disk_id.as_str()).collect();
    let wanted = &o.image.spec.disk_file_spec_map;
    status.disk_last_ref_at_map.retain(|disk, _| wanted.contains_key(disk) && !used.contains(disk.as_str()));
    for disk in wanted.keys().filter(|d| !used.contains(d.as_str())) {
        status.disk_last_ref_at_map.entry(disk.clone()).or_insert_with(|| o.now.to_string());
    }
}

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
    let recheck = remove_unused(o, status, map);
    let (shortage, other) = replenish(o, status, map);
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

/// Whether a failure says that the disk is full.
pub(super) fn has_no_room(file: &DiskFileStatus) -> bool {
    file.error_kind == Some(ErrorKind::Exhausted)
}

fn replenish(
    o: &Observed,
    status: &BackingImageStatus,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> (Option<String>, Option<Duration>) {
    let (mut good, mut recheck) = (0, None);
    for (disk, _) in map.iter().filter(|(d, s)| !is_evicting(o, d, s)) {
        let file = status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
        let (counted, wait) = counts(o, &file, disk);
        good += usize::from(counted);
        recheck = sooner(recheck, wait);
    }
    let need = need(o);
    if good >= need {
        return (None, recheck);
    }
    let missing = need - good;
    if o.settings.replenish_limit == 0 {
        let why = "setting concurrent-backing-image-replenish-per-node-limit is 0";
        return (Some(format!("{missing} more wanted, but {why}")), recheck);
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
        return (
            Some(format!("{lacking} more wanted, but no further disk is eligible: {}", choice.reasons())),
            recheck,
        );
    }
    (None, recheck)
}

/// Takes copies away that are evicted, or unused for long and more than needed (LF 4.6, 4.3): never below what is needed,
/// never the last ready one, never because of silence.
fn remove_unused(
    o: &Observed,
    status: &BackingImageStatus,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> Option<Duration> {
    let used: BTreeSet<&str> = o.replicas.iter().map(|r| r.spec.disk_id.as_str()).collect();
    let source = o.data_source.as_ref().filter(|s| !s.spec.file_transferred).map(|s| s.spec.disk_uuid.clone());
    let mut recheck = None;
    let candidates: Vec<(String, DiskFileSpec)> = map.iter().map(|(d, s)| (d.clone(), s.clone())).collect();
    for (disk, spec) in candidates {
        if used.contains(disk.as_str()) || source.as_ref() == Some(&disk) || state(status, &disk) == CopyState::Unknown
        {
            continue;
        }
        let staying = |other: &String| *other != disk && !is_evicting(o, other, &map[other]);
        let others_ready = map.keys().filter(|d| staying(d) && state(status, d) == CopyState::Ready).count();
        if is_evicting(o, &disk, &spec) {
            // An entry that shall leave a disk which may be chosen again goes only once it is not missed.
            let is_refused = o.disks.get(&disk).is_none_or(|d| refusal(d, &[], &o.settings).is_some());
            if others_ready >= if is_refused { 1 } else { need(o) } {
                map.remove(&disk);
            }
            continue;
        }
        if others_ready < need(o) {
            continue;
        }
        let Some(last_use) = status.disk_last_ref_at_map.get(&disk).and_then(|t| parse(t)) else { continue };
        if since(o.now, last_use) >= o.settings.cleanup_wait {
            map.remove(&disk);
        } else {
            recheck = sooner(recheck, Some(until(o.now, after(last_use, o.settings.cleanup_wait))));
        }
    }
    recheck
}
