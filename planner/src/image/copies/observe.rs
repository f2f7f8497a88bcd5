//! What is known of each copy, and so of the image.

use std::collections::{BTreeMap, BTreeSet};

use api::ErrorKind;
use api::image::{BackingImageStatus, CopyState, DiskFileSpec};
use api::manager::{FileInfo, ManagerState};

use crate::disk::Health;
use crate::image::{Observed, difference, name_of, ready_disks};
use crate::retry::is_past;

/// Writes what managers and the data source report of the copies of `map` into the status; the first complete file decides size,
/// checksum and format.
pub(in crate::image) fn observe(o: &Observed, map: &BTreeMap<String, DiskFileSpec>, status: &mut BackingImageStatus) {
    // What was taken out of the wish is there until it is let go (`guard`).
    let held = map.keys().chain(status.disk_file_status_map.keys());
    let reports: BTreeMap<String, FileInfo> = held.map(|disk| (disk.clone(), report(o, status, disk))).collect();
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
        if seen.state != file.state || !is_past(o.now, &seen.last_state_transition_time) {
            seen.last_state_transition_time = o.now.to_string();
        }
        if !o.disks.is_gone(&disk) {
            seen.gone_since.clear();
        } else if !is_past(o.now, &seen.gone_since) {
            seen.gone_since = o.now.to_string();
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

/// Wants the whole copies that agents found on disks which the image does not name, when it has no ready one: each may be the last.
/// Whether there are any.
pub(in crate::image) fn take_back(
    o: &Observed,
    status: &BackingImageStatus,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> bool {
    if status.checksum.is_empty() || ready_disks(status).next().is_some() {
        return false;
    }
    let is_whole = |file: &FileInfo| {
        file.uuid == status.uuid && file.state == CopyState::Ready && difference(file, &o.image.spec, status).is_none()
    };
    let mut found = false;
    for manager in &o.managers {
        let file = manager.status.as_ref().and_then(|s| s.backing_image_file_map.get(name_of(&o.image)));
        let disk = &manager.spec.disk_uuid;
        if file.is_some_and(is_whole) && !status.disk_file_status_map.contains_key(disk) && !map.contains_key(disk) {
            let reason = "a whole copy was found there when the image had no ready one".to_owned();
            map.insert(disk.clone(), DiskFileSpec { reason, ..Default::default() });
            found = true;
        }
    }
    found
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
            format!("no node has a disk {disk} any more; its entry goes by itself once another copy is ready"),
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
    let held = &status.disk_file_status_map;
    let last_use = &mut status.disk_last_ref_at_map;
    last_use.retain(|disk, _| held.contains_key(disk) && !used.contains(disk.as_str()));
    for disk in held.keys().filter(|d| !used.contains(d.as_str())) {
        let at = last_use.entry(disk.clone()).or_default();
        if !is_past(o.now, at) {
            *at = o.now.to_string();
        }
    }
}
