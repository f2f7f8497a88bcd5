//! The engine's NBD server: a client that sends anything.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use engine::buffers::Buffers;
use engine::core::{Failure, Operation};
use engine::limits;
use engine::nbd::server::{Handshake, Progress, parse_client_flags};
use engine::nbd::wire;
use engine::process::nbd_frontend::{Arrived, Session};

const SERVED: Handshake<'static> = Handshake { export: "vol-1", size_bytes: 1 << 20 };

/// Answers what `input` asks, when it comes in pieces of `piece` bytes; and where that ends.
fn negotiate(input: &[u8], piece: usize) -> (Vec<u8>, Option<Progress>) {
    let (mut answer, mut have, mut no_zeroes) = (vec![], vec![], None);
    for part in input.chunks(piece) {
        have.extend_from_slice(part);
        loop {
            let Some(no_zeroes) = no_zeroes else {
                match have.len() {
                    0..4 => break,
                    _ => match parse_client_flags(&have) {
                        Some(wish) => no_zeroes = Some(wish),
                        None => return (answer, Some(Progress::End)),
                    },
                }
                have.drain(..4);
                continue;
            };
            let (taken, progress) = SERVED.option(&have, no_zeroes, &mut answer);
            assert!(taken <= have.len());
            if progress != Progress::More {
                return (answer, Some(progress));
            }
            if taken == 0 {
                break;
            }
            have.drain(..taken);
        }
    }
    (answer, None)
}

/// Options in any order and in any pieces.
pub fn handshake(data: &[u8]) {
    let whole = negotiate(data, data.len().max(1));
    for piece in [1, 7, 16] {
        assert_eq!(negotiate(data, piece), whole, "the answer depends on how the bytes arrive");
    }
    let replies = 3 + data.len() / 16 * 4;
    assert!(whole.0.len() <= replies * (20 + 256), "much is said to one who asks little");
}

/// Everything a session sent, cut into replies; each names its request and is followed by what was read.
fn check_replies(mut sent: &[u8], reads: &[(u64, usize)], asked: &[u64]) {
    let mut answered: Vec<u64> = vec![];
    while !sent.is_empty() {
        let (error, cookie) = wire::parse_reply(sent).expect("a reply");
        let length = reads.iter().find(|(read, _)| *read == cookie && error == 0).map_or(0, |(_, length)| *length);
        sent = &sent[wire::REPLY_LENGTH + length..];
        answered.push(cookie);
    }
    let mut asked = asked.to_vec();
    answered.sort_unstable();
    asked.sort_unstable();
    assert_eq!(answered, asked, "every request has one reply");
}

/// What a client that opened the export sends then: requests are answered once each, memory is given back.
pub fn session(data: &[u8]) {
    let Some((steps, bytes)) = data.split_first() else { return };
    let (near, mut far) = UnixStream::pair().expect("a pair of sockets");
    far.set_nonblocking(true).expect("a socket");
    let mut buffers = Buffers::default();
    let mut session = Session::new(OwnedFd::from(near), 1).expect("a session");
    far.write_all(&wire::encode_go("vol-1")).expect("room in the socket");
    let mut arrived: Vec<Arrived> = vec![];
    session.receive(&SERVED, &mut buffers, &mut arrived).expect("the handshake is right");
    assert!(session.uses_export() && arrived.is_empty());
    session.send(&mut buffers).expect("the client is there");
    let greeting_and_answer = far.read(&mut [0; 4096]).expect("an answer");
    assert!(greeting_and_answer > 18);

    let (mut sent, mut reads, mut asked, mut open) = (vec![], vec![], vec![], vec![]);
    // Cookies are made unique, so that replies can be told apart.
    let bytes = with_unique_cookies(bytes);
    let mut alive = true;
    for part in bytes.chunks(usize::from(*steps) * 16 + 1) {
        if far.write_all(part).is_err() {
            break;
        }
        alive = session.receive(&SERVED, &mut buffers, &mut arrived).is_ok();
        for request in arrived.drain(..) {
            assert!(request.length <= u64::from(u32::MAX));
            let io = matches!(request.operation, Operation::Read | Operation::Write);
            assert!(!io || request.length <= u64::from(limits::NBD_MAX_IO));
            assert_eq!(request.buffer.is_some(), io, "bytes have a buffer, nothing else has");
            if let Some(buffer) = request.buffer {
                assert!(buffers.bytes(buffer).len() as u64 >= request.length);
            }
            open.push(request);
        }
        assert!(open.len() <= limits::NBD_CLIENT_REQUESTS, "a client has too many requests in flight");
        let held: u64 = open.iter().filter(|request| request.buffer.is_some()).map(|request| request.length).sum();
        assert!(
            held <= (limits::NBD_CLIENT_BYTES + limits::NBD_MAX_IO as usize) as u64,
            "a client holds too much memory"
        );
        // Some are answered at once, others stay in flight.
        while open.len() > usize::from(*steps % 64) {
            answer(&mut session, &mut buffers, open.remove(0), &mut reads, &mut asked);
        }
        drain(&mut session, &mut buffers, &mut far, &mut sent);
        if !alive {
            break;
        }
    }
    for request in open {
        answer(&mut session, &mut buffers, request, &mut reads, &mut asked);
    }
    if alive {
        drain(&mut session, &mut buffers, &mut far, &mut sent);
        let refused: Vec<u64> = refusals(&sent, &reads, &asked);
        asked.extend(refused);
        check_replies(&sent, &reads, &asked);
    }
    session.close(&mut buffers);
    assert!(buffers.all_free(), "a client that is gone leaves buffers behind");
}

fn answer(
    session: &mut Session,
    buffers: &mut Buffers,
    request: Arrived,
    reads: &mut Vec<(u64, usize)>,
    asked: &mut Vec<u64>,
) {
    let result = if request.offset.is_multiple_of(3) { Err(Failure::Io) } else { Ok(()) };
    asked.push(request.cookie);
    if request.operation == Operation::Read {
        reads.push((request.cookie, request.length as usize));
    }
    if let Some(unused) = session.answer(&request, result) {
        buffers.put(unused);
    }
}

/// Sends all that is queued; the socket of a test holds little.
fn drain(session: &mut Session, buffers: &mut Buffers, far: &mut UnixStream, sent: &mut Vec<u8>) {
    let mut chunk = vec![0; 1 << 16];
    loop {
        if session.send(buffers).is_err() {
            return;
        }
        match far.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(count) => sent.extend_from_slice(&chunk[..count]),
        }
    }
}

/// Replies to what the session refused by itself: an error for a request that never arrived.
fn refusals(mut sent: &[u8], reads: &[(u64, usize)], asked: &[u64]) -> Vec<u64> {
    let mut refused = vec![];
    while let Some((error, cookie)) = wire::parse_reply(sent) {
        let length = reads.iter().find(|(read, _)| *read == cookie && error == 0).map_or(0, |(_, length)| *length);
        sent = &sent[(wire::REPLY_LENGTH + length).min(sent.len())..];
        if !asked.contains(&cookie) {
            assert_eq!(error, 22, "what cannot be done is refused as invalid");
            refused.push(cookie);
        }
    }
    refused
}

fn with_unique_cookies(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let (mut at, mut cookie) = (0, 1u64);
    while let Some(request) = bytes.get(at..).and_then(wire::Request::parse) {
        bytes[at + 8..at + 16].copy_from_slice(&cookie.to_be_bytes());
        cookie += 1;
        let payload = if request.command == wire::CMD_WRITE { request.length as usize } else { 0 };
        at += wire::REQUEST_LENGTH + payload;
    }
    bytes
}
