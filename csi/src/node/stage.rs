//! NodeStageVolume: the volume's filesystem at one path of this node, for all its users.
//!
//! Observe, decide, act: what is mounted and what the device holds, then one plan. Nothing is ever formatted that is not blank;
//! a filesystem that the image brings is used as it is and grown to the device.

use std::path::Path;

use proto::csi;
use tracing::info;

use super::device::{self, Device};
use super::mounts::{self, Content, Mount};
use super::{Context, path};
use crate::capability::{Access, FsType, Usage};
use crate::deadline::Deadline;
use crate::parameters::Parameters;
use crate::{CsiError, parameters};

/// Filesystems that are mounted; others may be, by a pod that gets the block device.
const MOUNTABLE: [&str; 4] = ["ext4", "xfs", "ext3", "ext2"];

/// What is found before anything is done.
#[derive(Debug)]
struct Observed<'a> {
    volume_id: &'a str,
    staging: &'a Path,
    device: &'a Device,
    mounted: Option<Mount>,
    content: Content,
    /// For a blank device.
    fs_type: FsType,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Nothing,
    /// Mount what is there.
    Mount {
        fs_type: String,
    },
    /// Make a filesystem, then mount it.
    Format {
        fs_type: FsType,
    },
}

fn decide(observed: &Observed<'_>) -> Result<Plan, CsiError> {
    if let Some(mounted) = &observed.mounted {
        if mounted.device == observed.device.number {
            return Ok(Plan::Nothing);
        }
        let reason = format!("it is a mount of another device ({}), unstage that first", mounted.source);
        return Err(CsiError::PathTaken { path: observed.staging.to_owned(), reason });
    }
    let keep = |reason: String| Err(CsiError::Content { volume_id: observed.volume_id.to_owned(), reason });
    match &observed.content {
        Content::Blank => Ok(Plan::Format { fs_type: observed.fs_type }),
        Content::Filesystem(fs_type) if MOUNTABLE.contains(&fs_type.as_str()) => {
            Ok(Plan::Mount { fs_type: fs_type.clone() })
        }
        Content::Filesystem(fs_type) => keep(format!(
            "it holds a filesystem of type {fs_type}, which is not mounted here; use it as a block device (`volumeMode: Block`)"
        )),
        Content::Other(what) => keep(format!(
            "it holds {what}, no filesystem, and nothing is formatted that is not blank; use it as a block device (`volumeMode: Block`), or an image with a filesystem"
        )),
    }
}

/// Makes the volume ready on this node.
pub async fn stage(
    context: &Context,
    request: csi::NodeStageVolumeRequest,
    _: &Deadline,
) -> Result<csi::NodeStageVolumeResponse, CsiError> {
    let csi::NodeStageVolumeRequest { volume_id, staging_target_path, volume_capability, volume_context, .. } = request;
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    let staging = path("staging_target_path", &staging_target_path)?;
    let usage = Usage::required(volume_capability.as_ref())?;
    let _flight = context.in_flight.take(&volume_id)?;
    let volume = device::find_volume(context, &volume_id).await?;
    let device = device::of_volume(context, &volume_id).await?;
    let mounted = mounts::at(staging).await?;
    let Access::Mount { fs_type, flags } = usage.access else {
        return match mounted {
            // Its users get the device itself.
            None => Ok(csi::NodeStageVolumeResponse {}),
            Some(_) => Err(CsiError::PathTaken {
                path: staging.to_owned(),
                reason: "it is staged with a filesystem, and is wanted as a block device now; unstage it first".into(),
            }),
        };
    };
    // A volume that was made by hand has its parameters in its context only.
    let mut given = volume.spec.parameters.clone();
    given.extend(volume_context.into_iter().filter(|(key, _)| parameters::FILESYSTEM_KEYS.contains(&key.as_str())));
    given.retain(|key, _| parameters::FILESYSTEM_KEYS.contains(&key.as_str()));
    let parameters = Parameters::parse(&given)?;
    let fs_type = fs_type.or(parameters.fs_type).unwrap_or_default();
    let content = match mounted {
        Some(_) => Content::Blank,
        None => mounts::content(&device.path).await?,
    };
    let observed = Observed { volume_id: &volume_id, staging, device: &device, mounted, content, fs_type };
    let mounted_as = match decide(&observed)? {
        Plan::Nothing => return Ok(csi::NodeStageVolumeResponse {}),
        Plan::Mount { fs_type } => fs_type,
        Plan::Format { fs_type } => {
            mounts::format(&device.path, fs_type, &parameters.mkfs_params).await?;
            info!(volume = volume_id, %fs_type, "blank volume formatted");
            fs_type.as_str().to_owned()
        }
    };
    std::fs::create_dir_all(staging).map_err(|source| CsiError::Path {
        what: "create",
        path: staging.to_owned(),
        source,
    })?;
    mounts::mount(&device.path, staging, &mounted_as, &flags).await?;
    info!(volume = volume_id, fs_type = mounted_as, "volume staged");
    Ok(csi::NodeStageVolumeResponse {})
}

/// Takes the volume's filesystem off its staging path.
pub async fn unstage(
    context: &Context,
    request: csi::NodeUnstageVolumeRequest,
    _: &Deadline,
) -> Result<csi::NodeUnstageVolumeResponse, CsiError> {
    let csi::NodeUnstageVolumeRequest { volume_id, staging_target_path } = request;
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    let staging = path("staging_target_path", &staging_target_path)?;
    let _flight = context.in_flight.take(&volume_id)?;
    mounts::unmount(staging).await?;
    info!(volume = volume_id, "volume unstaged");
    Ok(csi::NodeUnstageVolumeResponse {})
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn check(mounted: Option<&str>, content: Content) -> Result<Plan, String> {
        let device = Device { path: PathBuf::from("/dev/loop7"), number: mounts::DeviceNumber("7:7".into()) };
        let mounted = mounted.map(|number| Mount {
            target: PathBuf::from("/staging"),
            device: mounts::DeviceNumber(number.into()),
            source: "/dev/loop8".into(),
            read_only: false,
            is_part: false,
        });
        let (staging, fs_type) = (Path::new("/staging"), FsType::Xfs);
        decide(&Observed { volume_id: "v", staging, device: &device, mounted, content, fs_type })
            .map_err(|e| e.to_string())
    }

    #[test]
    fn formats_only_what_is_blank() {
        assert_eq!(check(None, Content::Blank), Ok(Plan::Format { fs_type: FsType::Xfs }));
        assert_eq!(check(None, Content::Filesystem("ext4".into())), Ok(Plan::Mount { fs_type: "ext4".into() }));
        for content in [
            Content::Filesystem("vfat".into()),
            Content::Filesystem("crypto_LUKS".into()),
            Content::Other("a partition table (gpt)".into()),
            Content::Other("data that nobody knows".into()),
        ] {
            let text = check(None, content).unwrap_err();
            assert!(text.contains("left as it is") && text.contains("volumeMode: Block"), "{text}");
        }
    }

    #[test]
    fn what_is_staged_stays_and_what_is_foreign_is_not_covered() {
        assert_eq!(check(Some("7:7"), Content::Other("anything".into())), Ok(Plan::Nothing));
        assert!(check(Some("7:8"), Content::Blank).unwrap_err().contains("/dev/loop8"));
    }
}
