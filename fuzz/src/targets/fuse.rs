//! What comes from `/dev/fuse`.

use engine::fuse::wire::{FORGET, OUT_HEADER, Request, WRITE_DATA, answer, error_reply, parse, write_reply};

const SIZE_BYTES: u64 = 1 << 30;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn assert_well_formed(reply: &[u8], unique: u64) {
    assert!(reply.len() >= OUT_HEADER && u32_at(reply, 0) as usize == reply.len(), "the length is that of the reply");
    assert_eq!(reply[8..16], unique.to_ne_bytes(), "it answers what was asked");
    assert!((-4095..=0).contains(&(u32_at(reply, 4) as i32)), "the kernel takes no other error number");
}

/// One request.
pub fn request(data: &[u8]) {
    let Some((unique, request)) = parse(data) else { return };
    match request {
        Request::Write { length, .. } => {
            assert!(data.len() - WRITE_DATA >= length as usize, "a write without its bytes");
            assert_well_formed(&write_reply(unique, length), unique);
        }
        Request::Read { .. } | Request::Flush | Request::Zero { .. } => {
            assert_well_formed(&error_reply(unique, libc_enospc()), unique);
        }
        Request::Other { opcode } => match answer(data, unique, opcode, SIZE_BYTES) {
            Some(reply) => assert_well_formed(&reply, unique),
            None => assert!(opcode == FORGET || opcode == 36 || opcode == 42, "only these are not answered"),
        },
    }
}

fn libc_enospc() -> i32 {
    rustix::io::Errno::NOSPC.raw_os_error()
}
