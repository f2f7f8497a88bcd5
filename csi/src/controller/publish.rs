//! ControllerPublishVolume and ControllerUnpublishVolume: the wish where a volume is attached, and the wait for it.

use api::volume::{Robustness, VolumeState, VolumeStatus};
use api::{BackingImage, Node, Volume, names};
use proto::csi;
use store::StoreError;
use tracing::info;

use super::{Context, create, image};
use crate::capability::Usage;
use crate::deadline::Deadline;
use crate::limits::{CONFLICT_RETRIES, FAULT_SETTLE};
use crate::wait::{self, Outcome};
use crate::{CsiError, volume};

/// Attaches a volume to a node: copies of its image on its replicas' disks, then replicas, then the engine.
pub async fn publish(
    context: &Context,
    request: csi::ControllerPublishVolumeRequest,
    deadline: &Deadline,
) -> Result<csi::ControllerPublishVolumeResponse, CsiError> {
    let csi::ControllerPublishVolumeRequest { volume_id, node_id, volume_capability, readonly, .. } = request;
    for (field, value) in [("volume_id", &volume_id), ("node_id", &node_id)] {
        if value.is_empty() {
            return Err(CsiError::Missing { field });
        }
    }
    Usage::required(volume_capability.as_ref())?;
    if readonly {
        return Err(CsiError::NotOffered {
            what: "attaching a volume read-only (PUBLISH_READONLY)",
            instead: "attach it and publish it read-only on the node (`readOnly` of the pod's volume mount)",
        });
    }
    let flight = context.in_flight.take(&volume_id)?;
    wish(context, &volume_id, &node_id, deadline).await?;
    // What follows only watches. Whoever wants the volume off the node again need not wait for it.
    drop(flight);
    // A status from before the wish may still say `faulted`, so that is believed only after a while.
    let late = match attached(context, &volume_id, &node_id, &deadline.capped(FAULT_SETTLE), false).await? {
        Outcome::Late(_) => attached(context, &volume_id, &node_id, deadline, true).await?,
        reached => reached,
    };
    match late {
        Outcome::Reached(outcome) => {
            outcome?;
            info!(volume = volume_id, node = node_id, "volume attached");
            Ok(csi::ControllerPublishVolumeResponse::default())
        }
        Outcome::Late(last) => {
            let progress = progress(context, last.as_ref(), &node_id).await;
            Err(CsiError::StillWaiting { volume_id, progress })
        }
    }
}

/// Writes the wish to have the volume attached to a node.
async fn wish(context: &Context, volume_id: &str, node_id: &str, deadline: &Deadline) -> Result<(), CsiError> {
    for _ in 0..CONFLICT_RETRIES {
        let mut found = create::find(context, volume_id).await?;
        if context.store.get::<Node>(node_id).await?.is_none() {
            return Err(CsiError::NoNode { node_id: node_id.to_owned() });
        }
        let volume_id = volume_id.to_owned();
        if found.metadata.deletion_timestamp.is_some() {
            return Err(CsiError::VolumeDeleting { volume_id });
        }
        if found.spec.node_id == node_id {
            return Ok(());
        }
        let now = status(&found).current_node_id;
        if !found.spec.node_id.is_empty() {
            let (node, hint) = (found.spec.node_id, "detach it there first; a volume is for one node at a time");
            return Err(CsiError::AttachedElsewhere { volume_id, node, hint });
        }
        if !now.is_empty() && now != node_id {
            // On its way off another node: one engine at a time.
            let free = |volume: Option<&Volume>| volume.is_none_or(|v| status(v).current_node_id != now).then_some(());
            if let Outcome::Late(_) = wait::until(&context.store, &volume_id, deadline, free).await? {
                return Err(CsiError::StillWaiting {
                    volume_id,
                    progress: format!("is still being detached from node `{now}`"),
                });
            }
            continue;
        }
        found.spec.node_id = node_id.to_owned();
        match context.store.replace(&found).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_conflict() => continue,
            Err(StoreError::NotFound { .. }) => return Err(CsiError::NoVolume { volume_id }),
            Err(error) => return Err(error.into()),
        }
    }
    Err(CsiError::Contended { what: format!("volume `{volume_id}`") })
}

fn status(volume: &Volume) -> VolumeStatus {
    volume.status.clone().unwrap_or_default()
}

