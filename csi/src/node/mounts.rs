//! Mounts and filesystems of this node: the narrow passage to `dataplane`.
//!
//! System calls on mounts may take as long as a slow disk does, so they leave the async threads.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use dataplane::filesystem::growth;
pub use dataplane::filesystem::{Contents as Content, Found, New};
use dataplane::mount::Unmount;
use dataplane::{DataplaneError, filesystem, mount, stats};
use tracing::{info, warn};

use crate::CsiError;

/// `major:minor` of a block device, as the kernel's list of mounts writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNumber(pub String);

/// Something that is mounted.
#[derive(Clone, Debug)]
pub struct Mount {
    pub target: PathBuf,
    /// Of its filesystem.
    pub device: DeviceNumber,
    pub fs_type: String,
    pub source: String,
    pub read_only: bool,
    /// A part of its filesystem is mounted, such as one device node of `/dev`.
    pub is_part: bool,
}

impl From<mount::Mount> for Mount {
    fn from(mount: mount::Mount) -> Mount {
        Mount {
            read_only: mount.is_read_only(),
            is_part: mount.root != Path::new("/"),
            target: mount.target,
            device: DeviceNumber(mount.device),
            fs_type: mount.fs_type,
            source: mount.source,
        }
    }
}

/// The number of a block device; `None` for anything else. Follows links.
pub fn device_number(path: &Path) -> io::Result<Option<DeviceNumber>> {
    let meta = std::fs::metadata(path)?;
    let number = meta.rdev();
    let text = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    Ok(meta.file_type().is_block_device().then_some(DeviceNumber(text)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DataplaneError> + Send + 'static,
) -> Result<T, CsiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(failed) => std::panic::resume_unwind(failed.into_panic()),
    }
}

/// Everything that is mounted on this node.
pub async fn table() -> Result<Vec<Mount>, CsiError> {
    Ok(blocking(mount::list).await?.into_iter().map(Mount::from).collect())
}

/// What is mounted at exactly this path.
pub async fn at(target: &Path) -> Result<Option<Mount>, CsiError> {
    let target = target.to_owned();
    Ok(blocking(move || mount::find(&target)).await?.map(Mount::from))
}

/// What a device holds.
pub async fn content(device: &Path) -> Result<Found, CsiError> {
    Ok(filesystem::detect(device).await?)
}

/// Whether a device holds only what an interrupted attempt to make a filesystem left.
pub async fn is_remainder(found: &Found, device: &Path, new: &New<'_>) -> Result<bool, CsiError> {
    Ok(found.is_remainder(device, new).await?)
}

/// Makes a filesystem on a device that is blank, or holds what an `unfinished` attempt left; refused on any other.
pub async fn format(device: &Path, new: &New<'_>, unfinished: bool) -> Result<(), CsiError> {
    Ok(filesystem::format(device, new, unfinished).await?)
}

/// Makes durable what was written to a device.
pub async fn flush(device: &Path) -> Result<(), CsiError> {
    Ok(filesystem::flush(device).await?)
}

/// Mounts the filesystem of a device, grown to the device unless it is to be read only. One that was used before and cannot grow is
/// mounted with the size that it has; the reason then. A failure leaves nothing mounted.
pub async fn mount(device: &Path, target: &Path, fs_type: &str, flags: &[String]) -> Result<Option<String>, CsiError> {
    mount_grown(device, target, fs_type, flags, growth::kernel_grows_ext()).await
}

/// The same, with ext4 grown by the kernel once it is mounted where that is said to be possible. What it does not grow is grown
/// before it is mounted.
pub async fn mount_grown(
    device: &Path,
    target: &Path,
    fs_type: &str,
    flags: &[String],
    by_kernel: bool,
) -> Result<Option<String>, CsiError> {
    if flags.iter().flat_map(|flag| flag.split(',')).any(|flag| flag == "ro") {
        return mount_as_it_is(device, target, fs_type, flags).await.map(|()| None);
    }
    match grow_and_mount(device, target, fs_type, flags, by_kernel).await {
        Err(CsiError::Dataplane(error @ DataplaneError::NotGrown { .. })) => {
            let reason = crate::status::sentence(&error);
            warn!(device = %device.display(), reason, "filesystem mounted as it is");
            mount_as_it_is(device, target, fs_type, flags).await.map(|()| Some(reason))
        }
        Err(error) => Err(error),
        // What is mounted and whole is left to its users.
        Ok(()) => Ok(growth::grow_mounted(target, fs_type).await.err().map(|error| {
            let reason = crate::status::sentence(&error);
            warn!(device = %device.display(), reason, "mounted filesystem not grown");
            reason
        })),
    }
}

async fn grow_and_mount(
    device: &Path,
    target: &Path,
    fs_type: &str,
    flags: &[String],
    by_kernel: bool,
) -> Result<(), CsiError> {
    if by_kernel && growth::is_sound_and_smaller(device, fs_type).await? {
        mount_as_it_is(device, target, fs_type, flags).await?;
        match growth::grow_while_mounted(device, target, fs_type).await {
            Ok(()) => return Ok(()),
            Err(error) => info!(%error, "the kernel does not grow the filesystem, so it is grown before it is mounted"),
        }
        unmount(target).await?;
    }
    growth::grow_before_mount(device, fs_type).await?;
    mount_as_it_is(device, target, fs_type, flags).await
}

async fn mount_as_it_is(device: &Path, target: &Path, fs_type: &str, flags: &[String]) -> Result<(), CsiError> {
    let mut options = flags.to_vec();
    if fs_type == "xfs" {
        // Two volumes of one image have filesystems with one UUID.
        options.push("nouuid".into());
    }
    let (source, place, kind) = (device.to_owned(), target.to_owned(), fs_type.to_owned());
    blocking(move || mount::mount(&source, &place, &kind, &options)).await
}

/// Grows what was mounted by an attempt that was cut off before it was grown, where that can be done. Where not it is used with the
/// size that it has, and grown before it is mounted the next time; NodeExpandVolume says why.
pub async fn finish_growth(device: &Path, mount: &Mount) {
    if let Err(error) = grow(device, mount).await {
        info!(device = %device.display(), reason = crate::status::sentence(&error), "mounted filesystem not grown");
    }
}

/// Grows a filesystem that is mounted to its device; nothing when it has all of it.
pub async fn grow(device: &Path, mount: &Mount) -> Result<(), CsiError> {
    Ok(growth::grow_while_mounted(device, &mount.target, &mount.fs_type).await?)
}

/// Makes a folder or device node visible at another path.
pub async fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), CsiError> {
    let (source, target) = (source.to_owned(), target.to_owned());
    blocking(move || mount::bind(&source, &target, read_only)).await
}

/// Ends everything that is mounted at a path; nothing mounted is success.
pub async fn unmount(target: &Path) -> Result<(), CsiError> {
    Ok(mount::unmount(target, Unmount::Orderly).await?)
}

/// How full the filesystem of a path is.
pub async fn usage(path: &Path) -> Result<stats::FilesystemStats, CsiError> {
    let path = path.to_owned();
    blocking(move || stats::filesystem(&path)).await
}

/// Bytes of a block device.
pub async fn device_size(device: &Path) -> Result<u64, CsiError> {
    let device = device.to_owned();
    blocking(move || stats::device_size(&device)).await
}
