//! NodeStageVolume: the volume's filesystem at one path of this node, for all its users.
//!
//! Observe, decide, act: what is mounted and what the device holds, then one plan. Nothing is ever formatted that is not blank;
//! a filesystem that the image brings is used as it is and grown to the device.
//!
//! Before a blank volume is formatted the volume's status says so, and it says so until the new filesystem is on stable storage:
//! when power goes or this process is killed meanwhile, what is left is made again, on whichever node.

use std::path::Path;

use proto::csi;
use tracing::info;

use super::device::{self, Device};
use super::mounts::{self, Content, Mount, New};
use super::{Context, path, unfinished};
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
    /// The content is the remainder of an attempt to make this filesystem.
    unfinished: Option<FsType>,
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
        /// Over what is left of an attempt.
        again: bool,
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
        Content::Blank => Ok(Plan::Format { fs_type: observed.fs_type, again: false }),
        _ if let Some(fs_type) = observed.unfinished => Ok(Plan::Format { fs_type, again: true }),
        Content::Filesystem(fs_type) if MOUNTABLE.contains(&fs_type.as_str()) => {
            Ok(Plan::Mount { fs_type: fs_type.clone() })
        }
        Content::Filesystem(fs_type) => keep(format!(
            "it holds a filesystem of type {fs_type}, which is not mounted here; use it as a block device (`volumeMode: Block`)"
        )),
        what => keep(format!(
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
    let mut volume = device::find_volume(context, &volume_id).await?;
    let device = device::of_volume(context, &volume_id).await?;
    let mounted = mounts::at(staging).await?;
    let Access::Mount { fs_type, flags } = usage.access else {
        return match mounted {
            // Its users get the device itself.
            None => unfinished::forget(context, &volume, &device.path).await.map(|()| csi::NodeStageVolumeResponse {}),
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
    let uuid = volume.metadata.uid.clone().unwrap_or_default();
    let new = |fs_type: FsType| New { fs_type: fs_type.as_str(), uuid: &uuid, extra: &parameters.mkfs_params };
    let (mut content, mut unfinished) = (Content::Blank, None);
    if mounted.is_none() {
        let found = mounts::content(&device.path).await?;
        unfinished = unfinished::of(&volume);
        if let Some(fs_type) = unfinished
            && !mounts::is_remainder(&found, &device.path, &new(fs_type)).await?
        {
            unfinished = None;
        }
        content = found.contents;
    }
    let observed = Observed { volume_id: &volume_id, staging, device: &device, mounted, content, fs_type, unfinished };
    let mounted_as = match decide(&observed)? {
        Plan::Nothing => {
            // An attempt that was cut off may have mounted it and no more.
            if let Some(mounted) = observed.mounted.filter(|mounted| !mounted.read_only) {
                mounts::finish_growth(&device.path, &mounted).await;
            }
            return Ok(csi::NodeStageVolumeResponse {});
        }
        Plan::Mount { fs_type } => fs_type,
        Plan::Format { fs_type, again } => {
            volume = unfinished::note(context, &volume, fs_type).await?;
            mounts::format(&device.path, &new(fs_type), again).await?;
            info!(volume = volume_id, %fs_type, again, "volume formatted");
            fs_type.as_str().to_owned()
        }
    };
    unfinished::forget(context, &volume, &device.path).await?;
    std::fs::create_dir_all(staging).map_err(|source| CsiError::Path {
        what: "create",
        path: staging.to_owned(),
        source,
    })?;
    let ungrown = mounts::mount(&device.path, staging, &mounted_as, &flags).await?;
    context.ungrown.note(&volume_id, ungrown);
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
    context.ungrown.note(&volume_id, None);
    info!(volume = volume_id, "volume unstaged");
    Ok(csi::NodeUnstageVolumeResponse {})
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn check(mounted: Option<&str>, content: Content, unfinished: Option<FsType>) -> Result<Plan, String> {
        let device = Device { path: PathBuf::from("/dev/loop7"), number: mounts::DeviceNumber("7:7".into()) };
        let mounted = mounted.map(|number| Mount {
            target: PathBuf::from("/staging"),
            device: mounts::DeviceNumber(number.into()),
            fs_type: "ext4".into(),
            source: "/dev/loop8".into(),
            read_only: false,
            is_part: false,
        });
        let (staging, fs_type) = (Path::new("/staging"), FsType::Xfs);
        decide(&Observed { volume_id: "v", staging, device: &device, mounted, content, fs_type, unfinished })
            .map_err(|e| e.to_string())
    }

    #[test]
    fn formats_only_what_is_blank() {
        let format = |fs_type, again| Ok(Plan::Format { fs_type, again });
        assert_eq!(check(None, Content::Blank, None), format(FsType::Xfs, false));
        assert_eq!(check(None, Content::Filesystem("ext4".into()), None), Ok(Plan::Mount { fs_type: "ext4".into() }));
        for content in [
            Content::Filesystem("vfat".into()),
            Content::Filesystem("crypto_LUKS".into()),
            Content::Other("a partition table (gpt)".into()),
            Content::Unknown,
        ] {
            let text = check(None, content, None).unwrap_err();
            assert!(text.contains("left as it is") && text.contains("volumeMode: Block"), "{text}");
        }
    }

    #[test]
    fn makes_again_what_was_cut_off() {
        for content in [Content::Unknown, Content::Filesystem("ext4".into())] {
            let plan = check(None, content, Some(FsType::Ext4));
            assert_eq!(plan, Ok(Plan::Format { fs_type: FsType::Ext4, again: true }));
        }
        // Nothing is left of it, so that the wish of now counts.
        assert_eq!(
            check(None, Content::Blank, Some(FsType::Ext4)),
            Ok(Plan::Format { fs_type: FsType::Xfs, again: false })
        );
    }

    #[test]
    fn what_is_staged_stays_and_what_is_foreign_is_not_covered() {
        assert_eq!(check(Some("7:7"), Content::Unknown, Some(FsType::Ext4)), Ok(Plan::Nothing));
        assert!(check(Some("7:8"), Content::Blank, None).unwrap_err().contains("/dev/loop8"));
    }
}
