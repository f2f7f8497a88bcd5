//! Filesystems on devices: recognize, make when blank, [grow](growth).
//!
//! Nothing is ever formatted that is not blank: no signature that `blkid` knows, and zeroes at both ends. The one exception is what
//! an interrupted `mkfs` left, which the caller must know of: a promise of his that the device was blank when that began.

pub mod growth;

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::process::{run, run_ok};
use crate::{DataplaneError, limits};

/// Read at both ends of a device before it counts as blank.
const BLANK_BYTES: u64 = 1 << 20;
/// Where the first mount of an xfs writes: behind the one record that `mkfs` leaves.
const FIRST_LOG_BYTES: u64 = 1 << 20;

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Nothing: it may be formatted.
    Blank,
    /// A filesystem, by the kernel's name of it.
    Filesystem(String),
    /// Something else, a phrase: a partition table, LVM.
    Other(String),
    /// Data without a known signature.
    Unknown,
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contents::Blank => f.write_str("nothing"),
            Contents::Filesystem(fs_type) => write!(f, "a filesystem ({fs_type})"),
            Contents::Other(what) => f.write_str(what),
            Contents::Unknown => f.write_str("data without a known signature"),
        }
    }
}

/// What one look at a device found.
#[derive(Clone, Debug)]
pub struct Found {
    pub contents: Contents,
    /// Of a filesystem.
    uuid: Option<String>,
}

/// A filesystem that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct New<'a> {
    /// `ext4` or `xfs`.
    pub fs_type: &'a str,
    pub uuid: &'a str,
    /// Appended to the arguments of `mkfs`; a UUID in them counts.
    pub extra: &'a [String],
}

/// Looks what is on a device.
pub async fn detect(device: &Path) -> Result<Found, DataplaneError> {
    let args = ["-p".as_ref(), "-o".as_ref(), "export".as_ref(), device.as_os_str()];
    let output = run("blkid", args, limits::PROBE_TIMEOUT).await?;
    let value = |key: &str| {
        output
            .stdout
            .lines()
            .find_map(|line| line.split_once('=').filter(|(k, _)| *k == key).map(|(_, v)| v.to_owned()))
    };
    let contents = match output.code {
        Some(0) => match (value("USAGE").as_deref(), value("TYPE"), value("PTTYPE")) {
            (Some("filesystem"), Some(fs_type), _) => Contents::Filesystem(fs_type),
            (_, Some(other), _) => Contents::Other(format!("data of type {other}")),
            (_, None, Some(table)) => Contents::Other(format!("a partition table ({table})")),
            (_, None, None) => Contents::Other("data that is not understood".into()),
        },
        // "Nothing found". An ambivalent probe (8) is an error: more than one signature is not blank.
        Some(2) if is_zero_at_both_ends(device).await? => Contents::Blank,
        Some(2) => Contents::Unknown,
        Some(8) => Contents::Other("signatures of several filesystems at once".into()),
        _ => return Err(output.failure()),
    };
    Ok(Found { contents, uuid: value("UUID") })
}

impl Found {
    /// Whether a device that was blank when `mkfs` began holds only what that left when it was interrupted.
    ///
    /// A filesystem that is whole is none: it is used. One with another UUID, or that was ever mounted, is somebody's; so is
    /// anything else that has a signature.
    pub async fn is_remainder(&self, device: &Path, new: &New<'_>) -> Result<bool, DataplaneError> {
        match (&self.contents, &self.uuid) {
            (Contents::Unknown, _) => Ok(true),
            (Contents::Filesystem(found), Some(uuid)) if found == new.fs_type && uuid == new.uuid => {
                Ok(!was_mounted(device, found)? && !is_whole(device, found).await?)
            }
            _ => Ok(false),
        }
    }
}

