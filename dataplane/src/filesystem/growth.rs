//! Growing a filesystem to its device: ext2/3/4 before or after it is mounted, others by the kernel when they are mounted.
//!
//! What changes a filesystem from outside has no time limit, and goes on when nobody waits for it any more (see [`run_to_end`]).
//! Whoever comes meanwhile is told so. A filesystem that cannot grow is as good as it was, unless its checker says otherwise.

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::{read_at, was_mounted};
use crate::process::{Output, run_to_end};
use crate::{DataplaneError, mount, stats};

/// An ext4 that is this much smaller than its device is grown; less is the remainder that it cannot use.
const EXT4_GROW_BYTES: u64 = 1 << 20;
/// The exit status of `e2fsck` is a sum of bits: errors were corrected, and "reboot", which is about a root filesystem.
const E2FSCK_CORRECTED: i32 = 1 | 2;
/// Errors are left.
pub(super) const E2FSCK_ERRORS_LEFT: i32 = 4;
/// It could not do its work.
pub(super) const E2FSCK_FAILED: i32 = 8;
/// How it ends when it is older than the filesystem.
const E2FSCK_TOO_OLD: &str = "Get a newer version of e2fsck";

/// What `e2fsck` found.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Sound,
    Damaged,
    /// It does not know some feature: nothing is said against the filesystem.
    NotUnderstood,
    /// It could not tell.
    Failed,
}

impl Verdict {
    fn of(check: &Output) -> Verdict {
        match check.code {
            Some(code) if code & E2FSCK_ERRORS_LEFT != 0 => Verdict::Damaged,
            Some(code) if code & !E2FSCK_CORRECTED == 0 => Verdict::Sound,
            Some(E2FSCK_FAILED) if check.stderr.contains(E2FSCK_TOO_OLD) => Verdict::NotUnderstood,
            _ => Verdict::Failed,
        }
    }
}

/// Grows a filesystem to its device before it is mounted (ext4: checked first, as the tool demands). Others are grown when mounted.
///
/// A loss of power within this may leave what only a person can repair (docs/decisions/0007): see [`kernel_grows_ext`].
///
/// # Errors
/// `NotGrown` when the filesystem is whole and stays as it is; it may be mounted. `Damaged`: it must not.
pub async fn grow_before_mount(device: &Path, fs_type: &str) -> Result<(), DataplaneError> {
    if !is_sound_and_smaller(device, fs_type).await? {
        return Ok(());
    }
    let grown = run_to_end("resize2fs", [device]).await?;
    if grown.code == Some(0) {
        return Ok(());
    }
    // Mostly it refuses before it writes anything.
    let check = run_to_end("e2fsck", ["-f".as_ref(), "-n".as_ref(), device.as_os_str()]).await?;
    match Verdict::of(&check) {
        Verdict::Sound => Err(not_grown(device, &grown)?),
        _ => Err(damaged(device, &grown)),
    }
}

/// Whether this is an ext2/3/4 that is to be grown. Checked first: one that is damaged is refused.
///
/// # Errors
/// As [`grow_before_mount`]; `StillGrowing` while a program works on it.
pub async fn is_sound_and_smaller(device: &Path, fs_type: &str) -> Result<bool, DataplaneError> {
    if !is_ext(fs_type) || !is_smaller_ext(device).await? {
        return Ok(false);
    }
    check_free(device)?;
    let check = run_to_end("e2fsck", ["-f".as_ref(), "-p".as_ref(), device.as_os_str()]).await?;
    match Verdict::of(&check) {
        Verdict::Sound => Ok(true),
        // More needs a person.
        Verdict::Damaged => Err(damaged(device, &check)),
        Verdict::NotUnderstood => Err(not_grown(device, &check)?),
        Verdict::Failed => Err(check.failure()),
    }
}

/// Whoever used a filesystem must get it back as it was. One that nobody has ever used has nothing to lose: its size is wrong.
fn not_grown(device: &Path, said: &Output) -> Result<DataplaneError, DataplaneError> {
    if !was_mounted(device, "ext4")? {
        return Ok(said.failure());
    }
    Ok(DataplaneError::NotGrown { device: device.to_owned(), said: said.failure().to_string() })
}

fn damaged(device: &Path, said: &Output) -> DataplaneError {
    DataplaneError::Damaged { device: device.to_owned(), said: said.failure().to_string() }
}

/// Refused while a program has the device for itself: a growth of before may go on after the process that began it has ended.
/// Mounted somewhere it is not free either; that is for `e2fsck` to say.
fn check_free(device: &Path) -> Result<(), DataplaneError> {
    let alone = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
    let is_busy = alone.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY));
    if !is_busy || is_mounted(device)? {
        return Ok(());
    }
    Err(DataplaneError::StillGrowing { device: device.to_owned() })
}

fn is_mounted(device: &Path) -> Result<bool, DataplaneError> {
    let found = device.metadata().map_err(|e| DataplaneError::io(format!("look at `{}`", device.display()), e))?;
    let number = format!("{}:{}", rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    Ok(mount::list()?.iter().any(|mount| mount.device == number))
}

fn is_ext(fs_type: &str) -> bool {
    matches!(fs_type, "ext2" | "ext3" | "ext4")
}

/// Whether the kernel may let this process grow a mounted ext4 (CAP_SYS_RESOURCE). Its journal covers that, so a loss of power in the
/// middle leaves a whole filesystem.
pub fn kernel_grows_ext() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0);
    effective >> CAP_SYS_RESOURCE & 1 == 1
}

