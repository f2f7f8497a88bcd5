//! NBD messages as pure functions: fixed newstyle, simple replies.
//!
//! Everything that comes from the other side is bounded before it is used; nothing here panics on any input.

use crate::core::{Failure, Operation};

pub const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags of both sides.
pub const FIXED_NEWSTYLE: u16 = 1;
pub const NO_ZEROES: u16 = 2;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub const REP_ERR_INVALID: u32 = 0x8000_0003;
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags.
pub const HAS_FLAGS: u16 = 1;
pub const READ_ONLY: u16 = 2;
pub const SEND_FLUSH: u16 = 4;
pub const SEND_TRIM: u16 = 32;
pub const SEND_WRITE_ZEROES: u16 = 64;
pub const CAN_MULTI_CONN: u16 = 256;

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Command flag: write-zeroes keeps the space allocated.
pub const NO_HOLE: u16 = 2;

pub const REQUEST_LENGTH: usize = 28;
pub const REPLY_LENGTH: usize = 16;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// A request as it goes over the wire, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl Request {
    pub fn encode(&self) -> [u8; REQUEST_LENGTH] {
        let mut bytes = [0; REQUEST_LENGTH];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// The first request in these bytes; none when they are too few or do not begin with the magic number.
    ///
    /// ```
    /// use backing_image_engine::nbd::wire::{CMD_READ, Request};
    /// let request = Request { flags: 0, command: CMD_READ, cookie: 7, offset: 4096, length: 512 };
    /// assert_eq!(Request::parse(&request.encode()), Some(request));
    /// assert_eq!(Request::parse(b"too short"), None);
    /// ```
    pub fn parse(bytes: &[u8]) -> Option<Request> {
        if u32_at(bytes, 0)? != REQUEST_MAGIC {
            return None;
        }
        Some(Request {
            flags: u16_at(bytes, 4)?,
            command: u16_at(bytes, 6)?,
            cookie: u64_at(bytes, 8)?,
            offset: u64_at(bytes, 16)?,
            length: u32_at(bytes, 24)?,
        })
    }
}

/// How an operation is asked of a replica.
///
/// A hole must read as zeroes, which NBD's trim does not promise, so a discard is write-zeroes as well.
pub fn command(operation: Operation) -> (u16, u16) {
    match operation {
        Operation::Read => (CMD_READ, 0),
        Operation::Write => (CMD_WRITE, 0),
        Operation::Flush => (CMD_FLUSH, 0),
        Operation::Zero { allocate: false } => (CMD_WRITE_ZEROES, 0),
        Operation::Zero { allocate: true } => (CMD_WRITE_ZEROES, NO_HOLE),
    }
}

