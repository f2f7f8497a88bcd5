//! Which files a disk shall hold, and which go.

use std::collections::BTreeMap;

use api::BackingImage;
use api::manager::{BackingImageManagerSpec, FileInfo};

use super::copy::{judge, one_file};
use super::{Action, Agent, Decision, Observed, verification};
use crate::image::ready_disks;
use crate::retry::sooner;

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
    agent: &Agent,
    spec: &BackingImageManagerSpec,
    wanted: &BTreeMap<String, String>,
    decision: &mut Decision,
) {
    let mut left = spec.backing_images.clone();
    for (image, uuid) in &spec.backing_images {
        if wanted.get(image) != Some(uuid) {
            decision.actions.push(Action::DeleteFile { image: image.clone(), uuid: uuid.clone() });
            decision.memory.copies.remove(image);
            left.remove(image);
        }
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
    for (image, uuid) in wanted.iter().filter(|(i, u)| spec.backing_images.get(*i) == Some(u)) {
        let Some(object) = o.images.iter().find(|i| i.metadata.name.as_ref() == Some(image)) else { continue };
        let reported = agent.file(image, uuid).cloned();
        let before = held_before.get(image).filter(|f| f.uuid == *uuid);
        if let Some(file) = one_file(o, object, reported, before, decision) {
            decision
                .status
                .backing_image_file_map
                .insert(image.clone(), FileInfo { name: image.clone(), uuid: uuid.clone(), ..file });
        }
    }
    decision.memory.copies.retain(|image, _| wanted.contains_key(image));
    let recheck = verification::plan(o, &decision.status.backing_image_file_map, &mut decision.actions);
    decision.recheck_after = sooner(decision.recheck_after, recheck);
}

/// Deals with the files that nobody recorded here, such as one whose entry was edited away. Those of an image that nobody knows: see
/// `orphans`. The copy of an image without a ready one may be its last: it is told, and the image takes it back when it is whole.
fn strays(
    o: &Observed,
    agent: &Agent,
    spec: &BackingImageManagerSpec,
    wanted: &BTreeMap<String, String>,
    decision: &mut Decision,
) {
    let is_stray = |file: &&FileInfo| spec.backing_images.get(&file.name) != Some(&file.uuid);
    for file in agent.files.iter().filter(is_stray) {
        let image = o.images.iter().find(|i| i.metadata.name.as_ref() == Some(&file.name));
        let Some((image, status)) = image.map(|i| (i, i.status.clone().unwrap_or_default())) else { continue };
        if status.uuid != file.uuid || ready_disks(&status).next().is_some() {
            decision.actions.push(Action::DeleteFile { image: file.name.clone(), uuid: file.uuid.clone() });
        } else if !wanted.contains_key(&file.name) {
            let mut told = file.clone();
            judge(&mut told, image, &status);
            decision.status.backing_image_file_map.insert(file.name.clone(), told);
        }
    }
}
