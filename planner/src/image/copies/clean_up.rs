//! Which copies are not needed any more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::image::{BackingImageStatus, CopyState, DiskFileSpec};

use super::{is_evicting, need, state};
use crate::image::Observed;
use crate::placement::refusal;
use crate::retry::{after, parse, since, sooner, until};

/// Takes copies away that are evicted, or unused for long and more than needed (LF 4.6, 4.3): never below what is needed,
/// never the last ready one, never because of silence.
pub(super) fn remove_unused(
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