/// Waits until the volume is attached to the node, or never will be.
async fn attached(
    context: &Context,
    volume_id: &str,
    node_id: &str,
    deadline: &Deadline,
    believe_fault: bool,
) -> Result<Outcome<Volume, Result<(), CsiError>>, CsiError> {
    let owned = || volume_id.to_owned();
    let judge = |volume: Option<&Volume>| {
        let Some(volume) = volume else { return Some(Err(CsiError::NoVolume { volume_id: owned() })) };
        if volume.metadata.deletion_timestamp.is_some() {
            return Some(Err(CsiError::VolumeDeleting { volume_id: owned() }));
        }
        if volume.spec.node_id != node_id {
            let reason = format!(
                "was told to leave node `{node_id}` while it was being attached; repeat the call if it is still wanted"
            );
            return Some(Err(CsiError::NotUsable { volume_id: owned(), reason }));
        }
        let status = status(volume);
        if status.state == VolumeState::Attached && status.current_node_id == node_id {
            return Some(Ok(()));
        }
        if let Some(condition) = volume::true_condition(volume, names::condition::BACKING_IMAGE_INCOMPATIBLE) {
            return Some(Err(CsiError::TooSmall { volume_id: owned(), reason: condition.message.clone() }));
        }
        if believe_fault && status.robustness == Robustness::Faulted {
            let why = volume::unmet(volume).unwrap_or_else(|| "no current replica can be reached".into());
            let reason = format!("is faulted and stays detached, its data is left as it is: {why}");
            return Some(Err(CsiError::NotUsable { volume_id: owned(), reason }));
        }
        None
    };
    Ok(wait::until(&context.store, volume_id, deadline, judge).await?)
}

/// Why a volume is not attached yet, for the caller who will ask again.
async fn progress(context: &Context, volume: Option<&Volume>, node_id: &str) -> String {
    // The volume says itself what it waits for, its image included.
    let mut reason = volume.and_then(volume::unmet);
    if reason.is_none()
        && let Some(volume) = volume.filter(|v| !v.spec.backing_image.is_empty())
        // Only a nicety of the message: a store that does not answer now says nothing about the volume.
        && let Ok(image) = context.store.get::<BackingImage>(&volume.spec.backing_image).await
    {
        reason = match image {
            Some(image) => Some(image::progress(&image)),
            None => Some(format!("image {} does not exist", volume.spec.backing_image)),
        };
    }
    let reason = reason.unwrap_or_else(|| "its replicas and engine are being started".into());
    format!("is not attached to node `{node_id}` yet: {reason}")
}

/// Detaches a volume: from one node, or (without `node_id`) from wherever it is.
pub async fn unpublish(
    context: &Context,
    request: csi::ControllerUnpublishVolumeRequest,
    deadline: &Deadline,
) -> Result<csi::ControllerUnpublishVolumeResponse, CsiError> {
    let csi::ControllerUnpublishVolumeRequest { volume_id, node_id, .. } = request;
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    let _flight = context.in_flight.take(&volume_id)?;
    let concerns = |node: &str| !node.is_empty() && (node_id.is_empty() || node == node_id);
    for attempt in 0.. {
        let Some(mut found) = context.store.get::<Volume>(&volume_id).await? else {
            return Ok(csi::ControllerUnpublishVolumeResponse {});
        };
        if !concerns(&found.spec.node_id) {
            break;
        }
        found.spec.node_id = String::new();
        match context.store.replace(&found).await {
            Ok(_) => break,
            Err(error) if error.is_conflict() && attempt < CONFLICT_RETRIES => continue,
            Err(StoreError::NotFound { .. }) => return Ok(csi::ControllerUnpublishVolumeResponse {}),
            Err(error) => return Err(error.into()),
        }
    }
    let detached = |volume: Option<&Volume>| {
        let Some(volume) = volume else { return Some(()) };
        let status = status(volume);
        // Wished to another node in the meantime: what matters is that it has left this one.
        let wished_elsewhere = !volume.spec.node_id.is_empty() && !concerns(&volume.spec.node_id);
        let at_rest = !matches!(status.state, VolumeState::Attached | VolumeState::Attaching | VolumeState::Detaching);
        (!concerns(&status.current_node_id) && (wished_elsewhere || !status.current_node_id.is_empty() || at_rest))
            .then_some(())
    };
    match wait::until(&context.store, &volume_id, deadline, detached).await? {
        Outcome::Reached(()) => {
            info!(volume = volume_id, node = node_id, "volume detached");
            Ok(csi::ControllerUnpublishVolumeResponse {})
        }
        Outcome::Late(last) => {
            let why = last.as_ref().and_then(volume::unmet).unwrap_or_else(|| "its engine is being stopped".into());
            Err(CsiError::StillWaiting { volume_id, progress: format!("is not detached yet: {why}") })
        }
    }
}
