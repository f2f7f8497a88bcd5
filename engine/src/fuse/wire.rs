//! FUSE messages as pure functions (protocol 7.40, `linux/fuse.h`).
//!
//! The settings were measured behind a loop device: asynchronous direct I/O, 128 requests in the background and 1 MiB per
//! request matter much.

use crate::limits;

pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const INTERRUPT: u32 = 36;
pub const DESTROY: u32 = 38;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;

const IN_HEADER: usize = 40;
/// Where the bytes of a write begin.
pub const WRITE_DATA: usize = 80;
/// Length of a reply's header; the bytes of a read follow it.
pub const OUT_HEADER: usize = 16;

/// Requests that the kernel keeps in flight.
const MAX_BACKGROUND: u16 = 128;
const BLOCK: u32 = 4096;
const NOTIFY_RESEND: i32 = 7;
/// Attributes never change while the volume is attached.
const VALID_SECONDS: u64 = 86_400;

/// A request that moves data or makes it durable; anything else is answered by [`answer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Read { offset: u64, length: u32 },
    Write { offset: u64, length: u32 },
    Flush,
    Zero { offset: u64, length: u64, allocate: bool },
    Other { opcode: u32 },
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The request in these bytes and the number that its reply carries; none when they are cut short.
pub fn parse(bytes: &[u8]) -> Option<(u64, Request)> {
    const PUNCH_HOLE: u32 = 2;
    const ZERO_RANGE: u32 = 0x10;
    let (opcode, unique) = (u32_at(bytes, 4)?, u64_at(bytes, 8)?);
    bytes.get(..IN_HEADER)?;
    let request = match opcode {
        READ => Request::Read { offset: u64_at(bytes, 48)?, length: u32_at(bytes, 56)? },
        WRITE => {
            let (offset, length) = (u64_at(bytes, 48)?, u32_at(bytes, 56)?);
            bytes.get(..WRITE_DATA + length as usize)?;
            Request::Write { offset, length }
        }
        FSYNC => Request::Flush,
        FALLOCATE => {
            let (offset, length, mode) = (u64_at(bytes, 48)?, u64_at(bytes, 56)?, u32_at(bytes, 64)?);
            // A punched hole must read as zeroes, so it is the same with another wish about space.
            match (mode & PUNCH_HOLE != 0, mode & ZERO_RANGE != 0) {
                (true, _) => Request::Zero { offset, length, allocate: false },
                (false, true) => Request::Zero { offset, length, allocate: true },
                (false, false) => Request::Other { opcode },
            }
        }
        _ => Request::Other { opcode },
    };
    Some((unique, request))
}

/// Fills in the header of a whole reply.
pub fn finish_reply(reply: &mut [u8], unique: u64) {
    let length = reply.len() as u32;
    reply[0..4].copy_from_slice(&length.to_ne_bytes());
    reply[4..8].fill(0);
    reply[8..16].copy_from_slice(&unique.to_ne_bytes());
}

