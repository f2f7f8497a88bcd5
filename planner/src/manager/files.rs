//! Which files a disk shall hold, and which go.

use std::collections::BTreeMap;
use std::time::Duration;

use api::image::CopyState;
use api::manager::{BackingImageManagerSpec, FileInfo};
use api::{BackingImage, ErrorKind};

use super::copy::{judge, one_file};
use super::{Action, Agent, Decision, Observed, over, verification};
use crate::disk::Disk;
use crate::image::ready_disks;
use crate::retry::sooner;

/// When a copy is looked at again over which a replica lies and which is of no image any more: nobody tells that the replica is gone.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Image name → uuid of the copies that this disk shall hold: those that are wished, and those that their image has not let go yet
/// (`image::guard`), so that an edit of the wish alone removes nothing.
pub(super) fn wanted(o: &Observed) -> BTreeMap<String, String> {
    let is_held = |i: &BackingImage| i.status.as_ref().is_some_and(|s| s.disk_file_status_map.contains_key(&o.disk_id));
    let has_copy_here = |i: &&BackingImage| i.spec.disk_file_spec_map.contains_key(&o.disk_id) || is_held(i);
    o.images
        .iter()
        .filter(has_copy_here)
        .filter_map(|i| {
            let uuid = i.status.as_ref().map(|s| s.uuid.clone()).filter(|u| !u.is_empty())?;
            Some((i.metadata.name.clone()?, uuid))
        })
        .collect()
}

/// Deletes what is not wanted, asks for what is, reports all.
pub(super) fn files(
    o: &Observed,
    (agent, disk): (&Agent, &Disk),
    spec: &BackingImageManagerSpec,
    wanted: &BTreeMap<String, String>,
    decision: &mut Decision,
) {
    let mut left = spec.backing_images.clone();
    let mut kept = BTreeMap::new();
    for (image, uuid) in spec.backing_images.iter().filter(|(image, uuid)| wanted.get(*image) != Some(*uuid)) {
        if let Some(why) = over::keeps(o, disk, image, uuid) {
            // `orphans` tells of it.
            kept.insert(image, (uuid, why));
            continue;
        }
        decision.actions.push(Action::DeleteFile { image: image.clone(), uuid: uuid.clone() });
        decision.memory.copies.remove(image);
        left.remove(image);
    }
    let held_before = std::mem::take(&mut decision.status.backing_image_file_map);
    strays(o, agent, spec, wanted, decision);
    if left != spec.backing_images {
        for (image, uuid) in wanted {
            left.entry(image.clone()).or_insert_with(|| uuid.clone());
        }
        let emptied = BackingImageManagerSpec { backing_images: left, ..spec.clone() };
        decision.actions.push(Action::SetSpec(Box::new(emptied)));
    }
    for (image, uuid) in wanted.iter().filter(|(image, uuid)| spec.records(image, uuid)) {
        let Some(object) = o.image(image) else { continue };
        let reported = agent.file(image, uuid).cloned();
        let before = held_before.get(image).filter(|f| f.uuid == *uuid);
        if let Some(file) = one_file(o, object, reported, before, decision) {
            decision
                .status
                .backing_image_file_map
                .insert(image.clone(), FileInfo { name: image.clone(), uuid: uuid.clone(), ..file });
        }
    }
    for (image, (former, why)) in kept {
        decision.recheck_after = sooner(decision.recheck_after, Some(LOOK_AGAIN));
        let Some(uuid) = wanted.get(image) else { continue };
        let message =
            format!("the disk still holds the copy of a former image of this name, with uuid {former}: {why}");
        let waits = FileInfo {
            name: image.clone(),
            uuid: uuid.clone(),
            state: CopyState::Failed,
            message,
            error_kind: Some(ErrorKind::NotReady),
            ..Default::default()
        };
        decision.status.backing_image_file_map.insert(image.clone(), waits);
    }
    decision.memory.copies.retain(|image, _| wanted.contains_key(image));
    let recheck = verification::plan(o, &decision.status.backing_image_file_map, &mut decision.actions);
    decision.recheck_after = sooner(decision.recheck_after, recheck);
}

/// Deals with the files of an image that nobody recorded here, such as one whose entry was edited away. Those of an image that nobody
/// knows, or that had the name before: see `orphans`. The copy of an image without a ready one may be its last: it is told, and the image
/// takes it back when it is whole. One below a replica stays, too.
fn strays(
    o: &Observed,
    agent: &Agent,
    spec: &BackingImageManagerSpec,
    wanted: &BTreeMap<String, String>,
    decision: &mut Decision,
) {
    let is_stray = |file: &&FileInfo| !spec.records(&file.name, &file.uuid);
    for file in agent.files.iter().filter(is_stray) {
        let image = o.image(&file.name);
        let Some((image, status)) = image.map(|i| (i, i.status.clone().unwrap_or_default())) else { continue };
        if status.uuid != file.uuid || wanted.contains_key(&file.name) {
            continue;
        }
        let is_used = o.replicas.iter().any(|r| r.spec.backing_image == file.name && r.spec.disk_id == o.disk_id);
        if ready_disks(&status).next().is_some() && !is_used {
            decision.actions.push(Action::DeleteFile { image: file.name.clone(), uuid: file.uuid.clone() });
        } else {
            let mut told = file.clone();
            judge(&mut told, image, &status);
            decision.status.backing_image_file_map.insert(file.name.clone(), told);
        }
    }
}
