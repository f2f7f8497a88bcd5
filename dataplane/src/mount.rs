//! Mounts: make, find and end them. The kernel's own list is the only truth.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::{DataplaneError, limits};

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor` of the filesystem, e.g. `7:3` for `/dev/loop3`.
    pub device: String,
    /// What of the filesystem is mounted: `/`, or a path within it for a bind mount.
    pub root: PathBuf,
    pub target: PathBuf,
    /// Options of the mount, e.g. `rw,noatime`.
    pub options: String,
    pub fs_type: String,
    pub source: String,
}

impl Mount {
    /// Whether this mount forbids writing.
    pub fn is_read_only(&self) -> bool {
        self.options.split(',').any(|o| o == "ro")
    }
}

/// Everything that is mounted in our namespace, in the order of mounting.
pub fn list() -> Result<Vec<Mount>, DataplaneError> {
    list_of(Path::new("/proc/self"))
}

/// Everything that is mounted in the namespace of another process (`/proc/<pid>`).
pub fn list_of(process: &Path) -> Result<Vec<Mount>, DataplaneError> {
    let text = fs::read(process.join("mountinfo")).map_err(|e| DataplaneError::io("read the list of mounts", e))?;
    Ok(parse(&text))
}

/// What is mounted on exactly this path: the topmost mount.
pub fn find(target: &Path) -> Result<Option<Mount>, DataplaneError> {
    let resolved = resolve(target);
    Ok(list()?.into_iter().rev().find(|m| m.target == resolved))
}

/// Whether something is mounted on exactly this path.
pub fn is_mounted(target: &Path) -> Result<bool, DataplaneError> {
    find(target).map(|m| m.is_some())
}

/// Mounts a filesystem. Options as of mount(8): flags are understood, the rest goes to the filesystem.
pub fn mount(source: &Path, target: &Path, fs_type: &str, options: &[String]) -> Result<(), DataplaneError> {
    let (flags, data) = split_options(options);
    let data = (!data.is_empty()).then(|| CString::new(data)).transpose();
    let data =
        data.map_err(|_| DataplaneError::Unsupported { message: "a mount option contains a zero byte".into() })?;
    rustix::mount::mount(source, target, fs_type, flags, data.as_deref()).map_err(|e| {
        let shown = if options.is_empty() { "no options".into() } else { format!("options {}", options.join(",")) };
        DataplaneError::io(
            format!("mount `{}` as {fs_type} on `{}` with {shown}", source.display(), target.display()),
            e,
        )
    })
}

/// Makes a file or directory visible at another path; `target` must exist and be of the same sort.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), DataplaneError> {
    let failed = |e| {
        DataplaneError::io(format!("bind `{}` to `{}`", source.display(), target.display()), std::io::Error::from(e))
    };
    rustix::mount::mount_bind(source, target).map_err(failed)?;
    if read_only {
        // The kernel ignores flags in the first step, so a second one is needed.
        let flags = MountFlags::BIND | MountFlags::RDONLY;
        if let Err(error) = rustix::mount::mount_remount(target, flags, c"") {
            let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
            return Err(failed(error));
        }
    }
    Ok(())
}

/// How far an unmount may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Busy is an error, after some patience.
    Orderly,
    /// Busy: taken out of sight now, ended by the kernel when the last user goes.
    ThenLazy,
}

/// Ends every mount on a path; nothing mounted is success.
pub async fn unmount(target: &Path, how: Unmount) -> Result<(), DataplaneError> {
    let started = std::time::Instant::now();
    // A path may carry several mounts, one over the other.
    while is_mounted(target)? {
        let flags = UnmountFlags::NOFOLLOW;
        match rustix::mount::unmount(target, flags) {
            Ok(()) => {}
            // "Not a mount point": the next look at the list decides, but never in an endless loop.
            Err(Errno::INVAL | Errno::NOENT) if started.elapsed() < limits::UNMOUNT_TIMEOUT => {
                tokio::time::sleep(limits::UNMOUNT_INTERVAL).await;
            }
            Err(Errno::BUSY) if started.elapsed() < limits::UNMOUNT_TIMEOUT => {
                tokio::time::sleep(limits::UNMOUNT_INTERVAL).await;
            }
            Err(Errno::BUSY) if how == Unmount::ThenLazy => {
                tracing::warn!(target = %target.display(), "mount is busy, detached lazily");
                unmount_lazily(target)?;
            }
            Err(Errno::BUSY) => {
                return Err(DataplaneError::Busy {
                    path: target.to_owned(),
                    users: "a process that has a file open or works in it".into(),
                });
            }
            // A dead FUSE connection cannot be looked into, but can be taken away.
            Err(Errno::NOTCONN) => unmount_lazily(target)?,
            Err(e) => return Err(DataplaneError::io(format!("unmount `{}`", target.display()), e)),
        }
    }
    Ok(())
}

/// Takes a mount out of sight at once, whatever uses it.
pub fn unmount_lazily(target: &Path) -> Result<(), DataplaneError> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(e) => Err(DataplaneError::io(format!("unmount `{}` lazily", target.display()), e)),
    }
}

/// The path as the kernel lists it. The last part is not followed: it may be a dead mount.
fn resolve(path: &Path) -> PathBuf {
    match (path.parent().and_then(|p| p.canonicalize().ok()), path.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

fn split_options(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data = vec![];
    for option in options.iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()) {
        match option {
            "defaults" | "rw" => {}
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "lazytime" => flags |= MountFlags::LAZYTIME,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    let mut fields = line.split(|b| *b == b' ');
    let mut text = || fields.next().map(unescape);
    let (_id, _parent) = (text()?, text()?);
    let (device, root, target, options) = (text()?, text()?, text()?, text()?);
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1).map(unescape);
    let lossy = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Some(Mount {
        device: lossy(device),
        root: PathBuf::from(std::ffi::OsString::from_vec(root)),
        target: PathBuf::from(std::ffi::OsString::from_vec(target)),
        options: lossy(options),
        fs_type: lossy(rest.next()?),
        source: lossy(rest.next()?),
    })
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(d) => {
                out.push(d.iter().fold(0u8, |n, b| n.wrapping_mul(8).wrapping_add(b - b'0')));
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mountinfo_with_escapes_and_optional_fields() {
        let text = b"36 35 98:0 /a /mnt\\040x rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                     37 35 7:3 / /b ro - fuse.x y\\134z rw\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!((mounts[0].target.to_str(), mounts[0].fs_type.as_str()), (Some("/mnt x"), "ext3"));
        assert!(!mounts[0].is_read_only());
        assert_eq!((mounts[1].device.as_str(), mounts[1].source.as_str()), ("7:3", "y\\z"));
        assert!(mounts[1].is_read_only());
    }

    #[test]
    fn tells_flags_from_filesystem_options() {
        let (flags, data) = split_options(&["ro,nouuid".into(), "noatime".into(), "discard".into()]);
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOATIME);
        assert_eq!(data, "nouuid,discard");
    }

    #[tokio::test]
    async fn binds_read_only_and_unmounts_in_layers() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir_all(&a).unwrap();
        fs::create_dir_all(&b).unwrap();
        fs::write(a.join("file"), "x").unwrap();
        bind(&a, &b, true).unwrap();
        let seen = find(&b).unwrap().unwrap();
        let write = fs::write(b.join("other"), "y");
        bind(&a, &b, false).unwrap();
        unmount(&b, Unmount::Orderly).await.unwrap();
        unmount(&b, Unmount::Orderly).await.unwrap();
        assert!(seen.is_read_only());
        assert!(write.is_err());
        assert!(!is_mounted(&b).unwrap());
        assert!(!b.join("file").exists());
    }
}
