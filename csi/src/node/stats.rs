//! NodeGetVolumeStats and NodeGetVolumeHealth.

use std::path::Path;

use proto::csi;
use proto::csi::volume_health::VolumeHealthEntry;
use proto::csi::volume_usage::Unit;

use super::{Context, device, mounts};
use crate::deadline::Deadline;
use crate::{CsiError, volume};

/// How full the volume at a path is.
pub async fn get_stats(
    context: &Context,
    request: csi::NodeGetVolumeStatsRequest,
    _: &Deadline,
) -> Result<csi::NodeGetVolumeStatsResponse, CsiError> {
    let csi::NodeGetVolumeStatsRequest { volume_id, volume_path, .. } = request;
    for (field, value) in [("volume_id", &volume_id), ("volume_path", &volume_path)] {
        if value.is_empty() {
            return Err(CsiError::Missing { field });
        }
    }
    let path = Path::new(&volume_path);
    let device = device::at_path(context, &volume_id, path).await?;
    let not_there = || CsiError::NotThere { volume_id: volume_id.clone(), path: path.to_owned() };
    let usage = if device::is_at(&device, path) {
        vec![csi::VolumeUsage {
            total: bytes(mounts::device_size(&device.path).await?),
            unit: Unit::Bytes.into(),
            ..Default::default()
        }]
    } else if mounts::at(path).await?.is_some_and(|m| m.device == device.number) {
        let usage = mounts::usage(path).await?;
        let measure = |unit: Unit, total, used, available| csi::VolumeUsage {
            total: bytes(total),
            used: bytes(used),
            available: bytes(available),
            unit: unit.into(),
        };
        vec![
            measure(Unit::Bytes, usage.total_bytes, usage.used_bytes, usage.available_bytes),
            measure(Unit::Inodes, usage.total_inodes, usage.used_inodes, usage.free_inodes),
        ]
    } else {
        return Err(not_there());
    };
    Ok(csi::NodeGetVolumeStatsResponse { usage })
}

fn bytes(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The problems of a volume, those of its engine and its filesystem on this node included.
pub async fn get_health(
    context: &Context,
    request: csi::NodeGetVolumeHealthRequest,
    _: &Deadline,
) -> Result<csi::NodeGetVolumeHealthResponse, CsiError> {
    let found = device::find_volume(context, &request.volume_id).await?;
    let mut health = volume::health(&found);
    health.health_statuses.extend(context.ungrown.why(&request.volume_id).map(|message| VolumeHealthEntry {
        status: csi::VolumeHealthErrorType::Degraded.into(),
        reason: "FilesystemNotGrown".to_owned(),
        message,
    }));
    Ok(csi::NodeGetVolumeHealthResponse { volume_health: Some(health) })
}
