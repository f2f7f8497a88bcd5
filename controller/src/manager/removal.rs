//! Asks the store right before something is removed from a disk: what the controller was told may be older than what users did.

use api::manager::FileInfo;
use api::{BackingImage, BackingImageDataSource, Replica};
use jiff::Timestamp;
use planner::image::{difference, ready_disks};
use planner::manager::orphans::{Owner, Place, Remains, owner, refuse};
use planner::manager::{Observed, lies_over};
use proto::bimrpc::RemoveRemainsRequest;

use super::{remember, said};
use crate::error::{Doing, ReconcileError};
use crate::{Shared, world};

/// Whether a copy may be removed by the objects that are stored now.
pub(super) async fn may_go(
    image: &str,
    uuid: &str,
    observed: &Observed,
    shared: &Shared,
) -> Result<bool, ReconcileError> {
    let is_recorded = observed.manager.as_ref().is_some_and(|m| m.spec.records(image, uuid));
    let stored: Option<BackingImage> = shared.store.get(image).await.doing("read the image")?;
    if stored.as_ref().is_some_and(|stored| is_wanted(stored, uuid, &observed.disk_id)) {
        return Ok(false);
    }
    let status = stored.as_ref().and_then(|stored| stored.status.as_ref()).filter(|status| status.uuid == uuid);
    match status {
        // Its image let it go, under its guards.
        Some(_) if is_recorded => return Ok(true),
        Some(status) if ready_disks(status).next().is_some() => {}
        // Nobody recorded it, and it is of no image, or the last of one: objects may have been lost.
        Some(_) | None if !is_recorded => return Ok(false),
        Some(_) | None => {}
    }
    Ok(what_lies_over(image, uuid, stored.as_ref(), observed, shared).await?.is_none())
}

/// Whether a file that its agent takes for a copy of an image is none by what is stored now, and the copy is wanted.
pub(super) async fn is_to_be_replaced(
    image: &str,
    uuid: &str,
    observed: &Observed,
    shared: &Shared,
) -> Result<bool, ReconcileError> {
    let stored: Option<BackingImage> = shared.store.get(image).await.doing("read the image")?;
    let Some(stored) = stored.filter(|stored| is_wanted(stored, uuid, &observed.disk_id)) else { return Ok(false) };
    let status = stored.status.clone().unwrap_or_default();
    let mut files = observed.agent.iter().flatten().flat_map(|agent| &agent.files);
    let is_it = |file: &FileInfo| file.name == image && file.uuid == uuid;
    Ok(files.any(|file| is_it(file) && difference(file, &stored.spec, &status).is_some()))
}

/// Whether a copy on a disk is wanted. An image that shall be deleted keeps its places for as long as somebody uses it.
pub(super) fn is_wanted(image: &BackingImage, uuid: &str, disk: &str) -> bool {
    let is_held = |status: &api::image::BackingImageStatus| status.disk_file_status_map.contains_key(disk);
    let has_place = image.spec.disk_file_spec_map.contains_key(disk) || image.status.as_ref().is_some_and(is_held);
    image.status.as_ref().map_or("", |status| status.uuid.as_str()) == uuid && has_place
}

/// What lies over a copy by the objects that are stored now, a phrase.
async fn what_lies_over(
    image: &str,
    uuid: &str,
    stored: Option<&BackingImage>,
    observed: &Observed,
    shared: &Shared,
) -> Result<Option<String>, ReconcileError> {
    let replicas: Vec<Replica> = world::list(&shared.store, "list replicas").await?;
    let disk = observed.disks.get(&observed.disk_id);
    Ok(disk.map_or_else(|| Some("its disk is away".into()), |disk| lies_over((image, uuid), disk, stored, &replicas)))
}

/// Removes what still belongs to nobody, and what nothing lies over, by the objects that are stored now. They are read after the agent
/// has seen it, and no file comes before its object. A refusal holds up nothing else; it is told, and the orphan is tried again later.
pub(super) async fn remove_orphan(
    name: &str,
    ip: &str,
    found: Remains,
    observed: &Observed,
    shared: &Shared,
) -> Result<(), ReconcileError> {
    let image: Option<BackingImage> = shared.store.get(&found.image).await.doing("read the image")?;
    let source: Option<BackingImageDataSource> = shared.store.get(&found.image).await.doing("read the data source")?;
    if owner(&found, &observed.disk_id, image.as_ref(), source.as_ref()) == Owner::Somebody {
        return Ok(());
    }
    let path = found.path();
    let refuse_because = |why: String| {
        tracing::warn!(path, manager = name, error = why, "orphan cannot be removed");
        remember(name, shared, |memory| refuse(&mut memory.orphans, &path, Timestamp::now(), why));
    };
    if found.place != Place::Preparations
        && let Some(over) = what_lies_over(&found.image, &found.uuid, image.as_ref(), observed, shared).await?
    {
        refuse_because(over);
        return Ok(());
    }
    let Remains { place, image, uuid, mark, .. } = found;
    let is_preparation = place == Place::Preparations;
    match shared.agents.remove_remains(ip, RemoveRemainsRequest { name: image, uuid, is_preparation, mark }).await {
        Ok(()) => {
            shared.metrics.count_removed_orphan();
            tracing::info!(path, manager = name, "orphan removed");
        }
        Err(error) => refuse_because(said(&error)),
    }
    Ok(())
}
