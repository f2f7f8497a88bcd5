//! What becomes of an image whose copies fail: another copy, its source once more, or nothing.
//!
//! Decided for every type of source, also for those that this version does not offer yet.

use std::time::Duration;

use api::BackingImageManager;
use api::image::{BackingImageSpec, BackingImageStatus, CopyState, SourceType};
use api::manager::ManagerState;
use api::volume::VolumeState;
use jiff::Timestamp;

use super::ready_disks;
use crate::disk::{Disks, Health};
use crate::retry::{after, parse};

/// How a file is got once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Again {
    /// From the same address.
    Download,
    /// From the same volume, which is attached for that when it is not.
    Export { volume: String, attach: bool },
    /// From the same backup.
    Restore { backup: String },
    /// From the same image.
    Clone { image: String },
    /// Only the user has it.
    Never,
}

impl Again {
    /// For an image; `exported` is the state of the volume that it was made from, if there is one.
    pub fn of(spec: &BackingImageSpec, exported: Option<VolumeState>) -> Again {
        let given = |key: &str| spec.source_parameters.get(key).cloned().unwrap_or_default();
        match spec.source_type {
            // Longhorn's default.
            None | Some(SourceType::Download) => Again::Download,
            Some(SourceType::ExportFromVolume) => {
                Again::Export { volume: given("volume-name"), attach: exported != Some(VolumeState::Attached) }
            }
            Some(SourceType::Restore) => Again::Restore { backup: api::validation::url::redact(&given("backup-url")) },
            Some(SourceType::Clone) => Again::Clone { image: given("backing-image") },
            Some(SourceType::Upload) => Again::Never,
        }
    }

    /// What is done, after "the image is" or "the image will be".
    pub fn sentence(&self) -> String {
        match self {
            Again::Download => "downloaded again".into(),
            Again::Export { volume, attach: false } => format!("exported again from volume {volume}"),
            Again::Export { volume, attach: true } => {
                format!("exported again from volume {volume}, which is attached for that")
            }
            Again::Restore { backup } => format!("restored again from {backup}"),
            Again::Clone { image } => format!("cloned again from image {image}"),
            Again::Never => "not to be had again, since an uploaded file is nowhere else".into(),
        }
    }
}

/// What is known of an image and its copies.
#[derive(Clone, Copy, Debug)]
pub struct Loss<'a> {
    pub now: Timestamp,
    pub spec: &'a BackingImageSpec,
    pub status: &'a BackingImageStatus,
    pub disks: &'a Disks,
    pub managers: &'a [BackingImageManager],
    /// The state of the volume that it was made from, if it was and if that exists.
    pub exported: Option<VolumeState>,
    /// The setting `backing-image-recovery-wait-interval`.
    pub wait: Duration,
}

impl Loss<'_> {
    /// Whether somebody on a disk makes what is wished there.
    fn hears(&self, disk: &str) -> bool {
        let runs =
            |m: &BackingImageManager| m.status.as_ref().is_some_and(|s| s.current_state == ManagerState::Running);
        self.disks.get(disk).is_some_and(|disk| disk.health == Health::Ready)
            && self.managers.iter().any(|manager| manager.spec.disk_uuid == disk && runs(manager))
    }
}

/// What to do about failed copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// A copy is ready: the agents of these disks, whose copies have failed, get them from it, and nothing is asked of the source.
    FromCopy { anew: Vec<String> },
    /// Somebody who cannot be asked may have it still.
    Unknown { disk: String, why: String },
    /// A copy may be ready soon: somebody makes it, or hears that it is wished.
    UnderWay,
    /// All have failed, the last one not long enough ago.
    Later { at: Timestamp, again: Again },
    /// All have failed, or are gone with their disks.
    Now(Again),
    /// All have failed, and only the user can help.
    Final,
}

/// Decides about an image that was whole once.
pub fn decide(loss: &Loss<'_>) -> Recovery {
    let copies = &loss.status.disk_file_status_map;
    let has_failed = |state| matches!(state, CopyState::Failed | CopyState::FailedAndCleanup);
    let failed = copies.iter().filter(|(_, copy)| has_failed(copy.state));
    if ready_disks(loss.status).next().is_some() {
        return Recovery::FromCopy { anew: failed.map(|(disk, _)| disk.clone()).collect() };
    }
    // Unknown is not failed. A disk that is gone for good has nothing any more.
    let silent = |disk: &String, state| state == CopyState::Unknown && !loss.disks.is_gone(disk);
    if let Some((disk, copy)) = copies.iter().find(|(disk, copy)| silent(disk, copy.state)) {
        return Recovery::Unknown { disk: disk.clone(), why: copy.message.clone() };
    }
    let may_come = |disk: &str, state| match state {
        CopyState::InProgress | CopyState::ReadyForTransfer => true,
        // A wish that nobody hears comes to nothing for as long as nobody does.
        CopyState::NotStarted | CopyState::Pending | CopyState::Starting => loss.hears(disk),
        CopyState::Ready | CopyState::Failed | CopyState::FailedAndCleanup | CopyState::Unknown => false,
    };
    if copies.iter().any(|(disk, copy)| may_come(disk, copy.state)) {
        return Recovery::UnderWay;
    }
    let again = Again::of(loss.spec, loss.exported);
    if again == Again::Never {
        return Recovery::Final;
    }
    let last = failed.filter_map(|(_, copy)| parse(&copy.last_state_transition_time)).max();
    match last.map(|at| after(at, loss.wait)) {
        Some(at) if at > loss.now => Recovery::Later { at, again },
        _ => Recovery::Now(again),
    }
}
