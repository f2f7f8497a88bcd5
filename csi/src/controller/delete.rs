//! DeleteVolume.

use api::Volume;
use kube::ResourceExt;
use proto::csi;
use store::{Preconditions, StoreError};
use tracing::info;

use super::Context;
use crate::deadline::Deadline;
use crate::limits::CONFLICT_RETRIES;
use crate::wait::{self, Outcome};
use crate::{CsiError, volume};

/// Makes sure that the volume is gone, its replicas' files included. Its image stays.
pub async fn delete_volume(
    context: &Context,
    request: csi::DeleteVolumeRequest,
    deadline: &Deadline,
) -> Result<csi::DeleteVolumeResponse, CsiError> {
    let volume_id = request.volume_id;
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    let _flight = context.in_flight.take(&volume_id)?;
    let Some(uid) = mark(context, &volume_id).await? else { return Ok(csi::DeleteVolumeResponse {}) };
    let gone = |volume: Option<&Volume>| volume.is_none_or(|v| v.metadata.uid != uid).then_some(());
    match wait::until(&context.store, &volume_id, deadline, gone).await? {
        Outcome::Reached(()) => {
            info!(volume = volume_id, "volume deleted");
            Ok(csi::DeleteVolumeResponse {})
        }
        Outcome::Late(last) => {
            let why = last.as_ref().and_then(volume::unmet).map(|m| format!(": {m}")).unwrap_or_default();
            Err(CsiError::StillWaiting {
                volume_id,
                progress: format!("is being deleted, its replicas are not all gone yet{why}"),
            })
        }
    }
}

/// Marks the volume as to be deleted; the uid of the object to wait for, `None` when there is none.
async fn mark(context: &Context, volume_id: &str) -> Result<Option<Option<String>>, CsiError> {
    for _ in 0..CONFLICT_RETRIES {
        let Some(found) = context.store.get::<Volume>(volume_id).await? else { return Ok(None) };
        if found.metadata.deletion_timestamp.is_some() {
            return Ok(Some(found.uid()));
        }
        let now = found.status.as_ref().map(|s| s.current_node_id.clone()).unwrap_or_default();
        if let Some(node) = [&found.spec.node_id, &now].into_iter().find(|n| !n.is_empty()) {
            return Err(CsiError::AttachedElsewhere {
                volume_id: volume_id.to_owned(),
                node: node.clone(),
                hint: "detach it first",
            });
        }
        // Decided on this very reading: an attachment in between makes it void.
        let preconditions = Preconditions { uid: found.uid(), resource_version: found.resource_version() };
        match context.store.delete::<Volume>(volume_id, &preconditions).await {
            Ok(_) => return Ok(Some(found.uid())),
            Err(StoreError::Precondition { .. } | StoreError::Conflict { .. }) => continue,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Err(CsiError::Contended { what: format!("volume `{volume_id}`") })
}
