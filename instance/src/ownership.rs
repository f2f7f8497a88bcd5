//! Who may do what on a disk whose managers run without privileges.
//!
//! Managers and data sources write below `backing-images/` and `tmp/`, and see the root of the disk to find them. They see nothing of
//! `replicas/`, which holds the data of volumes. Everything goes by descriptors and follows no link: what lies in those directories may
//! have been put there by a manager that was taken over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Gid, Mode, OFlags, Uid, chownat, fchmod, fchown, fstat, mkdirat, openat};
use rustix::io::Errno;

/// What managers write.
const THEIRS: [&str; 2] = ["backing-images", "tmp"];
/// What they must not see.
const OURS: &str = "replicas";
/// Deeper than anything of ours lies; what lies deeper is nobody's.
const DEPTH: u32 = 4;

/// Prepares a disk for agents that run as this user and group. May be done at any time again; costs a few calls when all is well.
pub fn give(disk: &Path, id: u32) -> io::Result<()> {
    let root = OwnedFd::from(std::fs::File::open(disk)?);
    let mode = fstat(&root)?.st_mode;
    if mode & 0o001 == 0 {
        fchmod(&root, Mode::from_raw_mode(mode & 0o7777 | 0o001))?;
    }
    // Volumes' data is for the superuser, who runs the replicas.
    let ours = directory(&root, OURS, 0o700)?;
    if fstat(&ours)?.st_mode & 0o077 != 0 {
        fchmod(&ours, Mode::from_raw_mode(0o700))?;
    }
    for name in THEIRS {
        let theirs = directory(&root, name, 0o755)?;
        // The directory itself comes last, so its owner tells that all within was done.
        if fstat(&theirs)?.st_uid != id {
            give_all(&theirs, id, DEPTH)?;
            fchown(&theirs, Some(Uid::from_raw(id)), Some(Gid::from_raw(id)))?;
        }
    }
    Ok(())
}

/// A directory directly below another one; made when it is not there.
fn directory(parent: &OwnedFd, name: &str, mode: u32) -> io::Result<OwnedFd> {
    match mkdirat(parent, name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(open_directory(parent, name)?)
}

fn open_directory(parent: &OwnedFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn give_all(directory: &OwnedFd, id: u32, depth: u32) -> io::Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(id)), Some(Gid::from_raw(id)));
    for entry in Dir::read_from(directory.as_fd())? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match open_directory(directory, name) {
            Ok(inner) => {
                if depth > 0 {
                    give_all(&inner, id, depth - 1)?;
                }
                fchown(&inner, uid, gid)?;
            }
            // A file, or a link, of which only the link itself is given.
            Err(Errno::NOTDIR | Errno::LOOP) => chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?,
            // A manager works there at the same time.
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    const ID: u32 = 57_345;

    /// Only the superuser can give files away.
    fn may_not_give() -> bool {
        let missing = !rustix::process::geteuid().is_root();
        assert!(!missing || std::env::var_os("REQUIRE_REAL").is_none(), "run as root");
        missing
    }

    #[test]
    fn agents_own_what_they_write_and_see_nothing_else() {
        if may_not_give() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        fs::create_dir_all(disk.join("backing-images/ubuntu-0a1b2c3d")).unwrap();
        fs::write(disk.join("backing-images/ubuntu-0a1b2c3d/backing"), "x").unwrap();
        fs::create_dir(disk.join("replicas")).unwrap();
        fs::write(disk.join("secret"), "x").unwrap();
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o700)).unwrap();
        let deep = "backing-images/1/2/3/4/5/6";
        fs::create_dir_all(disk.join(deep)).unwrap();
        symlink("/etc/hostname", disk.join("backing-images/ubuntu-0a1b2c3d/link")).unwrap();
        symlink(&disk, disk.join("backing-images/loop")).unwrap();
        let of_host = fs::metadata("/etc/hostname").map(|m| m.uid()).ok();
        for _ in 0..2 {
            give(&disk, ID).unwrap();
        }
        let owner = |path: &str| fs::symlink_metadata(disk.join(path)).unwrap().uid();
        for path in
            ["tmp", "backing-images", "backing-images/ubuntu-0a1b2c3d", "backing-images/ubuntu-0a1b2c3d/backing"]
        {
            assert_eq!(owner(path), ID, "{path}");
        }
        for path in ["", "replicas", "secret", deep] {
            assert_eq!(owner(path), 0, "{path}");
        }
        assert_eq!(fs::metadata("/etc/hostname").map(|m| m.uid()).ok(), of_host, "no link was followed");
        let mode = |path: &str| fs::metadata(disk.join(path)).unwrap().mode() & 0o777;
        assert_eq!((mode(""), mode("replicas"), mode("tmp")), (0o701, 0o700, 0o755));
    }

    #[test]
    fn a_directory_that_is_a_link_is_not_taken() {
        if may_not_give() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("elsewhere")).unwrap();
        symlink(folder.path().join("elsewhere"), folder.path().join("tmp")).unwrap();
        assert!(give(folder.path(), ID).is_err());
        assert_eq!(fs::metadata(folder.path().join("elsewhere")).unwrap().uid(), 0);
    }
}
