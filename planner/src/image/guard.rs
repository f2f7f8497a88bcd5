//! What keeps a copy from being removed, whoever wants that: the clean-up, a user's command, or an edit of `diskFileSpecMap`.
//!
//! A copy goes in two steps. Whoever decides takes its key out of `spec.diskFileSpecMap`; the image reconciler, which alone writes the
//! status, then lets it go from `status.diskFileStatusMap`, or puts the key back. A manager removes only what is in neither.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use api::image::{BackingImageStatus, CopyState, DiskFileSpec};
use api::names::condition::CLEANED_UP;
use api::{BackingImage, BackingImageDataSource, Condition, ConditionStatus, Replica, condition};

use super::Observed;
use crate::disk::{Disks, EVICTION};
use crate::retry::{after, parse, until};
use crate::setting::Settings;

/// How long an image says that a copy was put back.
const TOLD_FOR: Duration = Duration::from_secs(600);

/// What the guards look at.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    pub image: &'a BackingImage,
    /// What is known of the copies.
    pub status: &'a BackingImageStatus,
    pub data_source: Option<&'a BackingImageDataSource>,
    /// The replicas that use the image, whatever their state.
    pub replicas: &'a [Replica],
    pub disks: &'a Disks,
    pub settings: &'a Settings,
}

/// Why a copy stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// A replica lies over it.
    Used { replica: String, volume: String },
    /// The first file is being prepared there, and nobody has it yet.
    Preparing,
    /// It cannot be asked, and why.
    Silent(String),
    /// Too few ready copies would be left.
    TooFew { left: usize, wanted: usize },
    /// No other copy is ready, so that what lies there may be the last of the image.
    LastHope,
}

impl Guard {
    /// The reason as a part of a sentence.
    pub fn sentence(&self) -> String {
        match self {
            Guard::Used { replica, volume } => format!("replica {replica} of volume {volume} uses it"),
            Guard::Preparing => "the first file of the image is being prepared there and is not handed over yet".into(),
            Guard::Silent(why) if why.is_empty() => "it cannot be asked, so nobody knows what it is worth".into(),
            Guard::Silent(why) => format!("it cannot be asked ({why}), so nobody knows what it is worth"),
            Guard::TooFew { left, wanted } => {
                let copies = if *left == 1 { "copy" } else { "copies" };
                format!("{left} ready {copies} would be left, fewer than minNumberOfCopies asks for ({wanted})")
            }
            Guard::LastHope => "no other copy is ready, so what lies there may be the last of the image".into(),
        }
    }

    /// What the user can do.
    pub fn hint(&self) -> &'static str {
        match self {
            Guard::Used { .. } => "delete that volume first, or leave the copy",
            Guard::Preparing => "wait until the first copy is ready, or delete the image",
            Guard::Silent(_) => "bring the disk back; or take it from its Node if it is gone for good",
            Guard::TooFew { .. } => "lower minNumberOfCopies, wait until another disk has a copy, or delete the image",
            Guard::LastHope => "wait until another copy is ready, or delete the image",
        }
    }
}

