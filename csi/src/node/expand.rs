//! NodeExpandVolume: what a grown volume has on this node. NodeStageVolume has grown its filesystem already where that can be done;
//! here it is looked at, and grown while it is mounted if it is still smaller. One that is not grown is refused, which keeps nobody
//! from using it.

use std::path::Path;

use proto::csi;

use super::mounts::{self, Mount};
use super::{Context, device};
use crate::CsiError;
use crate::deadline::Deadline;
use crate::size::Bounds;

/// Makes sure that the filesystem at a path, or the block device there, has all of the volume; answers its bytes.
pub async fn expand(
    context: &Context,
    request: csi::NodeExpandVolumeRequest,
    _: &Deadline,
) -> Result<csi::NodeExpandVolumeResponse, CsiError> {
    let csi::NodeExpandVolumeRequest { volume_id, volume_path, capacity_range, staging_target_path, .. } = request;
    for (field, value) in [("volume_id", &volume_id), ("volume_path", &volume_path)] {
        if value.is_empty() {
            return Err(CsiError::Missing { field });
        }
    }
    let bounds = Bounds::of(capacity_range.as_ref())?;
    let _flight = context.in_flight.take(&volume_id)?;
    let path = Path::new(&volume_path);
    let device = device::at_path(context, &volume_id, path).await?;
    let not_there = || CsiError::NotThere { volume_id: volume_id.clone(), path: path.to_owned() };
    let size = mounts::device_size(&device.path).await?;
    let refuse = |reason: String| Err(CsiError::NotUsable { volume_id: volume_id.clone(), reason });
    if let Some(required) = bounds.required.filter(|required| *required > size) {
        return refuse(format!(
            "has {size} bytes on node `{}`, where {required} are wanted; its replicas grow when it is attached the next time, so end the pods that use it",
            context.node_name
        ));
    }
    let done = Ok(csi::NodeExpandVolumeResponse { capacity_bytes: i64::try_from(size).unwrap_or(i64::MAX) });
    if device::is_at(&device, path) {
        return done;
    }
    let is_ours = |mount: &Mount| mount.device == device.number;
    let there = mounts::at(path).await?.filter(is_ours).ok_or_else(not_there)?;
    // Its user may have it read-only, where it is staged it is not.
    let staged = mounts::at(Path::new(&staging_target_path)).await?.filter(is_ours);
    let Some(writable) = [Some(there), staged].into_iter().flatten().find(|mount| !mount.read_only) else {
        return refuse(format!(
            "is mounted read-only at `{volume_path}`, where its filesystem is not grown; mount it writable once"
        ));
    };
    let Err(error) = mounts::grow(&device.path, &writable).await else {
        context.ungrown.note(&volume_id, None);
        return done;
    };
    let error = crate::status::sentence(&error);
    refuse(match context.ungrown.why(&volume_id) {
        Some(before) => format!(
            "has a filesystem at `{volume_path}` that did not grow to {size} bytes before it was mounted ({before}), nor does it now ({error}); its files are as they were, and what it waits for is tried again at each mount"
        ),
        None => format!(
            "has a filesystem at `{volume_path}` that could not be grown to {size} bytes while it is mounted ({error}); it grows before it is mounted the next time, so end the pods that use it"
        ),
    })
}
