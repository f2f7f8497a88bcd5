//! Loop devices with direct I/O: a file seen as a block device.
//!
//! A node must never touch another's device, so a device is recognized by device and inode of its file; where these cannot be asked
//! any more, by the file's whole path and a mark of the node: several nodes on one kernel may have the same paths, each in mounts of
//! its own.

mod ioctl;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::{DataplaneError, limits, mount};

/// An attached loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    /// `/dev/loop7`.
    pub path: PathBuf,
    /// The file behind it, as the kernel names it.
    pub backing_file: PathBuf,
    /// Whether it goes past the page cache.
    pub direct_io: bool,
}

impl LoopDevice {
    fn sys(&self) -> PathBuf {
        Path::new("/sys/block").join(self.path.file_name().unwrap_or_default())
    }
}

/// Who attaches devices: a mark that the kernel keeps with each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner(String);

impl Owner {
    /// Whoever has this directory, which stays the same as long as its devices are there.
    ///
    /// # Errors
    /// When the directory cannot be asked.
    pub fn of(directory: &Path) -> Result<Owner, DataplaneError> {
        let failed = |e| DataplaneError::io(format!("look at `{}`", directory.display()), e);
        let (device, inode) = identity(directory).map_err(failed)?;
        Ok(Owner(format!("backing-image-csi {device:x} {inode:x}")))
    }
}

/// All attached loop devices of this machine, whoever attached them.
pub fn list() -> Result<Vec<LoopDevice>, DataplaneError> {
    let entries = fs::read_dir("/sys/block").map_err(|e| DataplaneError::io("list `/sys/block`", e))?;
    let mut devices: Vec<LoopDevice> = entries.flatten().filter_map(|entry| read(&entry.path())).collect();
    devices.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(devices)
}

fn read(sys: &Path) -> Option<LoopDevice> {
    let name = sys.file_name()?.to_str()?.to_owned();
    let attribute = |file: &str| fs::read_to_string(sys.join("loop").join(file)).ok();
    // Without a backing file it is a free device.
    let backing_file = attribute("backing_file")?;
    let direct_io = attribute("dio").is_some_and(|t| t.trim() == "1");
    let backing_file = PathBuf::from(backing_file.strip_suffix('\n').unwrap_or(&backing_file));
    Some(LoopDevice { path: Path::new("/dev").join(name), backing_file, direct_io })
}

/// What is attached at `/dev/loopN` now; `None` when nothing is, or when it is another kind of device.
pub fn at(path: &Path) -> Option<LoopDevice> {
    read(&Path::new("/sys/block").join(path.file_name()?))
}

/// The device of a file: same device and inode; or, where the file is not there any more, same whole path and the mark of `owner`.
pub fn find(file: &Path, owner: &Owner) -> Result<Option<LoopDevice>, DataplaneError> {
    let wanted = identity(file).ok();
    for device in list()? {
        let behind = File::open(&device.path).ok().and_then(|f| ioctl::status(&f).ok());
        let same_file = match (wanted, behind) {
            (Some(wanted), Some(behind)) => wanted == behind.identity,
            (_, behind) => device.backing_file == file && behind.is_none_or(|behind| behind.name == owner.0),
        };
        if same_file {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// Device and inode of a file, as far as they are known without asking a filesystem: behind a FUSE file may be an engine that
/// does not answer, and whoever looks for its device wants to help with that rather than wait for it.
fn identity(file: &Path) -> io::Result<(u64, u64)> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};
    let found = statx(CWD, file, AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
    Ok((makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino))
}

/// Attaches a file with direct I/O; the device of the file when it has one already.
pub async fn attach(file: &Path, owner: &Owner) -> Result<LoopDevice, DataplaneError> {
    if let Some(device) = find(file, owner)? {
        return Ok(device);
    }
    let (file, owner) = (file.to_owned(), owner.clone());
    let attached = tokio::task::spawn_blocking(move || attach_blocking(&file, &owner)).await;
    attached.map_err(|e| DataplaneError::io("attach a loop device", io::Error::other(e)))?
}

fn attach_blocking(file: &Path, owner: &Owner) -> Result<LoopDevice, DataplaneError> {
    let failed = |e: io::Error| DataplaneError::io(format!("attach a loop device to `{}`", file.display()), e);
    let backing = OpenOptions::new().read(true).write(true).open(file).map_err(failed)?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").map_err(|e| {
        DataplaneError::io("open `/dev/loop-control`; is the kernel module `loop` loaded, and are we root?", e)
    })?;
    for _ in 0..limits::LOOP_ATTACH_ATTEMPTS {
        let number = ioctl::get_free(&control).map_err(failed)?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(device) => device,
            // No devtmpfs, as in a container: make the node ourselves.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                make_node(&path, number).map_err(failed)?;
                continue;
            }
            Err(e) => return Err(failed(e)),
        };
        match ioctl::configure(&device, &backing, &owner.0) {
            Ok(()) => {
                let sys = Path::new("/sys/block").join(format!("loop{number}"));
                let attached =
                    read(&sys).ok_or_else(|| failed(io::Error::other("the device was taken away at once")))?;
                if !attached.direct_io {
                    tracing::warn!(device = %path.display(), "loop device without direct I/O");
                }
                return Ok(attached);
            }
            // Somebody else was faster.
            Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Err(failed(io::Error::other("others took every free loop device")))
}

