//! Opening `/dev/fuse`, mounting, unmounting.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Opens a FUSE connection and mounts it on a file; requests come when the descriptor is read, which does not block.
pub fn mount(file: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
    let options = format!("fd={},rootmode=100000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = CString::new(options)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    rustix::mount::mount("backing-image-engine", file, "fuse", flags, options.as_c_str())?;
    Ok(device)
}

/// Unmounts when nobody has the file open. Tells whether it is unmounted now; not to be so means that it is in use.
///
/// # Errors
/// Also when it is not mounted there: somebody may have detached it while it is in use, so that nothing can be told.
pub fn unmount_if_unused(file: &Path) -> io::Result<bool> {
    match rustix::mount::unmount(file, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOENT) => Err(io::Error::other(
            "it is not mounted there any more; the engine ends by itself when nobody has the volume open",
        )),
        Err(Errno::BUSY) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Ends the connection: everything that waits or comes fails at once. Then takes the mount away, unless it is in use.
///
/// What is in use stays, dead: whoever cleans up finds the loop device by its file, and a file that was detached from its path
/// is found by nobody. The device would stay for ever, and its users would not be seen when the volume is attached again.
pub fn abort(file: &Path) {
    let _ = rustix::mount::unmount(file, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW);
}

/// Takes away what earlier engines left mounted on the file, also when it is in use.
pub fn detach(file: &Path) {
    while rustix::mount::unmount(file, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}
