//! Notices within seconds that a disk is not what it was: unmounted, replaced, read-only, its file changed, its room gone.
//!
//! A glance is three system calls a disk and asks nobody else. Only when it differs from the last one, the disks are looked at: also
//! when one does not answer, or answers again.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::io::Errno;

use crate::disk_calls::Silent;
use crate::disks::CONFIG_FILE;
use crate::limits::GLANCE;
use crate::role::{Key, Role};

/// What a glance at a disk tells.
#[derive(Debug, PartialEq, Eq)]
struct Glance {
    /// The file that says which disk it is: device, inode, time, length; or why there is none.
    file: Result<(u64, u64, i64, i64, u64), Option<i32>>,
    filesystem: Result<Filesystem, Errno>,
}

#[derive(Debug, PartialEq, Eq)]
struct Filesystem {
    is_read_only: bool,
    /// Free space in hundredths of the disk: less is no news.
    free_percent: u64,
    has_room: bool,
}

/// Glances at the disks of this node until the role ends.
pub async fn run(role: Arc<Role>) {
    let mut before = BTreeMap::new();
    while role.cancelled.run_until_cancelled(tokio::time::sleep(GLANCE)).await.is_some() {
        let disks = role.state().disk_specs.clone();
        let glances = disks.into_iter().map(|(name, (path, reserved))| {
            let calls = &role.disk_calls;
            async move {
                let place = PathBuf::from(&path);
                (name, calls.ask(&place, move || Glance::at(&path, reserved)).await)
            }
        });
        let now: BTreeMap<String, Result<Glance, Silent>> =
            futures::future::join_all(glances).await.into_iter().collect();
        if now != before {
            role.queue.add(Key::Disks);
            before = now;
        }
    }
}

impl Glance {
    fn at(path: &str, reserved: u64) -> Glance {
        let path = Path::new(path);
        let file = path.join(CONFIG_FILE).symlink_metadata();
        let filesystem = statvfs(path).map(|found| {
            let (free, size) = (found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize);
            Filesystem {
                is_read_only: found.f_flag.contains(StatVfsMountFlags::RDONLY),
                free_percent: free / (size / 100).max(1),
                has_room: free > reserved,
            }
        });
        Glance {
            file: file.map(|f| (f.dev(), f.ino(), f.mtime(), f.mtime_nsec(), f.len())).map_err(|e| e.raw_os_error()),
            filesystem,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_glance_differs_when_the_disk_does() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk-1");
        let glance = |reserved| Glance::at(&disk.to_string_lossy(), reserved);
        let absent = glance(0);
        fs::create_dir(&disk).unwrap();
        let empty = glance(0);
        assert_ne!(absent, empty);
        let file = disk.join(CONFIG_FILE);
        fs::write(&file, "1").unwrap();
        let first = glance(0);
        assert_ne!(empty, first);
        assert_eq!(first, glance(0));
        assert_ne!(first, glance(u64::MAX), "nothing may be placed there any more");
        fs::write(&file, "22").unwrap();
        let longer = glance(0);
        assert_ne!(first, longer);
        // The same words in another file: another disk may be mounted there.
        fs::rename(&file, disk.join("old")).unwrap();
        fs::write(&file, "22").unwrap();
        assert_ne!(longer, glance(0));
    }
}