fn make_node(path: &Path, number: u32) -> io::Result<()> {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    match mknodat(CWD, path, FileType::BlockDevice, Mode::from_raw_mode(0o660), makedev(7, number)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Detaches a device and waits until it is gone. Refused while somebody uses it, because the kernel would only do it later.
pub async fn detach(device: &LoopDevice) -> Result<(), DataplaneError> {
    let started = tokio::time::Instant::now();
    let mut asked = false;
    // The device may have gone and come back with another file: that one is not ours to touch.
    while read(&device.sys()).is_some_and(|now| now.backing_file == device.backing_file) {
        let users = users(device)?;
        let patience = started.elapsed() < limits::LOOP_DETACH_TIMEOUT;
        if users.is_empty() && !asked {
            let failed = |e| DataplaneError::io(format!("detach `{}`", device.path.display()), e);
            let file = File::open(&device.path).map_err(failed)?;
            match ioctl::clear(&file) {
                Ok(()) => asked = true,
                Err(e) if e.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) && patience => {}
                Err(e) => return Err(failed(e)),
            }
        } else if !patience {
            let users = if users.is_empty() { vec!["the kernel".to_owned()] } else { users };
            return Err(DataplaneError::Busy { path: device.path.clone(), users: users.join(", ") });
        } else if users.iter().any(|u| u.starts_with("the mount")) {
            // A mount does not go by itself within moments, unlike a short look by udev or blkid.
            return Err(DataplaneError::Busy { path: device.path.clone(), users: users.join(", ") });
        }
        tokio::time::sleep(limits::LOOP_DETACH_INTERVAL).await;
    }
    Ok(())
}

/// Who uses a device: mounts, devices above it, processes that have it open. Phrases for a message.
pub fn users(device: &LoopDevice) -> Result<Vec<String>, DataplaneError> {
    let mut users = vec![];
    let number = fs::read_to_string(device.sys().join("dev")).unwrap_or_default();
    let is_of_it = |m: &mount::Mount| m.device == number.trim() || is_same_node(m, &device.path);
    for mounted in mount::list()?.into_iter().filter(is_of_it) {
        users.push(format!("the mount on `{}`", mounted.target.display()));
    }
    for holder in fs::read_dir(device.sys().join("holders")).into_iter().flatten().flatten() {
        users.push(format!("the device `{}`", holder.file_name().to_string_lossy()));
    }
    // Each namespace of mounts once; ours stands above.
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    let mut seen: BTreeSet<Option<PathBuf>> = BTreeSet::from([namespace(Path::new("/proc/self"))]);
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let who = || {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            format!("process {} ({})", process.file_name().to_string_lossy(), command.trim())
        };
        if process.path().join("mountinfo").exists() && seen.insert(namespace(&process.path())) {
            let mounts = mount::list_of(&process.path()).unwrap_or_default();
            users.extend(mounts.into_iter().find(is_of_it).map(|m| {
                format!("the mount on `{}` in another mount namespace, that of {}", m.target.display(), who())
            }));
        }
        let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let mut links = descriptors.filter_map(|d| fs::read_link(d.path()).ok());
        if links.any(|link| link == device.path) {
            users.push(who());
        }
    }
    Ok(users)
}

