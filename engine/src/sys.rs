//! The system calls that no safe wrapper of ours covers: taking over an inherited descriptor, signals as events, and a setting
//! of the allocator.
#![allow(unsafe_code, reason = "raw descriptors, signal masks, mallopt")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes over a descriptor that a parent passed on.
///
/// # Errors
/// When there is none of that number.
pub fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD on any number is harmless; it fails when the descriptor is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and its number was given to this process to own it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes freed buffers go back to the kernel. Otherwise glibc keeps memory of their size once the first one was freed.
pub fn map_large_allocations() {
    // SAFETY: it changes a number within the allocator. Elsewhere than with glibc there is nothing to change.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, crate::limits::MAPPED_ALLOCATION_BYTES as libc::c_int);
    }
}

/// Turns SIGTERM and SIGINT into events on a descriptor, for this thread and those it starts afterwards.
pub fn termination_events() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialized by sigemptyset before it is used, and lives through the calls.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        let error = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let number = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if number < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(number)) }
    }
}
