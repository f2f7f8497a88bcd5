//! The volume as an NBD export on a unix socket, for local tools.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::buffers::Buffers;
use crate::core::{BufferId, Failure, Operation, Payload};
use crate::limits;
use crate::nbd::server::{Handshake, Progress, greeting, parse_client_flags};
use crate::nbd::wire::{self, Request};
use crate::queue::SendQueue;

enum Stage {
    Flags,
    Options { no_zeroes: bool },
    Transmission,
}

/// A write whose bytes are still coming.
struct Receiving {
    request: Request,
    buffer: BufferId,
    done: usize,
}

/// A request that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    pub cookie: u64,
    pub operation: Operation,
    pub offset: u64,
    pub length: u64,
    pub buffer: Option<BufferId>,
}

/// The connection ended, or the client broke the protocol.
#[derive(Debug)]
pub struct Ended;

/// One client.
pub struct Session {
    socket: OwnedFd,
    /// Tells the client from an earlier one in the same place.
    pub serial: u64,
    stage: Stage,
    inbox: Box<[u8]>,
    have: usize,
    receiving: Option<Receiving>,
    handshake_answer: Vec<u8>,
    /// Tagged with buffer and length of a read's bytes, or 0.
    queue: SendQueue,
    in_flight: usize,
    in_flight_bytes: usize,
    /// The client said good-bye: what is in flight is still answered.
    leaving: bool,
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Session {
    pub fn new(socket: OwnedFd, serial: u64) -> Result<Session, Errno> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Session {
            socket,
            serial,
            stage: Stage::Flags,
            inbox: vec![0; limits::RECEIVE_BYTES].into_boxed_slice(),
            have: 0,
            receiving: None,
            handshake_answer: greeting(),
            queue: SendQueue::default(),
            in_flight: 0,
            in_flight_bytes: 0,
            leaving: false,
        })
    }

    /// Whether it opened the export.
    pub fn uses_export(&self) -> bool {
        matches!(self.stage, Stage::Transmission)
    }

    pub fn is_over(&self) -> bool {
        self.leaving && self.in_flight == 0 && self.queue.is_empty() && self.handshake_answer.is_empty()
    }

    fn is_full(&self) -> bool {
        self.in_flight >= limits::NBD_CLIENT_REQUESTS || self.in_flight_bytes >= limits::NBD_CLIENT_BYTES
    }

    /// Takes what has come; whole requests go to `arrived`.
    ///
    /// # Errors
    /// When the connection ended, or the client breaks the protocol.
    pub fn receive(
        &mut self,
        handshake: &Handshake<'_>,
        buffers: &mut Buffers,
        arrived: &mut Vec<Arrived>,
    ) -> Result<(), Ended> {
        while !self.leaving && !self.is_full() {
            // What is left from before comes first: there may be whole requests in it.
            if self.receiving.is_none() && self.take(handshake, buffers, arrived)? {
                continue;
            }
            if self.leaving || self.is_full() {
                break;
            }
            let room = match &self.receiving {
                Some(r) => &mut buffers.bytes_mut(r.buffer)[r.done..r.request.length as usize],
                None => &mut self.inbox[self.have..],
            };
            let offered = room.len();
            let count = match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(Ended),
                Ok((_, count)) => count.min(offered),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(_) => return Err(Ended),
            };
            match &mut self.receiving {
                Some(receiving) => {
                    receiving.done += count;
                    self.write_arrived(arrived);
                }
                None => self.have += count,
            }
        }
        Ok(())
    }

    /// Takes one message from the inbox; whether there was one.
    fn take(
        &mut self,
        handshake: &Handshake<'_>,
        buffers: &mut Buffers,
        arrived: &mut Vec<Arrived>,
    ) -> Result<bool, Ended> {
        let input = &self.inbox[..self.have];
        let taken = match self.stage {
            Stage::Flags if input.len() < 4 => 0,
            Stage::Flags => {
                self.stage = Stage::Options { no_zeroes: parse_client_flags(input).ok_or(Ended)? };
                4
            }
            Stage::Options { no_zeroes } => {
                let (taken, progress) = handshake.option(input, no_zeroes, &mut self.handshake_answer);
                match progress {
                    Progress::More => {}
                    Progress::Transmission => self.stage = Stage::Transmission,
                    Progress::End => self.leaving = true,
                }
                taken
            }
            Stage::Transmission if input.len() < wire::REQUEST_LENGTH => 0,
            Stage::Transmission => {
                let request = Request::parse(input).ok_or(Ended)?;
                return self.take_request(request, buffers, arrived).map(|()| true);
            }
        };
        self.inbox.copy_within(taken..self.have, 0);
        self.have -= taken;
        Ok(taken > 0)
    }

    fn take_request(
        &mut self,
        request: Request,
        buffers: &mut Buffers,
        arrived: &mut Vec<Arrived>,
    ) -> Result<(), Ended> {
        let mut taken = wire::REQUEST_LENGTH;
        let Request { flags, command, cookie, offset, length } = request;
        let (bytes, length_u64) = (length as usize, u64::from(length));
        let operation = match (command, flags) {
            (wire::CMD_READ, 0) if length <= limits::NBD_MAX_IO => Some(Operation::Read),
            (wire::CMD_WRITE, 0) if length <= limits::NBD_MAX_IO => Some(Operation::Write),
            // Nobody can tell where the next request begins.
            (wire::CMD_WRITE, _) => return Err(Ended),
            (wire::CMD_FLUSH, 0) => Some(Operation::Flush),
            // What a trimmed range reads as is open; zeroes are the same on all replicas.
            (wire::CMD_TRIM, 0) | (wire::CMD_WRITE_ZEROES, 0) => Some(Operation::Zero { allocate: false }),
            (wire::CMD_WRITE_ZEROES, wire::NO_HOLE) => Some(Operation::Zero { allocate: true }),
            (wire::CMD_DISC, _) => {
                self.leaving = true;
                return Ok(());
            }
            _ => None,
        };
        let mut buffer = None;
        match operation {
            Some(Operation::Read) => {
                buffer = Some(buffers.get(bytes));
                self.in_flight_bytes += bytes;
            }
            Some(Operation::Write) => {
                let id = buffers.get(bytes);
                let here = bytes.min(self.have - taken);
                buffers.bytes_mut(id)[..here].copy_from_slice(&self.inbox[taken..taken + here]);
                taken += here;
                self.in_flight_bytes += bytes;
                self.receiving = Some(Receiving { request, buffer: id, done: here });
            }
            _ => {}
        }
        self.inbox.copy_within(taken..self.have, 0);
        self.have -= taken;
        match operation {
            Some(Operation::Write) => self.write_arrived(arrived),
            Some(operation) => {
                self.in_flight += 1;
                let (offset, length) = if operation == Operation::Flush { (0, 0) } else { (offset, length_u64) };
                arrived.push(Arrived { cookie, operation, offset, length, buffer });
            }
            None => self.queue.push(0, &wire::encode_reply(cookie, wire::error_number(Failure::Invalid)), None),
        }
        Ok(())
    }

    fn write_arrived(&mut self, arrived: &mut Vec<Arrived>) {
        if let Some(Receiving { request, buffer, done }) =
            self.receiving.take_if(|r| r.done == r.request.length as usize)
        {
            debug_assert_eq!(done, request.length as usize);
            self.in_flight += 1;
            arrived.push(Arrived {
                cookie: request.cookie,
                operation: Operation::Write,
                offset: request.offset,
                length: u64::from(request.length),
                buffer: Some(buffer),
            });
        }
    }

    /// Answers a request. The buffer of a read that succeeded comes back by [`Session::send`], any other one at once.
    pub fn answer(&mut self, request: &Arrived, result: Result<(), Failure>) -> Option<BufferId> {
        self.in_flight -= 1;
        let header = wire::encode_reply(request.cookie, result.err().map_or(0, wire::error_number));
        match request.buffer {
            Some(buffer) if request.operation == Operation::Read && result.is_ok() => {
                let payload = (Payload { buffer, start: 0 }, request.length as usize);
                let tag = u64::from(buffer.0 + 1) << 32 | request.length;
                self.queue.push(tag, &header, Some(payload));
                None
            }
            buffer => {
                self.in_flight_bytes -= buffer.map_or(0, |_| request.length as usize);
                self.queue.push(0, &header, None);
                buffer
            }
        }
    }

    /// Sends what is queued, as much as the socket takes.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn send(&mut self, buffers: &mut Buffers) -> Result<(), Ended> {
        while !self.handshake_answer.is_empty() {
            match send(&self.socket, &self.handshake_answer, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => drop(self.handshake_answer.drain(..count)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Ended),
            }
        }
        if self.queue.is_empty() {
            return Ok(());
        }
        let mut sent = Vec::new();
        let result = self.queue.send(&self.socket, buffers, |tag| sent.push(tag));
        self.give_back(sent, buffers);
        result.map_err(|_| Ended)
    }

    fn give_back(&mut self, tags: Vec<u64>, buffers: &mut Buffers) {
        for tag in tags.into_iter().filter(|tag| *tag > 0) {
            buffers.put(BufferId((tag >> 32) as u32 - 1));
            self.in_flight_bytes -= tag as u32 as usize;
        }
    }

    /// Gives back every buffer that is not in flight; the session ends.
    pub fn close(mut self, buffers: &mut Buffers) {
        if let Some(receiving) = self.receiving.take() {
            buffers.put(receiving.buffer);
        }
        let tags = self.queue.clear();
        self.give_back(tags, buffers);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const HANDSHAKE: Handshake<'static> = Handshake { export: "vol-1", size_bytes: 1 << 30 };
    const NONE: (u64, u64) = (0, 0);

    struct Client {
        session: Session,
        buffers: Buffers,
        far: UnixStream,
    }

    impl Client {
        /// In transmission phase, with the 10 bytes of the handshake's end read.
        fn new() -> Client {
            let (near, far) = UnixStream::pair().unwrap();
            let session = Session::new(OwnedFd::from(near), 1).unwrap();
            let mut client = Client { session, buffers: Buffers::default(), far };
            let option =
                [&wire::OPTION_MAGIC.to_be_bytes()[..], &wire::OPT_EXPORT_NAME.to_be_bytes(), &[0; 4]].concat();
            client.says(&[&3u32.to_be_bytes()[..], &option].concat()).unwrap();
            assert!(client.session.uses_export());
            client.far.read_exact(&mut [0; 18 + 10]).unwrap();
            client
        }

        fn says(&mut self, bytes: &[u8]) -> Result<Vec<Arrived>, Ended> {
            self.far.write_all(bytes).unwrap();
            self.more()
        }

        fn more(&mut self) -> Result<Vec<Arrived>, Ended> {
            let mut arrived = vec![];
            self.session.receive(&HANDSHAKE, &mut self.buffers, &mut arrived)?;
            self.session.send(&mut self.buffers)?;
            Ok(arrived)
        }

        fn asks(&mut self, command: u16, flags: u16, (offset, length): (u64, u64)) -> Result<Vec<Arrived>, Ended> {
            self.says(&request(command, flags, 7, offset, length as u32))
        }

        fn hears(&mut self) -> (u32, u64) {
            let mut reply = [0; wire::REPLY_LENGTH];
            self.far.read_exact(&mut reply).unwrap();
            wire::parse_reply(&reply).unwrap()
        }
    }

    fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> [u8; wire::REQUEST_LENGTH] {
        Request { flags, command, cookie, offset, length }.encode()
    }

    #[test]
    fn takes_what_it_offers() {
        let zero = |allocate| Operation::Zero { allocate };
        for (command, flags, operation) in [
            (wire::CMD_READ, 0, Operation::Read),
            (wire::CMD_FLUSH, 0, Operation::Flush),
            (wire::CMD_TRIM, 0, zero(false)),
            (wire::CMD_WRITE_ZEROES, 0, zero(false)),
            (wire::CMD_WRITE_ZEROES, wire::NO_HOLE, zero(true)),
        ] {
            let arrived = Client::new().asks(command, flags, (4096, 512)).unwrap();
            let range = if operation == Operation::Flush { NONE } else { (4096, 512) };
            let found = (arrived[0].operation, arrived[0].cookie, (arrived[0].offset, arrived[0].length));
            assert_eq!((arrived.len(), found), (1, (operation, 7, range)));
        }
        let mut client = Client::new();
        assert_eq!(client.asks(wire::CMD_WRITE, 0, (4096, 6)).unwrap(), []);
        assert_eq!(client.says(b"abc").unwrap(), []);
        let arrived = client.says(b"def").unwrap();
        assert_eq!((arrived[0].operation, arrived[0].length), (Operation::Write, 6));
        assert_eq!(client.buffers.bytes(arrived[0].buffer.unwrap())[..6], *b"abcdef");
    }

    /// A flag that is not understood (FUA, FAST_ZERO, …) promises something that would not be kept.
    #[test]
    fn refuses_what_it_does_not_offer_and_goes_on() {
        let (too_long, fua) = ((0, u64::from(limits::NBD_MAX_IO) + 1), 1);
        for (command, flags, range) in [
            (wire::CMD_READ, 0, too_long),
            (wire::CMD_READ, fua, (0, 512)),
            (wire::CMD_FLUSH, fua, NONE),
            (wire::CMD_TRIM, fua, (0, 512)),
            (wire::CMD_WRITE_ZEROES, fua, (0, 512)),
            (wire::CMD_WRITE_ZEROES, 16, (0, 512)),
            (7, 0, (0, 512)),
            (u16::MAX, 0, NONE),
        ] {
            let mut client = Client::new();
            assert_eq!(client.asks(command, flags, range).unwrap(), [], "{command} {flags}");
            assert_eq!(client.hears(), (wire::error_number(Failure::Invalid), 7), "{command} {flags}");
            assert_eq!(client.asks(wire::CMD_READ, 0, (0, 512)).unwrap().len(), 1);
        }
    }

    #[test]
    fn ends_with_a_client_that_cannot_be_understood_any_more() {
        let too_long = (0, u64::from(limits::NBD_MAX_IO) + 1);
        for (command, flags, range) in [(wire::CMD_WRITE, 0, too_long), (wire::CMD_WRITE, 1, (0, 512))] {
            assert!(Client::new().asks(command, flags, range).is_err(), "its bytes would be taken for requests");
        }
        assert!(Client::new().says(&[0; wire::REQUEST_LENGTH]).is_err(), "no magic number");
        let mut client = Client::new();
        let goodbye = [request(wire::CMD_DISC, 0, 1, 0, 0), request(wire::CMD_WRITE_ZEROES, 0, 2, 0, 512)].concat();
        assert_eq!(client.says(&goodbye).unwrap(), [], "nothing is taken after a good-bye");
        assert!(client.session.is_over());
    }

    #[test]
    fn takes_no_more_than_its_share_at_once() {
        for (length, most) in [
            (512, limits::NBD_CLIENT_REQUESTS),
            (limits::NBD_MAX_IO, limits::NBD_CLIENT_BYTES / limits::NBD_MAX_IO as usize),
        ] {
            let mut client = Client::new();
            let arrived = client.says(&request(wire::CMD_READ, 0, 7, 0, length).repeat(most + 1)).unwrap();
            assert_eq!(arrived.len(), most);
            assert_eq!(client.more().unwrap(), []);
            let buffer = client.session.answer(&arrived[0], Err(Failure::Io)).unwrap();
            client.buffers.put(buffer);
            assert_eq!(client.more().unwrap().len(), 1, "an answer makes room");
        }
    }
}
