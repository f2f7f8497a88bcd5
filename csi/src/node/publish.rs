//! NodePublishVolume: a staged volume at a path of one user.

use std::io;
use std::path::Path;

use proto::csi;
use tracing::info;

use super::device::{self, Device};
use super::{Context, mounts, path, unfinished};
use crate::CsiError;
use crate::capability::{Access, Usage};
use crate::deadline::Deadline;

/// Puts the staged filesystem, or the block device, at the target path.
pub async fn publish(
    context: &Context,
    request: csi::NodePublishVolumeRequest,
    _: &Deadline,
) -> Result<csi::NodePublishVolumeResponse, CsiError> {
    let csi::NodePublishVolumeRequest {
        volume_id, target_path, staging_target_path, volume_capability, readonly, ..
    } = request;
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    let target = path("target_path", &target_path)?;
    let usage = Usage::required(volume_capability.as_ref())?;
    let staging = path("staging_target_path", &staging_target_path)?;
    let _flight = context.in_flight.take(&volume_id)?;
    let volume = device::find_volume(context, &volume_id).await?;
    let device = device::of_volume(context, &volume_id).await?;
    let elsewhere = published(&device, staging).await?;
    let elsewhere = elsewhere.iter().find(|other| other.as_path() != target);
    if let Some(other) = elsewhere.filter(|_| usage.single_writer) {
        let reason = format!(
            "is published at `{}` already, and its access mode allows one user only; unpublish it there first",
            other.display()
        );
        return Err(CsiError::NotUsable { volume_id, reason });
    }
    match &usage.access {
        Access::Block => {
            unfinished::forget(context, &volume, &device.path).await?;
            publish_block(&device, target, readonly).await?;
        }
        Access::Mount { .. } => {
            if mounts::at(staging).await?.is_none_or(|m| m.device != device.number) {
                let reason = format!("is not staged at `{}`; stage it first (NodeStageVolume)", staging.display());
                return Err(CsiError::NotUsable { volume_id, reason });
            }
            publish_mount(&device, staging, target, readonly).await?;
        }
    }
    info!(volume = volume_id, target = %target.display(), readonly, "volume published");
    Ok(csi::NodePublishVolumeResponse {})
}

/// Every path where a user has the volume.
async fn published(device: &Device, staging: &Path) -> Result<Vec<std::path::PathBuf>, CsiError> {
    let users = mounts::table().await?.into_iter().filter(|mount| mount.target != staging);
    Ok(users
        .filter(|mount| mount.device == device.number || mount.is_part && device::is_at(device, &mount.target))
        .map(|mount| mount.target)
        .collect())
}

async fn publish_mount(device: &Device, staging: &Path, target: &Path, readonly: bool) -> Result<(), CsiError> {
    if let Some(there) = mounts::at(target).await? {
        let taken = |reason: String| Err(CsiError::PathTaken { path: target.to_owned(), reason });
        return match there {
            there if there.device != device.number => taken(format!("it is a mount of {}", there.source)),
            there if there.read_only && !readonly => taken("the volume is there already, read-only".into()),
            there if !there.read_only && readonly => taken("the volume is there already, writable".into()),
            _ => Ok(()),
        };
    }
    std::fs::create_dir_all(target).map_err(|source| CsiError::Path {
        what: "create",
        path: target.to_owned(),
        source,
    })?;
    mounts::bind(staging, target, readonly).await
}

async fn publish_block(device: &Device, target: &Path, readonly: bool) -> Result<(), CsiError> {
    if device::is_at(device, target) {
        return Ok(());
    }
    if mounts::at(target).await?.is_some() {
        return Err(CsiError::PathTaken { path: target.to_owned(), reason: "something else is mounted there".into() });
    }
    let fail = |source| CsiError::Path { what: "create", path: target.to_owned(), source };
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    match std::fs::OpenOptions::new().write(true).create_new(true).open(target) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(fail(error)),
        // Read-only here is a wish: the kernel lets device nodes of read-only mounts be written, whoever makes the container forbids it.
        // A file that is there is one that an interrupted call left.
        _ => mounts::bind(&device.path, target, readonly).await,
    }
}

/// Takes the volume off the target path and removes the path.
pub async fn unpublish(
    context: &Context,
    request: csi::NodeUnpublishVolumeRequest,
    _: &Deadline,
) -> Result<csi::NodeUnpublishVolumeResponse, CsiError> {
    let csi::NodeUnpublishVolumeRequest { volume_id, target_path } = request;
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    let target = path("target_path", &target_path)?;
    let _flight = context.in_flight.take(&volume_id)?;
    mounts::unmount(target).await?;
    remove(target)?;
    info!(volume = volume_id, target = %target.display(), "volume unpublished");
    Ok(csi::NodeUnpublishVolumeResponse {})
}

/// Removes an empty folder or an empty file; never anything that holds data. A folder that holds some is left as it is.
fn remove(target: &Path) -> Result<(), CsiError> {
    let fail = |source| CsiError::Path { what: "remove", path: target.to_owned(), source };
    let meta = match std::fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(fail)?,
    };
    if meta.is_dir() {
        match std::fs::remove_dir(target) {
            // Made for us it would be empty: it is somebody's own, in which the volume was mounted. The volume is off it.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            other => other.map_err(fail),
        }
    } else if meta.is_file() && meta.len() == 0 {
        std::fs::remove_file(target).map_err(fail)
    } else {
        let reason = "it is neither an empty folder nor an empty file; look at it and remove it".into();
        Err(CsiError::PathTaken { path: target.to_owned(), reason })
    }
}
