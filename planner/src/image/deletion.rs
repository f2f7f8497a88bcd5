//! The end of an image that nobody uses: its data source, its copies, the object.
//!
//! The data source goes first, so that nobody writes any more when the agents remove everything of the image. A disk that is away at that
//! moment holds nothing up: the entry of its manager is what remembers the files until it is back.

use std::collections::BTreeMap;

use api::image::BackingImageStatus;
use api::names::condition::READY;
use api::{BackingImageManager, Condition, ConditionStatus};

use super::{Action, Decision, Observed, copies, name_of, report};
use crate::disk::{Disk, Health};

pub(super) fn decide(o: &Observed, mut status: BackingImageStatus, mut actions: Vec<Action>) -> Decision {
    copies::observe(o, &o.image.spec.disk_file_spec_map, &mut status);
    let name = name_of(&o.image);
    let holders = || o.managers.iter().filter(|m| m.spec.backing_images.contains_key(name));
    let answers = |m: &&BackingImageManager| o.disks.get(&m.spec.disk_uuid).is_some_and(|d| d.health == Health::Ready);
    let here: Vec<String> = holders().filter(answers).map(|m| o.disks.label(&m.spec.disk_uuid)).collect();
    let mut waits = vec![];
    match &o.data_source {
        Some(_) if let Some(disk) = unrecorded(o) => {
            waits.push(format!("{} to be recorded as the place of its first file", o.disks.label(disk)));
        }
        Some(source) => {
            if source.metadata.deletion_timestamp.is_none() {
                actions.push(Action::DeleteDataSource);
            }
            waits.push("its data source to end".to_owned());
        }
        None => {
            // Nobody writes any more.
            status.disk_file_status_map.clear();
            status.disk_last_ref_at_map.clear();
            if !o.image.spec.disk_file_spec_map.is_empty() {
                actions.push(Action::SetCopies(BTreeMap::new()));
            }
        }
    }
    if !here.is_empty() {
        waits.push(format!("its copies to be removed from {}", here.join(", ")));
    }
    let is_over = o.data_source.is_none() && here.is_empty() && o.image.spec.disk_file_spec_map.is_empty();
    let condition = if is_over {
        actions.push(Action::RemoveFinalizer);
        let away = holders().filter_map(|m| o.disks.get(&m.spec.disk_uuid)).map(left_behind).collect::<Vec<_>>();
        if away.is_empty() {
            return Decision { actions, status, replenish: Default::default(), recheck_after: None };
        }
        let message =
            format!("the image is deleted; its files are removed from {} when it is back", away.join(" and from "));
        Condition::new(READY, ConditionStatus::False, "CopyLeftBehind", message)
    } else {
        let message = if waits.is_empty() {
            "deletion begins".into()
        } else {
            format!("deletion waits for {}", waits.join(" and "))
        };
        Condition::new(READY, ConditionStatus::False, "Deleting", message)
    };
    report(&mut status, o, condition);
    Decision { actions, status, replenish: Default::default(), recheck_after: None }
}

fn left_behind(disk: &Disk) -> String {
    match &disk.health {
        Health::Ready => disk.label(),
        Health::NotReady(why) | Health::Unknown(why) => format!("{} ({why})", disk.label()),
    }
}

/// The disk where the data source may have left something, while no manager remembers that.
fn unrecorded(o: &Observed) -> Option<&str> {
    let name = name_of(&o.image);
    // Managers record only what has a uuid. What lies there without is found as an orphan.
    o.image.status.as_ref().filter(|s| !s.uuid.is_empty())?;
    let source = o.data_source.as_ref().filter(|s| s.metadata.deletion_timestamp.is_none())?;
    let disk = source.spec.disk_uuid.as_str();
    let is_wanted = o.image.spec.disk_file_spec_map.contains_key(disk);
    let is_recorded = o.managers.iter().any(|m| m.spec.disk_uuid == disk && m.spec.backing_images.contains_key(name));
    (is_wanted && !is_recorded && o.disks.get(disk).is_some()).then_some(disk)
}