/// Makes a filesystem, with Longhorn's defaults, on a blank device; refuses any other one, except what is the remainder of an
/// attempt that the caller knows of (`unfinished`).
pub async fn format(device: &Path, new: &New<'_>, unfinished: bool) -> Result<(), DataplaneError> {
    let New { fs_type, uuid, extra } = *new;
    let (program, force, defaults): (_, _, &[&str]) = match fs_type {
        "ext4" => ("mkfs.ext4", "-F", &["-b4096", "-q", "-m0"]),
        "xfs" => ("mkfs.xfs", "-f", &["-ssize=4096", "-bsize=4096", "-q"]),
        other => {
            return Err(DataplaneError::Unsupported {
                message: format!("cannot make a filesystem of type `{other}`; use ext4 or xfs"),
            });
        }
    };
    // Whatever the caller saw before: this look is the one that counts.
    let found = detect(device).await?;
    let may_be_formatted = found.contents == Contents::Blank || unfinished && found.is_remainder(device, new).await?;
    if !may_be_formatted {
        let message =
            format!("`{}` is not formatted as {fs_type}, because it holds {}", device.display(), found.contents);
        return Err(DataplaneError::NotBlank { message });
    }
    let mut args: Vec<String> = defaults.iter().map(|a| (*a).to_owned()).collect();
    args.extend(unfinished.then(|| force.to_owned()));
    match fs_type {
        // The last one counts.
        "ext4" => args.extend(["-U".into(), uuid.to_owned()]),
        // Said twice is an error.
        _ if extra.iter().any(|a| a.contains("uuid=")) => {}
        _ => args.push(format!("-muuid={uuid}")),
    }
    args.extend(extra.iter().cloned());
    args.push(device.display().to_string());
    run_ok(program, args, limits::FILESYSTEM_TIMEOUT).await.map(drop)
}

/// Makes durable what was written to a device.
pub async fn flush(device: &Path) -> Result<(), DataplaneError> {
    let owned = device.to_owned();
    let flushed = tokio::task::spawn_blocking(move || File::open(owned)?.sync_all()).await;
    let flushed = flushed.map_err(std::io::Error::other).and_then(|done| done);
    flushed.map_err(|e| DataplaneError::io(format!("flush `{}`", device.display()), e))
}

/// Whether a filesystem was ever mounted: `mkfs` leaves the time of the last mount (ext4) or the number of the last change of the
/// superblock (xfs) empty, and one record in the log of xfs.
fn was_mounted(device: &Path, fs_type: &str) -> Result<bool, DataplaneError> {
    let block = read_at(device, 0, 4096)?;
    let number = |at: usize, length: usize| block[at..at + length].iter().fold(0, |n, b| n << 8 | u64::from(*b));
    if fs_type != "xfs" {
        const MOUNT_TIME: usize = 1024 + 0x2c;
        return Ok(number(MOUNT_TIME, 4) != 0);
    }
    let (block_size, log_start, log_blocks, last_change) = (number(4, 4), number(48, 8), number(96, 4), number(240, 8));
    let (group_blocks, group_bits) = (number(84, 4), number(124, 1).min(63));
    let (group, within) = (log_start >> group_bits, log_start & ((1 << group_bits) - 1));
    let log = group.saturating_mul(group_blocks).saturating_add(within).saturating_mul(block_size);
    let length = log_blocks.saturating_mul(block_size).min(FIRST_LOG_BYTES) as usize;
    let records = read_at(device, log, length)?;
    let further = records.chunks(512).skip(1).any(|sector| sector.starts_with(&[0xfe, 0xed, 0xba, 0xbe]));
    Ok(last_change != 0 || further)
}

/// Whether nothing of a filesystem is missing, as its own checker says.
async fn is_whole(device: &Path, fs_type: &str) -> Result<bool, DataplaneError> {
    let check = match fs_type {
        // sb_inprogress: the checker would look all over the device for another superblock.
        "xfs" if read_at(device, 126, 1)? != [0] => return Ok(false),
        "xfs" => run("xfs_repair", ["-n".as_ref(), device.as_os_str()], limits::FILESYSTEM_TIMEOUT).await?,
        _ => run("e2fsck", ["-f".as_ref(), "-n".as_ref(), device.as_os_str()], limits::FILESYSTEM_TIMEOUT).await?,
    };
    match (fs_type, check.code) {
        (_, Some(0)) => Ok(true),
        ("xfs", Some(1 | 2)) => Ok(false),
        // Errors left, or so much is missing that the check cannot go on.
        ("ext4", Some(code)) if code & (growth::E2FSCK_ERRORS_LEFT | growth::E2FSCK_FAILED) != 0 => Ok(false),
        _ => Err(check.failure()),
    }
}

fn read_at(device: &Path, at: u64, length: usize) -> Result<Vec<u8>, DataplaneError> {
    let mut bytes = vec![0; length];
    let read = File::open(device).and_then(|file| std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, at));
    read.map_err(|e| DataplaneError::io(format!("read the superblock of `{}`", device.display()), e))?;
    Ok(bytes)
}