/// A simple reply's header.
pub fn encode_reply(cookie: u64, error: u32) -> [u8; REPLY_LENGTH] {
    let mut bytes = [0; REPLY_LENGTH];
    bytes[0..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Error and cookie of a simple reply; none when it is none.
pub fn parse_reply(bytes: &[u8]) -> Option<(u32, u64)> {
    if u32_at(bytes, 0)? != REPLY_MAGIC {
        return None;
    }
    Some((u32_at(bytes, 4)?, u64_at(bytes, 8)?))
}

/// What an NBD error number of a replica means.
pub fn failure(error: u32) -> Option<Failure> {
    match error {
        0 => None,
        28 => Some(Failure::NoSpace),
        _ => Some(Failure::Io),
    }
}

/// The NBD error number for a client.
pub fn error_number(failure: Failure) -> u32 {
    match failure {
        Failure::Io => 5,
        Failure::Invalid => 22,
        Failure::NoSpace => 28,
    }
}

/// A client's answer to the greeting, and its request to open an export.
pub fn encode_go(export: &str) -> Vec<u8> {
    let mut bytes = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(OPT_GO.to_be_bytes());
    bytes.extend((export.len() as u32 + 6).to_be_bytes());
    bytes.extend((export.len() as u32).to_be_bytes());
    bytes.extend(export.as_bytes());
    // No further information is asked for.
    bytes.extend(0u16.to_be_bytes());
    bytes
}

/// Whether a server's 18 bytes of greeting are those of fixed newstyle.
pub fn is_greeting(bytes: &[u8; 18]) -> bool {
    u64_at(bytes, 0) == Some(MAGIC)
        && u64_at(bytes, 8) == Some(OPTION_MAGIC)
        && u16_at(bytes, 16).is_some_and(|flags| flags & FIXED_NEWSTYLE != 0)
}

/// An option reply's header: option, kind and length of what follows.
pub fn parse_option_reply(bytes: &[u8; 20]) -> Option<(u32, u32, usize)> {
    if u64_at(bytes, 0)? != OPTION_REPLY_MAGIC {
        return None;
    }
    Some((u32_at(bytes, 8)?, u32_at(bytes, 12)?, u32_at(bytes, 16)? as usize))
}

/// Size and flags from an information reply; none when it carries something else.
pub fn parse_export_info(bytes: &[u8]) -> Option<(u64, u16)> {
    if u16_at(bytes, 0)? != INFO_EXPORT {
        return None;
    }
    Some((u64_at(bytes, 2)?, u16_at(bytes, 10)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_nothing_without_its_magic_number() {
        let request = Request { flags: 0, command: CMD_READ, cookie: 7, offset: 4096, length: 512 }.encode();
        let reply = encode_reply(7, 0);
        let mut option_reply = [0; 20];
        option_reply[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        let mut greeting = [0; 18];
        greeting[..8].copy_from_slice(&MAGIC.to_be_bytes());
        greeting[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        greeting[17] = 1;
        let taken = |request: &[u8], reply: &[u8], option_reply: &[u8; 20], greeting: &[u8; 18]| {
            let one = (Request::parse(request).is_some(), parse_reply(reply).is_some());
            (one, parse_option_reply(option_reply).is_some(), is_greeting(greeting))
        };
        assert_eq!(taken(&request, &reply, &option_reply, &greeting), ((true, true), true, true));
        for at in 0..16 {
            let (mut request, mut reply, mut option_reply, mut greeting) = (request, reply, option_reply, greeting);
            request[at % 4] ^= 1;
            reply[at % 4] ^= 1;
            option_reply[at % 8] ^= 1;
            greeting[at] ^= 1;
            assert_eq!(taken(&request, &reply, &option_reply, &greeting), ((false, false), false, false), "{at}");
        }
        greeting[17] = NO_ZEROES as u8;
        assert!(!is_greeting(&greeting), "a server of the old style ends the handshake otherwise");
    }

    /// A trim would leave replicas with different bytes; `NO_HOLE` is what keeps a full disk from failing a later write.
    #[test]
    fn asks_for_zeroes_that_read_as_zeroes_everywhere() {
        assert_eq!(command(Operation::Zero { allocate: false }), (CMD_WRITE_ZEROES, 0));
        assert_eq!(command(Operation::Zero { allocate: true }), (CMD_WRITE_ZEROES, NO_HOLE));
        assert_eq!(command(Operation::Flush), (CMD_FLUSH, 0));
    }

    #[test]
    fn only_zero_is_success() {
        assert_eq!((failure(0), failure(28)), (None, Some(Failure::NoSpace)));
        for error in [1, 5, 12, 22, 75, 95, 108, u32::MAX] {
            assert_eq!(failure(error), Some(Failure::Io), "{error}");
        }
        assert_eq!([Failure::Io, Failure::Invalid, Failure::NoSpace].map(error_number), [5, 22, 28]);
    }

    proptest! {
        #[test]
        fn requests_survive_the_wire(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let request = Request { flags, command, cookie, offset, length };
            prop_assert_eq!(Request::parse(&request.encode()), Some(request));
        }

        #[test]
        fn replies_survive_the_wire(cookie: u64, error: u32) {
            prop_assert_eq!(parse_reply(&encode_reply(cookie, error)), Some((error, cookie)));
        }

        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = (Request::parse(&bytes), parse_reply(&bytes), parse_export_info(&bytes));
            if let Ok(greeting) = <[u8; 18]>::try_from(&bytes[..bytes.len().min(18)]) {
                let _ = is_greeting(&greeting);
            }
            if let Ok(header) = <[u8; 20]>::try_from(&bytes[..bytes.len().min(20)]) {
                let _ = parse_option_reply(&header);
            }
        }
    }
}
