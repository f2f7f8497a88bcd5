//! Which ready copies are read again and compared with their manifest: those that a user asks for, and from time to time all.

use std::collections::BTreeMap;
use std::time::Duration;

use api::BackingImage;
use api::image::{BackingImageSpec, CopyState};
use api::manager::FileInfo;
use jiff::Timestamp;

use super::{Action, Observed};
use crate::retry::{after, parse, sooner, until};

/// How fast a copy is read in the background: a small part of what any disk can do, and still 9 TiB a week.
const SCRUB_BYTES_PER_SECOND: u64 = 16 << 20;

/// Plans the readings of one disk; returns when to look again.
pub(super) fn plan(o: &Observed, files: &BTreeMap<String, FileInfo>, actions: &mut Vec<Action>) -> Option<Duration> {
    let mut overdue: Option<(Timestamp, Action)> = None;
    let mut recheck = None;
    for (name, file) in files.iter().filter(|(_, file)| file.state == CopyState::Ready) {
        let Some(image) = o.image(name) else { continue };
        let verify = |requested_at: &str, bytes_per_second| Action::VerifyFile {
            image: name.clone(),
            uuid: file.uuid.clone(),
            requested_at: requested_at.to_owned(),
            bytes_per_second,
        };
        if is_requested(&image.spec, &o.disk_id, file) {
            actions.push(verify(&image.spec.verify_requested_at, 0));
            continue;
        }
        let Some(due) = due(o, image, file) else { continue };
        if due > o.now {
            recheck = sooner(recheck, Some(until(o.now, due)));
        } else if overdue.as_ref().is_none_or(|(other, _)| due < *other) {
            overdue = Some((due, verify("", SCRUB_BYTES_PER_SECOND)));
        }
    }
    // One at a time; the agent's news of its end bring the next pass.
    actions.extend(overdue.map(|(_, action)| action));
    recheck
}

/// Whether the user asked for a reading of this copy that has not been done yet.
fn is_requested(spec: &BackingImageSpec, disk: &str, file: &FileInfo) -> bool {
    let is_meant = spec.verify_disks.is_empty() || spec.verify_disks.iter().any(|d| d == disk);
    let Some(requested) = parse(&spec.verify_requested_at).filter(|_| is_meant) else { return false };
    parse(&file.verified_at).is_none_or(|verified| verified < requested)
}

/// When the next reading in the background is due. A copy that was never read again counts as made with its image.
fn due(o: &Observed, image: &BackingImage, file: &FileInfo) -> Option<Timestamp> {
    if o.scrub_interval.is_zero() {
        return None;
    }
    let made = image.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let last = parse(&file.verified_at).or(made)?;
    Some(after(last, o.scrub_interval))
}

/// Whether a failed file must be removed before it is got anew: only one that its agent takes for good. Anything else of use in a
/// failed one is kept, so that a broken transfer goes on and damage costs the bad chunks only.
pub(super) fn must_go_first(reported: Option<&FileInfo>) -> bool {
    reported.is_some_and(|file| file.state == CopyState::Ready)
}