impl Scene<'_> {
    /// What keeps the copy on a disk while those on `rest` stay; nothing when it may go.
    pub fn guard<'b>(&self, disk: &str, rest: impl IntoIterator<Item = &'b str>) -> Option<Guard> {
        if let Some(user) = self.replicas.iter().find(|r| r.spec.disk_id == disk) {
            let replica = user.metadata.name.clone().unwrap_or_default();
            return Some(Guard::Used { replica, volume: user.spec.volume_name.clone() });
        }
        if self.data_source.is_some_and(|s| !s.spec.file_transferred && s.spec.disk_uuid == disk) {
            return Some(Guard::Preparing);
        }
        let file = self.status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
        if file.state == CopyState::Unknown && !self.disks.is_gone(disk) && self.was_whole() {
            return Some(Guard::Silent(file.message));
        }
        let others: Vec<&str> = rest.into_iter().filter(|other| *other != disk && self.is_ready(other)).collect();
        // What is about to leave as well does not count: it would go on the strength of this one.
        let left = others.iter().filter(|other| !self.is_evicting(other)).count();
        let wanted = self.need();
        match file.state {
            CopyState::Ready if left < wanted => Some(Guard::TooFew { left, wanted }),
            CopyState::Ready => None,
            _ if others.is_empty() && self.was_whole() => Some(Guard::LastHope),
            _ => None,
        }
    }

    /// How many ready copies there shall be: one at the least.
    pub fn need(&self) -> usize {
        let asked = self.image.spec.min_number_of_copies;
        (if asked == 0 { self.settings.min_copies } else { asked }).max(1) as usize
    }

    /// Why the copy on a disk shall leave it, if so.
    pub(super) fn evicting(&self, disk: &str) -> Option<&'static str> {
        let entry = self.image.spec.disk_file_spec_map.get(disk).filter(|entry| entry.eviction_requested);
        entry.map(|_| EVICTION).or_else(|| self.disks.get(disk)?.leaving(self.settings))
    }

    /// Whether the copy on a disk shall leave it.
    pub(super) fn is_evicting(&self, disk: &str) -> bool {
        self.evicting(disk).is_some()
    }

    /// Whether the copy on a disk is ready.
    pub(super) fn is_ready(&self, disk: &str) -> bool {
        self.status.disk_file_status_map.get(disk).is_some_and(|f| f.state == CopyState::Ready)
    }

    /// Whether the image has ever had a whole file. Before, nothing can be lost.
    fn was_whole(&self) -> bool {
        !self.status.checksum.is_empty()
            || self.status.disk_file_status_map.values().any(|f| f.state == CopyState::Ready)
    }
}

/// Lets go what was taken out of the map, as far as no guard keeps it; what is kept comes back into the map, and a condition says why.
/// Returns when that has been told for long enough.
pub(super) fn let_go(
    o: &Observed,
    status: &mut BackingImageStatus,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> Option<Duration> {
    let removed: Vec<String> = status.disk_file_status_map.keys().filter(|d| !map.contains_key(*d)).cloned().collect();
    let mut kept = vec![];
    for disk in removed {
        match o.scene(status).guard(&disk, map.keys().map(String::as_str)) {
            Some(guard) => {
                kept.push(format!("the copy on {} is kept: {}", o.disks.label(&disk), guard.sentence()));
                let reason = format!("it was taken out of diskFileSpecMap and kept: {}", guard.sentence());
                map.insert(disk, DiskFileSpec { reason, ..Default::default() });
            }
            None => {
                status.disk_file_status_map.remove(&disk);
                status.disk_last_ref_at_map.remove(&disk);
            }
        }
    }
    let told = condition::find(&status.conditions, CLEANED_UP).and_then(|c| parse(&c.last_transition_time));
    let told_until = told.map(|at| after(at, TOLD_FOR));
    let is_over = told_until.is_some_and(|at| at <= o.now);
    if is_over || !kept.is_empty() {
        status.conditions.retain(|c| c.r#type != CLEANED_UP);
    }
    if kept.is_empty() {
        return told_until.filter(|_| !is_over).map(|at| until(o.now, at));
    }
    let message = format!("entries were taken out of diskFileSpecMap; {}", kept.join("; "));
    let condition = Condition::new(CLEANED_UP, ConditionStatus::False, "CleanUpRefused", message)
        .with_hint("let `image clean-up --dry-run` say what may go");
    condition::set(&mut status.conditions, condition, o.now);
    Some(TOLD_FOR)
}

/// Why the copies on `disks` cannot all go at once, in sentences, each with what can be done; nothing when they can.
pub fn refusal(scene: &Scene<'_>, disks: &BTreeSet<String>, staying: &BTreeSet<String>) -> Option<String> {
    let name = scene.image.metadata.name.as_deref().unwrap_or_default();
    let mut text = String::new();
    for disk in disks {
        let Some(guard) = scene.guard(disk, staying.iter().map(String::as_str)) else { continue };
        let (label, why, hint) = (scene.disks.label(disk), guard.sentence(), guard.hint());
        let stop = if text.is_empty() { "" } else { "; " };
        let _ = write!(text, "{stop}the copy of image `{name}` on {label} is kept: {why}; you can: {hint}");
    }
    (!text.is_empty()).then_some(text)
}