/// A reply that is only an error number.
pub fn error_reply(unique: u64, errno: i32) -> [u8; OUT_HEADER] {
    let mut reply = [0; OUT_HEADER];
    finish_reply(&mut reply, unique);
    reply[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    reply
}

/// The reply to a write.
pub fn write_reply(unique: u64, length: u32) -> [u8; 24] {
    let mut reply = [0; 24];
    finish_reply(&mut reply, unique);
    reply[16..20].copy_from_slice(&length.to_ne_bytes());
    reply
}

/// Asks the kernel to queue again what a dead predecessor had read and not answered (kernel 6.9 and later).
pub fn resend_notification() -> [u8; OUT_HEADER] {
    let mut bytes = [0; OUT_HEADER];
    bytes[0..4].copy_from_slice(&(OUT_HEADER as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    bytes
}

/// The reply to a request that moves no data; none when the kernel expects none.
pub fn answer(request: &[u8], unique: u64, opcode: u32, size_bytes: u64) -> Option<Vec<u8>> {
    let mut reply = match opcode {
        INIT => init_reply(request),
        GETATTR => attributes_reply(size_bytes),
        SETATTR => match (u32_at(request, 40), u64_at(request, 56)) {
            (Some(valid), Some(size)) if valid & 8 != 0 && size != size_bytes => {
                return Some(error_reply(unique, libc::EPERM).to_vec());
            }
            _ => attributes_reply(size_bytes),
        },
        OPEN => open_reply(),
        STATFS => statfs_reply(size_bytes),
        RELEASE | FLUSH | DESTROY => vec![0; OUT_HEADER],
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        FALLOCATE => return Some(error_reply(unique, libc::EOPNOTSUPP).to_vec()),
        // Once for each opcode: the kernel does not ask again.
        _ => return Some(error_reply(unique, libc::ENOSYS).to_vec()),
    };
    finish_reply(&mut reply, unique);
    Some(reply)
}

const INIT_EXTENDED: u32 = 1 << 30;
const HAS_RESEND: u32 = 1 << (39 - 32);

/// The two words of features that the kernel offers in its first request.
fn offered(request: &[u8]) -> (u32, u32) {
    let offered = u32_at(request, IN_HEADER + 12).unwrap_or(0);
    let more = if offered & INIT_EXTENDED != 0 { u32_at(request, IN_HEADER + 16).unwrap_or(0) } else { 0 };
    (offered, more)
}

/// Whether the kernel of this first request (`INIT`) can repeat what was not answered: kernel 6.9 and later.
pub fn offers_resend(request: &[u8]) -> bool {
    offered(request).1 & HAS_RESEND != 0
}

fn init_reply(request: &[u8]) -> Vec<u8> {
    const ASYNC_READ: u32 = 1;
    const BIG_WRITES: u32 = 1 << 5;
    const ASYNC_DIRECT_IO: u32 = 1 << 15;
    const MAX_PAGES: u32 = 1 << 22;
    let (offered, offered_more) = offered(request);
    let flags = ASYNC_READ | BIG_WRITES | ASYNC_DIRECT_IO | MAX_PAGES | INIT_EXTENDED;
    let mut reply = vec![0; OUT_HEADER + 64];
    let body = &mut reply[OUT_HEADER..];
    body[0..4].copy_from_slice(&7u32.to_ne_bytes());
    body[4..8].copy_from_slice(&40u32.to_ne_bytes());
    body[8..12].copy_from_slice(&(limits::FUSE_MAX_IO as u32).to_ne_bytes());
    body[12..16].copy_from_slice(&(flags & offered).to_ne_bytes());
    body[16..18].copy_from_slice(&MAX_BACKGROUND.to_ne_bytes());
    body[18..20].copy_from_slice(&(MAX_BACKGROUND / 4 * 3).to_ne_bytes());
    body[20..24].copy_from_slice(&(limits::FUSE_MAX_IO as u32).to_ne_bytes());
    body[24..28].copy_from_slice(&1u32.to_ne_bytes());
    body[28..30].copy_from_slice(&((limits::FUSE_MAX_IO as u32 / BLOCK) as u16).to_ne_bytes());
    body[32..36].copy_from_slice(&(offered_more & HAS_RESEND).to_ne_bytes());
    reply
}

fn attributes_reply(size_bytes: u64) -> Vec<u8> {
    let mut reply = vec![0; OUT_HEADER + 104];
    let body = &mut reply[OUT_HEADER..];
    body[0..8].copy_from_slice(&VALID_SECONDS.to_ne_bytes());
    body[16..24].copy_from_slice(&1u64.to_ne_bytes()); // inode
    body[24..32].copy_from_slice(&size_bytes.to_ne_bytes());
    body[32..40].copy_from_slice(&size_bytes.div_ceil(512).to_ne_bytes());
    body[76..80].copy_from_slice(&(libc::S_IFREG | 0o600).to_ne_bytes());
    body[80..84].copy_from_slice(&1u32.to_ne_bytes()); // links
    body[96..100].copy_from_slice(&BLOCK.to_ne_bytes());
    reply
}

fn open_reply() -> Vec<u8> {
    // A second opener without O_DIRECT would otherwise fill a page cache that nobody invalidates.
    const DIRECT_IO: u32 = 1;
    const NO_FLUSH: u32 = 1 << 5;
    const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    let mut reply = vec![0; OUT_HEADER + 16];
    let flags = DIRECT_IO | NO_FLUSH | PARALLEL_DIRECT_WRITES;
    reply[OUT_HEADER + 8..OUT_HEADER + 12].copy_from_slice(&flags.to_ne_bytes());
    reply
}

/// The loop driver takes its discard granularity from the block size.
fn statfs_reply(size_bytes: u64) -> Vec<u8> {
    let mut reply = vec![0; OUT_HEADER + 80];
    let body = &mut reply[OUT_HEADER..];
    body[0..8].copy_from_slice(&(size_bytes / u64::from(BLOCK)).to_ne_bytes());
    body[40..44].copy_from_slice(&BLOCK.to_ne_bytes());
    body[44..48].copy_from_slice(&255u32.to_ne_bytes());
    body[48..52].copy_from_slice(&BLOCK.to_ne_bytes());
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, fields: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 128];
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&77u64.to_ne_bytes());
        for (at, field) in fields {
            bytes[*at..at + field.len()].copy_from_slice(field);
        }
        bytes
    }

    #[test]
    fn tells_discard_from_zeroing_only_by_the_wish_about_space() {
        for (mode, expected) in [
            (0x3u32, Request::Zero { offset: 4096, length: 8192, allocate: false }),
            (0x11, Request::Zero { offset: 4096, length: 8192, allocate: true }),
            (0, Request::Other { opcode: FALLOCATE }),
        ] {
            let fields: [(usize, &[u8]); 3] =
                [(48, &4096u64.to_ne_bytes()), (56, &8192u64.to_ne_bytes()), (64, &mode.to_ne_bytes())];
            assert_eq!(parse(&request(FALLOCATE, &fields)), Some((77, expected)));
        }
    }

    #[test]
    fn takes_no_write_that_is_cut_short() {
        let whole = request(WRITE, &[(56, &48u32.to_ne_bytes())]);
        assert_eq!(parse(&whole), Some((77, Request::Write { offset: 0, length: 48 })));
        assert_eq!(parse(&whole[..127]), None);
    }

    /// The kernel sends whole requests; whatever it sends, no byte is read that is not there.
    #[test]
    fn takes_no_request_that_is_cut_short() {
        for (opcode, whole) in
            [(READ, 60), (FALLOCATE, 68), (FSYNC, IN_HEADER), (GETATTR, IN_HEADER), (9999, IN_HEADER)]
        {
            let request = request(opcode, &[(64, &2u32.to_ne_bytes())]);
            assert!(parse(&request[..whole]).is_some_and(|(unique, _)| unique == 77), "{opcode}");
            for cut in 0..whole {
                assert_eq!(parse(&request[..cut]), None, "{opcode} with {cut} bytes");
            }
        }
        for opcode in [INIT, SETATTR] {
            for cut in IN_HEADER..128 {
                assert!(answer(&request(opcode, &[])[..cut], 77, opcode, 1 << 20).is_some());
            }
        }
    }

    #[test]
    fn takes_up_only_what_the_kernel_offers() {
        let word = |reply: &[u8], at: usize| u32_at(reply, OUT_HEADER + at).unwrap();
        let init = |flags: u32, more: u32| {
            let request = request(INIT, &[(52, &flags.to_ne_bytes()), (56, &more.to_ne_bytes())]);
            answer(&request, 77, INIT, 1 << 20).unwrap()
        };
        let reply = init(u32::MAX, u32::MAX);
        assert_eq!((word(&reply, 0), word(&reply, 4), u32_at(&reply, 0)), (7, 40, Some(reply.len() as u32)));
        // Asynchronous and direct, large, no cache of writes, no locks, no lazy unmount.
        assert_eq!((word(&reply, 12), word(&reply, 32)), (1 | 1 << 5 | 1 << 15 | 1 << 22 | 1 << 30, 1 << 7));
        // A request with its header fits a buffer.
        assert_eq!(word(&reply, 20) as usize, limits::FUSE_MAX_IO);
        assert_eq!(word(&reply, 28) as u16, (limits::FUSE_MAX_IO / 4096) as u16);
        let old = init(1 | 1 << 15, u32::MAX);
        assert_eq!((word(&old, 12), word(&old, 32)), (1 | 1 << 15, 0));
        let without_resend = init(u32::MAX, 0);
        assert_eq!(word(&without_resend, 32), 0);
    }

    #[test]
    fn answers_what_it_does_not_know_and_only_what_waits_for_an_answer() {
        let errno =
            |opcode| answer(&request(opcode, &[]), 77, opcode, 1 << 20).map(|reply| u32_at(&reply, 4).unwrap() as i32);
        for opcode in [FORGET, BATCH_FORGET, INTERRUPT] {
            assert_eq!(errno(opcode), None);
        }
        for opcode in [RELEASE, FLUSH, DESTROY, OPEN, STATFS, GETATTR] {
            assert_eq!(errno(opcode), Some(0));
        }
        assert_eq!(errno(FALLOCATE), Some(-libc::EOPNOTSUPP), "space is not promised");
        for opcode in [1, 3 + 1000, u32::MAX] {
            assert_eq!(errno(opcode), Some(-libc::ENOSYS));
        }
    }

    #[test]
    fn nothing_is_kept_by_the_kernel_for_a_second_opener() {
        let reply = answer(&request(OPEN, &[]), 77, OPEN, 1 << 20).unwrap();
        assert_eq!(u32_at(&reply, OUT_HEADER + 8).unwrap() & 1, 1, "direct I/O");
    }

    #[test]
    fn sees_whether_the_kernel_can_repeat_requests() {
        let init = |flags: u32, more: u32| {
            offers_resend(&request(INIT, &[(52, &flags.to_ne_bytes()), (56, &more.to_ne_bytes())]))
        };
        assert!(init(1 << 30, 1 << 7));
        assert!(
            !init(1 << 30, 0) && !init(0, 1 << 7),
            "the second word counts only when the first says that it is there"
        );
    }

    #[test]
    fn refuses_to_truncate_the_volume() {
        let truncate = request(SETATTR, &[(40, &8u32.to_ne_bytes()), (56, &0u64.to_ne_bytes())]);
        let reply = answer(&truncate, 77, SETATTR, 1 << 20).unwrap();
        assert_eq!(reply[4..8], (-libc::EPERM).to_ne_bytes());
    }
}
