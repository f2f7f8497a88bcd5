//! The kernel's interface of loop devices.
#![allow(unsafe_code, reason = "ioctl(2) has no safe face for loop devices")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Info {
    const EMPTY: Info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct Configuration {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// The number of a free device; another process may take it first.
pub(super) fn get_free(control: &File) -> io::Result<u32> {
    // SAFETY: this ioctl takes no argument; the descriptor is open.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Puts a file behind a device, in one step, with direct I/O. EBUSY: it has one already.
pub(super) fn configure(device: &File, backing: &File, name: &str) -> io::Result<()> {
    let mut info = Info { flags: LO_FLAGS_DIRECT_IO, ..Info::EMPTY };
    // The last byte stays zero.
    let kept = &name.as_bytes()[..name.len().min(info.file_name.len() - 1)];
    info.file_name[..kept.len()].copy_from_slice(kept);
    let configuration = Configuration { fd: backing.as_raw_fd() as u32, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: the structure has the layout of `struct loop_config`, lives across the call, and is only read by the kernel.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const configuration) })
}

/// What the kernel tells of the file behind a device.
pub(super) struct Behind {
    /// Its device, as stat(2) has it, and its inode.
    pub identity: (u64, u64),
    /// What [`configure`] was given.
    pub name: String,
}

/// ENXIO: there is no file behind it.
pub(super) fn status(device: &File) -> io::Result<Behind> {
    let mut info = Info::EMPTY;
    // SAFETY: the structure has the layout of `struct loop_info64` and is writable for the length of the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
    let name = info.file_name.split(|byte| *byte == 0).next().unwrap_or_default();
    // `huge_encode_dev` of the kernel is what stat(2) returns too.
    Ok(Behind { identity: (info.device, info.inode), name: String::from_utf8_lossy(name).into_owned() })
}

/// Takes the file away; the kernel does it when the last opener of the device goes.
pub(super) fn clear(device: &File) -> io::Result<()> {
    // SAFETY: the argument of this ioctl is ignored; the descriptor is open.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD, 0) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