/// Whether an ext2/3/4 has so much less than its device that it is worth to be grown.
async fn is_smaller_ext(device: &Path) -> Result<bool, DataplaneError> {
    let (owned, size) = (device.to_owned(), stats::device_size(device)?);
    let used = tokio::task::spawn_blocking(move || ext_size(&owned)).await;
    let used = used.map_err(|e| DataplaneError::io("read a superblock", std::io::Error::other(e)))??;
    Ok(size.saturating_sub(used) >= EXT4_GROW_BYTES)
}

/// Grows a filesystem to its device under its users; an ext4 only as [`kernel_grows_ext`] says.
pub async fn grow_while_mounted(device: &Path, target: &Path, fs_type: &str) -> Result<(), DataplaneError> {
    match fs_type {
        ext if is_ext(ext) && !is_smaller_ext(device).await? => Ok(()),
        ext if is_ext(ext) => succeeded(run_to_end("resize2fs", [device]).await?),
        _ => grow_mounted(target, fs_type).await,
    }
}

/// Grows a filesystem to its device after it was mounted (xfs, btrfs); ext4 was grown before.
pub async fn grow_mounted(target: &Path, fs_type: &str) -> Result<(), DataplaneError> {
    match fs_type {
        "xfs" => succeeded(run_to_end("xfs_growfs", ["-d".as_ref(), target.as_os_str()]).await?),
        "btrfs" => {
            let args = ["filesystem".as_ref(), "resize".as_ref(), "max".as_ref(), target.as_os_str()];
            succeeded(run_to_end("btrfs", args).await?)
        }
        _ => Ok(()),
    }
}

fn succeeded(output: Output) -> Result<(), DataplaneError> {
    if output.code == Some(0) { Ok(()) } else { Err(output.failure()) }
}

/// Bytes of an ext2/3/4, from its superblock.
fn ext_size(device: &Path) -> Result<u64, DataplaneError> {
    let block = read_at(device, 1024, 1024)?;
    let word = |at: usize| u64::from(u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]));
    // s_feature_incompat has the bit of 64-bit block numbers; only then is s_blocks_count_hi valid.
    let high = if word(0x60) & 0x80 != 0 { word(0x150) } else { 0 };
    Ok((high << 32 | word(0x4)).saturating_mul(1024u64 << word(0x18).min(6)))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::PathBuf;
    use std::time::Duration;

    use super::super::{New, format};
    use super::*;
    use crate::process::run_ok;

    const UUID: &str = "5f1c1b2e-0000-4000-8000-00000000abcd";

    /// An ext4 of 320 MiB on a device of 640; `extra` are arguments of mkfs.
    async fn smaller(folder: &tempfile::TempDir, extra: &[&str]) -> PathBuf {
        let path = folder.path().join("disk");
        File::create(&path).unwrap().set_len(320 << 20).unwrap();
        let extra: Vec<String> = extra.iter().map(|a| (*a).to_owned()).collect();
        format(&path, &New { fs_type: "ext4", uuid: UUID, extra: &extra }, false).await.unwrap();
        File::options().write(true).open(&path).unwrap().set_len(640 << 20).unwrap();
        path
    }

    async fn debugfs(path: &Path, request: &str) {
        let args = ["-w".as_ref(), "-R".as_ref(), request.as_ref(), path.as_os_str()];
        run_ok("debugfs", args, Duration::from_secs(60)).await.unwrap();
    }

    #[test]
    fn the_exit_status_of_the_checker_is_a_sum_of_bits() {
        let check = |code, stderr: &str| {
            let (stdout, stderr, command) = (String::new(), stderr.to_owned(), String::new());
            Verdict::of(&Output { code, stdout, stderr, command })
        };
        for code in [0, 1, 2, 3] {
            assert_eq!(check(Some(code), ""), Verdict::Sound, "{code}");
        }
        for code in [4, 5, 6, 7, 12, 13, 4 | 32, 4 | 128] {
            assert_eq!(check(Some(code), ""), Verdict::Damaged, "{code}");
        }
        for code in [Some(8), Some(9), Some(16), Some(32), Some(33), Some(128), None] {
            assert_eq!(check(code, ""), Verdict::Failed, "{code:?}");
        }
        assert_eq!(check(Some(8), "e2fsck: Get a newer version of e2fsck!"), Verdict::NotUnderstood);
        assert_eq!(check(Some(12), "e2fsck: Get a newer version of e2fsck!"), Verdict::Damaged);
    }

    #[tokio::test]
    async fn an_ext4_grows_to_its_device() {
        let folder = tempfile::tempdir().unwrap();
        let path = smaller(&folder, &[]).await;
        grow_before_mount(&path, "ext4").await.unwrap();
        assert!(ext_size(&path).unwrap() > 600 << 20);
        assert!(!is_sound_and_smaller(&path, "ext4").await.unwrap());
    }

    /// `resize2fs` refuses this feature, `e2fsck` the unknown one.
    #[tokio::test]
    async fn what_cannot_grow_is_as_it_was_if_it_was_ever_used() {
        let folder = tempfile::tempdir().unwrap();
        let bigalloc: &[&str] = &["-Obigalloc"];
        for (extra, unknown, said) in [(bigalloc, false, "resize2fs"), (&[], true, "newer version of e2fsck")] {
            for used in [false, true] {
                let path = smaller(&folder, extra).await;
                if used {
                    debugfs(&path, "set_super_value mtime 20260101000000").await;
                }
                if unknown {
                    debugfs(&path, "feature FEATURE_I30").await;
                }
                let error = grow_before_mount(&path, "ext4").await.unwrap_err();
                assert!(error.to_string().contains(said), "{error}");
                assert_eq!(matches!(error, DataplaneError::NotGrown { .. }), used, "{error}");
                assert!(ext_size(&path).unwrap() < 330 << 20);
            }
        }
    }
}
