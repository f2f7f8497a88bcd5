//! What this machine's FUSE can do, asked of the kernel itself by a mount that lives for a moment.

use std::io;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{mount, wire};
use crate::limits;

/// Whether the kernel repeats requests that an engine took and did not answer, so that a next engine can go on.
///
/// `file` is made for it and removed. It blocks for a moment.
///
/// # Errors
/// When FUSE cannot be used at all.
pub fn repeats_requests(file: &Path) -> io::Result<bool> {
    mount::detach(file);
    std::fs::File::create(file)?;
    let asked = ask(file);
    mount::detach(file);
    std::fs::remove_file(file)?;
    asked
}

fn ask(file: &Path) -> io::Result<bool> {
    let device = mount::mount(file)?;
    let most = Timespec { tv_sec: limits::FUSE_PROBE.as_secs() as i64, tv_nsec: 0 };
    poll(&mut [PollFd::new(&device, PollFlags::IN)], Some(&most))?;
    let mut request = vec![0; limits::FUSE_MAX_IO + limits::FUSE_HEADER_ROOM];
    let count = rustix::io::read(&device, request.as_mut_slice())?;
    match wire::parse(&request[..count]) {
        Some((_, wire::Request::Other { opcode: wire::INIT })) => Ok(wire::offers_resend(&request[..count])),
        _ => Err(io::Error::other("the kernel began with another request than INIT")),
    }
}