async fn is_zero_at_both_ends(device: &Path) -> Result<bool, DataplaneError> {
    let owned = device.to_owned();
    let read = move || -> std::io::Result<bool> {
        let mut file = File::open(&owned)?;
        let size = file.seek(SeekFrom::End(0))?;
        let mut buffer = vec![0u8; BLANK_BYTES.min(size) as usize];
        for start in [0, size.saturating_sub(BLANK_BYTES)] {
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(&mut buffer)?;
            if buffer.iter().any(|b| *b != 0) {
                return Ok(false);
            }
        }
        Ok(true)
    };
    let outcome = tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other).and_then(|r| r);
    outcome.map_err(|e| DataplaneError::io(format!("read `{}`", device.display()), e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const EXT4: New<'static> = New { fs_type: "ext4", uuid: "5f1c1b2e-0000-4000-8000-00000000abcd", extra: &[] };
    const XFS: New<'static> = New { fs_type: "xfs", ..EXT4 };
    const OTHER_UUID: &str = "5f1c1b2e-0000-4000-8000-000000000001";

    fn file(folder: &tempfile::TempDir, size: u64) -> std::path::PathBuf {
        let path = folder.path().join("disk");
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
        File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    }

    #[tokio::test]
    async fn formats_only_what_is_blank() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, 32 << 20);
        assert_eq!(detect(&path).await.unwrap().contents, Contents::Blank);
        format(&path, &EXT4, false).await.unwrap();
        assert_eq!(detect(&path).await.unwrap().contents, Contents::Filesystem("ext4".into()));
        for unfinished in [false, true] {
            let error = format(&path, &XFS, unfinished).await.unwrap_err();
            assert!(error.to_string().contains("holds a filesystem (ext4)"), "{error}");
        }
    }

    #[tokio::test]
    async fn bytes_without_a_signature_are_not_blank() {
        let folder = tempfile::tempdir().unwrap();
        for at in [100, (8 << 20) - 1] {
            let path = file(&folder, 8 << 20);
            overwrite(&path, at, b"x");
            assert_eq!(detect(&path).await.unwrap().contents, Contents::Unknown);
            assert!(matches!(format(&path, &EXT4, false).await, Err(DataplaneError::NotBlank { .. })));
        }
    }

    async fn is_remainder(device: &Path, new: &New<'_>) -> Result<bool, DataplaneError> {
        detect(device).await?.is_remainder(device, new).await
    }

    /// Each state of the device: whether it counts as what an interrupted attempt left.
    #[tokio::test]
    async fn only_what_an_interrupted_attempt_left_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        for (new, inode_table, mounted) in [(EXT4, 20 << 20, 1024 + 0x2c), (XFS, 8192, 240)] {
            let fresh = async || {
                let path = file(&folder, 320 << 20);
                format(&path, &new, false).await.unwrap();
                path
            };
            let damage = |path: &Path| {
                // The first block group descriptors, or the header of the first allocation group.
                let at = if new.fs_type == "xfs" { inode_table } else { 4096 };
                overwrite(path, at, &[0; 512]);
            };
            let path = fresh().await;
            assert!(!is_remainder(&path, &new).await.unwrap(), "{}: it is whole", new.fs_type);
            damage(&path);
            assert!(is_remainder(&path, &new).await.unwrap(), "{}: a part of it is missing", new.fs_type);
            let other = New { uuid: OTHER_UUID, ..new };
            assert!(!is_remainder(&path, &other).await.unwrap(), "{}: somebody else made it", new.fs_type);
            assert!(matches!(format(&path, &new, false).await, Err(DataplaneError::NotBlank { .. })));
            format(&path, &new, true).await.unwrap();
            assert!(!is_remainder(&path, &new).await.unwrap(), "{}: it was made again", new.fs_type);
            damage(&path);
            overwrite(&path, mounted, &[1]);
            assert!(!is_remainder(&path, &new).await.unwrap(), "{}: it was mounted", new.fs_type);
        }
        let path = file(&folder, 320 << 20);
        format(&path, &XFS, false).await.unwrap();
        overwrite(&path, 126, &[1]);
        assert!(is_remainder(&path, &XFS).await.unwrap(), "mkfs.xfs says itself that it had not ended");
        let path = file(&folder, 320 << 20);
        overwrite(&path, 510, &[0x55, 0xaa]);
        overwrite(&path, 446, &[0, 0, 2, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0, 0]);
        assert!(matches!(detect(&path).await.unwrap().contents, Contents::Other(_)));
        assert!(!is_remainder(&path, &EXT4).await.unwrap(), "a partition table is no remainder");
    }
}
