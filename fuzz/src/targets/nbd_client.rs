//! The engine's side towards a replica: a server that answers anything.

use std::io::{self, Cursor, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use engine::buffers::Buffers;
use engine::core::{Core, Event, Operation, Options, Output, Payload, Set, Submission};
use engine::link::Link;
use engine::nbd::client::open_export;
use engine::nbd::wire;

struct Server<'a> {
    says: Cursor<&'a [u8]>,
    hears: Vec<u8>,
}

impl Read for Server<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.says.read(buffer)
    }
}

impl Write for Server<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hears.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The handshake with a replica.
pub fn handshake(data: &[u8]) {
    let mut server = Server { says: Cursor::new(data), hears: vec![] };
    let opened = open_export(&mut server, "vol-7");
    let greeted = data.len() >= 18 && wire::is_greeting(data[..18].try_into().expect("18 bytes"));
    assert_eq!(
        server.hears,
        if greeted { wire::encode_go("vol-7") } else { vec![] },
        "one thing is asked, of a server"
    );
    if let Ok(size) = opened {
        let told = data.windows(8).any(|window| window == size.to_be_bytes());
        assert!(greeted && told, "a size that nobody told");
    }
}

const COOKIES: u64 = 6;
const BYTES: u64 = 512;

/// Replies in the transmission phase, to six requests that are in flight: each ends at most once, and a replica that says
/// something else is left.
pub fn replies(data: &[u8]) {
    let mut buffers = Buffers::default();
    let mut core = Core::new(Options {
        size_bytes: 1 << 20,
        generation: 1,
        replicas: 1,
        members: Set::first(1),
        read_from: None,
        compare: false,
        replica_timeout: Duration::from_secs(8),
        no_replica_hold: Duration::ZERO,
        scratch: vec![buffers.get(1)],
        compare_step_bytes: 1 << 20,
        zero_piece_bytes: 1 << 20,
    });
    for tag in 0..COOKIES {
        let operation = [Operation::Read, Operation::Write, Operation::Flush][tag as usize % 3];
        let (length, payload) = match operation {
            Operation::Flush => (0, None),
            _ => (BYTES, Some(Payload { buffer: buffers.get(1), start: 0 })),
        };
        let submission = Submission { tag, operation, offset: tag * BYTES, length, payload };
        core.handle(Duration::ZERO, Event::Submit(submission));
    }
    let (near, mut far) = UnixStream::pair().expect("a pair of sockets");
    far.set_nonblocking(true).expect("a socket");
    let mut link = Link::new(OwnedFd::from(near)).expect("a link");
    let mut outputs = vec![];
    core.take_outputs(&mut outputs);
    let mut cookies = vec![];
    for output in &outputs {
        if let Output::Send(transfer) = output {
            cookies.push(transfer.cookie);
            link.push(transfer);
        }
    }
    assert_eq!(cookies.len() as u64, COOKIES, "all are under way");
    link.send(&buffers).expect("the replica is there");
    let (mut completed, mut lost) = ([false; COOKIES as usize], false);
    for part in with_cookies(data, &cookies).chunks(700) {
        if far.write_all(part).is_err() {
            break;
        }
        lost = link.receive(0, &mut core, &mut buffers, Duration::ZERO).is_err();
        core.take_outputs(&mut outputs);
        for output in outputs.drain(..) {
            if let Output::Complete { tag, .. } = output {
                assert!(!std::mem::replace(&mut completed[tag as usize], true), "request {tag} ended twice");
            }
        }
        if lost || core.members().is_empty() {
            break;
        }
    }
    if lost {
        core.handle(Duration::ZERO, Event::ConnectionLost { replica: 0, reason: "it speaks nonsense".into() });
        assert!(core.members().is_empty(), "it still counts");
    }
}

/// The first byte of a reply's cookie chooses one that is waited for, so that replies mean something.
fn with_cookies(data: &[u8], cookies: &[u64]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let mut at = 0;
    while bytes.get(at..).is_some_and(|rest| wire::parse_reply(rest).is_some()) && at + 16 <= bytes.len() {
        if let Some(cookie) = cookies.get(usize::from(bytes[at + 8])) {
            bytes[at + 8..at + 16].copy_from_slice(&cookie.to_be_bytes());
        }
        // Replies to reads carry bytes; whether this one is, its cookie says.
        let reads = cookies.iter().position(|cookie| bytes[at + 8..at + 16] == cookie.to_be_bytes());
        let succeeded = bytes[at + 4..at + 8] == [0; 4];
        at += wire::REPLY_LENGTH
            + if succeeded && reads.is_some_and(|index| index % 3 == 0) { BYTES as usize } else { 0 };
    }
    bytes
}
