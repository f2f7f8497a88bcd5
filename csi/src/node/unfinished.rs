//! The note that a filesystem is being made on a blank volume: `unfinishedFilesystem` in the volume's status.
//!
//! It stands in the volume, not on a node: after a loss of power the volume may be attached anywhere. In its status, because that
//! is never taken from what a user applies. It is written only while the volume is wished on this node, and for the very object
//! whose device was seen to be blank; whoever is about to use the volume takes it away first.

use std::path::Path;

use api::Volume;
use kube::ResourceExt;

use super::{Context, mounts};
use crate::CsiError;
use crate::capability::FsType;

/// The filesystem that somebody began to make.
pub fn of(volume: &Volume) -> Option<FsType> {
    volume.status.as_ref()?.unfinished_filesystem.parse().ok()
}

/// Says that this filesystem is going to be made on the blank volume, durably; the volume that says so.
pub async fn note(context: &Context, volume: &Volume, fs_type: FsType) -> Result<Volume, CsiError> {
    let node = &context.node_name;
    let is_ours = |found: &Volume| found.metadata.uid == volume.metadata.uid && found.spec.node_id == *node;
    let change = |found: &mut Volume| {
        if is_ours(found) {
            found.status.get_or_insert_default().unfinished_filesystem = fs_type.as_str().to_owned();
        }
    };
    let noted = context.store.modify_status(&volume.name_any(), change).await?;
    if is_ours(&noted) {
        return Ok(noted);
    }
    let reason =
        format!("was told to leave node `{node}` before it was formatted; repeat the call if it is still wanted");
    Err(CsiError::NotUsable { volume_id: volume.name_any(), reason })
}

/// Takes the note away, durably, before the first use of the volume. What was made by then is on stable storage first.
pub async fn forget(context: &Context, volume: &Volume, device: &Path) -> Result<(), CsiError> {
    if volume.status.as_ref().is_none_or(|status| status.unfinished_filesystem.is_empty()) {
        return Ok(());
    }
    mounts::flush(device).await?;
    let change = |found: &mut Volume| {
        if let Some(status) = &mut found.status {
            status.unfinished_filesystem.clear();
        }
    };
    context.store.modify_status(&volume.name_any(), change).await?;
    Ok(())
}