/// A device node that is bound to another path (a block volume) is a mount of devtmpfs whose root is the node.
fn is_same_node(mounted: &mount::Mount, device: &Path) -> bool {
    mounted.fs_type == "devtmpfs"
        && mounted.root.as_os_str().len() > 1
        && mounted.root.file_name() == device.file_name()
        && mounted.target != Path::new("/dev")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &tempfile::TempDir) -> PathBuf {
        let path = folder.path().join("disk");
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        path
    }

    fn owner(folder: &tempfile::TempDir) -> Owner {
        Owner::of(folder.path()).unwrap()
    }

    #[test]
    fn a_device_of_another_node_with_the_same_paths_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own/disk");
        fs::create_dir(folder.path().join("own")).unwrap();
        // Another node has mounts of its own; it lives as long as its input.
        let script = "mount -t tmpfs none $0/own && truncate -s 1M $0/own/disk && losetup -f --show $0/own/disk; read end; losetup -d $(losetup -n -O NAME -j $0/own/disk)";
        let other = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script])
            .arg(folder.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn();
        let mut other = other.unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(other.stdout.take().unwrap()), &mut line).unwrap();
        let theirs = at(Path::new(line.trim()));
        let found = find(&path, &owner(&folder));
        drop(other.stdin.take());
        other.wait().unwrap();
        assert_eq!(theirs.map(|device| device.backing_file), Some(path), "the same path: {line}");
        assert_eq!(found.unwrap(), None);
    }

    #[tokio::test]
    async fn attaches_once_finds_by_file_and_detaches() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder);
        let device = attach(&path, &owner(&folder)).await.unwrap();
        let again = attach(&path, &owner(&folder)).await.unwrap();
        let found = find(&path, &owner(&folder)).unwrap();
        detach(&device).await.unwrap();
        detach(&device).await.unwrap();
        assert_eq!(device, again);
        assert!(device.direct_io);
        assert_eq!(found, Some(device));
        assert_eq!(find(&path, &owner(&folder)).unwrap(), None);
    }

    /// A FUSE file whose server never answers; taken away also when a test fails.
    struct Unanswered {
        file: PathBuf,
        _server: rustix::fd::OwnedFd,
    }

    impl Drop for Unanswered {
        fn drop(&mut self) {
            // The abort lets go whoever waits.
            let flags = rustix::mount::UnmountFlags::FORCE | rustix::mount::UnmountFlags::DETACH;
            let _ = rustix::mount::unmount(&self.file, flags);
        }
    }

    #[test]
    fn looking_for_a_device_does_not_wait_for_an_engine_that_does_not_answer() {
        use std::os::fd::AsRawFd;
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder);
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        let server = rustix::fs::open("/dev/fuse", flags, rustix::fs::Mode::empty()).unwrap();
        let options = format!("fd={},rootmode=100000,user_id=0,group_id=0", server.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("test", &path, "fuse", none, options.as_c_str()).unwrap();
        let unanswered = Unanswered { file: path.clone(), _server: server };
        let owner = owner(&folder);
        let (sender, found) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(find(&path, &owner)));
        let found = found.recv_timeout(std::time::Duration::from_secs(10));
        drop(unanswered);
        assert_eq!(found.expect("it waits for the server").unwrap(), None);
    }

    #[tokio::test]
    async fn refuses_to_detach_a_mounted_device_and_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder);
        let target = folder.path().join("mount");
        fs::create_dir(&target).unwrap();
        let device = attach(&path, &owner(&folder)).await.unwrap();
        let new = crate::filesystem::New { fs_type: "ext4", uuid: "5f1c1b2e-0000-4000-8000-00000000abcd", extra: &[] };
        let made = crate::filesystem::format(&device.path, &new, false).await;
        let mounted = mount::mount(&device.path, &target, "ext4", &[]);
        let refused = detach(&device).await;
        let ended = mount::unmount(&target, mount::Unmount::Orderly).await;
        detach(&device).await.unwrap();
        made.unwrap();
        mounted.unwrap();
        ended.unwrap();
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("the mount on") && refused.contains("/mount"), "{refused}");
    }

    #[tokio::test]
    async fn a_mount_in_another_namespace_is_named_with_its_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder);
        let target = folder.path().join("mount");
        fs::create_dir(&target).unwrap();
        let device = attach(&path, &owner(&folder)).await.unwrap();
        let new = crate::filesystem::New { fs_type: "ext4", uuid: "5f1c1b2e-0000-4000-8000-00000000abce", extra: &[] };
        crate::filesystem::format(&device.path, &new, false).await.unwrap();
        mount::mount(&device.path, &target, "ext4", &[]).unwrap();
        // As a container that is started meanwhile; it lives as long as its input.
        let other = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", "echo; read end"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn();
        let mut other = other.unwrap();
        let mut line = [0];
        io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut line).unwrap();
        mount::unmount(&target, mount::Unmount::Orderly).await.unwrap();
        let refused = detach(&device).await;
        drop(other.stdin.take());
        other.wait().unwrap();
        detach(&device).await.unwrap();
        let refused = refused.unwrap_err().to_string();
        let process = format!("in another mount namespace, that of process {} (sh)", other.id());
        assert!(refused.contains(&process), "{refused}");
    }
}
