//! Filesystems on devices: recognize, make when blank, grow.
//!
//! Nothing is ever formatted that is not blank: no signature that `blkid` knows, and zeroes at both ends.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::process::{run, run_ok};
use crate::{DataplaneError, limits, stats};

/// Read at both ends of a device before it counts as blank.
const BLANK_BYTES: u64 = 1 << 20;
/// An ext4 that is this much smaller than its device is grown; less is the remainder that it cannot use.
const EXT4_GROW_BYTES: u64 = 1 << 20;

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Nothing: it may be formatted.
    Blank,
    /// A filesystem, by the kernel's name of it.
    Filesystem(String),
    /// Something else, a phrase: a partition table, LVM, data without a known signature.
    Other(String),
}

/// Looks what is on a device.
pub async fn detect(device: &Path) -> Result<Contents, DataplaneError> {
    let args = ["-p".as_ref(), "-o".as_ref(), "export".as_ref(), device.as_os_str()];
    let output = run("blkid", args, limits::PROBE_TIMEOUT).await?;
    let value = |key: &str| {
        output
            .stdout
            .lines()
            .find_map(|line| line.split_once('=').filter(|(k, _)| *k == key).map(|(_, v)| v.to_owned()))
    };
    match output.code {
        Some(0) => Ok(match (value("USAGE").as_deref(), value("TYPE"), value("PTTYPE")) {
            (Some("filesystem"), Some(fs_type), _) => Contents::Filesystem(fs_type),
            (_, Some(other), _) => Contents::Other(format!("data of type {other}")),
            (_, None, Some(table)) => Contents::Other(format!("a partition table ({table})")),
            (_, None, None) => Contents::Other("data that is not understood".into()),
        }),
        // "Nothing found". An ambivalent probe (8) is an error: more than one signature is not blank.
        Some(2) if is_zero_at_both_ends(device).await? => Ok(Contents::Blank),
        Some(2) => Ok(Contents::Other("data without a known signature".into())),
        Some(8) => Ok(Contents::Other("signatures of several filesystems at once".into())),
        _ => Err(output.failure()),
    }
}

/// Makes a filesystem on a blank device, with Longhorn's defaults; refuses any other device. `extra` is appended to the arguments.
pub async fn format_blank(device: &Path, fs_type: &str, extra: &[String]) -> Result<(), DataplaneError> {
    let (program, defaults): (_, &[&str]) = match fs_type {
        "ext4" => ("mkfs.ext4", &["-b4096", "-q", "-m0"]),
        "xfs" => ("mkfs.xfs", &["-ssize=4096", "-bsize=4096", "-q"]),
        other => {
            return Err(DataplaneError::Unsupported {
                message: format!("cannot make a filesystem of type `{other}`; use ext4 or xfs"),
            });
        }
    };
    let found = match detect(device).await? {
        Contents::Blank => None,
        Contents::Filesystem(fs_type) => Some(format!("a filesystem ({fs_type})")),
        Contents::Other(what) => Some(what),
    };
    if let Some(what) = found {
        return Err(DataplaneError::NotBlank {
            message: format!("`{}` is not formatted as {fs_type}, because it holds {what}", device.display()),
        });
    }
    let mut args: Vec<String> = defaults.iter().map(|a| (*a).to_owned()).chain(extra.iter().cloned()).collect();
    args.push(device.display().to_string());
    run_ok(program, args, limits::FILESYSTEM_TIMEOUT).await.map(drop)
}

/// Grows a filesystem to its device before it is mounted (ext4: checked first, as the tool demands). Others are grown when mounted.
pub async fn grow_before_mount(device: &Path, fs_type: &str) -> Result<(), DataplaneError> {
    if !matches!(fs_type, "ext2" | "ext3" | "ext4") {
        return Ok(());
    }
    let (owned, size) = (device.to_owned(), stats::device_size(device)?);
    let used = tokio::task::spawn_blocking(move || ext_size(&owned)).await;
    let used = used.map_err(|e| DataplaneError::io("read a superblock", std::io::Error::other(e)))??;
    if size.saturating_sub(used) < EXT4_GROW_BYTES {
        return Ok(());
    }
    let check = run("e2fsck", ["-f".as_ref(), "-p".as_ref(), device.as_os_str()], limits::FILESYSTEM_TIMEOUT).await?;
    // 0: clean, 1: errors corrected. More needs a person.
    if !matches!(check.code, Some(0 | 1)) {
        return Err(check.failure());
    }
    run_ok("resize2fs", [device], limits::FILESYSTEM_TIMEOUT).await.map(drop)
}

/// Grows a filesystem to its device after it was mounted (xfs, btrfs); ext4 was grown before.
pub async fn grow_mounted(target: &Path, fs_type: &str) -> Result<(), DataplaneError> {
    match fs_type {
        "xfs" => run_ok("xfs_growfs", ["-d".as_ref(), target.as_os_str()], limits::FILESYSTEM_TIMEOUT).await.map(drop),
        "btrfs" => {
            let args = ["filesystem".as_ref(), "resize".as_ref(), "max".as_ref(), target.as_os_str()];
            run_ok("btrfs", args, limits::FILESYSTEM_TIMEOUT).await.map(drop)
        }
        _ => Ok(()),
    }
}

/// Bytes of an ext2/3/4, from its superblock.
fn ext_size(device: &Path) -> Result<u64, DataplaneError> {
    let failed = |e| DataplaneError::io(format!("read the superblock of `{}`", device.display()), e);
    let mut block = [0u8; 1024];
    let mut file = File::open(device).map_err(failed)?;
    file.seek(SeekFrom::Start(1024)).and_then(|_| file.read_exact(&mut block)).map_err(failed)?;
    let word = |at: usize| u64::from(u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]));
    // s_feature_incompat has the bit of 64-bit block numbers; only then is s_blocks_count_hi valid.
    let high = if word(0x60) & 0x80 != 0 { word(0x150) } else { 0 };
    Ok((high << 32 | word(0x4)).saturating_mul(1024u64 << word(0x18).min(6)))
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

    fn file(folder: &tempfile::TempDir, size: u64) -> std::path::PathBuf {
        let path = folder.path().join("disk");
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    #[tokio::test]
    async fn formats_only_what_is_blank_and_grows_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, 32 << 20);
        assert_eq!(detect(&path).await.unwrap(), Contents::Blank);
        format_blank(&path, "ext4", &[]).await.unwrap();
        assert_eq!(detect(&path).await.unwrap(), Contents::Filesystem("ext4".into()));
        let error = format_blank(&path, "xfs", &[]).await.unwrap_err();
        assert!(error.to_string().contains("holds a filesystem (ext4)"), "{error}");
        File::options().write(true).open(&path).unwrap().set_len(64 << 20).unwrap();
        grow_before_mount(&path, "ext4").await.unwrap();
        assert!(ext_size(&path).unwrap() > 60 << 20);
    }

    #[tokio::test]
    async fn bytes_without_a_signature_are_not_blank() {
        let folder = tempfile::tempdir().unwrap();
        for at in [100, (8 << 20) - 1] {
            let path = file(&folder, 8 << 20);
            File::options().write(true).open(&path).unwrap().write_at(b"x", at).unwrap();
            assert!(matches!(detect(&path).await.unwrap(), Contents::Other(_)));
            assert!(matches!(format_blank(&path, "ext4", &[]).await, Err(DataplaneError::NotBlank { .. })));
        }
    }
}
